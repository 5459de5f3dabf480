"""Acting on a finished run, with its own threshold or another one, without clustering again."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import untwin
from untwin.backends import make_executor
from untwin.backends.base import Executor, Progress
from untwin.backends.ledger import Ledger
from untwin.core import threshold
from untwin.errors import OutputExistsError, ParameterError, ResultMismatchError
from untwin.jobs.act import MODES, ON_MEDIA, Media, Plan, plan_files, plan_list, plan_manifest
from untwin.jobs.decisions import Decisions, parse_share
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
from untwin.stages import checks
from untwin.stages.base import near_data
from untwin.stages.tasks import ClustersTask, DuplicatesTask, PairsTask
from untwin.storage.files import Storage, normalize_path, redact
from untwin.storage.listing import Listing
from untwin.storage.lock import check_unlocked, locked, remove_dead_lock


@dataclass(frozen=True)
class Application:
    """An answer that is there, and what is to be done with it.

    Attributes:
        answer: The answer; for `parquet` it may lack `kept/` until `execute`.
        plan: What is to be done; None where that was to make the answer.
    """

    answer: RunResult
    plan: Plan | None
    _write_kept: Callable[[Progress | None], RunResult] | None = None

    def execute(self, progress: Progress | None = None) -> tuple[RunResult, tuple[str, ...]]:
        """Do it; the answer, and what was done, in words."""
        answer = self.answer if self._write_kept is None else self._write_kept(progress)
        return answer, self.plan.execute(progress) if self.plan is not None else ()


def apply(
    output_path: str | os.PathLike[str],
    *,
    eps: float | None = None,
    mode: str = "parquet",
    to: str | os.PathLike[str] | None = None,
    kept: str | None = None,
    media: str | os.PathLike[str] | None = None,
    path_field: str | None = None,
    skip_missing: bool = False,
    max_removed: str | float | None = None,
    group_by: str | None = None,
    memory: int | str | None = None,
    workers: int | None = None,
    backend: str = "local",
    ray_address: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Act on the answer for an eps: write the data set without duplicates, or list, link, copy or move media by it.

    The answer is that of the run itself if this eps is in force there, else one beside it, in `eps=VALUE/`. The
    clusters are compared again for it, not made again. Media are never deleted and never overwritten.

    Args:
        output_path: Output folder of a finished run; for another eps it must still have its `kmeans/`.
        eps: The threshold; default: the one in force in the run.
        mode: `parquet`: the filtered data set; `list`: ids as text; `link`, `copy`: media of the rows that stay into
            a folder; `move`: media of duplicates into a folder, see `untwin.undo`; `manifest`: objects on S3 to remove.
        to: For `parquet` the folder for the whole answer; default: as above. For `list` and `manifest` the folder for
            their files; default: that of the answer. For `link` and `copy` the folder for the media; for `move` too,
            default: beside the media, with `-duplicates` added to its name.
        kept: For `parquet`: `compact`, `mirror` or `none`; default: as in the run.
        media: Folder of the media; default: the clips that the run was made of.
        path_field: Column of the input with their paths, relative to `media` or absolute; default: found by id.
        skip_missing: Go on although some rows have no file.
        max_removed: Largest share of the compared rows that may be removed, as `"15%"` or 0.15; else nothing is done.
        group_by: Column of the input; `max_removed` then holds for the rows of each of its values, too.
        memory: Budget, as bytes or as in "4GB".
        workers: Most units of work at a time.
        backend: `local`, `ray` or `xenna`.
        ray_address: Of a running Ray cluster, as in `untwin.deduplicate`.
        storage_options: For fsspec.
        progress: Gets told how far the work is.

    Returns:
        The answer. What is there or done already is not done again.

    Raises:
        TooManyRemovedError: More than `max_removed` would be removed.
        UntwinError: No finished run there, its input changed, or a folder holds something else.
    """
    application = prepare_apply(
        output_path,
        eps=eps,
        mode=mode,
        to=to,
        kept=kept,
        media=media,
        path_field=path_field,
        skip_missing=skip_missing,
        max_removed=max_removed,
        group_by=group_by,
        executor=make_executor(backend, workers, None if memory is None else parse_bytes(memory), ray_address),
        storage=Storage(dict(storage_options or {})),
        progress=progress,
    )
    return application.execute(progress)[0]


