"""Pairs, scores, search and attention: against sacrebleu, exhaustive search, JAX's and Equinox's own."""

import functools
import itertools
import json
import math
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_from_scratch import attention
from llm_from_scratch.attention import (
    GRU,
    AdditiveScore,
    CharVocabulary,
    DotScore,
    MultiHeadAttention,
    Pair,
    PairBatches,
    Translator,
    TranslatorConfig,
    align,
    align_and_predict,
    align_lines,
    attention_weights,
    beam_search,
    bleu,
    causal_mask,
    changed_words,
    chrf,
    exact_lines,
    folio_lines,
    look,
    merge_heads,
    online_attention,
    run_gru,
    same_ends,
    scaled_dot_product_attention,
    split_heads,
    translate,
    translation_loss,
    twin_pairs,
)
from llm_from_scratch.datasets import TEST, VALIDATION, folio, plays

SCORES = json.loads((Path(__file__).parent / "golden" / "scores.json").read_text(encoding="utf-8"))

# the pairs


def test_twins_of_held_out_plays_are_held_out():
    assert {pair.play for pair in twin_pairs("validation")} == set(VALIDATION)
    assert {pair.play for pair in twin_pairs("test")} == set(TEST)
    with pytest.raises(ValueError, match="no split 'valid'"):
        twin_pairs("valid")


def test_pairs_are_lines_of_the_two_texts_in_order():
    modern, old = plays("validation")[1], folio("validation")[1]
    pairs = [pair for pair in twin_pairs("validation") if pair.play == modern.slug]
    for text, lines in (
        (modern.text, [p.modern for p in pairs]),
        (old.text, [p.old for p in pairs]),
    ):
        squeezed, at = " ".join(text.split()), 0
        for line in lines:
            at = squeezed.index(line, at) + len(line)
    assert len(pairs) > 1500


def test_twin_pairs_gives_a_list_of_its_own():
    twin_pairs("test").clear()
    assert twin_pairs("test")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("  Ham. To be, or not to be. Or.", "To be, or not to be. Or."),
        ("   1.Lord. Who goes?", "Who goes?"),
        ("  2 Gent. Nay", "Nay"),
        ("   Mis.Ford. Nay Ile", "Nay Ile"),
        ("  King. Oh 'tis true:", "Oh 'tis true:"),
        ("Oh. This has no speaker", "Oh. This has no speaker"),
    ],
)
def test_folio_speaker(line, wanted):
    assert folio_lines(line) == [wanted]


def test_align_against_every_alignment():
    """The best sum over all pairs of rising index lists, by enumeration."""
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (2, 3), (4, 4), (5, 3), (5, 5), (5, 5), (3, 6)):
        gain = rng.normal(size=(rows, columns))
        best = max(
            sum(gain[i, j] for i, j in zip(some, others, strict=True))
            for n in range(min(rows, columns) + 1)
            for some in itertools.combinations(range(rows), n)
            for others in itertools.combinations(range(columns), n)
        )
        where = sorted(np.argwhere(gain > 0).tolist(), key=lambda p: (p[0], -p[1]))
        found = align(((i, j, gain[i, j]) for i, j in where), columns)
        for (i, j), (k, m) in itertools.pairwise(found):
            assert i < k and j < m
        assert all(gain[i, j] > 0 for i, j in found)
        assert sum(gain[i, j] for i, j in found) == pytest.approx(best)
    assert align([], 3) == []


def test_align_lines_finds_what_moved_and_what_is_missing():
    old = ["Enter Ghost", "To dye, to sleepe", "No more", "And by a sleepe to say we end"]
    new = ["To die: to sleep;", "A line of its own here", "And by a sleep to say we end"]
    found = align_lines(old, new)
    assert [pair[:2] for pair in found] == [(old[1], new[0]), (old[3], new[2])]
    assert all(0.6 < pair[2] <= 1.00001 for pair in found)


def test_same_ends():
    assert same_ends("Ile vse it", "I'll use it.")
    assert not same_ends("in the way of", "in the")
    assert not same_ends("...", "so")


# the codec and the batches

CODEC = CharVocabulary("abc ")
PAIRS = [Pair("p", "a" * i, "b" * (i % 3)) for i in range(10)]


