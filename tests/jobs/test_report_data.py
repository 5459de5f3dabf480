"""What the report shows: against plain NumPy and pyarrow over the whole folder."""

import dataclasses
import json
import re
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import untwin
from inputs import (
    N_TWINS,
    cli,
    parquet_files,
    read_files,
    read_folder,
    table_of,
    twin_ids,
    twin_table,
    twin_vectors,
    write_parquet,
    write_split,
)
from untwin.core import EPS_GRID, is_duplicate
from untwin.errors import DamagedFileError, MissingExtraError, ParameterError, UntwinError
from untwin.jobs import report, report_rows
from untwin.jobs.output import OutputFolder
from untwin.jobs.parameters import RunParameters
from untwin.jobs.report import rank_reason
from untwin.stages.ids import hash_ids
from untwin.storage.files import Storage

EPS = 0.05
RUNS = {
    "kept": {"eps": EPS},
    "ranked": {"eps": EPS, "compare_to": "ranked", "which_to_keep": "easy"},
    "no eps": {"rank_by": "section:asc,size_bytes:desc"},
    "probes": {"eps": 0.1, "probes": 4, "n_clusters": 100, "metadata_fields": ["size_bytes", "section"]},
}


def collected(output, **options):
    return report.collect_report(OutputFolder(Storage({}), str(output)), **options)


@pytest.fixture(scope="module")
def runs(debian_sample, tmp_path_factory):
    """A run of each kind over the sample, with its report and the truth; made when first asked for."""
    known = {}

    def get(name):
        if name not in known:
            out = tmp_path_factory.mktemp("run") / "out"
            untwin.deduplicate(debian_sample.path, out, **{"n_clusters": 8, "kept": "none", **RUNS[name]})
            known[name] = out, collected(out, group_by="section"), Truth(out, debian_sample.path)
        return known[name]

    return get


class Truth:
    """All rows of a run as one table: results, clusters and input side by side."""

    def __init__(self, out, source):
        self.run = json.loads((out / "run.json").read_text())
        self.eps = self.run["parameters"]["eps"]
        files = parquet_files(out / "pairwise")
        tables = [pq.ParquetFile(path).read() for path in files]
        rows = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
        rows = rows.append_column(
            "cluster",
            pa.array(np.repeat([int(path.stem[8:]) for path in files], [table.num_rows for table in tables])),
        )
        if self.eps is None:
            rows = rows.append_column("kept_id", pa.nulls(len(rows), pa.string()))
            rows = rows.append_column("kept_sim_score", pa.nulls(len(rows), pa.float32()))
        kmeans = read_files(parquet_files(out / "kmeans")).select(["id", "cosine_dist_to_cent"])
        rows = rows.join(kmeans, "id").join(pq.read_table(source).drop_columns(["embedding"]), "id").combine_chunks()
        self.rows = {row["id"]: row for row in rows.to_pylist()}
        self.score = rows["cosine_sim_score"].to_numpy()
        self.size = rows["size_bytes"].to_numpy()
        self.section = np.array(rows["section"].to_pylist())
        self.cluster = rows["cluster"].to_numpy()
        if self.eps is None:
            self.removed = np.zeros(len(rows), bool)
        else:
            self.removed = np.isin(rows["id"].to_pylist(), read_folder(out / "duplicates")["id"].to_pylist())
        first = pc.equal(rows["id"], rows["max_id"]).to_numpy()
        known = rows["kept_sim_score"].to_numpy()
        self.pair_score = np.where(np.isnan(known), self.score, known).astype(np.float32)[~first]
        self.pair_id = rows["id"].filter(pa.array(~first)).combine_chunks()

    def counted(self, eps):
        """The rows that a step counts."""
        return self.removed if eps == self.eps else is_duplicate(self.score, eps)


