"""k-means: exact nearest centroids, the same bits in any order, quality, empty clusters."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from untwin.core import kmeans
from untwin.core.hashing import hash_integers
from untwin.core.kmeans import ArrayBlocks, NearestCentroid, fit, nearest, plus_plus
from untwin.core.vectors import normalize
from untwin.errors import ParameterError


def clustered(seed, n, dim, n_centres=8, spread=0.3):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n_centres, dim))
    X, _ = normalize(centres[rng.integers(0, n_centres, n)] + spread * rng.standard_normal((n, dim)))
    return X


def hashes_of(n):
    return hash_integers(np.arange(n), 11)


class Ragged:
    """Blocks of uneven sizes, one of them empty, rows in any order."""

    def __init__(self, X, hashes, order, cuts):
        bounds = [0, *sorted(cuts), len(order)]
        self.parts = [order[a:b] for a, b in pairwise(bounds)]
        self.X, self.hashes = X, hashes
        self.n_rows, self.dim = X.shape

    def __len__(self):
        return len(self.parts)

    def block(self, index, start=0, stop=None):
        rows = self.parts[index][start:stop]
        return self.X[rows], self.hashes[rows]


def assert_same(a, b):
    assert a.centroids.tobytes() == b.centroids.tobytes()
    assert a.counts.tolist() == b.counts.tolist()
    assert (a.inertia, a.n_iter, a.mean_cosine, a.n_rows) == (b.inertia, b.n_iter, b.mean_cosine, b.n_rows)


def exact_distances(X, C):
    return ((X.astype(np.float64)[:, None] - C.astype(np.float64)) ** 2).sum(axis=2)


def lloyd(X, C, max_iter, tol):
    """Plain float64 Lloyd with scikit-learn's stopping rule."""
    X, C = X.astype(np.float64), C.astype(np.float64)
    for _ in range(max_iter):
        label = exact_distances(X, C).argmin(axis=1)
        new = np.stack([X[label == k].mean(axis=0) if (label == k).any() else C[k] for k in range(len(C))])
        shift, C = ((new - C) ** 2).sum(), new
        if shift <= tol * X.var(axis=0).mean():
            break
    return C, exact_distances(X, C).min(axis=1).sum()


@pytest.mark.parametrize(("n", "dim", "k"), [(1, 1, 1), (300, 2, 7), (500, 17, 300), (100, 384, 40)])
@pytest.mark.parametrize("columns", [3, 64, 1024])
def test_nearest_equals_brute_force(n, dim, k, columns, monkeypatch):
    monkeypatch.setattr(kmeans, "_ASSIGN_COLUMNS", columns)
    X = clustered(n, n, dim)
    C = np.random.default_rng(k).standard_normal((k, dim)).astype(np.float32) * 0.3
    label, square = nearest(X, C)
    want = exact_distances(X, C)
    assert label.dtype == np.int32
    assert square.dtype == np.float64
    np.testing.assert_array_equal(label, want.argmin(axis=1))
    np.testing.assert_allclose(square, want.min(axis=1), rtol=1e-12)
    count = min(k, 5)
    np.testing.assert_array_equal(NearestCentroid(C).order(X, count), want.argsort(axis=1, kind="stable")[:, :count])


def test_distances_are_those_to_the_own_centroid_and_its_cosine():
    X = clustered(3, 500, 24)
    C = np.concatenate((X[:5], 0.3 * X[5:9], np.zeros((1, 24), np.float32), X[:1]))  # the last is a copy
    found = NearestCentroid(C)
    labels = found.labels(X).copy()
    labels[100:105] = 9
    sq_dist, cosine = found.distances(X, labels)
    own = C[labels].astype(np.float64)
    assert np.abs(sq_dist - ((X - own) ** 2).sum(axis=1)).max() < 1e-14
    assert (sq_dist[:5] < 1e-14).all()
    norms = np.sqrt((own**2).sum(axis=1) * (X.astype(np.float64) ** 2).sum(axis=1))
    want = np.divide((X * own).sum(axis=1), norms, out=np.zeros(500), where=norms > 0)
    assert np.abs(cosine - want).max() < 1e-14
    assert (cosine[100:105] == 0).all()
    for rows in (slice(0, 1), slice(7, 90)):
        assert found.distances(X[rows], labels[rows])[0].tolist() == sq_dist[rows].tolist()


