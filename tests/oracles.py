"""Detectors and scale predictors for tests: with known answers, random, or failing.

Scenes are coloured squares on black; a square's colour is its category, so that a detector can find it at
any zoom from the pixels alone. Everything here is a pure function of pixels or of a tile's identity, made
with plain arguments and picklable, so that an engine's actors can make their own.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile, Window
from scalenet_ray.core.networks import Detect, ScalePredictor
from scalenet_ray.core.policy import Recursion
from scalenet_ray.core.scale import NUM_CLASSES, ScaleMap, ScaleRange, scale_map_of_boxes

COLOURS = {1: (255, 0, 0), 2: (0, 255, 0), 3: (0, 0, 255)}
"""Category id -> the colour of its squares."""

CATEGORIES = {1: "red", 2: "green", 3: "blue"}

BREAKING = (255, 0, 255)
"""The colour that `FailingDetector` breaks on; no category has it."""


def rules_of(**changes: Any) -> Recursion:
    """Algorithm 1's parameters as the tests work them by hand, whatever the defaults are tuned to."""
    fixed = {
        "method": "class",
        "threshold": 0.3,
        "small_classes": (1,),
        "large_classes": (),
        "scale_range": ScaleRange(0.99, 1.05),
        "k": 0.15,
        "window": 0.5,
        "zoom": 2.0,
        "max_depth": 1,
        "max_windows": 4,
        "price": 0.0,
        "keep_factor": 8.0,
        "min_window_side": 16,
        "max_tile_pixels": 2048 * 2048,
        "first_pass_threshold": 0.03,
    }
    return Recursion(**(fixed | changes))


# --- scenes -----------------------------------------------------------------------------------------


def draw_squares(hw: tuple[int, int], boxes: np.ndarray, labels: Sequence[int] | np.ndarray = ()) -> np.ndarray:
    """[h, w, 3] uint8: boxes [N, 4] of whole pixels filled with their category's colour (category 1 by default)."""
    image = np.zeros((*hw, 3), np.uint8)
    labels = labels if len(labels) else [1] * len(boxes)
    for (x0, y0, x1, y1), label in zip(np.asarray(boxes, int), labels, strict=True):
        image[y0:y1, x0:x1] = COLOURS[int(label)]
    return image


def scattered_squares(
    seed: int, hw: tuple[int, int], sides: tuple[int, int], count: int, gap: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Up to `count` squares at random that keep `gap` pixels from each other and from the border.

    Boxes [N, 4] float32 of whole image pixels, and labels [N] int64 in 1..3.
    """
    rng = np.random.default_rng(seed)
    taken = np.zeros(hw, bool)
    boxes, labels = [], []
    for _ in range(50 * count):
        side = int(rng.integers(sides[0], sides[1] + 1))
        if len(boxes) == count or side + 2 * gap > min(hw):
            break
        y, x = (int(rng.integers(gap, length - side - gap + 1)) for length in hw)
        spot = np.s_[max(y - gap, 0) : y + side + gap, max(x - gap, 0) : x + side + gap]
        if not taken[spot].any():
            taken[spot] = True
            boxes.append((x, y, x + side, y + side))
            labels.append(int(rng.integers(1, 4)))
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)


def clustered_squares(
    seed: int, hw: tuple[int, int], sides: tuple[int, int], count: int, extent: int
) -> tuple[np.ndarray, np.ndarray]:
    """Squares in two clusters of `extent` pixels, top left and bottom right, at most `count` each: boxes and labels."""
    near, labels_near = scattered_squares(2 * seed, (extent, extent), sides, count)
    far, labels_far = scattered_squares(2 * seed + 1, (extent, extent), sides, count)
    shift = [hw[1] - extent, hw[0] - extent] * 2
    return np.concatenate([near, far + np.array(shift, np.float32)]), np.concatenate([labels_near, labels_far])


class TruthOfSquares:
    """The ground truth for `OracleScalePredictor`: image id -> boxes, [N, 4] xyxy in image pixels, and areas."""

    def __init__(self, boxes: Mapping[int, np.ndarray]) -> None:
        self._boxes = {key: np.asarray(value, np.float32).reshape(-1, 4) for key, value in boxes.items()}

    def __call__(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        boxes = self._boxes[image_id]
        return boxes, np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)


def tile_of(hw: tuple[int, int], *, image_id: int = 1, path: tuple[int, ...] = ()) -> Tile:
    """A whole image of (height, width) as a tile of its own size."""
    return Tile(image_id, path, hw, Window(0, 0, hw[1], hw[0]), *hw)


def iou_of_boxes(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float:
    """Intersection over union of two boxes, written out: the reference for the vectorised one."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    total = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - shared
    return float(shared / total) if total > 0 else 0.0


# --- detectors --------------------------------------------------------------------------------------


def components(mask: np.ndarray) -> np.ndarray:
    """[N, 4] int64 xyxy bounds of the 4-connected parts of [h, w] bool, topmost first, then leftmost."""
    stats = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)[2][1:].astype(np.int64)
    x, y, width, height, _ = stats[np.lexsort((stats[:, 0], stats[:, 1]))].T
    return np.stack([x, y, x + width, y + height], axis=1)