@pytest.mark.parametrize("name", RUNS)
def test_each_step_counts_what_the_whole_folder_holds(runs, name):
    _, found, truth = runs(name)
    wanted = {*EPS_GRID, *(k / 1000 for k in range(1, 301)), *({truth.eps} - {None})}
    if name == "probes":
        wanted = {eps for eps in wanted if eps <= truth.eps}
    assert [step.eps for step in found.steps] == sorted(wanted)
    for step in found.steps:
        counted = truth.counted(step.eps)
        assert (step.duplicates, step.bytes) == (counted.sum(), truth.size[counted].sum())
        assert step.exact == (step.eps == truth.eps or truth.run["parameters"]["compare_to"] == "ranked")
        assert step.seconds is None
    by_eps = {step.eps: (step.duplicates, step.exact) for step in found.steps}
    table = {row["eps"]: (row["duplicates"], row["exact"]) for row in truth.run["eps_table"]}
    assert {eps: by_eps[eps] for eps in table} == table
    assert len(table) >= 9
    assert (found.size_column, found.total_bytes) == ("size_bytes", truth.size.sum())
    assert (found.duration_column, found.total_seconds) == (None, None)
    rows = truth.run["rows"]
    assert (found.n_compared, found.n_kept, found.n_duplicates) == (2700, rows["kept"], rows["duplicates"])


@pytest.mark.parametrize("name", RUNS)
def test_sources_and_clusters_count_like_the_steps(runs, name):
    _, found, truth = runs(name)
    sections, counts = np.unique(truth.section, return_counts=True)
    order = sorted(range(len(sections)), key=lambda k: (-counts[k], sections[k]))
    shown = [str(sections[k]) for k in order[:30]]
    assert len(sections) > 31
    assert [source.value for source in found.sources] == [*shown, None]
    for source in found.sources:
        mine = truth.section == source.value if source.value is not None else ~np.isin(truth.section, shown)
        assert source.rows == mine.sum()
        assert source.duplicates == tuple((truth.counted(step.eps) & mine).sum() for step in found.steps)
        assert source.removed == (None if truth.eps is None else (truth.removed & mine).sum())
    sizes = np.bincount(truth.cluster)
    assert found.cluster_sizes == tuple(sorted(sizes[sizes > 0].tolist(), reverse=True))
    assert found.n_clusters == len(found.cluster_sizes)
    of_cluster = np.bincount(truth.cluster[truth.counted(truth.eps or 0.05)], minlength=len(sizes))
    order = sorted(np.flatnonzero(of_cluster).tolist(), key=lambda k: (-of_cluster[k], k))[:20]
    assert [cluster.centroid for cluster in found.clusters] == order
    for cluster in found.clusters:
        mine = truth.cluster == cluster.centroid
        assert cluster.rows == mine.sum()
        assert cluster.duplicates == tuple((truth.counted(step.eps) & mine).sum() for step in found.steps)


@pytest.mark.parametrize("name", RUNS)
def test_the_histogram_has_every_row_once(runs, name):
    _, found, truth = runs(name)
    assert len(found.bin_edges) == len(found.bin_counts) + 1 == 151
    assert (found.bin_edges[0], found.bin_edges[-1]) == pytest.approx((1 - found.steps[-1].eps, 1))
    edges = np.array(found.bin_edges, np.float32).astype(float)
    assert found.bin_counts == tuple(np.histogram(truth.score.astype(float), edges)[0].tolist())
    assert sum(found.bin_counts) + found.n_below == 2700


