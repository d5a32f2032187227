"""A thread that answers what arrives together as one batch.

Programs are compiled for a number of rows, a length of prompts, a length of replies, and kinds of sampling. So that
there are few of them, rows and prompts are padded to powers of two, and replies have room for a power of four. Whatever
stands beside a request in its batch, its reply is the same.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jaxmllm.data.samples import Sample
from jaxmllm.errors import shown
from jaxmllm.eval.answer import STOP_EVERY, Answerer, Reply
from jaxmllm.eval.sampling import Sampling

WINDOW = 0.02  # seconds that the first request waits for others
PATIENCE = 2.0  # seconds after which a batch lets another one begin beside it
BESIDE = 3  # batches at a time, each of which has a cache
LEAST = 64  # tokens; shorter prompts and replies need no programs of their own


class Stopping(Exception):
    """The server stops before this reply is complete."""


@dataclasses.dataclass(eq=False)
class Job:
    """A reply that is wanted. tell: called from the thread with the reply as far as it is, in the end with the complete
    one, or with the error that prevents it."""

    sample: Sample
    sampling: Sampling
    streams: bool  # whether each token is told
    tell: Callable[[Reply | Exception], None]
    given_up: bool = False  # set by the one who waited for it
    over: bool = False  # the last thing is told

    def end(self, last: Reply | Exception) -> None:
        """Tells the last thing, once."""
        if not self.over:
            self.over = True
            self.tell(last)


class Running(NamedTuple):
    """A batch in the making."""

    jobs: list[Job]
    steps: Iterator[None]
    began: float  # time.monotonic()


class Batcher:
    """Answers jobs, up to `rows` in a batch. say: prints a line.

    Small batches waste time, so the next one begins when the last has ended, and all that came meanwhile is in it. Only
    if that takes long, another one begins beside it, and they take turns: a long reply does not keep others waiting.
    """

    def __init__(self, answerer: Answerer, rows: int, say: Callable[[str], None]):
        self.answerer, self.rows, self.say = answerer, rows, say
        self.most = answerer.generator.most
        self.deadline: float | None = None  # when everything ends; time.monotonic()
        self._jobs: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._answerers = {self.most: answerer}  # tokens of the longest reply -> answerer
        self._shapes: set[tuple] = set()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts jobs at the end of the queue. Raises Stopping after `stop`."""
        with self._changed:
            if self.deadline:
                raise Stopping
            self._jobs.extend(jobs)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Jobs that wait for their batch."""
        return len(self._jobs)

    def stop(self, seconds: float) -> None:
        """Gives the jobs of the running batch this long to end; those that wait get Stopping."""
        with self._changed:
            self.deadline = time.monotonic() + seconds
            waiting = [*self._jobs]
            self._jobs.clear()
            self._changed.notify()
        for job in waiting:
            job.end(Stopping())

    def _run(self) -> None:
        running: list[Running] = []
        while running or self.deadline is None:
            now = time.monotonic()
            may_begin = len(running) < BESIDE and all(now - each.began > PATIENCE for each in running)
            if may_begin and (jobs := self._next(wait=not running)):
                running.append(Running(jobs, self._answer(jobs), time.monotonic()))
            running = [each for each in running if self._goes_on(each)]

    def _goes_on(self, batch: Running) -> bool:
        """Makes the next tokens of a batch; returns whether there will be more."""
        try:
            return next(batch.steps, "ended") != "ended"
        except Exception as error:  # whatever a batch met, the others are answered
            self.say(f"a batch of {len(batch.jobs)} failed: {type(error).__name__}: {shown(error, 500)}")
            for job in batch.jobs:
                job.end(error)
            return False

    def _next(self, wait: bool) -> list[Job]:
        """The next batch, empty if there is none: without `wait`, or when the server stops."""
        with self._changed:
            found: list[Job] = []
            while not found and not self.deadline and (wait or self._jobs):
                if wait:
                    self._changed.wait_for(lambda: self._jobs or self.deadline)
                    self._changed.wait_for(lambda: len(self._jobs) >= self.rows or self.deadline, WINDOW)
                found = [self._jobs.popleft() for _ in range(min(self.rows, len(self._jobs)))]
                found = [job for job in found if not job.given_up]
            return found

    def _answer(self, jobs: list[Job]) -> Iterator[None]:
        """Tells each job its reply as it is made; yields each time that this has gone on."""
        samples, samplings = [job.sample for job in jobs], [job.sampling for job in jobs]
        rows = power(2, len(jobs))
        length = min(power(2, max(LEAST, *(len(sample.tokens) for sample in samples))), self.answerer.spec.seq_len)
        most = min(power(4, max(LEAST, *(each.max_new_tokens or self.most for each in samplings))), self.most)
        self._announce(rows, length, most, samplings)
        every, given_up = 1 if any(job.streams for job in jobs) else STOP_EVERY, set()
        for replies in self._up_to(most).replies(samples, samplings, rows, every, length, given_up):
            late = self.deadline is not None and time.monotonic() > self.deadline
            for job, reply in zip(jobs, replies):
                if reply.ended:
                    job.end(reply)
                elif late:
                    job.end(Stopping())
                elif job.streams and not job.given_up:
                    job.tell(reply)
            given_up |= {row for row, job in enumerate(jobs) if job.over or job.given_up}
            yield

    def _up_to(self, most: int) -> Answerer:
        """The answerer for replies of up to `most` tokens."""
        if most not in self._answerers:
            self._answerers[most] = self.answerer.up_to(most)
        return self._answerers[most]

    def _announce(self, rows: int, length: int, most: int, samplings: Sequence[Sampling]) -> None:
        """Says that programs are compiled, which takes long, when a shape occurs for the first time."""
        kinds = any(each.temperature for each in samplings), any(each.repetition_penalty != 1 for each in samplings)
        shape = rows, length, most, kinds
        if shape not in self._shapes:
            self._shapes.add(shape)
            kind = {(False, False): "greedy", (True, False): "sampled"}.get(kinds, "penalized")
            sizes = f"{rows} x {length} tokens of prompts and {most} of replies"
            self.say(f"the first {kind} batch of {sizes}: its programs are compiled, or read from the cache")


def power(base: int, count: int) -> int:
    """The least power of 2 or 4 that is `count` or more."""
    bits = (count - 1).bit_length()
    return 1 << bits + (bits % 2 if base == 4 else 0)
