"""Credentials never reach disk, logs, errors or any output: a canary is searched for in all of them, on every path."""

import base64
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.parse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from test_s3 import EPS

from untwin import IdentifyDuplicatesStage, KMeansStage, LocalExecutor, PairwiseStage, Pipeline, RemoveDuplicatesStage
from untwin import errors as errors_module
from untwin.cli import main
from untwin.errors import (
    ChangedInputError,
    DamagedFileError,
    InputNotFoundError,
    MediaError,
    MissingExtraError,
    OutputExistsError,
    OutputInUseError,
    ParameterError,
    RepeatedIdError,
    ResourceError,
    ResultMismatchError,
    SchemaError,
    StorageError,
    TooManyRejectedError,
    TooManyRemovedError,
    UntwinError,
)
from untwin.jobs.parameters import RunParameters
from untwin.jobs.run import prepare
from untwin.storage.files import Storage, hide_secrets, redact

CANARY_KEY, CANARY_SECRET, CANARY_TOKEN = "CANARYKEY7Q1Z", "canary/3f9Zq+do=not/write-me", "canary-token-88Xy+/w=="
DRIVER = Path(__file__).parents[1] / "jobs" / "killed_run.py"


def _forms(secret):
    """A secret as it is, in a URL, in JSON, and in base64, wherever in a longer text it begins."""
    yield secret.encode()
    yield urllib.parse.quote(secret).encode()
    yield urllib.parse.quote(secret, safe="").encode()
    yield urllib.parse.quote_plus(secret).encode()
    yield secret.replace("/", "\\/").encode()
    for before in range(3):
        coded = base64.b64encode(b"\0" * before + secret.encode())
        yield coded[(before * 8 + 5) // 6 + 1 : -4]


FORMS = sorted({form for secret in (CANARY_KEY, CANARY_SECRET, CANARY_TOKEN) for form in _forms(secret)})


def assert_clean(where, content):
    content = content if isinstance(content, bytes) else str(content).encode()
    for form in FORMS:
        assert form not in content, f"{form!r} in {where}"


class Cage:
    """A bucket reached with canary credentials, a home and a folder for temporary files, and all that was said."""

    def __init__(self, bucket, folder, caplog):
        self.bucket = bucket
        self.folder = folder
        self.caplog = caplog
        self.options = {**bucket.options, "key": CANARY_KEY, "secret": CANARY_SECRET, "token": CANARY_TOKEN}
        self.given, self.output = bucket.url("in"), bucket.url("out")

    def command(self, *arguments, code=0, options=None):
        """Run a command in this process and search everything; the error that ended it, if one did."""
        text = json.dumps(self.options) if options is None else options
        more = [] if text == "" else ["--storage-options", text]
        result = CliRunner().invoke(main, [*map(str, arguments), *more, "-v"])
        assert result.exit_code == code, result.output
        error = result.exception.__context__ if code else None
        said = "" if error is None else "".join(traceback.format_exception(error))
        self.search(output=result.output, traceback=said, error=repr(error), log=self.caplog.text)
        if code == 2:
            assert "Traceback" not in result.output
        return error

    def run(self, *options, code=0, **more):
        arguments = ("run", self.given, self.output, "--eps", EPS, "--n-clusters", 3, "--workers", 2)
        return self.command(*arguments, *options, code=code, **more)

    def search(self, **texts):
        """Search texts, all files below the test's folder, and all objects with their names."""
        for name, text in texts.items():
            assert_clean(name, text)
        for path in self.folder.rglob("*"):
            assert_clean("a name", str(path))
            if path.is_file():
                assert_clean(path, path.read_bytes())
        for name, content in self.bucket.contents().items():
            assert_clean("a name", name)
            assert_clean(name, content)

    def put(self, key, content):
        self.bucket.client.put_object(Bucket=self.bucket.name, Key=key, Body=content)

    def put_table(self, key, table):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self.put(key, sink.getvalue().to_pybytes())


@pytest.fixture
def cage(proxied, source, tmp_path, caplog, monkeypatch):
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    logger = logging.getLogger("untwin")
    caplog.set_level("DEBUG", "untwin")
    monkeypatch.setattr(logger, "setLevel", lambda _: None)
    proxied.upload(source, "in")
    return Cage(proxied, tmp_path, caplog)


def test_the_search_finds_every_form_of_the_canary():
    for secret in (CANARY_KEY, CANARY_SECRET, CANARY_TOKEN):
        for text in (secret, urllib.parse.quote(secret), urllib.parse.quote_plus(secret), json.dumps({"a": secret})):
            with pytest.raises(AssertionError):
                assert_clean("", f"before {text} after")
        for before in range(4):
            coded = base64.b64encode(b"x" * before + secret.encode() + b"yz").decode()
            with pytest.raises(AssertionError):
                assert_clean("", coded)
    assert_clean("", "nothing here")


def test_success_of_every_command_shows_no_credentials(cage):
    cage.run("--audit")
    assert cage.bucket.contents("out/")["run.json"]
    cage.run("--dry-run", "--overwrite")
    cage.command("apply", cage.output, "--eps", 0.3, "--to", cage.folder / "answer", "--json")
    assert (cage.folder / "answer" / "run.json").exists()
    cage.command("audit", cage.output, "--json")
    error = cage.command("apply", cage.output, "--eps", 0.1, "--to", URLS[0], code=2)
    assert isinstance(error, ParameterError)


@pytest.mark.slow
def test_credentials_from_the_environment_are_not_shown(cage, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", CANARY_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY_SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", CANARY_TOKEN)
    monkeypatch.setenv("AWS_ENDPOINT_URL", cage.options["endpoint_url"])
    cage.run(options="")
    cage.command("apply", cage.output, "--eps", 0.2, options="")
    cage.command("audit", cage.output, options="")
    assert isinstance(cage.run("--embedding-field", "nothing", code=2, options=""), SchemaError)


# ---- every error ------------------------------------------------------------------------------------------------

ECHO = (
    f"<Error><Code>InvalidAccessKeyId</Code><Message>The key {CANARY_KEY} with {CANARY_SECRET} and {CANARY_TOKEN} does "
    "not exist in our records.</Message></Error>"
).encode()
URLS = [
    f"s3://{CANARY_KEY}:{CANARY_SECRET}@bucket/x",
    f"s3://{CANARY_KEY}:{urllib.parse.quote(CANARY_SECRET, safe='')}@bucket/x",
    f"s3://{CANARY_KEY}@bucket/x",
    f"s3a://{CANARY_KEY}:{CANARY_TOKEN}@bucket/x",
    f"https://{CANARY_KEY}:{CANARY_SECRET}@host:80/x@y",
]


def _after(kind, fault):
    return lambda request: fault if request.kind == kind else None


def wrong_bucket(cage, _):
    error = cage.command("run", "s3://no-such-bucket/in", cage.output, "--eps", EPS, code=2)
    assert isinstance(cage.command("run", cage.given, "s3://no-such-bucket/out", "--eps", EPS, code=2), UntwinError)
    return error


def denied_with_an_echo(cage, proxy):
    for kind in ("LIST", "GET", "PUT", "CONDITIONAL"):
        proxy.reset(_after(kind, (403, ECHO)))
        error = cage.run(code=2)
        assert "***" in str(error)
    proxy.reset(_after("HEAD", 403))
    return cage.run(code=2)


def expired(cage, proxy):
    proxy.reset(_after("PUT", 400))
    return cage.run(code=2)


def busy_for_good(cage, proxy):
    proxy.reset(_after("PUT", (503, ECHO.replace(b"InvalidAccessKeyId", b"SlowDown"))))
    cage.options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}
    return cage.run(code=2)


