"""Chapter 10: golden parity with transformers, properties of the parts, the cache, bad input."""

import dataclasses
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from llm_from_scratch import llama
from llm_from_scratch.llama import CONFIGS, Llama, LlamaConfig, RopeScaling

TINY = LlamaConfig(41, 24, 2, 4, 2, 40, 6, rope_theta=1000.0, max_seq_len=64)
GOLDEN = sorted((Path(__file__).parent / "golden").glob("llama_*.safetensors"))
quick = settings(max_examples=15, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Compile for speed of compilation, but for the golden files, which are the parity claim."""
    jax.config.update("jax_disable_most_optimizations", "golden" not in request.node.name)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def randomised(config: LlamaConfig, seed: int = 0, dtype=jnp.float32, scale: float = 8.0) -> Llama:
    """A model whose scores and gates are far from zero, so that a wrong mask or angle shows."""
    model = Llama(config, key=jax.random.key(seed), dtype=dtype)
    return jax.tree.map(lambda x: x * scale if x.ndim == 2 else x, model)


@eqx.filter_jit
def run(model, *arguments, **options):
    """The model, compiled: op by op, every new shape costs seconds."""
    return model(*arguments, **options)


def draw(*shape: int, seed: int = 1, config: LlamaConfig = TINY):
    return jax.random.randint(jax.random.key(seed), shape, 0, config.vocab_size)


def normal(*shape: int, seed: int = 0):
    return jax.random.normal(jax.random.key(seed), shape)


# transformers ------------------------------------------------------------------------------------


def read_golden(path: Path) -> tuple[dict, dict]:
    with safe_open(path, "numpy") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["config"])


def config_of(foreign: dict) -> LlamaConfig:
    rope = foreign["rope_parameters"]
    scaling = None
    if rope["rope_type"] == "llama3":
        old = rope["original_max_position_embeddings"]
        factors = (rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"])
        scaling = RopeScaling(*factors, old)
    return LlamaConfig(
        vocab_size=foreign["vocab_size"],
        dim=foreign["hidden_size"],
        n_layers=foreign["num_hidden_layers"],
        n_heads=foreign["num_attention_heads"],
        n_kv_heads=foreign["num_key_value_heads"],
        hidden_dim=foreign["intermediate_size"],
        head_dim=foreign["head_dim"],
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        norm_eps=foreign["rms_norm_eps"],
        tie_embeddings=foreign["tie_word_embeddings"],
    )


def named(model: Llama) -> dict:
    """The model's arrays under Hugging Face's names."""
    found = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm.weight}
    if model.head is not None:
        found["lm_head.weight"] = model.head
    for i, block in enumerate(model.blocks):
        at, ff = block.attention, block.feed_forward
        layer = {
            "self_attn.q_proj": at.w_query,
            "self_attn.k_proj": at.w_key,
            "self_attn.v_proj": at.w_value,
            "self_attn.o_proj": at.w_out,
            "mlp.gate_proj": ff.w_gate,
            "mlp.up_proj": ff.w_up,
            "mlp.down_proj": ff.w_down,
            "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.feed_forward_norm.weight,
        }
        found |= {f"model.layers.{i}.{k}.weight": v for k, v in layer.items()}
    return found


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden(path):
    """Logits, loss and every gradient within 1e-4 of transformers'."""
    golden, foreign = read_golden(path)
    config = config_of(foreign)
    model = Llama(config, key=jax.random.key(0))
    names = list(named(model))
    weights = [jnp.asarray(golden[name]) for name in names]
    assert {k for k in golden if "weight" in k and not k.startswith("grad.")} == set(names)
    model = eqx.tree_at(lambda m: list(named(m).values()), model, weights)
    tokens, segments = golden["tokens"], golden["segments"]
    targets = np.full_like(tokens, -1)
    inside = segments[:, :-1] == segments[:, 1:]
    targets[:, :-1][inside] = tokens[:, 1:][inside]

    @eqx.filter_value_and_grad(has_aux=True)
    def both(model):
        logits = model(tokens, segments)
        return llama.cross_entropy(logits, targets), logits

    (loss, logits), gradients = eqx.filter_jit(both)(model)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(loss, golden["loss"][0], atol=1e-5, rtol=0)
    for name, gradient in named(gradients).items():
        np.testing.assert_allclose(
            gradient, golden["grad." + name], atol=1e-4, rtol=0, err_msg=name
        )


def test_golden_covers():
    """The golden files cover what they claim: ratios 1, 2, 3, 4, scaling, ties and packing."""
    seen = [(config_of(c), g) for g, c in map(read_golden, GOLDEN)]
    assert {c.n_heads // c.n_kv_heads for c, _ in seen} == {1, 2, 3, 4}
    assert {(c.rope_scaling is None, c.tie_embeddings) for c, _ in seen} == {
        (True, False),
        (True, True),
        (False, False),
        (False, True),
    }
    assert any(g["segments"].max() > 0 for _, g in seen)
    assert any(c.n_heads * c.head_dim != c.dim for c, _ in seen)
    assert sum(p.stat().st_size for p in GOLDEN) < 300_000


def test_golden_sees_the_scaling():
    """Without its scaling, the scaled golden file is missed by far more than the tolerance."""
    golden, foreign = read_golden(next(p for p in GOLDEN if p.stem == "llama_gqa_scaled"))
    config = dataclasses.replace(config_of(foreign), rope_scaling=None)
    model = Llama(config, key=jax.random.key(0))
    weights = [jnp.asarray(golden[name]) for name in named(model)]
    model = eqx.tree_at(lambda m: list(named(m).values()), model, weights)
    assert np.abs(run(model, golden["tokens"]) - golden["logits"]).max() > 0.1


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_sees_the_pairs(path):
    """With queries and keys in the pairs of Meta's files, every golden file is missed by far."""
    golden, foreign = read_golden(path)
    config = config_of(foreign)
    halves = config.head_dim // 2

    def interleaved(name):
        weight = golden[name]
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return jnp.asarray(weight)
        heads = weight.reshape(-1, 2, halves, weight.shape[-1])
        return jnp.asarray(heads.swapaxes(1, 2).reshape(-1, weight.shape[-1]))

    model = Llama(config, key=jax.random.key(0))
    weights = [interleaved(name) for name in named(model)]
    model = eqx.tree_at(lambda m: list(named(m).values()), model, weights)
    logits = run(model, golden["tokens"], golden["segments"])
    assert np.abs(logits - golden["logits"]).max() > 0.1


# the parts ---------------------------------------------------------------------------------------


@quick
@given(st.sampled_from([(1, 1), (3, 8), (5, 33)]), st.integers(0, 99))
def test_rms_norm(shape, seed):
    """Equal to the definition in fp64, blind to scale, and of root mean square 1."""
    x, gain = normal(*shape, seed=seed), normal(shape[-1], seed=seed + 1)
    y = llama.rms_norm(x, gain, 1e-5)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(gain)
    np.testing.assert_allclose(y, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(
        llama.rms_norm(1000 * x, gain, 1e-12), llama.rms_norm(x, gain, 1e-12), rtol=1e-4, atol=1e-5
    )


def test_rms_norm_is_computed_in_fp32():
    x = jnp.full((1, 4), 300.0, jnp.float16)  # 300² overflows fp16
    y = llama.rms_norm(x, jnp.ones(4, jnp.float16), 1e-5)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y.astype(jnp.float32), 1.0, rtol=1e-3)


def test_rms_norm_of_mean_free_input_is_layer_norm():
    x = normal(5, 32)
    x = x - x.mean(-1, keepdims=True)
    layer_norm = x / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(llama.rms_norm(x, jnp.ones(32), 1e-5), layer_norm, rtol=1e-5)


def test_swiglu():
    """The three matrices in NumPy, and no biases: zero in, zero out."""
    layer = llama.SwiGLU(6, 10, key=jax.random.key(0), scale=1.0)
    x = np.asarray(normal(2, 3, 6))
    gate, up = x @ np.asarray(layer.w_gate).T, x @ np.asarray(layer.w_up).T
    expected = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(layer.w_down).T
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert not layer(jnp.zeros((1, 6))).any()


@pytest.mark.parametrize(
    "dim, multiplier, multiple, width",
    [(4096, 1.3, 1024, 14_336), (8192, 1.3, 4096, 28_672), (16384, 1.2, 4096, 53_248)]
    + [(2048, 1.5, 256, 8192), (3072, 1.0, 256, 8192), (4096, 1.0, 256, 11_008)],
)
def test_ffn_width(dim, multiplier, multiple, width):
    """Table 3 of the paper, the two sizes of 3.2, and Llama 1's 11,008."""
    assert llama.ffn_width(dim, multiplier, multiple) == width


@quick
@given(st.sampled_from([1, 4]), st.integers(-500, 500), st.integers(0, 99))
def test_rope_is_a_relative_rotation(half, shift, seed):
    """Norms are kept; a score depends on the distance only; position 0 changes nothing."""
    q, k = normal(9, 1, 2 * half, seed=seed), normal(9, 1, 2 * half, seed=seed + 1)
    frequencies = llama.rope_frequencies(2 * half, 100.0)

    def at(positions, x):
        rotation = llama.rope_rotation(positions, frequencies, x.dtype)
        return llama.apply_rope(x, *rotation)

    def scores(shift):
        positions = jnp.arange(9, dtype=jnp.int32) + shift
        return jnp.einsum("thd,shd->ts", at(positions, q), at(positions, k))

    np.testing.assert_allclose(scores(shift), scores(0), atol=1e-3)
    rotated = at(jnp.arange(9) + shift, q)
    np.testing.assert_allclose(
        jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5
    )
    np.testing.assert_array_equal(at(jnp.zeros(9, jnp.int32), q), q)


def test_rope_is_complex_multiplication():
    """The complex form of the RoPE paper: (x_i + j x_{i+half}) · exp(j · angle)."""
    x, positions = np.asarray(normal(7, 3, 10)), np.arange(7)
    frequencies = llama.rope_frequencies(10, 10_000.0)
    turned = (x[..., :5] + 1j * x[..., 5:]) * np.exp(1j * positions[:, None] * frequencies)[:, None]
    rotation = llama.rope_rotation(jnp.asarray(positions), frequencies, jnp.float32)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(llama.apply_rope(x, *rotation), expected, atol=1e-5)


def test_rope_scaling():
    """Meta's three cases, one frequency at a time."""
    scaling = RopeScaling()
    plain = llama.rope_frequencies(128, 500_000.0)
    scaled = llama.rope_frequencies(128, 500_000.0, scaling)
    cases = set()
    for before, after in zip(plain, scaled, strict=True):
        wavelength = 2 * np.pi / before
        if wavelength < 8192 / 4:
            expected, case = before, "kept"
        elif wavelength > 8192 / 1:
            expected, case = before / 8, "slowed"
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected, case = (1 - smooth) * before / 8 + smooth * before, "blended"
        cases.add(case)
        np.testing.assert_allclose(after, expected, rtol=1e-12)
    assert cases == {"kept", "slowed", "blended"}
    unit = llama.rope_frequencies(128, 500_000.0, RopeScaling(factor=1.0))
    np.testing.assert_allclose(unit, plain, rtol=1e-12)


def reference_attention(q, k, v, mask):
    """One head and one query at a time, fp64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[-2] // k.shape[-2]
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = k[:, h // group] @ q[t, h] / np.sqrt(q.shape[-1])
            scores = np.where(mask[t], scores, -np.inf)
            weights = np.exp(scores - scores.max())
            out[t, h] = weights / weights.sum() @ v[:, h // group]
    return out


@pytest.mark.parametrize(
    "length, heads", [(1, (4, 4)), (63, (4, 2)), (64, (6, 2)), (65, (3, 1)), (515, (4, 2))]
)
def test_attention(length, heads):
    """Blocks, groups, segments and odd lengths: equal to the loop over heads and queries."""
    n_heads, n_kv_heads = heads
    draw = np.random.default_rng(length)
    q = draw.standard_normal((length, n_heads, 4), np.float32)
    k, v = draw.standard_normal((2, length, n_kv_heads, 4), np.float32)
    segments = np.sort(draw.integers(0, 4, length)).astype(np.int32)
    causal = np.tri(length, dtype=bool)
    packed = causal & (segments[:, None] == segments[None, :])
    attention = jax.jit(llama.attention)
    np.testing.assert_allclose(attention(q, k, v), reference_attention(q, k, v, causal), atol=1e-5)
    np.testing.assert_allclose(
        attention(q, k, v, segments), reference_attention(q, k, v, packed), atol=1e-5
    )


def naive_attention(q, k, v, segments):
    """All T × T scores at once, the keys repeated for each query head."""
    group = q.shape[-2] // k.shape[-2]
    k, v = (jnp.repeat(x, group, axis=-2) for x in (k, v))
    scores = jnp.einsum("...thd,...shd->...hts", q, k) * q.dtype.type(q.shape[-1] ** -0.5)
    mask = jnp.tril(segments[..., :, None] == segments[..., None, :])
    weights = jax.nn.softmax(jnp.where(mask[..., None, :, :], scores, -jnp.inf))
    return jnp.einsum("...hts,...shd->...thd", weights, v)


@jax.jit
def gradients_of_both(q, k, v, out_bar, segments, given):
    """Output and gradients of `attention` and of the naive form, for one gradient by the output."""

    def all_of(function):
        out, backward = jax.vjp(function, q, k, v)
        return out, *backward(out_bar)

    known = segments if given is None else None
    ours = all_of(lambda *qkv: llama.attention(*qkv, known))
    return ours, all_of(lambda *qkv: naive_attention(*qkv, segments))


@quick
@given(
    length=st.sampled_from([1, 2, 64, 65, 127, 130, 256, 511, 513, 600]),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1), (6, 2)]),
    width=st.sampled_from([2, 6, 16]),
    batch=st.sampled_from([(), (2,), (2, 1)]),
    documents=st.sampled_from([None, 1, 4, 40]),
    seed=st.integers(0, 99),
)
def test_blockwise_equals_naive(length, heads, width, batch, documents, seed):
    """Output and gradients by q, k, v: within 1e-5 of their size in fp32, 1e-12 in x64.

    Segment numbers come in any order and may return: only equality counts.
    """
    draw = np.random.default_rng(seed)
    shapes = [(*batch, length, h, width) for h in (heads[0], heads[1], heads[1], heads[0])]
    arrays = [draw.standard_normal(shape) for shape in shapes]
    arrays[0] *= 4  # scores far from zero
    segments = draw.integers(0, documents or 1, (*batch, length)).astype(np.int32)
    given = None if documents else 0

    def compare(dtype, tolerance):
        cast = [jnp.asarray(x, dtype) for x in arrays]
        for a, b in zip(*gradients_of_both(*cast, segments, given), strict=True):
            assert a.dtype == dtype and a.shape == b.shape
            size = max(1.0, float(jnp.abs(b).max()))
            np.testing.assert_allclose(a, b, atol=tolerance * size, rtol=0)

    compare(jnp.float32, 1e-5)
    with jax.enable_x64(True):
        compare(jnp.float64, 1e-12)


def test_blockwise_in_bf16():
    """bf16 in, bf16 out, with sums in fp32: output and gradients near those of fp32."""
    shapes = [(130, 4, 8), (130, 2, 8), (130, 2, 8), (130, 4, 8)]
    rough = [normal(*s, seed=i).astype(jnp.bfloat16) for i, s in enumerate(shapes)]
    segments = np.zeros(130, np.int32)
    ours, _ = gradients_of_both(*rough, segments, None)
    _, fine = gradients_of_both(*(x.astype(jnp.float32) for x in rough), segments, None)
    for a, b in zip(ours, fine, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()), rtol=0
        )


def test_blockwise_survives_large_scores():
    """Scores in the thousands: finite output and gradients, equal to the naive form's."""
    q, k, v = (1000 * normal(130, 2, 4), normal(130, 1, 4, seed=1), normal(130, 1, 4, seed=2))
    ours, naive = gradients_of_both(q, k, v, normal(130, 2, 4, seed=3), np.zeros(130, np.int32), 0)
    for a, b in zip(ours, naive, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, float(jnp.abs(b).max())), rtol=0)


def test_attention_memory_is_linear():
    """Temporary bytes of forward and backward double with the length; the naive form's quadruple."""

    def temporary(function, length):
        q, k = (jax.ShapeDtypeStruct((length, h, 16), jnp.float32) for h in (4, 2))
        segments = jax.ShapeDtypeStruct((length,), jnp.int32)
        grad = jax.grad(lambda q, k, v, s: function(q, k, v, s).sum(), argnums=(0, 1, 2))
        compiled = jax.jit(grad).lower(q, k, k, segments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def growth(function, length):
        return temporary(function, 2 * length) / temporary(function, length)

    jax.config.update("jax_disable_most_optimizations", False)
    # what a pair of blocks needs is constant, and small only beside long rows
    assert 1.7 < growth(llama.attention, 2**15) < 2.1 and 3.5 < growth(naive_attention, 1024)


def test_gqa_is_mha_with_repeated_heads():
    """A model with 2 key/value heads equals the one with 4 in which each is there twice."""
    gqa = randomised(TINY)
    mha = Llama(dataclasses.replace(TINY, n_kv_heads=4), key=jax.random.key(1))
    for name in ("w_key", "w_value"):
        doubled = [
            getattr(b.attention, name).reshape(2, 6, 24).repeat(2, axis=0).reshape(24, 24)
            for b in gqa.blocks
        ]
        mha = eqx.tree_at(
            lambda m, n=name: [getattr(b.attention, n) for b in m.blocks], mha, doubled
        )
    rest = lambda m: [  # noqa: E731
        m.embedding,
        m.head,
        *(b.attention.w_query for b in m.blocks),
        *(b.attention.w_out for b in m.blocks),
        *(b.feed_forward for b in m.blocks),
    ]
    mha = eqx.tree_at(rest, mha, rest(gqa))
    tokens = draw(2, 20)
    np.testing.assert_allclose(run(gqa, tokens), run(mha, tokens), atol=1e-5)


# the model ---------------------------------------------------------------------------------------


def gradient_by_position(model, tokens, segments, at: int):
    """Size of d(all logits at position `at`) / d(embedded token t), for each t."""
    weight = normal(model.config.vocab_size, seed=9)

    def score(vectors):
        table = jnp.concatenate([model.embedding, vectors])
        wide = dataclasses.replace(model.config, vocab_size=len(table))
        grown = Llama(wide, key=jax.random.key(0))
        grown = eqx.tree_at(
            lambda m: (m.embedding, m.blocks, m.norm, m.head),
            grown,
            (table, model.blocks, model.norm, model.head),
        )
        own_rows = jnp.arange(len(tokens), dtype=jnp.int32) + len(model.embedding)
        return grown(own_rows, segments)[at] @ weight

    return jnp.abs(jax.jit(jax.grad(score))(model.embedding[tokens])).sum(-1)


def test_causality():
    """The gradient to later tokens is exactly zero, to all others it is not."""
    sizes = gradient_by_position(randomised(TINY), draw(100), None, at=66)
    assert (sizes[:67] > 0).all() and not sizes[67:].any()


def test_packed_gradient():
    """No gradient crosses a document's border: exactly zero."""
    segments = jnp.repeat(jnp.arange(3, dtype=jnp.int32), jnp.array([20, 50, 30]))
    sizes = gradient_by_position(randomised(TINY), draw(100), segments, at=60)
    assert not sizes[:20].any() and (sizes[20:61] > 0).all() and not sizes[61:].any()


def test_packed_equals_separate():
    """A packed row gives each document its own logits: 1e-5 in fp32, 1e-12 in x64.

    With positions that restart in each document and with positions that go on: RoPE is relative.
    """
    lengths = (9, 70, 9)
    segments = np.repeat(np.arange(3, dtype=np.int32), lengths)[None]
    restarted = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
    going_on = np.arange(sum(lengths), dtype=np.int32)[None]

    def difference(dtype):
        model = randomised(TINY, dtype=dtype, scale=4.0)
        tokens = draw(1, sum(lengths)).astype(jnp.int32)
        parts = jnp.split(tokens, np.cumsum(lengths)[:-1], axis=1)
        separate = jnp.concatenate([run(model, part) for part in parts], axis=1)
        packed = [run(model, tokens, segments, where) for where in (restarted, going_on)]
        assert packed[0].dtype == dtype
        return max(float(jnp.abs(row - separate).max()) for row in packed)

    assert difference(jnp.float32) < 1e-5
    with jax.enable_x64(True):
        assert difference(jnp.float64) < 1e-12


@pytest.mark.parametrize("batch, tied", [((), False), ((3,), True), ((2, 3), False)])
def test_cached_decoding(batch, tied):
    """Prefill and then one token at a time gives the logits of one full pass."""
    config = dataclasses.replace(TINY, tie_embeddings=tied)
    model, tokens = randomised(config), draw(*batch, 12)
    full = run(model, tokens)
    cache = llama.init_cache(config, batch, 16)
    parts = []
    for part in (tokens[..., :9], *jnp.split(tokens[..., 9:], 3, axis=-1)):
        logits, cache = run(model, part, cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=-2), full, atol=1e-5)
    assert (cache.length == 12).all() and cache.length.shape == batch


def test_cache_with_rows_of_different_lengths():
    """Prompts padded on the right, then decoded: as if each row were alone."""
    model = randomised(TINY)
    long, short, later = draw(7), draw(4, seed=2), draw(2, 3, seed=3)
    padded = jnp.stack([long, jnp.pad(short, (0, 3))])
    _, cache = run(model, padded, cache=llama.init_cache(TINY, 2, 12))
    cache = eqx.tree_at(lambda c: c.length, cache, jnp.array([7, 4], jnp.int32))
    for t in range(3):
        logits, cache = run(model, later[:, t : t + 1], cache=cache)
        for row, prompt in enumerate((long, short)):
            alone = run(model, jnp.concatenate([prompt, later[row, : t + 1]]))[-1]
            np.testing.assert_allclose(logits[row, 0], alone, atol=1e-5)


def test_cache_with_packed_documents():
    """Segments live in the cache too: a later token of document 1 never sees document 0."""
    model, tokens = randomised(TINY), draw(1, 10)
    segments = jnp.array([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]], jnp.int32)
    full = run(model, tokens, segments)
    first, cache = run(model, tokens[:, :6], segments[:, :6], cache=llama.init_cache(TINY, 1, 10))
    second, _ = run(model, tokens[:, 6:], segments[:, 6:], cache=cache)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), full, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 9), (2, 3, 9)])
