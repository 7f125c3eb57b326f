"""A run's detections in other tools' formats."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO

from scalenet_ray.core.detections import Detections, Failure, ImageResult
from scalenet_ray.data.coco import read_annotations
from scalenet_ray.data.datasets import find_layout
from scalenet_ray.data.image_records import ImageRecords
from scalenet_ray.runs.batch import ShardWriter
from scalenet_ray.runs.export import EXPORT_FORMATS, export_run
from scalenet_ray.runs.folder import RunFolder
from tests.job_scripts import run_command

# Ids with gaps, as COCO's have: positions and ids must not be mixed up.
NAMES = {3: "kite", 7: "person", 90: "tooth brush"}
BOXES = np.array([[10, 20, 40, 80], [0, 0, 100, 50], [5, 5, 6.5, 9]])
FILES = ("/photos/a/one.jpg", "/photos/b/two.jpg", "/photos/b/broken.jpg", "/photos/empty.jpg")


def finished(image_id: int, boxes: np.ndarray, labels: Sequence[int], *, failed: bool = False) -> ImageResult:
    found = Detections(boxes, np.linspace(0.9, 0.2, len(boxes)), labels)
    failure = Failure("read", "no image") if failed else None
    return ImageResult(image_id, found, failure, 1, 0, 0, 1.0, {}, None if failed else (100, 200))


def write_run(folder: Path, files: Sequence[str] = FILES, policies: Sequence[str] = ("whole", "grid-2")) -> str:
    run = RunFolder(str(folder))
    with run.begin({"images": "/photos", "policies": [{"name": name} for name in policies]}, resume=False):
        pass
    records = ImageRecords.listed(files)
    none = np.zeros((0, 4))
    for policy in policies:
        writer = ShardWriter(run, policy, records, lambda ids: None)
        writer.add(finished(1, BOXES, [90, 3, 7]), 1.5)
        writer.add(finished(2, BOXES[:1], [7]), 1.5)
        writer.add(finished(3, none, [], failed=True), 1.5)
        writer.add(finished(4, none, []), 1.5)
        writer.flush()
    run.write_json("metrics.json", {"categories": NAMES})
    return run.uri


@pytest.fixture
def run(tmp_path: Path) -> str:
    return write_run(tmp_path / "run")


@pytest.mark.parametrize("to", EXPORT_FORMATS)
def test_every_format_says_how_much_it_wrote_and_what_it_left_out(to: str, run: str) -> None:
    done = export_run(run, to)  # type: ignore[arg-type]
    assert (done.policy, done.images, done.detections, done.failed) == ("whole", 3, 4, 1)
    assert str(done) == f"4 detections of whole in 3 images, in {done.uri}; 1 images that failed are left out"
    assert done.uri.startswith(f"{run}/exports/whole.")
    assert Path(done.uri).exists()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="a process's threads are counted as Linux tells them")
@pytest.mark.parametrize("to", ["coco", "parquet"])
def test_no_thread_is_begun_that_could_outlive_the_interpreter(to: str, run: str) -> None:
    """One of Arrow's that lets go of a Python object while the interpreter ends aborts the process, with status 134."""
    script = (
        "import os, sys\n"
        "from scalenet_ray.runs.export import export_run\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "export_run(*sys.argv[1:])\n"
        "sys.stdout.write(str(len(os.listdir('/proc/self/task')) - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, run, to], capture_output=True, text=True, check=True)
    assert done.stdout == "0"


def test_coco_results_are_what_the_run_itself_writes(run: str, tmp_path: Path) -> None:
    done = export_run(run, "coco-results", output=str(tmp_path / "results.json"))
    rows = json.loads(Path(done.uri).read_text())
    assert rows[0] == {"image_id": 1, "category_id": 90, "bbox": [10, 20, 30, 60], "score": 0.9}
    truth = COCO()
    truth.dataset = {"images": [{"id": i} for i in (1, 2, 4)], "categories": [{"id": i} for i in NAMES]}
    truth.createIndex()
    assert len(truth.loadRes(done.uri).anns) == 4


def test_parquet_names_each_rows_category_and_file(run: str) -> None:
    rows = pq.read_table(export_run(run, "parquet").uri).to_pylist()
    assert [row["category"] for row in rows] == ["tooth brush", "kite", "person", "person"]
    assert [row["file"] for row in rows] == [FILES[0]] * 3 + [FILES[1]]
    assert rows[0]["x1"] == 40
    assert rows[0]["policy"] == "whole"


def test_yolo_labels_are_centres_and_sides_of_the_image(run: str) -> None:
    folder = Path(export_run(run, "yolo").uri)
    lines = (folder / "labels" / "a" / "one.txt").read_text().splitlines()
    # (10 + 40) / 2 of 200 pixels, (20 + 80) / 2 of 100, and the sides 30 of 200 and 60 of 100.
    assert lines[0] == "2 0.125000 0.500000 0.150000 0.600000"
    assert lines[1].split()[0] == "0"
    assert (folder / "labels" / "empty.txt").read_text() == ""
    assert sorted(path.name for path in (folder / "labels").rglob("*.txt")) == ["empty.txt", "one.txt", "two.txt"]
    assert (folder / "classes.txt").read_text().splitlines() == ["kite", "person", "tooth brush"]
    assert yaml.safe_load((folder / "data.yaml").read_text())["names"] == ["kite", "person", "tooth brush"]


def test_an_exported_instances_file_is_a_data_set_with_names_and_sizes(run: str) -> None:
    uri = export_run(run, "coco").uri
    dataset = read_annotations(uri)
    assert dataset.categories == NAMES
    assert [(record.file_name, record.hw) for record in dataset.images] == [
        ("a/one.jpg", (100, 200)), ("b/two.jpg", (100, 200)), ("empty.jpg", (100, 200)),
    ]  # fmt: skip
    boxes = np.concatenate([BOXES, BOXES[:1]])
    assert dataset.boxes_xywh.tolist() == [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes.tolist()]
    assert dataset.areas.tolist() == [1800, 5000, 6, 1800]
    assert dataset.labels.tolist() == [90, 3, 7, 7]
    with contextlib.redirect_stdout(io.StringIO()):
        assert len(COCO(uri).getAnnIds(imgIds=[1])) == 3
    assert json.loads(Path(uri).read_text())["annotations"][0]["score"] == 0.9


def test_an_export_without_detections_is_an_instances_file_too(run: str) -> None:
    assert len(read_annotations(export_run(run, "coco", score_threshold=1.0).uri).images) == 3


def test_exported_voc_files_are_read_as_a_data_set(run: str, tmp_path: Path) -> None:
    folder = export_run(run, "voc").uri
    for file in ("a/one.jpg", "b/two.jpg", "empty.jpg"):
        (tmp_path / "photos" / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100)).save(tmp_path / "photos" / file)
    layout = find_layout("any", annotations=f"{folder}/Annotations", images=str(tmp_path / "photos"))
    dataset = layout.read("any")
    assert (dataset.images[0].file_name, dataset.images[0].hw) == ("a/one.jpg", (100, 200))
    named = [dataset.categories[label] for label in dataset.labels.tolist()]
    assert named == ["tooth brush", "kite", "person", "person"]
    # The third box, 5 to 6.5 and 5 to 9, is rounded to whole pixels.
    assert dataset.boxes_xywh.tolist() == [[10, 20, 30, 60], [0, 0, 100, 50], [5, 5, 1, 4], [10, 20, 30, 60]]


