"""How replies to questions with choices are read, and rules that answer without looking at the picture.

A row has "choices" (texts) and "answer": a letter such as "(B)"; without choices the answer is the text itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]


def normalize(text: str) -> str:
    """Lower case, single spaces, no space before punctuation, no full stop at the end."""
    return re.sub(r"\s+([.,?!])", r"\1", " ".join(text.lower().split())).rstrip(".")


def parse(reply: str, choices: Sequence[str]) -> str | None:
    """The letter "(X)" that a reply chooses, or None if it chooses nothing.

    That is a capital in parentheses, else the text of exactly one choice, else a single leading capital ("B", "B.").
    """
    if found := re.search(r"\(([A-Z])\)", reply):
        return found[0]
    same = [i for i, choice in enumerate(choices) if normalize(choice) == normalize(reply)]
    if len(same) == 1:
        return letter(same[0])
    if found := re.match(r"\s*([A-Z])(?![a-zA-Z])", reply):
        return f"({found[1]})"
    return None


def letter(i: int) -> str:
    """0 -> "(A)"."""
    return f"({chr(ord('A') + i)})"


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
