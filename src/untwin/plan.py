"""From a listing of the input and the parameters to a plan: sizes and units of work. Pure: no files are touched.

Memory, workers and backend are not inputs of the plan: they decide how fast the work is done, never what it gives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from untwin.errors import ParameterError

_MIN_UNIT_BYTES = 32 << 20
_MAX_UNIT_BYTES = 1 << 30
_SLICE_BYTES = 256 << 10
_ROWS_PER_CENTROID = 256
_MIN_SAMPLE_ROWS = 20_000
_EXHAUSTIVE_ROWS = 20_000
_ROWS_PER_PARTITION = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What will be done, in units.

    Attributes:
        n_rows: Rows in the input.
        dim: Expected dimension; the row sample has the last word.
        n_clusters: Number of k-means clusters.
        sample_rows: Rows that the centroids are fitted on.
        input_units: Boundaries over the pieces (row groups) of the listing: unit i is pieces
            `input_units[i]` up to `input_units[i + 1]`.
        unit_bytes: Bytes of float32 vectors that a unit of work aims at.
        id_partitions: Parts, a power of two, into which id hashes are split to find repeated ids.
    """

    n_rows: int
    dim: int
    n_clusters: int
    sample_rows: int
    input_units: tuple[int, ...]
    unit_bytes: int
    id_partitions: int

    @property
    def unit_rows(self) -> int:
        """Rows of the expected dimension that fill a unit."""
        return max(1, self.unit_bytes // (4 * max(1, self.dim)))

    @property
    def vector_bytes(self) -> int:
        """Bytes of all vectors as float32."""
        return self.n_rows * self.dim * 4

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` gave."""
        return cls(**{**value, "input_units": tuple(value["input_units"])})


def auto_n_clusters(n_rows: int) -> int:
    """Number of clusters that balances the cost of fitting and assigning against the cost of comparing.

    For N rows and K clusters, in products of two vectors: assigning takes N·K, comparing takes s·N²/(2·K), where s
    >= 1 is the skew of the cluster sizes (about 1.4). The sum is smallest at K = 0.84·sqrt(N), and 3 % more at
    0.65·sqrt(N), where fitting, which takes about 416·K² + 180,000·K, costs less. Up to 20,000 rows there is one
    cluster, so every pair is compared and nothing is missed.
    """
    if n_rows <= _EXHAUSTIVE_ROWS:
        return 1
    return max(1, round(0.65 * math.sqrt(n_rows)))


def make_plan(
    group_rows: NDArray[np.int64],
    *,
    dim: int,
    n_clusters: int | None,
    fit_data_fraction: float | None = None,
    sample: bool = True,
) -> Plan:
    """Make the plan.

    Args:
        group_rows: (g,) rows of each piece of the input, in order.
        dim: Dimension of the vectors.
        n_clusters: Number of clusters; None chooses it by `auto_n_clusters`.
        fit_data_fraction: Share of the rows to fit on; overrules `sample`.
        sample: Fit on a sample of 256 rows a centroid (at least 20,000) instead of on all rows.

    Raises:
        ParameterError: More clusters than rows.
    """
    n_rows = int(group_rows.sum())
    if n_clusters is not None and n_clusters > n_rows:
        raise ParameterError(f"n_clusters is {n_clusters}, but the input has only {n_rows} rows")
    clusters = auto_n_clusters(n_rows) if n_clusters is None else n_clusters
    if fit_data_fraction is not None:
        sample_rows = min(n_rows, max(1, round(n_rows * fit_data_fraction)))
    elif sample:
        sample_rows = min(n_rows, max(_ROWS_PER_CENTROID * clusters, _MIN_SAMPLE_ROWS))
    else:
        sample_rows = n_rows
    if sample_rows < clusters:
        raise ParameterError(
            f"fit_data_fraction leaves {sample_rows} rows to fit {clusters} clusters on; raise it, or lower n_clusters"
        )
    total = n_rows * dim * 4
    unit_bytes = int(min(_MAX_UNIT_BYTES, max(_MIN_UNIT_BYTES, math.sqrt(total * _SLICE_BYTES))))
    weights = group_rows * (4 * max(1, dim))
    return Plan(
        n_rows=n_rows,
        dim=dim,
        n_clusters=clusters,
        sample_rows=sample_rows,
        input_units=split_evenly(weights, unit_bytes),
        unit_bytes=unit_bytes,
        id_partitions=1 << max(0, math.ceil(math.log2(max(1, n_rows / _ROWS_PER_PARTITION)))),
    )


def split_evenly(weights: NDArray[np.int64] | Sequence[int], target: int) -> tuple[int, ...]:
    """Boundaries that cut a sequence into runs of about `target` total weight; each item stays whole.

    Returns:
        Increasing positions, from 0 to the number of items; run i is items `b[i]` up to `b[i + 1]`.
    """
    boundaries = [0]
    filled = 0
    for position, weight in enumerate(np.asarray(weights, dtype=np.int64).tolist()):
        if filled and filled + weight > target:
            boundaries.append(position)
            filled = 0
        filled += weight
    if len(weights):
        boundaries.append(len(weights))
    return tuple(boundaries)
