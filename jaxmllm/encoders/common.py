"""What all encoders share: preparation and normalisation of pictures, and the sizes of maps."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm import sharded
from jaxmllm.batch import EncoderInput, MapShape
from jaxmllm.fields import Positive
from jaxmllm.nn.maps import resize

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


class Encoder(nn.Module, kw_only=True):
    """uint8[N, size, size, 3] -> maps [taps, N, side, side, C]. Subclasses have a field `size`, the pixels per side.

    mean, std: of pixels in 0..1. pad_color, fit, edge, filter: see EncoderInput. resize: side of the returned maps, in
    float32, bilinear, without antialias as in Cambrian-1; None keeps the encoder's own grid.
    """

    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    pad_color: tuple[int, int, int] | None = None  # None: int(255 * mean)
    fit: str = "pad"
    edge: Positive | None = None
    filter: str = "bicubic"
    resize: Positive | None = None
    remat: str = "full"
    unroll: int | bool = 1

    @property
    def grid(self) -> int:
        """Side of the maps before `resize`."""
        raise NotImplementedError

    @property
    def side(self) -> int:
        """Side of the returned maps."""
        return self.resize or self.grid

    @property
    def maps(self) -> tuple[MapShape, ...]:
        """Size of each returned map."""
        raise NotImplementedError

    @property
    def input(self) -> EncoderInput:
        """How pictures are prepared for this encoder."""
        color = self.pad_color or tuple(int(255 * m) for m in self.mean)
        return EncoderInput(self.size, self.side, color, self.fit, self.edge, self.filter)

    def normalise(self, images: jax.Array) -> jax.Array:
        """uint8[N, h, w, 3] -> normalised pixels in the compute dtype.

        That is the dtype of the weights, which the train step may have cast.
        """
        params = self.variables.get("params", {})
        dtype = jax.tree.leaves(params)[0].dtype if params else jnp.float32
        x = (images.astype(jnp.float32) / 255 - jnp.array(self.mean)) / jnp.array(self.std)
        return x.astype(dtype)


class Pyramid(Encoder, kw_only=True):
    """An encoder whose stages have maps of different sizes.

    The tapped maps are resized to one side and concatenated along channels to a single map [1, N, side, side, C], as
    Cambrian-1 does with ConvNeXt. taps: 0 = after the stem, i = after stage i. Stages after the last tap are not built.
    """

    def __post_init__(self):
        super().__post_init__()
        stages, name = len(self.pyramid) - 1, type(self).__name__
        if not self.taps or min(self.taps) < 0 or max(self.taps) > stages:
            raise ValueError(f"{name}: taps {self.taps} must lie in 0..{stages} (0 = after the stem)")
        sides = [self.pyramid[t].h for t in self.taps]
        if not self.resize and len(set(sides)) > 1:
            raise ValueError(
                f"{name}: taps {self.taps} have maps of sides {sides}; set `resize` to the side that they should have"
            )

    @property
    def pyramid(self) -> tuple[MapShape, ...]:
        """Size of the map after the stem and after each stage."""
        raise NotImplementedError

    @property
    def grid(self) -> int:
        return self.pyramid[self.taps[0]].h

    @property
    def maps(self) -> tuple[MapShape, ...]:
        return (MapShape(self.side, self.side, sum(self.pyramid[t].c for t in self.taps)),)

    def as_map(self, x: jax.Array, i: int) -> jax.Array:
        """Cells [N, h*w, C] after stage i -> [N, h, w, C]."""
        return sharded.reshape(x, x.shape[0], *self.pyramid[i][:2], x.shape[-1])

    def joined(self, maps: Sequence[jax.Array]) -> jax.Array:
        """Maps [N, h, w, C] -> [1, N, side, side, sum of C]."""
        return jnp.concatenate([resize(m, self.side, self.side) for m in maps], -1)[None]


# How the references resample a table of positions: (a of the cubic kernel or None for bilinear, antialias, offset)
INTERPOLATIONS = {
    "bicubic": (-0.75, False, 0.0),  # transformers' Dinov2Model and CLIPVisionModel
    "bicubic_offset": (-0.75, False, 0.1),  # DINOv2's own code, Depth-Anything-V2, transformers up to 4.4x
    "bicubic_antialias": (-0.5, True, 0.0),  # DINOv2 with registers
    "bilinear": (None, False, 0.0),  # torch's plain one, with which Cambrian-1 resizes maps
    "bilinear_antialias": (None, True, 0.0),  # SigLIP2 NaFlex
}


def resample_table(table: jax.Array, side: int, kind: str) -> jax.Array:
    """Positions [old, old, C] -> [side, side, C] as torch.nn.functional.interpolate(align_corners=False) does.

    kind: a name in INTERPOLATIONS. With an offset the step is old / (side + offset) instead of old / side.
    """
    weights = jnp.asarray(interpolation_matrix(table.shape[0], side, kind))
    x = jnp.einsum("ai,ijc->ajc", weights, table.astype(jnp.float32), precision="highest")
    return jnp.einsum("bj,ajc->abc", weights, x, precision="highest").astype(table.dtype)


def interpolation_matrix(old: int, new: int, kind: str) -> np.ndarray:
    """The weights of resampling along one dimension, float32[new, old].

    torch's plain bicubic has a = -0.75 and repeats the border. Its antialiased filters have a = -0.5, widen when the
    size shrinks, and renormalise at the border.
    """
    a, antialias, offset = INTERPOLATIONS[kind]
    step = old / (new + offset)
    stretch = max(step, 1.0) if antialias else 1.0
    # torch rounds the step and the centre to float32; at 37 samples that changes the result by 1e-5.
    centre = ((np.arange(new) + 0.5) * np.float64(np.float32(step)) - 0.5).astype(np.float32)[:, None]
    reach = int(np.ceil((1 if a is None else 2) * stretch))
    at = np.floor(centre).astype(int) + np.arange(-reach, reach + 2)
    d = np.abs(at - centre.astype(np.float64)) / stretch
    if a is None:
        weight = np.maximum(1 - d, 0)
    else:  # Keys 1981
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        weight = np.where(d < 1, near, np.where(d < 2, far, 0))
    if antialias:
        weight = weight * ((at >= 0) & (at < old))
        weight /= weight.sum(1, keepdims=True)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], at.clip(0, old - 1)), weight)
    return matrix.astype(np.float32)
