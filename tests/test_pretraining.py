"""Chapter 11: the packed stream, the measure, the optimiser, and runs that are killed."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_from_scratch import datasets, pretraining
from llm_from_scratch.llama import Llama, LlamaConfig
from llm_from_scratch.pretraining import (
    RECIPES,
    PackedBatches,
    RampedBatches,
    evaluation_windows,
    load,
    make_optimizer,
    model_bits_per_byte,
    next_token_loss,
    pack,
    sample,
    save,
    skip_spikes,
    spikes,
)
from llm_from_scratch.tokenizer import COURSE_SPECIAL, Tokenizer, train_bpe
from llm_from_scratch.training import fit

TINY = LlamaConfig(300, 16, 2, 4, 2, 32, 4, tie_embeddings=True, max_seq_len=48)


@pytest.fixture(scope="module")
def tokenizer():
    text = ["the cat and the dog and the cat that sat on the mat with another hat"]
    return Tokenizer(train_bpe(text, 284), COURSE_SPECIAL)


@pytest.fixture(scope="module")
def model():
    return Llama(TINY, key=jax.random.key(0))


documents = st.lists(st.lists(st.integers(10, 99), max_size=12), min_size=1, max_size=12)


@given(documents)
def test_pack_is_reversible(texts):
    tokens, segments = pack(texts, bos=1, eos=2)
    assert tokens.dtype == segments.dtype == np.int32
    for i, document in enumerate(texts):
        assert tokens[segments == i].tolist() == [1, *document, 2]


def test_pack_of_nothing():
    with pytest.raises(ValueError, match="at least one document"):
        pack([], 1, 2)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 99), st.integers(30, 200))
def test_batches_are_disjoint_shifted_windows(batch, context, seed, n):
    stream = np.arange(n, dtype=np.int32)
    if (n - context) // context // batch < 1:
        with pytest.raises(ValueError, match="too few"):
            PackedBatches(stream, np.zeros_like(stream), batch, context, seed)
        return
    batches = PackedBatches(stream, np.zeros_like(stream), batch, context, seed)
    for epoch in (0, 1):
        drawn = [batches(epoch * batches.per_epoch + i) for i in range(batches.per_epoch)]
        tokens = np.concatenate([b["tokens"] for b in drawn])
        targets = np.concatenate([b["targets"] for b in drawn])
        assert (targets == tokens + 1).all()  # the stream counts up: the target is the next token
        assert len(np.unique(tokens)) == tokens.size
        again = batches(epoch * batches.per_epoch)
        assert all((again[k] == drawn[0][k]).all() for k in again)


def test_boundaries_are_no_targets():
    tokens, segments = pack([[11, 12, 13], [21, 22], [31, 32, 33, 34]] * 5, 1, 2)
    batches = PackedBatches(tokens, segments, 1, 6)
    for i in range(2 * batches.per_epoch):
        batch = batches(i)
        assert ((batch["targets"] == -1) == (batch["tokens"] == 2)).all()
        assert not (batch["targets"] == 1).any()


@given(st.integers(1, 300), st.integers(1, 40), st.data())
def test_every_token_is_evaluated_once_with_enough_context(n, context, data):
    stride = data.draw(st.integers(1, context))
    tokens, targets = evaluation_windows(list(range(n + 1)), context, stride)
    scored = targets >= 0
    assert sorted(targets[scored].tolist()) == list(range(1, n + 1))
    rows, columns = np.nonzero(scored)
    assert (tokens[rows, columns] == targets[rows, columns] - 1).all()
    assert (columns[rows > 0] >= context - stride).all()
    assert (tokens[0, : min(n, context)] == np.arange(min(n, context))).all()


@pytest.mark.parametrize("stride", [0, 9])
def test_bad_stride_is_named(stride):
    with pytest.raises(ValueError, match=f"stride={stride}, context=8"):
        evaluation_windows([1, 2, 3], 8, stride)


def test_bits_per_byte_of_a_uniform_model(model, tokenizer):
    flat = eqx.tree_at(lambda m: m.embedding, model, jnp.zeros_like(model.embedding))
    texts = ["the cat and the dog", "the dog é"]
    tokens = sum(len(tokenizer.encode(t)) for t in texts)
    expected = tokens * np.log2(300) / sum(len(t.encode()) for t in texts)
    found = model_bits_per_byte(flat, tokenizer, texts, context=8)
    assert found == pytest.approx(expected, rel=1e-5)


def test_bits_per_byte_agrees_with_one_full_forward(model, tokenizer):
    text = "the cat and the dog and the cat"
    ids = tokenizer.encode(text, bos=True)
    assert len(ids) < 40  # it fits one window: no stride involved
    logits = jax.nn.log_softmax(eqx.filter_jit(model)(jnp.array(ids[:-1])))
    nats = -sum(float(logits[i, token]) for i, token in enumerate(ids[1:]))
    found = model_bits_per_byte(model, tokenizer, [text], context=40)
    assert found == pytest.approx(nats / np.log(2) / len(text), rel=1e-5)


def test_overlapping_windows_agree_with_brute_force(model, tokenizer):
    """Each token scored with the context that its window gives it, one forward pass a token."""
    text = "the cat and the dog and the mat that sat on another hat and the cat"
    ids, context, stride = tokenizer.encode(text, bos=True), 6, 2
    assert len(ids) > 2 * context
    forward, nats = eqx.filter_jit(model), 0.0
    for t in range(1, len(ids)):
        window = max(0, -(-(t - context) // stride)) * stride  # the first window that reaches t
        seen = ids[window:t]
        padded = jnp.array(seen + [0] * (context - len(seen)))
        nats -= float(jax.nn.log_softmax(forward(padded)[len(seen) - 1])[ids[t]])
    found = model_bits_per_byte(model, tokenizer, [text], context=context, stride=stride)
    assert found == pytest.approx(nats / np.log(2) / len(text), rel=1e-5)


@pytest.mark.parametrize(
    "bad, message",
    [({"texts": []}, "at least one text"), ({"context": 64}, "context=64 exceeds max_seq_len=48")],
)
def test_bad_evaluation_is_named(model, tokenizer, bad, message):
    texts = bad.get("texts", ["the cat"])
    with pytest.raises(ValueError, match=message):
        model_bits_per_byte(model, tokenizer, texts, context=bad.get("context", 8))


def test_loss_counts_targets_and_ignores_the_rest(model):
    tokens = jnp.arange(12).reshape(2, 6)
    batch = {"tokens": tokens, "targets": tokens + 1, "segments": jnp.zeros_like(tokens)}
    loss_of = eqx.filter_jit(next_token_loss)
    _, count = loss_of(model, batch)
    assert int(count) == 12
    hidden = batch | {"targets": batch["targets"].at[:, 3:].set(-1)}
    loss, count = loss_of(model, hidden)
    first = {name: array[:, :3] for name, array in batch.items()}
    assert int(count) == 6
    np.testing.assert_allclose(loss, loss_of(model, first)[0], rtol=1e-6)


def test_decay_is_decoupled():
    """The decay of a step is rate · decay · w for any gradient; the norms' gains are spared."""
    draw = np.random.default_rng(0)
    params = {"matrix": jnp.array(draw.normal(size=(3, 2))), "gain": jnp.full(2, 2.0)}
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    grads = jax.tree.map(lambda p: jnp.array(draw.normal(size=p.shape), jnp.float32), params)

    def update(decay):
        optimizer = make_optimizer(steps=10, peak=0.5, warmup=0, weight_decay=decay)
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(grads, optimizer.init(params), params)[0]

    shrink = jax.tree.map(lambda a, b: a - b, update(0.1), update(0.0))
    np.testing.assert_allclose(shrink["matrix"], -0.5 * 0.1 * params["matrix"], atol=1e-6)
    np.testing.assert_array_equal(shrink["gain"], 0.0)


