"""How an audit goes: how many rows are sampled, in which passes, and what `run.json` says of the outcome."""

from __future__ import annotations

import itertools
import math
import posixpath
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from untwin.backends.base import Executor, Progress
from untwin.core import EPS_GRID, mix_seed, share_interval, threshold
from untwin.errors import ParameterError
from untwin.jobs.output import OutputFolder
from untwin.jobs.record import collect, now, probes_of
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
from untwin.stages.clustering import PROBES_SEED
from untwin.stages.pairwise import PairwiseStage
from untwin.stages.tasks import ClustersTask
from untwin.storage.files import redact
from untwin.storage.partitions import CENTROIDS, read_array

MIN_NEIGHBOURS = 3000
MAX_SAMPLE = 200_000
MAX_PROBES = 16
"""The most that `choose_probes` looks at."""
MEASURES = "recall of cosine neighbours, not of human judgement"
_EPS = 0.05
"""Decides how many rows are sampled where no eps is given."""
_GROWTH = 10
_CAUTION = 0.997
_TWO_SIDED = 0.90
"""Confidence of an interval whose lower end alone is exceeded with 95 %."""
_HASHES = 1 << 64


def measure_recall(
    folder: OutputFolder,
    run: Mapping[str, Any],
    executor: Executor,
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
    probes = probes_of(run)
    if probes > 1 and sizing > in_force:
        raise ParameterError(
            f"eps is {sizing}; rows of different clusters (probes {probes}) were compared only within eps {in_force}, "
            "the one in force; give at most that"
        )
    grid = tuple(sorted({*EPS_GRID, sizing, *([] if in_force is None else [in_force])}))
    if probes > 1:
        grid = tuple(value for value in grid if value <= in_force)
    asked = {"eps": sizing, "seed": seed, "min_neighbours": min_neighbours, "max_sample": max_sample}
    started = time.perf_counter()
    n_rows = run["rows"]["input"] - run["rows"]["rejected"]
    found = _Found(n_rows)
    by_construction = run["clusters"]["non_empty"] <= 1
    if not by_construction:
        source = _clusters_folder(folder, run)
        id_field, embedding_field = run["parameters"]["id_field"], run["parameters"]["embedding_field"]
        stage = PairwiseStage(
            id_field,
            embedding_field,
            source.file("kmeans"),
            folder.file("_audit"),
            read_kwargs={"storage_options": dict(folder.storage.options)},
        )
        job = _job(
            folder,
            tuple(executor.call(stage.units, Upstream())),
            id_field=id_field,
            embedding_field=embedding_field,
            seed=seed,
            eps=grid,
            n_levels=probes,
            centroids_path=source.file("kmeans", CENTROIDS),
            kept_bitmap="" if in_force is None else folder.file("duplicates", "_kept.bits"),
        )
        found = _sample(job, executor, grid.index(sizing), min_neighbours, max_sample, progress)
    return {
        "measures": MEASURES,
        "finished": now(),
        "parameters": asked,
        "probes": probes,
        "rows": found.n_rows,
        "by_construction": by_construction,
        "sampled": found.n_sampled,
        "passes": len(found.passes),
        "seconds": round(time.perf_counter() - started, 3),
        "recall": _recall_rows(found, grid),
        "answer": None if in_force is None else _answer(found, grid.index(in_force), in_force, run["rows"]["kept"]),
    }


def choose_probes(
    folder: OutputFolder,
    clusters: Sequence[ClustersTask],
    executor: Executor,
    *,
    centroids_path: str,
    id_field: str,
    embedding_field: str,
    eps: float,
    target_recall: float,
    seed: int,
    min_neighbours: int = MIN_NEIGHBOURS,
    max_sample: int = MAX_SAMPLE,
    progress: Progress | None = None,
) -> tuple[int, dict[str, Any]]:
    """Find how many clusters each row has to be compared with, so that few neighbours are missed.

    Sampled rows are compared with all rows, as for an audit; but not the same rows as for the run's audit, which would
    then be too favourable. The choice is the smallest number of probes whose recall is at least the target with 95 %
    confidence. If there is none up to `MAX_PROBES`, or the sample is too small to tell: the smallest with the largest
    recall in the sample.

    Args:
        folder: Folder of the run.
        clusters: All clusters, in groups.
        executor: The backend.
        centroids_path: The centroids, (K, D) float32.
        id_field: Column of ids in the clusters.
        embedding_field: Column of vectors.
        eps: Threshold in force.
        target_recall: Wanted recall, in (0, 1).
        seed: Seed of the run.
        min_neighbours: Rows are sampled until so many have a neighbour within eps.
        max_sample: Sample no more than about so many rows.
        progress: Gets told how far the work is.

    Returns:
        The number of probes, and what it follows from, as JSON: `probes`, `eps`, `target_recall`, `rows`, `sampled`,
        `with_neighbour`, `reached` (whether the target is), and `levels`: for each number of `probes`, `compared` (rows
        of the sample), `recall`, and `low` and `high`, the ends of its 90 % interval: `low` is the 95 % confidence.
    """
    found = _Found(sum(task.n_rows for task in clusters))
    if sum(len(task.clusters) for task in clusters) > 1:
        job = _job(
            folder,
            tuple(clusters),
            id_field=id_field,
            embedding_field=embedding_field,
            seed=mix_seed(seed, PROBES_SEED),
            eps=(eps,),
            n_levels=MAX_PROBES,
            centroids_path=centroids_path,
        )
        found = _sample(job, executor, 0, min_neighbours, max_sample, progress)
    n_levels = len(found.passes[0].compared) if found.passes else 0
    levels = [{"probes": level + 1, **found.recall(level, 0, _TWO_SIDED)} for level in range(n_levels)]
    enough = [row["probes"] for row in levels if row["low"] is not None and row["low"] >= target_recall]
    most = max((row["compared"] for row in levels), default=0)
    best = next((row["probes"] for row in levels if row["compared"] == most), 1)
    probes = enough[0] if enough else best
    return probes, {
        "probes": probes,
        "eps": eps,
        "target_recall": target_recall,
        "rows": found.n_rows,
        "sampled": found.n_sampled,
        "with_neighbour": found.near(0),
        "reached": bool(enough) or not levels,
        "levels": levels,
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


@dataclass(frozen=True)
class _Found:
    """What all passes found of a data set of `n_rows` rows."""

    n_rows: int
    passes: tuple[RecallTask, ...] = ()

    @property
    def n_sampled(self) -> int:
        """Rows in the sample."""
        return sum(task.n_rows for task in self.passes)

    @property
    def complete(self) -> bool:
        """Whether all rows were looked at."""
        return self.n_sampled == self.n_rows

    def near(self, at: int) -> int:
        """Rows with a neighbour within eps number `at`."""
        return sum(task.near[at] for task in self.passes)

    def recall(self, level: int, at: int, confidence: float = 0.95) -> dict[str, Any]:
        """Rows with a neighbour at a level or a lower one, and recall with its interval."""
        compared = sum(task.compared[level][at] for task in self.passes)
        share = _share(compared, self.near(at), self.complete, confidence)
        return {"compared": compared, "recall": share["share"], "low": share["low"], "high": share["high"]}


def _job(
    folder: OutputFolder,
    clusters: tuple[ClustersTask, ...],
    *,
    id_field: str,
    embedding_field: str,
    seed: int,
    eps: tuple[float, ...],
    n_levels: int,
    centroids_path: str,
    kept_bitmap: str = "",
) -> Audit:
    """An audit that has no rows sampled yet."""
    n_centroids = len(read_array(folder.storage, centroids_path)) if n_levels > 1 else 0
    return Audit(
        storage=folder.storage,
        work_path=folder.file("_audit"),
        id_field=id_field,
        embedding_field=embedding_field,
        clusters=clusters,
        hashes=(0, 0),
        seed=seed,
        eps=eps,
        kept_bitmap=kept_bitmap,
        n_sampled=0,
        n_levels=min(n_levels, n_centroids) if n_levels > 1 else 1,
        centroids_path=centroids_path,
        n_centroids=n_centroids,
    )


def _sample(
    job: Audit,
    executor: Executor,
    at: int,
    min_neighbours: int,
    max_sample: int,
    progress: Progress | None,
) -> _Found:
    """Sample rows until enough of them have a neighbour within eps number `at`."""
    found = _Found(sum(task.n_rows for task in job.clusters))
    n_rows = found.n_rows
    capacity = max(1, executor.memory // 8 // sample_bytes(job.dim, 1, job.n_levels))
    done = 0
    wanted = min(n_rows, max_sample, math.ceil(min_neighbours * 4 / 3))
    while done < wanted:
        for low, high in _parts(done, wanted, math.ceil((wanted - done) / capacity)):
            hashes = (_HASHES * low // n_rows, _HASHES * high // n_rows)
            part = _run_pass(replace(job, hashes=hashes, n_sampled=high - low), executor, progress)
            found = replace(found, passes=(*found.passes, part))
        done = wanted
        wanted = min(n_rows, max_sample, _next_size(found.near(at), found.n_sampled, done, min_neighbours))
    return found


def _parts(low: int, high: int, n_parts: int) -> list[tuple[int, int]]:
    bounds = [low + (high - low) * part // n_parts for part in range(n_parts + 1)]
    return list(itertools.pairwise(bounds))


def _run_pass(job: Audit, executor: Executor, progress: Progress | None) -> RecallTask:
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


def _share(hits: int, n: int, complete: bool, confidence: float = 0.95) -> dict[str, Any]:
    """A share with its interval; without one where all rows were looked at."""
    if n == 0:
        return {"share": None, "low": None, "high": None}
    low, high = (hits / n, hits / n) if complete else share_interval(hits, n, confidence)
    return {"share": hits / n, "low": low, "high": high}


def _recall_rows(found: _Found, grid: Sequence[float]) -> list[dict[str, Any]]:
    rows = []
    for at, eps in enumerate(grid):
        if not found.passes:
            rows.append({"eps": eps, "with_neighbour": None, "compared": None, "recall": 1.0, "low": 1.0, "high": 1.0})
            continue
        rows.append({"eps": eps, "with_neighbour": found.near(at), **found.recall(-1, at)})
    return rows


def _answer(found: _Found, at: int, eps: float, n_kept: int) -> dict[str, Any]:
    if not found.passes:
        return {"eps": eps, "kept": None, "near_kept": None, "share": 0.0, "low": 0.0, "high": 0.0}
    kept, near = sum(task.n_kept for task in found.passes), sum(task.near_kept[at] for task in found.passes)
    return {"eps": eps, "kept": kept, "near_kept": near, **_share(near, kept, kept == n_kept)}
