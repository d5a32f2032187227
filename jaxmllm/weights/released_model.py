"""The model that a released checkpoint's config.json describes (released.py), and the config.json of such a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.aggregators.sva import SVA, SVALayer
from jaxmllm.fusers.dense_connector import STI, dci, sci
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.fusers.single import Single
from jaxmllm.llms.decoder import Decoder
from jaxmllm.llms.inserts import VisualInserts
from jaxmllm.mllm import MLLM
from jaxmllm.objectives.embed_distill import EmbedDistill
from jaxmllm.objectives.next_token import NextToken
from jaxmllm.weights import hf_decoders
from jaxmllm.weights.hf_config import read_json
from jaxmllm.weights.hf_write_decoders import text_config
from jaxmllm.weights.layouts import Layout
from jaxmllm.weights.released import ReleasedSource, key_map

INSERTS = ("start_of_vision_sampler_layers", "stride_of_vision_sampler_layers", "num_of_vision_sampler_layers")
TASKS = {"gen": "img", "depth": "depth", "seg": "seg"}  # VisPer-LM's tasks -> how config.json begins their fields
HEAD = {"blocks": "depth", "head_dim": "dim_head", "heads": "num_heads", "ff_mult": "ff_mult"}  # of its predictors


class Fields(dict):
    """Fields of a config.json. One that is missing raises ValueError with its name and that of the file."""

    def __init__(self, fields: Mapping[str, Any], place: str):
        super().__init__(fields)
        self.place = place

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.place} has no {name}, which this kind of checkpoint needs")


def model_of(folder: str | Path, encoders: Mapping[str, Any], length: int | None = None) -> MLLM:
    """LLaVA-1.5, MMFuser, Dense Connector, Cambrian-1 or VisPer-LM from a folder, with next-token prediction.

    encoders: name -> encoder with the taps that the checkpoint reads, in its order (encoders.presets). length: tokens
    of the longest sequence. Raises ValueError, in one line, for another kind of projector or decoder, and for encoders
    that do not fit.
    """
    path = Path(folder)
    raw = Fields(read_json(path / "config.json"), str(path / "config.json"))
    source = ReleasedSource(str(folder), path, None)
    described = hf_decoders.decoder(source.text_config, length)
    if described.refused:
        raise ValueError(f"{folder}: {'; '.join(described.refused)}")
    fields, kind = dict(described.fields), raw.get("mm_projector_type", "linear")
    if kind == "sva":
        grid, width = isqrt(raw["image_token_len"]), raw["vision_hidden_size"]
        sides = tuple(isqrt(count) for count in raw["query_num_list"])
        aggregator = SVA(width, grid, raw["connector_depth"], groups=None if sides == (grid,) else sides)
        if not raw.get("connector_only", True):
            fields["inserts"] = VisualInserts(SVALayer(width), *(raw[name] for name in INSERTS))
        fusers = {name: Single() for name in encoders}
    else:
        linear = 1 if kind == "linear" else int((re.fullmatch(r"mlp(\d+)x_gelu", kind) or [0, 0])[1])
        if not linear or len(encoders) != 1:
            raise ValueError(f"{folder}: mm_projector_type {kind!r} with {len(encoders)} encoders is not known")
        ((name, encoder),) = encoders.items()
        aggregator, fusers = MLPProjector(encoder.side, linear), {name: _fuser(raw, source, encoder)}
    objectives = {"next_token": NextToken()} | _teachers(raw, source)
    return MLLM(dict(encoders), fusers, aggregator, Decoder(**fields), objectives)


def _fuser(raw: Mapping[str, Any], source: ReleasedSource, encoder: Any) -> Any:
    """MMFuser's if its tensors are there, Dense Connector's that config.json names, else none."""
    if "model.mm_projector.0.gamma1" in source.folder:
        return MMFuser()
    taps, kind = len(encoder.taps), raw.get("mm_dense_connector_type", "none")
    known = {"none": Single} | _dense_connectors(taps)
    if kind not in known:
        raise ValueError(f"{source.name}: mm_dense_connector_type {kind!r} is not known; known: {', '.join(known)}")
    return known[kind]()


def _dense_connectors(taps: int) -> dict[str, Any]:
    return {"sti": STI, "sci": lambda: sci(taps), "dci": lambda: dci((taps - 1) // 2, final=taps - 1)}


def _teachers(raw: Mapping[str, Any], source: ReleasedSource) -> dict[str, EmbedDistill]:
    """VisPer-LM's tasks, in the order of their tokens; without predictors, if the folder has none (its last stage)."""
    if "num_task_tokens" not in raw:
        return {}
    order = str(raw.get("aux_mode", "")).split("-")
    if unknown := [task for task in order if task not in TASKS or f"image_{task}" not in raw]:
        raise ValueError(
            f"{source.name}: aux_mode names {unknown[0]!r}, of which config.json has no image_{unknown[0]}"
        )
    if raw["num_task_tokens"] < 1:
        raise ValueError(f"{source.name}: num_task_tokens is 0; predictors with queries of their own are not known")
    return {task: _teacher(task, raw, source) for task in order}


