"""Updates the table of kernels in docs/performance.md: forms of MMFuser's sampling and of SVA that were compared.

    python benchmarks/visual_kernels.py [--only TEXT]     only rows whose name contains TEXT; others keep their figures

MMFuser samples by matmuls, and the other form by a gather. SVA works on maps that are cut into windows, and the other
form on whole maps. The other forms exist only in this file; before anything is timed, they must give the same numbers.
Both are timed forward and backward: with gradients of the weights, and for SVA also of the inputs, since MMFuser's
inputs come from frozen encoders.

Cycles are those of one chip, in bfloat16 with 8 images, compiled with the options of a train step and priced like a
plan. Processor seconds are those of this machine, in float32 with one image: the median of runs in which the two forms
take turns. Needs libtpu and some minutes. The figures are kept in docs/visual_kernels.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaxmllm.plan.compile import devices_of, prepare

prepare()

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from jaxmllm import mesh  # noqa: E402
from jaxmllm.aggregators.sva import SVALayer, to_memory, window_mask  # noqa: E402
from jaxmllm.fusers.mmfuser import DeformableAttention, MMFuser  # noqa: E402
from jaxmllm.nn.attention.plain import MASKED  # noqa: E402
from jaxmllm.nn.primitives import LearnedArray, Linear, Norm, normal  # noqa: E402
from jaxmllm.plan.chips import topology  # noqa: E402
from jaxmllm.plan.hlo import parse  # noqa: E402
from jaxmllm.plan.timeline import Timeline  # noqa: E402
from jaxmllm.plan.traffic import Network  # noqa: E402
from jaxmllm.train.compiler import options  # noqa: E402

ROOT = Path(__file__).parent.parent
PAGE, KEPT = ROOT / "docs" / "performance.md", ROOT / "docs" / "visual_kernels.json"
TOPOLOGIES = ("v5p:2x2x1", "v6e:2x2")
IMAGES, RUNS = 8, 5
SIDES = (24, 24, 24, 96)  # Cambrian-1's encoders: SigLIP, CLIP, DINOv2, ConvNeXt


class GatherAttention(DeformableAttention):
    """Looks up the four pixels around every place and adds them up by their weights."""

    def sample(self, values: list[jax.Array], at: jax.Array, weights: jax.Array) -> jax.Array:
        levels = enumerate(level for value in values for level in value)
        out = sum(self.level(level, at[:, :, :, i], weights[:, :, :, i]) for i, level in levels)
        return out.reshape(*out.shape[:2], -1).astype(values[0].dtype)

    def level(self, value: jax.Array, at: jax.Array, weights: jax.Array) -> jax.Array:
        n, h, w, c = value.shape
        rows = value.reshape(n, h * w, self.heads, c // self.heads)
        pick = jax.vmap(jax.vmap(lambda rows, i: rows[i], (1, 1), 1))  # over images, then heads
        low, out = jnp.floor(at), 0.0
        for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
            x, y = jnp.moveaxis(low + jnp.array(corner, jnp.float32), -1, 0)
            near = (1 - jnp.abs(at[..., 0] - x)) * (1 - jnp.abs(at[..., 1] - y))
            inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
            index = jnp.clip(y, 0, h - 1) * w + jnp.clip(x, 0, w - 1)
            weight = jnp.where(inside, weights * near, 0.0)
            out = out + (pick(rows, index.astype(jnp.int32)) * weight[..., None]).sum(3)
        return out


class GatherMMFuser(MMFuser):
    """MMFuser with that attention."""

    def new_attention(self, name: str) -> nn.Module:
        return GatherAttention(self.heads, self.points, name=name)


class WholeLayer(SVALayer):
    """SVALayer on whole maps [N, h, w, C], which are viewed as [N, L, m, L, m, C] when queries are compared with
    them."""

    @nn.compact
    def __call__(self, query: jax.Array, memory: WholeMaps) -> jax.Array:
        n, count, q_width = query.shape
        grid = math.isqrt(count)
        query = query.reshape(n, grid, grid, q_width)
        shape = (self.heads, self.width // self.heads)
        plain = dict(use_bias=False)
        context = Linear((self.width,), **plain, name="proj_context")(memory.context)
        context = jnp.broadcast_to(context[:, None, None], (n, grid, grid, self.width))
        x = Linear((self.width,), **plain, name="proj_in")(query)
        x = x + Linear((self.width,), **plain, name="proj_in_context")(context)
        q = Linear((self.width,), **plain, name="q_proj")(Norm(name="q_norm")(x)).reshape(n, grid, grid, *shape)
        scores, values = [], []
        for k, (f, mask) in enumerate(zip(memory.maps, memory.masks)):
            m = f.shape[1] // grid
            if m > 1:
                positions = LearnedArray(normal(1.0), name=f"pos_embed_{k}")((m, m, self.width))
                f = f + jnp.tile(positions, (grid, grid, 1))
            keys = Linear((self.width,), **plain, name=f"k_proj_{k}")(Norm(name=f"k_norm_{k}")(f))
            vals = Linear((self.width,), **plain, name=f"v_proj_{k}")(Norm(name=f"v_norm_{k}")(f))
            keys, vals = (y.reshape(n, grid, m, grid, m, *shape) for y in (keys, vals))
            seen = window_mask(mask, grid).T.reshape(n, grid, grid, 1, m * m)
            s = jnp.einsum("nijhd,niajbhd->nijhab", q, keys, preferred_element_type=jnp.float32)
            s = s.reshape(*s.shape[:4], m * m) * shape[1] ** -0.5
            scores.append(jnp.where(seen, s, MASKED))
            values.append(vals)
        weights, y, start = jax.nn.softmax(jnp.concatenate(scores, -1), -1).astype(x.dtype), 0.0, 0
        for vals in values:
            m = vals.shape[2]
            w = weights[..., start : start + m * m].reshape(*weights.shape[:4], m, m)
            y = y + jnp.einsum("nijhab,niajbhd->nijhd", w, vals)
            start += m * m
        y = Linear((self.width,), **plain, name="o_proj")(y.reshape(x.shape))
        z = Linear((self.width,), **plain, name="linear_1")(Norm(name="norm")(x + y))
        z = jax.nn.gelu(z, approximate=False)
        return (query + Linear((q_width,), **plain, name="linear_2")(z)).reshape(n, count, q_width)


class WholeMaps(NamedTuple):
    """The inputs of SVA's layers: maps [N, h, w, C] and masks bool[N, h, w] of all encoders, and context [N, C]."""

    maps: tuple[jax.Array, ...]
    masks: tuple[jax.Array, ...]
    context: jax.Array


