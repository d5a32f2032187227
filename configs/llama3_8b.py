"""A plain language model with the sizes of Llama-3-8B on packed text, to compare the cost of the visual path with.

Bring your own tokenizer and text; `jaxmllm plan` needs neither.
"""

import dataclasses

from jaxmllm.config import Data, Rule, Run, Source, Stage
from jaxmllm.data.templates import LLAMA3
from jaxmllm.llms import presets
from jaxmllm.mllm import MLLM
from jaxmllm.objectives.next_token import NextToken
from jaxmllm.train.optimizers import AdamW
from jaxmllm.train.schedules import Cosine


def config() -> Run:
    stage = Stage(
        name="text",
        sources=(Source("data/text/train.jsonl"),),
        steps=10_000,
        rows=256,
        rules=(Rule(".*"),),
        losses={"next_token": 1.0},
        optim=AdamW(lr=3e-5, schedule=Cosine(warmup=0.03, final=0.1), weight_decay=0.1, b2=0.95),
    )
    return Run(
        name="llama3_8b",
        model=MLLM(
            encoders={},
            fusers={},
            aggregator=None,
            llm=presets.llama3_8b(remat="projections"),
            objectives={"next_token": NextToken()},
        ),
        data=Data(tokenizer="data/llama3/tokenizer", template=LLAMA3, seq_len=2048, image_slots=0),
        stages=(stage,),
    )


def long() -> Run:
    """Rows of 8192 tokens, with the same number of tokens per step."""
    base = config()
    stages = tuple(dataclasses.replace(stage, rows=64) for stage in base.stages)
    data = dataclasses.replace(base.data, seq_len=8192)
    return dataclasses.replace(base, name="llama3_8b_long", data=data, stages=stages)
