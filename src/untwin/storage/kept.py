"""Writing the rows that stay, in the format that they came in."""

from __future__ import annotations

import json
import posixpath
from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from untwin.storage.files import Storage
from untwin.storage.inputs import JsonLinesFormat, NpyFormat, naming_file

_ROW_GROUP_BYTES = 32 << 20


class KeptWriter(ABC):
    """Writes rows in order to one output file, or to a few where schemas cannot be united.

    Args:
        storage: Where to.
        path: Final path; without an ending it gets that of the format.
        source_path: An input file whose encoding is taken over.
        n_expected: Rows that will be written, for formats that say so at their beginning.
    """

    def __init__(self, storage: Storage, path: str, source_storage: Storage, source_path: str, n_expected: int) -> None:
        self._storage, self._path = storage, path
        self._source_storage, self._source_path = source_storage, source_path
        self._n_expected = n_expected
        self._stack = ExitStack()
        self.files: list[str] = []
        self.n_rows = 0

    @abstractmethod
    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows."""

    def finish(self) -> None:
        """Write what is held back, and give the files their names."""
        self._stack.close()

    def __enter__(self) -> KeptWriter:
        """Use as a context manager; `finish` must be called inside."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abandon files that are not finished."""
        self._stack.__exit__(kind, error, trace)


class ParquetKept(KeptWriter):
    """Parquet with the codec of the input; vectors without dictionary or statistics."""

    def __init__(self, storage: Storage, path: str, source_storage: Storage, source_path: str, n_expected: int) -> None:
        super().__init__(storage, path, source_storage, source_path, n_expected)
        self._schema: pa.Schema | None = None
        self._held: list[pa.RecordBatch] = []
        self._held_bytes = 0
        self._writer: pq.ParquetWriter | None = None

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows; rows that have other columns or types than those before may start another file."""
        if self._schema is None or not batch.schema.equals(self._schema):
            self._change_schema(batch.schema)
        self._held.append(batch)
        self._held_bytes += batch.nbytes
        self.n_rows += batch.num_rows
        if self._held_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write what is held back; an input without a row that stays gives an empty file."""
        if self._schema is None:
            with naming_file(self._source_path), self._source_storage.open(self._source_path) as source:
                self._schema = _portable(pq.read_schema(source))
        self._flush()
        self._close()
        super().finish()

    def _change_schema(self, schema: pa.Schema) -> None:
        schema = _portable(schema)
        if self._schema is not None:
            united = None
            if self._writer is None:
                try:
                    united = pa.unify_schemas([self._schema, schema])
                except pa.ArrowException:
                    united = None
            elif _fits(schema, self._schema):
                united = self._schema
            if united is not None:
                self._schema = united
                return
            self._flush()
            self._close()
        self._schema = schema

    def _flush(self) -> None:
        if self._writer is None:
            self._open()
        assert self._writer is not None
        if self._held:
            if all(batch.schema.equals(self._schema) for batch in self._held):
                table = pa.Table.from_batches(self._held, self._schema)
            else:
                tables = [pa.Table.from_batches([batch]) for batch in self._held]
                table = pa.concat_tables(tables, promote_options="default")
            if not table.schema.equals(self._schema):
                missing = [field for field in self._schema or () if field.name not in table.column_names]
                for field in missing:
                    table = table.append_column(field, pa.nulls(table.num_rows, field.type))
                table = table.select([field.name for field in self._schema or ()]).cast(self._schema)
            self._writer.write_table(table)
        self._held, self._held_bytes = [], 0

    def _open(self) -> None:
        stem, ending = posixpath.splitext(self._path)
        # "_" sorts behind ".", so that the order of the names is that of the rows
        more = f"_{len(self.files):05d}" if self.files else ""
        path = f"{stem}{more}{ending or '.parquet'}"
        with naming_file(self._source_path), self._source_storage.open(self._source_path) as source:
            codec, encoded = _encoding(pq.read_metadata(source))
        sink = self._stack.enter_context(self._storage.writing(path, durable=True))
        self._writer = pq.ParquetWriter(
            sink,
            self._schema,
            compression=codec,
            use_dictionary=encoded or False,
            write_statistics=encoded or False,
        )
        self.files.append(path)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._stack.close()


def _fits(schema: pa.Schema, target: pa.Schema) -> bool:
    """Whether rows of one schema can be written under another without a change of any value."""
    try:
        return bool(pa.unify_schemas([target, schema]).equals(target))
    except pa.ArrowException:
        return False


