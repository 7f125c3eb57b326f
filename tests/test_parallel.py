"""Parallel pipelines find the same as one, each image once."""

from __future__ import annotations

import pytest
import ray

from scalenet_ray.core.timing import measured
from scalenet_ray.engine.parallel import ParallelStream, image_stream
from scalenet_ray.engine.pipeline import ImageStream
from scalenet_ray.runs.resources import AdvancedResources, Resources, limits
from tests.faults import (
    Scenes,
    SlowImages,
    as_values,
    policy_of,
    random_networks,
    records_of,
    reference,
)

TWO = Resources(
    readers=2,
    scale_actors=None,
    detector_actors=2,
    detector_batch_size=4,
    advanced=AdvancedResources(max_open_images=8, pipelines=2),
)


@pytest.mark.ray
def test_pipelines_side_by_side_equal_recursive_detect(idle_ray: None) -> None:
    records, policy, scenes = records_of(23), policy_of("scalenet"), Scenes(unreadable={2, 23})
    networks = random_networks(policy)
    assert isinstance(image_stream(records, policy, networks, scenes, Resources()), ImageStream)
    stream = image_stream(records, policy, networks, scenes, TWO)
    assert isinstance(stream, ParallelStream)
    results = []
    with measured() as tally:
        for result in stream:
            results.append(result)
            stream.commit([result.image_id])
    assert stream.seconds_at_work() > 0
    assert len(results) == len(records)
    expected = reference(records, policy, networks, scenes)
    assert {result.image_id: as_values(result) for result in results} == expected
    assert min(tally.seconds[stage] for stage in ("decode", "cut", "detect", "merge")) > 0


@pytest.mark.ray
@pytest.mark.slow
def test_fewer_images_than_pipelines(idle_ray: None) -> None:
    policy = policy_of("whole")
    stream = image_stream(records_of(1), policy, random_networks(policy), Scenes(), TWO)
    assert [result.image_id for result in stream] == [1]


@pytest.mark.ray
def test_a_pipeline_that_dies_ends_the_run_with_a_way_on(idle_ray: None) -> None:
    policy = policy_of("scalenet")
    stream = ParallelStream(records_of(200), policy, random_networks(policy), SlowImages(), TWO)
    results = iter(stream)
    next(results)
    ray.kill(stream._pipelines[1])
    with pytest.raises(RuntimeError, match=r"pipeline's process died.*--resume"):
        list(results)


def test_resources_are_dealt_out_whole() -> None:
    all_of = Resources(
        readers=5, scale_actors=(3, 8), detector_actors=20, advanced=AdvancedResources(max_open_images=100)
    )
    parts = all_of.per_pipeline
    assert len(parts) == 3
    assert [part.readers for part in parts] == [2, 2, 1]
    assert [part.scale_actors for part in parts] == [(1, 3), (1, 3), (1, 2)]
    assert [part.detector_actors for part in parts] == [7, 7, 6]
    assert [part.advanced.max_open_images for part in parts] == [34, 33, 33]
    assert sum(part.processes for part in parts) == all_of.processes
    assert all(part.per_pipeline == [part] for part in parts)


@pytest.mark.parametrize(
    ("resources", "pipelines"),
    [
        (Resources(), 1),
        (Resources(readers=4, scale_actors=4, detector_actors=4), 1),
        (Resources(readers=4, scale_actors=4, detector_actors=5), 2),
        (Resources(readers=1, scale_actors=4, detector_actors=64), 1),
        (Resources(readers=80, scale_actors=64, detector_actors=256), 64),
        (Resources(readers=8, scale_actors=8, detector_actors=(1, 64)), 1),
        (Resources(readers=8, scale_actors=8, detector_actors=64, advanced=AdvancedResources(pipelines=2)), 2),
    ],
)
def test_there_is_a_pipeline_for_every_few_detectors(resources: Resources, pipelines: int) -> None:
    assert len(resources.per_pipeline) == pipelines
    assert all(limits(part.detector_actors)[0] >= 1 for part in resources.per_pipeline)


def test_more_pipelines_than_can_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pipelines must be at most 2, so that each has a reader.*got 3"):
        Resources(readers=2, scale_actors=3, detector_actors=3, advanced=AdvancedResources(pipelines=3))
    with pytest.raises(ValueError, match="pipelines must be 1 or more, got 0"):
        Resources(advanced=AdvancedResources(pipelines=0))
