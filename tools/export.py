"""Write the package from the chapters: the cells that begin with `#| export`, one module per chapter.

`python tools/export.py` writes, `python tools/export.py --check` compares and names what differs.
"""

import argparse
import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

from course import ROOT, Cell, CourseError, cells, scripts
from ruff.__main__ import find_ruff_bin

WORDS = {"public", "workbook", "ledger"}


def summary(chapter: list[Cell]) -> str:
    """The chapter's one-sentence summary: the `> ` lines of its first cell."""
    quoted = [line[2:] for line in chapter[0].source.splitlines() if line.startswith("> ")]
    if not quoted:
        raise CourseError(f"{chapter[0].where}: the first cell needs a `> ` line, the summary")
    return " ".join(quoted)


def defined(tree: ast.Module) -> list[str]:
    """The names that a piece of code binds at its top level, imports not counted."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [n for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            names += [n.id for n in found if isinstance(n.ctx, ast.Store)]
    return names


@cache
def ruff(*arguments: str, source: str) -> str:
    """What ruff makes of `source`, with the repository's settings."""
    command = [find_ruff_bin(), *arguments, "--stdin-filename", "module.py", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise CourseError(f"ruff {arguments[0]} failed: {done.stderr}")
    return done.stdout


def module_source(chapter: str, doc: str, parts: list[Cell]) -> str:
    """The module: docstring, imports hoisted and merged, then the cells in order."""
    imports, bodies, owner = [], [], {}
    for cell in parts:
        tree = cell.tree
        kinds = {isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body}
        if kinds == {True}:
            imports += [ast.unparse(node) for node in tree.body]
            continue
        if True in kinds:
            raise CourseError(f"{cell.where}: an exported cell has either imports or code")
        for name in defined(tree):
            if name in owner:
                raise CourseError(f"{cell.where}: {name} is exported already by {owner[name]}")
            owner[name] = cell.where
        bodies.append(cell.body)
    head = f'"""{doc}\n\nWritten from chapters/{chapter}.py by `make export`: edit there.\n"""\n\n'
    merged = head + "\n".join(dict.fromkeys(imports)) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"
    return ruff("format", source=ruff("check", "--select=I", "--fix", "--quiet", source=merged))


def public_face(public: dict[str, str]) -> str:
    """The package's `__init__.py`: the public names, each imported when it is first asked for."""
    table = "".join(f'    "{name}": "{public[name]}",\n' for name in sorted(public))
    return f'''"""Llama 3 from scratch in JAX: the finished code of the course's chapters.

Written from the cells that say `#| export public` by `make export`.
"""

from importlib import import_module

_PUBLIC = {{
{table}}}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    """Import a public name from its module when it is first asked for."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")
    return getattr(import_module(f"{{__name__}}.{{_PUBLIC[name]}}"), name)


def __dir__() -> list[str]:
    return __all__
'''


def collect(root: Path = ROOT) -> tuple[dict[str, tuple[str, str, list[Cell]]], dict[str, str]]:
    """The modules by name (chapter, docstring, cells), and the public names with their modules."""
    modules: dict[str, tuple[str, str, list[Cell]]] = {}
    public: dict[str, str] = {}
    for script in scripts(root):
        chapter = cells(script)
        for cell in chapter:
            words = cell.words("export")
            if cell.kind != "code" or words is None:
                continue
            if unknown := set(words) - WORDS:
                raise CourseError(f"{cell.where}: `#| export` does not know {sorted(unknown)}")
            name = "ledger" if "ledger" in words else script.stem[3:]
            doc = (
                "Claims, predictions, measurements and verdicts: the replication ledger."
                if name == "ledger"
                else summary(chapter)
            )
            owner, _, parts = modules.setdefault(name, (script.stem, doc, []))
            if owner != script.stem:
                raise CourseError(f"{cell.where}: module {name} belongs to chapters/{owner}.py")
            parts.append(cell)
            if "public" in words:
                for found in defined(cell.tree):
                    if found in public:
                        raise CourseError(
                            f"{cell.where}: {found} is public already in {public[found]}"
                        )
                    if not found.startswith("_"):
                        public[found] = name
    return modules, public


def package(root: Path = ROOT) -> dict[str, str]:
    """Every file of the package by name, as the chapters say it should be."""
    modules, public = collect(root)
    files = {f"{name}.py": module_source(*of) for name, of in modules.items()}
    return files | {"__init__.py": public_face(public)}


def differences(root: Path = ROOT) -> list[str]:
    """What of the package is not what the chapters say."""
    wanted, folder = package(root), root / "llm_from_scratch"
    faults = []
    for name, source in wanted.items():
        path = folder / name
        if not path.exists():
            faults.append(f"llm_from_scratch/{name} is missing: run `make export`")
        elif path.read_text() != source:
            faults.append(
                f"llm_from_scratch/{name} is not what its chapter exports: edit the chapter, "
                "then `make export`"
            )
    faults += [
        f"llm_from_scratch/{path.name} has no chapter: delete it or write the chapter"
        for path in sorted(folder.glob("*.py"))
        if path.name not in wanted
    ]
    return faults


def write(root: Path = ROOT) -> list[str]:
    """Write the package; returns the names of the files that changed."""
    folder, changed = root / "llm_from_scratch", []
    folder.mkdir(exist_ok=True)
    for name, source in package(root).items():
        path = folder / name
        if not path.exists() or path.read_text() != source:
            path.write_text(source)
            changed.append(name)
    return changed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only, fail on a difference")
    try:
        if parser.parse_args().check:
            if faults := differences():
                sys.exit("\n".join(faults))
        else:
            print("exported:", ", ".join(write()) or "nothing changed")
    except CourseError as error:
        sys.exit(str(error))
