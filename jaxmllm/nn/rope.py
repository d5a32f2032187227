"""Rotary position embedding (Su et al. 2021) in the half-split form of Llama's Hugging Face weights."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxmllm.nn import compiler


def line_angles(positions: jax.Array, dim: int, theta: float) -> jax.Array:
    """int32[B, S] -> float32[B, S, dim/2]: position * theta^(-2i/dim)."""
    half = dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return positions.astype(jnp.float32)[..., None] * frequency


def grid_angles(side: int, dim: int, theta: float) -> jax.Array:
    """float32[side*side, dim/2], row by row: half the angles of a cell grow with its row, half with its column.

    Cell centres lie in -1..1; the slowest angle is 2 pi theta^(4/dim - 1) times that (DINOv3, Simeoni et al. 2025).
    """
    centre = (jnp.arange(side, dtype=jnp.float32) + 0.5) / side * 2 - 1
    frequency = theta ** (-4 * jnp.arange(dim // 4, dtype=jnp.float32) / dim)
    angle = 2 * math.pi * centre[:, None] * frequency
    return jnp.concatenate([jnp.repeat(angle, side, 0), jnp.tile(angle, (side, 1))], 1)


def rotate(x: jax.Array, angle: jax.Array) -> jax.Array:
    """Rotates the pairs (x[i], x[i + D/2]) of the last dimension by angles, in float32.

    x [B, S, ..., D]; angle float32[B or 1, S, D/2], which gets no gradient. Returns x's shape and dtype.
    """
    angle = jnp.expand_dims(angle, range(2, x.ndim - 1))
    return _turn(x, jnp.cos(angle), jnp.sin(angle))


@jax.custom_vjp
def _turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    other = compiler.turn_halves(x)
    cos, sin = (jnp.concatenate([part, part], -1) for part in (cos, sin))
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)


# The derivative of a rotation is the rotation back: one pass, where jax.grad's derivative takes a TPU three.
_turn.defvjp(
    lambda x, cos, sin: (_turn(x, cos, sin), (cos, sin)),
    lambda saved, dy: (_turn(dy, saved[0], -saved[1]), None, None),
)
