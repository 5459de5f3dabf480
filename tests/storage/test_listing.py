"""The listing of the input: files, order, row numbers, and what is wrong with them."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from untwin.errors import ChangedInputError, DamagedFileError, InputNotFoundError, ParameterError, SchemaError
from untwin.storage import inputs, listing
from untwin.storage.files import Storage
from untwin.storage.listing import Fields, Listing, list_inputs
from untwin.storage.rows import read_rows

STORAGE = Storage()
FIELDS = Fields("id", "embedding")


def table_of(ids, dim=2, **columns):
    vectors = [[float(at), 1.0, *([0.0] * (dim - 2))][:dim] for at in range(len(ids))]
    return pa.table({"id": ids, "embedding": pa.array(vectors, pa.list_(pa.float32())), **columns})


def write(path, table, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)


@pytest.fixture
def folder(tmp_path):
    """Five files, three of them without rows (one of these has an empty row group), row groups of 3 rows."""
    empty = table_of(["x"]).slice(0, 0)
    write(tmp_path / "in/a.parquet", empty)
    write(tmp_path / "in/b.parquet", table_of([f"b{at}" for at in range(7)]), row_group_size=3)
    write(tmp_path / "in/c/c.parquet", empty)
    write(tmp_path / "in/c/d.parquet", table_of([f"d{at}" for at in range(4)]), row_group_size=3)
    write(tmp_path / "in/e.parquet", empty)
    return tmp_path / "in"


def all_rows(listing, columns=("id",), size=100):
    groups = listing.groups()
    spans = listing.spans(0, len(groups.rows), groups)
    return list(read_rows(STORAGE, listing.format, spans, list(columns), size))


def test_row_numbers_run_through_the_files_in_the_order_of_their_paths(folder):
    listing = list_inputs(STORAGE, [str(folder)], FIELDS)
    assert listing.n_rows == 11
    assert listing.files["relative"].to_pylist() == [
        *("a.parquet", "b.parquet", "c/c.parquet", "c/d.parquet", "e.parquet")
    ]
    assert listing.files["first_row"].to_pylist() == [0, 0, 7, 7, 11]
    assert listing.dim == 2
    groups = listing.groups()
    assert groups.rows[groups.rows > 0].tolist() == [3, 3, 1, 3, 1]
    names, within = listing.locate(np.array([0, 6, 7, 10, 2]))
    assert [name.rpartition("/")[2] for name in names] == [
        *("b.parquet", "b.parquet", "d.parquet", "d.parquet", "b.parquet")
    ]
    assert within.tolist() == [0, 6, 0, 3, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_batches_are_numbered_and_of_about_the_wanted_size(folder, size):
    listing = list_inputs(STORAGE, [str(folder)], FIELDS)
    want = [f"b{at}" for at in range(7)] + [f"d{at}" for at in range(4)]
    seen = 0
    for batch in all_rows(listing, size=size):
        assert batch.first_row == seen
        assert 0 < batch.columns.num_rows <= max(size, 3)
        assert batch.columns.schema.names == ["id"]
        assert batch.columns.column(0).to_pylist() == want[seen : seen + batch.columns.num_rows]
        seen += batch.columns.num_rows
    assert seen == 11


def test_any_range_of_pieces_is_read_alone(folder):
    listing = list_inputs(STORAGE, [str(folder)], FIELDS)
    groups = listing.groups()
    want = [f"b{at}" for at in range(7)] + [f"d{at}" for at in range(4)]
    for low in range(len(groups.rows)):
        for high in range(low + 1, len(groups.rows) + 1):
            spans = listing.spans(low, high, groups)
            got = [row for batch in read_rows(STORAGE, listing.format, spans, ["id"], 2) for row in batch.columns[0]]
            assert [row.as_py() for row in got] == want[groups.starts[low] : groups.starts[high]]


def test_a_listing_comes_back_as_it_was_written(folder, tmp_path):
    write(folder / "f.parquet", table_of(["f"], note=pa.array([1], pa.int32())))
    listing = list_inputs(STORAGE, [str(folder / "f.parquet")], Fields("id", "embedding", ("note",)))
    listing.write(STORAGE, str(tmp_path / "listing.parquet"))
    read = Listing.read(STORAGE, str(tmp_path / "listing.parquet"))
    assert read.files.equals(listing.files)
    assert read.digest() == listing.digest()
    assert (read.filetype, read.id_type, read.dim, read.metadata_types) == (
        *("parquet", pa.string(), 2),
        (pa.int32(),),
    )
    read.check_unchanged(STORAGE)


def test_the_digest_follows_paths_sizes_and_times_and_nothing_else(folder, tmp_path):
    def digest(path=folder):
        return list_inputs(STORAGE, [str(path)], FIELDS).digest()

    first = digest()
    assert digest() == first
    (folder / "_notes.parquet").write_bytes(b"not data")
    (folder / ".hidden.parquet").write_bytes(b"not data")
    (folder / "readme.txt").write_bytes(b"not data")
    assert digest() == first
    status = (folder / "b.parquet").stat()
    os.utime(folder / "b.parquet", ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    assert digest() != first
    os.utime(folder / "b.parquet", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest() == first
    write(folder / "g.parquet", table_of(["g"]))
    assert digest() != first
    (folder / "g.parquet").unlink()
    folder.rename(tmp_path / "moved")
    assert digest(tmp_path / "moved") != first


def test_a_file_that_changed_since_it_was_listed_is_named(folder):
    listing = list_inputs(STORAGE, [str(folder)], FIELDS)
    write(folder / "b.parquet", table_of(["b0"] * 3))
    with pytest.raises(ChangedInputError, match=r"b.parquet: this input file changed since the run"):
        listing.check_unchanged(STORAGE)
    with pytest.raises((ChangedInputError, DamagedFileError), match=r"b.parquet"):
        all_rows(listing)
    (folder / "b.parquet").unlink()
    with pytest.raises(ChangedInputError, match=r"b.parquet: this input file is gone"):
        listing.check_unchanged(STORAGE)


def test_each_file_counts_once_and_equal_relative_paths_are_told_apart(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name / "part.parquet", table_of([name]))
    given = [str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "one/part.parquet"), str(tmp_path / "*")]
    listing = list_inputs(STORAGE, given, FIELDS)
    assert listing.n_rows == 2
    relative = listing.files["relative"].to_pylist()
    assert len(set(relative)) == 2
    assert [name.split("-")[0] for name in relative] == ["one", "two"]
    assert all(name.endswith("/part.parquet") for name in relative)


def test_excluded_folders_and_names_with_an_underscore_are_left_out(tmp_path):
    for name in ("in/a", "in/out/kept/b", "in/_work/c", "in/outer/d"):
        write(tmp_path / f"{name}.parquet", table_of([name]))
    listing = list_inputs(STORAGE, [str(tmp_path / "in")], FIELDS, exclude=[str(tmp_path / "in/out")])
    assert listing.files["relative"].to_pylist() == ["a.parquet", "outer/d.parquet"]


def test_hive_folder_names_give_no_columns(tmp_path):
    write(tmp_path / "in/day=7/a.parquet", table_of(["a"]))
    listing = list_inputs(STORAGE, [str(tmp_path / "in")], FIELDS)
    (batch,) = all_rows(listing, columns=["id", "embedding"])
    assert batch.columns.schema.names == ["id", "embedding"]
    groups = listing.groups()
    (batch,) = read_rows(STORAGE, listing.format, listing.spans(0, 1, groups), None, 10)
    assert batch.columns.schema.names == ["id", "embedding"]


def test_a_curator_output_is_recognised_by_its_embeddings_folder(tmp_path):
    write(tmp_path / "clips/meta.parquet", pa.table({"x": [1]}))
    write(tmp_path / "iv2_embd_parquet/a.parquet", table_of(["iv2"]))
    assert list_inputs(STORAGE, [str(tmp_path)], FIELDS).n_rows == 1
    write(tmp_path / "ce1_embd_parquet/a.parquet", table_of(["ce1", "x"]))
    with pytest.raises(ParameterError, match=r"several sets of embeddings \(ce1_embd_parquet, iv2_embd_parquet\)"):
        list_inputs(STORAGE, [str(tmp_path)], FIELDS)
    for algorithm, rows in (("cosmos-embed1-224p", 2), ("internvideo2", 1), ("ce1", 2)):
        (tmp_path / "summary.json").write_text(json.dumps({"embedding_algorithm": algorithm}))
        assert list_inputs(STORAGE, [str(tmp_path)], FIELDS).n_rows == rows
    (tmp_path / "summary.json").write_text(json.dumps({"embedding_algorithm": "other"}))
    with pytest.raises(ParameterError, match="does not say which one"):
        list_inputs(STORAGE, [str(tmp_path)], FIELDS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", r"nowhere: no such file or folder"),
        ("in/*.csv", r"in/\*\.csv: the pattern matches nothing"),
        ("empty", r"empty: no \*\.parquet \*\.parq \*\.pq files in this folder"),
        ("norows", r"norows: the files hold no rows"),
    ],
)
def test_inputs_that_are_not_there(tmp_path, folder, given, message):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "norows/a.parquet", table_of(["x"]).slice(0, 0))
    with pytest.raises(InputNotFoundError, match=message):
        list_inputs(STORAGE, [str(tmp_path / given)], FIELDS)
    with pytest.raises(InputNotFoundError, match="no input path"):
        list_inputs(STORAGE, [], FIELDS)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"uid": ["a"]}), r"z.parquet: no column 'id'; it has 'uid'"),
        (pa.table({"id": ["a"]}), r"z.parquet: no column 'embedding'; it has 'id'"),
        (pa.table({"id": [0.5], "embedding": [[1.0]]}), r"z.parquet: column 'id' has type double; an id is"),
        (pa.table({"id": [1], "embedding": [[1.0]]}), r"column 'id' is string in .*b.parquet but int64 in .*z.parquet"),
        (
            pa.table({"id": ["a"], "embedding": [1.0]}),
            r"z.parquet: column 'embedding' has type double; an embedding is",
        ),
        (pa.table({"id": ["a"], "embedding": [[1]]}), r"z.parquet: column 'embedding' has type list<.*int64>"),
        (
            pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array([[1.0]])], ["id", "id", "embedding"]),
            r"z.parquet: more than one column is called 'id'",
        ),
    ],
    ids=range(7),
)
def test_columns_of_any_file_that_cannot_be_used_are_named(folder, table, message):
    for name in ("a", "c/c", "e"):
        (folder / f"{name}.parquet").unlink()
    write(folder / "z.parquet", table)
    with pytest.raises(SchemaError, match=message):
        list_inputs(STORAGE, [str(folder)], FIELDS)


def test_a_footer_that_cannot_be_read_names_the_file(folder):
    (folder / "z.parquet").write_bytes((folder / "b.parquet").read_bytes()[:-20])
    with pytest.raises(DamagedFileError, match=r"z.parquet: cannot be read .*repair or remove the file"):
        list_inputs(STORAGE, [str(folder)], FIELDS)
    (folder / "z.parquet").write_bytes(b"")
    with pytest.raises(DamagedFileError, match=r"z.parquet: cannot be read"):
        list_inputs(STORAGE, [str(folder)], FIELDS)


def test_the_dimension_is_that_of_the_type_or_the_commonest(tmp_path):
    fixed = pa.table({"id": ["a"], "embedding": pa.array([[1.0, 2, 3]], pa.list_(pa.float32(), 3))})
    write(tmp_path / "fixed/a.parquet", fixed)
    assert list_inputs(STORAGE, [str(tmp_path / "fixed")], FIELDS).dim == 3
    lists = [[1.0]] * 3 + [[1.0, 2.0]] * 4 + [None] * 9 + [[]] * 9
    write(tmp_path / "free/a.parquet", pa.table({"id": range(25), "embedding": lists}))
    assert list_inputs(STORAGE, [str(tmp_path / "free")], FIELDS).dim == 2


# ---- JSON lines and arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [5, 64, 1 << 20])
def test_json_lines_are_the_same_rows_however_they_are_cut(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(inputs, "_CHUNK_BYTES", chunk)
    lines = [json.dumps({"id": f"ä{at}", "embedding": [at, 1], "note": "x" * at}).encode() for at in range(30)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines[:20]) + b"\n\n  \n")
    (tmp_path / "b.ndjson").write_bytes(b"\n" + b"\n".join(lines[20:]))
    listing = list_inputs(STORAGE, [str(tmp_path)], FIELDS, filetype="jsonl")
    assert listing.n_rows == 30
    assert listing.dim == 2
    batches = all_rows(listing, columns=["id", "embedding"], size=7)
    assert [row.as_py() for batch in batches for row in batch.columns["id"]] == [f"ä{at}" for at in range(30)]
    vectors = [row.as_py() for batch in batches for row in batch.columns["embedding"]]
    assert vectors == [[at, 1] for at in range(30)]
    assert {str(batch.columns["embedding"].type.value_type) for batch in batches} == {"double"}
    groups = listing.groups()
    verbatim = []
    for low in range(len(groups.rows)):
        spans = listing.spans(low, low + 1, groups)
        for batch in read_rows(STORAGE, listing.format, spans, None, 4):
            verbatim += [row.as_py() for row in batch.columns["line"]]
    assert verbatim == lines


def test_a_line_that_is_not_json_names_its_row(tmp_path):
    good = [json.dumps({"id": str(at), "embedding": [1.0]}) for at in range(1200)]
    good[1100] = '{"id": "x", "embedding": [1.0'
    (tmp_path / "a.jsonl").write_text("\n".join(good))
    listing = list_inputs(STORAGE, [str(tmp_path)], FIELDS, filetype="jsonl")
    with pytest.raises(DamagedFileError, match=r"a.jsonl: row 1100 is not JSON"):
        all_rows(listing)


def late(number, at, early, then):
    return early if number < at else then


@pytest.mark.parametrize("at", [0, 99, 100, 150, 249, 250])
@pytest.mark.parametrize(
    "changing",
    [
        lambda number, at: {"id": late(number, at, None, "x")},
        lambda number, at: {"n": late(number, at, 1, 0.5)},
        lambda number, at: {"n": late(number, at, None, [1])},
        lambda number, at: {"embedding": late(number, at, [1, 2], [0.5, 1.5])},
        lambda number, at: {"embedding": late(number, at, [], [0.5, 1.5])},
        lambda number, at: {"embedding": late(number, at, None, [1, 2])},
        lambda number, at: {} if number < at else {"n": 3},
    ],
)
@pytest.mark.parametrize("n_lines", [100, 250])
def test_json_columns_beside_one_of_mixed_types_do_not_depend_on_the_lines_seen_first(
    monkeypatch, changing, at, n_lines
):
    rows = [{"id": f"{number}", "embedding": [1.0, 2.0], **changing(number, at)} for number in range(n_lines)]
    lines = [json.dumps({**row, "mixed": [number, "text"][number % 2]}).encode() for number, row in enumerate(rows)]
    found = inputs._parse_lines(lines, ["id", "embedding", "n"])
    monkeypatch.setattr(inputs, "_INFERRED_LINES", 10**6)
    assert found.equals(inputs._parse_lines(lines, ["id", "embedding", "n"]))
    wanted = [{"n": None, **row} for row in rows]
    assert found.select(["embedding", "id", "n"]).to_pylist() == [
        {name: row[name] for name in ("embedding", "id", "n")} for row in wanted
    ]


def test_json_lines_are_looked_at_by_hand_a_few_only(monkeypatch):
    lines = [json.dumps({"id": f"{n}", "embedding": [1.0], "mixed": [n, "text"][n % 2]}).encode() for n in range(5000)]
    looked_at = []
    loads = json.loads
    monkeypatch.setattr(inputs.json, "loads", lambda line: looked_at.append(line) or loads(line))
    assert inputs._parse_lines(lines, ["id", "embedding"])["id"].to_pylist() == [f"{n}" for n in range(5000)]
    assert 0 < len(looked_at) <= 100


def test_arrays_and_their_metadata_are_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_CHUNK_BYTES", 40)
    X = np.random.default_rng(0).normal(size=(23, 3)).astype(np.float16)
    (tmp_path / "img_emb").mkdir()
    for number, (low, high) in enumerate(((0, 10), (10, 23))):
        np.save(tmp_path / f"img_emb/img_emb_{number}.npy", X[low:high])
        table = pa.table({"id": range(low, high), "caption": [f"c{at}" for at in range(low, high)]})
        write(tmp_path / f"metadata/metadata_{number}.parquet", table, row_group_size=4)
    listing = list_inputs(STORAGE, [str(tmp_path)], FIELDS, filetype="npy")
    assert (listing.n_rows, listing.dim) == (23, 3)
    groups = listing.groups()
    assert len(groups.rows) > 4
    for low in range(len(groups.rows)):
        start, end = groups.starts[low], groups.starts[low + 1]
        spans = list(listing.spans(low, low + 1, groups))
        batches = [batch.columns for batch in read_rows(STORAGE, listing.format, spans, ["id", "embedding"], 3)]
        assert [row.as_py() for batch in batches for row in batch["id"]] == list(range(start, end))
        got = [row.as_py() for batch in batches for row in batch["embedding"]]
        assert got == X[start:end].tolist()


def test_arrays_that_do_not_fit_their_metadata_are_named(tmp_path):
    np.save(tmp_path / "img_emb_0.npy", np.zeros((5, 2), np.float32))
    with pytest.raises(DamagedFileError, match=r"img_emb_0.npy: its metadata_0.parquet is missing"):
        list_inputs(STORAGE, [str(tmp_path)], FIELDS, filetype="npy")
    write(tmp_path / "metadata_0.parquet", pa.table({"id": range(4)}))
    with pytest.raises(DamagedFileError, match=r"img_emb_0.npy: 5 rows, but .*metadata_0.parquet has 4"):
        list_inputs(STORAGE, [str(tmp_path)], FIELDS, filetype="npy")
    (tmp_path / "img_emb_0.npy").write_bytes((tmp_path / "img_emb_0.npy").read_bytes()[:-3])
    with pytest.raises(DamagedFileError, match=r"img_emb_0.npy: \d+ bytes where its header says"):
        list_inputs(STORAGE, [str(tmp_path)], FIELDS, filetype="npy")
    np.save(tmp_path / "img_emb_0.npy", np.zeros((5, 2), np.int32))
    with pytest.raises(SchemaError, match=r"img_emb_0.npy: holds int32"):
        list_inputs(STORAGE, [str(tmp_path)], FIELDS, filetype="npy")
    np.save(tmp_path / "img_emb_0.npy", np.array([{"evil": 1}], dtype=object), allow_pickle=True)
    with pytest.raises((SchemaError, DamagedFileError), match=r"img_emb_0.npy"):
        list_inputs(STORAGE, [str(tmp_path)], FIELDS, filetype="npy")


def test_of_files_with_equal_columns_one_schema_is_kept(tmp_path, monkeypatch):
    """A million schemas would be gigabytes."""
    seen = []
    check = listing._check_schemas
    monkeypatch.setattr(listing, "_check_schemas", lambda schemas, *rest: seen.extend(schemas) or check(schemas, *rest))
    for number in range(20):
        kind = pa.float32() if number < 15 else pa.float64()
        table = pa.table({"id": [f"{number}"], "embedding": pa.array([[1.0, 2.0]], pa.list_(kind))})
        pq.write_table(table, tmp_path / f"{number:02}.parquet")
    list_inputs(STORAGE, [str(tmp_path)], FIELDS)
    assert [path[-10:] for path, _ in seen] == ["00.parquet", "15.parquet"]
    assert not seen[0][1].equals(seen[1][1])
