"""Runs on a real Ray cluster whose workers and nodes are lost finish by themselves, with the undisturbed answer."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("ray")

import ray
import ray_faults
from ray_faults import NODE, Pieces, add_node, cluster_of, environment, with_victims

from inputs import Answer, awkward_source
from untwin import deduplicate
from untwin.backends import ray as backend
from untwin.backends.ray import RayExecutor
from untwin.errors import ParameterError, ResourceError

CHAINS = ["sample", "fit", "assign", "repeated-ids", "gather.pairwise.select-duplicates", "merge-duplicates", "remove"]
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
CHAINS_OF = {1: CHAINS, 2: CHAINS_WITH_PROBES}
OPTIONS = {"eps": 0.4, "n_clusters": 12, "on_repeated_id": "first", "memory": "512MB"}
ON_COMMAND_LINE = ["--eps", "0.4", "--n-clusters", "12", "--on-repeated-id", "first", "--memory", "512MB"]


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    ray_faults.make_units_small(monkeypatch.setattr)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return awkward_source(tmp_path_factory.mktemp("source") / "in", 2400, 8)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """The answers of the local backend, by the number of probes."""
    answers = {}
    with pytest.MonkeyPatch.context() as patch:
        ray_faults.make_units_small(patch.setattr)
        for probes in CHAINS_OF:
            out = tmp_path_factory.mktemp("undisturbed") / "out"
            deduplicate(source, out, probes=probes, **OPTIONS)
            answers[probes] = Answer(out)
    return answers


@pytest.fixture(scope="module")
def cluster():
    """Three nodes: a head without CPUs, and two with one each. Tests leave as many behind."""
    with cluster_of(2) as started:
        yield started


@pytest.fixture
def marks(tmp_path):
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def _disconnected():
    yield
    ray.shutdown()


def run_on(cluster, source, out, probes=1, **options):
    return deduplicate(source, out, probes=probes, backend="ray", ray_address=cluster.address, **{**OPTIONS, **options})


def node_of(cluster, mark):
    return next(node for node in cluster.list_all_nodes() if node.node_id == mark["node"])


@contextlib.contextmanager
def nodes_removed(cluster, marks):
    """Remove the node of each victim once it is at work, and add another one; the nodes that were removed."""
    removed, stop = [], threading.Event()

    def watch():
        seen = set()
        while not stop.wait(0.05):
            for path in sorted(marks.glob("*.met")):
                if path not in seen:
                    seen.add(path)
                    mark = json.loads(path.with_suffix("").read_text())
                    node = node_of(cluster, mark)
                    cluster.remove_node(node, allow_graceful=False)
                    removed.append(mark["node"])
                    add_node(cluster)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield removed
    finally:
        stop.set()
        thread.join()


# --- workers and nodes that are lost ---------------------------------------------------------------------------------


def check_kills(cluster, source, out, marks, undisturbed, monkeypatch, probes):
    """A worker process is killed in each chain, in the midst of a unit."""
    monkeypatch.setattr(backend, "work_on", with_victims(marks, "kill"))
    run_on(cluster, source, out, probes)
    assert {path.name for path in marks.glob("*.met")} == {f"{chain}.json.met" for chain in CHAINS_OF[probes]}
    assert Answer(out) == undisturbed[probes]


def check_removals(cluster, source, out, marks, undisturbed, monkeypatch, probes, chains):
    """A node is removed in each of some chains, in the midst of a unit."""
    monkeypatch.setattr(backend, "work_on", with_victims(marks, "stuck", chains))
    with nodes_removed(cluster, marks) as removed:
        run_on(cluster, source, out, probes)
    assert len(set(removed)) == len(chains)
    assert Answer(out) == undisturbed[probes]


def test_a_worker_killed_in_each_stage_does_not_change_the_answer(
    cluster, source, tmp_path, marks, undisturbed, monkeypatch
):
    check_kills(cluster, source, tmp_path / "out", marks, undisturbed, monkeypatch, 1)


def test_a_node_removed_at_work_does_not_change_the_answer(cluster, source, tmp_path, marks, undisturbed, monkeypatch):
    check_removals(cluster, source, tmp_path / "out", marks, undisturbed, monkeypatch, 2, ["compare-across"])


@pytest.mark.slow
@pytest.mark.parametrize("operation", [1, 2, 5, 9])
def test_a_worker_killed_in_each_stage_with_probes_does_not_change_the_answer(
    cluster, source, tmp_path, marks, undisturbed, monkeypatch, operation
):
    monkeypatch.setattr(ray_faults.with_victims, "__defaults__", (None, operation))
    check_kills(cluster, source, tmp_path / "out", marks, undisturbed, monkeypatch, 2)


@pytest.mark.slow
@pytest.mark.parametrize("probes", [1, 2])
def test_a_node_removed_in_each_stage_does_not_change_the_answer(
    cluster, source, tmp_path, marks, undisturbed, monkeypatch, probes
):
    check_removals(cluster, source, tmp_path / "out", marks, undisturbed, monkeypatch, probes, CHAINS_OF[probes])


def test_without_another_try_a_killed_worker_fails_the_run(cluster, source, tmp_path, marks, monkeypatch):
    monkeypatch.setattr(backend, "work_on", with_victims(marks, "kill", ["assign"]))
    monkeypatch.setattr(backend, "TRIES", 1)
    with pytest.raises(ResourceError, match=r"stage assign, unit \d+ \(begun 1 times\)"):
        run_on(cluster, source, tmp_path / "out")


def test_a_node_that_joins_gets_work(cluster, tmp_path):
    executor = RayExecutor(cluster.address)
    joined = []

    def join():
        time.sleep(1)
        joined.append(add_node(cluster))

    thread = threading.Thread(target=join)
    thread.start()
    executor.execute([Pieces(400, _sleep, str(tmp_path))])
    thread.join()
    try:
        assert sum(executor.units_by_node.values()) == 400
        assert len(executor.units_by_node) == 3
        assert executor.units_by_node[joined[0].node_id] >= 4
    finally:
        cluster.remove_node(joined[0])


def _sleep(task, context, folder):
    """Take long until three nodes have done four units each."""
    Path(folder, f"{ray.get_runtime_context().get_node_id()}-{task.unit}").touch()
    counts = Counter(path.name.split("-")[0] for path in Path(folder).iterdir())
    if sum(count >= 4 for count in counts.values()) < 3:
        time.sleep(0.3)


# --- units that fail -------------------------------------------------------------------------------------------------


def _die(task, context, folder):
    with Path(folder, str(task.unit)).open("a") as log:
        log.write("begun\n")
    if task.unit == 3:
        os._exit(1)


def test_a_unit_whose_worker_dies_every_time_is_given_up_and_named(cluster, tmp_path):
    with pytest.raises(ResourceError, match=r"stage pieces, unit 3 \(begun 6 times\): failed on the Ray cluster"):
        RayExecutor(cluster.address).execute([Pieces(8, _die, str(tmp_path))])
    assert (tmp_path / "3").read_text().count("begun") == 6


class TwoPartsError(Exception):
    """Cannot be unpickled."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


