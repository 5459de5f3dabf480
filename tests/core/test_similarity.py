"""`match_ranked` against brute force in float64."""

import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from untwin.core import similarity
from untwin.core.similarity import (
    EPS_GRID,
    Between,
    Matches,
    RankedArray,
    is_duplicate,
    match_block,
    match_ranked,
    score_counts,
    threshold,
)
from untwin.core.vectors import normalize, product_error, rowwise_dot
from untwin.errors import ParameterError


def exact_cosines(X):
    """All fixed-order float64 similarities, (n, n)."""
    n = len(X)
    i, j = np.indices((n, n)).reshape(2, -1)
    square = rowwise_dot(X, X)
    return np.minimum(rowwise_dot(X[i], X[j]) / np.sqrt(square[i] * square[j]), 1).reshape(n, n)


def brute_force(X, eps, compare_to):
    """The definition, one row at a time."""
    n, C = len(X), exact_cosines(X)
    score, match = np.zeros(n, np.float32), np.zeros(n, np.int64)
    kept_score, kept_match = np.full(n, np.nan, np.float32), np.full(n, -1)
    duplicate = np.zeros(n, bool)
    for i in range(1, n):
        match[i] = np.argmax(C[i, :i])
        score[i] = C[i, match[i]]
        if eps is None:
            continue
        kept = np.flatnonzero(~duplicate[:i])
        witness = kept[np.argmax(C[i, kept])]
        close = np.float32(C[i, witness]) >= threshold(eps)
        duplicate[i] = close if compare_to == "kept" else score[i] >= threshold(eps)
        if duplicate[i] and close:
            kept_match[i], kept_score[i] = witness, C[i, witness]
    if eps is None:
        return Matches(score, match, None, None, None)
    return Matches(score, match, kept_score, kept_match, duplicate)


def assert_same(got, want):
    for name in ("score", "match", "kept_score", "kept_match", "duplicate"):
        a, b = getattr(got, name), getattr(want, name)
        if b is None:
            assert a is None
        else:
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, err_msg=name)


