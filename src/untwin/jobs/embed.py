"""From a folder of clips to embeddings. What was embedded before, and has not changed, is not decoded again."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import json
import os
import posixpath
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from untwin.backends import make_executor
from untwin.backends.base import Executor, Progress
from untwin.errors import InputNotFoundError, OutputExistsError, ParameterError, TooManyRejectedError
from untwin.jobs.output import OutputFolder
from untwin.jobs.parameters import RunParameters, parse_bytes
from untwin.jobs.run import PreparedRun, prepare
from untwin.media.decode import require
from untwin.media.encoder import Encoder, load_encoder
from untwin.media.find import is_media, list_media
from untwin.pipeline import Pipeline
from untwin.stages import checks
from untwin.stages.embed import (
    EmbeddedTask,
    EmbedStage,
    Recipe,
    end_workers,
    write_clips,
    write_embeddings,
)
from untwin.storage.files import Storage, join, normalize_path, read_many, redact
from untwin.storage.inputs import naming_file
from untwin.storage.listing import EMBEDDED, EMBEDDING_KEY, EMBEDDINGS
from untwin.storage.lock import LOCK, locked

BEST_QUALITY = "height:desc,bitrate:desc,duration_s:desc"
"""Of clips that are nearly the same the best one stays, if nothing else is said."""
_MAGIC = re.compile(r"[*?\[]")
_CHOOSE = "give that folder, and --pattern '*.mp4' to choose among its files"
_WORK = "_embed"
_SHOWN_REASONS = 3
_IDENTITY = ("id", "path", "version")
_CHUNK = 1 << 16


@dataclass(frozen=True)
class EmbedParameters:
    """How clips become vectors.

    Attributes:
        frames: Of each clip, evenly spaced; a model of videos takes as many as it wants.
        encoder: An ONNX model; None for the built-in EfficientNet-Lite0.
        encoder_options: What is to be known about it: see `untwin.media.encoder.Encoder`.
        pattern: Only files whose name, or path below the folder, fits it, as in `*.mp4`.
        timeout: Seconds for each clip.
        clip_memory: Bytes to which the decoding of a clip is held.
    """

    frames: int = 8
    encoder: str | None = None
    encoder_options: Mapping[str, Any] = field(default_factory=dict)
    pattern: str | None = None
    timeout: float = 60.0
    clip_memory: int = 2 << 30

    def __post_init__(self) -> None:
        """Check what can be checked without looking at clips."""
        object.__setattr__(self, "frames", checks.whole("frames", self.frames, 1))
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, int | float) or not self.timeout > 0:
            raise ParameterError(f"timeout is {self.timeout!r}; it must be a number of seconds greater than 0")

    def recipe(self) -> Recipe:
        """The encoder, loaded and checked, and the number of frames."""
        require()
        encoder = load_encoder(self.encoder, self.encoder_options)
        if self.encoder is not None:  # what does not work is told before the clips are looked at
            encoder.encode(np.zeros((encoder.frames or 1, *encoder.size, 3), np.uint8))
        return Recipe(encoder, encoder.frames or self.frames)


@dataclass(frozen=True)
class Embedded:
    """What came of embedding a folder.

    Attributes:
        path: Folder of the embeddings, an input for `untwin.deduplicate`.
        clips_path: Folder of the clips.
        encoder: What made the vectors.
        n_clips: Media files found.
        n_embedded: Those with a vector.
        n_reused: Those of them that had one before.
        n_rejected: Those without; they are not tried again while they and the timeout stay the same.
        seconds: Wall time.
        seconds_of_video: Playing time of what was embedded now.
        reasons: Why clips have no vector, and how many, commonest first.
    """

    path: str
    clips_path: str
    encoder: Encoder
    n_clips: int
    n_embedded: int
    n_reused: int
    n_rejected: int
    seconds: float
    seconds_of_video: float
    reasons: tuple[tuple[str, int], ...]


def embed(
    clips_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    *,
    frames: int = 8,
    encoder: str | None = None,
    encoder_options: Mapping[str, Any] | None = None,
    pattern: str | None = None,
    timeout: float = 60.0,
    memory: int | str | None = None,
    workers: int | None = None,
    backend: str = "local",
    ray_address: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Embedded:
    """Compute a vector for each video and image below a folder.

    Args:
        clips_path: Folder of media files, local or an fsspec URL.
        output_path: Folder for `embeddings/*.parquet` and `rejected/*.parquet`.
        frames: Of each clip, evenly spaced.
        encoder: An ONNX model that turns frames into vectors; None for the built-in EfficientNet-Lite0.
        encoder_options: What is to be known about it; comes before what the YAML file beside it says.
        pattern: Only files whose name, or path below the folder, fits it, as in `*.mp4`.
        timeout: Seconds for each clip.
        memory: Budget, as bytes or as in "4GB".
        workers: Most units of work at a time.
        backend: `local`, `ray` or `xenna`.
        ray_address: Of a running Ray cluster, as in `untwin.deduplicate`.
        storage_options: For fsspec, clips and output alike.
        progress: Gets told how far the work is.

    Raises:
        UntwinError: A user's mistake, or not one clip that can be embedded.
    """
    parameters = EmbedParameters(frames, encoder, dict(encoder_options or {}), pattern, timeout)
    recipe = parameters.recipe()
    executor = make_executor(backend, workers, None if memory is None else parse_bytes(memory), ray_address)
    storage = Storage(dict(storage_options or {}))
    folder = OutputFolder(storage, normalize_path(os.fspath(output_path)))
    clips = normalize_path(os.fspath(clips_path))
    return embed_into(folder, clips, parameters, recipe, executor, progress)


def embed_into(
    folder: OutputFolder,
    clips_path: str,
    parameters: EmbedParameters,
    recipe: Recipe,
    executor: Executor,
    progress: Progress | None = None,
    *,
    dry_run: bool = False,
) -> Embedded:
    """Embed what is not embedded yet, and forget what is not there any more."""
    started = time.perf_counter()
    storage = folder.storage
    folder.check_is_folder()
    _check_same(folder, recipe)
    _check_no_clip(storage, [clips_path])
    clips = executor.call(_list_clips, storage, clips_path, parameters.pattern, folder.path)
    if dry_run:
        return Embedded(
            folder.file(EMBEDDINGS), redact(clips_path), recipe.encoder, clips.num_rows, 0, 0, 0, 0.0, 0.0, ()
        )
    with locked(storage, folder.path):
        storage.write_json(folder.file(EMBEDDED), {**recipe.described(), "clips": redact(clips_path)})
        left = _tidy(folder, clips)
        n_done = clips.num_rows - left.num_rows
        left = _without_failed(folder, left, parameters.timeout)
        found: list[EmbeddedTask] = []
        if left.num_rows:
            work = folder.file(_WORK, "clips.arrow")
            write_clips(storage, work, left)
            stage = EmbedStage(
                storage,
                work,
                left.num_rows,
                folder.path,
                recipe,
                timeout=parameters.timeout,
                clip_memory=parameters.clip_memory,
            )
            try:
                outcome = Pipeline("untwin embed", stages=[stage]).run(executor, progress)
            finally:
                end_workers()
            found = [task for tasks in outcome.tasks.values() for task in tasks if isinstance(task, EmbeddedTask)]
            storage.remove(folder.file(_WORK))
        reasons = _reasons(folder)
        n_new = sum(task.n_embedded for task in found)
        result = Embedded(
            path=folder.file(EMBEDDINGS),
            clips_path=redact(clips_path),
            encoder=recipe.encoder,
            n_clips=clips.num_rows,
            n_embedded=n_done + n_new,
            n_reused=n_done,
            n_rejected=clips.num_rows - n_done - n_new,
            seconds=round(time.perf_counter() - started, 3),
            seconds_of_video=sum(task.seconds_of_video for task in found),
            reasons=tuple(reasons.most_common()),
        )
        if not result.n_embedded:
            shown = "; ".join(f"{count} {reason}" for reason, count in result.reasons[:_SHOWN_REASONS])
            raise TooManyRejectedError(
                f"{redact(clips_path)}: not one of {result.n_clips:,} media files gives a vector ({shown}); "
                f"{redact(folder.file('rejected'))} lists them"
            )
        counts = {name: getattr(result, name) for name in ("n_clips", "n_embedded", "n_rejected")}
        storage.write_json(folder.file(EMBEDDED), {**recipe.described(), "clips": redact(clips_path), **counts})
        return result


def prepare_run(
    parameters: RunParameters,
    embedding: EmbedParameters,
    executor: Executor,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    by_quality: bool = True,
    dry_run: bool = False,
) -> tuple[PreparedRun | None, Embedded | None]:
    """Prepare a run; of a folder of clips one on their embeddings, which are made in the output folder first.

    Whether it is such a folder is looked at only where there are no tables, so that an input of tables is listed once.

    Args:
        parameters: Of the run.
        embedding: How clips become vectors.
        executor: The backend.
        progress: Gets told how far the embedding is.
        overwrite: Remove an earlier run in the output first; embeddings stay.
        by_quality: Of similar clips keep the one of best quality, if `rank_by` says nothing else.
        dry_run: Of clips only find them; nothing is written, and there is no run to prepare yet.

    Returns:
        The run, whose eps is the encoder's if none was given; and what was embedded, None for an input of tables.
    """
    storage, output = Storage(parameters.storage_options), normalize_path(parameters.output)
    may_be_clips = parameters.input_filetype == "parquet"
    if may_be_clips:
        _check_no_clip(storage, parameters.inputs)
    try:
        prepared = prepare(parameters, executor, overwrite=overwrite)
    except InputNotFoundError:
        if not may_be_clips or not executor.call(holds_media, storage, parameters.inputs, output):
            raise
    else:
        if embedding != EmbedParameters():
            raise ParameterError(
                f"{redact(parameters.inputs[0])}: is no folder of videos or images, so frames, encoder, pattern and "
                "timeout have no meaning; leave them out"
            )
        return prepared, None
    given = {"id_field": parameters.id_field, "embedding_field": parameters.embedding_field}
    if given != {"id_field": "id", "embedding_field": "embedding"}:
        raise ParameterError(
            "the columns of embedded clips are id and embedding; leave id_field and embedding_field out"
        )
    recipe = embedding.recipe()
    media = normalize_path(parameters.inputs[0])
    found = embed_into(OutputFolder(storage, output), media, embedding, recipe, executor, progress, dry_run=dry_run)
    if dry_run:
        return None, found
    eps = parameters.eps if parameters.eps is not None else recipe.encoder.eps
    rank_by = parameters.rank_by or (BEST_QUALITY if by_quality else None)
    on_vectors = dataclasses.replace(parameters, inputs=(found.path,), media=media, eps=eps, rank_by=rank_by)
    return prepare(on_vectors, executor, overwrite=overwrite), found


def _check_no_clip(storage: Storage, inputs: Sequence[str]) -> None:
    """Raise ParameterError for a clip: they are given as a folder."""
    for path in map(normalize_path, inputs):
        if is_media(path) and not storage.is_folder(path):
            raise ParameterError(f"{redact(path)}: media are given as the folder that they lie in; {_CHOOSE}")


def holds_media(storage: Storage, inputs: Sequence[str], output: str) -> bool:
    """Whether the input is a folder with media files, and without tables; what lies in the output does not count.

    Raises:
        ParameterError: It is several.
    """
    paths = [normalize_path(path) for path in inputs]
    found = [path for path in paths if not _MAGIC.search(path) and storage.is_folder(path)]
    media = [path for path in found if _has_media_only(storage, path, output.rstrip("/") + "/")]
    if media and len(paths) > 1:
        raise ParameterError(f"{redact(media[0])}: holds media, and these come from one folder; {_CHOOSE}")
    return bool(media)


def _has_media_only(storage: Storage, folder: str, output: str) -> bool:
    media = False
    for file in storage.walk(folder):
        if not file.path.startswith(output):
            if file.path.endswith(".parquet"):
                return False
            media = media or is_media(file.path)
    return media


def _list_clips(storage: Storage, clips_path: str, pattern: str | None, output: str) -> pa.Table:
    """The clips, by path: `id`, `path`, `file`, `size`, `version`."""
    media = list_media(storage, clips_path)
    named = pa.table({"relative": media.relative, "size": media.sizes, "version": media.versions})
    parts = [_named(part, media.path, pattern, output) for part in named.to_batches(max_chunksize=_CHUNK)]
    clips = pa.Table.from_batches(parts)
    if not clips.num_rows:
        raise InputNotFoundError(f"{redact(clips_path)}: no media file fits the pattern {pattern!r}")
    stems = clips["id"]
    counts = pc.value_counts(stems)
    several = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    # clips that differ in nothing but their ending keep it
    ids = pc.if_else(pc.is_in(stems, several), clips["path"], stems)
    return clips.set_column(0, "id", ids)


def _named(part: pa.RecordBatch, folder: str, pattern: str | None, output: str) -> pa.RecordBatch:
    paths = [os.fsdecode(name) for name in part["relative"].to_pylist()]
    inside = output.rstrip("/") + "/"
    fits = re.compile(fnmatch.translate(pattern)).match if pattern is not None else None
    chosen = [
        number
        for number, path in enumerate(paths)
        if (fits is None or fits(path) or fits(posixpath.basename(path))) and not join(folder, path).startswith(inside)
    ]
    for number in chosen:
        if not _is_text(paths[number]):
            raise ParameterError(
                f"{redact(folder)}: the name {paths[number]!r} is not text in UTF-8, so it cannot be an id; rename it"
            )
    return pa.RecordBatch.from_arrays(
        [
            pa.array([posixpath.splitext(paths[number])[0] for number in chosen], pa.large_string()),
            pa.array([paths[number] for number in chosen], pa.large_string()),
            pa.array([join(folder, paths[number]) for number in chosen], pa.large_string()),
            part["size"].take(pa.array(chosen, pa.int64())),
            part["version"].take(pa.array(chosen, pa.int64())),
        ],
        names=["id", "path", "file", "size", "version"],
    )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_same(folder: OutputFolder, recipe: Recipe) -> None:
    """Raise OutputExistsError if the folder holds something else than embeddings made in this way."""
    storage = folder.storage
    if not storage.exists(folder.file(EMBEDDED)):
        names = [name for name in folder.foreign_names() if name != LOCK]
        if names:
            raise OutputExistsError(
                f"{redact(folder.path)}: holds files that are no embeddings of untwin ({', '.join(names[:5])}); "
                "choose an empty or new folder"
            )
        return
    known, wanted = storage.read_json(folder.file(EMBEDDED)), recipe.described()
    differing = [
        f"{name} (was {known.get(name)!r}, now {wanted[name]!r})" for name in wanted if known.get(name) != wanted[name]
    ]
    if differing:
        raise OutputExistsError(
            f"{redact(folder.path)}: holds embeddings that differ in {'; '.join(differing)}; vectors of different "
            "encoders cannot be compared: choose another folder, or remove this one"
        )


def _tidy(folder: OutputFolder, clips: pa.Table) -> pa.Table:
    """Take rows of clips that are not there any more out of the files; gives the clips that are not embedded yet."""
    storage = folder.storage
    names = [name for name in sorted(storage.names(folder.file(EMBEDDINGS))) if name.endswith(".parquet")]
    parts = [folder.file(EMBEDDINGS, name) for name in names]
    if not parts:
        return clips
    tables = list(read_many(functools.partial(_identities, storage), parts))
    starts = np.cumsum([0, *(table.num_rows for table in tables)])
    known = pa.concat_tables(tables).append_column("row", pa.array(np.arange(starts[-1])))
    # a row that was written anew, but not removed from its old file, is there twice
    first = known.group_by(_IDENTITY).aggregate([("row", "min")])
    good = first.join(clips.select(_IDENTITY), list(_IDENTITY), join_type="inner")
    stays = np.zeros(starts[-1], np.bool_)
    stays[good["row_min"].to_numpy()] = True
    for path, start, end in zip(parts, starts[:-1], starts[1:], strict=True):
        if not stays[start:end].all():
            _keep(storage, path, stays[start:end])
    return clips.join(good.select(_IDENTITY), list(_IDENTITY), join_type="left anti").sort_by("path")


def _without_failed(folder: OutputFolder, clips: pa.Table, timeout: float) -> pa.Table:
    """Leave out clips that gave no vector within the same time; lists of others are removed."""
    storage = folder.storage
    paths = [folder.file(name) for name in folder.rejected_clips()]
    failed = []
    for path, table in zip(paths, read_many(functools.partial(_failures, storage, timeout), paths), strict=True):
        if table is None or table.join(clips, list(_IDENTITY), join_type="inner").num_rows < table.num_rows:
            storage.remove(path)
        else:
            failed.append(table)
    if not failed:
        return clips
    return clips.join(pa.concat_tables(failed), list(_IDENTITY), join_type="left anti").sort_by("path")


def _failures(storage: Storage, timeout: float, path: str) -> pa.Table | None:
    with naming_file(path), storage.open(path) as source:
        table = pq.read_table(source, columns=["id"], partitioning=None)
    described = json.loads(table.schema.metadata[EMBEDDING_KEY])
    if described["timeout"] != timeout:
        return None
    paths, versions = zip(*described["clips"], strict=True)
    columns = [table["id"].cast(pa.large_string()), *(pa.array(part, pa.large_string()) for part in (paths, versions))]
    return pa.table(columns, names=list(_IDENTITY))


def _identities(storage: Storage, path: str) -> pa.Table:
    with naming_file(path), storage.open(path) as source:
        table = pq.read_table(source, columns=["id", "path"], partitioning=None)
    versions = json.loads(table.schema.metadata[EMBEDDING_KEY])["versions"]
    columns = [*table.columns, pa.chunked_array([versions], pa.large_string())]
    return pa.table([column.cast(pa.large_string()) for column in columns], names=list(_IDENTITY))


def _keep(storage: Storage, path: str, stays: NDArray[np.bool_]) -> None:
    """Replace a file by one with some of its rows."""
    if stays.any():
        with storage.open(path) as source:
            table = pq.read_table(source, partitioning=None)
        described = json.loads(table.schema.metadata[EMBEDDING_KEY])
        described["versions"] = [version for version, good in zip(described["versions"], stays, strict=True) if good]
        table = table.filter(pa.array(stays)).replace_schema_metadata({EMBEDDING_KEY: json.dumps(described)})
        name = hashlib.sha256(json.dumps([table["path"].to_pylist(), described["versions"]]).encode()).hexdigest()[:16]
        write_embeddings(storage, f"{posixpath.dirname(path)}/part-{name}.parquet", table)
    storage.remove(path)


def _reasons(folder: OutputFolder) -> Counter[str]:
    reasons: Counter[str] = Counter()
    for name in folder.rejected_clips():
        with folder.storage.open(folder.file(name)) as source:
            counts = pc.value_counts(pq.read_table(source, columns=["reason"], partitioning=None)["reason"])
        reasons.update({entry["values"]: entry["counts"] for entry in counts.to_pylist()})
    return reasons
