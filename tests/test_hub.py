"""hf:org/name@revision against a server of our own that answers as the hub does."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from tests.conftest import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors.index.json": b"index",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "tokenizer.json": b"tokenizer",
    "preprocessor_config.json": b"pictures",
    "pytorch_model.bin": b"the same weights again",
    "consolidated.safetensors": b"and again",
    "original/model.safetensors": b"and again",
}
WANTED = {name for name in FILES if name.startswith(("config", "model", "tokenizer", "preprocessor"))}


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, org/name, whose branch main and tag v1 are COMMIT; org/gated needs a token."""

    asked: list[str] = []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.asked.append(f"{self.command} {path}")
        if path.startswith("/api/models/org/gated"):
            return self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        if not path.startswith(("/api/models/org/name/", "/org/name/")):
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if "/revision/" in path:
            if path.rsplit("/", 1)[1] not in ("main", "v1", COMMIT):
                return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return self.send(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": []}).encode())
        if "/tree/" in path:
            files = [{"type": "file", "path": k, "size": len(x), "oid": etag(x)} for k, x in FILES.items()]
            return self.send(200, json.dumps(files).encode())
        content = FILES[path.removeprefix(f"/org/name/resolve/{COMMIT}/")]
        self.send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(content)}"'}, body)

    def send(self, status: int, content: bytes, headers: dict | None = None, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="module")
def endpoint():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def download(source: str, home, endpoint: str, offline: bool = False) -> str:
    """What a process of its own prints: the source's name and the folder, or the error."""
    process = start(source, home, endpoint, offline)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out.strip()


def start(source: str, home, endpoint: str, offline: bool = False) -> subprocess.Popen:
    script = (
        "import sys; from jaxmllm.weights.hub import download\n"
        "try: print(*download(sys.argv[1]))\n"
        "except ValueError as error: print(error)"
    )
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": str(int(offline))}
    command = [sys.executable, "-c", script, source]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=cleared | settings, **pipes)


def test_download_and_then_offline(endpoint, tmp_path):
    """Only usable files come; the second time nothing is asked, and the tag is found in the cache."""
    name, folder = download("hf:org/name@v1", tmp_path, endpoint).split(" ")
    assert name == f"hf:org/name@{COMMIT}" and folder.startswith(str(tmp_path))
    found = {os.path.relpath(os.path.join(at, file), folder) for at, _, files in os.walk(folder) for file in files}
    assert found == WANTED
    for file in found:
        with open(os.path.join(folder, file), "rb") as stream:
            assert stream.read() == FILES[file]
    Hub.asked.clear()
    assert download("hf:org/name@v1", tmp_path, endpoint, offline=True) == f"{name} {folder}"
    assert download(f"hf:org/name@{COMMIT}", tmp_path, endpoint, offline=True) == f"{name} {folder}"
    assert not Hub.asked


def test_processes_of_a_host_share_a_download(endpoint, tmp_path):
    Hub.asked.clear()
    started = [start("hf:org/name@main", tmp_path, endpoint) for _ in range(3)]
    assert len({process.communicate()[0] for process in started}) == 1
    for file in WANTED:
        assert Hub.asked.count(f"GET /org/name/resolve/{COMMIT}/{file}") == 1


@pytest.mark.parametrize(
    "source, offline, says",
    [
        ("hf:org/none@main", False, "RepositoryNotFoundError"),
        ("hf:org/gated@main", False, "GatedRepoError"),
        ("hf:org/name@v9", False, "RevisionNotFoundError"),
        ("hf:org/name@main", True, "LocalEntryNotFoundError"),
        ("hf:org/name", False, "write it as hf:org/name@revision"),
        ("hf:name@main", False, "write it as hf:org/name@revision"),
        ("hf:org/na--me@main", False, "HFValidationError"),
    ],
)
def test_one_line_says_what_is_wrong(source, offline, says, endpoint, tmp_path):
    message = download(source, tmp_path, endpoint, offline)
    assert says in message and source in message and "\n" not in message


def test_without_a_hub(tmp_path):
    message = download("hf:org/name@main", tmp_path, "http://127.0.0.1:9")
    assert "cannot download hf:org/name@main" in message and "\n" not in message
