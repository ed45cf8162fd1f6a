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
# # 12 · Generation
#
# > Prefill and decode with a cache of static shape, prompts of different lengths in one batch, every common sampler, streaming, and log-probabilities of given text.
#
# *Reading time 35 min · runs in about 45 s · difficulty ●●○ · needs 01, 05, 07, 10, 11*

# %% [markdown]
# A language model gives a distribution over the next token, and nothing else. Everything that looks like writing happens outside of it: which token is taken, what is kept from one step to the next, when to stop.
# This chapter is about that outside. It has two halves that hardly touch. One is *speed*: how not to compute everything again for each token (sections 1–3 and 8). The other is *choice*: what to do with 4,096 probabilities (sections 4 and 7).
#
# Chapter 11 has a function `sample`: one prompt, temperature only, and a cache that is handled one token at a time. It was enough to hear the model speak. What we build here, `generate`, is the general form: many prompts of different lengths at once, all common samplers, and a step whose cache is written in place. From here on the course uses `generate` and `stream`.
#
# The model is the mini Llama 3 of chapter 11, four million weights, read from `checkpoints/`. Nothing is trained in this chapter.

# %%
#| export
import codecs
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun, jaxprs_in_params
from jaxtyping import Array, Bool, Float, Int, Key

from llm_from_scratch.llama import (
    Attention,
    KVCache,
    Llama,
    SwiGLU,
    accumulator,
    apply_rope,
    init_cache,
    linear,
)
from llm_from_scratch.tokenizer import Tokenizer

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt

from llm_from_scratch import datasets, ledger, pretraining
from llm_from_scratch.attention import beam_search

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
repository = next(p for p in Path.cwd().resolve().parents if (p / "results").is_dir())
model, tokenizer = pretraining.load(repository / "checkpoints" / "mini-llama3-short")
line = "To be, or not to be: that is the question:"
ids = tokenizer.encode(line, bos=True)
print([tokenizer.decode([i]) for i in ids])
print(f"{model.config.n_layers} layers, D = {model.config.dim}, {tokenizer.vocab_size} ids")

# %% [markdown]
# ## 1 · The problem: everything, again
#
# The shortest generator runs the model on the whole text, takes the likeliest next token, appends it, and starts over. There is one trap even here. JAX compiles a program for each *shape*, so a text that grows by one token would be compiled anew at each step. The cure is to fix the shape: pad the text to its final length with zeros. The causal mask makes this harmless, since no position sees what comes after it.


# %%
#| workbook
def recompute(model, ids, count):
    """The `count` likeliest next tokens, one after another, a full forward pass for each of them."""
    ids, n = np.pad(ids, (0, count)), len(ids)
    for i in range(n, n + count):
        logits = forward(model, jnp.array(ids[None], jnp.int32))[0]
        ids[i] = logits[i - 1].argmax()
    return ids[n:].tolist()


# %%
forward = jax.jit(lambda model, tokens: model(tokens))
slow = recompute(model, ids, 96 - len(ids))
print(f"{len(slow)} tokens, {len(set(slow))} different ones")

# %% [markdown]
# Fewer than half of the tokens are different ones, where Shakespeare has three quarters or so. The text begins to go in circles. Keep that in mind for section 7.
#
# How much work was it? Llama has $N$ weights, and each takes part in one multiplication and one addition for each position: about $2N$ operations per token read. (Attention adds a part that grows with the length.) To write $n$ tokens this way is $n$ passes over $n$ positions, as the padding is computed too: $2Nn^2$.
#
# But look at what is computed twice. At position $t$ each layer makes a query, a key and a value from the tokens up to $t$. A later token changes none of them: that is what causal means. Of the old positions, only keys and values are ever looked at again. So keep those, and give the model one new token at a time.
#
# ## 2 · Prefill and decode
#
# Chapter 10's `KVCache` holds the keys and values of all layers in buffers of fixed size, `"*B S K Dh"`, with a `length` for each row. Generation then has two phases.
#
# - **Prefill** reads the whole prompt in one pass and fills the cache. It is one large matrix product for each weight matrix, as in training. We only need the logits of the last position, so the output matrix (a quarter of this model's weights) is applied to one position, not to all.
# - **Decode** reads one token for each row, writes its keys and values into the next slot, and gives logits of shape `"B V"`. It is called once per token.


# %%
#| export workbook
@functools.partial(jax.jit, static_argnames="slots")
def prefill(
    model: Llama, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], slots: int
) -> tuple[Float[Array, "B V"], KVCache]:
    """Read the prompts in one pass: logits of each row's next token, and a cache of `slots` slots.

    Rows are padded on the right to T ≤ slots with any token of the vocabulary; `lengths` are the true ones.
    """
    cache = init_cache(model.config, tokens.shape[0], slots, model.embedding.dtype)
    h, cache = model.hidden(tokens, cache=cache)
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)[:, 0]
    cache = eqx.tree_at(lambda c: c.length, cache, lengths)  # the padding will be overwritten
    return linear(last, model.output_weight), cache


# %%
#| export workbook
@functools.partial(jax.jit, donate_argnames="cache")
def advance(
    model: Llama, tokens: Int[Array, " B"], cache: KVCache
) -> tuple[Float[Array, "B V"], KVCache]:
    """Read one token per row: logits of the next one, and the cache with this one in it.

    The cache that is passed in is donated: its buffers are written in place, it can't be used again.
    """
    logits, cache = model(tokens[:, None], cache=cache)
    return logits[:, 0], cache


# %% [markdown]
# Why `donate_argnames`? JAX arrays never change, so "write into the cache" would mean: copy all of it, with one slot changed, at each token. A donated argument is given up by the caller, and XLA may write into its memory.
#
# **Check.** Feed a speech of a validation play, 32 tokens by prefill and 64 by single steps. At each position the logits must be those of one full pass. How many programs did XLA compile for the 64 steps?

# %%
speech = tokenizer.encode(datasets.plays("validation")[0].text[2000:4000], bos=True)[:96]
whole = forward(model, jnp.array([speech], jnp.int32))[0]
logits, cache = prefill(model, jnp.array([speech[:32]], jnp.int32), jnp.array([32]), slots=128)
difference = [jnp.abs(logits[0] - whole[31]).max()]
for t in range(32, 96):
    logits, cache = advance(model, jnp.array(speech[t : t + 1], jnp.int32), cache)
    difference.append(jnp.abs(logits[0] - whole[t]).max())
print(f"{len(difference)} positions: within 1e-4: {float(max(difference)) < 1e-4}")
print(f"programs compiled for 64 steps: {advance._cache_size()}")
assert float(max(difference)) < 1e-4

# %% [markdown]
# One program. Position and length are *numbers in arrays*, not shapes, so step 64 runs the code of step 1. In `tests/test_generation.py` the same equality is a property over random shapes, lengths and batches: 1e-4 in fp32, 1e-10 in fp64.
#
# **Predict.** Per $n$ generated tokens, how does the work grow, recomputed and cached? Ours: like $n^2$ and like $n$, and a little more, as attention adds to both. We count rather than time: XLA tells how many operations a program has without running it. (It counts the body of a loop once, whatever the number of turns, and chapter 10's attention is a loop. So each loop's other turns are added.) The text has length $n$ and the cache $n$ slots, so a single step of the cached form isn't quite constant: attention looks at all $n$ slots.


