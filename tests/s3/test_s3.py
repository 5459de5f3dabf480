"""Everything works with input and output on S3-compatible storage, and gives what local folders give."""

import dataclasses
import io
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import untwin
from untwin import IdentifyDuplicatesStage, KMeansStage, PairwiseStage, Pipeline, RemoveDuplicatesStage
from untwin.core import fit, hash_integers, normalize
from untwin.errors import InputNotFoundError, OutputExistsError, OutputInUseError, ParameterError, UntwinError
from untwin.stages import pairwise
from untwin.stages.base import Context, Upstream
from untwin.stages.ranking import RankingStrategy
from untwin.storage.files import Storage, join
from untwin.storage.sample import SampleBlocks, read_hashes, sample_batches, write_sample

EPS = 0.02
OPTIONS = {"eps": EPS, "n_clusters": 3, "workers": 2}
CANARIES = (b"canary-3f9Zq-do-not-write-me", b"canary-key-71X")


def data_of(contents):
    """The tables of an output folder by name, without what names the place or the time."""
    tables = {}
    for name, content in contents.items():
        if name.endswith(".parquet") and "_plan/" not in name:
            table = pq.read_table(io.BytesIO(content), partitioning=None)
            if name.startswith("rejected/"):
                table = table.set_column(1, "file", pa.array([file[-9:] for file in table["file"].to_pylist()]))
            tables[name] = table
    return tables


def local_contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_answer(remote, local):
    assert sorted(remote) == sorted(local)
    for name, content in local.items():
        if name.endswith((".npy", ".bits")):
            assert remote[name] == content, name
    got, want = data_of(remote), data_of(local)
    for name, table in want.items():
        assert got[name].equals(table), name
    runs = [json.loads(contents["run.json"]) for contents in (remote, local)]
    for part in ("rows", "eps_table", "clusters", "kmeans"):
        assert runs[0][part] == runs[1][part]
    assert runs[0]["rows"]["duplicates"] > 60
    assert runs[0]["rows"]["rejected"] == 2


def assert_no_canary(*places):
    for place in places:
        for name, content in place.items() if isinstance(place, dict) else [("text", place)]:
            written = content if isinstance(content, bytes) else str(content).encode()
            for canary in CANARIES:
                assert canary not in written, name


