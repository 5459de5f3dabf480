"""Hashes: reproducible, spread evenly, sensitive to every bit, independent of batching."""

import uuid

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from untwin.core.hashing import hash_bytes, hash_integers, hash_rows, mix_seed, uniform


def hash_strings(strings, seed=0, lead=b""):
    data = np.frombuffer(lead + b"".join(strings), np.uint8)
    return hash_bytes(data, np.cumsum([len(lead)] + [len(s) for s in strings]), seed)


def bits_that_differ(a, b):
    return np.unpackbits((a ^ b).view(np.uint8).reshape(-1, 8), axis=1)


@given(st.lists(st.binary(max_size=40), max_size=30), st.integers(0, 2**64 - 1), st.binary(max_size=11))
def test_the_hash_of_a_string_depends_on_the_string_only(strings, seed, lead):
    got = hash_strings(strings, seed, lead)
    assert got.tolist() == [int(hash_strings([s], seed)[0]) for s in strings]
    assert len(set(got.tolist())) == len(set(strings))


def test_one_long_string_among_short_ones():
    rng = np.random.default_rng(0)
    strings = [rng.bytes(n) for n in (3, 0, 20_000, 8, 16, 7, 9)]
    got = hash_strings(strings)
    assert got.tolist() == [int(hash_strings([s])[0]) for s in strings]
    changed = bytearray(strings[2])
    changed[19_999] ^= 1
    assert hash_strings([bytes(changed)])[0] != got[2]


def test_strings_of_zeros_of_each_length_differ():
    assert len(set(hash_strings([b"\0" * n for n in range(200)]).tolist())) == 200


def test_hashes_are_the_same_for_ever():
    """A change of these numbers changes every sample and every random order: do not."""
    assert hash_strings([b"", b"a", b"clip-0001"], 42).tolist() == [
        6332618229526065668,
        7616216137074008831,
        14305997119610692195,
    ]
    assert hash_integers(np.array([0, 1, -1]), 42).tolist() == [
        6332618229526065668,
        17532488217563185893,
        14714397866638982195,
    ]
    assert hash_rows(np.array([[1, 2, 3], [0, 0, 1]], np.float32), 42).tolist() == [
        7231547322475994634,
        45811964174343789,
    ]
    assert mix_seed(42, 1, 2) == 2917496306593407885


def test_every_bit_of_a_string_turns_half_of_the_hash():
    rng = np.random.default_rng(1)
    base = rng.integers(0, 256, (2000, 19), dtype=np.uint8)
    offsets = np.arange(0, base.size + 1, 19)
    want = hash_bytes(base.reshape(-1), offsets, 5)
    for bit in range(19 * 8):
        other = base.copy()
        other[:, bit // 8] ^= 1 << (bit % 8)
        turned = bits_that_differ(want, hash_bytes(other.reshape(-1), offsets, 5)).mean(axis=0)
        assert 0.4 < turned.min() <= turned.max() < 0.6


def test_every_bit_of_an_integer_turns_half_of_the_hash():
    values = np.arange(4000)
    for bit in range(63):
        a, b = hash_integers(values, 3), hash_integers(values ^ (1 << bit), 3)
        turned = bits_that_differ(a, b).mean(axis=0)
        assert 0.4 < turned.min() <= turned.max() < 0.6


def test_signed_and_unsigned_integers_of_equal_bits_hash_alike():
    values = np.array([-1, 5, -(2**63)])
    assert hash_integers(values, 1).tolist() == hash_integers(values.view(np.uint64), 1).tolist()


def test_uuids_are_spread_evenly():
    strings = [str(uuid.UUID(int=k)).encode() for k in range(50_000)]
    u = uniform(hash_strings(strings, 9))
    assert 0 <= u.min() <= u.max() < 1
    counts = np.bincount((u * 50).astype(int), minlength=50)
    assert ((counts - 1000) ** 2 / 1000).sum() < 100  # chi-squared, 49 degrees of freedom: p = 2e-5
    assert len(set(u.tolist())) == 50_000


def test_another_seed_gives_another_order():
    strings = [str(k).encode() for k in range(1000)]
    a, b = uniform(hash_strings(strings, 1)), uniform(hash_strings(strings, 2))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.15
    assert len({mix_seed(1), mix_seed(2), mix_seed(1, 0), mix_seed(1, 1), mix_seed(1, 0, 0)}) == 5


@pytest.mark.parametrize("dim", [1, 2, 3, 64, 385])
def test_the_hash_of_a_row_depends_on_the_row_only(dim):
    X = np.random.default_rng(dim).standard_normal((700, dim)).astype(np.float32)
    got = hash_rows(X, 7)
    assert got.tolist() == [int(hash_rows(X[k : k + 1], 7)[0]) for k in range(700)]
    assert len(set(got.tolist())) == 700
    assert not set(got.tolist()) & set(hash_rows(X, 8).tolist())


def test_minus_zero_hashes_like_zero():
    X = np.array([[0.0, 1.0, -0.0], [-0.0, 1.0, 0.0]], np.float32)
    a, b = hash_rows(X, 0)
    assert a == b


def test_rows_that_differ_in_signs_or_in_order_differ():
    n = 4096
    signs = ((np.arange(n)[:, None] >> np.arange(12)) & 1) * 2 - 1
    rows = np.concatenate([np.repeat(signs, 2, axis=1), np.roll(np.eye(24), 1, axis=1) * 0.5]).astype(np.float32)
    assert len(set(hash_rows(rows, 0).tolist())) == n + 24


def test_nothing_hashes_to_nothing():
    assert hash_bytes(np.empty(0, np.uint8), np.zeros(1, np.int64), 0).shape == (0,)
    assert hash_rows(np.empty((0, 3), np.float32), 0).shape == (0,)
    assert hash_integers(np.empty(0, np.int64), 0).shape == (0,)
