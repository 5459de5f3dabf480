"""Half of all rows may be the same picture: equal vectors cost no products among each other."""

import numpy as np
import pyarrow as pa
import pytest

from inputs import read_folder, write_parquet
from untwin import deduplicate
from untwin.core import similarity

N_ROWS, DIM, EPS = 200_000, 16, 0.01


@pytest.fixture
def rows_in_products(monkeypatch):
    """How many rows each product of a run had: one number for each batch that was compared."""
    counts = []
    judge = similarity._Resolver._judge

    def counting(self, part):
        counts.append(part.stop - part.start)
        return judge(self, part)

    monkeypatch.setattr(similarity._Resolver, "_judge", counting)
    return counts


def table_of(vectors):
    """A table of many rows, made without a loop over them."""
    ids = pa.array(np.char.add("r", np.char.zfill(np.arange(len(vectors)).astype(str), 6)))
    flat = pa.array(vectors.astype(np.float32).ravel())
    return pa.table({"id": ids, "embedding": pa.FixedSizeListArray.from_arrays(flat, DIM)})


@pytest.mark.parametrize("compare_to", ["kept", "ranked"])
def test_half_of_all_rows_identical(tmp_path, rows_in_products, compare_to):
    """The other half are 500 directions, 200 times each, no two within eps: so the answer can be counted."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(500, DIM))
    vectors = np.zeros((N_ROWS, DIM))
    vectors[: N_ROWS // 2] = directions[0]
    vectors[N_ROWS // 2 :] = np.repeat(directions, N_ROWS // 1000, axis=0)  # each of 500 rows 200 times
    order = rng.permutation(N_ROWS)
    path = write_parquet(tmp_path / "in.parquet", table_of(vectors[order]))
    result = deduplicate(path, str(tmp_path / "out"), eps=EPS, compare_to=compare_to, n_clusters=3)
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    S = unit @ unit.T
    np.fill_diagonal(S, 0)
    assert S.max() < 1 - EPS
    assert result.n_kept == 500
    assert result.n_duplicates == N_ROWS - 500
    assert sum(rows_in_products) == 500

    # of equal rows the best-ranked stays, which is the one with the last id; every other one names it, with score 1
    direction = np.zeros(N_ROWS, int)
    direction[: N_ROWS // 2] = 0
    direction[N_ROWS // 2 :] = np.repeat(np.arange(500), N_ROWS // 1000)
    direction = direction[order]
    last = np.zeros(500, int)
    np.maximum.at(last, direction, np.arange(N_ROWS))
    found = read_folder(tmp_path / "out" / "duplicates")
    place = np.char.lstrip(found["id"].to_numpy().astype(str), "r").astype(int)
    witness = np.char.lstrip(found["kept_id"].to_numpy().astype(str), "r").astype(int)
    assert sorted([*place.tolist(), *last.tolist()]) == list(range(N_ROWS))
    assert (witness == last[direction[place]]).all()
    assert set(found["cosine_sim_score"].to_pylist()) == {1.0}


@pytest.mark.parametrize("compare_to", ["kept", "ranked"])
def test_all_rows_identical_take_one_product(tmp_path, rows_in_products, compare_to):
    path = write_parquet(tmp_path / "in.parquet", table_of(np.ones((N_ROWS, DIM))))
    result = deduplicate(path, str(tmp_path / "out"), eps=EPS, compare_to=compare_to, n_clusters=5)
    assert (result.n_kept, result.n_duplicates) == (1, N_ROWS - 1)
    assert sum(rows_in_products) == 1


@pytest.mark.parametrize("compare_to", ["kept", "ranked"])
def test_copies_change_nothing_for_the_other_rows(tmp_path, compare_to):
    """Rows with near-copies, then each of them three times more: the same scores among the first, copies removed."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(3000, DIM))
    vectors[1000:] = vectors[rng.integers(1000, size=2000)] + 0.1 * rng.normal(size=(2000, DIM))
    options = {"eps": EPS, "compare_to": compare_to, "n_clusters": 1, "rank_by": "id:asc"}
    once = deduplicate(write_parquet(tmp_path / "a.parquet", table_of(vectors)), str(tmp_path / "a"), **options)
    assert 100 < once.n_duplicates < 2900
    copies = np.concatenate((vectors, np.repeat(vectors, 3, axis=0)))
    path = write_parquet(tmp_path / "b.parquet", table_of(copies))
    often = deduplicate(path, str(tmp_path / "b"), **options)
    assert often.n_kept == once.n_kept
    assert often.n_duplicates == once.n_duplicates + 9000
    assert often.duplicates().slice(0, once.n_duplicates).equals(once.duplicates())
