"""Input files of every format: what is in them (facts from footers), and their rows in bounded batches."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq

from untwin.errors import DamagedFileError, ParameterError, SchemaError, UntwinError
from untwin.storage.columns import check_sound
from untwin.storage.files import FoundFile, Storage, redact

_CHUNK_BYTES = 16 << 20
_INFERRED_LINES = 100
"""Lines of JSON whose types are found by hand first; to look at all lines takes many times as long."""
PAGE_BUFFER = 1 << 20
"""Bytes that are read at a time from a Parquet column, so that a large row group never lies in memory whole."""


@dataclass(frozen=True)
class FileFacts:
    """What a file holds.

    Attributes:
        schema: The columns that can be read.
        group_rows: Rows of each piece that can be read alone (Parquet row group, chunk of lines or rows).
        group_starts: Position of each piece in the file: a byte for text, a row number otherwise.
        group_bytes: Encoded bytes of each piece.
        problem: Why the file is left out, as without rows; empty for a file that is used.
    """

    schema: pa.Schema
    group_rows: tuple[int, ...]
    group_starts: tuple[int, ...]
    group_bytes: tuple[int, ...]
    problem: str = ""


@dataclass(frozen=True)
class Span:
    """A range of whole pieces of one file.

    Attributes:
        path: The file.
        first_group: Number of the first piece.
        group_rows: Rows of each piece in the range.
        group_starts: Position of each piece in the file.
        end: Where the piece behind the last one begins; the size of the file if there is none.
        size: Bytes of the file.
        first_row: Number of the first row in the plan's order.
        row_in_file: Number of the first row in its file.
    """

    path: str
    first_group: int
    group_rows: tuple[int, ...]
    group_starts: tuple[int, ...]
    end: int
    size: int
    first_row: int
    row_in_file: int

    @property
    def n_rows(self) -> int:
        """Rows in the span."""
        return sum(self.group_rows)

    def part(self, low: int, high: int) -> Span:
        """Its pieces `low` up to `high`, counted from its first."""
        skipped = sum(self.group_rows[:low])
        return Span(
            path=self.path,
            first_group=self.first_group + low,
            group_rows=self.group_rows[low:high],
            group_starts=self.group_starts[low:high],
            end=self.group_starts[high] if high < len(self.group_starts) else self.end,
            size=self.size,
            first_row=self.first_row + skipped,
            row_in_file=self.row_in_file + skipped,
        )

    def pieces(self) -> Iterator[Span]:
        """Its pieces, one by one."""
        return (self.part(number, number + 1) for number in range(len(self.group_rows)))


class InputFormat(Protocol):
    """How files of one format are read."""

    @property
    def name(self) -> str:
        """What `input_filetype` calls it."""
        ...

    @property
    def suffixes(self) -> tuple[str, ...]:
        """File name endings."""
        ...

    def select(self, files: list[FoundFile]) -> list[FoundFile]:
        """Keep the files of this format, out of those found below a folder."""
        ...

    def inspect(self, storage: Storage, file: FoundFile) -> FileFacts:
        """Read a file's facts without its rows."""
        ...

    def schema(self, storage: Storage, span: Span) -> pa.Schema:
        """The columns that a span has, without reading all of it."""
        ...

    def read(
        self, storage: Storage, span: Span, columns: Sequence[str] | None, batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        """Read the rows of a span in order; `columns=None` means all columns, exactly as they are."""
        ...


@contextlib.contextmanager
def naming_file(path: str) -> Iterator[None]:
    """Turn a reader's error into one that names the file."""
    try:
        yield
    except (UntwinError, GeneratorExit):
        raise
    except MemoryError as error:
        raise DamagedFileError(
            f"{redact(path)}: cannot be read: it asks for more memory than there is ({error}); it is damaged, or this "
            "machine is too small for it"
        ) from error
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DamagedFileError(
            f"{redact(path)}: cannot be read ({text}); repair or remove the file, then run again"
        ) from error


def _named(schema: pa.Schema) -> pa.Schema:
    """The schema, whose columns have names: a damaged one may be no text, which is a ValueError here."""
    _ = schema.names
    return schema


class ParquetFormat:
    """Parquet files; a piece is a row group."""

    name = "parquet"
    suffixes = (".parquet", ".parq", ".pq")

    def select(self, files: list[FoundFile]) -> list[FoundFile]:
        """Keep files by their suffix."""
        return [file for file in files if file.path.lower().endswith(self.suffixes)]

    def inspect(self, storage: Storage, file: FoundFile) -> FileFacts:
        """Read the footer."""
        with naming_file(file.path), storage.open(file.path, file.size) as source, pq.ParquetFile(source) as parquet:
            metadata = parquet.metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            rows = tuple(group.num_rows for group in groups)
            _check_counts(file.path, metadata.num_rows, groups)
            starts = (0, *itertools.accumulate(rows))[: len(rows)]
            sizes = (file.size,) if len(groups) == 1 else tuple(max(0, group.total_byte_size) for group in groups)
            if len(groups) > 1 and sum(sizes):
                sizes = tuple(size * file.size // sum(sizes) for size in sizes)
            return FileFacts(_named(parquet.schema_arrow), rows, tuple(starts), sizes)

    def schema(self, storage: Storage, span: Span) -> pa.Schema:
        """Read the footer."""
        with naming_file(span.path), storage.open(span.path, span.size) as source:
            return _named(pq.read_schema(source))

    def read(
        self, storage: Storage, span: Span, columns: Sequence[str] | None, batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        """Decode row groups; a large one page by page, so that it never lies in memory whole."""
        groups = list(range(span.first_group, span.first_group + len(span.group_rows)))
        small = span.n_rows <= batch_rows
        names = None if columns is None else list(columns)
        with (
            naming_file(span.path),
            storage.open(span.path, span.size) as source,
            pq.ParquetFile(
                source, pre_buffer=False, buffer_size=0 if small else PAGE_BUFFER, page_checksum_verification=True
            ) as parquet,
        ):
            if small:
                table = parquet.read_row_groups(groups, columns=names, use_threads=False)
                _expect_rows(span, table.num_rows)
                check_sound(table, values=names is not None)
                yield from table.to_batches()
                return
            seen = 0
            for batch in parquet.iter_batches(batch_rows, row_groups=groups, columns=names, use_threads=False):
                seen += batch.num_rows
                check_sound(batch, values=names is not None)
                yield batch
            _expect_rows(span, seen)


def _check_counts(path: str, n_rows: int, groups: Sequence[pq.RowGroupMetaData]) -> None:
    """Raise DamagedFileError if the row counts of a footer contradict each other."""
    found = [group.num_rows for group in groups]
    if min(found, default=0) < 0 or sum(found) != n_rows:
        raise DamagedFileError(
            f"{redact(path)}: its footer says {n_rows} rows, its row groups {found[:5]}; it is damaged"
        )
    for group in groups:
        # a list has at least one value a row, if only a null
        if group.num_columns and group.column(0).num_values < group.num_rows:
            raise DamagedFileError(
                f"{redact(path)}: a row group of {group.num_rows} rows has a column of {group.column(0).num_values} "
                "values; the file is damaged"
            )


def _expect_rows(span: Span, found: int) -> None:
    if found != span.n_rows:
        raise DamagedFileError(
            f"{redact(span.path)}: {found} rows where its footer says {span.n_rows}; the file is damaged"
        )


class JsonLinesFormat:
    """One JSON object a line; a piece is some megabytes of whole lines. Blank lines are not rows."""

    name = "jsonl"
    suffixes = (".jsonl", ".ndjson")

    def select(self, files: list[FoundFile]) -> list[FoundFile]:
        """Keep files by their suffix."""
        return [file for file in files if file.path.lower().endswith(self.suffixes)]

    def inspect(self, storage: Storage, file: FoundFile) -> FileFacts:
        """Count the lines, piece by piece; the schema comes from the first piece."""
        rows: list[int] = []
        starts: list[int] = []
        schema = pa.schema([])
        with naming_file(file.path):
            for start, lines in self._chunks(storage, file.path, file.size, 0, file.size):
                if not rows:
                    schema = _named(_schema_of(lines[:1000]))
                starts.append(start)
                rows.append(len(lines))
        sizes = tuple(np.diff([*starts, file.size]).tolist())
        return FileFacts(schema, tuple(rows), tuple(starts), sizes)

    def schema(self, storage: Storage, span: Span) -> pa.Schema:
        """Parse the first lines."""
        with naming_file(span.path):
            for _, lines in self._chunks(storage, span.path, span.size, span.group_starts[0], span.end):
                return _named(_schema_of(lines[:_INFERRED_LINES]))
        return pa.schema([])

    def read(
        self, storage: Storage, span: Span, columns: Sequence[str] | None, batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        """Parse lines; with `columns=None` the only column is `line`, the verbatim bytes."""
        row = span.row_in_file
        with naming_file(span.path):
            for _, lines in self._chunks(storage, span.path, span.size, span.group_starts[0], span.end):
                for low in range(0, len(lines), batch_rows):
                    part = lines[low : low + batch_rows]
                    if columns is None:
                        yield pa.record_batch({"line": pa.array(part, pa.large_binary())})
                    else:
                        table = self._parse(part, columns, span.path, row)
                        yield from table.combine_chunks().to_batches()
                    row += len(part)

    def _parse(self, lines: list[bytes], columns: Sequence[str], path: str, first_row: int) -> pa.Table:
        try:
            table = _parse_lines(lines, columns)
        except pa.ArrowInvalid as error:
            for offset, line in enumerate(lines):
                try:
                    json.loads(line)
                except ValueError as reason:
                    raise DamagedFileError(
                        f"{redact(path)}: row {first_row + offset} is not JSON ({reason})"
                    ) from error
            raise
        table.validate(full=True)  # the parser takes text as it is
        if table.num_rows != len(lines):
            raise DamagedFileError(f"{redact(path)}: rows {first_row} and after: more than one object on a line")
        return table

    @staticmethod
    def _chunks(storage: Storage, path: str, size: int, start: int, end: int) -> Iterator[tuple[int, list[bytes]]]:
        """Yield (position, non-blank lines) of pieces that end at line ends."""
        with storage.open(path, size) as source:
            source.seek(start)
            position, rest = start, b""
            while position + len(rest) < end:
                block = source.read(min(_CHUNK_BYTES, end - position - len(rest)))
                if not block:
                    break
                data = rest + block
                last = position + len(data) >= end
                cut = len(data) if last else data.rfind(b"\n") + 1
                lines = [line for line in data[:cut].split(b"\n") if line.strip()]
                if lines:
                    yield position, lines
                position, rest = position + cut, data[cut:]
            if rest.strip():
                yield position, [rest]


def _parse_lines(lines: list[bytes], columns: Sequence[str] | None) -> pa.Table:
    content = io.BytesIO(b"\n".join(lines))
    options = pj.ReadOptions(use_threads=False, block_size=max(1 << 20, content.getbuffer().nbytes + 1))
    try:
        table = pj.read_json(content, read_options=options)
        types = (
            table.schema
            if columns is None
            else [table.schema.field(name) for name in columns if name in table.column_names]
        )
        # text that looks like a date stays text; and Arrow loses a null at the beginning of the first list with a
        # value, unless it is told the type
        told = [(field.name, pa.string()) for field in types if pa.types.is_timestamp(field.type)]
        told += [(field.name, field.type) for field in types if not _is_sound(table.column(field.name))]
        if told:
            content.seek(0)
            explicit = pj.ParseOptions(explicit_schema=pa.schema(told))
            table = pj.read_json(content, read_options=options, parse_options=explicit)
    except pa.ArrowInvalid as error:
        # a column, wanted or not, has values of different types: read the wanted ones, with types found by hand
        if columns is None:
            raise
        for some in (lines[:_INFERRED_LINES], lines):
            schema = _infer_types(some, columns, error)
            if len(schema) < len(columns) and len(some) < len(lines):
                continue  # these lines do not tell all types
            content.seek(0)
            only = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
            try:
                table = pj.read_json(content, read_options=options, parse_options=only)
                break
            except pa.ArrowInvalid:
                if len(some) == len(lines):
                    raise
    if columns is None:
        return _floats(table)
    missing = [name for name in columns if name not in table.column_names]
    for name in missing:
        table = table.append_column(name, pa.nulls(table.num_rows))
    return _floats(table.select(list(columns)))


def _is_sound(column: pa.ChunkedArray) -> bool:
    try:
        column.validate()
    except pa.ArrowInvalid:
        return False
    return True


def _schema_of(lines: list[bytes]) -> pa.Schema:
    try:
        return _parse_lines(lines, None).schema
    except pa.ArrowInvalid as error:
        return _infer_types(lines, None, error)


def _infer_types(lines: list[bytes], columns: Sequence[str] | None, error: Exception) -> pa.Schema:
    """Types of JSON columns; a union where values differ, if all columns are asked for. Raises `error` if not JSON."""
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError:
        raise error from None
    if not all(isinstance(row, dict) for row in rows):
        raise error
    names = dict.fromkeys(name for row in rows for name in row) if columns is None else columns
    fields = []
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        try:
            found = pa.array(values).type
            if pa.types.is_list(found) and pa.types.is_integer(found.value_type):
                found = pa.list_(pa.float64())
        except (pa.ArrowException, OverflowError):
            if columns is not None:
                raise error from None
            kinds = sorted({type(value).__name__ for value in values})
            found = pa.sparse_union([pa.field(kind, pa.null()) for kind in kinds])
        if values or columns is None:
            fields.append(pa.field(name, found))
    return pa.schema(fields)


def _floats(table: pa.Table) -> pa.Table:
    """JSON numbers without a point are read as integers; an embedding of such is one of floats."""
    for index, column in enumerate(table.schema):
        if pa.types.is_list(column.type) and (
            pa.types.is_integer(column.type.value_type) or pa.types.is_null(column.type.value_type)
        ):
            floats = table.column(index).cast(pa.list_(pa.float64()))
            table = table.set_column(index, column.name, floats)
    return table


class NpyFormat:
    """CLIP retrieval's pairs: `img_emb_N.npy` (n, D) beside, or in a folder beside, `metadata_N.parquet`."""

    name = "npy"
    suffixes = (".npy",)
    embedding_column = "embedding"
    _number = re.compile(r"_(\d+)\.npy$")

    def select(self, files: list[FoundFile]) -> list[FoundFile]:
        """Keep image embeddings, or all `.npy` files if none is called so."""
        arrays = [file for file in files if file.path.endswith(".npy") and self._number.search(file.path)]
        named = [file for file in arrays if "img_emb" in file.path.rpartition("/")[2]]
        return named or arrays

    def metadata_path(self, storage: Storage, path: str) -> str:
        """Find the metadata of an embedding file."""
        match = self._number.search(path)
        folder, _, _ = path.rpartition("/")
        name = f"metadata_{match.group(1) if match else ''}.parquet"
        candidates = [f"{folder}/{name}", f"{folder.rpartition('/')[0]}/metadata/{name}"]
        for candidate in candidates:
            if storage.exists(candidate):
                return candidate
        raise DamagedFileError(f"{redact(path)}: its {name} is missing (looked for {', '.join(candidates)})")

    def _header(self, storage: Storage, path: str, size: int) -> tuple[tuple[int, int], np.dtype[Any], int]:
        with storage.open(path, size) as source:
            try:
                version = np.lib.format.read_magic(source)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(source)
            except Exception as error:  # a header is a Python literal: what its parser says of damage has no end
                raise ValueError(f"its header is damaged: {error}") from error
            if dtype.hasobject:
                raise SchemaError(
                    f"{redact(path)}: holds pickled Python objects, which are never loaded; wanted are numbers"
                )
            if len(shape) != 2 or fortran or dtype.kind != "f" or dtype.itemsize > 8 or dtype.byteorder == ">":
                raise SchemaError(
                    f"{redact(path)}: holds {dtype} of shape {shape}"
                    f"{' in Fortran order' if fortran else ''}; wanted is a C-ordered (rows, dimension) array of "
                    "float16, float32 or float64"
                )
            return (shape[0], shape[1]), dtype, source.tell()

    def inspect(self, storage: Storage, file: FoundFile) -> FileFacts:
        """Read the array's header and the metadata's footer."""
        with naming_file(file.path):
            (n_rows, dim), dtype, offset = self._header(storage, file.path, file.size)
            if file.size != offset + n_rows * dim * dtype.itemsize:
                raise DamagedFileError(
                    f"{redact(file.path)}: {file.size} bytes where its header says "
                    f"{offset + n_rows * dim * dtype.itemsize}; the file is damaged"
                )
        metadata_path = self.metadata_path(storage, file.path)
        with (
            naming_file(metadata_path),
            storage.open(metadata_path) as source,
            pq.ParquetFile(source) as parquet,
        ):
            schema, metadata_rows = _named(parquet.schema_arrow), parquet.metadata.num_rows
        if metadata_rows != n_rows:
            raise DamagedFileError(
                f"{redact(file.path)}: {n_rows} rows, but {redact(metadata_path)} has {metadata_rows}"
            )
        vectors = pa.list_(pa.from_numpy_dtype(dtype), dim)
        schema = schema.append(pa.field(self.embedding_column, vectors))
        size = max(1, _CHUNK_BYTES // max(1, dim * dtype.itemsize))
        starts = tuple(range(0, n_rows, size))
        rows = tuple(min(size, n_rows - start) for start in starts)
        return FileFacts(schema, rows, starts, tuple(count * dim * dtype.itemsize for count in rows))

    def schema(self, storage: Storage, span: Span) -> pa.Schema:
        """Read the metadata's footer; the vectors are not among these columns."""
        path = self.metadata_path(storage, span.path)
        with naming_file(path), storage.open(path) as source:
            return _named(pq.read_schema(source))

    def read(
        self, storage: Storage, span: Span, columns: Sequence[str] | None, batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        """Read rows of the array and, beside them, rows of the metadata."""
        wanted = None if columns is None else [name for name in columns if name != self.embedding_column]
        with_vectors = columns is None or self.embedding_column in columns
        with naming_file(span.path):
            (_, dim), dtype, offset = self._header(storage, span.path, span.size)
            with storage.open(span.path, span.size) as source:
                row = span.row_in_file
                for metadata in self._metadata(storage, span, wanted, batch_rows):
                    arrays = dict(zip(metadata.schema.names, metadata.columns, strict=True))
                    if with_vectors:
                        width = dim * dtype.itemsize
                        data = source.read_at(metadata.num_rows * width, offset + row * width)
                        flat = pa.array(np.frombuffer(data, dtype))
                        arrays[self.embedding_column] = pa.FixedSizeListArray.from_arrays(flat, dim)
                    row += metadata.num_rows
                    order = arrays if columns is None else {name: arrays[name] for name in columns}
                    yield pa.record_batch(order)

    def _metadata(
        self, storage: Storage, span: Span, columns: list[str] | None, batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        low, high = span.row_in_file, span.row_in_file + span.n_rows
        position = 0
        path = self.metadata_path(storage, span.path)
        with (
            naming_file(path),
            storage.open(path) as source,
            pq.ParquetFile(
                source, pre_buffer=False, buffer_size=PAGE_BUFFER, page_checksum_verification=True
            ) as parquet,
        ):
            full = columns is not None
            if columns == []:
                columns = parquet.schema_arrow.names[:1]
            for batch in parquet.iter_batches(batch_rows, columns=columns, use_threads=False):
                check_sound(batch, values=full)
                start, end = max(low, position), min(high, position + batch.num_rows)
                if start < end:
                    yield batch.slice(start - position, end - start)
                position += batch.num_rows
                if position >= high:
                    return
            raise DamagedFileError(f"{redact(path)}: {position} rows where its footer says more; the file is damaged")


FORMATS: dict[str, InputFormat] = {
    format_.name: format_ for format_ in (ParquetFormat(), JsonLinesFormat(), NpyFormat())
}


def input_format(name: str) -> InputFormat:
    """Look a format up by its name."""
    if name not in FORMATS:
        raise ParameterError(f"input_filetype is {name!r}; known are {', '.join(FORMATS)}")
    return FORMATS[name]
