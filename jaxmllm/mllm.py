"""The whole model on one page: encoders -> fusers -> aggregator -> language model -> objectives.

    images uint8[B, I, px, px, 3] -> taps [taps, N, h, w, C] -> FeatureMap [N, h, w, C] -> visual tokens [N, P, H]
    -> hidden states [B, S, H] (+ those of the layers an objective reads) -> losses

Each part is a value in the config; only this file joins them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.batch import Batch, MapShape, Term, TokenLayout, Visual, VisualLayout
from jaxmllm.nn import inverse_gather
from jaxmllm.objectives.base import ModelView

# Field -> what a part must have to stand there
NEEDED = {
    "encoders": ("input", "maps"), "fusers": ("output",), "aggregator": ("layout",),
    "llm": ("embed", "output_table"), "objectives": ("needs", "count"),
}  # fmt: skip


class MLLM(nn.Module):
    """A multimodal language model.

    encoders, fusers: encoder name -> part, with the same names in the same order. objectives: name -> Objective; their
    task tokens follow the aggregator's tokens in this order. Without encoders there is no aggregator, and the model is
    a plain language model. as_words: the language model reads the aggregator's tokens as mixtures of its own words
    (Decoder.as_words). Raises ValueError, in one line, if the parts do not fit together.
    """

    encoders: dict[str, nn.Module]
    fusers: dict[str, nn.Module]
    aggregator: nn.Module | None
    llm: nn.Module
    objectives: dict[str, nn.Module]
    as_words: bool = False

    def __post_init__(self):
        # Linen shares the weights of one object given for several encoders; here each encoder gets its own fuser.
        self.fusers = {name: fuser.clone() for name, fuser in self.fusers.items()}
        super().__post_init__()
        check_kinds(self)
        if list(self.encoders) != list(self.fusers):
            raise ValueError(f"encoders {list(self.encoders)} and fusers {list(self.fusers)} must have the same names")
        if (self.aggregator is None) != (not self.encoders):
            raise ValueError("encoders need an aggregator, and without encoders there can be none")
        layout, taps = self.layout, [layer for each in self.objectives.values() for layer in each.needs.layers]
        if taps and not 1 <= min(taps) <= max(taps) <= self.llm.layers:
            raise ValueError(f"objectives read the layers {sorted(set(taps))}, and the model has 1..{self.llm.layers}")
        for name, objective in self.objectives.items():
            if objective.needs.target and not self.encoders:
                raise ValueError(f"objective {name!r} has targets for images, and the model has no encoder")
            objective.check(name, layout)
        if self.encoders and self.llm.inserts and not layout.tokens.memory:
            raise ValueError(
                f"{type(self.aggregator).__name__} has no windows on a grid of {layout.tokens.grid} for layers inside "
                "the language model; use SVA with encoder grids that are multiples of that grid, or no inserts"
            )

    @property
    def layout(self) -> VisualLayout:
        """What the data pipeline must know about the visual path. Raises ValueError if its parts do not fit."""
        if not self.encoders:
            return VisualLayout({}, TokenLayout(), 0)
        inputs = {name: encoder.input for name, encoder in self.encoders.items()}
        maps = {name: self.map_shape(name, inputs[name].grid) for name in self.encoders}
        task_tokens = sum(objective.needs.tokens for objective in self.objectives.values())
        return VisualLayout(inputs, self.aggregator.layout(maps), task_tokens)

    def map_shape(self, name: str, grid: int) -> MapShape:
        """Size of an encoder's fused map, which must be grid x grid: padding is counted in its cells."""
        try:
            shape = self.fusers[name].output(self.encoders[name].maps)
        except ValueError as error:
            raise ValueError(f"encoder {name!r}: {error}") from None
        if shape[:2] != (grid, grid):
            raise ValueError(f"encoder {name!r}: its fused map is {shape.h} x {shape.w}, its grid {grid} x {grid}")
        return shape

    @property
    def target_shapes(self) -> dict[str, tuple[int, int]]:
        """Objective -> (queries, dim) of its target for an image, for those that have one."""
        return {name: each.needs.target for name, each in self.objectives.items() if each.needs.target}

    def visual(self, batch: Batch) -> tuple[jax.Array, Visual]:
        """Encoders, fusers, aggregator -> (visual tokens [B, I * block, H], what layers inside the LLM need)."""
        layout, (b, slots) = self.layout, batch.visual_positions.shape[:2]
        maps, masks, width = {}, {}, self.llm.width
        for name, encoder in self.encoders.items():
            with jax.named_scope(f"encoder_{name}"):
                images = batch.images[name]
                taps = encoder(sharded.reshape(images, b * slots, *images.shape[2:]))
            with jax.named_scope(f"fuser_{name}"):
                maps[name] = self.fusers[name](taps)
            pad = sharded.reshape(batch.padding[name], b * slots, 2)
            masks[name] = content_mask(pad, layout.encoders[name].grid)
        with jax.named_scope("aggregator"):
            tokens = self.aggregator(maps, masks, width)
        block = tokens.tokens
        chex.assert_shape(block, (b * slots, layout.tokens.count, width))
        if task_tokens := [each.task_tokens(width) for each in self.objectives.values() if each.needs.tokens]:
            tasks = jnp.concatenate(task_tokens).astype(block.dtype)
            block = jnp.concatenate([block, sharded.repeat_rows(tasks, block.shape[0])], 1)
        block = sharded.reshape(block, b, slots * layout.block, width)
        grid, columns = layout.tokens.grid, layout.tokens.columns
        return block, Visual(tokens.memory, batch.visual_positions, batch.visual_index, grid, columns)

    def hidden(self, batch: Batch, taps: tuple[int, ...] = (), cache: Any = None):
        """-> (states after the final norm [B, S, H], {tap: states}, cache, auxiliary values of the decoder's
        blocks)."""
        return self.decoded(batch, taps, cache)[1:]

    def in_words(self, block: jax.Array) -> jax.Array:
        """Visual tokens [B, I * block, H], those of the aggregator as words."""
        size, count = self.layout.block, self.layout.tokens.count
        images = sharded.reshape(block, block.shape[0] * block.shape[1] // size, size, block.shape[2])
        words = self.llm.as_words(images[:, :count])
        return sharded.reshape(jnp.concatenate([words, images[:, count:]], 1), *block.shape)

    def decoded(self, batch: Batch, taps: tuple[int, ...] = (), cache: Any = None):
        """-> (visual tokens [B, I * block, H] as the connector makes them, *what `hidden` returns)."""
        block = visual = None
        if self.encoders:
            block, visual = self.visual(batch)
        with jax.named_scope("llm"):
            x = self.llm.embed(batch.tokens)
            if visual is not None:
                places = sharded.reshape(batch.visual_positions, *block.shape[:2])
                read = self.in_words(block) if self.as_words else block
                x = inverse_gather.replace(x, read, places, batch.visual_index)
                visual = visual if visual.memory is not None else None
            return block, *self.llm(x, batch.positions, batch.segment_ids, visual, taps, cache)

    def __call__(self, batch: Batch, losses: tuple[str, ...]) -> tuple[dict[str, Term], dict[str, dict[str, Term]]]:
        """-> (unreduced losses of the named objectives and of blocks, {objective: {metric: values}})."""
        chosen = {name: each for name, each in self.objectives.items() if name in losses}
        taps = tuple(sorted({layer for each in chosen.values() for layer in each.needs.layers}))
        visual, states, tapped, _, aux = self.decoded(batch, taps)
        terms = {name: Term(aux[name], jnp.ones_like(aux[name], bool)) for name in self.llm.aux}
        metrics, layout, first = {}, self.layout, self.layout.tokens.count
        table, cap = self.llm.output_table(), self.llm.logit_cap
        for name, objective in self.objectives.items():
            if name in chosen:
                with jax.named_scope(name if name == "next_token" else f"objective_{name}"):
                    view = ModelView(name, batch, layout, first, visual, states, tapped, table, self.llm.vocab, cap)
                    terms[name], metrics[name] = objective(view)
            first += objective.needs.tokens
        return terms, metrics

    @property
    def loss_names(self) -> tuple[str, ...]:
        """What a stage may weigh in `losses`: the objectives, and the auxiliary losses of the decoder's blocks."""
        return *(name for name, each in self.objectives.items() if each.has_loss), *self.llm.aux

    def counts(self, batch: Batch, losses: tuple[str, ...]) -> dict[str, jax.Array]:
        """The number of values that each objective averages over. int32 scalars."""
        return {name: each.count(name, batch) for name, each in self.objectives.items() if name in losses}


def check_kinds(model: MLLM) -> None:
    """Raises ValueError for a part that stands where another kind belongs."""
    for field, names in NEEDED.items():
        value = getattr(model, field)
        parts = {f"{field}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {field: value}
        for place, part in parts.items():
            known = {*dir(type(part)), *getattr(type(part), "__dataclass_fields__", ())}
            if part is not None and (missing := [name for name in names if name not in known]):
                raise ValueError(f"{place}: {type(part).__name__} cannot stand here, for it has no {missing[0]}")


def content_mask(padding: jax.Array, grid: int) -> jax.Array:
    """int32[N, 2] (columns and rows of padding on each side) -> bool[N, grid, grid], True where the picture is."""
    at = jnp.arange(grid)
    inside = (at >= padding[..., None]) & (at < grid - padding[..., None])  # [N, 2, grid]
    return inside[:, 1, :, None] & inside[:, 0, None, :]
