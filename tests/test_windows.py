"""The cover of regions by windows, against brute force and hand-computed cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalenet_ray.core.windows import CellWindow, plan_windows, top_k_mean, window_sums


@st.composite
def grids(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int]]:
    """Weights [h, w], sparse or dense, equal or not, and a window that fits."""
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = (rng.random((height, width)) < draw(st.floats(0, 1))).astype(float)
    kind = draw(st.sampled_from(["ones", "shares", "random", "huge range"]))
    if kind == "shares":
        weights *= 1.0 / weights.size
    elif kind == "random":
        weights *= rng.random((height, width))
    elif kind == "huge range":
        weights *= 10.0 ** rng.uniform(-6, 6, (height, width))
    return weights, (draw(st.integers(1, height)), draw(st.integers(1, width)))


def _brute_sums(weights: np.ndarray, window_hw: tuple[int, int]) -> np.ndarray:
    height, width = window_hw
    return np.array(
        [
            [weights[i : i + height, j : j + width].sum() for j in range(weights.shape[1] - width + 1)]
            for i in range(weights.shape[0] - height + 1)
        ]
    )


@given(grids())
def test_window_sums_equal_brute_force(case: tuple[np.ndarray, tuple[int, int]]) -> None:
    weights, window_hw = case
    np.testing.assert_allclose(
        window_sums(weights, window_hw), _brute_sums(weights, window_hw), atol=1e-12 * weights.sum()
    )


def test_window_sums_take_flags_and_small_integers_without_overflow() -> None:
    assert window_sums(np.ones((20, 20), bool), (20, 20)).tolist() == [[400.0]]
    assert window_sums(np.full((20, 20), 200, np.uint8), (20, 20)).tolist() == [[80000.0]]


@given(grids())
def test_windows_cover_all_weight_if_the_limit_allows(case: tuple[np.ndarray, tuple[int, int]]) -> None:
    weights, window_hw = case
    windows = plan_windows(weights, window_hw, limit=weights.size)
    left = weights.copy()
    for window in windows:
        left[window.cells] = 0
    # What is left, if anything, is under the rounding error of a sum.
    assert left.sum() <= 1e-9 * weights.size * weights.sum()
    assert sum(window.gain for window in windows) == pytest.approx(weights.sum(), rel=1e-6)


@given(grids())
def test_each_window_brings_what_the_best_window_of_brute_force_would(
    case: tuple[np.ndarray, tuple[int, int]],
) -> None:
    weights, window_hw = case
    left = weights.copy()
    for window in plan_windows(weights, window_hw, limit=weights.size):
        # Centring loses nothing that was covered: the gain is still that of the best window.
        assert window.gain == pytest.approx(_brute_sums(left, window_hw).max(), rel=1e-6, abs=1e-9 * weights.sum())
        assert window.gain == pytest.approx(left[window.cells].sum(), rel=1e-12)
        left[window.cells] = 0


@given(grids(), st.integers(0, 5))
def test_a_limit_or_a_price_only_shortens_the_list(case: tuple[np.ndarray, tuple[int, int]], limit: int) -> None:
    weights, window_hw = case
    everything = plan_windows(weights, window_hw, limit=weights.size)
    assert plan_windows(weights, window_hw, limit=limit) == everything[:limit]
    if everything:
        price = everything[-1].gain
        cheaper = plan_windows(weights, window_hw, limit=weights.size, price=price)
        assert cheaper == everything[: len(cheaper)]
        assert all(window.gain > price * (1 - 1e-9) for window in cheaper)


def test_the_price_ends_it() -> None:
    # Three columns apart: windows of one cell bring 5, 3 and 1.
    weights = np.array([[3.0, 0, 5.0, 0, 1.0]])
    assert [w.gain for w in plan_windows(weights, (1, 1), limit=9)] == [5, 3, 1]
    assert [w.gain for w in plan_windows(weights, (1, 1), limit=9, price=0.999)] == [5, 3, 1]
    assert [w.gain for w in plan_windows(weights, (1, 1), limit=9, price=1.0)] == [5, 3]
    assert [w.gain for w in plan_windows(weights, (1, 1), limit=9, price=5.0)] == []


@given(st.integers(0, 2**32 - 1), st.floats(1e-5, 1e5))
def test_of_equal_windows_the_topmost_then_leftmost_is_taken_whatever_the_unit(seed: int, unit: float) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(n) for n in rng.integers(2, 30, 2))
    flags = (rng.random((height, width)) < 0.2).astype(float)
    window_hw = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
    # Sums of whole numbers are exact; the same weights in another unit must give the same windows.
    exact = plan_windows(flags, window_hw, limit=5)
    scaled = plan_windows(flags * unit, window_hw, limit=5)
    assert [window[:4] for window in scaled] == [window[:4] for window in exact]


def test_ties_are_worked_by_hand() -> None:
    # Four single cells in the corners of 5 x 5, windows of 1 x 1: row by row.
    weights = np.zeros((5, 5))
    weights[[0, 0, 4, 4], [0, 4, 0, 4]] = 0.1
    assert [w[:2] for w in plan_windows(weights, (1, 1), limit=9)] == [(0, 0), (0, 4), (4, 0), (4, 4)]


def test_a_window_is_centred_on_what_it_covers() -> None:
    # One cell at (4, 6) of 9 x 9: a 3 x 3 window has it in its middle, at (3, 5).
    weights = np.zeros((9, 9))
    weights[4, 6] = 1
    assert plan_windows(weights, (3, 3), limit=9) == [CellWindow(3, 5, 3, 3, 1.0)]
    # At the border there is no room: the window stays on the grid.
    corner = np.zeros((9, 9))
    corner[0, 8] = 1
    assert plan_windows(corner, (3, 3), limit=9) == [CellWindow(0, 6, 3, 3, 1.0)]
    # Cells 2 to 4 in a window of 4: their middle is 3.5, so it starts at 1.5, rounded half up to 2.
    row = np.array([[0, 0, 1.0, 1.0, 1.0, 0, 0, 0]])
    assert plan_windows(row, (1, 4), limit=9) == [CellWindow(0, 2, 1, 4, 3.0)]
    assert plan_windows(row.T, (4, 1), limit=9) == [CellWindow(2, 0, 4, 1, 3.0)]


def test_a_window_larger_than_the_grid_is_all_of_it() -> None:
    weights = np.ones((2, 3))
    assert plan_windows(weights, (9, 9), limit=9) == [CellWindow(0, 0, 2, 3, 6.0)]
    assert plan_windows(weights, (0, 1), limit=1)[0][2:4] == (1, 1)


def test_the_weights_of_the_caller_are_left_alone() -> None:
    weights = np.ones((4, 4))
    plan_windows(weights, (2, 2), limit=9)
    assert weights.sum() == 16


# --- TopK -------------------------------------------------------------------------------------------


def test_background_does_not_count_and_nothing_at_all_is_zero() -> None:
    assert top_k_mean(np.zeros((3, 3)), 0.5) == 0.0
    assert top_k_mean(np.array([[0, 0, 0, 2.0]]), 1.0) == 2.0
    assert top_k_mean(np.array([[-3.0, 2.0]]), 1.0) == 2.0


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40), st.floats(0.01, 1.0))
def test_top_k_equals_sorting(values: list[float], k: float) -> None:
    objects = sorted((v for v in values if v > 0), reverse=True)
    top = objects[: math.ceil(k * len(objects))]
    wanted = sum(top) / len(top) if top else 0.0
    assert top_k_mean(np.array(values, np.float32), k) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("value", [1e-45, 1e-30, 3e38])
def test_top_k_of_the_smallest_and_largest_scales_is_theirs(value: float) -> None:
    assert top_k_mean(np.full((5, 5), value, np.float32), 0.15) == float(np.float32(value))
