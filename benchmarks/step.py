"""Where the time of a training step goes: the parts of the step of train.py, each compiled and timed alone.

`make bench-train` runs it after train.py and writes results/step_parts.json; chapter 11 reads it. The step is ours with
eight micro-batches of 512 tokens, with the Makefile's setting for freed memory. A part is timed forward and backward
together, as often as the step needs it. Embedding, sums on the residual stream and copies are no part. The parts need not
add up to the whole: one alone may be faster or slower than inside it, where XLA joins it with its neighbours. Each round
times every part once; medians count.
"""

import json
import time

from decode import ROOT
from train import (
    BETAS,
    CLIP,
    CONTEXT,
    DECAY,
    LAYERS,
    RATE,
    ROWS,
    Machine,
    Ours,
    config,
    flops,
    model,
)

RESULTS = ROOT / "results" / "step_parts.json"
COMMAND = "make bench-train"
MICRO, ROUNDS = 8, 15


def both(function):
    """The forward and the backward pass of a function of arrays, jitted: outputs and gradients."""
    import jax

    def run(arguments, output_gradients):
        outputs, backward = jax.vjp(function, *arguments)
        return outputs, backward(output_gradients)

    return jax.jit(run)


def parts() -> dict[str, tuple]:
    """By name: a call that does the part once, how often the step does it, and FLOPs of all times."""
    import jax
    import jax.numpy as jnp
    import optax

    from llm_from_scratch.llama import (
        apply_rope,
        attention,
        cross_entropy,
        linear,
        rope_frequencies,
        rope_rotation,
    )
    from llm_from_scratch.pretraining import make_optimizer
    from llm_from_scratch.training import is_trainable

    c, llama = config(), model()
    block, rows = llama.blocks[0], ROWS // MICRO
    normal = lambda *shape: jax.random.normal(jax.random.key(0), (rows, CONTEXT, *shape))  # noqa: E731
    x = normal(c.dim)
    q, k = normal(c.n_heads, c.head_dim), normal(c.n_kv_heads, c.head_dim)
    segments = jnp.zeros((rows, CONTEXT), jnp.int32)
    targets = jax.random.randint(jax.random.key(1), (rows, CONTEXT), 0, c.vocab_size)
    frequencies = rope_frequencies(c.head_dim, c.rope_theta, None)
    rotation = rope_rotation(
        jnp.broadcast_to(jnp.arange(CONTEXT), (rows, CONTEXT)), frequencies, x.dtype
    )

    def projections(x, weights):
        return [linear(x, w) for w in weights]

    def norms(x, q, k, first, second):
        return first(x), second(x), apply_rope(q, *rotation), apply_rope(k, *rotation)

    def part(function, *arguments):
        call, gradients = both(function), function(*arguments)
        return lambda: call(arguments, gradients)

    weights = [
        block.attention.w_query,
        block.attention.w_key,
        block.attention.w_value,
        block.attention.w_out,
    ]
    params = jax.tree.map(lambda p: p if is_trainable(p) else None, llama)
    optimizer = make_optimizer(
        steps=10**6, peak=RATE, warmup=0, weight_decay=DECAY, b1=BETAS[0], b2=BETAS[1], clip=CLIP
    )
    state = optimizer.init(params)

    @jax.jit
    def update(params, state):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(params, state, params)
            return optax.apply_updates(params, updates), state

    total = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
    dense = lambda *widths: 6 * ROWS * CONTEXT * sum(widths)  # noqa: E731
    heads = c.n_heads * c.head_dim
    layered, inner = LAYERS * MICRO, c.dim * c.hidden_dim
    pairs = ROWS * CONTEXT * (CONTEXT + 1) // 2
    found = {
        "feed-forward layers": (
            part(lambda x, layer: layer(x), x, block.feed_forward),
            layered,
            dense(3 * inner) * LAYERS,
        ),
        "projections": (
            part(projections, x, weights),
            layered,
            dense(*(w.size for w in weights)) * LAYERS,
        ),
        "output head and loss": (
            part(lambda h, w: cross_entropy(linear(h, w), targets), x, llama.head),
            MICRO,
            dense(llama.head.size),
        ),
        "attention": (
            part(lambda *a: attention(*a, segments), q, k, k),
            layered,
            12 * pairs * heads * LAYERS,
        ),
        "norms and rotation": (
            part(norms, x, q, k, block.attention_norm, block.feed_forward_norm),
            layered,
            0,
        ),
        "adding up gradients": (lambda: total(params, params), MICRO, 0),
        "clipping and AdamW": (lambda: update(params, state), 1, 0),
    }
    assert sum(f for _, _, f in found.values()) == flops()
    return found


def seconds(call) -> float:
    """Of one call, until its results are there."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def main() -> None:
    """Measure, print and store."""
    whole, timed = Ours(micro=True), parts()
    rows = []
    for number in range(ROUNDS + 1):
        row = {name: n * seconds(call) for name, (call, n, _) in timed.items()}
        row |= {"the whole step": whole.step()["seconds"], "peak": Machine().limits()}
        rows += [row] if number else []
    middle = {name: sorted(r[name] for r in rows)[len(rows) // 2] for name in rows[0]}
    peak = middle["peak"]
    stored = {"command": COMMAND, "peak": peak, "whole": middle["the whole step"]}
    stored["parts"] = {n: {"seconds": middle[n], "flops": f} for n, (_, _, f) in timed.items()}
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"{'':22}{'s':>7}{'at peak':>9}")
    for name, found in stored["parts"].items():
        print(f"{name:22}{found['seconds']:7.3f}{found['flops'] / peak:9.3f}")
    print(f"{'the whole step':22}{stored['whole']:7.3f}{flops() / peak:9.3f}")


if __name__ == "__main__":
    main()
