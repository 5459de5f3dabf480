"""One run at a time in an output folder: `_lock.json` says who works there."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from untwin.errors import OutputInUseError, StorageError, UntwinError
from untwin.storage.files import Storage, is_remote, join, redact

LOCK = "_lock.json"
_log = logging.getLogger("untwin")
_held: set[str] = set()
"""Tokens of the locks that this process holds."""


def check_unlocked(storage: Storage, folder: str) -> bool:
    """Whether a dead run's lock lies in a folder; raise OutputInUseError if a run that may be alive works there."""
    path = join(folder, LOCK)
    if not storage.exists(path):
        return False
    try:
        held = json.loads(storage.read_bytes(path))
    except (FileNotFoundError, ValueError):
        held = None
    if held is None or _is_dead(held):
        return True
    raise OutputInUseError(
        f"{redact(folder)}: a run works on it: host {held.get('host')}, process {held.get('pid')}, started "
        f"{held.get('started')}; wait for it, or choose another folder. If that process is gone for sure, remove {LOCK}"
    )


@contextlib.contextmanager
def locked(storage: Storage, folder: str) -> Iterator[None]:
    """Hold the lock of a folder. A lock that a dead process of this host left is taken over.

    On object storage the lock is a conditional write where the server knows such.

    Raises:
        OutputInUseError: Another run works there, or may do so.
    """
    mine = _mine()
    path = join(folder, LOCK)
    if is_remote(folder):
        content = json.dumps(mine).encode()
        if not storage.create(path, content):
            if check_unlocked(storage, folder):
                storage.remove(path)
            if not storage.create(path, content):
                raise OutputInUseError(f"{redact(folder)}: another run has just begun there; wait for it")
    else:
        with _guarded(folder):
            check_unlocked(storage, folder)
            storage.write_json(path, mine)
    _held.add(mine["token"])
    try:
        yield
    finally:
        _held.discard(mine["token"])
        try:
            if storage.read_json(path) == mine:
                storage.remove(path)
        except FileNotFoundError:
            pass
        except (UntwinError, OSError) as error:
            # what went wrong before, if anything did, is what the user has to hear
            _log.warning("%s: could not be removed (%s); the next run on this host takes it over", redact(path), error)


def remove_dead_lock(storage: Storage, folder: str) -> None:
    """Remove the lock of a run that was killed between its last file and its end."""
    with contextlib.suppress(UntwinError, OSError):
        if check_unlocked(storage, folder):
            with locked(storage, folder):
                pass


@contextlib.contextmanager
def _guarded(folder: str) -> Iterator[None]:
    """Let one process at a time of this machine look at the lock and take it."""
    import fcntl

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made ({error.strerror}); choose another output folder") from error
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems know no such locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _mine() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "process_started": _process_start(os.getpid()),
        "boot": _boot(),
        "pid_namespace": _pid_namespace(),
        "token": uuid.uuid4().hex,
    }


def _is_dead(held: dict[str, Any]) -> bool:
    """Whether it is certain that the process which made a lock is gone."""
    if held.get("host") != socket.gethostname():
        return False
    if held.get("boot") != _boot():
        return True
    if held.get("pid_namespace") != _pid_namespace():
        return False
    if _process_start(int(held.get("pid", 0))) != held.get("process_started"):
        return True
    return held.get("pid") == os.getpid() and "token" in held and held["token"] not in _held


def _process_start(pid: int) -> str:
    """When a process began, in any form that another process with the same number differs in; empty if it is gone."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return "" if fields[0] in "ZX" else fields[19]
        return ""
    shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return shown.stdout.strip()


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _pid_namespace() -> str:
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""
