"""Masks from tile to window to image, without loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from scalenet_ray.core.geometry import Tile, Window
from scalenet_ray.core.masks import mask_of_image, mask_of_window


def _encode(mask: np.ndarray) -> bytes:
    return bytes(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"])  # type: ignore[arg-type]


def _decode(counts: bytes, hw: tuple[int, int]) -> np.ndarray:
    return coco_mask.decode({"size": list(hw), "counts": counts}).astype(bool)


def _ellipse(hw: tuple[int, int], centre: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
    """[h, w] bool: the pixels whose centre lies in an ellipse; centre and radii as (y, x)."""
    y, x = (np.arange(n) + 0.5 for n in hw)
    return ((y[:, None] - centre[0]) / radii[0]) ** 2 + ((x[None] - centre[1]) / radii[1]) ** 2 <= 1


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


@given(st.integers(0, 2**32 - 1), st.floats(1.0, 3.0))
def test_a_mask_seen_in_a_zoomed_tile_is_the_same_mask_in_the_image(seed: int, zoom: float) -> None:
    rng = np.random.default_rng(seed)
    image_hw = (90, 110)
    x0, y0 = (int(n) for n in rng.integers(0, 40, 2))
    window = Window(x0, y0, x0 + int(rng.integers(40, 60)), y0 + int(rng.integers(40, 50)))
    tile = Tile(1, (0,), image_hw, window, round(window.height * zoom), round(window.width * zoom))
    corner = np.array([window.y0, window.x0])
    centre = rng.uniform(14, 26, 2) + corner
    radii = rng.uniform(6, 12, 2)
    truth = _ellipse(image_hw, tuple(centre), tuple(radii))
    # What a detector would see: the same ellipse on the tile's own pixels.
    zoom_x, zoom_y = tile.zoom_xy
    centre_in_tile = (centre - corner) * [zoom_y, zoom_x]
    in_tile = _ellipse((tile.height, tile.width), tuple(centre_in_tile), tuple(radii * [zoom_y, zoom_x]))
    in_window = mask_of_window(_encode(in_tile), tile)
    back = _decode(mask_of_image(in_window, window, image_hw), image_hw)
    # The image takes the tile pixel under each centre, so only the outline may differ, by half a pixel: of 12 pixels
    # across, a sixth of the area.
    assert _iou(back, truth) > 0.8


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_at_a_whole_zoom_the_window_gets_exactly_its_mask(height: int, width: int, zoom: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    tile = Tile(1, (0,), (height, width), Window(0, 0, width, height), height * zoom, width * zoom)
    enlarged = np.kron(mask, np.ones((zoom, zoom), bool)).astype(bool)
    np.testing.assert_array_equal(_decode(mask_of_window(_encode(enlarged), tile), (height, width)), mask)


def test_each_pixel_takes_the_tile_pixel_that_its_centre_lies_in() -> None:
    # Two rows of five tile pixels seen in three: centres at 5/6, 15/6 and 25/6 of five: pixels 0, 2 and 4.
    tile = Tile(1, (0,), (1, 3), Window(0, 0, 3, 1), 1, 5)
    for at, wanted in ((0, [1, 0, 0]), (1, [0, 0, 0]), (2, [0, 1, 0]), (4, [0, 0, 1])):
        mask = np.zeros((1, 5), bool)
        mask[0, at] = True
        assert _decode(mask_of_window(_encode(mask), tile), (1, 3)).astype(int).tolist() == [wanted]


@pytest.mark.parametrize("fill", [False, True])
def test_empty_and_full_masks_stay_what_they_are(fill: bool) -> None:
    window = Window(3, 2, 8, 9)
    tile = Tile(1, (0,), (10, 12), window, 13, 11)
    counts = mask_of_window(_encode(np.full((13, 11), fill)), tile)
    assert _decode(counts, (7, 5)).all() == fill
    whole = _decode(mask_of_image(counts, window, (10, 12)), (10, 12))
    assert whole.sum() == (35 if fill else 0)
    assert whole[2:9, 3:8].all() == fill


def test_a_window_that_is_the_image_changes_nothing() -> None:
    mask = np.random.default_rng(0).random((6, 7)) < 0.5
    counts = _encode(mask)
    assert mask_of_image(counts, Window(0, 0, 7, 6), (6, 7)) == counts