def prepare_apply(
    output_path: str | os.PathLike[str],
    *,
    eps: float | None,
    mode: str,
    to: str | os.PathLike[str] | None,
    kept: str | None,
    media: str | os.PathLike[str] | None,
    path_field: str | None,
    skip_missing: bool,
    max_removed: str | float | None,
    group_by: str | None,
    executor: Executor,
    storage: Storage,
    progress: Progress | None,
    dry_run: bool = False,
) -> Application:
    """Find or make the answer, and plan what to do with it; nothing but the answer is written.

    Args: as those of `apply`; with `dry_run` the answer gets no `kept/`.
    """
    if eps is not None:
        threshold(eps)
    checks.one_of("mode", mode, MODES)
    limit = parse_share("max_removed", max_removed)
    if group_by is not None and limit is None:
        raise ParameterError(f"group_by is {group_by!r} without max_removed; give the share that each group may lose")
    if mode not in ON_MEDIA and (media is not None or path_field is not None or skip_missing):
        raise ParameterError(
            f"--media, --path-field and --skip-missing say where media are, but mode {mode!r} does not look at them; "
            "leave them out"
        )
    place = normalize_path(os.fspath(to)) if to else None
    run_folder = OutputFolder(storage, normalize_path(os.fspath(output_path)))
    run = run_folder.require_run()
    eps = run["parameters"]["eps"] if eps is None else eps
    if eps is None:
        raise ParameterError(f"{redact(run_folder.path)}: the run had no eps; choose one with --eps")
    media = media or run["parameters"].get("media")
    if media is None and mode in ON_MEDIA:
        raise ParameterError(f"mode is {mode!r} without media; give their folder with --media")
    wanted = (kept or run["parameters"]["kept"]) if mode == "parquet" else "none"
    # what --max-removed stops must not be written before
    first = wanted if limit is None and not dry_run else "none"
    elsewhere = place if mode == "parquet" else None
    answer = _find_answer(run_folder, run, eps, elsewhere, first, wanted, executor, progress)
    decisions = Decisions(answer, _origin_folder(run_folder, run))
    if limit is not None:
        decisions.check_removed(limit, group_by)
    if mode == "parquet":
        if first == wanted or dry_run:
            return Application(answer, None)
        return Application(
            answer, None, lambda said: _find_answer(run_folder, run, eps, elsewhere, wanted, wanted, executor, said)
        )
    if mode == "list":
        return Application(answer, plan_list(decisions, place or answer.output_path))
    assert media is not None
    files = Media(os.fspath(media), path_field, skip_missing)
    if mode == "manifest":
        return Application(answer, plan_manifest(decisions, files, place or answer.output_path))
    return Application(answer, plan_files(decisions, mode, files, place))


def _find_answer(
    run_folder: OutputFolder,
    run: Mapping[str, Any],
    eps: float,
    to: str | None,
    kept: str,
    wanted: str,
    executor: Executor,
    progress: Progress | None,
) -> RunResult:
    """The answer for an eps, made if it is not there.

    Args:
        run_folder: The run.
        run: Its `run.json`.
        eps: The threshold.
        to: The folder for the answer, if it is to be just there.
        kept: What the answer must have; `none`: it may have `kept/` or not.
        wanted: What it is to have in the end; an answer that has something else is not taken.
        executor: The backend.
        progress: Gets told how far the work is.
    """
    storage = run_folder.storage
    if to is None and run["parameters"]["eps"] == eps and _has(run_folder, run, wanted):
        remove_dead_lock(storage, run_folder.path)
        return RunResult.from_run(run_folder, run)
    folder = OutputFolder(storage, to or run_folder.file(f"eps={float(eps)!r}"))
    parameters = dataclasses.replace(
        parameters_of(run, storage.options),
        eps=eps,
        drop_intermediate=False,
        kept=kept,
    )
    folder.check_is_folder()
    check_unlocked(storage, folder.path)
    done, _ = _existing(folder, run, parameters.answer(), wanted)
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
        done, begun = _existing(folder, run, parameters.answer(), wanted)
        if done is not None:
            return RunResult.from_run(folder, done)
        with near_data(executor.call):
            ledger = folder.resume(known=begun)
        if not begun:
            listing.write(storage, folder.listing_path)
        if not begun or _planned(folder)["parameters"]["kept"] == "none" != kept:
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


def _origin_folder(run_folder: OutputFolder, run: Mapping[str, Any]) -> OutputFolder:
    """The folder of the run that lists the input; for an answer that a user gave it is not its own."""
    if "applied_to" not in run:
        return run_folder
    return OutputFolder(run_folder.storage, run["applied_to"]["path"])


def _has(folder: OutputFolder, run: Mapping[str, Any], kept: str) -> bool:
    """Whether a finished answer has the rows that stay in the layout wanted."""
    made = run["parameters"]["kept"]
    return kept == "none" or (
        made == kept and (not run["rows"]["kept"] or bool(folder.storage.names(folder.file("kept"))))
    )


def _planned(folder: OutputFolder) -> dict[str, Any]:
    plan: dict[str, Any] = folder.storage.read_json(folder.plan_path)
    return plan


def _existing(
    folder: OutputFolder, run: Mapping[str, Any], answer: Mapping[str, Any], wanted: str
) -> tuple[dict[str, Any] | None, bool]:
    """The answer that is there already, and whether it was begun; None and False if the folder is free.

    An answer without `kept/` can get it, so it counts as begun where that is wanted.

    Args:
        folder: Where it may be.
        run: The `run.json` of the run.
        answer: The parameters, with what must be there as `kept`.
        wanted: What is to be there in the end.
    """
    known = folder.read_run()
    plan = _planned(folder) if folder.storage.exists(folder.plan_path) else None
    begun = plan or known
    if begun is None and not folder.foreign_names():
        return None, False
    if (
        begun is not None
        and begun.get("applied_to", {}).get("finished") == run["finished"]
        and {**begun["parameters"], "kept": None} == {**answer, "kept": None}
        and (wanted == "none" or begun["parameters"]["kept"] in ("none", wanted))
    ):
        if known is not None and answer["kept"] in ("none", known["parameters"]["kept"]):
            return known, True
        if begun.get("untwin") == untwin.__version__:
            return None, True
    names = folder.storage.names(folder.path)
    raise OutputExistsError(
        f"{redact(folder.path)}: holds something else already ({', '.join(names[:5])}); give another folder with --to, "
        "or remove that one"
    )
