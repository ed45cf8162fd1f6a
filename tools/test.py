"""`make test`: the repo check, ruff, the unit tests, then every chapter re-run and compared, strictly.

`python tools/test.py 07` does one chapter: the check, its module's tests, its notebook. With `--drift` only the notebooks
run, twice, on machine code for two older kinds of processor: their sums round differently, as those of another
machine do, and every printed number has to survive it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from course import ROOT, CourseError, select

PYTEST = [sys.executable, "-m", "pytest", "-q", "--tb=short"]
TWO_AT_ONCE = ["-n", "2", "--dist", "loadfile"]  # most of a test's time is one thread, compiling
DRIFT = ("AVX2", "SSE4_2")  # instruction sets that XLA is held to


def step(title: str, *command: str) -> tuple[int, str]:
    """Run one step from the repository's root, shown as it goes; its exit code and what it printed."""
    print(f"== {title}", flush=True)
    start, lines = time.monotonic(), []
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipe) as process:
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    word = "FAILED" if process.returncode else "ok"
    print(f"== {title}: {word}, {time.monotonic() - start:.0f} s", flush=True)
    return process.returncode, "".join(lines)


def notebooks(paths: list[str]) -> int:
    """Re-run the notebooks and compare every stored output.

    A damaged entry of the compile cache warns on stderr, which nbval sees as a changed output: in that case, and in
    no other, the cache is emptied and the notebooks are run once more.
    """
    command = [*PYTEST, "--nbval", "--nbval-current-env", "--nbval-cell-timeout=1800", *paths]
    code, text = step("notebooks", *command)
    cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))
    if code and "persistent compilation cache" in text and cache.is_absolute():
        print("== the compile cache is damaged: once more with an empty one", flush=True)
        shutil.rmtree(cache, ignore_errors=True)
        code, _ = step("notebooks", *command)
    return code


def main(chapter: str | None, drift: bool = False) -> int:
    scripts = select(ROOT, chapter)
    paths = [f"chapters/{script.stem}.ipynb" for script in scripts]
    if drift:
        codes, flags = [], os.environ.get("XLA_FLAGS", "")
        for name in DRIFT:
            print(f"== code for {name}", flush=True)
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_max_isa={name}"
            codes.append(notebooks(paths))
        return int(any(codes))
    tests = [*TWO_AT_ONCE, "tests"]
    if chapter:
        modules = [s.stem[3:] for s in scripts]
        modules += ["ledger"] * ("datasets" in modules)  # chapter 00 exports both
        tests = [f"tests/test_{module}.py" for module in modules]
        tests = [t for t in tests if (ROOT / t).exists()]
    python = sys.executable
    steps = {
        "check": [python, "tools/check.py"],
        "ruff check": [python, "-m", "ruff", "check", "--quiet", "."],
        "ruff format": [python, "-m", "ruff", "format", "--check", "--quiet", "."],
        "tests": [*PYTEST, *tests] if tests else None,
    }
    codes = [step(title, *command)[0] for title, command in steps.items() if command]
    codes.append(notebooks(paths))
    return int(any(codes))  # a step killed by a signal has a negative code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chapter", nargs="?", help="07 or 07_tokenizer; all if left out")
    parser.add_argument("--drift", action="store_true")
    arguments = parser.parse_args()
    try:
        sys.exit(main(arguments.chapter, arguments.drift))
    except CourseError as error:
        sys.exit(str(error))
