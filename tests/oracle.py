"""The answer by its definition, with plain NumPy in float64: the oracle of tests. No tests here, and no untwin."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Truth:
    """The answer for one cluster by brute force; positions are ranks, -1 is none."""

    X: np.ndarray
    score: np.ndarray
    match: np.ndarray
    kept: np.ndarray
    witness: np.ndarray

    def similarity(self, i, j):
        return np.minimum((self.X[i] * self.X[j]).sum(axis=-1), 1)


def brute_force(X, eps, compare_to):
    """Take the rows of `X` in order, each against all before it."""
    X = X.astype(np.float64)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    S = np.minimum(X @ X.T, 1.0)
    limit = np.float32(1 - eps)
    n = len(X)
    score, match = np.zeros(n), np.zeros(n, int)
    kept, witness = np.ones(n, bool), np.full(n, -1)
    for i in range(1, n):
        match[i] = np.argmax(S[i, :i])
        score[i] = S[i, match[i]]
        staying = np.flatnonzero(kept[:i])
        best = staying[np.argmax(S[i, staying])]
        near = np.float32(S[i, best]) >= limit
        if near:
            witness[i] = best
        kept[i] = not (near if compare_to == "kept" else np.float32(score[i]) >= limit)
    witness[kept] = -1
    return Truth(X, score, match, kept, witness)


def ranked_rows(rows, keys, directions):
    """Positions of rows in the order of (value, id): all directions; None last; ties by id as the last column."""
    order = sorted(range(len(rows)), key=lambda at: rows[at]["id"], reverse=not directions[-1])
    for key, ascending in reversed(list(zip(keys, directions, strict=True))):
        known = [at for at in order if rows[at][key] is not None]
        known.sort(key=lambda at, key=key: rows[at][key], reverse=not ascending)
        # list.sort(reverse=True) keeps the order of equal items, too
        order = known + [at for at in order if rows[at][key] is None]
    return order


def nearest_to(X, centroids):
    """Squared distances of rows to all centroids, (n, K) float64."""
    C = centroids.astype(np.float64)
    return (X**2).sum(axis=1)[:, None] + (C**2).sum(axis=1) - 2 * X @ C.T


def as_unit(values):
    """A vector (no null, not of zero norm) scaled to length 1 in float64, whatever its norm."""
    values = np.asarray(values, np.float64)
    values = values / np.abs(values).max()
    return values / np.linalg.norm(values)


@dataclass
class Judgement:
    """What must become of the rows of an input, before any of them are compared.

    Attributes:
        rows: All rows in order: `id`, `file`, `row`, `vector`, and all columns in `values`.
        rejected: Position of a row → the reasons that are right.
        good: Positions of the rows that are compared.
        errors: Names of errors, of which one must be raised, if there are any.
        may_fail: Names of errors that are right, too, where rounding decides.
    """

    rows: list
    rejected: dict = field(default_factory=dict)
    good: list = field(default_factory=list)
    errors: set = field(default_factory=set)
    may_fail: set = field(default_factory=set)


def _reason(row, dim):
    if row["id"] is None:
        return "null id"
    if row["vector"] is None:
        return "null embedding"
    if len(row["vector"]) == 0:
        return "empty embedding"
    if len(row["vector"]) != dim:
        return "embedding has the wrong length"
    if any(value is None for value in row["vector"]):
        return "embedding contains a null value"
    values = np.asarray(row["vector"], np.float64)
    if np.isnan(values).any():
        return "embedding contains NaN"
    if np.isinf(values).any():
        return "embedding contains an infinite value"
    return "" if values.any() else "embedding has zero norm"


def _kind(column_type):
    """What the ids of a type mean: only ids of one kind can be compared."""
    if pa.types.is_dictionary(column_type):
        return _kind(column_type.value_type)
    return (
        "text"
        if pa.types.is_string(column_type) or pa.types.is_large_string(column_type)
        else ("integer" if pa.types.is_integer(column_type) else str(column_type).removeprefix("large_"))
    )


def _read(path):
    """A file's rows; text other than ids as bytes, because damaged text is kept as it is."""
    if path.endswith(".jsonl"):
        rows = [json.loads(line) for line in Path(path).read_text().split("\n") if line]
        names = dict.fromkeys(name for row in rows for name in row) or ["id", "embedding"]
        types = {"embedding": pa.list_(pa.float64())}
        return pa.table({name: pa.array([row.get(name) for row in rows], types.get(name)) for name in names})
    table = pq.ParquetFile(path).read()
    for index, column in enumerate(table.schema):
        if pa.types.is_string(column.type) and column.name != "id":
            table = table.set_column(index, column.name, table.column(index).cast(pa.binary()))
    return table


