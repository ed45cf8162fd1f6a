"""The training loop and its files: exact resume, damaged checkpoints, weights, accumulation."""

import functools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
from jax.experimental.compilation_cache import compilation_cache

from llm_from_scratch import training
from llm_from_scratch.training import (
    TrainState,
    checkpoints,
    count_parameters,
    find_learning_rate,
    fit,
    load_checkpoint,
    load_weights,
    named_arrays,
    save_checkpoint,
    save_weights,
    train_state,
)

TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """These tests call fit some sixty times on the same step: compile it once."""
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


class Small(eqx.Module):
    """A linear model with everything a state may hold: two float dtypes, integers, a function."""

    layers: list
    scale: jax.Array
    counts: jax.Array
    activation: callable

    def __init__(self, *, key, width=3):
        self.layers = [{"w": jax.random.normal(key, (width, 4))}]
        self.scale = jnp.ones((width,), jnp.bfloat16)
        self.counts = jnp.arange(2, dtype=jnp.uint32)
        self.activation = jnp.tanh


def loss(model, batch, key):
    h = (
        model.activation(batch["x"] @ model.layers[0]["w"].T)
        * model.scale.astype(jnp.float32)[None]
    )
    noise = 0.01 * jax.random.normal(key, h.shape)
    return jnp.mean((h + noise - batch["targets"]) ** 2)


def batches(cursor):
    rng = np.random.default_rng(cursor)
    return {
        "x": rng.normal(size=(8, 4)).astype(np.float32),
        "targets": rng.normal(size=(8, 3)).astype(np.float32),
    }


def optimizer():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, 100)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


def evaluate(model):
    return {"size": float(jnp.sum(model.layers[0]["w"] ** 2))}


def run(steps=20, **more):
    settings = {"steps": steps, "seed": 3, "log_every": 3, "evaluate": evaluate, "eval_every": 8}
    model = Small(key=jax.random.key(0))
    return fit(model, loss, more.pop("batches", batches), optimizer(), **(settings | more))


def bits(tree):
    return {name: np.asarray(a).tobytes() for name, a in named_arrays(tree).items()}