def clustered(rng, n, dim, *, spread=0.1):
    """Unit rows full of near-ties: groups, rows a few units in the last place apart, and identical rows."""
    centres = rng.standard_normal((max(2, n // 12), dim))
    X = centres[rng.integers(0, len(centres), n)]
    X += spread * rng.random((n, 1)) * rng.standard_normal((n, dim))
    X, _ = normalize(X)
    for source, target in rng.integers(0, n, (n // 4, 2)):
        X[target] = X[source]
    for source, target in rng.integers(0, n, (n // 4, 2)):
        X[target] = X[source]
        X[target, rng.integers(dim)] *= np.float32(1 + 2.0**-22)
    return X


class OnDisk:
    """Rows that are not in memory."""

    def __init__(self, X):
        self._X = X
        self.n, self.dim = X.shape

    def take(self, lo, hi):
        assert 0 <= lo < hi <= self.n
        return self._X[lo:hi].copy()


class Elsewhere:
    """Compares blocks in this process, from rows that it was given; notes which."""

    def __init__(self, eps, tile_rows):
        self.eps, self.tile_rows = eps, tile_rows
        self.blocks, self.between = [], []

    def __call__(self, rows):
        self.X = rows.take(0, rows.n).copy()
        return self.compare

    def compare(self, blocks):
        for block in blocks:
            (self.between if isinstance(block, Between) else self.blocks).append(block)
            tiles = (
                self.X[at : min(at + self.tile_rows, block.stop)]
                for at in range(block.start, block.stop, self.tile_rows)
            )
            yield match_block(block, RankedArray(self.X), tiles, self.eps)


@pytest.mark.parametrize("batch_size", range(1, 7))
def test_worked_example(batch_size):
    rows = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12], [1, 2, 3], [1, 2, 3]]
    X, _ = normalize(np.array(rows, np.float32))
    got = match_ranked(RankedArray(X), eps=None, batch_size=batch_size)
    np.testing.assert_allclose(got.score, [0, 0.974631, 0.998190, 0.999618, 1, 1], atol=1e-6)
    assert got.match.tolist() == [0, 0, 1, 2, 0, 0]
    assert got.score[4] == got.score[5] == 1
    assert got.duplicate is None


def test_a_chain_is_removed_whole_under_ranked_and_every_other_row_kept_under_kept():
    angles = np.arange(6) * 0.2
    X, _ = normalize(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    eps = 1 - np.cos(0.25)
    ranked = match_ranked(RankedArray(X), eps=eps, compare_to="ranked")
    kept = match_ranked(RankedArray(X), eps=eps, compare_to="kept")
    assert np.flatnonzero(~ranked.duplicate).tolist() == [0]
    assert np.flatnonzero(~kept.duplicate).tolist() == [0, 2, 4]
    assert ranked.kept_match.tolist() == [-1, 0, -1, -1, -1, -1]
    assert kept.kept_match.tolist() == [-1, 0, -1, 2, -1, 4]
    np.testing.assert_array_equal(ranked.score, kept.score)


@pytest.mark.parametrize("compare_to", ["kept", "ranked"])
@pytest.mark.parametrize(("dim", "n"), [(1, 40), (2, 150), (3, 150), (17, 300), (384, 150), (1024, 60)])
def test_equals_brute_force_for_every_eps_batch_size_and_executor(dim, n, compare_to):
    rng = np.random.default_rng(dim)
    X = clustered(rng, n, dim)
    with ThreadPoolExecutor(3) as pool:
        for eps in (None, 1e-7, 0.001, 0.01, 0.1, 0.3):
            want = brute_force(X, eps, compare_to)
            for batch_size, run in ((1, None), (7, pool.map), (64, None), (1024, pool.map)):
                got = match_ranked(
                    RankedArray(X), eps=eps, compare_to=compare_to, batch_size=batch_size, executor_map=run
                )
                assert_same(got, want)


@pytest.mark.parametrize("compare_to", ["kept", "ranked"])
@pytest.mark.parametrize(("n", "dim", "spread"), [(900, 24, 0.1), (700, 8, 1e-6), (800, 2, 1.0)])
def test_equals_brute_force_across_squares_and_stores(n, dim, spread, compare_to):
    X = clustered(np.random.default_rng(n), n, dim, spread=spread)
    for eps in (0.001, 0.05):
        want = brute_force(X, eps, compare_to)
        for batch_size in (100, 300, 2000):
            assert_same(match_ranked(RankedArray(X), eps=eps, compare_to=compare_to, batch_size=batch_size), want)


@pytest.mark.parametrize("compare_to", ["kept", "ranked"])
@pytest.mark.parametrize("store", [RankedArray, OnDisk])
def test_blocks_that_are_compared_elsewhere_change_nothing(monkeypatch, store, compare_to):
    for name, size in (("_BLOCK_ROWS", 30), ("_BLOCK_COLUMNS", 20), ("_BLOCKS", 5)):
        monkeypatch.setattr(similarity, name, size)
    monkeypatch.setattr(similarity, "_TILE_COLUMNS", 17)
    monkeypatch.setattr(similarity, "_SLICE_ROWS", 16)
    monkeypatch.setattr(similarity, "_STRIP_ROWS", 33)
    between = 0
    with ThreadPoolExecutor(2) as pool:
        for n, dim, spread in ((1, 3, 0.1), (50, 2, 1.0), (51, 7, 0.1), (150, 24, 1e-6), (231, 12, 0.1)):
            X = clustered(np.random.default_rng(n), n, dim, spread=spread)
            for eps in (None, 0.001, 0.05):
                want = brute_force(X, eps, compare_to)
                for batch_size, tile_rows, run in ((1, 40, None), (50, 7, None), (77, 1000, pool.map), (500, 9, None)):
                    elsewhere = Elsewhere(eps, tile_rows)
                    got = match_ranked(
                        store(X),
                        eps=eps,
                        compare_to=compare_to,
                        batch_size=batch_size,
                        executor_map=run,
                        elsewhere=elsewhere,
                    )
                    assert_same(got, want)
                    assert bool(elsewhere.blocks) == (len(elsewhere.X) > batch_size)
                    between += len(elsewhere.between)
    assert (between > 50) == (compare_to == "kept")


@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (4, 4), (5, 4), (8, 4), (9, 4), (61, 7), (100, 30)])
def test_each_pair_is_compared_once_be_it_here_or_elsewhere(monkeypatch, n, batch_size):
    for name, size in (("_BLOCK_ROWS", 9), ("_BLOCK_COLUMNS", 6), ("_BLOCKS", 4), ("_STRIP_ROWS", 5), ("_FINE", 3)):
        monkeypatch.setattr(similarity, name, size)
    compared = np.zeros((n, n), np.int64)
    original = similarity._Strip.note

    def noted(self, products, first, around, stays):
        if elsewhere.X is not self.rows.X.base:  # those of blocks are counted as blocks
            compared[np.ix_(self.rows.position, np.arange(first, first + products.shape[1]))] += 1
        original(self, products, first, around, stays)

    monkeypatch.setattr(similarity._Strip, "note", noted)
    X, _ = normalize(np.random.default_rng(n).standard_normal((n, 6)))
    elsewhere = Elsewhere(0.1, 3)
    match_ranked(RankedArray(X), eps=0.1, batch_size=batch_size, elsewhere=elsewhere)
    for block in elsewhere.blocks:
        assert block.high - block.low <= 9
        compared[block.low : block.high, block.start : block.stop] += 1
    assert (compared[np.tril_indices(n, -1)] == 1).all()


@pytest.mark.parametrize("fails", ["elsewhere", "here"])
def test_after_a_failure_the_rest_is_not_waited_for(monkeypatch, fails):
    X, _ = normalize(np.random.default_rng(1).standard_normal((90, 6)))
    monkeypatch.setattr(similarity, "_BLOCK_ROWS", 1)
    monkeypatch.setattr(similarity, "_FINE", 1)
    elsewhere, asked, given, judging = Elsewhere(0.1, 30), [], [], threading.Event()

    def compare(blocks):
        asked.extend(blocks)
        for found in elsewhere.compare(blocks):
            given.append(found)
            yield found
            if fails == "elsewhere":
                raise OSError("a worker is gone")
            if len(given) > 30:
                judging.wait(60)
                time.sleep(0.05)

    def judge(self, part):
        if given and fails == "here":
            judging.set()
            raise OSError("the disk is full")

    monkeypatch.setattr(similarity._Resolver, "_judge", judge)
    with pytest.raises(OSError, match="gone" if fails == "elsewhere" else "full"):
        match_ranked(RankedArray(X), eps=0.1, batch_size=30, elsewhere=lambda rows: elsewhere(rows) and compare)
    assert len(asked) == 60
    assert len(given) == 1 if fails == "elsewhere" else 30 <= len(given) < 60


def test_small_matrix_tiles_change_nothing(monkeypatch):
    X = clustered(np.random.default_rng(5), 300, 12)
    want = brute_force(X, 0.05, "kept")
    for side, columns, read in ((1, 3, 7), (16, 5, 5), (33, 64, 100)):
        monkeypatch.setattr(similarity, "_SLICE_ROWS", side)
        monkeypatch.setattr(similarity, "_STRIP_ROWS", 2 * side + 1)
        monkeypatch.setattr(similarity, "_TILE_COLUMNS", columns)
        monkeypatch.setattr(similarity, "_READ_BYTES", 4 * 12 * read)
        assert_same(match_ranked(RankedArray(X), eps=0.05, batch_size=50), want)


def test_products_with_the_largest_allowed_error_change_nothing(monkeypatch):
    """Any BLAS will do: every product is disturbed by almost as much as the bound allows."""
    rng = np.random.default_rng(6)
    X = clustered(rng, 200, 64, spread=0.02)
    margin = product_error(64) - 3 * 2.0**-24
    monkeypatch.setattr(similarity, "_TILE_COLUMNS", 50)
    original, notes = similarity._Strip.note, []

    def disturbed(self, products, first, around, stays):
        left, right = self.rows.X, around.rows.X[first - around.start :][: products.shape[1]]
        exact = rowwise_dot(np.repeat(left, len(right), axis=0), np.tile(right, (len(left), 1)))
        wrong = exact.reshape(products.shape) + margin * rng.choice([-1, 1], products.shape)
        notes.append(products.size)
        original(self, np.where(products < -3, products, wrong).astype(np.float32), first, around, stays)

    monkeypatch.setattr(similarity._Strip, "note", disturbed)
    for compare_to in ("kept", "ranked"):
        for eps in (0.001, 0.01, 0.1):
            want = brute_force(X, eps, compare_to)
            for elsewhere in (None, Elsewhere(eps, 60)):
                got = match_ranked(RankedArray(X), eps=eps, compare_to=compare_to, batch_size=70, elsewhere=elsewhere)
                assert_same(got, want)
    assert sum(notes) > 12 * len(np.unique(X, axis=0)) ** 2 / 2


def blob(rng, n, dim, spread, far=0):
    """Rows that are hardly different, and some that are; some twice, some but for a few units in the last place."""
    rows = rng.standard_normal(dim) * np.where(np.arange(n) < n - far, 1, -1)[:, None]
    X, _ = normalize(rows + spread * rng.standard_normal((n, dim)))
    for source, target in rng.integers(0, n, (n // 8, 2)):
        X[target] = X[source]
    for source, target in rng.integers(0, n, (n // 8, 2)):
        X[target] = X[source]
        X[target, rng.integers(dim)] *= np.float32(1 + 2.0**-22)
    return X[rng.permutation(n)]


@pytest.mark.parametrize("far", [0, 3])
@pytest.mark.parametrize("spread", [0.1, 0.01, 1e-3, 1e-5, 1e-7])
def test_rows_close_to_their_centre_equal_brute_force(spread, far, monkeypatch):
    """As before, with products that are off by almost as much as is said."""
    rng = np.random.default_rng(10)
    X = blob(rng, 180, 48, spread, far)
    monkeypatch.setattr(similarity, "_CLOSE", 0.5)
    monkeypatch.setattr(similarity, "_TILE_COLUMNS", 50)
    monkeypatch.setattr(similarity, "_SLICE_ROWS", 60)
    original, n_disturbed = similarity._Part._add, 0

    def disturbed(part, products, offset):
        nonlocal n_disturbed
        n_disturbed += products.size
        found = original(part, products, offset)
        found += 0.45 * part.slack[:, None] * rng.choice([-1, 1], found.shape)
        return found

    similarities = np.sort(exact_cosines(X)[np.tril_indices(len(X), -1)])
    middle = [float(1 - similarities[int(len(similarities) * share)]) for share in (0.1, 0.5, 0.9)]
    for add in (original, disturbed):
        monkeypatch.setattr(similarity._Part, "_add", add)
        for eps in (None, 0.3, *(eps for eps in middle if 0 < eps < 1)):
            for compare_to in ("kept", "ranked"):
                want = brute_force(X, eps, compare_to)
                got = match_ranked(RankedArray(X), eps=eps, compare_to=compare_to)
                assert_same(got, want)
                with ThreadPoolExecutor(2) as pool:
                    got = match_ranked(
                        RankedArray(X), eps=eps, compare_to=compare_to, batch_size=70, executor_map=pool.map
                    )
                assert_same(got, want)
    assert n_disturbed > 10 * len(np.unique(X, axis=0)) ** 2 / 2


@pytest.mark.parametrize("dim", [3, 64, 384])
@pytest.mark.parametrize("spread", [0.1, 0.003, 1e-4, 1e-6])
def test_products_around_a_centre_are_off_by_less_than_is_said_and_that_is_little(dim, spread):
    X = blob(np.random.default_rng(11), 150, dim, spread)
    rows = similarity._Rows(X, rowwise_dot(X, X), np.arange(150))
    part = similarity._Centre.of(rows).part(X[:40], 0)
    exact = exact_cosines(X)[:40] - 1
    error = np.abs(part.products(X, 0) - exact).max(axis=1)
    assert (error < part.slack / 2).all()
    assert (part.slack <= 2 * product_error(dim) * np.maximum(4 * dim * spread**2, 1e-5)).all()
    low, high = similarity._Centre.of(rows).bounds(threshold(0.01))
    assert low + part.slack.max() / 2 < float(threshold(0.01)) - 1 - 2.0**-25
    assert high - part.slack.max() / 2 > float(threshold(0.01)) - 1 - 2.0**-24


def test_several_groups_of_almost_equal_rows_equal_brute_force(monkeypatch):
    """Not close to one centre: a float64 product tells which of many candidates are the best."""
    rng = np.random.default_rng(12)
    X = np.concatenate([blob(rng, 120, 32, 1e-4) for _ in range(3)])[rng.permutation(360)]
    thinned, original = [], similarity._thin

    def thin(near, *others):
        before = np.count_nonzero(near)
        original(near, *others)
        thinned.append((before, np.count_nonzero(near)))

    monkeypatch.setattr(similarity, "_thin", thin)
    for eps in (None, 0.3, 1e-7):
        for compare_to in ("kept", "ranked"):
            assert_same(match_ranked(RankedArray(X), eps=eps, compare_to=compare_to), brute_force(X, eps, compare_to))
    before, after = np.sum(thinned, axis=0)
    assert after < before / 5


@given(
    points=st.lists(st.sampled_from(range(24)), min_size=1, max_size=40),
    eps=st.sampled_from([1e-6, 0.005, 0.0340741737, 0.1, 0.3]),
    compare_to=st.sampled_from(["kept", "ranked"]),
    batch_size=st.integers(1, 41),
)
def test_points_on_a_circle_with_ties_everywhere_equal_brute_force(points, eps, compare_to, batch_size):
    angles = np.array(points) * np.pi / 12
    X, _ = normalize(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    got = match_ranked(RankedArray(X), eps=eps, compare_to=compare_to, batch_size=batch_size)
    assert_same(got, brute_force(X, eps, compare_to))


def test_rows_that_differ_by_less_than_float64_resolves_tie_with_identical_ones():
    X = np.zeros((6, 3), np.float32)
    X[:, 0] = 1
    X[1:, 1] = [1e-30, 0, 1e-30, 2e-30, 0]
    for compare_to in ("kept", "ranked"):
        got = match_ranked(RankedArray(X), eps=0.1, compare_to=compare_to)
        assert_same(got, brute_force(X, 0.1, compare_to))
        assert got.match.tolist() == [0] * 6
        assert got.score.tolist() == [0, 1, 1, 1, 1, 1]


def test_a_copy_of_a_removed_row_finds_the_kept_row_between_them():
    def at(degrees):
        return [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]

    # 12 is removed for 0; 22 is kept (too far from 0) and closer to 12 than 0 is.
    X, _ = normalize(np.array([at(0), at(12), at(22), at(12), at(12)]))
    eps = float(1 - np.cos(np.radians(15)))
    for elsewhere in (None, Elsewhere(eps, 2)):
        got = match_ranked(RankedArray(X), eps=eps, compare_to="kept", elsewhere=elsewhere)
        assert got.duplicate.tolist() == [False, True, False, True, True]
        assert got.kept_match.tolist() == [-1, 0, -1, 2, 2]
        assert got.match.tolist() == [0, 0, 1, 1, 1]
    assert len(elsewhere.between) == 1


def test_a_hundred_thousand_identical_rows_take_no_time():
    X, _ = normalize(np.random.default_rng(1).standard_normal((3, 8)))
    got = match_ranked(RankedArray(X, np.arange(100_000) % 3), eps=0.01)
    assert got.match[3:].tolist() == [k % 3 for k in range(3, 100_000)]
    assert (got.score[3:] == 1).all()
    assert np.count_nonzero(got.duplicate) == 100_000 - 3


@pytest.mark.parametrize("spread", [pytest.param(1e-4, marks=pytest.mark.slow), 0.01, 0.1])
def test_thousands_of_almost_equal_rows_take_little_memory(spread):
    """All pairs are within eps, and with the smallest spread no product tells which is the best."""
    n, dim = 5000, 16
    rng = np.random.default_rng(9)
    X, _ = normalize(1 + spread * rng.standard_normal((n, dim)))
    tracemalloc.start()
    got = match_ranked(RankedArray(X), eps=0.3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.flatnonzero(~got.duplicate).tolist() == [0]
    assert (got.kept_match[1:] == 0).all()
    assert peak < 40e6 < 4 * n * n / 2
    for i in rng.integers(1, n, 20).tolist():
        scores = rowwise_dot(X[:i], np.broadcast_to(X[i], (i, dim)))
        scores /= np.sqrt(rowwise_dot(X[: i + 1], X[: i + 1])[:i] * rowwise_dot(X[i : i + 1], X[i : i + 1]))
        assert got.match[i] == np.argmax(np.minimum(scores, 1))
        assert got.score[i] == np.float32(min(scores.max(), 1))


def test_rows_are_taken_in_the_given_order():
    rng = np.random.default_rng(2)
    X, order = clustered(rng, 80, 5), rng.permutation(80)
    assert_same(match_ranked(RankedArray(X, order), eps=0.02), match_ranked(RankedArray(X[order]), eps=0.02))


@pytest.mark.parametrize("compare_to", ["kept", "ranked"])
def test_rows_that_are_not_in_memory_give_the_same_answer(monkeypatch, compare_to):
    X = clustered(np.random.default_rng(3), 400, 6)
    monkeypatch.setattr(similarity, "_TILE_COLUMNS", 40)
    for read in (4 * 6 * 50, 16 << 20):
        monkeypatch.setattr(similarity, "_READ_BYTES", read)
        for eps in (None, 0.02):
            want = brute_force(X, eps, compare_to)
            for batch_size in (37, 150, 1000):
                with ThreadPoolExecutor(3) as pool:
                    for run in (None, pool.map):
                        got = match_ranked(
                            OnDisk(X), eps=eps, compare_to=compare_to, batch_size=batch_size, executor_map=run
                        )
                        assert_same(got, want)


def test_opposite_rows_score_minus_one_and_one_row_scores_zero():
    X = np.array([[1, 0], [-1, 0]], np.float32)
    assert match_ranked(RankedArray(X), eps=0.1).score.tolist() == [0, -1]
    one = match_ranked(RankedArray(X[:1]), eps=0.1)
    assert (one.score.tolist(), one.match.tolist(), one.duplicate.tolist()) == ([0], [0], [False])
    assert len(match_ranked(RankedArray(X[:0]), eps=0.1).score) == 0


def test_the_threshold_is_compared_in_float32():
    assert threshold(0.1) == np.float32(0.9)
    edge = threshold(0.1)
    assert is_duplicate([edge, np.nextafter(edge, np.float32(0)), np.nan], 0.1).tolist() == [
        True,
        False,
        False,
    ]
    assert is_duplicate(np.float64(edge) - 1e-12, 0.1)


def test_score_counts_are_those_of_ranked_duplicates():
    X = clustered(np.random.default_rng(4), 300, 6)
    score = match_ranked(RankedArray(X), eps=None).score
    counts = score_counts(score)
    assert len(counts) == len(EPS_GRID) == 14
    for eps, count in zip(EPS_GRID, counts, strict=True):
        ranked = match_ranked(RankedArray(X), eps=eps, compare_to="ranked")
        assert np.count_nonzero(ranked.duplicate) == count
        kept = match_ranked(RankedArray(X), eps=eps, compare_to="kept")
        assert np.count_nonzero(kept.duplicate) <= count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": 0.0}, "eps"),
        ({"eps": 1.0}, "eps"),
        ({"eps": 0.1, "compare_to": "all"}, "compare_to"),
        ({"eps": 0.1, "batch_size": 0}, "batch_size"),
    ],
)
def test_senseless_parameters_are_refused(arguments, message):
    with pytest.raises(ParameterError, match=message):
        match_ranked(RankedArray(np.eye(2, dtype=np.float32)), **arguments)


def test_rows_that_are_not_unit_vectors_are_refused():
    with pytest.raises(ParameterError, match="unit length"):
        match_ranked(RankedArray(np.full((2, 2), 1, np.float32)), eps=0.1)
