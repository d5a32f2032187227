"""What a run has left in its folder so far."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmllm.config import Run, Stage
from jaxmllm.json_lines import read_lines
from jaxmllm.recipes import override, read_run


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The files of a run that a report reads; lists are empty where there is no file yet."""

    folder: Path
    config: Run  # with the overrides
    overrides: Sequence[str]
    own: str | None  # the file of a recipe with parts of its own
    metrics: list[dict[str, Any]]  # rows of training steps: "stage", "step", and numbers by name
    results: list[dict[str, Any]]  # rows of evaluations in the loop: also "eval", the task
    starts: list[dict[str, Any]]  # train/starts.py
    bad: list[dict[str, Any]]  # data/ledger.py

    def rows_of(self, stage: Stage) -> list[dict[str, Any]]:
        """The rows of training steps of a stage."""
        return [row for row in self.metrics if row["stage"] == stage.name]

    def done(self, stage: Stage) -> int:
        """The last step of a stage that has a row."""
        return max((row["step"] for row in self.rows_of(stage)), default=0)

    def first_steps(self) -> dict[str, int]:
        """Stage -> the number of steps of the stages before it."""
        found, total = {}, 0
        for stage in self.config.stages:
            found[stage.name] = total
            total += stage.steps or self.done(stage)
        return found

    def config_text(self) -> str:
        """config.json as it is."""
        return (self.folder / "config.json").read_text(encoding="utf-8")


def read_files(workdir: str, overrides: Sequence[str] = (), config: str | None = None) -> RunFiles:
    """Reads a workdir. Arguments as in eval.restore.newest_checkpoint. Raises ConfigError if it holds no run."""
    run, folder = override(read_run(workdir, config), list(overrides)), Path(workdir)
    known = {stage.name for stage in run.stages}
    rows = [row for row in read_lines(folder / "metrics.jsonl") if row.get("stage") in known]
    return RunFiles(
        folder=folder,
        config=run,
        overrides=overrides,
        own=config,
        metrics=[row for row in rows if "eval" not in row],
        results=[row for row in rows if "eval" in row],
        starts=[row for row in read_lines(folder / "starts.jsonl") if row.get("stage") in known],
        bad=read_lines(folder / "bad_samples.jsonl"),
    )


def read_eval(folder: Path) -> dict[str, Any]:
    """What `jaxmllm eval` has written to eval.json; {} if there is none."""
    file = folder / "eval.json"
    return json.loads(file.read_text()) if file.exists() else {}
