"""Scaled dot-product attention: one function, and the choice of what computes it.

Which query sees which key, in a causal row with two samples (segments 1 and 2) and padding (0):

    segment  1 1 1 2 2 0
    1        1 . . . . .
    1        1 1 . . . .
    1        1 1 1 . . .
    2        . . . 1 . .
    2        . . . 1 1 .
    0        . . . . . .      what a query of padding gets depends on the kernel: nobody may read it
"""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxmllm import mesh
from jaxmllm.nn import compiler
from jaxmllm.nn.attention.cudnn import cudnn_attention
from jaxmllm.nn.attention.heads import block_size
from jaxmllm.nn.attention.plain import plain_attention
from jaxmllm.nn.attention.tpu_flash import MAX_KEYS, flash_attention
from jaxmllm.nn.attention.tpu_splash import splash_attention
from jaxmllm.nn.tpu import CHIPS_16MIB_VMEM

MIN_LENGTH = 512  # shorter rows are left to XLA: their scores are small
KERNELS = {"flash": flash_attention, "splash": splash_attention, "cudnn": cudnn_attention}


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    q_offset: jax.Array | int = 0,
    window: int | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Softmax(q k^T / sqrt(D)) v with grouped keys; the softmax is float32.

    q [B, S, K, G, D]; k, v [B, T, K, D]: query head (k, g) reads key head k. Returns [B, S, K, G, D] in q's dtype.
    causal: query s sees keys t <= s + q_offset. q_segments int32[B, S], kv_segments int32[B, T]: a query sees the keys
    of its own segment. window: of causal attention, a query sees only the last `window` keys, its own included. cap:
    scores pass primitives.soft_cap. What a query of segment 0 gets, or one that sees nothing, is finite but undefined.

    Where an accelerator takes the plain form, the operations have the scope "plain_WHY", which a plan reports.
    """
    kernel, why = choose_kernel(q, k, causal, q_offset, window, cap)
    k, v = (checkpoint_name(x, "projection") for x in (k, v))
    if kernel not in ("flash", "splash"):  # those two name their own form of q
        q = checkpoint_name(q, "projection")
    if kernel in KERNELS:
        special = {name: x for name, x in (("window", window), ("cap", cap)) if x is not None}
        return KERNELS[kernel](q, k, v, causal, q_segments, kv_segments, **special)
    blocks = causal_blocks(q, k) if causal and isinstance(q_offset, int) and not q_offset else 1
    with jax.named_scope(f"plain_{why}") if why else contextlib.nullcontext():
        return plain_attention(q, k, v, causal, q_segments, kv_segments, q_offset, blocks, window, cap)


def choose_kernel(
    q: jax.Array,
    k: jax.Array,
    causal: bool,
    offset: jax.Array | int,
    window: int | None = None,
    cap: float | None = None,
) -> tuple[str, str]:
    """("flash", "splash", "cudnn" or "plain", why the plain form on an accelerator) for q [B, S, K, G, D] and
    k [B, T, K, D], by their types and the mesh.

    No kernel ever holds an [S, T] array of float32 scores. splash serves TPUs whose on-chip memory cannot hold all keys
    of a head, windows and caps. The plain form serves CPUs, decoding (an offset), dtypes other than bfloat16, and what
    the kernels lack: on a TPU head sizes that are not multiples of 64, rows under MIN_LENGTH, and queries that the mesh
    splits into parts that are not whole blocks; on a GPU head sizes over 128, split queries and caps.
    """
    platform = compiler.platform() if mesh.has_mesh() else ""
    if platform not in ("tpu", "gpu"):
        return "plain", ""
    s, t, d, parts = q.shape[1], k.shape[1], q.shape[-1], mesh.split_count(q, 1)
    if platform == "tpu":
        lacks = {f"heads_of_{d}": d % 64 != 0, f"rows_of_{min(s, t)}": min(s, t) < MIN_LENGTH}
        lacks["split_rows"] = parts > 1 and s % (parts * block_size(s // parts)) != 0
    else:
        lacks = {f"heads_of_{d}": d % 8 != 0 or d > 128, "split_rows": parts > 1, "soft_cap": cap is not None}
    lacks[str(q.dtype)] = q.dtype != jnp.bfloat16
    lacks["decoding"] = not isinstance(offset, int) or bool(offset) or (causal and s != t)
    if why := next((name for name, found in lacks.items() if found), ""):
        return "plain", why
    if platform == "gpu":
        return "cudnn", ""
    large = t > MAX_KEYS or compiler.device_kind() in CHIPS_16MIB_VMEM or d > 128
    return "splash" if large or window is not None or cap is not None else "flash", ""


def causal_blocks(q: jax.Array, k: jax.Array) -> int:
    """The number of blocks, of 256 queries or more, into which a CPU cuts causal attention of q to k (both length
    S)."""
    s = q.shape[1]
    if compiler.platform() != "cpu" or s != k.shape[1] or mesh.split_count(q, 1) > 1:
        return 1
    return max(n for n in (1, 2, 4, 8) if s % n == 0 and (n == 1 or s // n >= 256))
