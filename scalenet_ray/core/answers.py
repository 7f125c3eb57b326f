"""Validation of a detector's output, in any of the forms that detectors return.

An invalid answer to one tile is a `TileError`: only that image fails. A number of answers other than the number of
tiles is a `UserError`: answers cannot then be assigned to tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from scalenet_ray.core.detections import Detections, as_numbers
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.inference import reject_nan
from scalenet_ray.core.masks import encode_mask, is_mask_of

ANSWERED_WRONGLY = "the detector answered a tile wrongly"
"""Prefix of the failure reason of a tile whose answer is invalid."""

_RAISED = "the detector raised"

MOST_FAILED = 32
"""Number of failed images, from the first on without a success, after which a run ends."""

_PARTS = ("boxes", "scores", "labels", "masks")
_ROUNDING = 1e-3
"""Tolerance of scores beyond [0, 1], for the rounding of half precision."""
_MIN_SIDE_IN_PIXELS = 32
"""Shorter side of a tile from which on boxes that all lie within one pixel are taken for relative coordinates."""
_SHOWN = 5
_MAX_CHARACTERS = 300


def answered_wrongly(error: ValueError) -> TileError:
    """Return the failure of a tile with an invalid answer."""
    return TileError(f"{ANSWERED_WRONGLY}: {error}")


def raised(error: BaseException) -> TileError:
    """Return the failure of a tile on which the detector raised an exception, in one line."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # An exception's own __str__ may raise.
        text = ""
    text = text.encode("utf-8", "replace").decode()[:_MAX_CHARACTERS]
    return TileError(f"{_RAISED} {type(error).__name__}" + (f": {text}" if text else ""))


class RaisedOn:
    """Counter of the images on which the detector raised an exception or returned an invalid answer.

    Attributes:
        images: number of images processed.
        raised: number of images that failed for this cause.
        reason: reason of the last such failure.
    """

    def __init__(self) -> None:
        self.images = self.raised = 0
        self.reason = ""

    def add(self, failure_reason: str | None) -> None:
        """Count an image, with the reason of its failure or None."""
        self.images += 1
        if failure_reason is not None and failure_reason.startswith((_RAISED, ANSWERED_WRONGLY)):
            self.raised += 1
            self.reason = failure_reason

    def all_of_the_first(self, *, no_more: bool) -> bool:
        """Return True once the first `MOST_FAILED` images have all failed, or all images if `no_more` follow."""
        return 0 < self.raised == self.images and (self.images == MOST_FAILED or no_more)


def fails_on_all(reason: str, images: int) -> UserError:
    """Return the error that ends a run whose first images all failed in the detector.

    Args:
        reason: reason of one of the failures.
        images: number of images.
    """
    which = "the only image" if images == 1 else f"each of the first {images} images"
    return UserError(f"{reason}: so on {which}, and the run ends; correct the detector, or choose another one")


def listed_answers(answers: Any, tiles: int) -> list[Any]:
    """Return the answers of one call as a list.

    Args:
        answers: the detector's output: a list, a tuple or an iterator.
        tiles: number of tiles passed to it.

    Raises:
        UserError: if the type is another, or the number of answers differs from `tiles`.
    """
    if not isinstance(answers, list | tuple | Iterator):
        msg = f"the detector must answer with a list, an answer for each tile, got {type(answers).__name__}"
        raise UserError(msg)
    answers = list(answers)
    if len(answers) != tiles:
        msg = (
            f"the detector must answer each tile: got {len(answers)} answers to {tiles}; where it finds nothing it "
            "must say so, with no boxes"
        )
        raise UserError(msg)
    return answers


def checked_answer(answer: Any, hw: tuple[int, int], class_ids: np.ndarray) -> Detections | TileError:
    """Validate the answer to one tile; clip its boxes to the tile and drop those outside.

    Args:
        answer: `Detections`, a `TileError`, or (boxes, scores, labels) with or without masks, as a tuple, a list or a
            dict of these names. Boxes are [N, 4] xyxy in tile pixels; masks are run lengths (pycocotools' compressed
            `counts`, or its dict), or [N, h, w] boolean.
        hw: (height, width) of the tile.
        class_ids: [C] int64, valid labels.

    Returns:
        The detections, or the tile's failure.
    """
    if isinstance(answer, TileError):
        return answer
    try:
        found, masks = unchecked(answer), _parts(answer)[3]
        if masks is not None:
            found = replace(found, masks=_masks(masks, len(found), hw))
        refused = reject_nan(found)
        if isinstance(refused, TileError):
            return refused
        return _clipped(_with_valid_scores(_with_known_labels(found, class_ids)), hw)
    except ValueError as error:
        return answered_wrongly(error)


def unchecked(answer: Any) -> Detections:
    """Boxes, scores and labels of an answer in any form of `checked_answer`, without checks of their values.

    Raises:
        ValueError: if the answer is of another form.
    """
    return answer if isinstance(answer, Detections) else Detections(*_parts(answer)[:3])


