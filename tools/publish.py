"""Publish a finished `make train`: its log to results/mini_llama/, its model to checkpoints/.

The model is stored in bfloat16, half the bytes; what the rounding costs is measured and kept in
the summary. Run by `make publish`.
"""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
from course import ROOT

from llm_from_scratch import load, model_bits_per_byte, plays, save

RUN = ROOT / "runs" / "short"
RESULTS = ROOT / "results" / "mini_llama"
CHECKPOINT = ROOT / "checkpoints" / "mini-llama3-short"


def main() -> None:
    """Copy, round, measure. Raises SystemExit if the run is not finished."""
    if not (RUN / "summary.json").exists():
        sys.exit("runs/short/summary.json is missing: make train first")
    model, tokenizer = load(RUN)
    save(CHECKPOINT, jax.tree.map(lambda x: x.astype(jnp.bfloat16), model), tokenizer)
    rounded, _ = load(CHECKPOINT)
    texts = [play.text for play in plays("validation")]
    exact, cost = (model_bits_per_byte(m, tokenizer, texts, context=256) for m in (model, rounded))
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in ("log.jsonl", "summary.json", "samples.txt", "curves.png"):
        shutil.copy(RUN / name, RESULTS / name)
    summary = json.loads((RUN / "summary.json").read_text())
    card = {"validation_bits_per_byte": {"float32": round(exact, 4), "bfloat16": round(cost, 4)}}
    (CHECKPOINT / "summary.json").write_text(json.dumps(summary | card, indent=1) + "\n")
    print(json.dumps(card))


if __name__ == "__main__":
    main()
