"""Linear, Conv, Norm, BatchNorm, Embed, LearnedArray: the only callers of `self.param`.

So initial values and shardings have one place. New parameters are float32. They may be cast (to bfloat16) before
`apply`; a layer computes in the dtype of its input and keeps norms in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxmllm import sharded
from jaxmllm.nn import compiler, lora
from jaxmllm.nn.param_info import ParamInfo, describe_param

Init = Callable[..., jax.Array]
normal = nn.initializers.normal
zeros = nn.initializers.zeros
ones = nn.initializers.ones


def torch_uniform(fan_in: int) -> Init:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch.nn.Linear's default for both weight and bias."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class _Params(nn.Module):
    def weight(
        self,
        kind: str,
        name: str,
        init: Init,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        inputs: int = 0,
        linear: bool = False,
    ) -> jax.Array:
        path = "/".join((*self.path, name))
        describe_param(path, ParamInfo(kind, axes, inputs, linear))
        return self.param(name, lambda key: sharded.shard_param(init(key, shape, jnp.float32), axes, path))


class Linear(_Params):
    """y[..., out] = x[..., in] @ kernel + bias, where `in` and `out` may be several dimensions each.

    in_axes, out_axes: logical names of those dimensions (mesh.RULES). The length of in_axes says how many trailing
    dimensions of x are contracted. features: sizes of `out`. The kernel has the input dimensions, then the output
    dimensions. Adapters that stand beside the kernel are added (lora.py).
    """

    features: tuple[int, ...]
    in_axes: tuple[str | None, ...] = ("embed",)
    out_axes: tuple[str | None, ...] = (None,)
    use_bias: bool = True
    kernel_init: Init | None = None  # None: torch.nn.Linear's default for kernel and bias; else the bias is zero

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n = len(self.in_axes)
        inputs, axes = x.shape[x.ndim - n :], (*self.in_axes, *self.out_axes)
        fan_in, fan_out = math.prod(inputs), math.prod(self.features)
        init = self.kernel_init or torch_uniform(fan_in)

        def kernel_init(key, shape, dtype):  # an initialiser sees one matrix
            return init(key, (fan_in, fan_out), dtype).reshape(shape)

        kernel = self.weight("matrix", "kernel", kernel_init, (*inputs, *self.features), axes, n, True)
        kernel = sharded.gather_param(kernel, axes).astype(x.dtype)
        contract = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
        y = jax.lax.dot_general(
            x, kernel, (contract, ((), ())), out_sharding=sharded.spec_like(x, x.ndim - n, self.out_axes)
        )
        if self.has_variable("params", "lora_a"):
            y = y + lora.branch(self, x)
        if self.use_bias:
            bias_init = zeros if self.kernel_init else torch_uniform(fan_in)
            bias = self.weight("bias", "bias", bias_init, self.features, self.out_axes)
            y = y + sharded.gather_param(bias, self.out_axes).astype(x.dtype)
        return y


class Conv(_Params):
    """[N, h, w, in] -> [N, ceil(h/stride), ceil(w/stride), features], zero-padded as TensorFlow's "SAME".

    With a stride, that padding has more zeros on the right and below. Kernel [side, side, in, features]; depthwise:
    each channel has its own filter, [side, side, 1, features].
    """

    features: int
    side: int
    stride: int = 1
    depthwise: bool = False
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, axes = (1, (None,) * 4) if self.depthwise else (x.shape[-1], (None, None, "embed", None))
        init = torch_uniform(self.side**2 * inputs)
        kernel = self.weight("matrix", "kernel", init, (self.side, self.side, inputs, self.features), axes, 3)
        kernel = sharded.gather_param(kernel, axes).astype(x.dtype)
        y = compiler.convolve(x, kernel, self.stride, self.features if self.depthwise else 1)
        return y + self.weight("bias", "bias", init, (self.features,), (None,)).astype(x.dtype) if self.use_bias else y


class Norm(_Params):
    """LayerNorm (kind="layer") or RMSNorm (kind="rms") over the last dimension: in float32, returned in x's dtype."""

    kind: str = "layer"
    eps: float = 1e-5
    zero_centred: bool = False  # the scale is 1 + the parameter, which starts at 0 (Gemma)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.weight("norm", "scale", zeros if self.zero_centred else ones, x.shape[-1:], (None,))
        if self.zero_centred:
            scale = 1 + scale.astype(jnp.float32)
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps) * scale.astype(jnp.float32)
        if self.kind == "layer":
            y = y + self.weight("bias", "bias", zeros, x.shape[-1:], (None,)).astype(jnp.float32)
        return y.astype(x.dtype)


class BatchNorm(_Params):
    """Batch normalisation of pretrained networks, in float32, with the stored statistics, which never change.

    The statistics are never trained, whatever a rule says.
    """

    eps: float = 1e-3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, axes = x.shape[-1:], (None,)
        scale = self.weight("norm", "scale", ones, shape, axes)
        bias = self.weight("bias", "bias", zeros, shape, axes)
        mean, var = (
            self.weight("statistic", name, init, shape, axes) for name, init in (("mean", zeros), ("var", ones))
        )
        mean, var = (jax.lax.stop_gradient(w.astype(jnp.float32)) for w in (mean, var))
        y = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(var + self.eps)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class Embed(_Params):
    """Token embedding [V, H]."""

    vocab: int
    width: int

    def setup(self):
        init = normal(self.width**-0.5)
        self.table = self.weight("embedding", "embedding", init, (self.vocab, self.width), ("vocab", "embed"))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int32[B, S] -> [B, S, H]."""
        table = sharded.gather_param(self.table, ("vocab", "embed"))
        return table.at[ids].get(out_sharding=sharded.spec_like(ids, ids.ndim, (None,)))

    def kernel(self) -> jax.Array:
        """The table [V, H] as it is stored."""
        return self.table


class LearnedArray(_Params):
    """A learned array of a given shape: a table of positions, queries, scales."""

    init: Init = normal(0.02)

    @nn.compact
    def __call__(self, shape: tuple[int, ...]) -> jax.Array:
        return self.weight("array", "value", self.init, tuple(shape), (None,) * len(shape))


def pad(x: jax.Array, dimension: int, more: int, value: int = 0) -> jax.Array:
    """x with `more` entries of `value` appended along a dimension."""
    widths = [(0, more if i == dimension % x.ndim else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if more else x


def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution function, in float32 as torch computes it. (erfc, in jax.nn.gelu, is slower.)"""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """x, or if there is a cap, cap * tanh(x / cap), which keeps it between -cap and cap (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
}


class MLP(nn.Module):
    """Linear, activation, Linear; gated: down(act(gate(x)) * up(x)): SwiGLU with silu, GeGLU with a GELU."""

    hidden: int
    out: int
    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    kernel_init: Init | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        common = dict(use_bias=self.use_bias, kernel_init=self.kernel_init)
        act = ACTIVATIONS[self.activation]

        def project(name):
            y = Linear((self.hidden,), out_axes=("mlp",), name=name, **common)(x)
            return compiler.row_major(checkpoint_name(y, "projection"))

        y = project("up")
        if self.gated:
            y = act(project("gate")) * y
        else:
            # Otherwise the TPU compiler joins both products, which takes a ninth more cycles (ViT-L, v6e).
            y = compiler.compile_apart(act(y))
        return Linear((self.out,), in_axes=("mlp",), out_axes=("embed",), name="down", **common)(y)
