"""Cache of network outputs, keyed by a hash of the tile's pixels.

The trials of a sweep differ in their windows and mostly process the same tiles. As the key is a hash of the network's
input, a hit equals the output of the network, whatever policy, zoom or window produced the tile.
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
from scalenet_ray.core.inference import maps_from_features
from scalenet_ray.core.networks import AnyScalePredictor, Detect, FeatureScalePredictor
from scalenet_ray.core.scale import ScaleMap


@ray.remote(num_cpus=0)
class CacheActor:
    """Actor that keeps cached outputs in the object store for all trials of a sweep."""

    def __init__(self) -> None:
        self._parts: list[ray.ObjectRef] = []

    def add(self, outputs: dict[bytes, Any]) -> None:
        """Store outputs; they live as long as this actor."""
        self._parts.append(ray.put(outputs))

    def since(self, count: int) -> list[ray.ObjectRef]:
        """The parts after the first `count`."""
        return self._parts[count:]


class PredictionCache:
    """Network outputs by key, shared with other trials through an actor.

    Args:
        actor: the sweep's `CacheActor`; None to start each trial with an empty cache.

    Attributes:
        hits: number of outputs found in the cache.
        misses: number of outputs computed by a network.
    """

    def __init__(self, actor: Any = None) -> None:
        self._actor = actor
        self._outputs: dict[bytes, Any] = {}
        self._new: dict[bytes, Any] = {}
        self._parts = 0
        self.hits = self.misses = 0

    def begin(self) -> None:
        """Start another trial."""
        self.hits = self.misses = 0
        if self._actor is None:
            self._outputs = {}

    def fetch(self) -> None:
        """Fetch the outputs that other trials have added."""
        if self._actor is not None:
            refs = ray.get(self._actor.since.remote(self._parts))
            self._parts += len(refs)
            for part in ray.get(refs):
                self._outputs.update(part)

    def share(self) -> None:
        """Share new outputs with other trials."""
        if self._actor is not None and self._new:
            ray.get(self._actor.add.remote(self._new))
            self._new = {}

    def get(
        self, network: str, pixels: Sequence[np.ndarray], compute: Callable[[list[int]], Sequence[Any]]
    ) -> list[Any]:
        """The outputs of a network for tiles, computed where the cache has none.

        Args:
            network: its name, a part of the key.
            pixels: [h, w, 3] uint8 each.
            compute: indices into `pixels` -> their outputs.
        """
        keys = [_key(network, array) for array in pixels]
        missing = [i for i, key in enumerate(keys) if key not in self._outputs]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if missing:
            fresh = dict(zip((keys[i] for i in missing), compute(missing), strict=True))
            self._outputs |= fresh
            self._new |= fresh
        return [self._outputs[key] for key in keys]


def _key(network: str, pixels: np.ndarray) -> bytes:
    digest = hashlib.blake2b(f"{network} {pixels.shape}".encode(), digest_size=20)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


class CachedDetector:
    """Detector with a cache of its outputs.

    Args:
        detect: the detector.
        cache: the cache.
    """

    def __init__(self, detect: Detect, cache: PredictionCache) -> None:
        self.inner = detect
        self.input_side = detect.input_side
        self._cache = cache

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """The detector's padded input size."""
        return self.inner.canvas_hw(hw)

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """Detections of each tile, as the detector returns them."""
        return self._cache.get("detector", pixels, lambda indices: self.inner([pixels[i] for i in indices]))


class CachedScalePredictor:
    """Scale predictor with a cache of its outputs.

    Args:
        predict_scale: the scale predictor.
        detect: the detector, which computes the features of a `FeatureScalePredictor`.
        cache: the cache.
    """

    def __init__(self, predict_scale: AnyScalePredictor, detect: Any, cache: PredictionCache) -> None:
        self._predict_scale = predict_scale
        self._detect = detect
        self._cache = cache
        self.input_pixels = predict_scale.input_pixels

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        """Scale map of each tile, as the predictor returns it."""

        def compute(indices: list[int]) -> Sequence[ScaleMap | TileError]:
            """Predict the scale maps of the tiles at these indices."""
            batch, batch_tiles = [pixels[i] for i in indices], [tiles[i] for i in indices]
            if not isinstance(self._predict_scale, FeatureScalePredictor):
                return self._predict_scale(batch, batch_tiles)
            return maps_from_features(self._detect.with_features(batch), batch_tiles, self._predict_scale)

        return self._cache.get("scale net", pixels, compute)
