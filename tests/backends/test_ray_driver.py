"""On a shared folder, too, a driver leaves all reading of the data to the workers of the cluster; and they share it."""

import json
import shutil
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import untwin
from ray_cluster import ray_cluster
from untwin.storage.files import Storage
from untwin.storage.listing import Fields, list_inputs

UNSHARE = shutil.which("unshare")
HIDE = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && test -z "$(ls "$0")" && exec "$@"')
"""Run a command that sees an empty folder in the place of a folder, where everybody else sees what is in it."""

JOB = """
import json, sys, untwin
given, output, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
untwin.deduplicate(given, output, backend="ray", **options)
untwin.apply(output, eps=0.05, backend="ray", workers=2)
untwin.audit(output, backend="ray", workers=2)
"""

LISTINGS = """
import os, sys
from untwin.backends.ray import RayExecutor
from untwin.storage.files import Storage
from untwin.storage.listing import Fields, list_inputs
from untwin.storage.spread import in_parts

def others(n_files):
    return set(in_parts(lambda _: os.getpid(), range(n_files))) - {os.getpid()}

fields = Fields("id", "embedding", ("size",))
executor = RayExecutor(workers=2)
listing = executor.call(list_inputs, Storage(), [sys.argv[1]], fields)
listing.write(Storage(), sys.argv[2] + "/spread.parquet")
executor.call(listing.check_unchanged, Storage())
print(len(executor.call(others, 1000)), len(executor.call(others, 5000)) > 0)
"""


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster() as cluster:
        yield cluster


def can_hide(folder):
    return UNSHARE and subprocess.run([*HIDE, folder, "true"], capture_output=True, check=False).returncode == 0


def test_a_driver_that_cannot_see_the_input_gives_the_local_answer(cluster, debian_sample, tmp_path):
    given = tmp_path / "in"
    given.mkdir()
    table = pq.read_table(debian_sample.path).slice(0, 1500)
    for number in range(3):
        pq.write_table(table.slice(500 * number, 500), given / f"{number}.parquet")
    if not can_hide(given):
        pytest.skip("this user cannot have a file system of a process's own")
    options = {"eps": 0.1, "n_clusters": 6, "workers": 2}
    cluster.drive(JOB, given, tmp_path / "ray", json.dumps(options), before=[*HIDE, given])
    untwin.deduplicate(given, tmp_path / "local", **options)
    untwin.apply(tmp_path / "local", eps=0.05)
    untwin.audit(tmp_path / "local")
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("ray", "local")]
    assert runs[0]["rows"] == runs[1]["rows"]
    assert runs[0]["rows"]["duplicates"] > 100
    assert runs[0]["audit"]["recall"] == runs[1]["audit"]["recall"]
    for part in ("kept", "duplicates", "eps=0.05/kept", "eps=0.05/duplicates"):
        got, want = (pq.read_table(tmp_path / name / part, partitioning=None) for name in ("ray", "local"))
        assert got.equals(want), part


def test_a_listing_that_workers_share_is_the_one_that_one_process_makes(cluster, tmp_path):
    """More files than one part has, of two schemas that take turns, some without rows."""
    given = tmp_path / "in"
    given.mkdir()
    for number in range(2300):
        n_rows = number % 3
        kind = pa.float32() if number // 700 % 2 else pa.float64()
        columns = {
            "id": [f"{number}-{row}" for row in range(n_rows)],
            "embedding": pa.array([[1.0, 2.0]] * n_rows, pa.list_(kind)),
            "size": pa.array([1] * n_rows, pa.int32()),
        }
        pq.write_table(pa.table(columns), given / f"{number:05d}.parquet", row_group_size=1)
    said, _ = cluster.drive(LISTINGS, given, tmp_path)
    assert said.split() == ["0", "True"], "one part is read by the worker that was asked, many by others"
    alone = list_inputs(Storage(), [str(given)], Fields("id", "embedding", ("size",)))
    assert alone.files.num_rows == 2300
    alone.write(Storage(), str(tmp_path / "alone.parquet"))
    assert (tmp_path / "spread.parquet").read_bytes() == (tmp_path / "alone.parquet").read_bytes()
