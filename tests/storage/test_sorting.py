"""Merging sorted files within a memory budget gives what sorting everything gives."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from untwin.storage.files import Storage
from untwin.storage.sorting import ROW_GROUP, merge_sorted, sort_table, write_sorted

STORAGE = Storage()

KEYS = {
    "string": (pa.string(), st.text(max_size=4)),
    "int": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "uint": (pa.uint64(), st.integers(0, 2**64 - 1)),
    "binary": (pa.binary(), st.binary(max_size=4)),
    "fixed": (pa.binary(3), st.binary(min_size=3, max_size=3)),
    "large": (pa.large_string(), st.sampled_from(["a", "b", "ä"])),
}


def merged(paths, keys, memory):
    tables = list(merge_sorted(STORAGE, paths, keys, memory))
    return tables, (pa.concat_tables(tables).to_pylist() if tables else [])


def in_order(rows, keys):
    return sorted(rows, key=lambda row: [(row[key] is None, row[key] if row[key] is not None else 0) for key in keys])


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("nulls", [False, True])
@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tiny_budget_gives_the_same_as_sorting_everything(tmp_path_factory, kind, nulls, data):
    folder = tmp_path_factory.mktemp("merge")
    arrow, values = KEYS[kind]
    keys = values | st.none() if nulls else values
    pool = data.draw(st.lists(keys, min_size=1, max_size=8))
    paths, rows = [], []
    for number in range(data.draw(st.integers(1, 4))):
        part = data.draw(st.lists(st.sampled_from(pool), max_size=25))
        table = pa.table(
            {"key": pa.array(part, arrow), "second": pa.array(range(len(part), 0, -1)), "file": [number] * len(part)},
            schema=pa.schema([("key", arrow), ("second", pa.int64()), ("file", pa.int64())]),
        )
        path = str(folder / f"{number}.parquet")
        write_sorted(STORAGE, path, sort_table(table, ["key", "second", "file"]))
        paths.append(path)
        rows += table.to_pylist()
    columns = ["key", "second", "file"]
    want = in_order(rows, columns)
    for memory in (1, 1 << 30):
        tables, got = merged(paths, columns, memory)
        assert got == want
        ends = [(table["key"][0].as_py(), table["key"][-1].as_py()) for table in tables]
        for (_, last), (first, _) in itertools.pairwise(ends):
            assert last != first


def test_a_budget_cuts_the_rows_into_pieces_that_fit_it(tmp_path):
    rng = np.random.default_rng(0)
    paths, everything = [], []
    for number in range(3):
        values = rng.integers(0, 2**60, size=40_000)
        everything.append(values)
        paths.append(str(tmp_path / f"{number}.parquet"))
        write_sorted(STORAGE, paths[-1], sort_table(pa.table({"key": values}), ["key"]))
    memory = 500_000
    tables = list(merge_sorted(STORAGE, paths, ["key"], memory))
    assert len(tables) > 5
    assert max(table.nbytes for table in tables) < memory
    got = np.concatenate([table["key"].to_numpy() for table in tables])
    np.testing.assert_array_equal(got, np.sort(np.concatenate(everything)))


@pytest.mark.parametrize("key", ["same", None])
def test_one_key_in_all_rows_is_never_split_nor_lost(tmp_path, key):
    paths = []
    for number in range(3):
        table = pa.table({"key": pa.array([key] * 50, pa.string()), "id": range(number, 150, 3)})
        paths.append(str(tmp_path / f"{number}.parquet"))
        write_sorted(STORAGE, paths[-1], table)
    (table,) = merge_sorted(STORAGE, paths, ["key", "id"], 1)
    assert table["id"].to_pylist() == list(range(150))


def test_no_rows_give_no_table(tmp_path):
    path = str(tmp_path / "x.parquet")
    write_sorted(STORAGE, path, pa.table({"key": pa.array([], pa.string())}))
    assert list(merge_sorted(STORAGE, [path], ["key"], 1)) == []
    assert list(merge_sorted(STORAGE, [], ["key"], 1)) == []


def test_equal_rows_keep_their_order():
    table = pa.table({"key": [1, 0, 1, None, 0, None], "at": range(6)})
    assert sort_table(table, ["key"])["at"].to_pylist() == [1, 4, 0, 2, 3, 5]


def test_sorted_files_have_small_row_groups_with_statistics(tmp_path):
    path = str(tmp_path / "x.parquet")
    write_sorted(STORAGE, path, pa.table({"id": [f"{at:06d}" for at in range(40_000)]}))
    metadata = pq.read_metadata(path)
    assert metadata.num_row_groups == 3
    assert metadata.row_group(0).num_rows == ROW_GROUP
    bounds = [
        (metadata.row_group(i).column(0).statistics.min, metadata.row_group(i).column(0).statistics.max)
        for i in range(3)
    ]
    assert bounds[1] == (f"{ROW_GROUP:06d}", f"{2 * ROW_GROUP - 1:06d}")
