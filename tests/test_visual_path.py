"""Fusers and aggregators: every part runs, alone and in every legal pair, sharded too; formulas; sizes; refusals."""

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

from jaxmllm.aggregators.mlp import MLPProjector, Projector
from jaxmllm.aggregators.mof import AdditiveMoF, InterleavedMoF
from jaxmllm.aggregators.sva import SVA, SVALayer, to_memory
from jaxmllm.batch import EncoderInput, FeatureMap, MapShape, TokenLayout, VisualLayout
from jaxmllm.data.samples import image_places
from jaxmllm.fusers.average import Average, WeightedAverage
from jaxmllm.fusers.concat import Concat
from jaxmllm.fusers.dense_connector import STI, dci
from jaxmllm.fusers.fpn import FPN
from jaxmllm.fusers.level_attention import GlobalAttention
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.fusers.single import Single
from jaxmllm.llms.decoder import Decoder
from jaxmllm.llms.inserts import Inserts
from jaxmllm.mllm import MLLM
from jaxmllm.nn.maps import Tokens
from jaxmllm.objectives.embed_distill import EmbedDistill
from jaxmllm.train.state import flatten, unflatten
from tests import visual_zoo as zoo
from tests.conftest import ROOT, simulated
from tests.golden_case import shapes

# A softmax does not feel what all its keys have in common, so their bias gets nothing (in SVA: with one encoder); nor
# are stored statistics trained.
STILL = re.compile(r"/k/bias$|/k_norm_\d+/bias$|/mean$|/var$")


@pytest.fixture(scope="module")
def covered():
    """Tokens and gradients of the models that contain every part."""
    return zoo.run(zoo.covering())


def check_pass(tokens: np.ndarray, grads: dict, model: MLLM, least: float) -> None:
    """The promised shape, finite numbers, and every parameter moves the tokens: a gradient over `least`."""
    assert tokens.shape == (zoo.IMAGES, model.layout.block, zoo.LLM)
    assert np.isfinite(tokens).all()
    for path, g in grads.items():
        assert np.isfinite(g).all(), path
        assert STILL.search(path) or np.abs(g).max() > least, path


def test_every_part_runs_and_trains(covered):
    models, (tokens, grads) = zoo.covering(), covered
    assert {type(m.aggregator) for m in models.values()} == {type(a) for a in zoo.AGGREGATORS.values()}
    assert {type(f) for m in models.values() for f in m.fusers.values()} == {type(f) for f in zoo.FUSERS.values()}
    for name, model in models.items():
        check_pass(tokens[name], grads[name], model, 1e-4)


def test_every_encoder_has_a_fuser_of_its_own():
    """Also if one object is given for all."""
    model = zoo.model(("clip", "dino"), "weighted", "mlp")
    path, (taps, masks) = zoo.Path(model.fusers, model.aggregator), zoo.inputs({"": model})
    assert {"fusers_clip/logits/value", "fusers_dino/logits/value"} <= set(shapes(path, taps, masks))


def test_eight_devices(covered):
    """The same numbers with the batch over fsdp 4, heads and hidden channels over tensor 2, weights over both."""
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
    """Nothing turns the tokens into float32 on the way, where norms, softmax and sampling are computed."""
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
# With one map the averages and Concat are Single again.
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
    """Pictures through encoders and fusers to the tokens of several aggregators."""

    encoders: dict[str, nn.Module]
    fusers: dict[str, nn.Module]
    aggregators: dict[str, nn.Module]

    def __call__(self, images: dict, masks: dict) -> dict[str, jax.Array]:
        maps = {name: self.fusers[name](encoder(images[name])) for name, encoder in self.encoders.items()}
        return {name: aggregate(maps, masks).tokens for name, aggregate in self.aggregators.items()}


