"""The fit gives the same centroids in memory, from the disk and spread over processes, and reads what it needs."""

import multiprocessing
import tracemalloc
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stage_oracles import planted

from untwin import plan
from untwin.core import ArrayBlocks, fit, hash_integers, kmeans, normalize
from untwin.errors import DamagedFileError
from untwin.stages.base import Context, Task, Upstream
from untwin.stages.clustering import SAMPLE_SEED
from untwin.stages.fit import FitStage
from untwin.stages.ids import hash_ids
from untwin.stages.kmeans import KMeansStage
from untwin.storage.sample import SampleBlocks

N, DIM, K = 6000, 32, 40
PLAIN = {"max_iter": 4}
GROWN = {"init": "random", "max_iter": 3, "n_neighbours": 8, "growth": [(6 * K, 3), (40 * K, 2)]}


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    """Several parts of the sample."""
    monkeypatch.setattr(plan, "_MIN_UNIT_BYTES", 150_000)
    monkeypatch.setattr(plan, "_MAX_UNIT_BYTES", 150_000)


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Returns a function that writes the same rows, in another order, over a number of files; one row is shorter."""
    folder = tmp_path_factory.mktemp("fit")
    _, vectors = planted(N, DIM, seed=3)

    def write(n_files, seed):
        target = folder / f"{n_files}-{seed}"
        if not target.exists():
            target.mkdir()
            order = np.random.default_rng(seed).permutation(N)
            for number, part in enumerate(np.array_split(order, n_files)):
                rows = vectors[part].tolist()
                if 17 in part:
                    rows[part.tolist().index(17)] = [1.0, 2.0]
                table = pa.table({"id": part, "embedding": pa.array(rows, pa.list_(pa.float64()))})
                pq.write_table(table, target / f"{number:03d}.parquet", row_group_size=500)
        return str(target)

    return write


def sampled(source, target, options, **stage_options):
    """The stage of the fit, its unit, and the sample on the disk."""
    kmeans_stage = KMeansStage(K, "id", "embedding", source, str(target), **stage_options)
    kmeans_stage.fit_options.update(options)
    sample, fit_stage, *_ = kmeans_stage.stages()
    context = Context(1 << 30, 1, map)
    tasks = tuple(sample.process(unit, context) for unit in sample.units(Upstream()))
    assert len(tasks) >= 5
    (task,) = fit_stage.units(Upstream((tasks,)))
    return fit_stage, task


def fitted(stage, task, target, memory, **where):
    """Bytes of the centroids, and what the stage says of itself."""
    made = stage.process(task, Context(memory, 2, where.pop("map", map), **where))
    return (target / "_centroids.npy").read_bytes(), made.inertia, made.n_iter, made.n_sampled, made.group_starts


@pytest.mark.parametrize("options", [PLAIN, GROWN], ids=["plain", "grown"])
@pytest.mark.parametrize("fraction", [None, 0.5])
def test_centroids_are_the_same_bits_in_memory_from_the_disk_and_spread(
    options, fraction, source, tmp_path, pool, monkeypatch
):
    monkeypatch.setattr(kmeans._Fit, "_call_rows", lambda self, n_rows: 700)
    monkeypatch.setattr(kmeans, "_BATCH_BYTES", 1 << 15)
    answers = set()
    for number, (n_files, batch) in enumerate([(1, 1 << 15), (7, 1 << 15), (7, 300)]):
        target = tmp_path / str(number)
        stage, task = sampled(
            source(n_files, number), target, options, fit_data_fraction=fraction, max_samples_per_batch=batch
        )
        monkeypatch.setattr("untwin.stages.fit.batch_rows", lambda dim, rows=batch: min(rows, 500))
        less = stage.memory(task) - 1
        answers.add(fitted(stage, task, target, less + 1))
        with ThreadPoolExecutor(3) as threads:
            answers.add(fitted(stage, task, target, less, map=threads.map))
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(SampleBlocks, "read", None)  # in this process: those of the pool have their own
            answers.add(fitted(stage, task, target, less, spread=pool.map))
    ((content, _, _, n_sampled, _),) = answers
    assert n_sampled == (N - 1 if fraction is None else N // 2)

    # and they are those of the rows with the smallest hashes
    _, vectors = planted(N, DIM, seed=3)
    hashes = hash_ids(pa.array(range(N)), 42 + SAMPLE_SEED)
    chosen = np.setdiff1d(np.argsort(hashes)[:n_sampled], [17]) if fraction else np.delete(np.arange(N), 17)
    X, _ = normalize(vectors[chosen])
    arguments = {**stage._options, "seed": 42}
    want = fit(ArrayBlocks(X, hashes[chosen]), K, **arguments)
    np.save(tmp_path / "want.npy", want.centroids)
    assert (tmp_path / "want.npy").read_bytes() == content


def test_a_fit_that_has_the_memory_is_not_spread(source, tmp_path):
    stage, task = sampled(source(2, 0), tmp_path, PLAIN)
    assert fitted(stage, task, tmp_path, stage.memory(task), spread=None)
    assert fitted(stage, task, tmp_path, stage.memory(task), spread=lambda *_: pytest.fail("spread"))


@pytest.mark.parametrize("n_files", [1, 30])
def test_steps_on_few_rows_read_few_rows_from_the_disk(n_files, source, tmp_path, monkeypatch):
    """Three iterations on 240 rows and two on 1,600, of 6,000: a good deal less than five times all of them."""
    target = tmp_path / "k"
    monkeypatch.setattr("untwin.storage.sample._LEAST_BATCH_BYTES", 1)
    read = []
    original = SampleBlocks.read

    def counted(self, index, start, vectors, hashes):
        read.append(len(vectors))
        original(self, index, start, vectors, hashes)

    monkeypatch.setattr(SampleBlocks, "read", counted)
    totals = []
    for growth in ([], [(6 * K, 3), (40 * K, 2)]):
        stage, task = sampled(source(n_files, 0), target / str(len(growth)), {**GROWN, "tol": 0, "growth": growth})
        read.clear()
        made = stage.process(task, Context(stage.minimum_memory(task), 1, map))
        assert made.n_iter == 3 + 5 * bool(growth)
        totals.append(sum(read))
    all_rows, more = totals[0], totals[1] - totals[0]
    assert all_rows >= 4 * (N - 1)
    assert 3 * 240 + 2 * 1600 - 3 * K <= more < 3 * 240 + 2 * 1600 + 3 * K + 2000


@pytest.mark.parametrize("spreads", [False, True])
def test_a_damaged_part_of_the_sample_is_named(spreads, source, tmp_path, pool):
    stage, task = sampled(source(7, 0), tmp_path, PLAIN)
    part = sorted((tmp_path / "_work/sample").iterdir())[2]
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match=part.name):
        fitted(stage, task, tmp_path, stage.memory(task) - 1, spread=pool.map if spreads else None)


class Generated:
    """Blocks of which nothing stays in memory."""

    def __init__(self, n_rows, dim):
        self.n_rows, self.dim = n_rows, dim

    def __len__(self):
        return (self.n_rows + 999) // 1000

    def block(self, index, start=0, stop=None):
        at = np.arange(index * 1000, min(self.n_rows, index * 1000 + 1000))[start:stop]
        words = hash_integers((at[:, None] * self.dim + np.arange(self.dim)).ravel(), 1).reshape(len(at), self.dim)
        return normalize(words.astype(np.float64) - 2.0**63)[0], hash_integers(at, 2)


@pytest.mark.parametrize(("n_rows", "dim", "n_clusters"), [(300_000, 2, 8), (3000, 200, 1500), (4000, 200, 400)])
@pytest.mark.parametrize("options", [PLAIN, GROWN, {"init": "copies"}], ids=["plain", "grown", "empty clusters"])
def test_the_fit_needs_no_more_memory_than_it_says(options, n_rows, dim, n_clusters, monkeypatch):
    """Many rows, or many centroids: what it says beyond 32 MB, which are for the blocks at work, is enough."""
    monkeypatch.setattr(kmeans, "_BATCH_BYTES", 1)
    options = {"init": "k-means||", "oversampling_factor": 2.0, **options, "max_iter": 2}
    if options["init"] == "copies":
        options["init"] = np.full((n_clusters, dim), dim**-0.5, np.float32)
    if "growth" in options:
        options["growth"] = [(n_rows // 8, 1)]
    stage = FitStage(SimpleNamespace(plan=SimpleNamespace(dim=dim, n_clusters=n_clusters)), **options)
    declared = stage.minimum_memory(Task(0, n_rows)) - (32 << 20)
    tracemalloc.start()
    fit(Generated(n_rows, dim), n_clusters, **options)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < declared + (2 << 20) + 8 * 4 * dim * 1000
