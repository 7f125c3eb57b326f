"""Rows of tiles between the stages."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalenet_ray.core.detections import Detections, Failure, TileResult
from scalenet_ray.core.geometry import ANY_AREA, AreaRange, Tile, Window
from scalenet_ray.engine.rows import PackedTile, TileRow, pack, pack_results, unpack, unpack_results


@st.composite
def packed_tiles(draw: st.DrawFn) -> PackedTile:
    x0, y0, width, height = (draw(st.integers(*limits)) for limits in ((0, 50), (0, 50), (1, 50), (1, 50)))
    low = draw(st.floats(0, 1e6))
    tile = Tile(
        draw(st.integers(-(2**63), 2**63 - 1)),
        tuple(draw(st.lists(st.integers(0, 2**31 - 1), max_size=3))),
        (120, 110),
        Window(x0, y0, x0 + width, y0 + height),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        valid_area=draw(st.sampled_from([ANY_AREA, AreaRange(low, math.inf), AreaRange(low, 2 * low)])),
        window_budget=draw(st.integers(0, 1000)),
    )
    guards = tuple(draw(st.lists(st.sampled_from(["max_depth", "no_change"]), max_size=2)))
    return PackedTile(tile, draw(st.fractions(0, 1)), draw(st.booleans()), draw(st.integers(0, 2**40)), guards)


def pixels_of(tiles: list[PackedTile]) -> list[np.ndarray]:
    rng = np.random.default_rng(len(tiles))
    return [rng.integers(0, 256, (one.tile.height, one.tile.width, 3), np.uint8) for one in tiles]


def found(image_id: int, *, with_masks: bool = False) -> TileResult:
    detections = Detections(
        np.full((2, 4), 3.5), np.array([0.5, 0.25]), np.array([3, 90]), masks=(b"a", b"") if with_masks else None
    )
    return TileResult(image_id, (0, 2), Fraction(1, 7), detections, guards=("max_windows",), image_hw=(5, 6))


@given(st.lists(packed_tiles(), max_size=5))
def test_packing_and_unpacking_is_the_identity(tiles: list[PackedTile]) -> None:
    pixels = pixels_of(tiles)
    table = pack(TileRow(tiles, pixels, []))
    assert table.num_rows == 1
    (batch,) = unpack(table)
    assert batch.tiles == tiles
    assert batch.results == []
    assert all(np.array_equal(one, other) for one, other in zip(batch.pixels, pixels, strict=True))


def test_results_with_and_without_masks_and_failures_travel_along() -> None:
    failed = TileResult(3, (), Fraction(1), failure=Failure("read", "truncated"))
    (batch,) = unpack(pack(TileRow([], [], [found(1, with_masks=True), found(2), failed])))
    assert [one.detections.masks for one in batch.results] == [(b"a", b""), None, None]
    assert batch.results[2].failure == Failure("read", "truncated")
    assert batch.results[2].image_hw is None
    assert batch.results[0].image_hw == (5, 6)
    assert batch.results[0].guards == ("max_windows",)
    assert [one.credit for one in batch.results] == [Fraction(1, 7), Fraction(1, 7), 1]


def test_rows_of_several_tables_in_several_chunks_come_out_in_order() -> None:
    tile = Tile(1, (), (4, 4), Window(0, 0, 4, 4), 2, 3)
    batches = [
        TileRow([PackedTile(tile, Fraction(1, i))] * i, [np.full((2, 3, 3), i, np.uint8)] * i, [found(i)])
        for i in range(1, 4)
    ]
    together = pa.concat_tables([pack(batch) for batch in batches])
    assert together.column("pixels").num_chunks == 3
    for table in (together, together.combine_chunks(), together.slice(0, 3)):
        back = list(unpack(table))
        assert [len(batch.tiles) for batch in back] == [1, 2, 3]
        assert [[int(one.mean()) for one in batch.pixels] for batch in back] == [[1], [2, 2], [3, 3, 3]]
        assert [batch.results[0].image_id for batch in back] == [1, 2, 3]
    (last,) = unpack(together.combine_chunks().slice(2))
    assert [int(one.mean()) for one in last.pixels] == [3, 3, 3]


def test_pixels_that_do_not_lie_in_one_piece_are_packed_as_they_look() -> None:
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    tile = Tile(1, (), (8, 8), Window(0, 0, 8, 8), 4, 4)
    flipped = image[::2, ::-2]
    (batch,) = unpack(pack(TileRow([PackedTile(tile, Fraction(1))], [flipped], [])))
    assert np.array_equal(batch.pixels[0], flipped)


def test_unpacked_pixels_are_views_that_cannot_be_written() -> None:
    tile = Tile(1, (), (4, 4), Window(0, 0, 4, 4), 4, 4)
    (batch,) = unpack(pack(TileRow([PackedTile(tile, Fraction(1))], [np.zeros((4, 4, 3), np.uint8)], [])))
    assert not batch.pixels[0].flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        batch.pixels[0][0, 0, 0] = 1


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_are_packed_in_one_row_however_many(count: int) -> None:
    table = pack_results([found(i, with_masks=True) for i in range(count)])
    assert table.num_rows == 1
    assert [one.image_id for one in unpack_results(table)] == list(range(count))
    both = pa.concat_tables([table, pack_results([found(9)])])
    assert [one.image_id for one in unpack_results(both)] == [*range(count), 9]
