"""Folders and files, local or remote: opening, listing, atomic writing. Nobody else opens a file of input or output.

Local folders use the operating system directly; every other URL goes through fsspec.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import functools
import glob
import json
import logging
import os
import posixpath
import queue
import re
import shutil
import threading
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from untwin.errors import (
    DamagedFileError,
    InputNotFoundError,
    MissingExtraError,
    ParameterError,
    ResourceError,
    StorageError,
    UntwinError,
)
from untwin.storage.memory import space

T = TypeVar("T")
U = TypeVar("U")

_WHOLE_READ_BYTES = 8 << 20
_SMALL_FILE_BYTES = 1 << 20
_EXTRAS = {"s3": "s3", "s3a": "s3"}
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "s3fs")
"""Packages whose errors say that a remote storage cannot be reached, or refuses."""
_USER_INFO = re.compile(r"(?<=://)[^/@\s]*:(?!\d+(?:[/?#\s]|$))\S*@|(?<=s3://)[^/@\s]*@|(?<=s3a://)[^/@\s]*@")
"""User name and password in a URL; a password may hold slashes, and a port is none."""
_SECRET_OPTION = re.compile(r"key|secret|token|pass|user|credential|connection_string|sas", re.IGNORECASE)
_LEAST_SECRET = 4
"""Characters; what is shorter is no secret, and would be found in every text."""
_SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when there is no room: on the device, in the quota, or for so large a file."""
_CHECKSUM_BYTES = 1 << 20
_SYNCS = 16
"""Files that are forced to the disk at the same time."""
_IS_THERE = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
"""Answers to a conditional write that say that another one was first."""
_UNKNOWN_CONDITION = ("NotImplemented", "501")
_REMOVALS = 3
_BYTES_AHEAD = 32 << 20
"""Of ranges of remote files that are asked for before they are wanted."""
_ANY_END = 1 << 40
"""A position behind the end of every object: S3 gives what there is."""
_NO_RANGE = ("InvalidRange", "416")
_AT_A_TIME = 16
"""Small requests to a remote storage by one unit of work."""
_WRITTEN_BYTES = 16 << 20
"""Of files that are on their way to a remote storage; a larger one goes alone."""
_CONNECTIONS = 64
"""To an object storage; botocore's own limit of 10 would be less than one unit of work uses."""
_log = logging.getLogger("untwin")


@dataclass(frozen=True)
class FoundFile:
    """One listed file: its full path or URL, size in bytes, and what changes when its content does."""

    path: str
    size: int
    version: str


@dataclass(frozen=True)
class WrittenFile:
    """A complete file: its path, size in bytes and CRC-32 (None on object storage, which keeps checksums itself)."""

    path: str
    size: int
    checksum: int | None


