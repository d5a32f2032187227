"""The Perceiver resampler of Flamingo (Alayrac et al. 2022, arXiv 2204.14198, appendix A.1.1): learned latents ask all
cells of all encoders. Sizes and details as in Idefics (transformers, idefics/perceiver.py, IdeficsPerceiverResampler).

    z = z + W_o softmax(Q(LN z) K([LN x ; LN z])^T / sqrt(d)) V([LN x ; LN z]),   z = z + W2 relu(W1 LN z)

Decided here, where it is more general than Idefics: maps of another width than the latents' go through a linear layer
without bias first (as Qwen-VL's kv_proj); several encoders' cells are one set of keys; cells that show only padding
are not seen; after the last LayerNorm one linear layer leads to the width of the language model.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import mesh
from jaxmllm.batch import FeatureMap, MapShape, TokenLayout, VisualTokens
from jaxmllm.nn.attention import CrossAttention
from jaxmllm.nn.primitives import MLP, Linear, Norm, Table, normal


def flatten_cells(x: FeatureMap, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A map and its mask bool[N, h, w] -> (tokens [N, T, C], bool[N, T]); tokens beside the grid come last."""
    n, h, w, c = x.cells.shape
    tokens, seen = mesh.reshape(x.cells, n, h * w, c), mesh.reshape(mask, n, h * w)
    if x.extra is None:
        return tokens, seen
    more = mesh.shard(jnp.ones(x.extra.shape[:2], bool), "batch", None)
    return jnp.concatenate([tokens, x.extra], 1), jnp.concatenate([seen, more], 1)


class Resampler(nn.Module):
    """Maps -> tokens [N, `tokens`, H] that belong to no cell."""

    llm_width: int  # H
    width: int  # of the latents
    tokens: int = 64
    depth: int = 6
    heads: int = 16
    head_dim: int = 96
    mlp_ratio: int = 4

    @nn.nowrap
    def layout(self, maps: dict[str, MapShape]) -> TokenLayout:
        """Order of the tokens; any maps can be resampled."""
        return TokenLayout(self.llm_width, extra=self.tokens)

    @nn.compact
    def __call__(self, maps: dict[str, FeatureMap], masks: dict[str, jax.Array]) -> VisualTokens:
        keys, seen = [], []
        for name, x in maps.items():
            tokens, mask = flatten_cells(x, masks[name])
            if tokens.shape[-1] != self.width:
                tokens = Linear((self.width,), use_bias=False, name=f"input_{name}")(tokens)
            keys.append(tokens)
            seen.append(mask)
        x = jnp.concatenate(keys, 1)
        own = mesh.shard(jnp.ones((x.shape[0], self.tokens), bool), "batch", None)
        mask = jnp.concatenate([*seen, own], 1)
        z = Table((self.tokens, self.width), normal(1.0), name="latents")().astype(x.dtype)
        z = mesh.repeat_rows(z, x.shape[0])
        for i in range(self.depth):
            attend = CrossAttention(self.heads, self.head_dim, use_bias=False, name=f"attn_{i}")
            a, b = Norm(name=f"norm_x_{i}")(x), Norm(name=f"norm_z_{i}")(z)
            z = z + attend(b, jnp.concatenate([a, b], 1), mask)
            mlp = MLP(self.width * self.mlp_ratio, self.width, "relu", use_bias=False, name=f"mlp_{i}")
            z = z + mlp(Norm(name=f"norm_mlp_{i}")(z))
        z = Linear((self.llm_width,), name="projector")(Norm(name="norm")(z))
        return VisualTokens(z, None)
