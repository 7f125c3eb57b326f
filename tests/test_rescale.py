"""Canvases, and their recursive rescaling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.scale import ScaleMap, ScaleRange
from scalenet_ray.experiments.data import centred, resized
from scalenet_ray.experiments.rescale import RescaleRules, canvas_recursion, rescale_canvases

UNIT = 16
RANGE = ScaleRange(0.95, 1.05)


def square(side: int, canvas: int | None = None) -> np.ndarray:
    """A white object of `side` pixels, in the middle of a black canvas."""
    return centred(np.full((side, side, 3), 255, np.uint8), canvas or side)


class KnowsScale:
    """Scale predictor of white squares: `answer` of the true scale.

    Args:
        answer: true scale, 1 for 16 pixels -> predicted scale.
    """

    input_pixels = 0

    def __init__(self, answer: Callable[[float], float] = lambda scale: scale) -> None:
        self.answer = answer
        self.batches: list[tuple[int, int]] = []

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        assert len({canvas.shape for canvas in pixels}) == 1
        assert [canvas.shape[:2] for canvas in pixels] == [(tile.height, tile.width) for tile in tiles]
        self.batches.append((len(pixels), pixels[0].shape[0]))
        maps: list[ScaleMap | TileError] = []
        for canvas in pixels:
            on_object = canvas[..., 0] > 127
            maps.append(ScaleMap(scale=on_object * np.float32(self.answer(on_object.any(0).sum() / UNIT))))
        return maps


def rescale(pictures: list[np.ndarray], net: KnowsScale, rules: RescaleRules = RescaleRules(), depth: int = 20) -> list:  # noqa: B008
    return rescale_canvases(pictures, canvas_recursion(RANGE, k=1.0, max_depth=depth), rules, net)


# --- the recursion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [6, 8, 12, 16, 28, 56, 84, 140])
def test_an_object_of_any_size_comes_to_the_unit_scale(side: int) -> None:
    (result,) = rescale([square(side)], KnowsScale())
    assert result.sides == ((side, 16) if side != 16 else (16,))
    assert result.pixels.shape == (16, 16, 3)
    assert not result.capped


def test_what_is_in_range_is_looked_at_once_and_left_as_it_is() -> None:
    picture = square(16, canvas=28)
    net = KnowsScale()
    (result,) = rescale([picture], net)
    assert result.sides == (28,)
    assert result.pixels is picture
    assert net.batches == [(1, 28)]


def test_a_network_that_sees_too_little_of_the_difference_gets_there_in_steps() -> None:
    """As trained ones do: what is far out of range looks nearer than it is."""
    timid = KnowsScale(lambda scale: scale**0.5)
    small, large = rescale([square(4), square(112)], timid)
    assert len(small.sides) > 2
    assert small.sides[-1] == large.sides[-1] == 16
    assert list(small.sides) == sorted(small.sides)
    assert list(large.sides) == sorted(large.sides, reverse=True)


@given(
    sides=st.lists(st.integers(2, 60), min_size=1, max_size=4),
    answers=st.lists(st.floats(0.2, 5.0), min_size=1, max_size=30),
    even=st.booleans(),
)
def test_with_bisection_it_ends_whatever_the_network_says(sides: list[int], answers: list[float], even: bool) -> None:
    said = iter(answers * 1000)
    net = KnowsScale(lambda scale: next(said))
    recursion = canvas_recursion(RANGE, k=1.0, max_depth=200, largest_side=64)
    for result in rescale_canvases([square(side) for side in sides], recursion, RescaleRules(even=even), net):
        assert not result.capped
        assert max(result.sides) <= 64
        assert len(set(result.sides)) == len(result.sides)
        assert result.pixels.shape[0] == result.sides[-1]


def test_bisection_halves_what_is_left_after_a_reversal() -> None:
    """Too large above 20 pixels, by far, and too small below 20, by far: only 20 is in between."""
    net = KnowsScale(lambda scale: {True: 4.0, False: 0.25}[scale > 20 / UNIT] if scale != 20 / UNIT else 1.0)
    (result,) = rescale([square(64)], net)
    assert result.sides == (64, 16, 40, 28, 22, 18, 20)


def test_without_bisection_an_oscillation_is_cut_off_and_told() -> None:
    net = KnowsScale(lambda scale: 2.0 if scale > 1 else 0.5)
    (result,) = rescale([square(32)], net, RescaleRules(bisect=False), depth=9)
    assert result.capped
    assert len(result.sides) == 10
    assert set(result.sides) == {32, 16}
    (ended,) = rescale([square(32)], net)
    assert not ended.capped


def test_even_sides_and_any_sides() -> None:
    net = KnowsScale(lambda scale: 1.0 if 12.5 < scale * UNIT < 17.5 else scale * UNIT / 13.2)
    assert rescale([square(40)], net, RescaleRules(even=True))[0].sides == (40, 14)
    assert rescale([square(40)], net, RescaleRules(even=False))[0].sides == (40, 13)


def test_a_canvas_is_made_from_the_picture_or_from_the_one_before() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    said = iter([2.0, 2.0, 1.0] * 2)

    class Says:
        input_pixels = 0

        def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
            return [ScaleMap(scale=np.full(canvas.shape[:2], next(said))) for canvas in pixels]

    recursion = canvas_recursion(RANGE, k=1.0, max_depth=5)
    rules = [RescaleRules(from_original=original) for original in (True, False)]
    fresh, worn = (rescale_canvases([picture], recursion, rule, Says())[0] for rule in rules)
    assert fresh.sides == worn.sides == (64, 32, 16)
    assert np.array_equal(fresh.pixels, resized(picture, 16))
    assert np.array_equal(worn.pixels, resized(resized(picture, 32), 16))


def test_canvases_of_one_size_are_looked_at_together_and_keep_their_order() -> None:
    net = KnowsScale()
    pictures = [square(side) for side in (28, 16, 28, 8)]
    found = rescale(pictures, net)
    assert [result.sides for result in found] == [(28, 16), (16,), (28, 16), (8, 16)]
    assert net.batches == [(2, 28), (1, 16), (1, 8), (3, 16)]


def test_a_network_that_breaks_is_told_of() -> None:
    class Broken(KnowsScale):
        def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
            return [TileError("nan")] * len(pixels)

    with pytest.raises(TileError, match="nan"):
        rescale([square(28)], Broken())


def test_a_canvas_without_an_object_is_left_alone() -> None:
    (result,) = rescale([np.zeros((28, 28, 3), np.uint8)], KnowsScale())
    assert result.sides == (28,)


# --- canvases -------------------------------------------------------------------------------------------------


def test_a_picture_lies_in_the_middle_of_its_canvas() -> None:
    canvas = square(4, canvas=8)
    assert canvas[2:6, 2:6].min() == 255
    assert canvas.sum() == 16 * 3 * 255
    assert np.array_equal(centred(canvas, 4), square(4))
    assert centred(square(5), 8)[1:6, 1:6].min() == 255


def test_shrinking_sees_every_pixel_where_it_should() -> None:
    dots = np.zeros((32, 32, 3), np.uint8)
    dots[1::4, 1::4] = 255
    for method in ("bicubic", "bilinear"):
        assert resized(dots, 8, method)[2:-2, 2:-2].mean() == pytest.approx(255 / 16, abs=3)
    for method in ("nearest", "bilinear-aliased"):
        assert abs(resized(dots, 8, method)[2:-2, 2:-2].mean() - 255 / 16) > 10
