"""Rows that cannot be judged are set aside with the reason, and the run goes on; or it stops and says why."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inputs import (
    TWINS,
    ids_of,
    read_folder,
    table_of,
    twin_ids,
    twin_table,
    twin_vectors,
    witnesses,
    write_parquet,
)
from untwin import deduplicate
from untwin.errors import RepeatedIdError, TooManyRejectedError

BAD = {
    "null embedding": None,
    "empty embedding": [],
    "embedding contains a null value": [1.0, None, 0, 0, 0, 0, 0, 0],
    "embedding contains NaN": [1.0, float("nan"), 0, 0, 0, 0, 0, 0],
    "embedding contains an infinite value": [float("inf"), 1.0, 0, 0, 0, 0, 0, 0],
    "embedding has zero norm": [0.0] * 8,
    "embedding has the wrong length": [1.0, 2.0, 3.0],
}
VARIANTS = [
    ([-float("inf")] + [0.0] * 7, "embedding contains an infinite value"),
    ([float("inf"), float("nan")] + [0.0] * 6, "embedding contains NaN"),
    ([-0.0] * 8, "embedding has zero norm"),
    ([0.5] * 9, "embedding has the wrong length"),
    ([0.5], "embedding has the wrong length"),
]


def run(tmp_path, tables, **options):
    """Run on one file a table; result and output folder."""
    for number, table in enumerate(tables):
        write_parquet(tmp_path / "in" / f"{number}.parquet", table)
    out = tmp_path / "out"
    options = {"eps": 0.05, "rank_by": "id:asc", **options}
    return deduplicate(str(tmp_path / "in"), str(out), **options), out


def rejected(out):
    """Each row of `rejected/` as (id, file name, row, reason), sorted."""
    rows = read_folder(out / "rejected").to_pylist()
    return sorted((row["id"], row["file"].rpartition("/")[2], row["row"], row["reason"]) for row in rows)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64())], ids=str)
def test_every_reason_is_told_with_id_file_and_row(tmp_path, kind):
    good, vectors = twin_ids(), list(twin_vectors())
    first = table_of([*good[:6], "bad0"], [*vectors[:6], None], embedding_type=kind)
    bad_ids = [f"bad{i + 1}" for i in range(len(BAD))]
    second = table_of([*bad_ids, *good[6:]], [*BAD.values(), *vectors[6:]], embedding_type=kind)
    result, out = run(tmp_path, [first, second])
    wanted = [("bad0", "0.parquet", 6, "null embedding")]
    wanted += [(f"bad{i + 1}", "1.parquet", i, reason) for i, reason in enumerate(BAD)]
    assert rejected(out) == sorted(wanted)
    assert (result.n_kept, result.n_duplicates, result.n_rejected) == (6, 6, 8)
    assert witnesses(out) == TWINS
    assert result.run["rows"]["rejected_reasons"] == {**dict.fromkeys(BAD, 1), "null embedding": 2}


@pytest.mark.parametrize(("vector", "reason"), VARIANTS)
def test_variants_of_what_cannot_be_judged(tmp_path, vector, reason):
    table = table_of([*twin_ids(), "bad"], [*twin_vectors(), vector])
    _, out = run(tmp_path, [table])
    assert rejected(out) == [("bad", "0.parquet", 12, reason)]
    assert witnesses(out) == TWINS


def test_types_of_rejected(tmp_path):
    _, out = run(tmp_path, [table_of([1, 2, 3], [[1, 0], [0, 1], None], id_type=pa.int32())], rank_by=None)
    (path,) = (out / "rejected").glob("*.parquet")
    text = pa.string()
    assert pq.read_schema(path).equals(
        pa.schema([("id", pa.int32()), ("file", text), ("row", pa.int64()), ("reason", text)])
    )
    assert pq.read_table(path)["file"].to_pylist() == [str(tmp_path / "in" / "0.parquet")]


def test_fixed_size_lists_with_nulls_and_of_another_length(tmp_path):
    kind = pa.list_(pa.float32(), 8)
    vectors = [*twin_vectors()[:3], None, *twin_vectors()[3:], [1, None, 0, 0, 0, 0, 0, 0]]
    first = table_of([*twin_ids()[:3], "null", *twin_ids()[3:], "hole"], vectors, embedding_type=kind)
    second = table_of(["short"], [[1, 2, 3]], embedding_type=pa.list_(pa.float32(), 3))
    _, out = run(tmp_path, [first, second])
    assert rejected(out) == [
        ("hole", "0.parquet", 13, "embedding contains a null value"),
        ("null", "0.parquet", 3, "null embedding"),
        ("short", "1.parquet", 0, "embedding has the wrong length"),
    ]
    assert witnesses(out) == TWINS


@pytest.mark.parametrize("memory", ["2GB", "500MB"])
def test_a_unit_of_nothing_but_rejected_rows_is_told_once(tmp_path, monkeypatch, memory):
    """Each file is a unit of work of its own, whether its rows are held in memory or read again."""
    monkeypatch.setattr("untwin.plan._MIN_UNIT_BYTES", 1)
    monkeypatch.setattr("untwin.plan._SLICE_BYTES", 1)
    bad = table_of([f"bad-{row}" for row in range(7)], [[0.0] * 8] * 7)
    _, out = run(tmp_path, [twin_table(), bad, table_of(["more"], [[1.0] * 8])], memory=memory)
    facts = json.loads((out / "run.json").read_text())
    assert facts["rows"]["rejected"] == 7
    assert facts["rows"]["rejected_reasons"] == {"embedding has zero norm": 7}
    assert [row[0] for row in rejected(out)] == [f"bad-{row}" for row in range(7)]
    (sample,) = (stage for stage in facts["stages"] if stage["name"] == "sample")
    assert sample["units"] >= 3


def test_null_ids_are_rejected_whatever_their_vector(tmp_path):
    table = table_of([None, *twin_ids(), None], [twin_vectors()[0], *twin_vectors(), None])
    result, out = run(tmp_path, [table])
    rows = read_folder(out / "rejected").to_pylist()
    assert [(row["id"], row["row"], row["reason"]) for row in rows] == [(None, 0, "null id"), (None, 13, "null id")]
    assert result.n_rejected == 2
    assert witnesses(out) == TWINS


def test_files_of_nothing_but_rejected_or_no_rows(tmp_path):
    nothing = table_of(["x", "y"], [None, None])
    _, out = run(tmp_path, [nothing, twin_table(), twin_table().slice(0, 0)])
    assert rejected(out) == [("x", "0.parquet", 0, "null embedding"), ("y", "0.parquet", 1, "null embedding")]
    assert witnesses(out) == TWINS


@pytest.mark.parametrize(("embedding_dim", "wrong"), [(None, "short"), (8, "short"), (3, "long")])
def test_the_right_length_is_the_one_given_or_the_commonest(tmp_path, embedding_dim, wrong):
    n_short = 11
    long = table_of(twin_ids(), twin_vectors())
    short = table_of([f"short{i:02}" for i in range(n_short)], np.random.default_rng(0).normal(size=(n_short, 3)))
    if embedding_dim == 3:  # one long row fewer, so that not more than half is wrong
        long = long.slice(1)
    result, out = run(tmp_path, [short, long], embedding_dim=embedding_dim)
    ids = (short if wrong == "short" else long)["id"].to_pylist()
    assert sorted(row[0] for row in rejected(out)) == ids
    assert {row[3] for row in rejected(out)} == {"embedding has the wrong length"}
    assert result.n_rejected == 11
    stored = pq.read_schema(out / "kmeans" / "centroid=0" / "part-0.parquet").field("embedding").type
    assert stored.list_size == (embedding_dim or 8)


def test_the_same_id_with_the_same_vector_again_is_a_repeated_row(tmp_path):
    again = twin_table().take(pa.array([3, 7, 3]))
    result, out = run(tmp_path, [twin_table(), again, twin_table().slice(7, 1)])
    assert rejected(out) == [
        ("row03", "1.parquet", 0, "repeated row"),
        ("row03", "1.parquet", 2, "repeated row"),
        ("row07", "1.parquet", 1, "repeated row"),
        ("row07", "2.parquet", 0, "repeated row"),
    ]
    assert (result.n_rows, result.n_kept, result.n_duplicates, result.n_rejected) == (16, 6, 6, 4)
    assert witnesses(out) == TWINS
    assert ids_of(out / "kept") == twin_ids()[:6]


def test_repeated_rows_count_once_without_a_threshold(tmp_path):
    """Nothing is removed then: the rows that stay are those that are compared."""
    result, _ = run(tmp_path, [twin_table(), twin_table().slice(2, 3)], eps=None)
    assert (result.n_kept, result.n_duplicates, result.n_rejected) == (twin_table().num_rows, 0, 3)


def test_a_vector_that_differs_in_length_only_is_the_same_unit_vector(tmp_path):
    scaled = table_of(["row00"], [2 * twin_vectors()[0]])
    _, out = run(tmp_path, [twin_table(), scaled])
    assert rejected(out) == [("row00", "1.parquet", 0, "repeated row")]


def test_an_invalid_row_does_not_count_as_the_first_of_its_id(tmp_path):
    _, out = run(tmp_path, [table_of(["row00"], [None]), twin_table()])
    assert rejected(out) == [("row00", "0.parquet", 0, "null embedding")]
    assert witnesses(out) == TWINS


def test_the_same_id_with_another_vector_is_an_error_that_names_ids_and_files(tmp_path):
    other = table_of(["row05", "row02"], [[1] * 8, [2] + [1] * 7])
    with pytest.raises(RepeatedIdError) as error:
        run(tmp_path, [twin_table(), other])
    text = str(error.value)
    folder = tmp_path / "in"
    assert f"'row02': {folder}/0.parquet (row 2) and {folder}/1.parquet (row 1)" in text
    assert f"'row05': {folder}/0.parquet (row 5) and {folder}/1.parquet (row 0)" in text
    assert "--on-repeated-id first" in text
    assert "row03" not in text


def test_the_error_names_ten_ids_at_most_and_how_many_more(tmp_path):
    other = table_of(twin_ids(), -twin_vectors())
    with pytest.raises(RepeatedIdError) as error:
        run(tmp_path, [twin_table(), other])
    lines = str(error.value).splitlines()
    assert sum(line.startswith("  'row") for line in lines) == 10
    assert "  and 2 more" in lines


def test_the_error_names_integer_ids(tmp_path):
    table = table_of([7, 8, 7], [[1, 0], [0, 1], [1, 1]], id_type=pa.int64())
    with pytest.raises(RepeatedIdError, match=r"  7: .*0\.parquet \(row 0\) and .*0\.parquet \(row 2\)"):
        run(tmp_path, [table])


def test_on_repeated_id_first_keeps_the_first_in_the_order_of_files(tmp_path):
    other = table_of(["row05", "row02", "row02"], [[1] * 8, twin_vectors()[2], [2] + [1] * 7])
    result, out = run(tmp_path, [twin_table(), other], on_repeated_id="first")
    assert rejected(out) == [
        ("row02", "1.parquet", 1, "repeated row"),
        ("row02", "1.parquet", 2, "repeated id with another vector"),
        ("row05", "1.parquet", 0, "repeated id with another vector"),
    ]
    assert result.n_rejected == 3
    assert witnesses(out) == TWINS
    kept = read_folder(out / "kept")
    assert kept["embedding"].to_pylist() == twin_table()["embedding"].to_pylist()[:6]


def test_half_may_be_rejected_but_not_more(tmp_path):
    bad = table_of([f"bad{i:02}" for i in range(13)], [[0.0] * 8] * 13)
    result, _ = run(tmp_path / "half", [twin_table(), bad.slice(1)])
    assert (result.n_rejected, result.n_rows) == (12, 24)
    with pytest.raises(TooManyRejectedError) as error:
        run(tmp_path / "more", [twin_table(), bad])
    assert "13 of 25 rows cannot be judged" in str(error.value)
    assert "13 rows: embedding has zero norm" in str(error.value)


def test_nothing_that_can_be_judged(tmp_path):
    with pytest.raises(TooManyRejectedError):
        run(tmp_path, [table_of(["a", "b"], [[0.0, 0.0], [float("nan"), 1.0]])])


def test_a_container_in_a_url_is_no_password(tmp_path):
    """`abfs://container@account/...`: rejected rows are told by the whole path, and counted."""
    import fsspec

    memory = fsspec.filesystem("memory")
    with memory.open("/box@account/in/a.parquet", "wb") as sink:
        pq.write_table(table_of(["a", "b", "c", "d"], [[1, 0], None, [0, 1], [1, 1]]), sink)
    try:
        result = deduplicate("memory://box@account/in/a.parquet", tmp_path / "out", eps=0.05)
    finally:
        memory.rm("/box@account", recursive=True)
    assert (result.n_kept, result.n_rejected) == (3, 1)
    (row,) = read_folder(tmp_path / "out" / "rejected").to_pylist()
    assert row["file"] == "memory://box@account/in/a.parquet"
