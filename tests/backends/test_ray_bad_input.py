"""What a user gets wrong about a Ray cluster is told at once, in one message, before any work starts."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("ray")

import ray
from ray_faults import Pieces, cluster_of, environment

from inputs import TWINS, ids_of, twin_table, write_parquet
from untwin import deduplicate
from untwin.backends import ray as backend
from untwin.backends.local import LocalExecutor
from untwin.backends.ray import RayExecutor
from untwin.errors import InputNotFoundError, MissingExtraError, ParameterError, ResourceError
from untwin.jobs.parameters import RunParameters
from untwin.jobs.run import prepare

can_unshare = pytest.mark.skipif(
    not sys.platform.startswith("linux") or subprocess.call(["unshare", "-m", "true"], stderr=subprocess.DEVNULL) != 0,
    reason="needs mount namespaces",
)


@pytest.fixture(scope="module")
def cluster():
    with cluster_of(1) as started:
        yield started


@pytest.fixture(autouse=True)
def _disconnected():
    yield
    ray.shutdown()


@pytest.fixture
def source(tmp_path):
    return os.path.dirname(write_parquet(tmp_path / "in" / "a.parquet", twin_table()))  # noqa: PTH120


def untwin(source, out, *options, before=(), code="from untwin.cli import main; main()", **variables):
    """Start the command in a process of its own, with a small input."""
    command = [sys.executable, "-c", code, "run", source, str(out), "--eps", "0.05", *options]
    return subprocess.Popen(
        [*before, *command],
        env={**environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refusal(process, out):
    """The one message of a run that ends as after a user's mistake, and has written nothing."""
    said, text = process.communicate(timeout=60)
    assert process.returncode == 2, text
    assert said == ""
    assert text.startswith("untwin: ")
    assert text.count("\n") == 1, text
    assert not out.exists()
    return text


# --- Ray itself ------------------------------------------------------------------------------------------------------


def test_without_ray_the_extra_is_named(source, tmp_path):
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] == 'ray':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from untwin.cli import main\n"
        "main()\n"
    )
    text = refusal(untwin(source, tmp_path / "out", "--backend", "ray", code=code), tmp_path / "out")
    assert "pip install 'untwin[ray]'" in text


@pytest.mark.parametrize("version", ["2.9.3", "1.13.0", "2.39.0"])
def test_a_ray_that_is_too_old_is_refused(monkeypatch, version):
    monkeypatch.setattr(ray, "__version__", version)
    with pytest.raises(MissingExtraError, match=rf"Ray {version} is too old .* needs 2\.40 .*'untwin\[ray\]'"):
        RayExecutor()
    assert not ray.is_initialized()


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["nowhere", "http://127.0.0.1:8265", "127.0.0.1:", ":6379", "127.0.0.1:99999", "ray://", "127.0.0.1:-1"]
)
def test_an_address_that_makes_no_sense_is_refused_at_once(address):
    began = time.monotonic()
    with pytest.raises(ParameterError, match=r"ray_address is '.*'; give auto, local, HOST:PORT or ray://HOST:PORT"):
        RayExecutor(address)
    assert time.monotonic() - began < 2


def test_an_address_for_the_local_backend_is_refused(source, tmp_path):
    text = refusal(untwin(source, tmp_path / "out", "--ray-address", "auto"), tmp_path / "out")
    assert "ray_address is 'auto', but backend is 'local'" in text


