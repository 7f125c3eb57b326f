"""The oracle: a Scale Net that reads the annotations, to show what the best possible look would bring."""

from __future__ import annotations

import numpy as np

from scalenet_ray.core.coco import objects_of, read_annotations
from scalenet_ray.core.look import OracleScale

__all__ = ["GroundTruth", "oracle_from"]


class GroundTruth:
    """The objects of each image, from an instances file.

    Args:
        annotations: address of the file; it is read once.
    """

    def __init__(self, annotations: str) -> None:
        self._dataset = read_annotations(annotations)

    def __call__(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [N, 4] xyxy and mask areas [N] of an image's objects, in image pixels; crowds left out."""
        objects = objects_of(self._dataset, image_id)
        return objects.boxes[~objects.crowd], objects.areas[~objects.crowd]


def oracle_from(annotations: str) -> OracleScale:
    """The oracle of an instances file."""
    return OracleScale(GroundTruth(annotations))
