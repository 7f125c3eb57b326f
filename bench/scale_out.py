"""Scale-out, simulated: networks that sleep as long as an accelerator would work, on nodes that share this machine.

    make bench
    .venv/bin/python -m bench.scale_out --detectors 1 4 16 64
    .venv/bin/python -m bench.scale_out --detectors 4 16 --policy first-pass

A detector sleeps 25 ms a tile, Scale Net a third of it, times `slower`: sleeping costs nothing, but the engine's own
work for 64 accelerators must all be done by this machine's few cores, where a cluster would have some for each of them.
What 64 need here at a slowness of 8, they need on eight times as many cores at 1, but for what one process alone
does, the driver and the frontier: the seconds that these spend on a tile are told.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import ray
import tyro
from ray.cluster_utils import Cluster

from bench.fakes import TILES_PER_IMAGE, Looks, Tally, fake_networks, grey_image, records_of, two_windows
from bench.growth import cpu_clocks, spent_by_role
from bench.workloads import spread
from scalenet_ray.engine.parallel import image_stream
from scalenet_ray.runs.automatic import TILES_PER_SECOND_OF_A_PIPELINE
from scalenet_ray.runs.batch import Stream
from scalenet_ray.runs.resources import AdvancedResources, Resources

_SCALE_NET_SHARE = 0.32
_DETECTORS_PER_NODE = 16
_TILES_PER_DETECTOR = 160
_OPEN_IMAGES_PER_DETECTOR = 64
_SINGLE = ("driver", "PipelineActor", "FrontierActor")
"""Of which there is one, or a few, however many detectors there are."""


@dataclass(frozen=True)
class ScaleOut:
    """Efficiency against the number of accelerators.

    Attributes:
        detectors: how many actors detect; one Scale Net actor, or another detector, and one reader for four of them.
        slower: networks sleep so many times longer than accelerators would work.
        straggles: the first detector sleeps so many times longer than the others.
        rounds: how often each is run.
        policy: who looks: Scale Net, or the detector itself; then every actor looks and detects.
        seconds: a tile takes of an accelerator's detector.
    """

    detectors: tuple[int, ...] = (1, 4, 16, 64)
    slower: float = 8.0
    straggles: float = 1.0
    rounds: int = 3
    policy: Looks = "scalenet"
    seconds: float = 0.025


def scale_out(
    detectors: int,
    slower: float,
    straggles: float,
    rounds: int,
    policy: Looks = "scalenet",
    seconds: float = 0.025,
) -> dict[str, Any]:
    """Efficiency of the engine with simulated accelerators, on a cluster of its own.

    Returns:
        While the pipeline is full, and as spreads of rounds: `efficiency`, the share of the time in which detectors are
        busy, or, where one straggles, tiles a second over the most that they could do; `batch_fill`, tiles of a call
        over those it could have. And `seconds_a_tile` of CPU of the processes of which there are one or few.
    """
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(math.ceil(detectors / _DETECTORS_PER_NODE)):
        cluster.add_node(num_cpus=2 * _DETECTORS_PER_NODE)
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    scale_actors = math.ceil(detectors / 4)
    resources = Resources(
        readers=scale_actors,
        scale_actors=scale_actors,
        detector_actors=detectors,
        advanced=AdvancedResources(
            max_open_images=_OPEN_IMAGES_PER_DETECTOR * detectors,
            # As many as a run chooses for accelerators that are not slowed.
            pipelines=min(scale_actors, math.ceil(detectors / seconds / TILES_PER_SECOND_OF_A_PIPELINE)),
        ),
    )
    with_detector = detectors + (scale_actors if policy == "first-pass" else 0)
    count = math.ceil(_TILES_PER_DETECTOR * detectors / TILES_PER_IMAGE) + 2 * resources.open_images
    busy: list[float] = []
    fills: list[float] = []
    rates: list[float] = []
    spent: defaultdict[str, float] = defaultdict(float)
    try:
        for _ in range(rounds):
            tally: Any = Tally.remote()
            networks = fake_networks(
                seconds * slower,
                _SCALE_NET_SHARE * seconds * slower,
                tally=tally,
                straggles=straggles,
                in_corners=policy == "first-pass",
            )
            before = cpu_clocks()
            stream = image_stream(records_of(count), two_windows(policy), networks, grey_image, resources)
            start, end = _steady(count, stream, resources.open_images)
            # Its processes are still there.
            for role, of_role in spent_by_role(before, cpu_clocks()).items():
                spent[role] += of_role
            detectors_busy, tiles_per_call, tiles_per_second = ray.get(tally.between.remote(start, end))
            busy.append(detectors_busy / with_detector)
            fills.append(tiles_per_call / resources.detector_batch_size)
            rates.append(tiles_per_second)
    finally:
        ray.shutdown()
        cluster.shutdown()
    tiles = rounds * TILES_PER_IMAGE * count
    # A detector that straggles is a part of one.
    most = (with_detector - 1 + 1 / straggles) / (seconds * slower)
    return {
        "efficiency": spread(busy if straggles == 1.0 else [rate / most for rate in rates]),
        "batch_fill": spread(fills),
        "seconds_a_tile": {role: spent[role] / tiles for role in _SINGLE if role in spent},
    }


def _steady(count: int, stream: Stream, open_images: int) -> tuple[float, float]:
    """(start, end) of the time in which the pipeline is full."""
    ends = []
    for result in stream:
        ends.append(time.time())
        stream.commit([result.image_id])
    return ends[open_images - 1], ends[count - open_images - 1]


def main(job: ScaleOut) -> None:
    """Print the figures of each number of detectors."""
    for detectors in job.detectors:
        figures = scale_out(detectors, job.slower, job.straggles, job.rounds, job.policy, job.seconds)
        print(json.dumps({detectors: figures}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(ScaleOut))
