"""Byte n-gram language models by counting, add-k, interpolation and Kneser–Ney, with compressors as rivals: the baseline of the whole course.

Written from chapters/01_bigram.py by `make export`: edit there.
"""

import bz2
import gzip
import lzma
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Bits per byte: the summed negative log likelihood in nats over ln 2 and the number of bytes.

    `n_bytes` counts the UTF-8 bytes of the text, whatever tokens the model predicts.
    Raises ValueError unless `n_bytes` is positive.
    """
    if n_bytes <= 0:
        raise ValueError(f"n_bytes must be positive, got {n_bytes}")
    return float(nats) / math.log(2) / n_bytes


BYTES = 256  # what is predicted
START = 256  # what stands before a document: a context symbol that is never predicted
SYMBOLS = 257


def windows(documents: Iterable[bytes], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Every byte with the n − 1 symbols before it, as (contexts, targets), int64, one entry a byte.

    A context is a number in base 257, its newest symbol last; before a document stands START.
    Raises ValueError unless n is from 1 to 7: eight symbols overflow 64 bits.
    """
    if not 1 <= n <= 7:
        raise ValueError(f"n must be from 1 to 7 (a longer n-gram overflows 64 bits), got {n}")
    contexts, targets = [], []
    for document in documents:
        data = np.frombuffer(document, np.uint8).astype(np.int64)
        padded = np.concatenate([np.full(n - 1, START), data])
        code = np.zeros(len(data), np.int64)
        for i in range(n - 1):
            code = code * SYMBOLS + padded[i : i + len(data)]
        contexts.append(code)
        targets.append(data)
    empty = [np.zeros(0, np.int64)]
    return np.concatenate(contexts or empty), np.concatenate(targets or empty)


