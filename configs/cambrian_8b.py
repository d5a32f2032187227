"""The toy's visual path at full size, trained by Cambrian-1's 8B recipe (Tong et al. 2024, arXiv 2406.16860).

    336 px -> CLIP ViT-L/14, 5 taps -> MMFuser   \
                                                  SVA, 24 x 24 queries, 3 layers -> Llama-3-8B, 10 SVA layers inside
    518 px -> DINOv2 ViT-L/14, 5 taps -> MMFuser /

It has two encoders instead of Cambrian-1's four; `cambrian_8b.py:published` has all four. Bring your own tokenizer,
pictures and conversations, under data/.
"""

import dataclasses

from jaxmllm.aggregators.sva import SVA, SVALayer
from jaxmllm.config import Data, Optim, Rule, Run, Source, Stage
from jaxmllm.data.templates import LLAMA3
from jaxmllm.encoders.presets import cambrian, clip_l_336, dinov2_l
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.fusers.single import Single
from jaxmllm.llms import presets
from jaxmllm.llms.inserts import VisualInserts
from jaxmllm.mllm import MLLM

WIDTH, GRID = 1024, 24


def model() -> MLLM:
    return MLLM(
        encoders={
            "clip": clip_l_336(taps=(3, 8, 13, 18, 23)),
            "dino": dinov2_l(taps=(4, 9, 14, 19, 24), resize=GRID),
        },
        fusers={"clip": MMFuser(), "dino": MMFuser()},
        aggregator=SVA(WIDTH, llm_width=4096, grid=GRID, depth=3),
        llm=presets.llama3_8b(inserts=VisualInserts(SVALayer(WIDTH), start=0, stride=3, count=10), remat="projections"),
        distill={},
    )


def config() -> Run:
    captions = Source("data/cambrian/alignment_2.5m.jsonl", "data/cambrian")
    questions = Source("data/cambrian/cambrian_7m.jsonl", "data/cambrian")
    frozen, connector = Rule("^encoders_", lr=None), Rule("^(fusers_|aggregator/|llm/visual/)")
    losses = {"next_token": 1.0}
    return Run(
        name="cambrian_8b",
        model=model(),
        # A row holds about two pictures of 600 tokens each and the conversations about them.
        data=Data("data/llama3/tokenizer", LLAMA3, seq_len=2048, image_slots=2),
        stages=(
            Stage(
                "align", (captions,), 4_900, 256, (frozen, connector, Rule(".*", lr=None)), losses, Optim(1e-3, 0.06)
            ),
            Stage("instruct", (questions,), 13_800, 256, (frozen, Rule(".*")), losses, Optim(4e-5)),
        ),
    )


def published() -> Run:
    """Cambrian-1's own visual path: the last maps of four encoders, ConvNeXt's in windows of 4 x 4 cells."""
    base, encoders = config(), cambrian(GRID)
    model = base.model.clone(encoders=encoders, fusers={name: Single() for name in encoders})
    return dataclasses.replace(base, name="cambrian_8b_published", model=model)
