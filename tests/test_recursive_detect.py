"""The reference from end to end: what each policy finds, what it costs, and how one image fails alone."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scalenet_ray.core.detections import Detections, Failure, ImageResult
from scalenet_ray.core.geometry import boxes_to_tile, edges_inside_image
from scalenet_ray.core.inference import OracleScalePredictor
from scalenet_ray.core.policy import Policy, parse_policy
from scalenet_ray.core.recursion import expand, recursive_detect
from scalenet_ray.core.scale import ScaleRange
from tests.oracles import (
    BREAKING,
    BrokenScale,
    ConstantScale,
    CountingDetector,
    FailingDetector,
    PerfectDetector,
    RandomDetector,
    RandomScale,
    SeeingScale,
    TruthOfSquares,
    clustered_squares,
    draw_squares,
    iou_of_boxes,
    rules_of,
    scattered_squares,
)

SIDE = 128
"""Scenes and detectors have this side: the whole image is seen at zoom 1."""


def _policy(name: str, **recursion: Any) -> Policy:
    policy = parse_policy(name, input_side=SIDE, iou_threshold=0.65)
    return dataclasses.replace(
        policy,
        recursion=rules_of(**({"max_windows": 16} | recursion)),
        merging=dataclasses.replace(policy.merging, edge_margin=2.0),
    )


def _tiny_scene(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clusters of squares of 7 to 11 pixels, which a detector that needs 12 cannot see at zoom 1."""
    boxes, labels = clustered_squares(seed, (SIDE, SIDE), (7, 11), 5, extent=44)
    return draw_squares((SIDE, SIDE), boxes, labels), boxes, labels


def _assert_all_found_once(found: Detections, boxes: np.ndarray, labels: np.ndarray) -> None:
    assert len(found) == len(boxes)
    for box, label in zip(boxes, labels, strict=True):
        at = max(range(len(found)), key=lambda i: iou_of_boxes(box, found.boxes[i]))
        assert np.abs(found.boxes[at] - box).max() <= 1.0
        assert found.labels[at] == label


def _assert_same(one: ImageResult, other: ImageResult) -> None:
    for field in dataclasses.fields(ImageResult):
        if field.name not in ("detections", "whole_pass"):
            assert getattr(one, field.name) == getattr(other, field.name), field.name
    assert (one.whole_pass is None) == (other.whole_pass is None)
    for mine, theirs in ((one.detections, other.detections), (one.whole_pass, other.whole_pass)):
        for field in ("boxes", "scores", "labels", "depth", "windows"):
            np.testing.assert_array_equal(getattr(mine, field, None), getattr(theirs, field, None))


# --- what is found ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_zooming_finds_what_the_plain_detector_misses(seed: int) -> None:
    image, boxes, labels = _tiny_scene(seed)
    detect = PerfectDetector(12, input_side=SIDE)
    plain = recursive_detect(image, 1, _policy("whole"), detect=detect)
    assert len(plain.detections) == 0
    oracle = OracleScalePredictor(TruthOfSquares({1: boxes}))
    for name, net in (("oracle", oracle), ("scalenet", oracle), ("scalenet", SeeingScale())):
        result = recursive_detect(image, 1, _policy(name), detect=detect, predict_scale=net)
        assert result.failure is None
        _assert_all_found_once(result.detections, boxes, labels)
        assert (result.detections.depth == 1).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.4, 0.5]))
def test_what_lies_whole_in_some_window_is_found_and_nothing_else(seed: int, window: float) -> None:
    # Scattered so that windows cut some of them: what every window cuts is lost, whatever the detector.
    boxes, labels = scattered_squares(seed, (SIDE, SIDE), (7, 11), 8)
    image = draw_squares((SIDE, SIDE), boxes, labels)
    net = OracleScalePredictor(TruthOfSquares({1: boxes}))
    policy = _policy("oracle", window=window, zoom=1 / window)
    root = policy.root(1, (SIDE, SIDE))
    cut = net([image], [root])[0]
    assert not isinstance(cut, Exception)
    whole = np.zeros(len(boxes), bool)
    for child in expand(root, cut, policy).children:
        in_tile = boxes_to_tile(boxes, child)
        # The edge filter's margin; half a pixel to either side is up to rounding.
        room = np.where(edges_inside_image(child), policy.merging.edge_margin, -1.0) * [1, 1, -1, -1]
        ends = np.array([0, 0, child.width, child.height])
        slack = (in_tile - ends - room) * [1, 1, -1, -1]
        assume(not ((slack.min(axis=1) > -0.6) & (slack.min(axis=1) < 0.6)).any())
        whole |= slack.min(axis=1) > 0
    detect = PerfectDetector(12, input_side=SIDE)
    found = recursive_detect(image, 1, policy, detect=detect, predict_scale=net).detections
    _assert_all_found_once(found, boxes[whole], labels[whole])


