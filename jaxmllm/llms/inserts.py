"""Layers inside the language model that look at the image, on the patch tokens only (Cambrian-1's in-LLM SVA).

A visual layer follows decoder layers start, start + stride, ... The decoder layers stay one scan; in each turn,
`lax.cond` runs a visual layer after the decoder layer or does nothing. A scan of scans (one group of layers a turn)
would hold and copy twice what the backward pass needs: 200 of 1,335 million cycles and 2.4 GB of Cambrian-8B on a v6e
(docs/log.md#layers-inside-the-language-model).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.batch import Visual, VisualMemory
from jaxmllm.fields import Natural, Positive
from jaxmllm.llms.apply_if import apply_if, apply_if_remat
from jaxmllm.nn.inverse_gather import PLACES
from jaxmllm.nn.stack import scan_layers


@dataclasses.dataclass(frozen=True)
class VisualInserts:
    """Copies of a visual layer, after the decoder layers start + stride * j for j < count.

    layer: a module called as layer(patches [N, L*L, H], memory) -> patches.
    """

    layer: nn.Module
    start: Natural
    stride: Positive
    count: Positive

    @property
    def last(self) -> int:
        """The decoder layer that the last visual layer follows."""
        return self.start + self.stride * (self.count - 1)


class VisualLayers(nn.Module):
    """All visual layers of a decoder with `layers` layers.

    remat: the backward pass computes them again; only the patches before each layer are saved.
    """

    inserts: VisualInserts
    layers: int
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, visual: Visual) -> tuple[Callable, VisualMemory | None]:
        """x [B, S, H] -> (interleave, its first carry) for nn.stack.Stack.

        With remat the carry is the memory, which interleave hands on unchanged: this is the path of its gradient, to
        which each visual layer adds. If all layers read one memory instead, the gradient of every decoder layer with
        respect to it, zero for most layers, would be made and added.
        """
        b, slots, _ = visual.positions.shape
        per_image = (b * slots, visual.grid**2, x.shape[-1])
        insert, start, stride, count = (getattr(self.inserts, name) for name in ("layer", "start", "stride", "count"))
        if self.is_initializing():
            stack = scan_layers(insert.copy(), count, name="layers")
            stack(sharded.shard(jnp.zeros(per_image, x.dtype), *PLACES), visual.memory)
        weights = self.get_variable("params", "layers")["layer"]
        places, insert = patch_places(visual), insert.clone(parent=None)

        def layer(weights, patches, memory):
            y = insert.apply({"params": weights}, sharded.reshape(patches, *per_image), memory)
            return sharded.reshape(y, *patches.shape)

        memory = jax.lax.stop_gradient(visual.memory)

        def interleave(x, passed, i):
            j, left = jnp.divmod(i - start, stride)
            here = (left == 0) & (j >= 0) & (j < count)
            pick = functools.partial(jax.lax.dynamic_index_in_dim, index=jnp.maximum(j, 0), keepdims=False)
            # A plan reads from this scope how many of the turns run a visual layer (plan/hlo.py, plan/flops.py).
            with jax.named_scope("insert"), jax.named_scope(f"{count}_of_{self.layers}"):
                own = jax.tree.map(pick, weights)
                if self.remat:
                    return apply_if_remat(layer, here, own, x, passed, memory, *places)
                return apply_if(layer, here, own, x, visual.memory, *places), passed

        return interleave, visual.memory if self.remat else None


def patch_places(visual: Visual) -> tuple[jax.Array, jax.Array]:
    """Where the patches of all images stand in a row, without newlines: positions int32[B, I * L * L], and the inverse,
    int32[B, S]; -1 for none."""
    (b, slots, block), grid, columns = visual.positions.shape, visual.grid, visual.columns
    positions = sharded.reshape(visual.positions[..., : grid * columns], b, slots, grid, columns)
    slot, token = jnp.divmod(visual.index, block)
    row, column = jnp.divmod(token, columns)
    patch = (visual.index >= 0) & (row < grid) & (column < grid)
    index = jnp.where(patch, (slot * grid + row) * grid + column, -1)
    return sharded.reshape(positions[..., :grid], b, slots * grid**2), index
