"""Shards and the row sample: what was written comes back, by group and by block."""

import numpy as np
import pyarrow as pa
import pytest

from untwin.errors import DamagedFileError
from untwin.storage.columns import matrix_of
from untwin.storage.files import Recording, Storage
from untwin.storage.memory import Space, space
from untwin.storage.sample import SampleBlocks, read_hashes, sample_batch, write_sample
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


def test_sample_blocks_are_the_rows_of_the_wanted_length_with_small_hashes(tmp_path):
    rng = np.random.default_rng(1)
    parts, hashes, vectors = [], [], []
    for number in range(3):
        batches = []
        for dim, n in ((4, 10), (3, 5), (4, 1)):
            some = rng.integers(0, 2**63, n).astype(np.uint64) * np.uint64(2)
            X = rng.normal(size=(n, dim)).astype(np.float32)
            batches.append(sample_batch(some, X))
            if dim == 4:
                hashes.append(some)
                vectors.append(X)
        path = str(tmp_path / f"{number}.arrow")
        write_sample(STORAGE, path, batches)
        parts.append((path, len(batches)))
        read, lengths = read_hashes(STORAGE, path, len(batches))
        assert len(read) == 16
        assert lengths.tolist() == [4] * 10 + [3] * 5 + [4]
    hashes, vectors = np.concatenate(hashes), np.concatenate(vectors)
    highest = int(np.sort(hashes)[20])
    chosen = hashes <= highest
    blocks = SampleBlocks(STORAGE, parts, 4, highest, int(chosen.sum()))
    assert (len(blocks), blocks.dim, blocks.n_rows) == (9, 4, 21)
    read = [blocks.block(index) for index in range(len(blocks))]
    np.testing.assert_array_equal(np.concatenate([X for X, _ in read]), vectors[chosen])
    np.testing.assert_array_equal(np.concatenate([h for _, h in read]), hashes[chosen])
    assert all(X.flags.c_contiguous and X.dtype == np.float32 for X, _ in read)


def test_an_empty_part_of_the_sample_has_no_hashes(tmp_path):
    path = str(tmp_path / "x.arrow")
    write_sample(STORAGE, path, [])
    hashes, lengths = read_hashes(STORAGE, path, 0)
    assert len(hashes) == len(lengths) == 0
