"""Runs over many images: resuming, progress, failures."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scalenet_ray.core.answers import MOST_FAILED
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.data.image_records import ImageRecord
from scalenet_ray.engine.pipeline import ImageStream
from scalenet_ray.models.checked_detector import CheckedDetector
from scalenet_ray.runs.batch import PolicyRun, Progress, Stream, image_opener
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.local import LocalStream
from scalenet_ray.runs.resources import AdvancedResources, Resources
from tests.faults import (
    FaultyScale,
    FlatImages,
    Given,
    Scenes,
    WorkLog,
    as_values,
    policy_of,
    random_networks,
    records_of,
    reference,
)
from tests.oracles import CountingDetector, RandomDetector, RandomScale
from tests.scripted_detector import RaisesOn

POLICY = policy_of("scalenet")
RECORDS = records_of(11)
SCENES = Scenes(unreadable={3})


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of two images, and a line for each image."""
    monkeypatch.setattr("scalenet_ray.runs.batch._IMAGES_PER_SHARD", 2)
    monkeypatch.setattr("scalenet_ray.runs.batch._SECONDS_BETWEEN_REPORTS", -1.0)


def stop_after(count: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.images == count:
            raise KeyboardInterrupt

    return report


def ignore(progress: Progress) -> None:
    """Nothing is said."""


def local(records: Sequence[ImageRecord], log: WorkLog | None = None) -> Stream:
    return LocalStream(records, POLICY, networks(log), SCENES)


def on_ray(records: Sequence[ImageRecord], log: WorkLog | None = None) -> Stream:
    return ImageStream(
        records,
        POLICY,
        networks(log),
        SCENES,
        Resources(scale_batch_size=2, advanced=AdvancedResources(max_open_images=3)),
    )


def networks(log: WorkLog | None) -> NetworkFactories:
    scale_net = RandomScale() if log is None else FaultyScale(RandomScale(), log)
    return NetworkFactories(Given(RandomDetector()), Given(scale_net))


def log_in(folder: Path) -> WorkLog:
    folder.mkdir()
    return WorkLog(folder)


def images_looked_at(log: WorkLog) -> set[int]:
    return {int(line.split()[0]) for line in log.lines()}


def tables(run: RunFolder) -> list[pa.Table]:
    """What a run found, without when."""
    return [run.table("images", POLICY.name).drop_columns(["finished_at"]), run.table("detections", POLICY.name)]


def whole_run(folder: Path) -> RunFolder:
    run = RunFolder(str(folder))
    PolicyRun(RECORDS, POLICY.name, local, run, ignore).finish()
    return run


def test_the_local_engine_is_the_reference(tmp_path: Path) -> None:
    for name in ("grid-2", "first-pass", "scalenet", "oracle"):
        policy = policy_of(name)
        nets = random_networks(policy, len(RECORDS))
        results = list(LocalStream(RECORDS, policy, nets, SCENES))
        assert [result.image_id for result in results] == [record.image_id for record in RECORDS]
        expected = reference(RECORDS, policy, nets, SCENES)
        assert {result.image_id: as_values(result) for result in results} == expected


def test_the_local_engine_takes_an_images_windows_in_batches_where_the_networks_should_have_them() -> None:
    calls = {}
    for batch_size in (1, 4):
        detector = CountingDetector(RandomDetector())
        nets = NetworkFactories(Given(detector), batch_size=batch_size)
        assert len(list(LocalStream(RECORDS, policy_of("grid-2"), nets, SCENES))) == len(RECORDS)
        calls[batch_size] = detector.calls
    readable = len(RECORDS) - 1
    assert calls == {1: 5 * readable, 4: 2 * readable}


@pytest.mark.parametrize(
    "start", [pytest.param(local, id="local"), pytest.param(on_ray, id="ray", marks=pytest.mark.ray)]
)
def test_resuming_does_what_is_missing_and_ends_as_an_uninterrupted_run(
    request: pytest.FixtureRequest, tmp_path: Path, start: Callable[..., Stream]
) -> None:
    if start is on_ray:
        request.getfixturevalue("idle_ray")
    run = RunFolder(str(tmp_path / "run"))
    before, after = log_in(tmp_path / "before"), log_in(tmp_path / "after")
    with pytest.raises(KeyboardInterrupt):
        PolicyRun(RECORDS, POLICY.name, partial(start, log=before), run, stop_after(7)).finish()
    # All that were finished, with the one that waited for another to fill its shard.
    written = set(run.finished(POLICY.name).ids.tolist())
    assert len(written) == 7
    assert run.standing == "scalenet: 7 of 11 done"
    orphan = Path(run.uri, "detections", "scalenet-00004.parquet")
    orphan.write_bytes(Path(run.uri, "detections", "scalenet-00000.parquet").read_bytes())

    progress = PolicyRun(RECORDS, POLICY.name, partial(start, log=after), run, ignore).finish()
    assert (progress.done, progress.total, progress.images) == (11, 11, 4)
    missing = {record.image_id for record in RECORDS} - written
    assert images_looked_at(after) == missing - {3}
    assert images_looked_at(before) >= written - {3}
    assert tables(run) == tables(whole_run(tmp_path / "whole"))


def test_images_are_committed_as_they_are_written(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    committed: list[int] = []

    class Committing(LocalStream):
        def commit(self, image_ids: Iterable[int]) -> None:
            committed.extend(image_ids)
            assert set(committed) <= set(run.finished(POLICY.name).ids.tolist())

    PolicyRun(RECORDS, POLICY.name, lambda left: Committing(left, POLICY, networks(None), SCENES), run, ignore).finish()
    assert committed == [record.image_id for record in RECORDS]


def test_a_slow_run_is_written_every_half_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalenet_ray.runs.batch._IMAGES_PER_SHARD", 1000)
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr("scalenet_ray.runs.batch.time.monotonic", lambda: float(next(now)))
    run = whole_run(tmp_path / "run")
    sizes = [pq.read_table(uri).num_rows for uri in run.shards("images", POLICY.name)]
    assert len(sizes) > 1
    assert sum(sizes) == len(RECORDS)
    assert max(sizes) <= 4


def test_progress_counts_images_tiles_and_failures(tmp_path: Path) -> None:
    lines: list[Progress] = []
    run = RunFolder(str(tmp_path / "run"))
    last = PolicyRun(RECORDS, POLICY.name, local, run, lines.append).finish()
    assert [line.done for line in lines] == list(range(12))
    assert lines[-1] == last
    assert last.failed == 1
    assert sum(last.tiles.values()) == sum(run.table("images", POLICY.name).column("tiles").to_pylist())
    assert str(last).startswith("scalenet: 11/11 images, ")
    assert "1 failed" in str(last)


def test_the_rate_leaves_start_up_out() -> None:
    progress = Progress("whole", done=3, total=9, images=3, seconds=4.0, elapsed=100.0, pace=1.5)
    assert progress.images_per_second == 0.75
    # By the images since the first came: the seconds before hold the start of the first batch.
    assert str(progress).endswith("4 s left")
    assert Progress("whole", 1, 9, images=1, seconds=0.0).images_per_second == 0.0
    assert str(Progress("whole", 1, 9, images=1)).endswith("starting")
    # Two images in a hundredth of a second say nothing of the speed.
    assert "- images/s" in str(Progress("whole", 2, 9, images=2, seconds=0.01))
    assert str(Progress("whole", 9, 9, images=9, seconds=4.0)).endswith("done")


def test_the_time_of_work_is_counted_from_the_first_image_that_was_begun(tmp_path: Path) -> None:
    class Waited(LocalStream):
        def seconds_at_work(self) -> float:
            return 3.0

    run = RunFolder(str(tmp_path / "run"))
    lines: list[Progress] = []
    PolicyRun(
        RECORDS, POLICY.name, lambda left: Waited(left, POLICY, networks(None), SCENES), run, lines.append
    ).finish()
    assert lines[1].seconds >= 3.0
    rate = run.speed(POLICY.name)["images_per_second"]
    assert rate is not None
    assert 0 < rate <= len(RECORDS) / 3.0


def test_a_finished_run_that_is_resumed_keeps_its_speed(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    before = run.speed(POLICY.name)
    assert before["seconds"]
    PolicyRun(RECORDS, POLICY.name, lambda records: pytest.fail("started"), run, ignore).finish()
    assert run.speed(POLICY.name) == before


def test_images_that_failed_are_tried_again_alone_and_their_records_are_superseded(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    begun: list[int] = []

    def mended(records: Sequence[ImageRecord]) -> Stream:
        begun.extend(record.image_id for record in records)
        return LocalStream(records, POLICY, networks(None), Scenes())

    progress = PolicyRun(RECORDS, POLICY.name, mended, run, ignore, retry_failed=True).finish()
    assert begun == [3]
    assert (progress.done, progress.total, progress.images) == (11, 11, 1)
    other = RunFolder(str(tmp_path / "other"))
    PolicyRun(
        RECORDS, POLICY.name, lambda left: LocalStream(left, POLICY, networks(None), Scenes()), other, ignore
    ).finish()
    assert tables(run) == tables(other)
    assert run.find_failures([POLICY.name]).num_rows == 0


# --- opening images -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    return tmp_path


def test_images_are_opened_below_their_folder_or_by_their_address(folder: Path) -> None:
    assert image_opener(str(folder), 10**6)(ImageRecord(1, "good.png", 4, 6)).shape == (4, 6, 3)
    assert image_opener(None, 10**6)(ImageRecord(1, str(folder / "good.png"))).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (ImageRecord(1, "missing.png"), "there is no such file"),
        (ImageRecord(1, "broken.jpg"), "cannot be decoded"),
        (ImageRecord(1, "good.png", 5, 6), "must be \\(5, 6\\)"),
        (ImageRecord(1, "../good.png"), "must be a path inside"),
    ],
)
def test_an_image_that_cannot_be_had_costs_itself_alone(folder: Path, record: ImageRecord, reason: str) -> None:
    with pytest.raises(TileError, match=reason):
        image_opener(str(folder), 10**6)(record)


def test_an_image_larger_than_allowed_is_not_decoded(folder: Path) -> None:
    with pytest.raises(TileError, match="an image may have 23 pixels"):
        image_opener(str(folder), 23)(ImageRecord(1, "good.png"))


QUOTED = "the detector raised RuntimeError: no kernel for this"


def raising(ids: Container[int] | None, *, on_ray: bool = False) -> Callable[[Sequence[ImageRecord]], Stream]:
    nets = NetworkFactories(Given(CheckedDetector(RaisesOn(ids), "mine:Net")))
    policy, images = policy_of("whole"), FlatImages(64)
    if on_ray:
        return lambda records: ImageStream(records, policy, nets, images, Resources())
    return lambda records: LocalStream(records, policy, nets, images)


@pytest.mark.parametrize("on_ray", [False, pytest.param(True, marks=[pytest.mark.ray, pytest.mark.slow])])
def test_a_detector_that_raises_on_every_image_ends_the_run(
    request: pytest.FixtureRequest, tmp_path: Path, on_ray: bool
) -> None:
    if on_ray:
        request.getfixturevalue("idle_ray")
    run = RunFolder(str(tmp_path / "run"))
    said = f"{QUOTED}: so on each of the first {MOST_FAILED} images, and the run ends; correct the detector"
    with pytest.raises(UserError, match=said):
        PolicyRun(records_of(50), "whole", raising(None, on_ray=on_ray), run, ignore).finish()
    reasons = run.table("images", "whole").column("failure_reason").to_pylist()
    assert reasons == [QUOTED] * MOST_FAILED
    # It goes on to do so when it is resumed, and where fewer are left.
    for count in (82, 90):
        with pytest.raises(UserError, match="so on each of the first"):
            PolicyRun(records_of(count), "whole", raising(None, on_ray=on_ray), run, ignore).finish()


@pytest.mark.parametrize("on_ray", [False, pytest.param(True, marks=pytest.mark.ray)])
def test_a_detector_that_raises_on_some_images_costs_those(
    request: pytest.FixtureRequest, tmp_path: Path, on_ray: bool
) -> None:
    if on_ray:
        request.getfixturevalue("idle_ray")
    run = RunFolder(str(tmp_path / "run"))
    bad = {1, 2, 40}
    progress = PolicyRun(records_of(41), "whole", raising(bad, on_ray=on_ray), run, ignore).finish()
    assert progress.failed == len(bad)
    rows = run.table("images", "whole").to_pylist()
    reasons = {row["image_id"]: row["failure_reason"] for row in rows if row["failure_stage"] == "detect"}
    assert reasons == dict.fromkeys(bad, QUOTED)


def test_an_image_that_was_done_before_shows_that_the_detector_does_not_raise_on_all(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    PolicyRun(records_of(1), "whole", raising({2}), run, ignore).finish()
    assert PolicyRun(records_of(2), "whole", raising({2}), run, ignore).finish().failed == 1


def test_images_that_cannot_be_read_do_not_hide_that_the_detector_raises_on_all_others(tmp_path: Path) -> None:
    nets = NetworkFactories(Given(CheckedDetector(RaisesOn(None), "mine:Net")))
    run = RunFolder(str(tmp_path / "run"))
    with pytest.raises(UserError, match=f"{QUOTED}: so on each of the first 2 images"):
        PolicyRun(
            records_of(4),
            "whole",
            lambda records: LocalStream(records, policy_of("whole"), nets, Scenes(unreadable={1, 4})),
            run,
            ignore,
        ).finish()
