"""One Vision Transformer for CLIP, SigLIP, DINOv2 and DINOv3, which differ in its fields (sizes: presets.py).

Taps are indices of Hugging Face `hidden_states`: 0 = after the embedding (and CLIP's pre-norm), i = output of block
i, before the final norm. Blocks after the last tap are not built. Dosovitskiy et al. 2021; Radford et al. 2021 (CLIP);
Zhai et al. 2023 (SigLIP); Oquab et al. 2023 (DINOv2); Darcet et al. 2024 (registers); Simeoni et al. 2025 (DINOv3).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.batch import MapShape
from jaxmllm.encoders.common import INTERPOLATIONS, Encoder, interpolation_matrix, resample_table
from jaxmllm.fields import Natural, Positive
from jaxmllm.nn import compiler
from jaxmllm.nn.attention.layer import Attention
from jaxmllm.nn.maps import patches
from jaxmllm.nn.primitives import ACTIVATIONS, MLP, Init, LearnedArray, Linear, Norm, normal
from jaxmllm.nn.rope import grid_angles
from jaxmllm.nn.stack import Stack, empty_taps, tap_slots


class Block(nn.Module):
    """Pre-norm transformer block; both branches may be scaled per channel (DINOv2's layer scale)."""

    heads: Positive
    mlp: Positive
    activation: str
    gated: bool
    eps: float
    layer_scale: bool
    key_bias: bool

    @nn.compact
    def __call__(self, x, cache, angles=None):
        """x [N, tokens, C]; angles float32[1, tokens, D/2] of rotary positions; the cache is passed through."""
        width = x.shape[-1]
        init = nn.initializers.xavier_uniform()
        attn = Attention(self.heads, width // self.heads, key_bias=self.key_bias, kernel_init=init, name="attn")
        mlp = MLP(self.mlp, width, self.activation, self.gated, kernel_init=init, name="mlp")

        def scaled(y, name):
            if not self.layer_scale:
                return y
            return y * LearnedArray(nn.initializers.ones, name=name)((width,)).astype(y.dtype)

        x = x + scaled(attn(Norm(eps=self.eps, name="norm1")(x), angles=angles)[0], "scale1")
        x = x + scaled(mlp(Norm(eps=self.eps, name="norm2")(x)), "scale2")
        return x, cache, {}


class ViT(Encoder):
    """uint8[N, size, size, 3] -> taps [taps, N, side, side, C], without class and register tokens.

    taps: indices of hidden states, in any order. final_norm: apply the model's last norm to the taps, which is right
    for the last hidden state only. table: side of the stored table of positions if it is not the grid's; interpolation:
    how that table is resampled. rope_theta: rotary positions (DINOv3) instead of a table. stem: widths of 3x3
    convolutions of stride 2 in front of the patch projection (Xiao et al. 2021), which let a small ViT learn from
    scratch; a patch then has patch / 2^len(stem) of their output pixels a side.
    """

    size: Positive
    patch: Positive
    width: Positive
    layers: Positive
    heads: Positive
    mlp: Positive
    taps: tuple[int, ...]
    activation: str = "gelu"
    gated: bool = False
    eps: float = 1e-5
    class_token: bool = False
    registers: Natural = 0
    pre_norm: bool = False
    final_norm: bool = False
    patch_bias: bool = True
    layer_scale: bool = False
    key_bias: bool = True
    rope_theta: float | None = None
    table: Positive | None = None
    interpolation: str = "bicubic"
    stem: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if (self.stem and self.size % self.patch) or self.width % self.heads:
            raise ValueError(
                f"ViT: width {self.width} must be a multiple of heads {self.heads}, "
                f"and with a stem, size {self.size} a multiple of patch {self.patch}"
            )
        if not self.taps or min(self.taps) < 0 or max(self.taps) > self.layers:
            raise ValueError(f"ViT: taps {self.taps} must lie in 0..{self.layers} (0 = embeddings)")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ValueError(f"ViT: interpolation must be one of {known}, not {self.interpolation!r}")

    @property
    def grid(self) -> int:
        return self.size // self.patch

    @property
    def maps(self) -> tuple[MapShape, ...]:
        return (MapShape(self.side, self.side, self.width),) * len(self.taps)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.embed(self.normalise(images))
        if self.pre_norm:
            x = Norm(eps=self.eps, name="pre_norm")(x)
        extra, angles = self.class_token + self.registers, ()
        if self.rope_theta:  # class and register tokens are not rotated
            cells = grid_angles(self.grid, self.width // self.heads, self.rope_theta)
            angles = (jnp.pad(cells, ((0, extra), (0, 0)))[None],)
        wanted = tuple(t for t in self.taps if t)
        taps = empty_taps(x, len(wanted))
        block = Block(self.heads, self.mlp, self.activation, self.gated, self.eps, self.layer_scale, self.key_bias)
        depth = max(self.taps)
        stack = Stack(block, depth, self.remat, self.unroll, name="blocks")
        _, out, *_ = stack(x, taps, tap_slots(wanted, depth), None, *angles)
        out = jnp.stack([out[wanted.index(t)] if t else x for t in self.taps])
        if self.final_norm:
            out = Norm(eps=self.eps, name="final_norm")(out)
        if self.side == self.grid:
            out = out[:, :, : self.grid**2]
        else:
            # Bilinear, by one matrix, so that a TPU need not slice and copy maps whose sides are no multiples of 8.
            # "high" is three bfloat16 products there: a matrix in two bfloat16 parts is enough for maps in one.
            line = interpolation_matrix(self.grid, self.side, "bilinear")
            matrix = jnp.pad(jnp.kron(line, line), ((0, 0), (0, extra)))
            out = jnp.einsum("pt,kntc->knpc", matrix, out.astype(jnp.float32), precision="high").astype(out.dtype)
        shape = (*out.shape[:2], self.side, self.side, self.width)
        return sharded.reshape_to(out, shape, None, "batch", None, None, None)

    def embed(self, x: jax.Array) -> jax.Array:
        """[N, size, size, 3] -> [N, tokens, C]: patches with positions, then class and register tokens.

        These come last because the order does not matter to attention, while a TPU's tiles of rows start at multiples
        of 8.
        """
        init = nn.initializers.xavier_uniform()
        for i, width in enumerate(self.stem):
            x = Linear((width,), (None,) * 3, kernel_init=nn.initializers.he_normal(), name=f"stem{i}")(conv_patches(x))
            x = ACTIVATIONS["relu"](x)
        x = patches(x, self.patch >> len(self.stem))  # SigLIP's 384 pixels hold 27 patches of 14 and a remainder
        axes = {"in_axes": (None,), "out_axes": ("embed",)}  # 14 * 14 * 3 pixels cannot be split
        # Compiled apart from the addition of positions: as one kernel they were among the slowest to compile for a TPU.
        x = Linear((self.width,), **axes, kernel_init=init, use_bias=self.patch_bias, name="patch")(x)
        x = compiler.compile_apart(x)
        table = None if self.rope_theta else self.position_table().astype(x.dtype)
        others = []
        if self.class_token:
            token = LearnedArray(normal(0.02), name="class_token")((1, self.width)).astype(x.dtype)
            others.append(token if table is None else token + table[:1])
        if self.registers:
            others.append(LearnedArray(normal(0.02), name="registers")((self.registers, self.width)).astype(x.dtype))
        if table is not None:
            x = x + table[self.class_token :]
        if others:
            x = jnp.concatenate([x, sharded.repeat_rows(jnp.concatenate(others), x.shape[0])], 1)
        return x

    def position_table(self) -> jax.Array:
        """Positions of the class token, if there is one, and of the cells, [class token + grid*grid, C]."""
        side = self.table or self.grid
        table = LearnedArray(sincos_table(side), name="positions")((self.class_token + side * side, self.width))
        if side == self.grid:
            return table
        lead, cells = table[: self.class_token], table[self.class_token :].reshape(side, side, self.width)
        cells = resample_table(cells, self.grid, self.interpolation).reshape(-1, self.width)
        return jnp.concatenate([lead, cells])


def sincos_table(grid: int) -> Init:
    """Starts positions as two-dimensional sines and cosines (Chen et al. 2021); a class token's row is 0."""

    def init(key, shape, dtype=jnp.float32):
        half = shape[1] // 4
        angle = jnp.arange(grid)[:, None] * 10000.0 ** (-jnp.arange(half) / half)
        line = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], 1)  # [grid, C/2]
        table = jnp.concatenate([jnp.tile(line, (grid, 1)), jnp.repeat(line, grid, 0)], 1)
        return jnp.pad(table, ((shape[0] - grid * grid, 0), (0, shape[1] - table.shape[1]))).astype(dtype)

    return init


def conv_patches(x: jax.Array) -> jax.Array:
    """[N, h, w, C] -> [N, h/2, w/2, 3, 3, C]: the windows of a 3x3 convolution of stride 2, padding (1, 1).

    As windows and one matmul, a small convolution is about as fast as XLA's own, and its gradient is faster on a CPU.
    """
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = jnp.stack([x[:, i : i + h : 2] for i in range(3)], 3)  # [N, h/2, w+2, 3, C]
    return jnp.stack([rows[:, :, j : j + w : 2] for j in range(3)], 4)