def judge(paths, options):
    """Read Parquet files in order, and say of each row whether it can be judged, by the words of the documentation."""
    found = Judgement([])
    kinds, widths = set(), set()
    for path in paths:
        table = _read(path)
        if not pa.types.is_null(table.schema.field("id").type):
            kinds.add(_kind(table.schema.field("id").type))
        if "embedding" not in table.column_names:
            found.errors.add("SchemaError")
            continue
        embedding = table.schema.field("embedding").type
        if not pa.types.is_floating(embedding.value_type):
            found.errors.add("SchemaError")
        widths.add(embedding.list_size if pa.types.is_fixed_size_list(embedding) else None)
        for number, values in enumerate(table.to_pylist()):
            found.rows.append(
                {"id": values["id"], "file": path, "row": number, "vector": values["embedding"], "values": values}
            )
    if len(kinds) > 1:
        found.errors.add("SchemaError")
    if found.errors:
        return found
    if not found.rows:
        found.errors.add("InputNotFoundError")
    dim = options["embedding_dim"]
    if dim and None not in widths and dim not in widths:
        found.errors.add("ParameterError")
    if dim is None:
        lengths = Counter(
            len(row["vector"]) for row in found.rows if row["vector"] and not _reason(row, len(row["vector"]))
        )
        dim = max(lengths, key=lambda length: (lengths[length], length), default=0)
    n_clusters = 1 if options["n_clusters"] == "auto" else options["n_clusters"]
    first = {}
    for at, row in enumerate(found.rows):
        reason = _reason(row, dim)
        if reason:
            found.rejected[at] = {reason}
            continue
        found.good.append(at)
    if not found.good or 2 * len(found.rejected) > len(found.rows):
        found.errors.add("TooManyRejectedError")
    if n_clusters > len(found.good):
        found.errors.add("ParameterError")
    for at in list(found.good):
        row = found.rows[at]
        row["unit"] = as_unit(row["vector"])
        other = first.setdefault(row["id"], row)
        if other is row:
            continue
        found.good.remove(at)
        equal = np.array_equal(np.asarray(row["vector"], float), np.asarray(other["vector"], float))
        close = np.abs(row["unit"] - other["unit"]).max() < 1e-6
        same, another = "repeated row", "repeated id with another vector"
        found.rejected[at] = {same} if equal else {same, another} if close else {another}
        if not equal and options["on_repeated_id"] == "error":
            (found.may_fail if close else found.errors).add("RepeatedIdError")
    return found


def _rank(rows, options, order):
    """Positions of a cluster's rows, best first; for a random order, the one that was found."""
    if options["rank_by"]:
        keys = [part.split(":") for part in options["rank_by"].split(",")]
        return ranked_rows(rows, [key for key, _ in keys], [direction == "asc" for _, direction in keys])
    if options["which_to_keep"] == "random":
        place = {name: rank for rank, name in enumerate(order)}
        return sorted(range(len(rows)), key=lambda at: place[rows[at]["id"]])
    return ranked_rows(rows, ["cosine_dist_to_cent"], [options["which_to_keep"] == "easy"])


def _check_cluster(rows, found, removed, options, number):
    """The results of a cluster, whose rows are in rank order, are those of brute force; positions of kept rows."""
    X = np.array([row["embedding"] for row in rows], np.float64)
    truth = brute_force(X, options["eps"], options["compare_to"])
    place = {row["id"]: rank for rank, row in enumerate(rows)}
    assert [row["id"] for row in found] == list(place)
    S = np.minimum(truth.X @ truth.X.T, 1)
    limit = np.float32(1 - options["eps"])
    border = (float(limit) + float(np.nextafter(limit, np.float32(0)))) / 2
    assert found[0]["max_id"] == rows[0]["id"]
    for i, row in enumerate(found):
        assert abs(row["cosine_sim_score"] - truth.score[i]) < 1e-6
        if i:
            assert place[row["max_id"]] < i
            assert S[i, place[row["max_id"]]] > truth.score[i] - 1e-12
    if (np.abs(S - border) < 1e-12).any():
        return  # float64 in another order of additions may decide otherwise
    for i, (row, result) in enumerate(zip(rows, found, strict=True)):
        listed = removed.get(row["id"])
        assert (listed is None) == bool(truth.kept[i])
        witness = int(truth.witness[i])
        assert (result["kept_id"] is None) == (witness < 0)
        if listed is None:
            continue
        assert listed["centroid"] == number
        assert listed["kept_id"] == result["kept_id"]
        if witness >= 0:
            mine = place[listed["kept_id"]]
            assert truth.kept[mine]
            assert mine < i
            assert S[i, mine] > S[i, witness] - 1e-12
            assert abs(listed["cosine_sim_score"] - S[i, mine]) < 1e-6


