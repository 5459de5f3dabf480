"""Reading an input unit: which rows can be judged, their unit vectors, and what travels with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from untwin.core import blocks, normalize
from untwin.errors import SchemaError
from untwin.stages.clustering import Clustering
from untwin.stages.tasks import InputTask
from untwin.storage.columns import Reason, decode_vectors
from untwin.storage.files import Storage, redact
from untwin.storage.listing import Listing
from untwin.storage.memory import whole_bytes
from untwin.storage.partitions import ROW
from untwin.storage.rows import RowBatch, read_rows


class VectorsAsRead:
    """Unit vectors of rows that stay in memory as they were read: they are normalised whenever they are taken.

    So vectors need not be held twice, and float16 stays half as large.

    Args:
        pieces: (n, D) each, views of what is held.
        rows: For each piece the rows of it that are meant, ascending.
    """

    def __init__(self, pieces: Sequence[NDArray[Any]], rows: Sequence[NDArray[np.int64]]) -> None:
        self._pieces = pieces
        self._starts = np.cumsum([0] + [len(piece) for piece in pieces])
        self._rows = np.concatenate([start + some for start, some in zip(self._starts[:-1], rows, strict=True)])

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, D)."""
        return len(self._rows), self._pieces[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes besides what is held anyway."""
        return int(self._rows.nbytes)

    def take(self, at: NDArray[np.int64], axis: Literal[0] = 0, /) -> NDArray[np.float32]:
        """The vectors of some rows, (k, D) float32; fastest in ascending order."""
        if (at[1:] < at[:-1]).any():
            order = np.argsort(at)
            out = np.empty((len(at), self.shape[1]), np.float32)
            out[order] = self.take(at[order])
            return out
        rows = self._rows[at]
        raw = np.empty((len(rows), self.shape[1]), self._pieces[0].dtype)
        ends = np.searchsorted(rows, self._starts).tolist()
        for piece, start, low, high in zip(self._pieces, self._starts[:-1], ends[:-1], ends[1:], strict=True):
            if low < high:
                np.take(piece, rows[low:high] - start, axis=0, out=raw[low:high], mode="clip")
        return normalize(raw, out=raw if raw.dtype == np.float32 else None)[0]


@dataclass(frozen=True)
class JudgedRows:
    """Rows that can be judged, in the order of the input.

    Attributes:
        vectors: (m, D) float32, unit length.
        columns: Ids, metadata columns and row numbers, m rows.
        as_read: The same vectors where they are held anyway.
    """

    vectors: NDArray[np.float32]
    columns: pa.Table
    as_read: VectorsAsRead | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes in memory, with the room behind the vectors."""
        return whole_bytes(self.vectors) + int(self.columns.nbytes)


@dataclass(frozen=True)
class _Judged:
    """What comes of a batch: what travels with its vectors, these as they are held, and which of them are judged."""

    side: pa.RecordBatch
    as_read: NDArray[Any] | None
    positions: NDArray[np.int64]


class JudgedUnit:
    """The rows of an input unit, read once: those that can be judged, in parts, and those that cannot.

    Args:
        job: The k-means job.
        task: The unit.
        dim: Wanted length of the vectors.
    """

    def __init__(self, job: Clustering, task: InputTask, dim: int) -> None:
        self._job, self._task, self.dim = job, task, dim
        self._schema = pa.schema(job.carried_fields)
        self._held: list[JudgedRows] | None = None
        self.rejected = RejectedRows(job.listing.id_type)
        self.reasons: list[dict[str, int]] = []

    def parts(self) -> Iterator[JudgedRows]:
        """The rows that can be judged: those held, or a unit's worth of rows at a time as they are read."""
        return self._read() if self._held is None else iter(self._held)

    def hold(self) -> None:
        """Read everything, and keep it for `parts`."""
        self._held = list(self._read())

    @property
    def n_bytes(self) -> int:
        """Bytes that are held."""
        return sum(part.n_bytes for part in self._held or ())

    def _read(self) -> Iterator[JudgedRows]:
        job, task = self._job, self._task
        size = job.batch_rows(self.dim)
        most = max(job.plan.unit_rows, size)
        left = task.n_rows
        vectors = np.empty((0, self.dim), np.float32)
        judged: list[_Judged] = []
        filled = 0
        spans = job.listing.spans(task.first_group, task.end_group, job.groups)
        for batch in read_rows(job.source, job.listing.format, spans, job.fields.names, size):
            for some in blocks(batch.columns.num_rows, size):
                columns = batch.columns.slice(some.start, some.stop - some.start)
                rows = RowBatch(batch.first_row + some.start, columns, batch.held)
                if filled + rows.columns.num_rows > len(vectors):
                    if filled:
                        yield self._part(vectors[:filled], judged)
                    vectors = np.empty((max(min(left, most), rows.columns.num_rows), self.dim), np.float32)
                    judged, filled = [], 0
                judged.append(self._judge(rows, vectors[filled:]))
                filled += judged[-1].side.num_rows
                left -= rows.columns.num_rows
        if filled:
            yield self._part(vectors[:filled], judged)

    def _part(self, vectors: NDArray[np.float32], judged: Sequence[_Judged]) -> JudgedRows:
        as_read = None
        pieces = [one.as_read for one in judged if one.as_read is not None]
        if len(pieces) == len(judged) and len({piece.dtype for piece in pieces}) == 1:
            as_read = VectorsAsRead(pieces, [one.positions for one in judged])
        return JudgedRows(vectors, pa.Table.from_batches([one.side for one in judged], self._schema), as_read)

    def _judge(self, rows: RowBatch, out: NDArray[np.float32]) -> _Judged:
        """Write the unit vectors of the rows that can be judged to `out`."""
        job = self._job
        ids = job.ids(rows)
        raw = decode_vectors(job.embeddings(rows), self.dim)
        reasons = raw.reasons.copy()
        positions = np.arange(len(reasons), dtype=np.int64) if raw.positions is None else raw.positions
        _, reasons[positions] = normalize(raw.values, out=out[: len(positions)])
        if ids.null_count:
            reasons[ids.is_null().to_numpy(zero_copy_only=False)] = Reason.NULL_ID
        wrong = np.flatnonzero(reasons != Reason.OK)
        if len(wrong):
            self.rejected.add(ids.take(pa.array(wrong)), rows.first_row + wrong, reasons[wrong])
            self.reasons.append(count_reasons(reasons))
            good = reasons[positions] == Reason.OK
            positions = positions[good]
            out[: len(positions)] = out[: len(good)][good]
        arrays: list[pa.Array] = []
        for field in self._schema:
            match field.name:
                case job.fields.id_field:
                    column = ids
                case _ if field.name == ROW:
                    column = pa.array(np.arange(rows.first_row, rows.first_row + len(reasons)))
                case _:
                    column = self._cast(rows, field)
            arrays.append(column.take(pa.array(positions)) if len(wrong) else column)
        as_read = raw.values if rows.held and raw.positions is None else None
        return _Judged(pa.record_batch(arrays, schema=self._schema), as_read, positions)

    def _cast(self, rows: RowBatch, field: pa.Field) -> pa.Array:
        column = rows.columns.column(field.name)
        if column.type.equals(field.type):
            return column
        try:
            return column.cast(field.type)
        except pa.ArrowException as error:
            raise SchemaError(
                f"{self._job.place(rows)}: column {field.name!r} is {column.type} where it was {field.type} ({error}); "
                "bring it to one type"
            ) from error


class RejectedRows:
    """Collects rows that are set aside, and writes them as `id`, `file`, `row`, `reason`."""

    def __init__(self, id_type: pa.DataType) -> None:
        self._id_type = id_type
        self._ids: list[pa.Array] = []
        self._rows: list[NDArray[np.int64]] = []
        self._reasons: list[NDArray[np.uint8]] = []

    def add(self, ids: pa.Array, rows: NDArray[np.int64], reasons: NDArray[np.uint8]) -> None:
        """Add rows by their numbers in the plan's order."""
        self._ids.append(ids)
        self._rows.append(rows)
        self._reasons.append(reasons)

    def write(self, storage: Storage, path: str, listing: Listing) -> str:
        """Write them if there are any; returns the path, or nothing."""
        if not self._rows:
            return ""
        rows = np.concatenate(self._rows)
        files, row_in_file = listing.locate(rows)
        reasons = np.concatenate(self._reasons)
        table = pa.table(
            {
                "id": pa.chunked_array(self._ids, self._id_type),
                "file": pa.array([redact(file) for file in files], pa.string()),
                "row": row_in_file,
                "reason": pa.array([Reason(code).text for code in reasons.tolist()], pa.string()),
            }
        )
        with storage.writing(path, durable=True) as sink:
            pq.write_table(table.sort_by([("file", "ascending"), ("row", "ascending")]), sink, compression="zstd")
        return path


def count_reasons(reasons: NDArray[np.uint8]) -> dict[str, int]:
    """How often each reason occurs."""
    codes, counts = np.unique(reasons[reasons != Reason.OK], return_counts=True)
    return {Reason(code).text: count for code, count in zip(codes.tolist(), counts.tolist(), strict=True)}