def _teacher(task: str, raw: Mapping[str, Any], source: ReleasedSource) -> EmbedDistill:
    head, key = Fields(raw[f"image_{task}"], f"{source.name}: image_{task}"), f"image_{task}_heads.0."
    layers, bias = str(head[f"{TASKS[task]}_layer_indices"]).split("-"), f"{key}projector.proj_in.bias"
    width = len(source.folder[bias]) if bias in source.folder else None
    maps = [name for name in source.folder if re.fullmatch(rf"{re.escape(key)}linear_\d+\.0\.weight", name)]
    return EmbedDistill(
        head["num_tokens"],
        head["output_dim"],
        tuple(map(int, layers)) if width else (),
        raw["num_task_tokens"],
        pooled=task != "gen",
        predictor_width=None if width == head["output_dim"] else width,
        extra_heads=len(maps),
        contrastive=raw["contrastive_loss_weight"],
        **{ours: head[theirs] for ours, theirs in HEAD.items()},
    )


def layout(model: MLLM, length: int) -> Layout:
    """The layout in which a model goes back, without its encoders. Raises ValueError if there is none.

    model_of finds the model again in the folder.
    """
    keys, config = key_map(model), text_config(model.llm.clone(inserts=None), length)
    if config is None:
        raise ValueError("no released checkpoint has a decoder like this one")
    base, kind = config["model_type"], "cambrian" if isinstance(model.aggregator, SVA) else "llava"
    names = {SVA: "sva", MLPProjector: f"mlp{getattr(model.aggregator, 'depth', 2)}x_gelu"}
    config |= {
        "architectures": [f"{kind.capitalize()}{config['architectures'][0]}"],
        "model_type": f"{kind}_{base}",
        "mm_projector_type": names.get(type(model.aggregator), "mlp2x_gelu"),
    }
    config |= _connector_config(model) | _teachers_config(model)
    return Layout(f"authors' layout of {config['architectures'][0]}, without encoders", keys, config)


def _connector_config(model: MLLM) -> dict[str, Any]:
    """The fields of config.json that say which connector it is: Cambrian-1's, Dense Connector's."""
    sva, fuser = model.aggregator, next(iter(model.fusers.values()))
    if isinstance(sva, SVA):
        inserts = model.llm.inserts
        fields = {"image_token_len": sva.grid**2, "vision_hidden_size": sva.width, "connector_depth": sva.depth}
        fields |= {"query_num_list": [side**2 for side in sva.sides], "num_query_group": len(sva.sides)}
        places = (inserts.start, inserts.stride, inserts.count) if inserts else ()
        return fields | {"connector_only": inserts is None} | dict(zip(INSERTS, places))
    (encoder,) = model.encoders.values()
    same = (name for name, make in _dense_connectors(len(encoder.taps)).items() if make() == fuser)
    return {"mm_dense_connector_type": name} if (name := next(same, None)) else {}


def _teachers_config(model: MLLM) -> dict[str, Any]:
    """The fields of config.json for VisPer-LM's tasks."""
    teachers = {task: each for task, each in model.objectives.items() if isinstance(each, EmbedDistill)}
    if not teachers:
        return {}
    first = next(iter(teachers.values()))
    common = {"aux_mode": "-".join(teachers), "num_task_tokens": first.tokens}
    fields = {"contrastive_loss_weight": first.contrastive}
    for task, each in teachers.items():
        head = {theirs: getattr(each, ours) for ours, theirs in HEAD.items()}
        places = {f"{TASKS.get(task, task)}_layer_indices": "-".join(map(str, each.layers or (0,)))}
        fields[f"image_{task}"] = head | places | {"num_tokens": each.queries, "output_dim": each.dim}
    return common | fields
