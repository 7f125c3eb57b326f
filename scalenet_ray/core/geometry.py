"""Windows, tiles, boxes, and the mapping between image and tile coordinates.

Pixel (i, j) covers [j, j + 1) x [i, i + 1). Boxes are xyxy. A *window* is a rectangle of whole image pixels. A *tile*
describes that window resampled to `height` x `width` pixels; it holds no pixels. The zoom is computed from the rounded
sizes, never from the nominal ratio, so that image -> tile -> image is the identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import cv2
import numpy as np

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.timing import timed


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of an image in integer image pixels, half open: [x0, x1) x [y0, y1).

    Raises:
        ValueError: if it is empty or a coordinate is negative.
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
        """Width in image pixels."""
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        """Height in image pixels."""
        return self.y1 - self.y0

    @property
    def area(self) -> int:
        """Area in image pixels."""
        return self.width * self.height

    @property
    def xyxy(self) -> tuple[int, int, int, int]:
        """The coordinates (x0, y0, x1, y1)."""
        return (self.x0, self.y0, self.x1, self.y1)


class AreaRange(NamedTuple):
    """A range of box areas in square image pixels: low <= area < high."""

    low: float
    high: float


ANY_AREA = AreaRange(0.0, math.inf)


@dataclass(frozen=True, slots=True)
class Tile:
    """A window of an image and the size that it is resampled to.

    Attributes:
        image_id: the image's id in its data set.
        path: position in the recursion: () for the whole image, (0,) for its first child, (0, 2) for the third child
            of that. (image_id, path) identifies the tile.
        image_hw: (height, width) of the image, in image pixels.
        window: the window of the image.
        height: height in tile pixels.
        width: width in tile pixels.
        valid_area: areas of the boxes kept from this tile, in square image pixels.
        window_budget: what may still be cut from this tile and its descendants: a number of windows, or of cells of
            32 x 32 detector pixels where regions are cut.
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
        """Depth in the recursion: 0 for the whole image."""
        return len(self.path)

    @property
    def zoom_xy(self) -> tuple[float, float]:
        """Tile pixels per image pixel along x and y, from the rounded sizes."""
        return (self.width / self.window.width, self.height / self.window.height)


