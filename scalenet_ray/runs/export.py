"""Export the detections of a run to formats of other tools."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from scalenet_ray.core.detections import ImageResult
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.data import storage
from scalenet_ray.data.coco import images_and_categories, safe_file_name
from scalenet_ray.data.datasets import find_layout
from scalenet_ray.data.formats import (
    SUPERVISION_COLUMNS,
    fiftyone_objects,
    geojson_features,
    supervision_rows,
    to_results,
    voc_annotation,
    write_results,
    yolo_lines,
)
from scalenet_ray.data.rasters import georeference_of
from scalenet_ray.data.schemas import DETECTIONS, detections_table
from scalenet_ray.runs.folder import GROUND_TRUTH, RunFolder
from scalenet_ray.runs.results import StoredImage, image_results

ExportFormat = Literal["coco", "coco-results", "parquet", "yolo", "voc", "supervision", "fiftyone", "geojson"]


EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
"""The formats of `export_run`."""

_IMAGES_AT_ONCE = 256


@dataclass(frozen=True)
class Exported:
    """Summary of an export: images with and without detections, detections, and failed images, which are left out."""

    policy: str
    images: int
    detections: int
    failed: int
    uri: str

    def __str__(self) -> str:
        """One line for the terminal."""
        lost = f"; {self.failed} images that failed are left out" if self.failed else ""
        return f"{self.detections} detections of {self.policy} in {self.images} images, in {self.uri}{lost}"


class _Source(NamedTuple):
    """Input of a writer: policy, images, category id -> name, and the images' folder if their files are below it."""

    policy: str
    images: Iterator[StoredImage]
    names: dict[int, str]
    folder: str | None

    @property
    def positions(self) -> dict[int, int]:
        """Category id -> index in ascending order of ids, for formats without ids."""
        return {category_id: i for i, category_id in enumerate(sorted(self.names))}

    @property
    def classes(self) -> list[str]:
        """Category names in ascending order of ids."""
        return [self.names[category_id] for category_id in sorted(self.names)]


def export_run(
    run_uri: str,
    to: ExportFormat,
    policy: str | None = None,
    output: str | None = None,
    score_threshold: float = 0.0,
) -> Exported:
    """Write one policy's detections of a run in another tool's format.

    Args:
        run_uri: the run folder of `eval_coco` or `detect`, local or in a store; it need not be finished.
        to: the format.
        policy: the policy; None for the run's first one.
        output: a file, or a folder for yolo, voc and fiftyone; None for one under `exports/` in the run folder.
        score_threshold: minimum score of exported detections.

    Raises:
        FileNotFoundError: if there is no such run.
        FileExistsError: if the output folder already has label files.
        UserError: if the run has no such policy or no category names yet, or two images would share a label file; for
            geojson also if only some of the images are georeferenced, or one cannot be read.
    """
    if to not in EXPORT_FORMATS:
        msg = f"the format must be one of {', '.join(EXPORT_FORMATS)}, got {to!r}"
        raise UserError(msg)
    run = RunFolder(run_uri)
    settings = _settings(run)
    named = [settings_of_policy["name"] for settings_of_policy in settings["policies"]]
    name = str(named[0]) if policy is None else policy
    if name not in named:
        msg = f"--policy must be one of the run's, {', '.join(named)}, got {name!r}"
        raise UserError(msg)
    suffix, write = _WRITERS[to]
    uri = output or storage.join(run_uri, "exports", f"{name}{suffix}")
    counts = {"images": 0, "detections": 0}

    def images() -> Iterator[StoredImage]:
        """Filter each image's detections by score, and count images and detections."""
        for image in image_results(run, name):
            detections = image.detections[image.detections.scores >= score_threshold]
            counts["images"] += 1
            counts["detections"] += len(detections)
            yield image._replace(detections=detections)

    write(_Source(name, images(), *_names_and_folder(run, settings)), uri)
    done = run.table("images", name, ["image_id"]).num_rows
    return Exported(name, counts["images"], counts["detections"], done - counts["images"], uri)


def _settings(run: RunFolder) -> dict[str, Any]:
    if not storage.exists(storage.join(run.uri, "config.yaml")):
        msg = f"{run.uri} must be a run folder, got no config.yaml in it: check the path"
        raise FileNotFoundError(msg)
    settings = run.config()["settings"]
    if not settings.get("policies"):
        msg = f"{run.uri} must be a run of eval_coco or detect, got one without policies: name another run folder"
        raise UserError(msg)
    return settings


