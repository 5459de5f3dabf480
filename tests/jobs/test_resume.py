"""A run that was killed at any moment goes on with the same command, and gives what an undisturbed run gives."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from inputs import (
    Answer,
    awkward_source,
    ids_of,
    parquet_files,
    read_folder,
    snapshot,
    table_of,
    write_parquet,
)
from untwin import apply, deduplicate
from untwin.errors import OutputExistsError, OutputInUseError

DRIVER = Path(__file__).with_name("killed_run.py")
OPTIONS = ["--eps", "0.05", "--n-clusters", "12", "--on-repeated-id", "first", "--workers", "2", "--memory", "512MB"]
"""With so little memory nothing is held in it from one stage to the next."""
HELD = ["--memory", "2GB"]
CHAINS = [
    "sample",
    "fit",
    "assign",
    "repeated-ids",
    "gather.pairwise.select-duplicates",
    "merge-duplicates",
    "remove",
]
"""What runs unit by unit, between barriers."""
PROBES = ["--probes", "3", "--eps", "0.4"]
CHAINS_WITH_PROBES = [
    *CHAINS[:4],
    "gather.pairwise",
    "visit",
    "compare-across",
    "reopen",
    "resolve",
    "answer.select-duplicates",
    *CHAINS[5:],
]
WITH_PROBES = CHAINS_WITH_PROBES[5:10]
ONE_UNIT = ("fit", "resolve", "merge-duplicates")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return awkward_source(tmp_path_factory.mktemp("source") / "in", 2400, 8)


def command(source, out, *options, **wanted):
    wanted = {"argv": ["run", str(source), str(out), *OPTIONS, *options], "output": str(out), **wanted}
    return [sys.executable, str(DRIVER), json.dumps(wanted)]


def start(source, out, *options, **wanted):
    """Run untwin in a process of its own, in the way that `killed_run.py` describes."""
    return subprocess.run(
        command(source, out, *options, **wanted), capture_output=True, text=True, check=False, timeout=120
    )


def finish(source, out, *options, **wanted):
    done = start(source, out, *options, **wanted)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """The output folder of a run that nobody killed, its answer, and how many file operations it took."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = finish(source, out, operation=10**9)
    return out, Answer(out), int(done.stderr.split("operations ")[1])


