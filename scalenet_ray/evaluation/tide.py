"""TIDE's error types of detections (Bolya et al., 2020): class, localisation, both, duplicate, background, missed.

Detections are matched to the objects of their class by descending score, as COCO does, at an IoU of .5. Each unmatched
detection is an error of one kind. The cost of a kind is the AP at that IoU gained by correcting errors of it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.geometry import intersection_areas, iou_matrix
from scalenet_ray.data.coco import Objects

if TYPE_CHECKING:
    from scalenet_ray.runs.documents import ErrorCost

FOREGROUND_IOU = 0.5
"""Minimum IoU of a match."""

_BACKGROUND_IOU = 0.1
_MAX_BOXES = 100
_RECALLS = np.linspace(0.0, 1.0, 101)

KINDS = ("correct", "class", "localisation", "both", "duplicate", "background", "ignored")
"""Kinds of detections; ignored ones lie in a crowd of their class."""

_CORRECT, _CLASS, _LOCALISATION, _BOTH, _DUPLICATE, _BACKGROUND, _IGNORED = range(len(KINDS))


@dataclass(frozen=True, eq=False)
class Explained:
    """Matching of one or more images: N detections, and M objects that are not crowds.

    Attributes:
        scores: [N] scores, in each image in descending order.
        labels: [N] category ids.
        kinds: [N] int8 indices into `KINDS`.
        targets: [N] int32 indices of the objects matched, or matched once the error is corrected; -1 for none.
        object_labels: [M] category ids.
        object_areas: [M] mask pixels.
        found_at: [M] float32 scores of the detections matched to the objects; -1 for none.
    """

    scores: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray
    targets: np.ndarray
    object_labels: np.ndarray
    object_areas: np.ndarray
    found_at: np.ndarray

    @property
    def missed(self) -> np.ndarray:
        """[M] bool, objects without a match that are not the target of a class or localisation error."""
        covered = np.isin(self.kinds, (_CLASS, _LOCALISATION))
        missed = self.found_at < 0
        missed[self.targets[covered]] = False
        return missed


_NOTHING = Explained(
    scores=np.zeros(0, np.float32),
    labels=np.zeros(0, np.int64),
    kinds=np.zeros(0, np.int8),
    targets=np.zeros(0, np.int32),
    object_labels=np.zeros(0, np.int64),
    object_areas=np.zeros(0),
    found_at=np.zeros(0, np.float32),
)
"""The matching of no image."""


def best_rows(detections: Detections) -> np.ndarray:
    """[N] rows of the best detections of an image by descending score, at most 100 as in COCO."""
    return np.argsort(-detections.scores, kind="stable")[:_MAX_BOXES]


def join(images: Sequence[Explained]) -> Explained:
    """The matchings of several images, or of none, as one."""
    images = [*images, _NOTHING]
    offsets = np.cumsum([0, *(len(image.object_labels) for image in images)])[:-1].tolist()
    targets = [
        np.where(image.targets < 0, -1, image.targets + offset) for image, offset in zip(images, offsets, strict=True)
    ]
    others = {
        field.name: np.concatenate([getattr(image, field.name) for image in images])
        for field in fields(Explained)
        if field.name != "targets"
    }
    return Explained(targets=np.concatenate(targets).astype(np.int32), **others)


def explain(detections: Detections, objects: Objects) -> Explained:
    """Match the `best_rows` of an image's detections, in image pixels, to its objects; classify the unmatched ones."""
    kept = best_rows(detections)
    boxes, labels = detections.boxes[kept], detections.labels[kept]
    counted = ~objects.crowd
    object_labels = objects.labels[counted]
    iou = iou_matrix(boxes, objects.boxes[counted])
    same = labels[:, None] == object_labels[None, :]
    same_class_iou, other_class_iou = np.where(same, iou, 0.0), np.where(same, 0.0, iou)
    kinds = np.full(len(kept), _BACKGROUND, np.int8)
    targets = np.full(len(kept), -1, np.int32)
    found_at = np.full(len(object_labels), -1.0, np.float32)
    in_crowd = _in_crowds(boxes, labels, objects)
    for i in range(len(kept) if len(object_labels) else 0):
        free = np.where(found_at < 0, same_class_iou[i], 0.0)
        if free.max() >= FOREGROUND_IOU:
            kinds[i], targets[i] = _CORRECT, free.argmax()
            found_at[targets[i]] = detections.scores[kept[i]]
        elif not in_crowd[i]:
            kinds[i], targets[i] = _kind_of_error(same_class_iou[i], other_class_iou[i])
    kinds[(kinds != _CORRECT) & in_crowd] = _IGNORED
    scores, areas = detections.scores[kept], objects.areas[counted]
    return Explained(scores, labels, kinds, targets, object_labels, areas, found_at)


