"""What the config.json of a Hugging Face folder says of a part: the fields of our module, and what we cannot build.

config.json is read by transformers' own classes, which know the defaults of fields that older files leave out.
Rates of dropout belong to a recipe of training and are not read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmllm import json_text
from jaxmllm.hf_library import transformers

# model_type -> part -> the place of its config inside config.json ("" is the whole)
LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3")
GEMMAS = ("gemma", "gemma2", "gemma3_text")
LLMS = {name: {"llm": ""} for name in LLAMAS + GEMMAS}
ENCODERS = {
    **{name: {"encoder": ""} for name in ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")},
    **{name: {"encoder": ""} for name in ("dinov2", "dinov2_with_registers", "dinov3_vit", "convnext", "swin")},
    **{name: {"encoder": "vision_config"} for name in ("clip", "siglip", "siglip2")},
    "oneformer": {"encoder": "backbone_config"},
}
LLAVA = {"llava": {"llm": "text_config", "encoder": "vision_config", "aggregator": ""}}
GEMMA3 = {"gemma3": {"llm": "text_config"}}  # with an encoder and a projector of its own kind, which are not read
HELD = LLMS | ENCODERS | LLAVA | GEMMA3

ACTIVATIONS = {  # transformers' name -> ours
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu",
    "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Description:
    """A part as config.json describes it.

    kind: class of our module. fields: its fields. names: field -> its name in config.json, for the fields in which a
    module must agree with the folder; the others are choices. refused: what the folder says and no module can do.
    length: tokens of the longest sequence, which makes a longer window none.
    """

    kind: str
    fields: Mapping[str, Any]
    names: Mapping[str, str]
    refused: tuple[str, ...] = ()
    length: int | None = None


def read_config(folder: str | Path) -> Any:
    """The folder's config.json as an object of transformers.

    Raises ValueError, in one line, if it is missing or damaged, has an unknown model_type, or describes quantised
    weights.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    if "stages" in raw:
        raise ValueError(f"{folder} is a workdir of jaxmllm; write it as run:{folder}")
    check_model_type(raw.get("model_type"), HELD, f"{path}: model_type")
    if "quantization_config" in raw:
        raise ValueError(f"{path}: quantization_config: quantised weights cannot be read; use the original ones")
    scaling = raw.get("rope_scaling")
    if raw["model_type"] == "phi3" and isinstance(scaling, dict) and scaling.get("type") in ("su", "yarn"):
        raw["rope_scaling"] = {**scaling, "type": "longrope"}  # its name in Phi-3's first files
    try:
        config = transformers().AutoConfig.for_model(**raw)
    except Exception as error:  # a wrong value raises almost anything
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    for part, place in HELD[config.model_type].items():
        known = {"llm": LLMS, "encoder": ENCODERS}.get(part)
        if place and known:
            check_model_type(getattr(config, place).model_type, known, f"{path}: {place}.model_type")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError, in one line."""
    try:
        found = json_text.loads(path.read_bytes())
    except OSError:
        raise ValueError(f"no {path.name} in {path.parent}") from None
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"cannot read {path}: it holds no JSON object")
    return found


def check_model_type(name: str | None, known: Mapping[str, Any], where: str) -> None:
    """Raises ValueError, which lists the known ones, for an unknown model_type."""
    if name not in known:
        raise ValueError(f"{where} {name!r} is not known; known: {', '.join(sorted(known))}")


def part_config(config: Any, part: str) -> Any:
    """The config of the "llm", "encoder" or "aggregator" inside a folder's config. Raises ValueError if it has none."""
    held = HELD[config.model_type]
    if part not in held:
        raise ValueError(f"a {config.model_type} folder holds {', '.join(held)}, not {part}")
    return getattr(config, held[part]) if held[part] else config


def only(config: Any, **values: Any) -> tuple[str, ...]:
    """A line for each field of a config that has another value than the only one that can be built here."""
    found = {name: getattr(config, name, value) for name, value in values.items()}
    return tuple(
        f"{name} {found[name]!r} cannot be built here, only {value!r}"
        for name, value in values.items()
        if found[name] != value
    )


def projector(config: Any) -> Description:
    """The projector of a LLaVA folder."""
    fields, names = {"depth": 2}, {"depth": "depth"}
    refused = only(config, projector_hidden_act="gelu", multimodal_projector_bias=True)
    return Description("MLPProjector", fields, names, refused + only(config, **select_strategy(config)))


def select_strategy(config: Any) -> dict[str, str]:
    """The strategy with which LLaVA reads all patches of its tower and nothing else."""
    tower = part_config(config, "encoder").model_type
    return {"vision_feature_select_strategy": "full" if tower.startswith("siglip") else "default"}


def differences(described: Description, module: Any) -> list[str]:
    """The fields in which a module disagrees with the folder, and what the folder says that no module can do.

    More tokens alone are no disagreement: the tables of tokens grow (tables.Grown).
    """
    kind = type(module).__name__
    if kind != described.kind:
        return [f"{described.kind} there, {kind} here"]
    lines = []
    for field, theirs in described.names.items():
        there, here = described.fields[field], effective(module, field)
        if field == "window" and here and described.length and here >= described.length:
            here = None
        if _comparable(there) != _comparable(here):
            lines.append(f"{theirs} {there} there, {field} {here} here")
    fields = described.fields
    if len(lines) == 1 and not described.refused and fields.get("vocab", math.inf) < getattr(module, "vocab", 0):
        return []  # a language model that only has more tokens: its tables grow (tables.Grown)
    return lines + list(described.refused)


def effective(module: Any, field: str) -> Any:
    """The value of a module's field, or what None stands for."""
    value = getattr(module, field)
    if field == "head_dim" and value is None:
        return module.width // module.heads
    return module.grid if field == "table" and value is None else value


def _comparable(value: Any) -> Any:
    # open_clip runs SigLIP's weights with the exact GELU, transformers with the tanh form.
    return "gelu" if value == "gelu_tanh" else tuple(value) if isinstance(value, list) else value
