"""Measures the whole command, `untwin run`, against what others do with the same files, both in the same run.

    python benchmarks/end_to_end.py --rows 1000000 --layouts plain zstd upstream --against copy semdedup --repeat 5

For each layout: makes the data with generate.py unless they are in --workdir already; then, --repeat times, the run and
each of the baselines (baselines.py says what they are), one after the other in alternating order, each in a process of
its own. Times are medians over the repeats (memory: the largest); a ratio is the median of the ratios of the pairs.

The run is timed from the start of its process to its end, with everything that it writes. So is a baseline, but for the
time in which it imports its libraries. Input files have just been read or written, so they usually come from the page
cache in all of them; dirty pages are written to the disk before each process starts (sync).
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import baselines
import generate
from measure import UNTWIN, CommandError, Measured, introduce, measure, print_table, save, show_bytes

Runs = dict[str, list[Measured]]


def commands(
    source: Path,
    outputs: Path,
    names: list[str],
    *,
    eps: float,
    memory: str | None = None,
    n_clusters: int | None = None,
) -> dict[str, tuple[list[str], Path]]:
    """For the run and each baseline its command, and the folder that it may write to."""
    script = str(Path(baselines.__file__).resolve())
    found = {}
    for name in ("untwin", *names):
        target = outputs / name
        if name == "untwin":
            command = [*UNTWIN, "run", str(source), str(target), "--eps", str(eps), "--json"]
            command += ["--memory", memory] if memory else []
        else:
            command = [sys.executable, script, name, str(source), "--target", str(target), "--eps", str(eps)]
            command += ["--n-clusters", str(n_clusters)] if n_clusters else []
        found[name] = (command, target)
    return found


def seconds(run: Measured) -> float:
    """What counts: the whole process, without the import of a baseline's libraries."""
    return run.seconds - float(run.report.get("import_seconds", 0))


def paired(every: dict[str, tuple[list[str], Path]], repeat: int, label: str) -> tuple[Runs, dict[str, dict[str, int]]]:
    """Measure all commands in turns, every other turn backwards; also what the run wrote, by folder."""
    runs: Runs = {name: [] for name in every}
    written: dict[str, dict[str, int]] = {}
    for turn in range(repeat):
        for name in list(every)[:: 1 if turn % 2 == 0 else -1]:
            command, target = every[name]
            done = measure(command)
            if name == "untwin":
                written = count_files(target)
            shutil.rmtree(target, ignore_errors=True)
            runs[name].append(done)
            print(f"  {label} {name} {turn + 1}/{repeat}: {seconds(done):.1f} s", flush=True)
    return runs, written


def available(names: list[str]) -> list[str]:
    """The baselines that can run; the others are said to be left out."""
    for name in names:
        if lacking := baselines.missing(name):
            print(f"{name} is left out; not installed: {lacking} (pip install '.[bench]')")
    return [name for name in names if not baselines.missing(name)]


def summary(run: list[Measured]) -> dict[str, Any]:
    """Medians of one command, the peak of its memory, every single run, and what the last one reported."""
    figures = ("seconds", "cpu_seconds", "peak_bytes")
    return {
        "seconds": statistics.median(map(seconds, run)),
        "cpu_seconds": statistics.median(one.cpu_seconds for one in run),
        "peak_bytes": max(one.peak_bytes for one in run),
        "runs": [{figure: getattr(one, figure) for figure in figures} for one in run],
        "report": run[-1].report,
    }


