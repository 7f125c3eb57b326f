"""A cluster of a head and two workers, each with its own object store, and a job server; a process to itself.

python -m tests.three_nodes FOLDER    prints the job server's address, and ends the cluster when its input ends
"""

from __future__ import annotations

import socket
import sys

from ray._private.utils import write_ray_address
from ray.cluster_utils import Cluster

_STORE_BYTES = 80 * 2**20


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(folder: str) -> None:
    """Start, say where, wait, end."""
    dashboard = free_port()
    # As on a real cluster: the head gives no CPUs, so that all work is on the two others.
    head = {
        "num_cpus": 0,
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": dashboard,
        "temp_dir": folder,
    }
    head |= {"object_store_memory": _STORE_BYTES, "dashboard_agent_listen_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    # As `ray start` does: without it the job server would hand drivers the address of any Ray on this machine.
    write_ray_address(cluster.address, folder)
    for _ in range(2):
        cluster.add_node(num_cpus=2, object_store_memory=_STORE_BYTES, dashboard_agent_listen_port=free_port())
    sys.stdout.write(f"http://127.0.0.1:{dashboard}\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
