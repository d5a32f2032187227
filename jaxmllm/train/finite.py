"""A run ends before it saves numbers from which it could not go on, and names the checkpoint to go back to."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxmllm.train.checkpoint import StageCheckpoints, own_part
from jaxmllm.train.state import TrainState

LARGEST = 1e18  # of a parameter: the squares of larger ones overflow, also in bfloat16


def check_metrics(values: dict[str, float], step: int, checkpoints: StageCheckpoints) -> None:
    """Raises FloatingPointError if the loss or the norm of the gradient of a step (counted from 1) is not finite."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise ruined(f"{name} is {values[name]} at step {step}", step - 1, checkpoints)


def check_state(state: TrainState, step: int, checkpoints: StageCheckpoints) -> None:
    """Raises FloatingPointError, naming the first array, if what is to be saved after `step` is ruined.

    All processes must call it. Each looks at its own shards, on the host: programs for 500 arrays of 50 shapes would
    take longer to compile than the toy trains in 100 steps.
    """
    named, _ = jax.tree.flatten_with_path(own_part(state))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named]
    limits = [math.inf if name.startswith("opt_state") else LARGEST for name in names]
    usable = np.array([is_usable(x, limit) for (_, x), limit in zip(named, limits)])
    if jax.process_count() > 1:
        with jax.transfer_guard("allow"):
            usable = multihost_utils.process_allgather(usable).all(0)
    if not usable.all():
        name = names[int(np.argmin(usable))]
        raise ruined(f"{name} is not finite, or beyond {LARGEST:g}, after step {step}", step, checkpoints)


def is_usable(array: jax.Array, largest: float) -> bool:
    """Whether all values in this process's shards are numbers below `largest` in magnitude."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return True
    parts = [jax.device_get(shard.data) for shard in array.addressable_shards if not shard.replica_id]
    return all(part.max() < largest and part.min() > -largest for part in parts if part.size)


def ruined(what: str, before: int, checkpoints: StageCheckpoints) -> FloatingPointError:
    """The error to raise. It names the newest checkpoint, or the one before if that is of step `before`."""
    checkpoints.wait()
    newest, note = checkpoints.newest_folder(), ""
    if newest and checkpoints.latest() == before:
        newest, note = checkpoints.newest_folder(before), f" ({newest} leads here at once)"
    return FloatingPointError(
        f"{what} of stage {checkpoints.stage}; checkpoint to go back to: {newest or 'none yet'}{note}"
    )
