"""Device mesh and sharding rules. Nothing else in the package names a mesh axis.

The mesh always has all five axes; on a laptop each has size 1, so there is one code path from laptop to pod:

    slice    copies of the whole mesh joined by the data-centre network; gradients are averaged over it
    data     copies of the parameters inside a slice
    fsdp     the batch and every large weight are split over it; weights are gathered just before use
    tensor   heads, MLP channels and vocabulary are split over it
    context  the sequence of a row is split over it

Axes are Explicit: the sharding of every array is part of its type, and a wrong one is an error while tracing.
"""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

AXES = ("slice", "data", "fsdp", "tensor", "context")

# Logical name of an array dimension -> mesh axes that split it. Names that are not here are never split.
RULES = {
    "batch": ("slice", "data", "fsdp"),
    "length": ("context",),
    "embed": ("fsdp",),  # model width of a weight; activations keep it whole
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    # Stored weights whose last dimension is the model width are split like this instead (sharded.shard_param).
    "mlp, embed": ("tensor", "fsdp"),
    "vocab, embed": ("tensor", "fsdp"),
}

# Weights smaller than this many elements are replicated over fsdp: gathering them costs more than holding them.
MIN_FSDP_SIZE = 2**16


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh axes. One of them may be -1: all devices that are left."""

    slice: int = 1
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """The five sizes for `num_devices` devices. Raises ValueError if they cannot multiply to that number."""
        sizes = [getattr(self, axis) for axis in AXES]
        for axis, size in zip(AXES, sizes):
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis} is {size}; it must be a number of devices, or -1 for all that are left")
        known = math.prod(s for s in sizes if s != -1)
        if sizes.count(-1) > 1 or num_devices % known or (-1 not in sizes and known != num_devices):
            shape = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
            raise ValueError(f"mesh {shape} does not fit {num_devices} devices; set one axis to -1 or change a size")
        return tuple(num_devices // known if s == -1 else s for s in sizes)

    def build(self, devices=None) -> jax.sharding.Mesh:
        """The mesh over `devices`: real ones (default: all devices of all processes) or those of a topology.

        Devices that only the data-centre network joins (their slice_index differs) lie along the first axis. Raises
        ValueError unless that axis has the size of the number of slices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = self.sizes(len(devices))
        slices = len({getattr(d, "slice_index", 0) for d in devices})
        if slices == 1:
            array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        elif slices == sizes[0]:
            inner = (1, *sizes[1:])
            array = mesh_utils.create_hybrid_device_mesh(
                inner, (slices, 1, 1, 1, 1), devices, allow_split_physical_axes=True
            )
        else:
            raise ValueError(f"mesh.slice is {sizes[0]}, but the devices are {slices} slices; set mesh.slice={slices}")
        return jax.sharding.Mesh(array, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def spec(*names: str | None) -> P:
    """The PartitionSpec of dimensions with these logical names, e.g. spec("batch", "length", None)."""
    return P(*(RULES.get(name) if name else None for name in names))


def has_mesh() -> bool:
    """Whether a mesh is set. Without one (a notebook, a unit test) every sharding is a no-op."""
    return not jax.sharding.get_abstract_mesh().empty


def split_count(x: jax.Array, dimension: int) -> int:
    """The number of parts into which the mesh splits a dimension of x."""
    axes = jax.typeof(x).sharding.spec[dimension] or ()
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def check_split(what: str, shape: tuple[int, ...], names: tuple[str | None, ...]) -> None:
    """Raises ValueError, naming the tensor, its shape and the axis, if a dimension does not divide over the mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    for i, name in enumerate(names if has_mesh() else ()):
        axes = RULES.get(name, ())
        parts = math.prod(sizes[a] for a in axes)
        if shape[i] % parts:
            pad = f", or pad the table with model.llm.table_multiple={parts}" if name == "vocab" else ""
            raise ValueError(
                f"{what} {shape}: dimension {i} ({name}, {shape[i]}) does not divide over mesh axis "
                f"{' x '.join(axes)} of size {parts}; change the mesh or that size{pad}"
            )


def data_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """The number of parts into which a batch is split."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])
