"""Time and memory against the number of rows, for `untwin run` and the baselines; as JSON, and as a chart.

    python benchmarks/scaling.py --rows 100000 250000 1000000 2000000 4000000 \\
        --at-most semhash=1000000 semdedup=1000000 --json scaling.json --chart docs/images/scaling.png
    python benchmarks/scaling.py --draw scaling.json --chart docs/images/scaling.png  # only the chart

For each number of rows the data are made with generate.py and removed again, unless --workdir keeps them. Times are
those of end_to_end.py: medians over --repeat turns, without the import of a baseline's libraries.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import generate
from baselines import LIBRARIES
from end_to_end import available, commands, paired, summary, work_folders
from measure import introduce, print_table, save, show_bytes

_LABELS = {"untwin": "untwin run", "copy": "copy (pyarrow)", "semdedup": "SemDeDup's steps (faiss, PyTorch)"}


def draw(saved: dict[str, Any], path: Path) -> None:
    """Write the chart of saved figures: two panels with logarithmic axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for panel, figure_of, factor, label in (
        (panels[0], "seconds", 1.0, "seconds"),
        (panels[1], "peak_bytes", 1e-9, "peak memory, GB"),
    ):
        for name in dict.fromkeys(one["name"] for one in saved["results"]):
            points = sorted((one["rows"], factor * one[figure_of]) for one in saved["results"] if one["name"] == name)
            panel.plot(*zip(*points, strict=True), marker="o", label=_LABELS.get(name, name))
        panel.set(xscale="log", yscale="log", xlabel="rows", ylabel=label)
        panel.grid(which="both", alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    given, about = saved["parameters"], saved["machine"]
    figure.suptitle(f"{given['layout']}, dimension {given['dim']}, eps {given['eps']}, {about['cores']} cores")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    print(f"wrote {path}, {show_bytes(path.stat().st_size)}")


def main() -> None:
    """Measure, print a table, save and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    generate.add_arguments(parser, [100_000, 250_000, 1_000_000, 2_000_000, 4_000_000])
    parser.add_argument("--layout", choices=generate.LAYOUTS, default="zstd", help="(%(default)s)")
    parser.add_argument("--against", nargs="*", choices=tuple(LIBRARIES), default=["copy", "semdedup", "semhash"])
    parser.add_argument("--at-most", nargs="*", default=[], metavar="NAME=ROWS", help="leave NAME out above ROWS rows")
    parser.add_argument("--eps", type=float, default=0.05, help="(%(default)s)")
    parser.add_argument("--memory", help="memory budget of the run (default: its own)")
    parser.add_argument("--repeat", type=int, default=1, help="turns (%(default)s)")
    parser.add_argument("--workdir", type=Path, help="folder for data, kept (default: temporary, removed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures here")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw a chart (PNG)")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="measure nothing: draw the chart of this JSON file")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads(arguments.draw.read_text()), arguments.chart or arguments.draw.with_suffix(".png"))
        return
    introduce()
    limits = {name: int(rows) for name, _, rows in (given.partition("=") for given in arguments.at_most)}
    names = available(arguments.against)
    results: list[dict[str, Any]] = []
    with work_folders(arguments.workdir) as (workdir, outputs):
        for rows in sorted(arguments.rows):
            source = generate.prepare(
                workdir, arguments.layout, argparse.Namespace(**{**vars(arguments), "rows": rows})
            )
            chosen = [name for name in names if rows <= limits.get(name, rows)]
            every = commands(source, outputs, chosen, eps=arguments.eps, memory=arguments.memory)
            if rows > limits.get("untwin", rows):
                del every["untwin"]
            runs, _ = paired(every, arguments.repeat, f"{rows:,} rows:")
            results += [{"rows": rows, "name": name, **summary(measured)} for name, measured in runs.items()]
            if arguments.workdir is None:
                shutil.rmtree(source)
            # after each size, because the larger ones take long
            saved = save(arguments.json, vars(arguments), results)
    lines = [
        [f"{one['rows']:,} {one['name']}", f"{one['seconds']:.2f}", show_bytes(one["peak_bytes"])] for one in results
    ]
    print_table(["rows", "seconds", "memory"], lines)
    if arguments.chart:
        draw(saved, arguments.chart)


if __name__ == "__main__":
    main()