def count_files(folder: Path) -> dict[str, dict[str, int]]:
    """Files and bytes in each top-level folder of a folder (files at the top: by ending)."""
    folders: dict[str, dict[str, int]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            inside = path.relative_to(folder)
            entry = folders.setdefault(
                f"{inside.parts[0]}/" if len(inside.parts) > 1 else f"*{inside.suffix}", {"files": 0, "bytes": 0}
            )
            entry["files"] += 1
            entry["bytes"] += path.stat().st_size
    return folders


def stages(runs: list[Measured]) -> list[dict[str, Any]]:
    """Median seconds of each stage of the run, in order."""
    reported = [{stage["name"]: stage for stage in run.report["stages"]} for run in runs]
    found = []
    for name, stage in reported[0].items():
        middle = statistics.median(one[name]["seconds"] for one in reported)
        found.append({"name": name, "seconds": middle, "rows": stage["rows"]})
    return found


def benchmark(layout: str, source: Path, outputs: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the run and the baselines on one data set."""
    inputs = sorted(source.glob("*.parquet"))
    options = {name: getattr(arguments, name) for name in ("eps", "memory", "n_clusters")}
    every = commands(source, outputs, available(arguments.against), **options)
    runs, written = paired(every, arguments.repeat, layout)
    ours = [run.seconds for run in runs["untwin"]]
    pairs = {
        name: [one / seconds(other) for one, other in zip(ours, others, strict=True)]
        for name, others in runs.items()
        if name != "untwin"
    }
    return {
        "layout": layout,
        "rows": sum(pq.read_metadata(path).num_rows for path in inputs),
        "input_files": len(inputs),
        "input_bytes": sum(path.stat().st_size for path in inputs),
        "output_folders": written,
        "ratios": {name: {"median": statistics.median(ratios), "pairs": ratios} for name, ratios in pairs.items()},
        "stages": stages(runs["untwin"]),
        "commands": {name: summary(measured) for name, measured in runs.items()},
    }


def show(results: list[dict[str, Any]]) -> None:
    """Print a line for each layout and command, and the stages, steps and output folders below."""
    lines = []
    for result in results:
        for name, one in result["commands"].items():
            ratio = result["ratios"][name]["median"] if name != "untwin" else 1
            report = one["report"]
            rows = [result["rows"] / one["seconds"], report.get("n_clusters"), report.get("removed")]
            if name == "untwin":
                rows[1:] = report["clusters"]["n_clusters"], report["rows"]["duplicates"]
            lines.append(
                [
                    f"{result['layout']} {name}",
                    f"{one['seconds']:.2f}",
                    f"{one['cpu_seconds']:.2f}",
                    show_bytes(one["peak_bytes"]),
                    *("" if value is None else f"{value:,.0f}" for value in rows),
                    f"{ratio:.2f}",
                    f"{1 / ratio:.2f}",
                ]
            )
    print()
    header = ["", "seconds", "CPU s", "memory", "rows/s", "clusters", "removed", "untwin / it", "it / untwin"]
    print_table(header, lines)
    for result in results:
        size = show_bytes(result["input_bytes"])
        print(f"\n{result['layout']}: {result['rows']:,} rows, {result['input_files']:,} input files, {size}")
        print_table(
            ["  stage", "seconds", "rows/s"],
            [
                [f"  {one['name']}", f"{one['seconds']:.2f}", f"{one['rows'] / max(one['seconds'], 1e-3):,.0f}"]
                for one in result["stages"]
            ],
        )
        for name, one in result["commands"].items():
            if steps := one["report"].get("steps"):
                print(f"  {name}: " + ", ".join(f"{step} {value:.2f} s" for step, value in steps.items()))
        for folder, entry in result["output_folders"].items():
            print(f"  output {folder}: {entry['files']:,} files, {show_bytes(entry['bytes'])}")


@contextlib.contextmanager
def work_folders(workdir: Path | None) -> Iterator[tuple[Path, Path]]:
    """A folder for data, temporary if none is given, and a temporary one for outputs on the same disk."""
    with contextlib.ExitStack() as stack:
        if workdir is None:
            workdir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="untwin-benchmark-")))
        workdir.mkdir(parents=True, exist_ok=True)
        yield workdir, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="out-", dir=workdir)))


def main(argv: list[str] | None = None) -> int:
    """Measure all layouts and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    generate.add_arguments(parser, 200_000)
    parser.add_argument(
        "--layouts", nargs="+", choices=generate.LAYOUTS, default=["zstd", "upstream"], metavar="LAYOUT"
    )
    parser.add_argument(
        "--against", nargs="*", choices=tuple(baselines.LIBRARIES), default=["copy"], metavar="BASELINE"
    )
    parser.add_argument("--eps", type=float, default=0.05, help="(%(default)s)")
    parser.add_argument("--memory", help="memory budget of the run (default: its own)")
    parser.add_argument("--n-clusters", type=int, help="of the baselines (default: as many as untwin chooses)")
    parser.add_argument("--repeat", type=int, default=1, help="turns (%(default)s)")
    parser.add_argument("--workdir", type=Path, help="folder for data, kept (default: temporary, removed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures here")
    arguments = parser.parse_args(argv)
    introduce()
    results: list[dict[str, Any]] = []
    with work_folders(arguments.workdir) as (workdir, outputs):
        try:
            for layout in arguments.layouts:
                source = generate.prepare(workdir, layout, arguments)
                results.append(benchmark(layout, source, outputs, arguments))
        except CommandError as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            if results:
                show(results)
                save(arguments.json, vars(arguments), results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
