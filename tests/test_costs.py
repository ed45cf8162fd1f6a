"""Chapter 13: every formula against a count that does not know it, and reports that say what is wrong."""

import dataclasses
import json
import math

import costs_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from course import ROOT
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from llm_from_scratch import costs
from llm_from_scratch.costs import (
    BYTES,
    DEVICES,
    PUBLISHED,
    Device,
    attended_pairs,
    cache_bytes,
    critical_batch,
    decode_time,
    forward_flops,
    latency,
    max_batch,
    mfu,
    prefill_time,
    readable,
    report,
    tensor_parallel_bytes,
    training_bytes,
    training_flops,
)
from llm_from_scratch.generation import xla_count
from llm_from_scratch.llama import CONFIGS, Llama, LlamaConfig, count_params, init_cache
from llm_from_scratch.pretraining import RECIPES, next_token_loss

MINI = RECIPES["short"].model
SMALL = [
    LlamaConfig(300, 64, 2, 4, 2, 160, 16, tie_embeddings=True),
    LlamaConfig(500, 96, 3, 6, 3, 256, 8),
    LlamaConfig(1000, 48, 1, 2, 2, 128, 64),
]
names = st.sampled_from(sorted(CONFIGS))
devices = st.sampled_from(PUBLISHED)


def abstract(config, dtype=jnp.float32):
    return jax.eval_shape(lambda: Llama(config, key=jax.random.key(0), dtype=dtype))


