"""Which foreign tensor is which of our parameters, for each family of models.

Each function takes a module, whose fields give the sizes, and returns a key map relative to it; `under` adds the
prefixes of its place in a model. Key layouts are those of published checkpoints: Hugging Face's for language models,
the authors' for MMFuser, Cambrian-1 and VisPer-LM. Encoders are in encoder_key_maps.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jaxmllm.aggregators.mof import InterleavedMoF
from jaxmllm.aggregators.qformer import QFormer
from jaxmllm.aggregators.sva import SVA
from jaxmllm.llms.decoder import Decoder
from jaxmllm.mllm import MLLM
from jaxmllm.objectives.embed_distill import EmbedDistill, Predictor
from jaxmllm.weights.convert import FLAT, FLAT_GRID, LEADING_ONE, Entry, KeyMap, copy, dense, ignore, join, linear, norm

# Language models


def llama(decoder: Decoder, body: str = "model", head: str = "lm_head") -> KeyMap:
    """LlamaForCausalLM, MistralForCausalLM, SmolLM3ForCausalLM, GemmaForCausalLM; Qwen2ForCausalLM (with biases on q,
    k, v), Qwen3ForCausalLM (with norms of q and k), Gemma2ForCausalLM (with norms after attention and MLP),
    Gemma3ForCausalLM (with both kinds of norms), and others with the same keys.

    body, head: prefixes of the layers and of the output table, which differ inside multimodal models.
    """
    bias = decoder.qkv_bias
    attention = join(dense(f"self_attn.{x}_proj", f"attn/{x}", bias=bias) for x in "qkv")
    if decoder.qk_norm:
        attention += join(norm(f"self_attn.{x}_norm", f"attn/{x}_norm", bias=False) for x in "qk")
    mlp = join(dense(f"mlp.{x}_proj", f"mlp/{x}", bias=False) for x in ("gate", "up"))
    return _causal_lm(decoder, attention + mlp, body, head)


def phi3(decoder: Decoder, body: str = "model", head: str = "lm_head") -> KeyMap:
    """Phi3ForCausalLM: like Llama, but q, k, v are one tensor, and gate and up are another."""
    attention = join(dense("self_attn.qkv_proj", f"attn/{x}", bias=False) for x in "qkv")
    mlp = join(dense("mlp.gate_up_proj", f"mlp/{x}", bias=False) for x in ("gate", "up"))
    return _causal_lm(decoder, attention + mlp, body, head)


def _causal_lm(decoder: Decoder, block: KeyMap, body: str, head: str) -> KeyMap:
    block += dense("self_attn.o_proj", "attn/out", inputs=3, bias=False)
    block += dense("mlp.down_proj", "mlp/down", bias=False)
    block += norm("input_layernorm", "norm1", bias=False)
    norms = {"post_attention_layernorm": "norm2"}
    if decoder.post_norms:
        norms = {"post_attention_layernorm": "post_norm1", "post_feedforward_layernorm": "post_norm2"}
        norms["pre_feedforward_layernorm"] = "norm2"
    block += join(norm(theirs, ours, bias=False) for theirs, ours in norms.items())
    block += ignore(r"self_attn\.rotary_emb\.inv_freq")  # a constant in old checkpoints
    table, output = f"{body}.embed_tokens.weight", f"{head}.weight"
    keys = copy(table, "embedding/embedding") + norm(f"{body}.norm", "norm", bias=False)
    for i in range(decoder.layers):
        keys += block.under(f"{body}.layers.{i}.", "blocks/layers/block/", (i,))
    return keys + (KeyMap(equal=((output, table),)) if decoder.tied else copy(output, "lm_head/embedding"))


# The visual path


def mlp(key: str, path: str, first: int = 0) -> KeyMap:
    """Linear, activation, Linear, which start at place `first` of a torch Sequential."""
    return dense(f"{key}.{first}", f"{path}/up") + dense(f"{key}.{first + 2}", f"{path}/down")


def projector(depth: int, first: int = 0) -> KeyMap:
    """LLaVA's mlp{depth}x_gelu: `depth` linear layers, which start at place `first` of a torch Sequential."""
    return join(dense(f"{first + 2 * i}", f"linear_{i}") for i in range(depth))


def deformable_attention() -> KeyMap:
    """MSDeformAttn of Deformable DETR."""
    keys = dense("sampling_offsets", "sampling_offsets", bias=False)
    keys += copy("sampling_offsets.bias", "offset_bias/value", FLAT)
    keys += dense("attention_weights", "attention_weights") + dense("value_proj", "value_proj")
    return keys + dense("output_proj", "output_proj")


