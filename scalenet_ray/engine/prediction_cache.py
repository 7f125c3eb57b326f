"""What networks said of tiles, kept: a sweep's trials differ in where they look, and mostly look at the same tiles.

What is kept is known by the very pixels that were looked at, so that a hit is what a miss would have given, whatever
policy, zoom or window led there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.inference import (
    AnyScalePredictor,
    Detect,
    FeatureScalePredictor,
    maps_from_features,
)
from scalenet_ray.core.scale import ScaleMap

__all__ = [
    "CacheActor",
    "CachedDetector",
    "CachedScalePredictor",
    "PredictionCache",
]


@ray.remote(num_cpus=0)
class CacheActor:
    """Holds what was kept, in the object store, for all trials of a sweep."""

    def __init__(self) -> None:
        self._parts: list[ray.ObjectRef] = []

    def add(self, answers: dict[bytes, Any]) -> None:
        """Keep answers; they live as long as this actor."""
        self._parts.append(ray.put(answers))

    def since(self, count: int) -> list[ray.ObjectRef]:
        """What came after the first so many parts."""
        return self._parts[count:]


class PredictionCache:
    """Answers of networks, those of other trials among them.

    Args:
        keeper: the sweep's `CacheActor`; None to keep nothing from one trial to the next.

    Attributes:
        hits: answers that were there.
        misses: answers that a network had to give.
    """

    def __init__(self, keeper: Any = None) -> None:
        self._keeper = keeper
        self._known: dict[bytes, Any] = {}
        self._new: dict[bytes, Any] = {}
        self._parts = 0
        self.hits = self.misses = 0

    def begin(self) -> None:
        """Begin another trial."""
        self.hits = self.misses = 0
        if self._keeper is None:
            self._known = {}

    def fetch(self) -> None:
        """Learn what other trials have added."""
        if self._keeper is not None:
            refs = ray.get(self._keeper.since.remote(self._parts))
            self._parts += len(refs)
            for part in ray.get(refs):
                self._known.update(part)

    def share(self) -> None:
        """Let other trials have what is new."""
        if self._keeper is not None and self._new:
            ray.get(self._keeper.add.remote(self._new))
            self._new = {}

    def answers(self, kind: str, pixels: Sequence[np.ndarray], ask: Callable[[list[int]], Sequence[Any]]) -> list[Any]:
        """What a network says of tiles.

        Args:
            kind: of the network.
            pixels: [h, w, 3] uint8 each.
            ask: positions that are not known -> their answers.
        """
        keys = [_key(kind, each) for each in pixels]
        unknown = [i for i, key in enumerate(keys) if key not in self._known]
        self.hits += len(keys) - len(unknown)
        self.misses += len(unknown)
        if unknown:
            fresh = dict(zip((keys[i] for i in unknown), ask(unknown), strict=True))
            self._known |= fresh
            self._new |= fresh
        return [self._known[key] for key in keys]


def _key(kind: str, pixels: np.ndarray) -> bytes:
    digest = hashlib.blake2b(f"{kind} {pixels.shape}".encode(), digest_size=20)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


class CachedDetector:
    """A detector that is asked once for each tile.

    Args:
        detect: the detector.
        kept: its answers.
    """

    def __init__(self, detect: Detect, kept: PredictionCache) -> None:
        self.inner = detect
        self.input_side = detect.input_side
        self._kept = kept

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """The detector's own."""
        return self.inner.canvas_hw(hw)

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """As the detector's."""
        return self._kept.answers("detector", pixels, lambda at: self.inner([pixels[i] for i in at]))


class CachedScalePredictor:
    """A Scale Net that is asked once for each tile; one that reads a detector's features asks that for them.

    Args:
        predict_scale: the Scale Net.
        detect: the detector.
        kept: its answers.
    """

    def __init__(self, predict_scale: AnyScalePredictor, detect: Any, kept: PredictionCache) -> None:
        self._predict_scale = predict_scale
        self._detect = detect
        self._kept = kept
        self.input_pixels = predict_scale.input_pixels

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        """As the Scale Net's."""

        def ask(at: list[int]) -> Sequence[ScaleMap | TileError]:
            """What the network says of the tiles at these places."""
            some, those = [pixels[i] for i in at], [tiles[i] for i in at]
            if not isinstance(self._predict_scale, FeatureScalePredictor):
                return self._predict_scale(some, those)
            return maps_from_features(self._detect.with_features(some), those, self._predict_scale)

        return self._kept.answers("scale net", pixels, ask)
