"""The queue of tiles: leases, credits, commits, and replays after deaths."""

from __future__ import annotations

from fractions import Fraction
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scalenet_ray.core.detections import Failure
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.expansion import Expansion
from scalenet_ray.core.geometry import Tile, Window
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.data.image_records import ImageRecord
from scalenet_ray.engine.frontier import Completion, Decision, Frontier, Lease, LeaseLimits, Work, child_credit
from scalenet_ray.engine.quarantine import TileId
from tests.faults import (
    Given,
    Scenes,
    WhimsicalScale,
    as_values,
    policy_of,
    random_networks,
    records_of,
    reference,
)
from tests.in_process import InProcessEngine
from tests.oracles import RandomDetector

pytestmark = pytest.mark.usefixtures("without_ray")


def child_tile(image_id: int, path: tuple[int, ...]) -> Tile:
    return Tile(image_id, path, (64, 64), Window(0, 0, 8, 8), 8, 8)


def decision_of(work_id: tuple[int, tuple[int, ...]], children: int, *, failed: bool = False) -> Decision:
    image_id, path = work_id
    if failed:
        return Decision(Expansion(detect=False), Failure("look", "NaN"))
    tiles = tuple(child_tile(image_id, (*path, i)) for i in range(children))
    return Decision(Expansion(detect=True, children=tiles))


def completion(work: Work, children: int = 0, *, failed: bool = False) -> Completion:
    return Completion(*work.id, decision_of(work.id, children, failed=failed))


