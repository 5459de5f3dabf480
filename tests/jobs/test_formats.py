"""Every form of input gives the answer that can be seen, and what stays comes out in the form it came in."""

import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inputs import (
    N_TWINS,
    TWINS,
    ids_of,
    parquet_files,
    read_files,
    read_folder,
    snapshot,
    table_of,
    twin_ids,
    twin_table,
    twin_vectors,
    witnesses,
    write_parquet,
    write_split,
)
from untwin import deduplicate
from untwin.errors import DamagedFileError, InputNotFoundError, ParameterError, SchemaError, UntwinError

KEPT = twin_ids()[:N_TWINS]


def run(source, out, **options):
    return deduplicate(source, str(out), **{"eps": 0.05, "rank_by": "id:asc", **options})


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- types -----------------------------------------------------------------------------------------------------------


def lists(shape, kind):
    return {"list": pa.list_(kind), "large": pa.large_list(kind), "fixed": pa.list_(kind, 8)}[shape]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
@pytest.mark.parametrize("shape", ["list", "large", "fixed"])
def test_every_type_of_embedding(tmp_path, shape, kind):
    vectors = twin_vectors().astype(kind.to_pandas_dtype())
    table = table_of(twin_ids(), vectors, embedding_type=lists(shape, kind))
    source = write_parquet(tmp_path / "in.parquet", table, row_group_size=5)
    run(source, tmp_path / "out")
    assert witnesses(tmp_path / "out") == TWINS
    kept = read_folder(tmp_path / "out" / "kept")
    assert kept.schema.equals(table.schema)
    assert kept.equals(table.slice(0, N_TWINS))
    stored = read_folder(tmp_path / "out" / "kmeans")
    stored = stored.sort_by("_row")
    assert stored.schema.field("embedding").type == pa.list_(pa.float32(), 8)
    wide = vectors.astype(np.float64)
    unit = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    assert np.allclose(np.stack(stored["embedding"].to_numpy()), unit, atol=1e-7)


ID_TYPES = {
    "string": (pa.string(), twin_ids()),
    "large_string": (pa.large_string(), twin_ids()),
    "string_view": (pa.string_view(), twin_ids()),
    "int32": (pa.int32(), [i - 5 for i in range(12)]),
    "int64": (pa.int64(), [-(2**62) + i for i in range(12)]),
    "uint64": (pa.uint64(), [2**64 - 12 + i for i in range(12)]),
    "binary16": (pa.binary(16), [bytes([i] * 16) for i in range(12)]),
    "binary": (pa.binary(), [bytes([i] * (1 + i)) for i in range(12)]),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), twin_ids()),
}


@pytest.mark.parametrize("name", ID_TYPES)
def test_every_type_of_id(tmp_path, name):
    id_type, ids = ID_TYPES[name]
    plain = pa.array(ids, id_type.value_type).dictionary_encode() if name == "dictionary" else pa.array(ids, id_type)
    table = twin_table().set_column(0, "id", plain)
    folder = write_split(tmp_path / "in", table, 3)
    run(folder, tmp_path / "out")
    wanted = {ids[i + N_TWINS]: ids[i] for i in range(N_TWINS)}
    assert witnesses(tmp_path / "out") == wanted
    duplicates = read_folder(tmp_path / "out" / "duplicates")
    written = {"dictionary": pa.string(), "string_view": pa.string()}.get(name, id_type)
    assert duplicates.schema.field("id").type == duplicates.schema.field("kept_id").type == written
    assert duplicates["id"].to_pylist() == sorted(wanted)
    assert read_folder(tmp_path / "out" / "kept").to_pylist() == table.slice(0, N_TWINS).to_pylist()
    groups = pq.read_table(tmp_path / "out" / "groups.parquet")
    assert groups["id"].to_pylist() == [name for i in range(N_TWINS) for name in (ids[i], ids[i + N_TWINS])]


def test_files_with_compatible_types_are_one_input(tmp_path):
    one, two, three = (twin_table().slice(low, 4) for low in (0, 4, 8))
    two = two.set_column(0, "id", two["id"].cast(pa.large_string()))
    two = two.set_column(1, "embedding", two["embedding"].cast(pa.large_list(pa.float64())))
    three = three.set_column(1, "embedding", three["embedding"].cast(pa.list_(pa.float32(), 8)))
    three = three.append_column("more", pa.array([1, 2, 3, 4]))
    for number, table in enumerate((one, two, three)):
        write_parquet(
            tmp_path / "in" / f"{number}.parquet", table.select(table.column_names[::-1] if number else [0, 1])
        )
    run(str(tmp_path / "in"), tmp_path / "out")
    assert witnesses(tmp_path / "out") == TWINS
    rows = [row for path in parquet_files(tmp_path / "out" / "kept") for row in pq.ParquetFile(path).read().to_pylist()]
    assert [row["id"] for row in rows] == KEPT
    assert [row["embedding"] for row in rows] == twin_table()["embedding"].to_pylist()[:N_TWINS]


