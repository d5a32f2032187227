"""Composed scenes: pictures of known objects, with the exact depth and instance of every pixel.

A scene is a background with a few sprites (`jaxmllm/assets/sprites.zip`), so every question about it has a known
answer: see questions.py. There are five kinds of layout:

    single     one large object
    count      up to nine small objects of two or three nouns, in a jittered 3 x 3 grid
    relation   two or three objects whose boxes do not overlap
    distance   three such objects, one of them an anchor with clearly different distances to the other two
    depth      two or three objects standing on a ground plane, some behind others

All but `depth` are flat: cards on a wall that faces the camera. Their depth map is 0 on the wall and `CARD_DEPTH` on
the cards. In a `depth` scene the map is nearness, proportional to 1 / distance: 0 at the horizon and in the sky, 1
where the ground meets the lower edge of the image. Ground at row y has nearness (y - horizon) / (size - horizon). An
object has the nearness of the ground under its foot, and a size in proportion to it.
"""

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations, pairwise, permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxmllm.scenes.backgrounds import Surface, texture

KINDS = ("count", "relation", "depth", "distance", "single")
CARD_DEPTH = 0.5
MIN_VISIBLE = 0.5  # share of an object's pixels; an answer about a hidden object would be true but could not be seen
MIN_NOUNS = 5  # up to three in the image, and two absent ones to ask about
SIZES = (48, 512)  # side of the smallest and the largest scene, in pixels

# Layouts are stated for a scene of this side and scaled to the size that is asked for.
_UNIT_SIDE = 96
_SPRITES = Path(__file__).resolve().parent.parent / "assets" / "sprites.zip"


