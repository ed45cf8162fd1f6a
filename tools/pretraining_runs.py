"""The longer runs of chapter 11, into results/pretraining.json: batch ramp, planted bad batches.

`python tools/pretraining_runs.py` makes the rows that are missing (about four minutes on two cores from nothing),
`--fresh` all of them again, `--only NAME` those of one experiment (ramp, spike).
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax

from llm_from_scratch import datasets
from llm_from_scratch.llama import Llama, LlamaConfig
from llm_from_scratch.pretraining import (
    RampedBatches,
    make_optimizer,
    model_bits_per_byte,
    next_token_loss,
    pack,
    skip_spikes,
    spikes,
)
from llm_from_scratch.tokenizer import COURSE_SPECIAL, Tokenizer, train_bpe
from llm_from_scratch.training import fit

RESULTS = Path(__file__).resolve().parents[1] / "results" / "pretraining.json"
COMMAND = ".venv/bin/python tools/pretraining_runs.py"
TINY = LlamaConfig(512, 64, 2, 4, 2, 168, 16, tie_embeddings=True, max_seq_len=128)
TOKENS = 2**18
SMALL, MIDDLE, LARGE = (4, 64), (4, 128), (8, 128)
STAGES = {  # (steps, windows, context); each arm sees the same TOKENS tokens in the same order
    "small": ((1024, *SMALL),),
    "large": ((256, *LARGE),),
    "ramp": ((64, *SMALL), (64, *MIDDLE), (208, *LARGE)),
}
RATES = (0.0025, 0.005, 0.01)
SEEDS = (0, 1, 2, 3, 4)
BAD = 150  # the step (from 0) of the planted batch
SPIKE_STEPS = 200
POLICIES = ("nothing", "clip", "skip")
SPIKE_SEEDS = (0, 1, 2)


@functools.cache
def data() -> tuple[Tokenizer, tuple, list[str]]:
    """Chapter 11's small tokenizer, its packed stream, and the start of each validation play."""
    train = [play.text for play in datasets.plays("train")]
    tokenizer = Tokenizer(train_bpe(train[:8], 496), COURSE_SPECIAL)
    stream = pack([tokenizer.encode(text) for text in train], tokenizer.bos_id, tokenizer.eos_id)
    return tokenizer, stream, [play.text[:50_000] for play in datasets.plays("validation")]


def run(config: LlamaConfig, stages: tuple, optimizer: optax.GradientTransformation, seed: int):
    """One run over the stages: the trained model and the log of every step."""
    batches = RampedBatches(*data()[1], stages, seed)
    steps = sum(stage[0] for stage in stages)
    model = Llama(config, key=jax.random.key(seed))
    state, rows = fit(
        model, next_token_loss, batches, optimizer, steps=steps, seed=seed, log_every=1
    )
    return state.model, rows


def bits(model: Llama) -> float:
    """Bits per byte on the starts of the validation plays, with a context of 64."""
    tokenizer, _, held_out = data()
    return round(model_bits_per_byte(model, tokenizer, held_out, context=64), 5)


def ramp(arm: str, rate: float, seed: int) -> dict:
    """One arm of the batch experiment; warm-up over the first sixteenth of its steps."""
    stages = STAGES[arm]
    steps = sum(stage[0] for stage in stages)
    optimizer = make_optimizer(steps=steps, peak=rate, warmup=steps // 16)
    model, rows = run(TINY, stages, optimizer, seed)
    tail = np.median([row["tokens_per_second"] for row in rows[-100:]])
    found = int(spikes([row["loss"] for row in rows]).sum())
    return {
        "value": bits(model),
        "steps": steps,
        "judged": steps - 50,
        "spikes": found,
        "tokens_per_second": int(tail),
    }


def policy_optimizer(policy: str) -> optax.GradientTransformation:
    """The recipe without a guard, with the clip, or without the clip and with skipping."""
    clip = 1.0 if policy == "clip" else 1e9
    recipe = make_optimizer(steps=SPIKE_STEPS, peak=0.005, warmup=20, clip=clip)
    return skip_spikes(recipe) if policy == "skip" else recipe


def spoiled(batches: Callable[[int], dict], cursor: int, step: int, seed: int) -> dict:
    """Batch `cursor`, or random ids in its place at the given step; its targets are the next ids."""
    batch = batches(cursor)
    if cursor != step:
        return batch
    shape = batch["tokens"].shape
    ids = np.random.default_rng([seed, step]).integers(0, 496, (shape[0], shape[1] + 1), np.int32)
    return batch | {"tokens": ids[:, :-1], "targets": ids[:, 1:]}


def spike(policy: str, bad: bool, seed: int) -> dict:
    """A run with or without the bad batch under a policy: its losses and gradient norms from there on."""
    batches = RampedBatches(*data()[1], ((SPIKE_STEPS, *LARGE),), seed)
    given = functools.partial(spoiled, batches, step=BAD if bad else -1, seed=seed)
    model = Llama(TINY, key=jax.random.key(seed))
    optimizer = policy_optimizer(policy)
    _, rows = fit(
        model, next_token_loss, given, optimizer, steps=SPIKE_STEPS, seed=seed, log_every=1
    )
    losses, norms = ([row[name] for row in rows] for name in ("loss", "grad_norm"))
    return {
        "losses": [round(x, 4) for x in losses],
        "norms": [round(x, 4) for x in norms],
        "loss_spikes": np.flatnonzero(spikes(losses)).tolist(),
        "norm_spikes": np.flatnonzero(spikes(norms)).tolist(),
    }


def plan() -> list[dict]:
    """What identifies each row that does not depend on another's value."""
    rows = [
        {"experiment": "ramp", "arm": arm, "rate": rate, "seed": 9}
        for arm in STAGES
        for rate in RATES
    ]
    rows += [
        {"experiment": "spike", "policy": policy, "bad": bad, "seed": seed}
        for policy in POLICIES
        for bad in (True, False)
        for seed in SPIKE_SEEDS
    ]
    return rows


def chosen_rate(rows: list[dict], arm: str) -> float:
    """The rate that was best for an arm at seed 9, which is none of the seeds that are compared."""
    tried = [r for r in rows if r.get("arm") == arm and r["seed"] == 9]
    return min(tried, key=lambda row: row["value"])["rate"]


def compared(rows: list[dict]) -> list[dict]:
    """The rows of the batch comparison: each arm at its own best rate, five seeds."""
    return [
        {"experiment": "ramp", "arm": arm, "rate": chosen_rate(rows, arm), "seed": seed}
        for arm in STAGES
        for seed in SEEDS
    ]


MAKERS = {"ramp": ramp, "spike": spike}


def make(wanted: dict) -> dict:
    """One row: what identifies it, what was measured, the command."""
    arguments = {name: value for name, value in wanted.items() if name != "experiment"}
    found = MAKERS[wanted["experiment"]](**arguments)
    return wanted | found | {"command": f"{COMMAND} --only {wanted['experiment']}"}


def main() -> None:
    """Make what is missing, writing the file after every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(MAKERS))
    parser.add_argument("--fresh", action="store_true", help="make all of them again")
    options = parser.parse_args()
    wanted_here = lambda row: options.only in (None, row["experiment"])  # noqa: E731
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if options.fresh:
        rows = [row for row in rows if not wanted_here(row)]
    for stage in (plan, lambda: compared(rows)):
        for wanted in filter(wanted_here, stage()):
            if any(wanted.items() <= row.items() for row in rows):
                continue
            rows.append(make(wanted))
            print({k: v for k, v in rows[-1].items() if k not in ("losses", "norms", "command")})
            RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
