"""Key maps in both directions, and safetensors folders."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.aggregators.sva import SVA, SVALayer
from jaxmllm.batch import empty_batch
from jaxmllm.encoders.vit import ViT
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.fusers.single import Single
from jaxmllm.llms.decoder import Decoder
from jaxmllm.llms.inserts import VisualInserts
from jaxmllm.mllm import MLLM
from jaxmllm.objectives.embed_distill import EmbedDistill
from jaxmllm.weights import encoder_key_maps, key_maps
from jaxmllm.weights.convert import Entry, KeyMap, export_weights, import_weights, linear
from jaxmllm.weights.safetensors import open_folder, write_folder
from tests.golden_case import shapes

PICTURE = jnp.zeros((1, 28, 28, 3), jnp.uint8)


def vit(**fields) -> ViT:
    return ViT(28, 14, 16, 4, 2, 24, **{"taps": (1, 3)} | fields)


def mllm(aggregator, llm, fuser=None, **objectives) -> MLLM:
    """A model with one or (SVA) two encoders."""
    sizes = {"a": 28, "b": 56} if isinstance(aggregator, SVA) else {"a": 28}
    encoders = {name: ViT(size, 14, 16, 2, 2, 24, taps=(1, 2)) for name, size in sizes.items()}
    return MLLM(encoders, dict.fromkeys(encoders, fuser or Single()), aggregator, llm, objectives)


def without_encoders(ours: dict) -> dict:
    """Key maps of whole models leave out the encoders, which have key maps of their own."""
    return {path: shape for path, shape in ours.items() if not path.startswith("encoders_")}


def of_mllm(model: MLLM) -> dict:
    batch = jax.tree.map(jnp.asarray, empty_batch(model.layout, 1, 64, 1, model.target_shapes))
    return without_encoders(shapes(model, batch, losses=tuple(model.objectives)))


def llm(**fields) -> Decoder:
    return Decoder(40, 16, 5, 4, 2, 24, **fields)


def of_llm(decoder: Decoder) -> dict:
    tokens, ones = jnp.zeros((1, 8, 16)), jnp.ones((1, 8), jnp.int32)

    def run(decoder, x):
        decoder.embed(ones), decoder.output_table()
        return decoder(x, ones, ones)

    return shapes(decoder, tokens, method=run)


def families():
    """Name -> (key map, our shapes)."""
    insert = dict(inserts=VisualInserts(SVALayer(16, 4), 0, 1, 3))
    teachers = {
        "depth": EmbedDistill(4, 6, (2, 4), tokens=2, extra_heads=3, predictor_width=8),
        "gen": EmbedDistill(1, 6, (3,), tokens=2, pooled=False, blocks=2),
    }
    clip = vit(class_token=True, pre_norm=True, patch_bias=False)
    naflex = vit(table=3, final_norm=True)
    dino3 = vit(class_token=True, layer_scale=True, registers=2, rope_theta=100.0, key_bias=False)
    dino = vit(class_token=True, layer_scale=True, registers=2, gated=True, final_norm=True, taps=(4,))
    cambrian = mllm(SVA(16, 2, depth=2, heads=4, groups=(2, 1)), llm(**insert))
    visper = mllm(MLPProjector(2), llm(), **teachers)
    fused = mllm(MLPProjector(2), llm(), fuser=MMFuser(4, 2))
    qwen, phi = llm(qkv_bias=True, tied=True), llm()
    return {
        "llama": (key_maps.llama(phi), of_llm(phi)),
        "qwen2, tied": (key_maps.llama(qwen), of_llm(qwen)),
        "phi3": (key_maps.phi3(phi), of_llm(phi)),
        "clip": (encoder_key_maps.clip_vision(clip), shapes(clip, PICTURE)),
        "siglip": (encoder_key_maps.siglip_vision(vit()), shapes(vit(), PICTURE)),
        "dinov2": (encoder_key_maps.dinov2(dino), shapes(dino, PICTURE)),
        "siglip2": (encoder_key_maps.siglip2_vision(naflex), shapes(naflex, PICTURE)),
        "timm": (encoder_key_maps.timm_vit(vit()), shapes(vit(), PICTURE)),
        "dinov3": (encoder_key_maps.dinov3_vit(dino3), shapes(dino3, PICTURE)),
        "cambrian": (key_maps.cambrian(cambrian), of_mllm(cambrian)),
        "visper": (key_maps.visper(visper), of_mllm(visper)),
        "mmfuser_llava": (key_maps.mmfuser_llava(fused), of_mllm(fused)),
    }


FAMILIES = families()


def random(ours: dict) -> dict:
    rng = np.random.default_rng(0)
    return {path: rng.standard_normal(shape, np.float32) for path, shape in ours.items()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_round_trip(name, dtype):
    key_map, ours = FAMILIES[name]
    params = {path: x.astype(dtype) for path, x in random(ours).items()}
    foreign = export_weights(key_map, params)
    back = import_weights(key_map, foreign, ours)
    assert back.keys() == params.keys()
    for path, x in params.items():
        assert back[path].dtype == dtype
        np.testing.assert_array_equal(back[path], x, path)
    again = export_weights(key_map, back)
    assert again.keys() == foreign.keys()
    for key, x in foreign.items():
        np.testing.assert_array_equal(again[key], x, key)


def problems(key_map: KeyMap, foreign: dict, ours: dict) -> str:
    with pytest.raises(ValueError, match="weights do not fit") as error:
        import_weights(key_map, foreign, ours)
    return str(error.value)


def test_all_problems_are_listed_by_name():
    key_map, ours = FAMILIES["llama"]
    foreign = export_weights(key_map, random(ours))
    del foreign["model.layers.3.mlp.up_proj.weight"]
    foreign["model.layers.5.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
    foreign["model.norm.weight"] = np.zeros(15, np.float32)
    foreign["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)  # ignored by the key map
    message = problems(key_map, foreign, ours | {"head/more": (3,)})
    assert message.startswith("4 weights do not fit")
    assert (
        "- model.layers.3.mlp.up_proj.weight: not in the file, wanted by blocks/layers/block/mlp/up/kernel[3]"
        in message
    )
    assert "+ model.layers.5.mlp.up_proj.weight: in the file" in message
    assert "! model.norm.weight: (15,) in the file, (16,) wanted by norm/scale" in message
    assert "- head/more: no entry of the key map fills it" in message


def test_key_map_must_fill_everything_once():
    foreign = {key: np.zeros((2, 3), np.float32) for key in "abcd"}
    places = {"a": ("w", (0,)), "b": ("w", (0,)), "c": ("x", ()), "d": ("w", (3,))}
    key_map = KeyMap(tuple(Entry(key, path, linear(), index) for key, (path, index) in places.items()))
    message = problems(key_map, foreign, {"w": (3, 3, 2)})
    assert "! w[0]: filled 2 times, by a and b" in message
    assert "- w[1]: no entry" in message and "- w[2]: no entry" in message
    assert "+ c: meant for x, which the model does not have" in message
    assert "+ d: meant for w[3], which has shape (3, 3, 2)" in message
    with pytest.raises(ValueError, match="filled 2 times"):
        export_weights(key_map, {"w": np.zeros((3, 3, 2))})


def test_transposed_weight_is_refused():
    key_map = KeyMap((Entry("a", "w", linear()),))
    assert "! a: (3, 2) in the file, (2, 3) wanted by w" in problems(key_map, {"a": np.zeros((3, 2))}, {"w": (3, 2)})


def test_mixed_dtypes_in_one_stack_are_refused():
    key_map = KeyMap((Entry("a", "w", index=(0,)), Entry("b", "w", index=(1,))))
    foreign = {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float16)}
    assert "! b: float16 in the file, but other layers of w are float32" in problems(key_map, foreign, {"w": (2, 3)})


def test_folder_with_two_shards(tmp_path):
    key_map, ours = FAMILIES["phi3"]
    foreign = export_weights(key_map, random(ours))
    foreign["model.norm.weight"] = foreign["model.norm.weight"].astype(ml_dtypes.bfloat16)
    write_folder(tmp_path, foreign, shard_bytes=sum(x.nbytes for x in foreign.values()) * 2 // 3)
    assert len(list(tmp_path.glob("model-*-of-00002.safetensors"))) == 2
    folder = open_folder(tmp_path)
    assert set(folder) == set(foreign) and len(folder) == len(foreign)
    for key, x in foreign.items():
        assert folder[key].dtype == x.dtype
        np.testing.assert_array_equal(folder[key], x)
    import_weights(key_map, folder, ours)


def test_folder_with_one_file(tmp_path):
    write_folder(tmp_path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    for path in (tmp_path, tmp_path / "model.safetensors"):
        np.testing.assert_array_equal(open_folder(path)["a"], [[0, 3], [1, 4], [2, 5]])


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="no safetensors in"):
        open_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot read"):
        open_folder(tmp_path)
    write_folder(tmp_path, {"a": np.zeros(2)})
    index = '{"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="has no tensor 'b'"):
        open_folder(tmp_path)