def command(arguments, environment, code=0):
    """Run the command line in a process of its own; returns (stdout, stderr)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_ENDPOINT")}
    done = subprocess.run(
        [sys.executable, "-m", "untwin", *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def local(source, tmp_path):
    """The answer with local folders."""
    untwin.deduplicate(str(source), str(tmp_path / "local"), **OPTIONS)
    return local_contents(tmp_path / "local")


def test_the_whole_job_and_apply_give_the_local_answer_with_storage_options(bucket, source, local, tmp_path, caplog):
    bucket.upload(source, "data/in")
    with caplog.at_level("DEBUG"):
        result = untwin.deduplicate(
            bucket.url("data/in"), bucket.url("data/out"), storage_options=bucket.options, **OPTIONS
        )
        remote = bucket.contents("data/out/")
        assert_same_answer(remote, local)
        assert result.output_path == bucket.url("data/out")
        assert result.duplicates().num_rows == result.n_duplicates
        assert result.kept_ids().num_rows == result.n_kept
        first = result.duplicates().slice(0, 1).to_pylist()[0]
        assert first["id"] in result.duplicates_of(first["kept_id"])["id"].to_pylist()

        applied = untwin.apply(bucket.url("data/out"), eps=0.2, storage_options=bucket.options)
        there = untwin.apply(str(tmp_path / "local"), eps=0.2)
        assert_same_answer(bucket.contents("data/out/eps=0.2/"), local_contents(tmp_path / "local/eps=0.2"))
        assert applied.n_duplicates == there.n_duplicates > result.n_duplicates
        again = untwin.apply(bucket.url("data/out"), eps=0.2, storage_options=bucket.options)
        assert again.run == applied.run
        after = bucket.contents("data/out/")
        assert {name: after[name] for name in remote} == remote
    assert sorted(bucket.contents("data/in/")) == sorted(local_contents(source))
    # (the libraries below log requests at level DEBUG as they like; untwin's own records are looked at)
    said = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("untwin"))
    assert_no_canary(after, said, repr(result), local_contents(tmp_path))


def test_probes_give_the_local_answer_and_leave_nothing_behind(bucket, source, tmp_path):
    bucket.upload(source, "in")
    options = {**OPTIONS, "eps": 0.3, "n_clusters": 12, "probes": 3}
    remote = untwin.deduplicate(bucket.url("in"), bucket.url("out"), storage_options=bucket.options, **options)
    local = untwin.deduplicate(str(source), str(tmp_path / "local"), **options)
    assert_same_answer(bucket.contents("out/"), local_contents(tmp_path / "local"))
    assert remote.run["borders"] == local.run["borders"]
    assert remote.run["borders"]["open_rows"] > 0
    assert sorted(bucket.contents("out/")) == sorted(local_contents(tmp_path / "local"))


def test_a_finished_output_is_recognised_and_another_run_is_refused(bucket, source):
    bucket.upload(source, "in")
    options = {**OPTIONS, "storage_options": bucket.options}
    first = untwin.deduplicate(bucket.url("in"), bucket.url("out"), **options)
    before = bucket.contents()
    again = untwin.deduplicate(bucket.url("in"), bucket.url("out"), **options)
    assert again.run == first.run
    with pytest.raises(OutputExistsError, match=r"s3://.*/out: holds a run that differs in eps \(was 0.02, now 0.03\)"):
        untwin.deduplicate(bucket.url("in"), bucket.url("out"), **{**options, "eps": 0.03})
    bucket.client.put_object(Bucket=bucket.name, Key="in/3.parquet", Body=before["in/4.parquet"])
    with pytest.raises(OutputExistsError, match="differs in the input files"):
        untwin.deduplicate(bucket.url("in"), bucket.url("out"), **options)
    bucket.client.put_object(Bucket=bucket.name, Key="in/3.parquet", Body=before["in/3.parquet"])
    assert bucket.contents() == before


def test_an_interrupted_run_goes_on_and_leaves_no_lock(bucket, source, monkeypatch):
    output, options = bucket.url("out"), {**OPTIONS, "storage_options": bucket.options}
    bucket.upload(source, "in")
    given = bucket.url("in")

    def fail(*_):
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr("untwin.stages.duplicates.MergeStage.process", fail)
        with pytest.raises(RuntimeError):
            untwin.deduplicate(given, output, **options)
    assert not any("_lock" in name for name in bucket.contents("out/"))
    result = untwin.deduplicate(given, output, **options)
    reused = {stage.name: stage.reused for stage in result.timings}
    assert reused["assign"] == reused["pairwise"] > reused["merge duplicates"] == 0
    assert result.duplicates().num_rows == result.n_duplicates > 60


def test_the_lock_is_a_conditional_write(bucket, source):
    storage = Storage(bucket.options)
    assert storage.create(bucket.url("out/_lock.json"), b'{"host": "elsewhere", "pid": 1, "started": "then"}')
    assert not storage.create(bucket.url("out/_lock.json"), b"{}")
    with pytest.raises(OutputInUseError, match="host elsewhere, process 1, started then"):
        untwin.deduplicate(source, bucket.url("out"), **OPTIONS, storage_options=bucket.options)
    assert list(bucket.contents("out/")) == ["_lock.json"]


def test_overwrite_removes_the_earlier_run_and_nothing_else(bucket, source):
    bucket.upload(source, "in")
    options = {**OPTIONS, "storage_options": bucket.options, "overwrite": True}
    untwin.deduplicate(bucket.url("in"), bucket.url("out"), **options)
    untwin.apply(bucket.url("out"), eps=0.1, storage_options=bucket.options)
    bucket.client.put_object(Bucket=bucket.name, Key="out-other/precious", Body=b"1")
    result = untwin.deduplicate(bucket.url("in"), bucket.url("out"), **{**options, "n_clusters": 1})
    contents = bucket.contents("out/")
    assert not any(name.startswith("eps=") for name in contents)
    assert [name for name in contents if name.startswith("kmeans/centroid=")] == ["kmeans/centroid=0/part-0.parquet"]
    assert result.run["clusters"]["n_clusters"] == 1
    assert bucket.contents("out-other/") == {"precious": b"1"}
    bucket.client.put_object(Bucket=bucket.name, Key="out/mine/notes.txt", Body=b"mine")
    before = bucket.contents("out/")
    with pytest.raises(OutputExistsError, match=r"out/mine/notes.txt"):
        untwin.deduplicate(bucket.url("in"), bucket.url("out"), **{**options, "n_clusters": 2})
    assert bucket.contents("out/") == before
    with pytest.raises(OutputExistsError, match="holds no run of untwin"):
        untwin.deduplicate(bucket.url("in"), bucket.url("out-other"), **options)
    assert bucket.contents("out-other/") == {"precious": b"1"}


def test_the_command_line_takes_credentials_from_the_environment(bucket, source, local, tmp_path):
    bucket.upload(source, "in")
    arguments = ["run", bucket.url("in"), bucket.url("out"), "--n-clusters", "3", "--workers", "2", "-v"]
    out, err = command([*arguments, "--eps", str(EPS), "--json"], bucket.environment)
    remote = bucket.contents("out/")
    assert_same_answer(remote, local)
    assert json.loads(out) == json.loads(remote["run.json"])
    out2, err2 = command(["apply", bucket.url("out"), "--eps", "0.2"], bucket.environment)
    assert f"s3://{bucket.name}/out/eps=0.2/kept" in out2
    # a secret on the command line, and in a file, is not repeated either
    secret = json.dumps(bucket.options)
    (tmp_path / "secret.json").write_text(secret)
    out3, err3 = command(
        [*arguments, "--eps", "0.03", "--overwrite", "--storage-options", f"@{tmp_path / 'secret.json'}"], {}
    )
    _, err4 = command([*arguments, "--storage-options", secret[:-1]], {}, code=2)
    assert "--storage-options is not JSON" in err4
    _, err5 = command([*arguments[:1], bucket.url("nothing"), *arguments[2:], "--storage-options", secret], {}, code=2)
    assert f"s3://{bucket.name}/nothing: no such file or folder" in err5
    assert_no_canary(bucket.contents("out/"), out, err, out2, err2, out3, err3, err4, err5)


def test_input_on_one_storage_and_output_on_the_other(bucket, source, local, tmp_path):
    bucket.upload(source, "in")
    options = {**OPTIONS, "storage_options": bucket.options}
    untwin.deduplicate(bucket.url("in"), str(tmp_path / "down"), **options)
    assert_same_answer(local_contents(tmp_path / "down"), local)
    untwin.deduplicate(str(source), bucket.url("up"), **options)
    assert_same_answer(bucket.contents("up/"), local)
    assert_no_canary(local_contents(tmp_path / "down"), bucket.contents("up/"))


def test_globs_files_and_lists_of_urls(bucket, source):
    bucket.upload(source, "in/deep")
    options = {**OPTIONS, "storage_options": bucket.options}
    for number, (given, n_files) in enumerate(
        [
            (bucket.url("in/*/[0-2].parquet"), 3),
            (bucket.url("in/**/*.parquet"), 7),
            (bucket.url("i?"), 7),
            ([bucket.url("in/deep/0.parquet"), bucket.url("in/deep/1.parquet")], 2),
        ]
    ):
        result = untwin.deduplicate(given, bucket.url(f"out{number}"), **options)
        assert result.run["input"]["files"] == n_files
    with pytest.raises(InputNotFoundError, match=r"in/\*\.csv: the pattern matches nothing"):
        untwin.deduplicate(bucket.url("in/*.csv"), bucket.url("none"), **options)
    assert bucket.contents("none") == {}


def test_stages_with_options_of_their_own_on_each_side(bucket, source, tmp_path):
    """KMeans on S3, pairwise results on S3, duplicates local, the kept rows back to S3."""
    bucket.upload(source, "in")
    kwargs = {"storage_options": bucket.options}
    stages = [
        KMeansStage(
            *(3, "id", "embedding", bucket.url("in"), bucket.url("k")),
            read_kwargs=kwargs,
            write_kwargs=kwargs,
            cache_path=str(tmp_path / "cache"),
        ),
        PairwiseStage(
            *("id", "embedding", bucket.url("k"), bucket.url("p")),
            read_kwargs=kwargs,
            write_kwargs=kwargs,
            compare_to="kept",
            eps=EPS,
        ),
        IdentifyDuplicatesStage(str(tmp_path / "found"), EPS, read_kwargs=kwargs),
        RemoveDuplicatesStage(bucket.url("in"), bucket.url("kept"), read_kwargs=kwargs, write_kwargs=kwargs),
    ]
    Pipeline(stages=stages).run()
    duplicates = set(pq.read_table(tmp_path / "found/duplicates")["id"].to_pylist())
    assert len(duplicates) > 60
    table = pa.concat_tables([pq.read_table(source / f"{number}.parquet") for number in range(6)])
    want = table.take(pa.array([at for at in range(300) if at not in (17, 250)]))
    want = want.filter(pa.array([own not in duplicates for own in want["id"].to_pylist()]))
    kept = pa.concat_tables(list(data_of(bucket.contents("kept/")).values()))
    assert kept.equals(want)
    assert list((tmp_path / "cache").iterdir()) == []
    assert not any("_work" in name for name in bucket.contents())
    with pytest.raises(OutputExistsError, match=r"s3://.*/k: holds '_centroids.npy' already"):
        Pipeline(stages=stages).run()


def test_pairwise_reads_a_foreign_folder_on_s3_and_removal_goes_by_id(bucket, source, tmp_path):
    table = pa.concat_tables([pq.read_table(source / f"{number}.parquet") for number in range(5)])
    table = table.take(pa.array([at for at in range(250) if at != 17]))
    X = np.array(table["embedding"].to_pylist())
    distances = np.random.default_rng(1).uniform(size=len(X))
    for number, part in enumerate(np.array_split(np.arange(len(X)), 2)):
        path = tmp_path / f"foreign/centroid=4/{number}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        some = table.take(pa.array(part)).append_column("cosine_dist_to_cent", pa.array(distances[part]))
        pq.write_table(some, path)
    bucket.upload(tmp_path / "foreign", "foreign")
    bucket.upload(source, "in")
    kwargs = {"read_kwargs": {"storage_options": bucket.options}, "write_kwargs": {"storage_options": bucket.options}}
    pairwise = PairwiseStage("id", "embedding", bucket.url("foreign"), bucket.url("p"), **kwargs)
    Pipeline(stages=[pairwise, IdentifyDuplicatesStage(bucket.url("d"), EPS, **kwargs)]).run()
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    order = np.argsort(-distances)
    similar = np.tril(unit[order] @ unit[order].T, -1).max(axis=1)
    removed = {table["id"][int(at)].as_py() for at in order[np.float32(similar) >= np.float32(1 - EPS)]}
    assert len(removed) > 50
    found = pa.concat_tables([t for name, t in data_of(bucket.contents("d/")).items() if name.startswith("duplicates")])
    assert set(found["id"].to_pylist()) == removed
    remove = RemoveDuplicatesStage(
        bucket.url("in"), bucket.url("kept"), duplicates_path=bucket.url("d/duplicates"), layout="mirror", **kwargs
    )
    Pipeline(stages=[remove]).run()
    kept = data_of(bucket.contents("kept/"))
    for number in range(6):
        rows = pq.read_table(source / f"{number}.parquet")
        want = rows.filter(pa.array([own not in removed for own in rows["id"].to_pylist()]))
        assert kept[f"{number}.parquet"].equals(want)


# ---- mistakes ---------------------------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there(bucket, source):
    options = {**OPTIONS, "storage_options": bucket.options}
    with pytest.raises(InputNotFoundError, match=r"s3://no-such-bucket/in: no such file or folder"):
        untwin.deduplicate("s3://no-such-bucket/in", bucket.url("out"), **options)
    assert bucket.contents() == {}
    with pytest.raises(UntwinError, match=r"s3://no-such-bucket/out/.*no such bucket; make it first"):
        untwin.deduplicate(str(source), "s3://no-such-bucket/out", **options)


def test_access_that_is_denied_says_so_and_shows_no_secret(bucket, denied, source, tmp_path):
    options = {**OPTIONS, "storage_options": {**bucket.options, "endpoint_url": denied}}
    for given, output in (("s3://b/in", str(tmp_path / "out")), (str(source), "s3://b/out")):
        with pytest.raises(UntwinError, match=r"s3://b/(in|out): access denied .*check the credentials") as caught:
            untwin.deduplicate(given, output, **options)
        assert_no_canary(str(caught.value), repr(caught.value))
    assert not (tmp_path / "out").exists()


def test_no_credentials_and_no_server_are_told_apart_from_other_failures(bucket, tmp_path):
    with pytest.raises(UntwinError, match=r"s3://.*/in: the storage cannot be used \(Unable to locate credentials\)"):
        untwin.deduplicate(
            bucket.url("in"), str(tmp_path / "out"), storage_options={"endpoint_url": bucket.endpoint}, **OPTIONS
        )
    nobody = {**bucket.options, "endpoint_url": "http://127.0.0.1:1", "config_kwargs": {"retries": {"max_attempts": 0}}}
    with pytest.raises(UntwinError, match=r"in: the storage cannot be used \(Could not connect") as caught:
        untwin.deduplicate(bucket.url("in"), str(tmp_path / "out"), storage_options=nobody, **OPTIONS)
    assert_no_canary(str(caught.value))
    assert not (tmp_path / "out").exists()


def test_without_s3fs_the_error_names_the_extra(tmp_path):
    program = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from untwin.cli import main\n"
        f"main(['run', 's3://bucket/in', {str(tmp_path / 'out')!r}, '--eps', '0.1'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "pip install 'untwin[s3]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_damaged_on_s3_is_named(bucket, source):
    bucket.upload(source, "in")
    content = Path(source / "3.parquet").read_bytes()
    bucket.client.put_object(Bucket=bucket.name, Key="in/3.parquet", Body=content[:-30])
    with pytest.raises(UntwinError, match=r"s3://.*/in/3.parquet: cannot be read .*repair or remove the file"):
        untwin.deduplicate(bucket.url("in"), bucket.url("out"), storage_options=bucket.options, **OPTIONS)
    assert bucket.contents("out") == {}


def test_input_and_output_that_overlap_are_refused(bucket, source):
    bucket.upload(source, "in")
    for given, output in (("in", "in"), ("in/deep", "in")):
        with pytest.raises((OutputExistsError, ParameterError), match="choose another output folder"):
            untwin.deduplicate(bucket.url(given), bucket.url(output), storage_options=bucket.options, **OPTIONS)
    assert sorted(bucket.contents()) == sorted(f"in/{name}" for name in local_contents(source))


# ---- storage itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 11 << 20], ids=["one request", "several parts"])
def test_a_failing_writer_leaves_no_object_and_an_older_one_as_it_was(bucket, size):
    storage = Storage({**bucket.options, "default_block_size": 5 << 20})

    def fail(name):
        with pytest.raises(ZeroDivisionError), storage.writing(bucket.url(name)) as sink:
            sink.write(b"x" * size)
            raise ZeroDivisionError

    fail("new")
    storage.write_bytes(bucket.url("old"), b"older")
    fail("old")
    assert bucket.contents() == {"old": b"older"}
    assert "Uploads" not in bucket.client.list_multipart_uploads(Bucket=bucket.name)


def test_large_objects_are_read_in_place_and_folders_end_at_a_slash(bucket):
    storage = Storage(bucket.options)
    values = np.random.default_rng(0).integers(0, 2**60, 1_500_000)
    with storage.writing(bucket.url("d/large.parquet")) as sink:
        pq.write_table(pa.table({"x": values}), sink, use_dictionary=False, compression="none")
    storage.write_bytes(bucket.url("d2/y"), b"0123456789")
    with storage.open(bucket.url("d/large.parquet")) as file:
        np.testing.assert_array_equal(pq.read_table(file)["x"].to_numpy(), values)
    assert storage.read_range(bucket.url("d2/y"), 3, 4) == b"3456"
    assert [file.path for file in storage.find(bucket.url("d"))] == [bucket.url("d/large.parquet")]
    assert storage.stat(bucket.url("d2/y")).size == 10
    assert storage.names(f"s3://{bucket.name}") == ["d", "d2"]
    assert storage.names(bucket.url("d")) == ["large.parquet"]
    assert storage.names(bucket.url("nothing")) == []
    assert storage.is_folder(bucket.url("d"))
    assert not storage.is_folder(bucket.url("d2/y"))
    storage.remove(bucket.url("d"))
    storage.remove(bucket.url("d"))
    assert sorted(bucket.contents()) == ["d2/y"]


def test_an_audit_gives_the_local_numbers_and_leaves_nothing_behind(bucket, source, local, tmp_path):
    bucket.upload(source, "in")
    untwin.deduplicate(bucket.url("in"), bucket.url("out"), storage_options=bucket.options, **OPTIONS)
    before = bucket.contents("out/")
    found = untwin.audit(bucket.url("out"), storage_options=bucket.options)
    there = untwin.audit(tmp_path / "local")
    assert found.audit == there.audit
    assert found.audit.recall_rows[-1].with_neighbour > 60
    after = bucket.contents("out/")
    assert {name for name in after if after[name] != before.get(name)} == {"run.json"}
    assert set(after) == set(before)
    assert_no_canary(after)


def test_workers_compare_a_giant_cluster_that_lies_on_s3(tmp_path, bucket, monkeypatch):
    """They read its vectors by ranges from the output folder, where nothing of them is left."""
    monkeypatch.setattr(pairwise, "_SPREAD_WORK", 0)
    monkeypatch.setattr(pairwise, "_SPREAD_ROWS", (512, 512))
    X = np.random.default_rng(0).standard_normal((2000, 16))
    X[1::2] = X[::2] + 0.03 * np.random.default_rng(1).standard_normal((1000, 16))
    lists = pa.FixedSizeListArray.from_arrays(pa.array(X.astype(np.float32).reshape(-1)), 16)
    (tmp_path / "centroid=0").mkdir()
    table = pa.table({"id": [f"row-{at:04d}" for at in range(2000)], "embedding": lists, "place": np.arange(2000)})
    pq.write_table(table, tmp_path / "centroid=0/part-0.parquet")
    bucket.upload(tmp_path, "kmeans")
    seen = []

    def compare(output, spread):
        kwargs = {"storage_options": bucket.options}
        ranking = RankingStrategy.metadata_based(["place"])
        stage = PairwiseStage(
            *("id", "embedding", bucket.url("kmeans"), bucket.url(output), ranking),
            **{"read_kwargs": kwargs, "write_kwargs": kwargs, "eps": EPS, "compare_to": "kept"},
        )
        (unit,) = stage.units(Upstream())
        stage.process(unit, Context(64 << 20, 1, map, spread))
        return bucket.contents(f"{output}/")

    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:

        def spread(function, items):
            seen.extend(bucket.contents("spread/_work/").values())
            return pool.map(function, items)

        got, want = compare("spread", spread), compare("alone", None)
    assert list(got) == list(want) == ["cluster_0.parquet"]
    assert data_of(got)["cluster_0.parquet"].equals(data_of(want)["cluster_0.parquet"])
    assert data_of(got)["cluster_0.parquet"]["kept_id"].null_count < 1100
    assert len(seen) == 3 and {len(content) for content in seen} == {X.size * 4}


def test_a_fit_spread_over_processes_reads_the_sample_from_s3(bucket, tmp_path):
    X, _ = normalize(np.random.default_rng(0).normal(size=(900, 6)))
    hashes = hash_integers(np.arange(900), 1)
    results = []
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for storage, folder in ((Storage(bucket.options), bucket.url("sample")), (Storage(), str(tmp_path))):
            paths = [join(folder, name) for name in ("0.arrow", "1.arrow")]
            for path, some in zip(paths, (slice(0, 500), slice(500, 900)), strict=True):
                write_sample(storage, path, sample_batches([(hashes[some], X[some])], 100))
            parts = pool.map(partial(read_hashes, storage), paths)
            n_rows = [[len(found) for _, found in part] for part in parts]
            blocks = SampleBlocks(storage, paths, n_rows, 6, 200)
            results.append(fit(blocks, 5, init="random", max_iter=2, spread=pool.map))
    assert results[0].centroids.tobytes() == results[1].centroids.tobytes()
    assert results[0].counts.sum() == 900


def test_a_row_is_shown_and_labels_are_read_as_on_the_local_disk(bucket, source, tmp_path):
    bucket.upload(source, "in")
    untwin.deduplicate(bucket.url("in"), bucket.url("out"), storage_options=bucket.options, **OPTIONS)
    result = untwin.deduplicate(str(source), str(tmp_path / "local"), **OPTIONS)
    first = result.duplicates().slice(0, 1).to_pylist()[0]
    for id_ in (first["id"], first["kept_id"]):
        there = untwin.show(bucket.url("out"), id_, storage_options=bucket.options)
        here = untwin.show(str(tmp_path / "local"), id_)
        assert there == dataclasses.replace(here, output=bucket.url("out"))
        assert here.group
    lines = ["id,other_id,cosine_sim_score,label"]
    lines += [f"a{i},b{i},{0.8 + i / 100},{'same' if i > 9 else 'different'}" for i in range(20)]
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "labels.csv").write_text("\n".join(lines))
    bucket.upload(tmp_path / "labels", "labels")
    tuned = untwin.tune(bucket.url("labels/labels.csv"), storage_options=bucket.options)
    assert tuned.rows == untwin.tune(tmp_path / "labels" / "labels.csv").rows
    assert_no_canary(repr(there), repr(tuned))