# %%
#| export
def xla_count(program: ClosedJaxpr, what: str = "flops") -> float:
    """XLA's "flops" or "bytes accessed" of a program, `jax.jit(f).trace(...).jaxpr`; nothing is run.

    The program as JAX hands it over, before anything is fused. XLA counts the body of a `lax.scan`
    once; its other turns are added.
    """

    def loops(jaxpr: Jaxpr) -> Iterator[tuple[int, ClosedJaxpr]]:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                yield equation.params["length"], equation.params["jaxpr"]
                continue
            for inner in jaxprs_in_params(equation.params):
                yield from loops(getattr(inner, "jaxpr", inner))

    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in program.in_avals]
    total, counts = jax.jit(jaxpr_as_fun(program)).lower(*shapes).cost_analysis()[what], {}
    for turns, body in loops(program.jaxpr):
        if (text := str(body)) not in counts:  # the layers of a model have the same loops
            counts[text] = xla_count(body, what)
        total += (turns - 1) * counts[text]
    return total


# %%
def of_shape(*shape):
    """An array of ids that has a shape and no contents."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


lengths = np.array([64, 128, 256, 512])
full, step = [], []
for n in lengths:
    cache = jax.eval_shape(lambda n=n: init_cache(model.config, 1, int(n)))
    full.append(n * xla_count(forward.trace(model, of_shape(1, int(n))).jaxpr))
    step.append(n * xla_count(advance.trace(model, of_shape(1), cache).jaxpr))
print("tokens   recomputed   cached, GFLOP")
for n, a, b in zip(lengths, full, step, strict=True):
    print(f"{n:6}   {a / 1e9:10,.1f}   {b / 1e9:6.2f}")

# %%
slopes = [float(np.polyfit(np.log(lengths), np.log(work), 1)[0]) for work in (full, step)]
fig, ax = plt.subplots(figsize=(6.5, 3.4))
for work, slope, label in zip((full, step), slopes, ("recomputed", "cached"), strict=True):
    ax.loglog(lengths, np.array(work) / 1e9, "o-", label=f"{label}: slope {slope:.2f}")
ax.set(xlabel="tokens generated, n", ylabel="GFLOP, all steps")
ax.legend()
plt.tight_layout()
plt.show()
print(f"work grows like n^{slopes[0]:.2f} recomputed, n^{slopes[1]:.2f} cached")

# %% [markdown]
# The lines are nearly straight, with slopes near 2 and near 1; they bend upwards a little. (The model was trained for 256 tokens; counting may go further.) What is above is attention, whose own work is cubic in one and quadratic in the other. At 512 tokens the cache saves a factor of more than four hundred.
#
# Memory is the price. A slot takes $2 \cdot L \cdot K \cdot Dh$ numbers: keys and values, for each layer and key head. Here that is 4 KB. For Llama 3 405B in bf16 it is 0.5 MB per token, and would be 16 times that without grouped queries.
#
# ## 3 · Prompts of different lengths
#
# A batch is a rectangle and prompts are not. There are two ways to pad.
#
# *On the left*, so that all prompts end in the same column. Then position 0 of a short prompt is in the middle of its row: positions have to be shifted, and the padding must be masked at each step, forever.
#
# *On the right*, as we do. Prompt tokens stand at their true positions. A prompt's own tokens never see the padding, since it lies in their future. The logits are read at each row's last true token. What remains is the cache, whose slots after the prompt now hold keys of padding. But slots from `length` on are never seen, and the next token *overwrites* the first of them. So setting `length` to the true lengths, one line of `prefill`, is the whole treatment. The padding never shows because each slot of it is written over in the very step that would make it visible.
#
# Lengths are rounded up to multiples of 32, slots to 64, so that prompts of similar length share a compiled program.


# %%
#| export
def pad_prompts(
    model: Llama, prompts: Sequence[Sequence[int]], max_tokens: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"], int]:
    """Prompts padded on the right to a multiple of 32, their true lengths, and slots for it all.

    Raises ValueError, with the row, for no prompt, an empty one, a token outside the vocabulary,
    max_tokens below 1, or a prompt that together with max_tokens exceeds max_seq_len.
    """
    vocabulary, limit = model.config.vocab_size, model.config.max_seq_len
    if max_tokens < 1 or not len(prompts):
        raise ValueError(
            f"max_tokens and the number of prompts must be at least 1, "
            f"got max_tokens={max_tokens}, {len(prompts)} prompts"
        )
    if np.ndim(prompts[0]) == 0:
        raise ValueError(f"prompts must be a list of lists of ids, got {prompts[0]!r} as its first")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), -(-lengths.max() // 32) * 32), np.int32)
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: begin with BOS, the token that starts a text")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(f"prompt {row} has a token outside the vocabulary 0..{vocabulary - 1}")
        if len(prompt) + max_tokens > limit:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens: with max_tokens={max_tokens} it exceeds "
                f"max_seq_len={limit}"
            )
        tokens[row, : len(prompt)] = prompt
    return tokens, lengths, -(-(int(lengths.max()) + max_tokens) // 64) * 64


# %%
texts = ["To be", "O Romeo, Romeo, wherefore art thou", "Now is the winter of our discontent made"]
prompts = [tokenizer.encode(text, bos=True) for text in texts]
tokens, lengths, slots = pad_prompts(model, prompts, max_tokens=20)
print("lengths", lengths.tolist(), "tokens", tokens.shape, "slots", slots)
together, cache = prefill(model, tokens, lengths, slots)
for row, prompt in enumerate(prompts):
    alone = forward(model, jnp.array([prompt + [9] * (96 - len(prompt))], jnp.int32))
    assert jnp.abs(alone[0, len(prompt) - 1] - together[row]).max() < 1e-4
print("each row's logits are those that it has alone, within 1e-4")
print("slots filled:", cache.length.tolist())

# %% [markdown]
# `lengths` differ, and each row is as if it were alone. The rows end at different times as well. A row that has met its stop token goes on computing, and its tokens are dropped: wasteful, but static. Chapter 17 puts a new prompt into such a row instead.
#
# ## 4 · Choosing a token
#
# Logits $z \in \mathbb R^V$ become probabilities $p_i = e^{z_i} / \sum_j e^{z_j}$. All samplers are changes of $z$ before that. Here is a distribution over five tokens, for checks by hand.

# %%
toy = jnp.log(jnp.array([0.50, 0.25, 0.15, 0.07, 0.03]))


def percent(logits):
    """Probabilities in per cent, as text."""
    return "  ".join(f"{100 * float(p):5.1f}" for p in jax.nn.softmax(logits))


print("as it is       ", percent(toy))
print("temperature 0.5", percent(toy / 0.5))
print("temperature 2  ", percent(toy / 2))

# %% [markdown]
# **Temperature** divides the logits: $p_i(T) \propto e^{z_i/T} = p_i^{1/T}$. At $T = 0.5$ each probability is squared, then all are rescaled: $0.5^2/(0.5^2+0.25^2+0.15^2+0.07^2+0.03^2) = 73\,\%$. Towards 0 the likeliest token takes everything, which is **greedy** decoding; towards infinity all are equal. The order of the tokens never changes, and no token ever becomes impossible.
#
# That last point is the trouble. A vocabulary has thousands of unlikely tokens, each harmless alone, together perhaps a tenth of the mass. In a hundred steps one falls into that tail some ten times, and what comes from there is often nonsense that the model must go on from. **Truncation** cuts the tail off. The samplers differ in where they cut.
#
# - **top-k** keeps the $k$ likeliest. The samples that were published with GPT-2 used $k = 40$. The number is the same whether the model is certain or not.
# - **top-p** (nucleus) keeps the smallest set of likeliest tokens whose mass reaches $p$. The set is wide where the model is unsure.
# - **min-p** keeps the tokens that are at least $p$ times as likely as the likeliest one: $z_i \ge z_{max} + \ln p$. No sort, no sum.
#
# Each sets what it cuts to $-\infty$. The softmax then rescales the rest, whose ratios stay what they were.


# %%
#| export workbook
def keep_top_k(logits: Float[Array, "*B V"], k: int) -> Float[Array, "*B V"]:
    """The k largest logits; all others become −∞. Ties with the last one stay."""
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


# %%
#| export workbook
def keep_top_p(logits: Float[Array, "*B V"], p: float) -> Float[Array, "*B V"]:
    """The smallest set of likeliest tokens whose probability reaches p; all others become −∞.

    The likeliest always stays, as do ties with the last one. Source: Holtzman et al. 2020, §3.1.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    descending = jnp.sort(probabilities, axis=-1, descending=True)
    before = jnp.cumsum(descending, axis=-1) - descending  # the mass of all that are likelier
    least = jnp.where(before < p, descending, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(probabilities >= least, logits, -jnp.inf)


# %%
#| export workbook
def keep_min_p(logits: Float[Array, "*B V"], p: float) -> Float[Array, "*B V"]:
    """Tokens at least p times as likely as the likeliest one; all others become −∞.

    Source: Nguyen et al. 2024, §3.
    """
    return jnp.where(logits >= logits.max(-1, keepdims=True) + np.log(p), logits, -jnp.inf)


# %% [markdown]
# By hand: top-k 2 must give ⅔ and ⅓. Top-p 0.7 needs the first two (0.75). Min-p 0.25 keeps what is above 0.125: three tokens.

# %%
print("top-k 2    ", percent(keep_top_k(toy, 2)))
print("top-p 0.7  ", percent(keep_top_p(toy, 0.7)))
print("min-p 0.25 ", percent(keep_min_p(toy, 0.25)))
for cut, kept in ((keep_top_k(toy, 2), 2), (keep_top_p(toy, 0.7), 2), (keep_min_p(toy, 0.25), 3)):
    expected = jnp.where(jnp.arange(5) < kept, jnp.exp(toy), 0)
    assert jnp.allclose(jax.nn.softmax(cut), expected / expected.sum(), atol=1e-6)

# %% [markdown]
# The **repetition penalty** of Keskar et al. works on the tokens that occurred already, prompt included. It divides their logits by $\theta > 1$. A negative logit would be *raised* by that, so there one multiplies instead.


# %%
#| export workbook
def penalise(
    logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"], penalty: float
) -> Float[Array, "*B V"]:
    """Divide the positive logits of tokens seen before by the penalty, multiply the negative ones.

    Source: Keskar et al. 2019, §4.1; the rule for negative logits is transformers'.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


# %% [markdown]
# There is something odd about this rule. Softmax doesn't care about a constant added to all logits. Does the penalty? **Predict**, then look: the same distribution, once as it is, once with 5 added to each logit, the first token penalised by 1.3.

# %%
first = jnp.arange(5) == 0
for shift in (0.0, 5.0):
    print(f"logits + {shift:.0f}:", percent(penalise(toy + shift, first, 1.3)))
    assert jnp.allclose(jax.nn.softmax(toy + shift), jax.nn.softmax(toy), atol=1e-6)

# %% [markdown]
# The distribution was the same, and the penalised ones are not: the effect depends on where the model happens to have its zero, which training leaves almost free. So a penalty that works for one model means little for the next. Temperature, top-k, top-p and min-p are blind to the shift.
#
# All of it in one place. The order is that of transformers: penalty, temperature, top-k, top-p, min-p, each applied to what the one before left. It matters: top-p after a high temperature keeps more tokens than before it.


# %%
#| export public
@dataclass(frozen=True)
class Sampler:
    """How to choose the next token from logits: one distribution, built in this order.

    repetition_penalty, then temperature, top_k, top_p, min_p, each on what the one before left, as
    in transformers. temperature 0 takes the likeliest token. None switches a truncation off. Raises
    ValueError, naming the field, for a temperature between 0 and 1e-6 or below 0, top_k below 1, top_p or min_p outside
    0 < p ≤ 1, and a repetition_penalty that is not positive.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if self.temperature != 0 and not 1e-6 <= self.temperature < np.inf:
            raise ValueError(
                f"temperature must be 0, or from 1e-6 up and finite, got temperature={self.temperature}"
            )
        k = self.top_k
        if k is not None and (isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1):
            raise ValueError(f"top_k must be an integer of at least 1, got top_k={k}")
        for name in ("top_p", "min_p"):
            p = getattr(self, name)
            if p is not None and not 0 < p <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {name}={p}")
        if not 0 < self.repetition_penalty < np.inf:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")

    def log_probs(
        self, logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"] | None = None
    ) -> Float[Array, "*B V"]:
        """Log-probabilities of the distribution that is drawn from; −∞ for what is cut.

        In fp32 (fp64 for fp64). Without `seen`, the tokens that occurred, no penalty is applied.
        """
        logits = logits.astype(accumulator(logits.dtype))
        if seen is not None and self.repetition_penalty != 1:
            logits = penalise(logits, seen, self.repetition_penalty)
        if self.temperature == 0:
            likeliest = logits.argmax(axis=-1)
            return jnp.log(jax.nn.one_hot(likeliest, logits.shape[-1], dtype=logits.dtype))
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        return jax.nn.log_softmax(logits, axis=-1)


# %% [markdown]
# What does a real distribution look like? After "To be, or not to", the ten likeliest next tokens.

# %%
question = tokenizer.encode("To be, or not to", bos=True)
z = forward(model, jnp.array([question + [0] * (96 - len(question))], jnp.int32))[0]
z = z[len(question) - 1]
top = np.argsort(-np.asarray(z))[:10]
shown = {
    "temperature 1": Sampler(),
    "temperature 0.5": Sampler(0.5),
    "top-p 0.5": Sampler(top_p=0.5),
}
fig, ax = plt.subplots(figsize=(7, 3))
for i, (name, sampler) in enumerate(shown.items()):
    p = np.exp(np.asarray(sampler.log_probs(z)))
    ax.bar(np.arange(10) + 0.27 * (i - 1), p[top], 0.27, label=name)
    print(f"{name:16} ten likeliest: {p[top].sum():.0%}, tokens kept: {int((p > 0).sum())}")
ax.set_xticks(range(10), [repr(tokenizer.decode([t])) for t in top], rotation=30)
ax.set(xlabel="next token", ylabel="probability")
ax.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# The model is unsure here, where a reader isn't: ' be' comes first, but with a few per cent, and ten tokens hold less than a third of the mass. Temperature 0.5 lifts them to 85 % and still allows all 4,096. Top-p 0.5 keeps 38 tokens, with their old ratios.
#
# ## 5 · generate
#
# One step of choice: a distribution for each row, a draw from it, and a note of what has been seen. Each row has its own key, made from the step and the row's number, so a row's draws don't depend on how many neighbours it has. To draw, `jax.random.categorical` adds to each log-probability a noise $-\ln(-\ln u)$, $u$ uniform between 0 and 1, and takes the largest sum: each token wins with exactly its probability (the Gumbel trick).


# %%
#| export
@functools.partial(jax.jit, static_argnames="sampler")
def choose(
    sampler: Sampler,
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"] | None,
    key: Key[Array, ""],
    step: int,
) -> tuple[Int[Array, " B"], Bool[Array, "B V"] | None]:
    """One token per row, and `seen` with it. A row's draw depends on key, step and row only."""
    log_p = sampler.log_probs(logits, seen)
    rows = jnp.arange(logits.shape[0])
    if sampler.temperature == 0:
        tokens = log_p.argmax(axis=-1)
    else:
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, step)))(rows)
        tokens = jax.vmap(jax.random.categorical)(keys, log_p)
    return tokens.astype(jnp.int32), None if seen is None else seen.at[rows, tokens].set(True)


