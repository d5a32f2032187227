"""The pictures of a request: base64 data URLs, and files of one folder. Nothing is fetched."""

from __future__ import annotations

import base64
import binascii
import os
import re
from urllib.parse import unquote, urlsplit

from jaxmllm.data.sources.record import Blob, path_in, read_file
from jaxmllm.errors import shown
from jaxmllm.serve.limits import Limits, Refused

DATA_URL = re.compile(r"data:(image/[\w.+-]+)?((?:;[\w.+-]+=[^;,]*)*);base64,", re.IGNORECASE)
MEND = "send a data: URL with the base64 of the file"


def picture(url: str, place: str, limits: Limits, folder: str | None = None) -> Blob:
    """The bytes of a picture, read. Whether they are a picture is found out when they are decoded.

    place: of the URL in the request, e.g. "messages.0.content.1.image_url.url". folder: the files in it may be named,
    by a path relative to it, an absolute path, or a file:// URL. Raises Refused.
    """
    scheme = urlsplit(url[:40]).scheme.lower() if re.match(r"[a-z][a-z0-9+.-]*:", url[:40], re.IGNORECASE) else ""
    if scheme in ("http", "https"):
        raise Refused(400, f"pictures are not fetched from http(s) URLs; {MEND}", place)
    if scheme == "data":
        return from_data_url(url, place, limits)
    if scheme not in ("", "file"):
        raise Refused(400, f"{scheme}: URLs are not read; {MEND}", place)
    if folder is None:
        raise Refused(400, "this server reads no files: send a data: URL, or start it with --files FOLDER", place)
    return from_file(url, place, limits, folder)


def from_data_url(url: str, place: str, limits: Limits) -> Blob:
    """The bytes of a data URL. Raises Refused."""
    start = DATA_URL.match(url)
    if not start:
        raise Refused(400, "a data URL must begin as data:image/png;base64, does", place)
    if (len(url) - start.end()) * 3 // 4 > limits.picture + 2:
        raise Refused(413, f"a picture may have {limits.picture} bytes", place)
    try:
        content = base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"it is not base64: {error}", place) from None
    return Blob(place, lambda: content)


def from_file(url: str, place: str, limits: Limits, folder: str) -> Blob:
    """The bytes of a file in a folder. Messages name the file as the request does. Raises Refused."""
    name, spelled = url, shown(url)
    if url.lower().startswith("file:"):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise Refused(400, f"{spelled}: a file URL has three slashes, as file:///folder/a.jpg has", place)
        name = unquote(parts.path)
    try:
        path = path_in(folder, name)
    except ValueError:
        text = "it is not in the folder whose files this server reads (--files)"
        raise Refused(400, f"{spelled}: {text}", place) from None
    try:
        if os.path.getsize(path) > limits.picture:
            raise Refused(413, f"{spelled}: a picture may have {limits.picture} bytes", place)
        content = read_file(path)
    except OSError as error:
        raise Refused(400, f"{spelled}: {error.strerror or type(error).__name__}", place) from None
    return Blob(name, lambda: content)
