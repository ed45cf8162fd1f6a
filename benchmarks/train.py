"""One training step of a small Llama on the CPU in fp32: ours against transformers' in PyTorch, in one run.

`make bench-train` runs it and writes results/train_speed.json and benchmarks/train.png. A step is all of it: forward,
backward, clipping by the global norm, AdamW. Every contender is a process of its own that starts from the same weights,
reads the same tokens, and has the same cores and threads. They wait for each other: a round times one step of each, in
turn. The table shows medians over the rounds; all losses of a round must agree, or the run stops. Growth with context, depth
and batch is from two steps each, of weights that need not be the same. Peers come from the environment that --peers names.

"8 ×" means that the batch goes through in eight micro-batches, whose gradients are added; "2 × 2" that the rows are split over
two devices of XLA, a core each, in two micro-batches; "kept" that the C library keeps freed memory for the next step, as the
Makefile tells it to, and does not give it back.

FLOPs are chapter 13's `training_flops`: 6 · matmul weights · tokens, and 12 · H · Dh · L for each pair of a query and a
key that the causal mask shows; what a program computes twice counts once. The peak is the fastest matrix product, timed
in each round, the median too. CPU seconds are those of all threads: on a machine that does other work they
say more than the time that passed. Page faults are those of the whole process in a step.
"""

import argparse
import json
import os
import random
import re
import resource
import sys
import time
from pathlib import Path

from decode import ROOT, Contender, median, serve

