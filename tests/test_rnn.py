"""Chapter 04: torch.nn.LSTM, NumPy by hand, finite differences, state, sampling, dynamic evaluation."""

import functools
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from llm_from_scratch import rnn
from llm_from_scratch.bigram import START
from llm_from_scratch.rnn import RNNLM, LSTMCell, RNNCell, RNNConfig, Streams

GOLDEN = Path(__file__).parent / "golden" / "lstm.safetensors"
TEXTS = [b"To be, or not to be: that is the question:", b"Whether 'tis nobler in the mind", b"I"]
CONFIGS = {
    "lstm": RNNConfig(dim=6, layers=3, width=4),
    "no skips": RNNConfig(dim=6, layers=3, width=4, skips=False),
    "no peepholes": RNNConfig(dim=6, layers=2, width=4, peepholes=False),
    "rnn": RNNConfig(cell="rnn", dim=6, layers=2, width=4),
}
every_kind = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """The models are tiny: compile for speed of compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def randomised(model, seed=0):
    """Every array random, so that biases and peepholes count."""
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [0.6 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, new)


def small(kind="lstm", seed=0):
    return randomised(RNNLM(CONFIGS[kind], key=jax.random.key(1)), seed)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def step_by_hand(cell, state, x):
    """One step of a cell in fp64: the equations, a gate at a time."""
    W, U, b = (np.asarray(a, np.float64) for a in (cell.W, cell.U, cell.b))
    if isinstance(cell, RNNCell):
        h = np.tanh(W @ x + U @ state + b)
        return h, h
    c, h = state
    n = len(c)
    p = np.zeros((3, n)) if cell.p is None else np.asarray(cell.p, np.float64)
    a = [
        W[k * n : (k + 1) * n] @ x + U[k * n : (k + 1) * n] @ h + b[k * n : (k + 1) * n]
        for k in range(4)
    ]
    i, f = sigmoid(a[0] + p[0] * c), sigmoid(a[1] + p[1] * c)
    new = f * c + i * np.tanh(a[2])
    h = sigmoid(a[3] + p[2] * new) * np.tanh(new)
    return (new, h), h


def model_by_hand(model, symbols):
    """The logits of a whole model, symbol after symbol, layer after layer; START empties the memory."""
    fresh = [jax.tree.map(lambda s: np.zeros(s.shape), cell.initial()) for cell in model.cells]
    C, R, b = (np.asarray(a, np.float64) for a in (model.C, model.R, model.b))
    rows, state = [], list(fresh)
    for symbol in symbols:
        state = list(fresh) if symbol == START else state
        shown = []
        for n, cell in enumerate(model.cells):
            if n == 0:
                x = C[symbol]
            else:
                x = np.concatenate([C[symbol], shown[-1]]) if model.config.skips else shown[-1]
            state[n], h = step_by_hand(cell, state[n], x)
            shown.append(h)
        rows.append(R @ (np.concatenate(shown) if model.config.skips else shown[-1]) + b)
    return np.stack(rows)


def test_lstm_by_hand():
    """Scan against fp64 NumPy, with peepholes; the output gate sees the new cell."""
    cell = randomised(LSTMCell(5, 7, key=jax.random.key(0)))
    xs = jax.random.normal(jax.random.key(1), (20, 5))
    outputs, last = rnn.run_layer(cell, xs, jnp.ones(20), cell.initial())
    state, rows = (np.zeros(7), np.zeros(7)), []
    for x in np.asarray(xs, np.float64):
        state, h = step_by_hand(cell, state, x)
        rows.append(h)
    np.testing.assert_allclose(outputs, np.stack(rows), atol=1e-5)
    np.testing.assert_allclose(last[0], state[0], atol=1e-5)


def torch_layer(tensors, n):
    """Layer n of the golden torch.nn.LSTM as a cell without peepholes: the same order of the gates."""
    W, U = tensors[f"weight_ih_l{n}"], tensors[f"weight_hh_l{n}"]
    b = tensors[f"bias_ih_l{n}"] + tensors[f"bias_hh_l{n}"]
    cell = LSTMCell(W.shape[1], U.shape[1], peepholes=False, key=jax.random.key(0))
    return eqx.tree_at(lambda m: (m.W, m.U, m.b), cell, tuple(map(jnp.asarray, (W, U, b))))


def test_torch():
    """Outputs, states and gradients of two layers of torch.nn.LSTM, in fp64."""
    with jax.enable_x64(True):
        tensors = load_file(GOLDEN)
        cells, xs = [torch_layer(tensors, n) for n in (0, 1)], jnp.asarray(tensors["xs"])

        @jax.jit
        def run(cells):
            below, states = xs, []
            for cell in cells:
                start = jax.tree.map(lambda s: s.astype(jnp.float64), cell.initial())
                below, last = rnn.run_layer(cell, below, jnp.ones(len(xs)), start)
                states.append(last)
            return below, states

        outputs, states = run(cells)
        np.testing.assert_allclose(outputs, tensors["outputs"], rtol=1e-10, atol=1e-12)
        for n, (c, h) in enumerate(states):
            np.testing.assert_allclose(c, tensors["c"][n], rtol=1e-10)
            np.testing.assert_allclose(h, tensors["h"][n], rtol=1e-10)
        grads = jax.jit(jax.grad(lambda cells: jnp.sum(run(cells)[0] ** 3)))(cells)
        for n, grad in enumerate(grads):
            for ours, theirs in (("W", "weight_ih"), ("U", "weight_hh"), ("b", "bias_ih")):
                wanted = tensors[f"grad.{theirs}_l{n}"]
                np.testing.assert_allclose(getattr(grad, ours), wanted, rtol=1e-8, atol=1e-10)


@every_kind
def test_stack_by_hand(kind):
    """Depth, skips and the reset at START, against loops in NumPy."""
    model = small(kind)
    symbols = np.array([START, *TEXTS[0], START, *TEXTS[1]])
    logits, _ = eqx.filter_jit(model)(jnp.asarray(symbols))
    np.testing.assert_allclose(logits, model_by_hand(model, symbols), atol=1e-4)


@every_kind
def test_gradients_by_finite_differences(kind):
    """Along a random direction of every array, in fp64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), small(kind))
        symbols = jnp.array([START, *TEXTS[0][:-1]])[None]
        targets = jnp.array([*TEXTS[0]])[None]

        @eqx.filter_jit
        def loss(model):
            state = jax.tree.map(lambda s: s.astype(jnp.float64), model.initial_state(1))
            return jnp.mean(rnn.sequence_nats(model, symbols, targets, state)[0])

        grads = eqx.filter_jit(eqx.filter_grad(loss))(wide)
        leaves, tree = jax.tree.flatten(wide)
        for n, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):
            d = jnp.asarray(np.random.default_rng(n).normal(size=leaf.shape))
            moved = [
                loss(jax.tree.unflatten(tree, [*leaves[:n], leaf + e * d, *leaves[n + 1 :]]))
                for e in (1e-5, -1e-5)
            ]
            np.testing.assert_allclose(
                (moved[0] - moved[1]) / 2e-5, jnp.sum(grad * d), rtol=1e-5, atol=1e-9
            )


