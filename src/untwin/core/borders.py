"""Pairs across the borders of clusters: which can be within eps, which are, and what they change in a cluster.

For x in cluster A and y in cluster B let hx and hy be their distances to the plane halfway between the two
centroids, each counted towards its own centroid. The way from x to y crosses the plane, so |x - y| >= hx + hy; and
|x - y|^2 = 2 - 2 cos(x, y) for unit vectors. So a pair within eps needs hx + hy <= sqrt(2 eps): all others are
skipped unseen, and nothing is lost.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from untwin.core.similarity import (
    _TILE_COLUMNS,
    CompareTo,
    DistinctRows,
    RankedArray,
    RankedRows,
    _first_copies,
    _pair_cosine,
    _Rows,
    _squares,
)
from untwin.core.vectors import blocks, float32_below, product_error, rowwise_dot

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

_BLOCK_ROWS = 32
"""Rows that share one selection of rows on the other side of a border."""
_SHORT_ERROR = 4e-6
"""More than the rounding of the products of short rows, and of what is left of their squares."""
_SPARSE = 8
"""Times that a product of two rows that are looked up takes longer than one in a matrix product."""
_AHEAD = 64
"""Rows whose neighbours are looked up together."""
_READ_ROWS = 1024
"""Rows that are taken at a time."""


def reach(limit: np.float32, dim: int) -> float:
    """The largest hx + hy, as `plane_distances` gives them, of a pair that can score at least `limit`.

    The additions cover norms that are not exactly 1, and the rounding of the distances.
    """
    return float(np.sqrt(2 * (1 - np.float64(limit)) + 1e-5)) + 8 * product_error(dim)


def plane_distances(X: Float32, own: Float32, others: Float32, which: Int64) -> Float32:
    """Distance of each row to the plane halfway between its centroid and another, positive on the side of its own.

    Args:
        X: (n, D) float32 rows of a cluster.
        own: (D,) float32, the cluster's centroid.
        others: (m, D) float32, centroids that differ from it.
        which: (n,) for each row the place of the other centroid.

    Returns:
        (n,) float32.
    """
    normal, middle = _planes(own, others)
    return _pair_products(X, np.arange(len(X)), normal, which) - middle[which]


def all_plane_distances(X: Float32, own: Float32, others: Float32) -> Float32:
    """`plane_distances` of all rows for all other centroids, (m, n) float32."""
    normal, middle = _planes(own, others)
    products: Float32 = normal @ X.T
    return np.subtract(products, middle[:, None], out=products)


def _planes(own: Float32, others: Float32) -> tuple[Float32, Float32]:
    """Unit normals (m, D) of the planes, and products of the normals with the points halfway (m,)."""
    normal = own.astype(np.float64) - others
    normal /= np.sqrt(rowwise_dot(normal, normal))[:, None]
    middle = rowwise_dot(normal, (own.astype(np.float64) + others) / 2)
    return normal.astype(np.float32), middle.astype(np.float32)


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows with their exact similarity: positions (m,) int64 on both sides, score (m,) float64."""

    left: Int64
    right: Int64
    score: Float64

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self.left)


def principal_axes(X: Float32, count: int) -> Float32:
    """The directions in which some rows differ most: (D, at most `count`) float32, orthonormal columns.

    For (n, D) rows with n < D this is an eigenproblem of size n.
    """
    centred = X.astype(np.float64) - X.mean(axis=0, dtype=np.float64)
    weight, basis = np.linalg.eigh(centred @ centred.T)
    some = weight > 1e-6 * max(1e-6, weight[-1])
    axes = centred.T @ basis[:, some][:, -count:]
    return np.asarray(np.linalg.qr(axes)[0], np.float32)