class WholeLayers(nn.Module):
    """Several layers in sequence on the same maps, as in Cambrian-1's connector."""

    width: int
    depth: int = 3
    layer: type = WholeLayer

    @nn.compact
    def __call__(self, query: jax.Array, maps: WholeMaps) -> jax.Array:
        for i in range(self.depth):
            query = self.layer(self.width, name=f"layer_{i}")(query, maps)
        return query


class SVALayers(WholeLayers):
    """The same with SVALayer, on maps that are cut into windows first."""

    layer: type = SVALayer

    @nn.compact
    def __call__(self, query: jax.Array, maps: WholeMaps) -> jax.Array:
        return super().__call__(query, to_memory(*maps, math.isqrt(query.shape[1])))


def mmfuser_inputs(make: Callable, images: int) -> tuple:
    """Five taps of CLIP-L/336."""
    return (make((5, images, 24, 24, 1024)),)


def sva_inputs(make: Callable, images: int) -> tuple:
    """Queries and the projected maps of Cambrian-1's encoders."""
    masks = tuple(jnp.ones((images, side, side), bool) for side in SIDES)
    features = tuple(make((images, side, side, 1024)) for side in SIDES)
    return make((images, 24**2, 1024)), WholeMaps(features, masks, make((images, 1024)))


# name -> (jaxmllm's form, the other form, their inputs, whether the inputs have gradients)
ROWS = {
    "MMFuser, CLIP-L/336, 5 taps: matmul / gather": (MMFuser(), GatherMMFuser(), mmfuser_inputs, False),
    "SVA, Cambrian-8B, 3 layers: windows / whole maps": (SVALayers(1024), WholeLayers(1024), sva_inputs, True),
}


def backward(module: nn.Module, to_inputs: bool) -> Callable:
    """Returns a function (params, inputs, cotangent) -> (output, gradients of the weights and, if to_inputs, of the
    floating-point inputs)."""

    def run(params, inputs, cotangent):
        leaves, tree = jax.tree.flatten(inputs)
        has_gradient = [to_inputs and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]

        def forward(params, varied):
            varied = iter(varied)
            merged = [next(varied) if varies else x for x, varies in zip(leaves, has_gradient)]
            y = module.apply({"params": params}, *jax.tree.unflatten(tree, merged))
            return y.cells if hasattr(y, "cells") else y

        y, vjp = jax.vjp(forward, params, [x for x, varies in zip(leaves, has_gradient) if varies])
        return y, vjp(cotangent)

    return run


