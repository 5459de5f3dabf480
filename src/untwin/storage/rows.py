"""The rows of an input unit in batches of a useful size, with ids and raw vectors decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from untwin.errors import ChangedInputError
from untwin.storage.files import Storage, is_remote, read_ahead, redact
from untwin.storage.inputs import InputFormat, Span

_BATCH_BYTES = 4 << 20
_REMOTE_READS = 16


@dataclass(frozen=True)
class RowBatch:
    """Rows that follow each other in the plan's order; the columns are those asked for."""

    first_row: int
    columns: pa.RecordBatch


def batch_rows(dim: int) -> int:
    """Rows of a batch: 4 MB of float32 vectors."""
    return max(1, _BATCH_BYTES // (4 * max(1, dim)))


def read_rows(
    storage: Storage, format_: InputFormat, spans: Iterable[Span], columns: Sequence[str] | None, rows: int
) -> Iterator[RowBatch]:
    """Read spans in order, in batches of about `rows` rows; small files are put together.

    Reading runs in a thread of its own, ahead of the consumer, if there is more than a batch. A batch never mixes rows
    of different schemas.
    """
    spans = list(spans)

    def read() -> Iterator[RowBatch]:
        return _coalesced(_read_spans(storage, format_, spans, columns, rows), rows)

    return read_ahead(read, depth=2) if sum(span.n_rows for span in spans) > rows else read()


def _read_spans(
    storage: Storage, format_: InputFormat, spans: Sequence[Span], columns: Sequence[str] | None, rows: int
) -> Iterator[RowBatch]:
    def small(span: Span) -> list[pa.RecordBatch]:
        return list(format_.read(storage, span, columns, rows))

    if len(spans) > 1 and is_remote(spans[0].path) and max(span.n_rows for span in spans) <= rows:
        with ThreadPoolExecutor(_REMOTE_READS) as pool:
            for low in range(0, len(spans), 4 * _REMOTE_READS):
                part = spans[low : low + 4 * _REMOTE_READS]
                for span, batches in zip(part, pool.map(small, part), strict=True):
                    yield from _numbered(span, batches)
        return
    for span in spans:
        yield from _numbered(span, format_.read(storage, span, columns, rows))


def _numbered(span: Span, batches: Iterable[pa.RecordBatch]) -> Iterator[RowBatch]:
    row = span.first_row
    for batch in batches:
        if batch.num_rows:
            yield RowBatch(row, batch)
        row += batch.num_rows
    if row != span.first_row + span.n_rows:
        raise ChangedInputError(
            f"{redact(span.path)}: {row - span.first_row} rows where the plan counted {span.n_rows}; "
            "the file changed since the run began"
        )


def _coalesced(batches: Iterable[RowBatch], rows: int) -> Iterator[RowBatch]:
    held: list[RowBatch] = []
    n_held = 0
    for batch in batches:
        schema_differs = held and not batch.columns.schema.equals(held[0].columns.schema)
        if held and (schema_differs or n_held + batch.columns.num_rows > rows):
            yield _joined(held)
            held, n_held = [], 0
        held.append(batch)
        n_held += batch.columns.num_rows
    if held:
        yield _joined(held)


def _joined(batches: list[RowBatch]) -> RowBatch:
    if len(batches) == 1:
        return batches[0]
    columns = pa.concat_batches([batch.columns for batch in batches])
    return RowBatch(batches[0].first_row, columns)
