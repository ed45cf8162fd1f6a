"""Train the variants of chapter 10, five seeds each, and store one row per run in results/ablations.json.

`python tools/ablations.py` makes the rows that are missing (about ten minutes on two cores from
nothing), `--arm NAME` one arm, `--fresh` all of them again. The variants are built here, from
outside: LlamaConfig has no switch that exists for an ablation only. Chapter 10 reads the file and
makes one of its rows again.
"""

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_from_scratch.datasets import plays
from llm_from_scratch.llama import Block, Llama, LlamaConfig, RMSNorm, cross_entropy, linear
from llm_from_scratch.training import count_parameters, fit

RESULTS = Path(__file__).resolve().parents[1] / "results" / "ablations.json"
COMMAND = ".venv/bin/python tools/ablations.py"
SEEDS = (0, 1, 2, 3, 4)


# The variants ------------------------------------------------------------------------------------


class LayerNorm(eqx.Module):
    """Layer norm with gain and bias: the mean is removed before the scale."""

    weight: jax.Array
    bias: jax.Array
    eps: float = eqx.field(static=True)

    def __init__(self, norm: RMSNorm):
        self.weight, self.bias = norm.weight, jnp.zeros_like(norm.weight)
        self.eps = norm.eps

    def __call__(self, x):
        centred = x - x.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + self.eps)
        return centred * scale * self.weight + self.bias


class GeluFeedForward(eqx.Module):
    """The older feed-forward layer: two matrices, width 4·dim, GELU between them."""

    w_in: jax.Array
    w_out: jax.Array

    def __init__(self, dim: int, *, key: jax.Array, out_scale: float):
        key_in, key_out = jax.random.split(key)
        self.w_in = 0.02 * jax.random.normal(key_in, (4 * dim, dim))
        self.w_out = out_scale * jax.random.normal(key_out, (dim, 4 * dim))

    def __call__(self, x):
        return linear(jax.nn.gelu(linear(x, self.w_in)), self.w_out)


class PostNormBlock(eqx.Module):
    """The 2017 order: the norm comes after each sum, on the residual stream itself."""

    block: Block

    def __call__(self, x, rotation, segments=None, past=None):
        block = self.block
        y, kv = block.attention(x, rotation, segments, past)
        x = block.attention_norm(x + y)
        return block.feed_forward_norm(x + block.feed_forward(x)), kv


def norms(model: Llama) -> list[RMSNorm]:
    """Every norm of the model."""
    inner = [(b.attention_norm, b.feed_forward_norm) for b in model.blocks]
    return [*(norm for pair in inner for norm in pair), model.norm]


def with_layer_norm(model: Llama, key: jax.Array) -> Llama:
    return eqx.tree_at(norms, model, [LayerNorm(norm) for norm in norms(model)])


def with_gelu(model: Llama, key: jax.Array) -> Llama:
    scale = 0.02 / (2 * model.config.n_layers) ** 0.5
    keys = jax.random.split(key, model.config.n_layers)
    new = [GeluFeedForward(model.config.dim, key=k, out_scale=scale) for k in keys]
    return eqx.tree_at(lambda m: [b.feed_forward for b in m.blocks], model, new)


def with_wide_inputs(model: Llama, key: jax.Array) -> Llama:
    """Feed-forward inputs with σ = 1/√D, so that their products start at size 1, not 0.02·√D."""
    names = ("w_gate", "w_up", "w_in")
    scale = model.config.dim**-0.5 / 0.02

    def inputs(model):
        layers = [b.feed_forward for b in model.blocks]
        return [getattr(f, name) for f in layers for name in names if hasattr(f, name)]

    return eqx.tree_at(inputs, model, [scale * w for w in inputs(model)])


def with_wide_gelu(model: Llama, key: jax.Array) -> Llama:
    return with_wide_inputs(with_gelu(model, key), key)


def with_post_norm(model: Llama, key: jax.Array) -> Llama:
    return eqx.tree_at(lambda m: m.blocks, model, tuple(PostNormBlock(b) for b in model.blocks))


def unchanged(model: Llama, key: jax.Array) -> Llama:
    return model


# The data ----------------------------------------------------------------------------------------


@functools.cache
def text(split: str) -> np.ndarray:
    """The bytes of a split's plays, one after the other."""
    return np.frombuffer("".join(play.text for play in plays(split)).encode(), np.uint8)


def windows(split: str, starts: np.ndarray, context: int) -> np.ndarray:
    return text(split)[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def byte_batches(arm: "Arm", seed: int) -> Callable[[int], dict]:
    """Random windows of the training plays; the same ones for every arm of a seed."""

    def batch(cursor: int) -> dict:
        draw = np.random.default_rng((seed, cursor))
        starts = draw.integers(0, len(text("train")) - arm.context, arm.batch)
        rows = windows("train", starts, arm.context)
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}

    return batch


