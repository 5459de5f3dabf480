"""What a run writes is the right answer: checked against brute force on real vectors, and by hand on small ones."""

import datetime
import decimal
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from inputs import (
    TWINS,
    ids_of,
    parquet_files,
    read_files,
    read_folder,
    table_of,
    twin_ids,
    twin_table,
    twin_vectors,
    witnesses,
    write_parquet,
    write_split,
)
from oracle import brute_force
from untwin import deduplicate

EPS = 0.05
RULES = {
    "hard": {"which_to_keep": "hard"},
    "easy": {"which_to_keep": "easy"},
    "random": {"which_to_keep": "random"},
    "largest": {"rank_by": "size_bytes:desc"},
    "hard, ranked": {"which_to_keep": "hard", "compare_to": "ranked"},
}


class Run:
    """A finished run, with its clusters in rank order and the truth about each."""

    def __init__(self, debian, folder, options):
        self.options = options
        self.compare_to = options.get("compare_to", "kept")
        self.output = Path(folder)
        self.inputs = debian.files
        self.n_clusters = debian.n_clusters
        self.result = deduplicate(
            debian.path, str(folder), eps=EPS, n_clusters=debian.n_clusters, metadata_fields=["size_bytes"], **options
        )
        self.centroids = np.load(self.output / "kmeans" / "_centroids.npy")
        self.clusters = {}
        self.found = {}
        self.truth = {}
        for path in sorted((self.output / "kmeans").glob("centroid=*")):
            number = int(path.name.removeprefix("centroid="))
            rows = read_folder(path)
            found = pq.ParquetFile(self.output / "pairwise" / f"cluster_{number}.parquet").read()
            rows = rows.take(pa.array(self.order(rows, found)))
            X = np.stack(rows["embedding"].to_numpy())
            self.clusters[number], self.found[number] = rows, found
            self.truth[number] = brute_force(X, EPS, self.compare_to)

    def order(self, rows, found):
        """Positions of a cluster's rows, best first, worked out without untwin (but for `random`)."""
        ids = rows["id"].to_pylist()
        if self.options.get("which_to_keep") == "random":
            place = {name: rank for rank, name in enumerate(found["id"].to_pylist())}
            return sorted(range(len(ids)), key=lambda i: place[ids[i]])
        by_size = "rank_by" in self.options
        values = rows["size_bytes" if by_size else "cosine_dist_to_cent"].to_pylist()
        descending = by_size or self.options["which_to_keep"] == "hard"
        return sorted(range(len(ids)), key=lambda i: (values[i], ids[i]), reverse=descending)


