"""For a cluster's ranked rows: the most similar better-ranked row of each, and which are duplicates.

Matrix products in float32 find the few pairs that can matter; every value and every decision comes from the
fixed-order float64 product of `untwin.core.vectors`, so the answer has the same bits for any batch size,
thread count or BLAS.
"""

from __future__ import annotations

import numbers
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from untwin.core.hashing import hash_rows
from untwin.core.vectors import DENSE, blocks, float32_below, pair_dot, product_error, rowwise_dot
from untwin.errors import ParameterError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]
CompareTo = Literal["kept", "ranked"]

EPS_GRID: tuple[float, ...] = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1),
    *(0.13, 0.16, 0.2, 0.25, 0.3),
)
"""The values of eps for which counts are reported."""

_STRIP_ROWS = 768
"""Rows that are judged together, and rows of one matrix product: fewer make it slower."""
_SLICE_ROWS = 256
"""As `_STRIP_ROWS` where threads share the rows, and the side of the squares on the diagonal."""
_TILE_COLUMNS = 1024
"""Columns of one matrix product."""
_READ_BYTES = 16 << 20
"""Bytes of rows that are asked from a store at a time, about."""
_BLOCK_ROWS = 8192
_BLOCK_COLUMNS = 4096
"""Most rows of a block that is compared elsewhere, and the better-ranked rows that it has at least."""
_BLOCKS = 128
"""Blocks into which what is left of a strip would be cut, were they all as large as the next one."""
_CLOSE = 0.95
"""Least squared length of the mean of rows that are close to each other: it is their mean similarity."""
_FINE = 4
"""By how much smaller blocks are in both directions that all others wait for."""
_NOTHING = -2.0
"""Less than any cosine: no match yet."""
_MASKED = np.float32(-4.0)
"""Less than `_NOTHING` less 1, by more than any error bound: an entry that must not match."""


class RankedRows(Protocol):
    """The unit rows of one cluster in rank order, best first; may be larger than memory."""

    @property
    def n(self) -> int:
        """Number of rows."""

    @property
    def dim(self) -> int:
        """Elements per row."""

    def take(self, lo: int, hi: int) -> Float32:
        """Rows of rank `lo` to `hi - 1`: (hi - lo, D) float32, C-contiguous."""


class RankedArray:
    """`RankedRows` in memory: (n, D) float32 unit rows, and optionally the order that ranks them."""

    def __init__(self, X: Float32, order: npt.NDArray[np.integer[Any]] | None = None) -> None:
        self._X = np.ascontiguousarray(X, dtype=np.float32)
        self._order = order

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self._X) if self._order is None else len(self._order)

    @property
    def dim(self) -> int:
        """Elements per row."""
        return int(self._X.shape[1])

    def take(self, lo: int, hi: int) -> Float32:
        """Rows of rank `lo` to `hi - 1`: (hi - lo, D) float32, C-contiguous."""
        return self._X[lo:hi] if self._order is None else self.gather(np.arange(lo, hi))

    def gather(self, positions: Int64) -> Float32:
        """Rows of any ranks: (m, D) float32, C-contiguous."""
        return self._X.take(positions if self._order is None else self._order[positions], axis=0)


class DistinctRows:
    """`RankedRows` without later copies of a row; `positions` are those of the others."""

    def __init__(self, rows: RankedRows, positions: Int64) -> None:
        self._rows, self._positions = rows, positions
        self.n, self.dim = len(positions), rows.dim

    def take(self, lo: int, hi: int) -> Float32:
        """Rows `lo` to `hi - 1` of those that are left: (hi - lo, D) float32, C-contiguous."""
        return _gather(self._rows, self._positions[lo:hi])


ExecutorMap = Callable[[Callable[[Any], Any], Sequence[Any]], Any]
"""Like `map` or `ThreadPoolExecutor.map`."""


@dataclass(frozen=True)
class Block:
    """Pairs that are compared elsewhere: rows `low` to `high - 1` with the better-ranked `start` to `stop - 1`.

    Attributes:
    ----------
    removed
        Bits (`numpy.packbits`), which of the better-ranked rows are removed; None without eps.

    """

    low: int
    high: int
    start: int
    stop: int
    removed: npt.NDArray[np.uint8] | None


@dataclass(frozen=True)
class Between:
    """Rows whose copies want to know of the rows between, among `start` to `stop - 1`; compared elsewhere, too.

    Attributes:
    ----------
    X
        (m, D) float32, the rows.
    row, until
        (m,) int64, their numbers, and those of the first rows after their last copies.
    least
        (m,) float32, the least product that matters.
    removed
        As in `Block`.

    """

    X: Float32
    row: Int64
    until: Int64
    least: Float32
    start: int
    stop: int
    removed: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Found:
    """Similar rows of a block: pairs of one of its rows and one of the others; all arrays are (m,).

    Attributes:
    ----------
    row, other
        int32, both rows, counted from the first of the block's.
    value
        float64, their exact similarity.

    """

    row: npt.NDArray[np.int32]
    other: npt.NDArray[np.int32]
    value: Float64


BlockMap = Callable[[Sequence[Block | Between]], Generator[tuple[Found, Found], None, None]]
"""Has blocks compared: the answers of `match_block`, in order."""
Elsewhere = Callable[[RankedRows], BlockMap]
"""Puts rows where others can read them, by the numbers that they have here, and returns what has them compared."""


@dataclass(frozen=True)
class Matches:
    """What `match_ranked` found; all arrays are (n,) in rank order, and positions are ranks.

    Attributes:
    ----------
    score
        float32, similarity to the most similar better-ranked row, at most 1; 0 for the first row.
    match
        int64, position of that row (ties: the better-ranked); its own position, 0, for the first row.
    kept_score
        float32, similarity to the witness, NaN where there is none; None without eps.
    kept_match
        int64, position of the witness, -1 where there is none; None without eps.
    duplicate
        bool, whether the row is removed; None without eps.

    """

    score: Float32
    match: Int64
    kept_score: Float32 | None
    kept_match: Int64 | None
    duplicate: Bool | None


