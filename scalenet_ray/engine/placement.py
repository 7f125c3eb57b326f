"""CPUs and GPUs of the cluster, and the CPU and GPU shares of the processes of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private.state import state

from scalenet_ray.core.errors import UserError
from scalenet_ray.models.devices import is_gpu
from scalenet_ray.runs.automatic import Cluster

_MOST_PROCESSES = 10_000
"""Stands for an autoscaler without a limit."""

_LAUNCHED_WITH = Path("~/ray_bootstrap_config.yaml")
"""File in which `ray up` leaves the cluster's configuration on its head."""


def cluster_now() -> Cluster:
    """The cluster that this process has joined, with the nodes that its autoscaler may add, as far as it says so."""
    has = ray.cluster_resources()
    cpus, gpus = has.get("CPU", 0.0), has.get("GPU", 0.0)
    # Reported by some autoscalers; that of `ray up` has a file.
    most: dict[str, Any] | None = state.get_max_resources_from_cluster_config()
    path = _LAUNCHED_WITH.expanduser()
    if most is None and "RAY_ADDRESS" in os.environ and path.exists():
        most = most_of_launcher(yaml.safe_load(path.read_text()))
    most = most or {}
    return Cluster(
        cpus,
        gpus,
        memory=int(has.get("memory", 0)),
        most_cpus=max(cpus, min(most.get("CPU", 0), _MOST_PROCESSES)),
        most_gpus=max(gpus, min(most.get("GPU", 0), _MOST_PROCESSES)),
    )


def most_of_launcher(config: dict[str, Any]) -> dict[str, float]:
    """CPUs and GPUs of a cluster of `ray up` with all of its nodes.

    Args:
        config: the cluster's configuration, `available_node_types` with `resources` and `max_workers`.
    """
    most = {"CPU": 0.0, "GPU": 0.0}
    room = config.get("max_workers", 0)
    for name, node in config.get("available_node_types", {}).items():
        is_head = name == config.get("head_node_type")
        count = min(room, node.get("max_workers", room)) + is_head
        for kind in most:
            most[kind] += count * node.get("resources", {}).get(kind, 0)
    return most


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


def store_share(parts: int, nodes: Sequence[tuple[float, float]] | None = None) -> int:
    """Bytes of a node's object store for each of `parts`, spread over the nodes by their CPUs; the smallest share.

    Args:
        parts: number of parts.
        nodes: (CPUs, bytes of the object store) of each node; by default those of the cluster.
    """
    if nodes is None:
        living = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [(each.get("CPU", 0.0), each.get("object_store_memory", 0.0)) for each in living]
    workers = [(cpus, store) for cpus, store in nodes if cpus] or [(1.0, store) for _, store in nodes]
    total = sum(cpus for cpus, _ in workers)
    return int(min(store / math.ceil(parts * cpus / total) for cpus, store in workers))


def gpu_share(device: str, processes: int, gpus: Sequence[float] | None = None) -> float:
    """GPUs per process: 0 unless the device is a GPU; else 1, or a fraction if there are fewer GPUs than processes.

    Args:
        device: the torch device of the networks.
        processes: number of processes.
        gpus: GPUs of each node, since a process runs on one node; by default those of the cluster.

    Raises:
        UserError: if Ray runs on this machine alone and it has no GPU.
    """
    if not is_gpu(device):
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
