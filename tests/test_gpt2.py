"""GPT-2: against transformers' logits, counts and files, against itself in NumPy, and against bad input."""

import dataclasses
import functools
import inspect
import json
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as Theirs
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_from_scratch import datasets
from llm_from_scratch.gpt2 import (
    GPT2,
    GPT2_CONFIGS,
    GPT2_PATTERN,
    Classifier,
    GPT2Config,
    attention,
    block,
    byte_letters,
    cached_greedy,
    class_nats,
    count_gpt2,
    feed_forward,
    from_published,
    gelu,
    greedy,
    layer_norm,
    linear,
    load_gpt2,
    load_gpt2_tokenizer,
    mean_nats,
    multi_head,
    numpy_gpt2,
    parse_config,
    published,
    save_gpt2,
    softmax,
    step,
    token_nats,
)
from llm_from_scratch.tokenizer import encode_plain, split

HERE = Path(__file__).parent
TINY = HERE / "golden" / "gpt2_tiny"
GOLDEN = load_file(TINY / "golden.safetensors")
SMALL = GPT2Config(vocab_size=31, max_seq_len=12, dim=16, n_layers=2, n_heads=4)
KEY = jax.random.key(0)


@functools.cache
def shaken(seed=0):
    """A small model in which no norm is the identity and no bias is zero."""
    model = GPT2(SMALL, key=jax.random.key(seed))
    leaves, structure = jax.tree.flatten(model)
    draw = np.random.default_rng(seed)
    return structure.unflatten(
        [x + jnp.asarray(0.3 * draw.normal(size=x.shape), x.dtype) for x in leaves]
    )


run = eqx.filter_jit(lambda model, tokens: model(tokens))


def test_logits_are_transformers():
    model, tokens = load_gpt2(TINY), jnp.asarray(GOLDEN["tokens"])
    np.testing.assert_allclose(run(model, tokens), GOLDEN["logits"], atol=2e-5)
    hidden = eqx.filter_jit(GPT2.hidden)(model, tokens)
    np.testing.assert_allclose(hidden, GOLDEN["hidden"], atol=1e-5)
    np.testing.assert_allclose(
        numpy_gpt2(GOLDEN["tokens"], published(model), 3), GOLDEN["logits"], atol=5e-6
    )
    nats = -jax.nn.log_softmax(GOLDEN["logits"])[np.arange(16), GOLDEN["tokens"][1:]]
    np.testing.assert_allclose(eqx.filter_jit(token_nats)(model, tokens), nats, atol=2e-5)


def test_greedy_is_transformers():
    prompt, arrays = GOLDEN["greedy"][:5].tolist(), published(load_gpt2(TINY))
    assert greedy(prompt, arrays, 3, 12) == GOLDEN["greedy"][5:].tolist()
    assert greedy(prompt, arrays, 3, 0) == cached_greedy(prompt, arrays, 3, 0) == []


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.sampled_from((1, 5, 12)), st.integers(0, 2))
def test_numpy_is_equinox(length, seed):
    model = shaken(seed)
    tokens = np.random.default_rng(length).integers(0, 31, length)
    np.testing.assert_allclose(
        numpy_gpt2(tokens, published(model), 4), run(model, jnp.asarray(tokens)), atol=1e-4
    )
    parts = (gelu, softmax, layer_norm, linear, attention, multi_head, feed_forward, block)
    assert sum(len(inspect.getsource(f).splitlines()) for f in (*parts, numpy_gpt2)) <= 60


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12))
def test_cached_steps_are_the_whole(tokens):
    arrays = published(shaken())
    whole = numpy_gpt2(tokens, arrays, 4)
    cache = [[np.zeros((0, 16), np.float32)] * 2 for _ in range(2)]
    for token, wanted in zip(tokens, whole, strict=True):
        np.testing.assert_allclose(step(token, arrays, 4, cache), wanted, atol=1e-4)
    assert [part.shape for kept in cache for part in kept] == [(len(tokens), 16)] * 4
    count = 13 - len(tokens)
    assert cached_greedy(tokens, arrays, 4, count) == greedy(tokens, arrays, 4, count)


def test_small_functions():
    x = np.linspace(-4, 4, 41, dtype=np.float32)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=True), atol=1e-6)
    assert np.abs(gelu(x) - np.asarray(jax.nn.gelu(x, approximate=False))).max() < 1e-3
    rows = np.array([[1000.0, 1001.0], [-5.0, 5.0]])
    np.testing.assert_allclose(softmax(rows), jax.nn.softmax(rows), rtol=1e-6)
    draw = np.random.default_rng(0)
    q, k, v = (draw.normal(size=(5, 4)).astype(np.float32) for _ in range(3))
    mask = jnp.tril(jnp.ones((5, 5), bool))
    wanted = jax.nn.dot_product_attention(
        *(jnp.asarray(x)[None, :, None] for x in (q, k, v)), mask=mask[None, None]
    )[0, :, 0]
    np.testing.assert_allclose(attention(q, k, v), wanted, atol=1e-5)
    np.testing.assert_allclose(attention(q[-2:], k, v), wanted[-2:], atol=1e-5)


