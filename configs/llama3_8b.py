"""A plain language model with the sizes of Llama-3-8B on packed text, with which the cost of the visual path is
compared.

Bring your own tokenizer and text; `jaxmllm plan` needs neither.
"""

import dataclasses

from jaxmllm.config import Data, Optim, Rule, Run, Source, Stage
from jaxmllm.data.templates import LLAMA3
from jaxmllm.llms import presets
from jaxmllm.mllm import MLLM


def config() -> Run:
    optim = Optim(3e-5, warmup=0.03, final=0.1, weight_decay=0.1, b2=0.95)
    rules = (Rule("norm", decay=False), Rule(".*"))
    stage = Stage("text", (Source("data/text/train.jsonl"),), 10_000, 256, rules, {"next_token": 1.0}, optim)
    return Run(
        name="llama3_8b",
        model=MLLM({}, {}, None, presets.llama3_8b(remat="projections"), {}),
        data=Data("data/llama3/tokenizer", LLAMA3, seq_len=2048, image_slots=0),
        stages=(stage,),
    )


def long() -> Run:
    """Rows of 8192 tokens, with the same number of tokens per step."""
    base = config()
    stages = tuple(dataclasses.replace(stage, rows=64) for stage in base.stages)
    data = dataclasses.replace(base.data, seq_len=8192)
    return dataclasses.replace(base, name="llama3_8b_long", data=data, stages=stages)
