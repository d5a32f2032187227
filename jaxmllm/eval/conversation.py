"""A conversation with a model, whose key-value cache is kept from turn to turn."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jaxmllm import host_batches
from jaxmllm import mesh as meshes
from jaxmllm.data.samples import Sample
from jaxmllm.data.sources.record import Blob
from jaxmllm.eval.answer import LENGTH_STEP, Answerer, Question, Reply, marked
from jaxmllm.eval.generate import State
from jaxmllm.eval.sampling import Sampling
from jaxmllm.train.state import unflatten


class Conversation:
    """A conversation with a model about pictures (or none).

    A turn reads only what is new in it: the cache holds what was said before, as long as the tokens are the same.
    """

    def __init__(self, answerer: Answerer, images: Sequence[str | Blob] = (), sampling: Sampling = Sampling()):
        self.answerer, self.images, self.sampling = answerer, tuple(images), sampling
        self.history: tuple[tuple[str, str], ...] = ()
        self._state: State | None = None
        self._held: list[int] = []  # what the cache holds, after its padding: tokens, or -1 - visual index
        self._padding = 0  # slots before the prompt

    def reply(self, prompt: str) -> str:
        """What the model replies to `prompt` after all that was said before; raises as `stream` does."""
        return "".join(self.stream(prompt))

    def stream(self, prompt: str) -> Iterator[str]:
        """Yields the reply piece by piece, as it is made. It may be empty; the conversation goes on all the same.

        Raises BadSample for what cannot be said: a picture cannot be read, the prompt has the marker <image> without a
        picture of its own, or all together is too long. The conversation can go on with another prompt.
        """
        if not self.history:  # so that a marker in a later turn is not taken for the place of a picture
            prompt = marked(prompt, len(self.images))
        question = Question(prompt, self.images, self.history, "chat", self.sampling)
        sample = self.answerer.sample(question)
        said = ""
        with jax.set_mesh(self.answerer.mesh):
            self._begin(sample)
        for reply in self._replies(sample):
            piece = new_text(said, reply, self.sampling.stop)
            if piece:
                yield piece
            said += piece
        self.history += ((prompt, said),)

    def _replies(self, sample: Sample) -> Iterator[Reply]:
        """The reply after each token, until it is complete."""
        answerer, prompt = self.answerer, self._held
        while True:
            ids, count = jax.device_get((self._state.out[0], self._state.count))
            ids = ids[:count].tolist()
            self._held = prompt + ids[:-1]
            reply = answerer.so_far(ids, self.sampling)
            yield reply
            if reply.ended:
                return
            with jax.set_mesh(answerer.mesh):
                self._state = answerer.go_on(self._state, 1)

    def _begin(self, sample: Sample) -> None:
        """Reads what the cache does not hold of a prompt, and chooses the reply's first token."""
        answerer = self.answerer
        most, rows = answerer.generator.most, meshes.data_shards(answerer.mesh)
        wanted = np.where(sample.visual_index < 0, sample.tokens, -1 - sample.visual_index).tolist()
        same = len(os.path.commonprefix([self._held, wanted[:-1]]))
        rest = wanted[same:]
        length = -(-len(rest) // LENGTH_STEP) * LENGTH_STEP
        slots = self._state.slots if self._state else 0
        fits = self._padding + same + max(length, len(rest) + most) <= slots
        state, self._held, self._state = self._state, wanted, None
        if not (state and same and fits and min(rest) >= 0):
            longest = -(-answerer.spec.seq_len // LENGTH_STEP) * LENGTH_STEP
            self._padding = -len(wanted) % LENGTH_STEP
            more = longest - len(wanted) - self._padding + LENGTH_STEP + most
            self._state = answerer.start([sample], [self.sampling], 1, more)
            return
        tokens = np.zeros((rows, length), np.int32)
        tokens[:, : len(rest)] = rest
        settings = answerer.settings([sample] * rows, [self.sampling] * rows)
        tokens, settings = host_batches.global_from_copies((tokens, settings), answerer.mesh)
        slot, first, count = answerer.on_devices(self._padding + same, same, len(rest))
        self._state = answerer.generator.extend(
            unflatten(answerer.params), state.cache, slot, tokens, first, count, settings
        )


def new_text(said: str, reply: Reply, stop: Sequence[str]) -> str:
    """What can be said of a reply after `said`, which was said of it before.

    What could be the beginning of a stop text, or of a letter of several tokens, waits for the next token.
    """
    text = reply.text.strip() if reply.ended else without_open_end(reply.text.lstrip(), stop).rstrip()
    return text[len(said) :] if text.startswith(said) else ""


def without_open_end(text: str, stop: Sequence[str]) -> str:
    """The text without an end that the next token could change: half a letter, or the beginning of a stop text."""
    text = text.rstrip("\ufffd")
    open_ends = [n for end in stop for n in range(1, len(end)) if text.endswith(end[:n])]
    return text[: len(text) - max(open_ends, default=0)]