def test_orthogonal_start():
    """The recurrent matrix of a fresh RNNCell stretches every vector by `radius`."""
    U = np.asarray(RNNCell(3, 8, radius=1.7, key=jax.random.key(0)).U)
    np.testing.assert_allclose(U @ U.T, 1.7**2 * np.eye(8), atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"), [("cell", "gru"), ("dim", 0), ("layers", 0), ("width", -1)]
)
def test_bad_config(field, value):
    with pytest.raises(ValueError, match=f"{field}='?{value}'? must be"):
        RNNConfig(**{field: value})


@every_kind
def test_pieces_are_the_whole(kind):
    """The state carries everything: chunks of any length give the same; without it they do not."""
    model = small(kind)
    whole = rnn.stream_log_probs(model, TEXTS, 64)
    assert whole.shape == (sum(map(len, TEXTS)),) and whole.dtype == np.float64
    np.testing.assert_allclose(rnn.stream_log_probs(model, TEXTS, 5), whole, atol=1e-5)
    assert not np.allclose(rnn.stream_log_probs(model, TEXTS, 5, carry=False), whole, atol=1e-3)


def test_log_probs_by_hand():
    """Each document from START, every byte once, in order."""
    model, wanted = small(), []
    for text in TEXTS:
        logits = model_by_hand(model, [START, *text[:-1]])
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        wanted.append(log_p[np.arange(len(text)), list(text)])
    found = rnn.stream_log_probs(model, TEXTS, 16)
    np.testing.assert_allclose(found, np.concatenate(wanted), atol=1e-4)