def test_order_of_kept_files_is_the_order_of_the_input_where_types_cannot_be_united(tmp_path):
    table = twin_table(n=pa.array(range(12)))
    parts = [table.slice(low, 3) for low in (0, 3, 6, 9)]
    parts[1] = parts[1].set_column(2, "n", parts[1]["n"].cast(pa.string()))
    for number, part in enumerate(parts):
        write_parquet(tmp_path / "in" / f"{number}.parquet", part)
    run(str(tmp_path / "in"), tmp_path / "out", rank_by="id:desc")
    kept = [pq.ParquetFile(path).read() for path in parquet_files(tmp_path / "out" / "kept")]
    assert [name for part in kept for name in part["id"].to_pylist()] == twin_ids()[N_TWINS:]
    run(str(tmp_path / "in"), tmp_path / "out2")
    kept = [pq.ParquetFile(path).read() for path in parquet_files(tmp_path / "out2" / "kept")]
    assert [name for part in kept for name in part["id"].to_pylist()] == KEPT
    assert [value for part in kept for value in part["n"].to_pylist()] == [0, 1, 2, "3", "4", "5"]


def test_a_column_that_only_some_files_have_is_null_in_the_others(tmp_path):
    write_parquet(tmp_path / "in" / "0.parquet", twin_table().slice(0, 3))
    write_parquet(tmp_path / "in" / "1.parquet", twin_table(n=pa.array(range(12))).slice(3))
    run(str(tmp_path / "in"), tmp_path / "out")
    (path,) = parquet_files(tmp_path / "out" / "kept")
    kept = pq.read_table(path)
    assert kept["id"].to_pylist() == KEPT
    assert kept["n"].to_pylist() == [None, None, None, 3, 4, 5]


def test_ids_of_different_kinds_are_refused(tmp_path):
    write_parquet(tmp_path / "in" / "0.parquet", twin_table())
    write_parquet(tmp_path / "in" / "1.parquet", table_of([1, 2], twin_vectors()[:2]))
    with pytest.raises(SchemaError, match=r"'id' is string in .*0\.parquet but int64 in .*1\.parquet"):
        run(str(tmp_path / "in"), tmp_path / "out")


def test_other_columns_may_have_the_same_name(tmp_path):
    table = twin_table(x=pa.array(range(12)), y=pa.array("abcdefghijkl")).rename_columns(["id", "embedding", "x", "x"])
    source = write_parquet(tmp_path / "in.parquet", table, row_group_size=5)
    run(source, tmp_path / "out")
    kept = read_folder(tmp_path / "out" / "kept")
    assert kept.schema.equals(table.schema)
    assert kept.equals(table.slice(0, N_TWINS))


def test_other_names_of_the_columns(tmp_path):
    table = twin_table().rename_columns(["clip", "vec"])
    run(
        write_parquet(tmp_path / "in.parquet", table),
        tmp_path / "out",
        id_field="clip",
        embedding_field="vec",
        rank_by="clip:asc",
    )
    assert witnesses(tmp_path / "out") == TWINS
    assert read_folder(tmp_path / "out" / "kept").equals(table.slice(0, N_TWINS))
    clusters = read_folder(tmp_path / "out" / "kmeans")
    assert clusters.column_names == ["clip", "vec", "l2_dist_to_cent", "cosine_dist_to_cent", "_row"]


def test_no_columns_are_invented_from_names_of_folders(tmp_path):
    write_parquet(tmp_path / "in" / "kind=a" / "0.parquet", twin_table().slice(0, 6))
    write_parquet(tmp_path / "in" / "kind=b" / "0.parquet", twin_table().slice(6))
    run(str(tmp_path / "in"), tmp_path / "out")
    assert witnesses(tmp_path / "out") == TWINS
    for name in ("kept", "duplicates", "kmeans/centroid=0", "pairwise"):
        for path in parquet_files(tmp_path / "out" / name):
            assert not {"kind", "centroid"} & set(pq.read_schema(path).names) or name == "duplicates"
    assert read_folder(tmp_path / "out" / "kept").column_names == ["id", "embedding"]


# --- jsonl and npy ---------------------------------------------------------------------------------------------------


