"""`IdentifyDuplicatesStage`: from similarities to the list of duplicates, each with the row that is kept for it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from untwin.core import is_duplicate, threshold
from untwin.errors import OutputExistsError, ParameterError
from untwin.stages import checks
from untwin.stages.base import CompositeStage, Context, Stage, Task, Upstream, storage_of
from untwin.stages.borders import AnswerStage
from untwin.stages.pairwise import PairwiseStage, removed_rows, result_facts
from untwin.stages.tasks import CentroidsTask, DuplicatesTask, PairsTask, SelectedTask
from untwin.storage.bitmap import empty_bitmap, set_bits
from untwin.storage.files import Storage, join, normalize_path, read_many, redact
from untwin.storage.inputs import naming_file
from untwin.storage.partitions import read_array, read_table, result_path, write_array
from untwin.storage.sorting import ROW_GROUP, merge_sorted, sort_table, write_sorted

_FILE_ROWS = 64 * ROW_GROUP
_GROUP_KEYS = ["kept_id", "is_member", "id"]


class IdentifyDuplicatesStage(CompositeStage):
    """Lists the duplicates: `duplicates/*.parquet`, sorted by id, and `groups.parquet`.

    Args:
        output_path: Folder in which `duplicates/` and `groups.parquet` are made.
        eps: A row is a duplicate when its similarity is at least 1 - eps.
        verbose: Log each stage (logger `untwin`, level INFO).
        read_kwargs: `storage_options` of the pairwise results.
        write_kwargs: `storage_options` of the output.

    Raises:
        ParameterError: eps outside (0, 1), or not the one that the pairwise results were resolved with.
    """

    def __init__(
        self,
        output_path: str,
        eps: float,
        verbose: bool = False,
        read_kwargs: dict[str, Any] | None = None,
        write_kwargs: dict[str, Any] | None = None,
    ) -> None:
        threshold(eps)
        self.output_path = normalize_path(checks.path("output_path", output_path))
        self.eps = float(eps)
        self.verbose = verbose
        self.source = storage_of(read_kwargs)
        self.target = storage_of(write_kwargs)
        self.n_input_rows = 0
        """Rows that row numbers can refer to, where no KMeansStage of the pipeline tells."""

    def stages(self) -> list[Stage]:
        """Select in each unit, then merge."""
        stages: list[Stage] = [
            _SelectStage(self.source, self.target, self.output_path, self.eps),
            MergeStage(self.target, self.output_path, self.n_input_rows),
        ]
        for stage in stages:
            stage.verbose = self.verbose
        return stages


class _SelectStage(Stage):
    """Takes the duplicates out of a unit's results, sorted by id, and the numbers of the rows that stay."""

    name = "select duplicates"
    splittable = True

    def __init__(self, source: Storage, target: Storage, output_path: str, eps: float) -> None:
        self._source, self._target, self._output_path, self._eps = source, target, output_path, eps
        self._work_path = join(output_path, "duplicates", "_work")

    @property
    def place(self) -> tuple[Storage, str]:
        """The folder that the stage writes to."""
        return self._target, self._output_path

    def check_output(self) -> None:
        """Refuse an output that is there."""
        for name in ("duplicates", "groups.parquet"):
            path = join(self._output_path, name)
            if self._target.names(path) if name == "duplicates" else self._target.exists(path):
                raise OutputExistsError(f"{redact(path)}: is there already; choose another output_path, or remove it")

    def check(self, before: Sequence[Stage]) -> None:
        """Refuse an eps that does not fit the `PairwiseStage` before this one."""
        last = before[-1] if before else None
        pairwise = last.borders.pairwise if isinstance(last, AnswerStage) else last
        if not isinstance(pairwise, PairwiseStage):
            raise ParameterError(
                "IdentifyDuplicatesStage has no pairwise results to read; add a PairwiseStage right before it"
            )
        _check_eps(self._eps, pairwise.eps)

    def units(self, upstream: Upstream) -> Sequence[Task]:
        """The units of the stage before."""
        return [task for task in upstream.last if isinstance(task, PairsTask)]

    def memory(self, task: Any) -> int:
        """The results of a unit."""
        return 400 * int(task.n_rows) + (16 << 20)

    def process(self, task: PairsTask, context: Context) -> SelectedTask:
        """Select the duplicates of a unit."""
        parts: list[pa.Table] = []
        duplicate: list[NDArray[np.bool_]] = []
        paths = [result_path(task.folder, centroid) for centroid, _ in task.clusters]
        for (centroid, _), (table, removed) in zip(task.clusters, read_many(self._read, paths), strict=True):
            found = table.filter(pa.array(removed))
            parts.append(found.append_column("centroid", pa.array(np.full(found.num_rows, centroid, np.int32))))
            duplicate.append(removed)
        table = pa.concat_tables(parts)
        duplicates_path = join(self._work_path, f"by-id-{task.unit:06d}.parquet")
        write_sorted(self._target, duplicates_path, sort_table(table, ["id"]))
        groups_path = join(self._work_path, f"by-kept-{task.unit:06d}.parquet")
        write_sorted(self._target, groups_path, sort_table(_members(table), _GROUP_KEYS))
        kept_rows_path = ""
        if task.rows_path:
            rows = np.asarray(read_array(self._source, task.rows_path), np.int64)
            kept_rows_path = join(self._work_path, f"kept-{task.unit:06d}.npy")
            write_array(self._target, kept_rows_path, rows[~np.concatenate(duplicate)])
        n_rows = sum(len(removed) for removed in duplicate)
        return SelectedTask(task.unit, n_rows, duplicates_path, groups_path, kept_rows_path, table.num_rows)

    def _read(self, path: str) -> tuple[pa.Table, NDArray[np.bool_]]:
        table = read_table(self._source, path)
        facts = result_facts(table)
        scores = table["cosine_sim_score"].to_numpy()
        made_with = facts.get("eps")
        _check_eps(self._eps, made_with)
        if made_with is None:
            # similarities only: a row is a duplicate of *any* better-ranked row, and its witness is not known
            table = table.select(["id"])
            table = table.append_column("kept_id", pa.nulls(len(scores), table.schema.field("id").type))
            table = table.append_column("cosine_sim_score", pa.nulls(len(scores), pa.float32()))
            return table, is_duplicate(scores, self._eps)
        removed = removed_rows(table, self._eps, facts.get("compare_to"))
        table = table.select(["id", "kept_id", "kept_sim_score"]).rename_columns(["id", "kept_id", "cosine_sim_score"])
        return table, removed


