"""Comparing across the borders of clusters: against brute force over all pairs that are compared."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from untwin.backends.local import LocalExecutor
from untwin.core import normalize, rowwise_dot, threshold
from untwin.pipeline import Pipeline
from untwin.stages.borders import Borders, BordersStage
from untwin.stages.duplicates import IdentifyDuplicatesStage
from untwin.stages.kmeans import KMeansStage
from untwin.stages.pairwise import PairwiseStage
from untwin.stages.ranking import RankingStrategy


def near_duplicates(n, dim, seed, spread=0.6, copies=0.1):
    """Groups of rows at all distances from each other, some of them bit-identical."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((max(2, n // 40), dim))
    X = centers[rng.integers(len(centers), size=n)]
    X = X + rng.standard_normal((n, dim)) * (spread * rng.random((n, 1)) ** 2)
    same = rng.random(n) < copies
    X[same] = X[rng.integers(n, size=same.sum())]
    return normalize(X.astype(np.float32))[0]


def run(tmp_path, X, *, probes, eps, compare_to="kept", keep="hard", n_clusters=6, executor=None, seed=0, order=None):
    """Returns each row's result by id, and the clusters."""
    n = len(X)
    order = np.arange(n) if order is None else order
    ids = np.array([f"row-{i:05d}" for i in np.random.default_rng(99).permutation(n)])
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir(parents=True)
    for part, rows in enumerate(np.array_split(order, 3)):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(X[rows].ravel()), X.shape[1])
        pq.write_table(pa.table({"id": ids[rows], "embedding": vectors}), source / f"{part}.parquet")
    kmeans = KMeansStage(
        n_clusters=n_clusters, id_field="id", embedding_field="embedding", input_path=str(source),
        output_path=str(out / "kmeans"), random_state=seed, init="random",
    )  # fmt: skip
    pairwise = PairwiseStage(
        "id", "embedding", str(out / "kmeans"), str(out / "pairwise" / "_inside"),
        ranking_strategy=RankingStrategy.by_distance(keep, "cosine", 7), compare_to=compare_to, eps=eps,
    )  # fmt: skip
    borders = Borders(pairwise, str(out / "pairwise"), str(out / "kmeans" / "_centroids.npy"), n_clusters, probes, n)
    stages = [kmeans, pairwise, BordersStage(borders), IdentifyDuplicatesStage(str(out), eps)]
    outcome = Pipeline("test", stages=stages).run(executor or LocalExecutor(2))
    assert not (out / "pairwise" / "_inside").exists()
    assert not (out / "pairwise" / "_borders").exists()
    clusters = pa.concat_tables(
        [
            pq.read_table(path, partitioning=None).append_column("centroid", pa.array([int(path.parent.name[9:])] * k))
            for path in sorted((out / "kmeans").glob("centroid=*/*.parquet"))
            if (k := pq.read_metadata(path).num_rows)
        ]
    )
    results = pa.concat_tables([pq.read_table(path) for path in sorted((out / "pairwise").glob("*.parquet"))])
    results = results.take(pc.index_in(clusters["id"], value_set=results["id"].combine_chunks()))
    centroids = np.load(out / "kmeans" / "_centroids.npy")
    duplicates = pq.read_table(out / "duplicates" / "part-00000.parquet").sort_by("id")
    return results, clusters, centroids, duplicates, outcome


def expected(clusters, centroids, *, probes, eps, compare_to, keep):
    """Every row's most similar better-ranked compared row and witness (positions, -1: none), and scores."""
    n = len(clusters)
    X = clusters["embedding"].combine_chunks().flatten().to_numpy().reshape(n, -1)
    products = rowwise_dot(np.repeat(X, n, axis=0), np.tile(X, (n, 1))).reshape(n, n)
    cosine = np.minimum(products / np.sqrt(np.diag(products)[:, None] * np.diag(products)), 1)
    label = clusters["centroid"].to_numpy()
    distance = ((X.astype(np.float64)[:, None, :] - centroids[None].astype(np.float64)) ** 2).sum(axis=2)
    copies = np.setdiff1d(np.arange(len(centroids)), np.unique(centroids, axis=0, return_index=True)[1])
    distance[:, copies] = np.inf  # a copy of a centroid is not another cluster
    place = distance.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    assert (place[np.arange(n), label] == 0).all()
    probed = place[:, label] < probes
    near = cosine.astype(np.float32) >= threshold(eps)
    inside = label[:, None] == label
    compared = inside | ((probed | probed.T) & near)
    order = RankingStrategy.by_distance(keep, "cosine", 7).order(clusters, "id")
    rank = order.argsort()
    better = compared & (rank[None, :] < rank[:, None])
    kept = np.ones(n, bool)
    for row in order:
        against = better[row] & near[row]
        if (against & kept).any() if compare_to == "kept" else against.any():
            kept[row] = False

    def best(allowed):
        value = np.where(allowed, cosine, -2)
        top = value == value.max(axis=1, keepdims=True)
        found = np.where(top & allowed, rank[None, :], n).argmin(axis=1)
        return np.where(allowed.any(axis=1), found, -1)

    witness = np.where(kept, -1, best(better & near & kept[None, :]))
    return best(better), witness, kept, cosine, (compared & ~inside).sum() // 2


@pytest.mark.parametrize("compare_to", ["kept", "ranked"])
@pytest.mark.parametrize(
    ("seed", "dim", "n_clusters", "probes", "eps", "keep"),
    [
        (0, 8, 24, 2, 0.05, "hard"),
        (1, 4, 30, 3, 0.02, "easy"),
        (2, 16, 25, 2, 0.2, "random"),
        (3, 3, 20, 4, 0.1, "hard"),
        (4, 32, 18, 5, 0.3, "hard"),
        (5, 6, 30, 2, 0.1, "random"),
    ],
)
def test_every_answer_is_that_of_brute_force_over_all_compared_pairs(
    tmp_path, compare_to, seed, dim, n_clusters, probes, eps, keep
):
    X = near_duplicates(400, dim, seed)
    given = {"probes": probes, "eps": eps, "compare_to": compare_to, "keep": keep}
    results, clusters, centroids, duplicates, _ = run(tmp_path, X, n_clusters=n_clusters, **given)
    check(results, clusters, centroids, duplicates, given)


def check(results, clusters, centroids, duplicates, given):
    match, witness, kept, cosine, n_across = expected(clusters, centroids, **given)
    ids = np.array(clusters["id"].to_pylist())
    assert n_across > 0, "no pair across a border: the data shows nothing"
    at = np.arange(len(ids))
    first = match < 0
    np.testing.assert_array_equal(results["max_id"].to_numpy(), np.where(first, ids, ids[match]))
    np.testing.assert_array_equal(
        results["cosine_sim_score"].to_numpy(), np.where(first, 0, cosine[at, match]).astype(np.float32)
    )
    assert results["kept_id"].to_pylist() == [None if w < 0 else ids[w] for w in witness]
    scores = results["kept_sim_score"].to_numpy(zero_copy_only=False)
    np.testing.assert_array_equal(scores[witness >= 0], cosine[at, witness].astype(np.float32)[witness >= 0])
    assert duplicates["id"].to_pylist() == sorted(ids[~kept].tolist())
