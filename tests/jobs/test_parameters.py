"""Parameters of the Python call: a value of the wrong type is refused by name, before anything is read or written."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

import untwin
from inputs import twin_table, write_parquet
from untwin.errors import ParameterError, TooManyRejectedError
from untwin.jobs.parameters import RunParameters, parse_bytes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eps", "0.05"),
        ("eps", True),
        ("n_clusters", 2.0),
        ("probes", 2.0),
        ("probes", "many"),
        ("probes", True),
        ("target_recall", "0.9"),
        ("target_recall", True),
        ("seed", "1"),
        ("pairwise_batch_size", 10.5),
        ("embedding_dim", "256"),
        ("embedding_dim", -1),
        ("workers", "2"),
        ("workers", 1.5),
        ("workers", True),
        ("memory", float("nan")),
        ("memory", [1]),
        ("id_field", None),
        ("id_field", ""),
        ("embedding_field", 3),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(ParameterError, match=f"^{name} is "):
        untwin.deduplicate(tmp_path / "nothing-here", tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_numbers_of_numpy_are_numbers(tmp_path):
    source = write_parquet(tmp_path / "in.parquet", twin_table())
    plain = {"n_clusters": 3, "seed": 3, "eps": 0.0625, "embedding_dim": 8, "pairwise_batch_size": 5}
    types = {"eps": np.float32}
    untwin.deduplicate(source, tmp_path / "plain", **plain)
    made = {name: types.get(name, np.int64)(value) for name, value in plain.items()}
    untwin.deduplicate(source, tmp_path / "numpy", **made)
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("plain", "numpy")]
    assert runs[0]["parameters"] == runs[1]["parameters"]
    assert runs[0]["rows"] == runs[1]["rows"]


def test_an_embedding_dim_that_no_file_can_have_is_refused_before_the_work(tmp_path):
    table = twin_table(embedding_type=pa.list_(pa.float32(), 8))
    with pytest.raises(ParameterError, match="embedding_dim is 99, but column 'embedding' holds vectors of length 8"):
        untwin.deduplicate(write_parquet(tmp_path / "in.parquet", table), tmp_path / "out", embedding_dim=99)
    assert not (tmp_path / "out").exists()


def test_an_embedding_dim_that_no_row_has_is_named_as_the_cause(tmp_path):
    """Lists of any length: it takes a look at the rows."""
    source = write_parquet(tmp_path / "in.parquet", twin_table())
    with pytest.raises(TooManyRejectedError, match=r"another length than embedding_dim \(99\)"):
        untwin.deduplicate(source, tmp_path / "out", embedding_dim=99)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("1.5GiB", 3 << 29), ("512mb", 512 * 10**6), ("64 MiB", 64 << 20), (1.5e9, 1_500_000_000)],
)
def test_sizes_are_read_with_their_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "four", "4XB", "-1GB", "4GB free"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ParameterError, match="give a size such as 4GB"):
        parse_bytes(text)


@pytest.mark.parametrize("probes", [2, None])
def test_probes_need_an_eps(probes):
    with pytest.raises(ParameterError, match="without eps"):
        RunParameters(("in",), "out", probes=probes)
    assert RunParameters(("in",), "out", probes=probes, eps=0.05).probes == probes
    assert RunParameters(("in",), "out", probes=1).probes == 1


@pytest.mark.parametrize("options", [{"probes": 0}, {"probes": -1}, {"target_recall": 0}, {"target_recall": 1.0}])
def test_probes_and_their_target_are_in_their_range(options):
    (name,) = options
    with pytest.raises(ParameterError, match=f"^{name} is "):
        RunParameters(("in",), "out", eps=0.05, **options)


def test_the_target_decides_the_answer_only_where_probes_are_chosen():
    def decides(**options):
        answer = RunParameters(("in",), "out", eps=0.05, **options).answer()
        return answer["probes"], answer["target_recall"]

    assert decides() == decides(target_recall=0.9) == (1, None)
    assert decides(probes=np.int64(3)) == (3, None)
    assert decides(probes=None) == ("auto", 0.999)
    assert decides(probes=None, target_recall=0.99) == ("auto", 0.99)
