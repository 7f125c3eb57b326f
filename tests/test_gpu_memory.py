"""A batch that does not fit a GPU's memory is halved: really provoked on a GPU, and pretended on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scalenet_ray.core.detections import TileResult
from scalenet_ray.core.inference import BATCH_HALVED, detect_tiles
from scalenet_ray.core.merge import Merging
from scalenet_ray.models.checked_detector import MappedDetector
from scalenet_ray.models.torchvision_detectors import TorchvisionDetector
from tests.devices import ON_GPU
from tests.oracles import tile_of
from tests.test_gpu import on_device
from tests.test_torchvision_detectors import CATEGORIES, SMALL_RCNN, make_tiles


@contextmanager
def room_for(device: str, detector: TorchvisionDetector, tiles: list[np.ndarray]) -> Iterator[None]:
    """Let the device hold the detector's work on half of the tiles, and not on all."""
    half = len(tiles) // 2
    if device == "cpu":

        def refuse(_module: nn.Module, inputs: Any) -> None:
            if len(inputs[0]) > half:
                raise torch.OutOfMemoryError("CUDA out of memory")

        hook = detector.model.backbone.register_forward_pre_hook(refuse)
        yield
        hook.remove()
        return

    def peak(batch: Sequence[np.ndarray]) -> int:
        """Bytes in use at the peak of a call: of what is reserved beyond them, torch frees what it has to."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        detector(batch)
        return torch.cuda.max_memory_allocated()

    limit = (peak(tiles[:half]) + peak(tiles)) / 2
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize(
    ("device", "side", "count"), [pytest.param("cpu", 64, 4), pytest.param("cuda", 512, 16, marks=ON_GPU)]
)
def test_a_batch_that_does_not_fit_is_halved_and_finds_the_same(device: str, side: int, count: int) -> None:
    # In float64: with less memory torch takes other algorithms, of another rounding.
    detector = on_device(SMALL_RCNN, device)
    mapped = MappedDetector(detector, CATEGORIES)
    pixels = make_tiles(*[(side, side)] * count)
    tiles = [tile_of((side, side), image_id=i) for i in range(count)]

    def detect() -> list[TileResult]:
        """All tiles in one batch."""
        empty = [TileResult(tile.image_id, (), Fraction(1)) for tile in tiles]
        return detect_tiles(empty, tiles, pixels, [None] * count, mapped, Merging())

    expected = detect()
    assert not any(result.guards for result in expected)
    with room_for(device, detector, pixels):
        found = detect()
    assert sum(result.guards.count(BATCH_HALVED) for result in found) >= 1
    for one, other in zip(found, expected, strict=True):
        assert one.failure is None
        assert len(one.detections) == len(other.detections) > 0
        np.testing.assert_allclose(one.detections.scores, other.detections.scores, atol=1e-3)
