"""A look at a batch of tiles: what a policy needs to see before it plans windows.

Scale Net's map, the detector's own first pass, or both; the oracle is a Scale Net that reads the ground
truth. What the detector has seen here it need not see again: its detections travel on with the tile.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from scalenet_ray.core.detections import Detections, Failure, TileResult
from scalenet_ray.core.errors import OutOfMemoryError, TileError, UserError
from scalenet_ray.core.geometry import Tile, boxes_to_tile
from scalenet_ray.core.merge import Merging, carry_to_image
from scalenet_ray.core.policy import Policy, fitted_hw
from scalenet_ray.core.scale import REFERENCE_AREA, UNIT_AREA, ScaleMap, fuse_maps, scale_map_of_boxes
from scalenet_ray.core.timing import timed

__all__ = [
    "BATCH_HALVED",
    "AnyScalePredictor",
    "Detect",
    "DetectWithFeatures",
    "DetectionsWithFeatures",
    "FeatureScalePredictor",
    "NetworkFactories",
    "ObjectsInImage",
    "OracleScalePredictor",
    "ScalePredictor",
    "ScaleResult",
    "detect_tiles",
    "maps_from_features",
    "needs_detector_first",
    "reject_nan",
    "scale_map_of_detections",
    "split_on_oom",
]


class ScalePredictor(Protocol):
    """Tiles' pixels -> their scale maps, a batch at a time.

    Attributes:
        input_pixels: how many pixels it computes for a tile.
    """

    input_pixels: int

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        """Look at tiles.

        Args:
            pixels: [height, width, 3] uint8 RGB each.
            tiles: their recipes; a network has no use for them.

        Returns:
            A map each, in the tile's own frame; a `TileError` in place of one that came out as NaN.
        """
        ...


class Detect(Protocol):
    """Tiles' pixels -> detections in tile pixels, a batch at a time; labels are category ids.

    Attributes:
        input_side: the longer side of a whole image's tile, in tile pixels.
    """

    input_side: int

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of a tile -> the padded size that the detector computes, in pixels."""
        ...

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """[height, width, 3] uint8 RGB each -> detections each, boxes in tile pixels; never resized."""
        ...


class DetectionsWithFeatures(NamedTuple):
    """What one forward pass of a detector gave of a tile: what it found, and what it saw on the way.

    Attributes:
        detections: in tile pixels, or why there are none.
        features: its feature maps, the finest first, [C, h, w] float32 each, over the tile's canvas.
    """

    detections: Detections | TileError
    features: tuple[np.ndarray, ...]


@runtime_checkable
class DetectWithFeatures(Detect, Protocol):
    """A detector that shows its feature maps, for a Scale Net that reads them."""

    def with_features(self, pixels: Sequence[np.ndarray]) -> list[DetectionsWithFeatures]:
        """[height, width, 3] uint8 RGB each, as `__call__`, with the feature maps of the same forward pass."""
        ...


@runtime_checkable
class FeatureScalePredictor(Protocol):
    """A Scale Net that reads the detector's feature maps, so that one forward pass serves both.

    Attributes:
        input_pixels: 0: it looks at no pixels of its own.
    """

    input_pixels: int

    def from_features(
        self, features: Sequence[tuple[np.ndarray, ...]], tiles: Sequence[Tile]
    ) -> list[ScaleMap | TileError]:
        """Feature maps of each tile, [C, h, w] float32 -> a scale map each, in the tile's own frame."""
        ...


AnyScalePredictor = ScalePredictor | FeatureScalePredictor
"""From pixels, or from the detector's feature maps."""


@dataclass(frozen=True, eq=False)
class ScaleResult:
    """What a look at one tile brought.

    Attributes:
        scale_map: None if the policy needs no look at this tile.
        detections: the detector's own, in tile pixels, if it was asked; else None.
        failure: why a network broke on the tile; else None.
        looked: whether Scale Net looked at it, so that its pixels count.
        guards: limits that acted on the look: the memory of a device.
    """

    scale_map: ScaleMap | None = None
    detections: Detections | None = None
    failure: TileError | None = None
    looked: bool = False
    guards: tuple[str, ...] = ()


_Answer = tuple["ScaleMap | TileError | None", "Detections | TileError | None"]


