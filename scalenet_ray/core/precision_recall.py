"""Precision against recall, by the size of objects."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from scalenet_ray.core.coco import CocoDataset
from scalenet_ray.core.evaluation import match_results

__all__ = ["precision_recall"]


def precision_recall(
    dataset: CocoDataset, results: Iterable[Mapping[str, Any]], *, image_ids: Collection[int] | None = None
) -> dict[str, dict[str, list[float]]]:
    """Curves of precision against recall, the means over categories, as COCO interpolates them.

    Args:
        dataset: the ground truth.
        results: COCO results, as `to_results` gives them.
        image_ids: the images that count; all by default.

    Returns:
        Area ("all", "small", "medium", "large") -> "recall", 101 values from 0 to 1; "precision_50" there, at an IoU of
        0.5; "precision", the mean over IoUs of 0.5 to 0.95. Areas in which there is nothing to find are left out.
    """
    evaluation = match_results(dataset, results, image_ids=image_ids)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    # [IoU thresholds, recalls, categories, areas, limits of detections]; -1 where there is nothing to find.
    precision = evaluation.eval["precision"][..., -1]
    recall = [float(value) for value in evaluation.params.recThrs]
    curves = {}
    for at, area in enumerate(evaluation.params.areaRngLbl):
        known = precision[:, :, precision[0, 0, :, at] >= 0, at]
        if known.shape[2]:
            by_threshold = known.mean(axis=2)
            curves[area] = {
                "recall": recall,
                "precision_50": by_threshold[0].tolist(),
                "precision": np.mean(by_threshold, axis=0).tolist(),
            }
    return curves
