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

from inputs import cli, ids_of, parquet_files, read_files, read_folder, table_of, twin_table, write_parquet
from oracle import check_output, judge
from untwin import apply, audit, deduplicate
from untwin.errors import DamagedFileError, OutputExistsError

N_ROWS, DIM = 120, 12
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
    return table_of([f"{seed}-{i:04}" for i in range(N_ROWS)], vectors, embedding_type=kind, caption=captions)


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
    else:
        expected = judge(paths, options)
        assert not error or error in expected.errors, (error, message)
        if not error:
            check_output(folder / "out", expected, options)
    plainly = error

    error, message = process.run(source, folder / "skipped", {**options, "skip_bad_files": True})
    assert {path.name for path in folder.iterdir()} <= {"in", "out", "skipped"}
    if plainly != "DamagedFileError":
        assert error == plainly
        return False
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
