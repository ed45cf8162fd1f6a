"""The last part of a run: a learning rate that falls to zero, better data while it falls, data sets judged by it, and the mean of the last weights.

Written from chapters/24_annealing.py by `make export`: edit there.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_from_scratch.training import (
    TrainState,
    from_safetensors,
    is_trainable,
    verify_checkpoint,
    widen,
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
    Raises ValueError unless 0 <= share <= 1 and 1 <= anneal <= steps, and for weights that add up to 0.
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
    """The mean of models of one shape, summed in fp64, in the dtypes of the first; one is held at a time.

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
