"""Chapter 24: the anneal, the mix and the averages against closed forms and NumPy, and the stored runs."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_from_scratch import annealing, formats
from llm_from_scratch.annealing import (
    FULL,
    MIX_RECIPES,
    anneal_mix,
    annealed,
    average_checkpoints,
    averaged,
    averaged_model,
    cast,
    mean_weights,
    name_pools,
    pieces,
    play_bits,
    recast,
    rule_prompts,
    train_mix,
)
from llm_from_scratch.data_mix import (
    SOURCES,
    MixedBatches,
    TokenFile,
    long_lines,
    source_documents,
    trained_lines,
)
from llm_from_scratch.datasets import plays
from llm_from_scratch.llama import Llama
from llm_from_scratch.pretraining import (
    make_optimizer,
    mini_llama,
    model_bits_per_byte,
    next_token_loss,
    skip_spikes,
)
from llm_from_scratch.training import TrainState, checkpoints, fit, train_state

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
import annealing_runs
import full_runs
import lever_runs
import publish


class Line(eqx.Module):
    """A tiny model with two weights of different shapes and a leaf that is none."""

    w: jax.Array
    b: jax.Array
    n: jax.Array

    def __init__(self, value=0.0, dtype=jnp.float32):
        self.w, self.b = jnp.full((2, 3), value, dtype), jnp.full(3, value, dtype)
        self.n = jnp.array(7, jnp.int32)


def loss(model, batch, key):
    return jnp.mean((batch["x"] @ model.w + model.b[None] - batch["y"]) ** 2)


def batches(cursor):
    x, y = np.split(np.random.default_rng(cursor).normal(size=(4, 5)).astype(np.float32), [2], 1)
    return {"x": x, "y": y}


def equal(a, b):
    same = jax.tree.map(lambda x, y: bool((x == y).all()) and x.dtype == y.dtype, a, b)
    return all(jax.tree.leaves(same))


def updates_of(optimizer, n, params=None):
    """The first n updates of one scalar weight under a gradient of 1."""
    params = jnp.ones(()) if params is None else params
    state, found = optimizer.init(params), []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(n):
            update, state = optimizer.update(jnp.ones(()), state, params)
            found.append(float(update))
    return np.array(found)


# The rate ------------------------------------------------------------------------------------------


def test_rate_falls_linearly_to_zero():
    found = -updates_of(annealed(optax.sgd(0.5), steps=10, anneal=5), 13)
    wanted = 0.5 * np.array([1] * 5 + [1.0, 0.8, 0.6, 0.4, 0.2] + [0] * 3)
    np.testing.assert_allclose(found, wanted, atol=1e-7)


def test_anneal_of_a_cosine_is_the_product_of_both():
    options = {"steps": 10, "peak": 1e-2, "warmup": 2, "clip": 1e9}
    plain = updates_of(make_optimizer(**options), 10)
    found = updates_of(annealed(make_optimizer(**options), steps=10, anneal=4), 10)
    factor = np.minimum(1, (10 - np.arange(10)) / 4)
    np.testing.assert_allclose(found, plain * factor, rtol=1e-5, atol=1e-9)


def test_decay_is_annealed_too():
    # without a gradient AdamW only decays: w shrinks by rate * decay * factor
    optimizer = annealed(optax.adamw(0.1, weight_decay=0.5), steps=4, anneal=4)
    params = jnp.full((), 2.0)
    state, found = optimizer.init(params), []
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix int32 and fp32
        for _ in range(4):
            update, state = optimizer.update(jnp.zeros(()), state, params)
            found.append(float(update))
    np.testing.assert_allclose(found, -0.1 * 0.5 * 2.0 * np.array([1, 0.75, 0.5, 0.25]), rtol=1e-6)


def test_a_constant_run_may_be_annealed_from_its_checkpoint(tmp_path):
    constant = annealed(optax.adam(0.1), steps=20, anneal=1)
    fit(Line(), loss, batches, constant, steps=6, directory=tmp_path)
    ending = annealed(optax.adam(0.1), steps=10, anneal=4)
    resumed, _ = fit(Line(), loss, batches, ending, steps=10, directory=tmp_path)
    whole, _ = fit(Line(), loss, batches, ending, steps=10)
    assert equal(resumed.model, whole.model)


@pytest.mark.parametrize(("steps", "anneal"), [(4, 0), (4, 5), (0, 0), (4, -1)])
def test_bad_anneal(steps, anneal):
    with pytest.raises(ValueError, match=f"1 <= anneal <= steps.*anneal={anneal}, steps={steps}"):
        annealed(optax.sgd(1.0), steps=steps, anneal=anneal)


# The mix -------------------------------------------------------------------------------------------


def test_mix_switches_when_the_rate_begins_to_fall():
    """Through `fit`, with accumulation: the first batch of the new mix is that of the first lower rate."""
    steps, anneal, accumulate = 6, 2, 3
    schedule = anneal_mix(
        {"a": 1.0}, {"b": 1.0}, share=1.0, steps=steps, anneal=anneal, accumulate=accumulate
    )
    files = {name: TokenFile(np.full(100, i, np.uint16), bos=9) for i, name in enumerate("ab")}
    mixed = MixedBatches(files, schedule, batch=2, context=4)
    seen = [int(mixed(cursor)["tokens"].max()) for cursor in range(steps * accumulate)]
    first = seen.index(1)
    assert seen == [0] * first + [1] * (len(seen) - first)
    rates = -updates_of(annealed(optax.sgd(1.0), steps=steps, anneal=anneal), steps)
    assert first // accumulate == np.flatnonzero(rates < 1)[0] - 1 == steps - anneal
    assert first % accumulate == 0


def test_shares_add_up_and_are_of_the_normalised_mixes():
    schedule = anneal_mix({"a": 3, "b": 1}, {"b": 2, "c": 2}, share=0.4, steps=10, anneal=3)
    assert schedule[0] == (0, {"a": 3, "b": 1}) and schedule[1][0] == 7
    found = schedule[1][1]
    assert found == pytest.approx({"a": 0.45, "b": 0.35, "c": 0.2})


def test_an_anneal_over_the_whole_run_is_one_entry():
    assert anneal_mix({"a": 1}, {"b": 1}, share=0.5, steps=4, anneal=4) == [
        (0, {"a": 0.5, "b": 0.5})
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 1.5}, "share=1.5"),
        ({"anneal": 11}, "anneal=11"),
        ({"anneal": 0}, "anneal=0"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"extra": {"b": 0.0}}, "add up to > 0"),
        ({"mix": {}}, "add up to > 0"),
    ],
)
def test_bad_mix(change, message):
    options = {"mix": {"a": 1}, "extra": {"b": 1}, "share": 0.3, "steps": 10, "anneal": 2} | change
    mix, extra = options.pop("mix"), options.pop("extra")
    with pytest.raises(ValueError, match=message):
        anneal_mix(mix, extra, **options)


# The average ---------------------------------------------------------------------------------------


def trained(optimizer, steps, **options):
    """A run whose weights after every step are kept as NumPy arrays, in fp64."""
    kept = []

    def keep(model):
        kept.append(np.array(model.w, np.float64))
        return {}

    state, _ = fit(
        Line(0.1), loss, batches, optimizer, steps=steps, evaluate=keep, eval_every=1, **options
    )
    return state, kept


@pytest.mark.parametrize(("start", "every"), [(0, 1), (4, 1), (3, 2), (0, 5)])
def test_average_is_numpys(start, every):
    state, kept = trained(averaged(optax.adam(0.05), start=start, every=every), 12)
    wanted = np.mean(kept[start + every - 1 :: every], axis=0)
    np.testing.assert_allclose(averaged_model(state).w, wanted, rtol=1e-6, atol=1e-8)
    assert int(state.opt_state["taken"]) == (12 - start) // every
    assert int(averaged_model(state).n) == 7


def test_averaging_does_not_change_the_training():
    plain, _ = trained(optax.adam(0.05), 8)
    watched, _ = trained(averaged(optax.adam(0.05), start=2), 8)
    assert equal(plain.model, watched.model)


def test_the_mean_of_one_is_the_last_weights():
    state, _ = trained(averaged(optax.adam(0.05), start=7), 8)
    assert equal(averaged_model(state), state.model)


def test_average_survives_a_stop(tmp_path):
    optimizer = averaged(annealed(optax.adam(0.05), steps=9, anneal=4), start=3)
    whole, _ = trained(optimizer, 9)
    trained(optimizer, 5, directory=tmp_path)
    resumed, _ = trained(optimizer, 9, directory=tmp_path)
    assert equal(averaged_model(whole), averaged_model(resumed))


def test_wraps_a_guard():
    optimizer = averaged(annealed(skip_spikes(optax.adam(0.05)), steps=6, anneal=2))
    state, kept = trained(optimizer, 6)
    np.testing.assert_allclose(averaged_model(state).w, np.mean(kept, axis=0), rtol=1e-6, atol=1e-8)


def test_mean_is_kept_in_fp32_for_narrow_weights():
    optimizer = averaged(optax.sgd(0.0))
    state = train_state(Line(1.0, jnp.bfloat16), optimizer)
    assert state.opt_state["average"].w.dtype == jnp.float32
    # weights that alternate between 1 and 1 + 2⁻⁷, the next bf16 number: a bf16 mean of 1,000 stands still
    memory, params, mean = state.opt_state, eqx.filter(state.model, eqx.is_inexact_array), 0.0
    update = jax.jit(optimizer.update)
    for i in range(1000):
        params = jax.tree.map(lambda w, i=i: jnp.full_like(w, 1 + (i >= 500) / 128), params)
        _, memory = update(jax.tree.map(jnp.zeros_like, params), memory, params)
        mean += (1 + (i >= 500) / 128) / 1000
    np.testing.assert_allclose(memory["average"].w, mean, rtol=1e-6)
    read = averaged_model(TrainState(state.model, memory, state.step, state.cursor))
    assert read.w.dtype == jnp.bfloat16


def test_errors_of_the_average():
    with pytest.raises(ValueError, match="start=-1"):
        averaged(optax.sgd(1.0), start=-1)
    with pytest.raises(ValueError, match="every=0"):
        averaged(optax.sgd(1.0), every=0)
    early, _ = trained(averaged(optax.sgd(0.1), start=5), 3)
    with pytest.raises(ValueError, match="no weights averaged yet, after 3 updates"):
        averaged_model(early)
    for inner in (optax.sgd(0.1), annealed(averaged(optax.sgd(0.1)), steps=3, anneal=1)):
        state, _ = trained(inner, 3)
        with pytest.raises(ValueError, match="keeps no average"):
            averaged_model(state)
    optimizer = averaged(optax.sgd(0.1))
    with pytest.raises(ValueError, match="needs the weights"):
        optimizer.update(jnp.ones(()), optimizer.init(jnp.ones(())))


def test_mean_weights_is_numpys_in_any_order():
    draw = np.random.default_rng(0)
    models = [
        eqx.tree_at(lambda m: m.w, Line(), jnp.asarray(draw.normal(size=(2, 3)), jnp.float32))
        for _ in range(7)
    ]
    wanted = np.mean([np.asarray(m.w, np.float64) for m in models], 0).astype(np.float32)
    assert np.array_equal(mean_weights(models).w, wanted)
    assert equal(mean_weights(iter(models)), mean_weights(models[::-1]))
    assert equal(mean_weights(models[:1]), models[0])


def test_mean_weights_keeps_the_dtype():
    found = mean_weights([Line(1.0, jnp.bfloat16), Line(2.0, jnp.bfloat16)])
    assert found.w.dtype == jnp.bfloat16 and float(found.w[0, 0]) == 1.5


def test_bad_models():
    with pytest.raises(ValueError, match="at least one model"):
        mean_weights([])
    other = eqx.tree_at(lambda m: m.w, Line(), jnp.zeros((3, 3)))
    with pytest.raises(ValueError, match="model 1 has weights of other shapes"):
        mean_weights([Line(), other])


def test_checkpoints_of_fit_are_averaged(tmp_path):
    state, kept = trained(optax.adam(0.05), 6, directory=tmp_path, checkpoint_every=2)
    paths = checkpoints(tmp_path)
    assert [path.name for path in paths] == ["step-00000004", "step-00000006"]
    found = average_checkpoints(paths, state)
    wanted = np.mean([kept[3], kept[5]], 0).astype(np.float32)
    assert np.array_equal(found.w, wanted)


def test_damaged_and_missing_checkpoints_are_named(tmp_path):
    state, _ = trained(optax.adam(0.05), 2, directory=tmp_path)
    (path,) = checkpoints(tmp_path)
    with pytest.raises(OSError, match="step-00000009"):
        average_checkpoints([path, tmp_path / "step-00000009"], state)
    with pytest.raises(ValueError, match="at least one"):
        average_checkpoints([], state)
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "state.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"step-00000002.*SHA-256"):
        average_checkpoints([path], state)


def test_variance_of_the_mean_is_polyaks():
    """Averaged SGD through these wrappers on ½hθ²: the variance of the mean is near σ²/(h² n)."""
    h, rate, n, copies = 2.0, 0.2, 400, 500
    optimizer = averaged(optax.sgd(rate), start=0)
    params = jnp.zeros(copies)
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    for noise in np.random.default_rng(0).normal(size=(n, copies)).astype(np.float32):
        updates, state = step(h * params + noise, state, params)
        params = params + updates
    variance = float((state["average"] ** 2).mean())
    assert variance * h**2 * n == pytest.approx(1, rel=0.2)
    assert float((params**2).mean()) == pytest.approx(rate / (h * (2 - rate * h)), rel=0.2)


# The runs ------------------------------------------------------------------------------------------


def test_candidates_are_what_they_are_called():
    files = {
        name: np.asarray(annealing_runs.candidate(name).ids) for name in annealing_runs.CANDIDATES
    }
    texts = {
        name: annealing_runs.tokenizer().decode(ids[1:-1].tolist()) for name, ids in files.items()
    }
    good = texts["good"]
    # none but the duplicated set is read twice in the anneal
    read = annealing_runs.VALUE_STEPS[1] * annealing_runs.BATCH * annealing_runs.CONTEXT
    assert all(len(ids) > 1.2 * annealing_runs.SHARE * read for ids in files.values())
    apart = np.mean([a != b for a, b in zip(good, texts["noisy"], strict=True)])
    assert 0.08 < apart < 0.11
    assert (
        texts["duplicated"][:2000] in good
        and texts["duplicated"].count(texts["duplicated"][:2000]) > 100
    )
    letters = np.unique(list(texts["garbage"][:100_000]), return_counts=True)[1]
    assert len(letters) == 95 and letters.max() < 1.3 * letters.min()
    assert all(trained_lines().isdisjoint(long_lines(text)) for text in annealing_runs.benchmark())


def test_the_earlier_run_reads_as_much_code_but_not_in_the_anneal():
    steps = annealing_runs.BASE_STEPS + annealing_runs.ANNEAL
    extra, share = annealing_runs.ANNEALS["up-sampled"]
    options = {"share": share, "steps": steps, "anneal": annealing_runs.ANNEAL}
    in_the_anneal = anneal_mix(annealing_runs.BASE_MIX, extra, **options)

    def code_read(schedule):
        ends = [*(start for start, _ in schedule[1:]), steps]
        parts = zip(schedule, ends, strict=True)
        return sum((end - start) * mix["code"] for (start, mix), end in parts)

    before = annealing_runs.earlier()
    assert code_read(before) == pytest.approx(code_read(in_the_anneal))
    assert before[0] == in_the_anneal[0]
    assert before[-1] == (annealing_runs.BASE_STEPS, annealing_runs.BASE_MIX)


def test_stored_runs_are_whole():
    rows = annealing_runs.stored()
    for part, (plan, _) in annealing_runs.PARTS.items():
        wanted = plan(rows)
        found = [row for row in rows if row["part"] == part]
        assert len(found) == len(wanted), part
        assert all(annealing_runs.find(rows, {"part": part} | w) for w in wanted)


# ---------------------------------------------------------------- the full recipe


def test_full_recipe_reads_every_source_and_anneals():
    assert FULL.mix.keys() == SOURCES.keys() and abs(sum(FULL.mix.values()) - 1) < 1e-9
    (start, before), (turn, after) = FULL.schedule()
    assert start == 0 and turn == (FULL.steps - FULL.anneal) * FULL.accumulate
    for weights in (before, after):
        assert abs(sum(weights.values()) - 1) < 1e-9
        assert weights["recast"] == pytest.approx(3 * weights["plays"])
    for name in FULL.mix:
        extra, parts = FULL.extra.get(name, 0.0), [name, "recast"] if name == "plays" else [name]
        assert sum(before[part] for part in parts) == pytest.approx(FULL.mix[name])
        wanted = (1 - FULL.share) * FULL.mix[name] + FULL.share * extra
        assert sum(after[part] for part in parts) == pytest.approx(wanted)
    assert FULL.context <= FULL.model.max_seq_len and FULL.model.vocab_size == 4096


# ---------------------------------------------------------------- plays with other names


@pytest.mark.parametrize("wrong", [{"recast": 1.5}, {"recast": -0.1}, {"mix": {"french": 1.0}}])
def test_a_part_to_recast_that_cannot_be(wrong):
    recipe = dataclasses.replace(MIX_RECIPES["full-smoke"], **wrong)
    with pytest.raises(ValueError, match="recast must be in 0..1"):
        recipe.schedule()


def test_cast_is_names_not_words():
    found = {play.slug: set(cast(play)) for play in plays("train")}
    assert {"HAMLET", "OPHELIA", "ROSENCRANTZ"} <= found["hamlet"]
    for names in found.values():
        assert names.isdisjoint({"FIRST", "KING", "QUEEN", "LORD", "LADY", "MESSENGER", "ALL"})
    players, others = map(set, name_pools())
    assert players == set().union(*found.values()) and players.isdisjoint(others)
    assert {"NEBUCHADNEZZAR", "DEBORAH"} <= others


@pytest.mark.parametrize("seed", [0, 7])
def test_a_recast_play_differs_in_its_names_only(seed):
    """Word by word: what is no name stays, and each name always becomes the same other one, written alike."""
    players, others = map(set, name_pools())
    for play in plays("train")[::8]:
        other = recast(play, seed)
        assert other == recast(play, seed) != recast(play, 1)
        assert all(s.speaker in other.text for s in other.speeches)
        assert [len(s.lines) for s in other.speeches] == [len(s.lines) for s in play.speeches]
        old, new = (re.findall("[A-Za-z]+|[^A-Za-z]+", t) for t in (play.text, other.text))
        names, became = set(cast(play)), {}
        for a, b in zip(old, new, strict=True):
            if a.upper() not in names or a.islower():
                assert a == b
                continue
            assert b.isupper() if a.isupper() else b.istitle()
            assert became.setdefault(a.upper(), b.upper()) == b.upper()
        assert len(set(became.values())) == len(became) and set(became.values()) <= players | others


def test_recast_names_never_come_from_held_out_plays():
    trained = " ".join([play.text for play in plays("train")] + list(source_documents("bible")))
    known = set(re.findall("[A-Z]+", trained.upper()))
    assert set().union(*name_pools()) <= known


def test_labels_and_the_rest_are_the_whole_play():
    model, tokenizer = formats.load(publish.CHECKPOINTS / "mini-llama3-short")
    play = dataclasses.replace(plays("validation")[1], text=plays("validation")[1].text[:9_000])
    found = play_bits(model, tokenizer, play)
    assert found["whole"] == pytest.approx(
        model_bits_per_byte(model, tokenizer, [play.text], context=256), rel=1e-4
    )
    speakers = {speech.speaker for speech in play.speeches} - {""}
    lines = [line + "\n" for line in play.text.split("\n")]
    size = sum(len(line.encode()) for line in lines if line.strip() in speakers)
    whole = len(play.text.encode())
    together = (found["labels"] * size + found["rest"] * (whole - size)) / whole
    assert together == pytest.approx(found["whole"], rel=1e-3)
    assert found["labels"] > 1.5 * found["rest"]


def test_a_recipe_reads_recast_plays_from_a_file_of_its_own(smoke):
    recipe = MIX_RECIPES["full-smoke"]
    tokenizer = formats.load(smoke)[1]
    files = annealing.mix_batches(recipe, smoke, tokenizer).sources
    ids = files["recast"].ids
    text = tokenizer.decode([int(i) for i in ids[1 : 1 + 3_000]])
    assert recast(plays("train")[0], 0).text.startswith(text[:2_000])
    documents = annealing.CASTINGS * len(plays("train"))
    assert (np.asarray(ids) == files["recast"].bos).sum() == documents
    plain = dataclasses.replace(recipe, recast=0.0)
    assert annealing.mix_batches(plain, smoke, tokenizer).sources.keys() == recipe.mix.keys()


def test_pieces_and_prompts_by_rule():
    found = pieces(["plays", "code"], "train")
    for name, texts in found.items():
        assert all(any(text in document for document in source_documents(name)) for text in texts)
        assert 20_000 <= sum(len(text.encode()) for text in texts) < 24_000
    prompts = rule_prompts(SOURCES)
    assert all(1 <= len(prompt) <= 120 for prompt in prompts.values())
    assert prompts["arithmetic"].startswith("Question: ") and prompts["arithmetic"].endswith("\n")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A finished run of the smoke recipe, by its command."""
    folder = tmp_path_factory.mktemp("smoke")
    annealing.main(["--recipe", "full-smoke", "--directory", str(folder)])
    return folder


