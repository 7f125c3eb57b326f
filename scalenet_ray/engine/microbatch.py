"""Packed rows: one Ray Data row is one micro-batch of tiles.

Ray Data shapes and bundles blocks by rows; in a loop a block that waits for rows which can only come after it
hangs the run. So a row holds several tiles, their pixels in one binary cell, and every call of the look
stage takes one row and gives one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from scalenet_ray.core.results import TileResult
from scalenet_ray.core.schemas import from_ipc, tile_results_from_table, tile_results_table, to_ipc
from scalenet_ray.core.window import AreaRange, Tile, Window

__all__ = ["MicroBatch", "PackedTile", "pack", "pack_results", "unpack", "unpack_results"]

_TILES = pa.schema(
    [
        ("image_id", pa.int64()),
        ("path", pa.list_(pa.int32())),
        ("image_hw", pa.list_(pa.int32(), 2)),
        ("window", pa.list_(pa.int32(), 4)),
        ("hw", pa.list_(pa.int32(), 2)),
        ("keep", pa.list_(pa.float64(), 2)),
        ("allowance", pa.int32()),
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
            "keep": tuple(packed.tile.keep),
            "allowance": packed.tile.allowance,
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
        keep=AreaRange(*row["keep"]),
        allowance=row["allowance"],
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
