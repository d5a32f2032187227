"""Work done ahead of its use by a few threads, in order."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T, R = TypeVar("T"), TypeVar("R")


def map_ahead(function: Callable[[T], R], items: Iterable[T], ahead: int = 0) -> Iterator[R]:
    """Yields function(item) for each item, in order; `ahead` results or more are made before they are asked for.

    What the function raises is raised at the place of its item.
    """
    threads = max(os.cpu_count() or 1, 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        waiting: collections.deque[Future[R]] = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > max(ahead, 2 * threads):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
