"""The encoder–decoder of *Attention Is All You Need*: sinusoidal positions, post-norm layers, label smoothing, the Noam schedule, averaged checkpoints.

Written from chapters/06_transformer.py by `make export`: edit there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llm_from_scratch.attention import (
    MultiHeadAttention,
    beam_search,
    causal_mask,
    merge_heads,
    scaled_dot_product_attention,
    split_heads,
)
from llm_from_scratch.training import is_trainable


def sinusoidal_positions(length: int, dim: int) -> Float[Array, "T D"]:
    """Row t holds sin(t·ωᵢ) and cos(t·ωᵢ) in columns 2i and 2i + 1, with ωᵢ = 10000^(−2i/D).

    Source: Vaswani et al. 2017, §3.5. Raises ValueError for an odd dim.
    """
    if dim % 2:
        raise ValueError(f"dim={dim} must be even: a sine and a cosine per frequency")
    angle = np.arange(length)[:, None] / 10_000 ** (np.arange(0, dim, 2)[None] / dim)
    table = np.stack([np.sin(angle), np.cos(angle)], axis=-1)
    return jnp.asarray(table.reshape(length, dim), jnp.float32)


class LayerNorm(eqx.Module):
    """Each row to mean 0 and variance 1, computed in fp32, then a gain and a bias per column.

    Source: Ba et al. 2016.
    """

    weight: Float[Array, " D"]
    bias: Float[Array, " D"]
    eps: float = eqx.field(static=True)

    def __init__(self, dim: int, eps: float = 1e-5):
        self.weight, self.bias, self.eps = jnp.ones(dim), jnp.zeros(dim), eps

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.eps)
        return (centred * scale).astype(x.dtype) * self.weight[None] + self.bias[None]


class FeedForward(eqx.Module):
    """max(0, x W₁ᵀ + b₁) W₂ᵀ + b₂, at each position alone. Source: Vaswani et al. 2017, eq. 2."""

    w1: Float[Array, "F D"]
    b1: Float[Array, " F"]
    w2: Float[Array, "D F"]
    b2: Float[Array, " D"]

    def __init__(self, dim: int, hidden_dim: int, *, key: Array):
        for_w1, for_w2 = jax.random.split(key)
        self.w1 = jax.random.normal(for_w1, (hidden_dim, dim)) / math.sqrt(dim)
        self.b1 = jnp.zeros(hidden_dim)
        self.w2 = jax.random.normal(for_w2, (dim, hidden_dim)) / math.sqrt(hidden_dim)
        self.b2 = jnp.zeros(dim)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return jax.nn.relu(x @ self.w1.T + self.b1[None]) @ self.w2.T + self.b2[None]


def dropout(x: Float[Array, "T D"], rate: float, key: Array | None) -> Float[Array, "T D"]:
    """Each number to 0 with probability `rate`, the others times 1/(1 − rate); no key, no dropout."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0.0)


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of an encoder–decoder; the defaults are the paper's base model (Table 3).

    Raises ValueError for values that no model can have.
    """

    vocab_size: int
    dim: int = 512
    n_layers: int = 6  # of the encoder, and again of the decoder
    n_heads: int = 8
    hidden_dim: int = 2048
    dropout: float = 0.1
    pre_norm: bool = False  # the paper's order is post-norm
    pad_id: int = 0

    def __post_init__(self):
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.dim % self.n_heads or self.dim % 2:
            raise ValueError(
                f"dim={self.dim} must be even and a multiple of n_heads={self.n_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f"pad_id={self.pad_id} is not below vocab_size={self.vocab_size}")


class Residual(eqx.Module):
    """What surrounds a sub-layer: post-norm LN(x + f(x)), or pre-norm x + f(LN(x)).

    `leave(x, f(enter(x)))` is either, so that whoever calls f may also keep what else it returns.
    """

    norm: LayerNorm
    rate: float = eqx.field(static=True)
    pre_norm: bool = eqx.field(static=True)

    def __init__(self, config: TransformerConfig):
        self.norm = LayerNorm(config.dim)
        self.rate, self.pre_norm = config.dropout, config.pre_norm

    def enter(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """What the sub-layer reads."""
        return self.norm(x) if self.pre_norm else x

    def leave(
        self, x: Float[Array, "T D"], y: Float[Array, "T D"], key: Array | None = None
    ) -> Float[Array, "T D"]:
        """The sum of the stream x and the sub-layer's output y, normed if post-norm."""
        total = x + dropout(y, self.rate, key)
        return total if self.pre_norm else self.norm(total)


