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
# # 15 · Evaluation
#
# > Scores that can be believed: bits per byte, multiple choice, exact match and pass@k, the 95 % interval of a score, and the difference that a test can see.
#
# *Reading time 45 min · runs in about 45 s · difficulty ●●○ · needs 00, 01, 11, 14*
#
# Asked who speaks next in a play, the mini Llama of chapter 11 is right in 34.5 % of 200 questions, the counting model of chapter 01 in 29 %. Is the Llama better? By the end of this chapter you can say what such a difference has to be before anybody may believe it,
# and you have put the counting model, our Llama and a real one, SmolLM2, through the same tests.
#
# | section | question |
# |---|---|
# | 1, 2 | how sure is a score, and how large must a difference be? |
# | 3 | what is a fair number for a language model as such? |
# | 4, 5 | how does a model that can only continue text answer a question with choices? |
# | 6, 7 | how are free answers and programs scored? |
# | 8 | every model that we have, against chance and against rules that know nothing |

# %%
#| export
import functools
import math
import random
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import stats

from llm_from_scratch.bigram import NGram
from llm_from_scratch.datasets import Play, plays
from llm_from_scratch.ledger import Interval
from llm_from_scratch.llama import Llama, init_cache
from llm_from_scratch.tokenizer import Tokenizer

# %%
import hashlib
import itertools
import json
from pathlib import Path

import matplotlib.pyplot as plt

import llm_from_scratch
from llm_from_scratch import formats, ledger
from llm_from_scratch.bigram import bits_per_byte, compressed_bits, model_bits
from llm_from_scratch.ledger import interval
from llm_from_scratch.pretraining import load, model_bits_per_byte, sample
from llm_from_scratch.transformer import paired_bootstrap

REPOSITORY = Path(llm_from_scratch.__file__).resolve().parents[1]
STORED = json.loads((REPOSITORY / "results" / "evaluation.json").read_text())
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
LINE = "To be, or not to be: that is the question:"
mini, tokenizer = load(REPOSITORY / "checkpoints" / "mini-llama3-short")
counter = NGram(6).fit([play.text.encode() for play in plays("train")])
print(f"mini Llama: {tokenizer.vocab_size:,} ids; our line is {len(tokenizer.encode(LINE))} tokens")

# %% [markdown]
# ## 1 · How sure is a score?
#
# HumanEval, a benchmark for code, has 164 problems. Take *one* model that solves a problem with probability 0.61 and test it twice, each time on 164 fresh problems of the same kind. **Predict:** how often do the two scores differ by 3 points or more? Such a
# gap separates many neighbours in published tables. Ours: often. The standard deviation of a score is $\sqrt{0.61\cdot 0.39/164}$ = 3.8 points, that of a difference $\sqrt2$ times as much.

# %%
rng = np.random.default_rng(0)
first, second = 100 * rng.binomial(164, 0.61, (2, 20_000)) / 164
for gap in (3, 5, 10):
    share = np.mean(np.abs(first - second) >= gap)
    print(f"the model beats itself by {gap:2} points or more: {100 * share:.0f} % of the time")

# %% [markdown]
# In six comparisons of ten the same model "wins" by three points. So a score without an interval says little. The Llama 3 paper (§5.1.1) prints one with each of its scores. For a share $S$ of $N$ items,
#
# $$ \mathrm{CI}(S) = 1.96\,\sqrt{\frac{S\,(1-S)}{N}} . $$
#
# Where does it come from? A right answer counts 1, a wrong one 0. If each item is right with probability $p$, independently, the number of right answers is binomial, with variance $N p(1-p)$. Divide by $N$, put the measured $S$ in the place of the unknown $p$, and take 1.96 standard
# deviations, which hold 95 % of a Gaussian. There are two approximations in this: the Gaussian, and $S$ for $p$. At $S = 1$ the second one fails badly. The interval is 100 ± 0.0, which the paper does print: after $N$ right answers the formula is *certain* that no wrong one can ever come.
#
# Two other ways. **Wilson** (1927) does not put $S$ for $p$. He asks which $p$ would make the measured $S$ no surprise, $|S - p| \le z\sqrt{p(1-p)/N}$ with $z=1.96$, and solves this quadratic inequality for $p$:
#
# $$ p \in \frac{1}{1+z^2/N}\left(S + \frac{z^2}{2N} \;\pm\; z\sqrt{\frac{S(1-S)}{N} + \frac{z^2}{4N^2}}\right). $$
#
# The **bootstrap** draws $N$ of the $N$ items again, with replacement, many times, and takes the middle 95 % of the scores. For answers that are right or wrong there is nothing to simulate: the number of right ones in such a draw is binomial with $p = S$.

# %%
#| export
Z95 = float(stats.norm.ppf(0.975))  # 1.96


# %%
#| export workbook
def interval_ends(
    share: Float[np.ndarray, "*B"], n: int, method: str = "wilson"
) -> tuple[Float[np.ndarray, "*B"], Float[np.ndarray, "*B"]]:
    """Low and high ends of the 95 % interval of a share of n items that were right or wrong.

    "gaussian": share ± z·√(share(1 − share)/n), the paper's (§5.1.1); "wilson": every p that would
    make the share no surprise; "bootstrap": quantiles of shares of n items drawn again.
    Raises ValueError for another method.
    """
    share = np.asarray(share, float)
    if method == "gaussian":
        half = Z95 * np.sqrt(share * (1 - share) / n)
        return share - half, share + half
    if method == "wilson":
        centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = np.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
        return centre - Z95 * half, centre + Z95 * half
    if method == "bootstrap":
        return tuple(stats.binom.ppf(tail, n, share) / n for tail in (0.025, 0.975))
    raise ValueError(f"no method {method!r}; there are gaussian, wilson, bootstrap")


# %% [markdown]
# The paper's two examples, and a perfect score, by each method:

# %%
for name, share, n in (("HumanEval", 0.61, 164), ("GSM8K", 0.572, 1319), ("perfect", 1.0, 100)):
    shown = []
    for method in ("gaussian", "wilson", "bootstrap"):
        low, high = interval_ends(share, n, method)
        shown.append(f"{method} [{100 * low:.1f}, {100 * high:.1f}]")
    print(f"{name:9} {100 * share:5.1f} %, N = {n:4}: ", ", ".join(shown))

# %% [markdown]
# What do we want of a 95 % interval? That in 95 of 100 evaluations it holds the true $p$. This *coverage* needs no simulation: there are only $N+1$ possible scores, and each has a known probability. (We simulate once, to check the sum.)
#
# **Predict** the coverage of the paper's formula with $N=164$, at $p = 0.61$ and at $p = 0.98$. Ours: 95 % in the middle; near the edge clearly less, since a lucky score of 100 % gets an interval of width zero.


# %%
def coverage(p: float, n: int, method: str) -> float:
    """The probability that the interval from n items holds the true p."""
    right = np.arange(n + 1)
    low, high = interval_ends(right / n, n, method)
    return float(stats.binom.pmf(right, n, p)[(low <= p) & (p <= high)].sum())


low, high = interval_ends(rng.binomial(164, 0.98, 100_000) / 164, 164, "gaussian")
simulated = np.mean((low <= 0.98) & (0.98 <= high))
assert abs(simulated - coverage(0.98, 164, "gaussian")) < 0.005
grid = np.linspace(0.5, 0.999, 500)
fig, ax = plt.subplots(figsize=(7, 3.2))
for method, style in (("gaussian", "C1"), ("wilson", "C0"), ("bootstrap", "C2:")):
    curve = [100 * coverage(p, 164, method) for p in grid]
    ax.plot(100 * grid, curve, style, linewidth=1.2, label=method)
    at = [f"{100 * coverage(p, 164, method):.1f}" for p in (0.61, 0.9, 0.98)]
    print(f"{method:9}: {', '.join(at)} % at p = 61, 90, 98 %;", end=" ")
    print(f"lowest up to 99 %: {min(curve[:491]):.1f}, at 99.9 %: {curve[-1]:.1f}")
ax.axhline(95, color="grey", linewidth=0.8)
ax.set(xlabel="true p, %", ylabel="coverage, %", ylim=(60, 101))
ax.legend(loc="lower left")
plt.show()

# %% [markdown]
# The plot: coverage for $N = 164$ against the true $p$. The teeth are real, since scores come in steps of 1/164. Up to 90 % all three nearly do what they say. Beyond 95 % the Gaussian and the bootstrap fail, together, to four fifths and then to 15 %. Wilson's stays above 93 % up to 99, and only at the very end loses ten points. That the bootstrap agrees with the Gaussian (the paper checked it, §5.1.1) is therefore no
# proof that both are right. They share the assumption that fails: both put $S$ for $p$. Scores of modern models are often above 95 %, so this course prints Wilson's interval.

# %%
#| claim L098
halves = {}
for name, share, n in (("HumanEval", 0.61, 164), ("GSM8K", 0.572, 1319)):
    low, high = interval_ends(share, n, "gaussian")
    halves[name] = 100 * (high - low) / 2
    boot = interval_ends(share, n, "bootstrap")
    assert np.abs(100 * np.subtract(boot, (low, high))).max() < 0.5
