"""What `deduplicate` and `apply` give back: counts, and the tables behind them."""

import dataclasses

import pyarrow as pa
import pytest

import untwin
from inputs import TWINS, table_of, twin_ids, twin_table, twin_vectors, write_parquet
from untwin.errors import ParameterError


@pytest.fixture
def source(tmp_path):
    return write_parquet(tmp_path / "in.parquet", twin_table())


def run(source, out, **options):
    return untwin.deduplicate(source, str(out), **{"eps": 0.05, "rank_by": "id:asc", **options})


def test_counts_and_paths(source, tmp_path):
    result = run(source, tmp_path / "out")
    assert isinstance(result, untwin.RunResult)
    assert (result.n_rows, result.n_kept, result.n_duplicates, result.n_rejected) == (12, 6, 6, 0)
    assert (result.eps, result.duplicate_share) == (0.05, 0.5)
    assert result.output_path == str(tmp_path / "out")
    assert result.kept_path == str(tmp_path / "out" / "kept")
    assert result.duplicates_path == str(tmp_path / "out" / "duplicates")
    assert result.seconds > 0
    assert result.peak_memory > 10**7
    names = [stage.name for stage in result.timings]
    assert len(names) == len(set(names)) > 4
    assert {stage.rows for stage in result.timings if stage.name in ("assign", "pairwise", "remove")} == {12}
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.n_rows = 13


def test_duplicates_and_kept_ids(source, tmp_path):
    result = run(source, tmp_path / "out")
    duplicates = result.duplicates()
    assert duplicates.column_names == ["id", "kept_id", "cosine_sim_score", "centroid"]
    assert dict(zip(duplicates["id"].to_pylist(), duplicates["kept_id"].to_pylist(), strict=True)) == TWINS
    assert duplicates["id"].to_pylist() == sorted(TWINS)
    kept = result.kept_ids()
    assert kept.column_names == ["id"]
    assert kept["id"].to_pylist() == sorted(TWINS.values())


def test_kept_ids_under_the_original_rule_are_those_of_kept(tmp_path):
    # on an arc: b is removed because of a, and c because of b, so nothing that is kept resembles c
    table = table_of(["a", "b", "c"], [[1, 0], [0.966, 0.259], [0.866, 0.5]])
    result = run(write_parquet(tmp_path / "in.parquet", table), tmp_path / "out", compare_to="ranked")
    assert result.kept_ids()["id"].to_pylist() == ["a"]
    assert result.duplicates()["id"].to_pylist() == ["b", "c"]
    assert result.duplicates()["kept_id"].to_pylist() == ["a", None]
    assert result.duplicates_of("a")["id"].to_pylist() == ["b"]


def test_duplicates_of_a_kept_row_come_with_the_most_similar_first(tmp_path):
    ids = ["a", "b", "c", "d", "e", "z"]
    vectors = [[1, 0, 0], [1, 0.2, 0], [1, 0.1, 0], [1, 0, 0.1], [1, 0, 0], [0, 1, 0]]
    result = run(write_parquet(tmp_path / "in.parquet", table_of(ids, vectors)), tmp_path / "out")
    found = result.duplicates_of("a")
    assert found["id"].to_pylist() == ["e", "c", "d", "b"]
    assert found["cosine_sim_score"].to_pylist() == pytest.approx([1, 0.995037, 0.995037, 0.980581], abs=1e-6)
    assert set(found["kept_id"].to_pylist()) == {"a"}
    for other in ("b", "z", "nobody"):
        assert result.duplicates_of(other).num_rows == 0


