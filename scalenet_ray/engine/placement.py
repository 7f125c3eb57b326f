"""CPU and GPU shares of the processes of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import ray

from scalenet_ray.core.errors import UserError

__all__ = [
    "cpu_share",
    "gpu_share",
    "node_cpus",
]


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


def gpu_share(device: str, processes: int, gpus: Sequence[float] | None = None) -> float:
    """The GPUs of each process: 0 for another device than cuda; else one, or a fraction where there are fewer.

    Args:
        device: where the networks compute, as torch names it.
        processes: how many.
        gpus: of each node, since a process's share must lie on one of them; those of the cluster by default.

    Raises:
        UserError: if this machine, which is all there is, has no GPU.
    """
    if not device.startswith("cuda"):
        return 0.0
    found = [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]] if gpus is None else gpus
    if not sum(found):
        if "RAY_ADDRESS" in os.environ:
            # A cluster's nodes may come only once they are asked for.
            return 1.0
        msg = f"device {device} wants a GPU, which this machine lacks: use cpu, or join a cluster that has GPUs"
        raise UserError(msg)
    # Hundredths, so that shares add up to a whole GPU.
    shares = (share for share in range(100, 0, -1) if sum(int(100 * each) // share for each in found) >= processes)
    return next(shares, 1) / 100