# %% [markdown]
# `decode` is the loop, as an iterator. Note the order in it: the next step is *started* before the chosen tokens are looked at. JAX returns before the work is done, so Python's part (stop tokens, text) runs beside the model's.


# %%
#| export
def decode(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampler: Sampler,
    key: Key[Array, ""] | None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """One new token of every row at a time, max_tokens times; the caller may stop earlier.

    Raises ValueError as `pad_prompts`, when the first token is asked for.
    """
    tokens, lengths, slots = pad_prompts(model, prompts, max_tokens)
    key, seen = jax.random.key(0) if key is None else key, None
    if sampler.repetition_penalty != 1:
        mask = np.zeros((len(prompts), model.config.vocab_size), bool)
        for row, prompt in enumerate(prompts):
            mask[row, list(prompt)] = True
        seen = jnp.asarray(mask)
    logits, cache = prefill(model, tokens, lengths, slots)
    for step in range(max_tokens):
        chosen, seen = choose(sampler, logits, seen, key, step)
        if step + 1 < max_tokens:
            logits, cache = advance(model, chosen, cache)  # runs while the caller looks at `chosen`
        yield np.asarray(chosen)


# %%
#| export public
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampler: Sampler = Sampler(),  # noqa: B008
    stop_ids: Sequence[int] = (),
    key: Key[Array, ""] | None = None,
) -> list[list[int]]:
    """Continue each prompt (ids, of any lengths) by up to max_tokens ids; only the new ids come back.

    A row ends before the first of its ids that is in stop_ids. The same key (None: key 0) gives the
    same ids, and a row's draws don't depend on its neighbours. Raises ValueError as `pad_prompts`.
    """
    written, open_rows = [[] for _ in prompts], set(range(len(prompts)))
    for chosen in decode(model, prompts, max_tokens=max_tokens, sampler=sampler, key=key):
        for row in sorted(open_rows):
            if chosen[row] in stop_ids:
                open_rows.remove(row)
            else:
                written[row].append(int(chosen[row]))
        if not open_rows:
            break
    return written


