"""The engine's own cost: networks that cost nothing, against the loop without Ray in one process.

    make bench
    .venv/bin/python -m bench.overhead --rounds 5
    .venv/bin/python -m bench.overhead --batch-sizes 32 64

Images of three tiles. The first quarter of the images, in which actors start and work that was read ahead is done, is
left out, the end is not. Rounds are paired: the loop and the engine in turn. The processor's time is told by process.
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

from bench.fakes import TILES_PER_IMAGE, Looks, fake_networks, grey_image, records_of, two_windows
from bench.growth import cpu_clocks, spent_by_role
from bench.workloads import ratio, spread
from scalenet_ray.engine.parallel import image_stream
from scalenet_ray.engine.session import join_ray
from scalenet_ray.runs.batch import Stream
from scalenet_ray.runs.local import LocalStream
from scalenet_ray.runs.resources import Resources

_IMAGES_PER_SHARD = 256


@dataclass(frozen=True)
class Overhead:
    """Settings of the comparison.

    Attributes:
        images: of a run.
        rounds: how often the loop and the engine run.
        policy: who looks: Scale Net, or the detector itself.
        batch_sizes: of Scale Net and the detector; by default the engine's own.
        scale_actors: of Scale Net alone; none: it runs with the detector.
        detector_actors: of the detector; for networks that cost nothing, one on two cores is what a run chooses.
    """

    images: int = 6000
    rounds: int = 3
    policy: Looks = "scalenet"
    batch_sizes: tuple[int, int] | None = None
    scale_actors: int | None = None
    detector_actors: int = 1


def overhead(job: Overhead) -> dict[str, Any]:
    """Rates and CPU times of the loop and the engine in paired rounds, on a Ray of its own.

    Returns:
        `tiles_per_second` of the engine and the loop, `engine_over_loop`, and `cpu_ms_per_tile` of the engine's
        processes, start-up left out, as spreads of rounds.
    """
    resources = Resources(scale_actors=job.scale_actors, detector_actors=job.detector_actors)
    if job.batch_sizes is not None:
        looks, detects = job.batch_sizes
        resources = replace(resources, scale_batch_size=looks, detector_batch_size=detects)
    policy = two_windows(job.policy)
    networks = fake_networks(in_corners=job.policy == "first-pass")
    records = records_of(job.images)
    join_ray()
    rates: defaultdict[str, list[float]] = defaultdict(list)
    costs: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(job.rounds):
        loop = LocalStream(records, policy, networks, grey_image)
        rates["loop"].append(_measured(loop, job.images).tiles_per_second)
        engine = _measured(image_stream(records, policy, networks, grey_image, resources), job.images)
        rates["engine"].append(engine.tiles_per_second)
        for role, milliseconds in engine.cpu_ms_per_tile.items():
            costs[role].append(milliseconds)
        print({name: round(rate[-1]) for name, rate in rates.items()}, flush=True)
    ray.shutdown()
    return {
        "tiles_per_second": {name: spread(values) for name, values in rates.items()},
        "engine_over_loop": ratio(rates["engine"], rates["loop"]),
        "cpu_ms_per_tile": {role: spread(values) for role, values in costs.items()},
    }


class _Run(NamedTuple):
    tiles_per_second: float
    cpu_ms_per_tile: dict[str, float]


def _measured(stream: Stream, images: int) -> _Run:
    """Rate and CPU times of a run, its first quarter left out."""
    at, clocks, written = [], [], []
    for done, result in enumerate(stream, start=1):
        if done in (images // 4, images):
            at.append(time.perf_counter())
            clocks.append(cpu_clocks())
        written.append(result.image_id)
        if len(written) == _IMAGES_PER_SHARD:
            stream.commit(written)
            written = []
    tiles = TILES_PER_IMAGE * (images - images // 4)
    return _Run(
        tiles / (at[1] - at[0]), {role: 1000 * seconds / tiles for role, seconds in spent_by_role(*clocks).items()}
    )


def main(job: Overhead) -> None:
    """Print the figures."""
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    print(json.dumps(overhead(job), indent=1))


if __name__ == "__main__":
    main(tyro.cli(Overhead))
