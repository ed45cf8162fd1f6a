"""Attention, from the alignment of Bahdanau et al. to many heads: old spelling translated into new, beam search, and the scores that judge a translation.

Written from chapters/05_attention.py by `make export`: edit there.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llm_from_scratch.datasets import Play, folio, plays


class Pair(NamedTuple):
    """A line of the First Folio and the same line in modern spelling; `play` is the play's slug."""

    play: str
    old: str
    modern: str


# the speaker before a line of the Folio: "  Ham. To be" or "   1.Lord. Who"
_FOLIO_SPEAKER = re.compile(
    r"^\s+(?:\d\.?\s?)?[A-Z][\w'&]*(?:\.[A-Z]\w*)?(?:\s[\w'&]+\.?){0,2}?\.\s+(?=\S)"
)


def folio_lines(text: str) -> list[str]:
    """The lines of a Folio text without the speaker's name; headings and directions are still among them."""
    lines = (" ".join(_FOLIO_SPEAKER.sub("", line).split()) for line in text.split("\n"))
    return [line for line in lines if line]


def spoken_lines(play: Play) -> list[str]:
    """The lines of a play as they are spoken: no headings, no names, no stage directions."""
    lines = (re.sub(r"\[[^]]*\]", "", line) for s in play.speeches for line in s.lines)
    return [line for line in (" ".join(line.split()) for line in lines) if line]


def bare(line: str) -> str:
    """A line without case, punctuation and the commonest habits of spelling: v is u, j and y are i."""
    letters = re.sub(r"[^a-z]+", " ", line.lower()).strip()
    return letters.replace("v", "u").replace("j", "i").replace("y", "i")


def letter_pairs(lines: Sequence[str], width: int = 257) -> Float[np.ndarray, "lines width"]:
    """A unit vector per line: the roots of the counts of its letter pairs, folded into `width` bins."""
    text = "".join(f" {bare(line)} \n" for line in lines).encode()
    codes = np.frombuffer(text, np.uint8).astype(np.int64)
    row = np.cumsum(codes == 10) - (codes == 10)
    pairs = (codes[:-1] * 31 + codes[1:]) % width
    inside = (codes[:-1] != 10) & (codes[1:] != 10)
    where = (row[:-1] * width + pairs)[inside]
    counts = np.bincount(where, minlength=width * len(lines)).reshape(-1, width)
    roots = np.sqrt(counts).astype(np.float32)
    return roots / np.linalg.norm(roots, axis=1, keepdims=True)


def align(candidates: Iterable[tuple[int, int, float]], columns: int) -> list[tuple[int, int]]:
    """The pairs (i, j), both rising, whose sum of gains is largest, by dynamic programming.

    Candidates are (i, j, gain) with gain > 0 and j < columns, by rising i, and by falling j where i is
    the same (so that no two of a row are chained). Rows and columns may stay without a partner.
    """
    best = np.zeros(columns + 1)  # best[j]: the largest sum so far that uses columns below j only
    last = np.full(columns + 1, -1)  # last[j]: the pair at the end of that sum
    pairs, before = [], []
    for i, j, gain in candidates:
        total = best[j] + gain
        end = max(j + 1, int(np.searchsorted(best, total)))  # best rises: it is smaller up to here
        before.append(int(last[j]))
        best[j + 1 : end], last[j + 1 : end] = total, len(pairs)
        pairs.append((i, j))
    chosen, at = [], int(last[-1])
    while at >= 0:
        chosen.append(pairs[at])
        at = before[at]
    return chosen[::-1]


BLOCK = 100  # lines of the old text that are compared at once


@jax.jit
def products(a: Float[Array, "M F"], b: Float[Array, "N F"]) -> Float[Array, "M N"]:
    """All products of the rows of a with the rows of b."""
    return a @ b.T


