"""Real training steps on whatever device is there: rates, share of the peak, waiting for data, memory.

synthetic   one random batch whose rows and image slots are all full, as `jaxmllm plan` assumes
real        batches of the recipe's own loader; what a step waits for is said apart
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxmllm import mesh as meshes
from jaxmllm.batch import Batch, empty_batch
from jaxmllm.config import Run, Stage
from jaxmllm.plan.chips import CHIPS
from jaxmllm.plan.compile import peak_bytes
from jaxmllm.plan.flops import model_flops
from jaxmllm.train.setup import initial_params, stage_program

# bf16 FLOP/s of one device by the start of its device_kind. GPUs: NVIDIA's data sheets, dense, SXM.
PEAKS = {
    "TPU v4": CHIPS["v4"].flops, "TPU v5 lite": CHIPS["v5e"].flops, "TPU v5": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops, "TPU7x": CHIPS["tpu7x"].flops,
    "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
}  # fmt: skip


def synthetic(run: Run, stage: Stage, rows: int) -> Batch:
    """A numpy batch of `rows` rows: as many images in front as fit, then random text; one sample a row."""
    data, model, random = run.data, run.model, np.random.default_rng(run.seed)
    batch = empty_batch(model.layout, rows, data.seq_len, data.image_slots, model.target_shapes)
    block = model.layout.block
    shown = min(data.image_slots, data.seq_len // block) if block else 0
    places = np.arange(shown * block, dtype=np.int32)
    batch.visual_positions[:, :shown] = places.reshape(shown, block)
    batch.visual_index[:, : shown * block] = places
    batch.tokens[:] = random.integers(0, model.llm.vocab, batch.tokens.shape)
    batch.labels[:, shown * block :] = batch.tokens[:, shown * block :]
    batch.segment_ids[:], batch.positions[:] = 1, np.arange(data.seq_len)
    for images in batch.images.values():
        images[:] = random.integers(0, 256, images.shape)
    for name, target in batch.targets.items():
        target[:] = random.standard_normal(target.shape)
        batch.target_mask[name][:, :shown] = True
    return batch


def bench(run: Run, stage: Stage, steps: int, batches: Iterator[Batch] | None = None) -> dict[str, Any]:
    """Times `steps` steps after two that are not counted. batches: this process's rows, else a synthetic batch.

    Returns seconds per step (median), its data wait and compile time, rates per device, FLOP/s by stage and,
    where the device's peak is known, MFU; peak memory of a device in bytes, as it counts it ("device") or, where it
    does not, as the compiler reckons it ("compiler").
    """
    mesh = run.mesh.build()
    devices = mesh.devices.size
    fixed = None if batches else synthetic(run, stage, stage.rows // meshes.own_part(mesh)[1])
    with jax.set_mesh(mesh):
        _, fresh, step = stage_program(run, stage, mesh)
        state = jax.jit(lambda: fresh(initial_params(run)))()
        waits, times, compiled = [], [], None
        for _ in range(steps + 2):
            start = time.perf_counter()
            batch = meshes.to_global(next(batches) if batches else fixed, mesh)
            waits.append(time.perf_counter() - start)
            if compiled is None:
                start = time.perf_counter()
                compiled = step.lower(state, batch).compile()
                compile_seconds = time.perf_counter() - start
                start = time.perf_counter()
            state, metrics = compiled(state, batch)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - start)
        loss = float(metrics["loss"])
    seconds, flops = float(np.median(times[2:])), model_flops(run, stage)
    kind, per_second = jax.devices()[0].device_kind, 1 / seconds / devices
    peak = next((value for name, value in PEAKS.items() if kind.startswith(name)), None)
    counted = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "config": run.name,
        "stage": stage.name,
        "device": kind,
        "devices": devices,
        "data": "real" if batches else "synthetic",
        "loss": loss,
        "compile_seconds": compile_seconds,
        "step_seconds": seconds,
        "data_wait_seconds": float(np.median(waits[2:])),
        "tokens_per_second_per_device": stage.rows * run.data.seq_len * per_second,
        "images_per_second_per_device": stage.rows * run.data.image_slots * per_second,
        "model_flops": sum(flops.values()),
        "flops_per_second_by_stage": {name: value * per_second for name, value in flops.items()},
        "mfu": sum(flops.values()) * per_second / peak if peak else None,
        "mfu_by_stage": {name: value * per_second / peak for name, value in flops.items()} if peak else None,
        "peak_memory_bytes": counted or peak_bytes(compiled),
        "peak_memory_from": "device" if counted else "compiler",
    }
