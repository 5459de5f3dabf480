"""Input and output on S3 with Ray workers: credentials, what the driver reads, and latency that does not add up."""

import io
import json
import random
import re
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from proxy import Proxy
from test_s3 import assert_same_answer, data_of, local_contents

import untwin
from conftest import Bucket
from ray_cluster import ray_cluster
from untwin.errors import StorageError
from untwin.storage.files import Storage

NODES_KEY, NODES_SECRET = "canary-nodes-key-58W", "canary-nodes-secret-Tq4/do+not=write"
DRIVERS_KEY, DRIVERS_SECRET = "canary-driver-key-93P", "canary-driver-secret-Zz8/do+not=write"
GIVEN_KEY, GIVEN_SECRET = "canary-given-key-17L", "canary-given-secret-Hb6/do+not=write"
CANARIES = (NODES_KEY, NODES_SECRET, DRIVERS_KEY, DRIVERS_SECRET, GIVEN_KEY, GIVEN_SECRET)
OPTIONS = {"eps": 0.02, "n_clusters": 12, "probes": 3, "workers": 2}

RUN = """
import json, sys, untwin
given, output, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
print(untwin.deduplicate(given, output, backend="ray", **options))
"""
JOB = f"""
{RUN}
print(untwin.apply(output, eps=0.01, backend="ray", workers=2))
print(untwin.audit(output, backend="ray", workers=2))
"""

STAGES = """
import sys
from untwin import IdentifyDuplicatesStage, KMeansStage, PairwiseStage, Pipeline, RemoveDuplicatesStage
from untwin.backends.ray import RayExecutor
given, output = sys.argv[1], sys.argv[2]
executor = RayExecutor(workers=2)
Pipeline(stages=[KMeansStage(3, "id", "embedding", given, f"{output}/k")]).run(executor)
pairwise = PairwiseStage("id", "embedding", f"{output}/k", f"{output}/p", compare_to="kept", eps=0.02)
Pipeline(stages=[pairwise, IdentifyDuplicatesStage(f"{output}/d", 0.02)]).run(executor)
remove = RemoveDuplicatesStage(given, f"{output}/kept", duplicates_path=f"{output}/d/duplicates")
Pipeline(stages=[remove]).run(executor)
"""


class Gate(Proxy):
    """A proxy that refuses the driver's key what only workers may read: the input, and files with vectors or ids."""

    VECTORS = re.compile(r"/(centroid=\d+|_work|_audit|_borders|_inside|pairwise|[kp]|d)/|cluster_\d+|duplicates/part")

    def shut(self):
        self.reset(lambda request: 403 if request.access_key == DRIVERS_KEY and self._is_shut(request) else None)

    def _is_shut(self, request):
        of_input = request.key.startswith("in/") or re.search(r"prefix=in(%2F|&|$)", request.query)
        small = request.key.endswith(("_centroids.npy", ".bits", ".starts"))
        small = small or re.search(r"/_work/(repeats|counts)/", request.key)
        return of_input or (request.kind == "GET" and self.VECTORS.search(request.key) and not small)


@pytest.fixture(scope="module")
def gate(endpoint):
    with Gate(endpoint) as gate:
        yield gate


@pytest.fixture(scope="module")
def cluster(gate):
    """Two workers that have credentials in their environment, which no driver has."""
    with ray_cluster({**environment(gate, NODES_KEY, NODES_SECRET), "PYTHONWARNINGS": "ignore"}) as cluster:
        yield cluster


