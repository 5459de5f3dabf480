"""The same rows, parameters and seed give the same answer, however the work is done and the rows are laid out."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inputs import ids_of, read_files, read_folder, write_split
from untwin import deduplicate

EPS = 0.05


class Answer:
    """Everything that must not depend on how a run was done."""

    def __init__(self, output, n_clusters):
        self.duplicates = read_folder(output / "duplicates")
        self.groups = pq.read_table(output / "groups.parquet")
        self.kept = sorted(ids_of(output / "kept"))
        self.centroids = np.load(output / "kmeans" / "_centroids.npy").tobytes()
        paths = [output / "pairwise" / f"cluster_{k}.parquet" for k in range(n_clusters)]
        self.pairs = [pq.read_table(path) for path in paths if path.exists()]

    def __eq__(self, other):
        assert self.centroids == other.centroids
        assert self.duplicates.num_rows == other.duplicates.num_rows > 100
        assert self.duplicates.equals(other.duplicates)
        assert self.groups.equals(other.groups)
        assert len(self.pairs) == len(other.pairs) > 1
        for mine, theirs in zip(self.pairs, other.pairs, strict=True):
            assert mine.equals(theirs)
        assert self.kept == other.kept
        assert self.kept
        return True

    __hash__ = None


@pytest.fixture(scope="module")
def run(debian, tmp_path_factory):
    """Run with the given input and options; the answer."""

    def run(source=debian.path, **options):
        output = tmp_path_factory.mktemp("run") / "out"
        options = {"workers": 2, "memory": "4GB", **options}
        result = deduplicate(source, str(output), eps=EPS, n_clusters=debian.n_clusters, **options)
        answer = Answer(output, debian.n_clusters)
        assert len(answer.kept) == result.n_kept
        assert answer.duplicates.num_rows == result.n_duplicates
        return answer

    return run


@pytest.fixture(scope="module")
def base(run):
    return run()


@pytest.fixture(scope="module")
def rows(debian):
    return read_files(debian.files).select(["id", "embedding"])


def with_lists_of(table, kind):
    """The table with its embeddings as lists of another float type."""
    flat = table["embedding"].combine_chunks().flatten()
    offsets = np.arange(table.num_rows + 1, dtype=np.int64) * 256
    vectors = pa.LargeListArray.from_arrays(pa.array(offsets), flat.cast(kind))
    vectors = vectors.cast(pa.list_(kind))
    return table.set_column(1, "embedding", vectors)


@pytest.mark.parametrize(
    "options",
    [{"workers": 1}, {"memory": "256MB"}, {"workers": 1, "memory": "256MB", "pairwise_batch_size": 77}],
    ids=str,
)
def test_workers_memory_and_batch_size(run, base, options):
    assert run(**options) == base


@pytest.mark.parametrize("n_files", [1, 6, 60, 2400])
def test_number_of_files(run, base, rows, debian, tmp_path, n_files):
    if not debian.whole:
        n_files = min(n_files, 240)
    folder = write_split(tmp_path / "in", rows, n_files, compression="none")
    assert len(list((tmp_path / "in").iterdir())) == n_files
    assert run(folder) == base


def test_order_of_rows(run, base, rows, tmp_path):
    shuffled = rows.take(pa.array(np.random.default_rng(1).permutation(rows.num_rows)))
    assert run(write_split(tmp_path / "in", shuffled, 7, compression="none")) == base


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()], ids=str)
def test_type_of_lists(run, base, rows, tmp_path, kind):
    table = with_lists_of(rows, kind)
    assert table.schema.field("embedding").type == pa.list_(kind)
    assert run(write_split(tmp_path / "in", table, 6, compression="none")) == base


def test_everything_at_once(run, base, rows, tmp_path):
    table = with_lists_of(rows, pa.float64())
    shuffled = table.take(pa.array(np.random.default_rng(2).permutation(rows.num_rows)))
    folder = write_split(tmp_path / "in", shuffled, 40, compression="none", row_group_size=500)
    assert run(folder, workers=1, memory="256MB", pairwise_batch_size=50) == base


def test_another_seed_gives_other_clusters(run, base):
    """So the tests above compare something that can differ."""
    assert run(seed=7).centroids != base.centroids


@pytest.mark.parametrize("rule", [{"which_to_keep": "random"}, {"compare_to": "ranked"}], ids=str)
def test_other_rules(run, rows, tmp_path, rule):
    some = rows.slice(0, 9000)
    shuffled = some.take(pa.array(np.random.default_rng(3).permutation(some.num_rows)))
    in_order = write_split(tmp_path / "in", some, 1, compression="none")
    folder = write_split(tmp_path / "shuffled", shuffled, 5, compression="none")
    assert run(folder, workers=1, memory="256MB", **rule) == run(in_order, **rule)


def test_with_probes_everything_at_once(run, base, rows, tmp_path):
    expected = run(probes=3)
    assert not expected.duplicates.equals(base.duplicates)
    assert expected.centroids == base.centroids
    shuffled = with_lists_of(rows, pa.float64()).take(pa.array(np.random.default_rng(3).permutation(rows.num_rows)))
    folder = write_split(tmp_path / "in", shuffled, 40, compression="none", row_group_size=500)
    assert run(folder, probes=3, workers=1, memory="256MB", pairwise_batch_size=50) == expected
