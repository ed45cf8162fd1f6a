"""Make chapter 24's stored runs of the full recipe: its shape, and what the trained models can do, into results/full.json.

`python tools/full_runs.py` makes the rows that are missing, `--fresh` makes them again.

Parts "shape", "rate" and "b2" (about forty minutes of one core): every model trains on one core for the same seconds, its tokens
being those seconds times its own speed, which is measured first. Mix and tokenizer are those of `FULL`.

Part "judge" (some minutes) asks the models in checkpoints/, counters of bytes, and a control: the model of `FULL` with its
tokenizer, but on plays only, as many tokens of them as `FULL` reads. It takes about 25 minutes to train; runs/full-plays
keeps it, and a run that was stopped goes on. Part "greedy" asks for the functions at temperature zero, part "test" for the
loss of each held-out play, those of the test split included.
"""

import argparse
import ast
import dataclasses
import json
import random
import re
import shutil
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from llm_from_scratch.annealing import FULL, bits_by_source, pieces, play_bits, train_mix
from llm_from_scratch.bigram import NGram, model_bits
from llm_from_scratch.data_mix import (
    MixedBatches,
    distinct_problems,
    mix_files,
    mix_tokenizer,
    parse_answer,
    source_documents,
)
from llm_from_scratch.datasets import plays
from llm_from_scratch.formats import load
from llm_from_scratch.generation import Sampler, generate
from llm_from_scratch.llama import Llama, count_params
from llm_from_scratch.pretraining import make_optimizer, mini_llama, next_token_loss
from llm_from_scratch.training import compile_step, make_step, train_state

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "full.json"
COMMAND = ".venv/bin/python tools/full_runs.py"
CORPUS = ROOT / ".cache" / "full"  # tokenizer and token files, the same for all rows
# shape: width and layers, four query heads and two key/value heads each
SHAPES = {"64x3": (64, 3), "96x3": (96, 3), "128x4": (128, 4), "192x4": (192, 4)}
BUDGETS = {  # seconds: shapes
    100: ("64x3", "96x3", "128x4", "192x4"),
    400: ("96x3", "128x4", "192x4"),
}
RATE = 0.0015  # at width 256
# these runs came before FULL's own mix was settled, and read more plays in their first part
MIX = {
    "plays": 0.36,
    "poems": 0.02,
    "folio": 0.08,
    "bible": 0.10,
    "docs": 0.08,
    "arithmetic": 0.16,
    "code": 0.15,
    "french": 0.04,
    "latin": 0.01,
}
EXTRA = {"plays": 0.6, "arithmetic": 0.2, "code": 0.2}
MODELS = {
    "full": ROOT / "checkpoints" / "mini-llama3-base",
    "short": ROOT / "checkpoints" / "mini-llama3-short",
    "plays": ROOT / "runs" / "full-plays",
}
CONTENDERS = (*MODELS, "counters")
SPLITS = ("validation", "test")
CONTROL_STEPS, CONTROL_ANNEAL = 12_000, 5_400


