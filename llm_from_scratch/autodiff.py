"""Reverse-mode differentiation in a hundred lines of NumPy, what JAX adds to it, and a check of any gradient against finite differences.

Written from chapters/02_autodiff.py by `make export`: edit there.
"""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float


def topological(output: Any) -> list:
    """Every node that `output` was computed from, itself last, each after its parents.

    A node has `parents`, pairs whose first element is a node. Iterative: long chains overflow no stack.
    """
    order, seen, stack = [], set(), [(output, False)]
    while stack:
        node, parents_done = stack.pop()
        if parents_done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((parent, False) for parent, *_ in node.parents)
    return order


def unbroadcast(grad: Float[np.ndarray, "..."], shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Sum a gradient over the axes along which an array of this shape was repeated to fit it."""
    extra = grad.ndim - len(shape)
    repeated = tuple(range(extra))
    repeated += tuple(
        extra + i for i, n in enumerate(shape) if n == 1 and grad.shape[extra + i] != 1
    )
    return grad.sum(axis=repeated).reshape(shape)


class Tensor:
    """An fp64 array that remembers how it was made, for reverse-mode differentiation in NumPy.

    `parents` holds pairs (Tensor, pull-back): the pull-back turns the gradient of the result into
    what it adds to the gradient of the parent. Numbers and arrays mix in as constants. `grad` has
    the shape of `data`, and is None before `backward`.
    """

    __array_ufunc__ = None  # array * Tensor asks the Tensor

    def __init__(self, data: Any, parents: tuple = ()):
        self.data, self.parents, self.grad = np.asarray(data, float), parents, None

    def __add__(self, other: Any) -> "Tensor":
        other = as_tensor(other)
        pulls = [lambda g, t=t: unbroadcast(g, t.data.shape) for t in (self, other)]
        return Tensor(self.data + other.data, ((self, pulls[0]), (other, pulls[1])))

    def __mul__(self, other: Any) -> "Tensor":
        other = as_tensor(other)
        left = (self, lambda g: unbroadcast(g * other.data, self.data.shape))
        right = (other, lambda g: unbroadcast(g * self.data, other.data.shape))
        return Tensor(self.data * other.data, (left, right))

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> "Tensor":
        return self * -1.0

    def __sub__(self, other: Any) -> "Tensor":
        return self + -as_tensor(other)

    def __rsub__(self, other: Any) -> "Tensor":
        return as_tensor(other) - self

    def __matmul__(self, other: Any) -> "Tensor":
        """Product of two matrices (N, I) and (I, O)."""
        other = as_tensor(other)
        left = (self, lambda g: g @ other.data.T)
        right = (other, lambda g: self.data.T @ g)
        return Tensor(self.data @ other.data, (left, right))

    def __getitem__(self, index: Any) -> "Tensor":
        """NumPy indexing; an entry that is taken twice gets both gradients."""

        def pull(g):
            grad = np.zeros_like(self.data)
            np.add.at(grad, index, g)
            return grad

        return Tensor(self.data[index], ((self, pull),))


def as_tensor(x: Any) -> Tensor:
    """x itself if it is a Tensor, else a constant."""
    return x if isinstance(x, Tensor) else Tensor(x)


def tanh(x: Tensor) -> Tensor:
    """Elementwise; d tanh = 1 − tanh²."""
    y = np.tanh(x.data)
    return Tensor(y, ((x, lambda g: g * (1 - y * y)),))


def exp(x: Tensor) -> Tensor:
    """Elementwise; its own derivative."""
    y = np.exp(x.data)
    return Tensor(y, ((x, lambda g: g * y),))


def log(x: Tensor) -> Tensor:
    """Elementwise natural logarithm; d log x = 1 / x."""
    return Tensor(np.log(x.data), ((x, lambda g: g / x.data),))


def total(x: Tensor, axis: int | None = None) -> Tensor:
    """Sum over one axis, or over all; the gradient is repeated along what was summed."""

    def pull(g):
        return np.broadcast_to(g if axis is None else np.expand_dims(g, axis), x.data.shape)

    return Tensor(x.data.sum(axis=axis), ((x, pull),))


def gradients(output: Tensor) -> None:
    """Set `grad` of every Tensor that a scalar was computed from. ValueError if it is no scalar."""
    if output.data.ndim:
        raise ValueError(f"a gradient is of a scalar, got shape {output.data.shape}: sum it first")
    order = topological(output)
    for node in order:
        node.grad = np.zeros_like(node.data)
    output.grad = np.ones_like(output.data)
    for node in reversed(order):
        for parent, pull in node.parents:
            parent.grad = parent.grad + pull(node.grad)


def is_float(x: Any) -> bool:
    """Whether x is a real floating-point array or number: what can be differentiated."""
    return eqx.is_inexact_array_like(x) and jnp.issubdtype(jnp.result_type(x), jnp.floating)


def differences(
    f: Callable, leaves: list, at: int, chosen: np.ndarray, step: float
) -> Iterator[float]:
    """Central differences of f(leaves) by the chosen entries of leaf number `at`."""
    flat, shape = leaves[at].ravel(), leaves[at].shape
    for i in chosen:
        ends = []
        for move in (step, -step):
            moved = flat.at[i].add(move).reshape(shape)
            ends.append(float(f([*leaves[:at], moved, *leaves[at + 1 :]])))
        yield (ends[0] - ends[1]) / (2 * step)


def check_gradients(
    f: Callable, *args: Any, step: float = 1e-5, tolerance: float = 1e-6, entries: int = 32
) -> float:
    """Compare jax.grad of a scalar function with central differences, in fp64; the largest error.

    All floats in args (arrays, pytrees, Equinox modules) are differentiated, everything else is
    constant. Of a leaf with more than `entries` entries a fixed random choice is checked. Errors are
    relative to the largest gradient of their leaf, or to what rounding can hide if that is larger.
    Raises AssertionError naming argument, leaf, index and both numbers; ValueError if f returns no
    scalar or there is nothing to differentiate. Where f has a kink, differences mean nothing.
    """
    with jax.enable_x64(True):
        moving, fixed = eqx.partition(args, is_float)
        paths, structure = jax.tree.flatten_with_path(moving)
        leaves = [jnp.asarray(leaf, jnp.float64) for _, leaf in paths]
        if not leaves:
            raise ValueError("there is no float in the arguments: nothing to differentiate")
        of_leaves = jax.jit(lambda new: f(*eqx.combine(structure.unflatten(new), fixed)))
        if shape := jax.eval_shape(of_leaves, leaves).shape:
            raise ValueError(f"a gradient is of a scalar, f returns shape {shape}")
        value, slopes = jax.value_and_grad(of_leaves)(leaves)
        hidden = 10 * np.finfo(float).eps * max(1.0, abs(float(value))) / step / tolerance
        random, largest = np.random.default_rng(0), 0.0
        for at, ((path, leaf), slope) in enumerate(zip(paths, slopes, strict=True)):
            chosen = random.permutation(slope.size)[:entries]
            numeric = np.array([*differences(of_leaves, leaves, at, chosen, step)])
            exact = np.asarray(slope).ravel()[chosen]
            scale = max(np.abs(slope).max(), np.abs(numeric).max(), hidden)
            error = np.nan_to_num(np.abs(exact - numeric) / scale, nan=np.inf)
            if (worst := error.max()) > tolerance:
                i = int(error.argmax())
                index = tuple(int(n) for n in np.unravel_index(chosen[i], np.shape(leaf)))
                where = f"argument {path[0].idx}{jax.tree_util.keystr(path[1:])}, index {index}"
                raise AssertionError(f"{where}: grad says {exact[i]:g}, differences {numeric[i]:g}")
            largest = max(largest, float(worst))
    return largest
