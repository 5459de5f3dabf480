"""The report's counts and choices: against NumPy over everything at once."""

import numpy as np
import pytest

from untwin.core import EPS_GRID, hash_integers, is_duplicate
from untwin.report.collect import ScoreCounts, SmallestHashes, allot, per_step, slider_steps, spread_sample


def some_scores(n=20_000, seed=0):
    """Scores all over, many of them on a threshold or its neighbours."""
    rng = np.random.default_rng(seed)
    score = rng.uniform(-0.1, 1, n).astype(np.float32)
    border = np.float32(1 - rng.integers(0, 320, n // 4) / 1000)
    score[: len(border)] = np.nextafter(border, np.float32(rng.choice([0, 2])))
    score[len(border) : 2 * len(border)] = border
    return np.minimum(score, np.float32(1))


def test_the_slider_has_the_grid_each_thousandth_and_the_eps_in_force():
    steps = slider_steps(0.0415, 1)
    assert set(EPS_GRID) < set(steps)
    assert {0.0415, 0.001, 0.3} < set(steps)
    assert len(steps) == 301
    assert list(steps) == sorted(steps)
    assert slider_steps(0.05, 1) == slider_steps(None, 1)
    assert slider_steps(0.4, 1)[-2:] == (0.3, 0.4)


def test_with_probes_the_slider_ends_at_the_eps_in_force():
    assert slider_steps(0.0415, 4) == (*(k / 1000 for k in range(1, 42)), 0.0415)
    assert slider_steps(0.0005, 2) == (0.0005,)


@pytest.mark.parametrize("eps", [None, 0.05, 0.4, 0.0000001])
def test_each_step_counts_the_scores_that_are_duplicates_there(eps):
    steps = slider_steps(eps, 1)
    score = some_scores()
    removed = is_duplicate(score, eps) & (np.arange(len(score)) % 3 > 0) if eps else np.zeros(len(score), bool)
    counts = ScoreCounts(steps)
    codes = np.concatenate([counts.add(score[part], removed[part]) for part in (slice(0, 7), slice(7, None))])
    force = None if eps is None else steps.index(eps)
    expected = [int(is_duplicate(score, step).sum()) for step in steps]
    weights = np.arange(len(score))
    sums = [int(weights[is_duplicate(score, step)].sum()) for step in steps]
    if eps is not None:
        expected[force], sums[force] = int(removed.sum()), int(weights[removed].sum())
    assert per_step(counts.table, force).tolist() == expected
    assert per_step(counts.by_code(codes, weights), force).tolist() == sums


def test_the_histogram_has_each_score_once_and_thresholds_are_edges():
    score = some_scores()
    counts = ScoreCounts(slider_steps(None, 1))
    counts.add(score, np.zeros(len(score), bool))
    assert counts.edges[[0, 125, 150]] == pytest.approx([0.7, 0.95, 1])
    assert counts.bins.sum() + counts.n_below == len(score)
    for number in (0, 50, 125, 149):
        assert counts.bins[number:].sum() == is_duplicate(score, 1 - counts.edges[number]).sum()


def test_pairs_at_least_as_similar_are_counted_up_to_a_65536th():
    score = np.abs(some_scores()[::4])
    counts = ScoreCounts(slider_steps(None, 1))
    counts.add_pairs(score[:100])
    counts.add_pairs(score[100:])
    found = counts.pairs_at_least(score)
    exact = np.array([(score >= one).sum() for one in score])
    nearly = np.array([(score >= float(one) - 1 / 65536).sum() for one in score.astype(float)])
    assert (exact <= found).all()
    assert (found <= nearly).all()
    assert found.max() == len(score)


@pytest.mark.parametrize("batch", [1, 10, 1000])
def test_the_smallest_hashes_are_found_whatever_the_batches_and_their_order(batch):
    rng = np.random.default_rng(1)
    interval, hashes = rng.integers(0, 7, 3000) ** 2 % 6, hash_integers(np.arange(3000), 5)
    expected = {
        int(one) for k in range(6) for one in np.sort(hashes[interval == k])[:20]
    }  # fewer where there are no more
    order = rng.permutation(3000)
    sample = SmallestHashes(6, 20)
    pool = np.empty(0, np.int64)
    for low in range(0, 3000, batch):
        part = order[low : low + batch]
        pool = np.concatenate((pool, part[sample.candidates(interval[part], hashes[part])]))
        if len(pool) > 200:
            pool = pool[sample.prune(interval[pool], hashes[pool])]
    pool = pool[sample.prune(interval[pool], hashes[pool])]
    assert {int(one) for one in hashes[pool]} == expected
    assert (np.diff(interval[pool]) >= 0).all()


@pytest.mark.parametrize("total", [3, 40, 400])
@pytest.mark.parametrize("force", [None, 0, 50, 299])
def test_pairs_are_spread_over_the_intervals_and_more_are_around_the_threshold(total, force):
    available = np.random.default_rng(2).integers(0, 60, 300) * (np.arange(300) % 7 > 0)
    quota = allot(available, force, total)
    assert quota.sum() == total
    assert (quota <= available).all()
    if total == 400:
        assert (quota[available > 0] > 0).all()
        if force == 50:
            near = slice(force - 9, force + 11)
            assert quota[near].mean() > 2.5 * np.delete(quota, np.r_[near]).mean()
    else:
        # far apart, not one beside the other
        assert np.flatnonzero(quota)[-1] - np.flatnonzero(quota)[0] > 200 or (force is not None and total == 40)


def test_all_pairs_are_shown_where_they_are_few():
    available = np.array([0, 3, 0, 1])
    assert allot(available, 1, 400).tolist() == [0, 3, 0, 1]
    assert allot(np.zeros(4, np.int64), None, 400).tolist() == [0, 0, 0, 0]


def test_a_sample_of_many_sizes_has_the_largest_and_the_smallest():
    sizes = np.random.default_rng(3).permutation(9000)
    sample = spread_sample(sizes, 500)
    assert (len(sample), sample[0], sample[-1]) == (500, 8999, 0)
    assert list(sample) == sorted(sample, reverse=True)
    assert spread_sample(sizes[:5], 500) == tuple(sorted(sizes[:5].tolist(), reverse=True))
