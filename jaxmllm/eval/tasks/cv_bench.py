"""CV-Bench (Tong et al. 2024, arXiv 2406.16860), and other question sets in its row format, with two references.

A row: {"idx", "type", "task", "image", "question", "choices", "answer": "(B)", "prompt", "source"}; without choices the
answer is the text itself. Image paths are relative to the file, and "filename", CV-Bench's own column for the path, may
stand in place of "image".
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.eval.answer import Question
from jaxmllm.eval.sheet import draw_sheet
from jaxmllm.eval.tasks.base import QuestionTask, Result, read_rows
from jaxmllm.eval.tasks.choices import Row, blind_rules, is_right, letter


@dataclasses.dataclass(frozen=True)
class CVBench(QuestionTask):
    """Percent of right answers, by kind of question (the column "task").

    path: JSONL file of rows. train_path: rows of training questions, from which the reference that sees no picture
    learns its rules; without it there is no such reference. shuffled: also ask each question about the picture of
    another one, which takes twice the time. A model that looks scores better than both.
    """

    path: str
    train_path: str | None = None
    _: dataclasses.KW_ONLY
    name: str = "cv_bench"
    shuffled: bool = True

    def rows(self) -> list[Row]:
        """The rows of the file, with `image` as a full path; then, if `shuffled`, each with another's picture."""
        rows = load(self.path)
        if self.train_path:
            known = {row["task"] for row in load(self.train_path)}
            if missing := sorted({row["task"] for row in rows} - known):
                raise ValueError(f"{self.train_path} has no row of the task {missing[0]!r}, which {self.path} asks")
        order = np.random.default_rng(0).permutation(len(rows)) if self.shuffled else []
        return rows + [
            {**row, "image": rows[i]["image"], "place": f"{row['place']} shuffled"} for row, i in zip(rows, order)
        ]

    def question(self, row: Row) -> Question:
        return Question(row["prompt"], (row["image"],), place=row["place"])

    def score(self, rows: Sequence[Row], replies: Sequence[str]) -> Result:
        """details: {"heldout", "blind", "shuffled"}, each as in `scores`."""
        count = len(rows) // 2 if self.shuffled else len(rows)
        rows, right = rows[:count], [is_right(row, reply) for row, reply in zip(rows, replies)]
        found = {"heldout": scores(rows, right[:count])}
        if self.train_path:
            rules = blind_rules(load(self.train_path))
            found["blind"] = scores(rows, [is_right(row, rules[row["task"]](row)) for row in rows])
        if self.shuffled:
            found["shuffled"] = scores(rows, right[count:])
        model = found["heldout"]
        numbers = {"accuracy": model["overall"]} | {k: model[k] for k in ("cv_bench",) if k in model}
        numbers |= {name: found[name]["overall"] for name in ("blind", "shuffled") if name in found}
        numbers |= {f"accuracy/{kind}": percent for kind, percent in model["by_kind"].items()}
        draw = functools.partial(draw_sheet, rows, list(replies[:count]))
        return Result(numbers, table(found), found, draw)


def load(path: str) -> list[Row]:
    """Rows of a JSONL file, with `image` as a full path. Raises ValueError that names bad rows with file and line."""
    return [
        {**row, "image": str(Path(path).parent / picture(row)), "choices": row.get("choices") or []}
        for row in read_rows(path, complaint)
    ]


def picture(row: Row) -> Any:
    """The picture's path, as the row gives it."""
    return row.get("image", row.get("filename"))


def complaint(row: Row) -> str | None:
    """What is wrong with a row, or None."""
    for name in ("task", "question", "prompt", "answer", "source"):
        if not isinstance(row.get(name), str) or not row[name]:
            return f"no text in {name!r}; it needs CV-Bench's columns"
    if not isinstance(picture(row), str) or not picture(row):
        return "no path in 'image' or 'filename'; it needs CV-Bench's columns"
    choices = row.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        return "'choices' is no list of texts"
    if choices and row["answer"] not in [letter(i) for i in range(len(choices))]:
        return f"the answer {row['answer']!r} is none of the letters (A) to {letter(len(choices) - 1)}"
    return None


def scores(rows: Sequence[Row], right: Sequence[bool]) -> dict[str, Any]:
    """{"overall", "by_kind", "n"}: percent of all rows, percent of each task, rows of each task.

    For CV-Bench's own sources also "cv_bench" = mean of 2D and 3D, where 2D is the mean of ADE20K and COCO and 3D is
    Omni3D (Tong et al. 2024, appendix).
    """
    kinds, sources = defaultdict(list), defaultdict(list)
    for row, ok in zip(rows, right):
        kinds[row["task"].lower()].append(ok)
        sources[row["source"]].append(ok)
    percent = {k: round(100 * float(np.mean(v)), 2) for k, v in sorted(kinds.items())}
    result = {
        "overall": round(100 * float(np.mean(right)), 2),
        "by_kind": percent,
        "n": {k: len(v) for k, v in kinds.items()},
    }
    if {"ADE20K", "COCO", "Omni3D"} <= set(sources):
        two_d = np.mean([np.mean(sources["ADE20K"]), np.mean(sources["COCO"])])
        result["cv_bench"] = round(100 * float((two_d + np.mean(sources["Omni3D"])) / 2), 2)
    return result


def table(found: dict[str, dict[str, Any]]) -> str:
    """{"heldout", "blind", "shuffled"} as text: one line per kind of question, and one for all."""
    model, titles = found["heldout"], ["model", *list(found)[1:]]
    lines = [f"{'kind':<10} {'n':>5} " + " ".join(f"{title:>{width(title)}}" for title in titles)]
    for kind, n in sorted(model["n"].items()):
        lines.append(f"{kind:<10} {n:>5} " + cells(titles, [each["by_kind"][kind] for each in found.values()]))
    total = cells(titles, [each["overall"] for each in found.values()])
    lines.append(f"{'all':<10} {sum(model['n'].values()):>5} {total}")
    return "\n".join(lines)


def cells(titles: Sequence[str], values: Sequence[float]) -> str:
    return " ".join(f"{value:>{width(title)}.1f}" for title, value in zip(titles, values))


def width(title: str) -> int:
    return max(7, len(title) + 1)
