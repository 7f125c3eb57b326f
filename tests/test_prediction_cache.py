"""The cache of network outputs: a hit equals a miss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.policy import parse_policy
from scalenet_ray.core.recursion import recursive_detect
from scalenet_ray.data.coco import read_annotations
from scalenet_ray.data.images import decode_image
from scalenet_ray.engine.prediction_cache import CachedDetector, CachedScalePredictor, PredictionCache
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkSpec
from scalenet_ray.sample.scenes import write_sample


class Counting:
    """A detector that finds one box as wide as the tile is bright, and counts the tiles it sees."""

    input_side = 8

    def __init__(self) -> None:
        self.seen = 0

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        return hw

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        self.seen += len(pixels)
        return [
            TileError("black")
            if not each.any()
            else Detections(np.array([[0, 0, each.mean(), 1]], np.float32), np.ones(1, np.float32), np.ones(1, int))
            for each in pixels
        ]


def tile(value: int, hw: tuple[int, int] = (4, 6)) -> np.ndarray:
    return np.full((*hw, 3), value, np.uint8)


def test_each_tile_is_seen_once_whatever_comes_with_it() -> None:
    inner = Counting()
    kept = PredictionCache()
    detect = CachedDetector(inner, kept)
    first = detect([tile(1), tile(2)])
    again = detect([tile(2), tile(3), tile(1)])
    assert inner.seen == 3
    assert (kept.hits, kept.misses) == (2, 3)
    assert again[0] is first[1]
    assert again[2] is first[0]
    assert isinstance(again[1], Detections)
    assert again[1].boxes[0, 2] == 3


def test_tiles_of_the_same_bytes_and_another_shape_are_others() -> None:
    inner = Counting()
    CachedDetector(inner, PredictionCache())([tile(1, (4, 6)), tile(1, (6, 4))])
    assert inner.seen == 2


def test_what_broke_a_network_breaks_it_again() -> None:
    inner = Counting()
    detect = CachedDetector(inner, PredictionCache())
    assert [str(one) for (one,) in (detect([tile(0)]), detect([tile(0)]))] == ["black", "black"]
    assert inner.seen == 1


@pytest.mark.parametrize("policy_name", ["first-pass", "scalenet"])
def test_a_hit_gives_what_a_miss_gives(policy_name: str, tmp_path: Path) -> None:
    dataset = read_annotations(write_sample(tmp_path / "sample", train=1, val=2) / "annotations/instances_val2017.json")
    names = NetworkSpec(detector=SAMPLE_DETECTOR, scale_net=SAMPLE_SCALE_NET)
    info = names.describe_detector()
    policy = parse_policy(policy_name, input_side=info.input_side, iou_threshold=info.iou_threshold)
    detector, predict_scale = names.load_detector(dataset.categories), names.load_scale_net()
    images = [
        decode_image((tmp_path / "sample" / "val2017" / record.file_name).read_bytes()) for record in dataset.images
    ]

    def results(detect: Any, predict: Any) -> list[Any]:
        return [recursive_detect(image, 1, policy, detect=detect, predict_scale=predict) for image in images]

    expected = results(detector, predict_scale)
    kept = PredictionCache()
    for hits in (False, True):
        found = results(CachedDetector(detector, kept), CachedScalePredictor(predict_scale, detector, kept))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.detections.boxes, other.detections.boxes)
            np.testing.assert_array_equal(one.detections.scores, other.detections.scores)
            assert (one.detector_passes, one.look_pixels) == (other.detector_passes, other.look_pixels)
        assert (kept.misses == 0) == hits
        kept.hits = kept.misses = 0