@contextlib.contextmanager
def something_else():
    """The address of a server that is no Ray cluster."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_cluster_that_cannot_be_reached_is_told_in_time(source, tmp_path):
    with something_else() as other:
        addresses = ["127.0.0.1:1", "ray://127.0.0.1:1", "no-such-host.invalid:6379", other, f"ray://{other}"]
        began = time.monotonic()
        outs = [tmp_path / f"out{number}" for number in range(len(addresses))]
        running = [
            untwin(source, out, "--backend", "ray", "--ray-address", address)
            for address, out in zip(addresses, outs, strict=True)
        ]
        texts = [refusal(process, out) for process, out in zip(running, outs, strict=True)]
    assert time.monotonic() - began < 15 + 3 * len(addresses)  # of which Ray's import takes a part
    for address, text in zip(addresses, texts, strict=True):
        assert f"no Ray cluster at {address} (waited 1" in text
        assert "ray start --head" in text
    assert "what listens there is no Ray cluster" in texts[3]


@can_unshare
def test_auto_without_a_cluster_says_so(source, tmp_path):
    """In a namespace of its own: Ray looks through all processes."""
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    process = untwin(
        source, tmp_path / "out", "--backend", "ray", "--ray-address", "auto", before=apart, RAY_TMPDIR=str(tmp_path)
    )
    assert "no Ray cluster at auto (waited " in refusal(process, tmp_path / "out")


def test_a_memory_that_no_node_has_is_lowered_and_told(cluster, caplog):
    executor = RayExecutor(cluster.address, memory=64 << 30)
    assert executor.memory == 2 << 30
    assert "memory is 68.7 GB, but the smallest node of the Ray cluster has 2.1 GB" in caplog.text
    assert executor.execute([Pieces(3, _nothing)]).last


def _nothing(task, context):
    return


# --- nodes that cannot do the work -----------------------------------------------------------------------------------


@contextlib.contextmanager
def another_node(cluster, hidden=None, **variables):
    """A node that was started by itself; it sees an empty folder in place of `hidden`."""
    # else Ray takes this machine's own address for that of the cluster
    code = (
        "from ray._private import services; services.resolve_ip_for_localhost = str; "
        "from ray.scripts.scripts import main; main()"
    )
    start = f'exec {sys.executable} -c "{code}" start --address={cluster.address} --node-ip-address=127.0.0.1 --block'
    start += " --num-cpus=1 --memory=2000000000 --object-store-memory=80000000"
    hide = f"mount -t tmpfs none {hidden} && " if hidden else ""
    before = len(backend._working_nodes())
    process = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", hide + start],
        env={**environment(), **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        wait_for_nodes(before + 1)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
        wait_for_nodes(before)


def wait_for_nodes(count):
    for _ in range(600):
        if len(backend._working_nodes()) == count:
            return
        time.sleep(0.1)
    raise AssertionError(backend._working_nodes())


@can_unshare
def test_an_output_that_a_node_does_not_see_is_told_before_the_first_stage(cluster, source, tmp_path):
    RayExecutor(cluster.address)
    (tmp_path / "hidden").mkdir()
    out = tmp_path / "hidden" / "out"
    with (
        another_node(cluster, tmp_path / "hidden"),
        pytest.raises(ResourceError, match=r"/hidden/out/kmeans: node .* \(127\.0\.0\.1\) .* does not see this folder"),
    ):
        deduplicate(source, out, eps=0.05, rank_by="id:asc", backend="ray")
    assert {path.name for path in out.rglob("*") if path.is_file()} <= {"plan.json", "listing.parquet"}
    deduplicate(source, out, eps=0.05, rank_by="id:asc", backend="ray")
    assert ids_of(out / "duplicates") == sorted(TWINS)


@pytest.mark.slow
@can_unshare
def test_an_input_that_a_node_does_not_see_is_told_before_the_first_stage(cluster, source, tmp_path):
    executor = RayExecutor(cluster.address)
    prepared = prepare(RunParameters((source,), str(tmp_path / "out"), eps=0.05), LocalExecutor())
    with (
        another_node(cluster, source),
        pytest.raises(ResourceError, match=r"/in/a\.parquet: node .* \(127\.0\.0\.1\) .* does not see this file"),
    ):
        dataclasses.replace(prepared, executor=executor).execute()
    assert not (tmp_path / "out" / "_done").exists()


def test_an_input_that_is_not_there_is_looked_for_by_the_cluster(cluster, tmp_path):
    with pytest.raises(InputNotFoundError, match=r"/in: .* node of the Ray cluster"):
        deduplicate(tmp_path / "in", tmp_path / "out", eps=0.05, backend="ray", ray_address=cluster.address)


@pytest.mark.slow
@can_unshare
def test_a_node_without_untwin_is_named(cluster, source, tmp_path):
    fake = tmp_path / "fake" / "untwin"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'untwin'\")\n")
    executor = RayExecutor(cluster.address)
    prepared = prepare(RunParameters((source,), str(tmp_path / "out"), eps=0.05), LocalExecutor())
    with (
        another_node(cluster, PYTHONPATH=str(tmp_path / "fake")),
        pytest.raises(ResourceError, match=r"node .* cannot run untwin \(.*No module named 'untwin'.*; install untwin"),
    ):
        dataclasses.replace(prepared, executor=executor).execute()
