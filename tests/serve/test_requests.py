"""`jaxmllm serve`: what requests may say, and the replies, with a model that only counts."""

from __future__ import annotations

import dataclasses
import json

import pytest
from starlette.testclient import TestClient

from tests.serve_case import PICTURE, URL, ask, content, data_url, error, image, png, question, served, text, user


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
