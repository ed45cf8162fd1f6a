"""Train chapter 08's small GPT-2, ask it for missing words, fine-tune it, and climb from GPT-2 to Llama 3, into results/gpt2.json.

`python tools/gpt2_runs.py` makes what is missing (about half an hour on two cores from nothing), `--part NAME` one
part, `--fresh` also what is there. The weights of the small GPT-2 go to results/gpt2.safetensors, in half precision;
the parts that use them read them from there. Chapter 08 reads both files and makes some of the rows again.
"""

import argparse
import functools
import json
import math
import re
from collections import Counter
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_from_scratch import datasets
from llm_from_scratch.attention import (
    causal_mask,
    merge_heads,
    scaled_dot_product_attention,
    split_heads,
)
from llm_from_scratch.bigram import NGram
from llm_from_scratch.gpt2 import GPT2, Classifier, GPT2Config, class_nats, mean_nats, token_nats
from llm_from_scratch.tokenizer import Tokenizer, read_ranks
from llm_from_scratch.training import (
    count_parameters,
    fit,
    is_trainable,
    load_weights,
    save_weights,
)
from llm_from_scratch.transformer import LayerNorm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "gpt2.json"
WEIGHTS = RESULTS.with_suffix(".safetensors")
COMMAND = ".venv/bin/python tools/gpt2_runs.py"
CONTEXT = 128
CONFIG = GPT2Config(vocab_size=1024, max_seq_len=CONTEXT, dim=96, n_layers=4, n_heads=4)

# Data --------------------------------------------------------------------------------------------


@functools.cache
def tokenizer():
    """256 bytes, 767 merges, one end of text: the first ranks of the 4,096 learned from the training plays."""
    ranks = read_ranks(ROOT / "checkpoints" / "mini-llama3-short" / "tokenizer.model")
    ranks = {token: rank for token, rank in ranks.items() if rank < CONFIG.vocab_size - 1}
    end = "<|endoftext|>"
    return Tokenizer(ranks, [end], bos=end, eos=end, stop=[end])


@functools.cache
def ids_of(split):
    """All plays of a split in one row, an end-of-text token before each."""
    parts = [tokenizer().encode(play.text, bos=True) for play in datasets.plays(split)]
    return np.concatenate([np.array(part, np.int32) for part in parts])


def batches(seed, size):
    """Windows of CONTEXT + 1 tokens that begin anywhere in the training plays."""
    ids = ids_of("train")

    def batch(cursor):
        draw = np.random.default_rng([seed, cursor])
        starts = draw.integers(0, len(ids) - CONTEXT, size)
        return {"tokens": ids[starts[:, None] + np.arange(CONTEXT + 1)]}

    return batch


@functools.cache
def validation_windows():
    """Windows over the validation plays that predict each token once, and the bytes they predict."""
    ids = ids_of("validation")
    count = (len(ids) - 1) // CONTEXT
    windows = ids[np.arange(count)[:, None] * CONTEXT + np.arange(CONTEXT + 1)]
    return windows, len(tokenizer().decode_bytes(ids[1 : count * CONTEXT + 1]))


@eqx.filter_jit
def nats_of(model, windows):
    return jax.lax.map(lambda w: token_nats(model, w).sum(), windows, batch_size=64).sum()


def bits(model):
    """Bits per byte on the validation plays, in windows of CONTEXT tokens."""
    windows, n_bytes = validation_windows()
    return float(nats_of(model, jnp.asarray(windows))) / math.log(2) / n_bytes


def adam(steps, peak):
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps, peak / 10)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))


# The small GPT-2 ---------------------------------------------------------------------------------

BASE_STEPS, BASE_BATCH, PEAK = 1500, 16, 3e-3


def base_row():
    model = GPT2(CONFIG, key=jax.random.key(0))
    optimizer = adam(BASE_STEPS, PEAK)
    state, rows = fit(
        model, mean_nats, batches(0, BASE_BATCH), optimizer, steps=BASE_STEPS, log_every=100
    )
    halved = jax.tree.map(lambda x: x.astype(jnp.float16) if is_trainable(x) else x, state.model)
    save_weights(WEIGHTS, halved)
    return {
        "parameters": count_parameters(model),
        "tokens": BASE_STEPS * BASE_BATCH * CONTEXT,
        "loss": [round(row["loss"], 4) for row in rows],
        "bits": bits(state.model),
        "bits_half": bits(small_gpt2()),
    }