@pytest.fixture(scope="module")
def undisturbed_with_probes(source, tmp_path_factory):
    """The same with rows compared across the borders of clusters."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = finish(source, out, *PROBES, operation=10**9)
    assert read_run(out)["borders"]["open_rows"] > 10
    return out, Answer(out), int(done.stderr.split("operations ")[1])


def _kill_and_resume(source, out, undisturbed, seed, *options):
    """Kill one to three runs at random operations and moments, then let one run through; the number of kills."""
    rng = np.random.default_rng(seed)
    operations = undisturbed[2]
    n_kills = 0
    for number in range(int(rng.integers(1, 4))):
        held = HELD if rng.random() < 0.5 else []  # takes fewer operations
        if number == 0:
            how = {"operation": int(rng.integers(1, operations // 2 if held else operations - 50))}
        elif rng.random() < 0.5:
            how = {"operation": int(rng.integers(1, operations // 2))}
        else:
            how = {"seconds": float(rng.uniform(0, 0.5))}
        done = start(source, out, *options, *held, **how)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        n_kills += done.returncode != 0
    finish(source, out, *options, *(HELD if rng.random() < 0.5 else []))
    assert Answer(out) == undisturbed[1]
    assert n_kills
    return n_kills


@pytest.mark.parametrize("seed", range(6))
def test_killed_runs_give_the_answer_of_an_undisturbed_run(source, tmp_path, undisturbed, seed):
    assert undisturbed[2] > 200
    _kill_and_resume(source, tmp_path / "out", undisturbed, seed)


@pytest.mark.parametrize("seed", range(3))
def test_killed_runs_with_probes_give_the_answer_of_an_undisturbed_run(source, tmp_path, undisturbed_with_probes, seed):
    _kill_and_resume(source, tmp_path / "out", undisturbed_with_probes, seed, *PROBES)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], PROBES], ids=str)
def test_many_killed_runs_give_the_answer_of_an_undisturbed_run(
    source, tmp_path, undisturbed, undisturbed_with_probes, options
):
    expected = undisturbed_with_probes if options else undisturbed
    kills = [_kill_and_resume(source, tmp_path / str(seed), expected, seed, *options) for seed in range(100, 140)]
    assert sum(kills) >= 30


@pytest.mark.parametrize("chain", CHAINS)
def test_only_units_in_flight_are_done_again(source, tmp_path, undisturbed, chain):
    _kill_after_half_of_a_stage(source, tmp_path, undisturbed, chain, CHAINS)


@pytest.mark.parametrize("chain", WITH_PROBES)
def test_only_units_in_flight_are_done_again_with_probes(source, tmp_path, undisturbed_with_probes, chain):
    _kill_after_half_of_a_stage(source, tmp_path, undisturbed_with_probes, chain, CHAINS_WITH_PROBES, *PROBES)


def _kill_after_half_of_a_stage(source, tmp_path, undisturbed, chain, chains, *options):
    """Killed after half of a stage's units; counted from the units that began in both runs, and from run.json."""
    out, log = tmp_path / "out", tmp_path / "log"
    stages = {stage["name"].replace(" ", "-"): stage for stage in read_run(undisturbed[0])["stages"]}
    n_units = {name: stages[name.split(".")[0]]["units"] for name in chains}
    half = (n_units[chain] + 1) // 2
    assert n_units[chain] >= 4 or chain in ONE_UNIT
    assert start(source, out, *options, chain=chain, marker=half, log=str(log)).returncode == -signal.SIGKILL
    # other threads and memory may finish it
    done = finish(source, out, *options, "--workers", "1", "--memory", "400MB", log=str(log))
    begun = Counter(line.split()[0] for line in log.read_text().splitlines())
    assert sum(begun.values()) <= sum(n_units.values()) + 2
    for name in chains:
        assert n_units[name] <= begun[name] <= n_units[name] + (2 if name == chain else 0)
    reused = {stage["name"].replace(" ", "-"): stage["reused"] for stage in read_run(out)["stages"]}
    for name in chains:
        expected = n_units[name] if chains.index(name) < chains.index(chain) else 0
        for stage in name.split("."):
            if name == chain:
                assert half <= reused[stage] <= half + 1
            else:
                assert reused[stage] == expected
    assert f"{sum(reused.values()):,}  units of an interrupted run" in done.stdout
    assert Answer(out) == undisturbed[1]


@pytest.mark.parametrize("then", [HELD, []], ids=["held", "files"])
def test_shards_held_in_memory_are_made_again_and_nothing_else(source, tmp_path, undisturbed, then):
    """What a kill takes with it is redone from the input; finished clusters and the stages before stay."""
    out, gather = tmp_path / "out", "gather.pairwise.select-duplicates"
    killed = start(source, out, *HELD, chain=gather, marker=3)
    assert killed.returncode == -signal.SIGKILL
    assert not list((out / "kmeans/_work").glob("shards/*"))
    assert (out / "_done/repeated-ids.json").exists()
    assert not (out / "_done/assign.json").exists()
    finish(source, out, *then)
    reused = {stage["name"]: stage["reused"] for stage in read_run(out)["stages"]}
    assert reused["sample"]
    assert reused["fit"]
    assert not reused["assign"]
    assert reused["gather"] >= 3
    assert Answer(out) == undisturbed[1]


def test_once_the_clusters_are_written_nothing_held_in_memory_is_missed(source, tmp_path, undisturbed):
    out = tmp_path / "out"
    assert start(source, out, *HELD, chain="remove", marker=1).returncode == -signal.SIGKILL
    finish(source, out, *HELD)
    reused = {stage["name"]: stage["reused"] for stage in read_run(out)["stages"]}
    stages = {stage["name"]: stage for stage in read_run(undisturbed[0])["stages"]}
    before = [name for name in stages if name != "remove"]
    assert [reused[name] for name in before] == [stages[name]["units"] for name in before]
    assert Answer(out) == undisturbed[1]


def read_run(out):
    return json.loads((out / "run.json").read_text())


@pytest.fixture
def half_done(source, tmp_path):
    """An output whose run was killed after half of the clusters."""
    out = tmp_path / "out"
    assert start(source, out, chain=CHAINS[4], marker=3).returncode == -signal.SIGKILL
    return out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--eps", "0.06"], "eps (was 0.05, now 0.06)"),
        (["--seed", "1"], "seed (was 42, now 1)"),
        (["--kept", "mirror"], "kept (was 'compact', now 'mirror')"),
    ],
)
def test_other_parameters_do_not_go_on_with_a_run(source, half_done, options, named):
    before = snapshot(half_done)
    done = start(source, half_done, *options)
    assert named in done.stderr
    assert "--overwrite" in done.stderr
    assert snapshot(half_done) == before


@pytest.mark.parametrize("change", ["new", "gone", "changed"])
def test_a_changed_input_does_not_go_on_with_a_run(source, tmp_path, change):
    folder = tmp_path / "in"
    for path in parquet_files(source):
        write_parquet(folder / path.name, pq.read_table(path))
    out = tmp_path / "out"
    assert start(folder, out, chain="assign", marker=2).returncode == -signal.SIGKILL
    touched = folder / "part-00003.parquet"
    if change == "new":
        touched = folder / "more.parquet"
        write_parquet(touched, table_of(["new"], [[1.0] * 16]))
    elif change == "gone":
        touched.unlink()
    else:
        os.utime(touched, ns=(1, 1))
    text = start(folder, out).stderr
    assert f"1 {change}" in text
    assert str(touched) in text
    assert "--overwrite" in text


def test_a_unit_whose_file_is_damaged_is_done_again(source, tmp_path, undisturbed):
    """One byte of a shard, then a whole shard, of a stage that was not finished."""
    out = tmp_path / "out"
    assert start(source, out, chain="assign", marker=4).returncode == -signal.SIGKILL
    listed = [json.loads(path.read_text())["files"] for path in sorted((out / "_done" / "assign").iterdir())]
    assert len(listed) >= 4
    flipped = out / listed[0][0][0]
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(bytes(content))
    (out / listed[1][0][0]).unlink()
    finish(source, out)
    assert Answer(out) == undisturbed[1]
    reused = {stage["name"]: stage["reused"] for stage in read_run(out)["stages"]}
    assert reused["assign"] == len(listed) - 2


def test_a_damaged_file_of_a_finished_stage_starts_the_run_anew(source, half_done, undisturbed):
    """What it was made from may be gone."""
    path = half_done / "kmeans" / "_centroids.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(bytes(content))
    assert "_centroids.npy: is gone or damaged" in finish(source, half_done).stderr
    assert Answer(half_done) == undisturbed[1]
    assert all(stage["reused"] == 0 for stage in read_run(half_done)["stages"])


def test_files_of_a_killed_attempt_are_never_read(source, half_done, undisturbed):
    """Files under names of ours that no finished unit lists, and files half written; a foreign file stays."""
    table = pq.read_table(parquet_files(half_done / "kmeans")[0])
    stale = [
        half_done / "kmeans" / "centroid=3" / "part-1.parquet",
        half_done / "rejected" / "invalid-000999.parquet",
        half_done / "duplicates" / "part-00077.parquet",
        half_done / "kept" / "part-00999.parquet",
        half_done / "kmeans" / f"_tmp-{'0' * 32}",
    ]
    for path in stale:
        write_parquet(path, table)
    foreign = half_done / "notes.txt"
    foreign.write_text("mine")
    finish(source, half_done)
    assert not any(path.exists() for path in stale)
    assert foreign.read_text() == "mine"
    foreign.unlink()
    assert Answer(half_done) == undisturbed[1]


def test_a_stale_file_in_a_finished_output_is_no_part_of_the_answer(source, tmp_path):
    """Readers take the files that the run lists."""
    out = tmp_path / "out"
    result = deduplicate(source, out, eps=0.05, n_clusters=12, on_repeated_id="first")
    before, reached = result.duplicates(), apply(out, eps=0.1, to=tmp_path / "before").duplicates()
    write_parquet(out / "duplicates" / "part-00009.parquet", before)
    write_parquet(out / "kmeans" / "centroid=0" / "part-7.parquet", pq.read_table(parquet_files(out / "kmeans")[0]))
    assert result.duplicates().equals(before)
    assert apply(out, eps=0.1, to=tmp_path / "after").duplicates().equals(reached)


