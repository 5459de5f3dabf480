"""What the report reads of a run's folder and of its input: similarities, groups, and columns of rows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from untwin.backends.ledger import Ledger
from untwin.errors import DamagedFileError, ParameterError, UntwinError
from untwin.jobs.output import OutputFolder
from untwin.stages.tasks import ClustersTask, PairsTask
from untwin.storage.files import read_many, redact
from untwin.storage.inputs import Span, naming_file
from untwin.storage.listing import Groups, Listing
from untwin.storage.partitions import ROW, iterate_partition, read_array, read_table, result_path
from untwin.storage.rows import read_rows

SIZE_COLUMNS = ("size_bytes", "file_size", "bytes")
DURATION_COLUMNS = ("duration_s", "duration", "duration_seconds")
NONE = "(none)"
"""A missing value, as text."""
_BATCH = 1 << 18
"""Rows that are read at a time of a cluster that is larger."""
_INPUT_BATCH = 1 << 16
_MOST_COLUMNS, _MOST_TEXT = 12, 200
_MOST_VALUES = 1 << 20
"""Different values of a column to group by."""
_log = logging.getLogger("untwin")

Values = Mapping[str, Any]
"""A row's columns by name."""


@dataclass(frozen=True)
class Finished:
    """A finished run, or an answer of `untwin apply`.

    Attributes:
        folder: It.
        run: Its `run.json`.
        origin: The run that made the clusters: the folder itself, or the one that it was applied to; None if that is
            gone.
        listing: The input.
        units: What was compared, and in which order rows are in the results.
        clusters: The files of each cluster's rows; empty if they are gone.
    """

    folder: OutputFolder
    run: Mapping[str, Any]
    origin: OutputFolder | None
    listing: Listing
    units: tuple[PairsTask, ...]
    clusters: Mapping[int, tuple[str, ...]]

    @classmethod
    def open(cls, folder: OutputFolder) -> Finished:
        """Read what a finished run wrote about itself.

        Raises:
            ParameterError: There is none, or its similarities are gone.
        """
        run = folder.require_run()
        storage = folder.storage
        if not any(name.startswith("cluster_") for name in storage.names(folder.file("pairwise"))):
            raise ParameterError(
                f"{redact(folder.path)}: the similarities are not there any more (drop_intermediate), and a report "
                "shows them; next time give --report to untwin run, which then writes it before they are removed"
            )
        units = [task for task in _ledger(folder).tasks_of(PairsTask) if task.folder == folder.file("pairwise")]
        origin = _origin(folder, run)
        clusters: dict[int, tuple[str, ...]] = {}
        if origin is None:
            _log.warning(
                "%s: the run that it belongs to is gone (%s); the report says less of its rows",
                redact(folder.path),
                run["applied_to"]["path"],
            )
        elif storage.names(origin.file("kmeans")):
            tasks = _ledger(origin).tasks_of(ClustersTask)
            clusters = {cluster.centroid: cluster.files for task in tasks for cluster in task.clusters}
        return cls(folder, run, origin, Listing.read(storage, folder.listing_path), tuple(units), clusters)

    @property
    def skipped_names(self) -> tuple[str, ...]:
        """Columns that are no metadata."""
        parameters = self.run["parameters"]
        return (parameters["id_field"], parameters["embedding_field"], ROW)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of each cluster, those without rows left out."""
        return np.array([rows for unit in self.units for _, rows in unit.clusters], np.int64)


def _ledger(folder: OutputFolder) -> Ledger:
    ledger = Ledger(folder.storage, folder.path)
    ledger.load(check=False)
    return ledger


def _origin(folder: OutputFolder, run: Mapping[str, Any]) -> OutputFolder | None:
    """The run that an answer belongs to: the folder around it may have moved with it, so that is looked at first."""
    if "applied_to" not in run:
        return folder
    for path in (folder.path.rstrip("/").rpartition("/")[0], run["applied_to"]["path"]):
        other = OutputFolder(folder.storage, path)
        with contextlib.suppress(UntwinError, OSError):
            if (other.read_run() or {}).get("finished") == run["applied_to"]["finished"]:
                return other
    return None


@dataclass(frozen=True)
class Part:
    """Rows of a cluster that follow each other in rank order: their numbers in the input's order, and their results."""

    centroid: int
    first: bool
    rows: NDArray[np.int64]
    results: pa.RecordBatch


