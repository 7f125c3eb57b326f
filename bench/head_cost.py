"""What a scale head costs beside its detector: paired timings on one thread, of a whole image's tile.

.venv/bin/python bench/head_cost.py --detector yolox-onnx:PATH --scale-net runs/head/scale_net.safetensors
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import tyro

from scalenet_ray.core.geometry import Tile, Window
from scalenet_ray.models.detectors import load_detector
from scalenet_ray.models.scale_head import ScaleHeadPredictor
from scalenet_ray.models.spec import NetworkSpec


@dataclass(frozen=True)
class HeadCost:
    """Time a detector alone, the detector with its features shown, and the head.

    Attributes:
        detector: kind:what.
        scale_net: the head's weights.
        rounds: how many paired rounds.
    """

    detector: str
    scale_net: str
    rounds: int = 40


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(job: HeadCost) -> None:
    """Print the medians of the rounds' ratios, with their middle half."""
    torch.set_num_threads(1)
    detector = NetworkSpec(detector=job.detector).load_detector(load_detector(job.detector).categories)
    head = ScaleHeadPredictor(job.scale_net)
    height, width = detector.input_side * 3 // 4, detector.input_side
    pixels = [np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)]
    tiles = [Tile(0, (), (height, width), Window(0, 0, width, height), height, width)]
    features = [glimpse.features for glimpse in detector.with_features(pixels)]
    alone, shown, looked = [], [], []
    for _ in range(job.rounds):
        alone.append(_seconds(lambda: detector(pixels)))
        shown.append(_seconds(lambda: detector.with_features(pixels)))
        looked.append(_seconds(lambda: head.from_features(features, tiles)))
    for name, ratio in (
        ("showing the features", np.array(shown) / alone - 1),
        ("the head", np.array(looked) / alone),
        ("both", (np.array(shown) + looked) / alone - 1),
    ):
        low, middle, high = np.percentile(ratio, [25, 50, 75])
        print(f"{name}: {middle:.3f} of a detector pass [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main(tyro.cli(HeadCost))
