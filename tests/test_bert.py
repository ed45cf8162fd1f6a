"""Chapter 09: transformers, tokenizers, scikit-learn and rank_bm25 as references, properties, bad input."""

import json
import math
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
from tokenizers import BertWordPieceTokenizer

from llm_from_scratch import bert, datasets
from llm_from_scratch.bert import (
    BM25,
    Bert,
    BertConfig,
    BertWithHead,
    MaskedLM,
    NaiveBayes,
    Windows,
    WordPiece,
)

GOLDEN = Path(__file__).parent / "golden"
ARRAYS = load_file(GOLDEN / "bert.safetensors")
COUNTS = json.loads((GOLDEN / "bert.json").read_text(encoding="utf-8"))
STORED = json.loads((GOLDEN.parents[1] / "results" / "bert.json").read_text(encoding="utf-8"))
TINY = BertConfig(40, 16, 2, 4, 24, max_len=12)
SMALL = WordPiece("[PAD] [UNK] [CLS] [SEP] [MASK] to be ##e not un ##s , ab b".split())
quick = settings(max_examples=20, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def minilm():
    return bert.load_bert(bert.minilm_path())


def tiny_weights():
    prefix = "model."
    return {k.removeprefix(prefix): v for k, v in ARRAYS.items() if k.startswith(prefix)}


def tiny_masked_lm():
    """The golden BertForPreTraining as a MaskedLM."""
    weights = tiny_weights()
    model = MaskedLM(TINY, key=jax.random.key(0))
    head = "cls.predictions.transform."
    return eqx.tree_at(
        lambda m: [
            m.bert,
            m.transform.weight,
            m.transform.bias,
            m.norm.weight,
            m.norm.bias,
            m.bias,
        ],
        model,
        [
            bert.bert_from_tensors(TINY, weights),
            *(
                jnp.asarray(weights[head + n])
                for n in ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias")
            ),
            jnp.asarray(weights["cls.predictions.bias"]),
        ],
    )


def batch(*names):
    return [jnp.asarray(ARRAYS[name]) for name in names]


# the encoder -------------------------------------------------------------------------------------


def test_encoder_and_heads_are_transformers():
    model, weights = tiny_masked_lm(), tiny_weights()
    follows = eqx.tree_at(
        lambda m: (m.head.weight, m.head.bias),
        BertWithHead(model.bert, 2, key=jax.random.key(1)),
        tuple(jnp.asarray(weights[f"cls.seq_relationship.{n}"]) for n in ("weight", "bias")),
    )

    @jax.jit
    @jax.vmap
    def run(*inputs):
        hidden = model.bert(*inputs)
        return hidden, model.bert.pool(hidden)[0], model.logits(hidden), follows.classify(*inputs)

    hidden, pooled, words, scores = run(*batch("tokens", "real", "segments"))
    seen = ARRAYS["real"]
    assert np.abs(hidden - ARRAYS["hidden"])[seen].max() < 1e-5
    assert np.abs(pooled - ARRAYS["pooled"]).max() < 1e-5
    assert np.abs(words - ARRAYS["words"])[seen].max() < 1e-4
    assert np.abs(scores - ARRAYS["next"]).max() < 1e-5


def test_ten_sentences_are_sentence_transformers(minilm):
    vectors = bert.embed_sentences(*minilm, COUNTS["sentences"], batch=16)
    assert np.abs(vectors - ARRAYS["embeddings"]).max() < 1e-5
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_order_batch_and_padding_do_not_matter():
    model = Bert(BertConfig(14, 16, 1, 2, 24, max_len=64), key=jax.random.key(0))
    texts = ["to be", "not " * 40, "", "ab b , bees"]
    forward = bert.embed_sentences(model, SMALL, texts, max_len=64, batch=4)
    backward = bert.embed_sentences(model, SMALL, texts[::-1], max_len=64, batch=2)[::-1]
    alone = bert.embed_sentences(model, SMALL, texts[:1], max_len=64, batch=2)
    assert np.abs(forward - backward).max() < 1e-5 and np.abs(forward[0] - alone[0]).max() < 1e-5
    longer = bert.embed_sentences(model, SMALL, texts, batch=4)  # 256 by default, the model has 64
    assert np.abs(forward - longer).max() < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_who_sees_whom(causal):
    config = BertConfig(14, 16, 2, 2, 24, max_len=8, causal=causal)
    model = Bert(config, key=jax.random.key(0))
    run = eqx.filter_jit(lambda tokens: model(tokens))
    tokens = jnp.arange(5, 12)
    changed = np.abs(run(tokens.at[3].set(13)) - run(tokens)).max(axis=1) > 1e-6
    assert changed.tolist() == ([False] * 3 + [True] * 4 if causal else [True] * 7)


def test_one_array_for_input_and_output_words():
    model = MaskedLM(TINY, key=jax.random.key(0))
    shapes = [leaf.shape for leaf in jax.tree.leaves(model)]
    assert shapes.count((40, 16)) == 1


def small_arrays():
    """The arrays of a random Bert of TINY's shape, each with its path."""
    leaves = jax.tree_util.tree_flatten_with_path(Bert(TINY, key=jax.random.key(0)))[0]
    for path, leaf in leaves:
        yield jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(leaf)


def test_load_refuses_what_it_cannot_be(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(bert.minilm_path() / name, folder)
    raw = json.loads((folder / "config.json").read_text())

    def with_config(**changes):
        (folder / "config.json").write_text(json.dumps(raw | changes))
        bert.load_bert(folder)

    with pytest.raises(FileNotFoundError):
        with_config()
    save_file({"x": np.zeros(1, np.float32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="word_embeddings.weight is missing"):
        with_config()
    with pytest.raises(ValueError, match="no BERT with GELU"):
        with_config(hidden_act="relu")
    weights = {bert.hugging_face_names(TINY)[name]: x for name, x in small_arrays()}
    save_file(weights, folder / "model.safetensors")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 24, "max_position_embeddings": 12}
    with pytest.raises(ValueError, match="30522 pieces for vocab_size=40"):
        with_config(vocab_size=40, **shape)
    with pytest.raises(ValueError, match="no BERT with GELU"):
        with_config(model_type="roberta")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(ValueError, match="cased"):
        with_config()


# the tokenizer -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    return BertWordPieceTokenizer(str(bert.minilm_path() / "vocab.txt"), lowercase=True)


def test_word_pieces_are_the_librarys(minilm, reference):
    ours = minilm[1]
    for sentence, ids in zip(COUNTS["sentences"], COUNTS["ids"], strict=True):
        assert ours.encode(sentence, max_len=256)[0] == ids
    for text in (datasets.plays("test")[0].text, datasets.folio("test")[0].text):
        assert ours.pieces(text) == reference.encode(text, add_special_tokens=False).ids


@quick
@given(st.text(st.characters(exclude_categories=["Cn", "Co", "Cs"]), max_size=30))
def test_any_text_is_cut_as_the_library_does(minilm, reference, text):
    if "[" not in text:  # the library knows "[SEP]" in a text, we don't
        assert minilm[1].pieces(text) == reference.encode(text, add_special_tokens=False).ids


def test_pairs_and_truncation(minilm, reference):
    first, second = "To be or not to be " * 3, "that is the question"
    ids, segments = minilm[1].encode(first, second)
    theirs = reference.encode(first, second)
    assert (ids, segments) == (theirs.ids, theirs.type_ids)
    ids, segments = minilm[1].encode(first, second, max_len=10)
    assert len(ids) == len(segments) == 10 and segments.count(1) == 4
    assert ids[:6] == theirs.ids[:5] + [theirs.ids[-1]]  # a tie: the second text goes first
    assert minilm[1].encode("[SEP]")[0].count(minilm[1].sep_id) == 1


def test_longest_pieces_by_hand():
    assert SMALL.pieces("bes") == [SMALL.ids["be"], SMALL.ids["##s"]]
    assert SMALL.pieces("abb") == [SMALL.unknown_id]  # "ab" fits, "##b" does not: no second try
    assert SMALL.pieces("b" * 101) == [SMALL.unknown_id]


def test_bad_vocabularies_and_lengths():
    with pytest.raises(ValueError, match="size=5 leaves no word"):
        bert.common_words([], 5)
    with pytest.raises(ValueError, match="come twice"):
        WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "a"])
    with pytest.raises(ValueError, match="lacks .MASK."):
        WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    with pytest.raises(ValueError, match="max_len=1 is below the 2"):
        SMALL.encode("to be", max_len=1)


# masking -----------------------------------------------------------------------------------------


def test_fifteen_percent_eighty_ten_ten():
    words = WordPiece([*SMALL.vocabulary, *(f"w{i}" for i in range(1000))])
    random = np.random.default_rng(0)
    tokens = random.integers(0, words.vocab_size, (600, 100)).astype(np.int32)
    inputs, labels = bert.mask_tokens(tokens, words, random)
    chosen = labels >= 0
    assert not chosen[tokens < 5].any() and (labels[chosen] == tokens[chosen]).all()
    assert (inputs[~chosen] == tokens[~chosen]).all()
    n, ordinary = chosen.sum(), (tokens >= 5).sum()
    masked = (inputs == words.mask_id)[chosen].mean()
    same = (inputs == tokens)[chosen].mean()
    for share, expected, count in (
        (n / ordinary, 0.15, ordinary),
        (masked, 0.8, n),
        (same, 0.1, n),
    ):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count) + 2e-3


