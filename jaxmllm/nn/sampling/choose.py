"""Weighted bilinear samples of feature maps, which deformable attention reads.

Linear interpolation is written with hat functions: pixel j has the weight max(0, 1 - |x - j|), and pixels outside a map
do not exist, which is exactly zero padding. So sampling is a product with a matrix [pixels, queries], without gather or
scatter in either direction. On a TPU a kernel makes that matrix piece by piece on the chip; elsewhere XLA makes it
whole.
"""

from __future__ import annotations

import jax

from jaxmllm.nn import compiler
from jaxmllm.nn.sampling.plain import plain_sample
from jaxmllm.nn.sampling.tpu import tpu_sample, vmem_available, vmem_needed


def sample(values: list[jax.Array], at: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum over levels and points of weight x bilinear sample: [N, Q, C] in the dtype of values.

    values: arrays [levels, N, h, w, C], whose sizes may differ; C is cut into heads. at float32[N, Q, heads, levels,
    points, 2]: (x, y) in pixels of the level, where a whole number is the middle of a pixel; weights float32[N, Q,
    heads, levels, points]. Levels are counted through all values. The matrix is made in float32 and rounded to the
    dtype of values; sums are float32. The TPU kernels hold all maps of a few heads on the chip; larger maps are left to
    XLA.
    """
    if compiler.platform() == "tpu" and vmem_needed(values, at.shape[2]) < vmem_available():
        return tpu_sample(values, at, weights)
    # The matrix is the largest array of the visual path (0.9 GB for 8 images of CLIP-L/336). A CPU saves it: making it
    # again would be 7 % of the toy's step.
    return compiler.recompute_on_accelerators(plain_sample)(values, at, weights)
