"""Acting on an answer: lists of ids, links to or copies of media, moving duplicates away and back, manifests for S3.

Each `plan_…` finds out what is to be done, and refuses what cannot be done; nothing happens before `Plan.execute`.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from untwin.backends.base import NoProgress, Progress
from untwin.errors import InputNotFoundError, OutputExistsError, ParameterError, ResourceError, UntwinError
from untwin.jobs.decisions import Decisions
from untwin.jobs.output import KEPT_LIST, MANIFEST, REMOVED_LIST, OutputFolder
from untwin.jobs.run import show_bytes
from untwin.media.find import MediaFolder, list_media, shown
from untwin.storage.files import Storage, is_remote, join, normalize_path, real_path, redact
from untwin.storage.inputs import naming_file
from untwin.storage.lock import check_unlocked, locked
from untwin.storage.relocate import (
    UNDO,
    UndoFile,
    copy_file,
    is_copied,
    is_linked,
    is_moved,
    levels_to_make,
    link_file,
    move_files,
    put_back,
    remove_temporaries,
    remove_undo,
    same_disk,
)

MODES = ("parquet", "list", "link", "copy", "move", "manifest")
ON_FILES = ("link", "copy", "move")
ON_MEDIA = (*ON_FILES, "manifest")
_NAMED = 5
_BATCH_ROWS = 1 << 16
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Media:
    """What a user says of where media are.

    Attributes:
        folder: Local, or a URL.
        path_field: Column of their paths, relative to it or absolute; None finds them by id.
        skip_missing: Go on although there are rows without a file.
    """

    folder: str
    path_field: str | None = None
    skip_missing: bool = False


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        lines: For people.
        question: What to ask before; empty where nobody need be asked.
        work: Does it; what it gives back says what was done.
    """

    lines: tuple[str, ...]
    question: str
    work: Callable[[Progress], tuple[str, ...]]

    def execute(self, progress: Progress | None = None) -> tuple[str, ...]:
        """Do it; the same plan, made again, does what is left of it after a kill."""
        return self.work(progress or NoProgress())


@dataclass(frozen=True)
class _Chosen:
    """The media files to act on.

    Attributes:
        media: All files.
        numbers: (n,) int64, those chosen.
        n_rows: Rows that they belong to, or should.
        missing: Number of those without a file, and some of their ids.
        n_shared: Files that belong to a removed row, but to a kept one as well.
    """

    media: MediaFolder
    numbers: NDArray[np.int64]
    n_rows: int
    missing: tuple[int, tuple[str, ...]]
    n_shared: int

    @property
    def names(self) -> list[str]:
        return [self.media.name(number) for number in self.numbers.tolist()]

    @property
    def lines(self) -> tuple[str, ...]:
        count, some = self.missing
        lines = [f"no file     {count:>14,}  rows, as {', '.join(some)}"] if count else []
        if self.n_shared:
            lines.append(f"shared      {self.n_shared:>14,}  files belong to kept rows as well, and stay")
        return tuple(lines)


# --- lists ------------------------------------------------------------------------------------------------------------


def plan_list(decisions: Decisions, folder: str) -> Plan:
    """Ids of kept and removed rows as text files, one a line: kept ones as in the input, removed ones sorted.

    Raises:
        ParameterError: An id cannot be a line of text.
        OutputExistsError: One of the files is there and holds something else.
    """
    storage = decisions.run_folder.storage
    files = {
        join(folder, KEPT_LIST): lambda: _id_lines(decisions, _kept_ids(decisions)),
        join(folder, REMOVED_LIST): lambda: _id_lines(decisions, _removed_ids(decisions)),
    }
    return _plan_text(decisions, storage, folder, files, ())


def _kept_ids(decisions: Decisions) -> Iterator[pa.Array]:
    for rows in decisions.rows([decisions.id_field]):
        yield rows.columns.column(0).filter(pa.array(rows.kept))


def _removed_ids(decisions: Decisions) -> Iterator[pa.Array]:
    answer, storage = decisions.answer, decisions.run_folder.storage
    for name in answer.run["files"]["duplicates"]:
        path = join(answer.output_path, name)
        with naming_file(path), storage.open(path) as source, pq.ParquetFile(source, pre_buffer=False) as parquet:
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=["id"], use_threads=False):
                yield batch.column(0)


