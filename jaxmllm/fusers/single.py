"""The baseline: one tap, as it is (LLaVA-1.5 takes CLIP's hidden state 23)."""

from __future__ import annotations

import flax.linen as nn
import jax


class Single(nn.Module):
    """taps [K, N, h, w, C] -> [N, h, w, C], the tap at `index`."""

    index: int = -1

    def __call__(self, taps: jax.Array) -> jax.Array:
        return taps[self.index]
