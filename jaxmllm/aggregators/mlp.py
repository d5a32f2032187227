"""The baseline projector: linear layers with GELU between on every cell (LLaVA-1.5's mlp2x_gelu; depth 1: linear).

With several encoders their maps are first resized to one grid and joined on channels, which is Cambrian-1's
"concatenation" baseline (table 12 of arXiv 2406.16860).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import mesh
from jaxmllm.batch import FeatureMap, MapShape, TokenLayout, VisualTokens
from jaxmllm.nn.maps import resize
from jaxmllm.nn.primitives import ACTIVATIONS, Linear, Table, normal


class Projector(nn.Module):
    """x [..., C] -> [..., width]: `depth` linear layers with exact GELU between (LLaVA's mlp{depth}x_gelu)."""

    width: int
    depth: int = 2
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth):
            # Every second layer turns the tensor-split hidden channels back into whole ones.
            hidden_in, hidden_out = i % 2 == 1, i % 2 == 0 and i < self.depth - 1
            axes = ("mlp",) if hidden_in else ("embed",), ("mlp",) if hidden_out else (None,)
            x = Linear((self.width,), *axes, name=f"linear_{i}")(x if i == 0 else ACTIVATIONS[self.activation](x))
        return x


def join_channels(maps: dict[str, FeatureMap], grid: int) -> jax.Array:
    """Maps of all encoders, resized to `grid`, side by side on channels: [N, grid, grid, sum of C]."""
    return jnp.concatenate([resize(x.cells, grid, grid) for x in maps.values()], -1)


def lay_out(cells: jax.Array, newline: bool, extra: jax.Array | None = None) -> jax.Array:
    """Cells [N, L, columns, H] (, further tokens [N, E, H]) -> [N, P, H] in the order of TokenLayout.

    newline: ends every line with a learned token (Table "newline" of the module that calls) whose initial values are
    N(0, 1/H), as in Cambrian-1.
    """
    n, rows, _, h = cells.shape
    if newline:
        newline = Table((h,), normal(h**-0.5), name="newline")().astype(cells.dtype)
        cells = jnp.concatenate([cells, mesh.repeat_rows(newline, n, rows, 1)], 2)
    tokens = mesh.reshape(cells, n, rows * cells.shape[2], h)
    return tokens if extra is None else jnp.concatenate([tokens, extra], 1)


class MLPProjector(nn.Module):
    """Maps -> tokens [N, L*L (+ L) (+ E), H]; tokens beside the grid (Dense Connector's STI) follow it.

    LLaVA-1.5 has no newline token and keeps the tokens of padding; LLaVA-NeXT has one, and drops them.
    """

    llm_width: int  # H
    grid: int  # L
    depth: int = 2
    newline: bool = False
    unpad: bool = False

    @nn.nowrap
    def layout(self, maps: dict[str, MapShape]) -> TokenLayout:
        """Order of the tokens. Raises ValueError if these maps cannot be aggregated."""
        extra = sum(x.extra for x in maps.values())
        if extra and [x[:2] for x in maps.values()] != [(self.grid, self.grid)]:
            raise ValueError(f"MLPProjector: tokens beside the grid (STI) need one encoder with a grid of {self.grid}")
        return TokenLayout(self.llm_width, self.grid, self.newline, self.unpad, extra=extra)

    @nn.compact
    def __call__(self, maps: dict[str, FeatureMap], masks: dict[str, jax.Array]) -> VisualTokens:
        project = Projector(self.llm_width, self.depth, name="projector")
        cells = project(join_channels(maps, self.grid))
        extra = [project(x.extra) for x in maps.values() if x.extra is not None]
        return VisualTokens(lay_out(cells, self.newline, *extra), None)