RESULTS, PICTURE = ROOT / "results" / "train_speed.json", ROOT / "benchmarks" / "train.png"
COMMAND = "make bench-train"
FOLDER = ROOT / "runs" / "bench" / "train"  # the first weights, for the peers
VOCABULARY, LAYERS, ROWS, CONTEXT = 4096, 8, 16, 256
RATE, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
MAIN = (LAYERS, ROWS, CONTEXT)
# nearly the step of `make train`, whose attention heads are wider and whose output head is tied
SHORT = (4, 2, CONTEXT)
# layers, rows, context: everything else stays, and micro-batches have 512 tokens or one row
GROWTH = {
    "context": [(LAYERS, ROWS * CONTEXT // t, t) for t in (256, 512, 1024, 2048)],
    "depth": [(layers, ROWS, CONTEXT) for layers in (4, 8, 16)],
    "batch": [(LAYERS, rows, CONTEXT) for rows in (4, 16, 32)],
}
GROWING = ("ours, 8 ×, kept", "eager, 8 ×, kept")
WARM = 8  # rounds before the first that counts
SHORT_ROUNDS = 20
STEPS = 3  # of each growth shape: one to compile, the others count


def tokens(rows: int, context: int) -> list[list[int]]:
    """Random ids, one more than the context in each row; the same for every contender."""
    draw = random.Random(0)
    return [[draw.randrange(VOCABULARY) for _ in range(context + 1)] for _ in range(rows)]


def micro_batches(rows: int, context: int) -> int:
    """So many that each has 512 tokens, or one row."""
    return rows // max(1, 512 // context)


class Clock:
    """Seconds, the CPU seconds of all threads, and the page faults since it was made."""

    def __init__(self):
        self.start = self.now()

    def now(self) -> tuple[float, float, int]:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return time.perf_counter(), time.process_time(), faults

    def read(self) -> dict[str, float]:
        used = (b - a for a, b in zip(self.start, self.now(), strict=True))
        return dict(zip(("seconds", "cpu", "faults"), used, strict=True))


class Ours:
    """Chapter 3's `make_step` on chapter 11's loss and optimiser."""

    batches = ()

    def __init__(self, micro: bool, split: bool = False):
        self.micro, self.split = micro, split
        if split:  # before JAX starts
            os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        self.prepare(LAYERS, ROWS, CONTEXT)

    def prepare(self, layers: int, rows: int, context: int) -> None:
        import equinox as eqx
        import jax
        import numpy as np

        from llm_from_scratch.pretraining import make_optimizer, next_token_loss
        from llm_from_scratch.training import compile_step, make_step, train_state

        ids = np.array(tokens(rows, context), np.int32)
        batch = {
            "tokens": ids[:, :-1],
            "targets": ids[:, 1:],
            "segments": np.zeros_like(ids[:, 1:]),
        }
        n = 2 if self.split else micro_batches(rows, context) if self.micro else 1
        if n > 1:
            batch = {name: x.reshape(n, -1, context) for name, x in batch.items()}
        optimizer = make_optimizer(
            steps=10**6,
            peak=RATE,
            warmup=0,
            weight_decay=DECAY,
            b1=BETAS[0],
            b2=BETAS[1],
            clip=CLIP,
        )
        self.state, self.key = train_state(model(layers), optimizer), jax.random.key(0)
        self.run = compile_step(make_step(next_token_loss, optimizer, accumulate=n), self.state)
        self.batch = jax.device_put(batch, self.shards(None, "rows") if self.split else None)
        if self.split:
            put = lambda x: jax.device_put(x, self.shards()) if eqx.is_array(x) else x  # noqa: E731
            self.state, self.key = jax.tree.map(put, (self.state, self.key))

    def shards(self, *axes):
        """Axes of an array to split over the two devices; without any, each holds the whole."""
        import jax
        from jax.sharding import AxisType, NamedSharding, PartitionSpec

        mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
        return NamedSharding(mesh, PartitionSpec(*axes))

    def step(self) -> dict[str, float]:
        """What the clock says of a step, and the loss."""
        import jax

        clock = Clock()
        self.state, metrics = jax.block_until_ready(self.run(self.state, self.batch, self.key))
        return clock.read() | {"loss": float(metrics["loss"])}


class Transformers:
    """transformers' LlamaForCausalLM with PyTorch's sdpa attention and fused AdamW."""

    batches = ()

    def __init__(self, threads: int, micro: bool, compiled: bool):
        import torch

        torch.set_num_threads(threads)
        self.micro, self.compiled = micro, compiled
        self.prepare(LAYERS, ROWS, CONTEXT)

    def prepare(self, layers: int, rows: int, context: int) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        options = {"attn_implementation": "sdpa", "dtype": torch.float32}
        if (FOLDER / str(layers)).exists():
            self.model = LlamaForCausalLM.from_pretrained(
                FOLDER / str(layers), use_cache=False, **options
            )
        else:  # growth compares no losses
            known = FOLDER / str(LAYERS)
            config = LlamaConfig.from_pretrained(known, use_cache=False, num_hidden_layers=layers)
            self.model = LlamaForCausalLM._from_config(config, **options)
        self.model.train()
        self.run = torch.compile(self.model) if self.compiled else self.model
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        gains = [p for p in self.model.parameters() if p.ndim != 2]
        groups = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True
        )
        ids, n = torch.tensor(tokens(rows, context)), micro_batches(rows, context)
        parts = (ids[:, :-1], ids[:, 1:])
        parts = [x.reshape(n if self.micro else 1, -1, context).contiguous() for x in parts]
        self.parts = list(zip(*parts, strict=True))

    def step(self) -> dict[str, float]:
        """What the clock says of a step, and the loss."""
        import torch

        clock, total = Clock(), 0.0
        for ids, targets in self.parts:
            out = self.run(input_ids=ids, labels=targets, shift_labels=targets)
            loss = out.loss / len(self.parts)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return clock.read() | {"loss": total}


class Machine:
    """The fastest matrix product of three sizes, measured between the contenders."""

    batches = ()

    def limits(self) -> float:
        """FLOP/s."""
        from llm_from_scratch.pretraining import matmul_peak

        return 1e9 * max(matmul_peak(size, repeats=16) for size in (512, 1024, 2048))


MACHINE, KEPT = "machine", ", kept"
CONTENDERS = {
    MACHINE: lambda threads: Machine(),
    "ours, 1 ×": lambda threads: Ours(micro=False),
    "ours, 8 ×": lambda threads: Ours(micro=True),
    "ours, 2 × 2": lambda threads: Ours(micro=True, split=True),
    "eager, 1 ×": lambda threads: Transformers(threads, micro=False, compiled=False),
    "eager, 8 ×": lambda threads: Transformers(threads, micro=True, compiled=False),
    "compiled, 1 ×": lambda threads: Transformers(threads, micro=False, compiled=True),
    "compiled, 8 ×": lambda threads: Transformers(threads, micro=True, compiled=True),
}
CONTENDERS |= {name + KEPT: make for name, make in CONTENDERS.items() if name != MACHINE}


def memory_habit(name: str) -> str:
    """What the C library is told about freed memory: the Makefile's setting for the "kept", else nothing."""
    makefile = (ROOT / "Makefile").read_text()
    return re.search(r"GLIBC_TUNABLES \?= (\S+)", makefile)[1] if name.endswith(KEPT) else ""


def config(layers: int = LAYERS):
    """The shape of the mini model; 7.7 million parameters with eight layers."""
    from llm_from_scratch.llama import LlamaConfig

    return LlamaConfig(VOCABULARY, 256, layers, 8, 2, 704, 32, max_seq_len=4096)


def model(layers: int = LAYERS):
    """Its first weights."""
    import jax

    from llm_from_scratch.llama import Llama

    return Llama(config(layers), key=jax.random.key(0))


def write_weights() -> None:
    """The first weights of the two timed models in Hugging Face's format, for the peers."""
    import jax.numpy as jnp

    from llm_from_scratch import formats
    from llm_from_scratch.training import named_arrays

    for layers in (LAYERS, SHORT[0]):
        folder, shape = FOLDER / str(layers), config(layers)
        folder.mkdir(parents=True, exist_ok=True)
        arrays, names = named_arrays(model(layers)), formats.tensor_names(shape, "hugging face")
        theirs = {names[ours]: arrays[ours] for ours in names}
        formats.write_safetensors(folder / "model.safetensors", theirs, jnp.float32)
        formats.write_json(folder / "config.json", formats.hf_config_fields(shape, jnp.float32))


def measure(contenders: list[Contender], rounds: int, task: str) -> list[dict]:
    """One row for each round and contender; the first WARM rounds are thrown away: a process is slow at first."""
    rows = []
    for number in range(1 - WARM, rounds + 1):
        kept = []
        for contender in contenders:
            row = {"round": number, "contender": contender.name, "task": task}
            if contender.name == MACHINE:
                kept.append(row | {"flops": contender.ask("limits")})
            else:
                kept.append(row | contender.ask("step"))
        losses = [row["loss"] for row in kept if "loss" in row]
        if max(losses) - min(losses) > 0.05:  # rounding grows from step to step
            sys.exit(f"not the same training: losses {losses}")
        print(f"round {number} of {rounds}: loss {losses[0]:.3f}", file=sys.stderr, flush=True)
        rows += kept if number > 0 else []
    return rows


def grow(contenders: list[Contender]) -> list[dict]:
    """A few steps at other contexts, depths and batches; each shape is compiled anew."""
    rows = []
    for name, shapes in GROWTH.items():
        for shape in shapes:
            if shape == MAIN:
                continue
            for contender in contenders:
                contender.ask("prepare", *shape)
            for number in range(STEPS):
                for contender in contenders:
                    row = {"contender": contender.name, "task": name, "shape": list(shape)}
                    row |= contender.ask("step")
                    rows += [row] if number else []
        print(f"growth with {name}", file=sys.stderr, flush=True)
    return rows


def flops(layers: int = LAYERS, rows: int = ROWS, context: int = CONTEXT) -> int:
    """FLOPs of one step, see the top of this file."""
    from llm_from_scratch.costs import training_flops

    return training_flops(config(layers), rows, context)


def grown(rows: list[dict], task: str, shape: tuple, name: str) -> float | None:
    """Seconds a step at a shape of GROWTH."""
    wanted = {"task": "step"} if shape == MAIN else {"task": task, "shape": list(shape)}
    return median(rows, contender=name, **wanted)


def table(stored: dict) -> str:
    """The comparison as text."""
    rows, peak = stored["rows"], stored["peak"]
    lines = [f"peak of this run: {peak / 1e9:.0f} GFLOP/s; {stored['threads']} threads; medians"]
    head = f"{'s a step':>10}{'CPU s':>8}{'faults':>9}{'tokens/s':>10}{'of peak':>9}{'GB':>6}"
    lines.append(f"{'':21}{head}")
    for name, gigabytes in stored["gigabytes"].items():
        seconds, cpu, faults = (
            median(rows, field, task="step", contender=name)
            for field in ("seconds", "cpu", "faults")
        )
        share, rate = stored["flops"] / seconds / peak, ROWS * CONTEXT / seconds
        line = f"{seconds:10.2f}{cpu:8.2f}{faults:9,.0f}{rate:10.0f}{share:9.0%}{gigabytes:6.2f}"
        lines.append(f"{name:21}{line}")
    lines.append(f"{SHORT[1]} rows, {SHORT[0]} layers")
    for name in stored["gigabytes"]:
        if seconds := median(rows, task="short", contender=name):
            faults = median(rows, "faults", task="short", contender=name)
            lines.append(f"{name:21}{seconds:10.3f}{faults:17,.0f}")
    for task in GROWTH:
        lines.append(f"growth with {task}: layers, rows, context; s a step")
        for shape in GROWTH[task]:
            found = {n: grown(rows, task, shape, n) for n in GROWING}
            shown = "   ".join(f"{n} {s:.2f}" for n, s in found.items() if s)
            lines.append(f"  {shape!s:16} {shown}")
    return "\n".join(lines)


def draw(stored: dict) -> None:
    """Tokens per second of every contender, and against the context of those that grew."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = stored["rows"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    names = list(stored["gigabytes"])
    rate = [ROWS * CONTEXT / median(rows, task="step", contender=n) for n in names]
    left.barh(names, rate, color=["tab:blue" if n.startswith("ours") else "grey" for n in names])
    left.invert_yaxis()
    left.set(xlabel="tokens per second", title=f"{ROWS} × {CONTEXT} tokens, {LAYERS} layers, fp32")
    for name in (n for n in GROWING if n in names):
        seconds = {shape[2]: grown(rows, "context", shape, name) for shape in GROWTH["context"]}
        rate = {t: ROWS * CONTEXT / s for t, s in seconds.items() if s}
        right.plot(list(rate), list(rate.values()), "o-", label=name)
    right.set(xlabel="context (same number of tokens)", ylabel="tokens per second", ylim=(0, None))
    right.set_xscale("log", base=2)
    right.legend()
    fig.tight_layout()
    fig.savefig(PICTURE, dpi=100)


def publish(stored: dict) -> None:
    """File, picture and table."""
    RESULTS.write_text(json.dumps(stored) + "\n")
    draw(stored)
    print(table(stored), flush=True)


def main() -> None:
    """Run the benchmark, or serve one contender of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default=str(ROOT / ".venv-peers" / "bin" / "python"))
    parser.add_argument("--only", nargs="*", help="contenders, by the start of their names")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(CONTENDERS[options.serve], options.cores)
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    write_weights()
    pythons = {n: sys.executable for n in CONTENDERS if n == MACHINE or n.startswith("ours")}
    if Path(options.peers).exists():
        pythons |= {name: options.peers for name in CONTENDERS if name not in pythons}
    else:
        print(f"no {options.peers}: our own rows only (make peers)", file=sys.stderr)
    wanted = (MACHINE, *(options.only or CONTENDERS))
    pythons = {name: python for name, python in pythons.items() if name.startswith(wanted)}
    contenders = [
        Contender(name, python, cores, __file__, GLIBC_TUNABLES=memory_habit(name))
        for name, python in pythons.items()
    ]
    busy = os.getloadavg()[0]
    rows = measure(contenders, options.rounds, "step")
    peak = median(rows, "flops", contender=MACHINE)
    stored = {"command": COMMAND, "threads": len(cores), "load": busy, "peak": peak}
    stored |= {
        "flops": flops(),
        "flops as": __doc__.strip().rpartition("\n\n")[2].replace("\n", " "),
    }
    stored["gigabytes"] = {c.name: round(c.gigabytes, 2) for c in contenders if c.name != MACHINE}
    publish(stored | {"rows": rows})  # the rest takes as long again and may be interrupted
    small = [c for c in contenders if "1 ×" in c.name]
    for contender in small:
        contender.ask("prepare", *SHORT)
    rows += measure(small, SHORT_ROUNDS, "short")
    publish(stored | {"rows": rows})
    rows += grow([c for c in contenders if c.name in GROWING])
    for contender in contenders:
        contender.close()
    publish(stored | {"rows": rows})


if __name__ == "__main__":
    main()
