"""The two attentions that MMFuser's ablation puts in place of the deformable one (Cao et al. 2024, table 7).

The paper names them (global: Vaswani et al. 2017; linear: the spatial-reduction attention of PVTv2, Wang et al. 2022,
arXiv 2106.13797), but publishes no code. Decided here: both have biases, heads of C / heads channels and no positions;
linear attention reduces each level separately, with the same weights. Norms, scales and the residual are those of
MMFuser, so that only the attention differs.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm.fields import Positive
from jaxmllm.nn.attention.layer import CrossAttention
from jaxmllm.nn.maps import FlatMaps, adaptive_pool
from jaxmllm.nn.primitives import ACTIVATIONS, Linear, Norm


class GlobalAttention(nn.Module):
    """Every query attends to every cell of every level: query [N, Q, C], levels grouped by size -> [N, Q, C]."""

    heads: Positive

    @nn.compact
    def __call__(self, query: jax.Array, reference: jax.Array, levels: list[FlatMaps]) -> jax.Array:
        c = query.shape[-1]
        keys = jnp.concatenate([x for group in levels for x in group.cells], 1)
        init = nn.initializers.xavier_uniform()
        return CrossAttention(self.heads, c // self.heads, kernel_init=init, name="attn")(query, keys)


class LinearAttention(nn.Module):
    """GlobalAttention on means of side x side parts of each level, after Linear, LayerNorm (eps 1e-5) and GELU."""

    heads: Positive
    side: Positive

    @nn.compact
    def __call__(self, query: jax.Array, reference: jax.Array, levels: list[FlatMaps]) -> jax.Array:
        reduce, norm = Linear((query.shape[-1],), name="reduce"), Norm(name="norm")
        levels = (adaptive_pool(x, self.side, self.side) for group in levels for x in group.maps)
        pooled = [ACTIVATIONS["gelu"](norm(reduce(x)))[None] for x in levels]
        return GlobalAttention(self.heads, name="global")(query, reference, [FlatMaps.of(x) for x in pooled])
