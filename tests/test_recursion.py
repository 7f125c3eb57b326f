"""Algorithm 1: the children of a tile, termination, and detection of small objects."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from scalenet_ray.core.detections import Detections, Failure, ImageResult
from scalenet_ray.core.expansion import Expansion, expand
from scalenet_ray.core.geometry import ANY_AREA, AreaRange, Tile, boxes_to_tile, edges_inside_image
from scalenet_ray.core.inference import OracleScalePredictor
from scalenet_ray.core.merge import merge_image
from scalenet_ray.core.networks import ScalePredictor
from scalenet_ray.core.policy import Policy, Recursion, parse_policy
from scalenet_ray.core.recursion import Step, recursive_detect
from scalenet_ray.core.scale import NUM_CLASSES, ScaleMap, ScaleRange
from tests.oracles import (
    BREAKING,
    BrokenScale,
    ConstantScale,
    CountingDetector,
    FailingDetector,
    OscillatingScale,
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


def _policy(kind: Any = "scalenet", *, side: int = 64, **recursion: Any) -> Policy:
    """A policy whose windows may be small, as the images here are."""
    return Policy(str(kind), kind, side, recursion=rules_of(**({"min_window_side": 1} | recursion)))


def _topk(*, side: int = 84, **recursion: Any) -> Policy:
    """The digits' policy: the window is the whole canvas, rescaled by 1 / TopK."""
    return _policy(side=side, **({"zoom": None, "window": 1.0, "max_depth": 20, "max_windows": 100} | recursion))


def _classes(grid: Any) -> ScaleMap:
    return ScaleMap(prob=np.arange(NUM_CLASSES)[:, None, None] == np.asarray(grid))


def _walk(root: Tile, policy: Policy, net: ScalePredictor) -> list[tuple[Tile, Expansion]]:
    """All tiles that come from one, with their expansions, without any pixels."""
    queue, done = deque([root]), []
    while queue:
        tile = queue.popleft()
        scale_map = net([np.zeros((1, 1, 3), np.uint8)], [tile])[0] if policy.needs_scales(tile) else None
        assert not isinstance(scale_map, Exception)
        expansion = expand(tile, scale_map, policy)
        done.append((tile, expansion))
        queue.extend(expansion.children)
    return done


def _guards(walked: list[tuple[Tile, Expansion]]) -> list[str]:
    return [name for _, expansion in walked for name in expansion.guards]


# --- it ends ----------------------------------------------------------------------------------------


@st.composite
def nets(draw: st.DrawFn) -> ScalePredictor:
    """Maps at random, constant maps from the smallest float to the largest, and one that is always wrong."""
    hw = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    kind = draw(st.sampled_from(["class", "regression", "constant class", "constant scale", "oscillating"]))
    if kind == "constant class":
        return ConstantScale(scale_class=draw(st.integers(0, 5)), hw=hw)
    if kind == "constant scale":
        return ConstantScale(draw(st.sampled_from([1e-45, 1e-20, 0.5, 0.999, 1.06, 3.0, 1e20, 3e38])), hw=hw)
    if kind == "oscillating":
        return OscillatingScale(draw(st.floats(1.1, 100)), hw)
    return RandomScale(draw(st.integers(0, 2**32 - 1)), kind, draw(st.floats(0, 1)), hw)


@st.composite
def recursions(draw: st.DrawFn) -> Recursion:
    return Recursion(
        method=draw(st.sampled_from(["class", "confidence"])),
        small_classes=draw(st.sampled_from([(), (1,), (1, 2)])),
        large_classes=draw(st.sampled_from([(), (5,), (3, 4, 5)])),
        k=draw(st.sampled_from([0.01, 0.15, 1.0])),
        window=draw(st.sampled_from([0.01, 0.33, 0.4, 0.5, 0.9, 1.0])),
        zoom=draw(st.sampled_from([None, 1.1, 2.0, 3.0, 50.0])),
        max_depth=draw(st.integers(0, 4)),
        max_windows=draw(st.integers(0, 12)),
        price=draw(st.sampled_from([0.0, 0.1])),
        min_window_side=draw(st.sampled_from([1, 16])),
        max_tile_pixels=draw(st.sampled_from([1, 2, 50, 1000, 2048 * 2048])),
    )


