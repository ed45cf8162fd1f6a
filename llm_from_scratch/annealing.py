"""The last part of a run: a learning rate that falls to zero, better data while it falls, data sets judged by it, the mean of the last weights; and the course's full run, which ends that way.

Written from chapters/24_annealing.py by `make export`: edit there.
"""

import dataclasses
import functools
import json
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from llm_from_scratch import datasets, formats, pretraining
from llm_from_scratch.data_mix import (
    MixedBatches,
    TokenFile,
    byte_sample,
    chunks,
    held_out,
    mix_files,
    mix_tokenizer,
    source_documents,
    write_tokens,
)
from llm_from_scratch.llama import Llama, count_params
from llm_from_scratch.pretraining import (
    Recipe,
    evaluation_windows,
    make_optimizer,
    mini_llama,
    model_bits_per_byte,
    next_token_loss,
)
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.training import (
    TrainState,
    fit,
    from_safetensors,
    is_trainable,
    verify_checkpoint,
    widen,
    write_durably,
)


def annealed(
    optimizer: optax.GradientTransformation, *, steps: int, anneal: int
) -> optax.GradientTransformation:
    """Let an optimiser's run of `steps` updates end with a linear anneal of its rate to zero.

    Update t (from 0) is the optimiser's, times min(1, (steps − t) / anneal): the last is 1 / anneal of its
    usual size, the next would be nothing. AdamW's update, decay included, is proportional to its rate, so
    this scales the rate, whatever its schedule. States do not depend on steps and anneal: a run may be
    resumed with others. Source: paper §3.4.3. Raises ValueError unless 1 <= anneal <= steps.
    """
    if not 1 <= anneal <= steps:
        raise ValueError(f"need 1 <= anneal <= steps, got anneal={anneal}, steps={steps}")
    factor = lambda count: jnp.clip((steps - count) / anneal, 0.0, 1.0)  # noqa: E731
    return optax.chain(optimizer, optax.scale_by_schedule(factor))


def anneal_mix(
    mix: Mapping[str, float],
    extra: Mapping[str, float],
    *,
    share: float,
    steps: int,
    anneal: int,
    accumulate: int = 1,
) -> list[tuple[int, dict[str, float]]]:
    """The schedule of `data_mix.MixedBatches` for a run that ends with `anneal` steps of a richer mix.

    `mix` and `extra` map sources to weights. In the last `anneal` of `steps` steps, of `accumulate` batches
    each, a row is drawn from `extra` with probability `share`, else from `mix`. Source: paper §3.1.3.
    Raises ValueError unless 0 <= share <= 1, 1 <= anneal <= steps and accumulate >= 1, and for weights that add up to 0.
    """
    if not (0 <= share <= 1 and 1 <= anneal <= steps and accumulate >= 1):
        raise ValueError(
            f"need 0 <= share <= 1, 1 <= anneal <= steps and accumulate >= 1, got share={share}, "
            f"anneal={anneal}, steps={steps}, accumulate={accumulate}"
        )
    if not (sum(mix.values()) > 0 and sum(extra.values()) > 0):
        raise ValueError(f"the weights of mix and of extra must add up to > 0: {mix}, {extra}")
    part = {name: (1 - share) * weight / sum(mix.values()) for name, weight in mix.items()}
    for name, weight in extra.items():
        part[name] = part.get(name, 0.0) + share * weight / sum(extra.values())
    begin = (steps - anneal) * accumulate
    return [(0, dict(mix)), (begin, part)] if begin else [(0, part)]


