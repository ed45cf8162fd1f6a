"""The n-gram models against NLTK, against slow code written from the formulas, and on bad input."""

import json
import lzma
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_from_scratch import bigram
from llm_from_scratch.bigram import NGram, bits_per_byte, count_tables, sample, tune, windows

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("ngram.json").read_text())
DOCUMENTS = [d.encode() for d in GOLDEN["documents"]]
QUERIES = [q.encode() for q in GOLDEN["queries"]]


def parameters_of(method: str, n: int) -> list[float]:
    return {"add-k": [0.3], "interpolation": [0.9] * n, "kneser-ney": [0.6] * n}[method]


# ---------------------------------------------------------------- independent references


def nltk_agrees(method: str) -> int:
    compared = 0
    for case in GOLDEN["models"]:
        if case["method"] == method:
            d = case["parameter"]  # NLTK does not discount the unigrams
            parameters = [d] if method == "add-k" else [0.0] + [d] * (case["order"] - 1)
            model = NGram(case["order"], method, parameters).fit(DOCUMENTS)
            for query, expected in zip(QUERIES, case["p"], strict=True):
                found = np.exp(model.log_prob([query]))
                np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
                compared += len(expected)
    return compared


def test_kneser_ney_agrees_with_nltk():
    assert nltk_agrees("kneser-ney") > 500


def test_add_k_agrees_with_nltk():
    assert nltk_agrees("add-k") > 300


def test_hand_computed_table():
    """The bigrams of Jurafsky and Martin's three sentences, one byte for a word; "." is </s>."""
    code = {
        w: bytes([i]) for i, w in enumerate("I am Sam . do not like green eggs and ham".split())
    }
    sentences = ["I am Sam .", "Sam I am .", "I do not like green eggs and ham ."]
    documents = [b"".join(code[w] for w in s.split()) for s in sentences]
    model = NGram(2, "add-k", [0.0]).fit(documents)
    for context, word, expected in (
        ("", "I", 2 / 3),
        ("", "Sam", 1 / 3),
        ("I", "am", 2 / 3),
        ("Sam", ".", 1 / 2),
        ("am", "Sam", 1 / 2),
        ("I", "do", 1 / 3),
    ):
        p = model.probabilities(code[context] if context else b"")
        assert p[code[word][0]] == pytest.approx(expected, abs=1e-15)
    add_one = NGram(2, "add-k", [1.0]).fit(documents).probabilities(code["I"])
    assert add_one[code["am"][0]] == pytest.approx(3 / 259)  # (2 + 1) / (3 + 256)


def slow_kneser_ney(documents, n, discounts, context, byte):
    """Interpolated Kneser-Ney from its definition, with sets of tuples and exact fractions."""
    grams = Counter()
    for d in documents:
        padded = (bigram.START,) * (n - 1) + tuple(d)
        grams.update(padded[i : i + n] for i in range(len(d)))
    p = Fraction(1, 256)
    for order in range(1, n + 1):
        short = context[n - order :]
        if order == n:
            after = {g[-1]: c for g, c in grams.items() if g[:-1] == short}
        else:
            kinds = {g[n - order - 1 :] for g in grams}
            after = Counter(g[-1] for g in kinds if g[1:-1] == short)
        total = sum(after.values())
        if total:
            d = Fraction(discounts[order - 1])
            p = max(after.get(byte, 0) - d, Fraction(0)) / total + d * len(after) / total * p
    return float(p)


@given(
    st.lists(st.binary(max_size=12).map(lambda b: bytes(x % 3 for x in b)), min_size=1, max_size=4),
    st.integers(1, 4),
    st.binary(max_size=5).map(lambda b: bytes(x % 4 for x in b)),
)
@settings(max_examples=60, deadline=None)
def test_kneser_ney_from_its_definition(documents, n, text):
    discounts = [0.25, 0.5, 0.75, 0.125][:n]
    found = np.exp(NGram(n, "kneser-ney", discounts).fit(documents).log_prob([text]))
    padded = (bigram.START,) * (n - 1) + tuple(text)
    for i, byte in enumerate(text):
        expected = slow_kneser_ney(documents, n, discounts, padded[i : i + n - 1], byte)
        assert found[i] == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.binary(max_size=30), max_size=4), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_counts_are_a_dictionary(documents, n):
    tables = count_tables(documents, n)
    assert [t.order for t in tables] == list(range(1, n + 1))
    for table in tables:
        expected = Counter()
        for d in documents:
            padded = [bigram.START] * (table.order - 1) + list(d)
            for i in range(len(d)):
                key = 0
                for symbol in padded[i : i + table.order - 1]:
                    key = key * 257 + symbol
                expected[key * 256 + d[i]] += 1
        assert dict(zip(table.grams.tolist(), table.counts.tolist(), strict=True)) == expected
        assert (np.diff(table.grams) > 0).all() and table.counts.sum() == sum(map(len, documents))


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("method", NGram.METHODS)
@pytest.mark.parametrize("n", range(1, 7))
def test_sums_to_one(method, n):
    for parameters in (parameters_of(method, n), [0.0] * len(parameters_of(method, n))):
        model = NGram(n, method, parameters).fit(DOCUMENTS)
        for context in [b"", b"t", b"to be", *QUERIES, b"\xff" * 9, b"\x00\xffqqqq"]:
            p = model.probabilities(context)
            assert p.shape == (256,) and (p >= 0).all()
            assert p.sum() == pytest.approx(1, abs=1e-12)


