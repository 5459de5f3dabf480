"""Vectors that stay in memory as they were read."""

import numpy as np
import pyarrow as pa
import pytest

import untwin
from inputs import read_folder, write_parquet
from untwin.core import normalize
from untwin.stages.judging import VectorsAsRead


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_they_are_the_unit_vectors_of_the_rows_that_are_meant_in_any_order(dtype):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(500, 7)).astype(dtype)
    meant = rng.random(500) < 0.9
    rows, cuts = np.flatnonzero(meant), [100, 101, 400]
    vectors = VectorsAsRead(np.split(X, cuts), [np.flatnonzero(part) for part in np.split(meant, cuts)])
    unit = normalize(X[rows])[0]
    assert vectors.shape == unit.shape
    for at in (np.arange(len(rows)), rng.permutation(len(rows)), np.array([3, 3, 2]), np.array([440]), rows[:0]):
        found = vectors.take(at)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, unit[at])
    np.testing.assert_array_equal(X, np.random.default_rng(0).normal(size=(500, 7)).astype(dtype))


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_a_run_that_holds_them_gives_the_answer_of_one_through_files(tmp_path, monkeypatch, kind):
    rng = np.random.default_rng(1)
    X = rng.normal(size=(4000, 400))
    X[1::3] = X[:-1:3] + 0.1 * rng.normal(size=X[1::3].shape)
    X[7], X[2600] = np.nan, 0
    lists = pa.FixedSizeListArray.from_arrays(pa.array(X.ravel().astype(kind.to_pandas_dtype()), kind), 400)
    ids = [None if row == 50 else f"row-{row}" for row in range(len(X))]
    # row groups of more than the 1,966 rows of a batch
    write_parquet(tmp_path / "in/x.parquet", pa.table({"id": ids, "embedding": lists}), row_group_size=2500)
    taken = []
    take = VectorsAsRead.take
    monkeypatch.setattr(VectorsAsRead, "take", lambda self, at, *axis: taken.append(len(at)) or take(self, at, *axis))
    outputs = {memory: tmp_path / memory for memory in ("2GB", "400MB")}
    for memory, output in outputs.items():
        result = untwin.deduplicate(tmp_path / "in", output, eps=0.05, n_clusters=5, memory=memory)
        assert result.n_duplicates > 1000
        assert sum(taken) == 3997
    for name in ("kmeans", "pairwise", "duplicates", "rejected", "kept"):
        one, other = (read_folder(output / name) for output in outputs.values())
        assert one.num_rows and one.equals(other), name
