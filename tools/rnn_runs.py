"""Train the variants of chapter 04 and store one row per run in results/rnn.json.

`python tools/rnn_runs.py` makes the rows that are missing (about fifteen minutes on two cores from
nothing), `--arm NAME` those of one arm, `--fresh` all of them again. All arms but "one epoch" spend
the training compute of chapter 03's neural language model. Chapter 04 reads the file and makes one
of its rows again.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import optax

from llm_from_scratch.bigram import bits_per_byte
from llm_from_scratch.datasets import plays
from llm_from_scratch.rnn import (
    RNNLM,
    RNNConfig,
    Streams,
    clipped_adam,
    dynamic_log_probs,
    stream_log_probs,
    train_truncated,
)

RESULTS = Path(__file__).resolve().parents[1] / "results" / "rnn.json"
COMMAND = ".venv/bin/python tools/rnn_runs.py"
# chapter 03: 1,000 steps of 512 positions through H (128 × 80) and U (256 × 128), 6 FLOPs a weight
NEURAL_LM_FLOPS = 6 * (128 * 80 + 256 * 128) * 512 * 1000
RATES = (0.03, 0.1, 0.3, 1.0)  # of dynamic evaluation


@dataclasses.dataclass(frozen=True)
class Arm:
    """One variant: a model, how it is trained, how many seeds. FLOPs are those of training."""

    config: RNNConfig = RNNConfig()
    batch: int = 16
    length: int = 32
    optimizer: str = "adam"
    rate: float = 0.02
    clip: float = 1.0
    carry: bool = True
    flops: float = NEURAL_LM_FLOPS
    seeds: int = 5
    dynamic: bool = False

    def weights(self) -> int:
        """The weights that work at every byte: all but the table of byte vectors, which is looked up."""
        model = jax.eval_shape(lambda key: RNNLM(self.config, key=key), jax.random.key(0))
        return sum(x.size for x in jax.tree.leaves(model)) - model.C.size

    def steps(self) -> int:
        """As many as the compute allows, at 6 FLOPs a weight and byte."""
        return round(self.flops / (6 * self.weights() * self.batch * self.length))

    def transformation(self) -> optax.GradientTransformation:
        if self.optimizer == "adam":
            return clipped_adam(self.steps(), self.rate, self.clip)
        sgd = optax.sgd(self.rate, momentum=0.9)
        return optax.chain(optax.clip_by_global_norm(self.clip), sgd)


PLAIN = RNNConfig(cell="rnn", dim=128)
DEEP = RNNConfig(dim=32, layers=4)
ARMS = {
    "lstm": Arm(dynamic=True),
    "rnn": Arm(PLAIN),
    "no peepholes": Arm(RNNConfig(peepholes=False)),
    "4 layers, skips": Arm(DEEP),
    "4 layers, no skips": Arm(dataclasses.replace(DEEP, skips=False)),
    "length 8": Arm(batch=64, length=8),
    "length 128": Arm(batch=4, length=128),
    "no carry": Arm(carry=False),
    "lstm, sgd, clipped": Arm(optimizer="sgd", rate=1.0, clip=0.3),
    "lstm, sgd": Arm(optimizer="sgd", rate=1.0, clip=1e9),
    "rnn, sgd, clipped": Arm(PLAIN, optimizer="sgd", rate=0.3, clip=0.3),
    "rnn, sgd": Arm(PLAIN, optimizer="sgd", rate=0.3, clip=1e9),
    "one epoch": Arm(
        RNNConfig(dim=192, width=32),
        batch=32,
        length=64,
        rate=0.01,
        flops=6e12,
        seeds=3,
        dynamic=True,
    ),
}


def describe(arm: Arm) -> dict:
    """The settings of an arm, as its rows record them."""
    return dataclasses.asdict(arm) | {"weights": arm.weights(), "steps": arm.steps()}


def train(arm: Arm, seed: int) -> tuple[RNNLM, np.ndarray]:
    """The trained model of an arm and a seed, and its losses and gradient norms."""
    texts = [play.text.encode() for play in plays("train")]
    model = RNNLM(arm.config, key=jax.random.key(seed))
    streams = Streams(texts, arm.batch, arm.length, seed=seed)
    return train_truncated(model, streams, arm.transformation(), steps=arm.steps(), carry=arm.carry)


def bits_by_play(log_p: np.ndarray, texts: list[bytes]) -> list[float]:
    """Bits per byte of each text on its own."""
    parts = np.split(log_p, np.cumsum([len(text) for text in texts])[:-1])
    return [round(bits_per_byte(-part.sum(), len(part)), 5) for part in parts]


def run(name: str, seed: int) -> dict:
    """One row: the settings, bits per byte on the validation plays, the same with dynamic evaluation."""
    arm = ARMS[name]
    texts = [play.text.encode() for play in plays("validation")]
    model, rows = train(arm, seed)
    log_p = stream_log_probs(model, texts)
    found = {
        "bits_per_byte": round(bits_per_byte(-log_p.sum(), len(log_p)), 5),
        "by_play": bits_by_play(log_p, texts),
        "largest_gradient_norm": round(float(rows[:, 1].max()), 3),
        "median_gradient_norm": round(float(np.median(rows[:, 1])), 3),
    }
    if arm.dynamic:
        found["dynamic"] = {
            str(rate): bits_by_play(dynamic_log_probs(model, texts, rate), texts) for rate in RATES
        }
    return {"arm": name, "seed": seed, **found, "settings": describe(arm)}


def stored(path: Path = RESULTS) -> list[dict]:
    """The rows of the file; none if there is no file."""
    return json.loads(path.read_text())["runs"] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    rows = [] if arguments.fresh else stored()
    for name in [arguments.arm] if arguments.arm else ARMS:
        for seed in range(ARMS[name].seeds):
            wanted = json.loads(json.dumps(describe(ARMS[name])))
            same = [r for r in rows if (r["arm"], r["seed"]) == (name, seed)]
            if same and same[0]["settings"] == wanted:
                continue
            row = run(name, seed)
            print(f"{name}, seed {seed}: {row['bits_per_byte']:.3f} bits per byte", flush=True)
            rows = [r for r in rows if r not in same] + [row]
            order = list(ARMS)
            rows.sort(key=lambda r: (order.index(r["arm"]), r["seed"]))
            text = json.dumps({"command": COMMAND, "runs": rows}, indent=1) + "\n"
            RESULTS.with_suffix(".new").write_text(text)
            os.replace(RESULTS.with_suffix(".new"), RESULTS)


if __name__ == "__main__":
    main()
