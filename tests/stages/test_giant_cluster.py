"""A cluster that other processes compare, too, has the same answer, to the bit, and leaves nothing behind."""

import multiprocessing
import tracemalloc
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stage_oracles import all_pairs, assert_same_matches
from threadpoolctl import threadpool_limits

from untwin.core import Between, Block, match_ranked, normalize, similarity
from untwin.stages import pairwise
from untwin.stages.base import Context, Upstream
from untwin.stages.pairwise import PairwiseStage
from untwin.storage.files import Recording, Storage
from untwin.storage.spool import SharedFile

IN_MEMORY, FROM_DISK = 1 << 30, 8 << 20
SIZES = (("_BLOCK_ROWS", 100), ("_BLOCK_COLUMNS", 60), ("_BLOCKS", 6))


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(
        2, mp_context=multiprocessing.get_context("spawn"), initializer=threadpool_limits, initargs=(1, "blas")
    ) as pool:
        yield pool


@pytest.fixture
def worth_it(monkeypatch):
    """Small clusters travel: 256 rows are resolved at a time."""
    monkeypatch.setattr(pairwise, "_SPREAD_WORK", 0)
    monkeypatch.setattr(pairwise, "_SPREAD_ROWS", (1, 256))
    for name, size in SIZES:
        monkeypatch.setattr(similarity, name, size)


