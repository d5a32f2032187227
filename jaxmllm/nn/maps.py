"""Feature maps [N, h, w, C]: resizing, pooling, and what maps must have in common to be joined."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import flax.struct
import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.batch import MapShape
from jaxmllm.nn import compiler
from jaxmllm.nn.primitives import pad


def resize(x: jax.Array, h: int, w: int, method: str = "bilinear") -> jax.Array:
    """[N, h', w', C] -> [N, h, w, C]: half-pixel centres, no antialias, in float32 (torch's F.interpolate)."""
    if x.shape[1:3] == (h, w):
        return x
    shape = (x.shape[0], h, w, x.shape[-1])
    return jax.image.resize(x.astype(jnp.float32), shape, method, antialias=False).astype(x.dtype)


def cells(x: jax.Array, side: int) -> jax.Array:
    """[N, h, w, C] -> [N, h/side, w/side, side, side, C]: squares of cells; incomplete squares are dropped."""
    n, h, w, c = x.shape
    h, w = h // side, w // side
    return sharded.reshape(x[:, : h * side, : w * side], n, h, side, w, side, c).swapaxes(2, 3)


def patches(x: jax.Array, side: int) -> jax.Array:
    """[N, h, w, C] -> [N, h/side * w/side, side*side*C]: the inputs of a convolution whose stride is its size.

    Joined with the product that follows, it would be a convolution in six dimensions, which takes the TPU compiler
    minutes.
    """
    x = cells(x, side)
    return compiler.compile_apart(sharded.reshape(x, x.shape[0], x.shape[1] * x.shape[2], side**2 * x.shape[-1]))


@flax.struct.dataclass
class FlatMaps:
    """Maps of one size as [count, N, cells, C], where cells is h * w, on a TPU padded with zeros to whole tiles.

    With images and cells merged into one dimension, the TPU compiler takes two thirds of the time (v6e, 1369 cells).
    """

    x: jax.Array
    h: int = flax.struct.field(pytree_node=False)
    w: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, maps: jax.Array) -> FlatMaps:
        """From maps [count, N, h, w, C]."""
        h, w = maps.shape[2:4]
        return cls(pad(sharded.reshape_dims(maps, 2, 2, h * w), 2, -h * w % compiler.tile_rows()), h, w)

    def each_cell(self, f: Callable[[jax.Array], jax.Array]) -> FlatMaps:
        """f applied to the cells [count, N * cells, C], in the same places."""
        n, cells = self.x.shape[1:3]
        return self.replace(x=sharded.reshape_dims(f(sharded.reshape_dims(self.x, 1, 2, n * cells)), 1, 1, n, cells))

    @property
    def cells(self) -> jax.Array:
        """[count, N, h*w, C], without padding."""
        return self.x[:, :, : self.h * self.w]

    @property
    def maps(self) -> jax.Array:
        """[count, N, h, w, C]."""
        return sharded.reshape_dims(self.cells, 2, 1, self.h, self.w)


def group_by_size(maps: jax.Array | list[jax.Array], which: list[int]) -> list[FlatMaps]:
    """The maps [N, h, w, C] at the places `which`; neighbours of one size are joined and worked on at once."""
    if isinstance(maps, jax.Array) and which == list(range(which[0], which[-1] + 1)):
        return [FlatMaps.of(maps[which[0] : which[-1] + 1])]
    runs = itertools.groupby((maps[i] for i in which), lambda x: x.shape)
    return [FlatMaps.of(jnp.stack(list(run))) for _, run in runs]


def mean(maps: Iterable[jax.Array]) -> jax.Array:
    """The mean of maps of one size, taken in float32 and returned in their dtype."""
    maps = list(maps)
    return (sum(m.astype(jnp.float32) for m in maps) / len(maps)).astype(maps[0].dtype)


def adaptive_pool(x: jax.Array, h: int, w: int) -> jax.Array:
    """[N, h', w', C] -> [N, h, w, C]: means over bins floor(i h'/h) .. ceil((i+1) h'/h) (torch's AdaptiveAvgPool2d)."""
    rows, columns = _bins(x.shape[1], h), _bins(x.shape[2], w)
    return jnp.einsum("ai,bj,nijc->nabc", rows, columns, x.astype(jnp.float32)).astype(x.dtype)


def _bins(size: int, bins: int) -> jax.Array:
    """float32[bins, size]: row i has the weights of bin i."""
    i, at = jnp.arange(bins)[:, None], jnp.arange(size)
    inside = (at >= i * size // bins) & (at < -(-(i + 1) * size // bins))
    return inside / inside.sum(1, keepdims=True)


def sizes(shapes: Iterable[MapShape], channels: bool = True) -> str:
    """For messages: "6 x 6 x 32, 3 x 3 x 64"."""
    return ", ".join(f"{s.h} x {s.w}" + f" x {s.c}" * channels for s in shapes)


def need_same(who: str, shapes: Iterable[MapShape], channels: bool = True) -> None:
    """Raises ValueError unless all maps have one grid (and, if `channels`, one width)."""
    shapes = list(shapes)
    if len({s[: 2 + channels] for s in shapes}) > 1:
        what = "size" if channels else "grid"
        raise ValueError(f"{who} needs maps of one {what}, not {sizes(shapes, channels)}")


def need_plain(who: str, shapes: Iterable[MapShape]) -> None:
    """Raises ValueError if a map has tokens besides its grid."""
    if any(s.extra for s in shapes):
        raise ValueError(f"{who} reads grids only, but a fuser gives tokens besides its grid (STI); use a projector")
