"""Data sets in the layouts of YOLO, VOC and VisDrone, read into COCO's form."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from scalenet_ray.core.errors import UserError
from scalenet_ray.data import storage
from scalenet_ray.data.coco import CocoDataset, parse_annotations, read_annotations
from scalenet_ray.data.datasets import find_layout
from scalenet_ray.models.spec import SAMPLE_DETECTOR
from scalenet_ray.runs.export import export_run
from scalenet_ray.sample.scenes import write_sample
from scalenet_ray.training.examples import TrainingImages, read_tile, whole_image
from tests.job_scripts import run_command

NAMES = ["kite", "person"]
BOXES = {"a": [(0, (10, 20, 30, 40)), (1, (0, 0, 16, 8))], "sub/b": [(1, (4, 4, 8, 8))], "empty": []}
"""Image -> (class, x, y, width, height in pixels) of its objects; the images have 100 x 200 pixels."""
HW = (100, 200)


def write_image(path: Path, hw: tuple[int, int] = HW, **settings: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*hw, 3), np.uint8)).save(path, **settings)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_yolo(folder: Path, **changed: Any) -> str:
    """A data set in YOLO's layout, split val; `empty` has no label file."""
    for name, objects in BOXES.items():
        write_image(folder / "images" / "val" / f"{name}.png")
        lines = [
            f"{label} {(x + w / 2) / HW[1]} {(y + h / 2) / HW[0]} {w / HW[1]} {h / HW[0]}\n"
            for label, (x, y, w, h) in objects
        ]
        if lines:
            write_text(folder / "labels" / "val" / f"{name}.txt", "".join(lines))
    content = {"path": ".", "val": "images/val", "nc": 2, "names": NAMES} | changed
    write_text(folder / "data.yaml", yaml.safe_dump({key: value for key, value in content.items() if value}))
    return str(folder / "data.yaml")


def voc_text(objects: list[tuple[int, tuple[int, int, int, int]]]) -> str:
    boxes = [
        f"<object><name>{NAMES[label]}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
        f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for label, (x, y, w, h) in objects
    ]
    return f"<annotation><size><width>200</width><height>100</height></size>{''.join(boxes)}</annotation>"


def write_voc(folder: Path) -> str:
    for name, objects in BOXES.items():
        write_image(folder / "JPEGImages" / f"{name}.jpg")
        if objects:
            write_text(folder / "Annotations" / f"{name}.xml", voc_text(objects))
    write_image(folder / "JPEGImages" / "of_another_split.jpg")
    write_text(folder / "ImageSets" / "Main" / "val.txt", "".join(f"{name}\n" for name in BOXES))
    return str(folder)


def write_visdrone(folder: Path) -> str:
    for name, objects in BOXES.items():
        write_image(folder / "val" / "images" / f"{name}.jpg")
        if objects:
            lines = [f"{x},{y},{w},{h},1,{label + 1},0,0\n" for label, (x, y, w, h) in objects]
            write_text(folder / "val" / "annotations" / f"{name}.txt", "".join(lines))
    return str(folder)


def found_in(dataset: CocoDataset) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    """Image -> (category name, box) of its objects."""
    files = {record.image_id: record.file_name for record in dataset.images}
    found: dict[str, list[tuple[str, tuple[float, ...]]]] = {file: [] for file in files.values()}
    for image_id, label, box in zip(dataset.image_ids, dataset.labels, dataset.boxes_xywh.round(3), strict=True):
        found[files[int(image_id)]].append((dataset.categories[int(label)], tuple(box.tolist())))
    return found


def wanted(before: str, suffix: str, names: list[str]) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    return {
        f"{before}{name}{suffix}": [(names[label], tuple(map(float, box))) for label, box in objects]
        for name, objects in BOXES.items()
    }


def test_a_yolo_data_set_is_read(tmp_path: Path):
    layout = find_layout("val", data=write_yolo(tmp_path))
    assert layout.images_of("val") == str(tmp_path)
    dataset = layout.read("val")
    assert dataset.categories == {0: "kite", 1: "person"}
    assert found_in(dataset) == wanted("images/val/", ".png", NAMES)
    assert {record.hw for record in dataset.images} == {HW}


