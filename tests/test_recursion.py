"""Algorithm 1: what becomes of a tile, that it always ends, and that zooming finds what was too small."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalenet_ray.core.geometry import ANY_AREA, AreaRange, Tile
from scalenet_ray.core.inference import ScalePredictor
from scalenet_ray.core.policy import Policy, Recursion
from scalenet_ray.core.recursion import Expansion, expand
from scalenet_ray.core.scale import NUM_CLASSES, ScaleMap, ScaleRange
from tests.oracles import (
    ConstantScale,
    OscillatingScale,
    RandomScale,
    rules_of,
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


@settings(deadline=None, max_examples=300)
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


@settings(deadline=None, max_examples=200)
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


@settings(deadline=None, max_examples=150)
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


def test_the_limit_on_windows_is_shared_among_children() -> None:
    # 7 windows, 2 taken at once: 5 are left for two children, 3 and 2.
    policy = _policy(max_windows=7, max_depth=3)
    corners = np.zeros((8, 8))
    corners[0, 0] = corners[7, 7] = 1
    children = expand(policy.root(1, (64, 64)), _classes(corners), policy).children
    assert [child.window_budget for child in children] == [3, 2]


def test_a_chain_that_runs_out_of_windows_says_so() -> None:
    policy = _topk(max_windows=2, max_depth=10)
    walked = _walk(policy.root(1, (84, 84)), policy, OscillatingScale())
    assert [tile.depth for tile, _ in walked] == [0, 1, 2]
    assert _guards(walked) == ["max_windows"]
    assert [expansion.detect for _, expansion in walked] == [False, False, True]


def test_windows_used_up_before_the_last_depth_are_counted_for_each_tile_that_goes_without_a_look() -> None:
    policy = _policy(max_windows=4, max_depth=2)
    walked = _walk(policy.root(1, (64, 64)), policy, ConstantScale(scale_class=1))
    assert [tile.depth for tile, _ in walked] == [0, 1, 1, 1, 1]
    assert _guards(walked) == ["max_windows"] * 4


def test_an_image_that_may_have_no_windows_is_detected_whole() -> None:
    policy = _policy(max_windows=0)
    assert expand(policy.root(1, (64, 64)), None, policy) == Expansion(detect=True, guards=("max_windows",))


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


@pytest.mark.parametrize("least", [1, 16])
@pytest.mark.parametrize("hw", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_an_image_too_small_to_be_cut_is_detected_whole(hw: tuple[int, int], least: int) -> None:
    policy = _policy(window=0.4, zoom=2.5, min_window_side=least, max_windows=100)
    expansion = expand(policy.root(1, hw), _classes(np.ones((4, 4))), policy)
    assert expansion.detect
    assert expansion.children == ()
    assert set(expansion.guards) == {"min_window_side"}


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


def test_a_thin_tile_keeps_to_the_limit_on_pixels_too() -> None:
    # 1 x 64 at zoom 50 would be 50 x 3200; one row of pixels is the least, and 10 of them the most.
    policy = _policy(window=1.0, zoom=50.0, max_tile_pixels=10)
    (child,) = expand(policy.root(1, (10, 640)), _classes(np.ones((2, 2))), policy).children
    assert child.height * child.width <= 10


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


def test_a_limit_is_spent_on_large_objects_first() -> None:
    policy = _policy(large_classes=(5,), max_windows=1)
    grid = np.array([[5, 0], [0, 1]])
    expansion = expand(policy.root(1, (64, 64)), _classes(grid), policy)
    assert [child.height for child in expansion.children] == [16]
    assert expansion.guards == ("max_windows",)


def test_topk_handles_both_directions() -> None:
    policy = _topk(window=0.5, scale_range=ScaleRange(0.5, 2.0))
    scale = np.zeros((8, 8))
    scale[0, 0], scale[7, 7], scale[0, 7] = 4.0, 0.25, 1.0
    expansion = expand(policy.root(1, (84, 84)), ScaleMap(scale=scale), policy)
    # 42 pixels by 1 / 4 and by 4.
    assert [(child.window.xyxy, child.height) for child in expansion.children] == [
        ((0, 0, 42, 42), 10),
        ((42, 42, 84, 84), 168),
    ]


def test_nothing_out_of_range_is_finished() -> None:
    policy = _policy(large_classes=(5,))
    in_range = _classes([[0, 2], [3, 4]])
    assert expand(policy.root(1, (64, 64)), in_range, policy) == Expansion(detect=True)
    digits = _topk()
    in_range = ScaleMap(scale=np.array([[0.0, 1.0], [0.99, 1.05]], np.float32))
    assert expand(digits.root(1, (84, 84)), in_range, digits) == Expansion(detect=True)


# --- method 1 and method 2 --------------------------------------------------------------------------


def _probabilities(class_1: float) -> ScaleMap:
    """One cell whose most probable class is background unless class 1 is above a half."""
    prob = np.zeros((NUM_CLASSES, 1, 1))
    prob[0], prob[1] = 1 - class_1, class_1
    return ScaleMap(prob=prob)


@pytest.mark.parametrize(
    ("method", "class_1", "cut"),
    [("class", 0.51, True), ("class", 0.49, False), ("confidence", 0.31, True), ("confidence", 0.29, False)],
)
def test_method_1_asks_for_the_class_and_method_2_for_its_confidence(method: str, class_1: float, cut: bool) -> None:
    policy = _policy(method=method, threshold=0.3)
    expansion = expand(policy.root(1, (64, 64)), _probabilities(class_1), policy)
    assert len(expansion.children) == cut


def test_a_confidence_of_just_the_threshold_does_not_exceed_it() -> None:
    policy = _policy(method="confidence", threshold=0.5)
    assert expand(policy.root(1, (64, 64)), _probabilities(0.5), policy).children == ()


def test_the_confidence_of_several_small_classes_adds_up() -> None:
    policy = _policy(method="confidence", small_classes=(1, 2), threshold=0.3)
    prob = np.zeros((NUM_CLASSES, 1, 1))
    prob[:4, 0, 0] = [0.6, 0.2, 0.2, 0.0]
    assert len(expand(policy.root(1, (64, 64)), ScaleMap(prob=prob), policy).children) == 1


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


def test_a_digit_of_scale_3_is_rescaled_by_a_third() -> None:
    policy = _topk()
    expansion = expand(policy.root(1, (84, 84)), ScaleMap(scale=np.full((6, 6), 3.0)), policy)
    assert not expansion.detect
    assert [(c.window.xyxy, c.height, c.width, c.valid_area) for c in expansion.children] == [
        ((0, 0, 84, 84), 28, 28, ANY_AREA)
    ]


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


def test_a_small_digit_grows_from_the_original_pixels() -> None:
    # 8 / .5 = 16, of the same window: no tile is cut from a tile.
    policy = _topk(side=8)
    walked = _walk(policy.root(1, (8, 8)), policy, _Chain(0.5, 1.0))
    assert [(tile.window.xyxy, tile.height) for tile, _ in walked] == [((0, 0, 8, 8), 8), ((0, 0, 8, 8), 16)]


def test_a_canvas_with_scales_on_both_sides_has_one_child_and_not_two() -> None:
    # What a network says is never exactly 0 or 1: a few cells are always under R_L.
    policy = _topk()
    scale = np.full((6, 6), 3.0)
    scale[0, 0] = 0.5
    expansion = expand(policy.root(1, (84, 84)), ScaleMap(scale=scale), policy)
    assert [(child.path, child.height) for child in expansion.children] == [((0,), 28)]


def test_a_window_whose_topk_is_in_range_is_finished() -> None:
    # One cell of 36 is too large, but the mean of the top 15 % (six cells) is (1.2 + 5 * 1.0) / 6 = 1.033.
    policy = _topk()
    scale = np.full((6, 6), 1.0)
    scale[2, 3] = 1.2
    assert expand(policy.root(1, (84, 84)), ScaleMap(scale=scale), policy) == Expansion(detect=True)


def test_a_topk_on_a_bound_of_the_range_is_in_range() -> None:
    # With k = 1 the means are (3 + 1) / 2 = 2 and (.25 + .75) / 2 = .5.
    policy = _topk(k=1.0, scale_range=ScaleRange(0.5, 2.0))
    for scale in ([[3.0, 1.0]], [[0.25, 0.75]]):
        assert expand(policy.root(1, (84, 84)), ScaleMap(scale=np.array(scale)), policy) == Expansion(detect=True)


def test_a_finished_window_is_detected_even_where_another_window_covers_it() -> None:
    # Too large at (2, 3): its window of 4 x 4, rows 1 to 4, averages (2.1 + .1) / 2 = 1.1, in range. Too small: rows 2
    # to 5 average (2.1 + .1 + .1 + .1) / 4 = .6 and are rescaled, all four cells of them.
    policy = _topk(window=0.5, k=1.0, scale_range=ScaleRange(0.8, 2.0))
    scale = np.zeros((8, 8))
    scale[2, 3], scale[2, 4], scale[5, 3], scale[5, 4] = 2.1, 0.1, 0.1, 0.1
    expansion = expand(policy.root(1, (80, 80)), ScaleMap(scale=scale), policy)
    assert [child.window.xyxy for child in expansion.children] == [(20, 20, 60, 60)]
    assert expansion.detect


def test_a_window_keeps_the_centre_of_its_cells_rounded_half_up() -> None:
    # Half of 5 pixels is a window of 2; the cell's centre is at 2.5 along both axes: 2.5 - 1 = 1.5, so from 2.
    policy = _policy()
    grid = np.zeros((5, 5))
    grid[2, 2] = 1
    (child,) = expand(policy.root(1, (5, 5)), _classes(grid), policy).children
    assert child.window.xyxy == (2, 2, 4, 4)


def test_topk_detects_no_tile_whose_objects_all_lie_in_its_windows() -> None:
    policy = _topk(window=0.5)
    scale = np.zeros((8, 8))
    scale[0, 0], scale[7, 7] = 3.0, 4.0
    expansion = expand(policy.root(1, (84, 84)), ScaleMap(scale=scale), policy)
    assert len(expansion.children) == 2
    assert not expansion.detect


def test_with_windows_under_the_whole_what_is_in_range_elsewhere_is_still_detected() -> None:
    policy = _topk(window=0.5)
    scale = np.zeros((8, 8))
    scale[0, 0], scale[7, 7] = 3.0, 1.0
    expansion = expand(policy.root(1, (84, 84)), ScaleMap(scale=scale), policy)
    assert [child.window.xyxy for child in expansion.children] == [(0, 0, 42, 42)]
    assert expansion.detect


def test_what_a_limit_leaves_to_topk_is_detected_as_it_is() -> None:
    policy = _topk(window=0.5, max_windows=1)
    scale = np.zeros((8, 8))
    scale[0, 0] = scale[7, 7] = 3.0
    expansion = expand(policy.root(1, (84, 84)), ScaleMap(scale=scale), policy)
    assert len(expansion.children) == 1
    assert expansion.guards == ("max_windows",)
    assert expansion.detect


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


def test_a_window_for_large_objects_keeps_the_mirror_of_it() -> None:
    policy = _policy(side=512, large_classes=(5,), keep_factor=2.0)
    (child,) = expand(policy.root(1, (512, 512)), _classes([[5]]), policy).children
    # Class 5 begins at 28u = 72576; up to 2 times smaller.
    assert child.valid_area == AreaRange(36288.0, math.inf)


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
