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
# > Reverse-mode differentiation in a hundred lines of NumPy, what JAX adds to it, and a check of any gradient against finite differences.
#
# *Reading time 45 min · runs in about 15 s · difficulty ●●○ · needs 00*
#
# Chapter 01 learned a bigram table by gradient descent and let a library compute the gradient. Everything after this chapter does the same, up to 405 billion weights. This chapter opens the box. First we build the
# machine that differentiates, on numbers, then on arrays. Then we meet JAX, which differentiates the same way but is built around another idea: a program is data, which can be transformed. Knowing what JAX *sees* of your code
# explains all its strange errors, and we provoke each of them.

# %%
#| export
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

# %%
import math
import os
import subprocess
import sys
import timeit

import matplotlib.pyplot as plt

from llm_from_scratch import ledger

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
LINE = "To be, or not to be: that is the question:"
KEYS = dict(zip(("weights", "inputs"), jax.random.split(jax.random.key(0)), strict=True))

# %% [markdown]
# ## 1 The derivative by poking
#
# A derivative says how much the output moves when an input moves. So move it and look. The *central difference*
#
# $$ f'(x) \approx \frac{f(x + h) - f(x - h)}{2h} $$
#
# is off by a term in $h^2$, so a smaller $h$ should be better.
#
# **Predict.** We try it on $\tanh$ at 0.7, in single and in double precision, with $h$ from 1 down to $10^{-12}$. What does the error do as $h$ shrinks? We expect it to fall, and then to rise again: both values are rounded, and the
# rounding error is divided by an ever smaller $h$.

# %%
steps = 10.0 ** np.arange(0, -12.5, -0.5)
exact = 1 - math.tanh(0.7) ** 2
errors = {}
for dtype in (np.float32, np.float64):
    x, h = dtype(0.7), steps.astype(dtype)
    quotients = (np.tanh(x + h) - np.tanh(x - h)) / (2 * h)
    errors[dtype.__name__] = np.abs(quotients.astype(float) - exact) + 1e-16
fig, ax = plt.subplots(figsize=(6, 3))
for name, error in errors.items():
    ax.loglog(steps, error, "o-", ms=3, label=name)
ax.set(xlabel="step h", ylabel="error of the derivative")
ax.invert_xaxis()
ax.legend()
plt.show()
print(
    f"best of float32 below 1e-3: {errors['float32'].min() < 1e-3}; below 1e-8: {errors['float32'].min() < 1e-8}"
)
print(f"best of float64 below 1e-8: {errors['float64'].min() < 1e-8}")

# %% [markdown]
# Each curve is a V. On its left arm the formula is to blame, on the right arm the rounding. Single precision, the format of our models, never gets past a few correct digits. In double precision there are about ten.
#
# The accuracy is the smaller problem. Poking gives *one* derivative for two evaluations. A model with $n$ weights needs $2n$ evaluations for one step of gradient descent. For Llama 3 405B that would be 810 billion forward passes per step.
# Yet it is trained at a price of about three. The rest of the chapter explains this number.
#
# ## 2 A number that remembers
#
# A program computes its result in small steps, and of each small step we know the derivative. The chain rule joins them. If $z$ depends on $y$ and $y$ on $x$,
#
# $$ \frac{dz}{dx} = \frac{dz}{dy} \cdot \frac{dy}{dx}, $$
#
# and where $x$ reaches $z$ on several ways, their products are added. To use this we must know the steps. So let every number remember which numbers it was made from, and its derivative by each of them. Python lets us write that as a class
# whose `+` and `*` keep the books.


# %%
#| workbook
class Value:
    """A number that remembers how it was made: pairs of a parent and the derivative by that parent."""

    def __init__(self, data: float, parents: tuple = (), name: str = ""):
        self.data, self.parents, self.name, self.grad = float(data), parents, name, 0.0

    def __add__(self, other: "Value") -> "Value":
        """The sum: its derivative by either side is 1."""
        return Value(self.data + other.data, ((self, 1.0), (other, 1.0)), "+")

    def __mul__(self, other: "Value") -> "Value":
        """The product: its derivative by one side is the other side."""
        return Value(self.data * other.data, ((self, other.data), (other, self.data)), "×")

    def tanh(self) -> "Value":
        """The hyperbolic tangent y: its derivative is 1 − y²."""
        y = math.tanh(self.data)
        return Value(y, ((self, 1 - y * y),), "tanh")


# %% [markdown]
# Here is one neuron with two inputs, $y = \tanh(w_1 x_1 + w_2 x_2 + b)$. Nothing is differentiated yet, but the result knows its whole history.


# %%
def neuron_of(w1=0.5, x1=1.0, w2=-0.3, x2=2.0, b=1.0):
    """One neuron on Values, and its five inputs by name."""
    inputs = {k: Value(v, name=k) for k, v in dict(w1=w1, x1=x1, w2=w2, x2=x2, b=b).items()}
    v = inputs.values()
    w1, x1, w2, x2, b = v
    return (w1 * x1 + w2 * x2 + b).tanh(), inputs


