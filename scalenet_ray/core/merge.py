"""Merging of the detections of an image's tiles: mapping to the image, filters by size and window edge, NMS.

As in the paper's section 'Recursive-Scale Net', a box is dropped if its scale is not the scale that its window was cut
for, or if it touches a window edge inside the image. The others go through NMS or soft-NMS (Bodla et al., ICCV 2017).
The result does not depend on the order of the tiles.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import numpy as np

from scalenet_ray.core.detections import SHOWN_SCORE, Detections, ImageResult, TileResult
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import Tile, boxes_to_image, edges_inside_image, iou, iou_matrix
from scalenet_ray.core.masks import mask_of_window
from scalenet_ray.core.timing import timed

__all__ = [
    "Merging",
    "carry_to_image",
    "merge_detections",
    "merge_image",
    "nms",
    "soft_nms",
]

SuppressionMethod = Literal["nms", "soft-nms-linear", "soft-nms-gaussian"]


@dataclass(frozen=True)
class Merging:
    """Settings of the merging of an image's tiles.

    Attributes:
        method: hard NMS, or soft-NMS with linear or Gaussian decay.
        iou_threshold: IoU above which a box is suppressed (NMS, linear soft-NMS).
        sigma: width of the Gaussian decay (Gaussian soft-NMS).
        score_threshold: minimum score, before and after suppression.
        edge_margin: distance in tile pixels within which a box touches a window edge inside the image.
        match_size: drop boxes whose area is outside their tile's `valid_area`.
        max_detections: boxes of an image that are kept, those that score most; None for all.

    Raises:
        UserError: if a value is out of range.
    """

    method: SuppressionMethod = "nms"
    iou_threshold: float = 0.65
    sigma: float = 0.5
    score_threshold: float = 0.01
    edge_margin: float = 4.0
    match_size: bool = True
    max_detections: int | None = None

    def __post_init__(self) -> None:
        if self.method not in ("nms", "soft-nms-linear", "soft-nms-gaussian"):
            msg = f"method must be nms, soft-nms-linear or soft-nms-gaussian, got {self.method!r}"
            raise UserError(msg)
        for name in ("iou_threshold", "score_threshold"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                msg = f"{name} must be between 0 and 1, got {getattr(self, name)}"
                raise UserError(msg)
        if not (self.sigma > 0 and self.edge_margin >= 0):
            msg = f"sigma must be above 0 and edge_margin not below, got {self.sigma} and {self.edge_margin}"
            raise UserError(msg)
        if self.max_detections is not None and self.max_detections < 1:
            msg = f"max_detections must be 1 or more, or None for all, got {self.max_detections}"
            raise UserError(msg)


_PAIRS_AT_ONCE = 2**12
"""Pairs of boxes per step of the IoU computation, about half a MB."""


def carry_to_image(found: Detections, tile: Tile, merging: Merging) -> Detections:
    """Map a tile's detections to its image and apply the filters of `merging`.

    Args:
        found: detections with boxes and masks in tile pixels.
        tile: the tile.
        merging: edge margin, size match and score threshold.

    Returns:
        Detections with boxes in image pixels, clipped to the window, and their depth and window; masks are run lengths
        on the window. Boxes outside the window are dropped.
    """
    window = tile.window
    touches = np.zeros(len(found), bool)
    margin, size = merging.edge_margin, (tile.width, tile.height)
    cut_left, cut_top, cut_right, cut_bottom = edges_inside_image(tile)
    for axis, cut_low, cut_high in ((0, cut_left, cut_right), (1, cut_top, cut_bottom)):
        if cut_low:
            touches |= found.boxes[:, axis] < margin
        if cut_high:
            touches |= found.boxes[:, axis + 2] > size[axis] - margin
    boxes = boxes_to_image(found.boxes, tile)
    boxes = np.clip(boxes, [window.x0, window.y0] * 2, [window.x1, window.y1] * 2)
    carried = Detections(
        boxes,
        found.scores,
        found.labels,
        np.full(len(found), tile.depth),
        np.tile(window.xyxy, (len(found), 1)),
        found.masks,
    )
    fits = (carried.areas >= tile.valid_area.low) & (carried.areas < tile.valid_area.high)
    keep = ~touches & (found.scores >= merging.score_threshold) & (carried.areas > 0)
    carried = carried[keep & fits if merging.match_size else keep]
    if carried.masks is None:
        return carried
    return replace(carried, masks=tuple(mask_of_window(counts, tile) for counts in carried.masks))


def nms(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Non-maximum suppression within each label.

    Args:
        boxes: [N, 4] xyxy.
        scores: [N].
        labels: [N].
        iou_threshold: IoU with a better box above which a box is dropped.

    Returns:
        [K] int64 positions of the kept boxes by descending score; equal scores keep their order.
    """
    order = np.argsort(-scores, kind="stable")
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order))
    # [P, 2] ranks, the better box first, in the order of the better boxes.
    pairs = rank[_overlapping_pairs(boxes, labels, iou_threshold)]
    pairs.sort(axis=1)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    better, starts = np.unique(pairs[:, 0], return_index=True)
    dropped = np.zeros(len(order), bool)
    bounds = pairwise([*starts.tolist(), len(pairs)])
    for best, (start, end) in zip(better.tolist(), bounds, strict=True):
        if not dropped[best]:
            dropped[pairs[start:end, 1]] = True
    return order[~dropped]