def threshold(eps: float) -> np.float32:
    """Return the least score of a duplicate, `float32(1 - eps)`; eps in (0, 1), else `ParameterError`."""
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real) or not 0 < eps < 1:
        raise ParameterError(f"eps is {eps!r}; it must be a number greater than 0 and less than 1")
    return np.float32(1 - eps)


def is_duplicate(score: npt.ArrayLike, eps: float) -> Bool:
    """Whether `float32(score) >= float32(1 - eps)`: the one comparison used everywhere; NaN: no."""
    return np.asarray(np.asarray(score).astype(np.float32) >= threshold(eps))


def score_counts(score: Float32, grid: Sequence[float] = EPS_GRID) -> Int64:
    """Count the (n,) scores that are duplicates at each eps of `grid`; int64. First rows never are."""
    ordered = np.sort(score[~np.isnan(score)].astype(np.float32))
    return len(ordered) - np.searchsorted(ordered, np.array([threshold(eps) for eps in grid], np.float32))


def match_ranked(
    rows: RankedRows,
    *,
    eps: float | None,
    compare_to: CompareTo = "kept",
    batch_size: int = 1024,
    executor_map: ExecutorMap | None = None,
    elsewhere: Elsewhere | None = None,
) -> Matches:
    """Find each row's most similar better-ranked row and, given eps, the duplicates and their witnesses.

    The similarity of two rows is d(x, y) / sqrt(d(x, x) d(y, y)), at most 1, with the fixed-order float64 dot
    product d.

    - `compare_to="ranked"`: a row is a duplicate if any better-ranked row is within eps, be that row removed
      or not.
    - `compare_to="kept"`: rows are resolved in rank order; a row is a duplicate if a *kept* better-ranked row
      is within eps.

    The witness of a duplicate is its most similar kept better-ranked row (ties: the better-ranked), if within
    eps.

    Bit-identical rows are collapsed before the products. Let y be a later copy of x, the first. All
    similarities of y are those of x, and d(x, y) gives exactly 1, the largest score there is. So

    - match(y): if x itself scores exactly 1 (a different row can, when it differs by less than float64
      resolves), its match is the best-ranked of all rows that score 1 with y; else no row better than x does,
      and it is x.
    - y is always a duplicate. If x is kept, no kept row better than x is within eps of it, hence none scores
      1 with y, and the witness is x.
    - If x is removed, every kept row that x was compared to counts for y in the same way; in addition the
      kept rows between x and y. Under "ranked" such a row v is not within eps of x (v would be removed),
      hence not of y: same witness. Under "kept" it can be, and can be more similar than x's witness: these
      are looked up at the end.

    Parameters
    ----------
    rows
        Unit rows, as `normalize` makes them, in rank order. Those of a `RankedArray` are copied once, in that
        order; others are taken batch by batch, and all better-ranked ones again for each batch.
    eps
        In (0, 1); None if only score and match are wanted.
    compare_to
        See above.
    batch_size
        Rows that are judged at a time: with larger batches, rows that are not in memory are read less often. Not
        a bit of the result depends on it.
    executor_map
        Map-like callable. If given, the products of a batch run in it, 256 rows each; for giant clusters.
    elsewhere
        If given, rows of different batches are compared by others, in blocks; only what is in a batch is left here.

    Raises:
    ------
    ParameterError
        If a parameter makes no sense, or rows are not of unit length.

    """
    if compare_to not in ("kept", "ranked"):
        raise ParameterError(f"compare_to must be 'kept' or 'ranked', not {compare_to!r}")
    if batch_size < 1:
        raise ParameterError(f"pairwise_batch_size must be at least 1, not {batch_size}")
    return _Resolver(rows, eps, compare_to, batch_size, executor_map, elsewhere).run()


def match_block(
    block: Block | Between, rows: RankedRows, tiles: Iterable[Float32], eps: float | None
) -> tuple[Found, Found]:
    """Compare the rows of a block: what `match_ranked` has done elsewhere.

    Parameters
    ----------
    block
        Which rows.
    rows
        All rows.
    tiles
        Those numbered `start` to `stop - 1` in order, some at a time: (m, D) float32.
    eps
        That of `match_ranked`.

    Returns:
    -------
    Of a `Block`, for each row the most similar better-ranked row; and for each that may have a kept one within eps, the
    most similar of these. Ties go to the better-ranked.

    Of a `Between`, nothing, and for each row those kept ones between it and its last copy that may matter.

    """
    stays = np.ones(block.stop - block.start, np.bool_)
    if block.removed is not None:
        stays = np.unpackbits(block.removed, count=len(stays)) == 0
    if isinstance(block, Between):
        return _Best.empty(0).found(), _find_between(block, tiles, stays)
    X = rows.take(block.low, block.high)
    bounds = _bounds(eps, rows.dim)
    batch = _Rows(X, rowwise_dot(X, X), np.arange(len(X)))
    best, kept = _Best.empty(len(batch)), _Best.empty(len(batch))
    strips = [
        _Strip(batch[part], bounds, "kept", best.part(part), kept.part(part))
        for part in _even_blocks(len(batch), _STRIP_ROWS)
    ]
    at = 0
    for Y in tiles:
        tile = _Around(_Rows(Y, rowwise_dot(Y, Y), np.arange(at, at + len(Y))), at)
        for strip in strips:
            strip.compare(tile, tile, stays[at:])
            strip.settle(tile)
        at += len(Y)
    return best.found(), kept.found()


