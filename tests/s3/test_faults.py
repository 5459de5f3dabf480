"""Faults between client and server: what passes is retried with growing pauses, what stays ends with a clear error.

The pauses of the library are made short, except in the tests that are called slow.
"""

import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from proxy import FAULTS, SeededPlan, fits
from test_s3 import EPS, OPTIONS, assert_same_answer, local_contents

import untwin
from inputs import cli
from untwin.errors import DamagedFileError, InputNotFoundError, OutputInUseError, StorageError
from untwin.storage import files
from untwin.storage.files import Storage
from untwin.storage.lock import LOCK, locked

ATTEMPTS = 5
"""Of botocore for a request, and of s3fs around those."""
PAUSE = 0.02
"""What the `proxied` fixture puts in the place of a random number between 0 and 1 second."""
GONE = (404, b"<Error><Code>NoSuchUpload</Code><Message>The specified upload does not exist.</Message></Error>")


@pytest.fixture
def local(source, tmp_path):
    untwin.deduplicate(str(source), str(tmp_path / "local"), **OPTIONS)
    return local_contents(tmp_path / "local")


def run(bucket, **options):
    given, output = bucket.url("in"), bucket.url("out")
    return untwin.deduplicate(given, output, storage_options=bucket.options, **{**OPTIONS, **options})


def command(bucket, *options, code=0):
    """The command line in this process; what it printed."""
    arguments = ["run", bucket.url("in"), bucket.url("out"), "--eps", EPS, "--n-clusters", 3, "--workers", 2]
    result = cli(*arguments, "--storage-options", json.dumps(bucket.options), *options, code=code)
    return result.output


def _few(values, *chosen):
    """Parameters of which only the chosen ones belong to the short tests."""
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.slow) for value in values]


def n_reused(contents):
    return sum(stage["reused"] for stage in json.loads(contents["run.json"])["stages"])


# ---- faults that pass -------------------------------------------------------------------------------------------


def _run_through(proxy, proxied, source, local, seed, share):
    proxied.upload(source, "in")
    before = proxied.contents("in/")
    proxy.reset(SeededPlan(seed, share))
    run(proxied, memory="500MB")  # too little to hold anything, so everything goes through the storage
    assert_same_answer(proxied.contents("out/"), local)
    untwin.apply(proxied.url("out"), eps=0.2, storage_options=proxied.options)
    untwin.audit(proxied.url("out"), storage_options=proxied.options)
    assert_permitted(proxy.log)
    assert proxied.contents("in/") == before
    met = [entry for entry in proxy.log if entry.fault]
    assert {entry.request.kind for entry in met} >= {"HEAD", "GET", "LIST", "PUT"}
    assert proxied.uploads() == []
    return Counter(entry.fault for entry in met)


def test_a_run_through_faults_of_all_kinds_gives_the_undisturbed_answer(proxy, proxied, source, local):
    met = _run_through(proxy, proxied, source, local, seed=0, share=0.3)
    assert set(met) == set(FAULTS)
    assert met.total() > 50


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_runs_through_faults_give_the_undisturbed_answer(proxy, proxied, source, local, seed):
    met = _run_through(proxy, proxied, source, local, seed, share=0.45)
    assert set(met) == set(FAULTS)
    assert met.total() > 80


@pytest.mark.slow
def test_a_run_through_faults_with_the_pauses_of_the_library(proxy, proxied, source, local, monkeypatch):
    monkeypatch.undo()
    proxy.delay = 2
    met = _run_through(proxy, proxied, source, local, seed=20, share=0.1)
    assert set(met) >= {500, 503}
    assert met.total() > 20


