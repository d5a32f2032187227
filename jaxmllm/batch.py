"""The structs that pass between the parts of the model. Letters that shapes use everywhere:

    B rows of a batch          S tokens of a row (queries of an attention)     I image slots of a row   N = B*I images
    H width of the language model          V vocabulary          L side of the grid of visual tokens
    P tokens that the aggregator makes of an image: L*(L+1) with a newline column, L*L without (TokenLayout)
    h, w, C rows, columns and channels of a feature map          Q queries of a fuser's or aggregator's attention
    T keys of an attention     K key heads    G query heads per key head    D channels of a head
    M any number of places chosen in a row

Other sizes are words, such as taps, levels, or block: P + task tokens, all visual tokens of one image.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

IGNORE_LABEL = -100  # label of a place without loss; PyTorch's and LLaVA's value


def _struct(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_struct
class Batch:
    """What a train step consumes. The loader makes it of numpy arrays.

    A row holds several packed samples. The visual tokens of an image are a block: the aggregator's tokens in the order
    of TokenLayout, then the task tokens. If the layout says `unpad`, tokens that show only padding of a non-square
    image have no place in the row.
    """

    tokens: jax.Array  # int32[B, S]; not read where visual_index >= 0
    labels: jax.Array  # int32[B, S]; the token to predict at this place, or IGNORE_LABEL
    segment_ids: jax.Array  # int32[B, S]; 0 = padding, 1.. = sample within the row
    positions: jax.Array  # int32[B, S]; place within the sample
    visual_index: jax.Array  # int32[B, S]; i * block + t if token t of image slot i stands here, -1 for text
    visual_positions: jax.Array  # int32[B, I, block]; the inverse: place in the row, -1 if absent
    images: dict[str, jax.Array]  # encoder name -> uint8[B, I, px, px, 3]
    padding: dict[str, jax.Array]  # encoder name -> int32[B, I, 2]: grid columns and rows of padding on each side
    targets: dict[str, jax.Array]  # teacher name -> float32[B, I, queries, dim]
    target_mask: dict[str, jax.Array]  # teacher name -> bool[B, I]; whether the image has this target


class MapShape(NamedTuple):
    """Size of the feature map of one image."""

    h: int
    w: int
    c: int
    extra: int = 0  # tokens besides the grid


@_struct
class FeatureMap:
    """What a fuser makes of one encoder's taps."""

    cells: jax.Array  # [N, h, w, C]
    extra: jax.Array | None = None  # [N, extra, C]; tokens that belong to no cell (Dense Connector's STI has some)


@_struct
class VisualTokens:
    """What an aggregator gives to the language model."""

    tokens: jax.Array  # [N, P, H], in the order of TokenLayout
    memory: VisualMemory | None  # what aggregator layers inside the language model read


@_struct
class VisualMemory:
    """Projected encoder features for cross-attention, shared by the aggregator and its layers inside the language
    model.

    Query i of image n, on an L x L grid counted row by row, sees [:, n * L * L + i]: m*m cells of each encoder,
    row-major.
    """

    windows: tuple[jax.Array, ...]  # per encoder [m*m, N*L*L, C]
    masks: tuple[jax.Array, ...]  # per encoder bool[m*m, N*L*L]; True: the cell is seen
    context: jax.Array  # [N, C]


@partial(
    jax.tree_util.register_dataclass,
    meta_fields=("grid", "columns"),
    data_fields=("memory", "positions", "index"),
)
@dataclasses.dataclass(frozen=True)
class Visual:
    """Where the images of a packed batch stand, for layers that look at them inside the language model."""

    memory: VisualMemory
    positions: jax.Array  # Batch.visual_positions
    index: jax.Array  # Batch.visual_index
    grid: int  # L
    columns: int  # L, or L + 1 with newlines: the first L * columns tokens of a visual block are the patch grid


@_struct
class Term:
    """One unreduced loss. Mask, weight and global count are applied in the train step and nowhere else."""

    values: jax.Array  # float32[...]
    mask: jax.Array  # bool, same shape


@dataclasses.dataclass(frozen=True)
class EncoderInput:
    """How pictures are prepared for one encoder.

    fit: "pad" centres the picture on a square of `pad_color`; "crop" resizes its shorter side to `edge` (default: size)
    and keeps the middle, so the ends are lost; "squash" ignores its shape. filter: PIL's "bicubic" or "bilinear".
    Raises ValueError for any other fit or filter.
    """

    size: int  # pixels per side
    grid: int  # side of the feature grid
    pad_color: tuple[int, int, int]  # RGB fill of pad-to-square
    fit: str = "pad"
    edge: int | None = None
    filter: str = "bicubic"

    def __post_init__(self):
        for name, known in (("fit", ("pad", "crop", "squash")), ("filter", ("bicubic", "bilinear"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.edge and (self.fit != "crop" or self.edge < self.size):
            raise ValueError(f'edge {self.edge} is for fit="crop" and must be {self.size} (the size) or more')


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """The order of an image's tokens: line by line of the grid, each line followed by its newline token, then the
    tokens that belong to no cell."""

    grid: int = 0  # L; 0: no token belongs to a cell (a resampler)
    newline: bool = False  # a token at the end of every line
    unpad: bool = False  # tokens of cells that show only padding have no place in the row
    per_cell: int = 1  # tokens of a cell, side by side
    extra: int = 0  # tokens that belong to no cell
    memory: bool = False  # whether layers inside the language model can read the maps (VisualTokens.memory)

    @property
    def columns(self) -> int:
        """Tokens of one line of the grid, including its newline."""
        return self.grid * self.per_cell + self.newline

    @property
    def count(self) -> int:
        """P, the tokens that the aggregator makes of one image."""
        return self.grid * self.columns + self.extra


@dataclasses.dataclass(frozen=True)
class VisualLayout:
    """All that the data pipeline must know about the visual path.

    Raises ValueError if encoders differ in `fit`: their maps would show different parts of a picture.
    """

    encoders: dict[str, EncoderInput]
    tokens: TokenLayout
    task_tokens: int

    def __post_init__(self):
        fits = {name: encoder.fit for name, encoder in self.encoders.items()}
        if len(set(fits.values())) > 1:
            raise ValueError(f"all encoders of a model must have the same fit, not {fits}")

    def shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) in proportion to the part of its square that a picture fills; (1, 1) if there is no
        padding."""
        return size if all(encoder.fit == "pad" for encoder in self.encoders.values()) else (1, 1)

    @property
    def block(self) -> int:
        """The number of visual tokens of one image, including task tokens."""
        return self.tokens.count + self.task_tokens


def empty_batch(
    layout: VisualLayout, rows: int, seq_len: int, image_slots: int, targets: dict[str, tuple[int, int]]
) -> Batch:
    """A numpy batch of padding with the shapes of training; targets: teacher name -> (queries, dim)."""
    text, images = (rows, seq_len), (rows, image_slots)
    return Batch(
        tokens=np.zeros(text, np.int32),
        labels=np.full(text, IGNORE_LABEL, np.int32),
        segment_ids=np.zeros(text, np.int32),
        positions=np.zeros(text, np.int32),
        visual_index=np.full(text, -1, np.int32),
        visual_positions=np.full((*images, layout.block), -1, np.int32),
        images={k: np.zeros((*images, e.size, e.size, 3), np.uint8) for k, e in layout.encoders.items()},
        padding={k: np.zeros((*images, 2), np.int32) for k in layout.encoders},
        targets={k: np.zeros((*images, *shape), np.float32) for k, shape in targets.items()},
        target_mask={k: np.zeros(images, bool) for k in targets},
    )