def small_gpt2():
    """The stored small GPT-2, widened to fp32 by NumPy (not every processor has half precision)."""
    model = eqx.filter_eval_shape(GPT2, CONFIG, key=jax.random.key(0))
    like = jax.tree.map(lambda x: np.zeros(x.shape, np.float16), model)
    loaded = load_weights(WEIGHTS, jax.tree.map(jnp.asarray, like))
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(np.float32)), loaded)


# From GPT-2 to Llama 3 ---------------------------------------------------------------------------

LADDER_STEPS, LADDER_BATCH, LADDER_LAYERS = 250, 8, 2
SEEDS = (0, 1, 2)
CHANGES = {  # each row of the ladder is the one before it with these
    "GPT-2": {},
    "no biases": {"biases": False},
    "RMSNorm": {"norm": "rms"},
    "rotary": {"positions": "rotary"},
    "SwiGLU": {"feed_forward": "swiglu", "hidden_dim": 256},  # 3 · 256 = 2 · 384
    "grouped queries": {"kv_heads": 2, "hidden_dim": 288},  # what keys and values save goes to F
    "untied head": {"tied": False},
}
START = {
    "biases": True,
    "norm": "layer",
    "positions": "learned",
    "feed_forward": "gelu",
    "hidden_dim": 384,
    "kv_heads": 4,
    "tied": True,
    "start": 0.02,  # standard deviation of the matrices that read into the feed-forward layer
}
LADDER = {}
for _name, _change in CHANGES.items():
    LADDER[_name] = (LADDER[list(LADDER)[-1]] if LADDER else START) | _change
for _name in ("rotary", "SwiGLU"):  # beside the ladder: the feed-forward inputs start at 1/√D
    LADDER[_name + ", wide start"] = LADDER[_name] | {"start": CONFIG.dim**-0.5}


def rotate(x):
    """Rotary positions: turn the pair (i, i + Dh/2) of row t by the angle t · 10000^(−2i/Dh)."""
    half = x.shape[-1] // 2
    frequency = 10_000 ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency[None]
    cos, sin = jnp.cos(angle)[None], jnp.sin(angle)[None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class RMSNorm(eqx.Module):
    """Each row over its root mean square, times a gain."""

    weight: jax.Array

    def __init__(self, dim):
        self.weight = jnp.ones(dim)

    def __call__(self, x):
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * self.weight[None]


class Rung(eqx.Module):
    """A language model between GPT-2 and Llama 3; `shape` says where. Weights (out, in)."""

    embedding: jax.Array
    positions: jax.Array | None
    head: jax.Array | None
    layers: list[dict]
    norm: eqx.Module
    shape: tuple = eqx.field(static=True)

    def __init__(self, shape, *, key):
        for_tables, for_layers = jax.random.split(key)
        tables = jax.random.split(for_tables, 3)
        d, n = CONFIG.dim, LADDER_LAYERS
        out = 0.02 / math.sqrt(2 * n)
        kv = shape["kv_heads"] * d // CONFIG.n_heads
        f = shape["hidden_dim"]
        sizes = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d), "1": (f, d), "2": (d, f)}
        if shape["feed_forward"] == "swiglu":
            sizes["3"] = (f, d)

        def norm():
            if shape["norm"] == "rms":
                return RMSNorm(d)
            plain = LayerNorm(d)
            return plain if shape["biases"] else eqx.tree_at(lambda m: m.bias, plain, 0.0)

        def layer(key):
            keys = dict(zip(sizes, jax.random.split(key, len(sizes)), strict=True))
            scale = dict.fromkeys("qkv", 0.02) | dict.fromkeys("o2", out)
            scale |= dict.fromkeys("13", shape["start"])
            made = {"w" + k: scale[k] * jax.random.normal(keys[k], s) for k, s in sizes.items()}
            if shape["biases"]:
                made |= {"b" + k: jnp.zeros(s[0]) for k, s in sizes.items()}
            return made | {"norm_1": norm(), "norm_2": norm()}

        def table(key, rows):
            return 0.02 * jax.random.normal(key, (rows, d))

        self.embedding = table(tables[0], CONFIG.vocab_size)
        learned = shape["positions"] == "learned"
        self.positions = table(tables[1], CONTEXT) if learned else None
        self.head = None if shape["tied"] else table(tables[2], CONFIG.vocab_size)
        self.layers = [layer(k) for k in jax.random.split(for_layers, n)]
        self.norm, self.shape = norm(), tuple(shape.items())

    def __call__(self, tokens):
        shape, heads = dict(self.shape), CONFIG.n_heads

        def linear(x, layer, name):
            y = x @ layer["w" + name].T
            return y + layer["b" + name][None] if shape["biases"] else y

        def normed(norm, x):
            if isinstance(norm, LayerNorm) and not shape["biases"]:
                norm = eqx.tree_at(lambda m: m.bias, norm, jnp.zeros(CONFIG.dim))
            return norm(x)

        x = self.embedding[tokens]
        if self.positions is not None:
            x = x + self.positions[: len(tokens)]
        for layer in self.layers:
            y, group = normed(layer["norm_1"], x), heads // shape["kv_heads"]
            q = split_heads(linear(y, layer, "q"), heads)
            k, v = (split_heads(linear(y, layer, n), shape["kv_heads"]) for n in "kv")
            if shape["positions"] == "rotary":
                q, k = rotate(q), rotate(k)
            k, v = (jnp.repeat(part, group, axis=0) for part in (k, v))
            y = scaled_dot_product_attention(q, k, v, causal_mask(len(x))[None])
            x = x + linear(merge_heads(y), layer, "o")
            y = normed(layer["norm_2"], x)
            up = linear(y, layer, "1")
            if shape["feed_forward"] == "swiglu":
                up = jax.nn.silu(up) * linear(y, layer, "3")
            else:
                up = jax.nn.gelu(up)
            x = x + linear(up, layer, "2")
        return normed(self.norm, x) @ (self.embedding if self.head is None else self.head).T