@pytest.mark.parametrize("seed", range(4))
def test_a_second_zoom_finds_what_one_zoom_misses(seed: int) -> None:
    boxes, labels = clustered_squares(seed, (SIDE, SIDE), (4, 5), 3, extent=24)
    image = draw_squares((SIDE, SIDE), boxes, labels)
    detect, net = PerfectDetector(12, input_side=SIDE), OracleScalePredictor(TruthOfSquares({1: boxes}))
    once = recursive_detect(image, 1, _policy("oracle"), detect=detect, predict_scale=net)
    assert len(once.detections) == 0
    twice = recursive_detect(image, 1, _policy("oracle", max_depth=2, max_windows=64), detect=detect, predict_scale=net)
    _assert_all_found_once(twice.detections, boxes, labels)
    assert (twice.detections.depth == 2).all()


def test_a_detector_that_is_unsure_of_small_things_finds_them_by_its_own_first_pass() -> None:
    image, boxes, labels = _tiny_scene(3)
    detect = PerfectDetector(3, sure_side=12, input_side=SIDE)
    plain = recursive_detect(image, 1, _policy("whole"), detect=detect)
    assert plain.detections.scores.max() == pytest.approx(0.1)
    for name in ("first-pass", "fused"):
        # Fused with a net that sees nothing: half of what the first pass says, which is over th = .3.
        policy = _policy(name, method="confidence")
        result = recursive_detect(image, 1, policy, detect=detect, predict_scale=ConstantScale(scale_class=0))
        _assert_all_found_once(result.detections, boxes, labels)
        assert result.detections.scores.min() == pytest.approx(0.9)


def test_the_first_pass_threshold_says_which_boxes_draw_a_window() -> None:
    image, _, _ = _tiny_scene(3)
    detect = PerfectDetector(3, sure_side=12, input_side=SIDE)
    policy = _policy("first-pass", first_pass_threshold=0.11)
    assert recursive_detect(image, 1, policy, detect=detect).tiles == 1


def test_fragments_at_the_border_of_a_window_are_no_detections() -> None:
    # One tiny square draws the window; the bar is cut by it and would be found as a piece.
    bar, tiny = (60, 10, 120, 40), (16, 16, 24, 24)
    image = draw_squares((SIDE, SIDE), np.array([bar, tiny]), [1, 2])
    detect, net = PerfectDetector(2, input_side=SIDE), OracleScalePredictor(TruthOfSquares({1: np.array([tiny])}))
    policy = _policy("oracle")
    found = recursive_detect(image, 1, policy, detect=detect, predict_scale=net).detections
    assert sorted(found.boxes.tolist()) == [[16, 16, 24, 24], [60, 10, 120, 40]]
    # Without the filters the piece is there: the window is x 0 to 64.
    lax = dataclasses.replace(policy.merging, edge_margin=0.0, match_size=False)
    found = recursive_detect(image, 1, dataclasses.replace(policy, merging=lax), detect=detect, predict_scale=net)
    assert [60, 10, 64, 40] in found.detections.boxes.tolist()


