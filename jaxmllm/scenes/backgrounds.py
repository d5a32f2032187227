"""What stands behind the sprites of a scene: textures made from random numbers, or pieces of photographs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

# (rng, height, width, darkest, brightest) -> uint8 [height, width, 3]
Surface = Callable[[np.random.Generator, int, int, int, int], np.ndarray]

PHOTO_SPLITS = ("train", "heldout")  # folders of photographs: behind training scenes, and behind all others
SUFFIXES = (".jpg", ".jpeg", ".png")
SHARES = (0.5, 1.0)  # side of a piece, of the largest that the photograph has


def texture(rng: np.random.Generator, height: int, width: int, low: int, high: int) -> np.ndarray:
    """A mid-tone background, uint8 [height, width, 3]: blotches and grain around a colour in [low, high)."""
    cells, spread, grain = int(rng.choice((2, 3, 5, 9))), int(rng.integers(8, 36)), int(rng.integers(1, 9))
    grid = rng.integers(low, high, 3) + rng.integers(-spread, spread + 1, (cells, cells, 3))
    smooth = Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-grain, grain + 1, (height, width, 1), np.int16)
    return np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)


def photographs(paths: Sequence[Path]) -> Surface:
    """A surface of random pieces of photographs, half of them mirrored. Their brightness stays as it is."""

    def piece(rng: np.random.Generator, height: int, width: int, low: int, high: int) -> np.ndarray:
        photo = _open(paths[rng.integers(len(paths))])
        scale = rng.uniform(*SHARES) * min(photo.width / width, photo.height / height)
        w, h = max(1, int(scale * width)), max(1, int(scale * height))
        left, top = (int(rng.integers(room + 1)) for room in (photo.width - w, photo.height - h))
        found = photo.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
        return np.asarray(found)[:, :: 1 if rng.integers(2) else -1]

    return piece


def photo_paths(folder: str | Path, split: str) -> tuple[Path, ...]:
    """The photographs that scenes of a split may have: those of FOLDER/train, or FOLDER/heldout for other splits.

    Raises ValueError if there are none.
    """
    place = Path(folder) / (split if split == "train" else "heldout")
    found = tuple(sorted(path for path in place.glob("*") if path.suffix.lower() in SUFFIXES))
    if not found:
        raise ValueError(f"no photographs ({', '.join(SUFFIXES)}) in {place}")
    return found


@cache
def _open(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")
