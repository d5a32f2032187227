"""Swin Transformer (Liu et al. 2021) as in the backbone of OneFormer, where windows keep their size on small maps."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm import sharded
from jaxmllm.batch import MapShape
from jaxmllm.encoders.common import Pyramid
from jaxmllm.fields import Positive
from jaxmllm.nn.maps import cells, patches
from jaxmllm.nn.primitives import MLP, LearnedArray, Linear, Norm, normal
from jaxmllm.nn.stack import Stack, empty_taps, tap_slots

MASKED = -100.0  # added to the score of two cells that only the cyclic shift put into one window (Swin's own value)


class WindowAttention(nn.Module):
    """Self-attention within windows of side `window`, with a learned bias for each offset between two cells."""

    heads: Positive
    window: Positive

    @nn.compact
    def __call__(self, x: jax.Array, mask: np.ndarray | None) -> jax.Array:
        """x [N, windows, window^2, C]; mask bool[windows, window^2, window^2], True where a pair must not attend."""
        width = x.shape[-1]
        dim = width // self.heads
        q, k, v = (Linear((self.heads, dim), out_axes=("heads", None), name=name)(x) for name in "qkv")
        scores = jnp.einsum("nwshd,nwthd->nwhst", q, k, preferred_element_type=jnp.float32) * dim**-0.5
        table = LearnedArray(normal(0.02), name="offset_bias")(((2 * self.window - 1) ** 2, self.heads))
        bias = sharded.shard(table[offsets(self.window)].transpose(2, 0, 1), "heads", None, None)  # [heads, S, T]
        scores = scores + bias.astype(jnp.float32)
        if mask is not None:
            scores = scores + MASKED * mask[:, None].astype(np.float32)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        y = jnp.einsum("nwhst,nwthd->nwshd", weights, v)
        return Linear((width,), ("heads", None), ("embed",), name="out")(y)


def offsets(window: int) -> np.ndarray:
    """int[window^2, window^2]: for a query cell and a key cell, the row of the bias table for their offset."""
    at = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij"), -1).reshape(-1, 2)
    d = at[:, None] - at[None] + window - 1
    return d[..., 0] * (2 * window - 1) + d[..., 1]


def shift_mask(side: int, window: int, shift: int) -> np.ndarray:
    """Which pairs of cells in a window come from opposite ends of a side x side map that was rolled by -shift.

    bool[windows, window^2, window^2].
    """
    at = np.arange(side)
    part = (at >= side - window).astype(int) + (at >= side - shift)
    region = (part[:, None] * 3 + part).reshape(side // window, window, side // window, window)
    region = region.swapaxes(1, 2).reshape(-1, window * window)
    return region[:, :, None] != region[:, None]


class Block(nn.Module):
    """Window attention and an MLP, each after a norm and with a residual."""

    heads: Positive
    window: Positive
    shift: int
    mlp_ratio: Positive
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [N, side, side, C]."""
        n, side, _, width = x.shape
        window, shift = self.window, self.shift
        y = Norm(eps=self.eps, name="norm1")(x)
        padded = -(-side // window) * window
        y = jnp.pad(y, ((0, 0), (0, padded - side), (0, padded - side), (0, 0)))
        y = jnp.roll(y, (-shift, -shift), (1, 2)) if shift else y
        count = padded // window
        y = sharded.reshape(cells(y, window), n, count * count, window * window, width)
        mask = shift_mask(padded, window, shift) if shift else None
        y = WindowAttention(self.heads, window, name="attn")(y, mask)
        y = sharded.reshape(y, n, count, count, window, window, width).swapaxes(2, 3)
        y = sharded.reshape(y, n, padded, padded, width)
        y = jnp.roll(y, (shift, shift), (1, 2)) if shift else y
        x = x + y[:, :side, :side]
        mlp = MLP(self.mlp_ratio * width, width, name="mlp")
        return x + mlp(Norm(eps=self.eps, name="norm2")(x))


class Pair(nn.Module):
    """A block whose windows start at the corner of the map, and one whose windows are shifted by half their side."""

    heads: Positive
    window: Positive
    mlp_ratio: Positive
    eps: float

    @nn.compact
    def __call__(self, x, cache):
        for name, shift in (("plain", 0), ("shifted", self.window // 2)):
            x = Block(self.heads, self.window, shift, self.mlp_ratio, self.eps, name=name)(x)
        return x, cache, {}


class Swin(Pyramid):
    """uint8[N, size, size, 3] -> [1, N, side, side, C], where C is the sum of the tapped stages' widths.

    Stage i has width * 2^(i-1) channels; depths are even. norms: a LayerNorm after each tapped stage, as in OneFormer's
    backbone. A tap is the output of its stage before the side is halved for the next one.
    """

    size: Positive
    width: Positive
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: Positive
    taps: tuple[int, ...]
    norms: bool = True
    mlp_ratio: Positive = 4
    eps: float = 1e-5

    def __post_init__(self):
        if any(depth % 2 for depth in self.depths) or len(self.depths) != len(self.heads):
            raise ValueError(
                f"Swin: depths {self.depths} must be even, with one number of heads each, not {self.heads}"
            )
        super().__post_init__()

    @property
    def pyramid(self) -> tuple[MapShape, ...]:
        first = -(-self.size // 4)
        sides = [-(-first // 2**i) for i in range(len(self.depths))]
        stages = [MapShape(side, side, self.width * 2**i) for i, side in enumerate(sides)]
        return (stages[0], *stages)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = patches(pad_to_multiple(self.normalise(images), 4), 4)
        x = Norm(name="stem_norm")(self.as_map(Linear((self.width,), (None,), name="stem")(x), 0))
        maps = {0: x}
        for i in range(1, max(self.taps) + 1):
            if i > 1:
                x = cells(pad_to_multiple(x, 2), 2).swapaxes(3, 4)  # Swin orders the four cells column by column
                x = sharded.reshape(x, *x.shape[:3], 4 * x.shape[-1])
                x = Linear((x.shape[-1] // 2,), use_bias=False, name=f"down{i}")(Norm(name=f"down{i}_norm")(x))
            pairs = self.depths[i - 1] // 2
            block = Pair(self.heads[i - 1], self.window, self.mlp_ratio, self.eps)
            stack = Stack(block, pairs, self.remat, self.unroll, name=f"stage{i}")
            x, *_ = stack(x, empty_taps(x, 0), tap_slots((), pairs), None)
            maps[i] = Norm(name=f"norm{i}")(x) if self.norms and i in self.taps else x
        return self.joined([maps[t] for t in self.taps])


def pad_to_multiple(x: jax.Array, multiple: int) -> jax.Array:
    """x [N, h, w, C] with zeros on the right and below, so that its sides are multiples of `multiple`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, -x.shape[2] % multiple), (0, 0)))
