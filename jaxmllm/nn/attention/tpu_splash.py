"""JAX's splash attention on TPUs, which holds one block of keys on the chip at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmllm.mesh import split_count
from jaxmllm.nn.attention.heads import SAVED, block_size, heads_first, padded_segments, per_device_heads
from jaxmllm.nn.primitives import pad


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    window: int | None = None,
    cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Arguments and result as in choose.dot_product_attention. interpret: runs on a CPU, slowly."""
    (b, s, _, group, _), t, parts = q.shape, k.shape[1], split_count(q, 1)
    own_s = s // parts
    bq, bk = block_size(own_s), block_size(t)
    padding = -own_s % bq, -t % bk
    if q_segments is None and padding[1]:
        q_segments, kv_segments = jnp.ones((b, s), jnp.int32), jnp.ones((b, t), jnp.int32)
    shape = (own_s + padding[0], t + padding[1])
    # The parts of a causal mask differ; all parts of a full mask are the same.
    if causal and window:
        mask = library.LocalMask((parts * shape[0], shape[1]), (window - 1, 0), 0)
    else:
        mask = library.CausalMask((parts * shape[0], shape[1])) if causal else library.FullMask(shape)
    # One backward kernel would leave a sum over blocks of keys to XLA, which costs more than the two products it saves.
    back = dict(block_q_dkv=bq, block_kv_dkv=bk, block_kv_dkv_compute=bk, block_q_dq=bq, block_kv_dq=bk)
    kernel = library.make_splash_mqa(
        library.MultiHeadMask([mask] * group),
        block_sizes=library.BlockSizes(bq, bk, bk, **back),
        head_shards=1,
        q_seq_shards=parts if causal else 1,
        residual_checkpoint_name=SAVED,
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
    length = jax.typeof(q).sharding.spec[1] if causal else None
    specs = kernel.manual_sharding_spec(NamedSharding(jax.sharding.get_abstract_mesh(), P(None, length)))

    def own(q, k, v, q_segments, kv_segments, kernel):
        q, k, v = (pad(x, -2, n) for x, n in zip(heads_first(q, k, v), (padding[0], *padding[1:] * 2)))
        ids = padded_segments(q_segments, kv_segments, padding)
        # Mapped over key heads instead of given all of them: the two cores of a v4 or v5p share mapped dimensions,
        # while the heads inside the kernel all run on one core in the backward pass.
        y = jax.vmap(jax.vmap(kernel, (0, 0, 0, None)))(q, k, v, ids and library.SegmentIds(*ids))
        return y[..., :own_s, :].transpose(0, 3, 1, 2, 4)

    return per_device_heads(own, q, k, v, q_segments, kv_segments, (kernel, specs))