def test_loss_is_over_the_chosen_only():
    model = MaskedLM(BertConfig(14, 16, 1, 2, 24, max_len=8), key=jax.random.key(0))
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(5, 14, (3, 8)))
    labels = jnp.full((3, 8), -1).at[1, 2].set(7).at[2, 5].set(9)
    log_p = jax.jit(lambda t: jax.nn.log_softmax(jax.vmap(model)(t)))(tokens)
    measure = eqx.filter_jit(bert.masked_loss)
    loss, count = measure(model, {"tokens": tokens, "labels": labels})
    assert count == 2 and abs(loss + (log_p[1, 2, 7] + log_p[2, 5, 9]) / 2) < 1e-5
    at = jnp.asarray([[0, 1], [2, 3], [4, 5]])
    same, count = measure(model, {"tokens": tokens, "labels": labels, "at": at})
    assert count == 2 and abs(same - loss) < 1e-5
    nothing, count = measure(model, {"tokens": tokens, "labels": labels * 0 - 1})
    assert count == 0 and nothing == 0


def test_windows_are_a_function_of_the_cursor():
    tokens = np.random.default_rng(0).integers(5, 14, (40, 12)).astype(np.int32)
    one, other = (Windows(tokens, SMALL, 8, seed=3) for _ in range(2))
    assert all((one(5)[k] == other(5)[k]).all() for k in ("tokens", "labels", "at"))
    assert not (one(5)["tokens"] == one(6)["tokens"]).all()
    every = Windows(tokens, SMALL, 8, "next").following(tokens)
    assert (every[:, :-1] == tokens[:, 1:]).all() and (every[:, -1] == -1).all()
    batch = one(0)
    taken = np.take_along_axis(batch["labels"], batch["at"], axis=1)
    assert (taken >= 0).sum() == np.minimum((batch["labels"] >= 0).sum(1), 4).sum()
    with pytest.raises(ValueError, match="no objective 'other'"):
        Windows(tokens, SMALL, 8, "other")


