"""Streams foreign tensors into the shards of our parameters.

A parameter is made on its devices and filled piece by piece (a stacked one layer by layer), so that on the host there
is at most one piece at a time, and on the devices nothing beside the parameters but that piece. A process reads from
its files only what its devices hold, up to whole pages of memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxmllm.weights.convert import KeyMap, Piece, misfits, pieces, raise_any

COMPARED = 2**24  # elements that are compared at a time
Abstract = Mapping[str, jax.ShapeDtypeStruct]


def load_arrays(key_map: KeyMap, foreign: Mapping[str, np.ndarray], abstract: Abstract) -> dict[str, jax.Array]:
    """Converts foreign tensors to arrays with the shapes, dtypes and shardings of `abstract` ({path: ..}).

    Every process of the shardings' meshes must call this with the same tensors. Raises one ValueError that lists
    everything that does not fit, before anything is read.
    """
    shapes = {path: x.shape for path, x in abstract.items()}
    raise_any(misfits(key_map, foreign, shapes))
    by_path: dict[str, list[Piece]] = {}
    for piece in pieces(key_map, shapes):
        by_path.setdefault(piece.entry.path, []).append(piece)
    # One at a time, so that nothing is copied for the next one while something for this one is still held.
    return {path: jax.block_until_ready(_fill(found, foreign, abstract[path])) for path, found in by_path.items()}


def unequal(key_map: KeyMap, foreign: Mapping[str, np.ndarray]) -> list[str]:
    """The tensors that a file holds twice, although the model has them once, with different numbers. Reads both."""
    return [
        f"! {key}: its numbers differ from those of {other}, but the model has one table for both (tied)"
        for key, other in key_map.equal
        if key in foreign and other in foreign and not _equal(foreign[key], foreign[other])
    ]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape:
        return False
    rows = max(1, COMPARED // max(1, a[:1].size))
    return all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))


def _fill(found: list[Piece], foreign: Mapping[str, np.ndarray], abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """One parameter from its pieces: a single one, or one for each index of a stack."""
    if not found[0].entry.index:
        return _cast(abstract.sharding, abstract.dtype)(_on_devices(found[0], foreign, abstract.sharding))
    whole = _empty(abstract.sharding, abstract.dtype, abstract.shape)()
    for piece in found:
        x = _on_devices(piece, foreign, _layer_sharding(abstract.sharding, len(piece.entry.index)))
        whole = _set_layer(abstract.sharding)(whole, x, np.array(piece.entry.index, np.int32))
        jax.block_until_ready(whole)
    return whole


def _on_devices(piece: Piece, foreign: Mapping[str, np.ndarray], sharding: Sharding) -> jax.Array:
    """A piece in the dtype of its file. Each device copies its slice from the file; transposing is part of the copy."""
    array = piece.read(foreign)
    return jax.make_array_from_callback(piece.shape, sharding, lambda index: array[index], dtype=array.dtype)


def _layer_sharding(sharding: Sharding, depth: int) -> Sharding:
    """How an element of a stack lies that has `depth` leading dimensions, which are never split."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[depth:]))


@functools.cache
def _cast(sharding: Sharding, dtype: np.dtype):
    """A copy in another dtype; also in the same one, since on a CPU the input may be the mapped file itself."""
    return jax.jit(lambda x: jnp.copy(x).astype(dtype), out_shardings=sharding)


@functools.cache
def _empty(sharding: Sharding, dtype: np.dtype, shape: tuple[int, ...]):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _set_layer(sharding: Sharding):
    def set_layer(whole, x, index):
        x = x.astype(whole.dtype)
        for _ in range(whole.ndim - x.ndim):
            x = x[None]
        start = [index[i] if i < index.size else 0 for i in range(whole.ndim)]
        return jax.lax.dynamic_update_slice(whole, x, start)

    return jax.jit(set_layer, donate_argnums=0, out_shardings=sharding)
