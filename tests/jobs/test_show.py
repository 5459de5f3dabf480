"""`untwin show`: what it says of a row is what the files of the run say, whatever the run and the type of its ids."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import untwin
from inputs import (
    cli,
    parquet_files,
    read_folder,
    snapshot,
    table_of,
    twin_ids,
    twin_table,
    twin_vectors,
    write_parquet,
)
from untwin.core import is_duplicate
from untwin.errors import ParameterError

RUNS = {
    "kept": {"eps": 0.05},
    "ranked": {"eps": 0.1, "compare_to": "ranked"},
    "no eps": {},
    "probes": {"eps": 0.3, "probes": 8, "n_clusters": 60},
    "by column": {"eps": 0.05, "rank_by": "size_bytes:desc,source:asc"},
    "at random": {"eps": 0.05, "which_to_keep": "random"},
    "dropped": {"eps": 0.05, "drop_intermediate": True},
}


@pytest.fixture(scope="module")
def rows(debian_sample):
    """600 real rows, by id."""
    table = pq.read_table(debian_sample.path)
    return table.take(pa.array(np.random.default_rng(0).permutation(table.num_rows)[:600]))


@pytest.fixture(scope="module")
def outputs(rows, tmp_path_factory):
    """A folder for each of RUNS, and an answer of `apply`; made when first asked for."""
    folder = tmp_path_factory.mktemp("show")
    source = write_parquet(folder / "in" / "rows.parquet", rows)

    def output(name):
        path = folder / name
        if name == "answer":
            if not path.exists():
                untwin.apply(output("no eps"), eps=0.07, to=path, kept="none")
        elif not path.exists():
            untwin.deduplicate(source, path, **{"n_clusters": 8, **RUNS[name]})
        return path

    return output


def sampled(output):
    """Ids of both kinds: removed rows, and others."""
    removed = read_folder(output / "duplicates")
    removed = [] if removed is None else removed["id"].to_pylist()
    compared = read_folder(output / "pairwise")
    others = sorted(set((compared if compared is not None else read_folder(output / "kept"))["id"].to_pylist()))
    return [*removed[::13], *others[::59]]


def clusters_of(output):
    """Id -> (cluster, place from 1, rows of the cluster, its line in pairwise/)."""
    found = {}
    for path in parquet_files(output / "pairwise"):
        lines = pq.read_table(path).to_pylist()
        for place, line in enumerate(lines):
            found[line["id"]] = (int(path.stem.removeprefix("cluster_")), place + 1, len(lines), line)
    return found


@pytest.mark.parametrize("name", [*(name for name in RUNS if name != "dropped"), "answer"])
def test_a_row_is_shown_as_the_files_of_the_run_have_it(outputs, rows, name):
    output = outputs(name)
    parameters = json.loads((output / "run.json").read_text())["parameters"]
    eps, ranked = parameters["eps"], parameters["compare_to"] == "ranked"
    lines = clusters_of(output)
    table = read_folder(output / "duplicates")
    removed = {} if table is None else {line["id"]: line for line in table.to_pylist()}
    values = {row["id"]: row for row in rows.drop_columns("embedding").to_pylist()}
    before = snapshot(output)
    outcomes, distances = set(), {}
    for id_ in sampled(output):
        shown = untwin.show(output, id_)
        centroid, place, n_rows, line = lines[id_]
        assert (shown.id, shown.centroid, shown.rank, shown.cluster_rows) == (id_, centroid, place, n_rows)
        assert (shown.eps, shown.compare_to, shown.gone, shown.rejected) == (eps, parameters["compare_to"], (), ())
        outcomes.add(shown.outcome)
        assert shown.outcome == ("compared" if eps is None else "duplicate" if id_ in removed else "kept")
        if line["max_id"] == id_:
            assert (place, shown.nearest, shown.removed_from) == (1, None, None)
        else:
            assert (shown.nearest.id, shown.nearest.score) == (line["max_id"], line["cosine_sim_score"])
            score = np.array([shown.nearest.score], np.float32)
            if score[0] > 0:
                assert is_duplicate(score, shown.removed_from)[0]
                assert shown.removed_from <= 1e-6 or not is_duplicate(score, shown.removed_from - 1e-6)[0]
                if ranked:
                    assert (shown.outcome == "duplicate") == (eps >= shown.removed_from)
        witness = removed.get(id_, {}).get("kept_id")
        assert (shown.witness and shown.witness.id) == witness
        if witness is not None:
            assert shown.witness.score == removed[id_]["cosine_sim_score"]
        head = id_ if shown.outcome == "kept" else witness
        group = [line for line in removed.values() if line["kept_id"] == head] if head else []
        group.sort(key=lambda line: (-line["cosine_sim_score"], line["id"]))
        assert shown.n_group == len(group)
        wanted = [(line["id"], line["cosine_sim_score"]) for line in group]
        assert shown.group == (((head, 1.0), *wanted[:20]) if group else ())
        assert (
            dict(shown.columns).items() >= {"section": values[id_]["section"], "source": values[id_]["source"]}.items()
        )
        distances.update(shown.ranked_by)
    assert outcomes == ({"compared"} if eps is None else {"duplicate", "kept"})
    assert (parameters["which_to_keep"] == "random") == (not distances)
    assert snapshot(output) == before


def test_the_reason_of_a_rank_is_the_first_column_in_which_two_rows_differ(outputs, rows):
    values = {row["id"]: row for row in rows.select(["id", "size_bytes", "source"]).to_pylist()}
    reasons = set()
    for id_ in sampled(outputs("by column")):
        shown = untwin.show(outputs("by column"), id_)
        row = values[id_]
        assert shown.ranked_by == (("size_bytes", str(row["size_bytes"])), ("source", row["source"]))
        for other in filter(None, (shown.witness, shown.nearest)):
            better = values[other.id]
            if better["size_bytes"] != row["size_bytes"]:
                assert other.reason == f"size_bytes {better['size_bytes']} > {row['size_bytes']}"
            elif better["source"] != row["source"]:
                assert other.reason == f"source {better['source']} < {row['source']}"
            else:
                assert other.reason.endswith("by id")
            reasons.add(other.reason)
    assert len(reasons) > 10


def test_a_row_compared_across_clusters_has_a_reason_too(outputs):
    lines = clusters_of(outputs("probes"))
    across = [id_ for id_, (centroid, *_, line) in lines.items() if lines[line["max_id"]][0] != centroid]
    assert across
    for id_ in across[:3]:
        reason = untwin.show(outputs("probes"), id_).nearest.reason
        assert reason.startswith("farther from its own cluster's centre: 0."), reason


def test_after_drop_intermediate_it_says_what_is_still_known(outputs):
    whole, dropped = outputs("kept"), outputs("dropped")
    for id_ in sampled(dropped):
        shown, known = untwin.show(dropped, id_), untwin.show(whole, id_)
        assert (shown.outcome, shown.group, shown.n_group) == (known.outcome, known.group, known.n_group)
        assert (shown.rank, shown.nearest) == (None, None)
        assert "drop_intermediate" in shown.gone[0]
        if known.witness:
            assert (shown.witness.id, shown.witness.score) == (known.witness.id, known.witness.score)
            assert shown.centroid == known.centroid
    with pytest.raises(ParameterError, match="no row with the id 'nobody'"):
        untwin.show(dropped, "nobody")


def test_without_kept_and_intermediate_files_it_does_not_guess(tmp_path):
    source = write_parquet(tmp_path / "in.parquet", twin_table())
    untwin.deduplicate(source, tmp_path / "out", eps=0.05, rank_by="id:asc", drop_intermediate=True, kept="none")
    assert untwin.show(tmp_path / "out", "row06").outcome == "duplicate"
    with pytest.raises(ParameterError, match=r"'row00' was removed or rejected; whether .* is not known"):
        untwin.show(tmp_path / "out", "row00")


@pytest.mark.parametrize(
    ("id_type", "ids", "text"),
    [
        (pa.int32(), list(range(12)), str),
        (pa.uint64(), [2**64 - 20 + i for i in range(12)], str),
        (pa.binary(2), [b"\xff" + bytes([i]) for i in range(12)], repr),
        (pa.large_binary(), [b"\xfe" + bytes([i]) for i in range(12)], lambda value: "0x" + value.hex()),
        (pa.large_string(), twin_ids(), str),
    ],
    ids=["int32", "uint64", "fixed binary", "large binary", "large string"],
)
def test_ids_of_every_type_are_found_from_python_and_as_text(tmp_path, id_type, ids, text):
    source = write_parquet(tmp_path / "in.parquet", table_of(ids, twin_vectors(), id_type=id_type))
    untwin.deduplicate(source, tmp_path / "out", eps=0.05, rank_by="id:asc")
    for i in range(6):
        shown = untwin.show(tmp_path / "out", ids[6 + i])
        assert (shown.outcome, shown.id, shown.witness.id) == ("duplicate", str(ids[6 + i]), str(ids[i]))
        assert untwin.show(tmp_path / "out", text(ids[6 + i])) == shown
        assert untwin.show(tmp_path / "out", ids[i]).group[1][0] == str(ids[6 + i])


def test_an_id_of_another_type_is_a_mistake(tmp_path):
    source = write_parquet(tmp_path / "in.parquet", table_of(list(range(12)), twin_vectors(), id_type=pa.int32()))
    untwin.deduplicate(source, tmp_path / "out", eps=0.05)
    for wrong in ("twelve", b"1", 2**40, True, 1.5, None):
        with pytest.raises(ParameterError, match="the ids of this run are of type int32"):
            untwin.show(tmp_path / "out", wrong)


def test_rejected_rows_name_file_row_and_reason(tmp_path):
    vectors = [*twin_vectors(), np.full(8, np.nan), twin_vectors()[0]]
    source = write_parquet(tmp_path / "in.parquet", table_of([*twin_ids(), "bad", "row00"], vectors))
    untwin.deduplicate(source, tmp_path / "out", eps=0.05, rank_by="id:asc")
    bad = untwin.show(tmp_path / "out", "bad")
    assert (bad.outcome, bad.centroid, bad.nearest) == ("rejected", None, None)
    assert [(row.file, row.row, row.reason) for row in bad.rejected] == [(source, 12, "embedding contains NaN")]
    twice = untwin.show(tmp_path / "out", "row00")
    assert twice.outcome == "kept"
    assert [(row.row, row.reason) for row in twice.rejected] == [(13, "repeated row")]


def test_an_input_that_is_gone_leaves_the_rest(tmp_path):
    table = twin_table().append_column("size", pa.array(range(12)))
    source = write_parquet(tmp_path / "in.parquet", table)
    untwin.deduplicate(source, tmp_path / "out", eps=0.05, rank_by="size:asc")
    before = untwin.show(tmp_path / "out", "row07")
    (tmp_path / "in.parquet").unlink()
    after = untwin.show(tmp_path / "out", "row07")
    assert (after.witness, after.rank, after.group) == (before.witness, before.rank, before.group)
    assert after.witness.reason == "size 1 < 7"


@pytest.mark.parametrize(
    ("asked", "named"),
    [("row0", "row00"), ("OW11", "row11"), ("clips/row07.mp4", "row07"), ("row0x", "row00")],
)
def test_an_id_that_is_not_there_is_answered_with_ids_that_are_alike(tmp_path_factory, asked, named):
    folder = tmp_path_factory.getbasetemp() / "alike"
    if not folder.exists():
        source = write_parquet(folder / "in.parquet", twin_table())
        untwin.deduplicate(source, folder / "out", eps=0.05)
    result = cli("show", folder / "out", asked, code=2)
    assert f"no row with the id '{asked}'" in result.stderr
    assert named in result.stderr
    assert not result.stdout
    assert "there" not in cli("show", folder / "out", "quite something else", code=2).stderr.partition("else'")[2]


def test_the_command_prints_what_the_function_gives(outputs):
    output = outputs("kept")
    id_ = sampled(output)[0]
    shown = untwin.show(output, id_)
    printed = cli("show", output, id_).stdout
    assert printed.startswith(f"{id_} is removed: a row that ranks before it is within eps 0.05\n")
    assert f"because of    {shown.witness.id}  {shown.witness.score:.4f}" in printed
    assert shown.witness.reason in printed
    assert f"cluster       {shown.centroid}, rank {shown.rank:,} of {shown.cluster_rows:,}" in printed
    assert f"below eps {shown.removed_from:g} for sure" in printed
    assert "<- this row" in printed
    kept = cli("show", output, shown.witness.id).stdout
    assert kept.startswith(f"{shown.witness.id} stays at eps 0.05\n")
    as_json = json.loads(cli("show", output, id_, "--json").stdout)
    assert as_json["witness"]["id"] == shown.witness.id
    assert as_json["columns"] == [list(column) for column in shown.columns]
    assert "nothing is decided" in cli("show", outputs("no eps"), id_).stdout


def test_a_limit_leaves_out_the_least_similar_and_says_so(tmp_path):
    vectors = [[1, 0.002 * i] for i in range(9)]
    source = write_parquet(tmp_path / "in.parquet", table_of([f"i{i}" for i in range(9)], vectors))
    untwin.deduplicate(source, tmp_path / "out", eps=0.05, rank_by="id:asc")
    shown = untwin.show(tmp_path / "out", "i0", limit=3)
    assert ([id_ for id_, _ in shown.group], shown.n_group) == (["i0", "i1", "i2", "i3"], 8)
    assert "and 5 more" in cli("show", tmp_path / "out", "i0", "--limit", "3").stdout
    assert "at least 0" in cli("show", tmp_path / "out", "i0", "--limit", "-1", code=2).stderr


def test_hostile_ids_and_values_do_nothing_to_the_terminal(tmp_path):
    evil = "\x1b[2J\u202eevil\r\n\x07"
    ids = [f"{evil}{id_}" for id_ in twin_ids()]
    table = table_of(ids, twin_vectors(), **{f"name{evil}": pa.array([evil] * 12), "rank": pa.array(ids)})
    untwin.deduplicate(write_parquet(tmp_path / "in.parquet", table), tmp_path / "out", eps=0.05, rank_by="rank:asc")
    for result in (cli("show", tmp_path / "out", ids[7]), cli("show", tmp_path / "out", ids[1])):
        assert "evil" in result.output
        assert not set(result.output) & set("\x1b\u202e\r\x07")
    assert not set(cli("show", tmp_path / "out", evil, code=2).stderr) & set("\x1b\u202e\r\x07")


def test_a_folder_without_a_run_is_a_mistake(tmp_path):
    assert "holds no finished run" in cli("show", tmp_path, "a", code=2).stderr