def _find_between(block: Between, tiles: Iterable[Float32], stays: Bool) -> Found:
    """Return the pairs of rows with copies and rows that may matter to these; by row, then by other row."""
    found: list[tuple[Indices, Indices, Float64]] = []
    at = 0
    for Y in tiles:
        for columns in blocks(len(Y), _TILE_COLUMNS):
            some = Y[columns]
            number = np.arange(at, at + len(some))
            between = (number + block.start > block.row[:, None]) & (number + block.start < block.until[:, None])
            between &= stays[number]
            i, j = np.nonzero((_products(block.X, some) >= block.least[:, None]) & between)
            if len(i):
                left, right = _used(block.X, i), _used(some, j)
                value = _pair_cosine(left, np.searchsorted(left.position, i), right, np.searchsorted(right.position, j))
                found.append((i, number[j], value))
            at += len(some)
    if not found:
        return _Best.empty(0).found()
    i, j, value = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(i, kind="stable")
    return Found(i[order].astype(np.int32), j[order].astype(np.int32), value[order])


def _used(X: Float32, numbers: Indices) -> _Rows:
    """Return those rows that are among the numbers, in order."""
    position = np.unique(numbers)
    return _Rows(X[position], rowwise_dot(X[position], X[position]), position)


class _Best:
    """The best match so far of each of some rows, in exact similarity (ties: the smaller position)."""

    def __init__(self, value: Float64, position: Int64) -> None:
        self.value, self.position = value, position

    @classmethod
    def empty(cls, n: int) -> _Best:
        return cls(np.full(n, _NOTHING), np.full(n, np.iinfo(np.int64).max))

    def part(self, rows: slice | Int64) -> _Best:
        """View some rows, or copy them where they are given one by one."""
        return _Best(self.value[rows], self.position[rows])

    def found(self) -> Found:
        """Return what is known, for those rows for which there is something."""
        some = np.flatnonzero(self.value > _NOTHING)
        return Found(some.astype(np.int32), self.position[some].astype(np.int32), self.value[some])

    def improve(self, at: Int64, value: Float64, position: Int64) -> None:
        """Take other matches of the rows `at` into account, one for each."""
        better = (value > self.value[at]) | ((value == self.value[at]) & (position < self.position[at]))
        self.value[at[better]], self.position[at[better]] = value[better], position[better]

    def offer(self, products: Float32, left: _Rows, right: _Rows, floor: Float64 | None = None) -> None:
        """Take approximate products (left x right) into account; those below `floor` do not matter."""
        if not products.size:
            return
        error = product_error(left.X.shape[1])
        top = products.max(axis=1)
        bar = (self.value if floor is None else np.maximum(self.value, floor)) - error
        open_rows = np.flatnonzero(top >= bar)
        if not len(open_rows):
            return
        least = float32_below(np.maximum(bar, top - 2 * error)[open_rows])
        open_products = products if len(open_rows) == len(products) else products.take(open_rows, axis=0)
        near = open_products >= least[:, None]
        _thin(near, left, open_rows, right)
        i, j = np.divmod(np.flatnonzero(near), products.shape[1])
        self.offer_pairs(open_rows[i], j, left, right)

    def offer_pairs(self, i: npt.NDArray[np.intp], j: npt.NDArray[np.intp], left: _Rows, right: _Rows) -> None:
        """Take pairs of rows into account; they come row by row."""
        i, j = _thin_out(i, j, left, right)
        value = _pair_cosine(left, i, right, j)
        position = right.position[j]
        if not (i[1:] > i[:-1]).all():
            order = np.lexsort((position, -value, i))
            lead = order[np.flatnonzero(np.diff(i[order], prepend=-1))]
            i, value, position = i[lead], value[lead], position[lead]
        better = (value > self.value[i]) | ((value == self.value[i]) & (position < self.position[i]))
        i = i[better]
        self.value[i], self.position[i] = value[better], position[better]


@dataclass(frozen=True)
class _Rows:
    """Rows with what belongs to them: (m, D) vectors, d(x, x) and positions."""

    X: Float32
    square: Float64
    position: Int64

    def __getitem__(self, rows: slice | npt.NDArray[Any]) -> _Rows:
        return _Rows(self.X[rows], self.square[rows], self.position[rows])

    def __len__(self) -> int:
        return len(self.position)


class _Candidates:
    """For each row of a strip, the pairs of which one is its best: products tell no more.

    Args:
        rows: The strip.
        floor: The least product that matters.
        known: What is known of its rows already.
        centre: What the products are relative to.
    """

    def __init__(self, rows: _Rows, floor: float, known: _Best, centre: _Part | None) -> None:
        self._rows, self._floor = rows, np.float32(floor)
        # with room for the rounding of the difference
        self._slack = np.float32(2 * product_error(rows.X.shape[1]) + 2.0**-23) if centre is None else centre.slack
        self.best = known
        """What is known exactly."""
        self.top = (known.value - (0 if centre is None else 1)).astype(np.float32)
        """The largest product so far."""
        self._pairs: list[tuple[Indices, Indices, Float32]] = []
        self._n_pairs = 0

    def bar(self) -> Float32:
        """Return the least product with which a pair can be the best of its row."""
        bar: Float32 = self.top - self._slack
        return np.maximum(bar, self._floor, out=bar)

    def add(self, i: Indices, j: Indices, product: Float32, around: _Around) -> None:
        """Note pairs: row of the strip, index of the other row, product."""
        np.maximum.at(self.top, i, product)
        near = product >= self.bar()[i]
        self._pairs.append((i[near], j[near], product[near]))
        self._n_pairs += len(self._pairs[-1][0])
        if self._n_pairs > 16 * len(self.top) + 4096:
            self.settle(around)

    def settle(self, around: _Around, rows: Bool | None = None) -> None:
        """Compute the pairs of all rows, or of some, exactly; all other rows of the pairs are in `around`."""
        if not self._n_pairs:
            return
        i, j, product = _joined(self._pairs)
        self._pairs, self._n_pairs = [], 0
        near = product >= self.bar()[i]
        if rows is not None:
            near &= rows[i]
        i, j = i[near], j[near] - around.start
        if not (i[1:] >= i[:-1]).all():
            order = np.argsort(i, kind="stable")
            i, j = i[order], j[order]
        if len(i):
            self.best.offer_pairs(i, j, self._rows, around.rows)


