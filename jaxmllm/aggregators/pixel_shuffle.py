"""Pixel shuffle: each ratio x ratio block of cells becomes one token.

InternVL 1.5 (Chen et al. 2024, arXiv 2404.16821, section 3.1). Reference: transformers, idefics3/modeling_idefics3.py,
Idefics3Connector. The channels of a block are ordered row by row. Depth 1 is Idefics3's connector, except for its bias.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from jaxmllm import sharded
from jaxmllm.aggregators.mlp import Projector, join_channels, lay_out
from jaxmllm.batch import FeatureMap, MapShape, TokenLayout, VisualTokens
from jaxmllm.fields import Positive
from jaxmllm.nn.maps import need_plain


class PixelShuffle(nn.Module):
    """Maps, joined along channels -> tokens [N, L*L (+ L), H]; each token reads ratio x ratio cells."""

    grid: Positive  # L
    ratio: Positive = 2
    depth: Positive = 2
    newline: bool = False
    unpad: bool = False

    @nn.nowrap
    def layout(self, maps: dict[str, MapShape]) -> TokenLayout:
        """Order of the tokens. Raises ValueError if these maps cannot be aggregated."""
        need_plain("PixelShuffle", maps.values())
        side = self.grid * self.ratio
        for name, x in maps.items():
            if x[:2] != (side, side):
                needed = f"{self.ratio} x {self.ratio} cells for each of {self.grid} x {self.grid} tokens"
                raise ValueError(f"PixelShuffle: encoder {name!r} has a grid of {x.h} x {x.w}, not {needed}")
        return TokenLayout(self.grid, self.newline, self.unpad)

    @nn.compact
    def __call__(self, maps: dict[str, FeatureMap], masks: dict[str, jax.Array], llm_width: int) -> VisualTokens:
        x = join_channels(maps, self.grid * self.ratio)
        n, c, r = x.shape[0], x.shape[-1], self.ratio
        x = sharded.reshape(x, n, self.grid, r, self.grid, r, c).swapaxes(2, 3)
        x = sharded.reshape(x, n, self.grid, self.grid, r * r * c)
        x = Projector(llm_width, self.depth, name="projector")(x)
        return VisualTokens(lay_out(x, self.newline), None)
