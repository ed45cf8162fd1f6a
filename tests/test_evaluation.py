"""Chapter 15: scores, intervals and estimators against independent ways to compute them."""

import itertools
import json
import math
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llm_from_scratch.bigram import NGram, bits_per_byte
from llm_from_scratch.datasets import plays
from llm_from_scratch.evaluation import (
    Item,
    choice_ids,
    choice_log_probs,
    confidence_interval,
    detectable_difference,
    exact_match,
    excerpt,
    interval_ends,
    line_items,
    multiple_choice,
    ngram_choice,
    padded_choices,
    pass_at_k,
    plain_answer,
    speaker_items,
)
from llm_from_scratch.llama import Llama, LlamaConfig
from llm_from_scratch.pretraining import model_bits_per_byte
from llm_from_scratch.tokenizer import COURSE_SPECIAL, Tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[1]
TINY = LlamaConfig(300, 16, 2, 4, 2, 32, 4, tie_embeddings=True, max_seq_len=64)
ITEMS = [
    Item("the cat and the", (" dog", " hat on the mat", " mat."), 0, "say:"),
    Item("a cat that sat on the other mat with ", ("another", "the hat", "c"), 2, "say: "),
    Item("", ("the cat", "on", "x"), 1),
]


@pytest.fixture(scope="module")
def tokenizer():
    text = ["the cat and the dog and the cat that sat on the mat with another hat"]
    return Tokenizer(train_bpe(text, 284), COURSE_SPECIAL)


@pytest.fixture(scope="module")
def model():
    louder = jax.tree.map(lambda x: 8 * x, Llama(TINY, key=jax.random.key(0)))
    return louder


# intervals


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (100, 164), (199, 200), (754, 1319)])
def test_intervals_are_scipys(right, n):
    wilson = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert np.allclose(interval_ends(right / n, n), (wilson.low, wilson.high), atol=1e-12)
    share = right / n
    low, high = stats.norm.interval(0.95, share, math.sqrt(share * (1 - share) / n) or 1e-300)
    assert np.allclose(interval_ends(share, n, "gaussian"), (low, high), atol=1e-12)
    scores = np.repeat([1.0, 0.0], [right, n - right])
    drawn = confidence_interval(scores, "bootstrap")
    exact = interval_ends(share, n, "bootstrap")
    assert np.allclose([drawn.low, drawn.high], 100 * np.array(exact), atol=110 / n**0.5 / 5)
    if 0 < right < n:
        options = {"method": "percentile", "rng": np.random.default_rng(1)}
        theirs = stats.bootstrap((scores,), np.mean, **options).confidence_interval
        assert abs(100 * theirs.low - drawn.low) < 1.5 and abs(100 * theirs.high - drawn.high) < 1.5


def test_confidence_interval():
    found = confidence_interval([1, 0, 1, 1], unit="points", digits=2)
    assert (found.mean, found.n, found.unit, found.digits) == (75, 4, "points", 2)
    assert confidence_interval(np.array([True, False])).mean == 50
    assert confidence_interval([0.5] * 9, "bootstrap").low == 50
    for scores in ([], [2.0], [-0.1], [[1, 0]], [float("nan")]):
        with pytest.raises(ValueError, match="at least one number from 0 to 1"):
            confidence_interval(scores)
    with pytest.raises(ValueError, match="take method='bootstrap'"):
        confidence_interval([0.5, 1.0])
    with pytest.raises(ValueError, match="no method 'exact'"):
        confidence_interval([0, 1], "exact")


@pytest.mark.parametrize("disagreement", [None, 0.3])
def test_detectable_difference_has_its_power(disagreement):
    """The power at that difference, from the normal distribution, is the one that was asked for."""
    found = detectable_difference(500, 0.4, disagreement=disagreement, power=0.9) / 100
    variance = 2 * 0.4 * 0.6 if disagreement is None else disagreement
    power = stats.norm.sf(1.959964, loc=found / math.sqrt(variance / 500))
    assert abs(power - 0.9) < 1e-6
    with pytest.raises(ValueError, match="n must be"):
        detectable_difference(0, 0.5)
    with pytest.raises(ValueError, match="shares from 0 to 1"):
        detectable_difference(10, 50)


def test_units(model, tokenizer):
    """exp(nats) = 2^bits; and a model that knows nothing needs log2(V) bits a token."""
    assert math.isclose(2 ** bits_per_byte(3.0, 1), math.exp(3.0))
    blank = jax.tree.map(lambda x: 0 * x, model)
    text = "the cat and the mat: to be"
    bits = model_bits_per_byte(blank, tokenizer, [text], context=8)
    wanted = len(tokenizer.encode(text)) * math.log2(TINY.vocab_size) / len(text)
    assert math.isclose(bits, wanted, rel_tol=1e-5)


