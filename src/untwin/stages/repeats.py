"""Repeated ids: the same id with the same vector is set aside, with another vector it is an error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from untwin.errors import RepeatedIdError, TooManyRejectedError
from untwin.stages.base import Context, Stage, Task, Upstream
from untwin.stages.clustering import Clustering, add_counts
from untwin.stages.tasks import RepeatsTask, ShardsTask
from untwin.storage.columns import Reason, decode_ids
from untwin.storage.files import redact
from untwin.storage.partitions import write_array
from untwin.storage.shards import Slices

_SHOWN = 10


class RepeatsStage(Stage):
    """Finds repeated ids in one part of the space of id hashes.

    Two rows have the same id when 128 bits of hash agree: among 10^9 different ids, any two do with a probability
    below 10^-20. Of rows that repeat an id the first, in the plan's order, stays.
    """

    name = "repeated ids"
    barrier = True

    def __init__(self, clustering: Clustering) -> None:
        self._clustering = clustering
        self._id_files = Slices((), 0, "")

    def units(self, upstream: Upstream) -> Sequence[Task]:
        """One unit for each part of the hashes."""
        shards = upstream.of(ShardsTask)
        _check_rejected(shards, self._clustering.plan.n_rows)
        job, parts = self._clustering, self._clustering.plan.id_partitions
        paths = tuple(path for task in shards for path in task.id_files)
        self._id_files = Slices(paths, parts, job.work_file("ids", "_index.starts"))
        self._id_files.collect(job.target)
        n_rows = sum(task.n_rows for task in shards)
        return [Task(part, n_rows * (part + 1) // parts - n_rows * part // parts) for part in range(parts)]

    def memory(self, task: Task) -> int:
        """Hashes, their copies in sorted order, and what sorting takes."""
        return 120 * task.n_rows + (16 << 20)

    def process(self, task: Task, context: Context) -> RepeatsTask:
        """Find the rows of a part that repeat an id."""
        job = self._clustering
        batches = list(self._id_files.batches(job.target, task.unit))
        if not batches:
            return RepeatsTask(task.unit, task.n_rows, "", 0, {})
        table = pa.Table.from_batches(batches)
        h1, h2, vector, row = (table[name].to_numpy() for name in ("h1", "h2", "vector", "row"))
        order = np.lexsort((row, h2, h1))
        h1, h2, vector, row = h1[order], h2[order], vector[order], row[order]
        same = (h1[1:] == h1[:-1]) & (h2[1:] == h2[:-1])
        if not same.any():
            return RepeatsTask(task.unit, task.n_rows, "", 0, {})
        is_first = np.concatenate(([True], ~same))
        first = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
        other_vector = vector != vector[first]
        if other_vector.any() and job.on_repeated_id == "error":
            self._refuse(row, first, other_vector)
        repeated = np.flatnonzero(~is_first)
        reasons = np.where(other_vector[repeated], Reason.REPEATED_ID, Reason.REPEATED_ROW).astype(np.uint8)
        path = job.work_file("repeats", f"part-{task.unit:06d}.npy")
        found = np.stack((row[repeated], reasons.astype(np.int64)))
        write_array(job.target, path, found[:, np.argsort(found[0])])
        counts = {
            reason.text: int((reasons == reason).sum())
            for reason in (Reason.REPEATED_ROW, Reason.REPEATED_ID)
            if (reasons == reason).any()
        }
        return RepeatsTask(task.unit, task.n_rows, path, len(repeated), counts)

    def _refuse(self, row: NDArray[np.int64], first: NDArray[np.int64], other: NDArray[np.bool_]) -> None:
        """Name the first few ids that stand for different vectors, with their files."""
        conflicts = np.flatnonzero(other)
        heads, picked = np.unique(first[conflicts], return_index=True)
        lines = []
        for head, position in zip(heads[:_SHOWN].tolist(), picked[:_SHOWN].tolist(), strict=True):
            rows = np.array([row[head], row[conflicts[position]]])
            files, row_in_file = self._clustering.listing.locate(rows)
            places = " and ".join(
                f"{redact(file)} (row {number})" for file, number in zip(files, row_in_file.tolist(), strict=True)
            )
            lines.append(f"  {self._id_of(int(rows[0]))!r}: {places}")
        more = f"\n  and {len(heads) - _SHOWN} more" if len(heads) > _SHOWN else ""
        raise RepeatedIdError(
            "the same id stands for different vectors:\n"
            + "\n".join(lines)
            + more
            + "\ngive the rows ids of their own, or keep the first row of each id with --on-repeated-id first"
        )

    def _id_of(self, row: int) -> object:
        job = self._clustering
        group = int(np.searchsorted(job.groups.starts, row, side="right")) - 1
        (span,) = job.listing.spans(group, group + 1, job.groups)
        skip = row - span.first_row
        for batch in job.listing.format.read(job.source, span, [job.fields.id_field], 65_536):
            if skip < batch.num_rows:
                return decode_ids(batch.column(0), job.listing.id_type)[skip].as_py()
            skip -= batch.num_rows
        return None


def _check_rejected(shards: Sequence[ShardsTask], n_rows: int) -> None:
    rejected = add_counts([task.rejected for task in shards])
    total = sum(rejected.values())
    if 2 * total > n_rows:
        reasons = ", ".join(f"{count} rows: {reason}" for reason, count in list(rejected.items())[:5])
        raise TooManyRejectedError(
            f"{total} of {n_rows} rows cannot be judged, more than half ({reasons}); check the embedding column "
            "and embedding_dim; the rows are listed in rejected/"
        )
