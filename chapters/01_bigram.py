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
# # 01 · Counting: bigrams and n-grams
#
# > Byte n-gram language models by counting, add-k, interpolation and Kneser–Ney, with compressors as rivals: the baseline of the whole course.
#
# *Reading time 35 min · runs in about 30 s · difficulty ●●○ · needs 00*

# %%
#| export
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

# %%
import re
from collections import Counter

import matplotlib.pyplot as plt

from llm_from_scratch import ledger
from llm_from_scratch.datasets import plays

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
train = [play.text.encode() for play in plays("train")]
validation = [play.text.encode() for play in plays("validation")]
running = b"To be, or not to be: that is the question:"
print(f"{sum(map(len, train)):,} bytes to count, {sum(map(len, validation)):,} to predict")

# %% [markdown]
# ## A game
#
# Cover the rest of this line with your hand and guess the next letter: *To be, or not to b*. Now a line that you do not know: *Full fathom five thy fath*. Now one whose first
# letter you must guess with nothing before it. You are good at the first two and bad at the third, and that difference is what a language model is about: **how much does the
# past tell about the next symbol?** Shannon played this game with people in 1951. We play it with a counter.
#
# Why begin with counting, in a course about Llama 3? Because it is the whole task in its smallest form: a context goes in, a distribution over the next symbol comes out, a number says how good it was. All later chapters
# replace only the middle. And because counting is strong: the table at the end of this chapter is the bar that every neural network here must clear.
#
# Our symbols are **bytes**: 256 of them, no unknown ones, the same for every text.
#
# ## The score: bits per byte
#
# A model gives each byte $b_i$ a probability, given the bytes before it. A good model makes the real text probable. We take the sum of the negative logarithms, in bits, over the number $N$ of bytes:
#
# $$ \text{bits per byte} = -\frac1N \sum_{i=1}^{N} \log_2 p(b_i \mid b_1 \dots b_{i-1}) . $$
#
# It has a plain meaning: an *arithmetic coder*, a program that turns probabilities into a file, needs that many bits for each byte with this model. A model that knows nothing says $1/256$ each time and scores 8. Libraries sum natural logarithms
# (nats), hence the division by $\ln 2$. *Perplexity*, the usual name in books, is two to the power of the bits: the number of equally likely choices that would be as hard.


