"""Make chapter 16's stored runs: tiny models, sizes, and SmolLM2's answers, into results/in_context_learning.json.

`python tools/in_context_learning_runs.py` makes the rows that are missing (about half an hour on two cores from
nothing), `--part NAME` one part of tiny, sizes, gains, answers, orders, heads; `--fresh` makes them again. Chapter 16
reads the file and makes a slice of it again.
"""

import argparse
import functools
import itertools
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from llm_from_scratch.datasets import plays
from llm_from_scratch.formats import load, smollm2_path
from llm_from_scratch.in_context_learning import (
    KINDS,
    RepeatedBatches,
    Template,
    ablate,
    draw,
    few_shot,
    induction_scores,
    kind_task,
    label_log_probs,
    logits_and_maps,
    lookup_rows,
    mood_task,
    repeat_loss,
    snapshot,
    train_tiny,
)
from llm_from_scratch.llama import Llama, LlamaConfig, init_cache
from llm_from_scratch.pretraining import make_optimizer
from llm_from_scratch.training import count_parameters, fit

RESULTS = Path(__file__).resolve().parents[1] / "results" / "in_context_learning.json"
COMMAND = ".venv/bin/python tools/in_context_learning_runs.py"


def rounded(values, digits=4):
    """An array as nested lists of short numbers."""
    return np.round(np.asarray(values, np.float64), digits).tolist()


# Tiny models that continue repeated blocks -------------------------------------------------------

TINY = {"two layers": (2, 0), "one layer": (1, 0), "32 blocks": (2, 32)}  # layers, pool
TINY_SEEDS = (0, 1, 2, 3, 4)
FRESH = RepeatedBatches(batch=128, seed=10_000)(0)  # blocks that no training has seen


