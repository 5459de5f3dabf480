"""What clustering misses: the most similar row of each sampled row, inside its cluster and outside; and intervals.

As in `similarity`, float32 products only select candidates; values come from the fixed-order float64 product.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from untwin.core.similarity import _MASKED, _SLICE_ROWS, _TILE_COLUMNS, _Best, _Rows
from untwin.core.vectors import blocks, rowwise_dot

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


class LabelledRows:
    """Unit rows with the cluster and the number of each, in the order of the clusters.

    Args:
        X: (n, D) float32 unit rows.
        labels: (n,) integers, the cluster of each row.
        numbers: (n,) int64; a row has the same number wherever it appears, and no other row has it.
    """

    def __init__(self, X: Float32, labels: npt.NDArray[np.integer[Any]], numbers: Int64) -> None:
        if (np.diff(labels) < 0).any():
            order = np.argsort(labels, kind="stable")
            X, labels, numbers = X[order], labels[order], numbers[order]
        self.labels = labels
        self.numbers = numbers
        self._rows = _Rows(X, rowwise_dot(X, X), numbers)

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.labels)


class BestNeighbours:
    """The similarity of each sampled row to the most similar other row, in its own cluster and in all others.

    The other rows come in blocks, in any order and cut in any way: the result has the same bits.

    Args:
        sample: The sampled rows.
        floor: The least similarity that matters; what is less counts as nothing.
    """

    def __init__(self, sample: LabelledRows, floor: np.float32) -> None:
        self._sample = sample
        self._limit = floor
        # a value just below can still round to the float32 floor
        self._floor = float(np.nextafter(floor, np.float32(0)))
        self._own = _Best.empty(len(sample))
        self._other = _Best.empty(len(sample))

    @property
    def slices(self) -> list[slice]:
        """Parts of the sample that can be compared at the same time, in threads."""
        return list(blocks(len(self._sample), _SLICE_ROWS))

    def compare(self, part: slice, block: LabelledRows) -> None:
        """Take a block of rows into account, for a part of the sample. A sampled row is not its own neighbour."""
        sample, own, other = self._sample._rows[part], self._own.part(part), self._other.part(part)
        labels = self._sample.labels[part]
        for columns in blocks(len(block), _TILE_COLUMNS):
            tile, tile_labels = block._rows[columns], block.labels[columns]
            products = sample.X @ tile.X.T
            for label in np.intersect1d(labels, tile_labels).tolist():
                rows, inside = _run_of(labels, label), _run_of(tile_labels, label)
                square = products[rows, inside]
                square[sample.position[rows, None] == tile.position[inside]] = _MASKED
                self._offer(own.part(rows), square, sample[rows], tile[inside])
                square[:] = _MASKED
            self._offer(other, products, sample, tile)

    def _offer(self, best: _Best, products: Float32, left: _Rows, right: _Rows) -> None:
        # where a copy was found, nothing can be more similar
        floor = np.where(best.value >= 1, np.inf, self._floor)
        best.offer(products, left, right, floor)

    def scores(self) -> tuple[Float32, Float32]:
        """Largest similarity in the own cluster and in the others: (n,) float32 each, 0 for less than the floor."""
        own, other = (best.value.astype(np.float32) for best in (self._own, self._other))
        return np.where(own >= self._limit, own, np.float32(0)), np.where(other >= self._limit, other, np.float32(0))


def _run_of(labels: npt.NDArray[Any], label: int) -> slice:
    low, high = np.searchsorted(labels, [label, label + 1])
    return slice(int(low), int(high))


def share_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a share that was found as `hits` of `n`, exact for the binomial; (0, 1) for n = 0.

    It covers the true share with at least this confidence, also where the share is next to 0 or 1, as recall is;
    approximate intervals do not there. Clopper & Pearson, "The use of confidence or fiducial limits illustrated in
    the case of the binomial", Biometrika 26(4), 1934.
    """
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else _beta_quantile(tail, hits, n - hits + 1)
    high = 1.0 if hits == n else _beta_quantile(1 - tail, hits + 1, n - hits)
    return low, high


def _beta_quantile(probability: float, a: float, b: float) -> float:
    """Where the distribution function of the beta distribution reaches a probability, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _beta_cdf(middle, a, b) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function, by its continued fraction (DLMF 8.17.22) with Lentz's method."""
    if not 0 < x < 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_cdf(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = fraction
        for term in (even, odd):
            d = 1 / (1 + term * d)
            c = 1 + term / c
            fraction *= c * d
        if abs(fraction - before) <= 1e-14 * abs(fraction):
            break
    return math.exp(log_front) * fraction / a
