"""`PairwiseStage`: in each cluster, the most similar better-ranked row of every row, and who stays."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from untwin.core import (
    EPS_GRID,
    Between,
    Block,
    BlockMap,
    Elsewhere,
    Found,
    Matches,
    RankedArray,
    RankedRows,
    blocks,
    is_duplicate,
    match_block,
    match_ranked,
    normalize,
    score_counts,
    threshold,
)
from untwin.errors import DamagedFileError, InputNotFoundError, ParameterError, SchemaError
from untwin.plan import split_evenly
from untwin.stages import checks
from untwin.stages.base import Context, Stage, Upstream, require_empty, storage_of, where_data_is
from untwin.stages.clustering import EXAMPLES_SEED
from untwin.stages.gather import GatherStage
from untwin.stages.ids import hash_ids
from untwin.stages.ranking import RankingStrategy
from untwin.stages.tasks import Cluster, ClustersTask, ExamplePair, PairsTask
from untwin.storage.columns import (
    common_id_type,
    decode_ids,
    decode_vectors,
    half_floats,
    id_type,
    list_lengths,
    matrix_of,
)
from untwin.storage.files import Storage, Writes, is_remote, join, normalize_path, read_ahead, redact
from untwin.storage.partitions import (
    ROW,
    find_partitions,
    iterate_partition,
    partition_facts,
    read_partition,
    result_path,
    write_array,
)
from untwin.storage.rows import batch_rows
from untwin.storage.spool import RankedFile, SharedFile, VectorFile, scratch_folder

METADATA_KEY = b"untwin"
_UNIT_BYTES = 32 << 20
_EXAMPLES = 3
_SPOOLED_BYTES = 8 << 20


_SIDE_BYTES = 300
"""Of a row's ids, metadata and results while a cluster is compared."""
_SCRATCH = 32 << 20
_SPREAD_WORK = 1 << 38
"""Rows squared times elements from which a cluster is compared by other workers, too: some seconds of one core."""
_SPREAD_BATCHES = 128
_SPREAD_ROWS = 4096, 16384
"""Wanted number of batches, each of which its unit resolves by itself, and limits to their rows."""
_READ_BYTES = 16 << 20


