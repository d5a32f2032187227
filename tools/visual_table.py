"""Prints parameters and FLOPs of every fuser and aggregator at the sizes of its paper, for docs/visual_path.md.

    python tools/visual_table.py

Nothing is allocated or compiled. FLOPs are those of one image, forward, as XLA counts them before it optimises the
program (a multiply-add is two).
"""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm.aggregators.c_abstractor import CAbstractor
from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.aggregators.mof import AdditiveMoF, InterleavedMoF
from jaxmllm.aggregators.pixel_shuffle import PixelShuffle
from jaxmllm.aggregators.qformer import QFormer
from jaxmllm.aggregators.resampler import Resampler
from jaxmllm.aggregators.sva import SVA, SVALayer, to_memory
from jaxmllm.batch import FeatureMap, MapShape
from jaxmllm.fusers.average import Average, WeightedAverage
from jaxmllm.fusers.concat import Concat
from jaxmllm.fusers.dense_connector import STI, dci, sci
from jaxmllm.fusers.fpn import FPN
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.fusers.single import Single
from jaxmllm.train.state import flatten

H = 4096  # width of a language model with 7 or 8 billion parameters
CLIP = MapShape(24, 24, 1024)
CAMBRIAN = {
    "siglip": MapShape(24, 24, 1152), "clip": CLIP,
    "dino": MapShape(24, 24, 1536), "convnext": MapShape(96, 96, 5760),
}  # fmt: skip

FUSERS = {  # name -> (fuser, number of CLIP-L/336 taps)
    "Single": (Single(), 1),
    "Average": (Average(), 5),
    "WeightedAverage": (WeightedAverage(), 5),
    "Concat": (Concat(), 5),
    'Concat, "all" of Lin et al.': (Concat((tuple(range(12)), tuple(range(12, 24)), (22,))), 24),
    "FPN": (FPN(), 5),
    "STI": (STI(), 3),
    "SCI": (sci(), 3),
    "DCI": (dci(), 24),
    "MMFuser, deformable": (MMFuser(), 5),
    "MMFuser, global": (MMFuser(attention="global"), 5),
    "MMFuser, linear": (MMFuser(attention="linear"), 5),
}
AGGREGATORS = {  # name -> (aggregator, maps)
    "MLPProjector, depth 1": (MLPProjector(24, depth=1), {"clip": CLIP}),
    "MLPProjector": (MLPProjector(24), {"clip": CLIP}),
    "MLPProjector, after SCI or DCI": (MLPProjector(24), {"clip": MapShape(24, 24, 3072)}),
    "MLPProjector, after Concat of 5": (MLPProjector(24), {"clip": MapShape(24, 24, 5120)}),
    "MLPProjector, after STI": (MLPProjector(24), {"clip": MapShape(24, 24, 1024, 144)}),
    "MLPProjector, Cambrian's four": (MLPProjector(24), CAMBRIAN),
    "AdditiveMoF": (AdditiveMoF(), {"clip": CLIP, "dino": CLIP}),
    "InterleavedMoF": (InterleavedMoF(), {"clip": CLIP, "dino": CLIP}),
    "Resampler": (Resampler(1024), {"clip": CLIP}),
    "QFormer": (QFormer(), {"clip": MapShape(16, 16, 1408)}),
    "PixelShuffle": (PixelShuffle(12), {"clip": CLIP}),
    "CAbstractor": (CAbstractor(), {"clip": CLIP}),
    "SVA": (SVA(1024, 24), CAMBRIAN),
}


def measure(module: nn.Module, *args, **static) -> tuple[int, float]:
    """(parameters, FLOPs) of a module for abstract inputs and other arguments."""
    init = lambda *args: module.init(jax.random.key(0), *args, **static)
    variables = jax.eval_shape(init, *args)
    count = sum(math.prod(x.shape) for x in flatten(variables.get("params", {})).values())
    lowered = jax.jit(partial(module.apply, **static)).lower(variables, *args)
    return count, lowered.cost_analysis().get("flops", 0.0)


def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An abstract array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def measure_fuser(fuser: nn.Module, taps: int) -> tuple[int, float]:
    """One fuser on `taps` taps of CLIP-L/336."""
    return measure(fuser, array(taps, 1, *CLIP[:3]))


def measure_aggregator(aggregator: nn.Module, maps: dict[str, MapShape]) -> tuple[int, float]:
    """One aggregator on the maps of these encoders."""
    aggregator.layout(maps)
    features = {k: FeatureMap(array(1, *m[:3]), array(1, m.extra, m.c) if m.extra else None) for k, m in maps.items()}
    masks = {k: array(1, m.h, m.w, dtype=jnp.bool_) for k, m in maps.items()}
    return measure(aggregator, features, masks, llm_width=H)


def measure_in_llm(width: int) -> tuple[int, float]:
    """One SVA layer inside a language model, as in Cambrian-1."""
    sides = [m.h for m in CAMBRIAN.values()]
    features = [array(1, side, side, 1024) for side in sides]
    masks = [array(1, side, side, dtype=jnp.bool_) for side in sides]
    memory = jax.eval_shape(partial(to_memory, grid=24), features, masks, array(1, 1024))
    return measure(SVALayer(1024), array(1, 24**2, width), memory)


def main() -> None:
    """Prints the rows of the table."""
    rows = {name: measure_fuser(*what) for name, what in FUSERS.items()}
    rows |= {name: measure_aggregator(*what) for name, what in AGGREGATORS.items()}
    rows["SVALayer in the language model"] = measure_in_llm(H)
    for name, (count, flops) in rows.items():
        print(f"| {name} | {count:,} | {flops / 1e9:.2f} |")


if __name__ == "__main__":
    main()