def test_an_unfinished_output_can_be_moved(source, half_done, undisturbed, tmp_path):
    moved = tmp_path / "elsewhere" / "out"
    moved.parent.mkdir()
    half_done.rename(moved)
    finish(source, moved)
    assert Answer(moved) == undisturbed[1]
    assert max(stage["reused"] for stage in read_run(moved)["stages"]) > 0


def test_overwrite_removes_an_unfinished_run(source, half_done, undisturbed):
    finish(source, half_done, "--overwrite")
    assert all(stage["reused"] == 0 for stage in read_run(half_done)["stages"])
    assert Answer(half_done) == undisturbed[1]


@pytest.mark.parametrize(
    "options", [["--drop-intermediate"], ["--kept", "mirror"], ["--compare-to", "ranked"]], ids=str
)
def test_other_kinds_of_runs_go_on(source, tmp_path, options):
    finish(source, tmp_path / "whole", *options)
    out = tmp_path / "out"
    for number in (150, 300, 450, 600):
        start(source, out, *options, operation=number)
    finish(source, out, *options)
    for name in ("duplicates", "kept", "rejected"):
        assert read_folder(out / name).equals(read_folder(tmp_path / "whole" / name))
    assert (out / "kmeans").exists() != ("--drop-intermediate" in options)


# --- apply -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [2, 40, 100, 160])
def test_a_killed_apply_goes_on(source, undisturbed, tmp_path, operation):
    out = undisturbed[0]
    folder, whole = tmp_path / "folder", tmp_path / "whole"
    expected = apply(out, eps=0.1, to=whole, workers=2)
    argv = ["apply", str(out), "--eps", "0.1", "--to", str(folder)]
    done = start(source, out, argv=argv, output=str(folder), operation=operation)
    assert done.returncode == -signal.SIGKILL
    finish(source, out, argv=argv, output=str(folder))
    for name in ("duplicates", "kept", "pairwise"):
        assert read_folder(folder / name).equals(read_folder(whole / name))
    assert len(ids_of(folder / "kept")) == expected.n_kept
    assert 0 < expected.n_duplicates == read_folder(folder / "duplicates").num_rows


# --- two at once -----------------------------------------------------------------------------------------------------


def _lock(**other):
    from untwin.storage.lock import _mine

    return {**_mine(), **other}


def test_a_second_run_is_told_who_works_there(source, tmp_path):
    """While a first run is at work in another process."""
    out = tmp_path / "out"
    stuck = {"stage": "fit.FitStage", "busy": str(tmp_path / "busy")}
    with subprocess.Popen(command(source, out, stuck=stuck), stdout=subprocess.DEVNULL) as first:
        try:
            _wait_for(tmp_path / "busy")
            before = snapshot(out)
            for options in ([], ["--overwrite"], ["--eps", "0.2"]):
                text = start(source, out, *options).stderr
                assert f"process {first.pid}" in text
                assert f"host {socket.gethostname()}" in text
                assert json.loads((out / "_lock.json").read_text())["started"] in text
            assert snapshot(out) == before
        finally:
            first.kill()
    assert (out / "_lock.json").exists()
    finish(source, out)
    assert not (out / "_lock.json").exists()


def _wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(path)


@pytest.mark.parametrize("other", [{"process_started": "1"}, {"boot": "earlier"}, {"pid": 2**22 + 1}], ids=str)
def test_a_lock_of_a_dead_process_is_taken_over(source, tmp_path, other):
    out = tmp_path / "out"
    out.mkdir()
    (out / "_lock.json").write_text(json.dumps(_lock(**other)))
    assert deduplicate(source, out, eps=0.05, on_repeated_id="first").n_duplicates > 100
    assert not (out / "_lock.json").exists()