assert f"{halves['HumanEval']:.1f}, {halves['GSM8K']:.1f}" == "7.5, 2.7"
middle, edge = (coverage(p, 164, "gaussian") for p in (0.61, 0.98))
assert 0.94 < middle < 0.96 and edge < 0.85 < 0.93 < coverage(0.98, 164, "wilson")
ledger.claim(
    "L098",
    section="5.1.1",
    claim="the 95 % interval of a score S on N items is S ± 1.96·√(S(1 − S)/N), and the bootstrap agrees",
    predicted="±7.5 for HumanEval 61.0, ±2.7 for GSM8K 57.2; 95 % coverage but near 0 and 1",
    measured=f"±{halves['HumanEval']:.1f} and ±{halves['GSM8K']:.1f}, bootstrap within 0.5 points; at N = 164 it "
    f"covers {100 * middle:.1f} % at 61 %, but {100 * edge:.1f} % at 98 %, where Wilson's covers over 93 %",
    verdict="reproduced",
    function="evaluation.interval_ends",
    test="tests/test_evaluation.py::test_intervals_are_scipys",
)

# %% [markdown]
# For use there is one function, from a list of scores to an interval of the ledger's kind.


# %%
#| export public
def confidence_interval(
    scores: Sequence[float], method: str = "wilson", *, unit: str = "%", digits: int = 1
) -> Interval:
    """The mean of per-item scores in per cent, with its 95 % interval over items (see `interval_ends`).

    Scores are 0 or 1; for "bootstrap" anything from 0 to 1 (2,000 resamples, seeded). The items must be
    independent. Raises ValueError for no scores, and for scores that the method can't take.
    """
    scores = np.asarray(scores, float)
    if scores.ndim != 1 or not len(scores) or not ((0 <= scores) & (scores <= 1)).all():
        raise ValueError("scores must be a list of at least one number from 0 to 1")
    n, share = len(scores), scores.mean()
    if method == "bootstrap":
        draws = np.random.default_rng(0).integers(0, n, (2000, n))
        low, high = np.quantile(scores[draws].mean(1), [0.025, 0.975])
    elif set(scores) <= {0.0, 1.0}:
        low, high = interval_ends(share, n, method)
    else:
        raise ValueError(f"{method} is for scores of 0 and 1: take method='bootstrap'")
    return Interval(100 * share, 100 * float(low), 100 * float(high), n, unit, digits)


# %%
answers = [1] * 100 + [0] * 64
for method in ("gaussian", "wilson", "bootstrap"):
    print(f"{method:9}", confidence_interval(answers, method))
partial = confidence_interval([0.0, 0.5, 1.0, 1.0] * 50, "bootstrap")
print("partial credit", partial)

# %% [markdown]
# The paper adds a caution that is easily read over: the interval is a *lower bound* on the true variation, because it knows of one source of luck only, the choice of the items. The wording of the prompt, the seed of the training and the examples in the prompt are others. Section 8 measures two of them.
#
# ## 2 · How large must a difference be?
#
# An interval for each of two scores is not the answer to the question that one has: is A better than B? The difference of two independent scores has twice the variance, so what a test of $N$ items can find is
#
# $$ \delta = (1.96 + 0.84)\,\sqrt{2\,S(1-S)/N}. $$
#
# The 1.96 keeps us from crying wolf in 95 % of the cases where there is no difference. The 0.84 is the point below which a Gaussian has 80 %: a true difference of $\delta$ is found four times out of five.
#
# Mostly we can do better. Both models answer the *same* items, so subtract item by item. What is easy for one is easy for the other, and this common part cancels. Only the items count on which exactly one of the two is right. If their share is $d$, the variance of the difference is $d/N$, less the tiny $\delta^2/N$:
#
# $$ \delta_{\text{paired}} \approx (1.96 + 0.84)\,\sqrt{d/N}. $$


# %%
#| export public
def detectable_difference(
    n: int, share: float, *, disagreement: float | None = None, power: float = 0.8
) -> float:
    """The true difference, in per cent, that a 95 % test on n items finds with the given power.

    Two models on different items, both near `share`; or, with `disagreement` (the share of items on
    which exactly one of them is right), on the same items. Raises ValueError unless n ≥ 1 and the
    shares are from 0 to 1.
    """
    shares = (share, power, 0 if disagreement is None else disagreement)
    if n < 1 or not all(0 <= x <= 1 for x in shares):
        raise ValueError(f"n must be ≥ 1 and shares from 0 to 1, got n={n}, {shares}")
    variance = 2 * share * (1 - share) if disagreement is None else disagreement
    return 100 * (Z95 + float(stats.norm.ppf(power))) * math.sqrt(variance / n)


# %% [markdown]
# **Predict** the smallest difference that a test of 200 items, as ours will be, can find at a score of 50 %. Ours: about 10 points.

# %%
for name, n in (("HumanEval", 164), ("our tests", 200), ("GSM8K", 1319), ("MMLU", 14_042)):
    apart = detectable_difference(n, 0.5)
    paired = detectable_difference(n, 0.5, disagreement=0.2)
    print(f"{name:9} N = {n:6,}: {apart:4.1f} points, same items and d = 20 %: {paired:4.1f}")
needed = math.ceil(200 * (detectable_difference(200, 0.5, disagreement=0.2) / 1) ** 2)
print(f"items for one point, paired: {needed:,}")

# %% [markdown]
# Fourteen points if the models take different items, nine if they take the same. To tell models apart that differ by one point, one needs some sixteen thousand items. Let us check the formula. We simulate pairs of models that disagree on 20 % of 200 items, with a true difference of just $\delta$, and count how often the paired interval excludes
# zero. For the interval we need nothing new: it is `ledger.interval` of the differences.

# %%
disagreement, n = 0.2, 200
delta = detectable_difference(n, 0.5, disagreement=disagreement) / 100
found = []
for true in (delta, 0.0):
    shares = [(disagreement + true) / 2, (disagreement - true) / 2]
    draws = rng.choice([1, -1, 0], p=[*shares, 1 - disagreement], size=(2000, n))
    found.append(np.mean([(i := interval(row)).low > 0 or i.high < 0 for row in draws]))
print(f"true difference {100 * delta:.1f} points: found in {100 * found[0]:.0f} % of 2,000 tests")
print(f"no difference:             found in {100 * found[1]:.0f} %")
assert 0.77 < found[0] < 0.87 and found[1] < 0.07

# %% [markdown]
# The formula holds. Now the models.
#
# ## 3 · Bits per byte, done right
#
# For a language model as such, before any task, the measure is the cross-entropy: how much probability it gives to what stands there. It comes in four units, and they are easily confused:
#
# | unit | what it is |
# |---|---|
# | nats per token | $-\frac1N\sum \ln p$, the training loss |
# | bits per token | nats divided by $\ln 2$ |
# | perplexity | $e^{\text{nats}} = 2^{\text{bits}}$ per token: "as undecided as among so many equal choices" |
# | bits per byte | all bits, divided by the UTF-8 bytes of the text |
#
# The first three depend on the tokenizer. A model with long tokens predicts fewer and harder things. Only bits per byte asks every model the same question, how many bits it would take to store *this text*. We take the first 16,000 characters of each validation play.
#
# **Predict:** who has the lowest perplexity, the 6-gram, the mini Llama or SmolLM2? And the fewest bits per byte? Ours: the 6-gram has the lowest perplexity by far, since its tokens are bytes. In bits per byte SmolLM2 should win; it has read the web, where these plays are.


# %%
#| export
def excerpt(size: int = 16_000) -> list[str]:
    """The first whole lines of each validation play, at most `size` characters: for bits per byte."""
    return [play.text[:size].rpartition("\n")[0] + "\n" for play in plays("validation")]


# %%
texts = excerpt()
data = [text.encode() for text in texts]
n_bytes = sum(map(len, data))
rows = {"6-gram": (model_bits(counter, data), n_bytes)}
mini_bits = model_bits_per_byte(mini, tokenizer, texts, context=256)
rows["mini Llama"] = (mini_bits, sum(len(tokenizer.encode(text)) for text in texts))
rows["SmolLM2 (stored)"] = tuple(STORED["bits_per_byte"]["SmolLM2"][k] for k in ("bits", "tokens"))
perplexity = {name: 2 ** (bits * n_bytes / tokens) for name, (bits, tokens) in rows.items()}
for name, (bits, tokens) in rows.items():
    print(
        f"{name:17} {n_bytes / tokens:.2f} bytes a token, perplexity {perplexity[name]:5.1f}",
        end="",
    )
    print(f" per token, {bits:.2f} bits per byte")
for name in ("gzip", "xz"):
    print(f"{name:17} {compressed_bits(name, b''.join(data)):.2f} bits per byte")

# %% [markdown]
# By perplexity the counter would be far ahead of the Llama. In bits per byte it is behind. (Over the whole plays they have 2.18 and 1.91; the beginning of a play is harder, since its names are new.) SmolLM2 wins, as predicted, by 0.4 bits a byte. For 34 times as many weights, and a web that most likely holds these plays, that is less than we had expected.
# Both compressors are worse: a model that predicts is a compressor (arithmetic coding), so if a trained language model loses against gzip on text of the kind that it was trained on, suspect a bug in it or in its evaluation. There is hardly a cheaper test.