# %%
#| export public workbook
def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Bits per byte: the summed negative log likelihood in nats over ln 2 and the number of bytes.

    `n_bytes` counts the UTF-8 bytes of the text, whatever tokens the model predicts.
    Raises ValueError unless `n_bytes` is positive.
    """
    if n_bytes <= 0:
        raise ValueError(f"n_bytes must be positive, got {n_bytes}")
    return float(nats) / math.log(2) / n_bytes


# %%
nothing_known = bits_per_byte(len(running) * math.log(256), len(running))
print(f"no knowledge: {nothing_known:.0f} bits per byte, perplexity {2**nothing_known:.0f}")
print(f"a coin: {bits_per_byte(len(running) * math.log(2), len(running)):.0f} bit, perplexity 2")

# %% [markdown]
# ## Counting, by hand
#
# An n-gram model looks back $n-1$ symbols and no further. For $n = 2$, a *bigram*, the context is one symbol. The maximum-likelihood estimate of a probability is the relative frequency:
#
# $$ p(w \mid c) = \frac{\mathrm{count}(c, w)}{\mathrm{count}(c)} . $$
#
# Jurafsky and Martin (chapter 3) do it by hand on three sentences: *I am Sam*, *Sam I am*, *I do not like green eggs and ham*, each with a start and an end sign. Do it yourself first: how probable is *am* after *I*? *Sam* after the start?

# %%
sentences = ["I am Sam .", "Sam I am .", "I do not like green eggs and ham ."]  # "." is the end
pairs: dict[str, Counter] = {}
for sentence in sentences:
    words = ["<s>", *sentence.split()]
    for before, word in zip(words, words[1:], strict=False):
        pairs.setdefault(before, Counter())[word] += 1
for before, word in (
    ("<s>", "I"),
    ("<s>", "Sam"),
    ("I", "am"),
    ("Sam", "."),
    ("am", "Sam"),
    ("I", "do"),
):
    print(f"p({word:3} | {before:3}) = {pairs[before][word]} / {pairs[before].total()}")

# %% [markdown]
# These six fractions, 2/3, 1/3, 2/3, 1/2, 1/2 and 1/3, are the ones in the book.
#
# ## Counting, fast
#
# A dictionary of counters is clear, and slow for four and a half million bytes. The fast way is to turn each context into one integer: read its symbols as digits in base 257, 256 bytes plus a sign START for "before the
# document". For `b"abc"` and $n = 3$ there are three windows:

# %%
#| export
BYTES = 256  # what is predicted
START = 256  # what stands before a document: a context symbol that is never predicted
SYMBOLS = 257
# %% [markdown]
# The context after $i$ symbols becomes $257 \cdot \text{context} + \text{symbol}$; for a whole document at once, that is one array operation per symbol of context.


# %%
#| export workbook
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


# %%
contexts, targets = windows([b"abc"], 3)
for context, target in zip(contexts, targets, strict=True):
    older, newer = divmod(int(context), SYMBOLS)
    print([older, newer], "→", int(target), repr(chr(target)))
assert (
    windows([b"abc", b"abc"], 3)[0].tolist() == contexts.tolist() * 2
)  # each document starts afresh

# %% [markdown]
# Every byte is predicted once, also the first of a document, and a document never sees the one before it. Six symbols in base 257 and a target byte need less than 63 bits, so one `int64` holds up to a 7-gram (START counts as a symbol), and sorting integers does the counting. We stop at $n = 6$.
# A table keeps, for one order, the n-grams with their counts; and for each context the *total* of the counts after it and the number of different bytes, its *types*. You will need all three.


# %%
#| export
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


# %%
#| export
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


# %% [markdown]
# One sort of the 6-grams is enough: the counts of the shorter ones are sums of those of the longer. To drop the oldest symbol of an n-gram is to drop the leading digit of its number, a remainder. The check sums six orders down to two, against the naive dictionary:

# %%
tables = count_tables(train, 6)
naive: dict[tuple[int, int], int] = Counter()
for document in train[:3]:
    for before, byte in zip([START, *document], document, strict=False):
        naive[before, byte] += 1
fast = count_tables(train[:3], 6)[1]
assert {divmod(int(g), BYTES): c for g, c in zip(fast.grams, fast.counts, strict=True)} == naive
print("different n-grams:", {t.order: len(t.grams) for t in tables})

# %% [markdown]
# ## The bigram model
#
# With $n = 2$ the whole model is a matrix: one row per byte before, one column per byte after, each row a distribution. The plot shows its part for the lower-case letters. Look for the row of *q*, the columns of the vowels,
# and the spaces that follow *d*, *e*, *s* and *y*.

# %%
bigram_counts = np.zeros((SYMBOLS, BYTES))
bigram_counts[tables[1].grams // BYTES, tables[1].grams % BYTES] = tables[1].counts
bigram_p = bigram_counts / np.maximum(bigram_counts.sum(1, keepdims=True), 1)
letters = " abcdefghijklmnopqrstuvwxyz"
codes = [ord(c) for c in letters]
fig, ax = plt.subplots(figsize=(6, 5.2))
picture = ax.imshow(bigram_p[np.ix_(codes, codes)], cmap="viridis", vmax=0.5)
names = list("␣" + letters[1:])
ax.set(
    xticks=range(27),
    xticklabels=names,
    yticks=range(27),
    yticklabels=names,
    xlabel="next byte",
    ylabel="byte before",
)
fig.colorbar(picture, label="probability", shrink=0.7, extend="max")
plt.show()
print(
    f"p(u | q) = {bigram_p[ord('q'), ord('u')]:.3f}, p(space | d) = {bigram_p[ord('d'), ord(' ')]:.2f}"
)

# %% [markdown]
# How well does it predict? On the training text itself the answer is the table's *conditional entropy*: the entropy of each row, weighted by how often its byte comes before. On a new text there is a trap, and it is worth walking into.


# %%
def mle_bits(documents: list[bytes]) -> tuple[float, int]:
    """Bits per byte under the plain relative frequencies, and how many bytes got probability 0."""
    count, total, _ = tables[1].look(*windows(documents, 2))
    with np.errstate(divide="ignore"):
        log_p = np.log(count / total)
    return bits_per_byte(-log_p.sum(), len(count)), int(np.sum(count == 0))


for name, documents in (("training", train), ("validation", validation)):
    bits, zeros = mle_bits(documents)
    print(f"{name:10} {bits:.3f} bits per byte, {zeros} impossible bytes")

# %% [markdown]
# A handful of bytes in two hundred thousand follow a byte that they never followed in training, and the score is infinite. One impossible event that happens is an infinite surprise. Whoever counts must say what unseen means.
#
# ### Add k
#
# The oldest answer: pretend to have seen everything $k$ times more,
#
# $$ p(w \mid c) = \frac{\mathrm{count}(c, w) + k}{\mathrm{count}(c) + 256\,k} . $$


# %%
#| export workbook
def add_k(count: np.ndarray, total: np.ndarray, k: float) -> np.ndarray:
    """(count + k) / (total + 256 k); uniform where that is 0/0, which is k = 0 in an unseen context."""
    denominator = total + BYTES * k
    return np.where(denominator > 0, (count + k) / np.maximum(denominator, 1e-300), 1 / BYTES)


# %%
hand = add_k(np.array([2.0, 0.0]), np.array([3.0, 3.0]), k=1.0)  # seen 2 of 3 times; not seen
assert np.allclose(hand, [3 / 259, 1 / 259])
assert add_k(np.array([0.0]), np.array([0.0]), k=0.0)[0] == 1 / 256  # nothing known
count, total, _ = tables[1].look(*windows(validation, 2))
for k in (0.01, 0.3, 1, 10, 100):
    print(f"k = {k:6}: {bits_per_byte(-np.log(add_k(count, total, k)).sum(), len(count)):.3f}")

# %% [markdown]
# For a bigram, a $k$ up to 1 hardly matters: most contexts were seen often. The last lines show what a large $k$ does: it drowns the counts.
#
# ## The same model, learned
#
# Now the bridge to everything that follows. Forget counting. Take a matrix $W$ of 257 × 256 numbers, all zero; call row $c$ of it the *logits* after byte $c$, and let
#
# $$ p(w \mid c) = \mathrm{softmax}(W_c)_w = \frac{e^{W_{cw}}}{\sum_v e^{W_{cv}}}, \qquad L(W) = -\frac1N \sum_{c, w} \mathrm{count}(c, w) \log p(w \mid c) . $$
#
# $L$ is the loss in nats per byte: the pairs of the text, grouped by their kind. Move $W$ against the gradient of $L$, again and again. Where must it end? Since $\log p(w \mid c) = W_{cw} - \log \sum_v e^{W_{cv}}$, and the second
# term has the derivative $p(w \mid c)$ with respect to $W_{cw}$ and stands once for every count of the row,
#
# $$ \frac{\partial L}{\partial W_{cw}} = \frac1N \bigl(\mathrm{count}(c)\, p(w \mid c) - \mathrm{count}(c, w)\bigr) . $$
#
# Set it to zero, and out comes the relative frequency. So counting is the solution of this training problem, and training is a slow way to count.
#
# This is the first JAX of the course. `jnp` is NumPy's interface on JAX arrays; `jax.grad(f)` is the function that computes the gradient of `f`; `jax.jit` compiles a function; `jax.lax.fori_loop` runs a compiled function many times.
# The gradient is divided by $N$ and therefore small, hence the large rate of 100. **Predict:** how close is the loss to the entropy of the table after 1,000 steps? A natural guess is a gap of a hundredth of a bit.

# %%
counts_on_device = jnp.asarray(bigram_counts, jnp.float32)


def loss(W, counts):
    """Cross entropy in nats per byte of all pairs, from their counts."""
    return -jnp.sum(counts * jax.nn.log_softmax(W)) / jnp.sum(counts)


best = float(
    -np.sum(bigram_counts * np.log(np.where(bigram_p > 0, bigram_p, 1))) / bigram_counts.sum()
)
descend = jax.jit(lambda W: W - 100.0 * jax.grad(loss)(W, counts_on_device))
W = jnp.zeros((SYMBOLS, BYTES))
for step in range(1, 1001):
    W = descend(W)
    if step in (1, 10, 100, 1000):
        gap = (float(loss(W, counts_on_device)) - best) / math.log(2)
        print(f"after {step:4} steps: {gap:.2f} bits above the table")
for name in " Z":
    print(f"share of the row {name!r}: {bigram_counts[ord(name)].sum() / bigram_counts.sum():.5f}")

# %% [markdown]
# It is on its way, and slow: the guess was too hopeful. The formula says why. The gradient of row $c$ carries the factor $\mathrm{count}(c) / N$. The row of the space has a large share, the row of *Z* almost none, and one learning rate must
# serve both. But the rows share no parameters. Dividing row $c$ of the loss by its own frequency changes the *path*, not the *minimum*. In that form the gradient is simply $p - \text{frequency}$, and every
# row moves at the same pace. The loss of a row curves by at most 1/2, and descent is stable for a rate below 2 over the curvature, that is 4: we take 3.


# %%
#| export workbook
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


# %% [markdown]
# Two checks. Against the raw counts the loss can only approach the table's from above, because a probability of exactly 0 needs a logit of minus infinity. Against the counts plus one, whose best logits are finite, the
# matrix should agree with add-one smoothing to about 1e-4: fp32 rounding stops the descent there.

# %%
#| claim S058
learned = learn_bigram(bigram_counts)
seen_rows = bigram_counts.sum(1) > 0
largest = np.abs(learned - bigram_p)[seen_rows].max()
gap = -np.sum(bigram_counts * np.log(learned)) / bigram_counts.sum() - best
plus_one = add_k(bigram_counts, bigram_counts.sum(1, keepdims=True), 1.0)
largest_plus_one = np.abs(learn_bigram(bigram_counts + 1) - plus_one).max()
assert 0 < gap / math.log(2) < 0.01 and largest < 0.001 and largest_plus_one < 0.0002
gap_bits = gap / math.log(2)
print(f"gap {gap_bits:.4f} bit, largest difference {largest:.4f}, plus one {largest_plus_one:.4f}")
ledger.claim(
    "S058",
    section="Jurafsky & Martin ch. 3",
    claim="the relative frequencies of a bigram are its maximum-likelihood estimate",
    predicted="gradient descent on each row's cross entropy, whose minimum is that of the likelihood, "
    "ends at the table of counts",
    measured=f"loss {gap_bits:.3f} bit above the table's, every probability within {largest:.4f}",
    verdict="reproduced",
    function="bigram.learn_bigram",
    test="tests/test_bigram.py::test_learned_is_counted",
)

# %% [markdown]
# Keep this picture in mind. A Transformer is this chapter with a better way to make the row of logits: instead of looking it up by the last byte, it computes it from the whole context.
#
# ## Longer contexts, and where counting stops working
#
# A bigram knows that *u* follows *q*. It cannot know that *father* follows *thy*. So look back further: $n$ up to 6, five symbols of context. **Predict** for the plain relative frequencies: as $n$ grows, how do the bits on
# the training text move? How many of the validation bytes meet a context that was never seen at $n = 6$? A natural guess: the bits fall below 2, and one context in ten is new.

# %%
rows = ["n   bits on training   contexts unseen   n-grams unseen"]
unseen = []
for table in tables:
    _, of_context, _ = table.look(table.grams // BYTES, table.grams % BYTES)
    fit_nats = -np.sum(table.counts * np.log(table.counts / of_context))
    fit_bits = bits_per_byte(fit_nats, sum(map(len, train)))
    count, total, _ = table.look(*windows(validation, table.order))
    unseen.append((np.mean(total == 0), np.mean(count == 0)))
    rows.append(f"{table.order} {fit_bits:14.2f} {unseen[-1][0]:19.3%} {unseen[-1][1]:16.3%}")
print("\n".join(rows))
assert 0.1 < unseen[5][1] < 0.15

# %% [markdown]
# The training text becomes ever easier: the table is on its way to learn it by heart. The guess for the contexts was too high, but every eighth 6-gram of the validation plays has never been seen, although the table has almost
# seven hundred thousand rows. (The columns are shifted copies: the contexts of order $n$ are nearly the n-grams of order $n-1$.) More text helps (exercise 2 measures how much), but every new play brings its own words, and each step up in $n$
# multiplies the different n-grams by two to ten, a factor of 23 at first. This is where counting stops. It knows a context only in exactly the form in which it was seen.
#
# ### A clean place to choose numbers
#
# The smoothing methods have parameters. They may be chosen neither on the training counts (where no smoothing is always best) nor on the validation plays (we report those). So five of the training plays
# are held out *inside* the training set: count on the others, choose on these, then count everything again with the chosen parameters.

# %%
held_out = train[::8]
counted = [document for i, document in enumerate(train) if i % 8]
part_tables = count_tables(counted, 6)
print(f"{len(counted)} plays to count, {len(held_out)} to choose on")
assert not set(held_out) & set(counted) and not set(held_out) & set(validation)

# %% [markdown]
# ### Interpolation
#
# An unseen 6-gram ends in a 5-gram that may have been seen. Jelinek and Mercer mix all orders: with a weight $\lambda_n$ for each,
#
# $$ p_n(w \mid c) = \lambda_n \frac{\mathrm{count}(c, w)}{\mathrm{count}(c)} + (1 - \lambda_n)\, p_{n-1}(w \mid c'), $$
#
# where $c'$ is $c$ without its oldest symbol, and below order 1 stands the uniform 1/256. Where $c$ was never seen, all weight goes to the shorter context. If both parts sum to 1 over $w$, so does the mixture.


# %%
#| export workbook
def interpolate(count, total, weight: float, lower: np.ndarray) -> np.ndarray:
    """weight · count / total + (1 − weight) · lower, or `lower` where the context is unseen.

    Arrays of one shape; `weight` is a number or such an array.
    """
    mixed = weight * count / np.maximum(total, 1) + (1 - weight) * lower
    return np.where(total > 0, mixed, lower)


# %%
mixed = interpolate(np.array([3.0, 0.0]), np.array([4.0, 0.0]), 0.5, np.array([0.25, 0.25]))
assert np.allclose(mixed, [0.5 * 0.75 + 0.5 * 0.25, 0.25])  # seen context; unseen context
print(mixed)

# %% [markdown]
# The weights come from the held-out plays by expectation–maximisation. Ask of each of the $M$ held-out bytes with a known context with what probability the longer order, and not the shorter one, produced it; the new weight is the average:
#
# $$ \lambda \leftarrow \frac1M \sum_{i=1}^{M} \frac{\lambda f_i}{\lambda f_i + (1 - \lambda)\, p_{n-1}(b_i \mid c'_i)}, \qquad f_i = \frac{\mathrm{count}(c_i, b_i)}{\mathrm{count}(c_i)} . $$
#
# No step makes the held-out bytes less probable. Order by order, the lowest first. For add-k we try a grid. For $n = 1$ any small $k$ does.


# %%
#| export
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


# %%
weights = tune(6, "interpolation", part_tables, held_out)
print("weights of the orders 1 to 6:", [round(w, 3) for w in weights])
best_k = {n: tune(n, "add-k", part_tables, held_out)[0] for n in range(1, 7)}
print("best k:", {n: round(k, 4) for n, k in best_k.items()})
assert weights[5] < weights[3] < weights[1]

# %% [markdown]
# The longer the context, the less its own counts are trusted: at order 6 about half of the weight goes down.
#
# ### Kneser–Ney
#
# Interpolation has two weaknesses. It trusts a context seen once as much as one seen a thousand times. And it asks the lower order the wrong question. Two ideas mend them.
#
# **Absolute discounting.** Compare counts in two halves of a text: a 6-gram that came $r$ times in one half comes a bit less than $r$ times in the other. How much less?

# %%
one_half, other_half = (count_tables(train[start::2], 6)[-1] for start in (0, 1))
there = _lookup(other_half.grams, other_half.counts, one_half.grams)
for r in (1, 2, 3, 4, 6, 10):
    mean_there = there[one_half.counts == r].mean()
    print(f"{r:2} times in one half: {mean_there:5.2f} in the other, {r - mean_there:.2f} less")

# %% [markdown]
# Less by an amount that grows slowly with $r$, from 0.4 to almost 0.9; we take it as constant. So take a constant $d$ from every count that is not 0, and hand what was
# taken to the lower order. A context with many different successors, each seen once, hands on a large part; one with a single frequent successor almost nothing.
#
# **Continuation counts.** The lower order is asked only when the higher one has little to say. The classic example is *Francisco*: a frequent word, but nearly always after *San*, so a bad guess in a new context. The lower
# order should count in how many *different* contexts a symbol has been seen, and not how often:
#
# $$ p_n(w \mid c) = \frac{\max(a(c, w) - d_n, 0)}{a(c)} + \frac{d_n\, t(c)}{a(c)}\; p_{n-1}(w \mid c') . $$
#
# At the highest order $a(c, w)$ is the count; below it, the number of different symbols (START is one) that have stood before $cw$. $a(c) = \sum_w a(c, w)$, and $t(c)$ is the number of different $w$ after $c$. Below order 1 stands $p_0 = 1/256$.
# This is the *interpolated* form with one discount for each order, $d_n = m_1 / (m_1 + 2 m_2)$, where $m_1$ and $m_2$ are the numbers of n-grams with $a = 1$ and $a = 2$. The method is Kneser and Ney's (1995); the interpolated form is Chen and Goodman's (1999), whose
# *modified* form has three discounts.


# %%
#| export workbook
def kneser_ney(count, total, types, discount: float, lower: np.ndarray) -> np.ndarray:
    """max(count − d, 0) / total + d · types / total · lower, or `lower` where the context is unseen.

    Arrays of one shape. `types` is the number of different bytes seen after the context: what the
    discounts took away is handed on, so the sum over the bytes stays 1.
    """
    kept = np.maximum(count - discount, 0) / np.maximum(total, 1)
    handed_on = discount * types / np.maximum(total, 1)
    return np.where(total > 0, kept + handed_on * lower, lower)


# %% [markdown]
# The counts $a$ of the lower orders come from the tables that we have: each different n-gram of the order above is one left neighbour.


# %%
#| export
def continuation_tables(tables: list[Table]) -> list[Table]:
    """The tables of Kneser–Ney: below the highest order, an n-gram counts its different left neighbours."""
    lower = []
    for above in tables[1:]:
        grams, neighbours = np.unique(_shorter(above), return_counts=True)
        lower.append(_table(above.order - 1, grams, neighbours.astype(np.float64)))
    return [*lower, tables[-1]]


# %%
seen_often = kneser_ney(np.array([8.0]), np.array([10.0]), np.array([2.0]), 0.5, np.array([0.1]))
assert np.allclose(seen_often, 7.5 / 10 + 0.5 * 2 / 10 * 0.1)
two = count_tables([b"an and ban"], 2)
frequent, spread = two[0], continuation_tables(two)[0]
for letter in b"an ":
    count, _, _ = frequent.look(np.array([0]), np.array([letter]))
    lefts, _, _ = spread.look(np.array([0]), np.array([letter]))
    print(f"{chr(letter)!r} comes {count[0]:.0f} times, after {lefts[0]:.0f} different symbols")

# %% [markdown]
# In "an and ban" the letter *n* comes three times, but only ever after *a*: as a guess in a new context it counts once. The letter *a* comes as often, after three different symbols.
#
# The discounts are estimated. Interpolation and Kneser–Ney share one recursion from the shortest context to the longest, add-k looks at one table only, and one class goes around all three.


# %%
#| export
def discount_of(table: Table) -> float:
    """Ney's estimate of the discount, n1 / (n1 + 2 n2), from the n-grams counted once and twice."""
    once, twice = np.sum(table.counts == 1), np.sum(table.counts == 2)
    return float(once / (once + 2 * twice)) if once else 0.5