class UnitRows:
    """Rows of unit length, prepared for comparing.

    Args:
        X: (n, D) float32.
        axes: (D, m) float32, orthonormal; the same for both sides of a border. With p the product of a row with them
            and q the length of what is left of it, cos(x, y) <= p(x).p(y) + q(x) q(y) (Cauchy and Schwarz), so a
            product of m + 1 elements tells of most pairs that they are not within eps. None for no such bound.
    """

    def __init__(self, X: Float32, axes: Float32 | None = None) -> None:
        self._rows = _Rows(X, rowwise_dot(X, X), np.arange(len(X)))
        self._short = None
        if axes is not None:
            self._short = np.empty((len(X), axes.shape[1] + 1), np.float32)
            np.matmul(X, axes, out=self._short[:, :-1])
            left = self._rows.square - np.square(self._short[:, :-1], dtype=np.float64).sum(axis=1)
            # rounding must not make it smaller than it is
            self._short[:, -1] = np.sqrt(np.maximum(left, 0) + _SHORT_ERROR)

    def first_copies(self) -> Int64:
        """For each row, the first that is bit-identical to it; (n,) int64."""
        return _first_copies(RankedArray(self._rows.X), self._rows.square, max(1, len(self._rows)))


def pairs_within(
    x: UnitRows, x_at: Int64, hx: Float64, y: UnitRows, y_at: Int64, hy: Float32, limit: np.float32
) -> tuple[Pairs, int, int]:
    """The pairs of some rows on one side of a border with some on the other that score at least `limit`.

    Args:
        x: Rows on one side.
        x_at: (m,) which of them.
        hx: (m,) their distances to the plane.
        y: Rows on the other side.
        y_at: (k,) which of them.
        hy: (k,) their distances.
        limit: The least score, as by `threshold`.

    Returns:
        The pairs; the number of products that it took; and the number of pairs for which a bound was computed.
    """
    dim = x._rows.X.shape[1]
    far = reach(limit, dim)
    found: list[tuple[Int64, Int64, Float64]] = []
    n_products = n_bounds = 0
    order = np.argsort(hx, kind="stable") if len(hx) > _BLOCK_ROWS else np.arange(len(hx))
    least = float32_below(np.float64(limit) - product_error(dim))
    for part in blocks(len(order), _BLOCK_ROWS):
        some = order[part]
        close = y_at[hy <= far - hx[some].min()]
        left = x._rows[x_at[some]]
        for columns in blocks(len(close), _TILE_COLUMNS):
            tile = close[columns]
            if x._short is not None and y._short is not None:
                bounds = x._short[x_at[some]] @ y._short[tile].T
                n_bounds += bounds.size
                i, j = np.nonzero(bounds >= np.float32(limit - 4 * _SHORT_ERROR))
                used, at = np.unique(j, return_inverse=True)
                right = y._rows[tile[used]]
                n_products += len(i)
                products = _row_products(left.X, i, right.X, at)
                close_by = products >= least
                i, j = i[close_by], at[close_by]
            else:
                right = y._rows[tile]
                products = left.X @ right.X.T
                n_products += products.size
                i, j = np.nonzero(products >= least)
            if len(i):
                score = _pair_cosine(left, i, right, j)
                near = score.astype(np.float32) >= limit
                found.append((left.position[i[near]], right.position[j[near]], score[near]))
    return _joined(found), n_products, n_bounds


def _row_products(X: Float32, i: npt.NDArray[np.intp], Y: Float32, j: npt.NDArray[np.intp]) -> Float32:
    """Products of pairs of rows in float32: all of them as a matrix if that is cheaper."""
    if len(i) * _SPARSE > len(X) * len(Y):
        products: Float32 = X @ Y.T
        return products[i, j]
    return _pair_products(X, i, Y, j)


def _pair_products(X: Float32, i: npt.NDArray[np.integer[Any]], Y: Float32, j: npt.NDArray[np.integer[Any]]) -> Float32:
    out = np.empty(len(i), np.float32)
    for pairs in blocks(len(i), 512):
        np.einsum("nd,nd->n", X.take(i[pairs], axis=0), Y.take(j[pairs], axis=0), out=out[pairs])
    return out


def _joined(found: list[tuple[Int64, Int64, Float64]]) -> Pairs:
    if not found:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64))
    left, right, score = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Pairs(left, right, score)


