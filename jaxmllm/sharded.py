"""Array operations that keep arrays split over the mesh: resharding, reshaping, gathering.

Mesh axes are Explicit, so an operation whose result could be split in several ways must be told which. Without a mesh
each function is the plain operation.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxmllm.mesh import MIN_FSDP_SIZE, RULES, check_split, has_mesh, spec, split_count


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Reshards x so that its dimensions are split as their logical names (mesh.RULES) say."""
    return jax.sharding.reshard(x, spec(*names)) if has_mesh() else x


def shard_rows(x: jax.Array) -> jax.Array:
    """Reshards x so that its first dimension is split as rows of a batch and the others are whole."""
    return shard(x, "batch", *[None] * (x.ndim - 1))


def reshard_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Reshards x the way `other` is split."""
    return jax.sharding.reshard(x, spec_of(other)) if has_mesh() else x


def spec_of(x: jax.Array) -> P | None:
    """The PartitionSpec of x; None without a mesh."""
    return jax.typeof(x).sharding.spec if has_mesh() else None


def shard_param(x: jax.Array, names: tuple[str | None, ...], path: str) -> jax.Array:
    """Shards a new weight by its logical names. Small weights are replicated over fsdp. Raises like mesh.check_split.

    A weight [mlp, embed] or [vocab, embed] is split over fsdp along its first dimension if that divides. TPU memory is
    tiled 128 wide along the last dimension: 64 chips would each keep 64 of a width of 4096, padded to 128, and the
    all-gather would have to copy them.
    """
    if not has_mesh():
        return x
    names = tuple(None if name == "embed" and x.size < MIN_FSDP_SIZE else name for name in names)
    if x.ndim == 2 and (both := "{}, {}".format(*names)) in RULES:
        sizes = jax.sharding.get_abstract_mesh().shape
        if x.shape[0] % math.prod(sizes[axis] for axis in RULES[both]) == 0:
            names = (both, None)
    check_split(path, x.shape, names)
    return shard(x, *names)


def gather_param(w: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """The weight as a layer uses it: whole over fsdp (this is the FSDP all-gather), still split over tensor."""
    return shard(w, *(None if name == "embed" else name for name in names))


def spec_like(x: jax.Array, lead: int, names: tuple[str | None, ...]) -> P | None:
    """PartitionSpec of a result whose first `lead` dimensions are split like those of x, the others by their names."""
    if not has_mesh():
        return None
    return P(*jax.typeof(x).sharding.spec[:lead], *spec(*(None if n == "embed" else n for n in names)))


def reshape(x: jax.Array, *shape: int) -> jax.Array:
    """Reshapes an array that is split along its first dimension at most, and keeps that split.

    The result's first dimension may be several dimensions of x merged.
    """
    if not has_mesh():
        return x.reshape(shape)
    lead = jax.typeof(x).sharding.spec[0] if x.ndim else None
    return jax.lax.reshape(x, shape, out_sharding=P(lead, *[None] * (len(shape) - 1)))


def reshape_to(x: jax.Array, shape: tuple[int, ...], *names: str | None) -> jax.Array:
    """Reshapes x; the result is split as its logical names say, which must leave each device its own elements."""
    return jax.lax.reshape(x, shape, out_sharding=spec(*names)) if has_mesh() else x.reshape(shape)


def reshape_dims(x: jax.Array, at: int, count: int, *sizes: int) -> jax.Array:
    """Replaces the `count` dimensions from `at` on by dimensions of other sizes.

    Of the replaced dimensions only the first may be split. The first new dimension keeps that split.
    """
    shape = (*x.shape[:at], *sizes, *x.shape[at + count :])
    if not has_mesh():
        return x.reshape(shape)
    split = jax.typeof(x).sharding.spec
    return jax.lax.reshape(x, shape, out_sharding=P(*split[: at + 1], *[None] * (len(sizes) - 1), *split[at + count :]))


def split_by_device(x: jax.Array) -> jax.Array:
    """[V, H] -> [parts, V / parts, H]: the rows that different devices hold are told apart."""
    if not has_mesh():
        return x[None]
    first, last = jax.typeof(x).sharding.spec
    count = split_count(x, 0)
    return jax.lax.reshape(x, (count, x.shape[0] // count, x.shape[1]), out_sharding=P(first, None, last))


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...]. Part i has rows i, i + parts, ..: every device keeps its own rows."""
    return reshape(x, x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def repeat_rows(x: jax.Array, *lead: int) -> jax.Array:
    """x [...] -> [*lead, ...]: puts a learned array into every row. lead[0] counts rows of the batch.

    The broadcast itself is split. Resharding a finished broadcast would gather the gradients of all rows instead of
    adding them up on their own devices.
    """
    names = spec("batch", *[None] * (len(lead) + x.ndim - 1)) if has_mesh() else None
    return jax.lax.broadcast(x, lead, out_sharding=names)


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, S, C], index int32[B, M] -> [B, M, C]: gathers within each batch row, never across rows or devices.

    Indices must lie in 0..S-1.
    """
    return jax.vmap(lambda row, i: row[i])(shard_rows(x), shard_rows(index))


def einsum(formula: str, a: jax.Array, b: jax.Array, *names: str | None, dtype=None) -> jax.Array:
    """jnp.einsum of two arrays whose contracted dimensions may be split. `names`: logical names of the result."""
    out = spec(*names) if has_mesh() else None
    return jnp.einsum(formula, a, b, preferred_element_type=dtype, out_sharding=out)


def per_device(f, x, *others):
    """f(x, *others) on each device's part of the arrays; the result is split like x.

    For what XLA splits wrongly, and for what needs the sizes that one device has.
    """
    if not has_mesh():
        return f(x, *others)
    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, (x, *others))
    return jax.shard_map(f, in_specs=specs, out_specs=specs[0])(x, *others)


def per_whole(f, x):
    """f on a stack x [L, ...] whose elements x[i] must be whole; f takes and returns some of them, [n, ...].

    The elements are dealt out to the devices between which x is split (not along its first dimension), so each device
    holds and works on about L / devices of them, at least one. The result is split like x.
    """
    if not has_mesh():
        return f(x)
    sizes = jax.sharding.get_abstract_mesh().shape
    held = [[entry] if isinstance(entry, str) else list(entry or ()) for entry in jax.typeof(x).sharding.spec]
    route = [P(*map(tuple, held))]  # one axis at a time: XLA makes an all-to-all of each step, but gathers x for all
    for axes in held[1:]:
        while axes:
            held[0].append(axes.pop())
            route.append(P(*map(tuple, held)))
    more = -x.shape[0] % math.prod(sizes[axis] for axis in held[0])
    y = jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)) if more else x
    for step in route[1:]:
        y = jax.sharding.reshard(y, step)
    y = jax.shard_map(f, in_specs=route[-1], out_specs=route[-1])(y)
    for step in reversed(route[:-1]):
        y = jax.sharding.reshard(y, step)
    return y[: x.shape[0]]