def _lookup(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The value of each query in a sorted table, 0 where it has none."""
    if len(keys) == 0:
        return np.zeros(len(queries))
    at = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[at] == queries, values[at], 0).astype(np.float64)


@dataclass(frozen=True)
class Table:
    """The different n-grams of one order and their counts, shape (grams,); their contexts, (contexts,)."""

    order: int
    grams: np.ndarray  # context · 256 + byte, sorted
    counts: np.ndarray
    contexts: np.ndarray  # sorted
    totals: np.ndarray  # sum of the counts after a context
    types: np.ndarray  # number of different bytes after a context

    def look(self, contexts: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, ...]:
        """Count of each (context, target), total and number of types of each context."""
        return (
            _lookup(self.grams, self.counts, contexts * BYTES + targets),
            _lookup(self.contexts, self.totals, contexts),
            _lookup(self.contexts, self.types, contexts),
        )


def _table(order: int, grams: np.ndarray, counts: np.ndarray) -> Table:
    """A table from sorted n-grams and their counts."""
    contexts, where, types = np.unique(grams // BYTES, return_inverse=True, return_counts=True)
    return Table(order, grams, counts, contexts, np.bincount(where, counts, len(contexts)), types)


def _shorter(table: Table) -> np.ndarray:
    """The n-grams of a table without their oldest symbol, the leading digit of the number."""
    return table.grams % (SYMBOLS ** (table.order - 2) * BYTES)


def count_tables(documents: Iterable[bytes], n: int) -> list[Table]:
    """The tables of the orders 1 to n: one sort of the longest n-grams, the others by summing."""
    contexts, targets = windows(documents, n)
    grams, counts = np.unique(contexts * BYTES + targets, return_counts=True)
    tables = [_table(n, grams, counts.astype(np.float64))]
    while tables[-1].order > 1:
        above = tables[-1]
        grams, where = np.unique(_shorter(above), return_inverse=True)
        tables.append(_table(above.order - 1, grams, np.bincount(where, above.counts)))
    return tables[::-1]


def add_k(count: np.ndarray, total: np.ndarray, k: float) -> np.ndarray:
    """(count + k) / (total + 256 k); uniform where that is 0/0, which is k = 0 in an unseen context."""
    denominator = total + BYTES * k
    return np.where(denominator > 0, (count + k) / np.maximum(denominator, 1e-300), 1 / BYTES)


def learn_bigram(counts: np.ndarray, steps: int = 5000, rate: float = 3.0) -> np.ndarray:
    """Next-byte probabilities of a matrix of logits trained by gradient descent; counts (257, 256).

    The loss is the sum over rows of the cross entropy to the row's relative frequencies. Rows
    without counts stay uniform. The curvature of a row is at most 1/2, so `rate` must be below 4.
    """
    target = jnp.asarray(counts / np.maximum(counts.sum(1, keepdims=True), 1), jnp.float32)

    def row_losses(W):
        return -jnp.sum(target * jax.nn.log_softmax(W))

    def step(_, W):
        return W - rate * jax.grad(row_losses)(W)

    W = jax.lax.fori_loop(0, steps, step, jnp.zeros(target.shape))
    return np.asarray(jax.nn.softmax(W), np.float64)


def interpolate(count, total, weight: float, lower: np.ndarray) -> np.ndarray:
    """weight · count / total + (1 − weight) · lower, or `lower` where the context is unseen.

    Arrays of one shape; `weight` is a number or such an array.
    """
    mixed = weight * count / np.maximum(total, 1) + (1 - weight) * lower
    return np.where(total > 0, mixed, lower)


def _tune_weight(count, total, lower, rounds: int = 30) -> float:
    """The weight that makes the held-out bytes most probable, by expectation–maximisation.

    Below 1, so that no byte becomes impossible; 1/2 where no context was seen.
    """
    seen = total > 0
    if not seen.any():
        return 0.5
    ratio, below, weight = count[seen] / total[seen], lower[seen], 0.5
    for _ in range(rounds):
        mine = weight * ratio
        weight = float(np.mean(mine / (mine + (1 - weight) * below)))
    return min(weight, 1 - 1 / (int(seen.sum()) + 2))


def tune(n: int, method: str, tables: list[Table], held_out: Sequence[bytes]) -> list[float]:
    """The parameters of order n that fit `held_out` best, given the `count_tables` of other documents.

    add-k: the best k of a logarithmic grid. Interpolation: one weight per order, lowest order first.
    Raises ValueError for another method: Kneser–Ney estimates its discounts in `NGram.fit`.
    """
    if method not in ("add-k", "interpolation"):
        raise ValueError(f"tune knows add-k and interpolation, not {method!r}")
    contexts, targets = windows(held_out, n)
    if method == "add-k":
        count, total, _ = tables[n - 1].look(contexts, targets)
        grid = 10.0 ** np.arange(-4, 1.01, 0.25)
        return [float(min(grid, key=lambda k: -np.log(add_k(count, total, k)).sum()))]
    p, weights = np.full(len(targets), 1 / BYTES), []
    for table in tables[:n]:
        count, total, _ = table.look(contexts % SYMBOLS ** (table.order - 1), targets)
        weights.append(_tune_weight(count, total, p))
        p = interpolate(count, total, weights[-1], p)
    return weights


def kneser_ney(count, total, types, discount: float, lower: np.ndarray) -> np.ndarray:
    """max(count − d, 0) / total + d · types / total · lower, or `lower` where the context is unseen.

    Arrays of one shape. `types` is the number of different bytes seen after the context: what the
    discounts took away is handed on, so the sum over the bytes stays 1.
    """
    kept = np.maximum(count - discount, 0) / np.maximum(total, 1)
    handed_on = discount * types / np.maximum(total, 1)
    return np.where(total > 0, kept + handed_on * lower, lower)


def continuation_tables(tables: list[Table]) -> list[Table]:
    """The tables of Kneser–Ney: below the highest order, an n-gram counts its different left neighbours."""
    lower = []
    for above in tables[1:]:
        grams, neighbours = np.unique(_shorter(above), return_counts=True)
        lower.append(_table(above.order - 1, grams, neighbours.astype(np.float64)))
    return [*lower, tables[-1]]


def discount_of(table: Table) -> float:
    """Ney's estimate of the discount, n1 / (n1 + 2 n2), from the n-grams counted once and twice."""
    once, twice = np.sum(table.counts == 1), np.sum(table.counts == 2)
    return float(once / (once + 2 * twice)) if once else 0.5


def smoothed(
    tables: list[Table],
    method: str,
    parameters: Sequence[float],
    contexts: np.ndarray,
    targets: np.ndarray,
) -> np.ndarray:
    """The probability of each target after its context, shape (targets,).

    `tables`, of the orders 1 to n: `count_tables`, for Kneser–Ney `continuation_tables` of them.
    `parameters`: [k] for add-k, n weights for interpolation, n discounts for Kneser–Ney.
    """
    if not tables:
        raise ValueError("nothing has been counted yet: call fit first")
    if method == "add-k":
        count, total, _ = tables[-1].look(contexts, targets)
        return add_k(count, total, parameters[0])
    p = np.full(len(targets), 1 / BYTES)
    for table, parameter in zip(tables, parameters, strict=True):
        shorter = contexts % SYMBOLS ** (table.order - 1)
        count, total, types = table.look(shorter, targets)
        if method == "interpolation":
            p = interpolate(count, total, parameter, p)
        else:
            p = kneser_ney(count, total, types, parameter, p)
    return p


def _check_model(n: int, method: str, parameters: Sequence[float] | None) -> None:
    """Raise ValueError for an impossible order, method or parameter."""
    if not 1 <= n <= 6:
        raise ValueError(f"n must be from 1 to 6, got {n}")
    if method not in NGram.METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(NGram.METHODS)}")
    if parameters is not None:
        wanted, top = (1, math.inf) if method == "add-k" else (n, 1)
        if len(parameters) != wanted or not all(
            0 <= x <= top and math.isfinite(x) for x in parameters
        ):
            raise ValueError(
                f"{method} of order {n} needs {wanted} numbers from 0 to {top}, got {list(parameters)}"
            )