@pytest.mark.parametrize("name", RUNS)
def test_pairs_are_rows_beside_what_they_resemble_most(runs, name):
    _, found, truth = runs(name)
    assert 300 < len(found.pairs) <= 400
    assert [pair.score for pair in found.pairs] == sorted((pair.score for pair in found.pairs), reverse=True)
    removed = {row for row, out in zip(truth.rows, truth.removed, strict=True) if out}
    assert {pair.removed for pair in found.pairs} == ({False} if truth.eps is None else {True, False})
    n_across = 0
    for pair in found.pairs:
        clip, other = found.clips[pair.row], found.clips[pair.other]
        row = truth.rows[clip.id]
        assert pair.removed == (clip.id in removed)
        with_witness = row["kept_id"] is not None
        assert other.id == (row["kept_id"] if with_witness else row["max_id"])
        assert pair.score == (row["kept_sim_score"] if with_witness else row["cosine_sim_score"])
        least, most = ((truth.pair_score >= pair.score - slack).sum() for slack in (0, 1 / 65536))
        assert least <= pair.pairs_at_least <= most
        for shown in (clip, other):
            there = truth.rows[shown.id]
            assert shown.centroid == there["cluster"]
            assert dict(shown.columns) == {
                key: str(there[key])[:200] if len(str(there[key])) <= 200 else str(there[key])[:199] + "…"
                for key in ("section", "source", "size_bytes", "text")
            }
        n_across += clip.centroid != other.centroid
    assert (n_across > 3) == (name == "probes")


@pytest.mark.parametrize("name", RUNS)
def test_the_pairs_of_each_interval_are_those_with_the_smallest_hashes(runs, name):
    _, found, truth = runs(name)
    limits = np.array([np.float32(1 - step.eps) for step in found.steps])
    interval = np.searchsorted(-limits, -truth.pair_score)
    hashes = hash_ids(truth.pair_id, report.REPORT_SEED)
    shown = np.isin(truth.pair_id.to_pylist(), [found.clips[pair.row].id for pair in found.pairs])
    assert shown.sum() == len(found.pairs)
    for number in range(len(limits)):
        here = interval == number
        assert (shown & here).any() == here.any()
        if (shown & here).any() and (~shown & here).any():
            assert hashes[shown & here].max() < hashes[~shown & here].min()
    assert not shown[interval == len(limits)].any()
    if truth.eps is not None and name != "probes":
        force = [step.eps for step in found.steps].index(truth.eps)
        per_interval = np.bincount(interval[shown], minlength=len(limits))
        assert per_interval[force - 9 : force + 11].sum() > 2 * per_interval[100:120].sum()


@pytest.mark.parametrize("name", RUNS)
def test_reasons_say_why_the_other_one_ranks_before(runs, name):
    _, found, truth = runs(name)
    kinds = set()
    for pair in found.pairs:
        row, other = (truth.rows[found.clips[index].id] for index in (pair.row, pair.other))
        if name == "no eps":
            if other["section"] != row["section"]:
                assert other["section"] < row["section"]
                assert pair.reason == f"section {other['section']} < {row['section']}"
            elif other["size_bytes"] != row["size_bytes"]:
                assert other["size_bytes"] > row["size_bytes"]
                assert pair.reason == f"size_bytes {other['size_bytes']} > {row['size_bytes']}"
            else:
                assert pair.reason == "same section, size_bytes; by id"
            kinds.add(pair.reason.split()[0])
            continue
        one, two = other["cosine_dist_to_cent"], row["cosine_dist_to_cent"]
        if one == two:
            assert pair.reason == "same distance to the centre; by id"
            continue
        word, sign = ("nearer to", "<") if name == "ranked" else ("farther from", ">")
        assert (one < two) == (name == "ranked")
        whose = "its" if row["cluster"] == other["cluster"] else "its own"
        match = re.fullmatch(rf"{word} {whose} cluster's centre: (\S+) {sign} (\S+)", pair.reason)
        assert match, pair.reason
        assert (float(match[1]), float(match[2])) == pytest.approx((one, two), rel=0.005)
        assert (float(match[1]) < float(match[2])) == (one < two)
        kinds.add(whose)
    assert kinds == {"no eps": {"section", "size_bytes"}, "probes": {"its", "its own"}}.get(name, {"its"}) | (
        kinds & {"same"}
    )


