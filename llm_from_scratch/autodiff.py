"""Reverse-mode differentiation on numbers, then on arrays, and a check of any JAX gradient by finite differences that names the wrong array, and mostly the entry.

Written from chapters/02_autodiff.py by `make export`: edit there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def graph_order(root: Any) -> list[Any]:
    """The nodes that `root` was made from, each once, after its own `parents`; `root` comes last.

    No recursion, so that a long chain of steps does not exhaust Python's stack.
    """
    order, done, stack = [], set(), [(root, False)]
    while stack:
        node, parents_are_in = stack.pop()
        if parents_are_in:
            order.append(node)
        elif id(node) not in done:
            done.add(id(node))
            stack.append((node, True))
            stack += [(parent, False) for parent in node.parents if id(parent) not in done]
    return order


class Arithmetic:
    """The operators that follow from `+`, `*` and `**`."""

    def __radd__(self, other):
        return self + other

    def __rmul__(self, other):
        return self * other

    def __neg__(self):
        return self * -1.0

    def __sub__(self, other):
        return self + (-other)

    def __rsub__(self, other):
        return other + (-self)

    def __truediv__(self, other):
        return self * other**-1.0

    def __rtruediv__(self, other):
        return other * self**-1.0


class Value(Arithmetic):
    """A number that remembers how it was made, so that `backward` can find the slope of every step.

    `data` is the number, `grad` the slope of the last `backward`, `parents` are what it was made from;
    `pull` turns the slope of this value into those of its parents; `op` names the step.
    """

    def __init__(self, data: Any, parents: tuple = (), pull: Callable = lambda g: (), op: str = ""):
        self.data, self.grad = data, 0.0
        self.parents, self.pull, self.op = parents, pull, op

    def lift(self, other: Any) -> "Value":
        """`other`, as a constant if it is a plain number."""
        return other if isinstance(other, Value) else type(self)(other)

    def make(self, data: Any, parents: tuple, pull: Callable, op: str) -> "Value":
        """The result of a step: a value of the same class."""
        return type(self)(data, parents, pull, op)

    def __add__(self, other):
        a, b = self, self.lift(other)
        return self.make(a.data + b.data, (a, b), lambda g: (g, g), "+")

    def __mul__(self, other):
        a, b = self, self.lift(other)
        return self.make(a.data * b.data, (a, b), lambda g: (g * b.data, g * a.data), "×")

    def __pow__(self, n: float):
        a = self
        return self.make(a.data**n, (a,), lambda g: (g * n * a.data ** (n - 1),), f"^{n:g}")

    def exp(self):
        y = np.exp(self.data)
        return self.make(y, (self,), lambda g: (g * y,), "exp")

    def log(self):
        return self.make(np.log(self.data), (self,), lambda g: (g / self.data,), "log")

    def tanh(self):
        y = np.tanh(self.data)
        return self.make(y, (self,), lambda g: (g * (1 - y * y),), "tanh")

    def receive(self, grad: Any) -> None:
        """Add a slope that one use of this value sends back."""
        self.grad = self.grad + grad

    def backward(self) -> None:
        """Set `grad` of everything that this value was made from to the slope of this value."""
        if np.size(self.data) != 1:
            raise ValueError(f"backward starts at one number, got {np.shape(self.data)}: sum first")
        order = graph_order(self)
        for node in order:
            node.grad = 0.0
        self.grad = 1.0
        for node in reversed(order):
            for parent, grad in zip(node.parents, node.pull(node.grad), strict=True):
                parent.receive(grad)


def unbroadcast(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The slope of an array of `shape` that was broadcast to the shape of `grad`: summed over the copies."""
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and grad.shape[i] != 1)
    return grad.sum(axis=stretched, keepdims=True)


class Tensor(Value):
    """A `Value` whose `data` is a NumPy array (float64); gradients have the shape of their array."""

    __array_ufunc__ = None  # so that `array * tensor` comes to us, and not to NumPy's loop

    def __init__(self, data: Any, parents: tuple = (), pull: Callable = lambda g: (), op: str = ""):
        super().__init__(np.asarray(data, np.float64), parents, pull, op)

    def receive(self, grad: np.ndarray) -> None:
        """Add a slope, summed over the axes along which this array was broadcast."""
        grad = np.broadcast_to(grad, np.broadcast_shapes(np.shape(grad), self.data.shape))
        self.grad = self.grad + unbroadcast(grad, self.data.shape)

    def __matmul__(self, other):
        a, b = self, self.lift(other)
        if a.data.ndim != 2 or b.data.ndim != 2:
            raise ValueError(f"@ is for two matrices, got {a.data.shape} and {b.data.shape}")
        return self.make(a.data @ b.data, (a, b), lambda g: (g @ b.data.T, a.data.T @ g), "@")

    @property
    def T(self):
        return self.make(self.data.T, (self,), lambda g: (g.T,), "T")

    def sum(self, axis: int | None = None):
        """The sum over one axis, which stays with length 1, or over all of them."""
        y = self.data.sum(axis=axis, keepdims=axis is not None)
        return self.make(y, (self,), lambda g: (np.broadcast_to(g, self.data.shape),), "sum")

    def __getitem__(self, index):
        def pull(g):
            grad = np.zeros_like(self.data)
            np.add.at(grad, index, g)  # an index that comes twice is added to twice
            return (grad,)

        return self.make(self.data[index], (self,), pull, "[ ]")


