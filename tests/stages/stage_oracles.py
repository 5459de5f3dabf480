"""What the stages must give, worked out row by row with plain NumPy, and input as other tools write it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def planted(n, dim=16, seed=0, noise=0.05):
    """Ids and vectors (float64, of any norm) with near-duplicates: each third row is a blurred copy of another."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(5, dim))
    vectors = centers[rng.integers(5, size=n)] + 0.6 * rng.normal(size=(n, dim))
    copies = np.arange(2, n, 3)
    vectors[copies] = vectors[copies - 1] + noise * rng.normal(size=(len(copies), dim))
    vectors *= rng.uniform(0.5, 3, size=(n, 1))
    ids = [f"clip-{number:05d}" for number in rng.permutation(n)]
    return ids, vectors


def unit(vectors):
    """Unit vectors in float64, rounded once to float32."""
    vectors = np.asarray(vectors, np.float64)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write_like_curator(folder, ids, vectors, rows=26):
    """Files of about 26 rows as a splitting pipeline writes them with pandas."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    for number, low in enumerate(range(0, len(ids), rows)):
        part = ids[low : low + rows]
        described = {
            "index_columns": [{"kind": "range", "name": None, "start": 0, "stop": len(part), "step": 1}],
            "column_indexes": [],
            "columns": [
                {"name": "id", "field_name": "id", "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
                {
                    "name": "embedding",
                    "field_name": "embedding",
                    "pandas_type": "list[float64]",
                    "numpy_type": "object",
                    "metadata": None,
                },
            ],
            "pandas_version": "2.2.0",
        }
        table = pa.table(
            {
                "id": pa.array(part, pa.large_string()),
                "embedding": pa.array(np.asarray(vectors[low : low + rows]).tolist(), pa.list_(pa.float64())),
            }
        ).replace_schema_metadata({"pandas": json.dumps(described)})
        pq.write_table(table, folder / f"{number:08d}.parquet", compression="snappy", use_dictionary=True)


def read_clusters(folder):
    """All clusters of a k-means folder: number → table, read file by file."""
    found = {}
    for path in sorted(Path(folder).glob("centroid=*/*.parquet")):
        centroid = int(path.parent.name.removeprefix("centroid="))
        found.setdefault(centroid, []).append(pq.read_table(path, partitioning=None))
    return {centroid: pa.concat_tables(tables) for centroid, tables in sorted(found.items())}


def matrix(column):
    """A list column as a (n, D) array."""
    return np.array(column.to_pylist(), np.float64)


def all_pairs(ids, vectors, eps=None, compare_to="ranked"):
    """The definition: one row after the other, against every better-ranked row."""
    X = np.asarray(vectors, np.float64)
    X = X / np.linalg.norm(X, axis=1, keepdims=True)
    C = np.minimum(X @ X.T, 1.0)
    limit = None if eps is None else np.float32(1 - eps)
    rows, kept = [], []
    for at, own in enumerate(ids):
        best = int(np.argmax(C[at, :at])) if at else 0
        row = {"id": own, "max_id": ids[best], "score": float(C[at, best]) if at else 0.0, "sims": C[at, :at]}
        if limit is not None:
            witness = kept[int(np.argmax(C[at, kept]))] if kept else None
            near = witness is not None and np.float32(C[at, witness]) >= limit
            removed = near if compare_to == "kept" else np.float32(row["score"]) >= limit
            row["removed"] = bool(removed)
            row["kept_id"] = ids[witness] if removed and near else None
            row["kept_score"] = float(C[at, witness]) if removed and near else None
            if not removed:
                kept.append(at)
        rows.append(row)
    return rows


def assert_same_matches(got, want):
    """Results of a cluster are those of `all_pairs`: scores to 1e-5, best matches except for ties."""
    got = got.to_pylist()
    assert [row["id"] for row in got] == [row["id"] for row in want]
    position = {row["id"]: at for at, row in enumerate(want)}
    for at, (mine, right) in enumerate(zip(got, want, strict=True)):
        assert abs(mine["cosine_sim_score"] - right["score"]) < 1e-5
        if at:
            assert right["score"] - right["sims"][position[mine["max_id"]]] < 1e-6
        else:
            assert mine["max_id"] == mine["id"]
            assert mine["cosine_sim_score"] == 0.0
        if "removed" in right:
            assert (mine["kept_id"] is None) == (right["kept_id"] is None)
            if right["kept_id"] is not None:
                assert abs(mine["kept_sim_score"] - right["kept_score"]) < 1e-5
                assert right["kept_score"] - right["sims"][position[mine["kept_id"]]] < 1e-6
            else:
                assert mine["kept_sim_score"] is None