def mmfuser() -> KeyMap:
    """MSCrossAttnBlock of MMFuser."""
    keys = copy("gamma1", "scale_outer/value") + copy("gamma2", "scale_inner/value")
    keys += join(norm(name, name) for name in ("query_norm", "feat_norm", "norm1"))
    return keys + join(deformable_attention().under(f"{x}.", f"{x}/") for x in ("cross_attn", "self_attn"))


def qformer(aggregator: QFormer) -> KeyMap:
    """The part of Blip2ForConditionalGeneration between its vision model and its language model."""
    keys = copy("query_tokens", "queries/value", LEADING_ONE) + norm("qformer.layernorm", "norm")
    for i in range(aggregator.depth):
        key, path = f"qformer.encoder.layer.{i}", f"layer_{i}"
        kinds = {"attention": "self", "crossattention": "cross"} if i % aggregator.every == 0 else {"attention": "self"}
        for theirs, ours in kinds.items():
            part = f"{key}.{theirs}"
            for x in ("query", "key", "value"):
                keys += dense(f"{part}.attention.{x}", f"{path}_{ours}/{x[0]}")
            keys += dense(f"{part}.output.dense", f"{path}_{ours}/out", inputs=3)
            keys += norm(f"{part}.output.LayerNorm", f"{path}_{ours}_norm")
        keys += dense(f"{key}.intermediate_query.dense", f"{path}_mlp/up")
        keys += dense(f"{key}.output_query.dense", f"{path}_mlp/down")
        keys += norm(f"{key}.output_query.LayerNorm", f"{path}_mlp_norm")
    return keys + dense("language_projection", "projector")


def resampler(depth: int) -> KeyMap:
    """IdeficsPerceiverResampler, which has the width of the encoder and no linear layer at its end."""
    keys = copy("latents", "latents/value") + norm("layer_norm", "norm")
    for i in range(depth):
        key = f"blocks.{i}"
        keys += join(dense(f"{key}.0.{k}_proj", f"attn_{i}/{k}", bias=False) for k in "qkv")
        keys += dense(f"{key}.0.output_proj", f"attn_{i}/out", inputs=3, bias=False)
        keys += norm(f"{key}.0.context_layer_norm", f"norm_x_{i}") + norm(f"{key}.0.latents_layer_norm", f"norm_z_{i}")
        keys += norm(f"{key}.1.ln", f"norm_mlp_{i}") + dense(f"{key}.1.fc", f"mlp_{i}/up", bias=False)
        keys += dense(f"{key}.1.c_proj", f"mlp_{i}/down", bias=False)
    return keys


def sva_layer(windows: list[int]) -> KeyMap:
    """VisionCrossAttentionLayer of Cambrian-1; windows: side of the window on each encoder's map."""
    parts = (Entry("proj_in.weight", f"{x}/kernel", linear(), axis=1) for x in ("proj_in", "proj_in_context"))
    keys = dense("proj_context", "proj_context", bias=False) + KeyMap(tuple(parts))
    keys += norm("cross_attn.q_proj.0", "q_norm") + dense("cross_attn.q_proj.1", "q_proj", bias=False)
    for k, window in enumerate(windows):
        for x in "kv":
            keys += norm(f"cross_attn.{x}_proj_{k}.0", f"{x}_norm_{k}")
            keys += dense(f"cross_attn.{x}_proj_{k}.1", f"{x}_proj_{k}", bias=False)
        if window > 1:
            keys += copy(f"pos_embed_{k}", f"pos_embed_{k}/value", FLAT_GRID)
    keys += dense("cross_attn.o_proj", "o_proj", bias=False) + norm("norm", "norm")
    return keys + join(dense(f"proj_out.{x}", x, bias=False) for x in ("linear_1", "linear_2"))


