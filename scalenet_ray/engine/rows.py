"""Rows of Ray Data: packed rows of tiles, the seconds column, and a datasource of generators."""

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

# --- rows of tiles ------------------------------------------------------------------------------------


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
    """A tile between two stages.

    Attributes:
        tile: its coordinates.
        credit: its share of the image.
        settled: whether the decision on it is made, and it only has to be detected.
        look_pixels: number of pixels that Scale Net computed for it.
        guards: limits that were hit on it.
    """

    tile: Tile
    credit: Fraction
    settled: bool = False
    look_pixels: int = 0
    guards: tuple[str, ...] = ()


class TileRow(NamedTuple):
    """Tiles with their pixels, [height, width, 3] uint8 RGB each, and finished results."""

    tiles: list[PackedTile]
    pixels: list[np.ndarray]
    results: list[TileResult]


def pack(batch: TileRow) -> pa.Table:
    """Pack tiles and results into a table of one row."""
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


def unpack(table: pa.Table) -> Iterator[TileRow]:
    """Unpack the rows of a table; pixels are read-only views of the table's memory."""
    for i in range(table.num_rows):
        tiles = [_packed_tile(row) for row in from_ipc(table["tiles"][i].as_buffer()).to_pylist()]
        results = tile_results_from_table(from_ipc(table["results"][i].as_buffer()))
        yield TileRow(tiles, _views(table["pixels"][i].as_buffer(), tiles), results)


def pack_results(results: Sequence[TileResult]) -> pa.Table:
    """Pack tile results into a table of one row."""
    return pa.table([[to_ipc(tile_results_table(results))]], schema=_RESULTS_ROW)


def unpack_results(table: pa.Table) -> list[TileResult]:
    """Unpack the tile results of a table's rows, in order."""
    cells = (table["results"][i].as_buffer() for i in range(table.num_rows))
    return [result for cell in cells for result in tile_results_from_table(from_ipc(cell))]


def _cell(pixels: Sequence[np.ndarray]) -> pa.Array:
    """Concatenate the pixels of all tiles in one cell, with a single copy."""
    data = b"".join(np.ascontiguousarray(array).data for array in pixels)
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
        # Buffers of the object store are read-only; others must behave alike, or code breaks on a cluster only.
        view.flags.writeable = False
        views.append(view)
        offset += size
    return views


# --- seconds column -----------------------------------------------------------------------------------


_SECONDS = "seconds"


_SECONDS_TYPE = pa.list_(pa.float64(), len(STAGES))


def timed_table(make: Callable[[], pa.Table]) -> pa.Table:
    """Make a table of one row, and add a column with the busy seconds of each stage."""
    with measured() as tally:
        table = make()
    cell = [tally.seconds[stage] for stage in STAGES]
    return table.append_column(pa.field(_SECONDS, _SECONDS_TYPE), pa.array([cell], _SECONDS_TYPE))


def with_seconds_column(call: Callable[[Any, pa.Table], pa.Table]) -> Callable[[Any, pa.Table], pa.Table]:
    """Decorate a stage's `__call__`: the seconds column of its output holds its own seconds plus those of its input."""

    @wraps(call)
    def timed_call(stage: Any, table: pa.Table) -> pa.Table:
        """Call the stage and add the seconds column."""

        def make() -> pa.Table:
            """Add the seconds of the input, then call the stage."""
            add_seconds(read_seconds(table))
            return call(stage, table)

        return timed_table(make)

    return timed_call


def read_seconds(table: pa.Table) -> Mapping[str, float]:
    """Sum the seconds column over a table's rows: stage -> seconds; empty for a table without the column."""
    if _SECONDS not in table.column_names:
        return {}
    rows = table.column(_SECONDS).to_pylist()
    return {stage: sum(row[i] for row in rows) for i, stage in enumerate(STAGES)}


# --- read tasks ---------------------------------------------------------------------------------------


class GeneratorSource(Datasource):
    """Datasource whose read tasks are Python generators of unknown length, one per reader.

    Ray Data replays a task that died *by position*: `read` must yield the same tables again.

    Args:
        readers: number of readers.
    """

    def __init__(self, readers: int = 1) -> None:
        super().__init__()
        self._readers = readers

    def read(self, reader: int) -> Iterator[pa.Table]:
        """Yield the tables of one reader.

        Args:
            reader: its number, from 0.
        """
        raise NotImplementedError

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: the size is unknown."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return one task per reader, whatever the `parallelism`."""
        del parallelism, per_task_row_limit, data_context
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(self.read, reader), metadata) for reader in range(self._readers)]
