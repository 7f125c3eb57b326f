"""Shares of CPUs and GPUs of a run's processes."""

from __future__ import annotations

import pytest
import ray

from scalenet_ray.core.errors import UserError
from scalenet_ray.engine.placement import cluster_now, cpu_share, gpu_share, most_of_launcher, node_cpus, store_share


def test_processes_share_what_cpus_there_are_and_leave_some() -> None:
    assert cpu_share(6, [64.0]) == 1
    assert cpu_share(6, [7.0]) == 1
    assert cpu_share(6, [6.0]) == 0.85
    assert cpu_share(6, [2.0]) == 0.28
    assert cpu_share(6, [0.0, 4.0, 3.0]) == 1
    assert cpu_share(6, [0.0]) > 0


def test_a_processs_cpus_lie_on_one_node() -> None:
    # Four processes have no room on three nodes of one CPU if each asks for more than half of one.
    assert cpu_share(4, [1.0, 1.0, 1.0]) == 0.5
    assert cpu_share(4, [1.5, 1.5, 1.5]) == 0.75


def test_processes_on_a_gpu_share_what_gpus_there_are() -> None:
    assert gpu_share("cpu", 4, [8.0]) == 0
    assert gpu_share("cuda", 4, [4.0]) == 1
    assert gpu_share("cuda:0", 2, [1.0]) == 0.5
    assert gpu_share("cuda", 3, [1.0]) == 0.33
    assert gpu_share("cuda", 3, [0.0, 1.0, 1.0]) == 0.5


def test_without_any_gpu_a_machine_is_refused_and_a_cluster_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert gpu_share("cuda", 4, [0.0]) == 1
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(UserError, match="device cuda wants a GPU, which this machine lacks: use cpu"):
        gpu_share("cuda", 4, [0.0])


@pytest.mark.ray
def test_the_clusters_cpus_are_shared_by_default(ray_session: None) -> None:
    assert sum(node_cpus()) == ray.cluster_resources()["CPU"]
    assert cpu_share(6) == cpu_share(6, node_cpus())
    assert store_share(1) <= ray.cluster_resources()["object_store_memory"]


def test_a_node_whose_store_is_small_for_its_cpus_limits_all() -> None:
    assert store_share(4, [(2.0, 100.0)]) == 25
    assert store_share(6, [(4.0, 800.0), (2.0, 100.0)]) == 50
    # A head without CPUs has no rows, unless it is the only node so far.
    assert store_share(4, [(0.0, 8.0), (2.0, 100.0)]) == 25
    assert store_share(4, [(0.0, 8.0)]) == 2


def test_a_cluster_of_ray_up_may_grow_to_all_of_its_nodes() -> None:
    config = {
        "max_workers": 8,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 8, "GPU": 0}, "max_workers": 0},
            "worker": {"resources": {"CPU": 4, "GPU": 1}, "min_workers": 0, "max_workers": 20},
        },
    }
    assert most_of_launcher(config) == {"CPU": 8 + 8 * 4, "GPU": 8}
    assert most_of_launcher({}) == {"CPU": 0, "GPU": 0}


@pytest.mark.ray
def test_a_cluster_of_this_machine_has_what_ray_counts_and_grows_no_further(idle_ray: None) -> None:
    cluster = cluster_now()
    assert cluster.cpus == cluster.most_cpus == ray.cluster_resources()["CPU"]
    assert not cluster.may_have_gpus
