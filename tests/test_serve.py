"""`jaxmllm serve`: requests, refusals, limits, batches and streams, with a model that only counts."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from starlette.testclient import TestClient

from jaxmllm.cli.main import main
from jaxmllm.serve import batches, requests, server
from jaxmllm.serve.exchange import Bounded
from jaxmllm.serve.limits import Limits, Refused
from tests.conftest import ROOT
from tests.serve_case import MOST, Counting, data_url, image, png, served, text, user

URL = "/v1/chat/completions"
PICTURE = data_url(png())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a picture, beside it another one, and a link to that."""
    root = tmp_path_factory.mktemp("served") / "pictures"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a b.png").write_bytes(png())
    (root / "large.png").write_bytes(png((200, 200)))
    (root.parent / "secret.png").write_bytes(png())
    os.symlink(root.parent / "secret.png", root / "link.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Counting(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def anew(model):
    model.batches.clear()


@pytest.fixture(scope="module")
def endpoint(model, folder):
    limits = Limits(requests=16, body=200_000, picture=100_000, pictures=3, rows=4)
    with served(model, files=str(folder), limits=limits) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def client(endpoint):
    with TestClient(endpoint.app()) as client:
        yield client


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


def test_a_reply_has_the_shape_of_openais(client):
    response = ask(client, user("why 1 2"), model="counting")
    found = response.json()
    assert found.pop("id").startswith("chatcmpl-") and found.pop("created") > 1.7e9
    message = {"role": "assistant", "content": "5 tokens and 0 pictures ,", "refusal": None}
    assert found == {
        "object": "chat.completion",
        "model": "counting",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
    }


def test_lengths_and_stop_texts(client):
    for name in ("max_tokens", "max_completion_tokens"):
        found = ask(client, user("why"), **{name: 3}).json()
        assert found["choices"][0]["message"]["content"] == "3 tokens and"
        assert found["choices"][0]["finish_reason"] == "length" and found["usage"]["completion_tokens"] == 3
    for stop in (" and", ["no such", " and"]):
        found = ask(client, user("why"), stop=stop).json()["choices"][0]
        assert (found["message"]["content"], found["finish_reason"]) == ("3 tokens", "stop")


def test_choices_and_seeds(client, model):
    found = ask(client, user("why"), temperature=1.0, seed=2**32 - 1, n=3).json()
    said = [choice["message"]["content"] for choice in found["choices"]]
    assert said == [f"3 tokens and 0 pictures seed {seed} ," for seed in (2**32 - 1, 0, 1)]
    assert found["usage"]["completion_tokens"] == 27 and found["usage"]["prompt_tokens"] == 3
    ask(client, user("why"), temperature=0.5, top_p=0.5, seed=-1, top_k=7, repetition_penalty=1.25)
    (used,) = model.batches[-1][1]
    assert dataclasses.astuple(used) == (0.5, 7, 0.5, 1.25, 2**32 - 1, None, ())
    assert content(client.post(URL, json={"messages": [user("why")]})) != content(
        client.post(URL, json={"messages": [user("why")]})
    )  # without a seed, and with OpenAI's temperature of 1, replies differ


def test_fields_that_change_nothing_are_let_pass(client):
    fields = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False, "tools": None,
        "user": "me", "response_format": {"type": "text"}, "stream": False, "stream_options": None,
        "metadata": {"a": "b"}, "parallel_tool_calls": True, "stop": None, "seed": None, "max_tokens": None,
    }  # fmt: skip
    said = {"role": "assistant", "content": "1", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    assert content(ask(client, user("why"), said, user("2"), **fields)).startswith("8 tokens")


def question(*messages: dict):
    """The question of these messages."""
    asked = requests.parse(json.dumps({"messages": [*messages]}).encode(), Limits(pictures=3))
    return requests.question(asked.messages, Limits(pictures=3), lambda url, place: f"{place}={url}")


def test_messages_become_a_question():
    system, developer = (
        {"role": "system", "content": "be"},
        {"role": "developer", "content": [text("brief"), text("!")]},
    )
    said = {"role": "assistant", "content": [text("one "), text("frog")]}
    found = question(system, developer, user(image("a"), text("what"), image("b")), said, user(text("and"), image("c")))
    assert found.system == "be\n\nbrief\n!" and found.history == (("<image>\nwhat\n<image>", "one frog"),)
    places = "messages.2.content.0", "messages.2.content.2", "messages.4.content.1"
    assert found.images == tuple(f"{place}.image_url.url={url}" for place, url in zip(places, "abc"))
    assert found.prompt == "and\n<image>" and found.markers_are_text
    marked = question(user(image("a"), image("b"), text("is <image> like <image>?")))
    assert marked.prompt == "is <image> like <image>?" and len(marked.images) == 2


def test_the_model_sees_the_pictures(client):
    assert content(ask(client, user(image(PICTURE), text("why <video> <image 1>")))).split()[3] == "1"
    assert content(ask(client, user(image(PICTURE), image(PICTURE)), max_tokens=4)).split()[3] == "2"
    turns = (
        user(image(PICTURE)),
        {"role": "assistant", "content": "an <image>"},
        user(
            "why",
        ),
    )
    assert content(ask(client, *turns)).split()[3] == "1"


def test_the_model_reads_system_texts(client):
    brief, kind = {"role": "system", "content": "why 1"}, {"role": "developer", "content": "2 3 4"}
    assert content(ask(client, user("why"))).startswith("3 tokens")
    assert content(ask(client, brief, user("why"))).startswith("5 tokens")
    assert content(ask(client, brief, kind, user("why"))).startswith("8 tokens")


def test_files_of_one_folder(client, folder):
    for url in ("sub/a b.png", f"{folder}/sub/a b.png", f"file://{folder}/sub/a%20b.png", f"FILE:{folder}/sub/a b.png"):
        assert content(ask(client, user(image(url)))).split()[3] == "1"


@pytest.mark.parametrize(
    "url, says",
    [
        ("https://example.org/a.png", "pictures are not fetched from http(s) URLs"),
        ("HTTP://169.254.169.254/a.png", "pictures are not fetched from http(s) URLs"),
        ("ftp://example.org/a.png", "ftp: URLs are not read"),
        ("../secret.png", "../secret.png: it is not in the folder"),
        ("/etc/passwd", "/etc/passwd: it is not in the folder"),
        ("link.png", "link.png: it is not in the folder"),
        ("file:///etc/passwd", "it is not in the folder"),
        ("file://elsewhere/a.png", "a file URL has three slashes"),
        ("a\0.png", "it is not in the folder"),
        ("gone.png", "gone.png: No such file"),
        ("sub", "sub: it is a folder"),
        ("", ": it is a folder"),
        ("x" * 5000, "File name too long"),
        ("data:image/png,abc", "a data URL must begin as data:image/png;base64"),
        ("data:text/html;base64,abcd", "a data URL must begin"),
        ("data:image/png;base64,ab*d", "it is not base64"),
        ("data:image/png;base64,abc", "it is not base64"),
        ("data:image/png;base64,é", "it is not base64"),
        ("data:image/png;base64,", "unreadable picture"),
        (data_url(png()[:60]), "unreadable picture"),
        (data_url(b"GIF89a" + bytes(50)), "unreadable picture"),
    ],
)
def test_pictures_that_are_refused(client, model, url, says):
    response = ask(client, user(image(url), text("why")))
    found = error(response)
    assert response.status_code == 400 and says in found["message"] and len(found["message"]) < 1100
    assert found["param"] == "messages.0.content.0.image_url.url" and not model.batches


def test_files_are_read_only_if_asked_for(model, folder):
    with served(model) as endpoint:
        found = error(ask(TestClient(endpoint.app()), user(image(f"{folder}/sub/a b.png"))))
    assert "this server reads no files" in found["message"] and "--files FOLDER" in found["message"]


ASSISTANT = {"role": "assistant", "content": "1"}
SYSTEM = {"role": "system", "content": "be"}


@pytest.mark.parametrize(
    "fields, status, param, says",
    [
        ({"messages": []}, 400, "messages", "should not be empty"),
        ({"messages": "why"}, 400, "messages", "valid list"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "is missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": [3]}]}, 400, "messages.0.content.0", "text or image_url"),
        ({"messages": [user({"type": "input_audio"})]}, 400, "messages.0.content.0", "text or image_url"),
        ({"messages": [user({"type": "text", "text": 3})]}, 400, "messages.0.content.0.text", "valid string"),
        (
            {"messages": [user({"type": "image_url", "image_url": "x"})]},
            400,
            "messages.0.content.0.image_url",
            "object",
        ),
        ({"messages": [user(text("a") | {"x": 1})]}, 400, "messages.0.content.0.x", "there is no field"),
        ({"messages": [user("a") | {"name": "me"}]}, 400, "messages.0.name", "there is no field"),
        ({"messages": [user("a"), ASSISTANT]}, 400, "messages", "the last message must be a question"),
        ({"messages": [ASSISTANT, user("a")]}, 400, "messages.0.role", "a question first"),
        ({"messages": [user("a"), user("b")]}, 400, "messages.1.role", "alternate"),
        ({"messages": [user("a"), SYSTEM]}, 400, "messages.1.role", "before the first question"),
        ({"messages": [SYSTEM]}, 400, "messages", "the last message must be a question"),
        ({"messages": [user("an <image>")]}, 400, "messages.0.content", "1 times, but it has 0 pictures"),
        ({"messages": [SYSTEM | {"content": [image(PICTURE)]}, user("a")]}, 400, "messages.0.content", "no pictures"),
        ({"messages": [user(*[image(PICTURE)] * 4)]}, 413, "messages", "there are 4 pictures; the limit is 3"),
        ({"messages": [user("why " * 50)]}, 400, "messages", "too long: 52 tokens, but a row has 48"),
        ({"messages": [user("\ud800")]}, 400, None, "half of a surrogate pair"),
        ({"messages": [user("\ufdd0")]}, 400, "messages", "broken text"),
        ({"temprature": 1}, 400, "temprature", "did you mean 'temperature'?"),
        ({"temperature": "1"}, 400, "temperature", "valid number"),
        ({"temperature": -0.1}, 400, "temperature", "greater than or equal to 0"),
        ({"temperature": float("nan")}, 400, "temperature", "finite"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"top_k": 2**31}, 400, "top_k", "less than"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty", "0.01"),
        ({"seed": 0.5}, 400, "seed", "integer"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"n": 5}, 400, "n", "at most 4 choices (--batch)"),
        ({"stop": ""}, 400, "stop", "16 stop texts"),
        ({"stop": ["x"] * 17}, 400, "stop", "16 stop texts"),
        ({"stop": [3]}, 400, "stop.0", "valid string"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": MOST + 1}, 400, "max_tokens", f"--max-new-tokens {MOST + 1}"),
        ({"max_completion_tokens": MOST + 1}, 400, "max_completion_tokens", f"at most {MOST} tokens"),
        ({"max_completion_tokens": 2, "max_tokens": 3}, 400, "max_tokens", "differ"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "is not supported"),
        ({"tools": [{}]}, 400, "tools", "is not supported"),
        ({"logprobs": True}, 400, "logprobs", "is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "is not supported"),
        ({"stream": 1}, 400, "stream", "boolean"),
        ({"stream_options": {"x": 1}}, 400, "stream_options.x", "there is no field"),
        ({"model": "gpt"}, 404, "model", "there is no model 'gpt'; this server has 'counting'"),
    ],
)
def test_requests_that_are_refused(client, model, fields, status, param, says):
    body = json.dumps({"messages": [user("why")], **fields})
    response = client.post(URL, content=body, headers={"Content-Type": "application/json"})
    found = error(response)
    assert (response.status_code, found["param"]) == (status, param) and says in found["message"]
    assert found["type"] == "invalid_request_error" and not model.batches


