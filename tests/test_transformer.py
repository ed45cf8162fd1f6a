"""The 2017 Transformer: against PyTorch's layers, Equinox's norm, optax's losses, and its own slow forms."""

import functools
import json
import math
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from llm_from_scratch.attention import causal_mask, chrf, scaled_dot_product_attention
from llm_from_scratch.transformer import (
    DecoderLayer,
    EncoderLayer,
    LayerNorm,
    Residual,
    Transformer,
    TransformerConfig,
    average,
    dropout,
    noam_schedule,
    paired_bootstrap,
    search,
    sequence_loss,
    sinusoidal_positions,
    smoothed_cross_entropy,
)

HERE = Path(__file__).parent
GOLDEN = load_file(HERE / "golden" / "transformer.safetensors")
TINY = TransformerConfig(13, 16, 2, 4, 24, dropout=0.0)
KEY = jax.random.key(0)
SOURCE = jnp.array([5, 3, 8, 4, 2, 0, 0])
TOKENS = jnp.array([1, 5, 3, 8, 4])


def poured(layer, prefix, names):
    """A layer with PyTorch's weights: the three projections of attention are stacked there."""
    for ours, theirs in names.items():
        stacked = GOLDEN[f"{prefix}.{theirs}.in_proj_weight"]
        new = [*np.split(stacked, 3), GOLDEN[f"{prefix}.{theirs}.out_proj.weight"]]
        for field, array in zip(("wq", "wk", "wv", "wo"), new, strict=True):
            layer = put(layer, (ours, field), array)
    for i in (1, 2):
        layer = put(layer, ("feed_forward", f"w{i}"), GOLDEN[f"{prefix}.linear{i}.weight"])
        layer = put(layer, ("feed_forward", f"b{i}"), GOLDEN[f"{prefix}.linear{i}.bias"])
    for i in range(len(layer.residuals)):
        for field in ("weight", "bias"):
            array = jnp.asarray(GOLDEN[f"{prefix}.norm{i + 1}.{field}"])
            layer = eqx.tree_at(
                lambda m, i=i, field=field: getattr(m.residuals[i].norm, field), layer, array
            )
    return layer


def put(layer, path, array):
    return eqx.tree_at(lambda m: functools.reduce(getattr, path, m), layer, jnp.asarray(array))


def test_layers_are_torchs():
    """Post-norm, padding in the memory, the future masked."""
    small = TransformerConfig(2, 16, 1, 4, 24, dropout=0.0)
    encoder = poured(EncoderLayer(small, key=KEY), "encoder", {"attention": "self_attn"})
    names = {"self_attention": "self_attn", "cross_attention": "multihead_attn"}
    decoder = poured(DecoderLayer(small, key=KEY), "decoder", names)
    seen = jnp.broadcast_to((jnp.arange(7) < 5)[None], (7, 7))
    memory = encoder(jnp.asarray(GOLDEN["source"]), seen)
    np.testing.assert_allclose(memory, GOLDEN["memory"], atol=1e-4)
    out = decoder(jnp.asarray(GOLDEN["tokens"]), memory, causal_mask(5), seen[:5])
    np.testing.assert_allclose(out, GOLDEN["out"], atol=1e-4)


def test_layer_norm_is_equinoxs():
    x = 3 + 5 * jax.random.normal(KEY, (6, 16))
    np.testing.assert_allclose(LayerNorm(16)(x), jax.vmap(eqx.nn.LayerNorm(16))(x), atol=1e-5)


@pytest.mark.parametrize("k", [1, 7, 30])
def test_positions_turn(k):
    """As complex numbers, P[t + k] is P[t] times exp(i k ω), whatever t."""
    table = np.asarray(sinusoidal_positions(128, 16), np.float64)
    hands = table[:, 1::2] + 1j * table[:, ::2]
    turned = hands[:-k] * np.exp(1j * k / 10_000 ** (np.arange(8) / 8))
    np.testing.assert_allclose(turned, hands[k:], atol=1e-5)


