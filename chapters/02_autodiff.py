# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,jupyter,-all
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 · Automatic differentiation
#
# > Reverse-mode differentiation on numbers, then on arrays, and a check of any JAX gradient by finite differences that names the wrong array, and mostly the entry.
#
# *Reading time 45 min · runs in about 20 s · difficulty ●●○ · needs 01*

# %%
#| export
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# %%
import functools
import math
import os
import subprocess
import sys
import time

import matplotlib.pyplot as plt

from llm_from_scratch import ledger

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
LINE = b"To be, or not to be: that is the question:"
KEYS = dict(
    zip(
        ("mlp", "draw", "check", "many", "big"), jax.random.split(jax.random.key(0), 5), strict=True
    )
)

# %% [markdown]
# ## A slope for every number
#
# Chapter 01 moved a matrix of logits downhill with `jax.grad`, and did not say how `grad` works. This chapter opens the box.
#
# The honest beginner's way to a slope is to nudge: move one number by $\epsilon$ each way and see how the loss moves,
#
# $$ \frac{\partial L}{\partial x} \approx \frac{L(x + \epsilon) - L(x - \epsilon)}{2\epsilon}. $$
#
# It has two faults. It is slow: chapter 01's matrix has 65,792 entries, so one step downhill costs 131,584 passes over the text. And it is inexact. A large $\epsilon$ sees the curve, not the slope (an error of order $\epsilon^2$);
# a small one subtracts two nearly equal numbers (an error of order $u/\epsilon$, with $u$ the rounding unit: $10^{-16}$ in double precision, $6\cdot 10^{-8}$ in single).
#
# **Predict:** which $\epsilon$ is best in each precision, and how good is it? Ours: the errors balance at $\epsilon \approx u^{1/3}$, so about $10^{-5}$ and $10^{-2.5}$, and leave $u^{2/3}$: eleven correct digits in double precision, five in single.


# %%
def quotient_error(dtype: type, exponents: np.ndarray) -> np.ndarray:
    """The error of the central difference of sin at 1, with eps = 10 ** exponent; the worst of 20 points near 1."""
    worst = []
    for exponent in exponents:
        x = np.linspace(1, 1.1, 20).astype(dtype)
        up, down = x + dtype(10**exponent), x - dtype(10**exponent)
        slope = (np.sin(up) - np.sin(down)).astype(np.float64) / (up - down).astype(np.float64)
        worst.append(np.abs(slope - np.cos(x.astype(np.float64))).max())
    return np.array(worst)


ranges = {"float64": np.arange(-12, 0.1, 0.5), "float32": np.arange(-6, 0.1, 0.5)}
errors = {name: quotient_error(getattr(np, name), exponents) for name, exponents in ranges.items()}
fig, ax = plt.subplots(figsize=(6, 3))
for name, exponents in ranges.items():
    ax.loglog(10.0**exponents, errors[name], "o-", markersize=3, label=name)
ax.set(xlabel="nudge ε", ylabel="largest error of the slope")
ax.legend()
plt.show()
for name, low, high in (("float64", -6.1, -3.9), ("float32", -3.1, -1.4)):
    best = ranges[name][np.argmin(errors[name])]
    digits = -math.log10(errors[name].min())
    print(f"{name}: best nudge between 1e{low:.0f} and 1e{high:.0f}: {low < best < high};", end=" ")
    print(f"correct digits: about {digits:.0f}")
    assert low < best < high

# %% [markdown]
# A V in each precision: the right arm is the curve, the left arm is rounding. Single precision, in which all our models compute, never gets past some five digits. Remember this picture when a gradient check fails: first ask whether the *check* is that good.
#
# So nudging is too slow to train with. It is good enough to *check* with, and we shall keep it for that.
#
# ## The graph of one neuron
#
# A program that computes a number is a chain of small steps, and each step's slope is known from school. Take one neuron that reads two bytes of our line, scaled to $x = \text{byte}/128$, and should say $1$ if a blank follows:
#
# $$ y = \tanh(w_1 x_1 + w_2 x_2 + b), \qquad L = (y - 1)^2. $$
#
# Write $\bar v$ for $\partial L/\partial v$. Start at the end, where $\bar L = 1$, and walk back. At each step multiply by the local slope; where a value was used more than once, *add* what comes back from each use. That is the chain rule, and it is all of it:
#
# | step | what goes back |
# |---|---|
# | $c = a + b$ | $\bar a \mathrel{+}= \bar c$, $\;\bar b \mathrel{+}= \bar c$ |
# | $c = a\,b$ | $\bar a \mathrel{+}= \bar c\, b$, $\;\bar b \mathrel{+}= \bar c\, a$ |
# | $c = a^n$ | $\bar a \mathrel{+}= \bar c\, n a^{n-1}$ |
# | $c = \tanh a$ | $\bar a \mathrel{+}= \bar c\,(1 - c^2)$ |
# | $c = e^a$, $\;c = \ln a$ | $\bar a \mathrel{+}= \bar c\, c$, $\;\bar a \mathrel{+}= \bar c / a$ |
#
# One walk gives the slopes of *all* inputs. That is the reason why training a billion weights is possible at all.
#
# ## The engine
#
# A `Value` is a number that remembers its parents and how to send a slope back to them, a function that we call `pull`. One thing needs care: a node may send back only when *all* that comes to it has arrived. So we need an order in which every node stands after its parents, and walk it from the end.


# %%
#| export workbook
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


# %% [markdown]
# Only a few operations need a rule of their own. The rest is grammar: a difference is a sum with a product by $-1$, a quotient is a product with a power.


# %%
#| export
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


# %% [markdown]
# And here is the engine. Each rule of the table is one line.


# %%
#| export workbook
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


# %% [markdown]
# Some sixty lines. Try it on the neuron, with the bytes `T` and `o` of our line. **Predict** the sign of $\bar w_1$: the output must rise, and $x_1$ is positive. So $\bar w_1$ is negative: downhill means a larger weight.

