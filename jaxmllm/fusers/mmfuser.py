"""MMFuser (Cao et al. 2024, arXiv 2410.11829): the deep map attends to the shallow ones by deformable attention.

    A   = MSDA(q = LN(Q), v = LN(X))      Q is the last tap, X are the others (levels), with one LN for all of X
    A2  = MSDA(q = LN(A), v = LN(A))      self-attention
    out = Q + scale_outer * (A + scale_inner * A2)

Both scales start at zero, so a fresh fuser is exactly the single-tap baseline, and at first only scale_outer has a
gradient. Reference: ms_cross_attn.py, class MSCrossAttnBlock. Its gamma1 and gamma2 are called scale_outer and
scale_inner here, because transformers renames keys that contain "gamma".
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm import mesh, sharded
from jaxmllm.batch import FeatureMap, MapShape
from jaxmllm.fields import Positive
from jaxmllm.fusers.level_attention import GlobalAttention, LinearAttention
from jaxmllm.nn.maps import FlatMaps, group_by_size, sizes
from jaxmllm.nn.primitives import LearnedArray, Linear, Norm, zeros
from jaxmllm.nn.sampling.choose import sample


class MMFuser(nn.Module):
    """taps [taps, N, h, w, C] -> the map [N, h, w, C]; in a list of taps each may have its own grid.

    query: index of the tap that gives the queries and the residual. levels: the query attends to the first `levels`
    taps; None: to all but itself. (The reference always takes the first four: of more taps it ignores the rest, and of
    exactly four the query is one.) attention: "deformable", or from the paper's table 7, for which no code is
    published, "global" (softmax over all cells of all levels) or "linear" (over `pooled` x `pooled` means of each
    level). points: number per head and level, in deformable attention only.
    """

    heads: Positive = 16
    points: Positive = 4
    eps: float = 1e-6
    query: int = -1
    levels: Positive | None = None
    attention: str = "deformable"
    pooled: Positive = 7

    @nn.nowrap
    def output(self, taps: tuple[MapShape, ...]) -> MapShape:
        """Size of the map. Raises ValueError if these taps cannot be fused."""
        count = len(taps)
        if not -count <= self.query < count:
            raise ValueError(f"MMFuser: there is no tap {self.query} among {count} for the query")
        if not 0 < (count - 1 if self.levels is None else self.levels) <= count:
            raise ValueError(f"MMFuser: {count} taps cannot give a query and {self.levels or 'at least one'} levels")
        query = taps[self.query]
        if {x.c for x in self.keys(taps)} != {query.c} or query.c % self.heads:
            raise ValueError(f"MMFuser needs taps of one width that its {self.heads} heads divide, not {sizes(taps)}")
        if self.attention not in ("deformable", "global", "linear"):
            raise ValueError(f"MMFuser: attention must be deformable, global or linear, not {self.attention!r}")
        return query

    @nn.nowrap
    def keys(self, taps) -> list:
        """The taps that the query attends to."""
        query = self.query % len(taps)
        return [x for i, x in enumerate(taps) if (i != query if self.levels is None else i < self.levels)]

    @nn.nowrap
    def new_attention(self, name: str) -> nn.Module:
        """An attention module: query [N, Q, C], reference [Q, 2], levels grouped by size -> [N, Q, C]."""
        if self.attention == "global":
            return GlobalAttention(self.heads, name=name)
        if self.attention == "linear":
            return LinearAttention(self.heads, self.pooled, name=name)
        return DeformableAttention(self.heads, self.points, name=name)

    def __call__(self, taps: jax.Array) -> FeatureMap:
        return FeatureMap(self.attend(taps)[0])

    @nn.compact
    def attend(self, taps: jax.Array | list[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns (out [N, h, w, C], A [N, h*w, C], A2 [N, h*w, C]) of the formula above."""
        query = FlatMaps.of(taps[self.query][None])
        centers = cell_centers(query.h, query.w)
        reference = np.pad(centers, ((0, query.x.shape[2] - len(centers)), (0, 0)))
        norm = Norm(eps=self.eps, name="feat_norm")
        levels = [group.each_cell(norm) for group in group_by_size(taps, self.keys(range(len(taps))))]
        q = Norm(eps=self.eps, name="query_norm")(query.x[0])
        a = self.new_attention("cross_attn")(q, reference, levels)
        a1 = Norm(eps=self.eps, name="norm1")(a)
        a2 = self.new_attention("self_attn")(a1, reference, [query.replace(x=a1[None])])
        outer = LearnedArray(zeros, name="scale_outer")(a.shape[-1:]).astype(a.dtype)
        inner = LearnedArray(zeros, name="scale_inner")(a.shape[-1:]).astype(a.dtype)
        out = query.replace(x=query.x + outer * (a + inner * a2)).maps[0]
        return out, a[:, : len(centers)], a2[:, : len(centers)]