@dataclass(frozen=True)
class Thing:
    """One object: its noun, its value in the depth map, and its box as if nothing covered it.

    `box` is (left, top, right, bottom) in pixels, right and bottom exclusive.
    """

    noun: str
    depth: float
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """The (x, y) centre of the box in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """A composed image and everything known about it.

    `image` uint8 [size, size, 3], RGB; `depth` float32 [size, size] in [0, 1], larger is nearer; `instances`
    uint8 [size, size], 0 for the background and k for `objects[k - 1]`; `kind` is one of `KINDS`.
    """

    kind: str
    image: np.ndarray
    depth: np.ndarray
    instances: np.ndarray
    objects: tuple[Thing, ...]


@cache
def plurals() -> dict[str, str]:
    """Every noun that has a sprite -> its plural."""
    return {noun: row["plural"] for noun, row in _catalogue().items()}


def compose(
    rng: np.random.Generator, nouns: Sequence[str], size: int, kind: str | None = None, surface: Surface = texture
) -> Scene:
    """Draw one scene.

    Args:
      rng: the only source of randomness; the same state gives the same scene.
      nouns: what may appear, each with equal probability; at least `MIN_NOUNS`, all in `plurals()`.
      size: side of the image in pixels, within `SIZES`. Above about 160 the 96-pixel sprites look blurred.
      kind: one of `KINDS`, drawn uniformly if None.
      surface: makes what stands behind the objects.

    Raises:
      ValueError: an argument is not as stated here.
    """
    if len(set(nouns)) < MIN_NOUNS:
        raise ValueError(f"a scene needs at least {MIN_NOUNS} different nouns to choose from, not {len(set(nouns))}")
    if unknown := sorted(set(nouns) - plurals().keys()):
        raise ValueError(f"there is no sprite of {', '.join(unknown)}; scenes.compose.plurals() lists the nouns")
    if not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"size must be {SIZES[0]} to {SIZES[1]} pixels, not {size}")
    if kind is None:
        kind = KINDS[rng.integers(len(KINDS))]
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind}")
    if kind == "depth":
        return _ground_scene(rng, nouns, size, surface)
    image = Image.fromarray(surface(rng, size, size, 80, 176))
    return _paint(kind, image, np.zeros((size, size), np.float32), _FLAT[kind](rng, nouns, size))


def apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int], axis: int) -> bool:
    """Whether two boxes share no column (axis 0) or no row (axis 1), so that one lies entirely to one side."""
    return a[axis + 2] <= b[axis] or b[axis + 2] <= a[axis]


def nearer_of(anchor: Thing, first: Thing, second: Thing) -> Thing | None:
    """The one of two objects that is nearer to the anchor in the image plane; None if the distances are too similar."""
    to_first, to_second = (np.hypot(*np.subtract(thing.centre, anchor.centre)) for thing in (first, second))
    if max(to_first, to_second) < 1.4 * min(to_first, to_second):
        return None
    return first if to_first < to_second else second


# --- sprites ----------------------------------------------------------------------------------------------


class _Sprite(NamedTuple):
    image: Image.Image  # RGBA
    mask: np.ndarray  # bool [height, width]: at least half opaque


class _Placed(NamedTuple):
    noun: str
    sprite: _Sprite
    left: int
    top: int
    depth: float

    @property
    def box(self) -> tuple[int, int, int, int]:
        height, width = self.sprite.mask.shape
        return self.left, self.top, self.left + width, self.top + height


@cache
def _catalogue() -> dict[str, dict[str, str]]:
    with zipfile.ZipFile(_SPRITES) as pack:
        return {row["noun"]: row for row in json.loads(pack.read("names.json"))}


@cache
def _original(noun: str) -> Image.Image:
    """The sprite of a noun without its transparent margin."""
    with zipfile.ZipFile(_SPRITES) as pack:
        sprite = Image.open(io.BytesIO(pack.read(f"{_catalogue()[noun]['hexcode']}.webp"))).convert("RGBA")
    return sprite.crop(sprite.getchannel("A").point(lambda alpha: alpha >= 128 and 255).getbbox())


@lru_cache(maxsize=4096)
def _resized(noun: str, side: int, mirrored: bool) -> _Sprite:
    """The sprite with its longer side `side` pixels."""
    image = _original(noun)
    scale = side / max(image.size)
    image = image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.LANCZOS)
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _Sprite(image, np.asarray(image.getchannel("A")) >= 128)


def _sprite(rng: np.random.Generator, noun: str, side: float) -> _Sprite:
    return _resized(noun, round(side), bool(rng.integers(2)))


# --- flat layouts -----------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, nouns: Sequence[str], count: int) -> list[str]:
    return [nouns[i] for i in rng.choice(len(nouns), count, replace=False)]


def _scatter(rng: np.random.Generator, nouns: list[str], size: int, low: float, high: float) -> list[_Placed]:
    """One object of each noun, with sides in [low, high) pixels, at random places where their boxes do not overlap."""
    while True:
        sprites = [
            _sprite(rng, noun, side) for noun, side in zip(nouns, rng.uniform(low, high, len(nouns)), strict=True)
        ]
        corners = rng.random((len(nouns), 2))
        placed = []
        for noun, sprite, (x, y) in zip(nouns, sprites, corners, strict=True):
            height, width = sprite.mask.shape
            placed.append(_Placed(noun, sprite, int(x * (size - width + 1)), int(y * (size - height + 1)), CARD_DEPTH))
        if all(apart(a.box, b.box, 0) or apart(a.box, b.box, 1) for a, b in combinations(placed, 2)):
            return placed


def _single(rng: np.random.Generator, nouns: Sequence[str], size: int) -> list[_Placed]:
    unit = size / _UNIT_SIDE
    return _scatter(rng, _pick(rng, nouns, 1), size, 34 * unit, 62 * unit)


def _relation(rng: np.random.Generator, nouns: Sequence[str], size: int) -> list[_Placed]:
    unit = size / _UNIT_SIDE
    return _scatter(rng, _pick(rng, nouns, 2 + int(rng.integers(2))), size, 27 * unit, 41 * unit)


def _distance(rng: np.random.Generator, nouns: Sequence[str], size: int) -> list[_Placed]:
    unit = size / _UNIT_SIDE
    chosen = _pick(rng, nouns, 3)
    while True:
        placed = _scatter(rng, chosen, size, 27 * unit, 37 * unit)
        things = [Thing(p.noun, p.depth, p.box) for p in placed]
        if any(nearer_of(*order) for order in permutations(things)):
            return placed


def _count(rng: np.random.Generator, nouns: Sequence[str], size: int) -> list[_Placed]:
    """One to four objects of each of two nouns, and in half of the scenes one object of a third noun."""
    first, second, third = _pick(rng, nouns, 3)
    crowd = [first] * int(rng.integers(1, 5)) + [second] * int(rng.integers(1, 5)) + [third] * int(rng.integers(2))
    pitch = size / 3
    placed = []
    for noun, cell in zip(crowd, rng.permutation(9), strict=False):
        sprite = _sprite(rng, noun, rng.uniform(0.8, 0.95) * pitch)
        x, y = rng.random(2)
        height, width = sprite.mask.shape
        left, top = (cell % 3) * pitch + x * (pitch - width), (cell // 3) * pitch + y * (pitch - height)
        placed.append(_Placed(noun, sprite, int(left), int(top), CARD_DEPTH))
    return placed


_FLAT: dict[str, Callable[[np.random.Generator, Sequence[str], int], list[_Placed]]] = {
    "single": _single,
    "count": _count,
    "relation": _relation,
    "distance": _distance,
}


# --- the ground plane -------------------------------------------------------------------------------------


def _ground_scene(rng: np.random.Generator, nouns: Sequence[str], size: int, surface: Surface) -> Scene:
    """Objects on a ground plane under a horizon; their nearness, and so their size, differs by at least a fifth."""
    horizon = int(rng.uniform(0.2, 0.4) * size)
    ground = size - horizon
    picture = np.concatenate([surface(rng, horizon, size, 120, 200), surface(rng, ground, size, 60, 150)])
    backdrop = np.zeros((size, size), np.float32)
    backdrop[horizon:] = (np.arange(ground, dtype=np.float32)[:, None] + 0.5) / ground
    chosen = _pick(rng, nouns, 2 + int(rng.integers(2)))
    while True:
        depths = np.sort(rng.uniform(0.45, 1.0, len(chosen)))
        feet = [horizon + round(depth * ground) for depth in depths]  # row of the lower edge, exclusive
        depths = [(foot - horizon) / ground for foot in feet]
        if any(near < 1.2 * far for far, near in pairwise(depths)):
            continue
        placed = []
        for noun, depth, foot in zip(chosen, depths, feet, strict=True):
            sprite = _sprite(rng, noun, 0.62 * depth * size)
            height, width = sprite.mask.shape
            placed.append(_Placed(noun, sprite, int(rng.integers(size - width + 1)), foot - height, depth))
        seen = np.bincount(_instances(placed, size).ravel(), minlength=len(placed) + 1)[1:]
        if all(count >= MIN_VISIBLE * p.sprite.mask.sum() for count, p in zip(seen, placed, strict=True)):
            return _paint("depth", Image.fromarray(picture), backdrop, placed)


# --- pixels -----------------------------------------------------------------------------------------------


def _instances(placed: list[_Placed], size: int) -> np.ndarray:
    """uint8 [size, size]: k where the k-th object is seen, 0 for the background; later objects hide earlier ones."""
    instances = np.zeros((size, size), np.uint8)
    for k, p in enumerate(placed, start=1):
        left, top, right, bottom = p.box
        instances[top:bottom, left:right][p.sprite.mask] = k
    return instances


def _paint(kind: str, image: Image.Image, depth: np.ndarray, placed: list[_Placed]) -> Scene:
    """Paint the objects in the order given, from far to near; `image` and `depth` are changed in place."""
    instances = _instances(placed, len(depth))
    for k, p in enumerate(placed, start=1):
        image.paste(p.sprite.image, p.box[:2], p.sprite.image)
        depth[instances == k] = p.depth
    things = tuple(Thing(p.noun, p.depth, p.box) for p in placed)
    return Scene(kind, np.asarray(image), depth, instances, things)
