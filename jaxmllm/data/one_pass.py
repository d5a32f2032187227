"""Every sample of a source once, in packed rows: what held-out losses are measured on."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator

from jaxmllm.batch import Batch
from jaxmllm.data.ahead import map_ahead
from jaxmllm.data.loader import MAX_SAMPLES, OPEN_ROWS, make_batch
from jaxmllm.data.mixture import sample_or_bad
from jaxmllm.data.packing import Bins
from jaxmllm.data.samples import Sample, SampleSpec
from jaxmllm.data.sources.record import BadSample, RecordSource


def one_pass(
    source: RecordSource,
    spec: SampleSpec,
    on_bad: Callable[[int, BadSample], None],
    *,
    rows: int,
    num_shards: int,
    packing: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields this process's share of batches that together hold each sample of the source once, in its order.

    Sample i belongs to virtual shard i mod num_shards, which provides rows / num_shards rows of every batch, as in
    Loader. So the batches do not depend on the number of processes. The last ones have empty rows; a process whose
    shards end early yields fewer batches than others. Arguments as in Loader; on_bad is given the index of each bad
    sample too. Raises ValueError for numbers that do not divide, and RuntimeError, naming the record, if making a
    sample fails.
    """
    if rows % num_shards or num_shards % process_count:
        raise ValueError(
            f"the rows ({rows}) must be a multiple of the virtual shards ({num_shards}), "
            f"and the virtual shards a multiple of the processes ({process_count})"
        )
    count = num_shards // process_count
    own, per_shard = range(process_index * count, (process_index + 1) * count), rows // num_shards
    bins: dict[int, Bins[Sample]] = {
        shard: Bins((spec.seq_len, spec.image_slots, MAX_SAMPLES if packing else 1), OPEN_ROWS if packing else 1)
        for shard in own
    }
    closed: dict[int, collections.deque[list[Sample]]] = {shard: collections.deque() for shard in own}

    def batch() -> Batch:
        taken = [closed[shard].popleft() if closed[shard] else [] for shard in own for _ in range(per_shard)]
        return make_batch(taken, spec)[0]

    def sample(index: int) -> Sample | BadSample:
        return sample_or_bad(source, index, index, spec)

    indices = [i for i in range(len(source)) if i % num_shards in own]
    for index, made in zip(indices, map_ahead(sample, indices)):
        if isinstance(made, BadSample):
            on_bad(index, made)
        elif row := bins[index % num_shards].add(made, made.size):
            closed[index % num_shards].append(row)
            if all(len(full) >= per_shard for full in closed.values()):
                yield batch()
    for shard in own:
        closed[shard].extend(items for items, _ in bins[shard].rows)
    while any(closed.values()):
        yield batch()
