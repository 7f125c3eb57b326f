"""Merging of the detections of an image's tiles: mapping to the image, filters by size and window edge, NMS.

As in the paper's section 'Recursive-Scale Net', a box is dropped if its scale is not the scale that its window was cut
for, or if it touches a window edge inside the image. The others go through NMS or soft-NMS (Bodla et al., ICCV 2017),
or through NMS and a vote of the tiles that show an object, in the manner of Weighted Boxes Fusion (Solovyev et al.,
2021). The result does not depend on the order of the tiles.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from scalenet_ray.core.detections import SHOWN_SCORE, Detections, ImageResult, TileResult
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import Tile, boxes_to_image, boxes_to_tile, edges_inside_image, iou, iou_matrix
from scalenet_ray.core.masks import mask_of_window
from scalenet_ray.core.timing import timed

SuppressionMethod = Literal["consensus", "nms", "soft-nms-linear", "soft-nms-gaussian"]

_METHODS = get_args(SuppressionMethod)


@dataclass(frozen=True)
class Merging:
    """Settings of the merging of an image's tiles.

    Attributes:
        method: NMS with a vote of the tiles (`consensus`), NMS alone, or soft-NMS with linear or Gaussian decay.
        iou_threshold: IoU above which a box is suppressed (all but Gaussian soft-NMS).
        sigma: width of the Gaussian decay (Gaussian soft-NMS).
        score_threshold: minimum score in a tile, and after soft-NMS. A consensus may be lower.
        edge_margin: distance in tile pixels within which a box touches a window edge inside the image.
        match_size: drop boxes whose area is outside their tile's `valid_area`.
        max_detections: boxes of an image that are kept, those that score most; None for all.

    Raises:
        UserError: if a value is out of range.
    """

    method: SuppressionMethod = "consensus"
    iou_threshold: float = 0.65
    sigma: float = 0.5
    score_threshold: float = 0.01
    edge_margin: float = 4.0
    match_size: bool = True
    max_detections: int | None = None

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            msg = f"method must be one of {', '.join(_METHODS)}, got {self.method!r}"
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

_CLEAR_SIDE = 64.0
"""Side of an object, in tile pixels, from which a larger view of it shows no more."""

_CALIBRATION = 7 / 8
"""Exponent of the scores of a consensus: a mean is lower than the best score, and thresholds are made for the latter.

