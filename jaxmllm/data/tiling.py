"""Any resolution (LLaVA-NeXT, Liu et al. 2024): a picture is seen whole, and again in tiles of the encoder's size.

whole picture      its grid of tiles, here 2 x 2; the picture is centred in it, the rest is black
+----+             +----+----+
|    |             | 1  | 2  |     Every view takes an image slot of the row, so shapes stay static, and encoders,
| 0  |             +----+----+     fusers and aggregators need not know about tiles. In the row the tokens of the
+----+             | 3  | 4  |     tiles form one large map, line by line across tiles; only the order of the
                   +----+----+     tokens depends on tiling.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxmllm.batch import VisualLayout
from jaxmllm.data.images import token_mask


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Which grids of tiles a picture may be cut into, and how one is chosen.

    grids: (rows, columns) of each; tile: side of a tile in pixels, used to choose the grid. The defaults are
    LLaVA-NeXT's, which squashes the whole picture (fit="squash" of the encoder).
    """

    grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    tile: int = 336

    @property
    def slots(self) -> int:
        """The most image slots that one picture can take."""
        return 1 + max(rows * columns for rows, columns in self.grids)

    def choose(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) for a picture of (width, height): the grid that keeps most pixels, then wastes fewest.

        As transformers' select_best_resolution; among equals the first is taken.
        """
        width, height = size

        def score(grid: tuple[int, int]) -> tuple[int, int]:
            rows, columns = (side * self.tile for side in grid)
            scale = min(columns / width, rows / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - rows * columns

        return max(self.grids, key=score)


def tile_padding(size: tuple[int, int], grid: tuple[int, int], side: int) -> tuple[int, int]:
    """(columns, rows) on each side of the large map that show only padding; side: cells along one tile.

    As transformers' unpad_image.
    """
    (width, height), (rows, columns) = size, (n * side for n in grid)
    if width / height > columns / rows:
        return 0, (rows - int(round(height * (columns / width), 7))) // 2
    return (columns - int(round(width * (rows / height), 7))) // 2, 0


def tiled_visual_indices(slot: int, size: tuple[int, int], grid: tuple[int, int], layout: VisualLayout) -> list[int]:
    """j * block + t for token t of image slot j, for each token of a tiled picture, in order; slot: its first slot.

    First the whole picture without newlines, then the large map with a newline after each line, then the task tokens of
    the whole picture. If the layout says `unpad`, padding is left out of both.
    """
    tokens, side = layout.tokens, layout.tokens.grid
    rows, columns = (n * side for n in grid)
    row, column = np.indices((rows, columns))
    tile = row // side * grid[1] + column // side
    inside = row % side * tokens.columns + column % side
    large = (slot + 1 + tile) * layout.block + inside
    left, top = tile_padding(size, grid, side) if tokens.unpad else (0, 0)
    kept = large[top : rows - top, left : columns - left]
    if tokens.newline:  # the one of the last tile of each line
        kept = np.concatenate([kept, large[top : rows - top, -1:] + 1], 1)
    start = slot * layout.block
    whole = start + inside[:side, :side]
    if tokens.unpad:
        whole = whole[token_mask(*layout.shape(size), side, False)]
    tasks = range(start + tokens.count, start + layout.block)
    return [*whole.ravel().tolist(), *kept.ravel().tolist(), *tasks]
