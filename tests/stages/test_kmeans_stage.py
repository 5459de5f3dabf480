"""Each parameter of `KMeansStage` does what its name says, or is refused."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stage_oracles import matrix, planted, read_clusters, unit, write_like_curator

from untwin.errors import InputNotFoundError, OutputExistsError, ParameterError, SchemaError
from untwin.pipeline import Pipeline
from untwin.stages.kmeans import KMeansStage
from untwin.stages.pairwise import PairwiseStage
from untwin.stages.tasks import CentroidsTask
from untwin.storage.files import Storage

DIM = 8


def run(source, target, n_clusters=4, **options):
    """Run the stage; returns what the fit says of itself."""
    stage = KMeansStage(n_clusters, "id", "embedding", source, str(target), **options)
    outcome = Pipeline(stages=[stage]).run()
    (model,) = (task for tasks in outcome.tasks.values() for task in tasks if isinstance(task, CentroidsTask))
    return model


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def source(tmp_path):
    ids, vectors = planted(400, DIM, seed=1)
    write_like_curator(tmp_path / "in", ids, vectors)
    return str(tmp_path / "in")


def test_init_array_gives_the_clusters_their_numbers(tmp_path):
    rng = np.random.default_rng(0)
    vectors = np.concatenate([corner + 0.05 * rng.normal(size=(20, 3)) for corner in np.eye(3)])
    write_like_curator(tmp_path / "in", [f"{corner}{at:02d}" for corner in "xyz" for at in range(20)], vectors)
    for number, order in enumerate(([0, 1, 2], [2, 0, 1])):
        run(str(tmp_path / "in"), tmp_path / f"k{number}", 3, init=np.eye(3)[order])
        found = {
            centroid: {name[0] for name in table["id"].to_pylist()}
            for centroid, table in read_clusters(tmp_path / f"k{number}").items()
        }
        assert found == {centroid: {"xyz"[corner]} for centroid, corner in enumerate(order)}


def test_an_init_array_of_another_shape_is_refused(tmp_path, source):
    with pytest.raises(ParameterError, match=r"init has shape \(3, 8\), but there are 4 clusters"):
        run(source, tmp_path / "k", 4, init=np.eye(3, DIM))
    assert not (tmp_path / "k").exists()
    with pytest.raises(ParameterError, match=r"init must have shape \(4, 8\), not \(4, 5\)"):
        run(source, tmp_path / "k", 4, init=np.eye(4, 5))


def test_init_max_iter_and_tol_reach_the_fit(tmp_path, source):
    one = run(source, tmp_path / "one", 12, init="random", max_iter=1)
    many = run(source, tmp_path / "many", 12, init="random", tol=0)
    coarse = run(source, tmp_path / "coarse", 12, init="random", tol=1e6)
    scalable = run(source, tmp_path / "scalable", 12, init="k-means||", max_iter=1)
    assert one.n_iter == 1
    assert many.n_iter > 2
    assert coarse.n_iter < many.n_iter
    assert many.inertia < one.inertia
    assert scalable.n_iter == 1
    assert scalable.inertia != one.inertia


def test_inertia_and_mean_cosine_are_those_of_the_rows(tmp_path, source):
    model = run(source, tmp_path / "k", 5)
    squares, cosines = [], []
    for table in read_clusters(tmp_path / "k").values():
        squares += (table["l2_dist_to_cent"].to_numpy().astype(np.float64) ** 2).tolist()
        cosines += (1 - table["cosine_dist_to_cent"].to_numpy().astype(np.float64)).tolist()
    assert len(squares) == 400
    assert model.n_sampled == 400
    assert model.inertia == pytest.approx(sum(squares), rel=1e-5)
    assert model.mean_cosine == pytest.approx(np.mean(cosines), rel=1e-5)


def test_the_best_of_n_init_runs_counts(tmp_path, source):
    single = [run(source, tmp_path / f"s{seed}", 10, init="random", random_state=seed).inertia for seed in range(4)]
    best = [
        run(source, tmp_path / f"b{seed}", 10, init="random", random_state=seed, n_init=6).inertia for seed in range(4)
    ]
    assert all(six <= one for six, one in zip(best, single, strict=True))
    assert sum(best) < sum(single)
    assert len(set(single)) > 1
    auto = run(source, tmp_path / "auto", 10, init="random", random_state=0, n_init="auto")
    assert auto.inertia == single[0]


def test_oversampling_factor_changes_the_candidates_of_scalable_init_only(tmp_path, source):
    few = run(source, tmp_path / "few", 10, oversampling_factor=0.2, max_iter=1)
    default = run(source, tmp_path / "default", 10, max_iter=1)
    two = run(source, tmp_path / "two", 10, oversampling_factor=2.0, max_iter=1)
    assert two.inertia == default.inertia
    assert few.inertia != default.inertia
    for init in ("random", np.eye(10, DIM)):
        with pytest.raises(ParameterError, match=r"oversampling_factor is 2.0; it has a meaning with"):
            KMeansStage(10, "id", "embedding", source, str(tmp_path / "k"), init=init, oversampling_factor=2.0)


def test_max_samples_per_batch_changes_no_byte(tmp_path, source):
    run(source, tmp_path / "whole")
    for size in (1, 37):
        run(source, tmp_path / f"k{size}", max_samples_per_batch=size)
        assert contents(tmp_path / f"k{size}") == contents(tmp_path / "whole")


def test_fit_data_fraction_is_the_share_of_rows_that_are_fitted_on(tmp_path, source):
    assert run(source, tmp_path / "all").n_sampled == 400
    model = run(source, tmp_path / "quarter", fit_data_fraction=0.25)
    assert model.n_sampled == 100
    assert sum(table.num_rows for table in read_clusters(tmp_path / "quarter").values()) == 400
    with pytest.raises(ParameterError, match="leaves 4 rows to fit 5 clusters on"):
        run(source, tmp_path / "few", 5, fit_data_fraction=0.01)
    assert not (tmp_path / "few").exists()


def test_random_state_decides_the_start(tmp_path, source):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(source, tmp_path / name, 9, random_state=seed, max_iter=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["_centroids.npy"] != contents(tmp_path / "c")["_centroids.npy"]


def test_scratch_files_lie_below_cache_path_and_nothing_else_there_is_touched(tmp_path, source, monkeypatch):
    written = []
    writing = Storage.writing
    monkeypatch.setattr(Storage, "writing", lambda self, path, **kw: written.append(path) or writing(self, path, **kw))
    cache = tmp_path / "cache"
    (cache / "mine").mkdir(parents=True)
    (cache / "mine/file").write_text("precious")
    run(source, tmp_path / "k", cache_path=str(cache))
    scratch = [path for path in written if not path.startswith(str(tmp_path / "k"))]
    assert len(scratch) >= 2
    assert all(path.startswith(str(cache)) for path in scratch)
    assert contents(cache) == {"mine/file": hashlib.sha256(b"precious").hexdigest()}
    assert [path.name for path in cache.iterdir()] == ["mine"]
    run(source, tmp_path / "default")
    assert contents(tmp_path / "default") == contents(tmp_path / "k")


def test_metadata_fields_keep_type_and_value(tmp_path):
    ids, vectors = planted(30, DIM)
    vectors[7] = 0  # a row that is set aside, so that columns are selected from
    table = pa.table(
        {
            "id": pa.array(ids),
            "when": pa.array(range(30), pa.timestamp("us", "UTC")),
            "deep": pa.array([{"a": [at, None]} if at % 3 else None for at in range(30)]),
            "text": pa.array([f"t{at % 4}" for at in range(30)], pa.dictionary(pa.int16(), pa.string())),
            "view": pa.array([f"v{at}" if at % 5 else None for at in range(30)], pa.string_view()),
            "left": pa.array(range(30)),
            "embedding": pa.array(vectors.tolist(), pa.list_(pa.float64())),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    run(str(tmp_path / "in.parquet"), tmp_path / "k", 3, metadata_fields=["when", "deep", "text", "view"])
    wanted = {row["id"]: row for row in table.drop_columns(["left", "embedding"]).to_pylist()}
    n_seen = 0
    for part in read_clusters(tmp_path / "k").values():
        assert part.schema.names == [
            *("id", "embedding", "l2_dist_to_cent", "cosine_dist_to_cent", "when", "deep", "text", "view", "_row")
        ]
        for name in ("id", "when", "deep", "text"):
            assert part.schema.field(name).type == table.schema.field(name).type
        for row in part.select(["id", "when", "deep", "text", "view"]).to_pylist():
            assert row == wanted[row["id"]]
            n_seen += 1
    assert n_seen == 29


def test_embedding_dim_overrules_the_commonest_length(tmp_path):
    lists = [[1.0, float(at), 0.0] for at in range(6)] + [[1.0, float(at)] for at in range(4)]
    table = pa.table({"id": [f"r{at}" for at in range(10)], "embedding": pa.array(lists, pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "in.parquet")
    run(str(tmp_path / "in.parquet"), tmp_path / "common", 1)
    (kept,) = read_clusters(tmp_path / "common").values()
    assert sorted(kept["id"].to_pylist()) == [f"r{at}" for at in range(6)]
    rejected = pq.read_table(tmp_path / "common/_rejected")
    assert rejected.to_pylist() == [
        {
            "id": f"r{at}",
            "file": str(tmp_path / "in.parquet"),
            "row": at,
            "reason": "embedding has the wrong length",
        }
        for at in range(6, 10)
    ]
    table = table.slice(4)
    pq.write_table(table, tmp_path / "in2.parquet")
    run(str(tmp_path / "in2.parquet"), tmp_path / "wanted", 1, embedding_dim=2)
    (kept,) = read_clusters(tmp_path / "wanted").values()
    assert sorted(kept["id"].to_pylist()) == ["r6", "r7", "r8", "r9"]


def test_input_file_extensions_replace_those_of_the_type(tmp_path):
    ids, vectors = planted(40, DIM)
    table = pa.table({"id": ids, "embedding": pa.array(vectors.tolist(), pa.list_(pa.float64()))})
    (tmp_path / "in").mkdir()
    pq.write_table(table.slice(0, 15), tmp_path / "in/a.emb")
    pq.write_table(table.slice(15, 15), tmp_path / "in/b.VEC")
    pq.write_table(table.slice(30), tmp_path / "in/c.parquet")
    run(str(tmp_path / "in"), tmp_path / "k", 1, input_file_extensions=["emb", ".vec"])
    (kept,) = read_clusters(tmp_path / "k").values()
    assert sorted(kept["id"].to_pylist()) == sorted(ids[:30])
    with pytest.raises(InputNotFoundError, match=r"no \*\.arrow files"):
        run(str(tmp_path / "in"), tmp_path / "k2", 1, input_file_extensions=["arrow"])
    with pytest.raises(ParameterError, match="input_file_extensions is 'parquet'; give a list"):
        KMeansStage(1, "id", "embedding", "in", "out", input_file_extensions="parquet")
    with pytest.raises(ParameterError, match="metadata_fields is 'duration'; give a list"):
        KMeansStage(1, "id", "embedding", "in", "out", metadata_fields="duration")


def test_input_path_may_be_a_list_a_glob_or_another_type(tmp_path):
    ids, vectors = planted(78, DIM)
    write_like_curator(tmp_path / "one", ids[:52], vectors[:52])
    write_like_curator(tmp_path / "two", ids[52:], vectors[52:])
    lines = [json.dumps({"id": own, "embedding": list(row)}) for own, row in zip(ids, vectors.tolist(), strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    run([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "list")
    run(str(tmp_path / "*" / "0*.parquet"), tmp_path / "glob")
    run(str(tmp_path / "rows.jsonl"), tmp_path / "jsonl", input_filetype="jsonl")
    first = {centroid: table.drop_columns(["id"]) for centroid, table in read_clusters(tmp_path / "list").items()}
    assert sum(table.num_rows for table in first.values()) == 78
    for name in ("glob", "jsonl"):
        other = {centroid: table.drop_columns(["id"]) for centroid, table in read_clusters(tmp_path / name).items()}
        assert {k: table.to_pylist() for k, table in other.items()} == {k: t.to_pylist() for k, t in first.items()}


@pytest.mark.parametrize(
    "ids",
    [
        pa.array(range(-20, 20), pa.int16()),
        pa.array([2**64 - 1 - at for at in range(40)], pa.uint64()),
        pa.array([bytes([at, 0, 255]) for at in range(40)], pa.binary(3)),
        pa.array([f"Ü{at}" for at in range(40)], pa.string_view()),
        pa.array([f"c{at}" for at in range(40)], pa.dictionary(pa.int32(), pa.large_string())),
    ],
    ids=lambda ids: str(ids.type),
)
def test_ids_of_every_type_come_out_as_they_went_in(tmp_path, ids):
    _, vectors = planted(40, DIM)
    table = pa.table({"id": ids, "embedding": pa.array(vectors.tolist(), pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "in.parquet")
    stages = [
        KMeansStage(2, "id", "embedding", str(tmp_path / "in.parquet"), str(tmp_path / "k")),
        PairwiseStage("id", "embedding", str(tmp_path / "k"), str(tmp_path / "p")),
    ]
    Pipeline(stages=stages).run()
    found = {}
    for part in read_clusters(tmp_path / "k").values():
        found.update(zip(part["_row"].to_pylist(), part["id"].to_pylist(), strict=True))
    assert found == dict(enumerate(ids.to_pylist()))
    pairs = [row for path in (tmp_path / "p").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert sorted(row["id"] for row in pairs) == sorted(ids.to_pylist())
    assert {row["max_id"] for row in pairs} <= set(ids.to_pylist())


def test_the_same_rows_split_and_shuffled_give_the_same_clusters(tmp_path):
    ids, vectors = planted(300, DIM, seed=5)
    order = np.random.default_rng(1).permutation(300)
    write_like_curator(tmp_path / "a", ids, vectors)
    write_like_curator(tmp_path / "b", [ids[at] for at in order], vectors[order], rows=300)
    for name in "ab":
        run(str(tmp_path / name), tmp_path / f"k{name}", 6)
    a, b = (read_clusters(tmp_path / f"k{name}") for name in "ab")
    assert list(a) == list(b)
    for centroid, table in a.items():
        columns = ["id", "embedding", "l2_dist_to_cent", "cosine_dist_to_cent"]
        assert table.select(columns).sort_by("id").equals(b[centroid].select(columns).sort_by("id"))
    assert (tmp_path / "ka/_centroids.npy").read_bytes() == (tmp_path / "kb/_centroids.npy").read_bytes()


def test_float16_and_float64_give_the_vectors_that_plain_normalising_gives(tmp_path):
    _, vectors = planted(50, DIM)
    for kind, dtype in ((pa.float16(), np.float16), (pa.float64(), np.float64)):
        values = vectors.astype(dtype)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind), DIM)
        pq.write_table(pa.table({"id": range(50), "embedding": lists}), tmp_path / f"{kind}.parquet")
        run(str(tmp_path / f"{kind}.parquet"), tmp_path / str(kind), 1)
        (table,) = read_clusters(tmp_path / str(kind)).values()
        assert np.abs(matrix(table["embedding"]) - unit(values)).max() < 1e-7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 0}, "n_clusters is 0"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"tol": -1}, "tol is -1"),
        ({"init": "k-means++"}, "init is 'k-means\\+\\+'"),
        ({"n_init": 0}, "n_init is 0"),
        ({"n_init": 1.5}, "n_init is 1.5"),
        ({"oversampling_factor": 0.0}, "oversampling_factor is 0.0"),
        ({"max_samples_per_batch": 0}, "max_samples_per_batch is 0"),
        ({"fit_data_fraction": 0}, "fit_data_fraction is 0"),
        ({"fit_data_fraction": 1.01}, "fit_data_fraction is 1.01"),
        ({"embedding_dim": 0}, "embedding_dim is 0"),
        ({"on_repeated_id": "last"}, "on_repeated_id is 'last'"),
        ({"metadata_fields": ["cosine_dist_to_cent"]}, "'cosine_dist_to_cent'"),
        ({"metadata_fields": ["embedding"]}, "'embedding'"),
        ({"metadata_fields": ["_row"]}, "'_row'"),
        ({"n_clusters": "4"}, "n_clusters is '4'; give a whole number"),
        ({"n_clusters": 2.5}, "n_clusters is 2.5"),
        ({"n_clusters": True}, "n_clusters is True"),
        ({"max_iter": None}, "max_iter is None"),
        ({"max_iter": 2.5}, "max_iter is 2.5"),
        ({"tol": None}, "tol is None; give a number"),
        ({"tol": float("nan")}, "tol is nan"),
        ({"random_state": None}, "random_state is None"),
        ({"random_state": -1}, "random_state is -1"),
        ({"init": [[1.0, 0.0]]}, "init is "),
        ({"init": np.array(["a"])}, "init is .*2-dimensional"),
        ({"init": np.eye(2), "n_init": 5}, "n_init is 5; it must be 1 with an array init"),
        ({"oversampling_factor": "2"}, "oversampling_factor is '2'"),
        ({"max_samples_per_batch": 2.5}, "max_samples_per_batch is 2.5"),
        ({"fit_data_fraction": "0.5"}, "fit_data_fraction is '0.5'"),
        ({"fit_data_fraction": True}, "fit_data_fraction is True"),
        ({"embedding_dim": "8"}, "embedding_dim is '8'"),
        ({"input_filetype": ["parquet"]}, "input_filetype is "),
        ({"input_file_extensions": "parquet"}, "input_file_extensions is 'parquet'; give a list"),
        ({"metadata_fields": "note"}, "metadata_fields is 'note'; give a list"),
        ({"metadata_fields": [1]}, "metadata_fields is 1; give a name"),
        ({"cache_path": 3}, "cache_path is 3; give a path"),
        ({"id_field": ""}, "id_field is ''; give a name"),
        ({"embedding_field": None}, "embedding_field is None"),
        ({"input_path": None}, "input_path is None; give a path, or a list of paths"),
        ({"input_path": []}, "input_path is "),
        ({"input_path": [None]}, "input_path is "),
        ({"output_path": None}, "output_path is None; give a path"),
        ({"read_kwargs": [1]}, "read_kwargs/write_kwargs is "),
        ({"write_kwargs": {"storage_options": [1]}}, "storage_options is no dictionary"),
        ({"read_kwargs": {"lines": True}}, "'lines' is not supported; known is 'storage_options'"),
        ({"write_kwargs": {"compression": "zstd", "storage_options": {}}}, "'compression' is not supported"),
    ],
)
def test_parameters_that_make_no_sense_are_refused_at_once(options, message):
    with pytest.raises(ParameterError, match=message):
        KMeansStage(
            **{
                **{"n_clusters": 2, "id_field": "id", "embedding_field": "embedding"},
                **{"input_path": "i", "output_path": "o"},
                **options,
            }
        )


def test_numbers_of_numpy_are_numbers():
    stage = KMeansStage(np.int64(3), "id", "embedding", "i", "o", tol=np.float32(0.5), n_init=np.int32(2))
    assert [type(value) for value in (stage.n_clusters, *stage.fit_options.values())] == [
        int,
        str,
        int,
        float,
        int,
        float,
    ]


def test_mistakes_that_the_input_shows_are_found_before_anything_is_written(tmp_path, source):
    for options, error, message in (
        ({"n_clusters": 401}, ParameterError, "n_clusters is 401, but the input has only 400 rows"),
        ({"input_filetype": "csv"}, ParameterError, "input_filetype is 'csv'"),
        ({"metadata_fields": ["duration"]}, SchemaError, "no column 'duration'"),
    ):
        with pytest.raises(error, match=message):
            run(source, tmp_path / "k", **options)
        assert not (tmp_path / "k").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"taken: holds 'notes.txt' already"):
        run(source, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["notes.txt"]


def test_running_the_same_stage_object_again_changes_nothing(tmp_path, source):
    pipe = Pipeline(stages=[KMeansStage(3, "id", "embedding", source, str(tmp_path / "k"))])
    pipe.run()
    before = contents(tmp_path / "k")
    with pytest.raises(OutputExistsError, match=r"k: holds '_centroids.npy' already"):
        pipe.run()
    assert contents(tmp_path / "k") == before
