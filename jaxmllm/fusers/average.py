"""Plain and weighted means of the taps, two of MMFuser's baselines (Cao et al. 2024, arXiv 2410.11829, table 1).

No code is published for either. Decided here: no norm before the mean; the learned weights are a softmax of logits that
start at zero, so that a fresh WeightedAverage equals Average.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm.batch import FeatureMap, MapShape
from jaxmllm.nn.maps import mean, need_same
from jaxmllm.nn.primitives import LearnedArray, zeros


class Average(nn.Module):
    """taps [taps, N, h, w, C] -> their mean [N, h, w, C], taken in float32."""

    @nn.nowrap
    def output(self, taps: tuple[MapShape, ...]) -> MapShape:
        """Size of the map. Raises ValueError if these taps cannot be fused."""
        need_same(type(self).__name__, taps)
        return taps[0]

    def __call__(self, taps: jax.Array) -> FeatureMap:
        return FeatureMap(mean(taps))


class WeightedAverage(Average):
    """taps [taps, N, h, w, C] -> sum_i softmax(logits)_i taps_i, taken in float32; one parameter per tap."""

    @nn.compact
    def __call__(self, taps: jax.Array) -> FeatureMap:
        weights = jax.nn.softmax(LearnedArray(zeros, name="logits")((len(taps),)).astype(jnp.float32))
        return FeatureMap(sum(w * x.astype(jnp.float32) for w, x in zip(weights, taps)).astype(taps[0].dtype))
