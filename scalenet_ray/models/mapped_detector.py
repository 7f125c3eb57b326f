"""A detector that speaks a data set's language: its labels are the data set's category ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from scalenet_ray.core.coco import map_categories
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.look import Glimpse
from scalenet_ray.models.checked_detector import CheckedDetector
from scalenet_ray.models.detectors import Detector

__all__ = ["MappedDetector"]


class MappedDetector:
    """Maps labels by name and drops the classes that the data set does not have; every answer is checked.

    Categories that are the detector's own are not mapped: two of its classes may have one name.

    Args:
        detector: the frozen detector.
        categories: the data set's category ids and names.
        unused: ids of those that no annotation is of, which the detector need not know.
        name: what messages call the detector; None for the name of its class.

    Attributes:
        checked: the detector with its own labels.

    Raises:
        UserError: if the detector does not know a category of the data set, or is not what it must be.
    """

    def __init__(
        self,
        detector: Detector,
        categories: Mapping[int, str],
        unused: Collection[int] = (),
        *,
        name: str | None = None,
    ) -> None:
        self.checked = CheckedDetector(detector, name or type(detector).__name__)
        self.input_side = self.checked.input_side
        own = self.checked.categories
        same = dict(categories) == own
        mapping = {each: each for each in own} if same else map_categories(own, categories, unused)
        self._classes = np.array(sorted(mapping), np.int64)
        self._category_ids = np.array([mapping[class_id] for class_id in sorted(mapping)], np.int64)

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """The detector's own."""
        return self.checked.canvas_hw(hw)

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """[h, w, 3] uint8 RGB each -> detections in tile pixels, labels are category ids; raises as the checked one."""
        return [self._mapped(found) for found in self.checked(pixels)]

    def with_features(self, pixels: Sequence[np.ndarray]) -> list[Glimpse]:
        """[h, w, 3] uint8 RGB each -> the detector's own feature maps with the mapped detections; raises as it does."""
        return [one._replace(detections=self._mapped(one.detections)) for one in self.checked.with_features(pixels)]

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """The detector's own; raises as `with_features` does."""
        return self.checked.feature_channels

    @property
    def feature_stride(self) -> int:
        """The detector's own; raises as `with_features` does."""
        return self.checked.feature_stride

    def _mapped(self, found: Detections | TileError) -> Detections | TileError:
        if isinstance(found, TileError):
            return found
        found = found[np.isin(found.labels, self._classes)]
        return replace(found, labels=self._category_ids[np.searchsorted(self._classes, found.labels)])
