"""cuDNN's flash attention on NVIDIA GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmllm.nn.attention.heads import per_device_heads


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Arguments and result as in choose.dot_product_attention."""

    def own(q, k, v, q_segments, kv_segments):
        seen = None
        if q_segments is not None:
            seen = (q_segments[:, None, :, None] == kv_segments[:, None, None]) & (kv_segments > 0)[:, None, None]
        if window is not None:
            near = (jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1]) < window)[None, None]
            seen = near if seen is None else seen & near
        heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
        y = jax.nn.dot_product_attention(heads, k, v, mask=seen, is_causal=causal, implementation="cudnn")
        return y.reshape(q.shape)

    return per_device_heads(own, q, k, v, q_segments, kv_segments)