@dataclass(frozen=True)
class _Around:
    """Rows that others are compared with, of which the first has index `start`."""

    rows: _Rows
    start: int


class _Centre:
    """What rows of a cluster are close to: with what they differ from it by, products tell far more.

    With o(x) = x.c - (c.c + 1) / 2 + 1 / |x| - 1, the similarity of x and y less 1 is (x - c).(y - c) + o(x) + o(y),
    but for products of what is small. All terms are small where rows are, and so are their errors.

    Args:
        rows: The rows.
        vector: (D,), what they are close to.
    """

    def __init__(self, rows: _Rows, vector: Float32) -> None:
        dim, unit = len(vector), 2.0**-24
        dots = rowwise_dot(rows.X, np.broadcast_to(vector, rows.X.shape))
        length = float(rowwise_dot(vector[None], vector[None])[0])
        stretch = 1 / np.sqrt(rows.square) - 1
        offset = dots - (length + 1) / 2 + stretch
        radius = np.sqrt(np.maximum(rows.square - 2 * dots + length, 0) + 2.0**-48)
        self.vector, self.offset = vector, offset.astype(np.float32)
        # of the product as in `product_error`, of its sum with the offsets, and of what is left out
        most, odd, across = float(np.abs(offset).max()), float(np.abs(stretch).max()), radius * radius.max()
        error = 1.01 * ((dim + 10) * unit + 2 * odd) * across + 6 * (unit + odd) * most + 6 * odd**2
        error += 4 * (dim + 16) * 2.0**-53
        self._slack = 2 * error + 4 * unit * (across + 3 * most)
        self._error = float(error.max()) + unit

    @classmethod
    def of(cls, rows: _Rows) -> _Centre | None:
        """The centre of rows, if there are some and they are close to it."""
        if not len(rows):
            return None
        some = rows.X[:: max(1, len(rows) // _SLICE_ROWS)]
        vector = some.mean(axis=0, dtype=np.float64).astype(np.float32)
        return cls(rows, vector) if vector @ vector >= _CLOSE else None

    def bounds(self, limit: np.float32) -> tuple[float, float]:
        """As `_bounds`, less 1."""
        least = float(limit) - 1
        return float(float32_below(least - self._error)), -float(float32_below(-least - self._error))

    def part(self, X: Float32, start: int) -> _Part:
        """What is needed of rows of which the first has index `start`."""
        rows = slice(start, start + len(X))
        return _Part(self, X - self.vector, self.offset[rows], self._slack[rows].astype(np.float32))


@dataclass(frozen=True)
class _Part:
    """Rows less their centre, what is added to their products, and by how much a product may be below the best."""

    centre: _Centre
    X: Float32
    offset: Float32
    slack: Float32

    def products(self, X: Float32, start: int) -> Float32:
        """Products with rows of which the first has index `start`."""
        return self._add(_products(self.X, X - self.centre.vector), self.centre.offset[start : start + len(X)])

    def own_products(self) -> Float32:
        """Products with each other."""
        return self._add(_products(self.X, self.X), self.offset)

    def _add(self, products: Float32, offset: Float32) -> Float32:
        products += self.offset[:, None]
        products += offset
        return products


class _Strip:
    """Rows that are judged together: what is found for them is noted here, by one thread at a time.

    Args:
        rows: The strip.
        bounds: Products below the first are surely not within eps, those above the second surely are.
        compare_to: That of `match_ranked`.
        best: What is known of their best matches.
        kept: What is known of their best matches among the rows that stay.
        centre: If all products are relative to a centre, the rows as seen from there.
    """

    def __init__(
        self,
        rows: _Rows,
        bounds: tuple[float, float],
        compare_to: CompareTo,
        best: _Best,
        kept: _Best,
        centre: _Part | None = None,
    ) -> None:
        self.rows, self._centre = rows, centre
        self._low, self._high = bounds
        self.best, self.kept = _Candidates(rows, -np.inf, best, centre), _Candidates(rows, self._low, kept, centre)
        self.decides = self.kept if compare_to == "kept" else self.best
        """The pairs that decide who is removed."""
        self.inside: list[tuple[Indices, Indices, Float32]] = []
        """Pairs of rows of the strip that may be within eps."""

    def compare(self, tile: _Around, around: _Around, stays: Bool) -> None:
        """Compare with the rows of a tile, of which those stay that `stays` tells."""
        for columns in _even_blocks(len(tile.rows), _TILE_COLUMNS):
            X, start = tile.rows.X[columns], tile.start + columns.start
            products = _products(self.rows.X, X) if self._centre is None else self._centre.products(X, start)
            self.note(products, start, around, stays[columns])

    def compare_inside(self, start: int, around: _Around) -> None:
        """Compare the rows, of which the first has index `start`, with each other."""
        products = _products(self.rows.X, self.rows.X) if self._centre is None else self._centre.own_products()
        np.copyto(products, _MASKED, where=_not_before(_STRIP_ROWS)[: len(products), : len(products)])
        self.note(products, start, around, None)

    def note(self, products: Float32, start: int, around: _Around, stays: Bool | None) -> None:
        """Note what matters of the products with rows from index `start` on, None: with the strip; spoils them."""
        at = products.argmax(axis=1)
        own = at + np.arange(0, products.size, products.shape[1])
        top = products.reshape(-1).take(own)
        np.maximum(self.best.top, top, out=self.best.top)
        best_bar = self.best.bar()
        bar = np.minimum(best_bar, self.kept.bar())
        inside = stays is None
        if stays is None:  # those may stay for which no earlier row is surely within eps
            stays = self.decides.top <= self._high

        def note(i: Indices, j: Indices, product: Float32) -> None:
            near = np.flatnonzero(product >= best_bar[i])
            self.best.add(i[near], j[near] + start, product[near], around)
            near = np.flatnonzero((product >= self._low) & stays[j])
            if not len(near):
                return
            if inside:
                self.inside.append((i[near], j[near], product[near]))
            else:
                self.kept.add(i[near], j[near] + start, product[near], around)

        matters = top >= bar
        if not matters.any():
            return
        products.reshape(-1)[own] = _MASKED
        several = products.max(axis=1) >= bar
        products.reshape(-1)[own] = top
        others = around.rows[start - around.start : start - around.start + products.shape[1]]
        one, more = np.flatnonzero(matters & ~several), np.flatnonzero(several)
        note(one, at[one], top[one])
        for some in blocks(len(more), _SLICE_ROWS):
            rows = more[some]
            part = products.take(rows, axis=0)
            near = part >= best_bar[rows, None]
            _thin(near, self.rows, rows, others)
            matters = part >= bar[rows, None]
            matters &= stays
            matters |= near
            i, j = np.divmod(np.flatnonzero(matters), products.shape[1])
            note(rows[i], j, part[i, j])

    def settle(self, around: _Around) -> None:
        """Compute all that was noted exactly; all other rows are in `around`."""
        self.best.settle(around)
        self.kept.settle(around)


class _Resolver:
    """One call of `match_ranked`: the arrays of the answer, and the steps that fill them.

    Rows that are no copies are compared strip by strip, in rank order. A product of a row with a better-ranked one
    counts for its match, and, if the other is kept, for its witness.
    """

    def __init__(
        self,
        rows: RankedRows,
        eps: float | None,
        compare_to: CompareTo,
        batch_size: int,
        executor_map: ExecutorMap | None,
        elsewhere: Elsewhere | None,
    ) -> None:
        self.rows, self.n = rows, rows.n
        self.limit = None if eps is None else threshold(eps)
        self.elsewhere = elsewhere
        self.compare: BlockMap = self._find
        self.compare_to, self.batch_size = compare_to, batch_size
        self.executor_map = executor_map or map
        self.strip_rows = _STRIP_ROWS if executor_map is None else _SLICE_ROWS
        self.error = product_error(rows.dim)
        self.low, self.high = _bounds(eps, rows.dim)
        self.best = _Best.empty(self.n)
        self.witness = _Best.empty(self.n)
        self.removed = np.zeros(self.n, np.bool_)
        self.held: _Around | None = None
        """Rows that are no copies and in memory, if so all from an index on; none before are compared with here."""
        self.centre: _Centre | None = None
        """If all rows are close to one; `low` and `high` are then less 1, as products are."""

    def run(self) -> Matches:
        X = None
        if isinstance(self.rows, RankedArray):
            X = self.rows.take(0, self.n)
            self.rows = RankedArray(X)
        self.square = _squares(self.rows, self.batch_size)
        if not (np.abs(self.square - 1) < 1e-5).all():
            raise ParameterError("rows must be of unit length: use untwin.core.normalize")
        first = _first_copies(self.rows, self.square, self.batch_size)
        distinct = first == np.arange(self.n)
        self.position, copies = np.flatnonzero(distinct), np.flatnonzero(~distinct)
        if X is not None:
            X = _chosen(X, self.position) if len(copies) else X
            self.held = _Around(_Rows(X, self.square[self.position], self.position), 0)
            if self.elsewhere is None:
                self._see_from_centre(self.held.rows)
        elif len(copies):
            self.rows = DistinctRows(self.rows, self.position)
        if self.elsewhere is not None:
            self._judge_with(self.elsewhere)
        else:
            at_once = self.batch_size if self.held is None or self.strip_rows == _SLICE_ROWS else self.strip_rows
            for part in _even_blocks(len(self.position), at_once):
                self._judge(part)
        self._copy_answers(first, copies)
        if len(copies) and self.limit is not None and self.compare_to == "kept":
            self._recheck_copies(first, copies)
        return self._answer()

    def _see_from_centre(self, rows: _Rows) -> None:
        """Compare all rows relative to their centre, if they are close to it."""
        self.centre = _Centre.of(rows)
        if self.centre is not None and self.limit is not None:
            self.low, self.high = self.centre.bounds(self.limit)

    def _take(self, part: slice) -> _Rows:
        """Some of the rows that are no copies."""
        if self.held is not None:
            return self.held.rows[part.start - self.held.start : part.stop - self.held.start]
        position = self.position[part]
        return _Rows(self.rows.take(part.start, part.stop), self.square[position], position)

    def _tiles(self, start: int, stop: int) -> Iterator[_Around]:
        """Rows that are no copies, as many at a time as are taken together."""
        size = stop - start if self.held is not None else max(_TILE_COLUMNS, _READ_BYTES // (4 * self.rows.dim))
        for part in blocks(stop - start, max(1, size)):
            first = start + part.start
            yield _Around(self._take(slice(first, start + part.stop)), first)

    def _judge(self, part: slice) -> None:
        """Resolve a batch of rows, which are compared with all better-ranked rows, or with those that are held."""
        batch = self._take(part)
        strips = [
            self._strip(batch[rows], part.start + rows.start) for rows in _even_blocks(len(batch), self.strip_rows)
        ]
        for tile in self._tiles(0 if self.held is None else self.held.start, part.start):
            compare = partial(_Strip.compare, tile=tile, around=self.held or tile, stays=self._stays(tile))
            list(self.executor_map(compare, strips))
            if self.held is None:
                for strip in strips:
                    strip.settle(tile)
        around, done = self.held or _Around(batch, part.start), 0
        for strip in strips:
            before = _Around(batch[:done], part.start)
            strip.compare(before, around, self._stays(before))
            strip.compare_inside(part.start + done, around)
            self._resolve(strip, part.start + done, around)
            done += len(strip.rows)

    def _strip(self, rows: _Rows, start: int) -> _Strip:
        known = self.best.part(rows.position), self.witness.part(rows.position)
        centre = None if self.centre is None else self.centre.part(rows.X, start)
        return _Strip(rows, (self.low, self.high), self.compare_to, *known, centre)

    def _stays(self, tile: _Around) -> Bool:
        """Which rows of a tile of resolved rows stay."""
        return ~self.removed[tile.rows.position]

    def _judge_with(self, elsewhere: Elsewhere) -> None:
        """Resolve all rows, batch by batch; pairs of rows of different batches are compared elsewhere.

        While a batch is resolved, the next one is compared with what comes before both: only the pairs between the two
        have to wait until it is known which rows of the first stay.
        """
        self.compare = elsewhere(self.rows if self.held is None else RankedArray(self.held.rows.X))
        batches = list(_even_blocks(len(self.position), self.batch_size))
        before = slice(0, 0)
        for batch, after in zip(batches, [*batches[1:], slice(0, 0)], strict=True):
            now = self._blocks(batch, before, _FINE)
            work = [*now, *self._blocks(after, slice(0, batch.start))]
            # this thread waits for the others, as a backend may want to know that it does nothing meanwhile
            with closing(self.compare(work)) as results, ThreadPoolExecutor(1) as thread:
                answers = zip(work, results, strict=True)
                for block, found in islice(answers, len(now)):
                    self._merge(block, found)
                judged = thread.submit(self._judge_alone, batch)
                for block, found in answers:
                    self._merge(block, found)
                    if judged.done():
                        judged.result()  # if it has failed, at once
                judged.result()
            before = batch

    def _judge_alone(self, batch: slice) -> None:
        """Resolve a batch that was compared with all better-ranked rows."""
        held = self.held
        self.held = _Around(self._take(batch), batch.start)
        for part in _even_blocks(batch.stop - batch.start, max(_TILE_COLUMNS, self.strip_rows)):
            self._judge(slice(batch.start + part.start, batch.start + part.stop))
        self.held = held

    def _blocks(self, batch: slice, others: slice, parts: int = 1) -> list[Block]:
        """Cut the comparison of a batch with better-ranked rows into blocks, large ones first: they end together."""
        rows = list(_even_blocks(batch.stop - batch.start, _BLOCK_ROWS // parts))
        work = []
        start = others.start
        while rows and start < others.stop:
            left = others.stop - start
            size = max(_BLOCK_COLUMNS // parts, left * len(rows) // _BLOCKS)
            stop = start + -(-left // -(-left // size))
            removed = None if self.limit is None else np.packbits(self.removed[self.position[start:stop]])
            work += [Block(batch.start + row.start, batch.start + row.stop, start, stop, removed) for row in rows]
            start = stop
        return work

    def _merge(self, block: Block, found: tuple[Found, Found]) -> None:
        """Take what was found for a block into account."""
        for best, part in zip((self.best, self.witness), found, strict=True):
            at, other = self.position[block.low + part.row], self.position[block.start + part.other]
            best.improve(at, part.value, other)

    def _resolve(self, strip: _Strip, start: int, around: _Around) -> None:
        """Decide who stays of a strip, of which the first row has index `start`, once all is compared."""
        rows, position = strip.rows, strip.rows.position
        if self.limit is not None:
            decides = strip.decides
            if ((decides.top >= self.low) & (decides.top <= self.high)).any():
                decides.settle(around)
            duplicate = (decides.top > self.high) | (decides.best.value.astype(np.float32) >= self.limit)
            if strip.inside:
                i, j, product = _joined(strip.inside)
                if self.compare_to == "kept":
                    near = ~(duplicate[i] | duplicate[j])
                    near[near] = self._within(rows, i[near], j[near], product[near])
                    _resolve_in_order(i[near], j[near], duplicate)
                near = duplicate[i] & ~duplicate[j]
                strip.kept.add(i[near], j[near] + start, product[near], around)
            strip.kept.settle(around, duplicate)
            at = position[duplicate]
            self.removed[at] = True
            self.witness.value[at] = strip.kept.best.value[duplicate]
            self.witness.position[at] = strip.kept.best.position[duplicate]
        strip.best.settle(around)
        self.best.value[position], self.best.position[position] = strip.best.best.value, strip.best.best.position

    def _within(self, rows: _Rows, i: Indices, j: Indices, product: Float32) -> Bool:
        """Whether pairs of rows whose products are at least `low` are within eps."""
        assert self.limit is not None
        within = product > self.high
        unsure = np.flatnonzero(~within)
        within[unsure] = _pair_cosine(rows, i[unsure], rows, j[unsure]).astype(np.float32) >= self.limit
        return within

    def _copy_answers(self, first: Int64, copies: Int64) -> None:
        """Answers of later copies from those of the first; see `match_ranked` for why."""
        origin = first[copies]
        exact = self.best.value[origin] == 1
        self.best.value[copies] = 1
        self.best.position[copies] = np.where(exact, self.best.position[origin], origin)
        if self.limit is not None:
            removed = self.removed[origin]
            self.removed[copies] = True
            self.witness.value[copies] = np.where(removed, self.witness.value[origin], 1)
            self.witness.position[copies] = np.where(removed, self.witness.position[origin], origin)

    def _recheck_copies(self, first: Int64, copies: Int64) -> None:
        """For copies of removed rows, look among the kept rows between the first copy and this one."""
        copies = copies[self.removed[first[copies]]]
        if not len(copies):
            return
        copies = copies[np.lexsort((copies, first[copies]))]
        origin = first[copies]
        origins, begin, group = np.unique(origin, return_index=True, return_inverse=True)
        last = copies[np.append(begin[1:], len(copies)) - 1]
        at_once = _SLICE_ROWS if self.elsewhere is None else self.batch_size
        for some in blocks(len(origins), at_once):
            mine = slice(*np.searchsorted(origin, (origins[some][0], origins[some][-1] + 1)))
            work = list(self._between(origins[some], last[some]))
            with closing(self.compare([block for _, block in work])) as answers:
                for (first_row, block), (_, found) in zip(work, answers, strict=True):
                    position = self.position[block.start + found.other]
                    i = first_row + found.row.astype(np.int64)
                    self._improve(copies[mine], group[mine] - some.start, i, position, found.value)

    def _between(self, origins: Int64, last: Int64) -> Iterator[tuple[int, Between]]:
        """Cut the search between rows and their last copies into blocks; yields the number of the first row, too."""
        row, until = np.searchsorted(self.position, (origins, last))
        least = float32_below(self.witness.value[origins] - self.error)
        X = _gather(self.rows, row) if self.held is None else self.held.rows.X[row]
        for part in blocks(len(row), _BLOCK_ROWS // 4):
            low, high = int(row[part][0]), int(until[part].max())
            for columns in _even_blocks(high - low, 4 * _BLOCK_COLUMNS):
                start, stop = low + columns.start, low + columns.stop
                removed = np.packbits(self.removed[self.position[start:stop]])
                yield part.start, Between(X[part], row[part], until[part], least[part], start, stop, removed)

    def _find(self, work: Sequence[Block | Between]) -> Generator[tuple[Found, Found], None, None]:
        """Compare here."""
        for block in work:
            tiles = (tile.rows.X for tile in self._tiles(block.start, block.stop))
            yield match_block(block, self.rows, tiles, None)

    def _improve(
        self,
        copies: Int64,
        group: npt.NDArray[np.intp],
        i: npt.NDArray[np.intp],
        position: Int64,
        value: Float64,
    ) -> None:
        """Give each copy the most similar of its group's kept rows (i, position, value) that rank before it.

        Both lists are sorted by group, then position. Positions are larger than those seen before: ties
        change nothing.
        """
        if not len(i):
            return
        _, grade = np.unique(value, return_inverse=True)
        running = np.maximum.accumulate(i * (len(i) + 1) + grade)
        record = np.flatnonzero(np.diff(running, prepend=-1) > 0)
        where = np.searchsorted(i[record] * self.n + position[record], group * self.n + copies) - 1
        hit = record[np.maximum(where, 0)]
        use = (where >= 0) & (i[hit] == group) & (value[hit] > self.witness.value[copies])
        self.witness.value[copies[use]] = value[hit[use]]
        self.witness.position[copies[use]] = position[hit[use]]

    def _answer(self) -> Matches:
        score, match = self.best.value.astype(np.float32), self.best.position
        score[:1], match[:1] = 0, 0
        if self.limit is None:
            return Matches(score, match, None, None, None)
        kept_score = self.witness.value.astype(np.float32)
        none = ~(self.removed & (kept_score >= self.limit))
        kept_score[none] = np.nan
        kept_match = self.witness.position
        kept_match[none] = -1
        return Matches(score, match, kept_score, kept_match, self.removed)


def _bounds(eps: float | None, dim: int) -> tuple[float, float]:
    """Products below the first are surely not within eps, those above the second surely are; infinite without eps."""
    if eps is None:
        return np.inf, np.inf
    limit, error = float(threshold(eps)), product_error(dim)
    return float(float32_below(limit - error)), float(np.float32(limit + error))


def _joined(pairs: list[tuple[Indices, Indices, Float32]]) -> tuple[Indices, Indices, Float32]:
    i, j, product = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return i, j, product


def _chosen(X: Float32, positions: Int64) -> Float32:
    """Rows at ascending positions; in the place of the others if the array is not a view of another."""
    if not X.flags.owndata:
        return X.take(positions, axis=0)
    for part in blocks(len(positions), _TILE_COLUMNS):
        X[part] = X[positions[part]]
    return X[: len(positions)]


_scratch = threading.local()


def _scratch_matrix(rows: int, columns: int) -> Float32:
    """(rows, columns) float32 that this thread uses again and again: fresh memory costs more than it seems."""
    size = rows * columns
    if not hasattr(_scratch, "values") or len(_scratch.values) < size:
        _scratch.values = np.empty(max(size, _STRIP_ROWS * _TILE_COLUMNS), np.float32)
    matrix: Float32 = _scratch.values[:size].reshape(rows, columns)
    return matrix


def _products(X: Float32, Y: Float32) -> Float32:
    """(n, m) products of the rows of X with those of Y; good until this thread asks for others."""
    return np.matmul(X, Y.T, out=_scratch_matrix(len(X), len(Y)))


@lru_cache
def _not_before(n: int) -> Bool:
    """(n, n): whether column j is not better ranked than row i."""
    return ~np.tri(n, k=-1, dtype=np.bool_)


def _pair_cosine(left: _Rows, i: npt.NDArray[np.intp], right: _Rows, j: npt.NDArray[np.intp]) -> Float64:
    """Exact similarities of pairs of rows: fixed-order float64, at most 1."""
    cosine: Float64 = pair_dot(left.X, i, right.X, j) / np.sqrt(left.square[i] * right.square[j])
    return np.minimum(cosine, 1.0, out=cosine)


def _fine_products(left: _Rows, right: _Rows) -> Float64:
    """(n, m) similarities by a float64 matrix product: those of `_pair_cosine`, up to half of `_fine_error`."""
    products: Float64 = left.X.astype(np.float64) @ right.X.astype(np.float64).T
    products *= (1 / np.sqrt(left.square))[:, None]
    products *= 1 / np.sqrt(right.square)
    return np.minimum(products, 1.0, out=products)


def _fine_error(dim: int) -> float:
    return 8 * (dim + 16) * 2.0**-53


def _thin(near: Bool, left: _Rows, chosen: Indices, right: _Rows) -> None:
    """Drop pairs that a float64 matrix product shows not to be their row's best, in place, if there are many pairs.

    Groups of almost identical rows make thousands of candidates per row; a product of all is then cheaper
    than a fixed-order product of each.

    Args:
        near: (m, n), the pairs.
        left: Rows, of which m are `chosen`.
        chosen: Their indices.
        right: The other rows, n.
    """
    if np.count_nonzero(near) * DENSE <= near.size:
        return
    fine = _fine_products(left[chosen], right)
    np.copyto(fine, _NOTHING, where=~near)
    near &= fine >= (fine.max(axis=1) - _fine_error(right.X.shape[1]))[:, None]


def _thin_out(
    i: npt.NDArray[np.intp], j: npt.NDArray[np.intp], left: _Rows, right: _Rows
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """As `_thin`, for pairs that come row by row."""
    if len(i) < 1024:
        return i, j
    row_used, column_used = np.zeros(len(left), np.bool_), np.zeros(len(right), np.bool_)
    row_used[i], column_used[j] = True, True
    rows, columns = np.flatnonzero(row_used), np.flatnonzero(column_used)
    if len(i) < 4 * len(rows) or len(i) * DENSE < len(rows) * len(columns):
        return i, j
    at_row, at_column = np.cumsum(row_used) - 1, np.cumsum(column_used) - 1
    value = _fine_products(left[rows], right[columns])[at_row[i], at_column[j]]
    starts = np.flatnonzero(np.diff(i, prepend=-1))
    top = np.maximum.reduceat(value, starts)
    keep = value >= top[at_row[i]] - _fine_error(left.X.shape[1])
    return i[keep], j[keep]


def _even_blocks(n: int, size: int) -> Iterator[slice]:
    """As few slices of at most `size` as cover `range(n)`, about equally long: products of thin matrices are slow."""
    return blocks(n, -(-n // max(1, -(-n // size))) or 1)


def _resolve_in_order(i: Indices, j: Indices, duplicate: Bool) -> None:
    """Resolve in rank order, in place: row i becomes a duplicate if j < i is none, for all pairs within eps."""
    if not len(i):
        return
    order = np.argsort(j.astype(np.uint16), kind="stable")  # rows of one strip: numbers that a radix sort takes
    i, j = i[order], j[order]
    starts = np.flatnonzero(np.diff(j, prepend=-1))
    for earlier, lo, hi in zip(j[starts].tolist(), starts.tolist(), [*starts[1:].tolist(), len(j)], strict=True):
        if not duplicate[earlier]:
            duplicate[i[lo:hi]] = True


def _squares(rows: RankedRows, batch_size: int) -> Float64:
    """d(x, x) of each row, (n,)."""
    square = np.empty(rows.n, np.float64)
    for part in blocks(rows.n, batch_size):
        X = rows.take(part.start, part.stop)
        square[part] = rowwise_dot(X, X)
    return square


def _first_copies(rows: RankedRows, square: Float64, batch_size: int) -> Int64:
    """Position of the best-ranked bit-identical row (its own if none is better ranked); (n,) int64.

    Only rows that share d(x, x) with another can be copies: the others are not looked at. Where that is shared by
    rows that differ, hashes are compared too. A hash collision is found by comparing the rows, and only costs the
    shortcut.
    """
    first = np.arange(rows.n)
    order = np.argsort(square, kind="stable")
    same = square[order[1:]] == square[order[:-1]]
    suspects = np.sort(order[np.append(same, False) | np.insert(same, 0, False)]) if same.any() else order[:0]
    if not len(suspects):
        return first
    keys: npt.NDArray[Any] = square[suspects]
    if not _group_copies(rows, suspects, keys, first, batch_size):
        keys = np.empty(len(suspects), np.uint64)
        for part in blocks(len(suspects), batch_size):
            keys[part] = hash_rows(_gather(rows, suspects[part]), seed=0)
        _group_copies(rows, suspects, keys, first, batch_size)
    return first


def _group_copies(rows: RankedRows, suspects: Int64, keys: npt.NDArray[Any], first: Int64, batch_size: int) -> bool:
    """Note which rows equal the first with the same key; returns whether all do that share a key with another."""
    _, begin, group = np.unique(keys, return_index=True, return_inverse=True)
    origin = suspects[begin[group]]
    later = np.flatnonzero(origin != suspects)
    n_equal = 0
    for part in blocks(len(later), batch_size):
        some = later[part]
        targets, at = np.unique(origin[some], return_inverse=True)
        equal = (_gather(rows, suspects[some]) == _gather(rows, targets)[at]).all(axis=1)
        first[suspects[some[equal]]] = origin[some[equal]]
        n_equal += int(np.count_nonzero(equal))
    return n_equal == len(later)


def _gather(rows: RankedRows, positions: Int64) -> Float32:
    """Rows at ascending positions, by as few reads as there are runs."""
    if isinstance(rows, RankedArray):
        return rows.gather(positions)
    cut = np.flatnonzero(np.diff(positions) != 1) + 1
    starts, ends = positions[np.insert(cut, 0, 0)], positions[np.append(cut, len(positions)) - 1] + 1
    if len(starts) == 1:
        return rows.take(int(starts[0]), int(ends[0]))
    out = np.empty((len(positions), rows.dim), np.float32)
    done = 0
    for lo, hi in zip(starts.tolist(), ends.tolist(), strict=True):
        out[done : done + hi - lo] = rows.take(lo, hi)
        done += hi - lo
    return out