def json_lines():
    """Twelve lines of odd but valid spelling."""
    lines = []
    for number, (name, vector) in enumerate(zip(twin_ids(), twin_vectors(), strict=True)):
        values = ", ".join(f"{value:.2e}" if number % 2 else f"{value:g}" for value in vector)
        note = ['"naïve \\u00e9 😀"', "null", "1e3", "[1,  2]"][number % 4] if number < 6 else '"x"'
        lines.append(f'  {{"id":"{name}",   "embedding": [{values}], "note{number % 3}": {note}}} ')
    return lines


@pytest.mark.parametrize("layout", ["compact", "mirror"])
def test_json_lines_stay_verbatim(tmp_path, layout):
    lines = json_lines()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n" + "\n\n".join(lines[:4]) + "\n   \n\n", encoding="utf-8")
    (folder / "b.ndjson").write_bytes(("\r\n".join(lines[4:])).encode())  # no end of line at the end
    (folder / "notes.txt").write_text("not data")
    result = run(str(folder), tmp_path / "out", input_filetype="jsonl", kept=layout)
    assert result.n_rows == 12
    assert witnesses(tmp_path / "out") == TWINS
    kept = tmp_path / "out" / "kept"
    contents = [path.read_bytes() for path in sorted(kept.rglob("*"))]
    found = b"".join(contents).splitlines(keepends=False)
    assert [line.decode().rstrip("\r") for line in found] == lines[:6]
    if layout == "mirror":
        assert names(kept) == ["a.jsonl", "b.ndjson"]


def test_json_lines_with_bad_rows(tmp_path):
    good = [json.dumps({"id": i, "embedding": v.tolist()}) for i, v in zip(twin_ids(), twin_vectors(), strict=True)]
    bad = ['{"id": "none", "embedding": null}', '{"id": "missing"}', '{"id": "empty", "embedding": []}']
    bad += ['{"embedding": [1, 0, 0, 0, 0, 0, 0, 0]}', '{"id": "hole", "embedding": [1, null, 0, 0, 0, 0, 0, 0]}']
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join([*bad[:2], *good, *bad[2:]]) + "\n")
    run(str(tmp_path / "in"), tmp_path / "out", input_filetype="jsonl")
    assert witnesses(tmp_path / "out") == TWINS
    found = {(row["id"], row["row"]): row["reason"] for row in read_folder(tmp_path / "out" / "rejected").to_pylist()}
    assert found == {
        ("none", 0): "null embedding",
        ("missing", 1): "null embedding",
        ("empty", 14): "empty embedding",
        (None, 15): "null id",
        ("hole", 16): "embedding contains a null value",
    }


def test_a_json_file_without_a_single_embedding_is_rejected_rows_not_an_error(tmp_path):
    good = [json.dumps({"id": i, "embedding": v.tolist()}) for i, v in zip(twin_ids(), twin_vectors(), strict=True)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(good))
    (tmp_path / "in" / "b.jsonl").write_text('{"id": "x", "embedding": null}\n{"id": "y", "embedding": null}\n')
    run(str(tmp_path / "in"), tmp_path / "out", input_filetype="jsonl")
    assert witnesses(tmp_path / "out") == TWINS
    assert ids_of(tmp_path / "out" / "rejected") == ["x", "y"]


@pytest.mark.parametrize("first", ["null, 0.5", "null, null, 1"])
def test_a_null_at_the_beginning_of_the_first_vector_of_json_lines_moves_no_value(tmp_path, first):
    rest = [
        f'{{"id": "{name}", "embedding": {v}}}' for name, v in zip(twin_ids(), twin_vectors().tolist(), strict=True)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join([f'{{"id": "bad", "embedding": [{first}]}}', *rest]))
    result = run(str(tmp_path / "in.jsonl"), tmp_path / "out", input_filetype="jsonl", embedding_dim=8)
    assert result.n_rejected == 1
    assert witnesses(tmp_path / "out") == TWINS
    stored = read_folder(tmp_path / "out" / "kmeans").sort_by("_row")
    assert np.allclose(
        stored["embedding"].to_pylist(),
        twin_vectors() / np.linalg.norm(twin_vectors(), axis=1, keepdims=True),
        atol=1e-6,
    )


def test_json_integer_ids_and_whole_number_vectors(tmp_path):
    lines = [json.dumps({"id": i, "embedding": [i % 3 == 0, i % 3 == 1, i % 3 == 2]}) for i in range(6)]
    text = "\n".join(lines).replace("true", "1").replace("false", "0")
    (tmp_path / "in.jsonl").write_text(text)
    run(str(tmp_path / "in.jsonl"), tmp_path / "out", input_filetype="jsonl")
    assert witnesses(tmp_path / "out") == {3: 0, 4: 1, 5: 2}


