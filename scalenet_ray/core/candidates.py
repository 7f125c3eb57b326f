"""Evidence of the region planner: objects that a tile shows, and where it is textured."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import Tile, boxes_to_image
from scalenet_ray.core.scale import REFERENCE_AREA, UNIT_AREA, ScaleMap

TEXTURE_CELL = 16
"""Side of a cell that is textured or not, in tile pixels."""

_TEXTURE_BLOCK = 3
"""Side of the neighbourhood of a corner, in tile pixels."""


class Candidates(NamedTuple):
    """Objects of a tile that may be worth a closer look.

    Attributes:
        boxes: [N, 4] xyxy in image pixels.
        sides: [N] sides of the objects in image pixels: roots of their areas.
        scores: [N] expected gain of a closer look at an object much smaller than `Regions.small`.
    """

    boxes: np.ndarray
    sides: np.ndarray
    scores: np.ndarray


class RegionEvidence(NamedTuple):
    """Evidence from which regions of a tile are planned.

    Attributes:
        candidates: its objects.
        textured: [h, w] bool, cells (`textured_cells`) of a tile that shows the smallest objects too small, or of a
            look in which nothing scores `SHOWN_SCORE`; else None.
    """

    candidates: Candidates
    textured: np.ndarray | None = None


def candidates_of_detections(found: Detections, tile: Tile) -> Candidates:
    """Candidates of a detector's first pass on a tile; boxes of `found` in tile pixels."""
    boxes = boxes_to_image(found.boxes, tile).astype(np.float64)
    sizes = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0)
    return Candidates(boxes, np.sqrt(sizes[:, 0] * sizes[:, 1]), found.scores.astype(np.float64))


def candidates_of_map(scale_map: ScaleMap, tile: Tile, classes: tuple[int, ...], threshold: float) -> Candidates:
    """Candidates of a class map: the objects that it was made from, else connected cells of small classes.

    Args:
        scale_map: of the tile.
        tile: the tile.
        classes: scale classes that ask for a closer look.
        threshold: least sum of their probabilities in a cell (method 2 of the paper).

    Raises:
        UserError: if it is a regression map.
    """
    if scale_map.objects is not None:
        boxes, areas = scale_map.objects
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((centres >= 0) & (centres < (tile.width, tile.height))).all(axis=1)
        boxes, areas = boxes[inside], areas[inside]
        zoom_x, zoom_y = tile.zoom_xy
        return Candidates(
            boxes_to_image(boxes, tile).astype(np.float64), np.sqrt(areas / (zoom_x * zoom_y)), np.ones(len(boxes))
        )
    if scale_map.prob is None:
        msg = "regions are planned from class maps, got a regression map: train Scale Net with a class preset"
        raise UserError(msg)
    chance = scale_map.prob[list(classes)].sum(axis=0)
    count, labels, boxes, _ = cv2.connectedComponentsWithStats((chance > threshold).astype(np.uint8))
    cells = tile.window.width / chance.shape[1], tile.window.height / chance.shape[0]
    corners = boxes[1:, :2] * cells + (tile.window.x0, tile.window.y0)
    # A component may be a crowd of objects: the most of them that its class allows.
    side = math.sqrt(UNIT_AREA / 4 * tile.window.area / REFERENCE_AREA)
    sums = np.bincount(labels.ravel(), chance.ravel(), count)[1:] * (cells[0] * cells[1]) / side**2
    return Candidates(
        np.concatenate([corners, corners + boxes[1:, 2:4] * cells], axis=1), np.full(count - 1, side), sums
    )


def textured_cells(pixels: np.ndarray, min_contrast: float) -> np.ndarray:
    """Cells of a tile that hold a corner: a place where the brightness changes along two directions.

    Sky, water, blurred or empty background and straight edges have none; objects have, if they are three pixels large.

    Args:
        pixels: [height, width, 3] uint8 RGB.
        min_contrast: least slope along the weaker direction, in grey levels per pixel (Shi and Tomasi, 1994).

    Returns:
        [ceil(height / 16), ceil(width / 16)] bool.
    """
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    height, width = (
        -(-grey.shape[0] // TEXTURE_CELL) * TEXTURE_CELL,
        -(-grey.shape[1] // TEXTURE_CELL) * TEXTURE_CELL,
    )
    strength = np.zeros((height, width), np.float32)
    strength[: grey.shape[0], : grey.shape[1]] = cv2.cornerMinEigenVal(grey, _TEXTURE_BLOCK, ksize=3)
    cells = strength.reshape(height // TEXTURE_CELL, TEXTURE_CELL, width // TEXTURE_CELL, TEXTURE_CELL).max(axis=(1, 3))
    # OpenCV sums squared slopes over the block, in units of 1 / (4 * block * 255); a slope of one level gives 8.
    slopes = np.sqrt(np.maximum(cells, 0.0)) * (4 * _TEXTURE_BLOCK * 255) / (8 * _TEXTURE_BLOCK)
    return slopes >= min_contrast
