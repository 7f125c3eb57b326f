"""Exceptions and invalid answers of a detector cost their tile alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import OutOfMemoryError, TileError, UserError
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.inference import maps_from_features
from scalenet_ray.core.networks import DetectionsWithFeatures, FeatureScalePredictor
from scalenet_ray.core.scale import NUM_CLASSES, ScaleMap
from scalenet_ray.models.checked_detector import CheckedDetector, MappedDetector
from tests.oracles import tile_of
from tests.scripted_detector import Scripted, one_box, scripted

GOOD, BAD = np.zeros((8, 16, 3), np.uint8), np.full((8, 16, 3), 255, np.uint8)
TEXT = "max(): Expected reduction dim\nto be specified"


def raise_on_bad(tiles: Sequence[np.ndarray]) -> list[Any]:
    if any(tile.any() for tile in tiles):
        raise RuntimeError(TEXT)
    return [one_box(tile) for tile in tiles]


def checked(**parts: Any) -> CheckedDetector:
    return CheckedDetector(scripted(**parts), "mine:Net")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(TEXT), "the detector raised RuntimeError: max(): Expected reduction dim to be specified"),
        (TileError("too bright"), "too bright"),
        (SystemExit(3), "the detector raised SystemExit: 3"),
    ],
)
def test_an_exception_costs_the_tile_on_which_it_is_raised_alone(error: BaseException, reason: str) -> None:
    def answer(tiles: Sequence[np.ndarray]) -> list[Any]:
        if any(tile.any() for tile in tiles):
            raise error
        return [one_box(tile) for tile in tiles]

    answers = checked(answer=answer)([GOOD, BAD, GOOD])
    assert [type(each) for each in answers] == [Detections, TileError, Detections]
    assert str(answers[1]) == reason


def test_a_batch_that_raises_and_no_tile_alone_costs_nothing() -> None:
    def alone(tiles: Sequence[np.ndarray]) -> list[Any]:
        if len(tiles) > 1:
            raise ValueError
        return [one_box(tile) for tile in tiles]

    answers = checked(answer=alone)([GOOD, BAD])
    assert [type(answer) for answer in answers] == [Detections, Detections]


def test_an_exception_of_an_iterator_costs_its_tile() -> None:
    answers = checked(answer=lambda tiles: (raise_on_bad([tile])[0] for tile in tiles))([GOOD, BAD])
    assert [type(answer) for answer in answers] == [Detections, TileError]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OutOfMemoryError, MemoryError])
def test_what_is_no_fault_of_a_tile_is_let_through(error: type[BaseException]) -> None:
    def stop(tiles: Sequence[np.ndarray]) -> list[Any]:
        raise error

    with pytest.raises(OutOfMemoryError if error is MemoryError else error):
        checked(answer=stop)([GOOD, BAD])


def test_too_few_answers_to_a_batch_cost_the_tile_that_is_left_out() -> None:
    answers = checked(answer=lambda tiles: [one_box(tile) for tile in tiles if not tile.any()])([GOOD, BAD])
    assert isinstance(answers[0], Detections)
    assert str(answers[1]).startswith("the detector answered a tile wrongly: the detector must answer each tile: got 0")


def test_no_tiles_are_answered_without_asking() -> None:
    assert checked(answer=lambda tiles: 1 / len(tiles))([]) == []


def test_the_trace_of_an_exception_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    checked(answer=raise_on_bad)([BAD])
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [RuntimeError]


class Showing(Scripted):
    feature_channels = (1,)
    feature_stride = 8

    def with_features(self, pixels: Sequence[np.ndarray]) -> list[Any]:
        if any(tile.any() for tile in pixels):
            raise RuntimeError(TEXT)
        return [DetectionsWithFeatures(one_box(tile), (np.zeros((1, 1, 2), np.float32),)) for tile in pixels]


class Reads:
    input_pixels = 0

    def from_features(
        self, features: Sequence[tuple[np.ndarray, ...]], tiles: Sequence[Tile]
    ) -> list[ScaleMap | TileError]:
        assert all(levels for levels in features)
        prob = np.zeros((NUM_CLASSES, 1, 2), np.float32)
        return [ScaleMap(prob=prob) for _ in tiles]


def test_an_exception_where_features_are_shown_costs_its_tile_and_no_other_map() -> None:
    glimpses = CheckedDetector(Showing(), "mine:Net").with_features([GOOD, BAD])
    assert [type(one.detections) for one in glimpses] == [Detections, TileError]
    net = Reads()
    assert isinstance(net, FeatureScalePredictor)
    maps = maps_from_features(glimpses, [tile_of((8, 16))] * 2, net)
    assert [type(one) for one in maps] == [ScaleMap, TileError]
    assert maps_from_features(glimpses[1:], [tile_of((8, 16))], net) == [glimpses[1].detections]


def test_features_of_another_form_are_refused() -> None:
    class Bare(Showing):
        def with_features(self, pixels: Sequence[np.ndarray]) -> list[Any]:
            return [one_box(tile) for tile in pixels]

    (glimpse,) = CheckedDetector(Bare(), "mine:Net").with_features([GOOD])
    assert "with_features must answer with a DetectionsWithFeatures for each tile, got Detections" in str(
        glimpse.detections
    )
    with pytest.raises(UserError, match="reads the detector's feature maps, which Scripted does not show"):
        CheckedDetector(Scripted(), "mine:Net").with_features([GOOD])


NAMES = ["N/A", "person", "n/a", "car"]


def test_a_detectors_own_categories_are_not_mapped_by_name() -> None:
    detector = scripted(categories=NAMES, answer=lambda tiles: [([[0, 0, 1, 1]] * 4, [0.9] * 4, range(4))])
    answer = (MappedDetector(detector, dict(enumerate(NAMES)))([GOOD]))[0]
    assert isinstance(answer, Detections)
    assert answer.labels.tolist() == [0, 1, 2, 3]


def test_an_unused_double_name_is_no_fault_and_used_ones_are_one_category() -> None:
    def of_all(tiles: Sequence[np.ndarray]) -> list[Any]:
        return [([[0, 0, 1, 1]] * 5, [0.9] * 5, list(range(5)))]

    detector = scripted(categories=[*NAMES, "Person"], answer=of_all)
    answer = MappedDetector(detector, {7: "car", 8: "person"})([GOOD])[0]
    assert isinstance(answer, Detections)
    assert answer.labels.tolist() == [8, 7, 8]
