"""A record -> one sample: tokens, labels, where the picture's tokens stand, pixels, targets.

The tokens of a picture are counted here, from the picture's own size, and nothing is ever cut: what does not
fit in a row is refused. So the tokens in a row and the features of its pictures cannot disagree later.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxmllm.batch import VisualLayout
from jaxmllm.data.images import decode, needed, open_image, padding, token_mask, views
from jaxmllm.data.sources import BadSample, Record
from jaxmllm.data.targets import Targets
from jaxmllm.data.templates import IMAGE, ChatTemplate
from jaxmllm.data.tiling import Tiling, tiled_places
from jaxmllm.data.tokenizer import Tokenizer

__all__ = ["BadSample", "Sample", "SampleSpec", "make_sample", "make_tokens"]

IGNORE = -100  # label of a place without loss


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """How records become samples. Raises ValueError for a tokenizer without the template's tokens, and for a tiling
    that image slots or the aggregator's tokens do not allow."""

    tokenizer: Tokenizer
    template: ChatTemplate
    layout: VisualLayout
    seq_len: int  # S, tokens of a row
    image_slots: int  # I, pictures of a row
    targets: Targets | None = None
    fast_jpeg: bool = False  # see images.decode
    tiling: Tiling | None = None

    def __post_init__(self):
        if self.image_slots < 0 or bool(self.image_slots) != bool(self.layout.encoders):
            need = "1 or more; text uses none of them" if self.layout.encoders else "0: the model has no encoder"
            raise ValueError(f"data.image_slots is {self.image_slots}, but must be {need}")
        if self.tiling and self.image_slots < self.tiling.slots:
            raise ValueError(f"image_slots must be {self.tiling.slots} or more for this tiling, not {self.image_slots}")
        tokens = self.layout.tokens
        if self.tiling and (tokens.per_cell != 1 or tokens.extra):
            found = f"{tokens.per_cell} in each of {tokens.grid} x {tokens.grid} cells and {tokens.extra} in none"
            raise ValueError(f"tiling needs an aggregator that gives one token a cell and no other, not {found}")
        for marker in self.template.markers():
            if self.tokenizer.backend.token_to_id(marker) is None:
                lack = f"the token {marker}, which the tokenizer {self.tokenizer.path} lacks"
                raise ValueError(f"template {self.template.name} needs {lack}")

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tiles of a picture of (width, height); (0, 0) without tiling."""
        return self.tiling.choose(size) if self.tiling else (0, 0)

    def slots(self, size: tuple[int, int]) -> int:
        """Image slots that a picture of (width, height) takes."""
        return 1 + math.prod(self.grid(size))

    @property
    def target_shapes(self) -> dict[str, tuple[int, int]]:
        """Teacher name -> (n, d)."""
        return self.targets.spec() if self.targets else {}


@dataclasses.dataclass(frozen=True)
class Sample:
    """n tokens and m image slots (0 if text only); the names are those of Batch."""

    id: int  # index of the record
    tokens: np.ndarray  # int32[n]; 0 where a visual token stands
    labels: np.ndarray  # int32[n]; at place t the token at t + 1 if that is trained, else -100
    visual: np.ndarray  # int32[n]; j * T + t for token t of image slot j, -1 for text
    images: dict[str, np.ndarray]  # encoder -> uint8[m, px, px, 3]
    padding: dict[str, np.ndarray]  # encoder -> int32[m, 2]
    targets: dict[str, np.ndarray]  # teacher -> float32[m, n, d]; 0 where it has none for the picture
    target_mask: dict[str, np.ndarray]  # teacher -> bool[m]
    image_count: int  # m

    @property
    def size(self) -> tuple[int, int, int]:
        """What it takes of a row: tokens, image slots, samples."""
        return len(self.tokens), self.image_count, 1


def make_sample(record: Record, index: int, spec: SampleSpec, reply_open: bool = False) -> Sample:
    """The sample of a record. Raises BadSample.

    reply_open: the last turn is a question, and the sample ends where its answer begins.
    """
    images = [open_image(record, blob) for blob in record.images]
    sizes = [image.size for image in images]
    tokens, labels, visual = make_tokens(record, sizes, spec, reply_open)
    layout, shapes = spec.layout, spec.target_shapes
    pixels: dict[str, list] = {name: [] for name in layout.encoders}
    pads: dict[str, list] = {name: [] for name in layout.encoders}
    found = []
    for j, (blob, image, size) in enumerate(zip(record.images, images, sizes)):
        grid, tiles = spec.grid(size), spec.slots(size) - 1
        image = decode(record, blob, image, [needed(size, e, grid) for e in layout.encoders.values()], spec.fast_jpeg)
        for name, encoder in layout.encoders.items():
            pixels[name] += [*views(image, encoder, grid, size)]
            pads[name] += [padding(*layout.shape(size), encoder.grid), *[(0, 0)] * tiles]
        found += [spec.targets(record, j) if spec.targets else {}, *[{}] * tiles]
    return Sample(
        id=index,
        tokens=tokens,
        labels=labels,
        visual=visual,
        images={k: stack(pixels[k], (e.size, e.size, 3), np.uint8) for k, e in layout.encoders.items()},
        padding={name: stack(pad, (2,), np.int32) for name, pad in pads.items()},
        targets={k: stack([f.get(k, np.zeros(s)) for f in found], s, np.float32) for k, s in shapes.items()},
        target_mask={k: stack([k in f for f in found], (), bool) for k in shapes},
        image_count=len(found),
    )


def stack(items: Sequence, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Items of a shape -> dtype[m, *shape], also if there are none."""
    return np.array(items, dtype).reshape(-1, *shape)