y, inputs = neuron_of()
print(f"y = {y.data:.3f}, made by {y.name} from {y.parents[0][0].data:.3f}")
print(f"its derivative by that number: {y.parents[0][1]:.3f}")
assert y.parents[0][1] == 1 - y.data**2

# %% [markdown]
# ## 3 Backwards
#
# Call $\bar v$ the derivative of the *output* by $v$. The output's own is 1. If all numbers that were made from $v$ know theirs, then
#
# $$ \bar v = \sum_{u \text{ made from } v} \bar u \cdot \frac{\partial u}{\partial v} . $$
#
# So we go from the output back to the inputs, each number after all those that were made from it. That order is the reverse of a *topological order*, in which every number comes after its parents. One pass over it gives the derivative by
# **every** number in the program. This is reverse mode, or back-propagation.


# %%
#| export workbook
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


# %%
#| workbook
def backward(output: Value) -> None:
    """Set `grad` of every Value that output was computed from: the derivative of output by it."""
    order = topological(output)
    for node in order:
        node.grad = 0.0
    output.grad = 1.0
    for node in reversed(order):
        for parent, derivative in node.parents:
            parent.grad += derivative * node.grad


# %%
backward(y)
slope = 1 - y.data**2
by_hand = {"w1": 1.0 * slope, "x1": 0.5 * slope, "w2": 2.0 * slope, "x2": -0.3 * slope, "b": slope}
for name, value in inputs.items():
    poked = {
        k: [neuron_of(**{k: inputs[k].data + h})[0].data for h in (1e-5, -1e-5)] for k in inputs
    }
    difference = (poked[name][0] - poked[name][1]) / 2e-5
    print(
        f"{name}: backward {value.grad:+.4f}, by hand {by_hand[name]:+.4f}, poked {difference:+.4f}"
    )
    assert math.isclose(value.grad, by_hand[name]) and math.isclose(
        value.grad, difference, rel_tol=1e-6
    )

# %% [markdown]
# Three ways, one answer: by the engine, by the rule on paper, by poking. The engine made one pass for all five.
#
# It is worth seeing. Each box below is a number: above, its value; below, the derivative of $y$ by it. On each edge stands the derivative of one step. Read from right to left: a box's lower number is the lower number to its right, times what stands on the
# edge between.


# %%
def draw_graph(output: Value) -> None:
    """The computation graph: inputs left, output right, local derivatives on the edges."""
    order = topological(output)
    depth = {}
    for node in reversed(
        order
    ):  # a node stands one column left of the leftmost number made from it
        depth[id(node)] = 0 if node is output else depth[id(node)]
        for parent, _ in node.parents:
            depth[id(parent)] = max(depth.get(id(parent), 0), depth[id(node)] + 1)
    columns, at = {}, {}
    for node in order:
        columns.setdefault(depth[id(node)], []).append(node)
    for column, nodes in columns.items():
        for i, node in enumerate(nodes):
            at[id(node)] = (-1.9 * column, (len(nodes) - 1) / 2 - i)
    fig, ax = plt.subplots(figsize=(10, 3.6))
    for node in order:
        x, y = at[id(node)]
        text = f"{node.name}  {node.data:.2f}\n$\\partial$ {node.grad:.2f}"
        box = {"boxstyle": "round", "fc": "#cfe3f5" if node.parents else "#fbe2c5"}
        ax.text(x, y, text, ha="center", va="center", bbox=box, fontsize=9)
        for parent, derivative in node.parents:
            px, py = at[id(parent)]
            style = {"arrowstyle": "->", "color": "gray", "shrinkA": 24, "shrinkB": 24}
            ax.annotate("", (x, y), (px, py), arrowprops=style)
            middle = ((x + px) / 2, (y + py) / 2 + 0.12)
            ax.text(*middle, f"{derivative:.2f}", fontsize=8, color="tab:red", ha="center")
    ax.set(xlim=(-1.9 * max(columns) - 0.8, 0.8), ylim=(-2.0, 2.0))
    ax.axis("off")
    plt.show()


draw_graph(y)
print(f"{len(topological(y))} numbers, {sum(len(n.parents) for n in topological(y))} edges")

# %% [markdown]
# ## 4 Arrays
#
# A graph with a node per number is easy to read and hopeless to run. A matrix product of two 4,096 × 4,096 matrices would be 137 billion nodes. So let the nodes be arrays. The idea stays; the derivative of one step becomes a matrix that is far too
# large to write down (the Jacobian). But we never need the matrix, only what it does to $\bar u$: a function that turns $\bar u$ into what it adds to $\bar v$. It is called the *pull-back* of the step. For $u = x w$ with matrices it is
#
# $$ \bar x \mathrel{+}= \bar u\, w^\top, \qquad \bar w \mathrel{+}= x^\top \bar u . $$
#
# Check the shapes: with $x$: $(N, I)$ and $w$: $(I, O)$, $\bar u$ is $(N, O)$, and there is only one way to multiply to $(N, I)$ and $(I, O)$.
#
# One trap remains. NumPy *broadcasts*: a bias of shape $(O)$ is added to $N$ rows. One number was used $N$ times, so its $N$ derivatives are added up.


