"""Attention kernels of accelerators behind `attention.dot_product_attention`: splash on TPU, cuDNN's on NVIDIA GPUs.

Both run on each device's own rows, queries and heads (shard_map), and never hold an [S, T] array of float32 scores.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmllm import mesh

# Queries and keys in one block, the most; chosen by the cycles the TPU compiler schedules (docs/performance.md).
MAX_BLOCK = 1024
LANES = 128  # of a TPU's vector registers; blocks are multiples of it
MIN_SPLASH = 512  # rows shorter than that are left to XLA: their scores are small
SAVED = "attention"  # checkpoint_name of splash's output and softmax normalisers


def choose(q: jax.Array, k: jax.Array, causal: bool, offset: jax.Array | int) -> str:
    """Which of "splash", "cudnn", "xla" serves q [B, S, K, G, D], k [B, T, K, D]: by types and mesh alone.

    XLA's plain form serves CPUs, decoding (an offset), dtypes other than bfloat16, and shapes that the kernels lack:
    on TPU head sizes that are no multiple of 64, rows under MIN_SPLASH, and queries split over the mesh into parts
    that are not whole blocks; on GPU head sizes over 128 and queries that are split.
    """
    if not mesh.has_mesh() or q.dtype != jnp.bfloat16 or not isinstance(offset, int) or offset:
        return "xla"
    s, t, d, parts = q.shape[1], k.shape[1], q.shape[-1], mesh.parts(q, 1)
    if causal and s != t:
        return "xla"
    if mesh.platform() == "tpu" and d % 64 == 0 and min(s, t) >= MIN_SPLASH:
        return "splash" if parts == 1 or s % (parts * block(s // parts)) == 0 else "xla"
    return "cudnn" if mesh.platform() == "gpu" and d % 8 == 0 and d <= 128 and parts == 1 else "xla"


def block(length: int) -> int:
    """Size of equal blocks, at most MAX_BLOCK, that cover `length` with the least padding."""
    return math.ceil(length / math.ceil(length / MAX_BLOCK) / LANES) * LANES


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's splash attention; arguments and result as in dot_product_attention. interpret: on a CPU, slowly.

    Rows are padded to whole blocks. A query of segment 0 sees the keys of segment 0. The backward pass is one kernel
    of five products if it can hold all keys, else two of seven: the sum over blocks of keys that one kernel would leave
    to XLA costs more than two products (docs/performance.md).
    """
    (b, s, _, group, d), t, parts = q.shape, k.shape[1], mesh.parts(q, 1)
    own_s = s // parts
    bq, bk = block(own_s), block(t)
    more_q, more_k = -own_s % bq, -t % bk
    if q_segments is None and more_k:
        q_segments, kv_segments = jnp.ones((b, s), jnp.int32), jnp.ones((b, t), jnp.int32)
    shape = (own_s + more_q, t + more_k)
    # Parts of a causal mask differ; all parts of a full one are the same.
    mask = library.CausalMask((parts * shape[0], shape[1])) if causal else library.FullMask(shape)
    if t + more_k <= 2 * MAX_BLOCK:  # one block of keys
        back = dict(block_kv_dkv=t + more_k, use_fused_bwd_kernel=True)
    else:
        back = dict(block_kv_dkv=bk, block_q_dq=bq, block_kv_dq=bk)
    sizes = library.BlockSizes(bq, bk, bk, block_q_dkv=bq, block_kv_dkv_compute=bk, **back)
    kernel = library.make_splash_mqa(
        library.MultiHeadMask([mask] * group),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts if causal else 1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    length = jax.typeof(q).sharding.spec[1] if causal else None
    specs = kernel.manual_sharding_spec(NamedSharding(jax.sharding.get_abstract_mesh(), P(None, length)))

    def own(q, k, v, q_segments, kv_segments, kernel):
        q, k, v = (q * d**-0.5).transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)
        q, k, v = (pad(x, x.ndim - 2, n) for x, n in ((q, more_q), (k, more_k), (v, more_k)))
        # Saved as the kernel reads it: the backward pass then scales and transposes it no second time. Keys and values
        # are saved before they are made whole along the sequence.
        q = checkpoint_name(q, "projection")
        ids = None
        if q_segments is not None:
            ids = library.SegmentIds(pad(q_segments, 1, more_q), pad(kv_segments, 1, more_k, -1))
        # Mapped over key heads, not given all of them: the two cores of a v4 or v5p share mapped dimensions, while the
        # kernel's own heads all run on one in the backward pass.
        y = jax.vmap(jax.vmap(kernel, (0, 0, 0, None)))(q, k, v, ids)
        return y[..., :own_s, :].transpose(0, 3, 1, 2, 4)

    return on_own_heads(own, q, k, v, q_segments, kv_segments, (kernel, specs))


def pad(x: jax.Array, dimension: int, more: int, value: int = 0) -> jax.Array:
    """x with `more` entries of `value` behind a dimension."""
    widths = [(0, more if i == dimension else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if more else x


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