def test_codec():
    assert CODEC.vocab_size == 8
    ids = CODEC.encode("cab z", bos=True, eos=True)
    assert ids == [1, 6, 4, 5, 7, 3, 2]
    assert CODEC.decode(ids) == "cab �"
    assert CODEC.decode([4, 0, 2, 5]) == "a"
    assert CODEC.encode("") == [] and CODEC.decode([]) == ""
    with pytest.raises(ValueError, match="id 8 is not below vocab_size=8"):
        CODEC.decode([8])
    with pytest.raises(ValueError, match="twice"):
        CharVocabulary("aa")
    assert CharVocabulary.from_pairs([Pair("p", "ba", "ca")]).characters == "abc"


def test_batches_are_a_function_of_the_cursor():
    batches = PairBatches(PAIRS, CODEC, 3, max_len=9, seed=4)
    assert batches.per_epoch == 3
    for name, array in batches(5).items():
        assert array.shape == (3, 10) and array.dtype == np.int32
        assert np.array_equal(array, PairBatches(PAIRS, CODEC, 3, max_len=9, seed=4)(5)[name])
    seen = sum((sorted((batches(c)["source"] == 4).sum(1)) for c in range(3)), [])
    assert len(set(seen)) == 9  # each pair once, one left over
    assert not np.array_equal(batches(0)["source"], batches(3)["source"])


def test_batch_of_one_pair():
    batch = PairBatches(PAIRS, CODEC, 1, max_len=9).padded([Pair("p", "ab", "cb")])
    assert batch["source"][0].tolist() == [4, 5, 2] + [0] * 7
    assert batch["tokens"][0].tolist() == [1, 6, 5] + [0] * 7
    assert batch["targets"][0].tolist() == [6, 5, 2] + [-1] * 7


def test_bad_batches():
    with pytest.raises(ValueError, match="9 characters is longer than max_len=8"):
        PairBatches(PAIRS, CODEC, 3, max_len=8)
    with pytest.raises(ValueError, match="10 pairs are fewer than a batch of 11"):
        PairBatches(PAIRS, CODEC, 11, max_len=9)


# the scores


@pytest.mark.parametrize("n", range(len(SCORES["corpora"])))
def test_scores_are_sacrebleus(n):
    corpus = SCORES["corpora"][n]
    lines = corpus["hypotheses"], corpus["references"]
    assert bleu(*lines) == pytest.approx(corpus["bleu"], abs=1e-9)
    assert chrf(*lines) == pytest.approx(corpus["chrf"], abs=1e-9)
    assert chrf(*lines, order=3, beta=1) == pytest.approx(corpus["chrf_order3_beta1"], abs=1e-9)


@pytest.mark.parametrize("score", [bleu, chrf, exact_lines])
def test_bad_scores(score):
    assert score(["a b c d e"], ["a b c d e"]) == pytest.approx(1 if score is exact_lines else 100)
    with pytest.raises(ValueError, match="1 hypotheses for 2 references"):
        score(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="0 hypotheses for 0 references"):
        score([], [])


# the search


def chain(seed: int, vocab: int = 4):
    """A model whose next token depends on the last two: (step, state of one hypothesis, log p of a sequence)."""
    logits = 2 * jax.random.normal(jax.random.key(seed), (vocab, vocab, vocab))
    table = jax.nn.log_softmax(logits)

    def step(tokens, before):
        return table[before, tokens], tokens

    def log_p(sequence):
        past = (0, 1, *sequence)
        return sum(float(table[past[i], past[i + 1], t]) for i, t in enumerate(sequence))

    return step, jnp.array(0), log_p


def every_sequence(vocab: int, max_len: int, eos: int):
    """All sequences of at most max_len tokens that end in eos and hold it once."""
    others = [t for t in range(vocab) if t != eos]
    for n in range(max_len):
        yield from ((*head, eos) for head in itertools.product(others, repeat=n))


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_wide_beam_is_exhaustive_search(seed, penalty):
    step, state, log_p = chain(seed)
    scored = sorted(
        ((log_p(s) / ((5 + len(s)) / 6) ** penalty, s) for s in every_sequence(4, 4, eos=2)),
        reverse=True,
    )
    search = jax.jit(
        functools.partial(
            beam_search, step, bos=1, eos=2, beam=64, max_len=4, length_penalty=penalty
        )
    )
    tokens, scores = search(state)
    for found, score, (wanted, sequence) in zip(tokens[:8], scores[:8], scored[:8], strict=True):
        assert float(score) == pytest.approx(wanted, abs=1e-4)
        assert tuple(found.tolist()) == sequence + (2,) * (4 - len(sequence))
    assert len(scored) == 40 and np.isneginf(np.asarray(scores[40:])).all()


