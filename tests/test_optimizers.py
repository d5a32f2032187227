"""Optimizers: what their updates are, how large their state is, and that a mesh changes nothing."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmllm import recipes
from jaxmllm.config import Rule
from jaxmllm.nn.param_info import ParamInfo
from jaxmllm.train.muon import orthogonalize
from jaxmllm.train.optim import rate, transformation, unreached
from jaxmllm.train.optimizers import Adafactor, AdamW, Muon
from jaxmllm.train.schedules import Constant, Cosine
from jaxmllm.train.state import TrainState
from tests.conftest import ROOT, simulated
from tests.optimizer_meshes import INFOS, made_up

FREE = {"clip": None, "schedule": Constant()}
MATRIX = ParamInfo("matrix", ("embed", None), 1)


def one_update(optimizer, infos, grads, params=None):
    """(updates, state) after one step at the rate 1; parameters are zeros unless given."""
    tx = transformation(optimizer, 10, {path: Rule(".*") for path in infos}, infos)
    params = params or jax.tree.map(jnp.zeros_like, grads)
    return tx.update(grads, tx.init(params), params)


def test_muon_orthogonalises_each_layer_of_a_kernel():
    grads = {path: jnp.asarray(x) for path, x in made_up(1).items()}
    found, _ = one_update(Muon(lr=1.0, **FREE), INFOS, grads)
    for path, size in (("q", (64, 128)), ("out", (128, 64)), ("down", (96, 64)), ("conv", (144, 32))):
        values = np.linalg.svd(found[path].reshape(-1, *size), compute_uv=False) / (0.2 * max(size) ** 0.5)
        assert values.min() > 0.5 and values.max() < 1.25, path
        # Its singular vectors are those of the gradient: the product with it is positive and nearly the nuclear norm.
        nuclear = np.linalg.svd(grads[path].reshape(-1, *size), compute_uv=False).sum()
        assert -(found[path] * grads[path]).sum() / (0.2 * max(size) ** 0.5) > 0.8 * nuclear, path
    alone = orthogonalize(grads["q"][1].reshape(64, 128), MATRIX, 5).reshape(64, 8, 16)
    np.testing.assert_allclose(alone, orthogonalize(grads["q"], INFOS["q"], 5)[1], rtol=1e-4, atol=1e-5)
    for path in ("table", "norm", "queries"):  # the first update of Adam
        np.testing.assert_allclose(found[path], -np.sign(grads[path]), rtol=1e-2)


def test_the_rate_of_what_muon_leaves_to_adam_has_its_own_factor():
    grads = {path: jnp.asarray(x) for path, x in made_up(1).items()}
    params = {path: jnp.asarray(x) for path, x in made_up(2).items()}
    whole, _ = one_update(Muon(lr=1.0, weight_decay=0.1, **FREE), INFOS, grads, params)
    part, _ = one_update(Muon(lr=1.0, weight_decay=0.1, adam_rate=0.25, **FREE), INFOS, grads, params)
    for path in grads:
        factor = 1.0 if INFOS[path].kind == "matrix" else 0.25
        np.testing.assert_allclose(part[path], factor * whole[path], rtol=1e-6, err_msg=path)


def test_adafactor_equals_that_of_optax_where_both_factor_alike():
    grads = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(2, 128, 160)).astype(np.float32))}
    tx = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    infos = {"w": MATRIX}
    ours = transformation(Adafactor(lr=1.0, **FREE), 10, {"w": Rule(".*")}, infos)
    layer = {"w": grads["w"][0]}
    state, ours_state = tx.init(layer), ours.init(layer)
    for i in (0, 1):
        layer = {"w": grads["w"][i]}
        expected, state = tx.update(layer, state, layer)
        found, ours_state = ours.update(layer, ours_state, layer)
        np.testing.assert_allclose(found["w"], -expected["w"], rtol=1e-5)
    # A stack of layers is updated like its layers one by one.
    stacked = {"w": ParamInfo("matrix", ("layers", "embed", None), 1)}
    both, _ = one_update(Adafactor(lr=1.0, **FREE), stacked, {"w": grads["w"] * jnp.array([1.0, 50.0])[:, None, None]})
    each = [one_update(Adafactor(lr=1.0, **FREE), infos, {"w": grads["w"][i]})[0]["w"] for i in (0, 1)]
    np.testing.assert_allclose(both["w"], np.stack(each), rtol=1e-5)


def test_state_of_adafactor_is_small_and_of_muon_one_array():
    infos = {
        "q": ParamInfo("matrix", ("layers", "embed", "heads", None), 1),
        "table": ParamInfo("embedding", ("vocab", "embed")),
        "norm": ParamInfo("norm", (None,)),
    }
    params = {"q": jnp.zeros((4, 256, 16, 16)), "table": jnp.zeros((512, 256)), "norm": jnp.zeros(256)}

    def size(optimizer):  # bytes
        tx = transformation(optimizer, 10, {path: Rule(".*") for path in infos}, infos)
        return sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))

    weights = {path: x.nbytes for path, x in params.items()}
    counters = 16
    assert size(Adafactor(lr=1.0)) <= 4 * (4 * (256 + 256) + (512 + 256) + 256) + counters
    assert size(Muon(lr=1.0)) <= weights["q"] + 2 * (weights["table"] + weights["norm"]) + counters
    assert size(AdamW(lr=1.0)) >= 2 * sum(weights.values())


def test_updates_and_state_on_eight_devices():
    command = [sys.executable, "-m", "tests.optimizer_meshes"]
    done = subprocess.run(command, cwd=ROOT, env=simulated(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["optimizer"] for line in lines] == ["AdamW"] * 2 + ["Muon"] * 2 + ["Adafactor"] * 2
    for line in lines:
        assert max(line["apart"].values()) < 1e-5 and not line["wrong"], line
        # Muon moves matrices to the devices that work on them and back; nobody gathers anything.
        assert set(line["sent"]) == ({"all-to-all"} if line["optimizer"] == "Muon" else set()), line
    assert "rematerialization" not in done.stderr


@pytest.mark.parametrize("schedule", [Cosine(warmup=0.3, final=0.1), Constant()])
def test_the_rate_is_the_one_that_the_update_uses(schedule):
    optimizer, infos, grads = AdamW(lr=3e-3, schedule=schedule), {"w": MATRIX}, {"w": jnp.full((2, 3), 0.1)}
    tx = transformation(optimizer, 8, {"w": Rule(".*")}, infos)
    state = tx.init(grads)
    for step in range(1, 9):  # Adam's update for a constant gradient is its sign times the rate
        updates, state = tx.update(grads, state, grads)
        np.testing.assert_allclose(updates["w"], -float(rate(optimizer, 8)(step - 1)), rtol=1e-4)


@pytest.mark.parametrize("optimizer", [AdamW(lr=1.0), Muon(lr=1.0), Adafactor(lr=1.0)], ids=lambda o: type(o).__name__)
def test_parameters_without_gradient_are_found_for_every_optimizer(optimizer):
    tx = transformation(optimizer, 8, {path: Rule(".*") for path in INFOS}, INFOS)
    params = {path: jnp.asarray(x) for path, x in made_up(0).items()}
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, tx.init(params))
    zeros = jax.tree.map(jnp.zeros_like, params)
    tiny = params["q"] * 1e-12
    for grads in (zeros | {"q": tiny}, zeros | {"table": params["table"]}, zeros):
        state = state.replace(opt_state=tx.update(grads, state.opt_state, params)[1])
    assert unreached(state) == sorted(params.keys() - {"q", "table"})


OUTSIDE = """
import dataclasses, runpy
import jax.numpy as jnp
import optax
from jaxmllm.train.optimizers import Optimizer

