"""`IdentifyDuplicatesStage` and `RemoveDuplicatesStage` against sets and plain loops."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stage_oracles import all_pairs, planted, read_clusters

from oracle import ranked_rows
from untwin.backends.local import LocalExecutor
from untwin.errors import InputNotFoundError, OutputExistsError, ParameterError, SchemaError
from untwin.pipeline import Pipeline
from untwin.stages import removal
from untwin.stages.duplicates import IdentifyDuplicatesStage
from untwin.stages.kmeans import KMeansStage
from untwin.stages.pairwise import PairwiseStage
from untwin.stages.removal import RemoveDuplicatesStage
from untwin.storage.files import Storage
from untwin.storage.kept import NpyKept, ParquetKept

DIM, EPS = 10, 0.03
CONCAT_BATCHES = pa.concat_batches


def write_input(folder, n=300, files=4, id_type=None):
    """Files with an extra column; returns the whole table."""
    id_type = id_type or pa.string()
    ids, vectors = planted(n, DIM, seed=2)
    table = pa.table(
        {
            "text": pa.array([f"row {at}" for at in range(n)]),
            "id": pa.array(ids).cast(id_type),
            "embedding": pa.array(vectors.tolist(), pa.list_(pa.float64())),
        }
    )
    folder.mkdir()
    for number, part in enumerate(np.array_split(np.arange(n), files)):
        pq.write_table(table.slice(part[0], len(part)), folder / f"{number}.parquet", row_group_size=31)
    return table


def first_stages(tmp_path, eps=EPS, compare_to="kept", n_clusters=5):
    return [
        KMeansStage(n_clusters, "id", "embedding", str(tmp_path / "in"), str(tmp_path / "kmeans")),
        PairwiseStage(
            *("id", "embedding", str(tmp_path / "kmeans"), str(tmp_path / "pairs")), compare_to=compare_to, eps=eps
        ),
    ]


def expected(tmp_path, eps=EPS, compare_to="kept"):
    """All rows as `all_pairs` judges them, with their cluster."""
    rows = []
    for centroid, table in read_clusters(tmp_path / "kmeans").items():
        facts = table.select(["id", "cosine_dist_to_cent"]).to_pylist()
        order = ranked_rows(facts, ["cosine_dist_to_cent"], [False])
        vectors = np.array(table["embedding"].to_pylist())[order]
        judged = all_pairs([facts[at]["id"] for at in order], vectors, eps, compare_to)
        rows += [{**row, "centroid": centroid} for row in judged]
    return rows


@pytest.mark.parametrize("compare_to", ["kept", "ranked"])
@pytest.mark.parametrize("memory", [1 << 30, 100 << 20])
def test_duplicates_groups_and_kept_rows_are_those_of_the_definition(tmp_path, compare_to, memory):
    table = write_input(tmp_path / "in")
    stages = [
        *first_stages(tmp_path, compare_to=compare_to),
        IdentifyDuplicatesStage(str(tmp_path / "out"), EPS),
        RemoveDuplicatesStage(str(tmp_path / "in"), str(tmp_path / "kept")),
    ]
    Pipeline(stages=stages).run(LocalExecutor(2, memory))
    judged = expected(tmp_path, compare_to=compare_to)
    removed = {row["id"]: row for row in judged if row["removed"]}
    assert len(removed) > 40

    duplicates = pq.read_table(tmp_path / "out/duplicates")
    assert duplicates.schema.names == ["id", "kept_id", "cosine_sim_score", "centroid"]
    assert duplicates.schema.field("centroid").type == pa.int32()
    assert duplicates["id"].to_pylist() == sorted(removed)
    for row in duplicates.to_pylist():
        want = removed[row["id"]]
        assert row["kept_id"] == want["kept_id"]
        assert row["centroid"] == want["centroid"]
        if want["kept_id"] is None:
            assert row["cosine_sim_score"] is None
        else:
            assert row["cosine_sim_score"] == pytest.approx(want["kept_score"], abs=1e-5)

    groups = pq.read_table(tmp_path / "out/groups.parquet")
    assert groups.schema.names == ["group_id", "id", "role", "score"]
    found = {}
    for row in groups.to_pylist():
        found.setdefault(row["group_id"], []).append(row)
    witnesses = {}
    for own, row in removed.items():
        if row["kept_id"] is not None:
            witnesses.setdefault(row["kept_id"], set()).add(own)
    assert sorted(found) == list(range(len(witnesses)))
    for members in found.values():
        (head,) = [row["id"] for row in members if row["role"] == "kept"]
        assert {row["id"] for row in members if row["role"] == "duplicate"} == witnesses[head]
        assert len(members) == 1 + len(witnesses[head])

    kept = pq.read_table(tmp_path / "kept")
    stays = table.filter(pa.array([own not in removed for own in table["id"].to_pylist()]))
    assert kept.schema.equals(stays.schema)
    assert kept.equals(stays)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["duplicates", "groups.parquet"]
    assert not [path for path in (tmp_path / "kept").iterdir() if path.name.startswith("_")]


def test_without_eps_in_pairwise_the_original_rule_holds_and_no_witness_is_known(tmp_path):
    table = write_input(tmp_path / "in")
    stages = [
        *first_stages(tmp_path, eps=None, compare_to="ranked"),
        IdentifyDuplicatesStage(str(tmp_path / "out"), EPS),
        RemoveDuplicatesStage(str(tmp_path / "in"), str(tmp_path / "kept")),
    ]
    Pipeline(stages=stages).run()
    removed = {row["id"] for row in expected(tmp_path, compare_to="ranked") if row["removed"]}
    duplicates = pq.read_table(tmp_path / "out/duplicates")
    assert duplicates["id"].to_pylist() == sorted(removed)
    assert duplicates["kept_id"].null_count == duplicates.num_rows
    assert duplicates["kept_id"].type == duplicates["id"].type
    assert pq.read_metadata(tmp_path / "out/groups.parquet").num_rows == 0
    assert pq.read_table(tmp_path / "kept")["id"].to_pylist() == [
        own for own in table["id"].to_pylist() if own not in removed
    ]


def test_an_input_without_duplicates_gives_empty_lists_with_all_columns(tmp_path):
    (tmp_path / "in").mkdir()
    table = pa.table({"id": list("abc"), "embedding": pa.array(np.eye(3).tolist(), pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "in/x.parquet")
    stages = [
        *first_stages(tmp_path, n_clusters=1),
        IdentifyDuplicatesStage(str(tmp_path / "out"), EPS),
        RemoveDuplicatesStage(str(tmp_path / "in"), str(tmp_path / "kept")),
    ]
    Pipeline(stages=stages).run()
    duplicates = pq.read_table(tmp_path / "out/duplicates")
    assert duplicates.num_rows == 0
    assert duplicates.schema.names == ["id", "kept_id", "cosine_sim_score", "centroid"]
    assert pq.read_table(tmp_path / "kept").equals(table)


def test_another_eps_than_that_of_the_pairwise_results_is_refused_before_the_work(tmp_path):
    write_input(tmp_path / "in")
    stages = [*first_stages(tmp_path, eps=0.1), IdentifyDuplicatesStage(str(tmp_path / "out"), 0.2)]
    with pytest.raises(ParameterError, match=r"eps is 0.2, but the pairwise results were resolved with eps 0.1"):
        Pipeline(stages=stages).run()
    with pytest.raises(ParameterError, match="add a PairwiseStage right before it"):
        Pipeline(stages=[*first_stages(tmp_path)[:1], IdentifyDuplicatesStage(str(tmp_path / "out"), 0.2)]).run()
    with pytest.raises(ParameterError, match="eps"):
        IdentifyDuplicatesStage(str(tmp_path / "out"), 0.0)
    with pytest.raises(ParameterError, match="output_path is None"):
        IdentifyDuplicatesStage(None, 0.1)
    with pytest.raises(ParameterError, match="'filters' is not supported"):
        IdentifyDuplicatesStage(str(tmp_path / "out"), 0.1, read_kwargs={"filters": []})
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_identify_refuses_an_output_that_is_there(tmp_path):
    write_input(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/groups.parquet").write_bytes(b"older")
    stages = [*first_stages(tmp_path), IdentifyDuplicatesStage(str(tmp_path / "out"), EPS)]
    with pytest.raises(OutputExistsError, match=r"groups.parquet: is there already"):
        Pipeline(stages=stages).run()
    assert (tmp_path / "out/groups.parquet").read_bytes() == b"older"
    assert not (tmp_path / "kmeans").exists()


# ---- removal by id, without row numbers -------------------------------------------------------------------------


def remove(tmp_path, duplicates, executor=None, **options):
    stage = RemoveDuplicatesStage(
        str(tmp_path / "in"), str(tmp_path / "kept"), duplicates_path=str(duplicates), **options
    )
    return Pipeline(stages=[stage]).run(executor)


@pytest.mark.parametrize(
    ("input_type", "list_type"),
    [
        (pa.string(), pa.large_string()),
        (pa.large_string(), pa.string()),
        (pa.dictionary(pa.int32(), pa.string()), pa.string()),
        (pa.string(), pa.dictionary(pa.int8(), pa.large_string())),
        (pa.string_view(), pa.string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["compact", "mirror"])
def test_removal_by_id_is_the_difference_of_sets_whatever_the_string_type(tmp_path, input_type, list_type, layout):
    table = write_input(tmp_path / "in", id_type=input_type)
    ids = table["id"].to_pylist()
    listed = [*ids[5:90:2], "clip-of-another-set", *ids[290:]]
    pq.write_table(pa.table({"id": pa.array(listed).cast(list_type)}), tmp_path / "d.parquet")
    remove(tmp_path, tmp_path / "d.parquet", layout=layout)
    files = sorted((tmp_path / "kept").iterdir())
    if layout == "mirror":
        assert [path.name for path in files] == [f"{number}.parquet" for number in range(4)]
    kept = pa.concat_tables([pq.read_table(path, partitioning=None) for path in files])
    want = [own for own in ids if own not in set(listed)]
    assert len(want) == 300 - 43 - 10
    assert kept["id"].to_pylist() == want
    assert kept.schema.field("id").type == input_type
    assert kept["text"].to_pylist() == [f"row {ids.index(own)}" for own in want]
    for path in files:
        assert pq.read_schema(path).equals(table.schema)


@pytest.mark.parametrize(("run_bytes", "copies_runs"), [(0, True), (1 << 40, False)])
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_values_of_every_type_stay_as_they_are_whether_runs_are_copied_or_values_selected(
    tmp_path, monkeypatch, run_bytes, copies_runs, share
):
    monkeypatch.setattr(removal, "_RUN_BYTES", run_bytes)
    joined = []
    monkeypatch.setattr(pa, "concat_batches", lambda parts: joined.append(len(parts)) or CONCAT_BATCHES(parts))
    rng = np.random.default_rng(5)
    n = 200

    def column(make, kind):
        return pa.array([None if at % 7 == 3 else make(at) for at in range(n)], kind)

    table = pa.table(
        {
            "id": pa.array([f"{at}" for at in range(n)]),
            "view": column(lambda at: "v" * (at % 40), pa.string_view()),
            "word": column(lambda at: f"w{at % 3}", pa.string()).dictionary_encode(),
            "list": column(lambda at: [None, *range(at % 5)][at % 2 :], pa.list_(pa.float32())),
            "large": column(lambda at: ["x" * at], pa.large_list(pa.large_string())),
            "fixed": pa.array([[at, -at] for at in range(n)], pa.list_(pa.float64(), 2)),
            "struct": column(lambda at: {"a": at, "b": [{"c": "d" * (at % 3)}]}, None),
            "map": column(lambda at: [(f"k{at}", at)], pa.map_(pa.string(), pa.int16())),
            "bit": column(lambda at: at % 3 == 0, pa.bool_()),
            "time": column(lambda at: at, pa.timestamp("us", "UTC")),
            "number": column(lambda at: at, pa.decimal128(9, 2)),
        }
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/a.parquet", row_group_size=64)
    keep = rng.random(n) < share
    listed = [str(at) for at in np.flatnonzero(~keep)]
    assert np.count_nonzero(np.diff(keep)) > 2, "one run"
    pq.write_table(pa.table({"id": listed}), tmp_path / "d.parquet")
    remove(tmp_path, tmp_path / "d.parquet")
    kept = pq.read_table(tmp_path / "kept", partitioning=None)
    assert kept.schema.equals(pq.read_schema(tmp_path / "in/a.parquet"))
    assert kept.to_pylist() == [row for row, stays in zip(table.to_pylist(), keep, strict=True) if stays]
    assert (max(joined) > 4) == copies_runs, "the four row groups are joined in any case"


@pytest.mark.parametrize(
    ("ids", "listed", "want"),
    [
        (pa.array([1, -5, 3, 7], pa.int32()), pa.array([-5, 7], pa.int64()), [1, 3]),
        (pa.array([1, 2, 3], pa.uint8()), pa.array([3], pa.int16()), [1, 2]),
        (pa.array([b"aa", b"bb", b"cc"], pa.binary(2)), pa.array([b"bb"], pa.binary(2)), [b"aa", b"cc"]),
        (pa.array([2**64 - 1, 4], pa.uint64()), pa.array([2**64 - 1], pa.uint64()), [4]),
    ],
    ids=["int32-int64", "uint8-int16", "binary", "uint64"],
)
def test_removal_by_id_of_numbers_and_bytes(tmp_path, ids, listed, want):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": ids}), tmp_path / "in/x.parquet")
    pq.write_table(pa.table({"id": listed}), tmp_path / "d.parquet")
    remove(tmp_path, tmp_path / "d.parquet")
    assert pq.read_table(tmp_path / "kept")["id"].to_pylist() == want


def test_rows_without_an_id_stay_whatever_is_listed(tmp_path):
    (tmp_path / "in").mkdir()
    for kind, zero, one in ((pa.int64(), 0, 1), (pa.string(), "", "x")):
        table = pa.table({"id": pa.array([zero, None, one], kind)})
        pq.write_table(table, tmp_path / "in/x.parquet")
        for number, (listed, want) in enumerate((([zero, None], [None, one]), ([None], [zero, None, one]))):
            pq.write_table(pa.table({"id": pa.array(listed, kind)}), tmp_path / "d.parquet")
            stage = RemoveDuplicatesStage(
                str(tmp_path / "in"),
                str(tmp_path / f"kept-{kind}-{number}"),
                duplicates_path=str(tmp_path / "d.parquet"),
            )
            Pipeline(stages=[stage]).run()
            assert pq.read_table(tmp_path / f"kept-{kind}-{number}")["id"].to_pylist() == want


def test_many_parts_of_the_list_are_all_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr("untwin.stages.removal._HASHES_PER_PART", 7)
    table = write_input(tmp_path / "in")
    ids = table["id"].to_pylist()
    (tmp_path / "list").mkdir()
    for number in range(0, 120, 10):
        part = pa.table({"other": range(10), "id": ids[number * 2 : number * 2 + 20 : 2]})
        pq.write_table(part, tmp_path / f"list/{number}.parquet", row_group_size=3)
    remove(tmp_path, tmp_path / "list", LocalExecutor(2))
    assert pq.read_table(tmp_path / "kept")["id"].to_pylist() == [
        own for at, own in enumerate(ids) if at % 2 or at >= 240
    ]


def test_an_existing_kmeans_folder_of_another_tool_is_cleaned_by_id(tmp_path):
    """No row numbers anywhere: pairwise, identify and remove after a foreign k-means."""
    table = write_input(tmp_path / "in")
    vectors = np.array(table["embedding"].to_pylist())
    labels = (vectors[:, 0] > 0).astype(int)
    distances = np.random.default_rng(0).uniform(size=300)
    judged = []
    for centroid in (0, 1):
        at = np.flatnonzero(labels == centroid)
        (tmp_path / f"kmeans/centroid={centroid}").mkdir(parents=True)
        part = table.take(pa.array(at)).append_column("cosine_dist_to_cent", pa.array(distances[at]))
        pq.write_table(part, tmp_path / f"kmeans/centroid={centroid}/x.parquet")
        order = at[np.argsort(-distances[at])]
        judged += all_pairs([table["id"][int(i)].as_py() for i in order], vectors[order], EPS, "kept")
    stages = [
        PairwiseStage("id", "embedding", str(tmp_path / "kmeans"), str(tmp_path / "p"), compare_to="kept", eps=EPS),
        IdentifyDuplicatesStage(str(tmp_path / "out"), EPS),
        RemoveDuplicatesStage(str(tmp_path / "in"), str(tmp_path / "kept")),
    ]
    Pipeline(stages=stages).run()
    removed = {row["id"] for row in judged if row["removed"]}
    assert len(removed) > 40
    assert pq.read_table(tmp_path / "out/duplicates")["id"].to_pylist() == sorted(removed)
    kept = pq.read_table(tmp_path / "kept")
    assert kept["id"].to_pylist() == [own for own in table["id"].to_pylist() if own not in removed]
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["cluster_0.parquet", "cluster_1.parquet"]


def test_removal_from_other_files_than_those_clustered_goes_by_id(tmp_path):
    table = write_input(tmp_path / "in")
    other = table.take(pa.array(np.arange(300)[::-1]))
    pq.write_table(other, tmp_path / "reversed.parquet")
    stages = [
        *first_stages(tmp_path),
        IdentifyDuplicatesStage(str(tmp_path / "out"), EPS),
        RemoveDuplicatesStage(str(tmp_path / "reversed.parquet"), str(tmp_path / "kept")),
    ]
    Pipeline(stages=stages).run()
    removed = set(pq.read_table(tmp_path / "out/duplicates")["id"].to_pylist())
    assert len(removed) > 40
    kept = pq.read_table(tmp_path / "kept")["id"].to_pylist()
    assert kept == [own for own in other["id"].to_pylist() if own not in removed]


def test_removal_mistakes_are_refused_and_nothing_is_written(tmp_path):
    write_input(tmp_path / "in")
    pq.write_table(pa.table({"uid": ["a"]}), tmp_path / "no-id.parquet")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "numbers.parquet")
    (tmp_path / "empty").mkdir()
    for path, error, message in (
        ("no-id.parquet", ParameterError, r"no-id.parquet: no column 'id'"),
        ("numbers.parquet", SchemaError, r"numbers.parquet: .*have type int64, those of the input string"),
        ("nowhere", InputNotFoundError, r"nowhere: no list of duplicates"),
        ("empty", InputNotFoundError, r"empty: no list of duplicates"),
    ):
        with pytest.raises(error, match=message):
            remove(tmp_path, tmp_path / path)
        assert not (tmp_path / "kept").exists()
    with pytest.raises(ParameterError, match="no duplicates to remove; add an IdentifyDuplicatesStage before it"):
        Pipeline(stages=[RemoveDuplicatesStage(str(tmp_path / "in"), str(tmp_path / "kept"))]).run()
    with pytest.raises(ParameterError, match="layout is 'flat'"):
        RemoveDuplicatesStage("in", "kept", layout="flat")
    for options in ({"input_path": 3}, {"output_path": None}, {"id_field": ""}, {"duplicates_path": 7}):
        with pytest.raises(ParameterError, match=f"{next(iter(options))} is "):
            RemoveDuplicatesStage(**{"input_path": "in", "output_path": "kept", **options})
    with pytest.raises(ParameterError, match="'columns' is not supported"):
        RemoveDuplicatesStage("in", "kept", read_kwargs={"columns": []})
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/mine").write_text("x")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(OutputExistsError, match="kept: holds 'mine' already"):
        remove(tmp_path, tmp_path / "d.parquet")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["mine"]


def test_rows_with_large_other_columns_are_copied_a_few_at_a_time(tmp_path, monkeypatch):
    """400 rows of 100 kB, of which the vector is 8 bytes."""
    sizes = []
    write = ParquetKept.write
    monkeypatch.setattr(ParquetKept, "write", lambda self, batch: sizes.append(batch.nbytes) or write(self, batch))
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "id": [f"row-{number}" for number in range(400)],
            "embedding": rng.normal(size=(400, 2)).tolist(),
            "image": pa.array([rng.bytes(100_000) for _ in range(400)]),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=50)
    pq.write_table(table.slice(7, 1).select(["id"]), tmp_path / "list.parquet")
    stage = RemoveDuplicatesStage(
        str(tmp_path / "in.parquet"), str(tmp_path / "kept"), duplicates_path=str(tmp_path / "list.parquet")
    )
    Pipeline(stages=[stage]).run()
    assert sum(sizes) > 399 * 100_000
    assert max(sizes) <= 5 << 20
    kept = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "kept").iterdir())])
    assert kept.equals(pa.concat_tables([table.slice(0, 7), table.slice(8)]))


def test_kept_rows_of_npy_are_written_as_they_come(tmp_path):
    """They are not held until the file is complete."""
    vectors = np.arange(400_000, dtype=np.float32).reshape(100_000, 4)
    metadata = pa.table({"id": np.arange(100_000)})
    source = str(tmp_path / "img_emb_0.npy")
    with NpyKept(Storage(), str(tmp_path / "kept" / "part-0"), Storage(), source, 100_000) as writer:
        for low in range(0, 100_000, 10_000):
            some = pa.FixedSizeListArray.from_arrays(pa.array(vectors[low : low + 10_000].reshape(-1)), 4)
            part = metadata.slice(low, 10_000).append_column("embedding", some).combine_chunks()
            writer.write(part.to_batches()[0])
            half_written = max(path.stat().st_size for path in (tmp_path / "kept").iterdir())
            assert half_written >= (low + 10_000) * 16
        writer.finish()
    assert np.array_equal(np.load(tmp_path / "kept" / "img_emb_0.npy"), vectors)
    assert pq.read_table(tmp_path / "kept" / "metadata_0.parquet").equals(metadata)
