"""Detectors of callbacks that return supervision's detections, and of SAHI's detection models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.masks import encode_mask
from scalenet_ray.models.padding import fixed_canvas, in_tile, padded

_IOU_THRESHOLD = 0.7
_COLUMNS = ("xyxy", "confidence", "class_id")


@dataclass
class WrappedDetector:
    """`Detector` that pads each tile to one square canvas and calls a function on it.

    A function that resizes its pictures to `input_side` leaves such a canvas as it is. Larger tiles are refused.
    Pictures are detected one by one.

    Attributes:
        detect: [input_side, input_side, 3] uint8 RGB -> boxes [N, 4] xyxy in canvas pixels, scores [N], labels [N], and
            masks [N, input_side, input_side] bool or None.
        input_side: side of the canvas, and longer side of a whole image's tile, in tile pixels.
        categories: class id -> name, or the names in a list.
        iou_threshold: IoU threshold of NMS between tiles.
        description: what is wrapped, in words.
    """

    detect: Callable[[np.ndarray], tuple[Any, Any, Any, Any]]
    input_side: int
    categories: Mapping[int, str] | Sequence[str]
    iou_threshold: float
    description: str

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """Canvas (height, width) of a tile of (height, width).

        Raises:
            UserError: if the tile is larger than the canvas.
        """
        return fixed_canvas(hw, (self.input_side, self.input_side), "or wrap it with a larger input_side")

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """Detect on tiles; see `Detector`."""
        return [self._one(tile) for tile in pixels]

    def _one(self, tile: np.ndarray) -> Detections:
        height, width = tile.shape[:2]
        (canvas,) = padded([tile], self.canvas_hw((height, width)))
        boxes, scores, labels, masks = self.detect(canvas)
        found = Detections(boxes, scores, labels)
        if masks is not None and len(found):
            cut = np.asarray(masks)[:, :height, :width].astype(bool)
            found = replace(found, masks=tuple(encode_mask(np.asfortranarray(mask, np.uint8)) for mask in cut))
        return in_tile(found, (height, width))


def wrap_supervision(
    callback: Callable[[np.ndarray], Any],
    categories: Mapping[int, str] | Sequence[str],
    *,
    input_side: int = 640,
    iou_threshold: float = _IOU_THRESHOLD,
    colours: Literal["RGB", "BGR"] = "BGR",
) -> WrappedDetector:
    """Make a detector of a callback as `supervision.InferenceSlicer` takes one.

    The callback sets its own score threshold, which should be 0.01: uncertain boxes guide the windows.

    Args:
        callback: picture [h, w, 3] uint8 -> `supervision.Detections`; called with squares of `input_side`.
        categories: class id -> name, or the names in a list, such as `model.names`.
        input_side: side in pixels at which the callback's network runs.
        iou_threshold: IoU threshold of NMS between tiles; its own NMS should have the same.
        colours: order of a picture's channels that the callback expects; "BGR" as `cv2.imread` gives it.

    Raises:
        UserError: if the callback can't be called, or `colours` is another order.
    """
    if not callable(callback):
        msg = f"wrap_supervision takes a callback(picture) -> Detections, got {type(callback).__name__}: give one"
        raise UserError(msg)
    if colours not in ("RGB", "BGR"):
        msg = f"colours must be RGB or BGR, got {colours!r}"
        raise UserError(msg)

    def detect(canvas: np.ndarray) -> tuple[Any, Any, Any, Any]:
        """Detect on one canvas."""
        found = callback(np.ascontiguousarray(canvas[..., ::-1]) if colours == "BGR" else canvas)
        parts = [getattr(found, name, None) for name in _COLUMNS]
        if parts[0] is not None and len(parts[0]) == 0:
            return parts[0], [], [], None
        if missing := [name for name, part in zip(_COLUMNS, parts, strict=True) if part is None]:
            msg = f"a callback must return supervision.Detections with {', '.join(_COLUMNS)}, got "
            raise UserError(f"{msg}{type(found).__name__} without {', '.join(missing)}: set them")
        boxes, scores, labels = parts
        return boxes, scores, labels, getattr(found, "mask", None)

    name = getattr(callback, "__name__", type(callback).__name__)
    return WrappedDetector(
        detect,
        input_side=input_side,
        categories=categories,
        iou_threshold=iou_threshold,
        description=f"callback {name} in supervision's form, one picture at a time",
    )


def wrap_sahi(model: Any, *, score_threshold: float = 0.01, iou_threshold: float = _IOU_THRESHOLD) -> WrappedDetector:
    """Make a detector of a SAHI detection model, as `AutoDetectionModel.from_pretrained` returns it.

    Args:
        model: the model, loaded with `image_size`, the side in pixels at which its network runs; its
            `confidence_threshold` is set.
        score_threshold: minimum score of a detection.
        iou_threshold: IoU threshold of NMS between tiles; its own NMS should have the same.

    Raises:
        UserError: if the model is none of SAHI's, or has no `image_size` or `category_mapping`.
    """
    if not all(hasattr(model, name) for name in ("perform_inference", "convert_original_predictions")):
        msg = f"wrap_sahi takes a model of AutoDetectionModel.from_pretrained, got {type(model).__name__}: make one"
        raise UserError(msg)
    if not model.image_size:
        msg = "wrap_sahi needs the side in pixels at which the model's network runs, got none: give image_size to it"
        raise UserError(msg)
    if not model.category_mapping:
        msg = "wrap_sahi needs the names of the model's classes, got none: give category_mapping to it"
        raise UserError(msg)
    model.confidence_threshold = score_threshold

    def detect(canvas: np.ndarray) -> tuple[Any, Any, Any, Any]:
        """Detect on one canvas."""
        model.perform_inference(canvas)
        model.convert_original_predictions(shift_amount=[0, 0], full_shape=list(canvas.shape[:2]))
        found = model.object_prediction_list
        boxes = np.array([each.bbox.to_xyxy() for each in found], np.float32).reshape(-1, 4)
        masks = None
        if found and all(each.mask is not None for each in found):
            masks = np.stack([each.mask.bool_mask for each in found])
        return boxes, [each.score.value for each in found], [each.category.id for each in found], masks

    return WrappedDetector(
        detect,
        input_side=model.image_size,
        categories={int(index): str(name) for index, name in model.category_mapping.items()},
        iou_threshold=iou_threshold,
        description=f"{type(model).__name__} of SAHI, one picture at a time",
    )
