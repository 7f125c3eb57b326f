"""Detections, and the results of tiles and images: boxes, cost, failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from scalenet_ray.core.geometry import Tile

SHOWN_SCORE = 0.3
"""Minimum score of the boxes that are drawn, and of those that count as found in counts of objects."""


_LARGEST = np.finfo(np.float32).max


_LARGEST_LABEL = 2.0**53
"""Past it floating-point numbers are not exact."""


def as_numbers(values: object, name: str) -> np.ndarray:
    """Convert numbers to a numpy array: nested lists, numpy arrays of any type, torch tensors on any device.

    Args:
        values: the numbers.
        name: their name in error messages.

    Raises:
        ValueError: if `values` is not numeric, or rows differ in length.
    """
    try:
        array = np.asarray(_without_torch(values))
        if array.dtype == object and all(isinstance(value, int | float) for value in array.flat):
            array = array.astype(np.float64)  # Integers beyond 64 bits.
    except Exception as error:  # The array protocol of a foreign object may raise anything.
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
    if hasattr(values, "detach"):  # A torch tensor, detected without importing torch. numpy has no bfloat16.
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()
    return values


def _as_boxes(values: object) -> np.ndarray:
    """Convert to [N, 4] float32; finite numbers beyond float32's range are clipped to it."""
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


def _as_column(values: object, dtype: type, name: str, count: int) -> np.ndarray:
    """Convert to [count] of `dtype`."""
    if isinstance(values, np.ndarray) and values.dtype == dtype and values.shape == (count,):
        return values
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
    """Boxes with scores and labels, converted from any form that `as_numbers` accepts.

    Without boxes, the shape of `boxes` is [0, 4]; [] is accepted.

    Attributes:
        boxes: [N, 4] float32 xyxy, a detector's in tile pixels, all others in image pixels.
        scores: [N] float32 in [0, 1].
        labels: [N] int64 category ids (the detector's own class ids until they are mapped).
        depth: [N] int64, depth of the tile that the box was found in; zeros by default.
        windows: [N, 4] int64 xyxy, window of that tile in image pixels; zeros until the boxes are mapped to the image.
        masks: N run-length encodings (pycocotools' compressed `counts`) on the tile, or on its window once mapped to
            the image; None if the detector returns no masks.

    Raises:
        ValueError: if shapes differ, a box, score or mask is missing, labels are not integers, or a value is not a
            number.
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
        set_(self, "scores", _as_column(self.scores, np.float32, "scores", count))
        set_(self, "labels", _as_column(self.labels, np.int64, "labels", count))
        depth = np.zeros(count, np.int64) if self.depth is None else self.depth
        set_(self, "depth", _as_column(depth, np.int64, "depth", count))
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
        """Select detections by [M] int positions or an [N] bool mask."""
        index = np.asarray(index)
        if index.dtype == bool:
            index = np.flatnonzero(index)
        return Detections.of_columns(
            self.boxes[index],
            self.scores[index],
            self.labels[index],
            self.depth[index],
            self.windows[index],
            None if self.masks is None else tuple(self.masks[i] for i in index),
        )

    @classmethod
    def of_columns(
        cls,
        boxes: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        depth: np.ndarray,
        windows: np.ndarray,
        masks: tuple[bytes, ...] | None,
    ) -> Detections:
        """Return detections of columns that are known to have the shapes and types of the attributes; no checks."""
        made = object.__new__(cls)
        made.__dict__.update(boxes=boxes, scores=scores, labels=labels, depth=depth, windows=windows, masks=masks)
        return made

    def with_scores(self, scores: np.ndarray) -> Detections:
        """Return a copy with other scores, [N] float32."""
        return replace(self, scores=scores)

    @property
    def areas(self) -> np.ndarray:
        """[N] float64 box areas, in square pixels of the boxes' frame."""
        sides = np.maximum(self.boxes[:, 2:].astype(np.float64) - self.boxes[:, :2], 0.0)
        return sides[:, 0] * sides[:, 1]

    @classmethod
    def empty(cls) -> Detections:
        """Return zero detections: boxes of shape [0, 4]."""
        none = np.zeros(0, np.int64)
        return cls.of_columns(
            np.zeros((0, 4), np.float32), np.zeros(0, np.float32), none, none, np.zeros((0, 4), np.int64), None
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Detections]) -> Detections:
        """Concatenate detections in order; masks are kept if every non-empty part has them."""
        parts = [part for part in parts if len(part)]
        if not parts:
            return cls.empty()
        masks = None
        if all(part.masks is not None for part in parts):
            masks = tuple(mask for part in parts for mask in part.masks or ())
        return cls.of_columns(
            np.concatenate([part.boxes for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.depth for part in parts]),
            np.concatenate([part.windows for part in parts]),
            masks,
        )


class Failure(NamedTuple):
    """The stage in which an image failed (read, look, detect), and the reason."""

    stage: str
    reason: str


@dataclass(frozen=True, eq=False)
class TileResult:
    """Result of one tile.

    Attributes:
        image_id: id of the image.
        path: the tile's path; (image_id, path) identifies the tile.
        credit: the tile's share of the image; an image is complete when the credits of its tiles sum to 1.
        detections: in image pixels, filtered by size and window edge; empty for a tile without a detector pass.
        failure: set if the tile failed.
        look_pixels: number of pixels computed by Scale Net.
        detector_pixels: number of pixels computed by the detector.
        detector_passes: `detector_pixels` over the pixels of a whole image at the detector's input side.
        view: the tile, if the detector ran on it; else None.
        guards: names of the limits hit.
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
    view: Tile | None = None
    guards: tuple[str, ...] = ()
    image_hw: tuple[int, int] | None = None

    @property
    def zoom(self) -> float:
        """The tile's zoom if the detector ran on it, in tile pixels for an image pixel; else 0."""
        return 0.0 if self.view is None else max(self.view.zoom_xy)


@dataclass(frozen=True, eq=False)
class ImageResult:
    """Result of one image.

    Attributes:
        image_id: id of the image.
        detections: merged, in image pixels, by descending score; empty if the image failed, so that partial results do
            not pass for complete ones.
        failure: the first failure in the order of the tiles' paths, or None.
        tiles: number of tiles that Scale Net or the detector processed.
        look_pixels: number of pixels computed by Scale Net.
        detector_pixels: number of pixels computed by the detector.
        detector_passes: `detector_pixels` over the pixels of a whole image at the detector's input side.
        zoom: largest zoom of its detected tiles, in tile pixels for an image pixel; 0 without any.
        guards: number of times each limit was hit.
        image_hw: (height, width) of the image, in image pixels; None if it could not be opened.
        tiles_by_depth: depth -> number of tiles.
        whole_pass: detections of the pass over the whole image alone, merged as by policy `whole`, in image pixels,
            without masks, scores of at least `SHOWN_SCORE`. None without such a pass, or if the image failed.
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
    zoom: float = 0.0
    tiles_by_depth: dict[int, int] = field(default_factory=dict)
    whole_pass: Detections | None = None
