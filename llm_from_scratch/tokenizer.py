"""Text to integers and back: byte-level BPE trained in pure Python, encoded by tiktoken, in the file format of Llama 3.

Written from chapters/07_tokenizer.py by `make export`: edit there.
"""

import base64
import binascii
import functools
import heapq
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Self

import numpy as np
import regex
import tiktoken
from jaxtyping import Int

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
)
COURSE_SPECIAL = LLAMA3_SPECIAL[:16]


LONGEST_RUN = 25_000
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{LONGEST_RUN + 1},}}|(?<!\S)\S{{{LONGEST_RUN + 1},}}")


def cut_runs(text: str) -> Iterator[str]:
    """Cut `text` so that no part has more than 25,000 characters of white space, or others, in a row.

    The cuts are where Meta's tokenizer.py makes them; a text without such runs comes back whole.
    """
    start = 0
    for run in _LONG_RUN.finditer(text):
        for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def split(text: str, pattern: str = LLAMA3_PATTERN) -> list[str]:
    """The pieces of a text inside which merges happen; joined, they are the text again.

    So it is for LLAMA3_PATTERN. Characters that another `pattern` does not match are left out.
    """
    compiled = regex.compile(pattern)
    return [match.group() for part in cut_runs(text) for match in compiled.finditer(part)]


