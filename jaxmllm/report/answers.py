"""How often the model is right, by kind of question, and what it says: what `jaxmllm eval` has left in the workdir."""

from __future__ import annotations

from typing import Any

from jaxmllm.report import plots
from jaxmllm.report.page import Block, Figure, Missing, Picture, Section, Share, Table
from jaxmllm.report.workdir import RunFiles, read_eval

TITLES = {"heldout": "model", "blind": "blind", "shuffled": "shuffled"}
CAPTION = (
    "Right answers. Blind: the best rule that does not look at the picture. Shuffled: the same model, each "
    "question asked about the picture of another one. Unparsed: replies of the model that name no choice, or several."
)


def section(run: RunFiles) -> Section:
    """The section: a plot and a table of accuracies, and the sheet of scenes."""
    found, sheet = read_eval(run.folder), run.folder / "eval.png"
    if not found:
        command = f"jaxmllm eval {run.folder} --rows ROWS.jsonl --train-rows TRAINING_ROWS.jsonl"
        return Section("Answers", [Missing("The answers have not been measured yet.", command)])
    if "heldout" not in found:
        rows = [[name, value] for name, value in found.items() if isinstance(value, (int, float))]
        return Section("Answers", [Table(["number", "value"], rows)])
    blocks: list[Block] = [Figure(accuracy_plot(found)), accuracy_table(found)]
    if sheet.exists():
        blocks.append(Picture(sheet.read_bytes(), "Scenes with questions, replies and right answers"))
    return Section("Answers", blocks)


def accuracy_plot(found: dict[str, Any]):
    """Accuracy by kind, beside the references that there are."""
    kinds, there = sorted(found["heldout"]["n"]), [name for name in TITLES if name in found]
    series = {TITLES[name]: [found[name]["by_kind"].get(kind) for kind in kinds] for name in there}
    return plots.bars("Right answers, percent", kinds, series, 112)


def accuracy_table(found: dict[str, Any]) -> Table:
    """The table that `jaxmllm eval` prints."""
    there = [name for name in TITLES if name in found]
    counts, columns = found["heldout"]["n"], [(found[name]["by_kind"], found[name]["overall"]) for name in there]
    columns.append((found["heldout"].get("unparsed_by_kind", {}), found["heldout"].get("unparsed")))
    rows = [[kind, counts[kind], *(share(by_kind.get(kind)) for by_kind, _ in columns)] for kind in sorted(counts)]
    rows.append(["all", sum(counts.values()), *(share(overall) for _, overall in columns)])
    return Table(["kind", "questions", *(TITLES[name] for name in there), "unparsed"], rows, CAPTION)


def share(percent: float | None) -> Share | None:
    """A percentage as a part of 1."""
    return None if percent is None else Share(percent / 100)