# %%
leaves = {"w₁": 0.5, "x₁": LINE[0] / 128, "w₂": -0.8, "x₂": LINE[1] / 128, "b": 0.1}
nodes = {name: Value(number) for name, number in leaves.items()}
w1, x1, w2, x2, b = nodes.values()
y = (w1 * x1 + w2 * x2 + b).tanh()
L = (y - 1.0) ** 2
L.backward()
print(f"y = {y.data:.3f}, L = {L.data:.3f}")
print("slopes:", ", ".join(f"{name} {node.grad:.3f}" for name, node in nodes.items()))

# %% [markdown]
# The picture of the same walk. We draw what the engine stored, nothing else: a box for each value. A computed value stands in the column of its longest path from an input, an input just before its first use.


# %%
def draw(root: Value, names: dict[Value, str]) -> None:
    """The graph below `root`: black the values, computed left to right; red the slopes, right to left."""
    depth, place = {}, {}
    for node in graph_order(root):
        depth[node] = 1 + max((depth[parent] for parent in node.parents), default=-1)
        if node.parents:
            height = np.mean([place[parent][1] for parent in node.parents])
        else:
            height = float(sum(1 for other in place if not other.parents))
        place[node] = (depth[node], height)
    for node in place:  # an input stands just before its first use
        uses = [depth[other] for other in place if node in other.parents]
        if not node.parents and uses:
            place[node] = (min(uses) - 1, place[node][1])
    _, ax = plt.subplots(figsize=(10, 5.5))
    box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": "C0"}
    centred = {"ha": "center", "textcoords": "offset points", "fontsize": 9, "zorder": 3}
    arrow = {"arrowstyle": "->", "color": "0.5", "shrinkA": 20, "shrinkB": 22}
    for node, (x, y) in place.items():
        for parent in node.parents:
            ax.annotate("", (x, y), place[parent], arrowprops=arrow)
        ax.text(x, y, "        \n\n", ha="center", va="center", fontsize=9, bbox=box)
        title = names.get(node) or node.op or "const"
        ax.annotate(f"{title}\n{node.data:.2f}", (x, y), (0, -5), **centred)
        ax.annotate(f"{node.grad:.2f}", (x, y), (0, -16), color="C3", **centred)
    across, up = zip(*place.values(), strict=True)
    ax.set(xlim=(-0.5, max(across) + 0.5), ylim=(min(up) - 0.6, max(up) + 0.6))
    ax.set(yticks=[], xlabel="steps from the inputs")
    ax.spines["left"].set_visible(False)
    plt.show()


draw(L, {node: name for name, node in nodes.items()} | {L: "L"})
print(f"{len(graph_order(L))} nodes; slope at the output {L.grad:.2f}, at the sum {b.grad:.2f}")

# %% [markdown]
# Black is the value, red is $\partial L/\partial\,$value. Follow the red numbers from right to left. A sum copies the slope to both sides. A product sends each side the slope times the *other* side. The tanh shrinks it by $1 - y^2$: that factor, repeated over many layers, is the vanishing gradient of chapter 04.
#
# **The check.** Nudge each input, in double precision, and compare.


# %%
def neuron_loss(w1, x1, w2, x2, b):
    return ((w1 * x1 + w2 * x2 + b).tanh() - 1.0) ** 2


numbers, eps = list(leaves.values()), 1e-5
for i, (name, node) in enumerate(nodes.items()):
    ends = []
    for sign in (1, -1):
        moved = [n + sign * eps * (i == j) for j, n in enumerate(numbers)]
        ends.append(neuron_loss(*map(Value, moved)).data)
    assert abs((ends[0] - ends[1]) / (2 * eps) - node.grad) < 1e-8, name
twice = Value(3.0)
(twice * twice).backward()
print("five slopes agree with nudging to 1e-8; the slope of x·x at 3 is", twice.grad)

# %% [markdown]
# ## From numbers to arrays
#
# A `Value` per number is clear and slow: a matrix product of two 100 × 100 matrices would be two million Python objects. So let `data` be a whole array. What has to change? Less than one expects. The rules for `*`, `exp`, `tanh` and so on already hold entry by entry. Three things are new:
#
# 1. **Broadcasting.** When a row of shape $(F)$ is added to a matrix $(B, F)$, each entry of the row is used $B$ times. So what comes back must be *summed* over $B$. The rule of thumb: the gradient of an array has the array's shape.
# 2. **Matrix products.** For $C = AB$: $\;\bar A = \bar C B^\top$ and $\bar B = A^\top \bar C$. For $C_{ij} = \sum_k A_{ik} B_{kj}$, so $A_{ik}$ reaches every $C_{ij}$ of its row with the factor $B_{kj}$: $\bar A_{ik} = \sum_j \bar C_{ij} B_{kj}$. The shapes help to remember it.
# 3. **Sums, transposes and indexing** move numbers about. Their reverses move slopes back: a sum copies its slope to every entry, and an index *adds* into the entries that it took.


