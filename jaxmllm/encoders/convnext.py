"""ConvNeXt (Liu et al. 2022), the convolutional CLIP tower of Cambrian-1 and VisPer-LM."""

from __future__ import annotations

import flax.linen as nn
import jax

from jaxmllm.batch import MapShape
from jaxmllm.encoders.common import Pyramid
from jaxmllm.fields import Positive
from jaxmllm.nn.maps import patches
from jaxmllm.nn.primitives import MLP, Conv, LearnedArray, Linear, Norm
from jaxmllm.nn.stack import Stack, empty_taps, tap_slots


class Block(nn.Module):
    """x + scale * MLP(norm(depthwise 7x7 convolution of x))."""

    eps: float

    @nn.compact
    def __call__(self, x, cache):
        """x [N, h, w, C]; the cache is passed through."""
        width = x.shape[-1]
        y = Norm(eps=self.eps, name="norm")(Conv(width, 7, depthwise=True, name="conv")(x))
        y = MLP(4 * width, width, name="mlp")(y)
        return x + y * LearnedArray(nn.initializers.ones, name="scale")((width,)).astype(y.dtype), cache, {}


class ConvNeXt(Pyramid):
    """uint8[N, size, size, 3] -> [1, N, side, side, C], where C is the sum of the tapped stages' widths.

    A stem of stride 4 and then stages, each of which but the first halves the side. Stage outputs are not normed.
    """

    size: Positive
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    taps: tuple[int, ...]
    eps: float = 1e-6

    @property
    def pyramid(self) -> tuple[MapShape, ...]:
        sides = [self.size // 4 >> i for i in range(len(self.depths))]
        return tuple(MapShape(s, s, c) for s, c in zip((sides[0], *sides), (self.widths[0], *self.widths)))

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.normalise(images)
        x = Linear(self.widths[:1], (None,), name="stem")(patches(x, 4))
        x = Norm(eps=self.eps, name="stem_norm")(self.as_map(x, 0))
        maps = {0: x}
        for i in range(1, max(self.taps) + 1):
            if i > 1:
                x = patches(Norm(eps=self.eps, name=f"down{i}_norm")(x), 2)
                x = self.as_map(Linear((self.widths[i - 1],), (None,), name=f"down{i}")(x), i)
            depth = self.depths[i - 1]
            stack = Stack(Block(self.eps), depth, self.remat, self.unroll, name=f"stage{i}")
            x, *_ = stack(x, empty_taps(x, 0), tap_slots((), depth), None)
            maps[i] = x
        return self.joined([maps[t] for t in self.taps])