class Recording:
    """The files that one unit of work writes; once it is stopped, no further file gets its name.

    Files that are to be durable get their names together, when `active` ends without an error: forcing many files
    to the disk at once takes a fraction of the time that it takes one by one.
    """

    def __init__(self, stopped: threading.Event | None = None) -> None:
        self._stopped = stopped or threading.Event()
        self._held: dict[Path, Path] = {}
        self.files: dict[str, WrittenFile] = {}
        self.complete = True
        """All that the unit leaves is in files; none of it lies in memory only."""

    def check(self) -> None:
        """Raise KeyboardInterrupt in a unit of an interrupted run."""
        if self._stopped.is_set():
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Record what this thread writes."""
        token = _recording.set(self)
        try:
            yield
            self._release()
        finally:
            _recording.reset(token)
            for temporary in self._held:
                temporary.unlink(missing_ok=True)

    def hold(self, temporary: Path, final: Path) -> None:
        """Leave a complete file under its temporary name for now."""
        self._held[temporary] = final

    def _release(self) -> None:
        """Force the files held to the disk, give them their names, and force these to the disk."""
        with ThreadPoolExecutor(_SYNCS) as pool:
            list(pool.map(self._force, self._held))
            self.check()
            for temporary, final in self._held.items():
                temporary.replace(final)
            list(pool.map(_sync, {final.parent for final in self._held.values()}))
        self._held.clear()

    def _force(self, temporary: Path) -> None:
        with Storage()._explained(str(self._held[temporary])):
            _sync(temporary)


_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("untwin-recording", default=None)


def note_held() -> None:
    """Tell the recording that the unit at work leaves something in memory instead of in a file."""
    recording = _recording.get()
    if recording is not None:
        recording.complete = False


def is_remote(path: str) -> bool:
    """Whether a path is a URL of something else than the local file system."""
    protocol, separator, _ = path.partition("://")
    return bool(separator) and protocol not in ("file", "local")


def normalize_path(path: str | os.PathLike[str]) -> str:
    """Return the absolute local path, or the URL without a trailing slash."""
    text = os.fspath(path)
    if not text:
        raise ParameterError("a path is empty; is a variable of the shell not set?")
    if is_remote(text):
        if _USER_INFO.search(text):
            # the listing of the input holds full paths, so a password in one would be written
            raise ParameterError(f"{redact(text)}: was given with a password in it; give that in storage_options")
        return text.rstrip("/")
    text = text.removeprefix("file://").removeprefix("local://")
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ParameterError(f"{text}: {error}") from error
    return str(path.resolve() if ".." in path.parts else path)


def real_path(path: str) -> str:
    """The path without symbolic links, to tell whether two paths are the same place; a URL as it is."""
    return path if is_remote(path) else str(Path(path).resolve())


def redact(path: str) -> str:
    """Remove user name and password from a URL, for messages and manifests; a container (`abfs://box@host`) stays."""
    return _USER_INFO.sub("", path)


def hide_secrets(text: str, options: Mapping[str, Any]) -> str:
    """Remove the values of `storage_options` and of the environment that are secret, and passwords in URLs."""
    secrets = {os.environ.get(name, "") for name in _SECRET_VARIABLES}
    left: list[tuple[str, Any]] = list(options.items())
    while left:
        name, value = left.pop()
        if isinstance(value, Mapping):
            left.extend(value.items())
        elif isinstance(value, str) and _SECRET_OPTION.search(name):
            secrets.add(value)
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _LEAST_SECRET:
            text = text.replace(secret, "***")
    return redact(text)


def join(folder: str, *names: str) -> str:
    """Join a folder's path or URL with names below it."""
    return posixpath.join(folder, *names) if is_remote(folder) else str(Path(folder, *names))


@functools.lru_cache(maxsize=32)
def _filesystem(protocol: str, options: str) -> Any:
    import fsspec

    given = json.loads(options)
    if protocol in _EXTRAS:
        given["config_kwargs"] = {"max_pool_connections": _CONNECTIONS, **given.get("config_kwargs", {})}
    try:
        return fsspec.filesystem(protocol, use_listings_cache=False, **given)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        hint = f"pip install 'untwin[{extra}]'" if extra else f"install the package that fsspec needs: {error}"
        raise MissingExtraError(f"{protocol}:// paths need a package that is not installed: {hint}") from error
    except ValueError as error:
        raise ParameterError(f"{protocol}:// is not a file system that fsspec knows: {error}") from error


