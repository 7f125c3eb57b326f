"""What the work on a tile, and then on an image, came to: detections, cost, and what went wrong."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from scalenet_ray.core.clock import timed
from scalenet_ray.core.detections import SHOWN_SCORE, Detections
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.halving import BATCH_HALVED, in_halves
from scalenet_ray.core.look import Detect, refuse_nan
from scalenet_ray.core.merge import Merging, carry_to_image, merge_detections
from scalenet_ray.core.policy import fitted_hw
from scalenet_ray.core.window import Tile

__all__ = ["Failure", "ImageResult", "TileResult", "detect_tiles", "merge_image"]


class Failure(NamedTuple):
    """Why an image was given up: the stage it happened in (read, look, detect) and the reason."""

    stage: str
    reason: str


@dataclass(frozen=True, eq=False)
class TileResult:
    """What one tile's work came to.

    Attributes:
        image_id: the image.
        path: the tile's path; (image_id, path) is its identity.
        credit: its share of the image; an image is complete when its tiles' credits sum to 1.
        detections: in image pixels, filtered by size and window edge; empty for a tile that was only looked at.
        failure: set if the tile could not be worked on.
        look_pixels: pixels that Scale Net computed for it.
        detector_pixels: pixels that the detector computed for it.
        detector_passes: the same over the pixels of a whole image at the detector's own side.
        guards: the limits that acted on it.
        image_hw: (height, width) of the image, in image pixels; None if it could not be opened.
    """

    image_id: int
    path: tuple[int, ...]
    credit: Fraction
    detections: Detections = field(default_factory=Detections.empty)
    failure: Failure | None = None
    look_pixels: int = 0
    detector_pixels: int = 0
    detector_passes: float = 0.0
    guards: tuple[str, ...] = ()
    image_hw: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class ImageResult:
    """What one image's work came to.

    Attributes:
        image_id: the image.
        detections: merged, in image pixels, the best first; empty if the image failed: a part of the
            answer must not pass for the whole.
        failure: the first failure in order of the tiles' paths, or None.
        tiles: tiles looked at or detected.
        look_pixels: pixels that Scale Net computed.
        detector_pixels: pixels that the detector computed.
        detector_passes: the same in passes over a whole image at the detector's own side.
        guards: how often each limit acted.
        image_hw: (height, width) of the image, in image pixels; None if it could not be opened.
        tiles_by_depth: how many of `tiles` there are of each depth.
        whole_pass: what the pass over the whole image finds alone, merged by itself as policy `whole` does, in image
            pixels and without masks: boxes that score `SHOWN_SCORE` or more. None where there was no such pass, or the
            image failed.
    """

    image_id: int
    detections: Detections
    failure: Failure | None
    tiles: int
    look_pixels: int
    detector_pixels: int
    detector_passes: float
    guards: dict[str, int]
    image_hw: tuple[int, int] | None
    tiles_by_depth: dict[int, int] = field(default_factory=dict)
    whole_pass: Detections | None = None


@timed("detect")
def detect_tiles(
    results: Sequence[TileResult],
    tiles: Sequence[Tile],
    pixels: Sequence[np.ndarray],
    found: Sequence[Detections | None],
    detect: Detect,
    merging: Merging,
) -> list[TileResult]:
    """Detect a batch of tiles and carry what is found to their images.

    Args:
        results: each tile's result so far.
        tiles: the tiles, of any images and depths.
        pixels: [height, width, 3] uint8 RGB each.
        found: detections in tile pixels of those that the detector has seen already; else None.
        detect: the detector; it is called once, for those that it has not seen, unless they do not fit its memory.
        merging: filters.

    Returns:
        The results with detections in image pixels and the detector's cost.
    """
    unseen = [i for i, detections in enumerate(found) if detections is None]
    fresh_pixels = [pixels[i] for i in unseen]
    answers, halved = in_halves(lambda some: detect(fresh_pixels[some]), len(unseen))
    fresh = dict(zip(unseen, map(refuse_nan, answers), strict=True))
    marks = Counter(unseen[i] for i in halved)
    results = [
        dataclasses.replace(result, guards=result.guards + (BATCH_HALVED,) * marks[i]) if marks[i] else result
        for i, result in enumerate(results)
    ]
    return [
        _detected(result, tile, fresh.get(i, found[i]), detect, merging)
        for i, (result, tile) in enumerate(zip(results, tiles, strict=True))
    ]


def _detected(
    result: TileResult, tile: Tile, found: Detections | TileError | None, detect: Detect, merging: Merging
) -> TileResult:
    try:
        canvas = detect.canvas_hw((tile.height, tile.width))
        whole = detect.canvas_hw(fitted_hw(*tile.image_hw, detect.input_side))
    except UserError as error:
        return dataclasses.replace(result, failure=Failure("detect", str(error)))
    pixels = canvas[0] * canvas[1]
    result = dataclasses.replace(result, detector_pixels=pixels, detector_passes=pixels / (whole[0] * whole[1]))
    if isinstance(found, TileError):
        return dataclasses.replace(result, failure=Failure("detect", found.reason))
    assert found is not None
    return dataclasses.replace(result, detections=carry_to_image(found, tile, merging))


@timed("merge")
def merge_image(results: Sequence[TileResult], merging: Merging) -> ImageResult:
    """All tiles of one image -> the image.

    Args:
        results: every tile of the image, in any order.
        merging: how their detections become one list.

    Returns:
        The same for any order of `results`.
    """
    ordered = sorted(results, key=lambda result: result.path)
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
        guards=dict(guards),
        image_hw=next((result.image_hw for result in ordered if result.image_hw), None),
        tiles_by_depth=dict(sorted(Counter(depths).items())),
        whole_pass=None if failure else _whole_pass(ordered, merging),
    )


def _whole_pass(results: Sequence[TileResult], merging: Merging) -> Detections | None:
    """The shown boxes of the whole image's own tile, merged without those of any other; None if it was not detected."""
    whole = next((result for result in results if not result.path and result.detector_pixels), None)
    if whole is None:
        return None
    # A box is suppressed by better ones alone: those that are not shown need not take part.
    found = whole.detections[whole.detections.scores >= SHOWN_SCORE]
    merged = merge_detections([dataclasses.replace(found, masks=None)], merging)
    return merged[merged.scores >= SHOWN_SCORE]
