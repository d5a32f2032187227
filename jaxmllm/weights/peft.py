"""Writes the adapters of a run as a folder that PEFT loads: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import collections
import json
import math
from typing import Any

import numpy as np

from jaxmllm.config import Run, part_of
from jaxmllm.errors import ConfigError
from jaxmllm.nn.lora import is_adapter
from jaxmllm.recipes import read_run
from jaxmllm.weights.convert import Entry, by_key
from jaxmllm.weights.export import Exported, abstract_of, chosen_layout, complete_folder, refuse_folder
from jaxmllm.weights.layouts import OWN
from jaxmllm.weights.safetensors import create_file
from jaxmllm.weights.workdir import open_workdir

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Modules of a LLaVA in its files -> in memory, where PEFT finds them
IN_MEMORY = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head": "lm_head",
    "vision_tower.vision_model.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def export_adapter(workdir: str, folder: str, *, part: str | None = None, config: str | None = None) -> Exported:
    """Exports the adapters of WORKDIR[/stage[/step]]. Arguments as in export.export.

    Raises ValueError or FileExistsError, in one line, also for a run without adapters, and for a model or a layer that
    transformers does not have.
    """
    refuse_folder(folder, part)
    source = open_workdir(f"run:{workdir}")
    run = read_run(str(source.workdir), config)
    abstract = abstract_of(run, part)
    own = {path: x for path, x in abstract.items() if is_adapter(path)}
    if not own:
        raise ConfigError(f"{workdir} has no adapters{' in its language model' if part else ''}; leave out --adapter")
    shapes = {path: x.shape for path, x in abstract.items() if not is_adapter(path)}
    layout = chosen_layout(run, part, shapes, 0)
    if layout.name == OWN:
        raise ConfigError(f"--adapter: transformers has no such model ({layout.why}); export the whole, merged")
    params = {k: np.asarray(x) for k, x in source.checkpoints.restore_params(own, source.step, average=True).items()}
    tensors, ranks, alphas = {}, {}, {}
    for key, entries in by_key(layout.key_map).items():
        if f"{entries[0].path.removesuffix('kernel')}lora_a" in params:
            module = in_memory(key.removesuffix(".weight"))
            a, b, alphas[module] = pair(entries, params)
            ranks[module] = len(a)
            tensors |= {f"base_model.model.{module}.lora_{x}.weight": y for x, y in (("A", a), ("B", b))}
    with complete_folder(folder) as made:
        places = create_file(made / TENSORS, {key: (x.shape, np.float32) for key, x in tensors.items()})
        for key, x in tensors.items():
            places[key][...] = x
        document = adapter_config(run, part, ranks, alphas)
        (made / CONFIG).write_text(json.dumps(document, indent=1))
    count = sum(math.prod(x.shape) for x in tensors.values())
    stored = {part_of(path) for path in source.checkpoints.trained(source.step) if not is_adapter(path)}
    notes = tuple(f"{name} was trained too, and is not in it; export the whole for that" for name in sorted(stored))
    return Exported(folder, source.name, f"PEFT adapter of {layout.name}", "", len(tensors), count, "float32", notes)


def in_memory(module: str) -> str:
    """The name of a module in a model that transformers has loaded."""
    for there, here in IN_MEMORY.items():
        if f"{module}.".startswith(there):
            return here + module.removeprefix(there)
    return module


def pair(entries: list[Entry], params: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
    """-> (lora_A [rank, in], lora_B [out, rank], alpha) of a layer. Raises ConfigError if it is no layer of its own."""
    entry, prefix = entries[0], entries[0].path.removesuffix("kernel")
    if len(entries) > 1 or not entry.transform.name.startswith("linear:"):
        what = "a convolution" if len(entries) == 1 else "joined with others"
        raise ConfigError(f"--adapter: {entry.key} is {what}, which PEFT cannot adapt so; export the whole, merged")
    a, b, alpha = (params[prefix + name][entry.index] for name in ("lora_a", "lora_b", "lora_alpha"))
    rank = a.shape[-1]
    return a.reshape(-1, rank).T, b.reshape(rank, -1).T, float(alpha)


def adapter_config(run: Run, part: str | None, ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """adapter_config.json. The most frequent rank and alpha are those of all modules that are not named beside them."""
    (rank, _), *_ = collections.Counter(ranks.values()).most_common()
    (alpha, _), *_ = collections.Counter(alphas.values()).most_common()
    sources = run.init.sources()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if part or not run.model.encoders else None,
        "base_model_name_or_path": sources.get("llm" if part else "rest", sources.get("llm", "")),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(each.dropout for each in run.lora),
        "target_modules": list(ranks),
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: x for module, x in alphas.items() if x != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