def sva(aggregator: SVA, grids: Mapping[str, int]) -> KeyMap:
    """Cambrian-1's connector; grids: encoder name -> side of its map, in the order of the encoders."""
    keys = copy("vision_query", "query/value") + mlp("mm_projector", "projector")
    if aggregator.newline:
        keys += copy("image_newline", "newline/value")
    for k, name in enumerate(grids):
        key = f"mm_projector_aux_{k}"
        keys += mlp(key, f"projector_{name}") + norm(f"{key}.3", f"projector_norm_{name}")
    for g, side in enumerate(aggregator.sides):
        layer = sva_layer([grid // side for grid in grids.values()])
        for i in range(aggregator.depth):
            keys += layer.under(f"vision_sampler_{g}.layers.{i}.", f"group_{g}/layer/", (i,))
    return keys


def cambrian(model: MLLM) -> KeyMap:
    """CambrianLlamaForCausalLM without its encoders, which its checkpoints do not hold."""
    grids = {name: encoder.grid for name, encoder in model.layout.encoders.items()}
    keys = llama(model.llm).under("", "llm/") + sva(model.aggregator, grids).under("model.", "aggregator/")
    if model.llm.inserts:
        layer = sva_layer([grid // model.aggregator.grid for grid in grids.values()])
        for j in range(model.llm.inserts.count):
            keys += layer.under(f"model.vision_sampler_layers.{j}.layers.0.", "llm/visual/layers/layer/", (j,))
    return keys


def llava_projector(key: str = "multi_modal_projector") -> KeyMap:
    """The projector of LlavaForConditionalGeneration."""
    return join(dense(f"{key}.linear_{i + 1}", f"projector/linear_{i}") for i in range(2))


def llava(model: MLLM) -> KeyMap:
    """LlavaLlamaForCausalLM with the MLP projector of LLaVA-1.5, without its encoder. Dense Connector: same keys."""
    keys = projector(model.aggregator.depth).under("model.mm_projector.", "aggregator/projector/")
    return keys + llama(model.llm).under("", "llm/")


def mmfuser_llava(model: MLLM) -> KeyMap:
    """As `llava`, with MMFuser in front of the projector's layers in the same Sequential."""
    (encoder,) = model.fusers
    keys = mmfuser().under("model.mm_projector.0.", f"fusers_{encoder}/") + llama(model.llm).under("", "llm/")
    return keys + projector(model.aggregator.depth, 1).under("model.mm_projector.", "aggregator/projector/")


def interleaved_mof(aggregator: InterleavedMoF, encoders: Iterable[str]) -> KeyMap:
    """The two projectors of MMVP's LLaVA; encoders: our names for CLIP and DINOv2, in this order."""
    pairs = zip(("mm_projector", "dino_mm_projector"), encoders, strict=True)
    return join(projector(aggregator.depth).under(f"{key}.", f"projector_{name}/") for key, name in pairs)


def mof_llava(model: MLLM) -> KeyMap:
    """MMVP's LlavaLlamaForCausalLM (interleaved features) without its encoders."""
    keys = interleaved_mof(model.aggregator, model.encoders).under("model.", "aggregator/")
    return keys + llama(model.llm).under("", "llm/")


# Objectives


def visper_head(predictor: Predictor) -> KeyMap:
    """VisPer-LM's heads on task tokens: depth (which has `extra_heads`), seg and gen."""
    keys = dense("proj_in", "proj_in") + dense("proj_out", "proj_out")
    if predictor.norm_out:
        keys += norm("norm_out", "norm_out")
    for i in range(predictor.blocks):
        key, path = f"layers.{i}", f"block_{i}"
        keys += norm(f"{key}.0.norm1", f"{path}_norm_x") + norm(f"{key}.0.norm2", f"{path}_norm_z")
        keys += dense(f"{key}.0.to_q", f"{path}_q", bias=False)
        keys += join(dense(f"{key}.0.to_kv", f"{path}_{x}", bias=False) for x in "kv")
        keys += dense(f"{key}.0.to_out", f"{path}_out", inputs=2, bias=False)
        keys += norm(f"{key}.1.0", f"{path}_ff_norm")
        keys += dense(f"{key}.1.1", f"{path}_ff/up", bias=False) + dense(f"{key}.1.3", f"{path}_ff/down", bias=False)
    heads = range(1, predictor.extra_heads + 1)
    return keys.under("projector.", "") + join(mlp(f"linear_{i}", f"map_{i}") for i in heads)


def visper(model: MLLM) -> KeyMap:
    """OlaLlavaLlamaForCausalLM without its encoder and teachers; its tasks (depth, seg, gen) name the objectives."""
    keys = llava(model)
    teachers = {name: each for name, each in model.objectives.items() if isinstance(each, EmbedDistill)}
    for task, teacher in teachers.items():
        keys += copy(f"model.special_{task}_tokens", f"objectives_{task}/table/value")
        if teacher.layers:
            keys += copy(f"{task}_logit_scale", f"objectives_{task}/logit_scale/value")
        head = visper_head(teacher.predictor())
        for i in range(len(teacher.layers)):
            keys += head.under(f"image_{task}_heads.{i}.", f"objectives_{task}/predictors_{i}/")
    return keys
