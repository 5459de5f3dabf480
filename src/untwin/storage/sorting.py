"""Merging sorted Parquet files into one sorted stream within a memory budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from untwin.storage.files import Storage, read_many
from untwin.storage.inputs import naming_file
from untwin.storage.partitions import read_table

ROW_GROUP = 16_384
_EVERY = 4_096


def sort_table(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Sort ascending by several columns, nulls last; the order of equal rows is kept."""
    return table.take(pc.sort_indices(table, sort_keys=[(key, "ascending") for key in keys]))


def write_sorted(storage: Storage, path: str, table: pa.Table, *, durable: bool = False) -> None:
    """Write a table with small row groups and statistics, so that readers can skip what they do not need."""
    with storage.writing(path, durable=durable) as sink:
        pq.write_table(table, sink, row_group_size=ROW_GROUP, compression="zstd")


def merge_sorted(storage: Storage, paths: Sequence[str], keys: Sequence[str], memory: int) -> Iterator[pa.Table]:
    """The rows of sorted files as tables whose concatenation is sorted by `keys`.

    Reads ranges of the first key that fit the budget; rows with the same first key are never split.
    """
    facts = list(read_many(partial(_facts, storage), paths))
    n_bytes = sum(size for _, size in facts)
    paths = [path for path, (rows, _) in zip(paths, facts, strict=True) if rows]
    if not paths:
        return
    if n_bytes * 4 <= memory:
        yield sort_table(pa.concat_tables(list(read_many(partial(read_table, storage), paths))), keys)
        return
    key = keys[0]
    samples = []
    for table in read_many(partial(read_table, storage, columns=[key]), paths):
        step = max(1, min(_EVERY, len(table) // 4))
        samples.append(table[key].take(pa.array(np.arange(0, len(table), step))).combine_chunks())
    pool = pa.chunked_array(samples).combine_chunks()
    pool = pool.take(pc.sort_indices(pool)).drop_null().unique()
    ranges = min(len(pool), max(1, -(-n_bytes * 6 // memory)))
    bounds = pool.take(pa.array(np.linspace(0, len(pool), ranges, endpoint=False, dtype=np.int64)))[1:]
    field = pc.field(key)
    for number in range(len(bounds) + 1):
        condition = None
        if number > 0:
            condition = field >= bounds[number - 1]
        if number < len(bounds):
            upper = field < bounds[number]
            condition = upper if condition is None else condition & upper
        elif condition is not None:
            # the last range also has the nulls
            condition |= field.is_null()
        table = pa.concat_tables(list(read_many(partial(read_table, storage, condition=condition), paths)))
        if table.num_rows:
            yield sort_table(table, keys)


def _facts(storage: Storage, path: str) -> tuple[int, int]:
    with naming_file(path), storage.open(path) as source, pq.ParquetFile(source) as parquet:
        metadata = parquet.metadata
        size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        return metadata.num_rows, size
