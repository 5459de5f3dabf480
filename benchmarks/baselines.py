"""What others do, to be measured beside `untwin run`: each baseline one command, one process.

    python benchmarks/baselines.py semdedup FOLDER --eps 0.05

FOLDER holds Parquet files with a column `embedding` of unit vectors. Each prints JSON: the seconds of its steps, the
seconds that importing its libraries took (`import_seconds`, in none of the steps), and what came out. All libraries
use all cores, and their own defaults unless it says otherwise below. But for `copy` no baseline writes anything.

  copy          pyarrow reads each file and writes it again to --target, with the input's compression and encoding:
                what any tool pays that reads and writes all rows
  semdedup      SemDeDup's steps: faiss.Kmeans(spherical=True, niter=20), index.search(k=1), and in each cluster,
                ranked by the distance to its centroid, torch.triu(X @ X.T, diagonal=1).max(0) in batches of 1,024
                rows; a row is removed if any better-ranked row is within eps
  minibatch     the same with scikit-learn's MiniBatchKMeans, and products by NumPy
  semhash       SemHash.from_embeddings(...).self_deduplicate(0.9), whatever the eps: approximate neighbours among
                all rows
  range-search  faiss.IndexFlatIP.range_search(X, 1 - eps): all pairs, without clusters; a row is removed if any
                earlier row of the files is within eps

The number of clusters is that which untwin chooses, unless --n-clusters gives another.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq

from untwin.plan import auto_n_clusters

LIBRARIES: dict[str, tuple[str, ...]] = {
    "copy": (),
    "semdedup": ("faiss", "torch"),
    "minibatch": ("sklearn.cluster",),
    "semhash": ("semhash",),
    "range-search": ("faiss",),
}
WITH_CLUSTERS = ("semdedup", "minibatch")
_BATCH = 1024
_SEMHASH_THRESHOLD = 0.9


def missing(name: str) -> str:
    """The libraries of a baseline that are not installed, as text; empty if it can run."""
    tops = [library.partition(".")[0] for library in LIBRARIES[name]]
    return ", ".join(top for top in tops if importlib.util.find_spec(top) is None)


class Steps:
    """Seconds of the steps of a baseline."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 4)


def read_vectors(folder: Path) -> np.ndarray:
    """The embeddings of all files in order of their names, as a float32 (n, D) matrix."""
    data = pyarrow.dataset.dataset(sorted(map(str, folder.glob("*.parquet"))), format="parquet")
    X, filled = np.empty((data.count_rows(), 0), np.float32), 0
    for batch in data.to_batches(columns=["embedding"], batch_size=1 << 13):
        if batch.num_rows:
            part = batch.column(0).flatten().to_numpy(zero_copy_only=False).reshape(batch.num_rows, -1)
            if not X.shape[1]:
                X = np.empty((len(X), part.shape[1]), np.float32)
            X[filled : filled + len(part)] = part
            filled += len(part)
    return X


