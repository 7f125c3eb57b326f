"""Large scenes of the embedded sample: a few small objects in a wide, mostly empty view.

A sky over water or a field, soft clouds, some rocks or woods with texture, and the sample's shapes: flocks of objects
of 12 to 60 pixels, some alone, two or three large ones. Enlarging and noise are integer arithmetic, so that every
machine draws the same pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from PIL import Image

from scalenet_ray.sample.shapes import SAMPLE_CATEGORIES, paint, shape_alpha

FIRST_LARGE_ID = 2_000_000
"""Offset of the large scenes' image ids."""

LARGE_HW = (3072, 4096)
"""(height, width) of a large scene in pixels."""

_SIZE = LARGE_HW[1], LARGE_HW[0]

_SMALL_SIDES = (12.0, 60.0)
"""Longer sides of its small objects, in pixels."""

_NEAR_SIDES = (240.0, 480.0)
"""Longer sides of the two or three large ones, in pixels."""

_GAP = 12
"""Least distance between two objects, and from the image's edge, in pixels."""

_COARSE = 8
"""Pixels along a side of a pixel that the background is drawn in."""

_VIEWS = (
    ((74, 130, 196), (205, 222, 234), (84, 130, 158), (44, 92, 124), (96, 104, 92)),
    ((96, 124, 168), (226, 214, 196), (196, 182, 118), (150, 142, 70), (70, 92, 52)),
    ((122, 140, 158), (208, 212, 214), (122, 138, 146), (78, 98, 110), (88, 90, 96)),
    ((86, 92, 140), (236, 190, 150), (104, 108, 136), (62, 72, 108), (58, 58, 70)),
)
"""RGB of a view: sky above and at the horizon, ground at the horizon and below, rocks or woods."""


@dataclass(frozen=True, eq=False)
class LargeScene:
    """A large image and its objects, which do not overlap.

    Attributes:
        pixels: [3072, 4096, 3] uint8 RGB.
        boxes: [N, 4] int64 xyxy, the smallest that hold the objects' masks.
        masks: N arrays of [height, width] bool of the boxes' sizes.
        category_ids: [N] int64, keys of SAMPLE_CATEGORIES.
    """

    pixels: np.ndarray
    boxes: np.ndarray
    masks: tuple[np.ndarray, ...]
    category_ids: np.ndarray


def _smooth_noise(rng: np.random.Generator, hw: tuple[int, int], grids: tuple[tuple[int, int], ...]) -> np.ndarray:
    """[h, w] int32 around 0: noise on grids of (rows, columns), each half as strong as the one before."""
    total = np.zeros(hw, np.int32)
    for i, grid in enumerate(grids):
        rough = Image.fromarray(rng.integers(0, 256, grid, dtype=np.uint8))
        total += (np.asarray(rough.resize((hw[1], hw[0]), Image.Resampling.BICUBIC), np.int32) - 128) >> i
    return total


