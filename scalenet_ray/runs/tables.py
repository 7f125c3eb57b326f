"""Parquet tables of a run folder: schemas, reading, and errors that name a damaged file and its remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scalenet_ray.core.errors import UserError
from scalenet_ray.data import storage

FAILURES = pa.schema(
    [
        ("policy", pa.string()),
        ("image_id", pa.int64()),
        ("file", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
    ]
)
"""One row per failed image and policy."""


INPUTS = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file", pa.large_string()),
        ("height", pa.int64()),
        ("width", pa.int64()),
        ("counts", pa.bool_()),
    ]
)
"""One row per image that was ever an input of the run; `counts` is true for its current inputs.

`height` and `width` are those of the annotations, or null.
"""

_ROWS_PER_GROUP = 10_000

_ENCODINGS = {"image_id": "DELTA_BINARY_PACKED", "file": "DELTA_BYTE_ARRAY"}
"""Ids ascend, and names of files begin alike: differences are short, where a dictionary would hold each of them."""


def read_parquet(uri: str, remedy: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read some columns of a Parquet file; if it is damaged, raise a `UserError` that ends with the remedy."""
    # Read by the main thread, without prefetching: an Arrow thread that releases a Python object during interpreter
    # shutdown aborts the process ("terminate called without an active exception").
    data = pa.BufferReader(storage.read_bytes(uri))
    # `pq.read_table` would raise for a column that a shard of an older version lacks.
    return explain_damage(
        uri, remedy, lambda: pq.ParquetFile(data, pre_buffer=False).read(columns=columns, use_threads=False)
    )


def explain_damage(uri: str, remedy: str, read: Callable[[], Any]) -> Any:
    """Return `read()`; turn Arrow's error for a damaged file into a `UserError` with the file and the remedy."""
    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        msg = f"{uri} must be a Parquet file of a run, got a damaged one ({str(error).splitlines()[0]}): {remedy}"
        raise UserError(msg) from error


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as the content of a Parquet file, written in row groups so that a long one takes little memory."""
    sink = pa.BufferOutputStream()
    # Names of columns are allowed, which pyarrow's stubs do not say.
    with_dictionary: Any = [name for name in table.column_names if name not in _ENCODINGS]
    pq.write_table(
        table,
        sink,
        row_group_size=_ROWS_PER_GROUP,
        use_dictionary=with_dictionary,
        column_encoding={name: _ENCODINGS[name] for name in table.column_names if name in _ENCODINGS},
    )
    return sink.getvalue().to_pybytes()


def in_image_order(table: pa.Table) -> pa.Table:
    """Sort rows by image id; rows of one image keep their order."""
    # Arrow's sort is not stable: the row number breaks ties.
    numbered = table.append_column("at", pa.array(np.arange(table.num_rows), pa.int64()))
    return numbered.sort_by([("image_id", "ascending"), ("at", "ascending")]).drop_columns(["at"])
