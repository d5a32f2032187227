"""Prints the cycles that the TPU compiler schedules for the parts of the kernels that sample feature maps.

    python benchmarks/sampling_blocks.py [--chips v5p v6e]

The lines are the entries of SAMPLING in jaxmllm/plan/kernels.py. Needs libtpu but no TPU, and a minute of one core per
chip. Cycles are counted as in attention_blocks.py.
"""

from __future__ import annotations

import argparse

from attention_blocks import TOPOLOGIES, bundles, loops

QUERIES = 128  # of a block, as in jaxmllm/nn/sampling/tpu.py
HEADS, LEVELS, POINTS = 2, 4, 4
WIDTH, HEIGHTS = 24, (24, 40)  # of maps, which the kernels cut into two pieces of 288 and of 480 pixels


def compile_one(chip: str, height: int) -> None:
    """Compiles the kernels of both passes for maps of `height` x 24 pixels with two heads of 64 channels."""
    from jaxmllm.plan.chips import topology
    from jaxmllm.plan.compile import devices_of, prepare

    prepare()
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from jaxmllm import mesh
    from jaxmllm.nn.sampling.choose import sample
    from jaxmllm.train.compiler import COMMON

    one_chip = mesh.Mesh(1, 1, 1, 1, 1).build(devices_of(topology(TOPOLOGIES[chip]))[:1])

    def total(values, at, weights):
        return (sample([values], at, weights).astype(jnp.float32) ** 2).sum()

    def array(*shape, names=("batch",), dtype=jnp.float32):
        names = (*names, *[None] * (len(shape) - len(names)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(one_chip, mesh.spec(*names)))

    with jax.set_mesh(one_chip):
        values = array(LEVELS, 2, height, WIDTH, HEADS * 64, names=(None, "batch"), dtype=jnp.bfloat16)
        weights = array(2, 4 * QUERIES, HEADS, LEVELS, POINTS)
        at = array(*weights.shape, 2)
        jax.jit(jax.grad(total, (0, 1, 2)), compiler_options=COMMON).lower(values, at, weights).compile()


def sampling(chip: str) -> dict[str, tuple[float, ...]]:
    """Pass -> cycles for one head: per pixel and query of a level, per query of a level, per query."""
    found = [bundles([__file__, "--one", chip, str(height)], "sampling") for height in HEIGHTS]
    made = {}
    for name, depths in found[0].items():
        # The bundles of the loops over levels. Inside them, the loop over two pieces counts only once.
        short, tall = (sum(loops(each[name])) for each in found)
        pixel = (tall - short) / (WIDTH * (HEIGHTS[1] - HEIGHTS[0]) / 2)
        level = short - pixel * WIDTH * HEIGHTS[0] / 2
        made[name] = (*(x / HEADS / QUERIES for x in (pixel, level, len(depths) - short)),)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["v5p", "v6e"], choices=TOPOLOGIES)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # only compiles: what this script runs itself with
    args = parser.parse_args()
    if args.one:
        return compile_one(args.one[0], int(args.one[1]))
    for chip in args.chips:
        found = sorted(sampling(chip).items())
        rows = ", ".join(f'"{name}": ({", ".join(f"{x:.3g}" for x in row)})' for name, row in found)
        print(f'"{chip}": {{{rows}}},', flush=True)


if __name__ == "__main__":
    main()
