"""Step 2 of `make peers`, in the peers' environment: transformers and llama.cpp on the same weights.

`python tests/peers/run_peers.py FOLDER` compares with tests/golden/formats.json and says what differs; `--write` writes
it. transformers reads SmolLM2's GGUF by its own code and our folders, llama.cpp our GGUF files. Nothing of ours is imported.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from llama_cpp import Llama
from transformers import AutoModelForCausalLM, AutoTokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "formats.json"
STEPS = 50
OURS = ("mini", "base")


def logits(model, ids: list[int]) -> np.ndarray:
    """Logits "T V" of a transformers model. Asked twice: once they differed by 1e-2 on a busy machine."""
    with torch.no_grad():
        first, second = (model(torch.tensor([ids])).logits[0].numpy() for _ in range(2))
    if np.abs(first - second).max() > 1e-4:
        raise SystemExit("transformers gave two answers to one question: run `make peers` again")
    return second


def sampled(rows: np.ndarray) -> dict:
    """A part of the logits that is small enough to keep: the best eight of each row, and 24 fixed columns."""
    rows = rows.astype(float)  # five digits are five digits in JSON then
    top = np.argsort(-rows, axis=1)[:, :8]
    columns = np.linspace(0, rows.shape[1] - 1, 24).astype(int)
    return {
        "top": top.tolist(),
        "top_logits": np.take_along_axis(rows, top, 1).round(5).tolist(),
        "columns": columns.tolist(),
        "column_logits": rows[:, columns].round(5).tolist(),
    }


def greedy(model, ids: list[int], stop: set[int]) -> dict:
    """The greedy continuation by transformers, and the smallest gap between the best two logits."""
    new, margins, past, tokens = [], [], None, ids
    while len(new) < STEPS and not stop & set(new):
        with torch.no_grad():
            out = model(torch.tensor([tokens]), past_key_values=past, use_cache=True)
        last, past = out.logits[0, -1], out.past_key_values
        best = last.topk(2).values
        margins.append(float(best[0] - best[1]))
        tokens = [int(last.argmax())]
        new += tokens
    return {"prompt": ids, "new": new, "smallest_margin": round(min(margins), 4)}


def by_transformers(folder: Path, inputs: dict) -> dict:
    """Logits and greedy text of SmolLM2, read from its GGUF, and of our mini Llamas, read from their folders."""
    gguf = Path(inputs["gguf"])
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    load = AutoModelForCausalLM.from_pretrained
    models = {"smollm2": load(gguf.parent, gguf_file=gguf.name, **options)}
    models |= {name: load(folder / f"{name}-hf", **options) for name in OURS}
    found = {}
    for name, model in models.items():
        prompts, stop = inputs[name], set() if name in OURS else {0, 2}
        found[name] = {"ids": prompts[-1], **sampled(logits(model, prompts[-1]))}
        found[name]["greedy"] = [greedy(model, prompt, stop) for prompt in prompts]
    for name in OURS:
        tokenizer = AutoTokenizer.from_pretrained(folder / f"{name}-hf")
        found[name]["ids_of_strings"] = [
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in inputs["strings"]
        ]
    return found


def by_llama_cpp(folder: Path, inputs: dict, name: str) -> dict:
    """Logits and greedy text of one of our GGUF F32 exports, and the ids of some strings by its tokenizer."""
    options = {"n_ctx": 256, "verbose": False, "logits_all": True, "type_k": 0, "type_v": 0}
    model = Llama(str(folder / f"{name}-f32.gguf"), **options)
    ids = inputs[name][-1]
    model.eval(ids)
    found = {"ids": ids, **sampled(model.scores[: len(ids)]), "greedy": [], "ids_of_strings": []}
    for prompt in inputs[name]:
        new = []
        for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0, top_k=1):
            new.append(int(token))
            if len(new) == STEPS:
                break
        found["greedy"].append({"prompt": prompt, "new": new})
    for text in inputs["strings"]:
        found["ids_of_strings"].append(model.tokenize(text.encode(), add_bos=False, special=False))
    return found


def differences(stored: object, found: object, where: str = "") -> list[str]:
    """What differs between two golden files by more than 1e-4 in a number."""
    if isinstance(stored, dict) and isinstance(found, dict) and stored.keys() == found.keys():
        return [d for key in stored for d in differences(stored[key], found[key], f"{where}/{key}")]
    if isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        pairs = enumerate(zip(stored, found, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}/{i}")]
    close = isinstance(stored, float) and isinstance(found, float) and abs(stored - found) < 1e-4
    return [] if close or stored == found else [f"{where}: {stored!r:.60} was, {found!r:.60} is"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    inputs = json.loads((arguments.folder / "inputs.json").read_text())
    found = {
        "made_by": "make peers",
        "sha256": inputs["sha256"],
        "transformers": by_transformers(arguments.folder, inputs),
        "llama.cpp": by_llama_cpp(arguments.folder, inputs, "mini"),
        "llama.cpp, base": by_llama_cpp(arguments.folder, inputs, "base"),
    }
    if arguments.write:
        GOLDEN.write_text(json.dumps(found) + "\n")
    wrong = differences(json.loads(GOLDEN.read_text()), json.loads(json.dumps(found)))
    raise SystemExit("\n".join(wrong[:20]) or print("peers: the golden file is as they say"))