def test_windows_of_a_play_keep_words_and_line_ends():
    play = datasets.plays("validation")[0]
    wordpiece = bert.common_words([play], 200)
    tokens, ends = bert.word_windows(play, wordpiece, 20)
    lines = [wordpiece.pieces(line) for line in bert.spoken_lines(play)]
    stream = np.concatenate([line for line in lines if line])
    assert (tokens[:, 1:-1].ravel() == stream[: tokens[:, 1:-1].size]).all()
    stops = np.cumsum([len(line) for line in lines if line]) - 1
    stops = stops[stops < tokens[:, 1:-1].size]
    assert (np.nonzero(ends[:, 1:-1].ravel())[0] == stops).all()
    assert (ends[:, [0, -1]] == -1).all()


# heads -------------------------------------------------------------------------------------------


def test_heads_have_their_shapes_and_share_one_layer():
    model = BertWithHead(Bert(TINY, key=jax.random.key(0)), 2, key=jax.random.key(1))
    run = jax.jit(lambda tokens: (model.classify(tokens), model.tag(tokens), model.span(tokens)))
    one, each, ends = run(jnp.arange(9))
    assert one.shape == (2,) and each.shape == (9, 2)
    assert np.abs(ends - each.T).max() < 1e-6


@quick
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 999))
def test_best_span_is_the_best_of_all(length, longest, seed):
    scores = np.random.default_rng(seed).normal(size=(2, length))
    allowed = [
        (scores[0, a] + scores[1, b], a, b)
        for a in range(length)
        for b in range(a, min(a + longest, length))
    ]
    assert bert.best_span(scores, longest) == max(allowed)[1:]