def recipe(shape: str, steps: int, factor: float = 1.0, b2: float = 0.99):
    """An earlier FULL with another shape, length and mix, its rate falling with the width, times a factor."""
    width, layers = SHAPES[shape]
    model = mini_llama(width, layers, 4, 2, 8 * (width // 3), 256)
    return dataclasses.replace(
        FULL,
        model=model,
        batch=2,
        context=256,
        recast=0.0,
        steps=steps,
        warmup=max(20, steps // 40),
        anneal=steps * 2 // 5,
        peak=RATE * factor * 256 / width,
        b2=b2,
        eval_every=0,
        checkpoint_every=0,
        mix=MIX,
        extra=EXTRA,
        share=0.5,
    )


def corpus():
    """The tokenizer and the token files of FULL."""
    tokenizer = mix_tokenizer(CORPUS, FULL.model.vocab_size, names=tuple(MIX))
    return tokenizer, mix_files(CORPUS / "tokens", tokenizer, names=tuple(MIX))


def speed(shape: str) -> float:
    """Steps a second of a shape, the median of twenty after a warm-up."""
    plan, (_, files) = recipe(shape, 1000), corpus()
    batches = MixedBatches(files, plan.schedule(), plan.batch, plan.context)
    optimizer = make_optimizer(steps=plan.steps, peak=plan.peak, warmup=plan.warmup)
    state = train_state(Llama(plan.model, key=jax.random.key(0)), optimizer)
    step, seconds = compile_step(make_step(next_token_loss, optimizer), state), []
    for cursor in range(26):
        start = time.perf_counter()
        state, metrics = step(state, batches(cursor), jax.random.key(0))
        metrics["loss"].block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 1 / sorted(seconds[6:])[10]


def shape_row(shape: str, seconds: int, factor: float = 1.0, b2: float = 0.99) -> dict:
    """One model, trained for so many seconds by its own speed; at another rate, for as many steps as at the first."""
    same = (
        r
        for r in stored()
        if r["part"] == "shape" and r["shape"] == shape and r["seconds"] == seconds
    )
    steps = int(seconds * speed(shape)) if factor == 1 else next(same)["steps"]
    plan = recipe(shape, steps, factor, b2)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokens").symlink_to(CORPUS / "tokens")
        (Path(folder) / "tokenizer.model").symlink_to(CORPUS / "tokenizer.model")
        *_, rows = train_mix(plan, folder)
    return {
        "parameters": count_params(plan.model),
        "steps": plan.steps,
        "tokens": rows[-1]["tokens"],
        "took": round(time.perf_counter() - start),
        "bits_per_byte": {k: round(v, 4) for k, v in rows[-1]["bits_per_byte"].items()},
    }


# What the trained models can do ------------------------------------------------------------------


def function_heads(n: int = 200) -> list[str]:
    """First lines of n functions from the held-out code, drawn by seed 0; each line once."""
    heads = {
        line + "\n"
        for split in ("validation", "test")
        for text in source_documents("code", split)
        for line in text.splitlines()
        if re.fullmatch(r"def \w+\(.*\).*:", line) and len(line) <= 100
    }
    return random.Random(0).sample(sorted(heads), n)


def body_of(head: str, written: str) -> str:
    """A function as far as it was written: up to the next line that is not indented, else to the last whole line."""
    lines = written.split("\n")
    ends = (i for i, line in enumerate(lines) if line.strip() and not line.startswith((" ", "\t")))
    return head + "\n".join(lines[: next(ends, len(lines) - 1)])


def parses(source: str) -> bool:
    """Whether Python's own parser takes it for one function."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return len(tree.body) == 1 and isinstance(tree.body[0], ast.FunctionDef)


def only_says(source: str) -> bool:
    """Whether a function that parses has nothing in it but text: a docstring, or `pass`, or ..."""
    body = ast.parse(source).body[0].body
    return all(
        isinstance(x, ast.Pass) or isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant)
        for x in body
    )


def write_by_model(model, tokenizer):
    """A function from prompts to continuations."""

    def write(prompts, most, temperature):
        found = []
        for at in range(0, len(prompts), 50):
            ids = [tokenizer.encode(p, bos=True) for p in prompts[at : at + 50]]
            sampler = Sampler(temperature)
            rows = generate(
                model, ids, max_tokens=most, sampler=sampler, stop_ids=tokenizer.stop_ids
            )
            found += [tokenizer.decode(row) for row in rows]
        return found

    return write


def write_by_counter(counter):
    """The same for a counter of bytes; a token of the models is taken for 2.5 bytes."""

    def write(prompts, most, temperature):
        random_numbers, found = np.random.default_rng(0), []
        for prompt in prompts:
            text = bytearray(prompt.encode())
            for _ in range(int(2.5 * most)):
                p = counter.probabilities(bytes(text[-6:]))
                if temperature == 0:
                    text.append(int(p.argmax()))
                else:
                    p = p ** (1 / temperature)
                    text.append(int(random_numbers.choice(256, p=p / p.sum())))
            found.append(bytes(text).decode(errors="replace")[len(prompt) :])
        return found

    return write


def functions(write_code, temperature: float) -> dict:
    """How many of the functions parse, begun by their first lines and continued at a temperature."""
    heads = function_heads()
    written = zip(heads, write_code(heads, 120, temperature), strict=True)
    good = [source for source in (body_of(*pair) for pair in written) if parses(source)]
    return {
        "functions": len(heads),
        "parse": len(good),
        "only say": sum(map(only_says, good)),
    }


def can_do(write_sums, write_code) -> dict:
    """How many of the sums are right, and how many of the functions parse."""
    problems = distinct_problems(600)
    answers = write_sums([p.prompt for p in problems], 70, 0.0)
    right = [parse_answer(text) == p.answer for text, p in zip(answers, problems, strict=True)]
    new = [p.new_wording for p in problems]
    return {
        "sums": len(problems),
        "right": sum(right),
        "right of the first forty": sum(right[:40]),
        "new": sum(new),
        "right new": sum(r for r, n in zip(right, new, strict=True) if n),
        **functions(write_code, 0.8),
    }


def greedy(contender: str) -> dict:
    """The functions once more, each token the most probable one."""
    return functions(write_by_model(*load(MODELS[contender])), 0.0)


def train_control() -> list[dict]:
    """The model of FULL on plays only, for as many steps as FULL is expected to read rows of them, in its folder: its log."""
    folder = MODELS["plays"]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(MODELS["full"] / "tokenizer.model", folder)
    only = {"mix": {"plays": 1.0}, "extra": {"plays": 1.0}}
    plan = dataclasses.replace(FULL, steps=CONTROL_STEPS, anneal=CONTROL_ANNEAL, **only)
    return train_mix(plan, folder)[2]


def opened(contender: str):
    """A contender's model and tokenizer; the control is trained first if it is not there."""
    if contender == "plays":
        train_control()
    return load(MODELS[contender])


def by_play(contender: str) -> dict:
    """Bits per byte of each held-out play: the whole, and by the models the speakers' labels and the rest."""
    if contender == "counters":
        counter = NGram(6).fit([play.text.encode() for play in plays("train")])
        judge = lambda play: {"whole": model_bits(counter, [play.text.encode()])}  # noqa: E731
    else:
        model, tokenizer = opened(contender)
        judge = lambda play: play_bits(model, tokenizer, play)  # noqa: E731
    return {
        split: {
            play.slug: {name: round(bits, 4) for name, bits in judge(play).items()}
            for play in plays(split)
        }
        for split in SPLITS
    }


def judged(contender: str) -> dict:
    """What a contender can do, and its bits per byte of the held-out pieces of every source and of the whole plays."""
    trained = {}
    texts = pieces(FULL.mix, "validation") | {"whole plays": [p.text for p in plays("validation")]}
    if contender == "counters":  # one for each source, told which source it is in
        counters = {
            name: NGram(6).fit([t.encode() for t in source_documents(name)]) for name in FULL.mix
        }
        counters["whole plays"] = counters["plays"]
        write = [write_by_counter(counters[name]) for name in ("arithmetic", "code")]

        def bits(name: str, found: list[str]) -> float:
            return round(model_bits(counters[name], [t.encode() for t in found]), 4)

    else:
        model, tokenizer = opened(contender)
        write = [write_by_model(model, tokenizer)] * 2

        def bits(name: str, found: list[str]) -> float:
            context = model.config.max_seq_len
            return round(bits_by_source(model, tokenizer, {name: found}, context)[name], 4)

        if contender == "plays":
            read = bits("plays", pieces(("plays",), "train")["plays"])
            trained = {"tokens": train_control()[-1]["tokens"], "training plays": read}

    return {
        "bits_per_byte": {name: bits(name, found) for name, found in texts.items()},
        "by piece": {name: [bits(name, [text]) for text in texts[name]] for name in FULL.mix},
        **can_do(*write),
        **trained,
    }


def stored() -> list[dict]:
    """The rows of results/full.json."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


PLAN = [
    *({"part": "shape", "seconds": s, "shape": x} for s, names in BUDGETS.items() for x in names),
    *({"part": "rate", "seconds": 100, "shape": "128x4", "factor": f} for f in (0.125, 0.25, 0.5)),
    *(
        {"part": "b2", "seconds": 100, "shape": "64x3", "factor": 0.5, "b2": b2}
        for b2 in (0.99, 0.999)
    ),
    *({"part": "judge", "contender": name} for name in CONTENDERS),
    {"part": "greedy", "contender": "full"},
    *({"part": "test", "contender": name} for name in CONTENDERS),
]
MAKE = {"shape": shape_row, "rate": shape_row, "b2": shape_row, "judge": judged}
MAKE |= {"greedy": greedy, "test": by_play}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=MAKE, help="only this part")
    parser.add_argument("--fresh", action="store_true", help="also make the rows that are there")
    parser.add_argument("--only", nargs="+", help="only these shapes or contenders")
    options = parser.parse_args()
    for keys in PLAN:
        part, name = keys["part"], keys.get("shape", keys.get("contender"))
        unwanted = options.part not in (None, part) or options.only and name not in options.only
        there = any(keys.items() <= row.items() for row in stored())
        if unwanted or there and not options.fresh:
            continue
        new = keys | MAKE[part](**{k: v for k, v in keys.items() if k != "part"})
        rows = [row for row in stored() if not keys.items() <= row.items()] + [new]
        rows.sort(key=lambda row: next(i for i, k in enumerate(PLAN) if k.items() <= row.items()))
        body = ",\n".join("  " + json.dumps(row) for row in rows)
        RESULTS.write_text(f'{{"command": "{COMMAND}",\n "rows": [\n{body}\n]}}\n')
        print(new, flush=True)


if __name__ == "__main__":
    main()
