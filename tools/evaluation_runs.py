"""Score chapter 15's questions and its excerpt with SmolLM2-135M-Instruct, into results/evaluation.json.

`python tools/evaluation_runs.py` makes the rows that are missing (about fifteen minutes on two cores
from nothing), `--fresh` all of them again. The mini Llama's scores for the template "question" are
stored, too. Chapter 15 reads the file and makes a few items of it again.
"""

import argparse
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llm_from_scratch import pretraining
from llm_from_scratch.evaluation import Item, excerpt, line_items, multiple_choice, speaker_items
from llm_from_scratch.formats import load, smollm2_path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "evaluation.json"
COMMAND = ".venv/bin/python tools/evaluation_runs.py"
TASKS = {"speaker": speaker_items, "line": line_items}
TEMPLATES = ("play", "question")
ROWS = [("SmolLM2", task, template) for template in TEMPLATES for task in TASKS]
ROWS += [("mini Llama", task, "question") for task in TASKS]


def digest(items: Sequence[Item]) -> str:
    """A fingerprint of the questions, so that stored scores are never read for others."""
    return hashlib.sha256(repr(items).encode()).hexdigest()[:16]


@functools.cache
def loaded(name: str) -> tuple:
    """Model and tokenizer by the name that the rows have."""
    if name == "SmolLM2":
        model, tokenizer = load(smollm2_path())
        tokenizer.bos_id = tokenizer.special["<|im_start|>"]  # it has no BOS; this opens a turn
        return model, tokenizer
    return pretraining.load(ROOT / "checkpoints" / "mini-llama3-short")


def main() -> None:
    """Make the missing rows; each is written as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="make every row again")
    fresh = parser.parse_args().fresh
    found = {"command": COMMAND, "file": smollm2_path().name, "scores": {}, "bits_per_byte": {}}
    if RESULTS.exists() and not fresh:
        found = json.loads(RESULTS.read_text())
    for model, task, template in ROWS:
        items, name = TASKS[task]("validation", template=template), f"{model}/{task}/{template}"
        if found["scores"].get(name, {}).get("items") == digest(items):
            continue
        scores = multiple_choice(*loaded(model), items, prior=True)
        fields = ("log_probs", "prior", "tokens", "greedy")
        arrays = {field: np.asarray(getattr(scores, field)) for field in fields}
        found["scores"][name] = {"items": digest(items)} | {
            field: np.round(array.astype(float), 3).tolist()
            if array.dtype.kind == "f"
            else array.astype(int).tolist()
            for field, array in arrays.items()
        }
        RESULTS.write_text(json.dumps(found) + "\n")
        print(name, scores.correct().mean(), flush=True)
    if "SmolLM2" not in found["bits_per_byte"]:
        model, tokenizer = loaded("SmolLM2")
        texts = excerpt()
        bits = pretraining.model_bits_per_byte(model, tokenizer, texts, context=256, batch=4)
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        found["bits_per_byte"]["SmolLM2"] = {"bits": round(bits, 4), "tokens": tokens}
        RESULTS.write_text(json.dumps(found) + "\n")
        print(bits, flush=True)


if __name__ == "__main__":
    main()
