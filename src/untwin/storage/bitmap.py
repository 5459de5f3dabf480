"""A bit for each input row, in the plan's order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 22


def empty_bitmap(n_rows: int) -> NDArray[np.uint8]:
    """All bits clear."""
    return np.zeros((n_rows + 7) // 8, np.uint8)


def set_bits(bitmap: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
    """Set the bits of rows, in any order."""
    byte, bits = _masks(rows)
    bitmap[byte] |= bits


def clear_bits(bitmap: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
    """Clear the bits of rows, in any order."""
    byte, bits = _masks(rows)
    bitmap[byte] &= ~bits


def _masks(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """The bytes that hold the bits of rows, each once, and the rows' bits in them."""
    if rows.size == 0:
        return rows, np.empty(0, np.uint8)
    rows = np.sort(rows)
    byte = rows >> 3
    starts = np.flatnonzero(np.concatenate(([True], byte[1:] != byte[:-1])))
    bits = np.left_shift(1, rows & 7).astype(np.uint8)
    return byte[starts], np.bitwise_or.reduceat(bits, starts)


def get_bits(part: NDArray[np.uint8], first_row: int, n_rows: int) -> NDArray[np.bool_]:
    """The bits of rows `first_row` and on, from the bytes `first_row // 8` and on."""
    skip = first_row % 8
    bits = np.unpackbits(part[: (skip + n_rows + 7) // 8], bitorder="little")
    return bits[skip : skip + n_rows].astype(np.bool_)


def bits_of(bitmap: NDArray[np.uint8], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The bits of rows, in the order given."""
    bits: NDArray[np.uint8] = bitmap[rows >> 3] >> (rows & 7).astype(np.uint8)
    return (bits & 1).astype(np.bool_)


def byte_range(first_row: int, n_rows: int) -> tuple[int, int]:
    """First byte and number of bytes that hold the bits of a range of rows."""
    first = first_row // 8
    return first, (first_row + n_rows + 7) // 8 - first


def counts_before(bitmap: NDArray[np.uint8], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of set bits before each row number; positions must not decrease."""
    counts = np.zeros(len(positions), np.int64)
    done = 0
    for start in range(0, max(1, len(bitmap)), _CHUNK):
        bits = np.unpackbits(bitmap[start : start + _CHUNK], bitorder="little")
        totals = np.concatenate(([0], np.cumsum(bits, dtype=np.int64)))
        low, high = np.searchsorted(positions, [start * 8, start * 8 + len(bits)])
        high = len(positions) if start + _CHUNK >= len(bitmap) else int(high)
        inside = np.minimum(positions[low:high] - start * 8, len(bits))
        counts[low:high] = done + totals[inside]
        done += int(totals[-1])
    return counts
