"""The memory budget holds, for data and for a cluster that are larger than it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

_LIBRARIES = 300 * 10**6
_N_FILES = 8


def _write_three_groups(folder: Path, n_rows: int, dim: int) -> None:
    """Rows in three groups of 30, 35 and 35 %, which k-means with three clusters finds; every fifth repeats one."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, dim)).astype(np.float32)
    group = rng.choice(3, n_rows, p=[0.3, 0.35, 0.35])
    for number in range(_N_FILES):
        rows = np.arange(number * n_rows // _N_FILES, (number + 1) * n_rows // _N_FILES)
        vectors = 0.8 * rng.standard_normal((len(rows), dim), dtype=np.float32) + centres[group[rows]]
        copies = np.arange(4, len(rows), 5)
        vectors[copies] = vectors[copies - 1] + 0.05 * rng.standard_normal((len(copies), dim), dtype=np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim)
        table = pa.table({"id": [f"row-{row:07d}" for row in rows], "embedding": column})
        pq.write_table(table, folder / f"{number}.parquet", compression="none", use_dictionary=False)


@pytest.mark.parametrize(
    ("n_rows", "dim", "memory"),
    [
        pytest.param(50_000, 3072, 200, id="614 MB of vectors in 200 MB"),
        pytest.param(98_000, 4096, 256, id="1.6 GB of vectors in 256 MB", marks=pytest.mark.slow),
    ],
)
def test_peak_memory_stays_within_the_budget_with_clusters_larger_than_it(
    tmp_path: Path, n_rows: int, dim: int, memory: int
) -> None:
    source = tmp_path / "input"
    source.mkdir()
    _write_three_groups(source, n_rows, dim)
    command = [sys.executable, "-m", "untwin", "run", str(source), str(tmp_path / "out")]
    options = ["--eps", "0.05", "--n-clusters", "3", "--memory", f"{memory}MB", "--json"]
    run = json.loads(subprocess.run([*command, *options], check=True, capture_output=True).stdout)

    assert 4 * n_rows * dim > memory * 10**6 + _LIBRARIES, "the data would fit the budget: the test shows nothing"
    assert run["clusters"]["max"] * dim * 4 > memory * 10**6, "no cluster is larger than the budget"
    assert run["clusters"]["min"] > 0.25 * n_rows
    assert run["peak_memory_bytes"] <= memory * 10**6 + _LIBRARIES
    assert run["rows"]["duplicates"] == sum(
        len(range(4, (number + 1) * n_rows // _N_FILES - number * n_rows // _N_FILES, 5)) for number in range(_N_FILES)
    )
