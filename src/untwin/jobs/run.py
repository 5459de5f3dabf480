"""From embeddings to a clean data set: the product's main job."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from untwin.backends.base import Progress
from untwin.backends.ledger import Ledger
from untwin.backends.local import LocalExecutor
from untwin.errors import OutputExistsError, ParameterError, ResourceError
from untwin.jobs.output import OutputFolder
from untwin.jobs.parameters import RunParameters, parse_bytes
from untwin.jobs.recall import choose_probes, measure_recall
from untwin.jobs.record import borders_record, check_every_row, collect, describe_input, now, result_files, run_record
from untwin.jobs.result import RunResult
from untwin.pipeline import Pipeline
from untwin.plan import Plan, make_plan
from untwin.stages.borders import Borders, BordersStage
from untwin.stages.duplicates import IdentifyDuplicatesStage
from untwin.stages.kmeans import KMeansStage
from untwin.stages.pairwise import PairwiseStage
from untwin.stages.removal import RemoveDuplicatesStage
from untwin.stages.tasks import ClustersTask, ProbesTask
from untwin.storage.files import Storage, normalize_path, real_path, redact
from untwin.storage.listing import Fields, Listing, list_inputs
from untwin.storage.lock import check_unlocked, locked
from untwin.storage.partitions import CENTROIDS

CHOSEN = "choose-probes"
CHECKED = "check"
"""Noted in the ledger once every row was found to be kept, duplicate or rejected."""
_MAX_ITER = 20
_SIDE_BYTES = 150
BACKENDS = ("local",)


@dataclass(frozen=True)
class PreparedRun:
    """A run that is planned and checked, but not begun.

    Attributes:
        parameters: What was asked.
        listing: The input.
        plan: What will be done.
        folder: The output.
        executor: The backend.
        done: The result, if the output holds just this run already.
        overwrite: Remove an earlier run first.
    """

    parameters: RunParameters
    listing: Listing
    plan: Plan
    folder: OutputFolder
    executor: LocalExecutor
    done: RunResult | None
    overwrite: bool = False

    @property
    def disk_bytes(self) -> int:
        """Bytes that the output takes at its largest: vectors twice, then vectors and the rows that stay.

        Vectors that visit other clusters come in between, once for each probe.
        """
        vectors = self.plan.vector_bytes + _SIDE_BYTES * self.plan.n_rows
        kept = self.listing.n_bytes if self.parameters.eps is not None and self.parameters.kept != "none" else 0
        visitors = ((self.parameters.probes or 2) - 1) * vectors
        return vectors + max(vectors, kept, visitors) + _SIDE_BYTES * self.plan.n_rows

    @property
    def summary(self) -> str:
        """One line: rows, dimension, clusters, and the disk and memory that the run will take."""
        return (
            f"{self.plan.n_rows:,} rows in {self.listing.files.num_rows:,} files, dimension {self.plan.dim}, "
            f"{self.plan.n_clusters:,} clusters; up to {show_bytes(self.disk_bytes)} of disk and "
            f"{show_bytes(min(self.executor.memory, self.needed_memory))} of memory for the data"
        )

    @property
    def needed_memory(self) -> int:
        """Bytes with which every unit runs at full speed on all workers."""
        return self.executor.workers * 5 * min(self.plan.unit_bytes, self.plan.vector_bytes) + (128 << 20)

    def check(self) -> None:
        """Raise ResourceError if the disk or the memory budget is too small."""
        free = self.folder.storage.free_bytes(self.folder.path)
        if free is not None and free < self.disk_bytes:
            raise ResourceError(
                f"{redact(self.folder.path)}: the run takes up to {show_bytes(self.disk_bytes)} of disk, but only "
                f"{show_bytes(free)} are free; make room or choose another disk"
            )
        plan = self.plan
        # what the stages ask for, so far as it is known before the work; a giant cluster can need more
        least = max(
            int(2.8 * min(plan.unit_bytes, plan.vector_bytes)) + (64 << 20),
            100 << 20,
            120 * (plan.n_rows // plan.id_partitions) + (20 << 20),
            24 * plan.dim * plan.n_clusters + 40 * plan.sample_rows + (32 << 20),
        )
        if self.executor.memory < least:
            raise ResourceError(
                f"memory is {show_bytes(self.executor.memory)}; this input needs at least {show_bytes(least)} "
                "for one unit of work; raise --memory"
            )

    def execute(self, progress: Progress | None = None) -> RunResult:
        """Do the work, or what is left of it; or give back the result that is there.

        Raises:
            OutputInUseError: Another run works on the output.
            UntwinError: See `untwin.errors`.
        """
        if self.done is not None and not self.to_audit:
            return self.done
        folder = self.folder
        with locked(folder.storage, folder.path):
            if self.overwrite:
                folder.clear()
            # another run may have worked here since this one was prepared
            plan, run = folder.read_same(self.parameters.answer(), self.listing)
            if run is not None:
                return self._finished(run, progress)
            ledger = folder.resume(known=plan is not None)
            if plan is None:
                self.listing.write(folder.storage, folder.listing_path)
                described = describe_input(self.listing, self.parameters)
                folder.write_plan(self.parameters.answer(), described, started=now(), plan=self.plan.to_json())
            return self._execute(ledger, progress)

    def _execute(self, ledger: Ledger, progress: Progress | None) -> RunResult:
        started = time.perf_counter()
        parameters, folder = self.parameters, self.folder
        kmeans, pairwise = self.stages()
        stages: list[Any] = [kmeans, pairwise]
        first, probes, chosen = None, parameters.probes, None
        if probes is None:
            first = Pipeline("untwin run", stages=stages).run(self.executor, progress, ledger)
            probes, chosen = self._choose_probes(collect(first, ClustersTask), ledger, progress)
        if pairwise.output_path != folder.file("pairwise"):
            stages.append(borders_stage(pairwise, folder, folder, probes, self.listing.n_rows))
        kwargs = {"storage_options": dict(parameters.storage_options)}
        if parameters.eps is not None:
            stages.append(IdentifyDuplicatesStage(folder.path, parameters.eps, read_kwargs=kwargs, write_kwargs=kwargs))
            if parameters.kept != "none":
                stages.append(removal_stage(parameters, self.listing, folder))
        outcome = Pipeline("untwin run", stages=stages).run(self.executor, progress, ledger)
        if first is not None:
            reports = (*first.reports, *outcome.reports[len(first.reports) :])
            outcome = dataclasses.replace(outcome, reports=reports)
        intermediate = [] if parameters.audit else self._intermediate
        if ledger.finished(CHECKED) is None:
            check_every_row(outcome, self.listing, folder)
            ledger.finish(CHECKED, (), self.listing.n_rows, intermediate)
        for path in intermediate:
            folder.storage.remove(path)
        record = run_record(
            parameters,
            self.listing,
            outcome,
            n_clusters=self.plan.n_clusters,
            resources={
                "backend": "local",
                "workers": self.executor.workers,
                "memory_bytes": self.executor.memory,
            },
        )
        record["borders"] = borders_record(outcome, probes, chosen)
        record["files"] = result_files(outcome, folder)
        record["seconds"] = round(time.perf_counter() - started, 3)
        folder.storage.write_json(folder.run_path, record)
        return self._finished(record, progress)

    def _choose_probes(
        self, clusters: Sequence[ClustersTask], ledger: Ledger, progress: Progress | None
    ) -> tuple[int, dict[str, Any]]:
        """The number of probes that reaches the target recall, and what it follows from; measured once."""
        known = ledger.finished(CHOSEN)
        if known is not None:
            (task,) = known.tasks[0]
            assert isinstance(task, ProbesTask)
            return task.probes, json.loads(task.facts)
        parameters, folder = self.parameters, self.folder
        assert parameters.eps is not None
        probes, facts = choose_probes(
            folder,
            clusters,
            self.executor,
            centroids_path=folder.file("kmeans", CENTROIDS),
            id_field=parameters.id_field,
            embedding_field=parameters.embedding_field,
            eps=parameters.eps,
            target_recall=parameters.target_recall,
            seed=parameters.seed,
            progress=progress,
        )
        ledger.finish(CHOSEN, [[ProbesTask(0, self.listing.n_rows, probes, json.dumps(facts))]], self.listing.n_rows)
        return probes, facts

    @property
    def to_audit(self) -> bool:
        """Whether an audit is asked for and not there yet."""
        return self.parameters.audit and (self.done is None or self.done.audit is None)

    @property
    def _intermediate(self) -> list[str]:
        """Folders to remove at the end."""
        return [self.folder.file(name) for name in ("kmeans", "pairwise")] if self.parameters.drop_intermediate else []

    def _finished(self, record: dict[str, Any], progress: Progress | None) -> RunResult:
        """The result of a run that is written; an audit is added if it is asked for and not there yet.

        The run is written before its audit, so that an audit that fails costs no more than itself.
        """
        folder = self.folder
        if self.parameters.audit and record.get("audit") is None:
            record["audit"] = measure_recall(folder, record, self.executor, progress=progress)
            folder.storage.write_json(folder.run_path, record)
            for path in self._intermediate:
                folder.storage.remove(path)
        return RunResult.from_run(folder, record)

    def stages(self) -> tuple[KMeansStage, PairwiseStage]:
        """The first two steps, with the parameters of this run."""
        parameters, folder = self.parameters, self.folder
        kwargs = {"storage_options": dict(parameters.storage_options)}
        kmeans = KMeansStage(
            n_clusters=self.plan.n_clusters,
            id_field=parameters.id_field,
            embedding_field=parameters.embedding_field,
            input_path=list(parameters.inputs),
            output_path=folder.file("kmeans"),
            metadata_fields=parameters.carried_fields,
            embedding_dim=parameters.embedding_dim,
            input_filetype=parameters.input_filetype,
            read_kwargs=kwargs,
            write_kwargs=kwargs,
            max_iter=_MAX_ITER,
            random_state=parameters.seed,
            init="random",
            on_repeated_id=parameters.on_repeated_id,
        )
        kmeans.rejected_path = folder.file("rejected")
        kmeans.prepare(self.listing, self.plan)
        pairwise = PairwiseStage(
            id_field=parameters.id_field,
            embedding_field=parameters.embedding_field,
            input_path=folder.file("kmeans"),
            output_path=pairwise_folder(folder, parameters.probes),
            ranking_strategy=parameters.ranking(),
            pairwise_batch_size=parameters.pairwise_batch_size,
            read_kwargs=kwargs,
            write_kwargs=kwargs,
            compare_to=parameters.compare_to,
            eps=parameters.eps,
        )
        return kmeans, pairwise


def pairwise_folder(folder: OutputFolder, probes: int | None) -> str:
    """Where the rows of each cluster are compared: aside, if rows of other clusters can change the answer."""
    return folder.file("pairwise") if probes == 1 else folder.file("pairwise", "_inside")


def borders_stage(
    pairwise: PairwiseStage, folder: OutputFolder, clusters: OutputFolder, probes: int, n_input_rows: int
) -> BordersStage:
    """The stage that compares rows across the borders of the clusters that are in a folder."""
    centroids_path = clusters.file("kmeans", CENTROIDS)
    return BordersStage(Borders(pairwise, folder.file("pairwise"), centroids_path, probes, n_input_rows))


def removal_stage(parameters: RunParameters, listing: Listing, folder: OutputFolder) -> RemoveDuplicatesStage:
    """The stage that writes `kept/`, reading the files of a listing."""
    kwargs = {"storage_options": dict(parameters.storage_options)}
    stage = RemoveDuplicatesStage(
        input_path=list(parameters.inputs),
        output_path=folder.file("kept"),
        id_field=parameters.id_field,
        layout="mirror" if parameters.kept == "mirror" else "compact",
        input_filetype=parameters.input_filetype,
        read_kwargs=kwargs,
        write_kwargs=kwargs,
    )
    stage.listing = listing
    return stage


def show_bytes(size: int) -> str:
    """A size with a unit that reads well."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{max(1, round(size / 10**6)):,} MB"


