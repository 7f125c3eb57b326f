"""A detector whose declaration and every answer are checked: what all other code calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np

from scalenet_ray.core.answers import answered_wrongly, checked_answer, listed_answers, raised
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import OutOfMemoryError, TileError, UserError
from scalenet_ray.core.inference import DetectionsWithFeatures
from scalenet_ray.data.coco import map_categories
from scalenet_ray.models.detectors import Detector, ShowsFeatures, canvas_of, declaration
from scalenet_ray.models.devices import translate_oom

__all__ = [
    "CheckedDetector",
    "MappedDetector",
]

T = TypeVar("T")


_LOG = logging.getLogger(__name__)


class CheckedDetector:
    """A frozen detector, held to what `Detector` promises.

    Answers are taken in any of the forms of `core.answers`. Where the detector raises an exception on a batch, it is
    called again tile by tile, and a tile on which it raises alone is answered by a `TileError` that quotes it; so is
    one that gets another number of answers, or one of another type.

    Args:
        detector: the detector.
        name: what messages call it.

    Attributes:
        name: the same.
        input_side: the longer side of a whole image's tile, in tile pixels.
        iou_threshold: of its own suppression.
        categories: class id -> name.

    Raises:
        UserError: if the declaration is not what it must be; see `declaration`.
    """

    def __init__(self, detector: Detector, name: str) -> None:
        self._detector = detector
        self.name = name
        self.input_side, self.iou_threshold, self.categories = declaration(detector, name)
        self._class_ids = np.array(sorted(self.categories), np.int64)

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """The detector's own, at least as large as the tile."""
        return canvas_of(self._detector, hw, self.name)

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """[h, w, 3] uint8 RGB each -> detections in tile pixels, or why there are none; [] without asking for [].

        Raises:
            OutOfMemoryError: if the batch does not fit the device's memory.
        """
        return self._tile_by_tile_if_it_fails(pixels, self.ask, lambda error: error)

    def ask(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """As a call, of [h, w, 3] uint8 RGB each, but what the detector raises is let through.

        Raises:
            UserError: if the answers are not as many as tiles, or of another type.
            OutOfMemoryError: if the batch does not fit the device's memory.
        """
        if not len(pixels):
            return []
        answers = translate_oom(lambda: listed_answers(self._detector(list(pixels)), len(pixels)))
        return [self._checked(answer, tile) for answer, tile in zip(answers, pixels, strict=True)]

    def with_features(self, pixels: Sequence[np.ndarray]) -> list[DetectionsWithFeatures]:
        """[h, w, 3] uint8 RGB each -> the detections with the feature maps of the same forward pass.

        Feature maps are () where the detector raised an exception or answered wrongly.

        Raises:
            UserError: if the detector shows none.
            OutOfMemoryError: if the batch does not fit the device's memory.
        """
        self._showing()
        return self._tile_by_tile_if_it_fails(
            pixels, self._ask_for_features, lambda error: DetectionsWithFeatures(error, ())
        )

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """The detector's own; raises as `with_features` does."""
        return self._showing().feature_channels

    @property
    def feature_stride(self) -> int:
        """The detector's own; raises as `with_features` does."""
        return self._showing().feature_stride

    def _ask_for_features(self, pixels: Sequence[np.ndarray]) -> list[DetectionsWithFeatures]:
        showing = self._showing()
        if not len(pixels):
            return []
        glimpses = translate_oom(lambda: listed_answers(showing.with_features(list(pixels)), len(pixels)))
        for glimpse in glimpses:
            if not isinstance(glimpse, DetectionsWithFeatures):
                msg = "with_features must answer with a DetectionsWithFeatures for each tile, got "
                raise UserError(msg + type(glimpse).__name__)
        return [
            glimpse._replace(detections=self._checked(glimpse.detections, tile))
            for glimpse, tile in zip(glimpses, pixels, strict=True)
        ]

    def _showing(self) -> ShowsFeatures:
        if not hasattr(self._detector, "with_features"):
            msg = (
                f"this Scale Net reads the detector's feature maps, which {type(self._detector).__name__} does not "
                "show: use yolox-onnx:PATH or tiny:PATH, or a Scale Net that looks at pixels"
            )
            raise UserError(msg)
        return cast(ShowsFeatures, self._detector)

    def _checked(self, answer: Any, tile: np.ndarray) -> Detections | TileError:
        return checked_answer(answer, (tile.shape[0], tile.shape[1]), self._class_ids)

    def _tile_by_tile_if_it_fails(
        self,
        pixels: Sequence[np.ndarray],
        ask: Callable[[Sequence[np.ndarray]], list[T]],
        failed: Callable[[TileError], T],
    ) -> list[T]:
        """The answers to a batch; if it fails as a whole, those to each tile alone.

        The size of the batch is let through: a smaller one may fit.
        """
        try:
            return ask(pixels)
        except OutOfMemoryError:
            raise
        except UserError as error:
            if len(pixels) == 1:
                return [failed(error if isinstance(error, TileError) else answered_wrongly(error))]
        except (Exception, SystemExit) as error:
            _LOG.warning("the detector raised an exception on %d tiles", len(pixels), exc_info=True)
            if len(pixels) == 1:
                return [failed(raised(error))]
        # Not while the error is handled: its frames hold what the batch has on the device.
        return [answer for tile in pixels for answer in self._tile_by_tile_if_it_fails([tile], ask, failed)]


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

    def with_features(self, pixels: Sequence[np.ndarray]) -> list[DetectionsWithFeatures]:
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
