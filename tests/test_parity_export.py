"""Exported folders opened by transformers: equal logits, also from picture files through its own processor."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from jaxmllm.data.tokenizer import load_tokenizer
from jaxmllm.eval.verify import verify
from jaxmllm.fusers.concat import Concat
from jaxmllm.fusers.single import Single
from jaxmllm.nn.lora import LoRA, is_adapter
from jaxmllm.weights.export import export
from jaxmllm.weights.peft import export_adapter
from tests import llava_case
from tests.conftest import jaxmllm
from tests.parity import TOLERANCE
from tests.run_case import random_of, run_of, save
from tests.test_export import CLIP, bytes_, llava, text_only, words  # noqa: F401

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


def exported(tmp_path, model, tokenizer):
    run = run_of(model, tokenizer)
    params = random_of(run)
    save(run, params, tmp_path / "run")
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    return params


@pytest.mark.parametrize("fields", [{}, {"qkv_bias": True, "tied": True}, {"qk_norm": True, "head_dim": 8}])
def test_a_decoder(tmp_path, words, fields):  # noqa: F811
    model = text_only(40, eps=1e-6, rope_theta=5e5, **fields)
    params = exported(tmp_path, model, words)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokens = np.random.default_rng(0).integers(0, 40, (2, 12), dtype=np.int32)
    batch = llava_case.text_batch_of(model, tokens)
    logits, _ = llava_case.outputs(model, params, batch)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    assert verify(str(tmp_path / "run"), f"transformers:{tmp_path}/out").equal()


@pytest.mark.parametrize(
    "fuser, taps, vit",
    [
        (Single(), (3,), CLIP),
        (Concat(), (1, 3), CLIP),
        (Single(), (4,), {"activation": "gelu_tanh", "eps": 1e-6, "mean": (0.5,) * 3, "std": (0.5,) * 3}),
    ],
)
@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_llava(tmp_path, bytes_, fuser, taps, vit, fit):  # noqa: F811
    vocab = load_tokenizer(str(bytes_)).size + 3
    model = llava(vocab, fuser, taps, {"fit": fit} | vit)
    params = exported(tmp_path, model, bytes_)
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    # A square picture of the encoder's size is neither resized nor padded, so both sides see the same pixels.
    pixels = np.random.default_rng(0).integers(0, 256, (1, 42, 42, 3), dtype=np.uint8)
    inputs = processor(images=Image.fromarray(pixels[0]), text="It is <image>, is it?", return_tensors="pt")
    tokens, image = inputs["input_ids"].numpy().astype(np.int32), theirs.config.image_token_index
    assert (tokens == image).sum() == 9 and image == vocab - 3
    with torch.no_grad():
        expected = theirs.eval()(**inputs).logits.numpy()
    batch = llava_case.batch_of(model, tokens, np.full_like(tokens, -100), pixels, image)
    logits, _ = llava_case.outputs(model, params, batch)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def test_verify_on_a_mesh(tmp_path, bytes_):  # noqa: F811
    exported(tmp_path, llava(load_tokenizer(str(bytes_)).size + 3), bytes_)
    sides = f"{tmp_path}/run", f"transformers:{tmp_path}/out"
    done = jaxmllm("verify", *sides, "--mesh", "data=2", "fsdp=2", "tensor=2", devices=8)
    assert done.stdout.endswith("\nequal\n") and "aggregator: outputs differ by at most" in done.stdout


@pytest.mark.parametrize("multimodal", [False, True])
def test_peft_loads_adapters(tmp_path, words, multimodal):  # noqa: F811
    peft = pytest.importorskip("peft")
    model = llava(40) if multimodal else text_only(40)
    attention, rest = LoRA(rank=2, targets=("/attn/",), alpha=4.0), LoRA(rank=3, targets=("/mlp/", "^aggregator/"))
    run = dataclasses.replace(run_of(model, words), lora=(attention, *([rest] if multimodal else [])))
    params = random_of(run)
    params |= {k: np.full_like(x, 4 + ("mlp" in k)) for k, x in params.items() if k.endswith("lora_alpha")}
    save(run, params, tmp_path / "run")
    save(dataclasses.replace(run, lora=None), {k: x for k, x in params.items() if not is_adapter(k)}, tmp_path / "base")
    export(str(tmp_path / "base"), str(tmp_path / "whole"))
    made = export_adapter(str(tmp_path / "run"), str(tmp_path / "adapter"))
    assert made.layout.startswith("PEFT adapter of ") and any("llm was trained too" in note for note in made.notes)
    kind = transformers.LlavaForConditionalGeneration if multimodal else transformers.AutoModelForCausalLM
    base = kind.from_pretrained(tmp_path / "whole")
    with_adapter = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    with_adapter.save_pretrained(tmp_path / "merged")
    for path in ("tokenizer.json", "preprocessor_config.json"):
        if (tmp_path / "whole" / path).exists():
            (tmp_path / "merged" / path).write_text((tmp_path / "whole" / path).read_text())
    found = verify(str(tmp_path / "run"), f"transformers:{tmp_path}/merged")
    assert found.equal(), found
    assert not verify(str(tmp_path / "run"), str(tmp_path / "whole")).equal()
