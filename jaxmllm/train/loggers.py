"""Loggers as values of a config: where the metrics of a run are written.

A logger is a frozen dataclass with `open(workdir, run, stage, step)`, which returns an object with
`write(row, step, task)` and `close()`. run, stage: the config's Run and Stage. step: the step of the stage that a run
goes on from, 0 for a new stage; what an interrupted run wrote about later steps is to be forgotten, since they come
again. row: metrics by name, floats; steps are counted from 1. task: the name of the evaluation that the row is the
result of, None for the metrics of training. Only process 0 opens loggers.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from jaxmllm.train.events import EventFile


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """WORKDIR/metrics.jsonl: one JSON object per row, with the stage's name, the step and "eval", the task, if any."""

    def open(self, workdir: str, run: Any, stage: Any, step: int) -> JsonLinesWriter:
        """Raises ValueError if the file has a line that is no row."""
        path = Path(workdir) / "metrics.jsonl"
        drop_rows_after(path, stage.name, step)
        return JsonLinesWriter(path, stage.name)


class JsonLinesWriter:
    """Appends rows to a file; each is on its way to the disk when `write` returns, so a killed process loses none."""

    def __init__(self, path: Path, stage: str):
        self.file, self.stage = open(path, "a"), stage

    def write(self, row: dict[str, float | None], step: int, task: str | None = None) -> None:
        at = {"stage": self.stage, "step": step} | ({"eval": task} if task else {})
        self.file.write(json.dumps({**at, **row}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def drop_rows_after(path: Path, stage: str, step: int) -> None:
    """Removes the rows of `stage` with a later step, and a last line that is incomplete.

    Raises ValueError for another line that is no row.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):  # the process was killed while it wrote
            break
        try:
            row = json.loads(line)
            later = row["stage"] == stage and row["step"] > step
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number} is no row of metrics; mend or remove that line") from error
        if not later:
            kept.append(line)
    if len(kept) < len(lines):
        part = path.with_suffix(".part")
        part.write_text("".join(kept))
        os.replace(part, path)


def named(row: dict[str, float | None], task: str | None) -> dict[str, float]:
    """The numbers of a row, as TASK/METRIC if they are a task's; what a task had nothing to measure of is left out."""
    return {f"{task}/{name}" if task else name: value for name, value in row.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class TensorBoard:
    """WORKDIR/tensorboard/STAGE: event files, one for each start of the stage."""

    def open(self, workdir: str, run: Any, stage: Any, step: int) -> TensorBoardWriter:
        return TensorBoardWriter(EventFile(Path(workdir) / "tensorboard" / stage.name, step))


class TensorBoardWriter:
    """One scalar per metric; those of a task are TASK/METRIC. A killed process loses none."""

    def __init__(self, file: EventFile):
        self.file = file

    def write(self, row: dict[str, float | None], step: int, task: str | None = None) -> None:
        self.file.write(named(row, task), step)

    def close(self) -> None:
        self.file.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsAndBiases:
    """https://wandb.ai: one W&B run per stage, grouped by the workdir. Needs the extra `wandb`.

    Environment variables of wandb apply, e.g. WANDB_MODE=offline. A resumed stage goes on in the same W&B run, which
    ignores rows of steps that it has already; they are equal.
    """

    project: str
    entity: str | None = None  # team; None: the user's default

    def open(self, workdir: str, run: Any, stage: Any, step: int) -> WeightsAndBiasesWriter:
        """Raises ValueError if wandb is not installed."""
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ValueError('the config logs to W&B; pip install "jaxmllm[wandb]", or change `loggers`') from error
        folder = Path(workdir).absolute()
        named = folder / stage.name / "wandb_id"
        if not named.exists():
            named.parent.mkdir(parents=True, exist_ok=True)
            named.write_text(uuid.uuid4().hex[:8])
        return WeightsAndBiasesWriter(
            wandb.init(
                project=self.project,
                entity=self.entity,
                id=named.read_text(),
                name=f"{folder.name}/{stage.name}",
                group=folder.name,
                job_type=stage.name,
                dir=str(folder),
                config=json.loads((folder / "config.json").read_text()),
                resume="allow",
                reinit="create_new",
            )
        )


class WeightsAndBiasesWriter:
    """Rows of a W&B run."""

    def __init__(self, run: Any):
        self.run = run

    def write(self, row: dict[str, float | None], step: int, task: str | None = None) -> None:
        self.run.log(named(row, task), step=step)

    def close(self) -> None:
        self.run.finish()