def fit_longer_side(height: int, width: int, side: int) -> tuple[int, int]:
    """Scale (height, width) so that the longer side is `side`; the other is rounded down, to at least 1."""
    # Integer arithmetic: in floating point, height * (side / height) may be below `side`.
    longer = max(height, width)
    return (max(1, height * side // longer), max(1, width * side // longer))


def boxes_to_image(boxes_in_tile: np.ndarray, tile: Tile) -> np.ndarray:
    """Map boxes from tile to image coordinates.

    Args:
        boxes_in_tile: [N, 4] xyxy, in tile pixels.
        tile: the tile.

    Returns:
        [N, 4] float32 xyxy, in image pixels.
    """
    zoom_x, zoom_y = tile.zoom_xy
    factor = np.array([zoom_x, zoom_y, zoom_x, zoom_y])
    offset = np.array([tile.window.x0, tile.window.y0, tile.window.x0, tile.window.y0])
    return (np.asarray(boxes_in_tile, dtype=np.float64) / factor + offset).astype(np.float32)


def boxes_to_tile(boxes: np.ndarray, tile: Tile) -> np.ndarray:
    """Map boxes from image to tile coordinates, without clipping.

    Args:
        boxes: [N, 4] xyxy, in image pixels.
        tile: the tile.

    Returns:
        [N, 4] float32 xyxy, in tile pixels; boxes outside the window are outside [0, width] x [0, height].
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
    """Test each edge of the tile's window (left, top, right, bottom): True if it is not an edge of the image."""
    window = tile.window
    height, width = tile.image_hw
    return (window.x0 > 0, window.y0 > 0, window.x1 < width, window.y1 < height)


_MAX_SHRUNK = 2.0


def _check_size(image_hw: tuple[int, int], tile: Tile) -> None:
    if image_hw != tile.image_hw:
        msg = (
            f"tile {tile.path} was planned on an image of {tile.image_hw} (height, width), got {image_hw}: "
            "the file changed, or its annotation has another size"
        )
        raise TileError(msg)


@timed("cut")
def cut_tile(image: np.ndarray, tile: Tile) -> np.ndarray:
    """Cut a tile's window from its image and resample it to the tile's size.

    Resampling is bilinear without antialiasing (OpenCV's INTER_LINEAR), as in the training of the common detectors, and
    by area (INTER_AREA) where both sides shrink by more than 2. Pixels outside the window have no influence.

    Args:
        image: [h, w, 3] uint8 RGB, of size `tile.image_hw`.
        tile: the tile.

    Returns:
        [tile.height, tile.width, 3] uint8 RGB, a new array.

    Raises:
        TileError: if the image's size is not `tile.image_hw`.
    """
    _check_size((image.shape[0], image.shape[1]), tile)
    window = tile.window
    # Both sides: where one grows, INTER_AREA does not average by area.
    shrinks = window.width > _MAX_SHRUNK * tile.width and window.height > _MAX_SHRUNK * tile.height

    return cv2.resize(
        image[window.y0 : window.y1, window.x0 : window.x1],
        (tile.width, tile.height),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )


# --- images that are read by window -----------------------------------------------------------------


class ImageSource(Protocol):
    """An image whose windows are read one by one, in place of an array of all its pixels."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, 3), in image pixels, as an array has it."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory that it holds between two reads, in bytes; an estimate."""
        ...

    def read(self, window: Window, reduction: int) -> np.ndarray:
        """Read the pixels of a window, at full size or reduced.

        Args:
            window: the window, in image pixels.
            reduction: a power of two: image pixels per pixel of the result, along each axis.

        Returns:
            [ceil(window.height / reduction), ceil(window.width / reduction), 3] uint8 RGB, which covers the window
            exactly; each pixel is a mean over its area.

        Raises:
            TileError: if the pixels cannot be read.
        """
        ...


AnyImage = np.ndarray | ImageSource
"""An image as [h, w, 3] uint8 RGB, or one that is read by window."""


def tile_pixels(image: AnyImage, tile: Tile) -> np.ndarray:
    """Pixels of a tile: `cut_tile` of the whole image, or of the tile's window, read from the image's source.

    A window that shrinks by more than 4 is read reduced, to at least twice the tile's size, and averaged from there.

    Args:
        image: the image.
        tile: the tile.

    Returns:
        [tile.height, tile.width, 3] uint8 RGB, a new array.

    Raises:
        TileError: if the window cannot be read, or the image's size is not `tile.image_hw`.
    """
    if isinstance(image, np.ndarray):
        return cut_tile(image, tile)
    _check_size((image.shape[0], image.shape[1]), tile)
    window = tile.window
    spare = min((window.width - 1) // (2 * tile.width), (window.height - 1) // (2 * tile.height))
    pixels = _read(image, window, _power_of_two(spare))
    read_hw = pixels.shape[0], pixels.shape[1]
    return cut_tile(pixels, replace(tile, image_hw=read_hw, window=Window(0, 0, read_hw[1], read_hw[0])))


def window_pixels(image: AnyImage, window: Window) -> np.ndarray:
    """Pixels of a window at the image's own resolution: [window.height, window.width, 3] uint8 RGB.

    Raises:
        TileError: if it cannot be read.
    """
    if isinstance(image, np.ndarray):
        return image[window.y0 : window.y1, window.x0 : window.x1]
    return _read(image, window, 1)


def whole_pixels(image: AnyImage, side: int) -> np.ndarray:
    """Pixels of a whole image, for pictures of it.

    Args:
        image: the image.
        side: for an image that is read by window: the longer side may be reduced, but not below this.

    Returns:
        [h, w, 3] uint8 RGB: the array itself, or the reduced image.

    Raises:
        TileError: if it cannot be read.
    """
    if isinstance(image, np.ndarray):
        return image
    height, width, _ = image.shape
    return _read(image, Window(0, 0, width, height), _power_of_two(max(height, width) // side))


def _power_of_two(at_most: int) -> int:
    """The largest power of two up to a number; 1 below that."""
    return 1 << max(0, at_most.bit_length() - 1)


def _read(image: ImageSource, window: Window, reduction: int) -> np.ndarray:
    with timed("decode"):
        return image.read(window, reduction)
