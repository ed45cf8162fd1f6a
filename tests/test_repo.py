"""The repo check on broken copies of a tiny course: every fault is found and named."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check
import export
import flashcards
import nbformat
import pytest
import report
import run
import tiny_course
from course import ROOT, CourseError, scripts, select
from nbval.plugin import comment_markers, find_comment_markers, metadata_tags

from llm_from_scratch import ledger


@pytest.fixture(scope="session")
def intact(tmp_path_factory) -> Path:
    """The tiny course, exported, executed and reported by the tools."""
    root = tmp_path_factory.mktemp("intact")
    tiny_course.write(root)
    export.write(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(root))  # the kernels import this tree's package
        for script in scripts(root):
            run.execute(run.pair(script))
    blocks = [f"<!-- begin {name} -->\n\n<!-- end {name} -->\n" for name in report.blocks(root)]
    (root / "README.md").write_text("\n".join(["# Tiny\n", *blocks]))
    report.write(root)
    return root


@pytest.fixture
def tree(intact, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(intact, tmp_path / "tree")


def edit(path: Path, old: str, new: str) -> None:
    """Replace `old`, which is there once."""
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new))


def edit_cell(path: Path, containing: str, change) -> int:
    """Apply `change` to the notebook's cell whose source contains a text; returns its position."""
    notebook = nbformat.read(path, as_version=4)
    (at,) = [i for i, c in enumerate(notebook.cells) if containing in c.source]
    change(notebook.cells[at])
    nbformat.write(notebook, path)
    return at


def rerun(tree: Path, script: str, old: str, new: str) -> None:
    """Edit a chapter as an author does: the script, then its notebook and everything generated.

    Cells whose source changes must have outputs that do not; nothing is executed.
    """
    path = tree / "chapters" / script
    edit(path, old, new)
    run.pair(path)
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    for count, cell in enumerate(code, start=1):
        cell.execution_count = count
    nbformat.write(notebook, path.with_suffix(".ipynb"))
    export.write(tree)


def the_fault(tree: Path, *words: str) -> str:
    """The only fault of the tree, which must contain every one of `words`."""
    found = check.faults(tree)
    assert len(found) == 1, found
    for word in words:
        assert word in found[0], f"{word!r} is not named in: {found[0]}"
    return found[0]


def test_intact_tree(tree):
    assert check.faults(tree) == []


# pairing and outputs


def test_unpaired_script(tree):
    (tree / "chapters/01_beta.ipynb").unlink()
    the_fault(tree, "chapters/01_beta is not paired", "01_beta.ipynb is missing")


def test_unpaired_notebook(tree):
    shutil.copy(tree / "chapters/01_beta.ipynb", tree / "chapters/02_gamma.ipynb")
    the_fault(tree, "chapters/02_gamma is not paired", "02_gamma.py is missing")


def test_wrongly_named_chapter(tree):
    shutil.copy(tree / "chapters/01_beta.ipynb", tree / "chapters/scratch.ipynb")
    the_fault(tree, "chapters/scratch", "NN_name")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("adder.add(2) == 6", "adder.add(2) == 2 * 3"),
        ("## Adding", "## Adding up"),
        ('tags=["nbval-ignore-output"]', ""),
        ("# %% [markdown]\n# ### The check of Adder\n\n", ""),
    ],
    ids=["code", "prose", "tag", "cell"],
)
def test_stale_input(tree, old, new):
    edit(tree / "chapters/01_beta.py", old, new)
    the_fault(tree, "chapters/01_beta.ipynb has a stale input", "cell ", "make run CHAPTER=01")


def test_stale_input_names_the_cell(tree):
    at = edit_cell(
        tree / "chapters/00_alpha.ipynb", "double 7:", lambda c: c.update(source=c.source + " # x")
    )
    the_fault(tree, "chapters/00_alpha.ipynb", f"cell {at} is not the script's")


def test_tag_only_in_the_notebook(tree):
    def ignore(cell):
        cell.metadata["tags"] = ["nbval-ignore-output"]

    at = edit_cell(tree / "chapters/00_alpha.ipynb", "double 7:", ignore)
    the_fault(tree, "chapters/00_alpha.ipynb has a stale input", f"cell {at} ")