@pytest.mark.parametrize("fault", _few(FAULTS, "lost", "cut answer", "cut request"))
def test_every_kind_of_request_is_made_again_after_a_fault(proxy, proxied, fault, monkeypatch):
    """The first two attempts at every request meet the fault; uploads in one piece and in several, reads of both."""
    monkeypatch.setattr(files, "_WHOLE_READ_BYTES", 1 << 20)
    storage = Storage({**proxied.options, "default_block_size": 5 << 20})
    proxy.reset(lambda request: fault if request.attempt < 2 and fits(fault, request.kind) else None)
    small, large = b"x" * 1000, np.random.default_rng(0).bytes(6 << 20)
    for name, content in (("d/small", small), ("d/large", large)):
        storage.write_bytes(proxied.url(name), content)
        assert storage.stat(proxied.url(name)).size == len(content)
        assert storage.read_bytes(proxied.url(name)) == content
    assert storage.read_range(proxied.url("d/large"), 100, 50) == large[100:150]
    assert storage.names(proxied.url("d")) == ["large", "small"]
    assert storage.create(proxied.url("d/lock"), b"mine")
    assert not storage.create(proxied.url("d/lock"), b"another's")
    before = proxied.contents("d/")
    proxied.client.create_multipart_upload(Bucket=proxied.name, Key="d/begun")
    # a beginning whose answer got lost leaves an upload that nobody knows
    assert len(proxied.uploads()) == {"lost": 3, "cut answer": 3}.get(fault, 1)
    storage.abort_uploads(proxied.url("d"), lambda _: True)
    assert proxied.uploads() == []
    storage.remove(proxied.url("d"))
    assert before == {"small": small, "large": large, "lock": b"mine"}
    assert proxied.contents() == {}
    met = {entry.request.kind for entry in proxy.log if entry.fault}
    kinds = {"HEAD", "GET", "LIST", "PUT", "CONDITIONAL", "CREATE", "PART", "COMPLETE", "DELETE", "ABORT", "UPLOADS"}
    assert met == {kind for kind in kinds if fits(fault, kind)}


def test_a_body_that_is_cut_is_read_again_and_not_taken_for_the_file(proxy, proxied, source):
    proxied.upload(source, "in")
    storage = Storage(proxied.options)
    content = (source / "0.parquet").read_bytes()
    proxy.reset(lambda request: "cut answer" if request.attempt < ATTEMPTS - 1 else None)
    assert storage.read_bytes(proxied.url("in/0.parquet")) == content
    assert len(proxy.entries(kind="GET")) == ATTEMPTS
    proxy.reset(lambda request: "cut answer" if request.kind == "GET" else None)
    with pytest.raises(StorageError, match=r"in/0.parquet: the storage cannot be used") as caught:
        storage.read_bytes(proxied.url("in/0.parquet"))
    assert not isinstance(caught.value, DamagedFileError)
    assert len(proxy.entries(kind="GET")) == ATTEMPTS


def pauses(log):
    """Seconds between attempts. The client below asks once more at once where a connection that it reuses is cut."""
    first, last = {}, {}
    for entry in log:
        first.setdefault(entry.request.call, entry.at)
        last[entry.request.call] = entry.at
    return np.array(list(first.values()))[1:] - np.array(list(last.values()))[:-1]


@pytest.mark.parametrize("fault", _few([500, 503, "cut"], 503))
def test_pauses_grow_and_the_number_of_attempts_is_bounded(proxy, proxied, fault):
    """botocore doubles its pause from attempt to attempt; s3fs does that five times, with growing pauses between."""
    proxy.reset(lambda _: fault)
    with pytest.raises(StorageError, match=r"/out/x: the storage cannot be used .*then run again"):
        Storage(proxied.options).write_bytes(proxied.url("out/x"), b"x")
    met = pauses(proxy.log)
    assert len(met) + 1 == (ATTEMPTS if fault == 500 else ATTEMPTS**2)
    assert len(proxy.log) <= 2 * (len(met) + 1)
    within = np.arange(1, len(met) + 1) % ATTEMPTS != 0
    rounds = met[within].reshape(-1, ATTEMPTS - 1)
    assert (rounds >= 0.99 * PAUSE * 2.0 ** np.arange(ATTEMPTS - 1)).all()
    # a busy machine makes a pause longer now and then
    first, last = np.median(rounds, axis=0)[[0, -1]]
    assert first < last
    between = met[~within]
    assert (between >= 0.099 * 1.7 ** np.arange(len(between))).all()


