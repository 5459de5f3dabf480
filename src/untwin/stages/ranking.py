"""The order of rows inside a cluster, best first: the rows that stay are taken from the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from untwin.errors import ParameterError, SchemaError
from untwin.stages import checks
from untwin.stages.ids import hash_ids

_RANK_SEED = 11


class RankingStrategy:
    """How the rows of a cluster are ranked.

    Ties are broken by id, in the direction of the last column; nulls (and NaN before them) come last.

    Args:
        metadata_cols: Columns to sort by, the most important first; empty for `strategy="random"`.
        ascending: Direction of each column, or one for all: True puts the smallest value first.
        strategy: `sort`, or `random`: the order of a seeded hash of the id.
        random_seed: Seed of that hash.

    Raises:
        ParameterError: No columns to sort by, or a number of directions that does not fit.
    """

    def __init__(
        self,
        metadata_cols: Sequence[str] = (),
        ascending: bool | Sequence[bool] = True,
        strategy: str = "sort",
        random_seed: int = 42,
    ) -> None:
        self.strategy = checks.one_of("strategy", strategy, ("sort", "random"))
        self.metadata_cols = checks.texts("metadata_cols", metadata_cols)
        directions = [ascending] * len(self.metadata_cols) if isinstance(ascending, bool) else ascending
        if not isinstance(directions, Sequence) or not all(isinstance(one, bool) for one in directions):
            raise ParameterError(f"ascending is {ascending!r}; give True or False, or a list of these")
        if len(directions) != len(self.metadata_cols):
            raise ParameterError(
                f"ascending has {len(directions)} values for {len(self.metadata_cols)} metadata_cols; give one for each"
            )
        if strategy == "sort" and not self.metadata_cols:
            raise ParameterError("metadata_cols is empty; name the columns to rank by")
        if strategy == "random" and self.metadata_cols:
            raise ParameterError("metadata_cols has no meaning with strategy='random'")
        self.ascending = tuple(directions)
        self.random_seed = checks.whole("random_seed", random_seed, 0)

    @classmethod
    def metadata_based(cls, metadata_cols: Sequence[str], ascending: bool | Sequence[bool] = True) -> RankingStrategy:
        """Rank by columns: `metadata_based(["duration"], ascending=False)` keeps the longest clip."""
        return cls(metadata_cols, ascending)

    @classmethod
    def random(cls, random_seed: int = 42) -> RankingStrategy:
        """Rank in an order that depends on ids and seed only."""
        return cls(strategy="random", random_seed=random_seed)

    @classmethod
    def by_distance(cls, which_to_keep: str, sim_metric: str, random_seed: int) -> RankingStrategy:
        """The ranking of `which_to_keep`: hard (outliers first), easy (most central first) or random.

        Args:
            which_to_keep: `hard`, `easy` or `random`.
            sim_metric: `cosine` or `l2`: which distance to the centroid counts.
            random_seed: Seed for `random`.
        """
        checks.one_of("sim_metric", sim_metric, ("cosine", "l2"))
        if checks.one_of("which_to_keep", which_to_keep, ("hard", "easy", "random")) == "random":
            return cls.random(random_seed)
        return cls([f"{sim_metric}_dist_to_cent"], which_to_keep == "easy")

    def check_types(self, types: Mapping[str, pa.DataType]) -> None:
        """Raise SchemaError if one of the columns, of which some types are known, cannot be sorted by."""
        for name in self.metadata_cols:
            if name in types:
                _sortable(pa.array([], types[name]), name)

    def order(self, table: pa.Table, id_field: str) -> NDArray[np.int64]:
        """Positions of the rows of a table, best first, shape (n,).

        Raises:
            SchemaError: A column is missing, or cannot be sorted by.
        """
        ids = table[id_field]
        if self.strategy == "random":
            hashes = hash_ids(ids.combine_chunks(), self.random_seed + _RANK_SEED)
            keys = {"hash": pa.array(hashes)}
            directions = [True]
        else:
            missing = [name for name in self.metadata_cols if name not in table.column_names]
            if missing:
                raise SchemaError(
                    f"cannot rank by {', '.join(map(repr, missing))}: the clusters have no such column; name it in "
                    f"metadata_fields; they have {', '.join(map(repr, table.column_names))}"
                )
            keys = {f"key{i}": _sortable(table[name], name) for i, name in enumerate(self.metadata_cols)}
            directions = list(self.ascending)
        keys["id"] = _sortable(ids, id_field)
        directions.append(directions[-1])
        sort_keys = [
            (name, "ascending" if ascending else "descending") for name, ascending in zip(keys, directions, strict=True)
        ]
        # Arrow's default puts nulls last, and NaN before them, whatever the direction
        order = pc.sort_indices(pa.table(keys), sort_keys=sort_keys)
        return np.asarray(order.to_numpy(), dtype=np.int64)


def _sortable(column: pa.ChunkedArray | pa.Array, name: str) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_fixed_size_binary(column.type):
        column = column.cast(pa.binary())
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    if pa.types.is_binary_view(column.type):
        column = column.cast(pa.large_binary())
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    try:
        pc.sort_indices(column.slice(0, 0))
    except pa.ArrowException:
        raise SchemaError(
            f"cannot rank by {name!r}: it has type {column.type}; rank by a number, text or time"
        ) from None
    return column
