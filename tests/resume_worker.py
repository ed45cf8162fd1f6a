"""Run one short training twice: undisturbed, then killed at random moments and resumed until it ends.

`python resume_worker.py DIRECTORY KILLS SEED` writes DIRECTORY/undisturbed and DIRECTORY/killed, each with a
log and `final.safetensors`, and prints the steps of the checkpoints that were resumed from, as JSON.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_from_scratch.training import checkpoints, fit, save_weights

STEPS = 60


def loss(model, batch, key):
    x = batch["x"] * jax.random.bernoulli(key, 0.9, batch["x"].shape)  # dropout: the key matters
    return jnp.mean((jax.vmap(model)(x) - batch["targets"]) ** 2)


def batches(cursor):
    time.sleep(0.004)
    rng = np.random.default_rng(cursor)
    x = rng.normal(size=(8, 6)).astype(np.float32)
    return {"x": x, "targets": x[:, :2] * x[:, 2:4]}


def train(directory, announce):
    draws = itertools.count()

    def announced(cursor):
        if next(draws) == 4:  # the step is compiled by now, and two have run
            os.write(announce, b"!")
        return batches(cursor)

    model = eqx.nn.Linear(6, 2, key=jax.random.key(0))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, STEPS)
    state, _ = fit(
        model,
        loss,
        announced,
        optax.adamw(schedule),
        steps=STEPS,
        accumulate=2,
        evaluate=lambda m: {"norm": float(jnp.sum(m.weight**2))},
        eval_every=7,
        log_every=2,
        directory=directory,
        checkpoint_every=3,
    )
    save_weights(directory / "final.safetensors", state.model)


def attempt(directory, patience):
    """Train in a child; kill it `patience` seconds after its second step. True when it ended well."""
    hear, announce = os.pipe()
    child = os.fork()
    if child == 0:
        train(directory, announce)
        os._exit(0)
    os.close(announce)
    if patience is not None:
        os.read(hear, 1)
        time.sleep(patience)
        os.kill(child, signal.SIGKILL)
    os.close(hear)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main():
    directory, kills, moments = Path(sys.argv[1]), int(sys.argv[2]), random.Random(sys.argv[3])
    jax.config.update(
        "jax_compilation_cache_dir", str(directory / "cache")
    )  # saves seconds, no more
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    warnings.filterwarnings(
        "ignore", message=".*fork.*"
    )  # JAX has not started, so no thread exists
    assert attempt(directory / "undisturbed", None), "the undisturbed run failed"
    resumed = []
    for _ in range(kills):
        if attempt(directory / "killed", moments.uniform(0.0, 0.3)):
            break  # it ended before its time came
        newest = checkpoints(directory / "killed")[-1:]
        resumed.append(int(newest[0].name[5:]) if newest else 0)
    assert attempt(directory / "killed", None), "the last run failed"
    print(json.dumps(resumed))


if __name__ == "__main__":
    main()
