"""The row sample: parts on disk with a hash and a unit vector a row, and the blocks that k-means reads.

A part holds batches of vectors of one length, in order of their rows' hashes: whoever wants the rows with the smallest
hashes reads the first batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from untwin.storage.columns import decode_vectors
from untwin.storage.files import Storage
from untwin.storage.inputs import naming_file

SAMPLE_SCHEMA = pa.schema([("hash", pa.uint64()), ("length", pa.int32()), ("vector", pa.large_list(pa.float32()))])
_BATCHES = 16
_LEAST_BATCH_BYTES = 256 << 10
"""Into how many batches the rows of a part are divided, if they are not too few for that."""


def sample_batches(
    pieces: Sequence[tuple[NDArray[np.uint64], NDArray[np.float32]]], most_rows: int
) -> Iterator[pa.RecordBatch]:
    """Rows of one length as batches of a sample file, in order of their hashes.

    Args:
        pieces: Hashes (n,) and vectors (n, D).
        most_rows: Of a batch.
    """
    hashes, vectors = zip(*pieces, strict=True)
    dim = vectors[0].shape[1]
    starts = np.cumsum([0] + [len(piece) for piece in hashes])
    joined = np.concatenate(hashes)
    order = np.argsort(joined, kind="stable")
    size = min(most_rows, max(-(-len(order) // _BATCHES), _LEAST_BATCH_BYTES // (4 * dim), 1))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        piece_of = np.searchsorted(starts, rows, side="right") - 1
        matrix = np.empty((len(rows), dim), np.float32)
        for piece in np.unique(piece_of):
            here = piece_of == piece
            matrix[here] = vectors[piece][rows[here] - starts[piece]]
        offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int64) * dim)
        lists = pa.LargeListArray.from_arrays(offsets, pa.array(matrix.reshape(-1)))
        lengths = pa.array(np.full(len(rows), dim, np.int32))
        yield pa.record_batch([pa.array(joined[rows]), lengths, lists], schema=SAMPLE_SCHEMA)


def write_sample(storage: Storage, path: str, batches: Iterator[pa.RecordBatch]) -> None:
    """Write a part of the sample."""
    with storage.writing(path) as sink, pa.ipc.new_file(sink, SAMPLE_SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_hashes(storage: Storage, path: str) -> list[tuple[int, NDArray[np.uint64]]]:
    """The length of the vectors of each batch, and the hashes of its rows, ascending; the vectors are not read."""
    found = []
    with _opened(storage, path, [0, 1]) as reader:
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            # copied: a view would keep the room of the whole batch
            found.append((batch.column("length")[0].as_py(), batch.column("hash").to_numpy().copy()))
    return found


@contextlib.contextmanager
def _opened(storage: Storage, path: str, columns: Sequence[int] | None = None) -> Iterator[Any]:
    """A part to read batches from, or only the columns with certain numbers."""
    options = pa.ipc.IpcReadOptions(included_fields=columns)
    with naming_file(path), storage.open(path) as source, pa.ipc.open_file(source, options=options) as reader:
        yield reader


class SampleBlocks:
    """Blocks of the sample for k-means, read from the disk each time they are asked for, in any process.

    Args:
        storage: Where the parts are.
        paths: The parts.
        n_rows: For each part, how many rows of each batch belong to the sample, from its first one on.
        dim: The length of these vectors.
        block_rows: Rows of a block, which is a run of batches of one part.
    """

    def __init__(
        self, storage: Storage, paths: Sequence[str], n_rows: Sequence[Sequence[int]], dim: int, block_rows: int
    ) -> None:
        self._storage = storage
        self._paths = list(paths)
        self.dim = dim
        batches: list[tuple[int, int, int]] = []
        starts: list[int] = []
        for part, counts in enumerate(n_rows):
            filled = block_rows
            for number, count in enumerate(counts):
                if not count:
                    continue
                if filled + count > block_rows:
                    starts.append(len(batches))
                    filled = 0
                filled += count
                batches.append((part, number, count))
        self._batches = np.array(batches, np.int64).reshape(-1, 3)
        self._bounds = np.array([*starts, len(batches)])
        self.n_rows = int(self._batches[:, 2].sum())

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._bounds) - 1

    def count(self, index: int) -> int:
        """Rows of a block."""
        return int(self._batches[self._bounds[index] : self._bounds[index + 1], 2].sum())

    def block(
        self, index: int, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.uint64]]:
        """Vectors (m, D) and hashes (m,) of rows `start:stop` of a block; only batches with such rows are read."""
        start, stop, _ = slice(start, stop).indices(self.count(index))
        vectors, hashes = np.empty((stop - start, self.dim), np.float32), np.empty(stop - start, np.uint64)
        self.read(index, start, vectors, hashes)
        return vectors, hashes

    def read(self, index: int, start: int, vectors: NDArray[np.float32], hashes: NDArray[np.uint64]) -> None:
        """Fill vectors (m, D) and hashes (m,) with the rows of a block from `start` on."""
        batches = self._batches[self._bounds[index] : self._bounds[index + 1]].tolist()
        first = -start
        with _opened(self._storage, self._paths[batches[0][0]]) as reader:
            for _, number, count in batches:
                lo, hi = max(0, first), min(len(hashes), first + count)
                if lo < hi:
                    batch = reader.get_batch(number)
                    rows = slice(lo - first, hi - first)
                    vectors[lo:hi] = decode_vectors(batch.column("vector"), self.dim).values[rows]
                    hashes[lo:hi] = batch.column("hash").to_numpy()[rows]
                first += count
