"""Comparison of policies: bootstrap intervals of AP differences, Pareto front, objects found and lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import iou_matrix
from scalenet_ray.evaluation.ap import AREAS
from scalenet_ray.evaluation.matching import Matches, RankedDetections
from scalenet_ray.evaluation.tide import FOREGROUND_IOU, Explained, join

if TYPE_CHECKING:
    from scalenet_ray.runs.documents import Changes, ChangesRow, Differences, FoundCounts, Interval

RESAMPLES = 300
"""Bootstrap resamples of the images of an interval."""

_AT_ONCE = 2**22
"""Detections times resamples that are computed at once."""

_INTERVALS = {"AP": "all", "AP_small": "small", "AP_large": "large"}
"""Metric -> size of the objects."""


def resampled_ap(matches: Matches, area: int, draws: np.ndarray) -> np.ndarray:
    """Compute AP over resampled images, from one matching of the results.

    Args:
        matches: from `match_results`.
        area: index of the range of areas, see `AREAS`.
        draws: [D, images] resamples, each of which counts image i `draw[i]` times.

    Returns:
        [D] AP in percent; NaN if there are no objects.
    """
    total, known = np.zeros(len(draws)), np.zeros(len(draws))
    for category in matches.categories:
        ranked = matches.ranked(category, area)
        size = max(1, _AT_ONCE // max(1, len(ranked.images)))
        parts = [_category_ap(ranked, matches.recalls, draws[i : i + size]) for i in range(0, len(draws), size)]
        ap = np.concatenate(parts)
        has_objects = ~np.isnan(ap)
        total[has_objects] += ap[has_objects]
        known += has_objects
    return np.divide(100.0 * total, known, out=np.full(len(draws), np.nan), where=known > 0)


def _category_ap(ranked: RankedDetections, recalls: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mean of `sampled_precision` over thresholds and recalls for each of D resamples: [D], NaN without objects.

    Precision falls at false positives, so its largest value at a recall or above is that of a true positive.
    """
    objects = draws[:, ranked.object_images].sum(axis=1)
    weights = draws[:, ranked.images]
    total = np.zeros(len(draws))
    for is_true, is_false in zip(ranked.true_positive, ranked.false_positive, strict=True):
        at = np.flatnonzero(is_true)
        hits = np.cumsum(weights[:, at], axis=1)
        misses = np.cumsum(weights * is_false, axis=1)[:, at]
        precision = hits / (hits + misses + np.spacing(1.0))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = hits / np.maximum(objects, 1.0)[:, None]
        reached = np.searchsorted(recalls, recall, side="right")
        total += (np.diff(reached, axis=1, prepend=0) * precision).sum(axis=1)
    return np.where(objects > 0, total / (len(ranked.true_positive) * len(recalls)), np.nan)


def paired_intervals(
    matched: Mapping[str, Matches], baseline: str, *, resamples: int | None = None, seed: int = 0
) -> Differences:
    """Compute paired bootstrap intervals of the differences of AP between policies and a baseline.

    Args:
        matched: policy -> its results on the same images, from `match_results`.
        baseline: the policy that the others are compared with.
        resamples: number of resamples of the images, drawn with replacement; by default `RESAMPLES`.
        seed: random seed.

    Returns:
        Policy -> metric (AP, AP_small, AP_large) -> interval.

    Raises:
        UserError: if `baseline` is not one of the policies.
    """
    if baseline not in matched:
        msg = f"the policy to compare with must be one of {', '.join(matched)}, got {baseline!r}"
        raise UserError(msg)
    count = len(matched[baseline].image_ids)
    rng = np.random.default_rng(seed)
    indices = (rng.integers(count, size=count) for _ in range(resamples or RESAMPLES))
    draws = np.stack([np.ones(count), *(np.bincount(drawn, minlength=count) for drawn in indices)])
    samples = {
        name: {metric: resampled_ap(matches, AREAS[size], draws) for metric, size in _INTERVALS.items()}
        for name, matches in matched.items()
    }
    return {
        name: {metric: _interval(values - samples[baseline][metric]) for metric, values in by_metric.items()}
        for name, by_metric in samples.items()
        if name != baseline
    }


