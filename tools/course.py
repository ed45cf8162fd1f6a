"""What every tool needs to know: where the chapters are, and what the first line of a cell says."""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"^#\| *(export|workbook|claim)\b *(.*)$")


class CourseError(Exception):
    """Something in the tree breaks a rule of the course; the message names the file and the rule."""


@dataclass(frozen=True)
class Cell:
    """One cell of a chapter's script."""

    chapter: str  # "10_llama"
    index: int  # position among all cells of the chapter, from 0
    kind: str  # "code" or "markdown"
    source: str
    tags: tuple[str, ...]

    @property
    def body(self) -> str:
        """The source without its marker line."""
        first, _, rest = self.source.partition("\n")
        return rest.strip("\n") if MARKER.match(first) else self.source.strip("\n")

    def words(self, marker: str) -> list[str] | None:
        """The words after `#| marker` on the first line, or None if the cell has no such marker."""
        found = MARKER.match(self.source.partition("\n")[0])
        return found[2].split() if found and found[1] == marker else None

    @property
    def tree(self) -> ast.Module:
        """The parsed source. Raises CourseError naming the cell if it is not Python."""
        try:
            return ast.parse(self.source)
        except SyntaxError as error:
            raise CourseError(f"{self.where}: not Python: {error}") from None

    @property
    def where(self) -> str:
        return f"chapters/{self.chapter}.py, cell {self.index}"


def scripts(root: Path = ROOT) -> list[Path]:
    """The chapters' scripts in reading order."""
    return sorted((root / "chapters").glob("[0-9][0-9]_*.py"))


def select(root: Path, chapter: str | None) -> list[Path]:
    """The scripts that `CHAPTER=07` (or a whole name) asks for; all of them for None or "".

    Raises CourseError naming the chapters that exist if there is no such one.
    """
    found = [p for p in scripts(root) if not chapter or chapter in (p.stem, p.stem[:2])]
    if not found:
        names = ", ".join(p.stem for p in scripts(root))
        raise CourseError(f"there is no chapter {chapter!r}; there are: {names}")
    return found


def cells(script: Path) -> list[Cell]:
    """The cells of a percent script."""
    return list(_parsed(script.stem, script.read_text()))


@cache
def _parsed(chapter: str, text: str) -> tuple[Cell, ...]:
    notebook = jupytext.reads(text, "py:percent")
    return tuple(
        Cell(chapter, i, c.cell_type, c.source, tuple(c.metadata.get("tags", ())))
        for i, c in enumerate(notebook.cells)
    )


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """An executed notebook. Raises CourseError naming the file if it is damaged, say by a merge."""
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:
        raise CourseError(f"chapters/{path.name} is not a notebook: {error}") from None
