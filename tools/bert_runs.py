"""Chapter 09's long runs, into results/bert.json and results/bert.safetensors.

`python tools/bert_runs.py` makes what is missing (some twenty minutes of two cores' work from nothing): three seeds of small
encoders pre-trained in three ways and fine-tuned, then all passages of the plays through all-MiniLM-L6-v2 for
search, next-passage choice and the map. `--part search` or `--part encoders` makes one part again; `--part lacking`
makes runs again only for fields that their rows lack.
"""

import argparse
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from llm_from_scratch.attention import twin_pairs
from llm_from_scratch.bert import (
    BM25,
    SYNONYMS,
    BertConfig,
    BertWithHead,
    MaskedLM,
    Windows,
    best_span,
    common_words,
    embed_sentences,
    exchanged,
    load_bert,
    mask_tokens,
    masked_loss,
    minilm_path,
    next_choices,
    only_words,
    paraphrase,
    passages,
    rank_of,
    word_windows,
)
from llm_from_scratch.datasets import plays
from llm_from_scratch.training import count_parameters, fit
from llm_from_scratch.transformer import smoothed_cross_entropy

RESULTS = Path(__file__).resolve().parents[1] / "results" / "bert.json"
VECTORS = RESULTS.with_suffix(".safetensors")
COMMAND = ".venv/bin/python tools/bert_runs.py"

# Small encoders ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
SHAPE = {
    "vocab_size": 1024,
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 256,
    "max_len": 32,
}
STEPS, BATCH, RATE = 1200, 64, 5e-3
TUNE_WINDOWS, TUNE_STEPS, TUNE_RATE = 400, 300, 1e-3
SPAN_STEPS = 600
ARMS = {  # name: (objective, causal)
    "masked, both sides": ("masked", False),
    "masked, left only": ("masked", True),
    "next word, left only": ("next", True),
}
NAMES = "romeo hamlet antony caesar edward henry richard john gloucester warwick".split()
PLACES = "the court,the house,the old house,the field,rome,england,the city,a great city,the sea,the king 's house".split(
    ","
)


def optimizer(steps, rate):
    return optax.adamw(optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps))


def tag_loss(model, batch, key=None):
    scores = jax.vmap(model.tag)(batch["tokens"])
    each = jax.vmap(lambda z, t: smoothed_cross_entropy(z, t, 0.0))(scores, batch["labels"])
    count = jnp.sum(batch["labels"] >= 0)
    return jnp.sum(each) / count.astype(each.dtype), count


def span_loss(model, batch, key=None):
    scores = jax.vmap(model.span)(batch["tokens"], batch["real"], batch["segments"])
    each = jax.vmap(lambda z, t: smoothed_cross_entropy(z, t, 0.0))(scores, batch["labels"])
    return jnp.mean(each)


@eqx.filter_jit
def guesses(model, tokens):
    return jax.vmap(model)(tokens).argmax(-1)


@eqx.filter_jit
def tags(model, tokens):
    return jax.vmap(model.tag)(tokens).argmax(-1)


@eqx.filter_jit
def spans(model, batch):
    return jax.vmap(model.span)(batch["tokens"], batch["real"], batch["segments"])


def f1(found, labels):
    """F1 of class 1 over the labels that are not negative, in per cent."""
    hits = ((found == 1) & (labels == 1)).sum()
    return float(200 * hits / (((found == 1) & (labels >= 0)).sum() + (labels == 1).sum()))


def facts(wordpiece, random, size):
    """Questions like "where is romeo ?" with three facts, one of which answers; labels: first and last token."""
    rows = {name: np.zeros((size, SHAPE["max_len"]), np.int32) for name in ("tokens", "segments")}
    lengths, labels = np.zeros(size, np.int32), np.zeros((size, 2), np.int32)
    for row in range(size):
        who = random.choice(NAMES, 3, replace=False)
        where = random.choice(PLACES, 3, replace=False)
        asked = int(random.integers(3))
        told = [f"{a} is in {b}" for a, b in zip(who, where, strict=True)]
        question = f"where is {who[asked]} ?"
        ids, segments = wordpiece.encode(question, " , ".join(told) + " .")
        before = " , ".join([*told[:asked], f"{who[asked]} is in"])
        start = len(wordpiece.encode(question)[0]) + len(wordpiece.pieces(before))
        labels[row] = start, start + len(wordpiece.pieces(where[asked])) - 1
        rows["tokens"][row, : len(ids)], rows["segments"][row, : len(ids)] = ids, segments
        lengths[row] = len(ids)
    return rows | {"real": np.arange(SHAPE["max_len"])[None] < lengths[:, None], "labels": labels}


def data():
    wordpiece = common_words(plays("train"), SHAPE["vocab_size"])
    train = [word_windows(play, wordpiece) for play in plays("train")]
    held_out = [word_windows(play, wordpiece) for play in plays("validation")]
    return wordpiece, *(
        [np.concatenate(x) for x in zip(*part, strict=True)] for part in (train, held_out)
    )


