"""What `jaxmllm train` would do: parts, parameters, memory, steps, data and time, without writing anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from jaxmllm import bench
from jaxmllm.config import Run, Stage
from jaxmllm.data.build import sample_spec, weighted_sources
from jaxmllm.data.sizes import epoch_size
from jaxmllm.plan.compile import shard_bytes
from jaxmllm.report import parts
from jaxmllm.report.page import Share
from jaxmllm.train.checkpoint import abstract_on
from jaxmllm.train.optim import rate
from jaxmllm.train.setup import check_stages, check_workdir, stage_program
from jaxmllm.train.state import TrainState

STEPS = 3  # that are timed in each stage
RATES = 200  # steps at which the schedule is looked at, at most


def show(run: Run, workdir: str) -> None:
    """Prints what `run`, with its steps filled in, would do in `workdir`; the first of several processes does.

    Raises ConfigError or ValueError for what training would refuse.
    """
    for line in lines(run, workdir):
        if jax.process_index() == 0:
            print(line, flush=True)


def lines(run: Run, workdir: str) -> Iterator[str]:
    """The lines, as they are found out: the steps of each stage are compiled and timed."""
    mesh, seconds = run.mesh.build(), 0.0
    check_workdir(run, workdir)
    with jax.set_mesh(mesh):
        check_stages(run, mesh)
    yield f"{run.name} in {workdir}, on {mesh.size} x {jax.devices()[0].device_kind}; nothing is written"
    yield from table(run)
    for stage in run.stages:
        first = newest_step(workdir, stage)
        yield ""
        yield (
            f"stage {stage.name}: steps {first + 1} to {stage.steps}"
            if first < stage.steps
            else (f"stage {stage.name}: its {stage.steps} steps are done")
        )
        yield from data_lines(run, stage)
        yield f"  rate     {schedule(stage)}"
        yield from memory_lines(run, stage, mesh)
        found = bench.measure(run, stage, STEPS, real=True)
        step = found["step_seconds"] + found["data_wait_seconds"]
        left = found["compile_seconds"] + (stage.steps - first) * step if first < stage.steps else 0.0
        seconds += left
        peak = f"{size(found['peak_memory_bytes'])} a device, as the {found['peak_memory_from']} counts it"
        yield f"           in a step {peak}"
        yield (
            f"  time     {1e3 * step:.0f} ms a step ({STEPS} measured, {1e3 * found['data_wait_seconds']:.0f} of it "
            f"waiting for data), {found['compile_seconds']:.0f} s to compile: {clock(left)} in all"
        )
    yield ""
    yield f"in all {clock(seconds)}, without loading weights, evaluations and saves"


def table(run: Run) -> Iterator[str]:
    """The parts, as `jaxmllm report` shows them."""
    (found,) = (block for block in parts.section(run).blocks if hasattr(block, "rows"))
    rows = [[*found.head], *([text(cell) for cell in row] for row in found.rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def text(cell: Any) -> str:
    return f"{cell:.1%}" if isinstance(cell, Share) else f"{cell:,}" if isinstance(cell, int) else str(cell)


def newest_step(workdir: str, stage: Stage) -> int:
    """The step that the stage would go on from; 0 for a new one."""
    folder = Path(workdir) / stage.name / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def data_lines(run: Run, stage: Stage) -> Iterator[str]:
    """What a step and an epoch hold."""
    data, sources = run.data_of(stage), weighted_sources(stage)
    samples, per_row = epoch_size(sources, sample_spec(run, stage), data.packing)
    records, a_step = sum(len(source) for source, _ in sources), stage.rows * per_row
    yield (
        f"  data     {float(a_step):.1f} samples a step, in {stage.rows} rows of {data.seq_len} tokens and "
        f"{data.image_slots} pictures; accumulate={stage.accumulate}"
    )
    yield (
        f"           {round(samples):,} samples an epoch, of {records:,} records in {len(sources)} sources: "
        f"{float(stage.steps * a_step / samples):.2f} epochs"
    )


def schedule(stage: Stage) -> str:
    """The rate at the first step, at its peak and at the last step."""
    rates = rate(stage.optim, stage.steps)
    at = {1 + round(k * (stage.steps - 1) / RATES) for k in range(RATES + 1)}
    found = {step: float(rates(step - 1)) for step in sorted(at)}
    peak = max(found, key=found.get)
    named = ", ".join(f"{found[step]:.3g} at step {step}" for step in sorted({1, peak, stage.steps}))
    return f"{named}: {type(stage.optim).__name__}, {stage.optim.schedule}"


def memory_lines(run: Run, stage: Stage, mesh: jax.sharding.Mesh) -> Iterator[str]:
    """Bytes of the state on one device, by what they are."""
    with jax.set_mesh(mesh):
        abstract, new_train_state, _ = stage_program(run, stage, mesh)
        state: TrainState = abstract_on(mesh, jax.eval_shape(new_train_state, abstract))
    trained, total = (sum(x.size for x in tree.values()) for tree in (state.trainable, abstract))
    yield f"  trained  {trained:,} of {total:,} parameters"
    groups = {"trained parameters": state.trainable, "frozen": state.frozen, "optimizer": state.opt_state}
    groups |= {"moving average": state.ema}
    held = {name: shard_bytes(tree) for name, tree in groups.items()}
    named = ", ".join(f"{name} {size(count)}" for name, count in held.items() if count)
    yield f"  memory   {size(sum(held.values()))} of state a device: {named}"


def size(count: float) -> str:
    """Bytes in words: 1536 -> "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def clock(seconds: float) -> str:
    return tqdm.format_interval(seconds)
