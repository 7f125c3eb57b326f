"""The check of a detector before a run: failures on every image and hidden resizing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import pytest

from scalenet_ray.core.answers import MOST_FAILED
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import OutOfMemoryError, TileError, UserError
from scalenet_ray.models.checked_detector import CheckedDetector
from scalenet_ray.models.detector_check import Agreement, agreement, follows_size, three_views, try_detector
from scalenet_ray.models.detectors import load_detector
from scalenet_ray.models.spec import SAMPLE_DETECTOR
from scalenet_ray.sample.scenes import sample_scene
from tests.oracles import PerfectDetector, draw_squares
from tests.scripted_detector import one_box, scripted

SQUARES = [np.array([[8, 8, 56, 64], [80, 16, 130, 90]]), np.array([[20, 30, 90, 100], [100, 110, 190, 180]])]
IMAGES = [draw_squares((192, 256), boxes, [1, 2]) for boxes in SQUARES]

Answer = Callable[[Sequence[np.ndarray]], Any]


def tried(answer: Answer, images: Sequence[np.ndarray] = IMAGES, **parts: Any) -> list[str]:
    return try_detector(CheckedDetector(scripted(answer=answer, **parts), "mine:Net"), images)


def perfect(tiles: Sequence[np.ndarray]) -> list[Any]:
    return PerfectDetector()(tiles)


def resized(
    to: Callable[[tuple[int, int]], tuple[float, float]],
    answer: Answer = perfect,
    interpolation: int = cv2.INTER_LINEAR,
) -> Answer:
    """A detector that resizes each tile by factors along y and x, and carries its boxes back."""

    def one(tile: np.ndarray) -> Detections:
        height, width = tile.shape[:2]
        by_y, by_x = to((height, width))
        size = (max(1, round(width * by_x)), max(1, round(height * by_y)))
        (found,) = answer([cv2.resize(tile, size, interpolation=interpolation)])
        factors = np.array([size[0] / width, size[1] / height] * 2)
        return Detections(found.boxes / factors, found.scores, found.labels)

    return lambda tiles: [one(tile) for tile in tiles]


def longer_side(side: int) -> Callable[[tuple[int, int]], tuple[float, float]]:
    return lambda hw: (side / max(hw), side / max(hw))


def stretched(side: int) -> Callable[[tuple[int, int]], tuple[float, float]]:
    return lambda hw: (side / hw[0], side / hw[1])


def shorter_side(side: int, most: int) -> Callable[[tuple[int, int]], tuple[float, float]]:
    return lambda hw: (min(side / min(hw), most / max(hw)),) * 2


RESIZINGS = [
    longer_side(128),
    longer_side(96),
    longer_side(200),
    stretched(128),
    stretched(80),
    shorter_side(128, 400),
    shorter_side(100, 133),
]


def test_an_honest_detector_is_taken() -> None:
    for side in (32, 64, 100, 128, 333):
        tried(perfect, input_side=side)


@pytest.mark.parametrize("to", RESIZINGS)
def test_a_detector_that_resizes_its_tiles_is_refused(to: Callable[[tuple[int, int]], tuple[float, float]]) -> None:
    with pytest.raises(
        UserError, match=r"'mine:Net' resizes its tiles, which undoes the zoom.*: pad tiles at the right"
    ):
        tried(resized(to), input_side=128)


@pytest.mark.parametrize("to", RESIZINGS[::3])
def test_the_samples_detector_is_taken_and_refused_once_it_resizes(
    to: Callable[[tuple[int, int]], tuple[float, float]],
) -> None:
    images = [sample_scene("val2017", seed).pixels for seed in range(3)]
    sample = load_detector(SAMPLE_DETECTOR)
    parts = {"input_side": sample.input_side, "categories": sample.categories}
    tried(sample, images, **parts)
    with pytest.raises(UserError, match="resizes its tiles"):
        tried(resized(to, sample), images, **parts)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3])
def test_boxes_of_a_share_of_the_tile_are_no_sign_of_resizing(share: float) -> None:
    def boxes(tiles: Sequence[np.ndarray]) -> list[Any]:
        return [([[0, 0, share * tile.shape[1], share * tile.shape[0]]], [0.9], [1]) for tile in tiles]

    tried(boxes, input_side=128)


def test_where_nothing_is_sure_nothing_is_said_of_resizing() -> None:
    def unsure(tiles: Sequence[np.ndarray]) -> list[Any]:
        return [(found.boxes, found.scores * 0.2, found.labels) for found in resized(longer_side(64))(tiles)]

    tried(unsure)
    tried(resized(longer_side(64)), [np.zeros((64, 64, 3), np.uint8)])


def test_detections_agree_with_themselves_at_any_zoom_and_not_with_others() -> None:
    one = Detections([[0, 0, 8, 8], [20, 20, 30, 30]], [0.9, 0.5], [1, 2])  # type: ignore[arg-type]
    larger = Detections(one.boxes * 2, one.scores, one.labels)
    assert agreement(one, larger, zoom=2.0) == agreement(one, one)
    assert agreement(one, one).distance == 0.0
    other = Detections(one.boxes, one.scores, one.labels[::-1])
    assert agreement(one, other).distance == 1.0
    assert agreement(Detections.empty(), Detections.empty()) == Agreement()
    assert agreement(one, one[np.array([1])]).plus(Agreement()).distance == pytest.approx(0.9 / 1.4)


def test_views_show_the_same_pixels_beside_more_grey_and_twice_as_large() -> None:
    views = three_views(IMAGES[0], 128)
    assert views is not None
    small, padded, enlarged = views
    assert [view.shape for view in views] == [(64, 64, 3), (128, 128, 3), (128, 128, 3)]
    assert np.array_equal(padded[:64, :64], small)
    assert (padded[64:] == 114).all()
    assert abs(enlarged.mean() - small.mean()) < 2
    assert (enlarged[100:] == 114).all()
    assert three_views(IMAGES[0], 40) is None
    assert follows_size([]) is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda tiles: [], "must answer each tile: got 0 answers to 1"),
        (lambda tiles: None, "must answer with a list, an answer for each tile, got NoneType"),
        (lambda tiles: [None] * len(tiles), "the answer to a tile must be Detections"),
        (
            lambda tiles: [([[0, 0, 9, 9]], [90.0], [1])] * len(tiles),
            "percentages by 100: so on each of the first 2 images",
        ),
        (
            lambda tiles: [([[0, 0, 9, 9]], [0.9], [0])] * len(tiles),
            "label 0 is none.*: so on each of the first 2 images",
        ),
        (lambda tiles: 1 / 0, "the detector raised ZeroDivisionError: division.*: so on each of the first 2 images"),
    ],
)
def test_what_would_fail_on_every_image_is_refused(answer: Answer, said: str) -> None:
    with pytest.raises(UserError, match=said):
        tried(answer)


def raise_unless(good: int) -> Answer:
    """Raises on every call but those after so many."""
    calls = iter(range(10**6))

    def answer(tiles: Sequence[np.ndarray]) -> list[Any]:
        if next(calls) < good:
            raise RuntimeError
        return [one_box(tile) for tile in tiles]

    return answer


def test_one_image_that_is_answered_is_enough() -> None:
    tried(raise_unless(MOST_FAILED - 1), [IMAGES[0]] * MOST_FAILED)
    with pytest.raises(UserError, match=f"so on each of the first {MOST_FAILED} images"):
        tried(raise_unless(MOST_FAILED), [IMAGES[0]] * (2 * MOST_FAILED))


def test_without_an_image_nothing_is_tried() -> None:
    tried(lambda tiles: 1 / 0, [])


def test_no_more_images_are_opened_than_are_needed() -> None:
    def images() -> Iterator[np.ndarray]:
        yield from IMAGES
        yield IMAGES[0]
        raise AssertionError

    try_detector(CheckedDetector(scripted(answer=perfect), "mine:Net"), images())


def test_a_tile_that_breaks_the_network_or_a_small_memory_is_no_reason_to_refuse() -> None:
    def broken(tiles: Sequence[np.ndarray]) -> list[Any]:
        return [TileError("NaN") if tile[0, 0].any() else one_box(tile) for tile in tiles]

    white = np.full((64, 64, 3), 255, np.uint8)
    tried(broken, [white, np.zeros((64, 64, 3), np.uint8)])

    def full(tiles: Sequence[np.ndarray]) -> list[Any]:
        raise OutOfMemoryError

    assert [line.partition(":")[0] for line in tried(full)] == ["the detector could not be tried before the run"]


def test_images_that_are_nearly_black_are_warned_of() -> None:
    assert tried(perfect, [image >> 3 for image in IMAGES]) == []
    (line,) = tried(perfect, [image >> 4 for image in IMAGES])
    assert line.startswith("the first images are nearly black, their brightest value is 15 of 255: of 16 bits 65535 is")


def test_answers_that_differ_in_a_batch_are_warned_of() -> None:
    def batches(tiles: Sequence[np.ndarray]) -> list[Any]:
        found = perfect(tiles)
        return [one.with_scores(one.scores * 0.5) for one in found] if len(tiles) > 1 else found

    (line,) = tried(batches, input_side=128)
    assert "answers a tile otherwise in a batch than alone" in line
    assert tried(perfect, input_side=128) == []


def test_a_runaway_box_on_every_tile_is_no_resizing() -> None:
    def runaway(tiles: Sequence[np.ndarray]) -> list[Any]:
        found = [(*one.boxes, [0, 0, 1e30, 1e30]) for one in perfect(tiles)]
        return [(boxes, [0.9] * len(boxes), [1] * len(boxes)) for boxes in found]

    tried(runaway, input_side=128)


def test_a_detector_that_changes_its_answers_is_warned_of_and_not_said_to_resize() -> None:
    calls = iter(range(10**6))

    def fickle(tiles: Sequence[np.ndarray]) -> list[Any]:
        share = (next(calls) % 7 + 1) / 8
        return [one.with_scores(one.scores * share) for one in perfect(tiles)]

    assert any("answers the same tile otherwise the second time" in line for line in tried(fickle, input_side=128))
