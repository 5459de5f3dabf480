"""The report of a finished run: what is on the page is collected here, and the page is written beside the run."""

from __future__ import annotations

import heapq
import importlib
import importlib.util
import logging
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from untwin.backends.base import NoProgress, Progress
from untwin.errors import MissingExtraError, UntwinError
from untwin.jobs.embed import BEST_QUALITY, EmbedParameters
from untwin.jobs.output import OutputFolder
from untwin.jobs.parameters import RunParameters
from untwin.jobs.pictures import open_media, pictures
from untwin.jobs.record import now, probes_of
from untwin.jobs.report_rows import (
    Finished,
    RowSums,
    Values,
    carried_values,
    find_columns,
    iterate_results,
    largest_groups,
    locate,
    other_columns,
    sum_columns,
    text_of,
)
from untwin.jobs.result import Audit
from untwin.jobs.run import parameters_of
from untwin.media.encoder import BUILT_IN
from untwin.media.find import MediaFolder
from untwin.report.collect import (
    ScoreCounts,
    SmallestHashes,
    allot,
    per_step,
    slider_steps,
    spread_sample,
)
from untwin.report.data import Clip, Cluster, Group, Pair, Recall, Report, Source, Step
from untwin.stages.clustering import REPORT_SEED
from untwin.stages.ids import hash_ids
from untwin.stages.pairwise import as_text
from untwin.stages.ranking import RankingStrategy
from untwin.storage.files import Storage, is_remote, normalize_path, redact
from untwin.storage.lock import locked

_PAGE_PACKAGES = ("jinja2", "plotly")
_PAIRS, _PAIRS_WITH_PICTURES = 400, 160
"""A picture takes a tenth of a second and 10 kB."""
_PAIRS_OF_INTERVAL = 100
_GROUPS, _MEMBERS = 12, 24
_CLUSTERS, _CLUSTER_SIZES = 20, 500
_USUAL_EPS = 0.05
"""By which clusters are sorted in a run without eps."""
_SOURCES = 30
_BLOCK = 1 << 22
_log = logging.getLogger("untwin")
_DEFAULTS = {field.name: field.default for field in fields(RunParameters)}


