"""Does a run of `make train` depend on nothing but its recipe? The real command, killed at random moments, on the short recipe.

`python tools/determinism.py` trains three times for 800 steps, about six minutes on two cores: twice without a pause, and once
killed three times with SIGKILL, each time started again. The three logs must agree in every field but those read off a clock.
`--steps 8000` does the whole recipe, about an hour.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLOCKS = ("seconds", "tokens_per_second")
COMMAND = [sys.executable, "-c", "from llm_from_scratch.annealing import main; main()"]


def rows(folder: Path) -> list[dict]:
    """The whole rows of a log, without what is read off a clock."""
    log = folder / "log.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [{k: v for k, v in json.loads(x).items() if k not in CLOCKS} for x in lines]


def train_until(folder: Path, step: int) -> None:
    """Start the command, or start it again, and kill it once its log has come to a step."""
    process = subprocess.Popen(
        [*COMMAND, "--recipe", "short", "--directory", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    while not (found := rows(folder)) or found[-1]["step"] < step:
        if process.poll() is not None:
            sys.exit(f"the run ended by itself with exit code {process.returncode}")
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800, help="how many, from 300 on")
    steps = parser.parse_args().steps
    if steps < 300:
        parser.error(
            f"--steps must be at least 300, for three kills after the first checkpoint, got {steps}"
        )
    folder = Path(tempfile.mkdtemp())
    kills = sorted(random.Random(0).sample(range(210, steps - 10), 3))
    plan = {"one": [steps], "two": [steps], "killed": [*kills, steps]}
    logs = {}
    for name, moments in plan.items():
        for step in moments:
            train_until(folder / name, step)
        logs[name] = [row for row in rows(folder / name) if row["step"] <= steps]
        print(name, "killed at", moments, "with", len(logs[name]), "rows", flush=True)
    for name in ("two", "killed"):
        unequal = sum(a != b for a, b in zip(logs["one"], logs[name], strict=True))
        print(f"{name}: {unequal} of {len(logs['one'])} rows differ from those of the first run")
    shutil.rmtree(folder)
    sys.exit(any(logs["one"] != logs[name] for name in logs))


if __name__ == "__main__":
    main()
