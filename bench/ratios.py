"""Ratios of paired rounds: these machines are noisy, so that two rates compare only within one round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["ratio", "spread"]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ours over theirs, round by round: median, min and max."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min and max of what rounds measured."""
    return {"median": float(np.median(values)), "min": float(np.min(values)), "max": float(np.max(values))}
