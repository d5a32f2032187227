"""Loads the model of a workdir and asks it questions about pictures, alone or in a conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxmllm import host_batches
from jaxmllm import mesh as meshes
from jaxmllm.config import Run
from jaxmllm.data.build import sample_spec
from jaxmllm.data.loader import make_batch
from jaxmllm.data.samples import make_sample
from jaxmllm.data.sources.record import Blob, Record, read_file
from jaxmllm.data.templates import IMAGE
from jaxmllm.errors import ConfigError
from jaxmllm.eval.generate import left_pad, make_generate
from jaxmllm.recipes import override, read_run
from jaxmllm.train.checkpoint import StageCheckpoints, open_checkpoints
from jaxmllm.train.setup import abstract_params
from jaxmllm.train.state import unflatten

LENGTH_STEP = 32  # prompts are padded to a multiple of this, so that few lengths are compiled


class Model:
    """The newest checkpoint of a workdir, ready to answer.

    If several processes run, all must ask the same questions, and all get the answers.
    Raises ConfigError if `workdir` holds no run or no checkpoint.
    """

    def __init__(
        self, workdir: str, max_new_tokens: int = 32, overrides: Sequence[str] = (), config: str | None = None
    ):
        """overrides: assignments to the config, such as "mesh.fsdp=1" for other devices than those of training.
        config: FILE.py of a recipe with parts of its own (recipes.read_run)."""
        self.config = override(read_run(workdir, config), list(overrides))
        self.spec = dataclasses.replace(sample_spec(self.config), targets=None)
        self.tokenizer = self.spec.tokenizer
        self.mesh = self.config.mesh.build()
        with jax.set_mesh(self.mesh):
            dtype = jnp.dtype(self.config.compute_dtype)
            abstract, _ = abstract_params(self.config, self.mesh)
            abstract = {path: x.update(dtype=dtype) for path, x in abstract.items()}
            self.params = unflatten(newest_checkpoints(workdir, self.config).restore_params(abstract))
        stop = self.tokenizer.id(self.spec.template.end)
        self.generate = make_generate(self.config.model, max_new_tokens, stop)

    def ask(self, images: Sequence[str], prompts: Sequence[str], batch: int = 64) -> list[str]:
        """Answers one prompt per picture file, greedily. Raises BadSample for a picture that cannot be read."""
        turns = [[{"from": "human", "value": f"{IMAGE}\n{prompt}"}] for prompt in prompts]
        replies = []
        for start in range(0, len(turns), batch):
            rows = slice(start, start + batch)
            replies += self.reply(list(zip(images[rows], turns[rows])), batch)
        return replies

    def reply(self, chats: list[tuple[str | None, list[dict[str, str]]]], batch: int = 1) -> list[str]:
        """The next reply in each conversation: (picture file or None, turns in LLaVA's form).

        Every batch has at least `batch` rows, so that few shapes are compiled.
        """
        samples = [make_sample(chat_record(*chat), 0, self.spec, reply_open=True) for chat in chats]
        length = -(-max(len(s.tokens) for s in samples) // LENGTH_STEP) * LENGTH_STEP
        shards = meshes.data_shards(self.mesh)
        rows = [[sample] for sample in samples]
        rows += rows[:1] * (-(-max(batch, len(rows)) // shards) * shards - len(rows))
        with jax.set_mesh(self.mesh):
            prompts, _ = make_batch(rows, dataclasses.replace(self.spec, seq_len=length))
            prompts = host_batches.global_from_copies(left_pad(prompts), self.mesh)
            tokens = jax.device_get(self.generate(self.params, prompts))
        return [self.tokenizer.decode(row).strip() for row in tokens[: len(samples)].tolist()]


class Conversation:
    """A conversation with a model about one picture file (or none)."""

    def __init__(self, model: Model, image: str | None = None):
        self.model, self.image = model, image
        self.turns: list[dict[str, str]] = []

    def reply(self, prompt: str) -> str:
        """What the model replies to `prompt` after all that was said before."""
        lead = f"{IMAGE}\n" if self.image and not self.turns else ""
        self.turns.append({"from": "human", "value": lead + prompt})
        reply = self.model.reply([(self.image, self.turns)])[0]
        self.turns.append({"from": "gpt", "value": reply})
        return reply


def chat_record(image: str | None, turns: list[dict[str, str]]) -> Record:
    """A record for a conversation that is in no data set."""
    blobs = [Blob(image, lambda: read_file(image))] if image else []
    return Record("chat", image or "chat", {"conversations": turns}, blobs, {})


def newest_checkpoints(workdir: str, config: Run) -> StageCheckpoints:
    """The checkpoints of the last stage that has any. Raises ConfigError if no stage has."""
    for checkpoints in reversed(open_checkpoints(workdir, [stage.name for stage in config.stages])):
        if checkpoints.latest() is not None:
            return checkpoints
    raise ConfigError(f"{workdir} has no checkpoint yet; run `jaxmllm train` on it first")