# estimators


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (5, 2), (6, 6), (8, 3)])
def test_pass_at_k_is_the_share_of_subsets(n, k):
    for c in range(n + 1):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert math.isclose(pass_at_k(n, c, k), np.mean([any(s) for s in subsets]), abs_tol=1e-12)


def test_pass_at_k_by_monte_carlo():
    """One minus a ratio of binomials, of shaped counts and large n; its mean over draws is the truth."""
    c = np.array([[0, 3], [150, 200]])
    theirs = [[1 - math.comb(200 - x, 100) / math.comb(200, 100) for x in row] for row in c]
    assert np.allclose(pass_at_k(200, c, 100), theirs)
    draws = np.random.default_rng(0).binomial(10, 0.3, 100_000)
    assert abs(pass_at_k(10, draws, 4).mean() - (1 - 0.7**4)) < 0.005
    for n, wrong, k in ((5, 1, 6), (5, 1, 0), (5, 6, 1), (5, -1, 1)):
        with pytest.raises(ValueError, match="need 1 <= k <= n"):
            pass_at_k(n, wrong, k)


def test_exact_match():
    assert plain_answer("  The  King's, a \n horse! ") == "kings horse"
    assert exact_match("The answer.", "answer") and not exact_match("answers", "answer")
    assert exact_match("b", ["a1", "b"]) and not exact_match("B", ["b"], strict=True)
    assert exact_match("banana", "banana") and plain_answer("banana") == "banana"
    with pytest.raises(ValueError, match="at least one answer"):
        exact_match("x", [])


# multiple choice


SPACED = Tokenizer(train_bpe(["the cat. \n\n the hat.\n\nthat cat"] * 2, 275), COURSE_SPECIAL)


@settings(deadline=None, max_examples=50)
@given(
    st.text("the cat\n. ", max_size=12), st.lists(st.text("the cat\n. ", min_size=1), min_size=1)
)
def test_choice_ids_make_the_text(prompt, choices):
    common, rest = choice_ids(SPACED, prompt, choices)
    assert len(rest) == len(choices) and common[0] == SPACED.bos_id
    assert prompt.startswith(SPACED.decode(common[1:]))
    for choice, ids in zip(choices, rest, strict=True):
        assert ids and common + ids == SPACED.encode(prompt + choice, bos=True)


@eqx.filter_jit
def forward(model, tokens):
    return model(tokens)


def logits_of(model, ids):
    """The logits of a few tokens, padded on the right so that one program serves all."""
    return forward(model, jnp.array((list(ids) + [0] * 64)[:64]))[: len(ids)]


def naive(model, tokenizer, prompt, choices):
    """One full forward pass for each choice: the sum of log-probabilities, and whether all are argmax."""
    common, rest = choice_ids(tokenizer, prompt, choices)
    sums, greedy = [], []
    for ids in rest:
        logits = np.asarray(logits_of(model, common + ids), np.float64)[len(common) - 1 : -1]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        sums.append(logs[np.arange(len(ids)), ids].sum())
        greedy.append(bool((logits.argmax(-1) == ids).all()))
    return sums, greedy


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_multiple_choice_is_the_full_forward(model, tokenizer, batch):
    scores = multiple_choice(model, tokenizer, ITEMS, prior=True, batch=batch)
    assert scores.answers.tolist() == [0, 2, 1]
    for i, item in enumerate(ITEMS):
        sums, greedy = naive(model, tokenizer, item.prompt, item.choices)
        assert np.allclose(scores.log_probs[i], sums, atol=1e-4)
        assert scores.greedy[i].tolist() == greedy
        assert np.allclose(
            scores.prior[i], naive(model, tokenizer, item.prior, item.choices)[0], atol=1e-4
        )
        lengths = [len(ids) for ids in choice_ids(tokenizer, item.prompt, item.choices)[1]]
        assert scores.tokens[i].tolist() == lengths
        assert scores.n_bytes[i].tolist() == [len(choice) for choice in item.choices]


def test_greedy_is_greedy_decoding(model, tokenizer):
    """What the model writes greedily is flagged; the same with another last token is not."""
    prompt = tokenizer.encode("the cat", bos=True)
    ids = list(prompt)
    for _ in range(4):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    wanted = ids[len(prompt) :]
    other = [*wanted[:-1], (wanted[-1] + 1) % 256]
    arrays = padded_choices([(prompt, [wanted, other])], 64)
    flags = choice_log_probs(model, *map(jnp.asarray, arrays))[1]
    assert flags.tolist() == [[True, False]]


