"""The input as a table of files: which files there are, what they hold, and in which order rows count."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from untwin.errors import ChangedInputError, DamagedFileError, InputNotFoundError, ParameterError, SchemaError
from untwin.storage.columns import check_sound, common_id_type, embedding_dim, id_type, list_lengths, without_views
from untwin.storage.files import FoundFile, Storage, is_remote, join, normalize_path, read_many, redact
from untwin.storage.inputs import FileFacts, InputFormat, Span, input_format, naming_file
from untwin.storage.spread import in_parts

_CURATOR_FOLDER = re.compile(r"[^_]+_embd(_[^_]+)?_parquet")
_CURATOR_PREFIXES = {"internvideo2": "iv2", "cosmos-embed1": "ce1"}
EMBEDDED, EMBEDDINGS = "_embed.json", "embeddings"
"""What says that there are embeddings in an output folder, and how they were made; and where they are."""
EMBEDDING_KEY = b"untwin.embedding"
"""In the metadata of a schema: JSON with the `encoder` that made the vectors, its `digest`, and `frames` of a clip."""
_PEEKED_ROWS = 1000
_CHECKED_ROWS, _CHECKED_BYTES = 1 << 16, 8 << 20
_LOCAL_READS, _REMOTE_READS = 4, 32
_FACTS = pa.schema(
    [
        ("rows", pa.int64()),
        ("group_rows", pa.large_list(pa.int64())),
        ("group_starts", pa.large_list(pa.int64())),
        ("group_bytes", pa.large_list(pa.int64())),
        ("problem", pa.large_string()),
    ]
)


@dataclass(frozen=True)
class Fields:
    """The names of the columns that a run reads; `embedding_field` is empty where no vectors are wanted."""

    id_field: str
    embedding_field: str
    metadata_fields: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All of them, each once."""
        names = dict.fromkeys((self.id_field, self.embedding_field, *self.metadata_fields))
        return [name for name in names if name]


