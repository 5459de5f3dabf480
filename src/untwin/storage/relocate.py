"""Linking, copying and moving local files without ever overwriting one; the undo file that makes a move reversible.

Whatever is done here can be killed at any point, and done again: what is done already is seen, and left as it is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untwin.errors import DamagedFileError, OutputExistsError, UntwinError, one_line
from untwin.storage.files import Storage
from untwin.storage.lock import LOCK

UNDO = "_untwin-undo.jsonl"
"""What a move writes before it moves: a line on itself, then a line for each folder that it makes and each file."""
_UNDO_VERSION = 1
_BATCH = 1000
"""Files that are moved between two writes of the undo file."""
_COMPARED = 1 << 20
_TEMPORARY = re.compile("_tmp-[0-9a-f]{32}")
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a system says where a file cannot have a second name."""


@dataclass(frozen=True)
class Moved:
    """A file of the undo file.

    Attributes:
        name: Its path below either folder.
        size: Bytes.
        mtime_ns: Time of its last change.
        link: For a symbolic link: where it leads, as it was written.
    """

    name: str
    size: int
    mtime_ns: int
    link: str | None


class UndoFile:
    """The undo file of a folder that files are moved into.

    Attributes:
        folder: That folder.
        about: The first line: where files came from, and because of what. Empty before it is written.
        made: Folders below it that were made for a move.
        moved: Files by name.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.path = Path(folder, UNDO)
        self.about: dict[str, Any] = {}
        self.made: list[str] = []
        self.moved: dict[str, Moved] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        with self.path.open(encoding="ascii") as source:
            for line in source:
                if not line.endswith("\n"):  # a kill came in the middle of it, so nothing was moved yet
                    break
                try:
                    content = json.loads(line)
                    if "name" in content:
                        self.moved[content["name"]] = Moved(**content)
                    elif "made" in content:
                        self.made.append(content["made"])
                    else:
                        self.about = content
                except (ValueError, TypeError) as error:
                    raise DamagedFileError(f"{self.path}: is damaged ({error}); repair it by hand") from error
        for name in (*self.moved, *self.made):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise DamagedFileError(f"{self.path}: {one_line(name)} is no path below a folder; it is not followed")
        if self.about and self.about.get("untwin_undo") != _UNDO_VERSION:
            raise DamagedFileError(f"{self.path}: was not made by this version of untwin")

    def begin(self, about: Mapping[str, Any]) -> None:
        """Write the first line, or make the file ready for more lines."""
        if self.about:
            self._cut_off()
            return
        self.path.unlink(missing_ok=True)  # a kill came in the middle of the first line
        self.about = {"untwin_undo": _UNDO_VERSION, **about}
        self._append([self.about])
        _sync(self.folder)

    def _cut_off(self) -> None:
        """Remove a line that a kill came in the middle of."""
        with self.path.open("rb+") as sink:
            size = sink.seek(0, os.SEEK_END)
            end = size
            while end:
                low = max(0, end - _COMPARED)
                sink.seek(low)
                found = sink.read(end - low).rfind(b"\n")
                end = low + found + 1 if found >= 0 else low
                if found >= 0:
                    break
            if end < size:
                sink.truncate(end)

    def add(self, made: Sequence[str], moved: Sequence[Moved]) -> None:
        """Write what is about to be made and moved; it is on the disk when this returns."""
        self._append([*({"made": name} for name in made), *(vars(file) for file in moved)])
        self.made += made
        self.moved.update((file.name, file) for file in moved)

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)  # ASCII: other names come back as they were
        with self.path.open("a", encoding="ascii") as sink:
            sink.write(text)
            sink.flush()
            os.fsync(sink.fileno())


# --- is it done, or in the way? --------------------------------------------------------------------------------------


def is_linked(source: str, target: str) -> bool:
    """Whether a target is there and leads to a file; OutputExistsError if it is something else."""
    if not _is_there(target, source):
        return False
    if Path(target).exists() and Path(source).samefile(target):
        return True
    raise _in_the_way(target)


def is_copied(source: str, target: str) -> bool:
    """Whether a target is there and has the content of a file; OutputExistsError if it is something else.

    Files of the same size and time of change are taken for the same; of others the content is compared. While a kill
    has left the file from which the target got its name, it is not done.
    """
    if not _is_there(target, source):
        return False
    if Path(target).is_file():
        one, other = Path(source).stat(), Path(target).stat()
        if one.st_size == other.st_size and (one.st_mtime_ns == other.st_mtime_ns or _same_content(source, target)):
            return not _temporary(target).exists()
    raise _in_the_way(target)


def is_moved(source: str, target: str, undo: UndoFile, name: str) -> bool:
    """Whether a file was moved; OutputExistsError if a target is there that is not the file.

    A move that was killed may leave a file at both places: then it is not moved yet.
    """
    if not _is_there(target, source):
        return False
    if not os.path.lexists(source):
        if name in undo.moved:
            return True
    elif name in undo.moved and _is_the_same(source, target, undo.moved[name]):
        return False
    raise _in_the_way(target)


def _is_the_same(one: str, other: str, moved: Moved) -> bool:
    """Whether two paths are those of one file that a move or undo was killed between copying and removing."""
    if moved.link is not None:
        return Path(one).is_symlink() and Path(other).is_symlink()
    if Path(one).is_symlink() or Path(other).is_symlink() or not (Path(one).is_file() and Path(other).is_file()):
        return False
    return Path(one).samefile(other) or (
        all(Path(path).stat().st_size == moved.size for path in (one, other)) and _same_content(one, other)
    )


def _is_there(target: str, source: str) -> bool:
    """Whether a target is there; OutputExistsError if what should be its folder is a file."""
    try:
        os.lstat(target)
        return True
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        raise OutputExistsError(
            f"{one_line(target)}: cannot be made for {one_line(source)}, a folder above it is a file; give another --to"
        ) from None


def _in_the_way(target: str) -> OutputExistsError:
    return OutputExistsError(
        f"{one_line(target)}: is there already and is another file; nothing is overwritten: move it away, or give "
        "another --to"
    )


# --- doing it ---------------------------------------------------------------------------------------------------------


def link_file(source: str, target: str) -> bool:
    """Give a file a second name; a symbolic link where that cannot be. Returns whether it is a hard link.

    A source that is a symbolic link itself is followed.
    """
    if is_linked(source, target):
        return not Path(target).is_symlink()
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with _named(target):
        try:
            os.link(os.path.realpath(source), target)
            return True
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        Path(target).symlink_to(source)
        return False


def copy_file(source: str, target: str) -> None:
    """Copy a file with its times and permissions; it gets its name when it is complete."""
    if is_copied(source, target):
        return
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with _named(target):
        if os.path.lexists(target):
            _temporary(target).unlink()
        else:
            _rename(_copied(source, target), target)


def move_files(media: str, folder: str, undo: UndoFile, names: Sequence[str]) -> Iterator[int]:
    """Move files from one folder into another, under the same names.

    Args:
        media: Where they are.
        folder: Where they go; holds the undo file, with its first line.
        undo: Gets what is needed to undo it, before it is done.
        names: Paths below `media`.

    Yields:
        Numbers of files that were moved since the last one.
    """
    for low in range(0, len(names), _BATCH):
        some = names[low : low + _BATCH]
        new = [_facts(media, name) for name in some if name not in undo.moved]
        folders = [name for name in _folders(some) if not Path(folder, name).is_dir() and name not in undo.made]
        if new or folders:
            undo.add(folders, new)
        for name in _folders(some):
            Path(folder, name).mkdir(exist_ok=True)
        for name in some:
            _move(str(Path(media, name)), str(Path(folder, name)), undo.moved[name], back=False)
        yield len(some)


def put_back(undo: UndoFile) -> tuple[int, list[str]]:
    """Undo a move: put its files back where they were, then remove the undo file and the folders that it made.

    Returns:
        The number of files put back, and names of those that are at neither place any more.

    Raises:
        OutputExistsError: A file would be overwritten; nothing is done then.
        UntwinError: The folder that the files came from is gone.
    """
    media = undo.about["media"]
    if not Path(media).is_dir():
        raise UntwinError(f"{one_line(media)}: is gone, so files cannot go back there; make it, or mount its disk")
    todo: list[Moved] = []
    gone: list[str] = []
    for moved in undo.moved.values():
        source, target = str(Path(media, moved.name)), str(Path(undo.folder, moved.name))
        here, there = os.path.lexists(target), os.path.lexists(source)
        if here and there and not _is_the_same(source, target, moved):
            raise OutputExistsError(
                f"{one_line(source)}: is there, and {one_line(target)} cannot go back; nothing is overwritten: move "
                "one of them away"
            )
        if here:
            todo.append(moved)
        elif not there:
            gone.append(moved.name)
    for moved in todo:
        source, target = str(Path(media, moved.name)), str(Path(undo.folder, moved.name))
        Path(source).parent.mkdir(parents=True, exist_ok=True)
        _move(target, source, moved, back=True)
    for moved in undo.moved.values():  # what a kill left of a copy to another disk
        for path in (Path(media, moved.name), Path(undo.folder, moved.name)):
            _temporary(str(path)).unlink(missing_ok=True)
    for name in sorted(undo.made, key=lambda name: name.count("/"), reverse=True):
        with contextlib.suppress(OSError):  # it holds something that no move has put there
            Path(undo.folder, name).rmdir()
    return len(todo), gone


def remove_undo(undo: UndoFile) -> None:
    """Remove the undo file of a move that was undone, and the folder if it was made for the move and is empty."""
    undo.path.unlink()
    folder = Path(undo.folder)
    with contextlib.suppress(OSError):
        for _ in range(undo.about["levels_made"]):
            folder.rmdir()
            folder = folder.parent


def levels_to_make(folder: str) -> int:
    """Number of folders of a path that are not there; 1 if the last one holds no more than what a kill leaves."""
    levels, path = 0, Path(folder)
    while not path.exists():
        levels, path = levels + 1, path.parent
    names = [entry.name for entry in path.iterdir()]
    return levels or int(LOCK in names and all(name == LOCK or _TEMPORARY.fullmatch(name) for name in names))


def remove_temporaries(folder: str) -> None:
    """Remove what a kill left right in a folder. Only while it is locked."""
    for path in Path(folder).iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink()


def same_disk(one: str, other: str) -> bool:
    """Whether two paths, of which the second need not be there yet, are on one disk."""
    path = Path(other)
    while not path.exists():
        path = path.parent
    return Path(one).stat().st_dev == path.stat().st_dev


def _move(source: str, target: str, moved: Moved, *, back: bool) -> None:
    """Move one file; finish it, where it was killed in the middle.

    Args:
        source: Where it is.
        target: Where it goes.
        moved: Its facts.
        back: Undo.
    """
    if not os.path.lexists(source):
        return
    with _named(target):
        if os.path.lexists(target):
            if not _is_the_same(source, target, moved):
                raise _in_the_way(target)
            _temporary(target).unlink(missing_ok=True)
            Path(source).unlink()
        elif moved.link is not None:
            # where it leads from its first place, whatever that is relative to
            Path(target).symlink_to(moved.link if back else Path(os.path.realpath(Path(source).parent), moved.link))
            Path(source).unlink()
        else:
            try:
                _rename(source, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                _move_across(source, target)


def _move_across(source: str, target: str) -> None:
    """Copy a file to another disk, make sure that it is there, and remove the first one."""
    temporary = _copied(source, target)
    if temporary.stat().st_size != Path(source).stat().st_size:
        raise UntwinError(f"{one_line(source)}: changed while it was copied; run again")
    _sync(temporary)
    _rename(temporary, target)
    _sync(Path(target).parent)
    Path(source).unlink()


def _copied(source: str, target: str) -> Path:
    """A copy of a file beside where it is to be."""
    temporary = _temporary(target)
    try:
        shutil.copy2(source, temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _rename(source: str | Path, target: str | Path) -> None:
    """Rename a file, unless the target is there: a second name cannot overwrite, as a rename would."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS or error.errno == errno.EXDEV:
            raise
        if os.path.lexists(target):
            raise _in_the_way(str(target)) from None
        Path(source).rename(target)
        return
    Path(source).unlink()


