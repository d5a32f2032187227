"""Times a training step on the CPU: jaxmllm against transformers' LLaVA in PyTorch, with the same model and batch.

    python benchmarks/cpu_step.py [--case NAME ...] [--pairs 10] [--steps 3] [--profile FOLDER]

Needs the parity extra. The two sides take turns on the same cores, a few steps each. They start from the same weights,
and the loss and gradient norm of their first step must agree. Both compute in float32, with AdamW and clipping. Torch
runs eagerly, with its fused AdamW and scaled_dot_product_attention; jaxmllm runs as in `jaxmllm train`. The model is
LLaVA's (CLIP ViT, two-layer projector, Llama) in the sizes of the toy recipe or with a larger decoder. A row holds one
sample.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
import torch
import transformers

from jaxmllm import bench, host_batches, processes
from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.batch import IGNORE_LABEL, Batch
from jaxmllm.config import Data, Rule, Run, Stage
from jaxmllm.encoders.vit import ViT
from jaxmllm.fusers.single import Single
from jaxmllm.llms.decoder import Decoder
from jaxmllm.mllm import MLLM
from jaxmllm.objectives.next_token import NextToken
from jaxmllm.train.optimizers import AdamW
from jaxmllm.train.schedules import Constant
from jaxmllm.train.setup import stage_program
from jaxmllm.weights.convert import import_weights
from jaxmllm.weights.encoder_key_maps import clip_vision
from jaxmllm.weights.key_maps import dense, llama

RATE, DECAY, CLIP = 1e-4, 0.05, 1.0
IMAGE = 255  # id of the image token in the rows that transformers gets


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of `length` tokens with `images` pictures of 36 tokens each, and the sizes of the decoder."""

    rows: int
    length: int
    images: int
    width: int
    layers: int
    heads: int
    mlp: int
    vocab: int


CASES = {
    "toy": Case(12, 256, 3, width=96, layers=4, heads=4, mlp=192, vocab=256),  # 0.7 M parameters
    "13m-short": Case(8, 256, 1, width=384, layers=6, heads=6, mlp=1024, vocab=4096),  # 13.9 M
    "13m-long": Case(1, 2048, 1, width=384, layers=6, heads=6, mlp=1024, vocab=4096),
}
VIT = dict(width=96, layers=3, heads=4, mlp=192)


def recipe(case: Case) -> Run:
    """The model and the step as a recipe of jaxmllm."""
    fast = dict(remat="none", unroll=True)
    vit = ViT(
        48, 8, taps=(3,), class_token=True, pre_norm=True, patch_bias=False, activation="quick_gelu", **VIT, **fast
    )
    decoder = Decoder(case.vocab, case.width, case.layers, case.heads, case.heads, case.mlp, **fast)
    model = MLLM({"clip": vit}, {"clip": Single()}, MLPProjector(6), decoder, {"next_token": NextToken(chunk=256)})
    stage = Stage(
        name="step",
        sources=(),
        steps=10000,
        rows=case.rows,
        rules=(Rule(".*", decay=True),),  # as torch
        losses={"next_token": 1.0},
        optim=AdamW(lr=RATE, schedule=Constant(), weight_decay=DECAY, clip=CLIP),
    )
    data = Data(tokenizer="", template=None, seq_len=case.length, image_slots=case.images)
    return Run(name="cpu_step", model=model, data=data, stages=(stage,), compute_dtype="float32")


def llava(case: Case) -> transformers.LlavaForConditionalGeneration:
    """The same model in transformers."""
    sizes = dict(num_hidden_layers=VIT["layers"], num_attention_heads=VIT["heads"], intermediate_size=VIT["mlp"])
    vision = transformers.CLIPVisionConfig(hidden_size=VIT["width"], image_size=48, patch_size=8, **sizes)
    sizes = dict(num_hidden_layers=case.layers, num_attention_heads=case.heads, intermediate_size=case.mlp)
    text = transformers.LlamaConfig(
        hidden_size=case.width, vocab_size=case.vocab, rms_norm_eps=1e-5, rope_theta=10000.0, **sizes
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).train()


def to_params(model: transformers.LlavaForConditionalGeneration, run: Run, shapes: dict) -> dict[str, np.ndarray]:
    """The weights of transformers' model as parameters of jaxmllm."""
    parts = run.model
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    state = {k.replace("vision_tower.vision_model.", "vision_tower."): v for k, v in state.items()}
    state = {k.replace("model.language_model.", "model."): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if ".post_layernorm." not in k}  # LLaVA does not use its result
    keys = llama(parts.llm).under("", "llm/")
    keys += clip_vision(parts.encoders["clip"]).under("model.vision_tower.", "encoders_clip/")
    for i in range(2):
        keys += dense(f"model.multi_modal_projector.linear_{i + 1}", f"aggregator/projector/linear_{i}")
    return import_weights(keys, state, {k: x.shape for k, x in shapes.items()})


