"""The Transformer of Llama 3, from one norm to the published 405 billion parameters.

Written from chapters/10_llama.py by `make export`: edit there.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that norms, softmax and rotary angles are computed in: fp32, or fp64 for fp64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def per_row(weight: Float[Array, " D"], x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Give a vector of D as many leading axes of size 1 as x has (rank promotion, made visible)."""
    return weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """Divide each vector by its root mean square, then scale every coordinate by its gain.

    Computed in fp32 (in fp64 when x is), returned in the dtype of x. eps is added to the mean
    square. Source: Zhang and Sennrich 2019, eq. 4; Llama 3 inherits it, the paper does not name it.
    """
    wide = x.astype(accumulator(x.dtype))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * per_row(weight, x)


class RMSNorm(eqx.Module):
    """Root-mean-square norm with a learned gain, which starts at one (see `rms_norm`)."""

    weight: Float[Array, " D"]
    eps: float = eqx.field(static=True)

    def __init__(self, dim: int, eps: float, *, dtype: jnp.dtype = jnp.float32):
        self.weight = jnp.ones(dim, dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.weight, self.eps)


def linear(x: Float[Array, "*B I"], w: Float[Array, "O I"]) -> Float[Array, "*B O"]:
    """Matrix product x wᵀ, with the leading axes of x flattened into one."""
    y = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), w, (((1,), (1,)), ((), ())))
    return y.reshape(*x.shape[:-1], w.shape[0])


class SwiGLU(eqx.Module):
    """Feed-forward layer with a gate: w_down(silu(w_gate x) ⊙ w_up x), no biases.

    dim is D, the width of the stream, and hidden_dim is F (see `ffn_width`). Meta calls the matrices
    w1 (gate), w2 (down) and w3 (up). Source: Shazeer 2020, eq. 6.
    """

    w_gate: Float[Array, "F D"]
    w_up: Float[Array, "F D"]
    w_down: Float[Array, "D F"]

    def __init__(self, dim, hidden_dim, *, key, scale=0.02, out_scale=0.02, dtype=jnp.float32):
        """Normal weights: σ is `scale` for gate and up, `out_scale` for down (one key each)."""
        gate, up, down = jax.random.split(key, 3)
        self.w_gate = scale * jax.random.normal(gate, (hidden_dim, dim), dtype)
        self.w_up = scale * jax.random.normal(up, (hidden_dim, dim), dtype)
        self.w_down = out_scale * jax.random.normal(down, (dim, hidden_dim), dtype)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return linear(jax.nn.silu(linear(x, self.w_gate)) * linear(x, self.w_up), self.w_down)


