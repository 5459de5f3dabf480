"""Which media files belong to which row: by id, or by a column of paths. Nothing is decoded here."""

from __future__ import annotations

import functools
import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from untwin.core.hashing import hash_bytes
from untwin.errors import InputNotFoundError, ParameterError, one_line
from untwin.storage.files import FoundFile, Storage, join, normalize_path, real_path, redact

_VIDEO = "3gp asf avi flv m2ts m4v mkv mov mp4 mpe mpeg mpg mts mxf ogv rm rmvb ts vob webm wmv y4m"
_IMAGES = "apng avif bmp gif heic heif j2k jp2 jpe jpeg jpg jxl pbm pgm png pnm ppm psd svg tga tif tiff webp"
_MEDIA = frozenset(f".{ending}" for ending in f"{_VIDEO} {_IMAGES}".split())
_CHUNK = 1 << 16
_SEED = 0
_SHOWN = 100
"""Characters of a path or id in a message."""


@dataclass(frozen=True)
class Matches:
    """Which files belong to which rows, as parallel arrays, by row.

    Attributes:
        rows: (m,) int64, positions in what was asked for.
        files: (m,) int64, numbers of files.
        ambiguous: (k,) int64, rows whose files lie at several places, by no more than a name; all are in `files`.
    """

    rows: NDArray[np.int64]
    files: NDArray[np.int64]
    ambiguous: NDArray[np.int64]

    def missing(self, n_rows: int) -> NDArray[np.int64]:
        """Positions of the rows that no file belongs to, of `n_rows`."""
        found = np.zeros(n_rows, np.bool_)
        found[self.rows] = True
        return np.flatnonzero(~found)


