"""Prefill and decode with a cache of static shape, prompts of different lengths in one batch, every common sampler, streaming, and log-probabilities of given text.

Written from chapters/12_generation.py by `make export`: edit there.
"""

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


@functools.partial(jax.jit, donate_argnames="cache")
def advance(
    model: Llama, tokens: Int[Array, " B"], cache: KVCache
) -> tuple[Float[Array, "B V"], KVCache]:
    """Read one token per row: logits of the next one, and the cache with this one in it.

    The cache that is passed in is donated: its buffers are written in place, it can't be used again.
    """
    logits, cache = model(tokens[:, None], cache=cache)
    return logits[:, 0], cache


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


def keep_top_k(logits: Float[Array, "*B V"], k: int) -> Float[Array, "*B V"]:
    """The k largest logits; all others become −∞. Ties with the last one stay."""
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "*B V"], p: float) -> Float[Array, "*B V"]:
    """The smallest set of likeliest tokens whose probability reaches p; all others become −∞.

    The likeliest always stays, as do ties with the last one. Source: Holtzman et al. 2020, §3.1.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    descending = jnp.sort(probabilities, axis=-1, descending=True)
    before = jnp.cumsum(descending, axis=-1) - descending  # the mass of all that are likelier
    least = jnp.where(before < p, descending, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(probabilities >= least, logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "*B V"], p: float) -> Float[Array, "*B V"]:
    """Tokens at least p times as likely as the likeliest one; all others become −∞.

    Source: Nguyen et al. 2024, §3.
    """
    return jnp.where(logits >= logits.max(-1, keepdims=True) + np.log(p), logits, -jnp.inf)


def penalise(
    logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"], penalty: float
) -> Float[Array, "*B V"]:
    """Divide the positive logits of tokens seen before by the penalty, multiply the negative ones.

    Source: Keskar et al. 2019, §4.1; the rule for negative logits is transformers'.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


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