def split_key(key: Array | None, n: int) -> list[Array | None]:
    """n keys from one, or n times None."""
    return [None] * n if key is None else list(jax.random.split(key, n))


class EncoderLayer(eqx.Module):
    """Self-attention, then the feed-forward layer, each inside a `Residual`. Vaswani et al., §3.1."""

    attention: MultiHeadAttention
    feed_forward: FeedForward
    residuals: tuple[Residual, Residual]

    def __init__(self, config: TransformerConfig, *, key: Array):
        for_attention, for_feed_forward = jax.random.split(key)
        self.attention = MultiHeadAttention(config.dim, config.n_heads, key=for_attention)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim, key=for_feed_forward)
        self.residuals = (Residual(config), Residual(config))

    def __call__(
        self,
        x: Float[Array, "S D"],
        mask: Bool[Array, "S S"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "S D"]:
        """`mask` is true where position t may look at s; `key` turns dropout on."""
        first, second = self.residuals
        a, b = split_key(key, 2)
        x = first.leave(x, self.attention(first.enter(x), mask=mask), a)
        return second.leave(x, self.feed_forward(second.enter(x)), b)


class DecoderLayer(eqx.Module):
    """Masked self-attention, attention on the encoder's output, feed-forward. Vaswani et al., §3.1."""

    self_attention: MultiHeadAttention
    cross_attention: MultiHeadAttention
    feed_forward: FeedForward
    residuals: tuple[Residual, Residual, Residual]

    def __init__(self, config: TransformerConfig, *, key: Array):
        for_self, for_cross, for_feed_forward = jax.random.split(key, 3)
        self.self_attention = MultiHeadAttention(config.dim, config.n_heads, key=for_self)
        self.cross_attention = MultiHeadAttention(config.dim, config.n_heads, key=for_cross)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim, key=for_feed_forward)
        self.residuals = (Residual(config), Residual(config), Residual(config))

    def __call__(
        self,
        x: Float[Array, "T D"],
        memory: Float[Array, "S D"],
        mask: Bool[Array, "T T"] | None = None,
        memory_mask: Bool[Array, "T S"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "T D"]:
        """All positions at once, as in training; `memory` is the encoder's output."""
        first, second, third = self.residuals
        a, b, c = split_key(key, 3)
        x = first.leave(x, self.self_attention(first.enter(x), mask=mask), a)
        x = second.leave(x, self.cross_attention(second.enter(x), memory, memory_mask), b)
        return third.leave(x, self.feed_forward(third.enter(x)), c)

    def step(
        self,
        x: Float[Array, "1 D"],
        past: tuple[Array, Array],
        memory: tuple[Array, Array],
        t: Int[Array, ""],
        memory_mask: Bool[Array, " S"],
    ) -> tuple[Float[Array, "1 D"], tuple[Array, Array]]:
        """Position t alone. `past`, `memory`: keys and values, (H, T, Dh); past with t is returned."""
        first, second, third = self.residuals
        y, n_heads = first.enter(x), self.self_attention.n_heads
        q, *new = self.self_attention.heads(y, y)
        past = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, n, t, axis=1)
            for old, n in zip(past, new, strict=True)
        )
        seen = (jnp.arange(past[0].shape[1]) <= t)[None, None]
        y = merge_heads(scaled_dot_product_attention(q, *past, seen))
        x = first.leave(x, y @ self.self_attention.wo.T)
        y = second.enter(x)
        q = split_heads(y @ self.cross_attention.wq.T, n_heads)
        y = merge_heads(scaled_dot_product_attention(q, *memory, memory_mask[None, None]))
        x = second.leave(x, y @ self.cross_attention.wo.T)
        return third.leave(x, self.feed_forward(third.enter(x))), past


