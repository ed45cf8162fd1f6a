"""A neural language model, its gradients by hand, and the training loop that every later chapter reuses: it logs, evaluates, stops and resumes exactly.

Written from chapters/03_training.py by `make export`: edit there.
"""

import functools
import hashlib
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
from jaxtyping import Array, Float, Int
from safetensors.numpy import save as safetensors_bytes
from tqdm import tqdm

from llm_from_scratch.bigram import BYTES, START


def byte_windows(documents: Iterable[bytes], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Every byte of the documents with the n symbols before it: contexts (bytes, n) and targets (bytes,).

    Both int32. Before a document stands START; no context reaches into the document before.
    """
    contexts, targets = [], []
    for document in documents:
        data = np.frombuffer(document, np.uint8).astype(np.int32)
        padded = np.concatenate([np.full(n, START, np.int32), data])
        contexts.append(np.lib.stride_tricks.sliding_window_view(padded, n)[: len(data)])
        targets.append(data)
    return np.concatenate(contexts), np.concatenate(targets)


class NeuralLM(eqx.Module):
    """The neural probabilistic language model of Bengio et al. 2003, eq. 1, over bytes.

    N context symbols of width D, F hidden units, V = 256 outputs; W is None without direct connections.
    """

    C: Float[Array, "257 D"]
    H: Float[Array, "F ND"]
    d: Float[Array, " F"]
    U: Float[Array, "V F"]
    b: Float[Array, " V"]
    W: Float[Array, "V ND"] | None

    def __init__(
        self, context: int, dim: int, hidden_dim: int, *, direct: bool = False, key: Array
    ):
        for_c, for_h, for_u = jax.random.split(key, 3)
        width = context * dim
        self.C = jax.random.normal(for_c, (START + 1, dim))
        self.H = jax.random.normal(for_h, (hidden_dim, width)) / width**0.5
        self.d = jnp.zeros(hidden_dim)
        self.U = 0.1 * jax.random.normal(for_u, (BYTES, hidden_dim)) / hidden_dim**0.5
        self.b = jnp.zeros(BYTES)
        self.W = jnp.zeros((BYTES, width)) if direct else None

    def __call__(self, context: Int[Array, " N"]) -> Float[Array, " V"]:
        """The logits of the next byte."""
        x = self.C[context].reshape(-1)
        z = self.b + self.U @ jnp.tanh(self.d + self.H @ x)
        return z if self.W is None else z + self.W @ x


def negative_log_likelihood(
    model: NeuralLM, contexts: Int[Array, "B N"], targets: Int[Array, " B"]
) -> Float[Array, " B"]:
    """−ln p of each target after its context, in nats."""
    logits = jax.vmap(model)(contexts)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - chosen


def next_byte_loss(model: NeuralLM, batch: dict[str, Array], key: Array) -> Float[Array, ""]:
    """The mean loss of a batch with "contexts" and "targets", in nats. It needs no randomness."""
    return jnp.mean(negative_log_likelihood(model, batch["contexts"], batch["targets"]))


def is_trainable(leaf: Any) -> bool:
    """Whether a leaf of a model is a parameter: a JAX array of floating-point numbers."""
    return eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def count_parameters(model: Any) -> int:
    """How many trainable numbers a model holds. (For a configuration alone: llama.count_params.)"""
    return sum(leaf.size for leaf in jax.tree.leaves(model) if is_trainable(leaf))


def backpropagate(
    model: NeuralLM, contexts: Int[Array, "B N"], targets: Int[Array, " B"]
) -> NeuralLM:
    """The gradient of the mean loss by the chain rule, written out: a NeuralLM of gradients."""
    # forwards, keeping what the way back needs
    x = model.C[contexts].reshape(len(contexts), -1)
    a = jnp.tanh(x @ model.H.T + model.d[None])
    z = a @ model.U.T + model.b[None] + (0.0 if model.W is None else x @ model.W.T)
    # backwards; the mean over the batch enters here
    z_bar = (jax.nn.softmax(z) - jax.nn.one_hot(targets, BYTES)) / len(targets)
    h_bar = (z_bar @ model.U) * (1 - a * a)
    x_bar = h_bar @ model.H + (0.0 if model.W is None else z_bar @ model.W)
    pieces = x_bar.reshape(*contexts.shape, -1)
    grads = {
        "C": jnp.zeros_like(model.C).at[contexts].add(pieces),
        "H": h_bar.T @ x,
        "d": h_bar.sum(0),
        "U": z_bar.T @ a,
        "b": z_bar.sum(0),
        "W": None if model.W is None else z_bar.T @ x,
    }
    fields = tuple(grads)
    return eqx.tree_at(
        lambda m: [getattr(m, name) for name in fields],
        model,
        [grads[name] for name in fields],
        is_leaf=lambda leaf: leaf is None,
    )


class TrainState(eqx.Module):
    """Everything that a training step changes: what a checkpoint has to hold.

    `step` counts updates, `cursor` counts the batches drawn from the data; both are int32 scalars.
    """

    model: Any
    opt_state: Any
    step: Int[Array, ""]
    cursor: Int[Array, ""]


def train_state(model: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. Arrays are copied, so that donating it spares the caller's."""
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer.init(eqx.filter(model, is_trainable))
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(model, opt_state, zero, zero)
    return jax.tree.map(lambda leaf: jnp.array(leaf) if eqx.is_array(leaf) else leaf, state)


def widen(x: Array) -> Array:
    """fp16 and bf16 as fp32; fp32 and fp64 as they are."""
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def mean_gradient(
    loss: Callable, params: Any, static: Any, batch: Any, key: Array, accumulate: int = 1
) -> tuple[Float[Array, ""], Any]:
    """The loss and its gradient, in fp32, over one batch or over `accumulate` stacked micro-batches.

    `params` and `static` are the halves of `eqx.partition(model, is_trainable)`. `loss(model, batch, key)`
    is a scalar mean, or a pair (mean, weight) where the weight is the number of targets behind the mean.
    Micro-batches count by weight: the result is that of one large batch.
    """

    def weighted(params: Any, batch: Any, key: Array) -> tuple[Array, Array]:
        value = loss(eqx.combine(params, static), batch, key)
        mean, weight = value if isinstance(value, tuple) else (value, 1.0)
        mean = widen(mean)
        weight = jax.lax.stop_gradient(jnp.asarray(weight, mean.dtype))
        return mean * weight, weight

    def sums(batch: Any, key: Array) -> tuple[Array, Array, Any]:
        (total, weight), grads = jax.value_and_grad(weighted, has_aux=True)(params, batch, key)
        return total, weight, jax.tree.map(widen, grads)

    def add(so_far: Any, micro: tuple[Any, Array]) -> tuple[Any, None]:
        batch, index = micro
        return jax.tree.map(jnp.add, so_far, sums(batch, jax.random.fold_in(key, index))), None

    if accumulate == 1:
        total, weight, grads = sums(batch, key)
    else:
        shapes = jax.eval_shape(sums, jax.tree.map(lambda x: x[0], batch), key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (total, weight, grads), _ = jax.lax.scan(add, zeros, (batch, jnp.arange(accumulate)))
    weight = jnp.where(weight > 0, weight, 1.0)
    return total / weight, jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)


def make_step(
    loss: Callable, optimizer: optax.GradientTransformation, *, accumulate: int = 1
) -> Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Array]]]:
    """The pure function (state, batch, key) -> (next state, loss and gradient norm), not yet jitted.

    The loss sees `fold_in(key, step)`. With `accumulate` > 1 every array of the batch has a leading
    axis of that length. The gradient reaches the optimiser in the parameters' dtype.
    """

    def step(state: TrainState, batch: Any, key: Array) -> tuple[TrainState, dict[str, Array]]:
        params, static = eqx.partition(state.model, is_trainable)
        key = jax.random.fold_in(key, state.step)
        value, grads = mean_gradient(loss, params, static, batch, key, accumulate)
        narrow = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix int32 and fp32
            norm = optax.tree.norm(grads)
            updates, opt_state = optimizer.update(narrow, state.opt_state, params)
            params = optax.apply_updates(params, updates)
        model = eqx.combine(params, static)
        state = TrainState(model, opt_state, state.step + 1, state.cursor + accumulate)
        return state, {"loss": value, "grad_norm": norm}

    return step


