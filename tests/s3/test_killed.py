"""Runs on S3 that are killed in the middle go on with the same command, and leave no upload behind."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_s3 import EPS, assert_same_answer

import untwin
from untwin.errors import OutputInUseError
from untwin.storage.lock import LOCK

DRIVER = Path(__file__).parents[1] / "jobs" / "killed_run.py"
KMEANS = "out/kmeans/centroid=0/part-0.parquet"


def environment(proxied):
    clean = {name: value for name, value in os.environ.items() if name != "AWS_MAX_ATTEMPTS"}
    return {**clean, **proxied.environment, "AWS_ENDPOINT_URL": proxied.options["endpoint_url"]}


def start(proxied, *options, program=("-m", "untwin"), **wanted):
    """Start a run in a process of its own."""
    arguments = ["run", proxied.url("in"), proxied.url("out"), *options]
    if wanted:
        program, arguments = [str(DRIVER)], [json.dumps({"argv": arguments, **wanted})]
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        env=environment(proxied),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out


class KillAt:
    """Kills the process that is started next, while it waits for the answer to one of its requests."""

    def __init__(self, proxy, chosen):
        self.process = None
        self._chosen = chosen
        proxy.reset(self)

    def __call__(self, request):
        if self.process is None or not self._chosen(request):
            return None
        return self._kill

    def _kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        return "cut"


# ---- uploads that nobody completes ------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path, proxied):
    """An input of 6 MB, whose clusters need an upload of several parts."""
    vectors = np.random.default_rng(0).normal(size=(3000, 512)).astype(np.float32)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 512)
    (tmp_path / "large").mkdir()
    pq.write_table(pa.table({"id": pa.array(range(3000)), "embedding": flat}), tmp_path / "large/0.parquet")
    proxied.upload(tmp_path / "large", "in")


LARGE = ("--eps", "0.05", "--n-clusters", "1", "--workers", "2", "--storage-options", '{"default_block_size": 5242880}')


@pytest.fixture
def abandoned(proxy, proxied, large):
    """A run that was killed while it uploaded a part, and uploads of others that are in work."""
    killer = KillAt(proxy, lambda request: request.kind == "PART" and request.key == KMEANS)
    killer.process = start(proxied, *LARGE)
    finish(killer.process, -signal.SIGKILL)
    assert [key for key, _ in proxied.uploads()] == [KMEANS]
    others = ["out-other/kmeans/centroid=0/part-0.parquet", "in/new.parquet", "out/mine.bin", "kmeans/_centroids.npy"]
    for key in others:
        proxied.client.create_multipart_upload(Bucket=proxied.name, Key=key)
    assert len(proxied.uploads()) == 5
    proxy.reset()
    return sorted(others)


def test_uploads_of_a_killed_run_are_aborted_when_it_goes_on_and_no_others(proxy, proxied, abandoned):
    another_answer = "out/eps=0.1/kept/part-00000.parquet"
    proxied.client.create_multipart_upload(Bucket=proxied.name, Key=another_answer)
    finish(start(proxied, *LARGE))
    assert sorted(key for key, _ in proxied.uploads()) == sorted([*abandoned, another_answer])
    (listing, *_) = proxy.entries(kind="UPLOADS")
    assert "prefix=out%2F" in listing.request.query
    locked = next(entry for entry in proxy.log if entry.request.kind == "CONDITIONAL" and entry.status == 200)
    assert listing.at > locked.at
    assert {entry.request.key for entry in proxy.entries(kind="ABORT")} == {KMEANS}
    run = json.loads(proxied.contents("out/")["run.json"])
    assert run["rows"]["kept"] == run["rows"]["input"] == 3000
    assert {stage["name"]: stage["reused"] for stage in run["stages"] if stage["reused"]}.keys() >= {"sample", "fit"}


@pytest.mark.slow
def test_uploads_of_a_killed_run_are_aborted_by_overwrite(proxy, proxied, abandoned):
    finish(start(proxied, *LARGE, "--seed", "1", "--overwrite"))
    assert sorted(key for key, _ in proxied.uploads()) == abandoned


@pytest.mark.slow
@pytest.mark.parametrize("answer", [403, (501, b"<Error><Code>NotImplemented</Code><Message>no</Message></Error>")])
def test_a_storage_that_does_not_list_uploads_is_no_obstacle(proxy, proxied, abandoned, answer):
    proxy.reset(lambda request: answer if request.kind == "UPLOADS" else None)
    finish(start(proxied, *LARGE))
    assert sorted(key for key, _ in proxied.uploads()) == sorted([*abandoned, KMEANS])


@pytest.mark.slow
def test_an_upload_whose_beginning_was_not_answered_is_aborted_at_the_end_of_the_run(proxy, proxied, large):
    proxy.reset(lambda request: "lost" if request.kind == "CREATE" and request.attempt == 0 else None)
    finish(start(proxied, *LARGE))
    begun = [entry.status for entry in proxy.entries(kind="CREATE", key=KMEANS)]
    assert begun == [None, 200]
    assert proxied.uploads() == []


# ---- killed and resumed -----------------------------------------------------------------------------------------

SMALL = ("--eps", str(EPS), "--n-clusters", "3", "--workers", "2")


@pytest.fixture
def undisturbed(proxy, proxied, source):
    """What a run in small units gives, and how many requests it makes."""
    proxied.upload(source, "in")
    proxy.reset()
    finish(start(proxied, *SMALL, small=2048))
    contents, n_requests = proxied.contents("out/"), len(proxy.log)
    for name in contents:
        proxied.client.delete_object(Bucket=proxied.name, Key=f"out/{name}")
    return contents, n_requests


def assert_same_rows(contents, undisturbed):
    ours = {name: content for name, content in contents.items() if not name.startswith("_")}
    assert_same_answer(ours, {name: content for name, content in undisturbed.items() if not name.startswith("_")})
    # a kill between the last file and the release of the lock leaves a finished run with the lock of the dead
    assert sorted(set(contents) - {LOCK}) == sorted(undisturbed)


def _kill_and_resume(proxy, proxied, undisturbed, seed):
    dice = random.Random(seed)
    n_kills = 0
    for _ in range(dice.randint(1, 2)):
        number = dice.randint(5, undisturbed[1] - 5)
        killer = KillAt(proxy, lambda _, number=number: len(proxy.log) >= number)
        killer.process = start(proxied, *SMALL, small=2048)
        killer.process.communicate(timeout=120)
        assert killer.process.returncode in (0, -signal.SIGKILL)
        n_kills += killer.process.returncode != 0
    proxy.reset()
    finish(start(proxied, *SMALL, small=2048))
    assert_same_rows(proxied.contents("out/"), undisturbed[0])
    assert proxied.uploads() == []
    return n_kills


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 112))
def test_runs_killed_at_any_request_give_the_answer_of_an_undisturbed_run(proxy, proxied, undisturbed, seed):
    assert _kill_and_resume(proxy, proxied, undisturbed, seed) > 0


@pytest.mark.slow
def test_a_killed_run_on_s3_does_not_repeat_what_is_done(proxied, undisturbed, tmp_path):
    """Killed after half of the units that read the input; the lock that it left is taken over."""
    log = tmp_path / "log"
    files = ("--memory", "512MB")  # with so little nothing is held in memory from one stage to the next
    finish(start(proxied, *SMALL, *files, small=2048, chain="assign", marker=3, log=str(log)), -signal.SIGKILL)
    assert LOCK in proxied.contents("out/")
    begun = log.read_text().splitlines()
    finish(start(proxied, *SMALL, *files, small=2048, log=str(log)))
    assert_same_rows(proxied.contents("out/"), undisturbed[0])
    stages = {stage["name"]: stage for stage in json.loads(proxied.contents("out/")["run.json"])["stages"]}
    assert stages["sample"]["reused"] == stages["sample"]["units"] >= 5
    assert 3 <= stages["assign"]["reused"] <= 4
    again = [line for line in log.read_text().splitlines()[len(begun) :] if line.startswith(("sample", "assign"))]
    assert len(again) == stages["assign"]["units"] - stages["assign"]["reused"]


def test_a_lock_of_another_host_stands(proxied, source):
    proxied.upload(source, "in")
    held = b'{"host": "elsewhere", "pid": 7, "started": "2026-01-01T00:00:00+00:00"}'
    proxied.client.put_object(Bucket=proxied.name, Key=f"out/{LOCK}", Body=held)
    with pytest.raises(OutputInUseError, match="host elsewhere, process 7, started 2026-01-01"):
        untwin.deduplicate(proxied.url("in"), proxied.url("out"), eps=EPS, storage_options=proxied.options)
    assert proxied.contents("out/") == {LOCK: held}
