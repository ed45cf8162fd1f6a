# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,jupyter,-all
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 13 · Costs
#
# > What a Llama costs before it runs: FLOPs, bytes, seconds and devices by formula, for every published size, and each formula held against XLA or a stopwatch.
#
# *Reading time 35 min · runs in about 20 s · difficulty ●●○ · needs 10, 11*
#
# Three questions come up whenever someone wants to use a model. Does it fit? How long until the first word? What does a thousand words cost? People answer them by trying. They can be answered on the back of an envelope,
# to a per cent for the arithmetic, to a fifth for the memory, and as a lower bound for the time. This chapter derives the formulas, checks every one of them against something that does not know the formula,
# and packs them into one function, `report`.
#
# Nothing is trained here. The letters are those of chapter 10: `B` batch, `T` new tokens in each row, `S` tokens that attention can see, `D` model width, `H` query heads, `K` key/value heads, `Dh` head width, `F` feed-forward width, `V` vocabulary, `L` layers.
# New are `N`, the number of parameters, and `n`, the number of devices.

# %%
#| export
import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from llm_from_scratch.llama import CONFIGS, LlamaConfig, block_count, count_params
from llm_from_scratch.pretraining import matmul_peak

# %%
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize_scalar

import llm_from_scratch
from llm_from_scratch import ledger
from llm_from_scratch.generation import xla_count
from llm_from_scratch.llama import Block, Llama, init_cache, rope_frequencies, rope_rotation
from llm_from_scratch.pretraining import RECIPES

REPOSITORY = Path(llm_from_scratch.__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "tools"))
import costs_runs

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
STORED = json.loads((REPOSITORY / "results" / "costs.json").read_text())
MINI = RECIPES["short"].model
print(f"the mini Llama of chapter 11: N = {count_params(MINI):,}")
for name, config in CONFIGS.items():
    print(f"{name:15} N = {count_params(config) / 1e9:7.2f} billion")

# %% [markdown]
# ## 1 · A machine in three numbers
#
# Here is the measurement that motivates everything else. Multiply a matrix by one vector, then by 16 vectors at once. That is 16 times the work. **Predict:** how much longer does it take? Ours: hardly at all longer. The stored run below did it with eight matrices of 64 MiB
# (4,096 × 4,096 in fp32), several times over.


# %%
def stored_times(row, name, batch):
    """Seconds of one stored repeat."""
    return row[name][str(batch)]


longer = [
    stored_times(r, "products", 16) / stored_times(r, "products", 1) for r in STORED["roofline"]
]
print("16 vectors against one, times longer:", ledger.interval(longer, digits=1))
assert np.mean(longer) < 4

# %% [markdown]
# Sixteen times the work in less than twice the time: more than our "hardly", and far less than 16. Arithmetic is not what most of that time goes into: the matrix had to come from memory, and it comes once, for one vector or for sixteen. So a machine has (at least) three numbers that matter: how many floating-point operations it does in a second,
# how many bytes it reads in a second, and how many bytes it holds. If a job is spread over several devices a fourth is the speed of the link between them.
#
# A *FLOP* is one floating-point addition or multiplication, so a multiply–add is two. FLOP/s is a speed. GB is 10⁹ bytes throughout.


# %%
#| export public
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

# %% [markdown]
# The published devices. Two traps hide in data sheets. NVIDIA prints the H100's bf16 speed as 1,979 TFLOP/s "with sparsity", which holds for matrices half of whose entries are zero in a fixed pattern; dense matrices get half of that. And links are quoted as the sum of both directions; a
# device can send with half of it.


# %%
#| export
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

# %% [markdown]
# Your own machine has no data sheet that tells what JAX reaches on it, so it is measured: chapter 11's matrix product for the arithmetic, a sum over half a gigabyte for reading. The measurement takes a second or two, and happens when somebody first asks for `DEVICES["this machine"]`.


# %%
#| export
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


# %%
#| export
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


# %%
#| export public
DEVICES = Devices(PUBLISHED)

# %%
for device in PUBLISHED:
    print(
        f"{device.name:10} {device.peak('bf16') / 1e12:4.0f} TFLOP/s  {device.bandwidth / 1e9:5,.0f} GB/s"
        f"  {device.capacity / 1e9:4.0f} GB   bf16 operations per number read: "
        f"{device.peak('bf16') / device.bandwidth * 2:3.0f}"
    )
assert len(DEVICES) == len(PUBLISHED) + 1

# %% [markdown]
# The last column is the surprise of the table: for each bf16 number that comes from memory, these chips could do hundreds of operations. A program that does fewer waits. Keep the column in mind for section 6.
#
# ## 2 · FLOPs: a count that XLA agrees with
#
# A matrix with $P$ entries, times one vector, is $P$ multiplications and $P$ additions: $2P$ FLOPs. So the rule of thumb is *two FLOPs per weight and token*. Now the fine print, for the Llama of chapter 10:
#
# - The matrices of a layer have $2 D\,H Dh$ (queries, output) $+\ 2 D\,K Dh$ (keys, values) $+\ 3DF$ weights. The output matrix has $VD$.
# - Looking up an embedding is no multiplication. If input and output share one table (`tie_embeddings`), it counts once. If they don't, the input table is among the parameters and does nothing here.
# - Attention has products without weights. Each query that sees a key costs $2Dh$ FLOPs for the score and $2Dh$ for the weighted sum of values, in each of the $H$ heads and $L$ layers: $4\,H\,Dh\,L$ for every pair of a query and a key.
#
# How many pairs? With the causal mask, query $t$ sees $t$ keys: $T(T+1)/2$ in a row of $T$. But masking a score does not mean that nobody computed it. A naive program computes all $T^2$. Chapter 10 cuts queries and keys into blocks of up to 256, two at least from 65 tokens on, and leaves out the pairs of blocks in which no query may see a key, which is in between.
# When $C$ tokens are in a cache already, each new query sees those as well.


# %%
#| export workbook
def matmul_weights(config: LlamaConfig) -> int:
    """How many weights multiply each token: all matrices but the embedding, whose rows are looked up."""
    c = config
    attention = c.dim * c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads)
    return c.n_layers * (attention + 3 * c.dim * c.hidden_dim) + c.vocab_size * c.dim


# %%
#| export workbook
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


# %%
for count in ("causal", "blocks", "full"):
    print(f"{count:7} pairs in a row of 256: {attended_pairs(256, count=count):6,}")
visible = np.tril(np.ones((256, 256)))
assert attended_pairs(256) == visible.sum()
assert attended_pairs(3, cached=4) == 5 + 6 + 7


# %%
#| export public workbook
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


# %% [markdown]
# An independent count. XLA, the compiler under JAX, knows how many FLOPs a program has: it adds them up operation by operation and has never heard of our formula. (Chapter 12's `xla_count` adds the turns of loops, whose body XLA counts once.) It needs shapes only, so we can ask for models that would never fit into this machine. `jax.eval_shape` gives a Llama of 8 billion
# weights made of shapes, and `lower` turns the call into a program without running it.
#
# **Predict:** by how many per cent is XLA's count above ours? It counts the norms, the softmax and the rotations too. Ours: below 2 % for the mini model, less for the 8B, since these are elementwise and grow with D while matrix products grow with D².


# %%
def abstract(config, dtype=jnp.float32):
    """A Llama made of shapes; no array is allocated."""
    return jax.eval_shape(lambda: Llama(config, key=jax.random.key(0), dtype=dtype))


def ids(batch, length):
    """The shape of a batch of tokens."""
    return jax.ShapeDtypeStruct((batch, length), jnp.int32)


def xla_forward(config, batch, length, dtype=jnp.float32):
    """XLA's counts for a forward pass: FLOPs and bytes."""
    traced = jax.jit(lambda m, x: m(x)).trace(abstract(config, dtype), ids(batch, length))
    return {what: xla_count(traced.jaxpr, what) for what in ("flops", "bytes accessed")}


