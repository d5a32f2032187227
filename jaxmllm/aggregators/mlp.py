"""The baseline projector: linear layers with GELU between them, applied to each cell.

Depth 2 is LLaVA-1.5's mlp2x_gelu, depth 1 LLaVA's linear layer. The maps of several encoders are first resized to one
grid and joined along channels, which is Cambrian-1's "concatenation" baseline (table 12 of arXiv 2406.16860).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.batch import FeatureMap, MapShape, TokenLayout, VisualTokens
from jaxmllm.fields import Positive
from jaxmllm.nn.maps import resize
from jaxmllm.nn.primitives import ACTIVATIONS, LearnedArray, Linear, normal


class Projector(nn.Module):
    """x [..., C] -> [..., width]: `depth` linear layers with exact GELU between them (LLaVA's mlp{depth}x_gelu)."""

    width: Positive
    depth: Positive = 2
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth):
            # Hidden channels are split over the mesh's tensor axis; each second layer makes them whole again.
            hidden_in, hidden_out = i % 2 == 1, i % 2 == 0 and i < self.depth - 1
            axes = ("mlp",) if hidden_in else ("embed",), ("mlp",) if hidden_out else (None,)
            x = Linear((self.width,), *axes, name=f"linear_{i}")(x if i == 0 else ACTIVATIONS[self.activation](x))
        return x


def join_channels(maps: dict[str, FeatureMap], grid: int) -> jax.Array:
    """Maps of all encoders, resized to a grid and joined along channels: [N, grid, grid, sum of C]."""
    return jnp.concatenate([resize(x.cells, grid, grid) for x in maps.values()], -1)


def lay_out(cells: jax.Array, newline: bool, extra: jax.Array | None = None) -> jax.Array:
    """Cells [N, L, columns, H] and extra tokens [N, extra, H], if any -> [N, P, H] in the order of TokenLayout.

    newline: ends each line of the grid with a learned token (LearnedArray "newline" of the calling module), whose
    initial values are N(0, 1/H), as in Cambrian-1.
    """
    n, rows, _, h = cells.shape
    if newline:
        newline = LearnedArray(normal(h**-0.5), name="newline")((h,)).astype(cells.dtype)
        cells = jnp.concatenate([cells, sharded.repeat_rows(newline, n, rows, 1)], 2)
    tokens = sharded.reshape(cells, n, rows * cells.shape[2], h)
    return tokens if extra is None else jnp.concatenate([tokens, extra], 1)


class MLPProjector(nn.Module):
    """Maps -> tokens [N, L*L (+ L) (+ extra), H]; extra tokens (Dense Connector's STI) follow those of the grid.

    LLaVA-1.5 has no newline token and keeps the tokens of padding; LLaVA-NeXT has a newline token and drops them.
    """

    grid: Positive  # L
    depth: Positive = 2
    newline: bool = False
    unpad: bool = False

    @nn.nowrap
    def layout(self, maps: dict[str, MapShape]) -> TokenLayout:
        """Order of the tokens. Raises ValueError if these maps cannot be aggregated."""
        extra = sum(x.extra for x in maps.values())
        if extra and [x[:2] for x in maps.values()] != [(self.grid, self.grid)]:
            raise ValueError(f"MLPProjector: extra tokens (STI) need a single encoder, with a grid of {self.grid}")
        return TokenLayout(self.grid, self.newline, self.unpad, extra=extra)

    @nn.compact
    def __call__(self, maps: dict[str, FeatureMap], masks: dict[str, jax.Array], llm_width: int) -> VisualTokens:
        project = Projector(llm_width, self.depth, name="projector")
        cells = project(join_channels(maps, self.grid))
        extra = [project(x.extra) for x in maps.values() if x.extra is not None]
        return VisualTokens(lay_out(cells, self.newline, *extra), None)
