"""Optimizers as values of a config.

Another optimizer is a frozen dataclass that extends Optimizer. Its `direction` turns gradients into updates;
train/optim.py clips before it, and adds decay, the factors of the rules, the rate and its schedule after it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from jaxmllm.fields import NonNegative, Positive
from jaxmllm.nn.param_info import ParamInfo
from jaxmllm.train.factored import scale_by_factored_rms
from jaxmllm.train.muon import orthogonalize
from jaxmllm.train.schedules import Cosine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The fields that all optimizers share. clip: the largest global gradient norm, None for none."""

    lr: NonNegative  # peak rate
    schedule: Any = Cosine()  # train/schedules.py
    weight_decay: NonNegative = 0.0
    clip: NonNegative | None = 1.0

    def direction(self, infos: dict[str, ParamInfo]) -> optax.GradientTransformation:
        """infos: path -> what the parameter is, for the trained parameters."""
        raise NotImplementedError

    def rate_factor(self, info: ParamInfo) -> float:
        """Factor of the rate, decay included, of a parameter; it multiplies that of the parameter's rule."""
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    b1: float = 0.9
    b2: float = 0.999
    eps: NonNegative = 1e-8

    def direction(self, infos: dict[str, ParamInfo]) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Orthogonalised momentum for matrices (Keller Jordan 2024), Adam for embeddings, norms, biases and arrays.

    Kernels with several input or output dimensions, and layers that are stacked, are seen as separate matrices
    [in, out]. Updates have the size of Moonlight's (Liu et al. 2025, arXiv 2502.16982), 0.2 sqrt(max(in, out)) times
    an orthogonal matrix, so lr and weight_decay are those of AdamW. The state is one float32 array per matrix, two per
    other parameter.
    """

    momentum: NonNegative = 0.95  # Nesterov's
    iterations: Positive = 5  # of Newton and Schulz
    adam_rate: NonNegative = 1.0  # factor of the rate of what is not a matrix
    b1: float = 0.9  # b1, b2, eps: Adam's
    b2: float = 0.95
    eps: NonNegative = 1e-8

    def direction(self, infos: dict[str, ParamInfo]) -> optax.GradientTransformation:
        def matrices(updates, _):  # partition hides the other parameters
            hidden = optax.MaskedNode
            return {
                path: x if isinstance(x, hidden) else orthogonalize(x, infos[path], self.iterations)
                for path, x in updates.items()
            }

        directions = {
            "muon": optax.chain(optax.trace(self.momentum, nesterov=True), optax.stateless(matrices)),
            "adam": optax.scale_by_adam(self.b1, self.b2, self.eps),
        }
        return optax.partition(
            directions, {k: "muon" if info.kind == "matrix" else "adam" for k, info in infos.items()}
        )

    def rate_factor(self, info: ParamInfo) -> float:
        return 1.0 if info.kind == "matrix" else self.adam_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) without momentum, relative rates and parameter scale.

    So lr means what it means for AdamW. The second moments of a matrix or embedding [in, out] are kept as means of its
    rows and columns, in + out values; other parameters keep theirs whole.
    """

    decay: float = 0.8  # the second moments forget with the factor 1 - step ** -decay
    eps: NonNegative = 1e-30  # added to squared gradients
    threshold: NonNegative = 1.0  # the largest root mean square of an update of one layer

    def direction(self, infos: dict[str, ParamInfo]) -> optax.GradientTransformation:
        return scale_by_factored_rms(infos, self.decay, self.eps, self.threshold)
