"""Plans MaxText's train step of Llama-3.1-8B with the TPU compiler and adds it to the table of plans.

    python benchmarks/maxtext_step.py v5p:4x4x4 remat_policy=minimal_with_context [name=value ...]

Needs Python 3.12 or newer with "maxtext[tpu]" installed, and PYTHONPATH set to this repository. The arguments after the
topology are settings of MaxText. The step is priced as the plans of jaxmllm are, and these settings are the same: 4
rows of 2048 tokens per chip, weights split over all chips, the compiler options. Attention is splash attention in
blocks of 1024 with one backward kernel. MFU is by jaxmllm's count of the FLOPs that the model needs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from jaxmllm.plan.compile import peak_bytes, prepare

prepare()

import jax  # noqa: E402
import maxtext  # noqa: E402
import plans  # noqa: E402
from maxtext.trainers.pre_train import train_compile  # noqa: E402

from jaxmllm.plan.chips import topology  # noqa: E402
from jaxmllm.plan.hlo import parse  # noqa: E402
from jaxmllm.plan.timeline import Timeline  # noqa: E402
from jaxmllm.plan.traffic import Network  # noqa: E402
from jaxmllm.train.compiler import options  # noqa: E402

ROWS, LENGTH = 4, 2048
BLOCKS = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
SETTINGS = {
    **{f"sa_block_{name}": 1024 for name in BLOCKS},
    "sa_use_fused_bwd_kernel": True,
    "attention": "flash",
    "base_output_directory": tempfile.gettempdir(),
    "compile_topology_num_slices": 1,
    "dataset_type": "synthetic",
    "enable_checkpointing": False,
    "max_target_length": LENGTH,
    "model_name": "llama3.1-8b",
    "per_device_batch_size": ROWS,
    "run_name": "plan",
}
CORES = {"v5p": 2, "v4": 2}  # per chip; MaxText's names of topologies count cores


def compile_step(settings: list[str]) -> tuple:
    """Compiles MaxText's step -> (program, mesh, seconds of compiling)."""
    compiled = []

    def jit_and_compile(step, inputs, named, mesh, in_shard, out_shard, static, donate, config, rules):
        start = time.perf_counter()
        with jax.set_mesh(mesh), rules:
            jitted = jax.jit(step, in_shardings=in_shard, out_shardings=out_shard, static_argnums=static,
                             donate_argnums=donate, compiler_options=options(mesh))  # fmt: skip
            compiled.append((jitted.lower(*inputs, **named).compile(), mesh, time.perf_counter() - start))
        return compiled[0][0]

    train_compile.jit_and_compile = jit_and_compile
    train_compile.main(["", str(Path(maxtext.__file__).parent / "configs" / "base.yml"), *settings])
    return compiled[0]


def main(name: str, *settings: str) -> None:
    """Compiles the step for the topology `name` with these settings of MaxText, and writes its row of the table."""
    tpu = topology(name)
    size = {
        "compile_topology": f"{tpu.chip.name}-{tpu.chips * CORES.get(tpu.chip.name, 1)}",
        "ici_fsdp_parallelism": tpu.chips,
    }
    program, mesh, seconds = compile_step([*(f"{k}={v}" for k, v in (SETTINGS | size).items()), *settings])
    timeline = Timeline(parse(program.as_text()), tpu.chip, Network(tpu, mesh.axis_names, mesh.devices))
    kept = json.loads(plans.KEPT.read_text())
    flops = kept[f"llama3_8b.py {tpu.name}"]["model_flops"] / tpu.chips
    kept[" ".join(["MaxText 0.2.5", tpu.name, *settings])] = {
        "hbm_bytes": peak_bytes(program),
        "hbm_limit_bytes": tpu.chip.hbm_usable,
        "cycles": sum(c.cycles for c in timeline.charges),
        "exposed_collective_seconds": sum(c.exposed for c in timeline.charges),
        "predicted_step_seconds": timeline.seconds,
        "predicted_mfu": flops / timeline.seconds / tpu.chip.flops,
        "tokens_per_second_per_chip": ROWS * LENGTH / timeline.seconds,
        "compile_seconds": seconds,
    }
    plans.write(kept)


if __name__ == "__main__":
    main(*sys.argv[1:])
