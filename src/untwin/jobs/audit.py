"""What a finished run missed: the share of rows whose neighbours were compared, from a sample."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from untwin.backends import make_executor
from untwin.backends.base import Progress
from untwin.jobs.output import OutputFolder
from untwin.jobs.parameters import parse_bytes
from untwin.jobs.recall import MAX_SAMPLE, MIN_NEIGHBOURS, measure_recall
from untwin.jobs.result import RunResult
from untwin.storage.files import Storage, normalize_path
from untwin.storage.lock import locked


def audit(
    output_path: str | os.PathLike[str],
    *,
    eps: float | None = None,
    seed: int | None = None,
    min_neighbours: int = MIN_NEIGHBOURS,
    max_sample: int = MAX_SAMPLE,
    memory: int | str | None = None,
    workers: int | None = None,
    backend: str = "local",
    ray_address: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Measure what a finished run missed at the borders of its clusters, and add it to its `run.json`.

    Sampled rows are compared exactly with all rows. Recall is that of cosine neighbours, not of human judgement:
    of the rows that have another row within eps, the share that have such a row among those they were compared with:
    the rows of their own cluster, and those of others if the run had probes.

    Args:
        output_path: Output folder of a finished run, or of `untwin.apply`.
        eps: Recall is reported for this value too, and it decides how many rows are sampled; default: the one in
            force, or 0.05 for a run without eps. For a run with probes at most the one in force: beyond it, rows of
            different clusters were not compared.
        seed: Seed of the sample; default: that of the run.
        min_neighbours: Rows are sampled until so many have a neighbour within eps, or all rows are.
        max_sample: Sample no more than about so many rows.
        memory: Budget, as bytes or as in "4GB".
        workers: Most units of work at a time.
        backend: `local`, `ray` or `xenna`.
        ray_address: Of a running Ray cluster, as in `untwin.deduplicate`.
        storage_options: For fsspec.
        progress: Gets told how far the work is.

    Returns:
        The run, with its `audit`. An earlier audit is replaced; nothing else in the folder changes.

    Raises:
        OutputInUseError: A run, or another audit, works there.
        UntwinError: No finished run there, its clusters are not there any more, or a parameter makes no sense.
    """
    storage = Storage(dict(storage_options or {}))
    executor = make_executor(backend, workers, None if memory is None else parse_bytes(memory), ray_address)
    folder = OutputFolder(storage, normalize_path(os.fspath(output_path)))
    folder.require_run()
    with locked(storage, folder.path):
        run = folder.require_run()
        run["audit"] = measure_recall(
            folder,
            run,
            executor,
            eps=eps,
            seed=seed,
            min_neighbours=min_neighbours,
            max_sample=max_sample,
            progress=progress,
        )
        storage.write_json(folder.run_path, run)
    return RunResult.from_run(folder, run)