def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def products(jaxpr) -> int:
    """FLOPs of all matrix products in a jaxpr and in those it calls: 2 · output size · contracted size."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = math.prod(equation.outvars[0].aval.shape)
            total += 2 * size * math.prod(left[axis] for axis in contracted)
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += turns * products(getattr(inner, "jaxpr", inner))
    return total


# FLOPs


@pytest.mark.parametrize("config", SMALL)
@pytest.mark.parametrize("shape", [(1, 7), (3, 64), (2, 200)])
def test_forward_flops_are_those_of_the_products(config, shape):
    """Equal, to the last FLOP, to a walk through the program that JAX traces."""
    traced = jax.make_jaxpr(lambda m, x: m(x))(abstract(config), ids(*shape))
    assert products(traced.jaxpr) == forward_flops(config, *shape, count="blocks")


@pytest.mark.parametrize("config", SMALL)
def test_decode_flops_are_those_of_the_products(config):
    """With a cache of 50 slots, all of which chapter 10 reads."""
    cache = jax.eval_shape(lambda: init_cache(config, 2, 50))
    traced = jax.make_jaxpr(lambda m, x, kv: m(x, cache=kv))(abstract(config), ids(2, 1), cache)
    assert products(traced.jaxpr) == forward_flops(config, 2, 1, cached=49)


@pytest.mark.parametrize("config", SMALL)
def test_training_flops_are_those_of_the_products(config):
    batch = {name: ids(2, 130) for name in ("tokens", "targets", "segments")}
    step = jax.grad(lambda m, b: next_token_loss(m, b)[0])
    traced = jax.make_jaxpr(step)(abstract(config), batch)
    assert products(traced.jaxpr) == training_flops(config, 2, 130, count="blocks")


def test_forward_flops_against_xla():
    for config, shape in ((MINI, (2, 256)), (dataclasses.replace(MINI, n_layers=1), (1, 700))):
        traced = jax.jit(lambda m, x: m(x)).trace(abstract(config), ids(*shape))
        ratio = xla_count(traced.jaxpr) / forward_flops(config, *shape, count="blocks")
        assert 1 < ratio < 1.02


def test_training_flops_against_xla():
    step = xla_count(costs_runs.trace_step(MINI, 2, 256).jaxpr)
    assert 1 < step / training_flops(MINI, 2, 256, count="blocks") < 1.02


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40))
def test_causal_pairs_add_up(first, second, cached):
    """Two pieces through a cache see what one pass sees."""
    pieces = attended_pairs(first, cached) + attended_pairs(second, cached + first)
    assert pieces == attended_pairs(first + second, cached)
    mask = np.tril(np.ones((first, first + cached)), k=cached)
    assert attended_pairs(first, cached) == mask.sum()


@given(st.integers(1, 5000))
def test_blocks_are_between_causal_and_full(n):
    counts = [attended_pairs(n, count=count) for count in ("causal", "blocks", "full")]
    assert counts == sorted(counts)


def test_unknown_count():
    with pytest.raises(ValueError, match="'causal', 'full' or 'blocks', got 'half'"):
        attended_pairs(4, count="half")


@given(names, st.integers(1, 300), st.integers(0, 300))
def test_logits_can_be_left_out(name, new, kept):
    config, kept = CONFIGS[name], min(new, kept)
    gap = forward_flops(config, 2, new) - forward_flops(config, 2, new, logits=kept)
    assert gap == 2 * 2 * (new - kept) * config.vocab_size * config.dim


def test_mfu():
    assert round(100 * mfu(430e12, 1, DEVICES["h100"]), 1) == 43.5
    assert mfu(1e15, 2, DEVICES["a100"], devices=4) == pytest.approx(1e15 / 8 / 312e12)


# bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_cache_and_weights_equal_the_arrays(name, dtype):
    config, short = CONFIGS[name], {"float32": "fp32", "bfloat16": "bf16"}[jnp.dtype(dtype).name]
    cache = jax.eval_shape(lambda: init_cache(config, 3, 70, dtype))
    kept = sum(x.size * x.dtype.itemsize for x in (*cache.k, *cache.v))
    assert kept == cache_bytes(config, 3, 70, short)
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract(config, dtype)))
    assert weights == training_bytes(config, 1, 1, short)["weights"]


def test_training_bytes_against_xla():
    """A shape that the chapter does not use."""
    config = dataclasses.replace(MINI, n_layers=2, hidden_dim=512, vocab_size=2048)
    found = costs_runs.memory(config, 6, 256)
    parts = training_bytes(config, 6, 256, "fp32")
    temporary = max(parts["activations"], parts["gradients"])
    assert parts["weights"] + parts["optimizer"] == pytest.approx(found["state"], rel=0.01)
    assert temporary == pytest.approx(found["temporary"], rel=0.1)


@given(names, st.integers(1, 64), st.integers(1, 8192), st.sampled_from(sorted(BYTES)))
def test_sixteen_bytes_per_parameter_in_both_formats(name, batch, context, dtype):
    parts = training_bytes(CONFIGS[name], batch, context, dtype)
    state = sum(parts.values()) - parts["activations"]
    assert state == (12 + 2 * BYTES[dtype] if BYTES[dtype] < 4 else 16) * count_params(
        CONFIGS[name]
    )
    thin = training_bytes(CONFIGS[name], batch, context, dtype, recompute=True)
    assert thin["activations"] < parts["activations"]


@given(names, devices, st.integers(1, 8192), st.integers(1, 32))
def test_max_batch_is_the_largest_that_fits(name, device, context, n):
    config = CONFIGS[name]
    most = max_batch(config, device, context, devices=n)
    weights, capacity = 2 * count_params(config), n * device.capacity
    assert most == 0 or weights + cache_bytes(config, most, context) <= capacity
    assert weights + cache_bytes(config, most + 1, context) > capacity


def test_the_405b_needs_two_machines_in_bf16():
    """Paper, §6; and one in FP8."""
    config, device = CONFIGS["llama3.1-405b"], DEVICES["h100"]
    assert max_batch(config, device, 1, devices=8) == 0
    assert max_batch(config, device, 8192, devices=16) > 0
    assert max_batch(config, device, 8192, devices=8, dtype="fp8") > 0


# seconds


def test_critical_batch():
    """At the critical batch reading and multiplying a weight take equally long; kipply's 208."""
    device = Device("rounded A100", {"bf16": 312e12}, 1.5e12, 40e9)
    assert critical_batch(device) == pytest.approx(208)
    for device in PUBLISHED:
        tokens, weights = critical_batch(device), 1e9
        bound = latency(device, 2 * weights * tokens, 2 * weights, dtype="bf16")
        assert bound.compute == pytest.approx(bound.memory)


