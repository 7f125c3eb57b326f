"""Throughput of a run that loses one of its two nodes, over that of one that loses none.

    .venv/bin/python -m bench.node_kill --rounds 3

Networks that sleep on nodes that share this machine, as in bench.scale_out. The node is lost in the middle and another
one takes its place at once: what is told is what Ray's notice of the loss, new processes and work done twice cost.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import Any

import ray
import tyro
from ray.cluster_utils import Cluster

from bench.fakes import fake_networks, grey_image, records_of, two_windows
from bench.workloads import ratio
from scalenet_ray.engine.pipeline import ImageStream
from scalenet_ray.runs.resources import Resources

_STORE_BYTES = 80 * 2**20
_DETECTOR_SECONDS, _SCALE_NET_SECONDS = 0.1, 0.03
_CPUS_PER_NODE = 4


@dataclass(frozen=True)
class NodeKill:
    """Pairs of runs, one with the loss and one without.

    Attributes:
        images: of a run.
        rounds: how many pairs.
    """

    images: int = 400
    rounds: int = 3


def node_kill(images: int, rounds: int) -> dict[str, Any]:
    """The ratio of images a second with the loss over without, and the seconds of the runs."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for loses in (False, True):
            seconds[loses].append(_seconds(images, loses=loses))
    # Images a second are the inverse of the seconds.
    return {
        "throughput_with_a_node_lost": ratio(seconds[False], seconds[True]),
        "seconds": {"none lost": seconds[False], "one lost": seconds[True]},
    }


def _seconds(count: int, *, loses: bool) -> float:
    """Seconds from the first finished image to the last."""
    # The head has no CPUs: whatever works is on a node that may be lost.
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": _STORE_BYTES, "include_dashboard": False},
    )
    try:
        nodes = [cluster.add_node(num_cpus=_CPUS_PER_NODE, object_store_memory=_STORE_BYTES) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        resources = Resources(readers=2, scale_actors=2, detector_actors=2, scale_batch_size=4, detector_batch_size=8)
        networks = fake_networks(_DETECTOR_SECONDS, _SCALE_NET_SECONDS)
        stream = ImageStream(records_of(count), two_windows(), networks, grey_image, resources)
        first, done = 0.0, 0
        for done, result in enumerate(stream, start=1):
            first = first or time.perf_counter()
            stream.commit([result.image_id])
            if loses and done == count // 2:
                cluster.remove_node(nodes[0], allow_graceful=False)
                cluster.add_node(num_cpus=_CPUS_PER_NODE, object_store_memory=_STORE_BYTES)
        if done != count:
            msg = f"{done} of {count} images came out"
            raise RuntimeError(msg)
        return time.perf_counter() - first
    finally:
        ray.shutdown()
        cluster.shutdown()


def main(job: NodeKill) -> None:
    """Print the figures."""
    os.environ["OMP_NUM_THREADS"] = "1"
    print(json.dumps(node_kill(job.images, job.rounds), indent=1))


if __name__ == "__main__":
    main(tyro.cli(NodeKill))