@pytest.mark.parametrize("count", [None, 1, 9])
def test_wrong_execution_count(tree, count):
    at = edit_cell(
        tree / "chapters/00_alpha.ipynb", "double 7:", lambda c: c.update(execution_count=count)
    )
    the_fault(tree, "chapters/00_alpha.ipynb", f"cell {at}:", f"execution count {count}, not 3")


def test_stripped_notebook(tree):
    path = tree / "chapters/01_beta.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(execution_count=None, outputs=[])
    nbformat.write(notebook, path)
    the_fault(tree, "chapters/01_beta.ipynb, cell 1", "not run top to bottom")


def test_damaged_notebook(tree):
    edit(tree / "chapters/01_beta.ipynb", '"nbformat": 4', '<<<<<<< HEAD\n"nbformat": 4')
    the_fault(tree, "chapters/01_beta.ipynb is not a notebook")


def test_error_output(tree):
    output = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
    at = edit_cell(
        tree / "chapters/00_alpha.ipynb", "double 7:", lambda c: c.outputs.append(output)
    )
    the_fault(tree, f"chapters/00_alpha.ipynb, cell {at}", "error output (ValueError)")


def test_stderr_output(tree):
    output = nbformat.v4.new_output("stream", name="stderr", text="UserWarning: odd")
    at = edit_cell(
        tree / "chapters/00_alpha.ipynb", "double 7:", lambda c: c.outputs.append(output)
    )
    the_fault(tree, f"chapters/00_alpha.ipynb, cell {at}", "stderr", "UserWarning: odd")


SPELLINGS = {
    spelling
    for word in [*comment_markers, *metadata_tags]
    for spelling in (word, word.lower(), word.replace("_", "-"), word.replace("-", "_"))
}


@pytest.mark.parametrize("tag", sorted(SPELLINGS - {check.UNCOMPARED}))
def test_skipping_tag(tree, tag):
    rerun(tree, "01_beta.py", '["nbval-ignore-output"]', f'["{tag}"]')
    the_fault(tree, "chapters/01_beta.ipynb, cell 6", f"skipped by {tag}")


@pytest.mark.parametrize("form", ["# {}", "#{}", "    ## {}  "])
@pytest.mark.parametrize("marker", sorted(comment_markers))
def test_skipping_comment(tree, marker, form):
    comment = form.format(marker)
    assert list(find_comment_markers(comment))  # nbval does take it for a marker
    rerun(tree, "01_beta.py", "    total = 0\n", f"    total = 0\n{comment}\n")
    the_fault(tree, "chapters/01_beta.ipynb, cell 3", f"skipped by {marker}")


def test_uncompared_claim(tree):
    rerun(tree, "01_beta.py", "print(", "if False:\n    ledger.claim()\nprint(")
    the_fault(tree, "chapters/01_beta.ipynb, cell 6", "claim or result", "not compared")


def test_too_many_uncompared(tree):
    cell = '# %% tags=["nbval-ignore-output"]\nprint("an address'
    extra = '# %% tags=["nbval-ignore-output"]\nlen("")\n\n' * check.MOST_UNCOMPARED
    rerun(tree, "01_beta.py", cell, extra + cell)
    the_fault(tree, "chapters/01_beta.ipynb", f"{check.MOST_UNCOMPARED + 1} cells not compared")


def test_no_solution(tree):
    rerun(tree, "01_beta.py", ' tags=["solution"] jupyter={"source_hidden": true}', "")
    the_fault(tree, "chapters/01_beta.ipynb", "no cell is tagged solution")


def test_long_cell(tree):
    rerun(tree, "01_beta.py", "adder.total\n", "# a line\n" * 45 + "adder.total\n")
    the_fault(tree, "chapters/01_beta.ipynb, cell 5", "49 lines", "at most 45")


def test_large_notebook(tree):
    picture = nbformat.v4.new_output("display_data", data={"image/png": "A" * 1_000_000})
    edit_cell(tree / "chapters/01_beta.ipynb", "adder.total", lambda c: c.outputs.append(picture))
    the_fault(tree, "chapters/01_beta.ipynb", "at most 1,000,000")