def _readable(values):
    """A row as text in which equal values look equal, NaN too; what a file has no column for is as null."""
    return repr(sorted((name, value) for name, value in values.items() if value is not None))


def _all_rows(folder):
    files = sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())
    return [row for path in files for row in _read(path).to_pylist()]


def check_output(output, given, options, skipped=()):
    """Everything in a finished output is the right answer to the rows of a `Judgement`; `skipped` files are listed."""
    output = Path(output)
    run = json.loads((output / "run.json").read_text())
    rejected = {}
    for name in run["files"]["rejected"]:
        for row in pq.ParquetFile(output / name).read().to_pylist():
            assert (row["file"], row["row"]) not in rejected
            rejected[row["file"], row["row"]] = row
    for path in skipped:
        row = rejected.pop((path, None))
        assert row["id"] is None
        assert row["reason"].startswith("file skipped: ")
    assert run["input"]["skipped_files"] == len(skipped)
    assert len(rejected) == len(given.rejected)
    for at, reasons in given.rejected.items():
        row = rejected[given.rows[at]["file"], given.rows[at]["row"]]
        assert row["id"] == given.rows[at]["id"]
        assert row["reason"] in reasons

    removed = {
        row["id"]: row
        for name in run["files"]["duplicates"]
        for row in pq.ParquetFile(output / name).read().to_pylist()
    }
    centroids = np.load(output / "kmeans" / "_centroids.npy")
    seen = []
    for path in sorted((output / "kmeans").glob("centroid=*/*.parquet")):
        number = int(path.parent.name.removeprefix("centroid="))
        rows = pq.ParquetFile(path).read().to_pylist()
        X = np.array([row["embedding"] for row in rows], np.float64)
        for row, own in zip(rows, X, strict=True):
            seen.append(row["_row"])
            source = given.rows[row["_row"]]
            assert row["id"] == source["id"]
            assert np.abs(own - source["unit"]).max() < 1e-6
            assert "size" not in row or row["size"] == source["values"]["size"]
        distances = nearest_to(X, centroids)
        assert (distances[:, number] <= distances.min(axis=1) + 1e-6).all()
        assert np.allclose([row["l2_dist_to_cent"] ** 2 for row in rows], distances[:, number], rtol=0, atol=1e-5)
        found = pq.ParquetFile(output / "pairwise" / f"cluster_{number}.parquet").read().to_pylist()
        order = _rank(rows, options, [row["id"] for row in found])
        _check_cluster([rows[at] for at in order], found, removed, options, number)
    assert sorted(seen) == given.good

    stays = [row for at, row in enumerate(given.rows) if at in set(given.good) and row["id"] not in removed]
    kept = _all_rows(output / "kept")
    assert [_readable(row) for row in kept] == [_readable(row["values"]) for row in stays]
    counts = run["rows"]
    assert (counts["input"], counts["kept"], counts["duplicates"], counts["rejected"]) == (
        len(given.rows),
        len(stays),
        len(removed),
        len(rejected),
    )
    assert counts["kept"] + counts["duplicates"] + counts["rejected"] == counts["input"]
    groups = pq.ParquetFile(output / "groups.parquet").read().to_pylist()
    members = {row["id"]: row["group_id"] for row in groups}
    heads = {row["group_id"]: row["id"] for row in groups if row["role"] == "kept"}
    with_witness = {name: row["kept_id"] for name, row in removed.items() if row["kept_id"] is not None}
    assert {name: heads[members[name]] for name in with_witness} == with_witness
    assert len(groups) == len(with_witness) + len(set(with_witness.values()))
