"""Question sets in CV-Bench's row format: asking, scoring, and the references that a score must beat.

A row: {"idx", "type", "task", "image", "question", "choices", "answer": "(B)", "prompt", "source"}; without choices the
answer is the text itself. Image paths are relative to the file.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Row = dict


def read_rows(path: str) -> list[Row]:
    """Rows of a JSONL file, with `image` as a full path. Raises ValueError naming the file and line."""
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({**row, "image": str(Path(path).parent / row["image"])})
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(
                f"{path}:{number} is not a benchmark row ({error}); it needs CV-Bench's columns"
            ) from error
    return rows


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


def score(rows: list[Row], right: Sequence[bool]) -> dict:
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


def evaluate(
    ask: Callable[[list[str], list[str]], list[str]], rows: list[Row], train_rows: list[Row], seed: int = 0
) -> dict:
    """Asks all rows -> {"heldout", "blind", "shuffled", "replies"}.

    ask(image paths, prompts) -> replies. `shuffled` is the same model with the pictures permuted among the questions; a
    model that does not look scores no better than `shuffled` and `blind`.
    """
    images, prompts = [row["image"] for row in rows], [row["prompt"] for row in rows]
    replies = ask(images, prompts)
    order = np.random.default_rng(seed).permutation(len(rows))
    shuffled = ask([images[i] for i in order], prompts)
    rules = blind_rules(train_rows)
    return {
        "heldout": score(rows, [is_right(row, reply) for row, reply in zip(rows, replies)]),
        "blind": score(rows, [is_right(row, rules[row["task"]](row)) for row in rows]),
        "shuffled": score(rows, [is_right(row, reply) for row, reply in zip(rows, shuffled)]),
        "replies": replies,
    }


def table(result: dict) -> str:
    """The scores of `evaluate` as text: one line per kind of question, and one for all."""
    columns = [result[name] for name in ("heldout", "blind", "shuffled")]
    counts = result["heldout"]["n"]
    scores = [(kind, n, *(column["by_kind"][kind] for column in columns)) for kind, n in sorted(counts.items())]
    scores.append(("all", sum(counts.values()), *(column["overall"] for column in columns)))
    lines = [f"{'kind':<10} {'n':>5} {'model':>7} {'blind':>7} {'shuffled':>9}"]
    lines += [
        f"{kind:<10} {n:>5} {model:>7.1f} {blind:>7.1f} {shuffled:>9.1f}" for kind, n, model, blind, shuffled in scores
    ]
    return "\n".join(lines)


def training_cost(workdir: str) -> dict[str, float]:
    """{"train_seconds", "steps"} of all stages, from the metrics of a workdir."""
    seconds, steps = 0.0, 0
    file, last_step = Path(workdir) / "metrics.jsonl", {}
    for line in file.read_text().splitlines() if file.exists() else []:
        row = json.loads(line)
        n = row["step"] - last_step.get(row["stage"], 0)
        seconds, steps = seconds + n * row["step_ms"] / 1e3, steps + n
        last_step[row["stage"]] = row["step"]
    return {"train_seconds": round(seconds, 1), "steps": steps}
