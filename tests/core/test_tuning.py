"""Precision and recall from labels: the fit against brute force, the intervals against runs whose truth is known."""

import time

import numpy as np
import pytest

from labels import CURVES, EPS, drawn, world
from untwin.core.tuning import estimate, isotonic


def brute_isotonic(values, weights):
    """The min-max formula: at each place the largest, over beginnings, of the least mean over ends."""
    n = len(values)
    means = [
        [np.average(values[a : b + 1], weights=weights[a : b + 1]) if b >= a else np.inf for b in range(n)]
        for a in range(n)
    ]
    return [max(min(means[a][b] for b in range(i, n)) for a in range(i + 1)) for i in range(n)]


def test_the_fit_is_the_best_curve_that_never_falls():
    rng = np.random.default_rng(0)
    values, weights = rng.random((40, 12)).round(1), rng.integers(1, 4, (40, 12)).astype(float)
    fitted = isotonic(values * weights, weights)
    for row, some, w in zip(fitted, values, weights, strict=True):
        assert row == pytest.approx(brute_isotonic(some, w))
        assert (np.diff(row) >= 0).all()


def test_places_without_weight_lie_between_their_neighbours():
    rng = np.random.default_rng(1)
    values, weights = rng.random((30, 10)), rng.integers(0, 2, (30, 10)).astype(float)
    weights[:, rng.integers(10)] = 1
    for row, some, w in zip(isotonic(values * weights, weights), values, weights, strict=True):
        there = np.flatnonzero(w)
        assert row[there] == pytest.approx(brute_isotonic(some[there], w[there]))
        for place in np.flatnonzero(w == 0):
            beside = [row[there[there < place][-1:]], row[there[there > place][:1]]]
            assert row[place] == pytest.approx(np.concatenate(beside).mean())


def test_weights_come_from_the_pairs_between_labelled_scores():
    # 10 pairs at or above 0.99, 100 at or above 0.95, and so on; of the labels the upper two are same
    found = estimate(
        np.array([0.8, 0.9, 0.95, 0.99]),
        np.array([False, False, True, True]),
        np.array([1000.0, 300, 100, 10]),
        np.array([0.99, 0.95, 0.9, 0.85, 0.8]),
        n_replicates=50,
    )
    # between 0.9 and 0.95 the 200 pairs are same with 0 to 1, a half on average; half of the 700 lie above 0.85
    assert found.pairs == pytest.approx([10, 100, 300, 650, 1000])
    assert found.precision == pytest.approx([1, 1, 200 / 300, 200 / 650, 200 / 1000])
    assert found.recall == pytest.approx([10 / 200, 100 / 200, 1, 1, 1])
    assert found.labelled.tolist() == [1, 2, 3, 3, 4]


def test_equal_labels_never_give_certainty():
    scores, thresholds = np.linspace(0.7, 1, 31), np.array([0.75, 0.85, 0.95])
    at_least = np.arange(31, 0, -1.0) ** 3
    for same in (scores >= 0.9, scores > 0.99, scores < 2, scores > 2):
        found = estimate(scores, same, at_least, thresholds, n_replicates=200)
        assert (found.precision_high - found.precision_low > 0.05).all()
        assert (found.precision_low <= found.precision).all()
        assert (found.precision <= found.precision_high).all()
        known = ~np.isnan(found.recall)
        assert known.all() == same.any()
        assert (found.recall_low[known] <= found.recall[known]).all()
        assert (found.recall[known] <= found.recall_high[known]).all()
    few, many = (
        estimate(scores[::step], scores[::step] < 2, at_least[::step], thresholds, n_replicates=200) for step in (3, 1)
    )
    assert (few.precision_low < many.precision_low).all()


def test_the_same_labels_give_the_same_in_any_order():
    rng = np.random.default_rng(2)
    scores, same, at_least = drawn(world("logistic", rng), 40, rng)
    order = rng.permutation(len(scores))
    thresholds = np.array([0.75, 0.8, 0.9])
    one = estimate(scores, same, at_least, thresholds, n_replicates=300)
    again = estimate(scores, same, at_least, thresholds, n_replicates=300)
    other = estimate(scores[order], same[order], at_least[order], thresholds, n_replicates=300)
    assert (one.precision_low == again.precision_low).all()
    assert (one.recall_high == again.recall_high).all()
    assert (one.precision == other.precision).all()
    assert (one.precision_low == other.precision_low).all()


def test_500_labels_take_less_than_a_second():
    rng = np.random.default_rng(3)
    scores, same, at_least = drawn(world("gentle", rng), 500, rng)
    seconds = []
    for _ in range(2):
        start = time.thread_time()
        estimate(scores, same, at_least, 1 - np.arange(5, 290, 5) / 1000)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 1


def simulate(known, rng, n_sims, n_replicates):
    """For each eps: mean error of precision, of recall and of the precision without weights, and shares covered."""
    rows = []
    for number in range(n_sims):
        scores, same, at_least = drawn(known, 50, rng)
        eps = np.array([value for value in EPS if scores.min() <= 1 - value <= scores.max()])
        assert len(eps) == len(EPS)
        found = estimate(scores, same, at_least, 1 - eps, n_replicates=n_replicates, seed=number)
        precision, recall = known.truth(eps, scores.min())
        naive = np.array([same[scores >= 1 - value].mean() for value in eps])
        covered = (found.precision_low <= precision) & (precision <= found.precision_high)
        # down to the least labelled score: between that and the next one P(same) is not known to the last pair
        recalled = (found.recall_low <= recall + 1e-9) & (recall <= found.recall_high + 1e-9)
        rows.append((found.precision - precision, found.recall - recall, naive - precision, covered, recalled))
    return np.mean(rows, axis=0)


def check(known, rng, n_sims, slack, lean, n_replicates):
    error, _, naive, covered, recalled = simulate(known, rng, n_sims, n_replicates)
    assert covered.min() >= 0.9 - slack, covered
    assert recalled.min() >= 0.9 - slack, recalled
    # an isotonic fit is too sure of itself at its ends, so that precision leans upwards
    assert np.abs(error).mean() <= lean, error
    return np.abs(error).max(), np.abs(naive).max()


@pytest.mark.parametrize("curve", ["logistic", "a step"])
def test_intervals_cover_the_truth_and_weights_matter(curve):
    rng = np.random.default_rng(4)
    error, naive = check(world(curve, rng), rng, 40, 0.05, 0.05, n_replicates=300)
    assert error < 0.06
    assert naive > 0.15
    assert naive > 3 * error


@pytest.mark.slow
@pytest.mark.parametrize("curve", CURVES)
def test_intervals_cover_the_truth_in_200_simulations(curve):
    rng = np.random.default_rng(5)
    check(world(curve, rng), rng, 200, 0, 0.06, n_replicates=500)


@pytest.mark.slow
@pytest.mark.parametrize("curve", [curve for curve in CURVES if curve != "mostly different"])
def test_intervals_cover_the_truth_where_half_of_the_pairs_are_almost_copies(curve):
    # one or two labels stand for all of these; if most of them were different after all, recall would be covered less
    rng = np.random.default_rng(5)
    check(world(curve, rng, copies=0.5), rng, 200, 0.02, 0.1, n_replicates=500)
