"""Rows of Ray Data: packed micro-batches of tiles, generator read tasks, seconds that travel with a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial, wraps
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from scalenet_ray.core.detections import TileResult
from scalenet_ray.core.geometry import AreaRange, Tile, Window
from scalenet_ray.core.timing import STAGES, add_seconds, measured
from scalenet_ray.data.schemas import from_ipc, tile_results_from_table, tile_results_table, to_ipc

__all__ = [
    "GeneratorSource",
    "MicroBatch",
    "PackedTile",
    "carries_seconds",
    "measure",
    "pack",
    "pack_results",
    "seconds_of",
    "unpack",
    "unpack_results",
]

_TILES = pa.schema(
    [
        ("image_id", pa.int64()),
        ("path", pa.list_(pa.int32())),
        ("image_hw", pa.list_(pa.int32(), 2)),
        ("window", pa.list_(pa.int32(), 4)),
        ("hw", pa.list_(pa.int32(), 2)),
        ("keep", pa.list_(pa.float64(), 2)),
        ("window_budget", pa.int32()),
        ("credit", pa.string()),
        ("settled", pa.bool_()),
        ("look_pixels", pa.int64()),
        ("guards", pa.list_(pa.string())),
    ]
)


_ROW = pa.schema([("tiles", pa.binary()), ("pixels", pa.large_binary()), ("results", pa.binary())])


_RESULTS_ROW = pa.schema([("results", pa.binary())])


@dataclass(frozen=True)
class PackedTile:
    """A tile on its way, with what the stages before this one decided.

    Attributes:
        tile: the recipe its pixels were cut by.
        credit: its share of the image.
        settled: nothing is to be decided on it any more: it is detected.
        look_pixels: pixels that Scale Net computed for it.
        guards: limits that acted on it.
    """

    tile: Tile
    credit: Fraction
    settled: bool = False
    look_pixels: int = 0
    guards: tuple[str, ...] = ()


class MicroBatch(NamedTuple):
    """Tiles with their pixels, [height, width, 3] uint8 RGB each, and results that need no more work."""

    tiles: list[PackedTile]
    pixels: list[np.ndarray]
    results: list[TileResult]


def pack(batch: MicroBatch) -> pa.Table:
    """A micro-batch as a table of one row."""
    rows = [
        {
            "image_id": packed.tile.image_id,
            "path": packed.tile.path,
            "image_hw": packed.tile.image_hw,
            "window": packed.tile.window.xyxy,
            "hw": (packed.tile.height, packed.tile.width),
            "keep": tuple(packed.tile.valid_area),
            "window_budget": packed.tile.window_budget,
            "credit": str(packed.credit),
            "settled": packed.settled,
            "look_pixels": packed.look_pixels,
            "guards": packed.guards,
        }
        for packed in batch.tiles
    ]
    tiles = to_ipc(pa.Table.from_pylist(rows, _TILES))
    results = to_ipc(tile_results_table(batch.results))
    return pa.table([[tiles], _cell(batch.pixels), [results]], schema=_ROW)


def unpack(table: pa.Table) -> Iterator[MicroBatch]:
    """The micro-batches of a table's rows; pixels are views of the table's memory, read only."""
    for i in range(table.num_rows):
        tiles = [_packed_tile(row) for row in from_ipc(table["tiles"][i].as_buffer()).to_pylist()]
        results = tile_results_from_table(from_ipc(table["results"][i].as_buffer()))
        yield MicroBatch(tiles, _views(table["pixels"][i].as_buffer(), tiles), results)


def pack_results(results: Sequence[TileResult]) -> pa.Table:
    """Tile results as a table of one row."""
    return pa.table([[to_ipc(tile_results_table(results))]], schema=_RESULTS_ROW)


def unpack_results(table: pa.Table) -> list[TileResult]:
    """The tile results of a table's rows, in order."""
    cells = (table["results"][i].as_buffer() for i in range(table.num_rows))
    return [result for cell in cells for result in tile_results_from_table(from_ipc(cell))]


def _cell(pixels: Sequence[np.ndarray]) -> pa.Array:
    """The pixels of all tiles, one after the other, as one cell; they are copied once."""
    data = b"".join(np.ascontiguousarray(each).data for each in pixels)
    offsets = np.array([0, len(data)], np.int64)
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def _packed_tile(row: dict) -> PackedTile:
    tile = Tile(
        row["image_id"],
        tuple(row["path"]),
        tuple(row["image_hw"]),
        Window(*row["window"]),
        *row["hw"],
        valid_area=AreaRange(*row["keep"]),
        window_budget=row["window_budget"],
    )
    return PackedTile(tile, Fraction(row["credit"]), row["settled"], row["look_pixels"], tuple(row["guards"]))


def _views(buffer: pa.Buffer, tiles: Sequence[PackedTile]) -> list[np.ndarray]:
    views, offset = [], 0
    for packed in tiles:
        shape = (packed.tile.height, packed.tile.width, 3)
        size = shape[0] * shape[1] * 3
        view = np.frombuffer(buffer, np.uint8, size, offset).reshape(shape)
        # Where the buffer is not the object store's it could be written, and the same code would break on a cluster.
        view.flags.writeable = False
        views.append(view)
        offset += size
    return views


class GeneratorSource(Datasource):
    """One read task for each reader, whose tables are made as they are asked for; nobody knows how many.

    Ray Data replays a task that died *by position*: `read` must yield the same tables again.

    Args:
        readers: how many.
    """

    def __init__(self, readers: int = 1) -> None:
        super().__init__()
        self._readers = readers

    def read(self, reader: int) -> Iterator[pa.Table]:
        """The tables of one reader, numbered from 0."""
        raise NotImplementedError

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A task for each reader, whatever `parallelism` Ray Data would like."""
        del parallelism, per_task_row_limit, data_context
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(self.read, reader), metadata) for reader in range(self._readers)]


_COLUMN = "seconds"


_TYPE = pa.list_(pa.float64(), len(STAGES))


def measure(make: Callable[[], pa.Table]) -> pa.Table:
    """Make a table of one row, and note in it how long each stage was busy with it."""
    with measured() as tally:
        table = make()
    cell = [tally.seconds[stage] for stage in STAGES]
    return table.append_column(pa.field(_COLUMN, _TYPE), pa.array([cell], _TYPE))


def carries_seconds(call: Callable[[Any, pa.Table], pa.Table]) -> Callable[[Any, pa.Table], pa.Table]:
    """A stage's `__call__` whose row notes its own seconds and those that its input came with."""

    @wraps(call)
    def timed_call(stage: Any, table: pa.Table) -> pa.Table:
        """The call, with its seconds in a column."""

        def make() -> pa.Table:
            """The call, after what its input took has been added."""
            add_seconds(seconds_of(table))
            return call(stage, table)

        return measure(make)

    return timed_call


def seconds_of(table: pa.Table) -> Mapping[str, float]:
    """Stage -> seconds, the sum over a table's rows; nothing for a table whose rows carry none."""
    if _COLUMN not in table.column_names:
        return {}
    rows = table.column(_COLUMN).to_pylist()
    return {stage: sum(row[i] for row in rows) for i, stage in enumerate(STAGES)}
