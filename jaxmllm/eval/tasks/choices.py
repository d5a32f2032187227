"""Which replies are right, and rules that answer without looking at the picture.

A row has "choices" (texts) and "answer": a letter such as "(B)"; without choices the answer is the text itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmllm.eval.tasks.reply_parser import normalize, parse

Row = dict[str, Any]


def is_right(row: Row, reply: str) -> bool:
    """Whether a reply answers its row correctly."""
    if not row["choices"]:
        return normalize(reply) == normalize(row["answer"])
    return parse(reply, row["choices"]) == row["answer"]


def answer_text(row: Row) -> str:
    """The right answer as text."""
    return row["choices"][ord(row["answer"][1]) - ord("A")] if row["choices"] else row["answer"]


def blind_rules(train_rows: list[Row]) -> dict[str, Callable[[Row], str]]:
    """Per task, the best rule that does not look at the picture, chosen on training rows.

    The rules: a constant answer, a constant letter, the choice that the question names first, or last.
    """
    rules = {}
    for task in {row["task"] for row in train_rows}:
        rows = [row for row in train_rows if row["task"] == task]
        common_text = Counter(answer_text(row) for row in rows).most_common(1)[0][0]
        common_answer = Counter(row["answer"] for row in rows).most_common(1)[0][0]
        options = [
            lambda row, text=common_text: text,
            lambda row, answer=common_answer: answer,
            lambda row: named_choice(row, 0),
            lambda row: named_choice(row, -1),
        ]
        rules[task] = max(options, key=lambda rule: np.mean([is_right(row, rule(row)) for row in rows]))
    return rules


def named_choice(row: Row, which: int) -> str:
    """The choice that the question names first (0) or last (-1); "" if it names none."""
    places = [(row["question"].lower().rfind(choice.lower()), choice) for choice in row["choices"]]
    found = sorted(place for place in places if place[0] >= 0)
    return found[which][1] if found else ""
