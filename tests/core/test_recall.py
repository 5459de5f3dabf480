"""The most similar row inside and outside a cluster against brute force; intervals against known values."""

from itertools import pairwise

import numpy as np
import pytest

from untwin.core import BestNeighbours, LabelledRows, normalize, share_interval, threshold

FLOOR = threshold(0.3)


def clustered_rows(n=700, dim=24, n_labels=9, seed=0):
    """Unit rows with near-copies and exact copies, in clusters that do not respect them."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, dim))
    X[200:400] = X[:200] + rng.uniform(0, 1, (200, 1)) * rng.standard_normal((200, dim))
    X[400:450] = X[:50]
    return normalize(X)[0], rng.integers(0, n_labels, n), np.arange(n) + 1000


def truth(X, labels, sampled):
    """Similarity to the most similar other row with the same label, and with another."""
    D = X.astype(np.float64)
    S = np.minimum((D @ D.T) / np.sqrt(np.outer((D * D).sum(1), (D * D).sum(1))), 1)
    np.fill_diagonal(S, -1)
    same = labels[:, None] == labels
    own, other = np.where(same, S, -1).max(1), np.where(same, -1, S).max(1)
    return own[sampled], other[sampled]


def compare(X, labels, numbers, sampled, bounds):
    order = sampled[np.argsort(labels[sampled], kind="stable")]
    found = BestNeighbours(LabelledRows(X[order], labels[order], numbers[order]), FLOOR)
    for low, high in pairwise(bounds):
        block = LabelledRows(X[low:high], labels[low:high], numbers[low:high])
        for part in found.slices:
            found.compare(part, block)
    back = np.argsort(np.argsort(labels[sampled], kind="stable"))
    return [scores[back] for scores in found.scores()]


@pytest.mark.parametrize("n_labels", [1, 2, 9, 600])
def test_own_and_other_are_those_of_brute_force(n_labels):
    X, labels, numbers = clustered_rows(n_labels=n_labels)
    sampled = np.random.default_rng(1).permutation(len(X))[:400]
    own, other = compare(X, labels, numbers, sampled, [0, 300, 700])
    for found, expected in zip((own, other), truth(X, labels, sampled), strict=True):
        assert np.allclose(found, np.where(expected >= FLOOR, expected, 0), atol=1e-7)
    assert 0 < np.count_nonzero(own) < len(sampled)
    assert 100 < np.count_nonzero(np.maximum(own, other)) < len(sampled)
    assert other.any() == (n_labels > 1)
    # exact copies score exactly 1, and a row is not its own neighbour
    copied = (sampled < 50) | ((sampled >= 400) & (sampled < 450))
    assert (np.maximum(own, other)[copied] == 1).all()
    assert (np.maximum(own, other)[~copied] < 1).all()


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
    own, other = compare(X, labels, numbers, np.arange(0, 700, 3), [0, 256, 700])
    assert (own == 1).all()
    assert (other == 1).all()


def test_a_similarity_at_the_threshold_counts():
    X = np.zeros((3, 2), np.float32)
    X[0], X[1], X[2] = (1, 0), (0, 1), normalize(np.array([[0.7, np.sqrt(1 - 0.49)]]))[0][0]
    scores = (X[0].astype(np.float64) * X[2]).sum()
    assert np.float32(scores) == FLOOR  # so the case is the one that is meant
    own, _ = compare(X, np.zeros(3, int), np.arange(3), np.array([0]), [0, 3])
    assert own == FLOOR


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
