"""Attention kernels of accelerators behind `attention.dot_product_attention`: flash.py's and JAX's splash on TPUs,
cuDNN's on NVIDIA GPUs.

All run on each device's own rows, queries and heads (shard_map), and never hold an [S, T] array of float32 scores.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmllm import mesh
from jaxmllm.nn import flash as flash_kernels
from jaxmllm.nn.primitives import pad

# Queries and keys in one block, the most; chosen by the cycles the TPU compiler schedules (docs/performance.md).
MAX_BLOCK = 1024
LANES = 128  # of a TPU's vector registers; blocks are multiples of it
MIN_LENGTH = 512  # rows shorter than that are left to XLA: their scores are small
SMALL = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")  # 16 MiB of on-chip memory


def choose(q: jax.Array, k: jax.Array, causal: bool, offset: jax.Array | int) -> str:
    """Which of "flash", "splash", "cudnn", "xla" serves q [B, S, K, G, D], k [B, T, K, D]: by types and mesh alone.

    splash: on TPUs whose on-chip memory cannot hold all keys of a head.
    XLA's plain form serves CPUs, decoding (an offset), dtypes other than bfloat16, and shapes that the kernels lack:
    on TPU head sizes that are no multiple of 64, rows under MIN_LENGTH, and queries split over the mesh into parts
    that are not whole blocks; on GPU head sizes over 128 and queries that are split.
    """
    if not mesh.has_mesh() or q.dtype != jnp.bfloat16 or not isinstance(offset, int) or offset:
        return "xla"
    s, t, d, parts = q.shape[1], k.shape[1], q.shape[-1], mesh.parts(q, 1)
    if causal and s != t:
        return "xla"
    if mesh.platform() == "tpu" and d % 64 == 0 and min(s, t) >= MIN_LENGTH:
        if parts > 1 and s % (parts * block(s // parts)):
            return "xla"
        device = jax.sharding.get_abstract_mesh().abstract_device
        return "splash" if t > flash_kernels.MAX_KEYS or device.device_kind in SMALL or d > 128 else "flash"
    return "cudnn" if mesh.platform() == "gpu" and d % 8 == 0 and d <= 128 and parts == 1 else "xla"


def block(length: int) -> int:
    """Size of equal blocks, at most MAX_BLOCK, that cover `length` with the least padding."""
    return math.ceil(length / math.ceil(length / MAX_BLOCK) / LANES) * LANES


def flash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """flash.py's kernels; arguments and result as in dot_product_attention. interpret: on a CPU, slowly.

    Parts of rows must be whole blocks (ValueError); whole rows need not be.
    """
    (b, s, *_), t, parts = q.shape, k.shape[1], mesh.parts(q, 1)
    own_s, length = s // parts, jax.typeof(q).sharding.spec[1]
    bq = block(own_s)
    blocks = flash_kernels.Blocks(bq, bq if causal else block(t), causal, interpret)
    more = -own_s % blocks.queries, -t % blocks.keys
    if parts > 1 and more[0]:
        raise ValueError(f"flash: a part of {own_s} queries is no whole blocks of {bq}")
    if q_segments is None and more[1] and not causal:  # causal: padding lies behind every query
        q_segments, kv_segments = jnp.ones((b, s), jnp.int32), jnp.ones((b, t), jnp.int32)

    def own(q, k, v, q_segments, kv_segments):
        q, k, v = heads_first(q, k, v, math.log2(math.e))
        ids = padded_segments(q_segments, kv_segments, more)
        first = jax.lax.axis_index(length) * own_s if causal and parts > 1 else 0
        bound = flash_kernels.bounds(blocks, (q.shape[0], q.shape[3], k.shape[2]), ids, first)
        return flash_kernels.attend(blocks, q, k, v, ids, bound).transpose(0, 3, 1, 2, 4)

    return on_own_heads(own, q, k, v, q_segments, kv_segments)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's splash attention, which holds a block of keys at a time; arguments and result as in `flash`."""
    (b, s, _, group, _), t, parts = q.shape, k.shape[1], mesh.parts(q, 1)
    own_s = s // parts
    bq, bk = block(own_s), block(t)
    more = -own_s % bq, -t % bk
    if q_segments is None and more[1]:
        q_segments, kv_segments = jnp.ones((b, s), jnp.int32), jnp.ones((b, t), jnp.int32)
    shape = (own_s + more[0], t + more[1])
    # Parts of a causal mask differ; all parts of a full one are the same.
    mask = library.CausalMask((parts * shape[0], shape[1])) if causal else library.FullMask(shape)
    # One backward kernel would leave a sum over blocks of keys to XLA, which costs more than the two products it saves.
    back = dict(block_q_dkv=bq, block_kv_dkv=bk, block_kv_dkv_compute=bk, block_q_dq=bq, block_kv_dq=bk)
    kernel = library.make_splash_mqa(
        library.MultiHeadMask([mask] * group),
        block_sizes=library.BlockSizes(bq, bk, bk, **back),
        head_shards=1,
        q_seq_shards=parts if causal else 1,
        residual_checkpoint_name=flash_kernels.SAVED,
        interpret=interpret,
    )
    length = jax.typeof(q).sharding.spec[1] if causal else None
    specs = kernel.manual_sharding_spec(NamedSharding(jax.sharding.get_abstract_mesh(), P(None, length)))

    def own(q, k, v, q_segments, kv_segments, kernel):
        q, k, v = (pad(x, -2, n) for x, n in zip(heads_first(q, k, v), (more[0], *more[1:] * 2)))
        ids = padded_segments(q_segments, kv_segments, more)
        # Mapped over key heads, not given all of them: the two cores of a v4 or v5p share mapped dimensions, while the
        # kernel's own heads all run on one in the backward pass.
        y = jax.vmap(jax.vmap(kernel, (0, 0, 0, None)))(q, k, v, ids and library.SegmentIds(*ids))
        return y[..., :own_s, :].transpose(0, 3, 1, 2, 4)

    return on_own_heads(own, q, k, v, q_segments, kv_segments, (kernel, specs))


