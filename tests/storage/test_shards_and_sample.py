"""Shards and the row sample: what was written comes back, by group and by block."""

import io
import pickle

import numpy as np
import pyarrow as pa
import pytest

from untwin.errors import DamagedFileError
from untwin.storage.columns import matrix_of
from untwin.storage.files import Recording, Storage
from untwin.storage.memory import Space, space
from untwin.storage.sample import SampleBlocks, read_hashes, sample_batches, write_sample
from untwin.storage.shards import leave_shard, make_shard, read_batch, read_group, write_shard

STORAGE = Storage()


def test_a_group_holds_the_rows_of_its_clusters_from_every_shard_in_order(tmp_path):
    rng = np.random.default_rng(0)
    group_of = np.array([0, 0, 1, 1, 1, 2, 3], np.int32)
    rows = []
    paths = []
    for number, n in enumerate((40, 1, 25)):
        labels = rng.choice([0, 1, 2, 4, 6], n).astype(np.int32)  # groups 2 has no row
        vectors = rng.normal(size=(n, 3)).astype(np.float32)
        ids = [f"{number}-{at}" for at in range(n)]
        side = pa.table({"id": ids, "extra": pa.array([[at] for at in range(n)])})
        paths.append(str(tmp_path / f"{number}.arrow"))
        write_shard(STORAGE, paths[-1], make_shard(side, vectors, labels, group_of, 4))
        rows += [
            {"id": own, "extra": [at], "label": int(label), "vector": vector.tolist()}
            for at, (own, label, vector) in enumerate(zip(ids, labels, vectors, strict=True))
        ]
    n_seen = 0
    for group in range(4):
        batches = [read_batch(STORAGE, path, group) for path in paths]
        assert len(batches) == 3
        for number, batch in enumerate(batches):
            assert batch.schema.names == ["id", "extra", "_centroid", "_vector"]
            wanted = [row for row in rows if group_of[row["label"]] == group and row["id"].startswith(f"{number}-")]
            wanted.sort(key=lambda row: row["label"])  # stable: the order of the input inside a cluster
            got = batch.to_pylist()
            assert [(row["id"], row["extra"], row["_centroid"], row["_vector"]) for row in got] == [
                (row["id"], row["extra"], row["label"], row["vector"]) for row in wanted
            ]
            n_seen += len(got)
    assert n_seen == 66


def test_a_shard_of_a_chunked_table_with_several_batches(tmp_path):
    side = pa.concat_tables([pa.table({"id": ["a", "b"]}), pa.table({"id": ["c"]})])
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    path = str(tmp_path / "x.arrow")
    labels, group_of = np.array([1, 0, 1], np.int32), np.array([0, 0], np.int32)
    write_shard(STORAGE, path, make_shard(side, vectors, labels, group_of, 1))
    batch = read_batch(STORAGE, path, 0)
    assert batch.column("id").to_pylist() == ["b", "a", "c"]
    np.testing.assert_array_equal(matrix_of(batch.column("_vector")), vectors[[1, 0, 2]])


def test_a_shard_in_memory_reads_like_one_in_a_file_and_its_unit_says_so(tmp_path):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 5, 60).astype(np.int32)
    vectors = rng.normal(size=(60, 4)).astype(np.float32)
    shard = make_shard(
        pa.table({"id": [str(at) for at in range(60)]}), vectors, labels, np.array([0, 0, 1, 1, 2], np.int32), 3
    )
    paths = {name: str(tmp_path / "shards" / name) for name in ("held", "written")}
    for name, limit in (("held", 1 << 20), ("written", shard.n_bytes - 1)):
        recording, room = Recording(), Space(limit)
        with recording.active(), room.active():
            leave_shard(STORAGE, paths[name], shard)
            groups = [read_group(STORAGE, paths[name], number) for number in range(3)]
        assert recording.complete == (name == "written")
        assert (tmp_path / "shards" / name).exists() == (name == "written")
        assert sum(len(group) for group in groups) == 60
        for number, group in enumerate(groups):
            expected = shard.group(number)
            assert group.columns.equals(expected.columns)
            np.testing.assert_array_equal(group.labels, expected.labels)
            np.testing.assert_array_equal(group.vectors[group.at], vectors[expected.at])
            some = group.take(np.arange(0, len(group), 2))
            out = np.zeros((len(group), 4), np.float32)
            some.copy_vectors(out, np.arange(len(some))[::-1].copy())
            np.testing.assert_array_equal(out[: len(some)][::-1], group.vectors[group.at][::2])
        with room.active():
            STORAGE.remove(str(tmp_path / "shards"))
        assert room.used == 0


