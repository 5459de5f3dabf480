"""One row of a finished run: why it was removed, or why it stays."""

from __future__ import annotations

import ast
import functools
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from untwin.core import is_duplicate
from untwin.errors import ParameterError
from untwin.jobs.output import OutputFolder
from untwin.jobs.record import probes_of
from untwin.jobs.report import rank_reason
from untwin.jobs.report_rows import Finished, Values, carried_values, other_columns, text_of
from untwin.jobs.run import parameters_of
from untwin.stages import checks
from untwin.stages.pairwise import as_text
from untwin.stages.ranking import RankingStrategy
from untwin.storage.columns import decode_ids
from untwin.storage.files import FoundFile, Storage, is_remote, normalize_path, read_many, redact
from untwin.storage.inputs import Span, input_format
from untwin.storage.listing import Listing
from untwin.storage.partitions import ROW, iterate_partition, read_array, read_table, result_path

_BATCH = 1 << 18
_REMOTE_READS = 16
_MOST_SEARCHED = 20_000_000
"""Rows among which similar ids are looked for, where there is no such id."""
_MOST_ALIKE = 5
_EPS_STEP = 1e-6


@dataclass(frozen=True)
class Beside:
    """A row that ranks before the one shown.

    Attributes:
        id: As text.
        score: Similarity of the two.
        reason: Why it ranks before; empty where that is not known any more.
    """

    id: str
    score: float
    reason: str


