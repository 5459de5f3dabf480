"""What the stages hand to each other. Tasks are small: paths and counts, never rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from untwin.stages.base import Task


@dataclass(frozen=True)
class InputTask(Task):
    """A range of pieces (row groups) of the input listing."""

    first_group: int
    end_group: int


@dataclass(frozen=True)
class SampleTask(Task):
    """A part of the row sample on disk."""

    path: str
    n_batches: int
    n_sampled: int


@dataclass(frozen=True)
class CentroidsTask(Task):
    """Fitted centroids.

    Attributes:
        path: `_centroids.npy`, (K, D) float32.
        group_starts: Boundaries of groups of clusters that are worked on together: g + 1 numbers.
        n_input_rows: Rows in the input.
        listing_digest: Digest of the listing that row numbers refer to.
        n_sampled: Rows fitted on.
        n_iter: Iterations.
        inertia: Sum of squared distances of the rows fitted on.
        mean_cosine: Their mean cosine to the centroid.
    """

    path: str
    dim: int
    group_starts: tuple[int, ...]
    n_input_rows: int
    listing_digest: str
    n_sampled: int
    n_iter: int
    inertia: float
    mean_cosine: float


@dataclass(frozen=True)
class ShardsTask(Task):
    """An input unit assigned to clusters.

    Attributes:
        shards: Paths of the shards.
        id_files: Paths of id hashes.
        counts_path: File of the rows of each cluster, (K,) int64.
        n_judged: Rows in the shards.
        rejected: Rows of each reason.
        sum_sq_dist: Sum of squared distances to the centroids.
        sum_cosine: Sum of cosines to the centroids.
        rejected_path: File of the rejected rows; empty if there are none.
    """

    shards: tuple[str, ...]
    id_files: tuple[str, ...]
    counts_path: str
    n_judged: int
    rejected: Mapping[str, int]
    sum_sq_dist: float
    sum_cosine: float
    rejected_path: str = ""


@dataclass(frozen=True)
class RepeatsTask(Task):
    """Rows of one part of the id hashes that repeat an earlier row's id."""

    path: str
    n_repeated: int
    rejected: Mapping[str, int]


@dataclass(frozen=True)
class Cluster:
    """A cluster's rows on disk."""

    centroid: int
    n_rows: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class ClustersTask(Task):
    """Clusters that are worked on together.

    Attributes:
        dim: Length of the vectors.
        clusters: Those that have rows.
        has_rows: Each row has its number in the order of the input.
        rejected_path: File of the rows that repeat an id; empty if there are none.
    """

    dim: int
    clusters: tuple[Cluster, ...]
    has_rows: bool = True
    rejected_path: str = ""


@dataclass(frozen=True)
class ExamplePair:
    """A row, the better-ranked row most similar to it, and their similarity, as text."""

    id: str
    max_id: str
    score: float


@dataclass(frozen=True)
class PairsTask(Task):
    """Clusters compared.

    Attributes:
        clusters: Number and rows of each.
        rows_path: Row numbers in the order of the results; empty where the input has none.
        counts: For each eps of the grid, rows whose score is high enough.
        examples: For each eps of the grid, pairs just below the next stricter value.
    """

    folder: str
    clusters: tuple[tuple[int, int], ...]
    rows_path: str
    counts: tuple[int, ...]
    examples: tuple[tuple[tuple[int, ExamplePair], ...], ...] = field(default=())


@dataclass(frozen=True)
class ProbesTask(Task):
    """How many clusters each row is compared with, as chosen from a sample, and what it follows from, as JSON."""

    probes: int
    facts: str


@dataclass(frozen=True)
class VisitsTask(Task):
    """The rows of some clusters, sent to other clusters that they are compared with.

    Attributes:
        shards: Files with a slice of rows for each group of clusters.
        probes_path: For each row the other clusters that it is compared with, (n_rows, probes - 1) int32.
    """

    shards: tuple[str, ...]
    probes_path: str


@dataclass(frozen=True)
class HostsTask(Task):
    """Clusters whose rows are compared with rows of other clusters; `group` is their place among the groups."""

    group: int
    dim: int
    clusters: tuple[Cluster, ...]
    n_visitors: int


@dataclass(frozen=True)
class CrossedTask(Task):
    """Pairs within eps across the borders of some clusters.

    Attributes:
        shards: Files with a slice of pairs for each group of clusters.
        n_products: Pairs of rows whose similarity was computed.
        n_bounds: Pairs of rows for which a bound of it was computed.
        n_pairs: Pairs of rows within eps.
    """

    shards: tuple[str, ...]
    n_products: int
    n_bounds: int
    n_pairs: int


@dataclass(frozen=True)
class ReopenedTask(Task):
    """What pairs across borders change in some clusters.

    Attributes:
        pairs_path: All pairs that decide about rows whose answer may change; empty if there are none.
        kept_path: Numbers of the rows that stay for sure.
        open_path: Numbers of the rows about which other clusters decide; empty if there are none.
        open_pairs_path: Their pairs within eps, (2, m) row numbers; empty if there are none.
        n_open: Number of these rows.
    """

    pairs_path: str
    kept_path: str
    open_path: str
    open_pairs_path: str
    n_open: int


@dataclass(frozen=True)
class ResolvedTask(Task):
    """Bits of the rows that stay."""

    kept_bitmap: str


@dataclass(frozen=True)
class SelectedTask(Task):
    """A unit's duplicates, sorted, and the rows that stay."""

    duplicates_path: str
    groups_path: str
    kept_rows_path: str
    n_duplicates: int


@dataclass(frozen=True)
class DuplicatesTask(Task):
    """All duplicates.

    Attributes:
        files: `duplicates/*.parquet`.
        kept_bitmap: Bits of the rows that stay; empty where the input has no row numbers.
        n_kept: Rows of the clusters that stay.
    """

    files: tuple[str, ...]
    kept_bitmap: str
    n_kept: int
    n_duplicates: int
    n_groups: int


@dataclass(frozen=True)
class KeptTask(Task):
    """A part of the rows that stay."""

    files: tuple[str, ...]
    n_kept: int
