"""The embedded sample's large scenes: reproducible, with small objects that only a closer look finds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.expansion import expand
from scalenet_ray.core.geometry import iou_matrix
from scalenet_ray.core.policy import Policy, parse_policy
from scalenet_ray.core.recursion import Step, recursive_detect
from scalenet_ray.models.detectors import Detector, load_detector
from scalenet_ray.models.spec import SAMPLE_DETECTOR, NetworkSpec
from scalenet_ray.sample.large_scenes import LARGE_HW, LargeScene, large_scene
from scalenet_ray.sample.scenes import write_sample
from scalenet_ray.sample.shapes import SAMPLE_CATEGORIES
from tests.job_scripts import load_job


@pytest.fixture(scope="module")
def scenes() -> list[LargeScene]:
    return [large_scene(i) for i in range(3)]


def test_a_scene_is_the_same_everywhere(scenes: list[LargeScene]) -> None:
    # If the digest changes with the drawing, SAMPLE_VERSION must grow, so that samples on disk are replaced.
    digest = hashlib.sha256(scenes[0].pixels.tobytes() + scenes[0].boxes.tobytes()).hexdigest()
    assert digest[:16] == "b3d2c15a8ad0f3ab"
    assert not np.array_equal(large_scene(0, seed=1).pixels, scenes[0].pixels)


def test_most_objects_are_small_and_two_or_three_are_large(scenes: list[LargeScene]) -> None:
    for scene in scenes:
        assert scene.pixels.shape == (*LARGE_HW, 3)
        sides = (scene.boxes[:, 2:] - scene.boxes[:, :2]).max(axis=1)
        small = sides[sides <= 61]
        assert small.min() >= 10
        assert 2 <= len(sides) - len(small) <= 3
        assert (sides > 200).sum() == len(sides) - len(small)
        assert len(small) > 30
        assert set(scene.category_ids.tolist()) <= set(SAMPLE_CATEGORIES)


def test_masks_fill_their_boxes_and_objects_do_not_touch(scenes: list[LargeScene]) -> None:
    for scene in scenes:
        for (x0, y0, x1, y1), mask in zip(scene.boxes.tolist(), scene.masks, strict=True):
            assert mask.shape == (y1 - y0, x1 - x0)
            assert mask[[0, -1]].any(axis=1).all()
            assert mask[:, [0, -1]].any(axis=0).all()
        assert (iou_matrix(scene.boxes, scene.boxes) > 0).sum() == len(scene.boxes)


def test_boxes_hold_what_stands_out_of_the_pixels(scenes: list[LargeScene]) -> None:
    checked = 0
    for scene in scenes:
        for box in scene.boxes[(scene.boxes[:, 2:] - scene.boxes[:, :2]).max(axis=1) <= 61]:
            x0, y0, x1, y1 = (box + np.array([-6, -6, 6, 6])).tolist()
            around = scene.pixels[y0:y1, x0:x1].astype(int)
            rim = np.concatenate([around[:3].reshape(-1, 3), around[-3:].reshape(-1, 3)])
            if rim.std(axis=0).max() > 8:  # On rocks or at the horizon, the ground is no one colour.
                continue
            rows, columns = np.nonzero(np.abs(around - np.median(rim, axis=0)).max(axis=2) > 45)
            seen = (x0 + columns.min(), y0 + rows.min(), x0 + columns.max() + 1, y0 + rows.max() + 1)
            assert np.abs(np.array(seen) - box).max() <= 2
            checked += 1
    assert checked > 90


def test_most_of_a_scene_is_smooth(scenes: list[LargeScene]) -> None:
    for scene in scenes:
        blocks = scene.pixels[..., 1].reshape(LARGE_HW[0] // 32, 32, LARGE_HW[1] // 32, 32)
        assert 0.7 < (blocks.std(axis=(1, 3)) < 5).mean() < 0.99


def _found(scene: LargeScene, policy: Policy, detector: Detector) -> tuple[int, float, list[Step]]:
    """Number of objects found with a score of 0.4, megapixels, and steps."""
    steps: list[Step] = []
    result = recursive_detect(scene.pixels, 1, policy, detect=detector, observe=steps.append)
    found: Detections = result.detections[result.detections.scores >= 0.4]
    right = (iou_matrix(scene.boxes, found.boxes) >= 0.5) & (scene.category_ids[:, None] == found.labels[None])
    return int(right.any(axis=1).sum()), result.detector_pixels / 1e6, steps


def test_regions_find_what_the_whole_image_hides_at_fewer_pixels_than_slices(scenes: list[LargeScene]) -> None:
    detector = load_detector(SAMPLE_DETECTOR)
    whole, regions, slices = (
        parse_policy(name, input_side=detector.input_side, iou_threshold=0.6, smallest_object=12.0)
        for name in ("whole", "regions", "slices@192")
    )
    tiles = expand(slices.root(1, LARGE_HW), None, slices).children
    cost_of_slices = sum(tile.height * tile.width for tile in tiles) / 1e6
    in_whole, _, _ = _found(scenes[1], whole, detector)
    in_regions, cost, steps = _found(scenes[1], regions, detector)
    assert in_whole <= 3
    assert in_regions > 0.7 * len(scenes[1].boxes)
    assert cost < cost_of_slices / 2
    assert {step.tile.depth for step in steps} == {0, 1, 2}


def test_the_split_is_evaluated_by_its_name(tmp_path: Path) -> None:
    data = write_sample(tmp_path / "sample", train=0, val=0, large=1)
    document = json.loads((data / "annotations" / "instances_large2017.json").read_text())
    scene = large_scene(0)
    (image,) = document["images"]
    with Image.open(data / "large2017" / image["file_name"]) as picture:
        assert (picture.height, picture.width) == (image["height"], image["width"]) == LARGE_HW
    boxes = np.array([row["bbox"] for row in document["annotations"]])
    assert np.array_equal(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), scene.boxes)
    assert [row["area"] for row in document["annotations"]] == [mask.sum() for mask in scene.masks]
    job = load_job("eval_coco").EvalCoco(
        data=str(data),
        split="large2017",
        policies=("whole",),
        engine="local",
        networks=NetworkSpec(detector=SAMPLE_DETECTOR),
        output=str(tmp_path / "run"),
    )
    assert load_job("eval_coco").main(job) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["policies"]["whole"]["AP_small"] == 0.0
