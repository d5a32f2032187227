"""MMFuser (Cao et al. 2024, arXiv 2410.11829): the deep map asks the shallow ones, by deformable attention.

    A   = MSDA(q = LN(Q), v = LN(X))      Q the last tap, X the taps before it, one shared LN for X
    A2  = MSDA(q = LN(A), v = LN(A))      the map with itself
    out = Q + scale_outer * (A + scale_inner * A2)

Both scales start at zero, so a fresh fuser is exactly the single-tap baseline and wakes in stages: first only
scale_outer has a gradient. Reference: ms_cross_attn.py, class MSCrossAttnBlock (its gamma1 is scale_outer, gamma2
scale_inner; those names are changed because transformers renames keys that contain "gamma").
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import mesh
from jaxmllm.nn.primitives import Linear, Norm, Table, zeros


class MMFuser(nn.Module):
    """taps [K, N, h, w, C] -> [N, h, w, C]. The last tap is query and residual, the others are keys' levels."""

    heads: int = 16
    points: int = 4
    eps: float = 1e-6

    def __call__(self, taps: jax.Array) -> jax.Array:
        return self.attend(taps)[0]

    @nn.compact
    def attend(self, taps: jax.Array | list[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(out [N, h, w, C], A [N, h*w, C], A2 [N, h*w, C]); in a list the levels may have grids of their own."""
        if len(taps) < 2:
            raise ValueError("MMFuser needs at least two taps: the last is the query, the others are asked")
        query = taps[-1]
        n, h, w, c = query.shape
        cross, self_attn = (
            DeformableAttention(self.heads, self.points, name=name) for name in ("cross_attn", "self_attn")
        )
        reference = cell_centers(h, w)
        norm = Norm(eps=self.eps, name="feat_norm")
        levels = [norm(level) for level in taps[:-1]]
        q = mesh.reshape(Norm(eps=self.eps, name="query_norm")(query), n, h * w, c)
        a = cross(q, reference, levels)
        a1 = Norm(eps=self.eps, name="norm1")(a)
        a2 = self_attn(a1, reference, [mesh.reshape(a1, n, h, w, c)])
        outer = Table((c,), zeros, name="scale_outer")().astype(query.dtype)
        inner = Table((c,), zeros, name="scale_inner")().astype(query.dtype)
        return query + mesh.reshape(outer * (a + inner * a2), n, h, w, c), a, a2


def cell_centers(h: int, w: int) -> jax.Array:
    """float32[h*w, 2]: (x, y) of the cells of a grid, row-major, in 0..1."""
    y, x = jnp.meshgrid((jnp.arange(h) + 0.5) / h, (jnp.arange(w) + 0.5) / w, indexing="ij")
    return jnp.stack([x, y], -1).reshape(h * w, 2)


def circle_bias(heads: int, levels: int, points: int) -> jax.Array:
    """Initial offsets float32[heads, levels, points, 2]: head m looks along angle 2 pi m / heads, point k at
    distance k+1 pixels (Zhu et al. 2021, Deformable DETR, appendix A.4)."""
    angle = 2 * math.pi * jnp.arange(heads) / heads
    direction = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    direction = direction / jnp.abs(direction).max(-1, keepdims=True)
    steps = jnp.arange(1, points + 1, dtype=jnp.float32)
    return jnp.broadcast_to(direction[:, None, None] * steps[:, None], (heads, levels, points, 2))


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al. 2021, eq. 3): each query reads `points` places of each level.

    Bilinear sampling is written with hat functions: pixel j has weight max(0, 1 - |x - j|), and pixels outside the
    map do not exist, which is exactly zero padding. So sampling is two small products and one matmul, with no gather
    or scatter in either direction.
    """

    heads: int
    points: int = 4

    def __call__(self, query: jax.Array, reference: jax.Array, values: list[jax.Array]) -> jax.Array:
        """As `attend`, the output alone."""
        return self.attend(query, reference, values)[0]

    @nn.compact
    def attend(self, query: jax.Array, reference: jax.Array, values: list[jax.Array]):
        """query [N, Q, C]; reference (x, y) in 0..1, [Q, 2] or [N, Q, levels, 2]; values: levels [N, h, w, C].

        Returns (output [N, Q, C], sampling locations float32[N, Q, head, level, point, 2] in 0..1, attention weights
        float32[N, Q, head, level, point]). The sampling core runs in float32.
        """
        c, shape = query.shape[-1], (self.heads, len(values), self.points)
        xavier = nn.initializers.xavier_uniform()
        axes = ("heads", None, None, None)
        project = Linear((*shape, 2), ("embed",), axes, kernel_init=zeros, use_bias=False, name="sampling_offsets")
        offsets = project(query)
        bias = Table((*shape, 2), lambda *_: circle_bias(*shape), name="offset_bias")()
        offsets = offsets.astype(jnp.float32) + mesh.shard(bias.astype(jnp.float32), "heads")
        logits = Linear(shape, ("embed",), ("heads", None, None), kernel_init=zeros, name="attention_weights")(query)
        flat = logits.astype(jnp.float32)
        weights = jnp.exp(flat - jax.lax.stop_gradient(flat.max((-2, -1), keepdims=True)))
        weights = weights / weights.sum((-2, -1), keepdims=True)
        if reference.ndim == 2:
            reference = jnp.broadcast_to(reference[:, None], (reference.shape[0], len(values), 2))
        value_proj = Linear(
            (self.heads, c // self.heads), ("embed",), ("heads", None), kernel_init=xavier, name="value_proj"
        )
        sizes = jnp.array([[v.shape[2], v.shape[1]] for v in values], jnp.float32)
        where = reference[..., None, :, None, :] + offsets / sizes[:, None]  # [N, Q, head, level, point, 2]
        out = 0.0
        for level, value in enumerate(values):
            v = value_proj(value).astype(jnp.float32)
            at = where[..., level, :, :] * sizes[level] - 0.5  # pixel coordinates
            hat_x = hat(at[..., 0], v.shape[2])
            hat_y = hat(at[..., 1], v.shape[1]) * weights[..., level, :, None]
            with jax.named_scope("gather"):  # these matmuls stand for a gather: no FLOPs that the model needs
                pick = jnp.einsum("nqmpi,nqmpj->nmqij", hat_y, hat_x)
                out = out + jnp.einsum("nmqij,nijmd->nqmd", pick, v)
        proj = Linear((c,), ("heads", None), ("embed",), kernel_init=xavier, name="output_proj")
        return proj(out.astype(query.dtype)), where, weights


def hat(x: jax.Array, size: int) -> jax.Array:
    """[...] -> [..., size]: linear-interpolation weight of every pixel of a line for the coordinate x."""
    return jax.nn.relu(1 - jnp.abs(x[..., None] - jnp.arange(size, dtype=jnp.float32)))
