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
    """The number of CPUs of each living node of the cluster."""
    return [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]


def cpu_share(processes: int, cpus: Sequence[float] | None = None) -> float:
    """CPUs per process: 1, or a fraction small enough that all processes and one more fit.

    Args:
        processes: number of processes.
        cpus: CPUs of each node, since a process runs on one node; by default those of the cluster.
    """
    hundredths = [math.floor(100 * count) for count in (node_cpus() if cpus is None else cpus)]
    shares = (share for share in range(100, 0, -1) if sum(node // share for node in hundredths) > processes)
    return next(shares, 1) / 100


def gpu_share(device: str, processes: int, gpus: Sequence[float] | None = None) -> float:
    """GPUs per process: 0 unless the device is cuda; else 1, or a fraction if there are fewer GPUs than processes.

    Args:
        device: the torch device of the networks.
        processes: number of processes.
        gpus: GPUs of each node, since a process runs on one node; by default those of the cluster.

    Raises:
        UserError: if Ray runs on this machine alone and it has no GPU.
    """
    if not device.startswith("cuda"):
        return 0.0
    found = [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]] if gpus is None else gpus
    if not sum(found):
        if "RAY_ADDRESS" in os.environ:
            # An autoscaling cluster may add nodes with GPUs on request.
            return 1.0
        msg = f"device {device} wants a GPU, which this machine lacks: use cpu, or join a cluster that has GPUs"
        raise UserError(msg)
    # Shares are multiples of 0.01, so that they add up to whole GPUs.
    shares = (share for share in range(100, 0, -1) if sum(int(100 * count) // share for count in found) >= processes)
    return next(shares, 1) / 100
