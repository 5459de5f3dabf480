"""Rows of input units: whole rows that are held in memory are those of the files, however they are asked for."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from untwin.errors import DamagedFileError
from untwin.storage.files import Storage
from untwin.storage.inputs import ParquetFormat
from untwin.storage.listing import Fields, list_inputs
from untwin.storage.memory import Space
from untwin.storage.rows import read_rows

STORAGE = Storage()
WANTED = ["id", "embedding"]


@pytest.fixture
def listing(tmp_path):
    """1,000 rows in three files with row groups of 70 rows; the second has none."""
    table = pa.table(
        {
            "n": range(1000),
            "id": [f"i{row}" for row in range(1000)],
            "embedding": pa.array(np.random.default_rng(0).normal(size=(1000, 4)).tolist(), pa.list_(pa.float32())),
            "tag": pa.array([f"t{row % 5}" for row in range(1000)]).dictionary_encode(),
        }
    )
    for name, (low, high) in {"a": (0, 430), "b": (430, 430), "c": (430, 1000)}.items():
        pq.write_table(table.slice(low, high - low), tmp_path / f"{name}.parquet", row_group_size=70)
    return list_inputs(STORAGE, [str(tmp_path)], Fields("id", "embedding"))


def read(listing, bounds, columns, room, **options):
    groups = listing.groups()
    with room.active():
        return [
            rows
            for low, high in itertools.pairwise(bounds)
            for rows in read_rows(STORAGE, ParquetFormat(), listing.spans(low, high, groups), columns, 32, **options)
        ]


def empty(listing):
    for path in listing.files["path"].to_pylist():
        Path(path).write_bytes(b"")


def table_of(batches):
    assert [batch.first_row for batch in batches] == np.cumsum(
        [0, *(batch.columns.num_rows for batch in batches[:-1])]
    ).tolist()
    return pa.Table.from_batches([batch.columns for batch in batches])


@pytest.mark.parametrize("limit", [1 << 30, 25_000, 0])
def test_whole_rows_come_from_memory_as_far_as_they_are_held(listing, limit):
    n_pieces = len(listing.groups().rows)
    plain = table_of(read(listing, [0, n_pieces], None, Space()))
    assert plain["n"].to_pylist() == list(range(1000))
    room = Space(limit)
    wanted = table_of(read(listing, [0, 5, 6, n_pieces], WANTED, room, hold=True))
    assert wanted.equals(plain.select(WANTED))
    assert 0 < room.used <= limit or limit == 0
    if limit == 1 << 30:
        empty(listing)
    whole = table_of(read(listing, [0, 2, 9, n_pieces], None, room))
    assert whole.equals(plain)
    assert room.used == 0


def test_columns_of_rows_that_are_held_come_from_memory_and_these_stay(listing):
    n_pieces = len(listing.groups().rows)
    plain = table_of(read(listing, [0, n_pieces], None, Space()))
    room = Space(1 << 30)
    read(listing, [3, 6], WANTED, room, hold=True)
    used = room.used
    batches = read(listing, [0, n_pieces], ["tag", "id"], room)
    assert table_of(batches).equals(plain.select(["tag", "id"]))
    held = {
        row for batch in batches if batch.held for row in range(batch.first_row, batch.first_row + len(batch.columns))
    }
    assert held <= set(range(3 * 70, 6 * 70)) and len(held) > 0.8 * 3 * 70  # those put together are copies
    assert room.used == used > 0
    assert table_of(read(listing, [0, n_pieces], None, room)).equals(plain)
    assert room.used == 0


def test_whole_rows_are_held_once(listing):
    room = Space(1 << 30)
    n_pieces = len(listing.groups().rows)
    read(listing, [0, n_pieces], WANTED, room, hold=True)
    read(listing, [0, n_pieces], None, room)
    empty(listing)
    with pytest.raises(DamagedFileError):
        read(listing, [0, n_pieces], None, room)