# %%
#| export
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


# %% [markdown]
# Impossible models are refused, with a message that says what would be possible.


# %%
#| export
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


# %% [markdown]
# The class holds the choice of order, method and parameters. `fit` counts, `log_prob` scores documents, `probabilities` gives the distribution after one context.


# %%
#| export public
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


# %% [markdown]
# The most important check of a smoothed model: **for every context, the 256 probabilities sum to 1.** A model that leaks probability looks worse than it is; one that creates it looks better, and wins prizes that it must give back.
# We ask at a hundred places of the validation plays, and in a context that no play contains.

# %%
models = {
    (n, method): NGram(
        n, method, {"add-k": [best_k[n]], "interpolation": weights[:n]}.get(method)
    ).fit(train, tables)
    for n in range(1, 7)
    for method in NGram.METHODS
}
for model in models.values():
    asked = np.append(windows(validation, model.n)[0][::2000], windows([b"zqzqzq"], model.n)[0][-1])
    every_byte = np.tile(np.arange(BYTES), len(asked))
    p = smoothed(model.tables, model.method, model.parameters, asked.repeat(BYTES), every_byte)
    assert np.allclose(p.reshape(-1, BYTES).sum(1), 1, atol=1e-9)
print(f"{len(models)} models × {len(asked)} contexts: every sum is 1")

