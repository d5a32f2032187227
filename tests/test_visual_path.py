"""Fusers and aggregators run and train, each part alone and in each legal pair, on one device and on eight."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.batch import MapShape
from jaxmllm.mllm import MLLM
from jaxmllm.train.state import flatten, unflatten
from tests import visual_zoo as zoo
from tests.conftest import ROOT, simulated
from tests.golden_case import shapes

# Parameters without a gradient: a bias that all keys share, since softmax ignores it (in SVA: with one encoder), and
# stored statistics.
NO_GRADIENT = re.compile(r"/k/bias$|/k_norm_\d+/bias$|/mean$|/var$")


@pytest.fixture(scope="module")
def covered():
    """Tokens and gradients of models that together contain each part."""
    return zoo.run(zoo.covering())


def check_pass(tokens: np.ndarray, grads: dict, model: MLLM, least: float) -> None:
    """Checks the promised shape, finite numbers, and that each parameter has a gradient above `least`."""
    assert tokens.shape == (zoo.IMAGES, model.layout.block, zoo.LLM)
    assert np.isfinite(tokens).all()
    for path, g in grads.items():
        assert np.isfinite(g).all(), path
        assert NO_GRADIENT.search(path) or np.abs(g).max() > least, path


def test_every_part_runs_and_trains(covered):
    models, (tokens, grads) = zoo.covering(), covered
    assert {type(m.aggregator) for m in models.values()} == {type(a) for a in zoo.AGGREGATORS.values()}
    assert {type(f) for m in models.values() for f in m.fusers.values()} == {type(f) for f in zoo.FUSERS.values()}
    for name, model in models.items():
        check_pass(tokens[name], grads[name], model, 1e-4)


def test_each_encoder_has_its_own_fuser():
    """This also holds if the same object is given for all of them."""
    model = zoo.model(("clip", "dino"), "weighted", "mlp")
    path, (taps, masks) = zoo.Path(model.fusers, model.aggregator), zoo.inputs({"": model})
    assert {"fusers_clip/logits/value", "fusers_dino/logits/value"} <= set(shapes(path, taps, masks))


def test_eight_devices(covered):
    """The same numbers with the batch split over fsdp 4, heads and hidden channels over tensor 2, weights over both."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.visual_zoo"], cwd=ROOT, env=simulated(8), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout), zoo.norms(*covered)
    assert found.keys() == expected.keys()
    for name, norm in expected.items():
        largest = max(x for other, x in expected.items() if other.split(":")[0] == name.split(":")[0])
        assert found[name] == pytest.approx(norm, rel=1e-4, abs=1e-5 * largest), name


def test_bfloat16_stays_bfloat16():
    """The tokens stay bfloat16 although norms, softmax and sampling are computed in float32."""
    models = zoo.covering()
    taps, masks = zoo.inputs(models)
    for name, model in models.items():
        path = zoo.Path(model.fusers, model.aggregator)
        half = {encoder: jax.ShapeDtypeStruct(taps[encoder].shape, jnp.bfloat16) for encoder in model.encoders}
        init = lambda *args, path=path: path.init(jax.random.key(0), *args)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), jax.eval_shape(init, half, masks))
        tokens = jax.eval_shape(path.apply, params, half, masks)
        assert tokens.dtype == jnp.bfloat16, name
        assert tokens.shape == (zoo.IMAGES, model.layout.block, zoo.LLM), name


# Which pairs are legal


ENCODER_SETS = [
    *((name,) for name in zoo.ENCODERS),
    ("clip", "dino"),
    ("clip", "fine"),
    ("siglip", "wide"),
    ("dino", "swin"),
]
# With a single map, the averages and Concat are the same as Single.
FUSED = [
    (encoders, fuser)
    for encoders, fuser in itertools.product(ENCODER_SETS, zoo.FUSERS)
    if fuser in ("single", "fpn") or all(len(zoo.ENCODERS[name].maps) > 1 for name in encoders)
]


def all_pairs():
    """(encoders, fuser, aggregator, why it is illegal or None)."""
    for encoders, fuser, aggregator in itertools.product(ENCODER_SETS, zoo.FUSERS, zoo.AGGREGATORS):
        try:
            zoo.model(encoders, fuser, aggregator)
            yield encoders, fuser, aggregator, None
        except ValueError as error:
            yield encoders, fuser, aggregator, str(error)


