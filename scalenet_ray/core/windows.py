"""Window planners: fixed windows of an image, and windows that cover the weight of a scale map (Algorithm 1)."""

from __future__ import annotations

import functools
import importlib
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.geometry import AreaRange, Tile, Window, fit_longer_side
from scalenet_ray.core.policy import MOST_WINDOWS, Policy
from scalenet_ray.core.scale import REFERENCE_AREA


class CellWindow(NamedTuple):
    """Window on a scale map's grid: rows [top, top + height), columns [left, left + width), in cells.

    Attributes:
        gain: sum of the weights inside that no window chosen before covers.
    """

    top: int
    left: int
    height: int
    width: int
    gain: float

    @property
    def cells(self) -> tuple[slice, slice]:
        """Index of its cells in an [h, w] array."""
        return (slice(self.top, self.top + self.height), slice(self.left, self.left + self.width))


def window_sums(weights: np.ndarray, window_hw: tuple[int, int]) -> np.ndarray:
    """Sums of `weights` over every window of one size.

    Args:
        weights: [h, w], any real type.
        window_hw: (height, width) of the window in cells, at most (h, w).

    Returns:
        [h - height + 1, w - width + 1] float64; entry (i, j) is the window whose top left cell is (i, j).
    """
    height, width = window_hw
    table = np.zeros((weights.shape[0] + 1, weights.shape[1] + 1))
    np.cumsum(np.cumsum(weights, axis=0, dtype=np.float64), axis=1, out=table[1:, 1:])
    return table[height:, width:] - table[:-height, width:] - table[height:, :-width] + table[:-height, :-width]


def _centred(weights: np.ndarray, top: int, left: int, window_hw: tuple[int, int]) -> tuple[int, int]:
    """Top left cell of the window centred on the positive weights that it covers."""
    height, width = window_hw
    covered = weights[top : top + height, left : left + width] > 0
    rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
    middle_y, middle_x = top + (rows[0] + rows[-1] + 1) / 2, left + (columns[0] + columns[-1] + 1) / 2
    limit_top, limit_left = weights.shape[0] - height, weights.shape[1] - width
    # Rounding half up keeps the choice independent of the parity of the window.
    new_top = min(max(math.floor(middle_y - height / 2 + 0.5), 0), limit_top)
    new_left = min(max(math.floor(middle_x - width / 2 + 0.5), 0), limit_left)
    return new_top, new_left


def plan_windows(
    weights: np.ndarray, window_hw: tuple[int, int], *, limit: int, price: float = 0.0
) -> list[CellWindow]:
    """Choose windows of one size greedily by the weight that they cover (Algorithm 1, inner loop).

    While weight is left: take the window that covers most of it, centre it on what it covers, clear its cells. Ties go
    to the topmost, then leftmost window. The list ends where the next window gains no more than `price`.

    Args:
        weights: [h, w] non-negative: 1 for an out-of-range cell, or its expected gain.
        window_hw: (height, width) of the windows in cells; larger than the grid means all of it.
        limit: maximum number of windows.
        price: least gain of a window, in the unit of `weights`.

    Returns:
        At most `limit` windows, in the order of their gain.
    """
    left_over = np.array(weights, dtype=np.float64)
    height = min(max(window_hw[0], 1), left_over.shape[0])
    width = min(max(window_hw[1], 1), left_over.shape[1])
    windows: list[CellWindow] = []
    # Rounding errors of a summed-area table are some 1e-14 of the total: sums that differ by less than `tie` are equal,
    # and gains under ten of it are zero.
    tie = 1e-10 * float(left_over.sum())
    floor = max(price, 10 * tie)
    while len(windows) < limit:
        sums = window_sums(left_over, (height, width))
        best = float(sums.max())
        if not best > floor:
            break
        top, left = np.unravel_index(int((sums >= best - tie).argmax()), sums.shape)
        top, left = _centred(left_over, int(top), int(left), (height, width))
        cells = (slice(top, top + height), slice(left, left + width))
        windows.append(CellWindow(top, left, height, width, float(left_over[cells].sum())))
        left_over[cells] = 0.0
    return windows


def top_k_mean(scales: np.ndarray, k: float) -> float:
    """Mean of the largest scales of objects: TopK of Algorithm 1.

    Args:
        scales: [...] scales, of any shape; 0 is background and does not count.
        k: the share taken, 0 < k <= 1 (the paper: 0.15 for MNIST, 0.1 for CIFAR-10).

    Returns:
        The mean of the largest ceil(k * n) of the n scales above 0; 0.0 if there is none.
    """
    values = scales[scales > 0]
    if not values.size:
        return 0.0
    count = math.ceil(k * values.size)
    return float(np.partition(values, values.size - count)[-count:].mean(dtype=np.float64))


def window_hw(height: int, width: int, policy: Policy) -> tuple[int, int]:
    """(height, width) of a window: a square of W times the frame's longer side, clipped to the frame.

    A square fills the detector's canvas, which an oblong window would leave partly empty. Rounded down, so that a
    zoomed window never exceeds its tile.
    """
    side = max(1, int(max(height, width) * policy.recursion.window))
    return (min(side, height), min(side, width))


def _fitted_tile(parent: Tile, index: int, window: Window, policy: Policy) -> Tile:
    """A window resampled so that its longer side is the policy's input side."""
    hw = fit_longer_side(window.height, window.width, policy.input_side)
    return Tile(parent.image_id, (*parent.path, index), parent.image_hw, window, *hw)