def ffn_width(dim: int, multiplier: float = 1.0, multiple_of: int = 256) -> int:
    """Width of the SwiGLU layer: ⅔·4·dim, times the multiplier, rounded up to a multiple.

    Both products are cut to integers as in Meta's code; gives the 14,336 / 28,672 / 53,248 of the
    paper's Table 3 with multipliers 1.3 / 1.3 / 1.2 and multiples 1,024 / 4,096 / 4,096.
    """
    width = int(multiplier * int(2 * 4 * dim / 3))
    return -(-width // multiple_of) * multiple_of


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the slow rotary frequencies (Meta's code; not in the paper)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        if self.factor < 1 or self.original_max_position < 1:
            raise ValueError(
                f"factor and original_max_position must be at least 1, "
                f"got factor={self.factor}, original_max_position={self.original_max_position}"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor must be positive and below high_freq_factor, got "
                f"low_freq_factor={self.low_freq_factor}, high_freq_factor={self.high_freq_factor}"
            )


def rope_frequencies(
    head_dim: int, theta: float = 500_000.0, scaling: RopeScaling | None = None
) -> Float[np.ndarray, " half"]:
    """Radians per position of the head_dim/2 rotating pairs, theta^(-2i/head_dim), in fp64.

    With a RopeScaling, pairs that turn fewer than low_freq_factor times in the old context are
    slowed by the factor, those above high_freq_factor are kept, and between the two it blends.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rope_rotation(
    positions: Int[Array, "*B T"], frequencies: Float[np.ndarray, " half"], dtype: jnp.dtype
) -> tuple[Float[Array, "*B T half"], Float[Array, "*B T half"]]:
    """Cosine and sine of position × frequency, in fp32 (in fp64 for an fp64 model)."""
    wide = accumulator(dtype)
    rates = jnp.asarray(frequencies, wide).reshape((1,) * positions.ndim + (-1,))
    angles = positions[..., None].astype(wide) * rates
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "*B T H Dh"],
    cos: Float[Array, "*B T half"],
    sin: Float[Array, "*B T half"],
) -> Float[Array, "*B T H Dh"]:
    """Rotate pair (x_i, x_{i+Dh/2}) of every head by its angle: the split-halves convention.

    Computed in the dtype of cos and sin (fp32), returned in the dtype of x. Source: Su et al. 2021,
    eq. 34, with the pairs of Hugging Face's layout; Meta's files pair neighbours (x_2i, x_2i+1).
    """
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def visible(
    segments: Int[Array, "*B T"] | None,
    key_segments: Int[Array, "*B S"] | None,
    slots: Int[Array, "*B T"],
    n_keys: int,
) -> Bool[Array, "*B T S"]:
    """The mask: a query sees the key slots up to its own slot that belong to its own segment."""
    keys = jnp.arange(n_keys).reshape((1,) * slots.ndim + (-1,))
    mask = keys <= slots[..., None]
    if segments is None:
        return mask
    return mask & (segments[..., :, None] == key_segments[..., None, :n_keys])


def attend(
    q: Float[Array, "*B K G t Dh"],
    k: Float[Array, "*B K S Dh"],
    v: Float[Array, "*B K S Dh"],
    mask: Bool[Array, "*_ t S"],
) -> Float[Array, "*B K G t Dh"]:
    """softmax(q kᵀ / √Dh + mask) v, softmax in fp32; all scores exist at once."""
    *batch, groups, n_queries, width = q.shape
    wide = accumulator(q.dtype)
    flat = q.reshape(*batch, groups * n_queries, width)
    scores = jnp.einsum("...qd,...sd->...qs", flat, k, preferred_element_type=wide)
    scores = scores.reshape(*batch, groups, n_queries, -1) * wide.type(width**-0.5)
    scores = jnp.where(mask[..., None, None, :, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = weights.reshape(*batch, groups * n_queries, -1) @ v
    return out.reshape(q.shape)


def product(a: Float[Array, "m i"], b: Float[Array, "i n"]) -> Float[Array, "m n"]:
    """a b, summed and returned in fp32 (in fp64 when a is)."""
    return jnp.matmul(a, b, preferred_element_type=accumulator(a.dtype))


def block_pairs(n: int) -> Int[np.ndarray, "pairs 2"]:
    """All (i, j), query block and key block, with j ≤ i; each i starts with its diagonal, j = i."""
    return np.array([(i, j) for i in range(n) for j in range(i, -1, -1)], np.int32)


def block_scores(
    q: Float[Array, "t*G Dh"],
    k: Float[Array, "t Dh"],
    q_segments: Int[Array, " t"],
    k_segments: Int[Array, " t"],
    earlier: Bool[Array, ""],
) -> Float[Array, "t*G t"]:
    """q kᵀ / √Dh in fp32, −∞ where the mask hides; earlier: the keys are of an earlier block."""
    seen = (np.tri(len(k), dtype=bool) | earlier) & (q_segments[:, None] == k_segments[None, :])
    scores = product(q, k.T)
    scores = scores * scores.dtype.type(q.shape[-1] ** -0.5)
    return jnp.where(jnp.repeat(seen, len(q) // len(k), axis=0), scores, -jnp.inf)


def blockwise_forward(q, k, v, segments):
    """The output of `blockwise`, and what `blockwise_backward` needs: FlashAttention-2, Algorithm 1.

    Shapes as in `blockwise`. Kept are the inputs, the output and λ = m + ln ℓ "n t·G 1": no scores.
    """

    def read(carry, pair):
        (i, j), (out, largest, total) = pair, carry
        scores = block_scores(q[i], k[j], segments[i], segments[j], j < i)
        new = jnp.maximum(largest[i], scores.max(axis=-1, keepdims=True))
        shrink, weights = jnp.exp(largest[i] - new), jnp.exp(scores - new)
        out = out.at[i].set(shrink * out[i] + product(weights.astype(v.dtype), v[j]))
        total = total.at[i].set(shrink * total[i] + weights.sum(axis=-1, keepdims=True))
        return (out, largest.at[i].set(new), total), None

    zero = jnp.zeros((*q.shape[:2], 1), accumulator(q.dtype))
    start = jnp.zeros(q.shape, zero.dtype), zero - jnp.inf, zero
    pairs = block_pairs(len(q))
    (out, largest, total), _ = jax.lax.scan(read, start, pairs, unroll=len(pairs) == 1)
    out = (out / total).astype(q.dtype)
    return out, (q, k, v, segments, out, largest + jnp.log(total))


def blockwise_backward(saved, d_out):
    """Gradients of `blockwise` by q, k and v for the gradient d_out by its output "n t·G Dh".

    Every block of weights is computed again from the scores and λ: FlashAttention-2, Algorithm 2.
    """
    q, k, v, segments, out, log_total = saved
    wide = log_total.dtype
    own = (d_out.astype(wide) * out.astype(wide)).sum(axis=-1, keepdims=True)  # do · o
    scale = wide.type(q.shape[-1] ** -0.5)

    def read(carry, pair):
        (i, j), (d_q, d_k, d_v) = pair, carry
        scores = block_scores(q[i], k[j], segments[i], segments[j], j < i)
        weights = jnp.exp(scores - log_total[i])
        d_scores = weights * (product(d_out[i], v[j].T) - own[i]) * scale
        weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)
        d_q = d_q.at[i].add(product(d_scores, k[j]))
        d_k = d_k.at[j].add(product(q[i].T, d_scores))
        d_v = d_v.at[j].add(product(d_out[i].T, weights))
        return (d_q, d_k, d_v), None

    turned = jnp.zeros(k.swapaxes(1, 2).shape, wide)
    start = jnp.zeros(q.shape, wide), turned, turned
    pairs = block_pairs(len(q))
    (d_q, d_k, d_v), _ = jax.lax.scan(read, start, pairs, unroll=len(pairs) == 1)
    d_q, d_k, d_v = (x.astype(q.dtype) for x in (d_q, d_k.swapaxes(1, 2), d_v.swapaxes(1, 2)))
    return d_q, d_k, d_v, None


@jax.custom_vjp
def blockwise(
    q: Float[Array, "n t*G Dh"],
    k: Float[Array, "n t Dh"],
    v: Float[Array, "n t Dh"],
    segments: Int[Array, "n t"],
) -> Float[Array, "n t*G Dh"]:
    """Causal attention of the G query heads of one key/value head, in n blocks of t tokens.

    Softmax and sums in fp32. Neither pass ever holds more scores than those of one pair of blocks,
    t·G × t. Reverse mode only (`jax.grad`, `jax.vjp`). Source: Dao 2023, Algorithms 1 and 2.
    """
    return blockwise_forward(q, k, v, segments)[0]


blockwise.defvjp(blockwise_forward, blockwise_backward)


def block_count(length: int) -> int:
    """Into how many equal blocks `causal_head` cuts a row: of at most 256 tokens, two from 65 on."""
    return max(1 + (length > 64), -(-length // 256))


def causal_head(
    q: Float[Array, "T G Dh"],
    k: Float[Array, "T Dh"],
    v: Float[Array, "T Dh"],
    segments: Int[Array, " T"],
) -> Float[Array, "T G Dh"]:
    """`blockwise` for a row of any length: padded at the end, where no query looks."""
    length, groups, width = q.shape
    n = block_count(length)
    size = -(-length // n)

    def cut(x: Array) -> Array:
        padding = ((0, n * size - length), *((0, 0),) * (x.ndim - 1))
        return jnp.pad(x, padding).reshape(n, size, *x.shape[1:])

    out = blockwise(cut(q).reshape(n, size * groups, width), cut(k), cut(v), cut(segments))
    return out.reshape(n * size, groups, width)[:length]


def attention(
    q: Float[Array, "*B T H Dh"],
    k: Float[Array, "*B S K Dh"],
    v: Float[Array, "*B S K Dh"],
    segments: Int[Array, "*B T"] | None = None,
    key_segments: Int[Array, "*B S"] | None = None,
    start: Int[Array, "*B"] | None = None,
) -> Float[Array, "*B T H Dh"]:
    """Causal attention of H query heads over K key/value heads; head h reads key head h·K//H.

    Query t stands in slot start + t and sees the keys of slots up to its own, in its own segment.
    Without start, queries and keys are the same T slots (S = T), and memory grows like T, not T²
    (see `blockwise`). Softmax in fp32. Source: Ainslie et al. 2023; Dao et al. 2022; paper §3.2.
    """
    *batch, n_queries, _, width = q.shape
    grouped = q.reshape(*batch, n_queries, k.shape[-2], -1, width)  # *B T K G Dh
    if start is None:
        if segments is None:
            segments = jnp.zeros((*batch, n_queries), jnp.int32)
        heads = jax.vmap(causal_head, in_axes=(-3, -2, -2, None), out_axes=-3)
        for _ in batch:
            heads = jax.vmap(heads)
        return heads(grouped, k, v, segments).reshape(q.shape)
    slots = start[..., None] + jnp.arange(n_queries).reshape((1,) * len(batch) + (-1,))
    key_segments = segments if key_segments is None else key_segments
    mask = visible(segments, key_segments, slots, k.shape[-3])
    k, v = jnp.moveaxis(k, -2, -3), jnp.moveaxis(v, -2, -3)  # *B K S Dh
    out = attend(jnp.moveaxis(grouped, -4, -2), k, v, mask)
    return jnp.moveaxis(out, -2, -4).reshape(q.shape)


def write_at(buffer: Array, new: Array, start: Int[Array, "*B"]) -> Array:
    """Write T entries "*B T ..." into each row's buffer "*B S ...", from that row's slot on."""

    def write(buffer, new, start):
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, start, axis=0)

    for _ in range(start.ndim):
        write = jax.vmap(write)
    return write(buffer, new.astype(buffer.dtype), start)


class Attention(eqx.Module):
    """Grouped-query self-attention: projections, rotary queries and keys, output; no biases.

    n_heads query heads (H) share n_kv_heads key/value heads (K), each head_dim (Dh) wide.
    """

    w_query: Float[Array, "H*Dh D"]
    w_key: Float[Array, "K*Dh D"]
    w_value: Float[Array, "K*Dh D"]
    w_out: Float[Array, "D H*Dh"]
    head_dim: int = eqx.field(static=True)

    def __init__(
        self, dim, n_heads, n_kv_heads, head_dim, *, key, out_scale=0.02, dtype=jnp.float32
    ):
        """Normal weights: σ is 0.02 for the inputs, `out_scale` for w_out (one key each)."""
        query, key_, value, out = jax.random.split(key, 4)
        q_width, kv_width = n_heads * head_dim, n_kv_heads * head_dim
        self.w_query = 0.02 * jax.random.normal(query, (q_width, dim), dtype)
        self.w_key = 0.02 * jax.random.normal(key_, (kv_width, dim), dtype)
        self.w_value = 0.02 * jax.random.normal(value, (kv_width, dim), dtype)
        self.w_out = out_scale * jax.random.normal(out, (dim, q_width), dtype)
        self.head_dim = head_dim

    def __call__(self, x: Float[Array, "*B T D"], rotation, segments=None, past=None):
        """Return the output "*B T D", and keys and values: of x, or the cache's with x written in.

        past is (k, v, key_segments, start): one layer's buffers "*B S K Dh", and x's first slot.
        """
        q, k, v = self.project(x, rotation)
        key_segments = start = None
        if past is not None:
            k_past, v_past, key_segments, start = past
            k, v = write_at(k_past, k, start), write_at(v_past, v, start)
        y = attention(q, k, v, segments, key_segments, start)
        return linear(y.reshape(*x.shape[:-1], -1), self.w_out), (k, v)

    def project(self, x: Float[Array, "*B T D"], rotation):
        """Rotated queries "*B T H Dh", rotated keys "*B T K Dh", values "*B T K Dh"."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        weights = (self.w_query, self.w_key, self.w_value)
        q, k, v = (linear(x, w).reshape(heads) for w in weights)
        return apply_rope(q, *rotation), apply_rope(k, *rotation), v


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama. head_dim is explicit: n_heads · head_dim need not equal dim.

    dim: width of the residual stream; n_heads, n_kv_heads: query and key/value heads; hidden_dim:
    width of the feed-forward layer; rope_theta, rope_scaling: see `rope_frequencies`; norm_eps: the
    ε of every norm; tie_embeddings: the embedding is the output matrix too. max_seq_len says for
    which length the model is meant; the model itself doesn't enforce it.
    Raises ValueError, naming the field and the numbers, for a shape that can't exist.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    head_dim: int
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_seq_len: int = 8192

    def __post_init__(self):
        sizes = [field.name for field in dataclasses.fields(self) if field.type is int]
        for name in sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {name}={value}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads, "
                f"got n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (pairs rotate), got head_dim={self.head_dim}")
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1, got rope_theta={self.rope_theta}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")


class Block(eqx.Module):
    """One pre-norm layer: x + Attention(norm(x)), then x + SwiGLU(norm(x))."""

    attention_norm: RMSNorm
    attention: Attention
    feed_forward_norm: RMSNorm
    feed_forward: SwiGLU

    def __init__(self, config: LlamaConfig, *, key: PRNGKeyArray, dtype: jnp.dtype = jnp.float32):
        """σ = 0.02, and 0.02/√(2L) for the matrices that write to the stream (one key a layer)."""
        attention_key, feed_forward_key = jax.random.split(key)
        shape = (config.dim, config.n_heads, config.n_kv_heads, config.head_dim)
        options = {"out_scale": 0.02 / (2 * config.n_layers) ** 0.5, "dtype": dtype}
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, dtype=dtype)
        self.attention = Attention(*shape, key=attention_key, **options)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps, dtype=dtype)
        self.feed_forward = SwiGLU(config.dim, config.hidden_dim, key=feed_forward_key, **options)

    def __call__(self, x: Float[Array, "*B T D"], rotation, segments=None, past=None):
        """Return the new x "*B T D" and this layer's keys and values (see `Attention`)."""
        y, kv = self.attention(self.attention_norm(x), rotation, segments, past)
        x = x + y
        return x + self.feed_forward(self.feed_forward_norm(x)), kv


