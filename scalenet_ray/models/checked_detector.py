"""Wrappers of a detector that validate its output and map its labels to the data set's category ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np

from scalenet_ray.core.answers import answered_wrongly, checked_answer, listed_answers, raised
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import OutOfMemoryError, TileError, UserError
from scalenet_ray.core.networks import DetectionsWithFeatures
from scalenet_ray.data.categories import map_categories
from scalenet_ray.models.detectors import Detector, ShowsFeatures, canvas_of, declaration
from scalenet_ray.models.devices import translate_oom

T = TypeVar("T")

_LOG = logging.getLogger(__name__)


class CheckedDetector:
    """Validates the attributes and outputs of a detector.

    Outputs may have any of the formats of `core.answers`. If the detector raises an exception on a batch, or returns
    outputs of the wrong number or type, it is called again for each tile, and each tile that fails alone gets a
    `TileError` with the cause.

    Attributes:
        name: name of the detector in messages.
        description: what the detector says about itself, e.g. what its file was taken for; "" for nothing.

    Raises:
        UserError: if an attribute of the detector is invalid; see `declaration`.
    """

    def __init__(self, detector: Detector, name: str) -> None:
        self._detector = detector
        self.name = name
        info = declaration(detector, name)
        self.input_side, self.iou_threshold, self.categories = info.input_side, info.iou_threshold, info.categories
        self.description = str(getattr(detector, "description", ""))
        self._class_ids = np.array(sorted(self.categories), np.int64)

    def in_words(self) -> list[str]:
        """Lines on what it is: sizes, threshold and number of classes, and what it says about itself."""
        height, width = self.canvas_hw((self.input_side, self.input_side))
        line = (
            f"detector {self.name}: input side {self.input_side}, canvas {height} x {width}, NMS at IoU "
            f"{self.iou_threshold:g}, {len(self.categories)} categories"
        )
        return [line, f"taken for {self.description}"] if self.description else [line]

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """Canvas size of a tile of (height, width), at least as large as the tile."""
        return canvas_of(self._detector, hw, self.name)

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """Detect on tiles, [h, w, 3] uint8 RGB each: detections in tile pixels, or a `TileError` per failed tile.

        Raises:
            OutOfMemoryError: if the batch does not fit the device's memory.
        """
        return self._tile_by_tile_if_it_fails(pixels, self.ask, lambda error: error)

    def ask(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """Detect on tiles, [h, w, 3] uint8 RGB each, and propagate the detector's exceptions.

        Raises:
            UserError: if the outputs have the wrong number or type.
            OutOfMemoryError: if the batch does not fit the device's memory.
        """
        answers = _answers(self._detector, pixels)
        return [self._checked(answer, tile) for answer, tile in zip(answers, pixels, strict=True)]

    def with_features(self, pixels: Sequence[np.ndarray]) -> list[DetectionsWithFeatures]:
        """As a call, with the feature maps of the same forward pass, () for failed tiles.

        Raises:
            UserError: if the detector does not provide feature maps.
        """
        self._feature_detector()
        return self._tile_by_tile_if_it_fails(
            pixels, self._ask_for_features, lambda error: DetectionsWithFeatures(error, ())
        )

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of the feature maps, finest first; raises as `with_features` does."""
        return self._feature_detector().feature_channels

    @property
    def feature_stride(self) -> int:
        """Cell side of the finest feature map in tile pixels; raises as `with_features` does."""
        return self._feature_detector().feature_stride

    def _ask_for_features(self, pixels: Sequence[np.ndarray]) -> list[DetectionsWithFeatures]:
        outputs = _answers(self._feature_detector().with_features, pixels)
        for output in outputs:
            if not isinstance(output, DetectionsWithFeatures):
                msg = "with_features must answer with a DetectionsWithFeatures for each tile, got "
                raise UserError(msg + type(output).__name__)
        return [
            output._replace(detections=self._checked(output.detections, tile))
            for output, tile in zip(outputs, pixels, strict=True)
        ]

    def _feature_detector(self) -> ShowsFeatures:
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
        """Run a batch, and each tile alone if the batch fails; out-of-memory errors are propagated."""
        try:
            return ask(pixels)
        except OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            if not isinstance(error, UserError):
                _LOG.warning("the detector raised an exception on %d tiles", len(pixels), exc_info=True)
            if len(pixels) == 1:
                return [failed(failure_of(error))]
        # Outside of the except block: the traceback's frames hold the batch's tensors on the device.
        return [answer for tile in pixels for answer in self._tile_by_tile_if_it_fails([tile], ask, failed)]


def _answers(detect: Callable[[list[np.ndarray]], Any], pixels: Sequence[np.ndarray]) -> list[Any]:
    """Answers of a detector's method, one for each tile; it is not called without tiles."""
    return translate_oom(lambda: listed_answers(detect(list(pixels)), len(pixels))) if len(pixels) else []


def failure_of(error: BaseException) -> TileError:
    """The failure of a tile on which a detector, or the check of its answer, raised an exception."""
    if isinstance(error, TileError):
        return error
    return answered_wrongly(error) if isinstance(error, UserError) else raised(error)


class MappedDetector(CheckedDetector):
    """Checked detector whose labels are mapped by name to category ids; classes without a category are dropped.

    If `categories` equal the detector's, labels are not mapped, since two of its classes may have the same name.

    Args:
        detector: the detector.
        categories: category id of the data set -> name.
        unused: ids of categories without an annotation, which the detector may lack.
        name: name of the detector in messages; None for the name of its class.

    Raises:
        UserError: if the detector lacks a category of the data set or is invalid.
    """

    def __init__(
        self,
        detector: Detector,
        categories: Mapping[int, str],
        unused: Collection[int] = (),
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(detector, name or type(detector).__name__)
        own = self.categories
        same = dict(categories) == own
        mapping = {class_id: class_id for class_id in own} if same else map_categories(own, categories, unused)
        self._classes = np.array(sorted(mapping), np.int64)
        self._category_ids = np.array([mapping[class_id] for class_id in sorted(mapping)], np.int64)

    def _checked(self, answer: Any, tile: np.ndarray) -> Detections | TileError:
        found = super()._checked(answer, tile)
        if isinstance(found, TileError):
            return found
        found = found[np.isin(found.labels, self._classes)]
        return replace(found, labels=self._category_ids[np.searchsorted(self._classes, found.labels)])
