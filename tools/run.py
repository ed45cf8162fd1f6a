"""Execute chapters: script → notebook, run top to bottom in a cold process, export, refresh the reports.

`python tools/run.py` runs all chapters, `python tools/run.py 07` one. Seconds, peak memory and
the machine's pace go to results/chapters.json. `--quick` keeps the compile cache and records no cost, for work in progress.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import export
import nbformat
import report
from course import ROOT, CourseError, select
from jupytext.cli import jupytext
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

COSTS = ROOT / "results" / "chapters.json"


def pair(script: Path) -> Path:
    """Bring the notebook's inputs up to the script's; outputs and cell ids of unchanged cells stay."""
    jupytext(["--quiet", "--to", "ipynb", "--update", str(script)])
    return script.with_suffix(".ipynb")


def execute(path: Path) -> None:
    """Run a notebook in place, from a fresh kernel. Raises CellExecutionError on the first error."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    notebook.metadata.pop("language_info", None)  # names the Python patch release: noise in diffs
    nbformat.write(notebook, path)


def pace() -> int:
    """What this machine's matrix products reach at the moment, in GFLOP/s; other work slows it."""
    code = "from llm_from_scratch.pretraining import matmul_peak; print(round(matmul_peak()))"
    return int(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT))


def cost(path: Path, quick: bool) -> dict[str, float]:
    """Execute in a process of its own: cold seconds, peak memory of its largest process, the pace."""
    before = 0 if quick else pace()
    with tempfile.TemporaryDirectory() as cold:
        cache = {} if quick else {"JAX_COMPILATION_CACHE_DIR": cold}
        start = time.monotonic()
        command = [sys.executable, __file__, "--execute", str(path)]
        done = subprocess.run(command, env=os.environ | cache, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise CourseError(f"{path.name} stopped with an error")
    seconds = round(time.monotonic() - start, 1)
    gflops = 0 if quick else max(before, pace())
    return {"seconds": seconds, "gigabytes": float(done.stdout), "gflops": gflops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chapter", nargs="?", help="07 or 07_tokenizer; all if left out")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--execute", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.execute:
        try:
            execute(arguments.execute)
        except CellExecutionError as error:
            sys.exit(str(error))
        # kilobytes on Linux, bytes on macOS
        unit = 1e9 if sys.platform == "darwin" else 1e6
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        print(round(peak / unit, 2))
        return
    scripts = select(ROOT, arguments.chapter)
    for script in scripts:
        export.write()
        measured = cost(pair(script), arguments.quick)
        print(f"{script.stem:20s} {measured['seconds']:6.1f} s  {measured['gigabytes']:.2f} GB")
        if not arguments.quick:
            costs = json.loads(COSTS.read_text()) if COSTS.exists() else {}
            costs[script.stem] = measured
            COSTS.write_text(json.dumps(dict(sorted(costs.items())), indent=1) + "\n")
        report.write_results()
    if not arguments.quick:
        report.write()


if __name__ == "__main__":
    try:
        main()
    except CourseError as error:
        sys.exit(str(error))