# export


def test_edited_module(tree):
    edit(tree / "llm_from_scratch/alpha.py", "2 * x", "x * 2")
    the_fault(tree, "llm_from_scratch/alpha.py is not what its chapter exports")


def test_edited_public_face(tree):
    edit(tree / "llm_from_scratch/__init__.py", '    "quadruple": "alpha",\n', "")
    the_fault(tree, "llm_from_scratch/__init__.py is not what its chapter exports")


def test_missing_module(tree):
    (tree / "llm_from_scratch/beta.py").unlink()
    the_fault(tree, "llm_from_scratch/beta.py is missing")


def test_orphaned_module(tree):
    (tree / "llm_from_scratch/gamma.py").write_text("")
    the_fault(tree, "llm_from_scratch/gamma.py has no chapter")


def test_duplicate_export(tree):
    copy = '#| export\nFACTOR = 4\n\ndef double(x):\n    """Again."""\n    return x + x\n\n'
    edit(tree / "chapters/00_alpha.py", "#| export\nFACTOR = 4\n", copy)
    run.pair(tree / "chapters/00_alpha.py")
    found = check.faults(tree)
    assert (
        "chapters/00_alpha.py, cell 9: double is exported already by chapters/00_alpha.py, cell 3"
        in found
    )


def test_duplicate_public_name(tree):
    edit(tree / "chapters/01_beta.py", "class Adder:", "class quadruple:")
    with pytest.raises(CourseError, match=r"01_beta.py, cell 3: quadruple is public already in a"):
        export.package(tree)
    assert any("quadruple is public already in alpha" in fault for fault in check.faults(tree))


def test_unknown_export_word(tree):
    edit(tree / "chapters/01_beta.py", "export public workbook", "export pubic workbook")
    with pytest.raises(CourseError, match=r"01_beta.py, cell 3: .*pubic"):
        export.package(tree)


def test_imports_and_code_in_one_cell(tree):
    edit(tree / "chapters/00_alpha.py", "FACTOR = 4", "import math\nFACTOR = 4")
    with pytest.raises(CourseError, match="00_alpha.py, cell 9: .*either imports or code"):
        export.package(tree)


def test_cell_that_is_not_python(tree):
    edit(tree / "chapters/01_beta.py", "adder.total\n", "adder total\n")
    assert any("01_beta.py, cell 5: not Python" in fault for fault in check.faults(tree))


def test_chapter_without_summary(tree):
    edit(tree / "chapters/00_alpha.py", "# > Numbers, doubled.\n", "")
    with pytest.raises(CourseError, match="00_alpha.py, cell 0: .*the summary"):
        export.package(tree)


def test_exported_module(tree):
    """Docstring, imports hoisted, merged and sorted, then the code in order, without markers."""
    assert (
        (tree / "llm_from_scratch/alpha.py").read_text()
        == '''\
"""Numbers, doubled.

Written from chapters/00_alpha.py by `make export`: edit there.
"""

from collections import Counter
from math import floor, sqrt


def double(x: float) -> float:
    """Twice `x`."""
    # the learner must not see this comment
    return 2 * x


def quadruple(x: float) -> float:
    """Four times `x`, by doubling."""
    return double(double(x))


FACTOR = 4


class Root:
    """The whole part of a square root."""

    def __init__(self, x: float):
        self.x = x

    def floor(self) -> int:
        return floor(sqrt(self.x))


def counted(text: str) -> Counter:
    """How often each letter occurs."""
    return Counter(text)
'''
    )
    beta = (tree / "llm_from_scratch/beta.py").read_text()
    assert beta.startswith('"""Sums of doubled numbers, in two lines.\n\nWritten from chapters/01')