def align_lines(
    old: Sequence[str], new: Sequence[str], *, least: float = 0.6, band: int = 300
) -> list[tuple[str, str, float]]:
    """Pair the lines of two versions of a text, in order: (old, new, cosine of their letter pairs).

    A pair gains its cosine minus `least`; lines without a partner are left out. Only partners within
    about `band` lines of the diagonal are looked at.
    """
    first = np.pad(letter_pairs(old), ((0, -len(old) % BLOCK), (0, 0)))
    second = np.pad(letter_pairs(new), ((band, band + BLOCK), (0, 0)))  # new line j is row j + band
    cosines = {}
    for start in range(0, len(old), BLOCK):
        middle = (start + BLOCK // 2) * len(new) // len(old)
        block = products(first[start : start + BLOCK], second[middle : middle + 2 * band])
        cosine = np.asarray(block).round(4)  # the last bits differ between processors
        for i, j in np.argwhere(cosine > least).tolist():
            cosines[start + i, middle + j - band] = float(cosine[i, j])
    by_row = sorted(cosines.items(), key=lambda item: (item[0][0], -item[0][1]))
    pairs = align(((i, j, cosine - least) for (i, j), cosine in by_row), len(new))
    return [(old[i], new[j], cosines[i, j]) for i, j in pairs]


def same_ends(old: str, new: str) -> bool:
    """Whether the first words and the last words of two lines begin with the same (bare) letter."""
    one, other = bare(old).split(), bare(new).split()
    return bool(one and other) and all(one[at][0] == other[at][0] for at in (0, -1))


LEAST_COSINE = 0.8  # of the letter pairs of two lines that count as the same line


@functools.cache
def _twin_pairs(split: str) -> tuple[Pair, ...]:
    modern = {play.slug: play for play in plays(split)}
    found = []
    for twin in folio(split):
        aligned = align_lines(folio_lines(twin.text), spoken_lines(modern[twin.slug]))
        for old, new, cosine in aligned:
            if cosine >= LEAST_COSINE and same_ends(old, new):
                found.append(Pair(twin.slug, old, new))
    return tuple(found)


def twin_pairs(split: str = "all") -> list[Pair]:
    """Lines of the First Folio with the same lines in modern spelling, by play and in order.

    Both sides of a held-out play are held out. Lines that the two editions break at different words,
    as in most prose, are dropped (see `align_lines`, `same_ends`). Raises ValueError for an unknown
    split, ModuleNotFoundError if a data package is missing.
    """
    return list(_twin_pairs(split))


class CharVocabulary:
    """Characters as numbers: ids 0 to 3 are padding, begin, end and unknown, then the characters.

    `characters` is a string without repeats; `from_pairs` takes those of both sides of some pairs.
    """

    pad_id, bos_id, eos_id, unknown_id = range(4)

    def __init__(self, characters: str):
        if len(set(characters)) != len(characters):
            raise ValueError(f"a character comes twice in {characters!r}")
        self.characters = characters
        self._ids = {character: i for i, character in enumerate(characters, start=4)}

    @classmethod
    def from_pairs(cls, pairs: Iterable[Pair]) -> "CharVocabulary":
        """The characters of some pairs, sorted."""
        return cls("".join(sorted({c for pair in pairs for c in pair.old + pair.modern})))

    @property
    def vocab_size(self) -> int:
        """Number of ids, the four special ones included."""
        return 4 + len(self.characters)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text; a character that is not in the vocabulary is `unknown_id`."""
        ids = [self._ids.get(character, self.unknown_id) for character in text]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first end; padding and begin are nothing, unknown is "�".

        Raises ValueError for an id that is not in the vocabulary.
        """
        text = []
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is not below vocab_size={self.vocab_size}")
            if i == self.eos_id:
                break
            if i >= 4:
                text.append(self.characters[i - 4])
            elif i == self.unknown_id:
                text.append("�")
        return "".join(text)


@dataclass(frozen=True)
class PairBatches:
    """Batches of pairs: batch number `cursor` is a pure function of cursor and seed.

    A batch is a dict of int32 arrays: "source" (batch, S), the old line and its end; "tokens"
    (batch, T), begin and the modern line; "targets" (batch, T), the modern line and its end, with −1
    where there is nothing to predict. S and T are `max_len` + 1 always. Each epoch visits the pairs in
    a new order. Raises ValueError for a line longer than `max_len` or fewer pairs than one batch.
    """

    pairs: Sequence[Pair]
    codec: CharVocabulary
    batch: int
    max_len: int = 48
    seed: int = 0

    def __post_init__(self):
        longest = max((max(len(p.old), len(p.modern)) for p in self.pairs), default=0)
        if longest > self.max_len:
            raise ValueError(
                f"a line of {longest} characters is longer than max_len={self.max_len}"
            )
        if len(self.pairs) < self.batch:
            raise ValueError(f"{len(self.pairs)} pairs are fewer than a batch of {self.batch}")

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch; the pairs left over, fewer than a batch, wait for another epoch."""
        return len(self.pairs) // self.batch

    def padded(self, pairs: Sequence[Pair]) -> dict[str, Int[np.ndarray, "B S"]]:
        """Some pairs as the arrays of a batch."""
        shape = (len(pairs), self.max_len + 1)
        source, tokens = (np.full(shape, self.codec.pad_id, np.int32) for _ in range(2))
        targets = np.full(shape, -1, np.int32)
        for row, pair in enumerate(pairs):
            old = self.codec.encode(pair.old, eos=True)
            modern = self.codec.encode(pair.modern, bos=True, eos=True)
            source[row, : len(old)] = old
            tokens[row, : len(modern) - 1] = modern[:-1]
            targets[row, : len(modern) - 1] = modern[1:]
        return {"source": source, "tokens": tokens, "targets": targets}

    def __call__(self, cursor: int) -> dict[str, Int[np.ndarray, "B S"]]:
        epoch, number = divmod(cursor, self.per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))
        chosen = order[number * self.batch : (number + 1) * self.batch]
        return self.padded([self.pairs[i] for i in chosen])


def character_ngrams(text: str, n: int) -> Counter[str]:
    """The runs of n characters of a text without its white space, counted."""
    text = "".join(text.split())
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def check_same_length(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Raise ValueError unless there is one reference for each hypothesis, and at least one."""
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")


def chrf(
    hypotheses: Sequence[str], references: Sequence[str], *, order: int = 6, beta: float = 2.0
) -> float:
    """Corpus chrF, 0 to 100: F-score of character n-grams up to `order`, recall counts β² times.

    The counts are summed over the corpus, precision and recall averaged over the orders, as in
    sacrebleu's chrF2. Source: Popović 2015. Raises ValueError if the lengths differ or are 0.
    """
    check_same_length(hypotheses, references)
    precisions, recalls = [], []
    for n in range(1, order + 1):
        in_hypotheses = in_references = matches = 0
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            ours, theirs = character_ngrams(hypothesis, n), character_ngrams(reference, n)
            in_hypotheses += ours.total() if theirs else 0  # too short a reference has no say
            in_references += theirs.total()
            matches += (ours & theirs).total()
        if in_hypotheses and in_references:
            precisions.append(matches / in_hypotheses)
            recalls.append(matches / in_references)
    precision = sum(precisions) / len(precisions) if precisions else 0.0
    recall = sum(recalls) / len(recalls) if recalls else 0.0
    if precision + recall == 0:
        return 0.0
    return 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def bleu_words(line: str) -> list[str]:
    """The words of a line as BLEU counts them: punctuation is cut off, as in the rule called 13a."""
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        line = line.replace(entity, character)
    line = re.sub(r"([!-&(-+:-@/\[-`{-~])", r" \1 ", f" {line} ")
    line = re.sub(r"([^0-9])([.,])", r"\1 \2 ", line)  # a period or comma not after a digit
    line = re.sub(r"([.,])([^0-9])", r" \1 \2", line)  # or not before one
    return re.sub(r"([0-9])(-)", r"\1 \2 ", line).split()


def word_ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """The runs of n words, counted."""
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, 0 to 100: geometric mean of 1- to 4-word precisions, times a penalty for brevity.

    Words by `bleu_words`; an order without a match counts as half a match, the next one as a quarter,
    as sacrebleu does by default. Source: Papineni et al. 2002. Raises ValueError as `chrf` does.
    """
    check_same_length(hypotheses, references)
    ours, theirs = [[bleu_words(line) for line in side] for side in (hypotheses, references)]
    logs, smooth = [], 1
    for n in range(1, 5):
        grams = [(word_ngrams(a, n), word_ngrams(b, n)) for a, b in zip(ours, theirs, strict=True)]
        total = sum(a.total() for a, _ in grams)
        matches = sum(
            (a & b).total() for a, b in grams
        )  # a word counts no oftener than in the reference
        if total == 0 or (n == 1 and matches == 0):
            return 0.0
        if matches == 0:
            smooth *= 2
        logs.append(math.log((matches or 1 / smooth) / total))
    length, wanted = sum(map(len, ours)), sum(map(len, theirs))
    brevity = min(0.0, 1 - wanted / length)
    return 100 * math.exp(brevity + sum(logs) / 4)


def exact_lines(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """The share of lines that are right to the last character. Raises ValueError as `chrf` does."""
    check_same_length(hypotheses, references)
    return sum(map(str.__eq__, hypotheses, references)) / len(references)


def changed_words(
    old: Sequence[str], hypotheses: Sequence[str], references: Sequence[str]
) -> tuple[float, float]:
    """The shares of words that are right: among those that must change, and among those that must not.

    Counted in lines that have as many words in both spellings; a hypothesis with another number of
    words has none of them right. Raises ValueError as `chrf` does, or if a share has no words.
    """
    check_same_length(hypotheses, references)
    right, total = [0, 0], [0, 0]
    for lines in zip(old, hypotheses, references, strict=True):
        before, ours, wanted = map(str.split, lines)
        if len(before) != len(wanted):
            continue
        ours = ours if len(ours) == len(wanted) else [""] * len(wanted)
        for a, b, c in zip(before, ours, wanted, strict=True):
            total[a == c] += 1
            right[a == c] += b == c
    if not all(total):
        raise ValueError(f"{total[0]} words change and {total[1]} stay: no share to give")
    return right[0] / total[0], right[1] / total[1]


class GRU(eqx.Module):
    """A gated recurrent unit: z ⊙ h + (1 − z) ⊙ n, with n a tanh, a gate z to keep and a gate r to forget.

    The recurrent part of n is U h + bn, times r (as in cuDNN; Cho et al. 2014 put r before U). The
    input's part of all three, `inputs`, does not depend on h: it is computed for all positions at once.
    """

    w: Float[Array, "3F I"]
    u: Float[Array, "3F F"]
    b: Float[Array, " 3F"]
    bn: Float[Array, " F"]

    def __init__(self, in_dim: int, dim: int, *, key: Array):
        for_w, for_u = jax.random.split(key)
        self.w = jax.random.normal(for_w, (3 * dim, in_dim)) / math.sqrt(in_dim)
        self.u = jax.random.normal(for_u, (3 * dim, dim)) / math.sqrt(dim)
        self.b = jnp.zeros(3 * dim)
        self.bn = jnp.zeros(dim)

    def inputs(self, x: Float[Array, "*T I"]) -> Float[Array, "*T 3F"]:
        """What the input adds to r, z and n."""
        return x @ self.w.T + self.b.reshape((1,) * (x.ndim - 1) + (-1,))

    def step(self, h: Float[Array, " F"], given: Float[Array, " 3F"]) -> Float[Array, " F"]:
        """The next state, from the last one and `inputs` of this position."""
        (xr, xz, xn), (hr, hz, hn) = jnp.split(given, 3), jnp.split(self.u @ h, 3)
        r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
        return z * h + (1 - z) * jnp.tanh(xn + r * (hn + self.bn))


def run_gru(
    gru: GRU, x: Float[Array, "S I"], real: Bool[Array, " S"], *, reverse: bool = False
) -> Float[Array, "S F"]:
    """The states of a GRU at every position, from a zero state; where `real` is false it stands still."""

    def advance(h: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        given, is_real = at
        h = jnp.where(is_real, gru.step(h, given), h)
        return h, h

    start = jnp.zeros_like(gru.bn)
    return jax.lax.scan(advance, start, (gru.inputs(x), real), reverse=reverse)[1]


class Encoder(eqx.Module):
    """A forward and a backward GRU. Source: Bahdanau et al. 2014, §3.2."""

    forward: GRU
    backward: GRU

    def __init__(self, in_dim: int, dim: int, *, key: Array):
        for_forward, for_backward = jax.random.split(key)
        self.forward = GRU(in_dim, dim, key=for_forward)
        self.backward = GRU(in_dim, dim, key=for_backward)

    def __call__(
        self, x: Float[Array, "S E"], real: Bool[Array, " S"]
    ) -> tuple[Float[Array, "S C"], Float[Array, " C"]]:
        """The annotations, both states side by side, and a summary, the last state of each direction."""
        ahead = run_gru(self.forward, x, real)
        back = run_gru(self.backward, x, real, reverse=True)
        return jnp.concatenate([ahead, back], axis=1), jnp.concatenate([ahead[-1], back[0]])


def attention_weights(
    scores: Float[Array, "*B T S"], mask: Bool[Array, "*B T S"] | None = None
) -> Float[Array, "*B T S"]:
    """Softmax over the last axis, in fp32, of the scores that the mask allows; the others get 0.

    A row that may see nothing is all zeros.
    """
    scores = scores.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(largest), largest, 0.0))
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)


class AdditiveScore(eqx.Module):
    """Bahdanau's alignment model: e_s = vᵀ tanh(W q + U h_s), one hidden layer of `dim` units.

    `keys` is U h, computed once for a source. Source: Bahdanau et al. 2014, §A.1.2.
    """

    w: Float[Array, "A Q"]
    u: Float[Array, "A C"]
    v: Float[Array, " A"]

    def __init__(self, query_dim: int, source_dim: int, dim: int, *, key: Array):
        for_w, for_u, for_v = jax.random.split(key, 3)
        self.w = jax.random.normal(for_w, (dim, query_dim)) / math.sqrt(query_dim)
        self.u = jax.random.normal(for_u, (dim, source_dim)) / math.sqrt(source_dim)
        self.v = jax.random.normal(for_v, (dim,)) / math.sqrt(dim)

    def keys(self, annotations: Float[Array, "S C"]) -> Float[Array, "S A"]:
        """What the source adds, the same for every query."""
        return annotations @ self.u.T

    def __call__(self, query: Float[Array, " Q"], keys: Float[Array, "S A"]) -> Float[Array, " S"]:
        """The score of each source position for one query."""
        return jnp.tanh((self.w @ query)[None] + keys) @ self.v


class DotScore(AdditiveScore):
    """The same two projections with a product in place of the layer: e_s = (W q)·(U h_s)/√A; v is unused."""

    def __call__(self, query: Float[Array, " Q"], keys: Float[Array, "S A"]) -> Float[Array, " S"]:
        """The score of each source position for one query."""
        return keys @ (self.w @ query) / math.sqrt(len(self.v))


SCORES = {"additive": AdditiveScore, "dot": DotScore, "fixed": None}


@dataclass(frozen=True)
class TranslatorConfig:
    """Sizes of a `Translator`; `score` is "additive", "dot", or "fixed" for no attention."""

    vocab_size: int
    embed_dim: int = 24
    encoder_dim: int = 48  # in each direction
    decoder_dim: int = 96
    score_dim: int = 32
    score: str = "additive"

    def __post_init__(self):
        if self.score not in SCORES:
            raise ValueError(f"no score {self.score!r}; there are {', '.join(SCORES)}")


class Memory(NamedTuple):
    """A source as the decoder sees it: annotations, their keys (None if fixed), which are real, a summary."""

    annotations: Float[Array, "S C"]
    keys: Float[Array, "S A"] | None
    real: Bool[Array, " S"]
    summary: Float[Array, " C"]


def look(
    score: AdditiveScore | None, state: Float[Array, " F"], memory: Memory
) -> tuple[Float[Array, " C"], Float[Array, " S"]]:
    """The context vector for a decoder state, and the weights that made it.

    Without a score the context is the summary, whatever the state, and the weights are zeros.
    """
    if score is None:
        return memory.summary, jnp.zeros(len(memory.real))
    weights = attention_weights(score(state, memory.keys)[None], memory.real[None])[0]
    return weights @ memory.annotations, weights


class Translator(eqx.Module):
    """Recurrent encoder and decoder with attention between them, or with one fixed vector.

    One table of character vectors serves both sides and the output; id 0 is padding. Source: Bahdanau
    et al. 2014, §3 and §A, with a plain output layer.
    """

    embedding: Float[Array, "V E"]
    encoder: Encoder
    decoder: GRU
    start: Float[Array, "F C"]
    score: AdditiveScore | None
    out: Float[Array, "E FCE"]
    bias: Float[Array, " V"]

    def __init__(self, config: TranslatorConfig, *, key: Array):
        c, source_dim, kind = config, 2 * config.encoder_dim, SCORES[config.score]
        wide = c.decoder_dim + source_dim + c.embed_dim
        table, encoder, decoder, start, score, out = jax.random.split(key, 6)
        self.embedding = jax.random.normal(table, (c.vocab_size, c.embed_dim))
        self.encoder = Encoder(c.embed_dim, c.encoder_dim, key=encoder)
        self.decoder = GRU(c.embed_dim + source_dim, c.decoder_dim, key=decoder)
        self.start = jax.random.normal(start, (c.decoder_dim, source_dim)) / source_dim**0.5
        self.score = kind and kind(c.decoder_dim, source_dim, c.score_dim, key=score)
        self.out = jax.random.normal(out, (c.embed_dim, wide)) / math.sqrt(wide * c.embed_dim)
        self.bias = jnp.zeros(c.vocab_size)

    def encode(self, source: Int[Array, " S"]) -> tuple[Memory, Float[Array, " F"]]:
        """What the decoder may look at, and its first state."""
        real = source != 0
        annotations, summary = self.encoder(self.embedding[source], real)
        keys = self.score and self.score.keys(annotations)
        return Memory(annotations, keys, real, summary), jnp.tanh(self.start @ summary)

    def advance(self, state: Array, token: Array, memory: Memory) -> tuple[Array, Array, Array]:
        """One step: the next state (F,), what the output layer sees (FCE,), the weights (S,)."""
        context, weights = look(self.score, state, memory)
        x = self.embedding[token]
        state = self.decoder.step(state, self.decoder.inputs(jnp.concatenate([x, context])))
        return state, jnp.concatenate([state, context, x]), weights

    def log_probs(self, seen: Float[Array, "T FCE"]) -> Float[Array, "T V"]:
        """Log-probabilities of the next character."""
        return jax.nn.log_softmax((seen @ self.out.T) @ self.embedding.T + self.bias[None])


def align_and_predict(
    model: Translator, source: Int[Array, " S"], tokens: Int[Array, " T"]
) -> tuple[Float[Array, "T V"], Float[Array, "T S"]]:
    """Log-probabilities after each token of the (shifted) target, and where the decoder looked."""
    memory, state = model.encode(source)

    def step(state: Array, token: Array) -> tuple[Array, tuple[Array, Array]]:
        state, seen, weights = model.advance(state, token, memory)
        return state, (seen, weights)

    _, (seen, weights) = jax.lax.scan(step, state, tokens)
    return model.log_probs(seen), weights


def translation_loss(
    model: Translator, batch: dict[str, Array], key: Array
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The mean loss of a batch of `PairBatches` in nats per character, and the number of characters."""
    log_probs, _ = jax.vmap(align_and_predict, in_axes=(None, 0, 0))(
        model, batch["source"], batch["tokens"]
    )
    targets = batch["targets"]
    chosen = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    count = jnp.sum(targets >= 0)
    total = jnp.sum(jnp.where(targets >= 0, chosen, 0.0))
    return -total / count.astype(total.dtype), count


def length_normalised(log_p: Array, lengths: Array, penalty: float) -> Array:
    """log p / ((5 + n)/6)^penalty over n tokens, the end included. Source: Wu et al. 2016, eq. 14."""
    return log_p / ((5.0 + lengths.astype(log_p.dtype)) / 6.0) ** penalty


def beam_search(
    step: Callable[[Int[Array, " beam"], Any], tuple[Float[Array, "beam V"], Any]],
    state: Any,
    *,
    bos: int,
    eos: int,
    beam: int,
    max_len: int,
    length_penalty: float = 0.0,
) -> tuple[Int[Array, "beam max_len"], Float[Array, " beam"]]:
    """The `beam` best sequences found that end in `eos` within `max_len` tokens, best first.

    `step(tokens, state)` takes the last token of each hypothesis and gives log-probabilities of the
    next and a new state. `state` is that of one hypothesis: every leaf gets a leading axis `beam`.
    Also returns their scores (`length_normalised`); rows are filled with `eos`. `beam=1` is greedy
    decoding. Pure JAX: jit it, or vmap it over sources.
    """
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (beam, *jnp.shape(x))), state)

    def extend(carry: tuple, t: Array) -> tuple[tuple, None]:
        tokens, log_p, lengths, done, state = carry
        step_log_p, state = step(jnp.where(t == 0, bos, tokens[:, t - 1]), state)
        is_end = (jnp.arange(step_log_p.shape[1]) == eos)[None]
        gain = jnp.where(~is_end & (t == max_len - 1), -jnp.inf, step_log_p)  # it must end now
        gain = jnp.where(done[:, None], jnp.where(is_end, 0.0, -jnp.inf), gain)  # it has ended
        log_p, lengths = log_p[:, None] + gain, lengths + (~done).astype(jnp.int32)
        scores = length_normalised(log_p, lengths[:, None], length_penalty)
        best = jax.lax.top_k(scores.ravel(), beam)[1]
        parent, token = jnp.divmod(best, gain.shape[1])
        tokens = tokens[parent].at[:, t].set(token)
        state = jax.tree.map(lambda x: x[parent], state)
        done = done[parent] | (token == eos)
        return (tokens, log_p.ravel()[best], lengths[parent], done, state), None

    first = jnp.where(jnp.arange(beam) == 0, 0.0, -jnp.inf)  # all begin alike: only one counts
    lengths, done = jnp.zeros(beam, jnp.int32), jnp.zeros(beam, bool)
    start = (jnp.full((beam, max_len), eos), first, lengths, done, state)
    (tokens, log_p, lengths, _, _), _ = jax.lax.scan(extend, start, jnp.arange(max_len))
    return tokens, length_normalised(log_p, lengths, length_penalty)


