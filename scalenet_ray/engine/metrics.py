"""Prometheus metrics of a run, exported by Ray.

Ray adds the prefix `ray_` to each name. See docs/operations.md, and ops/grafana.json for a dashboard.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import ray
from ray.util.metrics import Counter, Gauge

from scalenet_ray.core.detections import ImageResult
from scalenet_ray.engine.frontier import FrontierStatus


class Metric(NamedTuple):
    """Definition of a metric: kind, description and tags."""

    kind: Literal["counter", "gauge"]
    description: str
    tags: tuple[str, ...]


METRICS: dict[str, Metric] = {
    "scalenet_images": Metric("counter", "Finished images; outcome is done or failed.", ("policy", "outcome")),
    "scalenet_tiles": Metric("counter", "Processed tiles, by recursion depth.", ("policy", "depth")),
    "scalenet_failures": Metric("counter", "Failed images, by the stage that failed.", ("policy", "stage")),
    "scalenet_guards": Metric("counter", "Number of times that each limit was hit.", ("policy", "guard")),
    "scalenet_stage_seconds": Metric("counter", "Busy seconds of each stage, over all processes.", ("policy", "stage")),
    "scalenet_batch_tiles": Metric("counter", "Tiles in network calls.", ("policy", "stage")),
    "scalenet_batch_room": Metric("counter", "Capacity of those calls, in tiles.", ("policy", "stage")),
    "scalenet_queue_tiles": Metric("gauge", "Tiles in the queue: ready, or leased to a reader.", ("policy", "state")),
    "scalenet_open_images": Metric("gauge", "Images in progress.", ("policy",)),
}
"""All metrics by name."""


@cache
def _metric(name: str) -> Any:
    kind, description, tags = METRICS[name]
    return (Counter if kind == "counter" else Gauge)(name, description, tag_keys=tags)


def _add(name: str, value: float, **tags: str) -> None:
    # Ray counters raise for an increment of 0.
    if value > 0 and ray.is_initialized():
        _metric(name).inc(value, tags)


class RunMetrics:
    """Metrics that the driver records for one policy.

    Args:
        policy: the policy's name.
    """

    def __init__(self, policy: str) -> None:
        self._policy = policy

    def finished(self, result: ImageResult) -> None:
        """Record a finished or failed image."""
        failure = result.failure
        _add("scalenet_images", 1, policy=self._policy, outcome="done" if failure is None else "failed")
        if failure is not None:
            _add("scalenet_failures", 1, policy=self._policy, stage=failure.stage)
        for depth, tiles in result.tiles_by_depth.items():
            _add("scalenet_tiles", tiles, policy=self._policy, depth=str(depth))
        for guard, times in result.guards.items():
            _add("scalenet_guards", times, policy=self._policy, guard=guard)

    def took(self, seconds: Mapping[str, float]) -> None:
        """Record the busy seconds by stage since the last call."""
        for stage, value in seconds.items():
            _add("scalenet_stage_seconds", value, policy=self._policy, stage=stage)

    def queue(self, status: FrontierStatus) -> None:
        """Record the state of the queue."""
        for state, tiles in (("ready", status.ready), ("out", status.outstanding - status.ready)):
            _metric("scalenet_queue_tiles").set(tiles, {"policy": self._policy, "state": state})
        _metric("scalenet_open_images").set(status.open_images, {"policy": self._policy})


class BatchMetrics:
    """Metrics that an actor records for its network calls.

    Args:
        policy: the policy's name.
        stage: look or detect.
        batch_size: maximum number of tiles of a call.
    """

    def __init__(self, policy: str, stage: str, batch_size: int) -> None:
        self._tags = {"policy": policy, "stage": stage}
        self._batch_size = batch_size

    def called(self, tiles: int) -> None:
        """Record a call with this number of tiles."""
        if tiles:
            _add("scalenet_batch_tiles", tiles, **self._tags)
            _add("scalenet_batch_room", max(tiles, self._batch_size), **self._tags)
