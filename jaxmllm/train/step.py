"""One training step, a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxmllm import sharded
from jaxmllm.batch import Batch
from jaxmllm.train.state import TrainState, unflatten


def make_step(model, losses: dict[str, float], tx: optax.GradientTransformation, dtype, accumulate: int) -> Callable:
    """-> step(state, batch) -> (state, metrics of float32 scalars).

    The loss is the sum over objectives of weight * (sum of masked values) / (count in the whole global batch, over all
    micro-batches), so a token has the same weight whatever the packing, accumulation and number of devices.
    """
    names = tuple(losses)

    def objective(trainable, frozen, batch: Batch, counts):
        params = unflatten({k: v.astype(dtype) for k, v in trainable.items()} | frozen)
        terms, extra = model.apply({"params": params}, batch, names)
        means = {k: jnp.where(t.mask, t.values, 0).sum() / counts[k] for k, t in terms.items()}
        extra = {k: jnp.where(t.mask, t.values, 0).sum() / counts["next_token"] for k, t in extra.items()}
        return sum(losses[k] * v for k, v in means.items()), {**means, **extra}

    def step(state: TrainState, batch: Batch):
        counts = {k: jnp.maximum(n, 1).astype(jnp.float32) for k, n in model.counts(batch).items()}
        gradient = jax.value_and_grad(objective, has_aux=True)

        def add(total, micro):
            (loss, extra), grads = gradient(state.trainable, state.frozen, micro, counts)
            return jax.tree.map(jnp.add, total, (grads, {"loss": loss, **extra})), None

        zero = jnp.zeros(())
        metrics = {k: zero for k in ("loss", *names, *(["accuracy"] if "next_token" in names else []))}
        total = (jax.tree.map(jnp.zeros_like, state.trainable), metrics)
        if accumulate == 1:
            (grads, metrics), _ = add(total, batch)
        else:
            parts = jax.tree.map(lambda x: sharded.split_rows(x, accumulate), batch)
            (grads, metrics), _ = jax.lax.scan(add, total, parts)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
            metrics["grad_norm"] = optax.global_norm(grads)
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics

    return step
