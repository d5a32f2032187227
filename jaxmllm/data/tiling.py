"""Any resolution (LLaVA-NeXT, Liu et al. 2024): a picture is seen whole, and again in tiles of the encoder's size.

whole picture      its grid of tiles, here 2 x 2, padded black in the middle of its cells
+----+             +----+----+
|    |             | 1  | 2  |     Every view takes an image slot of the row, so shapes stay static and encoders,
| 0  |             +----+----+     fusers and aggregators know nothing of tiles. The tokens of the tiles stand in
+----+             | 3  | 4  |     the row as one large map, line by line across tiles, which is only a matter of
                   +----+----+     which token stands where.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxmllm.batch import VisualLayout
from jaxmllm.data.images import token_mask


@dataclasses.dataclass(frozen=True)
class Tiling:
    """grids: (rows, columns) a picture may be cut into; tile: pixels of a tile's side, when the grid is chosen.

    The defaults are LLaVA-NeXT's; its whole picture is squashed (fit="squash" of the encoder).
    """

    grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    tile: int = 336

    @property
    def slots(self) -> int:
        """Image slots that one picture may take: the budget."""
        return 1 + max(rows * columns for rows, columns in self.grids)

    def choose(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) for a picture of (width, height): the grid that keeps most pixels, then wastes fewest.

        transformers' select_best_resolution; the first of equals.
        """
        width, height = size

        def score(grid: tuple[int, int]) -> tuple[int, int]:
            rows, columns = (side * self.tile for side in grid)
            scale = min(columns / width, rows / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - rows * columns

        return max(self.grids, key=score)


def unpadded(size: tuple[int, int], grid: tuple[int, int], side: int) -> tuple[int, int]:
    """(columns, rows) on each side of the large map that show only padding; side: of one tile's map.

    transformers' unpad_image.
    """
    (width, height), (rows, columns) = size, (n * side for n in grid)
    if width / height > columns / rows:
        return 0, (rows - int(round(height * (columns / width), 7))) // 2
    return (columns - int(round(width * (rows / height), 7))) // 2, 0


def tiled_places(slot: int, size: tuple[int, int], grid: tuple[int, int], layout: VisualLayout) -> list[int]:
    """j * T + t of the tokens of a tiled picture whose first image slot is j = `slot`.

    The whole picture without newlines; the large map, a newline behind each line; the whole picture's task tokens. If
    the layout says `unpad`, both without their padding.
    """
    tokens, side = layout.tokens, layout.tokens.grid
    rows, columns = (n * side for n in grid)
    row, column = np.indices((rows, columns))
    tile = row // side * grid[1] + column // side
    inside = row % side * tokens.columns + column % side
    large = (slot + 1 + tile) * layout.block + inside
    left, top = unpadded(size, grid, side) if tokens.unpad else (0, 0)
    kept = large[top : rows - top, left : columns - left]
    if tokens.newline:  # of the last tile in the line
        kept = np.concatenate([kept, large[top : rows - top, -1:] + 1], 1)
    start = slot * layout.block
    whole = start + inside[:side, :side]
    if tokens.unpad:
        whole = whole[token_mask(*layout.shape(size), side, False)]
    tasks = range(start + tokens.count, start + layout.block)
    return [*whole.ravel().tolist(), *kept.ravel().tolist(), *tasks]
