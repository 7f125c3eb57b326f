"""AP and AR of COCO results, and precision-recall curves, from pycocotools' matching."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from scalenet_ray.data.coco import CocoDataset, parse_annotations, read_annotations
from scalenet_ray.data.storage import Address
from scalenet_ray.evaluation.matching import Matches, RankedDetections, match_results

if TYPE_CHECKING:
    from scalenet_ray.runs.documents import Curves

METRICS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
"""Names of the metrics, in the order of pycocotools' summary."""

AREAS = {"all": 0, "small": 1, "medium": 2, "large": 3}
"""Size of objects -> index of pycocotools' range of areas."""


def evaluate(
    annotations: CocoDataset | Mapping[str, Any] | Address,
    results: Iterable[Mapping[str, Any]],
    *,
    iou_type: Literal["bbox", "segm"] = "bbox",
    image_ids: Collection[int] | None = None,
) -> dict[str, float]:
    """Compute AP and AR of COCO results.

    Args:
        annotations: the ground truth, as a data set, a parsed instances file or its address.
        results: COCO results, see `to_results`; without any, the metrics are 0.
        iou_type: "bbox", or "segm" for masks, see `match_results`.
        image_ids: images to evaluate, all by default. All objects of an image without results are missed.

    Returns:
        `METRICS` in percent, 0 to 100; NaN for a size of which there are no objects.

    Raises:
        UserError: as `match_results` does.
    """
    if isinstance(annotations, CocoDataset):
        dataset = annotations
    else:
        is_parsed = isinstance(annotations, Mapping)
        dataset = parse_annotations(annotations) if is_parsed else read_annotations(cast(Address, annotations))
    in_order = sorted(results, key=lambda result: result["image_id"])
    return summarize(match_results(dataset, in_order, iou_type=iou_type, image_ids=image_ids))


def summarize(matches: Matches) -> dict[str, float]:
    """Compute AP and AR, `METRICS` in percent; NaN for a size of which there are no objects."""
    thresholds = np.round(matches.thresholds, 2).tolist()
    values = {name: [] for name in METRICS}
    for category in matches.categories:
        for size, area in AREAS.items():
            sampled = sampled_precision(matches.ranked(category, area), matches.recalls)
            if sampled is None:
                continue
            precision, recall = sampled
            is_all = size == "all"
            values["AP" if is_all else f"AP_{size}"].append(precision.mean())
            values["AR_100" if is_all else f"AR_{size}"].append(recall.mean())
            if is_all:
                for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
                    values[name].append(precision[thresholds.index(threshold)].mean())
        for count in matches.max_detections[:-1]:
            sampled = sampled_precision(matches.ranked(category, AREAS["all"], count), matches.recalls)
            if sampled is not None:
                values[f"AR_{count}"].append(sampled[1].mean())
    return {name: 100.0 * float(np.mean(each)) if each else math.nan for name, each in values.items()}


def sampled_precision(ranked: RankedDetections, recalls: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Compute the precision of one category at given recalls, as pycocotools does.

    Args:
        ranked: its detections and objects.
        recalls: [R].

    Returns:
        [thresholds, R] precision, the largest at each recall or above, and [thresholds] recall of all detections; None
        without objects.
    """
    images, objects = ranked.images, len(ranked.object_images)
    if not objects:
        return None
    true_positives = np.cumsum(ranked.true_positive, axis=1)
    false_positives = np.cumsum(ranked.false_positive, axis=1)
    recall = true_positives / objects
    precision = true_positives / (true_positives + false_positives + np.spacing(1.0))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    sampled = np.zeros((len(precision), len(recalls)))
    for row, reached, at_threshold in zip(sampled, recall, precision, strict=True):
        at = np.searchsorted(reached, recalls, side="left")
        reaches = at < len(images)
        row[reaches] = at_threshold[at[reaches]]
    return sampled, recall[:, -1] if len(images) else np.zeros(len(recall))


def precision_curves(matches: Matches) -> dict[str, Curves]:
    """Compute precision at the recalls 0, .01, ... 1, averaged over the classes that have objects of a size.

    Returns:
        Size (small, medium, large) -> curves; sizes without objects are missing.
    """
    curves: dict[str, Curves] = {}
    for size, area in AREAS.items():
        each = [sampled_precision(matches.ranked(category, area), matches.recalls) for category in matches.categories]
        known = [sampled[0] for sampled in each if sampled is not None]
        if known and size != "all":
            by_recall = 100.0 * np.mean(known, axis=0)
            curves[size] = {"iou50": by_recall[0].tolist(), "mean": by_recall.mean(axis=0).tolist()}
    return curves
