"""The whole model on one page: encoders -> fusers -> aggregator -> language model -> objectives.

    images uint8[B, I, px, px, 3] -> taps [taps, N, h, w, C] -> FeatureMap [N, h, w, C] -> visual tokens [N, P, H]
    -> hidden states [B, S, H] (+ those of the layers an objective reads) -> losses

Each part is a value in the config; only this file joins them.
"""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.batch import IGNORE_LABEL, Batch, MapShape, Term, TokenLayout, Visual, VisualLayout
from jaxmllm.nn import inverse_gather
from jaxmllm.objectives.next_token import next_token
from jaxmllm.objectives.task_tokens import task_places


class MLLM(nn.Module):
    """A multimodal language model.

    encoders, fusers: encoder name -> part, with the same names in the same order. distill: teacher name ->
    EmbedDistill; their task tokens follow the aggregator's tokens in this order. Without encoders there is no
    aggregator, and the model is a plain language model. Raises ValueError, in one line, if the parts do not fit
    together.
    """

    encoders: dict[str, nn.Module]
    fusers: dict[str, nn.Module]
    aggregator: nn.Module | None
    llm: nn.Module
    distill: dict[str, nn.Module]
    vocab_chunk: int = 32768  # entries of the vocabulary whose logits are made at a time

    def __post_init__(self):
        # Linen shares the weights of one object given for several encoders; here each encoder gets its own fuser.
        self.fusers = {name: fuser.clone() for name, fuser in self.fusers.items()}
        super().__post_init__()
        if list(self.encoders) != list(self.fusers):
            raise ValueError(f"encoders {list(self.encoders)} and fusers {list(self.fusers)} must have the same names")
        if (self.aggregator is None) != (not self.encoders) or (self.distill and not self.encoders):
            raise ValueError(
                "encoders need an aggregator; without encoders there can be neither aggregator nor distill"
            )
        if not self.encoders:
            return
        tokens, who = self.layout.tokens, type(self.aggregator).__name__
        if tokens.width != self.llm.width:
            raise ValueError(f"{who} makes tokens of width {tokens.width}, but the language model has {self.llm.width}")
        if self.llm.inserts and not tokens.memory:
            raise ValueError(
                f"{who} has no windows on a grid of {tokens.grid} for layers inside the language model; "
                "use SVA with encoder grids that are multiples of that grid, or no inserts"
            )
        for name, teacher in self.distill.items():
            if teacher.aligned and teacher.queries != tokens.grid**2:
                cells = f"{teacher.queries} queries need a cell each, and {who} has {tokens.grid**2} cells"
                raise ValueError(f"teacher {name!r} is aligned: its {cells}; change one, or set aligned=False")

    @property
    def layout(self) -> VisualLayout:
        """What the data pipeline must know about the visual path.

        Raises ValueError if its parts do not fit together.
        """
        if not self.encoders:
            return VisualLayout({}, TokenLayout(self.llm.width), 0)
        inputs = {name: encoder.input for name, encoder in self.encoders.items()}
        maps = {name: self.map_shape(name, inputs[name].grid) for name in self.encoders}
        tasks = sum(teacher.tokens for teacher in self.distill.values())
        return VisualLayout(inputs, self.aggregator.layout(maps), tasks)

    def map_shape(self, name: str, grid: int) -> MapShape:
        """Size of an encoder's fused map, which must be grid x grid: the padding of pictures is counted in its
        cells."""
        try:
            shape = self.fusers[name].output(self.encoders[name].maps)
        except ValueError as error:
            raise ValueError(f"encoder {name!r}: {error}") from None
        if shape[:2] != (grid, grid):
            raise ValueError(f"encoder {name!r}: its fused map is {shape.h} x {shape.w}, its grid {grid} x {grid}")
        return shape

    @property
    def target_shapes(self) -> dict[str, tuple[int, int]]:
        """Teacher name -> (queries, dim) of its target."""
        return {name: (teacher.queries, teacher.dim) for name, teacher in self.distill.items()}

    def visual(self, batch: Batch) -> tuple[jax.Array, Visual]:
        """Encoders, fusers, aggregator -> (visual tokens [B, I * block, H], what layers inside the LLM need)."""
        layout, (b, slots) = self.layout, batch.visual_positions.shape[:2]
        maps, masks = {}, {}
        for name, encoder in self.encoders.items():
            with jax.named_scope(f"encoder_{name}"):
                images = batch.images[name]
                taps = encoder(sharded.reshape(images, b * slots, *images.shape[2:]))
            with jax.named_scope(f"fuser_{name}"):
                maps[name] = self.fusers[name](taps)
            pad = sharded.reshape(batch.padding[name], b * slots, 2)
            masks[name] = content_mask(pad, layout.encoders[name].grid)
        with jax.named_scope("aggregator"):
            tokens = self.aggregator(maps, masks)
        block = tokens.tokens
        chex.assert_shape(block, (b * slots, layout.tokens.count, layout.tokens.width))
        if self.distill:
            tasks = jnp.concatenate([teacher.task_tokens() for teacher in self.distill.values()]).astype(block.dtype)
            block = jnp.concatenate([block, sharded.repeat_rows(tasks, block.shape[0])], 1)
        block = sharded.reshape(block, b, slots * layout.block, block.shape[-1])
        grid, columns = layout.tokens.grid, layout.tokens.columns
        return block, Visual(tokens.memory, batch.visual_positions, batch.visual_index, grid, columns)

    def hidden(self, batch: Batch, taps: tuple[int, ...] = (), cache: Any = None):
        """-> (states after the final norm [B, S, H], {tap: states}, cache)."""
        visual = None
        if self.encoders:
            block, visual = self.visual(batch)
        with jax.named_scope("llm"):
            x = self.llm.embed(batch.tokens)
            if visual is not None:
                places = sharded.reshape(batch.visual_positions, *block.shape[:2])
                x = inverse_gather.replace(x, block, places, batch.visual_index)
                visual = visual if visual.memory is not None else None
            return self.llm(x, batch.positions, batch.segment_ids, visual, taps, cache)

    def __call__(self, batch: Batch, losses: tuple[str, ...]) -> tuple[dict[str, Term], dict[str, Term]]:
        """-> (unreduced losses of the named objectives: "next_token" and teachers, metrics: next-token accuracy)."""
        teachers = {name: self.distill[name] for name in self.distill if name in losses}
        taps = tuple(sorted({layer for teacher in teachers.values() for layer in teacher.layers}))
        states, tapped, _ = self.hidden(batch, taps)
        terms, metrics = {}, {}
        if "next_token" in losses:
            with jax.named_scope("next_token"):
                chunk = self.vocab_chunk
                terms["next_token"], hit = next_token(states, self.llm.output_table(), batch.labels, chunk)
                metrics["accuracy"] = Term(hit.astype(jnp.float32), terms["next_token"].mask)
        for name, teacher in teachers.items():
            with jax.named_scope(f"distill_{name}"):
                places = task_places(batch, self.layout, *self.task_range(name))
                terms[name] = teacher.loss(tapped, places, batch.targets[name], batch.target_mask[name])
        return terms, metrics

    def counts(self, batch: Batch) -> dict[str, jax.Array]:
        """The number of values that each loss averages over: answer tokens, images with a target. int32 scalars."""
        return {"next_token": (batch.labels != IGNORE_LABEL).sum()} | {k: m.sum() for k, m in batch.target_mask.items()}

    def task_range(self, name: str) -> tuple[int, int]:
        """(start, count) of a teacher's task tokens in the visual block of an image."""
        names = list(self.distill)
        before = sum(self.distill[other].tokens for other in names[: names.index(name)])
        return self.layout.tokens.count + before, self.distill[name].tokens


def content_mask(padding: jax.Array, grid: int) -> jax.Array:
    """int32[N, 2] (columns and rows of padding on each side) -> bool[N, grid, grid], True where the picture is."""
    at = jnp.arange(grid)
    inside = (at >= padding[..., None]) & (at < grid - padding[..., None])  # [N, 2, grid]
    return inside[:, 1, :, None] & inside[:, 0, None, :]
