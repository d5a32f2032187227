"""What a request may ask for, and how one that asks for more is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmllm.errors import shown


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of an endpoint."""

    requests: int = 64  # that are read, wait or are answered at the same time
    rows: int = 8  # of a batch, and so choices of a request
    body: int = 32 << 20  # bytes
    picture: int = 16 << 20  # bytes of a file
    pictures: int = 16  # of a request
    characters: int = 1 << 20  # of the texts of a request; to cut them into tokens takes seconds
    seconds: float = 60.0  # in which a body must have arrived, and in which a client must take a piece of the response
    marks: int = 1 << 18  # commas and opening brackets of a body, each of which may become an object of many bytes


class Refused(Exception):
    """A request that is not answered: an HTTP status, and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        self.status, self.param, self.code = status, param and shown(param), code
        self.message = shown(message, 1000)
        super().__init__(self.message)

    def document(self) -> dict[str, Any]:
        """The body of the response."""
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