@pytest.fixture(scope="module")
def runs(debian, tmp_path_factory):
    """A run for each rule, made when it is first asked for."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = Run(debian, tmp_path_factory.mktemp("runs") / "out", RULES[name])
        return made[name]

    return get


def test_every_row_is_in_the_cluster_of_its_nearest_centroid_with_its_distances(runs):
    run = runs("hard")
    C = run.centroids.astype(np.float64)
    assert C.shape == (run.n_clusters, 256)
    for number, rows in run.clusters.items():
        X = np.stack(rows["embedding"].to_numpy()).astype(np.float64)
        assert np.allclose(np.linalg.norm(X, axis=1), 1, atol=1e-6)
        squared = 1 + (C**2).sum(axis=1) - 2 * X @ C.T
        own = squared[:, number]
        assert (own <= squared.min(axis=1) + 1e-6).all()
        assert np.allclose(rows["l2_dist_to_cent"].to_numpy(), np.sqrt(np.maximum(own, 0)), atol=1e-5)
        cosine = X @ C[number] / np.linalg.norm(C[number])
        assert np.allclose(rows["cosine_dist_to_cent"].to_numpy(), 1 - cosine, atol=1e-5)


def test_clusters_hold_every_input_row_once_with_its_number_and_metadata(runs):
    run = runs("hard")
    given = read_files(run.inputs)
    found = pa.concat_tables(run.clusters.values())
    found = found.take(pc.sort_indices(found, sort_keys=[("_row", "ascending")]))
    assert found["_row"].to_pylist() == list(range(given.num_rows))
    assert found["id"].to_pylist() == given["id"].to_pylist()
    assert found["size_bytes"].equals(given["size_bytes"])


@pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=[pytest.mark.slow] * (rule in ("easy", "random"))) for rule in RULES]
)
def test_similarities_are_those_of_brute_force_in_rank_order(runs, rule):
    run = runs(rule)
    assert len(run.clusters) > 1
    for number, rows in run.clusters.items():
        found, truth = run.found[number], run.truth[number]
        ids = rows["id"].to_pylist()
        assert found["id"].to_pylist() == ids
        assert np.allclose(found["cosine_sim_score"].to_numpy(), truth.score, atol=1e-5)
        place = {name: rank for rank, name in enumerate(ids)}
        match = np.array([place[name] for name in found["max_id"].to_pylist()])
        assert match[0] == 0
        assert found["cosine_sim_score"][0].as_py() == 0
        different = np.flatnonzero(match != truth.match)
        assert (match[different] < different).all()
        # only where two rows are as similar may another one be named
        assert np.allclose(truth.similarity(different, match[different]), truth.score[different], rtol=0, atol=1e-12)
        assert len(different) < 0.02 * len(ids) + 2


@pytest.mark.parametrize("rule", RULES)
def test_duplicates_and_their_witnesses_are_those_of_brute_force(runs, rule):
    run = runs(rule)
    removed = read_folder(run.output / "duplicates")
    listed = {row["id"]: row for row in removed.to_pylist()}
    assert removed.num_rows == len(listed) > 0
    n_removed = 0
    for number, rows in run.clusters.items():
        truth, ids = run.truth[number], rows["id"].to_pylist()
        place = {name: rank for rank, name in enumerate(ids)}
        for i in np.flatnonzero(~truth.kept).tolist():
            row = listed[ids[i]]
            n_removed += 1
            assert row["centroid"] == number
            if truth.witness[i] < 0:
                assert run.compare_to == "ranked"
                assert row["kept_id"] is None
                assert row["cosine_sim_score"] is None
                continue
            w = place[row["kept_id"]]
            assert truth.kept[w]
            assert w < i
            score = truth.similarity(i, truth.witness[i])
            assert w == truth.witness[i] or abs(truth.similarity(i, w) - score) < 1e-12
            assert abs(row["cosine_sim_score"] - score) < 1e-6
    assert n_removed == len(listed) == run.result.n_duplicates


@pytest.mark.parametrize("rule", ["hard", "easy", "random", "largest"])
def test_no_two_kept_rows_of_a_cluster_are_within_eps(runs, rule):
    run = runs(rule)
    kept = set(ids_of(run.output / "kept"))
    assert len(kept) == run.result.n_kept
    compared = 0
    for number, rows in run.clusters.items():
        staying = np.array([name in kept for name in rows["id"].to_pylist()])
        X = run.truth[number].X[staying]
        S = (X @ X.T).astype(np.float32)
        np.fill_diagonal(S, 0)
        compared += S.size
        assert S.max() < np.float32(1 - EPS)
    assert compared > 0


def test_the_original_rule_removes_rows_that_nothing_similar_is_kept_for(runs):
    kept, ranked = runs("hard"), runs("hard, ranked")
    assert ranked.result.n_duplicates > kept.result.n_duplicates
    orphans = read_folder(ranked.output / "duplicates")["kept_id"].null_count
    assert orphans == sum(int(((t.witness < 0) & ~t.kept).sum()) for t in ranked.truth.values())


@pytest.mark.parametrize("rule", ["hard", "hard, ranked"])
def test_the_eps_table_counts_scores_and_says_what_is_exact(runs, rule):
    run = runs(rule)
    grid = [0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3]
    scores = np.concatenate([truth.score for truth in run.truth.values()]).astype(np.float32)
    table = run.result.eps_table().to_pylist()
    assert [row["eps"] for row in table] == grid
    for row in table:
        at_most = int((scores >= np.float32(1 - row["eps"])).sum())
        in_force = row["eps"] == EPS
        assert row["duplicates"] == (run.result.n_duplicates if in_force else at_most)
        assert row["exact"] == (in_force or run.compare_to == "ranked")
        assert row["duplicates"] <= at_most
        assert row["share"] == pytest.approx(row["duplicates"] / run.result.n_rows)


@pytest.mark.parametrize("rule", ["hard", "hard, ranked"])
def test_kept_and_duplicates_are_the_input_and_kept_rows_are_untouched_and_in_order(runs, rule):
    run = runs(rule)
    given = read_files(run.inputs)
    removed = ids_of(run.output / "duplicates")
    assert removed == sorted(removed)
    assert not (run.output / "rejected").exists()
    stays = pc.invert(pc.is_in(given["id"], pa.array(removed)))
    kept = read_folder(run.output / "kept")
    assert kept.schema.equals(given.schema)
    assert kept.equals(given.filter(stays))
    assert kept.num_rows + len(removed) == given.num_rows


@pytest.mark.parametrize("rule", ["hard", "hard, ranked"])
def test_groups_are_a_kept_row_and_its_duplicates(runs, rule):
    run = runs(rule)
    wanted = {}
    for row in read_folder(run.output / "duplicates").to_pylist():
        if row["kept_id"] is not None:
            wanted.setdefault(row["kept_id"], {})[row["id"]] = row["cosine_sim_score"]
    found = {}
    for row in pq.read_table(run.output / "groups.parquet").to_pylist():
        found.setdefault(row["group_id"], []).append(row)
    assert sorted(found) == list(range(len(wanted)))
    assert len(wanted) > 10
    for members in found.values():
        assert len(members) >= 2
        (head,) = (row for row in members if row["role"] == "kept")
        assert head["score"] == 1
        others = {row["id"]: row["score"] for row in members if row["role"] == "duplicate"}
        assert len(others) == len(members) - 1
        assert others == wanted.pop(head["id"])
    assert not wanted


def test_duplicates_come_in_several_row_groups_with_statistics_on_id(runs, debian):
    run = runs("hard, ranked")
    (path,) = parquet_files(run.output / "duplicates")
    metadata = pq.read_metadata(path)
    assert metadata.num_row_groups == -(-run.result.n_duplicates // 16_384)
    if debian.whole:
        assert metadata.num_row_groups > 1
    assert metadata.row_group(0).column(0).path_in_schema == "id"
    assert metadata.row_group(0).column(0).statistics.has_min_max


def test_every_file_has_the_promised_columns_and_types(runs):
    run = runs("hard")
    vector = pa.list_(pa.float32(), 256)
    clusters = [("id", pa.string()), ("embedding", vector), ("l2_dist_to_cent", pa.float32())]
    clusters += [("cosine_dist_to_cent", pa.float32()), ("size_bytes", pa.int64()), ("_row", pa.int64())]
    pairs = [("id", pa.string()), ("max_id", pa.string()), ("cosine_sim_score", pa.float32())]
    pairs += [("kept_id", pa.string()), ("kept_sim_score", pa.float32())]
    duplicates = [("id", pa.string()), ("kept_id", pa.string()), ("cosine_sim_score", pa.float32())]
    duplicates += [("centroid", pa.int32())]
    groups = [("group_id", pa.int64()), ("id", pa.string()), ("role", pa.string()), ("score", pa.float32())]
    seen = 0
    for pattern, columns in {
        "kmeans/centroid=*/*.parquet": clusters,
        "pairwise/cluster_*.parquet": pairs,
        "duplicates/*.parquet": duplicates,
        "groups.parquet": groups,
    }.items():
        for path in run.output.glob(pattern):
            seen += 1
            assert pq.read_schema(path).equals(pa.schema(columns)), path
    assert seen == 2 * len(run.clusters) + 2
    # whatever is not data has a name that a reader of the whole folder skips
    for part in ("kmeans", "pairwise", "duplicates", "kept"):
        for path in (run.output / part).rglob("*"):
            if path.is_file() and path.suffix != ".parquet":
                assert any(name.startswith("_") for name in path.relative_to(run.output).parts), path


def test_without_eps_only_the_three_original_columns_are_written(tmp_path):
    source = write_parquet(tmp_path / "in.parquet", twin_table())
    result = deduplicate(source, str(tmp_path / "out"))
    schema = pq.read_schema(tmp_path / "out" / "pairwise" / "cluster_0.parquet")
    assert schema.names == ["id", "max_id", "cosine_sim_score"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"_done", "_plan", "kmeans", "pairwise", "run.json"}
    assert (result.eps, result.n_duplicates, result.n_rejected) == (None, 0, 0)


def test_run_json_holds_what_is_promised(runs):
    run = runs("hard")
    text = (run.output / "run.json").read_text()
    record = json.loads(text)
    assert record["format_version"] == 1
    assert record["parameters"]["eps"] == EPS
    assert record["parameters"]["n_clusters"] == run.n_clusters
    assert {"untwin", "python", "numpy", "pyarrow"} <= set(record["packages"])
    assert len(record["input"]["digest"]) == 64
    rows = record["rows"]
    assert rows["input"] == rows["kept"] + rows["duplicates"] + rows["rejected"]
    assert (rows["kept"], rows["duplicates"]) == (run.result.n_kept, run.result.n_duplicates)
    names = [stage["name"] for stage in record["stages"]]
    assert names[0] == "sample"
    assert names[-1] == "remove"
    assert all(stage["seconds"] >= 0 and stage["rows_per_second"] >= 0 for stage in record["stages"])
    assert record["peak_memory_bytes"] > 10**7
    sizes = [len(truth.score) for truth in run.truth.values()]
    found = record["clusters"]
    assert (found["min"], found["median"], found["max"]) == (min(sizes), np.median(sizes), max(sizes))
    l2 = np.concatenate([rows["l2_dist_to_cent"].to_numpy() for rows in run.clusters.values()])
    cosine = np.concatenate([rows["cosine_dist_to_cent"].to_numpy() for rows in run.clusters.values()])
    assert record["kmeans"]["inertia"] == pytest.approx(float((l2.astype(float) ** 2).sum()), rel=1e-5)
    assert record["kmeans"]["mean_cosine_to_centroid"] == pytest.approx(1 - float(cosine.mean()), abs=1e-5)
    assert 0 < record["kmeans"]["sample_rows"] <= rows["input"]
    assert len(record["eps_table"]) == 14


def test_random_orders_rows_by_id_and_seed_alone(tmp_path):
    rng = np.random.default_rng(5)
    ids = [f"clip-{i}" for i in range(200)]
    X = rng.standard_normal((200, 8))
    first = write_parquet(tmp_path / "first.parquet", table_of(ids, X))
    other = write_parquet(tmp_path / "other.parquet", table_of(ids[::-1], rng.standard_normal((200, 8))))

    def order(source, name, **options):
        deduplicate(source, str(tmp_path / name), eps=EPS, which_to_keep="random", **options)
        return pq.read_table(tmp_path / name / "pairwise" / "cluster_0.parquet")["id"].to_pylist()

    base = order(first, "a")
    assert sorted(base) == sorted(ids)
    assert base != sorted(base)
    assert order(other, "b") == base
    assert order(first, "c", seed=43) != base


def test_rank_by_puts_nulls_last_and_breaks_ties_by_id_in_the_direction_of_the_last_column(tmp_path):
    # six copies of one vector: only the best-ranked stays
    ids = ["a", "b", "c", "d", "e", "f"]
    columns = {
        "length": pa.array([5, None, 9, 9, 9, 2], pa.int32()),
        "size": pa.array([1.0, 99.0, 3.0, 7.0, 7.0, float("nan")], pa.float64()),
    }
    source = write_parquet(tmp_path / "in.parquet", table_of(ids, [[1, 2, 3]] * 6, **columns))
    ranks = {
        "length:desc,size:desc": ["e", "d", "c", "a", "f", "b"],
        "length:desc,size:asc": ["c", "d", "e", "a", "f", "b"],
        "length:asc": ["f", "a", "c", "d", "e", "b"],
        "size:desc": ["b", "e", "d", "c", "a", "f"],
        "id:desc": ["f", "e", "d", "c", "b", "a"],
    }
    for number, (rule, wanted) in enumerate(ranks.items()):
        out = tmp_path / f"out{number}"
        deduplicate(source, str(out), eps=EPS, rank_by=rule)
        found = pq.read_table(out / "pairwise" / "cluster_0.parquet")
        assert found["id"].to_pylist() == wanted, rule
        assert found["max_id"].to_pylist() == [wanted[0]] * 6
        assert found["cosine_sim_score"].to_pylist() == [0, 1, 1, 1, 1, 1]
        assert ids_of(out / "kept") == [wanted[0]]
        assert witnesses(out) == dict.fromkeys(wanted[1:], wanted[0])


def test_chain_of_neighbours(tmp_path):
    angles = np.deg2rad(15.0) * np.arange(6)  # neighbours at cosine 0.966, next but one at 0.866
    ids = [f"p{i}" for i in range(6)]
    source = write_parquet(tmp_path / "in.parquet", table_of(ids, np.stack((np.cos(angles), np.sin(angles)), 1)))
    for compare_to, kept in (("ranked", ["p0"]), ("kept", ["p0", "p2", "p4"])):
        out = tmp_path / compare_to
        deduplicate(source, str(out), eps=0.05, rank_by="id:asc", compare_to=compare_to)
        assert ids_of(out / "kept") == kept
    assert witnesses(tmp_path / "kept") == {"p1": "p0", "p3": "p2", "p5": "p4"}
    assert witnesses(tmp_path / "ranked") == {"p1": "p0", **dict.fromkeys(["p2", "p3", "p4", "p5"])}
    groups = pq.read_table(tmp_path / "ranked" / "groups.parquet")
    assert groups["id"].to_pylist() == ["p0", "p1"]


def odd_columns():
    """A column of every kind of type, twelve rows."""
    n = 12
    some = [None if i % 5 == 4 else i for i in range(n)]
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5, 678901)
    return {
        "bool": pa.array([None if i is None else i % 2 == 0 for i in some]),
        "uint8": pa.array(some, pa.uint8()),
        "half": pa.array([None if i is None else np.float16(i / 4) for i in some], pa.float16()),
        "price": pa.array([None if i is None else decimal.Decimal(i) / 4 for i in some], pa.decimal128(20, 6)),
        "day": pa.array([None if i is None else moment.date() for i in some], pa.date32()),
        "when": pa.array([None if i is None else moment for i in some], pa.timestamp("us", "UTC")),
        "nano": pa.array([None if i is None else i * 10**18 + 1 for i in some[:9]] + [None] * 3, pa.timestamp("ns")),
        "clock": pa.array(some, pa.time64("us")),
        "span": pa.array(some, pa.duration("ms")),
        "blob": pa.array([None if i is None else bytes([0, i, 255]) for i in some], pa.binary()),
        "text": pa.array([None if i is None else f"naïve {i}" for i in some], pa.large_string()),
        "kind": pa.array(["x", None, "y"] * 4).dictionary_encode(),
        "tags": pa.array([[], None, ["a", None]] * 4, pa.list_(pa.string())),
        "box": pa.array([{"w": 1, "h": [2.5]}, None, {"w": None, "h": None}] * 4),
        "map": pa.array([[("k", 1)], None, []] * 4, pa.map_(pa.string(), pa.int32())),
        "nothing": pa.nulls(n),
        "centroid": pa.array(some, pa.int32()),
        "score": pa.array([float("nan"), -0.0, float("inf")] * 4),
    }


@pytest.mark.parametrize("layout", ["compact", "mirror"])
def test_columns_of_every_type_come_through_unchanged(tmp_path, layout):
    table = twin_table(**odd_columns())
    field = table.schema.field("uint8").with_metadata({"unit": "one"})
    table = table.cast(table.schema.set(table.schema.get_field_index("uint8"), field))
    table = table.replace_schema_metadata({"made_by": "somebody"})
    folder = write_split(tmp_path / "in", table, 3, row_group_size=2)
    out = tmp_path / "out"
    deduplicate(folder, str(out), eps=EPS, rank_by="id:desc", kept=layout)
    kept = read_folder(out / "kept")
    wanted = table.slice(6)
    assert kept.schema.equals(table.schema)
    assert kept.schema.metadata[b"made_by"] == b"somebody"
    assert kept.schema.field("uint8").metadata[b"unit"] == b"one"
    for name in table.column_names:
        if name == "score":  # NaN is not equal to itself
            assert kept[name].to_numpy().tobytes() == wanted[name].to_numpy().tobytes()
        else:
            assert kept[name].equals(wanted[name]), name


def test_rejected_kept_and_duplicates_add_up_when_rows_of_all_kinds_are_mixed(tmp_path):
    ids = [*twin_ids(), "bad1", "bad2", "row03", None]
    vectors = [*twin_vectors(), None, [0.0] * 8, twin_vectors()[3], [1.0] * 8]
    rng = np.random.default_rng(0)
    table = table_of(ids, vectors).take(pa.array(rng.permutation(16)))
    out = tmp_path / "out"
    result = deduplicate(write_split(tmp_path / "in", table, 5), str(out), eps=EPS, rank_by="id:asc")
    assert (result.n_rows, result.n_kept, result.n_duplicates, result.n_rejected) == (16, 6, 6, 4)
    everything = [*ids_of(out / "kept"), *ids_of(out / "duplicates"), *ids_of(out / "rejected")]
    assert sorted(everything, key=str) == sorted(ids, key=str)
    in_order = list(dict.fromkeys(table["id"].to_pylist()))
    assert ids_of(out / "kept") == [name for name in in_order if name in TWINS.values()]
    assert witnesses(out) == TWINS
