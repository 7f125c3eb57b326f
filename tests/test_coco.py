"""COCO annotation files and image lists, and AP against pycocotools."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from scalenet_ray.core.detections import Detections
from scalenet_ray.data.categories import map_categories, unknown_categories
from scalenet_ray.data.coco import CocoDataset, objects_of, parse_annotations, read_annotations, safe_file_name
from scalenet_ray.data.formats import to_results, write_results
from scalenet_ray.data.image_records import ImageRecord
from scalenet_ray.data.listings import find_images
from scalenet_ray.data.storage import read_bytes, write_bytes_atomic
from scalenet_ray.evaluation.ap import METRICS, evaluate


def document() -> dict[str, Any]:
    """Two images; a small cat and a large dog in the first, nothing in the second. Ids start at 0, which is allowed."""
    return {
        "images": [
            {"id": 7, "file_name": "b.jpg", "height": 200, "width": 300},
            {"id": 0, "file_name": "a.jpg", "height": 64, "width": 64},
        ],
        "annotations": [
            {"id": 0, "image_id": 7, "category_id": 3, "bbox": [10, 20, 8, 6], "area": 40, "iscrowd": 0},
            {"id": 5, "image_id": 7, "category_id": 1, "bbox": [50.5, 40, 120, 100.25], "iscrowd": 0},
        ],
        "categories": [{"id": 1, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def changed(section: str, index: int, **values: object) -> dict[str, Any]:
    parsed = document()
    parsed[section][index].update(values)
    return parsed


def truth_as_results(dataset: CocoDataset) -> Iterator[dict[str, Any]]:
    """The ground truth as a detector that is always right would report it."""
    for record in dataset.images:
        found = objects_of(dataset, record.image_id)
        scores = np.ones(len(found.boxes))
        yield from to_results(record.image_id, Detections(found.boxes, scores, found.labels))


# --- annotations in ---------------------------------------------------------------------------------


def test_annotations_are_read_from_anywhere(tmp_path: Path, s3_bucket: str):
    for folder in (str(tmp_path), s3_bucket):
        write_bytes_atomic(f"{folder}/instances.json", json.dumps(document()).encode())
        records = list(read_annotations(f"{folder}/instances.json").images)
        assert records == [ImageRecord(0, "a.jpg", 64, 64), ImageRecord(7, "b.jpg", 200, 300)]


def test_objects_come_as_corners_with_their_areas():
    found = objects_of(parse_annotations(document()), 7)
    assert found.boxes.tolist() == [[10, 20, 18, 26], [50.5, 40, 170.5, 140.25]]
    assert found.areas.tolist() == [40, 120 * 100.25]
    assert found.labels.tolist() == [3, 1]
    assert found.crowd.tolist() == [False, False]


def test_an_image_without_annotations_has_no_objects():
    found = objects_of(parse_annotations(document()), 0)
    assert found.boxes.shape == (0, 4)
    assert found.boxes.dtype == np.float32
    assert len(found.areas) == len(found.labels) == len(found.crowd) == len(found.segmentations) == 0


def test_crowds_and_segmentations_are_kept():
    polygon = [[10, 20, 18, 20, 18, 26]]
    dataset = parse_annotations(changed("annotations", 0, iscrowd=1, segmentation=polygon))
    assert objects_of(dataset, 7).crowd.tolist() == [True, False]
    assert objects_of(dataset, 7).segmentations == (polygon, None)


def test_a_size_that_nobody_said_is_unknown():
    parsed = document()
    del parsed["images"][1]["height"]
    assert [record.hw for record in parse_annotations(parsed).images] == [None, (200, 300)]


@pytest.mark.parametrize("missing", [True, False])
def test_an_object_whose_iscrowd_nobody_said_is_no_crowd(missing: bool):
    parsed = changed("annotations", 0, iscrowd=None)
    if missing:
        del parsed["annotations"][0]["iscrowd"]
    assert parse_annotations(parsed).crowd.tolist() == [False, False]


# Each kind of damage is in tests/bad_files.py.
@pytest.mark.parametrize(
    "damaged", [[[10, 20, 18, 26]], {"size": [200, 300], "counts": [1, 2, 3]}, "rubbish", "", 0, {}]
)
def test_an_object_with_a_damaged_mask_is_counted_by_its_box_and_named(damaged: Any):
    dataset = parse_annotations(changed("annotations", 0, segmentation=damaged))
    assert dataset.segmentations == (None, None)
    assert dataset.remarks == ("annotations with a segmentation that is no mask: 1, counted by their boxes (id 0)",)
    rows = [masked(row) for row in truth_as_results(dataset)]
    without = parse_annotations(document())
    for iou_type in ("bbox", "segm"):
        np.testing.assert_equal(evaluate(dataset, rows, iou_type=iou_type), evaluate(without, rows, iou_type=iou_type))


def masked(row: dict[str, Any]) -> dict[str, Any]:
    """A result with the mask of its box, on an image of 200 x 300."""
    x, y, width, height = row["bbox"]
    mask = np.zeros((200, 300), np.uint8, order="F")
    mask[round(y) : round(y + height), round(x) : round(x + width)] = 1
    return {**row, "segmentation": {"size": [200, 300], "counts": coco_mask.encode(mask)["counts"].decode()}}


@pytest.mark.parametrize("nothing", [None, []])
def test_no_segmentation_is_no_damage(nothing: Any):
    dataset = parse_annotations(changed("annotations", 0, segmentation=nothing))
    assert dataset.segmentations == (None, None)
    assert dataset.remarks == ()


@pytest.mark.parametrize("far", [3e8, 1e300, -3e8, 10**15])
def test_a_polygon_far_outside_is_cut_to_the_images_surroundings(far: float):
    dataset = parse_annotations(changed("annotations", 0, segmentation=[[10, 20, far, 20, 18, 26]]))
    (points,) = dataset.segmentations[0]
    assert max(map(abs, points)) <= 2 * 300
    assert dataset.remarks == ()
    rows = [masked(row) for row in truth_as_results(dataset)]
    assert evaluate(dataset, rows, iou_type="segm")["AP_large"] == pytest.approx(100)


def test_a_crowds_run_lengths_stay_as_they_are():
    crowd = {"size": [200, 300], "counts": [100, 20, 59880]}
    dataset = parse_annotations(changed("annotations", 0, segmentation=crowd, iscrowd=1))
    assert dataset.segmentations[0] == crowd
    assert dataset.remarks == ()


def test_masks_of_an_image_whose_size_nobody_said_are_measured_at_the_size_of_its_results():
    parsed = changed("annotations", 0, segmentation=[[10, 20, 18, 20, 18, 26, 10, 26]])
    rows = [masked(row) for row in truth_as_results(parse_annotations(parsed))]
    wanted = evaluate(parsed, rows, iou_type="segm")
    del parsed["images"][0]["height"], parsed["images"][1]["width"]
    np.testing.assert_equal(evaluate(parsed, rows, iou_type="segm"), wanted)
    nothing_found = evaluate(parsed, [], iou_type="segm")
    assert (nothing_found["AP"], nothing_found["AR_100"]) == (0, 0)


def test_masks_of_an_image_that_was_not_read_are_not_made():
    # Of this annotated size they would take gigabytes.
    parsed = changed("images", 0, height=10**9, width=10**9)
    parsed["annotations"][0]["segmentation"] = [[0, 0, 2e9, 0, 2e9, 2e9, 0, 2e9]]
    assert evaluate(parsed, [], iou_type="segm")["AP"] == 0


def test_masks_are_measured_as_pycocotools_measures_them():
    rng = np.random.default_rng(0)
    parsed = document()
    parsed["annotations"], rows = [], []
    for i in range(40):
        x, y, side = rng.uniform(0, 150), rng.uniform(0, 100), rng.uniform(10, 100)
        polygon = [x, y, x + side, y + 3, x + side - 2, y + side, x - 5, y + side / 2]
        crowd = i % 10 == 0
        runs: Any = coco_mask.frPyObjects([polygon], 200, 300)[0]
        plain = {"size": runs["size"], "counts": runs["counts"].decode()}
        parsed["annotations"].append(
            {
                **{"id": i + 1, "image_id": 7, "category_id": 1 + 2 * (i % 2), "bbox": [x, y, side, side]},
                **{"iscrowd": int(crowd), "area": side * side, "segmentation": plain if crowd else [polygon]},
            }
        )
        moved: Any = coco_mask.frPyObjects([(np.array(polygon) + rng.normal(0, 4, 8)).tolist()], 200, 300)[0]
        found = {"size": moved["size"], "counts": moved["counts"].decode()}
        row = {"image_id": 7, "category_id": 1 + 2 * (i % 2), "bbox": [x, y, side, side], "segmentation": found}
        rows.append({**row, "score": float(rng.uniform())})
    truth = COCO()
    truth.dataset = copy.deepcopy(parsed)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        # With boxes, pycocotools takes their area for the masks'.
        masks_alone = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
        wanted = COCOeval(truth, truth.loadRes(masks_alone), "segm")
        wanted.evaluate()
        wanted.accumulate()
        wanted.summarize()
    measured = [value / 100 for value in evaluate(parsed, rows, iou_type="segm").values()]
    np.testing.assert_array_almost_equal(measured, np.where(wanted.stats < 0, np.nan, wanted.stats), decimal=12)


def test_only_the_first_few_of_many_errors_are_listed():
    parsed = document()
    parsed["annotations"] = [{**parsed["annotations"][0], "id": i, "image_id": 99} for i in range(1000)]
    with pytest.raises(ValueError, match="got an unknown one in 0, 1, 2, 3, 4 and 995 more: remove it"):
        parse_annotations(parsed)


@pytest.mark.parametrize("name", ["a.jpg", "sub/a.jpg", "..a.jpg", "a..b/c.jpg", "ä b.jpg"])
def test_a_name_inside_its_folder_is_safe(name: str):
    assert safe_file_name(name) == name


def test_real_annotations_parse(real_data: Path):
    dataset = read_annotations(real_data / "coco/annotations/instances_val2017.json")
    assert (len(dataset.images), len(dataset.areas), len(dataset.categories)) == (103, 897, 80)
    assert sum(len(objects_of(dataset, record.image_id).boxes) for record in dataset.images) == 897


# --- images without annotations ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for name in ("b.jpg", "a.PNG", "sub/c.webp", "notes.txt"):
        write_bytes_atomic(tmp_path / "in" / name, b"")
    return str(tmp_path / "in")


def test_a_folder_s_images_are_numbered_in_order(folder: str):
    wanted = [(1, "a.PNG", None), (2, "b.jpg", None), (3, "sub/c.webp", None)]
    assert [(r.image_id, r.file_name.removeprefix(f"{folder}/"), r.hw) for r in find_images(folder).records] == wanted


def test_a_glob_and_an_s3_prefix_list_images(folder: str, s3_bucket: str):
    write_bytes_atomic(f"{s3_bucket}/in/x.jpg", b"")
    assert [record.file_name for record in find_images(f"{folder}/*.jpg").records] == [f"{folder}/b.jpg"]
    assert list(find_images(f"{s3_bucket}/in/").records) == [ImageRecord(1, f"{s3_bucket}/in/x.jpg")]


@pytest.mark.parametrize("column", ["uri", "path"])
def test_a_parquet_file_lists_images(folder: str, column: str, monkeypatch: pytest.MonkeyPatch):
    names = ["z.jpg", "s3://bucket/a.jpg", "/data/b.jpg"]
    pq.write_table(pa.table({"other": [1, 2, 3], column: names}), f"{folder}/list.parquet")
    wanted = ["/data/b.jpg", f"{folder}/z.jpg", "s3://bucket/a.jpg"]
    assert [record.file_name for record in find_images(f"{folder}/list.parquet").records] == sorted(wanted)
    monkeypatch.chdir(folder)
    assert [record.file_name for record in find_images("list.parquet").records] == sorted(wanted)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"file": ["a.jpg"]}, "must have a column uri or path, got file: rename it"),
        ({"uri": ["a.jpg", None]}, "must hold an address in each row, got none in rows 1: fill it"),
        ({"uri": [1, 2]}, "must hold an address in each row, got none in rows 0, 1: fill it"),
        ({"uri": ["a.jpg", "a.jpg"]}, "must name each image once, got twice a.jpg: remove"),
        ({"uri": pa.array([], pa.string())}, "must hold at least one image"),
    ],
)
def test_a_parquet_file_without_addresses_is_refused(tmp_path: Path, table: dict, message: str):
    pq.write_table(pa.table(table), tmp_path / "list.parquet")
    with pytest.raises(ValueError, match=message):
        find_images(tmp_path / "list.parquet")


@pytest.mark.parametrize("name", ["list.parquet", "list"])
def test_a_folder_of_parquet_files_lists_images(tmp_path: Path, name: str, s3_bucket: str):
    for base in (str(tmp_path), s3_bucket):
        for part, addresses in enumerate((["/data/b.jpg", "x.jpg"], ["s3://bucket/a.jpg"])):
            sink = pa.BufferOutputStream()
            pq.write_table(pa.table({"uri": addresses}), sink)
            write_bytes_atomic(f"{base}/{name}/part-{part}.parquet", sink.getvalue().to_pybytes())
        write_bytes_atomic(f"{base}/{name}/_SUCCESS", b"")
        wanted = sorted(["/data/b.jpg", f"{base}/{name}/x.jpg", "s3://bucket/a.jpg"])
        assert [record.file_name for record in find_images(f"{base}/{name}").records] == wanted
        assert [record.file_name for record in find_images(f"{base}/{name}/").records] == wanted
        assert [record.file_name for record in find_images(f"{base}/{name}/*.parquet").records] == wanted


def test_parts_of_a_list_that_name_an_image_twice_are_refused(tmp_path: Path):
    (tmp_path / "list").mkdir()
    for part in range(2):
        pq.write_table(pa.table({"path": ["/data/a.jpg"]}), tmp_path / "list" / f"{part}.parquet")
    with pytest.raises(ValueError, match=r"list must name each image once, got twice /data/a.jpg: remove"):
        find_images(tmp_path / "list")


def test_pictures_and_videos_that_are_not_read_are_counted(tmp_path: Path):
    for name in ("a.jpg", "b.avif", "sub/c.AVIF", "d.mp4", "notes.txt", "list.parquet"):
        write_bytes_atomic(tmp_path / "mixed" / name, b"")
    found = find_images(tmp_path / "mixed")
    assert [record.file_name for record in found.records] == [str(tmp_path / "mixed" / "a.jpg")]
    assert found.remarks == ("2 files skipped: .avif is not read", "1 files skipped: .mp4 is not read beside images")


def test_pictures_of_runs_are_not_images(tmp_path: Path):
    run = ("run/config.yaml", "run/inputs.parquet", "run/pictures/1-a.jpg")
    for name in (*run, "a.jpg", "running/config.yaml", "running/b.jpg"):
        write_bytes_atomic(tmp_path / name, b"")
    found = find_images(tmp_path)
    assert found.records.files.to_pylist() == [f"{tmp_path}/a.jpg", f"{tmp_path}/running/b.jpg"]
    assert found.remarks == (f"pictures of 1 run folders are not listed: {tmp_path}/run",)
    assert len(find_images(tmp_path / "run" / "pictures").records) == 1
    write_bytes_atomic(tmp_path / "run" / "c.jpg", b"")
    assert find_images(tmp_path / "run").records.files.to_pylist() == [f"{tmp_path}/run/c.jpg"]


def test_a_link_to_a_folder_is_named(tmp_path: Path):
    write_bytes_atomic(tmp_path / "photos" / "a.jpg", b"")
    write_bytes_atomic(tmp_path / "in" / "sub" / "b.jpg", b"")
    (tmp_path / "in" / "sub" / "more").symlink_to(tmp_path / "photos")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "photos").symlink_to(tmp_path / "photos")
    assert find_images(tmp_path / "in").remarks == (
        f"1 links to folders are not followed: {tmp_path / 'in' / 'sub' / 'more'}",
    )
    with pytest.raises(ValueError, match=r"got none; 1 links to folders .*links/photos: name that folder"):
        find_images(tmp_path / "links")
    assert len(find_images(tmp_path / "links" / "photos").records) == 1


def test_a_folder_of_what_is_not_read_says_what_to_do(tmp_path: Path):
    write_bytes_atomic(tmp_path / "in" / "photo.heic", b"")
    for place in (tmp_path / "in", tmp_path / "in" / "photo.heic"):
        with pytest.raises(ValueError, match=r"got none; 1 files skipped: \.heic is not read: convert them"):
            find_images(place)


def test_a_parquet_file_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "list.parquet").write_bytes(b"a,b,c")
    with pytest.raises(ValueError, match="must be a Parquet file, got something else"):
        find_images(tmp_path / "list.parquet")


def test_no_image_at_all_is_an_error(tmp_path: Path, folder: str):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", f"{folder}/*.txt"):
        with pytest.raises(ValueError, match=r"must hold at least one image \(.bmp, .*\), got none: check the path"):
            find_images(place)
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        find_images(tmp_path / "missing")


# --- categories -------------------------------------------------------------------------------------


def test_classes_are_mapped_by_name_and_others_dropped():
    detector = {0: "Traffic_Light", 1: "dog", 2: "N/A", 3: "  cat "}
    assert map_categories(detector, {10: "traffic light", 4: "Cat"}) == {0: 10, 3: 4}


@pytest.mark.parametrize(
    ("detector", "dataset", "message"),
    [
        ({0: "dog"}, {1: "ship", 2: "plane"}, "got none among its dog: use a detector trained on them"),
        ({0: "dog", 1: "cat"}, {1: "dog", 2: "ship"}, "got no ship among its dog, cat: use a detector trained on them"),
        ({0: "dog"}, {1: "dog", 2: "Dog"}, "categories must differ by name, got twice dog: rename them"),
        ({}, {1: "dog"}, "must know every category"),
    ],
)
def test_categories_that_do_not_fit_are_refused(detector: dict, dataset: dict, message: str):
    with pytest.raises(ValueError, match=message):
        map_categories(detector, dataset)


def test_a_category_that_no_annotation_is_of_may_be_unknown_to_the_detector():
    detector, dataset = {0: "dog", 1: "cat"}, {0: "things", 1: "dog", 2: "cat", 3: "ship"}
    assert map_categories(detector, dataset, unused={0, 2, 3}) == {0: 1, 1: 2}
    assert unknown_categories(detector, dataset, {0, 2, 3}) == ["things", "ship"]
    with pytest.raises(ValueError, match="got no things among its dog, cat: use a detector trained on them"):
        map_categories(detector, dataset, unused={3})


@pytest.mark.parametrize("unused", [1, 2])
def test_an_unused_category_stands_behind_one_of_the_same_name(unused: int):
    assert map_categories({0: "dog"}, {1: "dog", 2: "Dog"}, unused={unused}) == {0: 3 - unused}


def test_categories_without_annotations_are_unused():
    assert parse_annotations(document()).unused_categories == frozenset()
    parsed = document()
    parsed["categories"].append({"id": 0, "name": "things"})
    assert parse_annotations(parsed).unused_categories == {0}


# --- results out ------------------------------------------------------------------------------------


def test_results_hold_sides_and_not_corners():
    found = Detections([[10.5, 20.25, 18.5, 26.25]], [0.123456789], [3])
    row = {"image_id": 7, "category_id": 3, "bbox": [10.5, 20.25, 8.0, 6.0], "score": 0.123457}
    assert to_results(7, found) == [row]
    assert to_results(7, Detections.empty()) == []


def test_result_boxes_are_within_a_hundredth_of_a_pixel():
    boxes = np.array([[1234.56789, 0.004999, 5000.1 / 3, 4321.98765]], np.float32)
    x, y, width, height = to_results(1, Detections(boxes, [1], [1]))[0]["bbox"]
    assert np.abs(np.array([x, y, x + width, y + height]) - boxes[0]).max() < 0.01
    assert len(json.dumps(x)) <= len("1234.568")


def test_masks_are_pasted_into_the_whole_image():
    inside = np.zeros((4, 6), np.uint8, order="F")
    inside[1:3, 2:5] = 1
    counts = coco_mask.encode(inside)["counts"]
    found = Detections([[12, 21, 15, 23]], [1], [3], windows=[[10, 20, 16, 24]], masks=(counts,))
    row = json.loads(json.dumps(to_results(7, found, (40, 30))[0]))
    assert row["segmentation"]["size"] == [40, 30]
    mask = coco_mask.decode(row["segmentation"])
    assert mask.sum() == 6
    assert mask[21:23, 12:15].all()
    with pytest.raises(ValueError, match="masks of image 7 need the image's size, got none: give image_hw"):
        to_results(7, found)


def test_results_are_written_as_they_come(tmp_path: Path, s3_bucket: str):
    rows = [{"image_id": i, "bbox": [0.5, 1, 2, 3]} for i in range(5)]
    for place in (str(tmp_path), s3_bucket):
        for count in (0, 1, 5):
            assert write_results(f"{place}/run/results.json", iter(rows[:count])) == count
            assert json.loads(read_bytes(f"{place}/run/results.json")) == rows[:count]


def test_a_row_that_fails_leaves_the_old_results(tmp_path: Path):
    write_results(tmp_path / "results.json", [{"score": 1}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(tmp_path / "results.json", [{"score": 1}, {"score": math.nan}])
    assert json.loads((tmp_path / "results.json").read_bytes()) == [{"score": 1}]


# --- AP and AR --------------------------------------------------------------------------------------


def test_the_ground_truth_is_found_in_full():
    dataset = parse_annotations(document())
    measured = evaluate(dataset, truth_as_results(dataset))
    assert tuple(measured) == METRICS
    assert [measured[name] for name in METRICS if "medium" not in name] == pytest.approx([100] * 10)


def test_a_size_that_no_object_has_is_not_a_number():
    measured = evaluate(document(), [])
    assert math.isnan(measured["AP_medium"])
    assert math.isnan(measured["AR_medium"])


def test_no_results_at_all_are_zero():
    measured = evaluate(document(), [])
    assert [measured[name] for name in METRICS if "medium" not in name] == [0] * 10


def test_nothing_is_printed_and_nothing_given_is_changed(capsys: pytest.CaptureFixture[str]):
    parsed, results = document(), list(truth_as_results(parse_annotations(document())))
    before = copy.deepcopy((parsed, results))
    evaluate(parsed, results)
    assert (parsed, results) == before
    assert capsys.readouterr() == ("", "")


def test_objects_of_failed_images_count_as_missed():
    parsed = document()
    parsed["annotations"].append({**parsed["annotations"][0], "id": 9, "image_id": 0})
    dataset = parse_annotations(parsed)
    found = [row for row in truth_as_results(dataset) if row["image_id"] == 7]
    assert evaluate(dataset, found)["AR_small"] == pytest.approx(50)
    assert evaluate(dataset, found, image_ids=[7])["AR_small"] == pytest.approx(100)
    assert evaluate(dataset, found, image_ids=[0])["AR_small"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 8}, "must be of the annotations' images and categories, got image 8: use the same data set"),
        ({"category_id": 2}, "must be of the annotations' images and categories, got category 2"),
    ],
)
def test_results_of_another_data_set_are_refused(change: dict, message: str):
    row = {"image_id": 7, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1.0}
    with pytest.raises(ValueError, match=message):
        evaluate(document(), [{**row, **change}])


def test_unknown_images_cannot_be_chosen():
    with pytest.raises(ValueError, match=r"image_ids must be of the annotations' images, got \[8\]: leave them out"):
        evaluate(document(), [], image_ids=[7, 8])


def test_masks_are_measured_by_their_own_area():
    # A diagonal line: its box is large, the object is small, and where it's missed decides which AP suffers.
    line = np.eye(200, 300, dtype=np.uint8, order="F")
    rle = coco_mask.encode(line)
    segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    parsed = changed("annotations", 1, segmentation=segmentation, area=200, bbox=[0, 0, 200, 200])
    parsed["annotations"] = parsed["annotations"][1:]
    row = {"image_id": 7, "category_id": 1, "bbox": [0, 0, 200, 200], "segmentation": segmentation}
    stray = {"size": [200, 300], "counts": coco_mask.encode(np.asfortranarray(line[::-1]))["counts"].decode()}
    found = [{**row, "score": 0.9, "segmentation": stray}, {**row, "score": 0.5}]
    measured = evaluate(parsed, found, iou_type="segm")
    assert measured["AP_small"] == pytest.approx(50)
    assert math.isnan(measured["AP_large"])


def test_segm_says_what_it_lacks():
    row = {"image_id": 7, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1.0}
    with pytest.raises(ValueError, match="segm needs a segmentation in each result, got none in image 7: evaluate"):
        evaluate(document(), [row], iou_type="segm")


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_real_ground_truth_has_an_ap_of_100(real_data: Path, iou_type: Any):
    dataset = read_annotations(real_data / "coco/annotations/instances_val2017.json")
    results = list(truth_as_results(dataset))
    if iou_type == "segm":
        sizes = {record.image_id: (record.height, record.width) for record in dataset.images}
        order = np.concatenate([dataset.rows_by_image.get(i, np.zeros(0, int)) for i in sizes])
        for row, at in zip(results, order.tolist(), strict=True):
            row["segmentation"] = whole_mask(dataset.segmentations[at], sizes[row["image_id"]])
    measured = evaluate(dataset, results, iou_type=iou_type)
    assert measured["AP"] == pytest.approx(100, abs=0.01)
    assert measured["AP_small"] == pytest.approx(100, abs=0.01)


def whole_mask(segmentation: Any, hw: tuple[int, int]) -> dict:
    """Polygons or run lengths as an annotation has them -> one compressed run length."""
    encode: Callable = coco_mask.frPyObjects
    parts = encode(segmentation, *hw)
    return coco_mask.merge(parts) if isinstance(segmentation, list) else parts


def test_what_can_not_be_measured_is_said() -> None:
    document: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.png", "height": 50, "width": 100}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [],
    }
    assert parse_annotations(document).remarks == (
        "no annotation is of an object that counts (crowds do not): there is no AP to measure",
    )
    twice = [document["images"][0], {**document["images"][0], "id": 2}]
    assert parse_annotations(document | {"images": twice}).remarks[0] == (
        "files listed as several images, which count as often: 1 (a.png)"
    )
    boxes = [[10, 10, 20, 20], [500, 10, 5, 5], [10, 10, 0, 5]]
    rows = [{"id": i, "image_id": 1, "category_id": 1, "bbox": box} for i, box in enumerate(boxes, start=1)]
    assert parse_annotations(document | {"annotations": rows}).remarks == (
        "annotations whose box has no area in its image: 2, never found (id 2, 3)",
    )