def _names_and_folder(run: RunFolder, settings: dict[str, Any]) -> tuple[dict[int, str], str | None]:
    """Category id -> name and the images' folder of an evaluation; names of a detection run, which has no folder."""
    if "data" in settings:
        where = {name: settings.get(name) for name in ("data", "annotations", "images")}
        layout, truth = find_layout(settings["split"], **where), storage.join(run.uri, GROUND_TRUTH)
        annotations = truth if storage.exists(truth) else layout.annotations_of(settings["split"])
        return images_and_categories(annotations).categories, layout.images_of(settings["split"])
    metrics = run.read_json("metrics.json")
    if metrics is None:
        msg = f"{run.uri} must be finished, got no metrics.json, which names the categories: finish it with --resume"
        raise UserError(msg)
    return {int(key): name for key, name in metrics["categories"].items()}, None


# --- writers ----------------------------------------------------------------------------------------


def _write_coco(source: _Source, uri: str) -> None:
    """Write an instances file: images with their file names and sizes, categories, and the detections as objects."""
    images = list(source.images)
    numbers, separator = count(1), "\n"
    with storage.atomic_writer(uri) as handle:
        handle.write(b'{"annotations": [')
        for image in images:
            boxes = image.detections.boxes.astype(np.float64)
            areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).round(3).tolist()
            rows = to_results(image.image_id, image.detections, image.hw)
            for row, area in zip(rows, areas, strict=True):
                annotation = {"id": next(numbers), **row, "area": area, "iscrowd": 0}
                handle.write((separator + json.dumps(annotation, allow_nan=False)).encode())
                separator = ",\n"
        rest = {
            "images": [
                {"id": image.image_id, "file_name": file, "height": image.hw[0], "width": image.hw[1]}
                for file, image in zip(_relative_files(images), images, strict=True)
            ],
            "categories": [{"id": key, "name": name} for key, name in source.names.items()],
        }
        handle.write(b"\n], " + json.dumps(rest).encode()[1:] + b"\n")


def _write_coco_results(source: _Source, uri: str) -> None:
    write_results(
        uri, (row for image in source.images for row in to_results(image.image_id, image.detections, image.hw))
    )


def _write_parquet(source: _Source, uri: str) -> None:
    """Write schema DETECTIONS with the columns `category` (name) and `file`."""
    schema = DETECTIONS.append(pa.field("category", pa.string())).append(pa.field("file", pa.string()))
    with storage.atomic_writer(uri) as handle, pq.ParquetWriter(handle, schema) as writer:
        while images := list(islice(source.images, _IMAGES_AT_ONCE)):
            rows = detections_table([_as_result(image) for image in images], source.policy)
            files = np.repeat([image.file for image in images], [len(image.detections) for image in images])
            categories = [source.names[label] for label in rows.column("category_id").to_pylist()]
            columns = [*rows.columns, pa.array(categories, pa.string()), pa.array(files.tolist(), pa.string())]
            writer.write_table(pa.table(columns, schema=schema))


def _as_result(image: StoredImage) -> ImageResult:
    return ImageResult(
        image_id=image.image_id,
        detections=image.detections,
        failure=None,
        tiles=0,
        look_pixels=0,
        detector_pixels=0,
        detector_passes=0.0,
        guards={},
        image_hw=image.hw,
    )


def _write_supervision(source: _Source, uri: str) -> None:
    """Write the table of supervision's CSVSink, with the image's id and file as custom columns."""
    with storage.atomic_writer(uri) as handle:
        text = io.TextIOWrapper(handle, "utf-8", newline="")
        writer = csv.writer(text)
        writer.writerow([*SUPERVISION_COLUMNS, "image_id", "file"])
        for image in source.images:
            writer.writerows(
                [(*row, image.image_id, image.file) for row in supervision_rows(image.detections, source.names)]
            )
        text.flush()
        text.detach()


def _write_yolo(source: _Source, uri: str) -> None:
    """Write labels/NAME.txt for every image, classes.txt and data.yaml."""
    _refuse_old_labels(storage.join(uri, "labels"))
    for stem, image in _by_stem(list(source.images)):
        lines = yolo_lines(image.detections, image.hw, source.positions)
        text = "".join(f"{line}\n" for line in lines)
        storage.write_bytes_atomic(storage.join(uri, "labels", f"{stem}.txt"), text.encode())
    storage.write_bytes_atomic(storage.join(uri, "classes.txt"), "".join(f"{n}\n" for n in source.classes).encode())
    content = {"path": ".", "train": "images", "val": "images", "nc": len(source.names), "names": source.classes}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    storage.write_bytes_atomic(storage.join(uri, "data.yaml"), text.encode())