def n_logged(proxy, expected):
    """Number of requests; the proxy notes one only after it has answered."""
    for _ in range(200):
        if len(proxy.log) >= expected:
            break
        time.sleep(0.01)
    return len(proxy.log)


@pytest.mark.slow
def test_with_the_pauses_of_the_library_an_error_of_the_server_ends_within_fifteen_seconds(proxy, proxied, monkeypatch):
    monkeypatch.undo()
    proxy.reset(lambda _: 500)
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"/x: the storage cannot be used"):
        Storage(proxied.options).stat(proxied.url("x"))
    assert time.monotonic() - started < 1 + 2 + 4 + 8 + 2
    assert n_logged(proxy, ATTEMPTS) == ATTEMPTS


def test_options_of_the_user_set_the_number_of_attempts(proxy, proxied):
    proxy.reset(lambda _: 500)
    proxied.options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": 2}}
    with pytest.raises(StorageError):
        Storage(proxied.options).stat(proxied.url("x"))
    assert n_logged(proxy, 2) == 2


PERMISSIONS = {
    "s3:ListBucket": {"LIST"},
    "s3:GetObject": {"HEAD", "GET"},
    "s3:PutObject": {"PUT", "CONDITIONAL", "CREATE", "PART", "COMPLETE"},
    "s3:DeleteObject": {"DELETE"},
    "s3:AbortMultipartUpload": {"ABORT"},
    "s3:ListBucketMultipartUploads": {"UPLOADS"},
}
"""What the page on S3 lists, with the requests that each permits."""


def assert_permitted(log):
    """Nothing else is asked of the server, and the input is only read."""
    for entry in log:
        request = entry.request
        assert request.kind in set().union(*PERMISSIONS.values()), request
        if request.kind in PERMISSIONS["s3:PutObject"] | {"ABORT"}:
            assert request.key.startswith("out/")


def test_the_page_on_s3_lists_the_permissions():
    page = (Path(__file__).parents[2] / "docs" / "s3.md").read_text()
    assert set(re.findall(r"^\| `(s3:\w+)`", page, re.MULTILINE)) == set(PERMISSIONS)


# ---- conditional writes, completions and deletions whose answer is lost -----------------------------------------


@pytest.mark.parametrize("fault", ["lost", 409])
def test_a_lock_whose_answer_was_lost_is_recognised_as_our_own(proxy, proxied, fault):
    storage = Storage(proxied.options)
    proxy.reset(lambda request: fault if request.kind == "CONDITIONAL" and request.attempt == 0 else None)
    with locked(storage, proxied.url("out")):
        held = json.loads(proxied.contents("out/")[LOCK])
        assert held["token"]
        with pytest.raises(OutputInUseError, match=f"process {held['pid']}"), locked(storage, proxied.url("out")):
            pass
        assert json.loads(proxied.contents("out/")[LOCK]) == held
    assert proxied.contents() == {}
    statuses = [entry.status for entry in proxy.entries(kind="CONDITIONAL")]
    # ours, asked for again; then the other's, refused
    assert statuses == {"lost": [None, 412, 412], 409: [409, 200, 412]}[fault]


def test_a_lock_that_cannot_be_removed_does_not_lock_out_the_process_that_made_it(proxy, proxied, caplog):
    storage = Storage(proxied.options)
    with pytest.raises(ZeroDivisionError), locked(storage, proxied.url("out")):
        proxy.plan = lambda _: 403
        raise ZeroDivisionError
    assert f"{proxied.url('out/_lock.json')}: could not be removed" in caplog.text
    proxy.plan = lambda _: None
    assert list(proxied.contents("out/")) == [LOCK]
    with locked(storage, proxied.url("out")):
        pass
    assert proxied.contents() == {}


