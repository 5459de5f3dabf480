"""Shards and the row sample: what was written comes back, by group and by block."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from untwin.errors import DamagedFileError, InputNotFoundError
from untwin.storage.columns import matrix_of
from untwin.storage.files import Recording, Storage
from untwin.storage.memory import Space, space
from untwin.storage.sample import SampleBlocks, read_hashes, sample_batch, write_sample
from untwin.storage.shards import Slices, leave_shard, make_shard, read_batch, write_shard

STORAGE = Storage()


def a_shard(rng, n_rows, group_of, *, clusters=None, prefix=""):
    """A shard with ids, lists and vectors, and its rows as a dictionary each, in the order of the input."""
    labels = rng.choice(clusters if clusters is not None else len(group_of), n_rows).astype(np.int32)
    vectors = rng.normal(size=(n_rows, 3)).astype(np.float32)
    side = pa.table(
        {
            "id": [f"{prefix}{at}" for at in range(n_rows)],
            "extra": pa.array([[at] * (at % 3) for at in range(n_rows)], pa.list_(pa.int64())),
            "kind": pa.array([f"kind {at % 2}" for at in range(n_rows)], pa.string()).dictionary_encode(),
        }
    )
    rows = [
        {**own, "_centroid": int(label), "_vector": vector.tolist()}
        for own, label, vector in zip(side.to_pylist(), labels, vectors, strict=True)
    ]
    return make_shard(side, vectors, labels, group_of, int(group_of[-1]) + 1), rows


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    n_groups=st.integers(1, 9),
    clusters=st.sets(st.integers(0, 17), min_size=1),
    held=st.sets(st.integers(0, 5)),
    seed=st.integers(0, 99),
)
def test_a_group_is_read_out_of_any_shards_in_files_or_in_memory(sizes, n_groups, clusters, held, seed):
    rng = np.random.default_rng(seed)
    group_of = np.sort(np.concatenate((np.arange(n_groups), rng.integers(0, n_groups, 18 - n_groups)))).astype(np.int32)
    room = Space(1 << 24)
    with tempfile.TemporaryDirectory() as folder, room.active():
        paths, rows = [], []
        for number, n_rows in enumerate(sizes):
            shard, own = a_shard(rng, n_rows, group_of, clusters=sorted(clusters), prefix=f"{number}-")
            paths.append(f"{folder}/{number}.arrow")
            if number in held:
                leave_shard(STORAGE, paths[-1], shard)
            else:
                write_shard(STORAGE, paths[-1], shard)
            rows.append(own)
        slices = Slices(tuple(paths), n_groups, f"{folder}/index")
        counts = slices.collect(STORAGE)
        for group in range(n_groups):
            wanted = [
                sorted((row for row in own if group_of[row["_centroid"]] == group), key=lambda row: row["_centroid"])
                for own in rows
            ]
            found = list(slices.rows(STORAGE, group))
            assert [len(part) for part in found] == [len(own) for own in wanted if own]
            assert counts[group] == sum(map(len, wanted))
            got = [
                {**own, "_centroid": int(label), "_vector": vector.tolist()}
                for part in found
                for own, label, vector in zip(part.columns.to_pylist(), part.labels, part.vectors[part.at], strict=True)
            ]
            assert got == [row for own in wanted for row in own]
            if not held:
                batches = list(slices.batches(STORAGE, group))
                assert [row for batch in batches for row in batch.to_pylist()] == got
        assert int(counts.sum()) == sum(sizes)


def test_a_slice_is_one_read_and_an_empty_one_none(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    group_of = np.arange(50, dtype=np.int32)
    paths = []
    for number in range(4):
        shard, _ = a_shard(rng, 40, group_of, clusters=[3, 4, 40 + number])
        paths.append(str(tmp_path / f"{number}.arrow"))
        write_shard(STORAGE, paths[-1], shard)
    slices = Slices(tuple(paths), 50, str(tmp_path / "index"))
    counts = slices.collect(STORAGE)
    reads = []
    read = Storage.read_ranges
    monkeypatch.setattr(Storage, "read_ranges", lambda self, ranges: reads.extend(ranges) or read(self, ranges))
    rows = sum(len(part) for group in (3, 10, 41) for part in slices.rows(STORAGE, group))
    assert rows == counts[[3, 10, 41]].sum()
    index, *parts = (path for path, _, _ in reads[:5])
    assert (index, parts) == (slices.index_path, paths)
    # group 10 has no rows: its line of the index is all that is read; group 41 has rows in one shard
    assert [path for path, _, _ in reads[5:]] == [slices.index_path, slices.index_path, paths[1]]
    assert sum(length for path, _, length in reads if path != slices.index_path) < sum(
        Path(path).stat().st_size for path in paths
    )


def test_a_shard_of_a_chunked_table_with_several_batches(tmp_path):
    side = pa.concat_tables([pa.table({"id": ["a", "b"]}), pa.table({"id": ["c"]})])
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    path = str(tmp_path / "x.arrow")
    labels, group_of = np.array([1, 0, 1], np.int32), np.array([0, 0], np.int32)
    write_shard(STORAGE, path, make_shard(side, vectors, labels, group_of, 1))
    slices = Slices((path,), 1, str(tmp_path / "index"))
    slices.collect(STORAGE)
    (batch,) = slices.batches(STORAGE, 0)
    assert batch.column("id").to_pylist() == ["b", "a", "c"]
    np.testing.assert_array_equal(matrix_of(batch.column("_vector")), vectors[[1, 0, 2]])


def test_a_shard_in_memory_reads_like_one_in_a_file_and_its_unit_says_so(tmp_path):
    rng = np.random.default_rng(3)
    group_of = np.array([0, 0, 1, 1, 2], np.int32)
    shard, _ = a_shard(rng, 60, group_of)
    paths = {name: str(tmp_path / "shards" / name) for name in ("held", "written")}
    for name, limit in (("held", 1 << 20), ("written", shard.n_bytes - 1)):
        recording, room = Recording(), Space(limit)
        slices = Slices((paths[name],), 3, str(tmp_path / "index"))
        with recording.active(), room.active():
            leave_shard(STORAGE, paths[name], shard)
            assert slices.collect(STORAGE).tolist() == np.diff(shard.bounds).tolist()
            groups = [part for number in range(3) for part in slices.rows(STORAGE, number)]
        assert recording.complete == (name == "written")
        assert (tmp_path / "shards" / name).exists() == (name == "written")
        assert sum(len(group) for group in groups) == 60
        for number, group in enumerate(groups):
            expected = shard.group(number)
            assert group.columns.equals(expected.columns)
            np.testing.assert_array_equal(group.labels, expected.labels)
            np.testing.assert_array_equal(group.vectors[group.at], shard.vectors[expected.at])
            some = group.take(np.arange(0, len(group), 2))
            out = np.zeros((len(group), 3), np.float32)
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


@pytest.mark.parametrize("damage", ["other bytes", "cut off", "empty", "gone", "no starts", "starts cut off"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    shard, _ = a_shard(np.random.default_rng(2), 50, np.arange(4, dtype=np.int32))
    paths = [tmp_path / f"{number}.arrow" for number in range(3)]
    for path in paths:
        write_shard(STORAGE, str(path), shard)
    slices = Slices(tuple(map(str, paths)), 4, str(tmp_path / "index"))
    starts = tmp_path / "1.starts"
    if damage in ("no starts", "starts cut off"):
        starts.unlink() if damage == "no starts" else starts.write_bytes(starts.read_bytes()[:-1])
        with pytest.raises((DamagedFileError, InputNotFoundError), match=r"1\.starts: (cannot be read|not found)"):
            slices.collect(STORAGE)
        return
    slices.collect(STORAGE)
    whole = paths[1].read_bytes()
    if damage == "gone":
        paths[1].unlink()
    else:
        content = {"other bytes": b"x" * len(whole), "cut off": whole[: len(whole) - 100], "empty": b""}
        paths[1].write_bytes(content[damage])
    rows = slices.rows(STORAGE, 3)
    assert len(next(rows))
    with pytest.raises((DamagedFileError, InputNotFoundError), match=r"1\.arrow: (cannot be read|not found)"):
        next(rows)


def test_a_damaged_part_of_the_sample_is_named(tmp_path):
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