@eqx.filter_jit
def search_translations(
    model: Translator, source: Int[Array, "B S"], bos: int, eos: int, beam: int, penalty: float
) -> tuple[Int[Array, "B beam S"], Float[Array, "B beam"]]:
    """The best sequences and their scores for each source, as long as the source array at most."""

    def one(line: Int[Array, " S"]) -> tuple[Array, Array]:
        memory, state = model.encode(line)

        def step(tokens: Array, states: Array) -> tuple[Array, Array]:
            states, seen, _ = jax.vmap(model.advance, in_axes=(0, 0, None))(states, tokens, memory)
            return model.log_probs(seen), states

        sizes = {"beam": beam, "max_len": len(line), "length_penalty": penalty}
        return beam_search(step, state, bos=bos, eos=eos, **sizes)

    return jax.vmap(one)(source)


def translate(
    model: Translator,
    batches: PairBatches,
    pairs: Sequence[Pair],
    *,
    beam: int = 1,
    length_penalty: float = 0.0,
) -> list[str]:
    """The model's modern line for the old line of each pair, by beam search (1: greedy)."""
    codec = batches.codec
    source = batches.padded(pairs)["source"]
    found, _ = search_translations(model, source, codec.bos_id, codec.eos_id, beam, length_penalty)
    return [codec.decode(tokens) for tokens in np.asarray(found[:, 0])]