def test_exported_yolo_labels_are_read_as_a_data_set(run: str, tmp_path: Path) -> None:
    folder = Path(export_run(run, "yolo").uri)
    for file in ("a/one.jpg", "b/two.jpg", "empty.jpg"):
        (folder / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100)).save(folder / "images" / file)
    dataset = find_layout("val", data=str(folder / "data.yaml")).read("val")
    named = [dataset.categories[label] for label in dataset.labels.tolist()]
    assert named == ["tooth brush", "kite", "person", "person"]
    wanted = [[10, 20, 30, 60], [0, 0, 100, 50], [5, 5, 1.5, 4], [10, 20, 30, 60]]
    assert np.abs(dataset.boxes_xywh - wanted).max() < 2e-4


def test_yolo_refuses_a_folder_with_labels_in_it(run: str) -> None:
    export_run(run, "yolo")
    with pytest.raises(FileExistsError, match="holds label files already: remove them, or name another --output"):
        export_run(run, "yolo")


def test_label_files_that_would_be_one_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ("/photos/a.jpg", "/photos/a.png", "/photos/b.jpg", "/photos/c.jpg"))
    for to in ("yolo", "voc", "fiftyone"):
        with pytest.raises(ValueError, match="two images would share the label file a"):
            export_run(run, to)  # type: ignore[arg-type]