With it about as many objects of train photographs score 0.3 or more as with NMS.
"""


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
    whole = ~_touches_edge(found.boxes, tile, merging.edge_margin)
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
    keep = whole & (found.scores >= merging.score_threshold) & (carried.areas > 0)
    carried = carried[keep & _matches_size(carried.areas, tile, merging)]
    if carried.masks is None:
        return carried
    return replace(carried, masks=tuple(mask_of_window(counts, tile) for counts in carried.masks))


def _touches_edge(boxes_in_tile: np.ndarray, tile: Tile, margin: float) -> np.ndarray:
    """[N] bool: boxes [N, 4], in tile pixels, within a margin of a window edge inside the image, or beyond it."""
    touches = np.zeros(len(boxes_in_tile), bool)
    cut_left, cut_top, cut_right, cut_bottom = edges_inside_image(tile)
    for axis, cut_low, cut_high, size in ((0, cut_left, cut_right, tile.width), (1, cut_top, cut_bottom, tile.height)):
        if cut_low:
            touches |= boxes_in_tile[:, axis] < margin
        if cut_high:
            touches |= boxes_in_tile[:, axis + 2] > size - margin
    return touches


def _matches_size(areas: np.ndarray, tile: Tile, merging: Merging) -> np.ndarray:
    """[N] bool: areas, in square image pixels, that a tile may keep."""
    fits = (areas >= tile.valid_area.low) & (areas < tile.valid_area.high)
    return fits if merging.match_size else np.ones(len(areas), bool)


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
    return _suppressors(boxes, scores, labels, iou_threshold)[0]


def _suppressors(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou_threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """NMS as `nms`: [K] positions of the kept boxes, and [N] for each box the place among them that suppresses it.

    A kept box has its own place.
    """
    order = np.argsort(-scores, kind="stable")
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order))
    # [P, 2] ranks, the better box first, in the order of the better boxes.
    pairs = rank[_overlapping_pairs(boxes, labels, iou_threshold)]
    pairs.sort(axis=1)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    better, starts = np.unique(pairs[:, 0], return_index=True)
    suppressor = np.arange(len(order))
    bounds = pairwise([*starts.tolist(), len(pairs)])
    for best, (start, end) in zip(better.tolist(), bounds, strict=True):
        if suppressor[best] == best:
            others = pairs[start:end, 1]
            # Of several the best: those that are kept come in the order of their scores.
            suppressor[others[suppressor[others] == others]] = best
    kept = np.flatnonzero(suppressor == np.arange(len(order)))
    return order[kept], np.searchsorted(kept, suppressor)[rank]


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


def _canonical_order(detections: Detections) -> np.ndarray:
    """[N] positions by score, then by all other columns, so that ties do not depend on the order of the tiles."""
    columns = (*detections.windows.T, *detections.boxes.T, detections.depth, detections.labels, -detections.scores)
    return np.lexsort(columns)


def merge_detections(results: Sequence[TileResult], merging: Merging) -> Detections:
    """Merge the detections of tiles of one image.

    Args:
        results: the tiles' results, with detections in image pixels (`carry_to_image`), in any order.
        merging: method, thresholds and the most boxes.

    Returns:
        Detections in image pixels by descending score; the same for any order of `results`.
    """
    results = sorted(results, key=lambda result: result.path)
    found = Detections.concatenate([result.detections for result in results])
    order = _canonical_order(found)
    found = found[order]
    if merging.method in ("nms", "consensus"):
        kept, suppressor = _suppressors(found.boxes, found.scores, found.labels, merging.iou_threshold)
        if merging.method == "nms" or len(results) == 1:
            return found[kept[: merging.max_detections]]
        tile_of = np.repeat(np.arange(len(results)), [len(result.detections) for result in results])[order]
        merged = _consensus(found, kept, suppressor, tile_of, [result.view for result in results], merging)
    else:
        decayed = found.with_scores(soft_nms(found.boxes, found.scores, found.labels, merging))
        merged = decayed[decayed.scores >= merging.score_threshold]
    return merged[_canonical_order(merged)[: merging.max_detections]]


def _consensus(
    found: Detections,
    kept: np.ndarray,
    suppressor: np.ndarray,
    tile_of: np.ndarray,
    views: Sequence[Tile | None],
    merging: Merging,
) -> Detections:
    """The kept boxes with sides and scores that the tiles agree on.

    Each tile that shows an object whole has a vote: the best box that it found of it, or none. It weighs as much as the
    tile resolves the object: its side in tile pixels over `_CLEAR_SIDE`, at most 1. The sides are means of the boxes,
    by score and the square of that weight: those of a coarse view are far off. The score is the mean of the best one
    and of the votes' weighted mean, in which a tile that found nothing counts as 0, raised to `_CALIBRATION`. What only
    one tile shows stays as it is.

    Args:
        found: N detections in image pixels, by descending score.
        kept: [K] positions of those that NMS keeps.
        suppressor: [N] place in `kept` of the box that suppresses each.
        tile_of: [N] position in `views` of the tile that each was found in.
        views: tiles; None for one that the detector did not run on.
        merging: what a tile may show.
    """
    best = found[kept]
    sides, areas = np.sqrt(best.areas), best.areas
    # The first of a tile is its best.
    votes = np.unique(suppressor * len(views) + tile_of, return_index=True)[1]
    object_of, tile_of, scores = suppressor[votes], tile_of[votes], found.scores[votes].astype(np.float64)
    zooms = np.array([0.0 if view is None else max(view.zoom_xy) for view in views])
    clear = _vote_weights(sides[object_of] * zooms[tile_of])
    weights, voters = np.zeros(len(best)), np.zeros(len(best), np.int64)
    by_tile = np.argsort(tile_of, kind="stable")
    ends = np.searchsorted(tile_of[by_tile], np.arange(len(views) + 1))
    by_left = np.argsort(best.boxes[:, 0], kind="stable")
    lefts = best.boxes[by_left, 0]
    found_here = np.zeros(len(best), bool)
    for i, view in enumerate(views):
        shown = object_of[by_tile[ends[i] : ends[i + 1]]]
        if view is not None:
            # Only a box whose left side lies in the window can be whole in it.
            near = by_left[slice(*np.searchsorted(lefts, (view.window.x0, view.window.x1)))]
            whole = ~_touches_edge(boxes_to_tile(best.boxes[near], view), view, merging.edge_margin)
            found_here[shown] = True
            missed = near[whole & _matches_size(areas[near], view, merging) & ~found_here[near]]
            found_here[shown] = False
            shown = np.concatenate([shown, missed])
        weights[shown] += _vote_weights(sides[shown] * zooms[i])
        voters[shown] += 1

    def summed(values: np.ndarray) -> np.ndarray:
        """Sum over the votes for each object."""
        return np.bincount(object_of, values, len(best))

    means = summed(scores * clear) / weights
    pulls = np.maximum(scores, 1e-6) * clear**2
    boxes = np.stack([summed(pulls * column) for column in found.boxes[votes].T], axis=1) / summed(pulls)[:, None]
    corners = np.tile(best.windows[:, :2], 2), np.tile(best.windows[:, 2:], 2)
    boxes = np.clip(boxes, *corners).astype(np.float32)
    scores = np.where(voters > 1, ((best.scores + means) / 2) ** _CALIBRATION, best.scores).astype(np.float32)
    return Detections.of_columns(boxes, scores, best.labels, best.depth, best.windows, best.masks)


def _vote_weights(sides: np.ndarray) -> np.ndarray:
    """Weight of a tile's vote on objects whose sides have so many tile pixels: above 0, at most 1."""
    # np.clip is several times as slow for a few numbers.
    return np.minimum(np.maximum(sides / _CLEAR_SIDE, 1e-6), 1.0)


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
    return ImageResult(
        ordered[0].image_id,
        merge_detections([] if failure else ordered, merging),
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
    found = dataclasses.replace(whole.detections[whole.detections.scores >= SHOWN_SCORE], masks=None)
    merged = merge_detections([dataclasses.replace(whole, detections=found)], merging)
    return merged[merged.scores >= SHOWN_SCORE]