def scaled_dot_product_attention(
    q: Float[Array, "*B T Dh"],
    k: Float[Array, "*B S Dh"],
    v: Float[Array, "*B S Dv"],
    mask: Bool[Array, "*B T S"] | None = None,
) -> Float[Array, "*B T Dv"]:
    """softmax(q kᵀ/√Dh) v: each query's average of the values, weighted by how well the keys match.

    `mask` is true where a query may look. Softmax in fp32. Source: Vaswani et al. 2017, eq. 1.
    """
    scores = jnp.einsum("...td,...sd->...ts", q, k) / math.sqrt(q.shape[-1])
    return jnp.einsum("...ts,...sd->...td", attention_weights(scores, mask).astype(v.dtype), v)


def causal_mask(length: int) -> Bool[Array, "T T"]:
    """True where position t may look at position s: s ≤ t."""
    return jnp.tril(jnp.ones((length, length), bool))


def online_attention(
    q: Float[Array, "T Dh"],
    k: Float[Array, "S Dh"],
    v: Float[Array, "S Dv"],
    mask: Bool[Array, "T S"] | None = None,
    *,
    block: int = 16,
) -> Float[Array, "T Dv"]:
    """`scaled_dot_product_attention` that reads the keys once, `block` at a time (online softmax).

    It keeps, for each query, the largest score so far, the sum of exponentials and the weighted sum of
    values, both relative to that score: never T·S scores (a gradient stores the weights again). Raises ValueError if block does not divide S.
    """
    length = k.shape[0]
    if length % block:
        raise ValueError(f"block={block} does not divide the {length} keys")

    def read(carry: tuple, start: Array) -> tuple[tuple, None]:
        largest, total, out = carry
        keys = jax.lax.dynamic_slice_in_dim(k, start, block)
        values = jax.lax.dynamic_slice_in_dim(v, start, block)
        scores = (q @ keys.T).astype(jnp.float32) / math.sqrt(q.shape[-1])
        if mask is not None:
            allowed = jax.lax.dynamic_slice_in_dim(mask, start, block, axis=1)
            scores = jnp.where(allowed, scores, -jnp.inf)
        new_largest = jnp.maximum(largest, scores.max(axis=-1))
        base = jnp.where(jnp.isfinite(new_largest), new_largest, 0.0)
        shrink = jnp.exp(largest - base)  # what was summed so far was relative to the old largest
        weights = jnp.exp(scores - base[:, None])
        total = shrink * total + weights.sum(axis=-1)
        out = shrink[:, None] * out + weights @ values.astype(jnp.float32)
        return (new_largest, total, out), None

    start = jnp.full(q.shape[0], -jnp.inf), jnp.zeros(q.shape[0]), jnp.zeros((len(q), v.shape[1]))
    (_, total, out), _ = jax.lax.scan(read, start, jnp.arange(0, length, block))
    return (out / jnp.maximum(total, 1e-30)[:, None]).astype(v.dtype)