class PerfectDetector:
    """Finds every square whose longer side in tile pixels is `min_side` or more, to the pixel, and nothing else.

    What is smaller than `sure_side` tile pixels it sees with a score of 0.1 and not 0.9.
    """

    categories = CATEGORIES
    iou_threshold = 0.65

    def __init__(
        self,
        min_side: float = 12.0,
        *,
        sure_side: float = 0.0,
        input_side: int = 64,
        with_masks: bool = False,
    ) -> None:
        self.input_side = input_side
        self._min_side, self._sure_side, self._with_masks = min_side, sure_side, with_masks

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """The square that a tile of `hw` is padded to."""
        side = math.ceil(max(hw) / 32) * 32
        return (side, side)

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        return [self._find(one) for one in pixels]

    def _find(self, pixels: np.ndarray) -> Detections:
        boxes, scores, labels, masks = [], [], [], []
        for label, colour in COLOURS.items():
            mask = ((pixels > 127) == (np.array(colour) > 127)).all(axis=2)
            for x0, y0, x1, y1 in components(mask).tolist():
                side = max(x1 - x0, y1 - y0)
                if side < self._min_side:
                    continue
                boxes.append((x0, y0, x1, y1))
                scores.append(0.9 if side >= self._sure_side else 0.1)
                labels.append(label)
                one = np.zeros(mask.shape, np.uint8, order="F")
                one[y0:y1, x0:x1] = mask[y0:y1, x0:x1]
                masks.append(coco_mask.encode(one)["counts"])
        return Detections(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(scores, np.float32),
            np.array(labels, np.int64),
            masks=tuple(masks) if self._with_masks else None,
        )


class RandomDetector(PerfectDetector):
    """Up to `count` boxes at random, the same for the same pixels: many overlap, some lie outside of the tile."""

    def __init__(self, seed: int = 0, *, count: int = 20, input_side: int = 64) -> None:
        super().__init__(input_side=input_side)
        self._seed, self._count = seed, count

    def _find(self, pixels: np.ndarray) -> Detections:
        rng = np.random.default_rng((self._seed, zlib.crc32(pixels.tobytes()), *pixels.shape))
        count = int(rng.integers(self._count + 1))
        height, width = pixels.shape[:2]
        centres = rng.uniform(-0.1, 1.1, (count, 2)) * (width, height)
        sides = rng.uniform(0.0, 0.5, (count, 2)) * (width, height)
        # Few different scores: ties are what order may leak through.
        scores = rng.integers(0, 11, count) / 10
        return Detections(np.hstack([centres - sides / 2, centres + sides / 2]), scores, rng.integers(1, 4, count))


class OuterDetector:
    """Detects as another one does."""

    categories = CATEGORIES
    iou_threshold = 0.65

    def __init__(self, inner: Detect) -> None:
        self._inner = inner
        self.input_side = inner.input_side

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """As the inner one's."""
        return self._inner.canvas_hw(hw)

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        return self._inner(pixels)


class FailingDetector(OuterDetector):
    """Breaks on a tile that shows `BREAKING`, in the way that costs its image alone."""

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        found = super().__call__(pixels)
        for i, one in enumerate(pixels):
            if (((one > 127) == (np.array(BREAKING) > 127)).all(axis=2)).any():
                found[i] = TileError("the detector broke on this tile: its boxes are NaN")
        return found


