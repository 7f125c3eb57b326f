"""Networks on a GPU answer as on the CPU: each test's cases on the CPU rehearse it at a small size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from bench.gpu_networks import cuda_products
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.geometry import iou_matrix
from scalenet_ray.core.scale import ScaleMap
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
from scalenet_ray.models.torchvision_builders import build_detector, detector_names
from scalenet_ray.models.torchvision_detectors import TorchvisionDetector
from scalenet_ray.sample.scenes import make_scene, write_sample
from tests.devices import DEVICES, ON_GPU
from tests.float64 import in_float64
from tests.job_scripts import load_job
from tests.oracles import detections, tile_of
from tests.test_torchvision_detectors import CATEGORIES, SMALL_RCNN, SMALL_SSD, make_tiles

DTYPES = {"bfloat16": torch.bfloat16, "half": torch.float16}
SMALL = (SMALL_RCNN, SMALL_SSD)
_ALL = 10**5
EVERY_NETWORK = [
    *(pytest.param(name, "cpu") for name in SMALL),
    *(pytest.param(name, "cuda", marks=ON_GPU) for name in detector_names()),
]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 is float32: by default torch computes convolutions on a GPU in TF32, of ten significant bits."""
    with cuda_products("ieee"):
        yield


def settled_model(name: str) -> Any:
    """A detector with random weights, the same each time, in which all batch norms fit noise."""
    torch.manual_seed(0)
    model: Any = build_detector(name, 3)
    hooks = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # type: ignore[assignment]
        elif isinstance(module, FrozenBatchNorm2d):
            hooks.append(module.register_forward_pre_hook(_fit_norm))
    side = model.transform.min_size[-1] if name.startswith("ssd") else 64
    with torch.no_grad():
        features = model.backbone(torch.randn(4, 3, side, side))
        if hasattr(model, "head"):
            model.head(list(features.values()))
        else:
            # Sane boxes, and scores that differ by more than float32's noise.
            model.roi_heads.box_predictor.bbox_pred.weight *= 0.1
            model.roi_heads.box_predictor.cls_score.weight *= 0.2
    for hook in hooks:
        hook.remove()
    return model.eval()