def copy(source: Path, target: Path) -> None:
    """Read each Parquet file and write it again, row group by row group, compressed and encoded as it was."""
    target.mkdir(parents=True)
    for path in sorted(source.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            groups = file.metadata.num_row_groups
            compression: dict[str, str] = {}
            dictionary: list[str] = []
            for k in range(file.metadata.num_columns if groups else 0):
                column = file.metadata.row_group(0).column(k)
                name = column.compression.lower()
                compression[column.path_in_schema] = "none" if name == "uncompressed" else name
                if column.has_dictionary_page or "RLE_DICTIONARY" in column.encodings:
                    dictionary.append(column.path_in_schema)
            with pq.ParquetWriter(
                target / path.name,
                file.schema_arrow,
                compression=compression or "snappy",
                use_dictionary=dictionary or False,
            ) as writer:
                for k in range(groups):
                    writer.write_table(file.read_row_group(k), row_group_size=file.metadata.row_group(k).num_rows)


def _ranked_clusters(X: np.ndarray, labels: np.ndarray, similarity: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of each cluster with more than one, farthest from the centroid first."""
    order = np.lexsort((similarity, labels))
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    for low, high in zip(starts, [*starts[1:], len(order)], strict=True):
        if high - low > 1:
            yield X[order[low:high]]


def semdedup(X: np.ndarray, eps: float, n_clusters: int, seed: int, steps: Steps) -> int:
    faiss, torch = importlib.import_module("faiss"), importlib.import_module("torch")
    with steps.step("train"):
        kmeans = faiss.Kmeans(X.shape[1], n_clusters, niter=20, spherical=True, seed=seed)
        kmeans.train(X)
    with steps.step("assign"):
        similarity, labels = kmeans.index.search(X, 1)
    removed = 0
    with steps.step("compare"):
        for cluster in _ranked_clusters(X, labels[:, 0], similarity[:, 0]):
            rows = torch.from_numpy(cluster)
            for low in range(0, len(rows), _BATCH):
                products = torch.triu(rows @ rows[low : low + _BATCH].T, diagonal=1 - low)
                removed += int((products.max(0).values >= 1 - eps).sum())
    return removed


def minibatch(X: np.ndarray, eps: float, n_clusters: int, seed: int, steps: Steps) -> int:
    cluster = importlib.import_module("sklearn.cluster")
    with steps.step("train"):
        kmeans = cluster.MiniBatchKMeans(n_clusters, random_state=seed).fit(X)
    with steps.step("assign"):
        labels = kmeans.predict(X)
        similarity = np.einsum("ij,ij->i", X, kmeans.cluster_centers_[labels])
    removed = 0
    with steps.step("compare"):
        for rows in _ranked_clusters(X, labels, similarity):
            for low in range(0, len(rows), _BATCH):
                products = np.triu(rows @ rows[low : low + _BATCH].T, k=1 - low)
                removed += int((products.max(axis=0) >= np.float32(1 - eps)).sum())
    return removed


def semhash(X: np.ndarray, steps: Steps) -> int:
    library = importlib.import_module("semhash")
    with steps.step("index"):
        # records that differ, so that only vectors decide; the model is not used for embeddings that are there
        index = library.SemHash.from_embeddings(X, [str(row) for row in range(len(X))], model=None)
    with steps.step("compare"):
        return len(index.self_deduplicate(_SEMHASH_THRESHOLD).filtered)


def range_search(X: np.ndarray, eps: float, steps: Steps) -> int:
    faiss = importlib.import_module("faiss")
    removed = 0
    with steps.step("compare"):
        index = faiss.IndexFlatIP(X.shape[1])
        index.add(X)
        for low in range(0, len(X), 8 * _BATCH):
            bounds, _, found = index.range_search(X[low : low + 8 * _BATCH], 1 - eps)
            row = np.repeat(np.arange(low, low + len(bounds) - 1), np.diff(bounds.astype(np.int64)))
            removed += len(np.unique(row[found < row]))
    return removed


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a baseline in this process; its steps and what came out."""
    steps = Steps()
    with steps.step("import"):
        for library in LIBRARIES[name]:
            importlib.import_module(library)
    import_seconds = steps.seconds.pop("import")
    report: dict[str, Any] = {"name": name, "import_seconds": import_seconds}
    if name == "copy":
        with steps.step("copy"):
            copy(arguments.folder, arguments.target)
    else:
        with steps.step("read"):
            X = read_vectors(arguments.folder)
        report |= {"rows": len(X), "dim": X.shape[1]}
        if name in WITH_CLUSTERS:
            report["n_clusters"] = arguments.n_clusters or auto_n_clusters(len(X))
            work: Callable[..., int] = semdedup if name == "semdedup" else minibatch
            report["removed"] = work(X, arguments.eps, report["n_clusters"], arguments.seed, steps)
        elif name == "semhash":
            report["removed"] = semhash(X, steps)
        else:
            report["removed"] = range_search(X, arguments.eps, steps)
    return {**report, "seconds": round(sum(steps.seconds.values()), 4), "steps": steps.seconds}


def main() -> None:
    """Run one baseline and print its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(LIBRARIES))
    parser.add_argument("folder", type=Path, help="Parquet files")
    parser.add_argument("--target", type=Path, help="folder for the copy, which must not be there")
    parser.add_argument("--eps", type=float, default=0.05, help="(%(default)s)")
    parser.add_argument("--n-clusters", type=int, help="default: as many as untwin chooses")
    parser.add_argument("--seed", type=int, default=0, help="of k-means (%(default)s)")
    arguments = parser.parse_args()
    if arguments.name == "copy" and arguments.target is None:
        parser.error("copy needs --target")
    if lacking := missing(arguments.name):
        parser.error(f"{arguments.name} needs {lacking}: pip install '.[bench]'")
    print(json.dumps(run(arguments.name, arguments), indent=2))


if __name__ == "__main__":
    main()