def _spooled_batch(dim: int) -> int:
    """Rows that are compared at a time where they are read from the disk."""
    return max(256, min(4096, _SPOOLED_BYTES // (4 * dim)))


def _spread_batch(n_rows: int, dim: int, memory: int) -> int:
    """Rows that are resolved at a time where others compare them with better-ranked ones; an eighth of the memory."""
    least, most = _SPREAD_ROWS
    return max(256, min(max(least, n_rows // _SPREAD_BATCHES), most, memory // (32 * dim)))


def _tile_rows(dim: int, memory: int) -> int:
    """Rows that a call reads at a time: three times as many lie in memory, and products of them."""
    return max(256, min(_READ_BYTES, memory // 16) // (4 * dim))


def _compare_block(file: SharedFile, eps: float | None, tile_rows: int, block: Block | Between) -> tuple[Found, Found]:
    """Compare a block of rows of a file; runs on any worker."""

    def tiles() -> Iterator[NDArray[np.float32]]:
        for start in range(block.start, block.stop, tile_rows):
            yield file.take(start, min(start + tile_rows, block.stop))

    return match_block(block, file, read_ahead(tiles, depth=1), eps)


class PairwiseStage(Stage):
    """Compares the rows of each cluster with each other.

    Reads `centroid=K/*.parquet` as `KMeansStage` writes them, ours or NeMo Curator's, and writes
    `cluster_K.parquet`: `id`, `max_id`, `cosine_sim_score`, and with `eps` also `kept_id`, `kept_sim_score`;
    rows in rank order.

    Args:
        id_field: Column of ids.
        embedding_field: Column of embeddings.
        input_path: Folder that holds `centroid=K` folders, or a list of such.
        output_path: Folder for the results; must not hold other results.
        ranking_strategy: Ranks the rows of a cluster; overrules `which_to_keep` and `sim_metric`.
        embedding_dim: Wanted length of the embeddings; None takes what is there.
        pairwise_batch_size: Rows compared at a time; never changes the result.
        verbose: Log the stage (logger `untwin`, level INFO).
        read_kwargs: `storage_options` for the input.
        write_kwargs: `storage_options` for the output.
        which_to_keep: `hard`, `easy` or `random`.
        sim_metric: `cosine` or `l2`: the distance to the centroid that `hard` and `easy` rank by.
        random_seed: Seed for `random`.
        compare_to: `ranked`: against every better-ranked row; `kept`: against those that stay.
        eps: A row is a duplicate when its similarity is at least 1 - eps; None only computes similarities, with
            `compare_to="ranked"`.

    Raises:
        ParameterError: A parameter that makes no sense.
    """

    name = "pairwise"
    splittable = True

    def __init__(
        self,
        id_field: str,
        embedding_field: str,
        input_path: str | list[str],
        output_path: str,
        ranking_strategy: RankingStrategy | None = None,
        embedding_dim: int | None = None,
        pairwise_batch_size: int = 1024,
        verbose: bool = False,
        read_kwargs: dict[str, Any] | None = None,
        write_kwargs: dict[str, Any] | None = None,
        which_to_keep: str = "hard",
        sim_metric: str = "cosine",
        random_seed: int = 42,
        compare_to: str = "ranked",
        eps: float | None = None,
    ) -> None:
        self.compare_to = checks.one_of("compare_to", compare_to, ("kept", "ranked"))
        if eps is None and compare_to == "kept":
            raise ParameterError("compare_to is 'kept', but eps is None: who stays depends on eps; give one")
        if eps is not None:
            threshold(eps)
        self.eps = None if eps is None else float(eps)
        by_distance = RankingStrategy.by_distance(which_to_keep, sim_metric, random_seed)
        if not isinstance(ranking_strategy, RankingStrategy | None):
            raise ParameterError(f"ranking_strategy is {ranking_strategy!r}; give a RankingStrategy")
        self.ranking = ranking_strategy or by_distance
        self.id_field = checks.text("id_field", id_field)
        self.embedding_field = checks.text("embedding_field", embedding_field)
        self.input_paths = [normalize_path(given) for given in checks.paths("input_path", input_path)]
        self.output_path = normalize_path(checks.path("output_path", output_path))
        self.embedding_dim = None if embedding_dim is None else checks.whole("embedding_dim", embedding_dim)
        self.pairwise_batch_size = checks.whole("pairwise_batch_size", pairwise_batch_size)
        self.verbose = verbose
        self.source = storage_of(read_kwargs)
        self.target = storage_of(write_kwargs)
        self.clusters: Sequence[ClustersTask] | None = None
        """The clusters, where they are known without looking into the input folder."""
        self._work_path = join(self.output_path, "_work")

    @property
    def place(self) -> tuple[Storage, str]:
        """The folder that the stage writes to."""
        return self.target, self.output_path

    def check_output(self) -> None:
        """Refuse an output that is there."""
        require_empty(self.target, self.output_path)

    def check(self, before: Sequence[Stage]) -> None:
        """Refuse parameters that do not fit the `KMeansStage` before this one."""
        if not before:
            return
        gather = before[-1]
        if not isinstance(gather, GatherStage):
            raise ParameterError("PairwiseStage has to be the first stage, or to follow a KMeansStage")
        job = gather.clustering
        if self.input_paths != [job.output_path]:
            raise ParameterError(
                f"input_path of PairwiseStage is {', '.join(map(redact, self.input_paths))}, but the KMeansStage "
                f"before it writes to {redact(job.output_path)}; give that, or run the two in pipelines of their own"
            )
        fields = (self.id_field, self.embedding_field)
        if fields != (job.fields.id_field, job.fields.embedding_field):
            raise ParameterError(
                f"id_field and embedding_field of PairwiseStage are {fields}, those of the KMeansStage before it "
                f"{(job.fields.id_field, job.fields.embedding_field)}; give both stages the same"
            )
        columns = [field.name for field in job.side_fields]
        missing = [name for name in self.ranking.metadata_cols if name not in columns]
        if missing:
            raise SchemaError(
                f"cannot rank by {', '.join(map(repr, missing))}: name it in metadata_fields of KMeansStage"
            )

    def units(self, upstream: Upstream) -> Sequence[ClustersTask]:
        """The clusters that the stage before made, or those found in the input folder."""
        if upstream.stages:
            return [task for task in upstream.last if isinstance(task, ClustersTask)]
        return where_data_is(self._found_units) if self.clusters is None else self.clusters

    def _found_units(self) -> list[ClustersTask]:
        found = find_partitions(self.source, self.input_paths)
        paths = [file.path for files in found.values() for file in files]
        with ThreadPoolExecutor(16) as pool:
            facts = dict(
                zip(
                    paths,
                    pool.map(lambda path: partition_facts(self.source, path, self.embedding_field), paths),
                    strict=True,
                )
            )
        dims = {dim for _, dim, _ in facts.values() if dim is not None}
        if self.embedding_dim and dims - {self.embedding_dim}:
            raise ParameterError(
                f"embedding_dim is {self.embedding_dim}, but the vectors have "
                f"{min(dims - {self.embedding_dim})} elements"
            )
        dim = self.embedding_dim or (dims.pop() if len(dims) == 1 else self._first_dim(paths, facts))
        clusters = [
            Cluster(
                centroid,
                sum(facts[file.path][0] for file in files),
                tuple(file.path for file in files if facts[file.path][0]),
            )
            for centroid, files in found.items()
        ]
        clusters = [cluster for cluster in clusters if cluster.n_rows]
        has_rows = all(ROW in columns for _, _, columns in facts.values())
        bounds = split_evenly([cluster.n_rows * dim * 4 for cluster in clusters], _UNIT_BYTES)
        return [
            ClustersTask(
                unit,
                sum(c.n_rows for c in clusters[low:high]),
                dim,
                tuple(clusters[low:high]),
                has_rows=has_rows,
            )
            for unit, (low, high) in enumerate(itertools.pairwise(bounds))
        ]

    def _first_dim(self, paths: Sequence[str], facts: dict[str, tuple[int, int | None, list[str]]]) -> int:
        for path in paths:
            if facts[path][0]:
                batch = next(iterate_partition(self.source, [path], [self.embedding_field], 16))
                lengths = list_lengths(batch.column(0))
                return int(lengths.max()) or 1
        raise InputNotFoundError(f"{redact(', '.join(self.input_paths))}: the clusters hold no rows")

    def scratch(self) -> tuple[str, ...]:
        """Files of clusters that do not fit the memory, or that other workers compare, too."""
        return (self._work_path,)

    def finish(self) -> None:
        """Remove scratch files."""
        self.target.remove(self._work_path)

    def memory(self, task: ClustersTask) -> int:
        """A unit's rows, as they may still be held, the largest cluster's once more, and the batch being compared."""
        largest = max(cluster.n_rows for cluster in task.clusters)
        batch = min(self.pairwise_batch_size, largest)
        return (
            int(1.1 * 4 * task.dim * (task.n_rows + largest)) + _SIDE_BYTES * largest + 12 * task.dim * batch + _SCRATCH
        )

    def minimum_memory(self, task: ClustersTask) -> int:
        """A cluster's ids and results; its vectors can stay on the disk."""
        largest = max(cluster.n_rows for cluster in task.clusters)
        return min(self.memory(task), _SIDE_BYTES * largest + 4 * _SPOOLED_BYTES + _SCRATCH)

    def cost(self, task: Any) -> float:
        """Pairs to compare."""
        return float(sum(cluster.n_rows**2 for cluster in task.clusters))

    def process(self, task: ClustersTask, context: Context) -> PairsTask:
        """Compare the rows of each cluster of a unit."""
        if self.embedding_dim not in (None, task.dim):
            raise ParameterError(f"embedding_dim is {self.embedding_dim}, but the vectors have {task.dim} elements")
        counts = np.zeros(len(EPS_GRID), np.int64)
        examples = Examples()
        rows: list[NDArray[np.int64]] = []
        sizes: list[tuple[int, int]] = []
        with Writes(self.output_path) as writes:
            for cluster in task.clusters:
                table, order, matches = self._match(cluster, task, context)
                ids = table[self.id_field].combine_chunks().take(pa.array(order))
                result = _result(ids, matches)
                writes.add(result.nbytes, self.write_result, self.output_path, cluster.centroid, result)
                counts += score_counts(matches.score)
                examples.add(ids, result["max_id"], matches.score)
                sizes.append((cluster.centroid, cluster.n_rows))
                if task.has_rows:
                    rows.append(table[ROW].to_numpy()[order])
        rows_path = ""
        if task.has_rows:
            rows_path = join(self.output_path, "_rows", f"unit-{task.unit:06d}.npy")
            write_array(self.target, rows_path, np.concatenate(rows) if rows else np.empty(0, np.int64))
        return PairsTask(
            unit=task.unit,
            n_rows=task.n_rows,
            folder=self.output_path,
            clusters=tuple(sizes),
            rows_path=rows_path,
            counts=tuple(counts.tolist()),
            examples=examples.chosen(),
        )

    def load(
        self, cluster: Cluster, task: ClustersTask, context: Context, stack: ExitStack
    ) -> tuple[pa.Table, NDArray[np.int64], RankedRows]:
        """A cluster: its rows without vectors in the order of the files, their rank order, and the ranked vectors.

        The vectors stay on the disk if they do not fit the memory; `stack` closes what holds them.
        """
        if self.memory(ClustersTask(0, cluster.n_rows, task.dim, (cluster,))) <= context.memory:
            table = read_partition(self.source, cluster.files, self.columns(task))
            vectors = self._vectors(table[self.embedding_field], task, cluster)
            table = self._side_columns(table)
            order = self.ranking.order(table, self.id_field)
            return table, order, RankedArray(vectors, order)
        ranked = stack.enter_context(VectorFile(self._scratch(), task.dim))
        with VectorFile(self._scratch(), task.dim) as spool:
            table = self._side_columns(self._spooled(cluster, task, spool))
            order = self.ranking.order(table, self.id_field)
            for part in blocks(len(order), _spooled_batch(task.dim)):
                ranked.append(spool.take(order[part]), np.arange(part.start, part.stop))
        return table, order, RankedFile(ranked, np.arange(len(order)))

    def _scratch(self) -> str | None:
        return scratch_folder(self._work_path, remote=is_remote(self.output_path))

    def _match(
        self, cluster: Cluster, task: ClustersTask, context: Context
    ) -> tuple[pa.Table, NDArray[np.int64], Matches]:
        """Rows without vectors, in the order of the files; their rank order; and their matches."""
        with ExitStack() as stack:
            table, order, rows = self.load(cluster, task, context, stack)
            batch_size = _spooled_batch(task.dim) if isinstance(rows, RankedFile) else self.pairwise_batch_size
            spread = context.spread is not None and cluster.n_rows**2 * task.dim >= _SPREAD_WORK
            if spread:
                free = context.memory - _SIDE_BYTES * cluster.n_rows
                batch_size = _spread_batch(cluster.n_rows, task.dim, free)
            matches = match_ranked(
                rows,
                eps=self.eps,
                compare_to=self.compare_to,  # type: ignore[arg-type]
                batch_size=batch_size,
                executor_map=context.map if context.threads > 1 else None,
                elsewhere=self._elsewhere(cluster, context, stack) if spread else None,
            )
            return table, order, matches

    def _elsewhere(self, cluster: Cluster, context: Context, stack: ExitStack) -> Elsewhere:
        """Have blocks of a cluster compared by other workers, which read its vectors from the scratch folder."""
        spread = context.spread
        assert spread is not None
        # another attempt at this unit may still be running
        path = join(self._work_path, f"cluster_{cluster.centroid}-{uuid.uuid4().hex}.f32")

        def share(rows: RankedRows) -> BlockMap:
            file = SharedFile(self.target, path, rows.n, rows.dim)
            stack.callback(self.target.remove, path)
            file.write(rows.take(part.start, part.stop) for part in blocks(rows.n, batch_rows(rows.dim)))
            function = partial(_compare_block, file, self.eps, _tile_rows(rows.dim, context.memory))

            def compare(work: Sequence[Block | Between]) -> Generator[tuple[Found, Found], None, None]:
                if work:
                    yield from spread(function, work)

            return compare

        return share

    def _spooled(self, cluster: Cluster, task: ClustersTask, spool: VectorFile) -> pa.Table:
        """Copy a cluster's vectors to the spool; returns its other columns.

        These are read first, on their own: small pieces of memory that outlive a batch would scatter over the heap,
        and keep the memory of the vectors between them from being used again.
        """
        names = [name for name in self.columns(task) if name != self.embedding_field]
        table = read_partition(self.source, cluster.files, names).combine_chunks()
        n_rows = 0
        for batch in iterate_partition(self.source, cluster.files, [self.embedding_field], batch_rows(task.dim)):
            vectors = self._vectors(batch.column(0), task, cluster)
            spool.append(vectors, np.arange(n_rows, n_rows + len(vectors)))
            n_rows += len(vectors)
        return table

    def columns(self, task: ClustersTask) -> list[str]:
        """The columns of the clusters that are needed."""
        wanted = [self.id_field, self.embedding_field, *self.ranking.metadata_cols]
        return list(dict.fromkeys([*wanted, ROW] if task.has_rows else wanted))

    def _side_columns(self, table: pa.Table) -> pa.Table:
        names = [name for name in table.column_names if name != self.embedding_field]
        table = table.select(names)
        ids = table[self.id_field].combine_chunks()
        kind = id_type(ids.type)
        if kind is None or common_id_type(kind, kind) is None or ids.null_count:
            raise ParameterError(f"column {self.id_field!r} has nulls or type {ids.type}; it cannot be used as an id")
        index = table.column_names.index(self.id_field)
        return table.set_column(index, self.id_field, decode_ids(ids, kind))

    def _vectors(self, column: pa.ChunkedArray | pa.Array, task: ClustersTask, cluster: Cluster) -> NDArray[np.float32]:
        """Unit vectors: ours are taken as they are, others are normalised."""
        if task.has_rows:
            return matrix_of(column)
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        parts = []
        for chunk in chunks:
            raw = decode_vectors(half_floats(chunk), task.dim)
            vectors, invalid = normalize(raw.values)
            if raw.positions is not None or invalid.any():
                raise DamagedFileError(
                    f"{redact(cluster.files[0])}: holds an embedding that is null, zero, not finite, or not of length "
                    f"{task.dim}; the output of a KMeansStage has none"
                )
            parts.append(vectors)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def write_result(self, folder: str, centroid: int, table: pa.Table) -> None:
        """Write `cluster_K.parquet`."""
        facts = {"eps": self.eps, "compare_to": self.compare_to}
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps(facts).encode()})
        with self.target.writing(result_path(folder, centroid)) as sink:
            pq.write_table(table, sink, compression="zstd", use_dictionary=False)


def _result(ids: pa.Array, matches: Matches) -> pa.Table:
    columns = {
        "id": ids,
        "max_id": ids.take(pa.array(matches.match)),
        "cosine_sim_score": pa.array(matches.score),
    }
    if matches.kept_match is not None and matches.kept_score is not None:
        none = matches.kept_match < 0
        columns["kept_id"] = ids.take(pa.array(np.maximum(matches.kept_match, 0), mask=none))
        columns["kept_sim_score"] = pa.array(matches.kept_score, mask=none)
    return pa.table(columns)


class Examples:
    """For each step of the eps grid, the pairs of that step whose ids have the smallest hashes."""

    def __init__(self) -> None:
        self._pairs: list[list[tuple[int, ExamplePair]]] = [[] for _ in EPS_GRID]
        # the largest hash that can still be among the smallest of a step
        self._bars = np.full(len(EPS_GRID), np.iinfo(np.uint64).max, np.uint64)

    def add(self, ids: pa.Array, max_ids: pa.ChunkedArray, score: NDArray[np.float32]) -> None:
        """Take the rows of a cluster into account."""
        limits = np.array([threshold(eps) for eps in EPS_GRID], np.float32)
        step = np.searchsorted(-limits, -score, side="left")
        inside = np.flatnonzero(step < len(EPS_GRID))
        if not len(inside):
            return
        hashes = hash_ids(ids.take(pa.array(inside)), EXAMPLES_SEED)
        low = hashes <= self._bars[step[inside]]
        inside, hashes = inside[low], hashes[low]
        order = np.lexsort((hashes, step[inside]))
        steps = step[inside][order]
        place = np.arange(len(order)) - np.searchsorted(steps, steps, side="left")
        for index in order[place < _EXAMPLES].tolist():
            row = int(inside[index])
            pair = ExamplePair(as_text(ids[row]), as_text(max_ids[row]), float(score[row]))
            self._pairs[int(step[row])].append((int(hashes[index]), pair))
        for number in np.unique(steps).tolist():
            pairs = self._pairs[number] = sorted(self._pairs[number], key=lambda item: item[0])[:_EXAMPLES]
            if len(pairs) == _EXAMPLES:
                self._bars[number] = pairs[-1][0]

    def chosen(self) -> tuple[tuple[tuple[int, ExamplePair], ...], ...]:
        """Those with the smallest hashes, with their hashes, for each step."""
        return tuple(tuple(pairs) for pairs in self._pairs)


def as_text(value: pa.Scalar) -> str:
    """An id to look at; some writers put bytes into text columns that are not UTF-8."""
    try:
        return str(value.as_py())
    except UnicodeDecodeError:
        return bytes(value.as_buffer()).decode(errors="backslashreplace")


def merge_examples(tasks: Sequence[PairsTask]) -> list[list[ExamplePair]]:
    """The examples of all units: for each step of the eps grid, those with the smallest hashes."""
    merged: list[list[ExamplePair]] = []
    for step in range(len(EPS_GRID)):
        found = sorted((item for task in tasks for item in task.examples[step]), key=lambda item: item[0])
        merged.append([pair for _, pair in found[:_EXAMPLES]])
    return merged


def removed_rows(table: pa.Table, eps: float, compare_to: str | None) -> NDArray[np.bool_]:
    """Which rows of a `cluster_K.parquet` that was made with an eps are duplicates."""
    if compare_to == "kept":
        return np.asarray(pc.is_valid(table["kept_id"]).to_numpy(zero_copy_only=False), np.bool_)
    return is_duplicate(table["cosine_sim_score"].to_numpy(), eps)


def result_facts(table: pa.Table) -> dict[str, Any]:
    """The eps and compare_to that the rows of a `cluster_K.parquet` were made with; empty for a foreign file."""
    facts: dict[str, Any] = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
    return facts
