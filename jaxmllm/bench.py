"""Times real training steps on the devices at hand: rates, share of the peak, waits for data, memory.

The data is either one random batch whose rows and image slots are all full, as `jaxmllm plan` assumes, or batches of
the config's own loader; the time that a step waits for its batch is reported separately.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxmllm import host_batches
from jaxmllm.batch import Batch, empty_batch
from jaxmllm.config import Run, Stage
from jaxmllm.data.build import make_loader
from jaxmllm.plan.chips import peak_of
from jaxmllm.plan.compile import peak_bytes
from jaxmllm.plan.flops import model_flops
from jaxmllm.plan.report import fixed_steps
from jaxmllm.train.compiler import use_random_kernel
from jaxmllm.train.setup import initial_params, stage_program

WARM_UP = 2  # steps that are not counted


def choose_stage(run: Run, name: str | None = None) -> Stage:
    """The stage of this name, by default the last. Raises ConfigError if there is none."""
    return fixed_steps(run.stage(name or run.stages[-1].name))


def synthetic(run: Run, stage: Stage, rows: int) -> Batch:
    """A numpy batch of `rows` rows of one sample each: as many images as fit, then random text."""
    data, model, random = run.data_of(stage), run.model, np.random.default_rng(run.seed)
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


@contextlib.contextmanager
def real_batches(run: Run, stage: Stage) -> Iterator[Iterator[Batch]]:
    """This process's rows of the config's own data; unusable samples are noted in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder, make_loader(run, stage, folder) as loader:
        yield (batch for batch, _ in loader)


def measure(run: Run, stage: Stage, steps: int, real: bool = False) -> dict[str, Any]:
    """Times `steps` steps after two that are not counted, on the config's data (`real`) or on a synthetic batch.

    Returns seconds per step (median), its data wait and compile time, rates per device, FLOP/s by component and,
    where the device's peak is known, MFU. Peak memory of a device is in bytes, as the device counts it ("device") or,
    where it does not, as the compiler estimates it ("compiler").
    """
    mesh = run.mesh.build()
    use_random_kernel(mesh)
    devices = mesh.devices.size
    if real:
        data = real_batches(run, stage)
    else:
        rows = stage.rows // host_batches.process_rows(mesh)[1]
        data = contextlib.nullcontext(itertools.repeat(synthetic(run, stage, rows)))
    with data as batches, jax.set_mesh(mesh):
        _, new_state, step = stage_program(run, stage, mesh)
        state = jax.jit(lambda: new_state(initial_params(run)))()
        waits, times, compiled = [], [], None
        for _ in range(steps + WARM_UP):
            start = time.perf_counter()
            batch = host_batches.global_from_rows(next(batches), mesh)
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
    seconds, flops = float(np.median(times[WARM_UP:])), model_flops(run, stage)
    kind, per_second = jax.devices()[0].device_kind, 1 / seconds / devices
    peak = peak_of(kind)
    counted = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "config": run.name,
        "stage": stage.name,
        "device": kind,
        "devices": devices,
        "data": "real" if real else "synthetic",
        "loss": loss,
        "compile_seconds": compile_seconds,
        "step_seconds": seconds,
        "data_wait_seconds": float(np.median(waits[WARM_UP:])),
        "tokens_per_second_per_device": stage.rows * run.data_of(stage).seq_len * per_second,
        "images_per_second_per_device": stage.rows * run.data_of(stage).image_slots * per_second,
        "model_flops": sum(flops.values()),
        "flops_per_second_by_component": {name: value * per_second for name, value in flops.items()},
        "mfu": sum(flops.values()) * per_second / peak if peak else None,
        "mfu_by_component": {name: value * per_second / peak for name, value in flops.items()} if peak else None,
        "peak_memory_bytes": counted or peak_bytes(compiled),
        "peak_memory_from": "device" if counted else "compiler",
    }


def show(found: dict[str, Any]) -> str:
    """What `measure` found as text, one line per figure."""
    lines = []
    for name, value in found.items():
        parts = value if isinstance(value, dict) else {}
        text = f"{value:,.6g}" if isinstance(value, float) else "" if parts else str(value)
        lines.append(f"{name:<32}{text}")
        lines += [f"  {part:<30}{share:,.4g}" for part, share in parts.items()]
    return "\n".join(lines)
