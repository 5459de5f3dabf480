"""Files that are cut off or have flipped bytes: an error that names the file, or the values as decoded; never a crash.

With `skip_bad_files` the run goes on without them.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import untwin.storage.listing
from inputs import cli, ids_of, parquet_files, read_files, read_folder, table_of, write_parquet
from oracle import check_output, judge
from untwin import apply, audit, deduplicate
from untwin.errors import DamagedFileError, OutputExistsError
from untwin.stages.removal import RemoveDuplicatesStage

N_ROWS, DIM = 120, 12
VECTORS = pa.list_(pa.float32())
OPTIONS = {
    "eps": 0.0513,
    "n_clusters": 2,
    "which_to_keep": "hard",
    "rank_by": None,
    "compare_to": "kept",
    "on_repeated_id": "first",
    "embedding_dim": None,
    "workers": 1,
}
WRITTEN = {
    "as Curator writes": (pa.list_(pa.float64()), {"compression": "snappy", "use_dictionary": True}),
    "checksums": (pa.list_(pa.float32()), {"compression": "zstd", "write_page_checksum": True, "row_group_size": 50}),
    "plain": (pa.list_(pa.float32(), DIM), {"compression": "none", "use_dictionary": False, "data_page_size": 300}),
    "new pages": (pa.large_list(pa.float32()), {"compression": "gzip", "data_page_version": "2.0"}),
}


def a_table(seed, kind):
    """Rows with near-duplicates and a column that no comparison reads."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(N_ROWS, DIM)).astype(np.float32)
    vectors[N_ROWS // 2 :] = vectors[: N_ROWS // 2] + 0.02
    captions = pa.array([f"caption {number} of {seed}" for number in range(N_ROWS)])
    table = table_of([f"{seed}-{i:04}" for i in range(N_ROWS)], vectors, embedding_type=kind, caption=captions)
    described = {"index_columns": [{"kind": "range", "start": 0, "stop": N_ROWS}], "columns": []}
    return table.replace_schema_metadata({"pandas": json.dumps(described)})


def damaged(content, rng):
    """A file's bytes with one kind of damage."""
    content = bytearray(content)
    if not content:
        return b""
    # footers, headers and the beginning are small, and the most delicate
    where = int(
        rng.choice([rng.integers(len(content)), max(0, len(content) - 1 - rng.integers(1200)), rng.integers(100)])
    )
    where = min(where, len(content) - 1)
    match rng.choice(
        ["cut", "bit", "bit", "byte", "byte", "bytes", "zeros", "doubled", "empty"],
        p=[0.15, *[0.15] * 4, 0.1, 0.05, 0.05, 0.05],
    ):
        case "cut":
            del content[where:]
        case "bit":
            content[where] ^= 1 << int(rng.integers(8))
        case "byte":
            content[where] = int(rng.integers(256))
        case "bytes":
            for place in rng.integers(len(content), size=8):
                content[place] = int(rng.integers(256))
        case "zeros":
            length = int(rng.integers(1, 200))
            content[where : where + length] = bytes(len(content[where : where + length]))
        case "doubled":
            content[where:where] = content[where : where + 64]
        case "empty":
            content.clear()
    return bytes(content)


class Process:
    """`damaged_runs`, started again if it dies (which fails the test)."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("damaged_runs.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, source, output, options):
        """Name of the error, and its message; nothing for a run that succeeded."""
        case = {"input": str(source), "output": str(output), "options": options}
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process died, exit code {self._process.wait()}"
        found = json.loads(line)
        return found["error"], found["message"]

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture
def process():
    process = Process()
    yield process
    process.close()


def _ids_are_text(paths):
    """Whether ids can be shown; damaged ones are compared as the bytes that they are, for which there is no oracle."""
    try:
        return all(pq.read_table(path, columns=["id"])["id"].to_pylist() is not None for path in paths)
    except UnicodeDecodeError:
        return False


def check_parquet(folder, number, process):
    """Damage one of three files, and run without and with `skip_bad_files`; True if the file was skipped."""
    rng = np.random.default_rng(number)
    written = list(WRITTEN)[number % len(WRITTEN)]
    kind, how = WRITTEN[written]
    source = folder / "in"
    paths = [write_parquet(source / f"{name}.parquet", a_table(seed, kind), **how) for seed, name in enumerate("abc")]
    bad = Path(paths[int(rng.integers(3))])
    bad.write_bytes(damaged(bad.read_bytes(), rng))
    options = {**OPTIONS, "kept": str(rng.choice(["compact", "mirror"]))}

    error, message = process.run(source, folder / "out", options)
    if error in ("DamagedFileError", "SchemaError"):
        assert str(bad) in message
    elif _ids_are_text(paths):
        expected = judge(paths, options)
        assert not error or error in expected.errors, (error, message)
        if not error:
            check_output(folder / "out", expected, options)
    plainly = error

    error, message = process.run(source, folder / "skipped", {**options, "skip_bad_files": True})
    assert {path.name for path in folder.iterdir()} <= {"in", "out", "skipped"}
    if error == plainly != "DamagedFileError":
        return False
    # a column's name may be damaged before anything is read
    assert plainly in ("DamagedFileError", "SchemaError")
    assert (error, message) == ("", "")
    good = [path for path in paths if path != str(bad)]
    check_output(folder / "skipped", judge(good, options), options, skipped={str(bad)})
    return True


def check_many(tmp_path, numbers, check, process):
    """Check cases one after the other, each in a folder of its own; how many gave True."""
    found = 0
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            found += check(folder, number, process)
        except AssertionError as error:
            error.add_note(f"in case {number}")
            raise
        shutil.rmtree(folder)
    return found


def test_a_damaged_parquet_file_is_named_or_skipped_or_read_as_it_is(tmp_path, process):
    n_skipped = check_many(tmp_path, range(40), check_parquet, process)
    assert 10 < n_skipped < 40


@pytest.mark.slow
def test_many_damaged_parquet_files_are_named_or_skipped_or_read_as_they_are(tmp_path, process):
    assert check_many(tmp_path, range(1000, 1600), check_parquet, process) > 100


def check_lines(folder, number, process):
    """Damage one of two files of JSON lines; True if the damage is told."""
    rng = np.random.default_rng(number)
    source = folder / "in"
    source.mkdir()
    for seed, name in enumerate("ab"):
        rows = a_table(seed, pa.list_(pa.float64())).to_pylist()
        (source / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = source / f"{rng.choice(['a', 'b'])}.jsonl"
    bad.write_bytes(damaged(bad.read_bytes(), rng))
    return check_counts(folder, str(bad), {**OPTIONS, "input_filetype": "jsonl"}, process)


def check_arrays(folder, number, process):
    """Damage one of two arrays, or the metadata beside it; True if the damage is told."""
    rng = np.random.default_rng(number)
    source = folder / "in"
    source.mkdir()
    for seed in range(2):
        table = a_table(seed, pa.list_(pa.float32()))
        np.save(source / f"img_emb_{seed}.npy", np.array(table["embedding"].to_pylist(), np.float32))
        pq.write_table(table.drop_columns(["embedding"]), source / f"metadata_{seed}.parquet")
    pair = int(rng.integers(2))
    bad = source / str(rng.choice([f"img_emb_{pair}.npy", f"metadata_{pair}.parquet"]))
    content = bad.read_bytes()
    # most of an array is numbers: damage its header as often
    part = 128 if bad.suffix == ".npy" and rng.random() < 0.5 else len(content)
    bad.write_bytes(damaged(content[:part], rng) + content[part:])
    return check_counts(folder, f"_{pair}.", {**OPTIONS, "input_filetype": "npy"}, process)


def check_counts(folder, bad, options, process):
    """Run without and with `skip_bad_files`: a named error, or every row once; True if the file was skipped."""
    error, message = process.run(folder / "in", folder / "out", options)
    assert error in ("", "DamagedFileError", "SchemaError"), message
    if error:
        assert bad in message
    else:
        assert_counts(folder / "out", 0)
    plainly = error
    error, message = process.run(folder / "in", folder / "skipped", {**options, "skip_bad_files": True})
    assert {path.name for path in folder.iterdir()} <= {"in", "out", "skipped"}
    if error == plainly != "DamagedFileError":
        return False
    assert (error, message) == ("", "")
    assert_counts(folder / "skipped", 1)
    return True


def assert_counts(output, n_skipped):
    run = json.loads((output / "run.json").read_text())
    rows = run["rows"]
    assert run["input"]["skipped_files"] == n_skipped
    assert rows["input"] == rows["kept"] + rows["duplicates"] + rows["rejected"] == run["input"]["rows"]
    listed = [row for name in run["files"]["rejected"] for row in pq.ParquetFile(output / name).read().to_pylist()]
    assert len(listed) == rows["rejected"] + n_skipped
    assert sum(pq.read_metadata(output / name).num_rows for name in run["files"]["duplicates"]) == rows["duplicates"]
    assert rows["kept"] >= N_ROWS / 2


@pytest.mark.parametrize("check", [check_lines, check_arrays])
def test_damaged_lines_and_arrays_are_named_or_skipped_or_read_as_they_are(tmp_path, process, check):
    assert check_many(tmp_path, range(25), check, process) > 3


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_lines, check_arrays])
def test_many_damaged_lines_and_arrays(tmp_path, process, check):
    assert check_many(tmp_path, range(1000, 1300), check, process) > 30


@pytest.fixture
def with_bad_files(tmp_path):
    """A folder of three good and four bad files: its path, the good ones, and the bad ones with a word of why."""
    source = tmp_path / "in"
    paths = [write_parquet(source / f"{name}.parquet", a_table(seed, VECTORS)) for seed, name in enumerate("gms")]
    whole = Path(paths[0]).read_bytes()
    spoilt = {
        "a-empty.parquet": (b"", "size is 0 bytes"),
        "h-text.parquet": (b"these are no columns\n" * 100, "not found in footer"),
        "n-cut.parquet": (whole[: len(whole) // 2], "not found in footer"),
    }
    for name, (content, _) in spoilt.items():
        (source / name).write_bytes(content)
    # damage that only decoding finds, in a column that no comparison reads
    flipped = source / "z-flipped.parquet"
    write_parquet(flipped, a_table(7, VECTORS), compression="none", use_dictionary=False, write_page_checksum=True)
    content = flipped.read_bytes()
    flipped.write_bytes(content.replace(b"caption 77 of 7", b"caption 78 of 7"))
    assert flipped.read_bytes() != content
    why = {str(source / name): word for name, (_, word) in spoilt.items()} | {str(flipped): "could not verify page"}
    return source, paths, why


@pytest.mark.parametrize("kept", ["compact", "mirror"])
def test_bad_files_are_listed_and_the_run_goes_on_with_the_others(tmp_path, with_bad_files, kept):
    source, good, why = with_bad_files
    options = {**OPTIONS, "kept": kept}
    with pytest.raises(DamagedFileError, match=r"a-empty\.parquet"):
        deduplicate(str(source), str(tmp_path / "plain"), **options)
    assert not (tmp_path / "plain").exists()
    result = deduplicate(str(source), str(tmp_path / "out"), **options, skip_bad_files=True)
    assert result.n_skipped_files == 4
    assert result.n_rows == 3 * N_ROWS
    assert result.n_rejected == 0
    check_output(tmp_path / "out", judge(good, options), options, skipped=why)
    listed = read_folder(tmp_path / "out" / "rejected").to_pylist()
    assert sorted(row["file"] for row in listed) == sorted(why)
    for row in listed:
        assert why[row["file"]] in row["reason"].lower()
    names = {path.name for path in parquet_files(tmp_path / "out" / "kept")}
    assert names == ({Path(path).name for path in good} if kept == "mirror" else {"part-00000.parquet"})


def test_the_answer_is_that_of_the_good_files_alone_whatever_the_workers(tmp_path, with_bad_files):
    source, good, _ = with_bad_files
    alone = deduplicate(good, str(tmp_path / "alone"), **OPTIONS)
    for workers, memory in ((1, "256MB"), (3, "2GB")):
        output = tmp_path / f"with-{workers}"
        options = {**OPTIONS, "workers": workers, "memory": memory, "skip_bad_files": True}
        found = deduplicate(str(source), str(output), **options)
        assert found.duplicates().equals(alone.duplicates())
        assert found.n_duplicates > N_ROWS
        assert read_folder(output / "kept").equals(read_folder(tmp_path / "alone" / "kept"))


def test_the_command_says_how_many_files_it_skips(tmp_path, with_bad_files):
    source, _, _ = with_bad_files
    shown = cli("run", source, tmp_path / "out", "--eps", "0.05", "--skip-bad-files").output
    assert "360 rows in 3 files (4 more cannot be read, and are skipped)" in shown
    assert "skipped                  4  files that cannot be read" in shown
    again = cli("run", source, tmp_path / "out", "--eps", "0.05", "--skip-bad-files").output
    assert "finished already" in again


def test_apply_and_audit_take_an_output_with_skipped_files(tmp_path, with_bad_files):
    source, good, why = with_bad_files
    deduplicate(str(source), str(tmp_path / "out"), **OPTIONS, skip_bad_files=True)
    other = apply(str(tmp_path / "out"), eps=0.2071)
    assert other.n_skipped_files == 4
    assert other.n_kept + other.n_duplicates == 3 * N_ROWS
    given = read_files(good)
    removed = set(ids_of(tmp_path / "out" / "eps=0.2071" / "duplicates"))
    assert ids_of(tmp_path / "out" / "eps=0.2071" / "kept") == [x for x in given["id"].to_pylist() if x not in removed]
    measured = audit(str(tmp_path / "out")).audit
    assert measured.n_rows == 3 * N_ROWS
    # a file that was skipped is part of the input: repaired, it makes another one
    write_parquet(next(iter(why)), a_table(9, VECTORS))
    with pytest.raises(OutputExistsError, match=r"a-empty\.parquet"):
        deduplicate(str(source), str(tmp_path / "out"), **OPTIONS, skip_bad_files=True)


def test_an_interrupted_run_goes_on_without_reading_the_files_through_again(tmp_path, with_bad_files, monkeypatch):
    source, good, why = with_bad_files
    monkeypatch.setattr(RemoveDuplicatesStage, "process", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        deduplicate(str(source), str(tmp_path / "out"), **OPTIONS, skip_bad_files=True)
    monkeypatch.undo()
    monkeypatch.setattr(untwin.storage.listing, "_read_through", None)
    with pytest.raises(OutputExistsError, match="skip_bad_files"):
        deduplicate(good, str(tmp_path / "out"), **OPTIONS)
    result = deduplicate(str(source), str(tmp_path / "out"), **OPTIONS, skip_bad_files=True)
    assert result.n_reused > 0
    check_output(tmp_path / "out", judge(good, OPTIONS), OPTIONS, skipped=why)


def _interrupted(*_):
    raise KeyboardInterrupt


def test_all_files_bad_is_an_error_that_names_one(tmp_path, with_bad_files):
    _, _, why = with_bad_files
    with pytest.raises(DamagedFileError) as error:
        deduplicate(list(why), str(tmp_path / "out"), **OPTIONS, skip_bad_files=True)
    assert "no file of the input can be read, 4 are skipped" in str(error.value)
    assert next(iter(why)) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_page_that_asks_for_more_memory_than_there_is_names_the_file(tmp_path, process):
    """Twenty bytes of a dictionary page's header can ask for gigabytes."""
    table = pa.table({"id": ["a", "b"], "embedding": pa.array([[1.0, 0], [0, 1]], VECTORS)})
    path = Path(write_parquet(tmp_path / "in" / "a.parquet", table, compression="none"))
    content = path.read_bytes()
    n_asked = 0
    for place in range(4, 40):  # the header of the first dictionary page: sizes and counts, as varints
        (tmp_path / "in" / "a.parquet").write_bytes(content[:place] + b"\xfe\xff\xff\xff\x0f" + content[place + 5 :])
        error, message = process.run(tmp_path / "in", tmp_path / f"out-{place}", {"eps": 0.05})
        assert error in ("", "DamagedFileError", "TooManyRejectedError"), message
        if error == "DamagedFileError":
            assert str(path) in message
            n_asked += 1
    assert n_asked > 10
