"""Networks that cost nothing, or sleep as long as an accelerator would work: what is left is the engine's own cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import ray

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.policy import Policy, Recursion
from scalenet_ray.core.scale import NUM_CLASSES, ScaleMap
from scalenet_ray.data.image_records import ImageRecord

Looks = Literal["scalenet", "first-pass"]

TILES_PER_IMAGE = 3
"""The whole image and two windows: about what looking first takes of photographs."""

_SIDE = 64
_CELLS = 8


@ray.remote(num_cpus=0)
class Tally:
    """Times of the calls of all detectors, by this machine's clock."""

    def __init__(self) -> None:
        self._detectors = 0
        self._calls: list[tuple[float, float, int]] = []

    def enter(self) -> int:
        """Register a caller, and return how many came before it."""
        self._detectors += 1
        return self._detectors - 1

    def add(self, start: float, end: float, tiles: int) -> None:
        """Record one call of a detector."""
        self._calls.append((start, end, tiles))

    def between(self, start: float, end: float) -> tuple[float, float, float]:
        """Mean number of busy detectors, tiles of a call, and tiles a second, between two times.

        A call that lies in the time only in part counts for as much of its tiles.
        """
        shares = [(max(0.0, min(end, to) - max(start, since)), to - since, tiles) for since, to, tiles in self._calls]
        within = [(inside, inside / whole * tiles, tiles) for inside, whole, tiles in shares if inside]
        busy, detected, of_calls = (sum(column) for column in zip(*within, strict=True)) if within else (0.0, 0.0, 0)
        return busy / (end - start), of_calls / max(len(within), 1), detected / (end - start)


class _Detector:
    """Detector that sleeps for each tile, and finds an object in its middle or in two of its corners."""

    input_side = _SIDE

    def __init__(self, seconds: float, tally: Any, in_corners: bool) -> None:
        self._seconds, self._tally = seconds, tally
        # Small enough to be worth a window, if they shall be.
        self._places, self._half_side = ((1, 7), 2) if in_corners else ((4,), 4)

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """The tile's own (height, width): tiles are not padded."""
        return hw

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """Detections of tiles, [h, w, 3] uint8 RGB each."""
        start = time.time()
        time.sleep(self._seconds * len(pixels))
        if self._tally is not None:
            self._tally.add.remote(start, time.time(), len(pixels))
        return [self._found(*each.shape[:2]) for each in pixels]

    def _found(self, height: int, width: int) -> Detections:
        centres = np.array([(width / 8 * place, height / 8 * place) for place in self._places], np.float32)
        ones = np.ones(len(centres))
        boxes = np.concatenate([centres - self._half_side, centres + self._half_side], axis=1)
        return Detections(boxes, (0.9 * ones).astype(np.float32), ones.astype(np.int64))


class SmallObjects(_Detector):
    """Detector that costs nothing and finds two small objects in each tile, for `bench.fakes:SmallObjects`."""

    iou_threshold = 0.5
    categories = MappingProxyType({1: "object"})

    def __init__(self) -> None:
        super().__init__(0.0, None, in_corners=True)


class _ScaleNet:
    """Scale predictor that sleeps for each tile, and sees a small object in two of its corners."""

    input_pixels = _SIDE**2

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        prob = np.zeros((NUM_CLASSES, _CELLS, _CELLS), np.float32)
        prob[0] = 1.0
        for corner in (0, -1):
            prob[:2, corner, corner] = (0.0, 1.0)
        self._map = ScaleMap(prob=prob)

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        """Scale maps of the tiles."""
        del tiles
        time.sleep(self._seconds * len(pixels))
        return [self._map] * len(pixels)


@dataclass(frozen=True)
class _Detectors:
    seconds: float
    tally: Any
    straggles: float
    in_corners: bool

    def __call__(self) -> _Detector:
        first = self.tally is not None and ray.get(self.tally.enter.remote()) == 0
        return _Detector(self.seconds * (self.straggles if first else 1.0), self.tally, self.in_corners)


@dataclass(frozen=True)
class _ScaleNets:
    seconds: float

    def __call__(self) -> _ScaleNet:
        return _ScaleNet(self.seconds)


def fake_networks(
    detector: float = 0.0,
    scale_net: float = 0.0,
    *,
    tally: Any = None,
    straggles: float = 1.0,
    in_corners: bool = False,
) -> NetworkFactories:
    """Factories of networks that sleep for each tile.

    Args:
        detector: seconds a tile.
        scale_net: seconds a tile.
        tally: a `Tally` that is told of every call, or None.
        straggles: the first detector sleeps so many times longer.
        in_corners: the detector finds objects in two corners of a tile, where Scale Net sees them, for `first-pass`.
    """
    return NetworkFactories(_Detectors(detector, tally, straggles, in_corners), _ScaleNets(scale_net))


def grey_image(record: ImageRecord) -> np.ndarray:
    """An image of the record's size, [h, w, 3] uint8."""
    return np.full((*(record.hw or (_SIDE, _SIDE)), 3), 128, np.uint8)


def records_of(count: int) -> list[ImageRecord]:
    """Records of `count` images of no file."""
    return [ImageRecord(i, f"{i}.jpg", _SIDE, _SIDE) for i in range(1, count + 1)]


def two_windows(kind: Looks = "scalenet") -> Policy:
    """Policy that cuts two windows from each image, where Scale Net or the detector's first pass sees objects."""
    return Policy(kind, kind, _SIDE, Recursion(max_depth=1, max_windows=TILES_PER_IMAGE - 1))
