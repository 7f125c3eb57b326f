"""A detector tried on a few real tiles before a run begins, so that what is wrong with it is said then."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from scalenet_ray.core.answers import ANSWERED_WRONGLY, MOST_FAILED, answered_wrongly, fails_on_all, raised
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import OutOfMemoryError, TileError, UserError
from scalenet_ray.core.geometry import Tile, Window, cut_tile, fit_longer_side, iou_matrix
from scalenet_ray.models.checked_detector import CheckedDetector

__all__ = [
    "Agreement",
    "agreement",
    "follows_size",
    "three_views",
    "try_detector",
]

_MOST_COMPARED = 3


_ENOUGH_EVIDENCE = 2.0


_BATCH_DISTANCE = 0.05


_GREY = 114


_LOG = logging.getLogger(__name__)


def try_detector(detector: CheckedDetector, images: Iterable[np.ndarray]) -> None:
    """Call a detector on whole images, until it answers one, and compare its answers to views of the first three.

    A batch that does not fit this machine's memory is no fault: the run may compute elsewhere.

    Args:
        detector: the detector.
        images: [h, w, 3] uint8 RGB each, opened as they are asked for.

    Raises:
        UserError: if it fails on all images (at most `MOST_FAILED`), answers a blank tile wrongly, or resizes its
            tiles.
    """
    try:
        answered = _first_answered(detector, images)
        if answered:
            _check_batches(detector, answered[0])
            if _is_steady(detector, answered[0]):
                _check_size(detector, answered)
    except OutOfMemoryError as error:
        _LOG.warning("the detector could not be tried before the run: a tile does not fit the memory (%s)", error)


def _first_answered(detector: CheckedDetector, images: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Up to three images, the first of which it answers."""
    failures: list[TileError] = []
    answered: list[np.ndarray] = []
    for image in images:
        if not answered:
            answer = _answer(detector, _whole(image, detector.input_side))
            if isinstance(answer, TileError):
                failures.append(answer)
                if len(failures) == MOST_FAILED:
                    break
                continue
        answered.append(image)
        if len(answered) == _MOST_COMPARED:
            break
    if failures and not answered:
        raise fails_on_all(f"detector {detector.name!r}: {failures[0].reason}", len(failures))
    return answered


def _whole(image: np.ndarray, side: int) -> np.ndarray:
    hw = (image.shape[0], image.shape[1])
    return cut_tile(image, Tile(0, (), hw, Window(0, 0, hw[1], hw[0]), *fit_longer_side(*hw, side)))


def _answer(detector: CheckedDetector, tile: np.ndarray) -> Detections | TileError:
    return _answers(detector, [tile])[0]


def _answers(detector: CheckedDetector, tiles: list[np.ndarray]) -> list[Detections | TileError]:
    """Those to a batch; what is wrong with all of it, for each tile, and without a word in the log."""
    try:
        return detector.ask(tiles)
    except OutOfMemoryError:
        raise
    except UserError as error:
        return [error if isinstance(error, TileError) else answered_wrongly(error)] * len(tiles)
    except (Exception, SystemExit) as error:  # The detector is the user's own code.
        return [raised(error)] * len(tiles)


def _check_batches(detector: CheckedDetector, image: np.ndarray) -> None:
    """Two tiles at once, in one of which nothing is to be found; a difference costs no more than a warning."""
    tile = _whole(image, max(1, detector.input_side // 2))
    blank = np.full_like(tile, _GREY)
    alone = _answer(detector, tile)
    nothing = _answer(detector, blank)
    if isinstance(nothing, TileError) and nothing.reason.startswith(ANSWERED_WRONGLY):
        msg = f"detector {detector.name!r}: on a blank tile {nothing.reason}"
        raise UserError(msg)
    together = _answers(detector, [tile, blank])[0]
    if isinstance(alone, Detections) and isinstance(together, Detections):
        distance = agreement(alone, together).distance
        if distance > _BATCH_DISTANCE:
            _LOG.warning(
                "detector %r answers a tile otherwise in a batch than alone (distance %.2f of 1): results will depend "
                "on --detector-batch-size and differ from run to run",
                detector.name,
                distance,
            )


def _is_steady(detector: CheckedDetector, image: np.ndarray) -> bool:
    """Whether it answers a tile twice alike; one that does not can't be told to resize, and is warned of."""
    tile = _whole(image, detector.input_side)
    first, second = _answer(detector, tile), _answer(detector, tile)
    if isinstance(first, TileError) or isinstance(second, TileError):
        return True
    distance = agreement(first, second).distance
    if distance > _BATCH_DISTANCE:
        _LOG.warning(
            "detector %r answers the same tile otherwise the second time (distance %.2f of 1): results will differ "
            "from run to run",
            detector.name,
            distance,
        )
    return distance <= _BATCH_DISTANCE


def _check_size(detector: CheckedDetector, images: Iterable[np.ndarray]) -> None:
    seen: list[tuple[Detections, Detections, Detections]] = []
    evidence = Agreement()
    for image in images:
        views = three_views(image, detector.input_side)
        if views is None:
            return
        small, padded, enlarged = (_answer(detector, view) for view in views)
        if isinstance(small, TileError) or isinstance(padded, TileError) or isinstance(enlarged, TileError):
            continue
        seen.append((small, padded, enlarged))
        evidence = evidence.plus(agreement(small, padded))
        if evidence.total >= _ENOUGH_EVIDENCE:
            break
    if found := follows_size(seen):
        padded_distance, enlarged_distance = (each.distance for each in found)
        msg = (
            f"detector {detector.name!r} resizes its tiles, which undoes the zoom: it answers a picture and the same "
            f"enlarged twofold alike (distance {enlarged_distance:.2f} of 1), but not the same pixels with more grey "
            f"around them ({padded_distance:.2f}): pad tiles at the right and below, to what canvas_hw says, and never "
            "resize them"
        )
        raise UserError(msg)


_SURROUND = 114


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
    hw = fit_longer_side(*image_hw, int(input_side * _CONTENT))
    content = cut_tile(image, Tile(0, (), image_hw, Window(0, 0, image_hw[1], image_hw[0]), *hw))
    small, padded = _on_grey(content, half), _on_grey(content, input_side)
    return small, padded, cv2.resize(small, (2 * half, 2 * half), interpolation=cv2.INTER_LINEAR)


def _on_grey(content: np.ndarray, side: int) -> np.ndarray:
    square = np.full((side, side, 3), _SURROUND, np.uint8)
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
