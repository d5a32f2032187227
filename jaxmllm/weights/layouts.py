"""In which layout a model is exported: as a class of transformers if one is the same model, else as a folder of ours.

A folder of ours has the language model under transformers' keys, encoders under theirs where there is a key map, and
all else under our own paths with dots; key_map.json says of each tensor which parameter it is (exported.py reads it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.config import part_of
from jaxmllm.encoders.convnext import ConvNeXt
from jaxmllm.encoders.efficientnet import EfficientNet
from jaxmllm.encoders.swin import Swin
from jaxmllm.encoders.vit import ViT
from jaxmllm.fusers.concat import Concat
from jaxmllm.fusers.single import Single
from jaxmllm.mllm import MLLM
from jaxmllm.weights import encoder_key_maps, families, hf_write, hf_write_decoders, key_maps
from jaxmllm.weights.convert import KeyMap, Shape, by_key, copy, foreign_shape, join, unfilled
from jaxmllm.weights.tables import TABLES

OWN = "jaxmllm"  # model_type of a folder of ours


@dataclasses.dataclass(frozen=True)
class Layout:
    """name: of the class of transformers, or OWN. key_map: of the whole model. config: of config.json, None for OWN.

    constants: tensors that the class wants and the model does not have, because they change nothing: key -> (shape,
    value). rows: of the tables of tokens, if these get more rows than the model has. why: for OWN, why it is no class
    of transformers.
    """

    name: str
    key_map: KeyMap
    config: dict[str, Any] | None = None
    constants: Mapping[str, tuple[Shape, float]] = dataclasses.field(default_factory=dict)
    rows: int | None = None
    why: str = ""

    def shapes(self, ours: Mapping[str, Shape]) -> dict[str, Shape]:
        """Key -> shape of all tensors. ours: path -> shape."""
        found = {key: foreign_shape(entries, ours) for key, entries in by_key(self.key_map).items()}
        for entry in self.key_map.entries if self.rows else ():
            if entry.path in TABLES:
                found[entry.key] = (self.rows, *found[entry.key][1:])
        return found | {key: shape for key, (shape, _) in self.constants.items()}


def choose(model: MLLM, shapes: Mapping[str, Shape], length: int, image_token: int) -> Layout:
    """The layout of a whole model. shapes: path -> shape of its parameters. length: tokens of its longest sequence.
    image_token: the id that stands for tokens of pictures in a LLaVA; if it is outside the tables, they get more rows.
    """
    if not model.encoders and set(model.objectives) <= {"next_token"}:
        return decoder(model, length) or own(model, shapes, "its decoder is none of transformers'")
    reasons = no_llava(model)
    if reasons:
        return own(model, shapes, "; ".join(reasons))
    (encoder,), (name,) = model.encoders.values(), model.encoders
    rows = max(model.llm.vocab, image_token + 1)
    text, vision = hf_write_decoders.text_config(model.llm.clone(vocab=rows), length), hf_write.vision_config(encoder)
    tower = "vision_tower.vision_model."
    keys = families.LLMS[text["model_type"]](model.llm, "language_model.model", "language_model.lm_head").under(
        "", "llm/"
    )
    keys += families.ENCODERS[vision["model_type"]](encoder).under(tower, f"encoders_{name}/")
    keys += key_maps.llava_projector().under("", "aggregator/")
    norm = {f"{tower}post_layernorm.{x}": ((encoder.width,), value) for x, value in (("weight", 1.0), ("bias", 0.0))}
    config = hf_write.llava_config(text, vision, joined_taps(model), image_token)
    return Layout(hf_write.LLAVA, keys, config, norm, rows if rows > model.llm.vocab else None)


def decoder(model: MLLM, length: int) -> Layout | None:
    """The language model alone, None if transformers has none like it."""
    config = hf_write_decoders.text_config(model.llm, length)
    if config is None:
        return None
    keys = families.LLMS[config["model_type"]](model.llm).under("", "llm/")
    return Layout(config["architectures"][0], keys, config)


def no_llava(model: MLLM) -> list[str]:
    """Why a model with encoders is not transformers' LLaVA; empty if it is."""
    if len(model.encoders) != 1:
        return [f"{len(model.encoders)} encoders"]
    (encoder,), (fuser,), aggregator = model.encoders.values(), model.fusers.values(), model.aggregator
    reasons = ["visual tokens as words"] if model.as_words else []
    if hf_write_decoders.text_config(model.llm, 1) is None:
        reasons.append("its decoder is none of transformers'")
    if hf_write.vision_config(encoder) is None:
        reasons.append(f"its {type(encoder).__name__} is no CLIP or SigLIP as it is published")
    if joined_taps(model) is None:
        reasons.append(f"fuser {type(fuser).__name__}")
    if type(aggregator) is not MLPProjector:
        reasons.append(f"aggregator {type(aggregator).__name__}")
    else:
        changed = dict(depth=2, newline=False, unpad=False, grid=encoder.grid)
        reasons += [f"{k} {getattr(aggregator, k)}" for k, v in changed.items() if getattr(aggregator, k) != v]
    return reasons + [f"objective {name}" for name in model.objectives if name != "next_token"]


def joined_taps(model: MLLM) -> list[int] | None:
    """The hidden states that a single encoder's fuser joins along channels, None if it does something else."""
    (encoder,), (fuser,) = model.encoders.values(), model.fusers.values()
    taps = getattr(encoder, "taps", ())
    if type(fuser) is Single:
        return [taps[fuser.index]]
    if type(fuser) is not Concat or any(len(group) != 1 for group in fuser.parts(len(taps))):
        return None
    return [taps[i] for (i,) in fuser.parts(len(taps))]


def own(model: MLLM, shapes: Mapping[str, Shape], why: str) -> Layout:
    """A folder of ours."""
    parts: dict[str, dict[str, Shape]] = {}
    for path, shape in shapes.items():
        parts.setdefault(part_of(path), {})[path] = shape
    keys = KeyMap()
    for part, inside in parts.items():
        keys += foreign_keys(model, part, inside) or join(copy(path.replace("/", "."), path) for path in inside)
    return Layout(OWN, keys, why=why)


def foreign_keys(model: MLLM, part: str, shapes: Mapping[str, Shape]) -> KeyMap | None:
    """The published keys of a language model or encoder, below the name of the part; None if there is no key map."""
    head = part.replace(".", "_") + "/"
    if part == "llm":
        config = hf_write_decoders.text_config(model.llm.clone(inserts=None), 1)
        makers = [families.LLMS[config["model_type"]]] if config else []
        prefix = ""
    else:
        kind, _, name = part.partition(".")
        makers = encoder_makers(model.encoders[name]) if kind == "encoders" else []
        prefix = f"encoders.{name}."
    for maker in makers:
        keys = maker(model.llm if part == "llm" else model.encoders[name]).under(prefix, head)
        if not unfilled(keys, shapes):
            return keys
    return None


def encoder_makers(encoder: Any) -> list[Any]:
    """The key maps that may be those of an encoder."""
    vits = [encoder_key_maps.clip_vision, encoder_key_maps.siglip_vision]
    vits += [encoder_key_maps.dinov2, encoder_key_maps.dinov3_vit]
    pyramids = {ConvNeXt: encoder_key_maps.convnext, Swin: encoder_key_maps.swin_backbone}
    known = pyramids | {EfficientNet: encoder_key_maps.efficientnet}
    return vits if isinstance(encoder, ViT) else [known[type(encoder)]] if type(encoder) in known else []
