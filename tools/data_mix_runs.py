"""Make chapter 21's stored runs: rates, mixes at three sizes, the order of reading, a pile, arithmetic, into results/data_mix.json.

`python tools/data_mix_runs.py` makes the rows that are missing (about an hour of one core from nothing),
`--part NAME` one part of rates, mixes, order, pile, arithmetic; `--fresh` makes them again. A finished row is stored at
once, and the arithmetic run also keeps checkpoints in .cache, so the command may be stopped at any moment. Chapter 21
reads the file and makes one row of the mixes again.
"""

import argparse
import functools
import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

from llm_from_scratch.data_mix import (
    KINDS,
    PAPER_MIX,
    KindClassifier,
    MixedBatches,
    TokenFile,
    arithmetic,
    byte_sample,
    chunks,
    distinct_problems,
    held_out,
    mix_files,
    mix_of_kinds,
    mix_tokenizer,
    parse_answer,
    source_documents,
    write_tokens,
)
from llm_from_scratch.generation import generate
from llm_from_scratch.llama import Llama, LlamaConfig
from llm_from_scratch.pretraining import make_optimizer, model_bits_per_byte, next_token_loss
from llm_from_scratch.training import fit

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "data_mix.json"
COMMAND = ".venv/bin/python tools/data_mix_runs.py"
STEPS, BATCH, CONTEXT, SIZE = 600, 4, 128, 1_000_000
FOLDER = Path(tempfile.mkdtemp())


@functools.cache
def tokenizer(size=1024):
    """A tokenizer trained on equal bytes of every source."""
    return mix_tokenizer(FOLDER / f"mix-{size}", size)


@functools.cache
def files():
    """Up to a million bytes of every source's training split."""
    return mix_files(FOLDER / "tokens", tokenizer(), size=SIZE)


def judged_on(size=16_000):
    """Validation text by kind, `size` bytes of a source at most, so that all kinds cost the same time."""
    names = {"plays": "plays", "docs": "docs", "mathematics": "arithmetic", "code": "code"}
    names["multilingual"] = "french"
    return {kind: held_out(name, size) for kind, name in names.items()}


def model_of(width, seed):
    """A two-layer Llama of this width, 1,024 ids."""
    heads = width // 16
    config = LlamaConfig(
        1024, width, 2, heads, heads, 8 * width // 3, 16, tie_embeddings=True, max_seq_len=CONTEXT
    )
    return Llama(config, key=jax.random.key(seed))


def scores(model, size=16_000):
    """Bits per byte of a model on every kind of validation text."""
    return {
        kind: round(model_bits_per_byte(model, tokenizer(), texts, context=CONTEXT), 4)
        for kind, texts in judged_on(size).items()
    }


def train(sources, schedule, width, seed, peak, *, steps=STEPS):
    """Train a model of this width on a mix; its bits per byte on every kind of validation text."""
    optimizer = make_optimizer(steps=steps, peak=peak, warmup=50)
    batches = MixedBatches(sources, schedule, BATCH, CONTEXT, seed)
    state, _ = fit(
        model_of(width, seed), next_token_loss, batches, optimizer, steps=steps, seed=seed
    )
    return scores(state.model)


# Rates -------------------------------------------------------------------------------------------

# three rates for each width, on a seed that no other part uses, all on the paper's mix
RATES = {
    32: (0.003, 0.006, 0.012),
    48: (0.0015, 0.003, 0.006),
    96: (0.00075, 0.0015, 0.003, 0.006),
}


def rate_row(arm, seed):
    _, width, rate = arm.split()
    return train(files(), [(0, PAPER_MIX)], int(width), seed, float(rate))


# Candidate mixes ---------------------------------------------------------------------------------


# shares of general, mathematics, code, multilingual; a kind is divided as in the paper's mix of chapter 21
MIXES = {
    "paper": (0.50, 0.25, 0.17, 0.08),
    "general": (0.76, 0.08, 0.08, 0.08),
    "code": (0.30, 0.10, 0.52, 0.08),
    "mathematics": (0.25, 0.50, 0.17, 0.08),
}
SEEDS = {32: range(5), 48: range(5), 96: range(10, 15)}  # the large runs have seeds of their own


