"""Chapter 12: the cache against the full pass, padding, exact truncation, streaming, bad input."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llm_from_scratch import generation
from llm_from_scratch.generation import Sampler, choose, generate, log_probs, stream, text_pieces
from llm_from_scratch.llama import Llama, LlamaConfig
from llm_from_scratch.tokenizer import Tokenizer

TINY = LlamaConfig(273, 24, 2, 4, 2, 40, 6, rope_theta=1000.0, max_seq_len=128)
BYTES = Tokenizer({bytes([i]): i for i in range(256)})
GREEDY = Sampler(temperature=0)
quick = settings(max_examples=8, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def randomised(config: LlamaConfig = TINY, seed: int = 0, dtype=jnp.float32) -> Llama:
    """A model whose scores are far from zero, so that a wrong mask or position shows."""
    model = Llama(config, key=jax.random.key(seed), dtype=dtype)
    return jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, model)


@eqx.filter_jit
def run(model, *arguments, **options):
    return model(*arguments, **options)


def draw_prompts(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, n).tolist() for n in lengths]


def naive(model, prompt, count):
    """Greedy, one full pass per token, nothing padded in front, nothing cached."""
    ids = list(prompt)
    for _ in range(count):
        padded = jnp.array([ids + [0] * (64 - len(ids))], jnp.int32)
        ids.append(int(run(model, padded)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


# the cache ---------------------------------------------------------------------------------------


def steps_against_full(config, lengths, steps, dtype, tolerance):
    """Prefill and single steps of a padded batch against one full pass over the whole texts."""
    model = randomised(config, dtype=dtype)
    texts = draw_prompts([n + steps for n in lengths], seed=sum(lengths))
    prompts = [text[:n] for text, n in zip(texts, lengths, strict=True)]
    tokens, true, slots = generation.pad_prompts(model, prompts, steps)
    logits, cache = generation.prefill(model, tokens, true, slots)
    whole = np.array([text + [0] * (64 - len(text)) for text in texts], np.int32)
    full = np.asarray(run(model, jnp.asarray(whole)))
    tolerance, rows = tolerance * max(1, np.abs(full).max()), np.arange(len(lengths))
    for step in range(steps + 1):
        at = np.array(lengths) + step
        assert np.abs(logits - full[rows, at - 1]).max() < tolerance
        if step < steps:
            logits, cache = generation.advance(model, jnp.asarray(whole[rows, at]), cache)


@quick
@given(
    shape=st.sampled_from([(2, 4, 2, True), (1, 6, 2, False)]),
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=2),
    steps=st.integers(1, 20),
)
def test_cache_equals_full_pass(shape, lengths, steps):
    layers, heads, kv, tied = shape
    config = LlamaConfig(273, 16, layers, heads, kv, 24, 4, tie_embeddings=tied, max_seq_len=128)
    steps_against_full(config, lengths, steps, jnp.float32, 1e-4)


def test_cache_equals_full_pass_in_fp64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        steps_against_full(TINY, [1, 33], 5, jnp.float64, 1e-10)


def test_left_padding():
    """Segments and positions make a row padded on the left what `prefill` makes of it on the right."""
    model, prompts = randomised(), draw_prompts([5, 30])
    tokens, lengths, slots = generation.pad_prompts(model, prompts, 4)
    right, _ = generation.prefill(model, tokens, lengths, slots)
    shift = tokens.shape[1] - lengths
    left = np.stack([np.roll(row, n) for row, n in zip(tokens, shift, strict=True)])
    column = np.arange(tokens.shape[1], dtype=np.int32)[None] - shift[:, None]
    segments, positions = (column >= 0).astype(np.int32), np.maximum(column, 0)
    found = run(model, *map(jnp.asarray, (left, segments, positions)))[:, -1]
    assert np.abs(found - right).max() < 1e-4 * max(1, np.abs(right).max())


def test_generate_is_the_naive_loop():
    model, prompts = randomised(), draw_prompts([5, 32])
    together = generate(model, prompts, max_tokens=20, sampler=GREEDY)
    assert together == [naive(model, prompt, 20) for prompt in prompts]


def test_rows_do_not_depend_on_their_neighbours():
    """Neither their logits nor their draws: row 0 alone is row 0 in company."""
    model, prompts = randomised(), draw_prompts([9, 30])
    options = {"max_tokens": 12, "sampler": Sampler(1.5, top_k=50), "key": jax.random.key(3)}
    assert generate(model, prompts, **options)[0] == generate(model, prompts[:1], **options)[0]


def test_nothing_compiles_twice():
    model, prompts = randomised(), draw_prompts([5, 6])
    generate(model, prompts, max_tokens=4, sampler=GREEDY)
    programs = [f._cache_size() for f in (generation.prefill, generation.advance)]
    generate(model, draw_prompts([17, 30]), max_tokens=25, sampler=GREEDY)
    assert [f._cache_size() for f in (generation.prefill, generation.advance)] == programs


def test_stop_ids_end_a_row():
    model, prompts = randomised(), draw_prompts([5, 8])
    whole = generate(model, prompts, max_tokens=12, sampler=GREEDY)
    stop = whole[0][4]
    found = generate(model, prompts, max_tokens=12, sampler=GREEDY, stop_ids=[stop])
    for short, long in zip(found, whole, strict=True):
        assert short == list(itertools.takewhile(lambda i: i != stop, long))


def test_same_key_same_ids():
    model, prompts = randomised(), draw_prompts([5])
    one, again, other = (
        generate(model, prompts, max_tokens=20, key=k)
        for k in (None, jax.random.key(0), jax.random.key(1))
    )
    assert one == again != other


# the samplers ------------------------------------------------------------------------------------


def reference(logits, sampler, seen):
    """The same distribution in plain Python, one token at a time, in fp64."""
    z = [float(x) for x in logits]
    theta = sampler.repetition_penalty
    z = [(x / theta if x > 0 else x * theta) if s else x for x, s in zip(z, seen, strict=True)]
    order = sorted(range(len(z)), key=lambda i: -z[i])
    if sampler.temperature == 0:
        return np.eye(len(z))[order[0]]
    z = [x / sampler.temperature for x in z]
    kept = order[: sampler.top_k] if sampler.top_k else order
    mass = {i: np.exp(z[i] - z[order[0]]) for i in kept}
    total = sum(mass.values())
    if sampler.top_p is not None:
        nucleus, reached = [], 0.0
        for i in kept:
            nucleus.append(i)
            reached += mass[i] / total
            if reached >= sampler.top_p:
                break
        kept = nucleus
    if sampler.min_p is not None:
        kept = [i for i in kept if mass[i] >= sampler.min_p * mass[kept[0]]]
    p = np.zeros(len(z))
    for i in kept:
        p[i] = mass[i]
    return p / p.sum()


SAMPLERS = [
    Sampler(temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=r)
    for t, k, p, m, r in itertools.product(
        (0, 0.7, 1.6), (None, 7), (None, 0.8), (None, 0.1), (1.0, 1.4)
    )
]


def test_truncation_is_exact():
    """Every combination gives the distribution of the plain reference, zeros in the same places."""
    random = np.random.default_rng(0)
    logits = (2 * random.standard_normal((6, 50))).astype(np.float32)
    seen = random.random((6, 50)) < 0.3
    for sampler in SAMPLERS:
        found = np.exp(np.asarray(sampler.log_probs(jnp.asarray(logits), jnp.asarray(seen))))
        for row in range(6):
            wanted = reference(logits[row], sampler, seen[row])
            assert ((found[row] > 0) == (wanted > 0)).all(), sampler
            np.testing.assert_allclose(found[row], wanted, atol=1e-6)


def test_draws_follow_the_distribution():
    """χ² of 20,000 draws against the distribution that log_probs states; what is cut never comes."""
    logits = jnp.asarray(np.random.default_rng(1).standard_normal(30), jnp.float32)
    sampler = Sampler(0.8, top_k=12, top_p=0.9)
    expected = np.exp(np.asarray(sampler.log_probs(logits), np.float64))
    rows = jnp.broadcast_to(logits, (20_000, 30))
    draws, _ = choose(sampler, rows, None, jax.random.key(0), 0)
    counts, kept = np.bincount(np.asarray(draws), minlength=30), expected > 0
    assert counts[~kept].sum() == 0
    expected = expected[kept] / expected[kept].sum()
    assert stats.chisquare(counts[kept], 20_000 * expected).pvalue > 0.001


def test_top_p_of_ties_and_of_one():
    assert (Sampler(top_p=0.1).log_probs(jnp.zeros(4)) > -jnp.inf).all()  # all tie with the first
    assert (Sampler(top_p=1.0).log_probs(jnp.arange(50.0)) > -jnp.inf).all()
    assert (Sampler(top_k=99).log_probs(jnp.arange(5.0)) > -jnp.inf).all()


def test_penalty_counts_prompt_and_answer():
    """With a huge penalty greedy decoding never says a token twice, nor one of the prompt."""
    model, prompt = randomised(), draw_prompts([6])[0]
    sampler = Sampler(temperature=0, repetition_penalty=1e6)
    new = generate(model, [prompt], max_tokens=30, sampler=sampler)[0]
    assert len({*new, *prompt}) == len(new) + len(set(prompt))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
    ],
)
def test_bad_samplers(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        Sampler(**options)


@pytest.mark.parametrize(
    "prompts, max_tokens, message",
    [
        ([], 1, "number of prompts"),
        ([[1], []], 1, "prompt 1 is empty"),
        ([[1]], 0, "max_tokens=0"),
        ([[1], [273]], 1, "prompt 1 has a token outside"),
        ([[-1]], 1, "prompt 0 has a token outside"),
        ([[1] * 120], 9, "prompt 0 has 120 tokens"),
    ],
)
def test_bad_prompts(prompts, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(randomised(), prompts, max_tokens=max_tokens)


# text --------------------------------------------------------------------------------------------


@quick
@given(st.text(max_size=12), st.integers(0, 3))
def test_pieces_are_whole_characters(text, cut):
    ids = BYTES.encode(text)
    ids = ids[: len(ids) - cut] if cut else ids
    pieces = list(text_pieces(BYTES, ids))
    assert "".join(pieces) == BYTES.decode(ids)
    assert all(pieces) and (cut or "\ufffd" in text or "\ufffd" not in "".join(pieces))


def test_stream_is_generate():
    model, text = randomised(), "héllo"
    ids = BYTES.encode(text, bos=True)
    options = {"max_tokens": 25, "sampler": Sampler(1.2), "key": jax.random.key(5)}
    found = "".join(stream(model, BYTES, text, **options))
    stops = BYTES.stop_ids
    assert found == BYTES.decode(generate(model, [ids], stop_ids=stops, **options)[0])
    assert found == "".join(stream(model, BYTES, ids, **options))


def test_log_probs_across_blocks():
    """Longer than a block of 128, with batch axes, against the softmax of all logits."""
    model = randomised()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 273, (2, 140)), jnp.int32)
    found = log_probs(model, tokens)
    wanted = jax.nn.log_softmax(run(model, tokens))[:, :-1]
    wanted = np.take_along_axis(np.asarray(wanted), np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert jnp.isnan(log_probs(model, tokens.at[0, 5].set(273))[0, 4])


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_fused_is_the_same_model(n_kv_heads):
    config = LlamaConfig(96, 32, 2, 4, n_kv_heads, 64, 8, max_seq_len=64)
    model = Llama(config, key=jax.random.key(n_kv_heads))
    fused = generation.fuse(model)
    tokens = jnp.arange(48).reshape(2, 24) % 96
    assert jnp.allclose(eqx.filter_jit(fused)(tokens), eqx.filter_jit(model)(tokens), atol=1e-5)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    greedy = {"max_tokens": 9, "sampler": generation.Sampler(0)}
    assert generation.generate(fused, prompts, **greedy) == generation.generate(
        model, prompts, **greedy
    )
