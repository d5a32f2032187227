"""`jaxmllm serve`: what it refuses, in requests and of the command, and how."""

from __future__ import annotations

import json
import socket
import sys

import pytest
from starlette.testclient import TestClient

from jaxmllm.cli.main import main
from jaxmllm.serve import requests, server
from jaxmllm.serve.limits import Limits, Refused
from tests.serve_case import MOST, PICTURE, URL, ask, content, data_url, error, image, question, served, text, user

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