# %%
#| export workbook
def unbroadcast(grad: Float[np.ndarray, "..."], shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Sum a gradient over the axes along which an array of this shape was repeated to fit it."""
    extra = grad.ndim - len(shape)
    repeated = tuple(range(extra))
    repeated += tuple(
        extra + i for i, n in enumerate(shape) if n == 1 and grad.shape[extra + i] != 1
    )
    return grad.sum(axis=repeated).reshape(shape)


# %%
ones = np.ones((4, 3))
print("bias (3,):", unbroadcast(ones, (3,)), "| column (4, 1):", unbroadcast(ones, (4, 1)).ravel())
print("number ():", unbroadcast(ones, ()))
assert unbroadcast(ones, (4, 3)).shape == (4, 3)


# %%
#| export
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


# %% [markdown]
# The functions of one argument stand outside the class, and so does the pass backwards. It is the one we know, with the pull-back in the place of a product.


# %%
#| export
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


# %% [markdown]
# Enough for a language model. Chapter 01's bigram model is a table $W$ of logits, a row for each character; its loss on the line is the mean cross-entropy
#
# $$ L = \frac1N \sum_{n} \Big( \log \sum_j e^{W_{c_n j}} - W_{c_n c_{n+1}} \Big). $$
#
# On paper its gradient has a beautiful form: for each position, the predicted distribution minus the one-hot truth, in the row of the character. The engine knows nothing of that. It knows five small steps.

# %%
letters = sorted(set(LINE))
ids = np.array([letters.index(c) for c in LINE])
here, following, N, V = ids[:-1], ids[1:], len(LINE) - 1, len(letters)


def bigram_loss(W: Tensor) -> Tensor:
    """Mean cross-entropy of the line's bigrams in nats; W holds logits (V, V)."""
    logits = W[here]
    log_norm = log(total(exp(logits), axis=1))
    return total(log_norm - logits[np.arange(N), following]) * (1 / N)


W = Tensor(np.random.default_rng(0).normal(size=(V, V)))
loss = bigram_loss(W)
gradients(loss)
p = np.exp(W.data[here]) / np.exp(W.data[here]).sum(axis=1, keepdims=True)
paper = np.zeros((V, V))
np.add.at(paper, here, (p - np.eye(V)[following]) / N)
print(f"{V} letters, loss {loss.data:.3f} nats, {len(topological(loss))} nodes for {V * V} weights")
print("equal to the formula on paper:", np.allclose(W.grad, paper, atol=1e-12))
assert np.allclose(W.grad, paper, atol=1e-12)

# %% [markdown]
# Follow the gradient down, and the model learns the line. The lowest loss that any bigram table can have is the entropy of the line's own bigrams.

# %%
for _ in range(300):
    gradients(bigram_loss(W))
    W = Tensor(W.data - 10.0 * W.grad)
pairs = np.zeros((V, V))
np.add.at(pairs, (here, following), 1)
share = pairs[here, following] / pairs[here].sum(axis=1)
print(
    f"after 300 steps {bigram_loss(W).data:.3f} nats, the table of counts {-np.log(share).mean():.3f}"
)
assert 0 < bigram_loss(W).data + np.log(share).mean() < 0.05

# %% [markdown]
# That is the whole of deep learning's machinery. What remains is speed, and convenience.
#
# ## 5 The same in JAX
#
# The engine above records while it computes. JAX does something else. It runs your Python function once, on *tracers* that have a shape and a type but no numbers, and writes down which operations they go through. What it gets is a small program in a language of its own,
# the *jaxpr*. Then it transforms programs: `grad` makes from the program of a function the program of its gradient. Nothing has been computed yet. Here is our neuron.


# %%
def neuron(w, x, b):
    """tanh(w·x + b) with w, x of shape (2,)."""
    return jnp.tanh(jnp.dot(w, x) + b)


def show(f, *args):
    """Print the jaxpr of f for these arguments."""
    print(jax.make_jaxpr(f)(*args).pretty_print(use_color=False))


w, x, b = jnp.array([0.5, -0.3]), jnp.array([1.0, 2.0]), jnp.float32(1.0)
show(neuron, w, x, b)

# %% [markdown]
# Three operations: `dot_general`, `add`, `tanh`, each with the type of its result. And the gradient by $w$:

# %%
show(jax.grad(neuron), w, x, b)
print("JAX: ", *(f"{g:+.4f}" for g in jax.grad(neuron)(w, x, b)))
print("ours:", f"{inputs['w1'].grad:+.4f} {inputs['w2'].grad:+.4f}")
assert np.allclose(jax.grad(neuron)(w, x, b), [inputs["w1"].grad, inputs["w2"].grad], atol=1e-6)

# %% [markdown]
# Read it as our backward pass, written out: the forward operations, then $(1 - y) + (1 - y)\,y$, which is $1 - y^2$, and at the end a multiplication with $x$. A gradient is a program like any other. So it can be differentiated again, compiled, or applied to a batch, and the order is ours to choose.
# The bigram loss, and a second derivative:


# %%
def jax_bigram_loss(W):
    """The loss of section 4, for a JAX array of logits (V, V)."""
    log_p = jax.nn.log_softmax(W[here], axis=-1)
    return -log_p[jnp.arange(N), following].mean()


W0 = np.random.default_rng(0).normal(size=(V, V))
ours = Tensor(W0)
gradients(bigram_loss(ours))
theirs = jax.grad(jax_bigram_loss)(jnp.array(W0, jnp.float32))
print("bigram gradients equal within 1e-6:", np.allclose(ours.grad, theirs, atol=1e-6))
second = jax.grad(jax.grad(jnp.tanh))(0.7)
print(
    f"second derivative of tanh at 0.7: {second:.4f}; −2 y (1 − y²) = {-2 * math.tanh(0.7) * exact:.4f}"
)
assert np.allclose(ours.grad, theirs, atol=1e-6)

# %% [markdown]
# ### Forwards, backwards, and the price
#
# There are two ways to apply the chain rule to a chain of Jacobians $J_3 J_2 J_1$. Multiply a vector from the right, $J_3(J_2(J_1 v))$: *forward mode*, `jax.jvp`, a Jacobian–vector product. It answers: if the inputs move along $v$, how does the output move? Or from the left, $((u^\top J_3) J_2) J_1$:
# *reverse mode*, `jax.vjp`. It answers: how does $u \cdot \text{output}$ depend on each input? One `jvp` is a column of the Jacobian, one `vjp` is a row.


# %%
def layer(x):
    """From three numbers to two."""
    A = jnp.array([[1.0, 2.0, 0.5], [-1.0, 0.3, 1.5]])
    return jnp.tanh(A @ x)


x3 = jnp.array([0.1, -0.2, 0.3])
columns = [jax.jvp(layer, (x3,), (e,))[1] for e in jnp.eye(3)]
_, pull = jax.vjp(layer, x3)
rows = [pull(u)[0] for u in jnp.eye(2)]
print("three jvp, side by side:\n", np.stack(columns, axis=1).round(3))
print("two vjp, stacked:\n", np.stack(rows).round(3))
assert np.allclose(np.stack(columns, axis=1), np.stack(rows), atol=1e-6)

# %% [markdown]
# The same matrix. With three inputs and two outputs it took three passes forwards or two backwards. A loss has *one* output and millions of inputs: one pass backwards.
#
# **Predict.** Take four layers of width 256, a quarter of a million weights. Poking costs half a million evaluations. How many forward passes is one reverse-mode gradient worth, in arithmetic operations? We say a bit below three. A matrix product $xw$ forwards becomes two backwards, $\bar u w^\top$ and $x^\top \bar u$; only the first layer needs
# one, since nobody asks for the gradient by the input. So $(4 + 4 + 3)/4 = 2.75$.


# %%
def mlp_loss(weights, x):
    """Four layers of tanh, and the mean square of what comes out."""
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


weights = [jax.random.normal(k, (256, 256)) / 16 for k in jax.random.split(KEYS["weights"], 4)]
batch = jax.random.normal(KEYS["inputs"], (64, 256))


def operations(f):
    """Arithmetic operations of f(weights, batch), as XLA counts them."""
    return jax.jit(f).lower(weights, batch).cost_analysis()["flops"]


price = operations(jax.value_and_grad(mlp_loss)) / operations(mlp_loss)
ledger.result("a gradient of four layers", price, "times the operations of the loss", digits=2)
assert 2.7 < price < 2.8

# %% [markdown]
# This is the number promised in section 1. It does not depend on how many weights there are: reverse mode gives all derivatives for a small constant times the cost of the function. Chapter 13 will use it as $C \approx 6ND$: two operations per weight and token forwards, four backwards.
# What reverse mode costs in exchange is memory: every value that a pull-back needs has to be kept until the pass comes back to it.
#
# ## 6 vmap: write for one, run for many
#
# `jax.vmap` turns a function of one example into a function of a batch. It does not loop; it rewrites each operation of the jaxpr, so that a matrix–vector product becomes a matrix–matrix product. It composes with `grad`, which gives something that most libraries make hard: the gradient of *each example*.

# %%
xs = jax.random.normal(KEYS["inputs"], (5, 2))
each = jax.vmap(jax.grad(neuron), in_axes=(None, 0, None))(w, xs, b)
loop = jnp.stack([jax.grad(neuron)(w, one, b) for one in xs])
print("one gradient per example:", each.shape, "| equal to a loop:", bool(jnp.allclose(each, loop)))
show(jax.vmap(neuron, in_axes=(None, 0, None)), w, xs, b)
assert jnp.allclose(each, loop, atol=1e-6)

# %% [markdown]
# In the jaxpr the `dot_general` now takes a `[5,2]` array. The text of `neuron` has no batch in it.
#
# ## 7 jit: what the compiler sees
#
# Run as it is, a JAX function sends one operation after the other to the machine. `jax.jit` hands the whole program to a compiler, XLA. The program that goes in is the jaxpr in another spelling, StableHLO:

# %%
lowered = jax.jit(neuron).lower(w, x, b)
for row in lowered.as_text().splitlines():
    if "stablehlo." in row:
        print(row.strip().partition(" : ")[0])

# %% [markdown]
# What comes out depends on the processor, so the next output is not compared when the chapter is tested. On a CPU you will most likely see a single `fusion`: dot product, addition and tanh have become one loop that reads its inputs once and writes its result once.

# %% tags=["nbval-ignore-output"]
for row in lowered.compile().as_text().splitlines():
    if " = " in row:
        print(row.strip().split(", metadata")[0][:110])

# %% [markdown]
# When does tracing happen? **Predict** how often the word is printed below: the function is called four times, on vectors of length 2, 2, 2 and 3.


# %%
@jax.jit
def traced_double(x):
    """Twice x, and a print that only tracing sees."""
    print(f"tracing {x.shape}, x is a {type(x).__name__[-6:]}")
    return 2 * x


for size in (2, 2, 2, 3):
    traced_double(jnp.ones(size))
print(f"compiled programs kept: {traced_double._cache_size()}")

# %% [markdown]
# Twice, once for each shape. The compiled program holds operations on arrays and no `print`. A jitted function is Python the first time, and something else ever after. Most of the errors in section 9 are this sentence, forgotten.
#
# ## 8 Four more words: scan, pytree, key, sharding
#
# **scan.** A Python loop is unrolled while tracing: a thousand steps are a thousand copies in the program, and the compiler chokes. `jax.lax.scan` traces the body once. Chapter 04 runs recurrent networks with it.


# %%
def step(h, x):
    """One step of a leaky sum: the new state, and what to keep."""
    h = 0.9 * h + x
    return h, h


def looped(xs):
    """The states after each x, by a Python loop."""
    h, kept = 0.0, []
    for x in xs:
        h, out = step(h, x)
        kept.append(out)
    return jnp.stack(kept)


def scanned(xs):
    """The same by scan."""
    return jax.lax.scan(step, 0.0, xs)[1]


line = jnp.array(ids, jnp.float32)
sizes = [len(jax.make_jaxpr(f)(line).jaxpr.eqns) for f in (looped, scanned)]
print(
    f"{len(line)} steps: {sizes[0]} operations in the unrolled program, {sizes[1]} in the scanned one"
)
assert jnp.allclose(looped(line), scanned(line), rtol=1e-5)
assert jnp.allclose(
    jax.grad(lambda x: looped(x)[-1])(line), 0.9 ** jnp.arange(N, -1, -1), atol=1e-5
)

# %% [markdown]
# **pytree.** Parameters come in many arrays. JAX takes any nest of lists, tuples and dictionaries, and returns the gradient in the same nest. An Equinox module (chapter 03) is a pytree, too.

# %%
model = {"first": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}, "last": [jnp.ones(3)]}
loss_of = lambda m: jnp.sum(jnp.tanh(x @ m["first"]["w"] + m["first"]["b"]) * m["last"][0])  # noqa: E731
print(jax.tree.map(jnp.shape, jax.grad(loss_of)(model)))

