"""Cambrian-1's Spatial Vision Aggregator (Tong et al. 2024, arXiv 2406.16860, section 3.2).

A grid of L x L queries; query (i, j) sees, in every encoder k, only its own window of m_k x m_k cells (m_k = grid of
the encoder / L), and one softmax runs over the cells of all encoders. Reference: vision_sampler.py and
cambrian_arch.py. The windows are never folded into a batch of short sequences: keys and values are made once on the
whole grid and only viewed as [L, m, L, m].
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import mesh
from jaxmllm.aggregators.mlp import lay_out
from jaxmllm.batch import FeatureMap, MapShape, Memory, TokenLayout, VisualTokens
from jaxmllm.nn.attention import MASKED
from jaxmllm.nn.maps import need_plain, resize
from jaxmllm.nn.primitives import MLP, Linear, Norm, Table, normal

_HEADS = ("heads", None)


def window_mask(mask: jax.Array, grid: int) -> jax.Array:
    """bool[N, h, w] -> bool[N, L, L, m*m], row-major in the window; a window with no usable key is all usable.

    That rule is the reference's (it avoids a softmax over nothing) and holds per encoder, so an encoder with m = 1 is
    never masked.
    """
    n, m = mask.shape[0], mask.shape[1] // grid
    mask = mesh.reshape(mask, n, grid, m, grid, m).swapaxes(2, 3)
    mask = mesh.reshape(mask, n, grid, grid, m * m)
    return mask | ~mask.any(-1, keepdims=True)


class SVALayer(nn.Module):
    """One layer: queries [N, L, L, Q] attend to their windows in `memory` -> [N, L, L, Q].

    x = W [q ; W c]; a = softmax over all windows; z = LN(x + W_o a V); out = q + W2 gelu(W1 z). The only skip is q
    itself; linear layers have no bias; head scale is 1/sqrt(head width). gate: start as the identity (W2 = 0).
    """

    width: int
    heads: int = 16
    gate: bool = False

    @nn.compact
    def __call__(self, query: jax.Array, memory: Memory) -> jax.Array:
        n, grid, _, q_width = query.shape
        shape = (self.heads, self.width // self.heads)
        dtype = query.dtype
        context = Linear((self.width,), use_bias=False, name="proj_context")(memory.context.astype(dtype))
        context = jnp.broadcast_to(context[:, None, None], (n, grid, grid, self.width))
        x = jnp.concatenate([query, mesh.shard(context, "batch", None, None, None)], -1)
        x = Linear((self.width,), use_bias=False, name="proj_in")(x)
        q = Linear(shape, ("embed",), _HEADS, use_bias=False, name="q_proj")(Norm(name="q_norm")(x))

        scores, values = [], []
        for k, (features, mask) in enumerate(zip(memory.features, memory.masks)):
            f, m = features.astype(dtype), features.shape[1] // grid
            if m > 1:
                place = Table((m, m, self.width), normal(1.0), name=f"pos_embed_{k}")().astype(dtype)
                f = f + jnp.tile(place, (grid, grid, 1))
            keys = Linear(shape, ("embed",), _HEADS, use_bias=False, name=f"k_proj_{k}")(Norm(name=f"k_norm_{k}")(f))
            vals = Linear(shape, ("embed",), _HEADS, use_bias=False, name=f"v_proj_{k}")(Norm(name=f"v_norm_{k}")(f))
            keys, vals = (self.windows(y, grid, m) for y in (keys, vals))
            s = jnp.einsum("nijhd,niajbhd->nijhab", q, keys, preferred_element_type=jnp.float32)
            s = mesh.reshape_to(s, (*s.shape[:4], m * m), "batch", None, None, "heads", None)
            scores.append(jnp.where(window_mask(mask, grid)[:, :, :, None], s * shape[1] ** -0.5, MASKED))
            values.append(vals)

        weights = jax.nn.softmax(jnp.concatenate(scores, -1), -1).astype(dtype)
        y, start = 0.0, 0
        for vals in values:
            m = vals.shape[2]
            w = weights[..., start : start + m * m]
            w = mesh.reshape_to(w, (*w.shape[:4], m, m), "batch", None, None, "heads", None, None)
            y = y + jnp.einsum("nijhab,niajbhd->nijhd", w, vals)
            start += m * m
        y = Linear((self.width,), _HEADS, ("embed",), use_bias=False, name="o_proj")(y)
        z = Norm(name="norm")(x + y)
        z = jax.nn.gelu(Linear((self.width,), out_axes=("mlp",), use_bias=False, name="linear_1")(z), approximate=False)
        init = nn.initializers.zeros if self.gate else None
        return query + Linear((q_width,), ("mlp",), ("embed",), use_bias=False, kernel_init=init, name="linear_2")(z)

    @staticmethod
    def windows(y: jax.Array, grid: int, m: int) -> jax.Array:
        """[N, h, w, heads, d] -> [N, L, m, L, m, heads, d], heads still split over their mesh axis."""
        n, _, _, heads, d = y.shape
        return mesh.reshape_to(y, (n, grid, m, grid, m, heads, d), "batch", None, None, None, None, "heads", None)


class SVA(nn.Module):
    """Maps of all encoders -> tokens [N, L*(L+1), H] and the memory for SVA layers inside the language model.

    Each encoder has its own projector (Linear-GELU-Linear-LayerNorm to `width`). One learned query vector per group,
    the same for all cells, goes through `depth` layers; groups (one grid side each, resized to L if different) are
    concatenated on channels and projected to H. The context is the mean of the first encoder's projected map, padding
    included. An encoder's grid must be a multiple of L.
    """

    width: int  # C, the vision width
    llm_width: int  # H
    grid: int  # L
    depth: int = 3
    heads: int = 16
    groups: tuple[int, ...] | None = None  # grid side of each query group; default: one group of side L
    newline: bool = True
    gate: bool = False  # of the connector's layers; those inside the language model have their own

    @nn.nowrap
    def layout(self, maps: dict[str, MapShape]) -> TokenLayout:
        """Order of the tokens. Raises ValueError if these maps cannot be aggregated."""
        need_plain("SVA", maps.values())
        if self.width % self.heads:
            raise ValueError(f"SVA: width {self.width} must be a multiple of its {self.heads} heads")
        for name, x in maps.items():
            for side in self.sides:
                if x.h != x.w or x.h % side:
                    raise ValueError(
                        f"SVA: grid {x.h} x {x.w} of encoder {name!r} must be square and a multiple of {side}"
                    )
        windows = all(x.h % self.grid == 0 for x in maps.values())
        return TokenLayout(self.llm_width, self.grid, self.newline, unpad=True, memory=windows)

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of the grid of every query group."""
        return self.groups or (self.grid,)

    @nn.compact
    def __call__(self, maps: dict[str, FeatureMap], masks: dict[str, jax.Array]) -> VisualTokens:
        features = []
        for name, x in maps.items():
            x = MLP(self.width, self.width, name=f"projector_{name}")(x.cells)
            features.append(Norm(name=f"projector_norm_{name}")(x))
        context = features[0].mean((1, 2))
        memory = Memory(tuple(features), tuple(masks[name] for name in maps), context)
        queries = Table((len(self.sides), self.width), normal(self.width**-0.5), name="query")()
        outputs = []
        for g, side in enumerate(self.sides):
            x = mesh.repeat_rows(queries[g].astype(context.dtype), context.shape[0], side, side)
            for layer in range(self.depth):
                x = SVALayer(self.width, self.heads, self.gate, name=f"group_{g}_layer_{layer}")(x, memory)
            outputs.append(resize(x, self.grid, self.grid))
        x = MLP(self.llm_width, self.llm_width, name="projector")(jnp.concatenate(outputs, -1))
        return VisualTokens(lay_out(x, self.newline), memory)
