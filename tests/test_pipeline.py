"""The Ray Data pipeline against recursive_detect."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.data import DataContext
from ray.exceptions import RayActorError

from scalenet_ray.core.detections import Detections, Failure, ImageResult, TileResult
from scalenet_ray.core.geometry import Tile, Window
from scalenet_ray.core.merge import Merging, merge_image
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.policy import Policy
from scalenet_ray.data.image_records import ImageRecord, ImageRecords, OpenImage
from scalenet_ray.engine.pipeline import Assembler, ImageStream
from scalenet_ray.runs.resources import AdvancedResources, Resources, limits
from tests.faults import (
    FlatImages,
    Given,
    Scenes,
    SlowDetector,
    StuckDetector,
    as_values,
    policy_of,
    random_networks,
    records_of,
    reference,
)
from tests.oracles import RandomScale


def run(
    records: Sequence[ImageRecord],
    policy: Policy,
    networks: NetworkFactories,
    open_image: OpenImage,
    resources: Resources,
) -> list[ImageResult]:
    """All results of a run on Ray; committed as they come, so that the queue forgets while it works."""
    stream = ImageStream(records, policy, networks, open_image, resources)
    results = []
    for result in stream:
        results.append(result)
        stream.commit([result.image_id])
    status = stream.status()
    assert (status.outstanding, status.open_images, status.admitted) == (0, 0, len(records))
    return results


def assert_equals_reference(
    records: Sequence[ImageRecord],
    policy: Policy,
    networks: NetworkFactories,
    open_image: OpenImage,
    resources: Resources,
) -> list[ImageResult]:
    results = run(records, policy, networks, open_image, resources)
    assert sorted(result.image_id for result in results) == [record.image_id for record in records]
    expected = reference(records, policy, networks, open_image)
    assert {result.image_id: as_values(result) for result in results} == expected
    return results


@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "resources"),
    [
        pytest.param(
            "grid-2", Resources(scale_actors=3, scale_batch_size=8, detector_batch_size=5), marks=pytest.mark.slow
        ),
        pytest.param(
            "first-pass",
            Resources(readers=2, scale_actors=3, scale_batch_size=3, detector_batch_size=16),
            marks=pytest.mark.slow,
        ),
        ("scalenet", Resources(scale_actors=2, scale_batch_size=1, detector_batch_size=16)),
        ("scalenet", Resources(scale_actors=None, detector_actors=2, detector_batch_size=3)),
        pytest.param(
            "oracle",
            Resources(scale_actors=3, detector_actors=(1, 2), scale_batch_size=3, detector_batch_size=1),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_policy_equals_recursive_detect(idle_ray: None, name: str, resources: Resources) -> None:
    # 23 images leave no batch size without a partial last batch; the second and the last one cannot be read.
    records, policy = records_of(23), policy_of(name)
    networks = random_networks(policy, len(records))
    results = assert_equals_reference(records, policy, networks, Scenes(unreadable={2, 23}), resources)
    failed = {result.image_id: result.failure for result in results if result.failure}
    assert sorted(failed) == [2, 23]
    assert {failure.stage for failure in failed.values()} == {"read"}


@pytest.mark.ray
@pytest.mark.slow
def test_few_open_images_make_it_slow_but_not_wrong(idle_ray: None) -> None:
    records, policy = records_of(9), policy_of("scalenet")
    resources = Resources(scale_batch_size=3, detector_batch_size=16, advanced=AdvancedResources(max_open_images=1))
    results = assert_equals_reference(records, policy, random_networks(policy), Scenes(), resources)
    assert max(int(result.detections.depth.max(initial=0)) for result in results) == 2


@pytest.mark.ray
@pytest.mark.slow
def test_no_images_are_no_results(idle_ray: None) -> None:
    policy = policy_of("scalenet")
    assert run([], policy, random_networks(policy), Scenes(), Resources()) == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_tiny_object_store_and_a_slow_detector_do_not_hang(idle_ray: None) -> None:
    assert ray.cluster_resources()["object_store_memory"] < 100 * 2**20
    records = records_of(60)
    policy = dataclasses.replace(policy_of("scalenet"), input_side=416)
    networks = NetworkFactories(Given(SlowDetector(0.005, 416)), Given(RandomScale()))
    # A row of 8 tiles is 4 MB, and a call of the detector waits for 8 rows.
    resources = Resources(
        scale_batch_size=8, detector_batch_size=64, advanced=AdvancedResources(no_progress_seconds=30)
    )
    results = assert_equals_reference(records, policy, networks, FlatImages(416), resources)
    assert sum(result.detector_pixels for result in results) * 3 > 2 * ray.cluster_resources()["object_store_memory"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_without_progress_ends_and_has_not_filled_the_store(idle_ray: None, tmp_path: Path) -> None:
    let_go = tmp_path / "let go"
    networks = NetworkFactories(Given(StuckDetector(let_go)), Given(RandomScale()))
    stream = ImageStream(
        records_of(5000),
        policy_of("scalenet"),
        networks,
        Scenes(),
        Resources(advanced=AdvancedResources(no_progress_seconds=8)),
    )
    with pytest.raises(Exception, match="made no progress for at least"):
        list(stream)
    let_go.touch()
    # Far from all images: what is not detected holds back what is looked at, and that what is read.
    assert stream.status().admitted < 2500


def lives(stream: ImageStream) -> bool:
    """Whether the stream's queue answers; a killed actor takes a moment to die."""
    try:
        ray.get(stream._frontier.status.remote())
    except RayActorError:
        return False
    return True


