"""What Scale Net is trained to lower: a focal loss for classes, a masked squared error for scales."""

from __future__ import annotations

import torch
from torch.nn import functional

from scalenet_ray.core.scale import IGNORE

__all__ = ["focal_loss", "masked_mse", "poisson_loss"]


def focal_loss(
    logits: torch.Tensor, target: torch.Tensor, *, class_weights: torch.Tensor | None = None, gamma: float = 2.0
) -> torch.Tensor:
    """Mean over pixels of -w_c (1 - p_c)^gamma log p_c, c being the pixel's own class (section 'Experiments', COCO).

    Args:
        logits: [B, classes, h, w] float.
        target: [B, h, w] int in 0..classes - 1, or IGNORE, which neither adds nor counts.
        class_weights: [classes] float, w_c; ones by default.
        gamma: how much pixels that are right already are passed over; 0 is the cross-entropy.

    Returns:
        A scalar; 0 if every pixel is ignored.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if logits.ndim != 4 or target.shape != (logits.shape[0], *logits.shape[2:]):
        wanted = [logits.shape[0], *logits.shape[2:]]
        msg = f"target must be {wanted} for logits {list(logits.shape)}, got shape {list(target.shape)}"
        raise ValueError(msg)
    target = target.long()
    counted = target != IGNORE
    index = torch.where(counted, target, 0)
    log_prob = functional.log_softmax(logits.float(), dim=1).gather(1, index[:, None])[:, 0]
    loss = -((1.0 - log_prob.exp()) ** gamma) * log_prob
    if class_weights is not None:
        loss = loss * class_weights.to(loss)[index]
    return (loss * counted).sum() / counted.sum().clamp(min=1)


def masked_mse(scale: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the pixels of objects alone; background has no scale (section 'Scale Net').

    Args:
        scale: [B, h, w] float, predicted.
        target: [B, h, w] float, the object's scale at each of its pixels, 0 for background.

    Returns:
        A scalar; 0 if there is no object.

    Raises:
        ValueError: if the shapes differ.
    """
    if scale.shape != target.shape:
        msg = f"target must be {list(scale.shape)} as the prediction, got shape {list(target.shape)}"
        raise ValueError(msg)
    on_object = target > 0
    squared = (scale.float() - target.float()) ** 2
    return (squared * on_object).sum() / on_object.sum().clamp(min=1)


def poisson_loss(log_rate: torch.Tensor, target: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The deviance of a density, without its constant: rate - target log rate, summed over cells, the mean of images.

    Args:
        log_rate: [B, h, w] float, the logarithm of what is expected at each cell.
        target: [B, h, w] float, 0 or more, what was there.
        counted: [B, h, w] bool; other cells neither add nor count.

    Returns:
        A scalar.

    Raises:
        ValueError: if the shapes differ.
    """
    if not log_rate.shape == target.shape == counted.shape:
        msg = f"target and counted must be {list(log_rate.shape)}, got {list(target.shape)} and {list(counted.shape)}"
        raise ValueError(msg)
    log_rate = log_rate.float()
    return ((log_rate.exp() - target * log_rate) * counted).sum() / len(log_rate)
