"""The stages of the pipeline: reading, scale prediction, detection."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from scalenet_ray.core.detections import TileResult
from scalenet_ray.core.networks import NetworkFactories, ScalePredictor
from scalenet_ray.core.policy import Policy
from scalenet_ray.data.image_records import ImageRecord, OpenImage
from scalenet_ray.engine.frontier import Frontier, Work
from scalenet_ray.engine.readers import TileSource, _OpenedImages, cut_work
from scalenet_ray.engine.rows import PackedTile, TileRow, pack, unpack, unpack_results
from scalenet_ray.engine.stages import DetectStage, ScaleAndDetectStage, ScaleStage
from tests.faults import BuggyScale, Given, Scenes, policy_of, random_networks, records_of
from tests.in_process import Handle
from tests.oracles import (
    BrokenScale,
    ConstantScale,
    CountingDetector,
    PerfectDetector,
    RandomDetector,
    RandomScale,
    draw_squares,
    tile_of,
)

pytestmark = pytest.mark.usefixtures("without_ray")


class Trusting:
    """What a detect stage asks of a frontier: may it begin?"""

    def begin(self, stage: str, tiles: object, ended: object) -> bool:
        return True


TRUSTING = Handle(Trusting())


def leased(frontier: Frontier, count: int, reader: int = 0, sequence: int = 0) -> tuple[Work, ...]:
    lease = frontier.lease(reader, sequence, count)
    assert lease is not None
    return lease.work


def row_of(frontier: Frontier, policy: Policy, open_image: OpenImage, count: int) -> pa.Table:
    return pack(cut_work(leased(frontier, count), policy, open_image))


def opened(row: pa.Table) -> TileRow:
    (batch,) = unpack(row)
    return batch


def looking_networks(predict_scale: ScalePredictor, detector: Any = None) -> NetworkFactories:
    return NetworkFactories(Given(detector or RandomDetector()), Given(predict_scale))


def detected(policy: Policy, networks: NetworkFactories, *rows: pa.Table, batch_size: int = 16) -> list[TileResult]:
    return unpack_results(DetectStage(TRUSTING, policy, networks, batch_size)(pa.concat_tables(rows)))


# --- reading ------------------------------------------------------------------------------------------------


def test_an_image_that_changed_since_its_tiles_were_planned_fails_and_is_named() -> None:
    frontier = Frontier(records_of(1), 1)
    row = row_of(frontier, policy_of("scalenet"), Scenes(), 1)
    ScaleStage(Handle(frontier), policy_of("scalenet"), looking_networks(ConstantScale(scale_class=1)))(row)

    def other(record: ImageRecord) -> np.ndarray:
        return np.zeros((10, 10, 3), np.uint8)

    work = leased(frontier, 8, sequence=1)
    batch = cut_work(work, policy_of("scalenet"), other)
    assert not batch.tiles
    assert len(batch.results) == len(work) > 0
    assert all(
        result.failure is not None and result.failure.stage == "read" and "the file changed" in result.failure.reason
        for result in batch.results
    )


@pytest.mark.parametrize(
    ("most_bytes", "most", "asked", "decoded"),
    [
        pytest.param(2 * 300, 8, (1, 2, 1, 3, 1, 2), [1, 2, 3, 2], id="up to so many bytes, the last used longest"),
        pytest.param(10**9, 2, (1, 2, 3, 2, 1), [1, 2, 3, 1], id="no more than may be in progress"),
        pytest.param(1, 8, (1, 1, 2, 2, 1), [1, 2, 1], id="one that is too large until the next"),
    ],
)
def test_decoded_images_are_kept_within_limits(
    monkeypatch: pytest.MonkeyPatch, most_bytes: int, most: int, asked: tuple[int, ...], decoded: list[int]
) -> None:
    opened: list[int] = []

    def counted(record: ImageRecord) -> np.ndarray:
        opened.append(record.image_id)
        return np.zeros((10, 10, 3), np.uint8)

    monkeypatch.setattr("scalenet_ray.engine.readers._CACHE_BYTES", most_bytes)
    images = _OpenedImages(counted, most)
    for image_id in asked:
        images(ImageRecord(image_id, "x.png"))
    assert opened == decoded


def test_a_lease_of_written_images_is_an_empty_row_that_keeps_the_positions() -> None:
    policy, frontier = policy_of("whole"), Frontier(records_of(3), 3)
    handle = Handle(frontier)
    networks = random_networks(policy)

    def read() -> Iterable[pa.Table]:
        return TileSource(handle, policy, Scenes(), readers=1, lease_size=1, open_images=8).get_read_tasks(1)[0]()

    stage = ScaleStage(handle, policy, networks)
    rows = []
    for row in read():
        stage(row)
        rows.append(row)
    frontier.commit([1, 3])
    again = list(read())
    assert [len(opened(row).tiles) for row in again] == [0, 1, 0]
    assert again[1].drop_columns(["seconds"]) == rows[1].drop_columns(["seconds"])
    empty = stage(again[0])
    assert empty.num_rows == 1
    assert opened(empty) == TileRow([], [], [])
    assert detected(policy, networks, empty) == []


def test_a_readers_leases_double_up_to_a_limit() -> None:
    policy, frontier = policy_of("whole"), Frontier(records_of(30), 30)
    stage = ScaleStage(Handle(frontier), policy, random_networks(policy))
    (read,) = TileSource(
        Handle(frontier), policy, Scenes(), readers=1, lease_size=2, open_images=8, max_lease_size=10
    ).get_read_tasks(1)
    sizes = []
    for row in read():
        sizes.append(len(opened(row).tiles))
        stage(row)
    assert sizes == [2, 4, 8, 10, 6]


def test_a_data_set_gets_as_many_read_tasks_as_readers_whatever_ray_data_would_like() -> None:
    source = TileSource(None, policy_of("whole"), Scenes(), readers=3, lease_size=1, open_images=8)
    assert len(source.get_read_tasks(200)) == 3
    assert source.estimate_inmemory_data_size() is None


def test_a_reader_waits_for_work_that_is_still_out_and_each_time_a_little_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, frontier = policy_of("whole"), Frontier(records_of(2), 1)
    stage = ScaleStage(Handle(frontier), policy, random_networks(policy))
    rows: list[pa.Table] = []
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) in (4, 6):
            stage(rows[-1])

    monkeypatch.setattr("scalenet_ray.engine.readers.time.sleep", sleep)
    (read,) = TileSource(Handle(frontier), policy, Scenes(), readers=1, lease_size=1, open_images=8).get_read_tasks(1)
    for table in read():
        rows.append(table)
    assert [len(opened(table).tiles) for table in rows] == [1, 1]
    assert waits == [0.05, 0.1, 0.2, 0.2, 0.05, 0.1]


# --- looking ------------------------------------------------------------------------------------------------


def test_a_retry_passes_on_what_was_recorded_and_not_what_it_would_decide() -> None:
    policy, frontier = policy_of("scalenet"), Frontier(records_of(1), 1)
    row = row_of(frontier, policy, Scenes(), 1)
    handle = Handle(frontier)
    first = opened(ScaleStage(handle, policy, looking_networks(ConstantScale(scale_class=1)))(row))
    children = frontier.status().ready
    assert children > 0
    retry = opened(ScaleStage(handle, policy, looking_networks(ConstantScale(scale_class=4)))(row))
    assert frontier.status().ready == children
    assert frontier.status().conflicts == 1
    assert retry.tiles == first.tiles
    assert retry.tiles[0].credit == Fraction(1, 1 + children)


def test_a_failure_that_was_recorded_stands_though_the_retry_can_look() -> None:
    policy, frontier = policy_of("scalenet"), Frontier(records_of(1), 1)
    row = row_of(frontier, policy, Scenes(), 1)
    ScaleStage(Handle(frontier), policy, looking_networks(BrokenScale(RandomScale(), 1)))(row)
    retry = opened(ScaleStage(Handle(frontier), policy, looking_networks(ConstantScale(scale_class=1)))(row))
    assert retry.tiles == []
    (failed,) = retry.results
    assert failed.failure is not None
    assert failed.failure.stage == "look"
    assert failed.credit == 1
    assert frontier.status().ready == 0


def test_a_bug_in_a_network_is_let_through_and_nothing_is_decided() -> None:
    policy, frontier = policy_of("scalenet"), Frontier(records_of(2), 2)
    row = row_of(frontier, policy, Scenes(), 2)
    with pytest.raises(ValueError, match="a bug: the weights are of another network"):
        ScaleStage(Handle(frontier), policy, looking_networks(BuggyScale(2)))(row)
    assert frontier.status().outstanding == 2


@pytest.mark.parametrize(("name", "tiles"), [("whole", 1), ("grid-2", 5), ("random", 3), ("pyramid", 3)])
def test_policies_that_need_no_look_never_come_back_to_the_frontier(name: str, tiles: int) -> None:
    policy, frontier = policy_of(name), Frontier(records_of(2), 2)
    networks = random_networks(policy)
    row = ScaleStage(Handle(frontier), policy, networks)(row_of(frontier, policy, Scenes(), 2))
    assert frontier.status().outstanding == frontier.status().ready == 0
    assert frontier.lease(0, 1, 9) is None
    assert len(opened(row).tiles) == 2 * tiles
    results = detected(policy, networks, row)
    credits = {i: sum((r.credit for r in results if r.image_id == i), Fraction(0)) for i in (1, 2)}
    assert credits == {1: 1, 2: 1}


def test_a_row_of_many_tiles_is_looked_at_in_batches() -> None:
    policy, frontier = policy_of("scalenet"), Frontier(records_of(7), 7)
    batches: list[int] = []

    class Noting(RandomScale):
        def __call__(self, pixels: Any, tiles: Any) -> Any:
            batches.append(len(tiles))
            return super().__call__(pixels, tiles)

    row = row_of(frontier, policy, Scenes(), 7)
    ScaleStage(Handle(frontier), policy, looking_networks(Noting()), batch_size=3)(row)
    assert batches == [3, 3, 1]
    assert frontier.status().open_images <= 7
    assert not frontier._out


def test_one_actor_runs_a_scale_net_of_its_own_and_the_detector() -> None:
    policy, frontier = policy_of("scalenet", max_depth=1), Frontier(records_of(3), 3)
    stage = ScaleAndDetectStage(Handle(frontier), policy, looking_networks(RandomScale()), batch_size=2)
    roots = unpack_results(stage(row_of(frontier, policy, Scenes(), 3)))
    assert [(result.image_id, result.path) for result in roots] == [(1, ()), (2, ()), (3, ())]
    assert all(result.look_pixels == RandomScale.input_pixels for result in roots)
    assert frontier.status().ready > 0


# --- detecting ----------------------------------------------------------------------------------------------


def test_tiles_of_one_canvas_are_detected_side_by_side() -> None:
    sides = [32, 64, 32, 96, 64, 32]
    tiles = [PackedTile(tile_of((side, side), image_id=i), Fraction(1), settled=True) for i, side in enumerate(sides)]
    row = pack(TileRow(tiles, [draw_squares((side, side), np.zeros((0, 4))) for side in sides], []))
    counting = CountingDetector(RandomDetector())
    results = detected(policy_of("whole"), NetworkFactories(Given(counting)), row, batch_size=2)
    assert [hw[0] for hw in counting.sizes_hw] == sorted(sides)
    assert sorted(result.image_id for result in results) == list(range(len(sides)))


def row_of_tiles(image_ids: Iterable[int], colour: tuple[int, int, int] | None = None) -> pa.Table:
    pixels = draw_squares((32, 32), np.array([[4, 4, 20, 20]]))
    if colour:
        pixels[22:30, 22:30] = colour
    tiles = [PackedTile(tile_of((32, 32), image_id=i), Fraction(1), settled=True) for i in image_ids]
    return pack(TileRow(tiles, [pixels] * len(tiles), []))


def test_the_detector_gets_full_batches_over_rows_and_the_rest_last() -> None:
    batches: list[int] = []

    class Noting(PerfectDetector):
        def __call__(self, pixels: Any) -> Any:
            batches.append(len(pixels))
            return super().__call__(pixels)

    rows = [row_of_tiles(range(1, 4)), row_of_tiles([]), row_of_tiles(range(4, 8))]
    results = detected(policy_of("whole"), NetworkFactories(Given(Noting())), *rows, batch_size=3)
    assert batches == [3, 3, 1]
    assert [result.image_id for result in results] == list(range(1, 8))
    assert all(len(result.detections) == 1 for result in results)


def test_a_detect_call_gives_one_row_however_many_tiles_it_had() -> None:
    stage = DetectStage(TRUSTING, policy_of("whole"), NetworkFactories(Given(PerfectDetector())), 4)
    for count in (0, 1, 9):
        assert stage(row_of_tiles(range(count))).num_rows == 1


# --- both in one actor --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reads_features", "together"),
    [
        ("whole", False, True),
        ("grid-2", False, True),
        ("first-pass", False, True),
        ("scalenet", False, False),
        ("scalenet", True, True),
        ("oracle", True, False),
    ],
)
def test_one_actor_looks_and_detects_but_for_a_scale_net_of_its_own(
    name: str, reads_features: bool, together: bool
) -> None:
    networks = NetworkFactories(Given(RandomDetector()), reads_features=reads_features)
    assert networks.one_actor_suffices(policy_of(name)) == together


def test_one_detector_looks_at_whole_images_and_detects_their_windows() -> None:
    policy, frontier = policy_of("first-pass", max_depth=1), Frontier(records_of(2), 2)
    made: list[CountingDetector] = []

    def make() -> CountingDetector:
        made.append(CountingDetector(RandomDetector()))
        return made[-1]

    stage = ScaleAndDetectStage(Handle(frontier), policy, NetworkFactories(make), batch_size=4)
    roots = unpack_results(stage(row_of(frontier, policy, Scenes(), 2)))
    assert [(result.image_id, result.path) for result in roots] == [(1, ()), (2, ())]
    windows = frontier.status().ready
    assert windows > 0
    row = pack(cut_work(leased(frontier, 99, sequence=1), policy, Scenes()))
    results = unpack_results(stage(row))
    assert len(results) == windows
    assert sum((result.credit for result in (*roots, *results)), Fraction(0)) == 2
    (detector,) = made
    assert len(detector.sizes_hw) == 2 + windows
