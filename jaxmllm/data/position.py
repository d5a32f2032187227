"""The saved position in the data: what its sources were, and whether they are still the same.

    {"sources": [{"path": .., "records": .., "fingerprint": ..}, ...],
     "shards": {"0": {"next": [place in the order of each source], "trained": [samples of each source],
                      "open": [[[source, place], ...] of each open row]}, "1": ...}}

`next` and the samples of open rows are places in the endless shuffled order of a source (mixture.py), `source` counts
from 0. Each process saves its own shards; all have the same sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxmllm.data.sources.record import RecordSource


def describe(sources: Iterable[RecordSource]) -> list[dict[str, Any]]:
    """What a saved position says about its sources."""
    return [{"path": s.path, "records": len(s), "fingerprint": s.fingerprint} for s in sources]


def changes(saved: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[str]:
    """One phrase per source whose number of records or fingerprint differs, with both numbers.

    Raises ValueError if these are other sources, or the same in another order.
    """
    before, after = ([source["path"] for source in sources] for sources in (saved, now))
    if before != after:
        raise ValueError(
            f"the saved data position is in the sources {', '.join(before)}, in this order, not in {', '.join(after)}"
        )
    return [
        f"{new['path']} had {old['records']} records and has {new['records']} now"
        + (", with another content" if old["records"] == new["records"] else "")
        for old, new in zip(saved, now)
        if old != new
    ]