def _overlapping_pairs(boxes: np.ndarray, labels: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Return the pairs of boxes of one label whose IoU is above a threshold: [P, 2] positions.

    Sweeps along x: only boxes whose left side lies between the sides of another can overlap it. Works in steps of
    `_PAIRS_AT_ONCE`, so that memory depends on the number of overlapping pairs only.
    """
    group = np.unique(labels, return_inverse=True)[1].astype(np.int32)
    by_x = np.lexsort((boxes[:, 0], group)).astype(np.int32)
    corners, group = boxes[by_x].astype(np.float64), group[by_x]
    first = np.arange(1, len(corners) + 1, dtype=np.int32)
    counts = np.maximum(_ends_along_x(corners, group) - first, 0)
    ends = np.cumsum(counts)
    found = [np.empty((0, 2), np.int32)]
    row = 0
    while row < len(counts):
        done = int(ends[row] - counts[row])
        last = max(row + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")))
        left = np.repeat(np.arange(row, last), counts[row:last])
        right = np.arange(len(left)) - (ends[left] - counts[left] - done) + first[left]
        over = (iou(corners[left], corners[right]) > iou_threshold) & (group[left] == group[right])
        found.append(np.stack([left[over], right[over]], axis=1).astype(np.int32))
        row = last
    return by_x[np.concatenate(found)]


def _ends_along_x(corners: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return [N] int32: for each box, ordered by group and left side, the end of the boxes that may overlap it."""
    # Groups are placed side by side without contact, so that one search covers all.
    left = corners[:, 0].min(initial=0.0)
    shift = group * (corners[:, 2].max(initial=0.0) - left + 1.0)
    return np.searchsorted(corners[:, 0] + shift, corners[:, 2] + shift, side="right").astype(np.int32)


def soft_nms(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, merging: Merging) -> np.ndarray:
    """Soft-NMS within each label, with selection after each decay (Bodla et al., Figure 2).

    Args:
        boxes: [N, 4] xyxy.
        scores: [N].
        labels: [N].
        merging: method soft-nms-linear or soft-nms-gaussian, with its threshold or sigma.

    Returns:
        [N] float32 decayed scores, in the order of `boxes`.
    """
    decayed = scores.astype(np.float64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        while members.size > 1:
            best_at = int(decayed[members].argmax())
            best = members[best_at]
            members = np.delete(members, best_at)
            overlap = iou_matrix(boxes[best][None], boxes[members])[0]
            if merging.method == "soft-nms-linear":
                decay = np.where(overlap > merging.iou_threshold, 1.0 - overlap, 1.0)
            else:
                decay = np.exp(-(overlap**2) / merging.sigma)
            decayed[members] *= decay
            # In float32, as all other comparisons: 0.01 in float32 is slightly below 0.01 in float64.
            members = members[decayed[members].astype(np.float32) >= merging.score_threshold]
    return decayed.astype(np.float32)


def _in_canonical_order(detections: Detections) -> Detections:
    """Sort by score, then by all other columns, so that ties do not depend on the order of the tiles."""
    columns = (*detections.windows.T, *detections.boxes.T, detections.depth, detections.labels, -detections.scores)
    return detections[np.lexsort(columns)]


def merge_detections(parts: Sequence[Detections], merging: Merging) -> Detections:
    """Merge the detections of the tiles of one image.

    Args:
        parts: detections in image pixels (`carry_to_image`), in any order.
        merging: method, thresholds and the most boxes.

    Returns:
        Detections in image pixels by descending score; the same for any order of `parts`.
    """
    found = _in_canonical_order(Detections.concatenate(parts))
    if merging.method == "nms":
        kept = nms(found.boxes, found.scores, found.labels, merging.iou_threshold)
        return found[kept[: merging.max_detections]]
    decayed = found.with_scores(soft_nms(found.boxes, found.scores, found.labels, merging))
    ordered = _in_canonical_order(decayed[decayed.scores >= merging.score_threshold])
    return ordered[np.arange(len(ordered))[: merging.max_detections]]


@timed("merge")
def merge_image(results: Sequence[TileResult], merging: Merging) -> ImageResult:
    """Merge the results of all tiles of one image.

    An image with a tile that cannot be read counts as one that cannot be opened: no cost of its other tiles is kept, as
    an engine that cuts several tiles at once has not processed them.

    Args:
        results: all tiles of the image, in any order.
        merging: settings of the merging.

    Returns:
        The image's result; the same for any order of `results`.
    """
    ordered = sorted(results, key=lambda result: result.path)
    for result in ordered:
        if result.failure is not None and result.failure.stage == "read":
            ordered = [TileResult(result.image_id, (), Fraction(1), failure=result.failure)]
            break
    failure = next((result.failure for result in ordered if result.failure is not None), None)
    guards: Counter[str] = Counter()
    for result in ordered:
        guards.update(result.guards)
    depths = [len(result.path) for result in ordered if result.look_pixels or result.detector_pixels]
    parts = [] if failure else [result.detections for result in ordered]
    return ImageResult(
        ordered[0].image_id,
        merge_detections(parts, merging),
        failure,
        tiles=len(depths),
        look_pixels=sum(result.look_pixels for result in ordered),
        detector_pixels=sum(result.detector_pixels for result in ordered),
        detector_passes=sum(result.detector_passes for result in ordered),
        zoom=max((result.zoom for result in ordered), default=0.0),
        guards=dict(guards),
        image_hw=next((result.image_hw for result in ordered if result.image_hw), None),
        tiles_by_depth=dict(sorted(Counter(depths).items())),
        whole_pass=None if failure else _whole_pass(ordered, merging),
    )


def _whole_pass(results: Sequence[TileResult], merging: Merging) -> Detections | None:
    """Merge the shown boxes of the whole image's tile alone; return None if it had no detector pass."""
    whole = next((result for result in results if not result.path and result.detector_pixels), None)
    if whole is None:
        return None
    # Only better boxes suppress a box: boxes below the shown score have no influence.
    found = whole.detections[whole.detections.scores >= SHOWN_SCORE]
    merged = merge_detections([dataclasses.replace(found, masks=None)], merging)
    return merged[merged.scores >= SHOWN_SCORE]