@given(names, devices, st.integers(1, 4096))
def test_decode_is_bound_by_memory(name, device, context):
    """One row: always. And the bound is at least the time to read the weights."""
    bound = decode_time(CONFIGS[name], device, 1, context)
    assert bound.bound == "memory" and bound.seconds == bound.memory
    assert bound.memory >= 2 * costs.matmul_weights(CONFIGS[name]) / device.bandwidth


def test_traffic_before_fusion():
    """Bytes by XLA's count of the unfused program, over weights and cache: 8B, one token and a prefill."""
    config, length = CONFIGS["llama3.1-8b"], 8192
    shapes = jax.eval_shape(lambda: Llama(config, key=jax.random.key(0), dtype=jnp.bfloat16))
    slots = jax.eval_shape(lambda: init_cache(config, 1, length, jnp.bfloat16))
    token, prompt = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (1, length))
    decode = jax.jit(lambda m, x, kv: m(x, cache=kv)).lower(shapes, token, slots)
    prefill = jax.jit(lambda m, x: m(x)).lower(shapes, prompt)
    least = 2 * costs.matmul_weights(config) + costs.cache_bytes(config, 1, length)
    assert 1 < decode.cost_analysis()["bytes accessed"] / least < 1.5
    assert prefill.cost_analysis()["bytes accessed"] / least > 10


@given(names, devices, st.integers(1, 64), st.integers(1, 8192), st.sampled_from([1, 2, 4, 8]))
def test_devices_share_the_work(name, device, batch, context, n):
    for bound in (prefill_time, decode_time):
        one = bound(CONFIGS[name], device, batch, context)
        many = bound(CONFIGS[name], device, batch, context, devices=n)
        assert many.compute == pytest.approx(one.compute / n)
        assert many.memory == pytest.approx(one.memory / n)
        assert (many.link > 0) == (n > 1)


def test_tensor_parallel_bytes():
    config = CONFIGS["llama3.1-8b"]
    assert tensor_parallel_bytes(config, 10, 1) == 0
    array = 10 * config.dim * 2
    assert tensor_parallel_bytes(config, 10, 2) == 2 * config.n_layers * array
    assert tensor_parallel_bytes(config, 10, 1000) == pytest.approx(
        4 * config.n_layers * array, rel=0.01
    )


def test_no_link():
    lonely = Device("lonely", {"bf16": 1e12}, 1e11, 1e10)
    with pytest.raises(ValueError, match="lonely has no link, it can't be one of devices=2"):
        report("llama3.2-1b", lonely, devices=2)


# devices


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bandwidth": 0}, "bandwidth must be positive, got bandwidth=0"),
        ({"capacity": -1.0}, "capacity must be positive, got capacity=-1.0"),
        ({"capacity": math.nan}, "capacity must be positive"),
        ({"flops": {}}, "flops must be positive"),
        ({"flops": {"bf16": 0}}, "flops must be positive"),
        ({"link": -1.0}, "link 0 or more"),
        ({"flops": {"fp4": 1.0}}, r"unknown number formats \['fp4'\]"),
    ],
)
def test_impossible_devices(change, message):
    with pytest.raises(ValueError, match=message):
        Device(**({"name": "x", "flops": {"fp32": 1.0}, "bandwidth": 1, "capacity": 1} | change))


def test_devices_by_name(monkeypatch):
    """This machine is listed with the others, and measured once, when it is asked for."""
    calls = []
    monkeypatch.setattr(costs, "matmul_peak", lambda: calls.append("peak") or 100.0)
    monkeypatch.setattr(costs, "read_bandwidth", lambda: 2e10)
    costs.this_machine.cache_clear()
    assert list(DEVICES) == [*(d.name for d in PUBLISHED), "this machine"]
    assert len(DEVICES) == len(list(DEVICES)) == len(PUBLISHED) + 1
    assert "h100" in DEVICES and "this machine" in DEVICES and calls == []
    here = DEVICES["this machine"]
    assert here is DEVICES["this machine"] and calls == ["peak"]
    assert here.flops == {"fp32": 1e11} and here.bandwidth == 2e10 and here.capacity > 1e9
    assert "fp32" in str(report("llama3.2-1b", "this machine"))
    costs.this_machine.cache_clear()
    with pytest.raises(KeyError, match="no device 'b200'; there are a100-40gb, a100, h100"):
        DEVICES["b200"]
    assert "b200" not in DEVICES


