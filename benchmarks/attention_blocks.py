"""Prints the cycles that the TPU compiler schedules for the parts of the attention kernels.

    python benchmarks/attention_blocks.py [--chips v5p v6e] [--head 64 128]

The lines are the entries of FLASH and SPLASH in jaxmllm/plan/kernels.py. Needs libtpu but no TPU, and about half a
minute of one core per line. A bundle is what a core issues in one cycle, so the number of bundles in a piece of a
kernel without branches is its cycles without waits (docs/log.md#attention-on-tpus).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SIZE, GROUP = 1024, 4  # queries and keys of a block; query heads of a key head
# A line of a schedule that holds a bundle; the number of ">" is the depth of the loop that the bundle is in.
BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s*(?:[A-Z]{2})?\s*:\s*(>*)")


def compile_one(chip: str, head: int, kernel: str, blocks: int, causal: bool) -> None:
    """Compiles a kernel and its backward pass for a row with segments, `blocks` blocks long, and one key head."""
    from jaxmllm.plan.chips import topology
    from jaxmllm.plan.compile import devices_of, prepare

    prepare()
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from jaxmllm import mesh
    from jaxmllm.nn.attention.choose import KERNELS
    from jaxmllm.train.compiler import COMMON

    one_chip = mesh.Mesh(1, 1, 1, 1, 1).build(devices_of(topology(TOPOLOGIES[chip]))[:1])

    def total(q, k, v, segments):
        return KERNELS[kernel](q, k, v, causal, segments, segments).astype(jnp.float32).sum()

    def array(*shape, dtype=jnp.bfloat16):
        sharding = NamedSharding(one_chip, mesh.spec("batch", *[None] * (len(shape) - 1)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    s = blocks * SIZE
    with jax.set_mesh(one_chip):
        step = jax.jit(jax.grad(total, (0, 1, 2)), compiler_options=COMMON)
        key = array(1, s, 1, head)
        step.lower(array(1, s, 1, GROUP, head), key, key, array(1, s, dtype=jnp.int32)).compile()


def schedules(chip: str, head: int, kernel: str, blocks: int, causal: bool = True) -> dict[str, list[int]]:
    """The `bundles` of the attention kernels that `compile_one` compiles with these arguments."""
    return bundles([__file__, "--one", chip, str(head), kernel, str(blocks), str(int(causal))], kernel)


def bundles(script: list[str], word: str) -> dict[str, list[int]]:
    """Runs a script that compiles kernels -> for each kernel whose name contains `word`, the loop depths of its
    bundles, in order."""
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        subprocess.run([sys.executable, *script], check=True, env=os.environ | {"LIBTPU_INIT_ARGS": dump})
        found = {}
        for path in Path(folder).glob(f"*{word}*[0-9]-final_bundles.txt"):
            name = re.search(r"(forward|backward)_|splash_mqa_(fwd|dkv|dq)", path.name)
            lines = map(BUNDLE.match, path.read_text().splitlines())
            found[name[1] or name[2]] = [len(line[1]) for line in lines if line]
        return found


def loops(depths: list[int]) -> list[int]:
    """The number of bundles of each loop inside the loop over the grid."""
    runs, last = [], 0
    for depth in depths:
        depth = depth or last  # bundles after a branch carry no mark
        if depth > 1:
            runs = runs if last > 1 else [*runs, 0]
            runs[-1] += 1
        last = depth
    return runs


def flash(chip: str, head: int) -> dict[str, tuple[float, ...]]:
    """Pass -> cycles per score (without a mask, on the diagonal, with a mask of segments), per query, and per key."""
    short, long, full = (schedules(chip, head, "flash", n, causal) for n, causal in ((2, True), (4, True), (2, False)))
    made = {}
    for name, depths in short.items():
        # The second loop of a causal kernel has two branches: on the diagonal, and with a mask of segments only.
        unmasked, both_branches = loops(depths)
        masked = loops(full[name])[1]
        # Work that is done once for all keys is unrolled, so a kernel with twice the keys has that many more bundles.
        key = max(0, len(long[name]) - len(depths)) / (2 * SIZE)
        query = (len(depths) - unmasked - both_branches) / SIZE - 2 * key
        made[name] = *(x / SIZE**2 for x in (unmasked, both_branches - masked, masked)), query, key
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["v5p", "v6e"], choices=TOPOLOGIES)
    parser.add_argument("--head", nargs="+", type=int, default=[64, 128], help="head sizes")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)  # only compiles: what this script runs itself with
    args = parser.parse_args()
    if args.one:
        chip, head, kernel, blocks, causal = args.one
        return compile_one(chip, int(head), kernel, int(blocks), causal == "1")
    for chip in args.chips:
        for head in args.head:
            rows = ", ".join(
                f'"{name}": ({", ".join(f"{x:.3g}" for x in row)})' for name, row in sorted(flash(chip, head).items())
            )
            print(f'FLASH ("{chip}", {head}): {{{rows}}},', flush=True)
            splash = {name: len(depths) / SIZE**2 for name, depths in schedules(chip, head, "splash", 2).items()}
            rows = ", ".join(f'"{name}": {x:.3g}' for name, x in sorted(splash.items()))
            print(f'SPLASH ("{chip}", {head}): {{{rows}}},', flush=True)


if __name__ == "__main__":
    main()
