"""Arrow columns to NumPy: ids to canonical types, list columns to matrices. No files here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from untwin.errors import SchemaError


class Reason(IntEnum):
    """Why a row could not be judged; the codes 1 to 3 are those of `core.vectors.Invalid`."""

    OK = 0
    NAN = 1
    INFINITE = 2
    ZERO = 3
    NULL_ID = 4
    NULL_EMBEDDING = 5
    EMPTY_EMBEDDING = 6
    NULL_VALUE = 7
    WRONG_LENGTH = 8
    REPEATED_ROW = 9
    REPEATED_ID = 10

    @property
    def text(self) -> str:
        """The reason as the user reads it."""
        return _REASON_TEXTS[self]


_REASON_TEXTS = {
    Reason.OK: "",
    Reason.NAN: "embedding contains NaN",
    Reason.INFINITE: "embedding contains an infinite value",
    Reason.ZERO: "embedding has zero norm",
    Reason.NULL_ID: "null id",
    Reason.NULL_EMBEDDING: "null embedding",
    Reason.EMPTY_EMBEDDING: "empty embedding",
    Reason.NULL_VALUE: "embedding contains a null value",
    Reason.WRONG_LENGTH: "embedding has the wrong length",
    Reason.REPEATED_ROW: "repeated row",
    Reason.REPEATED_ID: "repeated id with another vector",
}


def id_type(column_type: pa.DataType) -> pa.DataType | None:
    """The type in which ids of a column are written; None if the type cannot hold ids."""
    types = pa.types
    if types.is_dictionary(column_type):
        return id_type(column_type.value_type)
    if types.is_string_view(column_type):
        return pa.string()
    if types.is_binary_view(column_type):
        return pa.binary()
    if (
        types.is_string(column_type)
        or types.is_large_string(column_type)
        or types.is_integer(column_type)
        or types.is_fixed_size_binary(column_type)
        or types.is_binary(column_type)
        or types.is_large_binary(column_type)
    ):
        return column_type
    return None


def common_id_type(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    """The type that holds the ids of two files; None if they do not mean the same (string and integer)."""
    types = pa.types
    if first.equals(second):
        return first
    if types.is_integer(first) and types.is_integer(second):
        unsigned = {first, second} & {pa.uint64()}
        return None if unsigned else pa.int64()
    for is_kind, is_large, large in (
        (types.is_string, types.is_large_string, pa.large_string()),
        (types.is_binary, types.is_large_binary, pa.large_binary()),
    ):
        if all(is_kind(t) or is_large(t) for t in (first, second)):
            return large
    return None


def without_views(column_type: pa.DataType) -> pa.DataType:
    """The plain type for a column of string or binary views, which Arrow cannot select from; others as they are."""
    if pa.types.is_string_view(column_type):
        return pa.large_string()
    if pa.types.is_binary_view(column_type):
        return pa.large_binary()
    return column_type


def decode_ids(column: pa.Array, target: pa.DataType) -> pa.Array:
    """Bring an id column to `target`: dictionaries decoded, integers widened."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column if column.type.equals(target) else column.cast(target)


def embedding_dim(column_type: pa.DataType) -> int | None:
    """The length that the type of an embedding column fixes; None for lists of any length.

    Raises:
        SchemaError: The type is not a list of floating-point numbers.
    """
    if isinstance(column_type, pa.BaseExtensionType):
        return embedding_dim(column_type.storage_type)
    types = pa.types
    is_list = types.is_list(column_type) or types.is_large_list(column_type) or types.is_fixed_size_list(column_type)
    if not is_list or not types.is_floating(column_type.value_type):
        raise SchemaError(f"has type {column_type}; an embedding is a list of float16, float32 or float64")
    return int(column_type.list_size) if types.is_fixed_size_list(column_type) else None


def half_floats(column: pa.Array) -> pa.Array:
    """Lists of uint16 as lists of the float16 numbers that have these bits; other columns as they are.

    NeMo Curator writes clusters so (since 26.09, by default): its data frames have no float16.
    """
    kind = column.type
    if pa.types.is_fixed_size_list(kind) and pa.types.is_uint16(kind.value_type):
        return column.view(pa.list_(pa.float16(), kind.list_size))
    for is_kind, target in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_kind(kind) and pa.types.is_uint16(kind.value_type):
            return column.view(target(pa.float16()))
    return column


_TEXT_AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


