"""What a run gives back: numbers, and the tables behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from untwin.core import is_duplicate
from untwin.errors import ParameterError
from untwin.jobs.output import OutputFolder
from untwin.storage.files import Storage, join
from untwin.storage.inputs import naming_file
from untwin.storage.partitions import result_path


@dataclass(frozen=True)
class EpsRow:
    """One line of the eps table.

    Attributes:
        eps: Threshold.
        duplicates: Rows that would be removed.
        share: `duplicates` as a share of the rows that were compared.
        exact: False where `duplicates` is an upper bound (`compare_to="kept"`, for an eps that was not run).
        examples: Pairs of this step: id, id of the row it resembles most, similarity.
    """

    eps: float
    duplicates: int
    share: float
    exact: bool
    examples: tuple[tuple[str, str, float], ...] = ()


@dataclass(frozen=True)
class StageTiming:
    """Seconds and rows a second of a stage, and how many of its units an interrupted run had done."""

    name: str
    units: int
    rows: int
    seconds: float
    rows_per_second: float
    reused: int = 0


@dataclass(frozen=True)
class RecallRow:
    """Recall at one eps, of cosine neighbours, not of human judgement.

    Attributes:
        eps: Threshold.
        with_neighbour: Sampled rows that have another row within eps; None where nothing had to be sampled.
        compared: Those of them that have such a row among the rows that they were compared with: those of their own
            cluster, and with probes of others; None as above.
        recall: `compared` as a share of `with_neighbour`; None where that is 0.
        low: Lower end of its 95 % interval; equal to `recall` where all rows were sampled.
        high: Upper end.
    """

    eps: float
    with_neighbour: int | None
    compared: int | None
    recall: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class KeptShare:
    """The share of kept rows that still have another kept row within eps, anywhere in the data set.

    Attributes:
        eps: Threshold in force.
        kept: Kept rows in the sample; None where nothing had to be sampled.
        near_kept: Those of them that have another kept row within eps; None as above.
        share: `near_kept` as a share of `kept`; None where that is 0.
        low: Lower end of its 95 % interval.
        high: Upper end.
    """

    eps: float
    kept: int | None
    near_kept: int | None
    share: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Audit:
    """What a run missed at the borders of its clusters.

    Attributes:
        eps: Decided how many rows were sampled.
        probes: Clusters that the run compared a row with, its own and the next-nearest ones.
        n_rows: Rows that were clustered.
        n_sampled: Rows sampled; 0 where there is one cluster, so that nothing can be missed.
        by_construction: Whether that is so.
        min_neighbours: Rows with a neighbour within eps that were wanted.
        recall_rows: Recall at each eps.
        answer: What is left among the kept rows; None for a run without eps.
    """

    eps: float
    probes: int
    n_rows: int
    n_sampled: int
    by_construction: bool
    min_neighbours: int
    recall_rows: tuple[RecallRow, ...]
    answer: KeptShare | None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Audit:
        """Make it of what `run.json` holds."""
        return cls(
            eps=record["parameters"]["eps"],
            probes=record.get("probes", 1),
            n_rows=record["rows"],
            n_sampled=record["sampled"],
            by_construction=record["by_construction"],
            min_neighbours=record["parameters"]["min_neighbours"],
            recall_rows=tuple(RecallRow(**row) for row in record["recall"]),
            answer=None if record["answer"] is None else KeptShare(**record["answer"]),
        )

    @property
    def complete(self) -> bool:
        """Whether every row was compared with all rows, so that the numbers are exact."""
        return self.by_construction or self.n_sampled == self.n_rows

    @property
    def enough(self) -> bool:
        """Whether as many rows with a neighbour as wanted were found, or all rows were sampled."""
        n = next(row.with_neighbour for row in self.recall_rows if row.eps == self.eps)
        return self.complete or (n is not None and n >= self.min_neighbours)


@dataclass(frozen=True)
class RunResult:
    """A finished run. Counts are of rows; paths are those of the output folder.

    Attributes:
        output_path: The output folder.
        eps: Threshold in force; None if the run stopped before the removal.
        n_rows: Rows in the input.
        n_kept: Rows that stay.
        n_duplicates: Rows that were found to be duplicates.
        n_rejected: Rows that could not be judged.
        seconds: Wall time of the run.
        peak_memory: Largest resident size of the process, in bytes.
        timings: A line for each stage.
        eps_rows: The eps table.
        run: Everything in `run.json`.
        audit: What the run missed; None if it was not measured.
    """

    output_path: str
    eps: float | None
    n_rows: int
    n_kept: int
    n_duplicates: int
    n_rejected: int
    seconds: float
    peak_memory: int
    timings: tuple[StageTiming, ...]
    eps_rows: tuple[EpsRow, ...]
    run: Mapping[str, Any] = field(repr=False)
    audit: Audit | None = None
    _storage: Storage = field(default_factory=Storage, repr=False)

    @classmethod
    def from_run(cls, folder: OutputFolder, run: Mapping[str, Any]) -> RunResult:
        """Make a result of a `run.json`."""
        rows = run["rows"]
        return cls(
            output_path=folder.path,
            eps=run["parameters"]["eps"],
            n_rows=rows["input"],
            n_kept=rows["kept"],
            n_duplicates=rows["duplicates"],
            n_rejected=rows["rejected"],
            seconds=run["seconds"],
            peak_memory=run["peak_memory_bytes"],
            timings=tuple(StageTiming(**stage) for stage in run["stages"]),
            eps_rows=tuple(
                EpsRow(
                    row["eps"],
                    row["duplicates"],
                    row["share"],
                    row["exact"],
                    tuple((pair["id"], pair["max_id"], pair["cosine_sim_score"]) for pair in row["examples"]),
                )
                for row in run["eps_table"]
            ),
            run=run,
            audit=Audit.from_record(run["audit"]) if "audit" in run else None,
            _storage=folder.storage,
        )

    @property
    def n_skipped_files(self) -> int:
        """Files that could not be read and were skipped (`skip_bad_files`); their rows count nowhere."""
        return int(self.run["input"].get("skipped_files", 0))

    @property
    def n_reused(self) -> int:
        """Units of work that were taken over from a run that was interrupted."""
        return sum(stage.reused for stage in self.timings)

    @property
    def duplicate_share(self) -> float:
        """Duplicates as a share of the input's rows."""
        return self.n_duplicates / self.n_rows if self.n_rows else 0.0

    @property
    def duplicates_path(self) -> str:
        """Folder of the duplicates."""
        return join(self.output_path, "duplicates")

    @property
    def kept_path(self) -> str:
        """Folder of the rows that stay."""
        return join(self.output_path, "kept")

    def _need_eps(self) -> None:
        if self.eps is None:
            raise ParameterError(
                f"{self.output_path}: the run had no eps, so nothing was decided; choose one and call untwin.apply"
            )

    def duplicates(self) -> pa.Table:
        """All duplicates: `id`, `kept_id`, `cosine_sim_score`, `centroid`, sorted by id."""
        self._need_eps()
        return pa.concat_tables([self._read(path, None) for path in self._duplicate_files()])

    def duplicates_of(self, kept_id: object) -> pa.Table:
        """The duplicates that were removed because of one kept row, the most similar first."""
        self._need_eps()
        files = self._duplicate_files()
        with self._storage.open(files[0]) as source:
            id_type = pq.read_schema(source).field("kept_id").type
        try:
            wanted = pa.scalar(kept_id, id_type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise ParameterError(f"kept_id is {kept_id!r}, but the ids of this run are of type {id_type}") from error
        condition = pc.field("kept_id") == wanted
        table = pa.concat_tables([self._read(path, condition) for path in files])
        return table.sort_by([("cosine_sim_score", "descending"), ("id", "ascending")])

    def kept_ids(self) -> pa.Table:
        """The ids of all rows that stay, as a table with the one column `id`, by cluster and rank."""
        self._need_eps()
        folder = join(self.output_path, "pairwise")
        parameters = self.run["parameters"]
        parts = []
        for centroid in range(self.run["clusters"]["n_clusters"]):
            path = result_path(folder, centroid)
            if not self._storage.exists(path):
                continue
            table = self._read(path, None)
            if parameters["compare_to"] == "kept":
                stays = pc.is_null(table["kept_id"])
            else:
                removed = is_duplicate(table["cosine_sim_score"].to_numpy(), float(parameters["eps"]))
                stays = pa.array(~removed)
            parts.append(table.filter(stays).select(["id"]))
        if not parts:
            raise ParameterError(
                f"{folder}: the similarities are not there any more (drop_intermediate); read the ids from kept/"
            )
        return pa.concat_tables(parts)

    def eps_table(self) -> pa.Table:
        """The eps table: `eps`, `duplicates`, `share`, `exact`."""
        rows = self.eps_rows
        return pa.table(
            {
                "eps": pa.array([row.eps for row in rows], pa.float64()),
                "duplicates": pa.array([row.duplicates for row in rows], pa.int64()),
                "share": pa.array([row.share for row in rows], pa.float64()),
                "exact": pa.array([row.exact for row in rows], pa.bool_()),
            }
        )

    def _duplicate_files(self) -> list[str]:
        return [join(self.output_path, name) for name in self.run["files"]["duplicates"]]

    def _read(self, path: str, condition: pc.Expression | None) -> pa.Table:
        with naming_file(path), self._storage.open(path) as source:
            return pq.read_table(source, filters=condition, partitioning=None)
