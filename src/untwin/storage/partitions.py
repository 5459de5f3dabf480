"""Partitions by cluster: `centroid=K/*.parquet`, ours and NeMo Curator's, and the results beside them."""

from __future__ import annotations

import contextlib
import contextvars
import io
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from untwin.errors import InputNotFoundError, SchemaError
from untwin.storage.columns import embedding_dim, half_floats
from untwin.storage.files import FoundFile, Storage, join, redact
from untwin.storage.inputs import PAGE_BUFFER, naming_file

ROW = "_row"
CENTROIDS = "_centroids.npy"
_FOLDER = re.compile(r"^centroid=(\d+)$")
_held: contextvars.ContextVar[dict[str, pa.Table] | None] = contextvars.ContextVar("untwin-partitions", default=None)


def partition_path(folder: str, centroid: int, part: int = 0) -> str:
    """The path of a file of a cluster."""
    return join(folder, f"centroid={centroid}", f"part-{part}.parquet")


def result_path(folder: str, centroid: int) -> str:
    """The path of a cluster's pairwise results."""
    return join(folder, f"cluster_{centroid}.parquet")


def write_partition(storage: Storage, path: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write a cluster's rows, a row group (or more) for each table; vectors plain. Returns the number of rows."""
    n_rows = 0
    encoded = [field.name for field in schema if field.name != "embedding" and not pa.types.is_nested(field.type)]
    with (
        storage.writing(path) as sink,
        pq.ParquetWriter(
            sink,
            schema,
            compression="none",
            use_dictionary=False,
            write_statistics=encoded,
            store_schema=True,
        ) as writer,
    ):
        for table in tables:
            writer.write_table(table)
            n_rows += table.num_rows
    return n_rows


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """Let `hold` keep what a unit of work writes until the unit is done."""
    token = _held.set({})
    try:
        yield
    finally:
        _held.reset(token)


def hold(tables: dict[str, pa.Table]) -> None:
    """Keep the partitions that the unit at work has just written, for its stage that reads them next."""
    held = _held.get()
    if held is not None:
        held.clear()
        held.update(tables)


def read_partition(storage: Storage, paths: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a cluster, from memory if the unit at work has just written them."""
    held = (_held.get() or {}).pop(paths[0], None) if len(paths) == 1 else None
    if held is not None:
        _require(held.schema, columns or (), paths[0])
        return held if columns is None else held.select(list(columns))
    parts = []
    for path in paths:
        with naming_file(path), storage.open(path) as source, pq.ParquetFile(source) as parquet:
            _require(parquet.schema_arrow, columns or (), path)
            parts.append(parquet.read(columns=None if columns is None else list(columns), use_threads=False))
    return concat_tables(parts, paths[0])


def concat_tables(tables: Sequence[pa.Table], path: str) -> pa.Table:
    """Put the rows of several files together; the same values in columns of different widths are one column.

    Args:
        tables: At least one.
        path: One of the files, for messages.

    Raises:
        SchemaError: A column means different things in different files.
    """
    if len(tables) == 1:
        return tables[0]
    if any(table.schema.types != tables[0].schema.types for table in tables):
        tables = [_without_dictionaries(table) for table in tables]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        folder = path.rpartition("/")[0]
        raise SchemaError(f"{redact(folder)}: its files do not fit together ({error})") from error


def _without_dictionaries(table: pa.Table) -> pa.Table:
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            plain = field.with_type(field.type.value_type)
            table = table.set_column(index, plain, table.column(index).cast(plain.type))
    return table


def iterate_partition(
    storage: Storage, paths: Sequence[str], columns: Sequence[str], batch_rows: int
) -> Iterator[pa.RecordBatch]:
    """The rows of a cluster in bounded batches, in the order in which `read_partition` gives them."""
    for path in paths:
        with (
            naming_file(path),
            storage.open(path) as source,
            pq.ParquetFile(source, pre_buffer=False, buffer_size=PAGE_BUFFER) as parquet,
        ):
            _require(parquet.schema_arrow, columns, path)
            yield from parquet.iter_batches(batch_rows, columns=list(columns), use_threads=False)


def _require(schema: pa.Schema, columns: Sequence[str], path: str) -> None:
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise SchemaError(
            f"{redact(path)}: no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, schema.names))}"
        )


def find_partitions(storage: Storage, folders: Sequence[str]) -> dict[int, list[FoundFile]]:
    """The data files of each cluster below k-means output folders, sorted by path.

    Raises:
        InputNotFoundError: There is no `centroid=K` folder with a Parquet file in it.
    """
    found: dict[int, list[FoundFile]] = {}
    for folder in folders:
        if not storage.is_folder(folder):
            raise InputNotFoundError(f"{redact(folder)}: no such folder")
        for file in storage.find(folder):
            parts = file.path[len(folder) :].strip("/").split("/")
            match = _FOLDER.match(parts[-2]) if len(parts) > 1 else None
            if match and parts[-1].endswith(".parquet") and not parts[-1].startswith(("_", ".")):
                found.setdefault(int(match.group(1)), []).append(file)
    if not found:
        raise InputNotFoundError(
            f"{redact(', '.join(folders))}: no centroid=K/*.parquet files; it is not the output of a KMeansStage"
        )
    return {centroid: sorted(found[centroid], key=lambda file: file.path) for centroid in sorted(found)}


def partition_facts(storage: Storage, path: str, embedding_field: str) -> tuple[int, int | None, list[str]]:
    """Rows of a partition file, dimension if its type fixes it, and its columns."""
    with naming_file(path), storage.open(path) as source, pq.ParquetFile(source) as parquet:
        schema = parquet.schema_arrow
        _require(schema, [embedding_field], path)
        try:
            dim = embedding_dim(half_floats(pa.array([], schema.field(embedding_field).type)).type)
        except SchemaError as error:
            raise SchemaError(f"{redact(path)}: column {embedding_field!r} {error}") from None
        return parquet.metadata.num_rows, dim, schema.names


def read_table(
    storage: Storage, path: str, columns: Sequence[str] | None = None, condition: pc.Expression | None = None
) -> pa.Table:
    """A Parquet file, on this thread: some or all columns, of the rows that fulfil a condition."""
    names = None if columns is None else list(columns)
    with naming_file(path), storage.open(path) as source:
        if condition is None:  # without the way through a data set, which takes longer than a small file
            with pq.ParquetFile(source) as parquet:
                return parquet.read(columns=names, use_threads=False)
        return pq.read_table(source, columns=names, filters=condition, use_threads=False, partitioning=None)


def write_array(storage: Storage, path: str, array: NDArray[np.generic]) -> None:
    """Write a NumPy array as `.npy`."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    storage.write_bytes(path, content.getvalue())


def write_vectors(storage: Storage, path: str, parts: Sequence[NDArray[np.float32]], dim: int) -> None:
    """Write (m, D) float32 parts, one below the other, as one `.npy` without putting them together in memory."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (sum(map(len, parts)), dim)}
    with storage.writing(path) as sink:
        np.lib.format.write_array_header_1_0(sink, header)
        for part in parts:
            sink.write(part.astype("<f4", order="C", copy=False).tobytes())


def read_array(storage: Storage, path: str) -> NDArray[np.generic]:
    """Read a `.npy` file; nothing in it is ever executed."""
    with naming_file(path):
        array: NDArray[np.generic] = np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
        return array
