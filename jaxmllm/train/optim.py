"""An optimizer of the config, with the rates and decay of the config's rules, as one optax transformation."""

from __future__ import annotations

import optax

from jaxmllm.config import Rule
from jaxmllm.nn.param_info import ParamInfo

NOT_DECAYED = ("norm", "bias")  # kinds of parameters that weight decay leaves out, unless a rule says otherwise


def rate(optimizer, steps: int) -> optax.Schedule:
    """The learning rate by update, counted from 0."""
    factor = optimizer.schedule(steps)
    return lambda count: optimizer.lr * factor(count)


def transformation(
    optimizer, steps: int, table: dict[str, Rule], infos: dict[str, ParamInfo]
) -> optax.GradientTransformation:
    """Clip by global norm -> direction -> decay -> factor of the rule -> schedule, for the trained parameters.

    table, infos: path -> rule, what the parameter is. The state mirrors the flat dict of trained parameters.
    """
    trained = {path: info for path, info in infos.items() if is_trained(table[path], info)}
    decay = {
        path: info.kind not in NOT_DECAYED if table[path].decay is None else table[path].decay
        for path, info in trained.items()
    }
    scale = optax.stateless(lambda updates, _: {k: u * table[k].lr for k, u in updates.items()})
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip) if optimizer.clip else optax.identity(),
        optimizer.direction(trained),
        optax.add_decayed_weights(optimizer.weight_decay, decay) if optimizer.weight_decay else optax.identity(),
        scale,
        optax.scale_by_learning_rate(rate(optimizer, steps)),
    )


def is_trained(rule: Rule, info: ParamInfo) -> bool:
    """Whether a parameter is trained: its rule does not freeze it, and it is no statistic."""
    return rule.lr is not None and info.kind != "statistic"