@pytest.mark.parametrize("name", ["kept", "ranked", "probes"])
def test_the_largest_groups_are_shown_with_their_most_similar_members(runs, name, monkeypatch):
    out, _, _ = runs(name)
    monkeypatch.setattr(report, "_MEMBERS", 5)
    found = collected(out)
    groups = {}
    for row in pq.read_table(out / "groups.parquet").to_pylist():
        groups.setdefault(row["group_id"], []).append(row)
    order = sorted(groups, key=lambda group: (-len(groups[group]), group))[:12]
    assert found.n_groups == len(groups) > 12
    assert len(groups[order[0]]) > 6
    for group, shown in zip((groups[key] for key in order), found.groups, strict=True):
        kept, *members = group
        assert found.clips[shown.kept].id == kept["id"]
        assert shown.n_duplicates == len(members)
        members.sort(key=lambda row: (-row["score"], row["id"]))
        assert [(found.clips[index].id, score) for index, score in shown.shown] == [
            (row["id"], row["score"]) for row in members[:5]
        ]


def test_groups_that_reach_over_row_groups_are_counted_whole(tmp_path, monkeypatch):
    run = untwin.deduplicate(write_parquet(tmp_path / "in.parquet", twin_table()), tmp_path / "out", eps=EPS)
    sizes = [3, 40, 1, 17, 40]
    ids = [f"{group}-{k:02}" for group, size in enumerate(sizes) for k in range(size + 1)]
    table = pa.table(
        {
            "group_id": np.repeat(np.arange(5), np.array(sizes) + 1),
            "id": ids,
            "role": ["kept" if name.endswith("-00") else "duplicate" for name in ids],
            "score": pa.array([1 - int(name[-2:]) % 7 / 100 for name in ids], pa.float32()),
        }
    )
    pq.write_table(table, tmp_path / "out" / "groups.parquet", row_group_size=10)
    source = report_rows.Finished.open(OutputFolder(Storage({}), run.output_path))
    found = report_rows.largest_groups(source, 3, 8)
    assert [n_duplicates for n_duplicates, _, _ in found] == [40, 40, 17]
    for (_, members, scores), group in zip(found, (1, 4, 3), strict=True):
        others = sorted((k % 7, f"{group}-{k:02}") for k in range(1, sizes[group] + 1))[:8]
        assert members.to_pylist() == [f"{group}-00", *(name for _, name in others)]
        assert scores == pytest.approx([1, *(1 - tenth / 100 for tenth, _ in others)])


def without_place(found):
    """A report without what names the place, the time or the order of the input."""
    return dataclasses.replace(
        found, output="", made="", finished="", reproduce="", apply="", parameters={}, kmeans={}, packages={}
    )


def test_row_order_file_split_batches_and_format_change_nothing_that_is_shown(
    runs, debian_sample, tmp_path, monkeypatch
):
    _, found, _ = runs("kept")
    table = pq.read_table(debian_sample.path)
    table = table.take(pa.array(np.random.default_rng(0).permutation(len(table))))
    options = {"eps": EPS, "n_clusters": 8, "kept": "none"}
    monkeypatch.setattr(report_rows, "_BATCH", 100)
    monkeypatch.setattr(report_rows, "_INPUT_BATCH", 90)
    monkeypatch.setattr(report, "_BLOCK", 64)
    untwin.deduplicate(write_split(tmp_path / "in", table, 7, row_group_size=111), tmp_path / "out", **options)
    again = collected(tmp_path / "out", group_by="section")
    assert without_place(again) == without_place(found)
    lines = tmp_path / "lines"
    lines.mkdir()
    for number in range(2):
        part = table.slice(1350 * number, 1350).to_pylist()
        (lines / f"{number}.jsonl").write_text("\n".join(json.dumps(row) for row in part) + "\n")
    untwin.deduplicate(lines, tmp_path / "out2", input_filetype="jsonl", **options)
    again = collected(tmp_path / "out2", group_by="section")
    assert without_place(again) == without_place(found)
    assert "--input-filetype jsonl" in again.reproduce