# %%
#| export workbook
def unbroadcast(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The slope of an array of `shape` that was broadcast to the shape of `grad`: summed over the copies."""
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and grad.shape[i] != 1)
    return grad.sum(axis=stretched, keepdims=True)


# %%
#| export workbook
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


# %% [markdown]
# A tiny run that you can do in your head: a row added to two rows, then a row picked twice.

# %%
row = Tensor([1.0, 2.0, 3.0])
(row + Tensor(np.zeros((2, 3)))).sum().backward()
print("a row that was broadcast over 2 rows:", row.grad)
table = Tensor(np.zeros((3, 2)))
table[np.array([0, 2, 2])].sum().backward()
print("rows 0, 2, 2 of a table of three:    ", table.grad[:, 0])
assert row.grad.tolist() == [2, 2, 2] and table.grad[:, 0].tolist() == [1, 0, 2]

# %% [markdown]
# Now something that learns. The line has 41 pairs of neighbouring bytes, over 16 distinct ones. Our network gives each byte a vector (a row of $E$), bends it twice, each time *adding* the result to the vector, and reads logits off with the same $E$: a Transformer without attention, in three lines.
#
# $$ h_0 = E_{\text{byte}}, \qquad h_{i+1} = h_i + \tanh(h_i W_i), \qquad z = h_2 E^\top, \qquad L = -\frac1N\sum \ln \mathrm{softmax}(z)_{\text{next}}. $$
#
# Chapter 01 tells us where it must end if it can represent every table: at the entropy of the counts, which no model of pairs can pass.

# %%
symbols, ids = np.unique(np.frombuffer(LINE, np.uint8), return_inverse=True)
now, following = ids[:-1], ids[1:]
counts = np.zeros((len(symbols), len(symbols)))
np.add.at(counts, (now, following), 1)
rows_p = counts / np.maximum(counts.sum(1, keepdims=True), 1)
floor = -np.sum(counts * np.log(np.where(rows_p > 0, rows_p, 1))) / counts.sum()
print(f"{len(now)} pairs of {len(symbols)} symbols; no table of pairs gets below {floor:.3f} nats")


def start(seed: int, width: int = 16) -> dict[str, np.ndarray]:
    """The arrays before training; the same for our engine and for JAX."""
    rng = np.random.default_rng(seed)
    shapes = {"E": (len(symbols), width), "W0": (width, width), "W1": (width, width)}
    return {name: rng.normal(size=shape) / width**0.5 for name, shape in shapes.items()}


def network(p: dict, tanh: Callable):
    """The logits of the next byte, with Tensors or with JAX arrays."""
    h = p["E"][now]
    for name in ("W0", "W1"):
        h = h + tanh(h @ p[name])
    return h @ p["E"].T


def engine_loss(p: dict[str, Value]) -> Value:
    z = network(p, lambda a: a.tanh())
    normaliser = z.exp().sum(1).log()  # safe while the logits are small
    return (normaliser.sum() - z[np.arange(len(now)), following].sum()) / float(len(now))


# %% [markdown]
# Three hundred steps of gradient descent with our own engine.


# %%
def train(tensor: type[Value], seed: int, steps: int = 300, rate: float = 0.3) -> list[float]:
    """The losses of gradient descent with an engine."""
    arrays, losses = start(seed), []
    for _ in range(steps):
        p = {name: tensor(array) for name, array in arrays.items()}
        loss = engine_loss(p)
        loss.backward()
        losses.append(float(loss.data))
        arrays = {name: array - rate * p[name].grad for name, array in arrays.items()}
    return losses


losses = train(Tensor, seed=0)
print(f"before {losses[0]:.1f}, after {losses[-1]:.1f} nats; the floor is {floor:.1f}")
assert floor < losses[-1] < floor + 0.3

# %% [markdown]
# ## The same in JAX, and a check worth keeping
#
# In JAX nothing is recorded by objects. You write a *function* of arrays, and `jax.grad` makes a new function out of it, which returns the slopes. The arguments may be any nest of tuples, lists and dictionaries, a *pytree*; the gradient has the same form. In double precision the two must agree to the last few digits.


# %%
def jax_loss(p: dict[str, jax.Array]) -> jax.Array:
    z = network(p, jnp.tanh)
    return jnp.mean(jax.nn.logsumexp(z, axis=1) - z[np.arange(len(now)), following])


tensors = {name: Tensor(array) for name, array in start(0).items()}
engine_loss(tensors).backward()
with jax.enable_x64(True):
    by_jax = jax.grad(jax_loss)(jax.tree.map(jnp.asarray, start(0)))
for name, tensor in tensors.items():
    error = np.abs(tensor.grad - np.asarray(by_jax[name])).max()
    print(f"{name}: {tensor.grad.shape}, equal to jax.grad within 1e-12: {error < 1e-12}")
    assert error < 1e-12

# %% [markdown]
# Two implementations that agree can share a mistake in the mathematics. Nudging can't: it knows only the forward pass. So we write the check once, for any JAX function of any pytree, and later chapters and your own code may use it. What must it do?
#
# - **Nudge in double precision**, even when the model is in single. You saw the V: with $u = 6\cdot10^{-8}$ the check is worth five digits at best, and three when the loss is a sum over a text. The gradient under test keeps its own precision.
# - **Look everywhere.** A large array has too many entries to nudge each. For each leaf take some entries, that of the largest slope among them, and one random choice of *signs*: it moves all entries at once, so a single wrong entry shows in full (two can cancel).
# - **Name the place.** "Not close" is no help in a model of 300 arrays.


# %%
#| export
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


# %% [markdown]
# That makes any function of trees a function of plain arrays, each with a name. Next, what to nudge, and by how much the function moves.


# %%
#| export
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


# %%
#| export public
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


# %% [markdown]
# Three uses: JAX's gradient in single precision; our engine's gradient, handed in; and a rule that is wrong on purpose. `jax.custom_vjp` lets you replace a function's backward rule; this one forgets the 2 in $2x$.


# %%
@jax.custom_vjp
def square(x):
    return x * x


square.defvjp(lambda x: (x * x, x), lambda x, g: (x * g,))
small = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), start(0))
print("jax.grad in float32, error below 1e-5:", check_gradients(jax_loss, small) < 1e-5)
ours = {name: tensor.grad for name, tensor in tensors.items()}
print(
    "our engine, error below 1e-5:         ", check_gradients(jax_loss, small, grads=(ours,)) < 1e-5
)
try:
    check_gradients(
        lambda p: jnp.sum(p["a"] * square(p["b"])), {"a": jnp.ones(3), "b": jnp.ones(3)}
    )
    raise RuntimeError("the wrong rule passed")
except AssertionError as error:
    print("AssertionError:", error)

# %% [markdown]
# JAX has such a check itself: `jax.test_util.check_grads`. It compares along one random direction over all arguments together, in the arguments' own precision, also for forward mode and higher derivatives, which ours does not do. **Predict:** does it catch the wrong square, and does its message say where?

# %%
from jax.test_util import check_grads

both = (jnp.ones(3), jnp.ones(3))
check_grads(lambda a, b: jnp.sum(a * b * b), both, order=1, modes=["rev"])
try:
    check_grads(lambda a, b: jnp.sum(a * square(b)), both, order=1, modes=["rev"])
    raise RuntimeError("the wrong rule passed")
except AssertionError as error:
    print("caught:", " ".join(str(error).split())[:60])


def summed(x):  # a right gradient, of a loss that is a large number
    return 1e5 + jnp.sum(x * x)


try:
    check_grads(summed, (jnp.ones(3),), order=1, modes=["rev"])
    raise RuntimeError("no false alarm")
except AssertionError:
    print("a right gradient of a large loss: check_grads raises a false alarm;", end=" ")
print("ours passes it:", check_gradients(summed, jnp.ones(3)) < 1e-5)

# %% [markdown]
# It catches the wrong square, and can't say where. And in single precision it rejects a *right* gradient when the loss is large, as a sum over a text is: near $10^5$, neighbouring numbers are 0.008 apart, more than the nudge moves the loss. In double precision JAX's check would pass it too; ours goes there by itself.
# What ours can't see: a mistake far smaller than the largest slope of the same leaf. No check by nudging sees everything.
#
# ## Forwards or backwards
#
# There is a second order in which to apply the chain rule. *Forward mode* carries along, with each value, its slope in one input direction: `jax.jvp(f, (x,), (direction,))` gives $J\,d$. *Reverse mode*, `jax.vjp`, gives $g^\top J$. For $f: \mathbb R^n \to \mathbb R^m$ the whole Jacobian takes $n$ forward passes or $m$ backward ones. A loss has $m = 1$.

# %%
x, W = jnp.array([0.5, -0.3, 0.2]), jnp.arange(6.0).reshape(2, 3) / 5
layer = functools.partial(jnp.matmul, W)


def f(x):
    return jnp.tanh(layer(x))


columns = [jax.jvp(f, (x,), (direction,))[1] for direction in jnp.eye(3)]
value, pullback = jax.vjp(f, x)
rows = [pullback(g)[0] for g in jnp.eye(2)]
print("3 forward passes give columns of shape", columns[0].shape)
print("2 backward passes give rows of shape  ", rows[0].shape)
assert jnp.allclose(jnp.stack(columns, 1), jnp.stack(rows)) and value.shape == (2,)
assert jnp.allclose(jax.jacfwd(f)(x), jnp.stack(rows), atol=1e-6)

# %% [markdown]
# What does the gradient cost, compared with the loss alone? **Predict** for a network of four layers, counting matrix products only. Ours: for each product forwards, $\bar A = \bar C B^\top$ and $\bar B = A^\top\bar C$ are two products backwards. That makes three times the forward cost, less one product: nobody asks for the slope of the data. We need no stopwatch: JAX shows the program as a *jaxpr*, and we count.


# %%
def mlp(weights, x):
    for W in weights:
        x = jnp.tanh(x @ W)
    return jnp.sum(x)


def count(f: Callable, *args: Any, name: str = "") -> int:
    """How many steps of a kind, or of any, the jaxpr of f(*args) has."""
    steps = jax.make_jaxpr(f)(*args).eqns
    return sum(name in step.primitive.name for step in steps)


weights = list(jax.random.normal(KEYS["mlp"], (4, 8, 8)) / 8**0.5)
data = jnp.ones((5, 8))
forward = count(mlp, weights, data, name="dot_general")
backward = count(jax.grad(mlp), weights, data, name="dot_general")
print(f"matrix products: {forward} for the loss, {backward} with all gradients")
print("tanh computed anew backwards:", count(jax.grad(mlp), weights, data, name="tanh") > 4)
assert (forward, backward) == (4, 3 * 4 - 1)
note = f"{forward} for the loss alone"
ledger.result("gradient of a four-layer network", backward, "matrix products", note)

# %% [markdown]
# Three passes for the price of all slopes, whether there are 256 weights or 405 billion. (Hence the rule of chapter 13: six operations per weight and token, two forwards and four backwards.) The price is memory: every `tanh` output is kept until the way back. `jax.checkpoint` trades it for time; exercise 3.
#
# ## What tracing sees
#
# How does JAX get at the steps? It calls your function with *tracers*: stand-ins that write down what is done to them. Under plain `grad` a tracer still carries its number, as our `Value` does, and Python's `if` works. Under `jit` and `make_jaxpr` it knows only shape and dtype. Here is one neuron, and its gradient.


# %%
def neuron(w, b, x):
    return jnp.tanh(w @ x + b)


w, b, x = jnp.array([0.5, -0.8]), jnp.float32(0.1), jnp.array([0.66, 0.87])
print(jax.make_jaxpr(neuron)(w, b, x).pretty_print(use_color=False))
print("the gradient:", end=" ")
print([step.primitive.name for step in jax.make_jaxpr(jax.grad(neuron))(w, b, x).eqns])

# %% [markdown]
# Read it as our graph: three steps forwards; then $1 - y^2$, written as $(1 - y) + y(1 - y)$, and a product with $x$. There is no recorder left, only a program. Because it is a program, it can be compiled. `jax.jit` hands it to XLA, whose result (*HLO*, high-level operations) follows. It is the real thing, and it changes with the version and the processor, so this cell is not compared.

# %% tags=["nbval-ignore-output"]
hlo = jax.jit(jax.grad(neuron)).lower(w, b, x).compile().as_text()
print("\n".join(line.split(", metadata")[0] for line in hlo[hlo.index("\n\n%") :].splitlines()))

# %% [markdown]
# What to see: the last block, `ENTRY`, is the program. It calls few *fusions*; each is one loop in machine code that does several of our steps while a number is in a register. The stable part of it:

# %%
entry = hlo[hlo.index("ENTRY") :]
steps = count(jax.grad(neuron), w, b, x)
print(f"steps in the jaxpr: {steps}; fewer operations in the entry:", end=" ")
operations = [s for s in entry.splitlines() if " = " in s and " parameter(" not in s]
print(len(operations) < steps)
assert len(operations) < steps

# %% [markdown]
# ## What JAX adds
#
# All of it is of one kind: a function goes in, a function comes out. So the transformations combine, in any order. That is why this course is in JAX: the formula stays visible, and gradients, batches, compilation and parallelism are put around it from outside. In our engine each would be a new engine.
#
# **`vmap`** turns a function of one example into one of a batch. Per-example gradients, hard where `backward` sums into the parameters, are one line: `vmap(grad(f))`. **Predict:** how many matrix products do 32 neurons need under `vmap`, forwards?

# %%
batch = jax.random.normal(KEYS["draw"], (32, 2))
per_example = jax.vmap(jax.grad(neuron), in_axes=(None, None, 0))
one_by_one = jnp.stack([jax.grad(neuron)(w, b, row) for row in batch])
assert jnp.allclose(per_example(w, b, batch), one_by_one, atol=1e-6)
products = count(jax.vmap(neuron, (None, None, 0)), w, b, batch, name="dot_general")
print("per-example gradients:", per_example(w, b, batch).shape)
print(f"matrix products for 32 neurons under vmap: {products}; in a loop: 32")
assert products == 1

# %% [markdown]
# **`scan`** is the loop as one step. A Python loop is unrolled while it is traced, so its program grows with the number of turns, and so does the time to compile it. A scan is written once. The values agree, and so do the gradients.


# %%
def by_loop(x, n):
    for _ in range(n):
        x = jnp.sin(x) + 0.1
    return x


def by_scan(x, n):
    return jax.lax.scan(lambda x, _: (jnp.sin(x) + 0.1, None), x, length=n)[0]


for n in (10, 100):
    loop, scan = [count(functools.partial(g, n=n), 0.5) for g in (by_loop, by_scan)]
    print(f"{n:3} turns: {loop:3} steps unrolled, {scan} with scan")
slopes = [float(jax.grad(g)(0.5, 100)) for g in (by_loop, by_scan)]
print("gradients agree:", math.isclose(*slopes, rel_tol=1e-4))
assert math.isclose(*slopes, rel_tol=1e-4)

# %% [markdown]
# **Pytrees.** `jax.tree.map` applies a function to matching leaves of several trees. A step of gradient descent on any model is one line:

# %%
descended = jax.tree.map(lambda p, g: p - 0.3 * g, small, jax.grad(jax_loss)(small))
print({name: array.shape for name, array in descended.items()})
print("the loss falls:", bool(jax_loss(descended) < jax_loss(small)))
assert jax_loss(descended) < jax_loss(small)

# %% [markdown]
# **Keys.** A function that is traced once can't hide a random state: a draw must be a function of its arguments. So JAX passes a *key*. The same key gives the same numbers, always. `split` makes new keys from one, `fold_in(key, n)` the $n$-th. A key is used once.

# %%
key = KEYS["check"]
first, second = jax.random.split(key)
same = bool(jnp.all(jax.random.normal(key, (4,)) == jax.random.normal(key, (4,))))
apart = bool(jnp.any(jax.random.normal(first, (4,)) == jax.random.normal(second, (4,))))
print("same key, same numbers:", same, "| split keys share a number:", apart)
assert same and not apart

# %% [markdown]
# **Sharding, in one glimpse.** Lay an array out over several devices and call the *same* function: the compiler splits the work and puts in the communication. Your laptop has one CPU device, but XLA can pretend that there are four, if it is told before it starts; hence a process of its own. **Predict:** the batch is split over four devices, and the weights are on each.
# What must the devices tell each other to get the gradient of the weights?

# %%
program = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
w = jnp.arange(6.0).reshape(3, 2) / 6
x = jnp.sin(jnp.arange(24.0)).reshape(8, 3)
split = jax.device_put(x, NamedSharding(mesh, P("data")))
whole = jax.device_put(w, NamedSharding(mesh, P()))
step = jax.jit(jax.grad(loss))
print(jax.device_count(), "devices; each holds rows of shape", split.addressable_shards[0].data.shape)
print("same gradient:", bool(jnp.allclose(step(whole, split), step(w, x), atol=1e-6)))
print("all-reduce in the program:", "all-reduce" in step.lower(whole, split).compile().as_text())
print("all-reduce on one device: ", "all-reduce" in step.lower(w, x).compile().as_text())
"""
flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
done = subprocess.run(
    [sys.executable, "-c", program], env=os.environ | flags, capture_output=True, text=True
)
print(done.stdout, end="")
assert done.returncode == 0 and "same gradient: True" in done.stdout, done.stderr

# %% [markdown]
# Each computes the gradient of its two rows, and they sum: one *all-reduce*. We wrote no word about it. Chapter 25 builds this by hand.
#
# ## The errors everyone meets
#
# Most come from one fact: *your Python runs once per shape and dtype, on tracers; what runs later is the recorded program.* We provoke each, catch it, and give its cure.


# %%
def provoke(call: Callable, meaning: str) -> None:
    """Run something that must fail, and print the class of the error with our reading of it."""
    try:
        call()
    except Exception as error:
        print(f"{type(error).__name__}: {meaning}")
    else:
        raise RuntimeError("no error was raised")


v, leaked = jnp.array([0.2, -0.4]), []


@jax.jit
def leaky(x):
    leaked.append(x * 2)  # a side effect: the tracer escapes
    return x + 1


leaky(v)
provoke(lambda: leaked[0] + 1, "a tracer outlived its tracing; return it instead")


@jax.jit
def tight(x):
    return x + 1, x * 2


assert jnp.allclose(tight(v)[1], 2 * v)

# %% [markdown]
# **Side effects** that keep no tracer raise nothing. They happen when the function is traced, once for each new combination of shapes and dtypes, and not when it runs. **Predict** the length of the list after five calls.

# %%
seen = []


@jax.jit
def chatty(x):
    seen.append("called")
    return x + 1


for _ in range(5):
    chatty(v)
print("five calls, the list has length", len(seen))
assert len(seen) == 1

# %% [markdown]
# The cure: return what you want to know. To print from the running program there is `jax.debug.print`. A *changed* global is the same trap the other way round: its old value is in the program.
#
# **Python that depends on numbers.** A tracer has no number, so `if`, `range` and `float` can't use it. The cures: choose with `jnp.where` or `jax.lax.cond`; loop with `jax.lax.fori_loop`; or declare the argument static, which compiles anew for each of its values.


# %%
def mirror(x):
    return x if x.sum() > 0 else -x


def powers(x, n):
    return sum(x**i for i in range(n))


provoke(lambda: jax.jit(mirror)(v), "an `if` asks a tracer for a number; use jnp.where")
provoke(lambda: jax.jit(powers)(v, 3), "`range` asks a tracer for a number; make it static")
assert jnp.allclose(jax.jit(lambda x: jnp.where(x.sum() > 0, x, -x))(v), mirror(v))
assert jnp.allclose(jax.jit(powers, static_argnames="n")(v, n=3), powers(v, 3))

# %% [markdown]
# **Shapes that depend on numbers.** A program has fixed shapes, so `x[x > 0]` has no program: how long is its result? Keep the shape and mask instead. And NumPy's own functions want numbers, so inside `jit` they must be `jnp`'s.

# %%
provoke(lambda: jax.jit(lambda x: x[x > 0].sum())(v), "the shape would depend on numbers; mask")
provoke(lambda: jax.jit(jnp.arange)(3), "a length must be known while tracing; make it static")
provoke(lambda: jax.jit(lambda x: np.tanh(x))(v), "NumPy wants numbers; use jnp")
masked = jax.jit(lambda x: jnp.where(x > 0, x, 0.0).sum())
assert float(masked(v)) == float(v[v > 0].sum())
print("masked sum equals the sum of the chosen:", True)

# %% [markdown]
# **Arguments.** `grad` wants a number from the function and real numbers as arguments; arrays can't be changed in place, for others may hold them.


# %%
def assign():
    v[0] = 1.0


provoke(lambda: jax.grad(lambda x: 2 * x)(v), "grad is for one number; sum it, or use vjp")
provoke(lambda: jax.grad(lambda x: 2.0 * x)(3), "an integer has no slope; pass a float")
provoke(assign, "arrays do not change; v.at[0].set(1.0) is a changed copy")
assert v.at[0].set(1.0)[0] == 1.0 and v[0] != 1.0

# %% [markdown]
# **Reused keys** raise nothing either, and are the worst: two layers start equal, two dropout masks coincide, and the loss looks fine. JAX has a detector, off by default.


# %%
def careless(key):
    return jax.random.normal(key, (1000,)), jax.random.normal(key, (1000,))


def careful(key):
    return tuple(jax.random.normal(k, (1000,)) for k in jax.random.split(key))


for draw_two in (careless, careful):
    correlation = abs(float(jnp.corrcoef(jnp.stack(draw_two(KEYS["check"])))[0, 1]))
    print(f"{draw_two.__name__}: |correlation| of two draws {correlation:.1f}")
with jax.debug_key_reuse(True):
    provoke(lambda: careless(jax.random.key(1)), "one key, two draws; split it")
    careful(jax.random.key(1))

# %% [markdown]
# **Two silent ones.** An index beyond the end gives the last entry, since a compiled program has no way to stop. And a slope can be NaN where the value is fine: `where` stops the *value* of the branch not taken, but on the way back that branch still computes $0 \cdot \infty$. Guard the *input* of the root, not its output.

# %%
print("v[10] is the last entry:", bool(v[10] == v[-1]))
unsafe = jax.grad(lambda x: jnp.where(x > 0, jnp.sqrt(x), 0.0))(0.0)
safe = jax.grad(lambda x: jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0))(0.0)
print(f"slope at 0: guarded outside {unsafe}, guarded inside {safe}")
assert jnp.isnan(unsafe) and safe == 0