def _by_leaves(f: Callable, args: tuple) -> tuple[Callable, list, list[str], Callable]:
    """f as a function of the floating-point leaves of its arguments; those leaves, their names, and how to pick them."""
    flat, tree = jax.tree_util.tree_flatten_with_path(args)
    dtypes = [getattr(leaf, "dtype", type(leaf)) for _, leaf in flat]
    at = [i for i, kind in enumerate(dtypes) if jnp.issubdtype(kind, jnp.floating)]

    def of_leaves(*leaves):
        full = [leaf for _, leaf in flat]
        for i, leaf in zip(at, leaves, strict=True):
            full[i] = leaf
        return f(*tree.unflatten(full))

    def pick(like):
        return [tree.flatten_up_to(like)[i] for i in at]

    names = [jax.tree_util.keystr(flat[i][0]) for i in at]
    return of_leaves, [jnp.asarray(leaf) for leaf in pick(args)], names, pick


def _difference(f: Callable, leaves: list, i: int, direction: np.ndarray, step: float) -> float:
    """The central difference of f(*leaves) as leaf i moves along a direction."""
    ends = []
    for sign in (1, -1):
        moved = leaves[i] + jnp.asarray(sign * step * direction)
        ends.append(float(f(*leaves[:i], moved, *leaves[i + 1 :])))
    return (ends[0] - ends[1]) / (2 * step)


def _probes(
    grad: np.ndarray, entries: int, rng: np.random.Generator
) -> list[tuple[str, np.ndarray]]:
    """Directions to nudge a leaf in, by name: single entries, the steepest among them; last, random signs."""
    chosen = rng.choice(grad.size, min(entries, grad.size), replace=False)
    found = []
    for flat in dict.fromkeys([int(np.argmax(np.abs(grad))), *map(int, chosen)]):
        index = np.unravel_index(flat, grad.shape)
        direction = np.zeros(grad.shape)
        direction[index] = 1.0
        found.append((str([int(n) for n in index]) if index else "", direction))
    return [*found, (" along random signs", rng.choice([-1.0, 1.0], size=grad.shape))]


def check_gradients(
    f: Callable, *args: Any, grads: tuple | None = None, tolerance: float = 1e-3, entries: int = 16
) -> float:
    """Check the gradients of a scalar function by finite differences; returns the largest relative error.

    Every floating-point leaf of `args` (any pytrees) is nudged in `entries` entries and, all at once,
    by random signs; `f` must allow `jax.jit`. The differences are taken in float64, the gradients are
    those of `jax.grad` at the leaves' own dtype, or `grads`: one tree per argument, each of its form.
    Errors are relative to the largest slope of the leaf's nudged entries. At a kink (relu at 0) the two
    may differ; a cast to float32 inside f gives false alarms: cast to what x.dtype promotes to.

    Raises AssertionError that names the leaf, and the index if a nudged entry is wrong; ValueError if
    nothing is a float, or f gives something else in float64 (random numbers: draw them outside).
    """
    of_leaves, low, names, pick = _by_leaves(f, args)
    if not low:
        raise ValueError("no floating-point leaf to check in the arguments")
    value, slopes = jax.jit(jax.value_and_grad(of_leaves, argnums=range(len(low))))(*low)
    slopes = slopes if grads is None else pick(grads)
    rng, worst = np.random.default_rng(0), 0.0
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        high = [jnp.asarray(np.asarray(leaf, np.float64)) for leaf in low]
        exact = jax.jit(of_leaves)
        if not abs(float(exact(*high)) - float(value)) <= 1e-3 * max(1.0, abs(float(value))):
            raise ValueError(f"f is {float(value):.6g}, but {float(exact(*high)):.6g} in float64")
        for i, (name, slope) in enumerate(zip(names, slopes, strict=True)):
            slope = np.asarray(slope, np.float64)
            if slope.shape != (n := high[i].shape):
                raise AssertionError(f"the gradient of args{name} has shape {slope.shape}, not {n}")
            size = float(np.sqrt(np.mean(np.square(high[i])))) or 1.0
            pairs = [
                (where, float(np.sum(slope * d)), _difference(exact, high, i, d, 1e-4 * size))
                for where, d in _probes(slope, entries, rng)
            ]
            scale = max(max(abs(given), abs(nudged)) for _, given, nudged in pairs[:-1]) or 1.0
            for where, given, nudged in pairs:
                error = abs(given - nudged) / scale
                if not error <= tolerance:
                    raise AssertionError(
                        f"the gradient of args{name}{where} is {given:.6g}, by finite differences "
                        f"{nudged:.6g}: off by {error:.2g} of the leaf's largest"
                    )
                worst = max(worst, error)
    return worst