# %% [markdown]
# ## The table
#
# **Predict** the best cell, and the worst method at $n = 6$. Reason first: add-k must turn round somewhere, because in an unseen context it falls back to the uniform distribution, with nothing between. And our number,
# fixed before the first run: Kneser–Ney is best at $n = 6$, ahead of interpolation by more than 0.02 bits per byte.


# %%
#| export
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


# %%
bits = {key: model_bits(model, validation) for key, model in models.items()}
print("n  " + "  ".join(f"{m:>13}" for m in NGram.METHODS))
for n in range(1, 7):
    print(f"{n}  " + "  ".join(f"{bits[n, m]:13.3f}" for m in NGram.METHODS))
best_model = min(bits, key=bits.get)
print("best:", best_model, f"perplexity {2 ** bits[best_model]:.2f} per byte")
assert best_model == (6, "kneser-ney") and bits[6, "add-k"] > bits[5, "add-k"]

# %% [markdown]
# Both predictions hold so far: Kneser–Ney is best at $n = 6$, and add-k turns round after $n = 5$. But the methods separate only from $n = 4$ on; at $n = 3$ interpolation is even a little ahead. Left: the methods from $n = 3$ on. Look for
# the turn of add-k, and for the gap that opens between the other two. Right: the reason, the share of the validation bytes whose context or whose n-gram was never seen.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
for method, marker in zip(NGram.METHODS, "sov", strict=True):
    left.plot(range(1, 7), [bits[n, method] for n in range(1, 7)], marker + "-", label=method)