# %%
#| claim S060
sizes = {name: n_bytes / tokens for name, (_, tokens) in rows.items()}
for name, (bits, _) in rows.items():
    nats = bits * math.log(2) * sizes[name]  # per token
    assert abs(math.exp(nats) / perplexity[name] - 1) < 1e-9
    assert abs(bits_per_byte(nats, sizes[name]) - bits) < 1e-9
    assert bits < compressed_bits("gzip", b"".join(data))
assert min(perplexity, key=perplexity.get) == "6-gram" == max(rows, key=lambda name: rows[name][0])
ledger.claim(
    "S060",
    section="Jurafsky & Martin, ch. 3",
    claim="perplexities compare models over one vocabulary only; cross-entropy per byte compares them all",
    predicted="the model of bytes has the lowest perplexity and the most bits per byte",
    measured=f"perplexity {perplexity['6-gram']:.1f} against {perplexity['mini Llama']:.0f}, but "
    f"{rows['6-gram'][0]:.2f} against {rows['mini Llama'][0]:.2f} bits per byte; exp(nats) = 2^bits",
    verdict="derived",
    function="pretraining.model_bits_per_byte",
    test="tests/test_evaluation.py::test_units",
)

# %% [markdown]
# **Context and stride.** A model of 256 tokens must read a play in windows. Chapter 11 let the windows overlap: each moves on by `stride`, and only its last `stride` tokens count. With a stride of the whole context, the first token of a window is predicted from nothing. (Below, to save time, on the excerpt of the first play only, which is easier than the mean of both.)
# **Predict** what this costs the mini Llama, with windows of 32 and of 256 tokens, and what the short context costs when the stride is careful. Ours: 0.2 bits at 32, an eighth of it at 256, and 0.2 for the short context.

# %%
windows = {}
for context, stride in ((32, 32), (32, 16), (256, 256), (256, 128)):
    bits = model_bits_per_byte(mini, tokenizer, texts[:1], context=context, stride=stride)
    windows[context, stride] = bits
    print(f"context {context:3}, stride {stride:3}: {windows[context, stride]:.2f} bits per byte")
for context, stride in ((32, 16), (256, 128)):
    careless = windows[context, context] - windows[context, stride]
    print(f"context {context}: the careless stride costs {careless:.2f} bits per byte")

# %% [markdown]
# The careless stride costs 0.05 bits with windows of 32 tokens, and 0.01 with windows of 256: only the first tokens of a window suffer, and with long windows there are few of them. The surprise is the other comparison. With a careful stride, a context of 32 tokens (some 100 bytes) is nearly as good as one of 256. Our predictions were several times too large, the last one about ten times:
# this model makes hardly any use of what stands more than a few lines back. It is a small number in the loss, and a fact about the model that will matter in section 8, where it is asked who speaks.
#
# So a number in bits per byte is complete with four facts: the text, the context, the stride, and how a document begins.
#
# **Shannon's game.** Shannon (1951) had no model. He let a person guess the next letter until it was right, and wrote down only the *number of guesses*. A twin of the guesser could restore the text from these numbers, so their entropy is a number of bits that suffices for the text. If $q_i$ is the share of letters that are found at guess $i$,
#
# $$ \sum_i i\,(q_i - q_{i+1})\log_2 i \;\le\; H \;\le\; -\sum_i q_i \log_2 q_i , $$
#
# the left side under his assumption of an ideal guesser. We let the 6-gram play, on 1,000 bytes. **Predict:** is the upper bound above or below the model's own cross-entropy on the same bytes? Ours: above. The rank forgets how sure the guesser was.

# %%
places = np.linspace(100, len(data[0]) - 1, 1000).astype(int)
guesses, surprise = [], []
for at in places:
    p = counter.probabilities(data[0][at - 8 : at])
    guesses.append(int(np.sum(p > p[data[0][at]])) + 1)
    surprise.append(-np.log2(p[data[0][at]]))
q = np.bincount(guesses, minlength=258)[1:] / len(places)
upper = -np.sum(q[q > 0] * np.log2(q[q > 0]))
lower = np.sum(np.arange(1, 257) * (q[:-1] - q[1:]) * np.log2(np.arange(1, 257)))
print(f"right at the first guess: {100 * q[0]:.0f} %, within five: {100 * q[:5].sum():.0f} %")
print(
    f"Shannon's bounds {lower:.2f} to {upper:.2f}, cross-entropy {np.mean(surprise):.2f} bits a byte"
)

# %% [markdown]
# Above, as predicted. The first guess is right more than every second time. The left side would be a bound for an ideal guesser; for ours it is only the formula's value. Shannon's reader, with 100 letters of context and an alphabet of 27, came to bounds of 0.6 and 1.3 bits a letter.
#
# ## 4 · Questions with choices
#
# A base model can only continue text. To let it answer a question with choices, compare how probable each choice is as a continuation: the prompt is read, the log-probabilities of the choice's tokens are summed, the highest sum wins. No answer is generated.