def _id_lines(decisions: Decisions, ids: Iterator[pa.Array]) -> Iterator[bytes]:
    for batch in ids:
        plain = batch.cast(pa.string()) if pa.types.is_integer(batch.type) else batch.cast(_binary_of(batch.type))
        lines = [value if isinstance(value, bytes) else str(value).encode() for value in plain.to_pylist()]
        text = b"".join(line + b"\n" for line in lines)
        if text.count(b"\n") != len(lines) or b"\r" in text or not _is_text(text):
            bad = next(line for line in lines if b"\n" in line or b"\r" in line or not _is_text(line))
            why = "is not text in UTF-8" if not _is_text(bad) else "has a line break"
            raise ParameterError(
                f"id {bad!r} {why}, so ids cannot be listed one a line; they are in "
                f"{redact(decisions.answer.duplicates_path)} as a table"
            )
        yield text


def _binary_of(kind: pa.DataType) -> pa.DataType:
    return pa.binary() if pa.types.is_fixed_size_binary(kind) else pa.large_binary()


def _is_text(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _plan_text(
    decisions: Decisions,
    storage: Storage,
    folder: str,
    files: Mapping[str, Callable[[], Iterator[bytes]]],
    more: tuple[str, ...],
) -> Plan:
    """Text files, each written at once; their content is gone through before, so that errors come first."""
    OutputFolder(storage, folder).check_is_folder()
    todo = {}
    for path, lines in files.items():
        wanted = _digest(lines())
        if not storage.exists(path):
            todo[path] = lines
        elif _digest(_content(storage, path)) != wanted:
            raise OutputExistsError(
                f"{redact(path)}: is there already and holds something else; nothing is overwritten: move it away, or "
                "give another --to"
            )

    def work(_: Progress) -> tuple[str, ...]:
        for path, lines in todo.items():
            with storage.writing(path, durable=True) as sink:
                for text in lines():
                    sink.write(text)
        return tuple(f"written: {redact(path)}" for path in files)

    there = (
        (f"there       {len(files) - len(todo):>14,}  of {len(files)} files already",) if len(todo) < len(files) else ()
    )
    return Plan((*_row_lines(decisions), *more, *there), "", work)


def _content(storage: Storage, path: str) -> Iterator[bytes]:
    with storage.open(path) as source:
        while part := source.read(_READ_BYTES):
            yield part


def _digest(parts: Iterator[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


# --- manifests --------------------------------------------------------------------------------------------------------


def plan_manifest(decisions: Decisions, media: Media, folder: str) -> Plan:
    """The objects to remove, as a CSV manifest of Amazon S3 Batch Operations; S3 is asked to do nothing.

    A line `bucket,key` for each object, no header, all in one bucket, keys URL-encoded as UTF-8 (slashes stay). See
    "Specifying a manifest" in https://docs.aws.amazon.com/AmazonS3/latest/userguide/batch-ops-create-job.html, and
    `S3BatchOperations_CSV_20180820` with the fields Bucket and Key in
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_control_JobManifestSpec.html.

    Raises:
        ParameterError: Media that are not on S3.
    """
    if not normalize_path(media.folder).startswith(("s3://", "s3a://")):
        raise ParameterError(
            f"{redact(media.folder)}: is not an s3:// URL, and a manifest is for objects on S3; use link, copy or move "
            "for local media"
        )
    chosen = _choose(decisions, media, kept=False)
    bucket, _, prefix = chosen.media.path.partition("://")[2].partition("/")
    base = f"{prefix}/".encode() if prefix else b""

    def lines() -> Iterator[bytes]:
        for low in range(0, len(chosen.numbers), _BATCH_ROWS):
            keys = chosen.media.relative.take(pa.array(chosen.numbers[low : low + _BATCH_ROWS])).to_pylist()
            yield "".join(f"{bucket},{quote(base + key, safe='/')}\n" for key in keys).encode("ascii")

    size = _size(int(chosen.media.sizes[chosen.numbers].sum()))
    path = join(folder, MANIFEST)
    told = (
        f"to list     {len(chosen.numbers):>14,}  objects to remove, {size}, of s3://{bucket}",
        *chosen.lines,
        f"{redact(path)}: a manifest of these objects for S3 Batch Operations (CSV: bucket, URL-encoded key)",
        "Nothing is removed: that is for a job of yours with this manifest.",
    )
    return _plan_text(decisions, decisions.run_folder.storage, folder, {path: lines}, told)


# --- files ------------------------------------------------------------------------------------------------------------


def plan_files(decisions: Decisions, mode: str, media: Media, to: str | None) -> Plan:
    """Link or copy the media of the rows that stay into a folder, or move those of duplicates there.

    Args:
        decisions: The answer.
        mode: `link`, `copy` or `move`.
        media: Where they are; must be local.
        to: The folder; None: for `move` one beside the media, with `-duplicates` added to its name.

    Raises:
        ParameterError: URLs; an id that fits files at several places; folders inside each other.
        InputNotFoundError: Rows without a file.
        OutputExistsError: Another file is where one of these has to go.
        ResourceError: Too little disk.
    """
    given = normalize_path(media.folder)
    for path in (given, to or ""):
        if is_remote(path):
            raise ParameterError(
                f"{redact(path)}: is a URL, and {mode} works on local files; --mode manifest lists objects to remove"
            )
    if to is None and mode != "move":
        raise ParameterError(f"mode is {mode!r} without a folder for the files; give one with --to")
    storage = decisions.run_folder.storage
    folder = normalize_path(to) if to else ""
    listed = list_media(storage, given, any_ending=media.path_field is not None)
    source = listed.path
    folder = folder or f"{source}-duplicates"
    _check_apart(source, folder)
    OutputFolder(storage, folder).check_is_folder()
    check_unlocked(storage, folder)
    undo = UndoFile(folder)
    if mode == "move":
        about = {
            "media": source,
            "run": redact(decisions.run_folder.path),
            "finished": decisions.run_folder.require_run()["finished"],
            "eps": decisions.answer.eps,
        }
        if undo.about and any(undo.about[name] != value for name, value in about.items()):
            raise OutputExistsError(
                f"{folder}: holds what another command moved (eps {undo.about['eps']}, from {undo.about['media']}); "
                f"give another --to, or put that back first: untwin undo {shlex.quote(folder)}"
            )
        away = [file for file in undo.moved.values() if os.path.lexists(Path(folder, file.name))]
        listed = listed.including([file.name for file in away], [file.size for file in away])
    elif undo.about:
        raise OutputExistsError(f"{folder}: holds what {UNDO} says was moved there; give another --to")
    chosen = _choose(decisions, media, kept=mode != "move", listed=listed)
    todo = _left(mode, chosen, source, folder, undo)
    sizes = listed.sizes[chosen.numbers][todo]
    names = [name for name, left in zip(chosen.names, todo.tolist(), strict=True) if left]
    same = same_disk(source, folder)
    needed = 0 if (same and mode == "move") or mode == "link" else int(sizes.sum())
    free = storage.free_bytes(folder)
    if free is not None and free < needed:
        raise ResourceError(
            f"{folder}: the files take {show_bytes(needed)}, but only {show_bytes(free)} are free; make room, or give "
            "another --to"
        )
    if mode == "move":
        _check_writable(source, names)
    n_done = len(todo) - len(names)
    word = {"link": "linked", "copy": "copied", "move": "moved"}[mode]
    whose = "duplicates" if mode == "move" else "rows that stay"
    symbolic = "" if same or mode != "link" else "  (on another disk: as symbolic links)"
    lines = (
        *_row_lines(decisions),
        f"to {mode:<9}{len(names):>14,}  files of {whose}, {_size(int(sizes.sum()))}{symbolic}",
        *([f"done        {n_done:>14,}  files were {word} before"] if n_done else []),
        *chosen.lines,
        f"from        {shown(source)}",
        f"to          {shown(folder)}",
    )

    def work(progress: Progress) -> tuple[str, ...]:
        if not names:
            return (f"nothing is left to {mode}",)
        levels = levels_to_make(folder)
        progress.start(mode, len(names))
        with locked(storage, folder):
            remove_temporaries(folder)
            if mode == "move":
                undo.begin({**about, "levels_made": levels})
                for count in move_files(source, folder, undo, names):
                    progress.advance(count)
                result = f"{len(names):,} files moved; to put them back: untwin undo {shlex.quote(folder)}"
            else:
                result = _place(mode, source, folder, names, progress)
        progress.finish()
        return (result,)

    return Plan(lines, f"{mode.capitalize()} {len(names):,} files?" if names else "", work)


def _place(mode: str, source: str, folder: str, names: list[str], progress: Progress) -> str:
    n_symbolic = 0
    for name in names:
        if mode == "link":
            n_symbolic += not link_file(str(Path(source, name)), str(Path(folder, name)))
        else:
            copy_file(str(Path(source, name)), str(Path(folder, name)))
        progress.advance(1)
    if mode == "copy":
        return f"{len(names):,} files copied"
    return f"{len(names):,} files linked" + (
        f", {n_symbolic:,} of them by symbolic links, as hard links cannot be made there" if n_symbolic else ""
    )


def undo(folder: str | os.PathLike[str], *, progress: Progress | None = None) -> int:
    """Put back what `untwin apply --mode move` moved into a folder. Interrupted, it goes on when it is called again.

    Args:
        folder: Holds the undo file; may have been moved itself.
        progress: Gets told how far the work is.

    Returns:
        Number of files put back now.

    Raises:
        InputNotFoundError: No undo file there.
        OutputExistsError: A file would be overwritten; nothing is done then.
    """
    path = normalize_path(os.fspath(folder))
    if is_remote(path) or not Path(path, UNDO).exists():
        raise InputNotFoundError(f"{redact(path)}: holds no {UNDO}, so there is nothing to put back")
    said = progress or NoProgress()
    storage = Storage()
    with locked(storage, path):
        remove_temporaries(path)
        made = UndoFile(path)
        if not made.about:  # killed before its first line was complete: nothing was moved
            made.about = {"levels_made": 0, "media": path}
        said.start("undo", len(made.moved))
        count, gone = put_back(made)
        said.advance(len(made.moved))
        said.finish()
        if gone:
            raise UntwinError(
                f"{path}: {count:,} files were put back, but {len(gone):,} are neither here nor where they came from, "
                f"as {shown(gone[0])}; {UNDO} stays, for a look"
            )
    remove_undo(made)
    return count


def _left(mode: str, chosen: _Chosen, source: str, folder: str, undo: UndoFile) -> NDArray[np.bool_]:
    """Which of the chosen files are not done yet; OutputExistsError if another file is where one has to go."""
    left = np.empty(len(chosen.numbers), np.bool_)
    for at, name in enumerate(chosen.names):
        here, there = str(Path(source, name)), str(Path(folder, name))
        if mode == "move":
            left[at] = not is_moved(here, there, undo, name)
        else:
            left[at] = not (is_linked if mode == "link" else is_copied)(here, there)
    return left


def _check_apart(source: str, folder: str) -> None:
    real, target = real_path(source), real_path(folder)
    if target == real or target.startswith(real.rstrip("/") + "/"):
        raise ParameterError(f"{folder}: lies inside the media folder {source}; give another --to")


def _check_writable(source: str, names: list[str]) -> None:
    for parent in {posixpath.dirname(name) for name in names}:
        if not os.access(Path(source, parent), os.W_OK | os.X_OK):
            raise UntwinError(f"{shown(str(Path(source, parent)))}: is read-only for this user, so files stay there")


# --- which files ------------------------------------------------------------------------------------------------------


def _choose(decisions: Decisions, media: Media, *, kept: bool, listed: MediaFolder | None = None) -> _Chosen:
    """The files of all kept rows, or those of removed rows that belong to no kept row."""
    field = media.path_field
    if listed is None:
        listed = list_media(decisions.run_folder.storage, media.folder, any_ending=field is not None)
    wanted = np.zeros(len(listed), np.bool_)
    others = np.zeros(len(listed), np.bool_)
    n_rows = n_missing = 0
    missing: list[str] = []
    for rows in decisions.rows([decisions.id_field, field or decisions.id_field]):
        values = rows.columns.column(-1)
        for mask, chosen in ((rows.kept, kept), (rows.removed, not kept)):
            if not chosen and kept:
                continue
            some = values.filter(pa.array(mask))
            matches = listed.match_ids(some) if field is None else listed.match_paths(some)
            if not chosen:
                others[matches.files] = True
                continue
            listed.check_unambiguous(some, matches)
            wanted[matches.files] = True
            n_rows += len(some)
            without = matches.missing(len(some))
            n_missing += len(without)
            if len(missing) < _NAMED and len(without):
                ids = rows.columns.column(0).filter(pa.array(mask)).take(pa.array(without[: _NAMED - len(missing)]))
                missing += [shown(value) for value in ids.to_pylist()]
    if n_missing and not media.skip_missing:
        by = "by id" if field is None else f"by column {field!r}"
        raise InputNotFoundError(
            f"{redact(listed.path)}: {n_missing:,} of {n_rows:,} rows have no file there {by}, as "
            f"{', '.join(missing)}; check --media and --path-field, or go on without them by --skip-missing"
        )
    numbers = np.flatnonzero(wanted & ~others)
    return _Chosen(listed, numbers, n_rows, (n_missing, tuple(missing)), int((wanted & others).sum()))


def _row_lines(decisions: Decisions) -> tuple[str, ...]:
    answer = decisions.answer
    compared = max(1, answer.n_kept + answer.n_duplicates)
    return (
        f"eps         {answer.eps!s:>14}",
        f"kept        {answer.n_kept:>14,}  rows",
        f"duplicates  {answer.n_duplicates:>14,}  rows ({answer.n_duplicates / compared:.1%})",
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes:,} bytes" if n_bytes < 10**6 else show_bytes(n_bytes)