def test_an_upload_that_is_complete_already_is_told_apart_from_one_that_is_gone(proxy, proxied):
    """A server may have forgotten an upload that it completed when the answer got lost; the object tells."""
    storage = Storage({**proxied.options, "default_block_size": 5 << 20})
    content = b"x" * (6 << 20)
    proxy.reset(lambda request: ("lost", GONE)[request.attempt > 0] if request.kind == "COMPLETE" else None)
    storage.write_bytes(proxied.url("out/x"), content)
    assert proxied.contents() == {"out/x": content}
    assert [entry.status for entry in proxy.entries(kind="COMPLETE")] == [None, 404]
    proxy.reset(lambda request: GONE if request.kind == "COMPLETE" else None)
    with pytest.raises(StorageError, match=r"out/y: its upload was aborted by somebody else"):
        storage.write_bytes(proxied.url("out/y"), content)
    assert list(proxied.contents()) == ["out/x"]
    assert proxied.uploads() == []


def test_objects_that_the_server_does_not_delete_are_an_error(proxy, proxied):
    """S3 answers 200 to the request, and names the objects that it has not deleted."""
    storage = Storage(proxied.options)
    storage.write_bytes(proxied.url("out/x"), b"x")
    refusal = b"<DeleteResult><Error><Key>out/x</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    proxy.reset(lambda request: (200, refusal) if request.kind == "DELETE" and request.attempt < 2 else None)
    storage.remove(proxied.url("out"))
    assert proxied.contents() == {}
    storage.write_bytes(proxied.url("out/x"), b"x")
    proxy.reset(lambda request: (200, refusal) if request.kind == "DELETE" else None)
    with pytest.raises(StorageError, match=r"/out: access denied \(objects were not deleted\)"):
        storage.remove(proxied.url("out"))


# ---- faults that stay -------------------------------------------------------------------------------------------


class After:
    """A fault for all requests that are chosen, once `number` of them have passed."""

    def __init__(self, number, chosen, fault):
        self.left, self.chosen, self.fault = number, chosen, fault

    def __call__(self, request):
        if not self.chosen(request):
            return None
        self.left -= 1
        return self.fault if self.left < 0 else None


STAYING = {
    "read from the start": (0, lambda request: request.key.startswith("in/"), "in"),
    "list from the start": (0, lambda request: request.kind == "LIST", ""),
    "read in mid-run": (22, lambda request: request.kind == "GET" and request.key.startswith("in/"), "in/"),
    "write in mid-run": (12, lambda request: request.kind == "PUT", "out/"),
    "everything in mid-run": (120, lambda request: True, ""),
}


def _stay_and_resume(proxy, proxied, source, local, where, fault, said):
    proxied.upload(source, "in")
    number, chosen, prefix = STAYING[where]
    proxy.reset(After(number, chosen, fault))
    started = time.monotonic()
    # with so little nothing is held in memory, so the input is read again in mid-run
    text = command(proxied, "-v", "--memory", "512MB", code=2)
    took = time.monotonic() - started
    assert f"untwin: {proxied.url(prefix)}" in text
    assert said in text
    assert "then run again" in text
    refused = sum(entry.fault is not None for entry in proxy.log)
    proxy.reset()
    found = command(proxied)
    contents = proxied.contents("out/")
    assert_same_answer(contents, local)
    assert (n_reused(contents) > 0) == ("mid-run" in where)
    assert ("units of an interrupted run" in found) == ("mid-run" in where)
    return took, refused


@pytest.mark.parametrize("where", _few(STAYING, "write in mid-run"))
def test_denied_access_ends_at_once_with_a_clear_error_and_the_run_goes_on_later(proxy, proxied, source, local, where):
    took, refused = _stay_and_resume(proxy, proxied, source, local, where, 403, "access denied")
    assert took < 10
    assert 0 < refused < 20  # nobody asks again and again


@pytest.mark.slow
@pytest.mark.parametrize("where", ["read in mid-run", "write in mid-run"])
def test_a_storage_that_stays_busy_ends_in_bounded_time_and_the_run_goes_on_later(proxy, proxied, source, local, where):
    proxied.options["config_kwargs"] = {"retries": {"total_max_attempts": 2}}
    took, _ = _stay_and_resume(proxy, proxied, source, local, where, 503, "Please reduce your request rate")
    assert took < 20


