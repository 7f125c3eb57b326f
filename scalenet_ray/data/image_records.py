"""Records of the images of a data set or a run: id, file and annotated size."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa

from scalenet_ray.core.errors import UserError, abbreviated
from scalenet_ray.core.geometry import AnyImage
from scalenet_ray.data.schemas import from_ipc, to_ipc

_RECORDS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """The entry of an image in a data set, with its annotated size in image pixels.

    `file_name` is a path as annotated, to be checked by `safe_file_name` before use, or an address (`find_images`).
    """

    image_id: int
    file_name: str
    height: int | None = None
    width: int | None = None

    @property
    def hw(self) -> tuple[int, int] | None:
        """Annotated (height, width) in image pixels, or None."""
        return None if self.height is None or self.width is None else (self.height, self.width)


OpenImage = Callable[[ImageRecord], AnyImage]
"""Opens an image: its record -> its pixels, or an image that is read by window; raises `TileError` if it cannot."""


class ImageRecords(Sequence[ImageRecord]):
    """Immutable sequence of image records in columns of `SCHEMA`, each id once: 24 bytes an image, and its name."""

    SCHEMA = pa.schema(
        [("image_id", pa.int64()), ("file", pa.large_string()), ("height", pa.int32()), ("width", pa.int32())]
    )

    def __init__(self, table: pa.Table) -> None:
        self.table = table.select(self.SCHEMA.names).cast(self.SCHEMA).combine_chunks()

    @classmethod
    def of(cls, records: Iterable[ImageRecord]) -> ImageRecords:
        """Records in columns; returns `records` if they are that already."""
        if isinstance(records, ImageRecords):
            return records
        rows = [(record.image_id, record.file_name, record.height, record.width) for record in records]
        ids, files, heights, widths = zip(*rows, strict=True) if rows else ([], [], [], [])
        sizes = (pa.array(sides, pa.int32()) for sides in (heights, widths))
        return cls(pa.table([pa.array(ids, pa.int64()), _file_column(files), *sizes], schema=cls.SCHEMA))

    @classmethod
    def listed(cls, files: Sequence[str]) -> ImageRecords:
        """Records of files, with ids from 1 in their order, of unknown size."""
        count = len(files)
        unknown = pa.nulls(count, pa.int32())
        columns = [pa.array(np.arange(1, count + 1)), _file_column(files), unknown, unknown]
        return cls(pa.table(columns, schema=cls.SCHEMA))

    @property
    def ids(self) -> np.ndarray:
        """[N] int64 image ids."""
        return self.table.column("image_id").to_numpy()

    @property
    def files(self) -> pa.ChunkedArray:
        """N file names, large_string."""
        return self.table.column("file")

    def __len__(self) -> int:
        """The number of images."""
        return self.table.num_rows

    @overload
    def __getitem__(self, at: int) -> ImageRecord: ...

    @overload
    def __getitem__(self, at: slice) -> ImageRecords: ...

    def __getitem__(self, at: int | slice) -> ImageRecord | ImageRecords:
        """One record, or some of them, copied."""
        if isinstance(at, slice):
            return self.take(np.arange(len(self))[at])
        row = range(len(self))[at]
        return ImageRecord(*(column[row].as_py() for column in self.table.columns))

    def __iter__(self) -> Iterator[ImageRecord]:
        """Iterate over the records in order."""
        for batch in self.table.to_batches(max_chunksize=_RECORDS_AT_ONCE):
            yield from map(ImageRecord, *(column.to_pylist() for column in batch.columns))

    def take(self, rows: np.ndarray) -> ImageRecords:
        """Some of the records: at [M] int64 positions, or where [N] bool."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return self if np.array_equal(rows, np.arange(len(self))) else ImageRecords(self.table.take(pa.array(rows)))

    def with_ids(self, ids: np.ndarray) -> ImageRecords:
        """The records with other ids, [N] int64."""
        return ImageRecords(self.table.set_column(0, "image_id", pa.array(ids)))

    def with_names(self, files: Sequence[str]) -> ImageRecords:
        """The records with other file names."""
        return ImageRecords(self.table.set_column(1, "file", _file_column(files)))

    def positions(self, image_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """[M] int64 positions of the images with these ids; -1 for ids of no image."""
        ids, order = self._sorted
        wanted = np.asarray(image_ids, np.int64)
        if not len(ids):
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
        return np.where(ids[at] == wanted, at if order is None else order[at], -1)

    def by_id(self, image_id: int) -> ImageRecord:
        """The record of an image; raises `KeyError` if there is none with this id."""
        (at,) = self.positions([image_id]).tolist()
        if at < 0:
            raise KeyError(image_id)
        return self[at]

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The ids in ascending order, and their positions; None if the records are in this order."""
        if np.all(self.ids[1:] > self.ids[:-1]):
            return self.ids, None
        order = np.argsort(self.ids, kind="stable")
        return self.ids[order], order

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the columns."""
        return _from_ipc, (to_ipc(self.table),)


def _file_column(files: Sequence[str]) -> pa.Array:
    try:
        return pa.array(files, pa.large_string())
    except UnicodeEncodeError as error:
        wrong = [repr(name) for name in files if not is_text(name)]
        remedy = "rename them" if sys.getfilesystemencoding() == "utf-8" else "set PYTHONUTF8=1, or rename them"
        msg = f"names of files must be UTF-8, got {abbreviated(wrong)}: {remedy}"
        raise UserError(msg) from error


def is_text(value: object) -> bool:
    """True for text without lone surrogates, which JSON allows and UTF-8 does not."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _from_ipc(data: bytes) -> ImageRecords:
    return ImageRecords(from_ipc(data))
