"""What parameters are: their kinds and dimensions, and what decay and freezing make of them."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.config import Rule, Run
from jaxmllm.errors import ConfigError
from jaxmllm.fusers.single import Single
from jaxmllm.mllm import MLLM
from jaxmllm.nn.param_info import KINDS, ParamInfo
from jaxmllm.objectives.next_token import NextToken
from jaxmllm.train.optim import transformation
from jaxmllm.train.optimizers import AdamW
from jaxmllm.train.schedules import Constant
from jaxmllm.train.setup import abstract_params, stage_program
from jaxmllm.train.state import match_rules
from tests import visual_zoo as zoo
from tests.step_case import tiny_run

RATE, DECAY = 0.5, 0.25


def described(run: Run) -> tuple[dict, dict]:
    """(shapes of the parameters, what they are)."""
    mesh = run.mesh.build()
    with jax.set_mesh(mesh):
        return abstract_params(run, mesh)


@pytest.fixture(scope="module")
def toy():
    return described(tiny_run())


@pytest.fixture(scope="module")
def normalised() -> Run:
    """A run whose encoder has batch normalisation."""
    parts = {"a": zoo.ENCODERS["efficient"]}, {"a": Single()}, MLPProjector(4), zoo.DECODER
    model, base = MLLM(*parts, {"next_token": NextToken(chunk=64)}), tiny_run()
    stage = dataclasses.replace(base.stages[0], rules=(Rule(".*"),), losses={"next_token": 1.0})
    return dataclasses.replace(base, model=model, stages=(stage,))


def test_every_parameter_of_the_toy_has_a_kind_and_dimensions(toy):
    shapes, infos = toy
    assert shapes.keys() == infos.keys() and len(infos) > 100
    kinds = {
        "kernel": "matrix",
        "embedding": "embedding",
        "scale": "norm",
        "bias": "bias",
        "value": "array",
    }
    for path, info in infos.items():
        assert info.kind == kinds[path.split("/")[-1]] in KINDS, path
        assert len(info.dims) == shapes[path].ndim, path
        stacked = info.dims.count("layers")
        assert info.dims[:stacked] == ("layers",) * stacked, path
        assert (0 < info.inputs < shapes[path].ndim - stacked) == (info.kind == "matrix"), path


@pytest.mark.parametrize(
    "path, info",
    {
        "llm/embedding/embedding": ParamInfo("embedding", ("vocab", "embed")),
        "llm/norm/scale": ParamInfo("norm", (None,)),
        "llm/blocks/layers/block/norm1/scale": ParamInfo("norm", ("layers", None)),
        "llm/blocks/layers/block/attn/q/kernel": ParamInfo("matrix", ("layers", "embed", "heads", None, None), 1),
        "llm/blocks/layers/block/attn/out/kernel": ParamInfo("matrix", ("layers", "heads", None, None, "embed"), 3),
        "llm/blocks/layers/block/mlp/down/kernel": ParamInfo("matrix", ("layers", "mlp", "embed"), 1),
        "encoders_clip/blocks/layers/block/mlp/up/bias": ParamInfo("bias", ("layers", "mlp")),
        "objectives_depth/table/value": ParamInfo("array", (None, None)),
        "objectives_depth/logit_scale/value": ParamInfo("array", ()),
    }.items(),
)
def test_parameters_of_the_toy(toy, path, info):
    assert toy[1][path] == info


def test_statistics_are_never_trained(normalised):
    mesh = normalised.mesh.build()
    shapes, infos = described(normalised)
    statistics = {path for path, info in infos.items() if info.kind == "statistic"}
    assert statistics == {path for path in infos if path.endswith(("/mean", "/var"))} and len(statistics) > 5
    with jax.set_mesh(mesh):
        abstract, new_train_state, _ = stage_program(normalised, normalised.stages[0], mesh)
        state = jax.eval_shape(new_train_state, abstract)
    assert state.frozen.keys() == statistics and state.trainable.keys() == shapes.keys() - statistics


def zero_gradient_updates(rule: Rule) -> tuple[dict, dict]:
    """What the first update of AdamW adds to parameters of one without gradients, and the kinds of the parameters."""
    infos = {
        "w": ParamInfo("matrix", ("layers", "embed", None), 1),
        "e": ParamInfo("embedding", ("vocab", "embed")),
        "a": ParamInfo("array", (None,)),
        "n": ParamInfo("norm", (None,)),
        "b": ParamInfo("bias", (None,)),
        "s": ParamInfo("statistic", (None,)),
    }
    params = {path: jnp.ones((2,) * len(info.dims)) for path, info in infos.items() if info.kind != "statistic"}
    optimizer = AdamW(lr=RATE, schedule=Constant(), weight_decay=DECAY)
    tx = transformation(optimizer, 10, match_rules((rule,), list(infos)), infos)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    return {path: float(u.mean()) for path, u in updates.items()}, {path: info.kind for path, info in infos.items()}


@pytest.mark.parametrize(
    "rule, decayed",
    [
        (Rule(".*"), {"matrix", "embedding", "array"}),
        (Rule(".*", decay=True), {"matrix", "embedding", "array", "norm", "bias"}),
        (Rule(".*", decay=False), set()),
        (Rule(".*", lr=0.5), {"matrix", "embedding", "array"}),
    ],
    ids=str,
)
def test_what_is_decayed(rule, decayed):
    """A parameter without a gradient changes by rate * decay, or not at all."""
    updates, kinds = zero_gradient_updates(rule)
    assert "s" not in updates and len(updates) == 5
    for path, update in updates.items():
        assert update == pytest.approx(-RATE * rule.lr * DECAY if kinds[path] in decayed else 0.0), path


def test_decay_of_the_toy_in_its_own_stage(toy):
    """The optimizer of a stage decays no norm and no bias: with zero gradients exactly these stay as they are."""
    shapes, infos = toy
    stage = tiny_run().stages[0]
    tx = transformation(stage.optim, stage.steps, match_rules(stage.rules, list(infos)), infos)
    ones = {path: np.ones(x.shape, np.float32) for path, x in shapes.items()}
    updates, _ = jax.jit(lambda p: tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p))(ones)
    kept = {path for path, u in updates.items() if not np.asarray(u).any()}
    assert kept == {path for path, info in infos.items() if info.kind in ("norm", "bias")}


class Unknown(nn.Module):
    """A fuser that makes its parameter without a layer of nn/primitives.py."""

    def output(self, maps):
        return maps[-1]

    @nn.compact
    def __call__(self, taps):
        return Single()(taps * self.param("mine", nn.initializers.ones, (1,)))


def test_a_parameter_of_unknown_kind_is_named():
    run = tiny_run()
    fusers = {**run.model.fusers, "dino": Unknown()}
    with pytest.raises(
        ConfigError, match="fusers_dino/mine has no kind; make it with a layer of jaxmllm.nn.primitives"
    ):
        described(dataclasses.replace(run, model=run.model.clone(fusers=fusers)))