@dataclass(frozen=True)
class Listing:
    """All input files, in the plan's order.

    Attributes:
        files: One row a file: path, relative (below the input it was found in), size, version, rows, first_row,
            group_rows, group_starts, group_bytes (lists, one entry a piece), problem (why a file is skipped, as if
            it had no rows; empty for the others).
        filetype: Name of the input format.
        id_type: Type in which ids are written.
        dim: Dimension, if the types of all files fix it, else the commonest length among the rows looked at.
        metadata_types: Types of the metadata columns.
    """

    files: pa.Table
    filetype: str
    id_type: pa.DataType
    dim: int
    metadata_types: tuple[pa.DataType, ...]

    @property
    def n_rows(self) -> int:
        """Rows in all files."""
        return int(self.files["rows"].to_numpy().sum()) if self.files.num_rows else 0

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return int(self.files["size"].to_numpy().sum()) if self.files.num_rows else 0

    @property
    def skipped(self) -> dict[str, str]:
        """Files that are skipped because they cannot be read, and why."""
        problems = self.files.filter(pc.not_equal(self.files["problem"], ""))
        return dict(zip(problems["path"].to_pylist(), problems["problem"].to_pylist(), strict=True))

    @property
    def format(self) -> InputFormat:
        """The input format."""
        return input_format(self.filetype)

    def digest(self) -> str:
        """SHA-256 over paths, sizes and versions."""
        digest = hashlib.sha256()
        for batch in self.files.select(["path", "size", "version"]).to_batches():
            for column in batch.columns:
                digest.update("\0".join(map(str, column.to_pylist())).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def difference(self, before: Listing) -> str:
        """What changed since an earlier listing, in words, with one file of each kind of change."""
        old, new = before._versions(), self._versions()
        kinds = {
            "new": [path for path in new if path not in old],
            "gone": [path for path in old if path not in new],
            "changed in size, modification time or ETag": [
                path for path in new if old.get(path, new[path]) != new[path]
            ],
        }
        return ", ".join(f"{len(paths)} {kind} ({redact(paths[0])})" for kind, paths in kinds.items() if paths)

    def _versions(self) -> dict[str, tuple[int, str]]:
        paths, sizes, versions = (self.files[name].to_pylist() for name in ("path", "size", "version"))
        return dict(zip(paths, zip(sizes, versions, strict=True), strict=True))

    def groups(self) -> Groups:
        """All pieces of all files as arrays, in order."""
        rows = self.files["group_rows"].combine_chunks()
        per_file = np.asarray(list_lengths(rows), dtype=np.int64) if len(rows) else np.empty(0, np.int64)
        flat_rows = np.asarray(rows.flatten().to_numpy(zero_copy_only=False), dtype=np.int64)
        flat_bytes = self.files["group_bytes"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        owner = np.repeat(np.arange(len(per_file)), per_file)
        starts = np.concatenate(([0], np.cumsum(flat_rows)))
        within = np.arange(len(owner)) - np.repeat(np.cumsum(per_file) - per_file, per_file)
        return Groups(flat_rows, np.asarray(flat_bytes, dtype=np.int64), owner, within, starts)

    def spans(self, first_group: int, end_group: int, groups: Groups) -> Iterator[Span]:
        """The pieces `first_group` up to `end_group` (numbers over all files) as spans of files."""
        numbers = groups.file[first_group:end_group]
        if not len(numbers):
            return
        first, count = int(numbers[0]), int(numbers[-1] - numbers[0]) + 1
        files = self.files.select(["path", "size", "first_row", "group_rows", "group_starts"]).slice(first, count)
        ends = first_group + np.searchsorted(numbers, np.arange(first, first + count), side="right")
        position = first_group
        for row, end in zip(files.to_pylist(), ends.tolist(), strict=True):
            if end == position:  # a file without rows
                continue
            low = int(groups.within[position])
            high = low + end - position
            starts, first_row = row["group_starts"], int(groups.starts[position])
            yield Span(
                path=row["path"],
                first_group=low,
                group_rows=tuple(row["group_rows"][low:high]),
                group_starts=tuple(starts[low:high]),
                end=starts[high] if high < len(starts) else row["size"],
                size=row["size"],
                first_row=first_row,
                row_in_file=first_row - row["first_row"],
            )
            position = end

    def locate(self, rows: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int64]]:
        """Files and row numbers in them, for row numbers in the plan's order."""
        first = self.files["first_row"].to_numpy()
        # files without rows share their first row with the file behind them: the last of equals has the row
        file = np.searchsorted(first, rows, side="right") - 1
        return self.files["path"].take(pa.array(file)).to_pylist(), rows - first[file]

    def numbers(self, tables: Iterable[pa.Table]) -> Iterator[NDArray[np.int64]]:
        """The other way round: row numbers, for tables with the columns `file` (as messages name it) and `row`."""
        first = self.files["first_row"].to_numpy()
        names = pa.array([redact(path) for path in self.files["path"].to_pylist()], pa.large_string())
        for table in tables:
            file = pc.index_in(table["file"].cast(pa.large_string()), names).to_numpy()
            yield np.asarray(first[file] + table["row"].to_numpy(), np.int64)

    def write(self, storage: Storage, path: str) -> None:
        """Write the listing as Parquet."""
        empty = pa.schema([("id", self.id_type), *((f"m{i}", kind) for i, kind in enumerate(self.metadata_types))])
        facts = {b"untwin.filetype": self.filetype.encode(), b"untwin.dim": str(self.dim).encode()}
        facts[b"untwin.types"] = base64.b64encode(empty.serialize().to_pybytes())
        with storage.writing(path, durable=True) as sink:
            pq.write_table(self.files.replace_schema_metadata(facts), sink, compression="zstd")

    @classmethod
    def read(cls, storage: Storage, path: str) -> Listing:
        """Read what `write` wrote."""
        with storage.open(path) as source:
            files = pq.read_table(source, partitioning=None)
        facts = files.schema.metadata
        types = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(facts[b"untwin.types"]))).types
        return cls(
            files.replace_schema_metadata(None),
            facts[b"untwin.filetype"].decode(),
            types[0],
            int(facts[b"untwin.dim"]),
            tuple(types[1:]),
        )

    def check_unchanged(self, storage: Storage) -> None:
        """Raise ChangedInputError if a file is gone, or has another size or version than when it was listed."""
        columns = (self.files[name].to_pylist() for name in ("path", "size", "version"))
        files = [FoundFile(*row) for row in zip(*columns, strict=True)]
        for _ in in_parts(functools.partial(_check_unchanged, storage), files):
            pass


