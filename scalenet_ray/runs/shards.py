"""Read the shards of a run folder: groups of finished images. `runs.batch` writes them.

Each shard is two Parquet files of the same name, `detections/POLICY-NUMBER.parquet` and `images/POLICY-NUMBER.parquet`.
The one under `images` is written last and commits the shard: detections without it belong to a run that was
interrupted in between, and are written again. Shards are read in the order of their numbers. If two of them record the
same image (it failed and was retried), the later record is used. Records of images that are no longer inputs of the
run are ignored.

The schema metadata of an `images` file holds the busy seconds of each stage since the shard before, summed over all
processes, and the wall-clock seconds of work since then. Files of older versions lack some columns and metadata: the
columns are read as null, the metadata as nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scalenet_ray.core.errors import UserError
from scalenet_ray.core.timing import STAGES
from scalenet_ray.data import storage
from scalenet_ray.data.image_records import ImageRecords
from scalenet_ray.data.schemas import DETECTIONS, IMAGES
from scalenet_ray.runs.tables import FAILURES, INPUTS, explain_damage, in_image_order, read_parquet

_SCHEMAS = {"detections": DETECTIONS, "images": IMAGES}

STAGE_SECONDS = b"seconds_by_stage"
"""Metadata of an `images` file: busy seconds by stage, as JSON."""

WORK_SECONDS = b"seconds_of_work"
"""Metadata of an `images` file: wall-clock seconds of work."""

MIN_RATE_SECONDS = 2.0
"""No rate is computed from less work than this."""


class CurrentRecords(NamedTuple):
    """The records of one policy that are in use: the last one of each image that is an input of the run.

    Attributes:
        ids: [N] int64, the images, in ascending order.
        shards: [N] int64, the index of each image's record among the policy's shards.
        files: N files, as the run was last given them; None if they were not asked for, or for a run of an older
            version.
    """

    ids: np.ndarray
    shards: np.ndarray
    files: pa.ChunkedArray | None

    def rows(self, table: pa.Table, shard: int) -> pa.Table:
        """Rows of `table`, the images or the detections of the shard at index `shard`, whose record is in use."""
        if not len(self.ids):
            return table.slice(0, 0)
        ids = table.column("image_id").to_numpy()
        at = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        current = (self.ids[at] == ids) & (self.shards[at] == shard)
        rows = table.filter(pa.array(current))
        if self.files is None or "file" not in table.column_names:
            return rows
        files = self.files.take(pa.array(at[current])).cast(pa.string())
        return rows.set_column(rows.column_names.index("file"), "file", files)


class ShardReader:
    """Reads the shards of a run folder, of a kind: detections or images.

    `columns` are "image_id" and others, None for all.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def inputs(self, columns: Sequence[str] | None = None) -> pa.Table | None:
        """inputs.parquet (schema INPUTS), None for a run of an older version; raises `UserError` if it is damaged."""
        table = self.read_table("inputs.parquet", columns)
        wanted = INPUTS.names if columns is None else columns
        if table is not None and (missing := [name for name in wanted if name not in table.column_names]):
            msg = f"{self.uri}/inputs.parquet must list a run's images, got no {missing[0]}: give another --output"
            raise UserError(msg)
        return table

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table | None:
        """A Parquet file of the folder, or some columns of it; None if it does not exist."""
        uri = storage.join(self.uri, name)
        return read_parquet(uri, "give another --output", columns) if storage.exists(uri) else None

    def shards(self, kind: str, policy: str) -> list[str]:
        """Addresses of the finished shards of one policy, by number."""
        return [storage.join(self.uri, kind, name) for name in self._shard_names("images", policy)]

    def _shard_names(self, kind: str, policy: str) -> list[str]:
        folder = storage.join(self.uri, kind)
        if not storage.exists(folder):
            return []
        pattern = re.compile(re.escape(policy) + r"-(\d+)\.parquet")
        names = [uri.rsplit("/", 1)[-1] for uri in storage.list_files(folder, (".parquet",))]
        numbers = {name: int(match[1]) for name in names if (match := pattern.fullmatch(name))}
        return sorted(numbers, key=lambda name: (numbers[name], name))

    def check_shards(self, policy: str) -> None:
        """Check that the detections of all finished shards exist and are whole; raises `UserError` that names one."""
        existing = set(self._shard_names("detections", policy))
        for uri in self.shards("detections", policy):
            if uri.rsplit("/", 1)[-1] not in existing:
                raise UserError(_missing_half(uri))
            # S3 writes an object completely or not at all, so only local files are opened.
            if (path := storage.local_path(uri)) is not None:
                explain_damage(uri, _remedy(uri), lambda path=path: pq.read_metadata(path))

    def current_records(self, policy: str, *, with_files: bool = True) -> CurrentRecords:
        """The records of one policy that are in use; raises `FileNotFoundError` if there is no such run folder."""
        self._require_folder()
        shards = [self._read("images", uri, ["image_id"]) for uri in self.shards("images", policy)]
        return self._current(shards, with_files=with_files)

    def _current(self, shards: Sequence[pa.Table], *, with_files: bool) -> CurrentRecords:
        if not shards:
            empty = np.zeros(0, np.int64)
            return CurrentRecords(empty, empty, ImageRecords.listed([]).files if with_files else None)
        indices = np.repeat(np.arange(len(shards)), [table.num_rows for table in shards])
        ids = np.concatenate([table.column("image_id").to_numpy() for table in shards])
        # The last record of each image is the first one in reverse order.
        unique, first = np.unique(ids[::-1], return_index=True)
        indices = indices[::-1][first]
        inputs = self.inputs(None if with_files else ["image_id", "counts"])
        if inputs is None:
            return CurrentRecords(unique, indices, None)
        inputs = inputs.filter(pc.field("counts"))
        is_input = np.isin(unique, inputs.column("image_id").to_numpy())
        ids, indices = unique[is_input], indices[is_input]
        if not with_files:
            return CurrentRecords(ids, indices, None)
        given = ImageRecords(inputs)
        return CurrentRecords(ids, indices, given.take(given.positions(ids)).files)

    def parts(
        self, kind: str, policy: str, columns: Sequence[str] | None = None, current: CurrentRecords | None = None
    ) -> Iterator[pa.Table]:
        """Rows of one policy that are in use, one table per shard.

        Raises:
            FileNotFoundError: if there is no such run folder.
            UserError: if a shard is damaged, or lacks its other half; it is named.
        """
        current = current or self.current_records(policy, with_files=_with_files(columns))
        for i, uri in enumerate(self.shards(kind, policy)):
            yield current.rows(self._read(kind, uri, columns), i)

    def table(self, kind: str, policy: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of one policy that are in use, by image id, then descending score; raises as `parts`."""
        if kind == "images":
            self._require_folder()
            shards = [self._read(kind, uri, columns) for uri in self.shards(kind, policy)]
            current = self._current(shards, with_files=_with_files(columns))
            parts = [current.rows(table, i) for i, table in enumerate(shards)]
        else:
            parts = list(self.parts(kind, policy, columns))
        return in_image_order(pa.concat_tables([_schema(kind, columns).empty_table(), *parts]))

    def finished(self, policy: str) -> ImageRecords:
        """Written images, failed ones included, by id; with the sizes that they had."""
        return ImageRecords(self.table("images", policy, ["image_id", "file", "height", "width"]))

    def find_failures(self, policies: Sequence[str]) -> pa.Table:
        """Failed images (schema FAILURES), by policy, then image id."""
        columns = ["policy", "image_id", "file", "failure_stage", "failure_reason"]
        tables = [FAILURES.empty_table()]
        for policy in policies:
            stages = (part.column("failure_stage") for part in self.parts("images", policy, ["image_id", columns[3]]))
            if all(column.null_count == len(column) for column in stages):
                continue
            parts = [_schema("images", columns).empty_table()]
            for part in self.parts("images", policy, columns):
                parts.append(part.filter(pc.field("failure_stage").is_valid()))
            tables.append(in_image_order(pa.concat_tables(parts)).rename_columns(FAILURES.names))
        return pa.concat_tables(tables)

    def seconds_by_stage(self, policy: str) -> dict[str, float]:
        """Busy seconds of each stage, summed over all processes, up to the last finished shard."""
        total = dict.fromkeys(STAGES, 0.0)
        for _, metadata in self._shard_metadata(policy):
            for stage, seconds in json.loads(metadata.get(STAGE_SECONDS, b"{}")).items():
                total[stage] += seconds
        return total

    def speed(self, policy: str) -> dict[str, float | None]:
        """Throughput of one policy, over all drivers that worked on it.

        Returns:
            "images_per_second": from the start of the first image to the end of the last, pauses and start-up excluded;
            None if that is under two seconds or unknown. "seconds": to the end of the last image, start-up included.
        """
        images, seconds = 0, 0.0
        for count, metadata in self._shard_metadata(policy):
            if WORK_SECONDS in metadata:
                images, seconds = images + count, seconds + float(metadata[WORK_SECONDS])
        rate = images / seconds if seconds >= MIN_RATE_SECONDS else None
        return {"images_per_second": rate, "seconds": self.seconds_at_work(policy)}

    def seconds_at_work(self, policy: str) -> float:
        """Seconds from the start of the run to the end of the last written image, pauses excluded."""
        tables = (self._read("images", uri, ["finished_at"]) for uri in self.shards("images", policy))
        return max((at for table in tables for at in table.column("finished_at").drop_null().to_pylist()), default=0.0)

    def _shard_metadata(self, policy: str) -> Iterator[tuple[int, Mapping[bytes, bytes]]]:
        """Number of images and schema metadata of each shard."""
        for uri in self.shards("images", policy):
            data = pa.BufferReader(storage.read_bytes(uri))
            file = explain_damage(uri, _remedy(uri), lambda data=data: pq.ParquetFile(data))
            yield file.metadata.num_rows, file.schema_arrow.metadata or {}

    def _require_folder(self) -> None:
        if not storage.exists(self.uri):
            msg = f"{self.uri} must be a run folder, got no such folder: check the path, and that this machine sees it"
            raise FileNotFoundError(msg)

    def _read(self, kind: str, uri: str, columns: Sequence[str] | None) -> pa.Table:
        schema = _schema(kind, columns)
        try:
            table = read_parquet(uri, _remedy(uri), schema.names)
        except FileNotFoundError:
            if kind == "images":
                raise
            raise UserError(_missing_half(uri)) from None
        if "image_id" in schema.names and "image_id" not in table.column_names:
            msg = f"{uri} must be a shard of a run, got a table without image_id: {_remedy(uri)}"
            raise UserError(msg)
        # Columns that a shard of an older version lacks are null.
        values = [
            table.column(field.name).cast(field.type)
            if field.name in table.column_names
            else pa.nulls(table.num_rows, field.type)
            for field in schema
        ]
        return pa.table(values, schema=schema)


def _with_files(columns: Sequence[str] | None) -> bool:
    return columns is None or "file" in columns


def _schema(kind: str, columns: Sequence[str] | None) -> pa.Schema:
    schema = _SCHEMAS[kind]
    return schema if columns is None else pa.schema([schema.field(name) for name in columns])


# --- damaged shards -----------------------------------------------------------------------------------


def _halves(uri: str) -> tuple[str, str]:
    """A shard file's path in its run folder, and the address of its counterpart: images and detections."""
    base, kind, name = uri.rsplit("/", 2)
    return f"{kind}/{name}", storage.join(base, "images" if kind == "detections" else "detections", name)


def _remedy(uri: str) -> str:
    return f"delete it and its other half, {_halves(uri)[1]}, and --resume works on their images again"


def _missing_half(uri: str) -> str:
    name, images = _halves(uri)
    remedy = f"delete {images}, and --resume works on them again"
    return f"{images} says that its images are finished, but {name} is missing: {remedy}"
