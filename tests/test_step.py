"""The train step: one program for text, images and both; what is masked or in another sample changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm import host_batches
from jaxmllm.train.setup import initial_params, stage_program
from jaxmllm.train.state import unflatten
from tests.step_case import ROWS, S, random_batch, tiny_run

LOSSES = {"next_token": 1.0, "depth": 0.5, "seg": 0.5}


@pytest.fixture(scope="module")
def run():
    return tiny_run()


@pytest.fixture(scope="module")
def mesh(run):
    mesh = run.mesh.build()
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="module")
def params(run, mesh):
    return jax.jit(lambda: initial_params(run))()


def loss_and_gradients(run, mesh, params, batch):
    def loss(params):
        terms, _ = run.model.apply({"params": unflatten(params)}, batch, tuple(LOSSES))
        return sum(LOSSES[k] * jnp.where(t.mask, t.values, 0).sum() for k, t in terms.items())

    batch = host_batches.global_from_rows(batch, mesh)
    return jax.jit(jax.value_and_grad(loss))(params)


def test_one_compiled_step_serves_text_images_and_both(run, mesh, params):
    stage = dataclasses.replace(run.stages[0], rows=ROWS, losses=LOSSES)
    _, new_train_state, step = stage_program(run, stage, mesh)
    state = jax.jit(new_train_state)(params)
    for images in ([0, 0, 0, 0], [2, 2, 2, 2], [0, 1, 2, 0]):
        state, metrics = step(state, host_batches.global_from_rows(random_batch(run, images), mesh))
        assert all(np.isfinite(v) for v in jax.device_get(metrics).values()), metrics
    assert step._cache_size() == 1
    assert all(np.isfinite(v).all() for v in jax.device_get(state.trainable).values())


def test_masked_slots_change_nothing(run, mesh, params):
    clean, dirty = (random_batch(run, [0, 1, 0, 1]) for _ in range(2))
    empty = clean.visual_positions[:, :, 0] < 0
    rng = np.random.default_rng(1)
    for name in dirty.images:
        dirty.images[name][empty] = rng.integers(0, 256, dirty.images[name][empty].shape)
        dirty.padding[name][empty] = 1
    for name in dirty.targets:
        dirty.targets[name][empty] = 1e3
    (loss, grads), (loss2, grads2) = (loss_and_gradients(run, mesh, params, b) for b in (clean, dirty))
    assert loss == loss2
    for path in grads:
        np.testing.assert_array_equal(grads[path], grads2[path], err_msg=path)


def test_text_only_batch_trains_only_the_language_model(run, mesh, params):
    _, grads = loss_and_gradients(run, mesh, params, random_batch(run, [0, 0, 0, 0]))
    for path, grad in grads.items():
        assert np.isfinite(grad).all(), path
        if not path.startswith("llm/"):
            assert not np.asarray(grad).any(), path
    assert np.asarray(grads["llm/embedding/embedding"]).any()


def test_accumulating_two_micro_batches_gives_the_same_metrics(run, mesh, params):
    batch = host_batches.global_from_rows(random_batch(run, [0, 1, 2, 1]), mesh)
    stage, results = dataclasses.replace(run.stages[0], rows=ROWS, losses={"next_token": 1.0}), []
    for accumulate in (1, 2):
        _, new_train_state, step = stage_program(run, dataclasses.replace(stage, accumulate=accumulate), mesh)
        results.append(step(jax.jit(new_train_state)(params), batch)[1])
    assert results[0].keys() == results[1].keys()
    for key in results[0]:
        assert float(results[0][key]) == pytest.approx(float(results[1][key]), rel=1e-5), key


def test_samples_of_a_row_do_not_see_each_other(run, mesh, params):
    a, b = (random_batch(run, [1, 1, 1, 1]) for _ in range(2))
    b.tokens[:, : S // 2] = 7  # only the text of the first sample differs
    hidden = jax.jit(lambda p, x: run.model.apply({"params": unflatten(p)}, x, method="hidden")[0])
    first, second = (np.asarray(hidden(params, host_batches.global_from_rows(x, mesh))) for x in (a, b))
    np.testing.assert_allclose(first[:, S // 2 :], second[:, S // 2 :], atol=1e-6)
    assert np.abs(first[:, : S // 2] - second[:, : S // 2]).max() > 0.1