@dataclass(frozen=True)
class Storage:
    """Access to paths with one set of fsspec `storage_options` (which are never shown or written)."""

    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def _fs(self, path: str) -> Any:
        try:
            options = json.dumps(dict(self.options), sort_keys=True)
        except TypeError:
            raise ParameterError(
                "storage_options holds an object; give text, numbers, truth values, lists and dictionaries only"
            ) from None
        return _filesystem(path.partition("://")[0], options)

    @contextlib.contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        """Turn a remote file system's errors into ones that name the path."""
        try:
            yield
        except (UntwinError, GeneratorExit):
            raise
        except FileNotFoundError as error:
            raise InputNotFoundError(f"{redact(path)}: not found") from error
        except PermissionError as error:
            what = "credentials and what they permit" if is_remote(path) else "permissions"
            raise StorageError(
                f"{redact(path)}: access denied ({self._said(error)}); check the {what}, then run again"
            ) from self._shown(error)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise ResourceError(
                    f"{redact(path)}: no space left on the device; make room, then run again"
                ) from error
            if is_remote(path) and _is_clients(error):
                raise self._unusable(path, error) from self._shown(error)
            if error.errno == errno.EROFS:
                raise StorageError(f"{redact(path)}: cannot be written, the file system is read-only") from error
            raise
        except Exception as error:
            if _is_clients(error):
                raise self._unusable(path, error) from self._shown(error)
            raise

    def _unusable(self, path: str, error: Exception) -> StorageError:
        return StorageError(
            f"{redact(path)}: the storage cannot be used ({self._said(error)}); check the endpoint and the "
            "credentials (they may have expired), or wait until it answers again, then run again"
        )

    def _said(self, error: Exception) -> str:
        """What a storage says about an error, without secrets: servers repeat what they were sent."""
        return hide_secrets(str(error), self.options)

    def _shown(self, error: BaseException) -> BaseException | None:
        """The error, for a traceback; None if it, or what it came from, repeats a secret."""
        cause: BaseException | None = error
        while cause is not None:
            if hide_secrets(str(cause), self.options) != str(cause):
                return None
            cause = cause.__cause__
        return error

    @contextlib.contextmanager
    def _first_contact(self, path: str) -> Iterator[None]:
        """Where options that a file system does not understand come to light; their values are not repeated."""
        try:
            with self._explained(path):
                yield
        except UntwinError:
            raise
        except (TypeError, AttributeError, ValueError) as error:
            found = str(error) if "unexpected keyword" in str(error) else type(error).__name__
            raise ParameterError(
                f"{redact(path)}: the storage options are not understood ({found}); check their names and values"
            ) from error

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        if not is_remote(path):
            return Path(path).exists()
        with self._first_contact(path):
            return bool(self._fs(path).exists(path))

    def is_folder(self, path: str) -> bool:
        """Whether a path is a folder (on object storage: a prefix with something below it)."""
        if not is_remote(path):
            return Path(path).is_dir()
        with self._first_contact(path):
            return bool(self._fs(path).isdir(path))

    def names(self, folder: str) -> list[str]:
        """Names directly in a folder, sorted; empty where there is no such folder."""
        if not is_remote(folder):
            try:
                return sorted(entry.name for entry in os.scandir(folder))
            except (FileNotFoundError, NotADirectoryError):
                return []
        with self._explained(folder):
            try:
                entries = self._fs(folder).ls(folder, detail=False)
            except FileNotFoundError:
                return []
        own = posixpath.basename(folder)
        names = {posixpath.basename(entry.rstrip("/")) for entry in entries}
        return sorted(names - {""} - ({own} if len(entries) == 1 and entries[0].endswith(own) else set()))

    def find(self, folder: str) -> list[FoundFile]:
        """All files below a folder, recursively, in no particular order; links to folders are followed once."""
        return list(self.walk(folder))

    def walk(self, folder: str) -> Iterator[FoundFile]:
        """All files below a folder, one by one; a folder that links lead to as well is met under its own path."""
        if is_remote(folder):
            with self._explained(folder):
                entries = self._fs(folder).find(folder, detail=True)
            protocol = folder.partition("://")[0]
            yield from (_found(f"{protocol}://{path}", info) for path, info in entries.items())
            return
        seen: set[tuple[int, int]] = set()
        folders, links = [folder], deque[str]()
        while folders or links:
            current = folders.pop() if folders else links.popleft()
            status = Path(current).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            linked: list[str] = []
            files: list[FoundFile] = []
            with self._explained(current), os.scandir(current) as entries_here:
                for entry in entries_here:
                    try:
                        if entry.is_dir():
                            (linked if entry.is_symlink() else folders).append(entry.path)
                        elif entry.is_file():
                            info = entry.stat()
                            files.append(FoundFile(entry.path, info.st_size, str(info.st_mtime_ns)))
                    except OSError as error:
                        if error.errno not in (errno.ENOENT, errno.ELOOP):  # gone meanwhile, or a link to itself
                            raise
            yield from files
            links.extend(sorted(linked))

    def glob(self, pattern: str) -> list[str]:
        """Paths (files and folders) that match a glob pattern, sorted."""
        if not is_remote(pattern):
            return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        with self._explained(pattern):
            matches = self._fs(pattern).glob(pattern)
        protocol = pattern.partition("://")[0]
        return sorted(f"{protocol}://{match}" for match in matches)

    def stat(self, path: str) -> FoundFile:
        """Size and version of one file."""
        if not is_remote(path):
            info = Path(path).stat()
            return FoundFile(path, info.st_size, str(info.st_mtime_ns))
        with self._explained(path):
            return _found(path, self._fs(path).info(path))

    def open(self, path: str, size: int | None = None, *, block_size: int | None = None) -> pa.NativeFile:
        """Open a file for reading at any position.

        Args:
            path: The file.
            size: Its bytes, if they are known: a small remote file then takes one request instead of two.
            block_size: Bytes that a request for a part of a large remote file asks for at least; None: 50 MB on S3.
        """
        if not is_remote(path):
            source = pa.OSFile(path, "rb")
            if source.size() > _SMALL_FILE_BYTES:
                return source
            with source:
                return pa.BufferReader(source.read_buffer())
        with self._explained(path):
            fs = self._fs(path)
            if size is None:
                size = int(fs.info(path)["size"])
            if size <= _WHOLE_READ_BYTES:
                # with a range: s3fs reads it in one request, and asks again when the answer is cut off
                return pa.BufferReader(fs.cat_file(path, start=0, end=size) if size else b"")
            return pa.PythonFile(_RemoteSource(self, path, fs.open(path, "rb", block_size)), mode="r")

    def read_bytes(self, path: str) -> bytes:
        """Read a whole small file."""
        with self._explained(path):
            if is_remote(path):
                return self._read_whole(path)
            with self.open(path) as source:
                return bytes(source.read())

    def _read_whole(self, path: str) -> bytes:
        try:
            return bytes(self._fs(path).cat_file(path, start=0, end=_ANY_END))
        except OSError as error:
            if _code(error) in _NO_RANGE:  # of an empty file
                return b""
            raise

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Read `length` bytes from position `start`."""
        if is_remote(path):
            with self._explained(path):
                return bytes(self._fs(path).cat_file(path, start=start, end=start + length))
        with pa.OSFile(path, "rb") as source:
            return bytes(source.read_at(length, start))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Iterator[pa.Buffer]:
        """Parts of files, in order; remote ones several at a time, so that their latency does not add up.

        Args:
            ranges: Path, first byte and number of bytes of each, all local or all remote.

        Raises:
            DamagedFileError: A file ends before.
        """
        if not ranges or not is_remote(ranges[0][0]):
            yield from (self._read_local(*wanted) for wanted in ranges)
            return
        yield from map_ahead(lambda wanted: self._read_remote(*wanted), ranges, size=lambda wanted: wanted[2])

    def _read_local(self, path: str, start: int, length: int) -> pa.Buffer:
        with self._explained(path), pa.OSFile(path, "rb") as source:
            source.seek(start)
            return _of_length(path, source.read_buffer(length), length)

    def _read_remote(self, path: str, start: int, length: int) -> pa.Buffer:
        return _of_length(path, pa.py_buffer(self.read_range(path, start, length)), length)

    @contextlib.contextmanager
    def writing(self, path: str, *, durable: bool = False) -> Iterator[pa.NativeFile]:
        """Write a file that appears under its name only when it is complete.

        Args:
            path: Final path or URL; missing folders are made.
            durable: Force the content to the disk before the name appears (local files); in a unit of work, the
                name appears when the unit is done.
        """
        recording = _recording.get()
        if is_remote(path):
            with self._explained(path):
                remote = self._fs(path).open(path, "wb")
                try:
                    sink = pa.PythonFile(remote, mode="w")
                    yield sink
                    size = sink.tell()
                    sink.flush()
                    if recording is not None:
                        recording.check()
                    self._complete(remote, path, size)
                    if recording is not None:
                        recording.files[path] = WrittenFile(path, size, None)
                except BaseException:
                    with contextlib.suppress(Exception):
                        remote.discard()
                    remote.closed = True
                    raise
            return
        final = Path(path)
        temporary = final.with_name(f"_tmp-{uuid.uuid4().hex}")
        with self._explained(path):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                with pa.OSFile(str(temporary), "wb") as sink:
                    yield sink
                if recording is not None:
                    written = WrittenFile(path, *_checksum(temporary))
                    recording.check()
                    recording.files[path] = written
                    if durable:
                        recording.hold(temporary, final)
                        return
                if durable:
                    _sync(temporary)
                temporary.replace(final)
                if durable:
                    _sync(final.parent)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def _complete(self, remote: Any, path: str, size: int) -> None:
        """Finish an upload, so that the object appears."""
        try:
            remote.close()
        except FileNotFoundError as error:
            if _code(error) != "NoSuchUpload":
                raise _no_bucket(path) from error
            # that is the answer when an earlier try did complete it, and its answer got lost
            if not self.is_unchanged(WrittenFile(path, size, None)):
                raise StorageError(f"{redact(path)}: its upload was aborted by somebody else; run again") from error
            remote.closed = True

    def write_bytes(self, path: str, content: bytes, *, durable: bool = False) -> None:
        """Write a whole small file atomically."""
        with self.writing(path, durable=durable) as sink:
            sink.write(content)

    def create(self, path: str, content: bytes) -> bool:
        """Write a small remote file unless it is there; False if it is, and holds something else.

        One conditional write where the file system knows such (S3); elsewhere a look and a write. The content must be
        like no other: it tells whether the file is our own, written by a try whose answer got lost.
        """
        fs = self._fs(path)
        with self._explained(path):
            try:
                fs.pipe_file(path, content, mode="create")
            except FileNotFoundError as error:
                raise _no_bucket(path) from error
            except OSError as error:
                if isinstance(error, FileExistsError) or _code(error) in _IS_THERE:
                    return self._holds(path, content)
                if _code(error) not in _UNKNOWN_CONDITION:
                    raise
                return self._create_unconditionally(path, content)
            except (TypeError, ValueError, NotImplementedError):
                return self._create_unconditionally(path, content)
        return True

    def _create_unconditionally(self, path: str, content: bytes) -> bool:
        if self.exists(path):
            return False
        self.write_bytes(path, content)
        return True

    def _holds(self, path: str, content: bytes) -> bool:
        try:
            return self.read_bytes(path) == content
        except FileNotFoundError:
            return False

    def is_unchanged(self, file: WrittenFile) -> bool:
        """Whether a file is there as it was written: its size, and for local files its checksum."""
        try:
            if is_remote(file.path):
                return self.stat(file.path).size == file.size
            return Path(file.path).stat().st_size == file.size and _checksum(Path(file.path))[1] == file.checksum
        except FileNotFoundError:
            return False

    def read_json(self, path: str) -> Any:
        """Read a JSON file."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise DamagedFileError(f"{redact(path)}: is not JSON ({error}); repair or remove the file") from error

    def write_json(self, path: str, value: Any, *, durable: bool = True) -> None:
        """Write a JSON file atomically."""
        text = json.dumps(value, indent=2, sort_keys=False, ensure_ascii=False, allow_nan=False)
        self.write_bytes(path, (text + "\n").encode(), durable=durable)

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is below it; also what is held in memory instead.

        A file that the unit at work has written itself is none of those that it leaves.
        """
        space().drop(path)
        recording = _recording.get()
        if recording is not None:
            recording.files.pop(path, None)
        if is_remote(path):
            fs = self._fs(path)
            with self._explained(path):
                for _ in range(_REMOVALS):
                    with contextlib.suppress(FileNotFoundError):
                        fs.rm(path, recursive=True)
                    # S3 says that it is done, also when it has refused to delete some of many objects
                    if not fs.exists(path):
                        return
                raise PermissionError("objects were not deleted")
        target = Path(path)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def abort_uploads(self, folder: str, is_ours: Callable[[str], bool]) -> None:
        """Abort uploads of several parts below a folder that were begun and never completed (S3; elsewhere nothing).

        A storage that does not list uploads, or does not let us, is left as it is.

        Args:
            folder: Only below it.
            is_ours: Whether an upload may be aborted, by its object's name relative to the folder.
        """
        fs: Any = self._fs(folder) if is_remote(folder) else None
        if not hasattr(fs, "call_s3"):
            return
        bucket, key, _ = fs.split_path(folder)
        prefix = f"{key}/" if key else ""
        more: dict[str, str] = {}
        try:
            while True:
                page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **more)
                for upload in page.get("Uploads", []):
                    name = upload["Key"]
                    if name.startswith(prefix) and is_ours(name[len(prefix) :]):
                        with contextlib.suppress(FileNotFoundError):
                            fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=name, UploadId=upload["UploadId"])
                if not page.get("IsTruncated"):
                    return
                more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        except Exception as error:
            said = self._said(error)
            _log.info("%s: abandoned uploads, if there are any, were not aborted (%s)", redact(folder), said)

    def free_bytes(self, path: str) -> int | None:
        """Free bytes on the disk that would hold `path`; None for remote storage.

        Raises:
            UntwinError: Nothing can be written there.
        """
        if is_remote(path):
            return None
        folder = Path(path)
        while not folder.exists():
            folder = folder.parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UntwinError(f"{path}: cannot be written ({folder} is read-only for this user); choose another folder")
        return shutil.disk_usage(folder).free


class _RemoteSource:
    """A remote file that is read piece by piece, with errors that name it."""

    def __init__(self, storage: Storage, path: str, source: Any) -> None:
        self._storage = storage
        self._path = path
        self._source = source

    def read(self, length: int = -1) -> bytes:
        with self._storage._explained(self._path):
            return bytes(self._source.read(length))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def _of_length(path: str, buffer: pa.Buffer, length: int) -> pa.Buffer:
    if buffer.size != length:
        raise DamagedFileError(f"{redact(path)}: cannot be read (it is cut off); remove the file, then run again")
    return buffer


def _is_clients(error: BaseException | None) -> bool:
    """Whether an error, or one that it was made from, comes from a remote storage's client."""
    while error is not None:
        if type(error).__module__.partition(".")[0] in _CLIENTS:
            return True
        error = error.__cause__
    return False


