"""Chapter 16: attention maps against transformers, induction scores, ablation, few-shot prompts, bad input."""

import hashlib
import json
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from llm_from_scratch import formats
from llm_from_scratch import in_context_learning as icl
from llm_from_scratch.in_context_learning import RepeatedBatches, Template, few_shot
from llm_from_scratch.llama import Llama, LlamaConfig
from llm_from_scratch.pretraining import make_optimizer
from llm_from_scratch.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
TINY = LlamaConfig(273, 24, 2, 4, 2, 40, 6, rope_theta=1000.0, max_seq_len=128)
BYTES = Tokenizer({bytes([i]): i for i in range(256)})
quick = settings(max_examples=10, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def tiny():
    """A model whose scores are far from zero, so that a wrong mask or position shows."""
    model = Llama(TINY, key=jax.random.key(0))
    return jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, model)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = shutil.copytree(GOLDEN / "hf_tiny", tmp_path_factory.mktemp("hf") / "tiny")
    fields = formats.hf_tokenizer_fields(BYTES)  # the golden folder holds no tokenizer
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    model, _ = formats.load(folder)
    return model, load_file(GOLDEN / "in_context_learning.safetensors")


# maps, scores, ablation --------------------------------------------------------------------------


def test_attention_maps_are_those_of_transformers(golden):
    model, kept = golden
    logits, maps = icl.logits_and_maps(model, jnp.asarray(kept["tokens"]))
    assert maps.shape == kept["maps"].shape
    np.testing.assert_allclose(maps, kept["maps"], atol=1e-5)
    np.testing.assert_allclose(logits, kept["logits"], atol=1e-4)


def test_ablation_is_that_of_transformers(golden):
    model, kept = golden
    changed = icl.ablate(model, [tuple(kept["head"].tolist())])
    logits, maps = icl.logits_and_maps(changed, jnp.asarray(kept["tokens"]))
    np.testing.assert_allclose(logits, kept["without"], atol=1e-4)
    assert np.abs(kept["without"] - kept["logits"]).max() > 1e-3
    layer = kept["head"][0]
    np.testing.assert_allclose(maps[: layer + 1], kept["maps"][: layer + 1], atol=1e-5)


def test_maps_are_causal_and_sum_to_one(tiny):
    tokens = jnp.array(np.random.default_rng(0).integers(0, 256, (3, 20)), jnp.int32)
    maps = eqx.filter_jit(icl.attention_maps)(tiny, tokens)
    assert maps.shape == (2, 3, 4, 20, 20)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    assert np.triu(np.asarray(maps), 1).max() == 0
    one = eqx.filter_jit(icl.attention_maps)(tiny, tokens[0])
    np.testing.assert_allclose(one, maps[:, 0], atol=1e-5)


def test_maps_refuse_foreign_tokens(tiny):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        icl.attention_maps(tiny, jnp.array([[1, 999]], jnp.int32))


def naive_score(weights, row):
    """One head, one row, by loops."""
    found = []
    for t in range(len(row)):
        earlier = [s for s in range(t) if row[s] == row[t]]
        if earlier:
            found.append(sum(weights[t, s + 1] for s in earlier))
    return found


@quick
@given(seed=st.integers(0, 1000), length=st.integers(4, 12), ids=st.integers(1, 5))
def test_induction_scores_are_the_naive_ones(seed, length, ids):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, ids, (2, length))
    tokens[0, 0] = tokens[0, -1]
    maps = random.random((1, 2, 2, length, length)) * np.tri(length)
    maps /= maps.sum(-1, keepdims=True)
    for head, score in enumerate(icl.induction_scores(maps, tokens)[0]):
        terms = [x for b in range(2) for x in naive_score(maps[0, b, head], tokens[b])]
        assert abs(score - np.mean(terms)) < 1e-5


def test_induction_scores_need_a_repeat():
    with pytest.raises(ValueError, match="no token occurs twice"):
        icl.induction_scores(np.ones((1, 1, 1, 3, 3)), np.array([[1, 2, 3]]))