def merge(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """`word` with every occurrence of `pair`, from left to right, replaced by the one id `new`."""
    merged, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and word[i] == pair[0] and word[i + 1] == pair[1]:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def neighbours(word: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The pairs of adjacent ids of a word."""
    return zip(word, word[1:], strict=False)


def encode_piece(piece: bytes, ranks: Mapping[bytes, int], below: int | None = None) -> list[int]:
    """The ids of one piece: join the neighbours of lowest rank, leftmost first, until none is known.

    A piece that is itself a token is that token, as in tiktoken. `below`: use only ranks below it.
    """
    limit = math.inf if below is None else below
    if ranks.get(piece, limit) < limit:
        return [ranks[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        joined = [ranks.get(a + b, limit) for a, b in neighbours(parts)]
        lowest = min(joined)
        if lowest >= limit:
            break
        i = joined.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[part] for part in parts]


def learn_merges(
    words: Sequence[list[int]],
    counts: Sequence[int],
    tokens: Sequence[bytes],
    vocab_size: int,
    forbidden: Collection[tuple[int, int]] = frozenset(),
) -> list[bytes]:
    """`tokens`, grown to `vocab_size` by joining the most frequent pair of neighbours each time.

    Word i, ids of `tokens`, occurs counts[i] times. Of equals the pair with the lowest ids is joined;
    pairs in `forbidden` never are. Stops early if no pair is left.
    """
    words, tokens = list(words), list(tokens)
    ids = {token: id for id, token in enumerate(tokens)}
    totals, change, where, heap = Counter(), Counter(), defaultdict(set), []
    for i, word in enumerate(words):
        for pair in neighbours(word):
            change[pair] += counts[i]
            where[pair].add(i)
    while len(tokens) < vocab_size:
        for pair, difference in change.items():
            totals[pair] += difference
            if difference and totals[pair] and pair not in forbidden:
                heapq.heappush(heap, (-totals[pair], pair))
        while heap and -heap[0][0] != totals[heap[0][1]]:
            heapq.heappop(heap)  # out of date: the pair's count has changed since
        if not heap:
            break
        best, change = heapq.heappop(heap)[1], Counter()
        new = ids.setdefault(tokens[best[0]] + tokens[best[1]], len(tokens))
        for i in where.pop(best):
            old, words[i] = words[i], merge(words[i], best, new)
            for pair in neighbours(old):
                change[pair] -= counts[i]
            for pair in neighbours(words[i]):
                change[pair] += counts[i]
                where[pair].add(i)
        tokens = list(ids)  # one longer, unless the joined bytes were a token already
    return tokens


def count_pieces(texts: Iterable[str], pattern: str = LLAMA3_PATTERN) -> Counter[bytes]:
    """How often each piece occurs in the texts: all that a BPE trainer needs to know of them."""
    if isinstance(texts, str | bytes):
        raise TypeError("texts must be several strings, such as [text], not one string")
    pieces = Counter()
    for text in texts:
        pieces.update(split(text, pattern))
    return Counter({piece.encode(): n for piece, n in pieces.items()})


def check_ranks(ranks: Mapping[bytes, int]) -> None:
    """Raise ValueError unless the ranks are all different and each of the 256 bytes has one."""
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise ValueError(
            f"{len(missing)} of the 256 single bytes have no token, the first is "
            f"0x{missing[0]:02x}: a text with it could not be encoded"
        )
    owner = {}
    for token, rank in ranks.items():
        if owner.setdefault(rank, token) != token:
            raise ValueError(f"tokens {owner[rank]!r} and {token!r} have the same rank {rank}")


def starting_tokens(base: Mapping[bytes, int] | None, vocab_size: int) -> dict[bytes, int]:
    """The ranks that training goes on from: those of `base`, or the 256 bytes.

    Raises ValueError if `vocab_size` has no room for them, or their ranks are not 0, 1, 2, …
    """
    ranks = {bytes([b]): b for b in range(256)} if base is None else dict(base)
    check_ranks(ranks)
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the {len(ranks)} base ranks must be 0 … {len(ranks) - 1}")
    if vocab_size < len(ranks):
        raise ValueError(f"vocab_size {vocab_size} is less than the {len(ranks)} starting tokens")
    return ranks


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    pattern: str = LLAMA3_PATTERN,
    *,
    base: Mapping[bytes, int] | None = None,
    protect: Iterable[str] = (),
) -> dict[bytes, int]:
    """Train byte-level BPE: token → rank, the 256 bytes first (rank = byte), then the merges.

    `vocab_size` counts the ordinary tokens, bytes and merges; special tokens come on top of it.
    Each merge joins the most frequent pair of neighbours; of equals, the pair with the lowest ids.
    `base`: go on from these ranks. `protect`: make no merge that changes the ids of these texts.
    Fewer tokens come back if no pair is left. Raises TypeError if `texts` is one string, ValueError
    if `base` is no full table or too large. Sennrich et al. 2016, Algorithm 1, on bytes.
    """
    ranks = starting_tokens(base, vocab_size)
    guarded = (encode_piece(piece, ranks) for piece in count_pieces(protect, pattern))
    forbidden = {pair for word in guarded for pair in neighbours(word)}
    pieces = count_pieces(texts, pattern)
    words = [encode_piece(piece, ranks) for piece in pieces]
    tokens = sorted(ranks, key=ranks.__getitem__)
    tokens = learn_merges(words, list(pieces.values()), tokens, vocab_size, forbidden)
    return {token: rank for rank, token in enumerate(tokens)}


def encode_plain(text: str, ranks: Mapping[bytes, int], pattern: str = LLAMA3_PATTERN) -> list[int]:
    """The ids of a text without special tokens, in plain Python: the reference for `Tokenizer`."""
    known = functools.cache(lambda piece: encode_piece(piece.encode(), ranks))
    return [id for piece in split(text, pattern) for id in known(piece)]


SpecialTokens = Sequence[str] | Mapping[str, int]


def special_ids(special_tokens: SpecialTokens, ranks: Mapping[bytes, int]) -> dict[str, int]:
    """Names of special tokens with their ids: as given, or counted on from the number of ranks.

    Raises ValueError if a name is empty or twice, if an id is taken, or if the ids have a gap.
    """
    if isinstance(special_tokens, str):
        raise TypeError("special_tokens must be several names, not one string")
    for name, n in Counter(list(special_tokens)).items():
        if n > 1 or not name:
            raise ValueError(f"special tokens must be different and not empty: {name!r}, {n} times")
    if not isinstance(special_tokens, Mapping):
        special_tokens = {name: len(ranks) + i for i, name in enumerate(special_tokens)}
    owner: dict[int, bytes | str] = {rank: token for token, rank in ranks.items()}
    for name, id in special_tokens.items():
        if id in owner:
            raise ValueError(f"special token {name!r} has the id {id}, as {owner[id]!r} has")
        owner[id] = name
    if gaps := set(range(len(owner))) - owner.keys():
        raise ValueError(f"{len(owner)} tokens need the ids 0 … {len(owner) - 1}: no {min(gaps)}")
    return dict(special_tokens)


def split_special(
    text: str, special: Mapping[str, int], allowed: Collection[str] | Literal["all"]
) -> list[str]:
    """Cut a text at the special tokens that are allowed: text, name, text, name, …, text.

    Where one name begins another, the longer one is taken. Raises ValueError for an unknown name.
    """
    if isinstance(allowed, str) and allowed != "all":
        raise TypeError(f"allowed_special must be 'all' or several names, not {allowed!r}")
    names = special.keys() if allowed == "all" else set(allowed)
    if unknown := names - special.keys():
        raise ValueError(f"no special token {min(unknown)!r}; there are {', '.join(special)[:200]}")
    if not names:
        return [text]
    longest_first = sorted(names, key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, longest_first))})", text)


def checked_text(text: str) -> str:
    """`text`, if it has a UTF-8 form. Raises TypeError for bytes, ValueError for a lone surrogate."""
    if not isinstance(text, str):
        raise TypeError(f"a tokenizer encodes str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, which has "
            "no UTF-8 form: the text was decoded wrongly before it came here"
        ) from error
    return text


def checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """`ids` as a list of int. Raises ValueError that names the first one not in 0 … vocab_size − 1."""
    array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
    if array.size == 0:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"ids must be one row of integers, got shape {array.shape}, {array.dtype}")
    if (bad := (array < 0) | (array >= vocab_size)).any():
        at = int(bad.argmax())
        raise ValueError(f"id {array[at]} at position {at} is not in 0 … {vocab_size - 1}")
    return array.tolist()


class Vocabulary:
    """The table of a tokenizer: what bytes each id stands for, and which ids are special.

    `ranks`: ordinary token → id. `special_tokens`: names, which get the next ids, or name → id.
    `bos`, `eos`, `stop`: the special tokens that begin a text, end it, and end a generation; they
    become `bos_id` and `eos_id`, None if there is no such token, and `stop_ids`. Other attributes:
    `ranks`, `special` (name → id), `vocab_size` (both together). Raises ValueError if a single byte
    has no token, or if names or ids clash or leave a gap.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        special_tokens: SpecialTokens = COURSE_SPECIAL,
        *,
        bos: str = "<|begin_of_text|>",
        eos: str = "<|end_of_text|>",
        stop: Collection[str] = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ):
        check_ranks(ranks)
        self.ranks, self.special = dict(ranks), special_ids(special_tokens, ranks)
        self.vocab_size = len(self.ranks) + len(self.special)
        self.bos_id, self.eos_id = self.special.get(bos), self.special.get(eos)
        self.stop_ids = tuple(self.special[name] for name in stop if name in self.special)
        self._bytes = {id: token for token, id in self.ranks.items()}
        self._bytes |= {id: name.encode() for name, id in self.special.items()}

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes that `ids` stand for. Raises ValueError for an id out of range."""
        return b"".join([self._bytes[id] for id in checked_ids(ids, self.vocab_size)])

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are not valid UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, path: str | Path) -> None:
        """Write the ranks as a `tokenizer.model`; special tokens have no place in that format."""
        write_ranks(path, self.ranks)


class Tokenizer(Vocabulary):
    """Text to ids and back by tiktoken, with ranks of our own or Meta's.

    `names` (bos, eos, stop), attributes and errors as for `Vocabulary`. Characters that a `pattern`
    of your own does not match are left out of the ids; LLAMA3_PATTERN matches all.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        special_tokens: SpecialTokens = COURSE_SPECIAL,
        pattern: str = LLAMA3_PATTERN,
        **names: str | Collection[str],
    ):
        super().__init__(ranks, special_tokens, **names)
        self.pattern = pattern
        self._core = tiktoken.Encoding(
            "course", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens={}
        )

    def encode(
        self,
        text: str,
        *,
        bos: bool = False,
        eos: bool = False,
        allowed_special: Collection[str] | Literal["all"] = (),
    ) -> list[int]:
        """The ids of a text; `bos`, `eos`: with the id that begins, or ends, every text.

        The name of a special token is plain text unless it is in `allowed_special` (names or "all").
        Raises TypeError for bytes or a single name, ValueError for a lone surrogate, an unknown
        name, or a bos or eos that this tokenizer does not have.
        """
        if (bos and self.bos_id is None) or (eos and self.eos_id is None):
            raise ValueError(f"no {'bos' if bos and self.bos_id is None else 'eos'} token")
        ids = [self.bos_id] if bos else []
        parts = split_special(checked_text(text), self.special, allowed_special)
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.special[part])
            else:
                for run in cut_runs(part):
                    ids += self._core.encode_ordinary(run)
        return ids + [self.eos_id] if eos else ids

    def encode_batch(self, texts: Iterable[str], **options) -> list[list[int]]:
        """`encode` for each text, on several threads; `options` as for `encode`.

        Raises TypeError for a single string.
        """
        if isinstance(texts, str | bytes):
            raise TypeError("texts must be several strings, such as [text], not one string")
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda text: self.encode(text, **options), texts))

    @classmethod
    def load(cls, path: str | Path, special_tokens: SpecialTokens, **options) -> Self:
        """Read a `tokenizer.model`; `options` as for the class. Raises as `read_ranks` does.

        The file does not name its special tokens: say LLAMA3_SPECIAL for Meta's, COURSE_SPECIAL here.
        """
        return cls(read_ranks(path), special_tokens, **options)


