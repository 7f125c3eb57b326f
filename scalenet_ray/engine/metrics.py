"""Metrics of a run for Prometheus, by Ray's own exporter: what is done, what waits, what takes the time, what fails.

Ray puts `ray_` before each name. docs/operations.md says what to look at, and ops/grafana.json shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import ray
from ray.util.metrics import Counter, Gauge

from scalenet_ray.core.detections import ImageResult
from scalenet_ray.engine.frontier import FrontierStatus

__all__ = ["METRICS", "BatchMetrics", "Metric", "RunMetrics", "exported_name"]


class Metric(NamedTuple):
    """A metric: what kind it is, what it says, and by what it is told apart."""

    kind: Literal["counter", "gauge"]
    description: str
    tags: tuple[str, ...]


METRICS: dict[str, Metric] = {
    "scalenet_images": Metric("counter", "Images finished; outcome is done or failed.", ("policy", "outcome")),
    "scalenet_tiles": Metric("counter", "Tiles worked on, by how often was zoomed to them.", ("policy", "depth")),
    "scalenet_failures": Metric("counter", "Images given up, by the stage that gave up.", ("policy", "stage")),
    "scalenet_guards": Metric("counter", "How often each limit acted.", ("policy", "guard")),
    "scalenet_stage_seconds": Metric("counter", "Busy seconds of each stage, over all processes.", ("policy", "stage")),
    "scalenet_batch_tiles": Metric("counter", "Tiles in calls of a network.", ("policy", "stage")),
    "scalenet_batch_room": Metric("counter", "Tiles that those calls had room for.", ("policy", "stage")),
    "scalenet_queue_tiles": Metric("gauge", "Tiles in the queue: ready, or out with a reader.", ("policy", "state")),
    "scalenet_open_images": Metric("gauge", "Images begun and not all decided.", ("policy",)),
}
"""All there are, by name."""


def exported_name(name: str) -> str:
    """What Prometheus knows a metric of ours by."""
    return f"ray_{name}_total" if METRICS[name].kind == "counter" else f"ray_{name}"


@cache
def _metric(name: str) -> Any:
    kind, description, tags = METRICS[name]
    return (Counter if kind == "counter" else Gauge)(name, description, tag_keys=tags)


def _add(name: str, value: float, **tags: str) -> None:
    # Ray's counters refuse a step of 0.
    if value > 0 and ray.is_initialized():
        _metric(name).inc(value, tags)


class RunMetrics:
    """What a driver tells of one policy's run.

    Args:
        policy: its name.
    """

    def __init__(self, policy: str) -> None:
        self._policy = policy

    def finished(self, result: ImageResult) -> None:
        """An image is finished, or given up."""
        failure = result.failure
        _add("scalenet_images", 1, policy=self._policy, outcome="done" if failure is None else "failed")
        if failure is not None:
            _add("scalenet_failures", 1, policy=self._policy, stage=failure.stage)
        for depth, tiles in result.tiles_by_depth.items():
            _add("scalenet_tiles", tiles, policy=self._policy, depth=str(depth))
        for guard, times in result.guards.items():
            _add("scalenet_guards", times, policy=self._policy, guard=guard)

    def took(self, seconds: Mapping[str, float]) -> None:
        """Busy seconds by stage, since this was last told."""
        for stage, each in seconds.items():
            _add("scalenet_stage_seconds", each, policy=self._policy, stage=stage)

    def queue(self, status: FrontierStatus) -> None:
        """How the queue stands."""
        for state, tiles in (("ready", status.ready), ("out", status.outstanding - status.ready)):
            _metric("scalenet_queue_tiles").set(tiles, {"policy": self._policy, "state": state})
        _metric("scalenet_open_images").set(status.open_images, {"policy": self._policy})


class BatchMetrics:
    """What an actor tells of its calls of a network.

    Args:
        policy: its name.
        stage: look or detect.
        room: tiles that a call could have.
    """

    def __init__(self, policy: str, stage: str, room: int) -> None:
        self._tags = {"policy": policy, "stage": stage}
        self._room = room

    def called(self, tiles: int) -> None:
        """A call with so many tiles."""
        if tiles:
            _add("scalenet_batch_tiles", tiles, **self._tags)
            _add("scalenet_batch_room", max(tiles, self._room), **self._tags)
