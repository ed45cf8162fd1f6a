"""Make chapter 24's stored runs: schedules and averages, code in the anneal, data sets judged by an anneal, into results/annealing.json.

`python tools/annealing_runs.py` makes the rows that are missing (about a quarter of an hour of one core from nothing), `--part
NAME` one part of schedules, upsample, value; `--fresh` makes them again. Chapter 24 reads the file and
makes one row of the schedules again, drawn by a fixed rule.
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
    held_out,
    source_documents,
    write_tokens,
)
from llm_from_scratch.datasets import plays
from llm_from_scratch.evaluation import excerpt
from llm_from_scratch.llama import Llama, LlamaConfig
from llm_from_scratch.pretraining import make_optimizer, model_bits_per_byte, next_token_loss
from llm_from_scratch.tokenizer import COURSE_SPECIAL, Tokenizer, train_bpe
from llm_from_scratch.training import fit

RESULTS = Path(__file__).resolve().parents[1] / "results" / "annealing.json"
COMMAND = ".venv/bin/python tools/annealing_runs.py"
BATCH, CONTEXT, WARMUP = 8, 128, 20
# 122,176 parameters
SMALL = LlamaConfig(512, 64, 2, 4, 2, 168, 16, tie_embeddings=True, max_seq_len=CONTEXT)


@functools.cache
def tokenizer() -> Tokenizer:
    """Chapter 11's small one: 512 ids, trained on eight plays. Each digit is an id of its own."""
    return Tokenizer(train_bpe([play.text for play in plays("train")[:8]], 496), COURSE_SPECIAL)


# Text --------------------------------------------------------------------------------------------


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp())


def written(name: str, texts) -> TokenFile:
    """Texts as a token file."""
    write_tokens(folder() / name, texts, tokenizer())
    return TokenFile.open(folder() / name, tokenizer())


@functools.cache
def source(name: str) -> TokenFile:
    """The training split of a source of chapter 21."""
    return written(name, source_documents(name))


def bits(model: Llama, texts) -> float:
    return round(model_bits_per_byte(model, tokenizer(), texts, context=CONTEXT), 5)


@functools.cache
def play_excerpts() -> list[str]:
    """The first 8 KB of each validation play."""
    return excerpt(8_000)


# Schedules and averages ----------------------------------------------------------------------------

STEPS, TAIL = 600, 120  # the anneal is the last fifth
RATES = (0.001, 0.002, 0.004)
TUNING, SEEDS = 90, (0, 1, 2, 3, 4)
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
    model = Llama(SMALL, key=jax.random.key(seed))
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
        (s, rate, seed) for s in SCHEDULES for rate in RATES for seed in SEEDS if (s, rate) in best
    ]
    return [{"schedule": s, "rate": rate, "seed": seed} for s, rate, seed in grid]


# Code in the anneal ------------------------------------------------------------------------------

# Sums were planned; in a pilot (seed 99) no arm of either size got more than 3 % right, so it is code.
BASE_STEPS, ANNEAL, SHARE = 800, 240, 0.3
BASE_MIX = {"plays": 0.95, "code": 0.05}
ANNEALS = {  # what the last 240 steps read: (extra, its share)
    "unchanged": ({"code": 1.0}, 0.0),
    "plays only": ({"plays": 1.0}, 1.0),
    "up-sampled": ({"code": 1.0}, SHARE),
}
UPSAMPLE_SEEDS = (0, 1, 2, 3, 4)


def go_on(path: Path, name: str, seed: int, batches, rate: float, steps: tuple):
    """Go on from a copy of a run's folder for the rest of `steps`, annealed; the last state."""
    copy = path.with_name(f"{path.name}-{name.replace(' ', '-')}")
    shutil.copytree(path, copy)
    optimizer = calm(rate, sum(steps), steps[1])
    model = Llama(SMALL, key=jax.random.key(seed))
    options = {"steps": sum(steps), "seed": seed, "directory": copy}
    state, _ = fit(model, next_token_loss, batches, optimizer, **options)
    shutil.rmtree(copy)
    return state


def calm(rate: float, steps: int, anneal: int):
    """A constant rate after the warm-up, annealed at the end."""
    optimizer = make_optimizer(steps=steps, peak=rate, warmup=WARMUP, floor=1.0)
    return annealed(optimizer, steps=steps, anneal=anneal)


def half_trained(seed: int, batches, rate: float, steps: tuple) -> Path:
    """The folder of a run of steps[0] steps at a constant rate, of which steps[1] are still to come."""
    path = folder() / f"base-{seed}"
    shutil.rmtree(path, ignore_errors=True)
    model = Llama(SMALL, key=jax.random.key(seed))
    optimizer = calm(rate, sum(steps), steps[1])
    options = {"steps": steps[0], "seed": seed, "directory": path}
    fit(model, next_token_loss, batches, optimizer, **options)
    return path


