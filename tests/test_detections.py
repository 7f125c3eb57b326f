"""The invariants of Detections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from scalenet_ray.core.detections import Detections
from tests.oracles import equal_detections


def _some(count: int, *, first: int = 0, masks: bool = False) -> Detections:
    rows = np.arange(first, first + count)
    return Detections(
        np.stack([rows, rows, rows + 1, rows + 2], axis=1),
        rows / 100,
        rows,
        rows,
        np.stack([rows] * 4, axis=1),
        tuple(b"%d" % row for row in rows) if masks else None,
    )


def _assert_empty(found: Detections) -> None:
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)
    assert found.windows.shape == (0, 4)
    for rows in (found.scores, found.labels, found.depth):
        assert rows.shape == (0,)


def _assert_dtypes(found: Detections) -> None:
    assert (found.boxes.dtype, found.scores.dtype) == (np.float32, np.float32)
    assert (found.labels.dtype, found.depth.dtype, found.windows.dtype) == (np.int64, np.int64, np.int64)


def test_nothing_found_keeps_four_columns_whatever_is_done_to_it() -> None:
    empty = Detections.empty()
    _assert_empty(empty)
    _assert_empty(empty[np.zeros(0, bool)])
    _assert_empty(empty[np.zeros(0, np.int64)])
    _assert_empty(Detections.concatenate([]))
    _assert_empty(Detections.concatenate([empty, empty]))
    _assert_empty(_some(3)[np.zeros(3, bool)])
    _assert_empty(_some(3)[np.flatnonzero(np.zeros(3))])
    _assert_empty(Detections(np.zeros((0, 4)), np.array([]), np.array([])))
    assert empty.areas.shape == (0,)


def test_every_way_to_make_them_gives_the_stated_types() -> None:
    plain = Detections([[0, 0, 1, 1]], [1], [3])  # type: ignore[arg-type]
    for found in (plain, Detections.empty(), _some(2)[np.array([1])], Detections.concatenate([plain, _some(2)])):
        _assert_dtypes(found)
    assert plain.depth.tolist() == [0]
    assert plain.windows.tolist() == [[0, 0, 0, 0]]
    assert plain.masks is None


@pytest.mark.parametrize("nothing", [[], (), np.zeros(0), np.zeros((0, 4)), np.zeros((0, 5)), torch.zeros(0), [[]][:0]])
def test_no_boxes_may_be_given_as_any_empty_list(nothing: Any) -> None:
    _assert_empty(Detections(nothing, [], []))  # type: ignore[arg-type]
    _assert_empty(Detections(nothing, nothing, nothing))


@pytest.mark.parametrize(
    "numbers",
    [
        lambda values: values,
        lambda values: tuple(map(np.float16, values)),
        lambda values: np.array(values, np.float16),
        lambda values: np.array(values, np.int8),
        lambda values: np.array(values, ">f8"),
        lambda values: torch.tensor(values, dtype=torch.bfloat16),
        lambda values: torch.tensor(values, dtype=torch.float16),
        lambda values: torch.tensor(values, dtype=torch.float64, requires_grad=True),
        lambda values: torch.tensor(values, dtype=torch.uint8),
        lambda values: [torch.tensor(float(value), requires_grad=True) for value in values],
    ],
)
def test_numbers_of_any_kind_are_taken_for_what_they_are(numbers: Callable[[list[int]], Any]) -> None:
    rows = [numbers([0, 1, 2, 3]), numbers([4, 5, 6, 7])]
    boxes = torch.stack(rows) if isinstance(rows[0], torch.Tensor) else rows  # type: ignore[arg-type]
    found = Detections(boxes, numbers([1, 0]), numbers([7, 2]))  # type: ignore[arg-type]
    _assert_dtypes(found)
    assert found.boxes.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found.scores.tolist() == [1, 0]
    assert found.labels.tolist() == [7, 2]


def test_finite_boxes_stay_finite() -> None:
    found = Detections([[-1e300, 0, 10**30, 1e300]], [1], [1])  # type: ignore[arg-type]
    assert np.isfinite(found.boxes).all()
    assert np.isinf(Detections([[0, 0, np.inf, 1]], [1], [1]).boxes).sum() == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("label", [2.5, float("nan"), float("inf"), 1e300])
def test_labels_that_are_not_whole_are_refused(label: float) -> None:
    with pytest.raises(ValueError, match="labels must be whole numbers, got"):
        Detections([[0, 0, 1, 1]], [1], [label])  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [None, "text", ["1"], [None], [[0, 1], [2]], {1: 2}, [1j], object()])
def test_what_is_no_number_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(ValueError, match="boxes must be"):
        Detections(wrong, [1], [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scores must be"):
        Detections([[0, 0, 1, 1]], wrong, [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels must be"):
        Detections([[0, 0, 1, 1]], [1], wrong)  # type: ignore[arg-type]


def test_boxes_of_another_shape_are_refused() -> None:
    for boxes in (np.zeros(4), np.zeros((2, 5)), np.zeros((1, 2, 4)), np.zeros((1, 0))):
        with pytest.raises(ValueError, match=r"boxes must be \[N, 4\] xyxy, got shape \["):
            Detections(boxes, [], [])  # type: ignore[arg-type]


def test_a_missing_score_label_depth_window_or_mask_is_refused_by_name() -> None:
    boxes, two = np.zeros((2, 4)), np.zeros(2)
    with pytest.raises(ValueError, match=r"scores must be \[2\], one for each box, got shape \[1\]"):
        Detections(boxes, np.zeros(1), two)
    with pytest.raises(ValueError, match=r"labels must be \[2\], one for each box, got shape \[2, 1\]"):
        Detections(boxes, two, np.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"depth must be \[2\]"):
        Detections(boxes, two, two, np.zeros(3))
    with pytest.raises(ValueError, match=r"windows must be \[2, 4\] xyxy, got shape \[2\]"):
        Detections(boxes, two, two, windows=two)
    with pytest.raises(ValueError, match="masks must be one for each of 2 boxes, got 1"):
        Detections(boxes, two, two, masks=(b"",))


def test_positions_and_flags_take_the_same_rows_masks_included() -> None:
    found = _some(4, masks=True)
    by_flag = found[np.array([False, True, False, True])]
    assert equal_detections(by_flag, found[np.array([1, 3])])
    assert by_flag.scores.tolist() == pytest.approx([0.01, 0.03])
    assert by_flag.windows[:, 0].tolist() == [1, 3]
    assert by_flag.masks == (b"1", b"3")
    assert found[np.array([3, 0])].masks == (b"3", b"0")


def test_joining_keeps_the_order_and_every_column() -> None:
    joined = Detections.concatenate([_some(2, masks=True), Detections.empty(), _some(3, first=2, masks=True)])
    assert equal_detections(joined, _some(5, masks=True))


def test_masks_survive_joining_only_if_every_part_with_boxes_has_them() -> None:
    with_masks, without = _some(2, masks=True), _some(1)
    assert Detections.concatenate([with_masks, without]).masks is None
    assert Detections.concatenate([with_masks, Detections.empty()]).masks == (b"0", b"1")


def test_areas_are_of_boxes_and_never_negative() -> None:
    found = Detections([[0, 0, 2, 3], [5, 5, 4, 9], [1, 1, 1, 9]], [1, 1, 1], [1, 1, 1])  # type: ignore[arg-type]
    assert found.areas.tolist() == [6.0, 0.0, 0.0]
