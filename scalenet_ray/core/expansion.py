"""Expansion of a tile: which windows are cut from it, around what is out of the detector's range (Algorithm 1)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from scalenet_ray.core.candidates import RegionEvidence
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import ANY_AREA, AreaRange, Tile, Window
from scalenet_ray.core.inference import Evidence
from scalenet_ray.core.policy import Policy, Recursion
from scalenet_ray.core.regions import plan_looks, plan_regions
from scalenet_ray.core.scale import CLASS_BOUNDS, REFERENCE_AREA, ScaleMap
from scalenet_ray.core.windows import CellWindow, fixed_tiles, plan_windows, top_k_mean, window_hw

_CLASS_LIMITS = (0.0, *map(float, CLASS_BOUNDS), math.inf)
"""Lower bound of class i + 1 and upper bound of class i, in pixels of a 512 x 512 frame."""


class Expansion(NamedTuple):
    """Decision on a tile.

    Attributes:
        detect: True if the tile itself is detected.
        children: tiles cut from it.
        guards: names of the limits that were hit, once for each time.
    """

    detect: bool
    children: tuple[Tile, ...] = ()
    guards: tuple[str, ...] = ()


def expand(tile: Tile, evidence: Evidence, policy: Policy) -> Expansion:
    """Decide whether a tile is detected, and which tiles are cut from it. A pure function.

    Args:
        tile: the tile.
        evidence: what its networks show; None for a tile that `policy.needs_scales` is false for.
        policy: the policy.
    """
    if policy.uses_evidence:
        if evidence is None:
            return Expansion(detect=True, guards=_why_not_expanded(tile, policy))
        if isinstance(evidence, ScaleMap):
            return _expand_by_scale(tile, evidence, policy)
        return _expand_to_regions(tile, evidence, policy)
    if tile.depth:
        return Expansion(detect=True)
    return Expansion(policy.detects_whole, tuple(fixed_tiles(tile, policy)))


# --- regions ----------------------------------------------------------------------------------------


def _expand_to_regions(tile: Tile, evidence: RegionEvidence, policy: Policy) -> Expansion:
    """Cut regions around the candidates of a tile, or looks at what is textured in it."""
    rules = policy.regions
    assert rules is not None
    guards: list[str] = []
    if evidence.textured is None:
        planned = plan_regions(evidence.candidates, tile, rules, policy.input_side)
    else:
        planned = plan_looks(evidence.textured, tile, rules, policy.input_side)
        if not rules.looks_again(tile, policy.input_side):
            guards.append("nothing_seen")
    costs = np.array([region.cells for region in planned], np.int64)
    affordable = int((np.cumsum(costs) <= tile.window_budget).sum())
    if affordable < len(planned):
        guards.append("budget")
    # What is left is for the children's children, as their own pixels go.
    spent = max(1, int(costs[:affordable].sum()))
    left = tile.window_budget - spent
    valid_area = AreaRange(0.0, (rules.keep_factor * rules.small / max(tile.zoom_xy)) ** 2)
    children = tuple(
        Tile(
            tile.image_id,
            (*tile.path, index),
            tile.image_hw,
            Window(*region.xyxy),
            region.height,
            region.width,
            valid_area,
            left * region.cells // spent,
        )
        for index, region in enumerate(planned[:affordable])
    )
    return Expansion(True, children, tuple(guards))


# --- Algorithm 1 ------------------------------------------------------------------------------------


def _expand_by_scale(tile: Tile, scale_map: ScaleMap, policy: Policy) -> Expansion:
    """Cut windows around the cells of a scale map that are out of the detector's range."""
    rules = policy.recursion
    children: list[Tile] = []
    guards: list[str] = []
    finished_window = False
    uncovered = np.zeros(scale_map.hw, bool) if scale_map.scale is None else scale_map.scale > 0
    for direction in _directions(tile, scale_map, policy):
        limit = tile.window_budget - len(children)
        weights, cells_hw = _weights(direction, scale_map), _cells_hw(tile, scale_map.hw, policy)
        windows = plan_windows(weights, cells_hw, limit=limit + 1, price=rules.price)
        if len(windows) > limit:
            guards.append("max_windows")
        for cells in windows[:limit]:
            factor = _zoom_factor(scale_map, cells, direction, policy)
            if factor is None:
                finished_window = True
                continue
            child = _child(tile, len(children), cells, scale_map.hw, factor, policy, guards)
            if child is None:
                continue
            uncovered[cells.cells] = False
            child = dataclasses.replace(child, valid_area=direction.valid_area)
            # TopK makes the same child twice of a canvas with scales on both sides of the range.
            if all(dataclasses.replace(child, path=other.path) != other for other in children):
                children.append(child)
    # With a fixed zoom every tile is detected, for the objects in it that are in range. With TopK a tile is detected
    # if a window of it is in range, or if its children leave an object uncovered.
    detect = rules.zoom is not None or finished_window or bool(uncovered.any()) or not children
    return Expansion(detect, tuple(_share_budget(children, tile.window_budget)), tuple(guards))


