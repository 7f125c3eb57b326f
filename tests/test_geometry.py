"""Windows, tiles, and the conversion between the frames of image and tile."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalenet_ray.core.geometry import (
    Tile,
    Window,
    boxes_to_image,
    boxes_to_tile,
    cut_tile,
    edges_inside_image,
)


@st.composite
def tiles(draw: st.DrawFn) -> Tile:
    """Any window of any image, resampled to any size from a 40th to 40 times its own."""
    height, width = draw(st.integers(1, 3000)), draw(st.integers(1, 3000))
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    window = Window(x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height)))
    zoom = draw(st.floats(1 / 40, 40))
    size = max(1, int(window.height * zoom)), max(1, int(window.width * zoom))
    return Tile(1, (0,), (height, width), window, *size)


@given(tiles(), st.integers(0, 2**32 - 1))
def test_image_to_tile_to_image_is_the_identity(tile: Tile, seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(-100, 3100, (8, 4)).astype(np.float32)
    back = boxes_to_image(boxes_to_tile(boxes, tile), tile)
    # float32 holds 24 bits: the tile's coordinates, up to 40 * 3200 + 40 * 3000, to about 1 / 64.
    np.testing.assert_allclose(back, boxes, atol=(1 / 32) / min(tile.zoom_xy) + 1e-3)


@given(tiles(), st.integers(0, 2**32 - 1))
def test_whole_tile_pixels_carried_to_the_image_and_back_stay_within_half_a_tile_pixel(tile: Tile, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.integers(0, [tile.width + 1, tile.height + 1, tile.width + 1, tile.height + 1], (16, 4))
    back = boxes_to_tile(boxes_to_image(points, tile), tile)
    assert np.abs(back - points).max() < 0.5


def test_boxes_are_carried_as_worked_by_hand() -> None:
    # 40 x 20 pixels of the image at (10, 30) become 80 x 60: 2 tile pixels for one along x, 3 along y.
    tile = Tile(7, (0,), (100, 100), Window(10, 30, 50, 50), 60, 80)
    assert tile.zoom_xy == (2.0, 3.0)
    np.testing.assert_array_equal(boxes_to_image(np.array([[4, 6, 8, 12]]), tile), [[12, 32, 14, 34]])
    np.testing.assert_array_equal(boxes_to_tile(np.array([[12, 32, 14, 34]]), tile), [[4, 6, 8, 12]])


def test_no_boxes_stay_no_boxes_of_four() -> None:
    tile = Tile(7, (), (10, 10), Window(0, 0, 10, 10), 20, 20)
    for carry in (boxes_to_image, boxes_to_tile):
        carried = carry(np.zeros((0, 4)), tile)
        assert carried.shape == (0, 4)
        assert carried.dtype == np.float32


@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_what_is_drawn_in_the_image_is_found_in_the_tile_within_half_a_tile_pixel(seed: int, zoom: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(24, 90, 2)
    x0, y0 = rng.integers(0, [width - 20, height - 20])
    window = Window(int(x0), int(y0), int(rng.integers(x0 + 18, width)), int(rng.integers(y0 + 18, height)))
    box = np.array([window.x0 + 5, window.y0 + 4, window.x0 + 12, window.y0 + 10])
    image = np.zeros((height, width, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    # Odd sizes: the two zooms differ, and neither is the nominal one.
    tile_hw = window.height * zoom + int(rng.integers(3)), window.width * zoom + int(rng.integers(3))
    tile = Tile(1, (0,), (int(height), int(width)), window, *tile_hw)
    lit = cut_tile(image, tile)[:, :, 0] > 127
    rows, columns = np.flatnonzero(lit.any(axis=1)), np.flatnonzero(lit.any(axis=0))
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert np.abs(boxes_to_tile(box[None], tile)[0] - seen).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("xyxy", [(0, 0, 0, 5), (0, 0, 5, 0), (3, 0, 2, 5), (-1, 0, 5, 5), (0, -1, 5, 5)])
def test_an_empty_window_or_one_that_starts_before_the_image_is_refused(xyxy: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"a window must have 0 <= x0 < x1 and 0 <= y0 < y1, got \("):
        Window(*xyxy)


@pytest.mark.parametrize("window", [Window(0, 0, 11, 10), Window(0, 0, 10, 21)])
def test_a_tile_whose_window_leaves_the_image_is_refused(window: Window) -> None:
    with pytest.raises(ValueError, match=r"leaves its image of \(20, 10\) \(height, width\)"):
        Tile(1, (), (20, 10), window, 5, 5)


@pytest.mark.parametrize("hw", [(0, 5), (5, 0), (-1, 5)])
def test_a_tile_without_pixels_is_refused(hw: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a tile must be at least 1 x 1 pixels, got "):
        Tile(1, (), (20, 10), Window(0, 0, 10, 20), *hw)


def test_edges_inside_the_image_are_those_that_cut_through_it() -> None:
    def edges(x0: int, y0: int, x1: int, y1: int) -> tuple[bool, bool, bool, bool]:
        return edges_inside_image(Tile(1, (0,), (20, 10), Window(x0, y0, x1, y1), 4, 4))

    assert edges(0, 0, 10, 20) == (False, False, False, False)
    assert edges(0, 0, 9, 20) == (False, False, True, False)
    assert edges(1, 0, 10, 19) == (True, False, False, True)
    assert edges(1, 1, 9, 19) == (True, True, True, True)
