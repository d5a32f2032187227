"""Records in LLaVA's format: JSON or JSONL, with the pictures in files of their own."""

from __future__ import annotations

import functools
import mmap
import os
from typing import Any

from jaxmllm.data.sources.json_bounds import parse, scan
from jaxmllm.data.sources.record import MAPS, NO_IMAGE, BadSample, Blob, Record, path_in, read_file
from jaxmllm.errors import suggest_path

MAX_IMAGES = 1024  # of a record


class LlavaSource:
    """LLaVA's format: a JSON array, or JSONL with one object per line; pictures are separate files.

    The file is mapped, not loaded, and read once to see where records start and to hash it. The field `image` is a path
    relative to `image_root` (default: the folder of the file) or a list of paths; it is absent or one of NO_IMAGE for
    text only. A path that leads out of `image_root` makes a bad record, unless `outside_root` allows it.
    Raises ValueError for a file that is missing or is not JSON.
    """

    def __init__(self, path: str, image_root: str | None = None, outside_root: bool = False):
        self.path = str(path)
        if not os.path.isfile(self.path):
            raise ValueError(f"no data file {self.path}{suggest_path(self.path)}")
        self.root = str(image_root) if image_root else os.path.dirname(self.path)
        self.outside_root = outside_root
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
        data = parse(self.content, *self.bounds[index].tolist(), index, self.path)
        id, names = str(data.get("id", index)), data.get("image")
        names = [n for n in (names if isinstance(names, list) else [names]) if str(n) not in NO_IMAGE]
        if len(names) > MAX_IMAGES:
            raise BadSample(id, self.path, "too many pictures", f"{len(names)}, and the limit is {MAX_IMAGES}")
        maps = {key: data[key] for key in MAPS if data.get(key) is not None}
        return Record(
            id=id,
            path=self.path,
            data=data,
            images=[self.file(id, "image", name) for name in names],
            maps={key: self.file(id, key, name) for key, name in maps.items()},
        )

    def file(self, id: str, field: str, name: Any) -> Blob:
        """The file that a record names. Raises BadSample if it names none, or one that it may not."""
        if not isinstance(name, str):
            raise BadSample(id, self.path, "not a path", f"{field} is {name!r}")
        try:
            path = path_in(self.root, name, self.outside_root)
        except (ValueError, OSError) as error:
            raise BadSample(id, name, "not a path in the image root", str(error)) from None
        return Blob(path, functools.partial(read_file, path))
