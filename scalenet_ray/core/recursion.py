"""THE ALGORITHM: one tile and what was seen in it -> the tiles cut from it (Algorithm 1).

`expand` is what every engine calls; `recursive_detect` is the plain reference that every engine must
equal: one image, one tile at a time, no Ray.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from scalenet_ray.core.detections import Failure, ImageResult, TileResult
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import ANY_AREA, AreaRange, Tile, Window, cut_tile
from scalenet_ray.core.inference import (
    AnyScalePredictor,
    Detect,
    detect_tiles,
    predict_scales,
)
from scalenet_ray.core.merge import merge_image
from scalenet_ray.core.policy import Policy, Recursion
from scalenet_ray.core.scale import CLASS_BOUNDS, REFERENCE_AREA, ScaleMap
from scalenet_ray.core.windows import CellWindow, fixed_tiles, plan_windows, top_k_mean, window_hw

__all__ = [
    "Expansion",
    "Step",
    "TracedTile",
    "expand",
    "out_of_range",
    "planning_weights",
    "recursive_detect",
    "rescale_factor",
    "trace_tiles",
]


class Step(NamedTuple):
    """One step of `recursive_detect`: what became of one tile.

    Attributes:
        tile: the tile.
        scale_map: what was seen in it, in its own frame; None if it was not looked at.
        children: the tiles cut from it.
        result: its detections, in image pixels, filtered and not merged yet; its cost, the limits that acted, and why
            it failed, if it did.
    """

    tile: Tile
    scale_map: ScaleMap | None
    children: tuple[Tile, ...]
    result: TileResult


def recursive_detect(
    image: np.ndarray,
    image_id: int,
    policy: Policy,
    *,
    detect: Detect,
    predict_scale: AnyScalePredictor | None = None,
    observe: Callable[[Step], None] | None = None,
) -> ImageResult:
    """Algorithm 1 on one image, one tile after the other: the reference.

    Args:
        image: [h, w, 3] uint8 RGB.
        image_id: the image's id.
        policy: where to look more closely.
        detect: the frozen detector.
        predict_scale: Scale Net, or an oracle; only for the policies that need one.
        observe: called with each step as soon as it is done, a tile before those that are cut from it.

    Returns:
        The image's merged detections in image pixels, and what they cost. A tile that a network breaks on
        fails the image, with the reason.
    """
    queue = deque([policy.root(image_id, (image.shape[0], image.shape[1]))])
    steps: list[Step] = []
    while queue:
        step = _step(image, queue.popleft(), policy, detect, predict_scale)
        queue.extend(step.children)
        steps.append(step)
        if observe is not None:
            observe(step)
    return merge_image([step.result for step in steps], policy.merging)


def _step(
    image: np.ndarray,
    tile: Tile,
    policy: Policy,
    detect: Detect,
    predict_scale: AnyScalePredictor | None,
) -> Step:
    """Look at a tile, plan its windows, and detect it if that is what becomes of it."""
    pixels = [cut_tile(image, tile)]
    seen = predict_scales(pixels, [tile], policy, detect=detect, predict_scale=predict_scale)[0]
    looked = predict_scale.input_pixels if seen.looked and predict_scale is not None else 0
    result = TileResult(tile.image_id, tile.path, Fraction(0), look_pixels=looked, image_hw=tile.image_hw)
    if seen.failure is not None:
        return Step(tile, None, (), dataclasses.replace(result, failure=Failure("look", seen.failure.reason)))
    expansion = expand(tile, seen.scale_map, policy)
    result = dataclasses.replace(result, guards=expansion.guards)
    if expansion.detect:
        result = detect_tiles([result], [tile], pixels, [seen.detections], detect, policy.merging)[0]
    return Step(tile, seen.scale_map, expansion.children, result)


class Expansion(NamedTuple):
    """What becomes of a tile.

    Attributes:
        detect: whether the tile itself is detected.
        children: the tiles cut from it, to be looked at again or detected.
        guards: names of the limits that acted, once for each time.
    """

    detect: bool
    children: tuple[Tile, ...] = ()
    guards: tuple[str, ...] = ()


def expand(tile: Tile, scale_map: ScaleMap | None, policy: Policy) -> Expansion:
    """One step of a policy: which tiles come from this one.

    Args:
        tile: the tile that was looked at.
        scale_map: what was seen in it; None for a tile that `policy.needs_scales` says needs no look.
        policy: the policy.

    Returns:
        Its expansion; the same for the same input, always.
    """
    if policy.uses_evidence:
        if scale_map is None:
            return Expansion(detect=True, guards=_why_not_expanded(tile, policy))
        return _expand_by_scale(tile, scale_map, policy)
    if tile.depth:
        return Expansion(detect=True)
    return Expansion(policy.detects_whole, tuple(fixed_tiles(tile, policy)))


# --- Algorithm 1 ------------------------------------------------------------------------------------

_CLASS_LIMITS = (0.0, *map(float, CLASS_BOUNDS), math.inf)
"""Where scale class i ends, and i + 1 begins, in pixels of a 512 x 512 frame."""


def _why_not_expanded(tile: Tile, policy: Policy) -> tuple[str, ...]:
    """The guard that kept windows from being cut from a tile."""
    if tile.depth < policy.recursion.max_depth:
        return ("max_windows",)
    # A fixed zoom ends at max_depth by its own rule; TopK was stopped before its scale was in range.
    return ("max_depth",) if policy.recursion.zoom is None else ()


@dataclass(frozen=True)
class _Direction:
    """Large objects are zoomed out of, small ones into; each on its own out-of-range cells."""

    out_of_range: np.ndarray
    zooms_in: bool
    valid_area: AreaRange = ANY_AREA


def _directions(tile: Tile, scale_map: ScaleMap, policy: Policy) -> list[_Direction]:
    """Out-of-range cells, large first and then small (Algorithm 1)."""
    rules = policy.recursion
    if scale_map.scale is not None:
        scale = scale_map.scale
        return [
            _Direction(scale > rules.scale_range.high, zooms_in=False),
            _Direction((scale > 0) & (scale < rules.scale_range.low), zooms_in=True),
        ]
    if rules.method == "gain" and scale_map.gain is None:
        msg = "method gain needs a map that says what a closer look gains, got one without: train a scale head"
        raise UserError(msg)
    directions = []
    for classes, zooms_in in ((rules.large_classes, False), (rules.small_classes, True)):
        if not classes:
            continue
        if rules.method == "gain":
            found = np.ones(scale_map.hw, bool)
        elif rules.method == "class":
            found = np.isin(scale_map.classes, classes)
        else:
            found = scale_map.prob[list(classes)].sum(axis=0) > rules.threshold  # type: ignore[index]
        directions.append(_Direction(found, zooms_in, _keep_range(tile.window.area, classes, zooms_in, policy)))
    return directions


def out_of_range(tile: Tile, scale_map: ScaleMap, policy: Policy) -> np.ndarray:
    """Which cells of a map are out of the detector's range: those that windows are laid over.

    Args:
        tile: the tile that was looked at.
        scale_map: what was seen in it, on a grid of [h, w] cells.
        policy: the policy.

    Returns:
        [h, w] bool; all of them where the policy goes by the gain and asks no class.
    """
    cells = np.zeros(scale_map.hw, bool)
    for direction in _directions(tile, scale_map, policy):
        cells |= direction.out_of_range
    return cells


def planning_weights(tile: Tile, scale_map: ScaleMap, policy: Policy) -> np.ndarray:
    """What each cell of a map counts for when windows are planned: 0 where it is in the detector's range.

    Args:
        tile: the tile that was looked at.
        scale_map: what was seen in it, on a grid of [h, w] cells.
        policy: the policy.

    Returns:
        [h, w] float64 in [0, 1], over the greatest: all alike, or where the map says what a closer look gains, by that
        gain. Of large and small objects the one that counts for more.

    Raises:
        UserError: if the policy goes by the gain and the map has none.
    """
    weights = [_weights(direction, scale_map) for direction in _directions(tile, scale_map, policy)]
    most = np.max([np.zeros(scale_map.hw), *weights], axis=0)
    return most / most.max() if most.any() else most


def _weights(direction: _Direction, scale_map: ScaleMap) -> np.ndarray:
    """[h, w] float64: what the cells of one direction count for."""
    if scale_map.gain is not None:
        return direction.out_of_range * scale_map.gain.astype(np.float64)
    return direction.out_of_range * (1.0 / direction.out_of_range.size)


def _expand_by_scale(tile: Tile, scale_map: ScaleMap, policy: Policy) -> Expansion:
    rules = policy.recursion
    grid_hw = scale_map.hw
    height, width = window_hw(tile.window.height, tile.window.width, policy)
    # Rounded down: cells that a window of whole pixels cannot hold must not be cleared as if it did.
    cells_hw = (
        grid_hw[0] * height // tile.window.height - 2 * rules.margin,
        grid_hw[1] * width // tile.window.width - 2 * rules.margin,
    )
    children: list[Tile] = []
    guards: list[str] = []
    in_range_window = False
    left_behind = np.zeros(grid_hw, bool) if scale_map.scale is None else scale_map.scale > 0
    for direction in _directions(tile, scale_map, policy):
        limit = tile.window_budget - len(children)
        windows = plan_windows(_weights(direction, scale_map), cells_hw, limit=limit + 1, price=rules.price)
        if len(windows) > limit:
            guards.append("max_windows")
        for cells in windows[:limit]:
            factor = _zoom_factor(scale_map, cells, direction, policy)
            if factor is None:
                in_range_window = True
                continue
            child = _child(tile, len(children), cells, grid_hw, factor, policy, guards)
            if child is None:
                continue
            left_behind[cells.cells] = False
            # TopK sends a canvas with scales on both sides of the range the same way twice.
            child = dataclasses.replace(child, valid_area=direction.valid_area)
            if all(dataclasses.replace(child, path=other.path) != other for other in children):
                children.append(child)
    # With a fixed zoom every tile is detected: what is in range in it must not be lost to its children.
    # With TopK it is where its children leave an object behind; a digit's canvas waits for its scale.
    detect = rules.zoom is not None or in_range_window or bool(left_behind.any()) or not children
    return Expansion(detect, tuple(_share_budget(children, tile.window_budget)), tuple(guards))


def _zoom_factor(scale_map: ScaleMap, cells: CellWindow, direction: _Direction, policy: Policy) -> float | None:
    """By how much a window is rescaled; None if its TopK is in range and it is finished."""
    rules = policy.recursion
    if rules.zoom is not None:
        return rules.zoom if direction.zooms_in else 1.0 / rules.zoom
    if scale_map.scale is None:
        msg = "zoom none rescales by 1 / TopK, which needs a regression map, got a class map: give a fixed zoom"
        raise UserError(msg)
    return rescale_factor(scale_map.scale[cells.cells], rules)


def rescale_factor(scales: np.ndarray, rules: Recursion) -> float | None:
    """By how much a window is rescaled for what is in it (Algorithm 1): 1 / TopK.

    Args:
        scales: the scales of its cells, 0 where there is no object.
        rules: with k and [R_L, R_H].

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
    """A window of cells -> a tile of the image, or None and the guard that forbids it."""
    rules, frame = policy.recursion, tile.window
    height, width = window_hw(frame.height, frame.width, policy)
    # The window keeps the centre of its cells; its sides are W of the tile's, whatever the grid.
    centre_x = frame.x0 + (cells.left + cells.width / 2) * frame.width / grid_hw[1]
    centre_y = frame.y0 + (cells.top + cells.height / 2) * frame.height / grid_hw[0]
    x0 = min(max(math.floor(centre_x - width / 2 + 0.5), frame.x0), frame.x1 - width)
    y0 = min(max(math.floor(centre_y - height / 2 + 0.5), frame.y0), frame.y1 - height)
    window = Window(x0, y0, x0 + width, y0 + height)
    # Before rounding: a side rounded up to one pixel would be zoomed by more than its tile can hold.
    if rules.window < 1.0 and max(frame.width, frame.height) * rules.window < rules.min_window_side:
        guards.append("min_window_side")
        return None
    zoom_x, zoom_y = tile.zoom_xy
    wanted = height * zoom_y * factor, width * zoom_x * factor
    shrink = min(1.0, math.sqrt(rules.max_tile_pixels / (wanted[0] * wanted[1])))
    if shrink < 1.0:
        guards.append("max_tile_pixels")
    # 1e-6: 0.65 * 640 is 416 less a rounding error, and 415 would be another size.
    # A side is one pixel at least, so that of a thin tile the other one must not exceed the limit alone.
    tile_height, tile_width = (min(max(1, math.floor(side * shrink + 1e-6)), rules.max_tile_pixels) for side in wanted)
    if window == frame and (tile_height, tile_width) == (tile.height, tile.width):
        guards.append("no_change")
        return None
    return Tile(tile.image_id, (*tile.path, index), tile.image_hw, window, tile_height, tile_width)


