"""GPT-2 twice, as sixty lines of NumPy and as an Equinox module, with its published file format, its tokenizer's files, and a head that classifies.

Written from chapters/08_gpt2.py by `make export`: edit there.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors.numpy import load_file
from safetensors.numpy import save as safetensors_bytes

from llm_from_scratch.attention import (
    causal_mask,
    merge_heads,
    scaled_dot_product_attention,
    split_heads,
)
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.training import write_durably
from llm_from_scratch.transformer import LayerNorm


def gelu(x: Float[np.ndarray, "*T"]) -> Float[np.ndarray, "*T"]:
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³))). Source: Hendrycks & Gimpel 2016, §2."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x: Float[np.ndarray, "*T"]) -> Float[np.ndarray, "*T"]:
    """Numbers to probabilities, along the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def layer_norm(x: Float[np.ndarray, "T D"], w: Mapping, name: str) -> Float[np.ndarray, "T D"]:
    """Each row to mean 0 and variance 1, times `name`.weight, plus `name`.bias."""
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Float[np.ndarray, "T D"], w: Mapping, name: str) -> Float[np.ndarray, "T F"]:
    """x times `name`.weight, which is (in, out), plus `name`.bias."""
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(
    q: Float[np.ndarray, "T Dh"], k: Float[np.ndarray, "S Dh"], v: Float[np.ndarray, "S Dh"]
) -> Float[np.ndarray, "T Dh"]:
    """softmax(q kᵀ/√Dh + mask) v, where the queries are the last T of S positions."""
    future = np.tri(len(q), len(k), len(k) - len(q)) == 0
    scores = q @ k.T / math.sqrt(q.shape[-1])
    return softmax(np.where(future, -1e10, scores)) @ v


def multi_head(
    q: Float[np.ndarray, "T D"],
    k: Float[np.ndarray, "S D"],
    v: Float[np.ndarray, "S D"],
    n_heads: int,
) -> Float[np.ndarray, "T D"]:
    """`attention` in each of n_heads slices of the columns; the results side by side."""
    heads = [np.split(x, n_heads, axis=-1) for x in (q, k, v)]
    return np.hstack([attention(*head) for head in zip(*heads, strict=True)])


def feed_forward(x: Float[np.ndarray, "T D"], w: Mapping, name: str) -> Float[np.ndarray, "T D"]:
    """Widen to 4D, bend, narrow: at each position alone."""
    return linear(gelu(linear(x, w, f"{name}.c_fc")), w, f"{name}.c_proj")


def block(x: Float[np.ndarray, "T D"], w: Mapping, name: str, n_heads: int):
    """x + attention(norm(x)), then the same with the feed-forward layer. Shape (T, D)."""
    qkv = linear(layer_norm(x, w, f"{name}.ln_1"), w, f"{name}.attn.c_attn")
    mixed = multi_head(*np.split(qkv, 3, axis=-1), n_heads)
    x = x + linear(mixed, w, f"{name}.attn.c_proj")
    return x + feed_forward(layer_norm(x, w, f"{name}.ln_2"), w, f"{name}.mlp")


def numpy_gpt2(
    ids: Sequence[int], w: Mapping[str, np.ndarray], n_heads: int
) -> Float[np.ndarray, "T V"]:
    """The logits of what follows each of `ids`, from the arrays of a published GPT-2 by name."""
    if not 0 < len(ids) <= len(w["wpe.weight"]):
        raise ValueError(f"{len(ids)} tokens; need 1 to {len(w['wpe.weight'])}")
    x = w["wte.weight"][list(ids)] + w["wpe.weight"][: len(ids)]
    for i in range(sum(name.endswith("ln_1.weight") for name in w)):
        x = block(x, w, f"h.{i}", n_heads)
    return layer_norm(x, w, "ln_f") @ w["wte.weight"].T


