"""Train chapter 06's translators, norm orders and position schemes, three seeds each, into results/transformer.json.

`python tools/transformer_runs.py` makes the rows that are missing (about eight minutes on two cores from
nothing), `--arm NAME` one arm, `--fresh` all of them again. The averaged weights of the first translator go to
results/transformer.safetensors, in half precision. Chapter 06 reads both and makes one of the rows again.
"""

import argparse
import functools
import json
import math
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_from_scratch.attention import (
    CharVocabulary,
    MultiHeadAttention,
    PairBatches,
    bleu,
    chrf,
    exact_lines,
    twin_pairs,
)
from llm_from_scratch.training import count_parameters, fit, is_trainable, save_weights
from llm_from_scratch.transformer import (
    EncoderLayer,
    LayerNorm,
    Transformer,
    TransformerConfig,
    average,
    noam_schedule,
    search,
    sequence_loss,
    sinusoidal_positions,
    smoothed_cross_entropy,
)

RESULTS = Path(__file__).resolve().parents[1] / "results" / "transformer.json"
WEIGHTS = RESULTS.with_suffix(".safetensors")
COMMAND = ".venv/bin/python tools/transformer_runs.py"
SEEDS = (0, 1, 2)
MAX_LEN = 32

# Translation -------------------------------------------------------------------------------------

STEPS, BATCH, WARMUP, FACTOR = 1000, 32, 300, 0.8
KEPT = (800, 850, 900, 950, 1000)  # the checkpoints that are averaged
SMOOTHINGS = {"smoothing 0.1": 0.1, "smoothing 0": 0.0}
SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 256, "dropout": 0.0}


@functools.cache
def data(split, longest=MAX_LEN):
    """The pairs of lines of at most `longest` characters on both sides."""
    return [p for p in twin_pairs(split) if max(len(p.old), len(p.modern)) <= longest]


def codec():
    return CharVocabulary.from_pairs(data("train"))


def adam(dim, warmup, factor):
    """The paper's optimiser, §5.3."""
    return optax.adam(noam_schedule(dim, warmup, factor), b1=0.9, b2=0.98, eps=1e-9)


def lines(model, batches, pairs, **options):
    """The modern lines that the model gives for the old ones."""
    sources = batches.padded(pairs)["source"]
    ends = {"bos": batches.codec.bos_id, "eos": batches.codec.eos_id}
    found, _ = search(model, sources, max_len=batches.max_len + 1, **ends, **options)
    return [batches.codec.decode(row) for row in np.asarray(found)]


@eqx.filter_jit
def predictions(model, batch):
    """For each target: nats, the largest probability, and whether it is the target's."""
    logits = jax.vmap(model)(batch["source"], batch["tokens"])
    nats = jax.vmap(lambda z, t: smoothed_cross_entropy(z, t, 0.0))(logits, batch["targets"])
    return nats, jax.nn.softmax(logits).max(-1), logits.argmax(-1) == batch["targets"]


def calibration_error(confidence, right, bins=10):
    """The mean over bins, by size, of |mean confidence − share right|."""
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    parts = [(which == b) for b in range(bins)]
    return sum(abs(confidence[p].mean() - right[p].mean()) * p.mean() for p in parts if p.any())


def translation_row(name, seed):
    batches = PairBatches(data("train"), codec(), BATCH, max_len=MAX_LEN, seed=seed)
    config = TransformerConfig(batches.codec.vocab_size, **SHAPE)
    model = Transformer(config, key=jax.random.key(seed))
    kept = []

    def keep(model):
        kept.append(jax.tree.map(lambda x: jnp.array(x) if is_trainable(x) else x, model))
        return {}

    loss = functools.partial(sequence_loss, smoothing=SMOOTHINGS[name])
    state, rows = fit(
        model,
        loss,
        batches,
        adam(config.dim, WARMUP, FACTOR),
        steps=STEPS,
        seed=seed,
        evaluate=keep,
        eval_every=50,
        log_every=50,
    )
    averaged = average(kept[-len(KEPT) :])
    pairs = data("validation")
    modern = [p.modern for p in pairs]
    nats, confidence, right = map(np.asarray, predictions(averaged, batches.padded(pairs)))
    asked = batches.padded(pairs)["targets"] >= 0
    last, best = (lines(m, batches, pairs, beam=1) for m in (state.model, averaged))
    if (name, seed) == ("smoothing 0.1", 0):
        halved = jax.tree.map(lambda x: x.astype(jnp.float16) if is_trainable(x) else x, averaged)
        save_weights(WEIGHTS, halved)
    return {
        "parameters": count_parameters(model),
        "settings": SHAPE | {"smoothing": SMOOTHINGS[name], "steps": STEPS, "batch": BATCH},
        "characters": batches.codec.characters,
        "loss": [round(row["loss"], 4) for row in rows],
        "chrf": chrf(best, modern),
        "bleu": bleu(best, modern),
        "exact": 100 * exact_lines(best, modern),
        "chrf_last": chrf(last, modern),
        "nats": float(nats[asked].mean()),
        "calibration_error": float(calibration_error(confidence[asked], right[asked])),
        "accuracy": float(right[asked].mean()),
    }


# The two orders of norm, by depth, without warm-up -----------------------------------------------

DEPTHS = (2, 6, 12)
NORM_STEPS, NORM_RATE, NORM_LENGTH, DIGITS = 150, 3e-3, 12, 10
NORMS = {f"{order}-norm, {n} layers": (order, n) for n in DEPTHS for order in ("post", "pre")}


class Reverser(eqx.Module):
    """An encoder that reads digits and says them backwards."""

    table: jax.Array
    layers: list[EncoderLayer]
    norm: LayerNorm | None
    head: jax.Array

    def __init__(self, order, n_layers, *, key):
        for_table, for_head, for_layers = jax.random.split(key, 3)
        config = TransformerConfig(
            DIGITS, 32, n_layers, 4, 64, dropout=0.0, pre_norm=order == "pre"
        )
        self.table = jax.random.normal(for_table, (DIGITS, 32))
        self.layers = [EncoderLayer(config, key=k) for k in jax.random.split(for_layers, n_layers)]
        self.norm = LayerNorm(32) if order == "pre" else None
        self.head = 0.1 * jax.random.normal(for_head, (DIGITS, 32)) / math.sqrt(32)

    def __call__(self, digits):
        x = self.table[digits] + sinusoidal_positions(len(digits), 32)
        for layer in self.layers:
            x = layer(x)
        return (x if self.norm is None else self.norm(x)) @ self.head.T


def digit_batch(seed, size=32):
    def batch(cursor):
        draw = np.random.default_rng([seed, cursor])
        digits = draw.integers(0, DIGITS, (size, NORM_LENGTH)).astype(np.int32)
        return {"digits": digits, "targets": digits[:, ::-1].copy()}

    return batch


def reverse_loss(model, batch, key=None):
    logits = jax.vmap(model)(batch["digits"])
    return jnp.mean(
        jax.vmap(lambda z, t: smoothed_cross_entropy(z, t, 0.0))(logits, batch["targets"])
    )


@eqx.filter_jit
def said(model, digits):
    return jax.vmap(model)(digits).argmax(-1)


def norm_row(name, seed):
    order, n_layers = NORMS[name]
    model = Reverser(order, n_layers, key=jax.random.key(seed))
    optimizer = optax.adam(NORM_RATE, b1=0.9, b2=0.98, eps=1e-9)
    state, rows = fit(
        model, reverse_loss, digit_batch(seed), optimizer, steps=NORM_STEPS, seed=seed, log_every=10
    )
    test = digit_batch(1000, 256)(0)
    right = np.asarray(said(state.model, test["digits"]))
    return {
        "settings": {"order": order, "layers": n_layers, "steps": NORM_STEPS, "rate": NORM_RATE},
        "loss": [round(row["loss"], 4) for row in rows],
        "nats": float(reverse_loss(state.model, test)),
        "accuracy": float((right == test["targets"]).mean()),
    }


# Positions: trained on lines of up to 20 characters, read on longer ones -------------------------

SHORT, POSITION_STEPS, POSITION_WARMUP = 20, 500, 150


class NoPositions(Transformer):
    def positions(self, length):
        return jnp.zeros((length, self.config.dim))


