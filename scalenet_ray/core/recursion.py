"""Recursive detection (Algorithm 1): predict scales, cut windows around what is out of range, detect, merge.

`recursive_detect` is the reference on one image, without Ray. Every engine calls the same `core.expansion.expand` and
must give the same result.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from scalenet_ray.core.detections import Failure, ImageResult, TileResult
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.expansion import expand
from scalenet_ray.core.geometry import AnyImage, Tile, tile_pixels
from scalenet_ray.core.inference import detect_tiles, predict_scales
from scalenet_ray.core.merge import merge_image
from scalenet_ray.core.networks import AnyScalePredictor, Detect
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.scale import ScaleMap


class Step(NamedTuple):
    """One step of `recursive_detect`: a tile and what came of it.

    Attributes:
        tile: the tile.
        scale_map: its scale map, in its own frame; None if none was predicted.
        children: tiles cut from it.
        result: its detections, in image pixels, filtered and not merged yet; its cost, the limits that were hit, and
            the failure, if it failed.
    """

    tile: Tile
    scale_map: ScaleMap | None
    children: tuple[Tile, ...]
    result: TileResult


def recursive_detect(
    image: AnyImage,
    image_id: int,
    policy: Policy,
    *,
    detect: Detect,
    predict_scale: AnyScalePredictor | None = None,
    observe: Callable[[Step], None] | None = None,
    batch_size: int = 1,
) -> ImageResult:
    """Detect objects in one image, batch after batch, from the whole image's tile to those cut from it.

    Args:
        image: [h, w, 3] uint8 RGB, or an image that is read by window.
        image_id: the image's id.
        policy: which tiles are cut and detected.
        detect: the frozen detector.
        predict_scale: Scale Net or the oracle, for policies that need one.
        observe: called with each step when it is done; a tile comes before those cut from it.
        batch_size: tiles of a call of the networks, at most: on a GPU a call costs more than a tile.

    Returns:
        The merged detections in image pixels, and their cost. An unread window or a network's error fails the image.
    """
    queue = deque([policy.root(image_id, (image.shape[0], image.shape[1]))])
    steps: list[Step] = []
    while queue:
        tiles = [queue.popleft() for _ in range(min(batch_size, len(queue)))]
        for step in _process_tiles(image, tiles, policy, detect, predict_scale):
            queue.extend(step.children)
            steps.append(step)
            if observe is not None:
                observe(step)
    return merge_image([step.result for step in steps], policy.merging)


def _process_tiles(
    image: AnyImage, tiles: Sequence[Tile], policy: Policy, detect: Detect, predict_scale: AnyScalePredictor | None
) -> list[Step]:
    """Predict the scales of tiles, cut windows by them, and detect the tiles of which the expansion says so."""
    steps: dict[int, Step] = {}
    pixels: dict[int, np.ndarray] = {}
    for i, tile in enumerate(tiles):
        try:
            pixels[i] = tile_pixels(image, tile)
        except TileError as error:
            unread = TileResult(tile.image_id, tile.path, Fraction(0), failure=Failure("read", error.reason))
            steps[i] = Step(tile, None, (), unread)
    predicted = predict_scales(
        list(pixels.values()), [tiles[i] for i in pixels], policy, detect=detect, predict_scale=predict_scale
    )
    seen = dict(zip(pixels, predicted, strict=True))
    detected: list[int] = []
    for i, scale in seen.items():
        tile = tiles[i]
        look_pixels = predict_scale.input_pixels if scale.looked and predict_scale is not None else 0
        result = TileResult(tile.image_id, tile.path, Fraction(0), look_pixels=look_pixels, image_hw=tile.image_hw)
        if scale.failure is not None:
            failed = dataclasses.replace(result, failure=Failure("look", scale.failure.reason))
            steps[i] = Step(tile, None, (), failed)
            continue
        expansion = expand(tile, scale.evidence, policy)
        result = dataclasses.replace(result, guards=expansion.guards)
        steps[i] = Step(tile, scale.scale_map, expansion.children, result)
        if expansion.detect:
            detected.append(i)
    results = detect_tiles(
        [steps[i].result for i in detected],
        [tiles[i] for i in detected],
        [pixels[i] for i in detected],
        [seen[i].detections for i in detected],
        detect,
        policy.merging,
    )
    steps |= {i: steps[i]._replace(result=result) for i, result in zip(detected, results, strict=True)}
    return [steps[i] for i in range(len(tiles))]


class TracedTile(NamedTuple):
    """A tile with its scale map, in the tile's frame; None if none was predicted."""

    tile: Tile
    scale_map: ScaleMap | None


def trace_tiles(
    image: AnyImage,
    image_id: int,
    policy: Policy,
    *,
    detect: Detect | None = None,
    predict_scale: AnyScalePredictor | None = None,
) -> list[TracedTile]:
    """Tiles and scale maps of an image as `recursive_detect` makes them, without detection.

    Args:
        image: [h, w, 3] uint8 RGB, or an image that is read by window.
        image_id: the image's id.
        policy: the policy.
        detect: the frozen detector, for policies that need its first pass or its features.
        predict_scale: Scale Net or the oracle, for policies that need one.

    Returns:
        The whole image's tile first, then those cut from it. One on which a network fails has no map and no children.
        Raises `TileError` if a window cannot be read.
    """
    queue = deque([policy.root(image_id, (image.shape[0], image.shape[1]))])
    traced: list[TracedTile] = []
    while queue:
        tile = queue.popleft()
        # No network sees the others.
        pixels = tile_pixels(image, tile) if policy.needs_scales(tile) else np.empty((0, 0, 3), np.uint8)
        seen = predict_scales([pixels], [tile], policy, detect=detect, predict_scale=predict_scale)[0]
        traced.append(TracedTile(tile, seen.scale_map))
        if seen.failure is None:
            queue.extend(expand(tile, seen.evidence, policy).children)
    return traced