left.set(
    xlabel="order n",
    ylabel="bits per byte, validation",
    xticks=range(3, 7),
    xlim=(2.8, 6.2),
    ylim=(2.1, 3.0),
)
left.legend()
right.plot(range(1, 7), [100 * n_gram for _, n_gram in unseen], "o-", label="n-gram unseen")
right.plot(range(1, 7), [100 * context for context, _ in unseen], "s-", label="context unseen")
right.set(xlabel="order n", ylabel="% of validation bytes", xticks=range(1, 7))
right.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# ### Is the difference real?
#
# Two validation plays are few. They have five acts each, and ten paired differences make an interval. (Acts of a play are not fully independent: the true uncertainty is larger.)


# %%
def act_bits(log_p: np.ndarray) -> np.ndarray:
    """Bits per byte of each act of the validation plays, from the log probability of every byte."""
    scores, at = [], 0
    for document in validation:
        starts = [at + m.start() for m in re.finditer(rb"^ACT ", document, re.M)]
        at += len(document)
        ends = [*starts[1:], at]
        pieces = zip(starts, ends, strict=True)
        scores += [bits_per_byte(-log_p[a:b].sum(), b - a) for a, b in pieces]
    return np.array(scores)


by_act = {method: act_bits(models[6, method].log_prob(validation)) for method in NGram.METHODS}
assert len(by_act["add-k"]) == 10 and np.all(by_act["add-k"] > by_act["interpolation"])
one_weight = ledger.interval(by_act["interpolation"] - by_act["kneser-ney"], "bits per byte")
print("interpolation with one weight per order − Kneser–Ney:", one_weight)

