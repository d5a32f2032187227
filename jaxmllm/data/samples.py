"""From a record to one sample: tokens, labels, the places of the picture's tokens, pixels, targets.

The tokens of a picture are counted here, from the size of that picture, and nothing is ever cut: a sample that does not
fit in a row is refused. So the tokens in a row and the features of its pictures cannot disagree later.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from jaxmllm.batch import IGNORE_LABEL, VisualLayout
from jaxmllm.data.conversation import exchanges, system_text
from jaxmllm.data.encoding import Encoded, Encoder
from jaxmllm.data.images import View, padding, size_after_fit, token_mask, views
from jaxmllm.data.picture import decode, open_image
from jaxmllm.data.sources.record import Record
from jaxmllm.data.targets import Targets
from jaxmllm.data.templates import ChatTemplate
from jaxmllm.data.tiling import Tiling, tiled_visual_indices
from jaxmllm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """How records become samples. Raises ValueError for a tokenizer that lacks the template's tokens, and for a tiling
    that the image slots or the aggregator's tokens do not allow."""

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
            made = f"{tokens.per_cell} per cell of a {tokens.grid} x {tokens.grid} grid and {tokens.extra} others"
            raise ValueError(f"tiling needs an aggregator that makes one token per cell and no others, not {made}")
        cuts = {(e.edge or e.size) / e.size for e in self.layout.encoders.values() if e.fit == "crop"}
        if self.targets and len(cuts) > 1:
            raise ValueError("targets need encoders that see the same part of a picture, but edge / size differs")
        for marker in self.template.markers():
            if self.tokenizer.backend.token_to_id(marker) is None:
                missing = f"the token {marker}, which the tokenizer {self.tokenizer.path} lacks"
                raise ValueError(
                    f"template {self.template.name} needs {missing}; data.added_tokens gives it tokens, such as "
                    f"('{marker}',)"
                )

    @functools.cached_property
    def encoder(self) -> Encoder:
        """What tokenises conversations."""
        return Encoder(self.tokenizer, self.template.markers())

    def tile_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tiles of a picture of (width, height); (0, 0) without tiling."""
        return self.tiling.choose(size) if self.tiling else (0, 0)

    def slots(self, size: tuple[int, int]) -> int:
        """The number of image slots that a picture of (width, height) takes."""
        return 1 + math.prod(self.tile_grid(size))

    @property
    def target_shapes(self) -> dict[str, tuple[int, int]]:
        """Teacher name -> (queries, dim)."""
        return self.targets.spec() if self.targets else {}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample before it is packed in a row. Fields are named as in Batch; a text-only sample has 0 slots."""

    id: int  # index of the record
    tokens: np.ndarray  # int32[tokens]; 0 where a visual token stands
    labels: np.ndarray  # int32[tokens]; at place t the token at t + 1 if that one is trained, else IGNORE_LABEL
    visual_index: np.ndarray  # int32[tokens]; j * block + t for token t of image slot j, -1 for text
    images: dict[str, np.ndarray]  # encoder -> uint8[slots, px, px, 3]
    padding: dict[str, np.ndarray]  # encoder -> int32[slots, 2]
    targets: dict[str, np.ndarray]  # teacher -> float32[slots, queries, dim]; 0 where it has none for the picture
    target_mask: dict[str, np.ndarray]  # teacher -> bool[slots]
    image_count: int  # image slots it takes

    @property
    def size(self) -> tuple[int, int, int]:
        """What the sample takes of a row: tokens, image slots, samples."""
        return len(self.tokens), self.image_count, 1


