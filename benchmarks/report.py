"""Measures what collecting a report takes, against pyarrow reading the same similarities whole; alternating.

untwin run INPUT OUTPUT --eps 0.05
python benchmarks/report.py OUTPUT --repeat 5
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from measure import introduce, print_table, save
from untwin.jobs.output import OutputFolder
from untwin.jobs.record import peak_memory
from untwin.jobs.report import collect_report
from untwin.storage.files import Storage


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of a finished run")
    parser.add_argument("--group-by", metavar="COLUMN", help="as in untwin report")
    parser.add_argument("--repeat", type=int, default=5, help="times each (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures here")
    arguments = parser.parse_args()
    introduce()
    folder = OutputFolder(Storage(), str(arguments.output.absolute()))
    files = sorted((arguments.output / "pairwise").glob("*.parquet"))
    work: dict[str, Callable[[], object]] = {
        "collect the report": lambda: collect_report(folder, group_by=arguments.group_by),
        "pyarrow, same files": lambda: [pq.ParquetFile(path).read(use_threads=False) for path in files],
    }
    work["collect the report"]()
    peak = peak_memory()
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(arguments.repeat):
        for name, do in work.items():
            started = time.perf_counter()
            do()
            taken[name].append(time.perf_counter() - started)
    least = {name: min(values) for name, values in taken.items()}
    base = least["pyarrow, same files"]
    print_table(["", "s", "ratio"], [[name, f"{s:.2f}", f"{s / base:.1f}"] for name, s in least.items()])
    print(f"peak memory of the report: {peak / 1e6:,.0f} MB")
    save(arguments.json, vars(arguments), {**taken, "peak_memory_bytes": [peak]})


if __name__ == "__main__":
    main()
