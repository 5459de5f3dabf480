"""Unit vectors and the one dot product that decides: float64, the same bits however rows are batched.

Also the error bound of a float32 matrix product, which says when the fixed-order product must be asked.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

_CHUNK_ELEMENTS = 1 << 17
"""Elements of float64 scratch per step (1 MB): more would leave the caches, fewer cost more calls, for each of which
threads wait for the interpreter."""

DENSE = 32
"""A float64 matrix product of all rows with all others costs less than a fixed-order one of one in so many pairs."""

_SAFE_SQUARED_NORM = (1e-100, 1e100)
"""Within these limits no square that matters under- or overflows."""


class Invalid(IntEnum):
    """Why a vector cannot be normalised; `OK` if it can."""

    OK = 0
    NAN = 1
    INFINITE = 2
    ZERO = 3

    @property
    def text(self) -> str:
        """The reason in words."""
        return ("ok", "contains NaN", "contains an infinite value", "zero norm")[self]


def blocks(n: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `range(n)` in order."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def chunk_rows(dim: int) -> int:
    """Rows of `dim` elements that are worked on at a time."""
    return max(1, _CHUNK_ELEMENTS // max(dim, 1))


_scratch = threading.local()


def scratch_arrays(count: int, n: int, dim: int) -> npt.NDArray[np.float64]:
    """(count, rows, dim) for the rows of a step of n: this thread's, until it asks again. Fresh memory costs more."""
    rows = min(chunk_rows(dim), n)
    size = count * rows * dim
    if not hasattr(_scratch, "values") or len(_scratch.values) < size:
        _scratch.values = np.empty(max(size, 2 * _CHUNK_ELEMENTS))
    arrays: npt.NDArray[np.float64] = _scratch.values[:size].reshape(count, rows, dim)
    return arrays


def product_error(dim: int) -> float:
    """Bound on |float32 matrix product - cosine similarity| for two unit vectors of `dim` elements.

    A float32 dot product is off by at most `dim * u * Σ|x_i y_i|`, u = 2**-24, in any order of summation
    (Jeannerod & Rump, "Improved error bounds for inner products in floating-point arithmetic", SIAM J. Matrix
    Anal. Appl. 34(2), 2013, theorem 4.2). The additional 8 u cover norms that differ from 1 because the
    elements were rounded to float32, and the rounding of a threshold.
    """
    return (dim + 8) * 2.0**-24 * 1.01


def float32_below(values: Any) -> npt.NDArray[np.float32]:
    """Float32 numbers surely not greater than the given ones: bounds for float32 products."""
    return np.nextafter(np.asarray(values).astype(np.float32), np.float32(-np.inf), dtype=np.float32)