def _code(error: BaseException) -> str:
    """The code with which S3 answered; empty if the error is not an answer."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _no_bucket(path: str) -> UntwinError:
    return UntwinError(f"{redact(path)}: cannot be written, there is no such bucket; make it first")


def _sync(path: Path) -> None:
    """Force a file, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a local file."""
    size = checksum = 0
    buffer = bytearray(_CHECKSUM_BYTES)
    with path.open("rb", buffering=0) as source:
        while count := source.readinto(buffer):
            checksum = zlib.crc32(memoryview(buffer)[:count], checksum)
            size += count
    return size, checksum


def _found(path: str, info: Mapping[str, Any]) -> FoundFile:
    version = info.get("VersionId") or info.get("ETag") or info.get("mtime") or info.get("LastModified") or ""
    return FoundFile(path, int(info["size"]), str(version))


def read_many(read: Callable[[str], T], paths: Sequence[str]) -> Iterator[T]:
    """`map` for small reads: some at a time where each waits for a remote storage, no further ahead than that."""
    if not paths or not is_remote(paths[0]):
        yield from map(read, paths)
        return
    yield from map_ahead(read, paths)


def map_ahead(
    function: Callable[[U], T], items: Iterable[U], /, *, size: Callable[[U], int] = lambda _: 0
) -> Iterator[T]:
    """`map` by threads that mostly wait for a remote storage: some items ahead, of a bounded size in all."""
    ahead: deque[tuple[Future[T], int]] = deque()
    pool = ThreadPoolExecutor(_AT_A_TIME, "untwin-read")
    try:
        for item in items:
            n_bytes = size(item)
            while ahead and (len(ahead) == _AT_A_TIME or sum(held for _, held in ahead) + n_bytes > _BYTES_AHEAD):
                yield ahead.popleft()[0].result()
            # a copy each: a context cannot be entered twice
            ahead.append((pool.submit(contextvars.copy_context().run, function, item), n_bytes))
        while ahead:
            yield ahead.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)


class Writes:
    """Writes of many files below a folder: some at a time where each waits for a remote storage, else one by one.

    At the end of the `with` block all are done; the first error is raised.

    Args:
        folder: Where they go.
    """

    def __init__(self, folder: str) -> None:
        self._pool = ThreadPoolExecutor(_AT_A_TIME, "untwin-write") if is_remote(folder) else None
        self._pending: deque[tuple[Future[Any], int]] = deque()

    def __enter__(self) -> Writes:
        return self

    def add(self, size: int, write: Callable[..., Any], *args: Any) -> None:
        """Call `write(*args)`, which holds about so many bytes until it returns."""
        if self._pool is None:
            write(*args)
            return
        most = max(0, _WRITTEN_BYTES - size)
        while len(self._pending) >= _AT_A_TIME or sum(held for _, held in self._pending) > most:
            self._pending.popleft()[0].result()
        self._pending.append((self._pool.submit(contextvars.copy_context().run, write, *args), size))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        try:
            while self._pending and kind is None:
                self._pending.popleft()[0].result()
        finally:
            self._pool.shutdown(cancel_futures=True)


def read_ahead(produce: Callable[[], Iterator[T]], *, depth: int = 2) -> Iterator[T]:
    """Iterate over `produce()` run in a thread of its own, at most `depth` items ahead.

    Decoding a file then overlaps with computing on what came before it.
    """
    items: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stopped.is_set():
            try:
                items.put((kind, value), timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in produce():
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=work, daemon=True, name="untwin-read-ahead")
    thread.start()
    try:
        while True:
            kind, value = items.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()