class FrontierMachine(RuleBasedStateMachine):
    """Leases, completions, replays, retries and commits in any order, against a model that remembers everything."""

    @initialize(images=st.integers(0, 5), max_open=st.integers(1, 3))
    def begin(self, images: int, max_open: int) -> None:
        self.max_open = max_open
        self.records = records_of(images)
        self.frontier = Frontier(self.records, max_open)
        self.admitted: list[int] = []
        self.opened_by: dict[int, int] = {}
        self.ready: list[tuple[int, tuple[int, ...]]] = []
        self.out: dict[tuple[int, tuple[int, ...]], Work] = {}
        self.leased: dict[tuple[int, int], tuple[Work, ...]] = {}
        self.next: dict[int, int] = {}
        self.decided: dict[tuple[int, tuple[int, ...]], Decision] = {}
        self.credits: dict[int, Fraction] = {}
        self.committed: set[int] = set()
        self.conflicts = 0

    # --- the model ----------------------------------------------------------------------------------------

    def open_images(self) -> set[int]:
        return {image_id for image_id, _ in (*self.ready, *self.out)}

    def over(self) -> bool:
        return len(self.admitted) == len(self.records) and not self.ready and not self.out

    def expect(self, reader: int, count: int) -> list[tuple[int, tuple[int, ...]]]:
        """What a lease must give: a reader's own tiles, or new images, or what is too much for another reader."""
        own = [work for work in self.ready if work[1] and self.opened_by[work[0]] == reader]
        own.sort(key=lambda work: (-len(work[1]), self.admitted.index(work[0]), work[1]))
        fresh = [work for work in self.ready if not work[1]]
        while len(own) < count and len(fresh) < count and len(self.open_images()) < self.max_open:
            if len(self.admitted) == len(self.records):
                break
            self.admitted.append(self.records[len(self.admitted)].image_id)
            fresh.append((self.admitted[-1], ()))
            self.ready.append(fresh[-1])
        if own or fresh:
            return (fresh if len(own) < count <= len(fresh) else own + fresh)[:count]
        others = [work for work in self.ready if len(self.of_reader(work)) > count or not self.out]
        others.sort(key=lambda work: (-len(self.of_reader(work)), -len(work[1]), self.admitted.index(work[0]), work[1]))
        return [work for work in others if self.opened_by[work[0]] == self.opened_by[others[0][0]]][:count]

    def of_reader(self, work: tuple[int, tuple[int, ...]]) -> list[tuple[int, tuple[int, ...]]]:
        return [other for other in self.ready if self.opened_by[other[0]] == self.opened_by[work[0]]]

    def done(self) -> list[int]:
        return [i for i in self.admitted if i not in self.open_images() and i not in self.committed]

    # --- what may happen ----------------------------------------------------------------------------------

    @rule(reader=st.integers(0, 2), count=st.integers(1, 4))
    def lease(self, reader: int, count: int) -> None:
        expected = self.expect(reader, count)
        sequence = self.next.get(reader, 0)
        lease = self.frontier.lease(reader, sequence, count)
        assert (lease is None) == self.over()
        if lease is None:
            return
        assert not lease.forgotten
        leased = [work.id for work in lease.work]
        if expected and self.opened_by.get(expected[0][0], reader) != reader:
            # Of several other readers with as much to do, any.
            assert len(leased) == len(expected)
            assert len(self.of_reader(leased[0])) == len(self.of_reader(expected[0]))
        else:
            assert leased == expected
        if not expected:
            return
        for image_id, _ in leased:
            self.opened_by.setdefault(image_id, reader)
        self.ready = [work for work in self.ready if work not in leased]
        self.out |= {work.id: work for work in lease.work}
        self.leased[reader, sequence] = lease.work
        self.next[reader] = sequence + 1

    @precondition(lambda self: self.leased)
    @rule(data=st.data(), count=st.integers(1, 4))
    def replay(self, data: Any, count: int) -> None:
        """A reader died and begins again: the same work, whatever it asks for by now."""
        reader, sequence = data.draw(st.sampled_from(sorted(self.leased)))
        lease = self.frontier.lease(reader, sequence, count)
        assert lease is not None
        work = self.leased[reader, sequence]
        forgotten = {one.id[0] for one in work} <= self.committed
        assert lease.forgotten == forgotten
        assert lease.work == (() if forgotten else work)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def complete(self, data: Any) -> None:
        some = data.draw(st.lists(st.sampled_from(sorted(self.out)), min_size=1, max_size=3, unique=True))
        offered = []
        for work_id in some:
            children = data.draw(st.integers(0, 3)) if len(work_id[1]) < 3 else 0
            offered.append(decision_of(work_id, children, failed=data.draw(st.integers(0, 5)) == 0))
        batch = [Completion(*work_id, decision=decision) for work_id, decision in zip(some, offered, strict=True)]
        assert self.frontier.complete(batch) == offered
        for work_id, decision in zip(some, offered, strict=True):
            work = self.out.pop(work_id)
            self.decided[work_id] = decision
            credit = child_credit(work.credit, decision.expansion)
            self.credits[work_id[0]] = self.credits.get(work_id[0], Fraction(0)) + credit
            self.ready += [(tile.image_id, tile.path) for tile in decision.expansion.children]

    @precondition(lambda self: self.decided)
    @rule(data=st.data(), children=st.integers(0, 3))
    def complete_again(self, data: Any, children: int) -> None:
        """A look actor died after completing and its retry decides anew: the record stands, nothing moves."""
        work_id = data.draw(st.sampled_from(sorted(self.decided)))
        offered = decision_of(work_id, children)
        (counts,) = self.frontier.complete([Completion(*work_id, decision=offered)])
        if work_id[0] in self.committed:
            assert counts == offered
        else:
            assert counts == self.decided[work_id]
            self.conflicts += offered != counts

    @precondition(lambda self: self.done())
    @rule(data=st.data())
    def commit(self, data: Any) -> None:
        some = data.draw(st.lists(st.sampled_from(self.done()), min_size=1, unique=True))
        self.frontier.commit(some)
        self.frontier.commit(some[:1])
        self.committed |= set(some)

    # --- what always holds ----------------------------------------------------------------------------------

    @invariant()
    def the_counts_are_the_models(self) -> None:
        status = self.frontier.status()
        assert status.outstanding == len(self.ready) + len(self.out)
        assert status.ready == len(self.ready)
        assert status.admitted == len(self.admitted)
        assert status.open_images == len(self.open_images()) <= self.max_open
        assert status.conflicts == self.conflicts

    def teardown(self) -> None:
        """Whatever happened: every image is finished, worth exactly 1, and nothing is remembered once it is written."""
        if not hasattr(self, "frontier"):
            return
        reader = 0
        while True:
            # A single reader that goes on from wherever it was.
            lease = self.frontier.lease(reader, self.next.get(reader, 0), 2)
            if lease is None:
                break
            if lease.work:
                self.next[reader] = self.next.get(reader, 0) + 1
                self.out |= {work.id: work for work in lease.work}
            assert self.out, "nothing to lease, nothing out, and not over: a hang"
            for work in self.out.values():
                self.frontier.complete([completion(work)])
                self.credits[work.id[0]] = self.credits.get(work.id[0], Fraction(0)) + work.credit
            self.out = {}
        assert self.credits == {record.image_id: Fraction(1) for record in self.records}
        assert all(self.frontier.lease(reader, self.next.get(reader, 0), 1) is None for reader in range(3))
        self.frontier.commit([record.image_id for record in self.records])
        assert remembered(self.frontier) == 0


def remembered(frontier: Frontier) -> int:
    """How many things a frontier holds that grow with the images: journal entries, decisions, tiles."""
    entries = sum(len(journal.entries) for journal in frontier._journal.values())
    kept = (frontier._fresh, *frontier._ready.values(), frontier._out, frontier._open_tiles, frontier._decided)
    ids = (frontier._order, frontier._opened_by, frontier._leases_of, frontier._uncommitted)
    return entries + sum(map(len, (*kept, *ids)))