def _facts(media: str, name: str) -> Moved:
    path = Path(media, name)
    status = path.lstat()
    return Moved(name, status.st_size, status.st_mtime_ns, str(path.readlink()) if path.is_symlink() else None)


def _folders(names: Iterable[str]) -> list[str]:
    """The folders of files and all above, each once, those above first."""
    found: dict[str, None] = {}
    for name in dict.fromkeys(os.path.dirname(name) for name in names):  # noqa: PTH120 - of a part of a path
        parts = name.split("/") if name else []
        found.update(dict.fromkeys("/".join(parts[: count + 1]) for count in range(len(parts))))
    return list(found)


def _temporary(target: str) -> Path:
    """Where a file is made before it gets its name: always the same, so that nothing is left over of a kill."""
    digest = hashlib.blake2b(os.fsencode(os.path.basename(target)), digest_size=16).hexdigest()  # noqa: PTH119
    return Path(target).with_name(f"_tmp-{digest}")


def _same_content(one: str, other: str) -> bool:
    with Path(one).open("rb") as first, Path(other).open("rb") as second:
        while True:
            left, right = first.read(_COMPARED), second.read(_COMPARED)
            if left != right:
                return False
            if not left:
                return True


@contextlib.contextmanager
def _named(target: str) -> Iterator[None]:
    """Errors that name the file: a full disk, or a lack of permission."""
    try:
        with Storage()._explained(one_line(target)):
            yield
    except FileExistsError as error:
        raise _in_the_way(target) from error


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