def test_a_window_does_not_answer_for_what_is_larger_than_it_was_cut_for() -> None:
    # The large square fits the window and would be found there too, with a better score.
    large, tiny = (36, 36, 58, 58), (60, 60, 68, 68)
    image = draw_squares((SIDE, SIDE), np.array([large, tiny]), [1, 2])
    detect, net = (
        PerfectDetector(2, sure_side=40, input_side=SIDE),
        OracleScalePredictor(TruthOfSquares({1: np.array([tiny])})),
    )
    # Class 1 ends at 2592 * 128^2 / 512^2 = 162 pixels; the large one has 484, under 8 times that and over 2.
    for keep_factor, depth, score in ((8.0, 1, 0.9), (2.0, 0, 0.1)):
        policy = _policy("oracle", keep_factor=keep_factor)
        found = recursive_detect(image, 1, policy, detect=detect, predict_scale=net).detections
        (at,) = np.flatnonzero(found.labels == 1)
        assert (found.depth[at], found.scores[at]) == (depth, pytest.approx(score))


def test_masks_come_back_on_the_pixels_of_their_window() -> None:
    image, boxes, _ = _tiny_scene(5)
    detect = PerfectDetector(12, input_side=SIDE, with_masks=True)
    net = OracleScalePredictor(TruthOfSquares({1: boxes}))
    found = recursive_detect(image, 1, _policy("oracle"), detect=detect, predict_scale=net).detections
    assert found.masks is not None
    assert len(found.masks) == len(boxes)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["grid-2", "grid-3"])
def test_a_grid_finds_small_objects_wherever_they_are(name: str, seed: int) -> None:
    # Windows of 86 and 64 pixels share 44 and 32: each square lies whole in one of them.
    boxes, labels = scattered_squares(seed, (SIDE, SIDE), (9, 11), 8)
    image = draw_squares((SIDE, SIDE), boxes, labels)
    policy = dataclasses.replace(_policy(name), overlap=0.5)
    result = recursive_detect(image, 1, policy, detect=PerfectDetector(12, input_side=SIDE))
    _assert_all_found_once(result.detections, boxes, labels)
    assert (result.detections.depth == 1).all()


def test_a_larger_input_finds_small_objects_too() -> None:
    image, boxes, labels = _tiny_scene(4)
    detect = PerfectDetector(12, input_side=SIDE)
    for policy in (_policy("whole@256"), _policy("pyramid")):
        found = recursive_detect(image, 1, policy, detect=detect).detections
        # Soft-NMS leaves the copies from the pyramid's other sizes with what their overlap does not take.
        _assert_all_found_once(found[found.scores > 0.5], boxes, labels)


def test_a_pyramid_keeps_from_each_size_what_is_in_its_valid_range() -> None:
    # In 512 x 512, 128 x 128 is 16 times smaller: 8u = 1296 pixels (36 a side), 20u = 3240 pixels (57 a side).
    boxes = np.array([[4, 4, 12, 12], [20, 20, 60, 60], [64, 64, 124, 124]])
    image = draw_squares((SIDE, SIDE), boxes, [1, 2, 3])
    policy = _policy("pyramid")
    assert [tile.valid_area for tile in expand(policy.root(1, (SIDE, SIDE)), None, policy).children] == [
        (0.0, float("inf")),
        (0.0, 3240.0),
        (0.0, 1296.0),
    ]
    detect = CountingDetector(PerfectDetector(15, input_side=SIDE))
    found = recursive_detect(image, 1, policy, detect=detect).detections
    # The 8-pixel square is seen at size 2 only; the others at size 1, and the middle one at 1.5 too: soft-NMS
    # leaves the copy with a score of .9 * (1 - 1) = 0, under the threshold.
    assert sorted(found.labels.tolist()) == [1, 2, 3]
    assert sorted(detect.sizes_hw) == [(128, 128), (192, 192), (256, 256)]


# --- digits -----------------------------------------------------------------------------------------


def test_a_digit_of_any_size_reaches_the_scale_that_its_classifier_knows() -> None:
    # One square on a canvas; the classifier knows 16 pixels, give or take a rounded step.
    for side, canvas in ((48, 84), (5, 9), (16, 28), (100, 200)):
        box = np.array([[2, 2, 2 + side, 2 + side]])
        image = draw_squares((canvas, canvas), box)
        policy = Policy(
            "digits",
            "scalenet",
            canvas,
            recursion=rules_of(
                zoom=None, window=1.0, max_depth=8, max_windows=8, scale_range=ScaleRange(0.93, 1.07), min_window_side=1
            ),
        )
        net = SeeingScale(unit_side=16.0)
        result = recursive_detect(image, 1, policy, detect=PerfectDetector(14, 18, input_side=28), predict_scale=net)
        assert len(result.detections) == 1, side
        np.testing.assert_allclose(result.detections.boxes, box, atol=max(1.0, side / 16))
        # Only the last canvas is detected.
        assert result.guards == {}
        assert result.detector_pixels <= 64 * 64


