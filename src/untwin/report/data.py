"""What the report page shows. Everything here is small, whatever the size of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """A position of the slider.

    Attributes:
        eps: Threshold.
        duplicates: Rows whose score is at least 1 - eps; the number of rows removed where `exact`, else an upper bound.
        exact: Whether that many rows are removed at this eps.
        bytes: Of the media of these rows; None without a size column.
        seconds: Of playing time of these rows; None without a duration column.
    """

    eps: float
    duplicates: int
    exact: bool
    bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Strip:
    """A few frames of a clip side by side in one picture; an image has one.

    Attributes:
        uri: `data:` URI.
        frames: Number of frames.
        width: Of one frame, in pixels.
        height: In pixels.
    """

    uri: str
    frames: int
    width: int
    height: int


@dataclass(frozen=True)
class Clip:
    """A row as the page shows it.

    Attributes:
        id: As text.
        centroid: Its cluster.
        columns: Names and values of its other columns, shortened, as text.
        strip: Its picture, if there are media.
        problem: Why there is no picture, where one was wanted.
    """

    id: str
    centroid: int
    columns: tuple[tuple[str, str], ...] = ()
    strip: Strip | None = None
    problem: str = ""


@dataclass(frozen=True)
class Pair:
    """A row beside another one: its witness if it was removed, else the better-ranked row most similar to it.

    Attributes:
        row: Index into `Report.clips`.
        other: Index into `Report.clips`.
        score: Similarity of the two.
        removed: Whether the run removed the row.
        reason: Why the other one ranks before it, as in "duration_s 12.4 > 8.1".
        pairs_at_least: Pairs of the whole run that are at least as similar, this one included.
    """

    row: int
    other: int
    score: float
    removed: bool
    reason: str
    pairs_at_least: int


@dataclass(frozen=True)
class Group:
    """A kept row and duplicates that have it as witness.

    Attributes:
        kept: Index into `Report.clips`.
        n_duplicates: All of them.
        shown: Index into `Report.clips` and score, most similar first.
    """

    kept: int
    n_duplicates: int
    shown: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Source:
    """Rows with one value of the column that the report groups by.

    Attributes:
        value: As text; the rest of the values together have None.
        rows: Rows compared.
        duplicates: For each step, rows that `Step.duplicates` counts.
        removed: Rows that the run removed; None for a run without eps.
    """

    value: str | None
    rows: int
    duplicates: tuple[int, ...]
    removed: int | None


@dataclass(frozen=True)
class Cluster:
    """A cluster with many duplicates: its number, rows, and for each step the rows that `Step.duplicates` counts."""

    centroid: int
    rows: int
    duplicates: tuple[int, ...]


@dataclass(frozen=True)
class Recall:
    """A line of the audit: of rows with a neighbour within eps, the share whose neighbour was compared."""

    eps: float
    recall: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Attributes:
        output: Folder of the run.
        made: When the report was made, UTC.
        finished: When the run was, UTC.
        eps: Threshold in force; None if the run had none.
        compare_to: `kept` or `ranked`.
        n_input: Rows of the input.
        n_compared: Rows that were clustered and compared.
        n_kept: Rows that stay at the eps in force.
        n_duplicates: Rows removed at the eps in force.
        n_rejected: Rows that could not be judged.
        size_column: Column that `Step.bytes` comes from.
        duration_column: Column that `Step.seconds` comes from.
        total_bytes: Of all compared rows.
        total_seconds: Of all compared rows.
        steps: Positions of the slider, by eps ascending.
        bin_edges: Edges of the histogram, as similarities, ascending; one more than counts.
        bin_counts: Rows by `cosine_sim_score`.
        n_below: Rows with a smaller score than the first edge.
        clips: Rows that pairs and groups point to.
        pairs: Sampled over the scores, by score descending.
        groups: The largest, largest first; none for a run without eps.
        n_groups: All of them.
        source_column: Column that `sources` are the values of.
        sources: Those with most rows, then the rest.
        clusters: Those with most duplicates.
        cluster_sizes: Rows of each cluster, descending; of very many a sample at even distances, the largest and the
            smallest included.
        n_clusters: All of them that are not empty.
        recall: Of the audit, if there was one.
        audit_note: What the audit measured and how.
        kmeans: Measures of the clustering, name and value.
        parameters: Of the run.
        packages: Versions.
        reproduce: Command that makes the run again.
        apply: Command that acts on a threshold, without `--eps VALUE`, quoted for a shell.
        apply_media: The same for the media; empty without media.
    """

    output: str
    made: str
    finished: str
    eps: float | None
    compare_to: str
    n_input: int
    n_compared: int
    n_kept: int
    n_duplicates: int
    n_rejected: int
    size_column: str | None
    duration_column: str | None
    total_bytes: int | None
    total_seconds: float | None
    steps: tuple[Step, ...]
    bin_edges: tuple[float, ...]
    bin_counts: tuple[int, ...]
    n_below: int
    clips: tuple[Clip, ...]
    pairs: tuple[Pair, ...]
    groups: tuple[Group, ...]
    n_groups: int
    source_column: str | None
    sources: tuple[Source, ...]
    clusters: tuple[Cluster, ...]
    cluster_sizes: tuple[int, ...]
    n_clusters: int
    recall: tuple[Recall, ...]
    audit_note: str
    kmeans: Mapping[str, str]
    parameters: Mapping[str, Any]
    packages: Mapping[str, str]
    reproduce: str
    apply: str
    apply_media: str = ""