@pytest.mark.parametrize("size", ["<size><width>200</width><height>100</height></size>", ""])
def test_a_voc_data_set_is_read_and_only_the_split_that_is_asked_for(size: str, tmp_path: Path):
    layout = find_layout("val", data=write_voc(tmp_path))
    for path in (tmp_path / "Annotations").rglob("*.xml"):
        path.write_text(re.sub("<size>.*</size>", size, path.read_text()))
    assert layout.images_of("val") == str(tmp_path / "JPEGImages")
    dataset = layout.read("val")
    assert dataset.categories == {1: "kite", 2: "person"}
    assert found_in(dataset) == wanted("", ".jpg", NAMES)
    assert {record.hw for record in dataset.images} == {HW}


def test_a_visdrone_data_set_is_read(tmp_path: Path):
    layout = find_layout("val", data=write_visdrone(tmp_path))
    dataset = layout.read("val")
    assert (dataset.categories[1], dataset.categories[10]) == ("pedestrian", "motor")
    assert found_in(dataset) == wanted("", ".jpg", ["pedestrian", "people"])
    assert {record.hw for record in dataset.images} == {HW}


def test_one_folder_of_visdrones_is_read_itself(tmp_path: Path):
    layout = find_layout("val2017", data=str(Path(write_visdrone(tmp_path)) / "val"))
    assert layout.form == "visdrone"
    assert found_in(layout.read("val2017")) == wanted("", ".jpg", ["pedestrian", "people"])


def test_all_layouts_are_read_from_a_store(tmp_path: Path, s3_bucket: str):
    for write, name in ((write_yolo, "yolo"), (write_voc, "voc"), (write_visdrone, "drone")):
        data = write(tmp_path / name)
        for path in (tmp_path / name).rglob("*.*"):
            storage.write_bytes_atomic(f"{s3_bucket}/{path.relative_to(tmp_path)}", path.read_bytes())
        there = find_layout("val", data=data.replace(str(tmp_path), s3_bucket))
        assert found_in(there.read("val")) == found_in(find_layout("val", data=data).read("val"))
        assert there.images_of("val").startswith(f"{s3_bucket}/{name}")


@pytest.mark.parametrize("form", ["voc", "visdrone"])
def test_label_files_and_images_may_lie_in_any_two_folders(tmp_path: Path, form: str):
    voc = form == "voc"
    (write_voc if voc else write_visdrone)(tmp_path)
    annotations = tmp_path / "Annotations" if voc else tmp_path / "val" / "annotations"
    images = tmp_path / "JPEGImages" if voc else tmp_path / "{split}" / "images"
    layout = find_layout("val", annotations=str(annotations), images=str(images))
    assert layout.form == form
    assert (
        found_in(layout.read("val"))["a.jpg"]
        == wanted("", ".jpg", list(layout.read("val").categories.values()))["a.jpg"]
    )


def test_an_instances_file_may_lie_anywhere(tmp_path: Path):
    document = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "kite"}],
        "annotations": [],
    }
    write_text(tmp_path / "labels" / "test.json", json.dumps(document))
    layout = find_layout("test", annotations=f"{tmp_path}/labels/{{split}}.json", images=f"{tmp_path}/{{split}}/png")
    assert layout.images_of("test") == f"{tmp_path}/test/png"
    assert layout.open("test").instances is None
    assert len(layout.open("test").images) == 1
    assert layout.tells_splits_apart
    assert not find_layout("test", annotations=f"{tmp_path}/labels/test.json", images="x").tells_splits_apart


def test_cocos_layout_is_taken_before_others(tmp_path: Path):
    write_yolo(tmp_path)
    write_text(tmp_path / "annotations" / "instances_val.json", "{}")
    assert find_layout("val", data=str(tmp_path)).form == "coco"
    assert find_layout("other", data=str(tmp_path)).form == "yolo"


def test_what_is_written_in_cocos_form_is_what_was_read(tmp_path: Path):
    layout = find_layout("val", data=write_yolo(tmp_path / "data"))
    opened = layout.open("val")
    assert opened.instances is not None
    assert found_in(parse_annotations(json.loads(opened.instances))) == found_in(layout.read("val"))
    converted = layout.in_coco_form(["val"], str(tmp_path / "run"))
    assert (converted.form, converted.images_of("val")) == ("coco", layout.images_of("val"))
    assert found_in(converted.read("val")) == found_in(layout.read("val"))


