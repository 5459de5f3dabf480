"""Vectors in files: for a cluster, or a sample, that is larger than the memory it may use or that others read, too."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from untwin.storage.files import Storage, is_remote

_PIECE_BYTES = 4 << 20
_REMOTE_READS = 8


class VectorFile:
    """Append-only (n, D) float32 rows with their positions, in temporary files that vanish with the object."""

    def __init__(self, folder: str | None, dim: int) -> None:
        self.dim = dim
        self.n_rows = 0
        self._vectors = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._positions = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`

    def append(self, vectors: NDArray[np.float32], positions: NDArray[np.int64]) -> None:
        """Add rows at the end."""
        self._vectors.seek(0, 2)
        self._vectors.write(np.ascontiguousarray(vectors).data)
        self._positions.seek(0, 2)
        self._positions.write(np.ascontiguousarray(positions, dtype=np.int64).data)
        self.n_rows += len(vectors)

    def tiles(self, max_rows: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """All rows in order, at most `max_rows` at a time: (m, D) vectors and (m,) positions."""
        for low in range(0, self.n_rows, max_rows):
            count = min(max_rows, self.n_rows - low)
            yield self._read(low, count), self._read_positions(low, count)

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows by number, in the order given."""
        out = np.empty((len(rows), self.dim), np.float32)
        if not len(rows):
            return out
        self._vectors.flush()
        width = 4 * self.dim
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        breaks = np.flatnonzero(np.concatenate(([True], np.diff(ordered) != 1, [True])))
        for low, high in zip(breaks[:-1].tolist(), breaks[1:].tolist(), strict=True):
            self._vectors.seek(int(ordered[low]) * width)
            data = self._vectors.read((high - low) * width)
            out[order[low:high]] = np.frombuffer(data, np.float32).reshape(high - low, self.dim)
        return out

    def _read(self, low: int, count: int) -> NDArray[np.float32]:
        out = np.empty((count, self.dim), np.float32)
        self._vectors.seek(low * 4 * self.dim)
        self._vectors.readinto(out.reshape(-1).view(np.uint8).data)
        return out

    def _read_positions(self, low: int, count: int) -> NDArray[np.int64]:
        self._positions.seek(low * 8)
        return np.frombuffer(self._positions.read(count * 8), np.int64)

    def close(self) -> None:
        """Give the disk space back."""
        self._vectors.close()
        self._positions.close()

    def __enter__(self) -> VectorFile:
        """Use as a context manager."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


class RankedFile:
    """The rows of a `VectorFile` in rank order."""

    def __init__(self, file: VectorFile, order: NDArray[np.int64]) -> None:
        self._file = file
        self._order = order
        self.n = len(order)
        self.dim = file.dim

    def take(self, lo: int, hi: int) -> NDArray[np.float32]:
        """The vectors ranked `lo` up to `hi`, (hi - lo, D)."""
        return self._file.take(self._order[lo:hi])


@dataclass(frozen=True)
class SharedFile:
    """(n, D) float32 rows in a file that other processes read as well, on any storage; picklable."""

    storage: Storage
    path: str
    n: int
    dim: int

    def write(self, parts: Iterable[NDArray[np.float32]]) -> None:
        """Write (m, D) parts, one below the other."""
        with self.storage.writing(self.path) as sink:
            for part in parts:
                sink.write(part.astype("<f4", order="C", copy=False).tobytes())

    def take(self, lo: int, hi: int) -> NDArray[np.float32]:
        """Rows `lo` to `hi - 1`, (hi - lo, D); from remote storage by a few requests at the same time."""
        out = np.empty((hi - lo, self.dim), np.float32)
        width = 4 * self.dim
        step = max(1, _PIECE_BYTES // width)

        def read(start: int) -> None:
            piece = out[start : start + step]
            data = self.storage.read_range(self.path, (lo + start) * width, piece.nbytes)
            piece[...] = np.frombuffer(data, "<f4").reshape(piece.shape)

        if not is_remote(self.path):
            for start in range(0, hi - lo, step):
                read(start)
            return out
        with ThreadPoolExecutor(_REMOTE_READS) as pool:
            list(pool.map(read, range(0, hi - lo, step)))
        return out


def scratch_folder(path: str, *, remote: bool) -> str | None:
    """A local folder for spools: below `path` if that is local, else the system's folder for temporary files."""
    if remote:
        return None
    Path(path).mkdir(parents=True, exist_ok=True)
    return path
