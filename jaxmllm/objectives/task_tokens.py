"""Where the task tokens of an embedding objective stand in a packed row, and what its predictors may read."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.batch import Batch, VisualLayout


class TaskPlaces(NamedTuple):
    """For each image slot of a batch; places are positions in the row, -1 for none."""

    visible: jax.Array  # bool[B, I, S]; the tokens that the teacher's predictors may read
    tokens: jax.Array  # int32[B, I, tokens]; the teacher's task tokens
    cells: jax.Array  # int32[B, I, L*L]; the cells of the image (of several tokens, the first); padding has none


def task_places(batch: Batch, layout: VisualLayout, start: int, count: int) -> TaskPlaces:
    """The places of a teacher whose `count` task tokens begin at `start` in the visual block of each image.

    A predictor reads the image's own sample, except the task tokens of other teachers.
    """
    grid, columns, per_cell = layout.tokens.grid, layout.tokens.columns, layout.tokens.per_cell
    token = jnp.where(batch.visual_index >= 0, batch.visual_index % layout.block, -1)
    others = (token >= layout.tokens.count) & ((token < start) | (token >= start + count))
    at = batch.visual_positions
    b, slots, _ = at.shape
    cells = sharded.reshape(at[:, :, : grid * columns], b, slots, grid, columns)
    cells = sharded.reshape(cells[..., : grid * per_cell : per_cell], b, slots, grid**2)
    segments = sharded.shard(batch.segment_ids, "batch", None)
    # [B, I, 1]: the sample that each image belongs to.
    own = sharded.take_rows(segments[..., None], jnp.maximum(at[:, :, start], 0))
    same_sample = (segments[:, None] == own) & (segments > 0)[:, None]
    visible = same_sample & ~sharded.shard(others, "batch", None)[:, None]
    return TaskPlaces(visible, at[:, :, start : start + count], cells)