def lookup_accuracy(model, n=512):
    """Share of right answers, among all ids, after 0, 1, 2, … pairs of a random table."""
    tokens, _ = lookup_rows(n)
    parts = [logits_and_maps(model, jnp.array(part))[0] for part in np.split(tokens, n // 128)]
    return (np.concatenate(parts)[:, ::2].argmax(-1) == tokens[:, 1::2]).mean(0)


def tiny_row(arm, seed):
    n_layers, pool = TINY[arm]
    shots = []

    def watch(model):
        shots.append(snapshot(model, FRESH))
        return {}

    model, _ = train_tiny(n_layers, seed, pool=pool, evaluate=watch, eval_every=10)
    induction, previous = shots[-1]["induction"], shots[-1]["previous"]
    removed = {}
    if arm == "two layers":
        last = [(1, int(head)) for head in np.argsort(-induction[1])]
        removed = {f"best {n}": last[:n] for n in (1, 2, 3, 4)}
        removed["previous"] = [(0, int(np.argmax(previous[0])))]
    own = RepeatedBatches(batch=128, pool=pool, seed=seed)(10_000)
    return {
        "loss": rounded([shot["loss"] for shot in shots]),
        "induction": rounded([shot["induction"].max() for shot in shots]),
        "previous": rounded([shot["previous"].max() for shot in shots]),
        "own": float(repeat_loss(model, jax.tree.map(jnp.asarray, own))[0]),
        "lookup": rounded(lookup_accuracy(model)),
        "without": {k: snapshot(ablate(model, v), FRESH)["loss"] for k, v in removed.items()},
    }


# Sizes -------------------------------------------------------------------------------------------

SHAPES = {12: (2, 2), 16: (2, 2), 28: (2, 2), 48: (2, 4), 80: (3, 4)}  # width: layers, heads
SIZE_STEPS, SIZE_BATCH, CONTEXT = 600, 16, 128
SIZES = {f"width {width}": (width, 0.1) for width in SHAPES} | {"width 48, floor 1 %": (48, 0.01)}
SIZE_SEEDS = {"width 48": (0, 1, 2, 3, 4), "width 48, floor 1 %": (0, 1, 2, 3, 4)}


def size_config(width):
    """A Llama over bytes of this width; the feed-forward layer has ⅔ · 4 · width units, more or less."""
    layers, heads = SHAPES[width]
    hidden = 8 * round(width / 3)
    return LlamaConfig(
        256, width, layers, heads, heads, hidden, width // heads, max_seq_len=CONTEXT
    )


@functools.cache
def text(split):
    return np.frombuffer("".join(play.text for play in plays(split)).encode(), np.uint8)


def windows(split, starts):
    rows = text(split)[np.asarray(starts)[:, None] + np.arange(CONTEXT + 1)].astype(np.int32)
    return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


def byte_batches(seed):
    """Random windows of the training plays; the same ones for every size of a seed."""

    def batch(cursor):
        random = np.random.default_rng([seed, cursor])
        return windows("train", random.integers(0, len(text("train")) - CONTEXT - 1, SIZE_BATCH))

    return batch


@eqx.filter_jit
def bits(model, batch):
    """Bits of each target, "B T"."""
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(model(batch["tokens"])), batch["targets"][..., None], axis=-1
    )
    return -chosen[..., 0] / jnp.log(2.0)


def size_model(name, seed):
    """Train one size: GPT-3's constants, clipping, decay, 5 % warm-up and floor; constant batch, no tail, our rates."""
    width, floor = SIZES[name]
    optimizer = make_optimizer(steps=SIZE_STEPS, peak=0.32 / width, warmup=30, floor=floor)
    model = Llama(size_config(width), key=jax.random.key(seed))
    return fit(model, repeat_loss, byte_batches(seed), optimizer, steps=SIZE_STEPS, seed=seed)[
        0
    ].model


def profile(model):
    """Mean bits per byte of the validation plays by position in the window, 512 windows."""
    starts = np.linspace(0, len(text("validation")) - CONTEXT - 1, 512).astype(int)
    parts = [windows("validation", part) for part in np.split(starts, 8)]
    return np.concatenate([bits(model, jax.tree.map(jnp.asarray, p)) for p in parts]).mean(0)


def size_row(name, seed):
    model = size_model(name, seed)
    by_position = profile(model)
    weights = count_parameters(model) - model.embedding.size - model.output_weight.size
    return {
        "weights": weights,
        "bits_per_byte": float(by_position.mean()),
        "by_position": rounded(by_position, 3),
    }


def context_gain(model):
    """Bits saved on the same bytes by 65 to 72 bytes of context instead of 9 to 16, for each of 512 windows."""
    starts = np.linspace(0, len(text("validation")) - CONTEXT - 57, 512).astype(int)

    def read(at):
        parts = [windows("validation", part) for part in np.split(at, 8)]
        return np.concatenate([bits(model, jax.tree.map(jnp.asarray, p)) for p in parts])

    return (read(starts + 56)[:, 8:16] - read(starts)[:, 64:72]).mean(1)


GAINS = {f"width {width}, gain": f"width {width}" for width in (12, 80)}


def gains_row(name, seed):
    """Trains the model again: the models of the part "sizes" are not kept."""
    return {"gain": rounded(context_gain(size_model(GAINS[name], seed)), 3)}


# SmolLM2 -----------------------------------------------------------------------------------------

ARROW = Template("{} →", " {}\n")
QUESTION = Template("Question: What kind of thing is {}?\nAnswer:", " {}\n\n")
TOLD = Template("{} →", " {}\n", f"Say what kind of thing each word is: {', '.join(KINDS)}.\n\n")
TASKS = {"kinds": kind_task(), "moods": mood_task()}
LABELS = {"kinds": tuple(KINDS), "moods": ("negative", "positive")}
SHOTS = (0, 1, 2, 4, 8)
ANSWERS = {
    **{f"kinds, arrow, {k}": ("kinds", ARROW, k, "") for k in SHOTS},
    **{f"kinds, question, {k}": ("kinds", QUESTION, k, "") for k in SHOTS},
    **{f"moods, arrow, {k}": ("moods", ARROW, k, "") for k in SHOTS},
    **{f"kinds, told, {k}": ("kinds", TOLD, k, "") for k in (0, 8)},
    "kinds, random labels, 8": ("kinds", ARROW, 8, "random"),
    "moods, random labels, 8": ("moods", ARROW, 8, "random"),
}


@functools.cache
def smollm2():
    model, tokenizer = load(smollm2_path())
    tokenizer.bos_id = tokenizer.special["<|im_start|>"]  # it has no BOS; this opens a turn
    return model, tokenizer


def prompts(name):
    """The prompts of an arm's 200 questions, and the indices of the right labels."""
    task, template, k, control = ANSWERS[name]
    (pool, questions), labels = TASKS[task], LABELS[task]
    written = []
    for number, (query, _) in enumerate(questions):
        examples = draw(pool, k, number)
        if control == "random":
            random = np.random.default_rng([1, number])
            examples = [(x, labels[random.integers(len(labels))]) for x, _ in examples]
        written.append(few_shot(template, examples, query))
    return written, np.array([labels.index(answer) for _, answer in questions])


def described(scores, answers):
    """What is stored of scores "N C": every choice, its lead over the next one, and the labels' mass."""
    ordered = np.sort(scores, axis=1)
    chosen = scores.argmax(1)
    return {
        "chosen": "".join(map(str, chosen)),
        "lead": rounded(ordered[:, -1] - ordered[:, -2], 2),
        "mass": float(np.exp(scores).sum(1).mean()),
        "accuracy": float((chosen == answers).mean()),
    }


def label_tokens(task):
    return [f" {label}" for label in LABELS[task]]


def answers_row(name, _seed):
    written, answers = prompts(name)
    return described(label_log_probs(*smollm2(), written, label_tokens(ANSWERS[name][0])), answers)


# The same examples in another order ---------------------------------------------------------------

ORDERS = {"kinds, orders": ("kinds", 1), "moods, orders": ("moods", 2)}  # examples of each label


@eqx.filter_jit
def after_prefix(model, prefix, tokens, lengths):
    """Logits after each row of tokens, all of which follow one prefix "1 S" that is read once."""
    batch, slots = tokens.shape[0], prefix.shape[1] + tokens.shape[1]
    _, cache = model.hidden(prefix, cache=init_cache(model.config, 1, slots))
    cache = jax.tree.map(lambda x: jnp.repeat(x, batch, axis=0), cache)
    h, _ = model.hidden(tokens, cache=cache)
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return jax.nn.log_softmax(last @ model.output_weight.T)


def orders_row(name, _seed):
    task, each = ORDERS[name]
    model, tokenizer = smollm2()
    pool, questions = TASKS[task]
    chosen = [p for label in LABELS[task] for p in [q for q in pool if q[1] == label][:each]]
    every = list(itertools.permutations(range(len(chosen)))) if len(chosen) < 5 else None
    random = np.random.default_rng(0)
    orders = every or [random.permutation(len(chosen)).tolist() for _ in range(24)]
    ids = [tokenizer.encode(ARROW.question.format(q)) for q, _ in questions]
    width = max(map(len, ids))
    rows = jnp.array([row + [0] * (width - len(row)) for row in ids], jnp.int32)
    lengths = jnp.array([len(row) for row in ids], jnp.int32)
    first = jnp.array([tokenizer.encode(label)[0] for label in label_tokens(task)])
    answers = np.array([LABELS[task].index(answer) for _, answer in questions])
    found, shares = [], []
    for order in orders:
        shown = "".join(
            ARROW.question.format(x) + ARROW.answer.format(y) for x, y in (chosen[i] for i in order)
        )
        prefix = jnp.array([tokenizer.encode(shown, bos=True)], jnp.int32)
        logits = np.concatenate(
            [
                after_prefix(model, prefix, rows[i : i + 50], lengths[i : i + 50])[:, first]
                for i in range(0, 200, 50)
            ]
        )
        found.append(float((logits.argmax(1) == answers).mean()))
        shares.append(rounded(np.bincount(logits.argmax(1), minlength=len(first)) / 200, 3))
    examples = [list(pair) for pair in chosen]
    return {
        "examples": examples,
        "orders": [list(o) for o in orders],
        "accuracy": found,
        "shares": shares,
    }


# SmolLM2's induction heads ------------------------------------------------------------------------

HEADS = {"smollm2 heads": 8}


def twice(rows=4, half=32):
    """Random ids, twice: nothing but the first half helps with the second."""
    ids = np.random.default_rng(0).integers(1000, 40_000, (rows, half))
    return np.concatenate([ids, ids], 1).astype(np.int32)


def copies(model):
    """Mean nats of the first copies and of the second ones, both from their second id on; and the maps."""
    tokens = jnp.array(twice())
    logits, maps = logits_and_maps(model, tokens)
    logs = jax.nn.log_softmax(logits[:, :-1])
    nats = -jnp.take_along_axis(logs, tokens[:, 1:, None], -1)
    return [float(nats[:, :31].mean()), float(nats[:, 32:].mean())], maps


def on_labels(model, tokenizer, written):
    """Each head's weight, "L H", from the last position of a prompt to the labels of its examples.

    These follow the earlier copies of the last token, the arrow. Mean over the prompts.
    """
    ids = [tokenizer.encode(prompt, bos=True) for prompt in written]
    rows = np.array([row + [0] * (max(map(len, ids)) - len(row)) for row in ids], np.int32)
    maps = np.asarray(logits_and_maps(model, jnp.array(rows))[1])
    found = []
    for i, row in enumerate(ids):
        labels = [s + 1 for s, token in enumerate(row[:-1]) if token == row[-1]]
        found.append(maps[:, i, :, len(row) - 1, labels].sum(0))
    return np.mean(found, 0)


def ranked(scores, n):
    """The n (layer, head) with the largest scores."""
    order = np.argsort(scores, axis=None)[::-1][:n]
    return [tuple(int(i) for i in np.unravel_index(at, scores.shape)) for at in order]


def neighbours(heads, seed):
    """As many heads of the same layers, drawn from those that are not among them."""
    random, drawn = np.random.default_rng(seed), []
    for layer, _ in heads:
        free = [(layer, h) for h in range(9) if (layer, h) not in {*heads, *drawn}]
        drawn.append(free[random.integers(len(free))])
    return drawn


def heads_row(name, _seed):
    model, tokenizer = smollm2()
    nats, maps = copies(model)
    scores = induction_scores(maps, twice())
    top = ranked(scores, HEADS[name])
    arms = {"induction": top} | {f"others {s}": neighbours(top, s) for s in range(3)}
    written, answers = prompts("kinds, arrow, 4")
    row = {"scores": rounded(scores, 3), "repeated": {"none": nats}, "answers": {}}
    seen = on_labels(model, tokenizer, written[:24])
    row["on labels"] = rounded([seen[head] for head in top], 3)
    for arm, heads in arms.items():
        changed = ablate(model, heads)
        row["repeated"][arm] = copies(changed)[0]
        scored = label_log_probs(changed, tokenizer, written, label_tokens("kinds"))
        row["answers"][arm] = {"heads": heads} | described(scored, answers)
    return row


PARTS = {
    "tiny": (tiny_row, {arm: TINY_SEEDS for arm in TINY}),
    "sizes": (size_row, {arm: SIZE_SEEDS.get(arm, (0, 1, 2)) for arm in SIZES}),
    "gains": (gains_row, dict.fromkeys(GAINS, (0, 1, 2))),
    "answers": (answers_row, dict.fromkeys(ANSWERS, (0,))),
    "orders": (orders_row, dict.fromkeys(ORDERS, (0,))),
    "heads": (heads_row, dict.fromkeys(HEADS, (0,))),
}


def stored():
    """The rows of results/in_context_learning.json."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="only this part")
    parser.add_argument("--fresh", action="store_true", help="also make the rows that are there")
    options = parser.parse_args()
    wanted = [options.part] if options.part else list(PARTS)
    rows = {(row["arm"], row["seed"]): row for row in stored()}
    keys = [(p, arm, seed) for p in PARTS for arm, seeds in PARTS[p][1].items() for seed in seeds]
    for part, arm, seed in keys:
        if part not in wanted or ((arm, seed) in rows and not options.fresh):
            continue
        rows[arm, seed] = {"part": part, "arm": arm, "seed": seed} | PARTS[part][0](arm, seed)
        ordered = [rows[a, s] for _, a, s in keys if (a, s) in rows]
        body = ",\n".join("  " + json.dumps(row) for row in ordered)
        RESULTS.write_text(f'{{"command": "{COMMAND}",\n "rows": [\n{body}\n]}}\n')
        shown = {k: round(v, 3) for k, v in rows[arm, seed].items() if isinstance(v, float)}
        print(f"{arm:24} seed {seed}  {shown}", flush=True)


if __name__ == "__main__":
    main()
