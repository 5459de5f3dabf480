"""Small inputs whose right answer can be seen, and readers of what a run wrote. No tests here."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner

from untwin.cli import main

N_TWINS = 6
"""Pairs in `twin_vectors`."""

TWINS = {f"row{6 + i:02}": f"row{i:02}" for i in range(N_TWINS)}
"""The answer to `twin_table` at eps=0.05, rank_by="id:asc": each duplicate's kept row."""


def twin_vectors(dim=8):
    """Twelve vectors: six that are orthogonal to each other, then a near-copy (cosine 0.99995) of each."""
    first = np.eye(dim)[:N_TWINS]
    second = first + 0.01 * np.eye(dim)[dim - 1]
    return np.concatenate((first, second)).astype(np.float32)


def twin_ids():
    """row00 to row11: row06 is the near-copy of row00, and so on."""
    return [f"row{i:02}" for i in range(2 * N_TWINS)]


def table_of(ids, vectors, *, embedding_type=None, id_type=None, **columns):
    """A table with `id`, `embedding` (a list a row; None is null) and more columns."""
    kind = pa.list_(pa.float32()) if embedding_type is None else embedding_type
    rows = [None if vector is None else list(vector) for vector in vectors]
    return pa.table({"id": pa.array(ids, id_type), "embedding": pa.array(rows, kind), **columns})


def twin_table(**options):
    """`twin_ids` and `twin_vectors` as a table."""
    return table_of(twin_ids(), twin_vectors(), **options)


def write_parquet(path, table, **options):
    """Write a Parquet file, making its folder; returns the path as text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return str(path)


def write_split(folder, table, n_files, **options):
    """Write a table as `n_files` Parquet files whose names sort in the order of the rows."""
    bounds = np.linspace(0, table.num_rows, n_files + 1).astype(int)
    for number, (low, high) in enumerate(pairwise(bounds)):
        write_parquet(Path(folder) / f"part-{number:05}.parquet", table.slice(low, high - low), **options)
    return str(folder)


def awkward_source(folder, n_rows, n_files, dim=16):
    """Rows in many files: clusters, near-duplicates, repeated ids, and rows that cannot be judged."""
    rng = np.random.default_rng(11)
    centres = rng.standard_normal((30, dim))
    vectors = centres[rng.integers(0, 30, n_rows)] + 0.25 * rng.standard_normal((n_rows, dim))
    twins = rng.integers(0, n_rows, n_rows // 4)
    vectors[rng.permutation(n_rows)[: len(twins)]] = vectors[twins] + 0.001 * rng.standard_normal((len(twins), dim))
    rows = list(vectors.astype(np.float32))
    ids = [f"clip-{number:05}" for number in rng.permutation(n_rows)]
    for row in range(0, n_rows, 97):
        rows[row] = None if row % 2 else np.zeros(dim, np.float32)
    for row in range(50, n_rows, 120):
        ids[row], rows[row] = ids[row - 7], rows[row - 7]
    return write_split(folder, table_of(ids, rows, n=pa.array(range(n_rows))), n_files, row_group_size=100)


class Answer:
    """Rows of everything that a user gets from a run, its numbers, and the names of its files."""

    def __init__(self, out):
        out = Path(out)
        folders = [name for name in ("duplicates", "kept", "rejected") if (out / name).is_dir()]
        self.tables = {name: read_folder(out / name) for name in folders}
        if (out / "groups.parquet").exists():
            self.tables["groups"] = pq.read_table(out / "groups.parquet")
        self.tables["pairs"] = read_files(sorted((out / "pairwise").glob("cluster_*.parquet")))
        self.centroids = (out / "kmeans" / "_centroids.npy").read_bytes()
        run = json.loads((out / "run.json").read_text())
        self.numbers = {key: run[key] for key in ("rows", "rejected", "eps_table", "clusters", "borders") if key in run}
        self.names = {
            str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and "_plan" not in path.parts
        }

    def __eq__(self, other):
        assert self.tables.keys() == other.tables.keys()
        for name, table in self.tables.items():
            assert table.num_rows > 10, name
            assert table.equals(other.tables[name]), name
        assert self.centroids == other.centroids
        assert self.numbers == other.numbers
        assert self.names == other.names  # nothing is left over, and nothing is missing
        return True

    __hash__ = None


def read_files(paths):
    """The rows of Parquet files, in the order given."""
    tables = [pq.ParquetFile(path).read() for path in paths]
    return pa.concat_tables(tables) if tables else None


def parquet_files(folder):
    """All data files below a folder, sorted by path; names that start with `_` are not data."""
    found = (path for path in Path(folder).rglob("*.parquet"))
    return sorted(path for path in found if not any(part.startswith("_") for part in path.parts))


def read_folder(folder):
    """The rows of all Parquet files below a folder, in the order of their paths; None if there are none."""
    return read_files(parquet_files(folder))


def ids_of(folder):
    """The `id` column of a folder, in order."""
    table = read_folder(folder)
    return [] if table is None else table["id"].to_pylist()


def witnesses(output):
    """Duplicate -> kept row, from `duplicates/`."""
    table = read_folder(Path(output) / "duplicates")
    return dict(zip(table["id"].to_pylist(), table["kept_id"].to_pylist(), strict=True))


def snapshot(folder):
    """Every path below a folder with its size and modification time."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def cli(*arguments, code=0):
    """Run a command in this process; its result."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result