def test_schedule_matches_closed_form():
    """The rate is the length of the first update of a weight whose Adam ratio is ±1."""
    steps, warmup, peak = 40, 8, 3e-3
    with jax.numpy_dtype_promotion("standard"):
        optimizer = make_optimizer(
            steps=steps, peak=peak, warmup=warmup, weight_decay=0.0, b1=0.0, b2=0.0, clip=1e9
        )
        params = jnp.ones((1, 1))
        state = optimizer.init(params)
        rates = []
        for _ in range(steps):
            updates, state = optimizer.update(jnp.full((1, 1), 3.0), state, params)
            rates.append(-float(updates[0, 0]))
    t = np.arange(steps)
    cosine = 0.5 * (1 + np.cos(np.pi * (t - warmup) / (steps - warmup)))
    expected = np.where(t < warmup, peak * t / warmup, peak * (0.01 + 0.99 * cosine))
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-9)


def test_gradients_are_clipped_by_their_common_norm():
    """Adam's first average is 0.1 of the gradient, scaled down to a norm of 1 over all parameters."""
    grads = {"a": jnp.full((3, 3), 100.0), "b": jnp.full(4, -50.0)}
    norm = np.sqrt(9 * 100.0**2 + 4 * 50.0**2)
    optimizer = make_optimizer(steps=10, peak=1.0, warmup=0)
    with jax.numpy_dtype_promotion("standard"):
        _, after = optimizer.update(grads, optimizer.init(grads), grads)
    first, *_ = [m for m in jax.tree.leaves(after) if m.shape == (3, 3)]
    second, *_ = [m for m in jax.tree.leaves(after) if m.shape == (4,)]
    np.testing.assert_allclose(first, 0.1 * 100.0 / norm, rtol=1e-5)
    np.testing.assert_allclose(second, -0.1 * 50.0 / norm, rtol=1e-5)