def vectors_of(kind, n, dim):
    """Rows in rank order, full of what makes comparing hard."""
    rng = np.random.default_rng(n)
    if kind == "chains":  # neighbours are within eps, the next but one are not
        X = rng.standard_normal((n, dim))
        for at in range(1, n):
            X[at] = 0.963 * X[at - 1] + np.sqrt(1 - 0.963**2) * X[at]
        return X
    if kind == "almost equal":
        return 1 + 1e-4 * rng.standard_normal((n, dim))
    X = rng.standard_normal((max(2, n // 12), dim))[rng.integers(0, max(2, n // 12), n)]
    X += 0.1 * rng.random((n, 1)) * rng.standard_normal((n, dim))
    for source, target in rng.integers(0, n, (n // 4, 2)):
        X[target] = X[source]
    return X


def write_cluster(folder, X):
    """One cluster whose rank order is the order of the rows; in the file they are shuffled. Returns the ids."""
    n, dim = X.shape
    ids = [f"clip-{number:05d}" for number in range(n)]
    order = np.random.default_rng(5).permutation(n)
    table = pa.table(
        {
            "id": pa.array(ids),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(X.astype(np.float32).reshape(-1)), dim),
            "place": np.arange(n),
        }
    )
    (folder / "centroid=3").mkdir(parents=True)
    pq.write_table(table.take(order), folder / "centroid=3/part-0.parquet", row_group_size=300)
    return ids


def stage_for(source, target, **options):
    ranking = pairwise.RankingStrategy.metadata_based(["place"])
    return PairwiseStage("id", "embedding", str(source), str(target), ranking, **options)


def compare(stage, spread=None, memory=IN_MEMORY, threads=1):
    (unit,) = stage.units(Upstream())
    with ThreadPoolExecutor(threads) as pool, threadpool_limits(1, "blas"):
        stage.process(unit, Context(memory, threads, pool.map if threads > 1 else map, spread))
    return pq.read_table(f"{stage.output_path}/cluster_3.parquet")


class Workers:
    """What a backend gives: `map` over processes; notes what was asked."""

    def __init__(self, processes):
        self._processes, self.items = processes, []

    def spread(self, function, items):
        items = list(items)
        self.items += items
        return self._processes.map(function, items)


@pytest.mark.parametrize(("eps", "compare_to"), [(None, "ranked"), (0.05, "ranked"), (0.05, "kept")])
@pytest.mark.parametrize("memory", [IN_MEMORY, FROM_DISK])
@pytest.mark.parametrize(
    ("kind", "n", "dim"),
    [
        *(("groups", 1, 24), ("groups", 700, 24), ("groups", 800, 1200), ("almost equal", 513, 16)),
        *(("chains", n, 600) for n in (256, 257, 600)),
    ],
)
def test_the_answer_is_that_of_one_process(tmp_path, worth_it, processes, kind, n, dim, memory, eps, compare_to):
    X = vectors_of(kind, n, dim)
    ids = write_cluster(tmp_path / "in", X)
    options = {"eps": eps, "compare_to": compare_to}
    workers = Workers(processes)
    got = compare(stage_for(tmp_path / "in", tmp_path / "spread", **options), workers.spread, memory, threads=2)
    want = compare(stage_for(tmp_path / "in", tmp_path / "alone", **options))
    assert got.equals(want)
    n_distinct = len(np.unique(normalize(X.astype(np.float32))[0], axis=0))
    assert any(isinstance(item, Block) for item in workers.items) == (n_distinct > 256)
    many_copies = kind == "groups" and n > 1
    assert any(isinstance(item, Between) for item in workers.items) == (many_copies and compare_to == "kept")
    if kind == "groups":
        assert_same_matches(got, all_pairs(ids, X.astype(np.float32), eps=eps, compare_to=compare_to))
    if kind == "chains" and compare_to == "kept":
        assert 0.4 * n < got["kept_id"].null_count < 0.6 * n


def test_all_but_a_few_hundredths_of_the_products_of_a_large_cluster_travel(monkeypatch):
    asked = []

    def elsewhere(rows):
        def compare(blocks):
            asked.extend(blocks)
            yield from ((similarity._Best.empty(1).found(),) * 2 for _ in blocks)

        return compare

    monkeypatch.setattr(similarity._Resolver, "_judge", lambda self, part: None)
    n = 40_000
    X, _ = normalize(np.random.default_rng(0).standard_normal((n, 4)))
    assert pairwise._spread_batch(n, 4, 1 << 30) == 4096
    match_ranked(similarity.RankedArray(X), eps=0.1, batch_size=4096, elsewhere=elsewhere)
    share = sum((block.high - block.low) * (block.stop - block.start) for block in asked) / (n * n / 2)
    assert 0.88 < share < 0.92
    assert pairwise._spread_batch(1_000_000, 512, 4 << 30) == 1_000_000 // 128
    assert pairwise._spread_batch(9_000_000, 512, 4 << 30) == 16_384
    assert pairwise._spread_batch(9_000_000, 512, 64 << 20) * 512 * 4 == 8 << 20


def test_small_clusters_do_not_travel(tmp_path):
    def spread(function, items):
        raise AssertionError("the cluster is too small")

    write_cluster(tmp_path / "in", vectors_of("groups", 2000, 24))
    alone = compare(stage_for(tmp_path / "in", tmp_path / "alone"))
    assert compare(stage_for(tmp_path / "in", tmp_path / "out"), spread).equals(alone)
    assert 20_000**2 * 384 < pairwise._SPREAD_WORK <= 40_000**2 * 384


@pytest.mark.parametrize("memory", [IN_MEMORY, FROM_DISK])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_of_what_workers_read(tmp_path, worth_it, memory, fails):
    seen = []

    def spread(function, items):
        seen.extend(path.stat().st_size for path in (tmp_path / "out/_work").glob("cluster_3-*"))
        if fails and len(seen) == 2:
            raise OSError("a worker is gone")
        return map(function, items)

    X = vectors_of("groups", 1000, 24)
    write_cluster(tmp_path / "in", X)
    stage = stage_for(tmp_path / "in", tmp_path / "out")
    recording = Recording()
    with recording.active():
        if fails:
            with pytest.raises(OSError, match="a worker is gone"):
                compare(stage, spread, memory)
        else:
            compare(stage, spread, memory)
    n_distinct = len(np.unique(normalize(X.astype(np.float32))[0], axis=0))
    assert len(seen) >= 2 and set(seen) == {n_distinct * 24 * 4}
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name == "_work"] == []
    assert list(recording.files) == ([] if fails else [str(tmp_path / "out/cluster_3.parquet")])


@pytest.mark.parametrize("spread", [0.05, pytest.param(1e-5, marks=pytest.mark.slow)])
def test_a_call_keeps_to_its_memory_when_all_rows_are_almost_equal(tmp_path, spread):
    """With the smallest spread no product tells which row is the most similar one."""
    memory, dim = 64 << 20, 1024
    n = pairwise._spread_batch(1 << 20, dim, memory)
    X, _ = normalize(1 + spread * np.random.default_rng(0).standard_normal((3 * n, dim)).astype(np.float32))
    file = SharedFile(Storage(), str(tmp_path / "rows"), 3 * n, dim)
    file.write([X])
    removed = np.random.default_rng(1).random(2 * n) < 0.5
    block = Block(2 * n, 3 * n, 0, 2 * n, np.packbits(removed))
    tracemalloc.start()
    best, kept = pairwise._compare_block(file, 0.1, pairwise._tile_rows(dim, memory), block)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n == 2048 and peak < memory < X.nbytes * 3
    cosine = X[2 * n :].astype(np.float64) @ X[: 2 * n].T.astype(np.float64)
    for found, allowed in ((best, np.ones(2 * n, bool)), (kept, ~removed)):
        np.testing.assert_array_equal(found.row, np.arange(n))
        assert allowed[found.other].all()
        np.testing.assert_allclose(found.value, cosine[:, allowed].max(axis=1), rtol=0, atol=1e-6)