def ladder_row(name, seed, steps=LADDER_STEPS):
    model = Rung(LADDER[name], key=jax.random.key(seed))
    window = jax.ShapeDtypeStruct((CONTEXT,), jnp.int32)
    flops = jax.jit(lambda m, t: m(t)).lower(model, window).cost_analysis()["flops"]
    optimizer = adam(LADDER_STEPS, PEAK)
    data = batches(seed, LADDER_BATCH)
    state, rows = fit(model, mean_nats, data, optimizer, steps=steps, seed=seed, log_every=25)
    return {
        "parameters": count_parameters(model),
        "mflop_per_token": round(flops / CONTEXT / 1e6, 3),
        "loss": [round(row["loss"], 4) for row in rows],
        "bits": bits(state.model) if steps == LADDER_STEPS else None,
    }


# Missing words -----------------------------------------------------------------------------------

ITEMS, OPTIONS, BEFORE = 400, 10, 300


@functools.cache
def word_counts():
    """How often each word of four or more small letters occurs in the training plays."""
    text = "\n".join(play.text for play in datasets.plays("train"))
    return Counter(re.findall(r"(?<![\w'])[a-z]{4,}(?![\w'])", text))


@functools.cache
def cloze_items():
    """Validation lines whose last word is missing: text before, ten words of like frequency, the rest, which is right."""
    counts = word_counts()
    draw, found = np.random.default_rng(8), []
    known = {word: n for word, n in counts.items() if 20 <= n <= 500}
    for play in datasets.plays("validation"):
        for match in re.finditer(r"(?<=[a-z,] )([a-z]{4,})([,.;:?!]?)\n", play.text):
            word = match[1]
            if word in known and match.start() > BEFORE:
                before = play.text[match.start() - BEFORE : match.start() - 1]
                found.append((before[before.index(" ") :], word, match[2] + "\n"))
    items = []
    for i in sorted(draw.choice(len(found), ITEMS, replace=False)):
        before, word, after = found[i]
        n = known[word]
        like = sorted(w for w, m in known.items() if n / 1.5 <= m <= 1.5 * n and w != word)
        options = [word, *draw.choice(like, OPTIONS - 1, replace=False).tolist()]
        order = draw.permutation(OPTIONS)
        items.append((before, [options[j] for j in order], after, int(order.argmin())))
    return items


@eqx.filter_jit
def option_nats(model, tokens, first):
    """For each row the nats of the tokens from number `first` on; tokens below 0 are padding."""

    def one(row, start):
        nats = token_nats(model, jnp.maximum(row, 0))
        at = jnp.arange(1, len(row))
        return jnp.where((at >= start) & (row[1:] >= 0), nats, 0.0).sum()

    return jax.vmap(one)(tokens, first)