def _fit_norm(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    module.running_mean.copy_(inputs[0].mean((0, 2, 3)))
    module.running_var.copy_(inputs[0].var((0, 2, 3)))


def on_device(name: str, device: str) -> TorchvisionDetector:
    """A settled detector that computes in float64 and keeps all boxes; of a Mask R-CNN the best 8, which have masks.

    On small feature maps the scores of boxes tie, and which of them is suppressed or left out depends on the batch.
    What float32 rounds in the input, random weights make hundredths of a pixel.
    """
    model = in_float64(settled_model(name), "backbone")
    if hasattr(model, "roi_heads"):
        model.rpn.nms_thresh = 1.0
        model.rpn._pre_nms_top_n = model.rpn._post_nms_top_n = {"testing": _ALL}
        model.roi_heads.detections_per_img = 8 if name.startswith("maskrcnn") else _ALL
    else:
        model.topk_candidates = model.detections_per_img = _ALL
    detector = TorchvisionDetector(model, CATEGORIES, device=device, score_threshold=0.001, iou_threshold=1.0)
    detector.model.transform.register_forward_pre_hook(_unrounded)
    return detector


def _unrounded(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tiles in float64, of the grey levels that they had."""
    return [(tile.double() * 255).round() / 255 for tile in inputs[0]], *inputs[1:]


def assert_close(found: Detections, expected: Detections, slack: float = 1) -> None:
    """Detections that match one to one: of one class, boxes within 0.01 pixels times `slack`, scores within 1e-4."""
    pixels, least = 0.01 * slack, 1e-4 * slack
    assert len(found) == len(expected)
    found = found[np.argsort(found.scores)]
    free = np.ones(len(found), bool)
    for box, score, label in zip(expected.boxes, expected.scores, expected.labels, strict=True):
        at = slice(*np.searchsorted(found.scores, [score - least, score + least]))
        apart = np.abs(found.boxes[at] - box).max(axis=1, initial=0) / pixels
        apart[~free[at] | (found.labels[at] != label)] = np.inf
        assert apart.min(initial=np.inf) <= 1, f"nothing like the box {box} of class {label} that scores {score}"
        # Of several clipped to the same box, the one of the same score.
        free[at.start + (apart + np.abs(found.scores[at] - score) / least).argmin()] = False


def sides_of(name: str) -> tuple[tuple[int, int], ...]:
    return ((320, 200), (300, 320)) if name.startswith("ssd") else ((64, 96), (96, 50), (96, 96))


# --- detectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "device"), EVERY_NETWORK)
def test_a_torchvision_detector_finds_on_a_gpu_what_it_finds_on_the_cpu(name: str, device: str) -> None:
    tiles = make_tiles(*sides_of(name))
    expected, found = (detections(on_device(name, where)(tiles)) for where in ("cpu", device))
    assert all(len(each) for each in expected)
    for one, other in zip(found, expected, strict=True):
        # On a GPU torch's hardswish has a factor of float32's precision, also for float64.
        assert_close(one, other, 10 if name in SENSITIVE else 1)


FEATURE_ERRORS = {"float32": 1e-3, "bfloat16": 0.06, "half": 0.01}
"""Bounds of the features' relative error in the Euclidean norm. On a CPU bfloat16 has at most 0.036 and half 0.005, but
for the networks in `SENSITIVE`, which have 0.26 and 0.045."""

SENSITIVE = ("fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn")


@pytest.mark.parametrize("precision", FEATURE_ERRORS)
@pytest.mark.parametrize(("name", "device"), EVERY_NETWORK)
def test_its_features_differ_by_no_more_than_the_precisions_error(name: str, device: str, precision: str) -> None:
    if name == "ssd300_vgg16" and precision == "half":
        pytest.skip("its activations exceed half's range on a CPU too")
    error = FEATURE_ERRORS[precision] * (8 if name in SENSITIVE and precision != "float32" else 1)
    seen: list[torch.Tensor] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        first = output if isinstance(output, torch.Tensor) else next(iter(output.values()))
        seen.append(first.float().cpu())

    for where, dtype in (("cpu", None), (device, DTYPES.get(precision))):
        detector = TorchvisionDetector(settled_model(name), CATEGORIES, device=where)
        detector.model.backbone.register_forward_hook(note)
        if dtype is not None:
            detector._autocast = torch.autocast(where, dtype)
        detector(make_tiles(sides_of(name)[0]))
    expected, found = seen
    assert (found - expected).norm() <= error * expected.norm()
    assert precision == "float32" or not torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        (SMALL_RCNN, "cpu"),
        *(pytest.param(name, "cuda", marks=ON_GPU) for name in (*SMALL, "maskrcnn_resnet50_fpn")),
    ],
)
def test_a_batch_equals_its_tiles_one_by_one(name: str, device: str) -> None:
    detector, tiles = on_device(name, device), make_tiles(*sides_of(name), *sides_of(name))
    for tile, together in zip(tiles, detections(detector(tiles)), strict=True):
        (alone,) = detections(detector([tile]))
        assert_close(together, alone)


@pytest.mark.parametrize("device", DEVICES)
def test_masks_agree_pixel_by_pixel(device: str) -> None:
    (tile,) = make_tiles((96, 64))
    expected, found = (detections(on_device("maskrcnn_resnet50_fpn", where)([tile]))[0] for where in ("cpu", device))
    assert expected.masks
    assert found.masks
    one, other = (
        np.stack([coco_mask.decode({"size": [96, 64], "counts": counts}) for counts in masks])
        for masks in (found.masks, expected.masks)
    )
    assert one.any()
    assert (one != other).mean(axis=(1, 2)).max() < 0.01


# --- the sample's trained networks ------------------------------------------------------------------


def scenes(count: int) -> list[np.ndarray]:
    """Scenes of the sample at half their size, [h, w, 3] uint8 RGB."""
    rng = np.random.default_rng(5)
    return [make_scene(rng).pixels[::2, ::2] for _ in range(count)]


def at_precision(network: Any, device: str, precision: str) -> Any:
    """A loaded network under autocast of a precision, or as it is for float32."""
    if precision in DTYPES:
        network.model.forward = torch.autocast(device, DTYPES[precision])(network.model.forward)
    return network


def partners(found: Detections, expected: Detections, least_score: float) -> Iterator[tuple[float, float]]:
    """(largest difference in pixels, difference in score) of each expected box to the nearest found of its class."""
    for box, score, label in zip(expected.boxes, expected.scores, expected.labels, strict=True):
        if score >= least_score:
            same = (found.labels == label) & (iou_matrix(box[None], found.boxes)[0] > 0.5)
            assert same.any()
            pixels = np.abs(found.boxes[same] - box).max(axis=1)
            nearest = (np.abs(found.scores[same] - score) + pixels / 100).argmin()
            yield float(pixels[nearest]), float(np.abs(found.scores[same] - score)[nearest])


PRECISIONS = [("float32", 0.1, 1e-3), ("half", 0.5, 0.01), ("bfloat16", 2.0, 0.05)]
"""A precision with the bounds of its boxes in pixels and of its scores."""


@pytest.mark.parametrize(("precision", "pixels", "score"), PRECISIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_the_samples_detector_keeps_its_boxes_and_scores(
    device: str, precision: str, pixels: float, score: float
) -> None:
    # Nothing is suppressed: which of two boxes that nearly tie is kept depends on rounding.
    plain = load_detector(SAMPLE_DETECTOR_WEIGHTS, iou_threshold=1.0)
    other = at_precision(load_detector(SAMPLE_DETECTOR_WEIGHTS, device=device, iou_threshold=1.0), device, precision)
    images, differences = scenes(6), []
    for expected, found in zip(plain(images), other(images), strict=True):
        differences += partners(found, expected, least_score=0.3)
    assert len(differences) > 10
    assert np.max(differences, axis=0).tolist() <= [pixels, 1.0]
    assert max(each for _, each in differences) <= score


@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-3), ("half", 0.02), ("bfloat16", 0.1)])
@pytest.mark.parametrize("device", DEVICES)
def test_scale_net_keeps_its_probabilities(device: str, precision: str, error: float) -> None:
    plain, other = (load_predictor(SAMPLE_SCALE_NET_WEIGHTS, where) for where in ("cpu", device))
    at_precision(other, device, precision)
    images = scenes(3)
    tiles = [tile_of(image.shape[:2]) for image in images]
    for expected, found in zip(plain(images, tiles), other(images, tiles), strict=True):  # type: ignore[operator]
        assert isinstance(found, ScaleMap)
        difference = np.abs(found.prob - expected.prob)
        # A cell on the border of two classes may move further than the others.
        assert np.quantile(difference, 0.99) <= error
        assert precision == "float32" or difference.max() > 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_scale_head_reads_a_detectors_features(device: str, tmp_path: Path) -> None:
    config = NetworkSpec(detector=SAMPLE_DETECTOR_WEIGHTS).describe_features()
    torch.manual_seed(0)
    save_scale_head(ScaleHead(config), config, path := str(tmp_path / "head.safetensors"))
    images, answers = scenes(2), []
    tiles = [tile_of(image.shape[:2]) for image in images]
    for where in ("cpu", device):
        detector: Any = load_detector(SAMPLE_DETECTOR_WEIGHTS, device=where)
        head: Any = load_predictor(path, where)
        answers.append(head.from_features([each.features for each in detector.with_features(images)], tiles))
    for expected, found in zip(*answers, strict=True):
        np.testing.assert_allclose(found.prob, expected.prob, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_onnx_networks_answer_alike(device: str) -> None:
    if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    images, differences = scenes(3), []
    plain, other = (load_detector(SAMPLE_DETECTOR, device=where, iou_threshold=1.0) for where in ("cpu", device))
    for expected, found in zip(plain(images), other(images), strict=True):
        differences += partners(found, expected, least_score=0.3)  # type: ignore[arg-type]
    # onnxruntime computes convolutions on a GPU in TF32.
    assert np.max(differences, axis=0).tolist() <= [0.5, 0.01]
    maps = [load_predictor(SAMPLE_SCALE_NET, where)(images) for where in ("cpu", device)]  # type: ignore[operator]
    for expected, found in zip(*maps, strict=True):
        assert np.quantile(np.abs(found.prob - expected.prob), 0.99) <= 0.01


@pytest.mark.parametrize("mixed_precision", [pytest.param(False, marks=ON_GPU), pytest.param(True, marks=ON_GPU)])
def test_ap_on_the_sample_changes_by_half_a_point_at_most(mixed_precision: bool, tmp_path: Path) -> None:
    module = load_job("eval_coco")
    write_sample(tmp_path / "sample", train=1, val=100)

    def figures(name: str, networks: NetworkSpec) -> dict[str, Any]:
        """Metrics of the policies by name."""
        job = module.EvalCoco(
            data=str(tmp_path / "sample"),
            output=str(tmp_path / name),
            policies=("whole", "scalenet"),
            engine="local",
            networks=networks,
            report_pictures=0,
        )
        assert module.main(job) == 0
        return json.loads((tmp_path / name / "metrics.json").read_text())["policies"]

    # The torch networks on both devices: the exported ones hold weights in half precision.
    networks = NetworkSpec(detector=SAMPLE_DETECTOR_WEIGHTS, scale_net=SAMPLE_SCALE_NET_WEIGHTS)
    expected = figures("cpu", networks)
    found = figures("other", replace(networks, device="cuda", mixed_precision=mixed_precision))
    for policy, row in expected.items():
        assert row["AP"] > 5
        assert found[policy]["AP"] == pytest.approx(row["AP"], abs=0.5)
        assert found[policy]["AP_small"] == pytest.approx(row["AP_small"], abs=1.0)