def read_row(line: bytes) -> tuple[bytes, int]:
    """One line of a `tokenizer.model`: base64 of the token's bytes, a space, its rank."""
    encoded, space, rank = line.partition(b" ")
    if not space:
        raise ValueError(f"{line[:40]!r} is not 'base64 rank'")
    try:
        token = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"bad base64 {encoded[:40]!r}: {error}") from error
    if not token or base64.b64encode(token) != encoded:
        raise ValueError(f"bad base64 {encoded[:40]!r}: not what any token is written as")
    if not rank.isdigit():
        raise ValueError(f"the rank is {rank[:40]!r}, not a number")
    return token, int(rank)


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Read a `tokenizer.model` of Meta's release: one line per token, in the order of the ranks.

    Raises ValueError that names the file, the line and what is wrong with it.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            token, rank = read_row(line)
            if token in ranks:
                raise ValueError(f"token {token!r} is there already, with rank {ranks[token]}")
            if rank != len(ranks):
                raise ValueError(f"rank {rank} where {len(ranks)} should follow")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        ranks[token] = rank
    try:
        check_ranks(ranks)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return ranks


def write_ranks(path: str | Path, ranks: Mapping[bytes, int]) -> None:
    """Write ranks 0, 1, 2, … as a `tokenizer.model`; the file appears whole or not at all.

    Raises ValueError if the ranks have a gap.
    """
    tokens = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError(f"a tokenizer.model holds the ranks 0 … {len(tokens) - 1} without a gap")
    rows = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    partial = Path(f"{path}.{os.getpid()}")
    partial.write_bytes(b"".join(rows))
    partial.replace(path)


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that were joined, in order: what ranks leave implicit and other libraries ask for.

    Raises ValueError for a token that is no join of two tokens of lower rank.
    """
    by_rank = {rank: token for token, rank in ranks.items()}
    found = []
    for rank, token in sorted(by_rank.items()):
        if len(token) > 1:
            ids = encode_piece(token, ranks, below=rank)
            if len(ids) != 2:
                raise ValueError(f"token {token!r}, rank {rank}, is no join of two earlier tokens")
            found.append((by_rank[ids[0]], by_rank[ids[1]]))
    return found


def count_windows(n: int, length: int, stride: int) -> int:
    """How many windows of `length` inputs, each with a next-token target, fit in `n` tokens."""
    if length < 1 or stride < 1:
        raise ValueError(f"length and stride must be at least 1, got {length} and {stride}")
    return max(0, (n - 1 - length) // stride + 1)


def sliding_windows(
    ids: Sequence[int], length: int, stride: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Inputs and targets, both (B, T = length): window b starts at token b · stride.

    Targets are the inputs one step later. What does not fill a window at the end is left out.
    Raschka 2024, §2.6.
    """
    ids = np.asarray(ids, dtype=np.int32)
    starts = stride * np.arange(count_windows(len(ids), length, stride))
    at = starts[:, None] + np.arange(length)
    return ids[at], ids[at + 1]
