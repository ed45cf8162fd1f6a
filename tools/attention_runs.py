"""Train chapter 05's translators and self-attention blocks, three seeds each, into results/attention.json.

`python tools/attention_runs.py` makes the rows that are missing (about six minutes on two cores from
nothing), `--arm NAME` one arm, `--fresh` all of them again. The weights of the first go to
results/attention.safetensors, in half precision. Chapter 05 reads both.
"""

import argparse
import dataclasses
import functools
import json
import math
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from llm_from_scratch.attention import (
    CharVocabulary,
    MultiHeadAttention,
    PairBatches,
    Translator,
    TranslatorConfig,
    bleu,
    causal_mask,
    changed_words,
    chrf,
    exact_lines,
    translate,
    translation_loss,
    twin_pairs,
)
from llm_from_scratch.training import count_parameters, fit, is_trainable, save_weights

RESULTS = Path(__file__).resolve().parents[1] / "results" / "attention.json"
WEIGHTS = RESULTS.with_suffix(".safetensors")
COMMAND = ".venv/bin/python tools/attention_runs.py"
SEEDS = (0, 1, 2)
MAX_LEN, BATCH, RATE, WARMUP = 32, 32, 8e-3, 100
BINS = ((1, 12), (13, 18), (19, 24), (25, 32))  # characters of the old line

# Translation -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arm:
    """A translator and how long it trains; the arm without attention has a wider decoder instead."""

    score: str
    steps: int = 600
    decoder_dim: int = 96


ARMS = {
    "additive": Arm("additive"),
    "dot": Arm("dot"),
    "fixed": Arm("fixed", decoder_dim=102),
    "fixed, 3 times the steps": Arm("fixed", steps=1800, decoder_dim=102),
}


@functools.cache
def data(split):
    """The pairs of lines of at most MAX_LEN characters on both sides."""
    return [p for p in twin_pairs(split) if max(len(p.old), len(p.modern)) <= MAX_LEN]


def codec():
    return CharVocabulary.from_pairs(data("train"))


def optimizer(steps, rate=RATE):
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, WARMUP, steps, 0.02 * rate)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def train_translator(arm, seed):
    """The trained model, its batches and its log."""
    batches = PairBatches(data("train"), codec(), BATCH, max_len=MAX_LEN, seed=seed)
    config = TranslatorConfig(
        batches.codec.vocab_size, score=arm.score, decoder_dim=arm.decoder_dim
    )
    model = Translator(config, key=jax.random.key(seed))
    state, rows = fit(
        model, translation_loss, batches, optimizer(arm.steps), steps=arm.steps, log_every=100
    )
    return state.model, batches, rows


def scores(old, lines, references):
    """Every score of some translations, the changed and the kept words included."""
    changed, kept = changed_words(old, lines, references)
    return {
        "chrf": chrf(lines, references),
        "bleu": bleu(lines, references),
        "exact": 100 * exact_lines(lines, references),
        "changed": 100 * changed,
        "kept": 100 * kept,
    }


def translator_row(name, seed):
    arm = ARMS[name]
    model, batches, rows = train_translator(arm, seed)
    if (name, seed) == ("additive", 0):
        halved = jax.tree.map(lambda x: x.astype(jnp.float16) if is_trainable(x) else x, model)
        save_weights(WEIGHTS, halved)
    pairs = data("validation")
    lines = translate(model, batches, pairs)
    old, modern = [p.old for p in pairs], [p.modern for p in pairs]
    by_length = []
    for low, high in BINS:
        chosen = [i for i, line in enumerate(old) if low <= len(line) <= high]
        by_length.append(chrf([lines[i] for i in chosen], [modern[i] for i in chosen]))
    return {
        "parameters": count_parameters(model),
        "settings": dataclasses.asdict(arm) | {"batch": BATCH, "rate": RATE, "max_len": MAX_LEN},
        "loss": [round(row["loss"], 4) for row in rows],
        **scores(old, lines, modern),
        "chrf_by_length": by_length,
    }


# A self-attention block, and what its parts are worth ---------------------------------------------

WIDTH, CONTEXT, BLOCK_BATCH, BLOCK_STEPS = 32, 32, 32, 300
PARTS = {
    "whole block": {},
    "no positions": {"positions": False},
    "no non-linearity": {"bend": False},
    "no future mask": {"masked": False},
    "no scale": {"scaled": False},
    "no residual": {"residual": False},
}


