"""Region planner: rectangles around small objects, each zoomed by the size of what is in it.

Candidates are objects that a detector's first pass, Scale Net or the ground truth shows in a tile. Each asks for itself
and some context, at the zoom that brings its side to `Regions.target` pixels (the paper's rescaling by 1 / TopK,
bounded). Rectangles are joined where one costs no more than two, ranked by expected gain over cost, and split where
they exceed the largest canvas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from scalenet_ray.core.candidates import TEXTURE_CELL, Candidates, RegionEvidence, textured_cells
from scalenet_ray.core.detections import SHOWN_SCORE
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.rectangles import STRIDE, costs, joined, split_into_tiles

_CELL_PIXELS = STRIDE**2
"""Detector pixels of one cell, the unit of a tile's budget: 32 x 32."""

_UNLIMITED = 2**31 - 1

_LEAST_ZOOM = 1.2
"""A tile whose zoom could grow by less is not looked at again."""

_LEAST_COST = 0.02
"""Least cost of a region in the price, in squares of the input side."""

_LEAST_DETAIL = 2.0
"""Least ratio of the image pixels that a closer look shows to those of the tile, as it counts in a weight."""


@dataclass(frozen=True)
class Regions:
    """Rules of the region planner.

    Attributes:
        smallest_object: side of the smallest object worth finding, in image pixels: the first look shows it at
            `look_side`.
        look_side: side of the smallest object in the first look, in tile pixels.
        first_look: largest first look, in multiples of the detector's input side. Where that is too small for the
            smallest object, all that is textured is looked at again, in tiles of at most this size.
        min_contrast: what is textured: see `textured_cells`; 0 looks everywhere.
        min_score: least weight of a candidate, see `zooms_and_weights`.
        small: side under which an object asks for a closer look, in tile pixels.
        target: side that its zoom aims at, in tile pixels.
        max_zoom: largest zoom relative to the tile, for one step.
        max_native: largest zoom, in tile pixels for an image pixel: there pixels hold no more.
        context: margin of a box on every side, relative to the box's side.
        min_context: least margin, in pixels of the new tile.
        min_side: least side of a region, in pixels of the new tile.
        overlap: overlap of neighbouring looks, and of the parts of a region that is split, in tile pixels.
        price: least expected gain (sum of weight times smallness) for as many pixels as a square of the input side has.
        keep_factor: boxes of a region may have sides so many times `small` in the tile that it was cut from.
        max_depth: how often regions may be cut from regions: 1 for those of the first look alone.
        budget: most pixels of an image's regions, in megapixels; none for no limit.
        of_interest: rectangles that are looked at in any case, as shares (x0, y0, x1, y1) of the image's width and
            height: at native resolution, or at twice that of the whole image's tile if this is more.

    Raises:
        UserError: if a number leaves its range.
    """

    smallest_object: float = 16.0
    look_side: float = 8.0
    first_look: float = 2.0
    min_contrast: float = 6.0
    min_score: float = 0.03
    small: float = 64.0
    target: float = 48.0
    max_zoom: float = 3.0
    max_native: float = 2.0
    context: float = 0.7
    min_context: float = 32.0
    min_side: int = 128
    overlap: int = 64
    price: float = 1.0
    keep_factor: float = 1.5
    max_depth: int = 1
    budget: float | None = None
    of_interest: tuple[tuple[float, float, float, float], ...] = ()

    def __post_init__(self) -> None:
        above = {
            "smallest_object": 0, "look_side": 0, "small": 0, "target": 0, "max_native": 0, "min_side": 0,
            "keep_factor": 0, "max_zoom": 1,
        }  # fmt: skip
        for name, bound in above.items():
            if not bound < getattr(self, name) < math.inf:
                msg = f"{name} must be above {bound} and finite, got {getattr(self, name)}"
                raise UserError(msg)
        for name in ("context", "min_context", "overlap", "price", "max_depth", "min_contrast", "budget"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                msg = f"{name} must be 0 or more and finite, got {value}"
                raise UserError(msg)
        if not 0.0 <= self.min_score <= 1.0:
            msg = f"min_score must be between 0 and 1, got {self.min_score}"
            raise UserError(msg)
        if not 1.0 <= self.first_look < math.inf:
            msg = f"first_look must be 1 or more and finite, got {self.first_look}"
            raise UserError(msg)
        for x0, y0, x1, y1 in self.of_interest:
            if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
                msg = (
                    "of_interest must hold shares of the image, 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, got "
                    f"{[x0, y0, x1, y1]}: divide pixels by the image's width and height"
                )
                raise UserError(msg)

    @property
    def look_zoom(self) -> float:
        """Zoom of the first look, in tile pixels for an image pixel."""
        return min(self.look_side / self.smallest_object, self.max_native)

    @property
    def second_look_zoom(self) -> float:
        """Zoom of a closer look where the first look saw no object clearly: twice that, at most native."""
        return min(2.0 * self.look_zoom, 1.0)

    def first_side(self, longer_side: int, input_side: int) -> int:
        """Longer side of the whole image's tile, in tile pixels.

        Args:
            longer_side: the image's, in image pixels.
            input_side: the detector's, in tile pixels.
        """
        return max(input_side, round(min(longer_side * self.look_zoom, input_side * self.first_look)))

    def evidence(self, candidates: Candidates, pixels: np.ndarray, tile: Tile, input_side: int) -> RegionEvidence:
        """Evidence from which regions are planned: candidates, and texture where these do not tell enough.

        Args:
            candidates: objects that the tile shows.
            pixels: [height, width, 3] uint8 RGB of the tile.
            tile: the tile.
            input_side: the detector's, in tile pixels.
        """
        if self.looks_again(tile, input_side) or self._looks_twice(candidates, tile, input_side):
            return RegionEvidence(candidates, textured_cells(pixels, self.min_contrast))
        return RegionEvidence(candidates)

    def _looks_twice(self, candidates: Candidates, tile: Tile, input_side: int) -> bool:
        """True for a look in which nothing is seen clearly, if it has the first look's zoom and no more.

        Boxes under `SHOWN_SCORE` are as often mistakes as small objects, and tell too little of where to look.
        """
        zoom = max(tile.zoom_xy)
        shows_enough = zoom >= _LEAST_ZOOM * self.look_zoom or zoom * _LEAST_ZOOM >= self.second_look_zoom
        is_look = tile.depth == self._depth_of_looks(tile, input_side)
        return is_look and not shows_enough and not (candidates.scores >= SHOWN_SCORE).any()

    def looks_again(self, tile: Tile, input_side: int) -> bool:
        """True for a whole image's tile that is too small for the smallest object, so that looks are cut from it."""
        return not tile.depth and self._needs_looks(max(tile.image_hw), input_side)

    def _needs_looks(self, longer_side: int, input_side: int) -> bool:
        return self.first_side(longer_side, input_side) * _LEAST_ZOOM < longer_side * self.look_zoom

    def may_expand(self, tile: Tile, input_side: int) -> bool:
        """True if looks or regions may be cut from this tile."""
        if self.looks_again(tile, input_side):
            return True
        # Looks are part of seeing the whole image: regions are counted from there.
        depth = tile.depth - self._depth_of_looks(tile, input_side)
        return depth < self.max_depth and self.shows_more(max(tile.zoom_xy))

    def _depth_of_looks(self, tile: Tile, input_side: int) -> int:
        """Depth of the looks at the tile's image: 0 if one tile is its look, 1 if looks are cut from that tile."""
        return int(self._needs_looks(max(tile.image_hw), input_side))

    def shows_more(self, zoom: float) -> bool:
        """True if a region cut from a tile of this zoom may have a higher one."""
        return zoom * _LEAST_ZOOM < min(zoom * self.max_zoom, self.max_native)

    def zooms_and_weights(self, candidates: Candidates, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        """Zoom of a closer look at each candidate, and its weight.

        A tile below native resolution hides detail that a closer look shows. So the weight is the score times the ratio
        of the image pixels that the two show of an object, at least 2: past native a closer look shows no more, but the
        detector still knows larger objects better.

        Args:
            candidates: N objects that the tile shows.
            tile: the tile.

        Returns:
            [N] tile pixels for an image pixel, and [N] weights.
        """
        zoom = max(tile.zoom_xy)
        highest = min(zoom * self.max_zoom, self.max_native)
        sides = np.maximum(candidates.sides, 1e-6)
        zooms = np.clip(self.target / sides, min(zoom * 1.3, highest), highest)
        return zooms, candidates.scores * np.maximum((np.minimum(zooms, 1.0) / zoom) ** 2, _LEAST_DETAIL)

    @property
    def budget_cells(self) -> int:
        """`budget` in cells of 32 x 32 detector pixels."""
        return _UNLIMITED if self.budget is None else min(_UNLIMITED, int(self.budget * 1e6) // _CELL_PIXELS)


def plan_looks(textured: np.ndarray, tile: Tile, rules: Regions, input_side: int) -> list[Region]:
    """Plan looks at all that is textured in a tile.

    Of a whole image's tile that is too small for the smallest object, they have the first look's zoom; of a look in
    which nothing was seen clearly, the second look's.

    Args:
        textured: [h, w] bool, cells of the tile (`textured_cells`).
        tile: the tile.
        rules: the rules; its rectangles of interest come first.
        input_side: the detector's, in tile pixels; a look has at most `Regions.first_look` times that.
    """
    zoom, canvas = rules.look_zoom, round(input_side * rules.first_look)
    if not rules.looks_again(tile, input_side):
        zoom = rules.second_look_zoom
    y, x = np.nonzero(textured)
    frame, zoom_xy = tile.window, np.array(tile.zoom_xy)
    corners = np.column_stack([x, y]) * TEXTURE_CELL / zoom_xy + (frame.x0, frame.y0)
    context = rules.overlap / 2 / zoom
    boxes = np.concatenate([corners - context, corners + TEXTURE_CELL / zoom_xy + context], axis=1)
    zooms = np.full(len(boxes), zoom)
    rows = np.column_stack([_grown(boxes, zooms, frame.xyxy, rules), zooms, np.ones(len(boxes))])
    rows = joined(np.concatenate([_of_interest(tile, rules), rows]), frame.xyxy, rules.min_side)
    order = np.lexsort((rows[:, 0], rows[:, 1], np.isfinite(rows[:, 5])))
    return _regions(rows[order], frame.xyxy, rules.overlap, canvas)


class Region(NamedTuple):
    """A rectangle of the image to run the detector on.

    Attributes:
        xyxy: its corners in whole image pixels.
        height: of its tile, in tile pixels.
        width: of its tile, in tile pixels.
        gain: expected gain: the sum of weight times smallness of the evidence inside.
    """

    xyxy: tuple[int, int, int, int]
    height: int
    width: int
    gain: float

    @property
    def cells(self) -> int:
        """Its cost, in cells of 32 x 32 pixels of the detector's canvas."""
        return -(-self.height // STRIDE) * -(-self.width // STRIDE)


def plan_regions(candidates: Candidates, tile: Tile, rules: Regions, input_side: int) -> list[Region]:
    """Plan regions around candidates.

    Args:
        candidates: objects that a tile shows.
        tile: the tile; regions stay inside its window.
        rules: the rules.
        input_side: the detector's, in tile pixels; larger regions are split.

    Returns:
        Regions in the order of expected gain for their cost, those of interest first, none with less than the price.
    """
    zoom, frame, canvas = max(tile.zoom_xy), tile.window.xyxy, input_side
    boxes, sides, _ = candidates
    zooms, weights = rules.zooms_and_weights(candidates, tile)
    asks = (weights >= rules.min_score) & (sides * zoom < rules.small) & (sides > 0)
    if not rules.shows_more(zoom):
        return []
    boxes, sides, zooms = boxes[asks], sides[asks], zooms[asks]
    gains = weights[asks] * (1.0 - sides * zoom / rules.small)
    context = np.maximum(rules.context * sides, rules.min_context / zooms)[:, None]
    corners = np.concatenate([boxes[:, :2] - context, boxes[:, 2:] + context], axis=1)
    rows = np.column_stack([_grown(corners, zooms, frame, rules), zooms, gains])
    rows = joined(np.concatenate([_of_interest(tile, rules), rows]), frame, rules.min_side)
    values = rows[:, 5] / np.maximum(costs(rows) / canvas**2, _LEAST_COST)
    order = np.lexsort((rows[:, 0], rows[:, 1], -values))
    return _regions(rows[order[values[order] >= rules.price]], frame, rules.overlap, canvas)


def _of_interest(tile: Tile, rules: Regions) -> np.ndarray:
    """Rectangles of interest [N, 6] of a whole image's tile (x0, y0, x1, y1, zoom, infinite gain).

    None in a tile that was cut from another, or of an image whose pixels show no more than the tile.
    """
    zoom = max(tile.zoom_xy)
    if tile.depth or not rules.of_interest or not rules.shows_more(zoom):
        return np.empty((0, 6))
    corners = np.array(rules.of_interest) * np.tile(tile.image_hw[::-1], 2)
    zooms = np.full(len(corners), min(max(1.0, 2.0 * zoom), rules.max_native))
    return np.column_stack([_grown(corners, zooms, tile.window.xyxy, rules), zooms, np.full(len(corners), np.inf)])


def _grown(corners: np.ndarray, zooms: np.ndarray, frame: tuple[int, int, int, int], rules: Regions) -> np.ndarray:
    """Rectangles [N, 4] grown to the least side around their centres, and moved and clipped into the frame."""
    low, high = np.array(frame[:2], float), np.array(frame[2:], float)
    centres = (corners[:, :2] + corners[:, 2:]) / 2
    least = (rules.min_side / zooms)[:, None]
    sizes = np.minimum(np.maximum(corners[:, 2:] - corners[:, :2], least), high - low)
    starts = np.clip(centres - sizes / 2, low, high - sizes)
    return np.concatenate([starts, starts + sizes], axis=1)


def _regions(rows: np.ndarray, frame: tuple[int, int, int, int], overlap: int, canvas: int) -> list[Region]:
    """Rectangles as regions, split where a tile would exceed the canvas."""
    windows = split_into_tiles(rows, frame, overlap, canvas)
    return [Region((x0, y0, x1, y1), height, width, gain) for (x0, y0, x1, y1, height, width), gain in windows.items()]
