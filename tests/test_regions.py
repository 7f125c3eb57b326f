"""The region planner: rectangles around small objects, looks at large images, and the policy made of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalenet_ray.core.candidates import (
    Candidates,
    RegionEvidence,
    candidates_of_detections,
    candidates_of_map,
    textured_cells,
)
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.expansion import expand
from scalenet_ray.core.geometry import Tile, Window, cut_tile
from scalenet_ray.core.inference import OracleScalePredictor, predict_scales
from scalenet_ray.core.policy import Policy, parse_policy
from scalenet_ray.core.recursion import Step, recursive_detect
from scalenet_ray.core.regions import Region, Regions, plan_looks, plan_regions
from scalenet_ray.core.scale import NUM_CLASSES, ScaleMap
from scalenet_ray.models.padding import stride_canvas

INPUT = 640


def _tile(height: int, width: int, zoom: float = 1.0) -> Tile:
    window = Window(0, 0, width, height)
    return Tile(
        1, (), (height, width), window, max(1, round(height * zoom)), max(1, round(width * zoom)), window_budget=10**6
    )


def _candidates(boxes: Sequence[Sequence[float]], scores: Sequence[float] | None = None) -> Candidates:
    array = np.array(boxes, np.float64).reshape(-1, 4)
    sides = np.sqrt((array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1]))
    return Candidates(array, sides, np.full(len(array), 0.5) if scores is None else np.array(scores))


def _holds(region: Region, box: Sequence[float]) -> bool:
    x0, y0, x1, y1 = region.xyxy
    return x0 <= box[0] and y0 <= box[1] and x1 >= box[2] and y1 >= box[3]


def test_a_small_object_gets_a_region_with_context_at_the_zoom_that_brings_it_to_the_target() -> None:
    box = (500, 300, 540, 340)
    (region,) = plan_regions(_candidates([box]), _tile(1000, 1000), Regions(target=64.0), INPUT)
    x0, y0, x1, y1 = region.xyxy
    assert region.width / (x1 - x0) == pytest.approx(64 / 40, rel=0.02)
    assert min(500 - x0, 300 - y0, x1 - 540, y1 - 340) >= 27  # 0.7 of the side of the object.
    # The canvas is filled: no pixel of it is computed for padding.
    assert region.width % 32 == 0
    assert region.height % 32 == 0


@pytest.mark.parametrize(
    ("box", "score", "zoom", "why"),
    [
        ((100, 100, 170, 170), 0.9, 1.0, "larger than small"),
        ((100, 100, 120, 120), 0.01, 1.0, "under the least score"),
        ((100, 100, 100, 120), 0.9, 1.0, "empty"),
        ((100, 100, 120, 120), 0.9, 1.7, "twice native is reached within a factor of 1.2"),
    ],
)
def test_what_needs_no_closer_look_gets_none(box: tuple[float, ...], score: float, zoom: float, why: str) -> None:
    assert plan_regions(_candidates([box], [score]), _tile(1000, 1000, zoom), Regions(), INPUT) == [], why


def test_the_price_decides_what_is_worth_its_pixels() -> None:
    box = (500, 300, 520, 320)
    planned = plan_regions(_candidates([box], [0.1]), _tile(1000, 1000), Regions(price=0.0), INPUT)
    (region,) = planned
    value = region.gain / (region.cells * 1024 / INPUT**2)
    assert plan_regions(_candidates([box], [0.1]), _tile(1000, 1000), Regions(price=value * 0.8), INPUT) == planned
    assert plan_regions(_candidates([box], [0.1]), _tile(1000, 1000), Regions(price=value * 1.5), INPUT) == []


def test_neighbours_share_a_region_and_distant_objects_do_not() -> None:
    near = [(100, 100, 130, 130), (140, 100, 170, 130)]
    far = [(1500, 1500, 1530, 1530)]
    regions = plan_regions(_candidates(near + far), _tile(2000, 2000, 0.5), Regions(), INPUT)
    assert len(regions) == 2
    assert sum(_holds(region, near[0]) and _holds(region, near[1]) for region in regions) == 1


def test_a_region_too_large_for_the_canvas_is_split_with_overlap() -> None:
    boxes = [(x, 500, x + 20, 520) for x in range(100, 1900, 40)]
    rules = Regions(overlap=64)
    regions = plan_regions(_candidates(boxes), _tile(1000, 2000, 0.5), rules, INPUT)
    assert len(regions) > 1
    assert all(region.width <= INPUT and region.height <= INPUT for region in regions)
    assert all(any(_holds(region, box) for region in regions) for box in boxes)
    parts = sorted(region.xyxy for region in regions)
    for (_, _, end, _), (start, *_) in itertools.pairwise(parts):
        zoom = regions[0].width / (regions[0].xyxy[2] - regions[0].xyxy[0])
        assert (end - start) * zoom >= 64


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Candidates, Tile, Regions]:
    """Candidates anywhere in a tile of any shape, and rules."""
    height, width = draw(st.integers(1, 4000)), draw(st.integers(1, 4000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.sampled_from([0, 1, 3, 20, 300]))
    starts = rng.random((count, 2)) * (width, height)
    ends = np.minimum(starts + rng.uniform(0, 120, (count, 2)), (width, height))
    boxes = np.concatenate([starts, ends], axis=1)
    rules = Regions(
        price=draw(st.sampled_from([0.0, 0.3])),
        min_side=draw(st.sampled_from([32, 128, 300])),
        small=draw(st.floats(8, 200)),
    )
    return _candidates(boxes, rng.random(count)), _tile(height, width, draw(st.floats(0.1, 1.5))), rules


@given(scenes())
def test_regions_lie_in_the_tile_fit_the_canvas_and_never_pass_twice_native(
    case: tuple[Candidates, Tile, Regions],
) -> None:
    candidates, tile, rules = case
    regions = plan_regions(candidates, tile, rules, INPUT)
    for x0, y0, x1, y1, height, width in ((*region.xyxy, region.height, region.width) for region in regions):
        assert 0 <= x0 < x1 <= tile.window.width
        assert 0 <= y0 < y1 <= tile.window.height
        assert 1 <= height <= INPUT
        assert 1 <= width <= INPUT
        # Half a pixel of rounding, of the tile or of the window's least side.
        assert width <= rules.max_native * (x1 - x0) + 1
        assert height <= rules.max_native * (y1 - y0) + 1
    assert len(regions) == len({(*region.xyxy, region.height, region.width) for region in regions})


@given(scenes())
def test_every_candidate_that_asks_lies_in_a_region_if_nothing_has_a_price(
    case: tuple[Candidates, Tile, Regions],
) -> None:
    candidates, tile, rules = case
    rules = dataclasses.replace(rules, price=0.0, overlap=10**6)
    regions = plan_regions(candidates, tile, rules, 10**5)
    zoom = max(tile.zoom_xy)
    if zoom * 1.2 >= min(zoom * rules.max_zoom, rules.max_native):
        assert not regions
        return
    _, weights = rules.zooms_and_weights(candidates, tile)
    for box, side, weight in zip(candidates.boxes, candidates.sides, weights, strict=True):
        if weight >= rules.min_score and 0 < side * zoom < rules.small:
            assert any(_holds(region, box) for region in regions)


@pytest.mark.parametrize(
    ("zoom", "side", "weight"),
    [
        # The closer look shows 48 pixels of each object, at most native counts: (1 / 0.5) ** 2 image pixels for one.
        (0.5, 30.0, 0.4),
        # 48 / 60 = 0.8 of native, from 0.5.
        (0.5, 60.0, 0.256),
        # Beyond native there is nothing more to show: it counts as 2.
        (1.0, 30.0, 0.2),
        (1.6, 30.0, 0.2),
    ],
)
def test_a_score_weighs_as_much_as_the_image_pixels_that_a_closer_look_adds(
    zoom: float, side: float, weight: float
) -> None:
    candidates = _candidates([[100.0, 100.0, 100.0 + side, 100.0 + side]], [0.1])
    _, weights = Regions().zooms_and_weights(candidates, _tile(1000, 1000, zoom))
    assert weights == pytest.approx([weight])


def test_the_order_of_candidates_changes_nothing() -> None:
    rng = np.random.default_rng(3)
    boxes = rng.uniform(0, 1900, (300, 2))
    candidates = _candidates(
        np.concatenate([boxes, boxes + rng.uniform(5, 60, (300, 2))], axis=1).tolist(), rng.random(300).tolist()
    )
    order = rng.permutation(300)
    tile = _tile(2000, 2000, 0.5)
    shuffled = Candidates(*(column[order] for column in candidates))
    first, second = (plan_regions(case, tile, Regions(), INPUT) for case in (candidates, shuffled))
    assert [region.xyxy for region in first] == [region.xyxy for region in second]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("smallest_object", 0.0),
        ("smallest_object", math.inf),
        ("look_side", -1.0),
        ("first_look", 0.5),
        ("min_contrast", -1.0),
        ("min_score", 1.5),
        ("max_zoom", 1.0),
        ("price", -0.1),
        ("price", math.nan),
        ("overlap", -1),
        ("max_depth", -1),
        ("budget", -1.0),
    ],
)
def test_a_rule_out_of_its_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field} must be"):
        Regions(**{field: value})


# --- evidence ---------------------------------------------------------------------------------------


def test_candidates_of_a_first_pass_are_in_image_pixels() -> None:
    tile = Tile(1, (0,), (1000, 1000), Window(100, 200, 300, 400), 400, 400)
    found = Detections(np.array([[20.0, 40.0, 60.0, 80.0]]), np.array([0.4]), np.array([1]))
    boxes, sides, scores = candidates_of_detections(found, tile)
    assert boxes.tolist() == [[110.0, 220.0, 130.0, 240.0]]
    assert sides.tolist() == [20.0]
    assert scores == pytest.approx([0.4])


def test_candidates_of_the_ground_truth_are_its_objects() -> None:
    objects = np.array([[50.0, 60.0, 80.0, 100.0], [400.0, 400.0, 420.0, 420.0]])
    oracle = OracleScalePredictor(lambda _: (objects, np.array([900.0, 400.0])))
    # The second object is outside the tile.
    tile = Tile(1, (0,), (1000, 1000), Window(0, 0, 300, 300), 500, 500)
    (seen,) = oracle([np.zeros((500, 500, 3), np.uint8)], [tile])
    assert isinstance(seen, ScaleMap)
    boxes, sides, _ = candidates_of_map(seen, tile, (1,), 0.3)
    np.testing.assert_allclose(boxes, objects[:1])
    np.testing.assert_allclose(sides, [30.0])


def test_candidates_of_a_class_map_are_its_connected_cells() -> None:
    prob = np.zeros((NUM_CLASSES, 10, 10), np.float32)
    prob[0] = 1.0
    prob[:, 2, 3:5], prob[:, 7, 8] = 0.0, 0.0
    prob[1, 2, 3:5], prob[1, 7, 8] = 0.9, 0.6
    boxes, sides, scores = candidates_of_map(ScaleMap(prob=prob), _tile(1000, 1000), (1,), 0.3)
    assert boxes.tolist() == [[300.0, 200.0, 500.0, 300.0], [800.0, 700.0, 900.0, 800.0]]
    assert len(set(sides.tolist())) == 1
    assert scores[0] == pytest.approx(3 * scores[1])


def test_candidates_of_a_regression_map_are_refused() -> None:
    with pytest.raises(UserError, match="regions are planned from class maps, got a regression map"):
        candidates_of_map(ScaleMap(scale=np.ones((4, 4))), _tile(100, 100), (1,), 0.3)


def test_regions_of_scale_net_are_planned_from_its_map_alone() -> None:
    policy = parse_policy("regions-scalenet", input_side=320, iou_threshold=0.5)
    tile = policy.root(1, (600, 600))
    prob = np.zeros((NUM_CLASSES, 10, 10), np.float32)
    prob[0] = 1.0
    prob[:, 8, 8] = 0.0
    prob[1, 8, 8] = 1.0

    def predict(pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        return [ScaleMap(prob=prob)] * len(tiles)

    predict.input_pixels = 0  # type: ignore[attr-defined]
    pixels = cut_tile(_image((600, 600), [(60, 60, 30)]), tile)
    (seen,) = predict_scales([pixels], [tile], policy, detect=SquareDetector(), predict_scale=predict)  # type: ignore[arg-type]
    assert isinstance(seen.evidence, RegionEvidence)
    assert seen.evidence.candidates.boxes.tolist() == [[480.0, 480.0, 540.0, 540.0]]


def test_corners_are_textured_and_edges_slopes_and_noise_are_not() -> None:
    pixels = np.full((64, 96, 3), 90, np.uint8)
    pixels[:, 48:80] = 140  # Two straight edges.
    pixels[:, :48] += np.arange(48, dtype=np.uint8)[None, :, None] // 2  # A slope.
    pixels[40:43, 8:11] = 200  # An object of three pixels.
    assert np.argwhere(textured_cells(pixels, 4.0)).tolist() == [[2, 0]]
    assert textured_cells(pixels, 0.0).all()
    assert textured_cells(np.zeros((1, 17, 3), np.uint8), 4.0).shape == (1, 2)


def test_looks_cover_what_is_textured_and_nothing_far_from_it() -> None:
    tile = _tile(6400, 6400, 0.2)
    textured = np.zeros((80, 80), bool)
    textured[10, 10] = textured[70, 60] = True
    looks = plan_looks(textured, tile, Regions(), INPUT)
    assert len(looks) == 2
    for y, x in ((10, 10), (70, 60)):
        assert any(_holds(look, (x * 80, y * 80, x * 80 + 80, y * 80 + 80)) for look in looks)
    assert all(look.width / (look.xyxy[2] - look.xyxy[0]) == pytest.approx(0.5, rel=0.01) for look in looks)
    assert plan_looks(np.zeros((80, 80), bool), tile, Regions(), INPUT) == []


def test_looks_at_an_image_full_of_texture_are_a_grid_that_covers_it() -> None:
    tile = _tile(4000, 6400, 0.2)
    looks = plan_looks(np.ones((50, 80), bool), tile, Regions(), INPUT)
    covered = np.zeros((4000, 6400), bool)
    for look in looks:
        x0, y0, x1, y1 = look.xyxy
        covered[y0:y1, x0:x1] = True
        assert max(look.height, look.width) <= 2 * INPUT
    assert covered.all()
    assert sum(look.cells for look in looks) * 1024 < 1.4 * 2000 * 3200


# --- the policy -------------------------------------------------------------------------------------


class SquareDetector:
    """Detects bright squares whose side is 8 to 200 tile pixels; what is smaller, it does not see."""

    input_side = 320
    iou_threshold = 0.5

    def __init__(self) -> None:
        self.categories = {1: "square"}

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        return stride_canvas(hw)

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        found: list[Detections | TileError] = []
        for tile in pixels:
            _, _, stats, _ = cv2.connectedComponentsWithStats((tile[..., 0] > 140).astype(np.uint8))
            boxes = [(x, y, x + w, y + h) for x, y, w, h, _ in stats[1:].tolist() if 4 <= max(w, h) <= 200]
            sides = [max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes]
            scores = [0.9 if side >= 12 else 0.1 for side in sides]
            found.append(Detections(np.array(boxes).reshape(-1, 4), np.array(scores), np.ones(len(boxes))))
        return found


def _policy(name: str = "regions", **rules: Any) -> Policy:
    policy = parse_policy(name, input_side=320, iou_threshold=0.5)
    assert policy.regions is not None
    return dataclasses.replace(policy, regions=dataclasses.replace(policy.regions, **rules))


def _image(hw: tuple[int, int], squares: Sequence[tuple[int, int, int]]) -> np.ndarray:
    image = np.full((*hw, 3), 60, np.uint8)
    for x, y, side in squares:
        image[y : y + side, x : x + side] = 220
    return image


def _found(image: np.ndarray, policy: Policy) -> tuple[int, float, list[Step]]:
    """Number of objects found with a score of 0.5, megapixels, steps."""
    steps: list[Step] = []
    result = recursive_detect(image, 1, policy, detect=SquareDetector(), observe=steps.append)
    assert result.failure is None
    assert result.zoom == max(max(step.tile.zoom_xy) for step in steps)
    return int((result.detections.scores >= 0.5).sum()), result.detector_pixels / 1e6, steps


def test_regions_find_small_objects_of_a_large_image_at_a_fraction_of_the_slices_pixels() -> None:
    squares = [(300 + 400 * i, 200 + 330 * (i % 4), 16) for i in range(8)] + [(3000, 2400, 500)]
    image = _image((3000, 4000), squares)
    whole, _, _ = _found(image, parse_policy("whole", input_side=320, iou_threshold=0.5))
    sliced, slice_cost, _ = _found(image, parse_policy("slices@320", input_side=320, iou_threshold=0.5))
    zoomed, cost, steps = _found(image, _policy())
    assert (whole, sliced, zoomed) == (1, 9, 9)
    assert cost < slice_cost / 10
    assert {step.tile.depth for step in steps} >= {0, 1, 2}


def test_an_image_that_fits_the_first_look_has_one_look() -> None:
    root = _policy().root(1, (400, 600))
    assert (root.height, root.width) == (213, 320)
    root = _policy().root(1, (900, 1200))  # Half of native, under twice the input side.
    assert (root.height, root.width) == (450, 600)
    root = _policy().root(1, (3000, 4000))
    assert max(root.height, root.width) == 640
    root = _policy(smallest_object=8.0).root(1, (300, 400))
    assert max(root.height, root.width) == 400


@pytest.mark.parametrize("hw", [(1, 20_000), (20_000, 1), (7, 5), (64, 64), (321, 320)])
def test_images_of_any_shape_are_looked_at(hw: tuple[int, int]) -> None:
    count, _, steps = _found(_image(hw, []), _policy())
    assert count == 0
    assert len(steps) >= 1


def test_a_smallest_object_larger_than_the_image_asks_for_no_closer_look() -> None:
    _, _, steps = _found(_image((600, 800), [(100, 100, 20)]), _policy(smallest_object=10_000.0, min_score=1.0))
    assert [step.tile.path for step in steps] == [()]


def test_a_first_look_that_saw_nothing_is_said_and_all_that_is_textured_looked_at_again() -> None:
    # 6 pixels: 3 in the first look, which the detector does not see, and 6 at native.
    image = _image((600, 800), [(100, 100, 6), (700, 500, 6)])
    steps: list[Step] = []
    result = recursive_detect(image, 1, _policy(), detect=SquareDetector(), observe=steps.append)
    assert len(result.detections) == 2
    assert result.guards == {"nothing_seen": 1}
    assert {step.tile.depth for step in steps} == {0, 1}
    blank = recursive_detect(_image((600, 800), []), 1, _policy(), detect=SquareDetector())
    assert blank.tiles == 1


def test_of_an_image_too_large_for_one_look_the_parts_in_which_nothing_was_seen_are_looked_at_again() -> None:
    # The looks have half of native. Two squares of 6 pixels, one of them 300 pixels beside one of 40, which is seen.
    unseen, seen, beside_it = (300, 300, 6), (3400, 2500, 40), (3700, 2500, 6)
    steps: list[Step] = []
    result = recursive_detect(
        _image((3000, 4000), [unseen, seen, beside_it]), 1, _policy(), detect=SquareDetector(), observe=steps.append
    )
    assert result.guards == {"nothing_seen": 1}
    assert sorted(result.detections.boxes[:, 0].round().tolist()) == [300, 3400]
    second = [step.tile for step in steps if step.tile.depth == 2 and step.tile.window.x0 < 600]
    assert [max(tile.zoom_xy) for tile in second] == [pytest.approx(1.0, rel=0.02)]


@pytest.mark.parametrize(("score", "looks_again"), [(0.1, True), (0.29, True), (0.3, False)])
def test_uncertain_boxes_alone_do_not_keep_an_image_from_being_looked_at_again(score: float, looks_again: bool) -> None:
    policy = _policy()
    root = policy.root(1, (600, 800))
    boxes = np.array([[100.0, 100.0, 103.0, 103.0], [200.0, 100.0, 203.0, 103.0]])
    found = candidates_of_detections(Detections(boxes, np.array([score, 0.05]), np.array([1, 1])), root)
    pixels = cut_tile(_image((600, 800), [(700, 500, 6)]), root)
    evidence = policy.regions.evidence(found, pixels, root, policy.input_side)
    assert (evidence.textured is not None) == looks_again
    assert expand(root, evidence, policy).guards == (("nothing_seen",) if looks_again else ())


@pytest.mark.parametrize(("longer_side", "looks"), [(500, 1), (560, 2)])
def test_an_image_that_the_first_look_shows_nearly_at_native_is_not_looked_at_twice(
    longer_side: int, looks: int
) -> None:
    # The first look has 320 pixels: 0.64 and 0.57 of native.
    image = _image((400, longer_side), [(100, 100, 2)])
    result = recursive_detect(image, 1, _policy(), detect=SquareDetector())
    assert result.tiles == looks


@pytest.mark.parametrize("budget", [0.0, 0.1, 0.3, 1.0])
def test_no_image_costs_more_than_its_first_look_and_its_budget(budget: float) -> None:
    rng = np.random.default_rng(1)
    squares = [(*rng.integers(0, (3900, 2900)).tolist(), 16) for _ in range(60)]
    image = _image((3000, 4000), squares)
    _, cost, steps = _found(image, _policy(budget=budget))
    first = steps[0].result.detector_pixels / 1e6
    assert cost <= first + budget
    assert any("budget" in step.result.guards for step in steps)
    assert cost > first + 0.5 * budget or budget < 0.3


def test_the_depth_is_bounded() -> None:
    image = _image((3000, 4000), [(1000, 1000, 9)])
    for depth in (0, 1, 2, 3):
        _, _, steps = _found(image, _policy(max_depth=depth, smallest_object=50.0))
        assert max(step.tile.depth for step in steps) <= depth


def test_boxes_of_a_region_are_of_the_size_that_it_was_cut_for() -> None:
    policy = _policy()
    root = policy.root(1, (900, 1200))
    found = Detections(np.array([[100.0, 100.0, 110.0, 110.0]]), np.array([0.5]), np.array([1]))
    for child in expand(root, RegionEvidence(candidates_of_detections(found, root)), policy).children:
        assert child.valid_area.high == pytest.approx((1.5 * 64.0 / 0.5) ** 2)


def test_what_is_of_interest_is_looked_at_in_any_case_and_first() -> None:
    empty = np.full((3000, 4000, 3), 114, np.uint8)
    quarter = (0.5, 0.5, 1.0, 1.0)
    _, _, steps = _found(empty, _policy(of_interest=(quarter,)))
    tiles = [step.tile for step in steps[1:]]
    covered = np.zeros(empty.shape[:2], bool)
    for tile in tiles:
        covered[tile.window.y0 : tile.window.y1, tile.window.x0 : tile.window.x1] = True
        assert max(tile.zoom_xy) == pytest.approx(1.0, rel=0.02)
    assert covered[1500:, 2000:].all()
    assert not covered[:1400, :1900].any()
    seen = _candidates([(500, 300, 520, 320)])
    regions = plan_regions(seen, _tile(1000, 1000, 0.5), Regions(of_interest=((0.6, 0.6, 0.7, 0.7),)), INPUT)
    assert [_holds(region, (600, 600, 700, 700)) for region in regions] == [True, False]
    assert _holds(regions[1], (500, 300, 520, 320))


@pytest.mark.parametrize("rectangle", [(0.5, 0.0, 0.5, 1.0), (-0.1, 0.0, 1.0, 1.0), (0.0, 0.0, 640.0, 480.0)])
def test_a_rectangle_of_interest_that_is_not_in_shares_of_the_image_is_refused(rectangle: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="of_interest must hold shares of the image"):
        Regions(of_interest=(rectangle,))  # type: ignore[arg-type]


def test_a_regions_policy_needs_evidence() -> None:
    with pytest.raises(UserError, match="regions are planned from evidence"):
        Policy("mine", "grid", 320, regions=Regions())


def test_slices_cover_the_image_at_native_and_overlap() -> None:
    policy = parse_policy("slices@320", input_side=320, iou_threshold=0.5)
    tiles = expand(policy.root(1, (1000, 700)), None, policy).children
    covered = np.zeros((1000, 700), int)
    for tile in tiles:
        covered[tile.window.y0 : tile.window.y1, tile.window.x0 : tile.window.x1] += 1
        assert tile.zoom_xy == (1.0, 1.0)
    assert covered.min() == 1
    assert len(tiles) == 4 * 3
    assert expand(policy.root(1, (320, 200)), None, policy).children == ()
    narrow = expand(policy.root(1, (1000, 200)), None, policy).children
    assert {(tile.window.width, tile.window.height) for tile in narrow} == {(200, 320)}
