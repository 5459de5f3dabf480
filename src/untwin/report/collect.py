"""Counts and choices behind the report: NumPy arrays in, small things out. No files, no Arrow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from untwin.core import EPS_GRID, threshold

LAST_EPS = 0.3
"""The slider ends here, or at the eps in force if that is larger."""
_BINS = 150
_FINE_BINS = 1 << 16
_NEAR = 10
"""Intervals on each side of the eps in force that show more pairs, and how many times more."""
_NEAR_WEIGHT = 4


def slider_steps(eps: float | None, probes: int) -> tuple[float, ...]:
    """The values of eps of the slider, ascending.

    Args:
        eps: Threshold in force, if any.
        probes: Clusters that each row was compared with. With more than one the steps end at the eps in force: beyond
            it rows of different clusters were not compared.
    """
    steps = {*EPS_GRID, *(k / 1000 for k in range(1, round(LAST_EPS * 1000) + 1))}
    if eps is not None:
        steps.add(eps)
    return tuple(sorted(step for step in steps if probes == 1 or eps is None or step <= eps))


class ScoreCounts:
    """Rows and pairs by score, batch by batch.

    A row's code is twice its step, and one more if it was removed; its step is the first one at which it is a
    duplicate, or the number of steps.

    Args:
        steps: Values of eps, ascending.

    Attributes:
        table: Rows by step and by whether they were removed, (steps + 1, 2) int64.
        edges: Edges of the histogram, ascending; (bins + 1,) float64.
        bins: Rows in each bin, whose lower edge belongs to it; compared as float32, like a threshold.
        n_below: Rows below the first edge.
    """

    def __init__(self, steps: Sequence[float]) -> None:
        self._limits = np.array([threshold(eps) for eps in steps], np.float32)
        self.n_steps = len(steps)
        self.table = np.zeros((len(steps) + 1, 2), np.int64)
        self.edges = np.linspace(1 - steps[-1], 1, _BINS + 1).round(9)
        self._float_edges = self.edges.astype(np.float32)
        self.bins = np.zeros(_BINS, np.int64)
        self.n_below = 0
        self._fine = np.zeros(_FINE_BINS + 1, np.int64)

    def steps_of(self, score: NDArray[np.float32]) -> NDArray[np.int64]:
        """The first step at which each score is that of a duplicate, (n,); the number of steps if none is."""
        return np.asarray(np.searchsorted(-self._limits, -score, side="left"), np.int64)

    def add(self, score: NDArray[np.float32], removed: NDArray[np.bool_]) -> NDArray[np.uint16]:
        """Count rows by `cosine_sim_score`, (n,); returns their codes, (n,)."""
        codes = 2 * self.steps_of(score) + removed
        self.table += self.by_code(codes)
        place = np.searchsorted(self._float_edges, score, side="right") - 1
        inside = np.minimum(place[place >= 0], _BINS - 1)
        self.bins += np.bincount(inside, minlength=_BINS)
        self.n_below += len(score) - len(inside)
        return codes.astype(np.uint16)

    def by_code(self, codes: NDArray[np.integer], weights: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Number of rows of each code, or the sum of whole weights below 2^53, in the shape of `table`."""
        sums = np.bincount(codes, weights, minlength=2 * self.n_steps + 2)
        return sums.astype(np.int64).reshape(-1, 2)

    def add_pairs(self, score: NDArray[np.float32]) -> None:
        """Count pairs by their score, (n,)."""
        self._fine += np.bincount(self._fine_bin(score), minlength=_FINE_BINS + 1)

    def pairs_at_least(self, score: NDArray[np.float32]) -> NDArray[np.int64]:
        """Pairs with at least these scores, (n,); all pairs count that are in a score's bin, a 65,536th wide."""
        return np.asarray(np.cumsum(self._fine[::-1])[::-1][self._fine_bin(score)])

    @staticmethod
    def _fine_bin(score: NDArray[np.float32]) -> NDArray[np.int64]:
        return np.clip(score.astype(np.float64) * _FINE_BINS, 0, _FINE_BINS).astype(np.int64)


def per_step(table: NDArray[np.int64], force: int | None) -> NDArray[np.int64]:
    """What each step counts, from a table by code as `ScoreCounts` has it.

    Args:
        table: (steps + 1, 2).
        force: Number of the step in force: there it is what was removed.
    """
    sums: NDArray[np.int64] = table.sum(axis=1).cumsum()[:-1]
    if force is not None:
        sums[force] = table[:, 1].sum()
    return sums


class SmallestHashes:
    """In each interval the pairs with the smallest hashes: a choice that no order of rows or files changes.

    Args:
        n_intervals: Number of intervals.
        most: Pairs of each.
    """

    def __init__(self, n_intervals: int, most: int) -> None:
        self._most = most
        # the largest hash that can still be among the smallest of an interval
        self._bars = np.full(n_intervals, np.iinfo(np.uint64).max, np.uint64)

    def candidates(self, interval: NDArray[np.int64], hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Positions of the pairs that may be chosen; by interval, and in it by hash."""
        low = np.flatnonzero(hashes <= self._bars[interval])
        low = low[np.lexsort((hashes[low], interval[low]))]
        intervals = interval[low]
        return low[np.arange(len(low)) - np.searchsorted(intervals, intervals, side="left") < self._most]

    def prune(self, interval: NDArray[np.int64], hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Positions of those pairs that are chosen, if these are all candidates so far; later ones must beat them."""
        kept = self.candidates(interval, hashes)
        found, first, counts = np.unique(interval[kept], return_index=True, return_counts=True)
        full = counts == self._most
        self._bars[found[full]] = hashes[kept[(first + counts - 1)[full]]]
        return kept


def allot(available: NDArray[np.int64], force: int | None, total: int) -> NDArray[np.int64]:
    """How many pairs to show of each interval: evenly many, and more around the step in force.

    Args:
        available: Pairs of each interval, (n,); interval k has the scores from step k up to step k - 1.
        force: Number of the step in force.
        total: Of all pairs shown.
    """
    weight = np.ones(len(available), np.int64)
    if force is not None:
        weight[max(0, force + 1 - _NEAR) : force + 1 + _NEAR] = _NEAR_WEIGHT
    quota = np.zeros(len(available), np.int64)
    while (more := np.minimum(available, quota + weight)).sum() <= total and (more > quota).any():
        quota = more
    while (left := total - int(quota.sum())) > 0 and len(room := np.flatnonzero(quota < available)):
        quota[room[np.linspace(0, len(room) - 1, min(left, len(room))).astype(np.int64)]] += 1
    return quota


def spread_sample(values: NDArray[np.int64], most: int) -> tuple[int, ...]:
    """Values in descending order; of more than `most` a sample at even distances with the largest and the smallest."""
    ordered = np.sort(values)[::-1]
    if len(ordered) > most:
        ordered = ordered[np.linspace(0, len(ordered) - 1, most).astype(np.int64)]
    return tuple(ordered.tolist())