def _check_unchanged(storage: Storage, files: Sequence[FoundFile]) -> None:
    def check(file: FoundFile) -> None:
        try:
            now = storage.stat(file.path)
        except FileNotFoundError as error:
            raise ChangedInputError(f"{redact(file.path)}: this input file is gone since the run") from error
        if now != file:
            raise ChangedInputError(
                f"{redact(file.path)}: this input file changed since the run (it had {file.size} bytes, now "
                f"{now.size}); run again on the new input"
            )

    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(check, files, chunksize=64):
            pass


@dataclass(frozen=True)
class Groups:
    """Pieces of all files, as parallel arrays: rows, bytes, number of the file, number in the file; row starts."""

    rows: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    file: NDArray[np.int64]
    within: NDArray[np.int64]
    starts: NDArray[np.int64]


def list_inputs(
    storage: Storage,
    inputs: Sequence[str],
    fields: Fields,
    *,
    filetype: str = "parquet",
    extensions: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    dim: int | None = None,
    skip_bad_files: bool = False,
    known: Listing | None = None,
) -> Listing:
    """Find the input files, read their footers, and check that their columns can be used.

    Args:
        storage: Access to the inputs.
        inputs: Files, folders and globs, local or remote.
        fields: Columns that must be there.
        filetype: `parquet`, `jsonl` or `npy`.
        extensions: File name endings to read instead of the format's own.
        exclude: Folders whose files are left out, for an output that lies inside an input.
        dim: Known dimension; else it is looked up.
        skip_bad_files: Read every file through, and skip those that cannot be read.
        known: An earlier listing with the same parameters; it is given back if the files are still those.

    Raises:
        InputNotFoundError: Nothing found.
        SchemaError: A column is missing or of the wrong type.
        DamagedFileError: A footer cannot be read; with `skip_bad_files`, not one file can be read.
    """
    format_ = input_format(filetype)
    found = _find(storage, inputs, format_, extensions, exclude)
    if known is not None and known._versions() == {file.path: (file.size, file.version) for file, _ in found}:
        return known
    files = [file for file, _ in found]
    paths = [file.path for file in files]
    batches: list[pa.RecordBatch] = []
    schemas: list[tuple[str, pa.Schema]] = []
    for batch, some in in_parts(_Inspection(storage, filetype, fields, skip_bad_files), files):
        batches.append(batch)
        repeated = schemas and some and _is_same(some[0][1], schemas[-1][1])
        schemas += some[1:] if repeated else some
    facts = pa.Table.from_batches(batches, _FACTS).combine_chunks()
    ids, fixed_dims, metadata_types = _check_schemas(schemas, fields)
    rows = facts["rows"].to_numpy()
    table = pa.table(
        {
            "path": pa.array(paths, pa.large_string()),
            "relative": pa.array([relative for _, relative in found], pa.large_string()),
            "size": pa.array([file.size for file in files], pa.int64()),
            "version": pa.array([file.version for file in files], pa.large_string()),
            "rows": rows,
            "first_row": np.cumsum(rows) - rows,
            **{name: facts[name] for name in _FACTS.names[1:]},
        }
    )
    if dim is not None and fixed_dims and dim not in fixed_dims and None not in fixed_dims:
        raise ParameterError(
            f"embedding_dim is {dim}, but column {fields.embedding_field!r} holds vectors of length "
            f"{', '.join(map(str, sorted(length for length in fixed_dims if length)))}"
        )
    listing = Listing(table, filetype, ids, dim or 0, metadata_types)
    if listing.n_rows == 0:
        for problem in listing.skipped.values():
            raise DamagedFileError(f"no file of the input can be read, {len(listing.skipped)} are skipped: {problem}")
        raise InputNotFoundError(f"{redact(', '.join(inputs))}: the files hold no rows")
    if dim is None and fields.embedding_field:
        if fixed_dims and None not in fixed_dims:
            dim = fixed_dims.most_common(1)[0][0]
        else:
            dim = _peek_dim(storage, listing, fields)
    return Listing(table, filetype, ids, int(dim or 0), metadata_types)


