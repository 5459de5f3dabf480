"""Parameters of the Python call: a value of the wrong type is refused by name, before anything is read or written."""

from __future__ import annotations

import pytest

import untwin
from untwin.errors import ParameterError
from untwin.jobs.parameters import parse_bytes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eps", "0.05"),
        ("eps", True),
        ("n_clusters", 2.0),
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