def test_ablate_everything_leaves_the_embedding_and_feed_forward(tiny):
    tokens = jnp.array([[5, 6, 7, 8]], jnp.int32)
    silent = icl.ablate(tiny, [(i, h) for i in range(2) for h in range(4)])
    shuffled = eqx.filter_jit(lambda m, t: m(t))(silent, tokens[:, ::-1])
    straight = eqx.filter_jit(lambda m, t: m(t))(silent, tokens)
    np.testing.assert_allclose(shuffled[:, ::-1], straight, atol=1e-5)  # no position sees another
    assert icl.ablate(tiny, []) is tiny


@pytest.mark.parametrize("head", [(2, 0), (0, 4), (-1, 0), (0, -1)])
def test_ablate_names_the_missing_head(tiny, head):
    with pytest.raises(ValueError, match="no head"):
        icl.ablate(tiny, [head])


# data --------------------------------------------------------------------------------------------


@quick
@given(cursor=st.integers(0, 100), pool=st.sampled_from([0, 3]))
def test_targets_are_what_followed_before(cursor, pool):
    batch = RepeatedBatches(batch=4, pool=pool, seed=1)(cursor)
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        for t, target in enumerate(targets):
            earlier = [s for s in range(t) if tokens[s] == tokens[t]]
            assert (target < 0) == (not earlier)
            assert all(tokens[s + 1] == target for s in earlier)
    again = RepeatedBatches(batch=4, pool=pool, seed=1)(cursor)
    assert (again["tokens"] == batch["tokens"]).all()


def test_a_pool_is_small():
    rows = np.concatenate([RepeatedBatches(pool=3)(i)["tokens"] for i in range(3)])
    assert len(np.unique(rows, axis=0)) == 3


@pytest.mark.parametrize("wrong", [{"shortest": 0}, {"longest": 33}, {"shortest": 9, "longest": 8}])
def test_repeated_batches_refuse(wrong):
    with pytest.raises(ValueError, match="shortest <= longest"):
        RepeatedBatches(**wrong)


def test_lookup_oracle_is_what_looking_up_reaches():
    tokens, values = icl.lookup_rows(4000, seed=3)
    right = np.zeros((4000, 24))
    for i, row in enumerate(tokens):
        table = {}
        for k, (x, y) in enumerate(row.reshape(-1, 2)):
            right[i, k] = table.get(x, values[i, 0]) == y
            table[x] = y
    assert np.abs(right.mean(0) - icl.lookup_oracle(np.arange(24))).max() < 0.03
    with pytest.raises(ValueError, match="exceed vocab_size"):
        icl.lookup_rows(1, n_keys=20, n_values=20)


def test_tasks_are_balanced_and_disjoint():
    for (examples, questions), each in ((icl.kind_task(), 25), (icl.mood_task(), 100)):
        assert len(examples) == 40 and len(questions) == 200
        labels = [label for _, label in questions]
        assert {labels.count(label) for label in labels} == {each}
        assert not {x for x, _ in examples} & {x for x, _ in questions}
    words = [w for text in icl.KINDS.values() for w in text.split()]
    assert len(words) == len(set(words)) == 240
    shown = {x.split()[-1] for x, _ in icl.mood_task()[0]}
    assert not shown & {x.split()[-1] for x, _ in icl.mood_task()[1]}
    with pytest.raises(ValueError, match="n_examples"):
        icl.kind_task(30)


# prompts -----------------------------------------------------------------------------------------


def test_few_shot_prompt():
    template = Template("Q {}\nA", " {}\n", "Sort.\n")
    assert few_shot(template, [], "x") == "Sort.\nQ x\nA"
    assert few_shot(template, [("a", "b")], "x") == "Sort.\nQ a\nA b\nQ x\nA"
    for wrong in (("Q", "{}"), ("{}", "{} {}"), ("{x} {}", " {}"), ("{}", "{} }")):
        with pytest.raises(ValueError, match="must hold one"):
            Template(*wrong)


