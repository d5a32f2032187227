"""Tables (see tables.py) of the vision encoders, in the key layouts of Hugging Face and of timm.

Blocks and stages after the last tap, norms that no tap needs, and heads are left out.
"""

from __future__ import annotations

import re

from jaxmllm.encoders.vit import ViT
from jaxmllm.weights.convert import CONV, FLAT, LEAD, Table, copy, dense, ignore, join, norm

# Vision Transformers


def clip_vision(vit: ViT) -> Table:
    """CLIPVisionModel (published files put "vision_model." in front of the keys)."""
    table = copy("embeddings.class_embedding", "class_token/value", FLAT) + norm("pre_layrnorm", "pre_norm")
    return table + _clip_like(vit) + _patches("embeddings.patch_embedding", vit)


def siglip_vision(vit: ViT) -> Table:
    """SiglipVisionModel (no pooling head; published files put "vision_model." in front of the keys).

    Fixed-size checkpoints of SigLIP2, such as google/siglip2-so400m-patch14-384, are in this layout too.
    """
    return _clip_like(vit) + _patches("embeddings.patch_embedding", vit) + ignore(r"head\..*")


def siglip2_vision(vit: ViT) -> Table:
    """Siglip2VisionModel (NaFlex), on square pictures: its patches are a Linear over (row, column, colour)."""
    return _clip_like(vit) + dense("embeddings.patch_embedding", "patch", inputs=3) + ignore(r"head\..*")


def _clip_like(vit: ViT) -> Table:
    block = join(dense(f"self_attn.{x}_proj", f"attn/{x}") for x in "qkv")
    block += dense("self_attn.out_proj", "attn/out", inputs=3)
    block += dense("mlp.fc1", "mlp/up") + dense("mlp.fc2", "mlp/down")
    block += norm("layer_norm1", "norm1") + norm("layer_norm2", "norm2")
    table = copy("embeddings.position_embedding.weight", "positions/value") + ignore(r"embeddings\.position_ids")
    return table + _blocks(vit, "encoder.layers", block) + _final_norm(vit, "post_layernorm")


def dinov2(vit: ViT) -> Table:
    """Dinov2Model and Dinov2WithRegistersModel, MLP or SwiGLU."""
    names = (("query", "q"), ("key", "k"), ("value", "v"))
    block = join(dense(f"attention.attention.{theirs}", f"attn/{ours}") for theirs, ours in names)
    block += dense("attention.output.dense", "attn/out", inputs=3)
    if vit.gated:
        block += dense("mlp.weights_in", "mlp/gate") + dense("mlp.weights_in", "mlp/up")
        block += dense("mlp.weights_out", "mlp/down")
    else:
        block += dense("mlp.fc1", "mlp/up") + dense("mlp.fc2", "mlp/down")
    block += join(norm(f"norm{i}", f"norm{i}") + copy(f"layer_scale{i}.lambda1", f"scale{i}/value") for i in (1, 2))
    table = copy("embeddings.cls_token", "class_token/value", LEAD) + ignore(r"embeddings\.mask_token")
    table += copy("embeddings.position_embeddings", "positions/value", LEAD)
    if vit.registers:
        table += copy("embeddings.register_tokens", "registers/value", LEAD)
    table += _patches("embeddings.patch_embeddings.projection", vit)
    return table + _blocks(vit, "encoder.layer", block) + _final_norm(vit, "layernorm")


def dinov3_vit(vit: ViT) -> Table:
    """DINOv3ViTModel, MLP or SwiGLU."""
    block = join(dense(f"attention.{x}_proj", f"attn/{x}", bias=x != "k" or vit.key_bias) for x in "qkv")
    block += dense("attention.o_proj", "attn/out", inputs=3)
    if vit.gated:
        block += dense("mlp.gate_proj", "mlp/gate")
    block += dense("mlp.up_proj", "mlp/up") + dense("mlp.down_proj", "mlp/down")
    block += join(norm(f"norm{i}", f"norm{i}") + copy(f"layer_scale{i}.lambda1", f"scale{i}/value") for i in (1, 2))
    table = copy("embeddings.cls_token", "class_token/value", LEAD) + ignore(r"embeddings\.mask_token")
    table += copy("embeddings.register_tokens", "registers/value", LEAD)
    table += _patches("embeddings.patch_embeddings", vit)
    return table + _blocks(vit, "layer", block) + _final_norm(vit, "norm")


def timm_vit(vit: ViT) -> Table:
    """timm's VisionTransformer without class token, as SigLIP has it (open_clip puts "visual.trunk." in front)."""
    block = join(dense("attn.qkv", f"attn/{x}") for x in "qkv") + dense("attn.proj", "attn/out", inputs=3)
    block += dense("mlp.fc1", "mlp/up") + dense("mlp.fc2", "mlp/down") + norm("norm1", "norm1") + norm("norm2", "norm2")
    table = copy("pos_embed", "positions/value", LEAD) + _patches("patch_embed.proj", vit)
    table += ignore(r"attn_pool\..*", r"fc_norm\..*", r"head\..*")
    return table + _blocks(vit, "blocks", block) + _final_norm(vit, "norm")


def _patches(key: str, vit: ViT) -> Table:
    table = copy(f"{key}.weight", "patch/kernel", CONV)
    return table + copy(f"{key}.bias", "patch/bias") if vit.patch_bias else table


def _blocks(vit: ViT, key: str, block: Table) -> Table:
    depth = max(vit.taps)
    used = join(block.under(f"{key}.{i}.", "blocks/layers/block/", (i,)) for i in range(depth))
    return used + ignore(*(rf"{re.escape(key)}\.{i}\..*" for i in range(depth, vit.layers)))


def _final_norm(vit: ViT, key: str) -> Table:
    return norm(key, "final_norm") if vit.final_norm else ignore(rf"{key}\..*")
