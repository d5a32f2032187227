"""LoRA: what adapters add, that frozen weights cost no gradient, and how checkpoints, sources and exports keep them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm import host_batches, recipes
from jaxmllm.config import Init, Rule
from jaxmllm.errors import ConfigError
from jaxmllm.mesh import Mesh
from jaxmllm.nn.lora import LoRA, _drop, is_adapter, kernel_of, merged
from jaxmllm.nn.primitives import Linear
from jaxmllm.train.checkpoint import open_checkpoints
from jaxmllm.train.setup import abstract_batch, check_stages, initial_params, stage_program, start_stage
from jaxmllm.train.state import unflatten
from jaxmllm.weights.export import export
from jaxmllm.weights.parts import load_parts
from tests.conftest import ROOT, simulated
from tests.llava_case import batch_of
from tests.run_case import abstract_of, random_of, run_of, save
from tests.test_export import imported, llava, text_only, words  # noqa: F401

ATTENTION = LoRA(rank=2, targets=("^llm/.*/attn/",), alpha=4.0)
ONLY_ADAPTERS = (Rule(r"/lora_[ab]$"), Rule(".*", lr=None))
WORDS = 16


def lora_run(model, tokenizer, *loras, rules=ONLY_ADAPTERS, **fields):
    run = run_of(model, tokenizer, lora=loras, mesh=Mesh(fsdp=1), **fields)
    return dataclasses.replace(run, stages=(dataclasses.replace(run.stages[0], rules=rules, rows=2),))


def batch(run, seed: int = 0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, WORDS - 1, (2, 64), dtype=np.int32)
    tokens[:, 4:13] = WORDS - 1
    pictures = rng.integers(0, 256, (2, 42, 42, 3), dtype=np.uint8)
    return batch_of(run.model, tokens, np.where(tokens == WORDS - 1, -100, tokens), pictures, WORDS - 1)


def filled(params: dict) -> dict:
    """The parameters with random B."""
    rng = np.random.default_rng(1)
    return {
        path: (0.3 * rng.standard_normal(x.shape)).astype(np.float32) if path.endswith("lora_b") else np.asarray(x)
        for path, x in params.items()
    }


def new_params(run) -> dict:
    with jax.set_mesh(run.mesh.build()):
        return jax.device_get(jax.jit(lambda: initial_params(run))())


def base_of(params: dict) -> dict:
    return {path: x for path, x in params.items() if not is_adapter(path)}


def merge_all(params: dict) -> dict:
    kernels = {kernel_of(path) for path in params if path.endswith("lora_a")}
    inside = lambda kernel, name: params[kernel.removesuffix("kernel") + name]
    made = {k: merged(params[k], *(inside(k, x) for x in ("lora_a", "lora_b", "lora_alpha"))) for k in kernels}
    return base_of(params) | made


def test_adapters_of_every_kind_of_layer(words):  # noqa: F811
    """Of stacks, with several input or output dimensions, and of single layers: equal to the merged kernels."""
    run = lora_run(llava(WORDS), words, ATTENTION, LoRA(rank=3, targets=("matrix",), alpha=1.5))
    params = new_params(run)
    shapes = {path: x.shape for path, x in params.items()}
    assert shapes["llm/blocks/layers/block/attn/q/lora_a"] == (2, 16, 2)
    assert shapes["llm/blocks/layers/block/attn/out/lora_a"] == (2, 2, 2, 4, 2)
    assert shapes["llm/blocks/layers/block/attn/q/lora_b"][:2] == (2, 2)
    assert shapes["llm/blocks/layers/block/mlp/up/lora_b"] == (2, 3, 24)
    assert shapes["aggregator/projector/linear_0/lora_a"] == (16, 3)
    assert params["llm/blocks/layers/block/attn/q/lora_alpha"].tolist() == [4, 4]
    kernels = [path for path in params if path.endswith("/kernel")]
    assert all(path.replace("kernel", "lora_a") in params for path in kernels) and len(kernels) > 12
    base = dataclasses.replace(run, lora=None)
    fresh = new_params(base)
    assert fresh.keys() == base_of(params).keys()
    assert all(np.array_equal(fresh[path], params[path]) for path in fresh)
    inputs = batch(run)

    @jax.jit
    def states(params):
        with jax.default_matmul_precision("highest"):
            return run.model.apply({"params": unflatten(params)}, inputs, method="hidden")[0]

    before = states(fresh)
    assert np.array_equal(states(params), before)  # B is zero
    adapted, expected = states(filled(params)), states(merge_all(filled(params)))
    assert np.abs(adapted - before).max() > 0.01
    np.testing.assert_allclose(adapted, expected, rtol=0, atol=2e-5)


def made_arrays(jaxpr):
    """(primitive, shape) of everything that a program computes, also inside its loops."""
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    yield from made_arrays(getattr(inner, "jaxpr", inner))
        yield from ((eqn.primitive.name, out.aval.shape) for out in eqn.outvars if hasattr(out.aval, "shape"))


def program(run, rules):
    """-> (state before the first step, traced step, lowered step), abstract."""
    run = dataclasses.replace(run, stages=(dataclasses.replace(run.stages[0], rules=rules),))
    mesh = run.mesh.build()
    with jax.set_mesh(mesh):
        abstract, new_state, step = stage_program(run, run.stages[0], mesh)
        inputs = jax.eval_shape(new_state, abstract), abstract_batch(run, run.stages[0], mesh)
        return inputs[0], step.trace(*inputs), step.lower(*inputs)


@pytest.fixture(scope="module")
def programs(words):  # noqa: F811
    """Steps that train adapters of a decoder with kernels [256, 512], and all parameters."""
    model = llava(WORDS)
    model = model.clone(llm=model.llm.clone(width=256, mlp=512))
    run = lora_run(model, words, LoRA(rank=2, targets=("^llm/",)))
    return program(run, ONLY_ADAPTERS), program(run, (Rule(".*"),))


def test_a_frozen_weight_has_no_gradient(programs):
    """No program of the step makes an array of its shape, and the optimizer keeps none."""
    made = []
    for state, traced, _ in programs:
        arrays = made_arrays(traced.jaxpr.jaxpr)
        names = {name for name, shape in arrays if shape in ((256, 512), (2, 256, 512))}
        made.append((names & {"dot_general", "add", "mul", "transpose"}, state))
    (adapted, state), (full, full_state) = made
    assert not adapted and "dot_general" in full
    sizes, full_sizes = ([x.size for x in jax.tree.leaves((s.trainable, s.opt_state))] for s in (state, full_state))
    assert max(sizes) == 2 * 512 * 2 and max(full_sizes) == 2 * 256 * 512


@pytest.mark.long
def test_a_frozen_weight_takes_no_memory_for_its_gradient(programs):
    small, large = (lowered.compile().memory_analysis().temp_size_in_bytes for _, _, lowered in programs)
    kernels = 4 * 256 * 512 * 2 * 3  # gate, up and down of two layers, in float32
    assert large - small > 0.9 * kernels


@pytest.fixture(scope="module")
def source(tmp_path_factory, words):  # noqa: F811
    """A folder with all weights of the model without adapters, and the weights."""
    root = tmp_path_factory.mktemp("base")
    run = run_of(llava(WORDS), words)
    save(run, random_of(run), root / "run")
    export(str(root / "run"), str(root / "out"))
    return root, random_of(run)


def steps(run, state, step, seeds):
    for seed in seeds:
        state, metrics = step(state, host_batches.global_from_rows(batch(run, seed), run.mesh.build()))
    return state, metrics


def test_checkpoints_hold_adapters_only_and_resume_exactly(tmp_path, words, source):  # noqa: F811
    lora = dataclasses.replace(ATTENTION, dropout=0.25)
    run = lora_run(llava(WORDS), words, lora, init=Init(rest=str(source[0] / "out")))
    run = dataclasses.replace(run, stages=(dataclasses.replace(run.stages[0], accumulate=2),))
    stage, mesh, load = (
        run.stages[0],
        run.mesh.build(),
        lambda config, abstract, rates: load_parts(config.model, config.init.sources(), abstract, rates=rates),
    )

    def start():
        (checkpoints,) = open_checkpoints(str(tmp_path), ["only"], record=recipes.to_document(run))
        return checkpoints, *start_stage(run, stage, mesh, checkpoints, lambda *args: (load(*args)[0], []))

    with jax.set_mesh(mesh):
        check_stages(run, mesh)
        checkpoints, state, _, step = start()
        assert set(state.trainable) == {path for path in state.trainable if path.endswith(("lora_a", "lora_b"))}
        np.testing.assert_array_equal(state.frozen["llm/norm/scale"], source[1]["llm/norm/scale"])
        state, _ = steps(run, state, step, (0, 1))
        checkpoints.save(state, {})
        checkpoints.wait()
        state, metrics = steps(run, state, step, (2, 3))
        assert checkpoints.trained(2) and all(is_adapter(path) for path in checkpoints.trained(2))
        again_checkpoints, again, _, _ = start()
        assert again_checkpoints.latest() == 2
        again, again_metrics = steps(run, again, step, (2, 3))
    assert metrics["loss"] == again_metrics["loss"] and np.isfinite(metrics["loss"])
    for path, x in state.trainable.items():
        np.testing.assert_array_equal(x, again.trainable[path], path)
        assert np.abs(x).max() > 0


def test_an_export_has_the_merged_kernels(tmp_path, words):  # noqa: F811
    run = lora_run(llava(WORDS), words, ATTENTION)
    params = filled(new_params(run))
    trained = {path: x for path, x in params.items() if path.endswith(("lora_a", "lora_b"))}
    save(run, trained, tmp_path / "run", frozen={path: x for path, x in params.items() if path not in trained})
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    found, expected = imported(dataclasses.replace(run, lora=None), tmp_path / "out"), merge_all(params)
    assert found.keys() == expected.keys()
    for path, x in found.items():
        np.testing.assert_allclose(x, expected[path], rtol=0, atol=1e-7, err_msg=path)
    changed = [path for path in expected if not np.array_equal(expected[path], params[path])]
    assert len(changed) == 4


def test_dropout_only_with_random_numbers():
    layer, rng = Linear((3,)), np.random.default_rng(0)
    shapes = {"kernel": (5, 3), "bias": (3,), "lora_a": (5, 2), "lora_b": (2, 3), "lora_alpha": (), "lora_dropout": ()}
    params = {"params": {name: rng.uniform(0.2, 0.8, shape).astype(np.float32) for name, shape in shapes.items()}}
    x = jnp.ones((7, 5))
    plain = layer.apply(params, x)
    one, same, other = (layer.apply(params, x, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1))
    own = params["params"]
    delta = own["lora_alpha"] / 2 * (x @ own["lora_a"] @ own["lora_b"])
    np.testing.assert_allclose(plain, x @ own["kernel"] + own["bias"] + delta, rtol=1e-5)
    assert np.array_equal(one, same) and not np.array_equal(one, other) and not np.array_equal(one, plain)


def test_dropped_inputs_keep_their_mean():
    x = jnp.ones((1000, 8))
    y = np.asarray(_drop(x, jnp.float32(0.25), jax.random.key(0)))
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)} and abs(y.mean() - 1) < 0.02
    np.testing.assert_array_equal(_drop(x, jnp.float32(1e-9), jax.random.key(0)), x)


def test_dropped_inputs_do_not_hang_together():
    dropped = np.asarray(_drop(jnp.ones((2, 512, 256)), jnp.float32(0.25), jax.random.key(0)) == 0).reshape(-1, 256)
    for lines in (dropped, dropped.T):
        count, length = lines.shape
        correlation = np.corrcoef(lines.astype(np.float64))[np.triu_indices(count, 1)]
        # Of independent lines the correlation has the standard deviation 1 / sqrt(length).
        assert abs(correlation.std() * length**0.5 - 1) < 0.02 and np.abs(correlation).max() < 6 / length**0.5
        assert abs(lines.mean(1).std() / (0.25 * 0.75 / length) ** 0.5 - 1) < 0.15


def test_dropped_inputs_are_the_same_on_every_mesh():
    command = [sys.executable, "-m", "tests.lora_mesh"]
    done = subprocess.run(command, cwd=ROOT, env=simulated(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_refusals(tmp_path, words):  # noqa: F811
    run = lora_run(text_only(WORDS), words, ATTENTION)
    with jax.set_mesh(run.mesh.build()), pytest.raises(ConfigError, match="freezes llm with random weights"):
        check_stages(run, run.mesh.build())
    with pytest.raises(ConfigError, match="names no linear layer"):
        abstract_of(dataclasses.replace(run, lora=(ATTENTION, LoRA(rank=1, targets=("^llm/.*/attn/q",)))))
    with pytest.raises(ConfigError, match="only linear layers have adapters"):
        LoRA(rank=1, targets=("embedding",))
    with pytest.raises(ConfigError, match="rank must be 1 or more"):
        LoRA(rank=0, targets=("matrix",))
    save(run, filled(new_params(run)), tmp_path / "run")
    plain = dataclasses.replace(run, lora=None)
    with pytest.raises(ValueError, match="has adapters that would be lost, such as llm/.*/lora_"):
        load_parts(plain.model, {"rest": f"run:{tmp_path}/run"}, abstract_of(plain))
    arrays, _ = load_parts(run.model, {"rest": f"run:{tmp_path}/run"}, abstract_of(run))
    assert any(is_adapter(path) for path in arrays) and arrays.keys() == abstract_of(run).keys()
    assert recipes.from_document(recipes.to_document(run), "config.json") == run