# --- YOLO's data.yaml --------------------------------------------------------------------------------


def test_splits_may_be_lists_of_folders_and_of_files(tmp_path: Path):
    write_image(tmp_path / "more" / "images" / "c.png")
    write_text(tmp_path / "lists" / "val.txt", "../images/val/a.png\n\n../more/images/c.png\n")
    uri = write_yolo(tmp_path, val=["images/val/sub", "lists/val.txt"])
    found = found_in(find_layout("val", data=uri).read("val"))
    assert sorted(found) == ["images/val/a.png", "images/val/sub/b.png", "more/images/c.png"]
    assert len(found["images/val/a.png"]) == 2


def test_a_split_that_counts_from_a_folder_that_is_not_there_is_found(tmp_path: Path):
    uri = write_yolo(tmp_path, path=None, val="../images/val", names={0: "kite", 1: "person"})
    dataset = find_layout("val", data=uri).read("val")
    assert len(dataset.images) == 3
    assert dataset.categories == {0: "kite", 1: "person"}


def test_labels_may_lie_beside_the_images(tmp_path: Path):
    write_image(tmp_path / "pictures" / "a.png")
    write_text(tmp_path / "pictures" / "a.txt", "1 0.5 0.5 0.1 0.1")
    uri = write_yolo(tmp_path, val="pictures")
    assert len(find_layout("val", data=uri).read("val").labels) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"names": None}, r"data.yaml must have names, .*got None: name each, 'no' in quotes"),
        # As YAML reads an unquoted no, and null.
        ({"names": ["yes", False]}, r"data.yaml must have names, .*False\]: name each, 'no' in quotes"),
        ({"names": ["kite", None]}, r"data.yaml must have names, .*None\]: name each"),
        ({"names": {0: "kite", 7: "person"}}, "must have names"),
        ({"nc": 3}, "as many names as nc says, got 2 names and nc: 3"),
        ({"val": None, "test": "images/val"}, r"must name split val, got test: give --split NAME"),
        ({"val": "/photographs/val"}, "cannot list /photographs/val: there is no such file or folder"),
        ({"path": "images/val/sub", "val": "../a.png"}, "the images must lie in .*/sub/, got .*a.png"),
    ],
)
def test_a_bad_data_yaml_is_named(tmp_path: Path, changed: dict[str, Any], message: str):
    uri = write_yolo(tmp_path, **changed)
    with pytest.raises((UserError, FileNotFoundError), match=message):
        find_layout("val", data=uri).read("val")


def test_a_bad_label_is_named_with_file_and_line(tmp_path: Path):
    uri = write_yolo(tmp_path)
    write_text(tmp_path / "labels" / "val" / "a.txt", "0 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1 0.1 0.9\n")
    with pytest.raises(UserError, match=rf"{tmp_path}/labels/val/a\.txt line 2 must have 5 columns .* got 6"):
        find_layout("val", data=uri).read("val")


def test_two_images_with_one_label_file_are_refused(tmp_path: Path):
    uri = write_yolo(tmp_path)
    write_image(tmp_path / "images" / "val" / "a.jpg")
    with pytest.raises(UserError, match=r"a label file of its own, got the same for images/val/a.jpg, .*a.png"):
        find_layout("val", data=uri).read("val")


def test_an_image_that_a_split_lists_twice_is_refused(tmp_path: Path):
    uri = write_yolo(tmp_path / "y", val=["images/val", "images/val"])
    with pytest.raises(UserError, match=r"must be listed once, got the same for images/val/a.png, images/val/a.png"):
        find_layout("val", data=uri).read("val")
    data = write_voc(tmp_path / "v")
    write_text(tmp_path / "v" / "ImageSets" / "Main" / "val.txt", "a\nsub/b\na\n")
    with pytest.raises(UserError, match="split val must list each image once, got a twice: remove it"):
        find_layout("val", data=data).read("val")


# --- images ------------------------------------------------------------------------------------------


