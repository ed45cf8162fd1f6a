"""Publish a finished run of `make train`: its model, in bfloat16, to checkpoints/, its log and curves beside it or to results/.

What the rounding to half the bytes costs is measured and kept in the summary. Run by `make publish`, with the recipe's name,
short or full, as its argument. The model card of the full run quotes results/full.json where that has rows of the model.
"""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from course import ROOT

from llm_from_scratch import ledger, load, model_bits_per_byte, plays, save, save_hugging_face
from llm_from_scratch.evaluation import confidence_interval

RUNS, CHECKPOINTS = ROOT / "runs", ROOT / "checkpoints"
LEFT_BY_A_RUN = ("log.jsonl", "summary.json", "samples.txt", "curves.png")


def rounded(run: Path, target: Path, write) -> dict:
    """Write a run's model as bfloat16 into a folder: the run's summary, bits per byte before and after."""
    if not (run / "summary.json").exists():
        sys.exit(f"{run}/summary.json is missing: make train RECIPE={run.name} first")
    model, tokenizer = load(run)
    write(target, jax.tree.map(lambda x: x.astype(jnp.bfloat16), model), tokenizer)
    tokenizer.save(target / "tokenizer.model")
    texts = [play.text for play in plays("validation")]
    context = model.config.max_seq_len
    exact, cost = (
        model_bits_per_byte(m, tokenizer, texts, context=context) for m in (model, load(target)[0])
    )
    bits = {"float32": round(exact, 4), "bfloat16": round(cost, 4)}
    print(json.dumps(bits))
    return json.loads((run / "summary.json").read_text()) | {"validation_bits_per_byte": bits}