def test_copies_of_a_centroid_have_no_place_in_the_order():
    X = clustered(0, 200, 5)
    order = NearestCentroid(X[[3, 7, 3, 9, 7]]).order(X, 4)
    np.testing.assert_array_equal(order[:, :3], np.array([0, 1, 3])[NearestCentroid(X[[3, 7, 9]]).order(X, 3)])
    assert (order[:, 3] == -1).all()


def test_ties_between_identical_centroids_go_to_the_lowest_index():
    X = clustered(0, 200, 5)
    C = X[[3, 7, 3, 7, 7, 9]]
    label = NearestCentroid(C).labels(X)
    assert set(label.tolist()) == {0, 1, 5}
    np.testing.assert_array_equal(
        label, nearest(X, X[[3, 7, 9]])[0][:, None] @ [0] + np.array([0, 1, 5])[nearest(X, X[[3, 7, 9]])[0]]
    )


def test_near_ties_are_decided_exactly_whatever_the_batch():
    X = clustered(1, 400, 64)
    C = np.repeat(X[:20], 5, axis=0)
    C[:, 3] *= 1 + np.tile(np.arange(5) - 2, 20).astype(np.float32) * np.float32(2.0**-22)
    finder = NearestCentroid(C)
    label = finder.labels(X)
    np.testing.assert_array_equal(label, exact_distances(X, C).argmin(axis=1))
    order = finder.order(X, 6)
    np.testing.assert_array_equal(order, exact_distances(X, C).argsort(axis=1, kind="stable")[:, :6])
    np.testing.assert_array_equal(np.concatenate([finder.order(X[at : at + 7], 6) for at in range(0, 400, 7)]), order)
    for size in (1, 3, 111):
        parts = [finder.labels(X[at : at + size]) for at in range(0, 400, size)]
        np.testing.assert_array_equal(np.concatenate(parts), label)


@pytest.mark.parametrize("small_product", [0, 10**9])
@pytest.mark.parametrize("n_neighbours", [1, 3, 25, 30])
def test_labels_near_are_those_of_brute_force_among_the_neighbours(n_neighbours, small_product, monkeypatch):
    """A row of a cluster counts its mean as it would be without the row, and the other means as they are."""
    monkeypatch.setattr(kmeans, "_SMALL_PRODUCT", small_product)
    X = clustered(3, 500, 9, n_centres=12)
    X[50:60] = X[0]
    old = np.random.default_rng(0).integers(0, 25, 500).astype(np.int32)
    old[np.arange(500)[old == 7][1:]] = 8
    old[old == 9] = 10
    counts = np.bincount(old, minlength=25)
    assert counts[7] == 1
    assert counts[9] == 0
    X64 = X.astype(np.float64)
    C = np.stack([X64[old == k].mean(axis=0) if counts[k] else X64[9] for k in range(25)]).astype(np.float32)
    C[20] = C[4]
    finder = NearestCentroid(C)
    between = exact_distances(C, C)
    between[:, 20] = np.inf  # a copy is nobody's neighbour
    near = between.argsort(axis=1, kind="stable")[:, :n_neighbours]
    distance = exact_distances(X, C)
    own = np.where(old == 20, 4, old)
    rows = np.arange(500)
    alone = counts[old] == 1
    without = (C[own] * counts[old, None] - X64) / np.maximum(counts[old] - 1, 1)[:, None]
    distance[rows, own] = np.where(alone, distance[rows, own], ((X64 - without) ** 2).sum(axis=1))
    allowed = np.zeros((500, 25), bool)
    allowed[rows[:, None], near[old]] = True
    allowed[:, 20] = False
    want = np.where(allowed, distance, np.inf).argmin(axis=1)
    neighbours = finder.neighbours(n_neighbours)
    got = finder.labels_near(X, old, neighbours, counts)
    if n_neighbours > 1:
        assert (want != old).sum() > 100
    np.testing.assert_array_equal(got, want)
    parts = [finder.labels_near(X[at : at + 7], old[at : at + 7], neighbours, counts) for at in range(0, 500, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), got)