@given(nets(), recursions(), st.integers(1, 600), st.integers(1, 600), st.sampled_from([1, 64, 416]))
def test_recursion_ends_within_all_its_limits_on_any_input(
    net: ScalePredictor, rules: Recursion, height: int, width: int, side: int
) -> None:
    policy = Policy("scalenet", "scalenet", side, recursion=rules)
    root = policy.root(3, (height, width))
    is_class_map = getattr(net([np.zeros((1, 1, 3), np.uint8)], [root])[0], "prob", None) is not None
    if is_class_map and rules.zoom is None:
        return  # Refused with a message: test_topk_of_a_class_map_is_refused.
    walked = _walk(root, policy, net)
    windows = [tile for tile, _ in walked[1:]]
    assert len(windows) <= rules.max_windows
    assert all(tile.depth <= rules.max_depth for tile in windows)
    assert all(tile.height * tile.width <= rules.max_tile_pixels for tile in windows)
    # A side that was rounded up to one pixel is zoomed like any other: only then may a thin tile outgrow a tiny one.
    if rules.zoom is not None and rules.zoom <= 3 and side == 416:
        assert all(max(tile.height, tile.width) <= policy.largest_side for tile in windows)
    assert len({tile.path for tile, _ in walked}) == len(walked)
    for tile, expansion in walked:
        frame = tile.window
        children = expansion.children
        # Every leaf is detected, or nothing would be known of it.
        assert expansion.detect or children
        assert [child.path for child in children] == [(*tile.path, i) for i in range(len(children))]
        assert sum(child.window_budget + 1 for child in children) <= tile.window_budget
        assert len({(c.window, c.height, c.width, c.valid_area) for c in children}) == len(children)
        for child in children:
            assert frame.x0 <= child.window.x0 < child.window.x1 <= frame.x1
            assert frame.y0 <= child.window.y0 < child.window.y1 <= frame.y1
            assert (child.image_id, child.image_hw) == (3, (height, width))
            assert (child.window, child.height, child.width) != (frame, tile.height, tile.width)
    assert _walk(root, policy, net) == walked


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from([0.33, 0.4, 0.5, 1 / 3, 0.65]),
    st.sampled_from([31, 64, 416, 640]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 16]),
)
def test_a_window_at_the_zoom_that_fills_its_tile_never_outgrows_the_input_side(
    height: int, width: int, window: float, side: int, seed: int, least: int
) -> None:
    # One pixel more would grow the detector's padded canvas by a whole stride.
    policy = _policy(side=side, window=window, zoom=1 / window, max_depth=3, max_windows=9, min_window_side=least)
    for tile, _ in _walk(policy.root(1, (height, width)), policy, RandomScale(seed, share=0.2)):
        assert max(tile.height, tile.width) <= side


@given(
    st.integers(64, 800),
    st.integers(64, 800),
    st.sampled_from([0.33, 0.4, 0.5]),
    st.integers(4, 64),
    st.integers(4, 64),
    st.integers(0, 2**32 - 1),
)
def test_every_cell_that_was_out_of_range_lies_in_a_window(
    height: int, width: int, window: float, rows: int, columns: int, seed: int
) -> None:
    # From 4 cells a side on, where one is smaller than a window.
    policy = _policy(window=window, max_windows=100)
    small = np.random.default_rng(seed).random((rows, columns)) < 0.03
    root = policy.root(1, (height, width))
    windows = [child.window for child in expand(root, _classes(small), policy).children]
    for i, j in np.argwhere(small):
        y0, y1, x0, x1 = i * height / rows, (i + 1) * height / rows, j * width / columns, (j + 1) * width / columns
        # A window is of whole pixels: it may lack one of the cell's.
        assert any(w.y0 - 1 <= y0 and y1 <= w.y1 + 1 and w.x0 - 1 <= x0 and x1 <= w.x1 + 1 for w in windows)


