"""Whether two models are the same: their outputs on the same random pictures and tokens, part by part, and hashes.

The outputs of a part depend on those of the parts before it, so the first part that differs is where to look.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm import host_batches, sharded
from jaxmllm.batch import Batch, empty_batch
from jaxmllm.config import part_of
from jaxmllm.errors import ConfigError
from jaxmllm.eval.verify_torch import IMAGE_TOKEN, transformers_forward
from jaxmllm.mesh import Mesh
from jaxmllm.mllm import MLLM
from jaxmllm.nn.primitives import soft_cap
from jaxmllm.train.state import Params, unflatten
from jaxmllm.weights.hf_config import read_config
from jaxmllm.weights.opened import Opened, abstract_model, is_released_folder, open_model, open_released
from jaxmllm.weights.tables import unpadded

TRANSFORMERS = "transformers:"
ROWS, BEFORE, TEXT = 8, 4, 24  # rows, tokens before the picture, tokens after it
MAX_KL, MIN_TOP1 = 3e-7, 1.0  # in float32; two implementations differ by about 1e-10


@dataclasses.dataclass(frozen=True)
class Inputs:
    """tokens int32[ROWS, BEFORE + TEXT], without those of the picture; pictures: px -> uint8[ROWS, px, px, 3]."""

    tokens: np.ndarray
    pictures: Mapping[int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model makes of Inputs: part -> float32 arrays; logits float32[ROWS, BEFORE + TEXT, V], those at text.

    hashes: part -> hash of its parameters, empty if unknown.
    """

    name: str
    parts: dict[str, np.ndarray]
    logits: np.ndarray
    hashes: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """kl: the largest KL divergence of next-token distributions, of A to B, in nats, over all places of text; mean_kl:
    its mean. top1: share of places with the same most likely token. differences: part -> largest difference of outputs,
    or why there is none. hashes: part -> whether the parameters are equal, None if one side has no hash.
    """

    names: tuple[str, str]
    kl: float
    mean_kl: float
    top1: float
    differences: dict[str, float | str]
    hashes: dict[str, tuple[str, str]]

    def equal(self, max_kl: float = MAX_KL, min_top1: float = MIN_TOP1) -> bool:
        """Whether the models are the same within these bounds. NaN is never equal."""
        return self.kl <= max_kl and self.top1 >= min_top1

    def __str__(self) -> str:
        """A line a part, and one for the distributions."""
        lines = []
        for part in dict.fromkeys([*self.differences, *self.hashes]):
            found = self.differences.get(part, "no outputs of its own")
            said = f"outputs differ by at most {found:.2e}" if isinstance(found, float) else found
            a, b = self.hashes.get(part, ("", ""))
            said += f", parameters {'equal' if a == b else 'differ'} ({a}, {b})" if a and b else ""
            lines.append(f"{part}: {said}")
        places = f"KL at most {self.kl:.2e}, {self.mean_kl:.2e} on average; same top token at {self.top1:.2%} of places"
        return "\n".join([*lines, f"next token: {places}"])


def verify(a: str, b: str, *, mesh: Mesh | None = None, config: str | None = None, seed: int = 0) -> Comparison:
    """Compares two models in float32. a, b: see weights.opened.open_model; "transformers:FOLDER" is transformers' own
    forward, which needs torch; one may be a checkpoint in its authors' layout, which is read as the model of the other.
    mesh: of our models (default: all devices along fsdp). Raises ValueError, in one line.
    """
    opened = open_both(a, b, config)
    models = [opened[text].model for text in (a, b)]
    folders = [text.removeprefix(TRANSFORMERS) for text in (a, b) if text.startswith(TRANSFORMERS)]
    inputs = make_inputs(*models, seed, {token for folder in folders if (token := image_token(folder)) is not None})
    found = []
    for text in (a, b):
        if text.startswith(TRANSFORMERS):
            found.append(transformers_outputs(text.removeprefix(TRANSFORMERS), opened[text].model, inputs))
        else:
            found.append(outputs(opened[text], inputs, (mesh or Mesh()).build()))
    # Encoders are compared by their order: those of folders have no names of their own.
    names = dict(zip(*(opened[text].model.encoders for text in (b, a))))
    return without_borrowed(compare(found[0], renamed(found[1], names)), opened)


