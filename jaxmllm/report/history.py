"""Losses, other metrics and learning rates over the steps of all stages."""

from __future__ import annotations

from typing import Any

from jaxmllm.report import plots
from jaxmllm.report.page import Block, Figure, Grid, Missing, Section, Table, Text
from jaxmllm.report.workdir import RunFiles

PLACE = ("stage", "step", "eval")  # what a row says about itself
SPEED = ("step_ms", "tokens_per_s", "images_per_s", "data_wait", "mfu")  # shown by training.py
RATES = ("grad_norm", "learning_rate")  # shown after the losses


def section(run: RunFiles) -> Section:
    """The section: a plot for each metric, and the last value of each in every stage."""
    if not run.metrics:
        command = f"jaxmllm train CONFIG --workdir {run.folder}"
        return Section("History", [Missing("No step has been logged in metrics.jsonl yet.", command)])
    blocks: list[Block] = [Text(legend(run))]
    blocks.append(Grid([Figure(plot(run, name)) for name in metric_names(run.metrics)]))
    blocks.append(last_values(run))
    if run.results:
        blocks += [Text("Evaluations while it trained:"), Grid([Figure(each) for each in result_plots(run)])]
    return Section("History", blocks)


def legend(run: RunFiles) -> str:
    """What the lines in the plots mean."""
    text = "Steps are counted over all stages; a grey line is where a stage starts"
    count = len(run.starts) - 1
    if count > 0:
        text += f", a dashed red line where the run was restarted ({count} time{'s' * (count > 1)})"
    return f"{text}."


def metric_names(rows: list[dict[str, Any]]) -> list[str]:
    """The metrics in the order in which they are shown."""
    names = dict.fromkeys(name for row in rows for name in ("loss", *row) if name not in (*PLACE, *SPEED, *RATES))
    return [*names, *(name for name in RATES if any(name in row for row in rows))]


def marks(run: RunFiles) -> list[tuple[float, str]]:
    """The starts of stages, by name, and the restarts, without one, as places on the axis of steps."""
    first = run.first_steps()
    reached = [stage.name for stage in run.config.stages if run.rows_of(stage)]
    stages = [(float(first[name]), name) for name in reached]
    return stages + [(float(first[row["stage"]] + row["step"]), "") for row in run.starts[1:]]


def line(run: RunFiles, rows: list[dict[str, Any]], name: str) -> plots.Line:
    """A metric over the steps of all stages, where rows have it; between stages the line is broken by a NaN."""
    first, x, y, stage = run.first_steps(), [], [], None
    for row in rows:
        if row.get(name) is None:
            continue
        if stage not in (None, row["stage"]):
            x.append(x[-1])
            y.append(float("nan"))
        stage = row["stage"]
        x.append(first[stage] + row["step"])
        y.append(row[name])
    return x, y


def plot(run: RunFiles, name: str):
    """One metric as a plot."""
    return plots.lines(name.replace("_", " "), {name: line(run, run.metrics, name)}, marks=marks(run))


def result_plots(run: RunFiles) -> list:
    """A plot for each task that was evaluated while the run trained: its main numbers over the steps."""
    found = []
    for task in dict.fromkeys(row["eval"] for row in run.results):
        rows = [row for row in run.results if row["eval"] == task]
        names = dict.fromkeys(name for row in rows for name in row if name not in PLACE and "/" not in name)
        series = {name: line(run, rows, name) for name in names}
        found.append(plots.lines(task, series, marks=marks(run), dots=True))
    return found


def last_values(run: RunFiles) -> Table:
    """The metrics of the last logged step of each stage."""
    names = metric_names(run.metrics)
    rows = []
    for stage in run.config.stages:
        if own := run.rows_of(stage):
            steps = f"{own[-1]['step']:,} of {stage.steps:,}" if stage.steps else f"{own[-1]['step']:,}"
            rows.append([stage.name, steps, *(own[-1].get(name) for name in names)])
    head = ["stage", "step", *(name.replace("_", " ") for name in names)]
    return Table(head, rows, "Values of the last logged step of each stage.")