def test_a_file_name_that_leaves_its_folder_writes_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ("../../out.jpg", "a.jpg", "b.jpg", "c.jpg"))
    with pytest.raises(ValueError, match="file_name must be a path inside the images' folder"):
        export_run(run, "yolo")
    assert list(tmp_path.rglob("*.txt")) == []


def test_fiftyone_reads_classes_by_position_and_boxes_as_shares(run: str) -> None:
    document = json.loads((Path(export_run(run, "fiftyone").uri) / "labels.json").read_text())
    assert document["classes"] == ["kite", "person", "tooth brush"]
    assert document["labels"]["a/one"][0] == {
        "label": 2,
        "bounding_box": [0.05, 0.2, 0.15, 0.6],
        "confidence": 0.9,
        "attributes": {"depth": 0},
    }
    assert document["labels"]["empty"] == []


def test_supervisions_table_has_its_own_columns_first(run: str) -> None:
    with open(export_run(run, "supervision").uri, newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0])[:7] == ["x_min", "y_min", "x_max", "y_max", "class_id", "confidence", "tracker_id"]
    assert (rows[0]["class_id"], rows[0]["class_name"], rows[0]["file"]) == ("90", "tooth brush", FILES[0])
    assert [float(rows[0][name]) for name in ("x_min", "y_min", "x_max", "y_max")] == BOXES[0].tolist()


def features_of(run: str) -> list[dict[str, Any]]:
    document = json.loads(Path(export_run(run, "geojson").uri).read_text())
    assert document["type"] == "FeatureCollection"
    return document["features"]


def test_geojson_of_photographs_is_in_image_pixels(run: str) -> None:
    first, *others = features_of(run)
    assert first["geometry"] == {"type": "Polygon", "coordinates": [[[10, 20], [40, 20], [40, 80], [10, 80], [10, 20]]]}
    assert first["properties"] == {
        "category": "tooth brush",
        "category_id": 90,
        "score": 0.9,
        "depth": 0,
        "box": [10, 20, 40, 80],
        "image_id": 1,
        "file": FILES[0],
    }
    assert [feature["properties"]["image_id"] for feature in others] == [1, 1, 2]
    assert json.loads(Path(f"{run}/exports/whole.geojson").read_text())["coordinate_frame"] == "image pixels"


def geotiff(path: Path, transform: Sequence[float] | None, crs: str | None = "EPSG:32633") -> str:
    rasterio = pytest.importorskip("rasterio")
    place = {} if transform is None else {"transform": rasterio.Affine(*transform), "crs": crs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            path, "w", driver="GTiff", height=100, width=200, count=1, dtype="uint8", **place
        ) as dataset:
            dataset.write(np.zeros((1, 100, 200), np.uint8))
    return str(path)


NORTH_UP = (0.5, 0, 500_000, 0, -0.5, 5_000_000)


