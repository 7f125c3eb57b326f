"""Images that kill or hang their process are put aside."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scalenet_ray.core.detections import ImageResult
from scalenet_ray.core.expansion import Expansion
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.policy import Policy
from scalenet_ray.data.image_records import OpenImage
from scalenet_ray.engine.frontier import Completion, Decision, Frontier
from scalenet_ray.engine.pipeline import ImageStream
from scalenet_ray.runs.resources import AdvancedResources, Resources
from tests.faults import Given, WorkLog, as_values, policy_of, random_networks, records_of, reference
from tests.in_process import Died, InProcessEngine
from tests.oracles import RandomDetector, RandomScale
from tests.poison import Exit, Hang, HangOnce, PoisonDetector, PoisonOpen, PoisonScale, PoisonScenes

RECORDS = records_of(12)
POISON = 5
TRIES = 2


def poisoned(stage: str, strike: Callable[[], None]) -> tuple[NetworkFactories, OpenImage]:
    """What works on the images, one of which is poison to one stage."""
    detector, scale_net = RandomDetector(), RandomScale()
    open_image: OpenImage = PoisonScenes(POISON)
    if stage == "detect":
        detector = PoisonDetector(strike)
    elif stage == "look":
        scale_net = PoisonScale(strike, POISON)
    else:
        open_image = PoisonOpen(strike, POISON)
    return NetworkFactories(Given(detector), Given(scale_net)), open_image


def assert_it_failed_alone(results: list[ImageResult], policy: Policy, stage: str, tries: int) -> None:
    assert sorted(result.image_id for result in results) == [record.image_id for record in RECORDS]
    ((image_id, failure),) = [(one.image_id, one.failure) for one in results if one.failure is not None]
    assert (image_id, failure.stage) == (POISON, stage)
    assert f"killed its process {tries} times" in failure.reason
    expected = reference(RECORDS, policy, random_networks(policy), PoisonScenes(POISON))
    for result in results:
        if result.image_id != POISON:
            assert as_values(result) == expected[result.image_id]


# --- without Ray --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "name"),
    [("read", "grid-2"), ("read", "scalenet"), ("look", "scalenet"), ("detect", "whole")],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_poison_image_is_put_aside_and_no_other(without_ray: None, stage: str, name: str, seed: int) -> None:
    deaths = 0

    def strike() -> None:
        nonlocal deaths
        deaths += 1
        raise Died

    policy = policy_of(name)
    networks, open_image = poisoned(stage, strike)
    engine = InProcessEngine(RECORDS, policy, networks, open_image, seed=seed, rerun_rate=0.1, max_tries=TRIES)
    assert_it_failed_alone(engine.run(), policy, stage, TRIES)
    # Once in company, then alone; what is made again after a loss finds it put aside.
    assert 1 + TRIES <= deaths <= 2 + TRIES


def test_what_was_begun_and_never_ended_is_suspect_until_its_image_is_written() -> None:
    frontier = Frontier(records_of(3), 3)
    assert frontier.lease(0, 0, 3) is not None
    one, two, three = ((i, ()) for i in (1, 2, 3))
    assert frontier.begin("detect", [one, two])
    assert frontier.begin("look", [one, two])
    frontier.end("detect", [one])
    assert frontier.begin("detect", [one, three])
    assert not frontier.begin("detect", [two])
    assert [frontier.begin_alone("detect", two, 2) for _ in range(4)] == [0, 1, 2, 2]
    assert frontier.begin_alone("look", two, 2) == 0
    frontier.end("detect", [two])
    assert frontier.begin_alone("detect", two, 2) == 0
    frontier.commit([2])
    assert not frontier.begin("detect", [two])
    assert frontier.begin_alone("detect", two, 2) is None


def test_what_was_looked_at_has_ended_with_its_completion_and_the_rest_with_the_next_beginning() -> None:
    frontier = Frontier(records_of(2), 2)
    lease = frontier.lease(0, 0, 2)
    assert lease is not None
    ids = [work.id for work in lease.work]
    assert frontier.begin("look", ids)
    frontier.complete([Completion(*each, Decision(Expansion(detect=True))) for each in ids])
    assert frontier.begin("look", ids)
    assert frontier.begin("detect", ids[:1])
    assert frontier.begin("detect", ids[1:], ids[:1])
    assert frontier.begin("detect", ids[:1])


def test_a_lease_is_suspect_if_its_reader_died_over_it_and_not_if_it_went_on() -> None:
    frontier = Frontier(records_of(4), 4)

    def suspect(sequence: int) -> bool:
        lease = frontier.lease(0, sequence, 2)
        assert lease is not None
        return lease.suspect

    assert [suspect(0), suspect(1)] == [False, False]
    # It died over the second, begins again, and dies over it once more.
    assert [suspect(0), suspect(1)] == [False, True]
    assert [suspect(0), suspect(1)] == [False, True]
    # It ends what it was told to do piece by piece.
    frontier.end("read", [(3, ()), (4, ())])
    assert [suspect(0), suspect(1)] == [False, False]


HANGS = """
import time
from scalenet_ray.engine.quarantine import GuardedCalls
from scalenet_ray.runs.resources import AdvancedResources
calls = GuardedCalls("detect", None, AdvancedResources(call_seconds=0.5))
with calls.watched():
    pass
time.sleep(1.0)
with calls.watched():
    time.sleep(100)
"""


def test_a_call_that_hangs_ends_its_process_with_1_and_shows_where_it_hung() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    # Not in the sleep between the calls, which nobody watches.
    assert 'File "<string>", line 10 in <module>' in done.stderr


# --- with Ray -----------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> WorkLog:
    (tmp_path / "log").mkdir()
    return WorkLog(tmp_path / "log")


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("stage", "strikes"),
    [
        pytest.param("read", Exit, marks=pytest.mark.slow),
        ("look", Exit),
        pytest.param("detect", Exit, marks=pytest.mark.slow),
        pytest.param("detect", Hang, marks=pytest.mark.slow),
    ],
)
def test_an_image_that_kills_or_hangs_its_process_each_time_fails_alone(
    idle_ray: None, log: WorkLog, stage: str, strikes: type[Exit]
) -> None:
    policy = policy_of("whole" if stage == "detect" else "scalenet")
    networks, open_image = poisoned(stage, strikes(log))
    resources = Resources(
        scale_batch_size=3, detector_batch_size=6, advanced=AdvancedResources(max_tries=TRIES, call_seconds=3.0)
    )
    stream = ImageStream(RECORDS, policy, networks, open_image, resources)
    assert_it_failed_alone(list(stream), policy, stage, TRIES)
    assert len(log.lines()) == 1 + TRIES
    assert stream.status().outstanding == 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(120)
def test_an_actor_that_hangs_once_is_replaced_and_nothing_is_lost(idle_ray: None, log: WorkLog, tmp_path: Path) -> None:
    policy = policy_of("whole")
    networks, open_image = poisoned("detect", HangOnce(log, tmp_path / "marker"))
    results = list(
        ImageStream(RECORDS, policy, networks, open_image, Resources(advanced=AdvancedResources(call_seconds=3.0)))
    )
    assert log.lines() == ["hung"]
    expected = reference(RECORDS, policy, random_networks(policy), open_image)
    assert {result.image_id: as_values(result) for result in results} == expected
