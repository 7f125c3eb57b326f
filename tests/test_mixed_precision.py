"""Networks under bfloat16: which support it, and how close their results are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scalenet_ray.core.detections import Detections
from scalenet_ray.models.detectors import load_detector
from scalenet_ray.models.scale_net import ScaleHead, save_scale_head
from scalenet_ray.models.scale_networks import load_predictor
from scalenet_ray.models.spec import (
    SAMPLE_DETECTOR,
    SAMPLE_DETECTOR_WEIGHTS,
    SAMPLE_SCALE_NET,
    SAMPLE_SCALE_NET_WEIGHTS,
    NetworkSpec,
)
from scalenet_ray.models.torchvision_builders import build_detector
from scalenet_ray.models.torchvision_detectors import TorchvisionDetector
from scalenet_ray.sample.scenes import SAMPLE_CATEGORIES, make_scene
from tests.oracles import tile_of
from tests.scripted_detector import SCRIPTED

SAMPLE = NetworkSpec(detector=SAMPLE_DETECTOR, scale_net=SAMPLE_SCALE_NET)


def dtypes_seen(model: nn.Module) -> set[torch.dtype]:
    """What its convolutions give from now on."""
    seen: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    return seen


def scenes(count: int) -> list[np.ndarray]:
    """Scenes like the sample's, [h, w, 3] uint8 RGB, at half their size: as a whole image's tile."""
    rng = np.random.default_rng(5)
    return [make_scene(rng).pixels[::2, ::2] for _ in range(count)]


@pytest.mark.parametrize("mixed_precision", [False, True])
@pytest.mark.parametrize(
    "name", ["fasterrcnn_resnet50_fpn", "fcos_resnet50_fpn", "maskrcnn_resnet50_fpn", "ssdlite320_mobilenet_v3_large"]
)
def test_torchvisions_detectors_compute_in_it_where_asked_and_answer_in_float32(
    name: str, mixed_precision: bool
) -> None:
    torch.manual_seed(0)
    model = build_detector(name, 3)
    detector = TorchvisionDetector(model, {1: "cat", 2: "dog"}, score_threshold=0.0, mixed_precision=mixed_precision)
    seen = dtypes_seen(model)
    (found,) = detector([np.zeros((64, 48, 3), np.uint8)])
    assert seen == {torch.bfloat16 if mixed_precision else torch.float32}
    assert isinstance(found, Detections)
    assert found.boxes.dtype == found.scores.dtype == np.float32


# tests/test_gpu.py bounds what this changes in their answers.
@pytest.mark.parametrize(
    ("load", "name"), [(load_detector, SAMPLE_DETECTOR_WEIGHTS), (load_predictor, SAMPLE_SCALE_NET_WEIGHTS)]
)
def test_the_samples_networks_compute_in_it_and_answer_in_float32(load: Any, name: str) -> None:
    network, pixels = load(name, mixed_precision=True), scenes(1)
    seen = dtypes_seen(network.model)
    (found,) = network(pixels, [tile_of(pixels[0].shape[:2])]) if load is load_predictor else network(pixels)
    assert (found.prob if load is load_predictor else found.boxes).dtype == np.float32
    assert seen == {torch.bfloat16}


def test_a_scale_head_reads_a_detectors_features_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = SAMPLE.describe_features()
    save_scale_head(ScaleHead(config), config, path := str(tmp_path / "head.safetensors"))
    pixels = scenes(2)
    names = NetworkSpec(detector=SAMPLE_DETECTOR, scale_net=path, mixed_precision=True)
    features = [one.features for one in names.load_detector(SAMPLE_CATEGORIES).with_features(pixels)]
    assert all(level.dtype == np.float32 for levels in features for level in levels)
    head: Any = names.load_scale_net()
    seen = dtypes_seen(head.model)
    tiles = [tile_of(tile.shape[:2]) for tile in pixels]
    for plain, mixed in zip(
        load_predictor(path).from_features(features, tiles), head.from_features(features, tiles), strict=True
    ):
        np.testing.assert_allclose(mixed.prob, plain.prob, atol=0.02)
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("yolox-onnx:net.onnx", "is for detectors of kind .*, ultralytics or of your own, got 'yolox-onnx:net.onnx'"),
        (SCRIPTED, "must take an argument mixed_precision for it, got none"),
    ],
)
def test_a_network_that_has_its_own_precision_is_refused(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"{said}.*: leave mixed precision out"):
        NetworkSpec(detector=spec, mixed_precision=True).describe_detector()
