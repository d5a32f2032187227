"""Records in LLaVA's format: JSON or JSONL, with the pictures in files of their own."""

from __future__ import annotations

import functools
import mmap
import os
from typing import Any

from jaxmllm.data.sources.json_bounds import parse, scan
from jaxmllm.data.sources.record import MAPS, NO_IMAGE, Blob, Record, read_file


class LlavaSource:
    """LLaVA's format: a JSON array, or JSONL with one object per line; pictures are separate files.

    The file is mapped, not loaded, and read once to see where records start and to hash it. The field `image` is a path
    relative to `image_root` (default: the folder of the file) or a list of paths; it is absent or one of NO_IMAGE for
    text only.
    Raises ValueError for a file that is missing or is not JSON.
    """

    def __init__(self, path: str, image_root: str | None = None):
        self.path = str(path)
        if not os.path.isfile(self.path):
            raise ValueError(f"no data file {self.path}")
        self.root = str(image_root) if image_root else os.path.dirname(self.path)
        self.bounds, self.fingerprint = scan(self.content, self.path)

    @functools.cached_property
    def content(self) -> mmap.mmap | bytes:
        """The whole file; an empty one cannot be mapped."""
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "content"}

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> Record:
        start, end = self.bounds[index].tolist()
        data = parse(self.content[start:end], index, self.path)
        names = data.get("image")
        names = [n for n in (names if isinstance(names, list) else [names]) if str(n) not in NO_IMAGE]
        return Record(
            id=str(data.get("id", index)),
            path=self.path,
            data=data,
            images=[self.file(name) for name in names],
            maps={key: self.file(data[key]) for key in MAPS if isinstance(data.get(key), str)},
        )

    def file(self, name: str) -> Blob:
        """The file of a name that a record gives."""
        path = os.path.join(self.root, str(name))
        return Blob(path, functools.partial(read_file, path))
