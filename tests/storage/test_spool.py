"""Vectors on the disk behave as they do in memory."""

import pickle

import numpy as np
import pytest

from untwin.core import RankedArray, match_ranked, normalize
from untwin.storage import spool
from untwin.storage.files import Storage
from untwin.storage.spool import RankedFile, SharedFile, VectorFile, scratch_folder


@pytest.fixture
def rows():
    X, _ = normalize(np.random.default_rng(0).normal(size=(101, 5)))
    return X


def filled(X, folder, step=17):
    file = VectorFile(str(folder), X.shape[1])
    for low in range(0, len(X), step):
        part = X[low : low + step]
        file.append(part, np.arange(low, low + len(part)) * 3)
    return file


def test_tiles_give_all_rows_in_order_with_their_positions(tmp_path, rows):
    with filled(rows, tmp_path) as file:
        assert file.n_rows == 101
        for size in (1, 7, 101, 500):
            tiles = list(file.tiles(size))
            assert max(len(X) for X, _ in tiles) <= size
            np.testing.assert_array_equal(np.concatenate([X for X, _ in tiles]), rows)
            np.testing.assert_array_equal(np.concatenate([p for _, p in tiles]), np.arange(101) * 3)
            assert all(X.flags.c_contiguous for X, _ in tiles)


def test_reading_and_writing_may_alternate(tmp_path, rows):
    with VectorFile(str(tmp_path), 5) as file:
        for at in range(20):
            file.append(rows[at : at + 1], np.array([at]))
            np.testing.assert_array_equal(file.take(np.array([at, 0])), rows[[at, 0]])
            X, positions = next(file.tiles(50))
            np.testing.assert_array_equal(X, rows[: at + 1])
            assert positions.tolist() == list(range(at + 1))


def test_take_gives_rows_in_the_order_asked_for(tmp_path, rows):
    rng = np.random.default_rng(1)
    with filled(rows, tmp_path) as file:
        for some in ([], [0], [100], [5, 4, 3], [7, 7, 8, 7], rng.permutation(101), rng.integers(0, 101, 300)):
            wanted = np.array(some, np.int64)
            np.testing.assert_array_equal(file.take(wanted), rows[wanted])


def test_a_ranked_file_is_a_ranked_array(tmp_path, rows):
    order = np.random.default_rng(2).permutation(101)
    with filled(rows, tmp_path) as file:
        on_disk, in_memory = RankedFile(file, order), RankedArray(rows, order)
        assert (on_disk.n, on_disk.dim) == (in_memory.n, in_memory.dim) == (101, 5)
        for low, high in ((0, 101), (3, 40), (100, 101), (0, 1)):
            np.testing.assert_array_equal(on_disk.take(low, high), in_memory.take(low, high))


@pytest.mark.parametrize("compare_to", ["kept", "ranked"])
def test_matching_from_the_disk_gives_the_same_bits(tmp_path, rows, compare_to):
    X = np.concatenate([rows, rows[::4], rows[::4]])
    order = np.random.default_rng(3).permutation(len(X))
    options = {"eps": 0.2, "compare_to": compare_to, "batch_size": 16}
    with filled(X, tmp_path) as file:
        disk = match_ranked(RankedFile(file, order), **options)
    memory = match_ranked(RankedArray(X, order), **options)
    for name in ("score", "match", "kept_score", "kept_match", "duplicate"):
        np.testing.assert_array_equal(getattr(disk, name), getattr(memory, name))
    assert memory.duplicate.sum() >= 52


def test_nothing_is_left_on_the_disk(tmp_path, rows):
    folder = scratch_folder(str(tmp_path / "_work"), remote=False)
    with filled(rows, folder):
        pass
    assert list((tmp_path / "_work").iterdir()) == []
    assert scratch_folder("s3://bucket/_work", remote=True) is None


@pytest.mark.parametrize("remote", [False, True])
def test_a_shared_file_gives_any_rows_by_reading_no_others(tmp_path, monkeypatch, rows, remote):
    monkeypatch.setattr(spool, "_PIECE_BYTES", 7 * 20)
    path = "memory://test-spool/rows" if remote else str(tmp_path / "folder/rows")
    file = pickle.loads(pickle.dumps(SharedFile(Storage(), path, 101, 5)))
    file.write(rows[low : low + 17] for low in range(0, 101, 17))
    assert Storage().stat(path).size == rows.nbytes
    read_range, read = Storage.read_range, []

    def noted(self, path, start, length):
        read.append((start, length))
        return read_range(self, path, start, length)

    monkeypatch.setattr(Storage, "read_range", noted)
    for low, high in ((0, 101), (3, 40), (100, 101), (94, 101), (0, 1), (5, 5)):
        read.clear()
        got = file.take(low, high)
        np.testing.assert_array_equal(got, rows[low:high])
        assert got.dtype == np.float32 and got.flags.c_contiguous
        assert sorted(read) == [(at * 20, (min(at + 7, high) - at) * 20) for at in range(low, high, 7)]
    Storage().remove(path)