def test_npy_input_shows_its_metadata(tmp_path):
    np.save(tmp_path / "img_emb_0.npy", twin_vectors())
    sizes = pa.array(range(100, 112))
    write_parquet(tmp_path / "metadata_0.parquet", pa.table({"id": twin_ids(), "caption": twin_ids(), "bytes": sizes}))
    untwin.deduplicate(tmp_path, tmp_path / "out", eps=EPS, rank_by="id:asc", input_filetype="npy")
    found = collected(tmp_path / "out", group_by="caption")
    assert {clip.id: clip.columns for clip in found.clips} == {
        f"row{k:02}": (("caption", f"row{k:02}"), ("bytes", str(100 + k))) for k in range(12)
    }
    assert found.steps[-1].bytes == sum(range(106, 112))
    assert [source.value for source in found.sources] == twin_ids()
    assert {(found.clips[p.row].id, found.clips[p.other].id, p.reason) for p in found.pairs} == {
        (f"row{6 + k:02}", f"row{k:02}", f"id row{k:02} < row{6 + k:02}") for k in range(N_TWINS)
    }


def wide_table():
    """Columns of all kinds; of two rows the embedding cannot be judged."""
    vectors = [*twin_vectors(), np.zeros(8), None]
    n = len(vectors)
    return table_of(
        [*twin_ids(), "zero", "none"],
        vectors,
        duration_s=pa.array([1.5, None, float("nan"), float("inf"), *[2.25] * (n - 4)], pa.float32()),
        nested=pa.array([[1]] * n),
        picture=pa.array([b"\0"] * n),
        tag=pa.array([None, "(none)", *["x" * 300] * (n - 2)]).dictionary_encode(),
        **{f"c{k:02}": pa.array([k] * n) for k in range(20)},
    )


def test_rejected_rows_nulls_and_long_texts(tmp_path):
    untwin.deduplicate(write_parquet(tmp_path / "in.parquet", wide_table()), tmp_path / "out", eps=EPS)
    found = collected(tmp_path / "out", group_by="tag")
    assert (found.n_input, found.n_compared, found.n_rejected) == (14, 12, 2)
    assert found.total_seconds == 1.5 + 8 * 2.25
    assert {(source.value, source.rows) for source in found.sources} == {
        ("(none)", 1),
        ("x" * 199 + "…", 10),
    }
    assert len(found.sources) == 3
    (clip,) = (clip for clip in found.clips if clip.id == "row00")
    assert clip.columns == (("duration_s", "1.5"), ("tag", "(none)"), *((f"c{k:02}", str(k)) for k in range(10)))
    for name, said in (("nothing", "'tag'.*'duration_s'|'duration_s'.*'tag'"), ("nested", "list")):
        with pytest.raises(ParameterError, match=said):
            collected(tmp_path / "out", group_by=name)


def test_a_column_with_too_many_values_to_group_by_is_refused(tmp_path, monkeypatch):
    untwin.deduplicate(write_parquet(tmp_path / "in.parquet", twin_table()), tmp_path / "out", eps=EPS)
    monkeypatch.setattr(report_rows, "_MOST_VALUES", 12)
    with pytest.raises(ParameterError, match="more than 12 different values"):
        collected(tmp_path / "out", group_by="id")


