"""What an answer decided, row by row of the input: which rows stay, which are removed, and how many of each group."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from untwin.errors import ParameterError, SchemaError, TooManyRemovedError
from untwin.jobs.output import OutputFolder
from untwin.jobs.result import RunResult
from untwin.storage.bitmap import bits_of, empty_bitmap, set_bits
from untwin.storage.columns import decode_ids
from untwin.storage.files import join, redact
from untwin.storage.listing import Listing
from untwin.storage.partitions import read_table
from untwin.storage.rows import read_rows

_BATCH_ROWS = 1 << 16
_NAMED = 5


@dataclass(frozen=True)
class DecidedRows:
    """Rows of the input that follow each other.

    Attributes:
        columns: Those asked for.
        kept: (n,) bool.
        removed: (n,) bool; rows that are neither were rejected.
    """

    columns: pa.RecordBatch
    kept: NDArray[np.bool_]
    removed: NDArray[np.bool_]


@dataclass(frozen=True)
class Decisions:
    """An answer, and the input that it is about.

    Attributes:
        answer: With an eps.
        run_folder: The run that it belongs to; may be the answer's own folder.
    """

    answer: RunResult
    run_folder: OutputFolder

    @functools.cached_property
    def listing(self) -> Listing:
        """The input; ChangedInputError if it is not what it was any more."""
        listing = Listing.read(self.run_folder.storage, self.run_folder.listing_path)
        listing.check_unchanged(self.run_folder.storage)
        return listing

    @property
    def id_field(self) -> str:
        """The column of ids."""
        return str(self.answer.run["parameters"]["id_field"])

    def rows(self, columns: Sequence[str]) -> Iterator[DecidedRows]:
        """All rows of the input in its order, some at a time. Ids come in the type of the run.

        Raises:
            ChangedInputError: The input is not what it was.
            SchemaError: A column is missing.
        """
        listing, storage = self.listing, self.run_folder.storage
        groups = listing.groups()
        bits = storage.read_bytes(join(self.answer.duplicates_path, "_kept.bits"))
        kept_bits, rejected_bits = np.frombuffer(bits, np.uint8), self._rejected()
        names = list(dict.fromkeys(columns))
        for batch in read_rows(storage, listing.format, listing.spans(0, len(groups.file), groups), names, _BATCH_ROWS):
            found = batch.columns
            for name in names:
                if name not in found.schema.names:
                    path = listing.locate(np.array([batch.first_row]))[0][0]
                    raise SchemaError(
                        f"{redact(path)}: no column {name!r}; it has {', '.join(_column_names(self, path))}"
                    )
            if self.id_field in names:
                at = names.index(self.id_field)
                found = found.set_column(at, self.id_field, decode_ids(found.column(at), listing.id_type))
            numbers = np.arange(batch.first_row, batch.first_row + found.num_rows)
            kept = bits_of(kept_bits, numbers)
            yield DecidedRows(found.select(names), kept, ~kept & ~bits_of(rejected_bits, numbers))

    def _rejected(self) -> NDArray[np.uint8]:
        """A bit for each row of the input that was rejected."""
        listing, folder = self.listing, self.run_folder
        bits = empty_bitmap(listing.n_rows)
        names = self.answer.run["files"]["rejected"]
        tables = (read_table(folder.storage, folder.file(name), ["file", "row"]) for name in names)
        # files that were skipped have no rows
        for rows in listing.numbers(table.filter(pc.is_valid(table["row"])) for table in tables):
            set_bits(bits, rows)
        return bits

    def removed_by_group(self, column: str) -> dict[str | None, tuple[int, int]]:
        """For each value of a column, as text: rows that are removed, and rows that were compared."""
        removed: Counter[str | None] = Counter()
        compared: Counter[str | None] = Counter()
        for rows in self.rows([column]):
            values = _as_text(rows.columns.column(0), column)
            for counter, mask in ((removed, rows.removed), (compared, rows.removed | rows.kept)):
                for entry in pc.value_counts(values.filter(pa.array(mask))).to_pylist():
                    counter[entry["values"]] += entry["counts"]
        return {value: (removed[value], count) for value, count in compared.items()}

    def check_removed(self, limit: float, group_by: str | None) -> None:
        """Raise TooManyRemovedError if a larger share of the compared rows is removed, of all or of some group.

        Args:
            limit: The largest share.
            group_by: A column of the input: each of its values is a group; None: all rows only.
        """
        answer = self.answer
        look = f"Look at {redact(answer.duplicates_path)}, or give a smaller --eps or a larger --max-removed"
        compared = answer.n_kept + answer.n_duplicates
        if answer.n_duplicates > limit * compared:
            raise TooManyRemovedError(
                f"{_share(answer.n_duplicates, compared)} would be removed, more than {limit:.2%}: nothing was done. "
                f"{look}"
            )
        if group_by is None:
            return
        counts = self.removed_by_group(group_by)
        too_many = [(value, gone, count) for value, (gone, count) in counts.items() if gone > limit * count]
        if too_many:
            too_many.sort(key=lambda group: (-group[1] / group[2], str(group[0])))
            named = "; ".join(
                f"{'null' if value is None else repr(value)}: {_share(gone, count)}"
                for value, gone, count in too_many[:_NAMED]
            )
            more = f"; and {len(too_many) - _NAMED:,} more" if len(too_many) > _NAMED else ""
            raise TooManyRemovedError(
                f"{group_by}: {len(too_many):,} of {len(counts):,} values would lose more than {limit:.2%} of their "
                f"rows ({named}{more}): nothing was done. {look}"
            )


def parse_share(name: str, value: str | float | None) -> float | None:
    """A share of `15%` or 0.15.

    Raises:
        ParameterError: Something else.
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", str(value))
    share = float(match.group(1)) / (100 if match.group(2) else 1) if match else -1
    if isinstance(value, bool) or not 0 <= share <= 1:
        raise ParameterError(f"{name} is {value!r}; give a share such as 15% or 0.15")
    return share


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} rows ({part / whole:.2%})" if whole else "0 of 0 rows"


def _as_text(values: pa.Array, column: str) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        return values.cast(pa.large_string())
    except pa.ArrowException as error:
        raise SchemaError(
            f"column {column!r} has type {values.type}, whose values cannot be groups; give a column of text or numbers"
        ) from error


def _column_names(decisions: Decisions, path: str) -> list[str]:
    listing = decisions.listing
    storage = decisions.run_folder.storage
    return list(listing.format.inspect(storage, storage.stat(path)).schema.names)
