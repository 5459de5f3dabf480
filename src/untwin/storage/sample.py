"""The row sample: parts on disk with a hash and a unit vector a row, and the blocks that k-means reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from untwin.storage.columns import decode_vectors, list_lengths
from untwin.storage.files import Storage
from untwin.storage.shards import read_batch, write_batches

SAMPLE_SCHEMA = pa.schema([("hash", pa.uint64()), ("vector", pa.large_list(pa.float32()))])


def sample_batch(hashes: NDArray[np.uint64], vectors: NDArray[np.float32]) -> pa.RecordBatch:
    """Rows of one length as a batch of a sample file."""
    n_rows, dim = vectors.shape
    offsets = pa.array(np.arange(n_rows + 1, dtype=np.int64) * dim)
    lists = pa.LargeListArray.from_arrays(offsets, pa.array(vectors.reshape(-1)))
    return pa.record_batch([pa.array(hashes), lists], schema=SAMPLE_SCHEMA)


def write_sample(storage: Storage, path: str, batches: Sequence[pa.RecordBatch]) -> None:
    """Write a part of the sample."""
    write_batches(storage, path, SAMPLE_SCHEMA, batches)


def read_hashes(storage: Storage, path: str, n_batches: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes and vector lengths of a part's rows."""
    hashes, lengths = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for number in range(n_batches):
        batch = read_batch(storage, path, number)
        # copied: a view would keep the batch, and with it its vectors, in memory
        hashes.append(batch.column(0).to_numpy().copy())
        lengths.append(list_lengths(batch.column(1)).copy())
    return np.concatenate(hashes), np.concatenate(lengths)


class SampleBlocks:
    """Blocks of the sample for k-means, read from the disk each time they are asked for.

    Args:
        storage: Where the parts are.
        parts: Path and number of batches of each part.
        dim: Only vectors of this length belong to the sample.
        highest_hash: Only rows with a hash up to this one do.
    """

    def __init__(
        self, storage: Storage, parts: Sequence[tuple[str, int]], dim: int, highest_hash: int, n_rows: int
    ) -> None:
        self._storage = storage
        self._batches = [(path, number) for path, count in parts for number in range(count)]
        self.dim = dim
        self._highest = np.uint64(highest_hash)
        self.n_rows = n_rows

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._batches)

    def block(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.uint64]]:
        """Vectors (m, D) and hashes (m,) of a block."""
        path, number = self._batches[index]
        batch = read_batch(self._storage, path, number)
        hashes = batch.column(0).to_numpy()
        raw = decode_vectors(batch.column(1), self.dim)
        positions = np.arange(len(hashes)) if raw.positions is None else raw.positions
        chosen = hashes[positions] <= self._highest
        return np.ascontiguousarray(raw.values[chosen]), hashes[positions][chosen]
