"""Optimizers as values of a config.

An optimizer has the fields lr (peak rate), schedule (train/schedules.py), weight_decay and clip (largest global
gradient norm, None for none), and `direction`: the transformation of gradients into updates before decay, rate and
schedule (train/optim.py adds those). Another optimizer is any frozen dataclass with these.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from jaxmllm.nn.param_info import ParamInfo
from jaxmllm.train.schedules import Cosine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The fields that all optimizers share."""

    lr: float
    schedule: Any = Cosine()
    weight_decay: float = 0.0
    clip: float | None = 1.0

    def direction(self, infos: dict[str, ParamInfo]) -> optax.GradientTransformation:
        """infos: path -> what the parameter is, for the trained parameters."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def direction(self, infos: dict[str, ParamInfo]) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)
