"""Windows of an image, tiles cut from them, and the way between the two frames.

Pixel (i, j) covers [j, j + 1) x [i, i + 1). Boxes are xyxy. A *window* is a rectangle of whole
image pixels; a *tile* is that window resampled to `height` x `width` pixels, as a recipe without
pixels. The zoom is always computed from the rounded sizes, never from the nominal ratio, so that
image -> tile -> image is the identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.timing import timed

__all__ = [
    "ANY_AREA",
    "AreaRange",
    "Tile",
    "Window",
    "boxes_to_image",
    "boxes_to_tile",
    "cut_tile",
    "edges_inside_image",
    "fit_longer_side",
    "intersection_areas",
    "iou",
    "iou_matrix",
    "resample_nearest",
]


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of an image: int image pixels, half open, [x0, x1) x [y0, y1).

    Raises:
        ValueError: if it is empty or starts left of or above the image.
    """

    x0: int
    y0: int
    x1: int
    y1: int

    def __post_init__(self) -> None:
        if not (0 <= self.x0 < self.x1 and 0 <= self.y0 < self.y1):
            msg = f"a window must have 0 <= x0 < x1 and 0 <= y0 < y1, got {self.xyxy}"
            raise ValueError(msg)

    @property
    def width(self) -> int:
        """Image pixels from left to right."""
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        """Image pixels from top to bottom."""
        return self.y1 - self.y0

    @property
    def area(self) -> int:
        """Image pixels inside."""
        return self.width * self.height

    @property
    def xyxy(self) -> tuple[int, int, int, int]:
        """The four corners' coordinates, (x0, y0, x1, y1)."""
        return (self.x0, self.y0, self.x1, self.y1)


class AreaRange(NamedTuple):
    """The box areas that a tile's detections may have: image pixels squared, low <= area < high."""

    low: float
    high: float


ANY_AREA = AreaRange(0.0, math.inf)


@dataclass(frozen=True, slots=True)
class Tile:
    """A recipe for pixels: which window of which image, resampled to which size.

    Attributes:
        image_id: the image's id in its data set.
        path: () for the whole image, (0,) for its first child, (0, 2) for that one's third child.
            (image_id, path) is the tile's identity.
        image_hw: (height, width) of the image, in image pixels.
        window: the rectangle it is cut from, in image pixels.
        height: tile pixels from top to bottom.
        width: tile pixels from left to right.
        valid_area: the areas (image pixels squared) of the boxes that this tile is there to find.
        window_budget: how many windows may still be cut from this tile and all that comes from it.
    """

    image_id: int
    path: tuple[int, ...]
    image_hw: tuple[int, int]
    window: Window
    height: int
    width: int
    valid_area: AreaRange = ANY_AREA
    window_budget: int = 0

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            msg = f"a tile must be at least 1 x 1 pixels, got {self.height} x {self.width}"
            raise ValueError(msg)
        if self.window.y1 > self.image_hw[0] or self.window.x1 > self.image_hw[1]:
            msg = f"window {self.window.xyxy} leaves its image of {self.image_hw} (height, width)"
            raise ValueError(msg)

    @property
    def depth(self) -> int:
        """How often the image was zoomed into: 0 for the whole image."""
        return len(self.path)

    @property
    def zoom_xy(self) -> tuple[float, float]:
        """Tile pixels for one image pixel, along x and along y, from the rounded sizes."""
        return (self.width / self.window.width, self.height / self.window.height)


