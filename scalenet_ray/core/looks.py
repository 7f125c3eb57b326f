"""The looks of a policy at one image without the detections: what was seen, and the windows that were cut."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from scalenet_ray.core.images import cut_tile
from scalenet_ray.core.look import Detect, PredictScale, ReadFeatures, look
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.recursion import expand
from scalenet_ray.core.scale import ScaleMap
from scalenet_ray.core.window import Tile

__all__ = ["Looked", "look_through"]


class Looked(NamedTuple):
    """One tile of an image.

    Attributes:
        tile: the tile.
        scale_map: what was seen in it, in its own frame; None if it needed no look.
    """

    tile: Tile
    scale_map: ScaleMap | None


def look_through(
    image: np.ndarray,
    image_id: int,
    policy: Policy,
    *,
    detect: Detect | None = None,
    predict_scale: PredictScale | ReadFeatures | None = None,
) -> list[Looked]:
    """All tiles of an image, as `recursive_detect` makes them, but only looked at: for pictures of what a policy does.

    Args:
        image: [h, w, 3] uint8 RGB.
        image_id: the image's id.
        policy: where to look more closely.
        detect: the frozen detector; only for the policies whose look needs its first pass or its features.
        predict_scale: Scale Net, or an oracle; only for the policies that need one.

    Returns:
        The whole image's tile first, then those cut from it. A tile that a network breaks on has neither map nor
        children.
    """
    queue = deque([policy.root(image_id, (image.shape[0], image.shape[1]))])
    looked: list[Looked] = []
    while queue:
        tile = queue.popleft()
        seen = look([cut_tile(image, tile)], [tile], policy, detect=detect, predict_scale=predict_scale)[0]
        looked.append(Looked(tile, seen.scale_map))
        if seen.failure is None:
            queue.extend(expand(tile, seen.scale_map, policy).children)
    return looked