def test_windows_are_squares_of_the_longer_side_as_far_as_the_image_reaches() -> None:
    # Half of 640 is 320: 240 rows are all of them; 312 x 416 tile pixels at zoom 2 are a full square of 416.
    policy = _policy(side=416)
    grid = np.zeros((12, 16))
    grid[0, 0] = 1
    wanted = {(480, 640): ((0, 0, 320, 320), 416, 416), (240, 640): ((0, 0, 320, 240), 312, 416)}
    for hw, (window, height, width) in wanted.items():
        for turned in (False, True):
            root = policy.root(1, (hw[1], hw[0]) if turned else hw)
            (child,) = expand(root, _classes(grid.T if turned else grid), policy).children
            xyxy = child.window.xyxy
            assert ((xyxy[1], xyxy[0], xyxy[3], xyxy[2]) if turned else xyxy) == window
            assert ((child.width, child.height) if turned else (child.height, child.width)) == (height, width)


# --- the guards -------------------------------------------------------------------------------------


def test_the_limit_on_windows_acts_once_and_is_counted() -> None:
    policy = _policy(window=0.25, max_windows=3)
    expansion = expand(policy.root(1, (64, 64)), _classes(np.ones((8, 8))), policy)
    assert len(expansion.children) == 3
    assert expansion.guards == ("max_windows",)
    enough = dataclasses.replace(policy, recursion=dataclasses.replace(policy.recursion, max_windows=16))
    expansion = expand(enough.root(1, (64, 64)), _classes(np.ones((8, 8))), enough)
    assert len(expansion.children) == 16
    assert expansion.guards == ()


def test_a_fixed_zoom_ends_at_its_depth_by_its_own_rule() -> None:
    policy = _policy(max_windows=40, max_depth=2)
    walked = _walk(policy.root(1, (64, 64)), policy, ConstantScale(scale_class=1))
    assert [tile.depth for tile, _ in walked] == [0] + [1] * 4 + [2] * 16
    assert _guards(walked) == []


def test_topk_stopped_by_the_depth_says_so() -> None:
    policy = _topk(max_depth=3)
    walked = _walk(policy.root(1, (84, 84)), policy, OscillatingScale())
    assert [(tile.depth, expansion.guards) for tile, expansion in walked] == [
        (0, ()),
        (1, ()),
        (2, ()),
        (3, ("max_depth",)),
    ]


@pytest.mark.parametrize(("hw", "cut"), [((31, 31), False), ((32, 32), True), ((31, 9), False), ((9, 32), True)])
def test_a_window_whose_longer_side_is_under_the_least_is_not_cut(hw: tuple[int, int], cut: bool) -> None:
    policy = _policy(min_window_side=16)
    expansion = expand(policy.root(1, hw), _classes(np.ones((1, 1))), policy)
    assert len(expansion.children) == cut
    assert expansion.guards == (() if cut else ("min_window_side",))
    assert expansion.detect


def test_the_least_side_is_no_limit_where_the_window_is_the_whole_canvas() -> None:
    policy = _topk(side=8, min_window_side=16)
    expansion = expand(policy.root(1, (8, 8)), ScaleMap(scale=np.full((4, 4), 0.5)), policy)
    assert [(child.height, child.width) for child in expansion.children] == [(16, 16)]
    assert expansion.guards == ()


def test_a_tile_of_too_many_pixels_is_cut_at_a_smaller_zoom() -> None:
    # 64 x 32 at zoom 2 is 128 x 64 = 8192; at most 2048 pixels: half of it along each side.
    policy = _policy(window=1.0, max_tile_pixels=2048)
    expansion = expand(policy.root(1, (640, 320)), _classes(np.ones((2, 2))), policy)
    assert expansion.guards == ("max_tile_pixels", "no_change")
    policy = _policy(window=1.0, max_tile_pixels=8000)
    (child,), guards = expand(policy.root(1, (640, 320)), _classes(np.ones((2, 2))), policy)[1:]
    # sqrt(8000 / 8192) = .988: 126.49 x 63.25.
    assert (child.height, child.width) == (126, 63)
    assert guards == ("max_tile_pixels",)


def test_a_canvas_that_would_not_change_is_finished() -> None:
    # 8 / .98 = 8.16, rounded down to 8 again.
    policy = _topk(side=8)
    expansion = expand(policy.root(1, (8, 8)), ScaleMap(scale=np.full((4, 4), 0.98)), policy)
    assert expansion == Expansion(detect=True, guards=("no_change",))


