"""The default everyone runs: every stage of the visual path, learned from nothing on two CPU cores in minutes.

    48 px -> CLIP-like ViT, 3 taps -> MMFuser \
                                               SVA, 6 x 6 queries -> decoder with one SVA layer inside
    48 px -> DINO-like ViT on a finer grid    /                      -> next token + depth and instance maps
"""

from jaxmllm.aggregators.sva import SVA, SVALayer
from jaxmllm.config import Data, Optim, Rule, Run, Source, Stage
from jaxmllm.data.targets import MapTargets
from jaxmllm.data.templates import TOY
from jaxmllm.encoders.vit import ViT
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.fusers.single import Single
from jaxmllm.llms.decoder import Decoder, Inserts
from jaxmllm.mllm import MLLM
from jaxmllm.objectives.embed_distill import EmbedDistill

SCENES = "data/scenes"
GRID, WIDTH = 6, 96
SMALL = {"remat": "none", "unroll": True}  # a toy fits: save everything, unroll the few layers


def model() -> MLLM:
    return MLLM(
        encoders={
            "clip": ViT(48, 8, width=96, layers=3, heads=4, mlp=192, taps=(1, 2, 3), stem=(24, 48), **SMALL),
            "dino": ViT(48, 4, width=48, layers=1, heads=4, mlp=96, taps=(1,), stem=(24,), **SMALL),
        },
        fusers={"clip": MMFuser(heads=4, points=2), "dino": Single()},
        aggregator=SVA(width=96, llm_width=WIDTH, grid=GRID, depth=1, heads=4),
        llm=Decoder(
            vocab=256,
            width=WIDTH,
            layers=4,
            heads=4,
            kv_heads=2,
            mlp=192,
            inserts=Inserts(start=0, stride=2, count=1),
            insert=SVALayer(width=96, heads=4),
            **SMALL,
        ),
        distill={
            "depth": EmbedDistill(GRID * GRID, 4, WIDTH, layers=(2,), tokens=4, predictor_width=96, heads=2, aligned=True, norm_out=False),
            "seg": EmbedDistill(GRID * GRID, 16, WIDTH, layers=(2,), tokens=4, predictor_width=96, heads=2, aligned=True, norm_out=False),
        },
        vocab_chunk=256,
    )


def config() -> Run:
    losses = {"next_token": 1.0, "depth": 0.5, "seg": 0.5}
    return Run(
        name="toy",
        model=model(),
        data=Data(f"{SCENES}/tokenizer", TOY, seq_len=256, image_slots=3, targets=MapTargets(GRID), shards=4),
        stages=(
            Stage(
                "align",
                (Source(f"{SCENES}/align.jsonl"),),
                steps=300,
                rows=12,
                rules=(Rule(".*"),),
                losses=losses,
                optim=Optim(2e-3, warmup=0.1, final=0.5, weight_decay=0.05, b2=0.98),
            ),
            Stage(
                "instruct",
                (Source(f"{SCENES}/instruct.jsonl"),),
                steps=1200,
                rows=12,
                rules=(Rule(".*"),),
                losses=losses,
                optim=Optim(2e-3, warmup=0.05, final=0.02, weight_decay=0.05, b2=0.98),
            ),
        ),
        compute_dtype="float32",
    )
