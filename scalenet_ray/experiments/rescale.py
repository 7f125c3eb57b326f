"""Algorithm 1 on canvases with one object each: the window is the whole canvas, and TopK sets its next size.

Many canvases are rescaled together, so that the network gets batches of one size. A bisection over sizes, which the
paper does not have, guarantees that the recursion ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.expansion import rescale_factor
from scalenet_ray.core.geometry import Tile, Window
from scalenet_ray.core.networks import ScalePredictor
from scalenet_ray.core.policy import Recursion
from scalenet_ray.core.scale import ScaleMap, ScaleRange
from scalenet_ray.experiments.data import Resampling, resized

_BATCH_PIXELS = 2**16
"""Canvas pixels of a batch: one layer of 32 channels takes 8 MB, which fits a CPU cache."""


@dataclass(frozen=True)
class RescaleRules:
    """Choice of the next canvas size.

    Attributes:
        even: use even sides only, like the classifier's canvas; an odd side is off centre by half a pixel.
        bisect: once one side was too large and another too small, try only sides in between, and end when none is left.
        from_original: resample each canvas from the original image, else from the previous canvas.
        resampling: resampling filter.
    """

    even: bool = True
    bisect: bool = True
    from_original: bool = True
    resampling: Resampling = "bicubic"


class Rescaled(NamedTuple):
    """Result of rescaling one image.

    Attributes:
        sides: sides of its canvases in pixels: the original first, the classifier's input last.
        pixels: [side, side, 3] uint8, the last canvas.
        maps: scale maps of the canvases that the network was run on.
        capped: whether it ended at the maximum depth instead of in range.
    """

    sides: tuple[int, ...]
    pixels: np.ndarray
    maps: tuple[ScaleMap, ...]
    capped: bool


@dataclass
class _State:
    """An image in progress; `low` and `high` are the largest side that was too small, and the smallest too large."""

    picture: np.ndarray
    pixels: np.ndarray
    tile: Tile
    low: int = 0
    high: int | None = None
    sides: tuple[int, ...] = ()
    maps: tuple[ScaleMap, ...] = ()


def canvas_recursion(scale_range: ScaleRange, *, k: float, max_depth: int, largest_side: int = 512) -> Recursion:
    """Parameters of Algorithm 1 for canvases of at most `largest_side` pixels: W is the whole canvas, zoom 1 / TopK."""
    limits: dict[str, Any] = {"max_depth": max_depth, "max_windows": max_depth, "max_tile_pixels": largest_side**2}
    return Recursion(scale_range=scale_range, k=k, window=1.0, zoom=None, **limits)


def rescale_canvases(
    pictures: Sequence[np.ndarray], recursion: Recursion, rules: RescaleRules, predict_scale: ScalePredictor
) -> list[Rescaled]:
    """Rescale each image until its predicted scale is in range.

    Args:
        pictures: square images, [s, s, 3] uint8 each, of any sizes.
        recursion: see `canvas_recursion`.
        rules: choice of sizes.
        predict_scale: Scale Net or an oracle: the scale at each pixel of the object, 0 elsewhere.

    Raises:
        TileError: if the network returns NaN.
    """
    active: dict[int, _State] = {}
    for i, picture in enumerate(pictures):
        side = picture.shape[0]
        tile = Tile(i, (), (side, side), Window(0, 0, side, side), side, side)
        active[i] = _State(picture, picture, tile, sides=(side,))
    done: dict[int, Rescaled] = {}
    while active:
        for batch in _batches(active):
            maps = predict_scale([active[i].pixels for i in batch], [active[i].tile for i in batch])
            for i, scale_map in zip(batch, maps, strict=True):
                if isinstance(scale_map, TileError):
                    raise scale_map
                state = active[i]
                state.maps = (*state.maps, scale_map)
                side = _next_side(state, scale_map, recursion, rules)
                if side is not None:
                    source = state.picture if rules.from_original else state.pixels
                    state.pixels = resized(source, side, rules.resampling)
                    state.sides = (*state.sides, side)
                    path = (*state.tile.path, 0)
                    state.tile = replace(state.tile, path=path, height=side, width=side)
                if side is None or state.tile.depth == recursion.max_depth:
                    done[i] = Rescaled(state.sides, state.pixels, state.maps, capped=side is not None)
                    del active[i]
    return [done[i] for i in range(len(pictures))]


def _batches(active: dict[int, _State]) -> Iterator[list[int]]:
    """Group the active images by side, in batches of at most `_BATCH_PIXELS`."""
    by_side: dict[int, list[int]] = {}
    for i, state in active.items():
        by_side.setdefault(state.tile.height, []).append(i)
    for side, members in by_side.items():
        count = max(1, _BATCH_PIXELS // side**2)
        for start in range(0, len(members), count):
            yield members[start : start + count]


def _next_side(state: _State, scale_map: ScaleMap, recursion: Recursion, rules: RescaleRules) -> int | None:
    """The side of the next canvas in pixels, or None if the recursion ends."""
    assert scale_map.scale is not None
    factor = rescale_factor(scale_map.scale, recursion)
    if factor is None:
        return None
    side, grain = state.tile.height, 2 if rules.even else 1
    wanted = grain * round(side * factor / grain)
    if factor < 1.0:
        state.high = side
        wanted = max(grain, min(wanted, side - grain))
    else:
        state.low = side
        wanted = min(max(wanted, side + grain), max(side, math.isqrt(recursion.max_tile_pixels)))
    if rules.bisect and state.high is not None and not state.low < wanted < state.high:
        wanted = grain * ((state.low + state.high) // (2 * grain))
        if not state.low < wanted < state.high:
            return None
    return wanted if wanted != side else None