def test_batch_axes(shape):
    """Zero or more batch axes; each row is what it is alone."""
    model, tokens = randomised(TINY), draw(*shape)
    logits = run(model, tokens)
    assert logits.shape == (*shape, 41)
    alone = jnp.stack([run(model, row) for row in tokens.reshape(-1, 9)]).reshape(logits.shape)
    np.testing.assert_allclose(logits, alone, atol=1e-5)


def test_jit_changes_nothing():
    model, tokens = randomised(TINY), draw(2, 5)
    np.testing.assert_allclose(run(model, tokens), model(tokens), atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_initial_loss(tied):
    config = dataclasses.replace(TINY, tie_embeddings=tied, vocab_size=256, dim=64)
    model, tokens = Llama(config, key=jax.random.key(0)), draw(4, 65, config=config)
    loss = llama.cross_entropy(run(model, tokens[:, :-1]), tokens[:, 1:])
    assert abs(float(loss) - np.log(256)) < 0.1


def test_overfits_one_batch():
    """Adam on one batch, its own update rule written here: the loss goes to almost nothing."""
    model, tokens = Llama(TINY, key=jax.random.key(0)), draw(4, 17)

    def loss(model):
        return llama.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])

    @eqx.filter_jit
    def step(model, first, second, t):
        value, grads = eqx.filter_value_and_grad(loss)(model)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, second, grads)
        model = jax.tree.map(
            lambda w, m, s: w - 0.01 * m / (1 - 0.9**t) / (jnp.sqrt(s / (1 - 0.99**t)) + 1e-8),
            model,
            first,
            second,
        )
        return model, first, second, value

    zeros = jax.tree.map(jnp.zeros_like, model)
    first, second = zeros, zeros
    for t in range(1, 121):
        model, first, second, value = step(model, first, second, jnp.float32(t))
    assert value < 0.02


