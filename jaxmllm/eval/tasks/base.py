"""What a task is: it loads and checks all its data, and then measures parameters as often as they are given.

Another task is one more file with a frozen dataclass; a config names its values in Stage.evals, and `jaxmllm eval
--task` takes one from a file. Most tasks ask questions: they are subclasses of QuestionTask.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxmllm.config import Run, Stage
from jaxmllm.errors import suggest_path
from jaxmllm.eval.answer import Answerer, Question, refuse, summary
from jaxmllm.processes import say
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
        """All rows, from `read_rows`: one that cannot be used is {"place", "bad": what is wrong}."""
        raise NotImplementedError

    def question(self, row: Row) -> Question:
        """The prompt and pictures of a row."""
        raise NotImplementedError

    def asked(self, rows: Sequence[Row]) -> Sequence[Row]:
        """What is asked, from the usable rows: these, which may be followed by others made of them."""
        return rows

    def score(self, rows: Sequence[Row], replies: Sequence[str]) -> Result:
        """The result of all rows that were asked and the replies to them."""
        raise NotImplementedError

    def prepare(self, run: Run, stage: Stage, workdir: str) -> Measure:
        """As Task.prepare. Every question is prepared once, so that none fails after others were asked.

        Rows that cannot be asked (no picture, too long, ..) are left out; the result counts and names them, and a line
        on stderr does so before the first question. Raises ValueError if no row can be asked.
        """
        answerer = Answerer(run, {}, self.max_new_tokens)
        rows, bad = self.usable(answerer)
        asked = self.asked(rows)
        questions = [self.question(row) for row in asked]
        refuse(answerer.complaints(questions[len(rows) :]), len(questions))
        left_out = summary(bad, len(bad) + len(rows))
        if bad:
            say(f"task {self.name}: {left_out}")

        def measure(params: Params, note: Note) -> Result:
            result = self.score(asked, self.ask(answerer.holding(params), questions, note))
            if not bad:
                return result
            details = {**(result.details or result.numbers), "bad_rows": bad}
            numbers, table = {**result.numbers, "bad": len(bad)}, f"{result.table}\n{left_out}"
            return dataclasses.replace(result, numbers=numbers, table=table, details=details)

        return measure

    def usable(self, answerer: Answerer) -> tuple[list[Row], list[str]]:
        """The rows that can be asked, and what is wrong with each of the others."""
        rows = self.rows()
        if not rows:
            raise ValueError(f"task {self.name} has no rows")
        bad = [f"{row['place']}: {row['bad']}" for row in rows if is_bad(row)]
        rows = [row for row in rows if not is_bad(row)]
        complaints = answerer.complaints([self.question(row) for row in rows])
        bad += [text for text in complaints if text]
        rows = [row for row, text in zip(rows, complaints) if not text]
        if not rows:
            refuse(bad, len(bad))
        return rows, bad

    def ask(self, answerer: Answerer, questions: Sequence[Question], note: Note = lambda row: None) -> list[str]:
        """The replies to all questions, each noted as it comes."""
        replies = []
        for question, reply in zip(questions, answerer.ask(questions, self.batch)):
            note({"eval": self.name, "row": question.place, "prompt": question.prompt, "reply": reply})
            replies.append(reply)
        return replies


def is_bad(row: Row) -> bool:
    """Whether `read_rows` found something wrong with a row."""
    return isinstance(row, dict) and "bad" in row


def read_rows(path: str, complain: Callable[[dict[str, Any]], str | None]) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with its "place", e.g. "rows.jsonl:17". Empty lines are left out.

    complain(row): what is wrong with it, or None. A row that cannot be used is {"place", "bad": what is wrong}. Raises
    ValueError for a file that is missing or empty.
    """
    if not Path(path).is_file():
        raise ValueError(f"no file of rows {path!r}{suggest_path(path)}")
    rows = []
    for number, line in enumerate(Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if line.strip():
            row, wrong = read_row(line, complain)
            place = f"{path}:{number}"
            rows.append({"place": place, "bad": wrong} if wrong else {**row, "place": place})
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def read_row(line: bytes, complain: Callable[[dict[str, Any]], str | None]) -> tuple[dict[str, Any], str | None]:
    """One line of JSON -> (the object, None), or ({}, what is wrong)."""
    try:
        row = json.loads(line.decode())
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError:
        return {}, "not UTF-8, or half a surrogate pair"
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON ({error})"
    return row, complain(row) if isinstance(row, dict) else "not a JSON object"