class LearnedPositions(Transformer):
    places: jax.Array

    def __init__(self, config, *, key):
        super().__init__(config, key=key)
        draws = jax.random.normal(jax.random.fold_in(key, 1), (MAX_LEN + 1, config.dim))
        self.places = draws / math.sqrt(2)  # the size of sines

    def positions(self, length):
        return self.places[:length]


def rotate(x):
    """Rotary positions: turn the pair (i, i + Dh/2) of row t by the angle t · 10000^(−2i/Dh)."""
    half = x.shape[-1] // 2
    frequency = 10_000 ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency[None]
    cos, sin = jnp.cos(angle)[None], jnp.sin(angle)[None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class RotaryAttention(MultiHeadAttention):
    """Self-attention whose queries and keys are turned by their positions."""

    def __init__(self, attention):
        self.wq, self.wk, self.wv, self.wo = (getattr(attention, n) for n in "wq wk wv wo".split())
        self.n_heads = attention.n_heads

    def heads(self, x, memory):
        q, k, v = super().heads(x, memory)
        return rotate(q), rotate(k), v


def rotary(config, *, key):
    """A model with rotary positions in every self-attention, and in no cross-attention."""

    def attentions(model):
        return [a.attention for a in model.encoder] + [b.self_attention for b in model.decoder]

    model = NoPositions(config, key=key)
    return eqx.tree_at(attentions, model, [RotaryAttention(a) for a in attentions(model)])


POSITIONS = {
    "sinusoidal": Transformer,
    "learned": LearnedPositions,
    "rotary": rotary,
    "no positions": NoPositions,
}


def position_row(name, seed):
    batches = PairBatches(data("train", SHORT), codec(), BATCH, max_len=SHORT, seed=seed)
    config = TransformerConfig(batches.codec.vocab_size, **SHAPE)
    model = POSITIONS[name](config, key=jax.random.key(seed))
    loss = functools.partial(sequence_loss, smoothing=0.0)
    optimizer = adam(config.dim, POSITION_WARMUP, FACTOR)
    state, rows = fit(
        model, loss, batches, optimizer, steps=POSITION_STEPS, seed=seed, log_every=100
    )
    every = PairBatches(data("validation"), codec(), BATCH, max_len=MAX_LEN)
    long = [p for p in data("validation") if len(p.old) > SHORT and len(p.modern) > SHORT]
    found = {}
    for where, pairs in (("short", data("validation", SHORT)), ("long", long)):
        batch = every.padded(pairs)
        nats, _, _ = map(np.asarray, predictions(state.model, batch))
        asked = batch["targets"] >= 0
        if where == "long":
            found["beyond"] = float(nats[:, SHORT + 1 :][asked[:, SHORT + 1 :]].mean())
        else:
            found["inside"] = float(nats[asked].mean())
    return {
        "parameters": count_parameters(model),
        "settings": SHAPE | {"steps": POSITION_STEPS, "longest": SHORT},
        "loss": [round(row["loss"], 4) for row in rows],
        **found,
    }


MAKERS = (
    dict.fromkeys(SMOOTHINGS, translation_row)
    | dict.fromkeys(NORMS, norm_row)
    | dict.fromkeys(POSITIONS, position_row)
)


def stored():
    """The rows of results/transformer.json."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=MAKERS, help="only this arm")
    parser.add_argument("--fresh", action="store_true", help="also make the rows that are there")
    options = parser.parse_args()
    names = [options.arm] if options.arm else list(MAKERS)
    rows = {(row["arm"], row["seed"]): row for row in stored()}
    rows = {k: v for k, v in rows.items() if not (options.fresh and k[0] in names)}
    for seed in SEEDS:
        for name in names:
            if (name, seed) in rows:
                continue
            rows[name, seed] = {"arm": name, "seed": seed} | MAKERS[name](name, seed)
            order = [rows[n, s] for n in MAKERS for s in SEEDS if (n, s) in rows]
            text = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in order)
            RESULTS.write_text(f'{{"command": "{COMMAND}",\n "rows": [\n{text}\n]}}\n')
            shown = {k: round(v, 3) for k, v in rows[name, seed].items() if isinstance(v, float)}
            print(f"{name:22} seed {seed}  {shown}", flush=True)


if __name__ == "__main__":
    main()