def test_causality():
    model, tokens = shaken(), jnp.arange(10)
    logits, changed = run(model, tokens), run(model, tokens.at[6].set(30))
    np.testing.assert_array_equal(logits[:6], changed[:6])
    assert jnp.abs(logits[6:] - changed[6:]).max(-1).min() > 1e-3


def test_one_array_is_embedding_and_head():
    """The gradient of the one table is the sum of those of an embedding and a head of their own."""
    model, tokens = shaken(), jnp.arange(10)

    def loss(table, head):
        m = eqx.tree_at(lambda m: m.embedding, model, table)
        z = jax.nn.log_softmax(m.hidden(tokens[:-1]) @ head.T)
        return -z[jnp.arange(9), tokens[1:]].mean()

    parts = jax.jit(jax.grad(loss, argnums=(0, 1)))(model.embedding, model.embedding)
    gradient = eqx.filter_jit(eqx.filter_grad(mean_nats))
    whole = gradient(model, {"tokens": tokens[None]}).embedding
    np.testing.assert_allclose(whole, parts[0] + parts[1], atol=1e-5)
    assert sum(x.size for x in jax.tree.leaves(model)) == count_gpt2(SMALL)


def test_counts_are_transformers():
    wanted = json.loads((HERE / "golden" / "gpt2.json").read_text())["parameters"]
    assert {name: count_gpt2(config) for name, config in GPT2_CONFIGS.items()} == wanted
    for config in GPT2_CONFIGS.values():
        shapes = eqx.filter_eval_shape(GPT2, config, key=KEY)
        assert sum(x.size for x in jax.tree.leaves(shapes)) == count_gpt2(config)


def test_variance_recursion():
    """Weights of the two matrices that write into the stream: 0.02/√(2L), all others 0.02."""
    config = dataclasses.replace(SMALL, dim=64, n_layers=2)
    model = GPT2(config, key=KEY)
    for layer in model.blocks:
        for array in (layer.attention.w_out, layer.feed_forward.w2):
            assert float(array.std()) == pytest.approx(0.02 / 2, rel=0.06)
        for array in (layer.attention.w_qkv, layer.feed_forward.w1):
            assert float(array.std()) == pytest.approx(0.02, rel=0.06)
    *_, before, last = eqx.filter_jit(lambda m, t: tuple(m.stream(t)))(model, jnp.arange(12))
    assert float(before.var()) < float(last.var()) < 1.5 * float(before.var())


def test_saved_is_loaded(tmp_path):
    save_gpt2(tmp_path / "new" / "folder", load_gpt2(TINY), eos=100)
    again, first = (load_file(f / "model.safetensors") for f in (tmp_path / "new" / "folder", TINY))
    assert again.keys() == first.keys()
    assert all(np.array_equal(again[name], first[name]) for name in first)
    ours, theirs = (
        json.loads((f / "config.json").read_text()) for f in (tmp_path / "new" / "folder", TINY)
    )
    same = ours.keys() & theirs.keys() - {"bos_token_id", "eos_token_id"}
    assert len(same) > 10 and all(ours[name] == theirs[name] for name in same)
    assert ours["bos_token_id"] == ours["eos_token_id"] == 100


def test_numpy_numbers_are_saved(tmp_path):
    config = GPT2Config(np.int64(31), np.int32(8), np.int64(8), 1, 1, np.float32(1e-5))
    save_gpt2(tmp_path, GPT2(config, key=KEY))
    assert load_gpt2(tmp_path).config == config


