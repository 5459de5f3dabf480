"""What is too large for a node is spread over a real cluster, and gives the bits of one process."""

import numpy as np
import pytest
from ray_faults import cluster_of
from spread_stages import NotedFit, NotedPairwise

from inputs import read_folder, table_of, write_split
from untwin.backends.local import LocalExecutor
from untwin.backends.ray import RayExecutor
from untwin.pipeline import Pipeline
from untwin.stages.fit import FitStage
from untwin.stages.kmeans import KMeansStage

N_ROWS, DIM, N_CLUSTERS = 60_000, 256, 3
BUDGET = 104 << 20
"""Less than the fit on all rows wants, and more than it needs."""


@pytest.fixture(scope="module")
def cluster():
    with cluster_of(2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Most rows are in one cluster, and every tenth has a twin."""
    rng = np.random.default_rng(4)
    vectors = rng.standard_normal((N_ROWS, DIM), dtype=np.float32)
    vectors[: N_ROWS // 20, 0] += 40
    vectors[1::10] = vectors[::10] + 0.01 * vectors[2::10]
    ids = [f"row-{number:06}" for number in rng.permutation(N_ROWS)]
    return write_split(tmp_path_factory.mktemp("spread") / "in", table_of(ids, list(vectors)), 6)


def run(executor, source, folder):
    """Fit on all rows, and compare; the centroids and the pairs."""
    kmeans = KMeansStage(N_CLUSTERS, "id", "embedding", source, f"{folder}/kmeans", init="random", max_iter=3)
    stages = kmeans.stages()
    for stage in stages:
        if type(stage) is FitStage:
            stage.__class__ = NotedFit
            stage.folder = str(folder)
    pairwise = NotedPairwise("id", "embedding", f"{folder}/kmeans", f"{folder}/pairs", eps=0.05, compare_to="kept")
    pairwise.folder = str(folder)
    Pipeline("spread", stages=[*stages, pairwise]).run(executor)
    return (folder / "kmeans" / "_centroids.npy").read_bytes(), read_folder(folder / "pairs")


@pytest.mark.slow
def test_a_fit_and_a_giant_cluster_are_spread_and_give_the_same_bits(cluster, source, tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "local").mkdir()
    centroids, pairs = run(RayExecutor(cluster.address, memory=BUDGET), source, tmp_path / "ray")
    expected_centroids, expected_pairs = run(LocalExecutor(2, 4 << 30), source, tmp_path / "local")
    assert centroids == expected_centroids
    assert pairs.equals(expected_pairs)
    assert pairs["kept_id"].null_count < N_ROWS - N_ROWS // 12
    for name in ("fit", "pairwise"):
        assert int((tmp_path / "ray" / name).read_text()) > 12
        assert not (tmp_path / "local" / name).exists()
