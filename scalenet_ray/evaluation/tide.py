"""What is wrong with detections: class, localisation, both, duplicate, background, missed (Bolya et al., 2020, TIDE).

Each detection is matched to the objects of its class, the best score first, as COCO does at an IoU of .5; what is left
over is an error of one kind. What a kind costs is how much AP at that IoU would rise if it alone were mended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.geometry import intersection_areas, iou_matrix
from scalenet_ray.data.coco import Objects

if TYPE_CHECKING:
    from scalenet_ray.runs.documents import ErrorCost

__all__ = [
    "FOREGROUND_IOU",
    "KINDS",
    "Explained",
    "average_precision",
    "error_breakdown",
    "explain",
]

FOREGROUND_IOU = 0.5
"""From here on a box is an object's."""


_BACKGROUND_IOU = 0.1


_MAX_BOXES = 100


_RECALLS = np.linspace(0.0, 1.0, 101)


KINDS = ("correct", "class", "localisation", "both", "duplicate", "background", "ignored")
"""What a detection can be; ignored: it lies in a crowd of its class."""


_CORRECT, _CLASS, _LOCALISATION, _BOTH, _DUPLICATE, _BACKGROUND, _IGNORED = range(len(KINDS))


@dataclass(frozen=True, eq=False)
class Explained:
    """One image's detections and objects, each told what became of it. N detections, M objects that are no crowds.

    Attributes:
        kept: [N] int64, the rows of the detections that count (100 at most, as COCO does), the best first.
        scores: [N] of these.
        labels: [N] int64 category ids.
        kinds: [N] int64, positions in `KINDS`.
        targets: [N] int64, the object that it was matched to, or would be if the error were mended; -1: none.
        object_labels: [M] int64 category ids.
        object_areas: [M] mask pixels.
        found_at: [M] the score of the detection that was matched to each; -1 where none was.
    """

    kept: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray
    targets: np.ndarray
    object_labels: np.ndarray
    object_areas: np.ndarray
    found_at: np.ndarray

    @property
    def missed(self) -> np.ndarray:
        """[M] bool: matched to no detection, and no detection of another class or a bad box stands for it."""
        covered = np.isin(self.kinds, (_CLASS, _LOCALISATION))
        missed = self.found_at < 0
        missed[self.targets[covered]] = False
        return missed


def explain(detections: Detections, objects: Objects) -> Explained:
    """Match the detections of one image to its objects, and say what is wrong with the others.

    Args:
        detections: in image pixels.
        objects: of the same image.

    Returns:
        The detections by score. A duplicate is one where its object was matched before, whatever lies under it besides.
    """
    kept = np.argsort(-detections.scores, kind="stable")[:_MAX_BOXES]
    boxes, labels = detections.boxes[kept], detections.labels[kept]
    real = ~objects.crowd
    names = objects.labels[real]
    iou = iou_matrix(boxes, objects.boxes[real])
    same = labels[:, None] == names[None, :]
    right, wrong = np.where(same, iou, 0.0), np.where(same, 0.0, iou)
    kinds = np.full(len(kept), _BACKGROUND)
    targets = np.full(len(kept), -1)
    found_at = np.full(len(names), -1.0)
    in_crowd = _in_crowds(boxes, labels, objects)
    for i in range(len(kept) if len(names) else 0):
        free = np.where(found_at < 0, right[i], 0.0)
        if free.max() >= FOREGROUND_IOU:
            kinds[i], targets[i] = _CORRECT, free.argmax()
            found_at[targets[i]] = detections.scores[kept[i]]
        elif not in_crowd[i]:
            kinds[i], targets[i] = _kind_of_error(right[i], wrong[i])
    kinds[(kinds != _CORRECT) & in_crowd] = _IGNORED
    return Explained(kept, detections.scores[kept], labels, kinds, targets, names, objects.areas[real], found_at)


def _kind_of_error(right: np.ndarray, wrong: np.ndarray) -> tuple[int, int]:
    """The kind of an unmatched detection, and its object, from its IoU with objects of its and of other classes."""
    if right.max() >= FOREGROUND_IOU:
        return _DUPLICATE, int(right.argmax())
    if right.max() >= _BACKGROUND_IOU:
        return _LOCALISATION, int(right.argmax())
    if wrong.max() >= FOREGROUND_IOU:
        return _CLASS, int(wrong.argmax())
    if wrong.max() >= _BACKGROUND_IOU:
        return _BOTH, int(wrong.argmax())
    return _BACKGROUND, -1


def _in_crowds(boxes: np.ndarray, labels: np.ndarray, objects: Objects) -> np.ndarray:
    """[N] bool: half of the box lies in a crowd of its class; COCO counts it neither right nor wrong."""
    crowds, names = objects.boxes[objects.crowd], objects.labels[objects.crowd]
    if not len(crowds):
        return np.zeros(len(boxes), bool)
    inside = intersection_areas(boxes[:, None], crowds[None])
    areas = np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), np.spacing(1.0))
    return ((inside / areas[:, None] >= FOREGROUND_IOU) & (labels[:, None] == names[None, :])).any(axis=1)


