"""The command line: what it prints, what it leaves, and one clear message for every mistake."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from inputs import (
    TWINS,
    cli,
    ids_of,
    read_folder,
    snapshot,
    table_of,
    twin_ids,
    twin_table,
    twin_vectors,
    witnesses,
    write_parquet,
    write_split,
)
from untwin.backends.chain import Chain
from untwin.cli import main
from untwin.jobs.run import PreparedRun

CANARY = "canary-5b1f0c"


def process(*arguments, **environment):
    """Run a command as users do."""
    return subprocess.run(
        [sys.executable, "-m", "untwin", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.fixture
def source(tmp_path):
    return write_split(tmp_path / "in", twin_table(), 3)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def finished(source, out):
    """A finished run."""
    cli("run", source, out, "--eps", "0.05", "--rank-by", "id:asc")
    return out


def same_answer(one, other):
    for name in ("duplicates", "kept", "pairwise"):
        assert read_folder(one / name).equals(read_folder(other / name)), name
    assert pq.read_table(one / "groups.parquet").equals(pq.read_table(other / "groups.parquet"))


# --- run, look, apply ------------------------------------------------------------------------------------------------


def test_help_names_every_promised_option():
    text = cli("run", "--help").output
    for option in [
        "--eps",
        "--n-clusters",
        "--probes",
        "--target-recall",
        "--id-field",
        "--embedding-field",
        "--metadata-fields",
        "--which-to-keep",
        "--rank-by",
        "--compare-to",
        "--pairwise-batch-size",
        "--seed",
        "--input-filetype",
        "--on-repeated-id",
        "--kept",
        "--drop-intermediate",
        "--memory",
        "--workers",
        "--backend",
        "--storage-options",
        "--dry-run",
        "--overwrite",
        "--json",
        "-v",
    ]:
        assert option in text, option
    text = cli("apply", "--help").output
    assert "--eps" in text
    assert "--to" in text


def test_run_without_eps_shows_the_table_with_examples_and_removes_nothing(source, out):
    text = cli("run", source, out, "--rank-by", "id:asc").stdout
    for eps in (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3):
        (line,) = (line for line in text.splitlines() if line.split()[:1] == [f"{eps:g}"])
        assert line.split()[1] == "6"
        assert "50.0%" in line
    assert sum(" ~ " in line for line in text.splitlines()) == 3
    pairs = [line.split() for line in text.splitlines() if " ~ " in line]
    assert all(TWINS[one] == other for _, one, _, other in pairs)
    assert f"untwin apply {out} --eps" in text
    assert "12 rows in 3 files, dimension 8, 1 clusters" in text
    assert {path.name for path in out.iterdir()} == {"_done", "_plan", "kmeans", "pairwise", "run.json"}


def test_run_then_apply_is_the_same_as_a_run_with_that_eps(debian, tmp_path):
    given = [debian.files[0], "--n-clusters", 8]
    cli("run", *given, tmp_path / "look")
    cli("run", *given, tmp_path / "direct", "--eps", "0.1")
    before = snapshot(tmp_path / "look")
    cli("apply", tmp_path / "look", "--eps", "0.1")
    cli("apply", tmp_path / "look", "--eps", "0.1", "--to", tmp_path / "elsewhere")
    same_answer(tmp_path / "look" / "eps=0.1", tmp_path / "direct")
    same_answer(tmp_path / "elsewhere", tmp_path / "direct")
    after = snapshot(tmp_path / "look")
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("eps=0.1/") for name in set(after) - set(before))


@pytest.mark.parametrize("rule", [["--compare-to", "ranked"], ["--which-to-keep", "random"], ["--kept", "mirror"]])
def test_apply_at_the_eps_of_the_run_gives_the_answer_of_the_run(debian, tmp_path, rule):
    cli("run", debian.files[0], tmp_path / "out", "--n-clusters", 8, "--eps", "0.05", *rule)
    cli("apply", tmp_path / "out", "--eps", "0.05", "--to", tmp_path / "again")
    same_answer(tmp_path / "again", tmp_path / "out")
    assert len(ids_of(tmp_path / "out" / "duplicates")) > 100


def test_apply_never_rewrites_an_earlier_answer(finished):
    cli("apply", finished, "--eps", "0.1")
    before = snapshot(finished)
    assert "rows" in cli("apply", finished, "--eps", "0.1").stdout
    assert snapshot(finished) == before
    cli("apply", finished, "--eps", "0.2")
    assert before.items() <= snapshot(finished).items()
    # a folder that holds anything else is refused
    for to in (finished, finished / "kept", finished / "eps=0.1"):
        text = cli("apply", finished, "--eps", "0.3", "--to", to, code=2).stderr
        assert str(to) in text
    assert before.items() <= snapshot(finished).items()


def test_apply_needs_a_finished_run_with_its_clusters_and_an_input_that_did_not_change(source, out, tmp_path):
    assert "run.json" in cli("apply", tmp_path / "nothing", "--eps", "0.1", code=2).stderr
    cli("run", source, out, "--eps", "0.05", "--drop-intermediate")
    assert "kmeans" in cli("apply", out, "--eps", "0.1", code=2).stderr
    cli("run", source, out, "--overwrite")
    write_parquet(Path(source) / "part-00001.parquet", twin_table().slice(0, 5))
    text = cli("apply", out, "--eps", "0.1", code=2).stderr
    assert "part-00001.parquet" in text
    (Path(source) / "part-00001.parquet").unlink()
    assert "part-00001.parquet" in cli("apply", out, "--eps", "0.1", code=2).stderr
    assert not (out / "eps=0.1").exists()
    assert "0 and less than 1" in cli("apply", out, "--eps", "1.5", code=2).stderr


def test_apply_to_an_answer_of_apply_names_the_run(finished):
    cli("apply", finished, "--eps", "0.1")
    text = cli("apply", finished / "eps=0.1", "--eps", "0.2", code=2).stderr
    assert f"eps=0.1: is an answer for the run in {finished};" in text
    assert not (finished / "eps=0.1" / "eps=0.2").exists()


def test_apply_counts_its_rows_so_clusters_that_lost_some_are_no_answer(finished):
    (path,) = (finished / "kmeans").rglob("*.parquet")
    write_parquet(path, pq.ParquetFile(path).read().slice(3))
    text = cli("apply", finished, "--eps", "0.1", code=2).stderr
    assert str(finished / "kmeans") in text
    assert not (finished / "eps=0.1" / "run.json").exists()


def test_dry_run_says_what_it_would_take_and_writes_nothing(source, out):
    text = cli("run", source, out, "--dry-run", "--n-clusters", 2).stdout
    (line,) = text.strip().splitlines()
    assert "12 rows in 3 files, dimension 8, 2 clusters" in line
    assert "disk" in line
    assert "memory" in line
    assert not out.exists()


@pytest.mark.parametrize("eps", [["--eps", "0.05"], []])
def test_json_prints_run_json_and_nothing_else_on_stdout(source, out, eps):
    result = cli("run", source, out, "--json", "-v", *eps)
    assert json.loads(result.stdout) == json.loads((out / "run.json").read_text())
    assert "12 rows" in result.stderr
    again = cli("run", source, out, "--json", *eps)
    assert again.stdout == result.stdout
    applied = cli("apply", out, "--eps", "0.1", "--json")
    assert json.loads(applied.stdout) == json.loads((out / "eps=0.1" / "run.json").read_text())


def test_verbose_logs_each_stage_on_stderr(source, out):
    done = process("run", source, out, "--eps", "0.05", "-v")
    assert done.returncode == 0
    for stage in ("assign", "pairwise", "remove"):
        assert stage in done.stderr
    assert "rows/s" in done.stderr
    assert "rows/s" not in done.stdout


def test_the_summary_adds_up_and_says_where_things_are(finished, source, tmp_path):
    text = cli("run", source, tmp_path / "new", "--eps", "0.05", "--rank-by", "id:asc").stdout
    numbers = {line.split()[0]: line.split()[1] for line in text.splitlines() if len(line.split()) > 1}
    assert [numbers[name] for name in ("rows", "kept", "duplicates", "rejected")] == ["12", "6", "6", "0"]
    for part in ("kept", "duplicates"):
        assert str(tmp_path / "new" / part) in text


def test_a_real_process_does_the_same(source, out):
    done = process("run", source, out, "--eps", "0.05", "--rank-by", "id:asc")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert witnesses(out) == TWINS
    failed = process("run", source, out, "--eps", "0.05")
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert "rank_by" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_reader_of_stdout_that_goes_away_is_no_failure_of_the_run(source, out):
    """As in `untwin run ... | head -1`."""
    command = [sys.executable, "-m", "untwin", "run", source, str(out), "--eps", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert "12 rows" in running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 1
    assert (out / "run.json").exists()
    assert "finished already" in process(*command[3:]).stderr


# --- the same command again, and another one -------------------------------------------------------------------------


def test_the_same_command_again_does_nothing(finished, source):
    before = snapshot(finished)
    result = cli("run", source, finished, "--eps", "0.05", "--rank-by", "id:asc")
    assert snapshot(finished) == before
    assert "finished already" in result.stderr
    # how fast is no part of the answer
    cli("run", source, finished, "--eps", "0.05", "--rank-by", "id:asc", "--workers", 1, "--memory", "1GB")
    cli("run", source, finished, "--eps", "0.05", "--rank-by", "id:asc", "--pairwise-batch-size", 7, "--json", "-v")
    assert snapshot(finished) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--eps", "0.06"], "eps (was 0.05, now 0.06)"),
        (["--eps", "0.05", "--seed", "7"], "seed (was 42, now 7)"),
        (["--eps", "0.05", "--n-clusters", "3"], "n_clusters (was 'auto', now 3)"),
        (["--eps", "0.05", "--probes", "auto"], "probes (was 1, now 'auto')"),
        (["--eps", "0.05", "--compare-to", "ranked"], "compare_to (was 'kept', now 'ranked')"),
        (["--eps", "0.05", "--kept", "none"], "kept (was 'compact', now 'none')"),
        ([], "eps (was 0.05, now None)"),
    ],
)
def test_other_parameters_on_a_finished_output_are_named(finished, source, change, named):
    before = snapshot(finished)
    text = cli("run", source, finished, "--rank-by", "id:asc", *change, code=2).stderr
    assert named in text
    assert "--overwrite" in text
    assert snapshot(finished) == before


def test_another_input_on_a_finished_output_is_told(finished, source):
    write_parquet(Path(source) / "more.parquet", table_of(["new"], [[1] * 8]))
    text = cli("run", source, finished, "--eps", "0.05", "--rank-by", "id:asc", code=2).stderr
    assert "input files" in text


def test_overwrite_removes_an_earlier_run_with_all_that_is_in_it(finished, source):
    cli("apply", finished, "--eps", "0.2", "--kept", "mirror")
    cli("run", source, finished, "--eps", "0.05", "--kept", "none", "--drop-intermediate", "--overwrite")
    left = {path.name for path in finished.iterdir() if not path.name.startswith("_")}
    assert left == {"run.json", "duplicates", "groups.parquet"}
    cli("run", source, finished, "--overwrite")
    left = {path.name for path in finished.iterdir() if not path.name.startswith("_")}
    assert left == {"run.json", "kmeans", "pairwise"}


@pytest.mark.parametrize(
    "name", ["notes.txt", "kept/mine.parquet", "kmeans/centroid=0/extra.csv", "deep/er/file", "_plan/x", ".hidden"]
)
def test_a_foreign_file_stops_overwrite(finished, source, name):
    path = finished / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("precious")
    before = snapshot(finished)
    text = cli("run", source, finished, "--eps", "0.1", "--overwrite", code=2).stderr
    assert str(path) in text
    assert snapshot(finished) == before


def test_overwrite_of_an_unfinished_run(source, out):
    write_parquet(Path(source) / "again.parquet", table_of(["row00"], [[1] * 8]))
    cli("run", source, out, "--eps", "0.05", code=2)  # a repeated id stops it half way
    text = cli("run", source, out, "--eps", "0.05", "--on-repeated-id", "first", code=2).stderr
    assert "--overwrite" in text
    cli("run", source, out, "--eps", "0.05", "--on-repeated-id", "first", "--overwrite")
    assert (out / "run.json").exists()


def test_overwrite_does_not_remove_anything_before_the_new_run_is_checked(finished, source):
    before = snapshot(finished)
    cli("run", source, finished, "--eps", "0.05", "--id-field", "nope", "--overwrite", code=2)
    cli("run", source, finished, "--eps", "0.05", "--n-clusters", "13", "--overwrite", code=2)
    cli("run", source, finished, "--eps", "0.05", "--memory", "2MB", "--overwrite", code=2)
    cli("run", source, finished, "--eps", "0.05", "--dry-run", "--overwrite")
    assert snapshot(finished) == before


# --- mistakes --------------------------------------------------------------------------------------------------------


def mistake(*arguments, out, tells):
    """One message on stderr with exit code 2, nothing on stdout, and nothing in OUTPUT."""
    result = cli("run", *arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("untwin: ")
    assert result.stderr.count("untwin: ") == 1
    for text in tells:
        assert text in result.stderr
    assert not Path(out).exists() or not any(Path(out).iterdir())


def test_path_not_found(tmp_path, out):
    mistake(tmp_path / "nowhere", out, out=out, tells=[str(tmp_path / "nowhere"), "no such file or folder"])
    mistake(tmp_path / "no*.parquet", out, out=out, tells=["no*.parquet", "matches nothing"])


def test_no_files(tmp_path, out):
    (tmp_path / "empty").mkdir()
    mistake(tmp_path / "empty", out, out=out, tells=[str(tmp_path / "empty"), "*.parquet"])


@pytest.mark.parametrize(
    "option",
    [["--id-field", "nope"], ["--embedding-field", "nope"], ["--metadata-fields", "nope"], ["--rank-by", "nope:asc"]],
)
def test_no_such_column(source, out, option):
    mistake(source, out, *option, out=out, tells=["part-00000.parquet", "no column 'nope'", "'id', 'embedding'"])


@pytest.mark.parametrize(
    ("table", "tells"),
    [
        (pa.table({"id": ["a"], "embedding": ["text"]}), ["'embedding' has type string"]),
        (pa.table({"id": ["a"], "embedding": [[1, 2]]}), ["'embedding' has type list"]),
        (pa.table({"id": ["a"], "embedding": [0.5]}), ["'embedding' has type double"]),
        (pa.table({"id": [0.5], "embedding": [[0.5]]}), ["'id' has type double"]),
        (pa.table({"id": [["a"]], "embedding": [[0.5]]}), ["'id' has type list"]),
    ],
)
def test_column_of_the_wrong_type(tmp_path, out, table, tells):
    mistake(write_parquet(tmp_path / "in.parquet", table), out, out=out, tells=["in.parquet", *tells])


def test_foreign_files_in_output(source, out):
    out.mkdir()
    (out / "thesis.doc").write_text("precious")
    for more in ([], ["--overwrite"]):
        text = cli("run", source, out, "--eps", "0.05", *more, code=2).stderr
        assert str(out) in text
        assert [path.name for path in out.iterdir()] == ["thesis.doc"]


def test_output_that_is_a_file_the_input_or_around_the_input(source, out, tmp_path):
    out.write_text("precious")
    assert str(out) in cli("run", source, out, code=2).stderr
    assert str(out) in cli("run", source, out, "--overwrite", code=2).stderr
    assert str(out) in cli("run", source, out / "below", code=2).stderr
    assert out.read_text() == "precious"
    before = snapshot(tmp_path)
    for more in ([], ["--overwrite"]):
        assert source in cli("run", source, source, *more, code=2).stderr
        assert source in cli("run", source, tmp_path, *more, code=2).stderr
        assert source in cli("run", f"{source}/*.parquet", source, *more, code=2).stderr
    assert snapshot(tmp_path) == before


def test_output_inside_input_by_another_name_is_not_read(source, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    for given, out in (("link", f"{source}/a"), (source, "link/b"), ("in/../in", "in/c"), ("in/.", "link/d")):
        options = [given, out, "--eps", "0.05", "--rank-by", "id:asc"]
        cli("run", *options)
        assert "finished already" in cli("run", *options).stderr
        assert ids_of(Path(out) / "kept") == twin_ids()[:6]
        shutil.rmtree(out)
    assert "both input and output" in cli("run", "link", source, code=2).stderr


@pytest.mark.parametrize("eps", ["0", "1", "-0.1", "1.5", "nan", "inf"])
def test_eps_outside_0_and_1(source, out, eps):
    mistake(source, out, "--eps", eps, out=out, tells=["eps", "greater than 0 and less than 1"])


def test_more_clusters_than_rows(source, out):
    mistake(source, out, "--n-clusters", "13", out=out, tells=["n_clusters is 13", "12 rows"])


def test_footer_that_cannot_be_read(source, out):
    path = Path(source) / "part-00001.parquet"
    for damaged in (path.read_bytes()[:-20], b"not Parquet at all", b""):
        path.write_bytes(damaged)
        mistake(source, out, out=out, tells=[str(path), "cannot be read"])


def test_memory_too_small(debian, out):
    mistake(debian.path, out, "--memory", "2MB", out=out, tells=["memory", "--memory"])
    mistake(debian.path, out, "--memory", "20MB", out=out, tells=["20 MB", "--memory"])


def test_memory_is_enough_for_the_whole_run_or_refused_before_it(debian, tmp_path):
    for megabytes in range(60, 260, 20):
        out = tmp_path / str(megabytes)
        arguments = ["run", debian.files[0], out, "--eps", "0.05", "--memory", f"{megabytes}MB", "--n-clusters", "8"]
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert (result.exit_code, out.exists()) in ((0, True), (2, False)), result.output
        if result.exit_code == 0:
            break
    assert result.exit_code == 0


@pytest.mark.parametrize("options", [["--n-clusters", "8"], ["--eps", "0.05", "--n-clusters", "60"]])
def test_the_memory_asked_for_before_the_run_is_that_of_its_largest_unit(debian, tmp_path, monkeypatch, options):
    asked, needed = [], []
    least = PreparedRun.least_memory.fget
    monkeypatch.setattr(PreparedRun, "least_memory", property(lambda run: asked.append(least(run)) or asked[-1]))
    minimum = Chain.minimum_memory
    monkeypatch.setattr(Chain, "minimum_memory", lambda *given: needed.append(minimum(*given)) or needed[-1])
    cli("run", debian.path, tmp_path / "out", "--kept", "none", *options)
    assert max(needed) <= asked[0] <= 1.3 * max(needed)


def test_too_little_disk(source, out, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    mistake(source, out, "--eps", "0.05", out=out, tells=[str(out), "disk", "free"])
    mistake(source, out, "--dry-run", out=out, tells=[str(out), "disk", "free"])


def test_apply_is_told_of_too_little_disk_before_it_writes(finished, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    before = snapshot(finished)
    text = cli("apply", finished, "--eps", "0.1", code=2).stderr
    for told in (str(finished / "eps=0.1"), "disk", "free"):
        assert told in text
    assert snapshot(finished) == before
    assert not (finished / "eps=0.1").exists()


@pytest.mark.parametrize(
    ("option", "tells"),
    [
        (["--workers", "0"], "workers is 0"),
        (["--memory", "much"], "memory is 'much'"),
        (["--n-clusters", "few"], "--n-clusters is 'few'"),
        (["--n-clusters", "0"], "n_clusters is 0"),
        (["--probes", "few"], "--probes is 'few'"),
        (["--probes", "0", "--eps", "0.05"], "probes is 0"),
        (["--probes", "auto"], "probes is auto without eps"),
        (["--target-recall", "1"], "target_recall is 1"),
        (["--pairwise-batch-size", "0"], "pairwise_batch_size is 0"),
        (["--embedding-dim", "0"], "embedding_dim is 0"),
        (["--rank-by", "size"], "rank_by: 'size'"),
        (["--rank-by", "size:up"], "rank_by: 'size:up'"),
        (["--rank-by", "embedding:asc"], "embedding"),
        (["--metadata-fields", "embedding"], "embedding"),
        (["--drop-intermediate"], "drop_intermediate without eps"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_options_that_make_no_sense(source, out, option, tells):
    mistake(source, out, *option, out=out, tells=[tells])


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "one"], ["run", "a", "b", "--eps", "x"], ["run", "a", "b", "--kept", "x"], ["apply", "a"]],
)
def test_arguments_that_cannot_be_understood(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(*arguments, code=2).stdout == ""
    assert not any(tmp_path.iterdir())


def test_ranking_by_a_column_that_has_no_order(tmp_path, out):
    table = twin_table(tags=pa.array([["a"]] * 12))
    source = write_parquet(tmp_path / "in.parquet", table)
    mistake(source, out, "--rank-by", "tags:asc", out=out, tells=["cannot rank by 'tags'", "list"])


@pytest.mark.parametrize("column", ["id", "embedding", "text"])
def test_truncated_data_page_is_named(tmp_path, out, column):
    folder = tmp_path / "in"
    write_parquet(folder / "good.parquet", twin_table(text=pa.array(["some words"] * 12)))
    table = table_of([f"x{i}" for i in range(12)], twin_vectors(), text=pa.array([f"a text {i}" for i in range(12)]))
    path = Path(write_parquet(folder / "torn.parquet", table, compression="zstd", use_dictionary=False))
    chunk = pq.read_metadata(path).row_group(0).column(["id", "embedding", "text"].index(column))
    content = bytearray(path.read_bytes())
    low, size = chunk.data_page_offset, chunk.total_compressed_size
    content[low : low + size] = bytes(size)
    path.write_bytes(bytes(content))
    result = cli("run", folder, out, "--eps", "0.05", code=2)
    assert str(path) in result.stderr
    assert "repair or remove the file" in result.stderr


def test_more_than_half_rejected_has_exit_code_2(tmp_path, out):
    source = write_parquet(tmp_path / "in.parquet", table_of(["a", "b", "c"], [[1, 0], [0, 0], None]))
    text = cli("run", source, out, code=2).stderr
    assert "2 of 3 rows" in text


def test_an_unexpected_failure_has_exit_code_1_and_says_what_is_left(source, out, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("boom")

    monkeypatch.setattr("untwin.stages.pairwise.match_ranked", fail)
    text = cli("run", source, out, code=1).stderr
    assert "RuntimeError: boom" in text
    assert str(out) in text
    assert "--overwrite" in text


def test_an_interrupted_apply_calls_its_own_folder_unfinished_and_not_the_run(finished, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("untwin.stages.pairwise.match_ranked", interrupt)
    text = cli("apply", finished, "--eps", "0.1", code=130).stderr
    assert f"{finished / 'eps=0.1'} holds an unfinished result" in text
    assert "the same command goes on" in text


def test_a_failure_before_anything_is_written_says_so(source, out, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("boom")

    monkeypatch.setattr("untwin.jobs.run.make_plan", fail)
    text = cli("run", source, out, code=1).stderr
    assert "RuntimeError: boom" in text
    assert "nothing was written" in text
    assert str(out) not in text


@pytest.mark.parametrize("command", ["run", "apply", "audit"])
@pytest.mark.parametrize("content", ["{}", "[]", "{bad", "", '{"format_version": 99}'])
def test_a_run_json_that_is_damaged_or_of_another_version_is_named(finished, source, command, content):
    (finished / "run.json").write_text(content)
    arguments = {
        "run": ["run", source, finished, "--eps", "0.05", "--rank-by", "id:asc"],
        "apply": ["apply", finished, "--eps", "0.1"],
        "audit": ["audit", finished],
    }
    assert str(finished / "run.json") in cli(*arguments[command], code=2).stderr


def test_an_output_that_cannot_be_written_is_told_before_the_work(source, tmp_path, monkeypatch):
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):  # permissions do not count for this user
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))
    out = folder / "out"
    for more in ([], ["--dry-run"]):
        mistake(source, out, "--eps", "0.05", *more, out=out, tells=[str(out), "read-only", "another folder"])


def test_overwrite_with_dry_run_refuses_what_overwrite_refuses(finished, source):
    (finished / "notes.txt").write_text("precious")
    for more in ([], ["--dry-run"]):
        text = cli("run", source, finished, "--eps", "0.1", "--overwrite", *more, code=2).stderr
        assert str(finished / "notes.txt") in text


def test_ids_are_shown_on_one_line_of_limited_length(tmp_path):
    ids = ["two\nlines \x1b[31m", "tab\t数", "long" * 1000, "plain"]
    source = write_parquet(tmp_path / "in.parquet", table_of(ids, [[1, 0], [1, 0.001], [0, 1], [0.001, 1]]))
    text = cli("run", source, tmp_path / "out").stdout
    pairs = [line for line in text.splitlines() if "  ~  " in line]
    assert len(pairs) == 2
    assert all(len(line) < 150 and line.isprintable() for line in pairs)
    for shown in (r"two\nlines \x1b[31m", r"tab\t数", "long" * 15 + "…", "plain"):
        assert sum(shown in line for line in pairs) == 1, shown


def test_ids_that_are_not_utf_8_are_compared_like_others(tmp_path):
    """Some writers put any bytes into text columns."""
    names = pa.array([b"\xff\xfe", b"b", b"\xffc", b"d"], pa.binary())
    ids = pa.Array.from_buffers(pa.string(), 4, names.buffers())
    vectors = pa.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 1.0]])
    source = write_parquet(tmp_path / "in.parquet", pa.table({"id": ids, "embedding": vectors}))
    assert r"\xff\xfe" in cli("run", source, tmp_path / "out").stdout
    cli("apply", tmp_path / "out", "--eps", "0.05")
    (removed,) = read_folder(tmp_path / "out" / "eps=0.05" / "duplicates")["id"].cast(pa.binary()).to_pylist()
    assert removed in (b"\xff\xfe", b"b")


def test_the_next_command_is_shown_as_the_shell_wants_it(source, tmp_path):
    out = tmp_path / "with a space"
    for eps in (["--eps", "0.05"], ["--overwrite"]):
        assert f"untwin apply '{out}' --eps" in cli("run", source, out, *eps).stdout


@pytest.mark.parametrize(("path", "told"), [("", "path is empty"), ("~no-such-user/x", "~no-such-user/x")])
def test_a_path_that_is_empty_or_of_nobody_is_a_mistake(source, out, tmp_path, monkeypatch, path, told):
    """An empty one comes from a variable that is not set, and must not mean the working directory."""
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    assert told in cli("run", path, out, code=2).stderr
    assert told in cli("run", source, path, code=2).stderr
    assert snapshot(tmp_path) == before


# --- secrets ---------------------------------------------------------------------------------------------------------


def assert_no_canary(folder, *texts):
    for path in Path(folder).rglob("*"):
        assert CANARY not in str(path)
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path
    for text in texts:
        assert CANARY not in text


@pytest.mark.parametrize("form", ["text", "file"])
def test_storage_options_never_show(source, out, tmp_path, form):
    options = json.dumps({"key": CANARY, "secret": CANARY, "client_kwargs": {"token": CANARY}})
    (tmp_path / "options.json").write_text(options)
    given = ["--storage-options", options if form == "text" else f"@{tmp_path / 'options.json'}", "-v"]
    texts = []
    for arguments in (
        ["run", source, out, "--eps", "0.05", *given],
        ["run", source, out, "--eps", "0.05", *given, "--json"],
        ["apply", out, "--eps", "0.1", *given],
        ["run", source, out, "--eps", "0.06", *given],
        ["run", f"{source}/nothing", out, *given],
        ["run", f"nosuch://user:{CANARY}@host/x", tmp_path / "other", *given],
    ):
        done = process(*arguments)
        assert done.returncode in (0, 2), done.stderr
        texts += [done.stdout, done.stderr]
    assert (out / "eps=0.1" / "run.json").exists()
    assert_no_canary(out, *texts)


@pytest.mark.parametrize(
    "options",
    [
        f"{{'key': '{CANARY}'}}",
        f'["{CANARY}"]',
        f'"{CANARY}"',
        CANARY,
        f'{{"key": "{CANARY}"',
        "@/nowhere/options.json",
    ],
)
def test_bad_storage_options_are_a_mistake_and_are_not_repeated(source, out, options):
    result = cli("run", source, out, "--storage-options", options, code=2)
    assert "--storage-options" in result.stderr
    assert CANARY not in result.output
    assert not out.exists()


def test_a_file_of_storage_options_that_is_not_text_is_a_mistake(source, out, tmp_path):
    (tmp_path / "options").write_bytes(b"\xff\xfe\x00")
    text = cli("run", source, out, "--storage-options", f"@{tmp_path / 'options'}", code=2).stderr
    assert f"{tmp_path / 'options'} is not text" in text


def test_storage_options_reach_the_file_system(tmp_path, out):
    """Read from a file system that is not the local one; what is written stays free of the options."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for number in range(3):
        with memory.open(f"/clips/{number}.parquet", "wb") as sink:
            pq.write_table(twin_table().slice(4 * number, 4), sink)
    try:
        options = json.dumps({"token": CANARY})
        result = cli(
            "run", "memory:///clips", out, "--eps", "0.05", "--rank-by", "id:asc", "--storage-options", options
        )
        assert witnesses(out) == TWINS
        assert ids_of(out / "kept") == twin_ids()[:6]
        assert_no_canary(out, result.output)
    finally:
        memory.rm("/clips", recursive=True)