def _kind_of_error(same_class_iou: np.ndarray, other_class_iou: np.ndarray) -> tuple[int, int]:
    """Return the kind of an unmatched detection, and its target or -1."""
    if same_class_iou.max() >= FOREGROUND_IOU:
        return _DUPLICATE, int(same_class_iou.argmax())
    if same_class_iou.max() >= _BACKGROUND_IOU:
        return _LOCALISATION, int(same_class_iou.argmax())
    if other_class_iou.max() >= FOREGROUND_IOU:
        return _CLASS, int(other_class_iou.argmax())
    if other_class_iou.max() >= _BACKGROUND_IOU:
        return _BOTH, int(other_class_iou.argmax())
    return _BACKGROUND, -1


def _in_crowds(boxes: np.ndarray, labels: np.ndarray, objects: Objects) -> np.ndarray:
    """Return [N] bool, boxes that lie by half in a crowd of their class, which COCO ignores."""
    crowds, crowd_labels = objects.boxes[objects.crowd], objects.labels[objects.crowd]
    if not len(crowds):
        return np.zeros(len(boxes), bool)
    inside = intersection_areas(boxes[:, None], crowds[None])
    areas = np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), np.spacing(1.0))
    return ((inside / areas[:, None] >= FOREGROUND_IOU) & (labels[:, None] == crowd_labels[None, :])).any(axis=1)


def error_breakdown(images: Sequence[Explained], shown_score: float) -> dict[str, ErrorCost]:
    """Count the errors of each kind over all images, and compute their cost in AP.

    Args:
        images: matchings of the images, from `explain`.
        shown_score: minimum score of the errors counted; costs are over all scores.

    Returns:
        Kind ("class" to "background", and "missed") -> count and cost. The count of "missed" is of the objects without
        a match of at least `shown_score`.
    """
    pool = _Pool(images)
    everything = np.ones(len(pool.scores), bool)
    correct = pool.kinds == _CORRECT
    plain = average_precision(images)
    shown = pool.scores >= shown_score
    breakdown: dict[str, ErrorCost] = {}
    for kind in (_CLASS, _LOCALISATION, _BOTH, _DUPLICATE, _BACKGROUND):
        errors = pool.kinds == kind
        corrected = pool.corrected(errors) if kind in (_CLASS, _LOCALISATION) else np.zeros_like(errors)
        labels = np.where(corrected, pool.target_labels, pool.labels)
        better = pool.ap(~errors | corrected, correct | corrected, labels, pool.objects)
        breakdown[KINDS[kind]] = {"count": int((errors & shown).sum()), "cost": better - plain}
    without_missed = pool.ap(everything, correct, pool.labels, pool.objects - pool.missed)
    not_shown = sum(int((image.found_at < shown_score).sum()) for image in images)
    breakdown["missed"] = {"count": not_shown, "cost": without_missed - plain}
    return breakdown


def average_precision(images: Sequence[Explained]) -> float:
    """Compute AP in percent at IoU .5 over all images, the mean over classes that have objects; 0 without objects."""
    pool = _Pool(images)
    return pool.ap(np.ones(len(pool.scores), bool), pool.kinds == _CORRECT, pool.labels, pool.objects)


class _Pool:
    """The detections of all images by descending score, and the objects of all images by class."""

    def __init__(self, images: Sequence[Explained]) -> None:
        whole = join(images)
        order = np.argsort(-whole.scores, kind="stable")
        self.scores, self.labels, self.kinds = whole.scores[order], whole.labels[order], whole.kinds[order]
        self.targets, object_labels = whole.targets[order], whole.object_labels
        self._found = whole.found_at >= 0
        self.classes = np.unique(object_labels)
        self.objects = (object_labels[:, None] == self.classes).sum(axis=0)
        self.missed = (object_labels[whole.missed][:, None] == self.classes).sum(axis=0)
        self.target_labels = self.labels.copy()
        has_target = self.targets >= 0
        self.target_labels[has_target] = object_labels[self.targets[has_target]]

    def corrected(self, errors: np.ndarray) -> np.ndarray:
        """Return [N] bool, the errors that are matches once corrected: the best for each object without a match."""
        rows = np.flatnonzero(errors)
        _, first = np.unique(self.targets[rows], return_index=True)
        best = rows[first]
        corrected = np.zeros_like(errors)
        corrected[best[~self._found[self.targets[best]]]] = True
        return corrected

    def ap(self, counted: np.ndarray, correct: np.ndarray, labels: np.ndarray, objects: np.ndarray) -> float:
        """Compute AP in percent at IoU .5, the mean over classes that have objects.

        Args:
            counted: [N] bool, detections that count.
            correct: [N] bool, true positives.
            labels: [N] category ids.
            objects: number of objects of each class.
        """
        counted = counted & (self.kinds != _IGNORED)
        values = []
        for label, total in zip(self.classes, objects, strict=True):
            if total <= 0:
                continue
            hits = correct[counted & (labels == label)]
            precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
            precision = np.maximum.accumulate(precision[::-1])[::-1]
            at = np.searchsorted(np.cumsum(hits) / total, _RECALLS, side="left")
            values.append(precision[at[at < len(hits)]].sum() / len(_RECALLS))
        return 100.0 * float(np.mean(values)) if values else 0.0
