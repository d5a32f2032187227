"""Times greedy generation on the CPU: jaxmllm against transformers, with the same language model and prompts.

    python benchmarks/generation.py [--batch 1 8] [--pairs 5] [--prompt 64] [--new 64] [--uncached]

Needs the parity extra. The model has the sizes of SmolLM2-135M and random weights, in float32. The two sides take turns
on the same cores; the ratio of a pair is transformers' time divided by ours. Where other programs run, the processor
time on one core says more: taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/generation.py
transformers generates with its default cache and scaled_dot_product_attention. --uncached: instead of transformers, our
own model without a cache, which computes all of 512 tokens for each new one, against the steps after the prefill.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from tempfile import TemporaryDirectory

import jax
import numpy as np
import torch
import transformers

from jaxmllm import host_batches, sharded
from jaxmllm.batch import empty_batch
from jaxmllm.eval.generate import Generator, State
from jaxmllm.eval.sampling import Sampling, Settings
from jaxmllm.llms.presets import smollm2_135m
from jaxmllm.mesh import Mesh
from jaxmllm.mllm import MLLM
from jaxmllm.objectives.next_token import NextToken
from jaxmllm.train.state import unflatten
from jaxmllm.weights.hf_write_decoders import text_config
from jaxmllm.weights.opened import abstract_model
from jaxmllm.weights.parts import load_parts

LENGTH = 512  # tokens that the uncached model computes for each new one


def models(mesh: jax.sharding.Mesh) -> tuple[MLLM, dict, transformers.LlamaForCausalLM]:
    """-> (our model, its parameters, transformers' model with the same ones)."""
    decoder = smollm2_135m(remat="none")
    model = MLLM({}, {}, None, decoder, {"next_token": NextToken()})
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**text_config(decoder, 2048))
    theirs = transformers.LlamaForCausalLM(config).eval()
    for p in theirs.parameters():  # so that the likeliest tokens are far apart, and differ from step to step
        p.data.mul_(3) if p.ndim > 1 else p.data.add_(0.1 * torch.randn(p.shape))
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, _ = load_parts(model, {"llm": folder}, abstract_model(model, mesh))
        return model, unflatten(ours), theirs


class Ours:
    """Prefill and decode, compiled once for a shape."""

    def __init__(self, model: MLLM, params: dict, prompts: np.ndarray, new: int, mesh: jax.sharding.Mesh):
        self.params, self.new = params, new
        rows, length = prompts.shape
        empty, positions = empty_batch(model.layout, rows, length, 1, {}), np.arange(length, dtype=np.int32)
        places = np.broadcast_to(positions, prompts.shape)
        batch = dataclasses.replace(empty, tokens=prompts, positions=places, segment_ids=np.ones_like(prompts))
        vocab = model.llm.vocab
        self.generator = Generator(model, new, (vocab,), vocab)  # a stop token that is never chosen
        settings = Settings.of([Sampling()] * rows, new, list(prompts), vocab)
        self.inputs = host_batches.global_from_copies((batch, settings), mesh)

    def prefill(self) -> State:
        """The state after the prompts."""
        return jax.block_until_ready(self.generator.prefill(self.params, *self.inputs, self.new))

    def __call__(self, state: State | None = None) -> np.ndarray:
        state = state or self.prefill()
        return np.asarray(self.generator.decode(self.params, state, np.int32(self.new)).out)


class Theirs:
    """transformers' generate."""

    def __init__(self, model: transformers.LlamaForCausalLM, prompts: np.ndarray, new: int):
        self.model, self.prompts = model, torch.tensor(prompts, dtype=torch.long)
        self.options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    def __call__(self) -> np.ndarray:
        mask = torch.ones_like(self.prompts)
        with torch.inference_mode():
            out = self.model.generate(self.prompts, attention_mask=mask, **self.options)
        return out[:, self.prompts.shape[1] :].numpy()


class Uncached:
    """`new` tokens, each from a forward pass over LENGTH tokens."""

    def __init__(self, model: MLLM, params: dict, prompts: np.ndarray, new: int):
        self.params, self.new, self.start = params, new, prompts.shape[1]
        self.tokens = np.pad(prompts, ((0, 0), (0, LENGTH - self.start)))
        positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), self.tokens.shape)

        def step(params, tokens, at):
            def forward(model):
                rows = [sharded.shard(x, "batch", None) for x in (tokens, positions, np.ones_like(positions))]
                states = model.llm(model.llm.embed(rows[0]), *rows[1:])[0]
                last = jax.lax.dynamic_index_in_dim(states, at - 1, 1, keepdims=False)
                return sharded.einsum("bh,vh->bv", last, model.llm.output_table(), "batch", "vocab").argmax(-1)

            return model.apply({"params": params}, method=forward)

        self.step = jax.jit(step)

    def __call__(self) -> np.ndarray:
        tokens = self.tokens.copy()
        for at in range(self.start, self.start + self.new):
            tokens[:, at] = self.step(self.params, tokens, np.int32(at))
        return tokens[:, self.start : self.start + self.new]


def seconds(run, *inputs) -> np.ndarray:
    """[by the clock, of the processors]."""
    start = time.perf_counter(), time.process_time()
    run(*inputs)
    return np.array([time.perf_counter(), time.process_time()]) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a reply")
    parser.add_argument("--uncached", action="store_true")
    args = parser.parse_args()
    mesh = Mesh().build()
    with jax.set_mesh(mesh):  # as `jaxmllm chat` does
        measure(args, mesh)


def measure(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> None:
    """Prints a line for each batch."""
    model, params, theirs = models(mesh)
    for rows in args.batch:
        prompts = np.random.default_rng(0).integers(3, model.llm.vocab, (rows, args.prompt), dtype=np.int32)
        ours = Ours(model, params, prompts, args.new, mesh)
        other = Uncached(model, params, prompts, args.new) if args.uncached else Theirs(theirs, prompts, args.new)
        same = (ours() == other()).mean()  # compiles
        # Against the uncached model only the steps after the prefill are timed, which chooses the first token.
        state = [ours.prefill] if args.uncached else []
        pairs = [(seconds(other), seconds(ours, *(f() for f in state))) for _ in range(args.pairs)]
        pairs = np.array(pairs)
        pairs[:, 0] *= 1 - len(state) / args.new
        ratios, rate = pairs[:, 0] / pairs[:, 1], args.new * rows / np.median(pairs[:, 1, 0])
        said = (f"{np.median(x):.2f} ({x.min():.2f} to {x.max():.2f})" for x in ratios.T)
        print(
            f"batch {rows}: {rate:.1f} tokens/s; ratio {next(said)}, of processor time {next(said)}, "
            f"{args.pairs} pairs; {same:.1%} of the tokens are the same",
            flush=True,
        )


if __name__ == "__main__":
    main()