@dataclass(frozen=True)
class Reopened:
    """What better-ranked rows of other clusters change inside a cluster; positions are ranks.

    Attributes:
        kept: (n,) bool, rows that stay whatever comes out elsewhere.
        open: (n,) bool, rows about which other clusters decide. All others are removed, whatever comes out.
        pairs: Pairs of a row (`left`) with a better-ranked row of the same cluster. Of every row that is in them,
            and of every row that has pairs across a border: its most similar better-ranked row; all open
            better-ranked rows within eps; and, if rows that stay for sure are better ranked and within eps, the most
            similar one. Later copies of a row count as neither open nor staying.
    """

    kept: Bool
    open: Bool
    pairs: Pairs


def reopen(
    rows: RankedRows,
    match: Int64,
    kept_match: Int64,
    removed: Bool,
    outside: Bool,
    *,
    limit: np.float32,
    compare_to: CompareTo,
) -> Reopened:
    """Find out which answers about a cluster hold, and which depend on rows of other clusters.

    Under "kept", in rank order: a row that stays inside its cluster is open if a better-ranked row outside, or an
    open one inside, is within eps, else it stays for sure. A row that is removed is so for sure if a row that stays
    for sure is within eps, else it is open. Under "ranked" nothing is open: a row is removed if any better-ranked
    row is within eps. It can lose its witness.

    Args:
        rows: The unit rows of the cluster in rank order.
        match: (n,) of `Matches`.
        kept_match: (n,) of `Matches`.
        removed: (n,) of `Matches`: whether a row is a duplicate, as far as its own cluster tells.
        outside: (n,) bool, whether a better-ranked row of another cluster is within eps.
        limit: The least score of a duplicate.
        compare_to: As for `match_ranked`.
    """
    return _Reopening(rows, match, kept_match, removed, outside, limit, compare_to).run()