@pytest.mark.ray
def test_a_stream_that_is_abandoned_stops_its_queue_and_leaves_ray_datas_settings_as_they_were(idle_ray: None) -> None:
    context = DataContext.get_current()
    before = {field.name: getattr(context, field.name) for field in dataclasses.fields(context)}
    order = context.execution_options.preserve_order
    policy = policy_of("grid-2")
    stream = ImageStream(records_of(40), policy, random_networks(policy), Scenes(), Resources(readers=1))
    results = iter(stream)
    next(results)
    results.close()
    assert {field.name: getattr(context, field.name) for field in dataclasses.fields(context)} == before
    assert context.execution_options.preserve_order == order
    give_up = time.monotonic() + 60
    while lives(stream):
        assert time.monotonic() < give_up
    assert stream.seconds_at_work() > 0
    assert stream.status().admitted > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale_actors": 0}, "scale_actors must be 1 or more, or \\(fewest, most\\), got 0"),
        ({"detector_actors": (3, 2)}, "detector_actors must be 1 or more, or \\(fewest, most\\), got \\(3, 2\\)"),
        ({"readers": 0}, "readers must be 1 or more, got 0"),
        ({"scale_batch_size": 0}, "scale_batch_size must be 1 or more, got 0"),
        ({"max_open_images": 0}, "max_open_images must be 1 or more, got 0"),
        ({"gpus_per_scale_actor": -1}, "GPUs per actor must be 0 or more, got -1 and 0.0"),
        ({"no_progress_seconds": 0}, "no_progress_seconds must be above 0, got 0"),
        ({"call_seconds": 0.0}, "call_seconds must be above 0, got 0.0"),
        ({"max_tries": 0}, "max_tries must be 1 or more, got 0"),
    ],
)
def test_resources_out_of_range_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdvancedResources(**wrong) if hasattr(AdvancedResources, *wrong) else Resources(**wrong)


def test_processes_are_readers_and_as_many_actors_as_there_may_be() -> None:
    assert Resources(readers=1, scale_actors=(1, 2), detector_actors=3).processes == 6


def test_scale_actors_are_detectors_where_there_is_no_scale_net_unless_they_have_other_gpus() -> None:
    assert limits(Resources(scale_actors=2, detector_actors=3).all_detectors) == (5, 5)
    assert limits(Resources(scale_actors=(1, 2), detector_actors=(2, 4)).all_detectors) == (3, 6)
    a_gpu_each = Resources(detector_actors=2, gpus_per_scale_actor=1, gpus_per_detector_actor=1)
    assert limits(a_gpu_each.all_detectors) == (3, 3)
    assert Resources(detector_actors=2, gpus_per_scale_actor=0.25, gpus_per_detector_actor=1).all_detectors == 2