def write_report(
    output_path: str | os.PathLike[str],
    *,
    group_by: str | None = None,
    media: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> str:
    """Write `report.html`, one page that shows what a finished run did and what other thresholds would do.

    Args:
        output_path: Output folder of a finished run, or of `untwin.apply`.
        group_by: Count duplicates for each value of this column of the input.
        media: Folder of the clips, local or a URL; rows are shown with pictures of their files, found by id. Default:
            that of a run on clips, if it is still there.
        storage_options: For fsspec.
        progress: Gets told how far the work is.

    Returns:
        Path of the page; an earlier one is replaced.

    Raises:
        MissingExtraError: The packages of the extra `report` are not installed.
        OutputInUseError: A run works there.
        UntwinError: No finished run there, its similarities are not there any more, or no such column.
    """
    page, _ = make_report(
        output_path, group_by=group_by, media=media, storage_options=storage_options, progress=progress
    )
    return page


def make_report(
    output_path: str | os.PathLike[str],
    *,
    group_by: str | None = None,
    media: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[str, Report]:
    """As `write_report`; returns also what is on the page."""
    renderer()
    folder = OutputFolder(Storage(dict(storage_options or {})), normalize_path(os.fspath(output_path)))
    folder.require_run()
    with locked(folder.storage, folder.path):
        return write_page(folder, group_by=group_by, media=media, progress=progress)


def write_page(
    folder: OutputFolder, *, group_by: str | None = None, media: str | None = None, progress: Progress | None = None
) -> tuple[str, Report]:
    """Collect and write, with the folder's lock held already."""
    report = collect_report(folder, group_by=group_by, media=media, progress=progress)
    folder.storage.write_bytes(folder.page_path, renderer()(report).encode(), durable=True)
    return folder.page_path, report


def renderer() -> Callable[[Report], str]:
    """What makes the page; MissingExtraError if it cannot work."""
    missing = [name for name in _PAGE_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"the report needs packages that are not installed ({', '.join(missing)}): pip install 'untwin[report]'"
        )
    render: Callable[[Report], str] = importlib.import_module("untwin.report.page").render
    return render


def collect_report(
    folder: OutputFolder, *, group_by: str | None = None, media: str | None = None, progress: Progress | None = None
) -> Report:
    """Everything that the page shows of a finished run, or of an answer of `untwin apply`.

    Reads the similarities twice (all, then the ids), and columns of sizes, durations and `group_by` once; takes two
    bytes of memory a row where there are such columns, six with `group_by`, besides bounded parts of the files.

    Args:
        folder: The run.
        group_by: Column to count duplicates by.
        media: Folder of the clips; default: that of a run on clips.
        progress: Gets told how far the work is.

    Raises:
        UntwinError: As `write_report`.
    """
    found = None if media is None else open_media(folder.storage, media)
    source = Finished.open(folder)
    run, parameters = source.run, source.run["parameters"]
    if media is None and parameters.get("media") is not None:
        media = parameters["media"]
        found = _media_of_run(folder.storage, media)
    eps: float | None = parameters["eps"]
    wanted = find_columns(source, group_by)
    steps = slider_steps(eps, probes_of(run))
    force = None if eps is None else steps.index(eps)
    counted = _count(source, steps, force, with_codes=bool(wanted.names), progress=progress or NoProgress())
    n_codes = counted.scores.table.size
    sums = sum_columns(source, wanted, counted.codes, n_codes) if wanted.names else None
    size = sums.wanted.size if sums else None
    duration = sums.wanted.duration if sums else None
    table_bytes = sums.bytes.reshape(-1, 2) if sums else np.zeros((0, 2), np.int64)
    table_seconds = sums.microseconds.reshape(-1, 2) if sums else np.zeros((0, 2), np.int64)

    groups = largest_groups(source, _GROUPS, _MEMBERS) if eps is not None else []
    pairs = _chosen_pairs(counted, force, _PAIRS if found is None else _PAIRS_WITH_PICTURES)
    ids = pa.concat_arrays([pairs["id"].combine_chunks(), pairs["other"].combine_chunks(), *(g[1] for g in groups)])
    ids = ids.unique()
    clips, rows, carried = _clips(source, ids)
    if found is not None:
        made = pictures(found, ids, progress or NoProgress())
        clips = [
            replace(clip, problem=one) if isinstance(one, str) else replace(clip, strip=one)
            for clip, one in zip(clips, made, strict=True)
        ]

    def clip_of(some: pa.Array | pa.ChunkedArray) -> list[int]:
        found: list[int] = pc.index_in(some, value_set=ids).to_pylist()
        return found

    compared = run["rows"]["input"] - run["rows"]["rejected"]
    record_audit = run.get("audit")
    audit = Audit.from_record(record_audit) if record_audit else None
    sizes = source.sizes
    return Report(
        output=redact(folder.path),
        made=now(),
        finished=run["finished"],
        eps=eps,
        compare_to=parameters["compare_to"],
        n_input=run["rows"]["input"],
        n_compared=compared,
        n_kept=run["rows"]["kept"],
        n_duplicates=run["rows"]["duplicates"],
        n_rejected=run["rows"]["rejected"],
        size_column=size,
        duration_column=duration,
        total_bytes=int(table_bytes.sum()) if size else None,
        total_seconds=int(table_seconds.sum()) / 10**6 if duration else None,
        steps=_steps(
            steps,
            force,
            exact=parameters["compare_to"] == "ranked",
            table=counted.scores.table,
            n_bytes=per_step(table_bytes, force).tolist() if size else None,
            microseconds=per_step(table_seconds, force).tolist() if duration else None,
        ),
        bin_edges=tuple(counted.scores.edges.tolist()),
        bin_counts=tuple(counted.scores.bins.tolist()),
        n_below=counted.scores.n_below,
        clips=tuple(clips),
        pairs=_pairs(source, counted.scores, pairs, clip_of, clips, rows, carried),
        groups=tuple(_group(n_duplicates, clip_of(members), scores) for n_duplicates, members, scores in groups),
        n_groups=run["rows"]["groups"],
        source_column=group_by,
        sources=_sources(sums, counted.codes, counted.scores, force) if sums and group_by is not None else (),
        clusters=tuple(
            Cluster(centroid, n_rows, tuple(per_step(table, force).tolist()))
            for _, centroid, n_rows, table in counted.clusters
        ),
        cluster_sizes=spread_sample(sizes, _CLUSTER_SIZES),
        n_clusters=len(sizes),
        recall=tuple(Recall(row.eps, row.recall, row.low, row.high) for row in audit.recall_rows) if audit else (),
        audit_note=_audit_note(audit),
        kmeans=_kmeans_facts(run, compared),
        parameters=parameters,
        packages=run["packages"],
        reproduce=_reproduce(source),
        apply=f"untwin apply {shlex.quote(_run_path(source))}",
        apply_media="" if media is None else _apply_media(source, normalize_path(media)),
    )


def _media_of_run(storage: Storage, media: str) -> MediaFolder | None:
    """The clips that a run was on; without them the page has no pictures."""
    try:
        return open_media(storage, media)
    except UntwinError as error:
        _log.warning("the report shows no pictures of clips: %s", error)
        return None


def _apply_media(source: Finished, media: str) -> str:
    """The command that acts on media, without its eps: those on S3 can only be listed."""
    if is_remote(media) and not media.startswith(("s3://", "s3a://")):
        return ""
    mode = "manifest" if is_remote(media) else "move"
    return shlex.join(["untwin", "apply", _run_path(source), "--mode", mode, "--media", redact(media)])


@dataclass(frozen=True)
class _Counted:
    """What one pass over the similarities gives.

    Attributes:
        scores: Counts of rows and pairs.
        codes: Code of each row of the input, (n,) uint16; empty if not asked for.
        pairs: Candidates: hash, interval, id, other, score, removed.
        clusters: Those with most duplicates: duplicates, number, rows, table by code.
    """

    scores: ScoreCounts
    codes: NDArray[np.uint16]
    pairs: pa.Table
    clusters: list[tuple[int, int, int, NDArray[np.int64]]]


def _count(
    source: Finished, steps: Sequence[float], force: int | None, *, with_codes: bool, progress: Progress
) -> _Counted:
    parameters = source.run["parameters"]
    with_kept = parameters["eps"] is not None
    by_witness = with_kept and parameters["compare_to"] == "kept"
    scores = ScoreCounts(steps)
    codes = np.full(source.listing.n_rows if with_codes else 0, np.iinfo(np.uint16).max, np.uint16)
    sample = SmallestHashes(len(steps), _PAIRS_OF_INTERVAL)
    kind = source.listing.id_type
    pool = [_pair_schema(kind).empty_table()]
    largest: list[tuple[int, int, int, NDArray[np.int64]]] = []
    centroid, n_rows, before = -1, 0, scores.table.copy()
    sorted_by = _sorted_by(steps, force)

    def end_cluster() -> None:
        """Take a cluster, all of whose rows are counted, among the largest if it is one of them."""
        nonlocal before, largest
        table = scores.table - before
        before = scores.table.copy()
        n_duplicates = int(per_step(table, force)[sorted_by])
        if n_duplicates:
            found = sorted([*largest, (n_duplicates, centroid, n_rows, table)], key=lambda one: (-one[0], one[1]))
            largest = found[:_CLUSTERS]

    progress.start("report", int(source.sizes.sum()))
    names = ["id", "max_id", "cosine_sim_score", *(["kept_id", "kept_sim_score"] if with_kept else [])]
    for part in iterate_results(source, names):
        if part.first:
            end_cluster()
            centroid, n_rows = part.centroid, 0
        results = part.results
        n_rows += results.num_rows
        score = results["cosine_sim_score"].to_numpy()
        pair_score = score
        removed = np.zeros(len(score), np.bool_)
        if with_kept:
            known = results["kept_id"].is_valid().to_numpy(zero_copy_only=False)
            removed = known if by_witness else scores.steps_of(score) <= (force or 0)
            witnessed = results["kept_sim_score"].to_numpy(zero_copy_only=False)
            pair_score = np.where(known, witnessed, score).astype(np.float32)
        found = scores.add(score, removed)
        if with_codes:
            codes[part.rows] = found
        scores.add_pairs(pair_score)
        interval = scores.steps_of(pair_score)
        # the first row of a cluster, which is no pair, has the score 0, and that is within no eps
        at = np.flatnonzero(interval < len(steps))
        if len(at):
            hashes = hash_ids(results["id"].take(pa.array(at)), REPORT_SEED)
            some = sample.candidates(interval[at], hashes)
            if len(some):
                chosen = pa.array(at[some])
                other = results["max_id"].take(chosen)
                if with_kept:
                    other = pc.coalesce(results["kept_id"].take(chosen), other)
                columns = [
                    hashes[some],
                    interval[at[some]],
                    results["id"].take(chosen),
                    other,
                    pair_score[at[some]],
                    removed[at[some]],
                ]
                pool.append(pa.table(columns, schema=_pair_schema(results["id"].type)))
        if sum(table.num_rows for table in pool) > 2 * _PAIRS_OF_INTERVAL * len(steps):
            pool = [_pruned(pool, sample)]
        progress.advance(len(score))
    end_cluster()
    progress.finish()
    return _Counted(scores, codes, _pruned(pool, sample), largest)


def _pair_schema(kind: pa.DataType) -> pa.Schema:
    return pa.schema(
        [
            ("hash", pa.uint64()),
            ("interval", pa.int64()),
            ("id", kind),
            ("other", kind),
            ("score", pa.float32()),
            ("removed", pa.bool_()),
        ]
    )


def _pruned(pool: Sequence[pa.Table], sample: SmallestHashes) -> pa.Table:
    table = pa.concat_tables(pool)
    return table.take(pa.array(sample.prune(table["interval"].to_numpy(), table["hash"].to_numpy())))


def _sorted_by(steps: Sequence[float], force: int | None) -> int:
    """The step by which clusters are sorted."""
    return steps.index(_USUAL_EPS) if force is None else force


def _chosen_pairs(counted: _Counted, force: int | None, most: int) -> pa.Table:
    """The pairs that are shown, most similar first: of each interval those with the smallest hashes."""
    interval = counted.pairs["interval"].to_numpy()
    quota = allot(np.bincount(interval, minlength=counted.scores.n_steps), force, most)
    # the candidates are ordered by interval and hash
    place = np.arange(len(interval)) - np.searchsorted(interval, interval, side="left")
    chosen = counted.pairs.filter(pa.array(place < quota[interval]))
    return chosen.take(pa.array(np.lexsort((chosen["hash"].to_numpy(), -chosen["score"].to_numpy()))))


def _steps(
    steps: Sequence[float],
    force: int | None,
    *,
    exact: bool,
    table: NDArray[np.int64],
    n_bytes: Sequence[int] | None,
    microseconds: Sequence[int] | None,
) -> tuple[Step, ...]:
    return tuple(
        Step(
            eps=eps,
            duplicates=duplicates,
            exact=exact or number == force,
            bytes=None if n_bytes is None else n_bytes[number],
            seconds=None if microseconds is None else microseconds[number] / 10**6,
        )
        for number, (eps, duplicates) in enumerate(zip(steps, per_step(table, force).tolist(), strict=True))
    )


def _clips(source: Finished, ids: pa.Array) -> tuple[list[Clip], NDArray[np.int64], Mapping[int, Values]]:
    """The rows shown, in the order of some different ids, their numbers in the input, and what the clusters have."""
    centroids, rows = locate(source, ids)
    carried = carried_values(source, centroids, rows)
    columns = other_columns(source, rows, carried) if len(ids) else []
    clips = [
        Clip(id=as_text(value), centroid=centroid, columns=shown)
        for value, centroid, shown in zip(ids, centroids.tolist(), columns, strict=True)
    ]
    return clips, rows, carried


def _pairs(
    source: Finished,
    scores: ScoreCounts,
    chosen: pa.Table,
    clip_of: Callable[[pa.ChunkedArray], list[int]],
    clips: Sequence[Clip],
    rows: NDArray[np.int64],
    carried: Mapping[int, Values],
) -> tuple[Pair, ...]:
    parameters = source.run["parameters"]
    ranking = parameters_of(source.run, {}).ranking()
    shown = zip(
        clip_of(chosen["id"]),
        clip_of(chosen["other"]),
        chosen["score"].to_pylist(),
        chosen["removed"].to_pylist(),
        scores.pairs_at_least(chosen["score"].to_numpy()).tolist(),
        strict=True,
    )
    pairs = []
    for row, other, score, removed, at_least in shown:
        worse, better = (
            {**carried.get(int(rows[place]), {}), parameters["id_field"]: clips[place].id} for place in (row, other)
        )
        same_cluster = clips[row].centroid == clips[other].centroid
        reason = rank_reason(ranking, better, worse, parameters["which_to_keep"], same_cluster=same_cluster)
        pairs.append(Pair(row, other, score, removed, reason, at_least))
    return tuple(pairs)


def rank_reason(
    ranking: RankingStrategy, better: Values, worse: Values, which_to_keep: str | None, *, same_cluster: bool
) -> str:
    """Why a row ranks before another one.

    Args:
        ranking: The order of rows.
        better: Values of the row that comes first, those that it was ranked by among them.
        worse: Values of the other one.
        which_to_keep: `hard`, `easy` or `random`; None if columns decide.
        same_cluster: Whether both are of one cluster; the order is the same if not, but each has its own centre.
    """
    if ranking.strategy == "random":
        return f"by chance (seed {ranking.random_seed})"
    centre = "its cluster's centre" if same_cluster else "its own cluster's centre"
    for name, ascending in zip(ranking.metadata_cols, ranking.ascending, strict=True):
        if name not in better or name not in worse:
            return f"ranked by {name}"
        one, other = better[name], worse[name]
        if one == other or (_is_nan(one) and _is_nan(other)):
            continue
        what = name if which_to_keep is None else f"{'nearer to' if ascending else 'farther from'} {centre}:"
        if other is None:
            return f"has {name}, the other has none"
        if _is_nan(other):
            return f"{name} is a number, that of the other is not"
        both_floats = isinstance(one, float) and isinstance(other, float)
        shown = _different(one, other) if both_floats else [_shortened(one), _shortened(other)]
        return f"{what} {shown[0]} {'<' if ascending else '>'} {shown[1]}"
    named = "distance to the centre" if which_to_keep is not None else ", ".join(ranking.metadata_cols)
    return f"same {named}; by id"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _shortened(value: Any) -> str:
    text = text_of(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _different(one: float, other: float) -> list[str]:
    """Two numbers with as many digits as tell them apart, three at least."""
    for digits in range(3, 17):
        shown = [f"{one:.{digits}g}", f"{other:.{digits}g}"]
        if shown[0] != shown[1]:
            return shown
    return [repr(one), repr(other)]


def _group(n_duplicates: int, members: Sequence[int], scores: Sequence[float]) -> Group:
    return Group(members[0], n_duplicates, tuple(zip(members[1:], scores[1:], strict=True)))


def _sources(sums: RowSums, codes: NDArray[np.uint16], scores: ScoreCounts, force: int | None) -> tuple[Source, ...]:
    """The values with most rows, then the rest together."""
    n_codes = scores.table.size
    compared = codes < n_codes
    n_rows = np.zeros(len(sums.values), np.int64)
    for low in range(0, len(codes), _BLOCK):
        part = slice(low, low + _BLOCK)
        n_rows += np.bincount(sums.value_of[part][compared[part]], minlength=len(n_rows))
    values = sums.values
    least = np.sort(n_rows)[-_SOURCES:][0]
    candidates = np.flatnonzero(n_rows >= max(1, least)).tolist()
    shown = heapq.nsmallest(_SOURCES, candidates, key=lambda place: (-n_rows[place], values[place]))
    slot = np.full(len(values), len(shown), np.int64)
    slot[shown] = np.arange(len(shown))
    tables = np.zeros((len(shown) + 1) * n_codes, np.int64)
    for low in range(0, len(codes), _BLOCK):
        part = slice(low, low + _BLOCK)
        inside = compared[part]
        keys = slot[sums.value_of[part][inside]] * n_codes + codes[part][inside]
        tables += np.bincount(keys, minlength=len(tables))
    names: list[str | None] = [*(values[place] for place in shown), None]
    return tuple(
        Source(
            value=name,
            rows=int(table.sum()),
            duplicates=tuple(per_step(table, force).tolist()),
            removed=None if force is None else int(table[:, 1].sum()),
        )
        for name, table in zip(names, tables.reshape(len(names), -1, 2), strict=True)
        if table.any()
    )


def _kmeans_facts(run: Mapping[str, Any], compared: int) -> dict[str, str]:
    clusters, kmeans = run["clusters"], run.get("kmeans")
    facts = {
        "clusters": f"{clusters['n_clusters']:,}, {clusters['non_empty']:,} of them with rows",
        "rows of a cluster": f"{clusters['min']:,} to {clusters['max']:,}, median {clusters['median']:,g}",
    }
    if kmeans:
        facts |= {
            "dimension": f"{kmeans['dim']:,}",
            "rows that centres were fitted on": f"{kmeans['sample_rows']:,}",
            "iterations": f"{kmeans['iterations']:,}",
            "mean cosine similarity of a row to its centre": f"{kmeans['mean_cosine_to_centroid']:.4f}",
            "mean squared distance of a row to its centre": f"{kmeans['inertia'] / max(1, compared):.4f}",
        }
    return facts


def _audit_note(audit: Audit | None) -> str:
    if audit is None:
        return ""
    if audit.by_construction:
        return "There is one cluster, so all rows were compared with each other: recall is 1 by construction."
    with_whom = (
        "in their own cluster"
        if audit.probes == 1
        else f"among the rows they were compared with (probes {audit.probes})"
    )
    note = (
        f"{audit.n_sampled:,} sampled rows were compared with all {audit.n_rows:,}: of those that have another row "
        f"within eps, the share that have one {with_whom}, with a 95 % interval. This is recall of cosine neighbours, "
        "not of human judgement."
    )
    left = audit.answer
    if left is not None and left.share is not None:
        note += (
            f" Kept rows that still have another kept row within eps {left.eps:g}: {left.share:.2%} "
            f"({left.low:.2%} to {left.high:.2%})."
        )
    return note


def _run_path(source: Finished) -> str:
    """The run that `untwin apply` takes, so far as it is known."""
    path: str = source.origin.path if source.origin is not None else source.run["applied_to"]["path"]
    return redact(path)


def _reproduce(source: Finished) -> str:
    """The command that makes the run again; for an answer also the one that makes it of the run."""
    saved = dict(source.run["parameters"])
    applied = "applied_to" in source.run
    path = _run_path(source)
    if applied and source.origin is not None:
        saved = dict((source.origin.read_run() or source.run)["parameters"])
    inputs, media = saved.pop("input_path"), saved.pop("media", None)
    words = ["untwin", "run", *(inputs if media is None else [media]), path]
    if media is not None:
        words += _embedding_options(source.run.get("media") or {})
        if saved["rank_by"] is None:
            words += ["--which-to-keep", saved["which_to_keep"]]
        elif saved["rank_by"] == BEST_QUALITY:
            saved["rank_by"] = None
        saved["which_to_keep"] = None
    for name, value in saved.items():
        option = "--" + name.replace("_", "-")
        default = "auto" if name == "n_clusters" else _DEFAULTS.get(name)
        if value is None or value == default or (name == "metadata_fields" and not value):
            continue
        if value is True:
            words.append(option)
        else:
            words += [option, ",".join(value) if isinstance(value, list) else str(value)]
    command = shlex.join(words)
    if applied:
        own, usual = redact(source.folder.path), f"{path}/eps={source.run['parameters']['eps']!r}"
        more = ["untwin", "apply", path, "--eps", repr(source.run["parameters"]["eps"])]
        command += " && " + shlex.join([*more, *([] if own == usual else ["--to", own])])
    return command


def _embedding_options(made: Mapping[str, Any]) -> list[str]:
    """How a run on clips embedded them, so far as it is not the default; of a model only the name is known."""
    words = []
    if made.get("frames", EmbedParameters.frames) != EmbedParameters.frames:
        words += ["--frames", str(made["frames"])]
    if made.get("encoder", BUILT_IN) != BUILT_IN:
        words += ["--encoder", f"{made['encoder']}.onnx"]
    return words