def make_sample(record: Record, index: int, spec: SampleSpec, reply_open: bool = False) -> Sample:
    """The sample of a record. Raises BadSample.

    reply_open: the last turn is a question, and the sample ends where its answer begins.
    """
    images = [open_image(record, blob) for blob in record.images]
    sizes = [image.size for image in images]
    tokens, labels, visual_index = make_tokens(record, sizes, spec, reply_open)
    layout, shapes = spec.layout, spec.target_shapes
    pixels: dict[str, list] = {name: [] for name in layout.encoders}
    pads: dict[str, list] = {name: [] for name in layout.encoders}
    targets = []  # per image slot; those of tiles are empty
    for j, (blob, image, size) in enumerate(zip(record.images, images, sizes)):
        grid, tiles = spec.tile_grid(size), spec.slots(size) - 1
        sizes_needed = [size_after_fit(size, encoder, grid) for encoder in layout.encoders.values()]
        image = decode(record, blob, image, sizes_needed, spec.fast_jpeg)
        for name, encoder in layout.encoders.items():
            try:
                pixels[name] += [*views(image, encoder, grid, size)]
            except ValueError as error:
                raise record.bad("too large picture", str(error), blob.path) from None
            pads[name] += [padding(*layout.shape(size), encoder.grid), *[(0, 0)] * tiles]
        view = View(size, next(iter(layout.encoders.values())))
        targets += [spec.targets(record, j, view) if spec.targets else {}, *[{}] * tiles]
    return Sample(
        id=index,
        tokens=tokens,
        labels=labels,
        visual_index=visual_index,
        images={k: stack(pixels[k], (e.size, e.size, 3), np.uint8) for k, e in layout.encoders.items()},
        padding={name: stack(pad, (2,), np.int32) for name, pad in pads.items()},
        targets={k: stack([t.get(k, np.zeros(s)) for t in targets], s, np.float32) for k, s in shapes.items()},
        target_mask={k: stack([k in t for t in targets], (), bool) for k in shapes},
        image_count=len(targets),
    )


def stack(items: Sequence, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Items of a shape -> dtype[items, *shape], even if there are no items."""
    return np.array(items, dtype).reshape(-1, *shape)


def make_tokens(
    record: Record, sizes: Sequence[tuple[int, int]], spec: SampleSpec, reply_open: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, labels and visual_index of a Sample, from the (width, height) of its pictures. Raises BadSample."""
    tokens, trained, visual_index, image, slot = [], [], [], 0, 0
    for piece in conversation(record, len(sizes), spec, reply_open):
        if piece.image:
            indices = picture_indices(slot, sizes[image], spec)
            tokens += [0] * len(indices)
            visual_index += indices
            image, slot = image + 1, slot + spec.slots(sizes[image])
        tokens += piece.ids
        visual_index += [-1] * len(piece.ids)
        trained += [piece.trained] * (len(tokens) - len(trained))
    if len(tokens) > spec.seq_len:
        raise record.bad("too long", f"{len(tokens)} tokens, but a row has {spec.seq_len}")
    if slot > spec.image_slots:
        raise record.bad("too many pictures", f"they need {slot} image slots, but a row has {spec.image_slots}")
    ids = np.array(tokens, np.int32)
    labels = np.full_like(ids, IGNORE_LABEL)
    labels[:-1] = np.where(trained[1:], ids[1:], IGNORE_LABEL)
    return ids, labels, np.array(visual_index, np.int32)


def conversation(record: Record, pictures: int, spec: SampleSpec, reply_open: bool = False) -> list[Encoded]:
    """The pieces of a record's conversation, pictures among them, each with its token ids. Raises BadSample."""
    turns, system = exchanges(record, pictures, reply_open), system_text(record)
    if system and spec.template.system is None:
        raise record.bad("system text", f"the template {spec.template.name} has no place for one")
    return spec.encoder(spec.template.pieces(turns, system))


def picture_indices(slot: int, size: tuple[int, int], spec: SampleSpec) -> list[int]:
    """j * block + t for each token t of a picture that has a place in the row, in order; j: `slot`, and those after it
    for tiles."""
    grid = spec.tile_grid(size)
    return tiled_visual_indices(slot, size, grid, spec.layout) if any(grid) else visual_indices(slot, size, spec.layout)


def visual_indices(slot: int, size: tuple[int, int], layout: VisualLayout) -> list[int]:
    """slot * block + t for each token t of a picture of (width, height) that has a place in the row, in order."""
    start, tokens = slot * layout.block, layout.tokens
    if not tokens.unpad:
        return list(range(start, start + layout.block))
    grid = np.flatnonzero(token_mask(*layout.shape(size), tokens.grid, tokens.newline, per_cell=tokens.per_cell))
    return [*(grid + start).tolist(), *range(start + tokens.grid * tokens.columns, start + layout.block)]