def no_server(cage, _):
    cage.options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}
    cage.options["endpoint_url"] = f"http://{CANARY_KEY}:{CANARY_SECRET.replace('/', '-')}@127.0.0.1:1"
    return cage.run(code=2)


def wrong_options(cage, _):
    whole = json.dumps(cage.options)
    for options in (whole[:-1], json.dumps([CANARY_SECRET]), f"@{cage.folder}/nothing.json"):
        assert isinstance(cage.run(code=2, options=options), ParameterError)
    for wrong in ({"nonsense": CANARY_SECRET}, {"config_kwargs": CANARY_SECRET}, {"client_kwargs": [CANARY_SECRET]}):
        error = cage.run(code=2, options=json.dumps({**cage.options, **wrong}))
        assert isinstance(error, ParameterError)
    return error


def credentials_in_a_url(cage, _):
    for url in URLS:
        for arguments in (
            ("run", url, cage.output),
            ("run", cage.given, url),
            ("run", url, url),
            ("apply", url, "--eps", 0.1),
            ("audit", url),
        ):
            error = cage.command(*arguments, code=2)
            assert isinstance(error, ParameterError), arguments
            assert "give that in storage_options" in str(error)
    return error


def no_input(cage, _):
    return cage.command("run", cage.bucket.url("nothing"), cage.output, code=2)


