"""Bilinear samples by two TPU kernels: one image and a few heads at a time, with all their maps on the chip."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from jaxmllm import mesh
from jaxmllm.nn import compiler
from jaxmllm.nn.primitives import pad
from jaxmllm.nn.sampling.plain import hat, slope
from jaxmllm.nn.tpu import CHIPS_16MIB_VMEM, LANES, NN, NT, SUBLANES, TN, dot

PIECE = 512  # the most pixels whose weights are made at once, for LANES queries


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the kernels cut maps: rows of `width` pixels, a multiple of 8, in `pieces` pieces of `rows` rows."""

    heads: int  # worked on at once: their channels fill registers
    width: int
    rows: int
    pieces: int
    queries: int  # of the array; memory after the last one is not read
    interpret: bool | pltpu.InterpretParams = False

    @property
    def piece(self) -> int:
        """The number of pixels of a piece."""
        return self.width * self.rows


def heads_per_block(heads: int, c: int) -> int:
    """The number of heads, of c channels in total, that fill whole registers; all heads if that does not divide."""
    d = c // heads
    count = math.lcm(d, LANES) // d
    return heads if heads % count else count


def piece_shape(h: int, w: int) -> tuple[int, int, int]:
    """(width, rows, pieces) of Blocks for maps up to h x w: equal pieces with little padding."""
    width = -(-w // SUBLANES) * SUBLANES
    rows = math.ceil(h / math.ceil(h * width / PIECE))
    rows += rows * width // SUBLANES % 2  # whole pairs of registers, which are 16 rows of bfloat16
    return width, rows, math.ceil(h / rows)


def vmem_needed(values: list[jax.Array], heads: int) -> int:
    """Bytes that the backward kernel keeps: maps and gradients, each twice so that one can be moved, and float32
    sums."""
    h, w, c = (max(v.shape[i] for v in values) for i in (2, 3, 4))
    channels = c // heads * heads_per_block(heads, c)
    sizes = sum(map(len, values)) * math.prod(piece_shape(h, w)) * -(-channels // LANES) * LANES
    return sizes * (4 * values[0].dtype.itemsize + 4)


def vmem_available() -> int:
    """Bytes that the chips of the mesh have for `vmem_needed`."""
    return 2**20 * (12 if compiler.device_kind() in CHIPS_16MIB_VMEM else 54)


def tpu_sample(values, at, weights, interpret: bool | pltpu.InterpretParams = False) -> jax.Array:
    """choose.sample by the TPU kernels, on each device's own images and heads. interpret: runs on a CPU, slowly."""

    def own(at, weights, *values):
        n, queries, heads, levels, points = weights.shape
        h, w, c = (max(v.shape[i] for v in values) for i in (2, 3, 4))
        blocks = Blocks(heads_per_block(heads, c), *piece_shape(h, w), queries, interpret)
        # Pixels of 0 change nothing, so levels of different sizes are padded to one array.
        rows, width = blocks.rows * blocks.pieces, blocks.width
        fit = lambda v: pad(pad(v, 2, rows - v.shape[2]), 3, width - v.shape[3])
        maps = jnp.concatenate([fit(v) for v in values]).reshape(levels, n, -1, c)
        places = jnp.concatenate([at[..., 0], at[..., 1], weights], -1)  # [N, Q, heads, levels, 3 * points]
        return _sample(blocks, maps, places.transpose(0, 2, 3, 4, 1))

    if not mesh.has_mesh():
        return own(at, weights, *values)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (at, weights, *values))
    return jax.shard_map(own, in_specs=specs, out_specs=P(*specs[0][:3]), check_vma=False)(at, weights, *values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sample(blocks: Blocks, maps: jax.Array, places: jax.Array) -> jax.Array:
    """maps [levels, N, pixels, C], places float32[N, heads, levels, 3 * points, Q] (all x, all y, all weights) ->
    [N, Q, C]."""
    return _call(forward_kernel, blocks, maps, places)[0]


def _backward(blocks, saved, g):
    maps, places = saved
    return tuple(_call(backward_kernel, blocks, maps, places, g.astype(maps.dtype)))


_sample.defvjp(lambda blocks, *saved: (_sample(blocks, *saved), saved), _backward)


def _call(kernel, blocks: Blocks, maps: jax.Array, places: jax.Array, *g: jax.Array) -> list[jax.Array]:
    """Runs a kernel over images, groups of heads, and blocks of queries."""
    levels, n, pixels, c = maps.shape
    heads, points, f32 = places.shape[1], places.shape[3] // 3, jnp.float32
    channels = c // heads * blocks.heads
    all_pixels = pl.BlockSpec((levels, None, pixels, channels), lambda n, m, j: (0, n, 0, m))
    where = pl.BlockSpec((None, blocks.heads, levels, 3 * points, LANES), lambda n, m, j: (n, m, 0, 0, j))
    own = pl.BlockSpec((None, LANES, channels), lambda n, m, j: (n, j, m))
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    by_row = pltpu.VMEM((points, blocks.rows * blocks.pieces, LANES), f32)
    if kernel is forward_kernel:
        outputs, results = [own], [jax.ShapeDtypeStruct((n, blocks.queries, c), maps.dtype)]
        scratch = [by_row, pltpu.VMEM((channels, LANES), f32)]
    else:
        outputs, results = [all_pixels, where], [like(maps), like(places)]
        sums = pltpu.VMEM((points, blocks.width, LANES), f32)
        scratch = [by_row, by_row, sums, sums, pltpu.VMEM((levels, pixels, channels), f32)]
    return pl.pallas_call(
        functools.partial(kernel, blocks),
        grid=(n, heads // blocks.heads, pl.cdiv(blocks.queries, LANES)),
        in_specs=[all_pixels, where, *[own] * len(g)],
        out_specs=outputs,
        out_shape=results,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_available() + 2**22
        ),
        interpret=blocks.interpret,
        name=kernel.__name__.replace("kernel", "sampling"),  # read by plan/kernels.py
    )(maps, places, *g)


def _blank(x: jax.Array, count: jax.Array, axis: int) -> jax.Array:
    """x with 0 after the first `count` entries: memory that nothing was written to may hold NaN."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < count, x, 0)


def _distances(size: int, where: jax.Array) -> jax.Array:
    """where float32[points, Q] -> [points, size, Q]: the distances from 0, 1, .. size - 1."""
    shape = (where.shape[0], size, where.shape[1])
    return where[:, None] - jax.lax.broadcasted_iota(jnp.int32, shape, 1).astype(jnp.float32)


def _matrix(blocks: Blocks, columns: jax.Array, by_row, piece: jax.Array) -> jax.Array:
    """One piece of the matrix, float32[pixels, Q], from the weights of columns and, in `by_row`, of rows."""
    rows = []
    for r in range(blocks.rows):
        at = pl.ds(piece * blocks.rows + r, 1)
        rows.append(sum(column * by_row[k, at, :] for k, column in enumerate(columns)))
    return jnp.concatenate(rows, 0)


def forward_kernel(blocks, maps_ref, places_ref, out_ref, by_row, total):
    total[...] = jnp.zeros_like(total)
    d, count = total.shape[0] // blocks.heads, blocks.queries - pl.program_id(2) * LANES

    def level(i, _, head):
        x, y, weight = jnp.split(_blank(places_ref[head, i], count, 1), 3)
        by_row[...] = hat(_distances(by_row.shape[1], y))
        columns, own = hat(_distances(blocks.width, x)) * weight[:, None], slice(head * d, (head + 1) * d)

        def piece(part, _):
            pixels = pl.ds(pl.multiple_of(part * blocks.piece, SUBLANES), blocks.piece)
            matrix = _matrix(blocks, columns, by_row, part).astype(maps_ref.dtype)
            total[own, :] += dot(maps_ref[i, pixels, own], matrix, TN)

        jax.lax.fori_loop(0, blocks.pieces, piece, None)

    for head in range(blocks.heads):
        jax.lax.fori_loop(0, maps_ref.shape[0], functools.partial(level, head=head), None)
    out_ref[...] = total[...].T.astype(out_ref.dtype)


def backward_kernel(blocks, maps_ref, places_ref, g_ref, d_maps_ref, d_places_ref, *scratch):
    by_row, slope_by_row, sums, slope_sums, d_maps = scratch
    d, points = g_ref.shape[1] // blocks.heads, by_row.shape[0]
    count = blocks.queries - pl.program_id(2) * LANES
    g = _blank(g_ref[...], count, 0)

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_maps[...] = jnp.zeros_like(d_maps)

    def level(i, _, head):
        x, y, weight = jnp.split(_blank(places_ref[head, i], count, 1), 3)
        down, across = _distances(by_row.shape[1], y), _distances(blocks.width, x)
        by_row[...], slope_by_row[...] = hat(down), slope(down)
        columns, own = hat(across) * weight[:, None], slice(head * d, (head + 1) * d)
        sums[...], slope_sums[...] = jnp.zeros_like(sums), jnp.zeros_like(slope_sums)

        def piece(part, _):
            pixels = pl.ds(pl.multiple_of(part * blocks.piece, SUBLANES), blocks.piece)
            matrix = _matrix(blocks, columns, by_row, part).astype(g.dtype)
            d_maps[i, pixels, own] += dot(matrix, g[:, own], NN)
            d_matrix = dot(maps_ref[i, pixels, own], g[:, own], NT)
            for k in range(points):
                total, slope_total = sums[k], slope_sums[k]
                for r in range(blocks.rows):
                    row, at = d_matrix[r * blocks.width : (r + 1) * blocks.width], pl.ds(part * blocks.rows + r, 1)
                    total += row * by_row[k, at, :]
                    slope_total += row * slope_by_row[k, at, :]
                sums[k], slope_sums[k] = total, slope_total

        jax.lax.fori_loop(0, blocks.pieces, piece, None)
        by_x, by_y = slope(across) * sums[...], hat(across) * slope_sums[...]
        sides = weight * by_x.sum(1), weight * by_y.sum(1), (hat(across) * sums[...]).sum(1)
        d_places_ref[head, i] = jnp.concatenate(sides)

    for head in range(blocks.heads):
        jax.lax.fori_loop(0, maps_ref.shape[0], functools.partial(level, head=head), None)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        d_maps_ref[...] = d_maps[...].astype(d_maps_ref.dtype)