@pytest.mark.parametrize("transform", [NORTH_UP, (0, 0.5, 500_000, 0.5, 0, 5_000_000)], ids=["north up", "mirrored"])
def test_geojson_of_geotiffs_is_in_longitude_and_latitude(transform: Sequence[float], tmp_path: Path) -> None:
    files = [geotiff(tmp_path / f"{name}.tif", transform) for name in "abcd"]
    feature = features_of(write_run(tmp_path / "run", files))[0]
    ((ring,),) = [feature["geometry"]["coordinates"]]
    placed = np.array(ring)
    # On the central meridian of zone 33, 15 degrees east; 5,000 km from the equator are 45.15 degrees north.
    assert np.abs(placed - [15, 45.15]).max() < 0.01
    assert ring[0] == ring[-1]
    x, y = (placed - placed[0]).T
    assert (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0
    metres = np.array([np.cos(np.radians(45.15)) * 111_320, 111_132])
    sides = np.abs(np.diff(placed * metres, axis=0)).max(axis=1)
    # The box of 30 x 60 pixels of half a metre.
    assert sorted(sides.round(1).tolist()) == pytest.approx([15, 15, 30, 30], rel=0.01)
    assert feature["properties"]["box"] == [10, 20, 40, 80]
    document = json.loads(Path(tmp_path / "run" / "exports" / "whole.geojson").read_text())
    assert document["coordinate_frame"] == "WGS 84"


@pytest.mark.parametrize("place", [(None, None), (NORTH_UP, None)], ids=["neither", "no reference system"])
def test_geojson_of_tiffs_without_a_place_on_earth_is_in_image_pixels(place: tuple[Any, Any], tmp_path: Path) -> None:
    files = [geotiff(tmp_path / f"{name}.tif", *place) for name in "abcd"]
    feature = features_of(write_run(tmp_path / "run", files))[0]
    assert feature["geometry"]["coordinates"][0][0] == [10, 20]


def test_geojson_refuses_to_mix_frames_and_images_that_are_gone(tmp_path: Path) -> None:
    placed, unplaced = geotiff(tmp_path / "a.tif", NORTH_UP), geotiff(tmp_path / "b.tif", None)
    run = write_run(tmp_path / "run", (placed, unplaced, placed + "x", unplaced + "x"))
    with pytest.raises(
        ValueError, match=r"all images or none must be georeferenced .* got .*a\.tif, which is, and .*b\.tif"
    ):
        export_run(run, "geojson")
    gone = write_run(tmp_path / "other", (placed, str(tmp_path / "gone.tif"), "c.tif", "d.tif"))
    with pytest.raises(ValueError, match=r"must be where they were .* got .*gone\.tif: .* no such"):
        export_run(gone, "geojson")
    assert not list(tmp_path.rglob("*.geojson"))


def test_geojson_refuses_boxes_where_the_reference_system_does_not_hold(tmp_path: Path) -> None:
    far = geotiff(tmp_path / "a.tif", (1e9, 0, 1e12, 0, -1e9, 1e12))
    run = write_run(tmp_path / "run", (far, far + "2", far + "3", far + "4"))
    with pytest.raises(ValueError, match="boxes must lie where the image's reference system holds, got transform"):
        export_run(run, "geojson")


def test_an_evaluation_names_its_categories_by_its_annotations(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("one.jpg", "two.jpg", "broken.jpg", "empty.jpg"))
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["settings"] |= {"data": str(tmp_path / "data"), "images": None, "split": "val"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "data" / "annotations").mkdir(parents=True)
    document = {
        "images": [{"id": 1, "file_name": "one.jpg"}],
        "annotations": [],
        "categories": [{"id": key, "name": name} for key, name in NAMES.items()],
    }
    (tmp_path / "data" / "annotations" / "instances_val.json").write_text(json.dumps(document))
    assert pq.read_table(export_run(folder, "parquet").uri).column("category")[0].as_py() == "tooth brush"


def test_the_command_exports_and_says_so_in_one_line(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("export", run, "--to", "coco", "--policy", "grid-2", "--score-threshold", "0.5") == 0
    assert capsys.readouterr().out.startswith("3 detections of grid-2 in 3 images, in ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--to", "coco"), "nowhere must be a run folder, got no config.yaml in it"),
        (
            ("RUN", "--to", "coco", "--policy", "random"),
            "--policy must be one of the run's, whole, grid-2, got 'random'",
        ),
    ],
)
def test_what_cannot_be_exported_says_why(
    run: str, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("export", *(run if one == "RUN" else one for one in arguments)) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_is_no_detection_is_told_so(tmp_path: Path) -> None:
    with RunFolder(str(tmp_path / "run")).begin({"epochs": 3}, resume=False):
        pass
    with pytest.raises(ValueError, match="must be a run of eval_coco or detect, got one without policies"):
        export_run(str(tmp_path / "run"), "coco")


def test_runs_are_exported_from_and_to_s3(s3_bucket: str) -> None:
    run = RunFolder(f"{s3_bucket}/run")
    with run.begin({"images": "/photos", "policies": [{"name": "whole"}]}, resume=False):
        pass
    writer = ShardWriter(run, "whole", ImageRecords.listed(FILES[:1]), lambda ids: None)
    writer.add(finished(1, BOXES, [90, 3, 7]), 1.5)
    writer.flush()
    run.write_json("metrics.json", {"categories": NAMES})
    for to in EXPORT_FORMATS:
        assert export_run(run.uri, to).detections == 3