def open_both(a: str, b: str, config: str | None) -> dict[str, Opened]:
    """The two models by what names them. Raises ValueError, in one line."""
    released = [text for text in dict.fromkeys((a, b)) if is_released_folder(text)]
    others = [text for text in (a, b) if text not in released]
    if not others:
        raise ConfigError(f"{b} is in its authors' layout, without encoders; compare it with a run or an export")
    opened = {text: open_model(text.removeprefix(TRANSFORMERS), config) for text in dict.fromkeys(others)}
    return opened | {text: open_released(text, opened[others[0]]) for text in released}


def without_borrowed(comparison: Comparison, opened: Mapping[str, Opened]) -> Comparison:
    """Says of parts that one model has from the other that they were not compared."""
    said = {
        part: f"not in {each.name}; that of the other model is used"
        for each in opened.values()
        for part in each.borrowed
    }
    hashes = {part: pair for part, pair in comparison.hashes.items() if part not in said}
    return dataclasses.replace(comparison, differences=comparison.differences | said, hashes=hashes)


def renamed(outputs: Outputs, names: Mapping[str, str]) -> Outputs:
    """The outputs with other names of encoders."""

    def rename(by_part: dict[str, Any]) -> dict[str, Any]:
        split = ((part.partition("."), value) for part, value in by_part.items())
        return {f"{kind}{dot}{names.get(name, name)}": value for (kind, dot, name), value in split}

    return dataclasses.replace(outputs, parts=rename(outputs.parts), hashes=rename(outputs.hashes))


def image_token(folder: str) -> int | None:
    """The id that stands for tokens of pictures in a LLaVA folder, None in others."""
    return getattr(read_config(folder), "image_token_index", None)


def make_inputs(a: MLLM, b: MLLM, seed: int, reserved: Collection[int] = ()) -> Inputs:
    """Inputs for two models, without reserved tokens. Raises ConfigError if they do not take the same pictures."""
    sizes = [[encoder.size for encoder in model.encoders.values()] for model in (a, b)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"the models do not take the same pictures: encoders of {sizes[0]} and {sizes[1]} pixels")
    rng = np.random.default_rng(seed)
    usable = np.array([i for i in range(min(a.llm.vocab, b.llm.vocab)) if i not in reserved], np.int32)
    tokens = rng.choice(usable, (ROWS, BEFORE + TEXT))
    pictures = {px: rng.integers(0, 256, (ROWS, px, px, 3), dtype=np.uint8) for px in sorted(set(sizes[0]))}
    return Inputs(tokens, pictures)


def transformers_outputs(folder: str, model: MLLM, inputs: Inputs) -> Outputs:
    """The outputs of a folder's class of transformers. model: the folder's model as one of ours."""
    block = model.layout.block
    tokens = np.insert(inputs.tokens, [BEFORE] * block, IMAGE_TOKEN, axis=1)
    encoder = next(iter(model.encoders.values()), None)
    pixels = None
    if encoder is not None:
        pixels = inputs.pictures[encoder.size] / np.float32(255)
        pixels = ((pixels - np.float32(encoder.mean)) / np.float32(encoder.std)).transpose(0, 3, 1, 2)
    parts, logits = transformers_forward(folder, tokens, pixels)
    return Outputs(TRANSFORMERS + folder, parts, np.delete(logits, range(BEFORE, BEFORE + block), axis=1), {})


def make_batch(model: MLLM, inputs: Inputs) -> Batch:
    """One picture a row, after BEFORE tokens; without encoders, the tokens alone."""
    block = model.layout.block
    length = BEFORE + block + TEXT
    empty = empty_batch(model.layout, ROWS, length, 1, {})
    tokens = np.insert(inputs.tokens, [BEFORE] * block, 0, axis=1)
    index = np.full(length, -1, np.int32)
    index[BEFORE : BEFORE + block] = np.arange(block)
    return dataclasses.replace(
        empty,
        tokens=tokens,
        segment_ids=np.ones_like(tokens),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        visual_index=np.broadcast_to(index, tokens.shape),
        visual_positions=np.broadcast_to(BEFORE + np.arange(block, dtype=np.int32), (ROWS, 1, block)),
        images={name: inputs.pictures[encoder.size][:, None] for name, encoder in model.encoders.items()},
    )


