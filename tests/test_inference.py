"""Scale prediction and detection on batches of tiles, and the assembly of tiles into images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from scalenet_ray.core.detections import SHOWN_SCORE, Detections, Failure, TileResult
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.geometry import Tile, Window
from scalenet_ray.core.inference import OracleScalePredictor, detect_tiles, predict_scales, scale_map_of_detections
from scalenet_ray.core.merge import Merging, merge_image
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.scale import ScaleMap
from tests.oracles import (
    BREAKING,
    BrokenScale,
    CountingDetector,
    FailingDetector,
    PerfectDetector,
    RandomDetector,
    RandomScale,
    SeeingScale,
    TruthOfSquares,
    draw_squares,
    rules_of,
    tile_of,
)


class _CountingScale:
    """Counts its calls and the tiles of each."""

    input_pixels = 1

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.batches: list[list[tuple[int, tuple[int, ...]]]] = []

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list:
        assert [one.shape[:2] for one in pixels] == [(tile.height, tile.width) for tile in tiles]
        self.batches.append([(tile.image_id, tile.path) for tile in tiles])
        return self._inner(pixels, tiles)


def _policy(kind: Any, **recursion: Any) -> Policy:
    return Policy(str(kind), kind, 64, recursion=rules_of(**recursion))


def _batch() -> tuple[list[np.ndarray], list[Tile]]:
    """Tiles of two images: of the four, the third may not be cut any more and the fourth is deep enough."""
    tiles = [
        dataclasses.replace(tile_of((64, 64), image_id=1), window_budget=4),
        dataclasses.replace(tile_of((32, 48), image_id=2), window_budget=4),
        tile_of((64, 64), image_id=3),
        dataclasses.replace(tile_of((64, 64), image_id=1, path=(0,)), window_budget=4),
    ]
    boxes = np.array([[4, 4, 9, 9], [20, 10, 30, 20]])
    return [draw_squares((tile.height, tile.width), boxes) for tile in tiles], tiles


# --- who is asked -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scalenet", "oracle"])
def test_the_net_is_asked_once_for_all_tiles_that_may_be_cut(kind: str) -> None:
    net = _CountingScale(RandomScale())
    pixels, tiles = _batch()
    seen = predict_scales(pixels, tiles, _policy(kind), detect=PerfectDetector(1), predict_scale=net)
    assert net.batches == [[(1, ()), (2, ())]]
    assert [one.scale_map is not None for one in seen] == [True, True, False, False]
    assert [one.looked for one in seen] == [kind != "oracle", kind != "oracle", False, False]


def test_the_detector_is_asked_once_and_what_it_saw_travels_on() -> None:
    detect = CountingDetector(PerfectDetector(1))
    pixels, tiles = _batch()
    seen = predict_scales(pixels, tiles, _policy("first-pass"), detect=detect)
    assert detect.calls == 1
    assert detect.sizes_hw == [(64, 64), (32, 48)]
    assert [None if one.detections is None else len(one.detections) for one in seen] == [2, 2, None, None]


@pytest.mark.parametrize("kind", ["whole", "grid", "random"])
def test_a_policy_that_needs_to_see_nothing_asks_nobody(kind: str) -> None:
    pixels, tiles = _batch()
    for one in predict_scales(pixels, tiles, _policy(kind)):
        assert (one.scale_map, one.detections, one.failure, one.looked) == (None, None, None, False)


def test_no_tiles_that_may_be_cut_need_no_network() -> None:
    pixels, tiles = _batch()
    assert len(predict_scales(pixels[2:], tiles[2:], _policy("scalenet"))) == 2
    assert predict_scales([], [], _policy("scalenet")) == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("scalenet", "policy scalenet needs a scale map, got no Scale Net: give its weights with --scale-net PATH"),
        ("oracle", "policy oracle needs a scale map, got no Scale Net"),
        ("first-pass", "policy first-pass needs the detector's first pass, got no detector"),
    ],
)
def test_a_missing_network_is_named(kind: str, message: str) -> None:
    pixels, tiles = _batch()
    with pytest.raises(ValueError, match=message):
        predict_scales(pixels, tiles, _policy(kind))


# --- who breaks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scalenet", "oracle"])
def test_nan_for_one_tile_leaves_the_others_of_the_batch_alone(kind: str) -> None:
    pixels, tiles = _batch()
    net = BrokenScale(SeeingScale(), image_id=1)
    seen = predict_scales(pixels, tiles, _policy(kind), detect=PerfectDetector(1), predict_scale=net)
    assert isinstance(seen[0].failure, TileError)
    assert "16 values that are NaN" in seen[0].failure.reason
    # It was computed all the same, so it counts.
    assert seen[0].looked == (kind != "oracle")
    assert seen[0].scale_map is None
    assert seen[1].failure is None
    assert seen[1].scale_map is not None


def test_a_detector_that_breaks_on_one_tile_leaves_the_others_alone() -> None:
    pixels, tiles = _batch()
    pixels[1][:4, :4] = BREAKING
    detect = FailingDetector(PerfectDetector(1))
    seen = predict_scales(pixels, tiles, _policy("first-pass"), detect=detect)
    assert seen[0].failure is None
    assert seen[1].failure is not None
    assert seen[1].failure.reason == "the detector broke on this tile: its boxes are NaN"
    assert seen[1].detections is None


# --- the first pass speaks as a map -----------------------------------------------------------------


def test_the_first_pass_map_holds_boxes_from_a_score_on_with_their_score_as_gain() -> None:
    found = Detections(
        np.array([[0, 0, 16, 16], [32, 32, 48, 48], [0, 48, 16, 64]]), np.array([0.5, 0.02, 0.03]), np.ones(3)
    )
    implied = scale_map_of_detections(found, (64, 64), 0.03)
    assert implied.hw == (64, 64)
    # 16 x 16 of 64 x 64 is 16384 of 512 x 512: class 2, and 256 cells.
    assert implied.classes[:16, :16].tolist() == [[2] * 16] * 16
    assert implied.classes[48:, :16].tolist() == [[2] * 16] * 16
    assert (implied.classes == 2).sum() == 512
    assert implied.gain is not None
    assert implied.gain[:16, :16].sum() == pytest.approx(0.5, rel=1e-5)
    assert implied.gain[48:, :16].sum() == pytest.approx(0.03, rel=1e-5)


def test_a_first_pass_that_found_nothing_sees_background() -> None:
    for found in (Detections.empty(), dataclasses.replace(Detections.empty(), masks=())):
        assert scale_map_of_detections(found, (64, 64), 0.0).classes.max() == 0


# --- the oracle -------------------------------------------------------------------------------------


def _oracle_map(boxes: Any, tile: Tile) -> ScaleMap:
    oracle = OracleScalePredictor(TruthOfSquares({tile.image_id: np.array(boxes, np.float32)}))
    (scale_map,) = oracle([np.zeros((tile.height, tile.width, 3), np.uint8)], [tile])
    assert isinstance(scale_map, ScaleMap)
    return scale_map


def test_the_oracle_sees_objects_as_large_as_they_are_in_the_tile() -> None:
    # 16 x 16 of 128 x 128 is 4096 of 512 x 512: class 2. In a window of half the side it is 16384 / 4 * 4:
    # four times the share, 16384: class 2 still; 32 x 32 is class 2 in the image (16384) and 4 in the window (65536).
    whole = tile_of((128, 128))
    assert set(np.unique(_oracle_map([[8, 8, 24, 24], [40, 40, 72, 72]], whole).classes)) == {0, 2}
    window = Tile(1, (0,), (128, 128), Window(8, 8, 72, 72), 128, 128)
    classes = _oracle_map([[8, 8, 24, 24], [40, 40, 72, 72]], window).classes
    assert classes[0, 0] == 2
    assert classes[63, 63] == 4


def test_the_oracle_counts_an_object_by_the_part_that_the_tile_shows() -> None:
    # A quarter of the first lies in the window; the second lies outside, the third touches it from outside.
    window = Tile(1, (0,), (128, 128), Window(0, 0, 64, 64), 64, 64)
    seen = _oracle_map([[56, 56, 72, 72], [80, 80, 90, 90], [64, 0, 70, 6]], window)
    assert seen.gain is not None
    assert seen.gain.sum() == pytest.approx(0.25, rel=1e-5)
    assert seen.classes[:56].max() == 0
    assert seen.classes[56:, 56:].min() > 0


def test_the_oracle_counts_a_small_object_by_how_small_it_is() -> None:
    # Class 1 ends at 2592 pixels of 512 x 512, 162 of 128 x 128: 81 pixels are half of that.
    seen = _oracle_map([[10, 10, 19, 19]], tile_of((128, 128)))
    assert seen.gain is not None
    assert seen.gain.sum() == pytest.approx(0.5, rel=1e-5)


# --- Results: batches of tiles that mix images, and images whose tiles come in any order ----------


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


@pytest.mark.parametrize("method", ["consensus", "nms", "soft-nms-linear", "soft-nms-gaussian"])
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