def test_warmup_longer_than_the_run_is_named():
    with pytest.raises(ValueError, match="warmup=10, steps=10"):
        make_optimizer(steps=10, peak=1e-3, warmup=10)


def test_save_and_load_round_trip(tmp_path, model, tokenizer):
    save(tmp_path, model, tokenizer)
    again, same_tokenizer = load(tmp_path)
    assert eqx.tree_equal(again, model)
    assert again.config == model.config
    assert same_tokenizer.special == tokenizer.special
    assert same_tokenizer.encode("the cat") == tokenizer.encode("the cat")


def test_weights_stored_in_half_the_bytes_come_back_as_asked(tmp_path, model, tokenizer):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    save(tmp_path, half, tokenizer)
    assert eqx.tree_equal(load(tmp_path, jnp.bfloat16)[0], half)
    assert eqx.tree_equal(load(tmp_path)[0], jax.tree.map(lambda x: x.astype(jnp.float32), half))


@pytest.mark.parametrize(
    "name", ["config.json", "special_tokens.json", "tokenizer.model", "model.safetensors"]
)
def test_load_names_the_missing_file(tmp_path, model, tokenizer, name):
    save(tmp_path, model, tokenizer)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load(tmp_path)


def test_load_names_what_does_not_fit(tmp_path, model, tokenizer):
    save(tmp_path, model, tokenizer)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"vocab_size": 301}))
    with pytest.raises(ValueError, match="300 ids.*vocab_size=301"):
        load(tmp_path)
    path.write_text(json.dumps(config | {"dim": 18}))
    with pytest.raises(ValueError, match=r"\(300, 16\).*\(300, 18\)"):
        load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load(tmp_path)
    path.write_text(json.dumps(config | {"n_kv_heads": 3}))
    with pytest.raises(ValueError, match="n_kv_heads=3"):
        load(tmp_path)
    path.write_text(json.dumps(config))
    (tmp_path / "special_tokens.json").write_text("[1]")
    with pytest.raises(ValueError, match="special_tokens.json holds list"):
        load(tmp_path)


def test_greedy_sample_is_the_full_forward_argmax(model, tokenizer):
    found = sample(model, tokenizer, "the cat", max_tokens=10, temperature=0)
    ids = tokenizer.encode("the cat", bos=True)
    start, forward = len(ids), eqx.filter_jit(model)
    for _ in range(10):
        padded = jnp.array(ids + [0] * (24 - len(ids)))  # what comes later is never seen
        token = int(forward(padded)[len(ids) - 1].argmax())
        if token in tokenizer.stop_ids:
            break
        ids.append(token)
    assert found == tokenizer.decode(ids[start:])


