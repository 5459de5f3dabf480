"""`run.json`: what a run writes about itself, and the check that it adds up."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import untwin
from untwin.backends.base import Executor, Outcome
from untwin.core import EPS_GRID
from untwin.errors import ResultMismatchError
from untwin.jobs.output import FORMAT_VERSION, OutputFolder
from untwin.jobs.parameters import RunParameters
from untwin.stages.clustering import add_counts
from untwin.stages.pairwise import merge_examples
from untwin.stages.tasks import (
    CentroidsTask,
    ClustersTask,
    CrossedTask,
    DuplicatesTask,
    KeptTask,
    PairsTask,
    ReopenedTask,
    RepeatsTask,
    ShardsTask,
)
from untwin.storage.bitmap import empty_bitmap, set_bits
from untwin.storage.files import read_many, redact
from untwin.storage.listing import Listing
from untwin.storage.partitions import read_array, read_table

_PACKAGES = ("numpy", "pyarrow", "fsspec", "threadpoolctl")


def package_versions() -> dict[str, str]:
    """Versions of what the answer is computed with."""
    versions = {"untwin": untwin.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    with suppress(OSError, AttributeError):
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if match:
            return int(match.group(1)) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resources(executor: Executor) -> dict[str, Any]:
    """What the work was done with."""
    return {"backend": executor.name, "workers": executor.workers, "memory_bytes": executor.memory}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def describe_input(listing: Listing, parameters: RunParameters) -> dict[str, Any]:
    """What `run.json` says of the input."""
    return {
        "path": [redact(path) for path in parameters.inputs],
        "digest": listing.digest(),
        "files": listing.files.num_rows,
        "skipped_files": len(listing.skipped),
        "bytes": listing.n_bytes,
        "rows": listing.n_rows,
        "dim": listing.dim,
        "id_type": str(listing.id_type),
    }


def collect(outcome: Outcome, kind: type[Any]) -> list[Any]:
    """The tasks of a kind that a run gave; those of the last stage, where several gave some."""
    for tasks in reversed(outcome.tasks.values()):
        if found := [task for task in tasks if isinstance(task, kind)]:
            return found
    return []


def row_counts(outcome: Outcome, n_rows: int) -> dict[str, Any]:
    """How many rows ended as what."""
    reasons = add_counts([task.rejected for task in (*collect(outcome, ShardsTask), *collect(outcome, RepeatsTask))])
    rejected = sum(reasons.values())
    found = collect(outcome, DuplicatesTask)
    n_duplicates = found[0].n_duplicates if found else 0
    compared = sum(task.n_rows for task in collect(outcome, PairsTask))
    return {
        "input": n_rows,
        "kept": found[0].n_kept if found else compared,
        "duplicates": n_duplicates,
        "rejected": rejected,
        "rejected_reasons": reasons,
        "groups": found[0].n_groups if found else 0,
    }


def stage_table(outcome: Outcome) -> list[dict[str, Any]]:
    """Units, those of them that an interrupted run had done, seconds and rows a second of each stage."""
    return [
        {
            "name": report.name,
            "units": report.n_units,
            "reused": report.n_reused,
            "rows": report.n_rows,
            "seconds": round(report.seconds, 3),
            "rows_per_second": round(report.n_rows / report.seconds) if report.seconds else 0,
        }
        for report in outcome.reports
    ]


def eps_table(pairs: Sequence[PairsTask], parameters: RunParameters, n_duplicates: int | None) -> list[dict[str, Any]]:
    """Duplicates at each eps of the grid, and at the eps in force.

    With probes the grid ends there: beyond it rows of different clusters were not looked at.
    """
    compared = max(1, sum(task.n_rows for task in pairs))
    totals = np.sum([task.counts for task in pairs], axis=0) if pairs else np.zeros(len(EPS_GRID), int)
    examples = merge_examples(pairs)
    exact = parameters.compare_to == "ranked"
    rows = {
        eps: {
            "eps": eps,
            "duplicates": int(total),
            "share": int(total) / compared,
            "exact": exact,
            "examples": [{"id": pair.id, "max_id": pair.max_id, "cosine_sim_score": pair.score} for pair in shown],
        }
        for eps, total, shown in zip(EPS_GRID, totals, examples, strict=True)
        if parameters.probes == 1 or parameters.eps is None or eps <= parameters.eps
    }
    if parameters.eps is not None and n_duplicates is not None:
        known = rows.get(parameters.eps, {"examples": []})
        rows[parameters.eps] = {
            "eps": parameters.eps,
            "duplicates": n_duplicates,
            "share": n_duplicates / compared,
            "exact": True,
            "examples": known["examples"],
        }
    return [rows[eps] for eps in sorted(rows)]


def borders_record(outcome: Outcome, probes: int, chosen: dict[str, Any] | None) -> dict[str, Any] | None:
    """What `run.json` says of comparing across the borders of clusters; None if only their own rows were compared.

    Args:
        outcome: The run.
        probes: Clusters that each row was compared with.
        chosen: What that number follows from, if it was chosen.
    """
    if probes == 1 and chosen is None:
        return None
    sizes = np.array([rows for task in collect(outcome, PairsTask) for _, rows in task.clusters], np.int64)
    across = collect(outcome, CrossedTask)
    return {
        "probes": probes,
        "pairs_inside": int((sizes * (sizes - 1) // 2).sum()),
        "pairs_across": sum(task.n_products for task in across),
        "pairs_across_bounded": sum(task.n_bounds for task in across),
        "pairs_across_within_eps": sum(task.n_pairs for task in across),
        "open_rows": sum(task.n_open for task in collect(outcome, ReopenedTask)),
        "chosen": chosen,
    }


def probes_of(run: Mapping[str, Any]) -> int:
    """Clusters that a run compared each row with, from its `run.json`."""
    return (run.get("borders") or {}).get("probes") or 1


def run_record(
    parameters: RunParameters,
    listing: Listing,
    outcome: Outcome,
    *,
    n_clusters: int,
    resources: dict[str, Any],
) -> dict[str, Any]:
    """Everything that `run.json` holds."""
    pairs = collect(outcome, PairsTask)
    sizes = [rows for task in pairs for _, rows in task.clusters]
    counts = row_counts(outcome, listing.n_rows)
    record: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "finished": now(),
        "parameters": parameters.answer(),
        "resources": resources,
        "packages": package_versions(),
        "input": describe_input(listing, parameters),
        "rows": counts,
        "seconds": 0.0,
        "peak_memory_bytes": peak_memory(),
        "stages": stage_table(outcome),
        "clusters": {
            "n_clusters": n_clusters,
            "non_empty": len(sizes),
            "min": min(sizes, default=0),
            "median": float(np.median(sizes)) if sizes else 0.0,
            "max": max(sizes, default=0),
        },
    }
    models = collect(outcome, CentroidsTask)
    if models:
        shards = collect(outcome, ShardsTask)
        judged = max(1, sum(task.n_judged for task in shards))
        record["kmeans"] = {
            "sample_rows": models[0].n_sampled,
            "dim": models[0].dim,
            "iterations": models[0].n_iter,
            "sample_inertia": models[0].inertia,
            "inertia": sum(task.sum_sq_dist for task in shards),
            "mean_cosine_to_centroid": sum(task.sum_cosine for task in shards) / judged,
        }
    decided = counts["duplicates"] if parameters.eps is not None else None
    record["eps_table"] = eps_table(pairs, parameters, decided)
    return record


def _rejected_files(outcome: Outcome) -> list[str]:
    tasks = (*collect(outcome, ShardsTask), *collect(outcome, ClustersTask))
    return [task.rejected_path for task in tasks if task.rejected_path]


def result_files(outcome: Outcome, folder: OutputFolder) -> dict[str, list[str]]:
    """The files of `duplicates/` and `rejected/`, relative to the folder: readers need not list it."""
    found = {
        "duplicates": [path for task in collect(outcome, DuplicatesTask) for path in task.files],
        "rejected": _rejected_files(outcome),
    }
    return {name: [path[len(folder.path) :].lstrip("/") for path in paths] for name, paths in found.items()}


def write_skipped(listing: Listing, folder: OutputFolder) -> list[str]:
    """List the files that are skipped in `rejected/`, a row each; the file's name, relative to the folder, if any."""
    if not listing.skipped:
        return []
    name = "rejected/files-000000.parquet"
    paths, problems = list(listing.skipped), list(listing.skipped.values())
    table = pa.table(
        {
            "id": pa.nulls(len(paths), listing.id_type),
            "file": pa.array([redact(path) for path in paths], pa.string()),
            "row": pa.nulls(len(paths), pa.int64()),
            "reason": pa.array([f"file skipped: {problem}" for problem in problems], pa.string()),
        }
    )
    with folder.storage.writing(folder.file(name), durable=True) as sink:
        pq.write_table(table, sink, compression="zstd")
    return [name]