def rows_of(folder):
    """The log of a run without what is read off a clock."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    clocks = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows]


def test_interrupted_mix_run_ends_with_the_same_weights(smoke, tmp_path, monkeypatch):
    real, stops = MixedBatches.__call__, iter((3, 6, 9))
    at = next(stops)

    def stop(self, cursor):
        nonlocal at
        if cursor == at:
            at = next(stops, None)
            raise KeyboardInterrupt
        return real(self, cursor)

    monkeypatch.setattr(MixedBatches, "__call__", stop)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train_mix(MIX_RECIPES["full-smoke"], tmp_path)
    model, *_ = train_mix(MIX_RECIPES["full-smoke"], tmp_path)
    assert (
        at is None and equal(model, formats.load(smoke)[0]) and rows_of(tmp_path) == rows_of(smoke)
    )


def test_report_of_a_mix_run(smoke, capsys):
    summary, recipe = json.loads((smoke / "summary.json").read_text()), MIX_RECIPES["full-smoke"]
    assert sum(source["tokens"] for source in summary["read"].values()) == (
        recipe.steps * recipe.batch * recipe.context
    )
    for split in ("train", "validation"):
        assert summary["bits_per_byte"][split].keys() == recipe.mix.keys()
    judged = rows_of(smoke)[-1]["bits_per_byte"]
    assert summary["bits_per_byte"]["validation"] == pytest.approx(judged, abs=1e-4)
    samples = (smoke / "samples.txt").read_text()
    assert all(
        f"[{name}]\n{prompt}" in samples for name, prompt in rule_prompts(recipe.mix).items()
    )
    assert (smoke / "curves.png").stat().st_size > 5_000
    command = ["--directory", str(smoke), "--sample", "ROMEO\\n"]
    annealing.main(command)
    once = capsys.readouterr().out
    annealing.main(command)
    assert once.startswith("ROMEO\n") and capsys.readouterr().out == once


# ---------------------------------------------------------------- judging the trained models


def test_functions_are_cut_and_judged_by_pythons_parser():
    head = "def f(x):\n"
    assert full_runs.body_of(head, "    return x\n\nclass A:\n    y") == head + "    return x\n"
    assert full_runs.body_of(head, "    y = 1\n    retur") == head + "    y = 1"
    for body, good in (("    return x", 1), ("", 0), ("return x", 0), ("    if x\n", 0)):
        assert full_runs.parses(head + body) == bool(good)
    assert not full_runs.parses("x = 1") and not full_runs.parses(head + "    '\0'")
    assert full_runs.only_says(head + "    'text'\n    pass") and full_runs.only_says(
        head + "    ..."
    )
    assert not full_runs.only_says(head + "    'text'\n    return x")


def test_heads_are_different_first_lines():
    heads = full_runs.function_heads()
    assert len(set(heads)) == 200 and all(re.fullmatch(r"def .*:\n", head) for head in heads)


def test_full_rows_are_the_planned_ones():
    rows = full_runs.stored()
    assert len(rows) == len(full_runs.PLAN)
    assert all(keys.items() <= row.items() for keys, row in zip(full_runs.PLAN, rows, strict=True))


def test_the_model_card_says_what_is_stored():
    folder = publish.CHECKPOINTS / "mini-llama3-base"
    card = publish.card(json.loads((folder / "summary.json").read_text()))
    assert (folder / "README.md").read_text() == card


def test_levers_are_all_there():
    assert [
        {k: row[k] for k in ("change", "seed")} for row in lever_runs.stored()
    ] == lever_runs.PLAN


def test_dropout_is_random_and_right_on_average():
    """Every key gives another loss, and their mean is near the loss without dropout; rate 0 is no dropout."""
    model = Llama(mini_llama(16, 2, 2, 1, 32, 32), key=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 32), 0, 4000)
    batch = {"tokens": tokens, "targets": tokens[:, ::-1], "segments": jnp.zeros_like(tokens)}
    without = next_token_loss(model, batch)[0]
    assert lever_runs.dropout_loss(0.0)(model, batch, jax.random.key(0))[0] == without
    keys = jax.random.split(jax.random.key(2), 20)
    losses = [float(lever_runs.dropout_loss(0.5)(model, batch, key)[0]) for key in keys]
    assert len(set(losses)) == 20
    assert np.mean(losses) == pytest.approx(float(without), rel=0.01)


def test_muon_moves_the_matrices_alike_in_all_directions_by_a_fifth_of_the_rate():
    """The rest is AdamW's own update, whose first is as large as the rate."""
    model = Llama(mini_llama(16, 1, 2, 1, 48, 32), key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_array)
    grads = jax.tree.map(lambda w: jax.random.normal(jax.random.key(w.size), w.shape), params)
    options = {"b2": 0.99, "weight_decay": 0.1}
    adamw = make_optimizer(steps=9_999, peak=0.003, warmup=lever_runs.WARMUP, floor=1.0, **options)
    found = []
    for optimizer in (lever_runs.muon(0.003, 0.99, 0.1), adamw):
        state = optimizer.init(params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts and floats
            for _ in range(2):  # the first step of the warm-up has rate zero
                update, state = optimizer.update(grads, state, params)
        found.append(update)
    muon, adamw = found
    for name in ("w_gate", "w_up", "w_down"):
        matrix, usual = (np.asarray(getattr(u.blocks[0].feed_forward, name)) for u in found)
        sizes = np.linalg.svd(matrix, compute_uv=False)
        assert sizes.max() < 2 * sizes.min()
        assert 0.15 < np.sqrt((matrix**2).mean() / (usual**2).mean()) < 0.3
    assert equal(muon.embedding, adamw.embedding) and equal(muon.norm, adamw.norm)