def test_beam_of_one_is_greedy():
    step, state, _ = chain(7)
    tokens, _ = beam_search(step, state, bos=1, eos=2, beam=1, max_len=6)
    before, last, greedy = jnp.array([0]), jnp.array([1]), []
    for t in range(6):
        log_p, before = step(last, before)
        last = jnp.argmax(log_p, axis=1)
        greedy.append(2 if 2 in greedy or t == 5 else int(last[0]))
    assert tokens[0].tolist() == greedy


def test_wider_beams_score_no_worse_here_and_vmap_agrees():
    step, _, _ = chain(3)
    states = jnp.arange(4)
    best = []
    for beam in (1, 2, 8):
        search = functools.partial(beam_search, step, bos=1, eos=2, beam=beam, max_len=5)
        search = jax.jit(search)
        tokens, scores = jax.vmap(search)(states)
        for i, state in enumerate(states):
            alone = search(state)
            assert np.array_equal(tokens[i], alone[0])
            np.testing.assert_allclose(scores[i], alone[1], atol=1e-5)
        best.append(np.asarray(scores[:, 0]))
    assert (best[2] >= best[0] - 1e-5).all()


# attention


def vectors(seed, *shapes):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("masked", [False, True])
def test_scaled_dot_product_attention(masked):
    """Equal to jax.nn.dot_product_attention, values and gradients, and to a loop in NumPy."""
    q, k, v = vectors(0, (6, 8), (10, 8), (10, 8))
    mask = jax.random.bernoulli(jax.random.key(1), 0.6, (6, 10)).at[:, 0].set(True)
    mask = mask if masked else None

    def theirs(q, k, v):
        given = None if mask is None else mask[None]
        return jax.nn.dot_product_attention(q[:, None], k[:, None], v[:, None], mask=given)[:, 0]

    functions = [
        lambda q, k, v: scaled_dot_product_attention(q, k, v, mask),
        lambda q, k, v: online_attention(q, k, v, mask, block=5),
        lambda q, k, v: online_attention(q, k, v, mask, block=2),
    ]
    wanted = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(theirs(*a))), argnums=(0, 1, 2)))(q, k, v)
    for function in functions:
        np.testing.assert_allclose(function(q, k, v), theirs(q, k, v), atol=1e-5)
        found = jax.jit(jax.grad(lambda *a, f=function: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2)))
        for ours, reference in zip(found(q, k, v), wanted, strict=True):
            np.testing.assert_allclose(ours, reference, atol=1e-5)
    for t in range(6):
        seen = [s for s in range(10) if mask is None or mask[t, s]]
        scores = [math.exp(float(q[t] @ k[s]) / math.sqrt(8)) for s in seen]
        loop = sum(w * np.asarray(v[s]) for w, s in zip(scores, seen, strict=True)) / sum(scores)
        np.testing.assert_allclose(functions[0](q, k, v)[t], loop, atol=1e-5)


def test_large_scores_and_empty_rows():
    q, k, v = vectors(0, (3, 4), (6, 4), (6, 4))
    mask = causal_mask(6)[:3].at[1].set(False)
    for scale in (1.0, 1e4):
        for attend in (
            scaled_dot_product_attention,
            functools.partial(online_attention, block=3),
        ):
            out = attend(scale * q, k, v, mask)
            assert np.isfinite(np.asarray(out)).all() and (np.asarray(out[1]) == 0).all()
            grad = jax.jit(jax.grad(lambda q, f=attend: jnp.sum(f(q, k, v, mask) ** 2)))(scale * q)
            assert np.isfinite(np.asarray(grad)).all()
    with pytest.raises(ValueError, match="block=4 does not divide the 6 keys"):
        online_attention(q, k, v, block=4)


def test_softmax_in_fp32():
    scores = jnp.array([[1.0, 2.0, 3.0]], jnp.bfloat16)
    assert attention_weights(scores).dtype == jnp.float32
    q, k, v = (x.astype(jnp.bfloat16) for x in vectors(0, (3, 4), (6, 4), (6, 4)))
    assert scaled_dot_product_attention(q, k, v).dtype == jnp.bfloat16
    assert online_attention(q, k, v, block=3).dtype == jnp.bfloat16


