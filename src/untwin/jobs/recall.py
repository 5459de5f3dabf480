"""How an audit goes: how many rows are sampled, in which passes, and what `run.json` says of the outcome."""

from __future__ import annotations

import itertools
import math
import posixpath
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from untwin.backends.base import Progress
from untwin.backends.local import LocalExecutor
from untwin.core import EPS_GRID, share_interval, threshold
from untwin.errors import ParameterError
from untwin.jobs.output import OutputFolder
from untwin.jobs.record import collect, now
from untwin.pipeline import Pipeline
from untwin.stages import checks
from untwin.stages.audit import (
    Audit,
    AuditCompareStage,
    AuditCountStage,
    AuditSampleStage,
    RecallTask,
    sample_bytes,
)
from untwin.stages.base import Upstream
from untwin.stages.pairwise import PairwiseStage
from untwin.storage.files import redact

MIN_NEIGHBOURS = 3000
MAX_SAMPLE = 200_000
MEASURES = "recall of cosine neighbours, not of human judgement"
_EPS = 0.05
"""Decides how many rows are sampled where no eps is given."""
_GROWTH = 10
_CAUTION = 0.997
_HASHES = 1 << 64


def measure_recall(
    folder: OutputFolder,
    run: Mapping[str, Any],
    executor: LocalExecutor,
    *,
    eps: float | None = None,
    seed: int | None = None,
    min_neighbours: int = MIN_NEIGHBOURS,
    max_sample: int = MAX_SAMPLE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare sampled rows of a finished run with all rows; what `run.json` holds as `audit`.

    Args:
        folder: Folder of a run, or of an answer beside it.
        run: Its `run.json`.
        executor: The backend.
        eps: Decides how many rows are sampled; default: the one in force, else 0.05.
        seed: Seed of the sample; default: that of the run.
        min_neighbours: Rows are sampled until so many have a neighbour within eps.
        max_sample: Sample no more than about so many rows.
        progress: Gets told how far the work is.

    Raises:
        ParameterError: A parameter that makes no sense, or the clusters are not there any more.
    """
    in_force = run["parameters"]["eps"]
    sizing = eps if eps is not None else in_force if in_force is not None else _EPS
    threshold(sizing)
    sizing = float(sizing)
    seed = checks.whole("seed", run["parameters"]["seed"] if seed is None else seed, 0)
    min_neighbours, max_sample = checks.whole("min_neighbours", min_neighbours), checks.whole("max_sample", max_sample)
    grid = tuple(sorted({*EPS_GRID, sizing, *([] if in_force is None else [in_force])}))
    asked = {"eps": sizing, "seed": seed, "min_neighbours": min_neighbours, "max_sample": max_sample}
    started = time.perf_counter()
    n_rows = run["rows"]["input"] - run["rows"]["rejected"]
    passes = 0
    found: list[RecallTask] = []
    by_construction = run["clusters"]["non_empty"] <= 1
    if not by_construction:
        source = _clusters_folder(folder, run)
        stage = PairwiseStage(
            run["parameters"]["id_field"],
            run["parameters"]["embedding_field"],
            source.file("kmeans"),
            folder.file("_audit"),
            read_kwargs={"storage_options": dict(folder.storage.options)},
        )
        clusters = tuple(task for task in stage.units(Upstream()))
        capacity = max(1, executor.memory // 8 // sample_bytes(clusters[0].dim, 1))
        n_rows = sum(task.n_rows for task in clusters)
        done = 0
        wanted = min(n_rows, max_sample, math.ceil(min_neighbours * 4 / 3))
        while done < wanted:
            n_parts = math.ceil((wanted - done) / capacity)
            for low, high in _parts(done, wanted, n_parts):
                job = Audit(
                    storage=folder.storage,
                    work_path=folder.file("_audit"),
                    id_field=run["parameters"]["id_field"],
                    embedding_field=run["parameters"]["embedding_field"],
                    clusters=clusters,
                    hashes=(_HASHES * low // n_rows, _HASHES * high // n_rows),
                    seed=seed,
                    eps=grid,
                    kept_bitmap="" if in_force is None else folder.file("duplicates", "_kept.bits"),
                    n_sampled=high - low,
                )
                found.append(_run_pass(job, executor, progress))
                passes += 1
            done = wanted
            n_near = sum(task.near[grid.index(sizing)] for task in found)
            wanted = _next_size(n_near, sum(task.n_rows for task in found), done, min_neighbours)
            wanted = min(n_rows, max_sample, wanted)
    return {
        "measures": MEASURES,
        "finished": now(),
        "parameters": asked,
        "rows": n_rows,
        "by_construction": by_construction,
        "sampled": sum(task.n_rows for task in found),
        "passes": passes,
        "seconds": round(time.perf_counter() - started, 3),
        "recall": _recall_rows(found, grid, n_rows),
        "answer": None if in_force is None else _answer(found, grid.index(in_force), in_force, run["rows"]["kept"]),
    }


def _clusters_folder(folder: OutputFolder, run: Mapping[str, Any]) -> OutputFolder:
    """The folder that holds the run's `kmeans/`: for an answer of `apply`, that of the run it belongs to."""
    source = folder
    if "applied_to" in run:
        made_from = run["applied_to"]
        # the folder above comes first: both may have been moved together
        places = [OutputFolder(folder.storage, path) for path in (posixpath.dirname(folder.path), made_from["path"])]
        known = [place for place in places if (place.read_run() or {}).get("finished") == made_from["finished"]]
        if not known:
            raise ParameterError(
                f"{redact(folder.path)}: is an answer for the run in {made_from['path']}, which is not there any more; "
                "its clusters are needed"
            )
        source = known[0]
    if not folder.storage.names(source.file("kmeans")):
        raise ParameterError(
            f"{redact(source.path)}: has no kmeans/ any more (drop_intermediate), so rows cannot be compared; "
            "run again with --audit, which looks before they are dropped"
        )
    return source


def _parts(low: int, high: int, n_parts: int) -> list[tuple[int, int]]:
    bounds = [low + (high - low) * part // n_parts for part in range(n_parts + 1)]
    return list(itertools.pairwise(bounds))


def _run_pass(job: Audit, executor: LocalExecutor, progress: Progress | None) -> RecallTask:
    try:
        stages: list[Any] = [AuditSampleStage(job), AuditCompareStage(job), AuditCountStage(job)]
        outcome = Pipeline("untwin audit", stages=stages).run(executor, progress)
    finally:
        job.storage.remove(job.work_path)
    (found,) = collect(outcome, RecallTask)
    task: RecallTask = found
    return task


def _next_size(n_near: int, n_sampled: int, done: int, min_neighbours: int) -> int:
    """Rows to sample in all, so that the next pass is almost surely the last; `done` if there are enough."""
    if n_near >= min_neighbours:
        return done
    at_least, _ = share_interval(n_near, n_sampled, _CAUTION)
    if at_least <= 0:
        return done * _GROWTH
    return min(done * _GROWTH, done + math.ceil((min_neighbours - n_near) / at_least))


def _share(hits: int, n: int, complete: bool) -> dict[str, Any]:
    """A share with its interval; without one where all rows were looked at."""
    if n == 0:
        return {"share": None, "low": None, "high": None}
    low, high = (hits / n, hits / n) if complete else share_interval(hits, n)
    return {"share": hits / n, "low": low, "high": high}


def _recall_rows(found: Sequence[RecallTask], grid: Sequence[float], n_rows: int) -> list[dict[str, Any]]:
    if not found:
        return [
            {"eps": eps, "with_neighbour": None, "compared": None, "recall": 1.0, "low": 1.0, "high": 1.0}
            for eps in grid
        ]
    near = np.sum([task.near for task in found], axis=0).tolist()
    compared = np.sum([task.compared for task in found], axis=0).tolist()
    complete = sum(task.n_rows for task in found) == n_rows
    rows = []
    for eps, n, hits in zip(grid, near, compared, strict=True):
        share = _share(hits, n, complete)
        row = {"eps": eps, "with_neighbour": n, "compared": hits, "recall": share["share"]}
        rows.append({**row, "low": share["low"], "high": share["high"]})
    return rows


def _answer(found: Sequence[RecallTask], at: int, eps: float, n_kept: int) -> dict[str, Any]:
    if not found:
        return {"eps": eps, "kept": None, "near_kept": None, "share": 0.0, "low": 0.0, "high": 0.0}
    kept, near = sum(task.n_kept for task in found), sum(task.near_kept[at] for task in found)
    return {"eps": eps, "kept": kept, "near_kept": near, **_share(near, kept, kept == n_kept)}
