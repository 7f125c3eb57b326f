"""Inference on batches of tiles: scale prediction before windows are planned, and detection.

A scale map comes from Scale Net, from the detector's own first pass, or from the ground truth. Detections of a first
pass travel on with their tile, so that the detector runs once on each tile.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from scalenet_ray.core.candidates import RegionEvidence, candidates_of_detections, candidates_of_map
from scalenet_ray.core.detections import Detections, Failure, TileResult
from scalenet_ray.core.errors import OutOfMemoryError, TileError, UserError
from scalenet_ray.core.geometry import Tile, boxes_to_tile, fit_longer_side
from scalenet_ray.core.merge import Merging, carry_to_image
from scalenet_ray.core.networks import (
    AnyScalePredictor,
    Detect,
    DetectionsWithFeatures,
    DetectWithFeatures,
    FeatureScalePredictor,
)
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.scale import REFERENCE_AREA, UNIT_AREA, ScaleMap, scale_map_of_boxes
from scalenet_ray.core.timing import timed

_LOG = logging.getLogger(__name__)

BATCH_HALVED = "batch_halved"
"""Guard noted on the first tile of each batch that did not fit the device's memory and was halved."""

Evidence = ScaleMap | RegionEvidence | None
"""Evidence by which windows are cut: a scale map (Algorithm 1), or candidates and texture (the region planner)."""

T = TypeVar("T")


# --- scale prediction -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScaleResult:
    """Scale map of a tile, and the detections of a first pass.

    Attributes:
        scale_map: None if the policy needs none of this tile.
        detections: in tile pixels, if the detector ran on the tile; else None.
        failure: the error of a network on this tile, or None.
        looked: True if Scale Net ran on the tile, so that its pixels count.
        evidence: what windows are cut by; None if the policy cuts none from this tile.
        guards: limits that were hit: the memory of a device.
    """

    scale_map: ScaleMap | None = None
    detections: Detections | None = None
    failure: TileError | None = None
    looked: bool = False
    evidence: Evidence = None
    guards: tuple[str, ...] = ()


_Outputs = tuple["ScaleMap | TileError | None", "Detections | TileError | None"]


@timed("look")
def predict_scales(
    pixels: Sequence[np.ndarray],
    tiles: Sequence[Tile],
    policy: Policy,
    *,
    detect: Detect | None = None,
    predict_scale: AnyScalePredictor | None = None,
) -> list[ScaleResult]:
    """Predict the scale maps that a policy needs, each network once for the whole batch.

    A batch that does not fit a device's memory is halved.

    Args:
        pixels: [height, width, 3] uint8 RGB each.
        tiles: the tiles, of any images and depths; those that need no scale map are passed over.
        policy: decides which tiles need a map, and from which evidence.
        detect: the detector, for policies that need its first pass or its features.
        predict_scale: Scale Net or the oracle, for policies that need one.

    Returns:
        The result of each tile, in order.

    Raises:
        UserError: if the policy needs a network that was not given.
    """
    results = [ScaleResult()] * len(tiles)
    places = [i for i, tile in enumerate(tiles) if policy.needs_scales(tile)]
    chosen_pixels, chosen_tiles = [pixels[i] for i in places], [tiles[i] for i in places]

    def run(part: slice) -> list[_Outputs]:
        """Run the networks on a part of the chosen tiles."""
        maps, found = _run_networks(chosen_pixels[part], chosen_tiles[part], policy, detect, predict_scale)
        return list(zip(maps, found, strict=True))

    outputs, halved = split_on_oom(run, len(places))
    for nth, (place, tile, output) in enumerate(zip(places, chosen_tiles, outputs, strict=True)):
        scale_map, detections = (output, None) if isinstance(output, TileError) else output
        guards = (BATCH_HALVED,) * halved.count(nth)
        result = _scale_result(tile, pixels[place], scale_map, detections, policy)
        results[place] = dataclasses.replace(result, guards=guards)
    return results


def needs_detector_first(policy: Policy, predict_scale: AnyScalePredictor | None) -> bool:
    """True if the detector runs on a tile before windows are cut from it."""
    return policy.needs_first_pass or (policy.needs_network and isinstance(predict_scale, FeatureScalePredictor))


