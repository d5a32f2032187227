"""The image branch of BLIP-2's Q-Former (Li et al. 2023, arXiv 2301.12597, section 3.1).

Learned queries attend to each other in every layer and to the image in every second one. Post-norm, as in BERT.
Reference: transformers, blip_2/modeling_blip_2.py, Blip2QFormerModel and then the linear layer `language_projection`.

Decided here: the cells of several encoders are one set of keys, so their widths must agree; cells that show only
padding are masked. transformers keeps this part in float32; here only norms and softmax are, and what the train step
keeps.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.aggregators.resampler import flatten_cells
from jaxmllm.batch import FeatureMap, MapShape, TokenLayout, VisualTokens
from jaxmllm.fields import Positive
from jaxmllm.nn.attention.layer import CrossAttention
from jaxmllm.nn.primitives import MLP, LearnedArray, Linear, Norm, normal


class QFormer(nn.Module):
    """Maps -> tokens [N, `tokens`, H] that belong to no cell. The defaults are BLIP-2's."""

    tokens: Positive = 32
    width: Positive = 768
    depth: Positive = 12
    heads: Positive = 12
    mlp: Positive = 3072
    every: Positive = 2  # layers 0, every, 2 * every, .. attend to the image
    eps: float = 1e-12

    @nn.nowrap
    def layout(self, maps: dict[str, MapShape]) -> TokenLayout:
        """Order of the tokens. Raises ValueError if these maps cannot be aggregated."""
        widths = {name: x.c for name, x in maps.items()}
        if len(set(widths.values())) > 1:
            raise ValueError(f"QFormer needs maps of one width, not {widths}; use one encoder, or Resampler")
        if self.width % self.heads:
            raise ValueError(f"QFormer: width {self.width} must be a multiple of its {self.heads} heads")
        return TokenLayout(extra=self.tokens)

    @nn.compact
    def __call__(self, maps: dict[str, FeatureMap], masks: dict[str, jax.Array], llm_width: int) -> VisualTokens:
        parts = [flatten_cells(x, masks[name]) for name, x in maps.items()]
        x, mask = (jnp.concatenate(part, 1) for part in zip(*parts))
        init = normal(0.02)
        z = LearnedArray(init, name="queries")((self.tokens, self.width)).astype(x.dtype)
        z = sharded.repeat_rows(z, x.shape[0])
        z = Norm(eps=self.eps, name="norm")(z)
        for i in range(self.depth):
            attend = [
                CrossAttention(self.heads, self.width // self.heads, kernel_init=init, name=f"layer_{i}_{name}")
                for name in ("self", "cross")
            ]
            z = Norm(eps=self.eps, name=f"layer_{i}_self_norm")(z + attend[0](z, z))
            if i % self.every == 0:
                z = Norm(eps=self.eps, name=f"layer_{i}_cross_norm")(z + attend[1](z, x, mask))
            mlp = MLP(self.mlp, self.width, kernel_init=init, name=f"layer_{i}_mlp")
            z = Norm(eps=self.eps, name=f"layer_{i}_mlp_norm")(z + mlp(z))
        return VisualTokens(Linear((llm_width,), name="projector")(z), None)
