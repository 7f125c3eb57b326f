"""Training target of the scale head: the increase of each object's detection score when its window is zoomed.

Measured once with the frozen detector on annotated images. An image is covered with overlapping windows at each of
`ZOOMS`; an object's score at a zoom is that of the best matching box of its category. The gain of a zoom is the
difference between the scores after and before it.
"""

from __future__ import annotations

import math

import numpy as np

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile, Window, boxes_to_tile, cut_tile, fit_longer_side
from scalenet_ray.core.merge import Merging, carry_to_image, iou_matrix
from scalenet_ray.core.networks import Detect
from scalenet_ray.core.scale import REFERENCE_AREA, UNIT_AREA
from scalenet_ray.data.coco import Objects

__all__ = [
    "ZOOMS",
    "gain_map",
    "gain_of_zoom",
    "measure_scores",
    "object_scores",
]

ZOOMS = (1.0, 1.5, 2.0, 2.5, 4.0)
"""Zooms at which scores are measured; in between they are interpolated in the logarithm of the zoom."""

MATCH_IOU = 0.5
"""Minimum IoU of a box that matches an object."""

_STEP = 0.6
_MIN_VISIBLE = 0.5


def object_scores(found: Detections, objects: Objects) -> np.ndarray:
    """Score of the best matching box of each object: of its category, with an IoU of at least 0.5.

    Args:
        found: detections in image pixels; labels are category ids.
        objects: N objects in image pixels.

    Returns:
        [N] float32, 0 for an object without a match.
    """
    if not len(found) or not len(objects.boxes):
        return np.zeros(len(objects.boxes), np.float32)
    matches = iou_matrix(objects.boxes, found.boxes) >= MATCH_IOU
    matches &= objects.labels[:, None] == found.labels[None]
    return (matches * found.scores[None]).max(axis=1).astype(np.float32)


def _starts(length: int, window: int) -> list[int]:
    """Offsets of windows that cover `length` with enough overlap that a small object lies inside one of them."""
    if window >= length:
        return [0]
    count = math.ceil((length - window) / (_STEP * window)) + 1
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


def _covering_tiles(image_id: int, image_hw: tuple[int, int], input_side: int, zoom: float) -> list[Tile]:
    height, width = image_hw
    longer = max(height, width)
    side = max(1, int(longer / zoom))
    window_height, window_width = min(height, side), min(width, side)
    tile_hw = fit_longer_side(window_height, window_width, input_side)
    path = () if zoom == 1.0 else (0,)
    return [
        Tile(image_id, path, image_hw, Window(x, y, x + window_width, y + window_height), *tile_hw)
        for y in _starts(height, window_height)
        for x in _starts(width, window_width)
    ]


def measure_scores(image: np.ndarray, objects: Objects, detect: Detect, merging: Merging) -> np.ndarray:
    """Measure the detection score of each object of an image at each zoom.

    Args:
        image: [h, w, 3] uint8 RGB.
        objects: N objects in image pixels.
        detect: frozen detector; its labels are category ids.
        merging: filters of boxes at window edges.

    Returns:
        [N, len(ZOOMS)] float32 scores.

    Raises:
        TileError: if the detector fails on the image.
    """
    scores = np.zeros((len(objects.boxes), len(ZOOMS)), np.float32)
    if not len(objects.boxes):
        return scores
    for column, zoom in enumerate(ZOOMS):
        tiles = _covering_tiles(0, (image.shape[0], image.shape[1]), detect.input_side, zoom)
        for tile, found in zip(tiles, detect([cut_tile(image, tile) for tile in tiles]), strict=True):
            if isinstance(found, TileError):
                raise found
            in_image = carry_to_image(found, tile, merging)
            scores[:, column] = np.maximum(scores[:, column], object_scores(in_image, objects))
    return scores


def gain_of_zoom(scores: np.ndarray, seen_at: float, zoom: float) -> np.ndarray:
    """Increase of each object's score when the zoom grows from `seen_at` to `seen_at * zoom`.

    Args:
        scores: [N, len(ZOOMS)], from `measure_scores`.
        seen_at: current zoom, at least 1.
        zoom: zoom factor; beyond the largest of `ZOOMS` the scores are constant.

    Returns:
        [N] float64, 0 or more.
    """
    if not len(scores):
        return np.zeros(0)
    logs = np.log(ZOOMS)
    before, after = (np.array([np.interp(np.log(at), logs, row) for row in scores]) for at in (seen_at, seen_at * zoom))
    return np.maximum(after - before, 0.0)


def gain_map(
    objects: Objects, scores: np.ndarray, tile: Tile, hw: tuple[int, int], stride: float, zoom: float
) -> np.ndarray:
    """Gain per cell of a tile: the gain of each small object, spread evenly over its box.

    Args:
        objects: N objects in image pixels; crowds have no gain.
        scores: [N, len(ZOOMS)], from `measure_scores`.
        tile: the tile; objects of class 1 in its frame that are at least half visible count.
        hw: (h, w) of the map.
        stride: side of a cell in tile pixels.
        zoom: zoom factor.

    Returns:
        [h, w] float32; its sum is the gain of zooming into the whole tile.
    """
    gain = np.zeros(hw, np.float32)
    zoom_x, zoom_y = tile.zoom_xy
    areas = objects.areas * zoom_x * zoom_y * REFERENCE_AREA / (tile.height * tile.width)
    seen_at = max(tile.image_hw) / max(tile.window.height, tile.window.width)
    gains = gain_of_zoom(scores, seen_at, zoom)
    boxes = boxes_to_tile(objects.boxes, tile).astype(np.float64) / stride
    cut = np.clip(boxes, 0, [hw[1], hw[0]] * 2)
    whole, visible = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes, cut))
    counts = ~objects.crowd & (areas < UNIT_AREA) & (visible >= _MIN_VISIBLE * whole) & (visible > 0)
    for i in np.flatnonzero(counts):
        (x0, y0), (x1, y1) = np.floor(cut[i, :2]).astype(int), np.ceil(cut[i, 2:]).astype(int)
        gain[y0:y1, x0:x1] += gains[i] / ((x1 - x0) * (y1 - y0))
    return gain
