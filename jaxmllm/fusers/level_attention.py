"""The other two attentions of MMFuser's ablation (Cao et al. 2024, table 7), in the place of the deformable one.

The paper names them (global: Vaswani et al. 2017; linear: the spatial-reduction attention of PVTv2, Wang et al. 2022,
arXiv 2106.13797) and no code is published. Decided here: both have biases and heads of C / heads channels; no
positions; every level is reduced on its own, with one set of weights for all. Norms, scales and residual are those of
MMFuser, so that only the attention differs.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm.nn.attention import CrossAttention
from jaxmllm.nn.maps import Tokens, adaptive_pool
from jaxmllm.nn.primitives import ACTIVATIONS, Linear, Norm


class GlobalAttention(nn.Module):
    """Every query asks every cell of every level: query [N, Q, C], levels by size -> [N, Q, C]."""

    heads: int

    @nn.compact
    def __call__(self, query: jax.Array, reference: jax.Array, levels: list[Tokens]) -> jax.Array:
        c = query.shape[-1]
        keys = jnp.concatenate([x for stack in levels for x in stack.cells], 1)
        init = nn.initializers.xavier_uniform()
        return CrossAttention(self.heads, c // self.heads, kernel_init=init, name="attn")(query, keys)


class LinearAttention(nn.Module):
    """The same on means of side x side parts of each level, each through Linear, LayerNorm (eps 1e-5), GELU."""

    heads: int
    side: int

    @nn.compact
    def __call__(self, query: jax.Array, reference: jax.Array, levels: list[Tokens]) -> jax.Array:
        reduce, norm = Linear((query.shape[-1],), name="reduce"), Norm(name="norm")
        levels = (adaptive_pool(x, self.side, self.side) for stack in levels for x in stack.maps)
        pooled = [ACTIVATIONS["gelu"](norm(reduce(x)))[None] for x in levels]
        return GlobalAttention(self.heads, name="global")(query, reference, [Tokens.of(x) for x in pooled])