# --- large first, then small ------------------------------------------------------------------------


def test_large_is_zoomed_out_of_before_small_is_zoomed_into() -> None:
    policy = _policy(large_classes=(5,), max_windows=8)
    grid = np.zeros((8, 8), int)
    grid[0, 0], grid[0, 6:8], grid[7, 7] = 1, 5, 1
    expansion = expand(policy.root(1, (64, 64)), _classes(grid), policy)
    # Windows are half of 64; the first shows a quarter of the pixels, the others twice their zoom.
    assert [(child.window.xyxy, child.height, child.width) for child in expansion.children] == [
        ((32, 0, 64, 32), 16, 16),
        ((0, 0, 32, 32), 64, 64),
        ((32, 32, 64, 64), 64, 64),
    ]
    assert expansion.detect
    assert expansion.guards == ()


def test_nothing_out_of_range_is_finished() -> None:
    policy = _policy(large_classes=(5,))
    in_range = _classes([[0, 2], [3, 4]])
    assert expand(policy.root(1, (64, 64)), in_range, policy) == Expansion(detect=True)
    digits = _topk()
    in_range = ScaleMap(scale=np.array([[0.0, 1.0], [0.99, 1.05]], np.float32))
    assert expand(digits.root(1, (84, 84)), in_range, digits) == Expansion(detect=True)


# --- method 1 and method 2 --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "prob", "cut"),
    [
        ({"method": "class"}, [0.49, 0.51], True),
        ({"method": "class"}, [0.51, 0.49], False),
        ({"method": "confidence"}, [0.69, 0.31], True),
        ({"method": "confidence"}, [0.71, 0.29], False),
        # Just the threshold does not exceed it.
        ({"method": "confidence", "threshold": 0.5}, [0.5, 0.5], False),
        # Confidences of several small classes add up.
        ({"method": "confidence", "small_classes": (1, 2)}, [0.6, 0.2, 0.2], True),
    ],
)
def test_method_1_asks_for_the_class_and_method_2_for_its_confidence(rules: dict, prob: list, cut: bool) -> None:
    policy = _policy(**rules)
    cell = np.array(prob + [0.0] * (NUM_CLASSES - len(prob)))[:, None, None]
    assert len(expand(policy.root(1, (64, 64)), ScaleMap(prob=cell), policy).children) == cut


def test_gain_ranks_the_windows_but_only_of_what_is_out_of_range() -> None:
    policy = _policy(max_windows=8)
    grid = np.zeros((8, 8), int)
    grid[0, 0] = grid[7, 7] = 1
    gain = np.zeros((8, 8))
    gain[0, 0], gain[7, 7], gain[0, 7] = 1.0, 2.0, 9.0
    prob = np.arange(NUM_CLASSES)[:, None, None] == grid
    expansion = expand(policy.root(1, (64, 64)), ScaleMap(prob=prob, gain=gain), policy)
    assert [child.window.xyxy for child in expansion.children] == [(32, 32, 64, 64), (0, 0, 32, 32)]
    dear = dataclasses.replace(policy, recursion=dataclasses.replace(policy.recursion, price=1.5))
    expansion = expand(dear.root(1, (64, 64)), ScaleMap(prob=prob, gain=gain), dear)
    assert [child.window.xyxy for child in expansion.children] == [(32, 32, 64, 64)]


@pytest.mark.parametrize(("price", "count"), [(0.0, 3), (0.02, 2), (0.04, 1), (0.05, 0)])
def test_a_price_is_a_share_of_the_tiles_cells_on_any_grid(price: float, count: int) -> None:
    # 3, 2 and 1 of 64 cells: .047, .031 and .016; as many times four on the grid of twice the side.
    grid = np.zeros((8, 8), int)
    grid[0, 0:3], grid[7, 0:2], grid[7, 7] = 1, 1, 1
    for cells in (grid, np.kron(grid, np.ones((2, 2), int))):
        policy = _policy(max_windows=8, price=price)
        assert len(expand(policy.root(1, (64, 64)), _classes(cells), policy).children) == count


# --- TopK by hand -----------------------------------------------------------------------------------