def averaged(
    optimizer: optax.GradientTransformation, *, start: int = 0, every: int = 1
) -> optax.GradientTransformation:
    """Let an optimiser keep the mean of the weights after updates start + every, start + 2 · every, …

    The mean is kept in fp32 (fp64 for fp64 weights) in the optimiser's state: `fit` checkpoints and
    resumes it, `averaged_model` reads it. It never influences the training. Must be the outermost
    wrapper, to see the weights that come out. Source: paper §3.4.3 (Polyak averaging); which
    checkpoints, it does not say. Raises ValueError unless start >= 0 and every >= 1.
    """
    if start < 0 or every < 1:
        raise ValueError(f"need start >= 0 and every >= 1, got start={start}, every={every}")

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        average = jax.tree.map(lambda w: jnp.zeros_like(widen(w)), params)
        return {
            "inner": optimizer.init(params),
            "average": average,
            "updates": zero,
            "taken": zero,
        }

    def update(grads, state, params=None):
        if params is None:
            raise ValueError("averaged needs the weights: update(grads, state, params)")
        updates, inner = optimizer.update(grads, state["inner"], params)
        count = state["updates"] + 1
        due = (count > start) & ((count - start) % every == 0)
        taken = state["taken"] + due.astype(jnp.int32)
        share = due.astype(jnp.float32) / jnp.maximum(taken, 1).astype(jnp.float32)  # 0: it stays
        average = jax.tree.map(
            lambda mean, w: mean + share.astype(mean.dtype) * (widen(w) - mean),
            state["average"],
            optax.apply_updates(params, updates),
        )
        return updates, {"inner": inner, "average": average, "updates": count, "taken": taken}

    return optax.GradientTransformation(init, update)


def averaged_model(state: TrainState) -> Any:
    """The model of a state whose optimiser is `averaged`, with the mean weights, in the weights' dtypes.

    Raises ValueError if the optimiser keeps no average, or has taken none yet.
    """
    kept = state.opt_state if isinstance(state.opt_state, dict) else {}
    if "average" not in kept:
        raise ValueError("the optimiser keeps no average: wrap it, averaged(optimizer, ...), last")
    if not int(kept["taken"]):
        raise ValueError(f"no weights averaged yet, after {int(kept['updates'])} updates")
    params, rest = eqx.partition(state.model, is_trainable)
    return eqx.combine(
        jax.tree.map(lambda w, mean: mean.astype(w.dtype), params, kept["average"]), rest
    )


def mean_weights(models: Iterable[Any]) -> Any:
    """The mean of models of one shape, summed in fp64, in the dtypes of the first. Only the first, the sum and one more are held.

    What is not a weight (see `training.is_trainable`) is the first model's. Raises ValueError without a
    model, and for one whose weights have other shapes.
    """
    total, first, count = None, None, 0
    for model in models:
        weights = eqx.filter(model, is_trainable)
        added = [np.asarray(w, np.float64) for w in jax.tree.leaves(weights)]
        if total is None:
            first, total = model, added
        elif [a.shape for a in added] != [t.shape for t in total]:
            raise ValueError(f"model {count} has weights of other shapes than model 0")
        else:
            total = [t + a for t, a in zip(total, added, strict=True)]
        count += 1
    if not count:
        raise ValueError("mean_weights needs at least one model, got none")
    params, rest = eqx.partition(first, is_trainable)
    leaves, structure = jax.tree.flatten(params)
    means = [jnp.asarray(t / count, w.dtype) for t, w in zip(total, leaves, strict=True)]
    return eqx.combine(jax.tree.unflatten(structure, means), rest)


def average_checkpoints(paths: Iterable[str | Path], like: TrainState) -> Any:
    """The mean model of checkpoint folders that `fit` wrote, as of `mean_weights`; `like` has their structure.

    `training.checkpoints(directory)` lists the folders of a run, of which `fit` keeps the last two.
    Raises ValueError without a path and for a checkpoint that is damaged or does not fit, OSError for
    a missing one; both name it.
    """

    def models():
        for path in map(Path, paths):
            files = verify_checkpoint(path)
            where = str(path / "state.safetensors")
            yield from_safetensors(files["state.safetensors"], like, where).model

    return mean_weights(models())


