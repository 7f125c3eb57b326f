"""What a detector is fine-tuned on: windows around small objects, and which boxes a tile of them shows. No torch."""

from __future__ import annotations

import numpy as np

from scalenet_ray.core.coco import Objects
from scalenet_ray.core.scale import class_of_area
from scalenet_ray.core.window import Tile, Window, boxes_to_tile

__all__ = ["boxes_in_tile", "small_objects", "zoom_window"]

WINDOW_SHARES = (0.25, 0.5)
"""W, the side of a window over the image's longer one, is drawn between these."""

SMALL_SHARE = 0.75
"""How often a window is placed on a small object, where there is one; else it lies anywhere."""

MIN_VISIBLE = 0.5
"""The part of a box that a tile must show for it to be learned."""


def small_objects(objects: Objects, image_hw: tuple[int, int]) -> np.ndarray:
    """[K] int64, which of an image's objects are of scale class 1 and no crowd."""
    return np.flatnonzero((class_of_area(objects.areas, image_hw[0] * image_hw[1]) == 1) & ~objects.crowd)


def zoom_window(rng: np.random.Generator, image_hw: tuple[int, int], objects: Objects) -> Window:
    """A random window, square where the image allows, that holds a small object more often than not.

    Args:
        rng: of all that is random.
        image_hw: (height, width) of the image, in pixels.
        objects: of the image.
    """
    limit = np.array([image_hw[1], image_hw[0]])
    size = np.clip(round(rng.uniform(*WINDOW_SHARES) * limit.max()), 1, limit)
    room = limit - size
    low, high = np.zeros(2, np.int64), room
    small = small_objects(objects, image_hw)
    if len(small) and rng.random() < SMALL_SHARE:
        box = objects.boxes[rng.choice(small)].astype(np.float64)
        ends = np.clip([np.ceil(box[2:]) - size, np.floor(box[:2])], 0, room).astype(np.int64)
        # Of an object too long for the window, a part fills it.
        low, high = ends.min(axis=0), ends.max(axis=0)
    x0, y0 = rng.integers(low, high + 1).tolist()
    return Window(x0, y0, x0 + int(size[0]), y0 + int(size[1]))


def boxes_in_tile(objects: Objects, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """The boxes that are learned from a tile, with their category ids.

    Crowds, boxes of which less than `MIN_VISIBLE` is inside, and what is thinner than a tile pixel are left out.

    Args:
        objects: of the whole image.
        tile: what is looked at.

    Returns:
        [N, 4] float32 xyxy in tile pixels, cut at the tile's edges, and [N] int64.
    """
    boxes = boxes_to_tile(objects.boxes, tile).astype(np.float64)
    cut = np.clip(boxes, 0, [tile.width, tile.height] * 2)
    sides = cut[:, 2:] - cut[:, :2]
    seen, area = np.prod(sides, axis=1), np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    learned = ~objects.crowd & (seen >= MIN_VISIBLE * area) & (sides >= 1).all(axis=1)
    return cut[learned].astype(np.float32), objects.labels[learned]