def test_images_without_a_label_file_have_no_objects_and_are_counted(tmp_path: Path):
    for data in (write_yolo(tmp_path / "y"), write_voc(tmp_path / "v"), write_visdrone(tmp_path / "d")):
        listing = find_layout("val", data=data).open("val")
        assert len(listing.images) == 3
        assert "images without a label file, which have no objects: 1" in listing.remarks


def test_labels_in_another_place_are_not_taken_for_images_without_objects(tmp_path: Path):
    uri = write_yolo(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "annotations")
    with pytest.raises(UserError, match=r"split val of .* must have label files, got none for its 3 images"):
        find_layout("val", data=uri).read("val")


def test_a_bad_image_costs_itself_alone(tmp_path: Path):
    uri = write_yolo(tmp_path)
    (tmp_path / "images" / "val" / "a.png").write_bytes(b"no image")
    listing = find_layout("val", data=uri).open("val")
    assert [record.hw for record in listing.images] == [None, HW, HW]
    assert "images that cannot be read: 1" in listing.remarks
    assert len(find_layout("val", data=uri).read("val").labels) == 1


def test_yolos_boxes_are_relative_to_the_image_as_it_is_looked_at(tmp_path: Path):
    uri = write_yolo(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6
    write_image(tmp_path / "images" / "val" / "a.png", exif=turned)
    dataset = find_layout("val", data=uri).read("val")
    assert dataset.images[0].hw == (200, 100)
    assert found_in(dataset)["images/val/a.png"][0][1] == (5.0, 40.0, 15.0, 80.0)


def test_names_that_voc_lists_may_have_spaces_and_numbers_behind_them(tmp_path: Path):
    data = write_voc(tmp_path)
    (tmp_path / "JPEGImages" / "a.jpg").rename(tmp_path / "JPEGImages" / "a b.jpg")
    write_text(tmp_path / "ImageSets" / "Main" / "val.txt", "a b\nsub/b  -1\n")
    assert find_layout("val", data=data).read("val").images.files.to_pylist() == ["a b.jpg", "sub/b.jpg"]


def test_an_image_that_a_split_lists_and_does_not_have_is_named(tmp_path: Path):
    data = write_voc(tmp_path)
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(UserError, match="must have the images of split val, got no a: correct the list"):
        find_layout("val", data=data).read("val")


def test_a_split_that_voc_does_not_list_is_named_with_those_it_lists(tmp_path: Path):
    data = write_voc(tmp_path)
    with pytest.raises(UserError, match="Main must list split test, got val: give --split NAME"):
        find_layout("test", data=data).read("test")


def test_a_category_of_voc_has_one_id_in_all_splits(tmp_path: Path):
    data = write_voc(tmp_path)
    write_text(tmp_path / "ImageSets" / "Main" / "train.txt", "sub/b\n")
    layout = find_layout("train", data=data)
    assert layout.read("train").categories == layout.read("val").categories


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "a data set is --data DIR, or --annotations FILE with --images FOLDER, got none"),
        ({"annotations": "a.json"}, "got --annotations a.json: give one"),
        ({"data": "d", "images": "i"}, "got --data d, --images i: give one"),
    ],
)
def test_half_a_data_set_is_refused(given: dict[str, str], message: str):
    with pytest.raises(UserError, match=message):
        find_layout("val", **given)


def test_a_folder_without_label_files_is_refused(tmp_path: Path):
    write_text(tmp_path / "notes.md", "")
    with pytest.raises(UserError, match=r"must be an instances file .* got neither"):
        find_layout("val", annotations=str(tmp_path), images=str(tmp_path))


# --- in runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("data") / "sample", train=3, val=4)


def sample_as_yolo(sample: Path, folder: Path) -> str:
    """The embedded sample in YOLO's layout, its splits as train and val."""
    document: dict[str, Any] = {}
    for split in ("train", "val"):
        document = json.loads((sample / f"annotations/instances_{split}2017.json").read_text())
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "images" / split).symlink_to(sample / f"{split}2017")
        places = {row["id"]: i for i, row in enumerate(document["categories"])}
        for image in document["images"]:
            lines = []
            for row in document["annotations"]:
                if row["image_id"] == image["id"]:
                    (x, y, w, h), (height, width) = row["bbox"], (image["height"], image["width"])
                    shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                    lines.append(" ".join(map(str, (places[row["category_id"]], *shares))))
            write_text(folder / "labels" / split / f"{Path(image['file_name']).stem}.txt", "\n".join(lines))
    names = [row["name"] for row in document["categories"]]
    write_text(folder / "data.yaml", yaml.safe_dump({"train": "images/train", "val": "images/val", "names": names}))
    return str(folder / "data.yaml")


