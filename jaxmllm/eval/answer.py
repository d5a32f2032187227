"""Parameters in, replies out: questions about pictures, alone or in a conversation."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Container, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

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
from jaxmllm.eval.generate import Generator, State, left_pad
from jaxmllm.eval.sampling import Sampling, Settings
from jaxmllm.train.state import Params, unflatten

LENGTH_STEP = 32  # prompts are padded to a multiple of this, so that few lengths are compiled
STOP_EVERY = 16  # tokens after which replies are searched for stop texts


@dataclasses.dataclass(frozen=True)
class Question:
    """What a model is asked: a prompt, pictures (files, or Blobs for bytes from elsewhere), and what was said before.

    Pictures stand before the first text, unless the texts say with <image> where each of them belongs. place: where the
    question comes from, e.g. "rows.jsonl:17", for error messages. markers_are_text: what looks like another program's
    marker of media, such as <video>, is text; otherwise such a question cannot be asked.
    """

    prompt: str
    images: tuple[str | Blob, ...] = ()
    history: tuple[tuple[str, str], ...] = ()  # earlier (prompt, reply) pairs
    place: str = "question"
    sampling: Sampling = Sampling()
    system: str | None = None  # instead of the template's own system text
    markers_are_text: bool = False

    def record(self) -> Record:
        """The question as a record whose last turn waits for its answer."""
        # A model may have written the marker of pictures, which would ask for another picture.
        said = [(prompt, reply.replace(IMAGE, "")) for prompt, reply in self.history]
        texts = [text for pair in said for text in pair] + [self.prompt]
        if not any(IMAGE in text for text in texts):
            texts[0] = marked(texts[0], len(self.images))
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        blobs = [Blob(image, partial(read_file, image)) if isinstance(image, str) else image for image in self.images]
        data = {"conversations": turns, "system": self.system}
        return Record(self.place, self.place, data, blobs, {}, self.markers_are_text)


class Reply(NamedTuple):
    """A reply, or its beginning."""

    text: str  # with the blanks around it
    tokens: int  # of the reply, with the one that ended it
    ended: str  # "stop": by the stop token or a stop text; "length": it may not be longer; "": it goes on


class Answerer:
    """A model that answers questions, each as its `sampling` says: by default greedily.

    If several processes run, all must ask the same questions, and all get the answers.
    """

    def __init__(self, config: Run, params: Params, max_new_tokens: int = 32):
        """params: by path, on the mesh of `config` and in its compute dtype. They may come from anywhere.
        max_new_tokens: of the longest reply.

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
        self.stop = self.tokenizer.id(self.spec.template.stop)
        vocab = min(config.model.llm.vocab, self.tokenizer.size)
        self.generator = Generator(config.model, max_new_tokens, (self.stop,), vocab)

    def holding(self, params: Params) -> Answerer:
        """The same answerer with other parameters; it compiles nothing again."""
        other = copy.copy(self)
        other.params = params
        return other

    def up_to(self, max_new_tokens: int) -> Answerer:
        """The same answerer with replies of at most this many tokens; it compiles programs of its own."""
        other = copy.copy(self)
        generator = self.generator
        other.generator = Generator(generator.model, max_new_tokens, generator.stops, generator.vocab)
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

        def prepared(question: Question) -> tuple[Sample, Sampling]:
            return self.sample(question), question.sampling

        found = map_ahead(prepared, questions, batch)
        while chosen := list(itertools.islice(found, batch)):
            yield from self.reply(*zip(*chosen), batch)

    def sample(self, question: Question) -> Sample:
        return make_sample(question.record(), 0, self.spec, reply_open=True)

    def reply(self, samples: Sequence[Sample], sampling: Sequence[Sampling], batch: int) -> list[str]:
        """The replies to one batch of samples, padded to `batch` rows."""
        every = STOP_EVERY if any(each.stop for each in sampling) else self.generator.most
        *_, replies = self.replies(samples, sampling, batch, every)
        return [reply.text.strip() for reply in replies]

    def replies(
        self,
        samples: Sequence[Sample],
        sampling: Sequence[Sampling],
        batch: int,
        every: int,
        length: int = 0,
        given_up: Container[int] = (),
    ) -> Iterator[list[Reply]]:
        """Yields the replies as far as they are after the first token, and then after every `every` tokens, until all
        are complete. length: as in `start`.

        given_up: rows whose replies nobody waits for any more. It is read each time, so that it may grow meanwhile.
        """
        with jax.set_mesh(self.mesh):
            state = self.start(samples, sampling, batch, self.generator.most, length)
        replies = [Reply("", 0, "")] * len(samples)
        while True:
            ids, count = jax.device_get((state.out, state.count))
            rows = zip(replies, ids.tolist(), sampling)
            replies = [reply if reply.ended else self.so_far(row[:count], each) for reply, row, each in rows]
            yield replies
            done = np.array([bool(reply.ended) or row in given_up for row, reply in enumerate(replies)])
            if done.all():
                return
            done = np.append(done, np.repeat(done[:1], len(ids) - len(done)))  # the rows that were added
            with jax.set_mesh(self.mesh):
                state = dataclasses.replace(state, done=host_batches.global_from_copies(done, self.mesh))
                state = self.go_on(state, every)

    def start(
        self, samples: Sequence[Sample], sampling: Sequence[Sampling], batch: int, more: int, length: int = 0
    ) -> State:
        """The state with the first token of each reply, on the mesh that is set. more: see Generator.prefill. length:
        at least so many tokens stand in a row, most of them padding in a short one.

        Rows are added up to `batch`, and up to a multiple of what the mesh needs: copies of the first.
        """
        length = -(-max(length, *(len(s.tokens) for s in samples)) // LENGTH_STEP) * LENGTH_STEP
        shards = meshes.data_shards(self.mesh)
        count = -(-max(batch, len(samples)) // shards) * shards
        samples, sampling = ([*x, *x[:1] * (count - len(x))] for x in (list(samples), list(sampling)))
        prompts, _ = make_batch([[sample] for sample in samples], dataclasses.replace(self.spec, seq_len=length))
        settings = self.settings(samples, sampling)
        prompts, settings = host_batches.global_from_copies((left_pad(prompts), settings), self.mesh)
        return self.generator.prefill(unflatten(self.params), prompts, settings, more)

    def settings(self, samples: Sequence[Sample], sampling: Sequence[Sampling]) -> Settings:
        """The settings (numpy) of a batch."""
        text = [sample.tokens[sample.visual_index < 0] for sample in samples]
        return Settings.of(sampling, self.generator.most, text, self.generator.vocab)

    def go_on(self, state: State, steps: int) -> State:
        """Up to `steps` further tokens."""
        return self.generator.decode(unflatten(self.params), state, *self.on_devices(steps))

    def on_devices(self, *numbers: int) -> list[jax.Array]:
        """int32 scalars on every device."""
        return jax.device_put([np.int32(x) for x in numbers], NamedSharding(self.mesh, PartitionSpec()))

    def so_far(self, ids: list[int], sampling: Sampling) -> Reply:
        """The reply of these tokens, those after its end left aside.

        It ends at the stop token, which a tokenizer need not flag as special, or before the first of the stop texts.
        """
        most = min(sampling.max_new_tokens or self.generator.most, self.generator.most)
        ended = "length" if len(ids) >= most else ""
        ids = ids[:most]
        if self.stop in ids:
            ids, ended = ids[: ids.index(self.stop) + 1], "stop"
        text = self.decoded(ids)
        if any(end in text for end in sampling.stop):
            # The number of tokens must not depend on how many were made before the text was looked at.
            count = next(
                n for n in range(1, len(ids) + 1) if any(end in self.decoded(ids[:n]) for end in sampling.stop)
            )
            ids, ended = ids[:count], "stop"
            text = self.decoded(ids)
            text = text[: min(text.find(end) for end in sampling.stop if end in text)]
        return Reply(text, len(ids), ended)

    def decoded(self, ids: list[int]) -> str:
        """The text of tokens of which the last may be the stop token."""
        return self.tokenizer.decode(ids[:-1] if ids[-1:] == [self.stop] else ids)


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