ERRORS = {
    "untwin": ParameterError("eps is 7"),
    "foreign": ValueError("no such thing"),
    "stays": TwoPartsError("this", "that"),
}


def _fail(task, context, folder, kind):
    if task.unit == 1:
        for _ in range(200):
            if Path(folder, "0").exists():
                raise ERRORS[kind]
            time.sleep(0.05)
    while True:
        Path(folder, str(task.unit)).write_text(str(time.time()))
        time.sleep(0.05)


@pytest.mark.parametrize(
    "kind", ["untwin", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ERRORS if kind != "untwin")]
)
def test_an_error_arrives_unchanged_and_the_other_units_stop(cluster, tmp_path, kind):
    error = ERRORS[kind]
    expected = RuntimeError if kind == "stays" else type(error)
    with pytest.raises(expected) as raised:
        RayExecutor(cluster.address).execute([Pieces(6, _fail, str(tmp_path), kind)])
    assert type(raised.value) is expected
    assert str(raised.value) == (f"TwoPartsError: {error}" if kind == "stays" else str(error))
    assert "in stage pieces, unit 1" in raised.value.__notes__

    def written():
        return sorted((path.name, path.read_text()) for path in tmp_path.iterdir())

    # a worker that does not listen is killed, and a busy machine takes its time for that
    for _ in range(20):
        before = written()
        time.sleep(0.5)
        if written() == before:
            break
    assert written() == before
    # Ray may have begun the one unit that waited before it was told to stop
    assert [name for name, _ in before] in (["0"], ["0", "2"])