def test_export_ledger(tree):
    """Chapter 00's second module; no other chapter may add to it."""
    cell = '# %%\n#| export ledger\ndef note():\n    """A note."""\n\n'
    edit(tree / "chapters/00_alpha.py", "# %%\n#| export\nFACTOR", cell + "# %%\n#| export\nFACTOR")
    assert export.write(tree) == ["ledger.py"]
    module = (tree / "llm_from_scratch/ledger.py").read_text()
    assert '"""A note."""' in module and "Written from chapters/00_alpha.py" in module
    edit(tree / "chapters/01_beta.py", "# %%\nadder =", cell + "# %%\nadder =")
    with pytest.raises(CourseError, match="module ledger belongs to chapters/00_alpha.py"):
        export.package(tree)


def test_export_again_changes_nothing(tree):
    assert export.differences(tree) == []
    assert export.write(tree) == []
    edit(tree / "llm_from_scratch/alpha.py", "2 * x", "x * 2")
    assert export.write(tree) == ["alpha.py"]
    assert export.differences(tree) == []


@pytest.mark.parametrize(
    "line", ["double = quadruple", "def double(x): ...", "class double: ...", "x, (double, *y) = z"]
)
def test_redefined_export(tree, line):
    rerun(tree, "00_alpha.py", "assert quadruple(7)", f"{line}\nassert quadruple(7)")
    the_fault(tree, "chapters/00_alpha.py, cell 11: redefines double")


# reading order


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import llm_from_scratch.beta", "beta"),
        ("import llm_from_scratch.beta as b", "beta"),
        ("from llm_from_scratch.beta import Adder", "beta"),
        ("from llm_from_scratch import beta", "beta"),
        ("from llm_from_scratch import Adder", "Adder"),
        ("from llm_from_scratch.alpha import double", "alpha"),
        ("def f():\n    from llm_from_scratch.beta import Adder", "beta"),
    ],
)
def test_import_from_a_later_chapter(tree, line, name):
    rerun(tree, "00_alpha.py", "assert double(3) == 6", f"{line}\nassert double(3) == 6")
    the_fault(tree, f"chapters/00_alpha.py, cell 5: imports {name} of ", "not an earlier one")


def test_import_from_an_earlier_chapter(tree):
    rerun(tree, "01_beta.py", "adder = ", "from llm_from_scratch import alpha, quadruple\nadder = ")
    assert check.faults(tree) == []


# ledger, results, costs


@pytest.mark.parametrize("name", ["LEDGER.md", "README.md", "results/results.json"])
def test_stale_report(tree, name):
    edit(tree / name, {"L": "28 and 28", "R": "28 ones", "r": ": 28,"}[name[0]], "29")
    the_fault(tree, f"{name} is stale: run `make ledger`")


@pytest.mark.parametrize("name", ["LEDGER.md", "results/results.json"])
def test_missing_report(tree, name):
    (tree / name).unlink()
    the_fault(tree, f"{name} is stale")


def test_readme_keeps_what_is_not_generated(tree):
    """Only what is between a pair of markers is written, also the first time, when nothing is there."""
    path = tree / "README.md"
    stored = path.read_text()
    bare = re.sub(r"(<!-- begin .*\n)(?:.*\n)*?(<!-- end)", r"\1\2", stored)
    for text in (bare, stored):
        path.write_text("# Before\n" + text.replace("# Tiny", "between") + "after\n")
        report.write(tree)
        assert path.read_text() == "# Before\n" + stored.replace("# Tiny", "between") + "after\n"
    assert check.faults(tree) == []


def test_readme_without_markers(tree):
    edit(tree / "README.md", "<!-- begin chapters -->\n", "")
    the_fault(tree, "README.md needs the lines `<!-- begin chapters -->`")


def claim_instead(tree: Path, old: str, new: str) -> None:
    """Change the claim of chapter 00, as executed, and bring the reports up to date."""
    for path in (tree / "chapters").glob("00_alpha.*"):
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    report.write(tree)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("| reproduced |", "| confirmed |", "the verdict 'confirmed'"),
        ("alpha.quadruple", "alpha.quintuple", "alpha.quintuple, which is not in the package"),
        ("alpha.quadruple", "alpha.Root.ceiling", "alpha.Root.ceiling, which is not in the"),
        ("alpha.quadruple", "alpha.sqrt", "alpha.sqrt, which is not in the package"),
        ("alpha.quadruple", "delta.quadruple", "delta.quadruple, which is not in the package"),
        ("::test_quadruple", "::test_quintuple", "test_alpha.py::test_quintuple, which is not"),
        ("tests/test_alpha.py", "tests/test_delta.py", "tests/test_delta.py::test_quadruple,"),
    ],
)
def test_claim_about_nothing(tree, old, new, named):
    claim_instead(tree, old, new)
    the_fault(tree, "chapters/00_alpha.ipynb: claim L023", named)


