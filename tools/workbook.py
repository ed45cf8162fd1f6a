"""Workbooks: a chapter with the functions to learn blanked out, and the grader that runs its checks.

`python tools/workbook.py write 10` writes workbooks/10_llama.ipynb; `python tools/workbook.py grade 10` runs it and
says which checks pass.
"""

import argparse
import ast
import sys
from pathlib import Path

import jupytext
import nbformat
from course import MARKER, ROOT, CourseError, select
from nbclient import NotebookClient

BLANK = 'raise NotImplementedError("write {name}")'


def is_workbook(source: str) -> bool:
    """Whether the learner writes this cell: `#| export workbook`, or `#| workbook` if not exported."""
    found = MARKER.match(source.partition("\n")[0])
    return bool(found) and found[1] != "claim" and "workbook" in [found[1], *found[2].split()]


def blank(source: str) -> str:
    """The cell with each function's body replaced: signature and docstring stay, the rest is the learner's."""
    lines = source.splitlines()
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    nested = {id(inner) for f in functions for inner in ast.walk(f) if inner is not f}
    outer = [f for f in functions if id(f) not in nested]
    if not outer:
        raise CourseError(f"a workbook cell must define a function or class:\n{source[:80]}")
    for function in sorted(outer, key=lambda f: -f.lineno):
        if ast.get_docstring(function):
            start = function.body[0].end_lineno
        else:
            first = function.body[0]
            start = min(n.lineno for n in [first, *getattr(first, "decorator_list", [])]) - 1
        indent = " " * function.body[0].col_offset
        lines[start : function.end_lineno] = [indent + BLANK.format(name=function.name)]
    return "\n".join(lines)


def workbook(script: Path, pour: bool = False) -> nbformat.NotebookNode:
    """The chapter as a workbook: to write in, or with the reference solution poured back into the blanks.

    Exercises' solutions are left out; the checks, which are the other cells, are kept.
    """
    notebook = jupytext.read(script)
    kept = []
    for cell in notebook.cells:
        if "solution" in cell.metadata.get("tags", []):
            continue
        if cell.cell_type == "code" and is_workbook(cell.source):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "workbook"]
            if not pour:
                cell.source = blank(cell.source)
        kept.append(cell)
    notebook.cells = kept
    if not any("workbook" in c.metadata.get("tags", []) for c in kept):
        raise CourseError(f"{script.name} has no `#| export workbook` cell")
    return notebook


def grade(notebook: nbformat.NotebookNode, folder: Path) -> list[tuple[str, str]]:
    """Run a workbook; for each cell that checks or defines something, its heading and "" or the error."""
    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    rows, heading = [], ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            titles = [
                line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")
            ]
            heading = titles[-1] if titles else heading
        else:
            errors = [o for o in cell.outputs if o.output_type == "error"]
            if errors or "assert" in cell.source:
                rows.append((heading, f"{errors[0].ename}: {errors[0].evalue}" if errors else ""))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["write", "grade"])
    parser.add_argument("chapter", nargs="?", help="07 or 07_tokenizer")
    arguments = parser.parse_args()
    if not arguments.chapter:
        command = {"write": "workbook", "grade": "grade"}[arguments.action]
        raise CourseError(f"name a chapter: make {command} CHAPTER=10")
    (script,) = select(ROOT, arguments.chapter)
    path = ROOT / "workbooks" / f"{script.stem}.ipynb"
    if arguments.action == "write":
        if path.exists():
            raise CourseError(
                f"{path.relative_to(ROOT)} exists; move it away first, nothing was lost"
            )
        path.parent.mkdir(exist_ok=True)
        nbformat.write(workbook(script), path)
        print(
            f"wrote {path.relative_to(ROOT)}: fill in the blanks, then make grade CHAPTER={script.stem[:2]}"
        )
        return
    if not path.exists():
        raise CourseError(
            f"there is no {path.relative_to(ROOT)}: make workbook CHAPTER={script.stem[:2]}"
        )
    rows = grade(nbformat.read(path, as_version=4), script.parent)
    for heading, error in rows:
        print(
            f"{'FAIL' if error else 'pass'}  {heading}"
            + (f"\n      {error[:200]}" if error else "")
        )
    failed = sum(bool(error) for _, error in rows)
    print(f"{len(rows) - failed} of {len(rows)} checks pass")
    sys.exit(failed > 0)


if __name__ == "__main__":
    try:
        main()
    except CourseError as error:
        sys.exit(str(error))