@given(st.binary(min_size=1, max_size=40), st.integers(1, 6), st.sampled_from(NGram.METHODS))
@settings(max_examples=60, deadline=None)
def test_log_prob_is_the_product_of_next_bytes(text, n, method):
    model = NGram(n, method, parameters_of(method, n)).fit(DOCUMENTS)
    found = model.log_prob([text])
    expected = [math.log(model.probabilities(text[:i])[b]) for i, b in enumerate(text)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("method", NGram.METHODS)
def test_documents_do_not_see_each_other(method):
    model = NGram(4, method, parameters_of(method, 4)).fit(DOCUMENTS)
    apart = np.concatenate([model.log_prob([q]) for q in QUERIES])
    np.testing.assert_array_equal(model.log_prob(QUERIES), apart)
    assert not np.array_equal(model.log_prob([b"".join(QUERIES)]), apart)


def test_order_of_a_document_matters_but_not_of_documents():
    one, other = (NGram(3).fit(d) for d in (DOCUMENTS, DOCUMENTS[::-1]))
    np.testing.assert_allclose(one.log_prob(QUERIES), other.log_prob(QUERIES), rtol=1e-13)


def test_tables_may_be_reused():
    tables = count_tables(DOCUMENTS, 6)
    for n in (1, 3, 6):
        a, b = NGram(n).fit(DOCUMENTS), NGram(n).fit(DOCUMENTS, tables)
        np.testing.assert_array_equal(a.log_prob(QUERIES), b.log_prob(QUERIES))


def test_unsmoothed_is_the_best_fit_and_fails_on_new_text():
    exact = NGram(3, "add-k", [0.0]).fit(DOCUMENTS)
    fits = [NGram(3, "add-k", [k]).fit(DOCUMENTS) for k in (0.1, 1.0)]
    assert all(exact.log_prob(DOCUMENTS).sum() > m.log_prob(DOCUMENTS).sum() for m in fits)
    assert exact.log_prob([b"to zebra"]).min() == -math.inf  # and no warning


def test_tune_finds_the_best_weights():
    counted, held = DOCUMENTS[:3], DOCUMENTS[3:]
    tables = count_tables(counted, 2)
    weights = tune(2, "interpolation", tables, held)

    def score(w):
        return NGram(2, "interpolation", w).fit(counted).log_prob(held).sum()

    for other in np.linspace(0.05, 0.95, 19):
        assert score(weights) >= score([weights[0], float(other)]) - 1e-3
    (k,) = tune(2, "add-k", tables, held)
    assert 1e-4 <= k <= 10


def test_learned_is_counted():
    table = count_tables(DOCUMENTS, 2)[1]
    counts = np.zeros((257, 256))
    counts[table.grams // 256, table.grams % 256] = table.counts
    learned = bigram.learn_bigram(counts, steps=3000)
    exact = NGram(2, "add-k", [0.0]).fit(DOCUMENTS)
    for row in (ord("t"), ord(" "), ord("q")):
        np.testing.assert_allclose(learned[row], exact.probabilities(bytes([row])), atol=2e-3)
    np.testing.assert_allclose(learned[256], exact.probabilities(b""), atol=2e-3)
    np.testing.assert_allclose(learned[ord("Z")], 1 / 256, rtol=1e-5)  # never seen: uniform


# ---------------------------------------------------------------- sampling, bits, compressors


def test_sample():
    model = NGram(6).fit([b"abcdefgh" * 40])
    text = sample(model, np.random.default_rng(0), 80, b"abc")
    assert text.startswith(b"abc") and len(text) == 83
    assert text == sample(model, np.random.default_rng(0), 80, b"abc")
    assert sum(b in b"abcdefgh" for b in text) > 50
    unigram = NGram(1).fit([b"aab" * 100])
    drawn = Counter(sample(unigram, np.random.default_rng(1), 3000))
    assert drawn[ord("a")] / 3000 == pytest.approx(2 / 3, abs=0.04)


def test_sample_after_a_long_prompt_sees_only_its_end():
    model = NGram(3).fit(DOCUMENTS)
    long, short = (model.probabilities(c) for c in (b"whatever came before: to", b"xto"))
    np.testing.assert_array_equal(long, short)


def test_bits_per_byte():
    assert bits_per_byte(math.log(256) * 10, 10) == pytest.approx(8)
    assert bits_per_byte(math.log(2), 4) == pytest.approx(0.25)
    uniform = NGram(1, "add-k", [1.0]).fit([])
    assert bigram.model_bits(uniform, [b"anything"]) == pytest.approx(8)
    for n_bytes in (0, -3):
        with pytest.raises(ValueError, match="n_bytes"):
            bits_per_byte(1.0, n_bytes)


def test_compressors():
    data, noise = b"to be or not to be " * 50, np.random.default_rng(0).bytes(4000)
    for name in bigram.COMPRESSORS:
        assert bigram.compressed_bits(name, noise) > 8
        assert bigram.compressed_bits(name, data) < 2
    assert bigram.compressed_bits("xz", noise) == 8 * len(lzma.compress(noise, preset=6)) / 4000
    assert bigram.compressed_bits("xz", noise, noise) < 0.2
    assert bigram.compressed_bits("gzip", noise, noise) < 0.2
    far = noise + np.random.default_rng(1).bytes(40_000)  # beyond gzip's window of 32 kB
    assert bigram.compressed_bits("gzip", noise, far) > 7.9
    assert bigram.compressed_bits("xz", noise, far) < 2
    with pytest.raises(KeyError):
        bigram.compressed_bits("zip", data)
    with pytest.raises(ValueError, match="empty"):
        bigram.compressed_bits("xz", b"", data)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "n, method, parameters, message",
    [
        (0, "kneser-ney", None, "1 to 6"),
        (7, "kneser-ney", None, "1 to 6"),
        (2, "good-turing", None, "add-k, interpolation, kneser-ney"),
        (2, "add-k", [-1.0], "from 0"),
        (2, "add-k", [1.0, 1.0], "needs 1 numbers"),
        (2, "add-k", [float("inf")], "from 0"),
        (3, "interpolation", [0.5, 0.5], "needs 3 numbers"),
        (2, "kneser-ney", [0.5, 1.5], "from 0 to 1"),
        (2, "kneser-ney", [0.5, float("nan")], "from 0 to 1"),
    ],
)
def test_impossible_models(n, method, parameters, message):
    with pytest.raises(ValueError, match=message):
        NGram(n, method, parameters)


def test_interpolation_needs_weights():
    with pytest.raises(ValueError, match="tune"):
        NGram(2, "interpolation").fit(DOCUMENTS)


@pytest.mark.parametrize("method", ["kneser-ney", "interpolate"])
def test_tune_refuses_what_it_cannot_tune(method):
    with pytest.raises(ValueError, match=f"add-k and interpolation, not '{method}'"):
        tune(2, method, count_tables(DOCUMENTS, 2), DOCUMENTS)


def test_tuned_weights_make_nothing_impossible():
    """All held-out bytes were seen: the likelihood alone would give order 1 the weight 1."""
    for held_out in ([b"abab"], [b""], [b"zz"]):
        weights = tune(2, "interpolation", count_tables([b"abab"], 2), held_out)
        model = NGram(2, "interpolation", weights).fit([b"abab"])
        assert all(0 <= w < 1 for w in weights) and np.isfinite(model.log_prob([b"abz"])).all()


@pytest.mark.parametrize("n", [0, 8])
def test_windows_refuses_what_overflows(n):
    with pytest.raises(ValueError, match="1 to 7"):
        windows(DOCUMENTS, n)


def test_seven_symbols_fit():
    for document in (b"\xff" * 9, DOCUMENTS[0]):
        code, target = (x[-1] for x in windows([document], 7))
        expected = 0
        for symbol in document[-7:-1]:
            expected = expected * 257 + symbol
        assert expected * 256 + 255 < 2**63 and (code, target) == (expected, document[-1])


def test_fit_again_estimates_again():
    again = NGram(3).fit(DOCUMENTS).fit([b"abcabd"])
    assert again.parameters == NGram(3).fit([b"abcabd"]).parameters
    assert NGram(2, "kneser-ney", [0.5, 0.6]).fit(DOCUMENTS).parameters == [0.5, 0.6]


def test_fit_first_and_enough_tables():
    with pytest.raises(ValueError, match="fit first"):
        NGram(2).log_prob(DOCUMENTS)
    with pytest.raises(ValueError, match="fit first"):
        NGram(2).probabilities(b"a")
    with pytest.raises(ValueError, match="order 3 needs tables 1 to 3, got 2"):
        NGram(3).fit(DOCUMENTS, count_tables(DOCUMENTS, 2))


@pytest.mark.parametrize("documents", [[], [b""], [b"", b"a"]])
@pytest.mark.parametrize("method", NGram.METHODS)
def test_little_or_nothing_to_count(documents, method):
    model = NGram(4, method, parameters_of(method, 4)).fit(documents)
    assert model.probabilities(b"xyz").sum() == pytest.approx(1)
    assert windows(documents, 4)[0].shape == (sum(map(len, documents)),)
    assert model.log_prob([]).shape == (0,)


def test_estimated_discounts_are_possible():
    for documents in ([b"abcdef"], [b"a" * 50], DOCUMENTS, []):
        model = NGram(3).fit(documents)
        assert all(0 < d <= 1 for d in model.parameters)
        assert model.probabilities(b"a").sum() == pytest.approx(1)
