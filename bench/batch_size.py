"""What a batch is worth to YOLOX on one thread of a CPU: the time of a tile among several in a call, over alone.

SCALENET_RAY_DATA=DATA .venv/bin/python -m bench.batch_size
"""

from __future__ import annotations

import json
import os
import time

import numpy as np
import tyro

from bench.ratios import ratio
from bench.workloads import detector_name
from scalenet_ray.models.yolox import YoloxDetector

_TILES = 32
_SIDE = 416


def main(sizes: tuple[int, ...] = (2, 4, 8, 16, 32), rounds: int = 5) -> None:
    """Print the ratio of each size of batch.

    Args:
        sizes: tiles to a call, each a divisor of 32.
        rounds: how often each is run.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    session = YoloxDetector.load(detector_name().removeprefix("yolox-onnx:")).session
    name = session.get_inputs()[0].name
    tiles = np.random.default_rng(0).uniform(0, 255, (_TILES, 3, _SIDE, _SIDE)).astype(np.float32)
    seconds: dict[int, list[float]] = {size: [] for size in (1, *sizes)}
    for _ in range(rounds):
        for size, each in seconds.items():
            start = time.perf_counter()
            for first in range(0, _TILES, size):
                session.run(None, {name: tiles[first : first + size]})
            each.append(time.perf_counter() - start)
    print(json.dumps({size: ratio(seconds[size], seconds[1]) for size in sizes}, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