def test_neighbours_are_the_nearest_of_brute_force_and_first_the_centroid_itself():
    C = clustered(4, 300, 6, n_centres=20, spread=0.2) * np.float32(0.8)
    C[100:140] = C[0]
    C[200:240, 0] *= np.float32(1 + 2.0**-22)
    kept = np.r_[0:100, 140:300]
    for count in (1, 2, 17, 400):
        table = NearestCentroid(C).neighbours(count)
        want = exact_distances(C, C[kept]).argsort(axis=1, kind="stable")[:, :count]
        np.testing.assert_array_equal(np.sort(table, axis=1), np.sort(want, axis=1))
        np.testing.assert_array_equal(C[kept][table[:, 0]], C)


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("columns", [13, 1024])
def test_among_centroids_that_are_almost_alike_the_nearest_is_found_exactly(spread, columns, monkeypatch):
    monkeypatch.setattr(kmeans, "_ASSIGN_COLUMNS", columns)
    rng = np.random.default_rng(5)
    X, _ = normalize(rng.standard_normal(48) + spread * rng.standard_normal((700, 48)))
    C = X[:40] * np.float32(1 - spread / 8)
    C[30:35] = X[600:605]
    finder, wanted = NearestCentroid(C), exact_distances(X, C)
    thinned, closest = [], finder._closest
    monkeypatch.setattr(
        finder,
        "_closest",
        lambda *arguments, **options: thinned.append(found := closest(*arguments, **options)) or found,
    )
    old = rng.integers(0, 40, 700).astype(np.int32)
    counts = np.full(40, 2)
    near = exact_distances(C, C).argsort(axis=1, kind="stable")
    wanted_near = wanted.copy()
    wanted_near[np.arange(700), old] *= 4
    labels, order = finder.labels(X), finder.order(X, 4)
    np.testing.assert_array_equal(labels, wanted.argmin(axis=1))
    np.testing.assert_array_equal(order, wanted.argsort(axis=1, kind="stable")[:, :4])
    for count in (40, 9):
        neighbours = finder.neighbours(count)
        np.testing.assert_array_equal(np.sort(neighbours, axis=1), np.sort(near[:, :count], axis=1))
        allowed = np.zeros((700, 40), bool)
        allowed[np.arange(700)[:, None], near[old, :count]] = True
        got = finder.labels_near(X, old, neighbours, counts)
        np.testing.assert_array_equal(got, np.where(allowed, wanted_near, np.inf).argmin(axis=1))
    if spread == 1e-4:  # with more, float32 products tell; with less, not even float64 ones
        assert len(thinned) >= 40
        assert np.mean([found.mean() for found in thinned]) < 0.3


def test_few_neighbours_find_nearly_as_good_centroids_for_other_rows_as_all():
    X = clustered(6, 12_000, 16, n_centres=200, spread=0.5)
    few, every = (
        fit(ArrayBlocks(X[:6000], hashes_of(6000)), 150, init="random", max_iter=20, n_neighbours=count)
        for count in (20, None)
    )
    assert few.counts.min() > 0
    assert nearest(X[6000:], few.centroids)[1].sum() <= nearest(X[6000:], every.centroids)[1].sum() * 1.02


def test_a_cluster_that_loses_its_rows_splits_a_large_one():
    X = clustered(13, 1000, 8, n_centres=10, spread=0.05)
    got = fit(ArrayBlocks(X, hashes_of(1000)), 10, init=np.repeat(X[:1], 10, axis=0), n_neighbours=10)
    assert got.counts.min() > 20


def test_centroids_of_single_rows_move_to_where_they_split_large_clusters_at_the_end_of_a_step():
    X, far = clustered(5, 3200, 32, n_centres=16, spread=0.05), np.eye(32, dtype=np.float32)[:8]
    rows, hashes = np.concatenate((far, X)), hashes_of(3208)
    hashes[:8] = np.arange(8)  # in the rows of every step
    start = np.concatenate((far, X[:8]))
    blocks = ArrayBlocks(rows, hashes)
    alone = fit(blocks, 16, init=start, n_neighbours=16)
    assert (alone.counts == 1).sum() >= 4
    grown = fit(blocks, 16, init=start, n_neighbours=16, growth=[(800, 10), (1600, 10)])
    assert grown.counts.min() > 20
    assert grown.inertia < 0.7 * alone.inertia
    # where clusters are small on average, small ones stay
    few = np.concatenate((far, X[:40]))
    kept = fit(ArrayBlocks(few, hashes[:48]), 16, init=start, n_neighbours=16, growth=[(48, 10)])
    assert (kept.counts == 1).sum() >= 4