def byte_validation(arm: "Arm", seed: int) -> list[dict]:
    """About 16 KB of the validation plays in windows of `read` bytes, the same for every run."""
    n = max(16, 16384 // arm.read)
    starts = np.linspace(0, len(text("validation")) - arm.read - 1, n).astype(int)
    rows = windows("validation", starts, arm.read)
    return [{"tokens": rows[:, :-1], "targets": rows[:, 1:]}]


def recall_batches(arm: "Arm", seed: int) -> Callable[[int], dict]:
    """Rows of packed documents of 16 tokens: 7 pairs (key, value), one of the keys, its value.

    Keys are 0–15 and values 16–31, drawn anew for each document: another document's pair of the
    same key says nothing. Only the last token of a document is a target.
    """

    def batch(cursor: int) -> dict:
        draw = np.random.default_rng((seed, cursor, 7))
        n = arm.batch * arm.context // 16
        keys = draw.random((n, 16)).argsort(axis=1)[:, :7]
        values = draw.integers(16, 32, (n, 7))
        asked = draw.integers(0, 7, n)
        documents = np.empty((n, 16), np.int32)
        documents[:, 0:14:2], documents[:, 1:14:2] = keys, values
        documents[:, 14], documents[:, 15] = keys[range(n), asked], values[range(n), asked]
        targets = np.full((n, 16), -1, np.int32)
        targets[:, 14] = documents[:, 15]
        shape = (arm.batch, arm.context)
        row = np.repeat(np.arange(arm.context // 16, dtype=np.int32), 16)
        segments = np.broadcast_to(row, shape) if arm.masked else None
        found = {"tokens": documents.reshape(shape), "targets": targets.reshape(shape)}
        return found if segments is None else found | {"segments": np.array(segments)}

    return batch


def recall_validation(arm: "Arm", seed: int) -> list[dict]:
    return [recall_batches(arm, 1000)(i) for i in range(4)]


# The arms ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arm:
    """One variant of one experiment, with everything that its runs need."""

    config: LlamaConfig
    change: Callable = unchanged
    batches: Callable = byte_batches
    validation: Callable = byte_validation
    steps: int = 400
    batch: int = 4
    context: int = 128
    read: int = 128  # context at validation
    score_from: int = 0  # validation scores positions from here on
    learning_rate: float = 5e-3
    warmup: int = 20
    masked: bool = False
    unit: str = "bits per byte"


BASE = LlamaConfig(256, 72, 2, 4, 2, 192, 18, max_seq_len=128)
DEEP = LlamaConfig(256, 48, 6, 4, 2, 128, 12, max_seq_len=128)
RECALL = LlamaConfig(32, 64, 2, 4, 2, 192, 16, max_seq_len=128)
vary = dataclasses.replace
recall = Arm(
    RECALL, batches=recall_batches, validation=recall_validation, steps=50, batch=16, unit="nats"
)
rope = Arm(BASE, context=64, read=512, score_from=256, batch=8, steps=200)
deep = Arm(DEEP, warmup=0, steps=100)

ARMS = {
    "base": Arm(BASE),
    "layer norm": Arm(BASE, change=with_layer_norm),
    "gelu": Arm(BASE, change=with_gelu),
    "wide swiglu": Arm(BASE, change=with_wide_inputs),
    "wide gelu": Arm(BASE, change=with_wide_gelu),
    "4 kv heads": Arm(vary(BASE, n_kv_heads=4)),
    "1 kv head": Arm(vary(BASE, n_kv_heads=1)),
    "tied": Arm(vary(BASE, tie_embeddings=True)),
    "pre-norm, rate 0.01": vary(deep, learning_rate=0.01),
    "post-norm, rate 0.01": vary(deep, learning_rate=0.01, change=with_post_norm),
    "pre-norm, rate 0.03": vary(deep, learning_rate=0.03),
    "post-norm, rate 0.03": vary(deep, learning_rate=0.03, change=with_post_norm),
    "theta 100": vary(rope, config=vary(BASE, rope_theta=100.0)),
    "theta 10000": vary(rope, config=vary(BASE, rope_theta=10_000.0)),
    "recall masked": vary(recall, masked=True),
    "recall unmasked": recall,
}


def loss_of(model: Llama, batch: dict, key: jax.Array | None = None) -> jax.Array:
    """Mean nats over the targets of one batch."""
    return cross_entropy(model(batch["tokens"], batch.get("segments")), batch["targets"])


@eqx.filter_jit
def token_losses(model: Llama, batch: dict) -> jax.Array:
    """Nats of each target, 0 where there is none."""
    logits = jax.nn.log_softmax(model(batch["tokens"], batch.get("segments")))
    chosen = jnp.take_along_axis(logits, jnp.maximum(batch["targets"], 0)[..., None], axis=-1)
    return jnp.where(batch["targets"] >= 0, -chosen[..., 0], 0.0)


def schedule(arm: Arm) -> optax.Schedule:
    """Linear warm-up (or none), then a cosine to a tenth of the peak."""
    if not arm.warmup:
        return optax.cosine_decay_schedule(arm.learning_rate, arm.steps, alpha=0.1)
    peak = arm.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0, peak, arm.warmup, arm.steps, peak / 10)


def train(name: str, seed: int) -> tuple[Llama, dict]:
    """Train one arm with one seed; the model, and the row that is stored of it."""
    arm = ARMS[name]
    model_key, change_key = jax.random.split(jax.random.key(seed))
    model = arm.change(Llama(arm.config, key=model_key), change_key)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule(arm), b2=0.95, weight_decay=0.1)
    )
    size = count_parameters(model)
    batches = arm.batches(arm, seed)
    state, rows = fit(model, loss_of, batches, optimizer, steps=arm.steps, seed=seed)
    measured = measure(state.model, arm, seed)
    row = {
        "arm": name,
        "seed": seed,
        "value": measured.pop("value"),
        "unit": arm.unit,
        "parameters": size,
        "train_loss": round(float(rows[-1]["loss"]), 5),
    }
    command = {"command": f'{COMMAND} --arm "{name}"'}
    return state.model, row | measured | describe(arm) | command