# %% [markdown]
# **The claim.** With the cache, the same tokens come out as without, at a fraction of the work. The paper doesn't state this; it is implied in all of §6.

# %%
#| claim L122
fast = generate(model, [ids], max_tokens=len(slow), sampler=Sampler(temperature=0))[0]
assert fast == slow
assert 2 <= slopes[0] < 2.3 and 1 <= slopes[1] < 1.3
ledger.claim(
    "L122",
    section="6 (implied)",
    claim="decoding with a KV cache writes the same tokens as recomputing, in work that grows nearly "
    "like n where recomputing grows like n²",
    predicted="equal greedy tokens; exponents from 2 to 2.3 and from 1 to 1.3, as attention adds to them",
    measured=f"{len(fast)} tokens equal; operations counted by XLA grow like n^{slopes[0]:.2f} "
    f"recomputed, n^{slopes[1]:.2f} cached, 64 to 512 tokens",
    verdict="reproduced",
    function="generation.generate",
    test="tests/test_generation.py::test_generate_is_the_naive_loop",
)

# %% [markdown]
# The other half of row L122, throughput against latency, is section 8; it has no verdict of its own. That FP8 improves it (§6.2) isn't tested here.
#
# **Stop tokens.** Generation ends before the first id of `stop_ids`, row by row. With any token as stop token this can be seen. Take the third token of the *first* row's answer: it stops that row after two, and the others wherever they meet it.

# %%
answers = generate(model, prompts, max_tokens=8, sampler=Sampler(temperature=0))
stop = answers[0][2]
cut = generate(model, prompts, max_tokens=8, sampler=Sampler(temperature=0), stop_ids=[stop])
print("lengths", [len(a) for a in answers], "with a stop token", [len(a) for a in cut])
for whole_answer, short in zip(answers, cut, strict=True):
    assert short == whole_answer[: len(short)] and stop not in short

# %% [markdown]
# ## 6 · Streaming, and the log-probability of given text
#
# A reader wants the text while it is written. The tokens are *bytes*, and a character outside of ASCII has several. Decode each token on its own, and such a character falls apart.