def outputs(opened: Opened, inputs: Inputs, mesh: jax.sharding.Mesh) -> Outputs:
    """The outputs of one of our models on a mesh, with full float32 products."""
    model = opened.model
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        params = opened.load(abstract_model(model, mesh))
        batch = host_batches.global_from_copies(make_batch(model, inputs), mesh)
        parts, logits = jax.device_get(jax.jit(lambda p, b: _forward(model, p, b))(params, batch))
        return Outputs(opened.name, parts, logits, hashes(params, model.llm.vocab))


def _forward(model: MLLM, params: Params, batch: Batch) -> tuple[dict[str, jax.Array], jax.Array]:
    """-> (outputs of the parts, logits at the places of text)."""
    variables, block = {"params": unflatten(params)}, model.layout.block
    (states, *_), noted = model.apply(
        variables,
        batch,
        method="hidden",
        mutable=["intermediates"],
        capture_intermediates=lambda module, name: name == "__call__" and len(module.path) == 1,
    )
    parts = {}
    for name, found in noted["intermediates"].items():
        parts[part_of(name)] = whole(_main(found["__call__"][0]))
    text = jnp.concatenate([states[:, :BEFORE], states[:, BEFORE + block :]], 1)
    table = sharded.gather_param(model.apply(variables, method=lambda m: m.llm.output_table()), ("vocab", "embed"))
    logits = sharded.einsum("bsh,vh->bsv", text, table, "batch", None, "vocab")
    return parts, whole(soft_cap(logits, model.llm.logit_cap))[..., : model.llm.vocab]


def _main(output: Any) -> jax.Array:
    """The array among what a part returns: taps, cells of a map, tokens, states."""
    first = output[0] if isinstance(output, tuple) else output
    return getattr(first, "cells", getattr(first, "tokens", first))


def whole(x: jax.Array) -> jax.Array:
    """x in float32, on every device."""
    return sharded.shard(x.astype(jnp.float32), *[None] * x.ndim)


def hashes(params: Params, vocab: int | None = None) -> dict[str, str]:
    """Part -> a hash of the paths, shapes and numbers of its parameters, whatever their dtype; without the padding of
    the tables of tokens, which have `vocab` rows."""
    digests: dict[str, Any] = {}
    for path in sorted(params):
        digest = digests.setdefault(part_of(path), hashlib.sha256())
        x = unpadded(path, np.asarray(params[path]), vocab).astype(np.float32, order="C")
        inside = path.removeprefix(part_of(path).replace(".", "_"))
        digest.update(f"{inside} {x.shape}\n".encode())
        digest.update(x.data)
    return {part: digest.hexdigest()[:16] for part, digest in digests.items()}


def compare(a: Outputs, b: Outputs) -> Comparison:
    """Parts of both models with the same name, and the distributions over the tokens that both have."""
    vocab = min(a.logits.shape[-1], b.logits.shape[-1])
    differences: dict[str, float | str] = {}
    for part in a.parts:
        if part in b.parts:
            x, y = a.parts[part], b.parts[part]
            same = x.size == y.size
            differences[part] = float(np.abs(x.ravel() - y.ravel()).max()) if same else f"{x.shape} and {y.shape}"
    kl, hits = [], []
    for x, y in zip(a.logits, b.logits):  # a row at a time, in float64
        p, q = (log_softmax(logits[:, :vocab].astype(np.float64)) for logits in (x, y))
        kl.append((np.exp(p) * (p - q)).sum(-1))
        hits.append(p.argmax(-1) == q.argmax(-1))
    both = {part: (a.hashes.get(part, ""), b.hashes.get(part, "")) for part in {**a.hashes, **b.hashes}}
    return Comparison((a.name, b.name), float(np.max(kl)), float(np.mean(kl)), float(np.mean(hits)), differences, both)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
