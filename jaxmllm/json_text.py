"""JSON that others wrote: bounded in size and depth, so that no document can exhaust the memory or the stack."""

from __future__ import annotations

import collections
import json
import re
from typing import Any

import numpy as np

from jaxmllm.errors import shown

MAX_BYTES = 16 << 20  # of a document; Python objects take up to 30 times the bytes of their text
MAX_DEPTH = 64  # of brackets and braces inside one another
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
STEP = np.zeros(256, np.int8)  # byte -> change of the depth
STEP[[ord("["), ord("{")]], STEP[[ord("]"), ord("}")]] = 1, -1


def loads(content: bytes, *, unique: bool = False, max_bytes: int = MAX_BYTES) -> Any:
    """The value of a JSON document in UTF-8.

    unique: refuse an object that has a key twice. Raises ValueError, in one line, for what is not JSON, too long, too
    deep, or holds half of a surrogate pair, which is no text.
    """
    if len(content) > max_bytes:
        raise ValueError(f"it has {len(content)} bytes, and the limit is {max_bytes}")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    if depth(content) > MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    found = json.loads(text, object_pairs_hook=without_repeats if unique else None)
    if "\\u" in text:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair, which is no text") from None
    return found


def depth(content: bytes) -> int:
    """The most brackets and braces that are open at once, strings left aside."""
    if content.count(b"[") + content.count(b"{") <= MAX_DEPTH:
        return 0
    steps = STEP[np.frombuffer(STRING.sub(b"", content), np.uint8)]
    return int(np.cumsum(steps[steps != 0], dtype=np.int64).max(initial=0))


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises ValueError if a key occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has the key {shown(key)!r} twice")
    return found
