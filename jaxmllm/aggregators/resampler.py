"""The Perceiver resampler of Flamingo (Alayrac et al. 2022, arXiv 2204.14198, appendix A.1.1).

Learned latents attend to all cells of all encoders. Sizes and details are those of Idefics (transformers,
idefics/perceiver.py, IdeficsPerceiverResampler).

    z = z + W_o softmax(Q(LN z) K([LN x ; LN z])^T / sqrt(D)) V([LN x ; LN z]),   z = z + W2 relu(W1 LN z)

Decided here, where it is more general than Idefics: maps whose width is not that of the latents first go through a
linear layer without bias (as Qwen-VL's kv_proj); the cells of several encoders are one set of keys; cells that show
only padding are masked; after the last LayerNorm a linear layer leads to the width of the language model.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.batch import FeatureMap, MapShape, TokenLayout, VisualTokens
from jaxmllm.fields import Positive
from jaxmllm.nn.attention.layer import CrossAttention
from jaxmllm.nn.primitives import MLP, LearnedArray, Linear, Norm, normal


def flatten_cells(x: FeatureMap, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A map and its mask bool[N, h, w] -> (keys [N, T, C], mask bool[N, T]); extra tokens come after the cells."""
    n, h, w, c = x.cells.shape
    cells, mask = sharded.reshape(x.cells, n, h * w, c), sharded.reshape(mask, n, h * w)
    if x.extra is None:
        return cells, mask
    extra_mask = sharded.shard(jnp.ones(x.extra.shape[:2], bool), "batch", None)
    return jnp.concatenate([cells, x.extra], 1), jnp.concatenate([mask, extra_mask], 1)


class Resampler(nn.Module):
    """Maps -> tokens [N, `tokens`, H] that belong to no cell."""

    width: Positive  # of the latents
    tokens: Positive = 64
    depth: Positive = 6
    heads: Positive = 16
    head_dim: Positive = 96
    mlp_ratio: Positive = 4

    @nn.nowrap
    def layout(self, maps: dict[str, MapShape]) -> TokenLayout:
        """Order of the tokens. All maps can be resampled."""
        return TokenLayout(extra=self.tokens)

    @nn.compact
    def __call__(self, maps: dict[str, FeatureMap], masks: dict[str, jax.Array], llm_width: int) -> VisualTokens:
        keys, key_masks = [], []
        for name, x in maps.items():
            cells, mask = flatten_cells(x, masks[name])
            if cells.shape[-1] != self.width:
                cells = Linear((self.width,), use_bias=False, name=f"input_{name}")(cells)
            keys.append(cells)
            key_masks.append(mask)
        x = jnp.concatenate(keys, 1)
        latent_mask = sharded.shard(jnp.ones((x.shape[0], self.tokens), bool), "batch", None)
        mask = jnp.concatenate([*key_masks, latent_mask], 1)
        z = LearnedArray(normal(1.0), name="latents")((self.tokens, self.width)).astype(x.dtype)
        z = sharded.repeat_rows(z, x.shape[0])
        for i in range(self.depth):
            attend = CrossAttention(self.heads, self.head_dim, use_bias=False, name=f"attn_{i}")
            a, b = Norm(name=f"norm_x_{i}")(x), Norm(name=f"norm_z_{i}")(z)
            z = z + attend(b, jnp.concatenate([a, b], 1), mask)
            mlp = MLP(self.width * self.mlp_ratio, self.width, "relu", use_bias=False, name=f"mlp_{i}")
            z = z + mlp(Norm(name=f"norm_mlp_{i}")(z))
        z = Linear((llm_width,), name="projector")(Norm(name="norm")(z))
        return VisualTokens(z, None)