def cell_centers(h: int, w: int) -> np.ndarray:
    """float64[h*w, 2]: (x, y) in 0..1 of the cells of a grid, row by row."""
    y, x = np.meshgrid((np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / w, indexing="ij")
    return np.stack([x, y], -1).reshape(h * w, 2)


def circle_bias(heads: int, levels: int, points: int) -> jax.Array:
    """Initial offsets float32[heads, levels, points, 2].

    Head i looks along the angle 2 pi i / heads, with its points at distances of 1, 2, .. pixels (Zhu et al. 2021,
    Deformable DETR, appendix A.4).
    """
    angle = 2 * math.pi * jnp.arange(heads) / heads
    direction = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    direction = direction / jnp.abs(direction).max(-1, keepdims=True)
    steps = jnp.arange(1, points + 1, dtype=jnp.float32)
    return jnp.broadcast_to(direction[:, None, None] * steps[:, None], (heads, levels, points, 2))


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al. 2021, eq. 3): each query reads `points` places of each level."""

    heads: Positive
    points: Positive = 4

    def __call__(self, query: jax.Array, reference: jax.Array, values: list[FlatMaps]) -> jax.Array:
        """The output of `attend`."""
        return self.attend(query, reference, values)[0]

    @nn.compact
    def attend(self, query: jax.Array, reference: jax.Array, values: list[FlatMaps]):
        """query [N, Q, C]; reference (x, y) in 0..1, [Q, 2] or [N, Q, levels, 2]; values: levels grouped by size.

        Returns (output [N, Q, C], sampling locations float32[N, Q, heads, levels, points, 2] in 0..1, attention weights
        float32[N, Q, heads, levels, points]).
        """
        n, count, c = query.shape
        flat = sharded.reshape_dims(query, 0, 2, n * count)
        mesh.check_split("heads of DeformableAttention", (self.heads,), ("heads",))
        levels = [(v.w, v.h) for v in values for _ in v.x]
        shape = (self.heads, len(levels), self.points)
        xavier = nn.initializers.xavier_uniform()
        value_proj = Linear((c,), out_axes=("heads",), kernel_init=xavier, name="value_proj")

        def of_query(name: str, *shape: int, **options) -> jax.Array:
            """float32[N, Q, *shape], by one matrix: dimensions as small as 2 would waste products and memory."""
            width = math.prod(shape)
            x = Linear((width,), out_axes=("heads",), kernel_init=zeros, name=name, **options)(flat)
            names = ("batch", None, "heads", *[None] * (len(shape) - 1))
            return sharded.reshape_to(x, (n, count, *shape), *names).astype(jnp.float32)

        offsets = of_query("sampling_offsets", *shape, 2, use_bias=False)
        bias = LearnedArray(lambda *_: circle_bias(*shape), name="offset_bias")((*shape, 2))
        offsets = offsets + sharded.shard(bias.astype(jnp.float32), "heads")
        logits = of_query("attention_weights", *shape)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max((-2, -1), keepdims=True)))
        weights = weights / weights.sum((-2, -1), keepdims=True)
        reference = reference[:, None] if reference.ndim == 2 else reference
        sizes = np.array(levels, np.float64)
        # In pixels and not in 0..1, so that fresh offsets, which are whole pixels, are exact to the last bit (see
        # nn/sampling/plain.py, slope).
        center = jnp.asarray(reference * sizes - 0.5, jnp.float32)
        where = center[..., None, :, None, :] + offsets  # [N, Q, heads, levels, points, 2]
        values = [group.each_cell(value_proj).maps for group in values]
        with jax.named_scope("gather"):  # it replaces a gather: a plan counts no FLOPs of the model here
            out = sharded.reshape_dims(self.sample(values, where, weights), 0, 2, n * count)
        out = Linear((c,), ("heads",), ("embed",), kernel_init=xavier, name="output_proj")(out)
        return sharded.reshape_dims(out, 0, 1, n, count), (where + 0.5) / sizes[:, None].astype(np.float32), weights

    def sample(self, values: list[jax.Array], at: jax.Array, weights: jax.Array) -> jax.Array:
        """As nn.sampling.choose.sample."""
        return sample(values, at, weights)
