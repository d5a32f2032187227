"""Options of the TPU compiler, one reason each. The step is compiled with them on a TPU and in a plan for one."""

from __future__ import annotations

import jax

TPU = {
    # Larger fusions: the default budget of on-chip memory splits the epilogues of big matmuls.
    "xla_tpu_scoped_vmem_limit_kib": "98304",
    # Never turn an all-gather and its matmul into a loop of partial matmuls: the parts are too small to be efficient.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}


def options(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """Compiler options for the devices of a mesh."""
    return TPU if mesh.devices.flat[0].platform == "tpu" else {}
