"""What keeps AP down, by kind of error: TIDE (Bolya, Foley, Hays, Hoffman, ECCV 2020)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from scalenet_ray.core.coco import CocoDataset
from scalenet_ray.core.evaluation import match_results
from scalenet_ray.core.merge import iou_matrix

__all__ = ["ERROR_KINDS", "error_breakdown"]

ERROR_KINDS = ("class", "localisation", "both", "duplicate", "background", "missed")
"""The kinds, in TIDE's order (section 2.2)."""

_FOREGROUND, _BACKGROUND = 0.5, 0.1


@dataclass
class _Category:
    """The detections of one category in all images, and its objects.

    Attributes:
        scores: of detections that count.
        right: whether each is matched to an object.
        kinds: of those that are not, in `ERROR_KINDS`; "" for the others.
        objects: how many count.
        missed: how many of them nothing found, and nothing but for its class or its place would have.
        gained: error kind -> scores of detections that mending it makes right ones of this category.
    """

    scores: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    objects: int = 0
    missed: int = 0
    gained: dict[str, list[float]] = field(default_factory=lambda: {"class": [], "localisation": []})


@dataclass(frozen=True, eq=False)
class _Image:
    """What lies in one image.

    Attributes:
        boxes: [D, 4] xyxy of detections, in image pixels.
        labels: [D] their categories.
        scores: [D].
        right: [D] bool, matched.
        object_boxes: [G, 4] xyxy of the objects that count.
        object_labels: [G].
        used: [G] bool, matched.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    right: np.ndarray
    object_boxes: np.ndarray
    object_labels: np.ndarray
    used: np.ndarray


def error_breakdown(
    dataset: CocoDataset, results: Iterable[Mapping[str, Any]], *, image_ids: Collection[int] | None = None
) -> dict[str, float]:
    """By how much AP50 would rise if all errors of one kind were mended, and no others (section 2.3).

    A detection that matches no object is of one kind: "localisation", it overlaps an object of its category by an IoU
    of 0.1 to 0.5; "class", one of another category by 0.5 or more; "duplicate", one that a surer detection has found;
    "background", none by more than 0.1; "both", any other. An object is "missed" that is neither found nor would be if
    an error of class or place were mended.

    Args:
        dataset: the ground truth.
        results: COCO results, as `to_results` gives them.
        image_ids: the images that count; all by default.

    Returns:
        `ERROR_KINDS` -> percent of AP50. What they sum to is not what is missing to 100.
    """
    evaluation = match_results(dataset, results, image_ids=image_ids)
    categories = {category_id: _Category() for category_id in evaluation.params.catIds}
    for image in _images(evaluation):
        _take_in(image, categories)
    base = _mean_ap(categories, None)
    return {kind: _mean_ap(categories, kind) - base for kind in ERROR_KINDS}


def _images(evaluation: COCOeval) -> list[_Image]:
    params = evaluation.params
    places = np.array(evaluation.evalImgs, dtype=object).reshape(-1, len(params.areaRng), len(params.imgIds))[:, 0]
    images = []
    for column in range(places.shape[1]):
        found: list[tuple[Any, int, float, bool]] = []
        objects: list[tuple[Any, int, bool]] = []
        for match in (match for match in places[:, column] if match is not None):
            category_id = match["category_id"]
            for i, number in enumerate(match["dtIds"]):
                if not match["dtIgnore"][0, i]:
                    box = evaluation.cocoDt.anns[number]["bbox"]
                    found.append((box, category_id, float(match["dtScores"][i]), bool(match["dtMatches"][0, i])))
            for i, number in enumerate(match["gtIds"]):
                if not match["gtIgnore"][i]:
                    box = evaluation.cocoGt.anns[number]["bbox"]
                    objects.append((box, category_id, bool(match["gtMatches"][0, i])))
        images.append(
            _Image(
                _xyxy([row[0] for row in found]),
                np.array([row[1] for row in found], np.int64),
                np.array([row[2] for row in found], np.float64),
                np.array([row[3] for row in found], bool),
                _xyxy([row[0] for row in objects]),
                np.array([row[1] for row in objects], np.int64),
                np.array([row[2] for row in objects], bool),
            )
        )
    return images


def _xyxy(boxes_xywh: list[Any]) -> np.ndarray:
    boxes = np.array(boxes_xywh, np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _take_in(image: _Image, categories: Mapping[int, _Category]) -> None:
    """Add an image's detections and objects to their categories."""
    overlap = iou_matrix(image.boxes, image.object_boxes)
    # Object -> (score, kind) of the surest detection that mending would let find it.
    usable: dict[int, tuple[float, str]] = {}
    for i, score in enumerate(image.scores.tolist()):
        category = categories[int(image.labels[i])]
        kind, target = "", None
        if not image.right[i]:
            kind, target = _kind(overlap[i], image.object_labels == image.labels[i], image.used)
        category.scores.append(score)
        category.right.append(bool(image.right[i]))
        category.kinds.append(kind)
        if target is not None and not image.used[target] and score > usable.get(target, (-1.0, ""))[0]:
            usable[target] = (score, kind)
    for at, label in enumerate(image.object_labels.tolist()):
        category = categories[label]
        category.objects += 1
        category.missed += not image.used[at] and at not in usable
        if at in usable:
            score, kind = usable[at]
            category.gained[kind].append(score)


def _kind(overlap: np.ndarray, same: np.ndarray, used: np.ndarray) -> tuple[str, int | None]:
    """The kind of an unmatched detection, and the object that it would find if that were mended.

    Args:
        overlap: [G] IoU with each object.
        same: [G] bool, objects of its category.
        used: [G] bool, objects that a detection matches.
    """
    if not overlap.size:
        return "background", None
    own, other = np.where(same, overlap, 0.0), np.where(same, 0.0, overlap)
    if _BACKGROUND <= own.max() < _FOREGROUND:
        return "localisation", int(own.argmax())
    if other.max() >= _FOREGROUND:
        return "class", int(other.argmax())
    if np.where(used, own, 0.0).max() >= _FOREGROUND:
        return "duplicate", None
    return ("background" if overlap.max() <= _BACKGROUND else "both"), None


def _mean_ap(categories: Mapping[int, _Category], mended: str | None) -> float:
    """AP50 in percent with one kind of error mended, the mean over categories that have objects."""
    values = [_ap(category, mended) for category in categories.values() if category.objects]
    return 100.0 * float(np.mean(values)) if values else 0.0


def _ap(category: _Category, mended: str | None) -> float:
    objects = category.objects - (category.missed if mended == "missed" else 0)
    if not objects:
        return 1.0
    # Mended detections are where they belong, or gone.
    kept = [i for i, kind in enumerate(category.kinds) if not kind or kind != mended]
    gained = category.gained.get(mended or "", [])
    scores = np.array([category.scores[i] for i in kept] + gained)
    right = np.array([category.right[i] for i in kept] + [True] * len(gained), bool)
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(right[order])
    precision = hits / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(hits / objects, np.linspace(0, 1, 101), side="left")
    return float(precision[at[at < len(precision)]].sum() / 101)
