"""Answers of detectors: the accepted forms, and the errors of all others."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from scalenet_ray.core.answers import checked_answer, listed_answers, raised
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.masks import encode_mask

HW = (48, 64)
BOXES, SCORES, LABELS = [[1, 2, 30, 40], [0, 0, 64, 48]], [0.5, 1.0], [1, 2]
CLASSES = np.array([1, 2])


def checked(answer: Any, hw: tuple[int, int] = HW) -> Detections | TileError:
    return checked_answer(answer, hw, CLASSES)


def taken(answer: Any) -> Detections:
    found = checked(answer)
    assert isinstance(found, Detections), found
    return found


def reason(answer: Any) -> str:
    """Why an answer costs its image."""
    found = checked(answer)
    assert isinstance(found, TileError), found
    return found.reason


@pytest.mark.parametrize(
    "form",
    [
        lambda *parts: Detections(*parts),
        lambda *parts: parts,
        lambda *parts: [*parts],
        lambda *parts: (*parts, None),
        lambda *parts: dict(zip(("boxes", "scores", "labels"), parts, strict=True)),
        lambda *parts: {**dict(zip(("boxes", "scores", "labels"), parts, strict=True)), "image_id": 7},
        lambda *parts: tuple(torch.tensor(part, dtype=torch.float64) for part in parts),
        lambda *parts: tuple(np.array(part, np.float16) for part in parts),
    ],
)
def test_answers_in_any_of_the_usual_forms_are_the_same_detections(form: Callable[..., Any]) -> None:
    found = taken(form(BOXES, SCORES, LABELS))
    assert found.boxes.tolist() == BOXES
    assert found.scores.tolist() == SCORES
    assert found.labels.tolist() == LABELS
    assert found.masks is None
    assert len(taken(form([], [], []))) == 0


@pytest.mark.parametrize("answer", [None, "boxes", 7, np.zeros((2, 4)), (BOXES, SCORES), [], {"boxes": BOXES}, object])
def test_an_answer_of_another_type_costs_its_tile(answer: Any) -> None:
    assert re.search("the detector answered a tile wrongly: .*answer.* must ", reason(answer))


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ([[30, 30, 20, 40]], r"x0 <= x1 and y0 <= y1, got \[30.0, 30.0, 20.0, 40.0\]: is it \[x, y, width, height\]"),
        ([[5, 40, 9, 12]], "x0 <= x1 and y0 <= y1"),
        ([[0.1, 0.2, 0.5, 1.0]], "must be in pixels of the tile, got none above 1: multiply shares by its sides"),
    ],
)
def test_boxes_of_another_convention_are_said(boxes: list[list[float]], said: str) -> None:
    assert re.search(said, reason((boxes, [0.5], [1])))


def test_a_mask_says_the_size_of_its_tile() -> None:
    mask = {"size": [HW[1], HW[0]], "counts": encode_mask(np.asfortranarray(np.zeros(HW, np.uint8)))}
    assert "a mask must have the size of its tile, [48, 64], got [64, 48]" in reason(
        ([[1, 2, 3, 4]], [0.5], [1], [mask])
    )
    assert "compressed run lengths" in reason(([[1, 2, 3, 4]], [0.5], [1], [[HW[0] * HW[1]]]))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"boxes": [1, 2, 3, 4]}, r"boxes must be \[N, 4\] xyxy, got shape \[4\]"),
        ({"boxes": np.zeros((2, 5))}, r"boxes must be \[N, 4\] xyxy, got shape \[2, 5\]"),
        ({"boxes": None}, "boxes must be an array of numbers"),
        ({"boxes": "text"}, "boxes must be an array of numbers"),
        ({"boxes": [[1, 2, 3, 4]]}, r"scores must be \[1\]"),
        ({"boxes": [[0, 0, np.inf, 1]] * 2}, "NaN or infinite"),
        ({"boxes": [[0, 0, np.nan, 1]] * 2}, "NaN or infinite"),
        ({"scores": [np.nan, 0.5]}, "NaN or infinite"),
        ({"scores": [0.5]}, r"scores must be \[2\], one for each box"),
        ({"scores": [97.0, 3.0]}, "scores must be between 0 and 1, got 97: divide percentages by 100"),
        ({"scores": [-4.0, 0.5]}, "scores must be between 0 and 1, got -4: apply the sigmoid"),
        ({"labels": [1, 2, 1]}, r"labels must be \[2\], one for each box"),
        ({"labels": [1, 80]}, r"label 80 is none of its categories \(1, 2\)"),
        ({"labels": [1, -1]}, "label -1 is none of its categories"),
        ({"labels": [1, 1.5]}, "labels must be whole numbers, got 1.5"),
        ({"labels": ["square", "disc"]}, "labels must be an array of numbers"),
    ],
)
def test_what_is_wrong_in_one_answer_costs_its_tile_and_is_said(changed: dict[str, Any], said: str) -> None:
    assert re.search(said, reason({"boxes": BOXES, "scores": SCORES, "labels": LABELS, **changed}))


def test_whole_floats_are_labels_and_rounding_past_1_is_no_fault() -> None:
    found = taken((BOXES, [1.0000002, -1e-7], [1.0, 2.0]))
    assert found.labels.tolist() == [1, 2]
    assert found.scores.tolist() == [1, 0]


def test_boxes_are_clipped_to_the_tile_and_those_without_a_pixel_in_it_are_dropped() -> None:
    boxes = [[-1e30, -5, 10, 1e30], [70, 0, 90, 10], [30.4, 30, 30, 40], [5, 5, 5, 9], [63, 47, 99, 99]]
    found = taken((boxes, [0.5] * 5, [1] * 5))
    assert found.boxes.tolist() == [[0, 0, 10, 48], [63, 47, 64, 48]]


def test_good_detections_are_passed_on_as_they_are() -> None:
    found = Detections(np.array(BOXES, np.float32), np.array(SCORES, np.float32), np.array(LABELS))
    assert taken(found) is found


def mask_pixels() -> np.ndarray:
    pixels = np.zeros((2, *HW), bool)
    pixels[0, 2:40, 1:30] = pixels[1] = True
    return pixels


def run_lengths(pixels: np.ndarray) -> dict[str, Any]:
    return dict(coco_mask.encode(np.asfortranarray(pixels, np.uint8)))


@pytest.mark.parametrize(
    "form",
    [
        lambda pixels: pixels,
        lambda pixels: torch.tensor(pixels),
        lambda pixels: [*pixels],
        lambda pixels: pixels.astype(np.uint8),
        lambda pixels: [run_lengths(one)["counts"] for one in pixels],
        lambda pixels: [run_lengths(one)["counts"].decode() for one in pixels],
        lambda pixels: [run_lengths(one) for one in pixels],
    ],
)
def test_masks_in_any_of_the_usual_forms_are_run_lengths(form: Callable[[np.ndarray], Any]) -> None:
    found = taken((BOXES, SCORES, LABELS, form(mask_pixels())))
    assert found.masks is not None
    decoded = [coco_mask.decode({"size": [*HW], "counts": counts}) for counts in found.masks]
    assert np.array_equal(decoded, mask_pixels())
    assert taken(([], [], [], np.zeros((0, *HW), bool))).masks == ()


def test_a_dropped_box_takes_its_mask_along() -> None:
    found = taken(([[70, 0, 90, 10], [0, 0, 64, 48]], SCORES, LABELS, mask_pixels()))
    assert found.masks == (run_lengths(mask_pixels()[1])["counts"],)


@pytest.mark.parametrize(
    "masks",
    [
        mask_pixels()[:1],
        mask_pixels()[:, :40],
        mask_pixels() * 0.5,
        [run_lengths(mask_pixels()[0, :40])["counts"]] * 2,
        [b"", b""],
        [b"\xff\x00", b"1"],
        [None, None],
        ["\udc00", "1"],
        [run_lengths(mask_pixels()[0])["counts"]],
        7,
    ],
)
def test_masks_of_another_size_or_number_cost_their_tile(masks: Any) -> None:
    assert "mask" in reason((BOXES, SCORES, LABELS, masks))
    # As attributes of Detections they are looked at, too.
    if isinstance(masks, list) and len(masks) == 2:
        assert "mask" in reason(Detections(BOXES, SCORES, LABELS, masks=tuple(masks)))  # type: ignore[arg-type]


@pytest.mark.parametrize("answers", [[1, 2], (1, 2), iter([1, 2]), (n for n in (1, 2))])
def test_answers_may_come_in_a_list_a_tuple_or_one_by_one(answers: Any) -> None:
    assert listed_answers(answers, 2) == [1, 2]


@pytest.mark.parametrize("answers", [None, "12", {1: 1, 2: 2}, Detections(BOXES, SCORES, LABELS), np.zeros((2, 4))])  # type: ignore[arg-type]
def test_answers_in_no_list_are_refused(answers: Any) -> None:
    with pytest.raises(UserError, match="the detector must answer with a list"):
        listed_answers(answers, 2)


@pytest.mark.parametrize(("answers", "tiles"), [([], 1), ([1], 2), ([1, 2], 1)])
def test_as_many_answers_as_tiles_are_wanted(answers: list[int], tiles: int) -> None:
    with pytest.raises(UserError, match=f"must answer each tile: got {len(answers)} answers to {tiles}"):
        listed_answers(answers, tiles)


def test_an_exception_is_quoted_in_one_line_that_any_file_can_hold() -> None:
    class WordlessError(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert raised(RuntimeError("two\nlines \udc00")).reason == "the detector raised RuntimeError: two lines ?"
    assert raised(WordlessError()).reason == "the detector raised WordlessError"
    assert len(raised(RuntimeError("x" * 9999)).reason) < 400