def environment(gate, key="", secret=""):
    """Variables of a process that reaches the storage, with credentials or without."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    given = {"AWS_ENDPOINT_URL": gate.url, **dict(zip(names, (key, secret), strict=True))} if key else {}
    return {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", **given}


def assert_clean(where, content):
    for canary in CANARIES:
        assert canary.encode() not in content, f"{canary} in {where}"


@pytest.fixture
def local(source, tmp_path):
    """The answers of the local backend on local folders."""
    untwin.deduplicate(str(source), str(tmp_path / "local"), **OPTIONS)
    untwin.apply(str(tmp_path / "local"), eps=0.01)
    untwin.audit(str(tmp_path / "local"))
    return local_contents(tmp_path / "local")


def split(contents):
    """The files of a run, and those of the answer beside it."""
    inner = {name.partition("/")[2]: content for name, content in contents.items() if name.startswith("eps=")}
    return {name: content for name, content in contents.items() if not name.startswith("eps=")}, inner


def assert_answers_are_those_of(local, remote):
    for got, want in zip(split(remote), split(local), strict=True):
        assert_same_answer(got, want)
        runs = [json.loads(contents["run.json"]) for contents in (got, want)]
        assert runs[0]["resources"]["backend"] == "ray"
        for part in ("borders", "audit"):
            facts = [{**(run.get(part) or {}), "finished": 0, "seconds": 0} for run in runs]
            assert facts[0] == facts[1]


def test_a_driver_that_may_not_read_the_data_gives_the_local_answer(gate, cluster, endpoint, source, local):
    """All reading is done by workers, with the credentials of their nodes; nobody notes any of them."""
    bucket = Bucket(endpoint)
    bucket.upload(source, "in")
    gate.shut()
    drivers = environment(gate, DRIVERS_KEY, DRIVERS_SECRET)
    said = cluster.drive(JOB, bucket.url("in"), bucket.url("out"), json.dumps(OPTIONS), environment=drivers)
    remote = bucket.contents("out/")
    assert_answers_are_those_of(local, remote)
    assert {entry.request.access_key for entry in gate.log} == {NODES_KEY, DRIVERS_KEY}
    assert gate.entries(access_key=NODES_KEY, kind="GET", bucket=bucket.name, key="in/3.parquet")
    assert {entry.status for entry in gate.entries(access_key=DRIVERS_KEY)} <= {200, 204, 206, 404}
    for name, content in remote.items():
        assert_clean(name, content)
    assert_clean("what was said", "".join(said).encode())
    # the gate is one
    driver = Storage({"key": DRIVERS_KEY, "secret": DRIVERS_SECRET, "endpoint_url": gate.url})
    for name in ("in/3.parquet", "out/kmeans/centroid=0/part-0.parquet", "out/pairwise/cluster_0.parquet"):
        with pytest.raises(StorageError, match="access denied"):
            driver.read_bytes(bucket.url(name))


@pytest.mark.slow
def test_stages_of_a_driver_that_may_not_read_the_data_give_the_local_answer(gate, cluster, endpoint, source):
    bucket = Bucket(endpoint)
    bucket.upload(source, "in")
    gate.shut()
    # a row that cannot be judged has no place in the lists
    drivers = environment(gate, DRIVERS_KEY, DRIVERS_SECRET)
    cluster.drive(STAGES, bucket.url("in"), bucket.url("out"), environment=drivers)
    assert {entry.status for entry in gate.entries(access_key=DRIVERS_KEY)} <= {200, 204, 206, 404}
    tables = data_of(bucket.contents("out/"))
    found = pa.concat_tables([table for name, table in tables.items() if name.startswith("d/duplicates/")])
    kept = pa.concat_tables([table for name, table in tables.items() if name.startswith("kept/")])
    removed = set(found["id"].to_pylist())
    assert len(removed) > 60
    rows = pa.concat_tables([pq.read_table(source / f"{number}.parquet") for number in range(6)])
    assert kept.equals(rows.filter(pa.array([own not in removed for own in rows["id"].to_pylist()])))


def test_given_credentials_reach_the_workers_and_nothing_that_anybody_writes(gate, cluster, endpoint, source, tmp_path):
    """Not the output, and none of the files that Ray writes in its session's folder: logs, events, names of tasks."""
    bucket = Bucket(endpoint)
    bucket.upload(source, "in")
    gate.reset()
    options = {**OPTIONS, "probes": 1}
    untwin.deduplicate(str(source), str(tmp_path / "local"), **options)
    given = {"key": GIVEN_KEY, "secret": GIVEN_SECRET, "endpoint_url": gate.url}
    arguments = (bucket.url("in"), bucket.url("out"), json.dumps({**options, "storage_options": given}))
    said = cluster.drive(RUN, *arguments, environment=environment(gate))
    remote = bucket.contents("out/")
    assert_same_answer(remote, local_contents(tmp_path / "local"))
    assert {entry.request.access_key for entry in gate.log} == {GIVEN_KEY}
    for name, content in remote.items():
        assert_clean(name, content)
    assert_clean("what was said", "".join(said).encode())
    written = [path for path in cluster.folder.rglob("*") if path.is_file()]
    assert len([path for path in written if path.parent.name == "logs"]) > 5
    for path in written:
        assert_clean(path, path.read_bytes())


# ---- latency ----------------------------------------------------------------------------------------------------

TIMED = """
import json, sys, time, untwin, untwin.plan
# many units of little data
untwin.plan._MIN_UNIT_BYTES, untwin.plan._SLICE_BYTES = 1 << 18, 1 << 10

class Stamps:
    def __init__(self): self.marks = [("prepare", time.monotonic())]
    def start(self, name, n_rows): self.marks.append((name, time.monotonic()))
    def advance(self, n_rows): pass
    def finish(self): self.marks.append(("end of " + self.marks[-1][0], time.monotonic()))

for bucket in sys.argv[2:]:
    stamps = Stamps()
    given, output = f"s3://{bucket}/in", f"s3://{bucket}/out"
    result = untwin.deduplicate(given, output, progress=stamps, **json.loads(sys.argv[1]))
    units = {stage.name: stage.units for stage in result.timings}
    print(json.dumps({"marks": [*stamps.marks, ("end", time.monotonic())], "units": units, "rows": result.run["rows"]}))
"""
DELAY = 0.03
FILE_ROWS, DIM = 26, 64


