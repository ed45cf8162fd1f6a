"""Make chapter 24's stored runs on what would lower the loss of the plays, into results/levers.json.

`python tools/lever_runs.py` makes the rows that are missing (about three hours of one core), `--fresh` makes them again,
`--only` some of them. The smallest model of `full_runs`, half its rate, on plays only: with more or less text, and with each of
some changes that are said to help when text is scarce. The last rows ask three of them of a model with twice the width.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import optax

from llm_from_scratch.annealing import FULL, annealed
from llm_from_scratch.data_mix import MixedBatches, TokenFile, source_documents, write_tokens
from llm_from_scratch.datasets import plays
from llm_from_scratch.formats import load
from llm_from_scratch.llama import Llama
from llm_from_scratch.pretraining import (
    decayed,
    make_optimizer,
    mini_llama,
    model_bits_per_byte,
    next_token_loss,
)
from llm_from_scratch.training import fit

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "levers.json"
COMMAND = ".venv/bin/python tools/lever_runs.py"
BASE_MODEL = ROOT / "checkpoints" / "mini-llama3-base"
STEPS, WARMUP, RATE = 3_000, 75, 0.003
SEEDS = range(3)
BATCH, CONTEXT = 2, 256
SMALL = mini_llama(64, 3, 4, 2, 168, CONTEXT)
WIDE = {"model": mini_llama(128, 4, 4, 2, 336, CONTEXT), "rate": RATE / 2}
LEVERS = {  # what is changed against the second: a quarter of the plays, 3,000 steps
    "an eighth of the plays": {"part": 8},
    "a quarter": {},
    "a half": {"part": 2},
    "all": {"part": 1},
    "the first quarter of each play": {"part": 1, "cut": 4},
    "every second row from the Bible": {"shares": {"plays": 0.5, "bible": 0.5}},
    "half the steps": {"steps": STEPS // 2},
    "twice the steps": {"steps": 2 * STEPS},
    "dropout 0.1": {"dropout": 0.1},
    "weight decay 0.3": {"decay": 0.3},
    "β₂ 0.999": {"b2": 0.999},
    "half the rate": {"rate": RATE / 2},
    "twice the rate": {"rate": 2 * RATE},
    "Muon": {"muon": True},
    "Muon, twice the rate": {"muon": True, "rate": 2 * RATE},
    "twice the width": WIDE,
    "twice the width, dropout 0.1": WIDE | {"dropout": 0.1},
    "twice the width, weight decay 0.3": WIDE | {"decay": 0.3},
    "twice the width, Muon": WIDE | {"muon": True},
}
PLAN = [{"change": change, "seed": seed} for change in LEVERS for seed in SEEDS]


class Dropped(eqx.Module):
    """A part of a layer, each number of whose output is dropped with probability `rate`, the rest made larger."""

    part: eqx.Module
    key: jax.Array
    rate: float = eqx.field(static=True)

    def __call__(self, *inputs):
        found = self.part(*inputs)
        out, *more = found if isinstance(found, tuple) else (found,)
        out = eqx.nn.Dropout(self.rate)(out, key=self.key)
        return (out, *more) if more else out


def dropout_loss(rate: float):
    """`next_token_loss` with dropout on what attention and feed-forward layers add to the stream."""

    def parts(model):
        return [part for block in model.blocks for part in (block.attention, block.feed_forward)]

    def loss(model, batch, key):
        keys = jax.random.split(key, len(parts(model)))
        dropped = [Dropped(part, k, rate) for part, k in zip(parts(model), keys, strict=True)]
        return next_token_loss(eqx.tree_at(parts, model, dropped), batch)

    return loss


def muon(rate: float, b2: float, decay: float) -> optax.GradientTransformation:
    """`make_optimizer` at a constant rate, with Muon in AdamW's place for the matrices of the layers.

    Muon's steps have a root mean square of 0.2 times the rate, as AdamW's usually have. Jordan et al. 2024; Liu et al. 2025.
    """

    def method(path, weights):
        inside = weights.ndim == 2 and "blocks" in jax.tree_util.keystr(path)
        return "muon" if inside else "adamw"

    warm = optax.linear_schedule(0.0, rate, WARMUP)
    methods = {
        "muon": optax.contrib.muon(warm, weight_decay=decay, consistent_rms=0.2),
        "adamw": optax.adamw(warm, b2=b2, weight_decay=decay, mask=decayed),
    }
    both = optax.partition(methods, lambda params: jax.tree_util.tree_map_with_path(method, params))
    return optax.chain(optax.clip_by_global_norm(1.0), both)


def lever_row(change: str, seed: int) -> dict:
    """One model trained; its bits per byte of the whole validation plays, and of what it has read."""
    options = {
        "part": 4,
        "cut": 1,
        "shares": {"plays": 1.0},
        "steps": STEPS,
        "dropout": 0.0,
        "muon": False,
    }
    options |= {"model": SMALL, "rate": RATE, "b2": FULL.b2, "decay": FULL.weight_decay}
    options |= LEVERS[change]
    steps, rate, b2, decay = (options[name] for name in ("steps", "rate", "b2", "decay"))
    optimizer = make_optimizer(
        steps=steps, peak=rate, warmup=WARMUP, floor=1.0, weight_decay=decay, b2=b2
    )
    if options["muon"]:
        optimizer = muon(rate, b2, decay)
    _, tokenizer = load(BASE_MODEL)
    texts = [play.text for play in plays("train")][:: options["part"]]
    texts = [text[: len(text) // options["cut"]] for text in texts]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name in options["shares"]:
            path = Path(folder) / f"{name}.tokens"
            write_tokens(path, texts if name == "plays" else source_documents(name), tokenizer)
            files[name] = TokenFile.open(path, tokenizer)
        batches = MixedBatches(files, [(0, options["shares"])], BATCH, CONTEXT, seed)
        state, rows = fit(
            Llama(options["model"], key=jax.random.key(seed)),
            dropout_loss(options["dropout"]) if options["dropout"] else next_token_loss,
            batches,
            annealed(optimizer, steps=steps, anneal=steps * 2 // 5),
            steps=steps,
            seed=seed,
        )
        unique = len(files["plays"].ids)
    judge = lambda found: round(  # noqa: E731
        model_bits_per_byte(state.model, tokenizer, found, context=CONTEXT), 4
    )
    return {
        "unique": unique,
        "tokens": rows[-1]["tokens"],
        "bits_per_byte": judge([play.text for play in plays("validation")]),
        "read": judge([text[10_000:20_000] for text in texts]),
        "took": round(time.perf_counter() - start),
    }


def stored() -> list[dict]:
    """The rows of results/levers.json."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="also make the rows that are there")
    parser.add_argument("--only", nargs="+", choices=LEVERS, metavar="CHANGE", help="these changes")
    options = parser.parse_args()
    for keys in PLAN:
        there = any(keys.items() <= row.items() for row in stored())
        if keys["change"] not in (options.only or LEVERS) or there and not options.fresh:
            continue
        new = keys | lever_row(**keys)
        rows = [row for row in stored() if not keys.items() <= row.items()] + [new]
        rows.sort(key=lambda row: PLAN.index({k: row[k] for k in keys}))
        body = ",\n".join("  " + json.dumps(row) for row in rows)
        RESULTS.write_text(f'{{"command": "{COMMAND}",\n "rows": [\n{body}\n]}}\n')
        print(new, flush=True)


if __name__ == "__main__":
    main()