EIGHT = CONFIGS["llama3.1-8b"]
tried = {"mini": (MINI, 2, 256), "8B": (EIGHT, 1, 8192)}
counts = {name: xla_forward(*shape, jnp.bfloat16) for name, shape in tried.items()}
for name, (config, rows, length) in tried.items():
    flops = counts[name]["flops"]
    ratios = {
        count: flops / forward_flops(config, rows, length, count=count)
        for count in ("blocks", "causal", "full")
    }
    ratios["2N a token"] = flops / (2 * count_params(config) * rows * length)
    print(f"{name:5} XLA over", ", ".join(f"{c}: {r:.3f}" for c, r in ratios.items()))
    assert 1 < ratios["blocks"] < 1.02

# %% [markdown]
# With the blocks that chapter 10 really computes the formula is within a per cent for the mini model and within half a per cent for the 8B at 8,192 tokens. The columns *causal* and *full* show what attention is worth: the blocks compute 3 and 0.4 % more than the mask shows, and the whole square would be 3 and 12 % more than that. XLA counts 11 and 7.5 % more than *2N*.
# (What is left over is what we left out. The tests also walk through the program that JAX traces and add up its matrix products alone: there the formula is equal to the last FLOP, forward, backward and with a cache.)
#
# The table of *Transformer Inference Arithmetic* (the post of kipply that this chapter works through) counts $24D^2$ FLOPs per layer and token, for the shape of GPT: four D × D matrices for attention, and two of 4D × D. Llama's layer is another shape. **Predict** its count in units of D²: fewer for the grouped keys and values, more for
# the wide gate. Ours: about 24 again for the 8B, since the savings look similar to the additions.


# %%
#| claim S093
def xla_block(config, length=128):
    """XLA's count for one layer on one short row, beside the formula's."""
    angles = jnp.arange(length), rope_frequencies(config.head_dim)
    rotation = jax.eval_shape(lambda: rope_rotation(*angles, jnp.float32))
    block = jax.eval_shape(lambda: Block(config, key=jax.random.key(0)))
    x = jax.ShapeDtypeStruct((length, config.dim), jnp.float32)
    call = jax.jit(lambda b, x, r: b(x, r)[0])
    counted = xla_count(call.trace(block, x, rotation).jaxpr)
    one = dataclasses.replace(config, n_layers=1)
    return counted, forward_flops(one, 1, length, count="blocks", logits=0)


units = {}
for name in ("llama3.1-8b", "llama3.1-70b", "llama3.1-405b"):
    config = CONFIGS[name]
    counted, formula = xla_block(config)
    per_token = forward_flops(dataclasses.replace(config, n_layers=1), 1, 1, logits=0)
    units[name] = per_token / config.dim**2
    assert abs(units[name] / 24 - 1) < 0.1
    print(
        f"{name:14} {units[name]:.1f} D² per layer and token; XLA / formula {counted / formula:.3f}"
    )
    assert abs(counted / formula - 1) < 0.01
ledger.claim(
    "S093",
    section="Transformer Inference Arithmetic, flops counting",
    claim="FLOPs per layer and token by formula: 24 D² for GPT's shape; Llama's layer with grouped keys and a gate, 8B, 70B and 405B",
    predicted="24 D² within a tenth; XLA's count within 1 %",
    measured=", ".join(f"{u:.1f}" for u in units.values())
    + " D² for 8B, 70B, 405B; XLA within 1 %",
    verdict="reproduced",
    function="costs.forward_flops",
    test="tests/test_costs.py::test_forward_flops_against_xla",
)

# %% [markdown]
# Our 24 is a little low for the 8B, which has 26.0, as its feed-forward layer is 3.5 D wide where ⅔ · 4D would be 2.7. The 405B comes out at 23.8, almost GPT's 24. (Each pair of a query and a key comes on top, with 4 H Dh FLOPs.) So the old rule survives for the three sizes of the paper within a tenth, by accident of the widths; the later 1B and 3B have 29 and 21.
#
# ### The backward pass
#
# For each product $y = Wx$ of the forward pass, the backward pass needs two: the gradient for $x$, which is $W^\top$ times the gradient for $y$, and the gradient for $W$, an outer product. Each costs as much as the forward product. So a training step costs three forward passes. One product of chapter 10 comes on top: its attention keeps no scores and computes them again in the backward pass. `count="blocks"`, what is really computed, includes it; "causal" and "full" don't. The optimiser adds some operations per parameter and *step*, not
# per token: nothing, in a large batch.


# %%
#| export public workbook
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


# %% [markdown]
# **Predict** the same ratio as before for the gradient of chapter 11's loss on a batch of 2 × 256 tokens, and for its whole step with AdamW. Ours: 1.01 again for the gradient; a little more for the step, since 512 tokens are few for an optimiser that touches 4 million weights.

# %%
batch = {name: ids(2, 256) for name in ("tokens", "targets", "segments")}
loss = lambda m, b: costs_runs.next_token_loss(m, b)[0]  # noqa: E731
gradient = xla_count(jax.jit(jax.value_and_grad(loss)).trace(abstract(MINI), batch).jaxpr)
step = costs_runs.trace_step(MINI, 2, 256)
whole = xla_count(step.jaxpr)
formula = training_flops(MINI, 2, 256, count="blocks")
for name, counted in (("forward and backward", gradient), ("the whole step", whole)):
    ratio = counted / formula
    print(f"{name:21} XLA / formula {ratio:.3f}")
    assert 1 < ratio < 1.02
adam = (whole - gradient) / count_params(MINI)
print(f"clipping and AdamW: {adam:.0f} operations per parameter and step")

# %% [markdown]
# Both are within 2 %. So the formula may be trusted where XLA can't be asked.
#
# ## 3 · C ≈ 6ND, and where it fails
#
# Everybody's shorthand for the training cost $C$ of $N$ parameters on $D$ tokens (here, and in this section only, $D$ is a number of tokens, as in the literature) is
#
# $$ C \approx 6\,N D . $$
#
# It is what remains of our count if one forgets attention and pretends that every parameter multiplies every token. The two errors have opposite signs. **Predict:** in which direction, and by how much, is 6ND wrong for the 8B at context 8,192? For the 1B at 131,072? For a small model with a big untied vocabulary? Ours: 10 % too low, several times too low, up to
# two times too high.


# %%
def exact_over_rule(config, context):
    """FLOPs of training by the formula with the causal mask, over 6ND."""
    return training_flops(config, 1, context) / (6 * count_params(config) * context)


short = LlamaConfig(128_256, 512, 4, 8, 2, 1408, 64)
cases = {
    "mini, 256": (MINI, 256),
    "8B, 8,192": (EIGHT, 8192),
    "1B, 8,192": (CONFIGS["llama3.2-1b"], 8192),
    "405B, 8,192": (CONFIGS["llama3.1-405b"], 8192),
    "405B, 131,072": (CONFIGS["llama3.1-405b"], 131_072),
    "1B, 131,072": (CONFIGS["llama3.2-1b"], 131_072),
    "4 layers, 128,256 untied ids, 512": (short, 512),
}
ratios = {name: exact_over_rule(*case) for name, case in cases.items()}
for name, ratio in ratios.items():
    print(f"{name:34} exact / 6ND = {ratio:.2f}")
assert ratios["8B, 8,192"] > 1 > ratios["4 layers, 128,256 untied ids, 512"]

# %%
contexts = 2 ** np.arange(9, 18)
fig, ax = plt.subplots(figsize=(7, 3.2))
for name in ("llama3.2-1b", "llama3.1-8b", "llama3.1-70b", "llama3.1-405b"):
    ax.plot(
        contexts, [exact_over_rule(CONFIGS[name], int(t)) for t in contexts], "o-", ms=3, label=name
    )