def split_heads(x: Float[Array, "T D"], n_heads: int) -> Float[Array, "H T Dh"]:
    """Cut each vector of width D into H pieces of width Dh = D/H, one per head."""
    return x.reshape(x.shape[0], n_heads, -1).transpose(1, 0, 2)


def merge_heads(x: Float[Array, "H T Dh"]) -> Float[Array, "T D"]:
    """The inverse of `split_heads`: the heads' outputs side by side."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


class MultiHeadAttention(eqx.Module):
    """Attention with H heads of width D/H on projections of its inputs, then one output projection.

    `x` asks; `memory` is looked at (`x` itself if None: self-attention). Batch-free: vmap it. Weights
    are (out, in), no biases. Source: Vaswani et al. 2017, §3.2.2. Raises ValueError unless H divides D.
    """

    wq: Float[Array, "D D"]
    wk: Float[Array, "D D"]
    wv: Float[Array, "D D"]
    wo: Float[Array, "D D"]
    n_heads: int = eqx.field(static=True)

    def __init__(self, dim: int, n_heads: int, *, key: Array):
        if n_heads < 1 or dim % n_heads:
            raise ValueError(f"n_heads={n_heads} does not divide dim={dim}")
        keys = jax.random.split(key, 4)
        self.wq, self.wk, self.wv, self.wo = (
            jax.random.normal(k, (dim, dim)) / math.sqrt(dim) for k in keys
        )
        self.n_heads = n_heads

    def heads(self, x: Float[Array, "T D"], memory: Float[Array, "S D"]) -> tuple[Array, ...]:
        """Queries of x, keys and values of memory: (H, T, Dh), (H, S, Dh), (H, S, Dh)."""
        projected = (x @ self.wq.T, memory @ self.wk.T, memory @ self.wv.T)
        return tuple(split_heads(p, self.n_heads) for p in projected)

    def weights(
        self,
        x: Float[Array, "T D"],
        memory: Float[Array, "S D"] | None = None,
        mask: Bool[Array, "T S"] | None = None,
    ) -> Float[Array, "H T S"]:
        """How much each position of x looks at each of memory, by head; rows sum to 1."""
        q, k, _ = self.heads(x, x if memory is None else memory)
        scores = jnp.einsum("htd,hsd->hts", q, k) / math.sqrt(q.shape[-1])
        return attention_weights(scores, None if mask is None else mask[None])

    def __call__(
        self,
        x: Float[Array, "T D"],
        memory: Float[Array, "S D"] | None = None,
        mask: Bool[Array, "T S"] | None = None,
    ) -> Float[Array, "T D"]:
        """The output for each position of x. `mask` is true where position t may look at s."""
        q, k, v = self.heads(x, x if memory is None else memory)
        out = scaled_dot_product_attention(q, k, v, None if mask is None else mask[None])
        return merge_heads(out) @ self.wo.T