def test_json_ids_that_look_like_dates_are_text(tmp_path):
    days = [f"2024-01-{day:02}" for day in (3, 4, 5, 6)]
    lines = [json.dumps({"id": d, "embedding": v, "day": d}) for d, v in zip(days, [[1, 0], [0, 1]] * 2, strict=True)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    run(str(tmp_path / "in.jsonl"), tmp_path / "out", input_filetype="jsonl", rank_by="day:asc")
    assert witnesses(tmp_path / "out") == {days[2]: days[0], days[3]: days[1]}


def test_a_json_column_to_rank_by_that_becomes_fractional_is_named(tmp_path):
    """Its type comes from the first lines: whole numbers."""
    lines = [json.dumps({"id": i, "embedding": [1, i], "d": i}) for i in range(1000)]
    lines += [json.dumps({"id": 1000, "embedding": [1, 0], "d": 0.5})]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with pytest.raises(SchemaError, match=r"in\.jsonl.*column 'd' is double where it was int64 .*one type"):
        run(str(tmp_path / "in.jsonl"), tmp_path / "out", input_filetype="jsonl", rank_by="d:desc")


def test_json_ids_of_mixed_types_are_refused_by_name(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "embedding": [1, 0]}\n{"id": "a", "embedding": [0, 1]}\n')
    with pytest.raises(SchemaError, match=r"in\.jsonl: column 'id' has type .*int.*str"):
        run(str(tmp_path / "in.jsonl"), tmp_path / "out", input_filetype="jsonl")


def test_a_line_that_is_not_json_is_named_by_its_row(tmp_path):
    lines = [json.dumps({"id": i, "embedding": v.tolist()}) for i, v in zip(twin_ids(), twin_vectors(), strict=True)]
    lines[7] = lines[7][:-9]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with pytest.raises(DamagedFileError, match=r"in\.jsonl: "):
        run(str(tmp_path / "in.jsonl"), tmp_path / "out", input_filetype="jsonl")
    lines = [*(line for line in json_lines() for _ in range(100)), "{"]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with pytest.raises(DamagedFileError, match=r"in\.jsonl: row 1200 is not JSON"):
        run(str(tmp_path / "in.jsonl"), tmp_path / "out", input_filetype="jsonl")


def write_pairs(folder, *, flat, dtype=np.float16, cuts=(0, 5, 5, 12)):
    """CLIP retrieval's pairs of files, one of them without a row; returns the metadata as a table."""
    metadata = pa.table({"id": twin_ids(), "caption": [f"a picture of {i}" for i in range(12)], "w": range(12)})
    for number, (low, high) in enumerate(pairwise(cuts)):
        arrays, tables = (folder, folder) if flat else (folder / "img_emb", folder / "metadata")
        arrays.mkdir(parents=True, exist_ok=True)
        np.save(arrays / f"img_emb_{number}.npy", twin_vectors()[low:high].astype(dtype))
        np.save(arrays / f"text_emb_{number}.npy", np.ones((high - low, 8), np.float16))
        write_parquet(tables / f"metadata_{number}.parquet", metadata.slice(low, high - low))
    return metadata


def read_pairs(folder):
    """Vectors and metadata of all pairs below a folder, by number, as a reader of such files finds them."""
    arrays = sorted(folder.rglob("img_emb_*.npy"), key=lambda path: int(path.stem.rpartition("_")[2]))
    vectors, tables = [], []
    for path in arrays:
        number = path.stem.rpartition("_")[2]
        (table,) = folder.rglob(f"metadata_{number}.parquet")
        vectors.append(np.load(path))
        tables.append(pq.ParquetFile(table).read())
        assert len(vectors[-1]) == tables[-1].num_rows
    return np.concatenate(vectors), pa.concat_tables(tables)


@pytest.mark.parametrize("layout", ["compact", "mirror"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "folders"])
def test_pairs_of_npy_and_parquet(tmp_path, flat, dtype, layout):
    metadata = write_pairs(tmp_path / "in", flat=flat, dtype=dtype)
    out = tmp_path / "out"
    result = run(str(tmp_path / "in"), out, input_filetype="npy", kept=layout, rank_by="w:asc")
    assert (result.n_rows, result.n_kept, result.n_duplicates) == (12, 6, 6)
    assert witnesses(out) == TWINS
    vectors, tables = read_pairs(out / "kept")
    assert vectors.dtype == dtype
    assert vectors.tobytes() == twin_vectors()[:6].astype(dtype).tobytes()
    assert tables.equals(metadata.slice(0, 6))
    # what was written can be read again, and replaced
    again = run(str(out / "kept"), tmp_path / "again", input_filetype="npy", rank_by="w:asc")
    assert (again.n_rows, again.n_duplicates) == (6, 0)
    run(str(tmp_path / "in"), out, input_filetype="npy", kept="none", rank_by="w:asc", overwrite=True)
    assert not (out / "kept").exists()


def test_npy_without_its_metadata_or_of_another_length_is_named(tmp_path):
    write_pairs(tmp_path / "in", flat=True)
    (tmp_path / "in" / "metadata_2.parquet").unlink()
    with pytest.raises(DamagedFileError, match=r"img_emb_2\.npy: its metadata_2\.parquet is missing"):
        run(str(tmp_path / "in"), tmp_path / "out", input_filetype="npy")
    write_parquet(tmp_path / "in" / "metadata_2.parquet", pa.table({"id": ["a"]}))
    with pytest.raises(DamagedFileError, match=r"img_emb_2\.npy: 7 rows, but .*metadata_2\.parquet has 1"):
        run(str(tmp_path / "in"), tmp_path / "out", input_filetype="npy")
    assert not (tmp_path / "out").exists()


# --- where the files are ---------------------------------------------------------------------------------------------


def test_nested_folders_files_globs_and_several_inputs(tmp_path):
    table = twin_table()
    write_parquet(tmp_path / "in" / "a" / "x" / "0.parquet", table.slice(0, 2))
    write_parquet(tmp_path / "in" / "a" / "1.parq", table.slice(2, 2))
    write_parquet(tmp_path / "in" / "b" / "c" / "d" / "2.PARQUET", table.slice(4, 4))
    write_parquet(tmp_path / "other" / "3.pq", table.slice(8, 4))
    for ignored in ("in/_metadata/m.parquet", "in/a/.hidden.parquet", "in/a/_tmp.parquet", "in/.git/g.parquet"):
        write_parquet(tmp_path / ignored, table_of([ignored], [[1] * 8]))
    (tmp_path / "in" / "readme.txt").write_text("not data")
    ways = {
        "folders": [str(tmp_path / "in"), str(tmp_path / "other")],
        "twice": [
            str(tmp_path / "in"),
            str(tmp_path / "other"),
            str(tmp_path / "in" / "a"),
            str(tmp_path / "other" / "3.pq"),
        ],
        "globs": [f"{tmp_path}/in/[!r]*", f"{tmp_path}/oth?r/[0-9].pq"],
        "deep glob": [f"{tmp_path}/in/**/[0-9].*", f"{tmp_path}/other/3.pq"],
    }
    for name, inputs in ways.items():
        result = run(inputs, tmp_path / f"out {name}")
        assert result.n_rows == 12, name
        assert witnesses(tmp_path / f"out {name}") == TWINS, name


def test_output_inside_input_is_not_read(tmp_path):
    folder = tmp_path / "data"
    write_split(folder / "part", twin_table(), 3)
    out = folder / "clean"
    first = run(str(folder), out)
    assert first.n_rows == 12
    before = snapshot(out)
    assert run(str(folder), out).n_rows == 12
    assert snapshot(out) == before
    again = run(str(folder), out, overwrite=True, kept="mirror")
    assert again.n_rows == 12
    assert witnesses(out) == TWINS


@pytest.mark.parametrize("pattern", ["*", "**", "**/*.parquet"])
def test_output_that_a_glob_of_the_input_matches_is_not_read(tmp_path, pattern):
    folder = tmp_path / "data"
    write_split(folder / "part", twin_table(), 3)
    out = folder / "clean"
    for _ in range(2):  # the second time the output is there
        assert run(str(folder / pattern), out).n_rows == 12
    assert run(str(folder / pattern), out, overwrite=True, kept="mirror").n_rows == 12
    assert witnesses(out) == TWINS


def test_a_folder_that_only_starts_like_the_output_is_read(tmp_path):
    write_split(tmp_path / "data" / "out-2", twin_table(), 2)
    result = run(str(tmp_path / "data"), tmp_path / "data" / "out")
    assert result.n_rows == 12


def curator(folder, names, summary=None):
    """A Curator output: the right answer in the first set of embeddings, other rows in the others."""
    for number, name in enumerate(names):
        table = twin_table() if number == 0 else table_of(["wrong"], [[1] * 8])
        write_parquet(folder / name / "0a1b.parquet", table)
    write_parquet(folder / "metas" / "m.parquet", pa.table({"x": [1]}))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


@pytest.mark.parametrize(
    ("names", "summary"),
    [
        (["iv2_embd_parquet"], None),
        (["ce1_embd_parquet"], {"embedding_algorithm": "something else"}),
        (["iv2_embd_parquet", "ce1_embd_parquet"], {"embedding_algorithm": "internvideo2"}),
        (["ce1_embd_parquet", "iv2_embd_parquet"], {"embedding_algorithm": "cosmos-embed1-224p"}),
        (["own_embd_parquet", "iv2_embd_parquet"], {"embedding_algorithm": "own"}),
    ],
)
def test_a_curator_output_is_recognised(tmp_path, names, summary):
    source = curator(tmp_path / "in", names, summary)
    run(source, tmp_path / "out")
    assert witnesses(tmp_path / "out") == TWINS
    assert ids_of(tmp_path / "out" / "kept") == KEPT


@pytest.mark.parametrize("summary", [None, {}, {"embedding_algorithm": "unknown"}, ["list"]])
def test_several_sets_of_embeddings_without_a_summary_that_decides_are_listed(tmp_path, summary):
    source = curator(tmp_path / "in", ["iv2_embd_parquet", "ce1_embd_parquet"], summary)
    with pytest.raises(ParameterError, match=r"ce1_embd_parquet, iv2_embd_parquet"):
        run(source, tmp_path / "out")


def test_a_summary_that_is_not_json_is_named(tmp_path):
    source = curator(tmp_path / "in", ["iv2_embd_parquet", "ce1_embd_parquet"])
    (tmp_path / "in" / "summary.json").write_text("{bad")
    with pytest.raises(DamagedFileError, match=r"summary\.json: is not JSON"):
        run(source, tmp_path / "out")


def test_a_folder_without_data(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("{}")
    with pytest.raises(InputNotFoundError, match=r"in: no \*\.parquet"):
        run(str(tmp_path / "in"), tmp_path / "out")
    write_parquet(tmp_path / "in" / "a.parquet", twin_table().slice(0, 0))
    with pytest.raises(InputNotFoundError, match="hold no rows"):
        run(str(tmp_path / "in"), tmp_path / "out")


# --- kept ------------------------------------------------------------------------------------------------------------


def with_pandas_metadata(table):
    """As pandas' `to_parquet` writes it: a range index, described with its number of rows."""
    columns = [
        {"name": name, "field_name": name, "pandas_type": "x", "numpy_type": "x", "metadata": None}
        for name in table.column_names
    ]
    index = {"kind": "range", "name": None, "start": 0, "stop": table.num_rows, "step": 1}
    described = {"index_columns": [index], "column_indexes": [], "columns": columns, "pandas_version": "2.2.0"}
    return table.replace_schema_metadata({"pandas": json.dumps(described)})


def test_many_tiny_files_become_one(tmp_path):
    rng = np.random.default_rng(3)
    n = 1000
    X = rng.standard_normal((n, 16))
    X[n // 2 :] = X[: n // 2]
    ids = [f"clip-{i:04}" for i in rng.permutation(n)]
    table = table_of(ids, X, embedding_type=pa.list_(pa.float64()), id_type=pa.large_string())
    low = number = 0
    while low < n:  # 1 to 9 rows a file, so that the index differs
        size = 1 + number % 9
        write_parquet(
            tmp_path / "in" / f"{number:04}.parquet", with_pandas_metadata(table.slice(low, size)), compression="snappy"
        )
        low, number = low + size, number + 1
    assert number > 150
    result = run(str(tmp_path / "in"), tmp_path / "out")
    assert (result.n_kept, result.n_duplicates) == (500, 500)
    (path,) = parquet_files(tmp_path / "out" / "kept")
    kept = pq.ParquetFile(path).read()
    stays = {min(ids[i], ids[i + n // 2]) for i in range(n // 2)}
    assert kept["id"].to_pylist() == [name for name in ids if name in stays]
    metadata = json.loads(kept.schema.metadata[b"pandas"])
    assert metadata["index_columns"] == []
    assert len(metadata["columns"]) == 2
    assert kept.schema.field("embedding").type == pa.list_(pa.float64())
    assert pq.read_metadata(path).row_group(0).column(0).compression == "SNAPPY"
    assert len(list((tmp_path / "out" / "duplicates").glob("*.parquet"))) == 1


def test_mirror_has_a_file_for_each_input_file_under_its_relative_path(tmp_path):
    table = twin_table()
    parts = {"a/x.parquet": (0, 4), "a/y.parquet": (4, 3), "b/x.parquet": (7, 5)}
    for name, (low, size) in parts.items():
        write_parquet(tmp_path / "in" / name, table.slice(low, size))
    run(str(tmp_path / "in"), tmp_path / "out", kept="mirror")
    kept = tmp_path / "out" / "kept"
    assert names(kept) == sorted(parts)
    for name, (low, size) in parts.items():
        found = pq.read_table(kept / name, partitioning=None)
        assert found.equals(table.slice(low, max(0, min(6, low + size) - low)))
        assert found.schema.equals(table.schema)


def test_mirror_gives_files_without_rows_a_file_without_rows(tmp_path):
    """Such a file has the same first row number as the one behind it."""
    table = twin_table()
    for name, (low, size) in {"a": (0, 4), "b": (4, 0), "c": (4, 5), "d": (9, 0), "e": (9, 3)}.items():
        write_parquet(tmp_path / "in" / f"{name}.parquet", table.slice(low, size))
    run(str(tmp_path / "in"), tmp_path / "out", kept="mirror")
    kept = {path.name: pq.read_table(path)["id"].to_pylist() for path in parquet_files(tmp_path / "out" / "kept")}
    assert kept == {"a.parquet": KEPT[:4], "b.parquet": [], "c.parquet": KEPT[4:], "d.parquet": [], "e.parquet": []}


def test_mirror_keeps_files_apart_that_have_the_same_name(tmp_path):
    table = twin_table()
    write_parquet(tmp_path / "one" / "x.parquet", table.slice(0, 3))
    write_parquet(tmp_path / "two" / "x.parquet", table.slice(3, 3))
    write_parquet(tmp_path / "two" / "y.parquet", table.slice(6, 3))
    write_parquet(tmp_path / "two" / "y.pq", table.slice(9, 3))
    inputs = [str(tmp_path / "one"), str(tmp_path / "two")]
    run(inputs, tmp_path / "out", kept="mirror")
    kept = tmp_path / "out" / "kept"
    written = [path for path in kept.rglob("*") if path.is_file()]
    assert len(written) == 4
    assert sorted(read_files(written)["id"].to_pylist()) == KEPT
    # all of them are known as ours
    run(inputs, tmp_path / "out", kept="mirror", overwrite=True, rank_by="id:desc")
    written = [path for path in kept.rglob("*") if path.is_file()]
    assert sorted(read_files(written)["id"].to_pylist()) == twin_ids()[6:]


def test_kept_none_writes_no_rows(tmp_path):
    result = run(write_parquet(tmp_path / "in.parquet", twin_table()), tmp_path / "out", kept="none")
    assert not (tmp_path / "out" / "kept").exists()
    assert witnesses(tmp_path / "out") == TWINS
    assert (result.n_kept, result.n_duplicates) == (6, 6)
    assert result.kept_ids()["id"].to_pylist() == KEPT


def test_drop_intermediate_leaves_the_answer_only(tmp_path):
    run(write_parquet(tmp_path / "in.parquet", twin_table()), tmp_path / "out", drop_intermediate=True)
    left = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("_")}
    assert left == {"duplicates", "groups.parquet", "kept", "run.json"}
    assert witnesses(tmp_path / "out") == TWINS
    assert ids_of(tmp_path / "out" / "kept") == KEPT


def test_drop_intermediate_without_eps_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="drop_intermediate"):
        run(write_parquet(tmp_path / "in.parquet", twin_table()), tmp_path / "out", eps=None, drop_intermediate=True)


@pytest.mark.parametrize("codec", ["none", "zstd", "gzip", "lz4", "brotli"])
def test_kept_has_the_codec_of_the_input(tmp_path, codec):
    source = write_parquet(tmp_path / "in.parquet", twin_table(), compression=codec)
    run(source, tmp_path / "out")
    (path,) = parquet_files(tmp_path / "out" / "kept")
    before, after = (pq.read_metadata(file).row_group(0).column(0).compression for file in (source, path))
    assert after == before


def test_no_scratch_is_left(tmp_path):
    run(write_split(tmp_path / "in", twin_table(), 3), tmp_path / "out")
    left = [name for name in names(tmp_path / "out") if "_work" in name or "_tmp" in name]
    assert left == []
    assert names(tmp_path / "in") == [f"part-{i:05}.parquet" for i in range(3)]


# --- larger than one piece -------------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces, batches and files so small that twelve rows are many of them."""
    monkeypatch.setattr("untwin.storage.inputs._CHUNK_BYTES", 150)
    monkeypatch.setattr("untwin.stages.removal._FILE_BYTES", 400)
    monkeypatch.setattr("untwin.stages.removal._MIRROR_BYTES", 400)
    monkeypatch.setattr("untwin.plan._MIN_UNIT_BYTES", 1)
    monkeypatch.setattr("untwin.plan._MAX_UNIT_BYTES", 64)
    monkeypatch.setattr("untwin.stages.removal.batch_rows", lambda _: 2)
    monkeypatch.setattr("untwin.stages.clustering.batch_rows", lambda _: 2)


@pytest.mark.parametrize("layout", ["compact", "mirror"])
def test_many_pieces_of_json_lines(tmp_path, small_pieces, layout):
    lines = json_lines()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n\n".join(lines) + "\n" * 400, encoding="utf-8")
    (tmp_path / "in" / "b.jsonl").write_text("\n")
    result = run(str(tmp_path / "in"), tmp_path / "out", input_filetype="jsonl", kept=layout)
    assert result.n_rows == 12
    assert {stage.name: stage.units for stage in result.timings}["assign"] > 5
    assert witnesses(tmp_path / "out") == TWINS
    files = sorted((tmp_path / "out" / "kept").glob("*.jsonl"))
    assert len(files) == 1 if layout == "mirror" else len(files) > 1
    assert "".join(path.read_text(encoding="utf-8") for path in files).splitlines() == lines[:6]


@pytest.mark.parametrize("layout", ["compact", "mirror"])
def test_many_pieces_of_npy(tmp_path, small_pieces, layout):
    metadata = write_pairs(tmp_path / "in", flat=False, dtype=np.float64, cuts=(0, 2, 12))
    result = run(str(tmp_path / "in"), tmp_path / "out", input_filetype="npy", kept=layout)
    assert {stage.name: stage.units for stage in result.timings}["assign"] > 5
    assert witnesses(tmp_path / "out") == TWINS
    vectors, tables = read_pairs(tmp_path / "out" / "kept")
    assert vectors.tobytes() == twin_vectors()[:6].astype(np.float64).tobytes()
    assert tables.equals(metadata.slice(0, 6))


@pytest.mark.parametrize("layout", ["compact", "mirror"])
def test_many_pieces_of_parquet(tmp_path, small_pieces, layout):
    table = twin_table(text=pa.array(["words " * i for i in range(12)]))
    folder = tmp_path / "in"
    write_parquet(folder / "a.parquet", table.slice(0, 9), row_group_size=2, compression="none")
    write_parquet(folder / "b.parquet", table.slice(9, 3), compression="none")
    result = run(str(folder), tmp_path / "out", kept=layout, rank_by="id:desc")
    assert {stage.name: stage.units for stage in result.timings}["assign"] > 4
    files = parquet_files(tmp_path / "out" / "kept")
    assert len(files) == 2 if layout == "mirror" else len(files) > 1
    assert read_files(files).equals(table.slice(6))
    stored = read_folder(tmp_path / "out" / "kmeans").sort_by("_row")
    assert stored["id"].to_pylist() == twin_ids()


def test_tensors_of_a_fixed_shape(tmp_path):
    kind = pa.fixed_shape_tensor(pa.float32(), [8])
    storage = pa.FixedSizeListArray.from_arrays(pa.array(twin_vectors().reshape(-1)), 8)
    table = pa.table({"id": twin_ids(), "embedding": pa.ExtensionArray.from_storage(kind, storage)})
    run(write_split(tmp_path / "in", table, 2), tmp_path / "out")
    assert witnesses(tmp_path / "out") == TWINS
    kept = read_folder(tmp_path / "out" / "kept")
    assert kept.schema.equals(table.schema)
    assert kept["embedding"].combine_chunks().storage.equals(storage.slice(0, 6))


def test_a_parquet_file_of_null_embeddings_without_a_type_is_rejected_rows(tmp_path):
    write_parquet(tmp_path / "in" / "0.parquet", pa.table({"id": ["x", None], "embedding": pa.nulls(2)}))
    write_parquet(tmp_path / "in" / "1.parquet", twin_table(n=pa.array(range(12))))
    write_parquet(tmp_path / "in" / "2.parquet", pa.table({"id": pa.nulls(1), "embedding": [[1.0] * 8]}))
    run(str(tmp_path / "in"), tmp_path / "out")
    assert witnesses(tmp_path / "out") == TWINS
    rejected = read_folder(tmp_path / "out" / "rejected")
    found = [(row["file"][-9:], row["id"], row["reason"]) for row in rejected.sort_by("file").to_pylist()]
    assert found[0] == ("0.parquet", "x", "null embedding")
    assert sorted(row[0] for row in found) == ["0.parquet", "0.parquet", "2.parquet"]
    assert found[2][2] == "null id"


def test_an_embedding_column_of_nulls_only_is_refused(tmp_path):
    source = write_parquet(tmp_path / "0.parquet", pa.table({"id": ["x", "y"], "embedding": pa.nulls(2)}))
    with pytest.raises(UntwinError):
        run(source, tmp_path / "out")
