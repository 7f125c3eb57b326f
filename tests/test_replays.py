from __future__ import annotations

from random import Random

import numpy as np
import pytest

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.inference import NetworkFactories
from scalenet_ray.data.coco import ImageRecord
from scalenet_ray.engine.frontier import Frontier
from tests.faults import (
    POLICIES,
    Given,
    Scenes,
    WhimsicalScale,
    as_values,
    policy_of,
    random_networks,
    records_of,
    reference,
)
from tests.in_process import InProcessEngine, OwnDecisions, Unjournaled
from tests.oracles import RandomDetector

WHIMSICAL = NetworkFactories(Given(RandomDetector()), Given(WhimsicalScale()))


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handles answer at once, and a reader that would wait is a mistake of the test."""
    monkeypatch.setattr("scalenet_ray.engine.stages.ray.get", lambda answer: answer)
    monkeypatch.setattr("scalenet_ray.engine.stages.time.sleep", lambda seconds: pytest.fail("a reader waits"))


class FlakyScenes(Scenes):
    """Reads an image now and then only."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = Random(seed)

    def __call__(self, record: ImageRecord) -> np.ndarray:
        if self._random.random() < 0.2:
            raise TileError("the store did not answer")
        return super().__call__(record)


@pytest.mark.parametrize("name", POLICIES)
def test_deaths_and_replays_change_nothing_that_is_found(name: str) -> None:
    policy, records, open_image = policy_of(name), records_of(8), Scenes(unreadable={3})
    networks = random_networks(policy, len(records))
    expected = reference(records, policy, networks, open_image)
    deaths = 0
    for seed in range(5):
        engine = InProcessEngine(
            records,
            policy,
            networks,
            open_image,
            seed=seed,
            death_rate=0.06,
            rerun_rate=0.1,
            readers=1 + seed % 3,
            lease_size=2 + seed,
            rows_per_call=1 + seed % 4,
            max_open_images=1 + seed,
        )
        results = engine.run()
        assert len(results) == len(records)
        assert {result.image_id: as_values(result) for result in results} == expected
        deaths += engine.deaths
    assert deaths


@pytest.mark.parametrize("name", ["grid-2", "first-pass", "scalenet"])
def test_every_image_comes_out_once_though_files_and_networks_change_their_mind(name: str) -> None:
    policy, records = policy_of(name), records_of(8)
    networks = WHIMSICAL
    conflicts = 0
    for seed in range(6):
        engine = InProcessEngine(
            records, policy, networks, FlakyScenes(seed), seed=seed, death_rate=0.1, rerun_rate=0.1, lease_size=1 + seed
        )
        assert sorted(result.image_id for result in engine.run()) == list(range(1, 9))
        conflicts += engine.frontier.status().conflicts
    assert conflicts > 0


def lost_images(frontier_class: type[Frontier]) -> tuple[int, int]:
    """Over some runs with deaths: images that never came out or came out wrong, and conflicting decisions."""
    policy, records = policy_of("scalenet"), records_of(6)
    lost = conflicts = 0
    for seed in range(12):
        engine = InProcessEngine(
            records,
            policy,
            WHIMSICAL,
            Scenes(),
            seed=seed,
            death_rate=0.1,
            frontier_class=frontier_class,
            readers=1,
        )
        try:
            lost += len(records) - len(engine.run())
        except (KeyError, RuntimeError):  # Tiles of an image that is written already, or worth more than their image.
            lost += 1
        conflicts += engine.frontier.status().conflicts
    return lost, conflicts


def test_without_the_journal_a_readers_death_loses_tiles() -> None:
    lost, _ = lost_images(Unjournaled)
    assert lost > 0


def test_a_retry_that_trusts_its_own_decision_loses_tiles() -> None:
    lost, conflicts = lost_images(OwnDecisions)
    assert conflicts > 0
    assert lost > 0


def test_with_journal_and_record_the_same_deaths_lose_nothing() -> None:
    lost, conflicts = lost_images(Frontier)
    assert conflicts > 0
    assert lost == 0