# %%
#| export workbook
def text_pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as they come, in pieces that are never half a character.

    Bytes of an unfinished character wait for the next id; left over at the end, they become U+FFFD,
    so that the pieces joined are `tokenizer.decode` of all ids.
    """
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        if piece := text.decode(tokenizer.decode_bytes([i])):
            yield piece
    if piece := text.decode(b"", final=True):
        yield piece


# %%
heart = tokenizer.encode("café ♥")
print("one by one:", [tokenizer.decode([i]) for i in heart])
print("streamed:  ", list(text_pieces(tokenizer, heart)))
assert "".join(text_pieces(tokenizer, heart)) == "café ♥"
assert "".join(text_pieces(tokenizer, heart[:-1])) == tokenizer.decode(heart[:-1])


# %%
#| export public
def stream(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_tokens: int,
    sampler: Sampler = Sampler(),  # noqa: B008
    stop_ids: Sequence[int] | None = None,
    key: Key[Array, ""] | None = None,
) -> Iterator[str]:
    """Continue one prompt and yield the text piece by piece, never half a character.

    A prompt of type str is encoded after BOS, if the tokenizer has one; ids are taken as they are.
    stop_ids: the tokenizer's by default. The pieces joined are the decoded ids of `generate`. Raises
    ValueError as `pad_prompts`, when the first piece is asked for.
    """
    if isinstance(prompt, str):
        prompt = tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)
    stop_ids = tokenizer.stop_ids if stop_ids is None else stop_ids
    steps = decode(model, [prompt], max_tokens=max_tokens, sampler=sampler, key=key)
    ids = (int(chosen[0]) for chosen in steps)
    yield from text_pieces(tokenizer, itertools.takewhile(lambda i: i not in stop_ids, ids))


# %% [markdown]
# Here it is at work. The next cell's output isn't compared by the tests: two processors may round a probability differently, and one different draw changes all that follows.

# %% tags=["nbval-ignore-output"]
for piece in stream(model, tokenizer, line, max_tokens=60, sampler=Sampler(0.8, top_p=0.95)):
    print(piece, end="", flush=True)

# %% [markdown]
# The opposite of generating is scoring: how likely does the model find a text that we give? It needs no loop, since all positions are known: one pass, and position $t-1$ predicts token $t$. The output matrix makes $V$ logits for each position, so `lax.map` expands only 128 positions at a time.


# %%
#| export public workbook
@jax.jit
def log_probs(model: Llama, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T-1"]:
    """Log-probability, in nats, of each token but the first, given those before it.

    Rows of different lengths: pad on the right with any token of the vocabulary and ignore the numbers
    from there on. The logits of 128 positions exist at a time. A token outside the vocabulary, in the
    padding too, can turn its whole row into NaN.
    """
    h, _ = model.hidden(tokens)

    def one(at):
        state, goal = at
        logits = linear(state, model.output_weight)
        log_p = jax.nn.log_softmax(logits.astype(accumulator(logits.dtype)), axis=-1)
        chosen = log_p.at[(*jnp.indices(goal.shape), goal)]
        return chosen.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    at = jnp.moveaxis(h[..., :-1, :], -2, 0), jnp.moveaxis(tokens[..., 1:], -1, 0)
    return jnp.moveaxis(jax.lax.map(one, at, batch_size=128), 0, -1)


# %%
scrambled = ids[:1] + sorted(ids[1:])
for name, text in (("as written", ids), ("sorted", scrambled)):
    nats = log_probs(model, jnp.array([text], jnp.int32))[0]
    print(f"{name:10} {-float(nats.mean()) / np.log(2):5.1f} bits per token")
by_hand = jax.nn.log_softmax(forward(model, jnp.array([speech], jnp.int32))[0])
by_hand = np.asarray(by_hand)[np.arange(95), speech[1:]]
assert np.abs(log_probs(model, jnp.array(speech, jnp.int32)) - by_hand).max() < 1e-4

# %% [markdown]
# A uniform guess would be 12 bits: out of order, the words are almost noise to the model. Chapter 15 compares answers with `log_probs`. Here it lets the model grade what it wrote.
#
# ## 7 · What samplers do, measured
#
# First to the *distribution*, on real text: 16 passages of a validation play, 64 positions each. For each position we know the model's logits and the token that Shakespeare wrote. **Predict:** top-p 0.9 cuts at most a tenth of the mass (the token that crosses 0.9 stays). At what share of positions does it cut the *true* token? And top-k 40? Our guess for top-p: if the model's probabilities mean what they say, a little less than a tenth; for top-k 40 we have none.

# %%
n_prompts, n_new = 16, 64
held_out = tokenizer.encode(datasets.plays("validation")[0].text)
starts = np.linspace(500, len(held_out) - 500, n_prompts).astype(int)
human = np.array([[tokenizer.bos_id, *held_out[s : s + 15 + n_new]] for s in starts], np.int32)
human_logits = forward(model, jnp.asarray(human))[:, 15:-1]
seen = np.zeros((n_prompts, n_new, tokenizer.vocab_size), bool)
for row in range(n_prompts):
    for t in range(n_new):
        seen[row, t, human[row, : 16 + t]] = True
SAMPLERS = {
    "greedy": Sampler(temperature=0),
    "temperature 0.7": Sampler(0.7),
    "temperature 1": Sampler(1.0),
    "temperature 1.3": Sampler(1.3),
    "top-k 40": Sampler(top_k=40),
    "top-p 0.9": Sampler(top_p=0.9),
    "min-p 0.1": Sampler(min_p=0.1),
    "greedy, penalty 1.3": Sampler(temperature=0, repetition_penalty=1.3),
}


# %%
@functools.partial(jax.jit, static_argnames="sampler")
def spread(sampler, logits, seen):
    """Mean entropy in bits, mean number of tokens kept, and share of positions whose true token is cut."""
    log_p = sampler.log_probs(logits, seen)
    entropy = -jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0.0).sum(-1) / np.log(2)
    true = jnp.take_along_axis(log_p, human[:, 16:, None], axis=-1)
    return entropy.mean(), (log_p > -jnp.inf).sum(-1).mean(), (true == -jnp.inf).mean()


# %%
table = {name: spread(sampler, human_logits, seen) for name, sampler in SAMPLERS.items()}
print(f"{'':20} entropy, bits   tokens kept   true token cut")
for name, found in table.items():
    entropy, kept, cut = (float(x) for x in found)
    print(f"{name:20} {entropy:10.1f} {kept:15,.0f} {cut:14.0%}")
assert abs(float(table["top-p 0.9"][2]) - 0.1) < 0.04

# %% [markdown]
# The guess holds. A model whose probabilities come true is called *calibrated*; this is one test of it, passed on 1,024 tokens of one play. No term of the loss asks for it by name: cross-entropy is lowest when the probabilities are true. Top-k 40 cuts every fourth true token, min-p 0.1 two in five. Cutting isn't free: Shakespeare lives partly in the tail.
#
# Compare temperature 0.7 and top-k 40. They leave nearly the same entropy by opposite means: one tilts the whole distribution, the other keeps its top and forgets the rest. Entropy alone doesn't tell them apart; the last column does.
#
# Then to the *text*. Every sampler continues the same 16 openings of 16 tokens by 64 tokens, each with the same key. We ask three things: how many bits per token the model itself gives to what it wrote (at temperature 1; two to this power is the perplexity of its own samples), how many 4-grams of tokens are repeats within one passage, and how many 2-grams are different among all 16 (distinct-2).
#
# **Predict** the order by bits. Ours, from the likeliest text to the least likely: beam, greedy, the cuts, temperature 1, temperature 1.3. And one number: Shakespeare's text has the bits that it has; will the samples at temperature 1 have more, or fewer? Ours: as many.


# %%
def repeated(rows, n=4):
    """Share of each row's n-grams that have occurred in the row before."""
    grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
    return np.array([1 - len(set(g)) / len(g) for g in grams])


def distinct(rows, n=2):
    """Different n-grams of all rows together, as a share of all n-grams."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams)


def bits(rows):
    """Bits per new token that the model itself, at temperature 1, gives to the rows' new tokens."""
    text = np.concatenate([human[:, :16], rows], axis=1)
    return -np.asarray(log_probs(model, jnp.asarray(text, jnp.int32)))[:, 15:].mean(1) / np.log(2)


openings = human[:, :16].tolist()
written = {
    name: np.array(generate(model, openings, max_tokens=n_new, sampler=sampler))
    for name, sampler in SAMPLERS.items()
}