def test_positions_against_the_formula():
    table = sinusoidal_positions(9, 6)
    for t in range(9):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            assert table[t, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)
    with pytest.raises(ValueError, match="dim=5 must be even"):
        sinusoidal_positions(3, 5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_residual_orders(pre_norm):
    config = TransformerConfig(2, 16, 1, 4, 24, dropout=0.0, pre_norm=pre_norm)
    around, x = Residual(config), jax.random.normal(KEY, (4, 16))
    norm = jax.vmap(eqx.nn.LayerNorm(16))
    wanted = x + jnp.sin(norm(x)) if pre_norm else norm(x + jnp.sin(x))
    np.testing.assert_allclose(around.leave(x, jnp.sin(around.enter(x))), wanted, atol=1e-5)
    assert len(Transformer(config, key=KEY).norms) == 2 * pre_norm


@pytest.mark.parametrize("pre_norm", [False, True])
def test_masks(pre_norm):
    """No logit depends on a later token or on padding; all depend on every source symbol."""
    config = TransformerConfig(13, 16, 2, 4, 24, dropout=0.0, pre_norm=pre_norm)
    model = Transformer(config, key=KEY)
    logits = model(SOURCE, TOKENS)
    changed = model(SOURCE, TOKENS.at[3].set(9))
    np.testing.assert_array_equal(logits[:3], changed[:3])
    assert jnp.abs(logits[3:] - changed[3:]).max(-1).min() > 1e-3
    np.testing.assert_allclose(model(SOURCE[:5], TOKENS), logits, atol=1e-5)
    assert jnp.abs(model(SOURCE.at[0].set(9), TOKENS) - logits).max(-1).min() > 1e-4


@pytest.mark.parametrize("pre_norm", [False, True])
def test_cached_steps_are_the_whole(pre_norm):
    """The score of a greedy search is the log-probability that one full pass gives its tokens."""
    config = TransformerConfig(13, 16, 2, 4, 24, dropout=0.0, pre_norm=pre_norm)
    model = Transformer(config, key=KEY)
    options = {"bos": 1, "eos": 2, "max_len": 6}
    found, score = search(model, SOURCE[None], beam=1, length_penalty=0.0, **options)
    row = found[0]
    n = int(jnp.argmax(row == 2)) + 1
    tokens = jnp.concatenate([jnp.array([1]), row[: n - 1]])
    log_p = jax.nn.log_softmax(model(SOURCE, tokens))
    assert score[0] == pytest.approx(float(log_p[jnp.arange(n), row[:n]].sum()), abs=1e-4)
    greedy = log_p[: n - 1].argmax(-1)
    np.testing.assert_array_equal(greedy, row[: n - 1])
    _, wider = search(model, SOURCE[None], beam=4, length_penalty=jnp.float32(0.0), **options)
    assert wider[0] >= score[0] - 1e-5


def test_smoothing():
    """optax's smoothed cross-entropy; the minimum is the entropy of the smoothed target."""
    logits, targets = jax.random.normal(KEY, (5, 13)), jnp.array([3, 0, -1, 12, 7])
    for e in (0.0, 0.1, 0.5):
        soft = optax.smooth_labels(jax.nn.one_hot(targets, 13), e)
        wanted = jnp.where(targets >= 0, optax.softmax_cross_entropy(logits, soft), 0.0)
        np.testing.assert_allclose(smoothed_cross_entropy(logits, targets, e), wanted, atol=1e-5)
    q = np.full(13, 0.1 / 13) + 0.9 * (np.arange(13) == 3)
    best = smoothed_cross_entropy(jnp.log(jnp.asarray(q, jnp.float32))[None], jnp.array([3]), 0.1)
    assert best[0] == pytest.approx(-(q * np.log(q)).sum(), abs=1e-5)
    grad = jax.grad(lambda z: smoothed_cross_entropy(z, targets, 0.1).sum())
    assert jnp.abs(grad(jnp.log(jnp.asarray(q, jnp.float32))[None].repeat(5, 0))[0]).max() < 1e-5


def batch_of(model, rows=3):
    return {
        "source": jnp.stack([SOURCE] * rows),
        "tokens": jnp.stack([TOKENS] * rows),
        "targets": jnp.stack([jnp.array([5, 3, 8, -1, -1])] * rows),
    }


def test_loss_and_gradient():
    """A mean over targets; its gradient by finite differences."""
    model = Transformer(TINY, key=KEY)
    loss, count = sequence_loss(model, batch_of(model), None)
    assert count == 9
    each = smoothed_cross_entropy(model(SOURCE, TOKENS), jnp.array([5, 3, 8, -1, -1]))
    assert loss == pytest.approx(float(each.sum()) / 3, rel=1e-4)
    grad = eqx.filter_grad(lambda m: sequence_loss(m, batch_of(m), None)[0])(model)
    for where in (
        lambda m: m.embedding,
        lambda m: m.encoder[0].attention.wq,
        lambda m: m.decoder[1].cross_attention.wv,
    ):
        g = where(grad)
        at = np.unravel_index(int(jnp.abs(g).argmax()), g.shape)
        up, down = (
            sequence_loss(
                eqx.tree_at(where, model, where(model).at[at].add(e)), batch_of(model), None
            )[0]
            for e in (1e-2, -1e-2)
        )
        assert float(up - down) / 2e-2 == pytest.approx(float(g[at]), rel=0.05)


def test_dropout():
    x = jnp.ones((200, 50))
    assert dropout(x, 0.1, None) is x and dropout(x, 0.0, KEY) is x
    found = dropout(x, 0.25, KEY)
    np.testing.assert_allclose(np.unique(np.asarray(found)), [0, 1 / 0.75], atol=1e-6)
    assert float((found == 0).mean()) == pytest.approx(0.25, abs=0.02)
    wet = Transformer(TransformerConfig(13, 16, 2, 4, 24, dropout=0.3), key=KEY)
    a, b = (sequence_loss(wet, batch_of(wet), jax.random.key(i))[0] for i in (1, 2))
    assert a != b and sequence_loss(wet, batch_of(wet), None)[0] not in (a, b)


def test_noam():
    rate = noam_schedule(512, 4000)
    for step in (1, 17, 4000, 4001, 100_000):
        wanted = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert float(rate(jnp.int32(step - 1))) == pytest.approx(wanted, rel=1e-5)


def test_average():
    models = [Transformer(TINY, key=jax.random.key(i)) for i in range(3)]
    found = average(models)
    wanted = np.mean([np.asarray(m.decoder[1].feed_forward.w1) for m in models], axis=0)
    np.testing.assert_allclose(found.decoder[1].feed_forward.w1, wanted, atol=1e-6)
    assert found.config == TINY


def test_paired_bootstrap():
    references = ["to be or not to be", "that is the question", "whether tis nobler", "in the mind"]
    worse = [line.replace("e", "x") for line in references]
    found = paired_bootstrap(chrf, references, worse, references, samples=50)
    assert len(found) == 50 and (np.diff(found) >= 0).all() and found[0] > 0
    np.testing.assert_array_equal(paired_bootstrap(chrf, worse, worse, references, samples=5), 0)
    with pytest.raises(ValueError, match="4, 4 and 3 lines"):
        paired_bootstrap(chrf, references, worse, references[:3])


def test_counts():
    """XLA's own count of the attention's floating-point operations: two a multiplication, and the softmax."""
    for n, d in ((64, 64), (128, 64)):
        x = jnp.zeros((n, d))
        cost = jax.jit(scaled_dot_product_attention).lower(x, x, x).cost_analysis()
        assert 4 * n * n * d <= cost["flops"] <= 4 * n * n * d + 20 * n * n


def test_rotary_of_the_runs_turns():
    """Pairs as complex numbers, multiplied by exp(i t ω)."""
    import transformer_runs

    x = jax.random.normal(KEY, (1, 5, 8))
    found = transformer_runs.rotate(x)
    angle = jnp.arange(5.0)[:, None] / 10_000 ** (jnp.arange(4.0)[None] / 4)
    turned = (
        jax.lax.complex(x[..., :4], x[..., 4:])
        * jax.lax.complex(jnp.cos(angle), jnp.sin(angle))[None]
    )
    np.testing.assert_allclose(found, jnp.concatenate([turned.real, turned.imag], -1), atol=1e-5)


def test_stored_runs_are_whole():
    import transformer_runs

    rows = json.loads(transformer_runs.RESULTS.read_text())["rows"]
    wanted = {(arm, seed) for arm in transformer_runs.MAKERS for seed in transformer_runs.SEEDS}
    assert {(row["arm"], row["seed"]) for row in rows} == wanted
    assert transformer_runs.WEIGHTS.stat().st_size < 600_000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dim": 30}, "dim=30 must be even and a multiple of n_heads=8"),
        ({"n_layers": 0}, "n_layers=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"pad_id": 99}, "pad_id=99 is not below vocab_size=50"),
    ],
)
def test_config_rejects(wrong, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(50, **wrong)
