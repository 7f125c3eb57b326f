"""Test of a detector on a few images before a run, which finds invalid outputs and hidden resizing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from scalenet_ray.core.answers import ANSWERED_WRONGLY, MOST_FAILED, fails_on_all
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import OutOfMemoryError, TileError, UserError
from scalenet_ray.core.geometry import Tile, Window, cut_tile, fit_longer_side, iou_matrix
from scalenet_ray.models.checked_detector import CheckedDetector, failure_of
from scalenet_ray.models.padding import PADDING_GREY, padded

_MAX_COMPARED = 3
"""Images whose views are compared."""

_ENOUGH_EVIDENCE = 2.0
"""Total score of the compared detections after which no further image is compared."""

_MAX_DISTANCE = 0.05
"""Distance between two calls on the same tile above which there is a warning."""

_CONTENT_SHARE = 3 / 8
"""Longer side of the image in a view as a share of the input side, so that every view has padding."""

_MIN_VIEW_SIDE = 32

_DARK = 16
"""Brightness, of 255, below which images are nearly black: 12 bits in 16 are read as 15 at most."""

_SURE, _UNSURE = 0.3, 0.1
"""Scores of detections that must have a partner, and minimum score of a partner."""

_MATCH_IOU = 0.5

_MIN_EVIDENCE = 0.5
_MIN_DISTANCE = 0.01
_TIMES_NEARER = 1.5
_MIN_GROWN_DISTANCE = 0.5
_FULL_SHARE = 0.98


class Agreement(NamedTuple):
    """Agreement of two lists of detections, in scores; sums over images are meaningful.

    Attributes:
        shared: sum over matched pairs of the lower score times the IoU.
        total: sum over matched pairs of the higher score, plus the scores of unmatched boxes.
    """

    shared: float = 0.0
    total: float = 0.0

    def plus(self, other: Agreement) -> Agreement:
        """Sum of two agreements."""
        return Agreement(self.shared + other.shared, self.total + other.total)

    @property
    def distance(self) -> float:
        """0 for equal detections or none, 1 for disjoint ones."""
        return 1.0 - self.shared / self.total if self.total else 0.0


def try_detector(detector: CheckedDetector, images: Iterable[np.ndarray]) -> list[str]:
    """Run a detector on images until one succeeds, and check its outputs on views of the first three.

    Args:
        detector: the detector.
        images: [h, w, 3] uint8 RGB each; read lazily.

    Returns:
        Warnings, a line each: also of a tile that does not fit this machine's memory, since the run may use others.

    Raises:
        UserError: if the detector fails on all images (at most `MOST_FAILED`), returns an invalid output for a blank
            tile, or resizes its tiles.
    """
    warnings: list[str] = []
    try:
        images = _first_detected(detector, images)
        if not images:
            return []
        # Zeros alone say nothing of how many bits the values have.
        if 0 < (brightest := max(int(image.max()) for image in images)) < _DARK:
            warnings.append(
                f"the first images are nearly black, their brightest value is {brightest} of 255: of 16 bits 65535 is "
                "white; stretch them, e.g. with gdal_translate -scale -ot Byte"
            )
        if fault := batch_fault(detector, images[0]):
            warnings.append(fault)
        if fault := repeat_fault(detector, images[0]):
            warnings.append(fault)
        elif fault := size_fault(detector, images):
            raise UserError(fault)
    except OutOfMemoryError as error:
        warnings.append(f"the detector could not be tried before the run: a tile does not fit the memory ({error})")
    return warnings


def _first_detected(detector: CheckedDetector, images: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Up to three images; the detector succeeds on the first."""
    failures: list[TileError] = []
    chosen: list[np.ndarray] = []
    for image in images:
        if not chosen:
            found = detect_alone(detector, whole_tile(image, detector.input_side))
            if isinstance(found, TileError):
                failures.append(found)
                if len(failures) == MOST_FAILED:
                    break
                continue
        chosen.append(image)
        if len(chosen) == _MAX_COMPARED:
            break
    if failures and not chosen:
        raise fails_on_all(f"detector {detector.name!r}: {failures[0].reason}", len(failures))
    return chosen


