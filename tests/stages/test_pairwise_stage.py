"""`PairwiseStage` on a folder that another tool clustered: no manifest, no row numbers, lists of any length."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stage_oracles import all_pairs, assert_same_matches, planted

from oracle import ranked_rows
from untwin.backends.local import LocalExecutor
from untwin.errors import DamagedFileError, InputNotFoundError, OutputExistsError, ParameterError, SchemaError
from untwin.pipeline import Pipeline
from untwin.stages.kmeans import KMeansStage
from untwin.stages.pairwise import PairwiseStage
from untwin.stages.ranking import RankingStrategy

DIM = 12


def write_foreign(folder, n=240, n_clusters=4, files_per_cluster=3, dim=DIM, id_types=None):
    """`centroid=K/` with several files, variable-length float32 lists that are not of unit length, other columns."""
    id_types = id_types or [pa.string()]
    rng = np.random.default_rng(7)
    ids, vectors = planted(n, dim, seed=3)
    vectors = vectors.astype(np.float32)
    distances = rng.uniform(0, 0.5, n).astype(np.float32)
    distances[rng.integers(n, size=20)] = np.float32(0.25)
    durations = [None if value < 3 else int(value) for value in rng.integers(0, 30, n)]
    clusters = {}
    for centroid in range(n_clusters):
        members = np.arange(centroid, n, n_clusters)
        target = folder / f"centroid={centroid}"
        target.mkdir(parents=True)
        for number, part in enumerate(np.array_split(members, files_per_cluster)):
            table = pa.table(
                {
                    "embedding": pa.array(vectors[part].tolist(), pa.list_(pa.float32())),
                    "note": pa.array([{"a": 1}] * len(part)),
                    "id": pa.array([ids[at] for at in part], id_types[number % len(id_types)]),
                    "l2_dist_to_cent": distances[part] * 1.1,
                    "cosine_dist_to_cent": distances[part],
                    "duration": pa.array([durations[at] for at in part], pa.int64()),
                }
            )
            pq.write_table(table, target / f"{number:02d}-{number}f3a.parquet")
        clusters[centroid] = [
            {
                "id": ids[at],
                "vector": vectors[at],
                "cosine_dist_to_cent": float(distances[at]),
                "duration": durations[at],
            }
            for at in members
        ]
    return clusters


def pairwise(source, target, executor=None, **options):
    stage = PairwiseStage("id", "embedding", str(source), str(target), **options)
    return Pipeline(stages=[stage]).run(executor)


def expected(rows, keys, directions, **options):
    order = ranked_rows(rows, keys, directions)
    return all_pairs([rows[at]["id"] for at in order], [rows[at]["vector"] for at in order], **options)


@pytest.mark.parametrize("batch_size", [1, 7, 1024])
def test_scores_and_matches_equal_brute_force(tmp_path, batch_size):
    clusters = write_foreign(tmp_path / "kmeans")
    pairwise(tmp_path / "kmeans", tmp_path / "pairs", pairwise_batch_size=batch_size)
    assert sorted(path.name for path in (tmp_path / "pairs").iterdir()) == [f"cluster_{k}.parquet" for k in range(4)]
    for centroid, rows in clusters.items():
        got = pq.read_table(tmp_path / f"pairs/cluster_{centroid}.parquet")
        assert got.schema.names == ["id", "max_id", "cosine_sim_score"]
        assert got.schema.field("id").type == pa.string()
        assert_same_matches(got, expected(rows, ["cosine_dist_to_cent"], [False]))


@pytest.mark.parametrize("compare_to", ["ranked", "kept"])
def test_with_eps_the_witness_is_the_most_similar_kept_row(tmp_path, compare_to):
    clusters = write_foreign(tmp_path / "kmeans")
    pairwise(tmp_path / "kmeans", tmp_path / "pairs", compare_to=compare_to, eps=0.2)
    n_removed = n_without_witness = 0
    for centroid, rows in clusters.items():
        want = expected(rows, ["cosine_dist_to_cent"], [False], eps=0.2, compare_to=compare_to)
        got = pq.read_table(tmp_path / f"pairs/cluster_{centroid}.parquet")
        assert got.schema.names == ["id", "max_id", "cosine_sim_score", "kept_id", "kept_sim_score"]
        assert_same_matches(got, want)
        n_removed += sum(row["removed"] for row in want)
        n_without_witness += sum(row["removed"] and row["kept_id"] is None for row in want)
    assert n_removed > 40
    assert (n_without_witness > 0) == (compare_to == "ranked")


def test_several_metadata_columns_rank_with_nulls_last(tmp_path):
    clusters = write_foreign(tmp_path / "kmeans")
    ranking = RankingStrategy.metadata_based(["duration", "cosine_dist_to_cent"], [False, True])
    pairwise(tmp_path / "kmeans", tmp_path / "pairs", ranking_strategy=ranking)
    for centroid, rows in clusters.items():
        got = pq.read_table(tmp_path / f"pairs/cluster_{centroid}.parquet")
        want = expected(rows, ["duration", "cosine_dist_to_cent"], [False, True])
        assert_same_matches(got, want)
        assert {row["duration"] for row in rows} >= {None, 5}


def test_random_depends_on_seed_and_ids_only(tmp_path):
    write_foreign(tmp_path / "a", files_per_cluster=3)
    write_foreign(tmp_path / "b", files_per_cluster=1)
    for name, source, seed in (("a1", "a", 1), ("b1", "b", 1), ("a2", "a", 2)):
        pairwise(tmp_path / source, tmp_path / name, which_to_keep="random", random_seed=seed)
    tables = {name: pq.read_table(tmp_path / name / "cluster_1.parquet") for name in ("a1", "b1", "a2")}
    assert tables["a1"].equals(tables["b1"])
    first, second = (tables[name]["id"].to_pylist() for name in ("a1", "a2"))
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != sorted(first)


def test_ids_of_different_widths_in_the_files_of_a_cluster_are_one_column(tmp_path):
    kinds = (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))
    clusters = write_foreign(tmp_path / "kmeans", id_types=kinds)
    pairwise(tmp_path / "kmeans", tmp_path / "pairs")
    pairwise(tmp_path / "kmeans", tmp_path / "small", LocalExecutor(1, 34 << 20))
    for centroid, rows in clusters.items():
        got = pq.read_table(tmp_path / f"pairs/cluster_{centroid}.parquet")
        assert_same_matches(got, expected(rows, ["cosine_dist_to_cent"], [False]))
        assert got.equals(pq.read_table(tmp_path / f"small/cluster_{centroid}.parquet"))


@pytest.mark.parametrize(
    "kind", [pa.large_list(pa.float64()), pa.list_(pa.float16()), pa.list_(pa.float32(), DIM)], ids=str
)
def test_every_list_type_is_read(tmp_path, kind):
    ids, vectors = planted(40, DIM)
    vectors = vectors.astype(kind.value_type.to_pandas_dtype())
    folder = tmp_path / "kmeans/centroid=12"
    folder.mkdir(parents=True)
    flat = pa.array(vectors.reshape(-1), kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        lists = pa.FixedSizeListArray.from_arrays(flat, DIM)
    else:
        maker = pa.LargeListArray if pa.types.is_large_list(kind) else pa.ListArray
        lists = maker.from_arrays(np.arange(41) * DIM, flat)
    distances = np.linspace(0, 1, 40)
    pq.write_table(pa.table({"id": ids, "embedding": lists, "cosine_dist_to_cent": distances}), folder / "x.parquet")
    pairwise(tmp_path / "kmeans", tmp_path / "pairs")
    want = all_pairs(ids[::-1], vectors[::-1])
    assert_same_matches(pq.read_table(tmp_path / "pairs/cluster_12.parquet"), want)


def test_nested_folders_and_lists_of_folders_are_found(tmp_path):
    clusters = write_foreign(tmp_path / "one/deep", n_clusters=2)
    write_foreign(tmp_path / "other", n_clusters=3)
    (tmp_path / "one/deep/centroid=0/_tmp-half.parquet").write_bytes(b"PAR1 cut off")
    (tmp_path / "other/centroid=2/_SUCCESS").write_bytes(b"")
    pairwise(tmp_path / "one", tmp_path / "pairs")
    for centroid, rows in clusters.items():
        got = pq.read_table(tmp_path / f"pairs/cluster_{centroid}.parquet")
        assert_same_matches(got, expected(rows, ["cosine_dist_to_cent"], [False]))
    stage = PairwiseStage("id", "embedding", [str(tmp_path / "one"), str(tmp_path / "other")], str(tmp_path / "both"))
    Pipeline(stages=[stage]).run()
    assert pq.read_metadata(tmp_path / "both/cluster_0.parquet").num_rows == 120 + 80
    assert pq.read_metadata(tmp_path / "both/cluster_2.parquet").num_rows == 80


def test_a_changed_cluster_is_read_from_the_disk_and_not_from_memory(tmp_path):
    """What KMeansStage has written last may still lie in memory; the file on the disk decides."""
    ids, vectors = planted(60, DIM)
    table = pa.table({"id": ids, "embedding": pa.array(vectors.tolist(), pa.list_(pa.float64()))})
    pq.write_table(table, tmp_path / "in.parquet")
    kmeans = KMeansStage(1, "id", "embedding", str(tmp_path / "in.parquet"), str(tmp_path / "kmeans"))
    Pipeline(stages=[kmeans]).run()
    path = tmp_path / "kmeans/centroid=0/part-0.parquet"
    pq.write_table(pq.read_table(path, partitioning=None).slice(0, 20), path)
    pairwise(tmp_path / "kmeans", tmp_path / "pairs")
    assert pq.read_metadata(tmp_path / "pairs/cluster_0.parquet").num_rows == 20


def test_a_second_run_on_the_same_output_changes_nothing(tmp_path):
    write_foreign(tmp_path / "kmeans")
    pairwise(tmp_path / "kmeans", tmp_path / "pairs")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pairs").iterdir()}
    with pytest.raises(OutputExistsError, match=r"pairs: holds 'cluster_0.parquet' already"):
        pairwise(tmp_path / "kmeans", tmp_path / "pairs", eps=0.1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pairs").iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairwise_batch_size": 0}, "pairwise_batch_size is 0"),
        ({"compare_to": "best"}, "compare_to is 'best'"),
        ({"eps": 0.0}, "eps"),
        ({"eps": 1.0}, "eps"),
        ({"which_to_keep": "both"}, "which_to_keep is 'both'"),
        ({"sim_metric": "dot"}, "sim_metric is 'dot'"),
        ({"embedding_dim": 0}, "embedding_dim is 0"),
        ({"pairwise_batch_size": "3"}, "pairwise_batch_size is '3'; give a whole number"),
        ({"pairwise_batch_size": 2.5}, "pairwise_batch_size is 2.5"),
        ({"ranking_strategy": "hard"}, "ranking_strategy is 'hard'; give a RankingStrategy"),
        ({"random_seed": None, "which_to_keep": "random"}, "random_seed is None"),
        ({"which_to_keep": ["hard"]}, "which_to_keep is "),
        ({"compare_to": None}, "compare_to is None"),
        ({"compare_to": "kept"}, "compare_to is 'kept', but eps is None"),
        ({"eps": "0.1"}, "eps is '0.1'"),
        ({"embedding_dim": 8.0}, "embedding_dim is 8.0"),
        ({"id_field": None}, "id_field is None"),
        ({"embedding_field": ""}, "embedding_field is ''"),
        ({"input_path": 3}, "input_path is 3; give a path"),
        ({"output_path": None}, "output_path is None"),
        ({"read_kwargs": {"columns": ["id"]}}, "'columns' is not supported"),
        ({"write_kwargs": {"compression": "zstd"}}, "'compression' is not supported"),
    ],
)
def test_parameters_that_make_no_sense_are_refused_at_once(options, message):
    with pytest.raises(ParameterError, match=message):
        PairwiseStage(
            **{
                **{"id_field": "id", "embedding_field": "embedding", "input_path": "kmeans", "output_path": "pairs"},
                **options,
            }
        )


def test_embedding_dim_is_checked_against_the_vectors(tmp_path):
    write_foreign(tmp_path / "kmeans")
    with pytest.raises(DamagedFileError, match=r"centroid=.*not of length 7"):
        pairwise(tmp_path / "kmeans", tmp_path / "pairs", embedding_dim=7)
    ids, vectors = planted(60, DIM)
    table = pa.table({"id": ids, "embedding": pa.array(vectors.tolist(), pa.list_(pa.float64()))})
    pq.write_table(table, tmp_path / "in.parquet")
    kmeans = KMeansStage(2, "id", "embedding", str(tmp_path / "in.parquet"), str(tmp_path / "ours"))
    Pipeline(stages=[kmeans]).run()
    with pytest.raises(ParameterError, match=f"embedding_dim is 7, but the vectors have {DIM}"):
        pairwise(tmp_path / "ours", tmp_path / "pairs7", embedding_dim=7)


def test_missing_columns_and_folders_are_named(tmp_path):
    write_foreign(tmp_path / "kmeans", n_clusters=1)
    with pytest.raises(InputNotFoundError, match="nowhere: no such folder"):
        pairwise(tmp_path / "nowhere", tmp_path / "p0")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputNotFoundError, match=r"no centroid=K/\*.parquet"):
        pairwise(tmp_path / "empty", tmp_path / "p1")
    stage = PairwiseStage("uid", "embedding", str(tmp_path / "kmeans"), str(tmp_path / "p2"))
    with pytest.raises(SchemaError, match="no column 'uid'; it has 'embedding', 'note', 'id'"):
        Pipeline(stages=[stage]).run()
    stage = PairwiseStage("id", "vec", str(tmp_path / "kmeans"), str(tmp_path / "p3"))
    with pytest.raises(SchemaError, match="no column 'vec'"):
        Pipeline(stages=[stage]).run()
    stage = PairwiseStage("id", "note", str(tmp_path / "kmeans"), str(tmp_path / "p4"))
    with pytest.raises(SchemaError, match=r"column 'note' has type struct.*list of float16, float32 or float64"):
        Pipeline(stages=[stage]).run()
    ranking = RankingStrategy.metadata_based(["size"])
    with pytest.raises(SchemaError, match="no column 'size'"):
        pairwise(tmp_path / "kmeans", tmp_path / "p5", ranking_strategy=ranking)


@pytest.mark.parametrize("bad", [None, [], [0.0] * DIM, [float("nan")] * DIM, [1.0] * (DIM + 1)], ids=str)
def test_a_vector_that_kmeans_cannot_have_written_names_the_file(tmp_path, bad):
    folder = tmp_path / "kmeans/centroid=3"
    folder.mkdir(parents=True)
    vectors = [*np.eye(DIM).tolist()[:4], bad]
    table = pa.table(
        {
            "id": list("abcde"),
            "embedding": pa.array(vectors, pa.list_(pa.float32())),
            "cosine_dist_to_cent": [0.1, 0.2, 0.3, 0.4, 0.5],
        }
    )
    pq.write_table(table, folder / "x.parquet")
    with pytest.raises(DamagedFileError, match=r"centroid=3/x.parquet: holds an embedding that is null, zero"):
        pairwise(tmp_path / "kmeans", tmp_path / "pairs", embedding_dim=DIM)


def test_stages_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    ids, vectors = planted(60, DIM)
    table = pa.table({"id": ids, "embedding": pa.array(vectors.tolist(), pa.list_(pa.float64()))})
    pq.write_table(table, tmp_path / "in.parquet")

    def kmeans():
        return KMeansStage(2, "id", "embedding", str(tmp_path / "in.parquet"), str(tmp_path / "kmeans"))

    wrong = {
        "input_path of PairwiseStage is .*elsewhere, but the KMeansStage before it": PairwiseStage(
            "id", "embedding", str(tmp_path / "elsewhere"), str(tmp_path / "pairs")
        ),
        "give both stages the same": PairwiseStage(
            "uid", "embedding", str(tmp_path / "kmeans"), str(tmp_path / "pairs")
        ),
    }
    for message, stage in wrong.items():
        with pytest.raises(ParameterError, match=message):
            Pipeline(stages=[kmeans(), stage]).run()
    ranking = RankingStrategy.metadata_based(["duration"])
    stage = PairwiseStage(
        "id", "embedding", str(tmp_path / "kmeans"), str(tmp_path / "pairs"), ranking_strategy=ranking
    )
    with pytest.raises(SchemaError, match="'duration': name it in metadata_fields of KMeansStage"):
        Pipeline(stages=[kmeans(), stage]).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet"]
    with pytest.raises(ParameterError, match="is not a stage"):
        Pipeline().add_stage("kmeans")
    with pytest.raises(ParameterError, match="'empty' has no stages"):
        Pipeline("empty").run()
