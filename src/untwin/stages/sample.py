"""The row sample: the rows with the smallest seeded hash of their id, whichever files they are in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from untwin.core import normalize
from untwin.stages.base import Context, Stage, Task, Upstream
from untwin.stages.clustering import SAMPLE_SEED, Clustering
from untwin.stages.ids import hash_ids
from untwin.stages.judging import JudgedUnit
from untwin.stages.tasks import InputTask, SampleTask
from untwin.storage.columns import Reason, decode_vectors, list_lengths
from untwin.storage.files import Storage
from untwin.storage.memory import space
from untwin.storage.rows import read_rows
from untwin.storage.sample import sample_batches, write_sample

_SIDE_BYTES = 128
"""What travels with a vector, as far as can be known before it is read."""
_DECODED = 1.2
"""Bytes of decoded rows over bytes of files: vectors hardly compress."""


class SampleStage(Stage):
    """Takes the sampled rows out of each input unit, and holds the unit's rows for `assign` if there is room.

    Rows are taken whose hash is below a bound that the wanted number of rows passes almost surely; the fit then takes
    the smallest of them. So no pass over the ids is needed first, and the sample depends on the rows alone.
    """

    name = "sample"

    def __init__(self, clustering: Clustering) -> None:
        self._clustering = clustering
        self._hold_input = False

    @property
    def place(self) -> tuple[Storage, str]:
        """The folder that the stage writes to."""
        return self._clustering.target, self._clustering.output_path

    @property
    def origin(self) -> tuple[Storage, str] | None:
        """The first file of the input."""
        return self._clustering.origin

    def units(self, upstream: Upstream) -> Sequence[Task]:
        """The plan's input units."""
        job = self._clustering
        needed = _SIDE_BYTES * job.plan.n_rows + _DECODED * job.listing.n_bytes
        if len(job.groups.rows) * job.batch_rows(job.plan.dim) > job.plan.n_rows:
            needed += job.plan.vector_bytes  # small pieces are put together, and then vectors are no part of them
        # whole rows take a second place, behind vectors that would go through files otherwise
        self._hold_input = job.rows_wanted and job.listing.filetype == "parquet" and needed <= space().limit
        return job.input_units()

    def memory(self, task: InputTask) -> int:
        """The sampled part of a unit, and batches in flight."""
        return (48 << 20) + int(4 * task.n_rows * self._clustering.plan.dim * self._share())

    def _share(self) -> float:
        plan = self._clustering.plan
        wanted = plan.sample_rows + 6 * math.sqrt(plan.sample_rows) + 10
        return min(1.0, wanted / plan.n_rows)

    def process(self, task: InputTask, context: Context) -> SampleTask:
        """Write the unit's part of the sample, the smallest hashes first."""
        job = self._clustering
        bound = np.uint64(min(2**64 - 1, int(self._share() * 2.0**64)))
        held = None if self._hold_input else self._held(task)
        picked: dict[int, list[tuple[NDArray[np.uint64], NDArray[np.float32]]]] = {}
        for hashes, vectors in self._picked(held, bound) if held is not None else self._read(task, bound):
            if len(hashes):
                picked.setdefault(vectors.shape[1], []).append((hashes, vectors))
        path = job.work_file("sample", f"part-{task.unit:06d}.arrow")
        sorted_batches = (sample_batches(pieces, job.batch_rows(dim)) for dim, pieces in picked.items())
        write_sample(job.target, path, itertools.chain.from_iterable(sorted_batches))
        n_sampled = sum(len(hashes) for pieces in picked.values() for hashes, _ in pieces)
        return SampleTask(task.unit, task.n_rows, path, n_sampled)

    def _held(self, task: InputTask) -> JudgedUnit | None:
        """The rows of a unit, held for the assignment that wants them next; None without room for them."""
        job = self._clustering
        dim = job.dim or job.plan.dim
        path = job.rows_held(task.unit)
        if not space().put(path, None, task.n_rows * (4 * dim + _SIDE_BYTES)):
            return None
        unit = JudgedUnit(job, task, dim)
        unit.hold()
        other_lengths = any(Reason.WRONG_LENGTH.text in counts for counts in unit.reasons)
        if (other_lengths and not job.dim) or not space().put(path, unit, unit.n_bytes):
            space().drop(path)
        # the rows of the sample tell which length is the commonest, so all lengths must be seen
        return None if other_lengths and not job.dim else unit

    def _picked(self, unit: JudgedUnit, bound: np.uint64) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.float32]]]:
        """Hashes and vectors of the sampled rows among those held."""
        for part in unit.parts():
            ids = part.columns[self._clustering.fields.id_field].combine_chunks()
            hashes = hash_ids(ids, self._clustering.seed + SAMPLE_SEED)
            chosen = np.flatnonzero(hashes <= bound)
            yield hashes[chosen], part.vectors[chosen]

    def _read(self, task: InputTask, bound: np.uint64) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.float32]]]:
        """Hashes and vectors of the sampled rows, as they are read; each batch has vectors of one length."""
        job = self._clustering
        spans = job.listing.spans(task.first_group, task.end_group, job.groups)
        size, hold = job.batch_rows(job.plan.dim), self._hold_input
        names = job.fields.names if hold else [job.fields.id_field, job.fields.embedding_field]
        for rows in read_rows(job.source, job.listing.format, spans, names, size, hold=hold):
            ids = job.ids(rows)
            hashes = hash_ids(ids, job.seed + SAMPLE_SEED)
            chosen = hashes <= bound
            if ids.null_count:
                chosen &= ids.is_valid().to_numpy(zero_copy_only=False)
            if not chosen.any():
                continue
            column = job.embeddings(rows)
            for dim in {job.dim} if job.dim else set(np.unique(list_lengths(column)[chosen]).tolist()) - {0}:
                raw = decode_vectors(column, dim)
                positions = np.arange(len(column)) if raw.positions is None else raw.positions
                here = np.flatnonzero(chosen[positions])
                vectors, invalid = normalize(raw.values.take(here, axis=0))
                good = np.flatnonzero(invalid == 0)
                yield hashes[positions[here[good]]], vectors[good]
