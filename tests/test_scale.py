"""Scale classes, targets, and scale maps from boxes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.scale import (
    CLASS_BOUNDS,
    IGNORE,
    NUM_CLASSES,
    UNIT_AREA,
    ScaleMap,
    class_of_area,
    class_target,
    scale_map_of_boxes,
)


def _one_hot(classes: np.ndarray) -> np.ndarray:
    return (np.arange(NUM_CLASSES)[:, None, None] == classes).astype(np.float32)


# --- classes ----------------------------------------------------------------------------------------


def test_class_bounds_are_the_papers() -> None:
    # Section 'Experiments', COCO: u = 2592; < u, < 8u, < 20u, < 28u, more.
    assert UNIT_AREA == 2592
    assert CLASS_BOUNDS == (2592, 20736, 51840, 72576)


def test_an_area_on_a_bound_belongs_to_the_class_above() -> None:
    areas = [1, 2591, 2592, 20735, 20736, 51839, 51840, 72575, 72576, 262144]
    assert class_of_area(np.array(areas), 512 * 512).tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_classes_are_of_the_frame_resized_to_512() -> None:
    # In 256 x 256 an object covers a quarter of its pixels in 512 x 512: the first bound is 2592 / 4 = 648.
    assert class_of_area(np.array([647, 648]), 256 * 256).tolist() == [1, 2]
    # 640 x 480 has 307200 pixels: 2592 * 307200 / 262144 = 3037.5.
    assert class_of_area(np.array([3037, 3038]), 480 * 640).tolist() == [1, 2]


# --- maps -------------------------------------------------------------------------------------------


def test_a_map_is_of_one_form_exactly() -> None:
    for forms in ({}, {"scale": np.ones((2, 2)), "prob": np.ones((6, 2, 2))}):
        with pytest.raises(ValueError, match=r"either a regression \(scale\) or a classification \(prob\)"):
            ScaleMap(**forms)


@pytest.mark.parametrize(
    ("form", "shape"),
    [*(("scale", shape) for shape in ((2,), (1, 2, 2), (0, 3))), *(("prob", shape) for shape in ((2, 2), (5, 2, 2)))],
)
def test_a_map_of_another_shape_is_refused(form: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"{form} must be \[.*h, w\], got shape \["):
        ScaleMap(**{form: np.ones(shape)})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", ["scale", "prob", "gain"])
def test_a_value_that_is_not_finite_costs_the_tile_and_is_counted(bad: float, form: str) -> None:
    arrays = {"scale": np.ones((3, 2)), "prob": np.ones((6, 3, 2)), "gain": np.ones((3, 2))}
    arrays[form][..., 1, :] = bad
    del arrays["prob" if form == "scale" else "scale"]
    wanted = 12 if form == "prob" else 2
    with pytest.raises(TileError, match=f"the scale map has {wanted} values that are NaN or infinite: check"):
        ScaleMap(**arrays)


def test_a_gain_of_another_grid_or_below_0_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gain must be \[3, 2\] like the map, got shape \[2, 3\]"):
        ScaleMap(scale=np.ones((3, 2)), gain=np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"gain must be 0 or more, got -0\.5"):
        ScaleMap(scale=np.ones((1, 2)), gain=np.array([[1.0, -0.5]]))


def test_the_most_probable_class_is_the_cells() -> None:
    classes = np.array([[0, 5], [1, 3]])
    assert ScaleMap(prob=_one_hot(classes) * 0.5 + 0.05).classes.tolist() == classes.tolist()
    with pytest.raises(ValueError, match="classes are of a classification map, got a regression map"):
        _ = ScaleMap(scale=np.ones((2, 2))).classes


# --- targets ----------------------------------------------------------------------------------------


def _mask(hw: tuple[int, int], y0: int, x0: int, y1: int, x1: int) -> np.ndarray:
    mask = np.zeros(hw, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_small_objects_lie_on_top_in_any_order() -> None:
    masks = [_mask((4, 4), 1, 1, 3, 3), _mask((4, 4), 0, 0, 4, 4), _mask((4, 4), 1, 1, 2, 2)]
    areas = np.array([3000, 80000, 100])
    wanted = np.full((4, 4), 5)
    wanted[1:3, 1:3] = 2
    wanted[1, 1] = 1
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        target = class_target([masks[i] for i in order], areas[order], 512 * 512, (4, 4))
        assert target.dtype == np.uint8
        assert target.tolist() == wanted.tolist()


def test_crowds_are_ignored_but_objects_on_them_are_not() -> None:
    masks = [_mask((3, 3), 0, 0, 1, 1), _mask((3, 3), 0, 0, 2, 3)]
    target = class_target(masks, np.array([100, 200]), 512 * 512, (3, 3), crowd=[False, True])
    assert target.tolist() == [[1, IGNORE, IGNORE], [IGNORE, IGNORE, IGNORE], [0, 0, 0]]


def test_a_tile_without_objects_is_all_background() -> None:
    assert class_target([], np.zeros(0), 512 * 512, (2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]


# --- the maps that boxes imply ----------------------------------------------------------------------


def _cells(box: list[float], area: float = 1.0, tile_hw: tuple[int, int] = (8, 16)) -> ScaleMap:
    return scale_map_of_boxes(np.array([box]), np.array([area]), np.array([1.0]), tile_hw, (4, 4))


def test_a_box_marks_every_cell_that_it_touches_and_spreads_its_worth() -> None:
    # 8 x 16 pixels on 4 x 4 cells of 2 x 4: x from 3 to 9 touches columns 0 to 2, y from 1 to 2 row 0.
    one = _cells([3, 1, 9, 2])
    assert one.classes.tolist() == [[1, 1, 1, 0]] + [[0, 0, 0, 0]] * 3
    assert one.gain is not None
    np.testing.assert_allclose(one.gain[0], [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-6)
    assert one.gain[1:].max() == 0


def test_a_box_that_ends_on_a_border_of_cells_does_not_touch_the_next() -> None:
    assert _cells([4, 2, 8, 4]).classes.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("box", [[5, 3, 5, 3], [4, 2, 4, 2], [6, 3.5, 5, 3]])
def test_a_box_without_an_inside_still_marks_a_cell(box: list[float]) -> None:
    assert _cells(box).classes.sum() == 1


def test_only_the_part_inside_the_tile_is_worth_a_look() -> None:
    # Columns -1 and 0: half of the worth lies in the tile.
    half = _cells([-4, 0, 4, 2])
    assert half.gain is not None
    assert half.gain[0, 0] == pytest.approx(0.5)
    assert half.gain.sum() == pytest.approx(0.5)


@pytest.mark.parametrize("box", [[-9, 0, -1, 2], [0, -5, 4, 0], [16, 0, 20, 2], [0, 8, 4, 12], [100, 100, 200, 200]])
def test_a_box_outside_the_tile_marks_nothing(box: list[float]) -> None:
    outside = _cells(box)
    assert outside.classes.max() == 0
    assert outside.gain is not None
    assert outside.gain.max() == 0


def test_the_gain_of_a_cell_is_that_of_its_own_class() -> None:
    # A small object on a large one: the large one's worth on that cell is not for the small one's window.
    boxes, areas = np.array([[0, 0, 16, 8], [0, 0, 4, 2]]), np.array([128.0, 1.0])
    both = scale_map_of_boxes(boxes, areas, np.array([16.0, 5.0]), (8, 16), (4, 4))
    assert both.classes[0, :2].tolist() == [1, 5]
    assert both.gain is not None
    assert both.gain[0, :2].tolist() == [5.0, 1.0]


@given(st.integers(0, 2**32 - 1))
def test_the_worth_of_boxes_inside_the_tile_is_neither_lost_nor_doubled(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tile_hw = int(rng.integers(1, 700)), int(rng.integers(1, 700))
    hw = int(rng.integers(1, 70)), int(rng.integers(1, 70))
    corners = np.sort(rng.uniform(0, 1, (6, 2, 2)), axis=1) * [tile_hw[1], tile_hw[0]]
    worth = rng.uniform(0, 3, 6)
    # All of one class: where they overlap, their worth adds up.
    implied = scale_map_of_boxes(corners.reshape(6, 4), np.zeros(6), worth, tile_hw, hw)
    assert implied.gain is not None
    assert implied.gain.sum() == pytest.approx(worth.sum(), rel=1e-4)
    assert ((implied.gain > 0) == (implied.classes == 1)).all()