@pytest.mark.parametrize("function", ["alpha.Root", "alpha.Root.floor", "alpha.FACTOR"])
def test_claim_about_something(tree, function):
    claim_instead(tree, "alpha.quadruple", function)
    assert check.faults(tree) == []


def test_claim_with_unknown_id(tree):
    claim_instead(tree, "L023", "L999")
    the_fault(tree, "chapters/00_alpha.ipynb: claim L999 is no id of tools/claims.tsv")


def add_claim(tree: Path, line: str, marker: str) -> None:
    """A claim cell in chapter 01, as executed."""
    old = "adder = Adder()\n"
    rerun(tree, "01_beta.py", old, f"{marker}\n{old}")
    output = nbformat.v4.new_output("stream", name="stdout", text=line)
    edit_cell(
        tree / "chapters/01_beta.ipynb", "adder = Adder()", lambda c: c.outputs.insert(0, output)
    )


def test_claim_claimed_twice(tree):
    add_claim(tree, tiny_course.CLAIM, "#| claim L023")
    found = check.faults(tree)
    assert "01_beta.ipynb: L023 is claimed in 00_alpha too" in found


@pytest.mark.parametrize("marker", ["# no marker", "#| claim L024", "#| claim"])
def test_claim_without_its_marker(tree, marker):
    line = tiny_course.CLAIM.replace("L023", "L025")
    add_claim(tree, line, marker)
    assert "01_beta.ipynb: the cell of L025 must begin `#| claim L025`" in check.faults(tree)


@pytest.mark.parametrize("marker", ["#| claim L024", "#| claim"])
def test_claim_that_prints_nothing(tree, marker):
    add_claim(tree, "L024 is true\n", marker)
    (fault,) = check.faults(tree)
    assert fault.startswith("01_beta.ipynb: ") and "no verdict printed" in fault
    assert marker.removeprefix("#| claim").strip() in fault


def test_the_ledgers_own_line(tree, capsys):
    """What llm_from_scratch.ledger.claim prints is what the report takes apart."""
    common = {"function": "alpha.double", "test": "tests/test_alpha.py::test_quadruple"}
    ledger.claim(
        "L024",
        section="3.2",
        claim="doubling helps",
        predicted=ledger.at_least(0.1, "bits"),
        measured=ledger.interval([0.5, 0.6, 0.7], "bits"),
        verdict="reproduced",
        **common,
    )
    add_claim(tree, capsys.readouterr().out, "#| claim L024")
    assert report.claims(tree)["L024"] == common | {
        "section": "§3.2",
        "verdict": "reproduced",
        "claim": "doubling helps",
        "predicted": "> 0.1 bits",
        "measured": "0.600 [0.352, 0.848] bits, n=3",
        "chapter": "01_beta",
    }
    report.write(tree)
    assert check.faults(tree) == []
    row = (
        "| L024 | doubling helps | **reproduced** | > 0.1 bits | 0.600 [0.352, 0.848] bits, n=3 | "
        "[01_beta](chapters/01_beta.ipynb) `alpha.double` | `tests/test_alpha.py::test_quadruple` |"
    )
    assert row in (tree / "LEDGER.md").read_text().splitlines()
    assert "2 of 144 claims of the paper tested: 2 reproduced." in (tree / "README.md").read_text()


