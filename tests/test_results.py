"""Results of a run folder, read image by image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from scalenet_ray.core.detections import Detections, Failure, ImageResult
from scalenet_ray.data.image_records import ImageRecord, ImageRecords
from scalenet_ray.runs.batch import ShardWriter
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.results import StoredImage, image_results, rows_in_order, tables_in_order

IDS = [7, 3, 2**40, 12, 1, 9, 40, 5, 33, 8, 21, 6]


def result_of(image_id: int, failure: Failure | None = None) -> ImageResult:
    """An image with as many detections as the last digit of its id says."""
    count = 0 if failure else image_id % 10
    boxes = np.tile([[1, 2, 3, 4]], (count, 1)) + image_id % 50
    masks = tuple(bytes([image_id % 50, i]) for i in range(count))
    found = Detections(boxes, np.full(count, 0.5), np.arange(count), np.zeros(count), boxes, masks)
    return ImageResult(image_id, found, failure, 1, 10, 20, 1.0, {}, (64, 48))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Twelve images in shards of two, two of which failed at first, and one of these for good."""
    monkeypatch.setattr("scalenet_ray.runs.batch._IMAGES_PER_SHARD", 2)
    run = RunFolder(str(tmp_path / "run"))
    failed = {12: Failure("read", "damaged"), 33: Failure("detect", "NaN")}
    for results in ([result_of(each, failed.get(each)) for each in IDS], [result_of(12)]):
        writer = ShardWriter(
            run, "whole", ImageRecords.of(ImageRecord(each, f"{each}.png") for each in IDS), lambda ids: None
        )
        for result in results:
            writer.add(result, 1.0)
        writer.flush()
    return run


def as_values(image: StoredImage) -> tuple:
    found = image.detections
    return (image.image_id, image.file, image.hw, found.boxes.tolist(), found.labels.tolist(), found.masks)


@pytest.mark.parametrize("per_bucket", [1, 3, 100])
def test_images_sorted_by_way_of_the_disk_are_those_sorted_in_memory(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, per_bucket: int
) -> None:
    in_memory = [as_values(image) for image in image_results(run, "whole")]
    by_image = [(row, found.boxes.tolist()) for row, found in rows_in_order(run, "whole", ["image_id"])]
    assert [image[0] for image in in_memory] == sorted(set(IDS) - {33})
    assert in_memory[7][:2] == (12, "12.png")
    assert len(in_memory[7][3]) == 2
    assert [row["image_id"] for row, _ in by_image] == sorted(IDS)

    monkeypatch.setattr("scalenet_ray.runs.results._MOST_IN_MEMORY", 5)
    monkeypatch.setattr("scalenet_ray.runs.results._IMAGES_PER_BUCKET", per_bucket)
    assert [as_values(image) for image in image_results(run, "whole")] == in_memory
    again = [(row, found.boxes.tolist()) for row, found in rows_in_order(run, "whole", ["image_id"])]
    assert again == by_image


def test_more_images_than_fit_are_never_in_one_table(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalenet_ray.runs.results._MOST_IN_MEMORY", 5)
    monkeypatch.setattr("scalenet_ray.runs.results._IMAGES_PER_BUCKET", 3)
    monkeypatch.setattr(RunFolder, "table", lambda *args: pytest.fail("all rows at once"))
    sizes = [images.num_rows for images, _ in tables_in_order(run, "whole")]
    assert sizes == [3, 3, 3, 3]


def test_there_are_never_more_files_open_than_a_process_may_have(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalenet_ray.runs.results._MOST_IN_MEMORY", 5)
    monkeypatch.setattr("scalenet_ray.runs.results._IMAGES_PER_BUCKET", 1)
    monkeypatch.setattr("scalenet_ray.runs.results._MOST_BUCKETS", 4)
    assert len(list(tables_in_order(run, "whole"))) == 4


def test_masks_may_take_more_than_two_gigabytes_together(run: RunFolder) -> None:
    assert run.table("detections", "whole").schema.field("mask").type == pa.large_binary()


def test_nothing_is_left_on_the_disk_by_a_reader_that_stops_early(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr("scalenet_ray.runs.results._MOST_IN_MEMORY", 5)
    images = image_results(run, "whole")
    assert next(images).image_id == 1
    assert list((tmp_path / "scratch").iterdir())
    images.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not list((tmp_path / "scratch").iterdir())
