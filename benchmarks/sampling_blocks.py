"""Cycles the TPU compiler schedules for the parts of the kernels that sample maps; no TPU is used. Prints the entries
of SAMPLING in jaxmllm/plan/kernels.py. Needs libtpu; a minute of one core a chip.

python benchmarks/sampling_blocks.py [--chips v5p v6e]
"""

from __future__ import annotations

import argparse

from attention_blocks import PLACES, bundles, loops

QUERIES = 128  # of a block, as jaxmllm/nn/sampling.py has it
HEADS, LEVELS, POINTS = 2, 4, 4
SIDES = 24, 40  # maps 24 wide and so high: two pieces of 288 and of 480 pixels


def compile_one(chip: str, side: int) -> None:
    """Compiles forward and backward of maps of side x 24 pixels, two heads of 64."""
    from jaxmllm.plan.chips import topology
    from jaxmllm.plan.compile import devices_of, prepare

    prepare()
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from jaxmllm import mesh
    from jaxmllm.nn import sampling
    from jaxmllm.train.compiler import COMMON

    one = mesh.Mesh(1, 1, 1, 1, 1).build(devices_of(topology(PLACES[chip]))[:1])

    def total(values, at, weights):
        return (sampling.sample([values], at, weights).astype(jnp.float32) ** 2).sum()

    def array(*shape, names=("batch",), dtype=jnp.float32):
        names = (*names, *[None] * (len(shape) - len(names)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(one, mesh.spec(*names)))

    with jax.set_mesh(one):
        values = array(LEVELS, 2, side, 24, HEADS * 64, names=(None, "batch"), dtype=jnp.bfloat16)
        weights = array(2, 4 * QUERIES, HEADS, LEVELS, POINTS)
        at = array(*weights.shape, 2)
        jax.jit(jax.grad(total, (0, 1, 2)), compiler_options=COMMON).lower(values, at, weights).compile()


def sampling(chip: str) -> dict[str, tuple[float, ...]]:
    """Pass -> cycles of a pixel and query of a level, of a query of a level, of a query; all of one head."""
    found = [bundles([__file__, "--one", chip, str(side)], "sampling") for side in SIDES]
    made = {}
    for name, depths in found[0].items():
        loop, longer = (sum(loops(each[name])) for each in found)  # of levels, the one over pieces counted once
        pixel = (longer - loop) / (24 * (SIDES[1] - SIDES[0]) / 2)
        level = loop - pixel * 24 * SIDES[0] / 2
        made[name] = (*(x / HEADS / QUERIES for x in (pixel, level, len(depths) - loop)),)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["v5p", "v6e"])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return compile_one(given.one[0], int(given.one[1]))
    for chip in given.chips:
        found = sorted(sampling(chip).items())
        rows = ", ".join(f'"{name}": ({", ".join(f"{x:.3g}" for x in row)})' for name, row in found)
        print(f'"{chip}": {{{rows}}},', flush=True)


if __name__ == "__main__":
    main()
