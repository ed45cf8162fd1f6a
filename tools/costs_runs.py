"""Hold the formulas of chapter 13 against this machine, into results/costs.json: a stopwatch and XLA's buffers.

`python tools/costs_runs.py` makes the file again (about five minutes on two cores), `--part NAME` one
part of it. Every repeat measures the
machine's matmul peak and read bandwidth beside the thing itself, so that ratios survive a busy machine.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from llm_from_scratch.costs import read_bandwidth
from llm_from_scratch.llama import Llama, LlamaConfig, init_cache, linear
from llm_from_scratch.pretraining import RECIPES, make_optimizer, matmul_peak, next_token_loss
from llm_from_scratch.training import make_step, train_state

RESULTS = Path(__file__).resolve().parents[1] / "results" / "costs.json"
REPEATS = 8
MINI = RECIPES["short"].model
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WIDTH, MATRICES = 4096, 8
LARGE = LlamaConfig(4096, 1024, 10, 16, 8, 2816, 64, tie_embeddings=True, max_seq_len=256)


def random_shapes(count: int = 8, seed: int = 0) -> dict[str, tuple[LlamaConfig, int, int]]:
    """Small Llamas that the formula was not made from (it was with seed 0): config, batch, context by name."""
    draw, shapes = np.random.default_rng(seed), {}
    pick = lambda *options: int(draw.choice(options))  # noqa: E731
    for i in range(count):
        kv_heads = pick(1, 2, 4)
        heads = kv_heads * pick(1, 2, 4)
        config = LlamaConfig(
            vocab_size=pick(512, 2048, 4096, 8192),
            dim=pick(128, 256, 384, 512),
            n_layers=int(draw.integers(1, 7)),
            n_heads=heads,
            n_kv_heads=kv_heads,
            hidden_dim=64 * int(draw.integers(4, 25)),
            head_dim=pick(32, 64),
            tie_embeddings=bool(draw.integers(2)),
            max_seq_len=512,
        )
        shapes[f"random {i + 1}"] = (config, pick(2, 4, 8), pick(64, 128, 256, 384, 512))
    return shapes


SHAPES = {"chapter 11's step": (MINI, 2, 256)} | random_shapes(seed=1)


def best(call: Callable, repeats: int = 4) -> float:
    """Seconds of the fastest of a few calls, after one to compile."""
    jax.block_until_ready(call())
    fastest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def trace_step(config: LlamaConfig, batch: int, context: int):
    """Chapter 11's training step of a shape, traced from shapes alone: nothing is allocated."""
    ids = jax.ShapeDtypeStruct((batch, context), jnp.int32)
    inputs = {"tokens": ids, "targets": ids, "segments": ids}
    optimizer = make_optimizer(steps=100, peak=1e-3, warmup=10)
    build = lambda: train_state(Llama(config, key=jax.random.key(0)), optimizer)  # noqa: E731
    state, key = jax.eval_shape(build), jax.eval_shape(lambda: jax.random.key(0))
    step = make_step(next_token_loss, optimizer)
    return jax.jit(step, donate_argnums=0).trace(state, inputs, key)


def memory(config: LlamaConfig, batch: int, context: int) -> dict[str, int]:
    """Bytes that XLA reserves for that step: its state, and everything temporary."""
    found = trace_step(config, batch, context).lower().compile().memory_analysis()
    return {"state": found.argument_size_in_bytes, "temporary": found.temp_size_in_bytes}


def yardsticks() -> dict[str, float]:
    """The matmul peak in FLOP/s and the read bandwidth in bytes/s, now."""
    return {"peak": 1e9 * matmul_peak(), "bandwidth": read_bandwidth()}


@jax.jit
def products(matrices, x):
    """Each matrix times the same B vectors, which are columns."""
    return [w @ x for w in matrices]


@jax.jit
def rows(matrices, x):
    """The same products with the vectors as rows: chapter 10's `linear`."""
    return [linear(x, w) for w in matrices]


def roofline() -> list[dict]:
    """Seconds to multiply eight 64 MiB matrices by B vectors, both ways round."""
    keys = jax.random.split(jax.random.key(0), MATRICES)
    matrices = [jax.random.normal(k, (WIDTH, WIDTH)) for k in keys]
    found = []
    for repeat in range(REPEATS):
        row = {"repeat": repeat, "before": yardsticks()}
        for name, function in (("products", products), ("rows", rows)):
            times = {}
            for batch in BATCHES:
                x = jnp.ones((WIDTH, batch) if function is products else (batch, WIDTH))
                times[batch] = best(lambda f=function, x=x: f(matrices, x), 3)
            row[name] = times
        found.append(row | {"after": yardsticks()})
    return found


@eqx.filter_jit
def decode(model, token, cache):
    """One token through the cache."""
    logits, cache = model(token, cache=cache)
    return logits.argmax(-1).astype(jnp.int32), cache


@eqx.filter_jit
def last(model, tokens):
    """The likeliest next token, without a cache: everything is read again."""
    return model(tokens)[..., -1, :].argmax(-1)


def decoding() -> list[dict]:
    """Seconds for one token of a model of half a gigabyte, with a cache and without."""
    model = Llama(LARGE, key=jax.random.key(0))
    tokens = jnp.ones((1, 256), jnp.int32)
    cache = init_cache(LARGE, 1, 256)
    size = sum(x.nbytes for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    kept = sum(x.nbytes for x in (*cache.k, *cache.v))
    found = []
    for repeat in range(REPEATS):
        row = {"repeat": repeat, "weights": size, "cache": kept, "before": yardsticks()}
        row["cached"] = best(lambda: decode(model, tokens[:, :1], cache)[0])
        row["uncached"] = best(lambda: last(model, tokens))
        found.append(row | {"after": yardsticks()})
    return found


PARTS: dict[str, Callable] = {
    "memory": lambda: {name: memory(*shape) for name, shape in SHAPES.items()},
    "roofline": roofline,
    "decoding": decoding,
}


def main() -> None:
    """Measure the parts that are asked for, all by default, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="measure this part only, keep the others")
    chosen = parser.parse_args().part
    found = json.loads(RESULTS.read_text()) if chosen else {}
    found |= {name: part() for name, part in PARTS.items() if chosen in (None, name)}
    RESULTS.write_text(json.dumps({name: found[name] for name in PARTS}, indent=1) + "\n")
    print(f"{RESULTS} written")


if __name__ == "__main__":
    main()
