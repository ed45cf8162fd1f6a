"""Train one small model under variants of chapter 11's recipe, five seeds each, into results/ablations_recipe.json.

`python tools/ablations_recipe.py` makes the rows that are missing (about ten minutes on two cores from nothing),
`--arm NAME` one arm, `--fresh` all of them again. Model, data and measure are those of chapter 10's ablations; only the
optimiser varies.
"""

from pathlib import Path

import ablations
import jax
import optax
from ablations import BASE, Arm, loss_of, measure

from llm_from_scratch.llama import Llama
from llm_from_scratch.pretraining import make_optimizer
from llm_from_scratch.training import fit

RESULTS = Path(__file__).resolve().parents[1] / "results" / "ablations_recipe.json"
ARM = Arm(BASE)
PEAK, WARMUP, STEPS = ARM.learning_rate, ARM.warmup, ARM.steps


def recipe(**changes) -> optax.GradientTransformation:
    """The chapter's recipe with some of its numbers changed."""
    return make_optimizer(**{"steps": STEPS, "peak": PEAK, "warmup": WARMUP} | changes)


def constant(rate: float, warmup: int) -> optax.GradientTransformation:
    """The recipe with a rate that stays at its peak once it is warm."""
    rates = optax.linear_schedule(0.0, rate, warmup) if warmup else rate
    adamw = optax.adamw(rates, b2=0.95, weight_decay=0.1, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def adam_l2(strength: float) -> optax.GradientTransformation:
    """The recipe with the decay inside the gradient, where Adam divides it by √v."""
    rates = optax.warmup_cosine_decay_schedule(0.0, PEAK, WARMUP, STEPS, 0.01 * PEAK)
    l2 = optax.add_decayed_weights(strength, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), l2, optax.adam(rates, b2=0.95))


def matrices(params):
    """Decay shrinks matrices, not the gains of norms."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


ARMS = {
    "recipe": recipe(),
    "no weight decay": recipe(weight_decay=0.0),
    "adam + L2 0.1": adam_l2(0.1),
    "adam + L2 0.01": adam_l2(0.01),
    "adam + L2 0.001": adam_l2(0.001),
    "constant rate": constant(PEAK, WARMUP),
    "3 × rate": recipe(peak=3 * PEAK),
    "3 × rate, no warm-up": recipe(peak=3 * PEAK, warmup=0),
    "3 × rate, constant, no warm-up": constant(3 * PEAK, 0),
}


def train(name: str, seed: int) -> tuple[Llama, dict]:
    """Train one arm with one seed; the model, and the row that is stored of it."""
    model = Llama(ARM.config, key=jax.random.key(seed))
    batches = ARM.batches(ARM, seed)
    state, rows = fit(model, loss_of, batches, ARMS[name], steps=STEPS, seed=seed)
    row = {"arm": name, "seed": seed, **measure(state.model, ARM, seed), "unit": ARM.unit}
    return state.model, row | {"train_loss": round(float(rows[-1]["loss"]), 5)} | describe(name)


def describe(name: str) -> dict:
    """What a row depends on, as JSON."""
    command = f'.venv/bin/python tools/ablations_recipe.py --arm "{name}"'
    return ablations.describe(ARM) | {"command": command}


if __name__ == "__main__":
    ablations.run_arms(__doc__, RESULTS, {name: describe(name) for name in ARMS}, train)