def test_sampling_follows_the_temperature_distribution(model, tokenizer):
    """The likeliest token's share of 400 first tokens is its softmax(logits / temperature)."""
    sharp = eqx.tree_at(lambda m: m.norm.weight, model, 20 * model.norm.weight)
    logits = eqx.filter_jit(sharp)(jnp.array(tokenizer.encode("the", bos=True)))[-1]
    wanted = np.asarray(jax.nn.softmax(logits / 0.7))
    text = [
        sample(sharp, tokenizer, "the", max_tokens=1, temperature=0.7, seed=s) for s in range(400)
    ]
    top = int(wanted.argmax())
    share = np.mean([t == tokenizer.decode([top]) for t in text])
    assert abs(share - wanted[top]) < 4 * np.sqrt(wanted[top] * (1 - wanted[top]) / 400)
    again = sample(sharp, tokenizer, "the", max_tokens=1, temperature=0.7, seed=7)
    assert again == text[7]


def test_sample_names_what_is_too_long(model, tokenizer):
    with pytest.raises(ValueError, match="max_tokens=48.*at most 48"):
        sample(model, tokenizer, "the", max_tokens=48)
    with pytest.raises(ValueError, match="temperature"):
        sample(model, tokenizer, "the", max_tokens=2, temperature=-1.0)
    with pytest.raises(ValueError, match="max_tokens"):
        sample(model, tokenizer, "the", max_tokens=0)