class _Chain:
    """Says a scale for each depth."""

    input_pixels = 0

    def __init__(self, *scales: float) -> None:
        self._scales = scales

    def __call__(self, pixels: Any, tiles: Any) -> list:
        return [ScaleMap(scale=np.full((3, 3), self._scales[tile.depth])) for tile in tiles]


def test_a_chain_of_canvases_is_as_worked_by_hand() -> None:
    # 84 / 1.5 = 56; 56 / 1.4 = 40; 40 / 1.3 = 30.77; 30 / 1.06 = 28.3; in range: 28 is detected, and it alone.
    policy = _topk()
    walked = _walk(policy.root(1, (84, 84)), policy, _Chain(1.5, 1.4, 1.3, 1.06, 1.05))
    assert [(tile.height, tile.width) for tile, _ in walked] == [(n, n) for n in (84, 56, 40, 30, 28)]
    assert [expansion.detect for _, expansion in walked] == [False] * 4 + [True]
    assert _guards(walked) == []


def _scales(side: int, cells: dict[tuple[int, int], float], elsewhere: float = 0.0) -> ScaleMap:
    scale = np.full((side, side), elsewhere)
    for at, value in cells.items():
        scale[at] = value
    return ScaleMap(scale=scale)


HALF = {"window": 0.5}
BOUNDS = {"k": 1.0, "scale_range": ScaleRange(0.5, 2.0)}
WIDE = {"k": 1.0, "scale_range": ScaleRange(0.8, 2.0)}
BOTH_ENDS = ((0, 0, 40, 40), (40, 40, 80, 80))


@pytest.mark.parametrize(
    ("rules", "scales", "windows", "guards", "detect"),
    [
        # What a network says is never exactly 0 or 1: a few cells are always under R_L.
        pytest.param({}, _scales(6, {(0, 0): 0.5}, 3.0), ((0, 0, 80, 80),), (), False, id="one child, not two"),
        # The mean of the top 15 % (six cells) is (1.2 + 5 * 1.0) / 6 = 1.033.
        pytest.param({}, _scales(6, {(2, 3): 1.2}, 1.0), (), (), True, id="in range"),
        pytest.param(BOUNDS, _scales(2, {(0, 0): 3.0, (0, 1): 1.0}), (), (), True, id="on R_H"),
        pytest.param(BOUNDS, _scales(2, {(0, 0): 0.25, (0, 1): 0.75}), (), (), True, id="on R_L"),
        # Too large at (2, 3): its window, rows 1 to 4, averages (2.1 + .1) / 2 = 1.1, in range. Too small: rows 2 to 5
        # average (2.1 + .1 + .1 + .1) / 4 = .6 and are rescaled, all four cells of them.
        pytest.param(
            HALF | WIDE,
            _scales(8, {(2, 3): 2.1, (2, 4): 0.1, (5, 3): 0.1, (5, 4): 0.1}),
            ((20, 20, 60, 60),),
            (),
            True,
            id="a finished window that another one covers is detected",
        ),
        pytest.param(HALF, _scales(8, {(0, 0): 3.0, (7, 7): 4.0}), BOTH_ENDS, (), False, id="all in windows"),
        pytest.param(HALF, _scales(8, {(0, 0): 3.0, (7, 7): 1.0}), BOTH_ENDS[:1], (), True, id="one is in range"),
        pytest.param(
            HALF | {"max_windows": 1},
            _scales(8, {(0, 0): 3.0, (7, 7): 3.0}),
            BOTH_ENDS[:1],
            ("max_windows",),
            True,
            id="what a limit leaves is detected as it is",
        ),
    ],
)
def test_topk_as_worked_by_hand(rules: dict, scales: ScaleMap, windows: tuple, guards: tuple, detect: bool) -> None:
    policy = _topk(side=80, **rules)
    expansion = expand(policy.root(1, (80, 80)), scales, policy)
    assert tuple(child.window.xyxy for child in expansion.children) == windows
    assert (expansion.guards, expansion.detect) == (guards, detect)


def test_a_window_keeps_the_centre_of_its_cells_rounded_half_up() -> None:
    # Half of 5 pixels is a window of 2; the cell's centre is at 2.5 along both axes: 2.5 - 1 = 1.5, so from 2.
    policy = _policy()
    grid = np.zeros((5, 5))
    grid[2, 2] = 1
    (child,) = expand(policy.root(1, (5, 5)), _classes(grid), policy).children
    assert child.window.xyxy == (2, 2, 4, 4)