def test_there_are_more_images_open_than_the_stages_can_hold() -> None:
    assert Resources().open_images >= 64
    assert Resources(advanced=AdvancedResources(max_open_images=3)).open_images == 3
    many = Resources(scale_actors=10, detector_actors=(1, 20), scale_batch_size=16)
    assert many.open_images > 16 * (1 + 10 + 20)
    # In one stage each actor has a row in work and one that waits.
    large_batches = Resources(detector_actors=4, detector_batch_size=64)
    assert large_batches.open_images > 2 * 64 * 5 + 64


# --- assemble -------------------------------------------------------------------------------------


def tree(draw: Callable[[st.SearchStrategy], Any], image_id: int) -> list[TileResult]:
    """All tiles of one image that fans out at random, with exact credits."""
    results = []
    waiting: list[tuple[tuple[int, ...], Fraction]] = [((), Fraction(1))]
    while waiting:
        path, credit = waiting.pop()
        children = draw(st.integers(0, 3)) if len(path) < 3 else 0
        credit /= 1 + children
        waiting += [((*path, i), credit) for i in range(children)]
        box = np.array([[len(path), len(results), 9 + len(results), 9]])
        found = Detections(box, np.array([draw(st.integers(1, 3)) / 4]), [1], windows=[[0, 0, 99, 99]])
        failure = Failure("detect", "NaN") if draw(st.integers(0, 9)) == 0 else None
        view = Tile(image_id, path, (99, 99), Window(0, 0, 99, 99), 64, 64)
        results.append(TileResult(image_id, path, credit, found, failure, 5, 7, 0.5, view, ("max_depth",), (99, 99)))
    return results


IMAGES = ImageRecords.of(ImageRecord(i, f"{i}.jpg") for i in range(8))


@given(st.data())
def test_images_finish_once_in_any_order_and_whatever_comes_twice(data: st.DataObject) -> None:
    images = {i: tree(data.draw, i) for i in range(data.draw(st.integers(0, 4)))}
    tiles = [tile for results in images.values() for tile in results]
    doubled = [*tiles, *(data.draw(st.lists(st.sampled_from(tiles), max_size=6)) if tiles else [])]
    arriving = data.draw(st.permutations(doubled))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(arriving)), max_size=4)))

    assembler = Assembler(Merging(), IMAGES)
    done = []
    for start, end in zip([0, *cuts], [*cuts, len(arriving)], strict=True):
        done += assembler.add(arriving[start:end])
    assert sorted(result.image_id for result in done) == sorted(images)
    assert assembler.unfinished == []
    for result in done:
        assert as_values(result) == as_values(merge_image(images[result.image_id], Merging()))


@given(st.data())
def test_an_image_is_not_finished_while_a_tile_is_missing(data: st.DataObject) -> None:
    tiles = tree(data.draw, 5)
    missing = data.draw(st.integers(0, len(tiles) - 1))
    assembler = Assembler(Merging(), IMAGES)
    rest = tiles[:missing] + tiles[missing + 1 :]
    assert assembler.add(rest) == []
    assert assembler.unfinished == ([5] if rest else [])
    (result,) = assembler.add([tiles[missing]])
    assert result.tiles == len(tiles)


def test_the_first_of_two_results_of_a_tile_counts() -> None:
    assembler = Assembler(Merging(), IMAGES)
    child = TileResult(1, (0,), Fraction(1, 2))
    assembler.add([child, TileResult(1, (0,), Fraction(1, 2), failure=Failure("detect", "a retry broke"))])
    (result,) = assembler.add([TileResult(1, (), Fraction(1, 2))])
    assert result.failure is None


def test_tiles_worth_more_than_their_image_are_a_bug_that_is_named() -> None:
    assembler = Assembler(Merging(), IMAGES)
    assembler.add([TileResult(7, (0,), Fraction(2, 3))])
    with pytest.raises(RuntimeError, match=r"image 7 has tiles worth 7/6 of it, more than 1: \[\(0,\), \(1,\)\]"):
        assembler.add([TileResult(7, (1,), Fraction(1, 2))])