def _interval(differences: np.ndarray) -> Interval:
    """Return the interval of [1 + resamples] differences, the first of which is of the images themselves."""
    resampled = differences[1:][~np.isnan(differences[1:])]
    low, high = np.percentile(resampled, [2.5, 97.5]) if len(resampled) else (np.nan, np.nan)
    above = float(np.mean(differences[1:] > 0))
    return {"difference": float(differences[0]), "low": float(low), "high": float(high), "above": above}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the (cost, value) points on the Pareto front, by ascending cost; of equal points the first.

    Lower cost and higher value are better.
    """
    best = float("-inf")
    front = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[i][1] > best:
            best = points[i][1]
            front.append(i)
    return front


SMALL_AREA = 32.0**2
"""Upper bound of COCO's small objects, in mask pixels."""

SIDE_BOUNDS = (8, 12, 16, 24, 32, 48, 64, 96)
"""Bounds of the ranges of objects' sides, in image pixels; an object's side is the square root of its mask area."""


def are_new(found: Detections, before: Detections) -> np.ndarray:
    """Return [N] bool, the detections with an IoU of .5 with none of `before`, in the same frame, of their category.

    With the arguments swapped, it returns the lost ones of `before`.
    """
    overlap = iou_matrix(found.boxes, before.boxes) * (found.labels[:, None] == before.labels[None, :])
    return overlap.max(axis=1, initial=0.0) < FOREGROUND_IOU


def closer_look_in_words(found: FoundCounts) -> str:
    """Describe in words the numbers of boxes found beside those of the whole images' passes alone."""
    net = found["after"] - found["before"]
    further = net - found["new"] + found["lost"]
    parts = [f"{found['new']} new by looking closer", f"{found['lost']} lost"]
    parts += [f"{abs(further)} {'further' if further > 0 else 'fewer'} on what it found"] if further else []
    return (
        f"{abs(net)} {'fewer' if net < 0 else 'more'} than the pass over the whole image alone finds "
        f"({found['before']}): {', '.join(parts)}"
    )


def found_and_lost(before: Explained, after: Explained, shown_score: float) -> tuple[np.ndarray, np.ndarray]:
    """Return masks of the objects that only `after` finds, and that only `before` finds: [M] bool each.

    A found object has a detection of at least `shown_score`.
    """
    found_before, found_after = before.found_at >= shown_score, after.found_at >= shown_score
    return found_after & ~found_before, found_before & ~found_after


def gained_and_lost(
    before: Sequence[Explained], after: Sequence[Explained], categories: Mapping[int, str], shown_score: float
) -> Changes:
    """Count the objects gained and lost over all images, the same ones in the same order under two policies.

    Args:
        before: the images under the baseline policy.
        after: the images under another policy.
        categories: id -> name.
        shown_score: minimum score of the detection of a found object.

    Returns:
        Small objects by class, and all objects by range of sides; rows without objects are omitted.
    """
    baseline = join(before)
    gained, lost = found_and_lost(baseline, join(after), shown_score)
    found, labels, areas = baseline.found_at >= shown_score, baseline.object_labels, baseline.object_areas

    def counted(name: str, chosen: np.ndarray) -> ChangesRow:
        """Count over the chosen objects, [M] bool."""
        num_before, num_gained, num_lost = (int(mask[chosen].sum()) for mask in (found, gained, lost))
        return {
            "name": name,
            "objects": int(chosen.sum()),
            "before": num_before,
            "after": num_before + num_gained - num_lost,
            "gained": num_gained,
            "lost": num_lost,
        }

    small = areas < SMALL_AREA
    by_class = [counted(name, small & (labels == label)) for label, name in categories.items()]
    edges = (0.0, *SIDE_BOUNDS, math.inf)
    sides = np.sqrt(areas)
    by_side = [counted(_range_name(low, high), (sides >= low) & (sides < high)) for low, high in pairwise(edges)]
    return {
        "by_class": sorted((row for row in by_class if row["objects"]), key=lambda row: row["lost"] - row["gained"]),
        "by_side": [row for row in by_side if row["objects"]],
    }


def _range_name(low: float, high: float) -> str:
    if high == math.inf:
        return f"{low:g} or more"
    return f"under {high:g}" if low == 0 else f"{low:g} to {high:g}"
