"""What the attention kernels share: each device's own heads, the order of dimensions, sizes of blocks."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxmllm.nn.primitives import pad
from jaxmllm.nn.tpu import LANES

# The most queries and keys in a block; chosen by the cycles the TPU compiler schedules (docs/performance.md).
MAX_BLOCK = 1024
SAVED = "attention"  # checkpoint_name of a kernel's output and of the normalisers of its softmax


def block_size(length: int) -> int:
    """The size of equal blocks, at most MAX_BLOCK and a multiple of LANES, that cover `length` with the least
    padding."""
    return math.ceil(length / math.ceil(length / MAX_BLOCK) / LANES) * LANES


def heads_first(q, k, v, scale: float = 1.0):
    """-> q [B, K, G, S, D] times scale / sqrt(D), k and v [B, K, T, D]."""
    scale *= q.shape[-1] ** -0.5
    q = (q.astype(jnp.float32) * scale).astype(q.dtype).transpose(0, 2, 3, 1, 4)
    # Saved as the kernel reads it, so that the backward pass does not scale and transpose it again. Keys and values
    # are saved before they are made whole along the sequence.
    return checkpoint_name(q, "projection"), k.swapaxes(1, 2), v.swapaxes(1, 2)


def padded_segments(q_segments, kv_segments, padding: tuple[int, int]) -> tuple | None:
    """Segments of queries and keys, each with padding appended; None if there are no segments."""
    if q_segments is None:
        return None
    # Padding queries belong to the last segment, so that their block may need no mask.
    return jnp.pad(q_segments, ((0, 0), (0, padding[0])), mode="edge"), pad(kv_segments, 1, padding[1], -1)


def per_device_heads(f, q, k, v, q_segments, kv_segments, *others):
    """f on each device's part: q as it is split, k and v [B, T, K, D] and segments with the same rows and heads.

    others: pairs (pytree, specs) for further arguments of f.
    """
    spec = jax.typeof(q).sharding.spec
    rows, length, heads = spec[:3]
    keys = P(rows, None, heads, None)
    segments = (None, None) if q_segments is None else (P(rows, length), P(rows, None))
    arguments = (q, k, v, q_segments, kv_segments, *(tree for tree, _ in others))
    specs = (spec, keys, keys, *segments, *(s for _, s in others))
    arguments = jax.tree.map(jax.sharding.reshard, arguments, specs)
    # The kernels' results do not say over which axes they vary, so JAX cannot check it.
    return jax.shard_map(f, in_specs=specs, out_specs=spec, check_vma=False)(*arguments)