def iterate_results(source: Finished, columns: Sequence[str]) -> Iterator[Part]:
    """All of `pairwise/` in the order of the units, in bounded parts; small clusters are read ahead."""
    storage, folder = source.folder.storage, source.folder.file("pairwise")
    names = list(columns)
    sizes = {result_path(folder, centroid): n_rows for unit in source.units for centroid, n_rows in unit.clusters}

    def read(path: str) -> pa.Table | None:
        return read_table(storage, path, names) if sizes[path] <= _BATCH else None

    tables = read_many(read, list(sizes))
    numbers = read_many(partial(read_array, storage), [unit.rows_path for unit in source.units])
    for unit, content in zip(source.units, numbers, strict=True):
        rows = np.asarray(content, np.int64)
        low = 0
        for centroid, n_rows in unit.clusters:
            path, table, start = result_path(folder, centroid), next(tables), low
            batches: Iterable[pa.RecordBatch] = (
                iterate_partition(storage, [path], names, _BATCH)
                if table is None
                else table.combine_chunks().to_batches()
            )
            for batch in batches:
                yield Part(centroid, low == start, rows[low : low + batch.num_rows], batch)
                low += batch.num_rows
            if low != start + n_rows:
                raise DamagedFileError(
                    f"{redact(path)}: {low - start} rows where the run compared {n_rows}; run untwin run again"
                )


