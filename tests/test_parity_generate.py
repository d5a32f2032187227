"""Generation gives transformers' tokens: greedily for 64 tokens, and by its rules for what may be sampled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.batch import Batch, TokenLayout, VisualLayout, empty_batch
from jaxmllm.eval.generate import Generator
from jaxmllm.eval.sampling import Sampling, Settings, next_token
from jaxmllm.mllm import MLLM
from jaxmllm.train.state import unflatten
from tests.test_parity_hf import opened, rows, theirs

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

TOKENS = 64


def generated(decoder, params, prompts, requests) -> np.ndarray:
    """int32[prompts, TOKENS] of a batch of left-padded prompts; nothing but the length ends a reply."""
    length = max(map(len, prompts)) + 3
    (ids, positions, segments), _ = rows([[prompt] for prompt in prompts], length, left=True)
    empty = empty_batch(VisualLayout({}, TokenLayout(), 0), len(prompts), length, 0, {})
    batch: Batch = dataclasses.replace(empty, tokens=ids, positions=positions, segment_ids=segments)
    generator = Generator(MLLM({}, {}, None, decoder, {}), TOKENS, (10**6,), decoder.vocab)
    settings = Settings.of(requests, TOKENS, prompts, decoder.vocab)
    params = unflatten({f"llm/{path}": x for path, x in params.items()})
    with jax.default_matmul_precision("highest"):
        state = generator.prefill(params, jax.tree.map(jnp.asarray, batch), settings, TOKENS)
        return np.asarray(generator.decode(params, state, jnp.int32(TOKENS)).out)


def expected(model, prompts, **options) -> np.ndarray:
    """transformers' tokens, one prompt at a time."""
    options = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, eos_token_id=None, **options)
    found = []
    for prompt in prompts:
        ids = torch.tensor(prompt[None], dtype=torch.long)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found.append(out[0, len(prompt) :].numpy())
    return np.stack(found)


@pytest.mark.parametrize(
    "family, penalty",
    [
        ("llama3_1", 1.0),
        ("llama2", 1.3),
        ("mistral_window", 1.0),
        ("qwen3", 1.0),
        ("phi3", 1.0),
        ("gemma2", 1.3),
        ("gemma3", 1.0),
        ("smollm3", 1.0),
    ],
)
def test_greedy(family, penalty, tmp_path):
    """Prompts of 11, 6 and 4 tokens in one batch. Windows are shorter than the prompts."""
    model = theirs(family, tmp_path)
    decoder, _, params = opened(tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 60, n, np.int32) for n in (11, 6, 4)]
    requests = [Sampling(repetition_penalty=penalty)] * 3
    found = generated(decoder, params, prompts, requests)
    wanted = expected(model, prompts, repetition_penalty=penalty)
    np.testing.assert_array_equal(found, wanted)
    assert penalty == 1.0 or len(np.unique(found)) > 10


@pytest.mark.parametrize("sampling", [dict(top_k=5), dict(top_p=0.6), dict(top_k=20, top_p=0.8, temperature=1.7)])
def test_what_may_be_sampled(sampling):
    """The tokens that many seeds draw are those that transformers' warpers leave, and no others."""
    logits = np.random.default_rng(0).normal(size=(1, 40)).astype(np.float32) * 2
    options = dict(temperature=1.0, top_k=0, top_p=1.0) | sampling
    warpers = [transformers.TemperatureLogitsWarper(options["temperature"])]
    warpers += [transformers.TopKLogitsWarper(options["top_k"])] if options["top_k"] else []
    warpers += [transformers.TopPLogitsWarper(options["top_p"])] if options["top_p"] < 1 else []
    scores = torch.tensor(logits)
    for warper in warpers:
        scores = warper(None, scores)
    requests = [Sampling(**{"temperature": 1.0} | sampling, seed=i) for i in range(5000)]
    settings = Settings.of(requests, 1, [], 40)
    found, _ = jax.jit(lambda x: next_token(x, None, settings, 0))(jnp.broadcast_to(logits, (5000, 40)))
    allowed = set(np.flatnonzero(np.isfinite(scores[0].numpy())).tolist())
    assert set(np.unique(found).tolist()) <= allowed and len(allowed) < 40
    frequent = np.flatnonzero(torch.softmax(scores[0], -1).numpy() > 0.005)
    assert set(frequent.tolist()) <= set(np.unique(found).tolist())