def run_smoke(directory, kill_after=None):
    """The smoke recipe as a process of its own, killed after some seconds; its exit code."""
    command = [sys.executable, "-c", "from llm_from_scratch.pretraining import main; main()"]
    command += ["--recipe", "smoke", "--directory", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if kill_after is not None:
        seen = {int(p.name[5:]) for p in directory.glob("step-*")}
        while not {int(p.name[5:]) for p in directory.glob("step-*")} - seen:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        time.sleep(kill_after)
        os.kill(process.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def timeless(directory):
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    times = {"seconds", "tokens_per_second"}
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


def test_train_killed_and_resumed_is_bitwise_the_undisturbed_run(tmp_path):
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    for directory in (
        calm,
        disturbed,
    ):  # a tokenizer of one play: training one is no part of this test
        directory.mkdir()
        ranks = train_bpe([datasets.plays("train")[0].text], 4080)
        Tokenizer(ranks, COURSE_SPECIAL).save(directory / "tokenizer.model")
    code, output = run_smoke(calm)
    assert code == 0, output
    assert "validation_bits_per_byte" in output
    draw = random.Random(0)
    for _ in range(2):
        code, _ = run_smoke(disturbed, kill_after=draw.uniform(0.0, 0.1))
        assert code == -signal.SIGKILL
    code, output = run_smoke(disturbed)
    assert code == 0, output
    for name in ("model.safetensors", "tokenizer.model", "samples.txt"):
        assert (calm / name).read_bytes() == (disturbed / name).read_bytes(), name
    assert timeless(calm) == timeless(disturbed)
    state = "step-00000030/state.safetensors"
    assert (calm / state).read_bytes() == (disturbed / state).read_bytes()

    other = dataclasses.replace(RECIPES["smoke"], peak=1e-3)
    with pytest.raises(ValueError, match="peak"):
        pretraining.train(other, disturbed)


def test_train_refuses_a_tokenizer_of_another_size(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="300 ids.*vocab_size=4096"):
        pretraining.train(RECIPES["smoke"], tmp_path)


STAGES = ((2, 4, 8), (3, 2, 16), (1, 6, 16))


def test_ramps_read_the_same_text_once():
    stream = np.arange(1000, dtype=np.int32)
    ramp = RampedBatches(stream, stream // 500, STAGES, seed=3)
    drawn = [ramp(cursor) for cursor in range(9)]
    shapes = [batch["tokens"].shape for batch in drawn]
    assert shapes == [(4, 8)] * 2 + [(2, 16)] * 3 + [(6, 16)] * 4  # the last stage goes on
    flat = np.concatenate([batch["tokens"].ravel() for batch in drawn])
    assert len(np.unique(flat)) == len(flat)
    single = PackedBatches(stream, stream // 500, 1, 16, seed=3)
    rows = np.concatenate([single(i)["tokens"].ravel() for i in range(len(flat) // 16)])
    np.testing.assert_array_equal(flat, rows)
    for batch in drawn:
        ends = batch["tokens"] == 499
        assert (np.where(ends, -1, batch["tokens"] + 1) == batch["targets"]).all()


@pytest.mark.parametrize(
    "stages", [(), ((0, 4, 8),), ((1, 1, 8), (1, 1, 16)), ((1, 2, 8), (1, 2, 12))]
)
def test_bad_stages_are_named(stages):
    stream = np.arange(1000, dtype=np.int32)
    with pytest.raises(ValueError, match="stages must be|whole windows"):
        RampedBatches(stream, stream, stages)


def test_a_ramp_resumes_bit_for_bit_across_a_stage(tmp_path, model):
    stream = np.arange(1000, dtype=np.int32) % 300
    ramp = RampedBatches(stream, np.zeros_like(stream), STAGES)

    def cut(cursor):
        if cursor == 4:
            raise RuntimeError("power cut")
        return ramp(cursor)

    def run(batches, directory=None):
        optimizer = make_optimizer(steps=6, peak=1e-2, warmup=1)
        options = {"directory": directory, "checkpoint_every": 1 if directory else 0}
        return fit(model, next_token_loss, batches, optimizer, steps=6, **options)[0]

    with pytest.raises(RuntimeError, match="power cut"):
        run(cut, tmp_path)
    assert eqx.tree_equal(run(ramp, tmp_path), run(ramp))


def test_spikes_are_found_and_noise_is_not():
    noise = 3 + 0.1 * np.random.default_rng(0).normal(size=2000)
    assert not spikes(noise).any()
    for at in (60, 61, 1500):
        noise[at] += 1.5
    noise[[10, 700]] = np.nan, np.inf
    assert np.flatnonzero(spikes(noise)).tolist() == [10, 60, 61, 700, 1500]
    assert not spikes(3 - 0.01 * np.arange(100) - 5 * (np.arange(100) == 80)).any()  # no falls


@pytest.mark.parametrize("bad", [{"window": 1}, {"threshold": 0.0}])
def test_bad_spike_settings_are_named(bad):
    with pytest.raises(ValueError, match="window >= 2"):
        spikes([1.0, 2.0], **bad)


def test_a_skipped_step_changes_neither_weights_nor_averages():
    inner = make_optimizer(steps=100, peak=1e-2, warmup=0, clip=1e9)
    guarded, params = skip_spikes(inner, warmup=4), {"w": jnp.ones((2, 2))}
    gradients = [{"w": jnp.full((2, 2), x)} for x in (1.0, 1.2, 0.8, 1.0, 1.1)]

    def run(optimizer, grads):
        with jax.numpy_dtype_promotion("standard"):
            p, state = params, optimizer.init(params)
            for g in grads:
                updates, state = optimizer.update(g, state, p)
                p = optax.apply_updates(p, updates)
        return p

    huge, broken = ({"w": jnp.full((2, 2), x)} for x in (1e4, float("nan")))
    spoiled = [*gradients[:4], huge, broken, gradients[4]]
    assert eqx.tree_equal(run(guarded, spoiled), run(inner, gradients))


def test_norms_that_grow_for_good_are_accepted_again():
    guarded = skip_spikes(optax.sgd(1.0), warmup=2)
    state, moved = guarded.init(jnp.ones(1)), []
    for g in [1.0] * 30 + [10.0] * 30:
        updates, state = guarded.update(jnp.full(1, g), state)
        moved.append(float(updates[0]) != 0)
    assert all(moved[:30]) and not moved[30] and all(moved[50:])


@pytest.mark.parametrize("bad", [{"factor": 1.0}, {"warmup": 0}])
def test_bad_guard_is_named(bad):
    with pytest.raises(ValueError, match="factor > 1 and warmup >= 1"):
        skip_spikes(optax.sgd(1.0), **bad)