class MinimalBlock(eqx.Module):
    """The language model of the CS224N note: two layers of self-attention, with parts to leave out."""

    table: jax.Array
    places: jax.Array
    attention: list
    up: jax.Array
    down: jax.Array
    head: jax.Array
    positions: bool = eqx.field(static=True)
    bend: bool = eqx.field(static=True)
    masked: bool = eqx.field(static=True)
    scaled: bool = eqx.field(static=True)
    residual: bool = eqx.field(static=True)

    def __init__(
        self, vocab, *, positions=True, bend=True, masked=True, scaled=True, residual=True, key
    ):
        keys = jax.random.split(key, 7)
        self.table = jax.random.normal(keys[0], (vocab, WIDTH))
        self.places = jax.random.normal(keys[1], (CONTEXT + 1, WIDTH))
        self.attention = [MultiHeadAttention(WIDTH, 2, key=k) for k in keys[2:4]]
        self.up = jax.random.normal(keys[4], (2, 4 * WIDTH, WIDTH)) / math.sqrt(WIDTH)
        self.down = jax.random.normal(keys[5], (2, WIDTH, 4 * WIDTH)) / math.sqrt(4 * WIDTH)
        self.head = 0.1 * jax.random.normal(keys[6], (vocab, WIDTH)) / math.sqrt(WIDTH)
        self.positions, self.bend, self.masked = positions, bend, masked
        self.scaled, self.residual = scaled, residual

    def __call__(self, tokens):
        x = self.table[tokens]
        if self.positions:
            x = x + self.places[: len(tokens)]
        mask = causal_mask(len(tokens)) if self.masked else None
        for i, layer in enumerate(self.attention):
            if not self.scaled:  # undo the division by √Dh
                factor = math.sqrt(WIDTH // layer.n_heads)
                layer = eqx.tree_at(lambda m: m.wq, layer, layer.wq * factor)
            x = layer(norm(x), mask=mask) + (x if self.residual else 0.0)
            h = norm(x) @ self.up[i].T
            h = (jax.nn.relu(h) if self.bend else h) @ self.down[i].T
            x = h + (x if self.residual else 0.0)
        return jax.nn.log_softmax(norm(x) @ self.head.T)


def norm(x):
    """Layer norm without gain and bias."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)


def block_loss(model, batch, key):
    """Nats per character of the modern lines, as a language model: the Folio line is not looked at."""
    log_probs = jax.vmap(model)(batch["tokens"])
    targets = batch["targets"]
    chosen = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    count = jnp.sum(targets >= 0)
    return -jnp.sum(jnp.where(targets >= 0, chosen, 0.0)) / count, count


def block_row(name, seed):
    batches = PairBatches(data("train"), codec(), BLOCK_BATCH, max_len=MAX_LEN, seed=seed)
    model = MinimalBlock(batches.codec.vocab_size, **PARTS[name], key=jax.random.key(seed))
    state, _ = fit(
        model, block_loss, batches, optimizer(BLOCK_STEPS, 5e-3), steps=BLOCK_STEPS, log_every=100
    )
    held_out = batches.padded(data("validation"))
    loss, _ = eqx.filter_jit(block_loss)(state.model, held_out, None)
    return {
        "parameters": count_parameters(model),
        "settings": PARTS[name] | {"steps": BLOCK_STEPS, "batch": BLOCK_BATCH, "rate": 5e-3},
        "bits": float(loss) / math.log(2),
    }


# The file ----------------------------------------------------------------------------------------


def read():
    """The stored rows: (arm, seed) → row."""
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    return {(row["arm"], row["seed"]): row for row in rows}


def write(rows):
    order = [*ARMS, *PARTS]
    kept = sorted(rows.values(), key=lambda row: (order.index(row["arm"]), row["seed"]))
    RESULTS.write_text(json.dumps({"command": COMMAND, "rows": kept}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=[*ARMS, *PARTS])
    parser.add_argument("--fresh", action="store_true")
    asked = parser.parse_args()
    rows = {} if asked.fresh and not asked.arm else read()
    for name in [asked.arm] if asked.arm else [*ARMS, *PARTS]:
        for seed in SEEDS:
            if (name, seed) in rows and not asked.fresh:
                continue
            made = (translator_row if name in ARMS else block_row)(name, seed)
            rows[name, seed] = {"arm": name, "seed": seed, **made}
            write(rows)
            shown = {k: v for k, v in made.items() if isinstance(v, float | int)}
            print(name, seed, {k: round(v, 2) for k, v in shown.items()}, flush=True)


if __name__ == "__main__":
    main()