@pytest.mark.parametrize(
    ("id_type", "ids"),
    [
        (pa.int32(), list(range(12))),
        (pa.uint64(), [2**64 - 20 + i for i in range(12)]),
        (pa.binary(2), [b"i" + bytes([i]) for i in range(12)]),
        (pa.large_string(), twin_ids()),
    ],
    ids=str,
)
def test_duplicates_of_finds_ids_of_every_type(tmp_path, id_type, ids):
    table = table_of(ids, twin_vectors(), id_type=id_type)
    result = run(write_parquet(tmp_path / "in.parquet", table), tmp_path / "out")
    assert result.duplicates_of(ids[2])["id"].to_pylist() == [ids[8]]
    assert result.duplicates_of(ids[8]).num_rows == 0
    assert result.kept_ids()["id"].type == id_type


def test_no_duplicates_is_an_empty_table_of_the_right_columns(tmp_path):
    source = write_parquet(tmp_path / "in.parquet", twin_table().slice(0, 6))
    result = run(source, tmp_path / "out")
    assert (result.n_kept, result.n_duplicates) == (6, 0)
    assert result.duplicates().num_rows == 0
    assert result.duplicates().schema.field("id").type == pa.string()
    assert result.duplicates().column_names == ["id", "kept_id", "cosine_sim_score", "centroid"]
    assert result.duplicates_of("row00").num_rows == 0
    assert result.kept_ids().num_rows == 6


def test_eps_table_of_a_run_without_eps(source, tmp_path):
    result = run(source, tmp_path / "out", eps=None)
    table = result.eps_table()
    assert table.schema.equals(
        pa.schema([("eps", pa.float64()), ("duplicates", pa.int64()), ("share", pa.float64()), ("exact", pa.bool_())])
    )
    # 1 - cosine of a pair is 5e-5: within every eps of the grid; all others are orthogonal or nearly so
    assert table["duplicates"].to_pylist() == [6] * 14
    assert table["share"].to_pylist() == [0.5] * 14
    first, *others = result.eps_rows
    assert len(first.examples) == 3
    for one, other, score in first.examples:
        assert TWINS[one] == other
        assert score == pytest.approx(0.99995, abs=1e-6)
    assert all(row.examples == () for row in others)
    for ask in (result.duplicates, result.kept_ids, lambda: result.duplicates_of("row00")):
        with pytest.raises(ParameterError, match=r"untwin\.apply"):
            ask()


def test_eps_table_has_a_row_for_an_eps_that_is_not_in_the_grid(source, tmp_path):
    result = run(source, tmp_path / "out", eps=0.00001)
    (row,) = (row for row in result.eps_table().to_pylist() if row["eps"] == 0.00001)
    assert row == {"eps": 0.00001, "duplicates": 0, "share": 0, "exact": True}
    eps = result.eps_table()["eps"].to_pylist()
    assert len(eps) == 15
    assert eps == sorted(eps)


def test_a_finished_run_gives_the_same_result_again(source, tmp_path):
    first = run(source, tmp_path / "out")
    again = run(source, tmp_path / "out")
    assert again == first
    assert again.duplicates().equals(first.duplicates())


def test_apply_gives_a_result_of_its_own(source, tmp_path):
    run(source, tmp_path / "out", eps=None)
    result = untwin.apply(str(tmp_path / "out"), eps=0.1)
    assert result.output_path == str(tmp_path / "out" / "eps=0.1")
    assert (result.eps, result.n_rows, result.n_kept, result.n_duplicates) == (0.1, 12, 6, 6)
    assert result.duplicates()["id"].to_pylist() == sorted(TWINS)
    assert result.kept_ids().num_rows == 6
    assert result.duplicates_of("row01")["id"].to_pylist() == ["row07"]


def test_without_the_intermediate_files_the_kept_ids_say_where_to_look(source, tmp_path):
    result = run(source, tmp_path / "out", drop_intermediate=True)
    assert result.duplicates().num_rows == 6
    with pytest.raises(ParameterError, match="kept/"):
        result.kept_ids()


def test_an_id_of_another_type_is_a_mistake_that_is_told(source, tmp_path):
    result = run(source, tmp_path / "out")
    with pytest.raises(ParameterError, match="kept_id is 7, but the ids of this run are of type string"):
        result.duplicates_of(7)
