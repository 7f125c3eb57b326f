"""Protocols of the networks that run on tiles, their factories, and the result of a short trial of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.scale import ScaleMap


class Detect(Protocol):
    """Detector on a batch of tiles; labels are category ids.

    Attributes:
        input_side: the longer side of a whole image's tile, in tile pixels.
    """

    input_side: int

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """Padded (height, width) that the detector computes for a tile of (height, width), in pixels."""
        ...

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """Detect objects in tiles.

        Args:
            pixels: [height, width, 3] uint8 RGB each; never resized.

        Returns:
            Detections of each tile, boxes in tile pixels, or a `TileError` for a tile that failed.
        """
        ...


class DetectionsWithFeatures(NamedTuple):
    """Detections of a tile and the feature maps of the same forward pass.

    Attributes:
        detections: in tile pixels, or the error.
        features: the detector's feature maps, the finest first, [C, h, w] float32 each, over the tile's canvas.
    """

    detections: Detections | TileError
    features: tuple[np.ndarray, ...]


@runtime_checkable
class DetectWithFeatures(Detect, Protocol):
    """Detector that returns its feature maps, for a scale head that reads them."""

    def with_features(self, pixels: Sequence[np.ndarray]) -> list[DetectionsWithFeatures]:
        """Detections of tiles, [height, width, 3] uint8 RGB each, with the feature maps of the same forward pass."""
        ...


class ScalePredictor(Protocol):
    """Scale prediction from the pixels of tiles.

    Attributes:
        input_pixels: pixels computed for each tile.
    """

    input_pixels: int

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        """Predict scale maps of tiles.

        Args:
            pixels: [height, width, 3] uint8 RGB each.
            tiles: the tiles; only the oracle reads them.

        Returns:
            A map of each tile, in the tile's frame; a `TileError` in place of a map with NaN.
        """
        ...


@runtime_checkable
class FeatureScalePredictor(Protocol):
    """Scale prediction from the detector's feature maps: one forward pass serves both.

    Attributes:
        input_pixels: 0, since no pixels are computed beside the detector's.
    """

    input_pixels: int

    def from_features(
        self, features: Sequence[tuple[np.ndarray, ...]], tiles: Sequence[Tile]
    ) -> list[ScaleMap | TileError]:
        """Predict scale maps from the feature maps of each tile, [C, h, w] float32, in the tile's frame."""
        ...


AnyScalePredictor = ScalePredictor | FeatureScalePredictor
"""Scale predictor that reads pixels or the detector's feature maps."""


@dataclass(frozen=True)
class NetworkFactories:
    """Constructors of a run's networks, called once in the process that runs them.

    Attributes:
        detect: returns the detector, whose labels are category ids.
        predict_scale: returns Scale Net or the oracle; None if no policy needs one.
        reads_features: True if `predict_scale` returns a `FeatureScalePredictor`.
        batch_size: tiles of an image in a call, at most, where one process works on an image at a time.
    """

    detect: Callable[[], Detect]
    predict_scale: Callable[[], AnyScalePredictor] | None = None
    reads_features: bool = False
    batch_size: int = 1

    def one_actor_suffices(self, policy: Policy) -> bool:
        """True if the detector is the only network that runs on tiles, or the first: one actor then does all."""
        return not policy.uses_evidence or policy.needs_first_pass or (policy.needs_network and self.reads_features)


class TrialCall(NamedTuple):
    """A call of the networks.

    Attributes:
        tiles: tiles of the batch.
        seconds: duration.
        device_bytes: memory in use on the GPU after it, the networks included; 0 on a CPU.
    """

    tiles: int
    seconds: float
    device_bytes: int = 0


@dataclass(frozen=True)
class NetworkTrial:
    """Result of a trial.

    Attributes:
        device: the device, cpu or cuda.
        calls: calls with growing batches, one at least.
        read_seconds: seconds to read an image and cut its tile.
        process_bytes: peak resident memory of the process.
        gpu_bytes: memory of the GPU; 0 on a CPU.
    """

    device: str
    calls: tuple[TrialCall, ...]
    read_seconds: float = 0.0
    process_bytes: int = 0
    gpu_bytes: int = 0