def test_a_step_of_growth_fits_on_the_rows_with_the_smallest_hashes():
    X, hashes = clustered(14, 1000, 8), hashes_of(1000)
    order = np.argsort(hashes)
    few = fit(ArrayBlocks(X[order[:200]], hashes[order[:200]]), 9, init=X[:9], n_neighbours=5, max_iter=1)
    assert few.counts.min() > 0
    want = fit(ArrayBlocks(X, hashes), 9, init=few.centroids, n_neighbours=5, max_iter=1)
    for blocks in (ArrayBlocks(X, hashes), Ragged(X, hashes, order[::-1], [10, 900])):
        got = fit(blocks, 9, init=X[:9], n_neighbours=5, growth=[(200, 1)], max_iter=1)
        assert got.n_iter == 2
        assert got.centroids.tobytes() == want.centroids.tobytes()


def test_growth_finds_nearly_as_good_centroids_as_many_iterations_on_all_rows():
    X = clustered(6, 12_000, 16, n_centres=200, spread=0.5)
    blocks = ArrayBlocks(X[:6000], hashes_of(6000))
    grown = fit(blocks, 100, init="random", max_iter=6, n_neighbours=20, growth=[(1000, 10), (2500, 5)])
    every = fit(blocks, 100, init="random", tol=0)
    assert grown.n_iter <= 21
    assert nearest(X[6000:], grown.centroids)[1].sum() <= nearest(X[6000:], every.centroids)[1].sum() * 1.02


def test_centroids_are_the_means_of_their_rows_when_nothing_moves_any_more():
    X = clustered(15, 600, 8, n_centres=6, spread=0.05)
    got = fit(ArrayBlocks(X, hashes_of(600)), 6, n_neighbours=3, tol=0)
    label = nearest(X, got.centroids)[0]
    means = np.stack([X[label == k].astype(np.float64).mean(axis=0) for k in range(6)])
    np.testing.assert_allclose(got.centroids, means, atol=1e-7)


