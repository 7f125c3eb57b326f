"""A detector that speaks a data set's language: its labels are the data set's category ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from scalenet_ray.core.coco import map_categories
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.look import Glimpse
from scalenet_ray.models.detectors import Detector, ShowsFeatures
from scalenet_ray.models.memory import saying_what_does_not_fit

__all__ = ["MappedDetector"]


class MappedDetector:
    """Maps labels by name and drops the classes that the data set does not have.

    Args:
        detector: the frozen detector.
        categories: the data set's category ids and names.
        unused: ids of those that no annotation is of, which the detector need not know.

    Raises:
        ValueError: if the detector does not know a category of the data set.
    """

    def __init__(self, detector: Detector, categories: Mapping[int, str], unused: Collection[int] = ()) -> None:
        self._detector = detector
        self.input_side = detector.input_side
        mapping = map_categories(detector.categories, categories, unused)
        self._classes = np.array(sorted(mapping), np.int64)
        self._category_ids = np.array([mapping[class_id] for class_id in sorted(mapping)], np.int64)

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """The detector's own."""
        return self._detector.canvas_hw(hw)

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """[h, w, 3] uint8 RGB each -> detections in tile pixels, labels are category ids.

        Raises:
            OutOfMemoryError: if the batch does not fit the device's memory.
        """
        answers = saying_what_does_not_fit(lambda: self._detector(pixels))
        return [found if isinstance(found, TileError) else self._mapped(found) for found in answers]

    def with_features(self, pixels: Sequence[np.ndarray]) -> list[Glimpse]:
        """[h, w, 3] uint8 RGB each -> the detector's own feature maps with the mapped detections.

        Raises:
            ValueError: if the detector shows none.
            OutOfMemoryError: if the batch does not fit the device's memory.
        """
        showing = self._showing()
        return [
            one if isinstance(one.detections, TileError) else one._replace(detections=self._mapped(one.detections))
            for one in saying_what_does_not_fit(lambda: showing.with_features(pixels))
        ]

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """The detector's own; raises as `with_features` does."""
        return self._showing().feature_channels

    @property
    def feature_stride(self) -> int:
        """The detector's own; raises as `with_features` does."""
        return self._showing().feature_stride

    def _showing(self) -> ShowsFeatures:
        if not hasattr(self._detector, "with_features"):
            msg = (
                f"this Scale Net reads the detector's feature maps, which {type(self._detector).__name__} does not "
                "show: use yolox-onnx:PATH or tiny:PATH, or a Scale Net that looks at pixels"
            )
            raise UserError(msg)
        return cast(ShowsFeatures, self._detector)

    def _mapped(self, found: Detections) -> Detections:
        found = found[np.isin(found.labels, self._classes)]
        return replace(found, labels=self._category_ids[np.searchsorted(self._classes, found.labels)])