class MediaFolder:
    """The media files below a folder, and what finds them. A file takes its name and at most 150 bytes.

    Attributes:
        path: The folder, local or a URL.
        relative: (n,) large_binary, paths below it, sorted; local names as the file system has them.
        sizes: (n,) int64, bytes.
        versions: Modification time or ETag of each, large_string.
    """

    def __init__(self, storage: Storage, path: str, files: pa.Table) -> None:
        files = files.sort_by("relative").combine_chunks()
        self.storage = storage
        self.path = path
        self.relative: pa.Array = _plain(files["relative"])
        self.sizes: NDArray[np.int64] = files["size"].to_numpy()
        self.versions: pa.Array = _plain(files["version"])

    def __len__(self) -> int:
        return len(self.relative)

    def including(self, relative: Iterable[str], sizes: Iterable[int]) -> MediaFolder:
        """With files that are elsewhere for now, but belong here, if they are not here as well."""
        here = pa.table({"relative": self.relative, "size": self.sizes, "version": self.versions})
        names = pa.array([os.fsencode(name) for name in relative], pa.large_binary())
        away = pa.table({"relative": names, "size": pa.array(sizes, pa.int64())})
        away = away.append_column("version", pa.array([""] * away.num_rows, pa.large_string()))
        away = away.filter(pc.invert(pc.is_in(away["relative"], self.relative)))
        return MediaFolder(self.storage, self.path, pa.concat_tables([here, away]))

    def name(self, number: int) -> str:
        """The path of a file below the folder."""
        return os.fsdecode(self.relative[number].as_py())

    def file(self, number: int) -> FoundFile:
        """A file by its number."""
        path = join(self.path, self.name(number))
        return FoundFile(path, int(self.sizes[number]), self.versions[number].as_py())

    def files_of(self, ids: pa.Array) -> list[list[FoundFile]]:
        """The files of each row; none for a row without media.

        Args:
            ids: Text, binary or integers.

        Raises:
            ParameterError: An id fits files at several places.
        """
        matches = self.match_ids(ids)
        self.check_unambiguous(ids, matches)
        found: list[list[FoundFile]] = [[] for _ in range(len(ids))]
        for row, number in zip(matches.rows.tolist(), matches.files.tolist(), strict=True):
            found[row].append(self.file(number))
        return found

    def match_ids(self, ids: pa.Array) -> Matches:
        """Find files by ids: the first of these that fits, so that a whole path goes before a mere name.

        1. the path below the folder: `a/x.mp4`
        2. the same without its ending; all files that differ in nothing else: `a/x`
        3. the path of a folder; all files right in it, as of a clip with several cameras: `a/x` for `a/x/left.mp4`
        4. to 6. the last name of these three, wherever it is: `x.mp4`, `x`, and `x` for `a/x/left.mp4`

        Args:
            ids: Text, binary or integers (in decimal); null and empty ones fit nothing.
        """
        keys = _as_bytes(ids)
        left = np.flatnonzero(pc.fill_null(pc.greater(pc.binary_length(keys), 0), False).to_numpy(zero_copy_only=False))
        rows, files, ambiguous = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for kind in ("path", "stem", "folder", "name", "name stem", "folder name"):
            if not left.size:
                break
            asked, numbers = self._lookup(kind, keys.take(pa.array(left)))
            rows.append(left[asked])
            files.append(numbers)
            if kind in ("name", "name stem", "folder name"):
                ambiguous.append(
                    left[
                        _at_several_places(
                            asked,
                            _key("folder" if kind == "folder name" else "stem", self.relative.take(pa.array(numbers))),
                        )
                    ]
                )
            found = np.zeros(len(left), np.bool_)
            found[asked] = True
            left = left[~found]
        all_rows, all_files = np.concatenate(rows), np.concatenate(files)
        order = np.lexsort((all_files, all_rows))
        return Matches(all_rows[order], all_files[order], np.unique(np.concatenate(ambiguous)))

    def match_paths(self, paths: pa.Array) -> Matches:
        """Find files by paths: relative to the folder, or absolute (URLs too) and below it; null fits nothing."""
        keys = _as_bytes(paths)
        for root in dict.fromkeys((self.path, real_path(self.path))):
            keys = pc.replace_substring_regex(keys, b"(?s)^" + _quoted(os.fsencode(root)) + b"/+", b"")
        keys = pc.replace_substring_regex(keys, rb"(?s)^(\./+)+", b"")
        rows, files = self._lookup("path", keys)
        known = pc.is_valid(keys.take(pa.array(rows))).to_numpy(zero_copy_only=False)
        return Matches(rows[known], files[known], np.empty(0, np.int64))

    def check_unambiguous(self, ids: pa.Array, matches: Matches) -> None:
        """Raise ParameterError if an id fits files at several places; names two of them."""
        if not matches.ambiguous.size:
            return
        row = int(matches.ambiguous[0])
        numbers = matches.files[matches.rows == row]
        one, other = shown(self.name(int(numbers[0]))), shown(self.name(int(numbers[-1])))
        more = f", and {len(matches.ambiguous) - 1:,} more ids do so" if len(matches.ambiguous) > 1 else ""
        raise ParameterError(
            f"{redact(self.path)}: id {shown(ids[row].as_py())} fits {one} and {other}{more}; use ids that are paths "
            "below the media folder, a folder further down, or a column of paths"
        )

    def preview_of(self, clip: object) -> FoundFile | None:
        """The first of Curator's previews of a clip: `previews/ID/START_END.webp` beside `clips/`; None without."""
        name = os.fsdecode(clip) if isinstance(clip, bytes) else str(clip)
        if not name or posixpath.isabs(name) or ".." in name.split("/"):
            return None
        folder = join(posixpath.dirname(self.path), "previews", name)
        found = [file for file in self.storage.names(folder) if file.lower().endswith(".webp")]
        return self.storage.stat(join(folder, min(found, key=_start))) if found else None

    def _lookup(self, kind: str, keys: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions in `keys` and numbers of the files whose key of a kind is equal, by position."""
        hashes, order = self._index(kind)
        wanted = _hashes(keys)
        low = np.searchsorted(hashes, wanted, side="left")
        counts = np.searchsorted(hashes, wanted, side="right") - low
        asked = np.repeat(np.arange(len(keys)), counts)
        within = np.arange(len(asked)) - np.repeat(np.cumsum(counts) - counts, counts)
        numbers = order[np.repeat(low, counts) + within]
        same = pc.equal(keys.take(pa.array(asked)), _key(kind, self.relative.take(pa.array(numbers))))
        good = pc.fill_null(same, False).to_numpy(zero_copy_only=False)  # hashes agree by chance, now and then
        return asked[good], numbers[good]

    @functools.cache  # noqa: B019 - lives as long as the folder is looked at
    def _index(self, kind: str) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Sorted hashes of the files' keys of a kind, and the numbers of these files."""
        hashes = np.empty(len(self), np.uint64)
        for low in range(0, len(self), _CHUNK):
            hashes[low : low + _CHUNK] = _hashes(_key(kind, self.relative.slice(low, _CHUNK)))
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order


def list_media(storage: Storage, folder: str | os.PathLike[str], *, any_ending: bool = False) -> MediaFolder:
    """List the media files below a folder, by their endings. Links to folders are followed once, so loops end.

    In the output folder of Curator, which holds `clips/` beside `previews/` or `metas/`, it is `clips/` that counts.

    Args:
        storage: Access to it.
        folder: Local, or a URL.
        any_ending: All files, where a column says which are media.

    Raises:
        InputNotFoundError: There is no such folder, or no such file in it.
    """
    path = normalize_path(os.fspath(folder))
    if not storage.is_folder(path):
        raise InputNotFoundError(f"{redact(path)}: no such folder of media")
    names = storage.names(path)
    if "clips" in names and {"previews", "metas"}.intersection(names):
        path = join(path, "clips")
    skip = len(os.fsencode(path.rstrip("/"))) + 1
    chunks: list[pa.RecordBatch] = []
    schema = pa.schema([("relative", pa.large_binary()), ("size", pa.int64()), ("version", pa.large_string())])
    for files in _chunks(file for file in storage.walk(path) if any_ending or is_media(file.path)):
        columns = [[os.fsencode(file.path)[skip:] for file in files], [file.size for file in files]]
        columns.append([file.version for file in files])
        arrays = [pa.array(values, kind) for values, kind in zip(columns, schema.types, strict=True)]
        chunks.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
    if not chunks:
        raise InputNotFoundError(f"{redact(path)}: holds no media files")
    return MediaFolder(storage, path, pa.Table.from_batches(chunks))


def shown(value: object) -> str:
    """An id or a path for a message: on one line, and not endless."""
    return one_line(value if isinstance(value, str) else repr(value), _SHOWN)


def is_media(path: str) -> bool:
    """Whether a file is a video or an image, by its ending."""
    return posixpath.splitext(path)[1].lower() in _MEDIA


def _chunks(files: Iterator[FoundFile]) -> Iterator[list[FoundFile]]:
    held: list[FoundFile] = []
    for file in files:
        held.append(file)
        if len(held) == _CHUNK:
            yield held
            held = []
    if held:
        yield held


def _plain(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _as_bytes(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Text and integers as bytes, in one piece."""
    if isinstance(values, pa.ChunkedArray):
        values = _plain(values) if values.num_chunks else pa.array([], values.type)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_integer(values.type):
        values = values.cast(pa.string())
    if pa.types.is_fixed_size_binary(values.type):
        values = values.cast(pa.binary())
    return values.cast(pa.large_binary())


def _key(kind: str, paths: pa.Array) -> pa.Array:
    """What a kind of lookup compares, of paths below the folder; null where there is none."""
    if kind.startswith("name"):
        paths = pc.replace_substring_regex(paths, rb"(?s)^.*/", b"")
    if kind.endswith("stem"):
        return pc.replace_substring_regex(paths, rb"(?s)\.[^./]*$", b"")
    if kind.startswith("folder"):
        inside = pc.match_substring(paths, b"/")
        paths = pc.replace_substring_regex(paths, rb"(?s)/[^/]*$", b"")
        paths = pc.if_else(inside, paths, pa.scalar(None, paths.type))
    return pc.replace_substring_regex(paths, rb"(?s)^.*/", b"") if kind == "folder name" else paths


def _hashes(keys: pa.Array) -> NDArray[np.uint64]:
    """A 64-bit hash of each key, (n,); any for null."""
    if not len(keys):
        return np.empty(0, np.uint64)
    keys = pc.fill_null(keys, b"")
    _, offsets, data = keys.buffers()
    bounds = np.frombuffer(offsets, np.int64)[keys.offset : keys.offset + len(keys) + 1]
    return hash_bytes(np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8), bounds, _SEED)


def _at_several_places(rows: NDArray[np.int64], places: pa.Array) -> NDArray[np.int64]:
    """The rows, sorted on entry, that stand beside more than one place."""
    beside = rows[1:] == rows[:-1]
    differ = pc.not_equal(places[1:], places[:-1]).to_numpy(zero_copy_only=False) if len(rows) > 1 else beside
    return np.unique(rows[1:][beside & differ])


def _quoted(text: bytes) -> bytes:
    """Bytes for a regular expression that stand for themselves."""
    return b"".join(rb"\x%02x" % byte for byte in text)


def _start(name: str) -> float:
    """When a preview `START_END.webp` begins."""
    try:
        return float(name.partition("_")[0])
    except ValueError:
        return float("inf")