# %% [markdown]
# More than 0.02, as predicted. But is the rival fair? We blamed interpolation for trusting a context seen once as much as one seen a thousand times. That is a fault of *one weight per order*, and Jelinek and Mercer did not stop there: they let
# $\lambda$ depend on the counts of the context. Chen and Goodman sort the contexts into buckets by the mean count of their different successors, total over types, and that takes twenty lines: a weight for each order and each bucket,
# four buckets to a doubling. (Buckets by the total alone did worse on the held-out plays.) **Predict** how much of the gain of Kneser–Ney is left.


# %%
def by_bucket(tables, documents, weights=None):
    """Probabilities of an interpolation with a weight per order and bucket of the context's mean count.

    Without `weights` they are fitted to the documents. Returns the probabilities and the weights.
    """
    contexts, targets = windows(documents, 6)
    p, used = np.full(len(targets), 1 / BYTES), []
    for table in tables:
        count, total, types = table.look(contexts % SYMBOLS ** (table.order - 1), targets)
        bucket = (4 * np.log2(np.maximum(total, 1) / np.maximum(types, 1))).astype(int)
        if weights is None:
            parts = [bucket == i for i in range(80)]
            row = np.array([_tune_weight(count[i], total[i], p[i]) for i in parts])
        else:
            row = weights[table.order - 1]
        used.append(row)
        p = interpolate(count, total, row[bucket], p)
    return p, used


_, bucket_weights = by_bucket(part_tables, held_out)
print("order 6, mean count 1, 2, 4, 8, 16:", bucket_weights[5][:17:4].round(2).tolist())

# %%
#| claim S059
bucketed = np.log(by_bucket(tables, validation, bucket_weights)[0])
bucketed_bits = bits_per_byte(-bucketed.sum(), len(bucketed))
print(f"interpolation with bucketed weights: {bucketed_bits:.3f}")
gain = ledger.interval(act_bits(bucketed) - by_act["kneser-ney"], "bits per byte")
assert gain.mean < one_weight.mean / 3
ledger.claim(
    "S059",
    section="Jurafsky & Martin ch. 3",
    claim="Kneser–Ney predicts unseen text better than linear interpolation, its weights by the "
    "mean count after the context (n = 6; ten acts of two plays)",
    predicted=ledger.at_least(0.02, "bits per byte"),
    measured=gain,
    verdict="absent",
    function="bigram.NGram",
    test="tests/test_bigram.py::test_kneser_ney_agrees_with_nltk",
)

# %% [markdown]
# Against the fair rival the gain is gone: *absent*, on these ten acts. What Kneser–Ney keeps is that its discounts are a formula, while these weights had to be fitted to held-out plays. We keep it as our best n-gram for that, and learn
# something larger: an improvement is measured against the best that the old method can do, or it is not measured.
#
# ### What the models write
#
# A sample shows what a score hides. Start with nothing and draw byte after byte. Look for the order at which you first see words, names, the shape of a play.

# %%
for n in (1, 2, 3, 4, 6):
    text = sample(models[n, "kneser-ney"], np.random.default_rng(0), 130)
    print(f"--- n = {n}\n{text.decode(errors='replace')}")

# %% [markdown]
# Single letters at 1, pairs that can be spoken at 2, first short words and a name in capitals at 3; at 6 nearly all is English, in lines, and means nothing. It has no memory beyond five bytes: it cannot close a bracket, keep a speaker, or finish a thought.
#
# ## The rivals: compressors
#
# Every compressor contains a predictor, so it can be scored on the same scale: the compressed size in bits over the bytes. *Cold* it knows nothing before the first byte, which is unfair, since our models have read 34 plays. *Primed* it has:
#
# $$ \text{primed} = 8\,\frac{|c(\text{train} + \text{validation})| - |c(\text{train})|}{|\text{validation}|} . $$

# %%
#| export
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


# %% [markdown]
# **Predict** which of the three profits most from priming, and whether it beats the counter. Think of how far each can look back: gzip has a window of 32 kB; bzip2 works on separate blocks of 900 kB; xz, at its standard level, keeps a dictionary of 8 MB. A natural guess: only xz
# profits, and it comes close to the 6-gram, because phrases come back.

# %%
library, fresh = b"".join(train), b"".join(validation)
squeezed = {
    name: (compressed_bits(name, fresh), compressed_bits(name, fresh, library))
    for name in COMPRESSORS
}
for name, (cold, primed) in squeezed.items():
    print(f"{name:6} cold {cold:.3f}   primed {primed:.3f}   gain {cold - primed:.3f}")
