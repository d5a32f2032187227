"""Mixture of Features (Tong et al. 2024, arXiv 2401.06209, section 5): CLIP's and DINOv2's features together.

They are added, which only the paper describes, or interleaved; reference: MMVP's LLaVA/llava/model/llava_arch.py.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.aggregators.mlp import Projector, lay_out
from jaxmllm.batch import FeatureMap, MapShape, TokenLayout, VisualTokens
from jaxmllm.fields import Positive
from jaxmllm.nn.maps import need_plain, need_same


class AdditiveMoF(nn.Module):
    """Two maps of one size -> tokens [N, L*L, H]: one projector on alpha * first + (1 - alpha) * second."""

    alpha: float = 0.5  # share of the first encoder
    depth: Positive = 2
    newline: bool = False
    unpad: bool = False

    @nn.nowrap
    def layout(self, maps: dict[str, MapShape]) -> TokenLayout:
        """Order of the tokens. Raises ValueError if these maps cannot be aggregated."""
        if len(maps) != 2:
            raise ValueError(f"AdditiveMoF adds the maps of two encoders, not of {len(maps)}")
        return grid_layout(self, maps, channels=True)

    @nn.compact
    def __call__(self, maps: dict[str, FeatureMap], masks: dict[str, jax.Array], llm_width: int) -> VisualTokens:
        a, b = (x.cells for x in maps.values())
        x = (self.alpha * a.astype(jnp.float32) + (1 - self.alpha) * b.astype(jnp.float32)).astype(a.dtype)
        x = Projector(llm_width, self.depth, name="projector")(x)
        return VisualTokens(lay_out(x, self.newline), None)


class InterleavedMoF(nn.Module):
    """Maps of one grid -> tokens [N, encoders*L*L, H].

    Each encoder has its own projector; the tokens of a cell stand side by side, in the order of the encoders.
    """

    depth: Positive = 2
    newline: bool = False
    unpad: bool = False

    @nn.nowrap
    def layout(self, maps: dict[str, MapShape]) -> TokenLayout:
        """Order of the tokens. Raises ValueError if these maps cannot be aggregated."""
        if len(maps) < 2:
            raise ValueError("InterleavedMoF needs at least two encoders; with one, use MLPProjector")
        return grid_layout(self, maps, channels=False)

    @nn.compact
    def __call__(self, maps: dict[str, FeatureMap], masks: dict[str, jax.Array], llm_width: int) -> VisualTokens:
        parts = [Projector(llm_width, self.depth, name=f"projector_{name}")(x.cells) for name, x in maps.items()]
        n, h, w, _ = parts[0].shape
        cells = sharded.reshape(jnp.stack(parts, 3), n, h, w * len(parts), llm_width)
        return VisualTokens(lay_out(cells, self.newline), None)


def grid_layout(mof: AdditiveMoF | InterleavedMoF, maps: dict[str, MapShape], channels: bool) -> TokenLayout:
    """The layout of both. Raises ValueError unless all maps have the same square grid (if `channels`, also width)."""
    who = type(mof).__name__
    need_plain(who, maps.values())
    need_same(who, maps.values(), channels)
    (h, w, _, _), *_ = maps.values()
    if h != w:
        raise ValueError(f"{who}: the grid of its tokens must be square, not {h} x {w}")
    per_cell = 1 if channels else len(maps)
    return TokenLayout(h, mof.newline, mof.unpad, per_cell)
