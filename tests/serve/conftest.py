"""An endpoint whose model only counts, and a client of it."""

from __future__ import annotations

import os

import pytest
from starlette.testclient import TestClient

from jaxmllm.serve.limits import Limits
from tests.serve_case import Counting, png, served


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