def choose(model, items, whole=True):
    """For each item the option that the model finds likeliest, with the text before it or only its line."""
    codec, chosen = tokenizer(), []
    for before, options, after, _ in items:
        given = before if whole else before.rpartition("\n")[2]
        start = codec.encode(given, bos=not whole)
        rows = [codec.encode(f"{given} {o}{after}", bos=not whole)[-CONTEXT:] for o in options]
        full = [len(codec.encode(f"{given} {o}{after}", bos=not whole)) for o in options]
        tokens = np.full((OPTIONS, CONTEXT), -1, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        first = [len(start) - (n - len(r)) for n, r in zip(full, rows, strict=True)]
        nats = option_nats(model, jnp.asarray(tokens), jnp.asarray(first, jnp.int32))
        chosen.append(int(np.asarray(nats).argmin()))
    return chosen


def choose_ngram(items, order=6):
    """The same by chapter 01's best counter, which sees the five bytes before each byte."""
    counter = NGram(order).fit([play.text.encode() for play in datasets.plays("train")])
    chosen = []
    for before, options, after, _ in items:
        texts = [f"{before} {o}{after}".encode() for o in options]
        skip = len(before.encode())
        chosen.append(int(np.argmax([counter.log_prob([t])[skip:].sum() for t in texts])))
    return chosen


def cloze_row():
    items, model = cloze_items(), small_gpt2()
    return {
        "right": [right for *_, right in items],
        "GPT-2": choose(model, items),
        "GPT-2, this line only": choose(model, items, whole=False),
        "6-gram": choose_ngram(items),
        "most frequent": [
            int(np.argmax([word_counts()[o] for o in options])) for _, options, _, _ in items
        ],
    }


# Verse or prose ----------------------------------------------------------------------------------

LENGTH, CLASS_BATCH = 64, 16
CLASS_STEPS = {200: 60, 2000: 500}  # by the number of labels
CLASS_PEAK = {"fine-tuned": 1e-3, "from scratch": 2e-3}


def form(speech):
    """1 for verse, whose printed lines all begin with a capital, 0 for prose, 2 when it isn't clear."""
    if len(speech.lines) < 3:
        return 2
    capitals = [not line[:1].islower() for line in speech.lines[1:]]
    return 1 if all(capitals) else 0 if np.mean(capitals) <= 0.25 else 2


@functools.cache
def speeches(splits):
    """As many speeches in verse as in prose: texts in small letters without line breaks, labels."""
    spoken = [s for split in splits for play in datasets.plays(split) for s in play.speeches]
    by_form = {label: [s for s in spoken if form(s) == label] for label in (0, 1)}
    draw, n = np.random.default_rng(80), min(map(len, by_form.values()))
    rows = [
        (" ".join(by_form[label][i].lines).lower(), label)
        for label in (0, 1)
        for i in draw.permutation(len(by_form[label]))[:n]
    ]
    rows = [rows[i] for i in draw.permutation(len(rows))]
    return [text for text, _ in rows], np.array([label for _, label in rows], np.int32)


def padded(texts, labels):
    """The first LENGTH tokens of each text."""
    rows = [tokenizer().encode(text, bos=True)[:LENGTH] for text in texts]
    tokens = np.zeros((len(rows), LENGTH), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return {
        "tokens": tokens,
        "lengths": np.array([len(row) for row in rows], np.int32),
        "labels": np.asarray(labels, np.int32),
    }


@functools.cache
def class_data(n, seed):
    """n labelled training speeches, and those of the four held-out plays."""
    texts, labels = speeches(("train",))
    pick = np.random.default_rng(seed).permutation(len(texts))[:n]
    return ([texts[i] for i in pick], labels[pick]), speeches(("validation", "test"))


@eqx.filter_jit
def class_logits(model, tokens, lengths):
    return jax.lax.map(lambda row: model(*row), (tokens, lengths), batch_size=64)


def predictions(model, texts, labels):
    """The class that the model gives each text."""
    batch = padded(texts, labels)
    found = class_logits(model, jnp.asarray(batch["tokens"]), jnp.asarray(batch["lengths"]))
    return np.asarray(found).argmax(-1)


def tuned(arm, n, seed, trunk=None):
    """A classifier trained on n labels, all its weights, from the stored GPT-2 or from random ones."""
    (texts, labels), _ = class_data(n, seed)
    for_trunk, for_head = jax.random.split(jax.random.key(seed))
    if trunk is None:
        trunk = small_gpt2() if arm == "fine-tuned" else GPT2(CONFIG, key=for_trunk)
    data, steps = padded(texts, labels), CLASS_STEPS[n]

    def batch(cursor):
        pick = np.random.default_rng([seed, cursor]).permutation(n)[:CLASS_BATCH]
        return {name: array[pick] for name, array in data.items()}

    model = Classifier(trunk, 2, key=for_head)
    optimizer = adam(steps, CLASS_PEAK[arm])
    return fit(model, class_nats, batch, optimizer, steps=steps, seed=seed)[0].model


@eqx.filter_jit
def features(trunk, tokens, lengths):
    return jax.lax.map(
        lambda row: trunk.hidden(row[0])[row[1] - 1], (tokens, lengths), batch_size=64
    )


def frozen(n, seed):
    """Predictions of a head alone, trained to convergence (L2 penalty 1e-3) on what the stored GPT-2 holds."""
    (texts, labels), held_out = class_data(n, seed)
    found = []
    for part in ((texts, labels), held_out):
        batch = padded(*part)
        found.append(
            features(small_gpt2(), *(jnp.asarray(batch[k]) for k in ("tokens", "lengths")))
        )
    middle, scale = found[0].mean(0, keepdims=True), found[0].std(0, keepdims=True)
    x, test = ((part - middle) / scale for part in found)
    y = jnp.asarray(2.0 * labels - 1)

    def loss(w):
        return jax.nn.softplus(-y * (x @ w[:-1] + w[-1])).mean() + 1e-3 * (w[:-1] ** 2).sum()

    w = jax.lax.fori_loop(0, 2000, lambda _, w: w - 0.1 * jax.grad(loss)(w), jnp.zeros(97))
    return np.asarray(test @ w[:-1] + w[-1] > 0).astype(int)


def seen(text):
    """The bytes of the tokens that the network sees."""
    return tokenizer().decode_bytes(tokenizer().encode(text, bos=True)[1:LENGTH])


def counted(n, seed, order=4):
    """Predictions of two of chapter 01's counters, one for each class: the likelier one's class."""
    (texts, labels), (held_out, _) = class_data(n, seed)
    scores = []
    for label in (0, 1):
        of_class = [seen(t) for t, form in zip(texts, labels, strict=True) if form == label]
        counter = NGram(order).fit(of_class)
        scores.append([counter.log_prob([seen(text)]).sum() for text in held_out])
    return np.argmax(scores, axis=0)


CLASS_ARMS = ("fine-tuned", "from scratch", "frozen trunk", "4-grams")


def class_row(arm, n, seed):
    (_, _), (texts, labels) = class_data(n, seed)
    if arm == "frozen trunk":
        said = frozen(n, seed)
    elif arm == "4-grams":
        said = counted(n, seed)
    else:
        said = predictions(tuned(arm, n, seed), texts, labels)
    return {
        "arm": arm,
        "labels": n,
        "seed": seed,
        "said": "".join(map(str, said)),
        "accuracy": float((said == labels).mean()),
    }


# All of it ---------------------------------------------------------------------------------------

PARTS = ("base", "cloze", "classify", "ladder")


def stored():
    """What results/gpt2.json holds."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"command": COMMAND}


def write(found):
    text = []
    for part, value in found.items():
        if isinstance(value, list):
            rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in value)
            text.append(f'"{part}": [\n{rows}\n]')
        else:
            text.append(f'"{part}": {json.dumps(value, ensure_ascii=False)}')
    RESULTS.write_text("{" + ",\n ".join(text) + "}\n")


def add_rows(found, part, names, maker):
    """Make the rows of a part that are missing; `names` are the keys of a row, in order."""
    rows = found.setdefault(part, [])
    for name in names:
        if not any(name.items() <= row.items() for row in rows):
            rows.append(name | maker(*name.values()))
            write(found)
            shown = {k: round(v, 3) for k, v in rows[-1].items() if isinstance(v, float)}
            print(name, shown, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="only this part")
    parser.add_argument("--fresh", action="store_true", help="also what is there")
    options = parser.parse_args()
    found = stored()
    for part in [options.part] if options.part else PARTS:
        if options.fresh:
            found.pop(part, None)
        if part == "classify":
            names = [
                {"arm": arm, "labels": n, "seed": seed}
                for seed in SEEDS
                for n in CLASS_STEPS
                for arm in CLASS_ARMS
            ]
            add_rows(found, part, names, class_row)
        elif part == "ladder":
            names = [{"arm": arm, "seed": seed} for seed in SEEDS for arm in LADDER]
            add_rows(found, part, names, ladder_row)
        elif part not in found:
            found[part] = {"base": base_row, "cloze": cloze_row}[part]()
            write(found)
            print(part, {k: v for k, v in found[part].items() if isinstance(v, float)}, flush=True)


if __name__ == "__main__":
    main()