def calm_rate(width):
    """The smallest rate of the stored rows of part "rates" whose mean over the kinds is within 0.02 of the best."""
    rows = [row for row in stored() if row["arm"].startswith(f"rate {width} ")]
    if len(rows) < len(RATES[width]):
        raise SystemExit("the mixes need the rates: run --part rates first")
    score = {
        float(r["arm"].split()[2]): (
            (r["plays"] + r["docs"]) / 2 + r["mathematics"] + r["code"] + r["multilingual"]
        )
        / 4
        for r in rows
    }
    return min(rate for rate, bits in score.items() if bits < min(score.values()) + 0.02)


def mix_row(arm, seed):
    name, width = arm.rsplit(" ", 1)
    shares = mix_of_kinds(dict(zip(KINDS, MIXES[name], strict=True)))
    return train(files(), [(0, shares)], int(width), seed, calm_rate(int(width)))


# The order of reading ----------------------------------------------------------------------------

# Half code and half plays for TRUNK steps, once for each seed; then three ways on from the same checkpoint, with the
# same totals. The rate is constant after the warm-up, so that late text is not read with smaller steps.
TRUNK, BRANCH, ORDER_WIDTH = 600, 400, 64
HALF = {"plays": 0.5, "code": 0.5}
MUCH, LITTLE = {"plays": 0.1, "code": 0.9}, {"plays": 0.9, "code": 0.1}
ORDERS = {"even": (HALF, HALF), "late": (LITTLE, MUCH), "early": (MUCH, LITTLE)}


