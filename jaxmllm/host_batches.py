"""Batches on the host (numpy) and on the devices: which rows a process reads, and how they become global arrays."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxmllm.mesh import data_shards, spec


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """How a batch lies on the mesh: rows over all data axes, everything else whole."""
    return NamedSharding(mesh, spec("batch"))


def process_rows(mesh: jax.sharding.Mesh, process: int | None = None) -> tuple[int, int]:
    """(index, count): the rows of a batch are read in `count` parts, and a process (default: this one) reads one.

    Processes whose devices hold the same rows, because tensor or context spans them, read the same part. Raises
    ValueError if two processes share only some of their rows.
    """
    shards = mesh.devices.reshape(data_shards(mesh), -1)
    held: dict[int, set[int]] = {}
    for shard, devices in enumerate(shards):
        for device in devices:
            held.setdefault(device.process_index, set()).add(shard)
    parts = sorted({tuple(sorted(shards)) for shards in held.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != len(shards):
        raise ValueError(f"mesh {dict(mesh.shape)}: processes share some of their rows; let data x fsdp divide evenly")
    own = held[jax.process_index() if process is None else process]
    return parts.index(tuple(sorted(own))), len(parts)


def global_from_rows(batch, mesh: jax.sharding.Mesh):
    """A pytree of the rows that this process read (numpy) -> global arrays. Each process passes its own rows."""
    sharding = batch_sharding(mesh)
    with jax.transfer_guard_host_to_device("allow"):  # with several processes JAX counts this as an implicit copy
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def global_from_copies(batch, mesh: jax.sharding.Mesh):
    """A pytree of all rows (numpy), equal in every process -> global arrays with the rows in this order."""
    sharding = batch_sharding(mesh)
    with jax.transfer_guard_host_to_device("allow"):  # JAX counts this as an implicit copy
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)