ax.axhline(1, color="gray", lw=0.8, ls="--")
ax.axvline(8192, color="gray", lw=0.8, ls=":")
ax.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="exact FLOPs / 6ND")
ax.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
ax.set_xticks([512, 2048, 8192, 32768, 131072], ["512", "2,048", "8,192", "32,768", "131,072"])
ax.minorticks_off()
ax.legend()
fig.tight_layout()
plt.show()
at_8k = exact_over_rule(CONFIGS["llama3.1-405b"], 8192)
print(f"405B at 8,192: {at_8k:.2f}")

# %% [markdown]
# The dotted line is the context of the main training run, 8,192. There the exact count is 4 % higher for the 405B, 7 % for the 8B and 22 % for the 1B. At 131,072 tokens it is of no use for the small models. The smaller a model, the earlier attention matters, because weights grow with D² and attention with D. And the left ends of the lines of the 8B and the larger ones lie *below* one: at short contexts the untied
# embedding, which multiplies nothing, is the larger error. With only four layers under a big vocabulary it is half of everything. Our three predictions hold, the first with 7 instead of 10 %.
#
# Now the paper's own numbers. Its §1 states 3.8 · 10²⁵ FLOPs for 405B parameters and 15.6T tokens, "almost 50×" the largest Llama 2, which had 70B parameters and 2T tokens. And it says that the 8B and the 70B were trained much longer than is compute-optimal, so that they are better *at the same inference budget*. Why would anyone over-train? Because training is paid once
# and inference for ever. Serving $D_{inf}$ tokens costs $2ND_{inf}$. A smaller model trained longer, to the same loss, is cheaper to serve.
#
# How long one should over-train follows from a loss law. We take the form of Hoffmann et al. (2022) with the constants $E, A, B, \alpha, \beta$ of Besiroglu et al. (2024), who repaired the fit (this $B$ is not the batch):
#
# $$ \ell(N, D) = E + \frac{A}{N^\alpha} + \frac{B}{D^\beta}, \qquad \min_{N, D}\; 6ND + 2ND_{inf} \quad\text{at fixed } \ell . $$
#
# On a curve of constant loss, more weights save tokens: $\frac{dD}{dN} = -\frac{D}{N}\,\rho$ with $\rho = \frac{\alpha A N^{-\alpha}}{\beta B D^{-\beta}}$. Set the derivative of the cost to zero, $6D + 2D_{inf} + 6N\frac{dD}{dN} = 6D + 2D_{inf} - 6D\rho = 0$, and out comes the demand for which a given pair is the right one: $D_{inf} = 3D(\rho - 1)$. At $\rho = 1$ it is zero: that is the compute-optimal model.

