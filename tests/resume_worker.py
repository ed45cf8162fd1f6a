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


def train(directory, announce, last_words):
    draws = itertools.count()

    def announced(cursor):
        draw = next(draws)
        if draw == last_words:
            os.write(announce, b"!")
        elif last_words is not None and draw == last_words + 12:
            time.sleep(600)  # a slow machine's killer comes late, but the run must not end before
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


def attempt(directory, last_words=None, patience=0.0):
    """Train in a child. Kill it `patience` seconds after that batch was drawn, or let it end.

    True when it ended well. The moment is counted in batches, so that a busy machine changes nothing.
    """
    hear, announce = os.pipe()
    child = os.fork()
    if child == 0:
        train(directory, announce, last_words)
        os._exit(0)
    os.close(announce)
    if last_words is not None:
        os.read(hear, 1)
        time.sleep(patience)
        os.kill(child, signal.SIGKILL)
    os.close(hear)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main():
    directory, kills, moments = Path(sys.argv[1]), int(sys.argv[2]), random.Random(sys.argv[3])
    # a compilation cache saves seconds, and no more
    jax.config.update("jax_compilation_cache_dir", str(directory / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # JAX has not started when we fork, so there is no thread to lose
    warnings.filterwarnings("ignore", message=".*fork.*")
    assert attempt(directory / "undisturbed"), "the undisturbed run failed"
    resumed = []
    for _ in range(kills):
        # from 8 draws on, step 3 is saved; 3 times 35 draws do not reach the end at step 60
        ended = attempt(directory / "killed", moments.randrange(8, 24), moments.uniform(0, 0.12))
        assert not ended, "the killed run ended"
        resumed.append(int(checkpoints(directory / "killed")[-1].name[5:]))
    assert attempt(directory / "killed"), "the last run failed"
    print(json.dumps(resumed))


if __name__ == "__main__":
    main()