@dataclasses.dataclass(frozen=True, kw_only=True)
class Sign(Optimizer):
    floor: float = 0.0

    def direction(self, infos):
        return optax.stateless(lambda grads, _: {k: jnp.sign(g) + self.floor for k, g in grads.items()})

def config():
    run = runpy.run_path("configs/toy.py")["tiny"]()
    stages = tuple(dataclasses.replace(stage, optim=Sign(lr=0.5, floor=0.25)) for stage in run.stages)
    return dataclasses.replace(run, stages=stages)
"""


def test_an_optimizer_outside_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "recipe.py"
    path.write_text(OUTSIDE)
    run = recipes.override(recipes.load(str(path)), ["stages.align.optim.floor=0.5"])
    (tmp_path / "config.json").write_text(json.dumps(recipes.to_document(run)))
    optimizer = recipes.read_run(str(tmp_path), str(path)).stages[0].optim
    assert (type(optimizer).__name__, optimizer.floor) == ("Sign", 0.5)
    updates, _ = one_update(optimizer, {"w": MATRIX}, {"w": jnp.array([[-2.0, 3.0]])})
    np.testing.assert_allclose(updates["w"], -rate(optimizer, 10)(0) * jnp.array([[-1 + 0.5, 1 + 0.5]]), rtol=1e-6)