def greedy(ids: Sequence[int], w: Mapping, n_heads: int, count: int) -> list[int]:
    """The `count` likeliest next tokens, one after another, a full forward pass for each."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(numpy_gpt2(ids, w, n_heads)[-1].argmax()))
    return ids[-count:] if count else []


def step(
    token: int, w: Mapping, n_heads: int, cache: list[list[np.ndarray]]
) -> Float[np.ndarray, " V"]:
    """Read one token: the logits of the next. `cache` holds [keys, values] of each layer and grows."""
    x = w["wte.weight"][[token]] + w["wpe.weight"][[len(cache[0][0])]]
    for i, kept in enumerate(cache):
        qkv = linear(layer_norm(x, w, f"h.{i}.ln_1"), w, f"h.{i}.attn.c_attn")
        q, *new = np.split(qkv, 3, axis=-1)
        kept[:] = [np.vstack(pair) for pair in zip(kept, new, strict=True)]
        x = x + linear(multi_head(q, *kept, n_heads), w, f"h.{i}.attn.c_proj")
        x = x + feed_forward(layer_norm(x, w, f"h.{i}.ln_2"), w, f"h.{i}.mlp")
    return layer_norm(x, w, "ln_f")[0] @ w["wte.weight"].T


def empty_cache(w: Mapping) -> list[list[np.ndarray]]:
    """For each layer keys and values of no position yet, both (0, D)."""
    nothing, layers = w["wte.weight"][:0], sum(name.endswith("ln_1.weight") for name in w)
    return [[nothing, nothing] for _ in range(layers)]


def cached_greedy(ids: Sequence[int], w: Mapping, n_heads: int, count: int) -> list[int]:
    """As `greedy`, each token read once."""
    if not len(ids):
        raise ValueError("0 tokens; need at least 1")
    cache, written = empty_cache(w), []
    for token in ids:
        logits = step(token, w, n_heads, cache)
    while len(written) < count:
        written.append(int(logits.argmax()))
        if len(written) < count:
            logits = step(written[-1], w, n_heads, cache)
    return written


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2; the defaults are the smallest published one, 124M.

    The feed-forward width is always 4 · dim. Raises ValueError for values that no model can have.
    """

    vocab_size: int = 50_257
    max_seq_len: int = 1024
    dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    norm_eps: float = 1e-5

    def __post_init__(self):
        for name in ("vocab_size", "max_seq_len", "dim", "n_layers", "n_heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name}={value} must be a whole number of at least 1")
            object.__setattr__(self, name, int(value))
        if self.dim % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} does not divide dim={self.dim}")
        if not isinstance(self.norm_eps, float | np.floating) or not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps={self.norm_eps} must be between 0 and 1")
        object.__setattr__(self, "norm_eps", float(self.norm_eps))


GPT2_CONFIGS = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(dim=1024, n_layers=24, n_heads=16),
    "gpt2-large": GPT2Config(dim=1280, n_layers=36, n_heads=20),
    "gpt2-xl": GPT2Config(dim=1600, n_layers=48, n_heads=25),
}


class CausalSelfAttention(eqx.Module):
    """Each position looks at itself and at those before it, with H heads; all projections have biases."""

    w_qkv: Float[Array, "3*D D"]
    b_qkv: Float[Array, " 3*D"]
    w_out: Float[Array, "D D"]
    b_out: Float[Array, " D"]
    n_heads: int = eqx.field(static=True)

    def __init__(self, dim: int, n_heads: int, out_scale: float, *, key: Array):
        for_qkv, for_out = jax.random.split(key)
        self.w_qkv = 0.02 * jax.random.normal(for_qkv, (3 * dim, dim))
        self.w_out = out_scale * jax.random.normal(for_out, (dim, dim))
        self.b_qkv, self.b_out, self.n_heads = jnp.zeros(3 * dim), jnp.zeros(dim), n_heads

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        qkv = jnp.split(x @ self.w_qkv.T + self.b_qkv[None], 3, axis=-1)
        q, k, v = (split_heads(part, self.n_heads) for part in qkv)
        out = scaled_dot_product_attention(q, k, v, causal_mask(len(x))[None])
        return merge_heads(out) @ self.w_out.T + self.b_out[None]


