"""What the model sees of one record: the sample that the loader makes of it, piece by piece."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxmllm.data.picture import open_image
from jaxmllm.data.samples import Sample, SampleSpec, conversation, make_sample, picture_indices
from jaxmllm.data.sources.record import BadSample, Record, RecordSource


@dataclasses.dataclass(frozen=True)
class ShownPiece:
    """Part of a conversation. The ids of all pieces, joined, are the tokens of the sample."""

    text: str
    ids: list[int]  # zeros for the tokens of a picture
    trained: bool
    image: int | None  # number of the picture that stands here


@dataclasses.dataclass(frozen=True)
class ShownRecord:
    """A record, and the sample that is made of it or why it is refused."""

    id: str
    source: str
    index: int  # counted over the sources; the loader's id of the sample
    record: int  # in its source
    error: str | None
    pieces: list[ShownPiece]  # none if the conversation itself is refused
    sizes: list[tuple[int, int]]  # (width, height) of the pictures, as they are opened
    sample: Sample | None


def show_record(sources: Sequence[RecordSource], index: int, spec: SampleSpec) -> ShownRecord:
    """The record at an index that counts over the sources in order. Raises ValueError if there is no such record."""
    total, number = sum(map(len, sources)), index
    if not 0 <= index < total:
        raise ValueError(f"there is no record {index}: the sources have {total}, and the first is 0")
    for source in sources:
        if number < len(source):
            break
        number -= len(source)
    sizes: list[tuple[int, int]] = []
    pieces: list[ShownPiece] = []
    sample, error, id = None, None, str(number)
    try:
        record = source[number]
        id = record.id
        sizes += [open_image(record, blob).size for blob in record.images]
        pieces += shown_pieces(record, sizes, spec)
        sample = make_sample(record, index, spec)
    except BadSample as bad:
        error, id = str(bad), bad.id
    return ShownRecord(id, source.path, index, number, error, pieces, sizes, sample)


def shown_pieces(record: Record, sizes: Sequence[tuple[int, int]], spec: SampleSpec) -> list[ShownPiece]:
    """The pieces of a record whose pictures have these sizes. Raises BadSample."""
    pieces, image, slot = [], 0, 0
    for piece in conversation(record, len(sizes), spec):
        if piece.image:
            tokens = [0] * len(picture_indices(slot, sizes[image], spec))
            pieces.append(ShownPiece(piece.text, tokens, piece.trained, image))
            image, slot = image + 1, slot + spec.slots(sizes[image])
        else:
            pieces.append(ShownPiece(piece.text, piece.ids, piece.trained, None))
    return pieces


def to_document(shown: ShownRecord, folder: str | None = None) -> dict[str, Any]:
    """A shown record as JSON data; pictures and target maps are written as PNG files in `folder`, if one is given.

    "images": encoder -> file, size and padding of the first image slot, and "slots": those of all. "targets": teacher
    -> the file of a map of each slot that has a target, its shape, and its smallest, mean and largest value.
    """
    images: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    if shown.sample and shown.sample.image_count:
        for name, pixels in shown.sample.images.items():
            pads = shown.sample.padding[name].tolist()
            names = [f"{shown.index}-{name}-{slot}.png" for slot in range(len(pixels))]
            files = [written(folder, file, picture) for file, picture in zip(names, pixels)]
            slots = [{"file": f, "size": [*x.shape[1::-1]], "padding": p} for f, x, p in zip(files, pixels, pads)]
            images[name] = {**slots[0], "slots": slots}
        for name, values in shown.sample.targets.items():
            masks = shown.sample.target_mask[name]
            targets[name] = [
                {"slot": slot, **described(values[slot], folder, f"{shown.index}-target-{name}-{slot}.png")}
                for slot in np.flatnonzero(masks).tolist()
            ]
    return {
        "id": shown.id,
        "source": shown.source,
        "index": shown.index,
        "record": shown.record,
        "error": shown.error,
        "pieces": [dataclasses.asdict(piece) for piece in shown.pieces],
        "tokens": shown.sample.tokens.tolist() if shown.sample else [],
        "labels": shown.sample.labels.tolist() if shown.sample else [],
        "pictures": [{"size": [*size]} for size in shown.sizes],
        "images": images,
        "targets": targets,
    }


def described(values: np.ndarray, folder: str | None, name: str) -> dict[str, Any]:
    """A target float32[queries, dim] in figures, and as the file of its map."""
    low, mean, high = (float(f(values)) for f in (np.min, np.mean, np.max))
    file = written(folder, name, target_map(values))
    return {"file": file, "shape": [*values.shape], "min": low, "mean": mean, "max": high}


def target_map(values: np.ndarray, most: int = 16) -> np.ndarray:
    """A target float32[queries, dim] -> uint8[h, w]: the first dimensions side by side, each as its queries lie in the
    picture if they are a square; black is the smallest value of all, white the largest."""
    side = math.isqrt(len(values))
    shape = (side, side) if side**2 == len(values) else (1, len(values))
    low, high = values.min(), values.max()
    scaled = np.uint8(np.round((values[:, :most] - low) / max(high - low, 1e-9) * 255))
    maps = [np.pad(scaled[:, d].reshape(shape), ((0, 0), (0, 1))) for d in range(scaled.shape[1])]
    return np.concatenate(maps, 1)[:, :-1].repeat(8, 0).repeat(8, 1)


def written(folder: str | None, name: str, pixels: np.ndarray) -> str | None:
    """Writes a PNG -> its path; None without a folder."""
    if folder is None:
        return None
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return str(path)
