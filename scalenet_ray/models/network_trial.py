"""Short trial of a run's networks and of its images: seconds and memory per tile on a device."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import cycle, islice

import numpy as np

from scalenet_ray.core.errors import OutOfMemoryError, TileError
from scalenet_ray.core.geometry import Tile, tile_pixels
from scalenet_ray.core.networks import FeatureScalePredictor, NetworkTrial, TrialCall
from scalenet_ray.core.policy import Policy
from scalenet_ray.data.image_records import ImageRecord, OpenImage
from scalenet_ray.models.spec import NetworkSpec

_IMAGES = 3
"""As many as a detector is tried on before a run."""

_BATCH_SIZES = {"cpu": (4, 16), "cuda": (8, 32)}

_MOST_SECONDS = 2.0
"""A larger batch is not tried if it would take longer."""


def try_networks(
    networks: NetworkSpec,
    policies: Sequence[Policy],
    categories: Mapping[int, str],
    unused: Collection[int],
    images: Sequence[ImageRecord],
    open_image: OpenImage,
) -> NetworkTrial:
    """Load the networks on their device, and time them on the first images in batches of two sizes.

    The policy with the largest tiles is tried. Arguments are as for `NetworkSpec.check`.

    Raises:
        UserError: if this machine lacks the device, or the networks cannot be loaded on it.
        OutOfMemoryError: if a single tile does not fit the device.
    """
    networks.check_device(here=True)
    used_before = _gpu_memory()[0] if networks.device != "cpu" else 0
    detect = networks.load_detector(categories, unused)
    needs_network = any(policy.needs_network for policy in policies)
    scale_net = networks.load_scale_net() if needs_network else None
    policy = max(policies, key=lambda policy: policy.largest_side)
    begun = time.perf_counter()
    tried = images[:_IMAGES]
    tiles = _tiles_of(policy, tried, open_image)
    read_seconds = (time.perf_counter() - begun) / max(1, len(tried))

    def run(count: int) -> None:
        """Run all networks on a batch."""
        batch, pixels = zip(*islice(cycle(tiles), count), strict=True)
        detect(list(pixels))
        if scale_net is not None and not isinstance(scale_net, FeatureScalePredictor):
            scale_net(list(pixels), list(batch))

    calls = _timed_calls(run, networks.device)
    process_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if networks.device == "cpu":
        return NetworkTrial("cpu", calls, read_seconds, process_bytes)
    in_use, total = _gpu_memory()
    # A class of the user's may have no use for a GPU.
    device = networks.device if in_use > used_before or not total else "cpu"
    return NetworkTrial(device, calls, read_seconds, process_bytes, total)


def _tiles_of(policy: Policy, images: Sequence[ImageRecord], open_image: OpenImage) -> list[tuple[Tile, np.ndarray]]:
    """The whole images' tiles with their pixels; a blank one if no image can be read."""
    tiles = []
    for record in images:
        try:
            image = open_image(record)
            tile = policy.root(record.image_id, (image.shape[0], image.shape[1]))
            tiles.append((tile, tile_pixels(image, tile)))
        except TileError:
            continue
    side = policy.input_side
    return tiles or [(policy.root(0, (side, side)), np.zeros((side, side, 3), np.uint8))]


def _timed_calls(run: Callable[[int], None], device: str) -> tuple[TrialCall, ...]:
    """Calls with growing batches, while they fit the device and are short."""
    run(1)  # The first call allocates memory and chooses algorithms.
    calls: list[TrialCall] = []
    for tiles in (1, *_BATCH_SIZES["cpu" if device == "cpu" else "cuda"]):
        if calls and calls[-1].seconds / calls[-1].tiles * tiles > _MOST_SECONDS:
            break
        begun = time.perf_counter()
        try:
            run(tiles)
        except OutOfMemoryError:
            if not calls:
                raise
            break
        seconds = time.perf_counter() - begun
        calls.append(TrialCall(tiles, seconds, 0 if device == "cpu" else _gpu_memory()[0]))
    return tuple(calls[1:] or calls)


def _gpu_memory() -> tuple[int, int]:
    """Bytes in use and in all of the GPU of this process; (0, 0) if there is no torch to tell."""
    try:
        import torch
    except ModuleNotFoundError:
        return 0, 0
    if not torch.cuda.is_available():
        return 0, 0
    free, total = torch.cuda.mem_get_info()
    return total - free, total
