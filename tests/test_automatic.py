"""Resources chosen from the cluster and a trial of the networks, for many clusters and without Ray."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalenet_ray.core.errors import UserError
from scalenet_ray.core.networks import NetworkTrial, TrialCall
from scalenet_ray.runs.automatic import Cluster, choose_resources, in_words
from scalenet_ray.runs.resources import AdvancedResources, ResourceChoice, limits

GIB = 2**30
# A small detector, and one of two seconds a tile, on a core; a fast and a slow one on a GPU of 80 GiB.
CPU = NetworkTrial("cpu", (TrialCall(4, 0.1), TrialCall(16, 0.4)), 0.006, GIB // 2)
SLOW_CPU = NetworkTrial("cpu", (TrialCall(1, 2.0),), 0.006, GIB)
GPU = NetworkTrial("cuda", (TrialCall(8, 0.024, 3 * GIB), TrialCall(32, 0.064, 6 * GIB)), 0.006, 3 * GIB, 80 * GIB)
SLOW_GPU = NetworkTrial("cuda", (TrialCall(8, 0.2, 3 * GIB), TrialCall(32, 0.8, 6 * GIB)), 0.006, GIB, 80 * GIB)


def words(cluster: Cluster, trial: NetworkTrial, **chosen: Any) -> str:
    return in_words(choose_resources(ResourceChoice(**chosen), cluster, trial), cluster, trial.device)


@pytest.mark.parametrize(
    ("cluster", "trial", "expected"),
    [
        (Cluster(1), CPU, "1 CPU: 1 detector, batch 4, 1 reader, 1 pipeline"),
        (Cluster(2), CPU, "2 CPUs: 2 detectors, batch 4, 1 reader, 1 pipeline"),
        (Cluster(64), CPU, "64 CPUs: 57 detectors, batch 4, 7 readers, 2 pipelines"),
        (Cluster(64), SLOW_CPU, "64 CPUs: 64 detectors, batch 1, 1 reader, 1 pipeline"),
        (Cluster(16, 1), GPU, "1 GPU: 1 detector of 1 GPU, batch 32, 2 readers, 1 pipeline"),
        (Cluster(128, 8), GPU, "8 GPUs: 8 detectors of 1 GPU, batch 32, 12 readers, 2 pipelines"),
        (Cluster(1024, 64), GPU, "64 GPUs: 64 detectors of 1 GPU, batch 32, 96 readers, 16 pipelines"),
        (Cluster(128, 8), SLOW_GPU, "8 GPUs: 8 detectors of 1 GPU, batch 8, 1 reader, 1 pipeline"),
        # No more readers than CPUs.
        (Cluster(8, 8), GPU, "8 GPUs: 8 detectors of 1 GPU, batch 32, 8 readers, 2 pipelines"),
        # The head has no GPU, and the workers come with the work.
        (
            Cluster(8, 0, most_cpus=40, most_gpus=8),
            GPU,
            "8 GPUs: 2 to 8 detectors of 1 GPU, batch 32, 12 readers, 2 pipelines",
        ),
        (
            Cluster(24, 1, most_cpus=1088, most_gpus=64),
            SLOW_GPU,
            "64 GPUs: 2 to 64 detectors of 1 GPU, batch 8, 8 readers, 2 pipelines",
        ),
        (Cluster(4, most_cpus=64), CPU, "64 CPUs: 4 to 57 detectors, batch 4, 7 readers, 2 pipelines"),
    ],
)
def test_resources_follow_from_the_cluster_and_the_trial(cluster: Cluster, trial: NetworkTrial, expected: str) -> None:
    assert words(cluster, trial) == expected


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"readers": 3}, "8 detectors of 1 GPU, batch 32, 3 readers, 1 pipeline"),
        ({"detector_actors": 2}, "2 detectors of 1 GPU, batch 32, 3 readers, 1 pipeline"),
        ({"detector_actors": (1, 8)}, "1 to 8 detectors of 1 GPU, batch 32, 12 readers, 1 pipeline"),
        ({"gpus_per_detector_actor": 0.5}, "16 detectors of 0.5 GPU, batch 32, 24 readers, 4 pipelines"),
        ({"gpus_per_detector_actor": 0.0}, "1 detector, batch 32, 2 readers, 1 pipeline"),
        ({"scale_actors": 2}, "6 detectors of 1 GPU, 2 Scale Net actors of 1 GPU, batch 32, 9 readers, 2 pipelines"),
        ({"detector_batch_size": 5}, "8 detectors of 1 GPU, batch 5, 12 readers, 2 pipelines"),
        (
            {"scale_actors": 4, "gpus_per_scale_actor": 0.5},
            "6 detectors of 1 GPU, 4 Scale Net actors of 0.5 GPU, batch 32, 9 readers, 2 pipelines",
        ),
        (
            {"advanced": AdvancedResources(pipelines=4)},
            "8 detectors of 1 GPU, batch 32, 12 readers, 4 pipelines",
        ),
    ],
)
def test_what_the_user_sets_stays_and_the_rest_follows_from_it(chosen: dict, expected: str) -> None:
    assert words(Cluster(128, 8), GPU, **chosen) == f"8 GPUs: {expected}"


def test_a_batch_that_does_not_fit_the_share_of_the_gpu_is_not_chosen() -> None:
    small = NetworkTrial("cuda", GPU.calls, 0.006, GIB, 7 * GIB)
    assert choose_resources(ResourceChoice(), Cluster(16, 1), small).detector_batch_size == 8
    halves = ResourceChoice(gpus_per_detector_actor=0.1)
    assert choose_resources(halves, Cluster(16, 1), GPU).detector_batch_size == 32
    tenths = ResourceChoice(gpus_per_detector_actor=0.05)
    assert choose_resources(tenths, Cluster(16, 1), GPU).detector_batch_size == 8


def test_detectors_that_do_not_fit_the_memory_are_not_started() -> None:
    assert limits(choose_resources(ResourceChoice(), Cluster(64, memory=20 * GIB), SLOW_CPU).detector_actors) == (
        16,
        16,
    )


def test_pipelines_that_the_user_wants_have_a_reader_and_a_detector_each() -> None:
    three = ResourceChoice(advanced=AdvancedResources(pipelines=3))
    resources = choose_resources(three, Cluster(2), CPU)
    assert [(part.readers, part.detector_actors) for part in resources.per_pipeline] == [(1, 1)] * 3
    with pytest.raises(UserError, match="pipelines must be at most 1"):
        ResourceChoice(readers=1, advanced=AdvancedResources(pipelines=3))


@given(
    cpus=st.integers(1, 512),
    gpus=st.integers(0, 64),
    more=st.integers(0, 64),
    seconds=st.floats(1e-6, 20.0),
    read_seconds=st.floats(0.0, 5.0),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_any_cluster_and_trial_give_resources_that_are_valid(
    cpus: int, gpus: int, more: int, seconds: float, read_seconds: float, device: str
) -> None:
    cluster = Cluster(cpus, gpus, most_cpus=cpus + 4 * more, most_gpus=gpus + more)
    trial = NetworkTrial(device, (TrialCall(4, 4 * seconds), TrialCall(16, 15 * seconds)), read_seconds, GIB)
    resources = choose_resources(ResourceChoice(), cluster, trial)
    parts = resources.per_pipeline
    assert sum(part.readers for part in parts) == resources.readers <= max(cpus + 4 * more, 1)
    assert all(part.readers >= 1 and limits(part.detector_actors)[0] >= 1 for part in parts)
    if device == "cuda":
        assert limits(resources.detector_actors)[1] == max(1, gpus + more)


def test_a_choice_of_everything_needs_no_trial() -> None:
    numbers = {"readers": 1, "detector_actors": 1, "scale_batch_size": 8, "detector_batch_size": 16}
    assert ResourceChoice(**numbers).is_complete
    assert not any(ResourceChoice(**{**numbers, name: None}).is_complete for name in numbers)
