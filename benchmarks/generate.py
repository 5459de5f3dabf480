"""Writes data sets of realistic embeddings with planted near-duplicates, of any number of rows, as a stream.

Every number comes from a counter hashed with the seed, never from the state of a random generator, so any row
can be made by itself: memory is bounded, and the same --rows, --dim, --seed and --share give the same rows,
ids and order in every layout. (The last bits of a vector may differ between machines: a matrix product is
part of it.)

    python benchmarks/generate.py OUT --rows 1000000 --dim 384 --layout zstd --seed 0 --files 10

What the vectors look like. A row is a common mean, plus the centre of its topic, plus its own noise, scaled
to length 1. Topics have sizes as in Zipf's law and differ in how tight they are. The variance of the
dimensions decays as a power, and a random rotation makes all of them correlated. A --share (30 %) of the rows
are near-duplicates: each is made from an earlier row of its group with a chosen cosine similarity between 0.7
and 1, and about one in ten is a bit-identical copy. Groups have 2 to 2,000 rows, mostly few. In a quarter of
the groups the third and later rows are made from the second instead of the first, so that there are chains
A~B~C too. Rows are in pseudo-random order: the rows of a group are spread over all files.

Layouts:
  plain     --files large files, float32 fixed_size_list, not compressed, no dictionary; also `duration`
  zstd      --files large files, float32 list, zstd; also `duration`
  float16   --files large files, float16 fixed_size_list, zstd
  upstream  as the pandas writers of NeMo Curator and Cosmos Curate do: a file of 26 rows per piece of work,
            list<double>, snappy, dictionary encoding, large_string ids, pandas metadata, <uuid>.parquet

With --tile the rows are those of other Parquet files (columns `id` and `embedding`), again and again until there are
--rows of them: first as they are, then as "ID~1", "ID~2" and so on, each row with noise of its own, so that its cosine
similarity to the original lies anywhere between 0.7 and 1. --tile without a PATH takes debian-packages: the folder that
the environment variable UNTWIN_DEBIAN_PACKAGES names, else the sample in the repository.

With --scenes the rows are like frames of so many cameras that do not move: each is the vector of a scene, which is
random, but for noise after which its cosine similarity to that is between 0.999 and 0.99999.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

LAYOUTS = ("plain", "zstd", "float16", "upstream")
UPSTREAM_ROWS_PER_FILE = 26
# Raise it with every change of the rows or the layouts, so that older data are not taken for new ones.
VERSION = 1

_BLOCK = 8192  # rows made at once: vectors are always computed in these blocks, so layouts agree to the last bit
_CACHE_ROWS = 1024  # rows of noise made at once: small enough for a processor's cache
_ROW_GROUP_BLOCKS = 4

_SPECTRUM_DECAY = 0.4  # standard deviation of dimension j is (j + 1) ** -decay
_MEAN_ENERGY = 0.12
_LOOSEST_TOPIC, _TIGHTEST_TOPIC = 0.20, 0.55
_LARGEST_GROUP = 2000
_GROUP_SIZE_EXPONENT = 2.3
_IDENTICAL = 0.1
_CHAINED_GROUPS = 0.25
_GROUPS_WITH_IDENTICAL = 0.2  # identical copies come in these groups only, in half of the copies there
_FARTHEST, _NEAREST = 0.3, 1e-5  # 1 - cosine of planted copies that are not identical
_FARTHEST_FRAME = 1e-3

# One number for each independent stream of hashes.
_SHUFFLE, _ID, _NAME, _DURATION, _TOPIC, _CENTRE, _TIGHTNESS, _MEAN, _ROTATION, _SIZE = range(10)
_BASE, _COPY, _WIDTH, _KIND, _CHAINED, _HAS_IDENTICAL = range(10, 16)
_TILE_NOISE, _TILE_WIDTH, _SCENE = range(16, 19)

_SAMPLE = Path(__file__).parents[1] / "examples" / "data" / "debian-packages-sample.parquet"

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _hash(stream: int, seed: int, counter: np.ndarray) -> np.ndarray:
    """64 hashed bits for each counter (the finaliser of SplitMix64, a bijection of the counter).

    Source: Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with the
    constants of Stafford's variant 13.
    """
    key = np.uint64((seed * 0xD1342543DE82EF95 + stream * 0xA0761D6478BD642F + 0x632BE59BD9B4E019) % 2**64)
    x = (np.asarray(counter, dtype=np.uint64) + np.uint64(1)) * _GOLDEN ^ key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def _uniform(stream: int, seed: int, counter: np.ndarray) -> np.ndarray:
    """Float64 in [0, 1) for each counter."""
    return (_hash(stream, seed, counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _noise(stream: int, seed: int, counter: np.ndarray, dim: int) -> np.ndarray:
    """Float32 array (len(counter), dim) of independent values, mean 0, variance 1, uniformly distributed.

    Rotated afterwards, so that each dimension is a sum over many values and its distribution nearly normal.
    Each 32-bit hash gives two values ("lowbias32" by Chris Wellons, with the row's second key mixed in).
    """
    keys = _hash(stream, seed, counter)
    low, high = keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)
    words = (dim + 1) // 2
    steps = np.arange(words, dtype=np.uint32) * np.uint32(0x9E3779B9)
    scale = np.float32(math.sqrt(12.0) / 2**16)
    out = np.empty((len(keys), dim), dtype=np.float32)
    x = np.empty((min(_CACHE_ROWS, max(1, len(keys))), words), dtype=np.uint32)
    shifted = np.empty_like(x)
    for start in range(0, len(keys), _CACHE_ROWS):
        stop = min(start + _CACHE_ROWS, len(keys))
        h, t = x[: stop - start], shifted[: stop - start]
        np.add(low[start:stop, None], steps, out=h)
        np.bitwise_xor(h, np.right_shift(h, 16, out=t), out=h)
        np.multiply(h, np.uint32(0x7FEB352D), out=h)
        np.bitwise_xor(h, high[start:stop, None], out=h)
        np.bitwise_xor(h, np.right_shift(h, 15, out=t), out=h)
        np.multiply(h, np.uint32(0x846CA68B), out=h)
        np.bitwise_xor(h, np.right_shift(h, 16, out=t), out=h)
        np.multiply(h.view(np.int16)[:, :dim], scale, out=out[start:stop])
    return out


def _uuids(stream: int, seed: int, counter: np.ndarray) -> pa.Array:
    """Strings that look like random (version 4) uuids, one for each counter."""
    counter = np.asarray(counter, dtype=np.uint64)
    two = np.stack([_hash(stream, seed, 2 * counter), _hash(stream, seed, 2 * counter + np.uint64(1))], axis=1)
    octets = two.astype(">u8").view(np.uint8).reshape(len(counter), 16)
    octets[:, 6] = (octets[:, 6] & 0x0F) | 0x40
    octets[:, 8] = (octets[:, 8] & 0x3F) | 0x80
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    hexadecimal = np.stack([digits[octets >> 4], digits[octets & 15]], axis=2).reshape(len(counter), 32)
    text = np.full((len(counter), 36), ord("-"), dtype=np.uint8)
    for source, target, length in ((0, 0, 8), (8, 9, 4), (12, 14, 4), (16, 19, 4), (20, 24, 12)):
        text[:, target : target + length] = hexadecimal[:, source : source + length]
    offsets = np.arange(len(counter) + 1, dtype=np.int32) * 36
    return pa.StringArray.from_buffers(len(counter), pa.py_buffer(offsets), pa.py_buffer(text.tobytes()))


class _Shuffle:
    """A pseudo-random permutation of range(n) that needs no memory: a Feistel network with cycle walking."""

    def __init__(self, n: int, seed: int) -> None:
        self._n, self._seed = n, seed
        self._half_bits = max(1, (max(n - 1, 1).bit_length() + 1) // 2)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        values = self._once(rows.astype(np.uint64))
        while (outside := values >= self._n).any():
            values[outside] = self._once(values[outside])
        return values.astype(np.int64)

    def _once(self, values: np.ndarray) -> np.ndarray:
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for turn in range(4):
            mixed = _hash(_SHUFFLE, self._seed, (np.uint64(turn) << np.uint64(32)) | right)
            left, right = right, left ^ (mixed & mask)
        return (left << bits) | right


@dataclass(frozen=True)
class Block:
    """Rows `start` to `start + len(vectors)` of a data set.

    `vectors` is float32 (rows, dim) of unit length, `ids` strings, `duration` float32 seconds. `group`
    (int64) is the planted group or -1; `similarity` (float64) is the cosine similarity with which a planted
    row was made from an earlier row of its group, 1 for the first of a group, and NaN outside of groups.
    """

    start: int
    ids: pa.Array
    vectors: np.ndarray
    duration: np.ndarray
    group: np.ndarray
    similarity: np.ndarray


class Rows:
    """The rows of one data set: a pure function of (rows, dim, seed, planted)."""

    def __init__(self, rows: int, dim: int, seed: int = 0, planted: float = 0.3) -> None:
        """Draw what all rows share: group sizes, topics, the mean and the rotation.

        `planted` in [0, 0.9] is the share of rows that are made from another row.
        """
        if rows < 1 or dim < 2 or not 0 <= planted <= 0.9:
            raise ValueError("rows must be at least 1, dim at least 2, planted between 0 and 0.9")
        self.rows, self.dim, self.seed = rows, dim, seed
        self._shuffle = _Shuffle(rows, seed)
        self._group_starts = self._draw_groups(planted)
        self.planted_groups = len(self._group_starts) - 1

        # Variance 1 in all over the dimensions, so that a random vector has a length of about 1.
        spectrum = np.arange(1, dim + 1, dtype=np.float64) ** -_SPECTRUM_DECAY
        self._spectrum = (spectrum / np.sqrt((spectrum**2).sum())).astype(np.float32)
        n_topics = int(min(20_000, max(8, math.sqrt(rows))))
        weights = 1.0 / np.arange(1, n_topics + 1)
        self._topic_edges = np.cumsum(weights / weights.sum())
        self._topic_edges[-1] = 1.0
        topics = np.arange(n_topics)
        centres = _unit(_noise(_CENTRE, seed, topics, dim) * self._spectrum)
        tightness = _LOOSEST_TOPIC + (_TIGHTEST_TOPIC - _LOOSEST_TOPIC) * _uniform(_TIGHTNESS, seed, topics)
        mean = _unit(_noise(_MEAN, seed, np.zeros(1), dim) * self._spectrum)
        self._places = (math.sqrt(_MEAN_ENERGY) * mean + np.sqrt(tightness)[:, None] * centres).astype(np.float32)
        self._own = np.sqrt(1 - _MEAN_ENERGY - tightness).astype(np.float32)
        square = _noise(_ROTATION, seed, np.arange(4 * dim), dim).reshape(4, dim, dim).sum(axis=0)
        self._rotation = np.linalg.qr(square.astype(np.float64))[0].astype(np.float32)

    def _draw_groups(self, planted: float) -> np.ndarray:
        """First position of each planted group, and as last element the end of all groups."""
        copies = round(self.rows * planted)
        if copies == 0:
            return np.zeros(1, dtype=np.int64)
        largest = int(min(_LARGEST_GROUP, max(2, self.rows // 50)))
        sizes = np.arange(2, largest + 1)
        edges = np.cumsum(sizes.astype(np.float64) ** -_GROUP_SIZE_EXPONENT)
        drawn = np.empty(0, dtype=np.int64)
        while (drawn - 1).sum() < copies:
            more = _uniform(_SIZE, self.seed, np.arange(len(drawn), len(drawn) + 65_536)) * edges[-1]
            drawn = np.concatenate([drawn, sizes[np.searchsorted(edges[:-1], more, side="right")]])
        # The last group is cut so that the number of copies comes out exactly.
        total = np.cumsum(drawn - 1)
        groups = int(np.searchsorted(total, copies)) + 1
        drawn = drawn[:groups]
        drawn[-1] -= total[groups - 1] - copies
        # Copies are at most 90 % of rows but groups also hold their first rows: keep those that fit.
        ends = np.cumsum(drawn)
        return np.concatenate([[0], ends[ends <= self.rows]])

    def blocks(self) -> Iterator[Block]:
        """All rows in order, in blocks of equal size but the last."""
        for start in range(0, self.rows, _BLOCK):
            yield self._block(start, min(start + _BLOCK, self.rows))

    def _block(self, start: int, stop: int) -> Block:
        row = np.arange(start, stop)
        position = self._shuffle(row)
        n_groups, end = self.planted_groups, int(self._group_starts[-1])
        grouped = position < end
        group = np.searchsorted(self._group_starts, position, side="right") - 1
        # Rows outside of groups continue the numbering as groups of one.
        base = np.where(grouped, group, n_groups + position - end)
        member = np.where(grouped, position - self._group_starts[np.minimum(group, n_groups)], 0)

        topic = np.searchsorted(self._topic_edges, _uniform(_TOPIC, self.seed, base), side="right")
        latent = _noise(_BASE, self.seed, base, self.dim)
        latent *= self._spectrum
        latent *= self._own[topic][:, None]
        latent += self._places[topic]
        latent = _unit(latent)

        # A copy is made from the first row of its group, or in chained groups from the second.
        chained = _uniform(_CHAINED, self.seed, base) < _CHAINED_GROUPS
        with_identical = _uniform(_HAS_IDENTICAL, self.seed, base) < _GROUPS_WITH_IDENTICAL
        similarity = np.ones(len(row))
        through_second = np.flatnonzero(chained & (member >= 2))
        self._copy(latent, through_second, position[through_second] - member[through_second] + 1, with_identical)
        copies = np.flatnonzero(member >= 1)
        similarity[copies] = self._copy(latent, copies, position[copies], with_identical)

        # A matrix product's last bits depend on where in the block a row is. Rows that have to come out
        # identical are multiplied one by one.
        vectors = latent @ self._rotation
        alone = np.flatnonzero(with_identical & grouped)
        if len(alone):
            vectors[alone] = np.matmul(latent[alone][:, None, :], self._rotation)[:, 0, :]
        return Block(
            start=start,
            ids=_uuids(_ID, self.seed, row),
            vectors=vectors,
            duration=_durations(self.seed, row),
            group=np.where(grouped, group, -1),
            similarity=np.where(grouped, similarity, np.nan),
        )

    def _copy(self, latent: np.ndarray, where: np.ndarray, key: np.ndarray, with_identical: np.ndarray) -> np.ndarray:
        """Replace rows `where` of `latent` by copies, each given by its `key`; return their similarities."""
        kind = _uniform(_KIND, self.seed, key)
        width = _uniform(_WIDTH, self.seed, key)
        # Half of the distances evenly spread over their logarithm (many very near), half over themselves.
        near = _NEAREST * (_FARTHEST / _NEAREST) ** width
        distance = np.where(kind < 0.5, near, _NEAREST + (_FARTHEST - _NEAREST) * width)
        share = _IDENTICAL / _GROUPS_WITH_IDENTICAL
        identical = with_identical[where] & (_uniform(_KIND, self.seed + 1, key) < share)
        cosine = np.where(identical, 1.0, 1.0 - distance)
        changed = np.flatnonzero(~identical)
        original = latent[where[changed]]
        noise = _noise(_COPY, self.seed, key[changed], self.dim)
        noise *= self._spectrum
        latent[where[changed]] = _turned(original, noise, cosine[changed])
        return cosine


class Tiles:
    """The rows of other files again and again, with noise: a pure function of (rows, files, seed).

    Memory holds the vectors of the files, and a block.
    """

    def __init__(self, rows: int, path: Path, seed: int = 0) -> None:
        """Read the files: one, or all `*.parquet` of a folder."""
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        table = pyarrow.dataset.dataset(list(map(str, files)), format="parquet").to_table(["id", "embedding"])
        self._ids = table["id"].cast(pa.string()).combine_chunks()
        values = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        self._X = _unit(values.reshape(len(table), -1).astype(np.float32))
        self.rows, self.dim, self.seed = rows, self._X.shape[1], seed
        self.planted_groups = max(0, min(len(table), rows - len(table)))

    def blocks(self) -> Iterator[Block]:
        """All rows in order, in blocks of equal size but the last; `group` is the place of the original."""
        for start in range(0, self.rows, _BLOCK):
            row = np.arange(start, min(start + _BLOCK, self.rows))
            tile, original = np.divmod(row, len(self._X))
            copies = np.flatnonzero(tile)
            cosine = 1 - _FARTHEST * np.where(tile == 0, 0.0, _uniform(_TILE_WIDTH, self.seed, row))
            vectors = self._X[original]
            noise = _noise(_TILE_NOISE, self.seed, row[copies], self.dim)
            vectors[copies] = _turned(vectors[copies], noise, cosine[copies])
            ids = self._ids.take(pa.array(original))
            numbered = pc.binary_join_element_wise(ids, pa.array(tile).cast(pa.string()), "~")
            yield Block(
                start=start,
                ids=pc.if_else(pa.array(tile == 0), ids, numbered),
                vectors=vectors,
                duration=_durations(self.seed, row),
                group=np.where(original < self.planted_groups, original, -1),
                similarity=cosine,
            )


class Scenes:
    """Rows that are hardly different from one of a few vectors: a pure function of (rows, dim, scenes, seed)."""

    def __init__(self, rows: int, dim: int, scenes: int, seed: int = 0) -> None:
        """Draw the vectors of the scenes."""
        if scenes < 1:
            raise ValueError("scenes must be at least 1")
        self.rows, self.dim, self.seed, self.planted_groups = rows, dim, seed, scenes
        self._X = _unit(_noise(_CENTRE, seed, np.arange(scenes), dim))

    def blocks(self) -> Iterator[Block]:
        """All rows in order, in blocks of equal size but the last; `group` is the scene."""
        for start in range(0, self.rows, _BLOCK):
            row = np.arange(start, min(start + _BLOCK, self.rows))
            scene = (_hash(_SCENE, self.seed, row) % np.uint64(len(self._X))).astype(np.int64)
            width = _uniform(_TILE_WIDTH, self.seed, row)
            cosine = 1 - _NEAREST * (_FARTHEST_FRAME / _NEAREST) ** width
            yield Block(
                start=start,
                ids=_uuids(_ID, self.seed, row),
                vectors=_turned(self._X[scene], _noise(_TILE_NOISE, self.seed, row, self.dim), cosine),
                duration=_durations(self.seed, row),
                group=scene,
                similarity=cosine,
            )


def _durations(seed: int, row: np.ndarray) -> np.ndarray:
    """Float32 seconds, at least 2 and at most 60."""
    return np.minimum(2.0 - 8.0 * np.log1p(-_uniform(_DURATION, seed, row)), 60.0).astype(np.float32)


def _turned(X: np.ndarray, noise: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Turn unit rows X towards the noise, to the given cosine similarity with themselves; both are overwritten."""
    noise -= np.einsum("ij,ij->i", noise, X)[:, None] * X
    noise = _unit(noise)
    X *= cosine.astype(np.float32)[:, None]
    noise *= np.sqrt((1 - cosine) * (1 + cosine)).astype(np.float32)[:, None]
    X += noise
    return X


def _unit(X: np.ndarray) -> np.ndarray:
    """Scale the rows of X to length 1, in place."""
    X /= np.sqrt(np.einsum("ij,ij->i", X, X))[:, None]
    return X


AnyRows = Rows | Tiles | Scenes


def _list_array(vectors: np.ndarray, values: pa.DataType, fixed: bool) -> pa.Array:
    n, dim = vectors.shape
    flat = pa.array(vectors.reshape(-1), type=values)
    if fixed:
        return pa.FixedSizeListArray.from_arrays(flat, dim)
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * dim), flat)