# %% [markdown]
# **key.** A function whose result depends on a hidden random state can't be traced, cached or repeated. So JAX has none. A key is a value; the same key gives the same numbers, and `split` makes new keys.

# %%
key = jax.random.key(7)
one, two = jax.random.split(key)
print(
    "same key, same numbers:", bool((jax.random.normal(one, 3) == jax.random.normal(one, 3)).all())
)
print(
    "other key, other numbers:",
    bool((jax.random.normal(one, 3) != jax.random.normal(two, 3)).all()),
)

# %% [markdown]
# **sharding.** The array type knows on which devices its parts lie. The program stays as it is; the compiler divides the work and adds the communication. A CPU is one device, but XLA can be told to pretend that it is four (in a process of its own, since this is decided when JAX starts). The parts of the paper
# on parallel training (§3.3) are built from this, in chapters 25 and 26.

# %%
program = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ("data",))
x, w = jnp.arange(48.0).reshape(8, 6), jnp.ones((6, 2))
parts = jax.device_put(x, NamedSharding(mesh, P("data")))
y = jax.jit(jnp.matmul)(parts, w)
print(len(jax.devices()), "devices; each holds", y.addressable_shards[0].data.shape, "of", y.shape)
print("same result:", bool((y == x @ w).all()))
"""
flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
pretend = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
done = subprocess.run([sys.executable, "-c", program], env=pretend, capture_output=True, text=True)
print(done.stdout, end="")
assert done.returncode == 0, done.stderr

# %% [markdown]
# ## 9 The errors everyone meets
#
# Each of these has cost somebody an afternoon. We provoke them and print the class of the error, if there is one. The worst are those where there is none.


# %%
def provoke(action):
    """The class of the error that an action raises, or what it returns without one."""
    try:
        return f"no error: {action()}"
    except Exception as error:
        return type(error).__name__


# %% [markdown]
# **A decision on a number.** In a jitted function `x` has no value, so Python can't branch on it. Nor can a shape depend on a value. Use `jnp.where`, `jax.lax.cond` or a mask; or name the argument as static, if it is a setting and not data.

# %%
vector = jnp.array([1.0, -2.0, 3.0])
branch = jax.jit(lambda x: x if x.sum() > 0 else -x)
print("if on a tracer:      ", provoke(lambda: branch(vector)))
print("x[x > 0]:            ", provoke(lambda: jax.jit(lambda x: x[x > 0])(vector)))
print("arange(n):           ", provoke(lambda: jax.jit(jnp.arange)(3)))
print("arange(n), n static: ", provoke(lambda: jax.jit(jnp.arange, static_argnums=0)(3)))
print(
    "where instead of if: ",
    provoke(lambda: jax.jit(lambda x: jnp.where(x.sum() > 0, x, -x))(vector)),
)

# %% [markdown]
# **A leaked tracer.** Something that lives outside the function keeps what it saw inside: a list, a global, an attribute. The call succeeds. The error comes later, elsewhere. Return what you want to keep.

# %%
seen = []


@jax.jit
def remember(x):
    """Twice x; and a tracer escapes."""
    seen.append(x)
    return 2 * x


print("the call itself:", provoke(lambda: remember(1.0)))
print("the next use:   ", provoke(lambda: seen[0] + 1))

# %% [markdown]
# **A side effect.** It happens while tracing, and never again. No error.

# %%
calls = {"counted": 0}


@jax.jit
def counting(x):
    """Twice x; the count is a side effect."""
    calls["counted"] += 1
    return 2 * x


for _ in range(5):
    counting(1.0)
print(f"called 5 times, counted {calls['counted']}")

# %% [markdown]
# **Writing into an array.** Arrays don't change; `.at[...]` makes a copy (inside `jit` the compiler usually avoids it).


# %%
def write(x):
    """NumPy's way."""
    x[0] = 9.0