@dataclass(frozen=True)
class _Direction:
    """Cells to zoom into (small objects) or out of (large objects).

    Attributes:
        out_of_range: [h, w] bool, the cells.
        zooms_in: True for small objects.
        valid_area: areas of the boxes that these windows are cut for, in image pixels.
    """

    out_of_range: np.ndarray
    zooms_in: bool
    valid_area: AreaRange = ANY_AREA


def _directions(tile: Tile, scale_map: ScaleMap, policy: Policy) -> list[_Direction]:
    """Out-of-range cells, of large objects first, then of small ones."""
    rules = policy.recursion
    if scale_map.scale is not None:
        scale = scale_map.scale
        return [
            _Direction(scale > rules.scale_range.high, zooms_in=False),
            _Direction((scale > 0) & (scale < rules.scale_range.low), zooms_in=True),
        ]
    directions = []
    for classes, zooms_in in ((rules.large_classes, False), (rules.small_classes, True)):
        if not classes:
            continue
        if rules.method == "class":
            cells = np.isin(scale_map.classes, classes)
        else:
            cells = scale_map.prob[list(classes)].sum(axis=0) > rules.threshold  # type: ignore[index]
        directions.append(_Direction(cells, zooms_in, _valid_area(tile.window.area, classes, zooms_in, policy)))
    return directions


def _weights(direction: _Direction, scale_map: ScaleMap) -> np.ndarray:
    """[h, w] float64: expected gain of each out-of-range cell, or its share of the map."""
    if scale_map.gain is not None:
        return direction.out_of_range * scale_map.gain.astype(np.float64)
    return direction.out_of_range * (1.0 / direction.out_of_range.size)


def _cells_hw(tile: Tile, grid_hw: tuple[int, int], policy: Policy) -> tuple[int, int]:
    """(height, width) of a window in cells of the scale map, less the margin."""
    frame, margin = tile.window, policy.recursion.margin
    height, width = window_hw(frame.height, frame.width, policy)
    # Rounded down: a cell that the window of whole pixels does not hold must not be cleared.
    return grid_hw[0] * height // frame.height - 2 * margin, grid_hw[1] * width // frame.width - 2 * margin


def _zoom_factor(scale_map: ScaleMap, cells: CellWindow, direction: _Direction, policy: Policy) -> float | None:
    """Zoom of a window relative to its tile; None if its TopK is in range."""
    rules = policy.recursion
    if rules.zoom is not None:
        return rules.zoom if direction.zooms_in else 1.0 / rules.zoom
    if scale_map.scale is None:
        msg = "zoom none rescales by 1 / TopK, which needs a regression map, got a class map: give a fixed zoom"
        raise UserError(msg)
    return rescale_factor(scale_map.scale[cells.cells], rules)


def rescale_factor(scales: np.ndarray, rules: Recursion) -> float | None:
    """Zoom that brings a window's objects into range: 1 / TopK (Algorithm 1).

    Args:
        scales: scales of the window's cells; 0 is background.
        rules: k and [R_L, R_H].

    Returns:
        The factor; None if TopK is in range, or there is no object.
    """
    top_k = top_k_mean(scales, rules.k)
    low, high = rules.scale_range
    return None if not top_k or low <= top_k <= high else 1.0 / top_k


