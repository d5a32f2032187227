"""Learning-rate schedules as values of a config: schedule(steps) -> factor of the peak rate by update.

Updates are counted from 0, as optax does. Every update trains: a warm-up over w updates has the factors 1/w, 2/w, ..,
1, and a decay reaches its end after the last update, so that a decay to zero does not waste that one. Another schedule
is any frozen dataclass that can be called like these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

Factor = Callable[[jax.Array | int], jax.Array]


def warm_up(count: jax.Array | int, share: float, steps: int) -> tuple[jax.Array, int]:
    """(factor of a linear warm-up over a share of the steps, number of its updates, at least 1)."""
    updates = max(1, round(share * steps))
    return jnp.minimum((count + 1) / updates, 1.0), updates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear warm-up over a share of the steps, then the peak rate."""

    warmup: float = 0.0

    def __call__(self, steps: int) -> Factor:
        return lambda count: warm_up(count, self.warmup, steps)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine from the peak to `final` times the peak, reached after the last update."""

    warmup: float = 0.03
    final: float = 0.0

    def __call__(self, steps: int) -> Factor:
        def factor(count):
            rising, updates = warm_up(count, self.warmup, steps)
            done = jnp.clip((count + 1 - updates) / max(steps + 1 - updates, 1), 0, 1)
            return rising * (self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(jnp.pi * done)))

        return factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warm-up, the peak rate, then a linear decay over the last `decay` share of the steps.

    It goes to `final` times the peak, reached after the last update.
    """

    warmup: float = 0.03
    decay: float = 0.1
    final: float = 0.0

    def __call__(self, steps: int) -> Factor:
        def factor(count):
            updates = min(max(1, round(self.decay * steps)), steps - 1)  # without the first one
            done = jnp.clip((count + 1 - (steps - updates)) / (updates + 1), 0, 1)
            return warm_up(count, self.warmup, steps)[0] * (1 - (1 - self.final) * done)

        return factor