print("x[0] = 9:       ", provoke(lambda: write(vector)))
print("x.at[0].set(9): ", provoke(lambda: vector.at[0].set(9.0)))

# %% [markdown]
# **An index out of range.** On a GPU an exception can't be raised in the middle of a program. So JAX reads the nearest entry, or skips the write, silently. A token id that is too large gets the last token's vector. (Chapter 10 returns NaN there, on purpose.)

# %%
print("x[100] of three numbers:", provoke(lambda: vector[100]))
print(
    "asked to fill:          ", provoke(lambda: vector.at[100].get(mode="fill", fill_value=jnp.nan))
)

# %% [markdown]
# **A key used twice.** No error, and two things that should be independent are equal.

# %%
init, noise = jax.random.normal(key, 1000), jax.random.normal(key, 1000)
fresh = [jax.random.normal(k, 1000) for k in jax.random.split(key)]
print(f"same key twice: correlation {np.corrcoef(init, noise)[0, 1]:.2f}")
print(f"split: below 0.1: {abs(np.corrcoef(*fresh)[0, 1]) < 0.1}")

# %% [markdown]
# **A NaN from the road not taken.** `where` computes both branches. The forward result is right. Backwards the branch that was not taken gets the gradient 0, times the derivative of $\log$ at 0, which is infinite; and $0 \cdot \infty$ is NaN. Make the input safe first.

