"""Algorithm 1 on canvases with one object each: the window is the whole canvas, and TopK rescales it.

Many canvases go through it side by side, so that a network sees batches of one size. What is added to the rule of
photographs' windows is the choice among sizes, so that a recursion neither oscillates nor runs for ever.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile, Window
from scalenet_ray.core.inference import ScalePredictor
from scalenet_ray.core.policy import Recursion
from scalenet_ray.core.recursion import rescale_factor
from scalenet_ray.core.scale import ScaleMap, ScaleRange
from scalenet_ray.experiments.data import Resampling, resized

__all__ = [
    "RescaleRules",
    "Rescaled",
    "canvas_recursion",
    "rescale_canvases",
]

_BATCH_PIXELS = 2**16
"""Canvas pixels that a network sees at once: a layer of 32 channels in 8 MB, which caches hold."""


@dataclass(frozen=True)
class RescaleRules:
    """How sizes are chosen.

    Attributes:
        even: sides are even, as the canvas that the classifier knows: an odd one is half a pixel off in its middle.
        bisect: once a canvas was too large at one side and too small at another, only sides in between are tried,
            the middle one where the network asks for another; it ends where there is none.
        from_original: each canvas is made from the picture; else from the canvas before.
        resampling: how.
    """

    even: bool = True
    bisect: bool = True
    from_original: bool = True
    resampling: Resampling = "bicubic"


class Rescaled(NamedTuple):
    """What became of a picture.

    Attributes:
        sides: of its canvases in pixels, its own first, the last one for the classifier.
        pixels: [side, side, 3] uint8, the last canvas.
        maps: what was seen in each canvas that was looked at.
        capped: whether the limit of steps ended it, and not its scale.
    """

    sides: tuple[int, ...]
    pixels: np.ndarray
    maps: tuple[ScaleMap, ...]
    capped: bool


@dataclass
class _Running:
    """A picture on its way: `low` and `high` are the sides that were too small, and too large."""

    picture: np.ndarray
    pixels: np.ndarray
    tile: Tile
    low: int = 0
    high: int | None = None
    sides: tuple[int, ...] = ()
    maps: tuple[ScaleMap, ...] = ()


def canvas_recursion(scale_range: ScaleRange, *, k: float, max_depth: int, largest_side: int = 512) -> Recursion:
    """Algorithm 1 for canvases: W is all of it, and TopK rescales.

    Args:
        scale_range: [R_L, R_H].
        k: the share of scales that TopK averages; 1 is their mean.
        max_depth: the most steps; 1 is the paper's baseline that rescales once.
        largest_side: canvases do not grow beyond it, in pixels.
    """
    return Recursion(
        scale_range=scale_range,
        k=k,
        window=1.0,
        zoom=None,
        max_depth=max_depth,
        max_windows=max_depth,
        max_tile_pixels=largest_side**2,
    )


def rescale_canvases(
    pictures: Sequence[np.ndarray], recursion: Recursion, rules: RescaleRules, predict_scale: ScalePredictor
) -> list[Rescaled]:
    """Rescale each picture until its scale is in range.

    Args:
        pictures: N square pictures, [s, s, 3] uint8 each, of any sizes.
        recursion: see `canvas_recursion`.
        rules: how sizes are chosen.
        predict_scale: Scale Net, or an oracle: the scale at each pixel of the object, 0 elsewhere.

    Returns:
        N, in their order.

    Raises:
        TileError: if the network gives NaN.
    """
    running = {}
    for i, picture in enumerate(pictures):
        side = picture.shape[0]
        tile = Tile(i, (), (side, side), Window(0, 0, side, side), side, side)
        running[i] = _Running(picture, picture, tile, sides=(side,))
    settled: dict[int, Rescaled] = {}
    while running:
        for batch in _batches(running):
            seen = predict_scale([running[i].pixels for i in batch], [running[i].tile for i in batch])
            for i, scale_map in zip(batch, seen, strict=True):
                if isinstance(scale_map, TileError):
                    raise scale_map
                one = running[i]
                one.maps = (*one.maps, scale_map)
                side = _next_side(one, scale_map, recursion, rules)
                if side is not None:
                    source = one.picture if rules.from_original else one.pixels
                    one.pixels = resized(source, side, rules.resampling)
                    one.sides = (*one.sides, side)
                    one.tile = dataclasses.replace(one.tile, path=(*one.tile.path, 0), height=side, width=side)
                if side is None or one.tile.depth == recursion.max_depth:
                    settled[i] = Rescaled(one.sides, one.pixels, one.maps, side is not None)
                    del running[i]
    return [settled[i] for i in range(len(pictures))]


def _batches(running: dict[int, _Running]) -> Iterator[list[int]]:
    """Those that are running, in groups of one size that a network can take at once."""
    by_side: dict[int, list[int]] = {}
    for i, one in running.items():
        by_side.setdefault(one.tile.height, []).append(i)
    for side, members in by_side.items():
        count = max(1, _BATCH_PIXELS // side**2)
        for start in range(0, len(members), count):
            yield members[start : start + count]


def _next_side(one: _Running, scale_map: ScaleMap, recursion: Recursion, rules: RescaleRules) -> int | None:
    """The side, in pixels, of the canvas that is looked at next; None if this one is what there was to find."""
    assert scale_map.scale is not None
    factor = rescale_factor(scale_map.scale, recursion)
    if factor is None:
        return None
    side, grain = one.tile.height, 2 if rules.even else 1
    fitting = grain * round(side * factor / grain)
    if factor < 1.0:
        one.high = side
        fitting = max(grain, min(fitting, side - grain))
    else:
        one.low = side
        fitting = min(max(fitting, side + grain), max(side, math.isqrt(recursion.max_tile_pixels)))
    if rules.bisect and one.high is not None and not one.low < fitting < one.high:
        fitting = grain * ((one.low + one.high) // (2 * grain))
        if not one.low < fitting < one.high:
            return None
    return fitting if fitting != side else None