def bad_column(cage, _):
    return cage.run("--embedding-field", "nothing", code=2)


def damaged_input(cage, _):
    cage.put("in/3.parquet", b"PAR1 nothing PAR1")
    return cage.run(code=2)


def damaged_run(cage, _):
    cage.put("out/_plan/plan.json", b"{")
    cage.put("out/run.json", b"{")
    for arguments in (("apply", cage.output, "--eps", 0.1), ("audit", cage.output)):
        assert isinstance(cage.command(*arguments, code=2), DamagedFileError)
    return cage.run(code=2)


def foreign_files(cage, _):
    cage.put("out/mine.txt", b"mine")
    assert isinstance(cage.run(code=2), OutputExistsError)
    return cage.run("--overwrite", code=2)


def lock_held(cage, _):
    cage.put("out/_lock.json", b'{"host": "elsewhere", "pid": 7, "started": "then"}')
    return cage.run(code=2)


def changed_input(cage, _):
    cage.run()
    cage.put("in/3.parquet", cage.bucket.contents("in/")["4.parquet"])
    return cage.command("apply", cage.output, "--eps", 0.1, code=2)


def little_memory(cage, _):
    return cage.run("--memory", "64MB", code=2)


def full_disk(cage, monkeypatch):
    real = pa.OSFile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pa, "OSFile", lambda path, mode: real("/dev/full" if mode == "wb" else path, mode))
        return cage.command("run", cage.given, cage.folder / "local", "--eps", EPS, code=2)


def repeated_ids(cage, _):
    cage.put_table("in/9.parquet", pa.table({"id": ["clip-003"], "embedding": [[1.0] * 12]}))
    return cage.command("run", *[cage.bucket.url(f"in/{n}.parquet") for n in range(6)], cage.bucket.url("in/9.parquet"),
                        cage.output, "--eps", EPS, code=2)  # fmt: skip


def mostly_rejected(cage, _):
    cage.put_table("zeros/0.parquet", pa.table({"id": ["a", "b", "c"], "embedding": [[0.0, 0.0]] * 2 + [[1.0, 0.0]]}))
    return cage.command("run", cage.bucket.url("zeros"), cage.output, "--eps", EPS, code=2)


def rows_that_do_not_add_up(cage, _):
    cage.run()
    run = json.loads(cage.bucket.contents("out/")["run.json"])
    run["rows"]["rejected"] += 1
    cage.put("out/run.json", json.dumps(run).encode())
    return cage.command("apply", cage.output, "--eps", 0.1, code=2)


def too_many_removed(cage, _):
    cage.run()
    return cage.command("apply", cage.output, "--eps", 0.3, "--max-removed", "0.1%", code=2)


def missing_extra(cage, _):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gcsfs", None)
        return cage.command("run", "gs://bucket/in", cage.output, code=2)


ERRORS = {
    wrong_bucket: InputNotFoundError,
    denied_with_an_echo: StorageError,
    expired: StorageError,
    busy_for_good: StorageError,
    no_server: StorageError,
    wrong_options: ParameterError,
    credentials_in_a_url: ParameterError,
    no_input: InputNotFoundError,
    bad_column: SchemaError,
    damaged_input: DamagedFileError,
    damaged_run: DamagedFileError,
    foreign_files: OutputExistsError,
    lock_held: OutputInUseError,
    changed_input: ChangedInputError,
    little_memory: ResourceError,
    full_disk: ResourceError,
    repeated_ids: RepeatedIdError,
    mostly_rejected: TooManyRejectedError,
    rows_that_do_not_add_up: ResultMismatchError,
    too_many_removed: TooManyRemovedError,
    missing_extra: MissingExtraError,
}


LONG = (rows_that_do_not_add_up, too_many_removed, changed_input, busy_for_good, mostly_rejected, repeated_ids)
"""Paths that take a whole run."""