def test_old_files():
    """Names without prefix, masks among the weights, a second copy of the head, half precision."""
    arrays = published(shaken())
    old = dict(arrays) | {
        "h.0.attn.bias": np.ones((1, 1, 12, 12), np.float32),
        "h.1.attn.masked_bias": np.float32(-1e4),
        "lm_head.weight": arrays["wte.weight"],
    }
    assert eqx.tree_equal(from_published(SMALL, old), shaken())
    half = {name: array.astype(np.float16) for name, array in arrays.items()}
    found = from_published(SMALL, half)
    assert found.embedding.dtype == jnp.float32
    np.testing.assert_allclose(found.embedding, shaken().embedding, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h.1.ln_2.bias": None}, r"h\.1\.ln_2\.bias is missing"),
        ({"h.2.ln_1.bias": np.ones(16)}, r"h\.2\.ln_1\.bias is not expected"),
        ({"wpe.weight": np.ones((9, 16))}, r"wpe\.weight is \(9, 16\) where \(12, 16\) is needed"),
        ({"lm_head.weight": np.ones((31, 16))}, "lm_head.weight is not wte.weight"),
    ],
)
def test_wrong_arrays(change, message):
    arrays = {k: v for k, v in (published(shaken()) | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        from_published(SMALL, arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, "activation_function='relu'; this GPT2 has 'gelu_new'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"model_type": "gpt_neo"}, "model_type='gpt_neo'"),
        ({"n_inner": 50}, "n_inner=50; this GPT2 has 96"),
        ({"n_head": 5}, "n_heads=5 does not divide dim=24"),
        ({"n_embd": None}, "dim=None must be a whole number"),
        ({"layer_norm_epsilon": "a"}, "norm_eps=a must be between 0 and 1"),
    ],
)
def test_wrong_config(change, message):
    config = json.loads((TINY / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        parse_config(json.dumps(config | change))
    with pytest.raises(ValueError, match="lacks n_layer"):
        parse_config(json.dumps({k: v for k, v in config.items() if k != "n_layer"}))


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_gpt2(tmp_path)
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_gpt2(tmp_path)
    save_file({"wte.weight": np.ones((101, 24), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: wpe.weight is missing"):
        load_gpt2(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dim": 30}, "n_heads=4 does not divide dim=30"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"vocab_size": 2.5}, "vocab_size=2.5"),
        ({"n_heads": True}, "n_heads=True"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
    ],
)
def test_config_rejects(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **wrong)


@pytest.mark.parametrize("count", [0, 13])
def test_wrong_number_of_tokens(count):
    tokens, arrays = [0] * count, published(shaken())
    with pytest.raises(ValueError, match=f"{count} tokens; need 1 to max_seq_len=12"):
        shaken()(jnp.asarray(tokens, jnp.int32))
    with pytest.raises(ValueError, match=f"{count} tokens; need 1 to 12"):
        numpy_gpt2(tokens, arrays, 4)
    if not count:
        for write in (greedy, cached_greedy):
            with pytest.raises(ValueError, match="0 tokens"):
                write([], arrays, 4, 1)


TEXTS = ["To be, or not to be: that is the question:\n", "since 1599, naïve  café\n\n  x = [1]\t"]


def test_tokenizer_files(tmp_path):
    """The ids of the `tokenizers` library, from the files that it writes."""
    theirs = Theirs(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    corpus = datasets.plays("train")[0].text[:60_000]
    theirs.train_from_iterator([corpus, *TEXTS], trainer)
    theirs.model.save(str(tmp_path))
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert len(vocabulary) == 420
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {"<|endoftext|>": 420}))
    ours = load_gpt2_tokenizer(tmp_path)
    assert ours.vocab_size == 421 and ours.bos_id == ours.eos_id == 420
    for text in [*TEXTS, corpus[5000:9000], "日本 🙂 \x00"]:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == encode_plain(text, ours.ranks, GPT2_PATTERN) == ids
        assert ours.decode(ids) == text
    assert ours.encode("to", bos=True)[0] == 420
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join([merges[0], *merges[:0:-1]]))
    with pytest.raises(ValueError, match="not in the order"):
        load_gpt2_tokenizer(tmp_path)


def test_byte_letters():
    assert sorted(byte_letters().values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert [byte_letters()[b] for b in b" \nA\x00"] == ["Ġ", "Ċ", "A", "Ā"]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_pattern_loses_nothing(text):
    assert "".join(split(text, GPT2_PATTERN)) == text


def test_a_space_joins_the_word():
    """A space goes with the word, number or sign after it; without ` ?` it is a piece of its own."""
    text = "to be 12 (or"
    assert split(text, GPT2_PATTERN) == ["to", " be", " 12", " (", "or"]
    apart = GPT2_PATTERN.replace(" ?", "")
    assert split(text, apart) == ["to", " ", "be", " ", "12", " ", "(", "or"]


def test_classifier_reads_the_last_token():
    """Padding changes nothing, the last token does; the loss is cross-entropy."""
    model = Classifier(shaken(), 3, key=KEY)
    tokens = jnp.array([5, 3, 8, 4, 0, 0, 0, 0])
    say = eqx.filter_jit(lambda model, tokens, length: model(tokens, length))
    said = say(model, tokens, jnp.int32(4))
    np.testing.assert_allclose(say(model, tokens.at[4:].set(9), jnp.int32(4)), said, atol=1e-6)
    assert jnp.abs(say(model, tokens.at[3].set(7), jnp.int32(4)) - said).max() > 1e-4
    batch = {
        "tokens": jnp.stack([tokens, tokens]),
        "lengths": jnp.array([4, 2]),
        "labels": jnp.array([2, 0]),
    }
    z = jnp.stack([said, say(model, tokens, jnp.int32(2))])
    wanted = -(jax.nn.log_softmax(z)[0, 2] + jax.nn.log_softmax(z)[1, 0]) / 2
    assert float(eqx.filter_jit(class_nats)(model, batch)) == pytest.approx(float(wanted), abs=1e-5)


def test_cloze_items():
    """Ten different options, the true word where it should be, lines of the validation plays; no leak."""
    import gpt2_runs as runs

    text = "\n".join(play.text for play in datasets.plays("validation"))
    items = runs.cloze_items()
    assert len(items) == runs.ITEMS
    for before, options, after, right in items:
        assert len(set(options)) == runs.OPTIONS and f"{before} {options[right]}{after}" in text
    counts = np.bincount([right for *_, right in items], minlength=10)
    assert counts.min() > 20  # the answer is everywhere about equally often


def test_first_rung_is_gpt2():
    """The ladder starts at the chapter's GPT-2: with its weights, the same logits."""
    import gpt2_runs as runs

    config = dataclasses.replace(runs.CONFIG, n_layers=runs.LADDER_LAYERS)
    gpt2 = GPT2(config, key=KEY)
    rung = runs.Rung(runs.LADDER["GPT-2"], key=KEY)
    layers = []
    for layer in gpt2.blocks:
        a, f = layer.attention, layer.feed_forward
        wq, wk, wv = jnp.split(a.w_qkv, 3)
        layers.append(
            {"wq": wq, "wk": wk, "wv": wv, "wo": a.w_out, "w1": f.w1, "w2": f.w2}
            | {"b" + n: jnp.zeros(len(w)) for n, w in zip("qkv", (wq, wk, wv), strict=True)}
            | {"bo": a.b_out, "b1": f.b1, "b2": f.b2}
            | {"norm_1": layer.norm_1, "norm_2": layer.norm_2}
        )
    rung = eqx.tree_at(
        lambda m: (m.embedding, m.positions, m.layers),
        rung,
        (gpt2.embedding, gpt2.positions, layers),
    )
    tokens = jnp.arange(9)
    np.testing.assert_allclose(run(rung, tokens), run(gpt2, tokens), atol=1e-5)
    assert sum(x.size for x in jax.tree.leaves(rung)) == count_gpt2(config)


def test_form_of_a_speech():
    import gpt2_runs as runs

    def speech(*lines):
        return datasets.Speech("", "", "X", lines)

    assert runs.form(speech("To be,", "The rest", "'Tis nobler")) == 1
    assert runs.form(speech("Truly, sir, I", "meddle with", "no man")) == 0
    assert runs.form(speech("Short,", "It is")) == runs.form(speech("A", "b", "C", "D")) == 2


def test_counter_sees_what_the_network_sees():
    import gpt2_runs as runs

    texts, labels = runs.speeches(("validation", "test"))
    rows = runs.padded(texts, labels)
    for text, row, n in list(zip(texts, rows["tokens"], rows["lengths"], strict=True))[:40]:
        assert runs.seen(text) == runs.tokenizer().decode_bytes(row[1:n])
        assert text.encode().startswith(runs.seen(text))


def test_wide_start():
    """Only the matrices that read into the feed-forward layer are larger at the start."""
    import gpt2_runs as runs

    plain, wide = (runs.Rung(runs.LADDER["SwiGLU" + end], key=KEY) for end in ("", ", wide start"))
    for a, b in zip(plain.layers, wide.layers, strict=True):
        for name in a:
            ratio = runs.CONFIG.dim**-0.5 / 0.02 if name in ("w1", "w3") else 1.0
            jax.tree.map(
                lambda x, y, r=ratio: np.testing.assert_allclose(r * x, y, 1e-5), a[name], b[name]
            )


def test_stored_runs_are_whole():
    import gpt2_runs as runs

    stored = runs.stored()
    assert set(stored) == {"command", *runs.PARTS}
    wanted = {(a, n, s) for a in runs.CLASS_ARMS for n in runs.CLASS_STEPS for s in runs.SEEDS}
    assert {(r["arm"], r["labels"], r["seed"]) for r in stored["classify"]} == wanted
    ladder = {(r["arm"], r["seed"]) for r in stored["ladder"]}
    assert ladder == {(arm, s) for arm in runs.LADDER for s in runs.SEEDS}
    assert runs.WEIGHTS.stat().st_size < 1_500_000
    _, labels = runs.speeches(("validation", "test"))
    for row in stored["classify"]:
        said = np.array([int(c) for c in row["said"]])
        assert row["accuracy"] == pytest.approx((said == labels).mean())