def test_rows_that_share_a_hash_give_the_same_bits_in_any_order():
    """The same id can have different vectors; so many clusters start equal that nearly all of them split another."""
    X = clustered(16, 600, 6)
    hashes = hashes_of(600)[np.arange(600) // 3]
    arguments = {"init": np.repeat(X[:1], 60, axis=0), "n_neighbours": 8, "growth": [(200, 4)], "max_iter": 8}
    want = fit(ArrayBlocks(X, hashes), 60, **arguments)
    assert np.count_nonzero(want.counts) > 30
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(600)
        assert_same(fit(ArrayBlocks(X[order], hashes[order]), 60, **arguments), want)
        assert_same(fit(Ragged(X, hashes, order, [100, 101, 450]), 60, **arguments), want)


@pytest.mark.parametrize(("n_neighbours", "growth"), [(None, ()), (6, ()), (6, ((150, 4), (400, 3)))])
@pytest.mark.parametrize("init", ["k-means||", "random", "array"])
def test_fit_has_the_same_bits_for_any_order_partition_and_threads(init, n_neighbours, growth):
    X, hashes = clustered(2, 1000, 12), hashes_of(1000)
    X[500:520] = X[0]
    arguments = {"init": X[:25].copy() if init == "array" else init, "seed": 3, "n_init": 2}
    arguments |= {"n_neighbours": n_neighbours, "growth": growth}
    want = fit(ArrayBlocks(X, hashes), 25, **arguments)
    rng = np.random.default_rng(4)
    with ThreadPoolExecutor(4) as pool:
        for attempt in range(4):
            order = rng.permutation(1000)
            cuts = rng.integers(0, 1000, 7).tolist()
            run = pool.map if attempt % 2 else map
            assert_same(fit(Ragged(X, hashes, order, [*cuts, cuts[0]]), 25, executor_map=run, **arguments), want)
    other = fit(ArrayBlocks(X, hashes), 25, **{**arguments, "seed": 4})
    assert init == "array" or other.centroids.tobytes() != want.centroids.tobytes()


@settings(deadline=None, max_examples=30)
@given(
    points=st.lists(st.integers(0, 11), min_size=1, max_size=30),
    n_clusters=st.integers(1, 30),
    init=st.sampled_from(["k-means||", "random"]),
    n_neighbours=st.sampled_from([None, 1, 4]),
    grows=st.booleans(),
    data=st.data(),
)
def test_few_distinct_rows_order_and_partition_change_nothing(points, n_clusters, init, n_neighbours, grows, data):
    n_clusters = min(n_clusters, len(points))
    angles = np.array(points) * np.pi / 6
    X, _ = normalize(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    hashes = hashes_of(len(X))
    arguments = {"init": init, "n_neighbours": n_neighbours, "max_iter": 20}
    arguments["growth"] = [(1, 2), (5, 3)] if grows and n_neighbours else []
    want = fit(ArrayBlocks(X, hashes), n_clusters, **arguments)
    order = np.array(data.draw(st.permutations(range(len(X)))))
    cuts = data.draw(st.lists(st.integers(0, len(X)), max_size=3))
    assert_same(fit(Ragged(X, hashes, order, cuts), n_clusters, **arguments), want)
    assert want.counts.sum() == len(X)
    assert np.isfinite(want.centroids).all()
    if n_clusters >= len(set(points)) and n_neighbours is None:
        assert np.count_nonzero(want.counts) == len(set(points))
        assert want.inertia < 1e-12


def test_equals_plain_lloyd_from_the_same_start():
    X = clustered(5, 800, 10, n_centres=15)
    for max_iter in (1, 3, 300):
        got = fit(ArrayBlocks(X, hashes_of(800), 100), 12, init=X[:12], max_iter=max_iter, tol=1e-4)
        C, inertia = lloyd(X, X[:12], max_iter, 1e-4)
        np.testing.assert_allclose(got.centroids, C, atol=1e-5)
        assert got.inertia == pytest.approx(inertia, rel=1e-5)
        assert got.n_iter <= max_iter


@pytest.mark.parametrize("init", ["k-means||", "random"])
def test_quality_is_that_of_lloyd_with_random_starts(init):
    X = clustered(6, 3000, 16, n_centres=40, spread=0.5)
    got = fit(ArrayBlocks(X, hashes_of(3000)), 40, init=init, n_init=3)
    rng = np.random.default_rng(0)
    best = min(lloyd(X, X[rng.choice(3000, 40, replace=False)], 50, 1e-4)[1] for _ in range(3))
    assert got.inertia <= best * 1.01


def test_separated_clusters_are_found_by_scalable_init():
    X = clustered(7, 2000, 32, n_centres=30, spread=0.02)
    got = fit(ArrayBlocks(X, hashes_of(2000)), 30)
    assert got.counts.min() > 20
    assert got.mean_cosine > 0.999


def test_the_result_describes_itself():
    X = clustered(8, 500, 6)
    got = fit(ArrayBlocks(X, hashes_of(500)), 9)
    label, square = nearest(X, got.centroids)
    np.testing.assert_array_equal(got.counts, np.bincount(label, minlength=9))
    assert got.inertia == pytest.approx(square.sum(), rel=1e-12)
    cosine = (X * got.centroids[label]).sum(axis=1) / np.linalg.norm(got.centroids[label], axis=1)
    assert got.mean_cosine == pytest.approx(cosine.mean(), abs=1e-6)
    assert (got.n_rows, got.centroids.dtype, got.centroids.shape) == (500, np.float32, (9, 6))


def test_empty_clusters_are_moved_to_the_farthest_distinct_rows():
    X = clustered(9, 300, 4)
    distance = exact_distances(X, X[:1])[:, 0]
    farthest = np.argsort(-distance)[:4]
    X[100:120] = X[farthest[0]]
    distance = exact_distances(X, X[:1])[:, 0]
    farthest = [k for k in np.argsort(-distance, kind="stable") if not 100 < k < 120 and k != farthest[0]][:4]
    start = np.repeat(X[:1], 5, axis=0)
    one = fit(ArrayBlocks(X, hashes_of(300)), 5, init=start, max_iter=1)
    np.testing.assert_array_equal(one.centroids[1:], X[farthest])
    assert (fit(ArrayBlocks(X, hashes_of(300)), 5, init=start).counts > 0).all()


@pytest.mark.parametrize("init", ["k-means||", "random"])
def test_surplus_clusters_stay_empty_and_attract_nothing(init):
    X = np.eye(4, dtype=np.float32)[np.arange(60) % 4]
    got = fit(ArrayBlocks(X, hashes_of(60)), 10, init=init)
    assert sorted(got.counts.tolist()) == [0] * 6 + [15] * 4
    assert got.inertia == 0
    assert got.mean_cosine == 1
    assert {tuple(c) for c in got.centroids.tolist()} == {tuple(c) for c in np.eye(4).tolist()}
    assert got.n_iter < 20


def test_more_runs_are_never_worse():
    X = clustered(10, 600, 8, n_centres=30)
    one, five = (fit(ArrayBlocks(X, hashes_of(600)), 30, init="random", n_init=k) for k in (1, 5))
    assert five.inertia <= one.inertia


def test_as_many_clusters_as_rows():
    X = clustered(11, 50, 3)
    for init in ("random", "k-means||"):
        got = fit(ArrayBlocks(X, hashes_of(50)), 50, init=init)
        assert got.counts.tolist() == [1] * 50
        assert got.inertia < 1e-12


def test_plus_plus_draws_in_proportion_to_weight_and_squared_distance():
    """Four points on a line, 0 1 3 7: the chance of every pair can be written down."""
    candidates = np.array([[0], [1], [3], [7]], np.float32)
    weight = np.array([4, 2, 1, 1])
    pairs = np.zeros((4, 4))
    for seed in range(4000):
        a, b = plus_plus(candidates, weight, 2, seed)[:, 0]
        pairs[[0, 1, 3, 7].index(a), [0, 1, 3, 7].index(b)] += 1 / 4000
    distance = (candidates - candidates.T) ** 2
    want = weight * distance
    want = (weight / 8)[:, None] * want / want.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(pairs, want, atol=0.03)


def test_plus_plus_in_batches_covers_separated_groups():
    rng = np.random.default_rng(12)
    groups = rng.standard_normal((300, 20)).astype(np.float32)
    candidates = np.repeat(groups, 5, axis=0) + 1e-5 * rng.standard_normal((1500, 20)).astype(np.float32)
    chosen = plus_plus(candidates, np.ones(1500, np.int64), 300, 1)
    assert len(set(nearest(chosen, groups)[0].tolist())) == 300


def test_plus_plus_returns_no_row_twice_and_none_without_weight():
    candidates = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    weight = np.repeat([1, 2, 0], 4)
    assert len(plus_plus(candidates, weight, 9, 0)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_clusters": 0}, "n_clusters"),
        ({"n_clusters": 11}, "only 10 rows"),
        ({"n_clusters": 2, "init": "best"}, "init"),
        ({"n_clusters": 2, "init": np.zeros((3, 3), np.float32)}, "shape"),
        ({"n_clusters": 1, "init": np.full((1, 3), np.nan, np.float32)}, "finite"),
        ({"n_clusters": 2, "max_iter": 0}, "max_iter"),
        ({"n_clusters": 2, "tol": -1.0}, "tol"),
        ({"n_clusters": 2, "n_init": 0}, "n_init"),
        ({"n_clusters": 2, "n_neighbours": 0}, "n_neighbours"),
        ({"n_clusters": 2, "growth": [(5, 1)]}, "growth"),
        ({"n_clusters": 2, "n_neighbours": 2, "growth": [(5, 1), (0, 1)]}, "growth"),
        ({"n_clusters": 2, "n_neighbours": 2, "growth": [(5, 0)]}, "growth"),
        ({"n_clusters": 2, "oversampling_factor": 0.0}, "oversampling_factor"),
    ],
)
def test_senseless_parameters_are_refused(arguments, message):
    with pytest.raises(ParameterError, match=message):
        fit(ArrayBlocks(clustered(0, 10, 3), hashes_of(10)), **arguments)


def test_rows_that_are_not_unit_vectors_are_refused():
    with pytest.raises(ParameterError, match="unit length"):
        fit(ArrayBlocks(np.ones((5, 3), np.float32), hashes_of(5)), 2)
