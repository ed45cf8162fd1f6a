"""Make chapter 24's stored runs: schedules and averages, sums in the anneal, data sets judged by an anneal, into results/annealing.json.

`python tools/annealing_runs.py` makes the rows that are missing (about half an hour on one core from nothing), `--part
NAME` one part of schedules, upsample, value, scratch; `--fresh` makes them again. All models read bytes. Chapter 24 reads
the file and makes one row of the schedules again, drawn by a fixed rule.
"""

import argparse
import functools
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

from llm_from_scratch.annealing import anneal_mix, annealed, averaged, averaged_model
from llm_from_scratch.data_mix import (
    MixedBatches,
    TokenFile,
    hashed_split,
    source_documents,
    write_tokens,
)
from llm_from_scratch.evaluation import Item, excerpt, multiple_choice
from llm_from_scratch.llama import Llama, LlamaConfig
from llm_from_scratch.pretraining import make_optimizer, model_bits_per_byte, next_token_loss
from llm_from_scratch.tokenizer import COURSE_SPECIAL, Tokenizer
from llm_from_scratch.training import fit

RESULTS = Path(__file__).resolve().parents[1] / "results" / "annealing.json"
COMMAND = ".venv/bin/python tools/annealing_runs.py"
BATCH, CONTEXT, WARMUP = 8, 128, 20
SIZES = {  # parameters: 106,816 and 330,912
    "small": LlamaConfig(272, 64, 2, 4, 2, 168, 16, tie_embeddings=True, max_seq_len=CONTEXT),
    "large": LlamaConfig(272, 96, 3, 4, 2, 256, 24, tie_embeddings=True, max_seq_len=CONTEXT),
}
BYTES = Tokenizer({bytes([b]): b for b in range(256)}, COURSE_SPECIAL)


# Text --------------------------------------------------------------------------------------------


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp())


def written(name: str, texts) -> TokenFile:
    """Texts as a token file of bytes."""
    write_tokens(folder() / name, texts, BYTES)
    return TokenFile.open(folder() / name, BYTES)


@functools.cache
def source(name: str) -> TokenFile:
    """The training split of a source of chapter 21."""
    return written(name, source_documents(name))


def bits(model: Llama, texts) -> float:
    return round(model_bits_per_byte(model, BYTES, texts, context=CONTEXT), 5)


@functools.cache
def play_excerpts() -> list[str]:
    """The first 8 KB of each validation play."""
    return excerpt(8_000)


# Schedules and averages ----------------------------------------------------------------------------

STEPS, TAIL = 600, 120  # the anneal is the last fifth
RATES = (0.002, 0.004, 0.008, 0.016)
TUNING, SEEDS = 90, (0, 1, 2, 3, 4, 5)
SCHEDULES = ("constant", "cosine", "tail", "cosine + tail")


def schedule_optimizer(schedule: str, rate: float, steps: int = STEPS, tail: int = TAIL):
    """Chapter 11's AdamW under a schedule, with the mean of ten checkpoints of the last fifth.

    "tail": constant, then linear to zero; "cosine + tail": the cosine reaches 1 % before the tail.
    """
    floor = 1.0 if schedule in ("constant", "tail") else 0.01
    until = steps - tail if schedule == "cosine + tail" else steps
    optimizer = make_optimizer(steps=until, peak=rate, warmup=WARMUP, floor=floor)
    if "tail" in schedule:
        optimizer = annealed(optimizer, steps=steps, anneal=tail)
    return averaged(optimizer, start=steps - tail, every=tail // 10)


def schedules_row(schedule: str, rate: float, seed: int) -> dict:
    """A run on the plays: bits per byte of its last weights, and of the mean of ten checkpoints."""
    batches = MixedBatches({"plays": source("plays")}, [(0, {"plays": 1.0})], BATCH, CONTEXT, seed)
    model = Llama(SIZES["small"], key=jax.random.key(seed))
    optimizer = schedule_optimizer(schedule, rate)
    state, _ = fit(model, next_token_loss, batches, optimizer, steps=STEPS, seed=seed)
    averages = bits(averaged_model(state), play_excerpts())
    return {"last": bits(state.model, play_excerpts()), "mean": averages}


def best_rate(rows: list[dict], schedule: str, weights: str) -> float | None:
    """The rate with the lowest bits per byte of "last" or "mean" weights at the seed for tuning."""
    found = {
        row["rate"]: row[weights]
        for row in rows
        if row["part"] == "schedules" and row["schedule"] == schedule and row["seed"] == TUNING
    }
    return min(found, key=found.get) if len(found) == len(RATES) else None


def plan_schedules(rows: list[dict]) -> list[dict]:
    """First the grid of rates on one seed; then, at the best of each, the seeds that are compared."""
    grid = [(schedule, rate, TUNING) for schedule in SCHEDULES for rate in RATES]
    best = {(s, best_rate(rows, s, weights)) for s in SCHEDULES for weights in ("last", "mean")}
    grid += [
        (s, rate, seed)
        for s in SCHEDULES
        for rate in RATES
        for seed in SEEDS
        if (s, rate) in best
    ]
    return [{"schedule": s, "rate": rate, "seed": seed} for s, rate, seed in grid]


# The command -------------------------------------------------------------------------------------

PARTS = {
    "schedules": (plan_schedules, schedules_row),
}


def stored() -> list[dict]:
    """The rows of results/annealing.json."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def save(rows: list[dict]) -> None:
    """Write the rows in the order of the plans; a whole file or none."""
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(f'{{"command": "{COMMAND}",\n "rows": [\n{body}\n]}}\n')
    os.replace(temporary, RESULTS)


def find(rows: list[dict], wanted: dict) -> dict | None:
    """The stored row with these settings."""
    return next((row for row in rows if wanted.items() <= row.items()), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="only this part")
    parser.add_argument("--fresh", action="store_true", help="also make the rows that are there")
    options = parser.parse_args()
    parts = [options.part] if options.part else list(PARTS)
    if options.fresh:
        save([row for row in stored() if row["part"] not in parts])
    for part in parts:
        plan, make = PARTS[part]
        # the plan grows while its rows are made
        while missing := [
            w for w in plan(stored()) if find(stored(), {"part": part} | w) is None
        ]:
            row = {"part": part} | missing[0] | make(**missing[0])
            save(sorted([*stored(), row], key=lambda row: list(PARTS).index(row["part"])))
            print(row, flush=True)


if __name__ == "__main__":
    main()
