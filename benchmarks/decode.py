"""Prefill and decode of SmolLM2-135M-Instruct in fp32: ours against transformers and llama.cpp, in one run.

`make bench` runs it and writes results/decode.json and benchmarks/decode.png. Every contender is a process of its own
with the same weights, on the same cores and threads. They wait for each other: each round times every task of every
contender once, in turn, and the table shows medians over the rounds. Peers come from the environment that --peers
names (made by `make peers`); without it only our own rows are made.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURE = ROOT / "results" / "decode.json", ROOT / "benchmarks" / "decode.png"
COMMAND = "make bench"
WEIGHTS = ROOT / "runs" / "bench"  # the same fp32 weights for the peers, written once
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROMPT, LONG = 32, 512


def prompts(batch: int, length: int) -> list[list[int]]:
    """Ordinary ids, different in each row and the same for every contender."""
    return [[1000 + (37 * i + 101 * row) % 20_000 for i in range(length)] for row in range(batch)]


def steps_of(batch: int) -> int:
    """How many decode steps are timed: a slow step needs fewer."""
    return 32 if batch <= 8 else 8


def peak_gigabytes() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# The contenders: `decode` gives the seconds per step, after the prefill, and the first row's tokens.


class Ours:
    """This course's `generation.decode`, the loop under `generate` and `stream`, on a fused model."""

    batches = BATCHES

    def __init__(self):
        from llm_from_scratch import formats, generation

        self.generation = generation
        self.model = generation.fuse(formats.load(formats.smollm2_path())[0])

    def decode(self, batch: int) -> tuple[float, list[int]]:
        options = {"sampler": self.generation.Sampler(temperature=0), "key": None}
        steps = self.generation.decode(
            self.model, prompts(batch, PROMPT), max_tokens=steps_of(batch) + 1, **options
        )
        tokens = [int(next(steps)[0])]
        start = time.perf_counter()
        tokens += [int(chosen[0]) for chosen in steps]
        return (time.perf_counter() - start) / steps_of(batch), tokens

    def prefill(self) -> float:
        import jax
        import numpy as np

        start = time.perf_counter()
        tokens, lengths = np.array(prompts(1, LONG), np.int32), np.array([LONG], np.int32)
        jax.block_until_ready(self.generation.prefill(self.model, tokens, lengths, slots=576))
        return time.perf_counter() - start


class Machine:
    """What the machine itself can do, measured between the contenders; a process of its own, for its memory."""

    batches = ()

    def __init__(self):
        from llm_from_scratch import formats

        self.model, _ = formats.load(formats.smollm2_path())

    def limits(self) -> dict[str, float]:
        """What the machine can do now: bytes read per second by one large matrix–vector product, and FLOP/s."""
        import jax
        import jax.numpy as jnp

        from llm_from_scratch.pretraining import matmul_peak

        matrix, vector = jnp.ones((2**15, 2**12)), jnp.ones(2**12)
        product = jax.jit(lambda m, v: m @ v)
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            product(matrix, vector).block_until_ready()
            seconds.append(time.perf_counter() - start)
        return {"read": matrix.nbytes / min(seconds), "flops": 1e9 * matmul_peak()}

    def layouts(self) -> dict[str, float]:
        """Bytes per second of all matrices of the model applied to one vector, for each way to store them."""
        import jax
        import jax.numpy as jnp

        def apply(weights, x, product):
            for w in weights:
                y = product(x[: w[0].shape[w[1]]], w[0])
                x = jnp.resize(y, x.shape) + x
            return x

        found, x = {}, jnp.full(1536, 0.1)
        blocks = [b for b in self.model.blocks]
        parts = [
            [
                b.attention.w_query,
                b.attention.w_key,
                b.attention.w_value,
                b.attention.w_out,
                b.feed_forward.w_gate,
                b.feed_forward.w_up,
                b.feed_forward.w_down,
            ]
            for b in blocks
        ]
        fused = [[jnp.concatenate(p[:3]), p[3], jnp.concatenate(p[4:6]), p[6]] for p in parts]
        row = lambda x, w: jax.lax.dot_general(x[None], w, (((1,), (1,)), ((), ())))[0]  # noqa: E731
        for name, group, product, transposed in (
            ("(1, in) · (out, in)ᵀ, as `linear`", parts, row, False),
            ("(out, in) · (in)", parts, lambda x, w: w @ x, False),
            ("(in) · (in, out)", parts, lambda x, w: x @ w, True),
            ("fused, (1, in) · (out, in)ᵀ", fused, row, False),
            ("fused, (out, in) · (in)", fused, lambda x, w: w @ x, False),
            ("fused, (in) · (in, out)", fused, lambda x, w: x @ w, True),
        ):
            weights = [w.T.copy() if transposed else w for layer in group for w in layer]
            axis = 0 if transposed else 1
            run = jax.jit(
                lambda ws, x, product=product, axis=axis: apply([(w, axis) for w in ws], x, product)
            )
            run(weights, x).block_until_ready()
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                run(weights, x).block_until_ready()
                seconds.append(time.perf_counter() - start)
            found[name] = sum(w.nbytes for w in weights) / statistics.median(seconds)
        return found