@pytest.mark.long
@pytest.mark.parametrize("encoders, fuser", FUSED, ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_every_legal_pair(encoders, fuser):
    """Pictures to tokens and back to every parameter, encoders included; one program for all aggregators of a fuser."""
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
        check_pass(tokens[name], mine, model, 0)  # random weights saturate a softmax here and there


VIT = zoo.ENCODERS["clip"]


def mllm(fuser=None, aggregator=None, llm=None, **distill) -> MLLM:
    return MLLM({"a": VIT}, {"a": fuser or Single()}, aggregator or MLPProjector(24, 4), llm or zoo.DECODER, distill)


@pytest.mark.parametrize(
    "parts, message",
    [
        (dict(fuser=Single(3)), "encoder 'a': Single: there is no tap 3 among 3"),
        (dict(fuser=Concat(((0,), (5,)))), r"encoder 'a': Concat: group \(5,\) must name some of the 3 taps"),
        (dict(fuser=dci()), r"encoder 'a': Concat: group \(23,\)"),
        (dict(fuser=STI(17)), "encoder 'a': STI needs at least two taps of 17 cells"),
        (dict(fuser=MMFuser(heads=3)), "encoder 'a': MMFuser needs taps of one width that 3 heads divide, not 4 x 4 x"),
        (dict(fuser=MMFuser(2, levels=4)), "encoder 'a': MMFuser: 3 taps cannot be a query and 4 levels"),
        (dict(fuser=MMFuser(2, attention="sparse")), "attention is deformable, global or linear, not 'sparse'"),
        (dict(aggregator=AdditiveMoF(24)), "AdditiveMoF adds the maps of two encoders, not of 1"),
        (dict(aggregator=InterleavedMoF(24)), "InterleavedMoF needs at least two encoders"),
        (dict(aggregator=SVA(8, 24, 3, heads=2)), "SVA: grid 4 x 4 of encoder 'a' must be square and a multiple of 3"),
        (dict(aggregator=SVA(9, 24, 4, heads=2)), "SVA: width 9 must be a multiple of its 2 heads"),
        (dict(aggregator=MLPProjector(23, 4)), "gives tokens of width 23, the language model has 24"),
        (
            dict(llm=Decoder(40, 24, 2, 2, 2, 24, inserts=Inserts(0, 1, 1), insert=SVALayer(8, 2))),
            "MLPProjector has no windows on a grid of 4 for layers inside",
        ),
        (
            dict(seg=EmbedDistill(9, 4, 24, (1,), 1, aligned=True)),
            "its 9 queries stand at cells, and MLPP",
        ),
    ],
)
def test_what_does_not_fit_is_refused(parts, message):
    with pytest.raises(ValueError, match=message) as error:
        mllm(**parts)
    assert "\n" not in str(error.value)


def test_maps_of_different_sizes():
    """A pyramid of an encoder that gives a list: what each fuser says of it."""
    pyramid = MapShape(8, 8, 16), MapShape(4, 4, 16), MapShape(2, 2, 16)
    assert FPN().output(pyramid) == (8, 8, 16, 0)
    assert MMFuser(heads=2).output(pyramid) == (2, 2, 16, 0)
    for fuser in (Average(), Concat(), STI(2), WeightedAverage()):
        with pytest.raises(ValueError, match="needs maps of one"):
            fuser.output(pyramid)
    with pytest.raises(ValueError, match="from fine to coarse, not 2 x 2, 4 x 4"):
        FPN().output(pyramid[::-1])


# Formulas that no golden file shows


def taps(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).normal(size=shape).astype(np.float32))


def apply(module, params, *args):
    with jax.default_matmul_precision("highest"):
        return module.apply({"params": params}, *args)


def test_averages():
    x = taps(3, 2, 4, 4, 5)
    np.testing.assert_allclose(Average().apply({}, x).cells, np.mean(x, 0), atol=1e-6)
    fresh = WeightedAverage().init_with_output(jax.random.key(0), x)[0].cells
    np.testing.assert_allclose(fresh, np.mean(x, 0), atol=1e-6)
    weights = np.array([0.5, 0.3, 0.2])
    y = apply(WeightedAverage(), {"logits": {"value": jnp.log(weights)}}, x).cells
    np.testing.assert_allclose(y, np.tensordot(weights, x, 1), atol=1e-6)
    assert Average().apply({}, x.astype(jnp.bfloat16)).cells.dtype == jnp.bfloat16


def test_dense_connector_of_siglip():
    """27 states without class token; 27 x 27 cells leave one over, and means straddle rows."""
    x = taps(27, 1, 27, 27, 2)
    tokens = np.asarray(x).reshape(27, 729, 2)
    fused = STI().apply({}, x[np.array([7, 15, 26])])
    assert fused.extra.shape == (1, 182, 2)
    np.testing.assert_allclose(fused.extra[0, 91:], tokens[15, :728].reshape(91, 8, 2).mean(1), atol=1e-6)
    np.testing.assert_array_equal(fused.cells[0].reshape(729, 2), tokens[26])
    expected = np.concatenate([tokens[26], tokens[:13].mean(0), tokens[13:26].mean(0)], 1)
    np.testing.assert_allclose(dci(13, final=26).apply({}, x).cells[0].reshape(729, 6), expected, atol=1e-6)


def test_tokens_beside_the_grid_follow_it():
    fused, aggregator = FeatureMap(taps(2, 4, 4, 5), taps(2, 3, 5)), MLPProjector(7, 4)
    assert aggregator.layout({"a": MapShape(4, 4, 5, 3)}).count == 19
    params = aggregator.init(jax.random.key(0), {"a": fused}, {})["params"]
    tokens = apply(aggregator, params, {"a": fused}, {}).tokens
    whole = jnp.concatenate([fused.cells.reshape(2, 16, 5), fused.extra], 1)
    np.testing.assert_allclose(tokens, apply(Projector(7), params["projector"], whole), atol=1e-6)


