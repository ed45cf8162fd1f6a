"""Packed documents, AdamW with warm-up and cosine decay, bits per byte measured fairly, and a run that may be stopped at any moment: here the mini Llama 3 is trained.

Written from chapters/11_pretraining.py by `make export`: edit there.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from llm_from_scratch import datasets
from llm_from_scratch.bigram import bits_per_byte
from llm_from_scratch.llama import (
    Llama,
    LlamaConfig,
    RopeScaling,
    count_params,
    cross_entropy,
    init_cache,
)
from llm_from_scratch.tokenizer import COURSE_SPECIAL, Tokenizer, train_bpe
from llm_from_scratch.training import fit, load_weights, save_weights, write_durably


def pack(
    documents: Sequence[Sequence[int]], bos: int, eos: int
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Join documents into one stream, each between BOS and EOS; the second array numbers them.

    Raises ValueError if there is no document.
    """
    if not documents:
        raise ValueError("pack needs at least one document, got none")
    wrapped = [np.array([bos, *document, eos], np.int32) for document in documents]
    numbers = [np.full(len(ids), i, np.int32) for i, ids in enumerate(wrapped)]
    return np.concatenate(wrapped), np.concatenate(numbers)


@dataclass(frozen=True)
class PackedBatches:
    """Batches of a packed stream: batch number `cursor` is a pure function of cursor and seed.

    Each epoch cuts the stream into windows of `context` tokens at a new random offset and visits
    them in a new order. A batch is a dict of int32 arrays (batch, context): tokens, targets (the
    next tokens, −1 before another document) and segments. Raises ValueError for a short stream.
    """

    tokens: Int[np.ndarray, " N"]
    segments: Int[np.ndarray, " N"]
    batch: int
    context: int
    seed: int = 0

    def __post_init__(self):
        if self.per_epoch < 1:
            need = (self.batch + 1) * self.context
            raise ValueError(f"{len(self.tokens)} tokens are too few: a batch takes {need}")

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch; what is left, less than a batch, waits for another epoch."""
        return (len(self.tokens) // self.context - 1) // self.batch

    def order(self, epoch: int) -> Int[np.ndarray, " windows"]:
        """Where this epoch's windows start, in the order of visiting."""
        random = np.random.default_rng([self.seed, epoch])
        offset = random.integers(self.context)
        return offset + self.context * random.permutation(len(self.tokens) // self.context - 1)

    def __call__(self, cursor: int) -> dict[str, Int[np.ndarray, "B T"]]:
        epoch, number = divmod(cursor, self.per_epoch)
        starts = self.order(epoch)[number * self.batch : (number + 1) * self.batch]
        at = starts[:, None] + np.arange(self.context + 1)
        tokens, segments = self.tokens[at], self.segments[at]
        targets = np.where(segments[:, 1:] == segments[:, :-1], tokens[:, 1:], -1)
        return {"tokens": tokens[:, :-1], "targets": targets, "segments": segments[:, :-1]}


def decayed(params):
    """Which parameters weight decay shrinks: the matrices, not the gains of norms."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def make_optimizer(
    *,
    steps: int,
    peak: float,
    warmup: int,
    floor: float = 0.01,
    weight_decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    clip: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm, with linear warm-up and cosine decay to floor · peak.

    Decay is decoupled: a step shrinks weights by rate · weight_decay. Norm gains are not decayed.
    Source: paper §3.4.1 (AdamW, warm-up, cosine to 1 %) and §3.2.1 (0.1 times the rate); the paper
    does not state the betas or the clipping, these are GPT-3's. Raises ValueError for warmup >= steps.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must be between 0 and steps, got warmup={warmup}, steps={steps}")
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, floor * peak)
    adamw = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(clip), adamw)


def evaluation_windows(
    ids: Sequence[int], context: int, stride: int
) -> tuple[Int[np.ndarray, "W T"], Int[np.ndarray, "W T"]]:
    """Cut one document into overlapping windows so that each id after the first is a target once.

    Each window moves on by `stride`; its first context − stride tokens only give context (targets
    −1), except in the first window, so a target has at least context − stride + 1 tokens before it. The
    last window is padded with id 0 and targets −1. Raises ValueError unless
    1 <= stride <= context, and for a document without a target.
    """
    n = len(ids) - 1
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be in 1..context, got stride={stride}, context={context}")
    if n < 1:
        raise ValueError(f"a document needs BOS and at least one token, got {len(ids)} ids")
    count = 1 + -(-max(0, n - context) // stride)
    padded = np.full((count - 1) * stride + context + 1, -1, np.int32)
    padded[: n + 1] = ids
    windows = np.lib.stride_tricks.sliding_window_view(padded, context + 1)[::stride]
    targets = windows[:, 1:].copy()
    targets[1:, : context - stride] = -1
    return np.maximum(windows[:, :-1], 0), targets


@eqx.filter_jit
def nats(model: Llama, tokens: Int[Array, "B T"], targets: Int[Array, "B T"]) -> Float[Array, ""]:
    """Sum of the targets' negative log-probabilities, in nats."""
    return cross_entropy(model(tokens), targets) * (targets >= 0).sum().astype(jnp.float32)


def model_bits_per_byte(
    model: Llama,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    context: int,
    stride: int | None = None,
    batch: int = 16,
) -> float:
    """Bits per UTF-8 byte of texts, each a document of its own that begins with BOS.

    Every token is predicted once, with at least context − stride + 1 tokens before it (or all there
    are); stride is half the context if not given. The same bytes count whatever the tokenizer.
    Raises ValueError for no text, a bad stride, and a context beyond the model's max_seq_len.
    """
    stride = max(1, context // 2) if stride is None else stride
    if not texts:
        raise ValueError("model_bits_per_byte needs at least one text, got none")
    if context > model.config.max_seq_len:
        raise ValueError(f"context={context} exceeds max_seq_len={model.config.max_seq_len}")
    documents = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    parts = [evaluation_windows(ids, context, stride) for ids in documents]
    tokens, targets = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    padding = ((0, -len(tokens) % batch), (0, 0))
    tokens = np.pad(tokens, padding).reshape(-1, batch, context)
    targets = np.pad(targets, padding, constant_values=-1).reshape(-1, batch, context)
    total = sum(float(nats(model, *pair)) for pair in zip(tokens, targets, strict=True))
    return bits_per_byte(total, sum(len(text.encode()) for text in texts))


def next_token_loss(
    model: Llama, batch: dict[str, Int[Array, "B T"]], key: PRNGKeyArray | None = None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Mean cross-entropy in nats over the batch's targets, and how many targets there are.

    `batch` holds int arrays (B, T): tokens, targets (−1: none), segments. `key` is there for `fit`.
    """
    logits = model(batch["tokens"], batch["segments"])
    return cross_entropy(logits, batch["targets"]), (batch["targets"] >= 0).sum()


@eqx.filter_jit
def next_logits(model: Llama, tokens: Int[Array, " T"], cache):
    """Feed tokens through the cache; the logits after the last one, and the new cache."""
    h, cache = model.hidden(tokens, cache=cache)
    return (h[-1] @ model.output_weight.T).astype(jnp.float32), cache


def sample(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_tokens: int | None = None,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Let the model continue a prompt, token by token through a KV cache, up to EOS or max_tokens.

    Without max_tokens it writes as far as its max_seq_len allows. Temperature 0 takes the likeliest
    token. The same seed gives the same text. Raises ValueError if BOS, prompt and max_tokens exceed
    max_seq_len, for a negative temperature, and for max_tokens below 1.
    """
    ids = tokenizer.encode(prompt, bos=True)
    limit = model.config.max_seq_len
    if len(ids) + (max_tokens or 1) > limit:
        raise ValueError(
            f"{len(ids)} prompt tokens and max_tokens={max_tokens} do not fit: the model reads at "
            f"most {limit}"
        )
    max_tokens = limit - len(ids) if max_tokens is None else max_tokens
    if temperature < 0 or max_tokens < 1:
        raise ValueError(
            f"temperature must be 0 or more and max_tokens 1 or more, got {temperature}, {max_tokens}"
        )
    key, written = jax.random.key(seed), []
    cache = init_cache(model.config, (), model.config.max_seq_len, model.embedding.dtype)
    logits, cache = next_logits(model, jnp.array(ids, jnp.int32), cache)
    for i in range(max_tokens):
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(jax.random.categorical(jax.random.fold_in(key, i), logits / temperature))
        if token in tokenizer.stop_ids:
            break
        written.append(token)
        logits, cache = next_logits(model, jnp.array([token], jnp.int32), cache)
    return tokenizer.decode(written)


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on: two runs of one recipe on one machine give the same weights.

    `batch` counts windows of `context` tokens, `steps`, `warmup`, `eval_every` and `checkpoint_every`
    count optimiser steps, `peak` is the largest learning rate, `b2` is AdamW's β₂.
    """

    model: LlamaConfig
    batch: int
    context: int
    steps: int
    peak: float
    warmup: int
    weight_decay: float = 0.1
    b2: float = 0.95
    accumulate: int = 1
    seed: int = 0
    eval_every: int = 100
    checkpoint_every: int = 50


def mini_llama(
    dim: int, n_layers: int, n_heads: int, n_kv_heads: int, hidden_dim: int, context: int
):
    """A small Llama 3 with the course's vocabulary of 4,096 ids and one table for input and output."""
    options = {"tie_embeddings": True, "max_seq_len": context}
    head_dim = dim // n_heads
    return LlamaConfig(4096, dim, n_layers, n_heads, n_kv_heads, hidden_dim, head_dim, **options)


RECIPES = {
    "short": Recipe(
        mini_llama(256, 4, 4, 2, 704, 256),
        batch=2,
        context=256,
        steps=8000,
        peak=1e-3,
        warmup=400,
        b2=0.99,
        eval_every=800,
        checkpoint_every=200,
    ),
    "smoke": Recipe(
        mini_llama(32, 2, 4, 2, 96, 32),
        batch=4,
        context=32,
        steps=30,
        peak=3e-3,
        warmup=5,
        eval_every=0,
        checkpoint_every=4,
    ),
}


def course_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """The BPE tokenizer of the training plays, from a run's folder; trained first if it is not there.

    256 bytes, merges, 16 special tokens. Raises ValueError for one of another size.
    """
    path = directory / "tokenizer.model"
    if not path.exists():
        texts = [play.text for play in datasets.plays("train")]
        Tokenizer(train_bpe(texts, vocab_size - len(COURSE_SPECIAL)), COURSE_SPECIAL).save(path)
    tokenizer = Tokenizer.load(path, COURSE_SPECIAL)
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} ids, the model vocab_size={vocab_size}: remove the "
            "file or use another folder"
        )
    return tokenizer


def save(directory: str | Path, model: Llama, tokenizer: Tokenizer) -> None:
    """Write a model as a folder: config.json, model.safetensors, tokenizer.model, special_tokens.json."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    fields = dataclasses.asdict(model.config) | {"dtype": model.embedding.dtype.name}
    config = json.dumps(fields, indent=1)
    special = json.dumps(tokenizer.special, indent=1)
    tokenizer.save(directory / "tokenizer.model")
    write_durably(directory / "special_tokens.json", special.encode())
    write_durably(directory / "config.json", config.encode())
    save_weights(directory / "model.safetensors", model)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError naming the file if there is none."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not an object")
    return found


def read_config(path: Path) -> tuple[LlamaConfig, jnp.dtype]:
    """A LlamaConfig from JSON, and the dtype of its weights (float32 if the file does not say).

    Raises ValueError naming the file if it is not one.
    """
    try:
        fields = read_json(path)
        scaling = fields.pop("rope_scaling")
        dtype = jnp.dtype(fields.pop("dtype", "float32"))
        return LlamaConfig(**fields, rope_scaling=scaling and RopeScaling(**scaling)), dtype
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no configuration of a Llama: {error}") from error


def load(directory: str | Path, dtype: jnp.dtype = jnp.float32) -> tuple[Llama, Tokenizer]:
    """The model and the tokenizer of a folder written by `save`, as `make train` leaves it.

    Weights stored in another dtype (those in checkpoints/ are bfloat16, half the bytes) come back as
    `dtype`. Raises FileNotFoundError naming the missing file, ValueError for one that does not fit.
    """
    directory = Path(directory)
    for name in ("config.json", "special_tokens.json", "tokenizer.model", "model.safetensors"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name} is missing: this is no saved model")
    config, stored = read_config(directory / "config.json")
    special = read_json(directory / "special_tokens.json")
    tokenizer = Tokenizer.load(directory / "tokenizer.model", special)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model has "
            f"vocab_size={config.vocab_size}"
        )
    like = Llama(config, key=jax.random.key(0), dtype=stored)
    model = load_weights(directory / "model.safetensors", like)
    return jax.tree.map(lambda x: x.astype(dtype), model), tokenizer


FIT_OPTIONS = ("steps", "seed", "accumulate", "eval_every", "checkpoint_every")


def train(
    recipe: Recipe, directory: str | Path, *, progress: bool = False
) -> tuple[Llama, Tokenizer, list[dict]]:
    """Run a recipe on the training plays in a folder, or go on from the folder's last checkpoint.

    Leaves a model that `load` reads, checkpoints and log.jsonl. Returns model, tokenizer, log rows.
    Raises ValueError if the folder holds another recipe's run or a tokenizer of another size.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = course_tokenizer(directory, recipe.model.vocab_size)
    documents = [tokenizer.encode(play.text) for play in datasets.plays("train")]
    stream = pack(documents, tokenizer.bos_id, tokenizer.eos_id)
    held_out = [play.text for play in datasets.plays("validation")]

    def evaluate(model: Llama) -> dict[str, float]:
        bits = model_bits_per_byte(model, tokenizer, held_out, context=recipe.context)
        return {"validation_bits_per_byte": bits}

    optimizer = make_optimizer(
        steps=recipe.steps,
        peak=recipe.peak,
        warmup=recipe.warmup,
        weight_decay=recipe.weight_decay,
        b2=recipe.b2,
    )
    state, rows = fit(
        Llama(recipe.model, key=jax.random.key(recipe.seed)),
        next_token_loss,
        PackedBatches(*stream, recipe.batch, recipe.context, recipe.seed),
        optimizer,
        evaluate=evaluate,
        directory=directory,
        progress=progress,
        config=dataclasses.asdict(recipe),
        **{name: getattr(recipe, name) for name in FIT_OPTIONS},
    )
    save(directory, state.model, tokenizer)
    return state.model, tokenizer, rows


def runs_folder() -> Path:
    """Where runs are kept: runs/ of the repository, or of the cache folder if this is not one."""
    repository = Path(__file__).resolve().parent.parent
    home = repository if (repository / "pyproject.toml").exists() else datasets.root()
    return home / "runs"


def matmul_peak(size: int = 2048, repeats: int = 8) -> float:
    """The best of a few fp32 matrix products of this size, in GFLOP/s: this machine's yardstick."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def draw_curves(rows: Sequence[dict], bits_per_byte_per_nat: float, path: str | Path) -> None:
    """Training and validation loss of a log in bits per byte, as a picture. Needs matplotlib.

    `bits_per_byte_per_nat` turns a mean loss in nats per token into bits per byte of the training
    text: its tokens per byte over ln 2.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5))
    held_out = [row for row in rows if "validation_bits_per_byte" in row]
    axes.plot(
        [row["tokens"] / 1e6 for row in rows],
        [row["loss"] * bits_per_byte_per_nat for row in rows],
        color="tab:blue",
        alpha=0.5,
        label="training batches",
    )
    axes.plot(
        [row["tokens"] / 1e6 for row in held_out],
        [row["validation_bits_per_byte"] for row in held_out],
        "o-",
        color="tab:orange",
        label="validation plays",
    )
    axes.set(xlabel="million tokens seen", ylabel="bits per byte", ylim=(1.2, 4))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