# --- what it costs ----------------------------------------------------------------------------------


def _cost(name: str, hw: tuple[int, int] = (SIDE, SIDE), **recursion: Any) -> ImageResult:
    detect = PerfectDetector(input_side=64)
    policy = parse_policy(name, input_side=64, iou_threshold=0.65)
    policy = dataclasses.replace(policy, recursion=rules_of(**({"method": "confidence"} | recursion)))
    return recursive_detect(
        np.zeros((*hw, 3), np.uint8), 1, policy, detect=detect, predict_scale=ConstantScale(scale_class=1)
    )


@pytest.mark.parametrize(
    ("name", "passes", "tiles"),
    [
        ("whole", 1.0, 1),
        ("whole@128", 4.0, 1),
        # 96 is a multiple of the stride of 32: (96 / 64)^2.
        ("whole@96", 2.25, 1),
        # 100 is padded to 128.
        ("whole@100", 4.0, 1),
        ("pyramid", 1 + 2.25 + 4, 3),
        ("grid-2", 5.0, 5),
        ("grid-3", 10.0, 10),
        ("random", 3.0, 3),
        ("scalenet", 5.0, 5),
        ("oracle", 5.0, 5),
        ("fused", 5.0, 5),
        # Nothing is on the image: the first pass sees no reason for a window.
        ("first-pass", 1.0, 1),
    ],
)
def test_passes_are_pixels_over_those_of_the_whole_image(name: str, passes: float, tiles: int) -> None:
    result = _cost(name)
    assert result.detector_passes == pytest.approx(passes)
    assert result.detector_pixels == passes * 64 * 64
    assert result.tiles == tiles


@pytest.mark.parametrize("name", ["whole", "grid-2", "first-pass", "scalenet", "fused", "oracle"])
def test_only_scale_nets_own_looks_cost_its_pixels(name: str) -> None:
    # At depth 1 nothing is looked at any more: the whole image is, once. The oracle is no network.
    assert _cost(name).look_pixels == (16 * 16 * 4 if name in ("scalenet", "fused") else 0)
    assert ConstantScale.input_pixels == 1024


def test_every_look_at_a_greater_depth_costs_too() -> None:
    assert _cost("scalenet", max_depth=2, max_windows=20).look_pixels == 1024 * 5
    assert _cost("scalenet", max_depth=2, max_windows=20).tiles == 21


@pytest.mark.parametrize("name", ["first-pass", "fused"])
@pytest.mark.parametrize("depth", [1, 2])
def test_what_the_first_pass_saw_is_not_detected_again(name: str, depth: int) -> None:
    image, _, _ = _tiny_scene(1)
    detect = CountingDetector(PerfectDetector(3, sure_side=12, input_side=SIDE))
    policy = _policy(name, max_depth=depth, max_windows=30)
    result = recursive_detect(image, 1, policy, detect=detect, predict_scale=SeeingScale())
    assert result.tiles > 1
    assert len(detect.sizes_hw) == result.tiles
    assert detect.calls == result.tiles


# --- windows that need no look ----------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 6), st.sampled_from([0.0, 0.2, 0.5, 0.9]))
def test_a_grid_covers_every_pixel_of_every_image(height: int, width: int, grid: int, overlap: float) -> None:
    policy = Policy("grid", "grid", 64, grid=grid, overlap=overlap)
    children = expand(policy.root(1, (height, width)), None, policy).children
    covered = np.zeros((height, width), bool)
    for child in children:
        covered[child.window.y0 : child.window.y1, child.window.x0 : child.window.x1] = True
        assert max(child.height, child.width) == 64
    assert covered.all()
    assert len(children) <= grid * grid
    assert len({child.window for child in children}) == len(children)