def _check_eps(eps: float, made_with: float | None) -> None:
    if made_with is not None and threshold(made_with) != threshold(eps):
        raise ParameterError(
            f"eps is {eps}, but the pairwise results were resolved with eps {made_with}; give PairwiseStage the same"
        )


def _members(duplicates: pa.Table) -> pa.Table:
    """The members of groups: duplicates that have a witness, and the witnesses themselves."""
    known = duplicates.filter(pc.is_valid(duplicates["kept_id"]))
    kept = known["kept_id"].unique() if known.num_rows else pa.array([], duplicates.schema.field("id").type)
    members = pa.table(
        {
            "kept_id": known["kept_id"],
            "id": known["id"],
            "is_member": pa.array(np.ones(known.num_rows, np.int8)),
            "score": known["cosine_sim_score"],
        }
    )
    heads = pa.table(
        {
            "kept_id": kept,
            "id": kept,
            "is_member": pa.array(np.zeros(len(kept), np.int8)),
            "score": pa.array(np.ones(len(kept), np.float32)),
        }
    )
    return pa.concat_tables([heads.cast(members.schema), members])


class MergeStage(Stage):
    """Puts the duplicates of all units into one sorted set, and the rows that stay into one bitmap."""

    name = "merge duplicates"
    barrier = True
    splittable = True

    def __init__(self, target: Storage, output_path: str, n_input_rows: int) -> None:
        self._target, self._output_path = target, output_path
        self._selected: tuple[SelectedTask, ...] = ()
        self._n_input_rows = n_input_rows

    def units(self, upstream: Upstream) -> Sequence[Task]:
        """One unit: the whole merge."""
        self._selected = tuple(upstream.of(SelectedTask))
        models = upstream.of(CentroidsTask)
        self._n_input_rows = models[0].n_input_rows if models else self._n_input_rows
        return [Task(0, sum(task.n_duplicates for task in self._selected))]

    def scratch(self) -> tuple[str, ...]:
        """The units' parts."""
        return (join(self._output_path, "duplicates", "_work"),)

    def finish(self) -> None:
        """Remove the units' parts."""
        self._target.remove(join(self._output_path, "duplicates", "_work"))

    def memory(self, task: Task) -> int:
        """All duplicates, if they are few."""
        return 1000 * task.n_rows + (32 << 20)

    def minimum_memory(self, task: Task) -> int:
        """Ranges of the duplicates, and the bitmap."""
        return (64 << 20) + self._n_input_rows // 8

    def process(self, task: Task, context: Context) -> DuplicatesTask:
        """Merge."""
        folder = join(self._output_path, "duplicates")
        paths = [selected.duplicates_path for selected in self._selected]
        n_duplicates = 0
        files: list[str] = []
        for table in merge_sorted(self._target, paths, ["id"], context.memory):
            n_duplicates += table.num_rows
            for low in range(0, table.num_rows, _FILE_ROWS):
                files.append(join(folder, f"part-{len(files):05d}.parquet"))
                write_sorted(self._target, files[-1], table.slice(low, _FILE_ROWS), durable=True)
        if not files:
            empty = read_table(self._target, paths[0])
            files.append(join(folder, "part-00000.parquet"))
            write_sorted(self._target, files[-1], empty, durable=True)
        n_groups = self._write_groups(context)
        return DuplicatesTask(
            unit=0,
            n_rows=task.n_rows,
            files=tuple(files),
            kept_bitmap=self._write_bitmap(),
            n_kept=sum(selected.n_rows - selected.n_duplicates for selected in self._selected),
            n_duplicates=n_duplicates,
            n_groups=n_groups,
        )

    def _write_groups(self, context: Context) -> int:
        paths = [selected.groups_path for selected in self._selected]
        with naming_file(paths[0]), self._target.open(paths[0]) as source:
            id_kind = pq.read_schema(source).field("id").type
        schema = pa.schema([("group_id", pa.int64()), ("id", id_kind), ("role", pa.string()), ("score", pa.float32())])
        n_groups = 0
        with (
            self._target.writing(join(self._output_path, "groups.parquet"), durable=True) as sink,
            pq.ParquetWriter(sink, schema, compression="zstd") as writer,
        ):
            for table in merge_sorted(self._target, paths, _GROUP_KEYS, context.memory):
                heads = table["is_member"].to_numpy() == 0
                roles = pa.array(np.where(heads, "kept", "duplicate"), pa.string())
                group_id = n_groups + np.cumsum(heads) - 1
                n_groups += int(heads.sum())
                writer.write_table(
                    pa.table(
                        [pa.array(group_id), table["id"], roles, table["score"]],
                        schema=schema,
                    ),
                    row_group_size=ROW_GROUP,
                )
        return n_groups

    def _write_bitmap(self) -> str:
        if not self._n_input_rows or not all(selected.kept_rows_path for selected in self._selected):
            return ""
        bitmap = empty_bitmap(self._n_input_rows)
        paths = [selected.kept_rows_path for selected in self._selected]
        for rows in read_many(functools.partial(read_array, self._target), paths):
            set_bits(bitmap, np.asarray(rows, np.int64))
        path = join(self._output_path, "duplicates", "_kept.bits")
        self._target.write_bytes(path, bitmap.tobytes())
        return path
