"""Probes are chosen so that few neighbours are missed: checked against brute force over all pairs."""

import json

import numpy as np
import pyarrow as pa
import pytest
from recall_oracle import MOST, brute_force

from inputs import read_files, twin_table, write_parquet, write_split
from untwin import deduplicate
from untwin.backends.local import LocalExecutor
from untwin.core import share_interval
from untwin.jobs import recall
from untwin.jobs.output import OutputFolder
from untwin.jobs.recall import MAX_PROBES, choose_probes
from untwin.stages.base import Upstream
from untwin.stages.pairwise import PairwiseStage
from untwin.storage.files import Storage

EPS = 0.2
TARGET = 0.999


def choose(output, *, eps=EPS, target=TARGET, workers=2, memory=2 << 30, seed=42, clusters=None, **options):
    """Choose probes for the clusters of a run."""
    folder = OutputFolder(Storage(), str(output))
    if clusters is None:
        clusters = PairwiseStage("id", "embedding", folder.file("kmeans"), folder.file("unused")).units(Upstream())
    probes, facts = choose_probes(
        folder,
        clusters,
        LocalExecutor(workers, memory),
        centroids_path=folder.file("kmeans", "_centroids.npy"),
        id_field="id",
        embedding_field="embedding",
        eps=eps,
        target_recall=target,
        seed=seed,
        **options,
    )
    assert not (output / "_audit").exists()
    assert facts == json.loads(json.dumps(facts))
    assert (facts["probes"], facts["eps"], facts["target_recall"]) == (probes, eps, target)
    return probes, facts


@pytest.fixture(scope="module")
def clustered(debian_sample, tmp_path_factory):
    """A run that has clusters and no answer yet, and the truth about it."""
    made = {}

    def get(n_clusters):
        if n_clusters not in made:
            output = tmp_path_factory.mktemp("clusters") / "out"
            deduplicate(debian_sample.path, output, n_clusters=n_clusters)
            made[n_clusters] = output, brute_force(output, EPS)
        return made[n_clusters]

    return get


def smallest(truth, eps, target):
    """The fewest probes that reach a recall."""
    return next(probes for probes in range(1, MOST + 1) if truth.recall(eps, probes) >= target)


@pytest.mark.parametrize("n_clusters", [3, 8, 60, 300])
def test_from_all_rows_the_fewest_probes_are_chosen_that_reach_the_target(clustered, n_clusters):
    assert MAX_PROBES == MOST
    output, truth = clustered(n_clusters)
    chosen = []
    for eps, target in [(EPS, 0.95), (EPS, TARGET), (0.1, TARGET), (0.05, TARGET)]:
        probes, facts = choose(output, eps=eps, target=target, min_neighbours=10**9)
        assert facts["sampled"] == facts["rows"] == len(truth.best)
        assert facts["with_neighbour"] == truth.n_near(eps) > 100
        assert [row["probes"] for row in facts["levels"]] == list(range(1, min(MOST, n_clusters) + 1))
        for row in facts["levels"]:
            assert row["compared"] == truth.n_compared(eps, row["probes"])
            assert row["low"] == row["recall"] == row["high"] == truth.recall(eps, row["probes"])
        assert facts["reached"]
        assert probes == smallest(truth, eps, target)
        chosen.append(probes)
    assert max(chosen) > 1


@pytest.mark.parametrize("n_clusters", [8, 60])
def test_from_a_sample_the_target_is_reached_for_19_of_20_seeds(clustered, n_clusters):
    output, truth = clustered(n_clusters)
    target = 0.985
    reached, counts = 0, set()
    for seed in range(20):
        probes, facts = choose(output, target=target, seed=seed, min_neighbours=350)
        assert 350 <= facts["with_neighbour"] < 0.7 * truth.n_near(EPS), "the sample is no sample"
        lows = [share_interval(row["compared"], facts["with_neighbour"], 0.9)[0] for row in facts["levels"]]
        assert [row["low"] for row in facts["levels"]] == lows
        assert facts["reached"]
        assert probes == 1 + next(at for at, low in enumerate(lows) if low >= target)
        reached += truth.recall(EPS, probes) >= target
        counts.add(facts["levels"][0]["compared"])
    assert truth.recall(EPS, 1) < target, "one probe is enough"
    assert reached >= 19
    assert len(counts) > 3, "all seeds give the same sample"