@pytest.mark.parametrize(
    "body, status, says",
    [
        (b"", 400, "not JSON"),
        (b"[]", 400, "must be a JSON object, not a list"),
        (b'{"messages": ', 400, "not JSON"),
        (b'\xff{"a": 1}', 400, "not UTF-8 at byte 0"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", 400, "nested deeper"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "not JSON"),
        (b"[" + b"{}," * 150_000 + b"{}]", 413, "larger than 200000 bytes"),
        (b" " * 2_000_000, 413, "larger than 200000 bytes"),
    ],
    ids=range(8),
)
def test_bodies_that_are_refused(client, body, status, says):
    for sent in (body, iter([body])):  # with and without Content-Length
        response = client.post(URL, content=sent, headers={"Content-Type": "application/json"})
        assert response.status_code == status and says in error(response)["message"]


def test_limits(client):
    response = ask(client, user(image(data_url(bytes(100_003)))))
    assert response.status_code == 413 and "a picture may have 100000 bytes" in error(response)["message"]
    response = ask(client, user(image("large.png")))
    assert response.status_code == 413 and "large.png: a picture may have 100000" in error(response)["message"]
    with pytest.raises(Refused, match="the texts have 1048577 characters; the limit is 1048576"):
        question(user("w" * (1 << 20)), {"role": "assistant", "content": "w"}, user(""))
    with pytest.raises(Refused, match="more than 262144 commas and brackets"):
        requests.parse(b'{"a": [' + b"0," * 2**18 + b"0]}", Limits())


def test_other_paths_methods_and_types(client):
    found = client.get("/v1/models").json()
    assert found["object"] == "list" and found["data"] == [client.get("/v1/models/counting").json()]
    assert found["data"][0].items() >= {"id": "counting", "object": "model"}.items()
    assert client.get("/v1/models/gpt").status_code == 404
    assert error(client.get("/v2"))["message"] == "there is nothing at /v2; /v1/ has the API"
    response = client.get(URL)
    assert response.status_code == 405 and response.headers["allow"] == "POST" and error(response)
    response = client.post(URL, content=b'{"messages": []}', headers={"Content-Type": "text/plain"})
    assert response.status_code == 400 and "Content-Type" in error(response)["message"]


def test_the_page_runs_only_its_own_script(client):
    page = client.get("/")
    assert page.text.count("<script>") == 1 and not {"http:", "https:", "//cdn"} & set(page.text.split('"'))
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'sha256-" in policy and "connect-src 'self'" in policy


def test_a_key(model):
    with served(model, key="kéy") as endpoint:
        client = TestClient(endpoint.app())
        for given in (None, "Bearer", "Bearer wrong", "Basic kéy", "kéy"):
            headers = {"Authorization": given.encode()} if given else {}
            for response in (client.get("/v1/models", headers=headers), client.post(URL, headers=headers)):
                assert response.status_code == 401 and error(response)["code"] == "invalid_api_key"
                assert response.headers["WWW-Authenticate"] == "Bearer"
        headers = {"Authorization": "Bearer kéy".encode()}
        assert client.get("/v1/models", headers=headers).status_code == 200
        assert content(client.post(URL, json={"messages": [user("why")]}, headers=headers))
        assert client.get("/health").json() == {"status": "ok", "waiting": 0} and client.get("/").status_code == 200


def test_only_its_own_names(model):
    """So that the page of a stranger, whose name points at this machine, cannot ask."""
    with served(model, hosts=("127.0.0.1", "localhost", "::1")) as endpoint:
        client = TestClient(endpoint.app())
        for host in ("127.0.0.1:8000", "localhost", "[::1]:80"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200
        for host in ("evil.org", "127.0.0.1.evil.org:8000", "[::1", ""):
            response = client.get("/v1/models", headers={"Host": host})
            assert response.status_code == 400 and "does not answer under the name" in error(response)["message"]


def in_threads(client, bodies: list[dict]) -> list:
    """Futures of the responses to requests that are sent at the same time."""
    pool = concurrent.futures.ThreadPoolExecutor(len(bodies))
    return [pool.submit(lambda body: client.post(URL, json=body), body) for body in bodies]


def until(true) -> None:
    """Waits until true() is."""
    for _ in range(6000):
        if true():
            return
        time.sleep(0.005)
    raise TimeoutError


def test_what_arrives_together_is_one_batch(client, endpoint, model):
    bodies = [{"messages": [user("why" + " 1" * k)], "temperature": float(k % 2), "seed": k} for k in range(10)]
    single = [content(client.post(URL, json=body)) for body in bodies]
    assert len(set(single)) == 10 and [len(batch[0]) for batch in model.batches] == [1] * 10
    model.batches.clear()
    model.gate.clear()
    first = in_threads(client, bodies[:1])
    until(lambda: model.batches)
    others = in_threads(client, bodies[1:])
    until(lambda: endpoint.batcher.waiting == 9)
    model.gate.set()
    assert [content(future.result()) for future in first + others] == single
    assert [(len(batch[0]), batch[2]) for batch in model.batches] == [(1, 1), (4, 4), (4, 4), (1, 1)]


def test_a_long_reply_keeps_nobody_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "PATIENCE", 0.1)
    model = Counting(tmp_path, endless=True)
    with served(model, limits=Limits(rows=1)) as endpoint, TestClient(endpoint.app()) as client:
        long = in_threads(client, [{"messages": [user("why")]}])
        until(lambda: model.batches)
        model.endless = False
        assert content(ask(client, user("why"))) and content(ask(client, user("why"))) and not long[0].done()
        assert len(model.batches) == 3
        model.broken = "a fault"
        assert ask(client, user("why")).status_code == 500 and not long[0].done()
        endpoint.batcher.stop(0)
        assert long[0].result().status_code == 503


def test_a_client_that_takes_nothing():
    async def response(scope, receive, send):
        await send({})

    async def stuck(message):
        await asyncio.sleep(60)

    bounded = Bounded(response, most=1, seconds=0.05)
    with pytest.raises(TimeoutError):
        asyncio.run(bounded({}, None, stuck))
    assert bounded.inside == 0


def test_too_many_requests(client, endpoint, model):
    model.gate.clear()
    inside = in_threads(client, [{"messages": [user("why")]}] * 16)
    until(lambda: endpoint.batcher.waiting + sum(len(batch[0]) for batch in model.batches) == 16)
    response = ask(client, user("why"))
    assert response.status_code == 429 and response.headers["Retry-After"]
    assert error(response)["code"] == "rate_limit_exceeded" and "16 requests" in error(response)["message"]
    model.gate.set()
    assert all(content(future.result()) for future in inside) and content(ask(client, user("why")))


def events(response) -> list:
    """The documents of a stream."""
    assert response.status_code == 200 and response.headers["Content-Type"].startswith("text/event-stream")
    *found, last, rest = response.text.split("\n\n")
    assert last == "data: [DONE]" and not rest and all(line.startswith("data: ") for line in found)
    return [json.loads(line.removeprefix("data: ")) for line in found]


def test_a_stream_says_the_same(client, model):
    fields = {"temperature": 1.0, "seed": 5, "n": 2, "stop": " ,"}
    whole = ask(client, user(image(PICTURE), text("why")), **fields).json()
    found = events(ask(client, user(image(PICTURE), text("why")), stream=True, **fields))
    assert {event["object"] for event in found} == {"chat.completion.chunk"} and len({e["id"] for e in found}) == 1
    assert not any("usage" in event for event in found)
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in found if event["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""} and mine[-1]["delta"] == {}
        pieces = [piece["delta"]["content"] for piece in mine[1:-1]]
        assert "".join(pieces) == choice["message"]["content"] and len(pieces) == 7
        assert [piece["finish_reason"] for piece in mine] == [None] * 8 + ["stop"]
    *others, last = events(
        ask(client, user(image(PICTURE), text("why")), stream=True, stream_options={"include_usage": True}, **fields)
    )
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in others)
    assert [batch[3] for batch in model.batches] == [16, 1, 1]  # tokens between two looks


def test_a_batch_that_fails(client, model):
    model.broken = "out of memory\nand a second line"
    response = ask(client, user("why"))
    assert response.status_code == 500 and error(response)["type"] == "server_error"
    assert "out of memory" not in response.text
    response = ask(client, user("why"), stream=True)
    *_, last, rest = response.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error" and not rest
    model.broken = ""
    assert content(ask(client, user("why")))


def test_a_fault_of_the_program(model, monkeypatch):
    lines = []
    with served(model, say=lines.append) as endpoint:
        monkeypatch.setattr(endpoint, "prepare", lambda content: 1 / 0)
        response = ask(TestClient(endpoint.app(), raise_server_exceptions=False), user("why"))
    assert response.status_code == 500 and error(response)["type"] == "server_error"
    assert "division" not in response.text and "Traceback" not in response.text
    assert lines == [f"POST {URL} failed: ZeroDivisionError: division by zero"]


@pytest.fixture(scope="module")
def listening(tmp_path_factory):
    """A server in a thread, whose replies never end: its model and its port."""
    model = Counting(tmp_path_factory.mktemp("endless"), endless=True)
    ready = threading.Event()
    with served(model, limits=Limits(seconds=1)) as endpoint:
        bound = server.bound_socket("127.0.0.1", 0)
        running = server.Server(endpoint.app(), endpoint.batcher, ready.set, print)
        thread = threading.Thread(target=running.run, args=([bound],))
        thread.start()
        assert ready.wait(30)
        yield model, bound.getsockname()[1]
        running.should_exit = True
        endpoint.batcher.stop(0)
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_made_for_a_client_that_left(listening, stream):
    model, port = listening
    before = len(model.batches)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = json.dumps({"messages": [user("why")], "stream": stream})
    connection.request("POST", URL, body, {"Content-Type": "application/json"})
    until(lambda: len(model.batches) > before)
    if stream:
        assert connection.getresponse().read(100).startswith(b"data: ")
    assert not model.given_up
    connection.close()
    until(lambda: model.given_up == {0})


def test_a_body_that_does_not_arrive(listening):
    connection = http.client.HTTPConnection("127.0.0.1", listening[1])
    connection.putrequest("POST", URL)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b"{")
    response = connection.getresponse()
    assert response.status == 408 and "within 1 seconds" in response.read().decode()


