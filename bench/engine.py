"""The engine against the best that can be written by hand without it, and where its time goes.

    SCALENET_RAY_DATA=DATA make bench
    PYTHONPATH=.venv/peers .venv/bin/python -m bench.engine --rounds 5

Two processes written by hand share the images out and run `recursive_detect` on one thread each: nothing waits,
nothing is passed on. The engine has a reader, two actors that look and detect, the driver and Ray's own processes on
the same two cores.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ray
import tyro

from bench.contenders import DETECTOR_ALONE, race
from bench.growth import cpu_clocks, spent_by_role
from bench.workloads import Workload, photographs, ratio, spread
from scalenet_ray.core.detections import Detections
from scalenet_ray.engine.pipeline import ImageStream
from scalenet_ray.engine.session import join_ray
from scalenet_ray.runs.batch import image_opener

_IMAGES_PER_SHARD = 64


@dataclass(frozen=True)
class EngineOverLoop:
    """The engine against two processes written by hand.

    Attributes:
        rounds: how often each runs.
        repeats: the images so many times over; more than twice as many as are open.
        policy: how to zoom.
        detector: kind:what; None for YOLOX-nano of SCALENET_RAY_DATA.
        open_images: images in flight.
    """

    rounds: int = 5
    repeats: int = 15
    policy: str = "first-pass"
    detector: str | None = None
    open_images: int = 384


class EngineRace(NamedTuple):
    """Result of one run of the engine.

    Attributes:
        images_per_second: while the pipeline is full.
        found: image id -> detections, each image once.
        passes_per_image: of the detector.
        cpu_ms_per_image: of its processes in that time, by what they do.
    """

    images_per_second: float
    found: dict[int, Detections]
    passes_per_image: float
    cpu_ms_per_image: dict[str, float]


def engine_race(workload: Workload, policy_name: str, repeats: int) -> EngineRace:
    """The engine on all images, so many times over."""
    join_ray()
    records = workload.repeated(repeats)
    open_image = image_opener(str(workload.folder), 10**8)
    stream = ImageStream(records, workload.policy(policy_name), workload.networks(), open_image, workload.resources)
    ends, found, passes = [], {}, 0.0
    # Before it is full, actors start; when nothing is left to admit, it begins to run dry.
    full, dry = workload.resources.open_images, len(records) - workload.resources.open_images
    clocks, written = [], []
    for result in stream:
        ends.append(time.perf_counter())
        found[result.image_id % 10**9] = result.detections
        passes += result.detector_passes
        written.append(result.image_id)
        if len(written) == _IMAGES_PER_SHARD:
            stream.commit(written)
            written = []
        if len(ends) in (full, dry):
            clocks.append(cpu_clocks())
    at_full, at_dry = clocks
    return EngineRace(
        (dry - full) / (ends[dry - 1] - ends[full - 1]),
        found,
        passes / len(ends),
        {role: 1000 * seconds / (dry - full) for role, seconds in spent_by_role(at_full, at_dry).items()},
    )


def compare_engine(workload: Workload, policy_name: str, rounds: int, repeats: int) -> dict[str, Any]:
    """The engine, two processes written by hand, and the detector alone in two processes, one after the other.

    Returns:
        `engine_over_loop`; `detector_share`, the time that the detector alone would take for the engine's passes over
        the engine's; `cpu_ms_per_image` of the engine's processes, by what they do.
    """
    join_ray()
    engine, loop, share = [], [], []
    costs: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        ours = engine_race(workload, policy_name, repeats)
        for role, cost in ours.cpu_ms_per_image.items():
            costs[role].append(cost)
        engine.append(ours.images_per_second)
        rate, *_ = race(policy_name, workload, workload.repeated(repeats), 2)
        loop.append(rate)
        passes, *_ = race(DETECTOR_ALONE, workload, workload.repeated(repeats), 2)
        share.append(engine[-1] * ours.passes_per_image / passes)
        print(
            f"engine {engine[-1]:.2f}, two processes by hand {loop[-1]:.2f} images/s, "
            f"detector alone {passes:.2f} passes/s",
            flush=True,
        )
    ray.shutdown()
    return {
        "engine_over_loop": ratio(engine, loop),
        "detector_share": spread(share),
        "cpu_ms_per_image": {role: spread(each) for role, each in costs.items()},
    }


def main(job: EngineOverLoop) -> None:
    """Print the figures."""
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    workload = photographs()
    advanced = replace(workload.resources.advanced, max_open_images=job.open_images)
    workload = replace(
        workload,
        detector=job.detector or workload.detector,
        resources=replace(workload.resources, advanced=advanced),
    )
    print(json.dumps(compare_engine(workload, job.policy, job.rounds, job.repeats), indent=1))


if __name__ == "__main__":
    main(tyro.cli(EngineOverLoop))
