"""The routes of the endpoint: who may ask, how much, and what is sent back."""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxmllm.data.samples import Sample
from jaxmllm.data.sources.record import BadSample
from jaxmllm.errors import shown
from jaxmllm.eval.conversation import new_text
from jaxmllm.eval.sampling import Sampling
from jaxmllm.serve import pictures, requests
from jaxmllm.serve.batches import Batcher
from jaxmllm.serve.exchange import Answers, Bounded, read_body, unless_gone
from jaxmllm.serve.limits import Limits, Refused
from jaxmllm.serve.replies import Completion, event

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Endpoint:
    """Answers for one model.

    name: of the model. key: what requests must bring, None if they need none. hosts: names under which clients reach
    it, None for any; otherwise a page of a stranger could make a browser ask here under a name of its own. files: the
    folder whose files requests may name. say: prints a line.
    """

    def __init__(
        self,
        batcher: Batcher,
        name: str,
        limits: Limits = Limits(),
        key: str | None = None,
        hosts: Sequence[str] | None = LOOPBACK,
        files: str | None = None,
        say: Callable[[str], None] = print,
    ):
        self.batcher, self.name, self.limits, self.key, self.files, self.say = batcher, name, limits, key, files, say
        self.hosts, self.created = hosts, int(time.time())
        # Few threads decode pictures, since a large one takes a gigabyte.
        self.threads = anyio.CapacityLimiter(os.cpu_count() or 1)
        self.page = (Path(__file__).parent / "page.html").read_text()

    def app(self) -> Starlette:
        """The routes."""
        routes = [
            Route("/", self.show_page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route(
                "/v1/chat/completions",
                self.complete,
                methods=["POST"],
                middleware=[Middleware(Bounded, most=self.limits.requests, seconds=self.limits.seconds)],
            ),
        ]
        handlers = {Refused: refused, HTTPException: not_found, Exception: self.failed}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def show_page(self, request: Request) -> Response:
        """The chat page, which may run only its own script and talk only to this server."""
        script = re.search(r"<script>(.*)</script>", self.page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = (
            f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        return HTMLResponse(self.page, headers=headers)

    async def health(self, request: Request) -> Response:
        """Whether requests are taken, and how many replies wait for their batch."""
        stopping = self.batcher.deadline is not None
        document = {"status": "stopping" if stopping else "ok", "waiting": self.batcher.waiting}
        return JSONResponse(document, 503 if stopping else 200)

    async def models(self, request: Request) -> Response:
        """The list of the one model."""
        self.check_client(request)
        return JSONResponse({"object": "list", "data": [self.model_document()]})

    async def model(self, request: Request) -> Response:
        """The model of a name."""
        self.check_client(request)
        self.check_model(request.path_params["name"])
        return JSONResponse(self.model_document())

    def model_document(self) -> dict:
        """The model as OpenAI describes one."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "jaxmllm"}

    async def complete(self, request: Request) -> Response:
        """A chat completion."""
        self.check_client(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Also since a browser sends this type to another site only if that allows it.
            raise Refused(400, "the header Content-Type must be application/json")
        prepare = functools.partial(self.prepare, await read_body(request, self.limits))
        asked, sample, samplings = await anyio.to_thread.run_sync(prepare, limiter=self.threads)
        del prepare  # the body, which may be large
        completion = Completion(self.name, len(sample.tokens))
        answers = Answers(self.batcher, sample, samplings, asked.stream)
        if asked.stream:
            events = self.events(answers, completion, asked.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return JSONResponse(completion.document(await unless_gone(request, answers.all())))

    def prepare(self, content: bytes) -> tuple[requests.ChatRequest, Sample, list[Sampling]]:
        """What a body asks for, its pictures decoded. Raises Refused."""
        asked = requests.parse(content, self.limits)
        self.check_model(asked.model)
        samplings = requests.samplings(asked, self.limits, self.batcher.most)

        def read(url: str, place: str):
            return pictures.picture(url, place, self.limits, self.files)

        question = requests.question(asked.messages, self.limits, read)
        try:
            return asked, self.batcher.answerer.sample(question), samplings
        except BadSample as bad:
            of_picture = bad.path != question.place
            raise Refused(400, f"{bad.reason} ({bad.path})" if of_picture else bad.reason, bad.path) from None

    async def events(self, answers: Answers, completion: Completion, usage: bool) -> AsyncIterator[bytes]:
        """The events of a stream."""
        said = [""] * len(answers.samplings)
        try:
            for i in range(len(said)):
                yield event(completion.chunk(i, {"role": "assistant", "content": ""}, usage=usage))
            async for i, reply in answers:
                piece = new_text(said[i], reply, answers.samplings[i].stop)
                said[i] += piece
                if piece:
                    yield event(completion.chunk(i, {"content": piece}, usage=usage))
                if reply.ended:
                    yield event(completion.chunk(i, {}, reply.ended, usage))
            if usage:
                yield event(completion.counts(answers.complete))
            yield event("[DONE]")
        except Refused as error:
            yield event(error.document())
        finally:
            answers.give_up()

    def check_client(self, request: Request) -> None:
        """Raises Refused for a client that may not ask."""
        if self.hosts is not None and host_of(request) not in self.hosts:
            raise Refused(400, f"this server does not answer under the name {host_of(request)}; it is {self.hosts[0]}")
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1"), (self.key or "").encode())
        if self.key and not (same and kind.lower() == "bearer"):
            text = "the key is missing or wrong; send it as Authorization: Bearer KEY"
            raise Refused(401, text, None, "invalid_api_key")

    def check_model(self, name: str | None) -> None:
        """Raises Refused for a model that is not here."""
        if name is not None and name != self.name:
            raise Refused(404, f"there is no model {name!r}; this server has {self.name!r}", "model", "model_not_found")

    def failed(self, request: Request, error: Exception) -> Response:
        """The response to a fault of this program."""
        self.say(shown(f"{request.method} {request.url.path} failed: {type(error).__name__}: {error}", 500))
        return refused(request, Refused(500, "the server failed at this request; its terminal says more"))


def host_of(request: Request) -> str | None:
    """The name under which a client reached the server; None if it gives none that can be read."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return None


def refused(request: Request, error: Refused) -> Response:
    """An error as OpenAI's clients expect it."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.document(), error.status, headers)


def not_found(request: Request, error: HTTPException) -> Response:
    """The response for a path or method that there is not."""
    path, text = request.url.path, f"there is nothing at {request.url.path}; /v1/ has the API"
    if error.status_code == 405:
        text = f"{request.method} is not for {path}"
    response = refused(request, Refused(error.status_code, text))
    response.headers.update(error.headers or {})
    return response
