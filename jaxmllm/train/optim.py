"""An optimizer of the config, with the rates and decay of the config's rules, as one optax transformation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmllm.config import Rule
from jaxmllm.nn.param_info import ParamInfo
from jaxmllm.train.state import TrainState

NOT_DECAYED = ("norm", "bias")  # kinds of parameters that weight decay leaves out, unless a rule says otherwise


def rate(optimizer, steps: int) -> optax.Schedule:
    """The learning rate by update, counted from 0."""
    factor = optimizer.schedule(steps)
    return lambda count: optimizer.lr * factor(count)


def transformation(
    optimizer, steps: int, table: dict[str, Rule], infos: dict[str, ParamInfo]
) -> optax.GradientTransformation:
    """Clip by global norm -> direction -> decay -> factor of rule and optimizer -> schedule, for trained parameters.

    table, infos: path -> rule, what the parameter is. The state mirrors the flat dict of trained parameters.
    """
    trained = {path: info for path, info in infos.items() if is_trained(table[path], info)}
    decay = {
        path: info.kind not in NOT_DECAYED if table[path].decay is None else table[path].decay
        for path, info in trained.items()
    }
    factors = {path: table[path].lr * optimizer.rate_factor(info) for path, info in trained.items()}
    scale = optax.stateless(lambda updates, _: {k: u * factors[k] for k, u in updates.items()})
    return optax.chain(
        note_gradients(),
        optax.clip_by_global_norm(optimizer.clip) if optimizer.clip else optax.identity(),
        optimizer.direction(trained),
        optax.add_decayed_weights(optimizer.weight_decay, decay) if optimizer.weight_decay else optax.identity(),
        scale,
        optax.scale_by_learning_rate(rate(optimizer, steps)),
    )


class Reached(NamedTuple):
    """Which parameters, in the order of their sorted paths, have had a gradient other than zero: bool[parameters]."""

    reached: jax.Array


def note_gradients() -> optax.GradientTransformation:
    """Passes gradients on and notes in its state which parameters they have reached."""

    def update(grads, state, params=None):
        # The squares are those of the metric grad_norm, so the compiler computes and communicates nothing twice.
        now = jnp.stack([optax.global_norm(grads[path]) > 0 for path in sorted(grads)])
        return grads, Reached(state.reached | now)

    return optax.GradientTransformation(lambda params: Reached(jnp.zeros(len(params), bool)), update)


def unreached(state: TrainState) -> list[str]:
    """Paths of the trained parameters whose gradient has been zero in all steps of the stage. Waits for the state."""
    flags = jax.device_get(optax.tree.get(state.opt_state, "reached"))
    return [path for path, reached in zip(sorted(state.trainable), flags) if not reached]


def is_trained(rule: Rule, info: ParamInfo) -> bool:
    """Whether a parameter is trained: its rule does not freeze it, and it is no statistic."""
    return rule.lr is not None and info.kind != "statistic"
