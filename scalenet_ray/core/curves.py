"""Precision against recall by objects' size, as pycocotools counts them."""

from __future__ import annotations

import contextlib
import io

import numpy as np
from pycocotools.cocoeval import COCOeval

__all__ = ["precision_curves"]

_AREAS = {"small": 1, "medium": 2, "large": 3}
"""Size -> its place among pycocotools' area ranges."""


def precision_curves(evaluation: COCOeval) -> dict[str, dict[str, list[float]]]:
    """Precision at the recalls 0, .01, ... 1, the mean over the classes that have objects of a size.

    Args:
        evaluation: from `match_results`.

    Returns:
        size (small, medium, large) -> "iou50" at IoU .5 and "mean" over IoU .5 to .95 -> 101 percents. Sizes of
        which there is no object are left out.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    # [thresholds, recalls, classes, areas, counts of boxes]; -1 where a class has no object of the size.
    precision = np.asarray(evaluation.eval["precision"])[..., -1]
    curves = {}
    for size, at in _AREAS.items():
        known = precision[:, :, (precision[0, 0, :, at] > -1), at]
        if known.shape[2]:
            by_recall = 100.0 * known.mean(axis=2)
            curves[size] = {"iou50": by_recall[0].tolist(), "mean": by_recall.mean(axis=0).tolist()}
    return curves