def test_a_space_never_holds_more_than_its_limit():
    room = Space(100)
    assert room.put("a/1", "x", 60)
    assert not room.put("a/2", "y", 41)
    assert room.get("a/2") is None
    assert room.put("a/2", "y", 90, instead_of="a/1")
    assert (room.get("a/1"), room.get("a/2"), room.used) == (None, "y", 90)
    assert not room.put("a/2", "z", 101)  # and what was there is gone, too: it stands for other rows
    assert room.get("a/2") is None
    assert room.put("ab", "stays", 10)
    assert room.put("a/b/c", "goes", 10)
    room.drop("a")
    assert (room.get("ab"), room.get("a/b/c"), room.used) == ("stays", None, 10)
    assert not space().put("anything", "outside of a run", 1)


def test_a_damaged_shard_is_named(tmp_path):
    path = tmp_path / "x.arrow"
    path.write_bytes(b"ARROW1 and then nothing of use")
    with pytest.raises(DamagedFileError, match=r"x\.arrow: cannot be read"):
        read_batch(STORAGE, str(path), 0)


def sample_parts(folder, rng, sizes):
    """Files with `(dim, rows)` each; returns their paths, and the hashes and vectors of each length."""
    paths, rows = [], {}
    for number, part in enumerate(sizes):
        batches = []
        for dim, n in part:
            hashes = rng.integers(0, 2**63, n).astype(np.uint64) * np.uint64(2)
            X = rng.normal(size=(n, dim)).astype(np.float32)
            cuts = np.sort(rng.integers(0, n + 1, 2))
            pieces = zip(np.split(hashes, cuts), np.split(X, cuts), strict=True)
            batches += sample_batches(list(pieces), 7)
            rows.setdefault(dim, []).append((hashes, X))
        paths.append(str(folder / f"{number}.arrow"))
        write_sample(STORAGE, paths[-1], batches)
    return paths, {dim: tuple(map(np.concatenate, zip(*some, strict=True))) for dim, some in rows.items()}


def test_a_part_of_the_sample_holds_its_rows_in_the_order_of_their_hashes(tmp_path):
    (path,), rows = sample_parts(tmp_path, np.random.default_rng(2), [[(4, 50), (3, 8)]])
    found = read_hashes(STORAGE, path)
    assert [dim for dim, _ in found] == [4] * 8 + [3] * 2
    assert max(len(hashes) for _, hashes in found) == 7
    for dim, (hashes, _) in rows.items():
        read = np.concatenate([some for length, some in found if length == dim])
        np.testing.assert_array_equal(read, np.sort(hashes))


def test_hashes_are_read_without_the_vectors(tmp_path):
    X = np.zeros((4000, 300), np.float32)
    path = tmp_path / "x.arrow"
    write_sample(STORAGE, str(path), sample_batches([(np.arange(4000, dtype=np.uint64), X)], 1000))
    reads = []

    class CountedFile(io.FileIO):
        def read(self, size=-1):
            reads.append(size)
            return super().read(size)

    class Counted(Storage):
        def open(self, path):
            return pa.PythonFile(CountedFile(path), mode="r")

    found = read_hashes(Counted(), str(path))
    assert sum(len(hashes) for _, hashes in found) == 4000
    assert min(reads) >= 0
    assert sum(reads) < 100_000 < X.nbytes < path.stat().st_size


def test_sample_blocks_are_the_rows_of_the_wanted_length_with_small_hashes(tmp_path):
    paths, rows = sample_parts(tmp_path, np.random.default_rng(1), [[(4, 30), (3, 5)], [(3, 9)], [(4, 41)]])
    hashes, vectors = rows[4]
    highest = np.sort(hashes)[40]
    found = [read_hashes(STORAGE, path) for path in paths]
    n_rows = [[int((some <= highest).sum()) if dim == 4 else 0 for dim, some in part] for part in found]
    blocks = pickle.loads(pickle.dumps(SampleBlocks(STORAGE, paths, n_rows, 4, 15)))
    assert (blocks.dim, blocks.n_rows) == (4, 41)
    assert max(blocks.count(index) for index in range(len(blocks))) <= 15
    read = [blocks.block(index) for index in range(len(blocks))]
    chosen = np.flatnonzero(hashes <= highest)
    # parts in their order, and by hash inside
    part_of = np.repeat([0, 1], [30, 41])
    chosen = chosen[np.lexsort((hashes[chosen], part_of[chosen]))]
    np.testing.assert_array_equal(np.concatenate([X for X, _ in read]), vectors[chosen])
    np.testing.assert_array_equal(np.concatenate([h for _, h in read]), hashes[chosen])
    for index, (X, h) in enumerate(read):
        assert len(X) == blocks.count(index) > 0
        assert X.flags.c_contiguous
        assert X.dtype == np.float32
        for start in range(len(X)):
            for stop in (start, start + 1, len(X), None):
                some, some_hashes = blocks.block(index, start, stop)
                np.testing.assert_array_equal(some, X[start:stop])
                np.testing.assert_array_equal(some_hashes, h[start:stop])


def test_an_empty_part_of_the_sample_has_no_hashes(tmp_path):
    path = str(tmp_path / "x.arrow")
    write_sample(STORAGE, path, [])
    assert read_hashes(STORAGE, path) == []
    assert len(SampleBlocks(STORAGE, [path], [[]], 4, 15)) == 0
