"""From embeddings to a clean data set: the product's main job."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from untwin.backends import make_executor
from untwin.backends.base import Executor, Progress
from untwin.backends.ledger import Ledger
from untwin.errors import OutputExistsError, ParameterError, ResourceError
from untwin.jobs.output import OutputFolder
from untwin.jobs.parameters import RunParameters, parse_bytes
from untwin.jobs.recall import choose_probes, measure_recall
from untwin.jobs.record import (
    borders_record,
    check_every_row,
    collect,
    describe_input,
    now,
    resources,
    result_files,
    run_record,
    write_skipped,
)
from untwin.jobs.result import RunResult
from untwin.pipeline import Pipeline
from untwin.plan import Plan, make_plan
from untwin.stages import checks
from untwin.stages.assign import AssignStage
from untwin.stages.base import CompositeStage, Stage, Task, near_data
from untwin.stages.borders import Borders, BordersStage, CrossStage
from untwin.stages.duplicates import IdentifyDuplicatesStage
from untwin.stages.fit import FitStage
from untwin.stages.kmeans import KMeansStage
from untwin.stages.pairwise import PairwiseStage
from untwin.stages.removal import RemoveDuplicatesStage
from untwin.stages.repeats import RepeatsStage
from untwin.stages.sample import SampleStage
from untwin.stages.tasks import Cluster, ClustersTask, HostsTask, ProbesTask
from untwin.storage.files import Storage, join, normalize_path, real_path, redact
from untwin.storage.listing import EMBEDDED, Fields, Listing, list_inputs
from untwin.storage.lock import check_unlocked, locked, remove_dead_lock
from untwin.storage.partitions import CENTROIDS

CHOSEN = "choose-probes"
CHECKED = "check"
"""Noted in the ledger once every row was found to be kept, duplicate or rejected."""
_GROWTH = ((32, 10), (128, 8))
"""Rows a centroid, and iterations on them, before the iterations on the whole sample."""
_MAX_ITER = 10
_NEIGHBOURS = 48
"""Centroids that a row of the sample is compared with, where it is not all of them."""
_UNIT_SPREAD = 1.12
"""Clusters are grouped into units by an estimate of their rows; a unit can have so many times the rows it aims at."""
_CLUSTER_SPREAD = 4
"""The largest cluster can have so many times the rows of the mean; more is a giant cluster."""
SIDE_BYTES = 150
"""Of a row's id, metadata and results, on the disk."""


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
    executor: Executor
    done: RunResult | None
    overwrite: bool = False

    @property
    def disk_bytes(self) -> int:
        """Bytes that the output takes at its largest: vectors twice, then vectors and the rows that stay.

        Vectors that visit other clusters come in between, once for each probe.
        """
        vectors = self.plan.vector_bytes + SIDE_BYTES * self.plan.n_rows
        kept = kept_bytes(self.parameters, self.listing)
        visitors = (min(self.parameters.probes or 2, self.plan.n_clusters) - 1) * vectors
        return vectors + max(vectors, kept, visitors) + SIDE_BYTES * self.plan.n_rows

    @property
    def summary(self) -> str:
        """One line: rows, dimension, clusters, and the disk and memory that the run will take."""
        n_skipped = len(self.listing.skipped)
        skipped = f" ({n_skipped:,} more cannot be read, and are skipped)" if n_skipped else ""
        return (
            f"{self.plan.n_rows:,} rows in {self.listing.files.num_rows - n_skipped:,} files{skipped}, "
            f"dimension {self.plan.dim}, "
            f"{self.plan.n_clusters:,} clusters; up to {show_bytes(self.disk_bytes)} of disk and "
            f"{show_bytes(min(self.executor.memory, self.needed_memory))} of memory for the data"
        )

    @property
    def needed_memory(self) -> int:
        """Bytes with which every unit runs at full speed on all workers, and what is held for later stages."""
        rows = self.plan.vector_bytes + SIDE_BYTES * self.plan.n_rows + kept_bytes(self.parameters, self.listing)
        work = self.executor.workers * 5 * min(self.plan.unit_bytes, self.plan.vector_bytes) + (128 << 20)
        return work + min(self.executor.space_bytes, rows)

    def check(self) -> None:
        """Raise ResourceError if the disk or the memory budget is too small."""
        check_disk(self.folder, self.disk_bytes)
        if self.executor.memory < self.least_memory:
            raise ResourceError(
                f"memory is {show_bytes(self.executor.memory)}; this input needs at least "
                f"{show_bytes(self.least_memory)} for one unit of work; raise --memory"
            )

    @property
    def least_memory(self) -> int:
        """Bytes without which some unit cannot work."""
        return max(stage.minimum_memory(unit) for stage, unit in self._largest_units())

    def _largest_units(self) -> Iterator[tuple[Stage, Task]]:
        """Each stage with its largest unit, so far as it is known before the work: a giant cluster can be larger."""
        plan = self.plan
        largest_input = int(np.diff(self.listing.groups().starts[list(plan.input_units)]).max())
        known: dict[type[Stage], Task] = {
            SampleStage: Task(0, largest_input),
            FitStage: Task(0, plan.sample_rows),
            AssignStage: Task(0, largest_input),
            RepeatsStage: Task(0, plan.n_rows // plan.id_partitions),
        }
        n_rows = plan.n_rows if plan.n_clusters == 1 else min(plan.n_rows, int(_UNIT_SPREAD * plan.unit_rows))
        size = min(n_rows, _CLUSTER_SPREAD * plan.n_rows // plan.n_clusters)
        clusters = tuple(Cluster(number, size, ()) for number in range(min(2, plan.n_clusters)))
        group = ClustersTask(0, n_rows, plan.dim, clusters)
        known[CrossStage] = HostsTask(0, n_rows, 0, plan.dim, clusters, n_rows)
        for step in self.stages(self.parameters.probes or 2):
            for stage in step.stages() if isinstance(step, CompositeStage) else [step]:
                yield stage, known.get(type(stage), group)

    def execute(self, progress: Progress | None = None) -> RunResult:
        """Do the work, or what is left of it; or give back the result that is there.

        Raises:
            OutputInUseError: Another run works on the output.
            UntwinError: See `untwin.errors`.
        """
        folder = self.folder
        if self.done is not None and not self.to_audit and not self.to_report:
            remove_dead_lock(folder.storage, folder.path)
            return self.done
        with locked(folder.storage, folder.path):
            if self.overwrite:
                folder.clear()
            # another run may have worked here since this one was prepared
            plan, run = folder.read_same(self.parameters.answer(), self.listing)
            if run is not None:
                return self._finished(run, progress)
            with near_data(self.executor.call):
                ledger = folder.resume(known=plan is not None)
            if plan is None:
                self.listing.write(folder.storage, folder.listing_path)
                described = describe_input(self.listing, self.parameters)
                folder.write_plan(self.parameters.answer(), described, started=now(), plan=self.plan.to_json())
            return self._execute(ledger, progress)

    def _execute(self, ledger: Ledger, progress: Progress | None) -> RunResult:
        started = time.perf_counter()
        parameters, folder = self.parameters, self.folder
        first, probes, chosen = None, parameters.probes, None
        if probes is None:
            first = Pipeline("untwin run", stages=self.stages(1)[:2]).run(self.executor, progress, ledger)
            probes, chosen = self._choose_probes(collect(first, ClustersTask), ledger, progress)
        outcome = Pipeline("untwin run", stages=self.stages(probes)).run(self.executor, progress, ledger)
        if first is not None:
            reports = (*first.reports, *outcome.reports[len(first.reports) :])
            outcome = dataclasses.replace(outcome, reports=reports)
        # an audit and a report read them after the run
        intermediate = [] if parameters.audit or parameters.report else self._intermediate
        if ledger.finished(CHECKED) is None:
            self.executor.call(check_every_row, outcome, self.listing, folder)
            ledger.finish(CHECKED, (), self.listing.n_rows, intermediate)
        for path in intermediate:
            folder.storage.remove(path)
        record = run_record(
            parameters,
            self.listing,
            outcome,
            n_clusters=self.plan.n_clusters,
            resources=resources(self.executor),
        )
        record["borders"] = borders_record(outcome, probes, chosen)
        record["files"] = result_files(outcome, folder)
        record["files"]["rejected"] += write_skipped(self.listing, folder)
        if parameters.media is not None:
            record["media"] = folder.storage.read_json(folder.file(EMBEDDED))
            record["files"]["rejected"] += folder.rejected_clips()
        record["seconds"] = round(time.perf_counter() - started, 3)
        folder.abort_uploads()
        if self.executor.n_lost:
            folder.remove_temporaries()
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
    def to_report(self) -> bool:
        """Whether a report is asked for and not there yet."""
        there = self.done is not None and self.folder.storage.exists(self.folder.page_path)
        return self.parameters.report and not there

    @property
    def _intermediate(self) -> list[str]:
        """Folders to remove at the end."""
        return [self.folder.file(name) for name in ("kmeans", "pairwise")] if self.parameters.drop_intermediate else []

    def _finished(self, record: dict[str, Any], progress: Progress | None) -> RunResult:
        """The result of a run that is written; audit and report are added if they are asked for and not there yet.

        The run is written before, so that what fails here costs no more than itself.
        """
        folder = self.folder
        to_audit = self.parameters.audit and record.get("audit") is None
        to_report = self.to_report
        if to_audit:
            record["audit"] = measure_recall(folder, record, self.executor, progress=progress)
            folder.storage.write_json(folder.run_path, record)
        if to_report:
            from untwin.jobs.report import write_page

            self.executor.call(write_page, folder)
        if to_audit or to_report:
            for path in self._intermediate:
                folder.storage.remove(path)
        return RunResult.from_run(folder, record)

    def stages(self, probes: int) -> list[Stage | CompositeStage]:
        """All steps, with the parameters of this run, for a number of clusters that each row is compared with."""
        parameters, folder = self.parameters, self.folder
        kmeans = KMeansStage(
            n_clusters=self.plan.n_clusters,
            id_field=parameters.id_field,
            embedding_field=parameters.embedding_field,
            input_path=list(parameters.inputs),
            output_path=folder.file("kmeans"),
            metadata_fields=parameters.carried_fields,
            embedding_dim=parameters.embedding_dim,
            input_filetype=parameters.input_filetype,
            **_storage_kwargs(parameters),
            max_iter=_MAX_ITER,
            random_state=parameters.seed,
            init="random",
            on_repeated_id=parameters.on_repeated_id,
        )
        kmeans.fit_options["n_neighbours"] = _NEIGHBOURS
        kmeans.fit_options["growth"] = [(rows * self.plan.n_clusters, count) for rows, count in _GROWTH]
        kmeans.rejected_path = folder.file("rejected")
        kmeans.rows_wanted = parameters.eps is not None and parameters.kept != "none"
        kmeans.prepare(self.listing, self.plan)
        n_clusters = self.plan.n_clusters
        return [kmeans, *answer_stages(parameters, self.listing, folder.file("kmeans"), folder, probes, n_clusters)]


def answer_stages(
    parameters: RunParameters,
    listing: Listing,
    clusters_path: str,
    folder: OutputFolder,
    probes: int,
    n_clusters: int,
    clusters: Sequence[ClustersTask] | None = None,
) -> list[Stage | CompositeStage]:
    """The steps from clusters to the answer.

    Args:
        parameters: Of the run; without eps there is nothing after the comparison.
        listing: The input.
        clusters_path: The `kmeans/` folder.
        folder: Where the answer goes.
        probes: Clusters that each row is compared with.
        n_clusters: Number of clusters.
        clusters: The clusters, where no stage before these tells.
    """
    kwargs = _storage_kwargs(parameters)
    # rows of other clusters can change the answer: what a cluster finds by itself is set aside
    aside = parameters.probes != 1
    pairwise = PairwiseStage(
        id_field=parameters.id_field,
        embedding_field=parameters.embedding_field,
        input_path=clusters_path,
        output_path=folder.file("pairwise", "_inside") if aside else folder.file("pairwise"),
        ranking_strategy=parameters.ranking(),
        pairwise_batch_size=parameters.pairwise_batch_size,
        # without eps nothing is decided: the scores are those against every better-ranked row
        compare_to="ranked" if parameters.eps is None else parameters.compare_to,
        eps=parameters.eps,
        **kwargs,
    )
    pairwise.clusters = clusters
    if parameters.eps is None:
        return [pairwise]
    stages: list[Stage | CompositeStage] = [pairwise]
    if aside:
        centroids_path = join(clusters_path, CENTROIDS)
        borders = Borders(pairwise, folder.file("pairwise"), centroids_path, n_clusters, probes, listing.n_rows)
        stages.append(BordersStage(borders))
    identify = IdentifyDuplicatesStage(folder.path, parameters.eps, **kwargs)
    identify.n_input_rows = listing.n_rows
    stages.append(identify)
    if parameters.kept == "none":
        return stages
    remove = RemoveDuplicatesStage(
        input_path=list(parameters.inputs),
        output_path=folder.file("kept"),
        id_field=parameters.id_field,
        layout=parameters.kept,
        input_filetype=parameters.input_filetype,
        **kwargs,
    )
    remove.listing = listing
    return [*stages, remove]


def _storage_kwargs(parameters: RunParameters) -> dict[str, Any]:
    both = {"storage_options": dict(parameters.storage_options)}
    return {"read_kwargs": both, "write_kwargs": both}


def check_disk(folder: OutputFolder, needed: int) -> None:
    """Raise ResourceError if a folder's disk has less free space than is needed, UntwinError if it is read-only."""
    free = folder.storage.free_bytes(folder.path)
    if free is not None and free < needed:
        raise ResourceError(
            f"{redact(folder.path)}: the run takes up to {show_bytes(needed)} of disk, but only "
            f"{show_bytes(free)} are free; make room or choose another disk"
        )


def kept_bytes(parameters: RunParameters, listing: Listing) -> int:
    """Bytes that `kept/` takes at most."""
    return listing.n_bytes if parameters.eps is not None and parameters.kept != "none" else 0


def show_bytes(size: int) -> str:
    """A size with a unit that reads well."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{max(1, round(size / 10**6)):,} MB"


def prepare(parameters: RunParameters, executor: Executor, *, overwrite: bool = False) -> PreparedRun:
    """List the input, plan, and check everything that can be checked before the work; nothing is written.

    Raises:
        UntwinError: A user's mistake; see `untwin.errors`.
    """
    if parameters.report:
        from untwin.jobs.report import renderer

        renderer()
    storage = Storage(parameters.storage_options)
    folder = OutputFolder(storage, normalize_path(parameters.output))
    folder.check_is_folder()
    check_unlocked(storage, folder.path)
    excluded = [] if parameters.media is not None else [folder.path]
    target = real_path(folder.path)
    for path in parameters.inputs if parameters.media is None else ():
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
    listing = executor.call(
        list_inputs,
        storage,
        parameters.inputs,
        Fields(parameters.id_field, parameters.embedding_field, parameters.carried_fields),
        filetype=parameters.input_filetype,
        exclude=excluded,
        dim=parameters.embedding_dim,
        skip_bad_files=parameters.skip_bad_files,
        # what was read through once need not be again
        known=folder.known_listing(parameters.answer()) if parameters.skip_bad_files and not overwrite else None,
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
    which_to_keep: str | None = None,
    rank_by: str | None = None,
    compare_to: str = "kept",
    pairwise_batch_size: int = 1024,
    seed: int = 42,
    input_filetype: str = "parquet",
    embedding_dim: int | None = None,
    on_repeated_id: str = "error",
    skip_bad_files: bool = False,
    kept: str = "compact",
    drop_intermediate: bool = False,
    audit: bool = False,
    frames: int = 8,
    encoder: str | None = None,
    encoder_options: Mapping[str, Any] | None = None,
    pattern: str | None = None,
    timeout: float = 60.0,
    report: bool = False,
    memory: int | str | None = None,
    workers: int | None = None,
    backend: str = "local",
    ray_address: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Find near-duplicates by their embeddings, and write the data set without them.

    Args:
        input_path: Files, folders (searched recursively), globs or fsspec URLs; or a folder of videos or images, which
            are embedded first, into `embeddings/` in the output: then eps defaults to what fits the encoder, and
            `rank_by` to the best quality.
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
        which_to_keep: `hard` (outliers; the default), `easy` (central rows) or `random`.
        rank_by: Keep by columns instead, as in `"duration:desc,size_bytes:desc"`.
        compare_to: `kept`: a row is removed only because of a row that stays; `ranked`: the original SemDeDup rule.
        pairwise_batch_size: Rows compared at a time; never changes the answer.
        seed: Seed of the sample, of the start, and of `random`.
        input_filetype: `parquet`, `jsonl` or `npy`.
        embedding_dim: Wanted length of the embeddings; None takes the commonest.
        on_repeated_id: `error` or `first`, for the same id with different vectors.
        skip_bad_files: Read every file through before the run, list those that cannot be read in `rejected/`, and go
            on without them.
        kept: `compact` files of about 256 MB, `mirror` the input's files, or `none`.
        drop_intermediate: Remove `kmeans/` and `pairwise/` at the end.
        audit: Measure at the end what was missed at the borders of clusters, as `untwin.audit` does.
        frames: Of each clip; this and the next four are for folders of media, as in `untwin.embed`.
        encoder: An ONNX model; None for the built-in one.
        encoder_options: What is to be known about it.
        pattern: Only files whose name fits it.
        timeout: Seconds for each clip.
        report: Write `report.html` at the end, as `untwin.write_report` does.
        memory: Budget, as bytes or as in "4GB"; default half of the memory of the machine or container; on a cluster
            of each machine.
        workers: Most units of work at a time; default: the cores this process may use, or those of the cluster.
        backend: `local`, `ray` or `xenna`.
        ray_address: Of a running Ray cluster: `auto`, `host:port` or `ray://host:port`; default: the one in the
            environment variable RAY_ADDRESS, else one that is started on this machine.
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
        inputs=tuple(checks.paths("input_path", input_path)),
        output=checks.path("output_path", output_path),
        eps=eps,
        n_clusters=None if isinstance(n_clusters, str) else n_clusters,
        probes=None if isinstance(probes, str) else probes,
        target_recall=target_recall,
        id_field=id_field,
        embedding_field=embedding_field,
        metadata_fields=(metadata_fields,)
        if isinstance(metadata_fields, str)
        else checks.texts("metadata_fields", metadata_fields),
        which_to_keep=which_to_keep or "hard",
        rank_by=rank_by,
        compare_to=compare_to,
        pairwise_batch_size=pairwise_batch_size,
        seed=seed,
        input_filetype=input_filetype,
        embedding_dim=embedding_dim,
        on_repeated_id=on_repeated_id,
        skip_bad_files=skip_bad_files,
        kept=kept,
        drop_intermediate=drop_intermediate,
        audit=audit,
        report=report,
        storage_options=dict(storage_options or {}),
    )
    executor = make_executor(backend, workers, None if memory is None else parse_bytes(memory), ray_address)
    from untwin.jobs.embed import EmbedParameters, prepare_run

    embedding = EmbedParameters(frames, encoder, dict(encoder_options or {}), pattern, timeout)
    prepared, _ = prepare_run(
        parameters, embedding, executor, progress, overwrite=overwrite, by_quality=which_to_keep is None
    )
    assert prepared is not None  # only of a dry run it is
    return prepared.execute(progress)


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
        skip_bad_files=saved.get("skip_bad_files", False),
        kept=saved["kept"],
        drop_intermediate=saved["drop_intermediate"],
        media=saved.get("media"),
        storage_options=storage_options,
    )
