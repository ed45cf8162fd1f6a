"""The rules that nbval does not know: `python tools/check.py` names every fault in the tree and where it is."""

import argparse
import ast
import json
import re
import sys
from pathlib import Path

import export
import nbformat
import report
from course import ROOT, CourseError, cells, read_notebook, scripts
from nbval.plugin import comment_markers, metadata_tags

LONGEST_CELL = 45
LONGEST_CLASS = 65  # a class can't be cut into cells
MOST_UNCOMPARED = 3
LARGEST_NOTEBOOK = 1_000_000
PACE = 300  # GFLOP/s of the machine for which a chapter's minute is meant
# every word by which nbval, as a tag or as a comment, skips a cell or does not compare its output
NBVAL_WORDS = {tag.lower().replace("_", "-") for tag in [*metadata_tags, *comment_markers]} | {
    "skip"
}
UNCOMPARED = "nbval-ignore-output"  # the one form of it that a chapter may use, as a tag


def pairing(root: Path) -> list[str]:
    """A chapter is a script and a notebook with the same cells."""
    faults = []
    folder = root / "chapters"
    stems = {p.stem for p in folder.glob("*.py")} | {p.stem for p in folder.glob("*.ipynb")}
    for stem in sorted(stems):
        script, notebook = folder / f"{stem}.py", folder / f"{stem}.ipynb"
        if not re.fullmatch(r"\d\d_[a-z0-9_]+", stem):
            faults.append(f"chapters/{stem}: a chapter is called NN_name")
        elif not script.exists() or not notebook.exists():
            missing = script.name if notebook.exists() else notebook.name
            faults.append(f"chapters/{stem} is not paired: {missing} is missing, run `make run`")
        else:
            wanted = [(c.kind, c.source.strip(), c.tags) for c in cells(script)]
            stored = read_notebook(notebook).cells
            found = [
                (c.cell_type, c.source.strip(), tuple(c.metadata.get("tags", ()))) for c in stored
            ]
            if wanted != found:
                at = next(
                    (i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b),
                    min(len(wanted), len(found)),
                )
                faults.append(
                    f"chapters/{stem}.ipynb has a stale input: cell {at} is not the script's; "
                    f"run `make run CHAPTER={stem[:2]}`"
                )
    return faults


def nbval_words(cell: nbformat.NotebookNode) -> set[str]:
    """The words for nbval that a cell holds, as they are spelled there: tags, and comments of one word."""
    comments = [line.strip("# \t") for line in cell.source.splitlines() if "#" in line]
    found = {*cell.metadata.get("tags", []), *comments}
    return {word for word in found if word.lower().replace("_", "-") in NBVAL_WORDS}


def outputs(root: Path) -> list[str]:
    """A notebook was run top to bottom without an error, and nothing of it escapes the comparison."""
    faults = []
    for notebook in sorted((root / "chapters").glob("*.ipynb")):
        where = f"chapters/{notebook.name}"
        code = [
            (i, c)
            for i, c in enumerate(read_notebook(notebook).cells)
            if c.cell_type == "code" and c.source.strip()
        ]
        for expected, (i, cell) in enumerate(code, start=1):
            if cell.execution_count != expected:
                faults.append(
                    f"{where}, cell {i}: execution count {cell.execution_count}, not {expected}: "
                    "the notebook was not run top to bottom"
                )
                break
        uncompared = 0
        for i, cell in code:
            for output in cell.outputs:
                if output.output_type == "error":
                    faults.append(f"{where}, cell {i}: an error output ({output.ename})")
                if output.output_type == "stream" and output.name == "stderr":
                    faults.append(
                        f"{where}, cell {i}: stderr output, which varies: {output.text[:60]!r}"
                    )
            for word in sorted(nbval_words(cell) - {UNCOMPARED}):
                faults.append(f"{where}, cell {i}: skipped by {word}; every cell is compared")
            if UNCOMPARED in cell.metadata.get("tags", []):
                uncompared += 1
                if re.search(r"ledger\.(claim|result)\(", cell.source):
                    faults.append(
                        f"{where}, cell {i}: a claim or result whose output is not compared"
                    )
            lines, one_class = len(cell.source.splitlines()), "\nclass " in cell.source
            if lines > (most := LONGEST_CLASS if one_class else LONGEST_CELL):
                faults.append(f"{where}, cell {i}: {lines} lines; a cell has at most {most}")
        if uncompared > MOST_UNCOMPARED:
            faults.append(f"{where}: {uncompared} cells not compared; at most {MOST_UNCOMPARED}")
        if (size := notebook.stat().st_size) > LARGEST_NOTEBOOK:
            faults.append(f"{where}: {size:,} bytes; at most {LARGEST_NOTEBOOK:,}")
        if not any("solution" in c.metadata.get("tags", []) for _, c in code):
            faults.append(f"{where}: no cell is tagged solution")
    return faults


def reading_order(root: Path) -> list[str]:
    """A chapter imports only from modules of lower-numbered chapters, also through the public face."""
    number = {script.stem[3:]: script.stem for script in scripts(root)} | {"ledger": "00_"}
    public = export.collect(root)[1]
    number |= {name: number[module] for name, module in public.items()}
    faults = []
    for script in scripts(root):
        for cell in cells(script):
            for node in ast.walk(cell.tree) if cell.kind == "code" else []:
                if isinstance(node, ast.ImportFrom):
                    names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                else:
                    continue
                used = {n.split(".")[1] for n in names if n and n.startswith("llm_from_scratch.")}
                for name in sorted(used & number.keys()):
                    if number[name] >= script.stem:
                        faults.append(
                            f"{cell.where}: imports {name} of {number[name]}, not an earlier one"
                        )
    return faults


def redefinitions(root: Path) -> list[str]:
    """No cell defines anew what the chapter exports: the checks after it would not be of the module's code."""
    faults = []
    for script in scripts(root):
        exported: set[str] = set()
        for cell in cells(script):
            names = export.defined(cell.tree) if cell.kind == "code" else []
            if cell.words("export") is not None:
                exported |= set(names)
                continue
            faults += [
                f"{cell.where}: redefines {name}, which the chapter exports"
                for name in names
                if name in exported
            ]
    return faults


def ledger(root: Path) -> list[str]:
    """The claims point at things that exist, and the generated files say what the notebooks say."""
    return report.unknown_targets(report.claims(root), root) + report.stale(root)


def costs(root: Path) -> list[str]:
    """Every chapter was measured, and within its budget of 60 seconds and 2 GB.

    The seconds are those of two cores whose matrix products reach PACE; on a slower machine, or a busy
    one, a chapter may take longer in proportion.
    """
    path = root / "results" / "chapters.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    faults = []
    for script in scripts(root):
        of = measured.get(script.stem)
        if of is None:
            faults.append(f"results/chapters.json lacks {script.stem}: run `make run`")
            continue
        limit = round(60 * max(1.0, PACE / of.get("gflops", PACE)))
        if of["seconds"] > limit or of["gigabytes"] > 2:
            faults.append(
                f"{script.stem} took {of['seconds']} s and {of['gigabytes']} GB: "
                f"limit {limit} s, 2 GB"
            )
    return faults


RULES = [pairing, outputs, reading_order, redefinitions, export.differences, ledger, costs]


def faults(root: Path = ROOT) -> list[str]:
    """Every fault in the tree at `root`."""
    found = []
    for rule in RULES:
        try:
            found += rule(root)
        except (CourseError, OSError) as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=ROOT)
    if found := faults(parser.parse_args().root):
        sys.exit("\n".join(found) + f"\nfaults: {len(found)}")
    print("check: no faults")
