"""Files whose types differ are one input where they mean the same; else the error names both files."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inputs import ids_of, parquet_files, read_files, read_folder, table_of, twin_table, write_parquet, write_split
from untwin import deduplicate
from untwin.errors import SchemaError

TYPES = [
    pa.list_(pa.float32()),
    pa.large_list(pa.float64()),
    pa.list_(pa.float32(), 256),
    pa.list_(pa.float64()),
    pa.list_(pa.float64(), 256),
    pa.large_list(pa.float32()),
]


@pytest.fixture(scope="module")
def rows(debian_sample):
    """Real rows: text ids, float32 vectors (so that float64 says the same), and a column of texts."""
    table = read_files(debian_sample.files)
    vectors = table["embedding"].combine_chunks().flatten().cast(pa.float32()).to_numpy().reshape(-1, 256)
    return table_of(table["id"].to_pylist(), vectors, text=table["text"])


def write_drifted(folder, table, id_types):
    """A file for each type of vectors: with other columns, in another order, with ids of other types."""
    step = -(-table.num_rows // len(TYPES))
    for number, kind in enumerate(TYPES):
        part = table.slice(number * step, step)
        part = part.set_column(1, "embedding", part["embedding"].cast(kind))
        id_type = id_types[number % len(id_types)]
        ids = (
            part["id"].cast(id_type.value_type).dictionary_encode()
            if pa.types.is_dictionary(id_type)
            else part["id"].cast(id_type)
        )
        part = part.set_column(0, "id", ids)
        if number % 2:
            part = part.append_column("more", pa.array(range(part.num_rows)))
        names = part.column_names
        write_parquet(folder / f"{number}.parquet", part.select(names[number % 2 :] + names[: number % 2]))
    return str(folder)


TEXT = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
NUMBERS = [pa.int32(), pa.int64(), pa.int16()]


@pytest.mark.parametrize("id_types", [TEXT, NUMBERS], ids=["text", "numbers"])
@pytest.mark.parametrize("kept", ["compact", "mirror"])
def test_files_that_mean_the_same_give_the_answer_of_uniform_files(rows, tmp_path, id_types, kept):
    table = rows
    if id_types is NUMBERS:
        table = rows.set_column(0, "id", pa.array(np.random.default_rng(0).permutation(rows.num_rows)))
    options = {"eps": 0.05, "n_clusters": 8, "kept": kept, "rank_by": "id:asc"}
    plain = deduplicate(write_split(tmp_path / "plain", table, 6), str(tmp_path / "out-plain"), **options)
    mixed = deduplicate(write_drifted(tmp_path / "mixed", table, id_types), str(tmp_path / "out-mixed"), **options)
    assert mixed.duplicates().to_pylist() == plain.duplicates().to_pylist()
    assert mixed.n_duplicates > 100
    assert mixed.n_rejected == 0
    for name in ("pairwise", "groups.parquet"):
        one, other = tmp_path / "out-plain" / name, tmp_path / "out-mixed" / name
        pairs = (pq.read_table(one), pq.read_table(other)) if name.endswith("t") else map(read_folder, (one, other))
        assert len({str(part.to_pylist()) for part in pairs}) == 1

    removed = set(mixed.duplicates()["id"].to_pylist())
    given = [row for path in parquet_files(tmp_path / "mixed") for row in pq.ParquetFile(path).read().to_pylist()]
    found = [
        row
        for path in parquet_files(tmp_path / "out-mixed" / "kept")
        for row in pq.ParquetFile(path).read().to_pylist()
    ]
    assert [_without_nulls(row) for row in found] == [_without_nulls(row) for row in given if row["id"] not in removed]
    assert len(found) == mixed.n_kept
    if kept == "mirror":
        for path in parquet_files(tmp_path / "out-mixed" / "kept"):
            assert pq.read_schema(path).equals(pq.read_schema(tmp_path / "mixed" / path.name))


def _without_nulls(row):
    return {name: value for name, value in row.items() if value is not None}


def test_vectors_of_another_length_are_rejected_row_by_row_whatever_the_type(tmp_path):
    write_parquet(tmp_path / "in" / "0.parquet", twin_table(embedding_type=pa.list_(pa.float32(), 8)))
    short = table_of(["s0", "s1"], [[1, 2, 3], [3, 2, 1]], embedding_type=pa.list_(pa.float32(), 3))
    write_parquet(tmp_path / "in" / "1.parquet", short)
    result = deduplicate(str(tmp_path / "in"), str(tmp_path / "out"), eps=0.05)
    assert result.run["rows"]["rejected_reasons"] == {"embedding has the wrong length": 2}
    assert ids_of(tmp_path / "out" / "rejected") == ["s0", "s1"]


ONE = twin_table(size=pa.array(range(12)))
OTHERS = {
    "ids of another kind": (
        ONE.set_column(0, "id", pa.array(range(12))),
        r"'id' is string in .*b\.parquet but int64 in .*c\.parquet",
    ),
    "ids that are none": (
        ONE.set_column(0, "id", pa.array([0.5] * 12)),
        r"c\.parquet: column 'id' has type double.*b\.parquet it is string",
    ),
    "no embedding": (ONE.drop_columns(["embedding"]), r"c\.parquet: no column 'embedding'.*[ab]\.parquet has it"),
    "embedding of whole numbers": (
        ONE.set_column(1, "embedding", pa.array([[1, 2]] * 12)),
        r"c\.parquet: column 'embedding' has type list<.*int64>.*in .*b\.parquet it is",
    ),
    "another ranking column": (
        ONE.set_column(2, "size", pa.array(["large"] * 12)),
        r"'size' is int64 in .*b\.parquet but string in .*c\.parquet",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("skip_bad_files", [False, True])
def test_files_that_do_not_mean_the_same_are_named_both(tmp_path, what, skip_bad_files):
    other, message = OTHERS[what]
    nothing = pa.table({"id": pa.nulls(2), "embedding": pa.nulls(2), "size": pa.nulls(2)})
    write_parquet(tmp_path / "in" / "a.parquet", nothing)  # of no type: never one of the two
    write_parquet(tmp_path / "in" / "b.parquet", ONE)
    write_parquet(tmp_path / "in" / "c.parquet", other)
    with pytest.raises(SchemaError, match=message):
        deduplicate(
            str(tmp_path / "in"), str(tmp_path / "out"), eps=0.05, rank_by="size:asc", skip_bad_files=skip_bad_files
        )
    assert not (tmp_path / "out").exists()


def test_the_first_file_is_named_too_when_it_is_the_one_without_the_column(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", ONE.drop_columns(["embedding"]))
    write_parquet(tmp_path / "in" / "b.parquet", ONE)
    with pytest.raises(SchemaError, match=r"a\.parquet: no column 'embedding'.*b\.parquet has it"):
        deduplicate(str(tmp_path / "in"), str(tmp_path / "out"), eps=0.05)
