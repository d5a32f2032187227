"""Rotary position embedding (Su et al. 2021) in the half-split form of Llama's Hugging Face weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotates pairs (x[i], x[i + D/2]) of the last dimension by position * theta^(-2i/D), in float32.

    x [B, S, ..., D]; positions int32[B, S]. Returns x's shape and dtype.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None] * frequency
    angle = jnp.expand_dims(angle, range(2, x.ndim - 1))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