def tune_tagger(bert, train, seed):
    random = np.random.default_rng(seed)
    few = random.permutation(len(train[0]))[:TUNE_WINDOWS]

    def batches(cursor):
        rows = few[np.random.default_rng([seed, cursor]).integers(0, len(few), BATCH)]
        return {"tokens": train[0][rows], "labels": train[1][rows]}

    model = BertWithHead(bert, 2, key=jax.random.fold_in(jax.random.key(seed), 1))
    schedule = optimizer(TUNE_STEPS, TUNE_RATE)
    state, log = fit(model, tag_loss, batches, schedule, steps=TUNE_STEPS, seed=seed, log_every=20)
    return state.model, [round(r["loss"], 3) for r in log]


def tune_span(bert, wordpiece, seed):
    def batches(cursor):
        return facts(wordpiece, np.random.default_rng([seed, cursor]), BATCH)

    model = BertWithHead(bert, 2, key=jax.random.fold_in(jax.random.key(seed), 2))
    state, _ = fit(
        model, span_loss, batches, optimizer(SPAN_STEPS, TUNE_RATE), steps=SPAN_STEPS, seed=seed
    )
    test = facts(wordpiece, np.random.default_rng(1000), 500)
    found = [best_span(scores) for scores in np.asarray(spans(state.model, test))]
    return 100 * float((np.array(found) == test["labels"]).all(axis=1).mean())


def pretrained(arm, seed, wordpiece, train, held_out):
    """The arm's model, and what is measured before any fine-tuning."""
    objective, causal = ARMS.get(arm, ("masked", False))
    config = BertConfig(**SHAPE, causal=causal)
    model, row = MaskedLM(config, key=jax.random.key(seed)), {}
    if arm not in ARMS:
        return model, row
    batches = Windows(train[0], wordpiece, BATCH, objective, seed)
    state, log = fit(
        model, masked_loss, batches, optimizer(STEPS, RATE), steps=STEPS, seed=seed, log_every=20
    )
    row["loss"] = [round(r["loss"], 3) for r in log]
    if objective == "masked":
        inputs, labels = mask_tokens(held_out[0], wordpiece, np.random.default_rng(0))
    else:
        inputs, labels = (
            held_out[0],
            Windows(held_out[0], wordpiece, 1, "next").following(held_out[0]),
        )
    right = np.asarray(guesses(state.model, inputs)) == labels
    row["accuracy"] = 100 * float(right[labels >= 0].mean())
    if objective == "masked":
        row["at_mask"] = 100 * float(right[(labels >= 0) & (inputs == wordpiece.mask_id)].mean())
    return state.model, row


def encoder_row(arm, seed, wordpiece, train, held_out):
    model, row = pretrained(arm, seed, wordpiece, train, held_out)
    row["parameters"] = count_parameters(model)
    tagger, losses = tune_tagger(model.bert, train, seed)
    row["f1"] = f1(np.asarray(tags(tagger, held_out[0])), held_out[1])
    if arm not in ARMS:
        row["tune_loss"] = losses
    if not model.bert.config.causal:
        row["span"] = tune_span(model.bert, wordpiece, seed)
    return row


def lacking(rows, write):
    """Add what older rows lack, by the same runs: the stored losses and F1 must come out."""
    parts = data()
    for (arm, seed), row in rows.items():
        if "at_mask" not in row and ARMS.get(arm, ("",))[0] == "masked":
            again = pretrained(arm, seed, *parts)[1]
            gap = np.abs(np.subtract(again["loss"], row["loss"])).max()
            print(arm, seed, f"accuracy {row['accuracy']:.2f}, again", again, gap, flush=True)
            row["at_mask"] = again["at_mask"]
            write()
        elif "tune_loss" not in row and arm not in ARMS:
            again = encoder_row(arm, seed, *parts)
            print(arm, seed, row, again, flush=True)
            row["tune_loss"] = again["tune_loss"]
            write()


def encoders(rows, write):
    parts = data()
    for seed in SEEDS:
        for arm in (*ARMS, "no pre-training"):
            if (arm, seed) not in rows:
                rows[arm, seed] = {"arm": arm, "seed": seed} | encoder_row(arm, seed, *parts)
                write()
                print({k: v for k, v in rows[arm, seed].items() if k != "loss"}, flush=True)


# Search, next passages, map ----------------------------------------------------------------------

QUERIES, KEPT = 400, 96
STRENGTHS = {"quoted": 0, "modern words": 1, "synonyms": 2, "mangled": 4}


def choose_queries(found):
    """Two lines in a row of one passage, at least three of their words in SYNONYMS, with a Folio twin."""
    old = {(pair.play, pair.modern): pair.old for pair in twin_pairs("all")}
    random, chosen = np.random.default_rng(0), []
    for i in random.permutation(len(found)):
        passage = found[i]
        for at in random.permutation(max(len(passage.lines) - 1, 0)):
            lines = passage.lines[at : at + 2]
            folio = [old.get((passage.play, line)) for line in lines]
            words = only_words(" ".join(lines))
            if None not in folio and sum(word in SYNONYMS for word in words) >= 3:
                row = {"passage": int(i), "line": int(at), "folio": " ".join(folio)}
                chosen.append(row)
                break
        if len(chosen) == QUERIES:
            break
    return chosen


