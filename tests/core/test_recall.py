"""The most similar row at each level of comparison against brute force; intervals against known values."""

from itertools import pairwise

import numpy as np
import pytest

from untwin.core import BestNeighbours, LabelledRows, NearestCentroid, normalize, share_interval, threshold

FLOOR = threshold(0.3)


def clustered_rows(n=700, dim=24, n_labels=9, seed=0):
    """Unit rows with near-copies and exact copies, in clusters that do not respect them."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, dim))
    X[200:400] = X[:200] + rng.uniform(0, 1, (200, 1)) * rng.standard_normal((200, dim))
    X[400:450] = X[:50]
    return normalize(X)[0], rng.integers(0, n_labels, n), np.arange(n) + 1000


def truth(X, labels, sampled):
    """Similarity to the most similar other row with the same label, and with any."""
    D = X.astype(np.float64)
    S = np.minimum((D @ D.T) / np.sqrt(np.outer((D * D).sum(1), (D * D).sum(1))), 1)
    np.fill_diagonal(S, -1)
    same = labels[:, None] == labels
    return np.where(same, S, -1).max(1)[sampled], S.max(1)[sampled]


def compare(X, labels, numbers, sampled, bounds, *levels):
    order = sampled[np.argsort(labels[sampled], kind="stable")]
    found = BestNeighbours(LabelledRows(X[order], labels[order], numbers[order], *levels), FLOOR)
    for low, high in pairwise(bounds):
        block = LabelledRows(X[low:high], labels[low:high], numbers[low:high], *levels)
        for part in found.slices:
            found.compare(part, block)
    back = np.argsort(np.argsort(labels[sampled], kind="stable"))
    return [scores[back] for scores in found.scores()]


@pytest.mark.parametrize("n_labels", [1, 2, 9, 600])
def test_the_most_similar_in_the_own_cluster_and_in_all_are_those_of_brute_force(n_labels):
    X, labels, numbers = clustered_rows(n_labels=n_labels)
    sampled = np.random.default_rng(1).permutation(len(X))[:400]
    own, best = compare(X, labels, numbers, sampled, [0, 300, 700])
    for found, expected in zip((own, best), truth(X, labels, sampled), strict=True):
        assert np.allclose(found, np.where(expected >= FLOOR, expected, 0), atol=1e-7)
    assert 0 < np.count_nonzero(own) < len(sampled)
    assert 100 < np.count_nonzero(best) < len(sampled)
    assert (best > own).any() == (n_labels > 1)
    # exact copies score exactly 1, and a row is not its own neighbour
    copied = (sampled < 50) | ((sampled >= 400) & (sampled < 450))
    assert (best[copied] == 1).all()
    assert (best[~copied] < 1).all()


def test_how_rows_are_cut_into_blocks_and_ordered_changes_no_bit():
    X, labels, numbers = clustered_rows()
    sampled = np.arange(0, 700, 2)
    expected = compare(X, labels, numbers, sampled, [0, 700])
    for bounds in ([0, 1, 2, 350, 700], list(range(0, 701, 7))):
        for one, other in zip(compare(X, labels, numbers, sampled, bounds), expected, strict=True):
            assert np.array_equal(one, other)
    order = np.random.default_rng(2).permutation(700)
    place = np.argsort(order)
    shuffled = compare(X[order], labels[order], numbers[order], place[sampled], [0, 100, 700])
    for one, other in zip(shuffled, expected, strict=True):
        assert np.array_equal(one, other)


def test_many_copies_of_one_row_are_each_others_neighbours():
    X, labels, numbers = clustered_rows()
    X[:] = X[0]
    own, best = compare(X, labels, numbers, np.arange(0, 700, 3), [0, 256, 700])
    assert (own == 1).all()
    assert (best == 1).all()


def test_a_similarity_at_the_threshold_counts():
    X = np.zeros((3, 2), np.float32)
    X[0], X[1], X[2] = (1, 0), (0, 1), normalize(np.array([[0.7, np.sqrt(1 - 0.49)]]))[0][0]
    scores = (X[0].astype(np.float64) * X[2]).sum()
    assert np.float32(scores) == FLOOR  # so the case is the one that is meant
    own, _ = compare(X, np.zeros(3, int), np.arange(3), np.array([0]), [0, 3])
    assert own == FLOOR


# --- levels ----------------------------------------------------------------------------------------------------------


def probed_rows(n, dim, n_centroids, seed):
    """Rows as of `clustered_rows`, in the clusters of the nearest of some rows, of which two are the same."""
    X, _, numbers = clustered_rows(n, dim, seed=seed)
    C = X[np.random.default_rng(seed).choice(n, n_centroids, replace=False)] * np.float32(0.9)
    if n_centroids > 3:
        C[3] = C[1]
    return X, NearestCentroid(C).labels(X), numbers, C


def truth_by_level(X, C, sampled, n_levels):
    """Largest similarity to any row that is compared with 1, 2, ... probes, and to any at all."""
    D, E = X.astype(np.float64), C.astype(np.float64)
    distance = ((D[:, None] - E) ** 2).sum(2)
    distance[:, [k for k in range(len(C)) if any((C[k] == C[:k]).all(1))]] = np.inf
    place = distance.argsort(1, kind="stable").argsort(1, kind="stable")
    labels = place.argmin(1)
    # (row, other): where the cluster of the other comes for the row
    places = place[:, labels]
    level = np.minimum(places, places.T)
    S = np.minimum((D @ D.T) / np.sqrt(np.outer((D * D).sum(1), (D * D).sum(1))), 1)
    np.fill_diagonal(S, 0)
    best = [np.where(level < probes, S, 0).max(1)[sampled] for probes in range(1, n_levels + 1)]
    return [np.where(found >= FLOOR, found, 0) for found in (*best, S.max(1)[sampled])]


@pytest.mark.parametrize(
    ("n", "dim", "n_centroids", "n_levels"),
    [(700, 24, 9, 2), (700, 24, 40, 6), (600, 3, 30, 16), (520, 64, 5, 5), (500, 8, 4, 16), (600, 1, 2, 2)],
)
def test_levels_are_those_of_brute_force(n, dim, n_centroids, n_levels):
    X, labels, numbers, C = probed_rows(n, dim, n_centroids, seed=n + n_levels)
    sampled = np.random.default_rng(1).permutation(n)[:400]
    levels = (NearestCentroid(C), n_levels)
    expected = truth_by_level(X, C, sampled, n_levels)
    found = compare(X, labels, numbers, sampled, [0, 300, n], *levels)
    assert len(found) == n_levels + 1
    for one, other in zip(found, expected, strict=True):
        assert np.allclose(one, other, atol=2e-7)
    if dim > 1:
        assert (found[1] > found[0]).any()
    if n_levels < n_centroids and dim > 3:
        assert (found[-1] > found[-2]).any()
    for bounds in ([0, n], [0, 1, 2, 350, n], list(range(0, n + 1, 20))):
        for one, other in zip(compare(X, labels, numbers, sampled, bounds, *levels), found, strict=True):
            assert np.array_equal(one, other)


def test_the_first_and_the_last_level_do_not_depend_on_how_many_are_told_apart():
    X, labels, numbers, C = probed_rows(700, 24, 20, seed=5)
    own, best = compare(X, labels, numbers, np.arange(0, 700, 2), [0, 700])
    found = compare(X, labels, numbers, np.arange(0, 700, 2), [0, 100, 700], NearestCentroid(C), 4)
    assert np.array_equal(found[0], own)
    assert np.array_equal(found[-1], best)
    assert (np.diff(found, axis=0) >= 0).all()


def test_rows_at_the_same_distance_from_several_centroids_have_the_level_of_the_lower_number():
    C = np.eye(4, dtype=np.float32)
    X = normalize(np.array([[1, 1, 1, 0], [1, 1, 1, 1e-3], [1e-3, 1, 1, 1], [1e-3, 2e-3, 1, 1]]))[0]
    labels = NearestCentroid(C).labels(X)
    assert labels.tolist() == [0, 0, 1, 2]
    found = compare(X, labels, np.arange(4), np.arange(4), [0, 4], NearestCentroid(C), 3)
    for one, other in zip(found, truth_by_level(X, C, np.arange(4), 3), strict=True):
        assert np.allclose(one, other, atol=2e-7)
    # rows 0 and 2: centroid 1 comes second for row 0, though 2 is as near
    assert found[0][2] == 0
    assert found[1][2] > 0


def test_many_almost_identical_rows_on_both_sides_of_a_border_are_found():
    rng = np.random.default_rng(0)
    X = normalize((np.arange(24) < 2) + 1e-3 * rng.standard_normal((3000, 24)))[0]
    C = np.eye(24, dtype=np.float32)[:3]
    labels = NearestCentroid(C).labels(X)
    assert 1000 < labels.sum() < 2000
    sampled = np.arange(0, 3000, 10)
    found = compare(X, labels, np.arange(3000), sampled, [0, 1500, 3000], NearestCentroid(C), 2)
    for one, other in zip(found, truth_by_level(X, C, sampled, 2), strict=True):
        assert np.allclose(one, other, atol=2e-7)
    assert (found[1] > found[0]).any()


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "n", "expected"),
    [
        (8, 10, (0.4439, 0.9748)),
        (0, 10, (0, 0.3085)),
        (10, 10, (0.6915, 1)),
        (1, 100, (0.00025, 0.05446)),
        (0, 0, (0, 1)),
    ],
)
def test_the_interval_has_the_known_values(hits, n, expected):
    assert share_interval(hits, n) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("share", "n"), [(0.98, 3000), (0.5, 100), (0.995, 3000)])
def test_the_interval_covers_the_share_in_at_least_95_of_100_draws(share, n):
    hits = np.random.default_rng(0).binomial(n, share, 4000).tolist()
    intervals = {hit: share_interval(hit, n) for hit in set(hits)}
    assert 0.945 < np.mean([intervals[hit][0] <= share <= intervals[hit][1] for hit in hits]) < 0.99


@pytest.mark.parametrize(("hits", "n"), [(7, 20), (2950, 3000), (3, 3000), (100_000, 150_000), (199_990, 200_000)])
def test_the_ends_of_the_interval_leave_two_and_a_half_percent_each(hits, n):
    """By the binomial distribution itself, summed term by term."""
    k = np.arange(n + 1)
    log_choose = np.concatenate(([0], np.cumsum(np.log((n - k[1:] + 1) / k[1:]))))
    low, high = share_interval(hits, n)
    pmf = [np.exp(log_choose + k * np.log(p) + (n - k) * np.log1p(-p)) for p in (low, high)]
    assert pmf[0][hits:].sum() == pytest.approx(0.025, rel=1e-5)
    assert pmf[1][: hits + 1].sum() == pytest.approx(0.025, rel=1e-5)