PROMPTS = ("ROMEO\n", "ACT I\n\nSCENE I.", "[Enter HAMLET and the Ghost]\n\nHAMLET\n")


def report(directory: Path, recipe: Recipe, peak: float, rows: Sequence[dict]) -> None:
    """Write summary.json, samples.txt and curves.png of a finished run, and print the first two."""
    model, tokenizer = load(directory)
    texts = [play.text for play in datasets.plays("train")]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    bits_per_byte_per_nat = tokens / sum(len(text.encode()) for text in texts) / float(np.log(2))
    last = rows[-1]
    summary = {
        "parameters": count_params(recipe.model),
        "tokens": last["tokens"],
        "epochs": round(last["tokens"] / tokens, 2),
        "validation_bits_per_byte": round(last["validation_bits_per_byte"], 4),
        "bits_per_byte_per_nat": round(bits_per_byte_per_nat, 5),
        "seconds": round(last["seconds"]),
        "matmul_gflops": round(peak),
        "recipe": dataclasses.asdict(recipe),
    }
    samples = [
        prompt + sample(model, tokenizer, prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)
    ]
    text = "\n\n--------\n\n".join(samples) + "\n"
    write_durably(directory / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    write_durably(directory / "samples.txt", text.encode())
    print(f"\n{text}\n--------")
    for name, value in list(summary.items())[:-1]:
        print(f"{name}: {value}")
    try:
        draw_curves(rows, bits_per_byte_per_nat, directory / "curves.png")
    except ModuleNotFoundError:
        print("no curves.png: pip install matplotlib for the picture")


def main(
    arguments: Sequence[str] | None = None,
    more: Mapping[str, tuple[Recipe, Callable, Callable]] | None = None,
    load: Callable = load,
) -> None:
    """The command behind `make train` and `make sample`.

    `more` adds recipes to RECIPES, each with a function like `train` and one like `report`; `load` opens a model.
    """
    known = {name: (recipe, train, report) for name, recipe in RECIPES.items()} | (more or {})
    parser = argparse.ArgumentParser(description="Train a mini Llama 3.")
    parser.add_argument("--recipe", choices=sorted(known), default="short")
    parser.add_argument("--directory", type=Path, help="default: runs/RECIPE")
    parser.add_argument("--sample", metavar="PROMPT", help="only let the trained model write")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    chosen = parser.parse_args(arguments)
    recipe, run, tell = known[chosen.recipe]
    directory = chosen.directory or runs_folder() / chosen.recipe
    try:
        if chosen.sample is not None:
            chosen.sample = chosen.sample.replace("\\n", "\n")
            model, tokenizer = load(directory)
            print(chosen.sample + sample(model, tokenizer, chosen.sample, seed=chosen.seed))
            return
        print(f"{count_params(recipe.model):,} parameters; everything goes to {directory}")
        peak = matmul_peak()
        _, _, rows = run(recipe, directory, progress=True)
        peak = max(peak, matmul_peak())  # other work on the machine may have slowed the first
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on from here\n")
    tell(directory, recipe, peak, rows)


@dataclass(frozen=True)
class RampedBatches:
    """Batches that grow: batch number `cursor` is a pure function of cursor and seed.

    `stages` lists (steps, windows, context); the last stage goes on after its steps. The stream is
    read in windows of the longest context, as by PackedBatches, and shorter ones are cut from them: all
    ramps of one longest context and seed read the same text in the same order. Batches are dicts as there.
    Source: paper §3.4.1. Raises ValueError for a stage that is not whole windows, and for a short stream.
    """

    tokens: Int[np.ndarray, " N"]
    segments: Int[np.ndarray, " N"]
    stages: tuple[tuple[int, int, int], ...]
    seed: int = 0

    def __post_init__(self):
        if not self.stages or min(min(stage) for stage in self.stages) < 1:
            raise ValueError(f"stages must be (steps, windows, context), all >= 1: {self.stages}")
        for _, windows, context in self.stages:
            if self.longest % context or windows * context % self.longest:
                raise ValueError(
                    f"{windows} windows of {context} are not whole windows of {self.longest}"
                )
        _ = self.windows  # a stream that is too short is an error now, not at the first batch

    @property
    def longest(self) -> int:
        """The longest context of the stages."""
        return max(context for *_, context in self.stages)

    @property
    def windows(self) -> PackedBatches:
        """The windows of the longest context, one by one."""
        return PackedBatches(self.tokens, self.segments, 1, self.longest, self.seed)

    def __call__(self, cursor: int) -> dict[str, Int[np.ndarray, "B T"]]:
        left, first = cursor, 0
        for number, (steps, windows, context) in enumerate(self.stages, start=1):
            rows = windows * context // self.longest
            done = left if number == len(self.stages) else min(left, steps)
            left, first = left - done, first + done * rows
            if done < steps or number == len(self.stages):
                break
        drawn = [self.windows(first + row) for row in range(rows)]
        return {
            name: np.concatenate([batch[name] for batch in drawn]).reshape(windows, context)
            for name in drawn[0]
        }


def spikes(
    values: Sequence[float], *, window: int = 50, threshold: float = 6.0
) -> Bool[np.ndarray, " N"]:
    """Which values of a run's log are spikes: far above those just before them.

    Value i is one if it exceeds the median of the `window` before by more than threshold · 1.4826 times
    their median distance from it (for Gaussian noise, that many σ), or is not finite. The first `window`
    are judged only for that. Returns booleans. The paper (§3.4.1) counts spikes without a definition; this
    one is ours. Raises ValueError unless window >= 2 and threshold > 0.
    """
    if window < 2 or not threshold > 0:
        raise ValueError(f"need window >= 2, threshold > 0, got window={window}, {threshold}")
    values = np.asarray(values, float)
    found = ~np.isfinite(values)
    for i in range(window, len(values)):
        before = values[i - window : i]
        before = before[np.isfinite(before)]
        if len(before) and not found[i]:
            median = np.median(before)
            sigma = 1.4826 * np.median(np.abs(before - median))
            found[i] = values[i] > median + threshold * sigma
    return found


def skip_spikes(
    optimizer: optax.GradientTransformation, *, factor: float = 3.0, warmup: int = 20
) -> optax.GradientTransformation:
    """Let an optimiser ignore a gradient longer than `factor` times the running mean of the norms.

    A skipped step changes neither weights nor the optimiser's state, its schedule included; nor
    does a gradient that is not finite. The first `warmup` finite norms are always accepted. The mean looks
    back about 20 steps and counts a skipped norm as `factor` means, so norms that grow for good are soon
    accepted again. The rule is ours, not the paper's. Raises ValueError unless factor > 1 and warmup >= 1.
    """
    if not (factor > 1 and warmup >= 1):
        raise ValueError(f"need factor > 1 and warmup >= 1, got factor={factor}, warmup={warmup}")

    def init(params):
        return {
            "inner": optimizer.init(params),
            "mean": jnp.zeros((), jnp.float32),
            "accepted": jnp.zeros((), jnp.int32),
        }

    def update(grads, state, params=None):
        norm, accepted = optax.tree.norm(grads).astype(jnp.float32), state["accepted"]
        usual = (norm <= factor * state["mean"]) | (accepted < warmup)
        keep = jnp.isfinite(norm) & usual
        updates, inner = optimizer.update(grads, state["inner"], params)
        share = jnp.maximum(0.05, 1.0 / (accepted + 1).astype(jnp.float32))
        counted = jnp.where(usual, norm, factor * state["mean"])
        mean = state["mean"] + share * (counted - state["mean"])
        choose = lambda new, old: jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)  # noqa: E731
        after = {
            "inner": choose(inner, state["inner"]),
            "mean": jnp.where(jnp.isfinite(norm), mean, state["mean"]),
            "accepted": accepted + keep.astype(jnp.int32),
        }
        return choose(updates, jax.tree.map(jnp.zeros_like, updates)), after

    return optax.GradientTransformation(init, update)