def measure(model: Llama, arm: Arm, seed: int) -> dict[str, float]:
    """The validation value of a trained arm, in its unit; and within the trained context."""
    held_out = arm.validation(arm, seed)
    nats = np.concatenate([np.asarray(token_losses(model, b)) for b in held_out])
    asked = np.concatenate([b["targets"] >= 0 for b in held_out])
    asked[:, : arm.score_from] = False
    value = nats[asked].mean() / (np.log(2) if arm.unit == "bits per byte" else 1)
    found = {"value": round(float(value), 5)}
    if arm.score_from:
        near = nats[:, : arm.context].mean() / np.log(2)
        found["value_in_context"] = round(float(near), 5)
    return found


def describe(arm: Arm) -> dict:
    """The arm as JSON."""
    plain = {f.name: getattr(arm, f.name) for f in dataclasses.fields(arm)}
    named = {k: v.__name__ for k, v in plain.items() if callable(v)}
    return plain | named | {"config": dataclasses.asdict(arm.config)}


def stored(path: Path) -> list[dict]:
    """The rows of a results file."""
    return json.loads(path.read_text()) if path.exists() else []


def save(path: Path, rows: list[dict], names: Iterable[str]) -> None:
    """Write the rows, one a line, in the order of the arms and seeds; a whole file or none."""
    found = {(row["arm"], row["seed"]): row for row in rows}
    ordered = [found[arm, seed] for arm in names for seed in SEEDS if (arm, seed) in found]
    lines = ",\n".join(json.dumps(row) for row in ordered)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"[\n{lines}\n]\n")
    os.replace(temporary, path)


def run_arms(about: str, path: Path, recipes: dict[str, dict], train: Callable) -> None:
    """The command line of an ablation: make and store the rows that are missing.

    `recipes`: arm → what its rows depend on, as JSON; a stored row of another recipe is dropped.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--arm", choices=recipes, help="only this arm")
    parser.add_argument("--fresh", action="store_true", help="also make the rows that are there")
    options = parser.parse_args()
    names = [options.arm] if options.arm else list(recipes)
    recipes = json.loads(json.dumps(recipes))

    def current() -> list[dict]:
        known = [row for row in stored(path) if row["arm"] in recipes]
        return [row for row in known if recipes[row["arm"]].items() <= row.items()]

    if options.fresh:
        save(path, [row for row in current() if row["arm"] not in names], recipes)
    for name in names:
        for seed in SEEDS:
            if any((row["arm"], row["seed"]) == (name, seed) for row in current()):
                continue
            _, row = train(name, seed)
            save(path, [*current(), row], recipes)
            print(f"{name:20s} seed {seed}  {row['value']:.4f} {row['unit']}", flush=True)


if __name__ == "__main__":
    run_arms(__doc__, RESULTS, {name: describe(arm) for name, arm in ARMS.items()}, train)
