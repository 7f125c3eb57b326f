"""Losses and metrics of scale maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from scalenet_ray.core.scale import IGNORE, NUM_CLASSES


def focal_loss(
    logits: torch.Tensor, target: torch.Tensor, *, class_weights: torch.Tensor | None = None, gamma: float = 2.0
) -> torch.Tensor:
    """Mean over pixels of -w_c (1 - p_c)^gamma log p_c, c being the pixel's own class (section 'Experiments', COCO).

    Args:
        logits: [B, classes, h, w] float.
        target: [B, h, w] int in 0..classes - 1; pixels with IGNORE are excluded.
        class_weights: [classes] float, w_c; ones by default.
        gamma: focusing parameter; 0 is the cross-entropy.

    Returns:
        Scalar; 0 if every pixel is ignored.
    """
    target = target.long()
    counted = target != IGNORE
    index = torch.where(counted, target, 0)
    log_prob = functional.log_softmax(logits.float(), dim=1).gather(1, index[:, None])[:, 0]
    loss = -((1.0 - log_prob.exp()) ** gamma) * log_prob
    if class_weights is not None:
        loss = loss * class_weights.to(loss)[index]
    return (loss * counted).sum() / counted.sum().clamp(min=1)


def masked_mse(scale: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of scales [B, h, w] over the pixels of objects (section 'Scale Net'), a scalar.

    The target is 0 for background, which has no scale; the loss is 0 if there is no object.
    """
    on_object = target > 0
    squared = (scale.float() - target.float()) ** 2
    return (squared * on_object).sum() / on_object.sum().clamp(min=1)


_BINS = 1000


def count_pixels(logits: torch.Tensor, target: torch.Tensor) -> dict[str, np.ndarray]:
    """Pixel counts of a batch, from which `pixel_figures` computes the metrics.

    Args:
        logits: [B, 6, h, w].
        target: [B, h, w] class of each pixel; pixels with IGNORE are excluded.

    Returns:
        "hits" and "unions": [6], intersection and union of the predicted and the true class. "ranked": [6, 2, bins],
        histograms of each class's probability over the pixels of other classes and over its own.
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
    """Metrics in percent from the summed counts of `count_pixels`; NaN for a class that does not occur.

    Returns:
        "iou": [6] intersection over union of the most probable class; "pixel_ap": [6] average precision of each
        class's probability over pixels; "pixel_ap_small": that of class 1, which the zoom is decided by.
    """
    with np.errstate(invalid="ignore"):
        iou = 100.0 * counts["hits"] / counts["unions"]
    ap = [_average_precision(*counts["ranked"][c]) for c in range(NUM_CLASSES)]
    return {"iou": iou.tolist(), "pixel_ap": ap, "pixel_ap_small": ap[1]}


def _average_precision(wrong: np.ndarray, right: np.ndarray) -> float:
    """Average precision in percent from histograms of negative and positive pixels over probability."""
    if not right.sum():
        return math.nan
    found, taken = np.cumsum(right[::-1]), np.cumsum((right + wrong)[::-1])
    return float(100.0 * np.sum(right[::-1] * found / np.maximum(taken, 1)) / right.sum())