def test_topk_of_a_class_map_is_refused() -> None:
    policy = _topk()
    with pytest.raises(ValueError, match="rescales by 1 / TopK, which needs a regression map, got a class map"):
        expand(policy.root(1, (84, 84)), _classes([[1]]), policy)


# --- what a window is there to find -----------------------------------------------------------------


def test_cocos_rule_keeps_classes_1_and_2_of_the_parents_frame() -> None:
    policy = _policy(side=416)
    (child,) = expand(policy.root(1, (480, 640)), _classes([[1]]), policy).children
    # 8u = 20736 pixels of 512 x 512; 480 x 640 has 307200: 20736 * 307200 / 262144 = 24300.
    assert child.valid_area == AreaRange(0.0, 24300.0)
    # Section 'Recursive-Scale Net': a box of class 3 in the parent's frame is dropped, one of class 2 is kept. The
    # child's frame is a window of 320 x 320: 20736 * 102400 / 262144 = 8100.
    (grandchild,) = expand(child, _classes([[1]]), policy).children
    assert grandchild.valid_area == AreaRange(0.0, 8100.0)


@pytest.mark.parametrize(
    ("small", "large", "found", "keep"),
    [
        ((1, 2), (), 2, AreaRange(0.0, 8 * 20736.0)),
        ((5,), (), 5, AreaRange(0.0, math.inf)),
        ((), (1,), 1, AreaRange(0.0, math.inf)),
        ((), (2,), 2, AreaRange(2592 / 8, math.inf)),
    ],
)
def test_keep_ranges_at_the_ends_of_the_classes(small: tuple, large: tuple, found: int, keep: AreaRange) -> None:
    policy = _policy(side=512, small_classes=small, large_classes=large)
    (child,) = expand(policy.root(1, (512, 512)), _classes([[found]]), policy).children
    assert child.valid_area == keep


@pytest.mark.parametrize("scale", [0.1, 10.0])
@pytest.mark.parametrize("classes", [(), (1,)])
def test_a_regression_map_at_a_fixed_zoom_knows_no_classes_and_keeps_any_area(scale: float, classes: tuple) -> None:
    policy = _policy(small_classes=classes)
    (child,) = expand(policy.root(1, (64, 64)), ScaleMap(scale=np.array([[scale]])), policy).children
    assert child.valid_area == ANY_AREA
    assert child.height == (64 if scale < 1 else 16)


# --- The reference from end to end: what each policy finds, what it costs, and how one image fails alone


SIDE = 128
"""Scenes and detectors have this side: the whole image is seen at zoom 1."""


def _image_policy(name: str, **recursion: Any) -> Policy:
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


