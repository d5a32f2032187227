"""Compiler options, with a reason for each. Training steps and plans are compiled with them."""

from __future__ import annotations

import jax

COMMON = {  # for all TPUs
    # Larger fusions: the default budget of on-chip memory splits the epilogues of large matmuls.
    "xla_tpu_scoped_vmem_limit_kib": "98304",
    # Never turn an all-gather and its matmul into a loop of partial matmuls, which are too small to be efficient.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    # A real all-gather, which runs beside other work, not an all-reduce of zero-padded shards, which blocks all work.
    "xla_enable_async_all_gather": "true",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
}
# For chips whose SparseCores can move data: collectives run there while the matrix units go on.
OFFLOAD = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    # Without this, even an explicit reduce-scatter becomes an all-reduce and a slice, which moves twice the bytes.
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_tpu_enable_all_gather_offload_tracing": "true",
}
# For the other chips: an all-gather advances in steps inside the matmuls that run at the same time.
FUSE = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
# By default YNNPACK also computes products that nothing is fused with. XLA's own are faster: the toy step by a tenth.
CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
BY_KIND = {
    "TPU v4": COMMON | FUSE,
    "TPU v5 lite": COMMON | FUSE,
    "TPU v5": COMMON | OFFLOAD,
    "TPU v6 lite": COMMON | OFFLOAD,
    "TPU7x": COMMON | OFFLOAD,
    "cpu": CPU,
}


def options(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> dict[str, str]:
    """Compiler options for the devices of a mesh."""
    device = mesh.abstract_mesh.abstract_device
    return BY_KIND.get(device.device_kind, {}) if device else {}


def use_random_kernel(mesh: jax.sharding.Mesh) -> None:
    """On a single GPU, random numbers come from a kernel with the same values: an H200 compiles the toy's initial
    values in 4 s instead of 31. Among several devices each would make the whole of every array.
    """
    jax.config.update("jax_threefry_gpu_kernel_lowering", mesh.size == 1)
