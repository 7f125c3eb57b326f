"""A detector tried on a few real tiles before a run begins, so that what is wrong with it is said then."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

from scalenet_ray.core.answers import ANSWERED_WRONGLY, MOST_FAILED, answered_wrongly, fails_on_all, raised
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import OutOfMemoryError, TileError, UserError
from scalenet_ray.core.images import cut_tile
from scalenet_ray.core.policy import fitted_hw
from scalenet_ray.core.resizing import Agreement, agreement, follows_size, three_views
from scalenet_ray.core.window import Tile, Window
from scalenet_ray.models.checked_detector import CheckedDetector

__all__ = ["try_detector"]

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
    return cut_tile(image, Tile(0, (), hw, Window(0, 0, hw[1], hw[0]), *fitted_hw(*hw, side)))


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
