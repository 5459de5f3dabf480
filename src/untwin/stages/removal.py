"""`RemoveDuplicatesStage`: the data set without its duplicates; every value of a row that stays is as it was."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from untwin.errors import InputNotFoundError, ParameterError, ResultMismatchError, SchemaError
from untwin.plan import split_evenly
from untwin.stages import checks
from untwin.stages.base import Context, Stage, Upstream, require_empty, storage_of, where_data_is
from untwin.stages.clustering import IDS_SEED_1, IDS_SEED_2
from untwin.stages.duplicates import MergeStage
from untwin.stages.ids import hash_ids
from untwin.stages.tasks import CentroidsTask, DuplicatesTask, InputTask, KeptTask
from untwin.storage.bitmap import byte_range, counts_before, get_bits
from untwin.storage.columns import common_id_type, decode_ids, id_type, without_views
from untwin.storage.files import Storage, join, normalize_path, redact
from untwin.storage.inputs import FORMATS, naming_file
from untwin.storage.kept import KEPT_WRITERS, KeptWriter
from untwin.storage.listing import Fields, Groups, Listing, list_inputs
from untwin.storage.partitions import read_array, write_array
from untwin.storage.rows import RowBatch, batch_rows, read_rows

_FILE_BYTES = 256 << 20
_MIRROR_BYTES = 64 << 20
_HASHES_PER_PART = 1 << 22
_UNKNOWN_DIM = 1024
_RUN_BYTES = 4 << 10
"""Bytes of a batch for each run of kept rows from which it is faster to copy runs than to select values."""


class RemoveDuplicatesStage(Stage):
    """Copies the rows that stay: all columns, types and values, in the order of the input.

    After a `KMeansStage` on the same input rows are taken by their number. Otherwise, or with `duplicates_path`, every
    row stays whose id is not in the list of duplicates.

    Args:
        input_path: A file, folder, glob or URL, or a list of them.
        output_path: Folder for the rows that stay; must not hold other files.
        id_field: Column of ids.
        duplicates_path: Parquet file or folder with a column `id`; default: what IdentifyDuplicatesStage just wrote.
        layout: `compact`: files of about 256 MB; `mirror`: a file for each input file, under its relative path.
        input_filetype: `parquet`, `jsonl` or `npy`.
        input_file_extensions: File name endings to read instead of the type's own.
        verbose: Log the stage (logger `untwin`, level INFO).
        read_kwargs: `storage_options` for the input.
        write_kwargs: `storage_options` for the output.

    Raises:
        ParameterError: A parameter that makes no sense.
    """

    name = "remove"
    barrier = True

    def __init__(
        self,
        input_path: str | list[str],
        output_path: str,
        id_field: str = "id",
        duplicates_path: str | None = None,
        layout: str = "compact",
        input_filetype: str = "parquet",
        input_file_extensions: Sequence[str] | None = None,
        verbose: bool = False,
        read_kwargs: dict[str, Any] | None = None,
        write_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.input_paths = checks.paths("input_path", input_path)
        self.output_path = normalize_path(checks.path("output_path", output_path))
        self.id_field = checks.text("id_field", id_field)
        self.duplicates_path = (
            normalize_path(checks.path("duplicates_path", duplicates_path)) if duplicates_path else None
        )
        self.layout = checks.one_of("layout", layout, ("compact", "mirror"))
        self.input_filetype = checks.one_of("input_filetype", input_filetype, tuple(FORMATS))
        self.input_file_extensions = checks.texts("input_file_extensions", input_file_extensions)
        self.verbose = verbose
        self.source = storage_of(read_kwargs)
        self.target = storage_of(write_kwargs)
        self.listing: Listing | None = None
        self._groups: Groups | None = None
        self._bitmap = ""
        self._hash_files: list[str] = []
        self._work_path = join(self.output_path, "_work")

    @property
    def place(self) -> tuple[Storage, str]:
        """The folder that the stage writes to."""
        return self.target, self.output_path

    def check_output(self) -> None:
        """Refuse an output that is there."""
        require_empty(self.target, self.output_path)

    def check(self, before: Sequence[Stage]) -> None:
        """Refuse a lack of anything to remove."""
        if self.duplicates_path is None and not any(isinstance(stage, MergeStage) for stage in before):
            raise ParameterError(
                "RemoveDuplicatesStage has no duplicates to remove; add an IdentifyDuplicatesStage before it, or give "
                "duplicates_path"
            )

    def units(self, upstream: Upstream) -> Sequence[InputTask]:
        """Runs of input pieces, each of which fills an output file."""
        listing = self.listing or where_data_is(
            list_inputs,
            self.source,
            self.input_paths,
            Fields(self.id_field, ""),
            filetype=self.input_filetype,
            extensions=self.input_file_extensions,
            exclude=[self.output_path],
        )
        groups = listing.groups()
        self.listing, self._groups = listing, groups
        kept = self._find_kept(upstream, listing, groups)
        weights = (groups.n_bytes * kept / np.maximum(groups.rows, 1)).astype(np.int64)
        if self.layout == "compact":
            bounds = split_evenly(weights, _FILE_BYTES)
        else:
            n_files = listing.files.num_rows
            per_file = np.bincount(groups.file, weights=groups.n_bytes, minlength=n_files).astype(np.int64)
            first_group = np.searchsorted(groups.file, np.arange(n_files + 1))
            bounds = tuple(first_group[list(split_evenly(per_file, _MIRROR_BYTES))].tolist())
        return [
            InputTask(unit, int(groups.starts[end] - groups.starts[first]), first, end)
            for unit, (first, end) in enumerate(itertools.pairwise(bounds))
        ]

    def _find_kept(self, upstream: Upstream, listing: Listing, groups: Groups) -> NDArray[np.int64]:
        """Find out how the rows that stay are known, and how many there are in each piece (at most)."""
        found = upstream.of(DuplicatesTask)
        models = upstream.of(CentroidsTask)
        same_input = bool(models) and models[0].listing_digest == listing.digest()
        self._bitmap, self._hash_files = "", []
        if self.duplicates_path is None and found[0].kept_bitmap and (same_input or not models):
            self._bitmap = found[0].kept_bitmap
            bitmap = np.frombuffer(self.target.read_bytes(self._bitmap), np.uint8)
            return np.diff(counts_before(bitmap, groups.starts))
        files = found[0].files if self.duplicates_path is None else self._duplicate_files(self.duplicates_path)
        self._hash_files = where_data_is(_hash_duplicates, self.target, files, listing.id_type, self._work_path)
        return groups.rows

    def _duplicate_files(self, path: str) -> Sequence[str]:
        """The files of a list of duplicates that a user gave."""
        if self.target.is_folder(path):
            files = sorted(file.path for file in self.target.find(path) if file.path.endswith(".parquet"))
        else:
            files = [path] if self.target.exists(path) else []
        if not files:
            raise InputNotFoundError(f"{redact(path)}: no list of duplicates there")
        return files

    def scratch(self) -> tuple[str, ...]:
        """Hashes of the duplicates' ids."""
        return (self._work_path,)

    def finish(self) -> None:
        """Remove scratch files."""
        self.target.remove(self._work_path)

    def memory(self, task: InputTask) -> int:
        """Batches in flight, and a row group that is being written."""
        assert self._groups is not None
        largest = int(self._groups.n_bytes[task.first_group : task.end_group].max(initial=0))
        return self.minimum_memory(task) + largest

    def minimum_memory(self, task: InputTask) -> int:
        """Without the input's largest piece, of which most is read page by page."""
        by_id = 40 * task.n_rows + 16 * _HASHES_PER_PART if self._hash_files else 0
        return (96 << 20) + by_id

    def process(self, task: InputTask, context: Context) -> KeptTask:
        """Copy the rows of a unit that stay."""
        listing, groups = self.listing, self._groups
        assert listing is not None
        assert groups is not None
        first_row = int(groups.starts[task.first_group])
        keep = self._kept_rows(listing, groups, task, first_row)
        files: list[str] = []
        n_kept = 0
        spans = list(listing.spans(task.first_group, task.end_group, groups))
        if self.layout == "compact":
            outputs = [(join(self.output_path, f"part-{task.unit:05d}"), spans)] if keep.any() else []
        else:
            # by the number of the file: files without rows share their first row with the file behind them
            numbers = dict.fromkeys(groups.file[task.first_group : task.end_group].tolist())
            relative = listing.files["relative"]
            outputs = [
                (join(self.output_path, relative[number].as_py()), [span])
                for number, span in zip(numbers, spans, strict=True)
            ]
        pieces = slice(task.first_group, task.end_group)
        widest = (groups.n_bytes[pieces] // np.maximum(groups.rows[pieces], 1)).max(initial=1)
        size = batch_rows(max(listing.dim or _UNKNOWN_DIM, int(widest) // 4))
        for path, some in outputs:
            low, high = some[0].first_row - first_row, some[-1].first_row + some[-1].n_rows - first_row
            expected = int(keep[low:high].sum())
            with KEPT_WRITERS[listing.filetype](self.target, path, self.source, some[0].path, expected) as writer:
                for rows in read_rows(self.source, listing.format, some, None, size):
                    _write_kept(writer, rows, keep, first_row)
                writer.finish()
            files += writer.files
            n_kept += writer.n_rows
        if n_kept != int(keep.sum()):
            raise ResultMismatchError(
                f"{redact(self.output_path)}: {n_kept} rows written where {int(keep.sum())} stay; "
                "the input changed during the run"
            )
        return KeptTask(task.unit, task.n_rows, tuple(files), n_kept)

    def _kept_rows(self, listing: Listing, groups: Groups, task: InputTask, first_row: int) -> NDArray[np.bool_]:
        if self._bitmap:
            start, length = byte_range(first_row, task.n_rows)
            part = np.frombuffer(self.target.read_range(self._bitmap, start, length), np.uint8)
            return get_bits(part, first_row, task.n_rows)
        keep = np.ones(task.n_rows, np.bool_)
        if not self._hash_files:
            return keep
        hashes = [np.empty((2, 0), np.uint64)]
        null = [np.empty(0, np.bool_)]
        spans = listing.spans(task.first_group, task.end_group, groups)
        for rows in read_rows(self.source, listing.format, spans, [self.id_field], 65_536):
            ids = decode_ids(rows.columns.column(0), listing.id_type)
            hashes.append(_both_hashes(ids))
            null.append(ids.is_null().to_numpy(zero_copy_only=False))
        found = np.concatenate(hashes, axis=1)
        for path in self._hash_files:
            keep &= ~_contains(np.asarray(read_array(self.target, path), np.uint64), found)
        keep |= np.concatenate(null)
        return keep


def _hash_duplicates(storage: Storage, files: Sequence[str], wanted: pa.DataType, folder: str) -> list[str]:
    """Write 128-bit hashes of all duplicates' ids as sorted parts that fit the memory; returns their paths.

    Args:
        storage: Access to the files and to the folder.
        files: Lists of duplicates.
        wanted: Type of the ids of the input.
        folder: Where the parts go.
    """
    held: list[NDArray[np.uint64]] = []
    parts: list[str] = []
    n_held = 0

    def flush() -> None:
        hashes = np.concatenate(held, axis=1)
        parts.append(join(folder, f"ids-{len(parts):05d}.npy"))
        write_array(storage, parts[-1], hashes[:, np.lexsort((hashes[1], hashes[0]))])

    for file in files:
        with naming_file(file), storage.open(file) as source, pq.ParquetFile(source, pre_buffer=False) as parquet:
            if "id" not in parquet.schema_arrow.names:
                raise ParameterError(f"{redact(file)}: no column 'id'; it is not a list of duplicates")
            kind = id_type(parquet.schema_arrow.field("id").type)
            if kind is None or common_id_type(kind, wanted) is None:
                raise SchemaError(
                    f"{redact(file)}: the ids of the duplicates have type {parquet.schema_arrow.field('id').type}, "
                    f"those of the input {wanted}; bring them to one type"
                )
            for batch in parquet.iter_batches(65_536, columns=["id"], use_threads=False):
                ids = decode_ids(batch.column(0), kind).drop_null()
                held.append(_both_hashes(ids))
                n_held += len(ids)
                if n_held >= _HASHES_PER_PART:
                    flush()
                    held, n_held = [], 0
    if held:
        flush()
    return parts


def _both_hashes(ids: pa.Array) -> NDArray[np.uint64]:
    return np.stack((hash_ids(ids, IDS_SEED_1), hash_ids(ids, IDS_SEED_2)))


def _contains(sorted_hashes: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each column of (2, m) hashes is among the sorted columns of (2, n) hashes."""
    low = np.searchsorted(sorted_hashes[0], wanted[0], side="left")
    high = np.searchsorted(sorted_hashes[0], wanted[0], side="right")
    found = np.zeros(wanted.shape[1], np.bool_)
    # ids whose first 64 bits agree by chance stand side by side: there are hardly ever two
    for step in range(int((high - low).max(initial=0))):
        inside = low + step < high
        found[inside] |= sorted_hashes[1, low[inside] + step] == wanted[1, inside]
    return found


def _write_kept(writer: KeptWriter, rows: RowBatch, keep: NDArray[np.bool_], first_row: int) -> None:
    low = rows.first_row - first_row
    mask = keep[low : low + rows.columns.num_rows]
    if mask.all():
        writer.write(rows.columns)
    elif mask.any():
        writer.write(_filtered(rows.columns, mask))


def _filtered(batch: pa.RecordBatch, mask: NDArray[np.bool_]) -> pa.RecordBatch:
    """Rows by a mask, of which one at least is true."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
    runs = list(zip(edges[::2], edges[1::2], strict=True))
    if batch.nbytes >= _RUN_BYTES * len(runs):
        return pa.concat_batches([batch.slice(low, high - low) for low, high in runs])
    # Arrow cannot select from columns of views, so these go through plain ones
    chosen = pa.array(mask)
    columns = []
    for column in batch.columns:
        plain = without_views(column.type)
        part = column.filter(chosen) if plain is column.type else column.cast(plain).filter(chosen).cast(column.type)
        columns.append(part)
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)