def _run_networks(
    pixels: list[np.ndarray],
    tiles: list[Tile],
    policy: Policy,
    detect: Detect | None,
    predict_scale: AnyScalePredictor | None,
) -> tuple[Sequence[ScaleMap | TileError | None], Sequence[Detections | TileError | None]]:
    """Scale maps and detections of each tile; None from a network that the policy does not need."""
    nothing = [None] * len(tiles)
    if policy.needs_predictor and predict_scale is None:
        msg = f"policy {policy.name} needs a scale map, got no Scale Net: give its weights with --scale-net PATH"
        raise UserError(msg)
    if not needs_detector_first(policy, predict_scale):
        assert predict_scale is not None
        assert not isinstance(predict_scale, FeatureScalePredictor)
        return predict_scale(pixels, tiles), nothing
    if detect is None:
        msg = f"policy {policy.name} needs the detector's first pass, got no detector"
        raise UserError(msg)
    if policy.needs_first_pass:
        return nothing, [reject_nan(found) for found in detect(pixels)]
    assert isinstance(predict_scale, FeatureScalePredictor)
    if not isinstance(detect, DetectWithFeatures):
        msg = "this Scale Net reads the detector's feature maps, which this detector does not show: give another one"
        raise UserError(msg)
    answers = detect.with_features(pixels)
    return maps_from_features(answers, tiles, predict_scale), [reject_nan(answer.detections) for answer in answers]


def maps_from_features(
    answers: Sequence[DetectionsWithFeatures], tiles: Sequence[Tile], predict_scale: FeatureScalePredictor
) -> list[ScaleMap | TileError]:
    """Scale maps from a detector's feature maps.

    Args:
        answers: the detector's; one without feature maps holds the error of a tile that failed.
        tiles: the tiles.
        predict_scale: the scale head.

    Returns:
        A map of each tile, or the error.
    """
    maps: list[Any] = [answer.detections for answer in answers]
    places = [i for i, answer in enumerate(answers) if answer.features]
    if places:
        predicted = predict_scale.from_features([answers[i].features for i in places], [tiles[i] for i in places])
        for place, scale_map in zip(places, predicted, strict=True):
            maps[place] = scale_map
    return maps


def _scale_result(
    tile: Tile,
    pixels: np.ndarray,
    scale_map: ScaleMap | TileError | None,
    found: Detections | TileError | None,
    policy: Policy,
) -> ScaleResult:
    """Combine the outputs of the networks on one tile."""
    looked = policy.needs_network
    if isinstance(scale_map, TileError):
        return ScaleResult(failure=scale_map, looked=looked)
    if isinstance(found, TileError):
        return ScaleResult(failure=found, looked=looked)
    rules = policy.recursion
    if policy.regions is not None:
        if scale_map is not None:
            candidates = candidates_of_map(scale_map, tile, rules.small_classes, rules.threshold)
        else:
            assert found is not None
            candidates = candidates_of_detections(found, tile)
        evidence = policy.regions.evidence(candidates, pixels, tile, policy.input_side)
        return ScaleResult(scale_map, found, None, looked, evidence)
    if scale_map is None:
        assert found is not None
        scale_map = scale_map_of_detections(found, (tile.height, tile.width), rules.first_pass_threshold)
    return ScaleResult(scale_map, found, None, looked, scale_map)


def scale_map_of_detections(found: Detections, tile_hw: tuple[int, int], threshold: float) -> ScaleMap:
    """Scale map from the detector's boxes, weighted by score (policy `first-pass`).

    Args:
        found: detections with boxes in tile pixels.
        tile_hw: (height, width) of the tile.
        threshold: boxes that score less are left out.
    """
    found = found[found.scores >= threshold]
    return scale_map_of_boxes(found.boxes, found.areas, found.scores, tile_hw)


