"""Parameters of the Python call: a value of the wrong type is refused by name, before anything is read or written."""

from __future__ import annotations

import numpy as np
import pytest

import untwin
from untwin.errors import ParameterError
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
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(ParameterError, match=f"^{name} is "):
        untwin.deduplicate(tmp_path / "nothing-here", tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


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
