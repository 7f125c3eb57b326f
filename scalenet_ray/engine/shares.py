"""How many CPUs each process asks Ray for, so that all of them find room at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ray

__all__ = ["cpu_share", "node_cpus"]


def node_cpus() -> list[float]:
    """The CPUs of each node of the cluster that is alive."""
    return [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]


def cpu_share(processes: int, cpus: Sequence[float] | None = None) -> float:
    """The CPUs of each process: one, or a fraction small enough that all have room, and one more.

    Args:
        processes: how many.
        cpus: of each node, since a process's share must lie on one of them; those of the cluster by default.
    """
    hundredths = [math.floor(100 * each) for each in (node_cpus() if cpus is None else cpus)]
    shares = (share for share in range(100, 0, -1) if sum(each // share for each in hundredths) > processes)
    return next(shares, 1) / 100