# %%
LAW = {"A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}  # Besiroglu et al. 2024


# %%
#| workbook
def break_even_tokens(params, tokens, law):
    """Tokens to be served for which so many parameters, trained on so many tokens, reach their loss most cheaply."""
    by_size = law["alpha"] * law["A"] / params ** law["alpha"]
    by_data = law["beta"] * law["B"] / tokens ** law["beta"]
    return 3 * tokens * (by_size / by_data - 1)


# %% [markdown]
# Check it without calculus: let SciPy search for the cheapest model of the same loss, with that many tokens to serve, and see whether it finds the model we started from.


# %%
def cheapest(n, d, served, law=LAW):
    """Parameters of the cheapest model with the loss of (n, d), by numerical search."""
    reach = law["A"] / n ** law["alpha"] + law["B"] / d ** law["beta"]

    def cost(log_n):
        left = reach - law["A"] / np.exp(log_n) ** law["alpha"]
        tokens = (law["B"] / left) ** (1 / law["beta"]) if left > 0 else np.inf
        return np.log(6 * np.exp(log_n) * tokens + 2 * np.exp(log_n) * served)

    start = np.log(law["A"] / reach) / law["alpha"]
    return float(np.exp(minimize_scalar(cost, bounds=(start, start + 9), method="bounded").x))


flagship = (count_params(CONFIGS["llama3.1-405b"]), 15.6e12)
eight = (count_params(EIGHT), 15e12)
for name, pair in (("8B", eight), ("405B", flagship)):
    served = break_even_tokens(*pair, LAW)
    print(
        f"{name:5} {pair[1] / pair[0]:5,.0f} tokens per parameter; right for {served / 1e12:.0f}T tokens served"
    )
    assert abs(cheapest(*pair, served) / pair[0] - 1) < 0.01
optimum = cheapest(*eight, 0)
print(f"for nothing served the loss of the 8B is cheapest with {optimum / 1e9:.0f}B parameters")

# %% [markdown]
# By this law the 8B is the right model for some 190 trillion tokens of use, nearly thirteen times what it was trained on. For a model that very many people run, that is not absurd. The 405B comes out as slightly over-trained too, while the paper's own law (§3.2.1, chapter 22) calls it about optimal: two fits, far beyond the data of either.
# We have *derived* the trade-off from a published law; that a small model trained long is really as good we did not test.

# %%
#| claim L001
rule = 6 * 405e9 * 15.6e12
llama2 = 6 * 70e9 * 2e12
print(
    f"6ND = {rule:.2e}; by our count {training_flops(CONFIGS['llama3.1-405b'], 1, 8192) / 8192 * 15.6e12:.2e}"
)
print(f"times Llama 2 70B: {rule / llama2:.0f}")
mini_ratio = gradient / (6 * count_params(MINI) * 512)
assert round(rule / 1e24) == 38 and break_even_tokens(*eight, LAW) > 10 * eight[1]
assert 1.0 < mini_ratio < 1.4 and 40 < rule / llama2 < 50
ledger.claim(
    "L001",
    section="1",
    claim="3.8e25 FLOPs for 405B parameters on 15.6T tokens, almost 50 times Llama 2 70B; 8B and 70B are trained longer "
    "than compute-optimal for the sake of inference (by a published loss law, no model trained here)",
    predicted="6ND gives 3.8e25; XLA's count of a mini step is 1.0 to 1.4 times 6ND",
    measured=f"3.79e25, {rule / llama2:.0f} times (the paper: almost 50); XLA / 6ND = {mini_ratio:.2f} "
    f"for the mini; 8B on 15T tokens is cheapest if {break_even_tokens(*eight, LAW) / 1e12:.0f}T are served",
    verdict="derived",
    function="costs.training_flops",
    test="tests/test_costs.py::test_training_flops_against_xla",
)

# %% [markdown]
# So the paper's budget *is* 6ND. With attention (the causal half of it) the matrix products of the run would be 3.9e25. *Almost 50* is 45 by the same rule.
#
# ## 4 · Model FLOPs utilisation
#
# *Model FLOPs utilisation* (MFU) is the FLOPs that the model needs, over the FLOPs that the devices could have done in the same time:
#
# $$ \mathrm{MFU} = \frac{\text{training FLOPs of the tokens processed}}{\text{seconds} \cdot n \cdot \text{peak}} . $$
#
# Table 4 of the paper gives, for three stages of the 405B's training, TFLOP/s per GPU and the MFU in bf16: 430 and 43 %, 400 and 41 %, 380 and 38 %. **Predict:** do they fit together?


# %%
#| export workbook
def mfu(
    flops: float, seconds: float, device: Device, devices: int = 1, dtype: str = "bf16"
) -> float:
    """Model FLOPs utilisation: the share of the devices' dense peak that went into these FLOPs."""
    return flops / (seconds * devices * device.peak(dtype))


# %%
#| claim L041
TABLE_4 = {  # stage: GPUs, context, TFLOP/s per GPU, printed MFU in per cent
    "8,192 GPUs": (8192, 8192, 430, 43),
    "16,384 GPUs": (16_384, 8192, 400, 41),
    "16,384 GPUs, long": (16_384, 131_072, 380, 38),
}
computed = {
    name: 100 * mfu(tflops * 1e12, 1, DEVICES["h100"])
    for name, (_, _, tflops, _) in TABLE_4.items()
}
for name, (_, _, tflops, printed) in TABLE_4.items():
    print(f"{name:18} {tflops} TFLOP/s → {computed[name]:.1f} %, printed {printed} %")
least = 0.405 * DEVICES["h100"].peak("bf16") / 1e12
print(f"41 % needs at least {least:.1f} TFLOP/s")
for (
    _,
    _,
    tflops,
    printed,
) in TABLE_4.values():  # is there a true value that both numbers round from?
    low, high = (100 * mfu((tflops + d) * 1e12, 1, DEVICES["h100"]) for d in (-5, 5))
    assert low < printed + 0.5 and high > printed - 0.5
assert 400 < least < 405
ledger.claim(
    "L041",
    section="3.3.2",
    claim="bf16 MFU of 43, 41 and 38 % from 430, 400 and 380 TFLOP/s per H100",
    predicted="the printed per cents follow from a dense peak of 989 TFLOP/s, if the TFLOP/s are rounded to tens",
    measured="43.5, 40.4 and 38.4 % from the rounded numbers: the second rounds to 40, unless 400 stands for 400.5 to 405",
    verdict="derived",
    function="costs.mfu",
    test="tests/test_costs.py::test_mfu",
)

# %% [markdown]
# Two of three (43.48 rounds to 43). If the TFLOP/s are rounded to tens, which they look like, all three can be right: a true 401 to 405 gives 41 %. So the ledger says "derived", and what does not fit is in its row. The paper does not say how it counts the FLOPs. At 131,072 tokens that matters: section 3 found two thirds more than 6ND there, so the third row may be another kind of number than the first two.
#
# Does it fit the calendar? **Predict** how many days the main run takes on 16,384 GPUs, and what share of the peak is left over *all* GPU hours, of which the model card of Llama 3.1 405B states 30.84 million. Ours: two months, and a third.

# %%
gpu_hours = rule / 400e12 / 3600
print(f"6ND at 400 TFLOP/s: {gpu_hours / 16_384 / 24:.0f} days on 16,384 GPUs")
overall = mfu(rule, 30.84e6 * 3600, DEVICES["h100"])
print(f"utilisation over all hours of the model card: {overall:.0%}")
summary = json.loads((REPOSITORY / "results" / "mini_llama" / "summary.json").read_text())
cpu = Device("the CPU of the stored run", {"fp32": summary["matmul_gflops"] * 1e9}, 1, 1)
work = 6 * count_params(MINI) * summary["tokens"]
utilisation = mfu(work, summary["seconds"], cpu, dtype="fp32")
print(f"make train, stored run, by 6ND too: {utilisation:.0%} of the matmul peak")
assert 0.3 < overall < 0.4

# %% [markdown]
# Sixty-seven days if nothing ever stops. The model card has a sixth more GPU hours than that; for what, it does not say. Chapter 11's stored run comes near the same share by the same rule, which is no triumph: two cores that share one memory have no network to wait for.
#
# ## 5 · Memory: does it fit?
#
# For inference two things must fit: the weights, and the *KV cache*, the keys and values of all tokens so far, which chapter 10 keeps so that nothing is computed twice. Per token these are 2 · L · K · Dh numbers.


# %%
#| export public workbook
def cache_bytes(config: LlamaConfig, batch: int, context: int, dtype: str = "bf16") -> int:
    """Bytes of the KV cache of `batch` rows of `context` tokens: 2 · L · K · Dh numbers a token."""
    per_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    return batch * context * per_token * BYTES[dtype]


# %%
#| export workbook
def max_batch(
    config: LlamaConfig, device: Device, context: int, *, devices: int = 1, dtype: str = "bf16"
) -> int:
    """How many rows of `context` tokens fit beside the weights; 0 if not one does.

    Only weights and cache are counted: programs and intermediate arrays need room as well.
    """
    free = devices * device.capacity - count_params(config) * BYTES[dtype]
    return max(0, int(free // cache_bytes(config, 1, context, dtype)))


# %%
#| claim S089
for name in ("llama3.1-8b", "llama3.1-70b", "llama3.1-405b"):
    config = CONFIGS[name]
    cache = jax.eval_shape(lambda c=config: init_cache(c, 3, 1000, jnp.bfloat16))
    assert sum(x.size * 2 for x in (*cache.k, *cache.v)) == cache_bytes(config, 3, 1000)
    weights = sum(x.size * 2 for x in jax.tree.leaves(abstract(config, jnp.bfloat16)))
    assert weights == 2 * count_params(config)
    rows = [max_batch(config, DEVICES["h100"], 8192, devices=n) for n in (1, 2, 4, 8, 16)]
    print(
        f"{name:14} weights {weights / 1e9:5.1f} GB, cache {cache_bytes(config, 1, 1):7,} bytes a token; "
        f"rows of 8,192 on 1, 2, 4, 8, 16 H100: {rows}"
    )
flagship_rows = {
    n: max_batch(CONFIGS["llama3.1-405b"], DEVICES["h100"], 8192, devices=n) for n in (8, 16)
}
assert flagship_rows[8] == 0 < flagship_rows[16]
ledger.claim(
    "S089",
    section="Transformer Inference Arithmetic, capacity",
    claim="capacity: weights and cache against memory; in bf16 the 405B fits on two machines of eight H100, not on one (paper §6)",
    predicted="bytes equal to those of the real arrays' shapes; 0 rows on 8 GPUs",
    measured=f"equal for 8B, 70B and 405B; rows of 8,192 tokens on 8 and 16 GPUs: {flagship_rows[8]} and {flagship_rows[16]}",
    verdict="derived",
    function="costs.max_batch",
    test="tests/test_costs.py::test_cache_and_weights_equal_the_arrays",
)

# %% [markdown]
# The paper's §6 begins with this fact: in bf16 the 405B does not fit into a machine of eight H100s, and needs two, or FP8 weights. 812 GB against 640. The numbers also show what grouped-query attention is for: with 128 key/value heads instead of 8, one row of 8,192 tokens of the 405B would take 68 GB instead of 4.2.
#
# ### Memory of training
#
# Training keeps more. Every weight has a gradient and Adam's two averages. In mixed precision (weights and gradients in bf16, with an fp32 copy of the weights for the optimiser) that makes 2 + 2 + 4 + 4 + 4 = 16 bytes per parameter; in plain fp32 it is 4 + 4 + 8 = 16 again. And the backward pass needs *activations*: the inputs of each operation whose gradient depends on them.
# Which are they, for one token and one layer of chapter 10?
#
# | part | kept for the backward pass | numbers |
# |---|---|---|
# | two norms | the input, the input over its root mean square, the output (which the products need) | 6 D |
# | attention | queries and output, in rows and in blocks | 4 H Dh |
# | | keys and values, in rows and in blocks | 4 K Dh |
# | | λ, from which every softmax weight is computed again | H |
# | feed-forward | gate, its sigmoid, its silu, up, and their product | 5 F |
#
# Outside the layers: 4 D around the last norm, and logits with their gradient, 2 V. We found the rows of norms and feed-forward layer from both ends: changed one size of the mini model at a time, saw
# by how many numbers per token XLA's memory grew, and matched these (whole) numbers to the list of arrays that JAX's differentiation saves. The rows of attention were chosen among a few candidates of whole numbers, by the mini model and eight other shapes. So the mini model itself is no test of it. The test below draws new shapes.
#
# An attention that keeps its scores for the backward pass has H T numbers more for each copy: `scores=2` if it keeps them after exp, and after the division. And *activation checkpointing* keeps only each layer's input, D numbers, and runs the forward pass of a layer again when its gradient is due: about a third more FLOPs for a small fraction of the memory.


# %%
#| export workbook
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


# %%
#| export public
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


# %% [markdown]
# The independent check is XLA's buffer assignment. After compiling a step XLA knows how much memory it will reserve: for the state that comes in (weights and averages; the new state is written over the old), and for everything temporary. One thing to know before predicting: XLA gives the gradients the place of activations that are no longer needed.
# So the temporary part is the larger of the two, not their sum.
#
# **Predict:** how far off is the formula for chapter 11's step, and for eight shapes drawn at random? Ours: a per cent for the first, and within 10 % for the others.


# %%
def projected(config, batch, context):
    """What the formula expects XLA to reserve for a step of chapter 11."""
    parts = training_bytes(config, batch, context, "fp32")
    temporary = max(parts["activations"], parts["gradients"])
    return parts["weights"] + parts["optimizer"] + temporary


live = step.lower().compile().memory_analysis()
error = projected(MINI, 2, 256) / (live.argument_size_in_bytes + live.temp_size_in_bytes) - 1
print(
    f"formula {projected(MINI, 2, 256) / 1e6:.0f} MB; XLA reserves that within 10 %: {abs(error) < 0.1}"
)
assert abs(error) < 0.1

# %% [markdown]
# The other shapes are stored; compiling them takes a minute (`python tools/costs_runs.py`).

# %%
#| claim L040
errors = {}
for name, shape in costs_runs.SHAPES.items():
    reserved = sum(STORED["memory"][name].values())
    errors[name] = 100 * (projected(*shape) / reserved - 1)
    config, rows, length = shape
    print(
        f"{name:18} {rows} × {length}, D {config.dim}, L {config.n_layers}, H {config.n_heads:2}: "
        f"{reserved / 1e6:5,.0f} MB, formula {errors[name]:+5.1f} %"
    )
own = errors.pop("chapter 11's step")
worst = max(abs(e) for e in errors.values())
assert abs(own) < 1
ledger.claim(
    "L040",
    section="3.3.2",
    claim="the memory of a training step can be projected before anything runs (the paper's tool is not described; ours "
    "counts state and activations): mean error on eight shapes drawn at random; chapter 11's own step is within 1 %, "
    f"the worst shape {worst:.0f} % off",
    predicted=ledger.within(10, "%"),
    measured=ledger.interval(errors.values(), "%", digits=1),
    verdict=ledger.judge(ledger.within(10, "%"), ledger.interval(errors.values(), "%")),
    function="costs.training_bytes",
    test="tests/test_costs.py::test_training_bytes_against_xla",
)

# %% [markdown]
# Five of the eight shapes are within 4 %. Our prediction, which was about each shape, fails for the other three, the worst by 21 %: they are those whose activations take less than twice the room of their gradients, and there the larger of the two is not enough. They also spoil the mean: it is −6.5 %, and its interval reaches −13, so the ledger says *absent*. XLA decides case by case what to keep, and a formula does not see such decisions.
# So one may plan with it, with a margin. Now what Meta faced:

# %%
giant = CONFIGS["llama3.1-405b"]
parts = training_bytes(giant, 1, 8192)
for name, size in parts.items():
    print(f"{name:12} {size / 1e9:7,.0f} GB")
state = sum(parts.values()) - parts["activations"]
thin = activation_bytes(giant, 1, 8192, "bf16", scores=0, recompute=True)
print(
    f"80 GB devices for the state alone: {-(-state // 80e9):.0f}; activations if recomputed: {thin / 1e9:.0f} GB"
)
assert 16 * count_params(giant) == state

# %% [markdown]
# The state alone needs 82 GPUs, and a *single* row of 8,192 tokens leaves 900 GB of activations, 46 if each layer is computed again. This is why §3.3.2 cuts the model in four ways at once (chapters 25 and 26), and why GPUs by the thousand are not only a matter of speed.
#
# ## 6 · Time: the larger of two
#
# A chip reads and computes at the same time. If it overlaps the two perfectly, a job takes as long as the slower of them:
#
# $$ t = \max\left(\frac{\text{FLOPs}}{\text{peak}},\; \frac{\text{bytes}}{\text{bandwidth}}\right) + t_{\text{link}} . $$
#
# Take one matrix of $P$ weights of $b$ bytes each, and a batch of $B$ vectors: $2PB$ FLOPs against $bP$ bytes. The two are equal at the **critical batch**
#
# $$ B^* = \frac{\text{peak}}{\text{bandwidth}} \cdot \frac{b}{2} , $$
#
# half the last column of section 1's table, since a weight takes two operations. Below it a larger batch costs, by this bound, nothing. Above it, time grows with the batch.


# %%
#| export public workbook
def critical_batch(device: Device, dtype: str = "bf16") -> float:
    """Tokens per pass at which multiplying by a weight takes as long as reading it."""
    return device.peak(dtype) / device.bandwidth * BYTES[dtype] / 2


# %%
for device in PUBLISHED:
    print(f"{device.name:10} critical batch {critical_batch(device):4.0f} tokens")

# %% [markdown]
# The post finds 208 for the A100, from rounded numbers (312 over 1.5); with the 1,555 GB/s of the 40 GB data sheet it is 201, and with the later 80 GB card 153. Memory became faster, so the critical batch fell.
#
# Now our own machine. The stored run measured eight 64 MiB matrices times 1 to 256 vectors, again and again, each time with the matmul peak and the read bandwidth before and after. **Predict** the picture: time per pass over the batch, on logarithmic axes. Ours: flat, then a line of slope one, with the bend at the critical batch, give or take half of it.


# %%
def yardstick(row):
    """The machine at the time of a stored repeat: the better of the two measurements around it."""
    best = {k: max(row["before"][k], row["after"][k]) for k in ("peak", "bandwidth")}
    return Device("then", {"fp32": best["peak"]}, best["bandwidth"], 1)


def bend(row, name):
    """The batch at which the level of the small batches meets the slope of the largest."""
    level = np.mean([stored_times(row, name, b) for b in (1, 2, 4)])
    return level / (stored_times(row, name, 256) / 256)


fig, ax = plt.subplots(figsize=(7, 3.6))
then = [yardstick(r) for r in STORED["roofline"]]
fastest = max(m.peak("fp32") for m in then), max(m.bandwidth for m in then)
machine = Device("at its fastest", {"fp32": fastest[0]}, fastest[1], 1)
batches = np.array(costs_runs.BATCHES)
size = costs_runs.MATRICES * costs_runs.WIDTH**2
for name, label in (
    ("products", "matrix times columns"),
    ("rows", "rows times matrix, as in chapter 10"),
):
    times = np.array([[stored_times(r, name, b) for b in batches] for r in STORED["roofline"]])
    ax.plot(batches, 1000 * times.min(axis=0), "o-", ms=4, label=label)
fine = np.geomspace(1, 256)
ax.plot(fine, 1000 * 4 * size / machine.bandwidth + 0 * fine, "k:", label="bytes / bandwidth")
ax.plot(fine, 1000 * 2 * size * fine / machine.peak("fp32"), "k--", label="FLOPs / peak")
ax.axvline(critical_batch(machine, "fp32"), color="gray", lw=0.8)
ax.set(xscale="log", yscale="log", xlabel="batch", ylabel="milliseconds for 512 MiB of weights")
ax.set_xticks(batches, [str(b) for b in batches])
ax.minorticks_off()
ax.legend(fontsize=8)
fig.tight_layout()
plt.show()
predicted = [critical_batch(yardstick(r), "fp32") for r in STORED["roofline"]]
found = [bend(r, "products") for r in STORED["roofline"]]
print("predicted bend", ledger.interval(predicted, digits=0))
print("measured bend ", ledger.interval(found, digits=0))
jump = [stored_times(r, "rows", 4) / stored_times(r, "products", 4) for r in STORED["roofline"]]
print("rows over columns at batch 4:", ledger.interval(jump, "times", digits=0))

# %% [markdown]
# The picture shows the fastest of the repeats at each batch, and the fastest yardsticks. It is called a *roofline* (turned over: Williams et al. draw speed, we draw time). The blue points follow the prediction roughly: almost flat, then a line of slope one, with the bend near the critical batch. They stay somewhat above both bounds; we did not measure why.
#
# The orange points are a surprise. They are the same numbers multiplied the other way round: B row vectors times the transposed matrix, as chapter 10's `linear` does it. At one vector they agree with the blue ones. From two on they jump, to about three times the blue ones, and only at large batches do the two meet again. We suppose that XLA's CPU back end uses another routine there, one that first copies the matrix into another order. So
# the bound is a bound: to reach it takes a program that reads each weight once. For the decoding of chapter 12 it is worth knowing that the order matters.

# %%
#| claim S092
off = ledger.interval(
    [f / p - 1 for f, p in zip(found, predicted, strict=True)], "relative", digits=1
)
print("bend, measured over predicted, minus 1:", off)
ledger.claim(
    "S092",
    section="Transformer Inference Arithmetic, batch sizes",
    claim="time per pass bends at the critical batch, peak over bandwidth (the position of the bend only): 512 MiB of fp32 "
    "weights, matrix times vectors, two CPU cores",
    predicted=ledger.within(0.5, "relative"),
    measured=off,
    verdict=ledger.judge(ledger.within(0.5, "relative"), off),
    function="costs.critical_batch",
    test="tests/test_costs.py::test_critical_batch",
)

# %% [markdown]
# ### Prefill and decode
#
# Generation has two phases (chapter 12). *Prefill* reads the prompt, all tokens in one pass; how long it takes is the time to the first token, TTFT. *Decode* writes one token per pass and row; how long that takes is the time per output token, TPOT. A pass of decode reads every weight once, whatever the batch, and the cache of *every* row. The embedding is not
# read, except for a row per token.


# %%
#| export
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


# %%
#| export workbook
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


# %% [markdown]
# What is sent? In *tensor parallelism* each matrix is cut over n devices: the first product of a pair by output columns, the second by input rows. Each device then has a partial sum of the layer's output, of the full shape, and the partial sums must be added up and given to all: an *all-reduce*, one after attention and one after the feed-forward layer. In a ring, each device sends a piece
# of 1/n to its neighbour, n − 1 times to add up and n − 1 times to hand round: $2\frac{n-1}{n}$ of the array.


# %%
#| export workbook
def tensor_parallel_bytes(
    config: LlamaConfig, tokens: int, devices: int, dtype: str = "bf16"
) -> int:
    """Bytes that each device sends in a forward pass: two ring all-reduces of tokens · D per layer."""
    array = tokens * config.dim * BYTES[dtype]
    return round(2 * config.n_layers * 2 * (devices - 1) / devices * array)


# %% [markdown]
# Count it by playing it: four "devices" in NumPy, each with its part of a feed-forward layer's matrices, and a ring that may only pass pieces to its right-hand neighbour.


# %%
def ring(partial):
    """All-reduce of equal arrays, piece by piece; the sums, and how many numbers each device sent."""
    n, sent = len(partial), 0
    pieces = [np.array_split(p.ravel(), n) for p in partial]
    for turn in range(2 * (n - 1)):
        outgoing = [(d, (d - turn) % n, pieces[d][(d - turn) % n]) for d in range(n)]
        for (
            d,
            i,
            piece,
        ) in outgoing:  # the neighbour adds it in the first half, keeps it in the second
            right = pieces[(d + 1) % n]
            right[i] = right[i] + piece if turn < n - 1 else piece
        sent += outgoing[0][2].size
    return [np.concatenate(p) for p in pieces], sent


draw = np.random.default_rng(0)
x, w_up, w_down = (draw.standard_normal(shape) for shape in ((8, 64), (64, 128), (128, 64)))
halves = zip(np.split(w_up, 4, axis=1), np.split(w_down, 4, axis=0), strict=True)
totals, sent = ring([np.maximum(x @ up, 0) @ down for up, down in halves])
assert all(np.allclose(t, (np.maximum(x @ w_up, 0) @ w_down).ravel()) for t in totals)
per_reduce = tensor_parallel_bytes(dataclasses.replace(MINI, dim=64, n_layers=1), 8, 4, "int8") / 2
print(f"numbers sent by each of 4: {sent}, formula {per_reduce:.0f}")

# %%
#| claim S090
assert sent == per_reduce
ledger.claim(
    "S090",
    section="Transformer Inference Arithmetic, model parallelism",
    claim="tensor parallelism over n devices sends 2 (n − 1)/n of tokens · D per all-reduce, two a layer",
    predicted="a ring played in NumPy sends exactly that",
    measured=f"{sent} numbers for 8 × 64 on 4 devices, equal; the sums are the undivided layer's",
    verdict="simulated only",
    function="costs.tensor_parallel_bytes",
    test="tests/test_costs.py::test_tensor_parallel_bytes",
)


# %%
#| export public
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


# %%
for name, n in (("a100", 1), ("h100", 1), ("h100", 8), ("tpu-v5e", 8)):
    for task, bound in (("prefill", prefill_time), ("decode", decode_time)):
        one = bound(EIGHT, DEVICES[name], 1, 8192, devices=n)
        print(f"8B on {n} {name:8} {task:8} {1000 * one.seconds:7.2f} ms, limited by {one.bound}")

# %% [markdown]
# Prefill is limited by arithmetic and decode by memory, by a wide margin. With eight GPUs half of the prefill's time goes into the links, if nothing hides it. (The bound counts the bytes on the link, not the delay of each message. In decode, where messages are tiny, the delays are what one really waits for; the post takes some microseconds for each.)
#
# Is the bound near the truth? The stored run decoded one row at a time with a random Llama of half a gigabyte in fp32. **Predict** how close chapter 10's code comes to the memory bound on this CPU. Ours: at least half.


# %%
#| claim S091
def share(row):
    """Bound over measured seconds for one token of the large random Llama."""
    bound = decode_time(costs_runs.LARGE, yardstick(row), 1, 256, dtype="fp32")
    assert bound.bound == "memory"
    return bound.seconds / row["cached"]


reached = ledger.interval([share(r) for r in STORED["decoding"]], "of the bound", digits=2)
parameters = count_params(costs_runs.LARGE)
assert 4 * parameters == STORED["decoding"][0]["weights"]
print(f"{parameters / 1e6:.0f} million parameters, one token: {reached}")
whole_pass = forward_flops(costs_runs.LARGE, 1, 256, count="blocks")
prefilled = [whole_pass / yardstick(r).peak("fp32") / r["uncached"] for r in STORED["decoding"]]
print("256 tokens at once, limited by arithmetic:", ledger.interval(prefilled, "of it", digits=2))
ledger.claim(
    "S091",
    section="Transformer Inference Arithmetic, latency calculations",
    claim="the time of a decoding step is at least the larger of arithmetic and memory traffic, and within a factor of two of it: speed reached at batch 1 on two CPU cores, as a share of that bound",
    predicted=ledger.at_least(0.5, "of the bound"),
    measured=reached,
    verdict=ledger.judge(ledger.at_least(0.5, "of the bound"), reached),
    function="costs.decode_time",
    test="tests/test_costs.py::test_decode_is_bound_by_memory",
)

# %% [markdown]
# Seven tenths, so the prediction holds; a pass over 256 tokens, where arithmetic is the limit, comes closer to its own. Where the rest goes we did not measure; candidates are the many small operations between the products, and copies of the cache. Chapter 12 goes after them.
#
# ## 7 · What the cache saves
#
# Without a cache each new token would cost a pass over everything before it. **Predict** for the 8B and a reply of 512 tokens to a prompt of 512: how many times fewer FLOPs with the cache? Ours: the mean length that is read again, some 768 tokens, for each of 512 tokens, against 1,024 tokens once: 384 times.


# %%
def reply_flops(config, prompt, reply, cached):
    """FLOPs of writing `reply` tokens after a prompt, with a KV cache or without."""
    if not cached:
        return sum(forward_flops(config, 1, prompt + i, logits=1) for i in range(reply))
    later = sum(forward_flops(config, 1, 1, cached=prompt + i) for i in range(reply - 1))
    return forward_flops(config, 1, prompt, logits=1) + later


saved = reply_flops(EIGHT, 512, 512, False) / reply_flops(EIGHT, 512, 512, True)
print(f"8B, 512 + 512 tokens: {saved:.0f} times fewer FLOPs with the cache")
one_token = lambda m, x, kv: m(x, cache=kv)  # noqa: E731
slots = jax.eval_shape(lambda: init_cache(EIGHT, 1, 8192, jnp.bfloat16))
decoding = jax.jit(one_token).lower(abstract(EIGHT, jnp.bfloat16), ids(1, 1), slots).cost_analysis()
ratio = decoding["flops"] / forward_flops(EIGHT, 1, 1, cached=8191)
print(f"XLA / formula for the token number 8,192: {ratio:.3f}")
assert 1 < ratio < 1.01 and 300 < saved < 450

# %% [markdown]
# Close to it. Note what chapter 10's cache does: its buffer has a fixed number of slots, and every step computes scores for all of them, filled or not. XLA's count for the *last* slot equals the formula; for the first it would be the same, and the formula lower.
#
# FLOPs are not seconds. **Predict** how much *time* the cache saves at 256 tokens for the stored half-gigabyte model: FLOPs fall by some 256. Ours: far less, since the single token is limited by memory and the 256 are not. In the time of one read the machine could do a critical batch of tokens, so divide: 256 over the critical batch, some 14, is 18 times. The ledger asks that this quotient be right to within a third, a tolerance chosen after the run. (The stored run decodes into an empty buffer of 256 slots; every slot is read all the same.)

# %%
#| claim S088
speedup = [row["uncached"] / row["cached"] for row in STORED["decoding"]]
fewer = forward_flops(costs_runs.LARGE, 1, 256) / forward_flops(costs_runs.LARGE, 1, 1, cached=255)
faster = ledger.interval(speedup, "times", digits=0)
print(f"one token with a cache of 256 slots: {fewer:.0f} times fewer FLOPs, {faster} faster")
gap = ledger.interval(
    [
        row["uncached"] / row["cached"] / (256 / critical_batch(yardstick(row), "fp32")) - 1
        for row in STORED["decoding"]
    ],
    "relative",
    digits=1,
)
assert cache_bytes(EIGHT, 1, 1) == 131_072
ledger.claim(
    "S088",
    section="Transformer Inference Arithmetic, kv cache",
    claim="a KV cache of 2 · L · K · Dh numbers a token replaces reading everything again: time of a pass over 256 tokens over that of "
    f"one token with a cache of 256 slots ({faster}), against 256 over the critical batch",
    predicted=ledger.within(0.33, "relative"),
    measured=gap,
    verdict=ledger.judge(ledger.within(0.33, "relative"), gap),
    function="costs.cache_bytes",
    test="tests/test_costs.py::test_cache_and_weights_equal_the_arrays",
)

# %% [markdown]
# The division is right to within that. The cache saves 250 of 251 parts of the arithmetic, and of the time sixteen of seventeen.
#
# ### What the bound leaves out
#
# The bound counts weights and cache, and no intermediate array. XLA also counts the bytes that each operation reads and writes, before operations are fused: an upper limit of the real traffic. **Predict** that count over our bytes, for one decoded token of the 8B and for a prefill of 8,192. Ours: close to 1, and very far above.

# %%
#| claim S094
prefill = counts["8B"]
read = matmul_weights(EIGHT) * 2 + cache_bytes(EIGHT, 1, 8192)
excess = {n: c["bytes accessed"] / read for n, c in (("decode", decoding), ("prefill", prefill))}
print("XLA's bytes over weights and cache:", {n: f"{e:.1f}" for n, e in excess.items()})
needed = prefill["flops"] / DEVICES["h100"].peak("bf16") * DEVICES["h100"].bandwidth
print(
    f"an H100 could move {needed / read:.0f} times weights and cache during the prefill's arithmetic"
)
assert excess["decode"] < 1.5 and excess["prefill"] > 10
ledger.claim(
    "S094",
    section="Transformer Inference Arithmetic, intermediate memory costs",
    claim="intermediate arrays, if every operation wrote its result to memory: at most a small addition to weights and cache in "
    "decoding one token, most of the traffic in a prefill (the traffic of a fused program was not measured)",
    predicted="bytes accessed over weights and cache, before fusion: below 1.5 and above 10",
    measured=f"{excess['decode']:.1f} and {excess['prefill']:.0f} for the 8B at 8,192 (XLA's count of the unfused program)",
    verdict="derived",
    function="costs.decode_time",
    test="tests/test_costs.py::test_traffic_before_fusion",
)

# %% [markdown]
# Two opposite worlds. In decoding the bound leaves out at most about a tenth. In a prefill the intermediate arrays would be almost all of the traffic, nearly ten times more than the H100 can move while it computes, if each operation wrote its result to memory and the next read it back. That they don't is the work of *fusion*: XLA joins elementwise operations with their neighbours, and FlashAttention joins the whole of attention. A bound
# for prefill that counts weights and cache only presumes such a program.
#
# ## 8 · The calculator
#
# Everything so far in one object. `report` takes a config or its name, a device or its name, a batch, a context and a number of devices, over which all is assumed to split evenly. All times are lower bounds; section 6 showed what a program can lose against them.


# %%
#| export
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


# %%
#| export
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


# %%
#| export public
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


# %%
#| export
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


# %%
#| export
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


# %%
print(report("llama3.1-8b", "h100", batch=16, context=8192))
print()
print(report("llama3.1-405b", "h100", batch=8, context=8192, devices=16))

# %% [markdown]
# Read the first report as an answer to a plan: serve 16 users of the 8B with 8,192 tokens each from one H100. It fits, up to 59 such users. Prefilling all 16 prompts takes at least two seconds, which is long. Then each user gets a token every 10 ms at best, about a hundred per second. Training the same batch does not fit: the state alone takes more than 80 GB, and the activations about a terabyte if they are not recomputed.
# The second is the 405B on the paper's two machines (§6). The paper runs them as a pipeline (the layers divided over the machines), with tensor parallelism inside each machine. An even split over 16 is optimistic: there are only 8 key/value heads to be divided, and the link between machines is slower.

# %%
eight_report = report("llama3.1-8b", "h100", batch=16, context=8192)
fig = eight_report.draw()
plt.show()
print(
    f"decode at batch 16 is limited by {eight_report.decode.bound}; largest batch {eight_report.max_batch}"
)

# %% [markdown]
# On the left: inference takes a fraction of an 80 GB card, training several cards. On the right: the two dashed lines never cross. With a long context the cache is read for each row, so the memory line rises with the batch as the arithmetic does, and the critical batch of section 6, which counts weights only, is never reached. **At context 8,192 decoding the 8B on an H100 is limited by memory at any batch.** (Beyond the dotted line the card is full anyway.) The whole herd:

# %%
shown = {"a100": 1, "h100": 8, "h200": 8, "tpu-v5p": 16}
print(f"{'tokens/s, context 8,192, batch 8':34}", *(f"{n} × {d:8}" for d, n in shown.items()))
for name in CONFIGS:
    found_reports = [report(name, d, 8, 8192, devices=n) for d, n in shown.items()]
    cells_of = [
        f"{8 / r.decode.seconds:8,.0f}    " if r.fits else "doesn't fit" for r in found_reports
    ]
    print(f"{name:34}", *(f"{text:12}" for text in cells_of))

# %% [markdown]
# Tokens per second, all rows together. The 405B fits on eight H200s, which hold 141 GB each: the newer card saves the second machine.
#
# ## 9 · This machine, live
#
# The stored numbers of sections 1, 6 and 7 came from a tool, on another day. The next cell measures your machine now, and gives the report of the mini Llama on it. Its output depends on your machine and on what else runs there, so it is not compared. (A time below its "bound" would mean that the machine was busier when the yardsticks were taken: they are the best of a few tries, not a data sheet.)

# %% tags=["nbval-ignore-output"]
here = DEVICES["this machine"]
print(f"{here.peak('fp32') / 1e9:.0f} GFLOP/s, reads {here.bandwidth / 1e9:.0f} GB/s")
print(report(MINI, "this machine", batch=2, context=256))
assert critical_batch(here, "fp32") > 1

# %% [markdown]
# ## Break it: the peak from the brochure
#
# The plausible bug of this chapter is a factor of two, and it can enter at several doors: a multiply–add counted as one FLOP, a link counted in both directions, or a peak that holds for sparse matrices only. Take the last. **Predict** what changes in a report if the H100 gets its 1,979 TFLOP/s "with sparsity". Ours: the prefill halves, decoding stays.

# %%
brochure = dataclasses.replace(DEVICES["h100"], name="h100 brochure", flops={"bf16": 1979e12})
for device in (DEVICES["h100"], brochure):
    made = report("llama3.1-8b", device, batch=16)
    share_of_peak = mfu(400e12, 1, device)
    print(
        f"{device.name:14} prefill {made.prefill.seconds:.2f} s, decode {1000 * made.decode.seconds:.1f} ms, "
        f"critical batch {critical_batch(device):.0f}, MFU of 400 TFLOP/s {share_of_peak:.0%}"
    )
print(f"Table 4's 430 TFLOP/s would be {mfu(430e12, 1, brochure):.0%} of the brochure's peak")
assert abs(mfu(430e12, 1, brochure) - 0.43) > 0.2

# %% [markdown]
# Nothing looks absurd. Decoding does not change at all, since it is limited by memory, so a test of tokens per second would pass. The prefill is promised in half the time. What catches it is a pair of numbers that somebody else measured: 430 TFLOP/s and 43 % exist in print, and the brochure makes 22 % of them. The first door is watched by XLA's count, which knows what a multiply–add is.
#
# ## Notes on the sources
#
# - **kipply, *Transformer Inference Arithmetic* (2022).** The post derives what sections 5 to 7 use for GPT's shape: the size of the cache, capacity, the critical batch of 208 for an A100, latency as the larger of two, 24 D² FLOPs a layer. We redid each formula for Llama's shape; the communication is only simulated. What is different by now: grouped keys make the cache 3 to 16 times smaller, contexts went from two thousand tokens to a hundred thousand, and so the cache, not the weights, decides at
#   long contexts. Its critical batch counts weights only, and our figure shows where that misleads.
# - **The Llama 3 Herd of Models.** §1: the budget is 6ND. §3.3.2: Table 4, with the 41 that is 40.4 as printed; how its FLOPs are counted is not said, nor what the memory estimator does. §6: two machines in bf16, derived.
# - **Kaplan et al. 2020** have 6ND with N *without* embeddings and the attention term beside it; dropping both is later habit. **Chowdhery et al. 2022** define MFU with attention counted. **Sardana et al. 2023** add the cost of inference to the objective of **Hoffmann et al. 2022**; our break-even formula is their problem, solved the other way round, with the constants of **Besiroglu et al. 2024**. **Korthikanti et al. 2022** count activations for GPT's shape; the constants depend on the program.
#
# ## Remember
#
# **Q:** What does one token cost in a forward pass, and in training?
# **A:** About 2N FLOPs forward and 6N in training, plus attention: 4 · H · Dh · L for each pair of a query and a key, three times that in training.
#
# **Q:** Why is decoding limited by memory?
# **A:** Each pass reads all weights to do two FLOPs with each per row. Chips can do hundreds in the time of one read.
#
# **Q:** What is the critical batch, and what is it for an H100 in bf16?
# **A:** Peak over bandwidth, times bytes per number over two: the batch where reading and computing take equally long. About 295.
#
# **Q:** How many bytes a token does the KV cache of the 8B take in bf16?
# **A:** 2 · L · K · Dh · 2 bytes = 2 · 32 · 8 · 128 · 2 = 131,072.
#
# **Q:** How many bytes per parameter does training with Adam need before the first activation?
# **A:** 16: in fp32 4 + 4 + 8, in bf16 2 + 2 + 12 with an fp32 copy.
#
# ## Exercises
#
# 1. **The price of a million tokens.** An H100 costs 2 dollars an hour. What is the least that a million generated tokens of the 8B cost at context 2,048, at batch 1 and at the largest batch? Success: two prices, with a ratio of more than 40.
# 2. **When the cache outweighs the weights.** For the 8B in bf16 and a batch of 16, from which context on does a decoding pass read more cache than weights? Success: a formula, and `decode_time` agrees.
# 3. **FP8.** The paper serves the 405B in FP8 on one machine. How many rows of 8,192 tokens fit on 8 H100s if cache and weights are FP8? Success: more than zero, by `max_batch`.
# 4. **The whole square.** What would a program cost that computes the whole T × T square, on the 405B at 131,072 tokens? Success: the ratio of two calls of `training_flops`.
#
# Solutions to 1 and 2:

# %% tags=["solution"] jupyter={"source_hidden": true}
most = max_batch(EIGHT, DEVICES["h100"], 2048)
prices = {
    rows: 2 / 3600 * decode_time(EIGHT, DEVICES["h100"], rows, 2048).seconds / rows * 1e6
    for rows in (1, most)
}
print("dollars for a million tokens:", {rows: round(price, 3) for rows, price in prices.items()})
assert prices[1] / prices[most] > 40

# %% tags=["solution"] jupyter={"source_hidden": true}
even_at = 2 * matmul_weights(EIGHT) / cache_bytes(EIGHT, 16, 1)
empty, full = (decode_time(EIGHT, DEVICES["h100"], 16, round(t)).memory for t in (1, even_at))
print(
    f"from context {even_at:,.0f} on; the pass takes {full / empty:.2f} times as long as without a cache"
)
assert abs(full / empty - 2) < 0.01

# %% [markdown]
# Solutions to 3 and 4:

# %% tags=["solution"] jupyter={"source_hidden": true}
fp8_rows = max_batch(giant, DEVICES["h100"], 8192, devices=8, dtype="fp8")
print(f"{fp8_rows} rows of 8,192 tokens in FP8 on 8 H100s")
assert fp8_rows > 0

# %% tags=["solution"] jupyter={"source_hidden": true}
wasted = training_flops(giant, 1, 131_072, count="full") / training_flops(giant, 1, 131_072)
print(f"the whole square costs {wasted:.2f} times the masked half")
assert 1 < wasted < 2

# %% [markdown]
# ## References
#
# - kipply (2022). *Transformer Inference Arithmetic*. kipp.ly.
# - Llama Team, AI @ Meta (2024). *The Llama 3 Herd of Models*. arXiv 2407.21783, §1, §3.3.2, §6, Table 4. Model card: `meta-llama/llama-models`.
# - Kaplan, J. et al. (2020). *Scaling Laws for Neural Language Models*. arXiv 2001.08361, §2.1.
# - Hoffmann, J. et al. (2022). *Training Compute-Optimal Large Language Models*. arXiv 2203.15556, §3.3.
# - Besiroglu, T. et al. (2024). *Chinchilla Scaling: A Replication Attempt*. arXiv 2404.10102.
# - Sardana, N. et al. (2023). *Beyond Chinchilla-Optimal: Accounting for Inference in Language Model Scaling Laws*. arXiv 2401.00448.
# - Chowdhery, A. et al. (2022). *PaLM: Scaling Language Modeling with Pathways*. arXiv 2204.02311, App. B.
# - Korthikanti, V. et al. (2022). *Reducing Activation Recomputation in Large Transformer Models*. arXiv 2205.05198.
# - Williams, S. et al. (2009). *Roofline: An Insightful Visual Performance Model*. CACM 52(4).
# - Data sheets: NVIDIA A100, H100, H200; Google Cloud TPU documentation, v5e and v5p.
#
# ## Next chapter
#
# Numbers need weights to be about. Chapter 14 reads and writes everyone's files: Hugging Face, Meta, GGUF.