def order_schedule(arm):
    first, second = ORDERS[arm]
    return [(0, HALF), (TRUNK, first), (TRUNK + BRANCH // 2, second)]


def order_row(arm, seed):
    optimizer = make_optimizer(steps=TRUNK + BRANCH, peak=0.003, warmup=50, floor=1.0)
    options = {"seed": seed, "directory": FOLDER / f"{arm}-{seed}"}
    trunk = FOLDER / f"trunk-{seed}"

    def run(steps, **options):
        batches = MixedBatches(files(), order_schedule(arm), BATCH, CONTEXT, seed)
        return fit(
            model_of(ORDER_WIDTH, seed), next_token_loss, batches, optimizer, steps=steps, **options
        )[0].model

    if not trunk.exists():
        run(TRUNK, **options | {"directory": trunk})
    shutil.copytree(trunk, options["directory"], dirs_exist_ok=True)
    return scores(run(TRUNK + BRANCH, **options), 64_000)


# A pile without labels ---------------------------------------------------------------------------

LABELS = {"plays": "plays", "docs": "docs", "arithmetic": "mathematics", "code": "code"}
PILE = {"plays": 0.85, "docs": 0.05, "arithmetic": 0.05, "code": 0.05}
PILE_BYTES = 2_000_000


@functools.cache
def pile():
    """A shuffled pile, 85 % plays, with the true kinds, and a classifier fitted to other text.

    The classifier learns from the first fifth of each source, the pile is made of the rest.
    """
    labelled, examples = [], {}
    for name, share in PILE.items():
        pieces = chunks(source_documents(name), 500)
        cut = len(pieces) // 5  # the first fifth is for the classifier, the rest for the pile
        examples[LABELS[name]] = byte_sample(pieces[:cut], 150_000)
        labelled += [
            (LABELS[name], text)
            for text in byte_sample(pieces[cut:], int(share * PILE_BYTES), seed=1)
        ]
    return labelled, KindClassifier.fit(examples)


@functools.cache
def sorted_pile():
    """The pile by *predicted* kind, as token files, and the share of each kind in it."""
    labelled, classify = pile()
    found = {}
    for _, text in labelled:
        found.setdefault(classify(text), []).append(text)
    parts = {}
    for kind, texts in found.items():
        write_tokens(FOLDER / f"pile-{kind}", texts, tokenizer())
        parts[kind] = TokenFile.open(FOLDER / f"pile-{kind}", tokenizer())
    total = sum(len(part.ids) for part in parts.values())
    return parts, {kind: len(part.ids) / total for kind, part in parts.items()}


def pile_row(arm, seed):
    parts, natural = sorted_pile()
    weights = natural if arm == "as found" else dict.fromkeys(natural, 1 / len(natural))
    return train(parts, [(0, weights)], 64, seed, 0.003, steps=1000)


# Arithmetic --------------------------------------------------------------------------------------

# Can a model of a million weights learn the sums of the generator, with the 4,096 ids of the full mix?
SUMS = {"steps": 2400, "batch": 8, "width": 128, "layers": 3, "peak": 0.003, "every": 400}


def answered(model, problems):
    """Which problems a model works out right, greedily from their prompts."""
    ids = tokenizer(4096)
    written = []
    for at in range(0, len(problems), 50):
        prompts = [ids.encode(p.prompt, bos=True) for p in problems[at : at + 50]]
        written += generate(model, prompts, max_tokens=70, stop_ids=ids.stop_ids)
    return [parse_answer(ids.decode(w)) == p.answer for w, p in zip(written, problems, strict=True)]


def sums_row(arm, seed):
    ids, c = tokenizer(4096), SUMS
    width = c["width"]
    config = LlamaConfig(
        4096,
        width,
        c["layers"],
        4,
        4,
        8 * width // 3,
        width // 4,
        tie_embeddings=True,
        max_seq_len=256,
    )
    parts = mix_files(FOLDER / "tokens-4096", ids, names=["arithmetic"])
    optimizer = make_optimizer(steps=c["steps"], peak=c["peak"], warmup=50)
    batches = MixedBatches(parts, [(0, {"arithmetic": 1.0})], c["batch"], CONTEXT, seed)
    upto = int(arm.split()[1])
    model = fit(
        Llama(config, key=jax.random.key(seed)),
        next_token_loss,
        batches,
        optimizer,
        steps=upto,
        seed=seed,
        directory=ROOT / ".cache" / "data_mix" / f"sums-{seed}",
    )[0].model
    problems = arithmetic(200, "validation")
    if upto == c["steps"]:  # the finished model works on the test problems
        problems = distinct_problems(600)
    right = np.array(answered(model, problems))
    new = np.array([p.new_wording for p in problems])
    row = {"problems": len(problems), "right": int(right.sum())}
    row |= {"n new": int(new.sum()), "right new": int(right[new].sum())}
    for sign in "+-*<":
        of = np.array([p.operation == sign for p in problems])
        row |= {f"n {sign}": int(of.sum()), f"right {sign}": int(right[of].sum())}
        row |= {
            f"n new {sign}": int((of & new).sum()),
            f"right new {sign}": int(right[of & new].sum()),
        }
    return row


PARTS = {
    "rates": (
        rate_row,
        {f"rate {w} {r}": (98,) for w, rates in RATES.items() for r in rates},
    ),
    "mixes": (mix_row, {f"{name} {w}": seeds for w, seeds in SEEDS.items() for name in MIXES}),
    "order": (order_row, dict.fromkeys(ORDERS, range(5))),
    "pile": (pile_row, dict.fromkeys(("as found", "down-sampled"), range(5))),
    "arithmetic": (
        sums_row,
        {f"sums {n}": (0,) for n in range(SUMS["every"], SUMS["steps"] + 1, SUMS["every"])},
    ),
}


def stored():
    """The rows of results/data_mix.json."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="only this part")
    parser.add_argument("--fresh", action="store_true", help="also make the rows that are there")
    options = parser.parse_args()
    wanted = [options.part] if options.part else list(PARTS)
    rows = {(row["arm"], row["seed"]): row for row in stored()}
    keys = [(p, arm, seed) for p in PARTS for arm, seeds in PARTS[p][1].items() for seed in seeds]
    turn = {(p, arm, seed): list(PARTS[p][1][arm]).index(seed) for p, arm, seed in keys}
    for part, arm, seed in sorted(
        keys, key=turn.get
    ):  # the first seed of every arm, then the second
        if part not in wanted or ((arm, seed) in rows and not options.fresh):
            continue
        row = {"part": part, "arm": arm, "seed": seed} | PARTS[part][0](arm, seed)
        rows = {(r["arm"], r["seed"]): r for r in stored()}  # another part may run beside this
        rows[arm, seed] = row
        ordered = [rows[a, s] for _, a, s in keys if (a, s) in rows]
        body = ",\n".join("  " + json.dumps(row) for row in ordered)
        plan = json.dumps({"steps": STEPS, "batch": BATCH, "mixes": MIXES})
        RESULTS.write_text(
            f'{{"command": "{COMMAND}",\n "plan": {plan},\n "rows": [\n{body}\n]}}\n'
        )
        print(row, flush=True)


if __name__ == "__main__":
    main()