class Transformer(eqx.Module):
    """The encoder–decoder of Vaswani et al. 2017: one table for both languages and the output (§3.4).

    Batch-free: vmap it. A source position that holds `config.pad_id` is never looked at.
    """

    embedding: Float[Array, "V D"]
    encoder: tuple[EncoderLayer, ...]
    decoder: tuple[DecoderLayer, ...]
    norms: tuple[LayerNorm, ...]  # pre-norm only: one after each stack
    config: TransformerConfig = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, *, key: Array):
        for_table, for_encoder, for_decoder = jax.random.split(key, 3)
        shape = (config.vocab_size, config.dim)
        self.embedding = jax.random.normal(for_table, shape) / math.sqrt(config.dim)
        keys = jax.random.split(for_encoder, config.n_layers)
        self.encoder = tuple(EncoderLayer(config, key=k) for k in keys)
        keys = jax.random.split(for_decoder, config.n_layers)
        self.decoder = tuple(DecoderLayer(config, key=k) for k in keys)
        self.norms = (LayerNorm(config.dim), LayerNorm(config.dim)) if config.pre_norm else ()
        self.config = config

    def positions(self, length: int) -> Float[Array, "T D"]:
        """What is added to the vectors of the first `length` positions."""
        return sinusoidal_positions(length, self.config.dim)

    def embed(self, tokens: Int[Array, " T"], key: Array | None = None) -> Float[Array, "T D"]:
        """√D times the tokens' rows, plus the positions."""
        x = math.sqrt(self.config.dim) * self.embedding[tokens] + self.positions(len(tokens))
        return dropout(x, self.config.dropout, key)

    def encode(self, source: Int[Array, " S"], key: Array | None = None) -> Float[Array, "S D"]:
        """The source as vectors that have seen each other."""
        mask = jnp.broadcast_to((source != self.config.pad_id)[None], (len(source), len(source)))
        first, *keys = split_key(key, 1 + len(self.encoder))
        x = self.embed(source, first)
        for layer, k in zip(self.encoder, keys, strict=True):
            x = layer(x, mask, k)
        return self.norms[0](x) if self.norms else x

    def logits(self, x: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """The decoder's output against the embedding table."""
        return (self.norms[1](x) if self.norms else x) @ self.embedding.T

    def __call__(
        self, source: Int[Array, " S"], tokens: Int[Array, " T"], key: Array | None = None
    ) -> Float[Array, "T V"]:
        """The logits of what follows each of `tokens`, given the source; `key` turns dropout on."""
        for_encoder, for_decoder = split_key(key, 2)
        memory = self.encode(source, for_encoder)
        shape = (len(tokens), len(source))
        memory_mask = jnp.broadcast_to((source != self.config.pad_id)[None], shape)
        first, *keys = split_key(for_decoder, 1 + len(self.decoder))
        x = self.embed(tokens, first)
        for layer, k in zip(self.decoder, keys, strict=True):
            x = layer(x, memory, causal_mask(len(tokens)), memory_mask, k)
        return self.logits(x)


def smoothed_cross_entropy(
    logits: Float[Array, "T V"], targets: Int[Array, " T"], smoothing: float = 0.1
) -> Float[Array, " T"]:
    """Cross-entropy, in nats, against (1 − ε) one-hot + ε/V; 0 where the target is negative.

    Source: Szegedy et al. 2016, §7; Vaswani et al. 2017, §5.4.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
    loss = -(1 - smoothing) * chosen - smoothing * jnp.mean(log_p, axis=1)
    return jnp.where(targets >= 0, loss, 0.0)


def sequence_loss(
    model: Transformer, batch: dict[str, Array], key: Array | None, *, smoothing: float = 0.1
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Mean `smoothed_cross_entropy` of a batch of `attention.PairBatches`, and the number of targets.

    `key` turns dropout on.
    """
    keys = None if key is None else jax.random.split(key, len(batch["source"]))
    axes = (0, 0, None if key is None else 0)
    logits = jax.vmap(model, axes)(batch["source"], batch["tokens"], keys)
    each = jax.vmap(lambda z, t: smoothed_cross_entropy(z, t, smoothing))(logits, batch["targets"])
    count = jnp.sum(batch["targets"] >= 0)
    return jnp.sum(each) / jnp.maximum(count, 1).astype(each.dtype), count


def noam_schedule(
    dim: int, warmup: int = 4000, factor: float = 1.0
) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """The learning rate factor · D^−½ · min(s^−½, s · w^−3/2) of step s = 1, 2, …

    The function that is returned takes optax's count, which begins at 0. Source: Vaswani et al. 2017, eq. 3.
    """

    def rate(count: Int[Array, ""]) -> Float[Array, ""]:
        step = jnp.asarray(count, jnp.float32) + 1
        return factor * dim**-0.5 * jnp.minimum(step**-0.5, step * warmup**-1.5)

    return rate


def average(models: Sequence[Any]) -> Any:
    """One model whose every weight is the mean over `models`, which have the same structure."""

    def mean(*leaves: Any) -> Any:
        return sum(leaves) / len(leaves) if is_trainable(leaves[0]) else leaves[0]

    return jax.tree.map(mean, *models)


@eqx.filter_jit
def search(
    model: Transformer,
    sources: Int[Array, "B S"],
    *,
    bos: int,
    eos: int,
    max_len: int,
    beam: int = 4,
    length_penalty: Float[Array, ""] | float = 0.6,
) -> tuple[Int[Array, "B max_len"], Float[Array, " B"]]:
    """The best sequence found for each source by `attention.beam_search`, and its score.

    Keys and values of what is decoded are kept, those of the source are computed once.
    """
    width = (model.config.n_heads, max_len, model.config.dim // model.config.n_heads)
    places = model.positions(max_len)

    def one(source: Array) -> tuple[Array, Array]:
        memory, mask = model.encode(source), source != model.config.pad_id
        memories = [layer.cross_attention.heads(memory, memory)[1:] for layer in model.decoder]

        def step(token: Array, state: tuple) -> tuple[Array, tuple]:
            t, pasts = state
            x = math.sqrt(model.config.dim) * model.embedding[token][None] + places[t][None]
            kept = []
            for layer, past, seen in zip(model.decoder, pasts, memories, strict=True):
                x, past = layer.step(x, past, seen, t, mask)
                kept.append(past)
            return jax.nn.log_softmax(model.logits(x)[0]), (t + 1, tuple(kept))

        empty = tuple((jnp.zeros(width), jnp.zeros(width)) for _ in model.decoder)
        options = {"bos": bos, "eos": eos, "beam": beam, "max_len": max_len}
        start = (jnp.zeros((), jnp.int32), empty)
        tokens, scores = beam_search(
            jax.vmap(step), start, length_penalty=length_penalty, **options
        )
        return tokens[0], scores[0]

    return jax.vmap(one)(sources)


def paired_bootstrap(
    score: Callable[[Sequence[str], Sequence[str]], float],
    first: Sequence[str],
    second: Sequence[str],
    references: Sequence[str],
    *,
    samples: int = 200,
    seed: int = 0,
) -> Float[np.ndarray, " samples"]:
    """score(first) − score(second) on lines drawn with replacement, the same lines for both; sorted.

    The 2.5 % and 97.5 % points are a 95 % interval. Source: Koehn 2004. Raises ValueError if the three
    lists differ in length.
    """
    if not len(first) == len(second) == len(references):
        raise ValueError(f"{len(first)}, {len(second)} and {len(references)} lines: not one each")
    draws = np.random.default_rng(seed).integers(0, len(first), (samples, len(first)))
    differences = []
    for draw in draws:
        a, b, c = ([lines[i] for i in draw] for lines in (first, second, references))
        differences.append(score(a, c) - score(b, c))
    return np.sort(differences)
