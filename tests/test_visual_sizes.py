"""Parameters of fusers and aggregators at the sizes of the published models."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxmllm.aggregators.sva import SVA, SVALayer, to_memory
from jaxmllm.batch import FeatureMap
from jaxmllm.fusers.mmfuser import MMFuser
from tests.golden_case import shapes
from tools import visual_table


@pytest.mark.parametrize(
    "name, parameters",
    {
        "Average": 0,
        "WeightedAverage": 5,
        "DCI": 0,
        "MMFuser, deformable": 5_190_592,
        "MMFuser, global": 8_404_992,
        "MMFuser, linear": 8_404_992 + 2 * (1024 * 1024 + 3 * 1024),
        "FPN": 5 * (1024 * 1024 + 1024) + 9 * 1024 * 1024 + 1024,
    }.items(),
)
def test_parameters_of_fusers(name, parameters):
    fuser, count = visual_table.FUSERS[name]
    ours = shapes(fuser, visual_table.array(count, 1, 24, 24, 1024)) if parameters else {}
    assert sum(map(math.prod, ours.values())) == parameters


def test_parameters_of_mmfuser_by_levels():
    """Counts of the reference, run with other numbers of levels."""
    for levels, parameters in ((1, 4_600_192), (2, 4_796_992), (12, 6_764_992), (24, 9_126_592)):
        ours = shapes(MMFuser(), visual_table.array(levels + 1, 1, 24, 24, 1024))
        assert sum(map(math.prod, ours.values())) == parameters


def count_aggregator(aggregator, maps, width: int = visual_table.H) -> int:
    features = {k: FeatureMap(visual_table.array(1, *m[:3])) for k, m in maps.items()}
    masks = {k: visual_table.array(1, m.h, m.w, dtype=jnp.bool_) for k, m in maps.items()}
    return sum(map(math.prod, shapes(aggregator, features, masks, llm_width=width).values()))


@pytest.mark.parametrize(
    "name, parameters",
    {
        "MLPProjector": 20_979_712,
        "MLPProjector, after SCI or DCI": 29_368_320,
        "MLPProjector, after Concat of 5": 37_756_928,
        "AdditiveMoF": 20_979_712,
        "InterleavedMoF": 2 * 20_979_712,
        # transformers' modules of this size, their learned queries, and the linear layer to the language model
        "Resampler": 88_184_832 + 1024 * 4096 + 4096,
        "QFormer": 105_137_664 + 32 * 768 + 768 * 4096 + 4096,
    }.items(),
)
def test_parameters_of_aggregators(name, parameters):
    assert count_aggregator(*visual_table.AGGREGATORS[name]) == parameters


@pytest.mark.parametrize(
    "width, layers, parameters", [(4096, 10, 302_760_960), (5120, 10, 334_221_312), (7168, 9, 375_085_056)]
)
def test_parameters_of_cambrian(width, layers, parameters):
    """All parameters that Cambrian-1 8B, 13B and 34B add to the language model and the encoders."""
    sva = SVA(1024, 24)
    sides = [m.h for m in visual_table.CAMBRIAN.values()]
    array = visual_table.array
    features = [array(1, side, side, 1024) for side in sides]
    masks = [array(1, side, side, dtype=jnp.bool_) for side in sides]
    memory = jax.eval_shape(partial(to_memory, grid=24), features, masks, array(1, 1024))
    inside = shapes(SVALayer(1024), array(1, 24**2, width), memory)
    new = count_aggregator(sva, visual_table.CAMBRIAN, width) + layers * sum(map(math.prod, inside.values()))
    assert new == parameters
