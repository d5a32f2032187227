"""The `openai` client and lmms-eval drive `jaxmllm serve`, a trained run behind it, unchanged."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, jaxmllm, settings, simulated
from tests.serve_case import data_url, image, text, user

pytestmark = pytest.mark.long
KEY = "a key"
# lmms-eval has an environment of its own (`make test-clients`).
LMMS_PYTHON = Path(os.environ.get("JAXMLLM_CLIENTS", ROOT / ".venv-clients/bin/python"))


@pytest.fixture(scope="module")
def url(scenes, tmp_path_factory):
    """The address of a server, in a process of its own, for a run of a few steps."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    args = settings(scenes, **{"stages.align.steps": 60, "stages.instruct.steps": 30})
    jaxmllm("train", *args, "--workdir", workdir)
    command = [sys.executable, "-m", "jaxmllm", "serve", str(workdir), "--port", "0", "--max-new-tokens", "64"]
    environment = {**simulated(1), "JAXMLLM_API_KEY": KEY}
    process = subprocess.Popen(
        [*command, "--files", str(scenes)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    assert line.startswith("model 'tiny': http://127.0.0.1:"), line
    yield line.split()[2]
    process.terminate()
    assert process.wait(60) == 0


@pytest.fixture(scope="module")
def client(url):
    openai = pytest.importorskip("openai", reason="the extra `clients` is not installed")
    return openai.OpenAI(base_url=url, api_key=KEY, timeout=600)


@pytest.fixture(scope="module")
def rows(scenes):
    return [json.loads(line) for line in open(scenes / "heldout.jsonl")]


def picture_url(scenes, row) -> str:
    return data_url((scenes / row["image"]).read_bytes(), "image/jpeg")


def greedy(client, *messages, **fields):
    return client.chat.completions.create(model="tiny", messages=[*messages], temperature=0, **fields)


def test_openai(client, scenes, rows):
    assert [model.id for model in client.models.list()] == [client.models.retrieve("tiny").id] == ["tiny"]
    question = user(image(picture_url(scenes, rows[0])), text(rows[0]["prompt"]))
    found = greedy(client, question, max_tokens=8)
    said = found.choices[0].message.content
    assert found.model == "tiny" and found.choices[0].finish_reason in ("stop", "length")
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.usage.prompt_tokens > 25 and 1 <= found.usage.completion_tokens <= 8
    by_path = greedy(client, user(image(rows[0]["image"]), text(rows[0]["prompt"])), max_tokens=8)
    assert by_path.choices[0].message.content == said
    turns = question, found.choices[0].message, user("And the umbrellas?")  # its own object goes back to it
    assert greedy(client, *turns, max_tokens=8).usage.prompt_tokens > found.usage.prompt_tokens + 3


def test_openai_streams(client, scenes, rows):
    other = scenes / next(row["image"] for row in rows if row["image"] != rows[0]["image"])
    question = user(image(picture_url(scenes, rows[0])), image(str(other)), text("What differs?"))
    hot = {"temperature": 3.0, "seed": 5, "top_p": 0.95, "max_tokens": 8, "extra_body": {"repetition_penalty": 1.3}}
    create = client.chat.completions.create
    whole = create(model="tiny", messages=[question], **hot)
    again = create(model="tiny", messages=[question], **hot)
    assert again.choices[0].message.content == whole.choices[0].message.content
    chunks = [*create(model="tiny", messages=[question], stream=True, stream_options={"include_usage": True}, **hot)]
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == whole.choices[0].message.content and sum(map(bool, pieces)) > 1
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    words = whole.choices[0].message.content.split()
    stopped = create(model="tiny", messages=[question], stop=f" {words[1]}", **hot)
    assert stopped.choices[0].message.content == words[0] and stopped.choices[0].finish_reason == "stop"
    seeds = create(model="tiny", messages=[question], n=2, **{**hot, "seed": 4}).choices
    assert seeds[1].message.content == whole.choices[0].message.content != seeds[0].message.content


def test_openai_gets_its_errors(client, url):
    import openai

    with pytest.raises(openai.AuthenticationError, match="the key is missing or wrong"):
        openai.OpenAI(base_url=url, api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=[user("why")])
    with pytest.raises(openai.BadRequestError, match="not fetched") as refused:
        greedy(client, user(image("https://example.org/a.jpg")))
    assert refused.value.param == "messages.0.content.0.image_url.url"


def test_the_example_of_the_docs(url, scenes, rows, tmp_path, monkeypatch, capsys):
    example = re.search(r"```python\n(.*?)```", (ROOT / "docs/serve.md").read_text(), re.DOTALL)[1]
    for said, here in {
        "http://127.0.0.1:8000/v1": url,
        'api_key="none"': f'api_key="{KEY}"',
        '"toy"': '"tiny"',
    }.items():
        assert said in example
        example = example.replace(said, here)
    shutil.copy(scenes / rows[0]["image"], tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out


def test_together_as_alone(client, scenes, rows):
    """Requests at the same time, of which batches are made, have the replies of single ones."""
    questions = [user(image(picture_url(scenes, row)), text(row["prompt"])) for row in rows[:6]]
    ask = lambda question: greedy(client, question, max_tokens=16).choices[0].message.content
    single = [ask(question) for question in questions]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, questions)) == single


def test_lmms_eval(url, client, scenes, rows, tmp_path):
    """Its replies are those that single requests get."""
    if not LMMS_PYTHON.exists() or subprocess.run([LMMS_PYTHON, "-c", "import lmms_eval"]).returncode:
        pytest.skip("lmms-eval is not installed in .venv-clients; `make test-clients` does that")
    task = shutil.copytree(ROOT / "tests/lmms_task", tmp_path / "task")
    chosen = [
        {"pictures": [str(scenes / row["image"])] * (1 + i % 2), "question": row["prompt"], "answer": row["answer"]}
        for i, row in enumerate(rows[:10])
    ]
    (tmp_path / "rows.json").write_text(json.dumps(chosen))
    recipe = task / "local.yaml"
    recipe.write_text(recipe.read_text().replace("DATA", str(tmp_path / "rows.json")))
    options = f"model_version=tiny,base_url={url},api_key={KEY},num_cpus=4,max_retries=2"
    command = [LMMS_PYTHON, "-m", "lmms_eval", "--model", "async_openai", "--model_args", options]
    command += ["--tasks", "local_scenes", "--include_path", task, "--output_path", tmp_path / "out", "--log_samples"]
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (results,), (samples,) = (tmp_path / "out").rglob("*results.json"), (tmp_path / "out").rglob("*samples*.jsonl")
    assert json.loads(results.read_text())["results"]["local_scenes"]["answered,none"] == 1.0
    replies = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    asked = [user(*map(image, row["pictures"]), text(row["question"])) for row in chosen]
    assert replies == [greedy(client, each, max_tokens=16).choices[0].message.content for each in asked]
    assert len(replies) == 10 and any(replies)
