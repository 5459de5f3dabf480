"""An audit tells how many neighbours lie in other clusters: checked against brute force over all pairs."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pytest
from recall_oracle import brute_force, numbers, with_probes

from inputs import cli, read_files, snapshot, table_of, twin_table, write_parquet, write_split
from untwin import apply, audit, deduplicate
from untwin.core import EPS_GRID
from untwin.errors import OutputInUseError, ParameterError
from untwin.jobs.output import OutputFolder
from untwin.storage.files import Storage
from untwin.storage.lock import locked

EPS = 0.05
WORDS = "recall of cosine neighbours, not of human judgement"


@pytest.fixture(scope="module")
def finished(debian_sample, tmp_path_factory):
    """A finished run with some number of clusters, and the truth about it."""
    made = {}

    def get(n_clusters, eps=EPS):
        if (n_clusters, eps) not in made:
            output = tmp_path_factory.mktemp("audit") / "out"
            deduplicate(debian_sample.path, output, eps=eps, n_clusters=n_clusters, kept="none")
            made[n_clusters, eps] = output, brute_force(output)
        return made[n_clusters, eps]

    return get


# --- against brute force ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_clusters", [3, 8, 60])
@pytest.mark.parametrize("eps", [0.1, 0.05, 0.01])
def test_with_all_rows_in_the_sample_the_numbers_are_those_of_brute_force(finished, n_clusters, eps):
    output, truth = finished(n_clusters, eps)
    found = audit(output, min_neighbours=10**9, max_sample=10**9).audit
    assert found.complete
    assert found.n_sampled == found.n_rows == len(truth.best)
    assert [row.eps for row in found.recall_rows] == list(EPS_GRID)
    for row in found.recall_rows:
        assert row.with_neighbour == truth.n_near(row.eps) > 100
        assert row.compared == truth.n_compared(row.eps)
        assert row.low == row.recall == row.high == pytest.approx(truth.recall(row.eps))
    assert min(row.recall for row in found.recall_rows) < 1
    assert found.answer.eps == eps
    assert found.answer.kept == truth.stays.sum()
    assert found.answer.low == found.answer.share == found.answer.high == truth.kept_share(eps)
    assert found.answer.share > 0 or truth.recall(eps) == 1 or eps == 0.01


@pytest.mark.parametrize(
    ("n_clusters", "eps"), [(3, 0.2), *(pytest.param(n, 0.2, marks=pytest.mark.slow) for n in (8, 20, 60))]
)
def test_the_interval_covers_the_truth_in_19_of_20_seeds(finished, n_clusters, eps):
    """Of 100 seeds in 95 and more, or some less by chance: 91 are two standard deviations off."""
    output, truth = finished(n_clusters)
    wanted = 150
    recalls, covered, shares_covered = set(), 0, 0
    for seed in range(100):
        found = audit(output, eps=eps, seed=seed, min_neighbours=wanted).audit
        row = next(row for row in found.recall_rows if row.eps == eps)
        assert row.with_neighbour >= wanted
        assert found.n_sampled < 0.6 * found.n_rows, "the sample is no sample"
        recalls.add(row.recall)
        covered += row.low <= truth.recall(eps) <= row.high
        shares_covered += found.answer.low <= truth.kept_share(EPS) <= found.answer.high
    assert len(recalls) > 3, "all seeds give the same sample"
    assert covered >= 91
    assert shares_covered >= 91


def test_the_sample_grows_until_enough_rows_have_a_neighbour(finished):
    output, truth = finished(8)
    share = truth.n_near(0.001) / len(truth.best)
    found = audit(output, eps=0.001, min_neighbours=60)
    row = found.audit.recall_rows[0]
    assert row.with_neighbour >= 60
    assert 60 / share * 0.7 < found.audit.n_sampled < 60 / share * 2
    assert 2 <= found.run["audit"]["passes"] <= 4
    assert found.audit.enough
    little = audit(output, eps=0.001, min_neighbours=60, max_sample=100).audit
    assert 60 < little.n_sampled < 150
    assert little.recall_rows[0].with_neighbour < 60
    assert not little.enough


def test_an_eps_outside_the_grid_is_reported_too(finished):
    output, truth = finished(8)
    found = audit(output, eps=0.123, min_neighbours=10**9).audit
    assert [row.eps for row in found.recall_rows] == sorted({*EPS_GRID, 0.123})
    row = next(row for row in found.recall_rows if row.eps == 0.123)
    assert row.recall == truth.recall(0.123) < 1
    assert found.answer.eps == EPS


# --- probes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probes", [2, 3, 16])
@pytest.mark.parametrize(("n_clusters", "eps"), [(60, 0.2), (8, 0.16), (3, 0.2)])
def test_with_probes_the_rows_of_the_next_nearest_clusters_count(finished, tmp_path, n_clusters, eps, probes):
    output, truth = finished(n_clusters, eps)
    output = with_probes(output, tmp_path / "out", probes)
    found = audit(output, min_neighbours=10**9, max_sample=10**9).audit
    assert found.complete
    assert found.probes == probes
    # beyond the eps in force rows of different clusters were not compared
    assert [row.eps for row in found.recall_rows] == [value for value in EPS_GRID if value <= eps]
    for row in found.recall_rows:
        assert row.with_neighbour == truth.n_near(row.eps) > 100
        assert row.compared == truth.n_compared(row.eps, probes)
        assert row.low == row.recall == row.high == pytest.approx(truth.recall(row.eps, probes))
    assert truth.recall(eps, probes) > truth.recall(eps, 1)
    assert found.answer.share == truth.kept_share(eps)


def test_with_probes_the_sample_grows_and_the_interval_covers_the_truth(finished, tmp_path):
    output, truth = finished(60, 0.2)
    output = with_probes(output, tmp_path / "out", 2)
    covered = 0
    for seed in range(20):
        found = audit(output, seed=seed, min_neighbours=150).audit
        row = found.recall_rows[-1]
        assert row.eps == 0.2
        assert row.with_neighbour >= 150
        assert found.n_sampled < 0.6 * found.n_rows, "the sample is no sample"
        covered += row.low <= truth.recall(0.2, 2) <= row.high
    assert 0.9 < truth.recall(0.2, 2) < 1
    assert covered >= 19


def test_with_probes_workers_memory_and_levels_beyond_change_no_number(finished, tmp_path):
    output, _ = finished(60, 0.2)
    plain = audit(output, min_neighbours=100).audit
    output = with_probes(output, tmp_path / "out", 3)
    expected = numbers(audit(output, workers=2, memory="2GB", min_neighbours=100))
    assert 0 < expected["sampled"] < 2000
    assert 0.5 < expected["recall"][-1]["recall"] < 1
    for options in ({"workers": 1}, {"memory": "160MB"}, {"workers": 1, "memory": "140MB"}):
        assert numbers(audit(output, min_neighbours=100, **options)) == expected
    # the same rows are sampled, and have the same neighbours
    near = {row.eps: row.with_neighbour for row in plain.recall_rows}
    assert {row["eps"]: row["with_neighbour"] for row in expected["recall"]}.items() <= near.items()


def test_with_probes_an_eps_beyond_the_one_in_force_is_refused(finished, tmp_path):
    output = with_probes(finished(8)[0], tmp_path / "out", 2)
    text = cli("audit", output, "--eps", 0.06, code=2).stderr
    assert "within eps 0.05" in text
    assert "probes 2" in text
    text = cli("audit", output, "--eps", 0.03, "--min-neighbours", 50).stdout
    assert WORDS in text
    assert "compared with (probes 2)" in text
    assert "0.03" in text
    assert " 0.07 " not in text


@pytest.mark.slow
@pytest.mark.parametrize("probes", [1, 2])
def test_the_interval_covers_the_truth_in_19_of_20_seeds_of_the_whole_set(whole, tmp_path, probes):
    output, truth = whole
    output = with_probes(output, tmp_path / "out", probes)
    covered = {(what, eps): 0 for what in ("recall", "kept") for eps in (0.1, 0.05, 0.01)}
    del covered["kept", 0.05], covered["kept", 0.01]
    widest = 0.0
    for seed in range(20):
        found = audit(output, eps=0.01, seed=seed, min_neighbours=500).audit
        assert not found.complete
        for row in found.recall_rows:
            if ("recall", row.eps) in covered:
                assert row.with_neighbour >= 500 or row.eps > 0.01
                covered["recall", row.eps] += row.low <= truth.recall(row.eps, probes) <= row.high
                widest = max(widest, row.high - row.low)
        covered["kept", 0.1] += found.answer.low <= truth.kept_share(0.1) <= found.answer.high
    print(covered, widest)
    assert 0.002 < widest < 0.1
    assert min(covered.values()) >= 19, covered


# --- the same numbers ------------------------------------------------------------------------------------------------


def test_workers_and_memory_change_no_number(finished):
    output, _ = finished(8)
    expected = numbers(audit(output, workers=2, memory="2GB", min_neighbours=100))
    assert 0 < expected["sampled"] < 2000
    assert 0.5 < expected["recall"][8]["recall"] < 1
    for options in ({"workers": 1}, {"memory": "128MB"}, {"workers": 1, "memory": "100MB"}):
        assert numbers(audit(output, min_neighbours=100, **options)) == expected


def test_a_sample_that_does_not_fit_the_memory_is_taken_in_parts(tmp_path):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((1000, 4096)).astype(np.float32)
    X[500:] = X[:500] + 0.2 * rng.standard_normal((500, 4096))
    source = write_parquet(tmp_path / "in.parquet", table_of([f"row{i}" for i in range(1000)], X))
    deduplicate(source, tmp_path / "out", n_clusters=12)
    whole = audit(tmp_path / "out", memory="2GB")
    parts = audit(tmp_path / "out", memory="80MB")
    assert (whole.run["audit"]["passes"], parts.run["audit"]["passes"]) == (1, 2)
    assert numbers(whole) == numbers(parts)
    assert whole.audit.recall_rows[6].with_neighbour > 500


def test_order_and_files_change_no_number(finished, debian_sample, tmp_path):
    output, _ = finished(8)
    rows = read_files(debian_sample.files).select(["id", "embedding"])
    shuffled = rows.take(pa.array(np.random.default_rng(1).permutation(rows.num_rows)))
    folder = write_split(tmp_path / "in", shuffled, 7, compression="none")
    deduplicate(folder, tmp_path / "out", eps=EPS, n_clusters=8, kept="none")
    one, other = audit(output, min_neighbours=100), audit(tmp_path / "out", min_neighbours=100)
    assert numbers(one) == numbers(other)
    assert numbers(audit(output, min_neighbours=100, seed=1)) != numbers(one)


# --- runs of all kinds -----------------------------------------------------------------------------------------------


def test_one_cluster_has_recall_1_by_construction_and_costs_nothing(tmp_path):
    source = write_parquet(tmp_path / "in.parquet", twin_table())
    deduplicate(source, tmp_path / "out", eps=EPS, drop_intermediate=True)
    found = audit(tmp_path / "out")
    assert found.run["audit"]["by_construction"]
    assert (found.audit.n_sampled, found.audit.n_rows, found.run["audit"]["passes"]) == (0, 12, 0)
    assert {(row.recall, row.low, row.high) for row in found.audit.recall_rows} == {(1.0, 1.0, 1.0)}
    assert found.audit.answer.share == 0
    assert "recall is 1 by construction" in cli("audit", tmp_path / "out").stdout


def test_a_run_without_eps_has_recall_for_the_grid_and_no_answer(debian_sample, tmp_path):
    deduplicate(debian_sample.files[0], tmp_path / "out", n_clusters=8)
    found = audit(tmp_path / "out", min_neighbours=100).audit
    assert found.eps == 0.05
    assert found.answer is None
    assert [row.eps for row in found.recall_rows] == list(EPS_GRID)
    assert "Kept rows" not in cli("audit", tmp_path / "out", "--min-neighbours", 100).stdout


def test_an_answer_of_apply_is_audited_with_the_clusters_of_its_run(finished, debian_sample, tmp_path):
    deduplicate(debian_sample.files[0], tmp_path / "out", n_clusters=60)
    audit(tmp_path / "out", min_neighbours=100)
    assert apply(tmp_path / "out", eps=0.1, kept="none").audit is None
    apply(tmp_path / "out", eps=0.1, kept="none", to=tmp_path / "elsewhere")
    deduplicate(debian_sample.files[0], tmp_path / "direct", n_clusters=60, eps=0.1, kept="none")
    before = snapshot(tmp_path / "out")
    expected = numbers(audit(tmp_path / "direct"))
    assert numbers(audit(tmp_path / "out" / "eps=0.1")) == expected
    assert numbers(audit(tmp_path / "elsewhere")) == expected
    assert expected["answer"]["share"] > 0
    changed = {name for name, facts in snapshot(tmp_path / "out").items() if before.get(name) != facts}
    assert changed == {"eps=0.1/run.json"}
    # moved together, they still belong together; alone, an answer has no clusters
    (tmp_path / "out").rename(tmp_path / "moved")
    assert numbers(audit(tmp_path / "moved" / "eps=0.1")) == expected
    with pytest.raises(ParameterError, match="not there any more"):
        audit(tmp_path / "elsewhere")


def test_the_clusters_of_another_run_are_never_taken(debian_sample, tmp_path):
    deduplicate(debian_sample.files[0], tmp_path / "out", n_clusters=8)
    apply(tmp_path / "out", eps=0.1, kept="none", to=tmp_path / "elsewhere")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    (tmp_path / "out" / "run.json").write_text(json.dumps({**run, "finished": "2020-01-01T00:00:00+00:00"}))
    with pytest.raises(ParameterError, match="not there any more"):
        audit(tmp_path / "elsewhere")


def test_only_the_audit_in_run_json_changes_and_a_second_one_replaces_it(finished, tmp_path):
    shutil.copytree(finished(8)[0], tmp_path / "out")
    path = tmp_path / "out" / "run.json"
    run = json.loads(path.read_text())
    run.pop("audit", None)
    path.write_text(json.dumps(run))
    before = snapshot(tmp_path / "out")
    for seed in (1, 2):
        audit(tmp_path / "out", seed=seed, min_neighbours=50)
        after = json.loads(path.read_text())
        assert after.pop("audit")["parameters"]["seed"] == seed
        assert after == run
    now = snapshot(tmp_path / "out")
    assert {name for name in now if now[name] != before.get(name)} == {"run.json"}
    assert set(now) == set(before)
    assert not (tmp_path / "out" / "_audit").exists()


def test_run_with_audit_looks_before_intermediate_files_are_dropped(debian_sample, tmp_path):
    options = ["--eps", 0.05, "--n-clusters", 8, "--kept", "none", "--drop-intermediate", "--audit"]
    text = cli("run", debian_sample.files[0], tmp_path / "out", *options).stdout
    assert WORDS in text
    assert not (tmp_path / "out" / "kmeans").exists()
    assert not (tmp_path / "out" / "pairwise").exists()
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["audit"]["measures"] == WORDS
    assert run["audit"]["sampled"] > 0
    again = cli("run", debian_sample.files[0], tmp_path / "out", *options)
    assert "finished already" in again.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == run
    assert "kmeans" in cli("audit", tmp_path / "out", code=2).stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == run


def test_run_with_audit_adds_it_to_a_run_that_is_finished(debian_sample, tmp_path):
    plain = deduplicate(debian_sample.files[0], tmp_path / "out", eps=EPS, n_clusters=8)
    assert plain.audit is None
    before = snapshot(tmp_path / "out")
    added = deduplicate(debian_sample.files[0], tmp_path / "out", eps=EPS, n_clusters=8, audit=True)
    assert added.audit.n_sampled > 0
    assert {**added.run, "audit": None} == {**plain.run, "audit": None}
    assert {n for n, facts in snapshot(tmp_path / "out").items() if facts != before.get(n)} == {"run.json"}
    # without the flag it stays there, and is shown
    assert deduplicate(debian_sample.files[0], tmp_path / "out", eps=EPS, n_clusters=8).audit == added.audit


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_measures_and_shows_every_eps(finished):
    output, truth = finished(60)
    text = cli("audit", output, "--eps", 0.1, "--min-neighbours", 10**9, "--max-sample", 10**9).stdout
    assert WORDS in text
    for eps in EPS_GRID:
        (line,) = (line for line in text.splitlines() if line.split()[:1] == [f"{eps:g}"])
        share = f"{truth.recall(eps):.2%}"
        assert line.split()[1:6] == [f"{truth.n_near(eps):,}", share, share, "to", share]
        assert ("in force" in line) == (eps == EPS)
    assert f"within eps 0.05: {truth.kept_share(EPS):.2%}" in text
    assert "exact" in text
    text = cli("audit", output, "--eps", 0.001, "--min-neighbours", 90, "--max-sample", 100).stdout
    assert "--max-sample" in text
    printed = cli("audit", output, "--min-neighbours", 50, "--json").stdout
    assert json.loads(printed) == json.loads((output / "run.json").read_text())


def test_help_names_every_promised_option():
    text = cli("audit", "--help").output
    for option in ["--eps", "--seed", "--min-neighbours", "--max-sample", "--memory", "--workers", "--json", "-v"]:
        assert option in text, option
    assert "--audit" in cli("run", "--help").output


def test_mistakes_are_told(tmp_path):
    text = cli("audit", tmp_path / "nothing", code=2).stderr
    assert str(tmp_path / "nothing") in text
    assert "run.json" in text
    source = write_parquet(tmp_path / "in.parquet", twin_table())
    cli("run", source, tmp_path / "out", "--n-clusters", 3, "--eps", 0.05, "--drop-intermediate")
    assert "drop_intermediate" in cli("audit", tmp_path / "out", code=2).stderr
    cli("run", source, tmp_path / "out", "--n-clusters", 3, "--overwrite")
    before = snapshot(tmp_path / "out")
    assert "0 and less than 1" in cli("audit", tmp_path / "out", "--eps", 1.5, code=2).stderr
    assert "min_neighbours" in cli("audit", tmp_path / "out", "--min-neighbours", 0, code=2).stderr
    assert "max_sample" in cli("audit", tmp_path / "out", "--max-sample", 0, code=2).stderr
    with pytest.raises(ParameterError, match=r"max_sample is 2\.5"):
        audit(tmp_path / "out", max_sample=2.5)
    assert "seed" in cli("audit", tmp_path / "out", "--seed", -1, code=2).stderr
    assert "memory" in cli("audit", tmp_path / "out", "--memory", "2MB", code=2).stderr
    assert snapshot(tmp_path / "out") == before


def test_an_interrupted_audit_changes_nothing_and_says_so(finished, monkeypatch):
    output, _ = finished(8)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    before = snapshot(output)
    monkeypatch.setattr("untwin.jobs.recall.AuditCountStage.process", interrupt)
    # would end this process, if a thread of the pool is still there
    monkeypatch.setattr("untwin.cli._leave_threads", lambda: None)
    text = cli("audit", output, code=130).stderr
    assert f"nothing in {output} has changed" in text
    assert snapshot(output) == before


def test_an_audit_and_other_work_in_the_same_output_exclude_each_other(finished, debian_sample, tmp_path):
    output, _ = finished(8)
    folder = OutputFolder(Storage(), str(output))
    before = snapshot(output)
    with locked(folder.storage, folder.path), pytest.raises(OutputInUseError, match=f"process {os.getpid()}, started"):
        audit(output)
    assert snapshot(output) == before

    class Meddler:
        """While the audit is at work."""

        def start(self, name, n_rows):
            for work in (
                lambda: audit(output),
                lambda: deduplicate(debian_sample.path, output, eps=EPS, n_clusters=8, overwrite=True),
            ):
                with pytest.raises(OutputInUseError, match=f"process {os.getpid()}, started"):
                    work()
            told.append(name)

        def advance(self, n_rows):
            pass

        def finish(self):
            pass

    told = []
    audit(output, progress=Meddler())
    assert told
    assert not (output / "_lock.json").exists()


def test_an_audit_of_the_run_does_not_disturb_an_answer_that_is_being_made(debian_sample, tmp_path):
    deduplicate(debian_sample.path, tmp_path / "out", n_clusters=8)

    class Auditor:
        """Audits the run while `apply` is at work."""

        def start(self, name, n_rows):
            audit(tmp_path / "out", min_neighbours=50)

        def advance(self, n_rows):
            pass

        def finish(self):
            pass

    assert apply(tmp_path / "out", eps=EPS, kept="none", progress=Auditor()).n_duplicates > 100
    assert json.loads((tmp_path / "out" / "run.json").read_text())["audit"] is not None


def test_no_neighbour_at_all_gives_no_recall(tmp_path):
    source = write_parquet(tmp_path / "in.parquet", table_of(["a", "b", "c", "d"], np.eye(4)))
    deduplicate(source, tmp_path / "out", n_clusters=3, eps=0.05)
    found = audit(tmp_path / "out").audit
    assert {(row.with_neighbour, row.recall) for row in found.recall_rows} == {(0, None)}
    assert (found.answer.kept, found.answer.share) == (4, 0.0)
    assert cli("audit", tmp_path / "out").stdout.count(" - ") >= len(EPS_GRID)


def test_overwrite_removes_what_a_killed_audit_left(debian_sample, tmp_path):
    source = write_parquet(tmp_path / "in.parquet", twin_table())
    cli("run", source, tmp_path / "out", "--n-clusters", 3)
    left = tmp_path / "out" / "_audit" / "vectors-000000.npy"
    left.parent.mkdir()
    left.write_bytes(b"half")
    cli("run", source, tmp_path / "out", "--n-clusters", 2, "--overwrite")
    assert not left.exists()
