"""What an objective is: it names what it needs, and turns hidden states into an unreduced loss.

Another objective is one more file with a subclass of Objective, and one more entry of the model's `objectives`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax

from jaxmllm.batch import Batch, Term, VisualLayout


@dataclasses.dataclass(frozen=True)
class ModelView:
    """What an objective may read of a forward pass."""

    name: str  # the objective's own name in the model
    batch: Batch
    layout: VisualLayout
    first_task_token: int  # place of the objective's task tokens in the visual block of an image
    visual: jax.Array | None  # [B, I * block, H], visual tokens as the connector makes them; None without encoders
    states: jax.Array  # [B, S, H], after the final norm
    tapped: dict[int, jax.Array]  # layer -> states [B, S, H], for the layers that the objective names
    output_table: jax.Array  # [V, H] and perhaps rows of padding, as it is stored
    vocab: int  # V
    logit_cap: float | None = None  # logits = soft_cap(states @ output_table.T, logit_cap)


class Needs(NamedTuple):
    """What an objective needs of the model and the data."""

    layers: tuple[int, ...] = ()  # decoder layers whose states it reads, 1-based as Decoder's taps
    tokens: int = 0  # learned task tokens that follow each image
    target: tuple[int, int] | None = None  # (queries, dim) of each image's target, provided under the objective's name


class Objective(nn.Module):
    """The base of all objectives; subclasses override what differs."""

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def has_loss(self) -> bool:
        """Whether a stage may weigh it in `losses`."""
        return True

    def check(self, name: str, layout: VisualLayout) -> None:
        """Raises ValueError if the objective does not fit the visual path."""

    def task_tokens(self, width: int) -> jax.Array:
        """The task tokens [tokens, H]; width: H."""
        raise NotImplementedError

    def count(self, name: str, batch: Batch) -> jax.Array:
        """int32 scalar: the number of values that the loss averages over; by default, of images with a target."""
        return batch.target_mask[name].sum()

    def __call__(self, view: ModelView) -> tuple[Term, dict[str, Term]]:
        """-> (unreduced loss, metrics by name)."""
        raise NotImplementedError
