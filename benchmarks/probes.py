"""What more probes find, and what they cost: recall by brute force, pairs compared and time, as a table.

    python benchmarks/probes.py FOLDER --eps 0.1 0.05 0.01 --n-clusters 64 164 500 --probes 1 2 3 auto

FOLDER holds Parquet files with `id` and `embedding`. For each combination a run is made in a process of its own;
then every pair of rows is compared here with NumPy, and of the rows that have another row within eps the share is
counted whose neighbour was compared in the run: in its own cluster, or as one of the clusters next nearest to
either row. "Pairs" is the number of pairs whose similarity was computed, over the number of pairs inside the clusters;
"work" counts the multiplications of the bound on the similarity as well, by which most pairs across borders are left
out. "Time" is that of the whole run, over the same run with one probe; the choice of `auto` is part of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from measure import UNTWIN, environment, introduce

_BLOCK = 1024


def short_elements(dim: int) -> int:
    """Elements of the product that bounds a similarity."""
    return max(1, min(32, dim // 4)) + 1


def unit_rows(table: pa.Table) -> np.ndarray:
    """The embeddings of a table, (n, D) float32 of unit length."""
    vectors = np.stack(table["embedding"].to_numpy()).astype(np.float64)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def pairs_within(X: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs i < j with a cosine of at least 1 - eps, and the cosines."""
    found = []
    for low in range(0, len(X), _BLOCK):
        products = X[low : low + _BLOCK] @ X[low:].T
        i, j = np.nonzero(products >= np.float32(1 - eps))
        later = j > i
        found.append((i[later] + low, j[later] + low, products[i[later], j[later]]))
    i, j, score = (np.concatenate(part) for part in zip(*found, strict=True))
    return i, j, score


def levels(out: Path, ids: pa.Array, X: np.ndarray, i: np.ndarray, j: np.ndarray, most: int) -> np.ndarray:
    """For each pair the number of probes from which on it is compared; `most` + 1 for more than `most`."""
    centroids = np.load(out / "kmeans" / "_centroids.npy").astype(np.float64)
    own = np.empty(len(X), np.int64)
    for path in (out / "kmeans").glob("centroid=*/*.parquet"):
        members = pq.read_table(path, columns=["id"], partitioning=None)["id"]
        own[pa.compute.index_in(members, value_set=ids).to_numpy()] = int(path.parent.name.removeprefix("centroid="))
    place = np.full((len(X), len(centroids)), most + 1, np.int16)
    for low in range(0, len(X), _BLOCK):
        part = slice(low, low + _BLOCK)
        distance = (centroids**2).sum(axis=1) - 2 * X[part].astype(np.float64) @ centroids.T
        nearest = np.argsort(distance, axis=1, kind="stable")[:, :most]
        place[np.arange(low, low + len(nearest))[:, None], nearest] = np.arange(1, nearest.shape[1] + 1)
    return np.where(own[i] == own[j], 1, np.minimum(place[i, own[j]], place[j, own[i]]))


def recall(n: int, i: np.ndarray, j: np.ndarray, compared: np.ndarray) -> float:
    """Share of the rows with a neighbour that have a compared one."""
    near, seen = np.zeros(n, bool), np.zeros(n, bool)
    near[i] = near[j] = True
    seen[i[compared]] = seen[j[compared]] = True
    return float(seen[near].mean())


def run(folder: str, out: Path, eps: float, n_clusters: int, probes: str) -> dict[str, Any]:
    """Run untwin in a process of its own; what `run.json` says."""
    shutil.rmtree(out, ignore_errors=True)
    command = [*UNTWIN, "run", folder, str(out), "--kept", "none", "--json"]
    command += ["--eps", str(eps), "--n-clusters", str(n_clusters), "--probes", probes]
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record: dict[str, Any] = json.loads((out / "run.json").read_text())
    return record


def main() -> None:
    """Run every combination and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="Parquet files with id and embedding")
    parser.add_argument("--eps", nargs="+", type=float, default=[0.1, 0.05, 0.01])
    parser.add_argument("--n-clusters", nargs="+", type=int, required=True)
    parser.add_argument("--probes", nargs="+", default=["1", "2", "3", "auto"])
    parser.add_argument("--json", help="write the figures to this file, too")
    given = parser.parse_args()
    if given.probes[0] != "1":
        parser.error("--probes has to begin with 1, which the others are compared with")
    introduce()
    files = sorted(Path(given.folder).glob("**/*.parquet"))
    table = pa.concat_tables([pq.read_table(path, columns=["id", "embedding"], partitioning=None) for path in files])
    ids, X = table["id"].combine_chunks(), unit_rows(table)
    i, j, score = pairs_within(X, max(given.eps))
    figures = []
    print(
        "| eps | clusters | probes | recall of rows | pairs | work | time |\n|---|---|---|---|---|---|---|", flush=True
    )
    with tempfile.TemporaryDirectory() as scratch:
        for eps in given.eps:
            near = score >= np.float32(1 - eps)
            for n_clusters in given.n_clusters:
                alone = 0.0
                for probes in given.probes:
                    out = Path(scratch) / "out"
                    record = run(given.folder, out, eps, n_clusters, probes)
                    borders = record["borders"] or {
                        "probes": 1,
                        "pairs_across": 0,
                        "pairs_across_bounded": 0,
                        "pairs_inside": 1,
                    }
                    used = borders["probes"]
                    level = levels(out, ids, X, i[near], j[near], used)
                    found = recall(len(X), i[near], j[near], level <= used)
                    pairs = 1 + borders["pairs_across"] / borders["pairs_inside"]
                    bounded = borders["pairs_across_bounded"] * short_elements(X.shape[1]) / X.shape[1]
                    work = pairs + bounded / borders["pairs_inside"]
                    alone = alone or record["seconds"]
                    shown = f"auto: {used}" if probes == "auto" else probes
                    times = record["seconds"] / alone
                    line = f"| {eps} | {n_clusters} | {shown} | {found:.5f} | {pairs:.2f} | {work:.2f} | {times:.2f} |"
                    print(line, flush=True)
                    names = ("eps", "n_clusters", "probes", "used", "recall", "pairs", "work", "seconds")
                    values = (eps, n_clusters, probes, used, found, pairs, work, record["seconds"])
                    figures.append(dict(zip(names, values, strict=True)))
    if given.json:
        Path(given.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
