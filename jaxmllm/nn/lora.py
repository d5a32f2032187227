"""LoRA (Hu et al. 2021, arXiv 2106.09685): a linear layer y = Wx + alpha / rank * B(Ax) with small A and B.

Where a layer has parameters lora_a and lora_b beside its kernel, it adds their branch (primitives.Linear). So whoever
applies a model with such parameters, to train, answer or measure, applies its adapters. With W frozen, no gradient of
its size is ever made: the gradient of x needs W, those of A and B do not.

    lora_a [layers.., inputs.., rank]     lora_b [layers.., rank, features..]
    lora_alpha, lora_dropout [layers..], which are never trained
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxmllm import sharded
from jaxmllm.errors import ConfigError
from jaxmllm.nn.param_info import KINDS, ParamInfo, describe_param

PARTS = ("lora_a", "lora_b", "lora_alpha", "lora_dropout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Adapters of the linear layers that `targets` name: regexes of the paths of their kernels, or the kind "matrix",
    which is all of them. dropout: share of the inputs of A that a step of training sets to zero."""

    rank: int
    targets: tuple[str, ...]
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self):
        if self.rank < 1 or not self.targets or not 0 <= self.dropout < 1:
            raise ConfigError(f"{self}: rank must be 1 or more, dropout in 0..1, and targets must name something")
        for target in self.targets:
            if target in KINDS and target != "matrix":
                raise ConfigError(f"{self}: only linear layers have adapters, their kind is 'matrix', not {target!r}")

    def matches(self, path: str) -> bool:
        """Whether the kernel at a path gets an adapter."""
        return any(target == "matrix" or re.search(target, path) for target in self.targets)


def is_adapter(path: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return path.rpartition("/")[2] in PARTS


def kernel_of(path: str) -> str:
    """The path of the kernel that an adapter's parameter belongs to."""
    return f"{path.rpartition('/')[0]}/kernel"


def adapters(
    loras: tuple[LoRA, ...], params: Mapping[str, Any], infos: Mapping[str, ParamInfo], key: jax.Array
) -> dict[str, jax.Array]:
    """New adapters for the layers that `loras` name; the first that matches a layer counts.

    params: path -> array with the shape of the parameter. infos: what the parameters are. A starts as torch.nn.Linear's
    weight does, B at zero, so a model with new adapters is the model without. Raises ConfigError for a LoRA that names
    no layer.
    """
    made, used = {}, set()
    for path, info in infos.items():
        lora = next((each for each in loras if info.linear and each.matches(path)), None)
        if lora is None:
            continue
        used.add(lora)
        shape, lead = params[path].shape, params[path].ndim - len(info.dims)
        stack, inputs, features = shape[:lead], shape[lead : lead + info.inputs], shape[lead + info.inputs :]
        bound, own = math.prod(inputs) ** -0.5, jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.uniform(own, (*stack, *inputs, lora.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*stack, lora.rank, *features), jnp.float32)
        found = {
            "lora_a": (a, ParamInfo("matrix", (*info.dims[: info.inputs], None), info.inputs)),
            "lora_b": (b, ParamInfo("matrix", (None, *info.dims[info.inputs :]), 1)),
            "lora_alpha": (jnp.full(stack, lora.alpha, jnp.float32), ParamInfo("statistic", ())),
        }
        if lora.dropout:
            found["lora_dropout"] = jnp.full(stack, lora.dropout, jnp.float32), ParamInfo("statistic", ())
        for name, (x, its_info) in found.items():
            place = f"{path.rpartition('/')[0]}/{name}"
            describe_param(place, its_info)
            made[place] = _shard(x, lead, its_info.dims)
    for lora in loras:
        if lora not in used:
            raise ConfigError(f"{lora} names no linear layer, or only those of LoRAs before it")
    return made


def _shard(x: jax.Array, lead: int, names: tuple[str | None, ...]) -> jax.Array:
    """As sharded.shard_param does with each layer of a stack."""
    small = math.prod(x.shape[lead:]) < sharded.MIN_FSDP_SIZE
    return sharded.shard(x, *[None] * lead, *(None if small and name == "embed" else name for name in names))


def branch(layer: Any, x: jax.Array) -> jax.Array:
    """alpha / rank * B(Ax) of a Linear that has adapters, in the dtype of x."""
    n, weight = len(layer.in_axes), lambda name: layer.get_variable("params", name)
    lead, a, b = x.ndim - n, weight("lora_a"), weight("lora_b")
    rate = weight("lora_dropout")
    if rate is not None and layer.has_rng("dropout"):
        x = _drop(x, rate, layer.make_rng("dropout"))
    a = sharded.gather_param(a, (*layer.in_axes, None)).astype(x.dtype)
    b = sharded.gather_param(b, (None, *layer.out_axes)).astype(x.dtype)
    inner = tuple(range(lead, x.ndim)), tuple(range(n))
    z = jax.lax.dot_general(x, a, (inner, ((), ())), out_sharding=sharded.spec_like(x, lead, (None,)))
    outer = ((lead,), (0,)), ((), ())
    y = jax.lax.dot_general(z, b, outer, out_sharding=sharded.spec_like(x, lead, layer.out_axes))
    scale = jax.lax.stop_gradient(weight("lora_alpha").astype(jnp.float32)) / a.shape[-1]
    return y * scale.astype(y.dtype)


def _drop(x: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
    """Sets a share `rate` of x to zero and scales the others so that the mean stays."""
    rate = jax.lax.stop_gradient(rate.astype(jnp.float32))
    kept = _bits_like(x, key) >= (rate * 2.0**32).astype(jnp.uint32)
    return jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)


def _bits_like(x: jax.Array, key: jax.Array) -> jax.Array:
    """uint32 numbers of x's shape, split like x and the same on every mesh.

    jax.random.bits would take a TPU longer than the layer itself (docs/log.md). Here it makes a number for each row and
    one for each column, and Wellons' lowbias32 (nullprogram.com/blog/2018/07/31) mixes the two, without its last
    shift, which leaves the upper bits as they are.
    """
    spec, keys = sharded.spec_of(x), jax.random.split(key)
    rows = jax.random.bits(keys[0], x.shape[:-1], jnp.uint32, out_sharding=spec and P(*spec[:-1]))
    columns = jax.random.bits(keys[1], x.shape[-1:], jnp.uint32, out_sharding=spec and P(spec[-1]))
    bits = rows[..., None] ^ columns
    bits = (bits ^ bits >> 16) * jnp.uint32(0x7FEB352D)
    return (bits ^ bits >> 15) * jnp.uint32(0x846CA68B)


def merged(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """W + alpha / rank * AB in float32, for one layer or a stack. kernel [layers.., inputs.., features..]."""
    lead = a.ndim + b.ndim - 2 - kernel.ndim
    stack, rank = kernel.shape[:lead], a.shape[-1]
    a = np.asarray(a, np.float32).reshape(*stack, -1, rank)
    delta = (a @ np.asarray(b, np.float32).reshape(*stack, rank, -1)).reshape(kernel.shape)
    scale = np.asarray(alpha, np.float32).reshape(*stack, *[1] * (kernel.ndim - lead)) / rank
    return np.asarray(kernel, np.float32) + scale * delta
