"""The memory budget holds, for data and for a cluster that are larger than it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def _run(source: Path, out: Path, *options: object) -> dict[str, Any]:
    """`run.json` of a run in a process of its own, whose peak memory is that of the run."""
    command = [sys.executable, "-m", "untwin", "run", source, out, "--eps", "0.05", "--json", *options]
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True)
    run: dict[str, Any] = json.loads(done.stdout)
    return run


@pytest.mark.parametrize(
    ("n_rows", "dim", "memory"),
    [
        pytest.param(50_000, 3072, 200, id="614 MB of vectors in 200 MB", marks=pytest.mark.slow),
        pytest.param(98_000, 4096, 256, id="1.6 GB of vectors in 256 MB", marks=pytest.mark.slow),
    ],
)
def test_peak_memory_stays_within_the_budget_with_clusters_larger_than_it(
    tmp_path: Path, n_rows: int, dim: int, memory: int
) -> None:
    source = tmp_path / "input"
    source.mkdir()
    _write_three_groups(source, n_rows, dim)
    run = _run(source, tmp_path / "out", "--n-clusters", 3, "--memory", f"{memory}MB")

    assert 4 * n_rows * dim > memory * 10**6 + _LIBRARIES, "the data would fit the budget: the test shows nothing"
    assert run["clusters"]["max"] * dim * 4 > memory * 10**6, "no cluster is larger than the budget"
    assert run["clusters"]["min"] > 0.25 * n_rows
    assert run["peak_memory_bytes"] <= memory * 10**6 + _LIBRARIES
    assert run["rows"]["duplicates"] == sum(
        len(range(4, (number + 1) * n_rows // _N_FILES - number * n_rows // _N_FILES, 5)) for number in range(_N_FILES)
    )


@pytest.mark.slow
def test_peak_memory_stays_within_the_budget_with_many_small_clusters(tmp_path: Path) -> None:
    """614 MB of vectors in 256 MB: no cluster is large, but blocks of many sizes come and go on two threads."""
    rng = np.random.default_rng(0)
    source = tmp_path / "input"
    source.mkdir()
    for number in range(10):
        column = pa.FixedSizeListArray.from_arrays(pa.array(rng.standard_normal(40_000 * 384, dtype=np.float32)), 384)
        table = pa.table({"id": [f"row-{number}-{row}" for row in range(40_000)], "embedding": column})
        pq.write_table(table, source / f"{number}.parquet", compression="none", use_dictionary=False)
    options = ["--n-clusters", 400, "--memory", "256MB", "--workers", 2, "--kept", "none"]
    run = _run(source, tmp_path / "out", *options)
    assert run["clusters"]["max"] * 384 * 4 < 20 * 10**6
    assert run["rows"]["kept"] == 400_000
    assert run["peak_memory_bytes"] <= 256 * 10**6 + _LIBRARIES // 2


@pytest.mark.slow
def test_peak_memory_stays_within_the_budget_with_rows_of_which_the_vector_is_the_smallest_part(tmp_path: Path) -> None:
    """3,000 rows with 300 kB of other data each: 900 MB in 256 MB."""
    rng = np.random.default_rng(0)
    source = tmp_path / "input"
    source.mkdir()
    for number in range(3):
        image = pa.array([rng.bytes(300_000) for _ in range(1000)], pa.binary())
        column = pa.FixedSizeListArray.from_arrays(pa.array(rng.standard_normal(1000 * 64, dtype=np.float32)), 64)
        table = pa.table({"id": [f"row-{number}-{row}" for row in range(1000)], "embedding": column, "image": image})
        pq.write_table(table, source / f"{number}.parquet", compression="none", row_group_size=100)
    run = _run(source, tmp_path / "out", "--memory", "256MB", "--workers", 2)
    assert run["rows"]["kept"] == 3000
    assert sum(path.stat().st_size for path in (tmp_path / "out" / "kept").iterdir()) > 9e8
    assert run["peak_memory_bytes"] <= 256 * 10**6 + _LIBRARIES
