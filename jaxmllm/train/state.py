"""The training state: flat dicts of arrays by parameter path ("llm/blocks/layers/block/mlp/up/kernel")."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct, traverse_util

from jaxmllm.config import Rule
from jaxmllm.errors import ConfigError

Params = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """Gradients, norm, clipping and optimizer see only `trainable`. `frozen` arrays are in the compute dtype."""

    step: jax.Array  # int32 scalar
    trainable: Params
    frozen: Params
    opt_state: object


def flatten(tree: Mapping) -> Params:
    """{"llm": {"norm": {"scale": x}}} -> {"llm/norm/scale": x}."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(params: Params) -> dict:
    """The inverse of `flatten`: the nested dict that Linen's `apply` takes."""
    return traverse_util.unflatten_dict(params, sep="/")


def match_rules(rules: tuple[Rule, ...], paths: list[str]) -> dict[str, Rule]:
    """The first rule that matches each path.

    Raises ConfigError if no rule matches a path, or a rule decides nothing.
    """
    table, used = {}, set()
    for path in paths:
        for rule in rules:
            if re.search(rule.pattern, path):
                table[path] = rule
                used.add(rule)
                break
        else:
            raise ConfigError(f"no rule covers parameter {path}; add one, e.g. Rule('.*', lr=None) to freeze the rest")
    for rule in rules:
        if rule not in used:
            raise ConfigError(
                f"rule {rule.pattern!r} decides nothing: no parameter matches it first; remove or move it"
            )
    return table


def split(params: Params, trained: set[str], dtype: jnp.dtype) -> tuple[Params, Params]:
    """-> (the trained parameters in float32, the frozen ones in the compute dtype)."""
    trainable = {k: v.astype(jnp.float32) for k, v in params.items() if k in trained}
    frozen = {k: v.astype(dtype) for k, v in params.items() if k not in trained}
    return trainable, frozen
