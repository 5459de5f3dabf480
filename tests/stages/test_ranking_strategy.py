"""`RankingStrategy`: the order of rows inside a cluster."""

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracle import ranked_rows
from untwin.errors import ParameterError, SchemaError
from untwin.stages.ranking import RankingStrategy


def ordered(table, strategy):
    return [table["id"][at].as_py() for at in strategy.order(table, "id").tolist()]


def test_ties_go_by_id_in_the_direction_of_the_last_column():
    table = pa.table({"id": ["b", "d", "a", "c"], "size": [5, 5, 5, 9], "age": [1, 1, 1, 1]})
    assert ordered(table, RankingStrategy.metadata_based(["size"], ascending=False)) == ["c", "d", "b", "a"]
    assert ordered(table, RankingStrategy.metadata_based(["size"], ascending=True)) == ["a", "b", "d", "c"]
    assert ordered(table, RankingStrategy.metadata_based(["size", "age"], [False, True])) == ["c", "a", "b", "d"]
    assert ordered(table, RankingStrategy.metadata_based(["age", "size"], [True, False])) == ["c", "d", "b", "a"]


@pytest.mark.parametrize("ascending", [True, False])
def test_nulls_are_last_in_either_direction_and_nan_is_just_before_them(ascending):
    table = pa.table({"id": list("abcde"), "x": pa.array([2.0, None, float("nan"), 1.0, None])})
    got = ordered(table, RankingStrategy.metadata_based(["x"], ascending))
    assert got[:3] == (["d", "a", "c"] if ascending else ["a", "d", "c"])
    assert got[3:] == (["b", "e"] if ascending else ["e", "b"])


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "x": st.none() | st.integers(-2, 2),
                "y": st.none() | st.sampled_from(["", "ä", "b", "B"]),
                "z": st.none() | st.booleans(),
            }
        ),
        min_size=1,
        max_size=20,
    ),
    directions=st.lists(st.booleans(), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_several_columns_equal_a_plain_sort(rows, directions, seed):
    names = np.random.default_rng(seed).permutation(len(rows))
    rows = [{**row, "id": f"id{name:02d}"} for row, name in zip(rows, names, strict=True)]
    table = pa.table(
        {
            "id": [row["id"] for row in rows],
            "x": pa.array([row["x"] for row in rows], pa.int8()),
            "y": pa.array([row["y"] for row in rows], pa.dictionary(pa.int8(), pa.string())),
            "z": pa.array([row["z"] for row in rows], pa.bool_()),
        }
    )
    strategy = RankingStrategy.metadata_based(["x", "y", "z"], directions)
    want = ranked_rows(rows, ["x", "y", "z"], directions)
    assert ordered(table, strategy) == [rows[at]["id"] for at in want]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 3, 2], pa.uint64()),
        pa.array([1, 3, 2], pa.float16()),
        pa.array([1.0, 3.0, 2.0], pa.float32()),
        pa.array([decimal.Decimal("1.5"), decimal.Decimal("3.5"), decimal.Decimal("2.5")]),
        pa.array([datetime.date(2020, 1, 1), datetime.date(2020, 1, 3), datetime.date(2020, 1, 2)]),
        pa.array([datetime.datetime(2020, 1, day) for day in (1, 3, 2)]),
        pa.array([datetime.timedelta(day) for day in (1, 3, 2)]),
        pa.array([datetime.time(hour) for hour in (1, 3, 2)]),
        pa.array(["a", "c", "b"], pa.large_string()),
        pa.array(["a", "c", "b"], pa.string_view()),
        pa.array([b"a", b"c", b"b"], pa.binary(1)),
        pa.array([b"a", b"c", b"b"], pa.binary_view()),
    ],
    ids=lambda values: str(values.type),
)
def test_every_ordered_type_can_be_ranked_by(values):
    table = pa.table({"id": ["p", "q", "r"], "x": values})
    assert ordered(table, RankingStrategy.metadata_based(["x"], ascending=False)) == ["q", "r", "p"]
    assert ordered(table.slice(1), RankingStrategy.metadata_based(["x"])) == ["r", "q"]


def test_a_column_of_nulls_only_leaves_the_order_to_the_ids():
    table = pa.table({"id": ["q", "p", "r"], "x": pa.nulls(3)})
    assert ordered(table, RankingStrategy.metadata_based(["x"])) == ["p", "q", "r"]


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([3, -1, 2], pa.int64()),
        pa.array([b"cc", b"aa", b"bb"], pa.binary(2)),
        pa.array(["c", "a", "b"], pa.dictionary(pa.int8(), pa.string())),
        pa.array(["c", "a", "b"], pa.string_view()),
    ],
    ids=lambda ids: str(ids.type),
)
def test_ties_by_ids_of_every_type(ids):
    table = pa.table({"id": ids, "x": [0, 0, 0]})
    assert RankingStrategy.metadata_based(["x"]).order(table, "id").tolist() == [1, 2, 0]
    assert RankingStrategy.metadata_based(["x"], ascending=False).order(table, "id").tolist() == [0, 2, 1]


def test_random_does_not_look_at_the_order_of_the_rows_or_the_width_of_the_ids():
    ids = [f"clip-{number}" for number in range(200)]
    strategy = RankingStrategy.random(random_seed=5)
    want = ordered(pa.table({"id": ids}), strategy)
    assert want not in (ids, ids[::-1])
    assert sorted(want) == sorted(ids)
    assert ordered(pa.table({"id": pa.array(ids[::-1], pa.large_string())}), strategy) == want
    assert ordered(pa.table({"id": ids}), RankingStrategy.random(random_seed=6)) != want


def test_random_is_close_to_uniform():
    """The first of 4 rows is each of them about equally often, over 2,000 seeds."""
    table = pa.table({"id": list("abcd")})
    first = [RankingStrategy.random(seed).order(table, "id")[0] for seed in range(2000)]
    counts = np.bincount(first, minlength=4)
    assert counts.min() > 420
    assert counts.max() < 580


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metadata_cols": []}, "metadata_cols is empty"),
        ({"metadata_cols": ["x"], "strategy": "best"}, "strategy is 'best'"),
        ({"metadata_cols": ["x"], "strategy": "random"}, "metadata_cols has no meaning"),
        ({"metadata_cols": ["x", "y"], "ascending": [True]}, "1 values for 2 metadata_cols"),
        ({"metadata_cols": "duration"}, "metadata_cols is 'duration'; give a list"),
        ({"metadata_cols": None}, "metadata_cols is empty"),
        ({"metadata_cols": [1]}, "metadata_cols is 1; give a name"),
        ({"metadata_cols": ["x"], "ascending": [1]}, r"ascending is \[1\]; give True or False"),
        ({"metadata_cols": ["x"], "ascending": None}, "ascending is None"),
        ({"strategy": "random", "random_seed": "7"}, "random_seed is '7'"),
    ],
)
def test_strategies_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ParameterError, match=message):
        RankingStrategy(**arguments)


def test_a_missing_or_unordered_column_is_named():
    table = pa.table({"id": ["a"], "x": [[1.0]], "s": [{"k": 1}]})
    with pytest.raises(SchemaError, match=r"cannot rank by 'y'.*metadata_fields.*they have 'id', 'x', 's'"):
        RankingStrategy.metadata_based(["y"]).order(table, "id")
    for name in ("x", "s"):
        with pytest.raises(SchemaError, match=f"cannot rank by '{name}': it has type"):
            RankingStrategy.metadata_based([name]).order(table, "id")
