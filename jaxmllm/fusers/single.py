"""The baseline: one tap, unchanged (LLaVA-1.5 takes CLIP's hidden state 23)."""

from __future__ import annotations

import flax.linen as nn
import jax

from jaxmllm.batch import FeatureMap, MapShape


class Single(nn.Module):
    """taps [taps, N, h, w, C] -> the tap at `index`, [N, h, w, C]."""

    index: int = -1

    @nn.nowrap
    def output(self, taps: tuple[MapShape, ...]) -> MapShape:
        """Size of the map. Raises ValueError if these taps cannot be fused."""
        if not -len(taps) <= self.index < len(taps):
            raise ValueError(f"Single: there is no tap {self.index} among {len(taps)}")
        return taps[self.index]

    def __call__(self, taps: jax.Array) -> FeatureMap:
        return FeatureMap(taps[self.index])
