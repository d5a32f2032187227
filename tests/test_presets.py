"""Each preset has as many parameters as the model that it is named after, counted without creating any."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxmllm.encoders import presets as encoders
from jaxmllm.llms import presets as llms
from tests.golden_case import shapes


def count(module, x, **options) -> int:
    return sum(math.prod(shape) for shape in shapes(module, x, **options).values())


def count_encoder(vit) -> int:
    return count(vit, jax.ShapeDtypeStruct((1, vit.size, vit.size, 3), jnp.uint8))


@pytest.mark.parametrize(
    "preset, parameters",
    [
        # torch parameters of Hugging Face's vision models at these sizes, minus those that a ViT here does not need
        (encoders.clip_l_336, 303_507_456),
        (encoders.siglip_so400m_384, 428_225_600 - 15_238_352),  # the pooling head
        (encoders.siglip2_so400m_384, 428_225_600 - 15_238_352),
        (encoders.dinov2_s, 22_056_576 - 384),
        (encoders.dinov2_l, 304_368_640 - 1024),  # the mask token
        (encoders.dinov2_g, 1_136_480_768 - 1536),
        (partial(encoders.dinov2_l, registers=4), 304_372_736 - 1024),
        (partial(encoders.dinov2_g, registers=4), 1_136_486_912 - 1536),
        (encoders.dinov3_l, 303_129_600 - 1024),
        (encoders.dinov3_h_plus, 840_592_640 - 1280),
    ],
)
def test_encoder(preset, parameters):
    assert count_encoder(preset(taps=(preset().layers,), final_norm=True)) == parameters


@pytest.mark.parametrize(
    "encoder, parameters",
    [
        # timm's convnext_xxlarge without its head; transformers' SwinBackbone with its four norms
        (encoders.convnext_xxl(), 843_398_016 - 2 * 3072),
        (encoders.swin_l((1, 2, 3, 4), resize=24), 195_204_276 - 2 * 1536),
        (encoders.efficientnet_lite0((17,)), 4_652_008 - 1_281_000 + 2 * 21_008),  # no classifier; mean, var
    ],
)
def test_pyramid(encoder, parameters):
    assert count_encoder(encoder) == parameters


def test_cambrian_towers():
    """Pad colours, and maps of 24, 24, 24 and 96 cells a side with widths 1152, 1024, 1536 and 5760."""
    towers = encoders.cambrian()
    colors = [(122, 116, 104), (122, 116, 104), (123, 116, 103), (122, 116, 104)]
    assert [tower.input.pad_color for tower in towers.values()] == colors
    assert [tower.input.size for tower in towers.values()] == [384, 336, 378, 1024]
    found = []
    for tower in towers.values():
        picture = jax.ShapeDtypeStruct((1, tower.size, tower.size, 3), jnp.uint8)
        found.append(jax.eval_shape(lambda x, tower=tower: tower.init_with_output(jax.random.key(0), x)[0], picture))
    maps = [(s, s, c, 0) for s, c in ((24, 1152), (24, 1024), (24, 1536), (96, 5760))]
    assert [tower.maps for tower in towers.values()] == [(m,) for m in maps]
    assert [x.shape for x in found] == [(1, 1, *m[:3]) for m in maps]


def test_only_blocks_that_are_read_are_built():
    """LLaVA-1.5 reads CLIP's tap 23 of 24, so one block and the final norm are missing."""
    block = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    assert count_encoder(encoders.clip_l_336()) == 303_507_456 - block - 2 * 1024 == 290_909_184


@pytest.mark.parametrize(
    "preset, parameters",
    [
        (llms.llama3_8b, 8_030_261_248),
        (llms.llama3_1_8b, 8_030_261_248),
        (llms.llama3_2_1b, 1_235_814_400),
        (llms.qwen3_8b, 8_190_735_360),
        (llms.vicuna_7b, 6_738_415_616),
        (llms.vicuna_13b, 13_015_864_320),
        (llms.yi_34b, 34_388_917_248),
        (llms.mistral_7b, 7_248_023_552),
        (llms.phi3_mini, 3_821_079_552),
        (llms.gemma_2b, 2_506_172_416),
        (llms.gemma2_2b, 2_614_341_888),
        (llms.gemma2_9b, 9_241_705_984),
        (llms.gemma3_1b, 999_885_952),
        (llms.gemma3_4b, 3_880_263_168),
        (llms.smollm3_3b, 3_075_098_624),
        (llms.qwen2_5_0_5b, 494_032_768),
        (llms.qwen2_5_7b, 7_615_616_512),
        (llms.smollm2_135m, 134_515_008),
    ],
)
def test_language_model(preset, parameters):
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def run(decoder, ids):
        decoder.output_table()
        return decoder(decoder.embed(ids), ids, ids)[0]

    assert count(preset(), ids, method=run) == parameters