def test_every_named_error_is_among_these_paths():
    named = {kind for kind in vars(errors_module).values() if isinstance(kind, type) and issubclass(kind, UntwinError)}
    # a MediaError is the reason why a clip is rejected, or has no picture
    assert named - {UntwinError, MediaError} == set(ERRORS.values())


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path in LONG else ()) for path in ERRORS],
    ids=lambda path: path.__name__,
)
def test_no_error_shows_credentials(cage, proxy, path):
    error = path(cage, proxy)
    assert type(error) is ERRORS[path]


def test_an_unexpected_failure_shows_no_credentials(cage, monkeypatch):
    def fail(*_):
        try:
            raise OSError(f"http://{CANARY_KEY}:{CANARY_SECRET}@host")
        except OSError as error:
            raise RuntimeError(f"{CANARY_KEY} {CANARY_SECRET}") from error

    monkeypatch.setattr("untwin.stages.duplicates.MergeStage.process", fail)
    result = CliRunner().invoke(
        main, ["run", cage.given, cage.output, "--eps", "0.02", "-v", "--storage-options", json.dumps(cage.options)]
    )
    assert result.exit_code == 1
    assert "in stage merge duplicates" in result.output
    assert "Traceback" in result.output
    assert "RuntimeError: *** ***" in result.output
    cage.search(output=result.output, log=cage.caplog.text)


def test_an_interrupted_run_shows_no_credentials(cage):
    busy = cage.folder / "busy"
    options = ["--eps", str(EPS), "--storage-options", json.dumps(cage.options), "-v"]
    wanted = {
        "argv": ["run", cage.given, cage.output, *options],
        "stuck": {"stage": "duplicates.MergeStage", "busy": str(busy)},
    }
    program = [sys.executable, str(DRIVER), json.dumps(wanted)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not busy.exists():
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"interrupted" in err
    cage.search(out=out, err=err)


# ---- objects ----------------------------------------------------------------------------------------------------


def test_objects_show_no_credentials(cage):
    kwargs = {"read_kwargs": {"storage_options": cage.options}, "write_kwargs": {"storage_options": cage.options}}
    stages = [
        KMeansStage(3, "id", "embedding", cage.given, cage.bucket.url("k"), **kwargs),
        PairwiseStage("id", "embedding", cage.bucket.url("k"), cage.bucket.url("p"), eps=EPS, **kwargs),
        IdentifyDuplicatesStage(cage.bucket.url("d"), EPS, **kwargs),
        RemoveDuplicatesStage(cage.given, cage.bucket.url("kept"), **kwargs),
    ]
    single = [stage for step in stages for stage in (step.stages() if hasattr(step, "stages") else [step])]
    inner = [value for stage in single for value in vars(stage).values()]
    parameters = RunParameters((cage.given,), cage.output, EPS, 3, storage_options=cage.options)
    executor = LocalExecutor(2)
    prepared = prepare(parameters, executor)
    result = prepared.execute()
    objects = [*stages, *single, *inner, Storage(cage.options), parameters, executor, prepared, prepared.folder]
    for thing in (*objects, result, prepared.listing, prepared.plan, Pipeline(stages=stages)):
        assert_clean(type(thing), f"{thing!r} {thing}")
    cage.search(log=cage.caplog.text)
    # what is sent or kept without the options holds none; a pickled stage or storage has to hold them to work
    for thing in (executor, result.timings, prepared.listing, prepared.plan):
        assert_clean(type(thing), pickle.dumps(thing))
    assert any(form in pickle.dumps(stages[1]) for form in FORMS)
    assert result.n_duplicates > 60


def test_redaction_takes_user_names_and_passwords_only():
    for url in URLS:
        assert_clean(url, redact(url))
        assert_clean(url, redact(f"cannot connect to {url!r}, or {url}"))
    for harmless in (
        "s3://bucket/a:b@c/d",
        "http://127.0.0.1:5000/bucket/a@b",
        "abfs://container@account.dfs.core.windows.net/x",
        "s3://bucket/with space/a@b",
    ):
        assert redact(harmless) == harmless
    options = {"key": "abcdef", "client_kwargs": {"aws_session_token": "ghijkl", "endpoint_url": "http://host"}}
    assert hide_secrets("abcdef ghijkl http://host", options) == "*** *** http://host"
    assert os.environ.get("AWS_SECRET_ACCESS_KEY") is None
