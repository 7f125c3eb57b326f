"""Where one policy finds objects that another one misses, and where it loses some: by class and by size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.error_kinds import FOREGROUND_IOU, Explained
from scalenet_ray.core.merge import iou_matrix

__all__ = ["SIDE_BOUNDS", "SMALL_AREA", "are_new", "closer_look_in_words", "found_and_lost", "gained_and_lost"]

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


def closer_look_in_words(found: Mapping[str, int]) -> str:
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
) -> dict[str, list[dict[str, Any]]]:
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

    def row(name: str, chosen: np.ndarray) -> dict[str, Any]:
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
