"""How fast a run trained, and when, where and with which versions its processes were started."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxmllm.config import Stage
from jaxmllm.report import plots
from jaxmllm.report.history import line, marks
from jaxmllm.report.page import Block, Figure, Grid, Missing, Section, Share, Table, Text
from jaxmllm.report.workdir import RunFiles

NAMES = {"step_ms": "ms per step", "data_wait": "share of time waiting for data", "mfu": "MFU"}


def section(run: RunFiles) -> Section:
    """The section: a table of speeds by stage, time per step over the steps, and the starts."""
    if not run.metrics:
        command = f"jaxmllm train CONFIG --workdir {run.folder}"
        return Section("Speed", [Missing("No step has been logged in metrics.jsonl yet.", command)])
    rows = [speed(stage, run.rows_of(stage)) for stage in run.config.stages if run.rows_of(stage)]
    head = ["stage", "steps", "minutes", "ms per step", "rows/s", "tokens/s", "images/s", "waiting for data"]
    has_mfu = any("mfu" in row for row in run.metrics)
    caption = "Medians of the logged intervals; minutes without compiling, evaluating and what a restart repeated."
    blocks: list[Block] = [Table([*head, "MFU"] if has_mfu else head, rows, caption)]
    drawn = [name for name in NAMES if any(name in row for row in run.metrics)]
    curves = [plots.lines(NAMES[name], {name: line(run, run.metrics, name)}, marks=marks(run)) for name in drawn]
    blocks.append(Grid([Figure(curve) for curve in curves]))
    return Section("Speed", [*blocks, *starts(run)])


def speed(stage: Stage, rows: list[dict[str, Any]]) -> list[Any]:
    """The cells of a stage."""

    def median(name: str) -> float | None:
        values = [row[name] for row in rows if row.get(name) is not None]
        return float(np.median(values)) if values else None

    before = [0, *(row["step"] for row in rows)]
    minutes = sum((row["step"] - last) * row["step_ms"] for last, row in zip(before, rows)) / 60_000
    wait, ms = median("data_wait"), median("step_ms")
    cells = [stage.name, rows[-1]["step"], round(minutes, 1), ms, 1e3 * stage.rows / ms]
    cells += [median("tokens_per_s"), median("images_per_s"), Share(wait)]
    return cells + ([Share(median("mfu"))] if median("mfu") is not None else [])


def starts(run: RunFiles) -> list[Block]:
    """When the run was started, and the versions of the last start."""
    if not run.starts:
        return [Missing(f"{run.folder}/starts.jsonl, which says when and where the run was started, is not there.")]
    rows = [
        [row["time"].replace("T", " "), f"{row['stage']}, step {row['step']:,}", devices(row), row["hosts"]]
        for row in run.starts
    ]
    versions = run.starts[-1]["versions"]
    changed = len({tuple(sorted(row["versions"].items())) for row in run.starts}) > 1
    whose = "Versions at the last start (earlier ones had others): " if changed else "Versions: "
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [Table(["started", "from", "devices", "hosts"], rows), Text(f"{whose}{named}.")]


def devices(row: dict[str, Any]) -> str:
    """The devices of a start in words."""
    return f"{row['devices']} x {row['device']}"
