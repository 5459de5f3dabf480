"""Measures processes: time, memory of the whole process tree, what they report; and the machine it was on.

Shared by the benchmarks. Memory is the resident memory of all processes of the measured command together, looked up
20 times a second, or the largest peak of one of them, whichever is more. Where there is no /proc, it is the largest
process's peak.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Some machines set these to tune a BLAS for their processor. A user's machine has neither.
REMOVED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
UNTWIN = (sys.executable, "-m", "untwin")
_POLL_SECONDS = 0.05
_PACKAGES = ("untwin", "numpy", "pyarrow", "av", "onnxruntime", "faiss-cpu", "torch", "scikit-learn", "semhash")


@dataclass(frozen=True)
class Measured:
    """One run of one command. `peak_bytes` is resident memory over the whole process tree."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    report: dict[str, Any]


class CommandError(Exception):
    """A measured command ended with an error."""


def environment() -> dict[str, str]:
    """The environment of measured processes."""
    return {name: value for name, value in os.environ.items() if name not in REMOVED}


def measure(command: Sequence[str]) -> Measured:
    """Run a command to its end; its report is the JSON object that it prints, {} if it prints none."""
    os.sync()  # what was written before must not be written to disk at this command's cost
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment())
        ended = threading.Event()
        peaks = [0]

        def watch() -> None:
            while not ended.wait(_POLL_SECONDS):
                peaks.append(_tree_bytes(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
        except BaseException:
            process.kill()
            raise
        finally:
            ended.set()
            watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        if process.returncode != 0:
            said = (stderr.read() or stdout.read())[-4000:]
            raise CommandError(f"{' '.join(command)}\nended with code {process.returncode}:\n{said}")
        report = _json_in(stdout.read())
    # The peak that the system counts is not used where /proc is there: it also holds the memory that this process had
    # when it forked.
    peak = max(peaks) or usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measured(seconds, usage.ru_utime + usage.ru_stime, peak, report)


def _tree_bytes(root: int) -> int:
    """Look up the resident memory of a process and all its descendants, in bytes; 0 where there is no /proc.

    A single process's own peak counts where it is more than the sum at this moment.
    """
    total, peak, waiting = 0, 0, [root]
    while waiting:
        pid = waiting.pop()
        # A process may end while it is being looked at.
        with contextlib.suppress(OSError, ValueError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1]) * 1024
                elif line.startswith("VmHWM:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                waiting += [int(child) for child in children.read_text().split()]
    return max(total, peak)


def _json_in(text: str) -> dict[str, Any]:
    """The JSON object in what a command printed; {} if there is none."""
    with contextlib.suppress(ValueError):
        found, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
        return found if isinstance(found, dict) else {}
    return {}


def machine() -> dict[str, Any]:
    """Describe where the figures come from."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "cpu": model,
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def introduce() -> None:
    """Print what the machine is, and what is taken out of the environment."""
    print(", ".join(f"{name}: {value}" for name, value in machine().items()))
    for name in REMOVED:
        if name in os.environ:
            print(f"measured without {name}={os.environ[name]}")


def save(path: Path | None, parameters: dict[str, Any], results: Any) -> dict[str, Any]:
    """Put the parameters and the machine's description beside results, and write that as JSON if there is a path.

    Parameters that are paths are left out: they mean nothing on another machine.
    """
    saved = {
        "machine": machine(),
        "removed_from_environment": {name: os.environ.get(name) for name in REMOVED},
        "parameters": {name: value for name, value in parameters.items() if not isinstance(value, Path)},
        "results": results,
    }
    if path is not None:
        path.write_text(json.dumps(saved, indent=2) + "\n")
        print(f"\nsaved {path}")
    return saved


def show_bytes(count: float) -> str:
    """A size with a unit that reads well."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def print_table(header: list[str], lines: list[list[str]]) -> None:
    """Print lines of text below a header, the first column to the left, the others to the right."""
    widths = [max(len(line[k]) for line in [header, *lines]) for k in range(len(header))]
    for line in [header, ["-" * width for width in widths], *lines]:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells), flush=True)
