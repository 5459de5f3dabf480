"""Removes near-duplicates from a small real data set and shows some of them: `make demo`.

The data set is 2,700 packages of Debian 12, each with a vector made from its description. Needs nothing but untwin
itself; writes to `demo-output/` in the repository, or to the folder given, anew each time.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import untwin
from untwin.errors import UntwinError

_REPOSITORY = Path(__file__).resolve().parent.parent
_INPUT = _REPOSITORY / "examples" / "data" / "debian-packages-sample.parquet"
_OUTPUT = _REPOSITORY / "demo-output"
_EPS = 0.05
_SHOWN = 9
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


def _package(name: object, texts: dict[str, str]) -> str:
    return textwrap.shorten(f"{name}: {texts[str(name)]}", _WIDTH, placeholder=" …")


def main(output: Path) -> int:
    """Run the job on the sample and print what it did."""
    result = untwin.deduplicate(_INPUT, output, eps=_EPS, overwrite=True)
    packages = pq.read_table(_INPUT, columns=["id", "text"]).to_pydict()
    texts = dict(zip(packages["id"], packages["text"], strict=True))

    print(f"{result.n_rows:,} packages, each with a vector of {result.run['input']['dim']} numbers.")
    print(f"A package is removed when a package that stays is at least {1 - _EPS:g} similar to it (eps {_EPS:g}).")
    print()
    print(f"  kept       {result.n_kept:>6,}")
    print(f"  duplicates {result.n_duplicates:>6,}   {result.duplicate_share:.0%} of all")
    print(f"  rejected   {result.n_rejected:>6,}   rows that cannot be judged, such as an empty vector")
    print(f"  time       {result.seconds:>6.1f} s")
    print()
    print("Some removed packages, and the kept one because of which each is removed:")
    for row in spread(result.duplicates(), _SHOWN):
        print()
        print(f"  similarity {row['cosine_sim_score']:.4f}")
        print(f"    removed  {_package(row['id'], texts)}")
        print(f"    kept     {_package(row['kept_id'], texts)}")
    print()
    print(f"The rows that stay:  {result.kept_path}")
    print(f"What was removed:    {result.duplicates_path}")
    print(f"Numbers of the run:  {Path(result.output_path, 'run.json')}")
    print()
    print("Next, try a looser or a stricter threshold on the same clusters:")
    print(f"  {Path(sys.executable).with_name('untwin')} apply {result.output_path} --eps 0.1")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else _OUTPUT))
    except UntwinError as error:
        print(f"demo: {error}", file=sys.stderr)
        raise SystemExit(2) from None
