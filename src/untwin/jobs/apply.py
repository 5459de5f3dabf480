"""Another threshold on a finished run, without clustering again."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

import untwin
from untwin.backends import make_executor
from untwin.backends.base import Executor, Progress
from untwin.backends.ledger import Ledger
from untwin.core import threshold
from untwin.errors import OutputExistsError, ParameterError, ResultMismatchError
from untwin.jobs.output import OutputFolder
from untwin.jobs.parameters import RunParameters, parse_bytes
from untwin.jobs.record import (
    borders_record,
    collect,
    eps_table,
    now,
    package_versions,
    peak_memory,
    probes_of,
    resources,
    result_files,
    stage_table,
)
from untwin.jobs.result import RunResult
from untwin.jobs.run import SIDE_BYTES, answer_stages, check_disk, kept_bytes, parameters_of
from untwin.pipeline import Pipeline
from untwin.stages.base import near_data
from untwin.stages.tasks import ClustersTask, DuplicatesTask, PairsTask
from untwin.storage.files import Storage, normalize_path, redact
from untwin.storage.listing import Listing
from untwin.storage.lock import check_unlocked, locked, remove_dead_lock


def apply(
    output_path: str | os.PathLike[str],
    *,
    eps: float,
    to: str | os.PathLike[str] | None = None,
    kept: str | None = None,
    memory: int | str | None = None,
    workers: int | None = None,
    backend: str = "local",
    ray_address: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Write the answer for another eps beside a finished run. The clusters are compared again, not made again.

    Args:
        output_path: Output folder of a finished run that still has its `kmeans/`.
        eps: The threshold.
        to: Folder for the answer; default: `eps=VALUE` in `output_path`.
        kept: `compact`, `mirror` or `none`; default: as in the run.
        memory: Budget, as bytes or as in "4GB".
        workers: Most units of work at a time.
        backend: `local`, `ray` or `xenna`.
        ray_address: Of a running Ray cluster, as in `untwin.deduplicate`.
        storage_options: For fsspec.
        progress: Gets told how far the work is.

    Returns:
        The answer. If it is there already, nothing is done.

    Raises:
        UntwinError: No finished run there, its input changed, or the folder for the answer holds something else.
    """
    threshold(eps)
    storage = Storage(dict(storage_options or {}))
    executor = make_executor(backend, workers, None if memory is None else parse_bytes(memory), ray_address)
    run_folder = OutputFolder(storage, normalize_path(os.fspath(output_path)))
    run = run_folder.require_run()
    folder = OutputFolder(storage, normalize_path(os.fspath(to)) if to else run_folder.file(f"eps={float(eps)!r}"))
    parameters = dataclasses.replace(
        parameters_of(run, storage.options),
        eps=eps,
        drop_intermediate=False,
        kept=kept or run["parameters"]["kept"],
    )
    folder.check_is_folder()
    check_unlocked(storage, folder.path)
    done, _ = _existing(folder, run, parameters.answer())
    if done is not None:
        remove_dead_lock(storage, folder.path)
        return RunResult.from_run(folder, done)
    if "applied_to" in run:
        raise ParameterError(
            f"{redact(run_folder.path)}: is an answer for the run in {run['applied_to']['path']}; give that folder"
        )
    if not storage.names(run_folder.file("kmeans")):
        raise ParameterError(
            f"{redact(run_folder.path)}: has no kmeans/ any more (drop_intermediate), so rows cannot be compared; "
            f"run untwin run with --eps {eps:g} into another folder"
        )
    listing = Listing.read(storage, run_folder.listing_path)
    if parameters.kept != "none":
        executor.call(listing.check_unchanged, storage)
    probes = min(probes_of(run), run["clusters"]["n_clusters"])
    visitors = (probes - 1) * (4 * listing.dim + SIDE_BYTES) * listing.n_rows
    check_disk(folder, max(kept_bytes(parameters, listing), visitors) + 2 * SIDE_BYTES * listing.n_rows)
    with locked(storage, folder.path):
        done, begun = _existing(folder, run, parameters.answer())
        if done is not None:
            return RunResult.from_run(folder, done)
        with near_data(executor.call):
            ledger = folder.resume(known=begun)
        if not begun:
            listing.write(storage, folder.listing_path)
            folder.write_plan(parameters.answer(), run["input"], applied_to=_origin(run_folder, run))
        return _execute(run_folder, folder, run, parameters, listing, ledger, executor, progress)


