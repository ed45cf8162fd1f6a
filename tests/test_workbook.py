"""Workbooks: blank ones hide the reference and fail, poured ones are the chapter and pass."""

import ast
import copy
import re
import symtable

import jupytext
import nbformat
import pytest
import tiny_course
import workbook
from course import ROOT, CourseError, cells, scripts
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

every_chapter = pytest.mark.parametrize("script", scripts(ROOT), ids=lambda script: script.stem)


def learners(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells that the learner writes."""
    return [cell for cell in notebook.cells if "workbook" in cell.metadata.get("tags", [])]


def bodies(source: str) -> list[str]:
    """The code of each function in a cell, without signature and docstring, as one string."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            found.append("\n".join(ast.unparse(statement) for statement in body))
    return found


def bound(source: str) -> set[str]:
    """The global names that a cell binds: assigned, defined, imported or looped over."""
    table = symtable.symtable(source, "cell", "exec")
    return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}


def needed(source: str) -> set[str]:
    """The global names that a cell uses and doesn't bind itself, inside its functions too."""
    names, tables = set(), [symtable.symtable(source, "cell", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        top = table.get_type() == "module"
        names |= {
            s.get_name()
            for s in table.get_symbols()
            if s.is_referenced() and (top or s.is_global())
        }
    return names - bound(source)


# every chapter


@every_chapter
def test_blank_hides_the_reference(script):
    """Signatures and docstrings stay, bodies and solutions go, everything else is the chapter's."""
    notebook = workbook.workbook(script)
    kept = [cell for cell in cells(script) if "solution" not in cell.tags]
    assert [c.cell_type for c in notebook.cells] == [c.kind for c in kept]
    assert len(learners(notebook)) >= 1
    for blank, cell in zip(notebook.cells, kept, strict=True):
        if "workbook" not in blank.metadata.get("tags", []):
            assert blank.source == cell.source
            continue
        assert cell.source.startswith(("#| export", "#| workbook"))
        # the same classes, signatures, decorators and docstrings in the same order
        wanted, found = (
            [
                (node.name, ast.get_docstring(node), ast.dump(getattr(node, "args", node)))
                if isinstance(node, ast.FunctionDef)
                else (node.name, ast.get_docstring(node))
                for node in ast.parse(source).body
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
            ]
            for source in (cell.source, blank.source)
        )
        assert found == wanted
        assert all("NotImplementedError" in body for body in bodies(blank.source))
        text = ast.unparse(ast.parse(blank.source))
        assert not [body for body in bodies(cell.source) if body and body in text]
    solutions = [cell.source for cell in cells(script) if "solution" in cell.tags]
    assert solutions
    assert not {c.source for c in notebook.cells} & set(solutions)


@every_chapter
def test_poured_is_the_chapter_without_its_solutions(script):
    """Pouring the reference into the blanks gives the very cells that nbval runs and compares."""
    poured = [cell.source for cell in workbook.workbook(script, pour=True).cells]
    assert poured == [cell.source for cell in cells(script) if "solution" not in cell.tags]
    blank = workbook.workbook(script)
    for cell, source in zip(blank.cells, poured, strict=True):
        if "workbook" in cell.metadata.get("tags", []):
            cell.source = source
    assert [cell.source for cell in blank.cells] == poured


@every_chapter
def test_no_cell_needs_a_solution(script):
    """So that the chapter without its solutions, which is the poured workbook, runs as the chapter does."""
    assert (
        leaks([(c.source, "solution" in c.tags) for c in cells(script) if c.kind == "code"]) == []
    )


def leaks(code: list[tuple[str, bool]]) -> list[str]:
    """The names that a cell takes from a solution before it: found in a kept cell, bound in a solution."""
    tainted, found = set(), []
    for source, solution in code:
        if solution:
            tainted |= bound(source)
        else:
            found += sorted(needed(source) & tainted)
            tainted -= bound(source)
    return found


def test_leaks_are_found():
    kept, solution = False, True
    assert leaks([("x = 1", kept), ("y = x", solution), ("x", kept)]) == []
    assert leaks([("y = 1", solution), ("y", kept)]) == ["y"]
    assert leaks([("import y", solution), ("def f():\n    return y.z", kept)]) == ["y"]
    assert leaks([("x = 1", kept), ("for x in []: pass", solution), ("print(x)", kept)]) == ["x"]
    assert leaks([("def y(): z = 1", solution), ("z", kept), ("y = 2", kept), ("y", kept)]) == []


@every_chapter
def test_every_blank_is_checked(script):
    """What a learner writes is used by a later cell of the workbook: a blank can't pass unnoticed."""
    kept = [c for c in cells(script) if c.kind == "code" and "solution" not in c.tags]
    for i, cell in enumerate(kept):
        if workbook.is_workbook(cell.source):
            used = set().union(*(needed(later.source) for later in kept[i + 1 :]))
            assert bound(cell.source) & used, f"nothing uses {bound(cell.source)} of {cell.where}"


def needs(code: list[nbformat.NotebookNode], at: int) -> list[nbformat.NotebookNode]:
    """Cell `at` and those before it that bind a name it needs, or that one of them needs."""
    names, found = needed(code[at].source), [code[at]]
    for cell in reversed(code[:at]):
        if bound(cell.source) & names:
            names |= needed(cell.source)
            found.insert(0, cell)
    return found


@every_chapter
def test_blank_fails(script):
    """The blank workbook stops at the first check that needs something unwritten, and says what.

    To be quick, that cell is first run with only what it needs; the whole workbook if that passes.
    """
    notebook = workbook.workbook(script)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    blanks = learners(notebook)
    slices = [
        needs(code, at)
        for at, cell in enumerate(code)
        if not cell.source.startswith(("#| export", "#| workbook"))
    ]
    first = next((found for found in slices if any(blank in found for blank in blanks)), None)
    assert first, f"no cell of {script.stem} checks what the learner writes"
    for attempt in (first, notebook.cells):
        try:
            run(attempt, script)
        except CellExecutionError as error:
            if error.ename == "NotImplementedError" and error.evalue.startswith("write "):
                return
            if attempt is not first:
                raise
    pytest.fail(f"the blank workbook of {script.stem} passes")


def run(code: list[nbformat.NotebookNode], script) -> None:
    """Execute cells in a fresh kernel. Raises CellExecutionError at the first error."""
    notebook = nbformat.v4.new_notebook(cells=copy.deepcopy(code))
    where = {"metadata": {"path": str(script.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()


# the tiny course, graded from end to end


@pytest.fixture
def alpha(tmp_path, monkeypatch):
    tiny_course.write(tmp_path)
    return tmp_path / "chapters/00_alpha.py"


def failures(notebook, script) -> dict[str, str]:
    return dict(workbook.grade(notebook, script.parent))


def test_blank_is_failed(alpha):
    blank = workbook.workbook(alpha)
    assert learners(blank)[0].source == (
        "#| export workbook\n"
        "def double(x: float) -> float:\n"
        '    """Twice `x`."""\n'
        '    raise NotImplementedError("write double")'
    )
    assert failures(blank, alpha) == {
        "The check of double": "NotImplementedError: write double",
        "The claim": "NotImplementedError: write double",
    }


def test_reference_poured_back_passes(alpha):
    assert failures(workbook.workbook(alpha, pour=True), alpha) == {
        "The check of double": "",
        "The claim": "",
    }


def test_wrong_answer_fails(alpha):
    notebook = workbook.workbook(alpha)
    learners(notebook)[0].source = "def double(x):\n    return x + 3"
    assert failures(notebook, alpha) == {
        "The check of double": "",
        "The claim": "AssertionError: ",
    }


def test_answer_that_is_not_python_fails(alpha):
    notebook = workbook.workbook(alpha)
    learners(notebook)[0].source = "def double(x)\n    return x + x"
    found = failures(notebook, alpha)
    assert found["Twice"].startswith("SyntaxError")
    assert found["The check of double"].startswith("NameError")


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (
            "#| export workbook\nclass A:\n    total = 0\n\n    def add(self, x):\n        return x\n\n"
            '    def two(self):\n        """Two."""\n        # a hint\n        return 2',
            "#| export workbook\nclass A:\n    total = 0\n\n    def add(self, x):\n"
            '        raise NotImplementedError("write add")\n\n'
            '    def two(self):\n        """Two."""\n        raise NotImplementedError("write two")',
        ),
        (
            "#| export workbook\ndef f(\n    x,\n):\n    @g\n    def h():\n        pass\n    return h",
            '#| export workbook\ndef f(\n    x,\n):\n    raise NotImplementedError("write f")',
        ),
        (
            '#| workbook\ndef f(x):\n    """One.\n\n    Two.\n    """\n',
            '#| workbook\ndef f(x):\n    """One.\n\n    Two.\n    """\n'
            '    raise NotImplementedError("write f")',
        ),
        (
            "#| export workbook\n@g\ndef f(x):\n    return x\n\n\nLIMIT = f(2)",
            "#| export workbook\n@g\ndef f(x):\n"
            '    raise NotImplementedError("write f")\n\n\nLIMIT = f(2)',
        ),
    ],
    ids=["class", "decorated inner function", "docstring only", "decorator"],
)
def test_blank_cell(source, wanted):
    assert workbook.blank(source) == wanted
    ast.parse(wanted)


def test_nothing_to_blank(alpha):
    with pytest.raises(CourseError, match="must define a function or class"):
        workbook.blank("#| export workbook\nFACTOR = 4")
    text = re.sub("^#.*workbook$", "", alpha.read_text(), flags=re.M)
    alpha.write_text(text)
    with pytest.raises(CourseError, match="00_alpha.py has no .* workbook"):
        workbook.workbook(alpha)


def test_command_line(alpha, monkeypatch, capsys):
    """Write, refuse to overwrite, grade: exit 1 with the failing checks named, 0 when they pass."""
    root = alpha.parent.parent
    monkeypatch.setattr(workbook, "ROOT", root)

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["workbook.py", *arguments])
        workbook.main()

    for action in ("write", "grade"):
        name = {"write": "workbook", "grade": "grade"}[action]
        with pytest.raises(CourseError, match=f"name a chapter: make {name} CHAPTER=10"):
            command(action)
        with pytest.raises(CourseError, match="no chapter '99'"):
            command(action, "99")
    with pytest.raises(CourseError, match="make workbook CHAPTER=00"):
        command("grade", "00")
    command("write", "00")
    with pytest.raises(CourseError, match="workbooks/00_alpha.ipynb exists"):
        command("write", "00")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command("grade", "00")
    out = capsys.readouterr().out
    assert stopped.value.code == 1
    assert "FAIL  The check of double\n      NotImplementedError: write double" in out
    path = root / "workbooks/00_alpha.ipynb"
    notebook = nbformat.read(path, as_version=4)
    learners(notebook)[0].source = "def double(x):\n    return x + x"
    nbformat.write(notebook, path)
    with pytest.raises(SystemExit) as stopped:
        command("grade", "00")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == (
        "pass  The check of double\npass  The claim\n2 of 2 checks pass\n"
    )


def test_a_workbook_is_a_notebook_of_the_course(alpha):
    """It opens with the chapter's kernel, and is valid."""
    notebook = workbook.workbook(alpha)
    nbformat.validate(nbformat.from_dict(notebook))
    assert notebook.metadata.kernelspec == jupytext.read(alpha).metadata.kernelspec
