"""The engine against the best that can be written by hand without it, and where its time goes.

    SCALENET_RAY_DATA=DATA make bench
    PYTHONPATH=.venv/peers .venv/bin/python -m bench.engine --rounds 5

Two processes written by hand share the images out and run `recursive_detect` on one thread each: nothing waits,
nothing is passed on. The engine has a reader, one actor that looks and one that detects, the driver and Ray's own
processes on the same two cores.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import tyro

from bench.contenders import race
from bench.ratios import ratio, spread
from bench.workloads import Workload, photographs
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.images import cut_tile, decode_image
from scalenet_ray.engine.batch import image_opener
from scalenet_ray.engine.pipeline import ImageStream, Resources
from scalenet_ray.engine.session import join_ray

__all__ = ["cpu_seconds_by_role", "detector_seconds", "engine_race"]

_ROLES = ("ReadTileSource", "LookStage", "DetectStage", "FrontierActor", "raylet", "gcs_server", "dashboard")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class EngineOverLoop:
    """The engine against two processes written by hand.

    Attributes:
        rounds: how often each runs.
        repeats: the photographs so many times over.
        policy: how to zoom.
    """

    rounds: int = 5
    repeats: int = 4
    policy: str = "first-pass"


def engine_race(workload: Workload, policy_name: str, repeats: int) -> tuple[float, dict[int, Detections]]:
    """The engine on all images, so many times over.

    Images a second from the moment when the pipeline is full: what was decoded while the actors still started is no
    part of it.

    Returns:
        (images a second, image id -> detections, each image once).
    """
    join_ray()
    records = workload.repeated(repeats)
    resources = Resources(readers=1, scale_actors=1, detector_actors=1)
    stream = ImageStream(
        records, workload.policy(policy_name), workload.networks(), image_opener(str(workload.folder), 10**8), resources
    )
    ends, found = [], {}
    for result in stream:
        ends.append(time.perf_counter())
        found[result.image_id % 10**9] = result.detections
        stream.commit([result.image_id])
    full = min(resources.open_images, len(ends) // 2)
    return (len(ends) - full) / (ends[-1] - ends[full - 1]), found


def cpu_seconds_by_role() -> Counter[str]:
    """CPU seconds so far of this process and those below it, by what they do."""
    parents, commands, seconds = {}, {}, {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                parents[int(path.name)] = int(fields[1])
                seconds[int(path.name)] = (int(fields[11]) + int(fields[12])) / _TICKS
                commands[int(path.name)] = (path / "cmdline").read_text(errors="replace")
    ours = [os.getpid()]
    for process in ours:
        ours += [child for child, parent in parents.items() if parent == process]
    roles: Counter[str] = Counter()
    for process in ours:
        role = next((role for role in _ROLES if role in commands.get(process, "")), "other")
        roles["driver" if process == os.getpid() else role] += seconds.get(process, 0.0)
    return roles


def detector_seconds(workload: Workload, rounds: int = 30) -> float:
    """Seconds of the detector alone on the tile of a whole image in memory, the median."""
    detector, whole = workload.load_detector(), workload.policy("whole")
    image = decode_image((workload.folder / workload.records[0].file_name).read_bytes())
    tile = cut_tile(image, whole.root(0, (image.shape[0], image.shape[1])))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        detector([tile])
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main(job: EngineOverLoop) -> dict[str, Any]:
    """Print the ratio, and the engine's CPU seconds by role."""
    os.environ["OMP_NUM_THREADS"] = "1"
    workload = photographs()
    engine, loop = [], []
    join_ray()
    before = cpu_seconds_by_role()
    for _ in range(job.rounds):
        rate, _ = engine_race(workload, job.policy, job.repeats)
        engine.append(rate)
        rate, _ = race(job.policy, workload, workload.repeated(job.repeats), 2)
        loop.append(rate)
        print(f"engine {engine[-1]:.2f}, two processes by hand {loop[-1]:.2f} images/s", flush=True)
    spent = cpu_seconds_by_role() - before
    ray.shutdown()
    figures = {
        "engine_over_loop": ratio(engine, loop),
        "engine_images_per_second": spread(engine),
        "cpu_seconds": dict(spent),
        "detector_seconds_a_pass": detector_seconds(workload),
    }
    print(json.dumps(figures, indent=1))
    return figures


if __name__ == "__main__":
    main(tyro.cli(EngineOverLoop))