def publish_short() -> None:
    """The twenty-minute run: its log to results/mini_llama/, its model to checkpoints/mini-llama3-short/."""
    target, results = CHECKPOINTS / "mini-llama3-short", ROOT / "results" / "mini_llama"
    summary = rounded(RUNS / "short", target, save)
    results.mkdir(parents=True, exist_ok=True)
    for name in LEFT_BY_A_RUN:
        shutil.copy(RUNS / "short" / name, results / name)
    (target / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def share(right: int, n: int) -> ledger.Interval:
    """A share in per cent with its 95 % interval."""
    return confidence_interval([1.0] * right + [0.0] * (n - right))


def stored(part: str) -> dict[str, dict]:
    """The rows of a part of results/full.json by contender."""
    path = ROOT / "results" / "full.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {row["contender"]: row for row in rows if row["part"] == part}


def held_out_plays() -> str:
    """The model card's words on each held-out play, from results/full.json."""
    found = stored("test").get("full", {})
    return "; ".join(
        f"{split}: "
        + ", ".join(f"{play} {bits['whole']:.3f}" for play, bits in found[split].items())
        for split in ("validation", "test")
        if split in found
    )


def abilities() -> str:
    """The model card's lines on sums and functions, from results/full.json."""
    found = stored("judge")
    if "full" not in found:
        return "Not measured yet: `python tools/full_runs.py --part judge`.\n"
    names = {
        "full": "this model",
        "plays": "the same, trained on plays only",
        "short": "mini-llama3-short (plays only)",
        "counters": "6-grams of bytes",
    }
    lines = ["| | sums right, % | functions that parse, % |", "|---|---|---|"]
    for key, name in names.items():
        row = found[key]
        sums, functions = share(row["right"], row["sums"]), share(row["parse"], row["functions"])
        lines.append(f"| {name} | {sums} | {functions} |")
    return "\n".join(lines) + "\n"


def card(summary: dict) -> str:
    """The model card, in Markdown."""
    bits, recipe, read = summary["bits_per_byte"], summary["recipe"], summary["read"]
    judged = {name: (bits["train"][name], bits["validation"][name]) for name in recipe["mix"]}
    losses = {name: f"{a:.3f} | {b:.3f} | {b - a:.3f}" for name, (a, b) in judged.items()}
    table = "\n".join(
        f"| {name} | {losses.get(name, '| | ')} | {100 * r['share']:.1f} "
        f"| {r['tokens']:,} | {r['unique']:,} | {r['epochs']:.2f} |"
        for name, r in read.items()
    )
    shape = recipe["model"]
    return f"""---
license: mit
library_name: transformers
---

# mini-llama3-base

A Llama 3 of {summary["parameters"]:,} weights, trained from nothing by `make train RECIPE=full` in {summary["seconds"] / 60:.0f}
minutes on two CPU cores (matrix products at {summary["matmul_gflops"]} GFLOP/s), tokenizer included, from text that comes with Python
packages. It is the base model of the course *LLM from scratch in JAX*; chapter 24 explains every decision.

- **Shape**: {shape["n_layers"]} layers of width {shape["dim"]}, {shape["n_heads"]} query and {shape["n_kv_heads"]} key/value heads of width \
{shape["head_dim"]}, feed-forward {shape["hidden_dim"]}, {shape["vocab_size"]:,} ids, context {shape["max_seq_len"]}, one table for input and output, bfloat16.
- **Recipe**: {recipe["steps"]:,} steps of {recipe["batch"] * recipe["context"] * recipe["accumulate"]} tokens, AdamW with β₂ = \
{recipe["b2"]} and decay {recipe["weight_decay"]}, rate {recipe["peak"]} after {recipe["warmup"]} steps of warm-up, falling linearly to zero in the last \
{recipe["anneal"]:,} steps; there, {100 * recipe["share"]:.0f} % of the rows are drawn from {", ".join(recipe["extra"])}.
- **Bits per byte of the two validation plays, whole**: {summary["validation_bits_per_byte"]["float32"]} \
(bfloat16: {summary["validation_bits_per_byte"]["bfloat16"]}). By play, bfloat16: {held_out_plays() or "not measured yet"}.

## Data, and how well each source is predicted

Bits per byte of pieces of 2,000 characters, about 20 KB of each source, in and outside the training text. Unique: different
tokens that were read; epochs: tokens read over tokens there are.

| source | training | held-out | gap | share, % | tokens read | unique | epochs |
|---|---|---|---|---|---|---|---|
{table}

*plays*, *poems* and *folio* are Shakespeare's (modern and 1623 spelling), *bible* is the King James Version, *docs* are docstrings of NumPy,
SciPy and Matplotlib, *arithmetic* are worked sums of a seeded generator, *code* is the source of JAX, Optax and Equinox, *french* are JupyterLab's
messages, *latin* is Milton's, *recast* are the plays with other names, each in four castings. Held-out documents were not read; code and docs repeat themselves between files (chapter 21 counts how much).

## What it can do

Test problems of the generator (no pair of operands was trained on; greedy), and functions from their first line, 120 tokens at temperature 0.8.
The share says that Python's grammar is followed, not that the code is of use; of real bodies, cut in the same way, about four in five parse.

{abilities()}
## Limits

It knows what is in {sum(read[name]["unique"] for name in recipe["mix"]) / 1e6:.1f} million tokens of the texts above, and nothing else; it has no idea of the world, follows no instructions, and is
wrong about most things. It is there to be taught: instructions, reasoning and tools are for the chapters on post-training.

## Files

`config.json`, `generation_config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json` are what transformers reads; `tokenizer.model` is
the same vocabulary in Llama 3's format; `log.jsonl` has a row every ten steps, `curves.png` its held-out losses, `samples.txt` what the model
writes after the beginning of the first held-out piece of each source (temperature 0.8, seeds in the order of the sources: chosen by rule), `summary.json`
the numbers of this card. `llm_from_scratch.load` reads the folder, `llm-from-scratch convert` writes a GGUF of it for llama.cpp.
"""


def publish_full() -> None:
    """The long run: everything to checkpoints/mini-llama3-base/, in the format of transformers, with a model card."""
    target = CHECKPOINTS / "mini-llama3-base"
    summary = rounded(RUNS / "full", target, save_hugging_face)
    for name in LEFT_BY_A_RUN:
        shutil.copy(RUNS / "full" / name, target / name)
    (target / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (target / "README.md").write_text(card(summary))


if __name__ == "__main__":
    known = {"short": publish_short, "full": publish_full}
    wanted = sys.argv[1] if len(sys.argv) > 1 else "short"
    if wanted not in known:
        sys.exit(f"only {' and '.join(known)} are published, not {wanted!r}")
    known[wanted]()
