"""How a Hugging Face folder prepares pictures: its preprocessor_config.json as the fields of our encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.weights.hf_config import read_json

FILE, PROCESSOR = "preprocessor_config.json", "processor_config.json"  # the second holds it as "image_processor"
FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
CROP_SHARE = 224 / 256  # ConvNextImageProcessor's default crop_pct
ROUNDING = 5e-4  # means and deviations that are written with three digits
SQUASHED_FROM = 384  # pixels from which on ConvNextImageProcessor does not crop


def preparation(folder: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """mean, std, size, fit, edge and filter as the folder says, where they are not `given`.

    Raises ValueError, in one line, for what an encoder cannot do, and without a file if mean, std or fit is not given.
    """
    found = _read(Path(folder))
    if found is None:
        missing = [f"{name}=" for name in ("mean", "std", "fit") if name not in given]
        if missing:
            raise ValueError(f"no {FILE} in {folder}; give {', '.join(missing)} of the encoder")
        return {}
    fields = {}
    try:
        if not {"mean", "std"} <= given.keys():
            fields |= _normalisation(found)
        if "filter" not in given:
            fields["filter"] = _filter(found)
        if not {"size", "fit"} <= given.keys():
            fields |= _fit(found)
            if {"size", "fit"} & given.keys():  # the folder's edge belongs to its own size and fit
                fields.pop("edge", None)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {FILE} has no usable {error.args[0]}; give mean=, std=, size=, fit=") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {FILE}: {error}") from None
    return {name: value for name, value in fields.items() if name not in given}


def normalisation_differences(folder: str | Path, encoder: Any) -> list[str]:
    """Where the folder normalises pixels otherwise than an encoder, whose weights would then see other numbers.

    Empty if the folder does not say how. How pictures are made square may differ: published models do so.
    """
    found = _read(Path(folder))
    if found is None:
        return []
    try:
        there = _normalisation(found)
    except (KeyError, TypeError, ValueError) as error:
        return [f"{FILE}: {error}"]
    here = {name: tuple(getattr(encoder, name)) for name in there}
    return [
        f"image_{name} {list(there[name])} there, {name} {list(here[name])} here"
        for name in there
        if not np.allclose(there[name], here[name], rtol=0, atol=ROUNDING)
    ]


def _read(folder: Path) -> dict[str, Any] | None:
    if (folder / FILE).is_file():
        return read_json(folder / FILE)
    return read_json(folder / PROCESSOR).get("image_processor") if (folder / PROCESSOR).is_file() else None


def _normalisation(found: Mapping[str, Any]) -> dict[str, Any]:
    scale = found.get("rescale_factor", 1 / 255)
    if not (found.get("do_normalize", True) and found.get("do_rescale", True)) or abs(scale * 255 - 1) > 1e-6:
        raise ValueError("pixels must be divided by 255 and normalised (do_rescale, rescale_factor, do_normalize)")
    return {"mean": tuple(found["image_mean"]), "std": tuple(found["image_std"])}


def _filter(found: Mapping[str, Any]) -> str:
    if found["resample"] not in FILTERS:
        raise ValueError(f"resample {found['resample']} cannot be done here, only 2 (bilinear) and 3 (bicubic)")
    return FILTERS[found["resample"]]


def _fit(found: Mapping[str, Any]) -> dict[str, Any]:
    """size, fit and edge."""
    kind = found.get("image_processor_type") or found.get("feature_extractor_type") or ""
    if not found.get("do_resize", True):
        raise ValueError("do_resize false cannot be done here: every picture gets the encoder's size")
    size, crops = found["size"], found.get("do_center_crop", False)
    if kind.startswith("ConvNext"):
        side = size if isinstance(size, int) else size["shortest_edge"]
        if side >= SQUASHED_FROM:
            return {"size": side, "fit": "squash"}
        return {"size": side, "fit": "crop", "edge": int(side / found.get("crop_pct", CROP_SHARE))}
    if isinstance(size, int):  # in files of older versions: CLIP's shortest edge, ViT's square
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    if "height" in size:
        side = _square(size, "size")
        if crops and _square(found["crop_size"], "crop_size") != side:
            raise ValueError(f"size {size} with another crop_size {found['crop_size']} cannot be done here")
        return {"size": side, "fit": "squash"}
    edge = size["shortest_edge"]
    if not crops:
        raise ValueError("do_center_crop false with size.shortest_edge cannot be done here: pictures must be square")
    side = _square(found["crop_size"], "crop_size")
    if kind.startswith("LlavaImageProcessor") and found.get("do_pad", False):
        if edge != side:
            raise ValueError(f"do_pad with size {edge} and crop_size {side} cannot be done here: they must be equal")
        return {"size": side, "fit": "pad"}
    return {"size": side, "fit": "crop"} | ({"edge": edge} if edge != side else {})


def _square(size: int | Mapping[str, int], name: str) -> int:
    height, width = (size, size) if isinstance(size, int) else (size["height"], size["width"])
    if height != width:
        raise ValueError(f"{name} {height} x {width} is not square")
    return height
