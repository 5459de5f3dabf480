"""Useful floating-point operations a second of the comparing and the assigning, against one large NumPy product.

    python benchmarks/steps.py OUTPUT

OUTPUT is the folder of a finished `untwin run`. Its clusters are read into memory; then, --repeat times in turn, are
timed: a product of two 4,096 x 4,096 float32 matrices by NumPy, on as many threads; the comparison of the rows of
every cluster (`match_ranked`, in rank order, threads over clusters, and inside a cluster that is too large a part of
the work); and the assignment of all rows, in random order, to their nearest centroids (`NearestCentroid.labels` and
`distances`, in batches of the size that the run takes, threads over batches). The best of each counts. Where the
cores are shared with other work, the figures by processor time (of all threads) say more than those by the clock.

Useful operations are what the plain method needs: for comparing each pair of a cluster once, n (n - 1) / 2 products of
two vectors; for assigning N K products; each product 2 D operations. A method that does fewer gets credit for all.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits

from measure import REMOVED, cores, environment, introduce, print_table, save
from untwin.core import NearestCentroid, RankedArray, match_ranked
from untwin.stages.ranking import RankingStrategy
from untwin.storage.columns import matrix_of
from untwin.storage.rows import batch_rows

_SIDE = 4096


def read_cluster(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The unit rows of a cluster, (n, D) float32, and their rank order."""
    table = pq.read_table(path, columns=["id", "embedding", "cosine_dist_to_cent"], partitioning=None)
    order = RankingStrategy.by_distance("hard", "cosine", 42).order(table.drop_columns(["embedding"]), "id")
    return matrix_of(table["embedding"]), order


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of a finished run")
    parser.add_argument("--eps", type=float, default=0.05, help="of the comparison (%(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="turns, of which the best counts (%(default)s)")
    parser.add_argument("--workers", type=int, default=cores(), help="threads (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures here")
    arguments = parser.parse_args()
    if any(name in os.environ for name in REMOVED):
        os.execve(sys.executable, [sys.executable, *sys.argv], environment())
    introduce()
    kmeans, workers = arguments.output / "kmeans", arguments.workers
    clusters = [read_cluster(path) for path in sorted(kmeans.glob("centroid=*/*.parquet"))]
    clusters.sort(key=lambda cluster: len(cluster[0]), reverse=True)
    ranked = [RankedArray(vectors, order) for vectors, order in clusters]
    X = np.concatenate([vectors for vectors, _ in clusters])
    X = X[np.random.default_rng(0).permutation(len(X))]
    nearest = NearestCentroid(np.load(kmeans / "_centroids.npy").astype(np.float32))
    n, dim, n_clusters = *X.shape, len(np.load(kmeans / "_centroids.npy", mmap_mode="r"))
    batch = batch_rows(dim)
    squares = sum(rows.n**2 for rows in ranked)
    left, right = np.random.default_rng(0).standard_normal((2, _SIDE, _SIDE), np.float32)

    def product(_: ThreadPoolExecutor) -> None:
        with threadpool_limits(workers, user_api="blas"):
            left @ right

    def compare(pool: ThreadPoolExecutor) -> None:
        alone = [rows for rows in ranked if rows.n**2 * 2 * workers > squares]
        for rows in alone:
            match_ranked(rows, eps=arguments.eps, compare_to="kept", executor_map=pool.map)
        list(pool.map(lambda rows: match_ranked(rows, eps=arguments.eps, compare_to="kept"), ranked[len(alone) :]))

    def assign(pool: ThreadPoolExecutor) -> None:
        def one(low: int) -> None:
            rows = X[low : low + batch]
            nearest.distances(rows, nearest.labels(rows))

        list(pool.map(one, range(0, n, batch)))

    work: dict[str, tuple[Callable[[ThreadPoolExecutor], None], float]] = {
        "product": (product, 2.0 * _SIDE**3),
        "compare": (compare, sum(rows.n * (rows.n - 1.0) for rows in ranked) * dim),
        "assign": (assign, 2.0 * n * n_clusters * dim),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    with ThreadPoolExecutor(workers) as pool, threadpool_limits(1, user_api="blas"):
        for _ in range(arguments.repeat):
            for name, (step, _flops) in work.items():
                clock, cpu = time.perf_counter(), time.process_time()
                step(pool)
                taken[name].append((time.perf_counter() - clock, time.process_time() - cpu))
    print(f"{n:,} rows x {dim}, {n_clusters:,} clusters (skew {n_clusters * squares / n**2:.2f}), {workers} threads")
    rates = {
        name: [flops / min(times) for times in zip(*taken[name], strict=True)] for name, (_, flops) in work.items()
    }
    lines = []
    for name, (by_clock, by_cpu) in rates.items():
        share = [one / best for one, best in zip((by_clock, by_cpu), rates["product"], strict=True)]
        figures = [f"{by_clock / 1e9:.0f}", f"{share[0]:.2f}", f"{by_cpu / 1e9:.0f}", f"{share[1]:.2f}"]
        lines.append([name, f"{min(taken[name])[0]:.3f}", *figures])
    print_table(["", "seconds", "GFLOP/s", "of the product", "GFLOP/CPU s", "of the product"], lines)
    if arguments.json:
        results: dict[str, Any] = {"rows": n, "dim": dim, "n_clusters": n_clusters, "seconds_and_cpu_seconds": taken}
        save(arguments.json, vars(arguments), {**results, "flops_per_second_and_cpu_second": rates})


if __name__ == "__main__":
    main()