def test_streams():
    """Inputs are the targets one later, START at each document's head; rows continue; seeds differ."""
    streams = Streams(TEXTS, 3, 4, seed=1)
    total = sum(map(len, TEXTS))
    read = [streams(cursor) for cursor in range(30)]
    assert all(batch["inputs"].shape == batch["targets"].shape == (3, 4) for batch in read)
    joined = b"".join(TEXTS)
    starts = {0, len(TEXTS[0]), len(TEXTS[0]) + len(TEXTS[1])}
    for row, place in enumerate(streams.places):
        at = (place + np.arange(120)) % total
        targets = np.concatenate([batch["targets"][row] for batch in read])
        inputs = np.concatenate([batch["inputs"][row] for batch in read])
        assert bytes(targets.astype(np.uint8)) == bytes(joined[i] for i in at)
        assert all(
            x == (START if i in starts else joined[i - 1]) for x, i in zip(inputs, at, strict=True)
        )
    again = Streams(TEXTS, 3, 4, seed=1)(7)
    assert all(np.array_equal(again[name], read[7][name]) for name in again)
    assert any(Streams(TEXTS, 3, 4, seed=s).places[0] != streams.places[0] for s in (2, 3))


@pytest.mark.parametrize("carry", [True, False])
def test_truncated_training_by_hand(carry):
    """Two steps of gradient descent: the second starts from the first's last state, or from nothing."""
    model, streams = small(), Streams(TEXTS, 2, 5)
    trained, rows = rnn.train_truncated(model, streams, optax.sgd(0.1), steps=2, carry=carry)

    @eqx.filter_jit
    @functools.partial(eqx.filter_value_and_grad, has_aux=True)
    def value_and_grad(model, batch, state):
        nats, state = rnn.sequence_nats(model, batch["inputs"], batch["targets"], state)
        return jnp.mean(nats), state

    wanted, state = model, model.initial_state(2)
    for cursor in (0, 1):
        batch = jax.tree.map(jnp.asarray, streams(cursor))
        (value, after), grads = value_and_grad(wanted, batch, state)
        np.testing.assert_allclose(rows[cursor], [value, optax.tree.norm(grads)], rtol=1e-4)
        wanted = jax.tree.map(lambda p, g: p - 0.1 * g, wanted, grads)
        state = after if carry else state
    for ours, theirs in zip(jax.tree.leaves(trained), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_clipping():
    """A large gradient reaches Adam with the norm of the limit, a small one as it is."""
    grads = {"w": jnp.array([3.0, 4.0])}
    for clip, wanted in ((1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])):
        with jax.numpy_dtype_promotion("standard"):
            chain = rnn.clipped_adam(100, clip=clip)
            _, (_, memory) = chain.update(grads, chain.init(grads), grads)
        (adam,) = [part for part in jax.tree.leaves(memory, is_leaf=is_adam) if is_adam(part)]
        np.testing.assert_allclose(adam.mu["w"], 0.1 * np.array(wanted), rtol=1e-5)


