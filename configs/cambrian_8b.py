"""The toy's visual path at full size, trained by Cambrian-1's 8B recipe (Tong et al. 2024, arXiv 2406.16860).

    336 px -> CLIP ViT-L/14, 5 taps -> MMFuser   \
                                                  SVA, 24 x 24 queries, 3 layers -> Llama-3-8B, 10 SVA layers inside
    518 px -> DINOv2 ViT-L/14, 5 taps -> MMFuser /

It has two encoders instead of Cambrian-1's four; `cambrian_8b.py:published` has all four, and `:lora` trains adapters
of the language model. Bring your own tokenizer, pictures and conversations, under data/, and the weights: --set
init.llm=DIR init.encoders.clip=DIR init.encoders.dino=DIR
"""

import dataclasses

from jaxmllm.aggregators.sva import SVA, SVALayer
from jaxmllm.config import Data, Rule, Run, Source, Stage
from jaxmllm.data.templates import LLAMA3
from jaxmllm.encoders.presets import cambrian, clip_l_336, dinov2_l
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.fusers.single import Single
from jaxmllm.llms import presets
from jaxmllm.llms.inserts import VisualInserts
from jaxmllm.mllm import MLLM
from jaxmllm.nn.lora import LoRA
from jaxmllm.objectives.next_token import NextToken
from jaxmllm.train.optimizers import AdamW
from jaxmllm.train.schedules import Cosine

WIDTH, GRID = 1024, 24


def model() -> MLLM:
    return MLLM(
        encoders={
            "clip": clip_l_336(taps=(3, 8, 13, 18, 23)),
            "dino": dinov2_l(taps=(4, 9, 14, 19, 24), resize=GRID),
        },
        fusers={"clip": MMFuser(), "dino": MMFuser()},
        aggregator=SVA(width=WIDTH, grid=GRID, depth=3),
        llm=presets.llama3_8b(
            inserts=VisualInserts(layer=SVALayer(WIDTH), start=0, stride=3, count=10), remat="projections"
        ),
        objectives={"next_token": NextToken()},
    )


def config() -> Run:
    captions = Source("data/cambrian/alignment_2.5m.jsonl", image_root="data/cambrian")
    questions = Source("data/cambrian/cambrian_7m.jsonl", image_root="data/cambrian")
    frozen, connector = Rule("^encoders_", lr=None), Rule("^(fusers_|aggregator/|llm/visual/)")
    common = {"rows": 256, "losses": {"next_token": 1.0}}
    return Run(
        name="cambrian_8b",
        model=model(),
        # A row holds about two pictures of 600 tokens each and the conversations about them.
        data=Data(tokenizer="data/llama3/tokenizer", template=LLAMA3, seq_len=2048, image_slots=2),
        stages=(
            Stage(
                name="align",
                sources=(captions,),
                steps=4_900,
                rules=(frozen, connector, Rule(".*", lr=None)),
                optim=AdamW(lr=1e-3, schedule=Cosine(warmup=0.06)),
                **common,
            ),
            Stage(
                name="instruct",
                sources=(questions,),
                steps=13_800,
                rules=(frozen, Rule(".*")),
                optim=AdamW(lr=4e-5, schedule=Cosine(warmup=0.03)),
                **common,
            ),
        ),
    )


def published() -> Run:
    """Cambrian-1's own visual path: the last maps of four encoders, ConvNeXt's in windows of 4 x 4 cells."""
    base, encoders = config(), cambrian(GRID)
    model = base.model.clone(encoders=encoders, fusers={name: Single() for name in encoders})
    return dataclasses.replace(base, name="cambrian_8b_published", model=model)


def lora() -> Run:
    """The published visual path for four v6e chips: Llama-3 frozen with adapters, the connector trained, one row per
    chip at a time. It takes 15.4 of 31.2 GiB of each chip; a v5e has a little less than it needs."""
    base = published()
    adapters, connector = Rule(r"/lora_[ab]$"), Rule("^(fusers_|aggregator/|llm/visual/)")
    align, instruct = (dataclasses.replace(stage, rows=64, accumulate=16) for stage in base.stages)
    instruct = dataclasses.replace(
        instruct, rules=(adapters, connector, Rule(".*", lr=None)), optim=AdamW(lr=2e-4, schedule=Cosine(warmup=0.03))
    )
    return dataclasses.replace(
        base,
        name="cambrian_8b_lora",
        model=base.model.clone(llm=base.model.llm.clone(remat="full")),
        lora=(LoRA(rank=64, alpha=128.0, dropout=0.05, targets=("^llm/blocks/.*/(attn|mlp)/",)),),
        stages=(align, instruct),
    )