def test_the_ledgers_own_result(tree, capsys):
    ledger.result("bits per byte", 2.5, "bits/byte")
    ledger.result("parameters", 8_030_261_248, "parameters", "without the head")
    add_claim(tree, capsys.readouterr().out, "# two results")
    found = report.results(tree)
    assert {name: (row["value"], row["shown"]) for name, row in found.items()} == {
        "quadruple": (28, "28"),
        "root": (3.1, "3.100"),
        "bits per byte": (2.5, "2.500"),
        "parameters": (8_030_261_248, "8,030,261,248"),
    }
    rest = {"unit": "parameters", "note": "without the head", "chapter": "01_beta"}
    assert rest.items() <= found["parameters"].items()
    assert found["root"]["note"] == "" and found["quadruple"]["chapter"] == "00_alpha"
    report.write(tree)
    readme = (tree / "README.md").read_text()
    assert "bits per byte: 2.500 bits/byte; parameters: 8,030,261,248 parameters" in readme


def test_result_printed_twice(tree):
    add_claim(tree, "result | root | 3.200 | ones\n", "# a result again")
    assert "01_beta.ipynb: the result 'root' is printed in 00_alpha already" in check.faults(tree)


def test_ledger_has_every_technique_once(tree):
    """240 rows, each id in one table; those without a claim are listed as not yet tested."""
    rows = re.findall(r"^\| ([LS]\d{3}) \| .*$", (tree / "LEDGER.md").read_text(), re.M)
    assert sorted(rows) == sorted(entry["id"] for entry in report.inventory())
    assert len(rows) == 240
    assert (tree / "LEDGER.md").read_text().count("*not yet tested*") == 239


@pytest.mark.parametrize(
    ("cost", "named"),
    [
        ({"seconds": 60.1, "gigabytes": 0.1}, "60.1 s"),
        ({"seconds": 121, "gigabytes": 0.1, "gflops": 150}, "limit 120 s"),
        ({"seconds": 1.0, "gigabytes": 2.1}, "2.1 GB"),
        (None, "lacks 01_beta"),
    ],
)
def test_costs(tree, cost, named):
    path = tree / "results/chapters.json"
    costs = json.loads(path.read_text()) | {"01_beta": cost}
    path.write_text(json.dumps({name: of for name, of in costs.items() if of}))
    report.write(tree)
    the_fault(tree, "01_beta", named)


# the command lines, nbval


def nbval(tree: Path, notebooks: str) -> subprocess.CompletedProcess:
    command = ["-m", "pytest", "-q", "--tb=short", "--nbval", "--nbval-current-env", notebooks]
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )


def test_nbval_passes_the_intact_tree_and_finds_one_changed_number(tree):
    done = nbval(tree, "chapters")
    assert done.returncode == 0, done.stdout
    assert "14 passed" in done.stdout
    edit(tree / "chapters/00_alpha.ipynb", "double 7: 14", "double 7: 15")
    done = nbval(tree, "chapters/00_alpha.ipynb")
    assert done.returncode == 1
    failed = re.findall(r"^FAILED (.*)$", done.stdout, re.M)
    assert len(failed) == 1 and failed[0].startswith("chapters/00_alpha.ipynb::Cell 2")
    assert "double 7: 14" in done.stdout and "double 7: 15" in done.stdout


