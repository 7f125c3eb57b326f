"""Two parts that everything passes through: merging an image's boxes, and the queue of tiles.

.venv/bin/python -m bench.parts
"""

from __future__ import annotations

import json
import time
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import ray

from bench.ratios import spread
from scalenet_ray.core.geometry import Tile, Window
from scalenet_ray.core.merge import nms
from scalenet_ray.core.recursion import Expansion
from scalenet_ray.data.coco import ImageRecord
from scalenet_ray.engine.frontier import Completion, Decision, FrontierActor, Lease
from scalenet_ray.engine.session import join_ray

__all__ = ["frontier_tasks_per_second", "merge_costs"]

_SIDE = 4000
_CLASSES = 80


def _boxes(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes as a detector leaves them: five near each object, whose sides are 8 to 80 pixels."""
    rng = np.random.default_rng(count)
    objects = rng.uniform(0, _SIDE, (-(-count // 5), 2))
    sides = rng.uniform(8, 80, (len(objects), 2))
    of = np.arange(count) // 5
    centres = objects[of] + rng.normal(0, 0.1, (count, 2)) * sides[of]
    boxes = np.concatenate([centres - sides[of] / 2, centres + sides[of] / 2], axis=1).astype(np.float32)
    return boxes, rng.random(count).astype(np.float32), rng.integers(0, _CLASSES, len(objects))[of]


def merge_costs(counts: tuple[int, ...] = (100, 1000, 10_000, 33_000, 100_000), rounds: int = 5) -> dict[str, Any]:
    """Seconds and megabytes of NMS over so many boxes of an image."""
    costs = {}
    for count in counts:
        boxes, scores, labels = _boxes(count)
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            nms(boxes, scores, labels, 0.5)
            seconds.append(time.perf_counter() - start)
        tracemalloc.start()
        nms(boxes, scores, labels, 0.5)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        costs[str(count)] = {"seconds": spread(seconds), "megabytes": peak / 2**20}
    return costs


def frontier_tasks_per_second(
    images: int = 4000, windows: int = 2, lease_size: int = 8, readers: int = 8, rounds: int = 3
) -> Any:
    """Tiles a second that one queue leases, records and forgets, over Ray, each image with some windows.

    One caller stands for all readers and actors that look: it asks for so many leases at once, as a pipeline has it.
    """
    join_ray()
    records = [ImageRecord(i, f"{i}.jpg", 480, 640) for i in range(images)]
    rates = []
    for _ in range(rounds):
        frontier: Any = FrontierActor.remote(records, 4 * lease_size * readers)
        sequences = dict.fromkeys(range(readers), 0)
        left = Counter({record.image_id: 1 + windows for record in records})
        start = time.perf_counter()
        while sequences:
            asked = [frontier.lease.remote(reader, sequence, lease_size) for reader, sequence in sequences.items()]
            leases: dict[int, Lease | None] = dict(zip(list(sequences), ray.get(asked), strict=True))
            decided = []
            for reader, lease in leases.items():
                if lease is None:
                    del sequences[reader]
                elif lease.work:
                    sequences[reader] += 1
                    decided.append([_decided(work.image.image_id, work.tile, windows) for work in lease.work])
            ray.get([frontier.complete.remote(each) for each in decided])
            done = [completion.image_id for each in decided for completion in each]
            left.subtract(done)
            frontier.commit.remote([image_id for image_id in set(done) if not left[image_id]])
        rates.append((1 + windows) * images / (time.perf_counter() - start))
        ray.kill(frontier)
    return spread(rates)


def _decided(image_id: int, tile: Tile | None, windows: int) -> Completion:
    if tile is not None:
        return Completion(image_id, tile.path, Decision(Expansion(True)))
    window = Window(0, 0, 320, 320)
    children = tuple(Tile(image_id, (i,), (480, 640), window, 416, 416) for i in range(windows))
    return Completion(image_id, (), Decision(Expansion(True, children)))


if __name__ == "__main__":
    print(json.dumps({"merge": merge_costs(), "frontier_tasks_per_second": frontier_tasks_per_second()}, indent=1))
    ray.shutdown()