def check_every_row(outcome: Outcome, listing: Listing, folder: OutputFolder) -> None:
    """Make sure that every input row is exactly one of kept, duplicate, rejected.

    Each compared row is kept or a duplicate; so every row must be compared or rejected, and none twice.

    Raises:
        ResultMismatchError: It is not so.
    """
    seen = empty_bitmap(listing.n_rows)
    n_seen = 0
    storage, paths = folder.storage, [task.rows_path for task in collect(outcome, PairsTask)]
    for content in read_many(functools.partial(read_array, storage), paths):
        rows = np.asarray(content, np.int64)
        set_bits(seen, rows)
        n_seen += len(rows)
    rejected = (read_table(storage, path, ["file", "row"]) for path in _rejected_files(outcome))
    for rows in listing.numbers(rejected):
        set_bits(seen, rows)
        n_seen += len(rows)
    n_distinct = int(np.bitwise_count(seen).sum())
    if not n_seen == n_distinct == listing.n_rows:
        raise ResultMismatchError(
            f"{redact(folder.path)}: of {listing.n_rows} input rows {n_distinct} were accounted for, "
            f"{n_seen - n_distinct} of them twice; do not use this result, and please report it"
        )
    counts = row_counts(outcome, listing.n_rows)
    if counts["kept"] + counts["duplicates"] + counts["rejected"] != listing.n_rows:
        raise ResultMismatchError(
            f"{redact(folder.path)}: {counts['kept']} kept, {counts['duplicates']} duplicates and "
            f"{counts['rejected']} rejected rows are not the {listing.n_rows} rows of the input; "
            "do not use this result, and please report it"
        )
    written = collect(outcome, KeptTask)
    files = [file for task in written for file in task.files]
    if written and (sum(task.n_kept for task in written) != counts["kept"] or len(set(files)) != len(files)):
        raise ResultMismatchError(f"{redact(folder.path)}: kept/ does not hold the {counts['kept']} rows that stay")