def test_command_lines(tree):
    """check.py fails when there is a fault, and only then."""
    command = [sys.executable, str(ROOT / "tools/check.py"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "check: no faults\n")
    edit(tree / "llm_from_scratch/alpha.py", "2 * x", "x * 2")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "llm_from_scratch/alpha.py is not what its chapter exports" in done.stderr
    assert done.stderr.endswith("faults: 1\n")


@pytest.fixture
def make_test():
    """tools/test.py, whose name is also a standard module's."""
    spec = importlib.util.spec_from_file_location("make_test", ROOT / "tools/test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("code", [1, -9], ids=["fails", "is killed"])
@pytest.mark.parametrize("bad", ["check", "ruff check", "ruff format", "tests", "notebooks"])
def test_make_test_fails_if_one_step(make_test, monkeypatch, bad, code):
    """Every step is run, and one that fails, or is killed by a signal, fails the whole."""
    titles = []

    def step(title, *command):
        titles.append(title)
        return (code if title == bad else 0), ""

    monkeypatch.setattr(make_test, "step", step)
    assert make_test.main(None) == 1
    assert titles == ["check", "ruff check", "ruff format", "tests", "notebooks"]
    bad = None
    assert make_test.main(None) == 0


def test_make_test_of_one_chapter(make_test, monkeypatch):
    commands = {}

    def step(title, *command):
        commands[title] = command
        return 0, ""

    monkeypatch.setattr(make_test, "step", step)
    chapter = scripts(ROOT)[-1].stem
    assert make_test.main(chapter[:2]) == 0
    assert commands["notebooks"][-1] == f"chapters/{chapter}.ipynb"
    assert [c for c in commands["tests"] if c.startswith("tests")] == [
        f"tests/test_{chapter[3:]}.py"
    ]
    assert make_test.main("00") == 0
    assert commands["tests"][-2:] == ("tests/test_datasets.py", "tests/test_ledger.py")
    with pytest.raises(CourseError, match="no chapter '99'"):
        make_test.main("99")


@pytest.mark.parametrize("bad", [None, "AVX2", "SSE4_2"])
def test_drift_runs_the_notebooks_as_older_processors_would(make_test, monkeypatch, bad):
    """For each instruction set the notebooks, and nothing else; one that differs fails the whole."""
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    seen = []

    def step(title, *command):
        flags = os.environ["XLA_FLAGS"]
        seen.append((title, flags))
        return int(bad is not None and flags.endswith(bad)), ""

    monkeypatch.setattr(make_test, "step", step)
    assert make_test.main("00", drift=True) == int(bad is not None)
    flag = "--mine --xla_cpu_max_isa="
    assert seen == [("notebooks", flag + "AVX2"), ("notebooks", flag + "SSE4_2")]


@pytest.mark.parametrize(
    ("printed", "runs", "wanted"),
    [
        (["fine"], [0], 0),
        (["a number changed"], [1], 1),
        (["Error reading persistent compilation cache entry", "fine"], [1, 0], 0),
        (["Error reading persistent compilation cache entry", "a number changed"], [1, 1], 1),
    ],
    ids=["passes", "fails", "damaged cache", "damaged cache, then fails"],
)
def test_a_damaged_compile_cache_is_emptied(
    make_test, monkeypatch, tmp_path, printed, runs, wanted
):
    """Only then are the notebooks run a second time."""
    cache = tmp_path / "jax"
    cache.mkdir()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    left = list(zip(runs, printed, strict=True))
    monkeypatch.setattr(make_test, "step", lambda *_: left.pop(0))
    assert make_test.notebooks(["chapters/00_alpha.ipynb"]) == wanted
    assert left == []
    assert cache.exists() == (len(runs) == 1)


def test_select(tree):
    assert [p.stem for p in select(tree, None)] == ["00_alpha", "01_beta"]
    assert [p.stem for p in select(tree, "01")] == ["01_beta"]
    assert [p.stem for p in select(tree, "01_beta")] == ["01_beta"]
    with pytest.raises(CourseError, match="no chapter '99'; there are: 00_alpha, 01_beta"):
        select(tree, "99")


def test_every_chapter_has_five_flashcards():
    chapters = [chapter for _, _, chapter in flashcards.cards()]
    assert {chapters.count(chapter) for chapter in chapters} == {5}
    assert len(set(chapters)) == len(list((ROOT / "chapters").glob("*.py")))


def test_flashcards(tree):
    pairs = "".join(f"# **Q:** What is {n}?\n# **A:** The number\n# {n}.\n" for n in range(5))
    one = "# **Q:** What is twice two? **A:** Four, one after the other.\n"
    for name in ("00_alpha.py", "01_beta.py"):
        path = tree / "chapters" / name
        text = path.read_text()
        if one in text:
            path.write_text(text.replace(one, pairs + "#\n# ## Next\n# None.\n"))
        else:
            path.write_text(text + f"\n# %% [markdown]\n# ## Remember\n#\n{pairs}")
    cards = flashcards.cards(tree)
    assert len(cards) == 10
    assert cards[4] == ("What is 4?", "The number 4.", "00_alpha")
    edit(tree / "chapters/01_beta.py", "# **Q:** What is 4?\n", "")
    with pytest.raises(CourseError, match="01_beta.py: 4 question"):
        flashcards.cards(tree)