def shapes_of(module: nn.Module, inputs: tuple, dtype) -> tuple:
    """The shapes of (params, output), with this dtype."""
    y, variables = jax.eval_shape(lambda *x: module.init_with_output(jax.random.key(0), *x), *inputs)
    y = y.cells if hasattr(y, "cells") else y
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), (variables["params"], y))


def cycles(module: nn.Module, inputs_of: Callable, to_inputs: bool, name: str) -> dict[str, float]:
    """Cycles of one run, those that the compiler estimates and those priced by rules, and bytes of scratch memory."""
    tpu = topology(name)
    one_chip = mesh.Mesh(1, 1, 1, 1, 1).build(devices_of(tpu)[:1])
    inputs = inputs_of(lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16), IMAGES)
    arguments = *shapes_of(module, inputs, jnp.bfloat16), inputs
    unsplit = NamedSharding(one_chip, PartitionSpec())
    params, y, inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=unsplit), arguments)
    start = time.process_time()
    # MMFuser chooses its kernels by the mesh; the classes of this file do not work with one.
    with jax.set_mesh(one_chip) if module.__module__ != __name__ else contextlib.nullcontext():
        step = jax.jit(backward(module, to_inputs), compiler_options=options(one_chip))
        program = step.lower(params, inputs, y).compile()
    print(f"{type(module).__name__} for {name}: compiled in {time.process_time() - start:.0f} processor s", flush=True)
    network = Network(tpu, one_chip.axis_names, one_chip.devices)
    charges = Timeline(parse(program.as_text()), tpu.chip, network).charges
    return {
        "estimated": sum(c.cycles for c in charges if c.model is None),
        "priced": sum(c.cycles for c in charges if c.model),
        "scratch": program.memory_analysis().temp_size_in_bytes,
    }


def seconds(modules: list[nn.Module], inputs_of: Callable, to_inputs: bool) -> list[float]:
    """Processor seconds of both forms. Raises ValueError if they do not give the same numbers."""
    rng = np.random.default_rng(0)
    make = lambda shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
    inputs = inputs_of(make, 1)
    params, y = shapes_of(modules[0], inputs, jnp.float32)
    params, cotangent = jax.tree.map(lambda x: 0.05 * make(x.shape), params), make(y.shape)
    runs = [jax.jit(backward(module, to_inputs)) for module in modules]
    ours, other = (jax.tree.leaves(jax.block_until_ready(run(params, inputs, cotangent))) for run in runs)
    for a, b in zip(ours, other):
        # The difference is 1e-6 to 1e-4, except in the gradients of the offsets: of 300,000 places a few are so near a
        # pixel that rounding moves them to its other side, where the slope is different.
        if (apart := jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) > 1e-2:
            raise ValueError(f"{type(modules[1]).__name__}: an array of shape {a.shape} is {apart:.1e} off")
    taken = [[], []]
    for _ in range(RUNS):
        for run, times in zip(runs, taken):
            start = time.process_time()
            jax.block_until_ready(run(params, inputs, cotangent))
            times.append(time.process_time() - start)
    return [float(np.median(times)) for times in taken]


def measure(ours: nn.Module, other: nn.Module, inputs_of: Callable, to_inputs: bool) -> dict:
    """All figures of a row."""
    figures = {"seconds": seconds([ours, other], inputs_of, to_inputs)}
    for tpu in TOPOLOGIES:
        figures[tpu] = [cycles(module, inputs_of, to_inputs, tpu) for module in (ours, other)]
    return figures


def table_row(name: str, figures: dict) -> str:
    """One row of the table."""
    cells = [name]
    for tpu in TOPOLOGIES:
        ours, other = ((each["estimated"] + each["priced"]) / 1e6 for each in figures[tpu])
        cells += [f"{ours:.1f}", f"{other:.1f} ({figures[tpu][1]['estimated'] / 1e6:.1f})", f"{other / ours:.2f}"]
    ours, other = figures["seconds"]
    cells += [f"{ours:.2f}", f"{other:.2f}", f"{other / ours:.2f}"]
    return f"| {' | '.join(cells)} |\n"


HEAD = """| ours / the other form | v5p: ours | other | ratio | v6e: ours | other | ratio | CPU: ours | other | ratio |
|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains TEXT")
    only = parser.parse_args().only
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name, row in ROWS.items():
        if only in name:
            kept[name] = measure(*row)
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    table = HEAD + "".join(table_row(name, figures) for name, figures in kept.items())
    before, _, rest = PAGE.read_text().partition("<!-- kernels -->\n")
    after = rest.partition("<!-- end of kernels -->")[2]
    PAGE.write_text(f"{before}<!-- kernels -->\n{table}<!-- end of kernels -->{after}")


if __name__ == "__main__":
    main()
