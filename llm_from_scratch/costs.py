"""What a Llama costs before it runs: FLOPs, bytes, seconds and devices by formula, for every published size, and each formula held against XLA or a stopwatch.

Written from chapters/13_costs.py by `make export`: edit there.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from llm_from_scratch.llama import CONFIGS, LlamaConfig, block_count, count_params
from llm_from_scratch.pretraining import matmul_peak


@dataclasses.dataclass(frozen=True)
class Device:
    """What a chip can do at best: the numbers of its data sheet, or measured ones.

    flops: FLOP/s of dense matrix products by number format; bandwidth: bytes/s read from its memory;
    capacity: bytes; link: bytes/s that it sends to its neighbours, one way (0: it has none); group: how
    many are joined by links of that speed; source: where the numbers come from.
    Raises ValueError for a number that is not positive (a link may be 0).
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    capacity: float
    link: float = 0.0
    group: int = 1
    source: str = ""

    def __post_init__(self):
        for field in ("bandwidth", "capacity", "group"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive, got {field}={getattr(self, field)}")
        if not self.flops or not all(v > 0 for v in self.flops.values()) or not self.link >= 0:
            raise ValueError(
                f"flops must be positive and link 0 or more: {self.flops}, {self.link}"
            )
        if unknown := set(self.flops) - set(BYTES):
            raise ValueError(f"unknown number formats {sorted(unknown)}; there are {sorted(BYTES)}")

    def peak(self, dtype: str) -> float:
        """FLOP/s in this number format. Raises ValueError, naming those it has, for another one."""
        if dtype not in self.flops:
            raise ValueError(f"{self.name} has no peak for {dtype!r}; it has {sorted(self.flops)}")
        return self.flops[dtype]


BYTES = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1}  # of one number in each format


def nvidia(name, bf16, fp32, low, bandwidth, capacity, link, source) -> Device:
    """An NVIDIA GPU: TFLOP/s in bf16, fp32 and (format, TFLOP/s), GB/s, GB, NVLink GB/s both ways."""
    flops = {"bf16": bf16 * 1e12, "fp32": fp32 * 1e12, low[0]: low[1] * 1e12}
    return Device(name, flops, bandwidth * 1e9, capacity * 1e9, link * 1e9 / 2, 8, source)


def tpu(name, bf16, int8, bandwidth, capacity, link, group, source) -> Device:
    """A Google TPU chip: TFLOP/s in bf16 and int8, GB/s, GB, inter-chip GB/s both ways.

    The links are summed: a single ring uses fewer of them, so that link times are lower bounds.
    """
    flops = {"bf16": bf16 * 1e12, "int8": int8 * 1e12}
    return Device(name, flops, bandwidth * 1e9, capacity * 1e9, link * 1e9 / 2, group, source)


AMPERE = "NVIDIA A100 data sheet (SXM4), dense"
HOPPER = "NVIDIA H100 and H200 data sheets (SXM5); bf16 and fp8: half of the figures with sparsity"
PUBLISHED = (
    nvidia("a100-40gb", 312, 19.5, ("int8", 624), 1555, 40, 600, AMPERE),
    nvidia("a100", 312, 19.5, ("int8", 624), 2039, 80, 600, AMPERE),
    nvidia("h100", 989, 67, ("fp8", 1979), 3350, 80, 900, HOPPER),
    nvidia("h200", 989, 67, ("fp8", 1979), 4800, 141, 900, HOPPER),
    tpu("tpu-v5e", 197, 393, 819, 16, 400, 256, "Google Cloud documentation, TPU v5e"),
    tpu("tpu-v5p", 459, 918, 2765, 95, 1200, 8960, "Google Cloud documentation, TPU v5p"),
)