@pytest.mark.parametrize(
    "options",
    [
        {"key": CANARY, "no_such_option": CANARY},
        {"client_kwargs": CANARY},
        {"endpoint_url": CANARY},
        {"key": CANARY, "secret": CANARY, "endpoint_url": "http://127.0.0.1:9"},
    ],
)
def test_storage_options_that_the_file_system_does_not_understand(out, options):
    pytest.importorskip("s3fs")
    options = {**options, "config_kwargs": {"retries": {"max_attempts": 1}}}
    result = cli("run", "s3://bucket/clips", out, "--storage-options", json.dumps(options), code=2)
    assert "s3://bucket/clips: the storage" in result.stderr
    assert CANARY not in result.output
    assert not out.exists()


def test_progress_bars_on_a_terminal_only(source, out):
    import pty

    terminal, other_end = pty.openpty()
    command = [sys.executable, "-m", "untwin", "run", source, str(out), "--eps", "0.05", "--json", "--overwrite"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=other_end) as running:
        os.close(other_end)
        shown = b""
        while part := _read(terminal):
            shown += part
        os.close(terminal)
        printed = running.stdout.read()
    assert running.returncode == 0
    assert json.loads(printed)["rows"]["input"] == 12
    for text in (b"assign", b"remove", b"units", b"rows/s", b"left", b"100%"):
        assert text in shown


def _read(terminal):
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end is closed and everything is read
        return b""
