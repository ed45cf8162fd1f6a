"""Does a run of `make train` depend on nothing but its recipe? The real command, killed at random moments, on the short recipe.

`python tools/determinism.py` trains three times for 800 steps, about six minutes on two cores: twice without a pause, and once
killed three times with SIGKILL, each time started again. The three logs must agree in every field but those read off a clock.
"""

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

STEPS = 800
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
    folder = Path(tempfile.mkdtemp())
    kills = sorted(random.Random(0).sample(range(210, STEPS - 10), 3))
    plan = {"one": [STEPS], "two": [STEPS], "killed": [*kills, STEPS]}
    logs = {}
    for name, moments in plan.items():
        for step in moments:
            train_until(folder / name, step)
        logs[name] = [row for row in rows(folder / name) if row["step"] <= STEPS]
        print(name, "killed at", moments, "with", len(logs[name]), "rows", flush=True)
    for name in ("two", "killed"):
        unequal = sum(a != b for a, b in zip(logs["one"], logs[name], strict=True))
        print(f"{name}: {unequal} of {len(logs['one'])} rows differ from those of the first run")
    shutil.rmtree(folder)
    sys.exit(any(logs["one"] != logs[name] for name in logs))


if __name__ == "__main__":
    main()