def read_bandwidth(floats: int = 128_000_000, repeats: int = 5) -> float:
    """Bytes per second of a sum over half a gigabyte of fp32, the best of a few."""
    x, total = jnp.ones(floats, jnp.float32), jax.jit(jnp.sum)
    total(x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        total(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 4 * floats / best


@functools.cache
def this_machine() -> Device:
    """The CPU that this runs on, in fp32: measured once, then remembered."""
    capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flops = {"fp32": 1e9 * matmul_peak()}
    return Device("this machine", flops, read_bandwidth(), capacity, source="measured now")


class Devices(Mapping):
    """Devices by name. "this machine" is one of them, measured when it is first asked for."""

    def __init__(self, devices: tuple[Device, ...]):
        self._known = {device.name: device for device in devices}

    def __getitem__(self, name: str) -> Device:
        if name == "this machine":
            return this_machine()
        if name not in self._known:
            raise KeyError(f"no device {name!r}; there are {', '.join(self)}")
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._known, "this machine"])

    def __len__(self) -> int:
        return len(self._known) + 1


DEVICES = Devices(PUBLISHED)


def matmul_weights(config: LlamaConfig) -> int:
    """How many weights multiply each token: all matrices but the embedding, whose rows are looked up."""
    c = config
    attention = c.dim * c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads)
    return c.n_layers * (attention + 3 * c.dim * c.hidden_dim) + c.vocab_size * c.dim