def _grid_starts(side: int, count: int, overlap: float) -> tuple[list[int], int]:
    """Starts and length of `count` windows that cover `side` and overlap by a share of their length."""
    length = max(1, math.ceil(side / (count - (count - 1) * overlap)))
    return [(side - length) * i // max(count - 1, 1) for i in range(count)], length


def grid_tiles(root: Tile, policy: Policy) -> list[Tile]:
    """N x N overlapping windows of equal size (Grid-Rescale)."""
    height, width = root.image_hw
    ys, window_height = _grid_starts(height, policy.grid, policy.overlap)
    xs, window_width = _grid_starts(width, policy.grid, policy.overlap)
    windows = [Window(x, y, x + window_width, y + window_height) for y in ys for x in xs]
    return [_fitted_tile(root, i, window, policy) for i, window in enumerate(dict.fromkeys(windows))]


def slice_tiles(root: Tile, policy: Policy) -> list[Tile]:
    """Overlapping windows of `policy.slice_side` image pixels, as sliced inference cuts them; none if one holds all."""
    height, width = root.image_hw
    side = policy.slice_side
    step = max(1, side - int(side * policy.overlap))
    if side >= max(height, width):
        return []
    counts = [1 + max(0, -(-(length - side) // step)) for length in (height, width)]
    _check_count(math.prod(counts), root, policy)
    starts = [
        [max(0, min(i * step, length - side)) for i in range(count)]
        for length, count in zip((height, width), counts, strict=True)
    ]
    windows = [Window(x, y, min(x + side, width), min(y + side, height)) for y in starts[0] for x in starts[1]]
    return [_fitted_tile(root, i, window, policy) for i, window in enumerate(windows)]


def _check_count(count: int, root: Tile, policy: Policy) -> None:
    """Raise `TileError` if an image would be cut into more than `MOST_WINDOWS` windows."""
    if count > MOST_WINDOWS:
        height, width = root.image_hw
        msg = (
            f"policy {policy.name} may cut {MOST_WINDOWS} windows of an image, got {count} for {height} x {width} "
            "pixels: choose larger ones, or policy regions"
        )
        raise TileError(msg)


def random_tiles(root: Tile, policy: Policy) -> list[Tile]:
    """Windows of the recursion's size at random places, the same for the same image and seed."""
    rng = np.random.default_rng((policy.seed, root.image_id))
    height, width = root.image_hw
    window_height, window_width = window_hw(height, width, policy)
    tiles = []
    for i in range(policy.random_windows):
        x, y = int(rng.integers(width - window_width + 1)), int(rng.integers(height - window_height + 1))
        tiles.append(_fitted_tile(root, i, Window(x, y, x + window_width, y + window_height), policy))
    return tiles


def pyramid_tiles(root: Tile, policy: Policy) -> list[Tile]:
    """The whole image at several sizes, each with its own valid range of areas (SNIPER's test)."""
    height, width = root.image_hw
    to_image = height * width / REFERENCE_AREA
    return [
        Tile(
            root.image_id,
            (i,),
            root.image_hw,
            root.window,
            *fit_longer_side(height, width, round(policy.input_side * size)),
            valid_area=AreaRange(low * to_image, high * to_image),
        )
        for i, (size, low, high) in enumerate(policy.pyramid)
    ]


def own_tiles(root: Tile, policy: Policy) -> list[Tile]:
    """Windows of a user's function, each resampled so that its longer side is the policy's input side.

    The function, `policy.planner`, takes the image's (height, width) and returns (x0, y0, x1, y1) of each window in
    whole image pixels.

    Raises:
        TileError: if it returns more than `MOST_WINDOWS`.
        UserError: if the function cannot be loaded, raises an exception, or returns anything else.
    """
    plan = _load_planner(str(policy.planner))
    try:
        planned = islice(plan(root.image_hw), MOST_WINDOWS + 1)
        corners = [tuple(map(operator.index, window)) for window in planned]
        _check_count(len(corners), root, policy)
        windows = [Window(*xyxy) for xyxy in dict.fromkeys(corners)]
        return [_fitted_tile(root, i, window, policy) for i, window in enumerate(windows)]
    except TileError:
        raise
    except Exception as error:
        msg = (
            f"{policy.planner} must return windows (x0, y0, x1, y1) in whole pixels within an image of "
            f"{root.image_hw} (height, width): {type(error).__name__}: {error}"
        )
        raise UserError(msg) from error


@functools.cache
def _load_planner(name: str) -> Callable[[tuple[int, int]], Iterable[Sequence[int]]]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        msg = f"a policy module:function must name a function that can be imported, got {name!r} ({error})"
        raise UserError(msg) from error


_PLANNERS: Mapping[str, Callable[[Tile, Policy], list[Tile]]] = {
    "grid": grid_tiles,
    "own": own_tiles,
    "pyramid": pyramid_tiles,
    "random": random_tiles,
    "slices": slice_tiles,
}


def fixed_tiles(root: Tile, policy: Policy) -> list[Tile]:
    """Tiles of a policy without evidence, the whole image's own left out.

    Args:
        root: the whole image's tile.
        policy: the policy.

    Raises:
        TileError: if they are more than `MOST_WINDOWS`.
        UserError: as `own_tiles`.
    """
    planner = _PLANNERS.get(policy.kind)
    return [] if planner is None else planner(root, policy)