def _backdrop(rng: np.random.Generator, view: tuple[tuple[int, int, int], ...], horizon: float) -> np.ndarray:
    """[3072, 4096, 3] uint8: sky with soft clouds over water or a field, `horizon` as a share of the height."""
    width, height = (side // _COARSE for side in _SIZE)
    line = round(horizon * height)
    top, low, far, near = (np.array(colour, np.float64) for colour in view[:4])
    sky = np.linspace(0, 1, line)[:, None, None] ** 1.2
    ground = np.linspace(0, 1, height - line)[:, None, None] ** 0.7
    rows = np.concatenate([top + (low - top) * sky, far + (near - far) * ground])
    clouds = _smooth_noise(rng, (line, width), ((3, 4), (7, 8), (15, 16)))
    cover = np.clip(clouds / 110 - 0.1, 0, 0.75)[..., None]
    swell = _smooth_noise(rng, (height - line, width), ((5, 3), (12, 5)))[..., None] / 14
    canvas = np.broadcast_to(rows, (height, width, 3)).copy()
    canvas[:line] += cover * (244 - canvas[:line])
    canvas[line:] += swell
    small = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    return np.asarray(small.resize(_SIZE, Image.Resampling.BICUBIC)).copy()


def _add_texture(rng: np.random.Generator, canvas: np.ndarray, colour: tuple[int, int, int], line: int) -> None:
    """Draw rocks or woods of a colour in place; the horizon is the row `line`."""
    height, width = int(rng.integers(110, 260)), int(rng.integers(600, 1300))
    x, y = int(rng.integers(0, _SIZE[0] - width)), line - height + 24
    rows, columns = np.linspace(-1, 0, height)[:, None], np.linspace(-1, 1, width)[None]
    ragged = _smooth_noise(rng, (height, width), ((3, 7), (6, 20), (12, 45))) / 350
    alpha = np.clip((1 - rows**2 - 1.5 * columns**2 + ragged) * 8, 0, 1)
    rough = _smooth_noise(rng, (height, width), ((height // 24, width // 24), (height // 10, width // 10)))
    spot = canvas[y : y + height, x : x + width]
    spot[:] = spot + alpha[..., None] * (np.clip(np.array(colour) + rough[..., None] / 4, 0, 255) - spot)


def _noise(rng: np.random.Generator, canvas: np.ndarray, strength: float) -> None:
    """Add grey noise in place, of a standard deviation of `strength` grey levels."""
    table = np.array([round(NormalDist(0, strength).inv_cdf((i + 0.5) / 256)) for i in range(256)], np.int16)
    for rows in np.array_split(canvas, 16):
        noise = table[rng.integers(0, 256, rows.shape[:2], dtype=np.uint8)]
        rows[:] = np.clip(rows + noise[..., None], 0, 255)


def _wishes(rng: np.random.Generator) -> list[tuple[float, tuple[float, float], float]]:
    """(side, centre (x, y), spread) in pixels of the objects to place, the large ones first."""
    small = np.log(_SMALL_SIDES)
    wishes = [(rng.uniform(*_NEAR_SIDES), rng.uniform(0.15, 0.85, 2) * _SIZE, 0.0) for _ in range(rng.integers(2, 4))]
    for _ in range(rng.integers(4, 7)):
        centre, usual = rng.uniform(0.08, 0.92, 2) * _SIZE, rng.uniform(*small)
        for _ in range(rng.integers(5, 10)):
            side = math.exp(np.clip(usual + rng.normal(0, 0.25), *small))
            wishes.append((side, centre, 30.0 + 2.5 * math.exp(usual)))
    for _ in range(rng.integers(5, 9)):
        wishes.append((math.exp(rng.uniform(*small)), rng.uniform(0.03, 0.97, 2) * _SIZE, 0.0))
    return [(float(side), (float(centre[0]), float(centre[1])), spread) for side, centre, spread in wishes]


def _free_place(
    rng: np.random.Generator,
    size: tuple[int, int],
    centre: tuple[float, float],
    spread: float,
    taken: list[tuple[int, int, int, int]],
) -> tuple[int, int] | None:
    """(x, y) of a box of `size` (width, height) near `centre`, at a distance from those taken; None if none is free."""
    (width, height), (limit_x, limit_y) = size, _SIZE
    for attempt in range(30):
        reach = spread * (1 + attempt / 10)
        x, y = (round(c + rng.normal(0, 1) * reach - s / 2) for c, s in zip(centre, size, strict=True))
        inside = _GAP <= x <= limit_x - width - _GAP and _GAP <= y <= limit_y - height - _GAP
        if inside and not any(
            x < right + _GAP and left < x + width + _GAP and y < low + _GAP and top < y + height + _GAP
            for left, top, right, low in taken
        ):
            return x, y
    return None


def large_scene(index: int, seed: int = 0) -> LargeScene:
    """Draw the scene of an index in large2017, from 0: some forty small objects, two or three large ones."""
    rng = np.random.default_rng([seed, FIRST_LARGE_ID, index])
    view, horizon = _VIEWS[index % len(_VIEWS)], rng.uniform(0.5, 0.75)
    canvas = _backdrop(rng, view, horizon)
    for _ in range(int(rng.integers(2, 4))):
        _add_texture(rng, canvas, view[4], round(horizon * _SIZE[1]))
    ids = list(SAMPLE_CATEGORIES)
    taken: list[tuple[int, int, int, int]] = []
    boxes, masks, category_ids = [], [], []
    for side, centre, spread in _wishes(rng):
        category_id = ids[int(rng.integers(len(ids)))]
        alpha = shape_alpha(rng, SAMPLE_CATEGORIES[category_id], side)
        height, width = alpha.shape
        place = _free_place(rng, (width, height), centre, spread, taken)
        if place is None:
            continue
        x, y = place
        taken.append((x, y, x + width, y + height))
        spot = canvas[y : y + height, x : x + width]
        spot[:] = np.clip(paint(rng, spot.astype(np.float32), alpha), 0, 255)
        rows, columns = np.nonzero(alpha >= 0.5)
        left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        masks.append(alpha[top:bottom, left:right] >= 0.5)
        boxes.append((x + left, y + top, x + right, y + bottom))
        category_ids.append(category_id)
    _noise(rng, canvas, rng.uniform(1.5, 3.0))
    return LargeScene(canvas, np.array(boxes, np.int64), tuple(masks), np.array(category_ids, np.int64))