def attended_pairs(new: int, cached: int = 0, count: str = "causal") -> int:
    """Pairs of a query and a key in one row of `new` tokens that follow `cached` ones.

    count: "causal", those that the mask shows; "full", all of them; "blocks", those that chapter 10's
    `attention` computes, which has no cache. Raises ValueError for another count.
    """
    if count == "causal":
        return new * cached + new * (new + 1) // 2
    if count == "full":
        return new * (cached + new)
    if count != "blocks":
        raise ValueError(f"count must be 'causal', 'full' or 'blocks', got {count!r}")
    if cached:
        raise ValueError(f"'blocks' counts a pass without a cache, got cached={cached}")
    n = block_count(new)
    size = -(-new // n)
    return n * (n + 1) // 2 * size**2


def forward_flops(
    config: LlamaConfig,
    batch: int,
    new: int,
    *,
    cached: int = 0,
    count: str = "causal",
    logits: int | None = None,
) -> int:
    """FLOPs of the matrix products of a forward pass over `batch` rows of `new` tokens.

    cached: tokens of each row that a cache holds; count: see `attended_pairs`; logits: positions of
    each row whose logits are computed (default: all). A multiply–add is two. Norms, softmax and rotary
    angles are left out: a per cent or less.
    """
    head = config.vocab_size * config.dim
    logits = new if logits is None else logits
    weights = (matmul_weights(config) - head) * new + head * logits
    per_pair = 2 * config.n_heads * config.head_dim * config.n_layers
    return 2 * batch * (weights + per_pair * attended_pairs(new, cached, count))


def training_flops(config: LlamaConfig, batch: int, context: int, *, count: str = "causal") -> int:
    """FLOPs of the matrix products of one training step: forward once, backward twice that.

    With count="blocks" also the scores, which chapter 10's backward pass computes again. No activation
    checkpointing; the optimiser is left out.
    """
    flops = 3 * forward_flops(config, batch, context, count=count)
    if count != "blocks":
        return flops
    again = 2 * config.n_heads * config.head_dim * config.n_layers
    return flops + again * batch * attended_pairs(context, count=count)


def mfu(
    flops: float, seconds: float, device: Device, devices: int = 1, dtype: str = "bf16"
) -> float:
    """Model FLOPs utilisation: the share of the devices' dense peak that went into these FLOPs."""
    return flops / (seconds * devices * device.peak(dtype))


def cache_bytes(config: LlamaConfig, batch: int, context: int, dtype: str = "bf16") -> int:
    """Bytes of the KV cache of `batch` rows of `context` tokens: 2 · L · K · Dh numbers a token."""
    per_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    return batch * context * per_token * BYTES[dtype]


def max_batch(
    config: LlamaConfig, device: Device, context: int, *, devices: int = 1, dtype: str = "bf16"
) -> int:
    """How many rows of `context` tokens fit beside the weights; 0 if not one does.

    Only weights and cache are counted: programs and intermediate arrays need room as well.
    """
    free = devices * device.capacity - count_params(config) * BYTES[dtype]
    return max(0, int(free // cache_bytes(config, 1, context, dtype)))


def activation_bytes(
    config: LlamaConfig,
    batch: int,
    context: int,
    dtype: str = "fp32",
    *,
    scores: int = 0,
    recompute: bool = False,
) -> int:
    """Bytes that the forward pass of chapter 10 leaves for the backward pass.

    scores: copies of all T × T attention scores that are kept (chapter 10 keeps none);
    recompute: keep each layer's input only, and one layer's activations at a time.
    """
    c = config
    kept = 4 * (c.n_heads + c.n_kv_heads) * c.head_dim + c.n_heads
    heads = kept + scores * c.n_heads * context
    layer = 6 * c.dim + heads + 5 * c.hidden_dim
    layers = c.n_layers * c.dim + layer if recompute else c.n_layers * layer
    return round(batch * context * (layers + 4 * c.dim + 2 * c.vocab_size) * BYTES[dtype])


def training_bytes(
    config: LlamaConfig,
    batch: int,
    context: int,
    dtype: str = "bf16",
    *,
    scores: int = 0,
    recompute: bool = False,
) -> dict[str, int]:
    """Bytes of a training step with Adam, by part: weights, gradients, optimizer, activations.

    In a narrow format the optimiser also holds an fp32 copy of the weights: 16 bytes a parameter in bf16
    and in fp32, 14 in one-byte formats. Their sum is an upper limit, since XLA gives gradients the room
    of activations that are no longer needed. For scores and recompute see `activation_bytes`, which was
    checked against XLA in fp32 only.
    """
    n, size = count_params(config), BYTES[dtype]
    kept = activation_bytes(config, batch, context, dtype, scores=scores, recompute=recompute)
    averages = 8 * n if dtype == "fp32" else 12 * n
    return {"weights": size * n, "gradients": size * n, "optimizer": averages, "activations": kept}


def critical_batch(device: Device, dtype: str = "bf16") -> float:
    """Tokens per pass at which multiplying by a weight takes as long as reading it."""
    return device.peak(dtype) / device.bandwidth * BYTES[dtype] / 2


@dataclasses.dataclass(frozen=True)
class Latency:
    """A lower bound on a time, in seconds: arithmetic and memory overlap, the links come on top."""

    compute: float
    memory: float
    link: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory) + self.link

    @property
    def bound(self) -> str:
        """Which of the three is the largest: compute, memory or link."""
        parts = dataclasses.asdict(self)
        return max(parts, key=parts.get)


def latency(
    device: Device, flops: float, moved: float, sent: float = 0, *, devices: int = 1, dtype: str
) -> Latency:
    """The bound for FLOPs and bytes `moved` to and from memory, both split evenly over the devices.

    sent: bytes that each device sends. Raises ValueError for several devices without a link.
    """
    if (devices > 1 or sent) and not device.link:
        raise ValueError(f"{device.name} has no link, it can't be one of devices={devices}")
    link = sent / device.link if sent else 0.0
    compute, memory = flops / device.peak(dtype), moved / device.bandwidth
    return Latency(compute / devices, memory / devices, link)


def tensor_parallel_bytes(
    config: LlamaConfig, tokens: int, devices: int, dtype: str = "bf16"
) -> int:
    """Bytes that each device sends in a forward pass: two ring all-reduces of tokens · D per layer."""
    array = tokens * config.dim * BYTES[dtype]
    return round(2 * config.n_layers * 2 * (devices - 1) / devices * array)


def prefill_time(
    config: LlamaConfig,
    device: Device,
    batch: int,
    context: int,
    *,
    devices: int = 1,
    dtype: str = "bf16",
) -> Latency:
    """Bound on the time to the first token: `batch` prompts of `context` tokens in one pass.

    Weights are read once, the cache is written, logits are computed for the last position only.
    """
    flops = forward_flops(config, batch, context, logits=1)
    moved = matmul_weights(config) * BYTES[dtype] + cache_bytes(config, batch, context, dtype)
    sent = tensor_parallel_bytes(config, batch * context, devices, dtype)
    return latency(device, flops, moved, sent, devices=devices, dtype=dtype)


def decode_time(
    config: LlamaConfig,
    device: Device,
    batch: int,
    context: int,
    *,
    devices: int = 1,
    dtype: str = "bf16",
) -> Latency:
    """Bound on the time per output token: one pass that writes token number `context` of each row."""
    flops = forward_flops(config, batch, 1, cached=context - 1)
    moved = matmul_weights(config) * BYTES[dtype] + cache_bytes(config, batch, context, dtype)
    sent = tensor_parallel_bytes(config, batch, devices, dtype)
    return latency(device, flops, moved, sent, devices=devices, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Report:
    """The costs of one model on some devices, made by `report`. str() is a table, draw() a figure.

    parameters; weights, cache, capacity: bytes over all devices; max_batch: rows of this context that
    fit; prefill, decode: bounds for the whole batch; training: bytes by part, with attention scores
    that are never stored; recomputed: the activations with activation checkpointing; step_flops,
    step_seconds: of one training step on batch · context tokens at the full peak, nothing recomputed.
    """

    config: LlamaConfig
    device: Device
    devices: int
    batch: int
    context: int
    dtype: str
    parameters: int
    weights: int
    cache: int
    capacity: float
    max_batch: int
    prefill: Latency
    decode: Latency
    training: dict[str, int]
    recomputed: int
    step_flops: int
    step_seconds: float

    @property
    def fits(self) -> bool:
        """Whether weights and cache fit into the devices' memory."""
        return self.weights + self.cache <= self.capacity

    @property
    def trains(self) -> bool:
        """Whether a training step fits, nothing recomputed."""
        return sum(self.training.values()) <= self.capacity  # an upper limit: see training_bytes

    def __str__(self) -> str:
        return table(self)

    def draw(self):
        """A matplotlib figure: memory against capacity, and time per token against the batch."""
        return figure(self)


def readable(value: float, unit: str, digits: int = 3) -> str:
    """A number with a decimal prefix: 1.61e10, "B" gives "16.1 GB"."""
    prefixes = ("n", "µ", "m", "", "k", "M", "G", "T", "P", "E", "Z", "Y")
    for power, prefix in enumerate(prefixes, start=-3):  # noqa: B007
        scaled = value / 1000.0**power
        if float(f"{scaled:.{digits}g}") < 1000:
            break
    return f"{float(f'{scaled:.{digits}g}'):,g} {prefix}{unit}"


def table(r: Report) -> str:
    """The text of a report."""
    time_of = lambda t: f"{readable(t.seconds, 's'):>9}  limited by {t.bound}"  # noqa: E731
    size_of = lambda size: f"{readable(size, 'B'):>9}"  # noqa: E731
    total = sum(r.training.values())
    rate = f"{r.batch / r.decode.seconds:,.0f} tokens/s"
    lines = [
        f"{r.parameters:,} parameters, {r.dtype}, {r.devices} × {r.device.name}, "
        f"batch {r.batch:,}, context {r.context:,}; times are lower bounds",
        "inference",
        f"  weights           {size_of(r.weights)}  of {readable(r.capacity, 'B')}",
        f"  KV cache          {size_of(r.cache)}  {cache_bytes(r.config, 1, 1, r.dtype):,} bytes a token",
        f"  fits              {'yes' if r.fits else 'no':>9}  largest batch {r.max_batch:,}",
        f"  first token       {time_of(r.prefill)}",
        f"  each next token   {time_of(r.decode)}; {rate} in all",
        f"  critical batch    {critical_batch(r.device, r.dtype):9,.0f}  tokens a pass",
        "training",
        *(f"  {name:17} {size_of(size)}" for name, size in r.training.items()),
        f"  or recomputed     {size_of(r.recomputed)}  a third more FLOPs",
        f"  fits              {'yes' if r.trains else 'no':>9}  {readable(total, 'B')} in all",
        f"  one step          {readable(r.step_seconds, 's'):>9}  {readable(r.step_flops, 'FLOP')}, "
        f"{r.step_flops / (6 * r.parameters * r.batch * r.context):.2f} × 6ND",
    ]
    if r.devices > r.device.group:
        lines.append(
            f"note: fast links join {r.device.group} devices; slower links between groups are not counted"
        )
    return "\n".join(lines)


def report(
    config: LlamaConfig | str,
    device: Device | str,
    batch: int = 1,
    context: int = 8192,
    *,
    devices: int = 1,
    dtype: str | None = None,
) -> Report:
    """What a model costs: memory, time to the first and per token, a training step.

    config: a LlamaConfig or a name of CONFIGS; device: a Device or a name of DEVICES; dtype: of
    weights, cache and products (default: bf16 if the device has it, else fp32). Weights, cache and
    arithmetic are assumed to split evenly over `devices` (tensor parallelism).
    Raises ValueError for sizes below 1, a context beyond max_seq_len and a format that the device
    lacks, KeyError for an unknown name.
    """
    if isinstance(config, str) and config not in CONFIGS:
        raise KeyError(f"no config {config!r}; there are {', '.join(CONFIGS)}")
    config = CONFIGS[config] if isinstance(config, str) else config
    device = DEVICES[device] if isinstance(device, str) else device
    for name, value in (("batch", batch), ("context", context), ("devices", devices)):
        if value < 1 or value != int(value):
            raise ValueError(f"{name} must be a whole number of at least 1, got {name}={value}")
    if context > config.max_seq_len:
        raise ValueError(f"context={context} exceeds max_seq_len={config.max_seq_len}")
    dtype = dtype or ("bf16" if "bf16" in device.flops else "fp32")
    return assemble(config, device, batch, context, devices, device.peak(dtype), dtype)


def assemble(config, device, batch, context, devices, peak, dtype) -> Report:
    """The numbers of a report whose arguments are checked."""
    split = {"devices": devices, "dtype": dtype}
    step_flops = training_flops(config, batch, context)
    return Report(
        config=config,
        device=device,
        batch=batch,
        context=context,
        parameters=count_params(config),
        weights=count_params(config) * BYTES[dtype],
        cache=cache_bytes(config, batch, context, dtype),
        capacity=devices * device.capacity,
        max_batch=max_batch(config, device, context, **split),
        prefill=prefill_time(config, device, batch, context, **split),
        decode=decode_time(config, device, batch, context, **split),
        training=training_bytes(config, batch, context, dtype),
        recomputed=activation_bytes(config, batch, context, dtype, scores=0, recompute=True),
        step_flops=step_flops,
        step_seconds=step_flops / (devices * peak),
        **split,
    )


def figure(r: Report):
    """The figure of a report. Needs matplotlib."""
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    bars = {"inference": {"weights": r.weights, "KV cache": r.cache}, "training": r.training}
    colours = iter(plt.get_cmap("tab20").colors)
    for row, parts in bars.items():
        start = 0.0
        for name, size in parts.items():
            left.barh(
                row, size / 1e9, left=start / 1e9, color=next(colours), label=f"{row}: {name}"
            )
            start += size
    left.axvline(r.capacity / 1e9, color="black", ls="--", label="capacity")
    left.set(xlabel="GB over all devices", title=f"memory on {r.devices} × {r.device.name}")
    left.legend(fontsize=6)

    batches = [2**i for i in range(13)]
    split = {"devices": r.devices, "dtype": r.dtype}
    times = [decode_time(r.config, r.device, b, r.context, **split) for b in batches]
    right.plot(batches, [1000 * t.seconds for t in times], "0.75", lw=5, label="bound")
    for part in ("compute", "memory", "link"):
        if any(getattr(t, part) for t in times):
            right.plot(batches, [1000 * getattr(t, part) for t in times], "--", lw=1.5, label=part)
    if r.max_batch:
        right.axvline(r.max_batch, color="gray", ls=":", label=f"largest batch, {r.max_batch:,}")
    right.set(
        xscale="log", yscale="log", xlabel="batch", ylabel="milliseconds per token of each row"
    )
    right.set_title(f"decoding at context {r.context:,}")
    right.legend(fontsize=7)
    fig.tight_layout()
    return fig