@eqx.filter_jit
def token_bits(
    model: Llama, tokens: Int[Array, "B T"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """The bits that each target costs; those below 0 cost nothing."""
    logits = model(tokens).astype(jnp.float32)
    found = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.where(targets < 0, 0.0, found) / math.log(2)


def play_bits(model: Llama, tokenizer: Tokenizer, play: datasets.Play) -> dict[str, float]:
    """Bits per byte of a play: the whole, the lines that name a speaker, and the rest.

    A token counts where its first byte stands; the blank line before a label is of the rest. Windows have the length
    of the model's max_seq_len, half of it new.
    """
    speakers = {speech.speaker for speech in play.speeches} - {""}
    lines = play.text.splitlines(keepends=True)
    sizes = [len(line.encode()) for line in lines]
    label = np.repeat([line.strip() in speakers for line in lines], sizes)  # by byte
    ids = np.array(tokenizer.encode(play.text, bos=True))
    begins = np.cumsum([0, *(len(tokenizer.decode_bytes([i])) for i in ids[1:-1])])
    named = label[begins]  # by target, as its first byte
    context = model.config.max_seq_len
    windows = evaluation_windows(ids, context, context // 2)
    rows = [slice(i, i + 16) for i in range(0, len(windows[0]), 16)]
    found = np.concatenate([token_bits(model, *(part[r] for part in windows)) for r in rows])
    bits = found[windows[1] >= 0].astype(np.float64)  # every target once, in its order
    labels, rest = float(bits[named].sum()), float(bits[~named].sum())
    return {
        "whole": (labels + rest) / label.size,
        "labels": labels / int(label.sum()),
        "rest": rest / int((~label).sum()),
    }


CASTINGS = 4  # how often each training play is recast
_WORD = re.compile("[A-Za-z]+")


@functools.cache
def _lower_words() -> frozenset[str]:
    """The words that the training plays or the Bible write in small letters: no names."""
    texts = [*(play.text for play in datasets.plays("train")), *source_documents("bible")]
    return frozenset(word for text in texts for word in _WORD.findall(text) if word.islower())


def _is_name(word: str) -> bool:
    return len(word) > 2 and word.lower() not in _lower_words()


def cast(play: datasets.Play) -> list[str]:
    """The names, in capitals and sorted, in the speakers' labels of a play: without KING, FIRST or BOTTOM, which are words."""
    words = {word for speech in play.speeches for word in _WORD.findall(speech.speaker)}
    return sorted(word.upper() for word in words if _is_name(word))


@functools.cache
def name_pools() -> tuple[list[str], list[str]]:
    """Names in capitals: of the training plays' speakers, and others that the Bible has."""
    players = {name for play in datasets.plays("train") for name in cast(play)}
    words = {word for text in source_documents("bible") for word in _WORD.findall(text)}
    others = {word.upper() for word in words if word.istitle() and _is_name(word)}
    return sorted(players), sorted(others - players)


def recast(play: datasets.Play, seed: int) -> datasets.Play:
    """A play in which every name of `cast` is replaced by a drawn one, everywhere, in capitals or not.

    A new name comes from the training plays' speakers or from the Bible, with equal probability, and no two
    become the same; a play's own names are among them, so that one may rarely stay. A seed gives one casting.
    """
    rng, names = random.Random(f"{play.slug} {seed}"), cast(play)
    of_players = sum(rng.random() < 0.5 for _ in names)
    players, others = name_pools()
    drawn = rng.sample(players, of_players) + rng.sample(others, len(names) - of_players)
    rng.shuffle(drawn)
    new = dict(zip(names, drawn, strict=True))

    def renamed(match: re.Match) -> str:
        word = match.group()
        if word.islower() or word.upper() not in new:
            return word
        return new[word.upper()] if word.isupper() else new[word.upper()].title()

    def rename(text: str) -> str:
        return _WORD.sub(renamed, text)

    speeches = tuple(
        dataclasses.replace(s, speaker=rename(s.speaker), lines=tuple(map(rename, s.lines)))
        for s in play.speeches
    )
    return dataclasses.replace(play, text=rename(play.text), speeches=speeches)


@dataclass(frozen=True)
class MixRecipe(Recipe):
    """A recipe that reads a mix of sources and ends with an anneal, in rate and in data.

    `mix` and `extra` map sources to weights, `share` and `anneal` are as of `anneal_mix`. Of the plays'
    weight the part `recast` goes to plays with other names. The rate is constant between warm-up and
    anneal. The other fields are those of `Recipe`.
    """

    mix: Mapping[str, float] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)
    share: float = 0.5
    anneal: int = 1
    recast: float = 0.0

    def schedule(self) -> list[tuple[int, dict[str, float]]]:
        """The schedule of the mix, for `MixedBatches`.

        Raises ValueError as `anneal_mix`, for `recast` outside 0..1, and for one above 0 without plays.
        """
        options = {"share": self.share, "steps": self.steps, "anneal": self.anneal}
        found = anneal_mix(self.mix, self.extra, accumulate=self.accumulate, **options)
        if not 0 <= self.recast <= ("plays" in self.mix):
            raise ValueError(f"recast must be in 0..1, and 0 without plays, got {self.recast}")
        if self.recast:
            parts = {"plays": 1 - self.recast, "recast": self.recast}
            for _, weights in found:
                weights |= {name: part * weights["plays"] for name, part in parts.items()}
        return found


FULL = MixRecipe(
    mini_llama(256, 4, 8, 2, 704, 512),
    batch=1,
    context=512,
    steps=26_000,
    peak=7.5e-4,
    warmup=500,
    b2=0.99,
    eval_every=2_600,
    checkpoint_every=1_000,
    mix={
        "plays": 0.30,
        "poems": 0.02,
        "folio": 0.08,
        "bible": 0.12,
        "docs": 0.10,
        "arithmetic": 0.16,
        "code": 0.16,
        "french": 0.05,
        "latin": 0.01,
    },
    extra={"plays": 0.8, "arithmetic": 0.12, "code": 0.08},
    share=0.7,
    anneal=11_700,
    recast=0.75,
)


MIX_RECIPES = {
    "full": FULL,
    "full-smoke": dataclasses.replace(
        FULL,
        model=mini_llama(32, 2, 4, 2, 96, 192),
        context=32,
        steps=12,
        warmup=2,
        anneal=6,
        eval_every=0,
        checkpoint_every=4,
        mix={"plays": 0.5, "french": 0.5},
        extra={"plays": 1.0},
    ),
}


def pieces(names: Iterable[str], split: str, size: int = 20_000) -> dict[str, list[str]]:
    """Text of sources in a split: pieces of at most 2,000 characters, about `size` bytes of each source.

    Those of held-out splits have no long line in common with the training text (`data_mix.held_out`).
    """
    if split != "train":
        return {name: held_out(name, size, split=split) for name in names}
    return {name: byte_sample(chunks(source_documents(name), 2_000), size) for name in names}


def bits_by_source(
    model: Llama, tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]], context: int
) -> dict[str, float]:
    """Bits per byte of each source's texts."""
    return {
        name: model_bits_per_byte(model, tokenizer, found, context=context)
        for name, found in texts.items()
    }