class _Reopening:
    """One call of `reopen`. It works on distinct rows, numbered in rank order; later copies come last.

    A copy of a better-ranked row never stays, and nothing is removed because of it: it only wants a witness.
    """

    def __init__(
        self,
        rows: RankedRows,
        match: Int64,
        kept_match: Int64,
        removed: Bool,
        outside: Bool,
        limit: np.float32,
        compare_to: CompareTo,
    ) -> None:
        self.all, self.match, self.kept_match = rows, match, kept_match
        self.removed, self.outside, self.limit, self.compare_to = removed, outside, limit, compare_to
        self.kept = ~removed if compare_to == "kept" else ~(removed | outside)
        self.open = np.zeros(rows.n, np.bool_)
        self.square = _squares(rows, _READ_ROWS)
        self.first = _first_copies(rows, self.square, _READ_ROWS)
        self.distinct = self.first == np.arange(rows.n)
        self.position = np.flatnonzero(self.distinct)
        self.rows = DistinctRows(rows, self.position)
        self.touched = outside.copy()
        self.found: list[tuple[Int64, Int64, Float64]] = []
        self.near: dict[int, tuple[Int64, Float64]] = {}

    def run(self) -> Reopened:
        if self.compare_to == "kept":
            self._resolve()
        lost = self.removed & (self.kept_match >= 0) & ~self.kept[self.kept_match]
        if self.compare_to == "ranked":
            self._search(np.flatnonzero(lost & self.distinct))
        self.touched |= lost | self.touched[self.first]
        self._search(np.flatnonzero(self.touched & ~self.distinct))
        touched = np.flatnonzero(self.touched)
        base = self.kept_match[touched]
        known = self.removed[touched] & (base >= 0) & self.kept[base]
        left = np.concatenate((touched[touched > 0], touched[known]))
        right = np.concatenate((self.match[touched[touched > 0]], base[known]))
        self.found.append((left, right, self._scores(left, right)))
        return Reopened(self.kept, self.open, _joined(self.found))

    def _sure(self, row: int) -> bool:
        """Whether a row is removed because of a row that stays for sure."""
        return bool(self.removed[row] and self.kept[self.kept_match[row]])

    def _resolve(self) -> None:
        """Under "kept": which distinct rows stay for sure, and which are open."""
        waiting = np.flatnonzero(self.outside & self.kept).tolist()
        queued = np.zeros(self.all.n, np.bool_)
        queued[waiting] = True
        while waiting:
            row = heapq.heappop(waiting)
            if row not in self.near:
                self._look_up([row, *heapq.nsmallest(_AHEAD - 1, waiting)])
            at, score = self.near.pop(row)
            if self.removed[row]:
                self.touched[row] = True
                if self._add_best_kept(np.array([row]), at, score).any():
                    continue
            self.kept[row], self.open[row], self.touched[row] = False, True, True
            worse = at > row
            at, score = at[worse], score[worse]
            self.found.append((at, np.full(len(at), row), score))
            self.touched[at] = True
            # a row that is removed for sure comes back here if the row that it is removed for is opened later
            for other in at[~queued[at]].tolist():
                if not self._sure(other):
                    heapq.heappush(waiting, other)
                    queued[other] = True

    def _search(self, chosen: Int64) -> None:
        """Note, for some removed rows, the open rows within eps and the most similar row that stays for sure."""
        self.touched[chosen] = True
        copies = chosen[np.argsort(self.first[chosen], kind="stable")]
        firsts, begin = np.unique(self.first[copies], return_index=True)
        end = np.append(begin[1:], len(copies))
        for part in blocks(len(firsts), _AHEAD):
            self._look_up(firsts[part].tolist())
            for first, low, high in zip(firsts[part].tolist(), begin[part].tolist(), end[part].tolist(), strict=True):
                at, score = self.near.pop(first)
                where = int(np.searchsorted(at, first))
                at, score = np.insert(at, where, first), np.insert(score, where, 1.0)
                mine = copies[low:high]
                self._add_best_kept(mine, at, score)
                opened = self.open[at]
                i, j = np.nonzero(at[opened] < mine[:, None])
                self.found.append((mine[i], at[opened][j], score[opened][j]))

    def _add_best_kept(self, rows: Int64, at: Int64, score: Float64) -> Bool:
        """Note for each of some equal rows the most similar better-ranked row that stays for sure, if there is one.

        Args:
            rows: Their positions.
            at: Distinct rows within eps of them, ascending.
            score: Their scores.

        Returns:
            For each row, whether there is one.
        """
        stays = self.kept[at]
        at, score = at[stays], score[stays]
        if not len(at):
            return np.zeros(len(rows), np.bool_)
        # ties: the better-ranked, which comes first
        record = np.flatnonzero(np.diff(np.maximum.accumulate(score), prepend=-np.inf) > 0)
        best = np.searchsorted(at[record], rows) - 1
        some = best >= 0
        chosen = record[best[some]]
        self.found.append((rows[some], at[chosen], score[chosen]))
        return some

    def _look_up(self, some: list[int]) -> None:
        """All other distinct rows within eps of some distinct rows, in rank order, and their scores."""
        wanted = np.array([row for row in some if row not in self.near])
        left = self._rows(wanted)
        least = float32_below(np.float64(self.limit) - product_error(self.rows.dim))
        parts: list[tuple[Int64, Int64, Float64]] = []
        for part in blocks(self.rows.n, _READ_ROWS):
            position = self.position[part]
            right = _Rows(self.rows.take(part.start, part.stop), self.square[position], position)
            products = left.X @ right.X.T
            i, j = np.nonzero(products >= least)
            score = _pair_cosine(left, i, right, j)
            near = (score.astype(np.float32) >= self.limit) & (wanted[i] != right.position[j])
            parts.append((i[near], right.position[j[near]], score[near]))
        found = _joined(parts)
        order = np.argsort(found.left, kind="stable")
        at, score = found.right[order], found.score[order]
        bounds = np.searchsorted(found.left[order], np.arange(len(wanted) + 1))
        for index, row in enumerate(wanted.tolist()):
            own = slice(bounds[index], bounds[index + 1])
            self.near[row] = (at[own], score[own])

    def _rows(self, positions: Int64) -> _Rows:
        X = np.concatenate([self.all.take(row, row + 1) for row in positions.tolist()])
        return _Rows(X, self.square[positions], positions)

    def _scores(self, left: Int64, right: Int64) -> Float64:
        """Exact scores of pairs of rows."""
        out = np.empty(len(left), np.float64)
        for part in blocks(len(left), _READ_ROWS):
            a, b = self._rows(left[part]), self._rows(right[part])
            at = np.arange(len(a))
            out[part] = _pair_cosine(a, at, b, at)
        return out