# %% [markdown]
# Beam search joins the table. Chapter 05 wrote it for any step function, and a cache is a state like any other, so it serves here without a change: the 4 best partial texts are extended in parallel, and the search looks for the likeliest whole text. (That search wants texts that end, so we give it one slot more for a forced end, whose probability counts too.)


# %%
@jax.jit
def beams(model, prompts):
    """The best of 4 beams for each prompt, n_new tokens and a forced end, by chapter 05's search."""
    # 15, not 16: the search feeds the last prompt token itself, as its "bos"
    _, cache = prefill(model, prompts, jnp.full(len(prompts), 15), slots=128)

    def one(prompt, cache):
        def step(tokens, cache):
            logits, cache = model(tokens[:, None], cache=cache)
            return jax.nn.log_softmax(logits[:, 0]), cache

        ends = {"bos": prompt[-1], "eos": tokenizer.eos_id}
        return beam_search(step, cache, **ends, beam=4, max_len=n_new + 1)[0][0, :n_new]

    return jax.vmap(one)(prompts, cache)


# %%
written["beam search, 4"] = np.asarray(beams(model, human[:, :16]))
assert (written["beam search, 4"] != tokenizer.eos_id).all()
written["Shakespeare"] = human[:, 16:]
score = {name: (bits(rows), repeated(rows)) for name, rows in written.items()}
print(f"{'':20} bits per token   repeated 4-grams   distinct 2-grams")
for name, rows in written.items():
    own, again = (x.mean() for x in score[name])
    print(f"{name:20} {own:10.1f} {again:18.0%} {distinct(rows):18.0%}")

# %% [markdown]
# At temperature 1 the samples have as many bits per token as Shakespeare, 6.0. That isn't a sign of quality. Text drawn from the model surprises it by its entropy, real text by the cross-entropy. On real text the two agree (see the table above), and over 64 tokens the model's own text stays there; longer text may drift. The other rows lie where one expects: what cuts or cools makes text more predictable than Shakespeare's, what heats makes it less. Top-k 40 and temperature 0.7 again sit side by side, and top-p 0.9 is nearer to the original.
#
# Greedy decoding repeats a third of its 4-grams. The penalty cures that, and the text stays nearly as predictable. Note that temperature 1 without any cut doesn't repeat either: it is the drawing that helps, not the 40. Beam search finds likelier text still, and repeats as much.

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
for name, (own, _) in score.items():
    marker = "*" if name == "Shakespeare" else "o"
    variety = 100 * distinct(written[name])
    ax.plot(own.mean(), variety, marker, ms=12 if marker == "*" else 7, label=name)
ax.set(xlabel="bits per token of its own text", ylabel="distinct 2-grams, per cent")
ax.legend(fontsize=8)
plt.tight_layout()
plt.show()
likeliest = sorted(score, key=lambda name: score[name][0].mean())[:2]
print("the likeliest texts are those of", " and ".join(likeliest))

# %% [markdown]
# The picture: the likelier a text is, the less varied. The two searches stand apart at the lower left, and the samplers lie on one rising curve. Shakespeare, the star, is *below* that curve: his passages share more 2-grams than draws that surprise the model as much. We didn't look which; the speakers' names are a good guess.
#
# Two claims for the ledger. The unit is a passage, $n = 16$. The directions were predicted from the literature, and a pilot with longer continuations came before, so neither is blind. One checkpoint, one play: that is all the generality there is.

# %%
#| claim S032
less = score["greedy"][1] - score["top-k 40"][1]
assert score["temperature 1"][1].mean() < 0.02
ledger.claim(
    "S032",
    section="GPT-2, §3.6 and samples",
    claim="drawing from the 40 likeliest tokens repeats less than greedy decoding (drawing without "
    "the cut does so too)",
    predicted=ledger.at_least(0, "points of repeated 4-grams"),
    measured=ledger.interval(100 * less, "points of repeated 4-grams", digits=0),
    verdict="reproduced",
    function="generation.generate",
    test="tests/test_generation.py::test_truncation_is_exact",
)

# %%
#| claim S065
likelier = score["greedy"][0] - score["beam search, 4"][0]
ledger.claim(
    "S065",
    section="SLP3, decoding",
    claim="beam search finds text that the model holds for likelier than greedy decoding does",
    predicted=ledger.at_least(0, "bits per token"),
    measured=ledger.interval(likelier, "bits per token", digits=1),
    verdict="reproduced",
    function="attention.beam_search",
    test="tests/test_attention.py::test_wider_beams_score_no_worse_here_and_vmap_agrees",
)

# %% [markdown]
# In translation the likelier line was hardly a better one (chapter 05). In writing, both searches repeat a third of their 4-grams and Shakespeare one in a hundred: beam search succeeds at its task, but likelihood isn't the task.
#
# ## 8 · Prefill against decode
#
# *Throughput* is tokens per second of all rows together, *latency* the wait of one reader for the next token. Both phases read all $N$ weights. Prefill of $n$ tokens does $2Nn$ operations with them; a decode step does $2NB$, two for each row of the batch. In fp32 the weights are $4N$ bytes, so a decode step does at most $B/2$ operations for each byte read, at batch 1 a half. A processor can do some ten operations in the time it takes to read a byte; an H100 in bf16 about 300. So decode at small batch waits for memory, prefill for arithmetic. That is why one can't tune both at once, and why the paper reports them apart (§6.2).
#
# The cure for decode is company: another row in the batch uses the weights that are being read anyway. **Predict** what batch 64 does to the work of a step, and to its bytes.

# %%
n_weights = sum(x.size for x in jax.tree.leaves(model))
slots = 256
flops = xla_count(prefill.trace(model, of_shape(1, slots), of_shape(1), slots).jaxpr)
print(
    f"prefill of {slots}: {flops / 1e6:.0f} MFLOP, {flops / 4 / n_weights:.0f} per byte of weights"
)
print("batch   MFLOP   weights, MB   cache, MB   FLOP per byte")
for batch in (1, 4, 16, 64):
    cache = jax.eval_shape(lambda b=batch: init_cache(model.config, b, slots))
    flops = xla_count(advance.trace(model, of_shape(batch), cache).jaxpr)
    held = 4 * n_weights / 1e6, sum(x.size * 4 for x in (*cache.k, *cache.v)) / 1e6
    print(
        f"{batch:5} {flops / 1e6:7.0f} {held[0]:13.0f} {held[1]:11.1f} {flops / 1e6 / sum(held):12.1f}"
    )

# %% [markdown]
# The work grows 64 times, the bytes of the weights not at all. But each row brings a cache of its own, and at 64 rows of 256 slots the caches outweigh this small model four times. The last fourfold batch raises the ratio only 1.6 times: in the end each row's operations meet the bytes of its own cache. Grouped-query attention exists to push that point out.

# %% [markdown]
# The paper's figures for 405B show the result: larger batches and more micro-batches raise throughput, and the wait for each token with it (§6.1, §6.2).
#
# **Fewer and larger products.** A step at batch 1 is some two hundred products of a matrix with a vector, each with its own start and its own meeting of the threads. Queries, keys and values read the same vector, and so do gate and up. Lay the matrices that read the same vector on top of each other, and three products become one, two become one. The numbers are the same, in the same order. `fuse` makes such a copy of a model, for whoever decodes a lot; files and training keep the separate matrices.


