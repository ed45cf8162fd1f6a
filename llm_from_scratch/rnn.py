"""A memory that is carried from byte to byte: the RNN and the LSTM of Graves 2013, deep stacks, truncated back-propagation, sampling, and dynamic evaluation.

Written from chapters/04_rnn.py by `make export`: edit there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from llm_from_scratch.bigram import BYTES, START
from llm_from_scratch.training import is_trainable


class RNNCell(eqx.Module):
    """The plain recurrent layer h_t = tanh(W x_t + U h_{t−1} + b), of X inputs and D units.

    U starts as `radius` times a random orthogonal matrix. The state is h.
    """

    W: Float[Array, "D X"]
    U: Float[Array, "D D"]
    b: Float[Array, " D"]

    def __init__(self, inputs: int, dim: int, *, radius: float = 1.0, key: Array):
        for_w, for_u = jax.random.split(key)
        self.W = jax.random.normal(for_w, (dim, inputs)) / inputs**0.5
        self.U = radius * jax.random.orthogonal(for_u, dim)
        self.b = jnp.zeros(dim)

    def initial(self) -> Float[Array, " D"]:
        """The state before the first input: zeros."""
        return jnp.zeros_like(self.b)

    def project(self, xs: Float[Array, "T X"]) -> Float[Array, "T D"]:
        """W x + b of all inputs at once: the part that needs no memory."""
        return xs @ self.W.T + self.b[None]

    def __call__(self, h: Float[Array, " D"], projected: Float[Array, " D"]) -> Float[Array, " D"]:
        """One step: the next state, from the state and a row of `project`."""
        return jnp.tanh(projected + self.U @ h)

    def output(self, h: Float[Array, " D"]) -> Float[Array, " D"]:
        """What the layer shows of its state: all of it."""
        return h


def run_layer(cell: Any, xs: Float[Array, "T X"], keep: Float[Array, " T"], state: Any) -> tuple:
    """A layer over T inputs by `lax.scan`: outputs (T, D) and the last state.

    Before input t the state is multiplied by keep[t]: 1 goes on, 0 forgets all.
    """

    def step(state: Any, now: tuple[Array, Array]) -> tuple[Any, Array]:
        projected, keep = now
        state = cell(jax.tree.map(lambda s: s * keep, state), projected)
        return state, cell.output(state)

    state, outputs = jax.lax.scan(step, state, (cell.project(xs), keep))
    return outputs, state


class LSTMCell(eqx.Module):
    """The LSTM layer with peepholes of Graves 2013, equations 7 to 11, of X inputs and D units.

    Rows of W, U and b: input gate, forget gate, candidate, output gate. p holds the diagonals of
    W_ci, W_cf and W_co; None without peepholes. The state is (c, h).
    """

    W: Float[Array, "4D X"]
    U: Float[Array, "4D D"]
    b: Float[Array, " 4D"]
    p: Float[Array, "3 D"] | None

    def __init__(
        self,
        inputs: int,
        dim: int,
        *,
        peepholes: bool = True,
        forget_bias: float = 1.0,
        key: Array,
    ):
        for_w, for_u = jax.random.split(key)
        self.W = jax.random.normal(for_w, (4 * dim, inputs)) / inputs**0.5
        self.U = jax.random.normal(for_u, (4 * dim, dim)) / dim**0.5
        self.b = jnp.zeros(4 * dim).at[dim : 2 * dim].set(forget_bias)
        self.p = jnp.zeros((3, dim)) if peepholes else None

    def initial(self) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        """The state before the first input: zeros."""
        zeros = jnp.zeros(self.U.shape[1])
        return zeros, zeros

    def project(self, xs: Float[Array, "T X"]) -> Float[Array, "T 4D"]:
        """W x + b of all inputs at once: the part that needs no memory."""
        return xs @ self.W.T + self.b[None]

    def __call__(
        self,
        state: tuple[Float[Array, " D"], Float[Array, " D"]],
        projected: Float[Array, " 4D"],
    ) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        """One step: the next (c, h), from the state and a row of `project`."""
        c, h = state
        i, f, g, o = jnp.split(projected + self.U @ h, 4)
        if self.p is not None:
            i, f = i + self.p[0] * c, f + self.p[1] * c
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        if self.p is not None:
            o = o + self.p[2] * c
        return c, jax.nn.sigmoid(o) * jnp.tanh(c)

    def output(self, state: tuple[Float[Array, " D"], Float[Array, " D"]]) -> Float[Array, " D"]:
        """What the layer shows of its state: h."""
        return state[1]


@dataclass(frozen=True)
class RNNConfig:
    """The shape of an `RNNLM`: `cell` "lstm" or "rnn", `layers` of `dim` units, byte vectors of `width`.

    `skips`: every layer sees the bytes, and the output sees every layer (Graves 2013, figure 1).
    `peepholes` and `forget_bias` are for "lstm", `radius` is for "rnn". Raises ValueError.
    """

    cell: str = "lstm"
    dim: int = 64
    layers: int = 1
    width: int = 16
    skips: bool = True
    peepholes: bool = True
    forget_bias: float = 1.0
    radius: float = 1.0

    def __post_init__(self):
        if self.cell not in ("lstm", "rnn"):
            raise ValueError(f'cell={self.cell!r} must be "lstm" or "rnn"')
        for name in ("dim", "layers", "width"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name}={size} must be at least 1")

    def make_cell(self, inputs: int, *, key: Array) -> RNNCell | LSTMCell:
        """A layer of this kind for so many inputs."""
        if self.cell == "rnn":
            return RNNCell(inputs, self.dim, radius=self.radius, key=key)
        options = {"peepholes": self.peepholes, "forget_bias": self.forget_bias}
        return LSTMCell(inputs, self.dim, **options, key=key)


class RNNLM(eqx.Module):
    """A recurrent language model over bytes: symbols in, logits and state out; batches by `jax.vmap`.

    The symbol START (256) empties the memory, so that documents can follow each other in a stream.
    """

    C: Float[Array, "257 X"]
    cells: tuple
    R: Float[Array, "V D"]
    b: Float[Array, " V"]
    config: RNNConfig = eqx.field(static=True)

    def __init__(self, config: RNNConfig, *, key: Array):
        for_c, for_r, for_cells = jax.random.split(key, 3)
        X, D, L = config.width, config.dim, config.layers
        inputs = [X] + [X + D if config.skips else D] * (L - 1)
        keys = jax.random.split(for_cells, L)
        shown = L * D if config.skips else D
        self.C = jax.random.normal(for_c, (START + 1, X))
        self.cells = tuple(config.make_cell(n, key=k) for n, k in zip(inputs, keys, strict=True))
        self.R = 3 * jax.random.normal(for_r, (BYTES, shown)) / shown**0.5
        self.b = jnp.zeros(BYTES)
        self.config = config

    def initial_state(self, batch: int | None = None) -> tuple:
        """The empty memory, one entry a layer; with `batch` in front of every shape if given."""
        state = tuple(cell.initial() for cell in self.cells)
        if batch is None:
            return state
        return jax.tree.map(lambda s: jnp.zeros((batch, *s.shape), s.dtype), state)

    def __call__(
        self, symbols: Int[Array, " T"], state: tuple | None = None
    ) -> tuple[Float[Array, "T V"], tuple]:
        """The logits after each symbol, and the state after the last, to go on from."""
        state = self.initial_state() if state is None else state
        x = self.C[symbols]
        keep = (symbols != START).astype(x.dtype)
        shown, after = [], []
        for cell, before in zip(self.cells, state, strict=True):
            below = [x, *shown[-1:]] if self.config.skips else [*shown[-1:]] or [x]
            outputs, last = run_layer(cell, jnp.concatenate(below, axis=-1), keep, before)
            shown.append(outputs)
            after.append(last)
        top = jnp.concatenate(shown, axis=-1) if self.config.skips else shown[-1]
        return top @ self.R.T + self.b[None], tuple(after)


def sequence_nats(
    model: RNNLM, inputs: Int[Array, "B T"], targets: Int[Array, "B T"], state: tuple
) -> tuple[Float[Array, "B T"], tuple]:
    """−ln p of every target in nats, and the state after the last input."""
    logits, state = jax.vmap(model)(inputs, state)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen, state


def shifted(document: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A document as symbols that go in, START first, and bytes to predict; int32, of equal length."""
    targets = np.frombuffer(document, np.uint8).astype(np.int32)
    return np.concatenate([[START], targets[:-1]]).astype(np.int32)[: len(targets)], targets