def test_every_device_says_where_its_numbers_are_from():
    assert all(device.source and device.link and device.group > 1 for device in PUBLISHED)


def test_read_bandwidth_is_a_speed():
    assert 1e7 < costs.read_bandwidth(100_000, 2) < 1e14


# the report


@pytest.mark.parametrize("device", PUBLISHED, ids=lambda device: device.name)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_on_every_device(name, device):
    made = report(name, device.name, batch=4, context=2048, devices=8)
    lines = str(made).splitlines()
    assert lines[0].startswith(
        f"{count_params(CONFIGS[name]):,} parameters, bf16, 8 × {device.name}"
    )
    assert made.fits == (made.max_batch >= 4)
    assert ("slower links" in lines[-1]) == (device.group < 8)
    assert made.step_seconds == training_flops(CONFIGS[name], 4, 2048) / 8 / device.peak("bf16")


def test_report_takes_configs_devices_and_formats():
    made = report(MINI, DEVICES["h100"], 2, 256, dtype="fp8")
    assert made == report(MINI, "h100", 2, 256, dtype="fp8") and made.weights == 4_000_000
    assert not report("llama3.1-405b", "h100", context=1, devices=8).fits
    assert report(MINI, "a100", 2, 256).trains


def test_draw():
    import matplotlib

    matplotlib.use("Agg")
    figure = report("llama3.1-70b", "h100", 8, 4096, devices=8).draw()
    left, right = figure.axes
    assert len(left.patches) == 6 and "GB" in left.get_xlabel()
    assert {line.get_label() for line in right.lines} >= {"compute", "memory", "link", "bound"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("llama4", "h100"), KeyError, "no config 'llama4'; there are llama3-8b"),
        (("llama3-8b", "tpu"), KeyError, "no device 'tpu'"),
        (
            ("llama3-8b", "h100", 0),
            ValueError,
            "batch must be a whole number of at least 1, got batch=0",
        ),
        (
            ("llama3-8b", "h100", 1, -5),
            ValueError,
            "context must be a whole number of at least 1, got context=-5",
        ),
        (("llama3-8b", "h100", 1, 8193), ValueError, "context=8193 exceeds max_seq_len=8192"),
    ],
)
def test_bad_reports(arguments, error, message):
    with pytest.raises(error, match=message):
        report(*arguments)


def test_bad_formats_and_devices():
    with pytest.raises(ValueError, match="a100 has no peak for 'fp8'; it has"):
        report("llama3-8b", "a100", dtype="fp8")
    with pytest.raises(
        ValueError, match="devices must be a whole number of at least 1, got devices=0"
    ):
        report("llama3-8b", "a100", devices=0)


def test_readable():
    assert [readable(v, "B") for v in (16e9, 999.6e6, 1e3, 131_072)] == [
        "16 GB",
        "1 GB",
        "1 kB",
        "131 kB",
    ]
    assert [readable(v, "s") for v in (0.0096, 2.126, 3.2e-5)] == ["9.6 ms", "2.13 s", "32 µs"]


# the stored run


def test_the_stored_run_is_of_these_shapes():
    stored = json.loads((ROOT / "results" / "costs.json").read_text())
    assert list(stored["memory"]) == list(costs_runs.SHAPES)
    for part in ("roofline", "decoding"):
        assert [row["repeat"] for row in stored[part]] == list(range(costs_runs.REPEATS))
    for row in stored["roofline"]:
        assert list(row["products"]) == list(row["rows"]) == list(map(str, costs_runs.BATCHES))
