"""LLaVA-1.5 7B in its two stages (Liu et al. 2024, arXiv 2310.03744): CLIP-L/336, two linear layers, Vicuna.

    336 px -> CLIP ViT-L/14, tap 23 of 0..24 -> two linear layers -> 576 tokens -> Vicuna-7B

Bring LLaVA's own data under data/llava/, and the weights: --set init.llm=DIR init.encoders.clip=DIR
"""

from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.config import Data, Rule, Run, Source, Stage
from jaxmllm.data.templates import PLAIN, VICUNA_V1
from jaxmllm.encoders.presets import clip_l_336
from jaxmllm.fusers.single import Single
from jaxmllm.llms.presets import vicuna_7b
from jaxmllm.mllm import MLLM
from jaxmllm.objectives.next_token import NextToken
from jaxmllm.train.optimizers import AdamW
from jaxmllm.train.schedules import Cosine


def config() -> Run:
    schedule, losses = Cosine(warmup=0.03), {"next_token": 1.0}
    return Run(
        name="llava_1_5",
        model=MLLM(
            encoders={"clip": clip_l_336()},
            fusers={"clip": Single()},
            aggregator=MLPProjector(grid=24),
            llm=vicuna_7b(remat="projections"),
            objectives={"next_token": NextToken()},
        ),
        # As published, a row holds one sample. Packing several into a row trains the same tokens in fewer rows.
        # Conversations that are longer than a row, which LLaVA cuts, are left out and listed: max_bad allows for those
        # of its 40,000 from ShareGPT.
        data=Data(
            tokenizer="data/vicuna/tokenizer",
            template=VICUNA_V1,
            seq_len=2048,
            image_slots=1,
            packing=False,
            max_bad=40_000,
        ),
        stages=(
            Stage(
                name="align",
                sources=(Source("data/llava/blip_laion_cc_sbu_558k.json", image_root="data/llava/pretrain"),),
                epochs=1,
                rows=256,
                rules=(Rule("^aggregator/"), Rule(".*", lr=None)),
                losses=losses,
                optim=AdamW(lr=1e-3, schedule=schedule),
                data={"template": PLAIN},
            ),
            Stage(
                name="instruct",
                sources=(Source("data/llava/llava_v1_5_mix665k.json", image_root="data/llava/instruct"),),
                epochs=1,
                rows=128,
                rules=(Rule("^encoders_", lr=None), Rule(".*")),
                losses=losses,
                optim=AdamW(lr=2e-5, schedule=schedule),
            ),
        ),
    )
