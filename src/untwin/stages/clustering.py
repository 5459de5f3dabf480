"""What the inner stages of k-means share: the plan, the input and the places that they write to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from untwin.errors import SchemaError
from untwin.plan import Plan
from untwin.stages.tasks import InputTask
from untwin.storage.columns import decode_ids, embedding_dim
from untwin.storage.files import Storage, join, redact
from untwin.storage.listing import Fields, Groups, Listing
from untwin.storage.partitions import ROW
from untwin.storage.rows import RowBatch, batch_rows

SAMPLE_SEED, IDS_SEED_1, IDS_SEED_2, VECTORS_SEED, EXAMPLES_SEED, AUDIT_SEED, PROBES_SEED, REPORT_SEED = range(1, 9)
"""Added to the user's seed, or used as they are, so that no two purposes share a hash."""


@dataclass(frozen=True)
class Clustering:
    """One k-means job.

    Attributes:
        plan: Sizes and units.
        listing: The input.
        groups: Its pieces.
        fields: Its columns.
        source: Storage of the input.
        target: Storage of the output.
        output_path: The `kmeans/` folder.
        work_path: Folder for what is removed at the end.
        rejected_path: Folder for rejected rows.
        dim: Wanted dimension; None takes the commonest of the sample.
        seed: Seed of the row sample and of the random choices of the fit.
        on_repeated_id: `error` or `first`: what to do where an id stands for different vectors.
        max_batch_rows: Most rows of a batch.
        rows_wanted: Whole rows of the input are wanted by a stage that comes after.
    """

    plan: Plan
    listing: Listing
    groups: Groups
    fields: Fields
    source: Storage
    target: Storage
    output_path: str
    work_path: str
    rejected_path: str
    dim: int | None
    seed: int
    on_repeated_id: str
    max_batch_rows: int
    rows_wanted: bool = False

    def batch_rows(self, dim: int) -> int:
        """Rows that are read and assigned at a time."""
        return min(batch_rows(dim), self.max_batch_rows)

    def ids(self, rows: RowBatch) -> pa.Array:
        """The ids of a batch, in the type in which they are written; SchemaError where they are of another kind."""
        column = rows.columns.column(self.fields.id_field)
        try:
            return decode_ids(column, self.listing.id_type)
        except pa.ArrowException as error:
            raise SchemaError(
                f"{self.place(rows)}: column {self.fields.id_field!r} is {column.type} where it was "
                f"{self.listing.id_type} ({error}); bring the ids to one type"
            ) from error

    def embeddings(self, rows: RowBatch) -> pa.Array:
        """The embeddings of a batch; SchemaError where they are no lists of floating-point numbers."""
        column = rows.columns.column(self.fields.embedding_field)
        try:
            if not pa.types.is_null(column.type):
                embedding_dim(column.type)
        except SchemaError as error:
            raise SchemaError(f"{self.place(rows)}: column {self.fields.embedding_field!r} {error}") from None
        return column

    def place(self, rows: RowBatch) -> str:
        """Where a batch begins, for messages."""
        (path,), (row,) = self.listing.locate(np.array([rows.first_row]))
        return f"{redact(path)}, from row {row} on"

    @property
    def origin(self) -> tuple[Storage, str] | None:
        """The first file of the input."""
        paths = self.listing.files["path"]
        return (self.source, paths[0].as_py()) if len(paths) else None

    def input_units(self) -> list[InputTask]:
        """The units of input that the plan made."""
        bounds = self.plan.input_units
        return [
            InputTask(unit, int(self.groups.starts[end] - self.groups.starts[first]), first, end)
            for unit, (first, end) in enumerate(itertools.pairwise(bounds))
        ]

    def work_file(self, *names: str) -> str:
        """A path below the work folder."""
        return join(self.work_path, *names)

    @property
    def carried_fields(self) -> list[pa.Field]:
        """The columns that come with a vector from the input."""
        metadata = [
            pa.field(name, kind)
            for name, kind in zip(self.fields.metadata_fields, self.listing.metadata_types, strict=True)
            if name != self.fields.id_field
        ]
        return [pa.field(self.fields.id_field, self.listing.id_type), *metadata, pa.field(ROW, pa.int64())]

    @property
    def side_fields(self) -> list[pa.Field]:
        """The columns that travel with a vector through the shuffle."""
        first, *others = self.carried_fields
        distances = [pa.field(name, pa.float32()) for name in ("l2_dist_to_cent", "cosine_dist_to_cent")]
        return [first, *distances, *others]

    def rows_held(self, unit: int) -> str:
        """The path under which the rows of an input unit are held, from the sample to the assignment."""
        return self.work_file("rows", f"{unit:06d}")

    def partition_schema(self, dim: int) -> pa.Schema:
        """The columns of `centroid=K/*.parquet`."""
        first, *others = self.side_fields
        embedding = pa.field(self.fields.embedding_field, pa.list_(pa.float32(), dim))
        return pa.schema([first, embedding, *others])


def add_counts(counts: Sequence[dict[str, int] | Any]) -> dict[str, int]:
    """Add up dictionaries of counts."""
    total: dict[str, int] = {}
    for part in counts:
        for key, count in part.items():
            total[key] = total.get(key, 0) + count
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))
