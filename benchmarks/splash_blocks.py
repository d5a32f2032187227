"""Cycles the TPU compiler schedules for one block of splash attention; no TPU is used. Prints a table, and the entries
of SPLASH in jaxmllm/plan/price.py. Needs libtpu; about 10 seconds of one core a line.

python benchmarks/splash_blocks.py [--chips v5p v6e] [--head 64 128] [--blocks 512 1024]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = ("fwd", "dkv fused", "dkv", "dq")
PLACES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
BUNDLES = re.compile(r"total scheduled bundles:\s*(\d+)")


def compile_one(chip: str, head: int, size: int, fused: bool) -> None:
    """Compiles forward and backward of a segmented causal row of two blocks, four query heads, one key head."""
    from jaxmllm.plan.chips import topology
    from jaxmllm.plan.compile import devices_of, prepare

    prepare()
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental.pallas.ops.tpu import splash_attention as library
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxmllm.train.compiler import COMMON

    mesh = jax.sharding.Mesh(np.array(devices_of(topology(PLACES[chip]))[:1]), ("x",))
    back = dict(use_fused_bwd_kernel=True) if fused else dict(block_q_dq=size, block_kv_dq=size)
    sizes = library.BlockSizes(size, size, size, block_q_dkv=size, block_kv_dkv=size, block_kv_dkv_compute=size, **back)

    def total(q, k, v, segments):
        mask = library.MultiHeadMask([library.CausalMask((2 * size, 2 * size))] * 4)
        kernel = library.make_splash_mqa_single_device(mask, block_sizes=sizes)
        return kernel(q, k, v, library.SegmentIds(segments, segments)).astype(jnp.float32).sum()

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    k, segments = array(2 * size, head), array(2 * size, dtype=jnp.int32)
    step = jax.jit(jax.grad(total, (0, 1, 2)), compiler_options=COMMON)
    step.lower(array(4, 2 * size, head), k, k, segments).compile()


def cycles(chip: str, head: int, size: int, fused: bool) -> dict[str, int]:
    """Kernel -> bundles (one a cycle) of its whole program: one block and the little around it."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--one", chip, str(head), str(size), str(int(fused))]
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        subprocess.run(words, check=True, env=os.environ | {"LIBTPU_INIT_ARGS": dump})
        found = {}
        for path in Path(folder).glob("*splash_mqa_*schedule-analysis_final_bundles.txt"):
            kind = re.search(r"splash_mqa_(fwd|dkv|dq)", path.name)[1]
            found[f"{kind} fused" if fused and kind == "dkv" else kind] = int(BUNDLES.search(path.read_text())[1])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=list(PLACES))
    parser.add_argument("--head", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--blocks", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        chip, *numbers = given.one
        return compile_one(chip, *map(int, numbers))
    print("| chip | head | block | " + " | ".join(KINDS) + " |\n|" + "---|" * (3 + len(KINDS)))
    for chip in given.chips:
        for head in given.head:
            for size in given.blocks:
                found = cycles(chip, head, size, True) | cycles(chip, head, size, False)
                figures = " | ".join(f"{found[kind]} ({found[kind] / size**2:.2e} a score)" for kind in KINDS)
                print(f"| {chip} | {head} | {size} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
