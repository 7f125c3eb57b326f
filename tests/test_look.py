"""A look at a batch: who is asked, what for, and what the ground truth says."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile, Window
from scalenet_ray.core.inference import OracleScalePredictor, predict_scales, scale_map_of_detections
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.scale import ScaleMap
from tests.oracles import (
    BREAKING,
    BrokenScale,
    ConstantScale,
    CountingDetector,
    FailingDetector,
    FixedScale,
    OscillatingScale,
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


@pytest.mark.parametrize("kind", ["scalenet", "oracle", "fused"])
def test_the_net_is_asked_once_for_all_tiles_that_may_be_cut(kind: str) -> None:
    net = _CountingScale(RandomScale())
    pixels, tiles = _batch()
    seen = predict_scales(pixels, tiles, _policy(kind), detect=PerfectDetector(1), predict_scale=net)
    assert net.batches == [[(1, ()), (2, ())]]
    assert [one.scale_map is not None for one in seen] == [True, True, False, False]
    assert [one.looked for one in seen] == [kind != "oracle", kind != "oracle", False, False]


@pytest.mark.parametrize("kind", ["first-pass", "fused"])
def test_the_detector_is_asked_once_and_what_it_saw_travels_on(kind: str) -> None:
    detect = CountingDetector(PerfectDetector(1))
    pixels, tiles = _batch()
    seen = predict_scales(pixels, tiles, _policy(kind), detect=detect, predict_scale=SeeingScale())
    assert detect.calls == 1
    assert detect.sizes_hw == [(64, 64), (32, 48)]
    assert [None if one.detections is None else len(one.detections) for one in seen] == [2, 2, None, None]


@pytest.mark.parametrize("kind", ["scalenet", "oracle"])
def test_a_policy_without_a_first_pass_leaves_the_detector_alone(kind: str) -> None:
    detect = CountingDetector(PerfectDetector(1))
    pixels, tiles = _batch()
    seen = predict_scales(pixels, tiles, _policy(kind), detect=detect, predict_scale=SeeingScale())
    assert detect.calls == 0
    assert all(one.detections is None for one in seen)


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
        ("fused", "policy fused needs the detector's first pass, got no detector"),
        ("first-pass", "policy first-pass needs the detector's first pass, got no detector"),
    ],
)
def test_a_missing_network_is_named(kind: str, message: str) -> None:
    pixels, tiles = _batch()
    net = SeeingScale() if kind == "fused" else None
    with pytest.raises(ValueError, match=message):
        predict_scales(pixels, tiles, _policy(kind), predict_scale=net)


def test_a_net_that_answers_for_fewer_tiles_is_a_bug() -> None:
    class Short(SeeingScale):
        def __call__(self, pixels: Any, tiles: Any) -> list:
            return super().__call__(pixels, tiles)[:-1]

    pixels, tiles = _batch()
    with pytest.raises(ValueError, match=r"zip\(\)"):
        predict_scales(pixels, tiles, _policy("scalenet"), predict_scale=Short())


# --- the fakes themselves -----------------------------------------------------------------------------

FAKES = (
    PerfectDetector(2),
    RandomDetector(3),
    FailingDetector(PerfectDetector(2)),
    SeeingScale(),
    SeeingScale(16.0),
    RandomScale(1),
    RandomScale(1, "regression"),
    ConstantScale(2.0),
    OscillatingScale(),
    BrokenScale(SeeingScale(), 2),
    OracleScalePredictor(TruthOfSquares({1: np.array([[4, 4, 9, 9]]), 2: np.zeros((0, 4)), 3: np.zeros((0, 4))})),
)


@pytest.mark.parametrize("fake", FAKES, ids=lambda fake: type(fake).__name__)
def test_a_fake_answers_the_same_alone_in_any_batch_and_in_another_process(fake: Any) -> None:
    pixels, tiles = _batch()
    copy = pickle.loads(pickle.dumps(fake))

    def ask(net: Any, *at: int) -> list:
        some = [pixels[i] for i in at]
        answers = net(some) if hasattr(net, "canvas_hw") else net(some, [tiles[i] for i in at])
        return [_plain(answer) for answer in answers]

    together = ask(fake, 0, 1, 2, 3)
    assert ask(copy, 0, 1, 2, 3) == together
    assert ask(fake, 2, 0) == [together[2], together[0]]
    assert [ask(fake, i)[0] for i in range(4)] == together


def _plain(answer: Detections | ScaleMap | TileError) -> Any:
    if isinstance(answer, TileError):
        return answer.reason
    if isinstance(answer, Detections):
        return answer.boxes.tolist(), answer.scores.tolist(), answer.labels.tolist()
    array = answer.scale if answer.scale is not None else answer.prob
    assert array is not None
    return array.tolist()


# --- who breaks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scalenet", "fused", "oracle"])
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


@pytest.mark.parametrize("kind", ["first-pass", "fused"])
def test_a_detector_that_breaks_on_one_tile_leaves_the_others_alone(kind: str) -> None:
    pixels, tiles = _batch()
    pixels[1][:4, :4] = BREAKING
    detect = FailingDetector(PerfectDetector(1))
    seen = predict_scales(pixels, tiles, _policy(kind), detect=detect, predict_scale=SeeingScale())
    assert seen[0].failure is None
    assert seen[1].failure is not None
    assert seen[1].failure.reason == "the detector broke on this tile: its boxes are NaN"
    assert seen[1].detections is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["boxes", "scores"])
def test_nan_that_a_detector_lets_through_is_a_failure_of_the_tile(bad: float, where: str) -> None:
    class Careless(PerfectDetector):
        def _find(self, pixels: np.ndarray) -> Detections:
            found = super()._find(pixels)
            values = np.array(getattr(found, where))
            values[0] = bad
            return dataclasses.replace(found, **{where: values})

    pixels, tiles = _batch()
    for one in predict_scales(pixels[:2], tiles[:2], _policy("first-pass"), detect=Careless(1)):
        assert one.failure is not None
        assert one.failure.reason.startswith("the detector gave boxes or scores that are NaN or infinite: check")


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
    for found in (Detections.empty(), Detections.empty(with_masks=True)):
        assert scale_map_of_detections(found, (64, 64), 0.0).classes.max() == 0


def test_fused_is_the_mean_of_both_on_the_finer_grid() -> None:
    pixels, tiles = _batch()
    background = FixedScale(prob=np.eye(6)[0][:, None, None] * np.ones((1, 8, 8)))
    seen = predict_scales(pixels[:1], tiles[:1], _policy("fused"), detect=PerfectDetector(1), predict_scale=background)[
        0
    ]
    assert seen.scale_map is not None
    assert seen.scale_map.prob is not None
    assert seen.scale_map.hw == (64, 64)
    # 5 x 5 = 25 of 64 x 64 is 1600 of 512 x 512: class 1; 10 x 10 is 6400: class 2.
    assert seen.scale_map.prob[:2, 6, 6].tolist() == [0.5, 0.5]
    assert seen.scale_map.prob[:3, 15, 25].tolist() == [0.5, 0.0, 0.5]
    assert seen.scale_map.prob[0, 60, 60] == 1.0


def test_a_regression_net_cannot_be_fused() -> None:
    pixels, tiles = _batch()
    with pytest.raises(ValueError, match="only class maps can be fused"):
        predict_scales(pixels, tiles, _policy("fused"), detect=PerfectDetector(1), predict_scale=ConstantScale(1.0))


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


def test_the_oracles_map_does_not_change_with_the_tiles_resolution() -> None:
    boxes = [[8, 8, 20, 20], [40, 40, 52, 52]]
    window = Window(0, 0, 64, 64)
    maps = [_oracle_map(boxes, Tile(1, (0,), (128, 128), window, side, side)).classes for side in (32, 64, 100, 128)]
    for other in maps[1:]:
        np.testing.assert_array_equal(other, maps[0])


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


def test_the_smaller_an_object_of_class_1_the_more_the_oracle_expects_of_a_closer_look() -> None:
    # In 64 x 64 class 1 ends at 2592 / 64 = 40.5 pixels: 2 x 2 are worth 1 - 4 / 40.5, 6 x 6 are worth 1 - 36 / 40.5.
    for side, worth in ((2, 36.5 / 40.5), (6, 4.5 / 40.5), (7, 1.0)):
        seen = _oracle_map([[8, 8, 8 + side, 8 + side]], tile_of((64, 64)))
        assert seen.gain is not None
        assert seen.gain.sum() == pytest.approx(worth, rel=1e-5)


def test_the_oracle_of_an_image_without_objects_sees_background() -> None:
    assert _oracle_map(np.zeros((0, 4)), tile_of((64, 64))).classes.max() == 0


def test_the_oracle_is_no_network_and_costs_nothing() -> None:
    assert OracleScalePredictor.input_pixels == 0