def fit_longer_side(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) scaled so that the longer is `side`, rounded down and at least 1."""
    # In whole numbers: height * (side / height) may lie below `side`.
    longer = max(height, width)
    return (max(1, height * side // longer), max(1, width * side // longer))


def boxes_to_image(boxes_in_tile: np.ndarray, tile: Tile) -> np.ndarray:
    """Carry boxes from a tile's frame to its image's.

    Args:
        boxes_in_tile: [N, 4] xyxy, in tile pixels.
        tile: the tile they were found in.

    Returns:
        [N, 4] float32 xyxy, in image pixels.
    """
    zoom_x, zoom_y = tile.zoom_xy
    factor = np.array([zoom_x, zoom_y, zoom_x, zoom_y])
    offset = np.array([tile.window.x0, tile.window.y0, tile.window.x0, tile.window.y0])
    return (np.asarray(boxes_in_tile, dtype=np.float64) / factor + offset).astype(np.float32)


def boxes_to_tile(boxes: np.ndarray, tile: Tile) -> np.ndarray:
    """Carry boxes from the image's frame to a tile's, unclipped.

    Args:
        boxes: [N, 4] xyxy, in image pixels.
        tile: the tile to carry them to.

    Returns:
        [N, 4] float32 xyxy, in tile pixels; boxes outside the window leave [0, width] x [0, height].
    """
    zoom_x, zoom_y = tile.zoom_xy
    factor = np.array([zoom_x, zoom_y, zoom_x, zoom_y])
    offset = np.array([tile.window.x0, tile.window.y0, tile.window.x0, tile.window.y0])
    return ((np.asarray(boxes, dtype=np.float64) - offset) * factor).astype(np.float32)


def intersection_areas(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Areas of the intersections of boxes, broadcast against each other: [..., 4] xyxy each -> [...]."""
    low = np.maximum(boxes[..., :2], others[..., :2])
    high = np.minimum(boxes[..., 2:], others[..., 2:])
    return _areas(low, high)


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes, broadcast against each other; 0 where both boxes are empty.

    Args:
        boxes: [..., 4] xyxy.
        others: [..., 4] xyxy in the same frame.

    Returns:
        [...] float64.
    """
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    intersection = intersection_areas(boxes, others)
    union = _areas(boxes[..., :2], boxes[..., 2:]) + _areas(others[..., :2], others[..., 2:]) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def _areas(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Areas between corners, [..., 2] each; 0 where a side is negative."""
    sides = np.maximum(high - low, 0.0)
    # Many times as fast as prod(axis=-1) of two columns.
    return sides[..., 0] * sides[..., 1]


def iou_matrix(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair of boxes: [N, 4] and [M, 4] xyxy -> [N, M] float64."""
    return iou(boxes[:, None], others[None])


def resample_nearest(values: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """Resample a grid to another size: each new cell takes the value of the old cell that contains its centre.

    Args:
        values: [..., h, w].
        hw: (height, width) of the result, in cells.

    Returns:
        [..., height, width], in whole-number arithmetic, so that the result does not depend on rounding.
    """
    rows = (np.arange(hw[0]) * 2 + 1) * values.shape[-2] // (2 * hw[0])
    columns = (np.arange(hw[1]) * 2 + 1) * values.shape[-1] // (2 * hw[1])
    return values[..., rows[:, None], columns[None, :]]


def edges_inside_image(tile: Tile) -> tuple[bool, bool, bool, bool]:
    """Which of the window's edges (left, top, right, bottom) lie inside the image and cut through it."""
    window = tile.window
    height, width = tile.image_hw
    return (window.x0 > 0, window.y0 > 0, window.x1 < width, window.y1 < height)


_MOST_SHRUNK = 2.0


@timed("cut")
def cut_tile(image: np.ndarray, tile: Tile) -> np.ndarray:
    """Resample a tile's window to its size: bilinearly without antialiasing, by area where it shrinks much.

    So did those who trained and measured the common detectors (OpenCV's INTER_LINEAR): with antialiasing
    a shrunk tile is another picture than the detector knows. Past a factor of 2 aliasing is worse than that.
    Nothing outside the window is seen.

    Args:
        image: [h, w, 3] uint8 RGB, of the size the tile says.
        tile: what to cut.

    Returns:
        [tile.height, tile.width, 3] uint8 RGB, a fresh array.

    Raises:
        TileError: if the image is not of the size that the tile was planned for.
    """
    if image.shape[:2] != tile.image_hw:
        msg = (
            f"tile {tile.path} was planned on an image of {tile.image_hw} (height, width), got {image.shape[:2]}: "
            "the file changed, or its annotation has another size"
        )
        raise TileError(msg)
    window = tile.window
    # Both ways: where one side grows, OpenCV's INTER_AREA is neither by area nor in place.
    shrinks = window.width > _MOST_SHRUNK * tile.width and window.height > _MOST_SHRUNK * tile.height
    # A view of the window: nothing is copied but the tile.
    return cv2.resize(
        image[window.y0 : window.y1, window.x0 : window.x1],
        (tile.width, tile.height),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )
