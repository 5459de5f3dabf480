"""Measures the whole command, `untwin run`, against a plain copy of the same files, both in the same run.

    python benchmarks/end_to_end.py --rows 200000 --layouts zstd upstream --json results.json

For each layout: makes the data with generate.py unless they are in --workdir already; then, --repeat times, a
copy and a run, one after the other in alternating order, each in a process of its own. The copy reads every
input file with pyarrow and writes it again with the input's own compression and encoding; it is what any tool
that reads and writes all rows has to pay. Printed figures are medians over the repeats (memory: the largest);
the ratio is the median of the ratios of the pairs. Input files have just been read or written, so they
usually come from the page cache in both.

Memory is the resident memory of all processes of the measured command together, looked up 20 times a second,
or the largest peak of one of them, whichever is more. Where there is no /proc, it is the largest process's
peak.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import generate
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# Some machines set these to tune a BLAS for their processor. A user's machine has neither.
_REMOVED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Measured:
    """One run of one command. `peak_bytes` is resident memory over the whole process tree."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    files: int
    bytes: int
    folders: dict[str, dict[str, int]]
    report: dict[str, Any]


class CommandError(Exception):
    """A measured command ended with an error."""


# --- the copy
# -------------------------------------------------------------------------------------------------


def copy_folder(source: Path, target: Path) -> None:
    """Read each Parquet file and write it again, row group by row group, compressed and encoded as it was."""
    target.mkdir(parents=True)
    for path in sorted(source.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            groups = file.metadata.num_row_groups
            compression: dict[str, str] = {}
            dictionary: list[str] = []
            for k in range(file.metadata.num_columns if groups else 0):
                column = file.metadata.row_group(0).column(k)
                name = column.compression.lower()
                compression[column.path_in_schema] = "none" if name == "uncompressed" else name
                if column.has_dictionary_page or "RLE_DICTIONARY" in column.encodings:
                    dictionary.append(column.path_in_schema)
            with pq.ParquetWriter(
                target / path.name,
                file.schema_arrow,
                compression=compression or "snappy",
                use_dictionary=dictionary or False,
            ) as writer:
                for k in range(groups):
                    writer.write_table(file.read_row_group(k), row_group_size=file.metadata.row_group(k).num_rows)


# --- measuring
# ------------------------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _REMOVED}


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


def _count(folder: Path) -> tuple[int, int, dict[str, dict[str, int]]]:
    """Count files and bytes in a folder, in all and per top-level folder (files at the top: by ending)."""
    folders: dict[str, dict[str, int]] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            inside = path.relative_to(folder)
            top = f"{inside.parts[0]}/" if len(inside.parts) > 1 else f"*{inside.suffix}"
            entry = folders.setdefault(top, {"files": 0, "bytes": 0})
            entry["files"] += 1
            entry["bytes"] += path.stat().st_size
    return (
        sum(entry["files"] for entry in folders.values()),
        sum(entry["bytes"] for entry in folders.values()),
        dict(sorted(folders.items())),
    )


def _json_in(text: str) -> dict[str, Any]:
    """Return the JSON object that a command printed; {} if it printed none."""
    start = text.find("{")
    if start < 0:
        return {}
    with contextlib.suppress(ValueError):
        found, _ = json.JSONDecoder().raw_decode(text[start:])
        return found if isinstance(found, dict) else {}
    return {}


def measure(command: list[str], output: Path) -> Measured:
    """Run a command that writes into the folder `output`, which is removed before and after."""
    if output.exists():
        shutil.rmtree(output)
    os.sync()  # what was written before must not be written to disk at this command's cost
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=_environment())
        peak = 0
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                peak = max(peak, _tree_bytes(process.pid))
                time.sleep(_POLL_SECONDS)
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        if process.returncode != 0:
            said = (stderr.read() or stdout.read())[-4000:]
            raise CommandError(f"{' '.join(command)}\nended with code {process.returncode}:\n{said}")
        report = _json_in(stdout.read())
    if not peak:
        # Not used where /proc is there: it also counts the memory that this process had when it forked.
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    files, size, folders = _count(output)
    if files:
        shutil.rmtree(output)
    return Measured(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=peak,
        files=files,
        bytes=size,
        folders=folders,
        report=report,
    )


# --- the machine
# ----------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Describe where the figures come from."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        version = importlib.metadata.version("untwin")
    except importlib.metadata.PackageNotFoundError:
        version = None
    return {
        "cpu": model,
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pyarrow": pa.__version__,
        "untwin": version,
    }


# --- the benchmark
# --------------------------------------------------------------------------------------------


def prepare(workdir: Path, layout: str, *, rows: int, dim: int, seed: int, files: int) -> Path:
    """Return the folder of a data set, which is made first unless it is there."""
    name = f"{layout}-{rows}x{dim}-seed{seed}-v{generate.VERSION}"
    folder = workdir / (name if layout == "upstream" else f"{name}-{files}files")
    if not folder.exists():
        # Renamed when complete, so that an interrupted run leaves nothing that looks like a data set.
        partial = folder.with_name(folder.name + ".partial")
        if partial.exists():
            shutil.rmtree(partial)
        started = time.perf_counter()
        generate.write(partial, rows, dim, layout, seed=seed, files=files)
        partial.rename(folder)
        print(f"made {folder} in {time.perf_counter() - started:.1f} s", flush=True)
    return folder


def _median(runs: list[Measured], field: str) -> float:
    return statistics.median(getattr(run, field) for run in runs)


def _stages(runs: list[Measured]) -> list[dict[str, Any]]:
    """Median seconds of each stage that the runs report, in the order reported; [] if they report none."""
    seconds: dict[str, list[float]] = {}
    rows: dict[str, Any] = {}
    for run in runs:
        stages = run.report.get("stages")
        for stage in stages if isinstance(stages, list) else []:
            if not isinstance(stage, dict) or not isinstance(stage.get("seconds"), int | float):
                continue
            name = str(stage.get("name", "?"))
            seconds.setdefault(name, []).append(float(stage["seconds"]))
            rows[name] = stage.get("rows")
    found = []
    for name, values in seconds.items():
        middle = statistics.median(values)
        rate = rows[name] / middle if isinstance(rows[name], int | float) and middle > 0 else None
        found.append({"name": name, "seconds": middle, "rows": rows[name], "rows_per_second": rate})
    return found


def benchmark(
    layout: str, source: Path, outputs: Path, *, untwin: str, eps: float, memory: str, repeat: int
) -> dict[str, Any]:
    """Measure pairs of a copy and a run on one data set."""
    inputs = sorted(source.glob("*.parquet"))
    rows = sum(pq.read_metadata(path).num_rows for path in inputs)
    target = {"copy": outputs / f"copy-{layout}", "untwin": outputs / f"untwin-{layout}"}
    options = ["--eps", str(eps), "--memory", memory, "--json"]
    command = {
        "copy": [sys.executable, str(Path(__file__).resolve()), "--copy", str(source), str(target["copy"])],
        "untwin": [untwin, "run", str(source), str(target["untwin"]), *options],
    }
    runs: dict[str, list[Measured]] = {"copy": [], "untwin": []}
    for turn in range(repeat):
        for name in ("copy", "untwin") if turn % 2 == 0 else ("untwin", "copy"):
            runs[name].append(measure(command[name], target[name]))
            done = runs[name][-1]
            print(f"  {layout} {name} {turn + 1}/{repeat}: {done.seconds:.1f} s", flush=True)
    ratios = [u.seconds / c.seconds for u, c in zip(runs["untwin"], runs["copy"], strict=True)]
    result: dict[str, Any] = {
        "layout": layout,
        "rows": rows,
        "input_files": len(inputs),
        "input_bytes": sum(path.stat().st_size for path in inputs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "stages": _stages(runs["untwin"]),
        "command": ["untwin", "run", "INPUT", "OUTPUT", *options],
    }
    for name, measured in runs.items():
        seconds = _median(measured, "seconds")
        result[name] = {
            "seconds": seconds,
            "cpu_seconds": _median(measured, "cpu_seconds"),
            "peak_bytes": max(run.peak_bytes for run in measured),
            "rows_per_second": rows / seconds,
            "output_files": measured[-1].files,
            "output_bytes": measured[-1].bytes,
            "output_folders": measured[-1].folders,
            "runs": [{key: asdict(run)[key] for key in ("seconds", "cpu_seconds", "peak_bytes")} for run in measured],
        }
    result["untwin"]["run_json"] = runs["untwin"][-1].report
    return result


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _print_table(header: list[str], lines: list[list[str]]) -> None:
    widths = [max(len(line[k]) for line in [header, *lines]) for k in range(len(header))]
    for line in [header, ["-" * width for width in widths], *lines]:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells))


