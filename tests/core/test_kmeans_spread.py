"""k-means whose passes run in other processes: the same bits, no row here, and little that travels."""

import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from test_kmeans import Ragged, assert_same, clustered, hashes_of

from untwin.core import kmeans
from untwin.core.kmeans import ArrayBlocks, fit
from untwin.errors import ParameterError


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


class Spread:
    """`map` over processes; notes what travels."""

    def __init__(self, pool):
        self.pool = pool
        self.passes = []
        """For each pass: bytes of the function, and of each item and result."""

    def __call__(self, function, items):
        self.passes.append((len(pickle.dumps(function)), [], []))
        _, sent, received = self.passes[-1]

        def noted():
            for item in items:
                sent.append(len(pickle.dumps(item)))
                yield item

        for result in self.pool.map(function, noted()):
            received.append(len(pickle.dumps(result)))
            yield result


class Elsewhere(Ragged):
    """Blocks that cannot be read in the process that made them."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.home = os.getpid()

    def block(self, index, start=0, stop=None):
        assert os.getpid() != self.home
        return super().block(index, start, stop)


def call_rows(monkeypatch, rows, batch_bytes=1):
    """Read so many rows in a call, and work on so many bytes of them together."""
    monkeypatch.setattr(kmeans._Fit, "_call_rows", lambda self, n_rows: rows)
    monkeypatch.setattr(kmeans, "_BATCH_BYTES", batch_bytes)


@pytest.mark.parametrize(("n_neighbours", "growth"), [(None, ()), (6, ((150, 4), (400, 3)))])
@pytest.mark.parametrize("init", ["k-means||", "random", "array"])
def test_fit_in_other_processes_has_the_same_bits_for_any_blocks_and_calls(
    init, n_neighbours, growth, pool, monkeypatch
):
    X, hashes = clustered(2, 1000, 12), hashes_of(1000)
    X[500:520] = X[0]
    arguments = {
        "init": np.repeat(X[:5], 5, axis=0) if init == "array" else init,
        "seed": 3,
        "n_init": 2,
        "max_iter": 9,
    }
    arguments |= {"n_neighbours": n_neighbours, "growth": growth}
    want = fit(ArrayBlocks(X, hashes), 25, **arguments)
    rng = np.random.default_rng(5)
    n_calls = []
    for rows, cuts, by_hash in (
        (1, [10, 500, 500], True),
        (300, rng.integers(0, 1000, 20), False),
        (5000, [400], True),
    ):
        call_rows(monkeypatch, rows)
        order = np.argsort(hashes) if by_hash else rng.permutation(1000)
        spread = Spread(pool)
        assert_same(fit(Elsewhere(X, hashes, order, cuts), 25, spread=spread, **arguments), want)
        n_calls.append(max(len(sent) for _, sent, _ in spread.passes[1:]))
    assert n_calls[0] == 3  # blocks with rows
    assert n_calls[1] >= 3
    assert n_calls[2] == 1


def test_empty_clusters_are_filled_in_the_same_way_from_other_processes(pool, monkeypatch):
    """All start at one row: by the farthest rows, or with neighbours by splits; several rows share a hash."""
    call_rows(monkeypatch, 200)
    X = clustered(16, 600, 6)
    hashes = hashes_of(600)[np.arange(600) // 3]
    for n_neighbours in (None, 8):
        arguments = {"init": np.repeat(X[:1], 40, axis=0), "n_neighbours": n_neighbours, "max_iter": 6}
        want = fit(ArrayBlocks(X, hashes), 40, **arguments)
        assert np.count_nonzero(want.counts) > 20
        order = np.random.default_rng(1).permutation(600)
        spread = Spread(pool)
        assert_same(fit(Elsewhere(X, hashes, order, [90, 300, 310]), 40, spread=spread, **arguments), want)
        assert len(spread.passes) > want.n_iter + 2, "no pass for the rows that clusters are filled with"


@pytest.mark.parametrize("n_neighbours", [None, 5])
def test_what_travels_is_small_beside_the_rows(n_neighbours, pool, monkeypatch):
    """Centroids go with the function, labels and positions with an item, and sums come back once a call."""
    n, dim, n_clusters = 4000, 64, 30
    call_rows(monkeypatch, 1000)
    X, hashes = clustered(3, n, dim, n_centres=60), hashes_of(n)
    order = np.argsort(hashes)
    spread = Spread(pool)
    arguments = {"init": "random", "n_neighbours": n_neighbours, "max_iter": 4, "tol": 0}
    arguments["growth"] = [(1000, 2)] if n_neighbours else []
    got = fit(Elsewhere(X, hashes, order, range(250, n, 250)), n_clusters, spread=spread, **arguments)
    assert_same(got, fit(ArrayBlocks(X, hashes), n_clusters, **arguments))
    blocks = len(pickle.dumps(Elsewhere(X, hashes, order, range(250, n, 250))))
    one_array = 4 * n_clusters * dim
    for function, sent, received in spread.passes:
        assert function < blocks + 2 * one_array + 100 * n_clusters + 2000
        assert max(sent) < 12 * 1000 + 2000
        assert max(received) < 2 * one_array + 20 * 1000 + 20 * n_clusters + 2000
    small = [len(sent) for _, sent, _ in spread.passes]
    assert max(small) == 4
    assert (small.count(1) >= 4) == bool(n_neighbours), "steps on few rows read few blocks"


def test_each_call_reads_at_least_as_many_bytes_as_it_sends_back():
    run = kmeans._Fit(ArrayBlocks(clustered(0, 20, 512), hashes_of(20)), 10, map, None)
    for n_clusters, n_rows in ((10, 10**6), (50_000, 10**7), (50_000, 10**9)):
        run.n_clusters = n_clusters
        rows = run._call_rows(n_rows)
        assert 4 * 512 * rows >= max(16 << 20, 8 * 512 * n_clusters)
        assert n_rows / rows <= 1024


def test_errors_in_other_processes_come_back(pool):
    X = clustered(0, 50, 4) * np.float32(2)
    with pytest.raises(ParameterError, match="unit length"):
        fit(Elsewhere(X, hashes_of(50), np.arange(50), [20]), 3, spread=Spread(pool))
    half = Elsewhere(X / 2, hashes_of(50), np.arange(50), [20])
    half.n_rows = 51
    with pytest.raises(ParameterError, match="hold 50 rows, not 51"):
        fit(half, 3, spread=Spread(pool))
