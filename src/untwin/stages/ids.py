"""Seeded hashes of ids: what the row sample, random ranking and the search for repeated ids go by."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from untwin.core import hash_bytes, hash_integers


def hash_ids(ids: pa.Array, seed: int) -> NDArray[np.uint64]:
    """Seeded 64-bit hash of each id, shape (n,); the same for every width of the same kind of id.

    Null ids get an arbitrary value.
    """
    kind = ids.type
    if pa.types.is_integer(kind):
        wide = pa.uint64() if pa.types.is_uint64(kind) else pa.int64()
        return hash_integers(pc.fill_null(ids, 0).cast(wide).to_numpy(zero_copy_only=False), seed)
    if pa.types.is_fixed_size_binary(kind):
        width = kind.byte_width
        data = np.frombuffer(ids.buffers()[1], np.uint8) if ids.buffers()[1] else np.empty(0, np.uint8)
        offsets = np.arange(ids.offset, ids.offset + len(ids) + 1, dtype=np.int64) * width
        return hash_bytes(data, offsets, seed)
    ids = ids.cast(pa.large_binary())
    _, offset_buffer, data_buffer = ids.buffers()
    if len(ids) == 0:
        return np.empty(0, np.uint64)
    offsets = np.frombuffer(offset_buffer, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer else np.empty(0, np.uint8)
    return hash_bytes(data, offsets, seed)