@dataclass(frozen=True)
class RawVectors:
    """The vectors of a batch before normalisation.

    Attributes:
        values: (m, dim) float16, float32 or float64: the rows that have the right shape, in order.
        positions: (m,) int64, their positions in the batch; None when all rows are there.
        reasons: (n,) uint8 of `Reason` for all rows of the batch.
    """

    values: NDArray[Any]
    positions: NDArray[np.int64] | None
    reasons: NDArray[np.uint8]


def _plain_lists(column: pa.Array) -> pa.Array:
    """Lists without an extension type around them; a column of nulls only is one of null lists."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    return pa.nulls(len(column), pa.list_(pa.float32())) if pa.types.is_null(column.type) else column


def list_lengths(column: pa.Array) -> NDArray[np.int64]:
    """Length of each list, shape (n,) int64; 0 for nulls."""
    column = _plain_lists(column)
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    return np.asarray(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)


def decode_vectors(column: pa.Array, dim: int) -> RawVectors:
    """Take the rows of a list column that are vectors of length `dim`, without Python objects.

    Args:
        column: `list`, `large_list` or `fixed_size_list` of floating-point numbers, n rows.
        dim: Wanted length.
    """
    column = _plain_lists(column)
    n_rows = len(column)
    reasons = np.zeros(n_rows, np.uint8)
    if pa.types.is_fixed_size_list(column.type):
        width = column.type.list_size
        flat = column.values.slice(column.offset * width, n_rows * width)
        starts = np.arange(n_rows, dtype=np.int64) * width
        if width != dim:
            reasons[:] = Reason.WRONG_LENGTH if width else Reason.EMPTY_EMBEDDING
    else:
        offsets = np.asarray(column.offsets.to_numpy(zero_copy_only=False), dtype=np.int64)
        base, end = int(offsets[0]), int(offsets[-1])
        flat = column.values.slice(base, end - base)
        starts = offsets[:-1] - base
        lengths = np.diff(offsets)
        reasons[lengths != dim] = Reason.WRONG_LENGTH
        reasons[lengths == 0] = Reason.EMPTY_EMBEDDING
    if column.null_count:
        reasons[pc.is_null(column).to_numpy(zero_copy_only=False)] = Reason.NULL_EMBEDDING
    if flat.null_count:
        hole = np.flatnonzero(pc.is_null(flat).to_numpy(zero_copy_only=False))
        owner = np.searchsorted(starts, hole, side="right") - 1
        # several empty lists may start where the owner does; the last of them is the one that is not empty
        bad = np.unique(owner)
        reasons[bad[reasons[bad] == Reason.OK]] = Reason.NULL_VALUE
    numbers = _numbers(flat)
    if not reasons.any():
        return RawVectors(numbers[: n_rows * dim].reshape(n_rows, dim), None, reasons)
    positions = np.flatnonzero(reasons == Reason.OK)
    if positions.size == 0:
        return RawVectors(np.empty((0, dim), numbers.dtype), positions, reasons)
    values = numbers[starts[positions][:, None] + np.arange(dim)]
    return RawVectors(values, positions, reasons)


def _numbers(flat: pa.Array) -> NDArray[Any]:
    if flat.null_count == 0:
        return np.asarray(flat.to_numpy(zero_copy_only=True))
    dtype = flat.type.to_pandas_dtype()
    data = flat.buffers()[1]
    return np.frombuffer(data, dtype)[flat.offset : flat.offset + len(flat)]


def vector_array(matrix: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """Wrap a C-contiguous (n, D) float32 matrix as a fixed-size list array, without a copy."""
    flat = pa.array(matrix.reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])


def matrix_of(column: pa.Array | pa.ChunkedArray) -> NDArray[np.float32]:
    """View a fixed-size list column without nulls as a (n, D) float32 matrix; copies only if chunked."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    width = column.type.list_size
    flat = column.values.slice(column.offset * width, len(column) * width)
    return np.asarray(flat.to_numpy(zero_copy_only=True)).reshape(len(column), width)


def check_sound(rows: pa.RecordBatch | pa.Table, *, values: bool = True) -> None:
    """Raise ArrowInvalid if columns are damaged inside, as by offsets that lead outside; any bytes do as text.

    Args:
        rows: What was decoded.
        values: Look at all values; what is only copied may be anything.
    """
    if not values:
        rows.validate()
        return
    for column in rows.columns:
        kind = _TEXT_AS_BYTES.get(column.type)
        for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
            (chunk if kind is None else chunk.view(kind)).validate(full=True)