class Streams:
    """The documents end to end, read in `batch` places at once: row r of call n + 1 goes on where call n stopped.

    Calling it with a cursor gives inputs and targets, (batch, length). `seed` shifts the places.
    """

    def __init__(self, documents: Sequence[bytes], batch: int, length: int, *, seed: int = 0):
        pairs = [shifted(document) for document in documents]
        self.inputs, self.targets = (np.concatenate(part) for part in zip(*pairs, strict=True))
        self.length, total = length, len(self.targets)
        first = np.random.default_rng(seed).integers(total)
        self.places = first + np.arange(batch) * (total // batch)

    def __call__(self, cursor: int) -> dict[str, np.ndarray]:
        """Batch number `cursor`: a pure function of it."""
        steps = cursor * self.length + np.arange(self.length)
        at = (self.places[:, None] + steps[None]) % len(self.targets)
        return {"inputs": self.inputs[at], "targets": self.targets[at]}


def clipped_adam(steps: int, peak: float = 0.02, clip: float = 1.0) -> optax.GradientTransformation:
    """Adam behind a clip of the gradient's norm, with warm-up and cosine decay to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, min(50, steps // 5), steps)
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(schedule))


def train_truncated(
    model: RNNLM,
    batches: Streams,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    carry: bool = True,
) -> tuple[RNNLM, np.ndarray]:
    """Truncated back-propagation: the state flows on from batch to batch, the gradient does not.

    Without `carry` every batch starts with an empty memory. Returns the trained model and, one row
    per step, the loss in nats and the norm of the gradient before clipping.
    """

    def loss(model: RNNLM, batch: dict[str, Array], state: tuple) -> tuple[Array, tuple]:
        nats, state = sequence_nats(model, batch["inputs"], batch["targets"], state)
        return jnp.mean(nats), state

    @eqx.filter_jit
    def step(model: RNNLM, memory: Any, state: tuple, batch: dict[str, Array]) -> tuple:
        value_and_grad = eqx.filter_value_and_grad(loss, has_aux=True)
        (value, after), grads = value_and_grad(model, batch, state)
        with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix int32 and fp32
            updates, memory = optimizer.update(grads, memory, model)
        measured = jnp.stack([value, optax.tree.norm(grads)])
        return eqx.apply_updates(model, updates), memory, after, measured

    rows, memory = [], optimizer.init(eqx.filter(model, is_trainable))
    empty = state = model.initial_state(len(batches.places))
    for cursor in range(steps):
        batch = batches(cursor)
        model, memory, state, measured = step(model, memory, state if carry else empty, batch)
        rows.append(measured)
    return model, np.asarray(jnp.stack(rows))


def _side_by_side(documents: Sequence[bytes], chunk: int) -> tuple[np.ndarray, ...]:
    """Inputs, targets and a mask of the real bytes, each (documents, chunks, chunk)."""
    longest = -(-max(map(len, documents)) // chunk) * chunk
    inputs = np.zeros((len(documents), longest), np.int32)
    targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
    for row, document in enumerate(documents):
        n = len(document)
        inputs[row, :n], targets[row, :n] = shifted(document)
        mask[row, :n] = True
    return tuple(x.reshape(len(documents), -1, chunk) for x in (inputs, targets, mask))


_sequence_nats = eqx.filter_jit(sequence_nats)


def stream_log_probs(
    model: RNNLM, documents: Sequence[bytes], chunk: int = 1024, *, carry: bool = True
) -> np.ndarray:
    """The natural log of the probability of every byte, in order, in fp64; each document from START.

    The memory is carried through the whole document, so `chunk` changes nothing but the speed.
    Without `carry` it is lost after every chunk.
    """
    inputs, targets, mask = _side_by_side(documents, chunk)
    empty = state = model.initial_state(len(documents))
    nats = []
    for k in range(inputs.shape[1]):
        now, state = _sequence_nats(model, inputs[:, k], targets[:, k], state if carry else empty)
        nats.append(np.asarray(now, np.float64))
    return -np.stack(nats, axis=1)[mask]


def sample_bytes(
    model: RNNLM,
    prompt: bytes,
    length: int,
    *,
    batch: int = 1,
    temperature: float = 1.0,
    key: Array,
) -> tuple[Int[np.ndarray, "B T"], Float[np.ndarray, "B T"], Float[np.ndarray, "B T"]]:
    """`batch` continuations of a prompt by `length` bytes, each drawn from softmax(logits / temperature).

    Also, for every byte, its −ln p and the entropy of its choice, both under the model itself, that
    is at temperature 1, in nats. Raises ValueError unless the temperature is positive.
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature={temperature} must be positive; near 0 it takes the best byte"
        )
    symbols = jnp.asarray([START, *prompt], jnp.int32)
    drawn = _draw(model, symbols, length, batch, jnp.float32(temperature), key)
    return tuple(np.asarray(part).T for part in drawn)


