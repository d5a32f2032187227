"""MaxText's train step of Llama-3.1-8B through the same TPU compiler, priced as our plans are, into the same table.

    python benchmarks/maxtext_step.py v5p:4x4x4 remat_policy=minimal_with_context [name=value ...]

Needs Python 3.12 or newer with "maxtext[tpu]" installed and this repository as PYTHONPATH. Set as in ours: 4 rows of
2048 tokens a chip, weights split over all chips, the same compiler options, splash attention in blocks of 1024 with one
backward kernel. More of MaxText's settings can be given. MFU is by our count of the FLOPs that the model needs.
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
CORES = {"v5p": 2, "v4": 2}  # counted in the names of MaxText's topologies


def compile_step(words: list[str]) -> tuple:
    """(program, mesh, seconds) of MaxText's step."""
    found = []

    def jit_and_compile(step, inputs, named, mesh, in_shard, out_shard, static, donate, config, rules):
        start = time.perf_counter()
        with jax.set_mesh(mesh), rules:
            jitted = jax.jit(step, in_shardings=in_shard, out_shardings=out_shard, static_argnums=static,
                             donate_argnums=donate, compiler_options=options(mesh))  # fmt: skip
            found.append((jitted.lower(*inputs, **named).compile(), mesh, time.perf_counter() - start))
        return found[0][0]

    train_compile.jit_and_compile = jit_and_compile
    train_compile.main(["", str(Path(maxtext.__file__).parent / "configs" / "base.yml"), *words])
    return found[0]


def main(place: str, *words: str) -> None:
    place = topology(place)
    where = {
        "compile_topology": f"{place.chip.name}-{place.chips * CORES.get(place.chip.name, 1)}",
        "ici_fsdp_parallelism": place.chips,
    }
    program, mesh, seconds = compile_step([*(f"{k}={v}" for k, v in (SETTINGS | where).items()), *words])
    line = Timeline(parse(program.as_text()), place.chip, Network(place, mesh.axis_names, mesh.devices))
    kept = json.loads(plans.KEPT.read_text())
    flops = kept[f"llama3_8b.py {place.name}"]["model_flops"] / place.chips
    kept[" ".join(["MaxText 0.2.5", place.name, *words])] = {
        "hbm_bytes": peak_bytes(program),
        "hbm_limit_bytes": place.chip.hbm_usable,
        "cycles": sum(c.cycles for c in line.charges),
        "exposed_collective_seconds": sum(c.exposed for c in line.charges),
        "predicted_step_seconds": line.seconds,
        "predicted_mfu": flops / line.seconds / place.chip.flops,
        "tokens_per_second_per_chip": ROWS * LENGTH / line.seconds,
        "compile_seconds": seconds,
    }
    plans.write(kept)


if __name__ == "__main__":
    main(*sys.argv[1:])