@pytest.mark.parametrize("number, again", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_signals_end_it(number, again):
    """A reply in the making ends with an error after the time of grace, short here; a second signal ends everything."""
    command = [sys.executable, "-m", "tests.serve_case", "endless", *(["patient"] if again else [])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:")
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("POST", URL, json.dumps({"messages": [user("why")]}), {"Content-Type": "application/json"})
    assert "the first sampled batch" in process.stderr.readline()
    process.send_signal(number)
    assert process.stderr.readline().startswith(f"{number.name}: no request is taken any more")
    if again:
        time.sleep(2 * server.ONE)
        process.send_signal(number)
    else:
        response = connection.getresponse()
        assert response.status == 503 and "stopping" in json.loads(response.read())["error"]["message"]
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == (128 + number if again else 0)


def test_what_the_command_refuses(tmp_path, capsys, monkeypatch):
    def line(*args) -> str:
        assert main(["serve", str(tmp_path), *map(str, args)]) == 2
        (found,) = capsys.readouterr().err.splitlines()
        return found

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert line("--port", port) == (
            f"jaxmllm: 127.0.0.1, port {port}: Address already in use; choose another with --host or --port"
        )
    assert "from 0 to 65535, not 70000" in line("--port", 70000) and "no.such.host.invalid" in line(
        "--host", "no.such.host.invalid"
    )
    assert "--files gone: there is no such folder" in line("--files", "gone")
    for option in ("--batch", "--queue", "--max-new-tokens", "--max-body", "--max-picture", "--max-pictures"):
        assert line(option, 0) == f"jaxmllm: {option} must be 1 or more, not 0"
    assert str(tmp_path) in line("--port", 0)  # there is no run
    for name in [name for name in sys.modules if name.split(".")[0] == "uvicorn" or name == "jaxmllm.serve.server"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("jaxmllm.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert line() == 'jaxmllm: jaxmllm serve needs uvicorn: pip install "jaxmllm[serve]"'


def test_addresses():
    assert server.is_loopback("127.0.0.1") and server.is_loopback("::1") and server.is_loopback("localhost")
    assert not server.is_loopback("0.0.0.0") and not server.is_loopback("example.org")
