"""Recall of rows of a run with default settings, against flat, fully iterated k-means on all rows.

    python benchmarks/recall.py FOLDER
    python benchmarks/recall.py --rows 1000000            # makes the data first; also with --tile

Two clusterings with the same number of clusters: that of `untwin run`, as it chooses everything by itself, and that of
`KMeansStage` with its own defaults: fitted on all rows, from k-means||, until it settles or for 300 iterations. Both
are made with each of --seeds seeds, because one k-means differs from the next, and are judged on the same rows: of the
sampled rows that have another row within eps anywhere, the share that have such a row in their own cluster. Sampled
rows are compared with all rows, by NumPy in float32. If all rows are sampled the figures are exact for these seeds;
else "+-" is 1.96 standard errors of the difference, from the differences row by row.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits

import generate
from baselines import read_vectors
from end_to_end import work_folders
from measure import REMOVED, UNTWIN, cores, environment, introduce, measure, print_table, save
from untwin import KMeansStage, Pipeline

_BLOCK = 1024
_COLUMNS = 1 << 14


def labels_in(kmeans: Path, n_rows: int) -> np.ndarray:
    """The cluster of each row of the input, -1 for a rejected one."""
    labels = np.full(n_rows, -1, np.int32)
    for path in kmeans.glob("centroid=*/*.parquet"):
        rows = pq.read_table(path, columns=["_row"], partitioning=None)["_row"].to_numpy()
        labels[rows] = int(path.parent.name.removeprefix("centroid="))
    return labels


def most_similar(X: np.ndarray, sample: np.ndarray, least: np.float32, labelings: list[np.ndarray]) -> np.ndarray:
    """For each labeling and each sampled row the similarity of the most similar other row with the same label.

    X is (n, D) float32 of unit rows, a labeling (n,); returns (l, m) float32, -1 where no similarity reaches `least`.
    """
    best = np.full((len(labelings), len(sample)), -1, np.float32)

    def compare(low: int) -> None:
        rows = sample[low : low + _BLOCK]
        for left in range(0, len(X), _COLUMNS):
            products = X[rows] @ X[left : left + _COLUMNS].T
            i, j = np.nonzero(products >= least)
            other = rows[i] != left + j
            i, j = i[other], j[other]
            for labels, found in zip(labelings, best, strict=True):
                same = labels[rows[i]] == labels[left + j]
                np.maximum.at(found, low + i[same], products[i[same], j[same]])

    with ThreadPoolExecutor(cores()) as pool, threadpool_limits(1, user_api="blas"):
        list(pool.map(compare, range(0, len(sample), _BLOCK)))
    return best


def main() -> None:
    """Cluster twice, compare, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="Parquet files (default: made with generate.py)")
    generate.add_arguments(parser, 100_000)
    parser.add_argument("--eps", type=float, nargs="+", default=[0.01, 0.05, 0.1], help="(%(default)s)")
    parser.add_argument("--sample", type=int, default=100_000, help="rows to judge by (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="k-means of each kind (%(default)s)")
    parser.add_argument("--n-clusters", default="auto", help="of both (default: as the run chooses)")
    parser.add_argument("--workdir", type=Path, help="folder for data, kept (default: temporary, removed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures here")
    arguments = parser.parse_args()
    if any(name in os.environ for name in REMOVED):
        os.execve(sys.executable, [sys.executable, *sys.argv], environment())
    introduce()
    with work_folders(arguments.workdir) as (workdir, outputs):
        folder = arguments.folder or generate.prepare(workdir, "zstd", arguments)
        X = read_vectors(folder)
        ours, flat = [], []
        for seed in range(arguments.seeds):
            run, fitted = outputs / f"run-{seed}", outputs / f"flat-{seed}"
            options = ["--n-clusters", arguments.n_clusters, "--seed", str(seed), "--eps", "0.05", "--kept", "none"]
            record = measure([*UNTWIN, "run", str(folder), str(run), *options, "--json"]).report
            n_clusters = record["clusters"]["n_clusters"]
            pipeline = Pipeline(name="flat k-means on all rows")
            source, target = str(folder), str(fitted)
            pipeline.add_stage(KMeansStage(n_clusters, "id", "embedding", source, target, random_state=seed))
            pipeline.run()
            ours.append(labels_in(run / "kmeans", len(X)))
            flat.append(labels_in(fitted, len(X)))
            shutil.rmtree(run)
            shutil.rmtree(fitted)
    every = np.random.default_rng(0).permutation(np.flatnonzero(np.min([*ours, *flat], axis=0) >= 0))
    sample = every[: arguments.sample]
    least = np.float32(1 - max(arguments.eps))
    anywhere, *inside = most_similar(X, sample, least, [np.zeros(len(X), np.int32), *ours, *flat])
    results: dict[str, Any] = {"rows": len(X), "dim": X.shape[1], "n_clusters": n_clusters, "recall": []}
    lines = []
    for eps in arguments.eps:
        limit = np.float32(1 - eps)
        near = anywhere >= limit
        # of each row with a neighbour, the share of the seeds with which it was found, by either way
        found = (np.stack(inside)[:, near] >= limit).reshape(2, arguments.seeds, -1).mean(axis=1)
        by_run, by_flat = (float(100 * share.mean()) for share in found)
        error = float(196 * (found[0] - found[1]).std() / near.sum() ** 0.5) if len(sample) < len(every) else 0.0
        difference = f"{by_run - by_flat:+.2f} +- {error:.2f}"
        lines.append([f"{eps:g}", f"{near.sum():,}", f"{by_run:.2f} %", f"{by_flat:.2f} %", difference])
        figures = {"eps": eps, "with_neighbour": int(near.sum()), "run": by_run, "flat": by_flat, "error": error}
        results["recall"].append(figures)
    print(f"{len(X):,} rows x {X.shape[1]}, {n_clusters:,} clusters, {len(sample):,} rows sampled")
    print_table(["eps", "with neighbour", "untwin run", "flat k-means", "points"], lines)
    save(arguments.json, vars(arguments), results)


if __name__ == "__main__":
    main()