assert squeezed["xz"][0] - squeezed["xz"][1] > 0.3 > squeezed["gzip"][0] - squeezed["gzip"][1]
assert bits[6, "kneser-ney"] < min(primed for _, primed in squeezed.values())

# %% [markdown]
# (The sizes are those of the libraries zlib, bzip2 and liblzma that Python was built with; a rewrite such as zlib-ng gives slightly others.) Only xz can use what it was shown: to gzip and bzip2 the library is mostly out of sight by the time the new text begins. Cold, bzip2 beats xz: it sorts the bytes by their context, which suits short texts. Even primed, xz is beaten clearly by a table of 6-grams; the guess was
# wrong there. xz copies passages that it has seen word for word; a new play has few, and the counter predicts what it has seen only in part.
#
# ### The baseline of the course
#
# These are the numbers that later chapters load and compare with. "unigram" and "bigram" are the add-k models.

# %%
ledger.result(
    "unigram", bits[1, "add-k"], "bits per byte", "add-k, k chosen inside the training plays"
)
ledger.result(
    "bigram", bits[2, "add-k"], "bits per byte", "add-k, k chosen inside the training plays"
)
ledger.result(
    "best n-gram",
    bits[best_model],
    "bits per byte",
    "6-gram, interpolated Kneser–Ney; order and method compared on validation",
)
for name in COMPRESSORS:
    for state, value in zip(("cold", "primed"), squeezed[name], strict=True):
        note = (
            "after the training plays"
            if state == "primed"
            else "knows nothing before the first byte"
        )
        ledger.result(f"{name} {state}", value, "bits per byte", note)

# %% [markdown]
# ## Unknown words
#
# Had we counted words and not bytes, there would be one more problem: words that the training text does not have at all. Books replace rare words by a sign `<UNK>`, which makes scores incomparable: the more words a model calls unknown, the easier its task.
# **Predict** the share of word occurrences of the validation plays that no training play contains. A natural guess is 5 %, since most of a text is common words.