def test_tied_is_one_array():
    """Tied: no head among the weights, and both uses send their gradient to the one table."""
    tied = Llama(dataclasses.replace(TINY, tie_embeddings=True), key=jax.random.key(0))
    assert tied.head is None and tied.output_weight is tied.embedding
    tokens = np.arange(8, dtype=np.int32)[None]
    gradient = jax.jit(jax.grad(lambda m: llama.cross_entropy(m(tokens), tokens)))(tied).embedding
    assert (jnp.abs(gradient[8:]).sum(-1) > 0).all()  # only the output side reaches these rows


def test_dtype_is_kept():
    model = Llama(TINY, key=jax.random.key(0), dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    logits, cache = run(model, draw(2, 5), cache=llama.init_cache(TINY, 2, 8, jnp.bfloat16))
    assert logits.dtype == jnp.bfloat16 and cache.k[0].dtype == jnp.bfloat16
    assert llama.cross_entropy(logits, draw(2, 5)).dtype == jnp.float32
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), model)  # the same weights
    wide = run(widened, draw(2, 5))
    np.testing.assert_allclose(logits.astype(jnp.float32), wide, atol=0.02)


def test_cross_entropy():
    """The mean over kept targets, by hand; nothing kept is 0; an impossible target is NaN."""
    logits = normal(2, 3, 5)
    targets = jnp.array([[0, 4, -1], [2, -1, 1]], jnp.int32)
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(-1, keepdims=True)
    kept = [p[0, 0, 0], p[0, 1, 4], p[1, 0, 2], p[1, 2, 1]]
    np.testing.assert_allclose(
        llama.cross_entropy(logits, targets), -np.log(kept).mean(), rtol=1e-5
    )
    mask = jnp.array([[1, 0, 1], [0, 0, 0]], bool)
    np.testing.assert_allclose(
        llama.cross_entropy(logits, targets, mask), -np.log(kept[0]), rtol=1e-5
    )
    none = jnp.full((2, 3), -1, jnp.int32)
    assert llama.cross_entropy(logits, none) == 0
    assert not jax.grad(llama.cross_entropy)(logits, none).any()
    assert jnp.isnan(llama.cross_entropy(logits, targets.at[0, 0].set(5)))


