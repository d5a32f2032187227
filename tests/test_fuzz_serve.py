"""Bodies of requests altered and broken at random: answered, or refused with a status below 500 in OpenAI's words."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

from jaxmllm.serve.limits import Limits
from tests.fuzz import altered, broken, run, sizes
from tests.serve_case import Counting, data_url, image, png, served, text, user

URL = "/v1/chat/completions"
GOOD = {
    "model": "counting",
    "messages": [
        {"role": "system", "content": "be brief"},
        user(image(data_url(png((5, 4)))), text("why <image 1>"), image("a.png")),
        {"role": "assistant", "content": "because 3", "refusal": None},
        user("why"),
    ],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "repetition_penalty": 1.1,
    "seed": 7,
    "stop": ["and", "the"],
    "max_tokens": 5,
    "n": 2,
    "stream": False,
    "frequency_penalty": 0,
    "response_format": {"type": "text"},
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """Its app raises what would be a status of 500."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "a.png").write_bytes(png((4, 5)))
    with (
        served(Counting(folder / "model"), files=str(folder), limits=Limits(body=1 << 16)) as endpoint,
        TestClient(endpoint.app()) as client,
    ):
        yield client


def checked(response) -> bool:
    """Whether a response answers; otherwise it must refuse in one line."""
    if response.status_code == 200 and response.headers["Content-Type"].startswith("text/event-stream"):
        *pieces, last, rest = response.text.split("\n\n")
        assert last == "data: [DONE]" and not rest
        assert all("error" not in json.loads(piece.removeprefix("data: ")) for piece in pieces)
        return True
    document = response.json()
    if response.status_code == 200:
        assert all(isinstance(choice["message"]["content"], str) for choice in document["choices"])
        return True
    found = document["error"]
    assert 400 <= response.status_code < 500 and found.keys() == {"message", "type", "param", "code"}
    assert 0 < len(found["message"]) <= 3000 and found["message"].isprintable()
    return False


@sizes(100)
def test_altered_requests(client, examples):
    assert checked(client.post(URL, json=GOOD))
    outcomes = []

    def check(body):
        content = json.dumps(body).encode()
        outcomes.append(checked(client.post(URL, content=content, headers={"Content-Type": "application/json"})))

    run(check, examples, altered(GOOD, most=2))
    assert any(outcomes) and not all(outcomes)


@sizes(100)
def test_broken_bodies(client, examples):
    small = {**GOOD, "messages": [user(image(data_url(png((2, 2)))), text("why"))]}
    outcomes = []

    def check(content):
        outcomes.append(checked(client.post(URL, content=content, headers={"Content-Type": "application/json"})))

    run(check, examples, broken(json.dumps(small).encode(), most=2))
    assert not all(outcomes)