# %%
risky = lambda x: jnp.where(x > 0, jnp.log(x), 0.0)  # noqa: E731
safe = lambda x: jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), 0.0)  # noqa: E731
print(f"value at 0: {risky(0.0)}, gradient {jax.grad(risky)(0.0)}")
print(f"made safe:  {safe(0.0)}, gradient {jax.grad(safe)(0.0)}")

# %% [markdown]
# ## 10 Speed, as ratios
#
# Seconds belong to a machine; ratios travel better. We take the best of several repetitions, and print only whether a ratio exceeds a bound that is far on the safe side.
#
# **Predict.** A chain of 30 operations on a hundred numbers: how much faster is it compiled? And 200 small gradients: how much faster in one `vmap` than one by one (each compiled)? We expect ten times and fifty times: what we save is not arithmetic but the fixed price, some microseconds, of each call.


# %%
def chain(x):
    """Thirty operations."""
    for _ in range(15):
        x = jnp.sin(x) * 1.01
    return x


def seconds(f, *args):
    """The best time of a call, after one call to warm up."""
    jax.block_until_ready(f(*args))
    return min(timeit.repeat(lambda: jax.block_until_ready(f(*args)), number=3, repeat=15)) / 3


hundred, many = jnp.linspace(0, 1, 100), jax.random.normal(KEYS["inputs"], (200, 2))
gradient = jax.jit(jax.grad(neuron))
together = jax.jit(jax.vmap(jax.grad(neuron), in_axes=(None, 0, None)))
compiled = seconds(chain, hundred) / seconds(jax.jit(chain), hundred)
one_by_one = lambda: [gradient(w, x, b) for x in many]  # noqa: E731
batched = seconds(one_by_one) / seconds(together, w, many, b)
print(f"compiled chain more than 2 times faster: {compiled > 2}")
print(f"one vmap more than 20 times faster than 200 calls: {batched > 20}")
assert compiled > 2 and batched > 20

# %% [markdown]
# And the ratios themselves, on the machine that ran this last; they are not compared when the chapter is tested.

# %% tags=["nbval-ignore-output"]
print(f"compiled chain: {compiled:.0f} times; one vmap: {batched:.0f} times")

