"""`jaxmllm serve`: requests together, clients that leave, faults and signals."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import json
import signal
import subprocess
import sys
import threading
import time

import pytest
from starlette.testclient import TestClient

from jaxmllm.serve import batches, server
from jaxmllm.serve.exchange import Bounded
from jaxmllm.serve.limits import Limits
from tests.conftest import ROOT
from tests.serve_case import URL, Counting, ask, content, error, served, user


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