class GELUFeedForward(eqx.Module):
    """gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂ with F = 4D, at each position alone."""

    w1: Float[Array, "F D"]
    b1: Float[Array, " F"]
    w2: Float[Array, "D F"]
    b2: Float[Array, " D"]

    def __init__(self, dim: int, out_scale: float, *, key: Array):
        for_w1, for_w2 = jax.random.split(key)
        self.w1 = 0.02 * jax.random.normal(for_w1, (4 * dim, dim))
        self.w2 = out_scale * jax.random.normal(for_w2, (dim, 4 * dim))
        self.b1, self.b2 = jnp.zeros(4 * dim), jnp.zeros(dim)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return jax.nn.gelu(x @ self.w1.T + self.b1[None]) @ self.w2.T + self.b2[None]


class Block(eqx.Module):
    """A pre-norm layer: the stream plus attention of its norm, then plus the feed-forward of its norm."""

    norm_1: LayerNorm
    attention: CausalSelfAttention
    norm_2: LayerNorm
    feed_forward: GELUFeedForward

    def __init__(self, config: GPT2Config, *, key: Array):
        for_attention, for_feed_forward = jax.random.split(key)
        out_scale = 0.02 / math.sqrt(2 * config.n_layers)
        self.norm_1 = LayerNorm(config.dim, config.norm_eps)
        self.attention = CausalSelfAttention(
            config.dim, config.n_heads, out_scale, key=for_attention
        )
        self.norm_2 = LayerNorm(config.dim, config.norm_eps)
        self.feed_forward = GELUFeedForward(config.dim, out_scale, key=for_feed_forward)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        x = x + self.attention(self.norm_1(x))
        return x + self.feed_forward(self.norm_2(x))