def batch_fault(detector: CheckedDetector, image: np.ndarray) -> str | None:
    """Difference of a tile of an image alone and the same tile in a batch with a blank one, or None.

    Raises:
        UserError: if the answer to the blank tile is invalid.
    """
    tile = whole_tile(image, max(1, detector.input_side // 2))
    blank = np.full_like(tile, PADDING_GREY)
    alone = detect_alone(detector, tile)
    nothing = detect_alone(detector, blank)
    if isinstance(nothing, TileError) and nothing.reason.startswith(ANSWERED_WRONGLY):
        msg = f"detector {detector.name!r}: on a blank tile {nothing.reason}"
        raise UserError(msg)
    distance = _distance(alone, _detect(detector, [tile, blank])[0])
    if distance <= _MAX_DISTANCE:
        return None
    return (
        f"detector {detector.name!r} answers a tile otherwise in a batch than alone (distance {distance:.2f} of 1): "
        "results will depend on --detector-batch-size and differ from run to run"
    )


def repeat_fault(detector: CheckedDetector, image: np.ndarray) -> str | None:
    """Difference of two calls on the same tile, which makes the test for resizing meaningless, or None."""
    tile = whole_tile(image, detector.input_side)
    distance = _distance(detect_alone(detector, tile), detect_alone(detector, tile))
    if distance <= _MAX_DISTANCE:
        return None
    return (
        f"detector {detector.name!r} answers the same tile otherwise the second time (distance {distance:.2f} of 1): "
        "results will differ from run to run"
    )


def _distance(first: Detections | TileError, second: Detections | TileError) -> float:
    """Distance of two outputs; 0 if one failed."""
    if isinstance(first, TileError) or isinstance(second, TileError):
        return 0.0
    return agreement(first, second).distance


def size_fault(detector: CheckedDetector, images: Iterable[np.ndarray]) -> str | None:
    """Evidence in words that the detector resizes its tiles, or None."""
    compared: list[tuple[Detections, Detections, Detections]] = []
    evidence = Agreement()
    for image in images:
        views = three_views(image, detector.input_side)
        if views is None:
            return None
        found = [one for view in views if isinstance(one := detect_alone(detector, view), Detections)]
        if len(found) < len(views):
            continue
        small, more_grey, enlarged = found
        compared.append((small, more_grey, enlarged))
        evidence = evidence.plus(agreement(small, more_grey))
        if evidence.total >= _ENOUGH_EVIDENCE:
            break
    follows = follows_size(compared)
    if follows is None:
        return None
    to_padded, to_enlarged = follows
    return (
        f"detector {detector.name!r} resizes its tiles, which undoes the zoom: it answers a picture and the same "
        f"enlarged twofold alike (distance {to_enlarged.distance:.2f} of 1), but not the same pixels with more "
        f"grey around them ({to_padded.distance:.2f}): pad tiles at the right and below, to what canvas_hw says, "
        "and never resize them"
    )


def follows_size(views: Sequence[tuple[Detections, Detections, Detections]]) -> tuple[Agreement, Agreement] | None:
    """Evidence in the `three_views` of each image that a detector resizes its tiles, or None.

    The thresholds were chosen on COCO train2017 and tested on val2017: see docs/decisions.md.

    Returns:
        Agreement of the padded view with the small one, and of the enlarged view with the small one.
    """
    to_padded = grown = to_enlarged = Agreement()
    for detections in views:
        small, more_padding, larger = map(_without_full, detections)
        to_padded = to_padded.plus(agreement(small, more_padding))
        grown = grown.plus(agreement(small, more_padding, zoom=2.0))
        to_enlarged = to_enlarged.plus(agreement(small, larger, zoom=2.0))
    if min(to_padded.total, to_enlarged.total) < _MIN_EVIDENCE or to_padded.distance < _MIN_DISTANCE:
        return None
    if grown.distance < _MIN_GROWN_DISTANCE:
        return None
    return (to_padded, to_enlarged) if to_enlarged.distance * _TIMES_NEARER < to_padded.distance else None


def _without_full(found: Detections) -> Detections:
    """Detections without those that fill the tile, whose extent is estimated from the boxes."""
    if not len(found):
        return found
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    return found[np.flatnonzero((sides < _FULL_SHARE * found.boxes[:, 2:].max(axis=0)).any(axis=1))]


def three_views(image: np.ndarray, input_side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """An image [h, w, 3] uint8 RGB small on grey, the same with more grey, and the first enlarged twofold.

    Returns:
        Squares of half the input side in tile pixels, the input side, and twice the first; None if that is too small.
    """
    half = input_side // 2
    if half < _MIN_VIEW_SIDE:
        return None
    content = whole_tile(image, int(input_side * _CONTENT_SHARE))
    small, more_grey = (padded([content], (side, side))[0] for side in (half, input_side))
    return small, more_grey, cv2.resize(small, (2 * half, 2 * half), interpolation=cv2.INTER_LINEAR)


def whole_tile(image: np.ndarray, side: int) -> np.ndarray:
    """The whole image, [h, w, 3] uint8 RGB, as a tile with its longer side at `side`."""
    hw = (image.shape[0], image.shape[1])
    return cut_tile(image, Tile(0, (), hw, Window(0, 0, hw[1], hw[0]), *fit_longer_side(*hw, side)))


def agreement(first: Detections, second: Detections, *, zoom: float = 1.0) -> Agreement:
    """Agreement of two lists of detections on the boxes that at least one of them is sure of.

    Boxes of equal labels are matched greedily by descending IoU.

    Args:
        first: N detections, boxes in tile pixels.
        second: M detections of the same image in a tile `zoom` times larger.
        zoom: factor by which the second list's boxes are divided.
    """
    first, second = first[first.scores >= _UNSURE], second[second.scores >= _UNSURE]
    overlaps = iou_matrix(first.boxes, second.boxes / np.float32(zoom))
    overlaps *= first.labels[:, None] == second.labels[None]
    # Scores of the boxes that are not matched yet; 0 afterwards.
    left = [first.scores.astype(np.float64), second.scores.astype(np.float64)]
    shared = total = 0.0
    rows, columns = np.nonzero(overlaps >= _MATCH_IOU)
    for nth in np.argsort(-overlaps[rows, columns], kind="stable"):
        i, j = rows[nth], columns[nth]
        pair = (left[0][i], left[1][j])
        if min(pair) > 0:
            left[0][i] = left[1][j] = 0.0
            if max(pair) >= _SURE:
                shared += min(pair) * overlaps[i, j]
                total += max(pair)
    return Agreement(float(shared), float(total + sum(scores[scores >= _SURE].sum() for scores in left)))


def detect_alone(detector: CheckedDetector, tile: np.ndarray) -> Detections | TileError:
    """Detect on one tile; an exception of the detector becomes the tile's failure."""
    return _detect(detector, [tile])[0]


def _detect(detector: CheckedDetector, tiles: list[np.ndarray]) -> list[Detections | TileError]:
    """Run a batch; an exception becomes the output of every tile, without a log message."""
    try:
        return detector.ask(tiles)
    except OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:  # The detector may be the user's own code.
        return [failure_of(error)] * len(tiles)