def test_mixture_of_features():
    a, b = taps(2, 4, 4, 5), taps(2, 4, 4, 5)[::-1]
    maps = {"a": FeatureMap(a), "b": FeatureMap(b)}
    mof = AdditiveMoF(7, alpha=0.25)
    params = mof.init(jax.random.key(0), maps, {})["params"]
    expected = apply(Projector(7), params["projector"], (0.25 * a + 0.75 * b).reshape(2, 16, 5))
    np.testing.assert_allclose(apply(mof, params, maps, {}).tokens, expected, atol=1e-6)
    lined = InterleavedMoF(7, newline=True)
    params = lined.init(jax.random.key(0), maps, {})["params"]
    tokens = np.asarray(apply(lined, params, maps, {}).tokens).reshape(2, 4, 9, 7)
    second = np.asarray(apply(Projector(7), params["projector_b"], b))
    np.testing.assert_allclose(tokens[:, :, 1:8:2], second, atol=1e-6)
    np.testing.assert_allclose(tokens[0, :, 8], np.tile(params["newline"]["value"], (4, 1)), atol=0)


def test_fresh_mmfuser_is_the_query():
    """Exactly, for every attention, on grids that are not square and differ."""
    levels = [taps(2, 3, 5, 8), taps(2, 6, 4, 8), taps(2, 2, 7, 8)]
    for attention in ("deformable", "global", "linear"):
        fuser = MMFuser(heads=2, attention=attention, pooled=2)
        fused = jax.jit(fuser.init_with_output)(jax.random.key(0), levels)[0]
        np.testing.assert_array_equal(fused.cells, levels[-1])


@pytest.mark.parametrize(
    "options, used", [({}, [0, 1, 2, 3, 4]), (dict(levels=2), [0, 1, 4]), (dict(query=2, levels=2), [0, 1, 2])]
)
def test_taps_that_mmfuser_reads(options, used):
    fuser, x = MMFuser(heads=2, attention="global", **options), taps(5, 1, 2, 2, 8)
    init = lambda x: fuser.init(jax.random.key(0), x)["params"]
    params = unflatten(zoo.random_like(flatten(jax.eval_shape(init, x)), 0))
    loss = lambda x: jnp.sum(fuser.apply({"params": params}, x).cells ** 2)
    grad = jax.jit(jax.grad(loss))(x)
    assert np.flatnonzero(np.abs(grad).max((1, 2, 3, 4))).tolist() == used


def test_global_attention_of_mmfuser():
    """Against the formula in numpy."""
    query, levels = taps(1, 6, 8), [Tokens.of(taps(1, 1, h, w, 8)) for h, w in ((2, 3), (1, 2))]
    module = GlobalAttention(2)
    params = module.init(jax.random.key(0), query, None, levels)["params"]
    x = np.concatenate([np.asarray(level.x).reshape(1, -1, 8) for level in levels], 1)[0]
    w = {k: np.asarray(v["kernel"], np.float64).reshape(8, -1) for k, v in params["attn"].items()}
    q, k, v = np.asarray(query)[0] @ w["q"], x @ w["k"], x @ w["v"]
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        e = np.exp(q[:, h] @ k[:, h].T / 2)
        heads.append(e / e.sum(1, keepdims=True) @ v[:, h])
    np.testing.assert_allclose(apply(module, params, query, None, levels)[0], np.hstack(heads) @ w["out"], atol=1e-5)


def test_gated_sva_starts_as_the_identity():
    layer, query = SVALayer(8, 2, gate=True), taps(2, 16, 6)
    memory = to_memory([taps(2, 8, 8, 8)], [jnp.ones((2, 8, 8), bool)], taps(2, 8), 4)
    np.testing.assert_array_equal(layer.init_with_output(jax.random.key(0), query, memory)[0], query)


def test_places_of_tokens_in_the_row():
    """unpad leaves out what shows only padding, of every encoder's token alike; other tokens always stand."""
    encoders = {"a": EncoderInput(16, 4, (0, 0, 0))}
    wide = (200, 100)  # rows 0 and 3 of 4 are padding
    layout = VisualLayout(encoders, TokenLayout(8, 4, newline=True, unpad=True, per_cell=2, extra=3), 2)
    assert layout.tokens.columns == 9 and layout.tokens.count == 39 and layout.block == 41
    assert image_places(1, wide, layout) == [*range(41 + 9, 41 + 27), *range(41 + 36, 41 + 41)]
    tall = image_places(0, (100, 200), layout)
    assert [t for t in tall if t < 9] == [2, 3, 4, 5, 8], "columns 0 and 3 go, the newline stays"
    kept = VisualLayout(encoders, TokenLayout(8, 4, newline=True, extra=3), 2)
    assert image_places(0, wide, kept) == list(range(4 * 5 + 3 + 2))
    assert image_places(0, wide, VisualLayout(encoders, TokenLayout(8, extra=5), 0)) == [0, 1, 2, 3, 4]