class CountingDetector(OuterDetector):
    """Counts the calls, and keeps the (height, width) of every tile it was given."""

    def __init__(self, inner: Detect) -> None:
        super().__init__(inner)
        self.calls = 0
        self.sizes_hw: list[tuple[int, int]] = []

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        self.calls += 1
        self.sizes_hw += [(one.shape[0], one.shape[1]) for one in pixels]
        return super().__call__(pixels)


# --- scale nets -------------------------------------------------------------------------------------


class SeeingScale:
    """A Scale Net that sees every square in the pixels, however small: no ground truth is asked."""

    input_pixels = 64 * 64

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        del tiles
        return [self._map(one) for one in pixels]

    def _map(self, pixels: np.ndarray) -> ScaleMap:
        lit = components(pixels.max(axis=2) > 100)
        areas = np.prod((lit[:, 2:] - lit[:, :2]).astype(np.float64), axis=1)
        implied = scale_map_of_boxes(lit, areas, np.ones(len(lit)), (pixels.shape[0], pixels.shape[1]), (32, 32))
        return ScaleMap(prob=implied.prob)


class RandomScale:
    """Answers at random, always the same for the same tile (image id and path), on a grid of `hw` cells.

    A `share` of the cells holds an object. Scales of kind "regression" are over twelve orders of magnitude.
    """

    input_pixels = 32 * 32

    def __init__(self, seed: int = 0, kind: str = "class", share: float = 0.1, hw: tuple[int, int] = (16, 16)) -> None:
        self._seed, self._kind, self._share, self._hw = seed, kind, share, hw

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        del pixels
        return [self._map(tile) for tile in tiles]

    def _map(self, tile: Tile) -> ScaleMap:
        rng = np.random.default_rng((self._seed, tile.image_id, *tile.path))
        is_object = rng.random(self._hw) < self._share
        if self._kind == "regression":
            return ScaleMap(scale=np.where(is_object, 10.0 ** rng.uniform(-6, 6, self._hw), 0.0))
        classes = np.where(is_object, rng.integers(1, NUM_CLASSES, self._hw), 0)
        return ScaleMap(prob=np.arange(NUM_CLASSES)[:, None, None] == classes)


class ConstantScale:
    """Every cell of every tile is of one scale, or of one class, on a grid of `hw` cells."""

    input_pixels = 32 * 32

    def __init__(
        self, scale: float | None = None, scale_class: int | None = None, hw: tuple[int, int] = (16, 16)
    ) -> None:
        if scale is not None:
            self._map = ScaleMap(scale=np.full(hw, scale))
        else:
            self._map = ScaleMap(prob=np.arange(NUM_CLASSES)[:, None, None] == np.full(hw, scale_class))

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        del pixels
        return [self._map] * len(tiles)


class OscillatingScale:
    """Whatever was done, it was wrong by `factor`: too large at even depths, too small at odd ones."""

    input_pixels = 32 * 32

    def __init__(self, factor: float = 2.0, hw: tuple[int, int] = (8, 8)) -> None:
        self._factor, self._hw = factor, hw

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        del pixels
        return [
            ScaleMap(scale=np.full(self._hw, 1 / self._factor if tile.depth % 2 else self._factor)) for tile in tiles
        ]


class BrokenScale:
    """Gives NaN for every tile of one image, at or below a depth, and what another net says for the rest."""

    def __init__(self, inner: ScalePredictor, image_id: int, depth: int = 0) -> None:
        self._inner, self._image_id, self._depth = inner, image_id, depth
        self.input_pixels = inner.input_pixels

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        maps = self._inner(pixels, tiles)
        for i, tile in enumerate(tiles):
            if tile.image_id == self._image_id and tile.depth >= self._depth:
                maps[i] = _nan_map()
        return maps


def _nan_map() -> ScaleMap | TileError:
    try:
        return ScaleMap(scale=np.full((4, 4), np.nan))
    except TileError as error:
        return error


# --- comparison -------------------------------------------------------------------------------------


def equal_detections(one: Detections, other: Detections) -> bool:
    """Whether two are equal to the bit, masks included."""
    arrays = ("boxes", "scores", "labels", "depth", "windows")
    same = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
    return same and one.masks == other.masks


def detections(found: list[Detections | TileError]) -> list[Detections]:
    """Answers none of which is an error."""
    assert all(isinstance(each, Detections) for each in found), found
    return found  # type: ignore[return-value]
