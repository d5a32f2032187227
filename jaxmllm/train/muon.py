"""The orthogonalisation of Muon (Keller Jordan 2024, https://kellerjordan.github.io/posts/muon/)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.nn.param_info import ParamInfo

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
RMS = 0.2  # root mean square of an update, as Adam's (Moonlight, arXiv 2502.16982)


def orthogonalize(x: jax.Array, info: ParamInfo, iterations: int) -> jax.Array:
    """float32[layers.., in.., out..] -> the same shape: 0.2 sqrt(max(in, out)) times an orthogonal matrix per layer.

    Each matrix is worked on as a whole by one device; the layers of a stack are dealt out to the devices that share it.
    """
    layers, ends = info.dims.count("layers"), x.shape[info.dims.count("layers") :]
    size = (math.prod(ends[: info.inputs]), math.prod(ends[info.inputs :]))

    def work(stack):
        y = newton_schulz(stack.reshape(-1, *size), iterations)
        return (y * (RMS * max(size) ** 0.5)).reshape(stack.shape)

    stack = sharded.reshape_dims(x, 0, layers, math.prod(x.shape[:layers])) if layers else x[None]
    y = sharded.per_whole(work, stack)
    return sharded.reshape_dims(y, 0, 1, *x.shape[:layers]) if layers else y[0]


def newton_schulz(x: jax.Array, iterations: int) -> jax.Array:
    """[n, rows, columns] -> the same matrices with singular values of about 1 (0.6 to 1.2).

    Products have the default precision: float32 on a CPU, bfloat16 factors on a TPU, as in Jordan's own code.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    x = x.swapaxes(1, 2) if tall else x  # the smaller Gram matrix
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.swapaxes(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.swapaxes(1, 2) if tall else x
