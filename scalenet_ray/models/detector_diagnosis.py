"""Diagnosis of a detector on one image, in a few lines: its kind, its faults and its cost."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from scalenet_ray.core.answers import unchecked
from scalenet_ray.core.detections import SHOWN_SCORE, Detections
from scalenet_ray.core.errors import OutOfMemoryError, TileError, UserError
from scalenet_ray.models.checked_detector import CheckedDetector
from scalenet_ray.models.detector_check import batch_fault, detect_alone, repeat_fault, size_fault, whole_tile
from scalenet_ray.models.detectors import Detector
from scalenet_ray.models.devices import is_gpu

_NO_NAME = re.compile(r"\s*(?:(?:label|class|category|cls|object|obj)?[\s_-]*\d+)?\s*", re.IGNORECASE)
_MOST_NAMES = 3
_UNSURE = 0.25
"""A detector that is asked for uncertain boxes has some below this score."""

_FEW = 3
_OTHER_SCORE, _OTHER_IOU = 0.6, 0.31
"""Thresholds with which it is loaded a second time."""

_BATCHES = (1, 2, 4, 8, 16)
_REPEATS = 3
_SECONDS = 5.0
"""Larger batches are not tried once a batch takes this long."""

_WORTH = 1.1
"""A batch is worth it if it is so many times as fast as a smaller one."""

Load = Callable[[float, float | None], Detector]


@dataclass(frozen=True)
class Diagnosis:
    """Lines about what a detector is, finds and costs, and lines about what is wrong, each with a remedy."""

    facts: tuple[str, ...]
    faults: tuple[str, ...]


def diagnose(load: Load, name: str, image: np.ndarray, *, score_threshold: float, device: str) -> Diagnosis:
    """Try a detector on an image: alone, twice, in batches, padded, enlarged, and with other thresholds.

    Args:
        load: minimum score and IoU threshold, or None for its own -> the detector on its device.
        name: name of the detector in messages.
        image: [h, w, 3] uint8 RGB.
        score_threshold: minimum score of a detection.
        device: name of the device.

    Raises:
        UserError: if an attribute of the detector is invalid, or as `load` does.
    """
    raw = load(score_threshold, None)
    detector = CheckedDetector(raw, name)
    facts = detector.in_words()
    faults = _name_faults(detector)
    tile = whole_tile(image, detector.input_side)
    ratio = max(image.shape) / max(tile.shape)
    times = f"reduced {ratio:.1f} times" if ratio > 1 else f"enlarged {1 / ratio:.1f} times"
    facts.append(f"image {_size(image)}, at its input side {_size(tile)}: {times}")
    found = detect_alone(detector, tile)
    if isinstance(found, TileError):
        return Diagnosis(tuple(facts), (*faults, found.reason))
    sure = int((found.scores >= SHOWN_SCORE).sum())
    facts.append(f"found there: {len(found)} boxes, {sure} of them with a score of {SHOWN_SCORE:g} or more")
    faults += _range_faults(raw, tile)
    faults += _sameness_faults(detector, image)
    if not sure:
        facts.append("without sure boxes it can't be told whether it resizes tiles: give an image of its classes")
    remarks, wrong = _thresholds(found, load, name, tile, score_threshold)
    facts += remarks
    faults += wrong
    seconds = _seconds_per_tile(detector, tile)
    times = ", ".join(f"{1000 * each:.0f} ms in a batch of {size}" for size, each in seconds.items())
    facts.append(f"time per tile on {device}: {times}")
    advice, fault = advise_batch(seconds, on_gpu=is_gpu(device))
    facts.append(f"use input_side {detector.input_side} and {advice}")
    return Diagnosis(tuple(facts), tuple(faults if fault is None else [*faults, fault]))


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[0]} x {pixels.shape[1]}"


def unnamed(names: Iterable[str]) -> list[str]:
    """The names that are none: empty, a number, or such as LABEL_3."""
    return [name for name in names if _NO_NAME.fullmatch(name)]


def _name_faults(detector: CheckedDetector) -> list[str]:
    without = unnamed(detector.categories.values())
    if not without:
        return []
    listed = ", ".join(map(repr, without[:_MOST_NAMES]))
    return [
        f"{len(without)} of {len(detector.categories)} classes have no name, such as {listed}: name them, since a data "
        "set's categories are found by name"
    ]


def _range_faults(raw: Detector, tile: np.ndarray) -> list[str]:
    """Faults of boxes before they are clipped to the tile."""
    found = unchecked(next(iter(raw([tile]))))
    found = found[found.scores >= SHOWN_SCORE]
    height, width = tile.shape[:2]
    inside = Detections(np.clip(found.boxes, 0, [width, height, width, height]), found.scores, found.labels)
    outside = inside.areas < found.areas / 2
    if not outside.any():
        return []
    first = found.boxes[outside][0].round(1).tolist()
    return [
        f"{int(outside.sum())} of {len(found)} boxes lie outside a tile of {height} x {width}, such as {first}: boxes "
        "must be xyxy in tile pixels, not of another size"
    ]


def _sameness_faults(detector: CheckedDetector, image: np.ndarray) -> list[str]:
    """Faults of answers that depend on the batch, the call or the size."""
    try:
        faults = [batch_fault(detector, image), repeat_fault(detector, image)]
    except UserError as error:
        return [str(error)]
    if faults[1] is None:
        faults.append(size_fault(detector, [image]))
    return [fault for fault in faults if fault is not None]


def _thresholds(
    found: Detections, load: Load, name: str, tile: np.ndarray, score_threshold: float
) -> tuple[list[str], list[str]]:
    """Remarks and faults of what it does with thresholds."""
    remarks, faults = [], []
    if score_threshold < _UNSURE and len(found) >= _FEW and found.scores.min() >= _UNSURE:
        faults.append(
            f"none of its {len(found)} boxes scores below {_UNSURE:g}, though the threshold is {score_threshold:g}: "
            "uncertain boxes guide the windows, lower the threshold that it has itself"
        )
    other = CheckedDetector(load(_OTHER_SCORE, _OTHER_IOU), name)
    fewer = detect_alone(other, tile)
    if isinstance(fewer, Detections) and len(fewer) and fewer.scores.min() < _OTHER_SCORE:
        faults.append(
            f"--score-threshold does not reach it: asked for {_OTHER_SCORE:g}, it gave a box of "
            f"{fewer.scores.min():.2f}: let it take an argument score_threshold"
        )
    if other.iou_threshold != _OTHER_IOU:
        remarks.append(f"--iou-threshold does not reach it: it keeps {other.iou_threshold:g}")
    return remarks, faults


def _seconds_per_tile(detector: CheckedDetector, tile: np.ndarray) -> dict[int, float]:
    """Batch size -> seconds for a tile in it; as far as they fit the memory and take a reasonable time."""
    seconds: dict[int, float] = {}
    for size in _BATCHES:
        try:
            detector([tile] * size)
            runs = []
            for _ in range(_REPEATS):
                begun = time.perf_counter()
                detector([tile] * size)
                runs.append(time.perf_counter() - begun)
        except OutOfMemoryError:
            break
        seconds[size] = statistics.median(runs) / size
        if runs[-1] > _SECONDS:
            break
    return seconds


def advise_batch(seconds: Mapping[int, float], *, on_gpu: bool) -> tuple[str, str | None]:
    """The batch size to use in words, and a fault or None: on a GPU batches should be faster.

    Args:
        seconds: batch size -> seconds for a tile in it, in ascending order.
        on_gpu: True if it runs on a GPU.
    """
    best = next(iter(seconds))
    for size, each in seconds.items():
        if each * _WORTH < seconds[best]:
            best = size
    advice = f"--detector-batch-size {best} here"
    if best == 1 and on_gpu and len(seconds) > 1:
        return advice, (
            f"batches are no faster than one tile at a time ({1000 * min(seconds.values()):.0f} ms a tile at best, "
            f"{1000 * seconds[1]:.0f} ms alone): give all tiles of a canvas to the network in one call"
        )
    return advice, None