def heads_first(q, k, v, scale: float = 1.0):
    """q [B, K, G, S, D] times scale / sqrt(D), k, v [B, K, T, D]."""
    scale *= q.shape[-1] ** -0.5
    q = (q.astype(jnp.float32) * scale).astype(q.dtype).transpose(0, 2, 3, 1, 4)
    # Saved as the kernel reads it: the backward pass then scales and transposes it no second time. Keys and values
    # are saved before they are made whole along the sequence.
    return checkpoint_name(q, "projection"), k.swapaxes(1, 2), v.swapaxes(1, 2)


def padded_segments(q_segments, kv_segments, more: tuple[int, int]) -> tuple | None:
    """Segments of queries and keys with `more` of each behind them; None if there are none."""
    if q_segments is None:
        return None
    # Padding queries are of the last segment, so that their block may need no mask.
    return jnp.pad(q_segments, ((0, 0), (0, more[0])), mode="edge"), pad(kv_segments, 1, more[1], -1)


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
) -> jax.Array:
    """cuDNN's flash attention; arguments and result as in dot_product_attention."""

    def own(q, k, v, q_segments, kv_segments):
        seen = None
        if q_segments is not None:
            seen = (q_segments[:, None, :, None] == kv_segments[:, None, None]) & (kv_segments > 0)[:, None, None]
        heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
        y = jax.nn.dot_product_attention(heads, k, v, mask=seen, is_causal=causal, implementation="cudnn")
        return y.reshape(q.shape)

    return on_own_heads(own, q, k, v, q_segments, kv_segments)


def on_own_heads(f, q, k, v, q_segments, kv_segments, *more):
    """f on each device's share: q as it lies, k and v [B, T, K, D] along with its rows and heads, segments too.

    more: pairs (pytree, specs) for the arguments behind those.
    """
    spec = jax.typeof(q).sharding.spec
    rows, length, heads = spec[:3]
    keys = P(rows, None, heads, None)
    segments = (None, None) if q_segments is None else (P(rows, length), P(rows, None))
    arguments = (q, k, v, q_segments, kv_segments, *(tree for tree, _ in more))
    specs = (spec, keys, keys, *segments, *(s for _, s in more))
    arguments = jax.tree.map(jax.sharding.reshard, arguments, specs)
    # The kernels' results do not say over which axes they vary, so JAX cannot check it.
    return jax.shard_map(f, in_specs=specs, out_specs=spec, check_vma=False)(*arguments)
