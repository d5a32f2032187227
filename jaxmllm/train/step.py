"""One training step, a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxmllm import sharded
from jaxmllm.batch import Batch
from jaxmllm.train.state import TrainState, unflatten


def make_step(
    model,
    losses: dict[str, float],
    tx: optax.GradientTransformation,
    dtype,
    accumulate: int,
    ema: float | None = None,
    dropout: int | None = None,
) -> Callable:
    """-> step(state, batch) -> (state, metrics of float32 scalars).

    The loss is the sum over objectives of weight * (sum of masked values) / (count in the whole global batch, over all
    micro-batches), so a token has the same weight whatever the packing, accumulation and number of devices.
    dropout: the seed of its random numbers, which differ by step and micro-batch; None: there is none.
    """
    names = tuple(losses)

    def total(term):
        return jnp.where(term.mask, term.values, 0).sum()

    def objective(trainable, frozen, batch: Batch, counts, key):
        params = unflatten({k: v.astype(dtype) for k, v in trainable.items()} | frozen)
        terms, extra = model.apply({"params": params}, batch, names, rngs=None if key is None else {"dropout": key})
        means = {k: total(t) / counts.get(k, t.values.size * accumulate) for k, t in terms.items()}
        metrics = {k: total(t) / counts[name] for name, own in extra.items() for k, t in own.items()}
        return sum(losses[k] * means[k] for k in names), {**means, **metrics}

    def step(state: TrainState, batch: Batch):
        counts = {k: jnp.maximum(n, 1).astype(jnp.float32) for k, n in model.counts(batch, names).items()}
        gradient = jax.value_and_grad(objective, has_aux=True)

        def gradients(micro, key):
            (loss, metrics), grads = gradient(state.trainable, state.frozen, micro, counts, key)
            return grads, {"loss": loss, **metrics}

        key = None if dropout is None else jax.random.fold_in(jax.random.key(dropout), state.step)
        if accumulate == 1:
            grads, metrics = gradients(batch, key)
        else:
            parts = jax.tree.map(lambda x: sharded.split_rows(x, accumulate), batch)
            parts = parts, None if key is None else jax.random.split(key, accumulate)
            _, shapes = jax.eval_shape(gradients, *jax.tree.map(lambda x: x[0], parts))
            zero = jax.tree.map(jnp.zeros_like, state.trainable), dict.fromkeys(shapes, jnp.zeros(()))
            add = lambda sums, micro: (jax.tree.map(jnp.add, sums, gradients(*micro)), None)
            (grads, metrics), _ = jax.lax.scan(add, zero, parts)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
            average = optax.incremental_update(trainable, state.ema, 1 - ema) if ema else {}
            metrics["grad_norm"] = optax.global_norm(grads)
        return TrainState(state.step + 1, trainable, state.frozen, opt_state, average), metrics

    return step