def _execute(
    run_folder: OutputFolder,
    folder: OutputFolder,
    run: Mapping[str, Any],
    parameters: RunParameters,
    listing: Listing,
    ledger: Ledger,
    executor: Executor,
    progress: Progress | None,
) -> RunResult:
    started = time.perf_counter()
    storage = folder.storage
    probes = probes_of(run)
    made = Ledger(storage, run_folder.path)
    made.load(check=False)
    clusters = [task for task in made.tasks_of(ClustersTask) if task.clusters]
    n_clusters = run["clusters"]["n_clusters"]
    stages = answer_stages(parameters, listing, run_folder.file("kmeans"), folder, probes, n_clusters, clusters)
    outcome = Pipeline("untwin apply", stages=stages).run(executor, progress, ledger)
    if (run_folder.read_run() or {}).get("finished") != run["finished"]:
        raise OutputExistsError(f"{redact(run_folder.path)}: another run began there; this answer is of no use")
    (found,) = collect(outcome, DuplicatesTask)
    expected = listing.n_rows - run["rows"]["rejected"]
    if found.n_kept + found.n_duplicates != expected:
        raise ResultMismatchError(
            f"{redact(run_folder.file('kmeans'))}: holds {found.n_kept + found.n_duplicates} rows where the run "
            f"compared {expected}, so some of its files are gone; do not use {redact(folder.path)}, and run again"
        )
    record = dict(run)
    record.pop("audit", None)
    record["finished"] = now()
    record["parameters"] = parameters.answer()
    record["packages"] = package_versions()
    record["applied_to"] = _origin(run_folder, run)
    record["rows"] = {
        **run["rows"],
        "kept": found.n_kept,
        "duplicates": found.n_duplicates,
        "groups": found.n_groups,
    }
    record["resources"] = resources(executor)
    record["stages"] = stage_table(outcome)
    record["eps_table"] = eps_table(collect(outcome, PairsTask), parameters, found.n_duplicates)
    record["borders"] = borders_record(outcome, probes, (run.get("borders") or {}).get("chosen"))
    record["files"] = {**run["files"], "duplicates": result_files(outcome, folder)["duplicates"]}
    record["peak_memory_bytes"] = peak_memory()
    record["seconds"] = round(time.perf_counter() - started, 3)
    folder.abort_uploads()
    if executor.n_lost:
        folder.remove_temporaries()
    storage.write_json(folder.run_path, record)
    return RunResult.from_run(folder, record)


def _origin(run_folder: OutputFolder, run: Mapping[str, Any]) -> dict[str, Any]:
    return {"path": redact(run_folder.path), "finished": run["finished"]}


def _existing(
    folder: OutputFolder, run: Mapping[str, Any], answer: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, bool]:
    """The answer that is there already, and whether it was begun; None and False if the folder is free."""
    known = folder.read_run()
    plan = folder.storage.read_json(folder.plan_path) if folder.storage.exists(folder.plan_path) else None
    begun = known or plan
    if begun is None and not folder.foreign_names():
        return None, False
    if (
        begun is not None
        and begun.get("applied_to", {}).get("finished") == run["finished"]
        and begun["parameters"] == answer
        and (known is not None or begun.get("untwin") == untwin.__version__)
    ):
        return known, True
    names = folder.storage.names(folder.path)
    raise OutputExistsError(
        f"{redact(folder.path)}: holds something else already ({', '.join(names[:5])}); give another folder with --to, "
        "or remove that one"
    )
