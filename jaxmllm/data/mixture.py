"""The mixture of sources within a virtual shard: shares of the samples that are trained, at an exact position.

Each source has an endless shuffled order, another one each epoch. Virtual shard k of n takes the places k, k + n,
k + 2n, ... of the order of every source. So each record of a source is met once per epoch, whatever the other sources
hold, and the samples of a shard depend on nothing outside it.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grain

from jaxmllm import watched
from jaxmllm.data.ledger import Ledger, TooManyBadSamples
from jaxmllm.data.samples import Sample, SampleSpec, make_sample
from jaxmllm.data.sources.record import BadSample, RecordSource

MAX_BAD_RUN = 1000  # consecutive bad samples of a source after which a shard assumes that it has no good ones
SEED_STRIDE = 2**20  # between the seeds of two sources; the seed of a source grows by one each epoch


def normalized(sources: Sequence[tuple[RecordSource, float]]) -> list[float]:
    """The shares of weighted sources, which sum to 1.

    Raises ValueError for no sources, and naming a source without records or with a weight that is not positive.
    """
    if not sources:
        raise ValueError("there must be at least one data source")
    for source, weight in sources:
        if not len(source):
            raise ValueError(f"the data source {source.path} must have records, but it is empty")
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of {source.path} is {weight}; it must be positive and finite")
    total = math.fsum(weight for _, weight in sources)
    return [weight / total for _, weight in sources]


def furthest_behind(counts: Sequence[int], shares: Sequence[float]) -> int:
    """The source whose count is furthest below its share of one sample more than there are; the first of several."""
    total = sum(counts) + 1
    return max(range(len(shares)), key=lambda source: shares[source] * total - counts[source])


class SampleMaker:
    """Makes the sample at a place of the endless shuffled order of a source. Several threads may use it.

    The ids of samples are the indices of their records, counted on from one source to the next.
    """

    def __init__(self, sources: Sequence[RecordSource], spec: SampleSpec, seed: int):
        self.sources, self.spec, self.orders = sources, spec, []
        for number, source in enumerate(sources):
            order = grain.MapDataset.range(len(source)).shuffle((seed + number * SEED_STRIDE) % 2**32)
            self.orders.append(order)
        self.first_ids = [0, *itertools.accumulate(map(len, sources))]

    def record(self, source: int, place: int) -> tuple[str, int]:
        """(path of the source, index of the record) at a place of the order of source number `source`."""
        return self.sources[source].path, self.orders[source][place]

    def __call__(self, source: int, place: int) -> Sample | BadSample:
        """As `sample_or_bad`."""
        index = self.orders[source][place]
        return sample_or_bad(self.sources[source], index, self.first_ids[source] + index, self.spec)


def sample_or_bad(source: RecordSource, index: int, id: int, spec: SampleSpec) -> Sample | BadSample:
    """The sample of a record, or what is wrong with it. Raises RuntimeError, naming the record, if making it fails."""
    what = f"record {index} of {source.path}"
    try:
        watched.note(what)
        record = source[index]
        what += "".join(f", {blob.path}" for blob in (*record.images, *record.maps.values()))
        watched.note(what)
        return make_sample(record, id, spec)
    except BadSample as bad:
        return bad
    except (Exception, SystemExit) as error:  # the latter would end the run without a word
        raise RuntimeError(f"making a sample of {what} failed: {type(error).__name__}: {error}") from error
    finally:
        watched.note("")


@dataclasses.dataclass(frozen=True)
class Placed:
    """A sample and where it came from."""

    source: int
    place: int  # in the order of the source
    sample: Sample


class Mixture:
    """Endless iterator over the good samples of a virtual shard.

    The next sample comes from the source that is furthest behind its share of the samples handed out. Bad samples are
    skipped and do not count, so the shares hold for what is trained. Shard k starts as if k samples had been handed
    out: otherwise all shards would come to a rare source at the same time, and whole batches would hold nothing else.

    Args:
      shares: of the sources; they sum to 1.
      make: makes the samples.
      ledger: where the bad samples that are skipped are noted, in order.
      shard, num_shards: which places of each order belong to this virtual shard.
      pool: threads that make samples ahead, shared with other shards. The samples do not depend on it.
      ahead: how many samples this shard has made ahead or in the making; without any, each is made when it is needed.
    """

    def __init__(
        self,
        shares: Sequence[float],
        make: SampleMaker,
        ledger: Ledger,
        shard: int,
        num_shards: int,
        pool: ThreadPoolExecutor | None = None,
        ahead: int = 0,
    ):
        self.shares, self.make, self.ledger = shares, make, ledger
        self.stride, self.pool, self.ahead = num_shards, pool, ahead
        self.next = [shard] * len(shares)  # place of the next sample of each source
        self.trained = [0] * len(shares)
        self.start = [0] * len(shares)  # samples of each source that count as handed out before the first one
        for _ in range(shard):
            self.start[furthest_behind(self.start, shares)] += 1
        self.waiting: list[collections.deque[Future]] = [collections.deque() for _ in shares]

    def __iter__(self) -> Mixture:
        return self

    def __next__(self) -> Placed:
        """Raises TooManyBadSamples if the source whose turn it is seems to have no good ones."""
        source = furthest_behind([sum(counts) for counts in zip(self.start, self.trained)], self.shares)
        for _ in range(MAX_BAD_RUN):
            self._make_ahead()
            place, waiting = self.next[source], self.waiting[source]
            made = waiting.popleft().result() if waiting else self.make(source, place)
            self.next[source] += self.stride
            if isinstance(made, Sample):
                self.trained[source] += 1
                return Placed(source, place, made)
            self.ledger.add(*self.make.record(source, place), made)
        path, _ = self.make.record(source, place)
        raise TooManyBadSamples(f"{MAX_BAD_RUN} consecutive samples of {path} were bad; see the ledger of bad samples")

    def _make_ahead(self) -> None:
        """Starts the samples that are needed next if all of them are good; whatever is started will be needed."""
        missing = self.ahead - sum(map(len, self.waiting))
        for _ in range(missing):
            planned = [sum(counts) for counts in zip(self.start, self.trained, map(len, self.waiting))]
            source = furthest_behind(planned, self.shares)
            place = self.next[source] + len(self.waiting[source]) * self.stride
            self.waiting[source].append(self.pool.submit(self.make, source, place))

    def read_again(self, places: Sequence[tuple[int, int]]) -> list[Placed]:
        """The samples at these (source, place); those that have become bad are noted and left out."""
        run = self.pool.map if self.pool else map
        made = list(run(self.make, *zip(*places))) if places else []
        for (source, place), sample in zip(places, made):
            if not isinstance(sample, Sample):
                self.ledger.add(*self.make.record(source, place), sample)
        return [Placed(*at, sample) for at, sample in zip(places, made) if isinstance(sample, Sample)]

    def get_state(self) -> dict[str, Any]:
        """The next place of each source, and how many samples of each have been handed out: JSON data."""
        return {"next": [*self.next], "trained": [*self.trained]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        for waiting in self.waiting:
            for future in waiting:
                future.cancel()
            waiting.clear()
        self.next, self.trained = [*state["next"]], [*state["trained"]]
