"""Object scales: scale classes, scale maps, and Scale Net's training targets.

The scale of an object is its number of mask pixels, the same at all of its pixels (paper, section 'Scale Net'). For
COCO the paper divides it into six classes, measured after the image is resized to 512 x 512. For digits it is the side
over a unit side: 1.0 is the scale that the classifier was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from scalenet_ray.core.errors import TileError

REFERENCE_AREA = 512 * 512
"""Pixels of the frame that scale classes are measured in (section 'Experiments', COCO)."""

UNIT_AREA = 2592
"""u: upper bound of class 1, in pixels of a 512 x 512 frame."""

CLASS_BOUNDS = (UNIT_AREA, 8 * UNIT_AREA, 20 * UNIT_AREA, 28 * UNIT_AREA)
"""Upper bounds, exclusive, of classes 1 to 4 in pixels of a 512 x 512 frame; class 5 is above them."""

NUM_CLASSES = 6
BACKGROUND = 0
IGNORE = 255
"""Target value of pixels that the loss ignores (crowds)."""


class ScaleRange(NamedTuple):
    """The range of scales that a detector handles: R_L <= scale <= R_H (Algorithm 1)."""

    low: float
    high: float


def _require_finite(values: np.ndarray) -> None:
    bad = int((~np.isfinite(values)).sum())
    if bad:
        msg = f"the scale map has {bad} values that are NaN or infinite: check the network's weights and precision"
        raise TileError(msg)


@dataclass(frozen=True, eq=False)
class ScaleMap:
    """Scale Net's prediction for a tile: a regression or a classification, on a regular grid over the tile.

    Cell (i, j) of [h, w] covers rows [i * height / h, (i + 1) * height / h) of the tile, and columns likewise. Scales
    are relative to the tile: an object that is too small in the image may be in range in a tile.

    Attributes:
        scale: [h, w] float32, scale of the object at each cell, 0 for background (regression).
        prob: [6, h, w] float32, probability of each scale class (classification).
        gain: [h, w] float32, expected gain of a closer look at each cell (an object's gain is spread over its cells);
            None if unknown: every out-of-range cell then counts 1.
        objects: boxes [N, 4] xyxy and areas [N] in tile pixels of the objects that the map was made from; None if it
            was predicted.

    Raises:
        TileError: if a value is NaN or infinite.
        ValueError: unless exactly one form is given; if a shape is wrong or a gain is negative.
    """

    scale: np.ndarray | None = None
    prob: np.ndarray | None = None
    gain: np.ndarray | None = None
    objects: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self) -> None:
        if (self.scale is None) == (self.prob is None):
            msg = "a scale map is either a regression (scale) or a classification (prob): give exactly one"
            raise ValueError(msg)
        name, values, rank = ("scale", self.scale, 2) if self.scale is not None else ("prob", self.prob, 3)
        array = np.asarray(values, dtype=np.float32)
        if array.ndim != rank or 0 in array.shape or (rank == 3 and len(array) != NUM_CLASSES):
            wanted = "[h, w]" if rank == 2 else f"[{NUM_CLASSES}, h, w]"
            msg = f"{name} must be {wanted}, got shape {list(array.shape)}"
            raise ValueError(msg)
        _require_finite(array)
        object.__setattr__(self, name, array)
        if self.gain is not None:
            gain = np.asarray(self.gain, dtype=np.float32)
            if gain.shape != self.hw:
                msg = f"gain must be {list(self.hw)} like the map, got shape {list(gain.shape)}"
                raise ValueError(msg)
            _require_finite(gain)
            if gain.min() < 0:
                msg = f"gain must be 0 or more, got {gain.min()}: clip it at 0"
                raise ValueError(msg)
            object.__setattr__(self, "gain", gain)

    @property
    def hw(self) -> tuple[int, int]:
        """(height, width) of the grid, in cells."""
        array = self.scale if self.scale is not None else self.prob
        return array.shape[-2:]  # type: ignore[union-attr,return-value]

    @property
    def classes(self) -> np.ndarray:
        """The most probable class of each cell, [h, w] int64.

        Raises:
            ValueError: for a regression map.
        """
        if self.prob is None:
            msg = "classes are of a classification map, got a regression map: use its scale"
            raise ValueError(msg)
        return self.prob.argmax(axis=0)


def class_of_area(areas: np.ndarray, frame_area: float) -> np.ndarray:
    """Return the scale classes of objects from their areas.

    Args:
        areas: [N] mask or box areas, in pixels of a frame (an image or a tile).
        frame_area: height times width of the frame.

    Returns:
        [N] int64 in 1..5, measured as if the frame were resized to 512 x 512.
    """
    in_reference = np.asarray(areas, dtype=np.float64) * (REFERENCE_AREA / frame_area)
    return np.searchsorted(CLASS_BOUNDS, in_reference, side="right") + 1


def _paint_order(areas: np.ndarray) -> np.ndarray:
    """Order by descending area, so that small objects are painted over large ones."""
    return np.argsort(-np.asarray(areas, dtype=np.float64), kind="stable")


def class_target(
    masks: Sequence[np.ndarray], areas: np.ndarray, frame_area: float, hw: tuple[int, int], crowd: Sequence[bool] = ()
) -> np.ndarray:
    """Return Scale Net's classification target for the masks of a frame (paper, section 'Scale Net').

    Args:
        masks: N masks, each [h, w] bool on the target's grid.
        areas: [N] areas in pixels of the frame, from the annotation and not from the coarser grid.
        frame_area: height times width of the frame.
        hw: (h, w) of the target.
        crowd: [N] bool, crowds: their pixels become IGNORE. No crowds by default.

    Returns:
        [h, w] uint8 in 0..5, or IGNORE.
    """
    areas = np.asarray(areas, dtype=np.float64)
    classes = class_of_area(areas, frame_area)
    target = np.full(hw, BACKGROUND, np.uint8)
    is_crowd = np.asarray(crowd, bool) if len(crowd) else np.zeros(len(areas), bool)
    for i in np.flatnonzero(is_crowd):
        target[masks[int(i)]] = IGNORE
    for i in _paint_order(areas):
        if not is_crowd[i]:
            target[masks[i]] = classes[i]
    return target


def scale_map_of_boxes(
    boxes_in_tile: np.ndarray,
    areas: np.ndarray,
    gains: np.ndarray,
    tile_hw: tuple[int, int],
    hw: tuple[int, int] = (64, 64),
) -> ScaleMap:
    """Convert boxes, from a detector or the ground truth, to a classification map.

    Args:
        boxes_in_tile: [N, 4] xyxy, in tile pixels; clipped to the tile.
        areas: [N] areas of the whole objects, in square tile pixels.
        gains: [N] expected gain of a closer look at each object; spread evenly over its cells.
        tile_hw: (height, width) of the tile.
        hw: (h, w) of the map.

    Returns:
        A map with probabilities 0 and 1: each cell has the class of the smallest object whose box touches it, and the
        gains of the objects of that class.
    """
    boxes = np.asarray(boxes_in_tile, dtype=np.float64).reshape(-1, 4)
    classes = class_of_area(areas, tile_hw[0] * tile_hw[1])
    cells = boxes * np.array([hw[1] / tile_hw[1], hw[0] / tile_hw[0]] * 2)
    first = np.floor(cells[:, :2]).astype(int)
    last = np.maximum(np.ceil(cells[:, 2:]).astype(int), first + 1)
    grid = np.zeros(hw, np.int64)
    gain = np.zeros((NUM_CLASSES, *hw))
    for i in _paint_order(areas):
        x0, y0 = np.maximum(first[i], 0)
        x1, y1 = np.maximum(last[i], 0)
        grid[y0:y1, x0:x1] = classes[i]
        gain[classes[i], y0:y1, x0:x1] += gains[i] / np.prod(last[i] - first[i])
    prob = np.arange(NUM_CLASSES)[:, None, None] == grid
    known = np.take_along_axis(gain, grid[None], axis=0)[0]
    return ScaleMap(prob=prob, gain=known, objects=(boxes, np.asarray(areas, np.float64)))