def test_a_lock_left_by_a_run_that_was_killed_at_its_very_end_goes_away(source, tmp_path):
    out = tmp_path / "out"
    finish(source, out)
    before = snapshot(out)
    (out / "_lock.json").write_text(json.dumps(_lock(pid=2**22 + 1)))
    assert finish(source, out).returncode == 0
    assert snapshot(out) == before


@pytest.mark.parametrize("other", [{}, {"host": "elsewhere", "pid": 1}, {"pid_namespace": "another"}], ids=str)
def test_a_lock_that_may_be_alive_stands(source, tmp_path, other):
    """By default that of another process of this host, which is alive."""
    from untwin.storage.lock import _process_start

    other = other or {"pid": os.getppid(), "process_started": _process_start(os.getppid())}
    out = tmp_path / "out"
    out.mkdir()
    (out / "_lock.json").write_text(json.dumps(_lock(**other)))
    for overwrite in (False, True):
        with pytest.raises(OutputInUseError, match=r"remove _lock\.json"):
            deduplicate(source, out, eps=0.05, on_repeated_id="first", overwrite=overwrite)
    assert [path.name for path in out.iterdir()] == ["_lock.json"]


# --- interrupts and full disks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage",
    [
        "sample.SampleStage",
        "fit.FitStage",
        "assign.AssignStage",
        "pairwise.PairwiseStage",
        "duplicates.MergeStage",
        "removal.RemoveDuplicatesStage",
    ],
)
def test_an_interrupt_ends_within_two_seconds_and_says_how_to_go_on(source, tmp_path, undisturbed, stage):
    _interrupt(source, tmp_path, undisturbed, stage)


@pytest.mark.parametrize("stage", ["borders.VisitStage", "borders.CrossStage", "borders.ReopenStage"])
def test_an_interrupt_with_probes(source, tmp_path, undisturbed_with_probes, stage):
    _interrupt(source, tmp_path, undisturbed_with_probes, stage, *PROBES)


def _interrupt(source, tmp_path, undisturbed, stage, *options):
    """While units are at work that would take a minute more."""
    out, busy = tmp_path / "out", tmp_path / "busy"
    arguments = command(source, out, *options, stuck={"stage": stage, "busy": str(busy)})
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        _wait_for(busy)
        running.send_signal(signal.SIGINT)
        began = time.monotonic()
        text = running.stderr.read()
        code = running.wait(30)
        seconds = time.monotonic() - began
    assert code == 130, text
    assert "the same command goes on" in text
    assert str(out) in text
    assert seconds < 2
    assert not (out / "_lock.json").exists()
    finish(source, out, *options)
    assert Answer(out) == undisturbed[1]


always_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")


@always_full
@pytest.mark.parametrize("chain", CHAINS)
def test_a_full_disk_is_told_and_the_run_goes_on_after_making_room(source, tmp_path, undisturbed, chain):
    _fill_the_disk(source, tmp_path, undisturbed, chain, CHAINS)


@always_full
@pytest.mark.parametrize("chain", WITH_PROBES)
def test_a_full_disk_with_probes(source, tmp_path, undisturbed_with_probes, chain):
    _fill_the_disk(source, tmp_path, undisturbed_with_probes, chain, CHAINS_WITH_PROBES, *PROBES)


def _fill_the_disk(source, tmp_path, undisturbed, chain, chains, *options):
    out = tmp_path / "out"
    done = start(source, out, *options, full=chain)
    assert done.returncode == 2, done.stderr
    assert "no space left on the device; make room, then run again" in done.stderr
    assert str(out) in done.stderr
    finish(source, out, *options)
    assert Answer(out) == undisturbed[1]
    reused = {stage["name"].replace(" ", "-"): stage["reused"] for stage in read_run(out)["stages"]}
    assert all(reused[name.split(".")[0]] for name in chains[: chains.index(chain)])


def test_stages_by_themselves_still_refuse_an_output_that_is_there(source, tmp_path):
    from untwin import KMeansStage, Pipeline

    (tmp_path / "kmeans").mkdir()
    (tmp_path / "kmeans" / "x").touch()
    stage = KMeansStage(4, "id", "embedding", str(source), str(tmp_path / "kmeans"), on_repeated_id="first")
    with pytest.raises(OutputExistsError):
        Pipeline(stages=[stage]).run()
