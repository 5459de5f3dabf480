"""Bits of rows against a plain array of truth values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from untwin.storage import bitmap
from untwin.storage.bitmap import bits_of, byte_range, counts_before, empty_bitmap, get_bits, set_bits


@st.composite
def rows_of(draw):
    n_rows = draw(st.integers(1, 200))
    rows = draw(st.lists(st.integers(0, n_rows - 1), max_size=60))
    return n_rows, rows


@given(rows_of(), rows_of(), st.data())
def test_bits_are_those_that_were_set_in_any_order_and_often(first, second, data):
    n_rows = max(first[0], second[0])
    bits = empty_bitmap(n_rows)
    truth = np.zeros(n_rows, bool)
    for _, rows in (first, second):
        set_bits(bits, np.array(rows, np.int64))
        truth[rows] = True
    low = data.draw(st.integers(0, n_rows))
    high = data.draw(st.integers(low, n_rows))
    start, length = byte_range(low, high - low)
    part = np.frombuffer(bits.tobytes()[start : start + length], np.uint8)
    assert get_bits(part, low, high - low).tolist() == truth[low:high].tolist()


@pytest.mark.parametrize("chunk", [1, 3, 1 << 22])
def test_counts_before_are_the_running_sum(monkeypatch, chunk):
    monkeypatch.setattr(bitmap, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    for n_rows in (1, 7, 8, 9, 63, 100):
        for share in (0, 0.3, 1):
            truth = rng.random(n_rows) < share
            bits = empty_bitmap(n_rows)
            set_bits(bits, np.flatnonzero(truth))
            positions = np.sort(rng.integers(0, n_rows + 1, size=40))
            positions[-1] = n_rows
            want = [int(truth[:position].sum()) for position in positions]
            assert counts_before(bits, positions).tolist() == want


def test_nothing_set_is_nothing():
    bits = empty_bitmap(0)
    set_bits(bits, np.empty(0, np.int64))
    assert len(bits) == 0
    assert counts_before(bits, np.array([0])).tolist() == [0]


def test_bits_of_rows_in_any_order():
    bitmap = empty_bitmap(20)
    set_bits(bitmap, np.array([0, 7, 8, 19]))
    rows = np.array([19, 1, 8, 8, 18, 0, 7])
    assert bits_of(bitmap, rows).tolist() == [True, False, True, True, False, True, True]