class KVCache(eqx.Module):
    """Keys and values of every layer in buffers of fixed size, so that decoding compiles once.

    length[b] is the number of slots that row b has filled: the next token is written there, and
    slots from there on are never seen. To decode prompts of different lengths, prefill them padded
    on the right, then set `length` to the true ones: the padding is overwritten.
    """

    k: tuple[Float[Array, "*B S K Dh"], ...]
    v: tuple[Float[Array, "*B S K Dh"], ...]
    segments: Int[Array, "*B S"]
    length: Int[Array, "*B"]


def init_cache(
    config: LlamaConfig, batch: int | tuple[int, ...], length: int, dtype: jnp.dtype = jnp.float32
) -> KVCache:
    """An empty cache of `length` slots; batch is a size, or a tuple of any number of batch axes.

    Takes 2 · n_layers · n_kv_heads · head_dim · bytes per slot.
    """
    batch = (batch,) if isinstance(batch, int) else tuple(batch)
    shape = (*batch, length, config.n_kv_heads, config.head_dim)
    return KVCache(
        k=tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)),
        v=tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)),
        segments=jnp.zeros((*batch, length), jnp.int32),
        length=jnp.zeros(batch, jnp.int32),
    )


def embed(table: Float[Array, "V D"], tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
    """Rows of the table; a token outside it gives NaN, never a neighbour's row.

    Plain JAX indexing clamps an index that is too large and wraps a negative one, silently.
    """
    at = table.at[tokens]
    return at.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def check_inputs(model: "Llama", tokens, segments, positions, cache) -> None:
    """Raise ValueError for what can be known here: shapes and dtypes always, values outside jit."""
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, got dtype {tokens.dtype}")
    if not tokens.ndim or not tokens.shape[-1]:
        raise ValueError(f"tokens must have at least one position, got shape {tokens.shape}")
    for name, array in (("segments", segments), ("positions", positions)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"{name} must be shaped like tokens {tokens.shape}, got {array.shape}")
    if cache is not None:
        slots, new = cache.segments.shape[-1], tokens.shape[-1]
        if cache.segments.shape[:-1] != tokens.shape[:-1]:
            batch = cache.segments.shape[:-1]
            raise ValueError(f"tokens {tokens.shape} don't fit a cache with batch axes {batch}")
        if cache.k[0].dtype != model.embedding.dtype:
            raise ValueError(
                f"the cache's dtype must be the model's, {model.embedding.dtype}, "
                f"got {cache.k[0].dtype}"
            )
        used = 0 if isinstance(cache.length, jax.core.Tracer) else int(cache.length.max())
        if used + new > slots:
            raise ValueError(f"the cache has {slots} slots, {used} are used, can't add {new} more")
    if not isinstance(tokens, jax.core.Tracer) and tokens.size:
        low, high, last = int(tokens.min()), int(tokens.max()), model.config.vocab_size - 1
        if low < 0 or high > last:
            bad = low if low < 0 else high
            raise ValueError(f"token {bad} is outside the vocabulary 0..{last}")


def states(
    model: "Llama",
    tokens: Int[Array, "*B T"],
    segments: Int[Array, "*B T"] | None,
    positions: Int[Array, "*B T"] | None,
    cache: KVCache | None,
) -> tuple[Float[Array, "*B T D"], KVCache | None]:
    """Final normalised states, and the cache with these tokens in it (see `Llama.hidden`)."""
    config = model.config
    check_inputs(model, tokens, segments, positions, cache)
    start, key_segments = None if cache is None else cache.length, None
    if positions is None:
        arange = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
        positions = jnp.broadcast_to(arange, tokens.shape)
        positions = positions if start is None else positions + start[..., None]
    if cache is not None:
        segments = jnp.zeros(tokens.shape, jnp.int32) if segments is None else segments
        key_segments = write_at(cache.segments, segments, start)

    x = embed(model.embedding, tokens)
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    rotation = rope_rotation(positions, frequencies, x.dtype)
    kept = []
    for i, block in enumerate(model.blocks):
        past = None if cache is None else (cache.k[i], cache.v[i], key_segments, start)
        x, kv = block(x, rotation, segments, past)
        kept.append(kv)
    h = model.norm(x)
    if cache is None:
        return h, None
    full = start + tokens.shape[-1] > cache.segments.shape[-1]
    h = jnp.where(full[..., None, None], jnp.nan, h)
    k, v = zip(*kept, strict=True)
    return h, KVCache(k, v, key_segments, start + tokens.shape[-1])


class Llama(eqx.Module):
    """Llama 3: embedding, pre-norm blocks, a final RMSNorm, and a head that may be the embedding.

    Inputs are shaped "*B T". segments: the document of each token, which attention never leaves
    (default: one). positions: rotary positions (default: 0, 1, …, going on from the cache).
    Raises ValueError for shapes that differ, no token at all, a cache of another dtype, tokens
    outside the vocabulary and a full cache; under jit the last two can't be seen: such a row becomes
    NaN. Initial weights: normal, σ = 0.02, those that write to the residual stream 0.02/√(2L)
    (GPT-2's rule; the paper states none).
    """

    embedding: Float[Array, "V D"]
    blocks: tuple[Block, ...]
    norm: RMSNorm
    head: Float[Array, "V D"] | None
    config: LlamaConfig = eqx.field(static=True)

    def __init__(self, config: LlamaConfig, *, key: PRNGKeyArray, dtype: jnp.dtype = jnp.float32):
        embedding_key, head_key, *block_keys = jax.random.split(key, 2 + config.n_layers)
        shape, tied = (config.vocab_size, config.dim), config.tie_embeddings
        self.embedding = 0.02 * jax.random.normal(embedding_key, shape, dtype)
        self.blocks = tuple(Block(config, key=k, dtype=dtype) for k in block_keys)
        self.norm = RMSNorm(config.dim, config.norm_eps, dtype=dtype)
        self.head = None if tied else 0.02 * jax.random.normal(head_key, shape, dtype)
        self.config = config

    @property
    def output_weight(self) -> Float[Array, "V D"]:
        """The matrix that turns hidden states into logits: the head, or the embedding if tied."""
        return self.embedding if self.head is None else self.head

    def hidden(self, tokens, segments=None, positions=None, cache=None):
        """The pair: final normalised states "*B T D", new cache (None without one)."""
        return states(self, tokens, segments, positions, cache)

    def __call__(self, tokens, segments=None, positions=None, cache=None):
        """Logits "*B T V" in the model's dtype; with a cache, the pair (logits, new cache)."""
        h, new_cache = self.hidden(tokens, segments, positions, cache)
        logits = linear(h, self.output_weight)
        return logits if cache is None else (logits, new_cache)


def cross_entropy(
    logits: Float[Array, "*B T V"],
    targets: Int[Array, "*B T"],
    mask: Bool[Array, "*B T"] | None = None,
) -> Float[Array, ""]:
    """Mean negative log-probability of the targets, in nats, in fp32 whatever the dtype of logits.

    Averages over targets that the mask keeps and that are not negative (−1 means: ignore). With
    nothing to average it is 0. A target beyond the vocabulary gives NaN.
    """
    wide = logits.astype(accumulator(logits.dtype))
    keep = targets >= 0 if mask is None else mask.astype(bool) & (targets >= 0)
    chosen = jnp.take_along_axis(wide, jnp.where(keep, targets, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(wide, axis=-1) - chosen
    count = jnp.maximum(keep.sum(), 1).astype(wide.dtype)
    return jnp.where(keep, losses, 0).sum() / count


def count_params(config: LlamaConfig) -> int:
    """Number of weights of a Llama of this shape, from the formula; nothing is allocated.

    For a model that exists, see `training.count_parameters`.
    """
    c = config
    attention_weights = c.dim * c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads)
    block = attention_weights + 3 * c.dim * c.hidden_dim + 2 * c.dim
    tables = (1 if c.tie_embeddings else 2) * c.vocab_size * c.dim
    return tables + c.n_layers * block + c.dim


def published(dim, n_layers, n_heads, head_dim, hidden_dim, **options) -> LlamaConfig:
    """A published shape: all have 128,256 rows, 8 key/value heads and θ = 500,000."""
    return LlamaConfig(128_256, dim, n_layers, n_heads, 8, hidden_dim, head_dim, **options)


LONG = {"rope_scaling": RopeScaling(factor=8.0), "max_seq_len": 131_072}
LONG_TIED = LONG | {"rope_scaling": RopeScaling(factor=32.0), "tie_embeddings": True}


CONFIGS = {
    "llama3-8b": published(4096, 32, 32, 128, ffn_width(4096, 1.3, 1024)),
    "llama3-70b": published(8192, 80, 64, 128, ffn_width(8192, 1.3, 4096)),
    "llama3.1-8b": published(4096, 32, 32, 128, ffn_width(4096, 1.3, 1024), **LONG),
    "llama3.1-70b": published(8192, 80, 64, 128, ffn_width(8192, 1.3, 4096), **LONG),
    "llama3.1-405b": published(16384, 126, 128, 128, ffn_width(16384, 1.2, 4096), **LONG),
    "llama3.2-1b": published(2048, 16, 32, 64, ffn_width(2048, 1.5, 256), **LONG_TIED),
    "llama3.2-3b": published(3072, 28, 24, 128, ffn_width(3072, 1.0, 256), **LONG_TIED),
}
