"""Learning-rate schedules: every update trains, the peak is reached, and the decay ends after the last update."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.config import Rule
from jaxmllm.nn.param_info import ParamInfo
from jaxmllm.train.optim import rate, transformation
from jaxmllm.train.optimizers import AdamW
from jaxmllm.train.schedules import Constant, Cosine, WarmupStableDecay

STEPS = 100
CASES = {  # schedule -> updates of its warm-up, factor that would follow the last update
    Constant(): (1, 1.0),
    Constant(warmup=0.1): (10, 1.0),
    Cosine(): (3, 0.0),
    Cosine(warmup=0.05, final=0.1): (5, 0.1),
    WarmupStableDecay(): (3, 0.0),
    WarmupStableDecay(warmup=0.1, decay=0.2, final=0.25): (10, 0.25),
}


def factors(schedule, steps: int = STEPS) -> np.ndarray:
    """Those of all updates, and the one after the last."""
    factor = schedule(steps)
    return np.array([factor(jnp.asarray(count)) for count in range(steps + 1)])


@pytest.mark.parametrize("schedule", CASES, ids=repr)
def test_first_peak_and_last_value(schedule):
    (warmup, last), found = CASES[schedule], factors(schedule)
    np.testing.assert_allclose(found[:warmup], (1 + np.arange(warmup)) / warmup, rtol=1e-6)
    assert found[0] > 0 and found.max() == found[warmup - 1] == 1.0
    assert found[-1] == pytest.approx(last, abs=1e-6)
    assert found[-2] > last + 1e-5 or last == 1.0
    assert (np.diff(found[warmup - 1 :]) <= 1e-7).all()  # never rises after the warm-up


@pytest.mark.parametrize("schedule", CASES, ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_few_steps(schedule, steps):
    """Every factor is finite, and every update trains however few there are."""
    found = factors(schedule, steps)
    assert np.isfinite(found).all() and found[:-1].min() > 0.05 and found[:-1].max() == 1.0


def test_cosine_is_half_way_in_the_middle():
    found = factors(Cosine(warmup=0.0, final=0.2), 100)
    assert found[0] == 1.0 and found[50] == pytest.approx(0.6) and found[100] == pytest.approx(0.2)


def test_warmup_stable_decay_is_linear_at_the_end():
    found = factors(WarmupStableDecay(warmup=0.05, decay=0.25))
    np.testing.assert_allclose(found[4:75], 1.0)
    np.testing.assert_allclose(found[75:], 1 - np.arange(1, 27) / 26, atol=1e-6)


def test_the_rate_is_the_peak_rate_times_the_factor():
    rates = rate(AdamW(lr=0.5, schedule=Constant(warmup=0.04)), STEPS)
    assert [float(rates(jnp.asarray(count))) for count in range(5)] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])


def test_the_first_update_trains():
    """Adam's first direction is the sign of the gradient, so the update is the rate: a fourth of the peak."""
    table, infos = {"w": Rule(".*")}, {"w": ParamInfo("matrix", ("embed", None), 1)}
    optimizer = AdamW(lr=0.5, schedule=Constant(warmup=0.04), clip=None)
    tx = transformation(optimizer, STEPS, table, infos)
    params = {"w": jnp.ones((2, 2))}
    updates, _ = tx.update({"w": jnp.full((2, 2), 3.0)}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.125, rtol=1e-4)


def test_a_schedule_of_ones_own():
    @dataclasses.dataclass(frozen=True)
    class Halving:
        every: int

        def __call__(self, steps):
            return lambda count: 0.5 ** (count // self.every)

    rates = rate(AdamW(lr=8.0, schedule=Halving(2)), STEPS)
    assert [float(rates(count)) for count in range(6)] == [8.0, 8.0, 4.0, 4.0, 2.0, 2.0]