def _child(
    tile: Tile,
    index: int,
    cells: CellWindow,
    grid_hw: tuple[int, int],
    factor: float,
    policy: Policy,
    guards: list[str],
) -> Tile | None:
    """The tile of a window of cells; None, and a guard noted, if a limit forbids it."""
    rules, frame = policy.recursion, tile.window
    height, width = window_hw(frame.height, frame.width, policy)
    # The window keeps the centre of its cells; its sides are W of the tile's, whatever the grid.
    centre_x = frame.x0 + (cells.left + cells.width / 2) * frame.width / grid_hw[1]
    centre_y = frame.y0 + (cells.top + cells.height / 2) * frame.height / grid_hw[0]
    x0 = min(max(math.floor(centre_x - width / 2 + 0.5), frame.x0), frame.x1 - width)
    y0 = min(max(math.floor(centre_y - height / 2 + 0.5), frame.y0), frame.y1 - height)
    window = Window(x0, y0, x0 + width, y0 + height)
    # Compared before rounding: a side rounded up to one pixel would be zoomed by more than its tile can hold.
    if rules.window < 1.0 and max(frame.width, frame.height) * rules.window < rules.min_window_side:
        guards.append("min_window_side")
        return None
    zoom_x, zoom_y = tile.zoom_xy
    wanted = height * zoom_y * factor, width * zoom_x * factor
    shrink = min(1.0, math.sqrt(rules.max_tile_pixels / (wanted[0] * wanted[1])))
    if shrink < 1.0:
        guards.append("max_tile_pixels")
    # 1e-6: 0.65 * 640 is 416 less a rounding error. The outer min: of a thin tile, whose other side is rounded up to
    # one pixel, the longer side alone must not exceed the limit.
    tile_height, tile_width = (min(max(1, math.floor(side * shrink + 1e-6)), rules.max_tile_pixels) for side in wanted)
    if window == frame and (tile_height, tile_width) == (tile.height, tile.width):
        guards.append("no_change")
        return None
    return Tile(tile.image_id, (*tile.path, index), tile.image_hw, window, tile_height, tile_width)


def _valid_area(frame_area: int, classes: tuple[int, ...], zooms_in: bool, policy: Policy) -> AreaRange:
    """Areas, in image pixels, of the boxes that a window for these scale classes may keep (size match)."""
    factor = policy.recursion.keep_factor
    if zooms_in:
        return AreaRange(0.0, _CLASS_LIMITS[max(classes)] * factor * frame_area / REFERENCE_AREA)
    return AreaRange(_CLASS_LIMITS[min(classes) - 1] / factor * frame_area / REFERENCE_AREA, math.inf)


def _share_budget(children: list[Tile], window_budget: int) -> list[Tile]:
    """The children with the windows still allowed divided among them, so that no order of work exceeds the limit."""
    if not children:
        return children
    share, extra = divmod(window_budget - len(children), len(children))
    return [dataclasses.replace(child, window_budget=share + (i < extra)) for i, child in enumerate(children)]


def _why_not_expanded(tile: Tile, policy: Policy) -> tuple[str, ...]:
    """The limit that kept windows from being cut from a tile."""
    if policy.regions is not None:
        return () if tile.window_budget else ("budget",)
    if tile.depth < policy.recursion.max_depth:
        return ("max_windows",)
    # A fixed zoom ends at max_depth by its own rule; TopK was stopped before its scale was in range.
    return ("max_depth",) if policy.recursion.zoom is None else ()


# --- for figures ------------------------------------------------------------------------------------


def out_of_range(tile: Tile, scale_map: ScaleMap, policy: Policy) -> np.ndarray:
    """Cells of a scale map that are out of the detector's range, around which windows are cut.

    Args:
        tile: the tile.
        scale_map: its scale map, on a grid of [h, w] cells.
        policy: the policy.

    Returns:
        [h, w] bool.
    """
    cells = np.zeros(scale_map.hw, bool)
    for direction in _directions(tile, scale_map, policy):
        cells |= direction.out_of_range
    return cells


def planning_weights(tile: Tile, scale_map: ScaleMap, policy: Policy) -> np.ndarray:
    """Weight of each cell of a scale map in the planning of windows, relative to the greatest.

    Args:
        tile: the tile.
        scale_map: its scale map, on a grid of [h, w] cells.
        policy: the policy.

    Returns:
        [h, w] float64 in [0, 1]: 0 where a cell is in range; else 1, or in proportion to the expected gain.
    """
    weights = [_weights(direction, scale_map) for direction in _directions(tile, scale_map, policy)]
    greatest = np.max([np.zeros(scale_map.hw), *weights], axis=0)
    return greatest / greatest.max() if greatest.any() else greatest
