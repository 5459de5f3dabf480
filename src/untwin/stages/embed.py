"""Embedding media: a vector for each clip, with facts about it, in Parquet files like those of NeMo Curator."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from untwin.errors import MediaError
from untwin.media.decode import frames as decode_frames
from untwin.media.encoder import Encoder
from untwin.media.workers import MediaWorkers, Problem
from untwin.stages.base import Context, Stage, Task, Upstream
from untwin.storage.files import Storage, join, redact
from untwin.storage.listing import EMBEDDING_KEY

_FACTS = (
    ("path", pa.string()),
    ("duration_s", pa.float64()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("fps", pa.float64()),
    ("codec", pa.string()),
    ("bitrate", pa.int64()),
    ("size_bytes", pa.int64()),
    ("n_frames", pa.int64()),
)
_PROCESS_BYTES = 256 << 20
"""A decoding process: interpreter, libraries and the encoder."""
_FRAME_BYTES = 128 << 20
"""Of pictures in work there, usually; the limit to which a process is held is larger."""


@dataclass(frozen=True)
class Clip:
    """A media file as it was listed.

    Attributes:
        id: Path below the folder, without ending.
        path: Path below the folder.
        file: Path or URL.
        size: In bytes.
        version: Modification time or ETag.
    """

    id: str
    path: str
    file: str
    size: int
    version: str


@dataclass(frozen=True)
class Recipe:
    """What a vector depends on besides the clip.

    Attributes:
        encoder: The model, and how it wants its input.
        frames: Of a clip, evenly spaced.
    """

    encoder: Encoder
    frames: int

    def described(self) -> dict[str, Any]:
        """For the metadata of a file."""
        return {"encoder": self.encoder.name, "digest": self.encoder.digest, "frames": self.frames}


@dataclass(frozen=True)
class EmbedTask(Task):
    """Clips of one output file: numbers `first` to `end` of the listing."""

    first: int
    end: int


@dataclass(frozen=True)
class EmbeddedTask(Task):
    """What came of a unit: clips with a vector and without, and the files."""

    n_embedded: int
    n_rejected: int
    seconds_of_video: float


@dataclass(frozen=True)
class _Embedded:
    vector: NDArray[np.float32]
    facts: tuple[Any, ...]


class EmbedStage(Stage):
    """Decodes clips in processes of their own, and encodes them there.

    Writes `embeddings/part-*.parquet`, and `rejected/clips-*.parquet` for clips that give no vector.

    Args:
        storage: Access to the clips and to the output.
        clips: What to embed, as a table in a file that `read_clips` reads.
        n_clips: In it.
        output_path: Folder for both.
        recipe: How.
        timeout: Seconds for each clip.
        clip_memory: Bytes to which a decoding process is held.
    """

    name = "embed"

    def __init__(
        self,
        storage: Storage,
        clips: str,
        n_clips: int,
        output_path: str,
        recipe: Recipe,
        *,
        timeout: float,
        clip_memory: int,
    ) -> None:
        self._storage = storage
        self._clips, self._n_clips, self._output_path = clips, n_clips, output_path
        self._recipe, self._timeout, self._clip_memory = recipe, timeout, clip_memory

    @property
    def place(self) -> tuple[Storage, str]:
        """The folder that the stage writes to."""
        return self._storage, self._output_path

    def units(self, upstream: Upstream) -> Sequence[EmbedTask]:
        """Runs of clips: 256, or fewer where there are few, so that no thread waits long for the last one."""
        size = min(256, max(1, self._n_clips // 64))
        starts = range(0, self._n_clips, size)
        ends = [min(start + size, self._n_clips) for start in starts]
        return [
            EmbedTask(unit, end - start, start, end) for unit, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]

    def memory(self, task: EmbedTask) -> int:
        """A decoding process, and its pictures."""
        return _PROCESS_BYTES + _FRAME_BYTES

    def minimum_memory(self, task: EmbedTask) -> int:
        """The pictures: the interpreter and its libraries come on top of every budget."""
        return _FRAME_BYTES

    def process(self, task: EmbedTask, context: Context) -> EmbeddedTask:
        """Embed some clips, and write them."""
        clips = read_clips(self._storage, self._clips, task.first, task.end)
        work = functools.partial(embed_clip, self._storage, self._recipe)
        outcomes = list(_workers(work, self._timeout, self._clip_memory).map(clips))
        key = hashlib.sha256(json.dumps([[clip.path, clip.version] for clip in clips]).encode()).hexdigest()[:16]
        good = [(c, found.value) for c, found in zip(clips, outcomes, strict=True) if not isinstance(found, Problem)]
        bad = [(c, found.reason) for c, found in zip(clips, outcomes, strict=True) if isinstance(found, Problem)]
        if bad:
            path = join(self._output_path, "rejected", f"clips-{key}.parquet")
            _write_rejected(self._storage, path, {**self._recipe.described(), "timeout": self._timeout}, bad)
        if good:
            path = join(self._output_path, "embeddings", f"part-{key}.parquet")
            _write(self._storage, path, self._recipe, [clip for clip, _ in good], [found for _, found in good])
        seconds = sum(found.facts[0] or 0.0 for _, found in good)
        return EmbeddedTask(task.unit, task.n_rows, len(good), len(bad), seconds)

    def finish(self) -> None:
        """End the decoding processes of this process's threads."""
        end_workers()