@pytest.mark.parametrize(
    ("hw", "windows"),
    [
        ((1, 1), {(0, 0, 1, 1)}),
        # 3 / 1.8 = 1.67: two rows, from 0 and 1; 1000 / 1.8 = 555.6: 556 columns, from 0 and 444.
        ((3, 1000), {(0, 0, 556, 2), (444, 0, 1000, 2), (0, 1, 556, 3), (444, 1, 1000, 3)}),
        ((1000, 3), {(0, 0, 2, 556), (1, 0, 3, 556), (0, 444, 2, 1000), (1, 444, 3, 1000)}),
    ],
)
def test_grids_of_odd_images_are_as_worked_by_hand(hw: tuple[int, int], windows: set) -> None:
    policy = parse_policy("grid-2", input_side=64, iou_threshold=0.5)
    expansion = expand(policy.root(1, hw), None, policy)
    assert {child.window.xyxy for child in expansion.children} == windows
    assert expansion.detect


def test_neighbouring_grid_windows_overlap_as_asked() -> None:
    policy = Policy("grid", "grid", 64, grid=4, overlap=0.25)
    windows = [child.window for child in expand(policy.root(1, (1, 1300)), None, policy).children]
    # 1300 / (4 - 3 * .25) = 400; neighbours share 100.
    assert [(w.x0, w.x1) for w in windows] == [(0, 400), (300, 700), (600, 1000), (900, 1300)]


def test_random_windows_are_by_seed_and_image_and_not_by_order() -> None:
    policy = parse_policy("random", input_side=64, iou_threshold=0.5)

    def windows(image_id: int, seed: int = 0) -> list[tuple[int, ...]]:
        one = dataclasses.replace(policy, seed=seed)
        return [c.window.xyxy for c in expand(one.root(image_id, (100, 200)), None, one).children]

    first = [windows(i) for i in (1, 2, 3)]
    assert [windows(i) for i in (3, 1, 2)] == [first[2], first[0], first[1]]
    assert len({tuple(w) for w in first}) == 3
    assert windows(1, seed=1) != windows(1)
    for x0, y0, x1, y1 in itertools.chain(*first):
        # A square of half the longer side, which is all of the shorter.
        assert (x1 - x0, y1 - y0) == (100, 100)


@pytest.mark.parametrize("hw", [(1, 1), (1, 2), (3, 1000)])
def test_random_windows_of_odd_images_lie_inside(hw: tuple[int, int]) -> None:
    policy = parse_policy("random", input_side=64, iou_threshold=0.5)
    for image_id in range(20):
        assert len(expand(policy.root(image_id, hw), None, policy).children) == 2


@pytest.mark.parametrize("name", ["whole", "grid-2", "random", "pyramid"])
@pytest.mark.parametrize("hw", [(1, 1), (3, 1000), (1000, 3)])
def test_images_of_odd_sizes_go_through(name: str, hw: tuple[int, int]) -> None:
    policy = parse_policy(name, input_side=64, iou_threshold=0.5)
    result = recursive_detect(np.zeros((*hw, 3), np.uint8), 1, policy, detect=PerfectDetector(1))
    assert result.failure is None
    assert result.detections.boxes.shape == (0, 4)


# --- the same always --------------------------------------------------------------------------------

ALL = ("whole", "whole@200", "pyramid", "grid-2", "random", "first-pass", "scalenet", "fused", "oracle")


@pytest.mark.parametrize("name", ALL)
def test_the_same_image_gives_the_same_result(name: str) -> None:
    image, boxes, _ = _tiny_scene(7)
    net = OracleScalePredictor(TruthOfSquares({1: boxes})) if name == "oracle" else RandomScale(5)
    policy = _policy(name, max_depth=2, large_classes=(5,))
    first = recursive_detect(image, 1, policy, detect=RandomDetector(3, input_side=SIDE), predict_scale=net)
    again = recursive_detect(image.copy(), 1, policy, detect=RandomDetector(3, input_side=SIDE), predict_scale=net)
    assert len(first.detections)
    _assert_same(first, again)


# --- one image fails alone --------------------------------------------------------------------------


