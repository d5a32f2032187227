"""What the language model looked at while it gave some of the answers that `jaxmllm eval` has noted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxmllm.eval.attend import Attention, answer_attention
from jaxmllm.eval.restore import restore_answerer
from jaxmllm.eval.tasks.choices import Row, answer_text, is_right
from jaxmllm.eval.tasks.cv_bench import CVBench
from jaxmllm.json_lines import read_lines
from jaxmllm.report.page import Block, Card, Grid, Missing, Picture, Section, Text
from jaxmllm.report.plots import overlay, png
from jaxmllm.report.workdir import RunFiles

COUNT = 9  # answers
EXPLAINED = (
    "The picture as the model sees it, and beside it the attention of the answer's tokens to each of its cells: a mean "
    "over the layers and heads of the language model, bright where it is largest. The rest goes to the text."
)


def section(run: RunFiles) -> Section:
    """The section: cards of answers of all kinds, or why there are none."""
    replies = run.folder / "eval_replies.jsonl"
    if not replies.exists():
        command = f"jaxmllm eval {run.folder} --rows ROWS.jsonl"
        return Section("Attention", [Missing("There are no answers yet whose attention could be shown.", command)])
    try:
        blocks = attention_blocks(run, chosen(replies))
    except (ValueError, OSError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        blocks = [Missing(f"The attention cannot be computed here: {lines[0]}")]
    return Section("Attention", blocks)


def attention_blocks(run: RunFiles, answers: Sequence[tuple[Row, str]]) -> list[Block]:
    """Cards of rows and the replies to them, by the newest checkpoint."""
    if not answers:
        return [Missing("None of the noted answers is to a question of a file of rows that is still there.")]
    answerer = restore_answerer(str(run.folder), overrides=run.overrides, config=run.own)
    found = answer_attention(answerer, [(CVBench("").question(row), reply) for row, reply in answers])
    cards = [card(row, reply, seen) for (row, reply), seen in zip(answers, found)]
    return [Text(EXPLAINED), Grid(cards, small=True)]


def chosen(replies: Path) -> list[tuple[Row, str]]:
    """COUNT (row, reply) pairs, taken in turn from each kind of question; rows whose file has gone, or has other
    questions in their places, are left out."""
    said = {line["row"]: line for line in read_lines(replies)}
    files = dict.fromkeys(place.rpartition(":")[0] for place in said if not place.endswith(" shuffled"))
    known = [row for file in files if Path(file).is_file() for row in CVBench(file, shuffled=False).rows()]
    rows = [row for row in known if row.get("images") and said.get(row["place"], {}).get("prompt") == row["prompt"]]
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["task"], []).append(row)
    most = max(map(len, kinds.values()), default=0)
    in_turn = [own[i] for i in range(most) for own in kinds.values() if i < len(own)]
    return [(row, said[row["place"]]["reply"]) for row in in_turn[:COUNT]]


def card(row: Row, reply: str, seen: Attention) -> Card:
    """One answer: picture and attention, question, reply, and the right answer if that is another."""
    right = is_right(row, reply)
    lines = [(row["question"], ""), (reply or "(nothing)", "right" if right else "wrong")]
    lines += [] if right else [(f"truth: {answer_text(row)}", "quiet")]
    lines.append((f"{seen.share:.0%} of the attention to the picture", "quiet"))
    alt = f"Attention of the answer {reply!r} over its picture"
    return Card(Picture(png(overlay(seen.picture, seen.cells)), alt), lines)
