"""Repeated layers with taps: the only file that scans over layers and rematerialises them.

The ViT and the language model both use it, so "encoder taps" and "hidden states for distillation" are one mechanism.
A tap leaves the scan in a fixed buffer in the carry, so the outputs of the other layers are never kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# What the forward pass saves for the backward pass, which computes the rest of a block again.
REMAT = {
    "none": None,  # save everything
    "full": jax.checkpoint_policies.nothing_saveable,  # save only each block's input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # save the outputs of weight matmuls
    # Save the projections of attention (queries and keys rotated) and MLP, and the residuals of the attention kernel,
    # but not a block's last output: only elementwise work is repeated.
    "projections": jax.checkpoint_policies.save_only_these_names("projection", "attention"),
}


class _Layer(nn.Module):
    block: nn.Module
    remat: str
    interleave: Callable | None

    @nn.compact
    def __call__(self, carry, layer, broadcast):
        (x, taps, interleave_carry), (number, slot, cache, own) = carry, layer
        inputs = broadcast if own is None else (*broadcast, own)

        def run(block, *inputs):
            return block(*inputs)

        if REMAT[self.remat] is not None:
            run = nn.remat(run, policy=REMAT[self.remat], prevent_cse=False)
        x, cache, aux = run(self.block.copy(name="block"), x, cache, *inputs)
        taps = put(taps, slot, x)
        if self.interleave:
            x, interleave_carry = self.interleave(x, interleave_carry, number)
        return (x, taps, interleave_carry), (cache, aux)


def put(taps: jax.Array, slot: Any, x: jax.Array) -> jax.Array:
    """Writes x into taps[slot]; outputs that nobody taps go to the last entry of the buffer."""
    if taps.shape[0] == 1:
        return taps
    return jax.lax.dynamic_update_index_in_dim(taps, x.astype(taps.dtype), slot, 0)


def empty_taps(x: jax.Array, count: int) -> jax.Array:
    """A buffer [count + 1, *x.shape]; without taps, one scalar."""
    if not count:
        return jnp.zeros((1,), x.dtype)
    return jnp.broadcast_to(jnp.zeros_like(x)[None], (count + 1, *x.shape))


def tap_slots(wanted: tuple[int, ...], length: int) -> np.ndarray:
    """int32[length]: the slots of the outputs of blocks 1, 2, ..; len(wanted) if a block is not tapped."""
    return np.array([wanted.index(i) if i in wanted else len(wanted) for i in range(1, length + 1)], np.int32)


class _Repeated(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x, *broadcast):
        return self.layer.copy(name="layer")(x, *broadcast), None


def scan_layers(layer: nn.Module, count: int, name: str) -> nn.Module:
    """`count` copies of a layer x = layer(x, *broadcast), scanned: m(x, *broadcast) -> (x, None).

    Parameters under name/layer have a leading layer dimension. Only each layer's input is saved for the backward pass.
    """
    axes = {"params": 0, "intermediates": 0}
    rematerialised = nn.remat(_Repeated, prevent_cse=False)
    scan = nn.scan(
        rematerialised, axes, split_rngs={"params": True, "dropout": True}, in_axes=nn.broadcast, length=count
    )
    return scan(layer, name=name)


class Stack(nn.Module):
    """`length` copies of `block`, scanned; parameters have a leading layer dimension.

    block: called as block(x, cache, *broadcast) -> (x, cache, aux). aux: {name: float32 array}, an auxiliary loss or
    metric of each layer (of a mixture of experts, its balance); mostly {}.
    remat: a name in REMAT. unroll: layers per turn of the loop; True, all of them, is faster for a few small layers.
    """

    block: nn.Module
    length: int
    remat: str = "full"
    unroll: int | bool = 1

    def __post_init__(self):
        super().__post_init__()
        if self.remat not in REMAT:
            raise ValueError(f"remat: there is no policy {self.remat!r}; known: {', '.join(REMAT)}")

    @nn.compact
    def __call__(
        self,
        x,
        taps,
        slots,
        cache,
        *broadcast,
        own: Any = None,
        interleave: Callable | None = None,
        interleave_carry: Any = None,
    ):
        """x [B, S, H]; taps from empty_taps; slots int32[length] from tap_slots; cache: a pytree with leading
        dimension `length`, or None, or a tuple of one for each block, with parameters from split_layers. own: another
        one, of which each block gets its own as a last argument; if it is None, there is no such argument. Returns (x,
        taps, cache, aux), aux with a leading dimension `length` too.

        interleave(x, interleave_carry, i) -> (x, interleave_carry) runs after layer i (0-based) and its tap, and is not
        rematerialised with the layer.
        """
        if not self.length:
            return x, taps, cache, {}
        if isinstance(cache, tuple):
            return self.one_by_one(x, taps, cache, broadcast, own)
        scan = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=((0, 0, *(nn.broadcast if tree is None else 0 for tree in (cache, own))), nn.broadcast),
            length=self.length,
            unroll=self.length if self.unroll is True else self.unroll,
        )
        layers = scan(self.block, self.remat, interleave, name="layers")
        each = jnp.arange(self.length), jnp.asarray(slots), cache, own
        (x, taps, _), (cache, aux) = layers((x, taps, interleave_carry), each, broadcast)
        return x, taps, cache, aux

    def one_by_one(self, x, taps, caches, broadcast, own):
        """As __call__, without a loop over the blocks; nothing is tapped and there is no aux."""
        found = []
        for i, cache in enumerate(caches):
            mine = None if own is None else jax.tree.map(lambda values, i=i: values[i], own)
            layer = _Layer(self.block, self.remat, None, name=f"layer_{i}")
            (x, taps, _), (cache, _) = layer((x, taps, None), (i, 0, cache, mine), broadcast)
            found.append(cache)
        return x, taps, tuple(found), {}


def split_layers(stack: dict) -> dict:
    """The parameters of a Stack, {"layers": arrays [length, ..]}, as {"layer_0": arrays [..], ..}."""
    layers = stack["layers"]
    return {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(len(jax.tree.leaves(layers)[0]))}


def split_cache(cache: Any) -> tuple:
    """A cache with a leading dimension as a tuple of one for each block."""
    return tuple(jax.tree.map(lambda x, i=i: x[i], cache) for i in range(len(jax.tree.leaves(cache)[0])))
