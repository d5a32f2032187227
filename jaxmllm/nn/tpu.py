"""What our TPU kernels share: sizes of registers and memory, and products of two matrices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

LANES, SUBLANES = 128, 8  # a vector register is [SUBLANES, LANES] of 32-bit numbers
CHIPS_16MIB_VMEM = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")  # device kinds with 16 MiB of on-chip memory

# Dimension numbers of matrix products: a b, a b^T, a^T b.
NN, NT, TN = ((((a,), (b,)), ((), ())) for a, b in ((1, 0), (1, 1), (0, 0)))
dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