def earlier() -> list[tuple[int, dict[str, float]]]:
    """The schedule that reads the mix of "up-sampled" for as many steps, but just before the anneal."""
    extra, share = ANNEALS["up-sampled"]
    _, (_, rich) = anneal_mix(BASE_MIX, extra, share=share, steps=BASE_STEPS, anneal=ANNEAL)
    return [(0, BASE_MIX), (BASE_STEPS - ANNEAL, rich), (BASE_STEPS, BASE_MIX)]


def upsample_row(seed: int) -> dict:
    """One base model and its three anneals, and the run that reads its code earlier: bits per byte of code and of plays."""
    files, steps = {name: source(name) for name in BASE_MIX}, (BASE_STEPS, ANNEAL)
    rate, states, path = 0.004, {}, None
    for name, (extra, share) in ANNEALS.items():
        schedule = anneal_mix(BASE_MIX, extra, share=share, steps=sum(steps), anneal=ANNEAL)
        batches = MixedBatches(files, schedule, BATCH, CONTEXT, seed)
        path = path or half_trained(seed, batches, rate, steps)
        states[name] = go_on(path, name, seed, batches, rate, steps)
    batches = MixedBatches(files, earlier(), BATCH, CONTEXT, seed)
    model, optimizer = Llama(SMALL, key=jax.random.key(seed)), calm(rate, sum(steps), ANNEAL)
    options = {"steps": sum(steps), "seed": seed}
    states["earlier"], _ = fit(model, next_token_loss, batches, optimizer, **options)
    return {
        name: {
            "code": bits(state.model, benchmark()),
            "plays": bits(state.model, play_excerpts()),
        }
        for name, state in states.items()
    }


def plan_upsample(rows: list[dict]) -> list[dict]:
    return [{"seed": seed} for seed in UPSAMPLE_SEEDS]


# The value of a data set ---------------------------------------------------------------------------

VALUE_STEPS = (400, 160)  # before the anneal: half of a full run; in it: a fifth
FULL_STEPS, VALUE_RATE, NOISE = 800, 0.004, 0.1
DEFAULT = {"plays": 0.75, "docs": 0.25}
CANDIDATES = ("good", "noisy", "duplicated", "off-domain", "garbage")  # from best to worst
VALUE_SEEDS = (0, 1, 2, 3, 4)


@functools.cache
def candidate(name: str) -> TokenFile:
    """A data set of 300 KB (180 KB of poems) for a model that should learn Python, of a quality known by construction."""
    draw, printable = np.random.default_rng(24), np.arange(32, 127, dtype=np.uint8)
    chooser, texts = random.Random(24), list(source_documents("code"))
    code = "".join(chooser.sample(texts, 40)).encode("ascii", "ignore")[:300_000]
    data = np.frombuffer(code, np.uint8).copy()
    if name == "noisy":
        hit = draw.random(len(data)) < NOISE
        data[hit] = draw.choice(printable, hit.sum())
    elif name == "duplicated":
        data = np.resize(data[10_000:12_000], len(data))
    elif name == "off-domain":
        data = np.frombuffer("".join(source_documents("poems")).encode()[: len(data)], np.uint8)
    elif name == "garbage":
        data = draw.choice(printable, len(data))
    return written(f"candidate-{name}", [data.tobytes().decode(errors="ignore")])


@functools.cache
def benchmark() -> list[str]:
    """16 KB of held-out Python, in pieces that share no long line with the training text."""
    return held_out("code", 16_000)


def value_batches(name: str, seed: int, share: float, steps: int, anneal: int) -> MixedBatches:
    """The default mix, and in the anneal a share of the candidate ("none": of nothing)."""
    files = {source_name: source(source_name) for source_name in DEFAULT}
    extra = DEFAULT if name == "none" else {name: 1.0}
    files |= {} if name == "none" else {name: candidate(name)}
    schedule = anneal_mix(DEFAULT, extra, share=share, steps=steps, anneal=anneal)
    return MixedBatches(files, schedule, BATCH, CONTEXT, seed)


def value_row(seed: int) -> dict:
    """One half-trained model, annealed on 30 % of each candidate: bits per byte of held-out Python."""
    row, path, total = {}, None, sum(VALUE_STEPS)
    for name in ("none", *CANDIDATES):
        batches = value_batches(name, seed, SHARE, total, VALUE_STEPS[1])
        path = path or half_trained(seed, batches, VALUE_RATE, VALUE_STEPS)
        state = go_on(path, name, seed, batches, VALUE_RATE, VALUE_STEPS)
        row[name] = bits(state.model, benchmark())
    return row


def plan_value(rows: list[dict]) -> list[dict]:
    return [{"seed": seed} for seed in VALUE_SEEDS]


# The command -------------------------------------------------------------------------------------

PARTS = {
    "schedules": (plan_schedules, schedules_row),
    "upsample": (plan_upsample, upsample_row),
    "value": (plan_value, value_row),
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
        while missing := [w for w in plan(stored()) if find(stored(), {"part": part} | w) is None]:
            row = {"part": part} | missing[0] | make(**missing[0])
            save(sorted([*stored(), row], key=lambda row: list(PARTS).index(row["part"])))
            print(row, flush=True)


if __name__ == "__main__":
    main()