def compile_step(step: Callable, state: TrainState) -> Callable:
    """Jit a step from `make_step`. It overwrites the arrays of the state it is given (donation).

    What is not an array (activation functions, sizes) is taken from `state`, and stays as it is.
    """
    static = eqx.filter(state, eqx.is_array, inverse=True)

    def on_arrays(arrays: Any, batch: Any, key: Array) -> tuple[Any, dict[str, Array]]:
        state, metrics = step(eqx.combine(arrays, static), batch, key)
        return eqx.filter(state, eqx.is_array), metrics

    jitted = jax.jit(on_arrays, donate_argnums=0)

    def call(state: TrainState, batch: Any, key: Array) -> tuple[TrainState, dict[str, Array]]:
        arrays, metrics = jitted(eqx.filter(state, eqx.is_array), batch, key)
        return eqx.combine(arrays, static), metrics

    return call


def find_learning_rate(
    model: Any,
    loss: Callable,
    batches: Callable[[int], Any],
    make_optimizer: Callable[..., optax.GradientTransformation] = optax.adam,
    *,
    low: float = 1e-5,
    high: float = 10.0,
    steps: int = 100,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Raise the rate from `low` to `high`, by one factor a step; return the rates and the losses.

    `make_optimizer` is called with a schedule, a function of the step that gives the rate. For a positive
    loss: stops when it is not finite or four times its smallest value so far. The loss of entry i is
    measured before the update with rate i. Smith 2015 (arXiv 1506.01186), section 3.3.
    """
    if not (0 < low < high and steps >= 2):
        raise ValueError(f"low={low} must be in (0, high={high}), and steps={steps} at least 2")
    rates = np.geomspace(low, high, steps)
    growth = float(np.log(high / low) / (steps - 1))
    optimizer = make_optimizer(lambda count: low * jnp.exp(growth * count))
    state, key, losses = train_state(model, optimizer), jax.random.key(seed), []
    step = compile_step(make_step(loss, optimizer), state)
    for cursor in range(steps):
        state, metrics = step(state, batches(cursor), key)
        losses.append(float(metrics["loss"]))
        if not losses[-1] <= 4 * min(losses):
            break
    return rates[: len(losses)], np.array(losses)


def named_arrays(tree: Any) -> dict[str, Array]:
    """The arrays of a tree under their paths, as in "model.layers.0.attention.wq".

    Raises ValueError for two leaves with one path, and for typed random keys, which no file format holds.
    """
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if eqx.is_array(leaf):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if name in named:
                raise ValueError(f"two leaves have the path {name!r}: rename a field or a key")
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                raise ValueError(f"{name} is a random key: derive keys from the seed and the step")
            named[name] = leaf
    return named


def to_safetensors(tree: Any) -> bytes:
    """The arrays of a tree as the bytes of a safetensors file."""
    # safetensors writes the memory as it lies, so the arrays must be in C order
    return safetensors_bytes({k: np.array(v, order="C") for k, v in named_arrays(tree).items()})


def safetensors_dtype(array: Array) -> str:
    """The format's name for an array's dtype: F32 for float32, BF16, I32, U8, BOOL, F8_E4M3."""
    name = array.dtype.name.upper().removesuffix("FN")
    return name.replace("FLOAT", "F").replace("UINT", "U").replace("INT", "I")


def check_tensors(stored: dict[str, dict], wanted: dict[str, Array]) -> list[str]:
    """What is wrong with the tensors of a file, one text each; none if they fit the arrays wanted."""
    faults = [f"{name} is missing" for name in wanted if name not in stored]
    faults += [f"{name} is not expected" for name in sorted(stored) if name not in wanted]
    for name in (name for name in wanted if name in stored):
        kind, shape, array = stored[name]["dtype"], tuple(stored[name]["shape"]), wanted[name]
        if shape != array.shape or kind != safetensors_dtype(array):
            model = f"{array.dtype} {array.shape}"
            faults.append(f"{name} is {kind} {shape} in the file, {model} in the model")
    return faults


def from_safetensors(data: bytes, like: Any, where: str) -> Any:
    """A tree with the structure of `like` and the arrays of a safetensors file.

    Raises ValueError, beginning with `where`, for bytes that are no whole safetensors file, for missing
    and unexpected tensors, and for a shape or dtype that differs; all of them are listed.
    """
    try:
        stored = {name: tensor for name, tensor in safetensors.deserialize(data)}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{where}: not a whole safetensors file ({error})") from None
    wanted = named_arrays(like)
    if faults := check_tensors(stored, wanted):
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(f"{where}: " + "; ".join(faults[:8]) + more)
    leaves, structure = jax.tree.flatten(like)
    filled = iter(
        jnp.array(np.frombuffer(stored[name]["data"], array.dtype).reshape(array.shape))
        for name, array in wanted.items()
    )
    return structure.unflatten([next(filled) if eqx.is_array(x) else x for x in leaves])


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that it holds either its old or its new content, also after a crash."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable (a no-op where folders can't be opened, as on Windows)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save_weights(path: str | Path, model: Any) -> None:
    """Write a model's arrays to a safetensors file, named by their paths in the model."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, to_safetensors(model))


def load_weights(path: str | Path, like: Any) -> Any:
    """A copy of `like` with the arrays of a file from `save_weights`; `like` itself is not changed.

    Raises FileNotFoundError, or ValueError naming the file, each tensor, and both shapes and dtypes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    return from_safetensors(path.read_bytes(), like, str(path))


def checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoint folders of a directory, oldest first."""
    found = Path(directory).glob("step-*")
    return sorted(path for path in found if path.is_dir() and path.name[5:].isdigit())


def sums_of(files: dict[str, bytes]) -> dict[str, str]:
    """The SHA-256 sum of each file's content, in hexadecimal."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; it first loses its name, so a half-deleted one is never found."""
    doomed = path.with_name(f".checkpoint-old-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def save_checkpoint(directory: str | Path, state: TrainState, metadata: dict) -> Path:
    """Write `directory/step-00000100`: arrays, metadata, and a manifest of their SHA-256 sums.

    The folder is filled under another name, forced to disk, and renamed when it is whole. The two
    newest checkpoints stay. `metadata` must be JSON.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".checkpoint-*"):
        shutil.rmtree(leftover)
    files = {
        "state.safetensors": to_safetensors(state),
        "metadata.json": json.dumps(metadata, indent=1).encode(),
    }
    files["manifest.json"] = json.dumps({"sha256": sums_of(files)}, indent=1).encode()
    temporary = directory / ".checkpoint-new"
    temporary.mkdir()
    for name, data in files.items():
        write_durably(temporary / name, data)
    final = directory / f"step-{int(state.step):08d}"
    if final.exists():
        remove_checkpoint(final)
    temporary.rename(final)
    sync_folder(directory)
    for old in checkpoints(directory)[:-2]:
        remove_checkpoint(old)
    return final


def verify_checkpoint(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint, read once and compared with the sums of its manifest.

    Raises OSError for a file that is missing or unreadable, ValueError for one that is damaged; both
    name it.
    """
    files = {name: (path / name).read_bytes() for name in ("state.safetensors", "metadata.json")}
    manifest = path / "manifest.json"
    try:
        expected = json.loads(manifest.read_bytes())["sha256"]
        damaged = [name for name, found in sums_of(files).items() if found != expected[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest}: no usable manifest ({error!r})") from None
    if damaged:
        raise ValueError(f"{path / damaged[0]}: SHA-256 is not that of the manifest")
    return files


def load_checkpoint(directory: str | Path, like: TrainState) -> tuple[TrainState, dict]:
    """The newest whole checkpoint: a state with the structure of `like`, and the metadata.

    A damaged one is reported on stderr (by logging) and the one before is used. Raises
    FileNotFoundError when there is none, RuntimeError when none is whole, and ValueError naming the
    tensors when a whole one doesn't fit `like`.
    """
    faults = []
    for path in reversed(checkpoints(directory)):
        try:
            files = verify_checkpoint(path)
        except (OSError, ValueError) as error:
            faults.append(str(error))
            logging.getLogger(__name__).warning("damaged checkpoint skipped: %s", error)
            continue
        state = from_safetensors(files["state.safetensors"], like, str(path / "state.safetensors"))
        return state, json.loads(files["metadata.json"])
    if faults:
        raise RuntimeError(f"no whole checkpoint in {directory}: " + "; ".join(faults))
    raise FileNotFoundError(f"no checkpoint in {directory}")


@contextmanager
def interrupt_between_steps() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that no step is torn apart; a second one acts at once."""
    asked = threading.Event()
    usual = signal.default_int_handler
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not usual:
        yield asked  # another thread, or a program with its own idea of Ctrl-C
        return

    def note(signum: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, usual)


@dataclass
class Journal:
    """The record of a run: what a checkpoint holds beside the arrays, and where it is written."""

    directory: Path | None
    settings: dict[str, Any]  # a resumed run must have the same
    rows: list[dict] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)  # of the latest step
    tokens: int = 0
    seconds: float = 0.0  # of earlier runs, up to their last checkpoint
    started: float = field(default_factory=time.perf_counter)
    marked: tuple[float, int] = (0.0, 0)  # seconds and tokens at the end of the last row
    saved: int = -1  # the step of the newest checkpoint

    @property
    def log(self) -> Path:
        """The file of the rows."""
        return self.directory / "log.jsonl"

    def elapsed(self) -> float:
        """Seconds spent on this run, resumed ones added up."""
        return self.seconds + time.perf_counter() - self.started

    def finite_metrics(self, step: int) -> dict[str, float]:
        """The latest metrics as numbers. Raises FloatingPointError when one is not finite."""
        order = [name for name in ("loss", "grad_norm") if name in self.metrics]
        metrics = {name: float(self.metrics[name]) for name in order}
        if not all(np.isfinite(value) for value in metrics.values()):
            raise FloatingPointError(f"step {step}: {metrics}; the last checkpoint is unharmed")
        return metrics


def tokens_in(batch: Any) -> int:
    """How many tokens a batch trains on: the size of its "targets", else of its "tokens", else 0."""
    named = batch if isinstance(batch, dict) else {}
    return int(np.size(named.get("targets", named.get("tokens", ()))))


def record_row(journal: Journal, step: int, model: Any, evaluate: Callable | None) -> None:
    """Measure, append one row to the journal and to its file."""
    row = {"step": step, **journal.finite_metrics(step)}
    seconds, tokens = journal.elapsed(), journal.tokens
    row |= {"tokens": tokens} if tokens else {}
    row |= evaluate(model) if evaluate else {}
    row["seconds"] = round(journal.elapsed(), 3)
    if tokens:
        before, already = journal.marked
        row["tokens_per_second"] = round((tokens - already) / max(seconds - before, 1e-9))
    journal.marked = (journal.elapsed(), tokens)
    journal.rows.append(row)
    if journal.directory is not None:
        with open(journal.log, "a") as file:
            file.write(json.dumps(row) + "\n")


def cut_log(path: Path, step: int) -> list[dict]:
    """Cut a log back to the rows up to `step`, and return them. A torn line ends the log."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] > step:
            break
        rows.append(row)
    write_durably(path, b"".join(line + b"\n" for line in lines[: len(rows)]))
    return rows


def save_run(journal: Journal, state: TrainState) -> None:
    """Write a checkpoint, after the log has reached the disk. Without a directory: nothing to do."""
    step = int(state.step)
    if journal.directory is None or journal.saved == step:
        return
    metadata = {
        "settings": journal.settings,
        "metrics": journal.finite_metrics(step),
        "tokens": journal.tokens,
        "seconds": journal.elapsed(),
        "rows": len(journal.rows),
    }
    with open(journal.log, "a") as file:
        os.fsync(file.fileno())
    save_checkpoint(journal.directory, state, metadata)
    journal.saved = step


def resume_run(journal: Journal, state: TrainState) -> TrainState:
    """The state to go on from: that of the newest whole checkpoint, or `state` if there is none.

    Raises ValueError when the checkpoint was made with other settings or does not fit `state`.
    """
    if journal.directory is None:
        return state
    journal.directory.mkdir(parents=True, exist_ok=True)
    try:
        state, metadata = load_checkpoint(journal.directory, state)
    except FileNotFoundError:
        cut_log(journal.log, 0)
        return state
    for name, value in journal.settings.items():
        if (was := metadata["settings"].get(name)) != value:
            raise ValueError(
                f"{journal.directory} holds a run with {name}={was!r}, not {name}={value!r}: "
                "use the same, or another directory"
            )
    step, journal.metrics = int(state.step), metadata["metrics"]
    journal.tokens, journal.seconds = metadata["tokens"], metadata["seconds"]
    journal.marked, journal.saved = (journal.seconds, journal.tokens), step
    journal.rows = cut_log(journal.log, step)
    if len(journal.rows) < metadata["rows"]:
        message = "%s has lost rows: %d of %d up to step %d are left"
        counts = (len(journal.rows), metadata["rows"], step)
        logging.getLogger(__name__).warning(message, journal.log, *counts)
    for later in checkpoints(journal.directory):
        if int(later.name[5:]) > step:  # damaged, and reported: out of the way of new ones
            remove_checkpoint(later)
    return state


def after_step(
    journal: Journal,
    bar: tqdm,
    evaluate: Callable | None,
    every: dict[str, int],
    steps: int,
    step: int,
    state: TrainState,
) -> None:
    """Write the row and the checkpoint that are due after a step; after the last one, both are."""
    due = {name: step == steps or (n > 0 < step and step % n == 0) for name, n in every.items()}
    measure = evaluate if due["evaluate"] else None
    logged = journal.rows[-1]["step"] if journal.rows else 0
    if step > logged and (step == 1 or due["log"] or measure):
        record_row(journal, step, state.model, measure)
        shown = {"loss": f"{journal.rows[-1]['loss']:.3f}"}
        if journal.tokens:
            shown["tokens/s"] = journal.rows[-1]["tokens_per_second"]
        bar.set_postfix(shown, refresh=False)
    bar.update(step - bar.n)
    if due["checkpoint"]:
        save_run(journal, state)


def draw(batches: Callable[[int], Any], cursor: int, accumulate: int = 1) -> Any:
    """The next batch, or `accumulate` of them stacked along a new first axis.

    Raises ValueError when the micro-batches of one step differ in shape.
    """
    if accumulate == 1:
        return batches(cursor)
    drawn = [batches(cursor + i) for i in range(accumulate)]
    shapes = [jax.tree.map(np.shape, batch) for batch in drawn]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"micro-batches of one step must have equal shapes, got {shapes}")
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *drawn)


def run_steps(
    state: TrainState,
    advance: Callable,
    batches: Callable[[int], Any],
    journal: Journal,
    after: Callable[[int, TrainState], None],
    *,
    steps: int,
    seed: int,
    accumulate: int,
) -> TrainState:
    """Step until `steps` are done, and call `after(step, state)` first and after every step."""
    key, done, cursor = jax.random.key(seed), int(state.step), int(state.cursor)
    with interrupt_between_steps() as asked:
        try:
            after(done, state)
            while done < steps:
                if asked.is_set():
                    raise KeyboardInterrupt
                batch = draw(batches, cursor, accumulate)
                state, journal.metrics = advance(state, batch, key)
                journal.tokens += tokens_in(batch)
                done, cursor = done + 1, cursor + accumulate
                after(done, state)
        except KeyboardInterrupt:
            if not state.step.is_deleted() and int(state.step) == done:
                save_run(journal, state)
            raise
    return state


def fit(
    model: Any,
    loss: Callable,
    batches: Callable[[int], Any],
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    seed: int = 0,
    accumulate: int = 1,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    eval_every: int = 0,
    log_every: int = 10,
    directory: str | Path | None = None,
    checkpoint_every: int = 0,
    progress: bool = False,
    config: dict | None = None,
) -> tuple[TrainState, list[dict]]:
    """Train until `steps` are done (those before a resume count), log, evaluate, checkpoint, resume.

    `loss(model, batch, key)`: see mean_gradient; `batches(cursor)`: a pure function. `evaluate` must not
    keep the model. Rows: step 1, every `log_every`, every evaluation, the last step (always evaluated,
    and saved in `directory`): step, loss, grad_norm, tokens, evaluation, seconds. Resuming compares seed,
    accumulate, `config` (JSON). Raises ValueError, FloatingPointError, KeyboardInterrupt once saved.
    """
    if steps < 0 or accumulate < 1:
        raise ValueError(f"steps={steps} must be >= 0 and accumulate={accumulate} >= 1")
    if checkpoint_every and directory is None:
        raise ValueError(f"checkpoint_every={checkpoint_every} needs a directory")
    settings = json.loads(json.dumps({"seed": seed, "accumulate": accumulate, "config": config}))
    journal = Journal(None if directory is None else Path(directory), settings)
    state = resume_run(journal, train_state(model, optimizer))
    if (done := int(state.step)) > steps:
        raise ValueError(f"the checkpoint is at step {done}, beyond steps={steps}")
    advance = compile_step(make_step(loss, optimizer, accumulate=accumulate), state)
    every = {"log": log_every, "evaluate": eval_every, "checkpoint": checkpoint_every}
    count = {"steps": steps, "seed": seed, "accumulate": accumulate}
    with tqdm(total=steps, initial=done, disable=not progress, unit="step") as bar:
        after = functools.partial(after_step, journal, bar, evaluate, every, steps)
        return run_steps(state, advance, batches, journal, after, **count), journal.rows


@eqx.filter_jit
def _nats(model: NeuralLM, contexts: Array, targets: Array) -> Array:
    return negative_log_likelihood(model, contexts, targets)


def byte_log_probs(model: NeuralLM, documents: Iterable[bytes], chunk: int = 4096) -> np.ndarray:
    """The natural log of the probability of every byte of the documents, in order, in fp64."""
    n = model.H.shape[1] // model.C.shape[1]
    contexts, targets = byte_windows(documents, n)
    total = len(targets)
    padding = -total % chunk  # one shape for all chunks, so one compilation
    contexts = np.pad(contexts, ((0, padding), (0, 0))).reshape(-1, chunk, n)
    targets = np.pad(targets, (0, padding)).reshape(-1, chunk)
    nats = [np.asarray(_nats(model, c, t)) for c, t in zip(contexts, targets, strict=True)]
    return -np.concatenate(nats).astype(np.float64)[:total]