def _keep_range(frame_area: int, classes: tuple[int, ...], zooms_in: bool, policy: Policy) -> AreaRange:
    """The areas, in image pixels, that a window cut for too small or too large objects is there to find."""
    factor = policy.recursion.keep_factor
    if zooms_in:
        return AreaRange(0.0, _CLASS_LIMITS[max(classes)] * factor * frame_area / REFERENCE_AREA)
    return AreaRange(_CLASS_LIMITS[min(classes) - 1] / factor * frame_area / REFERENCE_AREA, math.inf)


def _share_budget(children: list[Tile], window_budget: int) -> list[Tile]:
    """Divide the windows still allowed among the children, so that no order of work can exceed the limit."""
    if not children:
        return children
    each, extra = divmod(window_budget - len(children), len(children))
    return [dataclasses.replace(child, window_budget=each + (i < extra)) for i, child in enumerate(children)]


class TracedTile(NamedTuple):
    """One tile of an image.

    Attributes:
        tile: the tile.
        scale_map: what was seen in it, in its own frame; None if it needed no look.
    """

    tile: Tile
    scale_map: ScaleMap | None


def trace_tiles(
    image: np.ndarray,
    image_id: int,
    policy: Policy,
    *,
    detect: Detect | None = None,
    predict_scale: AnyScalePredictor | None = None,
) -> list[TracedTile]:
    """All tiles of an image, as `recursive_detect` makes them, but only looked at: for pictures of what a policy does.

    Args:
        image: [h, w, 3] uint8 RGB.
        image_id: the image's id.
        policy: where to look more closely.
        detect: the frozen detector; only for the policies whose look needs its first pass or its features.
        predict_scale: Scale Net, or an oracle; only for the policies that need one.

    Returns:
        The whole image's tile first, then those cut from it. A tile that a network breaks on has neither map nor
        children.
    """
    queue = deque([policy.root(image_id, (image.shape[0], image.shape[1]))])
    looked: list[TracedTile] = []
    while queue:
        tile = queue.popleft()
        seen = predict_scales([cut_tile(image, tile)], [tile], policy, detect=detect, predict_scale=predict_scale)[0]
        looked.append(TracedTile(tile, seen.scale_map))
        if seen.failure is None:
            queue.extend(expand(tile, seen.scale_map, policy).children)
    return looked