def untimed(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def log_of(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_rows(tmp_path):
    state, rows = run(directory=tmp_path, checkpoint_every=5)
    assert [row["step"] for row in rows] == [1, 3, 6, 8, 9, 12, 15, 16, 18, 20]
    assert [row["step"] for row in rows if "size" in row] == [8, 16, 20]
    assert [row["tokens"] for row in rows] == [24 * row["step"] for row in rows]
    assert log_of(tmp_path) == rows
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000015", "step-00000020"]
    assert int(state.step) == int(state.cursor) == 20
    again, same = run()
    assert bits(again) == bits(state) and untimed(same) == untimed(rows)


class PowerCut(BaseException):
    """Nothing in the code under test may catch this."""


@pytest.mark.parametrize("moment", range(1, 66, 7))
def test_crash_at_every_write(tmp_path, monkeypatch, moment):
    """Stop at the n-th system call that changes the disk; what is on disk then resumes exactly."""
    state, rows = reference()
    calls = iter(range(10_000))

    def cut(real):
        def call(*args, **kwargs):
            if next(calls) == moment:
                raise PowerCut
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, cut(getattr(os, name)))
        run(steps=9, directory=tmp_path, checkpoint_every=2)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # a torn line
    again, same = run(steps=9, directory=tmp_path, checkpoint_every=2)
    assert bits(again) == bits(state) and untimed(same) == untimed(rows)
    assert log_of(tmp_path) == same


@functools.cache
def reference():
    return run(steps=9)


def test_killed_at_random_moments(tmp_path):
    """SIGKILL, several times, in a process of its own: weights bitwise, the log in all but times."""
    worker = Path(__file__).with_name("resume_worker.py")
    command = [sys.executable, str(worker), str(tmp_path), "3", "2024"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    resumed = json.loads(done.stdout)
    assert len(resumed) == 3 and 0 < resumed[0] < resumed[1] < resumed[2] < 60, resumed
    weights = [(tmp_path / n / "final.safetensors").read_bytes() for n in ("undisturbed", "killed")]
    assert weights[0] == weights[1]
    logs = [untimed(log_of(tmp_path / name)) for name in ("undisturbed", "killed")]
    assert logs[0] == logs[1] and logs[0][-1]["step"] == 60


@pytest.mark.parametrize("place", ["batches", "evaluate"])
def test_keyboard_interrupt_saves(tmp_path, place):
    state, rows = reference()
    pressed = []

    def press(due):
        if due and not pressed:
            pressed.append(True)
            raise KeyboardInterrupt

    def stopping_batches(cursor):
        press(place == "batches" and cursor == 5)
        return batches(cursor)

    def stopping_evaluate(model):
        press(place == "evaluate")
        return evaluate(model)

    settings = {"steps": 9, "directory": tmp_path, "batches": stopping_batches}
    with pytest.raises(KeyboardInterrupt):
        run(**settings, evaluate=stopping_evaluate)
    stopped = 5 if place == "batches" else 8
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{stopped:08d}"]
    again, same = run(**settings, evaluate=stopping_evaluate)
    assert bits(again) == bits(state) and untimed(same) == untimed(rows)


@pytest.fixture
def usual_ctrl_c():
    """Python's own handler of SIGINT, which a worker of pytest-xdist does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_step(tmp_path, usual_ctrl_c):
    """A real SIGINT in the middle of drawing a batch: the step is finished, saved, and then we stop."""

    def stopping(cursor):
        if cursor == 4:
            signal.raise_signal(signal.SIGINT)
        return batches(cursor)

    with pytest.raises(KeyboardInterrupt):
        run(directory=tmp_path, batches=stopping)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005"]
    assert signal.getsignal(signal.SIGINT) is usual_ctrl_c


def test_interrupted_in_the_middle_of_a_step(tmp_path, monkeypatch):
    """A second Ctrl-C while the state is overwritten: nothing half-done is saved, the resume is exact."""
    real, calls = training.compile_step, iter(range(100))

    def compile_step(step, state):
        advance = real(step, state)

        def cut(state, batch, key):
            result = advance(state, batch, key)
            if next(calls) == 6:
                raise KeyboardInterrupt
            return result

        return cut

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "compile_step", compile_step)
        run(steps=9, directory=tmp_path, checkpoint_every=4)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000004"]
    state, rows = reference()
    again, same = run(steps=9, directory=tmp_path)
    assert bits(again) == bits(state) and untimed(same) == untimed(rows)


def test_fit_outside_the_main_thread():
    result = []
    thread = threading.Thread(target=lambda: result.append(run(steps=3)))
    thread.start()
    thread.join()
    assert result[0][1][-1]["step"] == 3


@pytest.fixture
def finished(tmp_path):
    state, _ = run(steps=9, directory=tmp_path, checkpoint_every=4)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [8, 9]
    return tmp_path, state


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "one bit of the arrays": ("state.safetensors", flip),
    "one bit of the metadata": ("metadata.json", flip),
    "one bit of the manifest": ("manifest.json", flip),
    "half the arrays": ("state.safetensors", lambda p: p.write_bytes(p.read_bytes()[:300])),
    "no arrays": ("state.safetensors", lambda p: p.unlink()),
    "no metadata": ("metadata.json", lambda p: p.unlink()),
    "no manifest": ("manifest.json", lambda p: p.unlink()),
    "empty manifest": ("manifest.json", lambda p: p.write_bytes(b"")),
    "strange manifest": ("manifest.json", lambda p: p.write_bytes(b"[1]")),
    "manifest without files": ("manifest.json", lambda p: p.write_bytes(b'{"sha256": {}}')),
    "manifest without sums": (
        "manifest.json",
        lambda p: p.write_bytes(b'{"sha256": ["state.safetensors", "metadata.json"]}'),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_named_and_the_one_before_used(finished, caplog, damage):
    directory, state = finished
    name, harm = DAMAGE[damage]
    harm(directory / "step-00000009" / name)
    with caplog.at_level(logging.WARNING):
        loaded, _ = load_checkpoint(directory, state)
    assert int(loaded.step) == 8
    assert "step-00000009" in caplog.text
    if damage != "one bit of the manifest":
        assert name in caplog.text
    if "bit of the arrays" in damage:
        assert caplog.text.count("SHA-256") == 1


def test_damaged_checkpoint_is_replaced_by_the_resumed_run(finished, caplog):
    directory, state = finished
    flip(directory / "step-00000009" / "state.safetensors")
    again, rows = run(steps=9, directory=directory)
    assert bits(again) == bits(state)
    caplog.clear()
    load_checkpoint(directory, state)
    assert not caplog.text


def test_warning_reaches_stderr(finished):
    directory, _ = finished
    flip(directory / "step-00000009" / "metadata.json")
    code = "import sys; from llm_from_scratch.training import *; load_checkpoint(sys.argv[1], None)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True
    )
    assert "damaged checkpoint skipped" in done.stderr and "metadata.json: SHA-256" in done.stderr


def test_no_whole_checkpoint(finished):
    directory, state = finished
    for path in checkpoints(directory):
        flip(path / "state.safetensors")
    with pytest.raises(RuntimeError, match="step-00000009.*SHA-256.*step-00000008.*SHA-256"):
        load_checkpoint(directory, state)
    with pytest.raises(RuntimeError, match="no whole checkpoint"):
        run(steps=9, directory=directory)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_checkpoint(tmp_path, run(steps=0)[0])


def test_resume_with_another_shape_seed_or_config(finished):
    directory, _ = finished
    with pytest.raises(ValueError, match=r"seed=3, not seed=4"):
        run(directory=directory, seed=4)
    with pytest.raises(ValueError, match=r"accumulate=1, not accumulate=2"):
        run(directory=directory, accumulate=2)
    with pytest.raises(ValueError, match=r"config=None, not config=\{'width': 3\}"):
        run(directory=directory, config={"width": 3})
    wide = Small(key=jax.random.key(0), width=5)
    words = r"model\.layers\.0\.w is F32 \(3, 4\) in the file, float32 \(5, 4\) in the model"
    with pytest.raises(ValueError, match=words):
        fit(wide, loss, batches, optimizer(), steps=20, seed=3, directory=directory)
    with pytest.raises(ValueError, match=r"opt_state.*is not expected"):
        model = Small(key=jax.random.key(0))
        fit(model, loss, batches, optax.sgd(0.1), steps=20, seed=3, directory=directory)
    with pytest.raises(ValueError, match="step 9, beyond steps=5"):
        run(directory=directory, steps=5)


def test_longer_run_continues(finished):
    directory, _ = finished
    state, rows = run(steps=12, directory=directory)
    assert bits(state) == bits(run(steps=12)[0]) and rows[-1]["step"] == 12


def test_lost_log_is_reported(finished, caplog):
    directory, _ = finished
    (directory / "log.jsonl").unlink()
    run(steps=10, directory=directory)
    assert "has lost rows: 0 of 5 up to step 9 are left" in caplog.text


def test_state_round_trip(tmp_path):
    """Named tuples, counters and empty states of optax; bf16, uint32 and scalars; nothing pickled."""
    model = Small(key=jax.random.key(1))
    recipe = optax.MultiSteps(
        optax.chain(optax.clip(1.0), optax.adafactor(1e-3), optax.trace(0.9)), every_k_schedule=2
    )
    state = fit(model, loss, batches, recipe, steps=3)[0]
    path = save_checkpoint(tmp_path, state, {"note": "ü"})
    assert {p.name for p in path.iterdir()} == {
        "state.safetensors",
        "metadata.json",
        "manifest.json",
    }
    empty = train_state(Small(key=jax.random.key(2)), recipe)
    loaded, metadata = load_checkpoint(tmp_path, empty)
    assert bits(loaded) == bits(state) != bits(empty) and metadata == {"note": "ü"}
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    dtypes = {str(array.dtype) for array in named_arrays(state).values()}
    assert {"bfloat16", "uint32", "int32", "float32"} <= dtypes
    assert "model.layers.0.w" in named_arrays(state)


def test_random_keys_and_twin_paths_are_refused():
    with pytest.raises(ValueError, match="a is a random key"):
        named_arrays({"a": jax.random.key(0)})
    with pytest.raises(ValueError, match=r"two leaves have the path 'a\.b'"):
        named_arrays({"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}})


def test_transposed_arrays_survive(tmp_path):
    """The safetensors library writes memory as it lies; an array in Fortran order came back scrambled."""
    model = {"w": jnp.arange(6.0).reshape(2, 3).T}
    save_weights(tmp_path / "w.safetensors", model)
    np.testing.assert_array_equal(load_weights(tmp_path / "w.safetensors", model)["w"], model["w"])


def test_weights_read_by_another_reader(tmp_path):
    from safetensors.numpy import load_file

    model = {"layers": [jnp.ones((2, 3)), jnp.arange(4)]}
    save_weights(tmp_path / "sub" / "w.safetensors", model)
    stored = load_file(tmp_path / "sub" / "w.safetensors")
    assert {k: (v.shape, str(v.dtype)) for k, v in stored.items()} == {
        "layers.0": ((2, 3), "float32"),
        "layers.1": ((4,), "int32"),
    }


@pytest.mark.parametrize(
    "dtype",
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 "
    "int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool".split(),
)
def test_dtype_names_are_those_of_the_format(dtype):
    """Our name for a dtype against the one that the library writes into its header."""
    array = np.zeros(3, jnp.dtype(dtype))
    stored = dict(safetensors.deserialize(training.safetensors_bytes({"a": array})))
    assert training.safetensors_dtype(array) == stored["a"]["dtype"]


def test_bad_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    model = {"a": jnp.ones((2, 3)), "b": jnp.ones(4, jnp.bfloat16), "c": jnp.ones(1)}
    with pytest.raises(FileNotFoundError, match=str(path)):
        load_weights(path, model)
    save_weights(path, model)
    other = {"a": jnp.ones((3, 2)), "b": jnp.ones(4), "d": jnp.ones(1)}
    with pytest.raises(ValueError) as caught:
        load_weights(path, other)
    for part in (
        str(path),
        "a is F32 (2, 3) in the file, float32 (3, 2) in the model",
        "b is BF16 (4,) in the file, float32 (4,) in the model",
        "d is missing",
        "c is not expected",
    ):
        assert part in str(caught.value)
    whole = path.read_bytes()
    for length in (0, 5, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a whole safetensors file") as caught:
            load_weights(path, model)
        assert str(path) in str(caught.value)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_weights(path, model)


def test_count_parameters():
    assert count_parameters(Small(key=jax.random.key(0))) == 3 * 4 + 3  # the integers do not count


def test_callers_arrays_survive_donation():
    model = Small(key=jax.random.key(0))
    before = bits(model)
    batch = jax.tree.map(jnp.array, batches(0))
    fit(model, loss, lambda cursor: batch, optimizer(), steps=3)
    assert bits(model) == before and float(batch["x"].sum()) != 0


def whole(cursor):
    parts = [batches(2 * cursor), batches(2 * cursor + 1)]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def test_accumulation_equals_the_large_batch():
    def quiet(model, batch, key):
        h = jnp.tanh(batch["x"] @ model["w"])
        return jnp.mean((h - batch["targets"]) ** 2)

    model = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
    small = fit(model, quiet, batches, optax.sgd(0.3), steps=5, accumulate=2)[0]
    large = fit(model, quiet, whole, optax.sgd(0.3), steps=5)[0]
    np.testing.assert_allclose(small.model["w"], large.model["w"], rtol=1e-5)
    assert int(small.cursor) == 10 and int(small.step) == 5


def test_accumulation_weighs_micro_batches_by_their_targets():
    """Micro-batches of 1 and 7 targets: the mean is over targets, not over micro-batches."""
    mask = np.zeros((2, 8), np.float32)
    mask[0, :1] = mask[1, :7] = 1

    def masked(model, batch, key):
        error = (batch["x"] @ model["w"] - batch["targets"]) ** 2
        weight = jnp.sum(batch["mask"])
        return jnp.sum(jnp.sum(error, -1) * batch["mask"]) / weight, weight

    def micro(cursor):
        return batches(cursor) | {"mask": mask[cursor % 2]}

    def both(cursor):
        return jax.tree.map(lambda *x: np.concatenate(x), micro(2 * cursor), micro(2 * cursor + 1))

    model = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
    small, small_rows = fit(model, masked, micro, optax.sgd(0.1), steps=3, accumulate=2)
    large, large_rows = fit(model, masked, both, optax.sgd(0.1), steps=3)
    np.testing.assert_allclose(small.model["w"], large.model["w"], rtol=1e-5)
    assert small_rows[-1]["loss"] == pytest.approx(large_rows[-1]["loss"], rel=1e-5)


def test_accumulation_in_fp32():
    """1,000 equal bf16 gradients: a bf16 sum would stop growing at 256."""

    def linear(model, batch, key):
        return jnp.sum(model["w"] * batch["x"])

    model = {"w": jnp.ones((1,), jnp.bfloat16)}
    grads = training.mean_gradient(
        linear,
        model,
        {"w": None},
        {"x": jnp.full((1000, 1), 1.0, jnp.bfloat16)},
        jax.random.key(0),
        accumulate=1000,
    )[1]
    assert grads["w"].dtype == jnp.float32 and float(grads["w"][0]) == 1.0


def test_key_is_folded_from_seed_and_step():
    def noise(model, batch, key):
        return jnp.sum(model["w"]) * 0 + jax.random.uniform(key)

    _, rows = fit({"w": jnp.ones(1)}, noise, batches, optax.sgd(0.0), steps=3, seed=5, log_every=1)
    expected = [jax.random.uniform(jax.random.fold_in(jax.random.key(5), i)) for i in range(3)]
    assert [row["loss"] for row in rows] == [float(x) for x in expected]


def test_micro_batches_of_unequal_shape():
    ragged = lambda cursor: {"x": np.ones((cursor + 1, 4), np.float32)}  # noqa: E731
    with pytest.raises(ValueError, match="equal shapes"):
        run(batches=ragged, accumulate=2)


def test_diverged_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    def poisoned(cursor):
        batch = batches(cursor)
        return batch | {"x": batch["x"] * (np.float32("nan") if cursor == 6 else np.float32(1))}

    with pytest.raises(FloatingPointError, match="step 8.*nan"):
        run(directory=tmp_path, checkpoint_every=4, batches=poisoned, log_every=0)
    assert int(load_checkpoint(tmp_path, run(steps=0)[0])[0].step) == 4


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"steps": -1}, "steps=-1"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"checkpoint_every": 5}, "needs a directory"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        run(**bad)


def test_progress_bar_is_on_stderr_and_only_when_asked(capsys):
    run(steps=9)
    assert capsys.readouterr() == ("", "")
    run(steps=9, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "loss=" in err and "tokens/s=" in err and "9/9" in err and "<00:00" in err


def test_find_learning_rate():
    """On a quadratic of curvature 1, gradient descent diverges above a rate of 2."""

    def bowl(model, batch, key):
        return 0.5 * jnp.sum(model["w"] ** 2)

    model = {"w": jnp.ones(3)}
    rates, losses = find_learning_rate(
        model, bowl, lambda cursor: 0, optax.sgd, low=1e-4, high=100.0, steps=200
    )
    assert len(rates) == len(losses) < 200
    assert losses[0] == 1.5 and 2.0 < rates[-1] < 8.0
    assert 1.0 < rates[int(np.argmin(losses))] < 2.5


@pytest.mark.parametrize("bad", [{"low": 0.0}, {"low": 20.0}, {"steps": 1}])
def test_find_learning_rate_refuses(bad):
    with pytest.raises(ValueError, match="low=.*high=.*steps="):
        find_learning_rate({"w": jnp.ones(3)}, loss, batches, optax.sgd, **bad)


def test_train_state_is_a_pytree():
    state = train_state(Small(key=jax.random.key(0)), optimizer())
    assert isinstance(state, TrainState) and state.step.dtype == jnp.int32
    assert isinstance(jax.tree.map(lambda x: x, state), TrainState)


def small_lm(direct=True):
    return training.NeuralLM(3, 4, 5, direct=direct, key=jax.random.key(1))


def test_byte_windows():
    """Every byte once, START before each document, nothing from the document before."""
    contexts, targets = training.byte_windows([b"abc", b"", b"de"], 2)
    start = training.START
    assert targets.tolist() == [97, 98, 99, 100, 101]
    expected = [[start, start], [start, 97], [97, 98], [start, start], [start, 100]]
    assert contexts.tolist() == expected
    assert contexts.dtype == targets.dtype == np.int32


@pytest.mark.parametrize("direct", [True, False])
def test_neural_lm(direct):
    """The model against the paper's equation 1 in NumPy, and a distribution over the bytes."""
    model = small_lm(direct)
    model = eqx.tree_at(lambda m: (m.d, m.b), model, (jnp.arange(5.0) / 9, jnp.arange(256.0) / 99))
    if direct:
        model = eqx.tree_at(lambda m: m.W, model, jnp.sin(jnp.arange(256.0 * 12)).reshape(256, 12))
    C, H, d, U, b = (np.asarray(getattr(model, name), np.float64) for name in "CHdUb")
    x = np.concatenate([C[65], C[256], C[65]])
    z = b + U @ np.tanh(d + H @ x) + (np.asarray(model.W, np.float64) @ x if direct else 0)
    np.testing.assert_allclose(model(jnp.array([65, 256, 65])), z, atol=1e-5)
    every_end = [b"To be, or no" + bytes([end]) for end in range(256)]
    log_p = training.byte_log_probs(model, every_end).reshape(256, 13)
    assert np.exp(log_p[:, -1]).sum() == pytest.approx(1, abs=1e-5)


def test_byte_log_probs_does_not_depend_on_the_chunks():
    documents = [b"To be, or not to be", b"", b"that is the question"]
    model = small_lm()
    whole = training.byte_log_probs(model, documents, chunk=64)
    parts = training.byte_log_probs(model, documents, chunk=7)
    assert whole.shape == (39,) and whole.dtype == np.float64
    np.testing.assert_allclose(whole, parts, atol=1e-6)
    alone = training.byte_log_probs(model, documents[2:], chunk=7)
    np.testing.assert_allclose(whole[19:], alone, atol=1e-6)


@pytest.mark.parametrize("direct", [True, False])
def test_backpropagate(direct):
    """By hand against jax.grad, with a byte that fills a whole window."""
    model = small_lm(direct)
    contexts, targets = training.byte_windows([b"oooo, no; o no, so"], 3)
    batch = {"contexts": jnp.array(contexts), "targets": jnp.array(targets)}
    by_hand = training.backpropagate(model, batch["contexts"], batch["targets"])
    by_jax = jax.grad(training.next_byte_loss)(model, batch, None)
    assert jax.tree.structure(by_hand) == jax.tree.structure(by_jax)
    for name, array in named_arrays(by_jax).items():
        np.testing.assert_allclose(named_arrays(by_hand)[name], array, atol=1e-6, err_msg=name)
        assert np.abs(array).max() > 1e-4


def test_first_loss_is_that_of_the_uniform_distribution():
    model = training.NeuralLM(5, 16, 128, key=jax.random.key(0))
    log_p = training.byte_log_probs(model, [bytes(range(256)) * 4])
    assert -log_p.mean() == pytest.approx(np.log(256), abs=0.02)