_own = threading.local()
_all: list[MediaWorkers[Clip, _Embedded]] = []
_lock = threading.Lock()


def _workers(work: functools.partial[_Embedded], timeout: float, memory: int) -> MediaWorkers[Clip, _Embedded]:
    """A decoding process of this thread, which outlives the unit: starting one takes as long as some clips."""
    key = (work.args, timeout, memory)
    if getattr(_own, "key", None) != key:
        workers: MediaWorkers[Clip, _Embedded] = MediaWorkers(work, workers=1, timeout=timeout, memory=memory)
        with _lock:
            _all.append(workers)
        _own.key, _own.workers = key, workers
    found: MediaWorkers[Clip, _Embedded] = _own.workers
    return found


def end_workers() -> None:
    """End the decoding processes that this process has started."""
    with _lock:
        while _all:
            _all.pop().close()
    _own.__dict__.clear()


def embed_clip(source: Storage, recipe: Recipe, clip: Clip) -> _Embedded:
    """The vector of a clip and its facts; runs in a decoding process.

    Raises:
        MediaError: It cannot be decoded, or changed meanwhile; says why.
    """
    encoder = recipe.encoder
    height, width = encoder.size
    found = decode_frames(
        clip.file, encoder.frames or recipe.frames, size=(width, height), fit=encoder.resize, storage=source
    )
    now = source.stat(clip.file)
    if (now.size, now.version) != (clip.size, clip.version):
        raise MediaError(redact(clip.file), "changed while it was read")
    pictures = found.frames
    if encoder.frames is not None and len(pictures) != encoder.frames:  # a short clip shows some frames longer
        pictures = pictures[np.arange(encoder.frames) * len(pictures) // encoder.frames]
    facts = (found.duration_s, found.width, found.height, found.fps, found.codec, found.bitrate, found.n_frames)
    return _Embedded(encoder.encode(pictures), facts)


def _write(storage: Storage, path: str, recipe: Recipe, clips: Sequence[Clip], found: Sequence[_Embedded]) -> None:
    vectors = np.stack([one.vector for one in found])
    duration, width, height, fps, codec, bitrate, n_frames = zip(*(one.facts for one in found), strict=True)
    columns = (
        [clip.path for clip in clips],
        duration,
        width,
        height,
        fps,
        codec,
        bitrate,
        [clip.size for clip in clips],
        n_frames,
    )
    arrays = [pa.array([clip.id for clip in clips], pa.string())]
    arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]))
    arrays += [pa.array(values, kind) for values, (_, kind) in zip(columns, _FACTS, strict=True)]
    schema = pa.schema(
        [("id", pa.string()), ("embedding", arrays[1].type), *_FACTS],
        {EMBEDDING_KEY: json.dumps({**recipe.described(), "versions": [clip.version for clip in clips]})},
    )
    table = pa.Table.from_arrays(arrays, schema=schema)
    write_embeddings(storage, path, table)


def write_embeddings(storage: Storage, path: str, table: pa.Table) -> None:
    """Write rows with vectors; the file appears when it is complete."""
    with storage.writing(path, durable=True) as sink:
        pq.write_table(table, sink, compression="zstd", use_dictionary=["codec"], write_statistics=["id"])


def _write_rejected(storage: Storage, path: str, described: dict[str, Any], clips: Sequence[tuple[Clip, str]]) -> None:
    """List clips without a vector, as other rejected rows are listed."""
    described = {**described, "clips": [[clip.path, clip.version] for clip, _ in clips]}
    table = pa.table(
        {
            "id": pa.array([clip.id for clip, _ in clips], pa.string()),
            "file": pa.array([redact(clip.file) for clip, _ in clips], pa.string()),
            "row": pa.nulls(len(clips), pa.int64()),
            "reason": pa.array([reason for _, reason in clips], pa.string()),
        }
    ).replace_schema_metadata({EMBEDDING_KEY: json.dumps(described)})
    with storage.writing(path, durable=True) as sink:
        pq.write_table(table, sink, compression="zstd")


def write_clips(storage: Storage, path: str, clips: pa.Table) -> None:
    """Write a table of clips: `id`, `path`, `file`, `size`, `version`."""
    with storage.writing(path) as sink, pa.ipc.new_file(sink, clips.schema) as writer:
        writer.write_table(clips, max_chunksize=1024)


def read_clips(storage: Storage, path: str, first: int, end: int) -> list[Clip]:
    """Some of the clips, by number."""
    with storage.open(path) as source:
        reader = pa.ipc.open_file(source)
        batches = [reader.get_batch(number) for number in range(first // 1024, -(-end // 1024))]
    table = pa.Table.from_batches(batches).slice(first - first // 1024 * 1024, end - first)
    return [Clip(**row) for row in table.to_pylist()]
