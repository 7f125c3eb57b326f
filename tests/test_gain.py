"""Gain maps from scores at two scales."""

from __future__ import annotations

import numpy as np
import pytest

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.geometry import Tile, Window
from scalenet_ray.core.merge import Merging
from scalenet_ray.data.coco import Objects
from scalenet_ray.training.gain import ZOOMS, _covering_tiles, gain_map, gain_of_zoom, measure_scores, object_scores
from tests.oracles import PerfectDetector, draw_squares


def objects_at(*boxes: tuple[float, float, float, float], crowd: tuple[bool, ...] = ()) -> Objects:
    array = np.array(boxes, np.float32).reshape(-1, 4)
    areas = (array[:, 2:] - array[:, :2]).prod(axis=1).astype(np.float64)
    count = len(array)
    is_crowd = np.array(crowd or (False,) * count, bool)
    return Objects(array, areas, np.ones(count, np.int64), is_crowd, (None,) * count)


def test_an_objects_score_is_that_of_the_best_box_of_its_category_that_fits() -> None:
    objects = objects_at((0, 0, 10, 10), (50, 50, 60, 60))
    found = Detections(
        np.array([[0, 0, 10, 9], [0, 0, 10, 10], [0, 0, 10, 4], [50, 50, 60, 60]]),
        np.array([0.4, 0.3, 0.9, 0.8]),
        np.array([1, 1, 1, 2]),
    )
    np.testing.assert_allclose(object_scores(found, objects), [0.4, 0.0])
    assert object_scores(Detections.empty(), objects).tolist() == [0, 0]


def test_scores_rise_where_zoom_brings_an_object_into_the_detectors_range() -> None:
    boxes = np.array([[100, 100, 112, 112], [200, 40, 280, 120]])
    image = draw_squares((256, 320), boxes)
    detector = PerfectDetector(min_side=20, input_side=320)
    scores = measure_scores(image, objects_at(*map(tuple, boxes)), detector, Merging())
    assert scores.shape == (2, len(ZOOMS))
    assert scores[0, : ZOOMS.index(2.0)].tolist() == [0, 0]
    assert (scores[0, ZOOMS.index(2.0) :] > 0).all()
    assert scores[1, 0] > 0


def test_tiles_have_the_detectors_longer_side_whatever_the_images_is() -> None:
    sides = [47, 427, 1242, 1920, *range(1000, 1100)]
    for side in sides:
        for zoom in ZOOMS:
            tiles = _covering_tiles(0, (side // 2, side), 416, zoom)
            assert {max(tile.height, tile.width) for tile in tiles} == {416}


def test_gains_are_interpolated_along_the_zooms_logarithm_and_never_negative() -> None:
    scores = np.array([[0.1, 0.2, 0.5, 0.6, 0.4], [0.9, 0.8, 0.1, 0.0, 0.0]])
    np.testing.assert_allclose(gain_of_zoom(scores, 1.0, 2.5), [0.5, 0.0])
    half_way = 0.2 + 0.3 * np.log(1.75 / 1.5) / np.log(2.0 / 1.5)
    np.testing.assert_allclose(gain_of_zoom(scores, 1.0, 1.75), [half_way - 0.1, 0.0])
    # Beyond the largest zoom measured nothing is known to be gained.
    np.testing.assert_allclose(gain_of_zoom(scores, 4.0, 2.0), [0.0, 0.0])
    assert gain_of_zoom(np.zeros((0, len(ZOOMS))), 1.0, 2.0).shape == (0,)


def test_a_gain_map_holds_each_small_objects_gain_on_its_box() -> None:
    objects = objects_at(
        (16, 16, 32, 24), (0, 0, 200, 200), (40, 40, 48, 48), (60, 60, 70, 70), crowd=(False, False, True, False)
    )
    scores = np.tile(np.array([[0.1, 0.2, 0.3, 0.6, 0.6]]), (4, 1))
    tile = Tile(1, (), (256, 256), Window(0, 0, 256, 256), 256, 256)
    gains = gain_map(objects, scores, tile, (32, 32), 8, 2.5)
    np.testing.assert_allclose(gains[2, 2:4], [0.25, 0.25])
    # The large object and the crowd gain nothing.
    assert gains.sum() == pytest.approx(2 * 0.5, rel=1e-5)


def test_a_gain_map_leaves_out_what_the_window_cuts_to_less_than_half() -> None:
    scores = np.array([[0.1, 0.2, 0.3, 0.6, 0.6]])
    tile = Tile(1, (), (256, 256), Window(0, 0, 128, 128), 256, 256)
    for x, visible in ((118, True), (124, False)):
        gains = gain_map(objects_at((x, 20, x + 16, 28)), scores, tile, (32, 32), 8, 2.0)
        assert (gains.sum() > 0) == visible
