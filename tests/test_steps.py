"""What an observer of the recursion is told."""

from __future__ import annotations

import numpy as np
import pytest

from scalenet_ray.core.detections import ImageResult
from scalenet_ray.core.inference import OracleScalePredictor
from scalenet_ray.core.merge import merge_image
from scalenet_ray.core.policy import parse_policy
from scalenet_ray.core.recursion import Step, recursive_detect
from tests.oracles import BrokenScale, ConstantScale, PerfectDetector, TruthOfSquares, clustered_squares, draw_squares

SIDE = 128


def watched(name: str) -> tuple[list[Step], ImageResult]:
    boxes, labels = clustered_squares(1, (SIDE, SIDE), (7, 9), 4, extent=48)
    image = draw_squares((SIDE, SIDE), boxes, labels)
    policy = parse_policy(name, input_side=SIDE, iou_threshold=0.65)
    steps: list[Step] = []
    result = recursive_detect(
        image,
        1,
        policy,
        detect=PerfectDetector(12, input_side=SIDE),
        predict_scale=OracleScalePredictor(TruthOfSquares({1: boxes})),
        observe=steps.append,
    )
    merged = merge_image([step.result for step in steps], policy.merging)
    np.testing.assert_array_equal(merged.detections.boxes, result.detections.boxes)
    return steps, result


@pytest.mark.parametrize("name", ["whole", "grid-2", "first-pass", "oracle", "pyramid"])
def test_the_observed_steps_are_all_that_the_result_is_made_of(name: str) -> None:
    steps, result = watched(name)
    assert result.tiles == sum(1 for step in steps if step.result.detector_pixels)
    told = [step.tile for step in steps]
    assert told[1:] == [child for step in steps for child in step.children]


def test_a_step_holds_the_map_that_its_windows_come_from() -> None:
    steps, _ = watched("oracle")
    assert [step.tile.depth for step in steps if step.children] == [0]
    seen = steps[0].scale_map
    assert seen is not None
    assert (seen.classes == 1).any()
    assert len(steps[0].result.detections) == 0
    assert sum(len(step.result.detections) for step in steps[1:]) >= 4


def test_a_failed_look_is_a_step_that_says_why() -> None:
    steps: list[Step] = []
    policy = parse_policy("scalenet", input_side=64, iou_threshold=0.65)
    broken = BrokenScale(ConstantScale(scale_class=1), image_id=1)
    recursive_detect(
        np.zeros((64, 64, 3), np.uint8),
        1,
        policy,
        detect=PerfectDetector(12, input_side=64),
        predict_scale=broken,
        observe=steps.append,
    )
    (step,) = steps
    assert step.children == ()
    assert step.result.failure is not None
    assert step.result.failure.stage == "look"
