"""Cambrian-1's Spatial Vision Aggregator (Tong et al. 2024, arXiv 2406.16860, section 3.2).

There is a grid of L x L queries. In each encoder's map, query (i, j) attends only to its own window of m x m cells,
where m = side of the map / L, and one softmax runs over the cells of all encoders. Reference: vision_sampler.py and
cambrian_arch.py. Maps are cut into windows once, not in every layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import mesh, sharded
from jaxmllm.aggregators.mlp import lay_out
from jaxmllm.batch import FeatureMap, MapShape, TokenLayout, VisualMemory, VisualTokens
from jaxmllm.fields import Positive
from jaxmllm.nn import compiler
from jaxmllm.nn.attention.plain import MASKED
from jaxmllm.nn.maps import need_plain, resize
from jaxmllm.nn.primitives import MLP, LearnedArray, Linear, Norm, gelu, normal, torch_uniform
from jaxmllm.nn.stack import scan_layers


def windows(x: jax.Array, grid: int) -> jax.Array:
    """Cuts maps [N, h, w, ...] into L x L windows, L = grid -> [cells, N*L*L, ...], where cells = m*m.

    Slice i holds cell i of all windows, row by row. Queries are multiplied with a slice element by element. With the
    cells in front this is fastest on a TPU, which keeps the last two dimensions in tiles; and products of so few
    dimensions compile fastest.
    """
    n, m, rest = x.shape[0], x.shape[1] // grid, x.shape[3:]
    x = sharded.reshape(x, n, grid, m, grid, m, *rest)
    x = x.transpose(2, 4, 0, 1, 3, *range(5, x.ndim))
    return sharded.reshape_to(x, (m * m, n * grid**2, *rest), None, "batch", *[None] * len(rest))


def window_mask(mask: jax.Array, grid: int) -> jax.Array:
    """bool[N, h, w] -> bool[cells, N*L*L]; a window without any usable cell counts as usable throughout.

    This is the reference's rule, which avoids a softmax over nothing. It applies per encoder, so an encoder with m = 1
    is never masked.
    """
    mask = windows(mask, grid)
    return mask | ~mask.any(0, keepdims=True)


def to_memory(features: Sequence[jax.Array], masks: Sequence[jax.Array], context: jax.Array, grid: int) -> VisualMemory:
    """Cuts projected maps [N, h, w, C] of all encoders and their masks bool[N, h, w] into windows; context [N, C]."""
    cut = tuple(windows(x, grid) for x in features)
    # Apart, because XLA would cut the maps again inside each sum over channels, at 300 times its cycles (v5p).
    return VisualMemory(compiler.compile_apart(cut), tuple(window_mask(x, grid) for x in masks), context)


def attend(
    q: jax.Array, keys: list[jax.Array], values: list[jax.Array], masks: tuple[jax.Array, ...], head_dim: int
) -> jax.Array:
    """q [queries, C]; per encoder, keys and values [cells, queries, C] and masks bool[cells, queries] -> [queries, C].

    A query has too few keys for a matmul of its own. Products are element by element, with channels in the lanes of a
    TPU; a matrix of ones and zeros then sums them over each head's channels, and spreads each head's weight over them.
    """
    head = jnp.repeat(jnp.eye(q.shape[-1] // head_dim, dtype=q.dtype), head_dim, 0)  # [C, heads]
    with jax.named_scope("gather"):  # a plan counts no FLOPs of the model here
        scores = [jnp.dot(k * q, head, preferred_element_type=jnp.float32) for k in keys]
    scores = jnp.concatenate(scores) * head_dim**-0.5
    mask = jnp.concatenate(masks)[..., None]
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), 0).astype(q.dtype)
    y, start = 0.0, 0
    for v in values:
        w = weights[start : start + len(v)]
        with jax.named_scope("gather"):
            w = jnp.dot(w, head.T)
        y = y + (w * v).sum(0)
        start += len(v)
    return y


class SVALayer(nn.Module):
    """One layer: queries [N, L*L, query width], row by row, attend to their windows in `memory` -> the same shape.

    x = W [q ; W_c c]; a = softmax over all windows; z = LN(x + W_o a V); out = q + W2 gelu(W1 z), where c is the
    context. Only q itself is a residual; linear layers have no bias; scores are scaled by 1/sqrt(D). gate: start as the
    identity (W2 = 0). The columns of W for the context are `proj_in_context`, which is applied once per image.
    """

    width: Positive
    heads: Positive = 16
    gate: bool = False

    @nn.compact
    def __call__(self, query: jax.Array, memory: VisualMemory) -> jax.Array:
        (n, count, query_width), dtype = query.shape, query.dtype
        mesh.check_split("heads of SVALayer", (self.heads,), ("heads",))
        context = Linear((self.width,), use_bias=False, name="proj_context")(memory.context.astype(dtype))
        start = torch_uniform(query_width + self.width)  # fan-in of the whole W
        part_of_w = functools.partial(Linear, (self.width,), use_bias=False, kernel_init=start)
        query = sharded.reshape_dims(query, 0, 2, n * count)
        x = sharded.reshape_dims(part_of_w(name="proj_in")(query), 0, 1, n, count)
        x = sharded.reshape_dims(x + part_of_w(name="proj_in_context")(context)[:, None], 0, 2, n * count)

        def project(y: jax.Array, which: str, encoder: str = "") -> jax.Array:
            y = Norm(name=f"{which}_norm{encoder}")(y)
            return Linear((self.width,), out_axes=("heads",), use_bias=False, name=f"{which}_proj{encoder}")(y)

        q, keys, values = project(x, "q"), [], []
        for i, cells in enumerate(memory.windows):
            cells, m = cells.astype(dtype), math.isqrt(len(cells))
            if m > 1:
                positions = LearnedArray(normal(1.0), name=f"pos_embed_{i}")((m, m, self.width)).astype(dtype)
                cells = cells + sharded.reshape(positions, m * m, 1, self.width)
            keys.append(project(cells, "k", f"_{i}"))
            values.append(project(cells, "v", f"_{i}"))
        attend_heads = functools.partial(attend, head_dim=self.width // self.heads)
        y = sharded.per_device(attend_heads, q, keys, values, memory.masks)
        y = Linear((self.width,), ("heads",), ("embed",), use_bias=False, name="o_proj")(y)
        z = Norm(name="norm")(x + y)
        z = gelu(Linear((self.width,), out_axes=("mlp",), use_bias=False, name="linear_1")(z))
        init = nn.initializers.zeros if self.gate else None
        y = Linear((query_width,), ("mlp",), ("embed",), use_bias=False, kernel_init=init, name="linear_2")(z)
        return sharded.reshape_dims(query + y, 0, 1, n, count)


class SVA(nn.Module):
    """Maps of all encoders -> tokens [N, L*(L+1), H] and the memory for SVA layers inside the language model.

    Each encoder has its own projector (Linear-GELU-Linear-LayerNorm to `width`). Each group has one learned query
    vector, the same for all cells, which goes through `depth` layers. Groups have a grid side each and are resized to L
    if it differs, concatenated along channels and projected to H. The context is the mean of the first encoder's
    projected map, padding included. The side of each encoder's map must be a multiple of each group's, and of L for the
    memory.
    """

    width: Positive  # C, the vision width
    grid: Positive  # L
    depth: Positive = 3
    heads: Positive = 16
    groups: tuple[int, ...] | None = None  # grid side of each query group; None: one group of side L
    newline: bool = True
    gate: bool = False  # for these layers; those inside the language model have a field of their own

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
        has_memory = all(x.h % self.grid == 0 for x in maps.values())
        return TokenLayout(self.grid, self.newline, unpad=True, memory=has_memory)

    @property
    def sides(self) -> tuple[int, ...]:
        """Grid side of each query group."""
        return self.groups or (self.grid,)

    @nn.compact
    def __call__(self, maps: dict[str, FeatureMap], masks: dict[str, jax.Array], llm_width: int) -> VisualTokens:
        features = []
        for name, x in maps.items():
            n, h, w, _ = x.cells.shape
            x = MLP(self.width, self.width, name=f"projector_{name}")(sharded.reshape_dims(x.cells, 0, 3, n * h * w))
            features.append(sharded.reshape_dims(Norm(name=f"projector_norm_{name}")(x), 0, 1, n, h, w))
        context = features[0].mean((1, 2))
        cut = functools.cache(functools.partial(to_memory, features, [masks[name] for name in maps], context))
        queries = LearnedArray(normal(self.width**-0.5), name="query")((len(self.sides), self.width))
        outputs = []
        for g, side in enumerate(self.sides):
            x = sharded.repeat_rows(queries[g].astype(context.dtype), context.shape[0], side**2)
            layers = scan_layers(SVALayer(self.width, self.heads, self.gate), self.depth, name=f"group_{g}")
            x, _ = layers(x, cut(side))
            if side != self.grid:
                x = resize(sharded.reshape_dims(x, 1, 1, side, side), self.grid, self.grid)
                x = sharded.reshape_dims(x, 1, 2, self.grid**2)
            outputs.append(x)
        x = sharded.reshape_dims(jnp.concatenate(outputs, -1), 0, 2, n * self.grid**2)
        x = MLP(llm_width, llm_width, name="projector")(x)
        x = sharded.reshape_dims(x, 0, 1, n, self.grid, self.grid)
        has_memory = all(x.shape[1] % self.grid == 0 for x in features)
        return VisualTokens(lay_out(x, self.newline), cut(self.grid) if has_memory else None)
