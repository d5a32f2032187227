"""Dense Connector (Yao et al. 2024, arXiv 2405.13800): three ways to add the maps of earlier layers to the last one.

Nothing is learned here; only the first matrix of the projector grows. The last map comes first, as in the reference
(dense_connector.py; the paper writes it last). CLIP-L: last map 23 (of the hidden states), early maps 7 and 15, groups
0..11 and 12..23. SigLIP-SO400M (27 states): last map 26, groups 0..12 and 13..25.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.batch import FeatureMap, MapShape
from jaxmllm.fields import Positive
from jaxmllm.fusers.concat import Concat
from jaxmllm.nn.maps import need_same


class STI(nn.Module):
    """Sparse token integration: taps [taps, N, h, w, C] -> the last tap as the map, and extra tokens from the others.

    Each extra token is the mean of `pool` successive cells in row-major order, whatever the width of a row. The cells
    left over at the end are dropped (SigLIP's 729 cells give 91 tokens).
    """

    pool: Positive = 8

    @nn.nowrap
    def output(self, taps: tuple[MapShape, ...]) -> MapShape:
        """Size of the map. Raises ValueError if these taps cannot be fused."""
        need_same("STI", taps)
        h, w, c, _ = taps[-1]
        if len(taps) < 2 or h * w < self.pool:
            raise ValueError(f"STI needs at least two taps of at least {self.pool} cells, not {len(taps)} of {h} x {w}")
        return MapShape(h, w, c, (len(taps) - 1) * (h * w // self.pool))

    def __call__(self, taps: jax.Array) -> FeatureMap:
        n, h, w, c = taps[-1].shape
        count = h * w // self.pool
        extra = []
        for tap in taps[:-1]:
            tokens = sharded.reshape(tap, n, h * w, c)[:, : count * self.pool].astype(jnp.float32)
            extra.append(sharded.reshape(tokens, n, count, self.pool, c).mean(2).astype(tap.dtype))
        return FeatureMap(taps[-1], jnp.concatenate(extra, 1))


def sci(taps: int = 3) -> Concat:
    """Sparse channel integration of this many taps: the last, then the others (CLIP-L: taps (7, 15, 23))."""
    return Concat(((taps - 1,), *((i,) for i in range(taps - 1))))


def dci(size: int = 12, count: int = 2, final: int = 23) -> Concat:
    """Dense channel integration: hidden state `final`, then the means of `count` groups of `size` states, from state 0.

    The encoder's taps must be 0, 1, .. up to the last one used. CLIP-L: dci(); SigLIP-SO400M: dci(13, final=26).
    """
    return Concat(((final,), *(tuple(range(g * size, (g + 1) * size)) for g in range(count))))
