"""A training step of the tiny recipe on one device: the run, and random batches for it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from jaxmllm import host_batches
from jaxmllm.batch import IGNORE_LABEL, Batch, empty_batch
from jaxmllm.config import Run
from jaxmllm.mesh import Mesh
from jaxmllm.recipes import load
from jaxmllm.train.setup import initial_params, stage_program
from tests.conftest import ROOT

ROWS, S, SLOTS = 4, 128, 2


def tiny_run() -> Run:
    """The tiny recipe with shorter rows, on one device."""
    tiny = load(str(ROOT / "configs" / "toy.py") + ":tiny")
    data = dataclasses.replace(tiny.data, seq_len=S, image_slots=SLOTS)
    return dataclasses.replace(tiny, data=data, mesh=Mesh(fsdp=1))


def random_batch(run, images_per_row: list[int], seed: int = 0) -> Batch:
    """Random text, two samples in each row; row r has images_per_row[r] images, at most one per sample."""
    rng = np.random.default_rng(seed)
    layout = run.model.layout
    batch = empty_batch(layout, ROWS, S, SLOTS, run.model.target_shapes)
    half, block = S // 2, layout.block
    batch.tokens[:] = rng.integers(6, 60, (ROWS, S))
    batch.segment_ids[:] = np.repeat([1, 2], half)
    batch.positions[:] = np.tile(np.arange(half), 2)
    batch.labels[:] = np.where(rng.random((ROWS, S)) < 0.2, rng.integers(6, 60, (ROWS, S)), IGNORE_LABEL)
    for r, count in enumerate(images_per_row):
        for i in range(count):
            at = i * half + 2
            batch.visual_positions[r, i] = np.arange(at, at + block)
            batch.visual_index[r, at : at + block] = i * block + np.arange(block)
            batch.labels[r, at : at + block] = IGNORE_LABEL
            for pixels in batch.images.values():
                pixels[r, i] = rng.integers(0, 256, pixels.shape[2:])
            for name, target in batch.targets.items():
                target[r, i] = rng.normal(size=target.shape[2:])
                batch.target_mask[name][r, i] = True
    return batch


def one_step(run: Run, **changes) -> tuple[dict, dict, dict]:
    """One step of the first stage with these changes -> (parameters before it, those trained after it, metrics)."""
    stage, mesh = dataclasses.replace(run.stages[0], **{"rows": ROWS, **changes}), run.mesh.build()
    with jax.set_mesh(mesh):
        _, new_train_state, step = stage_program(run, stage, mesh)
        params = jax.jit(lambda: initial_params(run))()
        before = jax.device_get(params)
        batch = host_batches.global_from_rows(random_batch(run, [0, 1, 2, 1]), mesh)
        state, metrics = step(jax.jit(new_train_state)(params), batch)
        return before, jax.device_get(state.trainable), jax.device_get(metrics)
