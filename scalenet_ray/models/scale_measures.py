"""How well maps of scale classes fit: sums over pixels that add up over batches and workers, and figures of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from scalenet_ray.core.scale import IGNORE, NUM_CLASSES

__all__ = ["count_pixels", "pixel_figures"]

_BINS = 1000


def count_pixels(logits: torch.Tensor, target: torch.Tensor) -> dict[str, np.ndarray]:
    """Sums over the pixels of a batch.

    Args:
        logits: [B, 6, h, w].
        target: [B, h, w] class of each pixel, or IGNORE, which does not count.

    Returns:
        "hits" and "unions": [6], of the most probable class with the target's; "ranked": [6, 2, bins], the pixels
        that are not, and that are, of each class, by its probability.
    """
    hits, unions = np.zeros(NUM_CLASSES), np.zeros(NUM_CLASSES)
    ranked = np.zeros((NUM_CLASSES, 2, _BINS))
    truth = target.cpu().numpy()
    counted = truth != IGNORE
    truth = truth[counted]
    prob = logits.float().softmax(dim=1).cpu().numpy().transpose(0, 2, 3, 1)[counted]
    classes = prob.argmax(axis=1)
    for c in range(NUM_CLASSES):
        hits[c] = np.sum((classes == c) & (truth == c))
        unions[c] = np.sum((classes == c) | (truth == c))
        bins = np.minimum((prob[:, c] * _BINS).astype(int), _BINS - 1)
        for is_of_class in (0, 1):
            ranked[c, is_of_class] = np.bincount(bins[(truth == c) == is_of_class], minlength=_BINS)
    return {"hits": hits, "unions": unions, "ranked": ranked}


def pixel_figures(counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The sums of `count_pixels` -> figures in percent, NaN for a class that does not occur.

    Returns:
        "iou": [6] intersection over union where the most probable class is taken; "pixel_ap": [6] average precision
        of each class's probability over pixels; "pixel_ap_small": that of class 1, which decides where to zoom.
    """
    with np.errstate(invalid="ignore"):
        iou = 100.0 * counts["hits"] / counts["unions"]
    ap = [_average_precision(*counts["ranked"][c]) for c in range(NUM_CLASSES)]
    return {"iou": iou.tolist(), "pixel_ap": ap, "pixel_ap_small": ap[1]}


def _average_precision(wrong: np.ndarray, right: np.ndarray) -> float:
    """Average precision in percent from counts of wrong and right pixels in rising bins of probability."""
    if not right.sum():
        return math.nan
    found, taken = np.cumsum(right[::-1]), np.cumsum((right + wrong)[::-1])
    return float(100.0 * np.sum(right[::-1] * found / np.maximum(taken, 1)) / right.sum())