# sizes -------------------------------------------------------------------------------------------

PUBLISHED = {  # parameters in billions, as the sizes are counted in public model cards
    "llama3-8b": "8.030",
    "llama3-70b": "70.554",
    "llama3.1-8b": "8.030",
    "llama3.1-70b": "70.554",
    "llama3.1-405b": "405.853",
    "llama3.2-1b": "1.236",
    "llama3.2-3b": "3.213",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_count_params(name):
    """The formula equals the shapes of the model itself, which is never allocated."""
    config = CONFIGS[name]
    shapes = jax.eval_shape(lambda key: Llama(config, key=key), jax.random.key(0))
    assert llama.count_params(config) == sum(x.size for x in jax.tree.leaves(shapes))
    assert f"{llama.count_params(config) / 1e9:.3f}" == PUBLISHED[name]


def test_published_configs():
    """Facts of the paper's Table 3 and of the released configurations."""
    widths = {n: (c.hidden_dim, c.n_heads * c.head_dim == c.dim) for n, c in CONFIGS.items()}
    assert widths["llama3.1-405b"] == (53_248, True)
    for name, config in CONFIGS.items():
        assert (config.n_kv_heads, config.rope_theta, config.vocab_size) == (8, 5e5, 128_256)
        assert config.tie_embeddings == ("3.2" in name)
        old = "llama3-" in name
        assert (config.rope_scaling is None) == old
        assert config.max_seq_len == (8192 if old else 131_072)
        if not old:
            assert config.rope_scaling.factor == (32.0 if "3.2" in name else 8.0)
            assert config.rope_scaling.original_max_position == 8192


# bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"vocab_size": 0}, ["vocab_size", "0"]),
        ({"n_layers": -1}, ["n_layers", "-1"]),
        ({"dim": 24.0}, ["dim", "24.0"]),
        ({"n_heads": 4, "n_kv_heads": 3}, ["n_heads=4", "n_kv_heads=3"]),
        ({"head_dim": 7}, ["head_dim", "7"]),
        ({"rope_theta": 0.5}, ["rope_theta", "0.5"]),
        ({"norm_eps": 0.0}, ["norm_eps", "0.0"]),
        ({"max_seq_len": 0}, ["max_seq_len", "0"]),
    ],
)
def test_impossible_config(change, words):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(TINY, **change)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("bad", [{"factor": 0.5}, {"low_freq_factor": 4.0}, {"low_freq_factor": 0}])
def test_impossible_scaling(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RopeScaling(**bad)


def test_bad_inputs():
    model = Llama(TINY, key=jax.random.key(0))
    with pytest.raises(ValueError, match="token 41 is outside the vocabulary 0..40"):
        model(jnp.array([3, 41]))
    with pytest.raises(ValueError, match="token -1 is outside"):
        model(jnp.array([3, -1]))
    with pytest.raises(ValueError, match="tokens must be integers, got dtype float32"):
        model(jnp.array([3.0]))
    with pytest.raises(
        ValueError, match=r"segments must be shaped like tokens \(2, 5\), got \(5,\)"
    ):
        model(draw(2, 5), jnp.zeros(5, jnp.int32))
    with pytest.raises(ValueError, match="positions must be shaped like tokens"):
        model(draw(2, 5), None, jnp.arange(5))
    _, cache = run(model, draw(2, 5), cache=llama.init_cache(TINY, 2, 6))
    with pytest.raises(ValueError, match="the cache has 6 slots, 5 are used, can't add 2 more"):
        model(draw(2, 2), cache=cache)
    with pytest.raises(ValueError, match="batch axes"):
        model(draw(3, 1), cache=cache)
    with pytest.raises(ValueError, match=r"at least one position, got shape \(2, 0\)"):
        model(jnp.zeros((2, 0), jnp.int32))
    with pytest.raises(ValueError, match="must be the model's, float32, got bfloat16"):
        model(draw(2, 1), cache=llama.init_cache(TINY, 2, 6, jnp.bfloat16))


def test_a_full_cache_under_jit_is_nan():
    """The row that has no slot left is NaN, and so it stays; the other rows are not touched."""
    model = randomised(TINY)
    cache = llama.init_cache(TINY, 2, 4)
    cache = eqx.tree_at(lambda c: c.length, cache, jnp.array([1, 4], jnp.int32))
    for _ in range(2):
        logits, cache = run(model, draw(2, 1), cache=cache)
        assert jnp.isfinite(logits[0]).all() and jnp.isnan(logits[1]).all()


def test_a_bad_token_under_jit_is_nan_never_a_neighbour():
    """Its own row is NaN from there on; the other rows of the batch are not touched."""
    model = randomised(TINY)
    for bad in (41, -1, -41):
        logits = run(model, jnp.array([[3, 4, 5], [3, bad, 5]]))
        assert jnp.isfinite(logits[0]).all() and jnp.isnan(logits[1, 1:]).all()
