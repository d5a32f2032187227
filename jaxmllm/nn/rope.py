"""Rotary position embedding (Su et al. 2021) in the half-split form of Llama's Hugging Face weights."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxmllm.nn import compiler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling of frequencies for longer rows (rope_type "llama3" of transformers).

    A frequency that turns fewer than `low_freq_factor` times within the tokens of the original rows is divided by
    `factor`, one that turns more than `high_freq_factor` times is kept, and those between are mixed linearly.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, frequency: jax.Array) -> jax.Array:
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = jnp.clip(kept, 0.0, 1.0)
        return frequency * ((1 - kept) / self.factor + kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All frequencies divided by `factor` (rope_type "linear" of transformers)."""

    factor: float

    def __call__(self, frequency: jax.Array) -> jax.Array:
        return frequency / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
    """Frequencies divided one by one for longer rows (LongRoPE, Ding et al. 2024; rope_type "longrope", once "su").

    short_factor, long_factor: a number for each frequency; the long ones serve rows with more tokens than
    `original_max_position_embeddings`. attention_factor: of the rotated queries and keys.

    A row is as long as its largest position says, so a row of several samples takes the factors of its longest one, and
    while a row grows token by token, keys that were rotated with the short factors keep them.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float

    def __call__(self, frequency: jax.Array, positions: jax.Array) -> jax.Array:
        """float32[half], int32[B, S] -> float32[B, 1, half]."""
        is_long = positions.max(1) >= self.original_max_position_embeddings
        short, long = (jnp.asarray(factor, jnp.float32) for factor in (self.short_factor, self.long_factor))
        return (frequency / jnp.where(is_long[:, None], long, short))[:, None]


def line_angles(positions: jax.Array, dim: int, theta: float, scaling=None) -> jax.Array:
    """int32[B, S] -> float32[B, S, dim/2]: position * theta^(-2i/dim), with frequencies scaled by `scaling`, if any."""
    half = dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if isinstance(scaling, LongRope):
        frequency = scaling(frequency, positions)
    elif scaling:
        frequency = scaling(frequency)
    return positions.astype(jnp.float32)[..., None] * frequency


def grid_angles(side: int, dim: int, theta: float) -> jax.Array:
    """float32[side*side, dim/2], row by row: half the angles of a cell grow with its row, half with its column.

    Cell centres lie in -1..1; the slowest angle is 2 pi theta^(4/dim - 1) times that (DINOv3, Simeoni et al. 2025).
    """
    centre = (jnp.arange(side, dtype=jnp.float32) + 0.5) / side * 2 - 1
    frequency = theta ** (-4 * jnp.arange(dim // 4, dtype=jnp.float32) / dim)
    angle = 2 * math.pi * centre[:, None] * frequency
    return jnp.concatenate([jnp.repeat(angle, side, 0), jnp.tile(angle, (side, 1))], 1)


def rotate(x: jax.Array, angle: jax.Array, factor: float | None = None) -> jax.Array:
    """Rotates the pairs (x[i], x[i + R/2]) of the first R entries of the last dimension by angles, in float32.

    x [B, S, ..., D]; angle float32[B or 1, S, R/2], which gets no gradient; R is mostly D. factor: also multiplies what
    is rotated (LongRope). Returns x's shape and dtype.
    """
    turned = 2 * angle.shape[-1]
    angle = jnp.expand_dims(angle, range(2, x.ndim - 1))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if factor is not None:
        cos, sin = cos * factor, sin * factor
    if turned == x.shape[-1]:
        return _turn(x, cos, sin)
    return jnp.concatenate([_turn(x[..., :turned], cos, sin), x[..., turned:]], -1)


@jax.custom_vjp
def _turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    other = compiler.turn_halves(x)
    cos, sin = (jnp.concatenate([part, part], -1) for part in (cos, sin))
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)


# The derivative of a rotation is the rotation back, and a factor stays: one pass, where jax.grad's derivative takes a
# TPU three.
_turn.defvjp(
    lambda x, cos, sin: (_turn(x, cos, sin), (cos, sin)),
    lambda saved, dy: (_turn(dy, saved[0], -saved[1]), None, None),
)