# %%
def words_of(documents: list[bytes]) -> list[str]:
    """The words of the documents, in lower case."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?", b" ".join(documents).decode().lower())


vocabulary = set(words_of(train))
new_words = [word for word in words_of(validation) if word not in vocabulary]
share = len(new_words) / len(words_of(validation))
print(
    f"unknown: {share:.1%} of the word occurrences, such as {', '.join(sorted(set(new_words))[200:206])}"
)
print("unknown bytes:", len(set(fresh) - set(library)))
assert 0.02 < share < 0.06

# %% [markdown]
# Bytes know no unknown word, at the price of longer sequences. Chapter 07 finds the middle: pieces of words, with bytes as the last resort.
#
# ## Break it
#
# A bug that looks like a discovery. In `add_k` the denominator needs 256 $k$, once for each byte that *could* come. Suppose somebody writes the number of bytes that *did* come after this context instead. It reads well ("smooth over the seen vocabulary"), and the score improves.
# What share of the gain comes from contexts that were never seen?


# %%
def add_k_bug(count, total, types, k):
    """k for every byte in the numerator, but only for the seen ones in the denominator."""
    return (count + k) / np.maximum(total + types * k, k)


count, total, types = tables[5].look(*windows(validation, 6))
new = total == 0
print("bits per byte      right   from new contexts   with the bug   from new contexts")
for k in (best_k[6], 1.0, 100.0):
    right = -np.log2(add_k(count, total, k)) / len(count)
    wrong = -np.log2(add_k_bug(count, total, types, k)) / len(count)
    sums = (right.sum(), right[new].sum(), wrong.sum(), abs(wrong[new].sum()))
    print(f"k = {k:8.4f} {sums[0]:11.3f} {sums[1]:19.3f} {sums[2]:14.3f} {sums[3]:19.3f}")
    if k == 1:
        assert wrong.sum() < bits[best_model] - 0.3

# %% [markdown]
# With $k = 1$ it looks far better than Kneser–Ney. In a new context the bug gives *every* byte the probability 1, so those bytes cost nothing, at any $k$; at the small $k$ that is right that is most of the gain. In the contexts that were seen, a larger $k$ hands out probability that nobody has, which pays until $k$ drowns the counts. The
# symptom is a score that is too good. The check that catches it is the sum over all bytes, in a frequent, a rare and an unseen context:

# %%
everything = np.arange(BYTES)
for text in (b"to be ", b"fathom ", b"zqzqzq "):
    context = windows([text], 6)[0][-1:].repeat(BYTES)
    count, total, types = tables[5].look(context, everything)
    right, wrong = add_k(count, total, 1.0).sum(), add_k_bug(count, total, types, 1.0).sum()
    print(f"after {text[-6:-1].decode()!r}: right {right:.3f}, with the bug {wrong:.1f}")

# %% [markdown]
# ## Notes on the sources
#
# - **Jurafsky and Martin, chapter 3.** We reproduced the small bigram table, the maximum-likelihood estimate (by learning it), and of the order of the methods at $n = 6$ one half: both are far ahead of add-k, while Kneser–Ney's lead over interpolation vanished when the weights of interpolation were well chosen. They count words; at the level of bytes every short context is
#   seen, so the methods separate only from $n = 4$ on. For large corpora they mention *stupid back-off*, which gives up the sum to 1; we do not, since a score that is not a probability cannot be compared.
# - **Chen and Goodman (1999)** found modified Kneser–Ney best over many corpora. We use one discount per order and have not measured the difference.
# - **Shannon (1951)** put the entropy of printed English between about 0.6 and 1.3 bits per letter, for readers, with an alphabet of 27 signs. Our bytes have capitals, punctuation, line ends and speakers' names, so his numbers are not
#   a bound for ours; they do say that much is left to gain.
# - **Is the table fair?** The n-grams and the primed compressors have seen the same training bytes and are scored on the same validation bytes. n-grams reset their context at each play and compressors run on; for two plays that is nothing.
#
# ## Remember
#
# **Q:** What is the maximum-likelihood estimate of p(w | c), and what is wrong with it?
# **A:** count(c, w) / count(c). It gives 0 to what was not seen, and one such byte makes the score infinite.
#
# **Q:** To which probabilities does gradient descent on a matrix of bigram logits converge?
# **A:** To the relative frequencies: counting is the closed-form solution.
#
# **Q:** What are the two ideas of Kneser–Ney?
# **A:** Take a constant from every count and hand it to the lower order; let the lower order count different contexts instead of occurrences.
#
# **Q:** On which text may smoothing parameters be chosen?
# **A:** On a part of the training text that was not counted, never on the text that is reported.
#
# **Q:** Which check exposes a smoothing bug that improves the score?
# **A:** The sum over all next bytes, in every context, must be 1.
#
# ## Exercises
#
# **1. Add-one on the three sentences.** With a vocabulary of the 11 words (the end sign is one), what is the add-one probability of *am* after *I*? *Success:* 3/14.

# %% tags=["solution"] jupyter={"source_hidden": true}
kinds = {word for counter in pairs.values() for word in counter}
smoothed_am = (pairs["I"]["am"] + 1) / (pairs["I"].total() + len(kinds))
assert len(kinds) == 11 and smoothed_am == 3 / 14
print(f"{smoothed_am:.3f} instead of {2 / 3:.3f}: add-one moves a lot in a small table")

# %% [markdown]
# **2. How much does more text help?** Fit the Kneser–Ney 6-gram on 4, 8, 17 and all 34 training plays, taken in two random orders, and score both validation plays together. *Success:* a table of means,
# and a guess from the last doubling of how many more doublings would reach 2.0 bits per byte.

# %% tags=["solution"] jupyter={"source_hidden": true}
curves = []
for seed in range(2):
    order = np.random.default_rng(seed).permutation(len(train))
    fits = [NGram(6).fit([train[i] for i in order[:k]]) for k in (4, 8, 17)]
    curves.append([model_bits(model, validation) for model in fits] + [bits[6, "kneser-ney"]])
curve = np.mean(curves, axis=0)
doublings = (curve[-1] - 2.0) / (curve[-2] - curve[-1])
print("bits per byte after 4, 8, 17, 34 plays:", [round(float(b), 2) for b in curve])
print(f"about {doublings:.1f} more doublings, if each gained as much as the last")
assert all(np.diff(curve) < 0) and 1 < doublings < 4

# %% [markdown]
# **3. Surprise, byte by byte.** Print the bits that the best model pays for each byte of the running line (as a document of its own), and explain the most expensive ones. The line is from a training play: why is it not free? *Success:* the letters
# that begin words cost at least twice as much as the other letters, and you can say why the signs `:` and `,` cost more still.

# %% tags=["solution"] jupyter={"source_hidden": true}
cost = -models[best_model].log_prob([running]) / math.log(2)
shown = running.decode().replace(" ", "␣")
print("  ".join(f"{char}{c:.1f}" for char, c in zip(shown, cost, strict=True)))
letter = np.array([chr(b).isalpha() for b in running])
first = letter & np.array([i == 0 or running[i - 1 : i] == b" " for i in range(len(running))])
sign = np.array([b in b":," for b in running])
assert cost[first].mean() > 2 * cost[letter & ~first].mean() and cost[sign].mean() > 7
print("first letters", cost[first].mean().round(1), "signs", cost[sign].mean().round(1))
# Within a word five bytes nearly fix the next one; what word comes next they do not say, and even
# less that a sentence stops here. Five bytes of a known line stand in many other lines too.

# %% [markdown]
# **4. Bits per letter, the book's perplexity.** A model with 2.2 bits per byte: what is its perplexity per word of 5.7 bytes (with the space)? *Success:* about 6,000, and you can say why nobody should compare it with a word model's perplexity over a closed vocabulary.

# %% tags=["solution"] jupyter={"source_hidden": true}
per_word = 2 ** (2.2 * 5.7)
assert 5500 < per_word < 6500
print(
    f"{per_word:,.0f}: it also pays for spelling words, which a closed vocabulary gets for nothing"
)

# %% [markdown]
# ## References
#
# - D. Jurafsky and J. H. Martin, *Speech and Language Processing*, 3rd edition draft, chapter 3, *N-gram Language Models*.
# - C. E. Shannon (1951), *Prediction and Entropy of Printed English*, Bell System Technical Journal 30.
# - R. Kneser and H. Ney (1995), *Improved backing-off for m-gram language modeling*, ICASSP.
# - S. F. Chen and J. Goodman (1999), *An empirical study of smoothing techniques for language modeling*, Computer Speech and Language 13.
# - F. Jelinek and R. L. Mercer (1980), *Interpolated estimation of Markov source parameters from sparse data*.
#
# **Next chapter on the straight road:** 02 opens the box of automatic differentiation that `jax.grad` hid here; [03 · Training](03_training.ipynb) then gives the contexts that were never seen a chance, by putting similar ones close together.
