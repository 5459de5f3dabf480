"""Makes the small real data set of the examples: whole families of packages out of a larger set.

The larger set is a folder of Parquet files with a column `source` (the source package of each row). A source
is taken or left as a whole, so near-duplicates that were built from one source stay together. Half of the
rows come from large sources (ten packages and more) and half from small ones: large sources are few, and
sources chosen without regard to size would hardly hold one.

    python examples/make_sample.py SOURCE_FOLDER OUTPUT_FILE
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_ROWS_AT_MOST = 2_700
_BYTES_AT_MOST = 3_000_000
_LARGE_SOURCE = 10  # packages


def _source_order(source: str) -> bytes:
    """Give a source a fixed, arbitrary place in an order; it depends on the name alone."""
    return hashlib.sha256(source.encode()).digest()


def _as_many_as_fit(counts: dict[str, int], rows_at_most: int) -> list[str]:
    """Take sources in the order of the hash of their name, until the next one would be too much."""
    taken: list[str] = []
    for source in sorted(counts, key=_source_order):
        if counts[source] > rows_at_most:
            break
        taken.append(source)
        rows_at_most -= counts[source]
    return taken


def choose(table: pa.Table, rows_at_most: int) -> pa.Table:
    """Choose whole sources, half of the rows from large and half from small ones; rows are sorted by id."""
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(table["source"]).to_pylist()}
    large = {source: count for source, count in counts.items() if count >= _LARGE_SOURCE}
    small = {source: count for source, count in counts.items() if count < _LARGE_SOURCE}
    taken = _as_many_as_fit(large, rows_at_most // 2)
    taken += _as_many_as_fit(small, rows_at_most - sum(counts[source] for source in taken))
    return table.filter(pc.is_in(table["source"], value_set=pa.array(taken))).sort_by("id")


def share_with_a_neighbour(table: pa.Table, similarity: float) -> float:
    """Find the share of rows that have another row at a cosine similarity above `similarity`."""
    column = table["embedding"].combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(column), column.type.list_size).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    products = vectors @ vectors.T
    np.fill_diagonal(products, -1.0)
    return float((products.max(axis=1) > similarity).mean())


def main() -> int:
    """Read the folder, choose, write the file, and print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source_folder", type=Path, help="folder of Parquet files to choose from")
    parser.add_argument("output_file", type=Path, help="Parquet file to write")
    parser.add_argument("--rows", type=int, default=_ROWS_AT_MOST, help="at most so many rows (%(default)s)")
    arguments = parser.parse_args()

    files = sorted(arguments.source_folder.glob("*.parquet"))
    if not files:
        print(f"{arguments.source_folder}: no Parquet file in this folder", file=sys.stderr)
        return 2
    table = choose(pa.concat_tables([pq.read_table(file) for file in files]), arguments.rows)
    # Vectors have no repeated values to gain from, so a dictionary only costs space.
    dictionary = [name for name in table.column_names if name != "embedding"]
    pq.write_table(table, arguments.output_file, compression="zstd", compression_level=19, use_dictionary=dictionary)
    size = arguments.output_file.stat().st_size
    print(f"{arguments.output_file}: {table.num_rows:,} rows, {size:,} bytes")
    print(f"sources: {len(pc.unique(table['source'])):,}")
    for similarity in (0.90, 0.95, 0.99):
        share = share_with_a_neighbour(table, similarity)
        print(f"rows with another row at a cosine similarity above {similarity:.2f}: {share:.1%}")
    if size > _BYTES_AT_MOST:
        print(f"{size:,} bytes are more than {_BYTES_AT_MOST:,}: ask for fewer --rows", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
