"""Concatenation of taps, or of means of groups of taps, along channels.

With one tap per group this is the concatenation baseline of MMFuser (Cao et al. 2024, table 1). It is also the
"external direct" fusion of Lin et al. 2025 (arXiv 2503.06063; llava/model/llava_arch.py) for all of its layer sets:
CLIP's taps (3, 18, 23) without groups; "former", taps 1..12 and 23 with groups (0..11), (12); "latter", taps 13..24
with groups (0..11), (10); "all", taps 1..24 with groups (0..11), (12..23), (22). Dense Connector's SCI and DCI are
Concats too.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm.batch import FeatureMap, MapShape
from jaxmllm.nn.maps import mean, need_same


class Concat(nn.Module):
    """taps [taps, N, h, w, C] -> [N, h, w, sum of the groups' channels]; no parameters.

    groups: for each part of the channels, the indices of the taps whose float32 mean it is. None: one part per tap. A
    tap may be in several groups or in none.
    """

    groups: tuple[tuple[int, ...], ...] | None = None

    @nn.nowrap
    def parts(self, taps: int) -> tuple[tuple[int, ...], ...]:
        """The groups, for this number of taps."""
        return tuple((i,) for i in range(taps)) if self.groups is None else self.groups

    @nn.nowrap
    def output(self, taps: tuple[MapShape, ...]) -> MapShape:
        """Size of the map. Raises ValueError if these taps cannot be fused."""
        parts = self.parts(len(taps))
        for group in parts:
            if not group or max(group) >= len(taps) or min(group) < -len(taps):
                raise ValueError(f"Concat: group {group} must name some of the {len(taps)} taps")
            need_same("Concat: a group", (taps[i] for i in group))
        need_same("Concat", (taps[group[0]] for group in parts), channels=False)
        return taps[parts[0][0]]._replace(c=sum(taps[group[0]].c for group in parts))

    def __call__(self, taps: jax.Array) -> FeatureMap:
        return FeatureMap(jnp.concatenate([mean(taps[i] for i in group) for group in self.parts(len(taps))], -1))
