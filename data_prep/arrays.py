"""NumPy arrays as Arrow arrays and back, without a copy. pyarrow's own pa.array and to_numpy import pandas, where there
is one, at their first call: some tenths of a second in every process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa


def from_numpy(values: np.ndarray) -> pa.Array:
    """A contiguous array of numbers, or of booleans, as an Arrow array without nulls."""
    if values.dtype == bool:
        bits = np.packbits(values, bitorder="little")
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(bits)])
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def from_list(values: tuple[Any, ...], kind: pa.DataType) -> pa.Array:
    """Python values as an Arrow array."""
    return pa.nulls(len(values), kind) if all(value is None for value in values) else pa.array(values, kind)


def to_numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The numbers of a column without nulls, in one array."""
    dtype = np.dtype(column.type.to_pandas_dtype())
    chunks = [
        np.frombuffer(chunk.buffers()[1], dtype, len(chunk), chunk.offset * dtype.itemsize)
        for chunk in (column.chunks if isinstance(column, pa.ChunkedArray) else [column])
        if len(chunk)
    ]
    return chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, dtype), *chunks])


def in_one(column: pa.ChunkedArray) -> pa.Array:
    """A column's chunks as one array."""
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.nulls(0, column.type)