def _assert_failed(result: ImageResult, failure: Failure) -> None:
    assert result.failure == failure
    # A part of the answer must not pass for the whole.
    assert result.detections.boxes.shape == (0, 4)


NAN = Failure("look", "the scale map has 16 values that are NaN or infinite: check the network's weights and precision")


@pytest.mark.parametrize("name", ["scalenet", "fused", "oracle"])
@pytest.mark.parametrize("depth", [0, 1])
def test_nan_from_scale_net_fails_the_image_at_the_look_and_no_other(name: str, depth: int) -> None:
    image, _, _ = _tiny_scene(2)
    net = BrokenScale(SeeingScale(), image_id=2, depth=depth)
    policy = _policy(name, max_depth=2)
    detect = PerfectDetector(3, input_side=SIDE)
    _assert_failed(recursive_detect(image, 2, policy, detect=detect, predict_scale=net), NAN)
    well = recursive_detect(image, 1, policy, detect=detect, predict_scale=net)
    assert well.failure is None
    assert len(well.detections)


def test_a_look_that_failed_still_costs_its_pixels() -> None:
    image, _, _ = _tiny_scene(2)
    net = BrokenScale(SeeingScale(), image_id=2)
    result = recursive_detect(image, 2, _policy("scalenet"), detect=PerfectDetector(), predict_scale=net)
    assert (result.tiles, result.look_pixels, result.detector_pixels) == (1, SeeingScale.input_pixels, 0)


BROKE = "the detector broke on this tile: its boxes are NaN"


@pytest.mark.parametrize("name", ["whole", "grid-2", "pyramid", "random", "scalenet"])
def test_a_tile_that_the_detector_breaks_on_fails_its_image_at_detection(name: str) -> None:
    image, _, _ = _tiny_scene(2)
    image[100:110, 100:110] = BREAKING
    detect = FailingDetector(PerfectDetector(3, input_side=SIDE))
    result = recursive_detect(image, 1, _policy(name), detect=detect, predict_scale=SeeingScale())
    _assert_failed(result, Failure("detect", BROKE))
    # What was computed for nothing was computed: the whole cost is told.
    assert result.detector_passes >= 1


@pytest.mark.parametrize("name", ["first-pass", "fused"])
def test_a_detector_that_breaks_on_its_first_pass_fails_the_image_at_the_look(name: str) -> None:
    image, _, _ = _tiny_scene(2)
    image[100:110, 100:110] = BREAKING
    detect = FailingDetector(PerfectDetector(3, input_side=SIDE))
    result = recursive_detect(image, 1, _policy(name), detect=detect, predict_scale=SeeingScale())
    _assert_failed(result, Failure("look", BROKE))


def test_a_detector_that_breaks_in_one_window_alone_fails_the_image_too() -> None:
    # At zoom 1 the spot is 2 pixels of 127 or less; at zoom 2 its middle is bright.
    image, _, _ = _tiny_scene(2)
    spot = np.zeros_like(image)
    spot[60, 60] = BREAKING
    net = OracleScalePredictor(TruthOfSquares({1: np.array([[58, 58, 62, 62]])}))
    whole = dataclasses.replace(_policy("oracle"), input_side=64)
    detect = FailingDetector(PerfectDetector(3, input_side=64))
    assert recursive_detect(spot, 1, dataclasses.replace(whole, kind="whole"), detect=detect).failure is None
    result = recursive_detect(spot, 1, whole, detect=detect, predict_scale=net)
    _assert_failed(result, Failure("detect", BROKE))


def test_a_policy_without_its_network_says_which_flag_gives_it() -> None:
    image, _, _ = _tiny_scene(2)
    with pytest.raises(ValueError, match="policy scalenet needs a scale map, got no Scale Net"):
        recursive_detect(image, 1, _policy("scalenet"), detect=PerfectDetector())


def test_a_bug_is_no_failure_of_an_image() -> None:
    class Buggy(PerfectDetector):
        def __call__(self, pixels: Any) -> list:
            msg = "no such layer"
            raise KeyError(msg)

    image, _, _ = _tiny_scene(2)
    with pytest.raises(KeyError, match="no such layer"):
        recursive_detect(image, 1, _policy("whole"), detect=Buggy())