def test_draw_is_nested_and_reproducible():
    pool = list("abcdefgh")
    assert icl.draw(pool, 4, 3) == icl.draw(pool, 8, 3)[:4]
    assert sorted(icl.draw(pool, 8, 3)) == pool and icl.draw(pool, 0, 3) == []
    assert icl.draw(pool, 8, 3) != icl.draw(pool, 8, 4)
    with pytest.raises(ValueError, match="size of the pool"):
        icl.draw(pool, 9, 0)


def test_label_log_probs_are_the_models(tiny):
    prompts = ["a →", "abc →", "To be, or not to be →"]
    found = icl.label_log_probs(tiny, BYTES, prompts, [" x", "yz", "z"], batch=2)
    for prompt, row in zip(prompts, found, strict=True):
        ids = BYTES.encode(prompt, bos=True)
        padded = jnp.array([ids + [0] * (32 - len(ids))], jnp.int32)
        logits = eqx.filter_jit(lambda m, t: m(t))(tiny, padded)[0, len(ids) - 1]
        expected = jax.nn.log_softmax(logits)[jnp.array([ord(" "), ord("y"), ord("z")])]
        np.testing.assert_allclose(row, expected, atol=1e-4)


def test_label_log_probs_refuse(tiny):
    with pytest.raises(ValueError, match="same token"):
        icl.label_log_probs(tiny, BYTES, ["a"], ["xy", "xz"])
    for prompts, labels in (([], ["x", "y"]), (["a"], ["x", ""])):
        with pytest.raises(ValueError, match="need a prompt"):
            icl.label_log_probs(tiny, BYTES, prompts, labels)
    with pytest.raises(ValueError, match="does not fit width=4"):
        icl.label_log_probs(tiny, BYTES, ["abcdef"], ["x", "y"], width=4)


# power law, recipe, Bloom filter -----------------------------------------------------------------


@quick
@given(a=st.floats(0.01, 2), c=st.floats(0.1, 10))
def test_power_law(a, c):
    sizes = np.array([10.0, 50.0, 300.0])
    np.testing.assert_allclose(icl.power_law(sizes, c * sizes**-a), (a, c), rtol=1e-6)


@pytest.mark.parametrize("bad", [([1], [1]), ([1, 0], [1, 1]), ([1, 2], [1, -1])])
def test_power_law_refuses(bad):
    with pytest.raises(ValueError, match="two positive"):
        icl.power_law(*bad)


def test_recipe_is_gpt3s():
    """Clip to norm 1, Adam 0.9/0.95/1e-8, decoupled decay of matrices by 0.1: against Optax's parts."""
    ours = make_optimizer(steps=100, peak=1e-2, warmup=5, floor=0.1)
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, 100, 1e-3)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(rate),
    )
    weights = {"w": jnp.ones((3, 4))}
    with jax.numpy_dtype_promotion("standard"):
        states = [o.init(weights) for o in (ours, theirs)]
        for i in range(8):
            gradient = {"w": 5 * jax.random.normal(jax.random.key(i), (3, 4))}
            moves = []
            for j, optimizer in enumerate((ours, theirs)):
                move, states[j] = optimizer.update(gradient, states[j], weights)
                moves.append(move["w"])
            np.testing.assert_allclose(*moves, atol=1e-7)
        assert abs(float(rate(100)) / 1e-2 - 0.1) < 1e-4


def test_bloom_rate():
    """No misses, the planned rate of false alarms, and the same as a filter over SHA-256 within noise."""
    n, m, k = 2000, 16_000, 4
    planned = (1 - np.exp(-k * n / m)) ** k

    def sha(names, m, k):
        digests = [hashlib.sha256(name.encode()).digest() for name in names]
        return np.array(
            [[int.from_bytes(d[8 * i : 8 * i + 8], "big") % m for i in range(k)] for d in digests]
        )

    for places in (icl.bloom_places, sha):
        bits = np.zeros(m, bool)
        bits[places([f"in {i}" for i in range(n)], m, k)] = True
        assert bits[places([f"in {i}" for i in range(n)], m, k)].all()
        hits = bits[places([f"out {i}" for i in range(20_000)], m, k)].all(1).mean()
        assert abs(hits - planned) < 0.004
    with pytest.raises(ValueError, match="n_hashes"):
        icl.bloom_places(["a"], 10, 9)