def _warn(task, context):
    import logging

    if task.unit == 2:
        logging.getLogger("untwin").warning("a.parquet: looks odd")


def test_a_warning_of_a_worker_is_heard_once_on_the_driver(cluster, tmp_path, capfd, caplog):
    RayExecutor(cluster.address).execute([Pieces(4, _warn)])
    assert [record.getMessage() for record in caplog.records].count("a.parquet: looks odd") == 1
    script = (
        f"import ray_faults, test_ray_faults as t\nt.RayExecutor({cluster.address!r}).execute([t.Pieces(4, t._warn)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == "a.parquet: looks odd\n"
    assert done.stdout == ""


# --- interrupts ------------------------------------------------------------------------------------------------------


def start(marks, chain, source, out, address, how="stuck", *options):
    arguments = [str(marks), how, chain, "run", str(source), str(out), "--backend", "ray", *ON_COMMAND_LINE, *options]
    arguments += ["--ray-address", address] if address else ["--workers", "2"]
    command = [sys.executable, ray_faults.__file__, *arguments]
    # a group of its own, as a shell makes it: an interrupt from the keyboard goes to all in it
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )


def wait_for(condition, seconds=60):
    for _ in range(20 * seconds):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.slow
def test_what_ray_says_of_a_lost_worker_is_not_mixed_with_the_result(cluster, source, tmp_path, marks):
    with start(marks, "assign", source, tmp_path / "out", cluster.address, "kill", "--json") as running:
        said, text = running.communicate(timeout=90)
    assert (marks / "assign.json.met").exists()
    assert running.returncode == 0, text
    assert json.loads(said)["rows"]["input"] == 2400
    assert "stage assign, unit" in text
    assert "its worker was lost" in text


@pytest.mark.parametrize("where", [pytest.param("cluster", marks=pytest.mark.slow), "own"])
def test_an_interrupt_ends_the_run_and_any_backend_goes_on(cluster, source, tmp_path, marks, undisturbed, where):
    out = tmp_path / "out"
    chain = "gather.pairwise.select-duplicates" if where == "cluster" else "assign"
    with start(marks, chain, source, out, cluster.address if where == "cluster" else None) as running:
        wait_for((marks / f"{chain}.json.met").exists)
        os.killpg(running.pid, signal.SIGINT)
        began = time.monotonic()
        text = running.stderr.read()
        code = running.wait(30)
        seconds = time.monotonic() - began
    assert code == 130, text
    assert text.startswith("untwin: interrupted; the input is untouched;")
    assert f"{out} holds an unfinished result: the same command goes on" in text
    assert text.count("\n") == 1
    assert seconds < 15
    assert not (out / "_lock.json").exists()
    wait_for(lambda: is_gone(json.loads((marks / f"{chain}.json").read_text())["pid"]), 10)
    result = deduplicate(source, out, **OPTIONS)
    assert result.n_reused > 10
    assert Answer(out) == undisturbed[1]
    assert not list(out.rglob("_tmp-*"))  # a worker that had to be killed may have left one until then


