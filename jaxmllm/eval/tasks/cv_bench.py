"""CV-Bench (Tong et al. 2024, arXiv 2406.16860), and other question sets in its row format, with two references.

A row: {"idx", "type", "task", "image", "question", "choices", "answer": "(B)", "prompt", "source"}; without choices the
answer is the text itself. Image paths are relative to the file's folder, unless a task names another; "filename",
CV-Bench's own column for the path, may stand in place of "image"; several pictures are a list of paths, and null is a
question without one.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.data.sources.record import path_in
from jaxmllm.errors import shown
from jaxmllm.eval.answer import Question
from jaxmllm.eval.sheet import draw_sheet
from jaxmllm.eval.tasks.base import QuestionTask, Result, is_bad, read_rows
from jaxmllm.eval.tasks.choices import Row, blind_rules, is_right
from jaxmllm.eval.tasks.reply_parser import VERSION, letter, parse


@dataclasses.dataclass(frozen=True)
class CVBench(QuestionTask):
    """Percent of right answers, by kind of question (the column "task").

    path: JSONL file of rows. train_path: rows of training questions, from which the reference that sees no picture
    learns its rules; without it there is no such reference. shuffled: also ask each question about the picture of
    another one, which takes twice the time. A model that looks scores better than both. image_root, outside_root: as in
    `Source`; without them, pictures are in the folder of the file.
    """

    path: str
    train_path: str | None = None
    _: dataclasses.KW_ONLY
    name: str = "cv_bench"
    shuffled: bool = True
    image_root: str | None = None
    outside_root: bool = False

    def rows(self) -> list[Row]:
        """The rows of the file, with `images` as full paths."""
        return load(self.path, self.image_root, self.outside_root)

    def asked(self, rows: Sequence[Row]) -> list[Row]:
        """The rows; then, if `shuffled`, each with the pictures of another row that has some."""
        seeing = [i for i, row in enumerate(rows) if row["images"]]
        other = dict(zip(seeing, np.random.default_rng(0).permutation(seeing)))
        again = enumerate(rows) if self.shuffled else ()
        return [*rows] + [
            {**row, "images": rows[other.get(i, i)]["images"], "place": f"{row['place']} shuffled"} for i, row in again
        ]

    def question(self, row: Row) -> Question:
        return Question(row["prompt"], tuple(row["images"]), place=row["place"])

    def score(self, rows: Sequence[Row], replies: Sequence[str]) -> Result:
        """details: {"heldout", "blind", "shuffled"}, each as in `scores`, and "parser", the version of the rules that
        read the replies."""
        count = len(rows) // 2 if self.shuffled else len(rows)
        rows, shuffled = rows[:count], replies[count:]
        found = {"heldout": scores(rows, replies[:count])}
        if self.train_path:
            found["blind"] = scores(*self.blind(rows))
        if self.shuffled:
            found["shuffled"] = scores(rows, shuffled)
        model = found["heldout"]
        numbers = {"accuracy": model["overall"]} | {k: model[k] for k in ("cv_bench", "unparsed") if k in model}
        numbers |= {name: found[name]["overall"] for name in ("blind", "shuffled") if name in found}
        numbers |= {f"accuracy/{kind}": percent for kind, percent in model["by_kind"].items()}
        draw = functools.partial(draw_sheet, rows, list(replies[:count]))
        return Result(numbers, table(found), found | {"parser": VERSION}, draw)

    def blind(self, rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
        """The rows of tasks that the training rows have, and the answers of the rules."""
        rules = blind_rules([row for row in load(self.train_path, outside_root=True) if not is_bad(row)])
        rows = [row for row in rows if row["task"] in rules]
        return rows, [rules[row["task"]](row) for row in rows]


def load(path: str, image_root: str | None = None, outside_root: bool = False) -> list[Row]:
    """Rows of a JSONL file, with `images` as full paths, answers and choices as texts; bad ones as in `read_rows`."""
    folder = image_root or str(Path(path).parent)

    def complain(row: Row) -> str | None:
        return complaint(row) or escape(row, folder, outside_root)

    return [row if is_bad(row) else complete(row, folder) for row in read_rows(path, complain)]


def escape(row: Row, folder: str, outside_root: bool) -> str | None:
    """What is wrong with where the pictures of a row are, or None."""
    for name in pictures(row):
        try:
            path_in(folder, name, outside_root)
        except ValueError as error:
            return f"the picture {shown(name)}: {error}"
    return None


def complete(row: Row, folder: str) -> Row:
    """A good row with its pictures as full paths, and numbers among answers and choices as texts."""
    choices = [str(choice) for choice in row.get("choices") or []]
    images = [os.path.join(folder, name) for name in pictures(row)]
    return {**row, "images": images, "choices": choices, "answer": str(row["answer"])}


def pictures(row: Row) -> list[str] | None:
    """The paths as the row gives them; none if it says null, a question without picture; None if it says nothing
    usable."""
    found = row.get("image", row.get("filename", ""))
    names = [] if found is None else found if isinstance(found, list) and found else [found]
    usable = all(isinstance(name, str) and name and "\0" not in name for name in names)
    return names if usable else None


def complaint(row: Row) -> str | None:
    """What is wrong with a row, or None."""
    for name in ("task", "question", "prompt", "source"):
        if not isinstance(row.get(name), str) or not row[name]:
            return f"no text in {name!r}; it needs CV-Bench's columns"
    if pictures(row) is None:
        return "no path in 'image' or 'filename'; it needs CV-Bench's columns, with null for a question without picture"
    choices, answer = row.get("choices") or [], row.get("answer")
    if not isinstance(choices, list) or not all(is_answer(choice) for choice in choices):
        return "'choices' is no list of texts or numbers"
    if not is_answer(answer):
        return "no text or number in 'answer'; it needs CV-Bench's columns"
    if choices and answer not in [letter(i) for i in range(len(choices))]:
        return f"the answer {answer!r} is none of the letters (A) to {letter(len(choices) - 1)}"
    return None


def is_answer(value: Any) -> bool:
    """Whether a value is a text that is not empty, or a number."""
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""


def scores(rows: Sequence[Row], replies: Sequence[str]) -> dict[str, Any]:
    """{"overall", "by_kind", "n", "unparsed", "unparsed_by_kind"}: percent of right replies, of all rows and of each
    task; rows of each task; percent of the replies to rows with choices that name none of them, or several. None where
    there are no rows.

    For CV-Bench's own sources also "cv_bench" = mean of 2D and 3D, where 2D is the mean of ADE20K and COCO and 3D is
    Omni3D (Tong et al. 2024, appendix).
    """
    kinds, unparsed, sources = defaultdict(list), defaultdict(list), defaultdict(list)
    for row, reply in zip(rows, replies):
        kind, ok = row["task"].lower(), is_right(row, reply)
        kinds[kind].append(ok)
        sources[row["source"]].append(ok)
        unparsed[kind] += [parse(reply, row["choices"]) is None] if row["choices"] else []
    result = {
        "overall": percent([ok for values in kinds.values() for ok in values]),
        "by_kind": {k: percent(v) for k, v in sorted(kinds.items())},
        "n": {k: len(v) for k, v in kinds.items()},
        "unparsed": percent([is_unparsed for values in unparsed.values() for is_unparsed in values]),
        "unparsed_by_kind": {k: percent(v) for k, v in sorted(unparsed.items())},
    }
    if {"ADE20K", "COCO", "Omni3D"} <= set(sources):
        two_d = np.mean([np.mean(sources["ADE20K"]), np.mean(sources["COCO"])])
        result["cv_bench"] = round(100 * float((two_d + np.mean(sources["Omni3D"])) / 2), 2)
    return result


def percent(values: Sequence[bool]) -> float | None:
    """The share of true values; None if there are no values."""
    return round(100 * float(np.mean(values)), 2) if values else None


def table(found: dict[str, dict[str, Any]]) -> str:
    """{"heldout", "blind", "shuffled"} as text: one line per kind of question, and one for all.

    The column "unparsed" has the share of replies in the score before it that name no choice. "-" stands where there is
    nothing to measure: kinds without choices, or kinds that the training rows of the blind rules lack.
    """
    model, columns = found["heldout"], []  # (title, values by kind, value of all)
    for title, each in zip(["model", *list(found)[1:]], found.values()):
        columns.append((title, each["by_kind"], each["overall"]))
        if title != "blind":
            columns.append(("unparsed", each["unparsed_by_kind"], each["unparsed"]))
    titles = [title for title, _, _ in columns]
    lines = [f"{'kind':<10} {'n':>5} " + " ".join(f"{title:>{width(title)}}" for title in titles)]
    for kind, n in sorted(model["n"].items()):
        lines.append(f"{kind:<10} {n:>5} " + cells(titles, [by_kind.get(kind) for _, by_kind, _ in columns]))
    total = cells(titles, [overall for _, _, overall in columns])
    lines.append(f"{'all':<10} {sum(model['n'].values()):>5} {total}")
    return "\n".join(lines)


def cells(titles: Sequence[str], values: Sequence[float | None]) -> str:
    texts = ["-" if value is None else f"{value:.1f}" for value in values]
    return " ".join(f"{text:>{width(title)}}" for title, text in zip(titles, texts))


def width(title: str) -> int:
    return max(7, len(title) + 1)
