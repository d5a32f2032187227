"""Parts that are not of the package: an objective, and decoder blocks that hand up an auxiliary loss."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.batch import Term
from jaxmllm.config import Run
from jaxmllm.errors import ConfigError
from jaxmllm.llms.decoder import Decoder, DecoderBlock
from jaxmllm.nn.primitives import Linear
from jaxmllm.objectives.base import Needs, Objective
from tests.step_case import ROWS, S, one_step, tiny_run


class Place(Objective):
    """Tells from the state after a layer where a token stands in its sample: squared error of position / S."""

    layer: int

    @property
    def needs(self) -> Needs:
        return Needs(layers=(self.layer,))

    def count(self, name, batch):
        return (batch.segment_ids > 0).sum()

    @nn.compact
    def __call__(self, view):
        found = Linear((1,), name="head")(view.tapped[self.layer])[..., 0].astype(jnp.float32)
        error, mask = found - view.batch.positions / S, view.batch.segment_ids > 0
        return Term(error**2, mask), {"place_error": Term(jnp.abs(error), mask)}


def with_place(layer: int = 2) -> Run:
    run = tiny_run()
    return dataclasses.replace(run, model=run.model.clone(objectives={**run.model.objectives, "place": Place(layer)}))


def moved(before: dict, after: dict) -> set[str]:
    """The parameters that a step has changed."""
    return {path for path, x in after.items() if (x != before[path]).any()}


def test_an_objective_of_ones_own_trains():
    before, after, metrics = one_step(with_place(), losses={"place": 2.0, "next_token": 1.0})
    assert metrics["loss"] == pytest.approx(2 * metrics["place"] + metrics["next_token"], rel=1e-5)
    assert 0 < metrics["place"] <= metrics["place_error"] * 2 and np.isfinite(metrics["place_error"])
    assert "accuracy" in metrics and "depth" not in metrics
    assert {"objectives_place/head/kernel", "objectives_place/head/bias"} <= moved(before, after)


def test_an_objective_trains_only_what_it_reads():
    """The state after layer 2 of 3 depends on the first two layers only; weights that are not decayed show it."""
    before, after, metrics = one_step(with_place(), losses={"place": 1.0})
    assert metrics["loss"] == metrics["place"] and "next_token" not in metrics
    scale, trained = "llm/blocks/layers/block/norm2/scale", moved(before, after)
    assert (after[scale][:2] != before[scale][:2]).all() and (after[scale][2] == before[scale][2]).all()
    assert "llm/norm/scale" not in trained and "objectives_place/head/bias" in trained


def test_a_layer_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"objectives read the layers \[1, 4\], and the model has 1..3"):
        with_place(4)


class LoudBlock(DecoderBlock):
    """A block that hands up the mean square of its output."""

    @nn.compact
    def __call__(self, x, *inputs):
        x, cache, _ = super().__call__(x, *inputs)
        return x, cache, {"loudness": jnp.square(x.astype(jnp.float32)).mean()}


class LoudDecoder(Decoder):
    aux: ClassVar[tuple[str, ...]] = ("loudness",)

    @nn.nowrap
    def block(self):
        plain = super().block()
        return LoudBlock(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(DecoderBlock) if f.init and
                            f.name not in ("parent", "name")})  # fmt: skip


def loud_run() -> Run:
    run = tiny_run()
    fields = {f.name: getattr(run.model.llm, f.name) for f in dataclasses.fields(Decoder) if f.init}
    llm = LoudDecoder(**{k: v for k, v in fields.items() if k not in ("parent", "name")})
    return dataclasses.replace(run, model=run.model.clone(llm=llm))


@pytest.fixture(scope="module")
def loud():
    """Steps with and without the auxiliary loss, and one in two micro-batches."""
    run, both = loud_run(), {"next_token": 1.0, "loudness": 3.0}
    return {
        "without": one_step(run, losses={"next_token": 1.0}),
        "with": one_step(run, losses=both),
        "parts": one_step(run, losses=both, accumulate=2),
    }


def test_an_auxiliary_loss_changes_the_gradient(loud):
    """It is the mean over layers, a metric in any case, and trains only with a weight."""
    (before, after, plain), (same, other, metrics) = loud["without"], loud["with"]
    for path in before:
        np.testing.assert_array_equal(before[path], same[path])
    assert metrics["loudness"] == plain["loudness"] > 0
    assert plain["loss"] == plain["next_token"] == metrics["next_token"]
    assert metrics["loss"] == pytest.approx(metrics["next_token"] + 3 * metrics["loudness"], rel=1e-6)
    assert abs(metrics["grad_norm"] - plain["grad_norm"]) > 1e-3 * plain["grad_norm"]
    kernel = "llm/blocks/layers/block/mlp/down/kernel"
    assert (other[kernel] != after[kernel]).mean() > 0.1


def test_an_auxiliary_loss_of_micro_batches_is_their_mean(loud):
    """Each micro-batch has as many tokens here, so the mean of their mean squares is that of the whole."""
    whole, parts = loud["with"][2], loud["parts"][2]
    assert ROWS % 2 == 0 and whole.keys() == parts.keys()
    for name in whole:
        assert parts[name] == pytest.approx(whole[name], rel=1e-5), name


def test_an_auxiliary_loss_is_a_loss_name():
    run = loud_run()
    assert "loudness" in run.model.loss_names
    stage = dataclasses.replace(run.stages[0], losses={"loudnes": 1.0})
    with pytest.raises(ConfigError, match="no objective 'loudnes'; did you mean 'loudness'"):
        dataclasses.replace(run, stages=(stage,))