def _up_to(tables: list[Table], n: int) -> list[Table]:
    """The tables of the orders 1 to n. Raises ValueError if there are fewer."""
    if len(tables) < n:
        raise ValueError(f"order {n} needs tables 1 to {n}, got {len(tables)} tables")
    return tables[:n]


class NGram:
    """A byte n-gram model of order 1 to 6, smoothed by "add-k", "interpolation" or "kneser-ney".

    `parameters`: [k] for add-k (default 1), n weights for interpolation (see `tune`), n discounts for
    Kneser–Ney (default: estimated by `fit`). Kneser–Ney is the interpolated one with one discount per
    order. The context is reset at each document. Raises ValueError for what is impossible.
    """

    METHODS = ("add-k", "interpolation", "kneser-ney")

    def __init__(self, n: int, method: str = "kneser-ney", parameters=None):
        _check_model(n, method, parameters)
        self.n, self.method, self.tables = n, method, []
        self.parameters = [1.0] if parameters is None and method == "add-k" else parameters
        self._estimate = self.parameters is None  # the discounts, at every fit

    def fit(self, documents: Iterable[bytes], tables: list[Table] | None = None) -> "NGram":
        """Count the documents, or take `tables` (`count_tables` of order ≥ n) in their place."""
        if self.method == "interpolation" and self.parameters is None:
            raise ValueError("interpolation needs weights: parameters=tune(...)")
        counted = count_tables(documents, self.n) if tables is None else _up_to(tables, self.n)
        self.tables = continuation_tables(counted) if self.method == "kneser-ney" else counted
        if self._estimate:
            self.parameters = [discount_of(table) for table in self.tables]
        return self

    def log_prob(self, documents: Iterable[bytes]) -> np.ndarray:
        """Natural log of the probability of every byte of the documents, in order; −inf for zero."""
        p = smoothed(self.tables, self.method, self.parameters, *windows(documents, self.n))
        with np.errstate(divide="ignore"):
            return np.log(p)

    def probabilities(self, context: bytes = b"") -> np.ndarray:
        """The distribution of the next byte, shape (256,), after a document that begins `context`."""
        code = windows([context + b"\0"], self.n)[0][-1:]
        contexts, targets = np.repeat(code, BYTES), np.arange(BYTES)
        return smoothed(self.tables, self.method, self.parameters, contexts, targets)


def sample(model: NGram, rng: np.random.Generator, length: int, prompt: bytes = b"") -> bytes:
    """`prompt` and `length` more bytes, each drawn from the model's distribution."""
    text = bytearray(prompt)
    for _ in range(length):
        p = model.probabilities(bytes(text[-model.n :]) if len(text) >= model.n else bytes(text))
        text.append(rng.choice(BYTES, p=p / p.sum()))
    return bytes(text)


def model_bits(model: NGram, documents: Sequence[bytes]) -> float:
    """The bits per byte of the documents under a model."""
    return bits_per_byte(-model.log_prob(documents).sum(), sum(map(len, documents)))


COMPRESSORS = {
    "gzip": lambda data: gzip.compress(data, 9, mtime=0),
    "bzip2": lambda data: bz2.compress(data, 9),
    "xz": lambda data: lzma.compress(data, preset=6),
}


def compressed_bits(name: str, data: bytes, prime: bytes = b"") -> float:
    """Bits per byte of `data` under a compressor: cold, or after it has seen `prime`.

    Primed is size(compress(prime + data)) − size(compress(prime)). Raises KeyError for an unknown name,
    ValueError for empty data.
    """
    if not data:
        raise ValueError("data must not be empty")
    compress = COMPRESSORS[name]
    with ThreadPoolExecutor(2) as pool:  # the compressors release Python's lock
        after, before = pool.map(lambda text: len(compress(text)), (prime + data, prime))
    return 8 * (after - (before if prime else 0)) / len(data)