def _encoding(metadata: pq.FileMetaData) -> tuple[str, list[str]]:
    """Codec of the first column chunk, and the columns that dictionaries and statistics are good for."""
    codec = "snappy"
    if metadata.num_row_groups and metadata.num_columns:
        name = metadata.row_group(0).column(0).compression.lower()
        codec = {"uncompressed": "none", "lz4_raw": "lz4"}.get(name, name)
    leaves = [metadata.schema.column(i) for i in range(metadata.num_columns)]
    numbers = [
        leaf.path for leaf in leaves if leaf.physical_type in ("FLOAT", "DOUBLE") or leaf.logical_type.type == "FLOAT16"
    ]
    return codec, [leaf.path for leaf in leaves if leaf.path not in numbers]


def _portable(schema: pa.Schema) -> pa.Schema:
    """Drop what the schema's metadata say about the number of rows (pandas' range index)."""
    metadata = dict(schema.metadata or {})
    if b"pandas" in metadata:
        with suppress(ValueError, TypeError, KeyError):  # no use to anybody, and no harm, if it is not pandas' own
            described = json.loads(metadata[b"pandas"])
            described["index_columns"] = [name for name in described["index_columns"] if isinstance(name, str)]
            metadata[b"pandas"] = json.dumps(described).encode()
    return schema.with_metadata(metadata or None)


class LinesKept(KeptWriter):
    """JSON lines, verbatim."""

    def __init__(self, storage: Storage, path: str, source_storage: Storage, source_path: str, n_expected: int) -> None:
        super().__init__(storage, path, source_storage, source_path, n_expected)
        ending = posixpath.splitext(source_path)[1]
        known = ending if ending in JsonLinesFormat.suffixes else JsonLinesFormat.suffixes[0]
        name = path if posixpath.splitext(path)[1] else path + known
        self._sink = self._stack.enter_context(storage.writing(name, durable=True))
        self.files.append(name)

    def write(self, batch: pa.RecordBatch) -> None:
        """Add lines."""
        for line in batch.column("line").to_pylist():
            self._sink.write(line)
            self._sink.write(b"\n")
        self.n_rows += batch.num_rows


class NpyKept(KeptWriter):
    """A pair of `img_emb_….npy` and `metadata_….parquet`."""

    def __init__(self, storage: Storage, path: str, source_storage: Storage, source_path: str, n_expected: int) -> None:
        super().__init__(storage, path, source_storage, source_path, n_expected)
        self._vectors: pa.NativeFile | None = None
        self._metadata: pq.ParquetWriter | None = None

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        column = NpyFormat.embedding_column
        if self._vectors is None or self._metadata is None:
            kind = batch.schema.field(column).type
            self._open(np.dtype(kind.value_type.to_pandas_dtype()), kind.list_size, batch.drop_columns([column]).schema)
        assert self._vectors is not None
        assert self._metadata is not None
        vectors = batch.column(column)
        width = vectors.type.list_size
        flat = vectors.values.slice(vectors.offset * width, len(vectors) * width)
        self._vectors.write(flat.to_numpy(zero_copy_only=True).data)
        self._metadata.write_batch(batch.drop_columns([column]))
        self.n_rows += batch.num_rows

    def finish(self) -> None:
        """Give both files their names."""
        if self._metadata is None:
            found = NpyFormat().metadata_path(self._source_storage, self._source_path)
            with naming_file(found), self._source_storage.open(found) as source:
                self._open(np.dtype(np.float32), 0, pq.read_schema(source))
        assert self._metadata is not None
        self._metadata.close()
        super().finish()

    def _open(self, dtype: np.dtype[Any], dim: int, schema: pa.Schema) -> None:
        folder, _, name = posixpath.splitext(self._path)[0].rpartition("/")
        number = name.rpartition("_")[2].rpartition("-")[2]
        paths = [f"{folder}/img_emb_{number}.npy", f"{folder}/metadata_{number}.parquet"]
        self._vectors, sink = (self._stack.enter_context(self._storage.writing(path, durable=True)) for path in paths)
        self._metadata = pq.ParquetWriter(sink, schema)
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (self._n_expected, dim),
        }
        np.lib.format.write_array_header_1_0(self._vectors, header)
        self.files += paths


KEPT_WRITERS: dict[str, type[KeptWriter]] = {"parquet": ParquetKept, "jsonl": LinesKept, "npy": NpyKept}
