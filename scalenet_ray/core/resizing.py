"""Whether a detector resizes its tiles by itself, which undoes the zoom: told from what it answers.

A picture is shown three times: small; the same pixels with more grey at the right and below; and enlarged twofold, the
grey with it. Whoever looks at the pixels answers the first two alike. Whoever resizes a tile to a size of its own
answers the first and the third alike: to it they are one picture. Boxes that lie where they do for the tile's sake,
and not the picture's (the whole tile, its upper half), grow with the grey, and tell nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.images import cut_tile
from scalenet_ray.core.merge import iou_matrix
from scalenet_ray.core.policy import fitted_hw
from scalenet_ray.core.window import Tile, Window

__all__ = ["Agreement", "agreement", "follows_size", "three_views"]

_GREY = 114
_CONTENT = 3 / 8
"""The picture's longer side as a share of the input side: there is grey beside it in every view."""
_LEAST_SIDE = 32
_SURE, _UNSURE = 0.3, 0.1
_MATCH_IOU = 0.5
_LEAST_EVIDENCE = 0.5
_LEAST_DISTANCE = 0.01
_TIMES_NEARER = 1.5
_OF_THE_TILE = 0.5
_FILLS = 0.98


class Agreement(NamedTuple):
    """How far two lists of detections agree, in scores; agreements of several pictures add up.

    Attributes:
        shared: the lower score of each pair of boxes, times their overlap.
        total: the higher score of each pair, and the scores of boxes without a partner.
    """

    shared: float = 0.0
    total: float = 0.0

    def plus(self, other: Agreement) -> Agreement:
        """Both together."""
        return Agreement(self.shared + other.shared, self.total + other.total)

    @property
    def distance(self) -> float:
        """0 for the same detections, 1 for others; 0 if there are none."""
        return 1.0 - self.shared / self.total if self.total else 0.0


def three_views(image: np.ndarray, input_side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """A picture small, the same with more grey, and enlarged twofold.

    Args:
        image: [h, w, 3] uint8 RGB.
        input_side: of the detector, in tile pixels.

    Returns:
        Squares of half the input side, the input side, and twice the first, uint8 RGB; None if that is too small to
        show anything.
    """
    half = input_side // 2
    if half < _LEAST_SIDE:
        return None
    image_hw = (image.shape[0], image.shape[1])
    hw = fitted_hw(*image_hw, int(input_side * _CONTENT))
    content = cut_tile(image, Tile(0, (), image_hw, Window(0, 0, image_hw[1], image_hw[0]), *hw))
    small, padded = _on_grey(content, half), _on_grey(content, input_side)
    return small, padded, cv2.resize(small, (2 * half, 2 * half), interpolation=cv2.INTER_LINEAR)


def _on_grey(content: np.ndarray, side: int) -> np.ndarray:
    square = np.full((side, side, 3), _GREY, np.uint8)
    square[: content.shape[0], : content.shape[1]] = content
    return square


def agreement(one: Detections, other: Detections, *, zoom: float = 1.0) -> Agreement:
    """How far two lists of detections agree on what at least one of them is sure of.

    Boxes of one label are paired, those first that overlap most.

    Args:
        one: N detections, boxes in tile pixels.
        other: M detections of the same picture, its tile `zoom` times larger.
        zoom: carries the second back.
    """
    one, other = one[one.scores >= _UNSURE], other[other.scores >= _UNSURE]
    overlaps = iou_matrix(one.boxes, other.boxes / np.float32(zoom))
    overlaps *= one.labels[:, None] == other.labels[None]
    alone = [one.scores.astype(np.float64), other.scores.astype(np.float64)]
    shared = total = 0.0
    rows, columns = np.nonzero(overlaps >= _MATCH_IOU)
    for nth in np.argsort(-overlaps[rows, columns], kind="stable"):
        i, j = rows[nth], columns[nth]
        pair = (alone[0][i], alone[1][j])
        if min(pair) > 0:  # Neither has a partner yet.
            alone[0][i] = alone[1][j] = 0.0
            if max(pair) >= _SURE:
                shared += min(pair) * overlaps[i, j]
                total += max(pair)
    return Agreement(float(shared), float(total + sum(scores[scores >= _SURE].sum() for scores in alone)))


def _within_the_tile(found: Detections) -> Detections:
    """Those that do not fill the tile that they were found in, as far as its boxes show how large it is."""
    if not len(found):
        return found
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    return found[np.flatnonzero((sides < _FILLS * found.boxes[:, 2:].max(axis=0)).any(axis=1))]


def follows_size(views: Sequence[tuple[Detections, Detections, Detections]]) -> tuple[Agreement, Agreement] | None:
    """The evidence that a detector resizes its tiles, or None if there is none.

    Measured on photographs (COCO train2017 to choose the rule, val2017 to test it): see docs/decisions.md.

    Args:
        views: what was found in the `three_views` of each picture.

    Returns:
        How far the padded view agrees with the small one, and the enlarged one.
    """
    padded = grown = enlarged = Agreement()
    for found in views:
        small, more_grey, larger = map(_within_the_tile, found)
        padded = padded.plus(agreement(small, more_grey))
        grown = grown.plus(agreement(small, more_grey, zoom=2.0))
        enlarged = enlarged.plus(agreement(small, larger, zoom=2.0))
    if min(padded.total, enlarged.total) < _LEAST_EVIDENCE or padded.distance < _LEAST_DISTANCE:
        return None
    if grown.distance < _OF_THE_TILE:
        return None
    return (padded, enlarged) if enlarged.distance * _TIMES_NEARER < padded.distance else None
