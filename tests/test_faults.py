"""Deaths of readers, actors and the frontier during a run on Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from scalenet_ray.core.detections import ImageResult
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.policy import Policy
from scalenet_ray.data.image_records import OpenImage
from scalenet_ray.engine.pipeline import ImageStream
from scalenet_ray.runs.resources import AdvancedResources, Resources
from tests.faults import (
    BuggyScale,
    Fault,
    FaultyDetector,
    FaultyOpen,
    FaultyScale,
    Given,
    Scenes,
    WhimsicalScale,
    WorkLog,
    as_values,
    policy_of,
    random_networks,
    records_of,
    reference,
)
from tests.oracles import RandomDetector, RandomScale

# A fault that hangs the run must fail here, long before the engine's own time-out.
pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(120)]

RECORDS = records_of(20)
SCENES = Scenes(unreadable={4})
SCALE_BATCH = 3
DETECTOR_BATCH = 6
TWO_OF_EACH = Resources(
    scale_actors=2, detector_actors=2, scale_batch_size=SCALE_BATCH, detector_batch_size=DETECTOR_BATCH
)


class Watched:
    """A run whose networks and readers log what they were asked, and die where they are told to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.opened, self.looked, self.detected = (self._log(name) for name in ("opened", "looked", "detected"))
        self.faults: list[Fault] = []

    def _log(self, name: str) -> WorkLog:
        (self._folder / name).mkdir()
        return WorkLog(self._folder / name)

    def fault(self, name: str, turn: int = 1) -> Fault:
        self.faults.append(Fault(self._folder / name, turn))
        return self.faults[-1]

    def run(
        self, policy: Policy, open_image: OpenImage, networks: NetworkFactories, resources: Resources
    ) -> list[ImageResult]:
        """All results, each image's once, every fault having happened."""
        stream = ImageStream(RECORDS, policy, networks, open_image, resources)
        results = list(stream)
        assert [fault.fired for fault in self.faults] == [True] * len(self.faults)
        assert sorted(result.image_id for result in results) == [record.image_id for record in RECORDS]
        self.status = stream.status()
        assert (self.status.outstanding, self.status.open_images) == (0, 0)
        return results

    def networks(
        self,
        look_before: Fault | None = None,
        look_after: Fault | None = None,
        detect_start: Fault | None = None,
        detect_end: Fault | None = None,
    ) -> NetworkFactories:
        return NetworkFactories(
            Given(FaultyDetector(RandomDetector(), self.detected, detect_start, detect_end)),
            Given(FaultyScale(RandomScale(), self.looked, look_before, look_after)),
        )


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def assert_equals_reference(results: list[ImageResult], policy: Policy) -> None:
    expected = reference(RECORDS, policy, random_networks(policy), SCENES)
    assert {result.image_id: as_values(result) for result in results} == expected


@pytest.mark.parametrize("name", [pytest.param("grid-2", marks=pytest.mark.slow), "scalenet"])
def test_everything_dies_once_in_one_run(idle_ray: None, watched: Watched, name: str) -> None:
    policy = policy_of(name)
    opened = FaultyOpen(SCENES, watched.fault("reader", turn=7), watched.opened)
    looks = {"look_before": watched.fault("before"), "look_after": watched.fault("after", turn=2)}
    networks = watched.networks(
        detect_start=watched.fault("start", turn=2),
        detect_end=watched.fault("end", turn=3),
        **(looks if policy.needs_network else {}),
    )
    if not policy.needs_network:
        watched.faults = [fault for fault in watched.faults if fault not in looks.values()]
    resources = Resources(scale_batch_size=5, detector_batch_size=4)
    results = watched.run(policy, opened, networks, resources)
    assert_equals_reference(results, policy)


@pytest.mark.slow
def test_a_retry_that_decides_otherwise_loses_and_doubles_nothing(idle_ray: None, watched: Watched) -> None:
    policy = policy_of("scalenet")
    # At the first turn, on whole images: later tiles may be at the full depth, where there is nothing to decide.
    scale_net = FaultyScale(WhimsicalScale(), watched.looked, after=watched.fault("after"))
    networks = NetworkFactories(Given(RandomDetector()), Given(scale_net))
    results = watched.run(policy, SCENES, networks, TWO_OF_EACH)
    assert watched.status.conflicts > 0
    assert [result.image_id for result in results if result.failure] == [4]


def test_a_dead_frontier_ends_the_run_and_says_what_to_do(idle_ray: None) -> None:
    policy = policy_of("scalenet")
    stream = ImageStream(
        RECORDS, policy, random_networks(policy), SCENES, Resources(advanced=AdvancedResources(max_open_images=2))
    )
    results = iter(stream)
    next(results)
    ray.kill(stream._frontier)
    with pytest.raises(RuntimeError, match=r"the frontier, the queue of tiles, died.*--resume"):
        list(results)


def test_a_bug_in_a_network_ends_the_run_with_its_message(idle_ray: None) -> None:
    networks = NetworkFactories(Given(RandomDetector()), Given(BuggyScale(5)))
    stream = ImageStream(RECORDS, policy_of("scalenet"), networks, SCENES, Resources())
    with pytest.raises(Exception, match="a bug: the weights are of another network"):
        list(stream)


def test_a_network_that_cannot_be_made_ends_the_run_with_its_message(idle_ray: None) -> None:
    def missing() -> RandomDetector:
        raise FileNotFoundError("there are no weights at /nowhere")

    stream = ImageStream(RECORDS, policy_of("whole"), NetworkFactories(missing), SCENES, Resources())
    with pytest.raises(Exception, match="there are no weights at /nowhere"):
        list(stream)
