"""The tutorial of NeMo Curator, with only its import lines changed."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from stage_oracles import (
    all_pairs,
    assert_same_matches,
    matrix,
    planted,
    read_clusters,
    unit,
    write_like_curator,
)

from oracle import ranked_rows
from untwin.errors import OutputExistsError, ParameterError
from untwin.pipeline import Pipeline
from untwin.stages.kmeans import KMeansStage
from untwin.stages.pairwise import PairwiseStage

N_ROWS, DIM, N_CLUSTERS = 700, 24, 9


def tutorial(OUT_DIR, which_to_keep="hard", sim_metric="cosine", verbose=False):
    pipe = Pipeline(name="video_semantic_dedup", description="KMeans + pairwise dedup")
    pipe.add_stage(
        KMeansStage(
            n_clusters=N_CLUSTERS,
            id_field="id",
            embedding_field="embedding",
            input_path=f"{OUT_DIR}/iv2_embd_parquet",
            output_path=f"{OUT_DIR}/semantic_dedup/kmeans",
            input_filetype="parquet",
            embedding_dim=DIM,
            read_kwargs={"storage_options": None},
            write_kwargs={"storage_options": None},
            verbose=verbose,
        )
    )
    pipe.add_stage(
        PairwiseStage(
            id_field="id",
            embedding_field="embedding",
            input_path=f"{OUT_DIR}/semantic_dedup/kmeans",
            output_path=f"{OUT_DIR}/semantic_dedup/pairwise",
            which_to_keep=which_to_keep,
            sim_metric=sim_metric,
            pairwise_batch_size=1024,
            read_kwargs={"storage_options": None},
            write_kwargs={"storage_options": None},
            verbose=verbose,
        )
    )
    return pipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tutorial")
    ids, vectors = planted(N_ROWS, DIM)
    write_like_curator(folder / "iv2_embd_parquet", ids, vectors)
    pipe = tutorial(folder)
    pipe.run()
    return folder, ids, vectors, pipe


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_kmeans_holds_every_row_once_with_its_unit_vector_and_row_number(finished):
    folder, ids, vectors, _ = finished
    tables = read_clusters(folder / "semantic_dedup/kmeans")
    seen = {}
    for table in tables.values():
        assert table.schema.names == ["id", "embedding", "l2_dist_to_cent", "cosine_dist_to_cent", "_row"]
        assert str(table.schema.field("embedding").type) == f"fixed_size_list<element: float>[{DIM}]"
        for row in table.to_pylist():
            assert row["id"] not in seen
            seen[row["id"]] = row
    assert sorted(seen) == sorted(ids)
    wanted = unit(vectors)
    for number, own in enumerate(ids):
        assert seen[own]["_row"] == number
        assert np.abs(np.array(seen[own]["embedding"]) - wanted[number]).max() < 1e-7
        assert abs(np.linalg.norm(seen[own]["embedding"]) - 1) < 1e-6


def test_distances_and_nearest_centroid_are_those_of_brute_force(finished):
    folder, *_ = finished
    centroids = np.load(folder / "semantic_dedup/kmeans/_centroids.npy")
    assert centroids.shape == (N_CLUSTERS, DIM)
    assert centroids.dtype == np.float32
    centroids = centroids.astype(np.float64)
    tables = read_clusters(folder / "semantic_dedup/kmeans")
    assert len(tables) > 1
    for centroid, table in tables.items():
        X = matrix(table["embedding"])
        distances = np.linalg.norm(X[:, None, :] - centroids[None], axis=2)
        assert (distances.argmin(axis=1) == centroid).all()
        np.testing.assert_allclose(table["l2_dist_to_cent"].to_numpy(), distances[:, centroid], atol=1e-6)
        cosine = X @ centroids[centroid] / np.linalg.norm(X, axis=1) / np.linalg.norm(centroids[centroid])
        np.testing.assert_allclose(table["cosine_dist_to_cent"].to_numpy(), 1 - cosine, atol=1e-6)


def test_centroids_are_not_normalised(finished):
    folder, *_ = finished
    norms = np.linalg.norm(np.load(folder / "semantic_dedup/kmeans/_centroids.npy"), axis=1)
    assert (norms < 0.999).any()
    tables = read_clusters(folder / "semantic_dedup/kmeans")
    for centroid, table in tables.items():
        mean = matrix(table["embedding"]).mean(axis=0)
        assert abs(np.linalg.norm(mean) - norms[centroid]) < 0.05


def test_a_reader_of_the_whole_folder_meets_data_only(finished):
    folder, ids, *_ = finished
    kmeans = folder / "semantic_dedup/kmeans"
    others = [path for path in kmeans.iterdir() if not path.name.startswith("centroid=")]
    assert [path.name for path in others] == ["_centroids.npy"]
    table = ds.dataset(kmeans, format="parquet", partitioning="hive").to_table()
    assert sorted(table["id"].to_pylist()) == sorted(ids)
    assert "centroid" in table.schema.names
    table = ds.dataset(folder / "semantic_dedup/pairwise", format="parquet").to_table()
    assert table.schema.names == ["id", "max_id", "cosine_sim_score"]
    assert sorted(table["id"].to_pylist()) == sorted(ids)


def test_pairwise_is_brute_force_in_each_cluster_in_rank_order(finished):
    folder, ids, vectors, _ = finished
    exact = dict(zip(ids, np.asarray(vectors), strict=True))
    tables = read_clusters(folder / "semantic_dedup/kmeans")
    files = {path.name for path in (folder / "semantic_dedup/pairwise").iterdir() if not path.name.startswith("_")}
    assert files == {f"cluster_{centroid}.parquet" for centroid in tables}
    n_near = 0
    for centroid, table in tables.items():
        rows = table.select(["id", "cosine_dist_to_cent"]).to_pylist()
        order = ranked_rows(rows, ["cosine_dist_to_cent"], [False])
        named = [rows[at]["id"] for at in order]
        want = all_pairs(named, [exact[name] for name in named])
        got = pq.read_table(folder / f"semantic_dedup/pairwise/cluster_{centroid}.parquet")
        assert got.schema.names == ["id", "max_id", "cosine_sim_score"]
        assert str(got.schema.field("cosine_sim_score").type) == "float"
        assert_same_matches(got, want)
        n_near += sum(row["score"] > 0.97 for row in want)
    assert n_near > 50


@pytest.mark.parametrize(
    ("which", "metric", "key", "ascending"),
    [
        ("easy", "cosine", "cosine_dist_to_cent", True),
        ("hard", "l2", "l2_dist_to_cent", False),
        ("easy", "l2", "l2_dist_to_cent", True),
    ],
)
def test_which_to_keep_and_sim_metric_decide_the_order(finished, tmp_path, which, metric, key, ascending):
    folder, *_ = finished
    kmeans = folder / "semantic_dedup/kmeans"
    stage = PairwiseStage(
        "id", "embedding", str(kmeans), str(tmp_path / "pairs"), which_to_keep=which, sim_metric=metric
    )
    Pipeline(stages=[stage]).run()
    for centroid, table in read_clusters(kmeans).items():
        rows = table.select(["id", key]).to_pylist()
        named = [rows[at]["id"] for at in ranked_rows(rows, [key], [ascending])]
        assert pq.read_table(tmp_path / f"pairs/cluster_{centroid}.parquet")["id"].to_pylist() == named


def test_a_second_run_on_the_same_output_is_an_error_that_changes_nothing(finished):
    folder, _, _, pipe = finished
    before = snapshot(folder)
    with pytest.raises(OutputExistsError, match=r"kmeans.*choose another output_path"):
        tutorial(folder).run()
    with pytest.raises(OutputExistsError, match=r"kmeans.*choose another output_path"):
        pipe.run()
    assert snapshot(folder) == before


def test_pairwise_results_that_are_there_stop_the_pipeline_before_kmeans_writes(finished, tmp_path):
    _, ids, vectors, _ = finished
    write_like_curator(tmp_path / "iv2_embd_parquet", ids, vectors)
    pairs = tmp_path / "semantic_dedup/pairwise"
    pairs.mkdir(parents=True)
    (pairs / "cluster_77.parquet").write_bytes(b"from an earlier run")
    before = snapshot(tmp_path)
    with pytest.raises(OutputExistsError, match=r"pairwise.*'cluster_77.parquet'"):
        tutorial(tmp_path).run()
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "semantic_dedup/kmeans").exists()


def test_verbose_logs_every_stage_and_otherwise_nothing_is_logged(tmp_path, caplog):
    ids, vectors = planted(120, DIM)
    for name in ("loud", "quiet"):
        write_like_curator(tmp_path / name / "iv2_embd_parquet", ids, vectors)
    with caplog.at_level(logging.INFO, logger="untwin"):
        tutorial(tmp_path / "quiet").run()
        assert caplog.records == []
        tutorial(tmp_path / "loud", verbose=True).run()
    said = [record.getMessage().partition(":")[0] for record in caplog.records if record.name == "untwin"]
    assert said == ["sample", "fit", "assign", "repeated ids", "gather", "pairwise"]
    assert "120 rows" in caplog.records[0].getMessage()


def test_a_pipeline_with_the_same_stage_twice_is_refused_before_any_work(tmp_path):
    pq.write_table(pa.table({"id": ["a", "b"], "embedding": [[1.0, 0.0], [0.0, 1.0]]}), tmp_path / "in.parquet")
    stages = [KMeansStage(1, "id", "embedding", str(tmp_path / "in.parquet"), str(tmp_path / name)) for name in "kl"]
    with pytest.raises(ParameterError, match="'sample' twice"):
        Pipeline(stages=stages).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet"]