def evaluate(output: Path, *flags: str) -> int:
    common = ("--policies", "whole", "oracle", "--detector", SAMPLE_DETECTOR, "--engine", "local")
    return run_command("eval", *flags, *common, "--report-pictures", "1", "--output", str(output))


def test_an_evaluation_of_yolos_layout_measures_what_cocos_does(sample: Path, tmp_path: Path) -> None:
    data = sample_as_yolo(sample, tmp_path / "yolo")
    assert evaluate(tmp_path / "coco-run", "--data", str(sample)) == 0
    assert evaluate(tmp_path / "yolo-run", "--data", data, "--split", "val") == 0
    one, other = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("coco-run", "yolo-run"))
    assert one["policies"]["whole"]["AP"] > 5
    # Areas are those of boxes, not of masks: figures by size differ, and windows of the oracle.
    for figure in ("AP", "AP50", "AP_small"):
        assert other["policies"]["whole"][figure] == pytest.approx(one["policies"]["whole"][figure], abs=1e-3)
    # The run folder has its ground truth, and goes on only with the same.
    assert len(read_annotations(tmp_path / "yolo-run" / "ground_truth.json").images) == 4
    assert evaluate(tmp_path / "yolo-run", "--data", data, "--split", "val", "--resume") == 0
    truth = (tmp_path / "yolo-run" / "ground_truth.json").read_bytes()
    label = next((tmp_path / "yolo" / "labels" / "val").glob("*.txt"))
    label.write_text(label.read_text().partition("\n")[2])
    assert evaluate(tmp_path / "yolo-run", "--data", data, "--split", "val", "--resume") == 2
    assert (tmp_path / "yolo-run" / "ground_truth.json").read_bytes() == truth
    exported = export_run(str(tmp_path / "yolo-run"), "coco")
    assert read_annotations(exported.uri).images[0].file_name.startswith("images/val/")


def test_an_instances_file_and_a_folder_of_images_are_a_data_set(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ("--annotations", f"{sample}/annotations/instances_{{split}}.json", "--images", f"{sample}/{{split}}")
    assert evaluate(tmp_path / "run", *parts) == 0
    assert evaluate(tmp_path / "other", *parts[:2]) == 2
    assert "a data set is --data DIR, or --annotations FILE with --images FOLDER" in capsys.readouterr().err
    assert run_command("check", *parts, "--detector", SAMPLE_DETECTOR, "--policies", "whole") == 0
    assert "4 images, 10 categories" in capsys.readouterr().out


def test_training_images_are_the_same_in_either_layout(sample: Path, tmp_path: Path) -> None:
    data = sample_as_yolo(sample, tmp_path / "yolo")
    images = TrainingImages(data, "train", "val").in_coco_form(str(tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run" / "annotations").iterdir()) == [
        "instances_train.json",
        "instances_val.json",
    ]
    for mine, theirs in zip(images.examples(), TrainingImages(str(sample)).examples(), strict=True):
        assert [example.hw for example in mine] == [example.hw for example in theirs]
        for example, other in zip(mine, theirs, strict=True):
            assert np.array_equal(*(read_tile(one, 64, whole_image)[1] for one in (example, other)))
            assert np.allclose(example.objects.boxes, other.objects.boxes, atol=1e-3)
    assert TrainingImages(str(sample)).in_coco_form(str(tmp_path / "none")) == TrainingImages(str(sample))
    assert not (tmp_path / "none").exists()


def test_one_file_of_annotations_is_not_both_splits(sample: Path) -> None:
    annotations, images = f"{sample}/annotations/instances_train2017.json", f"{sample}/train2017"
    with pytest.raises(UserError, match=r"hold out a share with --holdout 0.1, or write \{split\}"):
        TrainingImages(None, annotations=annotations, images=images).examples()
    held = TrainingImages(None, holdout=0.34, annotations=annotations, images=images)
    assert [len(part) for part in held.examples()] == [2, 1]
