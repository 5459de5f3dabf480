"""A Ray cluster of one node, and drivers that connect to it: in processes and with an environment of their own."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parents[1] / "src"


class RayCluster(NamedTuple):
    """Where to connect to, what a driver needs in its environment for it, and where Ray writes its logs."""

    address: str
    environment: dict[str, str]
    folder: Path

    def drive(self, program, *arguments, environment=None, before=()):
        """Run a Python program as a driver, below a command if one is given; returns (stdout, stderr)."""
        done = subprocess.run(
            [*before, sys.executable, "-c", program, *map(str, arguments)],
            env={**_clean_environment(), **self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=450,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout, done.stderr


@contextlib.contextmanager
def ray_cluster(environment=None, *, cpus=2):
    """Start a cluster whose workers have these environment variables, too; none that begin with AWS_ besides."""
    # Ray makes sockets in it, whose paths must be short
    folder = Path(tempfile.mkdtemp(prefix="untwin-ray-"))
    address = f"127.0.0.1:{_free_port()}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    cluster = RayCluster(address, {"RAY_ADDRESS": address, **token}, folder)
    command = (
        *(sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block"),
        *("--node-ip-address=127.0.0.1", f"--port={address.partition(':')[2]}", f"--num-cpus={cpus}"),
        *("--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"),
    )
    with (folder / "ray-start.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**_clean_environment(), **token, **(environment or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for(address, process)
        yield cluster
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _clean_environment():
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    paths = os.pathsep.join(filter(None, (str(SOURCES), clean.get("PYTHONPATH"))))
    return {**clean, "PYTHONPATH": paths}


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_for(address, process):
    host, port = address.split(":")
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        assert process.poll() is None, "ray start ended"
        assert time.monotonic() < end, "ray start takes too long"
        time.sleep(0.2)