# %%
#| export
class FusedAttention(Attention):
    """Chapter 10's attention with queries, keys and values in one matrix, `w_input`."""

    w_input: Float[Array, "(H+2K)*Dh D"]

    def __init__(self, plain: Attention):
        self.w_query = self.w_key = self.w_value = None
        self.w_input = jnp.concatenate([plain.w_query, plain.w_key, plain.w_value])
        self.w_out, self.head_dim = plain.w_out, plain.head_dim

    def project(self, x, rotation):
        """As `Attention.project`: rotated queries and keys, and values, from one product."""
        q_width = self.w_out.shape[1]
        kv_width = (self.w_input.shape[0] - q_width) // 2
        parts = jnp.split(linear(x, self.w_input), [q_width, q_width + kv_width], axis=-1)
        q, k, v = (part.reshape(*x.shape[:-1], -1, self.head_dim) for part in parts)
        return apply_rope(q, *rotation), apply_rope(k, *rotation), v


class FusedSwiGLU(SwiGLU):
    """Chapter 10's feed-forward layer with gate and up in one matrix, `w_input`."""

    w_input: Float[Array, "2*F D"]

    def __init__(self, plain: SwiGLU):
        self.w_gate = self.w_up = None
        self.w_input, self.w_down = jnp.concatenate([plain.w_gate, plain.w_up]), plain.w_down

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        gate, up = jnp.split(linear(x, self.w_input), 2, axis=-1)
        return linear(jax.nn.silu(gate) * up, self.w_down)


# %%
#| export public
def fuse(model: Llama) -> Llama:
    """A copy of a model that decodes faster one row at a time: fewer, larger products, the same numbers.

    Drop the original if memory is short; embedding, norms and output matrices are shared. The copy
    can't be saved or trained on: its layers have other names.
    """
    parts = lambda m: [part for b in m.blocks for part in (b.attention, b.feed_forward)]  # noqa: E731
    fused = [
        part
        for b in model.blocks
        for part in (FusedAttention(b.attention), FusedSwiGLU(b.feed_forward))
    ]
    return eqx.tree_at(parts, model, fused)


# %%
fused_logits = jax.jit(lambda model, tokens: model(tokens))(
    fuse(model), jnp.array([speech], jnp.int32)
)
print("fused, the same logits within 1e-4:", float(jnp.abs(fused_logits[0] - whole).max()) < 1e-4)
assert jnp.abs(fused_logits[0] - whole).max() < 1e-4

# %% [markdown]
# **With real weights.** `make bench` decodes SmolLM2-135M-Instruct (chapter 14 reads it), 134.5 million weights in fp32, fused, with `decode`, the loop above, unchanged. Beside it run transformers (PyTorch) and llama.cpp with the same weights, on the same two cores, each in a process of its own, in turns. The numbers below are read from `results/decode.json`; nothing is timed now. **Predict** what batch 64 does to throughput and to latency. Ours: the weights are read once for all, so thirty times the tokens for twice the wait.

# %%
stored = json.loads((repository / "results" / "decode.json").read_text())


def median(field="seconds", **wanted):
    """The median over the rounds of the stored rows that match."""
    rows = [row for row in stored["rows"] if all(row.get(k) == v for k, v in wanted.items())]
    return float(np.median([row[field] for row in rows]))


sizes = sorted({row["batch"] for row in stored["rows"] if row.get("contender") == "ours"})
waits = [median(contender="ours", task="decode", batch=b) for b in sizes]
rates = [b / wait for b, wait in zip(sizes, waits, strict=True)]
fig, ax = plt.subplots(figsize=(6.5, 3.4))
ax.plot([1000 * wait for wait in waits], rates, "o-")
for b, wait, rate in zip(sizes, waits, rates, strict=True):
    ax.annotate(f"{b}", (1000 * wait, rate), textcoords="offset points", xytext=(6, -10))
ax.set(xlabel="milliseconds per step (latency)", ylabel="tokens per second (throughput)")
ax.set(xscale="log", yscale="log")
plt.tight_layout()
plt.show()
print(
    f"batch 64: {rates[-1] / rates[0]:.0f} times the tokens, {waits[-1] / waits[0]:.0f} times the wait"
)

# %% [markdown]
# The labels are batch sizes. We were too hopeful: eleven times the tokens for six times the wait. The first step to the right, from one row to two, is the worst bargain of all. Chapter 13 looks at it with a roofline and finds the product of a few rows with a matrix to be this back end's weak spot.
#
# **How fast could it be?** A decode step at batch 1 reads each weight once. The machine's read bandwidth over the bytes of the weights is a limit that no code can pass, and a better yardstick than any peer. It was measured in the same run, by one large matrix–vector product.

# %%
read = median("read", task="limits")
print(
    f"{read / 1e9:.0f} GB/s over {stored['bytes'] / 1e6:.0f} MB: {read / stored['bytes']:.0f} tokens/s"
)
print(f"{'':14}tokens/s   of the limit   prefill of 512, tokens/s")
for name in stored["gigabytes"]:
    one = median(contender=name, task="decode", batch=1)
    long = stored["long"] / median(contender=name, task="prefill")
    print(f"{name:14}{1 / one:8.1f} {stored['bytes'] / one / read:14.0%} {long:26.0f}")
print("all matrices of the model times one vector, by how they are stored:")
layouts = [row["rates"] for row in stored["rows"] if row["task"] == "layouts"]
for name in layouts[0]:
    print(f"{name:36} {np.median([rates[name] for rates in layouts]) / 1e9:.0f} GB/s")

# %% [markdown]
# In decoding we are ahead of PyTorch and behind llama.cpp; in prefill we are level with PyTorch or a little better. What is missing to the limit? The last lines say it: all matrices of the model times one vector, and nothing else, already run at 16 to 19 of the 30 GB/s, however they are stored (*fused*: queries, keys and values joined into one matrix, gate and up into another). One large matrix reaches 30; two hundred small ones, each with its own start and stop of two threads, do not. Fusing gains some of it at batch 1 (30 to 27 milliseconds a step when we tried both), and loses a little at batch 8.
# Two things that matter more are already in it; both come from earlier trials and are not measured here. The layers are a Python loop, not a `scan`, which would copy each layer's weights at every step. And the weights are fp32: this back end emulates bf16 products, so half the bytes would take longer.

# %% [markdown]
# ## Break it: a length that counts the padding
#
# Leave out one line of `prefill`: the one that sets `length` to the true lengths. Everything runs. All rows have the same length now, that of the padded rectangle, the keys of the padding are in view, and the next token believes that it stands at position 32. How much of the probability moves (half the sum of the absolute differences of the two distributions)?

# %%
logits, cache = prefill(model, tokens, lengths, 64)
chosen = logits.argmax(-1).astype(jnp.int32)
broken_cache = eqx.tree_at(lambda c: c.length, cache, jnp.full(3, tokens.shape[1]))
right, wrong = (
    np.asarray(advance(model, chosen, jax.tree.map(jnp.copy, c))[0]) for c in (cache, broken_cache)
)
for row, length in enumerate(lengths):
    gap = np.abs(jax.nn.softmax(right[row]) - jax.nn.softmax(wrong[row])).sum() / 2
    print(
        f"prompt of {length:2} tokens in {tokens.shape[1]}: {gap:.0%} of the probability is elsewhere"
    )
    assert gap > 0.1