def is_adam(part):
    return isinstance(part, optax.ScaleByAdamState)


def test_dynamic_evaluation_by_hand():
    """Predict a chunk, one step on its mean, the next; padding and other documents count for nothing."""
    model, rate, chunk, clip = small(), 0.2, 8, 0.5
    found, adapted = rnn.adapt(model, TEXTS, rate, chunk, clip)

    @eqx.filter_jit
    @functools.partial(eqx.filter_grad, has_aux=True)
    def grad(model, symbols, targets, state):
        nats, state = rnn.sequence_nats(model, symbols[None], targets[None], state)
        return jnp.mean(nats), (nats[0], state)

    wanted = []
    for row, text in enumerate(TEXTS):
        now, state = model, model.initial_state(1)
        inputs, targets = rnn.shifted(text)
        for k in range(0, len(text), chunk):
            piece = (jnp.asarray(inputs[k : k + chunk]), jnp.asarray(targets[k : k + chunk]))
            grads, (nats, state) = grad(now, *piece, state)
            wanted.append(-np.asarray(nats))
            scale = rate * min(1.0, clip / float(optax.tree.norm(grads)))
            now = jax.tree.map(lambda p, g, s=scale: p - s * g, now, grads)
        for ours, theirs in zip(jax.tree.leaves(adapted), jax.tree.leaves(now), strict=True):
            np.testing.assert_allclose(ours[row], theirs, atol=1e-5)
    np.testing.assert_allclose(found, np.concatenate(wanted), atol=1e-4)
    np.testing.assert_allclose(rnn.dynamic_log_probs(model, TEXTS, rate, chunk, clip), found)
    still = rnn.dynamic_log_probs(model, TEXTS, 0.0, chunk)
    np.testing.assert_allclose(still, rnn.stream_log_probs(model, TEXTS), atol=1e-5)


def test_sampling_follows_the_distribution():
    """Frequencies of the first byte against softmax(logits / temperature), and later ones by re-reading."""
    model = small()
    drawn, nats, entropies = rnn.sample_bytes(
        model, b"To", 6, batch=2000, temperature=0.7, key=jax.random.key(3)
    )
    assert drawn.shape == nats.shape == entropies.shape == (2000, 6)
    logits = model_by_hand(model, [START, *b"To"])[-1] / 0.7
    p = np.exp(logits) / np.exp(logits).sum()
    counts = np.bincount(drawn[:, 0], minlength=256)
    chi = np.sum((counts - 2000 * p) ** 2 / (2000 * p))
    assert chi < 255 + 5 * np.sqrt(2 * 255)
    texts = [b"To" + bytes(row.astype(np.uint8)) for row in drawn[:5]]
    read = -rnn.stream_log_probs(model, texts).reshape(5, -1)[:, 2:]
    np.testing.assert_allclose(nats[:5], read, atol=1e-4)
    log_p = logits * 0.7 - np.log(np.exp(logits * 0.7).sum())
    np.testing.assert_allclose(entropies[:, 0], -np.sum(np.exp(log_p) * log_p), rtol=1e-4)
    with pytest.raises(ValueError, match="temperature=0 must be positive"):
        rnn.sample_bytes(model, b"To", 6, temperature=0, key=jax.random.key(3))


def test_stored_runs():
    """Every arm of the tool has all its rows, made with the settings that it has now."""
    import rnn_runs

    rows = rnn_runs.stored()
    wanted = [(name, seed) for name, arm in rnn_runs.ARMS.items() for seed in range(arm.seeds)]
    assert [(row["arm"], row["seed"]) for row in rows] == wanted
    for row in rows:
        arm = rnn_runs.ARMS[row["arm"]]
        assert row["settings"] == json.loads(json.dumps(rnn_runs.describe(arm)))
        spent = 6 * arm.weights() * arm.steps() * arm.batch * arm.length
        assert abs(spent / arm.flops - 1) < 0.01
