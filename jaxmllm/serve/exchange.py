"""One exchange with a client: its body comes in, bounded; its replies come from the thread that makes them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxmllm.data.samples import Sample
from jaxmllm.eval.answer import Reply
from jaxmllm.eval.sampling import Sampling
from jaxmllm.serve.batches import Batcher, Job, Stopping
from jaxmllm.serve.limits import Limits, Refused

DRAINED = 4  # times the largest body: how much of a larger one is read, so that its sender gets to the answer


class Answers:
    """The replies to one request, from the thread that makes them. As an iterator, (choice, reply so far)."""

    def __init__(self, batcher: Batcher, sample: Sample, samplings: Sequence[Sampling], streams: bool):
        """Raises Refused if the server stops."""
        self.samplings, self.complete = samplings, [Reply("", 0, "")] * len(samplings)
        self.found: asyncio.Queue[tuple[int, Reply | Exception]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.jobs = [Job(sample, each, streams, functools.partial(self._tell, i)) for i, each in enumerate(samplings)]
        try:
            batcher.submit(self.jobs)
        except Stopping:
            raise stopping() from None

    def _tell(self, choice: int, reply: Reply | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self.loop.call_soon_threadsafe(self.found.put_nowait, (choice, reply))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Reply]]:
        while not all(reply.ended for reply in self.complete):
            i, reply = await self.found.get()
            if isinstance(reply, Stopping):
                raise stopping()
            if isinstance(reply, Exception):
                raise Refused(500, "the model failed at this request; the server's terminal says more")
            self.complete[i] = reply
            yield i, reply

    async def all(self) -> list[Reply]:
        """The complete replies."""
        try:
            async for _ in self:
                pass
            return self.complete
        finally:
            self.give_up()

    def give_up(self) -> None:
        """Nobody waits for what is not complete."""
        for job in self.jobs:
            job.given_up = True


class Bounded:
    """Lets only so many requests in at a time, so that what waits takes bounded memory. One whose client takes nothing
    of the response for `seconds` is given up."""

    def __init__(self, app: ASGIApp, most: int, seconds: float):
        self.app, self.most, self.seconds, self.inside = app, most, seconds, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.inside >= self.most:
            text = f"{self.most} requests are waiting or being answered; try again"
            raise Refused(429, text, None, "rate_limit_exceeded")

        async def send_soon(message: Message) -> None:
            async with asyncio.timeout(self.seconds):
                await send(message)

        self.inside += 1
        try:
            await self.app(scope, receive, send_soon)
        finally:
            self.inside -= 1


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request. Raises Refused for one that is too large or too slow."""
    content, size = bytearray(), 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limits.body:
                    content += chunk
                elif size > DRAINED * limits.body:
                    break
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {limits.seconds:g} seconds") from None
    except ClientDisconnect:
        raise Refused(400, "the client left") from None
    if size > limits.body:
        raise Refused(413, f"the body is larger than {limits.body} bytes")
    return bytes(content)


async def unless_gone(request: Request, waiting: Coroutine[Any, Any, list[Reply]]) -> list[Reply]:
    """The result of `waiting`, which is cancelled if the client leaves. Raises Refused then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(waiting), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Refused(400, "the client left")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def stopping() -> Refused:
    """The error for what is not answered any more."""
    return Refused(503, "the server is stopping")