def test_a_file_without_the_columns_counts_as_without_values(tmp_path):
    table = twin_table(bytes=pa.array([10] * 12), camera=pa.array(["a", "b"] * 6))
    write_parquet(tmp_path / "in" / "0.parquet", table.slice(0, 6))
    write_parquet(tmp_path / "in" / "1.parquet", table.slice(6).select(["id", "embedding"]))
    untwin.deduplicate(tmp_path / "in", tmp_path / "out", eps=EPS, rank_by="id:asc")
    found = collected(tmp_path / "out", group_by="camera")
    assert [(source.value, source.rows, source.removed) for source in found.sources] == [
        ("(none)", 6, 6),
        ("a", 3, 0),
        ("b", 3, 0),
    ]
    assert (found.total_bytes, found.steps[-1].bytes) == (60, 0)
    assert {len(clip.columns) for clip in found.clips} == {0, 2}


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_without_the_input_the_clusters_say_what_they_carry(tmp_path, caplog, how):
    table = twin_table(bytes=pa.array(range(12)), text=pa.array(twin_ids()), camera=pa.array(["a", "b"] * 6))
    source = write_parquet(tmp_path / "in.parquet", table)
    untwin.deduplicate(source, tmp_path / "out", eps=EPS, rank_by="id:asc", metadata_fields=["bytes", "camera"])
    before = collected(tmp_path / "out", group_by="camera")
    assert not caplog.records
    (tmp_path / "in.parquet").unlink()
    if how == "changed":
        write_parquet(source, table.slice(0, 5))
    found = collected(tmp_path / "out", group_by="camera")
    assert any("in.parquet" in record.getMessage() for record in caplog.records)
    assert found.steps == before.steps
    assert (found.sources, found.total_bytes) == (before.sources, 66)
    shown = {clip.id: dict(clip.columns) for clip in found.clips}
    assert {name: (columns["bytes"], columns["camera"]) for name, columns in shown.items()} == {
        f"row{k:02}": (str(k), "ab"[k % 2]) for k in range(12)
    }
    assert not any("text" in columns for columns in shown.values())
    assert [pair.reason for pair in found.pairs] == [pair.reason for pair in before.pairs]
    with pytest.raises(ParameterError, match="'camera'"):
        collected(tmp_path / "out", group_by="text")


def test_an_answer_of_apply_is_reported_and_may_be_moved_with_its_run(runs, tmp_path, caplog):
    out, _, _ = runs("kept")
    shutil.copytree(out, tmp_path / "run")
    untwin.apply(tmp_path / "run", eps=0.1)
    untwin.apply(tmp_path / "run", eps=0.2, to=tmp_path / "other answer")
    before = collected(tmp_path / "run" / "eps=0.1", group_by="section")
    assert (before.eps, before.output) == (0.1, str(tmp_path / "run" / "eps=0.1"))
    assert before.apply == f"untwin apply {tmp_path / 'run'}"
    assert before.reproduce.endswith(f" && untwin apply {tmp_path / 'run'} --eps 0.1")
    assert " --eps 0.05 " in before.reproduce.partition("&&")[0] + " "
    other = collected(tmp_path / "other answer")
    assert other.reproduce.endswith(f" --eps 0.2 --to '{tmp_path / 'other answer'}'")
    exact = {step.eps: step.duplicates for step in other.steps if step.exact}
    assert exact == {0.2: other.n_duplicates}
    assert other.n_duplicates > before.n_duplicates > 600

    (tmp_path / "run").rename(tmp_path / "moved")
    moved = collected(tmp_path / "moved" / "eps=0.1", group_by="section")
    assert without_place(moved) == without_place(before)
    assert any("farther" in pair.reason for pair in moved.pairs)
    assert moved.apply == f"untwin apply {tmp_path / 'moved'}"
    caplog.clear()
    alone = collected(tmp_path / "other answer", group_by="section")
    assert str(tmp_path / "run") in caplog.text
    assert {pair.reason for pair in alone.pairs} == {"ranked by cosine_dist_to_cent"}
    assert (alone.steps, alone.clips) == (other.steps, other.clips)


