"""A detector with masks: one object in the middle of each tile."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco_mask

from scalenet_ray.core.detections import Detections
from scalenet_ray.sample.scenes import SAMPLE_CATEGORIES


class Middle:
    """Finds one thing of the sample's first category, with its mask, in each tile."""

    input_side = 64
    iou_threshold = 0.5

    def __init__(self) -> None:
        self.categories = dict(SAMPLE_CATEGORIES)

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """As it is."""
        return hw

    def __call__(self, pixels: list[np.ndarray]) -> list[Detections]:
        found = []
        for tile in pixels:
            height, width = tile.shape[:2]
            y0, y1, x0, x1 = height // 4, max(height // 2, 1), width // 4, max(width // 2, 1)
            mask = np.zeros((height, width), np.uint8, order="F")
            mask[y0:y1, x0:x1] = 1
            counts = coco_mask.encode(mask)["counts"]
            found.append(Detections([[x0, y0, x1, y1]], [0.9], [min(self.categories)], masks=(counts,)))
        return found
