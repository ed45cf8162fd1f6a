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
# It has a plain meaning: with this model and an arithmetic coder, the file takes that many bits for each byte. A model that knows nothing says $1/256$ each time and scores 8. Libraries sum natural logarithms
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


# %%
#| export workbook
def windows(documents: Iterable[bytes], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Every byte with the n − 1 symbols before it, as (contexts, targets), int64, one entry a byte.

    A context is a number in base 257, its newest symbol last; before a document stands START.
    """
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
# Every byte is predicted once, also the first of a document, and a document never sees the one before it. Five symbols in base 257 and a target byte need less than 63 bits, so one `int64` holds a 6-gram, and sorting integers does the counting.
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
    """The n-grams of one order with their counts, and for each context their total and their number."""

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
    """The n-grams of a table without their oldest symbol."""
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


def continuation_tables(tables: list[Table]) -> list[Table]:
    """The tables of Kneser–Ney: below the highest order, an n-gram counts its different left neighbours."""
    lower = []
    for above in tables[1:]:
        grams, neighbours = np.unique(_shorter(above), return_counts=True)
        lower.append(_table(above.order - 1, grams, neighbours.astype(np.float64)))
    return [*lower, tables[-1]]


# %% [markdown]
# One sort of the 6-grams is enough: the counts of the shorter ones are sums of those of the longer. (The function `continuation_tables` is for Kneser–Ney, below.) The check against the naive dictionary:

# %%
tables = count_tables(train, 6)
naive: dict[tuple[int, int], int] = Counter()
for document in train[:3]:
    for before, byte in zip([START, *document], document, strict=False):
        naive[before, byte] += 1
fast = count_tables(train[:3], 2)[1]
assert {divmod(int(g), BYTES): c for g, c in zip(fast.grams, fast.counts, strict=True)} == naive
print("different n-grams:", {t.order: len(t.grams) for t in tables})

# %% [markdown]
# ## The bigram model
#
# With $n = 2$ the whole model is a matrix: one row per byte before, one column per byte after, each row a distribution. The plot shows its part for the small letters. Look for the row of *q*, the columns of the vowels,
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
fig.colorbar(picture, label="probability", shrink=0.7)
plt.show()
print(
    f"p(u | q) = {bigram_p[ord('q'), ord('u')]:.3f}, p(space | d) = {bigram_p[ord('d'), ord(' ')]:.2f}"
)

# %% [markdown]
# How well does it predict? On the training text itself the answer is the entropy of the table. On a new text there is a trap, and it is worth walking into.


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
# A handful of pairs in two hundred thousand bytes were never seen, and the score is infinite. One impossible event that happens is an infinite surprise. Whoever counts must say what unseen means.
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
# For a bigram, $k$ hardly matters: every context was seen often. Remember the last line for later: large $k$ drowns the counts.
#
# ## The same model, learned
#
# Now the bridge to everything that follows. Forget counting. Take a matrix $W$ of 257 × 256 numbers, all zero; call row $c$ of it the *logits* after byte $c$, and let
#
# $$ p(w \mid c) = \mathrm{softmax}(W_c)_w = \frac{e^{W_{cw}}}{\sum_v e^{W_{cv}}}, \qquad L(W) = -\frac1N \sum_{c, w} \mathrm{count}(c, w) \log p(w \mid c) . $$
#
# $L$ is the loss in nats per byte: the pairs of the text, grouped by their kind. Move $W$ against the gradient of $L$, again and again. Where must it end? Set the gradient to zero:
# $\partial L / \partial W_{cw} = \frac1N (\mathrm{count}(c)\, p(w \mid c) - \mathrm{count}(c, w))$, and out comes the relative frequency. So counting is the solution of this training problem, and
# training is a slow way to count. **Predict:** how close is the loss to the entropy of the table after 1,000 steps? We expected a gap of a hundredth of a bit.

# %%
counts_on_device = jnp.asarray(bigram_counts, jnp.float32)


def loss(W, counts):
    """Cross entropy in nats per byte of all pairs, from their counts."""
    return -jnp.sum(counts * jax.nn.log_softmax(W)) / jnp.sum(counts)


assert 0.14 < bigram_counts[ord(" ")].sum() / bigram_counts.sum() < 0.19
best = float(
    -np.sum(bigram_counts * np.log(np.where(bigram_p > 0, bigram_p, 1))) / bigram_counts.sum()
)
descend = jax.jit(lambda W: W - 100.0 * jax.grad(loss)(W, counts_on_device))  # jit: chapter 03
W = jnp.zeros((SYMBOLS, BYTES))
for step in range(1, 1001):
    W = descend(W)
    if step in (1, 10, 100, 1000):
        gap = (float(loss(W, counts_on_device)) - best) / math.log(2)
        print(f"after {step:4} steps: {gap:.2f} bits above the table")

# %% [markdown]
# It gets there, and slowly: we were too hopeful. The formula says why. The gradient of row $c$ carries the factor $\mathrm{count}(c) / N$. The row of the space gets about one pair in six, the row of *Z* almost none, and one learning rate must
# serve both. But the rows share no parameters. Dividing row $c$ of the loss by its own frequency changes the *path*, not the *minimum*. In that form the gradient is simply $p - \text{frequency}$, and every row moves at the same pace.


# %%
#| export workbook
def learn_bigram(counts: np.ndarray, steps: int = 5000, rate: float = 3.0) -> np.ndarray:
    """Next-byte probabilities (257, 256) of a matrix of logits trained by gradient descent.

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
# matrix should agree with add-one smoothing to the last digits of fp32.

# %%
#| claim S058
learned = learn_bigram(bigram_counts)
seen_rows = bigram_counts.sum(1) > 0
largest = np.abs(learned - bigram_p)[seen_rows].max()
gap = -np.sum(bigram_counts * np.log(learned)) / bigram_counts.sum() - best
plus_one = add_k(bigram_counts, bigram_counts.sum(1, keepdims=True), 1.0)
largest_plus_one = np.abs(learn_bigram(bigram_counts + 1) - plus_one).max()
assert 0 < gap / math.log(2) < 0.01 and largest < 0.001 and largest_plus_one < 0.0002
ledger.claim(
    "S058",
    section="ch. 3",
    claim="the relative frequency of an n-gram is its maximum-likelihood estimate",
    predicted="gradient descent on the likelihood ends at the table of counts",
    measured="learned and counted bigram: loss within 0.01 bit, every probability within 0.001",
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
# the training text move? How many of the validation bytes meet a context that was never seen?

# %%
rows = ["n   bits on training   contexts unseen   n-grams unseen"]
unseen = []
for table in tables:
    _, of_context, _ = table.look(table.grams // BYTES, table.grams % BYTES)
    fit_nats = -np.sum(table.counts * np.log(table.counts / of_context))
    fit_bits = bits_per_byte(fit_nats, sum(map(len, train)))
    count, total, _ = table.look(*windows(validation, table.order))
    unseen.append((np.mean(total == 0), np.mean(count == 0)))
    rows.append(f"{table.order} {fit_bits:14.2f} {unseen[-1][0]:19.2%} {unseen[-1][1]:16.2%}")
print("\n".join(rows))
assert 0.1 < unseen[5][1] < 0.15

# %% [markdown]
# The training text becomes ever easier: the table is on its way to learn it by heart. Meanwhile every eighth 6-gram of the validation plays has never been seen, although the table has almost seven hundred thousand rows. More text helps (exercise 2 measures how much), but it is a race against $256^n$: each step
# up in $n$ asks for many times more text, and every new play brings its own words. This is where counting stops. It knows a context only in exactly the form in which it was seen.
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
    """weight · count / total + (1 − weight) · lower, or `lower` alone where the context is unseen."""
    mixed = weight * count / np.maximum(total, 1) + (1 - weight) * lower
    return np.where(total > 0, mixed, lower)


# %%
mixed = interpolate(np.array([3.0, 0.0]), np.array([4.0, 0.0]), 0.5, np.array([0.25, 0.25]))
assert np.allclose(mixed, [0.5 * 0.75 + 0.5 * 0.25, 0.25])  # seen context; unseen context
print(mixed)

# %% [markdown]
# The weights come from the held-out plays by expectation–maximisation: ask of each byte which part of the mixture explains it, and set the weight to the average share. Order by order, the lowest first. For add-k we try a grid.


# %%
#| export
def _tune_weight(count, total, lower, rounds: int = 30) -> float:
    """The weight that makes the held-out bytes most probable, by expectation–maximisation."""
    seen = total > 0
    ratio, below, weight = count[seen] / total[seen], lower[seen], 0.5
    for _ in range(rounds):
        mine = weight * ratio
        weight = float(np.mean(mine / (mine + (1 - weight) * below)))
    return weight


def tune(n: int, method: str, tables: list[Table], held_out: Sequence[bytes]) -> list[float]:
    """The parameters of order n that fit `held_out` best, given the `count_tables` of other documents.

    add-k: the best k of a logarithmic grid. Interpolation: one weight per order, lowest order first.
    """
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
print("weights of the orders 1 to 6:", [round(w, 2) for w in weights])
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
# **Absolute discounting.** Compare counts in two halves of a text: what was seen $r$ times in one half comes a bit less than $r$ times in the other, by nearly the same amount, below one, for all $r > 0$. So take a constant $d$ from every count that is not 0, and hand what was
# taken to the lower order. A context with many different successors, each seen once, hands on nearly everything; one with a single frequent successor almost nothing.
#
# **Continuation counts.** The lower order is asked only when the higher one has little to say. The classic example is *Francisco*: a frequent word, but nearly always after *San*, so a bad guess in a new context. The lower
# order should count in how many *different* contexts a symbol has been seen, and not how often:
#
# $$ p_n(w \mid c) = \frac{\max(a(c, w) - d_n, 0)}{a(c)} + \frac{d_n\, t(c)}{a(c)}\; p_{n-1}(w \mid c') . $$
#
# At the highest order $a$ is the count; below it $a(c, w)$ is the number of different symbols that have stood before $cw$. $t(c)$ is the number of different $w$ after $c$. This is the *interpolated* form with
# one discount per order, $d = n_1 / (n_1 + 2 n_2)$ from the numbers of n-grams counted once and twice; the *modified* form of Chen and Goodman has three.


# %%
#| export workbook
def kneser_ney(count, total, types, discount: float, lower: np.ndarray) -> np.ndarray:
    """max(count − d, 0) / total + d · types / total · lower, or `lower` where the context is unseen.

    `types` is the number of different bytes seen after the context: what the discounts took away is
    handed on, so the sum over the bytes stays 1.
    """
    kept = np.maximum(count - discount, 0) / np.maximum(total, 1)
    handed_on = discount * types / np.maximum(total, 1)
    return np.where(total > 0, kept + handed_on * lower, lower)


def discount_of(table: Table) -> float:
    """Ney's estimate of the discount, n1 / (n1 + 2 n2), from the n-grams counted once and twice."""
    once, twice = np.sum(table.counts == 1), np.sum(table.counts == 2)
    return float(once / (once + 2 * twice)) if once else 0.5


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
# All three methods share one recursion from the shortest context to the longest, and one class around it.


# %%
#| export
def smoothed(
    tables: list[Table],
    method: str,
    parameters: Sequence[float],
    contexts: np.ndarray,
    targets: np.ndarray,
) -> np.ndarray:
    """The probability of each target after its context: the recursion from order 1 up to order n."""
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
        raise ValueError(f"n must be from 1 to 6 (a longer context overflows 64 bits), got {n}")
    if method not in NGram.METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(NGram.METHODS)}")
    if parameters is not None:
        wanted, top = (1, math.inf) if method == "add-k" else (n, 1)
        if len(parameters) != wanted or not all(0 <= x <= top for x in parameters):
            raise ValueError(
                f"{method} of order {n} needs {wanted} numbers from 0 to {top}, got {list(parameters)}"
            )


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

    def fit(self, documents: Iterable[bytes], tables: list[Table] | None = None) -> "NGram":
        """Count the documents, or take their `count_tables` if they are at hand; returns the model."""
        if self.method == "interpolation" and self.parameters is None:
            raise ValueError("interpolation needs weights: parameters=tune(...)")
        counted = count_tables(documents, self.n) if tables is None else tables[: self.n]
        self.tables = continuation_tables(counted) if self.method == "kneser-ney" else counted
        if self.parameters is None:
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
# **Predict** the best cell, and the worst method at $n = 6$. Ours: add-k has its best $n$ at 4 or 5 and then gets worse, because an unseen context falls back to the uniform distribution and nothing between; Kneser–Ney
# is best at $n = 6$, ahead of interpolation by more than 0.02 bits per byte.


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
# Left: up to $n = 3$ the methods lie on top of each other; then add-k turns round while the other two keep falling. Right: the reason, the share of the validation bytes whose context or whose n-gram was never seen.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
for method, marker in zip(NGram.METHODS, "sov", strict=True):
    left.plot(range(1, 7), [bits[n, method] for n in range(1, 7)], marker + "-", label=method)
left.set(xlabel="order n", ylabel="bits per byte, validation", xticks=range(1, 7))
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
# Two validation plays are few. They have five acts each, and ten paired differences make an interval. (Acts of a play are not fully independent, so read the interval as a lower bound of our doubt.)


# %%
#| claim S059
def act_bits(model: NGram) -> list[float]:
    """Bits per byte of each act of the validation plays."""
    scores = []
    for document in validation:
        nats = -model.log_prob([document])
        starts = [m.start() for m in re.finditer(rb"^ACT ", document, re.M)]
        ends = [*starts[1:], len(document)]
        scores += [bits_per_byte(nats[a:b].sum(), b - a) for a, b in zip(starts, ends, strict=True)]
    return scores


by_act = {method: np.array(act_bits(models[6, method])) for method in NGram.METHODS}
gain = ledger.interval(by_act["interpolation"] - by_act["kneser-ney"], "bits per byte")
assert len(by_act["add-k"]) == 10 and np.all(by_act["add-k"] > by_act["interpolation"])
ledger.claim(
    "S059",
    section="ch. 3",
    claim="Kneser–Ney predicts unseen text better than linear interpolation of the same order (n = 6)",
    predicted=ledger.at_least(0.02, "bits per byte"),
    measured=gain,
    verdict="reproduced",
    function="bigram.NGram",
    test="tests/test_bigram.py::test_kneser_ney_agrees_with_nltk",
)

# %% [markdown]
# ### What the models write
#
# A sample shows what a score hides. Start with nothing and draw byte after byte. Look for the order at which you first see words, names, the shape of a play.

# %%
for n in (1, 2, 3, 4, 6):
    text = sample(models[n, "kneser-ney"], np.random.default_rng(0), 110, b"ARIEL\n")
    print(f"--- n = {n}\n{text.decode(errors='replace')}")

# %% [markdown]
# At 6 nearly all is English, in lines, with speakers, and means nothing. It has no memory beyond five bytes: it cannot close a bracket, keep a speaker, or finish a thought.
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

    Primed is size(compress(prime + data)) − size(compress(prime)). Raises KeyError for an unknown name.
    """
    compress = COMPRESSORS[name]
    before = len(compress(prime)) if prime else 0
    return 8 * (len(compress(prime + data)) - before) / len(data)


# %% [markdown]
# **Predict** which of the three profits most from priming. Think of how far each can look back: gzip has a window of 32 kB; bzip2 works on separate blocks of 900 kB; xz, at its standard level, keeps a dictionary of 8 MB, more than all our plays.

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
# Only xz can use what it was shown: to gzip and bzip2 the library is mostly out of sight by the time the new text begins. Even so, a table of six bytes beats it clearly. xz copies passages that it has seen word for word; a new play has few, and the counter predicts what it has seen only in part.
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
ledger.result("best n-gram", bits[best_model], "bits per byte", "6-gram, interpolated Kneser–Ney")
for name in ("gzip", "xz"):
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
# **Predict** the share of words of the validation plays that no training play contains.


# %%
def words_of(documents: list[bytes]) -> list[str]:
    """The words of the documents, in small letters."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?", b" ".join(documents).decode().lower())


vocabulary = set(words_of(train))
new_words = [word for word in words_of(validation) if word not in vocabulary]
share = len(new_words) / len(words_of(validation))
print(
    f"unknown: {share:.1%} of the running words, such as {', '.join(sorted(set(new_words))[200:206])}"
)
print("unknown bytes:", len(set(fresh) - set(library)))
assert 0.02 < share < 0.06

# %% [markdown]
# Bytes know no unknown word, at the price of longer sequences. Chapter 07 finds the middle: pieces of words, with bytes as the last resort.
#
# ## Break it
#
# A bug that looks like a discovery. In `add_k` the denominator needs 256 $k$, once for each byte that *could* come. Suppose somebody writes the number of bytes that *did* come after this context instead. It reads well ("smooth over the seen vocabulary"), and the score improves:


# %%
def add_k_bug(count, total, types, k):
    """k for every byte in the numerator, but only for the seen ones in the denominator."""
    return (count + k) / np.maximum(total + types * k, k)


count, total, types = tables[5].look(*windows(validation, 6))
for k in (best_k[6], 1.0, 100.0):
    right = bits_per_byte(-np.log(add_k(count, total, k)).sum(), len(count))
    wrong = bits_per_byte(-np.log(add_k_bug(count, total, types, k)).sum(), len(count))
    print(f"k = {k:.4f}: right {right:.3f}, with the bug {wrong:.3f} bits per byte")
assert wrong < bits[best_model]

# %% [markdown]
# "Far better than Kneser–Ney." The symptom is a score that is too good, and a parameter that wants to be large, where the right one wants to be small. The check that catches it is the sum over all bytes, in a frequent, a rare and an unseen context:

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
# - **Jurafsky and Martin, chapter 3.** We reproduced the small bigram table, the maximum-likelihood estimate (by learning it), and the order of the methods: Kneser–Ney before interpolation before add-k. They count words; at the level of bytes every short context is
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
# **3. Surprise, byte by byte.** Print the bits that the best model pays for each byte of the running line (as the beginning of a document), and explain the dearest ones. *Success:* the first letters of words cost more than the rest of them.

# %% tags=["solution"] jupyter={"source_hidden": true}
cost = -models[best_model].log_prob([b"\n" + running])[1:] / math.log(2)
first = np.array([i == 0 or running[i - 1 : i] == b" " for i in range(len(running))])
print("  ".join(f"{chr(b)}{c:.1f}" for b, c in zip(running, cost, strict=True)))
assert cost[first].mean() > 1.5 * cost[~first].mean()

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
