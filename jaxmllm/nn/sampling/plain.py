"""Bilinear samples in plain JAX, and the interpolation weights that every form uses."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmllm import sharded


def plain_sample(values: list[jax.Array], at: jax.Array, weights: jax.Array) -> jax.Array:
    """choose.sample with the whole matrix [pixels, queries] in memory."""
    out, first, (n, queries, heads) = 0.0, 0, at.shape[:3]
    for value in values:
        levels, _, h, w, c = value.shape
        levels_here = slice(first, first := first + levels)
        x, y = (hat(at[..., levels_here, :, i, None] - jnp.arange(size)) for i, size in enumerate((w, h)))
        matrix = jnp.einsum("nqmlky,nqmlkx->nqmlyx", weights[..., levels_here, :, None] * y, x).astype(value.dtype)
        value = sharded.reshape_to(
            value, (levels, n, h, w, heads, c // heads), None, "batch", None, None, "heads", None
        )
        out = out + jnp.einsum("nqmlyx,lnyxmd->nqmd", matrix, value, preferred_element_type=jnp.float32)
    return sharded.reshape_to(out.astype(value.dtype), (n, queries, c), "batch", None, "heads")


@jax.custom_jvp
def hat(x: jax.Array) -> jax.Array:
    """The weight that linear interpolation gives a pixel at this distance."""
    return jax.nn.relu(1 - jnp.abs(x))


def slope(x: jax.Array) -> jax.Array:
    """The derivative of `hat`; at its corners the mean of both sides.

    So a sample on a pixel has the slope between the pixel's two neighbours. The samples of a new module lie on pixels,
    in x or y at least.
    """
    return jnp.sign(x) * jnp.where(jnp.abs(x) < 1, -1.0, jnp.where(jnp.abs(x) == 1, -0.5, 0.0))


hat.defjvps(lambda tangent, _, x: tangent * slope(x))