def _write_voc(source: _Source, uri: str) -> None:
    """Write Annotations/NAME.xml for every image."""
    _refuse_old_labels(storage.join(uri, "Annotations"))
    for stem, image in _by_stem(list(source.images)):
        file = stem + posixpath.splitext(image.file)[1]
        content = voc_annotation(image.detections, image.hw, source.names, file)
        storage.write_bytes_atomic(storage.join(uri, "Annotations", f"{stem}.xml"), content)


def _refuse_old_labels(folder: str) -> None:
    if storage.exists(folder) and storage.list_files(folder):
        msg = f"{folder} holds label files already: remove them, or name another --output"
        raise FileExistsError(msg)


def _write_fiftyone(source: _Source, uri: str) -> None:
    """Write labels.json of a FiftyOneImageDetectionDataset; the images are its data_path and are not copied."""
    labels = {
        stem: fiftyone_objects(image.detections, image.hw, source.positions)
        for stem, image in _by_stem(list(source.images))
    }
    text = json.dumps({"classes": source.classes, "labels": labels}, allow_nan=False)
    storage.write_bytes_atomic(storage.join(uri, "labels.json"), text.encode())


def _write_geojson(source: _Source, uri: str) -> None:
    """Write a FeatureCollection: in longitude and latitude if the images are georeferenced, else in image pixels."""
    georeferenced: dict[bool, str] = {}
    separator = "\n"
    with storage.atomic_writer(uri) as handle:
        handle.write(b'{"type": "FeatureCollection", "features": [')
        for image in source.images:
            place = _georeference(image.file, source.folder)
            georeferenced.setdefault(place is not None, image.file)
            if len(georeferenced) == 2:
                msg = (
                    f"all images or none must be georeferenced to export geojson, got {georeferenced[True]}, which is, "
                    f"and {georeferenced[False]}, which is not: make a run of each kind"
                )
                raise UserError(msg)
            for feature in geojson_features(image.detections, source.names, place):
                feature["properties"] |= {"image_id": image.image_id, "file": image.file}
                handle.write((separator + json.dumps(feature, allow_nan=False)).encode())
                separator = ",\n"
        frame = "WGS 84" if True in georeferenced else "image pixels"
        handle.write(f'\n], "coordinate_frame": "{frame}"}}\n'.encode())


def _georeference(file: str, folder: str | None) -> Callable[[np.ndarray], np.ndarray] | None:
    try:
        return georeference_of(file if folder is None else storage.join(folder, safe_file_name(file)))
    except TileError as error:
        msg = f"the images of a run must be where they were to export geojson, got {file}: {error.reason}"
        raise UserError(msg) from error


def _by_stem(images: Sequence[StoredImage]) -> Iterator[tuple[str, StoredImage]]:
    """Iterate over (stem of the label file, image): the stem is the path below the images' folder without its suffix.

    Raises:
        UserError: if two images have the same stem.
    """
    stems = [posixpath.splitext(safe_file_name(file))[0] for file in _relative_files(images)]
    duplicates = [stem for stem, count in Counter(stems).items() if count > 1]
    if duplicates:
        msg = f"two images would share the label file {duplicates[0]}: give them names that differ before the suffix"
        raise UserError(msg)
    yield from zip(stems, images, strict=True)


def _relative_files(images: Sequence[StoredImage]) -> list[str]:
    """Paths of the images below their folder."""
    files = [image.file for image in images]
    if files and all(file.startswith("/") or "://" in file for file in files):
        # Full addresses: their common prefix is the images' folder.
        shared = posixpath.commonprefix([file.rpartition("/")[0] + "/" for file in files]).rpartition("/")[0]
        files = [file[len(shared) :].lstrip("/") for file in files]
    return files


_WRITERS: dict[ExportFormat, tuple[str, Callable[[_Source, str], None]]] = {
    "coco": (".coco.json", _write_coco),
    "coco-results": (".coco-results.json", _write_coco_results),
    "parquet": (".parquet", _write_parquet),
    "yolo": (".yolo", _write_yolo),
    "voc": (".voc", _write_voc),
    "supervision": (".supervision.csv", _write_supervision),
    "fiftyone": (".fiftyone", _write_fiftyone),
    "geojson": (".geojson", _write_geojson),
}
"""Format -> what follows the policy's name in the default output, and the writer."""