def reject_nan(found: Detections | TileError) -> Detections | TileError:
    """What a detector gave for a tile, or that it broke: a detector of the user's own may let NaN through."""
    if isinstance(found, TileError) or (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
        return found
    return TileError("the detector gave boxes or scores that are NaN or infinite: check its weights and precision")


def scale_map_of_detections(found: Detections, tile_hw: tuple[int, int], threshold: float) -> ScaleMap:
    """The scale map that the detector's own boxes imply, however unsure (policy `first-pass`).

    Args:
        found: what the detector saw, boxes in tile pixels.
        tile_hw: (height, width) of the tile.
        threshold: boxes that score less are left out.
    """
    found = found[found.scores >= threshold]
    return scale_map_of_boxes(found.boxes, found.areas, found.scores, tile_hw)


class ObjectsInImage(Protocol):
    """The ground truth of an image: its id -> boxes [N, 4] xyxy and mask areas [N], in image pixels."""

    def __call__(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes and areas of the objects of one image, crowds left out."""
        ...


class OracleScalePredictor:
    """A Scale Net that knows: its maps come from the ground truth (policy `oracle`).

    Args:
        objects_in_image: where the ground truth comes from.
    """

    input_pixels = 0

    def __init__(self, objects_in_image: ObjectsInImage) -> None:
        self._objects_in_image = objects_in_image

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        """The true map of each tile; the pixels are not looked at."""
        del pixels
        return [self._map(tile) for tile in tiles]

    def _map(self, tile: Tile) -> ScaleMap:
        boxes, areas = self._objects_in_image(tile.image_id)
        zoom_x, zoom_y = tile.zoom_xy
        in_tile, areas_in_tile = boxes_to_tile(boxes, tile), areas * zoom_x * zoom_y
        # Of class 1: all for a point, nothing at its end, where the object is in range. Of the others: one each.
        of_class_1 = areas_in_tile * REFERENCE_AREA / (UNIT_AREA * tile.height * tile.width)
        worth = np.where(of_class_1 < 1.0, 1.0 - of_class_1, 1.0)
        return scale_map_of_boxes(in_tile, areas_in_tile, worth, (tile.height, tile.width))


def needs_detector_first(policy: Policy, predict_scale: AnyScalePredictor | None) -> bool:
    """Whether the detector sees a tile before its windows are planned."""
    return policy.needs_first_pass or (policy.needs_network and isinstance(predict_scale, FeatureScalePredictor))


@timed("look")
def predict_scales(
    pixels: Sequence[np.ndarray],
    tiles: Sequence[Tile],
    policy: Policy,
    *,
    detect: Detect | None = None,
    predict_scale: AnyScalePredictor | None = None,
) -> list[ScaleResult]:
    """Look at a batch of tiles, each network once for all of them; tiles that need no look are passed over.

    A batch that does not fit a device's memory is halved.

    Args:
        pixels: [height, width, 3] uint8 RGB each.
        tiles: their recipes, of any images and depths.
        policy: says which tiles are looked at, and by what.
        detect: the detector, for policies that need its first pass.
        predict_scale: Scale Net or an oracle, for policies that need a map. One that reads the detector's features
            is asked after it, and the detector once.

    Returns:
        What was seen, for each tile in order.

    Raises:
        UserError: if the policy needs a network that was not given.
    """
    at = [i for i, tile in enumerate(tiles) if policy.needs_scales(tile)]
    seen = [ScaleResult()] * len(tiles)
    if not at:
        return seen
    some_pixels, some_tiles = [pixels[i] for i in at], [tiles[i] for i in at]

    def ask(some: slice) -> list[_Answer]:
        """What the networks say of some of the tiles."""
        maps, found = _ask(some_pixels[some], some_tiles[some], policy, detect, predict_scale)
        return list(zip(maps, found, strict=True))

    answers, halved = split_on_oom(ask, len(at))
    marks = Counter(halved)
    for nth, (i, tile, answer) in enumerate(zip(at, some_tiles, answers, strict=True)):
        scale_map, detections = (answer, None) if isinstance(answer, TileError) else answer
        seen[i] = replace(_combine(tile, scale_map, detections, policy), guards=(BATCH_HALVED,) * marks[nth])
    return seen


def _ask(
    pixels: list[np.ndarray],
    tiles: list[Tile],
    policy: Policy,
    detect: Detect | None,
    predict_scale: AnyScalePredictor | None,
) -> tuple[Sequence[ScaleMap | TileError | None], Sequence[Detections | TileError | None]]:
    """What each network that the policy needs says of each tile; None for one that it does not need."""
    nothing = [None] * len(tiles)
    if policy.needs_predictor and predict_scale is None:
        msg = f"policy {policy.name} needs a scale map, got no Scale Net: give its weights with --scale-net PATH"
        raise UserError(msg)
    if not needs_detector_first(policy, predict_scale):
        assert not isinstance(predict_scale, FeatureScalePredictor)
        assert predict_scale is not None
        return predict_scale(pixels, tiles), nothing
    if detect is None:
        msg = f"policy {policy.name} needs the detector's first pass, got no detector"
        raise UserError(msg)
    if not policy.needs_predictor or predict_scale is None:
        return nothing, [reject_nan(one) for one in detect(pixels)]
    if not isinstance(predict_scale, FeatureScalePredictor):
        return predict_scale(pixels, tiles), [reject_nan(one) for one in detect(pixels)]
    if not isinstance(detect, DetectWithFeatures):
        msg = "this Scale Net reads the detector's feature maps, which this detector does not show: give another one"
        raise UserError(msg)
    glimpses = detect.with_features(pixels)
    return maps_from_features(glimpses, tiles, predict_scale), [reject_nan(one.detections) for one in glimpses]


def maps_from_features(
    glimpses: Sequence[DetectionsWithFeatures], tiles: Sequence[Tile], predict_scale: FeatureScalePredictor
) -> list[ScaleMap | TileError]:
    """The maps that a Scale Net reads from a detector's feature maps.

    Args:
        glimpses: what the detector saw; of a tile on which it raised an exception there are no feature maps.
        tiles: their recipes.
        predict_scale: the Scale Net.

    Returns:
        A map for each tile, or why there is none.
    """
    maps: list[Any] = [glimpse.detections for glimpse in glimpses]
    at = [i for i, glimpse in enumerate(glimpses) if glimpse.features]
    answers = predict_scale.from_features([glimpses[i].features for i in at], [tiles[i] for i in at]) if at else []
    for i, answer in zip(at, answers, strict=True):
        maps[i] = answer
    return maps


def _combine(
    tile: Tile, scale_map: ScaleMap | TileError | None, found: Detections | TileError | None, policy: Policy
) -> ScaleResult:
    looked = policy.needs_network
    for failure in (scale_map, found):
        if isinstance(failure, TileError):
            return ScaleResult(failure=failure, looked=looked)
    assert not isinstance(scale_map, TileError)
    assert not isinstance(found, TileError)
    if found is not None and policy.needs_first_pass:
        implied = scale_map_of_detections(found, (tile.height, tile.width), policy.recursion.first_pass_threshold)
        scale_map = implied if scale_map is None else fuse_maps(scale_map, implied)
    return ScaleResult(scale_map, found, None, looked)


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
    answers, halved = split_on_oom(lambda some: detect(fresh_pixels[some]), len(unseen))
    fresh = dict(zip(unseen, map(reject_nan, answers), strict=True))
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


T = TypeVar("T")


BATCH_HALVED = "batch_halved"
"""The mark of it, counted with the limits that acted: on the first tile of each batch that was halved."""


_log = logging.getLogger(__name__)


def split_on_oom(call: Callable[[slice], Sequence[T]], count: int) -> tuple[list[T | TileError], list[int]]:
    """Call a network on a batch, and on its halves if the batch does not fit, and so on.

    Args:
        call: a slice of the batch -> an answer for each tile; raises `OutOfMemoryError` if it does not fit.
        count: tiles of the batch.

    Returns:
        The answers in order, a `TileError` for a tile that does not fit even alone; and where batches began that were
        halved, once for each.
    """
    waiting = [slice(0, count)] if count else []
    answers: list[T | TileError] = []
    halved: list[int] = []
    while waiting:
        some = waiting.pop()
        try:
            answers += call(some)
            continue
        except OutOfMemoryError as error:
            reason = str(error)
        # Not while the error is handled: it would keep alive what the call had on the device.
        tiles = some.stop - some.start
        if tiles == 1:
            remedy = "give a smaller max_tile_pixels or input side, a device with more memory, or fewer actors to it"
            answers.append(TileError(f"this tile does not fit the device's memory even alone: {remedy} ({reason})"))
            continue
        middle = some.start + tiles // 2
        waiting += [slice(middle, some.stop), slice(some.start, middle)]
        halved.append(some.start)
        _log.warning("a batch of %d tiles does not fit the device's memory and is halved: %s", tiles, reason)
    return answers, halved


@dataclass(frozen=True)
class NetworkFactories:
    """How an actor makes its networks: called once, where the weights are to live.

    Attributes:
        detect: makes the detector, labels already category ids.
        predict_scale: makes Scale Net or an oracle; None if no policy needs one.
        reads_features: whether that is a `FeatureScalePredictor`, which needs the detector to run on each tile first.
    """

    detect: Callable[[], Detect]
    predict_scale: Callable[[], AnyScalePredictor] | None = None
    reads_features: bool = False

    def detect_where_they_look(self, policy: Policy) -> bool:
        """Whether no network but the detector, or one that needs it, looks at tiles: then one actor does both."""
        return not policy.uses_evidence or policy.needs_first_pass or (policy.needs_network and self.reads_features)