# --- what is found ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_zooming_finds_what_the_plain_detector_misses(seed: int) -> None:
    image, boxes, labels = _tiny_scene(seed)
    detect = PerfectDetector(12, input_side=SIDE)
    plain = recursive_detect(image, 1, _image_policy("whole"), detect=detect)
    assert len(plain.detections) == 0
    oracle = OracleScalePredictor(TruthOfSquares({1: boxes}))
    for name, net in (("oracle", oracle), ("scalenet", oracle), ("scalenet", SeeingScale())):
        result = recursive_detect(image, 1, _image_policy(name), detect=detect, predict_scale=net)
        assert result.failure is None
        _assert_all_found_once(result.detections, boxes, labels)
        assert (result.detections.depth == 1).all()


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["whole", "grid-3", "first-pass", "scalenet", "regions"]),
    st.integers(1, 40),
    st.booleans(),
)
def test_batches_find_the_same_with_fewer_calls(seed: int, name: str, batch_size: int, breaks: bool) -> None:
    image = np.random.default_rng(seed).integers(0, 100, (SIDE, SIDE + 40, 3), np.uint8)
    if breaks:
        image[:8, :8] = BREAKING
    net = RandomScale()
    policy = _image_policy(name)
    counting = [CountingDetector(FailingDetector(RandomDetector(seed))) for _ in range(2)]
    traces: list[list[Step]] = [[], []]
    results = [
        recursive_detect(image, 1, policy, detect=detect, predict_scale=net, observe=trace.append, batch_size=size)
        for detect, trace, size in zip(counting, traces, (1, batch_size), strict=True)
    ]
    assert [step.tile for step in traces[0]] == [step.tile for step in traces[1]]
    assert [step.result.failure for step in traces[0]] == [step.result.failure for step in traces[1]]
    one, other = results
    assert one.failure == other.failure
    assert (one.failure is not None) == breaks
    assert (one.tiles, one.detector_passes) == (other.tiles, pytest.approx(other.detector_passes))
    np.testing.assert_array_equal(one.detections.boxes, other.detections.boxes)
    np.testing.assert_array_equal(one.detections.scores, other.detections.scores)
    assert counting[1].calls <= counting[0].calls


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.4, 0.5]))
def test_what_lies_whole_in_some_window_is_found_and_nothing_else(seed: int, window: float) -> None:
    # Scattered so that windows cut some of them: what every window cuts is lost, whatever the detector.
    boxes, labels = scattered_squares(seed, (SIDE, SIDE), (7, 11), 8)
    image = draw_squares((SIDE, SIDE), boxes, labels)
    net = OracleScalePredictor(TruthOfSquares({1: boxes}))
    policy = _image_policy("oracle", window=window, zoom=1 / window)
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
    once = recursive_detect(image, 1, _image_policy("oracle"), detect=detect, predict_scale=net)
    assert len(once.detections) == 0
    twice = recursive_detect(
        image, 1, _image_policy("oracle", max_depth=2, max_windows=64), detect=detect, predict_scale=net
    )
    _assert_all_found_once(twice.detections, boxes, labels)
    assert (twice.detections.depth == 2).all()


def test_a_detector_that_is_unsure_of_small_things_finds_them_by_its_own_first_pass() -> None:
    image, boxes, labels = _tiny_scene(3)
    detect = PerfectDetector(3, sure_side=12, input_side=SIDE)
    plain = recursive_detect(image, 1, _image_policy("whole"), detect=detect)
    assert plain.detections.scores.max() == pytest.approx(0.1)
    policy = _image_policy("first-pass", method="confidence")
    result = recursive_detect(image, 1, policy, detect=detect)
    _assert_all_found_once(result.detections, boxes, labels)
    # The whole image's tile, which is unsure, has a vote.
    assert (result.detections.scores > 0.5).all()
    policy = dataclasses.replace(policy, merging=dataclasses.replace(policy.merging, method="nms"))
    result = recursive_detect(image, 1, policy, detect=detect)
    assert result.detections.scores.min() == pytest.approx(0.9)


def test_the_first_pass_threshold_says_which_boxes_draw_a_window() -> None:
    image, _, _ = _tiny_scene(3)
    detect = PerfectDetector(3, sure_side=12, input_side=SIDE)
    policy = _image_policy("first-pass", first_pass_threshold=0.11)
    assert recursive_detect(image, 1, policy, detect=detect).tiles == 1


def test_a_pyramid_keeps_from_each_size_what_is_in_its_valid_range() -> None:
    # In 512 x 512, 128 x 128 is 16 times smaller: 8u = 1296 pixels (36 a side), 20u = 3240 pixels (57 a side).
    boxes = np.array([[4, 4, 12, 12], [20, 20, 60, 60], [64, 64, 124, 124]])
    image = draw_squares((SIDE, SIDE), boxes, [1, 2, 3])
    policy = _image_policy("pyramid")
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
        # Nothing is on the image: the first pass sees no reason for a window.
        ("first-pass", 1.0, 1),
    ],
)
def test_passes_are_pixels_over_those_of_the_whole_image(name: str, passes: float, tiles: int) -> None:
    result = _cost(name)
    assert result.detector_passes == pytest.approx(passes)
    assert result.detector_pixels == passes * 64 * 64
    assert result.tiles == tiles


@pytest.mark.parametrize("name", ["whole", "grid-2", "first-pass", "scalenet", "oracle"])
def test_only_scale_nets_own_looks_cost_its_pixels(name: str) -> None:
    # At depth 1 nothing is looked at any more: the whole image is, once. The oracle is no network.
    assert _cost(name).look_pixels == (16 * 16 * 4 if name == "scalenet" else 0)
    assert ConstantScale.input_pixels == 1024