def _parts(answer: Any) -> tuple[Any, Any, Any, Any]:
    """Split an answer into boxes, scores, labels, and masks or None."""
    if isinstance(answer, Detections):
        return answer.boxes, answer.scores, answer.labels, answer.masks
    if isinstance(answer, Mapping):
        missing = [part for part in _PARTS[:3] if part not in answer]
        if missing:
            got = ", ".join(map(str, list(answer)[:_SHOWN])) or "none"
            msg = f"an answer must have boxes, scores and labels, got no {missing[0]} among {got}"
            raise ValueError(msg)
        return answer["boxes"], answer["scores"], answer["labels"], answer.get("masks")
    if isinstance(answer, list | tuple) and len(answer) in (3, 4):
        boxes, scores, labels, *masks = answer
        return boxes, scores, labels, masks[0] if masks else None
    got = f"{type(answer).__name__} of {len(answer)}" if isinstance(answer, list | tuple) else type(answer).__name__
    msg = (
        f"the answer to a tile must be Detections, (boxes, scores, labels) or (boxes, scores, labels, masks), got {got}"
    )
    raise ValueError(msg)


def _with_known_labels(found: Detections, class_ids: np.ndarray) -> Detections:
    known = np.isin(found.labels, class_ids)
    if not known.all():
        first = ", ".join(map(str, class_ids[:_SHOWN].tolist())) + (" ..." if len(class_ids) > _SHOWN else "")
        msg = f"label {found.labels[~known][0]} is none of its categories ({first}): declare it, or leave it out"
        raise ValueError(msg)
    return found


def _with_valid_scores(found: Detections) -> Detections:
    scores = found.scores
    if not len(scores) or (scores.min() >= 0 and scores.max() <= 1):
        return found
    if scores.min() < -_ROUNDING or scores.max() > 1 + _ROUNDING:
        worst = scores.max() if scores.max() > 1 + _ROUNDING else scores.min()
        hint = "divide percentages by 100" if 1 < worst <= 100 else "apply the sigmoid or softmax"
        msg = f"scores must be between 0 and 1, got {worst:g}: {hint}"
        raise ValueError(msg)
    return found.with_scores(np.clip(scores, 0, 1))


def _clipped(found: Detections, hw: tuple[int, int]) -> Detections:
    """Check the convention of the boxes and clip them to the tile."""
    boxes, ends = found.boxes, np.array([hw[1], hw[0]] * 2, np.float32)
    inverted = (boxes[:, 2:] < boxes[:, :2] - 1).any(axis=1)
    if inverted.any():
        first = boxes[inverted][0].round(1).tolist()
        msg = f"boxes must be [x0, y0, x1, y1] with x0 <= x1 and y0 <= y1, got {first}: is it [x, y, width, height]?"
        raise ValueError(msg)
    if len(boxes) and boxes.max() <= 1 and min(hw) >= _MIN_SIDE_IN_PIXELS and (boxes % 1).any():
        msg = f"boxes must be in pixels of the tile, got none above {boxes.max():g}: multiply shares by its sides"
        raise ValueError(msg)
    if ((boxes >= 0) & (boxes <= ends)).all() and (boxes[:, :2] < boxes[:, 2:]).all():
        return found
    boxes = np.clip(boxes, 0, ends)
    return replace(found, boxes=boxes)[np.flatnonzero((boxes[:, :2] < boxes[:, 2:]).all(axis=1))]


def _masks(masks: Any, count: int, hw: tuple[int, int]) -> tuple[bytes, ...]:
    """Convert N masks of a tile to run lengths."""
    if not isinstance(masks, list | tuple):
        array = as_numbers(masks, "masks")
        if array.shape[:1] != (count,) or (count and array.shape[1:] != hw):
            msg = f"masks must be [{count}, {hw[0]}, {hw[1]}], as boxes and the tile are, got {list(array.shape)}"
            raise ValueError(msg)
        masks = list(array)
    if len(masks) != count:
        msg = f"masks must be one for each of {count} boxes, got {len(masks)}"
        raise ValueError(msg)
    return tuple(_mask(mask, hw) for mask in masks)


def _mask(mask: Any, hw: tuple[int, int]) -> bytes:
    if isinstance(mask, Mapping):
        size, mask = mask.get("size"), mask.get("counts")
        if size is not None and tuple(size) != hw:
            msg = f"a mask must have the size of its tile, {list(hw)}, got {list(size)}"
            raise ValueError(msg)
    if isinstance(mask, list):
        msg = "a mask must be compressed run lengths or truth values, got a list: encode it (pycocotools.mask.encode)"
        raise ValueError(msg)
    if isinstance(mask, str):
        mask = mask.encode("utf-8", "replace")
    if isinstance(mask, bytes):
        if not is_mask_of(mask, hw):
            msg = f"a mask must be compressed run lengths of {hw[0]} x {hw[1]} pixels, as its tile, got others"
            raise ValueError(msg)
        return mask
    pixels = as_numbers(mask, "a mask")
    if pixels.shape != hw or not (pixels.dtype.kind == "b" or ((pixels == 0) | (pixels == 1)).all()):
        msg = (
            f"a mask must be [{hw[0]}, {hw[1]}] of truth values, as its tile, got shape {list(pixels.shape)} of "
            f"{pixels.dtype}: set a threshold to probabilities"
        )
        raise ValueError(msg)
    return encode_mask(np.asfortranarray(pixels, np.uint8))