@dataclass(frozen=True)
class _Inspection:
    """Reads the footers of some files: a row for each file, and each schema with the first file that has it."""

    storage: Storage
    filetype: str
    fields: Fields
    skip_bad_files: bool

    def __call__(self, files: Sequence[FoundFile]) -> tuple[pa.RecordBatch, list[tuple[str, pa.Schema]]]:
        facts: list[tuple[Any, ...]] = []
        schemas: list[tuple[str, pa.Schema]] = []
        with ThreadPoolExecutor(_REMOTE_READS if is_remote(files[0].path) else _LOCAL_READS) as pool:
            for file, fact in zip(files, pool.map(self._facts, files), strict=True):
                facts.append((sum(fact.group_rows), fact.group_rows, fact.group_starts, fact.group_bytes, fact.problem))
                with_columns = not fact.problem and (fact.group_rows or self.filetype == "parquet")
                if with_columns and not (schemas and _is_same(fact.schema, schemas[-1][1])):
                    schemas.append((file.path, fact.schema))
        columns = [pa.array(values, field.type) for values, field in zip(zip(*facts, strict=True), _FACTS, strict=True)]
        return pa.record_batch(columns, schema=_FACTS), schemas

    def _facts(self, file: FoundFile) -> FileFacts:
        format_ = input_format(self.filetype)
        try:
            facts = format_.inspect(self.storage, file)
            if self.skip_bad_files:
                _read_through(self.storage, format_, file, facts, self.fields)
            return facts
        except DamagedFileError as error:
            if not self.skip_bad_files:
                raise
            return FileFacts(pa.schema([]), (), (), (), str(error))