def locate(source: Finished, ids: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cluster and row number of each of some different ids, (n,) and (n,); -1 for those that were not compared."""
    centroids, numbers = np.full(len(ids), -1), np.full(len(ids), -1)
    left = len(ids)
    for part in iterate_results(source, ["id"]):
        if not left:
            break
        place = pc.fill_null(pc.index_in(part.results.column(0), value_set=ids), -1).to_numpy(zero_copy_only=False)
        found = np.flatnonzero(place >= 0)
        centroids[place[found]], numbers[place[found]] = part.centroid, part.rows[found]
        left -= len(found)
    return centroids, numbers


def largest_groups(source: Finished, n_groups: int, most: int) -> list[tuple[int, pa.Array, list[float]]]:
    """The largest groups: duplicates of each, and the ids and scores of its kept row and its most similar duplicates.

    Args:
        source: A run with eps.
        n_groups: Of the groups.
        most: Duplicates shown of each.
    """
    path = source.folder.file("groups.parquet")
    found: list[tuple[int, int]] = []
    bounds: list[tuple[int, int]] = []
    open_group, open_rows = -1, 0
    with naming_file(path), source.folder.storage.open(path) as opened, pq.ParquetFile(opened) as parquet:
        for number in range(parquet.num_row_groups):
            column = parquet.read_row_group(number, columns=["group_id"], use_threads=False)["group_id"].to_numpy()
            groups, counts = np.unique(column, return_counts=True)
            bounds.append((int(groups[0]), int(groups[-1])))
            if groups[0] == open_group:
                counts[0] += open_rows
            elif open_group >= 0:
                found.append((open_rows, open_group))
            found += zip(counts[:-1].tolist(), groups[:-1].tolist(), strict=True)
            found = sorted(found, key=_largest_first)[:n_groups]
            open_rows, open_group = int(counts[-1]), int(groups[-1])
        if open_group >= 0:
            found = sorted([*found, (open_rows, open_group)], key=_largest_first)[:n_groups]
        shown: dict[int, pa.Table] = {}
        for number, (low, high) in enumerate(bounds):
            wanted = [group for _, group in found if low <= group <= high]
            if not wanted:
                continue
            table = parquet.read_row_group(number, use_threads=False)
            for group in wanted:
                here = table.filter(pc.field("group_id") == group)
                known = pa.concat_tables([shown[group], here]) if group in shown else here
                # the kept row has no equal: it comes first, and of equal scores the smaller id
                order = np.lexsort((-known["score"].to_numpy(), known["role"].to_numpy() != "kept"))
                shown[group] = known.take(pa.array(order[: most + 1]))
    return [
        (n_rows - 1, shown[group]["id"].combine_chunks(), shown[group]["score"].to_pylist()) for n_rows, group in found
    ]


def _largest_first(group: tuple[int, int]) -> tuple[int, int]:
    return -group[0], group[1]


def carried_schema(source: Finished) -> pa.Schema:
    """The columns of the clusters; none if they are gone."""
    for files in source.clusters.values():
        with naming_file(files[0]), source.folder.storage.open(files[0]) as opened:
            return pq.read_schema(opened)
    return pa.schema([])


def carried_values(source: Finished, centroids: NDArray[np.int64], rows: NDArray[np.int64]) -> dict[int, Values]:
    """What the clusters carry of some rows besides id and vector, by row number."""
    names = [ROW, *_plain_names(source, carried_schema(source))]
    storage = source.folder.storage

    def read(text: str) -> list[tuple[int, Values]]:
        centroid = int(text)
        found: list[tuple[int, Values]] = []
        for batch in iterate_partition(storage, source.clusters[centroid], names, _BATCH):
            numbers = batch[ROW].to_numpy()
            at = np.flatnonzero(np.isin(numbers, rows[centroids == centroid]))
            found += zip(numbers[at].tolist(), _values_of(batch, at, names), strict=True)
        return found

    wanted = [str(centroid) for centroid in np.unique(centroids).tolist() if centroid in source.clusters]
    # the reads go to the storage of the clusters, so that several are under way where it is remote
    return {row: values for part in _each(read, wanted, source.folder.path) for row, values in part}


def _each(read: Callable[[str], Any], keys: Sequence[str], place: str) -> Iterator[Any]:
    """`read_many` for keys of what lies in a place."""
    return read_many(lambda path: read(path[len(place) + 1 :]), [f"{place}/{key}" for key in keys])


def _plain_names(source: Finished, schema: pa.Schema) -> list[str]:
    """The metadata columns that can be shown; of names that stand for several columns nobody knows which."""
    return [field.name for field in schema if _is_plain(source, field) and schema.names.count(field.name) == 1]


def _is_plain(source: Finished, field: pa.Field) -> bool:
    kind = field.type
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return field.name not in source.skipped_names and not (
        binary or pa.types.is_nested(kind) or pa.types.is_binary_view(kind)
    )


def _values_of(batch: pa.RecordBatch, rows: NDArray[np.int64], names: Sequence[str]) -> list[Values]:
    """Some rows of a batch."""
    columns = [batch[name] for name in names]
    return [{name: _value(column[row]) for name, column in zip(names, columns, strict=True)} for row in rows.tolist()]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return bytes(scalar.as_buffer()).decode(errors="backslashreplace")
    except ValueError:  # times in nanoseconds
        return str(scalar)


def _values(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except ValueError:
        return [_value(scalar) for scalar in column]


def text_of(value: Any) -> str:
    """A value to look at."""
    if value is None:
        return NONE
    # float32 has no more digits than that
    text = f"{value:.{9 if abs(value) < 10**9 else 17}g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 1] + "…"


def other_columns(
    source: Finished, rows: NDArray[np.int64], carried: Mapping[int, Values]
) -> list[tuple[tuple[str, str], ...]]:
    """The first columns of each of some rows of the input, (n,), as text; if it has changed, what clusters carry."""
    known: Mapping[int, Values]
    try:
        known = _input_values(source, rows[rows >= 0])
    except (UntwinError, OSError) as error:
        _log.warning("%s; of its columns only those that kmeans/ has are shown", error)
        known = {row: {name: value for name, value in values.items() if name != ROW} for row, values in carried.items()}
    return [
        tuple((name, text_of(value)) for name, value in list(known.get(row, {}).items())[:_MOST_COLUMNS])
        for row in rows.tolist()
    ]


def _input_values(source: Finished, rows: NDArray[np.int64]) -> dict[int, Values]:
    """The first columns of some rows from the pieces of the input that hold them."""
    listing, storage = source.listing, source.folder.storage
    groups = listing.groups()
    # pieces without rows begin where the piece behind them does: the last of equals has the row
    numbers = np.unique(np.searchsorted(groups.starts, rows, side="right") - 1)
    files = np.unique(groups.file[numbers])
    _touched(listing, files).check_unchanged(storage)
    wanted = np.unique(rows)

    def read(text: str) -> list[tuple[int, Values]]:
        found: list[tuple[int, Values]] = []
        names: list[str] | None = None
        for number in numbers[groups.file[numbers] == int(text)].tolist():
            (span,) = listing.spans(number, number + 1, groups)
            if names is None and listing.filetype != "jsonl":
                names = _plain_names(source, listing.format.schema(storage, span))[:_MOST_COLUMNS]
            if names == []:
                break
            low = span.first_row
            for batch in listing.format.read(storage, span, names, _INPUT_BATCH):
                inside = wanted[np.searchsorted(wanted, low) : np.searchsorted(wanted, low + batch.num_rows)]
                at = inside - low
                values = _objects_of(source, span, batch, at) if names is None else _values_of(batch, at, names)
                found += zip(inside.tolist(), values, strict=True)
                low += batch.num_rows
        return found

    parts = _each(read, [str(file) for file in files.tolist()], listing.files["path"][int(files[0])].as_py())
    return {row: values for part in parts for row, values in part}


def _objects_of(source: Finished, span: Span, lines: pa.RecordBatch, rows: NDArray[np.int64]) -> list[Values]:
    """The columns of some lines of JSON: to parse the others, too, would take long."""
    with naming_file(span.path):
        objects = [json.loads(lines.column(0)[row].as_py()) for row in rows.tolist()]
    return [
        {
            name: value
            for name, value in row.items()
            if name not in source.skipped_names and not isinstance(value, list | dict)
        }
        for row in objects
    ]


def _touched(listing: Listing, files: NDArray[np.int64]) -> Listing:
    return dataclasses.replace(listing, files=listing.files.take(pa.array(files)))


@dataclass(frozen=True)
class Wanted:
    """Columns that are summed and grouped by; None for what is not there, or not asked for."""

    size: str | None
    duration: str | None
    group_by: str | None

    @property
    def names(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys(name for name in (self.size, self.duration, self.group_by) if name is not None))


def find_columns(source: Finished, group_by: str | None) -> Wanted:
    """Look for columns of sizes and durations, and check the one to group by.

    Raises:
        ParameterError: There is no column `group_by`, or none whose values can be counted.
    """
    known = {field.name: field.type for field in _input_schema(source)}
    known |= {field.name: field.type for field in carried_schema(source) if field.name != ROW}
    if group_by is not None:
        if group_by not in known:
            raise ParameterError(f"group_by is {group_by!r}, but there is no such column; there are {_listed(known)}")
        if pa.types.is_nested(known[group_by]):
            raise ParameterError(
                f"group_by is {group_by!r}, a column of type {known[group_by]}; group by text or numbers"
            )

    def first(names: Sequence[str]) -> str | None:
        return next((name for name in names if name in known and _is_number(known[name])), None)

    return Wanted(first(SIZE_COLUMNS), first(DURATION_COLUMNS), group_by)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _input_schema(source: Finished) -> pa.Schema:
    """The columns of the input's first rows; none if they have changed or are gone."""
    listing, storage = source.listing, source.folder.storage
    try:
        groups = listing.groups()
        number = int(np.flatnonzero(groups.rows)[0])
        _touched(listing, groups.file[[number]]).check_unchanged(storage)
        (span,) = listing.spans(number, number + 1, groups)
        return listing.format.schema(storage, span)
    except (UntwinError, OSError) as error:
        _log.warning("%s; the report uses what kmeans/ has of the input's columns", error)
        return pa.schema([])


class RowSums:
    """Sums by the codes of rows, and the values to group by, from one pass over columns.

    Args:
        wanted: The columns.
        codes: The code of each row of the input, (n,) uint16; those at or above `n_codes` were not compared.
        n_codes: Number of codes.

    Attributes:
        bytes: Sum of sizes for each code, (n_codes,) int64.
        microseconds: Sum of durations for each code.
        values: What to group by, as text; the first is that of rows without a value.
        value_of: For each row the place of its value, (n,) int32; not used without `group_by`.
    """

    def __init__(self, wanted: Wanted, codes: NDArray[np.uint16], n_codes: int) -> None:
        self.wanted = wanted
        self._codes, self._n_codes = codes, n_codes
        self.bytes, self.microseconds = np.zeros(n_codes, np.int64), np.zeros(n_codes, np.int64)
        self._places: dict[str | None, int] = {None: 0}
        self.value_of = np.zeros(len(codes) if wanted.group_by is not None else 0, np.int32)

    @property
    def values(self) -> list[str]:
        """See the class."""
        return [NONE if value is None else value for value in self._places]

    def add(self, rows: NDArray[np.int64] | slice, batch: pa.RecordBatch) -> None:
        """Take rows into account, by number; whole numbers are added, so their order changes nothing."""
        codes = self._codes[rows]
        compared = codes < self._n_codes
        for name, sums, unit in ((self.wanted.size, self.bytes, 1), (self.wanted.duration, self.microseconds, 10**6)):
            if name is None or name not in batch.schema.names or not _is_number(batch[name].type):
                continue
            known = pc.fill_null(batch[name].cast(pa.float64(), safe=False), 0.0).to_numpy(zero_copy_only=False)
            amounts = np.rint(np.nan_to_num(known[compared], nan=0, posinf=0, neginf=0) * unit)
            np.add(sums, np.bincount(codes[compared], amounts, self._n_codes).astype(np.int64), out=sums)
        if self.wanted.group_by is not None:
            self.value_of[rows] = self._grouped(batch)

    def _grouped(self, batch: pa.RecordBatch) -> NDArray[np.int32]:
        name = self.wanted.group_by
        if name not in batch.schema.names or pa.types.is_null(batch[name].type):
            return np.zeros(batch.num_rows, np.int32)
        try:
            column = batch[name].dictionary_encode()
        except pa.ArrowException as error:
            raise ParameterError(f"group_by is {name!r}, a column of type {batch[name].type}: {error}") from error
        texts = [None if value is None else text_of(value) for value in _values(column.dictionary)]
        places = np.array([self._places.setdefault(text, len(self._places)) for text in texts] + [0], np.int32)
        if len(self._places) > _MOST_VALUES:
            raise ParameterError(
                f"group_by is {name!r}, but this column has more than {_MOST_VALUES:,} different values; group by one "
                "with fewer"
            )
        return np.asarray(places[pc.fill_null(column.indices, len(texts)).to_numpy(zero_copy_only=False)])


def sum_columns(source: Finished, wanted: Wanted, codes: NDArray[np.uint16], n_codes: int) -> RowSums:
    """Sum columns: from the clusters if they have them all, else from the input in one pass over these columns.

    If the input has changed, what the clusters do not have is left out.

    Raises:
        UntwinError: The input has changed, and the column to group by is in it only.
    """
    carried = set(carried_schema(source).names)
    if not carried.issuperset(wanted.names):
        sums = RowSums(wanted, codes, n_codes)
        try:
            for rows, batch in _input_batches(source, wanted.names):
                sums.add(rows, batch)
            return sums
        except ParameterError:
            raise
        except (UntwinError, OSError) as error:
            if wanted.group_by is not None and wanted.group_by not in carried:
                raise
            _log.warning("%s; columns that kmeans/ does not have are not summed", error)
    kept = [name if name in carried else None for name in (wanted.size, wanted.duration, wanted.group_by)]
    sums = RowSums(Wanted(*kept), codes, n_codes)
    if sums.wanted.names:
        for files in source.clusters.values():
            for batch in iterate_partition(source.folder.storage, files, [ROW, *sums.wanted.names], _BATCH):
                sums.add(batch[ROW].to_numpy(), batch)
    return sums


def _input_batches(source: Finished, names: Sequence[str]) -> Iterator[tuple[slice, pa.RecordBatch]]:
    """Some columns of the whole input, in order."""
    listing, storage = source.listing, source.folder.storage
    groups: Groups = listing.groups()
    _touched(listing, np.unique(groups.file[groups.rows > 0])).check_unchanged(storage)
    spans: Iterator[Span] = listing.spans(0, len(groups.rows), groups)
    # with the id, which every file has: a file may lack the others
    columns = list(dict.fromkeys((source.run["parameters"]["id_field"], *names)))
    for part in read_rows(storage, listing.format, spans, columns, _INPUT_BATCH):
        yield slice(part.first_row, part.first_row + part.columns.num_rows), part.columns