# %% [markdown]
# ## Speed, by ratio
#
# Three comparisons on the gradient of one function of 64 numbers (for 256 examples where there is a batch; the scalar engine is timed on one and multiplied), and one on a single matrix product. **Predict**, as factors: our scalar engine against compiled JAX; JAX step by step (*eager*) against `jit`; a loop of jitted calls against `vmap`. And does `jit` help a single large matrix product?
#
# Ours: thousands; ten; a hundred; and no, it is one call into the same routine either way. Seconds depend on your machine, ratios much less. What is printed is a safe bound; the picture shows what your machine did.


# %%
def rough(x):
    """Twenty cheap steps on a few numbers."""
    for _ in range(10):
        x = jnp.tanh(x) * 1.1
    return jnp.sum(x)


def seconds(call: Callable, repeats: int = 7) -> float:
    """The quickest of some calls, after a warm-up that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return min(times)


def scalar_engine(row: list[float]) -> list[float]:
    inputs = [Value(number) for number in row]
    outputs = inputs
    for _ in range(10):
        outputs = [a.tanh() * 1.1 for a in outputs]
    sum(outputs[1:], outputs[0]).backward()
    return [a.grad for a in inputs]


examples = jax.random.normal(KEYS["many"], (256, 64))
compiled, eager = jax.jit(jax.grad(rough)), jax.grad(rough)
batched = jax.jit(jax.vmap(jax.grad(rough)))
one = examples[0]
assert np.allclose(scalar_engine(np.asarray(one, np.float64).tolist()), compiled(one), atol=1e-5)
rows = list(examples)
big, product = jax.random.normal(KEYS["big"], (1000, 1000)), jax.jit(jnp.matmul)
ratios = {
    "scalar engine / jit + vmap": 256
    * seconds(lambda: scalar_engine(one.tolist()), 3)
    / seconds(lambda: batched(examples)),
    "loop of jit / jit + vmap": seconds(lambda: [compiled(row) for row in rows], 3)
    / seconds(lambda: batched(examples)),
    "eager / jit": seconds(lambda: eager(one)) / seconds(lambda: compiled(one)),
    "eager / jit, one large product": seconds(lambda: big @ big)
    / seconds(lambda: product(big, big)),
}

# %%
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.barh(list(ratios), list(ratios.values()))
ax.axvline(1, color="0.3", linewidth=1)
ax.set(xscale="log", xlabel="times slower")
ax.invert_yaxis()
plt.show()
bounds = {"scalar engine / jit + vmap": 100, "loop of jit / jit + vmap": 3, "eager / jit": 3}
for name, bound in bounds.items():
    print(f"{name}: more than {bound} times: {ratios[name] > bound}")
    assert ratios[name] > bound
alone = ratios["eager / jit, one large product"]
print("eager / jit, one large product: between a third and three:", 1 / 3 < alone < 3)
assert 1 / 3 < alone < 3

# %% [markdown]
# Each bar is a ratio of times; the line at 1 is "no difference". On the machine where this was written we had the two in the middle the wrong way round: eager lost by a factor of fifty to a hundred, the loop of jitted calls by about ten. The last bar is the null result that matters: `jit` removes Python and trips through memory *between* steps. Where one step is the whole work, there is nothing to remove.
#
# ## Break it: the bug that looks like a learning rate
#
# In `receive` we add. Suppose we forget to, and let each use overwrite the last: `self.grad = grad`. That is the most natural bug in an engine. Wherever a value is used once, nothing changes. But our network uses $h_0$, $h_1$ and $E$ twice, and the loss uses the logits $z$ twice: in the normaliser, and at the right answer.
#
# **Predict:** does the network still learn, at a rate ten times smaller than before, to be safe? Ours: yes, but slower. The overwritten slope is still one part of the true one, so most steps should go downhill.


# %%
class Forgetful(Tensor):
    def receive(self, grad):
        self.grad = 0.0
        super().receive(grad)


class ForgetfulButLogits(Forgetful):
    def receive(self, grad):  # z is a matrix product; the other products are used only once
        Tensor.receive(self, grad) if self.op == "@" else super().receive(grad)


curves = {
    tensor.__name__: np.array([train(tensor, seed, rate=0.03) for seed in range(5)])
    for tensor in (Tensor, Forgetful, ForgetfulButLogits)
}
fig, ax = plt.subplots(figsize=(6, 3))
for (name, curve), color in zip(curves.items(), ("C0", "C3", "C1"), strict=True):
    ax.plot(curve.T, color=color, linewidth=1, label=[name] + ["_"] * 4)
ax.axhline(floor, color="0.5", linestyle=":", label="entropy of the pairs")
ax.set(xlabel="step", ylabel="loss in nats", ylim=(0, 5))
ax.legend(loc="lower left")
plt.show()
for name, curve in curves.items():
    fall = ledger.interval(curve[:, 0] - curve.min(axis=1), "nats", digits=1)
    above = int(np.sum(curve[:, -1] > curve[:, 0]))
    print(f"{name}: falls by {fall}; {above} of 5 seeds end above their start")
assert np.all(curves["Forgetful"].min(axis=1) < curves["Forgetful"][:, 0] - 0.05)
assert np.all(curves["ForgetfulButLogits"][:, -1] < curves["ForgetfulButLogits"][:, 0])

# %% [markdown]
# Blue is right, red is the bug, orange the bug everywhere but at the logits; five seeds each. We were half wrong. The red loss falls at first and looks like a slow start. Then it blows up. The culprit is $z$. Its slope should be (softmax − truth)/N. The second use overwrites the first, and only −truth/N is left: every step pushes the right logit up, and nothing pushes the others down. Keep $z$ right, and the same bug in $h$ and $E$ only makes learning slower, as predicted. Nothing in the red curves says "bug"; one would read them as "learning rate too high", and lower it. Now the check, handed the buggy slopes:

# %%
broken = {name: Forgetful(array) for name, array in start(0).items()}
engine_loss(broken).backward()
try:
    check_gradients(jax_loss, small, grads=({name: t.grad for name, t in broken.items()},))
    raise RuntimeError("the bug passed")
except AssertionError as error:
    print(str(error).split(" is ")[0], "is wrong")
spoilt = [n for n in broken if not np.allclose(broken[n].grad, tensors[n].grad, atol=1e-6)]
print("arrays with wrong slopes:", ", ".join(spoilt))

# %% [markdown]
# Even W1 is wrong, although nothing after it but $z$ is used twice: that is how one finds the culprit. It takes no training. *A falling loss does not prove the gradient right, nor does a rising one convict the learning rate.* Check gradients by nudging once, for every new layer, before the first run.
#
# ## Notes on the sources
#
# **Baydin, Pearlmutter, Radul and Siskind 2018**, *Automatic differentiation in machine learning: a survey.* Its distinction is the one to keep: this is not symbolic differentiation (no formula grows) and not numerical (no $\epsilon$). Its statement that a gradient costs a small constant times the function is our count of 11 products against 4.
#
# **Griewank and Walther 2008**, *Evaluating Derivatives.* The bound for reverse mode there is a factor of three to four for general programs; for matrix products alone we count three. What reverse mode costs in memory, and recomputation as the way out, is theirs too.
#
# **Karpathy's micrograd.** A scalar engine of about a hundred lines, and the reason why so many people know what `backward` does. It keeps a closure per node, that writes into the parents; ours returns the slopes and lets `backward` add them, so that one place can be right or wrong. Its recursion for the order fails on long chains; ours doesn't recurse. It accumulates over calls, as PyTorch does; ours starts at zero each time.
#
# **Frostig, Johnson and Leary 2018**, *Compiling machine learning programs via high-level tracing.* The paper of JAX: trace pure functions, compile the trace. The restrictions that we provoked are its assumption, that the traced part is pure and of fixed shape.

# %% [markdown]
# ## Remember
#
# **Q:** Why is training done in reverse mode?
#
# **A:** One backward walk gives the slopes of one number with respect to all inputs; forward mode or nudging needs a pass per input.
#
# **Q:** What happens to the gradient of a value that is used twice?
#
# **A:** The slopes that come back from the two uses add.
#
# **Q:** What does the gradient of a network cost, in matrix products?
#
# **A:** Three times the forward pass, less one product for the data: two backwards for each forwards.
#
# **Q:** Why can't a jitted function branch on a number in Python?
#
# **A:** Python runs once per shape and dtype, on tracers that know these but no numbers; the recorded program runs later.
#
# **Q:** Which size of nudge is best for a central difference, and what accuracy does it reach?
#
# **A:** About the cube root of the rounding unit, u^(1/3); the error is then about u^(2/3), so five digits in single precision.

# %% [markdown]
# ## Exercises
#
# 1. **A rule of your own.** Add `relu` to a subclass of `Tensor`, and find the point where finite differences disagree with it. *Success:* right at 1 and −1, and you can say why nudging gives 1/2 at 0.
# 2. **Softmax minus truth.** With `Tensor`, find the gradient of the mean loss with respect to a table of logits, `logits[now]`, at zero. *Success:* it is (count(c) · p − count(c, w)) / N, chapter 01's formula, to 1e-12.
# 3. **Memory for time.** Wrap each layer of `mlp` in `jax.checkpoint`. *Success:* the same gradients, and you can say why the gradient's program now holds more `tanh`.
# 4. **A product with the Hessian.** Write `hvp(f, x, d)`, the product of the second derivative with a direction, without forming the matrix. *Success:* it agrees with `jax.hessian(f)(x) @ d`.


# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution 1
class Rectified(Tensor):
    def relu(self):
        on = self.data > 0
        return self.make(self.data * on, (self,), lambda g: (g * on,), "relu")


points = Rectified([-1.0, 0.0, 1.0])
points.relu().sum().backward()
nudged = (np.maximum(points.data + 1e-6, 0) - np.maximum(points.data - 1e-6, 0)) / 2e-6
print("rule", points.grad, "nudged", nudged.round(3))  # at the kink: the mean of both sides
assert points.grad.tolist() == [0, 0, 1] and np.allclose(nudged, [0, 0.5, 1])

# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution 2
logits = Tensor(np.zeros_like(counts))
picked = logits[now]
nll = picked.exp().sum(1).log().sum() - picked[np.arange(len(now)), following].sum()
(nll / float(len(now))).backward()
formula = (counts.sum(1, keepdims=True) / len(symbols) - counts) / len(now)
print("the formula of chapter 01 holds:", np.allclose(logits.grad, formula, atol=1e-12))
assert np.allclose(logits.grad, formula, atol=1e-12)


# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution 3
def frugal(weights, x):
    for W in weights:
        x = jax.checkpoint(lambda W, x: jnp.tanh(x @ W))(W, x)
    return jnp.sum(x)


plain, lean = [jax.grad(g)(weights, data) for g in (mlp, frugal)]
assert all(jnp.allclose(a, b, atol=1e-6) for a, b in zip(plain, lean, strict=True))
texts = [str(jax.make_jaxpr(jax.grad(g))(weights, data)) for g in (mlp, frugal)]
print("tanh in the program:", [text.count(" tanh ") for text in texts])
assert texts[1].count(" tanh ") > texts[0].count(" tanh ")  # computed again on the way back


# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution 4
def hvp(f: Callable, x: jax.Array, d: jax.Array) -> jax.Array:
    return jax.jvp(jax.grad(f), (x,), (d,))[1]  # forward over reverse


def bowl(x):
    return jnp.sum(jnp.tanh(x) ** 2) * jnp.sum(x)


at, direction = jnp.array([0.3, -0.2, 0.5]), jnp.array([1.0, 2.0, -1.0])
agree = jnp.allclose(hvp(bowl, at, direction), jax.hessian(bowl)(at) @ direction, atol=1e-5)
print("agrees with the Hessian:", bool(agree))
assert agree

# %% [markdown]
# ## References
#
# - A. G. Baydin, B. A. Pearlmutter, A. A. Radul, J. M. Siskind: Automatic differentiation in machine learning: a survey. *JMLR* 18, 2018. <https://arxiv.org/abs/1502.05767>
# - A. Griewank, A. Walther: *Evaluating Derivatives*, 2nd edition. SIAM, 2008.
# - A. Karpathy: micrograd. <https://github.com/karpathy/micrograd>
# - R. Frostig, M. J. Johnson, C. Leary: Compiling machine learning programs via high-level tracing. SysML 2018.
# - The JAX documentation on common errors: <https://docs.jax.dev/en/latest/errors.html>
#
# ## Next chapter
#
# [03 · Training](03_training.ipynb) takes gradients for granted, and builds what goes around them: a neural language model, an optimiser, and a loop that can be stopped at any moment and resumed exactly.