@pytest.mark.parametrize("depth", [1, 2])
def test_what_the_first_pass_saw_is_not_detected_again(depth: int) -> None:
    image, _, _ = _tiny_scene(1)
    detect = CountingDetector(PerfectDetector(3, sure_side=12, input_side=SIDE))
    policy = _image_policy("first-pass", max_depth=depth, max_windows=30)
    result = recursive_detect(image, 1, policy, detect=detect)
    assert result.tiles > 1
    assert len(detect.sizes_hw) == result.tiles
    assert detect.calls == result.tiles


# --- windows that need no look ----------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["whole", "grid-2", "random", "pyramid"])
@pytest.mark.parametrize("hw", [(1, 1), (3, 1000), (1000, 3)])
def test_images_of_odd_sizes_go_through(name: str, hw: tuple[int, int]) -> None:
    policy = parse_policy(name, input_side=64, iou_threshold=0.5)
    result = recursive_detect(np.zeros((*hw, 3), np.uint8), 1, policy, detect=PerfectDetector(1))
    assert result.failure is None
    assert result.detections.boxes.shape == (0, 4)


# --- one image fails alone --------------------------------------------------------------------------


def _assert_failed(result: ImageResult, failure: Failure) -> None:
    assert result.failure == failure
    # A part of the answer must not pass for the whole.
    assert result.detections.boxes.shape == (0, 4)


NAN = Failure("look", "the scale map has 16 values that are NaN or infinite: check the network's weights and precision")


@pytest.mark.parametrize("name", ["scalenet", "oracle"])
@pytest.mark.parametrize("depth", [0, 1])
def test_nan_from_scale_net_fails_the_image_at_the_look_and_no_other(name: str, depth: int) -> None:
    image, _, _ = _tiny_scene(2)
    net = BrokenScale(SeeingScale(), image_id=2, depth=depth)
    policy = _image_policy(name, max_depth=2)
    detect = PerfectDetector(3, input_side=SIDE)
    _assert_failed(recursive_detect(image, 2, policy, detect=detect, predict_scale=net), NAN)
    well = recursive_detect(image, 1, policy, detect=detect, predict_scale=net)
    assert well.failure is None
    assert len(well.detections)


BROKE = "the detector broke on this tile: its boxes are NaN"


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        *((name, "detect") for name in ("whole", "grid-2", "pyramid", "random", "scalenet")),
        ("first-pass", "look"),
    ],
)
def test_a_tile_that_the_detector_breaks_on_fails_its_image_where_it_was_asked(name: str, stage: str) -> None:
    image, _, _ = _tiny_scene(2)
    image[100:110, 100:110] = BREAKING
    detect = FailingDetector(PerfectDetector(3, input_side=SIDE))
    result = recursive_detect(image, 1, _image_policy(name), detect=detect, predict_scale=SeeingScale())
    _assert_failed(result, Failure(stage, BROKE))
    # What was computed for nothing was computed: the whole cost is told.
    assert stage == "look" or result.detector_passes >= 1


def test_a_bug_is_no_failure_of_an_image() -> None:
    class Buggy(PerfectDetector):
        def __call__(self, pixels: Any) -> list:
            msg = "no such layer"
            raise KeyError(msg)

    image, _, _ = _tiny_scene(2)
    with pytest.raises(KeyError, match="no such layer"):
        recursive_detect(image, 1, _image_policy("whole"), detect=Buggy())


# --- What an observer of the recursion is told ----------------------------------------------------


SCENE_SIDE = 128


def watched(name: str) -> tuple[list[Step], ImageResult]:
    boxes, labels = clustered_squares(1, (SCENE_SIDE, SCENE_SIDE), (7, 9), 4, extent=48)
    image = draw_squares((SCENE_SIDE, SCENE_SIDE), boxes, labels)
    policy = parse_policy(name, input_side=SCENE_SIDE, iou_threshold=0.65)
    steps: list[Step] = []
    result = recursive_detect(
        image,
        1,
        policy,
        detect=PerfectDetector(12, input_side=SCENE_SIDE),
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
