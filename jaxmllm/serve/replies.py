"""Replies as OpenAI's documents: one JSON object, or events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from jaxmllm.eval.answer import Reply


class Completion:
    """What the documents of one request have in common."""

    def __init__(self, model: str, prompt_tokens: int):
        self.model, self.prompt_tokens = model, prompt_tokens
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())

    def document(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """All choices, complete."""
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": reply.text.strip(), "refusal": None},
                "logprobs": None,
                "finish_reason": reply.ended,
            }
            for i, reply in enumerate(replies)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage(replies)}

    def chunk(self, index: int, delta: dict[str, str], ended: str = "", usage: bool = False) -> dict[str, Any]:
        """A piece of choice `index`; usage: whether the stream ends with counts, which all chunks then announce."""
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": ended or None}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **({"usage": None} if usage else {})}

    def counts(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """The last chunk of a stream, with the counts of all choices."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage(replies)}

    def usage(self, replies: Sequence[Reply]) -> dict[str, int]:
        """Tokens of the prompt, those of its pictures among them, and of the replies, with those that ended them."""
        made = sum(reply.tokens for reply in replies)
        total = self.prompt_tokens + made
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": made, "total_tokens": total}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(document: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = document if isinstance(document, str) else json.dumps(document, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