@pytest.mark.slow
@pytest.mark.parametrize("where", STAYING)
@pytest.mark.parametrize("fault", [500, 503, "cut"])
def test_every_fault_that_stays_ends_in_bounded_time_and_the_run_goes_on_later(
    proxy, proxied, source, local, where, fault
):
    took, _ = _stay_and_resume(proxy, proxied, source, local, where, fault, "the storage cannot be used")
    assert took < 120


@pytest.mark.parametrize(("fault", "said"), [(403, "access denied"), ("cut answer", "cannot be used")])
def test_a_large_input_file_that_may_not_be_read_on_is_not_called_damaged(
    proxy, proxied, source, monkeypatch, fault, said
):
    """Large files are read in pieces, through Arrow: its reader passes the error on."""
    monkeypatch.setattr(files, "_WHOLE_READ_BYTES", 0)
    proxied.upload(source, "in")
    proxy.reset(After(12, lambda request: request.kind == "GET" and request.key.startswith("in/"), fault))
    with pytest.raises(StorageError, match=rf"/in/\d.parquet: .*{said}"):
        run(proxied)


# ---- credentials that expire ------------------------------------------------------------------------------------

ISSUER = """
import datetime, json, pathlib, sys
count = pathlib.Path(sys.argv[1])
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
# botocore asks for new credentials a quarter of an hour before the old ones expire
expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=15, seconds=1)
print(json.dumps({"Version": 1, "AccessKeyId": f"ISSUED{number}", "SecretAccessKey": "s", "SessionToken": "t",
                  "Expiration": expires.isoformat()}))
"""


def test_credentials_that_expire_in_mid_run_are_refreshed(proxy, proxied, source, local, tmp_path, monkeypatch):
    """The server refuses every key two seconds after it met it; the provider renews it after one."""
    proxied.upload(source, "in")
    (tmp_path / "issue.py").write_text(ISSUER)
    process = f"{sys.executable} {tmp_path / 'issue.py'} {tmp_path / 'count'}"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {process}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    met = {}

    def expire(request):
        first = met.setdefault(request.access_key, time.monotonic())
        time.sleep(0.02)
        return 400 if time.monotonic() - first > 2 else None

    proxy.reset(expire)
    options = {"endpoint_url": proxy.url}
    untwin.deduplicate(proxied.url("in"), proxied.url("out"), storage_options=options, **OPTIONS)
    assert_same_answer(proxied.contents("out/"), local)
    keys = [entry.request.access_key for entry in proxy.log]
    assert len(set(keys)) >= 2
    assert set(keys) <= {f"ISSUED{number}" for number in range(1, 30)}
    assert not any(entry.fault for entry in proxy.log)
    # without a provider that renews them the same credentials end the run
    time.sleep(max(0, met["ISSUED1"] + 2.1 - time.monotonic()))
    old = {**options, "key": "ISSUED1", "secret": "s", "token": "t"}
    with pytest.raises(StorageError, match=r"run.json: .*Bad Request.*credentials \(they may have expired\)"):
        untwin.apply(proxied.url("out"), eps=0.1, storage_options=old)


def test_a_small_file_takes_one_request_where_its_size_is_known_or_does_not_matter(proxy, proxied):
    storage = Storage(proxied.options)

    def kinds():
        time.sleep(0.1)  # a request is noted after it was answered
        return [entry.request.kind for entry in proxy.log]

    for name, content in (("small", b"0123456789"), ("empty", b"")):
        path = proxied.url(name)
        storage.write_bytes(path, content)
        kinds()
        proxy.reset()
        assert storage.read_bytes(path) == content
        assert kinds() == ["GET"]
    proxy.reset()
    with storage.open(proxied.url("small"), 10) as file:
        assert file.read() == b"0123456789"
    assert kinds() == ["GET"]
    with storage.open(proxied.url("small")) as file:
        assert file.read() == b"0123456789"
    assert kinds() == ["GET", "HEAD", "GET"]
    with pytest.raises(InputNotFoundError, match="nothing: not found"):
        storage.read_bytes(proxied.url("nothing"))