def make_executor(backend: str, workers: int | None, memory: int | None) -> LocalExecutor:
    """The backend of a name.

    Raises:
        ParameterError: No such backend.
    """
    if backend not in BACKENDS:
        raise ParameterError(f"backend is {backend!r}; known are {', '.join(BACKENDS)}")
    return LocalExecutor(workers, memory)


def prepare(parameters: RunParameters, executor: LocalExecutor, *, overwrite: bool = False) -> PreparedRun:
    """List the input, plan, and check everything that can be checked before the work; nothing is written.

    Raises:
        UntwinError: A user's mistake; see `untwin.errors`.
    """
    storage = Storage(parameters.storage_options)
    folder = OutputFolder(storage, normalize_path(parameters.output))
    folder.check_is_folder()
    check_unlocked(storage, folder.path)
    excluded = [folder.path]
    target = real_path(folder.path)
    for path in parameters.inputs:
        given = normalize_path(path)
        real = real_path(given)
        if target.startswith(real.rstrip("/") + "/"):
            excluded.append(given.rstrip("/") + target[len(real.rstrip("/")) :])
        if real == target:
            raise OutputExistsError(f"{redact(folder.path)}: is both input and output; choose another output folder")
        if real.startswith(target.rstrip("/") + "/"):
            raise OutputExistsError(
                f"{redact(given)}: the input lies inside the output {redact(folder.path)}; choose another output folder"
            )
    listing = list_inputs(
        storage,
        parameters.inputs,
        Fields(parameters.id_field, parameters.embedding_field, parameters.carried_fields),
        filetype=parameters.input_filetype,
        exclude=excluded,
        dim=parameters.embedding_dim,
    )
    parameters.ranking().check_types(dict(zip(parameters.carried_fields, listing.metadata_types, strict=True)))
    plan = make_plan(listing.groups().rows, dim=listing.dim, n_clusters=parameters.n_clusters)
    known = run = None
    if overwrite:
        folder.check_clearable()
    else:
        known, run = folder.read_same(parameters.answer(), listing)
    if known is not None:
        plan = Plan.from_json(known["plan"])
    done = RunResult.from_run(folder, run) if run is not None else None
    prepared = PreparedRun(parameters, listing, plan, folder, executor, done, overwrite)
    if done is None:
        prepared.stages()
        prepared.check()
    return prepared