def test_where_the_sample_cannot_prove_the_target_the_largest_recall_decides(clustered):
    output, truth = clustered(60)
    probes, facts = choose(output, min_neighbours=200)
    assert not facts["reached"]
    compared = [row["compared"] for row in facts["levels"]]
    assert probes == 1 + compared.index(max(compared)) > 1
    # the same for a target that no number of probes reaches
    output, truth = clustered(300)
    probes, facts = choose(output, eps=EPS, target=1 - 1e-12, min_neighbours=10**9)
    recalls = [truth.recall(EPS, level) for level in range(1, MOST + 1)]
    assert facts["reached"] == (max(recalls) == 1)
    assert probes == 1 + recalls.index(max(recalls))


def test_workers_memory_order_and_files_change_neither_the_choice_nor_its_facts(clustered, debian_sample, tmp_path):
    output, _ = clustered(60)
    expected = choose(output, min_neighbours=150)
    assert 0 < expected[1]["sampled"] < 2000
    assert choose(output, min_neighbours=150, workers=1) == expected
    assert choose(output, min_neighbours=150, memory=190_000_000) == expected
    rows = read_files(debian_sample.files).select(["id", "embedding"])
    shuffled = rows.take(pa.array(np.random.default_rng(1).permutation(rows.num_rows)))
    deduplicate(write_split(tmp_path / "in", shuffled, 7, compression="none"), tmp_path / "out", n_clusters=60)
    assert choose(tmp_path / "out", min_neighbours=150) == expected
    assert choose(output, min_neighbours=150, seed=1)[1] != expected[1]


def test_a_sample_taken_in_parts_chooses_the_same(clustered, monkeypatch):
    output, _ = clustered(8)
    passes = []
    whole = choose(output, min_neighbours=500)
    real = recall._run_pass

    def counted(job, executor, progress):
        passes.append(job)
        return real(job, executor, progress)

    monkeypatch.setattr(recall, "_run_pass", counted)
    monkeypatch.setattr(recall, "sample_bytes", lambda *_: (2 << 30) // 8 // 200)
    assert choose(output, min_neighbours=500) == whole
    assert len(passes) > 3


def test_the_sample_is_not_the_one_of_the_audit(clustered, monkeypatch):
    output, _ = clustered(8)
    seeds = []
    monkeypatch.setattr(recall, "_run_pass", lambda job, *_: seeds.append(job.seed) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        choose(output, seed=42)
    assert seeds
    assert seeds != [42]


def test_one_cluster_or_no_row_needs_no_sample(tmp_path):
    deduplicate(write_parquet(tmp_path / "in.parquet", twin_table()), tmp_path / "out")
    for clusters in (None, ()):
        probes, facts = choose(tmp_path / "out", clusters=clusters)
        assert (probes, facts["sampled"], facts["levels"], facts["reached"]) == (1, 0, [], True)


def test_where_no_row_has_a_neighbour_one_probe_is_chosen(tmp_path):
    table = twin_table().slice(0, 6)
    deduplicate(write_parquet(tmp_path / "in.parquet", table), tmp_path / "out", n_clusters=3)
    probes, facts = choose(tmp_path / "out")
    assert (probes, facts["sampled"], facts["with_neighbour"]) == (1, 6, 0)
    assert {row["recall"] for row in facts["levels"]} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.1, 0.05, 0.01])
def test_the_target_is_reached_on_the_whole_set(debian, whole, eps):
    output, truth = whole
    probes, facts = choose(output, eps=eps)
    assert truth.recall(eps, probes) >= TARGET
    if debian.whole:
        assert facts["sampled"] < 0.3 * facts["rows"]
        assert truth.recall(eps, 1) < TARGET
