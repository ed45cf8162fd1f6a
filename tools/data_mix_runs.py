"""Make chapter 21's stored runs: mixes at three sizes, late and early sources, a pile sorted, into results/data_mix.json.

`python tools/data_mix_runs.py` makes the rows that are missing (about twenty minutes on two cores from nothing),
`--part NAME` one part of mixes, order, pile, check; `--fresh` makes them again. Chapter 21 reads the file and makes the last row
again.
"""

import argparse
import functools
import json
import tempfile
from pathlib import Path

import jax

from llm_from_scratch.data_mix import (
    PAPER_MIX,
    SOURCES,
    KindClassifier,
    MixedBatches,
    TokenFile,
    byte_sample,
    chunks,
    mix_files,
    mix_tokenizer,
    source_documents,
    write_tokens,
)
from llm_from_scratch.llama import Llama, LlamaConfig
from llm_from_scratch.pretraining import make_optimizer, model_bits_per_byte, next_token_loss
from llm_from_scratch.training import fit

RESULTS = Path(__file__).resolve().parents[1] / "results" / "data_mix.json"
COMMAND = ".venv/bin/python tools/data_mix_runs.py"
STEPS, BATCH, CONTEXT, SIZE = 300, 8, 128, 1_000_000
FOLDER = Path(tempfile.mkdtemp())


@functools.cache
def tokenizer():
    """1,024 ids, trained on equal bytes of every source."""
    return mix_tokenizer(FOLDER / "mix", 1024)


@functools.cache
def files():
    """Up to a million bytes of every source's training split."""
    return mix_files(FOLDER / "tokens", tokenizer(), size=SIZE)


@functools.cache
def held_out():
    """Validation text by kind: 8 KB of a source at most, so that all kinds cost the same time."""
    texts = {name: byte_sample(source_documents(name, "validation"), 8_000) for name in SOURCES}
    return {
        "plays": texts["plays"],
        "docs": texts["docs"],
        "mathematics": texts["arithmetic"],
        "code": texts["code"],
        "multilingual": texts["latin"],
    }


def train(sources, schedule, width, seed, *, steps=STEPS, peak=None):
    """Train a two-layer Llama of this width; its bits per byte on every kind of validation text.

    `peak`: the highest learning rate; None for 0.32 / width.
    """
    heads = width // 16
    config = LlamaConfig(
        1024, width, 2, heads, heads, 8 * width // 3, 16, tie_embeddings=True, max_seq_len=CONTEXT
    )
    optimizer = make_optimizer(steps=steps, peak=peak or 0.32 / width, warmup=20)
    batches = MixedBatches(sources, schedule, BATCH, CONTEXT, seed)
    model = Llama(config, key=jax.random.key(seed))
    state, _ = fit(model, next_token_loss, batches, optimizer, steps=steps, seed=seed)
    return {
        kind: round(model_bits_per_byte(state.model, tokenizer(), texts, context=CONTEXT), 4)
        for kind, texts in held_out().items()
    }


# Candidate mixes ---------------------------------------------------------------------------------


def kinds(general, mathematics, code, latin):
    """Shares by kind → by source; the general part is divided as in the paper's mix of chapter 21."""
    inside = {name: share / 0.5 for name, share in PAPER_MIX.items()}
    general_part = {n: general * inside[n] for n in ("plays", "poems", "folio", "docs")}
    return general_part | {"arithmetic": mathematics, "code": code, "latin": latin}


MIXES = {
    "paper": kinds(0.50, 0.25, 0.17, 0.08),
    "general": kinds(0.76, 0.08, 0.08, 0.08),
    "code": kinds(0.30, 0.10, 0.52, 0.08),
    "mathematics": kinds(0.25, 0.50, 0.17, 0.08),
    "no latin": kinds(0.50, 0.25, 0.25, 0.00),
}
SMALL, LARGE = (32, 64), 128
SMALL_SEEDS, LARGE_SEEDS = (0, 1, 2), (10, 11, 12)
LARGE_MIXES = [name for name in MIXES if name != "no latin"]  # the small models put it behind


def mix_row(arm, seed):
    name, width = arm.rsplit(" ", 1)
    return train(files(), [(0, MIXES[name])], int(width), seed)


# The order of reading ----------------------------------------------------------------------------

# These and the runs of the pile: a calmer rate, since at 0.01 some seeds stayed on a plateau.
# Chosen on seeds 98 and 99 of "even" alone; predictions are in the chapter, committed before the runs.
CALM = {"width": 64, "steps": 500, "peak": 0.003}
HALF = CALM["steps"] // 2

# code and plays, half of each in all: evenly, code late, code early
ORDERS = {
    "even": [(0, {"plays": 0.5, "code": 0.5})],
    "late": [(0, {"plays": 0.75, "code": 0.25}), (HALF, {"plays": 0.25, "code": 0.75})],
    "early": [(0, {"plays": 0.25, "code": 0.75}), (HALF, {"plays": 0.75, "code": 0.25})],
}


def order_row(arm, seed):
    return train(files(), ORDERS[arm], seed=seed, **CALM)


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
    return train(parts, [(0, weights)], seed=seed, **CALM)


def check_row(arm, seed):
    """A run of 100 steps, short enough to end alike on every processor: chapter 21 makes it again."""
    return train(files(), [(0, PAPER_MIX)], 32, seed, steps=100, peak=0.003)


PARTS = {
    "mixes": (
        mix_row,
        {f"{name} {width}": SMALL_SEEDS for width in SMALL for name in MIXES}
        | {f"{name} {LARGE}": LARGE_SEEDS for name in LARGE_MIXES},
    ),
    "order": (order_row, dict.fromkeys(ORDERS, (0, 1, 2, 3, 4))),
    "pile": (pile_row, dict.fromkeys(("as found", "down-sampled"), (0, 1, 2, 3, 4))),
    "check": (check_row, {"check": (0,)}),
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
    for part, arm, seed in keys:
        if part not in wanted or ((arm, seed) in rows and not options.fresh):
            continue
        row = {"part": part, "arm": arm, "seed": seed} | PARTS[part][0](arm, seed)
        rows[arm, seed] = row
        ordered = [rows[a, s] for _, a, s in keys if (a, s) in rows]
        body = ",\n".join("  " + json.dumps(row) for row in ordered)
        RESULTS.write_text(f'{{"command": "{COMMAND}",\n "rows": [\n{body}\n]}}\n')
        print(row, flush=True)


if __name__ == "__main__":
    main()
