"""What a run misses, by brute force over all pairs of rows in `kmeans/`, without untwin's products. No tests here."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inputs import ids_of, read_files
from untwin.core import is_duplicate

MOST = 16
"""Levels told apart."""


@dataclass(frozen=True)
class Truth:
    """Of each row, the largest similarity to others (0 where that is less than looked for).

    Attributes:
        compared: (MOST, n) to those compared with 1, 2, ... probes.
        best: (n,) to any.
        kept: (n,) to any that stays.
        stays: (n,) whether it stays itself.
    """

    compared: np.ndarray
    best: np.ndarray
    kept: np.ndarray
    stays: np.ndarray

    def n_near(self, eps):
        return is_duplicate(self.best, eps).sum()

    def n_compared(self, eps, probes=1):
        return is_duplicate(self.compared[probes - 1], eps).sum()

    def recall(self, eps, probes=1):
        return self.n_compared(eps, probes) / self.n_near(eps)

    def kept_share(self, eps):
        return is_duplicate(self.kept[self.stays], eps).mean()


def brute_force(output, widest=0.3):
    """The truth about a run's clusters and answer, for pairs with a similarity of at least 1 - widest."""
    output = Path(output)
    vectors, ids, labels = [], [], []
    for path in sorted((output / "kmeans").rglob("centroid=*/*.parquet")):
        rows = read_files([path])
        vectors.append(rows["embedding"].combine_chunks().values.to_numpy().reshape(rows.num_rows, -1))
        ids += rows["id"].to_pylist()
        labels += rows.num_rows * [int(path.parent.name.removeprefix("centroid="))]
    X, labels = np.concatenate(vectors), np.array(labels)
    D = X.astype(np.float64)
    D /= np.sqrt((D * D).sum(1))[:, None]
    order = nearest_centroids(X, np.load(output / "kmeans" / "_centroids.npy"))
    assert (order[:, 0] == labels).all()
    removed = output / "duplicates"
    stays = ~np.isin(ids, ids_of(removed)) if removed.exists() else np.ones(len(X), bool)

    compared, kept = np.zeros((MOST + 1, len(X))), np.zeros(len(X))
    for low in range(0, len(X), 1000):
        products = X[low : low + 1000] @ X.T
        i, j = np.nonzero(products >= 1 - widest - 1e-4)
        i, j = (part[low + i != j] for part in (low + i, j))
        value = np.minimum((D[i] * D[j]).sum(1), 1)
        level = np.minimum(_places(order, i, labels[j]), _places(order, j, labels[i]))
        np.maximum.at(compared, (level, i), value)
        np.maximum.at(kept, i[stays[j]], value[stays[j]])
    compared = np.maximum.accumulate(compared)
    return Truth(compared[:-1], compared[-1], kept, stays)


def nearest_centroids(X, centroids):
    """(n, MOST) numbers of the nearest centroids, nearest first, in float64; -1 where there are no more."""
    order = np.full((len(X), MOST), -1)
    for low in range(0, len(X), 1000):
        block, C = X[low : low + 1000].astype(np.float64), centroids.astype(np.float64)
        distance = (C * C).sum(1) - 2 * block @ C.T
        nearest = distance.argsort(1, kind="stable")[:, :MOST]
        order[low : low + len(block), : nearest.shape[1]] = nearest
    return order


def _places(order, rows, clusters):
    """Where a cluster comes in the order of a row; MOST where it does not."""
    equal = order[rows] == clusters[:, None]
    return np.where(equal.any(1), equal.argmax(1), MOST)


def with_probes(output, copy, probes):
    """A copy of a run that says it was made with so many probes."""
    shutil.copytree(output, copy)
    path = Path(copy) / "run.json"
    run = json.loads(path.read_text())
    run.pop("audit", None)
    run["parameters"]["probes"] = probes
    run["borders"] = {"probes": probes}
    path.write_text(json.dumps(run))
    return copy


def numbers(result):
    """What must not depend on how an audit was done."""
    record = dict(result.run["audit"])
    for name in ("finished", "seconds", "passes"):
        del record[name]
    return record
