"""What layers do for the sake of a compiler: barriers, memory layouts, and other forms of an operation by platform.

Layer code calls these functions and asks for no platform itself. Which kernel serves attention and sampling is chosen
in their own folders.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jaxmllm import sharded


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the mesh's devices, real or of a topology. "" for an abstract mesh or none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else ""


def device_kind() -> str:
    """The name of the mesh's devices, e.g. "TPU v5"; "" for an abstract mesh or none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else ""


def compile_apart(x):
    """x, a pytree; the compiler joins no operation before this point with one after it."""
    return jax.lax.optimization_barrier(x)


def row_major(x: jax.Array) -> jax.Array:
    """On a TPU, keeps x and its gradient in memory in the order of their dimensions.

    Left free, the v6e compiler saves one order and computes with the other, with a copy in every layer.
    """
    if platform() != "tpu":
        return x
    # On each device's own part: for the constraint the partitioner would gather the whole array.
    return sharded.per_device(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), x)


def tile_rows() -> int:
    """The number of rows that flat maps are padded to a multiple of: 16 on a TPU, whose bfloat16 tiles have 16 rows.

    Rows that end inside a tile double the cycles of a product and take the compiler seven times as long (v6e, 1369
    tokens).
    """
    return 16 if platform() == "tpu" else 1


def recompute_on_accelerators(f: Callable) -> Callable:
    """f, whose intermediate results the backward pass computes again; on a CPU, whose shapes are toys, it saves
    them."""
    return f if platform() == "cpu" else jax.checkpoint(f)


def loops_copy_weights() -> bool:
    """Whether a loop over layers copies the weights of each before it uses them, as on a CPU.

    In training that is little beside the products; it doubles the time of products with one row
    (docs/log.md#evaluation).
    """
    return platform() == "cpu"


def turn_halves(x: jax.Array) -> jax.Array:
    """[..., D] -> float32[..., D]: (a, b) -> (-b, a) of the halves of the last dimension.

    On a TPU a product with a signed permutation, which is exact: slicing and joining halves of 64 lanes takes three
    times as long there. On a CPU the halves are faster.
    """
    half = x.shape[-1] // 2
    if platform() != "tpu":
        return jnp.concatenate([-x[..., half:], x[..., :half]], -1).astype(jnp.float32)
    swap = jnp.roll(jnp.diag(jnp.repeat(jnp.array([1, -1], x.dtype), half)), half, 1)
    with jax.named_scope("gather"):  # a plan counts no FLOPs of the model here
        return jnp.matmul(x, swap, precision="highest", preferred_element_type=jnp.float32)


def convolve(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """Convolution of x [N, h, w, in] with kernel [side, side, in / groups, out], zero-padded as "SAME".

    On each device's own images: left to XLA's partitioner (jax 0.10.2), the gradient of a depthwise kernel is doubled
    on a mesh that also splits over tensor. Shifted products are right too, and faster on a CPU, but a 7 x 7 kernel
    takes four times the cycles on v5p (docs/log.md#convolutions).
    """

    def own(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=layout, feature_group_count=groups
        )

    return sharded.per_device(own, x, kernel)