def alone(found, queries, bert, wordpiece):
    """MiniLM's ranks among the queries' 400 passages, when only exchanged words are asked for, and the cosines."""
    targets = [found[query["passage"]] for query in queries]
    said = [
        " ".join(t.lines[q["line"] : q["line"] + 2]) for t, q in zip(targets, queries, strict=True)
    ]
    known = embed_sentences(bert, wordpiece, [target.text for target in targets])
    asked = embed_sentences(bert, wordpiece, [exchanged(text) for text in said])
    return {
        "alone": [rank_of(known @ vector, i) for i, vector in enumerate(asked)],
        "alone_cosine": (known * asked).sum(axis=1).astype(float).round(4).tolist(),
    }


def search():
    found = [passage for play in plays() for passage in passages(play)]
    bert, wordpiece = load_bert(minilm_path())
    vectors = embed_sentences(bert, wordpiece, [passage.text for passage in found])
    index, queries = BM25([passage.text for passage in found]), choose_queries(found)
    texts = {name: [] for name in (*STRENGTHS, "folio")}
    for query in queries:
        said = " ".join(found[query["passage"]].lines[query["line"] : query["line"] + 2])
        for name, strength in STRENGTHS.items():
            texts[name].append(paraphrase(said, strength))
        texts["folio"].append(query["folio"])
    for query in queries:
        query |= {"bm25": [], "dense": [], "cosine": []}
    for name in texts:
        asked = embed_sentences(bert, wordpiece, texts[name])
        for query, text, vector in zip(queries, texts[name], asked, strict=True):
            target, cosines = query["passage"], vectors @ vector
            query["bm25"].append(rank_of(index.scores(text), target))
            query["dense"].append(rank_of(cosines, target))
            query["cosine"].append(round(float(cosines[target]), 4))
    right = {play.slug: [] for play in plays()}
    for first, true, *false in next_choices(found):
        cosine = vectors[[true, *false]] @ vectors[first]
        right[found[first].play].append((cosine[0] > cosine[1:]).tolist())
    choice = {play: (100 * np.mean(r, axis=0)).round(2).tolist() for play, r in right.items()}
    kept = {"conditions": list(texts), "queries": queries, "next": choice}
    return found, vectors, kept | alone(found, queries, bert, wordpiece)


def scene_vectors(found, vectors):
    """The mean of each scene's passages, scaled to length 1: (scenes, D)."""
    keys = [(p.play, p.scene) for p in found]
    first = sorted({key: i for i, key in reversed(list(enumerate(keys)))}.values())
    number = np.cumsum(np.isin(np.arange(len(keys)), first)) - 1
    sums = np.zeros((len(first), vectors.shape[1]), np.float32)
    np.add.at(sums, number, vectors)
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def keep_map(found, vectors):
    scenes = scene_vectors(found, vectors)
    mean = scenes.mean(axis=0)
    axes = np.linalg.svd(scenes - mean[None], full_matrices=False)[2][:KEPT]
    axes *= np.sign(axes[np.arange(KEPT), np.abs(axes).argmax(axis=1)])[:, None]
    kept = {"mean": mean, "axes": axes, "scenes": (scenes - mean[None]) @ axes.T}
    save_file({name: np.ascontiguousarray(x, np.float16) for name, x in kept.items()}, VECTORS)
    spread = ((scenes - mean[None]) ** 2).sum()
    return float((kept["scenes"] ** 2).sum() / spread)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--part", choices=("search", "alone", "encoders", "lacking"), help="only this part, afresh"
    )
    part = parser.parse_args().part
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    if part == "encoders":
        stored["rows"] = []
    rows = {(row["arm"], row["seed"]): row for row in stored["rows"]}

    def write():
        lines = ",\n".join("  " + json.dumps(row) for row in rows.values())
        settings = {"steps": STEPS, "batch": BATCH, "rate": RATE, "shape": SHAPE}
        settings |= {
            "tune_windows": TUNE_WINDOWS,
            "tune_steps": TUNE_STEPS,
            "tune_rate": TUNE_RATE,
            "span_steps": SPAN_STEPS,
        }
        head = f'{{"command": "{COMMAND}",\n "settings": {json.dumps(settings)},\n "rows": [\n'
        tail = json.dumps(stored.get("search"), ensure_ascii=False).replace(
            '{"passage', '\n  {"passage'
        )
        RESULTS.write_text(f'{head}{lines}\n],\n "search": {tail}}}\n', encoding="utf-8")

    if part == "alone":
        found = [passage for play in plays() for passage in passages(play)]
        queries = stored["search"]["queries"]
        stored["search"] |= alone(found, queries, *load_bert(minilm_path()))
        write()
        return
    if part == "lacking":
        return lacking(rows, write)
    if part != "encoders" and (part == "search" or not stored.get("search")):
        found, vectors, stored["search"] = search()
        stored["search"]["spread_kept"] = keep_map(found, vectors)
        write()
    if part != "search":
        encoders(rows, write)


if __name__ == "__main__":
    main()
