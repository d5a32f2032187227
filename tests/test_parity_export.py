"""Exported folders opened by transformers: equal logits, also from picture files through its own processor."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from jaxmllm.data.tokenizer import load_tokenizer
from jaxmllm.eval.verify import verify
from jaxmllm.fusers.concat import Concat
from jaxmllm.fusers.single import Single
from jaxmllm.llms import presets as llms
from jaxmllm.nn.lora import LoRA, is_adapter
from jaxmllm.nn.primitives import soft_cap
from jaxmllm.weights.export import export
from jaxmllm.weights.parts import load_parts
from jaxmllm.weights.peft import export_adapter
from tests import llava_case
from tests.conftest import jaxmllm
from tests.parity import TOLERANCE
from tests.run_case import abstract_of, random_of, run_of, save
from tests.test_export import CLIP, bytes_, llava, text_only, words  # noqa: F401
from tests.test_parity_hf import FAMILIES, theirs

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
    opened, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokens = np.random.default_rng(0).integers(0, 40, (2, 12), dtype=np.int32)
    batch = llava_case.text_batch_of(model, tokens)
    logits, _ = llava_case.outputs(model, params, batch)
    np.testing.assert_allclose(logits, logits_of(opened, tokens), rtol=0, atol=TOLERANCE)
    assert verify(str(tmp_path / "run"), f"transformers:{tmp_path}/out").equal()


def logits_of(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_in_and_out(tmp_path, words, family):  # noqa: F811
    """transformers' model -> its folder -> a run -> export -> transformers' model: the same tensors and logits."""
    before = theirs(family, tmp_path / "theirs", tied=family.startswith(("gemma", "qwen3", "smollm3")))
    model = text_only(60).clone(llm=llms.from_folder(tmp_path / "theirs"))
    run = run_of(model, words)
    params = jax.device_get(load_parts(model, {"llm": str(tmp_path / "theirs")}, abstract_of(run))[0])
    save(run, params, tmp_path / "run")
    made = export(str(tmp_path / "run"), str(tmp_path / "out"))
    # With nothing of their own, these are models of simpler families.
    assert made.layout == {"mistral": "LlamaForCausalLM", "phi3": "MistralForCausalLM"}.get(
        family, type(before).__name__
    )
    kind = transformers.AutoModelForCausalLM
    after, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True, attn_implementation="eager")
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    if family != "phi3":  # which joins the tensors of several layers
        assert before.state_dict().keys() == after.state_dict().keys()
        assert all(torch.equal(x, after.state_dict()[key]) for key, x in before.state_dict().items())
    tokens = np.random.default_rng(0).integers(3, 60, (2, 24), dtype=np.int32)
    expected = logits_of(before, tokens)
    np.testing.assert_allclose(logits_of(after, tokens), expected, rtol=0, atol=TOLERANCE)
    ours, _ = llava_case.outputs(model, params, llava_case.text_batch_of(model, tokens))
    np.testing.assert_allclose(soft_cap(ours, model.llm.logit_cap), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_added_tokens(tmp_path, words, tied):  # noqa: F811
    """A base of 60 tokens gets three more and padding; transformers opens the export with 63."""
    before = theirs("llama3", tmp_path / "theirs", tied)
    model = text_only(60).clone(llm=llms.from_folder(tmp_path / "theirs", vocab=63, table_multiple=16))
    run = run_of(model, words)
    params = jax.device_get(load_parts(model, {"llm": str(tmp_path / "theirs")}, abstract_of(run))[0])
    save(run, params, tmp_path / "run")
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert after.config.vocab_size == 63 and len(after.lm_head.weight) == 63
    tokens = np.random.default_rng(0).integers(3, 60, (2, 24), dtype=np.int32)
    expected, found = logits_of(before, tokens), logits_of(after, tokens)
    np.testing.assert_allclose(found[..., :60], expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found[..., 60:], expected.mean(-1, keepdims=True).repeat(3, -1), rtol=0, atol=TOLERANCE)
    # What transformers makes of the same resize
    before.resize_token_embeddings(63, mean_resizing=False)
    with torch.no_grad():
        for table in {before.get_input_embeddings().weight, before.get_output_embeddings().weight}:
            table[60:] = table[:60].mean(0)
    np.testing.assert_allclose(found, logits_of(before, tokens), rtol=0, atol=TOLERANCE)
    new = np.array([[60, 5, 61, 7, 62, 9]], np.int32)
    ours, _ = llava_case.outputs(model, params, llava_case.text_batch_of(model, new))
    np.testing.assert_allclose(ours[..., :63], logits_of(after, new), rtol=0, atol=TOLERANCE)
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
