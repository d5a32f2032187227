"""The baseline projector: LLaVA-1.5's Linear-GELU-Linear on every cell of one encoder's map."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import mesh
from jaxmllm.batch import VisualTokens
from jaxmllm.nn.primitives import MLP, Table


def add_newlines(grid: jax.Array, newline: jax.Array | None) -> jax.Array:
    """[N, L, L, H] -> [N, L*(L+1), H]: a learned token after every row; without one, [N, L*L, H]."""
    n, rows, _, h = grid.shape
    if newline is not None:
        column = jnp.broadcast_to(newline.astype(grid.dtype), (n, rows, 1, h))
        grid = jnp.concatenate([grid, mesh.shard(column, "batch", None, None, None)], 2)
    return mesh.reshape(grid, n, grid.shape[1] * grid.shape[2], h)


class MLPProjector(nn.Module):
    """One encoder's map [N, L, L, C] -> tokens [N, L*L (+ L), H]."""

    width: int  # H
    grid: int  # L
    newline: bool = False

    @nn.compact
    def __call__(self, maps: dict[str, jax.Array], masks: dict[str, jax.Array]) -> VisualTokens:
        (x,) = maps.values()
        x = MLP(self.width, self.width, name="projector")(x)
        newline = (
            Table((self.width,), nn.initializers.normal(self.width**-0.5), name="newline")() if self.newline else None
        )
        return VisualTokens(add_newlines(x, newline), None)