# %% [markdown]
# The batch is near our guess. Compiling gains less than we thought: a compiled call has a fixed price, too, that of several eager operations. And our own engine? It is not slow because its arithmetic is: NumPy's is fine. It is slow as eager JAX is, by one Python call per operation. For large arrays that price vanishes, and the gain of compiling shrinks to what fusion saves in memory traffic.
#
# ## 11 Trust no gradient
#
# Automatic derivatives are right by construction, as long as nobody writes a rule by hand. People do: for speed, for numerical stability, for kernels. Then poking, slow and inexact as it is, becomes valuable again, because it is *independent*. The next function compares `jax.grad` with central differences. It works in double precision, where
# section 1 found ten good digits, and it says *where* a gradient is wrong.


# %%
#| export
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


# %%
#| export public
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


# %%
print("bigram loss:", check_gradients(jax_bigram_loss, W0) < 1e-6)
print("four layers:", check_gradients(mlp_loss, weights, batch) < 1e-6)
print("a dictionary:", check_gradients(loss_of, model) < 1e-6)

# %% [markdown]
# Now a rule by hand with a plausible slip: the derivative of $\tanh$ written as $1 - x^2$ where it should be $1 - y^2$. Near zero the two are almost the same.


# %%
@jax.custom_vjp
def fast_tanh(x):
    """tanh with a hand-written pull-back, which is wrong."""
    return jnp.tanh(x)


fast_tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - x * x),))
layers = {"w": jnp.array([[0.01, 0.02], [0.5, -0.8]]), "b": jnp.zeros(2)}
with_slip = lambda m, x: fast_tanh(m["w"] @ x + m["b"]).sum()  # noqa: E731
print(provoke(lambda: check_gradients(with_slip, layers, x)))
try:
    check_gradients(with_slip, layers, x)
except AssertionError as error:
    print(error)

# %% [markdown]
# JAX has such a check, `jax.test_util.check_grads`. It moves all inputs at once along random directions, in both modes and to higher orders, which is faster and covers more. It says only that something is wrong. Ours says which weight. They must agree on what is right and what is wrong:

# %%
from jax.test_util import check_grads

with jax.enable_x64(True):
    arguments = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (weights, batch))
    check_grads(mlp_loss, arguments, order=1, modes=["rev"])
    broken = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (layers, x))
    print(
        "theirs, with the slip:",
        provoke(lambda: check_grads(with_slip, broken, order=1, modes=["rev"])),
    )

# %% [markdown]
# ## 12 Break it
#
# The classic bug of a home-made engine is one character: `=` for `+=` in the backward pass. A number that is used twice then keeps only its last gradient. It survives many tests, because in a chain nothing is used twice.


# %%
def careless_backward(output: Value) -> None:
    """backward, with an assignment where a sum should be."""
    order = topological(output)
    output.grad = 1.0
    for node in reversed(order):
        for parent, derivative in node.parents:
            parent.grad = derivative * node.grad


for name, run in (("with the bug", careless_backward), ("without", backward)):
    a = Value(3.0)
    in_chain, squared = a.tanh().tanh(), a * a
    run(in_chain)
    chain_grad = a.grad
    run(squared)
    print(f"{name:13}: tanh(tanh(a)) {chain_grad:.4f}, a·a {a.grad:.0f}")

# %% [markdown]
# The chain is right both times. The square of 3 has the derivative 6, and the bug says 3. In a Transformer every residual connection uses its input twice, so the bug would cut off half of the signal at each layer, and training would go on, badly. What catches it: a function in which something is used twice, and poking.

# %%
h = 1e-5
poked = ((3 + h) ** 2 - (3 - h) ** 2) / (2 * h)
a = Value(3.0)
squared = a * a
backward(squared)
assert math.isclose(a.grad, poked, rel_tol=1e-8)
print(f"poked: {poked:.4f}")

# %% [markdown]
# ## Notes on the sources
#
# **Baydin, Pearlmutter, Radul and Siskind 2018** (*Automatic differentiation in machine learning: a survey*). It separates numerical, symbolic and automatic differentiation, with the V of section 1 as its argument against the first. We found the same V. It gives the cost of a reverse pass as a small constant times that of the function; section 5 counts 2.75 for four layers.
#
# **Griewank and Walther 2008** (*Evaluating Derivatives*). The bound on that constant, five for a model of arithmetic in which every operation counts alike, is theirs. Ours is lower since matrix products, whose pull-back is two products, are nearly all of the work.
#
# **Frostig, Johnson and Leary 2018** (*Compiling machine learning programs via high-level tracing*). The paper that introduced JAX: pure functions, traced to a small language, compiled by XLA. What it presents as a restriction, purity, is the origin of every error in section 9.
#
# **Karpathy's micrograd.** The engine on numbers that made this subject teachable. Ours stores derivatives where his stores closures, which shows the chain rule as a sum of products on the edges of a graph. For arrays we need closures, too.
#
# ## Remember
#
# **Q:** What does reverse mode compute, and at what price?
#
# **A:** The derivative of one output by all inputs, for about three times the operations of the function, whatever the number of inputs.
#
# **Q:** Why are gradients added up in the backward pass?
#
# **A:** A number that is used several times reaches the output on several ways, and the chain rule adds the ways.
#
# **Q:** What is a column of the Jacobian, and what is a row, in JAX?
#
# **A:** A column is one jvp (forward mode), a row is one vjp (reverse mode).
#
# **Q:** When does the Python code of a jitted function run?
#
# **A:** Once for each new combination of shapes, types and static arguments, on tracers without values; later calls run the compiled program.
#
# **Q:** How do you test a gradient that somebody wrote by hand?
#
# **A:** Against central differences in double precision, at inputs where something is used twice and nothing is near zero.
#
# ## Exercises
#
# 1. **A new step.** Write `sigmoid` for `Tensor` as one step with its own pull-back. Success: equal to `1 / (1 + exp(−x))` in value, and its gradient within 1e-12 of $s(1-s)$.
# 2. **Forward mode.** Write a class `Dual` of a value and a tangent with `+`, `*` and `tanh`, and run the neuron on it. Success: the tangent equals `jax.jvp` for a random direction.
# 3. **A Hessian without a Hessian.** Multiply the Hessian of the bigram loss with a vector by composing `jvp` and `grad`, without forming the matrix. Success: equal to `jax.hessian` times the vector, for $V \times V$ weights.
# 4. **Memory for time.** `jax.checkpoint` forgets the values inside a function and computes them again on the way back. Wrap each layer of `mlp_loss` with it. Success: the same gradient, and the operations counted rise from 2.75 to about 3.75 forward passes. Say why.


# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution 1
def sigmoid(x: Tensor) -> Tensor:
    s = 1 / (1 + np.exp(-x.data))
    return Tensor(s, ((x, lambda g: g * s * (1 - s)),))


points = Tensor(np.linspace(-3, 3, 7))
gradients(total(sigmoid(points)))
s = 1 / (1 + np.exp(-points.data))
print("exercise 1:", np.abs(points.grad - s * (1 - s)).max() < 1e-12)
assert np.abs(points.grad - s * (1 - s)).max() < 1e-12


# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution 2
class Dual:
    """A value and the rate at which it moves."""

    def __init__(self, value, tangent):
        self.value, self.tangent = value, tangent

    def __add__(self, other):
        return Dual(self.value + other.value, self.tangent + other.tangent)

    def __mul__(self, other):
        tangent = self.value * other.tangent + self.tangent * other.value
        return Dual(self.value * other.value, tangent)

    def tanh(self):
        y = math.tanh(self.value)
        return Dual(y, (1 - y * y) * self.tangent)


point, direction = [0.5, 1.0, -0.3, 2.0, 0.2], [0.3, -0.1, 0.7, 0.2, 1.0]
w1, x1, w2, x2, bias = (Dual(*pair) for pair in zip(point, direction, strict=True))
ours = (w1 * x1 + w2 * x2 + bias).tanh().tangent
of_list = lambda v: jnp.tanh(v[0] * v[1] + v[2] * v[3] + v[4])  # noqa: E731
theirs = jax.jvp(of_list, (jnp.array(point),), (jnp.array(direction),))[1]
print(f"exercise 2: {ours:.4f} and {theirs:.4f}")
assert math.isclose(ours, theirs, rel_tol=1e-5)

# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution 3
logits = jnp.array(W0, jnp.float32)
vector_v = jax.random.normal(jax.random.key(3), logits.shape)
product = jax.jvp(jax.grad(jax_bigram_loss), (logits,), (vector_v,))[1]
full = jax.hessian(jax_bigram_loss)(logits).reshape(V * V, V * V) @ vector_v.ravel()
print("exercise 3:", np.allclose(product.ravel(), full, atol=1e-5))
assert np.allclose(product.ravel(), full, atol=1e-5)


# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution 4: the forward products of all layers are computed twice, 1 more of 4 + 4 + 3 over 4
def forgetful_loss(weights, x):
    for w in weights:
        x = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, w)
    return jnp.mean(x**2)


again = operations(jax.value_and_grad(forgetful_loss)) / operations(mlp_loss)
pair = [jax.tree.leaves(jax.grad(f)(weights, batch)) for f in (mlp_loss, forgetful_loss)]
print(f"exercise 4: {again:.2f} forward passes; same gradient:", end=" ")
print(all(np.allclose(a, b, atol=1e-6) for a, b in zip(*pair, strict=True)))
assert 3.6 < again < 3.9

# %% [markdown]
# ## References
#
# - A. G. Baydin, B. A. Pearlmutter, A. A. Radul, J. M. Siskind: Automatic differentiation in machine learning: a survey. *JMLR* 18, 2018. <https://arxiv.org/abs/1502.05767>
# - A. Griewank, A. Walther: *Evaluating Derivatives*, 2nd edition. SIAM, 2008.
# - R. Frostig, M. J. Johnson, C. Leary: Compiling machine learning programs via high-level tracing. SysML, 2018.
# - A. Karpathy: micrograd. <https://github.com/karpathy/micrograd>
# - Llama Team: *The Llama 3 Herd of Models*, §3.3, for what the sharding is for. <https://arxiv.org/abs/2407.21783>
#
# ## Next chapter
#
# Chapter 03 trains a neural language model, with gradients by hand and by `jax.grad`, and builds the training loop that the rest of the course uses.