@pytest.mark.parametrize("name", zoo.ENCODERS)
def test_encoders_give_the_maps_they_promise(name):
    encoder = zoo.ENCODERS[name]
    pictures = jax.ShapeDtypeStruct((2, encoder.size, encoder.size, 3), jnp.uint8)
    found, _ = jax.eval_shape(lambda x: encoder.init_with_output(jax.random.key(0), x), pictures)
    assert found.shape[1] == 2 and encoder.maps == (MapShape(*found.shape[2:]),) * len(found)
    assert encoder.maps[0].h == encoder.input.grid


def test_legal_pairs():
    found = list(all_pairs())
    legal = [(encoders, fuser, aggregator) for encoders, fuser, aggregator, why in found if why is None]
    for encoders, fuser, aggregator, why in found:
        several, sti = len(encoders) > 1, fuser == "sti"
        maps = [zoo.ENCODERS[name].maps for name in encoders]
        grids = {m[0].h for m in maps}
        widths = {m[0].c * (len(m) if fuser == "concat" else 1) for m in maps}
        needs = {
            "linear": not sti or (not several and grids == {4}),
            "additive": several and not sti and len(grids) == len(widths) == 1,
            "interleaved": several and not sti and len(grids) == 1,
            "resampler": True,
            "qformer": len(widths) == 1,
            "shuffle": not sti and grids == {4},
            "abstractor": not sti and len(grids) == 1,
            "sva": not sti,
        }
        fusable = fuser in zoo.ONE_MAP or all(len(m) > 1 for m in maps)
        expected = fusable and needs["linear" if aggregator == "mlp" else aggregator]
        assert (why is None) == expected, (encoders, fuser, aggregator, why)
        assert why is None or ("\n" not in why and len(why) < 200)
    assert {pair[1] for pair in legal} == set(zoo.FUSERS) and {pair[2] for pair in legal} == set(zoo.AGGREGATORS)


class Everything(nn.Module):
    """Encoders and fusers, and then several aggregators: pictures -> the tokens of each aggregator."""

    encoders: dict[str, nn.Module]
    fusers: dict[str, nn.Module]
    aggregators: dict[str, nn.Module]

    def __call__(self, images: dict, masks: dict) -> dict[str, jax.Array]:
        maps = {name: self.fusers[name](encoder(images[name])) for name, encoder in self.encoders.items()}
        return {name: aggregate(maps, masks, zoo.LLM).tokens for name, aggregate in self.aggregators.items()}


@pytest.mark.long
@pytest.mark.parametrize("encoders, fuser", FUSED, ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_every_legal_pair(encoders, fuser):
    """Forward and backward through encoders, fuser and aggregator; one program for all aggregators of a fuser."""
    legal = [pair[2] for pair in all_pairs() if pair[:2] == (encoders, fuser) and pair[3] is None]
    models = {name: zoo.model(encoders, fuser, name) for name in legal}
    one = models["resampler"]  # legal with everything
    module = Everything(one.encoders, one.fusers, {name: model.aggregator for name, model in models.items()})
    rng, inputs = np.random.default_rng(0), one.layout.encoders
    images = {k: rng.integers(0, 256, (zoo.IMAGES, e.size, e.size, 3), np.uint8) for k, e in inputs.items()}
    masks = {k: np.ones((zoo.IMAGES, e.grid, e.grid), bool) for k, e in inputs.items()}
    counts = {name: model.layout.tokens.count for name, model in models.items()}
    cotangents = {name: rng.normal(size=(zoo.IMAGES, count, zoo.LLM)) for name, count in counts.items()}

    def loss(params, images):
        tokens = module.apply({"params": unflatten(params)}, images, masks)
        return sum(jnp.sum(tokens[name] * cotangents[name]) for name in tokens), tokens

    init = lambda *args: module.init(jax.random.key(0), *args)["params"]
    params = zoo.random_like(flatten(jax.eval_shape(init, images, masks)), 0)
    run = jax.jit(jax.grad(loss, has_aux=True))
    grads, tokens = jax.device_get(run(params, images))
    for name, model in models.items():
        mine = {
            path: g for path, g in grads.items() if path.startswith(("encoders_", "fusers_", f"aggregators_{name}/"))
        }
        check_pass(tokens[name], mine, model, 0)  # random weights saturate some of the softmaxes
