"""A trained detector on a GPU: what a new shape of a batch costs, and large photographs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from bench.gpu_engine import full_engine, shared_resources
from bench.gpu_networks import Record, Setup, compare
from bench.gpu_recursion import recursion
from bench.workloads import spread
from scalenet_ray.core.policy import parse_policy
from scalenet_ray.engine.session import join_ray
from scalenet_ray.models.detectors import load_detector

_MISSING: Record = {"remark": "give a trained detector with --detector"}
_TILES_HW = ((256, 288), (288, 416), (416, 288), (640, 900), (640, 640))
"""Sizes of tiles, in tile pixels, each on another canvas."""

_LATER_CALLS = 8


def _loader(setup: Setup) -> Callable[[], Any] | None:
    """Loader of the trained detector on the device; None where none was named."""
    return None if setup.detector is None else partial(load_detector, setup.detector, device=setup.device)


def measure_shapes(setup: Setup) -> Iterator[Record]:
    """Milliseconds of the first call with tiles of a size that is new to the device, and of later ones."""
    load = _loader(setup)
    if load is None:
        yield _MISSING
        return
    detector, rng = load(), np.random.default_rng(0)

    def milliseconds(count: int, hw: tuple[int, int]) -> float:
        """Duration of a call with tiles of noise."""
        tiles = [rng.integers(0, 256, (*hw, 3), np.uint8) for _ in range(count)]
        start = time.perf_counter()
        detector(tiles)
        return 1000 * (time.perf_counter() - start)

    milliseconds(1, (900, 900))  # The library itself is loaded in the first call of all.
    batches = sorted({*setup.sizes.batches} - {1})
    for count, hw in [*((1, hw) for hw in _TILES_HW), *((count, _TILES_HW[-1]) for count in batches)]:
        first = milliseconds(count, hw)
        later = spread([milliseconds(count, hw) for _ in range(_LATER_CALLS)])
        yield {"tiles": count, "height": hw[0], "width": hw[1], "first call, ms": first, "later calls, ms": later}


def measure_large(setup: Setup) -> Iterator[Record]:
    """Images/s of a trained detector on large photographs: one image at a time, and on Ray while it is full."""
    load = _loader(setup)
    if load is None:
        yield _MISSING
        return
    detector = load()
    side = detector.input_side
    policies = [
        parse_policy(name, input_side=side, iou_threshold=0.5) for name in ("whole", f"slices@{side}", "regions")
    ]
    images = [(setup.open_image(record), record.image_id) for record in setup.dataset.images]
    passes: dict[str, float] = {}
    makers = {policy.name: partial(recursion, setup, images, policy, detector, None, passes) for policy in policies}
    for figures in compare(setup, makers, "images/s", engine="one image at a time"):
        yield {**figures, "passes": passes.get(figures["variant"])}
    join_ray()
    for policy in policies:
        yield {"engine": "Ray", **full_engine(setup, policy, load, None, shared_resources(setup))}
