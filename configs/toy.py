"""The default recipe: every part of the visual path, trained from random weights on two CPU cores in minutes.

    48 px -> CLIP-like ViT, 3 taps -> MMFuser \
                                               SVA, 6 x 6 queries -> decoder with one SVA layer inside
    48 px -> DINO-like ViT on a finer grid    /                      -> next token + depth and instance maps
"""

import dataclasses

from jaxmllm.aggregators.sva import SVA, SVALayer
from jaxmllm.config import Data, Rule, Run, Source, Stage
from jaxmllm.data.targets import MapTargets
from jaxmllm.data.templates import TOY
from jaxmllm.encoders.vit import ViT
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.fusers.single import Single
from jaxmllm.llms.decoder import Decoder
from jaxmllm.llms.inserts import VisualInserts
from jaxmllm.mllm import MLLM
from jaxmllm.objectives.embed_distill import EmbedDistill
from jaxmllm.objectives.next_token import NextToken
from jaxmllm.train.optimizers import AdamW, Muon
from jaxmllm.train.schedules import Cosine

SCENES = "data/scenes"
GRID = 6
SMALL = {"remat": "none", "unroll": True}  # a toy fits in memory: save everything, unroll the few layers


def model() -> MLLM:
    clip = {"size": 48, "patch": 8, "width": 96, "layers": 3, "heads": 4, "mlp": 192, "stem": (24, 48)}
    dino = {"size": 48, "patch": 4, "width": 48, "layers": 1, "heads": 2, "mlp": 96, "stem": (24,)}
    return MLLM(
        encoders={"clip": ViT(taps=(1, 2, 3), **clip, **SMALL), "dino": ViT(taps=(1,), **dino, **SMALL)},
        fusers={"clip": MMFuser(heads=4, points=2), "dino": Single()},
        aggregator=SVA(width=96, grid=GRID, depth=1, heads=4),
        llm=Decoder(
            vocab=256,
            width=96,
            layers=4,
            heads=4,
            kv_heads=4,
            mlp=192,
            tied=True,
            inserts=VisualInserts(layer=SVALayer(width=96, heads=4), start=0, stride=2, count=1),
            **SMALL,
        ),
        objectives={"next_token": NextToken(chunk=256), "depth": regress(4), "seg": regress(16, blocks=0)},
    )


def regress(dim: int, blocks: int = 1) -> EmbedDistill:
    """VisPer-LM's regression of a map, after the first decoder layer, so that the visual path itself must carry it.

    Without blocks the predictor is linear in the state of the visual token at each cell.
    """
    return EmbedDistill(
        queries=GRID * GRID,
        dim=dim,
        layers=(1,),
        tokens=2,
        predictor_width=96,
        heads=2,
        blocks=blocks,
        aligned=True,
        norm_out=False,
    )


def config() -> Run:
    optim = Muon(lr=4e-3, adam_rate=0.4, schedule=Cosine(warmup=0.05, final=0.02), weight_decay=0.05, b2=0.98)
    captions = Source(f"{SCENES}/align.jsonl", weight=0.2)
    questions = Source(f"{SCENES}/instruct.jsonl", weight=0.8)
    common = {"rows": 12, "rules": (Rule(".*"),), "losses": {"next_token": 1.0, "depth": 0.5, "seg": 0.5}}
    return Run(
        name="toy",
        model=model(),
        data=Data(
            tokenizer=f"{SCENES}/tokenizer",
            template=TOY,
            seq_len=240,
            image_slots=3,
            targets=MapTargets(GRID),
        ),
        stages=(
            # Captions and maps: the visual path learns what is in the picture, and where.
            Stage(
                name="align",
                sources=(captions,),
                steps=100,
                optim=dataclasses.replace(optim, schedule=Cosine(warmup=0.05, final=0.5)),
                **common,
            ),
            # Questions and captions, still with the maps.
            Stage(name="instruct", sources=(questions, captions), steps=500, optim=optim, **common),
        ),
        compute_dtype="float32",
        save_every=50,
    )


def tiny() -> Run:
    """Two layers of each part and a few steps of AdamW, which compiles faster than Muon, for the tests."""
    base = config()
    vit = {"width": 32, "layers": 2, "heads": 2, "mlp": 32, "stem": ()}
    parts = base.model
    inserts = dataclasses.replace(parts.llm.inserts, layer=SVALayer(width=32, heads=2))
    maps = {name: parts.objectives[name].clone(predictor_width=16, head_dim=8) for name in ("depth", "seg")}
    model = parts.clone(
        encoders={
            "clip": parts.encoders["clip"].clone(taps=(1, 2), **vit),
            "dino": parts.encoders["dino"].clone(taps=(2,), **vit),
        },
        fusers={"clip": MMFuser(heads=2, points=2), "dino": Single()},
        aggregator=SVA(width=32, grid=GRID, depth=1, heads=2),
        llm=parts.llm.clone(width=32, layers=3, heads=2, kv_heads=2, mlp=32, inserts=inserts),
        objectives={**parts.objectives, **maps},
    )
    optim = AdamW(lr=2e-3, weight_decay=0.05, b2=0.98)
    stages = tuple(
        dataclasses.replace(stage, steps=4, rows=8, optim=dataclasses.replace(optim, schedule=stage.optim.schedule))
        for stage in base.stages
    )
    return dataclasses.replace(base, name="tiny", model=model, stages=stages, save_every=2, log_every=1)
