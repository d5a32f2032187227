"""Multimodal checkpoints in their authors' layouts: LLaVA-1.5, MMFuser, Dense Connector, MMVP, Cambrian-1, VisPer-LM.

Such a folder holds the language model, the connector, and task tokens and predictors; its config.json has fields that
start with "mm_". The encoder is mostly not in it and comes from a folder of its own. Which layout it is follows from
the parts of our model (key_map), whose recipe the user writes or takes from configs/.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.aggregators.mof import InterleavedMoF
from jaxmllm.aggregators.sva import SVA
from jaxmllm.config import part_of
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.hf_library import transformers
from jaxmllm.mllm import MLLM
from jaxmllm.nn.lora import is_adapter
from jaxmllm.objectives.embed_distill import EmbedDistill
from jaxmllm.weights import hf_decoders, key_maps
from jaxmllm.weights.convert import KeyMap, copy, misfits, unfilled
from jaxmllm.weights.exported import ExportedPart
from jaxmllm.weights.hf_config import differences, read_json
from jaxmllm.weights.layouts import encoder_makers
from jaxmllm.weights.load import Abstract, unequal
from jaxmllm.weights.safetensors import Folder, open_folder

BASES = ("mistral", "qwen2", "phi3")  # what a model_type such as "llava_qwen2" ends with; all others are Llama
TOWERS = ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_tower.")
# Where the keys of a part start, so that what is left over is named
PLACES = {
    "llm": ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."),
    "inserts": ("model.vision_sampler_layers.",),
    "connector": (
        "model.mm_projector", "model.dino_mm_projector", "model.vision_query", "model.image_newline",
        *(f"model.vision_sampler_{group}." for group in range(10)),
    ),
}  # fmt: skip


def is_released(folder: Path) -> bool:
    """Whether a folder's config.json is that of such a checkpoint. Raises ValueError if it cannot be read."""
    path = folder / "config.json"
    return path.is_file() and any(name.startswith("mm_") for name in read_json(path))


def key_map(model: MLLM) -> KeyMap:
    """The layout that a model with these parts has, without its encoders. Raises ValueError if there is none."""
    aggregator, fusers = model.aggregator, [type(fuser) for fuser in model.fusers.values()]
    if model.as_words:
        raise ValueError("no released checkpoint has visual tokens as words")
    if isinstance(aggregator, SVA):
        return key_maps.cambrian(model)
    if isinstance(aggregator, InterleavedMoF):
        return key_maps.mof_llava(model)
    if not isinstance(aggregator, MLPProjector) or len(fusers) != 1:
        raise ValueError(f"no released checkpoint has {len(fusers)} encoders and {type(aggregator).__name__}")
    if fusers == [MMFuser]:
        return key_maps.mmfuser_llava(model)
    distilled = any(isinstance(each, EmbedDistill) for each in model.objectives.values())
    keys = key_maps.visper(model) if distilled else key_maps.llava(model)
    return keys + copy("model.image_newline", "aggregator/newline/value") if aggregator.newline else keys


@dataclasses.dataclass(frozen=True)
class ReleasedSource:
    """A released checkpoint as a source of weights for a model."""

    name: str
    path: Path
    model: MLLM

    @functools.cached_property
    def folder(self) -> Folder:
        """The tensors. Raises ValueError."""
        return open_folder(self.path)

    @functools.cached_property
    def key_map(self) -> KeyMap:
        """Of the whole model without encoders. Raises ValueError."""
        return key_map(self.model)

    @functools.cached_property
    def text_config(self) -> Any:
        """The language model's fields, as transformers reads them. Raises ValueError."""
        raw = read_json(self.path / "config.json")
        base = next((name for name in BASES if str(raw.get("model_type")).endswith(name)), "llama")
        try:
            return transformers().AutoConfig.for_model(base, **{k: v for k, v in raw.items() if k != "model_type"})
        except Exception as error:  # a wrong value raises almost anything
            raise ValueError(f"{self.path / 'config.json'}: {' '.join(str(error).split())}") from None

    @property
    def fingerprint(self) -> str:
        """A hash of the names, sizes and headers of the files with the tensors."""
        return self.folder.fingerprint

    def part(self, name: str, module: Any, abstract: Abstract, length: int | None) -> ReleasedPart:
        """A part in the folder."""
        own = {path: x for path, x in abstract.items() if not is_adapter(path)}
        return ReleasedPart(self, name, own, module, length)


@dataclasses.dataclass(frozen=True)
class ReleasedPart(ExportedPart):
    """A part that is to be loaded from a released checkpoint."""

    module: Any = None
    length: int | None = None

    @functools.cached_property
    def key_map(self) -> KeyMap:
        """The part's entries; of an encoder, if the folder has one, those of its tower."""
        if self.name.startswith("encoders."):
            return self._tower()
        own = tuple(e for e in self.source.key_map.entries if part_of(e.path) == self.name)
        whole = self.source.key_map
        return dataclasses.replace(whole, entries=own) if self.name == "llm" else KeyMap(own)

    def _tower(self) -> KeyMap:
        shapes = {path: x.shape for path, x in self.abstract.items()}
        there = [prefix for prefix in TOWERS if any(key.startswith(prefix) for key in self.source.folder)]
        for prefix in there:
            for make in encoder_makers(self.module):
                keys = make(self.module).under(prefix, self.name.replace(".", "_") + "/")
                if not unfilled(keys, shapes):
                    return keys
        return KeyMap()

    def places(self) -> Collection[str]:
        """Where the keys of the part start."""
        if self.name.startswith("objectives."):
            task = self.name.removeprefix("objectives.")
            return f"model.special_{task}_tokens", f"{task}_logit_scale", f"image_{task}_heads."
        if self.name.startswith("encoders."):
            return TOWERS
        return PLACES.get(self.name, PLACES["connector"])

    def problems(self) -> list[str]:
        """Other sizes of the language model, or tensors that are missing, left over or of other shapes."""
        if not self.key_map.entries:
            parts = sorted({part_of(entry.path) for entry in self.source.key_map.entries})
            mend = f"; give init.{self.name} a folder of its own" if self.name.startswith("encoders.") else ""
            return [f"{self.source.name} has no {self.name}; it has {', '.join(parts)}{mend}"]
        if self.name == "llm":
            config = self.source.text_config
            sizes = differences(hf_decoders.decoder(config, self.length), self.module.clone(inserts=None))
            if sizes:
                return [f"{'; '.join(sizes)} ({self.source.name})"]
        others = {e.key for e in self.source.key_map.entries if part_of(e.path) != self.name}
        own = {e.key for e in self.key_map.entries}
        starts = tuple(self.places())
        near = {k: x for k, x in self.source.folder.items() if k in own or (k.startswith(starts) and k not in others)}
        return misfits(self.key_map, near, {path: x.shape for path, x in self.abstract.items()})

    def different_numbers(self) -> list[str]:
        """A second output table with other numbers, where the model has one table for both."""
        return unequal(self.key_map, self.source.folder)

    def stored_dtype(self, path: str) -> np.dtype:
        """The dtype in which the file has a parameter."""
        return self.source.folder[next(e.key for e in self.key_map.entries if e.path == path)].dtype
