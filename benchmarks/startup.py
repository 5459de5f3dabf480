"""Measures how long `untwin --help` takes, against `python -c "import numpy"`: medians of alternating starts.

python benchmarks/startup.py --repeat 15
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from measure import UNTWIN, introduce, measure, print_table, save


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=15, help="starts of each (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures here")
    arguments = parser.parse_args()
    introduce()
    commands = {"untwin --help": [*UNTWIN, "--help"], "import numpy": [sys.executable, "-c", "import numpy"]}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for command in commands.values():
        measure(command)  # files into the system's cache
    for _ in range(arguments.repeat):
        for name, command in commands.items():
            taken[name].append(measure(command).seconds)
    middle = {name: statistics.median(values) for name, values in taken.items()}
    base = middle["import numpy"]
    print_table(["", "ms", "ratio"], [[name, f"{1e3 * s:.0f}", f"{s / base:.2f}"] for name, s in middle.items()])
    save(arguments.json, vars(arguments), taken)


if __name__ == "__main__":
    main()
