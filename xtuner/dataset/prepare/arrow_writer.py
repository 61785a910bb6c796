"""Samples as a dataset of training rows: one to a row, or packed. Arrow is written from arrays."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xtuner.dataset.prepare.packing import Packs
from xtuner.dataset.prepare.samples import Samples
from xtuner.dataset.prepare.token_stats import attach, token_stats_of
from xtuner.tokenization.segments import ID_BYTES, Tokens

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_ONCE = 1000
TOKENS_AT_ONCE = 2**20
SHARDS = 8
"""Files of a packed dataset, which are written side by side."""
_INT32, _INT64 = pa.list_(pa.int32()), pa.list_(pa.int64())
COLUMNS = {
    "input_ids": _INT32,
    "labels": _INT32,
    "position_ids": _INT32,
    "cumulative_len": _INT64,
    "length": pa.int64(),
    "rows": _INT64,
}
VARLEN_COLUMNS = {"position_ids", "cumulative_len"}


def unpacked_dataset(
    samples: Samples, key: str, columns: Mapping[str, pa.Array] | None = None
) -> Dataset:
    """Columns ``input_ids``, ``labels``, ``length`` and ``rows`` (one number in each).

    Args:
        samples: one for each row.
        key: names the dataset.
        columns: further ones.
    """
    from datasets import Dataset

    table = pa.Table.from_batches(list(_batches(samples)))
    for name, column in (columns or {}).items():
        table = table.append_column(name, column)
    return Dataset(table, fingerprint=key)  # without a fingerprint it would be found by pickling


def read_samples(dataset: Dataset) -> Samples:
    """The samples of a dataset of ``unpacked_dataset`` that was saved, and their stats."""
    samples = Samples.joined(_saved_samples(dataset))
    samples.stats = token_stats_of(dataset) or samples.stats
    return samples


def _saved_samples(dataset: Dataset) -> Iterator[Samples]:
    for file in dataset.cache_files:
        # Not mapped into memory: the pages would stay in it.
        with pa.OSFile(file["filename"]) as source:
            for batch in pa.ipc.open_stream(source):
                ids, labels, rows = (
                    batch[name].flatten().to_numpy() for name in ("input_ids", "labels", "rows")
                )
                yield Samples(ids, labels, batch["length"].to_numpy(), rows)


def write_packed(
    samples: Samples,
    packs: Packs,
    folder: Path,
    *,
    for_varlen: bool,
    key: str,
    threads: int,
    columns: Mapping[str, pa.Array] | None = None,
) -> None:
    """Write rows of several samples as ``datasets`` saves a dataset, never holding all of them.

    Args:
        samples: what is packed, and its stats.
        packs: what each row is made of.
        folder: to write to.
        for_varlen: also write ``position_ids``, restarting with each sample, and
            ``cumulative_len``.
        key: names the dataset.
        threads: at most.
        columns: further ones, with a value for each row.
    """
    from datasets import Dataset

    further = dict(columns or {})
    names = [name for name in COLUMNS if for_varlen or name not in VARLEN_COLUMNS]
    fields = [(name, COLUMNS[name]) for name in names]
    schema = pa.schema([*fields, *((name, column.type) for name, column in further.items())])
    empty = Dataset(schema.empty_table(), fingerprint=key)
    attach(empty, samples.stats)
    shards = min(SHARDS, max(1, len(packs)))
    empty.save_to_disk(str(folder), num_shards=shards)
    shard_bounds = np.linspace(0, len(packs), shards + 1).astype(int).tolist()
    ids = _bytes_by_sample(samples.input_ids, samples.lengths)
    labels = _bytes_by_sample(samples.labels, samples.lengths)

    def write(shard: int) -> None:
        """Put the rows of a shard where the empty dataset has none."""
        file = folder / f"data-{shard:05d}-of-{shards:05d}.arrow"
        first, last = shard_bounds[shard], shard_bounds[shard + 1]
        at_once = max(1, TOKENS_AT_ONCE * len(packs) // max(1, len(samples.input_ids)))
        with pa.OSFile(str(file), "wb") as stream, pa.ipc.new_stream(stream, schema) as writer:
            for start in range(first, last, at_once):
                chosen = packs.slice(start, min(start + at_once, last))
                joined = _join(chosen, ids, labels, samples.rows)
                own = [joined[name] for name in names]
                own += [column.slice(start, len(chosen)) for column in further.values()]
                writer.write_batch(pa.record_batch(own, schema))

    # numpy, Arrow and the file system do the work, side by side.
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(shards)))


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below ``count`` in the order that a seed gives."""
    return random.Random(seed).sample(range(count), count)


def _batches(samples: Samples) -> Iterator[pa.RecordBatch]:
    ends = np.cumsum(samples.lengths)
    for start in range(0, len(samples), ROWS_AT_ONCE):
        chosen = slice(start, start + ROWS_AT_ONCE)
        lengths = samples.lengths[chosen]
        first, last = ends[start] - lengths[0], ends[chosen][-1]
        yield pa.RecordBatch.from_pydict(
            {
                "input_ids": _lists(samples.input_ids[first:last], lengths),
                "labels": _lists(samples.labels[first:last], lengths),
                "length": lengths,
                "rows": _lists(samples.rows[chosen], np.ones(len(lengths), dtype=np.int64)),
            }
        )


def _join(
    packs: Packs,
    ids_by_sample: pa.LargeBinaryArray,
    labels_by_sample: pa.LargeBinaryArray,
    rows: npt.NDArray[np.int64],
) -> dict[str, pa.Array]:
    """The columns of some packed rows."""
    sizes = packs.stops - packs.starts
    ends = np.cumsum(sizes)
    firsts = np.cumsum(packs.counts) - packs.counts
    lengths = np.add.reduceat(sizes, firsts)
    places = np.arange(ends[-1], dtype=np.int32)
    places -= np.repeat((ends - sizes).astype(np.int32), sizes)
    # Where the parts of a row begin, and its end.
    offsets = ends - sizes - np.repeat(np.cumsum(lengths) - lengths, packs.counts)
    cu_seqlens = np.insert(offsets, firsts + packs.counts, lengths)
    return {
        "input_ids": _lists(_gather(ids_by_sample, packs), lengths),
        "labels": _lists(_gather(labels_by_sample, packs), lengths),
        "position_ids": _lists(places, lengths),
        "cumulative_len": _lists(cu_seqlens, packs.counts + 1),
        "length": pa.array(lengths),
        "rows": _lists(rows[packs.samples], packs.counts),
    }


def _bytes_by_sample(tokens: Tokens, lengths: npt.NDArray[np.int64]) -> pa.LargeBinaryArray:
    """The tokens as the bytes of each sample: what Arrow gathers at the speed of memory."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]) * ID_BYTES
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(tokens)]
    return pa.Array.from_buffers(pa.large_binary(), len(lengths), buffers)


def _gather(by_sample: pa.LargeBinaryArray, packs: Packs) -> Tokens:
    """The tokens of all parts, one after the other."""
    # A sample that was cut stands in several parts, one after the other; only the first part and
    # the last can be without the rest of their sample.
    whole = np.concatenate([[True], np.diff(packs.samples) != 0])
    taken = by_sample.take(pa.array(packs.samples[whole]))
    tokens = np.frombuffer(taken.buffers()[2], dtype=np.int32)
    return tokens[packs.starts[0] :][: (packs.stops - packs.starts).sum()]


def _lists(values: npt.NDArray[np.integer], lengths: npt.NDArray[np.int64]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