TestFrontier = FrontierMachine.TestCase
TestFrontier.settings = settings(stateful_step_count=40)


def ids_of(lease: Lease | None) -> list[TileId]:
    assert lease is not None
    return [work.id for work in lease.work]


def limited(count: int, *, shares: int = 1, max_bytes: int = 10**9, policy: str = "scalenet") -> Frontier:
    records = [ImageRecord(i, f"{i}.png", 64, 64) for i in range(1, count + 1)]
    return Frontier(records, count, LeaseLimits(policy_of(policy), shares, max_bytes))


def sizes_of_leases(frontier: Frontier, count: int) -> list[int]:
    sizes = []
    while (lease := frontier.lease(0, len(sizes), count)) is not None:
        sizes.append(len(lease.work))
        frontier.complete([completion(work) for work in lease.work])
    return sizes


def test_leases_are_large_while_there_is_much_to_do_and_shrink_to_the_end() -> None:
    assert sizes_of_leases(limited(40, shares=4), 8) == [8, 8, 6, 4, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1]


def test_few_tiles_are_spread_over_all_actors() -> None:
    frontier = limited(1, shares=4)
    lease = frontier.lease(0, 0, 8)
    assert lease is not None
    frontier.complete([completion(lease.work[0], 12)])
    assert [len(ids_of(frontier.lease(reader, 0, 8))) for reader in (1, 2)] == [3, 2]


def test_a_lease_holds_no_more_bytes_than_allowed_but_always_one_piece() -> None:
    tile = 3 * 64 * 64
    assert sizes_of_leases(limited(7, max_bytes=3 * tile), 8) == [3, 3, 1]
    assert sizes_of_leases(limited(2, max_bytes=1), 8) == [1, 1]
    # With its four windows an image is five tiles.
    assert sizes_of_leases(limited(4, max_bytes=10 * tile, policy="grid-2"), 8) == [2, 2]


def test_an_image_of_unknown_size_counts_as_the_largest_that_its_tile_may_be() -> None:
    policy = policy_of("scalenet")
    limits = LeaseLimits(policy, 1, 10**9)
    unknown, wide = (Work(ImageRecord(1, "1.png", *hw), None, Fraction(1)) for hw in ((), (32, 128)))
    assert limits.bytes_of(unknown) == 3 * policy.largest_side**2
    assert limits.bytes_of(wide) == 3 * 16 * 64
    assert limits.bytes_of(Work(unknown.image, child_tile(1, (0,)), Fraction(1))) == 3 * 8 * 8


def test_a_queue_that_may_open_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="max_open_images must be 1 or more, got 0"):
        Frontier([ImageRecord(1, "1.png")], max_open_images=0)


def test_the_time_of_work_counts_from_the_first_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("scalenet_ray.engine.frontier.time.monotonic", lambda: now[0])
    frontier = Frontier([ImageRecord(i, f"{i}.jpg") for i in range(1, 3)], 1)
    now[0] = 110.0
    assert frontier.seconds_at_work() == 0.0
    frontier.lease(0, 0, 1)
    now[0] = 115.0
    frontier.lease(0, 1, 1)
    assert frontier.seconds_at_work() == 5.0


# --- replays --------------------------------------------------------------------------------------


WHIMSICAL = NetworkFactories(Given(RandomDetector()), Given(WhimsicalScale()))


class FlakyScenes(Scenes):
    """Reads an image now and then only."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = Random(seed)

    def __call__(self, record: ImageRecord) -> np.ndarray:
        if self._random.random() < 0.2:
            raise TileError("the store did not answer")
        return super().__call__(record)


@pytest.mark.parametrize("name", ["whole", "grid-2", "pyramid", "scalenet", "first-pass"])
def test_deaths_and_replays_change_nothing_that_is_found(name: str) -> None:
    policy, records, open_image = policy_of(name), records_of(8), Scenes(unreadable={3})
    networks = random_networks(policy, len(records))
    expected = reference(records, policy, networks, open_image)
    deaths = 0
    for seed in range(3):
        engine = InProcessEngine(
            records,
            policy,
            networks,
            open_image,
            seed=seed,
            # After a death a row is done tile by tile: with more deaths, none of many tiles would live to its end.
            death_rate=0.06 / (1 + policy.fixed_windows),
            rerun_rate=0.1,
            readers=1 + seed % 3,
            lease_size=1 + seed % 4,
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
            records,
            policy,
            networks,
            FlakyScenes(seed),
            seed=seed,
            death_rate=0.03,
            rerun_rate=0.1,
            lease_size=1 + seed % 3,
        )
        assert sorted(result.image_id for result in engine.run()) == list(range(1, 9))
        conflicts += engine.frontier.status().conflicts
    assert conflicts > 0