@pytest.mark.parametrize("n_heads", [1, 2, 4])
@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_attention_is_equinoxs(n_heads, cross):
    ours = MultiHeadAttention(8, n_heads, key=jax.random.key(0))
    theirs = eqx.nn.MultiheadAttention(n_heads, 8, key=jax.random.key(1))
    theirs = eqx.tree_at(
        lambda m: [p.weight for p in (m.query_proj, m.key_proj, m.value_proj, m.output_proj)],
        theirs,
        [ours.wq, ours.wk, ours.wv, ours.wo],
    )
    x, other = vectors(2, (5, 8), (7, 8))
    memory = other if cross else None
    seen = other if cross else x
    mask = jnp.tril(jnp.ones((5, len(seen)), bool))
    np.testing.assert_allclose(ours(x, memory, mask), theirs(x, seen, seen, mask=mask), atol=1e-5)
    weights = ours.weights(x, memory, mask)
    assert weights.shape == (n_heads, 5, len(seen))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert (np.asarray(weights)[:, ~np.asarray(mask)] == 0).all()


def test_heads_are_a_reshape():
    x = vectors(0, (5, 12))[0]
    heads = split_heads(x, 3)
    assert heads.shape == (3, 5, 4) and np.array_equal(heads[1, 2], x[2, 4:8])
    assert np.array_equal(merge_heads(heads), x)
    with pytest.raises(ValueError, match="n_heads=5 does not divide dim=12"):
        MultiHeadAttention(12, 5, key=jax.random.key(0))
    assert attention.__doc__


# the translator


def small_translator(score="additive"):
    config = TranslatorConfig(
        8, embed_dim=3, encoder_dim=4, decoder_dim=5, score_dim=6, score=score
    )
    return Translator(config, key=jax.random.key(0))


def test_gru_is_equinoxs():
    gru = GRU(3, 4, key=jax.random.key(0))
    gru = eqx.tree_at(lambda m: (m.b, m.bn), gru, (jnp.arange(12.0) / 10, jnp.arange(4.0) / 5))
    cell = eqx.nn.GRUCell(3, 4, key=jax.random.key(1))
    where = lambda m: (m.weight_ih, m.weight_hh, m.bias, m.bias_n)  # noqa: E731
    cell = eqx.tree_at(where, cell, (gru.w, gru.u, gru.b, gru.bn))
    x, h = vectors(2, (6, 3), (4,))
    assert jnp.allclose(gru.step(h, gru.inputs(x[0])), cell(x[0], h), atol=1e-6)
    real = jnp.array([True, True, False, True, True, False])
    for reverse in (False, True):
        states, h = run_gru(gru, x, real, reverse=reverse), jnp.zeros(4)
        for s in reversed(range(6)) if reverse else range(6):
            h = cell(x[s], h) if real[s] else h
            np.testing.assert_allclose(states[s], h, atol=1e-6)


def test_additive_score():
    """Against a loop over positions and hidden units in NumPy."""
    score = AdditiveScore(4, 3, 5, key=jax.random.key(0))
    query, source = vectors(1, (4,), (6, 3))
    w, u, v = (np.asarray(a, np.float64) for a in (score.w, score.u, score.v))
    loop = [
        sum(v[a] * math.tanh(w[a] @ np.asarray(query) + u[a] @ np.asarray(h)) for a in range(5))
        for h in source
    ]
    np.testing.assert_allclose(score(query, score.keys(source)), loop, atol=1e-5)
    product = DotScore(4, 3, 5, key=jax.random.key(0))
    loop = [(w @ np.asarray(query)) @ (u @ np.asarray(h)) / math.sqrt(5) for h in source]
    np.testing.assert_allclose(product(query, product.keys(source)), loop, atol=1e-5)


def test_fixed_vector_ignores_the_state():
    source = jnp.array([4, 5, 6, 2, 0, 0])
    one, other = vectors(3, (5,), (5,))
    for score, same in (("fixed", True), ("additive", False), ("dot", False)):
        model = small_translator(score)
        memory, _ = model.encode(source)
        (a, weights), (b, _) = look(model.score, one, memory), look(model.score, other, memory)
        assert bool(jnp.allclose(a, b, atol=1e-6)) is same
        assert float(weights.sum()) == pytest.approx(0 if same else 1, abs=1e-5)
        assert (np.asarray(weights[4:]) == 0).all()
    with pytest.raises(ValueError, match="no score 'mean'; there are additive, dot, fixed"):
        TranslatorConfig(8, score="mean")