def deduplicate(
    input_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_path: str | os.PathLike[str],
    *,
    eps: float | None = None,
    n_clusters: int | str | None = "auto",
    probes: int | str | None = 1,
    target_recall: float = 0.999,
    id_field: str = "id",
    embedding_field: str = "embedding",
    metadata_fields: Sequence[str] = (),
    which_to_keep: str = "hard",
    rank_by: str | None = None,
    compare_to: str = "kept",
    pairwise_batch_size: int = 1024,
    seed: int = 42,
    input_filetype: str = "parquet",
    embedding_dim: int | None = None,
    on_repeated_id: str = "error",
    kept: str = "compact",
    drop_intermediate: bool = False,
    audit: bool = False,
    memory: int | str | None = None,
    workers: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Find near-duplicates by their embeddings, and write the data set without them.

    Args:
        input_path: Files, folders (searched recursively), globs or fsspec URLs.
        output_path: Folder for everything that is written; see the README for what it holds.
        eps: A row is a duplicate when its cosine similarity to a kept row is at least 1 - eps. None stops before the
            removal: look at `eps_table()`, then call `untwin.apply`.
        n_clusters: Number of clusters; "auto" chooses it from the number of rows.
        probes: Compare each row with its own and the next-nearest clusters, so many in all; needs an eps. "auto"
            chooses it from a sample, to reach `target_recall`.
        target_recall: For probes="auto": of the rows with a neighbour within eps, the share whose neighbour is to be
            compared.
        id_field: Column of ids.
        embedding_field: Column of embeddings: lists of float16, float32 or float64.
        metadata_fields: Columns to carry into `kmeans/`.
        which_to_keep: `hard` (outliers), `easy` (central rows) or `random`.
        rank_by: Keep by columns instead, as in `"duration:desc,size_bytes:desc"`.
        compare_to: `kept`: a row is removed only because of a row that stays; `ranked`: the original SemDeDup rule.
        pairwise_batch_size: Rows compared at a time; never changes the answer.
        seed: Seed of the sample, of the start, and of `random`.
        input_filetype: `parquet`, `jsonl` or `npy`.
        embedding_dim: Wanted length of the embeddings; None takes the commonest.
        on_repeated_id: `error` or `first`, for the same id with different vectors.
        kept: `compact` files of about 256 MB, `mirror` the input's files, or `none`.
        drop_intermediate: Remove `kmeans/` and `pairwise/` at the end.
        audit: Measure at the end what was missed at the borders of clusters, as `untwin.audit` does.
        memory: Budget, as bytes or as in "4GB"; default 4 GiB, at most half of the machine's memory.
        workers: Threads; default: the cores this process may use.
        storage_options: For fsspec, input and output alike; never written or shown.
        overwrite: Remove an earlier run in `output_path` first.
        progress: Gets told how far the work is.

    Returns:
        Counts, timings and paths, with methods that read the tables.

    Raises:
        UntwinError: A user's mistake, or damaged input; see `untwin.errors`.
    """
    if isinstance(n_clusters, str) and n_clusters != "auto":
        raise ParameterError(f"n_clusters is {n_clusters!r}; it must be a number or 'auto'")
    if isinstance(probes, str) and probes != "auto":
        raise ParameterError(f"probes is {probes!r}; it must be a number or 'auto'")
    parameters = RunParameters(
        inputs=(os.fspath(input_path),)
        if isinstance(input_path, str | os.PathLike)
        else tuple(os.fspath(path) for path in input_path),
        output=os.fspath(output_path),
        eps=eps,
        n_clusters=None if isinstance(n_clusters, str) else n_clusters,
        probes=None if isinstance(probes, str) else probes,
        target_recall=target_recall,
        id_field=id_field,
        embedding_field=embedding_field,
        metadata_fields=(metadata_fields,) if isinstance(metadata_fields, str) else tuple(metadata_fields),
        which_to_keep=which_to_keep,
        rank_by=rank_by,
        compare_to=compare_to,
        pairwise_batch_size=pairwise_batch_size,
        seed=seed,
        input_filetype=input_filetype,
        embedding_dim=embedding_dim,
        on_repeated_id=on_repeated_id,
        kept=kept,
        drop_intermediate=drop_intermediate,
        audit=audit,
        storage_options=dict(storage_options or {}),
    )
    executor = make_executor("local", workers, None if memory is None else parse_bytes(memory))
    return prepare(parameters, executor, overwrite=overwrite).execute(progress)


def parameters_of(run: Mapping[str, Any], storage_options: Mapping[str, Any]) -> RunParameters:
    """The parameters that a `run.json` was made with."""
    saved = run["parameters"]
    return RunParameters(
        inputs=tuple(saved["input_path"]),
        output="",
        eps=saved["eps"],
        n_clusters=None if saved["n_clusters"] == "auto" else saved["n_clusters"],
        probes=None if saved.get("probes", 1) == "auto" else saved.get("probes", 1),
        target_recall=saved.get("target_recall") or 0.999,
        id_field=saved["id_field"],
        embedding_field=saved["embedding_field"],
        metadata_fields=tuple(saved["metadata_fields"]),
        which_to_keep=saved["which_to_keep"] or "hard",
        rank_by=saved["rank_by"],
        compare_to=saved["compare_to"],
        seed=saved["seed"],
        input_filetype=saved["input_filetype"],
        embedding_dim=saved["embedding_dim"],
        on_repeated_id=saved["on_repeated_id"],
        kept=saved["kept"],
        drop_intermediate=saved["drop_intermediate"],
        storage_options=storage_options,
    )