class JaxSide:
    """The step of jaxmllm."""

    def __init__(self, run: Run, model: transformers.LlavaForConditionalGeneration, batch: Batch):
        self.mesh, (stage,) = run.mesh.build(), run.stages
        with jax.set_mesh(self.mesh):
            shapes, new_train_state, step = stage_program(run, stage, self.mesh)
            weights = to_params(model, run, shapes)
            params = {k: jax.device_put(np.array(v), shapes[k].sharding) for k, v in weights.items()}
            self.state = jax.jit(new_train_state)(params)
            self.batch = host_batches.global_from_rows(batch, self.mesh)
            self.compiled = step.lower(self.state, self.batch).compile()

    def step(self) -> tuple[float, float]:
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.compiled(self.state, self.batch)
        return float(metrics["loss"]), float(metrics["grad_norm"])


class TorchSide:
    """The step of torch. It includes normalising the pixels, which is part of jaxmllm's step as well."""

    def __init__(self, run: Run, model: transformers.LlavaForConditionalGeneration, batch: Batch):
        self.model, encoder = model, run.model.encoders["clip"]
        self.optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY, fused=True)
        self.ids = torch.tensor(np.where(batch.visual_index >= 0, IMAGE, batch.tokens), dtype=torch.long)
        labels = np.concatenate([np.full((len(batch.labels), 1), IGNORE_LABEL), batch.labels[:, :-1]], 1)
        self.labels = torch.tensor(labels, dtype=torch.long)  # transformers shifts labels itself
        self.pixels = torch.tensor(batch.images["clip"].reshape(-1, 48, 48, 3).transpose(0, 3, 1, 2).copy())
        self.mean, self.std = (torch.tensor(x).view(1, 3, 1, 1) for x in (encoder.mean, encoder.std))

    def step(self) -> tuple[float, float]:
        pixels = (self.pixels.float() / 255 - self.mean) / self.std
        loss = self.model(input_ids=self.ids, pixel_values=pixels, labels=self.labels, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach()), float(norm)


def compare(name: str, pairs: int, steps: int, profile: str | None) -> None:
    """Prints the times of both sides and their ratio; with `profile`, writes a trace of jaxmllm's steps there."""
    run = recipe(CASES[name])
    batch = bench.synthetic(run, run.stages[0], run.stages[0].rows)
    batch.tokens[:] %= IMAGE  # no token of the text may be the image token
    batch.labels[:, :-1] = np.where(batch.labels[:, 1:] >= 0, batch.tokens[:, 1:], IGNORE_LABEL)
    batch.labels[:, -1] = IGNORE_LABEL
    model = llava(CASES[name])
    sides = {"jaxmllm": JaxSide(run, model, batch), "torch": TorchSide(run, model, batch)}
    first = {side: program.step() for side, program in sides.items()}
    np.testing.assert_allclose(first["jaxmllm"], first["torch"], rtol=2e-4)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for pair in range(pairs + 1):  # the first pair is not counted
        for side in list(sides)[:: 1 if pair % 2 else -1]:
            start = time.perf_counter()
            for _ in range(steps):
                sides[side].step()
            times[side].append((time.perf_counter() - start) / steps)
    ratios = [a / b for a, b in zip(times["jaxmllm"][1:], times["torch"][1:])]
    median = {side: 1e3 * statistics.median(seconds[1:]) for side, seconds in times.items()}
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{name} ({count:.1f} M parameters, loss {first['jaxmllm'][0]:.4f}): jaxmllm {median['jaxmllm']:.1f} ms, torch "
        f"{median['torch']:.1f} ms, ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f} in {pairs} pairs of {steps} steps)",
        flush=True,
    )
    if profile:
        with jax.profiler.trace(f"{profile}/{name}"):
            for _ in range(steps):
                sides["jaxmllm"].step()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--pairs", type=int, default=10, help="turns of each side")
    parser.add_argument("--steps", type=int, default=3, help="steps in one turn")
    parser.add_argument("--profile", metavar="FOLDER", help="also write a trace of jaxmllm's steps there")
    args = parser.parse_args()
    processes.keep_freed_memory()
    for case in args.case:
        compare(case, args.pairs, args.steps, args.profile)
