"""What clustering misses: the most similar row of each sampled row among those compared with it; and intervals.

Two rows of one cluster are compared at level 1. Others are compared at level P if the cluster of one of them is among
the P nearest of the other: their level is the least such P.

As in `similarity`, float32 products only select candidates; values come from the fixed-order float64 product.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from untwin.core.kmeans import NearestCentroid
from untwin.core.similarity import _MASKED, _SLICE_ROWS, _TILE_COLUMNS, _Best, _Rows
from untwin.core.vectors import blocks, float32_below, product_error, rowwise_dot

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Indices = npt.NDArray[np.intp]


class LabelledRows:
    """Unit rows with the cluster and the number of each, in the order of the clusters.

    Args:
        X: (n, D) float32 unit rows.
        labels: (n,) integers, the cluster of each row.
        numbers: (n,) int64; a row has the same number wherever it appears, and no other row has it.
        centroids: Of the clusters; needed for more than one level.
        n_levels: Levels that are told apart.
    """

    def __init__(
        self,
        X: Float32,
        labels: npt.NDArray[np.integer[Any]],
        numbers: Int64,
        centroids: NearestCentroid | None = None,
        n_levels: int = 1,
    ) -> None:
        if (np.diff(labels) < 0).any():
            order = np.argsort(labels, kind="stable")
            X, labels, numbers = X[order], labels[order], numbers[order]
        self.labels = labels
        self.numbers = numbers
        self._rows = _Rows(X, rowwise_dot(X, X), numbers)
        self.n_levels = n_levels
        self._centroids = centroids
        if centroids is not None:
            self._order = np.empty((len(labels), n_levels), np.int32)
            self._ordered = np.zeros(len(labels), np.bool_)

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.labels)

    def places(self, rows: Indices, clusters: npt.NDArray[np.integer[Any]]) -> Int64:
        """Where a cluster comes among those nearest to a row: 0 for the nearest, `n_levels` if not among these many.

        Args:
            rows: (m,) indices.
            clusters: (m,) one for each.

        Returns:
            (m,) int64.
        """
        assert self._centroids is not None
        # threads that ask for the same row at the same time both find the same
        new = np.unique(rows[~self._ordered[rows]])
        for some in blocks(len(new), _SLICE_ROWS):
            self._order[new[some]] = self._centroids.order(self._rows.X[new[some]], self.n_levels)
            self._ordered[new[some]] = True
        found = np.full(len(rows), self.n_levels)
        for place in range(self.n_levels):
            found[self._order[rows, place] == clusters] = place
        return found


class BestNeighbours:
    """The similarity of each sampled row to the most similar other row, by the level at which they are compared.

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
        self._best = [_Best.empty(len(sample)) for _ in range(sample.n_levels + 1)]
        """One for each level, from 1 on, and one for the rows that are compared at none."""

    @property
    def slices(self) -> list[slice]:
        """Parts of the sample that can be compared at the same time, in threads."""
        return list(blocks(len(self._sample), _SLICE_ROWS))

    def compare(self, part: slice, block: LabelledRows) -> None:
        """Take a block of rows into account, for a part of the sample. A sampled row is not its own neighbour."""
        sample, own, other = self._sample._rows[part], self._best[0].part(part), self._best[-1].part(part)
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
            if self._sample.n_levels == 1:
                self._offer(other, products, sample, tile)
            else:
                self._offer_levels(part, products, block, columns)

    def _offer(self, best: _Best, products: Float32, left: _Rows, right: _Rows) -> None:
        # where a copy was found, nothing can be more similar
        floor = np.where(best.value >= 1, np.inf, self._floor)
        best.offer(products, left, right, floor)

    def _offer_levels(self, part: slice, products: Float32, block: LabelledRows, columns: slice) -> None:
        """Take rows of different clusters into account, each pair at its level."""
        left, right = self._sample._rows[part], block._rows[columns]
        error = product_error(left.X.shape[1])
        # what is less similar than a row of the same or a lower level changes nothing
        bars = np.maximum.accumulate([best.value[part] for best in self._best])
        bars = float32_below(np.where(bars >= 1, np.inf, np.maximum(bars, self._floor)) - error)
        i, j = np.divmod(np.flatnonzero(products >= bars[1][:, None]), products.shape[1])
        if not len(i):
            return
        level = np.minimum(
            self._sample.places(part.start + i, block.labels[columns.start + j]),
            block.places(columns.start + j, self._sample.labels[part.start + i]),
        )
        product = products[i, j]
        matters = product >= bars[level, i]
        for here in np.unique(level[matters]).tolist():
            chosen = np.flatnonzero(matters & (level == here))
            first = np.flatnonzero(np.diff(i[chosen], prepend=-1))
            top = np.repeat(np.maximum.reduceat(product[chosen], first), np.diff(first, append=len(chosen)))
            chosen = chosen[product[chosen] >= float32_below(top - 2 * error)]
            self._best[here].part(part).offer_pairs(i[chosen], j[chosen], left, right)

    def scores(self) -> Float32:
        """Similarity of each sampled row to the most similar of the rows that it is compared with.

        Returns:
            (n_levels + 1, n) float32: at level 1, at the levels up to 2, and so on; last, were it compared with all
            rows. 0 for less than the floor.
        """
        scores = np.maximum.accumulate([best.value.astype(np.float32) for best in self._best])
        return np.where(scores >= self._limit, scores, np.float32(0))


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
    return share_bound(hits, n, tail), 1 - share_bound(n - hits, n, tail)


def share_bound(hits: float, n: float, tail: float, steps: int = 60) -> float:
    """The lower end of `share_interval`, with a probability of `tail` below it; numbers need not be whole.

    It is right to 2 ** -steps.
    """
    return 0.0 if hits <= 0 else _beta_quantile(tail, hits, n - hits + 1, steps)


def _beta_quantile(probability: float, a: float, b: float, steps: int) -> float:
    """Where the distribution function of the beta distribution reaches a probability, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(steps):
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
        return 1 - _beta_fraction(1 - x, b, a)
    return _beta_fraction(x, a, b)


def _beta_fraction(x: float, a: float, b: float) -> float:
    """What converges fast for 0 < x <= (a + 1) / (a + b + 2)."""
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