def _read_through(storage: Storage, format_: InputFormat, file: FoundFile, facts: FileFacts, fields: Fields) -> None:
    """Decode all that a run can ever read of a file, in bounded batches.

    Raises:
        DamagedFileError: Something cannot be decoded.
    """
    n_rows = sum(facts.group_rows)
    if not n_rows:
        return
    span = Span(file.path, 0, facts.group_rows, facts.group_starts, file.size, file.size, 0, 0)
    size = max(1, min(_CHECKED_ROWS, _CHECKED_BYTES * n_rows // max(1, sum(facts.group_bytes))))
    names = [name for name in fields.names if name in facts.schema.names]
    # lines are copied as they are, so it is enough that the wanted columns can be parsed
    lines = format_.name == "jsonl"
    for batch in format_.read(storage, span, names if lines else None, size):
        if not lines:
            with naming_file(file.path):
                check_sound(batch.select(names))


def _find(
    storage: Storage,
    inputs: Sequence[str],
    format_: InputFormat,
    extensions: Sequence[str] | None,
    exclude: Sequence[str],
) -> list[tuple[FoundFile, str]]:
    """Files with their paths relative to the input they were found in, sorted by path, each once."""
    found: dict[str, tuple[FoundFile, str]] = {}
    endings = tuple(f".{ending.lower().lstrip('.')}" for ending in extensions or ())
    if not inputs:
        raise InputNotFoundError("no input path given")

    def below(path: str) -> list[tuple[FoundFile, str]]:
        if storage.is_folder(path):
            folder = _embeddings_folder(storage, path)
            files = [file for file in storage.find(folder) if not _is_ours(file.path, folder, exclude)]
            chosen = (
                [file for file in files if file.path.lower().endswith(endings)] if endings else format_.select(files)
            )
            if not chosen:
                wanted = " ".join(f"*{ending}" for ending in endings or format_.suffixes)
                raise InputNotFoundError(f"{redact(path)}: no {wanted} files in this folder")
            return [(file, posixpath.relpath(file.path, folder)) for file in chosen]
        if not storage.exists(path):
            raise InputNotFoundError(f"{redact(path)}: no such file or folder")
        return [(storage.stat(path), posixpath.basename(path))]

    for pairs in read_many(below, [path for given in inputs for path in _expand(storage, given, exclude)]):
        for file, relative in pairs:
            found.setdefault(file.path, (file, relative))
    pairs = [found[path] for path in sorted(found)]
    taken = Counter(relative for _, relative in pairs)
    return [
        (
            file,
            relative if taken[relative] == 1 else posixpath.join(_folder_name(file.path, relative), relative),
        )
        for file, relative in pairs
    ]


def _folder_name(path: str, relative: str) -> str:
    """A folder for files that have the same relative path below different inputs: readable, and different."""
    root = path[: len(path) - len(relative)].rstrip("/")
    return f"{posixpath.basename(root) or 'input'}-{hashlib.sha256(root.encode()).hexdigest()[:8]}"


def _expand(storage: Storage, given: str, exclude: Sequence[str]) -> list[str]:
    path = normalize_path(given)
    if not any(character in path for character in "*?[") or storage.exists(path):
        return [path]
    fixed = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
    matches = [match for match in storage.glob(path) if not _is_ours(match, fixed, exclude)]
    if not matches:
        raise InputNotFoundError(f"{redact(path)}: the pattern matches nothing")
    return matches


def _is_ours(path: str, folder: str, exclude: Sequence[str]) -> bool:
    """Whether a found file is not data: in an excluded folder, hidden, or under a name that starts with `_`."""
    if any(path == other or path.startswith(other.rstrip("/") + "/") for other in exclude):
        return True
    below = path[len(folder) :].strip("/").split("/")
    return any(part.startswith(("_", ".")) for part in below)


def _embeddings_folder(storage: Storage, folder: str) -> str:
    """The embeddings folder in an output folder of a Curator pipeline or of ours; else the folder itself."""
    present = storage.names(folder)
    if EMBEDDED in present:
        return join(folder, EMBEDDINGS)
    names = [name for name in present if _CURATOR_FOLDER.fullmatch(name)]
    if not names:
        return folder
    if len(names) == 1:
        return join(folder, names[0])
    summary = join(folder, "summary.json")
    algorithm = ""
    if storage.exists(summary):
        content: Any = storage.read_json(summary)
        algorithm = str(content.get("embedding_algorithm", "")) if isinstance(content, dict) else ""
    model, variant = algorithm, ""
    for known, prefix in _CURATOR_PREFIXES.items():
        if algorithm.startswith(known):
            model, variant = prefix, algorithm.removeprefix(known).replace("-", "_")
    for name in (f"{model}_embd{variant}_parquet", f"{model}_embd_parquet"):
        if name in names:
            return join(folder, name)
    raise ParameterError(
        f"{redact(folder)}: holds several sets of embeddings ({', '.join(names)}), and its summary.json does not "
        "say which one is meant; give one of these folders as the input"
    )


def _is_same(schema: pa.Schema, other: pa.Schema) -> bool:
    return bool(schema.equals(other)) and _encoder(schema) == _encoder(other)


def _encoder(schema: pa.Schema) -> str:
    """What made the vectors of a file, in words; empty if it does not say."""
    content = (schema.metadata or {}).get(EMBEDDING_KEY)
    if content is None:
        return ""
    try:
        told = json.loads(content)
        return f"the encoder {told['encoder']} ({told['digest'][:12]}, {told['frames']} frames)"
    except (ValueError, KeyError, TypeError):
        return ""


def _check_schemas(
    schemas: Sequence[tuple[str, pa.Schema]], fields: Fields
) -> tuple[pa.DataType, Counter[int | None], tuple[pa.DataType, ...]]:
    ids: pa.DataType | None = None
    ids_path = ""
    dims: Counter[int | None] = Counter()
    metadata_types: list[pa.DataType] = []
    metadata_paths: list[str] = []
    vectors_path = ""
    maker, maker_path = "", ""
    for path, schema in schemas:
        made_by = _encoder(schema)
        if maker and made_by not in ("", maker):
            raise SchemaError(
                f"{redact(path)}: holds vectors of {made_by}, but {redact(maker_path)} of {maker}; vectors of "
                "different encoders cannot be compared: give those of one at a time"
            )
        maker, maker_path = (maker, maker_path) if maker else (made_by, path)
        for name in fields.names:
            if name not in schema.names:
                has_it = next((other for other, columns in schemas if name in columns.names), "")
                elsewhere = f"; {redact(has_it)} has it" if has_it else ""
                raise SchemaError(
                    f"{redact(path)}: no column {name!r}; it has {', '.join(map(repr, schema.names))}{elsewhere}"
                )
            if schema.names.count(name) > 1:
                raise SchemaError(f"{redact(path)}: more than one column is called {name!r}")
        # a column of nulls only fits any type: its rows are rejected
        id_kind = schema.field(fields.id_field).type
        found = ids if pa.types.is_null(id_kind) else id_type(id_kind)
        if found is None and not pa.types.is_null(id_kind):
            elsewhere = f"; in {redact(ids_path)} it is {ids}" if ids_path else ""
            raise SchemaError(
                f"{redact(path)}: column {fields.id_field!r} has type {id_kind}; "
                f"an id is a string, an integer or fixed-size binary{elsewhere}"
            )
        common = found if ids is None or found is None else common_id_type(ids, found)
        if common is None and found is not None:
            raise SchemaError(
                f"column {fields.id_field!r} is {ids} in {redact(ids_path)} but {found} in {redact(path)}; "
                "bring the ids to one type"
            )
        ids, ids_path = common, ids_path or (path if found is not None else "")
        if not fields.embedding_field:
            continue
        vector_kind = schema.field(fields.embedding_field).type
        try:
            if not pa.types.is_null(vector_kind):
                dims[embedding_dim(vector_kind)] += 1
                vectors_path = vectors_path or path
        except SchemaError as error:
            elsewhere = f"; in {redact(vectors_path)} it is" if vectors_path else ""
            raise SchemaError(f"{redact(path)}: column {fields.embedding_field!r} {error}{elsewhere}") from None
        types = [without_views(schema.field(name).type) for name in fields.metadata_fields]
        if not metadata_types:
            metadata_types, metadata_paths = types, [path] * len(types)
        for index, (name, known, new) in enumerate(zip(fields.metadata_fields, metadata_types, types, strict=True)):
            if known.equals(new) or pa.types.is_null(new):
                continue
            if pa.types.is_null(known):
                metadata_types[index], metadata_paths[index] = new, path
            else:
                unified = _common_metadata_type(known, new)
                if unified is None:
                    raise SchemaError(
                        f"column {name!r} is {known} in {redact(metadata_paths[index])} but {new} in {redact(path)}; "
                        "bring it to one type"
                    )
                metadata_types[index] = unified
    return ids or pa.string(), dims, tuple(metadata_types)


def _common_metadata_type(known: pa.DataType, new: pa.DataType) -> pa.DataType | None:
    try:
        unified = pa.unify_schemas([pa.schema([("x", known)]), pa.schema([("x", new)])], promote_options="permissive")
    except pa.ArrowException:
        return None
    return unified.field("x").type


def _peek_dim(storage: Storage, listing: Listing, fields: Fields) -> int:
    """The commonest length among the first rows of up to 16 files, for the estimate before the work."""
    groups = listing.groups()
    with_rows = np.flatnonzero(groups.rows)
    _, first = np.unique(groups.file[with_rows], return_index=True)
    candidates = with_rows[first]
    chosen = candidates[:: max(1, len(candidates) // 16)][:16]
    lengths: Counter[int] = Counter()

    def peek(group: int) -> list[int]:
        span = next(listing.spans(group, group + 1, groups))
        batch = next(iter(listing.format.read(storage, span, [fields.embedding_field], _PEEKED_ROWS)))
        found: list[int] = list_lengths(batch.column(0)).tolist()
        return found

    with ThreadPoolExecutor(_LOCAL_READS) as pool:
        for found in pool.map(peek, chosen.tolist()):
            lengths.update(found)
    lengths.pop(0, None)
    return max(lengths, key=lambda length: (lengths[length], length)) if lengths else 0