def _large_table(block: Block, layout: str) -> pa.Table:
    if layout == "float16":
        vectors = _list_array(block.vectors.astype(np.float16), pa.float16(), fixed=True)
        return pa.table({"id": block.ids, "embedding": vectors})
    vectors = _list_array(block.vectors, pa.float32(), fixed=layout == "plain")
    return pa.table({"id": block.ids, "embedding": vectors, "duration": pa.array(block.duration)})


def _cut(tables: Iterator[pa.Table], sizes: Iterator[int]) -> Iterator[pa.Table]:
    """Cut a stream of tables into a stream of tables of the given numbers of rows."""
    waiting: list[pa.Table] = []
    available = 0
    for size in sizes:
        while available < size:
            waiting.append(next(tables))
            available += waiting[-1].num_rows
        taken, missing = [], size
        while missing:
            head = waiting[0]
            taken.append(head.slice(0, missing))
            if head.num_rows > missing:
                waiting[0] = head.slice(missing)
            else:
                waiting.pop(0)
            missing -= taken[-1].num_rows
        available -= size
        yield taken[0] if len(taken) == 1 else pa.concat_tables(taken)


def _write_large(folder: Path, rows: AnyRows, layout: str, files: int, see: Callable[[Block], None]) -> int:
    def tables() -> Iterator[pa.Table]:
        for block in rows.blocks():
            see(block)
            yield _large_table(block, layout)

    edges = [rows.rows * k // files for k in range(files + 1)]
    largest = _BLOCK * _ROW_GROUP_BLOCKS
    plan = [
        (file, min(largest, stop - at))
        for file, (start, stop) in enumerate(itertools.pairwise(edges))
        for at in range(start, stop, largest)
    ]
    options = {"compression": "none" if layout == "plain" else "zstd", "use_dictionary": False}
    writer: pq.ParquetWriter | None = None
    current = -1
    for (file, size), table in zip(plan, _cut(tables(), (size for _, size in plan)), strict=True):
        if file != current:
            if writer is not None:
                writer.close()
            current = file
            writer = pq.ParquetWriter(folder / f"part-{file:05d}.parquet", table.schema, **options)
        assert writer is not None
        writer.write_table(table, row_group_size=size)
    if writer is not None:
        writer.close()
    return current + 1


def _pandas_metadata(rows: int) -> dict[bytes, bytes]:
    """What pandas' to_parquet leaves in a schema, for a frame with a default index."""
    column = {
        "field_name": "id",
        "name": "id",
        "pandas_type": "unicode",
        "numpy_type": "str",
        "metadata": None,
    }
    vectors = {"field_name": "embedding", "name": "embedding", "pandas_type": "list[float64]"}
    names = {
        "name": None,
        "field_name": None,
        "pandas_type": "unicode",
        "numpy_type": "str",
        "metadata": None,
    }
    described = {
        "index_columns": [{"kind": "range", "name": None, "start": 0, "stop": rows, "step": 1}],
        "column_indexes": [names],
        "columns": [column, {**vectors, "numpy_type": "object", "metadata": None}],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "3.0.0",
    }
    return {b"pandas": json.dumps(described).encode()}


def _write_upstream(folder: Path, rows: AnyRows, see: Callable[[Block], None]) -> int:
    def tables() -> Iterator[pa.Table]:
        for block in rows.blocks():
            see(block)
            vectors = _list_array(block.vectors.astype(np.float64), pa.float64(), fixed=False)
            yield pa.table({"id": block.ids.cast(pa.large_string()), "embedding": vectors})

    count = math.ceil(rows.rows / UPSTREAM_ROWS_PER_FILE)
    sizes = (min(UPSTREAM_ROWS_PER_FILE, rows.rows - k * UPSTREAM_ROWS_PER_FILE) for k in range(count))
    whole = _pandas_metadata(UPSTREAM_ROWS_PER_FILE)

    def write(batch: list[pa.Table], names: list[str]) -> None:
        for table, name in zip(batch, names, strict=True):
            full = table.num_rows == UPSTREAM_ROWS_PER_FILE
            metadata = whole if full else _pandas_metadata(table.num_rows)
            pq.write_table(table.replace_schema_metadata(metadata), folder / f"{name}.parquet", compression="snappy")

    waiting: list[Future[None]] = []
    pieces = _cut(tables(), sizes)
    with ThreadPoolExecutor(max_workers=2) as pool:
        for start in range(0, count, 256):
            stop = min(start + 256, count)
            names = _uuids(_NAME, rows.seed, np.arange(start, stop)).to_pylist()
            waiting.append(pool.submit(write, [next(pieces) for _ in names], names))
            if len(waiting) > 3:
                waiting.pop(0).result()
        for future in waiting:
            future.result()
    return count


class _Truth:
    """Writes the planted groups: id, group, and the similarity with which the row was made."""

    _SCHEMA = pa.schema([("id", pa.string()), ("group", pa.int64()), ("similarity", pa.float64())])

    def __init__(self, path: Path | None) -> None:
        self._writer = None if path is None else pq.ParquetWriter(path, self._SCHEMA, compression="zstd")
        self.planted = 0

    def see(self, block: Block) -> None:
        inside = block.group >= 0
        self.planted += int(inside.sum())
        if self._writer is not None:
            columns = {"id": block.ids, "group": block.group, "similarity": block.similarity}
            self._writer.write_table(pa.table(columns, schema=self._SCHEMA).filter(pa.array(inside)))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def write(out: Path, made: AnyRows, layout: str, *, files: int = 10, truth: Path | None = None) -> int:
    """Write a data set into the folder `out`, which must be empty or absent; return the number of files.

    `files` is the number of files of the large layouts; `upstream` ignores it. `truth` names a Parquet file for the
    planted groups (columns id, group, similarity; rows outside of groups are left out).
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    ground = _Truth(truth)
    if layout == "upstream":
        written = _write_upstream(out, made, ground.see)
    else:
        written = _write_large(out, made, layout, max(1, min(files, made.rows)), ground.see)
    ground.close()
    return written


def prepare(workdir: Path, layout: str, arguments: argparse.Namespace) -> Path:
    """The folder of the data set of `add_arguments`, which is made in `workdir` unless it is there."""
    rows, seed, files = arguments.rows, arguments.seed, arguments.files
    what = f"{arguments.dim}" if arguments.tile is None else f"{arguments.tile.stem}"
    what += f"-{arguments.scenes}scenes" if arguments.scenes is not None else ""
    name = f"{layout}-{rows}x{what}-seed{seed}-v{VERSION}"
    folder = workdir / (name if layout == "upstream" else f"{name}-{files}files")
    if not folder.exists():
        # Renamed when complete, so that an interrupted run leaves nothing that looks like a data set.
        partial = folder.with_name(folder.name + ".partial")
        if partial.exists():
            shutil.rmtree(partial)
        started = time.perf_counter()
        write(partial, make(arguments), layout, files=files)
        partial.rename(folder)
        print(f"made {folder} in {time.perf_counter() - started:.1f} s", flush=True)
    return folder


def make(arguments: argparse.Namespace, planted: float = 0.3) -> AnyRows:
    """The rows that the arguments of `add_arguments` ask for."""
    if arguments.tile is not None:
        return Tiles(arguments.rows, arguments.tile, arguments.seed)
    if arguments.scenes is not None:
        return Scenes(arguments.rows, arguments.dim, arguments.scenes, arguments.seed)
    return Rows(arguments.rows, arguments.dim, arguments.seed, planted)


def add_arguments(parser: argparse.ArgumentParser, rows: int | list[int]) -> None:
    """What describes a data set, with its default number of rows; a list where several are taken."""
    packages = Path(os.environ.get("UNTWIN_DEBIAN_PACKAGES") or _SAMPLE)
    several = "+" if isinstance(rows, list) else None
    parser.add_argument("--rows", type=int, nargs=several, default=rows, help="number of rows (%(default)s)")
    parser.add_argument("--dim", type=int, default=384, help="dimension (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed, 0 or more (%(default)s)")
    parser.add_argument("--files", type=int, default=10, help="files, all layouts but upstream (%(default)s)")
    content = parser.add_mutually_exclusive_group()
    content.add_argument("--scenes", type=int, help="scenes that rows hardly differ from")
    content.add_argument(
        "--tile", type=Path, nargs="?", const=packages, metavar="PATH", help="tile these rows up (default PATH: above)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to; must be empty or absent")
    parser.add_argument("--layout", choices=LAYOUTS, default="zstd", help="how files look (%(default)s)")
    add_arguments(parser, 1_000_000)
    parser.add_argument("--share", type=float, default=0.3, help="share of planted copies (%(default)s)")
    parser.add_argument("--planted", type=Path, metavar="FILE", help="also write id and group of planted rows")
    arguments = parser.parse_args()
    started, cpu = time.perf_counter(), time.process_time()
    try:
        rows = make(arguments, arguments.share)
        files = write(arguments.out, rows, arguments.layout, files=arguments.files, truth=arguments.planted)
    except (ValueError, OSError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(
        f"{arguments.out}: {rows.rows:,} rows x {rows.dim}, {rows.planted_groups:,} planted groups, "
        f"{files:,} files, {seconds:.1f} s, {cpu:.1f} s of CPU, {rows.rows / seconds:,.0f} rows/s"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
