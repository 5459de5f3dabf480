"""A cluster larger than its share of the memory goes through the disk, and gives the same bits."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from untwin.backends.local import LocalExecutor
from untwin.core import normalize
from untwin.pipeline import Pipeline
from untwin.stages import pairwise
from untwin.stages.duplicates import IdentifyDuplicatesStage
from untwin.stages.fit import FitStage
from untwin.stages.gather import GatherStage
from untwin.stages.kmeans import KMeansStage
from untwin.stages.pairwise import PairwiseStage
from untwin.storage.sample import SampleBlocks

N_ROWS, DIM, EPS = 10_000, 1000, 0.05
SMALL, LARGE = 100 << 20, 2 << 30


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """One direction has nine tenths of the rows; every fourth row is a near or an exact copy of another."""
    folder = tmp_path_factory.mktemp("small-memory") / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    X = rng.normal(size=(N_ROWS, DIM)).astype(np.float32)
    X[: N_ROWS * 9 // 10, 0] += 40
    X[N_ROWS * 9 // 10 :, 1] += 40
    copies = np.arange(3, N_ROWS, 4)
    X[copies] = X[copies - 2]
    X[copies[::2]] += 0.05 * rng.normal(size=(len(copies[::2]), DIM)).astype(np.float32)
    order = rng.permutation(N_ROWS)
    for number, part in enumerate(np.array_split(order, 4)):
        lists = pa.FixedSizeListArray.from_arrays(pa.array(X[part].reshape(-1)), DIM)
        ids = pa.array([f"row-{at:05d}" for at in part])
        pq.write_table(pa.table({"id": ids, "embedding": lists}), folder / f"{number}.parquet", row_group_size=500)
    return folder, X


def run(source, target, executor, compare_to):
    stages = [
        KMeansStage(2, "id", "embedding", str(source), str(target / "kmeans"), max_iter=5),
        PairwiseStage(
            *("id", "embedding", str(target / "kmeans"), str(target / "pairwise")),
            pairwise_batch_size=64,
            compare_to=compare_to,
            eps=EPS,
        ),
        IdentifyDuplicatesStage(str(target), EPS),
    ]
    return Pipeline(stages=stages).run(executor)


def spied(monkeypatch):
    """Which of the ways through the disk were taken."""
    taken = set()

    class SpiedFile(pairwise.VectorFile):
        def __init__(self, *arguments):
            taken.add("pairwise")
            super().__init__(*arguments)

    write_one = GatherStage._write_one
    fit = FitStage.process

    def one(self, *arguments):
        taken.add("gather")
        return write_one(self, *arguments)

    def fitted(self, task, context):
        if self.memory(task) > context.memory:
            taken.add("fit")
        return fit(self, task, context)

    monkeypatch.setattr(pairwise, "VectorFile", SpiedFile)
    monkeypatch.setattr(GatherStage, "_write_one", one)
    monkeypatch.setattr(FitStage, "process", fitted)
    return taken


@pytest.mark.parametrize("compare_to", ["kept", "ranked"])
def test_through_the_disk_and_in_memory_give_the_same_bits(source, tmp_path, monkeypatch, compare_to):
    folder, X = source
    taken = spied(monkeypatch)
    run(folder, tmp_path / "large", LocalExecutor(2, LARGE), compare_to)
    assert taken == set()
    run(folder, tmp_path / "small", LocalExecutor(1 if compare_to == "kept" else 2, SMALL), compare_to)
    assert {"gather", "pairwise"} <= taken

    names = sorted(str(path.relative_to(tmp_path / "large")) for path in (tmp_path / "large").rglob("*.parquet"))
    assert names == sorted(
        str(path.relative_to(tmp_path / "small")) for path in (tmp_path / "small").rglob("*.parquet")
    )
    sizes = []
    for name in names:
        large, small = (pq.read_table(tmp_path / side / name, partitioning=None) for side in ("large", "small"))
        assert large.equals(small), name
        if not name.startswith("kmeans"):
            assert (tmp_path / "large" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()
        else:
            sizes.append(large.num_rows)
    assert sorted(sizes) == [N_ROWS // 10, N_ROWS * 9 // 10]
    centroids = [(tmp_path / side / "kmeans/_centroids.npy").read_bytes() for side in ("large", "small")]
    assert centroids[0] == centroids[1]

    # and the answer is right: scores of some duplicates, from the input's own vectors
    duplicates = pq.read_table(tmp_path / "large/duplicates").to_pylist()
    assert len(duplicates) > N_ROWS // 5
    unit, _ = normalize(X)
    for row in duplicates[::97]:
        one, other = (unit[int(row[name].removeprefix("row-"))].astype(np.float64) for name in ("id", "kept_id"))
        assert abs(row["cosine_sim_score"] - one @ other) < 1e-5
        assert np.float32(row["cosine_sim_score"]) >= np.float32(1 - EPS)
    assert not list((tmp_path / "small").rglob("_work*"))


def test_fitting_from_the_disk_gives_the_same_centroids(source, tmp_path, monkeypatch):
    folder, _ = source
    reads = []
    read = SampleBlocks.read
    monkeypatch.setattr(SampleBlocks, "read", lambda self, *args: reads.append(args[0]) or read(self, *args))
    written = []
    for name, memory in (("large", LARGE), ("small", SMALL)):
        reads.clear()
        stage = KMeansStage(2, "id", "embedding", str(folder), str(tmp_path / name), max_iter=3)
        Pipeline(stages=[stage]).run(LocalExecutor(1, memory))
        written.append((len(reads), (tmp_path / name / "_centroids.npy").read_bytes()))
    assert written[0][1] == written[1][1]
    assert written[1][0] > 2 * written[0][0]
