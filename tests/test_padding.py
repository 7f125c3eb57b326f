"""Canvases, and the batches of tiles on them: on a CPU as small as they can be, on a GPU of few shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalenet_ray.core.detections import Detections
from scalenet_ray.models.detectors import load_detector
from scalenet_ray.models.padding import detect_by_canvas, padded, stride_canvas
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_DETECTOR_WEIGHTS
from tests.devices import DEVICES
from tests.test_gpu import partners, scenes

SIDES = st.integers(1, 3000)


@given(SIDES, SIDES, st.sampled_from([416, 640, 800]), st.sampled_from([32, 64]))
def test_few_canvases_hold_the_tile_and_are_at_most_twice_as_long_or_half_the_input_side(
    height: int, width: int, input_side: int, stride: int
) -> None:
    least = stride_canvas((height, width), stride)
    for side, tight, few in zip(
        (height, width), least, stride_canvas((height, width), stride, input_side), strict=True
    ):
        assert side <= tight <= few < max(2 * tight, input_side / 2 + 2 * stride)
        assert few % stride == 0


def test_few_canvases_are_few_and_a_whole_image_is_not_enlarged() -> None:
    sides = {stride_canvas((side, 1), few_to=640)[0] for side in range(1, 2000)}
    assert sorted(sides) == [320, 640, 960, 1280, 1920, 2560]
    assert stride_canvas((800, 400), few_to=800) == (800, 416)


@given(st.lists(st.sampled_from([(20, 20), (40, 20), (90, 30)]), max_size=20), st.booleans())
def test_each_tile_gets_its_answer_and_full_batches_have_powers_of_two(
    sides: list[tuple[int, int]], few_shapes: bool
) -> None:
    pixels = [np.full((*hw, 3), i, np.uint8) for i, hw in enumerate(sides)]
    sizes = []

    def detect_group(tiles: list[np.ndarray], canvas: tuple[int, int]) -> list[tuple[int, tuple[int, int]]]:
        sizes.append(len(tiles))
        assert all(stride_canvas((tile.shape[0], tile.shape[1])) == canvas for tile in tiles)
        return [(int(tile[0, 0, 0]), canvas) for tile in tiles]

    answers = detect_by_canvas(pixels, stride_canvas, detect_group, few_shapes)
    assert answers == [(i, stride_canvas(hw)) for i, hw in enumerate(sides)]
    counts = [sides.count(hw) for hw in dict.fromkeys(sides)]
    assert sizes == ([1 << (count - 1).bit_length() for count in counts] if few_shapes else counts)


def tiles_of_many_sizes() -> list[np.ndarray]:
    """Pieces of scenes, of as many sizes."""
    rng, images = np.random.default_rng(3), scenes(12)
    cuts = [(image, *rng.integers(100, image.shape[:2], 2)) for image in images * 3]
    return [image[:height, :width] for image, height, width in cuts]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [SAMPLE_DETECTOR, SAMPLE_DETECTOR_WEIGHTS])
def test_on_a_gpu_a_detector_computes_few_shapes_and_finds_the_same(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = tiles_of_many_sizes()
    plain = load_detector(name, iou_threshold=1.0)
    if device == "cpu":
        # A CPU that stands for a GPU.
        other: Any = load_detector(name, iou_threshold=1.0)
        other._few_to = other.input_side
    elif name == SAMPLE_DETECTOR_WEIGHTS:
        other = load_detector(name, device=device, iou_threshold=1.0)
    else:
        pytest.skip("onnxruntime-gpu is not measured here")
    shapes = {"plain": set[Any](), "other": set[Any]()}
    for title, detector in (("plain", plain), ("other", other)):
        run = detector._run  # type: ignore[union-attr]

        def noted(model: Any, tiles: Any, features: bool, *, run: Any = run, title: str = title) -> Any:
            shapes[title].add((len(tiles), tiles.shape[1:3]))
            return run(model, tiles, features)

        monkeypatch.setattr(detector, "_run", noted)
    found = [detector(tiles) for detector in (plain, other)]
    assert len(shapes["other"]) < len(shapes["plain"])
    for count, canvas in shapes["other"]:
        assert count & (count - 1) == 0
        assert {side / detector.input_side for side in canvas} <= {0.5, 1.0, 1.5, 2.0}
    differences = [
        pair
        for one, two in zip(*found, strict=True)
        if isinstance(one, Detections) and isinstance(two, Detections)
        for pair in partners(two, one, least_score=0.3)
    ]
    assert len(differences) > 20
    assert np.quantile([pixels for pixels, _ in differences], 0.9) < 2


def test_tiles_are_padded_with_grey_and_never_resized() -> None:
    tile = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    (canvas,) = padded([tile], (32, 32))
    np.testing.assert_array_equal(canvas[:20, :30], tile)
    assert (canvas[20:] == 114).all()
    assert (canvas[:, 30:] == 114).all()
