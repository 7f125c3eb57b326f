"""Training on a GPU goes as on the CPU: each test's cases on the CPU rehearse it at a small size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from bench.gpu_networks import cuda_products
from scalenet_ray.experiments.classifiers import build_classifier, classifier_loss
from scalenet_ray.models.scale_net import ScaleHead, build_scale_net, normalised
from scalenet_ray.models.scale_networks import PRESETS, HeadConfig
from scalenet_ray.models.spec import SAMPLE_DETECTOR, NetworkSpec
from scalenet_ray.sample.scenes import write_sample
from scalenet_ray.training.detector_recipe import plan_fine_tuning
from scalenet_ray.training.examples import TrainingImages
from scalenet_ray.training.losses import focal_loss, masked_mse
from scalenet_ray.training.recipe import Batch, Recipe, clip_and_step, forward_backward
from scalenet_ray.training.scale_recipe import CLASS_WEIGHTS, HeadRecipe, ScaleRecipe
from tests.devices import DEVICES


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_sample(tmp_path_factory.mktemp("gpu") / "sample", train=4, val=1))


def batch_of(recipe: Recipe, device: str) -> Batch:
    """The first four examples of a recipe."""
    rows = [recipe.example(i, 0) for i in range(4)]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])).to(device) for name in rows[0]}


def losses(recipe: Recipe, device: str, wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> list[float]:
    """The losses of three steps on one batch, in two parts each; float32 is float32, and not TF32."""
    with cuda_products("ieee"):
        return _losses(recipe, device, wrap)


def _losses(recipe: Recipe, device: str, wrap: Callable[[nn.Module], nn.Module]) -> list[float]:
    torch.manual_seed(0)
    batch = batch_of(recipe, device)
    model = wrap(recipe.build().to(device).train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = []
    for _ in range(3):
        loss = forward_backward(model, batch, recipe.loss, parts=2)
        clip_and_step(model, optimizer, loss, 10.0)
        found.append(float(loss))
    with torch.inference_mode():
        assert recipe.figures(recipe.count(getattr(model, "module", model).eval(), batch))
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_scale_nets_steps_have_the_same_losses(device: str, sample: str) -> None:
    recipe = ScaleRecipe(TrainingImages(sample), replace(PRESETS["unet-light"], input_side=64))
    expected = losses(recipe, "cpu")
    assert expected[-1] < expected[0]
    assert losses(recipe, device) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_under_distributed_data_parallel_has_the_same_loss(device: str, sample: str, tmp_path: Path) -> None:
    recipe = ScaleRecipe(TrainingImages(sample), replace(PRESETS["unet-light"], input_side=64))
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        assert losses(recipe, device, DistributedDataParallel) == pytest.approx(losses(recipe, device), rel=0.01)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("device", DEVICES)
def test_a_detectors_step_lowers_its_loss(device: str, sample: str) -> None:
    start = "untrained:fasterrcnn_mobilenet_v3_large_320_fpn"
    recipe = plan_fine_tuning(TrainingImages(sample), start, input_side=96)
    first, _, last = losses(recipe, device)
    assert np.isfinite([first, last]).all()
    assert last < first


class _FeaturesOfNoise(HeadRecipe):
    """A head's recipe whose examples are noise: it needs no detector."""

    def example(self, index: int, epoch: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([index, epoch])
        levels = {
            f"level{i}": rng.normal(size=(channels, 8 >> i, 8 >> i)).astype(np.float16)
            for i, channels in enumerate(self.config.feature_channels)
        }
        return {"image_id": np.array([index]), **levels, "target": rng.integers(0, 6, (8, 8)).astype(np.uint8)}


@pytest.mark.parametrize("device", DEVICES)
def test_a_heads_steps_have_the_same_losses(device: str, sample: str) -> None:
    spec = NetworkSpec(detector=SAMPLE_DETECTOR)
    recipe = _FeaturesOfNoise(TrainingImages(sample), spec, spec.describe_features())
    assert losses(recipe, device) == pytest.approx(losses(recipe, "cpu"), rel=0.01)


# --- devices without a GPU --------------------------------------------------------------------------


def _on_fake_gpu(make: Callable[[], Any]) -> Any:
    with torch.device("cuda:0"):
        return make()


def _loss_of_scale_net(preset: str) -> torch.Tensor:
    config = PRESETS[preset]
    side = config.input_side or 32
    images = torch.zeros(2, side, side, 3, dtype=torch.uint8, device="cuda:0")
    output = _on_fake_gpu(lambda: build_scale_net(config))(normalised(images, config))
    if config.kind == "regression":
        return masked_mse(output, torch.ones(output.shape, device="cuda:0"))
    return _loss_of_classes(output)


def _loss_of_classes(output: torch.Tensor) -> torch.Tensor:
    target = torch.zeros(2, *output.shape[2:], dtype=torch.uint8, device="cuda:0")
    return focal_loss(output, target, class_weights=torch.tensor(CLASS_WEIGHTS))


def _loss_of_scale_head() -> torch.Tensor:
    head = _on_fake_gpu(lambda: ScaleHead(HeadConfig((8, 8))))
    return _loss_of_classes(head([torch.zeros(2, 8, side, side, device="cuda:0") for side in (16, 8)]))


def _loss_of_classifier(kind: Any, width: float, side: int) -> torch.Tensor:
    model = _on_fake_gpu(lambda: build_classifier(kind, side=side, in_channels=1, width=width))
    labels = torch.zeros(2, dtype=torch.long, device="cuda:0")
    return classifier_loss(kind, model(torch.zeros(2, 1, side, side, device="cuda:0")), labels)


LOSSES = {
    **{preset: partial(_loss_of_scale_net, preset) for preset in PRESETS},
    "head": _loss_of_scale_head,
    "plain": partial(_loss_of_classifier, "plain", 1.0, 28),
    "deformable": partial(_loss_of_classifier, "deformable", 1.0, 28),
    "capsnet": partial(_loss_of_classifier, "capsnet", 0.25, 28),
    "vgg11": partial(_loss_of_classifier, "vgg11", 0.25, 64),
}


@pytest.mark.parametrize("name", LOSSES)
def test_networks_and_losses_keep_all_tensors_on_the_batchs_device(name: str) -> None:
    # Tensors without data, of which torch checks the devices as it would on a machine with a GPU.
    with FakeTensorMode():
        assert LOSSES[name]().device == torch.device("cuda:0")
