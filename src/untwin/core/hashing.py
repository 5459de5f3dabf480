"""Seeded 64-bit hashes of ids and vectors: the only source of randomness, so that chance follows the row.

Not cryptographic. The same bits on every machine, whatever its byte order.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from untwin.core.vectors import blocks, chunk_rows, scratch_arrays

_U64 = 0xFFFF_FFFF_FFFF_FFFF
_GOLDEN = 0x9E37_79B9_7F4A_7C15
_WORD = 0xD6E8_FEB8_6659_FD93
_STRINGS_PER_STEP = 1 << 13


def mix_seed(seed: int, *salts: int) -> int:
    """Derive a 64-bit seed from a seed and any number of salts (round numbers, purposes)."""
    state = _mix_int(seed & _U64)
    for salt in salts:
        state = _mix_int((state + _GOLDEN + (salt & _U64)) & _U64)
    return state


def hash_integers(values: npt.NDArray[Any], seed: int) -> npt.NDArray[np.uint64]:
    """Hash (n,) int64 or uint64 values (equal bits hash alike) to (n,) uint64; a bijection for each seed."""
    words = np.ascontiguousarray(values).view(np.uint64).reshape(-1)
    out = np.empty(len(words), np.uint64)
    for rows in blocks(len(words), 1 << 14):
        out[rows] = _finish(words[rows] ^ np.uint64(mix_seed(seed)))
    return out


def hash_bytes(data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """Hash the byte strings `data[offsets[k]:offsets[k + 1]]`.

    Parameters
    ----------
    data
        (m,) uint8: all strings, one after the other.
    offsets
        (n + 1,) int64, not decreasing; need not start at 0.
    seed
        Another seed gives another, independent hash.

    Returns:
    -------
    (n,) uint64.

    """
    n = len(offsets) - 1
    out = np.empty(max(n, 0), np.uint64)
    start = np.uint64(mix_seed(seed))
    data = np.ascontiguousarray(data)
    for rows in blocks(n, _STRINGS_PER_STEP):
        bounds = offsets[rows.start : rows.stop + 1]
        low, high = int(bounds[0]), int(bounds[-1])
        padded = np.zeros(high - low + 8, np.uint8)
        padded[:-8] = data[low:high]
        lengths = np.diff(bounds)
        # Longest first: the strings that still have a word k are then a prefix.
        order = None if (lengths == lengths[0]).all() else np.argsort(-lengths, kind="stable")
        begins = (bounds[:-1] - low).astype(np.int64)
        if order is not None:
            lengths, begins = lengths[order], begins[order]
        state = _hash_words(padded, begins, lengths.astype(np.int64), start)
        if order is None:
            out[rows] = state
        else:
            out[rows.start + order] = state
    return out


def _hash_words(
    padded: npt.NDArray[np.uint8],
    begins: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    start: np.uint64,
) -> npt.NDArray[np.uint64]:
    """Hash strings that are ordered by descending length; `padded` has 8 bytes behind the last string."""
    words = np.ndarray((len(padded) - 7,), np.dtype("<u8"), padded, strides=(1,))
    state = lengths.astype(np.uint64) * np.uint64(_GOLDEN) ^ start
    n_words = (lengths + 7) >> 3
    unused_bits = ((-lengths) & 7).astype(np.uint64) << np.uint64(3)
    descending = -n_words
    at = begins.copy()
    for k in range(int(n_words[0]) if len(lengths) else 0):
        active = int(np.searchsorted(descending, -k, side="left"))
        last_from = int(np.searchsorted(descending[:active], -(k + 1), side="left"))
        word = words[at[:active]].astype(np.uint64, copy=False)
        # The last word of a string: shift the bytes that belong to the next one out.
        shift = unused_bits[last_from:active]
        word[last_from:] = (word[last_from:] << shift) >> shift
        part = state[:active]
        np.bitwise_xor(part, word, out=part)
        np.bitwise_xor(part, np.right_shift(part, np.uint64(32), out=word), out=part)
        np.multiply(part, np.uint64(_WORD), out=part)
        np.bitwise_xor(part, np.right_shift(part, np.uint64(29), out=word), out=part)
        at[:active] += 8
    return _finish(state)


def hash_rows(X: npt.NDArray[np.float32], seed: int) -> npt.NDArray[np.uint64]:
    """Hash the bits of each row of `X`, (n, D) float32 C-contiguous, to (n,) uint64; 0.0 and -0.0 hash alike.

    Multilinear hashing: Lemire & Kaser, "Strongly universal string hashing is fast", Computer Journal 57(11),
    2014, section 3, on pairs of elements, with odd 64-bit weights, more mixing per word and a final mix.
    """
    n, dim = X.shape
    out = np.empty(n, np.uint64)
    n_words = (dim + 1) // 2
    weights = hash_integers(np.arange(1, n_words + 1, dtype=np.int64), mix_seed(seed, 1)) | np.uint64(1)
    scratch = scratch_arrays(3, n, n_words).view(np.uint64)
    for rows in blocks(n, chunk_rows(n_words)):
        words, shifted, pairs = scratch[:, : rows.stop - rows.start]
        block = words.view(np.float32)
        np.add(X[rows], np.float32(0.0), out=block[:, :dim])  # -0.0 + 0.0 is 0.0
        block[:, dim:] = 0
        if sys.byteorder == "big":
            words = words << np.uint64(32) | words >> np.uint64(32)
        # A product passes differences upwards only (two flipped signs would cancel): fold before and after.
        np.bitwise_xor(words, np.right_shift(words, np.uint64(29), out=shifted), out=pairs)
        np.multiply(pairs, weights, out=pairs)
        np.bitwise_xor(pairs, np.right_shift(pairs, np.uint64(32), out=shifted), out=pairs)
        out[rows] = _finish(np.add.reduce(pairs, axis=1) ^ np.uint64(mix_seed(seed, 2)))
    return out


def uniform(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Hashes as numbers in [0, 1), from their upper 53 bits; (n,) float64."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _finish(h: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finish in place as splitmix64 does (Steele, Lea & Flood, "Fast splittable PRNGs", OOPSLA 2014)."""
    h += np.uint64(_GOLDEN)
    h ^= h >> np.uint64(30)
    h *= np.uint64(0xBF58_476D_1CE4_E5B9)
    h ^= h >> np.uint64(27)
    h *= np.uint64(0x94D0_49BB_1331_11EB)
    h ^= h >> np.uint64(31)
    return h


def _mix_int(value: int) -> int:
    """`_finish` for one Python integer."""
    value = (value + _GOLDEN) & _U64
    value = ((value ^ (value >> 30)) * 0xBF58_476D_1CE4_E5B9) & _U64
    value = ((value ^ (value >> 27)) * 0x94D0_49BB_1331_11EB) & _U64
    return value ^ (value >> 31)
