"""Results: batches of tiles that mix images, and images whose tiles come in any order."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalenet_ray.core.detections import SHOWN_SCORE, Detections, Failure, ImageResult, TileResult
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import Tile, Window
from scalenet_ray.core.inference import detect_tiles
from scalenet_ray.core.merge import Merging, merge_image
from tests.oracles import (
    BREAKING,
    CountingDetector,
    FailingDetector,
    PerfectDetector,
    RandomDetector,
    draw_squares,
    tile_of,
)

MERGING = Merging(edge_margin=2.0)


def _tile(image_id: int = 1, path: tuple[int, ...] = (), image_hw: tuple[int, int] = (64, 64), **more: Any) -> Tile:
    window = more.pop("window", Window(0, 0, image_hw[1], image_hw[0]))
    return Tile(image_id, path, image_hw, window, more.pop("height", 64), more.pop("width", 64), **more)


def _result(tile: Tile, **more: Any) -> TileResult:
    return TileResult(tile.image_id, tile.path, Fraction(1), **more)


def _detect(tiles: list[Tile], pixels: list[np.ndarray], detect: Any, found: Any = None) -> list[TileResult]:
    return detect_tiles([_result(t) for t in tiles], tiles, pixels, found or [None] * len(tiles), detect, MERGING)


# --- detecting tiles --------------------------------------------------------------------------------


def test_a_batch_of_many_images_is_detected_in_one_call_and_carried_each_to_its_own() -> None:
    tiles = [_tile(1), _tile(2, (0,), (128, 128), window=Window(32, 32, 96, 96), height=128, width=128)]
    boxes = np.array([[10, 10, 20, 20]])
    pixels = [draw_squares((tile.height, tile.width), boxes) for tile in tiles]
    detect = CountingDetector(PerfectDetector(1))
    one, other = _detect(tiles, pixels, detect)
    assert detect.calls == 1
    assert one.detections.boxes.tolist() == [[10, 10, 20, 20]]
    assert other.detections.boxes.tolist() == [[37, 37, 42, 42]]
    assert (other.image_id, other.path, other.detections.depth.tolist()) == (2, (0,), [1])


def test_what_the_detector_has_seen_it_is_not_asked_again() -> None:
    tiles = [_tile(i) for i in range(3)]
    pixels = [draw_squares((64, 64), np.array([[10, 10, 20, 20]]))] * 3
    seen = Detections(np.array([[1.0, 2, 3, 4]]), np.array([0.5]), np.array([2]))
    detect = CountingDetector(PerfectDetector(1))
    results = _detect(tiles, pixels, detect, [None, seen, None])
    assert len(detect.sizes_hw) == 2
    assert [r.detections.labels.tolist() for r in results] == [[1], [2], [1]]
    # It was computed once, and is counted here.
    assert [r.detector_passes for r in results] == [1.0, 1.0, 1.0]


def test_a_batch_that_was_all_seen_asks_for_nothing() -> None:
    detect = CountingDetector(PerfectDetector(1))
    _detect([_tile()], [np.zeros((64, 64, 3), np.uint8)], detect, [Detections.empty()])
    assert detect.calls == 0
    assert _detect([], [], detect) == []
    assert detect.calls == 0


def test_passes_are_padded_pixels_over_those_of_the_whole_image() -> None:
    # The detector's side is 64 and its stride 32: a 48 x 64 image fits 64 x 64; a tile of 65 pixels pads to 96.
    tile = _tile(1, (0,), (48, 64), height=20, width=65)
    (result,) = _detect([tile], [np.zeros((20, 65, 3), np.uint8)], PerfectDetector(1))
    assert result.detector_pixels == 96 * 96
    assert result.detector_passes == pytest.approx(2.25)


def test_a_canvas_need_not_be_square() -> None:
    class Wide(PerfectDetector):
        def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
            return hw

    # The whole image is 32 x 64 = 2048 pixels at the detector's side of 64; the tile is 20 x 64.
    tile = _tile(1, (0,), (48, 96), height=20, width=64)
    (result,) = _detect([tile], [np.zeros((20, 64, 3), np.uint8)], Wide(1))
    assert result.detector_pixels == 1280
    assert result.detector_passes == pytest.approx(0.625)


def test_an_image_far_from_the_detectors_side_counts_as_one_pass() -> None:
    for hw in ((1000, 3), (10, 10), (640, 480)):
        tile = Tile(1, (), hw, Window(0, 0, hw[1], hw[0]), 64, max(1, hw[1] * 64 // hw[0]))
        (result,) = _detect([tile], [np.zeros((tile.height, tile.width, 3), np.uint8)], PerfectDetector(1))
        assert result.detector_passes == 1.0


def test_a_tile_the_detector_breaks_on_fails_alone_and_its_cost_counts() -> None:
    tiles = [_tile(1), _tile(2)]
    pixels = [draw_squares((64, 64), np.array([[10, 10, 20, 20]])) for _ in tiles]
    pixels[0][40:50, 40:50] = BREAKING
    broken, well = _detect(tiles, pixels, FailingDetector(PerfectDetector(1)))
    assert broken.failure == Failure("detect", "the detector broke on this tile: its boxes are NaN")
    assert broken.detections.boxes.shape == (0, 4)
    assert broken.detector_passes == 1.0
    assert well.failure is None
    assert len(well.detections) == 1


def test_nan_that_a_detector_lets_through_fails_its_tile() -> None:
    class Careless(PerfectDetector):
        def _find(self, pixels: np.ndarray) -> Detections:
            found = super()._find(pixels)
            return found.with_scores(found.scores * np.nan)

    (result,) = _detect([_tile()], [draw_squares((64, 64), np.array([[10, 10, 20, 20]]))], Careless(1))
    assert result.failure is not None
    assert result.failure.stage == "detect"
    assert result.failure.reason.startswith("the detector gave boxes or scores that are NaN or infinite")


def test_a_detector_that_answers_for_fewer_tiles_is_a_bug() -> None:
    class Short(PerfectDetector):
        def __call__(self, pixels: Any) -> list:
            return super().__call__(pixels)[:-1]

    with pytest.raises(ValueError, match=r"zip\(\)"):
        _detect([_tile()], [np.zeros((64, 64, 3), np.uint8)], Short())


def test_what_was_known_of_a_tile_stays() -> None:
    tile = _tile(3, (1, 2))
    before = TileResult(3, (1, 2), Fraction(1, 6), look_pixels=7, guards=("max_windows",), image_hw=(64, 64))
    pixels = [np.zeros((64, 64, 3), np.uint8)]
    (after,) = detect_tiles([before], [tile], pixels, [None], PerfectDetector(1), MERGING)
    for name in ("image_id", "path", "credit", "look_pixels", "guards", "image_hw"):
        assert getattr(after, name) == getattr(before, name)


# --- merging an image -------------------------------------------------------------------------------


def _parts() -> list[TileResult]:
    """Five tiles of an image, with boxes that overlap and tie; the first two were looked at."""
    tiles = [_tile(9, path) for path in ((), (0,), (1,), (0, 0), (0, 1))]
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in tiles]
    guards = ((), ("max_windows",), ("no_change",), ("max_windows",), ())
    results = [
        _result(tile, guards=names, look_pixels=100 if tile.path in ((), (0,)) else 0, image_hw=(64, 64))
        for tile, names in zip(tiles, guards, strict=True)
    ]
    return detect_tiles(results, tiles, pixels, [None] * 5, RandomDetector(1), MERGING)


def _assert_same(one: ImageResult, other: ImageResult) -> None:
    for field in dataclasses.fields(ImageResult):
        if field.name not in ("detections", "whole_pass"):
            assert getattr(one, field.name) == getattr(other, field.name), field.name
    assert (one.whole_pass is None) == (other.whole_pass is None)
    for found, expected in ((one.detections, other.detections), (one.whole_pass, other.whole_pass)):
        for name in ("boxes", "scores", "labels", "depth", "windows"):
            np.testing.assert_array_equal(getattr(found, name, None), getattr(expected, name, None))


@settings(deadline=None, max_examples=40)
@given(st.permutations(range(5)), st.sampled_from(["nms", "soft-nms-linear", "soft-nms-gaussian"]), st.booleans())
def test_no_order_of_tiles_matters(order: list[int], method: Any, fails: bool) -> None:
    parts = _parts()
    if fails:
        parts[3] = dataclasses.replace(parts[3], failure=Failure("detect", "later"))
        parts[2] = dataclasses.replace(parts[2], failure=Failure("look", "sooner"))
    merging = dataclasses.replace(MERGING, method=method)
    _assert_same(merge_image([parts[i] for i in order], merging), merge_image(parts, merging))


@pytest.mark.parametrize("method", ["nms", "soft-nms-linear", "soft-nms-gaussian"])
def test_the_whole_pass_is_what_policy_whole_shows(method: Any) -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 40, (60, 2))
    crowded = Detections(np.hstack([corners, corners + 20]), rng.uniform(0, 1, 60), rng.integers(1, 3, 60))
    root, *others = _parts()
    parts, merging = (
        [dataclasses.replace(root, detections=crowded), *others],
        dataclasses.replace(MERGING, method=method),
    )
    alone = merge_image(parts[:1], merging).detections
    shown = alone[alone.scores >= SHOWN_SCORE]
    kept = merge_image(parts, merging).whole_pass
    assert kept is not None
    assert 0 < len(kept) < len(alone)
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(shown, name))


def test_the_whole_pass_keeps_what_a_window_suppresses() -> None:
    def found(path: tuple[int, ...], score: float) -> TileResult:
        return _result(_tile(1, path), detections=Detections([[0, 0, 9, 9]], [score], [1]), detector_pixels=1)

    merged = merge_image([found((), 0.5), found((0,), 0.9)], MERGING)
    assert merged.detections.scores.tolist() == pytest.approx([0.9])
    assert merged.whole_pass is not None
    assert merged.whole_pass.scores.tolist() == pytest.approx([0.5])


def test_without_a_pass_over_the_whole_there_is_no_whole_pass() -> None:
    root, *others = _parts()
    assert merge_image(others, MERGING).whole_pass is None
    # A root that only leads to others, as a pyramid's does, was not detected.
    led = dataclasses.replace(root, detections=Detections.empty(), detector_pixels=0)
    assert merge_image([led, *others], MERGING).whole_pass is None
    failed = dataclasses.replace(others[0], failure=Failure("detect", "broke"))
    assert merge_image([root, failed], MERGING).whole_pass is None


def test_an_images_costs_and_guards_are_those_of_its_tiles() -> None:
    merged = merge_image(_parts(), MERGING)
    assert (merged.image_id, merged.tiles, merged.look_pixels) == (9, 5, 200)
    assert (merged.detector_pixels, merged.detector_passes) == (5 * 64 * 64, 5.0)
    assert merged.guards == {"max_windows": 2, "no_change": 1}
    assert merged.image_hw == (64, 64)
    assert merged.failure is None
    assert len(merged.detections) > 5


def test_a_tile_that_was_neither_looked_at_nor_detected_is_no_tile() -> None:
    # The root of a pyramid only leads to its sizes.
    parts = [*_parts(), TileResult(9, (7,), Fraction(0))]
    assert merge_image(parts, MERGING).tiles == 5


def test_one_failed_tile_empties_the_image_and_the_first_path_gives_the_reason() -> None:
    parts = _parts()
    parts[4] = dataclasses.replace(parts[4], failure=Failure("detect", "path 0, 1"))
    parts[2] = dataclasses.replace(parts[2], failure=Failure("look", "path 1"))
    merged = merge_image(parts, MERGING)
    # (0, 1) comes before (1,).
    assert merged.failure == Failure("detect", "path 0, 1")
    assert merged.detections.boxes.shape == (0, 4)
    assert merged.detector_passes == 5.0


def test_an_image_that_could_not_be_opened_is_merged_too() -> None:
    merged = merge_image([TileResult(4, (), Fraction(1), failure=Failure("read", "truncated"))], MERGING)
    assert merged.failure == Failure("read", "truncated")
    assert (merged.tiles, merged.detector_passes, merged.guards, merged.image_hw) == (0, 0, {}, None)


def test_a_canvas_that_is_wrong_for_one_tile_costs_its_image() -> None:
    class Canvas(RandomDetector):
        def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
            msg = "canvas_hw must be two whole numbers"
            raise UserError(msg)

    detector = Canvas()
    begun = TileResult(7, (), Fraction(1))
    (result,) = detect_tiles([begun], [tile_of((8, 8))], [np.zeros((8, 8, 3), np.uint8)], [None], detector, Merging())
    assert result.failure == Failure("detect", "canvas_hw must be two whole numbers")
