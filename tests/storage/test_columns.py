"""List columns to matrices, against a slow oracle that looks at Python objects; ids to one type."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from untwin.errors import SchemaError
from untwin.storage.columns import (
    Reason,
    common_id_type,
    decode_ids,
    decode_vectors,
    embedding_dim,
    id_type,
    list_lengths,
    matrix_of,
    vector_array,
)

FLOATS = (pa.float16(), pa.float32(), pa.float64())
NUMBERS = st.none() | st.sampled_from([0.0, 1.0, -2.5, float("inf"), 0.125])


def oracle(rows, dim):
    """Reasons, positions and values by looking at each row."""
    reasons, positions, values = [], [], []
    for at, row in enumerate(rows):
        if row is None:
            reasons.append(Reason.NULL_EMBEDDING)
        elif len(row) == 0:
            reasons.append(Reason.EMPTY_EMBEDDING)
        elif len(row) != dim:
            reasons.append(Reason.WRONG_LENGTH)
        elif None in row:
            reasons.append(Reason.NULL_VALUE)
        else:
            reasons.append(Reason.OK)
            positions.append(at)
            values.append(row)
    return reasons, positions, values


def check(column, dim):
    rows = column.to_pylist()
    reasons, positions, values = oracle(rows, dim)
    raw = decode_vectors(column, dim)
    assert raw.reasons.tolist() == reasons
    got = list(range(len(rows))) if raw.positions is None else raw.positions.tolist()
    assert got == positions
    assert raw.values.shape == (len(positions), dim)
    assert raw.values.tolist() == values
    assert list_lengths(column).tolist() == [len(row) if row is not None else 0 for row in rows]


@given(
    rows=st.lists(st.none() | st.lists(NUMBERS, max_size=4), max_size=12),
    number=st.sampled_from(FLOATS),
    large=st.booleans(),
    dim=st.integers(1, 4),
    cut=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
@settings(max_examples=300)
def test_lists_of_any_length(rows, number, large, dim, cut):
    kind = pa.large_list(number) if large else pa.list_(number)
    column = pa.array(rows, kind)
    check(column, dim)
    check(column.slice(min(cut), max(cut) - min(cut)), dim)


@given(
    rows=st.lists(st.none() | st.lists(NUMBERS, min_size=3, max_size=3), max_size=12),
    number=st.sampled_from(FLOATS),
    dim=st.sampled_from([2, 3]),
    cut=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
@settings(max_examples=300)
def test_lists_of_fixed_size(rows, number, dim, cut):
    column = pa.array(rows, pa.list_(number, 3))
    check(column, dim)
    check(column.slice(min(cut), max(cut) - min(cut)), dim)


@given(
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=10),
    nulls=st.integers(0, 2**10 - 1),
    holes=st.integers(0, 2**40 - 1),
    base=st.integers(0, 4),
    dim=st.integers(1, 3),
)
@settings(max_examples=200)
def test_null_lists_may_hide_numbers_and_values_may_begin_late(lengths, nulls, holes, base, dim):
    """A null list can span values, and the first offset need not be 0."""
    offsets = base + np.concatenate(([0], np.cumsum(lengths)))
    size = int(offsets[-1]) + 2
    values = pa.array([None if holes >> at & 1 else float(at) for at in range(size)], pa.float32())
    mask = pa.array([bool(nulls >> at & 1) for at in range(len(lengths))])
    column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=mask)
    check(column, dim)
    check(column.slice(1), dim)


def test_extension_types_are_their_storage():
    kind = pa.fixed_shape_tensor(pa.float32(), [2])
    storage = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2))
    column = pa.ExtensionArray.from_storage(kind, storage)
    assert embedding_dim(kind) == 2
    raw = decode_vectors(column, 2)
    assert raw.values.tolist() == [[1, 2], [3, 4]]
    assert raw.reasons.tolist() == [Reason.OK, Reason.NULL_EMBEDDING, Reason.OK]
    assert list_lengths(column).tolist() == [2, 0, 2]


def test_embedding_types():
    assert embedding_dim(pa.list_(pa.float64())) is None
    assert embedding_dim(pa.large_list(pa.float16())) is None
    assert embedding_dim(pa.list_(pa.float32(), 7)) == 7
    for kind in (pa.float32(), pa.list_(pa.int8()), pa.string(), pa.list_(pa.list_(pa.float32())), pa.null()):
        with pytest.raises(SchemaError, match="list of float16, float32 or float64"):
            embedding_dim(kind)


def test_matrices_survive_arrow():
    X = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    column = vector_array(X)
    np.testing.assert_array_equal(matrix_of(column), X)
    np.testing.assert_array_equal(matrix_of(column.slice(2, 4)), X[2:6])
    chunked = pa.chunked_array([column.slice(1, 3), column.slice(5)])
    np.testing.assert_array_equal(matrix_of(chunked), X[[1, 2, 3, 5, 6, 7, 8]])
    assert matrix_of(column).base is not None  # a view, no copy


def test_id_types_and_what_two_files_have_in_common():
    assert id_type(pa.dictionary(pa.int8(), pa.large_string())) == pa.large_string()
    assert id_type(pa.string_view()) == pa.string()
    assert id_type(pa.uint8()) == pa.uint8()
    for kind in (pa.float64(), pa.bool_(), pa.list_(pa.int8()), pa.timestamp("s"), pa.null()):
        assert id_type(kind) is None
    assert common_id_type(pa.string(), pa.large_string()) == pa.large_string()
    assert common_id_type(pa.int8(), pa.uint32()) == pa.int64()
    assert common_id_type(pa.uint64(), pa.uint64()) == pa.uint64()
    for first, second in (
        (pa.uint64(), pa.int64()),
        (pa.string(), pa.int64()),
        (pa.string(), pa.binary()),
        (pa.binary(4), pa.binary(8)),
    ):
        assert common_id_type(first, second) is None
        assert common_id_type(second, first) is None


def test_ids_are_decoded_and_widened_without_a_change_of_value():
    column = pa.array(["b", None, "a", "b"]).dictionary_encode()
    assert decode_ids(column, pa.large_string()).to_pylist() == ["b", None, "a", "b"]
    assert decode_ids(column.slice(2), pa.string()).to_pylist() == ["a", "b"]
    assert decode_ids(pa.array([1, None, 255], pa.uint8()), pa.int64()).to_pylist() == [1, None, 255]
    assert decode_ids(pa.array([1, None, 255], pa.uint8()), pa.int64()).type == pa.int64()
