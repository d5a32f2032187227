"""The C-Abstractor of Honeybee (Cha et al. 2024, arXiv 2312.06742, section 3.3).

Convolutions, pooling to fewer cells, convolutions. Reference: honeybee/projectors/projectors.py, whose blocks are those
of timm's RegNet (Bottleneck). The reference's optional LayerNorm in front and the learned tokens that it may append are
left out.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm.aggregators.mlp import Projector, lay_out
from jaxmllm.batch import FeatureMap, MapShape, TokenLayout, VisualTokens
from jaxmllm.fields import Natural, Positive
from jaxmllm.nn.maps import adaptive_pool, need_plain, need_same
from jaxmllm.nn.primitives import ACTIVATIONS, Conv, LearnedArray, Linear, Norm


class RegBlock(nn.Module):
    """silu(shortcut(x) + LN(1x1(gate * silu(LN(depthwise 3x3(silu(LN(1x1 x))))))), x [N, h, w, C] -> [N, h, w, width].

    gate: squeeze and excitation on the mean of all cells, with a quarter of the input's channels as its hidden width.
    The shortcut is a 1x1 convolution and LN where the width changes. LayerNorm eps 1e-5; convolutions have no bias, the
    gate's layers have.
    """

    width: Positive

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        silu, inputs = ACTIVATIONS["silu"], x.shape[-1]

        def conv1x1(y, name):
            return Linear((self.width,), use_bias=False, name=name)(y)

        def norm(y, name):
            return Norm(name=name)(y)

        y = silu(norm(conv1x1(x, "conv1"), "norm1"))
        y = silu(norm(Conv(self.width, 3, depthwise=True, use_bias=False, name="conv2")(y), "norm2"))
        means = y.astype(jnp.float32).mean((1, 2), keepdims=True).astype(y.dtype)
        gate = Linear((self.width,), name="gate_up")(silu(Linear((round(inputs / 4),), name="gate_down")(means)))
        y = norm(conv1x1(y * jax.nn.sigmoid(gate), "conv3"), "norm3")
        if inputs != self.width:
            x = norm(conv1x1(x, "shortcut"), "shortcut_norm")
        return silu(x + y)


class CAbstractor(nn.Module):
    """Maps of one grid, joined along channels -> tokens [N, L*L (+ L), H].

    Learned positions, `depth` blocks, means of L x L parts (torch's AdaptiveAvgPool2d), `depth` blocks, and `mlp_depth`
    linear layers with SiLU between them.
    """

    grid: Positive = 12  # L
    width: Positive = 1024
    depth: Natural = 3
    mlp_depth: Natural = 2
    newline: bool = False
    unpad: bool = False

    @nn.nowrap
    def layout(self, maps: dict[str, MapShape]) -> TokenLayout:
        """Order of the tokens. Raises ValueError if these maps cannot be aggregated."""
        need_plain("CAbstractor", maps.values())
        need_same("CAbstractor", maps.values(), channels=False)
        (h, w, _, _), *_ = maps.values()
        if min(h, w) < self.grid:
            raise ValueError(f"CAbstractor cannot pool {h} x {w} cells into {self.grid} x {self.grid} tokens")
        return TokenLayout(self.grid, self.newline, self.unpad)

    @nn.compact
    def __call__(self, maps: dict[str, FeatureMap], masks: dict[str, jax.Array], llm_width: int) -> VisualTokens:
        x = jnp.concatenate([m.cells for m in maps.values()], -1)
        x = x + LearnedArray(nn.initializers.truncated_normal(0.02), name="positions")(x.shape[1:]).astype(x.dtype)
        for i in range(2 * self.depth):
            if i == self.depth:
                x = adaptive_pool(x, self.grid, self.grid)
            x = RegBlock(self.width, name=f"block_{i}")(x)
        x = Projector(llm_width, self.mlp_depth, "silu", name="projector")(x)
        return VisualTokens(lay_out(x, self.newline), None)
