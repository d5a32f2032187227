"""Compiles the train step of a recipe with the real TPU compiler, for a slice that need not be at hand."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Callable

import jax
import numpy as np

from jaxmllm.config import Run, Stage
from jaxmllm.errors import ConfigError
from jaxmllm.plan.chips import GIB, Topology
from jaxmllm.train.checkpoint import abstract_on
from jaxmllm.train.setup import abstract_batch, stage_program

# libtpu only compiles here: it must not look for a TPU in this machine, nor insist on being the only process.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}
# The compiler estimates a kernel before it optimises its code. A plan needs only the estimate. Without these passes it
# takes a fifth less processor time; cycles differed by 0, 0.002 and 0.4 % in three recipes (docs/performance.md).
ESTIMATES_ONLY = {
    "xla_jf_vliw_scheduler": "false",
    "xla_jf_xlu_optimizer": "false",
    "xla_tpu_flowdown_critical_nodes": "false",
    # Such code spills more registers. The compiler must not compile a kernel again with smaller windows for that.
    "xla_tpu_llo_compilation_max_retries": "0",
}
# Two forms of the compiler's message: all memory used and available, or only temporaries and available.
_USED = re.compile(r"Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMG]?)\) exceeds available HBM \(([\d.]+)([KMG]?)\)")


@dataclasses.dataclass(frozen=True)
class HbmUse:
    """Bytes per device. `total` is the peak, which must fit into `limit`."""

    total: int
    limit: int
    trainable: int
    frozen: int
    optimizer: int
    batch: int
    scratch: int  # activations and temporaries


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled step of a stage; `text` is "" if it does not fit, since there is no program then."""

    text: str
    memory: HbmUse
    devices: np.ndarray  # in the shape of the mesh
    seconds: float  # of compiling

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.memory.limit


def prepare() -> None:
    """Sets the environment that libtpu needs; call it before JAX starts. Raises ConfigError without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError('jaxmllm plan needs the TPU compiler, but no TPU: pip install "jaxmllm[tpu]"')
    os.environ.update(ENVIRONMENT)


def devices_of(topology: Topology) -> list:
    """Descriptions of all devices of a topology. Raises ConfigError if there is no such slice."""
    from jax.experimental import topologies

    options = dict(topology.chip.topology_options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        description = topologies.get_topology_desc(topology_name=topology.name, platform="tpu", **options)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ConfigError(f"--topology {topology.name}: {str(error).splitlines()[0][:200]}") from error
    return description.devices


def compile_stage(run: Run, stage: Stage, topology: Topology, say: Callable[[str], None]) -> Program:
    """Compiles the train step of a stage; a program that does not fit comes back without text."""
    devices = devices_of(topology)
    mesh = run.mesh.build(devices)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        params, new_train_state, step = stage_program(run, stage, mesh)
        state = abstract_on(mesh, jax.eval_shape(new_train_state, params))
        batch = abstract_batch(run, stage, mesh)
        lowered = step.lower(state, batch)
        parts = {
            "trainable": shard_bytes(state.trainable),
            "frozen": shard_bytes(state.frozen),
            "optimizer": shard_bytes(state.opt_state),
            "batch": shard_bytes(batch),
        }
        limit = topology.chip.hbm_usable
        try:
            compiled = compile_for_estimates(lowered, say)
            total, text = peak_bytes(compiled), compiled.as_text()
        except jax.errors.JaxRuntimeError as error:
            total, limit = parse_memory_error(str(error), sum(parts.values()))
            text = ""
    memory = HbmUse(total, limit, **parts, scratch=max(0, total - sum(parts.values())))
    return Program(text, memory, mesh.devices, time.perf_counter() - start)


def compile_for_estimates(lowered: jax.stages.Lowered, say: Callable[[str], None]) -> jax.stages.Compiled:
    """Compiles without the passes that estimates do not need.

    If a kernel then has no room for spilled registers, it compiles again with all passes.
    """
    try:
        return lowered.compile(ESTIMATES_ONLY)
    except jax.errors.JaxRuntimeError as error:
        if "CompileTimeScopedVmemOom" not in str(error):
            raise
    say("a kernel fits on the chip only with all passes of the compiler: compiling again with all of them ...")
    return lowered.compile()


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of a device's memory that a program needs, arguments included."""
    stats = compiled.memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )


def parse_memory_error(message: str, arguments: int) -> tuple[int, int]:
    """Reads (bytes needed, bytes available) from the compiler's message for a program that does not fit.

    arguments: bytes of the program's arguments, which one form of the message leaves out. Raises RuntimeError for any
    other message.
    """
    used, temporaries = _USED.search(message), _TEMPORARIES.search(message)
    if not (match := used or temporaries):
        raise RuntimeError(f"the TPU compiler failed: {message[:500]}")
    units = {"": 1, "K": 2**10, "M": 2**20, "G": GIB}
    amount, limit = (int(float(match[i]) * units[match[i + 1]]) for i in (1, 3))
    return amount + (0 if used else arguments), limit


def shard_bytes(tree) -> int:
    """Bytes that one device holds of a tree of abstract arrays."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
