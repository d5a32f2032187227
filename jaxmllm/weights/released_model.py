"""The model that a released checkpoint's config.json describes (released.py), for encoders that the caller gives."""

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
from jaxmllm.objectives.next_token import NextToken
from jaxmllm.weights import hf_decoders
from jaxmllm.weights.hf_config import read_json
from jaxmllm.weights.released import ReleasedSource


def model_of(folder: str | Path, encoders: Mapping[str, Any], length: int | None = None) -> MLLM:
    """LLaVA-1.5, MMFuser, Dense Connector or Cambrian-1 from a folder, with next-token prediction.

    encoders: name -> encoder with the taps that the checkpoint reads, in its order (encoders.presets). length: tokens
    of the longest sequence. Raises ValueError, in one line, for another kind of projector or decoder, and for encoders
    that do not fit.
    """
    path = Path(folder)
    raw, source = read_json(path / "config.json"), ReleasedSource(str(folder), path, None)
    described = hf_decoders.decoder(source.text_config, length)
    if described.refused:
        raise ValueError(f"{folder}: {'; '.join(described.refused)}")
    fields, kind = dict(described.fields), raw.get("mm_projector_type", "linear")
    if kind == "sva":
        grid, width = isqrt(raw["image_token_len"]), raw["vision_hidden_size"]
        sides = tuple(isqrt(count) for count in raw["query_num_list"])
        aggregator = SVA(width, grid, raw["connector_depth"], groups=None if sides == (grid,) else sides)
        if not raw.get("connector_only", True):
            names = ("start_of_vision_sampler_layers", "stride_of_vision_sampler_layers")
            places = *(raw[name] for name in names), raw["num_of_vision_sampler_layers"]
            fields["inserts"] = VisualInserts(SVALayer(width), *places)
        fusers = {name: Single() for name in encoders}
    else:
        linear = 1 if kind == "linear" else int((re.fullmatch(r"mlp(\d+)x_gelu", kind) or [0, 0])[1])
        if not linear or len(encoders) != 1:
            raise ValueError(f"{folder}: mm_projector_type {kind!r} with {len(encoders)} encoders is not known")
        ((name, encoder),) = encoders.items()
        aggregator, fusers = MLPProjector(encoder.side, linear), {name: _fuser(raw, source, encoder)}
    return MLLM(dict(encoders), fusers, aggregator, Decoder(**fields), {"next_token": NextToken()})


def _fuser(raw: Mapping[str, Any], source: ReleasedSource, encoder: Any) -> Any:
    """MMFuser's if its tensors are there, Dense Connector's that config.json names, else none."""
    if "model.mm_projector.0.gamma1" in source.folder:
        return MMFuser()
    taps, kind = len(encoder.taps), raw.get("mm_dense_connector_type", "none")
    known = {"none": Single, "sti": STI, "sci": lambda: sci(taps), "dci": lambda: dci((taps - 1) // 2, final=taps - 1)}
    if kind not in known:
        raise ValueError(f"{source.name}: mm_dense_connector_type {kind!r} is not known; known: {', '.join(known)}")
    return known[kind]()