def error_breakdown(images: Sequence[Explained], shown_score: float) -> dict[str, ErrorCost]:
    """What each kind of error costs, over all images.

    Args:
        images: each image, explained.
        shown_score: errors are counted from this score on; what they cost is over all scores.

    Returns:
        kind ("class" to "background", and "missed") -> "count", and "cost": percent of AP at IoU .5 that mending it
        alone would bring. Of "missed" objects, those count that are found below `shown_score` alone or not at all.
    """
    pool = _Pool(images)
    everything = np.ones(len(pool.scores), bool)
    correct = pool.kinds == _CORRECT
    plain = average_precision(images)
    shown = pool.scores >= shown_score
    breakdown: dict[str, ErrorCost] = {}
    for kind in (_CLASS, _LOCALISATION, _BOTH, _DUPLICATE, _BACKGROUND):
        at_fault = pool.kinds == kind
        mended = pool.mended(at_fault) if kind in (_CLASS, _LOCALISATION) else np.zeros_like(at_fault)
        labels = np.where(mended, pool.target_labels, pool.labels)
        better = pool.ap(~at_fault | mended, correct | mended, labels, pool.objects)
        breakdown[KINDS[kind]] = {"count": int((at_fault & shown).sum()), "cost": better - plain}
    without = pool.ap(everything, correct, pool.labels, pool.objects - pool.missed)
    unseen = sum(int((image.found_at < shown_score).sum()) for image in images)
    breakdown["missed"] = {"count": unseen, "cost": without - plain}
    return breakdown


def average_precision(images: Sequence[Explained]) -> float:
    """AP in percent at IoU .5 of all images, the mean over classes that have objects; 0 where there is none."""
    pool = _Pool(images)
    return pool.ap(np.ones(len(pool.scores), bool), pool.kinds == _CORRECT, pool.labels, pool.objects)


class _Pool:
    """The detections and objects of all images together, by score."""

    def __init__(self, images: Sequence[Explained]) -> None:
        sizes = [len(image.object_labels) for image in images]
        offsets = np.cumsum([0, *sizes])[:-1]
        order = np.argsort(-np.concatenate([image.scores for image in images] or [np.zeros(0)]), kind="stable")
        joined = {
            name: np.concatenate([getattr(image, name) for image in images] or [np.zeros(0, np.int64)])[order]
            for name in ("scores", "labels", "kinds")
        }
        self.scores, self.labels, self.kinds = joined["scores"], joined["labels"], joined["kinds"]
        shifted = [
            np.where(image.targets < 0, -1, image.targets + offset)
            for image, offset in zip(images, offsets, strict=True)
        ]
        self.targets = np.concatenate([*shifted, np.zeros(0, np.int64)]).astype(np.int64)[order]
        object_labels = np.concatenate([*(image.object_labels for image in images), np.zeros(0, np.int64)])
        missed = np.concatenate([*(image.missed for image in images), np.zeros(0, bool)])
        self._found = np.concatenate([*(image.found_at for image in images), np.zeros(0)]) >= 0
        self.classes = np.unique(object_labels)
        self.objects = (object_labels[:, None] == self.classes).sum(axis=0)
        self.missed = (object_labels[missed][:, None] == self.classes).sum(axis=0)
        self.target_labels = self.labels.copy()
        aimed = self.targets >= 0
        self.target_labels[aimed] = object_labels[self.targets[aimed]]

    def mended(self, at_fault: np.ndarray) -> np.ndarray:
        """[N] bool: the errors that would be right once mended: the best of each object that nothing else found."""
        rows = np.flatnonzero(at_fault)
        _, first = np.unique(self.targets[rows], return_index=True)
        best = rows[first]
        mended = np.zeros_like(at_fault)
        mended[best[~self._found[self.targets[best]]]] = True
        return mended

    def ap(self, counts: np.ndarray, right: np.ndarray, labels: np.ndarray, objects: np.ndarray) -> float:
        """AP in percent at IoU .5, the mean over classes that have objects, of the detections that count."""
        counts = counts & (self.kinds != _IGNORED)
        values = []
        for label, total in zip(self.classes, objects, strict=True):
            if total <= 0:
                continue
            hit = right[counts & (labels == label)]
            precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
            precision = np.maximum.accumulate(precision[::-1])[::-1]
            at = np.searchsorted(np.cumsum(hit) / total, _RECALLS, side="left")
            values.append(precision[at[at < len(hit)]].sum() / len(_RECALLS))
        return 100.0 * float(np.mean(values)) if values else 0.0