def test_impossible_configs():
    for change, message in (
        ({"dim": 10, "n_heads": 4}, "n_heads=4 does not divide dim=10"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"eps": 0.0}, "eps=0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            BertConfig(**change)
    with pytest.raises(ValueError, match="13 tokens exceed max_len=12"):
        Bert(TINY, key=jax.random.key(0))(jnp.zeros(13, jnp.int32))


# counts and search -------------------------------------------------------------------------------


def sparse_counts():
    return bert.sparse.csr_array(np.array(COUNTS["counts"], float))


def test_naive_bayes_is_scikit_learns():
    counts, labels = sparse_counts(), np.array(COUNTS["labels"])
    model = NaiveBayes(counts[:9], labels[:9])
    assert np.abs(model.scores(counts) - COUNTS["naive_bayes"]).max() < 1e-9
    with pytest.raises(ValueError, match="no text of class 1"):
        NaiveBayes(counts[:2], np.array([0, 2]))


def test_tf_idf_is_scikit_learns():
    counts = sparse_counts()
    frequency = np.bincount(counts.indices, minlength=counts.shape[1])
    found = bert.tf_idf(counts, frequency, counts.shape[0]).toarray()
    assert np.abs(found - COUNTS["tf_idf"]).max() < 1e-9


def test_bm25_is_rank_bm25s():
    index = BM25(COUNTS["texts"])
    for query, scores in zip(COUNTS["queries"], COUNTS["bm25"], strict=True):
        assert np.abs(index.scores(query) - scores).max() < 1e-9
    with pytest.raises(ValueError, match="at least one text"):
        BM25([])
    assert BM25(["", "!"]).scores("to be").tolist() == [0, 0]


def test_counts_drop_unknown_words():
    counts, vocabulary = bert.count_words(["To be, to BE!", "", "not"])
    assert list(vocabulary) == ["to", "be", "not"]
    assert counts.toarray().tolist() == [[2, 2, 0], [0, 0, 0], [0, 0, 1]]
    again, _ = bert.count_words(["not heard"], vocabulary)
    assert again.toarray().tolist() == [[0, 0, 1]]


def test_paraphrases_by_hand():
    assert bert.exchanged("Thy heart, my LOVE!") == "breast affection"
    text = "Thou hast my heart, sweet lord"
    assert bert.paraphrase(text, 0) == "thou hast my heart sweet lord"
    assert bert.paraphrase(text, 1) == "you have my heart sweet lord"
    assert bert.paraphrase(text, 2) == "you have my breast lovely nobleman"
    assert bert.paraphrase(text, 3) == "you have breast lovely"
    assert bert.paraphrase(text, 4) == "breast lovely you have"


def test_passages_are_all_the_lines_and_stay_in_their_scene():
    play = datasets.plays("validation")[0]
    found = bert.passages(play)
    assert [line for p in found for line in p.lines] == bert.spoken_lines(play)
    assert max(len(p.lines) for p in found) == 8
    both = found + bert.passages(datasets.plays("validation")[1])
    for choice in bert.next_choices(both):
        home = both[choice.first]
        assert (home.play, home.scene) == (both[choice.true].play, both[choice.true].scene)
        assert choice.true == choice.first + 1 != choice.same_play != choice.first
        assert both[choice.same_play].play == home.play != both[choice.other_play].play
    for few in (found, both[: len(found) + 2]):
        with pytest.raises(ValueError, match="needs two plays or more"):
            bert.next_choices(few)
    assert bert.rank_of(np.array([0.3, 0.9, 0.3]), 0) == 3


# stored runs -------------------------------------------------------------------------------------


def rows(arm):
    return [row for row in STORED["rows"] if row["arm"] == arm]


def test_stored_encoders_have_one_shape():
    arms = ["masked, both sides", "masked, left only", "next word, left only", "no pre-training"]
    assert len({row["parameters"] for row in STORED["rows"]}) == 1
    assert all([row["seed"] for row in rows(arm)] == [0, 1, 2] for arm in arms)
    assert all(len(row["loss"]) == 61 for arm in arms[:3] for row in rows(arm))
    assert all(row["at_mask"] < row["accuracy"] for arm in arms[:2] for row in rows(arm))


def test_search_is_complete():
    queries = STORED["search"]["queries"]
    assert len(queries) == 400 and len({q["passage"] for q in queries}) == 400
    assert all(len(q["bm25"]) == len(q["dense"]) == 5 for q in queries)
    assert len(STORED["search"]["next"]) == 38 and len(STORED["search"]["alone"]) == 400
    assert len(STORED["search"]["alone_cosine"]) == 400
