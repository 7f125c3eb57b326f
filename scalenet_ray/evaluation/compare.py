"""Comparison of policies: bootstrap intervals of AP differences, Pareto front, objects found and lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from pycocotools.cocoeval import COCOeval

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import iou_matrix
from scalenet_ray.evaluation.tide import FOREGROUND_IOU, Explained

if TYPE_CHECKING:
    from scalenet_ray.runs.documents import Changes, ChangesRow, Differences, FoundCounts, Interval

__all__ = [
    "SIDE_BOUNDS",
    "SMALL_AREA",
    "ResampledAP",
    "are_new",
    "closer_look_in_words",
    "found_and_lost",
    "gained_and_lost",
    "paired_intervals",
    "pareto_front",
]

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
) -> Differences:
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


def _interval(differences: np.ndarray) -> Interval:
    """The first is of the images themselves, the others of the draws; NaN where no draw has an object that counts."""
    drawn = differences[1:][~np.isnan(differences[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    above = float(np.mean(differences[1:] > 0))
    return {"difference": float(differences[0]), "low": float(low), "high": float(high), "above": above}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other one is at least as cheap and as good as, and better in one of the two.

    Args:
        points: (price, worth) each.

    Returns:
        Their positions, the cheapest first; of equal points the first one alone.
    """
    best = float("-inf")
    kept = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[i][1] > best:
            best = points[i][1]
            kept.append(i)
    return kept


SMALL_AREA = 32.0**2
"""COCO's bound of small objects, in mask pixels."""


SIDE_BOUNDS = (8, 12, 16, 24, 32, 48, 64, 96)
"""Where the ranges of objects' sides end, in image pixels; a side is the root of the mask's area."""


def are_new(found: Detections, before: Detections) -> np.ndarray:
    """Which detections overlap none of `before` of their own category by half (IoU).

    A box that moved stands for the same object, and so does a second box on it. With the arguments the other way round,
    it says which of `before` are lost.

    Args:
        found: N detections.
        before: M detections in the same frame.

    Returns:
        [N] bool.
    """
    overlap = iou_matrix(found.boxes, before.boxes) * (found.labels[:, None] == before.labels[None, :])
    return overlap.max(axis=1, initial=0.0) < FOREGROUND_IOU


def closer_look_in_words(found: FoundCounts) -> str:
    """What a closer look brought to what the passes over whole images alone find; its numbers add up.

    Args:
        found: counts of boxes, over the images that have such a pass: "after" in all, "before" those of the passes,
            "new" and "lost" (`are_new`).
    """
    net = found["after"] - found["before"]
    further = net - found["new"] + found["lost"]
    parts = [f"{found['new']} new by looking closer", f"{found['lost']} lost"]
    parts += [f"{abs(further)} {'further' if further > 0 else 'fewer'} on what it found"] if further else []
    return (
        f"{abs(net)} {'fewer' if net < 0 else 'more'} than the pass over the whole image alone finds "
        f"({found['before']}): {', '.join(parts)}"
    )


def found_and_lost(before: Explained, after: Explained, shown_score: float) -> tuple[np.ndarray, np.ndarray]:
    """Which objects of one image only `after` finds, and which only `before`: [M] bool each.

    Args:
        before: the image under the policy that is compared with.
        after: the same image under another policy.
        shown_score: an object counts as found from this score of its detection on.
    """
    one, other = before.found_at >= shown_score, after.found_at >= shown_score
    return other & ~one, one & ~other


def gained_and_lost(
    before: Sequence[Explained], after: Sequence[Explained], categories: Mapping[int, str], shown_score: float
) -> Changes:
    """Objects gained and lost over all images.

    Args:
        before: the images under the policy that is compared with.
        after: the same images, in the same order, under another policy.
        categories: id -> name.
        shown_score: an object counts as found from this score of its detection on.

    Returns:
        "by_class": small objects alone, a row for each class that has some; "by_side": a row for each range of sides
        that has objects. A row has "name", "objects", "before" and "after" (found), "gained" and "lost".
    """
    changes = [found_and_lost(*pair, shown_score) for pair in zip(before, after, strict=True)]
    gained = np.concatenate([*(gain for gain, _ in changes), np.zeros(0, bool)])
    lost = np.concatenate([*(loss for _, loss in changes), np.zeros(0, bool)])
    found = np.concatenate([*(image.found_at >= shown_score for image in before), np.zeros(0, bool)])
    labels = np.concatenate([*(image.object_labels for image in before), np.zeros(0, np.int64)])
    areas = np.concatenate([*(image.object_areas for image in before), np.zeros(0)])

    def row(name: str, chosen: np.ndarray) -> ChangesRow:
        """Counts over the chosen objects, [M] bool."""
        counts = [int(which[chosen].sum()) for which in (found, gained, lost)]
        return {
            "name": name,
            "objects": int(chosen.sum()),
            "before": counts[0],
            "after": counts[0] + counts[1] - counts[2],
            "gained": counts[1],
            "lost": counts[2],
        }

    small = areas < SMALL_AREA
    by_class = [row(name, small & (labels == label)) for label, name in categories.items()]
    edges = (0.0, *SIDE_BOUNDS, math.inf)
    sides = np.sqrt(areas)
    by_side = [row(_range_name(low, high), (sides >= low) & (sides < high)) for low, high in pairwise(edges)]
    return {
        "by_class": sorted((one for one in by_class if one["objects"]), key=lambda one: one["lost"] - one["gained"]),
        "by_side": [one for one in by_side if one["objects"]],
    }


def _range_name(low: float, high: float) -> str:
    if high == math.inf:
        return f"{low:g} or more"
    return f"under {high:g}" if low == 0 else f"{low:g} to {high:g}"
