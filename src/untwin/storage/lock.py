"""One run at a time in an output folder: `_lock.json` says who works there."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from untwin.errors import OutputInUseError
from untwin.storage.files import Storage, is_remote, join, redact

LOCK = "_lock.json"


def check_unlocked(storage: Storage, folder: str) -> None:
    """Raise OutputInUseError if a run that may be alive works in a folder."""
    path = join(folder, LOCK)
    if not storage.exists(path):
        return
    try:
        held = json.loads(storage.read_bytes(path))
    except (FileNotFoundError, ValueError):
        held = None
    if held is None or _is_dead(held):
        return
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
            check_unlocked(storage, folder)
            storage.remove(path)
            if not storage.create(path, content):
                raise OutputInUseError(f"{redact(folder)}: another run has just begun there; wait for it")
    else:
        with _guarded(folder):
            check_unlocked(storage, folder)
            storage.write_json(path, mine)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError, ValueError):
            if storage.exists(path) and storage.read_json(path) == mine:
                storage.remove(path)


@contextlib.contextmanager
def _guarded(folder: str) -> Iterator[None]:
    """Let one process at a time of this machine look at the lock and take it."""
    import fcntl

    Path(folder).mkdir(parents=True, exist_ok=True)
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
    }


def _is_dead(held: dict[str, Any]) -> bool:
    """Whether it is certain that the process which made a lock is gone."""
    if held.get("host") != socket.gethostname():
        return False
    if held.get("boot") != _boot():
        return True
    if held.get("pid_namespace") != _pid_namespace():
        return False
    return _process_start(int(held.get("pid", 0))) != held.get("process_started")


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
