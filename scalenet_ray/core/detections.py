"""Detections, and what the work on a tile and on an image came to: boxes, cost, failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "SHOWN_SCORE",
    "Detections",
    "Failure",
    "ImageResult",
    "TileResult",
    "as_numbers",
]

SHOWN_SCORE = 0.3
"""Boxes that score less are not drawn, and do not count where objects are counted as found."""


_LARGEST = np.finfo(np.float32).max


_LARGEST_LABEL = 2.0**53
"""Past it floating-point numbers are not exact."""


def as_numbers(values: object, name: str) -> np.ndarray:
    """Numbers in any of the usual forms -> an array: nested lists, numpy's of any type, torch's on any device.

    Args:
        values: the numbers.
        name: what messages call them.

    Raises:
        ValueError: if they are none, or rows differ in length.
    """
    try:
        array = np.asarray(_without_torch(values))
        if array.dtype == object and all(isinstance(value, int | float) for value in array.flat):
            array = array.astype(np.float64)  # Whole numbers longer than any of numpy's.
    except Exception as error:  # Whatever an object raises that says it is an array.
        msg = f"{name} must be an array of numbers, got {type(values).__name__}: {error}"
        raise ValueError(msg) from error
    if array.dtype.kind in "biuf":
        return array
    if array.size == 0:
        return np.zeros(array.shape)
    msg = f"{name} must be an array of numbers, got {type(values).__name__} of {array.dtype}"
    raise ValueError(msg)


def _without_torch(values: Any) -> Any:
    if isinstance(values, np.ndarray):
        return values
    if isinstance(values, list | tuple):
        return [_without_torch(value) for value in values]
    if hasattr(values, "detach"):  # torch is not imported here. numpy has no bfloat16.
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()
    return values


def _as_boxes(values: object) -> np.ndarray:
    """[N, 4] float32; finite numbers that float32 does not reach are taken to its ends."""
    if isinstance(values, np.ndarray) and values.dtype == np.float32:
        boxes = values
    else:
        numbers = as_numbers(values, "boxes")
        with np.errstate(over="ignore"):
            boxes = numbers.astype(np.float32)
        too_large = np.isinf(boxes) & np.isfinite(numbers)
        if too_large.any():
            boxes[too_large] = np.copysign(_LARGEST, boxes[too_large])
    if boxes.shape[:1] == (0,) and boxes.ndim <= 2:
        return boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        msg = f"boxes must be [N, 4] xyxy, got shape {list(boxes.shape)}"
        raise ValueError(msg)
    return boxes


def _rows(values: object, dtype: type, name: str, count: int) -> np.ndarray:
    array = values if isinstance(values, np.ndarray) and values.dtype == dtype else as_numbers(values, name)
    if array.shape != (count,):
        if count == 0 and array.size == 0:
            return np.zeros(0, dtype)
        msg = f"{name} must be [{count}], one for each box, got shape {list(array.shape)}"
        raise ValueError(msg)
    if array.dtype.kind == "f" and dtype is np.int64:
        wrong = ~(np.abs(array, dtype=np.float64) <= _LARGEST_LABEL) | (array != np.round(array))
        if wrong.any():
            msg = f"{name} must be whole numbers, got {array[wrong][0]}"
            raise ValueError(msg)
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


@dataclass(frozen=True, eq=False)
class Detections:
    """Boxes with scores and labels, from numbers in any of the usual forms (see `as_numbers`).

    None at all is kept as [0, 4], and may be given as [].

    Attributes:
        boxes: [N, 4] float32 xyxy; which frame is said where they are made (a detector's are in
            tile pixels, everything else's in image pixels).
        scores: [N] float32 in [0, 1].
        labels: [N] int64, category ids (a detector's own class ids until they are mapped).
        depth: [N] int64, how often the image was zoomed into to find the box; zeros by default.
        windows: [N, 4] int64 xyxy, the window that each was found in, in image pixels; zeros until
            a detection is carried to its image.
        masks: N run-length encodings (pycocotools' compressed `counts`) of the object inside its
            tile, or after carrying back inside its window; None if the detector gives no masks.

    Raises:
        ValueError: if the shapes differ, a box, a score or a mask is missing, labels are not whole, or something is
            no number.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    depth: np.ndarray = field(default=None)  # type: ignore[assignment]
    windows: np.ndarray = field(default=None)  # type: ignore[assignment]
    masks: tuple[bytes, ...] | None = None

    def __post_init__(self) -> None:
        boxes = _as_boxes(self.boxes)
        count = len(boxes)
        set_ = object.__setattr__
        set_(self, "boxes", boxes)
        set_(self, "scores", _rows(self.scores, np.float32, "scores", count))
        set_(self, "labels", _rows(self.labels, np.int64, "labels", count))
        depth = np.zeros(count, np.int64) if self.depth is None else self.depth
        set_(self, "depth", _rows(depth, np.int64, "depth", count))
        windows = np.zeros((count, 4), np.int64) if self.windows is None else np.asarray(self.windows, np.int64)
        if windows.shape != (count, 4):
            msg = f"windows must be [{count}, 4] xyxy, got shape {list(windows.shape)}"
            raise ValueError(msg)
        set_(self, "windows", windows)
        if self.masks is not None:
            set_(self, "masks", tuple(self.masks))
            if len(self.masks) != count:
                msg = f"masks must be one for each of {count} boxes, got {len(self.masks)}"
                raise ValueError(msg)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: np.ndarray) -> Detections:
        """Those at `index`: [M] int positions or [N] bool."""
        index = np.asarray(index)
        if index.dtype == bool:
            index = np.flatnonzero(index)
        return Detections(
            self.boxes[index],
            self.scores[index],
            self.labels[index],
            self.depth[index],
            self.windows[index],
            None if self.masks is None else tuple(self.masks[i] for i in index),
        )

    def with_scores(self, scores: np.ndarray) -> Detections:
        """The same boxes with other scores, [N] float32."""
        return replace(self, scores=scores)

    @property
    def areas(self) -> np.ndarray:
        """[N] float64 box areas, in square pixels of the boxes' frame."""
        sides = np.maximum(self.boxes[:, 2:].astype(np.float64) - self.boxes[:, :2], 0.0)
        return sides[:, 0] * sides[:, 1]

    @classmethod
    def empty(cls, *, with_masks: bool = False) -> Detections:
        """No detections: boxes of shape [0, 4]."""
        return cls(np.zeros((0, 4)), np.zeros(0), np.zeros(0), masks=() if with_masks else None)

    @classmethod
    def concatenate(cls, parts: Sequence[Detections]) -> Detections:
        """All detections of `parts`, in order; masks are kept if every part that has boxes has them."""
        parts = [part for part in parts if len(part)]
        if not parts:
            return cls.empty()
        masks = None
        if all(part.masks is not None for part in parts):
            masks = tuple(mask for part in parts for mask in part.masks or ())
        return cls(
            np.concatenate([part.boxes for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.depth for part in parts]),
            np.concatenate([part.windows for part in parts]),
            masks,
        )


class Failure(NamedTuple):
    """Why an image was given up: the stage it happened in (read, look, detect) and the reason."""

    stage: str
    reason: str


@dataclass(frozen=True, eq=False)
class TileResult:
    """What one tile's work came to.

    Attributes:
        image_id: the image.
        path: the tile's path; (image_id, path) is its identity.
        credit: its share of the image; an image is complete when its tiles' credits sum to 1.
        detections: in image pixels, filtered by size and window edge; empty for a tile that was only looked at.
        failure: set if the tile could not be worked on.
        look_pixels: pixels that Scale Net computed for it.
        detector_pixels: pixels that the detector computed for it.
        detector_passes: the same over the pixels of a whole image at the detector's own side.
        guards: the limits that acted on it.
        image_hw: (height, width) of the image, in image pixels; None if it could not be opened.
    """

    image_id: int
    path: tuple[int, ...]
    credit: Fraction
    detections: Detections = field(default_factory=Detections.empty)
    failure: Failure | None = None
    look_pixels: int = 0
    detector_pixels: int = 0
    detector_passes: float = 0.0
    guards: tuple[str, ...] = ()
    image_hw: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class ImageResult:
    """What one image's work came to.

    Attributes:
        image_id: the image.
        detections: merged, in image pixels, the best first; empty if the image failed: a part of the
            answer must not pass for the whole.
        failure: the first failure in order of the tiles' paths, or None.
        tiles: tiles looked at or detected.
        look_pixels: pixels that Scale Net computed.
        detector_pixels: pixels that the detector computed.
        detector_passes: the same in passes over a whole image at the detector's own side.
        guards: how often each limit acted.
        image_hw: (height, width) of the image, in image pixels; None if it could not be opened.
        tiles_by_depth: how many of `tiles` there are of each depth.
        whole_pass: what the pass over the whole image finds alone, merged by itself as policy `whole` does, in image
            pixels and without masks: boxes that score `SHOWN_SCORE` or more. None where there was no such pass, or the
            image failed.
    """

    image_id: int
    detections: Detections
    failure: Failure | None
    tiles: int
    look_pixels: int
    detector_pixels: int
    detector_passes: float
    guards: dict[str, int]
    image_hw: tuple[int, int] | None
    tiles_by_depth: dict[int, int] = field(default_factory=dict)
    whole_pass: Detections | None = None
