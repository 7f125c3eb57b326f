"""Shares of CPUs and GPUs of a run's processes."""

from __future__ import annotations

import pytest
import ray

from scalenet_ray.core.errors import UserError
from scalenet_ray.engine.placement import cpu_share, gpu_share, node_cpus


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
