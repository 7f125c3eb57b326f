"""How sure a difference between two policies is: paired bootstrap over images of the difference in AP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import COCOeval

from scalenet_ray.core.errors import UserError

__all__ = ["ResampledAP", "paired_intervals"]

_AREAS = {"AP": 0, "AP_small": 1, "AP_large": 3}
"""Figure -> its place among pycocotools' area ranges."""


@dataclass(frozen=True, eq=False)
class _Ranked:
    """The detections of one category, best first.

    Attributes:
        images: [N] places of their images.
        right: [thresholds, N] bool, matched to an object that counts.
        wrong: [thresholds, N] bool, matched to none.
        objects: [images] how many objects count in each.
    """

    images: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    objects: np.ndarray


class ResampledAP:
    """AP of results over images that are drawn again and again, matched once.

    Args:
        evaluation: from `match_results`.
        area: place of the area range in its parameters.
    """

    def __init__(self, evaluation: COCOeval, area: int) -> None:
        params = evaluation.params
        self._recalls = np.asarray(params.recThrs)
        count = len(params.imgIds)
        places = np.array(evaluation.evalImgs, dtype=object).reshape(-1, len(params.areaRng), count)[:, area]
        self._categories = [_ranked(row, params.maxDets[-1]) for row in places]

    def __call__(self, weights: np.ndarray) -> float:
        """AP in percent where image i counts `weights[i]` times; NaN if no object counts."""
        values = [self._ap(ranked, weights) for ranked in self._categories]
        known = [value for value in values if value is not None]
        return 100.0 * float(np.mean(known)) if known else float("nan")

    def _ap(self, ranked: _Ranked, weights: np.ndarray) -> float | None:
        objects = ranked.objects @ weights
        if objects == 0:
            return None
        if not len(ranked.images):
            return 0.0
        count = weights[ranked.images]
        right, wrong = np.cumsum(ranked.right * count, axis=1), np.cumsum(ranked.wrong * count, axis=1)
        recall = right / objects
        precision = right / np.maximum(right + wrong, np.spacing(1.0))
        # The best precision at this recall or beyond.
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        total = 0.0
        for one_recall, one_precision in zip(recall, precision, strict=True):
            at = np.searchsorted(one_recall, self._recalls, side="left")
            total += one_precision[at[at < len(one_precision)]].sum() / len(self._recalls)
        return total / len(recall)


def _ranked(matches: np.ndarray, most: int) -> _Ranked:
    scores, images, right, wrong = [], [], [], []
    objects = np.zeros(len(matches))
    for i, match in enumerate(matches):
        if match is None:
            continue
        objects[i] = np.count_nonzero(~np.asarray(match["gtIgnore"], bool))
        ignored = np.asarray(match["dtIgnore"], bool)[:, :most]
        matched = np.asarray(match["dtMatches"])[:, :most] > 0
        scores.append(np.asarray(match["dtScores"], np.float64)[:most])
        images.append(np.full(len(scores[-1]), i))
        right.append(matched & ~ignored)
        wrong.append(~matched & ~ignored)
    if not scores:
        empty = np.zeros((1, 0), bool)
        return _Ranked(np.zeros(0, np.int64), empty, empty, objects)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return _Ranked(
        np.concatenate(images)[order],
        np.concatenate(right, axis=1)[:, order],
        np.concatenate(wrong, axis=1)[:, order],
        objects,
    )


def paired_intervals(
    matched: Mapping[str, COCOeval], baseline: str, *, resamples: int = 300, seed: int = 0
) -> dict[str, dict[str, dict[str, float]]]:
    """How each policy differs from one of them, on the same images drawn with replacement.

    Args:
        matched: policy -> its results on the same images, from `match_results`.
        baseline: the policy that the others are compared with.
        resamples: how often images are drawn.
        seed: of the draws.

    Returns:
        policy -> figure (AP, AP_small, AP_large) -> "difference" on the images themselves, "low" and "high", between
        which the middle 95 % of the drawn differences lie, and "above": the share of them that is above 0.

    Raises:
        UserError: if `baseline` is none of the policies.
    """
    if baseline not in matched:
        msg = f"the policy to compare with must be one of {', '.join(matched)}, got {baseline!r}"
        raise UserError(msg)
    count = len(matched[baseline].params.imgIds)
    rng = np.random.default_rng(seed)
    draws = [np.ones(count), *(np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(resamples))]
    drawn = {
        name: {figure: np.array([*map(ResampledAP(evaluation, area), draws)]) for figure, area in _AREAS.items()}
        for name, evaluation in matched.items()
    }
    return {
        name: {figure: _interval(values - drawn[baseline][figure]) for figure, values in figures.items()}
        for name, figures in drawn.items()
        if name != baseline
    }


def _interval(differences: np.ndarray) -> dict[str, float]:
    """The first is of the images themselves, the others of the draws; NaN where no draw has an object that counts."""
    drawn = differences[1:][~np.isnan(differences[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    above = float(np.mean(differences[1:] > 0))
    return {"difference": float(differences[0]), "low": float(low), "high": float(high), "above": above}
