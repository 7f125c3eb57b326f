"""Seconds by stage on both engines, and after a resume."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from scalenet_ray.core.timing import STAGES, current_tally, measured, timed
from scalenet_ray.engine.pipeline import ImageStream
from scalenet_ray.runs.batch import PolicyRun
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.local import LocalStream
from scalenet_ray.runs.resources import Resources
from tests.faults import SlowImages, policy_of, random_networks, records_of

RECORDS = records_of(6)
POLICY = policy_of("scalenet")


def on_local(left):
    return LocalStream(left, POLICY, random_networks(POLICY), SlowImages())


def on_ray(left):
    return ImageStream(left, POLICY, random_networks(POLICY), SlowImages(), Resources())


def test_a_tally_hears_what_is_done_within_it_and_nothing_else() -> None:
    with timed("cut"):
        pass
    assert current_tally() is None
    with measured() as outer:
        with timed("cut"):
            time.sleep(0.01)
        with measured() as inner, timed("look"):
            time.sleep(0.01)
    assert outer.seconds["cut"] >= 0.01
    assert outer.seconds["look"] == 0
    assert inner.seconds["look"] >= 0.01
    assert outer.take()["cut"] == outer.seconds["cut"]
    assert outer.take() == dict.fromkeys(STAGES, 0.0)


@pytest.mark.parametrize(
    "start",
    [pytest.param(on_local, id="local"), pytest.param(on_ray, id="ray", marks=[pytest.mark.ray, pytest.mark.slow])],
)
def test_a_run_folder_tells_the_seconds_of_each_stage_and_when_each_image_was_finished(
    request: pytest.FixtureRequest, tmp_path: Path, start
) -> None:
    if start is on_ray:
        request.getfixturevalue("idle_ray")
    run = RunFolder(str(tmp_path))
    PolicyRun(RECORDS[:4], POLICY.name, start, run, lambda _: None).finish()
    first = run.seconds_by_stage(POLICY.name)
    assert tuple(first) == STAGES
    assert min(first.values()) > 0
    # Each image sleeps that long in `decode`, whichever process opens it.
    assert first["decode"] >= 4 * 0.02
    before = run.seconds_at_work(POLICY.name)
    PolicyRun(RECORDS, POLICY.name, start, run, lambda _: None).finish()
    later = run.seconds_by_stage(POLICY.name)
    assert all(later[stage] > first[stage] for stage in STAGES)
    times = run.table("images", POLICY.name).column("finished_at").to_pylist()
    assert max(times[:4]) == before < min(times[4:])


def test_shards_of_a_version_that_took_no_times_are_read_as_null(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    PolicyRun(RECORDS[:3], POLICY.name, on_local, run, lambda _: None).finish()
    (shard,) = run.shards("images", POLICY.name)
    old = pq.read_table(io.BytesIO(Path(shard).read_bytes())).drop_columns(["finished_at"])
    pq.write_table(old.replace_schema_metadata(None), shard)
    assert run.table("images", POLICY.name).column("finished_at").to_pylist() == [None] * 3
    assert run.seconds_by_stage(POLICY.name) == dict.fromkeys(STAGES, 0.0)
    PolicyRun(RECORDS, POLICY.name, on_local, run, lambda _: None).finish()
    times = run.table("images", POLICY.name).column("finished_at").to_pylist()
    assert times[:3] == [None] * 3
    assert None not in times[3:]
