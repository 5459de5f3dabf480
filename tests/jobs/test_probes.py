"""Runs that compare rows across the borders of clusters: the whole job."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from inputs import cli, ids_of, parquet_files, read_files, read_folder, table_of, write_parquet, write_split
from untwin import apply, deduplicate
from untwin.core import NearestCentroid, is_duplicate, normalize
from untwin.errors import ParameterError

EPS = 0.1


def pairs_within(output, eps):
    """All pairs of rows within eps by brute force, as positions in `kmeans/`; and for each the level it is seen at."""
    files = parquet_files(output / "kmeans")
    rows = read_files(files)
    labels = np.repeat(
        [int(path.parent.name[9:]) for path in files], [pq.read_metadata(path).num_rows for path in files]
    )
    X = np.stack(rows["embedding"].to_numpy())
    order = NearestCentroid(np.load(output / "kmeans" / "_centroids.npy")).order(X, 16)
    place = np.full((len(X), labels.max() + 2), 99)
    for k in range(order.shape[1] - 1, -1, -1):
        place[np.arange(len(X)), order[:, k]] = k + 1
    X = X.astype(np.float64)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    i, j = np.nonzero(np.triu(is_duplicate(np.minimum(X @ X.T, 1), eps), 1))
    level = np.minimum(place[i, labels[j]], place[j, labels[i]])
    return np.array(rows["id"].to_pylist()), i, j, level


def n_distinct(output, i, j):
    """Number of pairs, where rows that are equal bit by bit count as one."""
    X = np.stack(read_files(parquet_files(output / "kmeans"))["embedding"].to_numpy())
    _, first = np.unique(X, axis=0, return_inverse=True)
    return len(set(zip(np.minimum(first[i], first[j]).tolist(), np.maximum(first[i], first[j]).tolist(), strict=True)))


def recall(n, i, j, level, probes):
    """Share of the rows with a neighbour whose neighbour was compared."""
    seen = np.zeros(n, bool)
    seen[i[level <= probes]] = seen[j[level <= probes]] = True
    near = np.zeros(n, bool)
    near[i] = near[j] = True
    return seen[near].mean()


@pytest.fixture(scope="module")
def runs(debian_sample, tmp_path_factory):
    """Finished runs over the sample, by their parameters."""
    known = {}

    def get(probes, **options):
        key = json.dumps([probes, options])
        if key not in known:
            out = tmp_path_factory.mktemp("run") / "out"
            options = {"eps": EPS, "n_clusters": 100, **options}
            known[key] = (deduplicate(debian_sample.path, out, probes=probes, **options), out)
        return known[key]

    return get


@pytest.mark.parametrize("probes", [2, 4])
def test_no_two_kept_rows_that_were_compared_are_within_eps(runs, probes):
    result, out = runs(probes)
    ids, i, j, level = pairs_within(out, EPS)
    stays = np.isin(ids, ids_of(out / "kept"))
    left = stays[i] & stays[j]
    assert not (left & (level <= probes)).any()
    plain = np.isin(ids, ids_of(runs(1)[1] / "kept"))
    missed = plain[i] & plain[j]
    assert missed.sum() > left.sum()
    assert not (missed & (level == 1)).any()
    assert result.run["borders"]["probes"] == probes
    across = (level > 1) & (level <= probes)
    assert result.run["borders"]["pairs_across_within_eps"] == n_distinct(out, i[across], j[across]) > 10


def test_every_removed_row_has_a_kept_witness_within_eps_also_across_a_border(runs):
    result, out = runs(4)
    duplicates = read_folder(out / "duplicates")
    kept = set(ids_of(out / "kept"))
    assert set(duplicates["kept_id"].to_pylist()) <= kept
    assert is_duplicate(duplicates["cosine_sim_score"].to_numpy(), EPS).all()
    home = {}
    for path in parquet_files(out / "kmeans"):
        home |= dict.fromkeys(pq.read_table(path, partitioning=None)["id"].to_pylist(), path.parent.name)
    pairs = zip(duplicates["id"].to_pylist(), duplicates["kept_id"].to_pylist(), strict=True)
    assert sum(home[row] != home[witness] for row, witness in pairs) > 3
    assert result.n_kept + result.n_duplicates == len(home)


def test_far_fewer_pairs_are_compared_than_the_probed_clusters_hold(runs):
    n_rows = 2700
    for probes, eps, most in ((16, EPS, 0.3), (4, 0.02, 0.1)):
        borders = runs(probes, eps=eps)[0].run["borders"]
        held = n_rows * (probes - 1) * n_rows / 60
        assert borders["pairs_across_within_eps"] < borders["pairs_across"] < most * held


@pytest.mark.parametrize("compare_to", ["kept", "ranked"])
def test_another_eps_is_the_same_as_a_run_with_that_eps(runs, tmp_path, compare_to):
    _, out = runs(3, compare_to=compare_to)
    applied = apply(out, eps=0.15, to=tmp_path / "applied")
    again, other = runs(3, compare_to=compare_to, eps=0.15)
    assert read_folder(tmp_path / "applied" / "duplicates").equals(read_folder(other / "duplicates"))
    assert applied.run["borders"] == again.run["borders"]
    assert ids_of(tmp_path / "applied" / "kept") == ids_of(other / "kept")


@pytest.mark.parametrize(("n_clusters", "eps"), [(60, 0.1), (200, 0.05), (20, 0.2)])
def test_auto_reaches_the_target(runs, n_clusters, eps):
    result, out = runs("auto", n_clusters=n_clusters, eps=eps)
    borders = result.run["borders"]
    chosen = borders["chosen"]
    ids, i, j, level = pairs_within(out, eps)
    assert recall(len(ids), i, j, level, 1) < 0.999 <= recall(len(ids), i, j, level, borders["probes"])
    assert chosen["reached"]
    assert chosen["probes"] == borders["probes"] > 1
    # as all rows were looked at, it is the smallest number that will do
    assert chosen["sampled"] == len(ids)
    assert recall(len(ids), i, j, level, borders["probes"] - 1) < 0.999
    answer = read_folder(out / "duplicates")
    assert answer.equals(read_folder(runs(borders["probes"], n_clusters=n_clusters, eps=eps)[1] / "duplicates"))


def test_auto_with_one_cluster_misses_nothing_and_probes_none(runs):
    result, out = runs("auto", n_clusters=1)
    assert result.run["borders"]["probes"] == 1
    assert read_folder(out / "duplicates").equals(read_folder(runs(1, n_clusters=1)[1] / "duplicates"))


def test_more_probes_than_clusters_compare_everything(runs):
    _, out = runs(99, n_clusters=7)
    ids, i, j, _ = pairs_within(out, EPS)
    stays = np.isin(ids, ids_of(out / "kept"))
    assert not (stays[i] & stays[j]).any()


def test_ranked_by_a_column_rows_of_different_clusters_are_ranked_by_it_too(tmp_path):
    """Two clusters, with a pair of rows on both sides of the border: the longer one stays, whichever side it is on."""
    angle = np.radians([0, 2, 4, 43, 47, 86, 88, 90])
    vectors = np.stack((np.cos(angle), np.sin(angle)), axis=1)
    for longer in (3, 4):
        seconds = np.ones(8)
        seconds[longer] = 9.5
        table = table_of([f"r{k}" for k in range(8)], vectors, seconds=pa.array(seconds))
        out = tmp_path / str(longer)
        source = write_parquet(tmp_path / f"in{longer}" / "x.parquet", table)
        deduplicate(source, out, eps=0.01, n_clusters=2, probes=2, rank_by="seconds:desc")
        found = dict(
            zip(*(read_folder(out / "duplicates")[name].to_pylist() for name in ("id", "kept_id")), strict=True)
        )
        assert len(parquet_files(out / "kmeans")) == 2
        assert found[f"r{7 - longer}"] == f"r{longer}"
        assert f"r{longer}" not in found


def test_very_many_identical_rows_beside_a_border_cost_no_products_of_their_own(tmp_path):
    rng = np.random.default_rng(5)
    X = normalize(rng.standard_normal((3000, 8)).astype(np.float32))[0]
    frame = normalize(rng.standard_normal((1, 8)).astype(np.float32))[0]
    X = np.concatenate((X, np.repeat(frame, 30_000, axis=0), normalize(frame + 0.05 * X[:40])[0]))
    ids = [f"{k:06}" for k in rng.permutation(len(X))]
    table = pa.table({"id": ids, "embedding": pa.FixedSizeListArray.from_arrays(X.ravel(), 8)})
    result = deduplicate(write_split(tmp_path / "in", table, 3), tmp_path / "out", eps=0.05, n_clusters=20, probes=4)
    borders = result.run["borders"]
    assert borders["pairs_inside"] > 30_000**2 / 2
    assert borders["pairs_across"] < 3000 * 3000
    kept = read_folder(tmp_path / "out" / "kept")
    same = np.flatnonzero((np.stack(kept["embedding"].to_numpy()) == frame).all(axis=1))
    assert len(same) <= 1
    witnesses = pc.unique(read_folder(tmp_path / "out" / "duplicates")["kept_id"])
    assert not pc.any(pc.is_null(witnesses)).as_py()


def test_probes_without_eps_are_refused(debian_sample, tmp_path):
    with pytest.raises(ParameterError, match="eps"):
        deduplicate(debian_sample.path, tmp_path / "out", probes=2)
    text = cli("run", debian_sample.path, tmp_path / "out", "--probes", "two", "--eps", 0.1, code=2).stderr
    assert "probes" in text
    assert not (tmp_path / "out").exists()


def test_the_summary_says_how_many_clusters_a_row_was_compared_with(runs, debian_sample, tmp_path):
    text = cli(
        "run", debian_sample.path, tmp_path / "out", "--eps", EPS, "--n-clusters", 60, "--probes", "auto", code=0
    ).stdout
    borders = json.loads((tmp_path / "out" / "run.json").read_text())["borders"]
    (line,) = (line for line in text.splitlines() if line.startswith("probes"))
    assert line.split()[1] == str(borders["probes"])
    assert f"{borders['pairs_across'] / borders['pairs_inside']:.2f} times" in line
