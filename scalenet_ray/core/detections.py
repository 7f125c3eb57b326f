"""What a detector found: boxes with scores and labels, in one frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

__all__ = ["SHOWN_SCORE", "Detections"]

SHOWN_SCORE = 0.3
"""Boxes that score less are not drawn, and do not count where objects are counted as found."""


def _rows(values: object, dtype: type, name: str, count: int) -> np.ndarray:
    array = np.asarray(values, dtype=dtype)
    if array.shape != (count,):
        msg = f"{name} must be [{count}], one for each box, got shape {list(array.shape)}"
        raise ValueError(msg)
    return array


@dataclass(frozen=True, eq=False)
class Detections:
    """Boxes with scores and labels. None at all is [0, 4], never [0].

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
        ValueError: if the shapes differ, or a box, a score or a mask is missing.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    depth: np.ndarray = field(default=None)  # type: ignore[assignment]
    windows: np.ndarray = field(default=None)  # type: ignore[assignment]
    masks: tuple[bytes, ...] | None = None

    def __post_init__(self) -> None:
        boxes = np.asarray(self.boxes, dtype=np.float32)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            msg = f"boxes must be [N, 4] xyxy, got shape {list(boxes.shape)}"
            raise ValueError(msg)
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