@pytest.mark.slow
def test_a_killed_driver_leaves_a_run_that_another_one_finishes(cluster, source, tmp_path, marks, undisturbed):
    out, chain = tmp_path / "out", "gather.pairwise.select-duplicates"
    with start(marks, chain, source, out, cluster.address) as running:
        wait_for((marks / f"{chain}.json.met").exists)
        running.kill()
    assert (out / "_lock.json").exists()
    wait_for(lambda: is_gone(json.loads((marks / f"{chain}.json").read_text())["pid"]), 10)
    assert run_on(cluster, source, out).n_reused > 10
    assert not (out / "_lock.json").exists()
    assert Answer(out) == undisturbed[1]


def test_a_run_killed_on_the_local_backend_is_finished_on_ray(cluster, source, tmp_path, undisturbed):
    out = tmp_path / "out"
    killed = Path(__file__).parents[1] / "jobs" / "killed_run.py"
    wanted = {"argv": ["run", str(source), str(out), *ON_COMMAND_LINE], "output": str(out)}
    wanted |= {"chain": "gather.pairwise.select-duplicates", "marker": 3}
    done = subprocess.run([sys.executable, killed, json.dumps(wanted)], capture_output=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert run_on(cluster, source, out).n_reused > 10
    assert Answer(out) == undisturbed[1]


@pytest.mark.slow
def test_a_killed_driver_takes_its_own_cluster_along(source, tmp_path, marks):
    with start(marks, "assign", source, tmp_path / "out", None) as running:
        wait_for((marks / "assign.json.met").exists)
        begun = children(running.pid)
        running.kill()
    assert any("raylet" in command for command in begun.values())
    wait_for(lambda: all(map(is_gone, begun)), 30)
    wait_for(lambda: is_gone(json.loads((marks / "assign.json").read_text())["pid"]), 30)


def children(parent):
    """The commands of the processes that a process has started, by their ids."""
    shown = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in shown.splitlines()[1:]]
    return {int(pid): command for pid, own, command in rows if int(own) == parent}


# --- units that are spread over the cluster --------------------------------------------------------------------------


def _square(item):
    Path(item[0], str(item[1])).touch()
    time.sleep(0.3)
    return item[1] ** 2


class Spread(Pieces):
    """One unit, larger than a node, that is spread over the cluster; what it gives is in a file."""

    splittable = True

    def memory(self, task):
        return 8 << 30

    def minimum_memory(self, task):
        return 1 << 20

    def process(self, task, context):
        (folder,) = self.arguments
        Path(folder, "node").write_text(ray.get_runtime_context().get_node_id())
        squares = list(context.spread(_square, [(folder, number) for number in range(40)]))
        Path(folder, "squares").write_text(json.dumps(squares))
        return task


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["another node", "its own node"])
def test_a_spread_unit_goes_on_when_one_node_is_left(cluster, tmp_path, lost):
    """Also with a budget of all the memory that a node has."""
    executor = RayExecutor(cluster.address, memory=NODE["memory"])

    def remove():
        wait_for((tmp_path / "5").exists)
        own = (tmp_path / "node").read_text()
        nodes = [node for node in cluster.worker_nodes if (node.node_id == own) == (lost == "its own node")]
        cluster.remove_node(nodes[0], allow_graceful=False)

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        executor.execute([Spread(1, None, str(tmp_path))])
    finally:
        thread.join()
        cluster.add_node(**NODE)
    assert json.loads((tmp_path / "squares").read_text()) == [number**2 for number in range(40)]
    assert executor.n_lost == (lost == "its own node")


@pytest.mark.slow
def test_a_node_lost_while_it_is_asked_about_the_storage_is_left_out(cluster, source, tmp_path, monkeypatch):
    """The others go on."""
    executor = RayExecutor(cluster.address)
    node = cluster.add_node(**NODE)
    ask = backend._where

    def lose(found):
        if found["NodeID"] == node.node_id and node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)
        return ask(found)

    monkeypatch.setattr(backend, "_where", lose)
    wait_for(lambda: node.node_id in {found["NodeID"] for found in backend._working_nodes()})
    deduplicate(source, tmp_path / "out", backend="ray", **OPTIONS)
    assert node not in cluster.worker_nodes
    assert node.node_id not in executor.units_by_node
