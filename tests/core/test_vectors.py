"""Normalisation, the fixed-order product, and the error bound of matrix products."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from untwin.core.vectors import (
    Invalid,
    blocks,
    float32_below,
    normalize,
    pair_dot,
    pair_squared_distance,
    product_error,
    rowwise_dot,
)


@pytest.mark.parametrize("dim", [1, 2, 7, 129, 384, 1000, 3000, 8192, 8193, 20_000])
def test_rowwise_dot_has_the_same_bits_however_rows_are_batched(dim):
    rng = np.random.default_rng(dim)
    a, b = rng.standard_normal((2, 37, dim)).astype(np.float32)
    want = rowwise_dot(a, b)
    for size in (1, 2, 5, 36):
        parts = [rowwise_dot(np.ascontiguousarray(a[rows]), b[rows]) for rows in blocks(37, size)]
        np.testing.assert_array_equal(np.concatenate(parts), want)
    np.testing.assert_array_equal(rowwise_dot(b, a), want)
    np.testing.assert_array_equal(rowwise_dot(a.astype(np.float64), b), want)
    np.testing.assert_array_equal(rowwise_dot(np.tile(a, (9, 1)), np.tile(b, (9, 1))), np.tile(want, 9))
    order = rng.permutation(37)
    np.testing.assert_array_equal(pair_dot(a, order, b, order), want[order])


def test_rowwise_dot_is_right_to_the_last_digits():
    a, b = np.random.default_rng(0).standard_normal((2, 3, 500)).astype(np.float32)
    for row, got in enumerate(rowwise_dot(a, b)):
        exact = sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a[row], b[row], strict=True))
        assert abs(Fraction(float(got)) - exact) < Fraction(1, 10**12)


def test_squared_distance_of_equal_rows_is_zero_and_else_right():
    X = np.random.default_rng(0).standard_normal((300, 50)).astype(np.float32)
    i, j = np.arange(300), np.arange(300)[::-1]
    assert (pair_squared_distance(X, i, X, i) == 0).all()
    want = ((X[i].astype(np.float64) - X[j]) ** 2).sum(axis=1)
    np.testing.assert_allclose(pair_squared_distance(X, i, X, j), want, rtol=1e-13)


@pytest.mark.parametrize("dim", [1, 2, 3, 17, 384, 1024])
def test_matrix_products_stay_within_the_error_bound(dim):
    rng = np.random.default_rng(dim)
    X, _ = normalize(np.concatenate([rng.standard_normal((150, dim)), rng.random((150, dim))]))
    i, j = np.indices((300, 300)).reshape(2, -1)
    square = rowwise_dot(X, X)
    exact = (pair_dot(X, i, X, j) / np.sqrt(square[i] * square[j])).reshape(300, 300)
    assert np.abs(X @ X.T - exact).max() <= product_error(dim)


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-160, 1e-30, 1.0, 1e30, 1e160, 1e300])
def test_rows_of_any_norm_become_unit_rows(scale):
    X = np.random.default_rng(1).uniform(0.5, 1, (20, 12))
    unit, reason = normalize(X * scale)
    assert (reason == Invalid.OK).all()
    np.testing.assert_allclose(rowwise_dot(unit, unit), 1, atol=3e-7)
    np.testing.assert_allclose(unit, normalize(X)[0], atol=1e-3 if scale < 1e-300 else 1e-7)


def test_float32_denormals_become_unit_rows():
    unit, reason = normalize(np.full((1, 4), 1e-45, np.float32))
    assert unit.tolist() == [[0.5, 0.5, 0.5, 0.5]]
    assert reason.tolist() == [Invalid.OK]


def test_rows_that_cannot_be_normalised_are_zero_and_say_why():
    X = np.array(
        [[1, 2], [np.nan, 1], [np.inf, 1], [-np.inf, np.nan], [0, -0.0], [3, 4]], np.float32
    )  # NaN before infinite
    unit, reason = normalize(X)
    assert reason.tolist() == [
        Invalid.OK,
        Invalid.NAN,
        Invalid.INFINITE,
        Invalid.NAN,
        Invalid.ZERO,
        Invalid.OK,
    ]
    assert (unit[1:5] == 0).all()
    assert unit[5].tolist() == [np.float32(0.6), np.float32(0.8)]
    assert Invalid(1).text == "contains NaN"
    assert Invalid.ZERO.text == "zero norm"


@given(
    X=arrays(
        np.float16,
        st.tuples(st.integers(0, 9), st.integers(1, 5)),
        elements=st.floats(width=16, allow_nan=True, allow_infinity=True),
    )
)
def test_normalize_depends_neither_on_the_type_nor_on_the_neighbours(X):
    unit, reason = normalize(X)
    for dtype in (np.float32, np.float64):
        again, why = normalize(X.astype(dtype))
        assert again.tobytes() == unit.tobytes()
        assert why.tolist() == reason.tolist()
    for row in range(len(X)):
        assert normalize(X[row : row + 1])[0].tobytes() == unit[row].tobytes()


def test_normalize_writes_into_a_slice_and_reads_any_layout():
    X = np.random.default_rng(2).standard_normal((500, 300))
    out = np.zeros((600, 300), np.float32)
    unit, _ = normalize(np.asfortranarray(X), out=out[50:550])
    assert np.shares_memory(unit, out)
    assert out[50:550].tobytes() == normalize(X)[0].tobytes()
    assert not out[:50].any()
    assert not out[550:].any()


def test_float32_below_is_below():
    values = np.random.default_rng(3).uniform(-1, 1, 1000)
    below = float32_below(values)
    assert below.dtype == np.float32
    assert (below <= values).all()
    np.testing.assert_allclose(below, values, atol=2e-7)