class GPT2(eqx.Module):
    """A causal language model with learned positions and a tied head; batch-free: vmap it.

    No dropout. Norms and softmax in fp32. Raises ValueError for no token, or more than max_seq_len.
    Source: Radford et al. 2019, §2.3.
    """

    embedding: Float[Array, "V D"]
    positions: Float[Array, "S D"]
    blocks: tuple[Block, ...]
    norm: LayerNorm
    config: GPT2Config = eqx.field(static=True)

    def __init__(self, config: GPT2Config, *, key: Array):
        for_embedding, for_positions, for_blocks = jax.random.split(key, 3)
        shape = (config.vocab_size, config.dim)
        self.embedding = 0.02 * jax.random.normal(for_embedding, shape)
        shape = (config.max_seq_len, config.dim)
        self.positions = 0.02 * jax.random.normal(for_positions, shape)
        keys = jax.random.split(for_blocks, config.n_layers)
        self.blocks = tuple(Block(config, key=k) for k in keys)
        self.norm, self.config = LayerNorm(config.dim, config.norm_eps), config

    def stream(self, tokens: Int[Array, " T"]) -> Iterator[Float[Array, "T D"]]:
        """The stream after the embedding and after each block."""
        if not 0 < len(tokens) <= self.config.max_seq_len:
            raise ValueError(
                f"{len(tokens)} tokens; need 1 to max_seq_len={self.config.max_seq_len}"
            )
        x = self.embedding[tokens] + self.positions[: len(tokens)]
        yield x
        for block in self.blocks:
            x = block(x)
            yield x

    def hidden(self, tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
        """What the head reads: the stream after the last block, normed."""
        *_, last = self.stream(tokens)
        return self.norm(last)

    def __call__(self, tokens: Int[Array, " T"]) -> Float[Array, "T V"]:
        """The logits of what follows each token."""
        return self.hidden(tokens) @ self.embedding.T


def token_nats(model: GPT2, tokens: Int[Array, " T"]) -> Float[Array, " T-1"]:
    """−ln p of each token but the first, given those before it; softmax in fp32."""
    log_p = jax.nn.log_softmax(model(tokens[:-1]).astype(jnp.float32))
    return -jnp.take_along_axis(log_p, tokens[1:, None], axis=1)[:, 0]


def mean_nats(model: GPT2, batch: dict[str, Array], key: Array | None = None) -> Float[Array, ""]:
    """The mean of `token_nats` over a batch of "tokens", (B, T); for `training.fit`."""
    return jnp.mean(jax.vmap(token_nats, (None, 0))(model, batch["tokens"]))


def named(model: GPT2) -> dict[str, Array]:
    """A model's arrays under their published names, matrices still (out, in) as we hold them."""
    found = {"wte.weight": model.embedding, "wpe.weight": model.positions}
    for i, block in enumerate(model.blocks):
        a, f = block.attention, block.feed_forward
        parts = {
            "ln_1": (block.norm_1.weight, block.norm_1.bias),
            "attn.c_attn": (a.w_qkv, a.b_qkv),
            "attn.c_proj": (a.w_out, a.b_out),
            "ln_2": (block.norm_2.weight, block.norm_2.bias),
            "mlp.c_fc": (f.w1, f.b1),
            "mlp.c_proj": (f.w2, f.b2),
        }
        for name, (weight, bias) in parts.items():
            found |= {f"h.{i}.{name}.weight": weight, f"h.{i}.{name}.bias": bias}
    return found | {"ln_f.weight": model.norm.weight, "ln_f.bias": model.norm.bias}


def is_turned(name: str) -> bool:
    """Whether the published array of this name is (in, out), the transpose of ours."""
    return ".c_" in name and name.endswith("weight")


def published(model: GPT2) -> dict[str, np.ndarray]:
    """A model's arrays by published name, as the files hold them: c_* matrices (in, out)."""
    arrays = {name: np.asarray(array) for name, array in named(model).items()}
    return {name: array.T if is_turned(name) else array for name, array in arrays.items()}


CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "n_positions": "max_seq_len",
    "n_embd": "dim",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "layer_norm_epsilon": "norm_eps",
}
CONFIG_FIXED = {  # what else a config.json says, and the values under which our model is the same
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def parse_config(text: str, where: str = "config.json") -> GPT2Config:
    """The shape that a published config.json describes; ValueError if our GPT2 would differ from it."""
    found = json.loads(text)
    if missing := [name for name in CONFIG_NAMES if name not in found]:
        raise ValueError(f"{where} lacks {', '.join(missing)}: not the config of a GPT-2")
    config = GPT2Config(**{ours: found[theirs] for theirs, ours in CONFIG_NAMES.items()})
    for name, allowed in CONFIG_FIXED.items():
        if found.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{where}: {name}={found[name]!r}; this GPT2 has {allowed[0]!r}")
    if found.get("n_inner") not in (None, 4 * config.dim):
        raise ValueError(f"{where}: n_inner={found['n_inner']}; this GPT2 has {4 * config.dim}")
    return config


def tidy_names(arrays: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Published arrays without prefix, masks and the second copy of a tied head, in fp32."""
    found = {}
    for name, array in arrays.items():
        name = name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            found[name] = np.asarray(array, np.float32)
    head = found.pop("lm_head.weight", None)
    if head is not None and not np.array_equal(head, found.get("wte.weight")):
        raise ValueError(f"{where}: lm_head.weight is not wte.weight, but this GPT2's head is tied")
    return found


def from_published(
    config: GPT2Config, arrays: Mapping[str, np.ndarray], where: str = "the arrays"
) -> GPT2:
    """A model from published arrays. ValueError that lists what is missing, unexpected or misshapen."""
    arrays = tidy_names(arrays, where)
    arrays = {name: a.T if is_turned(name) else a for name, a in arrays.items()}
    like = eqx.filter_eval_shape(GPT2, config, key=jax.random.key(0))
    wanted = named(like)
    faults = [f"{name} is missing" for name in wanted if name not in arrays]
    faults += [f"{name} is not expected" for name in arrays if name not in wanted]
    faults += [
        f"{name} is {arrays[name].shape} where {array.shape} is needed, as (out, in)"
        for name, array in wanted.items()
        if name in arrays and arrays[name].shape != array.shape
    ]
    if faults:
        raise ValueError(f"{where}: " + "; ".join(faults[:8]) + " …" * (len(faults) > 8))
    filled = [jnp.asarray(arrays[name]) for name in wanted]
    return eqx.tree_at(lambda model: list(named(model).values()), like, filled)


def load_gpt2(folder: str | Path) -> GPT2:
    """Read a GPT-2 in the published (Hugging Face) format: config.json and model.safetensors, to fp32.

    Raises FileNotFoundError, or ValueError that names the file and all that doesn't fit.
    """
    config_file, weights = Path(folder, "config.json"), Path(folder, "model.safetensors")
    for path in (config_file, weights):
        if not path.is_file():
            raise FileNotFoundError(
                f"no {path}: a published GPT-2 has config.json, model.safetensors"
            )
    config = parse_config(config_file.read_text(encoding="utf-8"), str(config_file))
    return from_published(config, load_file(weights), str(weights))


def save_gpt2(folder: str | Path, model: GPT2, eos: int | None = None) -> None:
    """Write the folder that `load_gpt2` and transformers' `GPT2LMHeadModel.from_pretrained` read.

    `eos`: the id of the end-of-text token, for config.json (its bos, too); a `GPT2` doesn't know it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {theirs: getattr(model.config, ours) for theirs, ours in CONFIG_NAMES.items()}
    config |= {name: values[0] for name, values in CONFIG_FIXED.items()}
    config |= {"architectures": ["GPT2LMHeadModel"], "bos_token_id": eos, "eos_token_id": eos}
    arrays = {f"transformer.{k}": np.ascontiguousarray(v) for k, v in published(model).items()}
    write_durably(folder / "config.json", json.dumps(config, indent=1).encode())
    write_durably(folder / "model.safetensors", safetensors_bytes(arrays, {"format": "pt"}))


def count_gpt2(config: GPT2Config) -> int:
    """How many parameters a GPT-2 of this shape has; the tied head counts once."""
    d = config.dim
    tables = (config.vocab_size + config.max_seq_len) * d
    return tables + config.n_layers * (12 * d**2 + 13 * d) + 2 * d


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_letters() -> dict[int, str]:
    """The letter by which GPT-2's files spell each byte.

    33–126, 161–172 and 174–255 are their own; the rest get U+0100, U+0101, … in order.
    """
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def load_gpt2_tokenizer(folder: str | Path) -> Tokenizer:
    """Read vocab.json and merges.txt, GPT-2's tokenizer files; `<|endoftext|>` becomes bos, eos and stop.

    Raises FileNotFoundError, or ValueError if the merges are not in the order of their ids, which
    our encoder relies on.
    """
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    vocabulary = json.loads(Path(folder, "vocab.json").read_text(encoding="utf-8"))
    end = "<|endoftext|>"
    special = {end: vocabulary.pop(end)} if end in vocabulary else {}
    lines = Path(folder, "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [text.split(" ") for text in lines if text and not text.startswith("#version")]
    order = [vocabulary.get("".join(pair), -1) for pair in pairs]
    if order != sorted(order) or (order and order[0] < 0):
        raise ValueError(
            f"{folder}: the merges of merges.txt are not in the order of vocab.json's ids"
        )
    if odd := [token for token in vocabulary if not set(token) <= byte_of.keys()]:
        raise ValueError(f"{folder}: token {odd[0]!r} has a letter that stands for no byte")
    ranks = {bytes(byte_of[c] for c in token): id for token, id in vocabulary.items()}
    return Tokenizer(ranks, special, GPT2_PATTERN, bos=end, eos=end, stop=[end])


class Classifier(eqx.Module):
    """A GPT-2 that answers with one of C classes: a linear map of what the last token's position holds.

    Source: Radford et al. 2018 (GPT), §3.2.
    """

    trunk: GPT2
    weight: Float[Array, "C D"]
    bias: Float[Array, " C"]

    def __init__(self, trunk: GPT2, classes: int, *, key: Array):
        self.trunk, self.bias = trunk, jnp.zeros(classes)
        self.weight = 0.02 * jax.random.normal(key, (classes, trunk.config.dim))

    def __call__(self, tokens: Int[Array, " T"], length: Int[Array, ""]) -> Float[Array, " C"]:
        """The classes' logits; 1 ≤ `length` ≤ T (not checked) tokens count, the rest is padding."""
        last = self.trunk.hidden(tokens)[length - 1]
        return self.weight @ last + self.bias


def class_nats(
    model: Classifier, batch: dict[str, Array], key: Array | None = None
) -> Float[Array, ""]:
    """Mean −ln p of "labels" (B,), from "tokens" (B, T) and "lengths" (B,); for `training.fit`."""
    log_p = jax.nn.log_softmax(jax.vmap(model)(batch["tokens"], batch["lengths"]))
    return -jnp.mean(jnp.take_along_axis(log_p, batch["labels"][:, None], axis=1))
