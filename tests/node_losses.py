"""A run on a cluster of its own that loses every worker node it began with, one after the other; a process to itself.

python -m tests.node_losses OUTCOME.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from scalenet_ray.core.inference import NetworkFactories
from scalenet_ray.engine.pipeline import ImageStream
from scalenet_ray.runs.resources import AdvancedResources, Resources
from tests.faults import Given, Scenes, SlowDetector, as_values, policy_of, random_networks, records_of, reference
from tests.oracles import RandomScale

_STORE_BYTES = 80 * 2**20
_NOTICE_LOSSES_SOON = {"health_check_period_ms": 1000, "health_check_failure_threshold": 4}
_LOSSES_AFTER = (4, 14)
_RESOURCES = Resources(
    scale_actors=2,
    detector_actors=2,
    scale_batch_size=2,
    detector_batch_size=4,
    advanced=AdvancedResources(max_open_images=8),
)


def main() -> None:
    """Run, lose nodes, compare."""
    # The head has no CPUs: whatever reads, looks or detects is on a node that will be lost.
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": _STORE_BYTES,
            "include_dashboard": False,
            "_system_config": _NOTICE_LOSSES_SOON,
        },
    )
    nodes = [cluster.add_node(num_cpus=3, object_store_memory=_STORE_BYTES) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)

    records, policy, scenes = records_of(30), policy_of("scalenet"), Scenes(unreadable={7})
    networks = NetworkFactories(Given(SlowDetector(0.02)), Given(RandomScale()))
    stream = ImageStream(records, policy, networks, scenes, _RESOURCES)
    results = []
    losses = 0
    for result in stream:
        results.append(result)
        # Written: what is made again after a loss may find the queue without these images.
        stream.commit([result.image_id])
        if losses < len(_LOSSES_AFTER) and len(results) >= _LOSSES_AFTER[losses]:
            cluster.remove_node(nodes[losses], allow_graceful=False)
            cluster.add_node(num_cpus=3, object_store_memory=_STORE_BYTES)
            losses += 1
    expected = reference(records, policy, random_networks(policy), scenes)
    status = stream.status()
    outcome = {
        "losses": losses,
        "image_ids": sorted(result.image_id for result in results),
        "equal": {result.image_id: as_values(result) for result in results} == expected,
        "redelivered": status.redelivered,
        "outstanding": status.outstanding,
    }
    # Ray says on the standard output what it lost.
    Path(sys.argv[1]).write_text(json.dumps(outcome))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