def test_commands_name_only_what_is_not_the_default(runs, debian_sample, tmp_path):
    out, found, _ = runs("probes")
    assert found.reproduce == (
        f"untwin run {debian_sample.path} {out} --eps 0.1 --n-clusters 100 --probes 4 "
        "--metadata-fields size_bytes,section --kept none"
    )
    assert found.apply == f"untwin apply {out}"
    source = write_parquet(tmp_path / "my rows.parquet", twin_table())
    untwin.deduplicate(source, tmp_path / "out", rank_by="id:asc", seed=7, on_repeated_id="first", skip_bad_files=True)
    assert collected(tmp_path / "out").reproduce == (
        f"untwin run '{source}' {tmp_path / 'out'} --rank-by id:asc --seed 7 --on-repeated-id first --skip-bad-files"
    )


def test_what_cannot_be_reported_is_told(tmp_path):
    with pytest.raises(ParameterError, match="holds no finished run"):
        collected(tmp_path)
    source = write_parquet(tmp_path / "in.parquet", twin_table())
    untwin.deduplicate(source, tmp_path / "out", eps=EPS, drop_intermediate=True)
    with pytest.raises(ParameterError, match="--report"):
        collected(tmp_path / "out")
    untwin.deduplicate(source, tmp_path / "other", eps=EPS)
    (path,) = (tmp_path / "other" / "pairwise").glob("*.parquet")
    table = pq.ParquetFile(path).read()
    pq.write_table(table.slice(0, 5), path)
    with pytest.raises(DamagedFileError, match="5 rows where the run compared 12"):
        collected(tmp_path / "other")
    path.unlink()
    (tmp_path / "other" / "pairwise" / "cluster_99.parquet").touch()
    with pytest.raises((UntwinError, OSError), match="cluster_0"):
        collected(tmp_path / "other")


@pytest.mark.parametrize(
    ("better", "worse", "reason"),
    [
        ({"d": 12.4, "s": "b"}, {"d": 8.1, "s": "a"}, "d 12.4 > 8.1"),
        ({"d": 1.00001, "s": "b"}, {"d": 1.0, "s": "a"}, "d 1.00001 > 1"),
        ({"d": 1.0, "s": "a"}, {"d": None, "s": "b"}, "has d, the other has none"),
        ({"d": 1.0, "s": "a"}, {"d": float("nan"), "s": "b"}, "d is a number, that of the other is not"),
        ({"d": float("nan"), "s": "a"}, {"d": None, "s": "b"}, "has d, the other has none"),
        ({"d": None, "s": "a"}, {"d": None, "s": "b"}, "s a < b"),
        ({"d": float("nan"), "s": "a"}, {"d": float("nan"), "s": None}, "has s, the other has none"),
        ({"d": 1.0, "s": "b"}, {"d": 1.0, "s": "b"}, "same d, s; by id"),
        ({"s": "b"}, {"s": "a"}, "ranked by d"),
    ],
)
def test_the_first_column_that_differs_is_the_reason(better, worse, reason):
    ranking = RunParameters(("in",), "out", rank_by="d:desc,s:asc").ranking()
    assert rank_reason(ranking, better, worse, None, same_cluster=True) == reason


def test_a_random_order_is_by_chance():
    ranking = RunParameters(("in",), "out", which_to_keep="random", seed=3).ranking()
    assert rank_reason(ranking, {}, {}, "random", same_cluster=False) == "by chance (seed 3)"


@pytest.fixture
def pages(monkeypatch):
    """In place of the page: what would be on it."""
    shown = []

    def render(found):
        shown.append(found)
        return f"<p>{found.n_duplicates} ü</p>"

    monkeypatch.setattr(report, "renderer", lambda: render)
    return shown


