"""EfficientNet-Lite (Tan & Le 2019; without squeeze-and-excitation, with ReLU6): a small convolutional encoder."""

from __future__ import annotations

import flax.linen as nn
import jax

from jaxmllm.batch import MapShape
from jaxmllm.encoders.common import Pyramid
from jaxmllm.fields import Positive
from jaxmllm.nn.primitives import ACTIVATIONS, BatchNorm, Conv

# The stages of Lite0: (blocks, kernel, stride of the first block, expansion, width)
LITE0 = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip


class Block(nn.Module):
    """Inverted bottleneck (Sandler et al. 2018): widens, convolves each channel, narrows; residual if shapes agree."""

    kernel: Positive
    stride: Positive
    expansion: Positive
    width: Positive

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y, relu6 = x, ACTIVATIONS["relu6"]
        if self.expansion > 1:
            wide = self.expansion * x.shape[-1]
            y = relu6(BatchNorm(name="expand_norm")(Conv(wide, 1, use_bias=False, name="expand")(y)))
        conv = Conv(y.shape[-1], self.kernel, self.stride, depthwise=True, use_bias=False, name="conv")
        y = relu6(BatchNorm(name="conv_norm")(conv(y)))
        y = BatchNorm(name="project_norm")(Conv(self.width, 1, use_bias=False, name="project")(y))
        return x + y if x.shape == y.shape else y


class EfficientNet(Pyramid):
    """uint8[N, size, size, 3] -> [1, N, side, side, C], where C is the sum of the tapped widths.

    taps: 0 = after the stem, i = after block i (Lite0 has 16), 17 = after the head, whose map the classifier reads.
    """

    size: Positive
    taps: tuple[int, ...]
    stages: tuple[tuple[int, ...], ...] = LITE0
    stem: Positive = 32
    head: Positive = 1280

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in order."""
        return tuple(
            Block(kernel, stride if i == 0 else 1, expansion, width, parent=None)
            for count, kernel, stride, expansion, width in self.stages
            for i in range(count)
        )

    @property
    def pyramid(self) -> tuple[MapShape, ...]:
        side = -(-self.size // 2)
        found = [MapShape(side, side, self.stem)]
        for block in self.blocks:
            side = -(-side // block.stride)
            found.append(MapShape(side, side, block.width))
        return (*found, MapShape(side, side, self.head))

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        relu6 = ACTIVATIONS["relu6"]
        x = Conv(self.stem, 3, 2, use_bias=False, name="stem")(self.normalise(images))
        maps, last = [relu6(BatchNorm(name="stem_norm")(x))], max(self.taps)
        for i, block in enumerate(self.blocks[:last]):
            maps.append(block.copy(name=f"block{i}")(maps[-1]))
        if last > len(self.blocks):
            x = Conv(self.head, 1, use_bias=False, name="head")(maps[-1])
            maps.append(relu6(BatchNorm(name="head_norm")(x)))
        return self.joined([maps[t] for t in self.taps])