def test_long_prompts_lose_their_oldest_tokens(model, tokenizer):
    long = Item("the cat sat on the mat " * 9, (" hat", " dog"), 0)
    kept = multiple_choice(model, tokenizer, [long], context=12)
    common, rest = choice_ids(tokenizer, long.prompt, long.choices)
    width = -(-max(map(len, rest)) // 4) * 4
    short = common[-(12 - width) :]
    for j, ids in enumerate(rest):
        logs = jax.nn.log_softmax(logits_of(model, short + ids)[len(short) - 1 : -1])
        wanted = np.asarray(logs)[np.arange(len(ids)), ids].sum()
        assert abs(kept.log_probs[0, j] - wanted) < 1e-4
    with pytest.raises(ValueError, match="leave no room in a context of 4"):
        multiple_choice(model, tokenizer, [long], context=4)


def test_rules(model, tokenizer):
    scores = multiple_choice(model, tokenizer, ITEMS[:2])
    assert np.allclose(scores.by("token") * scores.tokens, scores.by("raw"))
    assert np.allclose(scores.by("byte") * scores.n_bytes, scores.by("raw"))
    assert scores.correct("raw").tolist() == (scores.log_probs.argmax(1) == [0, 2]).tolist()
    with pytest.raises(ValueError, match="no rule 'letter'"):
        scores.by("letter")
    with pytest.raises(ValueError, match="prior=True"):
        scores.correct("prior")


def test_a_tokenizer_without_bos():
    bare = Tokenizer(train_bpe(["the cat. \n\n the hat."] * 2, 270), COURSE_SPECIAL)
    bare.bos_id = None
    common, rest = choice_ids(bare, "the cat", [" the hat", "."])
    assert common == bare.encode("the cat") and common + rest[0] == bare.encode("the cat the hat")
    with pytest.raises(ValueError, match="no token before 'x', and the tokenizer has no BOS"):
        choice_ids(bare, "", ["x"])


def test_bad_items(model, tokenizer):
    with pytest.raises(ValueError, match="0 items"):
        multiple_choice(model, tokenizer, [])
    with pytest.raises(ValueError, match="2 items: .* all with as many choices"):
        multiple_choice(model, tokenizer, [Item("a", ("b", "c"), 0), Item("a", ("b",), 0)])
    for choices, answer in ((("a", "b"), 2), (("a", "b"), -1), (("a", ""), 0)):
        with pytest.raises(ValueError, match="answer"):
            Item("x", choices, answer)


def test_ngram_choice_is_a_difference_of_texts():
    """log p(choice | prompt) = log p(prompt + choice) − log p(prompt), for prompts long and empty."""
    counter = NGram(4).fit([b"the cat and the dog and the cat that sat on the mat"])
    scores = ngram_choice(counter, ITEMS)
    for i, item in enumerate(ITEMS):
        for j, choice in enumerate(item.choices):
            whole, prompt = (item.prompt + choice).encode(), item.prompt.encode()
            known = counter.log_prob([prompt]).sum() if prompt else 0
            assert math.isclose(scores.log_probs[i, j], counter.log_prob([whole]).sum() - known)


# the cloze tasks


@pytest.mark.parametrize("template", ["play", "question"])
@pytest.mark.parametrize("make", [speaker_items, line_items])
def test_the_right_choice_is_what_the_play_says(make, template):
    items = make("validation", template=template)
    assert len(items) == 200 and items == make("validation", template=template)
    assert items != make("validation", template=template, seed=1)
    whole = "\n".join(play.text for play in plays("validation"))
    for item in items:
        assert len(set(item.choices)) == 4 or make is line_items
        text = item.prompt.removesuffix(item.prior)
        follows = [(text + c.removeprefix(" ")).rstrip() in whole for c in item.choices]
        assert follows[item.answer] and 100 < len(text) <= 400
        assert make is line_items or sum(follows) == 1


def test_items_of_another_kind():
    with pytest.raises(KeyError):
        speaker_items("validation", template="sonnet")
    with pytest.raises(ValueError, match="9999 items wanted"):
        line_items("validation", 9999)


def test_the_stored_scores_are_of_these_items():
    sys.path.insert(0, str(ROOT / "tools"))
    from evaluation_runs import RESULTS, ROWS, TASKS, digest

    stored = json.loads(RESULTS.read_text())
    assert len(ROWS) == len(stored["scores"]) == 6
    for model, task, template in ROWS:
        row = stored["scores"][f"{model}/{task}/{template}"]
        assert row["items"] == digest(TASKS[task]("validation", template=template))
        for field in ("log_probs", "prior", "tokens", "greedy"):
            assert np.shape(row[field]) == (200, 4)
    assert stored["bits_per_byte"]["SmolLM2"]["tokens"] > sum(map(len, excerpt())) / 5