def mix_batches(recipe: MixRecipe, directory: Path, tokenizer: Tokenizer) -> MixedBatches:
    """The batches of a recipe; the token files in the run's folder are written if they are not there.

    Files that are there are read as they are, so that a resumed run goes on with the text it began with.
    """
    files = mix_files(directory / "tokens", tokenizer, names=tuple(recipe.mix))
    if recipe.recast:
        path = directory / "tokens" / "recast.tokens"
        if not Path(f"{path}.json").exists():
            every = [(play, seed) for seed in range(CASTINGS) for play in datasets.plays("train")]
            write_tokens(path, [recast(*each).text for each in every], tokenizer)
        files["recast"] = TokenFile.open(path, tokenizer)
    return MixedBatches(files, recipe.schedule(), recipe.batch, recipe.context, recipe.seed)


def train_mix(
    recipe: MixRecipe, directory: str | Path, *, progress: bool = False
) -> tuple[Llama, Tokenizer, list[dict]]:
    """Run a recipe on a mix in a folder, tokenizer included, or go on from the folder's last checkpoint.

    Leaves a model that `load` reads, token files, checkpoints and log.jsonl; every evaluation logs bits
    per byte of held-out pieces, by source. Returns model, tokenizer, log rows. Raises ValueError if the
    folder holds another recipe's run or a tokenizer of another size.
    """
    directory = Path(directory)
    tokenizer = mix_tokenizer(directory, recipe.model.vocab_size, names=tuple(recipe.mix))
    texts = pieces(recipe.mix, "validation")
    optimizer = make_optimizer(
        steps=recipe.steps,
        peak=recipe.peak,
        warmup=recipe.warmup,
        floor=1.0,
        weight_decay=recipe.weight_decay,
        b2=recipe.b2,
    )
    state, rows = fit(
        Llama(recipe.model, key=jax.random.key(recipe.seed)),
        next_token_loss,
        mix_batches(recipe, directory, tokenizer),
        annealed(optimizer, steps=recipe.steps, anneal=recipe.anneal),
        evaluate=lambda model: {
            "bits_per_byte": bits_by_source(model, tokenizer, texts, recipe.context)
        },
        directory=directory,
        progress=progress,
        config=dataclasses.asdict(recipe),
        **{name: getattr(recipe, name) for name in pretraining.FIT_OPTIONS},
    )
    pretraining.save(directory, state.model, tokenizer)
    return state.model, tokenizer, rows


