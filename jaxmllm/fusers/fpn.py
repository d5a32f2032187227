"""A feature pyramid over the taps (Lin et al. 2017, arXiv 1612.03144), as in table 1 of MMFuser (Cao et al. 2024).

    P_n = lateral_n(X_n),   P_i = lateral_i(X_i) + up(P_{i+1}),   Y = conv3x3(P_1)     for taps X_1, .., X_n

MMFuser's authors publish no code for it. Decided here: laterals are 1 x 1 with bias to the width of the first tap; `up`
is nearest-neighbour, as in the FPN paper, and the identity where the grids are equal (any ViT); only the finest map is
read; no norms.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from jaxmllm.batch import FeatureMap, MapShape
from jaxmllm.nn.maps import resize, sizes
from jaxmllm.nn.primitives import Conv, Linear


class FPN(nn.Module):
    """taps from shallow to deep, [taps, N, h, w, C] or a list of maps that never grow -> [N, h, w, C] of the first."""

    @nn.nowrap
    def output(self, taps: tuple[MapShape, ...]) -> MapShape:
        """Size of the map. Raises ValueError if these taps cannot be fused."""
        if any(deep.h > fine.h or deep.w > fine.w for fine, deep in zip(taps, taps[1:])):
            raise ValueError(f"FPN needs taps from fine to coarse, not {sizes(taps, channels=False)}")
        return taps[0]

    @nn.compact
    def __call__(self, taps: jax.Array) -> FeatureMap:
        width, y = taps[0].shape[-1], None
        for i in reversed(range(len(taps))):
            x = Linear((width,), name=f"lateral_{i}")(taps[i])
            y = x if y is None else x + resize(y, *x.shape[1:3], "nearest")
        return FeatureMap(Conv(width, 3, name="smooth")(y))
