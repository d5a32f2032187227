"""One training step on the CPU: this stack against PyTorch and transformers' LLaVA, the same model and batch.

python benchmarks/cpu_step.py [--case NAME] [--pairs 10] [--steps 3] [--profile FOLDER]

Needs the parity extra. The two take turns on the same cores, a few steps each, and start from the same weights: loss
and gradient norm of the first step must agree. Both are float32 with AdamW and clipping; torch runs eagerly, with its
fused AdamW and scaled_dot_product_attention. Ours runs as `jaxmllm train` does. The models are LLaVA's (CLIP ViT,
two-layer projector, Llama) in the toy recipe's sizes, or with a larger decoder; one sample a row.
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

from jaxmllm import bench, main
from jaxmllm import mesh as meshes
from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.config import Data, Optim, Rule, Run, Stage
from jaxmllm.encoders.vit import ViT
from jaxmllm.fusers.single import Single
from jaxmllm.llms.decoder import Decoder
from jaxmllm.mllm import MLLM
from jaxmllm.train.setup import stage_program
from jaxmllm.weights.convert import import_weights
from jaxmllm.weights.encoder_tables import clip_vision
from jaxmllm.weights.tables import dense, llama

RATE, DECAY, CLIP = 1e-4, 0.05, 1.0
IMAGE = 255  # id of the image token in transformers' rows


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes: rows of `length` tokens with `images` pictures of 36 tokens each; a decoder and a ViT."""

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
    """Ours."""
    fast = dict(remat="none", unroll=True)
    vit = ViT(
        48, 8, taps=(3,), class_token=True, pre_norm=True, patch_bias=False, activation="quick_gelu", **VIT, **fast
    )
    decoder = Decoder(case.vocab, case.width, case.layers, case.heads, case.heads, case.mlp, **fast)
    model = MLLM({"clip": vit}, {"clip": Single()}, MLPProjector(case.width, 6), decoder, {}, vocab_chunk=256)
    optim = Optim(RATE, warmup=0.0, final=1.0, weight_decay=DECAY, clip=CLIP)
    stage = Stage("step", (), 10000, case.rows, (Rule(".*"),), {"next_token": 1.0}, optim)
    data = Data("", None, seq_len=case.length, image_slots=case.images)
    return Run("cpu_step", model, data, (stage,), compute_dtype="float32")


def theirs(case: Case) -> transformers.LlavaForConditionalGeneration:
    """The same in transformers."""
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


def same_weights(model, run: Run, shapes: dict) -> dict[str, np.ndarray]:
    """transformers' weights as our parameters."""
    parts = run.model
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    state = {k.replace("vision_tower.vision_model.", "vision_tower."): v for k, v in state.items()}
    state = {k.replace("model.language_model.", "model."): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if ".post_layernorm." not in k}  # LLaVA does not read its result
    table = llama(parts.llm).under("", "llm/")
    table += clip_vision(parts.encoders["clip"]).under("model.vision_tower.", "encoders_clip/")
    for i in range(2):
        table += dense(f"model.multi_modal_projector.linear_{i + 1}", f"aggregator/projector/linear_{i}")
    return import_weights(table, state, {k: x.shape for k, x in shapes.items()})


class Ours:
    """A step of this stack."""

    def __init__(self, run: Run, weights, batch):
        self.mesh, (stage,) = run.mesh.build(), run.stages
        with jax.set_mesh(self.mesh):
            shapes, fresh, step = stage_program(run, stage, self.mesh)
            params = {k: jax.device_put(np.array(v), shapes[k].sharding) for k, v in weights(shapes).items()}
            self.state, self.batch = jax.jit(fresh)(params), meshes.to_global(batch, self.mesh)
            self.compiled = step.lower(self.state, self.batch).compile()

    def step(self) -> tuple[float, float]:
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.compiled(self.state, self.batch)
        return float(metrics["loss"]), float(metrics["grad_norm"])


class Theirs:
    """A step of torch, pixels normalised on the way as ours does."""

    def __init__(self, model, run: Run, batch):
        self.model, encoder = model, run.model.encoders["clip"]
        self.optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY, fused=True)
        self.ids = torch.tensor(np.where(batch.visual_index >= 0, IMAGE, batch.tokens), dtype=torch.long)
        labels = np.concatenate([np.full((len(batch.labels), 1), -100), batch.labels[:, :-1]], 1)
        self.labels = torch.tensor(labels, dtype=torch.long)  # transformers shifts them itself
        self.pixels = torch.tensor(batch.images["clip"].reshape(-1, 48, 48, 3).transpose(0, 3, 1, 2).copy())
        self.mean, self.std = (torch.tensor(x).view(1, 3, 1, 1) for x in (encoder.mean, encoder.std))

    def step(self) -> tuple[float, float]:
        pixels = (self.pixels.float() / 255 - self.mean) / self.std
        loss = self.model(input_ids=self.ids, pixel_values=pixels, labels=self.labels, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss), float(norm)


def compare(name: str, pairs: int, steps: int, profile: str | None) -> None:
    """Prints both times and their ratio."""
    run = recipe(CASES[name])
    batch = bench.synthetic(run, run.stages[0], run.stages[0].rows)
    batch.tokens[:] %= IMAGE  # no word may be the image token
    batch.labels[:, :-1] = np.where(batch.labels[:, 1:] >= 0, batch.tokens[:, 1:], -100)
    batch.labels[:, -1] = -100
    model = theirs(CASES[name])
    ours = Ours(run, lambda shapes: same_weights(model, run, shapes), batch)
    sides = {"ours": ours, "torch": Theirs(model, run, batch)}
    first = {who: side.step() for who, side in sides.items()}
    np.testing.assert_allclose(first["ours"], first["torch"], rtol=2e-4)
    times: dict[str, list[float]] = {who: [] for who in sides}
    for pair in range(pairs + 1):  # the first warms up
        for who in list(sides)[:: 1 if pair % 2 else -1]:
            start = time.perf_counter()
            for _ in range(steps):
                sides[who].step()
            times[who].append((time.perf_counter() - start) / steps)
    ratios = [a / b for a, b in zip(times["ours"][1:], times["torch"][1:])]
    middle = {who: 1e3 * statistics.median(seconds[1:]) for who, seconds in times.items()}
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{name} ({count:.1f} M parameters, loss {first['ours'][0]:.4f}): ours {middle['ours']:.1f} ms, torch "
        f"{middle['torch']:.1f} ms, ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f} in {pairs} pairs of {steps} steps)",
        flush=True,
    )
    if profile:
        with jax.profiler.trace(f"{profile}/{name}"):
            for _ in range(steps):
                ours.step()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--profile", help="folder for a trace of our steps")
    args = parser.parse_args()
    main.keep_freed_memory()
    for case in args.case:
        compare(case, args.pairs, args.steps, args.profile)
