"""The mathematics of untwin: NumPy arrays in, NumPy arrays out; no files, no stages, no logging.

Every decision is independent, to the bit, of batching, row order, threads and BLAS: see `vectors` for how.
"""

from untwin.core.borders import (
    Pairs,
    Reopened,
    UnitRows,
    all_plane_distances,
    pairs_within,
    plane_distances,
    principal_axes,
    reach,
    reopen,
)
from untwin.core.hashing import hash_bytes, hash_integers, hash_rows, mix_seed, uniform
from untwin.core.kmeans import ArrayBlocks, KMeansResult, NearestCentroid, RowBlocks, fit, nearest
from untwin.core.recall import BestNeighbours, LabelledRows, share_interval
from untwin.core.similarity import (
    EPS_GRID,
    Between,
    Block,
    BlockMap,
    Elsewhere,
    Found,
    Matches,
    RankedArray,
    RankedRows,
    is_duplicate,
    match_block,
    match_ranked,
    score_counts,
    threshold,
)
from untwin.core.vectors import Invalid, blocks, normalize, product_error, rowwise_dot

__all__ = [
    "EPS_GRID",
    "ArrayBlocks",
    "BestNeighbours",
    "Between",
    "Block",
    "BlockMap",
    "Elsewhere",
    "Found",
    "Invalid",
    "KMeansResult",
    "LabelledRows",
    "Matches",
    "NearestCentroid",
    "Pairs",
    "RankedArray",
    "RankedRows",
    "Reopened",
    "RowBlocks",
    "UnitRows",
    "all_plane_distances",
    "blocks",
    "fit",
    "hash_bytes",
    "hash_integers",
    "hash_rows",
    "is_duplicate",
    "match_block",
    "match_ranked",
    "mix_seed",
    "nearest",
    "normalize",
    "pairs_within",
    "plane_distances",
    "principal_axes",
    "product_error",
    "reach",
    "reopen",
    "rowwise_dot",
    "score_counts",
    "share_interval",
    "threshold",
    "uniform",
]