def test_the_command_writes_the_page_and_says_what_is_on_it(tmp_path, pages, monkeypatch):
    out = tmp_path / "out"
    source = write_parquet(tmp_path / "in.parquet", twin_table(camera=pa.array(["a", "b"] * 6)))
    untwin.deduplicate(source, out, eps=EPS, rank_by="id:asc")
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    text = cli("report", out, "--group-by", "camera", "--open").stdout
    page = out / "report.html"
    assert page.read_text(encoding="utf-8") == "<p>6 ü</p>"
    assert opened == [page.as_uri()]
    lines = text.splitlines()
    assert len(lines) == 4
    assert lines[0] == f"The report: {page}"
    assert "12 compared; 6 duplicates at eps 0.05, 6 rows stay" in lines[1]
    assert "6 of the pairs, 6 of 6 groups" in lines[2]
    (found,) = pages
    assert [(source.value, source.removed) for source in found.sources] == [("a", 3), ("b", 3)]
    assert untwin.write_report(out) == str(page)
    said = cli("report", out, "--group-by", "nothing", code=2).stderr
    assert "'camera'" in said
    assert cli("report", tmp_path, code=2).stderr.startswith("untwin: ")
    assert "local" in cli("report", "s3://bucket/out", "--open", code=2).stderr
    (tmp_path / "clips").mkdir()
    assert "holds no media files" in cli("report", out, "--media", tmp_path / "clips", code=2).stderr
    monkeypatch.setattr("webbrowser.open", lambda _: False)
    assert "no browser" in cli("report", out, "--open").stderr


def test_the_page_is_one_of_our_files(tmp_path, pages):
    out, source = tmp_path / "out", write_parquet(tmp_path / "in.parquet", twin_table())
    untwin.deduplicate(source, out, eps=EPS)
    untwin.apply(out, eps=0.1)
    for folder in (out, out / "eps=0.1"):
        untwin.write_report(folder)
    untwin.deduplicate(source, out, eps=0.2, overwrite=True)
    assert not (out / "report.html").exists()
    assert not (out / "eps=0.1").exists()
    assert len(pages) == 2


@pytest.mark.parametrize("audit", [["--audit"], []])
def test_run_writes_the_page_before_the_intermediate_files_go_and_after_the_audit(tmp_path, pages, audit):
    out, source = tmp_path / "out", write_parquet(tmp_path / "in.parquet", twin_table())
    command = ["run", source, out, "--eps", EPS, "--report", "--drop-intermediate", "--n-clusters", 2, *audit]
    assert f"The report: {out / 'report.html'}" in cli(*command).stdout
    (found,) = pages
    run = json.loads((out / "run.json").read_text())
    measured = run["audit"]["recall"] if audit else []
    assert [line.recall for line in found.recall] == [row["recall"] for row in measured]
    assert ("12 sampled rows were compared with all 12" in found.audit_note) == bool(audit)
    assert any("farther" in pair.reason for pair in found.pairs)
    assert not (out / "pairwise").exists()
    assert not (out / "kmeans").exists()
    # the same again has nothing to do, and needs no similarities
    cli(*command)
    assert len(pages) == 1


def test_run_adds_the_page_to_a_finished_run(tmp_path, pages):
    source = write_parquet(tmp_path / "in.parquet", twin_table())
    first = untwin.deduplicate(source, tmp_path / "out", eps=EPS)
    again = untwin.deduplicate(source, tmp_path / "out", eps=EPS, report=True)
    assert again == first
    assert (tmp_path / "out" / "report.html").exists()
    assert len(pages) == 1


def test_a_missing_package_is_told_before_the_run_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_PAGE_PACKAGES", ("no_such_package",))
    source = write_parquet(tmp_path / "in.parquet", twin_table())
    with pytest.raises(MissingExtraError, match=r"untwin\[report\]"):
        untwin.deduplicate(source, tmp_path / "out", eps=EPS, report=True)
    assert not (tmp_path / "out").exists()
    untwin.deduplicate(source, tmp_path / "out", eps=EPS)
    with pytest.raises(MissingExtraError, match=r"untwin\[report\]"):
        untwin.write_report(tmp_path / "out")
    assert "jinja2" not in sys.modules or not (tmp_path / "out" / "report.html").exists()