@dataclass(frozen=True)
class SetAside:
    """Where a row of that id is that could not be judged, and why not; the row is counted from 0."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True)
class Shown:
    """What a finished run knows of the row, or rows, of an id.

    Attributes:
        output: The folder.
        id: As text.
        outcome: `duplicate`, `kept`, `rejected`, or `compared` for a run without eps, in which nothing is decided.
        eps: Threshold in force; None if the run had none.
        compare_to: `kept` or `ranked`.
        probes: Clusters that a row was compared with.
        centroid: Its cluster; None where that is not known any more, or the row was not compared.
        rank: Its place in the order of the cluster's rows, 1 for the best; None as above.
        cluster_rows: Rows of the cluster; None as above.
        order: The order of rows in words, best first.
        ranked_by: Names and values of the columns that it is ranked by, as text.
        witness: The row that stays, because of which this one goes.
        nearest: The better-ranked row most similar to it, whether that stays or not.
        removed_from: The least eps, in steps of 0.000001, at which some better-ranked row is within eps. Under
            `ranked` the row is removed from there on; under `kept` it can be, but stays below in any case.
        group: The kept row of its group, then its duplicates with their scores, most similar first, up to the limit.
        n_group: All duplicates of that group.
        rejected: Rows with this id that could not be judged.
        columns: Names and values of the row's first other columns, as text.
        gone: What is not known any more, and why.
    """

    output: str
    id: str
    outcome: str
    eps: float | None
    compare_to: str
    probes: int
    centroid: int | None = None
    rank: int | None = None
    cluster_rows: int | None = None
    order: str = ""
    ranked_by: tuple[tuple[str, str], ...] = ()
    witness: Beside | None = None
    nearest: Beside | None = None
    removed_from: float | None = None
    group: tuple[tuple[str, float], ...] = ()
    n_group: int = 0
    rejected: tuple[SetAside, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    gone: tuple[str, ...] = ()


def show(
    output_path: str | os.PathLike[str],
    id: str | int | bytes,
    *,
    limit: int = 20,
    storage_options: Mapping[str, Any] | None = None,
) -> Shown:
    """Say why a row was removed, or why it stays.

    Args:
        output_path: Output folder of a finished run, or of `untwin.apply`.
        id: Of the row. Text stands for whole numbers, too, and for bytes: as Python writes them, as hexadecimal digits
            after `0x`, or the text itself.
        limit: Duplicates of its group that are listed.
        storage_options: For fsspec.

    Raises:
        ParameterError: No finished run there, or no such row in it; names ids that are alike.
    """
    checks.whole("limit", limit, 0)
    folder = OutputFolder(Storage(dict(storage_options or {})), normalize_path(os.fspath(output_path)))
    run = folder.require_run()
    dropped = not any(name.startswith("cluster_") for name in folder.storage.names(folder.file("pairwise")))
    source = None if dropped else Finished.open(folder)
    kind = source.listing.id_type if source else Listing.read(folder.storage, folder.listing_path).id_type
    wanted = _id_of(id, kind)
    parameters = run["parameters"]
    eps = parameters["eps"]
    removed = _first(folder, run["files"]["duplicates"], wanted) if eps is not None else None
    rejected = tuple(_set_aside(folder, run["files"]["rejected"], wanted))
    facts: dict[str, Any] = {}
    if source is not None:
        place = None
        if removed is not None:
            place = _find(source, wanted, [removed["centroid"].as_py()]).get(0)
        place = place or _find(source, wanted).get(0)
        if place is not None:
            facts = _compared(source, wanted, *place)
    if not facts and removed is not None:
        facts["centroid"] = removed["centroid"].as_py()
        if removed["kept_id"].is_valid:
            facts["witness"] = Beside(as_text(removed["kept_id"]), removed["cosine_sim_score"].as_py(), "")
    stays = removed is None and (bool(facts) or (dropped and not rejected and _in_kept(folder, run, wanted, kind)))
    if not (removed or stays or rejected):
        raise ParameterError(_unknown(folder, run, source, wanted))
    outcome = "duplicate" if removed else "rejected" if not stays else "kept" if eps is not None else "compared"
    if eps is not None and (removed or stays):
        head = removed["kept_id"] if removed else wanted[0]
        if head.is_valid:
            facts["group"], facts["n_group"] = _group(folder, head, limit)
    if dropped and outcome != "rejected":
        facts["gone"] = ("rank, ranking columns and the most similar row: kmeans/ and pairwise/ (drop_intermediate)",)
    return Shown(
        output=redact(folder.path),
        id=as_text(wanted[0]),
        outcome=outcome,
        eps=eps,
        compare_to=parameters["compare_to"],
        probes=probes_of(run),
        order=_order(parameters_of(run, {}).ranking(), parameters["which_to_keep"]),
        rejected=rejected,
        **facts,
    )


def _id_of(given: object, kind: pa.DataType) -> pa.Array:
    """The id as an array of one, of the type that ids have in this run."""
    value = given
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    try:
        if isinstance(given, str) and pa.types.is_integer(kind):
            value = int(given)
        elif isinstance(given, str) and binary:
            if given.startswith(("b'", 'b"')):
                value = ast.literal_eval(given)
            else:
                value = bytes.fromhex(given[2:]) if given.startswith("0x") else given.encode()
        wanted = bytes if binary else int if pa.types.is_integer(kind) else str
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise TypeError
        return pa.array([value], kind)
    except (pa.ArrowException, TypeError, ValueError, SyntaxError, OverflowError) as error:
        raise ParameterError(f"id is {given!r}, but the ids of this run are of type {kind}") from error


def _first(folder: OutputFolder, names: Sequence[str], wanted: pa.Array) -> dict[str, pa.Scalar] | None:
    """The row of an id in files that are sorted by id: only row groups that can hold it are read."""
    for name in names:
        table = read_table(folder.storage, folder.file(name), condition=pc.field("id") == wanted[0])
        if table.num_rows:
            return {column: table[column][0] for column in table.column_names}
    return None


def _set_aside(folder: OutputFolder, names: Sequence[str], wanted: pa.Array) -> Iterator[SetAside]:
    for name in names:
        table = read_table(folder.storage, folder.file(name), condition=pc.field("id") == wanted[0])
        for row in table.select(["file", "row", "reason"]).to_pylist():
            yield SetAside(**row)


def _find(source: Finished, wanted: pa.Array, centroids: Sequence[int] | None = None) -> dict[int, tuple[int, int]]:
    """Cluster and place in rank order of some different ids, by their position; several clusters are read at a time."""
    storage, folder = source.folder.storage, source.folder.file("pairwise")
    found: dict[int, tuple[int, int]] = {}
    done = threading.Event()

    def look(centroid: int) -> None:
        low = 0
        if done.is_set():
            return
        for batch in iterate_partition(storage, [result_path(folder, centroid)], ["id"], _BATCH):
            places = pc.index_in(batch.column(0), value_set=wanted)
            if places.null_count < len(places):
                places = pc.fill_null(places, -1).to_numpy(zero_copy_only=False)
                found.update({int(places[row]): (centroid, low + int(row)) for row in np.flatnonzero(places >= 0)})
            low += batch.num_rows
        if len(found) == len(wanted):
            done.set()

    every = [centroid for unit in source.units for centroid, _ in unit.clusters] if centroids is None else centroids
    with ThreadPoolExecutor(_REMOTE_READS if is_remote(folder) else os.cpu_count()) as pool:
        for _ in pool.map(look, every):
            pass
    return found


def _compared(source: Finished, wanted: pa.Array, centroid: int, place: int) -> dict[str, Any]:
    """What is known of a row that was compared: its place, and the rows before it that matter."""
    storage, parameters = source.folder.storage, source.run["parameters"]
    path = result_path(source.folder.file("pairwise"), centroid)
    table = read_table(storage, path, condition=pc.field("id") == wanted[0])
    row = {name: table[name][0] for name in table.column_names}
    scores = {"max_id": row["cosine_sim_score"], "kept_id": row.get("kept_sim_score")}
    # the first row of a cluster has no better-ranked one
    named = {
        name: row[name] for name in scores if name in row and row[name].is_valid and not row[name].equals(wanted[0])
    }
    ids = pa.array([wanted[0], *named.values()], wanted.type).unique()
    places = _find(source, ids, [centroid])
    if len(places) < len(ids):  # compared across clusters
        places = _find(source, ids)
    centroids = np.array([places[number][0] for number in range(len(ids))], np.int64)
    rows = _row_numbers(source, [places[number] for number in range(len(ids))])
    carried = carried_values(source, centroids, rows)
    ranking = parameters_of(source.run, {}).ranking()

    def values(number: int) -> Values:
        return {**carried.get(int(rows[number]), {}), parameters["id_field"]: as_text(ids[number])}

    beside: dict[str, Beside] = {}
    for name, value in named.items():
        number = ids.index(value).as_py()
        reason = rank_reason(
            ranking,
            values(number),
            values(0),
            parameters["which_to_keep"],
            same_cluster=bool(centroids[number] == centroid),
        )
        beside[name] = Beside(as_text(value), scores[name].as_py(), reason)
    columns = other_columns(source, rows[:1], carried)[0]
    own = values(0)
    ranked_by = [name for name in dict.fromkeys(ranking.metadata_cols) if name in own]
    sizes = {number: n_rows for unit in source.units for number, n_rows in unit.clusters}
    nearest = beside.get("max_id")
    return {
        "centroid": centroid,
        "rank": place + 1,
        "cluster_rows": sizes[centroid],
        "ranked_by": tuple((name, text_of(own[name])) for name in ranked_by),
        "witness": beside.get("kept_id"),
        "nearest": nearest,
        "removed_from": None if nearest is None else _removed_from(nearest.score),
        "columns": tuple((name, value) for name, value in columns if name != ROW),
    }


def _row_numbers(source: Finished, places: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """The numbers of rows in the order of the input."""
    start = {
        centroid: (unit.rows_path, before)
        for unit in source.units
        for (centroid, _), before in zip(
            unit.clusters, np.cumsum([0, *(rows for _, rows in unit.clusters)]).tolist(), strict=False
        )
    }
    read = functools.cache(functools.partial(read_array, source.folder.storage))
    numbers = [int(read(start[centroid][0])[start[centroid][1] + place]) for centroid, place in places]
    return np.array(numbers, np.int64)


def _removed_from(score: float) -> float | None:
    """The least eps, in steps, at which a score is within eps; None if there is none."""
    if score <= 0:
        return None
    step = max(1, math.floor((1 - score) / _EPS_STEP))
    while not is_duplicate(np.array([score], np.float32), round(step * _EPS_STEP, 6))[0]:
        step += 1
    return round(step * _EPS_STEP, 6)


def _order(ranking: RankingStrategy, which_to_keep: str | None) -> str:
    if ranking.strategy == "random":
        return f"by chance (seed {ranking.random_seed})"
    if which_to_keep is not None:
        return f"{'nearest to' if ranking.ascending[0] else 'farthest from'} the cluster's centre first"
    columns = zip(ranking.metadata_cols, ranking.ascending, strict=True)
    return ", then ".join(f"{'smallest' if ascending else 'largest'} {name} first" for name, ascending in columns)


def _group(folder: OutputFolder, kept: pa.Scalar, limit: int) -> tuple[tuple[tuple[str, float], ...], int]:
    """A kept row and its duplicates, most similar first, and how many these are; nothing if there are none."""
    path, storage = folder.file("groups.parquet"), folder.storage
    head = read_table(storage, path, ["group_id"], (pc.field("id") == kept) & (pc.field("role") == "kept"))
    if not head.num_rows:
        return (), 0
    members = read_table(storage, path, condition=pc.field("group_id") == head["group_id"][0])
    members = members.filter(pc.equal(members["role"], "duplicate"))
    # they are sorted by id, which stays the order of equal scores
    order = np.argsort(-members["score"].to_numpy(), kind="stable")[:limit]
    shown = members.take(pa.array(order))
    listed = [(as_text(id_), score.as_py()) for id_, score in zip(shown["id"], shown["score"], strict=True)]
    return ((as_text(kept), 1.0), *listed), members.num_rows


def _in_kept(folder: OutputFolder, run: Mapping[str, Any], wanted: pa.Array, kind: pa.DataType) -> bool:
    """Whether a row is among those that stay, where only kept/ can tell."""
    storage, format_ = folder.storage, input_format(run["parameters"]["input_filetype"])
    path, id_field = folder.file("kept"), run["parameters"]["id_field"]
    if run["parameters"]["kept"] == "none" or not storage.is_folder(path):
        return False
    files = {file.path: file for file in format_.select(storage.find(path))}

    def holds(path: str) -> bool:
        file: FoundFile = files[path]
        facts = format_.inspect(storage, file)
        if not facts.group_rows:
            return False
        span = Span(path, 0, facts.group_rows, facts.group_starts, file.size, file.size, 0, 0)
        batches = format_.read(storage, span, [id_field], _BATCH)
        return any(pc.index(decode_ids(batch[id_field], kind), wanted[0]).as_py() >= 0 for batch in batches)

    return any(read_many(holds, list(files)))


def _unknown(folder: OutputFolder, run: Mapping[str, Any], source: Finished | None, wanted: pa.Array) -> str:
    message = f"{redact(folder.path)}: no row with the id {as_text(wanted[0])!r}"
    if source is None and run["parameters"]["kept"] == "none":
        return f"{message} was removed or rejected; whether there is one that stays is not known: there is no kept/"
    alike = _alike(source, as_text(wanted[0])) if source is not None and not pa.types.is_integer(wanted.type) else []
    return f"{message}; there {'is' if len(alike) == 1 else 'are'} {', '.join(map(repr, alike))}" if alike else message


def _alike(source: Finished, text: str) -> list[str]:
    """Some ids that contain a text, or the name of a file without its ending, or that begin like it."""
    kind = source.listing.id_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)) or int(source.sizes.sum()) > _MOST_SEARCHED:
        return []
    storage, folder = source.folder.storage, source.folder.file("pairwise")
    stem = os.path.splitext(text.rstrip("/").rpartition("/")[2])[0]  # noqa: PTH122 - of an id, not of a path
    begin = text[: max(3, len(text) * 2 // 3)]
    tests = [functools.partial(pc.match_substring, pattern=part, ignore_case=True) for part in (text, stem) if part]
    tests.append(functools.partial(pc.starts_with, pattern=begin))
    paths = [result_path(folder, centroid) for unit in source.units for centroid, _ in unit.clusters]
    with ThreadPoolExecutor(_REMOTE_READS if is_remote(folder) else os.cpu_count()) as pool:
        for test in tests:

            def some(path: str, test: functools.partial[Any] = test) -> list[str]:
                batches = iterate_partition(storage, [path], ["id"], _BATCH)
                return [as_text(id_) for batch in batches for id_ in batch.column(0).filter(test(batch.column(0)))]

            found = sorted({id_ for ids in pool.map(some, paths) for id_ in ids})
            if found:
                return found[:_MOST_ALIKE]
    return []