def show(results: list[dict[str, Any]]) -> None:
    """Print a line for each layout and command, and the stages and output folders below."""
    lines = []
    for result in results:
        for name in ("copy", "untwin"):
            one = result[name]
            lines.append(
                [
                    f"{result['layout']} {name}",
                    f"{one['seconds']:.2f}",
                    f"{one['cpu_seconds']:.2f}",
                    f"{one['rows_per_second']:,.0f}",
                    _size(one["peak_bytes"]),
                    f"{one['output_files']:,}",
                    _size(one["output_bytes"]),
                    f"{result['ratio']:.2f}" if name == "untwin" else "1",
                ]
            )
    print()
    _print_table(["", "seconds", "CPU s", "rows/s", "memory", "files", "bytes", "untwin/copy"], lines)
    for result in results:
        print(
            f"\n{result['layout']}: {result['rows']:,} rows, {result['input_files']:,} input files, "
            f"{_size(result['input_bytes'])}"
        )
        if result["stages"]:
            known = [
                [
                    f"  {stage['name']}",
                    f"{stage['seconds']:.2f}",
                    "" if stage["rows_per_second"] is None else f"{stage['rows_per_second']:,.0f}",
                ]
                for stage in result["stages"]
            ]
            _print_table(["  stage", "seconds", "rows/s"], known)
        else:
            print("  the run reported no stages")
        for folder, entry in result["untwin"]["output_folders"].items():
            print(f"  output {folder}: {entry['files']:,} files, {_size(entry['bytes'])}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="rows of the data sets (%(default)s)")
    parser.add_argument("--dim", type=int, default=384, help="dimension (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data (%(default)s)")
    parser.add_argument("--files", type=int, default=10, help="files, all layouts but upstream (%(default)s)")
    parser.add_argument(
        "--layouts", nargs="+", choices=generate.LAYOUTS, default=["zstd", "upstream"], metavar="LAYOUT"
    )
    parser.add_argument("--eps", type=float, default=0.05, help="eps of the run (%(default)s)")
    parser.add_argument("--memory", default="2GB", help="memory budget of the run (%(default)s)")
    parser.add_argument("--repeat", type=int, default=1, help="pairs of copy and run (%(default)s)")
    parser.add_argument("--workdir", type=Path, help="folder for data, kept (default: temporary, removed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures here")
    parser.add_argument(
        "--untwin",
        default=str(Path(sys.executable).parent / "untwin"),
        metavar="COMMAND",
        help="the command to measure (default: `untwin` beside this Python)",
    )
    parser.add_argument(
        "--copy", nargs=2, type=Path, metavar=("SOURCE", "TARGET"), help="only copy a folder; not measured"
    )
    arguments = parser.parse_args()
    if arguments.copy:
        copy_folder(*arguments.copy)
        return 0
    if arguments.repeat < 1:
        parser.error("--repeat must be at least 1")
    if shutil.which(arguments.untwin) is None:
        parser.error(f"{arguments.untwin} is not there: install the project first, or give --untwin")

    about = machine()
    print(", ".join(f"{name}: {value}" for name, value in about.items()))
    set_here = {name: os.environ[name] for name in _REMOVED if name in os.environ}
    for name in _REMOVED:
        was = f"it was {set_here[name]!r}" if name in set_here else "it was not set"
        print(f"{name} is removed from the environment of the measured commands ({was})")

    with contextlib.ExitStack() as stack:
        if arguments.workdir is None:
            workdir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="untwin-benchmark-")))
        else:
            workdir = arguments.workdir
            workdir.mkdir(parents=True, exist_ok=True)
        outputs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="out-", dir=workdir)))
        results = []
        try:
            for layout in arguments.layouts:
                source = prepare(
                    workdir,
                    layout,
                    rows=arguments.rows,
                    dim=arguments.dim,
                    seed=arguments.seed,
                    files=arguments.files,
                )
                results.append(
                    benchmark(
                        layout,
                        source,
                        outputs,
                        untwin=arguments.untwin,
                        eps=arguments.eps,
                        memory=arguments.memory,
                        repeat=arguments.repeat,
                    )
                )
        except CommandError as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            if results:
                show(results)
    if arguments.json:
        saved = {
            "machine": about,
            "removed_from_environment": {name: set_here.get(name) for name in _REMOVED},
            "parameters": {
                name: getattr(arguments, name) for name in ("rows", "dim", "seed", "files", "eps", "memory", "repeat")
            },
            "results": results,
        }
        arguments.json.write_text(json.dumps(saved, indent=2) + "\n")
        print(f"\nsaved {arguments.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
