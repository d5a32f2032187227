"""An endpoint whose model only counts: what the tests of `jaxmllm serve` ask, and a process that serves it."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from jaxmllm.data.samples import make_sample
from jaxmllm.eval.answer import Reply
from jaxmllm.serve import requests, server
from jaxmllm.serve.app import Endpoint
from jaxmllm.serve.batches import Batcher
from jaxmllm.serve.limits import Limits
from tests.loader_case import sample_spec

MOST = 40  # tokens of a reply
URL = "/v1/chat/completions"


class Counting:
    """In place of an Answerer: a reply says how many tokens and pictures it is about, and the seed, a word at a time.

    batches: (samples, samplings, rows, every) of each batch. gate: each step of a reply waits for it.
    """

    def __init__(self, root: Path, endless: bool = False):
        self.endless = endless  # replies of batches that begin go on until they are given up
        self.spec = dataclasses.replace(sample_spec(root), targets=None)
        self.generator = SimpleNamespace(most=MOST)
        self.batches, self.gate, self.given_up = [], threading.Event(), set()
        self.gate.set()
        self.broken = ""  # what a batch fails with

    def sample(self, question):
        return make_sample(question.record(), 0, self.spec, reply_open=True)

    def up_to(self, most: int) -> Counting:
        return self

    def replies(self, samples, samplings, rows, every, length, given_up) -> Iterator[list[Reply]]:
        assert len(samples) == len(samplings) <= rows and all(len(s.tokens) <= length for s in samples)
        self.batches.append((samples, samplings, rows, every))
        self.given_up = given_up
        endless = self.endless
        if self.broken:
            raise RuntimeError(self.broken)
        for count in itertools.count(1):
            self.gate.wait()
            if endless:
                time.sleep(0.02)
            found = [
                Reply("tokens" + " and" * count, count, "") if endless else so_far(*each, count)
                for each in zip(samples, samplings)
            ]
            yield found
            if all(reply.ended or row in given_up for row, reply in enumerate(found)):
                return


def so_far(sample, sampling, count: int) -> Reply:
    """The reply after so many tokens."""
    seed = f" seed {sampling.seed}" if sampling.temperature else ""
    words = f"{len(sample.tokens)} tokens and {sample.image_count} pictures{seed} ,".split(" ")
    most = min(sampling.max_new_tokens or MOST, MOST)
    text = " ".join(words[: min(count, most)])
    for stop in sampling.stop:
        if stop in text:
            return Reply(text[: text.index(stop)], count, "stop")
    ended = "stop" if count > len(words) else "length" if count >= most else ""
    return Reply(text, min(count, len(words) + 1, most), ended)


def png(size: tuple[int, int] = (9, 7), seed: int = 0) -> bytes:
    """A PNG of noise."""
    file = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    """The content as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image(url: str) -> dict:
    """A part of a message."""
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict:
    """A part of a message."""
    return {"type": "text", "text": words}


def user(*parts: dict | str) -> dict:
    """A question: one text, or parts."""
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else [*parts]}


@contextlib.contextmanager
def served(model: Counting, **options) -> Iterator[Endpoint]:
    """An endpoint; its thread ends with it."""
    limits = options.pop("limits", Limits())
    batcher = Batcher(model, limits.rows, lambda line: None)
    try:
        yield Endpoint(batcher, "counting", limits, **{"hosts": None, "say": lambda line: None, **options})
    finally:
        model.gate.set()
        batcher.stop(0)


def main() -> None:
    """Serves in this process, until a signal. Arguments: "endless": replies are never complete; "patient": when it is
    told to stop, replies in the making have the usual time; "key": requests need the key "secret"."""
    server.GRACE = server.GRACE if "patient" in sys.argv else 0.5
    with tempfile.TemporaryDirectory() as folder:
        model, bound = Counting(Path(folder), "endless" in sys.argv), server.bound_socket("127.0.0.1", 0)
    say = lambda line: print(line, file=sys.stderr, flush=True)
    batcher = Batcher(model, 4, say)
    app = Endpoint(batcher, "counting", key="secret" if "key" in sys.argv else None, say=say).app()
    server.Server(app, batcher, lambda: print(server.address_of(bound), flush=True), say).run([bound])
    server.leave(0)


PICTURE = data_url(png())


def ask(client, *messages, **fields):
    """The response to a request, by default greedy."""
    return client.post(URL, json={"messages": [*messages], "temperature": 0, **fields})


def content(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def error(response) -> dict:
    found = response.json()
    assert found.keys() == {"error"} and found["error"].keys() == {"message", "type", "param", "code"}
    assert "\n" not in found["error"]["message"] and found["error"]["message"]
    return found["error"]


def question(*messages: dict):
    """The question of these messages."""
    asked = requests.parse(json.dumps({"messages": [*messages]}).encode(), Limits(pictures=3))
    return requests.question(asked.messages, Limits(pictures=3), lambda url, place: f"{place}={url}")


if __name__ == "__main__":
    main()