@eqx.filter_jit
def _draw(model: RNNLM, symbols: Array, length: int, batch: int, temperature, key: Array):
    """Symbols, nats and entropies, each (length, batch)."""

    def step(carried: tuple, key: Array) -> tuple:
        logits, state = carried
        log_p = jax.nn.log_softmax(logits)
        drawn = jax.random.categorical(key, logits / temperature)
        nats = -jnp.take_along_axis(log_p, drawn[:, None], axis=1)[:, 0]
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=1)
        logits, state = jax.vmap(model)(drawn[:, None], state)
        return (logits[:, 0], state), (drawn, nats, entropy)

    logits, state = model(symbols)
    every = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), (logits[-1], state))
    return jax.lax.scan(step, every, jax.random.split(key, length))[1]


def adapt(
    model: RNNLM, documents: Sequence[bytes], rate: float, chunk: int = 64, clip: float = 1.0
) -> tuple[np.ndarray, RNNLM]:
    """What `dynamic_log_probs` gives, and the models after the last chunk, stacked by document."""
    inputs, targets, mask = _side_by_side(documents, chunk)
    nats, adapted = _adapt(model, inputs, targets, mask, jnp.float32(rate), clip)
    return -np.asarray(nats, np.float64)[mask], adapted


@eqx.filter_jit
def _adapt(model: RNNLM, inputs: Array, targets: Array, mask: Array, rate: Array, clip: float):
    """Nats (documents, chunks, chunk), and the adapted models."""

    def loss(model: RNNLM, state: tuple, inputs: Array, targets: Array, mask: Array) -> tuple:
        nats, state = sequence_nats(model, inputs[None], targets[None], state)
        real = jnp.maximum(mask.sum(), 1).astype(nats.dtype)  # padding counts for nothing
        return jnp.sum(jnp.where(mask, nats[0], 0.0)) / real, (nats[0], state)

    def step(carried: tuple, now: tuple) -> tuple:
        model, state = carried
        grads, (nats, state) = eqx.filter_grad(loss, has_aux=True)(model, state, *now)
        scale = rate * jnp.minimum(1.0, clip / jnp.maximum(optax.tree.norm(grads), 1e-12))
        model = jax.tree.map(lambda p, g: p - scale * g, model, grads)
        return (model, state), nats

    def one(inputs: Array, targets: Array, mask: Array) -> tuple:
        start = (model, model.initial_state(1))
        (adapted, _), nats = jax.lax.scan(step, start, (inputs, targets, mask))
        return nats, adapted

    return jax.vmap(one)(jnp.asarray(inputs), jnp.asarray(targets), jnp.asarray(mask))


def dynamic_log_probs(
    model: RNNLM, documents: Sequence[bytes], rate: float, chunk: int = 64, clip: float = 1.0
) -> np.ndarray:
    """As `stream_log_probs`, with dynamic evaluation: predict a chunk, then learn from it, once.

    After each chunk one step of gradient descent, of `rate`, on the chunk's mean nats, the gradient's
    norm clipped. Every document begins with the model that was given. Graves 2013, section 3.
    """
    return adapt(model, documents, rate, chunk, clip)[0]