class Course:
    """The same job in several buckets, each with faults of its own, one after the other in one driver."""

    def __init__(self, gate, endpoint, n_files, plans, drive, **options):
        self.n_files = n_files
        self.buckets = {name: Bucket(endpoint) for name in plans}
        for name, bucket in self.buckets.items():
            for number, content in enumerate(small_files(8 if name == "warm" else n_files)):
                bucket.client.put_object(Bucket=bucket.name, Key=f"in/{number:05d}.parquet", Body=content)
        named = {bucket.name: plans[name] for name, bucket in self.buckets.items()}
        gate.reset(lambda request: named[request.bucket](request))
        given = {"key": GIVEN_KEY, "secret": GIVEN_SECRET, "endpoint_url": gate.url}
        options = json.dumps({"eps": 0.02, "workers": 2, "storage_options": given, **options})
        said, _ = drive(TIMED, options, *named, environment=environment(gate))
        lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        self.runs = dict(zip(plans, lines, strict=True))
        self.log = list(gate.log)

    def seconds(self, name):
        marks = self.runs[name]["marks"]
        return marks[-1][1] - marks[0][1]

    def requests(self, name):
        """How many requests each step of a run took; faults and their repetitions not counted."""
        marks, counts = self.runs[name]["marks"], Counter()
        for entry in self.log:
            if entry.request.bucket == self.buckets[name].name and entry.status != 503:
                counts[next((step for step, at in reversed(marks) if at <= entry.at), "")] += 1
        del counts[""]  # the upload
        return counts


def small_files(count):
    """Files as embedding pipelines write them: few rows, and a third of these near-copies."""
    rng = np.random.default_rng(0)
    for number in range(count):
        X = rng.normal(size=(FILE_ROWS, DIM))
        X[1::3] = X[:-1:3][: len(X[1::3])] + 0.01 * rng.normal(size=X[1::3].shape)
        ids = [f"clip-{number:05d}-{row:02d}" for row in range(FILE_ROWS)]
        sink = io.BytesIO()
        pq.write_table(pa.table({"id": ids, "embedding": pa.array(X.tolist(), pa.list_(pa.float64()))}), sink)
        yield sink.getvalue()


def slow(share, seed=0):
    """Every answer takes 30 ms, and a share of all first requests is answered with 503."""

    def plan(request):
        time.sleep(DELAY)
        dice = random.Random(f"{seed} {request.kind} {request.key} {request.query}")
        return 503 if request.attempt == 0 and dice.random() < share else None

    return plan


def bounds(course, name, n_clusters):
    """The most requests that each step may take: linear in files, units and clusters."""
    files, units = course.n_files, course.runs[name]["units"]
    inputs, groups = units["sample"], units["gather"]
    return {
        "prepare": files + 100,
        "sample": files + 3 * inputs + 20,
        "assign": files + 8 * inputs + 20,
        "gather + pairwise + select duplicates": 4 * n_clusters + (2 * inputs + 8) * groups + 20,
        "merge duplicates": 8 * groups + 30,
        "remove": files + 8 * units["remove"] + 20,
    }


def check_course(course, n_clusters, faults):
    """The answer is the same, requests are as many as there have to be, and latency does not add up."""
    plain, faulty = course.runs["plain"], course.runs["faulty"]
    assert faulty["rows"] == plain["rows"]
    assert plain["rows"]["duplicates"] >= course.n_files * FILE_ROWS // 4
    met = [e for e in course.log if e.status == 503]
    assert len(met) >= faults
    ratio = course.seconds("faulty") / course.seconds("plain")
    took = course.requests("faulty")
    print(f"{course.seconds('plain'):.1f} s, with latency {course.seconds('faulty'):.1f} s, ratio {ratio:.2f}; {took}")
    for step, most in bounds(course, "faulty", n_clusters).items():
        assert 0 < took[step] <= most, step
    assert ratio < 3


@pytest.mark.slow
def test_latency_and_503_cost_less_than_three_times_the_time(gate, cluster, endpoint):
    plans = {"warm": lambda _: None, "plain": lambda _: None, "faulty": slow(0.01)}
    ray = {"backend": "ray"}
    course = Course(gate, endpoint, 80, plans, cluster.drive, n_clusters=10, **ray)
    check_course(course, 10, faults=1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ray", "local"])
def test_with_many_files_too(gate, cluster, endpoint, backend):
    plans = {"warm": lambda _: None, "plain": lambda _: None, "faulty": slow(0.01)}
    ray = {"backend": "ray"} if backend == "ray" else {}
    course = Course(gate, endpoint, 240, plans, cluster.drive, n_clusters=30, **ray)
    check_course(course, 30, faults=3)
