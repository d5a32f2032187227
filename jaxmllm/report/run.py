"""The page of a run."""

from __future__ import annotations

from collections.abc import Sequence

from jaxmllm.report import answers, attention, data, history, parts, training
from jaxmllm.report.page import Code, Section, render
from jaxmllm.report.workdir import RunFiles, read_files


def report(workdir: str, overrides: Sequence[str] = (), config: str | None = None) -> str:
    """The page of the run in `workdir`, finished or not, as HTML.

    overrides, config: as in eval.restore.newest_checkpoint. Raises ConfigError if the folder holds no run; what is
    missing otherwise is named on the page, with the command that makes it.
    """
    run = read_files(workdir, overrides, config)
    sections = [
        history.section(run),
        answers.section(run),
        attention.section(run),
        training.section(run),
        data.section(run),
        parts.section(run.config),
        Section("Config", [Code("config.json of the run", run.config_text())]),
    ]
    return render(f"{run.config.name}: {run.folder}", lead(run), sections)


def lead(run: RunFiles) -> str:
    """How far the run is, in words."""
    stages = [f"{stage.name} {run.done(stage):,} of {stage.steps or '?':,} steps" for stage in run.config.stages]
    text = f"A run of jaxmllm: {', '.join(stages)}."
    return text + f" First started {run.starts[0]['time'].replace('T', ' ')}." if run.starts else text
