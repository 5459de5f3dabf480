"""The rows of an input unit in batches of a useful size, with ids and raw vectors decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from untwin.errors import ChangedInputError
from untwin.storage.columns import check_sound
from untwin.storage.files import Storage, is_remote, read_ahead, redact
from untwin.storage.inputs import InputFormat, Span, naming_file
from untwin.storage.memory import Space, space

_BATCH_BYTES = 3 << 20
"""Rounded up to a power of two, a list column of a batch takes less than the 8 MB that jemalloc gives back at once."""
_REMOTE_READS = 16
_Read = tuple[pa.RecordBatch, bool]
"""Rows, and whether they are held."""


@dataclass(frozen=True)
class RowBatch:
    """Rows that follow each other in the plan's order.

    Attributes:
        first_row: Number of the first.
        columns: Those asked for.
        held: They are part of whole rows that stay in memory for somebody else.
    """

    first_row: int
    columns: pa.RecordBatch
    held: bool = False


def batch_rows(dim: int) -> int:
    """Rows of a batch: 3 MB of float32 vectors."""
    return max(1, _BATCH_BYTES // (4 * max(1, dim)))


def read_rows(
    storage: Storage,
    format_: InputFormat,
    spans: Iterable[Span],
    columns: Sequence[str] | None,
    rows: int,
    *,
    hold: bool = False,
) -> Iterator[RowBatch]:
    """Read spans in order, in batches of about `rows` rows; small files are put together.

    Reading runs in a thread of its own, ahead of the consumer, if there is more than a batch. A batch never mixes rows
    of different schemas.

    Args:
        storage: Access to the files.
        format_: Their format.
        spans: What to read.
        columns: Those wanted; None means whole rows as they are. Where whole rows are held in memory, both come from
            there, and whole rows are let go of.
        rows: Rows of a batch.
        hold: Hold whole rows in memory, as far as there is room, until somebody asks for them. Only for formats whose
            whole rows have all columns.
    """
    spans = list(spans)
    room = space()

    def read_span(span: Span) -> Iterator[_Read]:
        if hold:
            return _not_held(_hold(storage, format_, span, columns or (), rows, room))
        return _held_or_read(storage, format_, span, columns, rows, room)

    def read() -> Iterator[RowBatch]:
        return _coalesced(_read_spans(spans, read_span, rows), rows)

    return read_ahead(read, depth=2) if sum(span.n_rows for span in spans) > rows else read()


def _read_spans(spans: Sequence[Span], read_span: Callable[[Span], Iterator[_Read]], rows: int) -> Iterator[RowBatch]:
    if len(spans) > 1 and is_remote(spans[0].path) and max(span.n_rows for span in spans) <= rows:
        with ThreadPoolExecutor(_REMOTE_READS) as pool:
            for low in range(0, len(spans), 4 * _REMOTE_READS):
                part = spans[low : low + 4 * _REMOTE_READS]
                for span, batches in zip(part, pool.map(lambda span: list(read_span(span)), part), strict=True):
                    yield from _numbered(span, batches)
        return
    for span in spans:
        yield from _numbered(span, read_span(span))


def _hold(
    storage: Storage, format_: InputFormat, span: Span, columns: Sequence[str], rows: int, room: Space
) -> Iterator[pa.RecordBatch]:
    """Read whole rows, piece by piece, and hold them; yields the wanted columns."""
    for piece in span.pieces():
        whole: list[pa.RecordBatch] = []
        for batch in format_.read(storage, piece, None, rows):
            whole.append(batch)
            with naming_file(span.path):
                wanted = batch.select(list(columns))
                check_sound(wanted)
            yield wanted
        room.put(_name(piece), whole, sum(batch.nbytes for batch in whole))


def _held_or_read(
    storage: Storage, format_: InputFormat, span: Span, columns: Sequence[str] | None, rows: int, room: Space
) -> Iterator[_Read]:
    """Rows of a span: pieces that are held from memory, what is between them from the file."""
    first = 0
    for number, piece in enumerate(span.pieces() if room.used else ()):
        whole = room.pop(_name(piece)) if columns is None else room.get(_name(piece))
        if whole is None:
            continue
        if first < number:
            yield from _not_held(format_.read(storage, span.part(first, number), columns, rows))
        yield from ((batch if columns is None else batch.select(list(columns)), True) for batch in whole)
        first = number + 1
    if first < len(span.group_rows):
        yield from _not_held(format_.read(storage, span.part(first, len(span.group_rows)), columns, rows))


def _not_held(batches: Iterable[pa.RecordBatch]) -> Iterator[_Read]:
    return ((batch, False) for batch in batches)


def _name(piece: Span) -> str:
    return f"{piece.path}#{piece.first_group}"


def _numbered(span: Span, batches: Iterable[_Read]) -> Iterator[RowBatch]:
    row = span.first_row
    for batch, held in batches:
        if batch.num_rows:
            yield RowBatch(row, batch, held)
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