class ObjectsInImage(Protocol):
    """Ground truth by image."""

    def __call__(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [N, 4] xyxy and mask areas [N] of an image's objects, in image pixels; crowds left out."""
        ...


class OracleScalePredictor:
    """Scale prediction from the ground truth (policy `oracle`): an upper bound for Scale Net.

    Args:
        objects_in_image: the ground truth.
    """

    input_pixels = 0

    def __init__(self, objects_in_image: ObjectsInImage) -> None:
        self._objects_in_image = objects_in_image

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        """True scale map of each tile; the pixels are not read."""
        del pixels
        return [self._map(tile) for tile in tiles]

    def _map(self, tile: Tile) -> ScaleMap:
        boxes, areas = self._objects_in_image(tile.image_id)
        zoom_x, zoom_y = tile.zoom_xy
        areas_in_tile = areas * zoom_x * zoom_y
        # An object of class 1 weighs 1 as a point and 0 at the upper bound of its class; others weigh 1.
        share_of_class_1 = areas_in_tile * REFERENCE_AREA / (UNIT_AREA * tile.height * tile.width)
        weights = np.where(share_of_class_1 < 1.0, 1.0 - share_of_class_1, 1.0)
        return scale_map_of_boxes(boxes_to_tile(boxes, tile), areas_in_tile, weights, (tile.height, tile.width))


# --- detection --------------------------------------------------------------------------------------


@timed("detect")
def detect_tiles(
    results: Sequence[TileResult],
    tiles: Sequence[Tile],
    pixels: Sequence[np.ndarray],
    found: Sequence[Detections | None],
    detect: Detect,
    merging: Merging,
) -> list[TileResult]:
    """Detect objects in a batch of tiles and carry the boxes to their images.

    Args:
        results: result of each tile so far.
        tiles: the tiles, of any images and depths.
        pixels: [height, width, 3] uint8 RGB each.
        found: detections of a first pass, in tile pixels; None for a tile on which the detector has not run yet.
        detect: the detector, called once for all of these, or on halves of a batch that does not fit its memory.
        merging: size and edge filters.

    Returns:
        The results with detections in image pixels and the detector's cost.
    """
    unseen = [i for i, detections in enumerate(found) if detections is None]
    unseen_pixels = [pixels[i] for i in unseen]
    outputs, halved = split_on_oom(lambda part: detect(unseen_pixels[part]), len(unseen))
    detected = dict(zip(unseen, map(reject_nan, outputs), strict=True))
    halvings = Counter(unseen[i] for i in halved)
    return [
        _with_detections(
            dataclasses.replace(result, guards=result.guards + (BATCH_HALVED,) * halvings[i]),
            tile,
            detected.get(i, found[i]),
            detect,
            merging,
        )
        for i, (result, tile) in enumerate(zip(results, tiles, strict=True))
    ]


def _with_detections(
    result: TileResult, tile: Tile, found: Detections | TileError | None, detect: Detect, merging: Merging
) -> TileResult:
    """The result of a tile with its detections, in image pixels, and its cost."""
    try:
        canvas = detect.canvas_hw((tile.height, tile.width))
        whole = detect.canvas_hw(fit_longer_side(*tile.image_hw, detect.input_side))
    except UserError as error:
        return dataclasses.replace(result, failure=Failure("detect", str(error)))
    pixels = canvas[0] * canvas[1]
    passes = pixels / (whole[0] * whole[1])
    result = dataclasses.replace(result, detector_pixels=pixels, detector_passes=passes, view=tile)
    if isinstance(found, TileError):
        return dataclasses.replace(result, failure=Failure("detect", found.reason))
    assert found is not None
    return dataclasses.replace(result, detections=carry_to_image(found, tile, merging))


def reject_nan(found: Detections | TileError) -> Detections | TileError:
    """Detections of a tile, or a `TileError` if a box or a score is NaN or infinite."""
    if isinstance(found, TileError) or (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
        return found
    return TileError("the detector gave boxes or scores that are NaN or infinite: check its weights and precision")


def split_on_oom(run: Callable[[slice], Sequence[T]], count: int) -> tuple[list[T | TileError], list[int]]:
    """Run a network on a batch, and on halves of it while it does not fit the device's memory.

    Args:
        run: slice of the batch -> an output for each tile; raises `OutOfMemoryError` if it does not fit.
        count: tiles of the batch.

    Returns:
        The outputs in order, a `TileError` for a tile that does not fit even alone; and the first position of each part
        that was halved, once for each time.
    """
    waiting = [slice(0, count)] if count else []
    outputs: list[T | TileError] = []
    halved: list[int] = []
    while waiting:
        part = waiting.pop()
        try:
            outputs += run(part)
            continue
        except OutOfMemoryError as error:
            reason = str(error)
        # Outside of the handler: the exception would keep alive what the call had on the device.
        tiles = part.stop - part.start
        if tiles == 1:
            remedy = "give a smaller max_tile_pixels or input side, a device with more memory, or fewer actors to it"
            outputs.append(TileError(f"this tile does not fit the device's memory even alone: {remedy} ({reason})"))
            continue
        middle = part.start + tiles // 2
        waiting += [slice(middle, part.stop), slice(part.start, middle)]
        halved.append(part.start)
        _LOG.warning("a batch of %d tiles does not fit the device's memory and is halved: %s", tiles, reason)
    return outputs, halved
