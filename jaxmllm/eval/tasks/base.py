"""What a task is: it loads and checks all its data, and then measures parameters as often as they are given.

Another task is one more file with a frozen dataclass; a config names its values in Stage.evals, and `jaxmllm eval
--task` takes one from a file. Most tasks ask questions: they are subclasses of QuestionTask.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxmllm.config import Run, Stage
from jaxmllm.eval.answer import Answerer, Question, refuse
from jaxmllm.train.state import Params

Row = Any
Note = Callable[[dict[str, Any]], None]  # writes a row of a JSONL file at once


@dataclasses.dataclass(frozen=True)
class Result:
    """What a task has measured.

    numbers: flat, for the metrics and a line; None where there was nothing to measure. table: text of several lines.
    details: what the JSON file of `jaxmllm eval` holds in place of `numbers`. draw(path): writes a PNG.
    """

    numbers: dict[str, float | None]
    table: str
    details: dict[str, Any] | None = None
    draw: Callable[[str], None] | None = None

    def line(self) -> str:
        """The main numbers; those of subdivisions have a "/" in their name."""
        return "  ".join(f"{k} {number(v)}" for k, v in self.numbers.items() if "/" not in k)


def number(value: float | None) -> str:
    """A number with at most four digits after the point."""
    return "none" if value is None else f"{value:.4f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"


Measure = Callable[[Params, Note], Result]


class Task(Protocol):
    """name: unique among the tasks of a stage."""

    name: str

    def prepare(self, run: Run, stage: Stage, workdir: str) -> Measure:
        """Loads and checks all data -> measure(params, note), which compiles once.

        params: by path, on the mesh of `run`, in its compute dtype. note(row) keeps what was found so far. Several
        processes call both in step. Raises ValueError for data that cannot be used.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionTask:
    """A task that asks questions. Subclasses define `rows`, `question` and `score`."""

    name: str = "questions"
    max_new_tokens: int = 16
    batch: int = 64  # questions asked at once

    def rows(self) -> Sequence[Row]:
        """All rows. Raises ValueError that names each bad row with file and line (see `read_rows`)."""
        raise NotImplementedError

    def question(self, row: Row) -> Question:
        """The prompt and pictures of a row."""
        raise NotImplementedError

    def score(self, rows: Sequence[Row], replies: Sequence[str]) -> Result:
        """The result of all rows and the replies to them."""
        raise NotImplementedError

    def prepare(self, run: Run, stage: Stage, workdir: str) -> Measure:
        """As Task.prepare. Every question is prepared once, so that none fails after others were asked."""
        rows = self.rows()
        if not rows:
            raise ValueError(f"task {self.name} has no rows")
        questions = [self.question(row) for row in rows]
        answerer = Answerer(run, {}, self.max_new_tokens)
        answerer.check(questions)

        def measure(params: Params, note: Note) -> Result:
            return self.score(rows, self.ask(answerer.holding(params), questions, note))

        return measure

    def ask(self, answerer: Answerer, questions: Sequence[Question], note: Note = lambda row: None) -> list[str]:
        """The replies to all questions, each noted as it comes."""
        replies = []
        for question, reply in zip(questions, answerer.ask(questions, self.batch)):
            note({"eval": self.name, "row": question.place, "prompt": question.prompt, "reply": reply})
            replies.append(reply)
        return replies


def read_rows(path: str, complain: Callable[[dict[str, Any]], str | None]) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with its "place", e.g. "rows.jsonl:17". Empty lines are left out.

    complain(row): what is wrong with it, or None. Raises ValueError that counts the bad rows and names the first ones,
    and for a file that is missing or empty.
    """
    if not Path(path).is_file():
        raise ValueError(f"no file of rows {path!r}")
    rows, bad = [], []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
            wrong = complain(row) if isinstance(row, dict) else "not a JSON object"
        except json.JSONDecodeError as error:
            row, wrong = {}, f"not JSON ({error})"
        rows.append({**row, "place": place} if not wrong else {})
        bad += [f"{place}: {wrong}"] if wrong else []
    refuse(bad, len(rows))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows
