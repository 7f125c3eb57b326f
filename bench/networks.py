"""Tiles per second of the paper's two networks in bfloat16 and compiled, relative to float32.

    .venv/bin/python -m bench.networks --device cuda
    .venv/bin/python -m bench.networks --device cpu --batch-size 1 --side 320 --variants float32 compiled

`make bench` runs it where torch finds a CUDA device.

The weights are random: they cost what trained ones do, but for the boxes that come out.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro

from bench.workloads import ratio, spread
from scalenet_ray.models.scale_net import ScaleNetPredictor, build_scale_net, save_scale_net
from scalenet_ray.models.scale_networks import PRESETS
from scalenet_ray.models.torchvision_builders import build_detector
from scalenet_ray.models.torchvision_detectors import TorchvisionDetector

__all__ = ["NetworkSpeed", "network_speed"]

Variant = Literal["float32", "bfloat16", "compiled", "bfloat16-compiled"]
Look = Callable[[list[np.ndarray]], Any]

_CLASSES = 91
_CALLS = 4


@dataclass(frozen=True)
class NetworkSpeed:
    """Time Faster R-CNN ResNet-101-FPN, and the U-Net with VGG-16 at 512.

    Attributes:
        device: where they compute, as torch names it.
        batch_size: tiles to a call.
        side: of a tile for the detector, in pixels.
        rounds: in each, every variant runs once.
        variants: what to compare; all by default. What is compiled is the detector's backbone, and all of the U-Net.
    """

    device: str = "cuda"
    batch_size: int = 16
    side: int = 800
    rounds: int = 5
    variants: tuple[Variant, ...] = get_args(Variant)

    def __post_init__(self) -> None:
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            msg = f"torch finds no CUDA device for --device {self.device}: measure on a machine that has one"
            raise SystemExit(msg)


def _detector(variant: Variant, device: str) -> Look:
    # Random boxes score about 1 in 91: none is kept, as of a trained network few are.
    detector = TorchvisionDetector(
        build_detector("fasterrcnn_resnet101_fpn", _CLASSES),
        {1: "object"},
        device=device,
        score_threshold=0.5,
        mixed_precision=variant.startswith("bfloat16"),
    )
    if variant.endswith("compiled"):
        detector.model.backbone.compile()
    return detector


def _scale_net(variant: Variant, device: str) -> Look:
    config = PRESETS["unet-vgg16"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scale_net.safetensors"
        save_scale_net(build_scale_net(config), config, path)
        predictor = ScaleNetPredictor(path, device, mixed_precision=variant.startswith("bfloat16"))
    if variant.endswith("compiled"):
        predictor.model.compile()
    return predictor


def _memory(device: str, look: Look, tiles: list[np.ndarray]) -> float | None:
    """Gigabytes that a call takes at its peak, weights included; None where torch does not count them."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.reset_peak_memory_stats(device)
    look(tiles)
    return torch.cuda.max_memory_allocated(device) / 1e9


def _tiles_per_second(look: Look, tiles: list[np.ndarray]) -> float:
    start = time.perf_counter()
    for _ in range(_CALLS):
        look(tiles)  # Its answers are in numpy: the device has done all of it.
    return _CALLS * len(tiles) / (time.perf_counter() - start)


def _compare(job: NetworkSpeed, make: Callable[[Variant, str], Look]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    tiles = [rng.integers(0, 256, (job.side * 3 // 4, job.side, 3), np.uint8) for _ in range(job.batch_size)]
    looks = {variant: make(variant, job.device) for variant in job.variants}
    # Kernels are chosen and compiled in the first call.
    gigabytes = {variant: (look(tiles), _memory(job.device, look, tiles))[1] for variant, look in looks.items()}
    rates: dict[Variant, list[float]] = {variant: [] for variant in job.variants}
    for _ in range(job.rounds):
        for variant, measured in rates.items():
            measured.append(_tiles_per_second(looks[variant], tiles))
    first = rates[job.variants[0]]
    return {
        variant: {
            "tiles_per_second": spread(rate),
            f"over_{job.variants[0]}": ratio(rate, first),
            "gigabytes": gigabytes[variant],
        }
        for variant, rate in rates.items()
    }


def network_speed(job: NetworkSpeed) -> dict[str, Any]:
    """Of the detector and of Scale Net, each variant's tiles a second, their ratio to the first's, gigabytes."""
    return {"detector": _compare(job, _detector), "scale_net": _compare(job, _scale_net)}


if __name__ == "__main__":
    print(json.dumps(network_speed(tyro.cli(NetworkSpeed)), indent=1))
