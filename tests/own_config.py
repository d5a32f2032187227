"""A recipe with parts that are not jaxmllm's: a fuser and a task. tests/test_periodic.py trains and evaluates it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxmllm.config import Eval, Source
from jaxmllm.eval.answer import Question
from jaxmllm.eval.tasks.base import QuestionTask, Result, read_rows
from jaxmllm.eval.tasks.held_out_loss import HeldOutLoss
from jaxmllm.fusers.single import Single
from jaxmllm.recipes import load


class OwnFuser(Single):
    """The last tap, under another name."""


@dataclasses.dataclass(frozen=True)
class ReplyLength(QuestionTask):
    """Mean number of words of the replies to the first rows of a file."""

    path: str
    _: dataclasses.KW_ONLY
    name: str = "reply_length"
    max_new_tokens: int = 4
    batch: int = 4
    count: int = 6

    def rows(self):
        return read_rows(self.path, lambda row: None if row.get("prompt") else "no prompt")[: self.count]

    def question(self, row) -> Question:
        return Question(row["prompt"], (str(Path(self.path).parent / row["image"]),), place=row["place"])

    def score(self, rows, replies) -> Result:
        words = sum(len(reply.split()) for reply in replies) / len(rows)
        return Result({"words": words}, f"{words:.2f} words in {len(replies)} replies")


def config():
    """The toy's smallest variant with the fuser; without evaluation."""
    base = load("configs/toy.py:tiny")
    model = base.model.clone(fusers={**base.model.fusers, "dino": OwnFuser()})
    stages = tuple(dataclasses.replace(stage, steps=4) for stage in base.stages)
    return dataclasses.replace(base, name="own", model=model, stages=stages)


def evaluated():
    """With evaluation: both tasks in the first stage, one at the end of the last stage."""
    base = config()
    align, instruct = base.stages
    loss = HeldOutLoss(Source("data/scenes/align.jsonl"))
    length = ReplyLength("data/scenes/heldout.jsonl")
    align = dataclasses.replace(align, evals=(Eval(task=loss, every=3), Eval(task=length, every=2)))
    instruct = dataclasses.replace(instruct, evals=(Eval(task=length),))
    return dataclasses.replace(base, stages=(align, instruct))


length_of_ten = ReplyLength("data/scenes/heldout.jsonl", count=10)
