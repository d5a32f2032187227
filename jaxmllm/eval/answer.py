"""Parameters in, replies out: questions about pictures, alone or in a conversation."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import jax

from jaxmllm import host_batches
from jaxmllm import mesh as meshes
from jaxmllm.config import Run
from jaxmllm.data.ahead import map_ahead
from jaxmllm.data.build import sample_spec
from jaxmllm.data.loader import make_batch
from jaxmllm.data.samples import Sample, make_sample
from jaxmllm.data.sources.record import BadSample, Blob, Record, read_file
from jaxmllm.data.templates import IMAGE
from jaxmllm.errors import ConfigError
from jaxmllm.eval.generate import left_pad, make_generate
from jaxmllm.train.state import Params, unflatten

LENGTH_STEP = 32  # prompts are padded to a multiple of this, so that few lengths are compiled


@dataclasses.dataclass(frozen=True)
class Question:
    """What a model is asked: a prompt, pictures (files, or Blobs for bytes from elsewhere), and what was said before.

    Pictures stand before the first text, unless the texts say with <image> where each of them belongs. place: where the
    question comes from, e.g. "rows.jsonl:17", for error messages.
    """

    prompt: str
    images: tuple[str | Blob, ...] = ()
    history: tuple[tuple[str, str], ...] = ()  # earlier (prompt, reply) pairs
    place: str = "question"

    def record(self) -> Record:
        """The question as a record whose last turn waits for its answer."""
        texts = [text for pair in self.history for text in pair] + [self.prompt]
        if not any(IMAGE in text for text in texts):
            texts[0] = marked(texts[0], len(self.images))
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        blobs = [Blob(image, partial(read_file, image)) if isinstance(image, str) else image for image in self.images]
        return Record(self.place, self.place, {"conversations": turns}, blobs, {})


class Answerer:
    """A model that answers questions greedily.

    If several processes run, all must ask the same questions, and all get the answers.
    """

    def __init__(self, config: Run, params: Params, max_new_tokens: int = 32):
        """params: by path, on the mesh of `config` and in its compute dtype. They may come from anywhere.

        Raises ConfigError if the mesh splits sequences.
        """
        if config.mesh.context > 1:
            raise ConfigError(
                f"mesh.context={config.mesh.context}: replies are not generated on a mesh that splits sequences; "
                "evaluate afterwards, with --set mesh.context=1"
            )
        self.config, self.params = config, params
        self.spec = dataclasses.replace(sample_spec(config), targets=None)
        self.tokenizer, self.mesh = self.spec.tokenizer, config.mesh.build()
        self.stop = self.tokenizer.id(self.spec.template.end)
        self.generate = make_generate(config.model, max_new_tokens, self.stop)

    def holding(self, params: Params) -> Answerer:
        """The same answerer with other parameters; it compiles nothing again."""
        other = copy.copy(self)
        other.params = params
        return other

    def complaints(self, questions: Sequence[Question]) -> list[str | None]:
        """For each question, prepared as `ask` does, why it cannot be asked, or None: a picture is missing or broken,
        or the prompt does not fit in a row."""

        def complaint(question: Question) -> str | None:
            try:
                self.sample(question)
                return None
            except BadSample as bad:
                return f"{question.place}: {bad.reason} ({bad.path})"

        return list(map_ahead(complaint, questions))

    def ask(self, questions: Sequence[Question], batch: int = 64) -> Iterator[str]:
        """Yields the reply to each question, `batch` at a time. Raises BadSample for one that cannot be asked.

        Every batch has at least `batch` rows, so that few shapes are compiled.
        """
        samples = map_ahead(self.sample, questions, batch)
        while chosen := list(itertools.islice(samples, batch)):
            yield from self.reply(chosen, batch)

    def sample(self, question: Question) -> Sample:
        return make_sample(question.record(), 0, self.spec, reply_open=True)

    def reply(self, samples: Sequence[Sample], batch: int) -> list[str]:
        """The replies to one batch of samples, padded to `batch` rows."""
        length = -(-max(len(s.tokens) for s in samples) // LENGTH_STEP) * LENGTH_STEP
        shards = meshes.data_shards(self.mesh)
        rows = [[sample] for sample in samples]
        rows += rows[:1] * (-(-max(batch, len(rows)) // shards) * shards - len(rows))
        with jax.set_mesh(self.mesh):
            prompts, _ = make_batch(rows, dataclasses.replace(self.spec, seq_len=length))
            prompts = host_batches.global_from_copies(left_pad(prompts), self.mesh)
            tokens = jax.device_get(self.generate(unflatten(self.params), prompts))
        return [self.text(row) for row in tokens[: len(samples)].tolist()]

    def text(self, ids: list[int]) -> str:
        """The text of a reply up to its stop token, which a tokenizer need not flag as special."""
        end = ids.index(self.stop) if self.stop in ids else len(ids)
        return self.tokenizer.decode(ids[:end]).strip()


class Conversation:
    """A conversation with a model about one picture file (or none)."""

    def __init__(self, answerer: Answerer, image: str | None = None):
        self.answerer, self.images = answerer, (image,) if image else ()
        self.history: tuple[tuple[str, str], ...] = ()

    def reply(self, prompt: str) -> str:
        """What the model replies to `prompt` after all that was said before, which may include empty replies.

        Raises BadSample for what cannot be said: the picture cannot be read, the prompt has the marker <image> without
        a picture of its own, or all together is too long. The conversation can go on with another prompt.
        """
        if not self.history:  # so that a marker in a later turn is not taken for the place of the picture
            prompt = marked(prompt, len(self.images))
        question = Question(prompt, self.images, self.history, place="chat")
        (reply,) = self.answerer.ask([question], batch=1)
        # A model may write the marker of pictures, which would ask for another one in the next turn.
        self.history += ((prompt, reply.replace(IMAGE, "")),)
        return reply


def marked(text: str, pictures: int) -> str:
    """The text with the places of its pictures: in front, unless it says with <image> where they belong."""
    return text if IMAGE in text else f"{IMAGE}\n" * pictures + text


def summary(complaints: Sequence[str | None], total: int) -> str:
    """How many of `total` rows cannot be used, and the first three complaints; "" if there are none."""
    complaints = [text for text in complaints if text]
    more = f" (and {len(complaints) - 3} more)" if len(complaints) > 3 else ""
    return f"{len(complaints)} of {total} rows cannot be used: {'; '.join(complaints[:3])}{more}" if complaints else ""


def refuse(complaints: Sequence[str | None], total: int) -> None:
    """Raises ValueError with the `summary` of complaints, if there are any about `total` questions or rows."""
    if text := summary(complaints, total):
        raise ValueError(text)
