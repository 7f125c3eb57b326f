"""Networks as ONNX files: equal to the networks in torch, and known by their own metadata."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from scalenet_ray.commands.export_onnx import ExportOnnx, main
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import Tile, Window
from scalenet_ray.core.scale import ScaleMap
from scalenet_ray.models.detectors import load_detector
from scalenet_ray.models.scale_net import ScaleHead, build_scale_net, save_scale_head, save_scale_net
from scalenet_ray.models.scale_networks import (
    PRESETS,
    HeadConfig,
    ScaleHeadPredictor,
    ScaleNetPredictor,
    load_predictor,
)
from scalenet_ray.models.spec import (
    SAMPLE_DETECTOR,
    SAMPLE_DETECTOR_WEIGHTS,
    SAMPLE_SCALE_NET,
    SAMPLE_SCALE_NET_WEIGHTS,
    NetworkSpec,
)
from scalenet_ray.sample.scenes import sample_scene
from scalenet_ray.sample.tiny import TinyDetector

NAMES = (SAMPLE_DETECTOR, SAMPLE_DETECTOR_WEIGHTS)
CLOSE = {"rtol": 0, "atol": 1e-4}


def tiles(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*hw, 3), dtype=np.uint8) for hw in sizes]


def crops() -> list[np.ndarray]:
    scene = sample_scene("val2017", 7).pixels
    return [scene[:192, :192], scene[100:260, 40:232], scene[64:160, 64:160], scene[:192, 100:292]]


def recipes(pixels: list[np.ndarray]) -> list[Tile]:
    return [Tile(1, (), tile.shape[:2], Window(0, 0, tile.shape[1], tile.shape[0]), *tile.shape[:2]) for tile in pixels]


def values(scale_map: object) -> np.ndarray:
    assert isinstance(scale_map, ScaleMap)
    found = scale_map.prob if scale_map.scale is None else scale_map.scale
    assert found is not None
    return found


def assert_same_detections(found: object, wanted: object) -> None:
    assert isinstance(found, Detections)
    assert isinstance(wanted, Detections)
    np.testing.assert_array_equal(found.labels, wanted.labels)
    np.testing.assert_allclose(found.scores, wanted.scores, **CLOSE)
    np.testing.assert_allclose(found.boxes, wanted.boxes, rtol=0, atol=1e-2)


def test_the_samples_detector_as_onnx_equals_the_one_in_torch() -> None:
    here, torch_one = load_detector(SAMPLE_DETECTOR), load_detector(SAMPLE_DETECTOR_WEIGHTS)
    assert isinstance(here, TinyDetector)
    assert here.categories == torch_one.categories
    assert (here.input_side, here.iou_threshold) == (torch_one.input_side, torch_one.iou_threshold)
    for found, wanted in zip(here(crops()), torch_one(crops()), strict=True):
        assert_same_detections(found, wanted)


def test_the_samples_detector_as_onnx_has_the_feature_maps_that_a_scale_head_reads() -> None:
    here, torch_one = (NetworkSpec(name).load_detector({}).with_features(crops()) for name in NAMES)
    for found, wanted in zip(here, torch_one, strict=True):
        assert_same_detections(found.detections, wanted.detections)
        assert len(found.features) == 3
        for level, other in zip(found.features, wanted.features, strict=True):
            np.testing.assert_allclose(level, other, rtol=1e-4, atol=1e-4)


def test_the_samples_scale_net_as_onnx_equals_the_one_in_torch() -> None:
    here, torch_one = load_predictor(SAMPLE_SCALE_NET), load_predictor(SAMPLE_SCALE_NET_WEIGHTS)
    assert isinstance(here, ScaleNetPredictor)
    assert (here.config, here.input_pixels) == (torch_one.config, torch_one.input_pixels)
    for found, wanted in zip(here(crops()), torch_one(crops()), strict=True):
        np.testing.assert_allclose(values(found), values(wanted), **CLOSE)


@pytest.mark.parametrize("name", [SAMPLE_DETECTOR_WEIGHTS.removeprefix("tiny:"), SAMPLE_SCALE_NET_WEIGHTS])
def test_the_samples_files_are_those_that_the_command_writes(tmp_path: Path, name: str) -> None:
    output = tmp_path / "again.onnx"
    assert main(ExportOnnx(name, str(output))) == 0
    shipped, again = onnx.load(name.replace(".safetensors", ".onnx")), onnx.load(output)
    assert {prop.key: prop.value for prop in shipped.metadata_props} == {p.key: p.value for p in again.metadata_props}
    weights = [{w.name: onnx.numpy_helper.to_array(w) for w in m.graph.initializer} for m in (shipped, again)]
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        np.testing.assert_allclose(tensor, weights[1][key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["fcn-digits", "unet-light", "unet-lite0"])
def test_a_scale_net_exports_equal_to_itself(tmp_path: Path, preset: str) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "net.safetensors"
    save_scale_net(build_scale_net(PRESETS[preset]), PRESETS[preset], weights)
    assert main(ExportOnnx(str(weights))) == 0
    here, torch_one = load_predictor(tmp_path / "net.onnx"), load_predictor(weights)
    assert here.config == torch_one.config
    batch = tiles((64, 96), (64, 96), (100, 70), (17, 33))
    assert isinstance(here, ScaleNetPredictor)
    for found, wanted in zip(here(batch, []), torch_one(batch, []), strict=True):
        np.testing.assert_allclose(values(found), values(wanted), **CLOSE)


def test_a_scale_head_exports_equal_to_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = load_detector(SAMPLE_DETECTOR)
    assert isinstance(detector, TinyDetector)
    config = HeadConfig(detector.feature_channels, detector.feature_stride, detector="the sample's")
    weights = str(tmp_path / "head.safetensors")
    save_scale_head(ScaleHead(config), config, weights)
    assert main(ExportOnnx(weights)) == 0
    here, torch_one = load_predictor(tmp_path / "head.onnx"), load_predictor(weights)
    assert isinstance(here, ScaleHeadPredictor)
    assert here.config == torch_one.config
    here.check(detector)
    pixels = [*crops(), *tiles((70, 40), (33, 33))]
    features = [answer.features for answer in detector.with_features(pixels)]
    for found, wanted in zip(
        here.from_features(features, recipes(pixels)), torch_one.from_features(features, recipes(pixels)), strict=True
    ):
        assert values(found).shape == values(wanted).shape
        np.testing.assert_allclose(values(found), values(wanted), **CLOSE)


def test_an_onnx_file_of_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"must have 'scale_net' or 'scale_head' in its metadata, got \['tiny_detector'\]"
    ):
        load_predictor(SAMPLE_DETECTOR.removeprefix("tiny:"))
    with pytest.raises(UserError, match=r"must have 'tiny_detector' in its metadata, got \['scale_net'\]"):
        load_detector(f"tiny:{SAMPLE_SCALE_NET}")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"none")
    with pytest.raises(UserError, match="must be a whole ONNX file, got 4 bytes"):
        load_predictor(damaged)


def test_an_onnx_file_keeps_its_own_precision() -> None:
    with pytest.raises(UserError, match="mixed precision is for weights as safetensors"):
        load_predictor(SAMPLE_SCALE_NET, mixed_precision=True)
    with pytest.raises(UserError, match="mixed precision is for weights as safetensors"):
        load_detector(SAMPLE_DETECTOR, mixed_precision=True)


def test_the_output_must_be_an_onnx_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--output must end in \.onnx, got a\.pt"):
        main(ExportOnnx(SAMPLE_SCALE_NET_WEIGHTS, "a.pt"))


def test_weights_that_float16_holds_are_stored_so_and_the_samples_stay_under_ten_megabytes() -> None:
    detector = Path(SAMPLE_DETECTOR.removeprefix("tiny:"))
    stored = [onnx.numpy_helper.to_array(weights) for weights in onnx.load(detector).graph.initializer]
    assert {weights.dtype for weights in stored if weights.size >= 1024} == {np.dtype(np.float16)}
    files = [path for path in detector.parent.iterdir() if path.suffix in (".onnx", ".safetensors")]
    assert len(files) == 4
    assert sum(path.stat().st_size for path in files) < 10_000_000
