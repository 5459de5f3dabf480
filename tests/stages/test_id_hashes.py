"""Hashes of ids: the same for every width of the same kind of id, wherever the rows lie."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from untwin.stages.ids import hash_ids


@given(ids=st.lists(st.text(max_size=20), max_size=20), cut=st.integers(0, 20), seed=st.integers(0, 5))
def test_text_of_every_width(ids, cut, seed):
    want = hash_ids(pa.array(ids, pa.string()), seed)
    assert hash_ids(pa.array(ids, pa.large_string()), seed).tolist() == want.tolist()
    assert hash_ids(pa.array([own.encode() for own in ids], pa.binary()), seed).tolist() == want.tolist()
    assert hash_ids(pa.array(ids, pa.string()).slice(cut), seed).tolist() == want[cut:].tolist()
    alone = [int(hash_ids(pa.array([own], pa.string()), seed)[0]) for own in ids]
    assert alone == want.tolist()


@given(ids=st.lists(st.integers(0, 127), max_size=20), cut=st.integers(0, 20))
def test_numbers_of_every_width(ids, cut):
    want = hash_ids(pa.array(ids, pa.int64()), 1)
    for kind in (pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.uint64()):
        column = pa.array(ids, kind)
        assert hash_ids(column, 1).tolist() == want.tolist()
        assert hash_ids(column.slice(cut), 1).tolist() == want[cut:].tolist()


@given(ids=st.lists(st.binary(min_size=5, max_size=5), max_size=20), cut=st.integers(0, 20))
def test_bytes_of_fixed_size(ids, cut):
    want = hash_ids(pa.array(ids, pa.large_binary()), 3)
    column = pa.array(ids, pa.binary(5))
    assert hash_ids(column, 3).tolist() == want.tolist()
    assert hash_ids(column.slice(cut), 3).tolist() == want[cut:].tolist()


@pytest.mark.parametrize(
    "column",
    [
        pa.array([f"clip-{at}" for at in range(20_000)]),
        pa.array(range(20_000), pa.uint32()),
        pa.array([at.to_bytes(16, "big") for at in range(20_000)], pa.binary(16)),
    ],
    ids=lambda column: str(column.type),
)
def test_different_ids_and_seeds_have_different_hashes(column):
    first, second = hash_ids(column, 1), hash_ids(column, 2)
    assert len(np.unique(np.concatenate((first, second)))) == 40_000


def test_nulls_do_not_disturb_their_neighbours():
    for kind, ids in ((pa.string(), ["a", None, "b"]), (pa.int32(), [1, None, 2]), (pa.binary(1), [b"a", None, b"b"])):
        mixed = hash_ids(pa.array(ids, kind), 9)
        alone = hash_ids(pa.array([ids[0], ids[2]], kind), 9)
        assert mixed[[0, 2]].tolist() == alone.tolist()