def rowwise_dot(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Dot products of the rows of `a` with those of `b`, in float64 and in a fixed order of summation.

    Parameters
    ----------
    a, b
        (n, D), C-contiguous, float32 or float64. The product of two float32 values is exact in float64.

    Returns:
    -------
    (n,) float64. The bits of an entry depend on its two rows only: NumPy sums each contiguous row pairwise.

    """
    n, dim = a.shape
    out = np.empty(n, np.float64)
    step = chunk_rows(dim)
    left, right = scratch_arrays(2, n, dim)
    if a is b:
        right = left
    for rows in blocks(n, step):
        _dot_into(out[rows], a[rows], b[rows], left, right)
    return out


def _dot_into(
    out: npt.NDArray[np.float64],
    a: npt.NDArray[Any],
    b: npt.NDArray[Any],
    left: npt.NDArray[np.float64],
    right: npt.NDArray[np.float64],
) -> None:
    """Dot products of a few rows; converting first is faster than a product that converts."""
    products = left[: len(out)]
    np.copyto(products, a)
    if right is not left:
        np.copyto(right[: len(out)], b)
    np.multiply(products, right[: len(out)], out=products)
    np.add.reduce(products, axis=1, out=out)


def pair_dot(
    X: npt.NDArray[np.float32], i: npt.NDArray[np.intp], Y: npt.NDArray[np.float32], j: npt.NDArray[np.intp]
) -> npt.NDArray[np.float64]:
    """Fixed-order dot products of the pairs `X[i[k]], Y[j[k]]`; (m,) float64."""
    out = np.empty(len(i), np.float64)
    step = chunk_rows(X.shape[1])
    left, right = scratch_arrays(2, len(i), X.shape[1])
    for pairs in blocks(len(i), step):
        _dot_into(out[pairs], X.take(i[pairs], axis=0), Y.take(j[pairs], axis=0), left, right)
    return out


def pair_dot_and_squares(
    X: npt.NDArray[np.float32], Y: npt.NDArray[np.float32], j: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """`pair_dot` of each row of X with `Y[j]`, and `rowwise_dot` of X with itself, converting X once; both (n,)."""
    dots, squares = np.empty((2, len(X)), np.float64)
    step = chunk_rows(X.shape[1])
    left, right = scratch_arrays(2, len(X), X.shape[1])
    for rows in blocks(len(X), step):
        a, b = left[: rows.stop - rows.start], right[: rows.stop - rows.start]
        np.copyto(a, X[rows])
        np.copyto(b, Y.take(j[rows], axis=0))
        np.multiply(a, b, out=b)
        np.add.reduce(b, axis=1, out=dots[rows])
        np.multiply(a, a, out=a)
        np.add.reduce(a, axis=1, out=squares[rows])
    return dots, squares


def pair_squared_distance(
    X: npt.NDArray[np.float32], i: npt.NDArray[np.intp], Y: npt.NDArray[np.float32], j: npt.NDArray[np.intp]
) -> npt.NDArray[np.float64]:
    """Fixed-order squared Euclidean distances of the pairs `X[i[k]], Y[j[k]]`; 0 for equal rows."""
    out = np.empty(len(i), np.float64)
    step = chunk_rows(X.shape[1])
    (scratch,) = scratch_arrays(1, len(i), X.shape[1])
    for pairs in blocks(len(i), step):
        difference = scratch[: pairs.stop - pairs.start]
        np.subtract(X.take(i[pairs], axis=0), Y.take(j[pairs], axis=0), out=difference, dtype=np.float64)
        np.multiply(difference, difference, out=difference)
        np.add.reduce(difference, axis=1, out=out[pairs])
    return out


def normalize(
    X: npt.NDArray[Any], *, out: npt.NDArray[np.float32] | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Scale every row to unit length, computed in float64 and rounded once to float32.

    Any norm that float64 can hold will do, denormal ones too. The bits of a row depend on its values only,
    not on its neighbours and not on whether the same values came as float16, float32 or float64.

    Parameters
    ----------
    X
        (n, D) float16, float32 or float64.
    out
        (n, D) float32 array to write into, which may be X; a new one if None.

    Returns:
    -------
    unit
        (n, D) float32, `out` if given; a row that has a reason is all zeros.
    reason
        (n,) uint8, codes of `Invalid`.

    """
    n, dim = X.shape
    unit = np.empty((n, dim), np.float32) if out is None else out
    reason = np.zeros(n, np.uint8)
    step = chunk_rows(dim)
    scratch, squares = scratch_arrays(2, n, dim)
    low, high = _SAFE_SQUARED_NORM
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        for rows in blocks(n, step):
            count = rows.stop - rows.start
            values = scratch[:count]
            np.copyto(values, X[rows])
            squared = np.add.reduce(np.multiply(values, values, out=squares[:count]), axis=1)
            safe = (squared >= low) & (squared <= high)
            if not safe.all():
                odd = np.flatnonzero(~safe)
                values[odd], squared[odd], reason[rows.start + odd] = _rescue(values[odd])
            np.multiply(values, (1.0 / np.sqrt(squared))[:, None], out=values)
            np.copyto(unit[rows], values, casting="same_kind")
    return unit, reason


def _rescue(
    values: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """Rows of extreme or no norm: rows over their largest element (0 if invalid), squared norms, reasons."""
    reason = np.zeros(len(values), np.uint8)
    largest = np.abs(values).max(axis=1, initial=0.0)
    reason[largest == 0] = Invalid.ZERO
    reason[np.isinf(values).any(axis=1)] = Invalid.INFINITE
    reason[np.isnan(values).any(axis=1)] = Invalid.NAN
    valid = reason == Invalid.OK
    scaled = np.zeros_like(values)
    scaled[valid] = values[valid] / largest[valid, None]
    squared = np.ones(len(values))
    squared[valid] = np.add.reduce(scaled[valid] * scaled[valid], axis=1)
    return scaled, squared, reason
