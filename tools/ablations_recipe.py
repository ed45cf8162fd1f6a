"""Train one small model under variants of chapter 11's recipe, five seeds each, into results/ablations_recipe.json.

`python tools/ablations_recipe.py` makes the rows that are missing (about ten minutes on two cores from nothing),
`--arm NAME` one arm, `--fresh` all of them again. Model, data and measure are those of chapter 10's ablations; only the
optimiser varies.
"""

import dataclasses
from pathlib import Path

import ablations
import jax
import optax
from ablations import BASE, Arm, loss_of, measure

from llm_from_scratch.llama import Llama
from llm_from_scratch.pretraining import decayed, make_optimizer
from llm_from_scratch.training import fit

RESULTS = Path(__file__).resolve().parents[1] / "results" / "ablations_recipe.json"
ARM = Arm(BASE)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a row's optimiser depends on; everything else is `make_optimizer`'s default."""

    learning_rate: float = ARM.learning_rate  # the peak
    warmup: int = ARM.warmup
    cosine: bool = True
    weight_decay: float = 0.1  # decoupled
    l2: float = 0.0  # decay inside the gradient instead

    def optimizer(self) -> optax.GradientTransformation:
        """The recipe of chapter 11; by hand where it has no such variant."""
        if self.cosine and not self.l2:
            return make_optimizer(
                steps=ARM.steps,
                peak=self.learning_rate,
                warmup=self.warmup,
                weight_decay=self.weight_decay,
            )
        rate = self.learning_rate
        if self.cosine:
            rates = optax.warmup_cosine_decay_schedule(
                0.0, rate, self.warmup, ARM.steps, 0.01 * rate
            )
        else:
            rates = optax.linear_schedule(0.0, rate, self.warmup) if self.warmup else rate
        adamw = optax.adamw(rates, b2=0.95, weight_decay=self.weight_decay, mask=decayed)
        l2 = optax.add_decayed_weights(self.l2, mask=decayed)
        return optax.chain(optax.clip_by_global_norm(1.0), l2, adamw)


BASELINE = Settings()
HOT = Settings(learning_rate=3 * ARM.learning_rate)
vary = dataclasses.replace
ARMS = {
    "recipe": BASELINE,
    "no weight decay": vary(BASELINE, weight_decay=0.0),
    **{
        f"adam + L2 {strength}": vary(BASELINE, weight_decay=0.0, l2=strength)
        for strength in (0.1, 0.01, 0.001, 0.0001, 0.00001)
    },
    "constant rate": vary(BASELINE, cosine=False),
    "3 × rate": HOT,
    "3 × rate, no warm-up": vary(HOT, warmup=0),
    "3 × rate, constant, no warm-up": vary(HOT, warmup=0, cosine=False),
}


def train(name: str, seed: int) -> tuple[Llama, dict]:
    """Train one arm with one seed; the model, and the row that is stored of it."""
    model = Llama(ARM.config, key=jax.random.key(seed))
    batches, optimizer = ARM.batches(ARM, seed), ARMS[name].optimizer()
    state, rows = fit(model, loss_of, batches, optimizer, steps=ARM.steps, seed=seed)
    row = {"arm": name, "seed": seed, **measure(state.model, ARM, seed), "unit": ARM.unit}
    return state.model, row | {"train_loss": round(float(rows[-1]["loss"]), 5)} | describe(name)


def describe(name: str) -> dict:
    """What a row depends on, as JSON."""
    command = f'.venv/bin/python tools/ablations_recipe.py --arm "{name}"'
    return ablations.describe(ARM) | dataclasses.asdict(ARMS[name]) | {"command": command}


if __name__ == "__main__":
    ablations.run_arms(__doc__, RESULTS, {name: describe(name) for name in ARMS}, train)