class Transformers:
    """transformers' LlamaForCausalLM on the CPU with its cache, called directly: `generate` would add its own time."""

    batches = (1, 8)

    def __init__(self, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(WEIGHTS / "hf", dtype=torch.float32)

    def step(self, tokens, past=None):
        return self.model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)

    def decode(self, batch: int) -> tuple[float, list[int]]:
        out = self.step(self.torch.tensor(prompts(batch, PROMPT)))
        chosen = out.logits[:, -1].argmax(-1, keepdim=True)
        tokens, start = [int(chosen[0])], time.perf_counter()
        for _ in range(steps_of(batch)):
            out = self.step(chosen, out.past_key_values)
            chosen = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(chosen[0]))
        return (time.perf_counter() - start) / steps_of(batch), tokens

    def prefill(self) -> float:
        start = time.perf_counter()
        self.step(self.torch.tensor(prompts(1, LONG)))
        return time.perf_counter() - start


class LlamaCpp:
    """llama.cpp through llama-cpp-python, with weights and cache in fp32."""

    batches = (1,)

    def __init__(self, threads: int):
        import llama_cpp

        self.model = llama_cpp.Llama(
            str(WEIGHTS / "model.gguf"),
            n_ctx=576,
            n_batch=LONG,
            n_ubatch=LONG,
            n_threads=threads,
            n_threads_batch=threads,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )

    def decode(self, batch: int) -> tuple[float, list[int]]:
        self.model.reset()
        steps = self.model.generate(
            prompts(1, PROMPT)[0], temp=0.0, repeat_penalty=1.0, reset=False
        )
        tokens = [next(steps)]
        start = time.perf_counter()
        tokens += [next(steps) for _ in range(steps_of(batch))]
        return (time.perf_counter() - start) / steps_of(batch), tokens

    def prefill(self) -> float:
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(prompts(1, LONG)[0])
        return time.perf_counter() - start


CONTENDERS = {
    "machine": lambda threads: Machine(),
    "ours": lambda threads: Ours(),
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
}


def serve(make: Callable[[int], object], cores: list[int]) -> None:
    """A contender's process: one JSON answer per line of commands. `make` is given the threads."""
    os.sched_setaffinity(0, cores)
    contender = make(len(cores))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be mistaken for an answer
    print(json.dumps({"batches": contender.batches}), file=answers, flush=True)
    for line in sys.stdin:
        task, *arguments = line.split()
        answer = getattr(contender, task)(*map(int, arguments))
        print(json.dumps({"answer": answer, "gb": peak_gigabytes()}), file=answers, flush=True)


