"""Chapter 21: the corpus, the arithmetic, the sampler and the classifier against independent references."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from llm_from_scratch import data_mix
from llm_from_scratch.data_mix import (
    PAPER_MIX,
    PINS,
    SOURCES,
    SPLITS,
    KindClassifier,
    MixedBatches,
    TokenFile,
    arithmetic,
    chunks,
    distinct_problems,
    docstrings,
    hashed_split,
    held_out,
    mix_of_kinds,
    mix_tokenizer,
    parse_answer,
    source_documents,
    tokenizer_identity,
    without_copies,
    word_counts,
    write_tokens,
)
from llm_from_scratch.tokenizer import COURSE_SPECIAL, Tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[1]
BYTES = Tokenizer({bytes([b]): b for b in range(256)}, COURSE_SPECIAL)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("tokens"), {}
    for name, n in (("a", 40), ("b", 3), ("c", 1)):
        write_tokens(folder / name, [f"{name}{i} " * 30 for i in range(n)], BYTES)
        found[name] = TokenFile.open(folder / name, BYTES, verify=True)
    return found


def same(one, two):
    return all(np.array_equal(one[key], two[key]) for key in one)


def test_pins_are_those_of_requirements():
    text = (ROOT / "requirements.txt").read_text().splitlines()
    text += (ROOT / "requirements-data.txt").read_text().splitlines()
    assert all(f"{package}=={number}" in text for package, number in PINS.items())


def test_another_version_is_an_error(monkeypatch):
    monkeypatch.setattr(data_mix, "version", lambda package: "0.0.1")
    with pytest.raises(ValueError, match=r"jax is installed in version 0.0.1.*jax==0.10.2"):
        data_mix.check_pins(["jax"])


@pytest.mark.parametrize("name", SOURCES)
def test_no_document_is_in_two_splits(name):
    found = {split: source_documents(name, split) for split in SPLITS}
    assert all(len(set(texts)) == len(texts) > 0 for texts in found.values())
    for one, two in itertools.combinations(SPLITS, 2):
        assert not set(found[one]) & set(found[two])


def test_held_out_copy_beats_training_copy():
    named = [
        ("train", "x y"),
        ("test", "x  y\n"),
        ("validation", "x y"),
        ("train", "z"),
        ("train", ""),
    ]
    assert without_copies(named) == {"train": ["z"], "validation": [], "test": ["x  y\n"]}


def test_hashed_split():
    splits = [hashed_split(f"{i}.py") for i in range(4000)]
    assert stats.chisquare(
        [splits.count(split) for split in SPLITS], [3600, 200, 200]
    ).pvalue > 0.001  # fmt: skip


def test_docstrings():
    long = "word " * 50
    source = f'def f():\n    r"""{long}\n\n    more"""\n    x = """{long}"""\n    """short"""\n'
    assert docstrings(source) == [f"{long}\n\nmore\n"]


@pytest.mark.parametrize("split", SPLITS)
def test_every_line_of_arithmetic_is_true(split):
    for problem in arithmetic(400, split, seed=3):
        a, b = problem.operands
        right = {"+": a + b, "-": a - b, "*": a * b, "<": max(a, b)}[problem.operation]
        assert problem.answer == right == parse_answer(problem.text)
        assert sorted(map(int, re.findall(r"\d+", problem.question))) == sorted(problem.operands)
        columns = re.findall(r"^([\d+*-]+)=(\d+): (\d+)$", problem.text, re.M)
        assert all(eval(left) == int(value) for left, value, _ in columns)  # digits and signs only
        assert problem.operation == "<" or int(columns[-1][2]) == right
        for x, sign, y in re.findall(r"^(\d)([<>=])(\d)$", problem.text, re.M):
            assert eval(f"{x}{'==' if sign == '=' else sign}{y}")
        assert problem.text.count("\n") == len(problem.steps) + 2


def test_arithmetic_holds_out_pairs_and_wordings():
    pairs = {}
    for split in SPLITS:
        made = arithmetic(1500, split, seed=1) + arithmetic(500, split, seed=2)
        pairs[split] = {(p.operation, *sorted(p.operands)) for p in made}
        assert any(p.new_wording for p in made) == (split != "train")
    for one, two in itertools.combinations(SPLITS, 2):
        assert not pairs[one] & pairs[two]
    assert arithmetic(20) == arithmetic(40)[:20]
    told = {split: {p.question for p in arithmetic(900, split)} for split in SPLITS}
    for words, home in (("A shop sold", "validation"), ("pages is that", "test")):
        assert {s for s in SPLITS if any(words in question for question in told[s])} == {home}


def test_examinations_have_different_problems(monkeypatch):
    problems = distinct_problems(600)
    assert len({(p.operation, *sorted(p.operands)) for p in problems}) == len(problems) == 600
    assert 150 < sum(p.new_wording for p in problems) < 250
    assert problems[:50] == distinct_problems(300)[:50]
    monkeypatch.setattr(data_mix, "arithmetic", lambda n, *_, **__: problems[:3] * n)
    with pytest.raises(ValueError, match="20 problems of test hold 3 different ones, not 4"):
        distinct_problems(4)


def test_held_out_pieces_are_new():
    texts = (text for name in SOURCES for text in source_documents(name))
    known = {line.strip() for text in texts for line in text.split("\n")}
    for name in ("plays", "code", "docs"):
        whole, found = source_documents(name, "validation"), held_out(name, 40_000)
        assert all(len(t) <= 2_000 and any(t in document for document in whole) for t in found)
        lines = {line.strip() for text in found for line in text.split("\n")}
        assert all(len(line) < 40 for line in known & lines)
        heads = sum(any(document.startswith(text) for document in whole) for text in found)
        assert name == "docs" or heads < len(found) / 2  # most of the documentation is short
    assert held_out("plays", 40_000, split="test") != held_out("plays", 40_000)


def test_wordings():
    wordings = [w for of in data_mix._WORDINGS.values() for w in of]
    assert len(set(wordings)) == len(wordings) == 4 * 28
    assert all(
        {"a", "b"} <= set(re.findall(r"{(\w+)}", w)) <= {*"ab", "name", "things"} for w in wordings
    )


def test_french_is_translated_and_split_by_extension():
    found = {s: {m for d in source_documents("french", s) for m in d.splitlines()} for s in SPLITS}
    assert "Précédent" in found["validation"] and "Précédent" not in found["train"]
    assert sum(len(m.encode()) for m in found["train"]) > 100_000
    assert not any("Previous" == m for messages in found.values() for m in messages)


def test_mix_of_kinds():
    shares = {"general": 0.5, "mathematics": 0.25, "code": 0.17, "multilingual": 0.08}
    assert mix_of_kinds(shares) == pytest.approx(PAPER_MIX)
    only = mix_of_kinds({"general": 1.0})
    assert sum(only.values()) == pytest.approx(1) and only["code"] == 0
    assert only["plays"] / only["docs"] == pytest.approx(PAPER_MIX["plays"] / PAPER_MIX["docs"])
    with pytest.raises(ValueError, match="no kind"):
        mix_of_kinds({"web": 1.0})


def test_every_digit_is_a_token(tmp_path, monkeypatch):
    texts = ("12 and 12 and 12, 345 345 12",) * 4
    monkeypatch.setattr(data_mix, "source_documents", lambda name, split="train": texts)
    tokenizer = mix_tokenizer(tmp_path, 274)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("123")] == ["1", "2", "3"]
    assert mix_tokenizer(tmp_path, 274).ranks == tokenizer.ranks


def test_parse_answer():
    assert parse_answer("x\nAnswer: 12\nAnswer: 13\n") == 12
    assert parse_answer("the Answer: 12") is None and parse_answer("Answer: 1 2") is None


def test_tokens_on_disk(tmp_path, files):
    texts = ["To be", "or not"]
    write_tokens(tmp_path / "t", texts, BYTES)
    found = TokenFile.open(tmp_path / "t", BYTES, verify=True)
    ids = [id for text in texts for id in BYTES.encode(text, bos=True, eos=True)]
    assert found.ids.tolist() == ids and isinstance(found.ids, np.memmap)
    other = Tokenizer(train_bpe(["to be to be"], 258), COURSE_SPECIAL)
    assert tokenizer_identity(other) != tokenizer_identity(BYTES)
    with pytest.raises(ValueError, match="another tokenizer"):
        TokenFile.open(tmp_path / "t", other)
    data = bytearray((tmp_path / "t").read_bytes())
    data[4] ^= 1
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256"):
        TokenFile.open(tmp_path / "t", BYTES, verify=True)
    (tmp_path / "t").write_bytes(data[:-2])
    with pytest.raises(ValueError, match="tokens, not"):
        TokenFile.open(tmp_path / "t", BYTES)
    with pytest.raises(ValueError, match="at least one document"):
        write_tokens(tmp_path / "t", [], BYTES)


def test_shares_are_those_of_the_schedule(files):
    schedule = [(0, {"a": 5, "b": 3, "c": 2}), (700, {"a": 1, "c": 1}), (1500, {"b": 1})]
    batches = MixedBatches(files, schedule, 8, 32, seed=4)
    at = [batches.rows_before(c) for c in (0, 700, 1500, 1600)]
    first, second, third = np.diff(at, axis=0)
    assert stats.chisquare(first, 5600 * np.array([0.5, 0.3, 0.2])).pvalue > 0.001
    assert second[1] == 0 and stats.binomtest(int(second[0]), 6400, 0.5).pvalue > 0.001
    assert third.tolist() == [0, 800, 0]
    report = batches.report(1600)
    assert report["c"]["epochs"] == pytest.approx(at[3][2] * 32 / len(files["c"].ids))
    assert sum(found["tokens"] for found in report.values()) == 1600 * 8 * 32


@pytest.mark.parametrize("end", [3, 40, 200])
def test_unique_tokens_are_counted_exactly(files, end):
    batches = MixedBatches(files, [(0, {"a": 5, "b": 3, "c": 2})], 8, 32, seed=4)
    given, seen = [0] * 3, [set(), set(), set()]
    for source in batches.drawn(0)[:end].flat:  # the rows one by one, their positions in sets
        size = len(list(files.values())[source].ids)
        epoch, place = divmod(given[source], size // 32)
        start = int(batches.order(source, epoch)[place])
        seen[source] |= {(start + k) % size for k in range(32)}
        given[source] += 1
    assert [found["unique"] for found in batches.report(end).values()] == [len(s) for s in seen]
    assert len(seen[0]) < len(files["a"].ids) or end == 200


def test_a_batch_is_a_function_of_cursor_and_seed(files):
    weights = [(0, {"a": 1, "b": 1, "c": 1})]
    walked = MixedBatches(files, weights, 6, 32)
    for cursor in range(1020, 1030):
        batch = walked(cursor)
        assert same(batch, MixedBatches(files, weights, 6, 32)(cursor))
        hosts = [MixedBatches(files, weights, 6, 32, 0, h, 3)(cursor) for h in range(3)]
        assert same(batch, {k: np.concatenate([host[k] for host in hosts]) for k in batch})
    assert not same(batch, MixedBatches(files, weights, 6, 32, seed=1)(cursor))


def test_windows_targets_and_epochs(files):
    batches = MixedBatches(files, [(0, {"b": 1})], 4, 32)
    ids, count = files["b"].ids, len(files["b"].ids) // 32
    starts = np.sort([batches.order(1, 5)[i] for i in range(count)])
    assert (np.diff(starts) == 32).all()  # an epoch visits each window once
    wrapped = np.concatenate([ids, ids]).astype(int)
    for cursor in range(20):
        batch = batches(cursor)
        for row, targets, segments in zip(*(batch[k] for k in batch), strict=True):
            text = np.lib.stride_tricks.sliding_window_view(wrapped, 32)
            start = int(np.flatnonzero((text == row).all(1))[0])
            following = wrapped[start + 1 : start + 33]
            assert (targets == np.where(following == BYTES.bos_id, -1, following)).all()
            assert (np.diff(segments) == (row[1:] == BYTES.bos_id)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": []}, "begin at batch 0"),
        ({"schedule": [(1, {"a": 1})]}, "begin at batch 0"),
        ({"schedule": [(0, {"x": 1})]}, "no source"),
        ({"schedule": [(0, {"a": 0})]}, "one > 0"),
        ({"schedule": [(0, {"a": -1, "b": 2})]}, ">= 0"),
        ({"batch": 3, "hosts": 2}, "split evenly"),
        ({"host": 1}, "host=1"),
        ({"context": 10_000}, "needs more"),
        ({"context": 0}, "at least 1 token"),
    ],
)
def test_batches_that_cannot_be(files, options, message):
    usual = {"schedule": [(0, {"a": 1})], "batch": 4, "context": 32}
    with pytest.raises(ValueError, match=message):
        MixedBatches(files, **usual | options)


def test_classifier_is_naive_bayes():
    labelled = {"x": ["a b b"], "y": ["c"]}
    fitted = KindClassifier.fit(labelled)
    total = 3 + data_mix.BUCKETS
    bucket = int(np.flatnonzero(word_counts("b"))[0])
    assert fitted.log_words[0, bucket] == pytest.approx(np.log(3 / total))
    assert [fitted(text) for text in ("b a", "c", "B.")] == ["x", "y", "x"]
    assert chunks(["abcdef", "x"], 4) == ["abcd", "x"]
    with pytest.raises(ValueError, match="two kinds"):
        KindClassifier.fit({"x": ["a"]})


def test_stored_runs_support_the_choice():
    """The choice by extrapolation and its lead, from the file alone; every arm has its seeds."""
    rows = json.loads((ROOT / "results" / "data_mix.json").read_text())["rows"]

    def score(arm):
        found = [(r["seed"], r) for r in rows if r["arm"] == arm]
        kinds = ("mathematics", "code", "multilingual")
        scores = [
            ((r["plays"] + r["docs"]) / 2 + sum(r[k] for k in kinds)) / 4
            for _, r in sorted(found, key=lambda pair: pair[0])
        ]
        return np.array(scores)

    names, slope = ("paper", "general", "code", "mathematics"), np.log(4) / np.log(2.25)
    forecast = {
        n: np.log(score(f"{n} 48").mean())
        + (np.log(score(f"{n} 48").mean()) - np.log(score(f"{n} 32").mean())) * slope
        for n in names
    }
    chosen = min(forecast, key=forecast.get)
    large = {n: score(f"{n} 96") for n in names}
    others = np.mean([large[n] for n in names if n != chosen], axis=0)
    assert chosen == "paper" and (others - large[chosen]).mean() > 0.02
    assert large["mathematics"].mean() < large["paper"].mean()  # the best was not chosen
    seeds = {row["arm"]: {r["seed"] for r in rows if r["arm"] == row["arm"]} for row in rows}
    for name in ("paper", "general", "code", "mathematics"):
        assert len(seeds[f"{name} 32"]) == len(seeds[f"{name} 48"]) == len(seeds[f"{name} 96"]) == 5
        assert (
            not seeds[f"{name} 96"] & seeds[f"{name} 48"]
        )  # the large runs have seeds of their own
    assert {len(seeds[a]) for a in ("even", "late", "early", "as found", "down-sampled")} == {5}
    assert all(seeds[arm] == {98} for arm in seeds if arm.startswith("rate "))
    assert len({(row["arm"], row["seed"]) for row in rows}) == len(rows)


def test_bad_input(tmp_path):
    for call, message in (
        (lambda: source_documents("web"), "source must be one of"),
        (lambda: source_documents("code", "dev"), "split one of"),
        (lambda: arithmetic(1, "dev"), "split must be"),
        (lambda: arithmetic(1, limit=5), "limit >= 10"),
        (lambda: mix_tokenizer(tmp_path, 100), "at least 272"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert abs(sum(PAPER_MIX.values()) - 1) < 1e-9 and PAPER_MIX.keys() == SOURCES.keys()