@pytest.mark.parametrize("score", ["additive", "dot", "fixed"])
def test_padding_changes_nothing(score):
    model, tokens = small_translator(score), jnp.array([1, 5, 4])
    near = align_and_predict(model, jnp.array([4, 5, 6, 2]), tokens)
    far = align_and_predict(model, jnp.array([4, 5, 6, 2] + [0] * 9), tokens)
    np.testing.assert_allclose(near[0], far[0], atol=1e-5)
    np.testing.assert_allclose(near[1], far[1][:, :4], atol=1e-6)


def test_gradient_by_finite_differences():
    model = small_translator()
    batch = jax.tree.map(jnp.asarray, PairBatches(PAIRS, CODEC, 4, max_len=9)(0))
    direction = jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(p.size), p.shape) if eqx.is_array(p) else p,
        model,
    )
    loss = eqx.filter_jit(lambda m: translation_loss(m, batch, None)[0])
    grads = eqx.filter_jit(eqx.filter_grad(loss))(model)
    products = jax.tree.map(lambda g, d: jnp.sum(g * d), grads, direction)
    slope = float(sum(jax.tree.leaves(products)))

    def moved(step):
        there = jax.tree.map(lambda p, d: p + step * d, model, direction)
        return float(loss(there))

    assert (moved(3e-3) - moved(-3e-3)) / 6e-3 == pytest.approx(slope, rel=0.02, abs=1e-3)


def test_loss_counts_real_targets_only():
    model = small_translator()
    batch = PairBatches(PAIRS, CODEC, 10, max_len=12)(0)
    loss, count = translation_loss(model, batch, None)
    assert int(count) == sum(len(pair.modern) + 1 for pair in PAIRS)
    total, run = 0.0, eqx.filter_jit(align_and_predict)
    for source, tokens, targets in zip(
        batch["source"], batch["tokens"], batch["targets"], strict=True
    ):
        log_probs, _ = run(model, jnp.asarray(source), jnp.asarray(tokens))
        total -= sum(np.asarray(log_probs)[t, y] for t, y in enumerate(targets) if y >= 0)
    assert float(loss) == pytest.approx(total / int(count), abs=1e-5)


def test_translate_is_greedy_decoding():
    """Greedy by re-running the whole model on every prefix, without the beam."""
    model, batches = small_translator(), PairBatches(PAIRS, CODEC, 4, max_len=9)
    pairs, run = PAIRS[3:6], eqx.filter_jit(align_and_predict)
    found = translate(model, batches, pairs)
    for pair, line in zip(pairs, found, strict=True):
        source, tokens = jnp.asarray(batches.padded([pair])["source"][0]), [1]
        while tokens[-1] != 2 and len(tokens) < 10:
            prefix = jnp.array(tokens + [0] * (10 - len(tokens)))  # what comes later has no say
            log_probs, _ = run(model, source, prefix)
            tokens.append(int(jnp.argmax(log_probs[len(tokens) - 1])))
        assert line == CODEC.decode(tokens)


def test_causal_mask():
    assert causal_mask(3).tolist() == [[True, False, False], [True, True, False], [True] * 3]
    attend = MultiHeadAttention(8, 2, key=jax.random.key(0))
    x = vectors(0, (5, 8))[0]
    felt = jax.jacobian(lambda x: attend(x, mask=causal_mask(5)))(x)
    reaches = np.abs(np.asarray(felt)).max(axis=(1, 3)) > 0
    assert np.array_equal(reaches, np.tril(np.ones((5, 5), bool)))


def test_changed_words():
    old, new = ["To dye to sleepe", "one two"], ["To die to sleep", "one"]
    assert changed_words(old, new, new) == (1.0, 1.0)
    assert changed_words(old, old, new) == (0.0, 1.0)
    assert changed_words(old, ["To die to sleep no", "one"], new) == (0.0, 0.0)
    with pytest.raises(ValueError, match="no share to give"):
        changed_words(["a"], ["a"], ["a"])