class Contender:
    """The other end of `serve`."""

    def __init__(
        self, name: str, python: str, cores: list[int], script: str = __file__, **environment: str
    ):
        environment = os.environ | {"OMP_NUM_THREADS": str(len(cores))} | environment
        command = [python, script, "--serve", name, "--cores", *map(str, cores)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.name, self.gigabytes, self.warm = name, 0.0, False
        self.batches = self.read()["batches"]

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with code {self.process.wait()}: see its message above")
        return json.loads(line)

    def ask(self, task: str, *arguments: int):
        print(task, *arguments, file=self.process.stdin, flush=True)
        answer = self.read()
        if not self.warm and (not arguments or arguments[0] <= 8):
            self.gigabytes = answer["gb"]
        return answer["answer"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def write_weights() -> None:
    """The fp32 weights as a Hugging Face folder and a GGUF file, for the peers."""
    from llm_from_scratch import formats

    if not (WEIGHTS / "model.gguf").exists():
        model, tokenizer = formats.load(formats.smollm2_path())
        WEIGHTS.mkdir(parents=True, exist_ok=True)
        formats.save_hugging_face(WEIGHTS / "hf", model, tokenizer)
        formats.save_gguf(WEIGHTS / "model.gguf", model, tokenizer, "F32")


def measure(contenders: list[Contender], rounds: int) -> list[dict]:
    """One row for each round, contender, task and batch; round 0 compiles and is thrown away."""
    rows = []
    for number in range(rounds + 1):
        kept = []
        for contender in contenders:
            row = {"round": number, "contender": contender.name}
            if contender.name == "machine":
                kept.append(row | {"task": "limits", **contender.ask("limits")})
                kept.append(row | {"task": "layouts", "rates": contender.ask("layouts")})
                continue
            kept.append(row | {"task": "prefill", "batch": 1, "seconds": contender.ask("prefill")})
            for batch in contender.batches:
                seconds, tokens = contender.ask("decode", batch)
                kept.append(row | {"task": "decode", "batch": batch, "seconds": seconds})
                kept[-1]["tokens"] = tokens
            contender.warm = True
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
        rows += kept if number else []
    return rows


def median(rows: list[dict], field: str = "seconds", **wanted) -> float | None:
    """The median over the rounds of the rows that match, None if there is no such row."""
    found = [r[field] for r in rows if all(r.get(k) == v for k, v in wanted.items())]
    return statistics.median(found) if found else None


def table(stored: dict) -> str:
    """The comparison as text."""
    rows, lines = stored["rows"], []
    read = median(rows, "read", task="limits")
    lines.append(f"read bandwidth {read / 1e9:.1f} GB/s, weights {stored['bytes'] / 1e6:.0f} MB")
    lines.append(f"{'':14}{'prefill 512':>13}{'decode':>9}{'of limit':>10}{'batch 8':>9}   GB")
    for name, gigabytes in stored["gigabytes"].items():
        one, eight = (median(rows, task="decode", contender=name, batch=b) for b in (1, 8))
        long = median(rows, task="prefill", contender=name)
        share = stored["bytes"] / one / read
        many = f"{8 / eight:9.0f}" if eight else f"{'–':>9}"
        line = f"{name:14}{LONG / long:13.0f}{1 / one:9.1f}{share:10.0%}{many}{gigabytes:5.1f}"
        lines.append(line)
    return "\n".join([*lines, "(tokens per second; medians)"])


def draw(stored: dict) -> None:
    """Throughput against latency of our batch sweep, the peers beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6.5, 4))
    for name in stored["gigabytes"]:
        batches = [b for b in BATCHES if median(stored["rows"], contender=name, batch=b)]
        step = [median(stored["rows"], contender=name, task="decode", batch=b) for b in batches]
        rate = [b / s for b, s in zip(batches, step, strict=True)]
        ax.plot([1000 * s for s in step], rate, "o-", label=name)
        for b, s, r in zip(batches, step, rate, strict=True):
            ax.annotate(str(b), (1000 * s, r), textcoords="offset points", xytext=(5, -9))
    ax.set(xlabel="milliseconds per step (latency)", ylabel="tokens per second (throughput)")
    ax.set(xscale="log", yscale="log", title="SmolLM2-135M, fp32, labels: batch")
    ax.legend()
    fig.tight_layout()
    fig.savefig(PICTURE, dpi=100)


def main() -> None:
    """Run the benchmark, or serve one contender of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default=str(ROOT / ".venv-peers" / "bin" / "python"))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(CONTENDERS[options.serve], options.cores)
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    write_weights()
    names = {"machine": sys.executable, "ours": sys.executable}
    if Path(options.peers).exists():
        names |= {"transformers": options.peers, "llama.cpp": options.peers}
    else:
        print(f"no {options.peers}: our own rows only (make peers)", file=sys.stderr)
    contenders = [
        Contender(name, python, cores, GLIBC_TUNABLES="") for name, python in names.items()
    ]
    rows = measure(contenders, options.rounds)
    weights = (WEIGHTS / "hf" / "model.safetensors").stat().st_size
    stored = {"command": COMMAND, "threads": len(cores), "bytes": weights, "prompt": PROMPT}
    stored |= {"long": LONG, "rows": rows}
    stored["gigabytes"] = {c.name: round(c.gigabytes, 2) for c in contenders if c.batches}
    for contender in contenders:
        contender.close()
    RESULTS.write_text(json.dumps(stored) + "\n")
    draw(stored)
    print(table(stored))


if __name__ == "__main__":
    main()