# %%
#| export public
@dataclass(frozen=True)
class Item:
    """One question: a model continues `prompt` by each choice; `answer` is the index of the right one.

    `prior` is the prompt without the text that the question is about, for the score "prior".
    Raises ValueError for an answer that is no index, and for an empty choice.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    prior: str = ""

    def __post_init__(self):
        if not 0 <= self.answer < len(self.choices) or not all(self.choices):
            raise ValueError(f"answer {self.answer} of {len(self.choices)} choices: {self.choices}")


# %% [markdown]
# A trap sits at the boundary. The ids of prompt plus choice need not be the ids of the prompt followed by the ids of the choice. Llama 3's tokenizer likes a space at the *beginning* of a token, and a newline at the *end* of one (`.` and two newlines are one token). SmolLM2 cuts two newlines before a word in two, and keeps them together at the end of a text. So no rule such as "put the white space into the choice" serves both.
# We encode the whole texts, cut all of them at the place up to which they agree with the prompt and with each other, and score the rest.


# %%
#| export workbook
def choice_ids(
    tokenizer: Tokenizer, prompt: str, choices: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """The ids that prompt and prompt + choice have in common, BOS first, and what follows for each choice.

    The whole texts are encoded. Where tokens reach over the end of the prompt, the common part is
    shorter than the prompt, and its last characters are scored with every choice. Raises ValueError
    if nothing is common: an empty prompt, and a tokenizer without BOS.
    """
    bos = tokenizer.bos_id is not None
    wholes = [tokenizer.encode(prompt + choice, bos=bos) for choice in choices]
    common = tokenizer.encode(prompt, bos=bos)
    for ids in wholes:
        while ids[: len(common)] != common:
            common = common[:-1]
    if not common:
        raise ValueError(f"no token before {choices[0]!r}, and the tokenizer has no BOS")
    return common, [ids[len(common) :] for ids in wholes]


# %%
prompt, choices = "To be, or not ", ("to be:", "to me:")
common, rest = choice_ids(tokenizer, prompt, choices)
print("common:", [tokenizer.decode([id]) for id in common[1:]])
for choice, ids in zip(choices, rest, strict=True):
    alone = tokenizer.encode(choice)
    print(f"{choice!r}: {[tokenizer.decode([id]) for id in ids]}, encoded alone", end=" ")
    print([tokenizer.decode([id]) for id in alone])
assert tokenizer.encode(prompt + choices[0], bos=True) == common + rest[0]
assert rest[0] != tokenizer.encode(choices[0])

# %% [markdown]
# The naive way to score: one full forward pass over prompt and choice, for each choice. With four choices the prompt is read four times. The fast way reads it once into a KV cache (chapter 10), copies the cache for every choice, and feeds the choices. Shapes: `B` items, `N` choices, prompts of `T` tokens padded on the right, choices of `C` tokens. The last token of the
# prompt goes in front of each choice, since its output predicts the choice's first token.


# %%
#| export workbook
@eqx.filter_jit
def choice_log_probs(
    model: Llama,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    feeds: Int[Array, "B N C"],
    targets: Int[Array, "B N C"],
) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
    """Log-probability in nats of N choices after each prompt, and whether greedy decoding writes them.

    Prompts are padded on the right to T; `lengths` counts their true tokens. A feed is the prompt's last
    token and the choice without its last; targets are the choice, −1 beyond it.
    """
    batch, n_choices, width = feeds.shape
    cache = init_cache(model.config, batch, prompts.shape[1] + width, model.embedding.dtype)
    _, cache = model.hidden(prompts, cache=cache)
    cache = replace(cache, length=lengths)
    cache = jax.tree.map(lambda x: jnp.repeat(x[:, None], n_choices, axis=1), cache)
    logits, _ = model(feeds, cache=cache)
    logits = logits.astype(jnp.float32)
    at = jnp.maximum(targets, 0)[..., None]
    chosen = jnp.take_along_axis(logits, at, axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    greedy = (logits.argmax(-1) == targets) | (targets < 0)
    return jnp.where(targets >= 0, chosen, 0).sum(-1), greedy.all(-1)


# %% [markdown]
# The same call says whether greedy decoding would write the choice: it does so, in these tokens, exactly if each of them is the likeliest one after those before. Section 6 uses that. Around it: padding to one shape for all items, batches, and a record of the scores.


# %%
#| export
def padded_choices(
    parts: Sequence[tuple[list[int], list[list[int]]]], context: int
) -> tuple[np.ndarray, ...]:
    """Prompts, lengths, feeds and targets of `choice_log_probs` from the `choice_ids` of every item.

    A prompt that is too long for the context loses its oldest tokens. Raises ValueError if a choice
    alone fills the context.
    """
    width = -(-max(len(choice) for _, row in parts for choice in row) // 4) * 4
    room = context - width
    if room < 1:
        raise ValueError(f"choices of {width} tokens leave no room in a context of {context}")
    kept = [prompt[-room:] for prompt, _ in parts]
    length = -(-max(map(len, kept)) // 16) * 16
    prompts = np.zeros((len(parts), length), np.int32)
    feeds = np.zeros((len(parts), len(parts[0][1]), width), np.int32)
    targets = np.full(feeds.shape, -1, np.int32)
    for i, (prompt, (_, row)) in enumerate(zip(kept, parts, strict=True)):
        prompts[i, : len(prompt) - 1] = prompt[:-1]
        for j, choice in enumerate(row):
            feeds[i, j, : len(choice)] = [prompt[-1], *choice[:-1]]
            targets[i, j, : len(choice)] = choice
    return prompts, np.array([len(p) - 1 for p in kept], np.int32), feeds, targets


# %% [markdown]
# The scores are kept apart from the rule that picks a winner, because the rule is a choice of ours, and section 5 is about it.


# %%
#| export
@dataclass(frozen=True)
class Scores:
    """What a model gives the choices of N items, arrays "N C": log-probabilities in nats, and sizes.

    `prior` is the log-probability after the item's prior, None if not asked for; `greedy` says which
    choice greedy decoding would write; `answers` holds the right indices, shape (N,).
    """

    log_probs: Float[np.ndarray, "N C"]
    prior: Float[np.ndarray, "N C"] | None
    tokens: Int[np.ndarray, "N C"]
    n_bytes: Int[np.ndarray, "N C"]
    greedy: Bool[np.ndarray, "N C"]
    answers: Int[np.ndarray, " N"]

    def by(self, rule: str) -> Float[np.ndarray, "N C"]:
        """The scores by a rule: "raw", per "token", per "byte", or against the "prior"."""
        rules = {
            "raw": lambda: self.log_probs,
            "token": lambda: self.log_probs / self.tokens,
            "byte": lambda: self.log_probs / self.n_bytes,
            "prior": lambda: self.log_probs - self.prior,
        }
        if rule not in rules:
            raise ValueError(f"no rule {rule!r}; there are {', '.join(rules)}")
        if rule == "prior" and self.prior is None:
            raise ValueError("these scores have no prior: multiple_choice(..., prior=True)")
        return rules[rule]()

    def correct(self, rule: str = "byte") -> Bool[np.ndarray, " N"]:
        """Whether the best choice by a rule (of equals, the first) is the right one, for every item."""
        return self.by(rule).argmax(1) == self.answers


# %%
#| export
def _log_probs(model, tokenizer, prompts, choices, batch, context):
    """Log-probabilities and greedy flags of every choice after its prompt, and their tokens, (N, C)."""
    parts = [
        choice_ids(tokenizer, prompt, row) for prompt, row in zip(prompts, choices, strict=True)
    ]
    arrays = padded_choices(parts, context)
    sums, greedy = [], []
    for start in range(0, len(parts), batch):
        at = np.minimum(np.arange(start, start + batch), len(parts) - 1)
        found = choice_log_probs(model, *(jnp.asarray(array[at]) for array in arrays))
        kept = min(batch, len(parts) - start)
        sums.append(np.asarray(found[0])[:kept])
        greedy.append(np.asarray(found[1])[:kept])
    tokens = np.array([[len(choice) for choice in row] for _, row in parts])
    return np.concatenate(sums), np.concatenate(greedy), tokens


# %%
#| export public
def multiple_choice(
    model: Llama,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    *,
    prior: bool = False,
    batch: int = 8,
    context: int | None = None,
) -> Scores:
    """Score the choices of multiple-choice items by their log-likelihood after the prompt.

    Each prompt is read once, into a KV cache that its choices share. A prompt that exceeds `context`
    (default: the model's max_seq_len) loses its oldest tokens. With `prior` the choices are scored after
    the items' priors, too. Accuracy: `.correct("byte").mean()`.
    Raises ValueError without items, and for items with different numbers of choices.
    """
    if len({len(item.choices) for item in items}) != 1:
        raise ValueError(f"{len(items)} items: need at least one, all with as many choices")
    choices = [item.choices for item in items]
    context = model.config.max_seq_len if context is None else context
    score = functools.partial(_log_probs, model, tokenizer, batch=batch, context=context)
    sums, greedy, tokens = score([item.prompt for item in items], choices)
    before = score([item.prior for item in items], choices)[0] if prior else None
    n_bytes = np.array([[len(choice.encode()) for choice in row] for row in choices])
    answers = np.array([item.answer for item in items])
    return Scores(sums, before, tokens, n_bytes, greedy, answers)


# %% [markdown]
# **Check:** the fast way against the naive one, on two prompts of different lengths.

# %%
all_log_probs = eqx.filter_jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)))


def naive_log_probs(model: Llama, tokenizer, item: Item, length: int) -> np.ndarray:
    """The choices' log-probabilities by full forward passes over texts padded to a length."""
    prompt, rests = choice_ids(tokenizer, item.prompt, item.choices)
    texts = [(prompt + ids + [0] * length)[:length] for ids in rests]
    logs = np.asarray(all_log_probs(model, jnp.array(texts)))
    at = len(prompt) - 1 + np.arange(length)
    return np.array([logs[j, at[: len(ids)], ids].sum() for j, ids in enumerate(rests)])


tries = [
    Item("To be, or not", (" to be: that is", " a horse, a", " you"), 0),
    Item("O Romeo, Romeo! wherefore art", (" thou Romeo?", " you", " the king"), 0),
]
fast = multiple_choice(mini, tokenizer, tries)
slow = np.stack([naive_log_probs(mini, tokenizer, item, 32) for item in tries])
for item, row in zip(tries, fast.log_probs, strict=True):
    print(
        f"{item.prompt!r}:", {c: round(float(x), 1) for c, x in zip(item.choices, row, strict=True)}
    )
print("the fast way equals the naive one:", np.abs(fast.log_probs - slow).max() < 1e-3)
assert np.abs(fast.log_probs - slow).max() < 1e-3

# %% [markdown]
# Both lines are in the training plays. The model has not learnt them by heart, and by the raw sum it prefers a short "you". For the counting model the same record comes from the log-probabilities of bytes.


# %%
#| export
def ngram_choice(model: NGram, items: Sequence[Item]) -> Scores:
    """`multiple_choice` for a byte n-gram model of chapter 01: its tokens are bytes."""

    def score(prompts: list[str]) -> np.ndarray:
        texts = [
            (prompt.encode()[-8:], choice.encode())
            for prompt, item in zip(prompts, items, strict=True)
            for choice in item.choices
        ]
        logs = model.log_prob([prompt + choice for prompt, choice in texts])
        ends = np.cumsum([len(prompt) + len(choice) for prompt, choice in texts])
        sums = [
            logs[end - len(choice) : end].sum()
            for end, (_, choice) in zip(ends, texts, strict=True)
        ]
        return np.reshape(sums, (len(items), -1))

    n_bytes = np.array([[len(choice.encode()) for choice in item.choices] for item in items])
    answers = np.array([item.answer for item in items])
    prior = score([item.prior for item in items])
    unknown = np.zeros(n_bytes.shape, bool)
    return Scores(score([item.prompt for item in items]), prior, n_bytes, n_bytes, unknown, answers)


# %% [markdown]
# ### Two tasks, two templates
#
# The validation plays give us questions with known answers. **Who speaks next?** Four speakers of the scene, each with at least three speeches in it; the one who has just spoken is not among them. **Which line follows?** A line from inside a speech, against three such lines from other scenes of the play. Every model sees the same 400 characters before the question.
#
# Each task is asked in two ways. The template *play* lets the text simply go on. The template *question* puts "Question: Who speaks next?", "Answer:" between. One wording would not do: the wording is luck, too.


# %%
#| export
@dataclass(frozen=True)
class Turn:
    """A speech and where it stands: `begin` is the offset of the speaker's name in the play's text."""

    play: Play
    scene: tuple[str, str]
    speaker: str
    lines: tuple[str, ...]
    begin: int


def turns(play: Play) -> list[Turn]:
    """The speeches of a play that begin with the speaker's name and a line, with their offsets."""
    found, cursor = [], 0
    for speech in play.speeches:
        begin = play.text.find(f"\n\n{speech.speaker}\n{speech.lines[0]}", cursor)
        if speech.speaker and begin >= 0:
            cursor = begin + 2
            scene = (speech.act, speech.scene)
            found.append(Turn(play, scene, speech.speaker, speech.lines, cursor))
    return found


def tail(text: str, size: int) -> str:
    """The last `size` characters of a text, from the first whole line on."""
    return text if len(text) <= size else text[-size:].partition("\n")[2]


# %%
#| export
CONTEXT = 400  # characters of the play that every model reads before a question


def drawn(items: Sequence[Item], n: int, chooser: random.Random) -> list[Item]:
    """n of the items, in a random order. Raises ValueError if there are fewer."""
    if len(items) < n:
        raise ValueError(f"{n} items wanted, {len(items)} are there")
    return chooser.sample(items, n)


def shuffled(right: str, wrong: Sequence[str], chooser: random.Random) -> tuple[tuple, int]:
    """The choices in a random order, and where the right one stands."""
    choices = [right, *wrong]
    chooser.shuffle(choices)
    return tuple(choices), choices.index(right)


# %%
#| export
QUESTIONS = {
    "speaker": {"play": ("", "{}\n"), "question": ("Question: Who speaks next?\nAnswer:", " {}\n")},
    "line": {"play": ("", "{}"), "question": ("\nQuestion: Which line follows?\nAnswer:", " {}")},
}


def ask(text: str, choices: Sequence[str], answer: int, task: str, template: str) -> Item:
    """An item from a piece of a play: "play" lets the text go on, "question" asks in English."""
    asked, form = QUESTIONS[task][template]
    wrapped = tuple(form.format(choice) for choice in choices)
    return Item(tail(text, CONTEXT) + asked, wrapped, answer, asked)


def speaker_items(split: str, n: int = 200, *, template: str = "play", seed: int = 0) -> list[Item]:
    """Who speaks next? n questions with four speakers of the scene, the last speaker not among them.

    Each of the four has at least three speeches in the scene. Raises KeyError for an unknown
    template, ValueError if the split has fewer than n questions.
    """
    chooser, items = random.Random(seed), []
    for play in plays(split):
        told = turns(play)
        count = Counter((turn.scene, turn.speaker) for turn in told)
        for before, turn in zip(told, told[1:], strict=False):
            present = [name for (scene, name), k in count.items() if scene == turn.scene and k >= 3]
            others = sorted({*present} - {before.speaker, turn.speaker})
            if before.scene != turn.scene or before.speaker == turn.speaker:
                continue
            if turn.speaker in present and len(others) >= 3:
                choices = shuffled(turn.speaker, chooser.sample(others, 3), chooser)
                items.append(ask(play.text[: turn.begin], *choices, "speaker", template))
    return drawn(items, n, chooser)


# %%
#| export
def line_items(split: str, n: int = 200, *, template: str = "play", seed: int = 0) -> list[Item]:
    """Which line follows? n questions: a line from inside a speech, and three from inside others.

    The wrong lines come from other scenes of the same play. Errors as in `speaker_items`.
    """
    chooser, items = random.Random(seed), []
    for play in plays(split):
        told = [turn for turn in turns(play) if len(turn.lines) >= 4]
        for turn in told:
            line = turn.lines[chooser.randrange(2, len(turn.lines) - 1)]
            at = play.text.find(f"\n{line}\n", turn.begin) + 1
            elsewhere = [x for t in told if t.scene != turn.scene for x in t.lines[2:-1]]
            choices = shuffled(line, chooser.sample(elsewhere, 3), chooser)
            items.append(ask(play.text[:at], *choices, "line", template))
    return drawn(items, n, chooser)


# %%
TASKS = {"speaker": speaker_items, "line": line_items}
TEMPLATES = ("play", "question")
items = {
    (task, template): make("validation", template=template)
    for task, make in TASKS.items()
    for template in TEMPLATES
}
shown = items["speaker", "question"][0]
print(shown.prompt[-150:])
print([choice.strip() for choice in shown.choices], "→", shown.choices[shown.answer].strip())
print({f"{task}, {template}": len(of) for (task, template), of in items.items()})

# %% [markdown]
# Now SmolLM2-135M-Instruct, a real model of the Llama architecture, 34 times as large as ours. On two cores it takes a quarter of an hour for all 800 questions, so its scores are stored, and so are those of the mini Llama for the template *question*. `.venv/bin/python tools/evaluation_runs.py` makes them again; a fingerprint of the questions tells whether they belong to
# ours. SmolLM2 has no BOS; every text begins with `<|im_start|>`, which opens a turn in its chats. The next cell loads the model through chapter 14, scores two of the questions live, in the naive way, and compares.


# %%
def digest(questions: list[Item]) -> str:
    return hashlib.sha256(repr(questions).encode()).hexdigest()[:16]


def stored_scores(model: str, task: str, template: str) -> Scores:
    """A model's scores from results/evaluation.json, if they are those of our questions."""
    row, questions = STORED["scores"][f"{model}/{task}/{template}"], items[task, template]
    assert row["items"] == digest(questions), "other questions: run tools/evaluation_runs.py"
    lengths = np.array([[len(choice.encode()) for choice in item.choices] for item in questions])
    right = np.array([item.answer for item in questions])
    arrays = [np.array(row[name]) for name in ("log_probs", "prior", "tokens")]
    return Scores(*arrays, lengths, np.array(row["greedy"], bool), right)


smollm, smollm_tokenizer = formats.load(formats.smollm2_path())
n_tokens = sum(len(smollm_tokenizer.encode(text)) for text in texts)
assert n_tokens == STORED["bits_per_byte"]["SmolLM2"]["tokens"], "another excerpt"
smollm_tokenizer.bos_id = smollm_tokenizer.special["<|im_start|>"]
for task in TASKS:
    live = naive_log_probs(smollm, smollm_tokenizer, items[task, "play"][0], 136)
    kept = stored_scores("SmolLM2", task, "play").log_probs[0]
    print(f"{task}: live and stored agree", np.abs(live - kept).max() < 0.01)
    assert np.abs(live - kept).max() < 0.01
del smollm

# %% [markdown]
# ## 5 · Which rule picks the winner?
#
# A sum of log-probabilities falls with every token, so the *raw* rule prefers short choices. Three cures are in use: divide by the number of tokens, divide by the number of bytes, or subtract the log-probability that the choice has after a prompt *without* the play, its prior. The last asks how much the play has raised the choice, and is blind to choices
# that are likely everywhere.
#
# **Predict** the best rule for lines (long, of different lengths) and for names. Ours: per byte for lines; for names the prior, because some names are common in all plays. The last column is the control: how often is the choice right that is likeliest *without* the play? (SmolLM2's scores are the stored ones, here and below.)

# %%
scores = {}
for task in TASKS:
    live = multiple_choice(mini, tokenizer, items[task, "play"], prior=True, batch=20)
    scores["mini Llama", task, "play"] = live
    scores["mini Llama", task, "question"] = stored_scores("mini Llama", task, "question")
    for template in TEMPLATES:
        scores["6-gram", task, template] = ngram_choice(counter, items[task, template])
        scores["SmolLM2", task, template] = stored_scores("SmolLM2", task, template)
MODELS, RULES = ("6-gram", "mini Llama", "SmolLM2"), ("raw", "token", "byte", "prior")
for task in TASKS:
    for model in MODELS:
        row = scores[model, task, "play"]
        shares = ", ".join(f"{rule} {100 * row.correct(rule).mean():.1f}" for rule in RULES)
        alone = 100 * np.mean(row.prior.argmax(1) == row.answers)
        print(f"{task:8}{model:11} {shares} %; prompt not read: {alone:.1f} %")

# %% [markdown]
# The rule decides the result. On the lines the mini Llama is at 28 % by the raw sum, near chance, and at 48 % against the prior. On the names the same correction takes SmolLM2 from 65.5 % down to 52 %. Both parts of our prediction were wrong: the prior, not the length, is what lines need most, and names are not helped by it. A line is long, and most of its log-probability says how common its words are.
# A name is short, ends in a newline, and that some names are likelier than others is part of the answer.
#
# The control is where it should be on the lines: without the play no model does better than luck. On the names SmolLM2's favourite is right *less* often than luck. Our guess why: its favourites are famous characters, these speak most, and the question excludes the last speaker. Which of the differences between rules are more than luck?

# %%
for task, one, two in (
    ("line", "prior", "raw"),
    ("line", "byte", "raw"),
    ("speaker", "prior", "raw"),
):
    for model in MODELS[1:]:
        row = scores[model, task, "play"]
        gain = 100.0 * row.correct(one) - 100.0 * row.correct(two)
        print(f"{task:7} {model:10} {one:5} − {two}:", interval(gain, "points", digits=1))

# %% [markdown]
# The gain of the mini Llama on lines is beyond doubt, and so is the loss of SmolLM2 on names. Of the other four, three hold zero inside their interval. The table has 24 scores, and whoever reports the best rule of each row reports luck, too. From here on: *raw* for names, *prior* for lines. We fixed this after seeing the table, so these numbers flatter a little; the test plays, asked once, would tell how much.
#
# ## 6 · Exact match
#
# For a free answer the oldest score is *exact match*: is the text that the model writes the answer? Letter by letter this is unfair to "Prospero." and "the Tempest", so the usual script lowers the case and drops punctuation and articles first.


# %%
#| export
_EDGES = str.maketrans("", "", string.punctuation)


def plain_answer(text: str) -> str:
    """A text in lower case, without punctuation, articles and doubled spaces (as SQuAD's script has it)."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_EDGES)).split())


# %%
#| export public workbook
def exact_match(prediction: str, answers: str | Sequence[str], *, strict: bool = False) -> bool:
    """Whether a prediction is one of the answers: after `plain_answer`, or letter by letter if strict.

    Raises ValueError if there is no answer.
    """
    answers = [answers] if isinstance(answers, str) else list(answers)
    if not answers:
        raise ValueError("exact_match needs at least one answer")
    form = str if strict else plain_answer
    return form(prediction) in {form(answer) for answer in answers}


# %%
for prediction, answer in (
    ("Prospero.", "PROSPERO"),
    ("the Tempest", "Tempest"),
    ("Ariel", "Miranda"),
):
    print(f"{prediction!r} for {answer!r}:", exact_match(prediction, answer), end="; ")
    print("strict:", exact_match(prediction, answer, strict=True))
assert exact_match("42", ["forty-two", "42."])

# %% [markdown]
# Normalising has its own errors: "The The" becomes nothing, and so equals any answer that does. Now the trick of section 4: under greedy decoding the model writes the answer, in its usual tokens, exactly if each of them is the likeliest. So `greedy` holds the strict exact-match score, and no token has to be generated. (The same text cut into other tokens would be missed: it is a lower bound.) We check it on the first flagged question by really decoding.

# %%
row, questions = scores["mini Llama", "speaker", "play"], items["speaker", "play"]
flags = row.greedy[np.arange(200), row.answers]
at = int(np.flatnonzero(flags)[0])
answer, size = questions[at].choices[row.answers[at]], int(row.tokens[at, row.answers[at]])
decoded = sample(mini, tokenizer, questions[at].prompt, max_tokens=size, temperature=0)
print("the model writes the answer that is flagged:", exact_match(decoded, answer, strict=True))
assert decoded == answer
for model in MODELS[1:]:
    row = scores[model, "speaker", "play"]
    free = confidence_interval(row.greedy[np.arange(200), row.answers])
    print(f"{model:10} chooses the name {100 * row.correct('raw').mean():.1f} %, writes it {free}")

# %% [markdown]
# The check holds. And the same model on the same questions is at 34.5 % or at 8 %, at 65.5 % or at 24 %, depending on whether it may choose among four or must write the name itself. A score without its format is not a score.
#
# ## 7 · pass@k
#
# A program is right if it passes its tests, and a model may try more than once. *pass@k* is the probability that at least one of $k$ tries passes; the paper (§5.2.3) reports pass@1. If a model solves a problem with probability $p$, pass@k is $1-(1-p)^k$. We don't know $p$. We draw $n \ge k$ programs, and $c$ of them pass. It is tempting to put $\hat p = c/n$ for $p$.
#
# **Predict:** is this naive estimate too high, too low, or right on average? Ours: too low, at k = 10 of 20 by more than a point. The curve $1-(1-p)^k$ bends downwards, and by Jensen's inequality the mean of such a curve lies below the curve at the mean.
#
# The unbiased way (Chen et al. 2021) asks which share of all subsets of $k$ of the $n$ programs has a pass in it:
#
# $$ \text{pass@}k = 1 - \binom{n-c}{k}\Big/\binom{n}{k} = 1 - \prod_{i=0}^{k-1} \frac{n-c-i}{n-i}. $$
#
# The $n$ tries are independent, so each subset of $k$ of them is a fair sample of $k$ tries; its mean over all subsets is unbiased, too. The product avoids the huge binomials.


# %%
#| export public workbook
def pass_at_k(n: int, c: Int[np.ndarray, "*B"] | int, k: int) -> Float[np.ndarray, "*B"]:
    """The unbiased estimate of pass@k, from n generations of a problem of which c passed its tests.

    1 − C(n − c, k)/C(n, k): the share of all k-subsets with a pass in them. Shaped like c; average it
    over problems. Raises ValueError unless 1 ≤ k ≤ n and 0 ≤ c ≤ n.
    """
    c = np.asarray(c)
    if not 1 <= k <= n or (c < 0).any() or (c > n).any():
        raise ValueError(f"need 1 <= k <= n and 0 <= c <= n, got n={n}, k={k}, c={c}")
    i = np.arange(k)
    failing = np.maximum(n - c[..., None] - i, 0) / (n - i)
    return 1 - failing.prod(-1)


# %% [markdown]
# To test an estimator of $p$ we need a task where $p$ is *known*. Here is one: a language of eight operations on integers; a program is three of them, so there are 512. A problem is a hidden program, given by what it does to some inputs. Our "programmer" writes each operation correctly with the probability of its skill, and otherwise picks any of the eight. Then the
# probability of each of the 512 programs is known, and $p$ is the sum over those that pass the tests. Programs that differ may do the same, and all of them count.

# %%
OPERATIONS = {
    "double": lambda x: 2 * x,
    "square": lambda x: x * x,
    "negate": lambda x: -x,
    "add one": lambda x: x + 1,
    "add two": lambda x: x + 2,
    "halve": lambda x: x // 2,
    "absolute": abs,
    "triple": lambda x: 3 * x,
}
programs = np.array(list(itertools.product(range(8), repeat=3)))
steps = list(OPERATIONS.values())
inputs = np.array([2, *range(-9, 11)])
outputs = np.stack([steps[c](steps[b](steps[a](inputs))) for a, b, c in programs])
hidden, skill = rng.integers(0, 512, 100), rng.uniform(0, 0.8, 100)
same = programs == programs[hidden][:, None]
written = np.prod(skill[:, None, None] * same + (1 - skill[:, None, None]) / 8, axis=2)
passes = {t: (outputs[:, :t] == outputs[hidden][:, None, :t]).all(2) for t in (1, 21)}
p = {tests: (written * ok).sum(1) for tests, ok in passes.items()}
print("a problem:", [list(OPERATIONS)[i] for i in programs[hidden[0]]], end=" ")
print(f"turns 2, −9, −8 into {outputs[hidden[0], :3].tolist()}")
print(f"programs that pass: {passes[1][0].sum()} with one test, {passes[21][0].sum()} with 21")
print(f"pass@1, exact: {100 * p[1].mean():.1f} % with one test, {100 * p[21].mean():.1f} % with 21")

# %% [markdown]
# The stricter tests lower pass@1 although no program has changed. That is what EvalPlus does to HumanEval: it adds tests. Now let the programmer write 20 programs for each of the 100 problems, run the tests, and estimate; two hundred times over.

# %%
tries = np.stack([rng.choice(512, (200, 20), p=row) for row in written], axis=1)
c = np.take_along_axis(passes[21].T[None], tries.transpose(0, 2, 1), axis=1).sum(1)
ks = np.arange(1, 21)
true = np.array([np.mean(1 - (1 - p[21]) ** k) for k in ks])
unbiased = np.array([pass_at_k(20, c, k).mean(1) for k in ks])
plugged = np.array([np.mean(1 - (1 - c / 20) ** k, axis=1) for k in ks])
fig, ax = plt.subplots(figsize=(6, 3.2))
ax.plot(ks, 100 * true, "k-", label="truth", linewidth=1)
ax.errorbar(
    ks, 100 * unbiased.mean(1), 100 * unbiased.std(1), fmt="o", markersize=4, label="unbiased"
)
ax.plot(ks, 100 * plugged.mean(1), "s", color="C1", markersize=4, label="naive")
ax.set(xlabel="k", ylabel="pass@k, %", xticks=[1, 5, 10, 15, 20])
ax.legend(loc="lower right")
plt.show()
for k in (1, 10, 20):
    off = [round(100 * (e[k - 1].mean() - true[k - 1]), 1) + 0.0 for e in (unbiased, plugged)]
    print(
        f"k = {k:2}: truth {100 * true[k - 1]:.1f} %, unbiased {off[0]:+.1f}, naive {off[1]:+.1f} points"
    )

# %% [markdown]
# The plot: the black line is the truth, the dots are the unbiased estimate with its standard deviation over 200 evaluations of the same 100 problems (other problems would add more, see exercise 3), the squares are the naive one. At $k = 1$ the two are the same number. The naive one then falls behind.
# The bars grow with $k$: pass@20 from 20 tries is just "was there any pass", one bit per problem.

# %%
#| claim L102
right, ps = np.arange(21), np.linspace(0, 1, 21)[:, None]
for k in (1, 5, 10, 20):  # the expectation over c, exactly
    expected = (stats.binom.pmf(right, 20, ps) * pass_at_k(20, right, k)).sum(1)
    assert np.abs(expected - (1 - (1 - ps[:, 0]) ** k)).max() < 1e-12
stricter = interval(100 * (p[1] - p[21]), "points", digits=1)
print("one test instead of 21 adds to pass@1:", stricter)
assert stricter.low > 0
ledger.claim(
    "L102",
    section="5.2.3",
    claim="stricter tests lower pass@1 (asserted); pass@k from n tries is unbiased as 1 − C(n−c,k)/C(n,k) (asserted exactly); the naive 1 − (1 − c/n)^k "
    "is too low (k = 10, n = 20, the same 100 problems of a toy language in 200 evaluations; truth − naive)",
    predicted=ledger.at_least(1, "points"),
    measured=interval(100 * (true[9] - plugged[9]), "points", digits=1),
    verdict="reproduced",
    function="evaluation.pass_at_k",
    test="tests/test_evaluation.py::test_pass_at_k_is_the_share_of_subsets",
)

# %% [markdown]
# ## 8 · Every model that we have
#
# A score needs something to be compared with. *Chance* is 25 %. The *majority* answer is the speaker whose name stands most often in the prompt; for lines, where no answer is commoner than another, it is the best constant position, chosen after the fact. And there are rules that understand nothing. For the speaker: take the one who was the last to speak *before* the last speaker, because people answer each other. For the line: take the line that shares most
# different words with the prompt.
#
# **Predict** the order of the rule, the mini Llama and SmolLM2 on the speaker task. Ours: the models first, since they see everything that the rule sees.


# %%
def recency(item: Item) -> int:
    """The choice whose name stands last as a speaker in the prompt; the first if none does."""
    places = [item.prompt.rfind(f"\n\n{choice.strip()}\n") for choice in item.choices]
    return int(np.argmax(places))


def most_frequent(item: Item) -> int:
    """The choice that is most often a speaker in the prompt."""
    return int(np.argmax([item.prompt.count(f"\n{c.strip()}\n") for c in item.choices]))


def overlap(item: Item) -> int:
    """The choice that shares most different words with the prompt."""
    known = set(plain_answer(item.prompt).split())
    return int(np.argmax([len(known & set(plain_answer(c).split())) for c in item.choices]))


right = {}
for (task, template), questions in items.items():
    answers = np.array([item.answer for item in questions])
    rule = recency if task == "speaker" else overlap
    majority = [most_frequent(item) for item in questions]
    constant = np.bincount(answers).argmax()
    right["majority", task, template] = answers == (majority if task == "speaker" else constant)
    right["rule", task, template] = np.array([rule(item) for item in questions]) == answers
    for model in MODELS:
        by = "raw" if task == "speaker" else "prior"
        right[model, task, template] = scores[model, task, template].correct(by)
ROWS = ("majority", "rule", *MODELS)
for task in TASKS:
    for template in TEMPLATES:
        for model in ROWS:
            print(
                f"{task:8}{template:9}{model:11}", confidence_interval(right[model, task, template])
            )

# %% [markdown]
# The rule wins against the mini Llama by 21.5 points, and so does the mere count of names. Our prediction was wrong for one of the two models. Only SmolLM2 does better than the rule. Whoever had printed "34.5 %, well above chance" without this line would have been right, and would have misled everybody. On the lines the best constant position has 31.5 %, and its interval excludes chance: that is what choosing after the fact does to an interval. To share words with the prompt is worth 35.5 %, about what the 6-gram reaches. (One row is no score. Asked in English, the 6-gram sees no more than "Answer:", with the play or without it. Against the prior all its lines tie at zero, a tie goes to the first choice, and 21.5 % is how often that one is right.) Why does the rule for names do so well?

# %%
seen = [
    f"\n\n{item.choices[item.answer].strip()}\n" in item.prompt for item in items["speaker", "play"]
]
seen = np.array(seen)
print(f"the answer has a speech in the prompt: {100 * seen.mean():.0f} % of the questions")
for model in ("rule", *MODELS):
    row = right[model, "speaker", "play"]
    print(
        f"{model:11} right {100 * row[seen].mean():3.0f} % of them, {100 * row[~seen].mean():3.0f} % of the others"
    )

# %% [markdown]
# There it is. In three questions of five the answer stands as a speaker in the prompt, and the rule finds it in 83 % of them; in the others it is worse than chance, since it always bets on somebody who has spoken. SmolLM2 is nearly as good on the first kind and well above chance on the second, so it knows more than the rule. The mini Llama is hardly better on the first kind than on the second. To copy a name from a few lines back is what it has
# not learnt, and section 3 gave the hint: it makes little use of its context.

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for ax, task in zip(axes, TASKS, strict=True):
    for shift, template in ((-0.12, "play"), (0.12, "question")):
        found = [confidence_interval(right[model, task, template]) for model in ROWS]
        means = [i.mean for i in found]
        bars = [[i.mean - i.low for i in found], [i.high - i.mean for i in found]]
        ax.errorbar(np.arange(5) + shift, means, bars, fmt="o", markersize=4, label=template)
    ax.axhline(25, color="grey", linewidth=0.8)
    ax.set(title=task, xticks=range(5), xticklabels=ROWS, ylim=(0, 100))
axes[0].set(ylabel="right, % (95 % interval)")
axes[1].legend(loc="upper left", title="template")
fig.tight_layout()
plt.show()
above = [m for m in MODELS if confidence_interval(right[m, "speaker", "play"]).low > 25]
print("surely above chance on speakers, template play:", above)

# %% [markdown]
# The plot shows the same numbers, chance as a grey line. Now compare in pairs, item by item. For each pair: the difference with its paired interval, the same from chapter 06's `paired_bootstrap`, the share $d$ of items on which exactly one is right, and the difference that 200 such items could have found.


# %%
def mean_score(picked, _) -> float:
    return 100 * float(np.mean(picked))


PAIRS = [("mini Llama", "6-gram"), ("SmolLM2", "mini Llama"), ("SmolLM2", "rule")]
for task in TASKS:
    for a, b in PAIRS:
        one, two = right[a, task, "play"], right[b, task, "play"]
        paired = interval(100.0 * one - 100.0 * two, "points", digits=1)
        drawn_again = paired_bootstrap(mean_score, one, two, one, samples=1000)
        low, high = np.quantile(drawn_again, [0.025, 0.975])
        d = float(np.mean(one != two))
        print(f"{task:8}{a} − {b}: {paired}; bootstrap [{low:.0f}, {high:.0f}];", end=" ")
        print(
            f"d = {100 * d:.0f} %, detectable {detectable_difference(200, 0.5, disagreement=d):.0f}"
        )

# %% [markdown]
# Now the question of the beginning has its answer. On the names the mini Llama leads the 6-gram by 5.5 points, and the interval reaches down to zero: not to be believed yet, at $N=200$. On the lines its lead is 13.5 points, and the interval is clear of zero. That SmolLM2 beats the one-line rule is also believable, just: the questions come from a few scenes and are not quite independent, so all these intervals are somewhat too narrow (exercise 2). But that a model of 135 million parameters is better than ours of four million at finding the next line, by 8.5
# points, is *not* shown by these 200 questions, whatever one believes about it. (The 6-gram and the mini Llama have read only other plays. SmolLM2 was trained on the web, where these two stand. Its numbers are most likely no held-out numbers.)
#
# The bootstrap of chapter 06 gives the same ends to a point. The last column explains the failures: with two models that disagree on nearly half of the items, 200 of them can only find differences of 13 points. A small $d$ is a gift: the mini Llama and the 6-gram agree often on the names, which is why 5.5 points nearly suffice there.
#
# ### The luck that the interval does not know
#
# The interval knows the luck of the items. Two others we can measure. The *template*: the last figure has both, on the same 200 questions. And the *training text* ("seed" in the code): what would the score be, had the model been trained on other text of the same kind? The 6-gram is quick to train, so we fit five of them, each on a random half of the training plays.
#
# **Predict** the standard deviation over seeds, compared with that over items, which is 3.3 points. Ours: half as much.

# %%
corpus = [play.text.encode() for play in plays("train")]
by_seed, hits_by_seed = [], []
for seed in range(5):
    half = random.Random(seed).sample(corpus, len(corpus) // 2)
    found = ngram_choice(NGram(6).fit(half), items["line", "play"])
    hits_by_seed.append(found.correct("prior"))
    by_seed.append(100 * hits_by_seed[-1].mean())
over_seeds = np.std(by_seed, ddof=1)
share = np.mean(by_seed) / 100
over_items = 100 * math.sqrt(share * (1 - share) / 200)
print("five seeds:", [round(float(x), 1) for x in by_seed])
print(f"standard deviation: seeds {over_seeds:.1f}, items {over_items:.1f} points")
d = np.mean([np.mean(a != b) for a, b in itertools.combinations(hits_by_seed, 2)])
print(f"they disagree on {100 * d:.0f} % of the items: ", end="")
print(f"if all were equally good, they would still spread by {100 * math.sqrt(d / 2 / 200):.1f}")
for task, model in itertools.product(TASKS, MODELS[1:]):  # the 6-gram sees only "Answer:"
    one, two = (right[model, task, template] for template in TEMPLATES)
    change = interval(100.0 * one - 100.0 * two, "points", digits=1)
    print(f"{task:8}{model:11} play − question:", change)

# %% [markdown]
# Other training text moves the counting model by about half as much as the items do, as predicted (a rough number, from five values). But the two are not yet apart: models that are equally good, but right on different items, spread too on 200 items, by √(d/2N), the last number of the cell. This part shrinks with more items. What is beyond it is a true difference between the trainings: no number of items makes it smaller, and no interval over items shows it. Here nothing is left beyond it: half of the plays or the other half, the counting model is the same.
#
# The template is luck of a third kind, and the largest here. To be asked in English costs the mini Llama 16.5 points on the names and takes it from above chance to *below* it; no play has questions of this form. SmolLM2 has been taught to answer questions (in a chat format, which we do not use), and loses nothing on the names that 200 items can show, but 18 points on the lines. As a question the lines even put the mini Llama in front, 42 against 38.5 %, though 200 items cannot show a difference of 3.5 points.
# Whoever had asked in one way only would have known none of this.
#
# ## Break it
#
# While this chapter was written, the line task had a fault. It took the *last* line of each speech, which is easier to find in the text. Everything ran, the answers were right, and the mini Llama scored well above chance. **Predict** what could give the answer away, before you run the next cell.


# %%
def last_line_items(seed: int = 0) -> list[Item]:
    """The fault: the question is about the last line of a speech."""
    chooser, made = random.Random(seed), []
    for play in plays("validation"):
        told = [turn for turn in turns(play) if len(turn.lines) >= 3]
        for turn in told:
            elsewhere = [x for t in told if t.scene != turn.scene for x in t.lines]
            choices = shuffled(turn.lines[-1], chooser.sample(elsewhere, 3), chooser)
            made.append(Item("", *choices))
    return drawn(made, 200, chooser)


for name, questions in (("last lines", last_line_items()), ("inner lines", items["line", "play"])):
    answers = np.array([item.answer for item in questions])
    lengths = np.array([[len(choice) for choice in item.choices] for item in questions])
    shortest = confidence_interval(lengths.argmin(1) == answers)
    print(f"{name:11}: the shortest choice is right in {shortest}")
    assert (shortest.low > 25) == (name == "last lines")

# %% [markdown]
# The end of a speech is often a half line. "Take the shortest choice" reads no word of the play and is right in every second case, twice as often as chance. (The first draft of this chapter had this fault for an hour. The mini Llama's raw score on such questions was 43 %, and looked like a success.) The check is cheap and belongs to every benchmark: rules that see
# no prompt, such as the shortest choice or the prior alone, must be at chance. On the inner lines they are.
#
# ## Notes on the sources
#
# **Llama Team 2024, §5.1.1 and §5.2.3.** The interval formula reproduces the printed widths. It is off near 100 %, where the paper prints 100.0 ± 0.0; the agreement of the bootstrap is no evidence there. The paper says itself that the interval is a lower bound on the variation. We found no paired comparison in it, although its models answer the same items. Of pass@N it says little; the unbiased estimator is from Chen et al.
#
# **Jurafsky and Martin, *Speech and Language Processing*, 3rd edition draft, chapter 3.** (We paraphrase; the drafts change.) Perplexity is introduced with the warning that only models of one vocabulary may be compared. Our table is an instance. The bridge to bits per byte is not made there.
#
# **Wilson 1927** needs four pages. **Chen et al. 2021** give the estimator and its product form, and say that the naive one is too low. How much depends on the problems: ours are a toy.
#
# **Shannon 1951.** The bounds are for an ideal guesser. With a model as guesser only the upper one is safe.
#
# **Koehn 2004** proposed the paired bootstrap for translation. For right-or-wrong items it gives what the paired $t$-interval gives, to the point.

# %% [markdown]
# ## Remember
#
# **Q:** What is the 95 % interval of a score S on N items in the Llama 3 paper, and where does it fail?
#
# **A:** S ± 1.96·√(S(1−S)/N). Near 0 and 1 it is too narrow, and at 100 % it has no width; Wilson's interval holds there.
#
# **Q:** Which difference can a test of 200 items find, if two models disagree on 20 % of them?
#
# **A:** About 2.8·√(0.2/200), nine points, in four of five tries.
#
# **Q:** Why may perplexities of models with different tokenizers not be compared?
#
# **A:** Perplexity is per token, and their tokens are different things. Bits per byte divide all bits by the bytes of the same text.
#
# **Q:** How does a base model answer a multiple-choice question?
#
# **A:** Each choice is scored by its log-probability after the prompt, corrected for its length or for its prior, and the best is the answer.
#
# **Q:** Why is 1 − (1 − c/n)^k a wrong estimate of pass@k?
#
# **A:** The curve is concave in p, so on average the estimate is too low (Jensen). The share of k-subsets with a pass in them is unbiased.

# %% [markdown]
# ## Exercises
#
# 1. **The rule of three.** A model answers all of $N$ items. Which true error rate can one still not exclude, at 95 %? Solve $(1-e)^N = 0.05$, and compare with $3/N$ and with Wilson's lower end. Success: for $N=100$ you get 3.0 %, 3 %, and a somewhat larger one, and can say why it is larger.
# 2. **Items that come in families.** Questions from one scene are not independent. Resample *scenes* instead of items for the recency rule, and compare the two standard errors. Success: you know which is larger here, and by how much.
# 3. **How many tries?** For pass@1 with a budget of 2,000 programs, is it better to write 20 for each of 100 problems or one for each of 2,000? Success: the standard errors of both, by the law of total variance or by simulation, on problems like ours.
# 4. **McNemar.** Of the items on which exactly one of two models is right, each would be right half of the time if they were equal. Test "SmolLM2 against mini Llama" on the lines with `stats.binomtest`. Success: a p-value that agrees with the paired interval above about significance.

# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution 1
for n in (100, 1000):
    exact = 1 - 0.05 ** (1 / n)
    wilson = 1 - interval_ends(1.0, n)[0]
    print(
        f"N = {n:4}: exact {100 * exact:.2f} %, rule of three {300 / n:.2f} %, Wilson {100 * wilson:.2f} %"
    )
# Wilson's is one end of a two-sided interval: it leaves out 2.5 % on this side, not 5 %
assert abs(1 - 0.05 ** (1 / 100) - 0.0295) < 1e-4 and 1 - interval_ends(1.0, 100)[0] > 0.03

# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution 2
places = {}
for play in plays("validation"):
    for turn in turns(play):
        places[tail(play.text[: turn.begin], CONTEXT)] = (play.slug, *turn.scene)
scene = [places[item.prompt] for item in items["speaker", "play"]]
hits = right["rule", "speaker", "play"]
groups = [hits[[i for i, s in enumerate(scene) if s == name]] for name in sorted(set(scene))]
draws = rng.integers(0, len(groups), (2000, len(groups)))
means = [np.concatenate([groups[i] for i in draw]).mean() for draw in draws]
by_item = math.sqrt(hits.mean() * (1 - hits.mean()) / 200)
print(
    f"{len(groups)} scenes; standard error by items {100 * by_item:.1f}, by scenes {100 * np.std(means):.1f}"
)
assert np.std(means) > by_item

# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution 3
between, within_ = p[21].var(), np.mean(p[21] * (1 - p[21]))
for problems, each in ((100, 20), (2000, 1)):
    error = math.sqrt((between + within_ / each) / problems)
    print(
        f"{problems:5,} problems, {each:2} programs each: standard error {100 * error:.1f} points"
    )
assert between > within_ / 20  # most of the luck is in which problems were asked

# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution 4
one, two = right["SmolLM2", "line", "play"], right["mini Llama", "line", "play"]
wins, losses = int(np.sum(one & ~two)), int(np.sum(two & ~one))
test = stats.binomtest(wins, wins + losses)
paired = interval(100.0 * one - 100.0 * two)
print(
    f"SmolLM2 alone right: {wins}, mini Llama alone right: {losses}; p below 0.05: {test.pvalue < 0.05}"
)
assert (test.pvalue < 0.05) == (paired.low > 0 or paired.high < 0)

# %% [markdown]
# ## References
#
# - Llama Team: The Llama 3 Herd of Models, §5.1.1, §5.2.3. <https://arxiv.org/abs/2407.21783>
# - D. Jurafsky, J. H. Martin: *Speech and Language Processing*, 3rd edition draft, chapter 3. <https://web.stanford.edu/~jurafsky/slp3/>
# - E. B. Wilson: Probable inference, the law of succession, and statistical inference. *JASA* 22, 209–212, 1927.
# - C. E. Shannon: Prediction and entropy of printed English. *Bell System Technical Journal* 30, 50–64, 1951.
# - M. Chen et al.: Evaluating large language models trained on code. <https://arxiv.org/abs/2107.03374>
# - P. Koehn: Statistical significance tests for machine translation evaluation. *EMNLP* 2004. <https://aclanthology.org/W04-3250/>
# - J. Liu et al.: Is your code generated by ChatGPT really correct? (EvalPlus) <https://arxiv.org/abs/2305.01210>
#
# ## Next chapter
#
# All questions here were asked without an example. Chapter 16 puts examples into the prompt and measures, with the intervals of this chapter, how much a model learns from them without any training.