# %% [markdown]
# The first token is right, since its logits don't use that line. In a batch of equal lengths that are multiples of 32 there isn't any error at all. What catches it is the check of section 3 carried one step further: *a row in a batch must give what it gives alone*, after prefill **and** after steps. `tests/test_generation.py` does that.
#
# ## Notes on the sources
#
# **The Llama 3 Herd of Models, §6.** Serves 405B on two machines in BF16, with pipeline micro-batches, or on one in FP8, and plots throughput against latency for 4,096 input and 256 output tokens, prefill and decode apart. It reports up to 50 % more throughput in prefill from FP8. Section 8 counts the trade-off for a small model in fp32. FP8 and pipelines are for later chapters. It takes the cache for granted and says nothing of samplers.
#
# **Radford et al. 2019 (GPT-2).** Takes top-k from Fan et al. 2018: $k = 40$ for the published samples, $k = 2$ for summaries (§3.6), where it is said, without a number, to reduce repetition against greedy decoding. Section 7 puts a number on it for $k = 40$.
#
# **Holtzman et al. 2020.** Introduces top-p, and the observation that likely text is dull: beam search repeats itself, and human text isn't the likeliest text. Section 7 finds both at four million weights. Their claim that top-p is best rests on people's judgement, which we have not.
#
# **Nguyen et al. 2024 (min-p).** Argues that min-p keeps text coherent at high temperature. We built it and measured what it cuts, not coherence.
#
# **Keskar et al. 2019 (CTRL).** The penalty as printed divides the logit whatever its sign, which would reward a repeated token whose logit is negative. transformers multiplies there, and so do we. The paper recommends $\theta \approx 1.2$; the dependence on the zero of the logits isn't discussed.
#
# **Jurafsky & Martin, SLP3.** The decoding sections give greedy, beam and sampling as a list. The table of section 7 puts them side by side.
#
# **kipply, *Transformer Inference Arithmetic*.** The counting of section 8. Chapter 13 carries it through.
#
# ## Remember
#
# **Q:** Why does a KV cache not change the result?
# **A:** Keys and values of a position depend only on tokens up to it, so a later token can't change them.
#
# **Q:** How are prompts of different lengths decoded in one batch, and why does the padding never show?
# **A:** Padded on the right, with a length per row: slots from the length on are not seen, and each is overwritten in the step that would show it.
#
# **Q:** What does top-p 0.9 cut, and how often is the true token among it?
# **A:** The unlikely tokens beyond the smallest set that holds 90 % of the mass; at most a tenth of the time, if the model is calibrated.
#
# **Q:** Why does batching make decode cheaper per token, and when does it stop?
# **A:** The rows share the reading of the weights; it stops where arithmetic, or the rows' own caches, take as long as that reading.
#
# **Q:** Is the likeliest text the best one?
# **A:** Here no: greedy and beam search found likelier text than Shakespeare's, and a third of its 4-grams were repeats.
#
# ## Exercises
#
# 1. **Entropy and temperature.** Show that $dH/dT = \mathrm{Var}(z)/T^3$, where the variance of the logits $z$ is over $p(T)$ and $H$ is in nats. Check it by a finite difference. Success: agreement within one per cent at three temperatures, and you can say why entropy never falls with temperature.
# 2. **The last draw.** Draw 20,000 tokens from `toy` under `Sampler(0.7, top_k=3)`, and compare frequencies with the distribution computed by hand. Success: no frequency is more than four standard errors off, and cut tokens never occur.
# 3. **Left padding.** Prefill the three prompts padded on the left, with `segments` that set the padding apart and `positions` that start at the first true token. Success: the logits are those of `prefill`, within 1e-4.


# %% [markdown]
# Solution 1. With $\beta = 1/T$: $dH/d\beta = -\beta\,\mathrm{Var}(z)$ and $d\beta/dT = -1/T^2$, so $dH/dT = \mathrm{Var}(z)/T^3 \ge 0$.


# %% tags=["solution"] jupyter={"source_hidden": true}
def entropy_at(temperature):
    p = jax.nn.softmax(z / temperature)
    return -float((p * jnp.log(p + 1e-30)).sum())


for temperature in (0.7, 1.0, 1.5):
    p = jax.nn.softmax(z / temperature)
    variance = float((p * z**2).sum() - (p * z).sum() ** 2)
    slope = (entropy_at(temperature + 0.01) - entropy_at(temperature - 0.01)) / 0.02
    assert abs(slope / (variance / temperature**3) - 1) < 0.01
print("exercise 1: the slope is the variance over T³, and a variance is never negative")

# %% [markdown]
# Solution 2. Squaring would be temperature 0.5; here each probability is raised to 1/0.7.

# %% tags=["solution"] jupyter={"source_hidden": true}
expected = np.array([0.50, 0.25, 0.15]) ** (1 / 0.7)
expected = np.append(expected / expected.sum(), [0, 0])
draws, _ = choose(Sampler(0.7, top_k=3), jnp.tile(toy, (20_000, 1)), None, jax.random.key(1), 0)
frequency = np.bincount(np.asarray(draws), minlength=5) / 20_000
error = np.sqrt(expected * (1 - expected) / 20_000)
assert (np.abs(frequency - expected) <= 4 * error).all()
print("exercise 2:", [f"{f:.2f}" for f in frequency])

# %% [markdown]
# Solution 3.

# %% tags=["solution"] jupyter={"source_hidden": true}
width = tokens.shape[1]
column = np.arange(width)[None] - (width - lengths)[:, None]  # 0 at the first true token
left = np.stack([np.roll(row, width - n) for row, n in zip(tokens, lengths, strict=True)])
segments = jnp.asarray(np.where(column < 0, 0, 1), jnp.int32)
positions = jnp.asarray(np.maximum(column, 0), jnp.int32)
padded_left = eqx.filter_jit(model)(jnp.asarray(left), segments, positions)[:, -1]
assert jnp.abs(padded_left - together).max() < 1e-4
print("exercise 3: padded on the left, the same logits within 1e-4")

# %% [markdown]
# ## References
#
# - Llama Team, *The Llama 3 Herd of Models*, 2024, arXiv 2407.21783, §6.
# - A. Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019.
# - A. Fan et al., *Hierarchical Neural Story Generation*, 2018, arXiv 1805.04833.
# - A. Holtzman et al., *The Curious Case of Neural Text Degeneration*, 2020, arXiv 1904.09751.
# - N. Keskar et al., *CTRL: A Conditional Transformer Language Model for Controllable Generation*, 2019, arXiv 1909.05858, §4.1.
# - M. Nguyen et al., *Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs*, 2024, arXiv 2407.01082.
# - D. Jurafsky, J. Martin, *Speech and Language Processing*, 3rd ed. draft, chapters on transformers and large language models.
# - C. Chen (kipply), *Transformer Inference Arithmetic*, 2022.
#
# **Next:** chapter 13 turns section 8 into a calculator: what any Llama costs on any device, before a line of it runs.
