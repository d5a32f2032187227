"""A workdir -> a model that answers questions about pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxmllm import mesh as meshes
from jaxmllm.config import ConfigError, Run, from_json, override
from jaxmllm.data.build import sample_spec
from jaxmllm.data.loader import join
from jaxmllm.data.samples import make_sample
from jaxmllm.data.sources import Blob, Record, read_file
from jaxmllm.data.templates import IMAGE
from jaxmllm.eval.generate import left_pad, make_generate
from jaxmllm.train.checkpoint import StageCheckpoints, abstract_on
from jaxmllm.train.setup import initial_params
from jaxmllm.train.state import unflatten

BUCKET = 32  # prompts are padded to a multiple of this, so that few lengths are compiled


class Model:
    """The newest checkpoint of a workdir, ready to answer.

    Several processes must all ask the same, and all get the answers.
    Raises ConfigError if `workdir` holds no run or no checkpoint.
    """

    def __init__(self, workdir: str, max_new_tokens: int = 32, words: Sequence[str] = ()):
        """words: assignments to the run's config, such as "mesh.fsdp=1" for other devices than it was trained on."""
        self.config = override(read_config(workdir), list(words))
        self.spec = dataclasses.replace(sample_spec(self.config), targets=None)
        self.tokenizer = self.spec.tokenizer
        self.mesh = self.config.mesh.build()
        with jax.set_mesh(self.mesh):
            dtype = jnp.dtype(self.config.compute_dtype)
            abstract = abstract_on(self.mesh, jax.eval_shape(lambda: initial_params(self.config)))
            params = newest(workdir, self.config).restore_params(abstract)
            self.params = unflatten({k: v.astype(dtype) for k, v in params.items()})
        stop = self.tokenizer.id(self.spec.template.end)
        self.generate = make_generate(self.config.model, max_new_tokens, stop)

    def ask(self, images: Sequence[str], prompts: Sequence[str], batch: int = 64) -> list[str]:
        """Answers one prompt per picture file, greedily. Raises BadSample for a picture that cannot be read."""
        turns = [[{"from": "human", "value": f"{IMAGE}\n{prompt}"}] for prompt in prompts]
        replies = []
        for start in range(0, len(turns), batch):
            part = slice(start, start + batch)
            replies += self.reply(list(zip(images[part], turns[part])), batch)
        return replies

    def reply(self, chats: list[tuple[str | None, list[dict[str, str]]]], batch: int = 1) -> list[str]:
        """Continues conversations in LLaVA's form, each about one picture file (or none)."""
        samples = [make_sample(record_of(*chat), 0, self.spec, reply_open=True) for chat in chats]
        length = -(-max(len(s.tokens) for s in samples) // BUCKET) * BUCKET
        shards = meshes.data_shards(self.mesh)
        rows = [[sample] for sample in samples]
        rows += rows[:1] * (-(-max(batch, len(rows)) // shards) * shards - len(rows))
        with jax.set_mesh(self.mesh):
            prompts, _ = join(rows, dataclasses.replace(self.spec, seq_len=length))
            tokens = jax.device_get(self.generate(self.params, meshes.from_whole(left_pad(prompts), self.mesh)))
        return [self.tokenizer.decode(row).strip() for row in tokens[: len(samples)].tolist()]


def record_of(image: str | None, turns: list[dict[str, str]]) -> Record:
    """A conversation that is not in any data set."""
    blobs = [Blob(image, lambda: read_file(image))] if image else []
    return Record("chat", image or "chat", {"conversations": turns}, blobs, {})


def read_config(workdir: str) -> Run:
    """The config a workdir was made with."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{workdir} holds no run (no config.json); train one with `jaxmllm train CONFIG --workdir {workdir}`"
        )
    return from_json(json.loads(path.read_text()))


def newest(workdir: str, config: Run) -> StageCheckpoints:
    """The last stage that has a checkpoint."""
    for stage in reversed(config.stages):
        if (Path(workdir) / stage.name / "checkpoints").is_dir():
            checkpoints = StageCheckpoints(workdir, stage.name)
            if checkpoints.latest() is not None:
                return checkpoints
    raise ConfigError(f"{workdir} has no checkpoint yet; run `jaxmllm train` on it first")