def rule_prompts(names: Iterable[str]) -> dict[str, str]:
    """The beginning of each source's first held-out piece, to its first line end from 30 to 120 characters, else 120."""
    found = {}
    for name, (first, *_) in pieces(names, "validation").items():
        end = first.find("\n", 30, 120)
        found[name] = first[: end + 1] if end > 0 else first[:120]
    return found


def draw_mix(rows: Sequence[dict], anneal_begins: int, path: Path) -> None:
    """Bits per byte of held-out text by source over tokens, as a picture. Needs matplotlib."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    judged = [row for row in rows if "bits_per_byte" in row]
    for name in judged[0]["bits_per_byte"]:
        values = [row["bits_per_byte"][name] for row in judged]
        axes.plot([row["tokens"] / 1e6 for row in judged], values, "o-", ms=3, label=name)
    axes.axvline(anneal_begins / 1e6, color="gray", ls=":")
    axes.set(xlabel="million tokens read", ylabel="bits per byte, held-out")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report_mix(directory: Path, recipe: MixRecipe, peak: float, rows: Sequence[dict]) -> None:
    """Write summary.json, samples.txt and curves.png of a finished run of `train_mix`; print the first two.

    `peak` is the speed of the machine's matrix products in GFLOP/s.
    """
    model, tokenizer = pretraining.load(directory)
    plays = {"plays": [play.text for play in datasets.plays("validation")]}
    judge = lambda texts: {  # noqa: E731
        name: round(bits, 4)
        for name, bits in bits_by_source(model, tokenizer, texts, recipe.context).items()
    }
    last, drawn = rows[-1], mix_batches(recipe, directory, tokenizer)
    summary = {
        "parameters": count_params(recipe.model),
        "tokens": last["tokens"],
        "validation_bits_per_byte": judge(plays)["plays"],
        "bits_per_byte": {
            split: judge(pieces(recipe.mix, split)) for split in ("train", "validation")
        },
        "read": drawn.report(recipe.steps * recipe.accumulate),
        "seconds": round(last["seconds"]),
        "matmul_gflops": round(peak),
        "recipe": dataclasses.asdict(recipe),
    }
    written = [
        f"[{name}]\n{prompt}⁞{pretraining.sample(model, tokenizer, prompt, max_tokens=100, seed=seed)}"
        for seed, (name, prompt) in enumerate(rule_prompts(recipe.mix).items())
    ]
    text = "\n\n--------\n\n".join(written) + "\n"
    write_durably(directory / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    write_durably(directory / "samples.txt", text.encode())
    print(f"\n{text}\n--------")
    print(
        json.dumps({name: value for name, value in summary.items() if name != "recipe"}, indent=1)
    )
    per_step = recipe.batch * recipe.context * recipe.accumulate
    try:
        draw_mix(rows, (recipe.steps - recipe.anneal) * per_step, directory / "curves.png")
    except ModuleNotFoundError:
        print("no curves.png: pip install matplotlib for the picture")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command behind `make train` and `make sample`: chapter 11's, with this chapter's recipes and all formats."""
    more = {name: (recipe, train_mix, report_mix) for name, recipe in MIX_RECIPES.items()}
    pretraining.main(arguments, more, formats.load)