def make_tokens(
    record: Record, sizes: Sequence[tuple[int, int]], spec: SampleSpec, reply_open: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, labels, visual of a Sample, from the (width, height) of the pictures. Raises BadSample."""
    pieces = spec.template.pieces(exchanges(record, len(sizes), reply_open))
    tokens, trained, visual, image, slot = [], [], [], 0, 0
    for text, is_trained in pieces:
        for k, part in enumerate(text.split(IMAGE)):
            if k:
                size, layout = sizes[image], spec.layout
                grid = spec.grid(size)
                places = tiled_places(slot, size, grid, layout) if any(grid) else image_places(slot, size, layout)
                tokens += [0] * len(places)
                visual += places
                image, slot = image + 1, slot + spec.slots(size)
            ids = spec.tokenizer.encode(part) if part else []
            tokens += ids
            visual += [-1] * len(ids)
        trained += [is_trained] * (len(tokens) - len(trained))
    if len(tokens) > spec.seq_len:
        raise record.bad("too long", f"{len(tokens)} tokens, and a row has {spec.seq_len}")
    if slot > spec.image_slots:
        raise record.bad("too many pictures", f"{slot}, and a row has {spec.image_slots}")
    ids = np.array(tokens, np.int32)
    labels = np.full_like(ids, IGNORE)
    labels[:-1] = np.where(trained[1:], ids[1:], IGNORE)
    return ids, labels, np.array(visual, np.int32)


def image_places(slot: int, size: tuple[int, int], layout: VisualLayout) -> list[int]:
    """j * T + t of the tokens in image slot j = `slot` that stand in the row, for a picture of (width, height)."""
    start, tokens = slot * layout.block, layout.tokens
    if not tokens.unpad:
        return list(range(start, start + layout.block))
    grid = np.flatnonzero(token_mask(*layout.shape(size), tokens.grid, tokens.newline, per_cell=tokens.per_cell))
    return [*(grid + start).tolist(), *range(start + tokens.grid * tokens.columns, start + layout.block)]


def exchanges(record: Record, pictures: int, reply_open: bool = False) -> list[tuple[str, str | None]]:
    """(question, answer) pairs; if reply_open, the last answer is None. Raises BadSample."""
    turns = record.data.get("conversations")
    try:
        turns = [(turn["from"], turn["value"].strip()) for turn in turns]
    except (TypeError, KeyError, AttributeError):
        raise record.bad("no conversation", 'a list of {"from", "value"} is needed') from None
    if turns and turns[0][0] != "human":
        turns = turns[1:]  # as LLaVA does: some sets start with an answer
    if not turns:
        raise record.bad("no conversation", "it has no question")
    for k, (who, text) in enumerate(turns):
        if who != ("human", "gpt")[k % 2]:
            raise record.bad("turns do not alternate", f"turn {k} is from {who!r}")
        if k % 2 and not text:
            raise record.bad("empty answer", f"turn {k}")
        if k % 2 and IMAGE in text:
            raise record.bad("wrong number of <image>", f"there is one in the answer, turn {k}")
    if len(turns) % 2 != reply_open:
        last = "an answer" if reply_open else "a question"
        raise record.bad("turns do not alternate", f"the last turn is {last}")
    written = sum(text.count(IMAGE) for _, text in turns)
    if written != pictures:
        raise record.bad("wrong number of <image>", f"{written} in the text, {pictures} pictures")
    answers = [text for _, text in turns[1::2]]
    return list(zip((text for _, text in turns[::2]), [*answers, None]))
