"""COCO's files: annotations in, results out. With `evaluation` and `interchange`, the only home of xywh."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.geometry import Window
from scalenet_ray.core.inference import OracleScalePredictor
from scalenet_ray.core.masks import checked_segmentation, mask_of_image
from scalenet_ray.data.images import IMAGE_SUFFIXES, OTHER_SUFFIXES
from scalenet_ray.data.storage import Address, atomic_writer, join, list_files, read_bytes

__all__ = [
    "CocoDataset",
    "FoundImages",
    "GroundTruth",
    "ImageRecord",
    "Listing",
    "Objects",
    "OpenImage",
    "annotations_uri",
    "find_images",
    "images_and_categories",
    "list_images",
    "map_categories",
    "objects_of",
    "oracle_from",
    "parse_annotations",
    "read_annotations",
    "safe_file_name",
    "to_results",
    "unknown_categories",
    "write_results",
]

_SHOWN = 5


_LONGEST_VALUE = 80


# Of a file of annotations or addresses: parsed it takes some ten times as much memory.
_MAX_BYTES = 2 * 2**30


# Of a coordinate or a side of a box: what is further than this is no place in an image, and no float32 either.
_FARTHEST = 1e9


_LARGEST_AREA = _FARTHEST**2


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image of a data set, not read yet.

    Attributes:
        image_id: its id.
        file_name: as the annotations write it, to be checked by `safe_file_name` before use; of an image
            listed by `list_images`, its whole address.
        height: image pixels as annotated, or None if nobody said.
        width: image pixels as annotated, or None if nobody said.
    """

    image_id: int
    file_name: str
    height: int | None = None
    width: int | None = None

    @property
    def hw(self) -> tuple[int, int] | None:
        """(height, width) in image pixels, or None if nobody said."""
        return None if self.height is None or self.width is None else (self.height, self.width)


class Objects(NamedTuple):
    """The ground truth of one image.

    Attributes:
        boxes: [N, 4] float32 xyxy, in image pixels.
        areas: [N] float64, mask pixels as annotated; the box's area where the annotation has none.
        labels: [N] int64 category ids.
        crowd: [N] bool, whether it stands for a crowd of objects.
        segmentations: N polygons or run lengths as COCO writes them, None where only the box counts.
    """

    boxes: np.ndarray
    areas: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    segmentations: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """Annotations, checked. M objects in columns: 73 bytes each, and what their segmentations take.

    Attributes:
        images: in the order of their ids.
        categories: category id -> name.
        image_ids: [M] int64, the image of each object.
        boxes_xywh: [M, 4] float64, in image pixels.
        areas: [M] float64 mask pixels.
        labels: [M] int64 category ids.
        crowd: [M] bool.
        segmentations: M polygons or run lengths that pycocotools can read, or None: there is none, or it is damaged.
        annotation_ids: [M] int64, the objects' own ids.
        damaged_masks: ids of the annotations with a damaged segmentation; their boxes count, as where there is none.
    """

    images: tuple[ImageRecord, ...]
    categories: dict[int, str]
    image_ids: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    segmentations: tuple[Any, ...]
    annotation_ids: np.ndarray
    damaged_masks: tuple[int, ...] = ()

    @cached_property
    def unused_categories(self) -> frozenset[int]:
        """Ids of the categories that no annotation is of; no figure counts them."""
        return frozenset(self.categories.keys() - set(np.unique(self.labels).tolist()))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is not taken as it is written, or can't be meant, a line each, for the person who starts a run."""
        lines = []
        if self.damaged_masks:
            count, ids = len(self.damaged_masks), _first(self.damaged_masks)
            lines.append(f"annotations with a segmentation that is no mask: {count}, counted by their boxes (id {ids})")
        if self.crowd.all():
            lines.append("no annotation is of an object that counts (crowds do not): there is no AP to measure")
        lost = self.annotation_ids[self._nowhere & ~self.crowd].tolist()
        if lost:
            lines.append(
                f"annotations whose box has no area in its image: {len(lost)}, never found (id {_first(lost)})"
            )
        return tuple(lines)

    @property
    def _nowhere(self) -> np.ndarray:
        """[M] bool, whether nothing of a box lies in its image, as far as that says its size."""
        size = {record.image_id: record.hw or (np.inf, np.inf) for record in self.images}
        ends = np.array([size[image_id][::-1] for image_id in self.image_ids.tolist()], np.float64).reshape(-1, 2)
        low = np.maximum(self.boxes_xywh[:, :2], 0)
        high = np.minimum(self.boxes_xywh[:, :2] + self.boxes_xywh[:, 2:], ends)
        return np.any(high <= low, axis=1)

    @cached_property
    def rows_by_image(self) -> dict[int, np.ndarray]:
        """Image id -> the rows of its objects, in the file's order; images without objects are left out."""
        order = np.argsort(self.image_ids, kind="stable")
        ids, starts = np.unique(self.image_ids[order], return_index=True)
        return dict(zip(ids.tolist(), np.split(order, starts[1:]), strict=True)) if len(ids) else {}


# --- annotations in ---------------------------------------------------------------------------------


def _fail(message: str) -> NoReturn:
    raise UserError(message)


def _first(values: Iterable[object]) -> str:
    """The first few of many, for a message."""
    values = list(values)
    shown = (" ".join(str(value).split()) for value in values[:_SHOWN])
    return ", ".join(shown) + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: object) -> str:
    """A value for a message of one line."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _is_text(value: object) -> bool:
    """Whether it is text that can be written: JSON can hold half of a character, which no file's name or table can."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _rows(document: Mapping[str, Any], section: str, keys: Sequence[str], name: str) -> list[dict]:
    """A section of the file, whose rows all have `keys` and an id of their own."""
    rows = document.get(section)
    if not isinstance(rows, list):
        _fail(f"{name} must have a list of {section}, got {type(rows).__name__}: is it an instances file of COCO?")
    for i, row in enumerate(rows):
        missing = [key for key in keys if key not in row] if isinstance(row, dict) else list(keys)
        if missing:
            _fail(f"{section}[{i}] of {name} must have {', '.join(keys)}, got no {', '.join(missing)}: add it")
        for key in keys:
            if key.endswith("id") and not (type(row[key]) is int and abs(row[key]) < 2**63):
                which = f"{section}[{i}]" if key == "id" else f"{section}[{i}] (id {row['id']})"
                _fail(f"{key} of {which} of {name} must be a whole number, got {_short(row[key])}: number them")
    twice = [key for key, count in Counter(row["id"] for row in rows).items() if count > 1]
    if twice:
        _fail(f"each of {section} of {name} must have an id of its own, got twice {_first(twice)}: renumber them")
    return rows


def _image_record(row: dict, name: str) -> ImageRecord:
    for key in ("height", "width"):
        value = row.get(key)
        if value is not None and not (type(value) is int and 1 <= value <= _FARTHEST):
            got = _short(value)
            _fail(f"{key} of image {row['id']} of {name} must be 1 or more pixels, got {got}: correct it")
    if not _is_text(row["file_name"]):
        _fail(f"file_name of image {row['id']} of {name} must be text, got {_short(row['file_name'])}: correct it")
    return ImageRecord(row["id"], row["file_name"], row.get("height"), row.get("width"))


def _check_fields(row: dict, name: str) -> None:
    """That the fields of an annotation, but for its segmentation, are what COCO says."""
    box = row["bbox"]
    of_numbers = isinstance(box, list | tuple) and len(box) == 4 and all(map(_is_number, box))
    if not (of_numbers and all(-_FARTHEST <= value <= _FARTHEST for value in box) and min(box[2:]) >= 0):
        _fail(
            f"bbox of annotation {row['id']} of {name} must be 4 finite numbers [x, y, width, height], up to "
            f"{_FARTHEST:.0e} pixels, with no negative side, got {_short(box)}: correct or remove it"
        )
    area = row.get("area")
    if area is not None and not (_is_number(area) and 0 <= area <= _LARGEST_AREA):
        _fail(f"area of annotation {row['id']} of {name} must be 0 or more, got {_short(area)}: correct it")
    crowd = row.get("iscrowd")
    if crowd is not None and not (type(crowd) is int and crowd in (0, 1)):
        _fail(f"iscrowd of annotation {row['id']} of {name} must be 0 or 1, got {_short(crowd)}: correct it")


def _segmentation(row: dict, hw: tuple[int, int] | None, damaged: list[int]) -> Any:
    """The segmentation of an annotation; None if there is none, or it is damaged: then its id joins `damaged`."""
    found = row.get("segmentation")
    if found is None or (isinstance(found, list) and not found):
        return None
    try:
        return checked_segmentation(found, hw)
    except TileError:
        damaged.append(row["id"])
        return None


def parse_annotations(document: Mapping[str, Any], name: str = "the annotations") -> CocoDataset:
    """Check annotations that are parsed already.

    Args:
        document: images, annotations and categories as an instances file of COCO has them.
        name: what messages call it.

    Raises:
        UserError: if something is missing, double, or points to nothing; the message names the first few.
    """
    if not isinstance(document, Mapping):
        _fail(f"{name} must be a JSON object with images, annotations and categories, got {type(document).__name__}")
    image_rows = _rows(document, "images", ("id", "file_name"), name)
    if not image_rows:
        _fail(f"{name} must list at least one image, got none: check that it is the right file")
    category_rows = _rows(document, "categories", ("id", "name"), name)
    for row in category_rows:
        if not _is_text(row["name"]):
            got = _short(row["name"])
            _fail(f"name of a category of {name} must be text, got {got} in category {row['id']}: correct it")
    names = {row["id"]: row["name"] for row in category_rows}
    rows = _rows(document, "annotations", ("id", "image_id", "category_id", "bbox"), name)
    images = sorted((_image_record(row, name) for row in image_rows), key=lambda record: record.image_id)
    for what, known in (("image_id", {record.image_id for record in images}), ("category_id", names.keys())):
        lost = [row["id"] for row in rows if row[what] not in known]
        if lost:
            _fail(f"{what} of an annotation of {name} must be listed, got an unknown one in {_first(lost)}: remove it")
    for row in rows:
        _check_fields(row, name)
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    areas = [box[2] * box[3] if row.get("area") is None else row["area"] for box, row in zip(boxes, rows, strict=True)]
    sizes, damaged = {record.image_id: record.hw for record in images}, []
    return CocoDataset(
        images=tuple(images),
        categories=names,
        image_ids=np.array([row["image_id"] for row in rows], np.int64),
        boxes_xywh=boxes,
        areas=np.array(areas, np.float64),
        labels=np.array([row["category_id"] for row in rows], np.int64),
        crowd=np.array([row.get("iscrowd") == 1 for row in rows], bool),
        segmentations=tuple(_segmentation(row, sizes[row["image_id"]], damaged) for row in rows),
        annotation_ids=np.array([row["id"] for row in rows], np.int64),
        damaged_masks=tuple(damaged),
    )


def annotations_uri(data: Address, split: str) -> str:
    """The address of the instances file of a split: DATA/annotations/instances_SPLIT.json."""
    return join(data, "annotations", f"instances_{split}.json")


def read_annotations(uri: Address) -> CocoDataset:
    """Read and check an instances file of COCO.

    Raises:
        FileNotFoundError: if it is not there.
        UserError: if it is no JSON, or something in it is missing, double, or points to nothing.
    """
    data = read_bytes(uri, max_bytes=_MAX_BYTES)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:  # The second: brackets without end.
        msg = f"{uri} must be JSON, got something else ({error}): fetch or export it again"
        raise UserError(msg) from error
    return parse_annotations(document, str(uri))


class Listing(NamedTuple):
    """What a driver needs of an instances file: all but the objects. The fields are those of `CocoDataset`."""

    images: tuple[ImageRecord, ...]
    categories: dict[int, str]
    unused_categories: frozenset[int]
    remarks: tuple[str, ...]


def images_and_categories(uri: Address) -> Listing:
    """What a driver needs of an instances file; raises as `read_annotations` does."""
    dataset = read_annotations(uri)
    return Listing(dataset.images, dataset.categories, dataset.unused_categories, dataset.remarks)


def objects_of(dataset: CocoDataset, image_id: int) -> Objects:
    """The ground truth of one image, in the file's order; none for an image without annotations."""
    rows = dataset.rows_by_image.get(image_id, np.zeros(0, np.int64))
    xywh = dataset.boxes_xywh[rows]
    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)
    segmentations = tuple(dataset.segmentations[i] for i in rows)
    return Objects(boxes, dataset.areas[rows], dataset.labels[rows], dataset.crowd[rows], segmentations)


def safe_file_name(name: str) -> str:
    """`name`, if it stays inside the folder that it is joined to.

    Raises:
        TileError: if it is empty, absolute, an address, or climbs out: that image is lost, the others not.
    """
    leaves = name.startswith("/") or "\\" in name or "://" in name or re.match(r"[A-Za-z]:", name)
    if not name or "\0" in name or leaves or ".." in name.split("/"):
        msg = f"file_name must be a path inside the images' folder, got {name!r}: correct the annotations"
        raise TileError(msg)
    return name


class FoundImages(NamedTuple):
    """Images without annotations.

    Attributes:
        records: with ids 1 to N in the order of the sorted addresses, of unknown size.
        remarks: what was left out, a line each.
    """

    records: list[ImageRecord]
    remarks: tuple[str, ...]


def list_images(uri: Address) -> list[ImageRecord]:
    """The records of `find_images`; raises as that does."""
    return find_images(uri).records


def find_images(uri: Address) -> FoundImages:
    """The images of a folder, a glob, an S3 prefix, or a Parquet file with a column `uri` or `path`.

    Args:
        uri: folders are read with their subfolders; one without images but with Parquet files is a list of addresses
            in parts. Relative paths in a Parquet file start at its own folder.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        UserError: if it holds no image, or a Parquet file is no list of addresses.
    """
    files = list_files(uri)
    names = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    skipped = Counter(name[name.rindex(".") :].lower() for name in files if name.lower().endswith(OTHER_SUFFIXES))
    if not names:
        names = _addresses_in_parquet([name for name in files if name.lower().endswith(".parquet")], uri)
    if unwritable := [repr(name) for name in names if not _is_text(name)]:
        _fail(f"names of files must be UTF-8, got {_first(unwritable)}: rename them")
    remarks = [f"{count} files skipped: {suffix} is not read" for suffix, count in sorted(skipped.items())]
    if not names:
        wanted, got = ", ".join(IMAGE_SUFFIXES), "; ".join(["got none", *remarks])
        remedy = "convert them, a video into single pictures" if skipped else "check the path, or quote a glob"
        _fail(f"{uri} must hold at least one image ({wanted}), {got}: {remedy}")
    return FoundImages([ImageRecord(i, name) for i, name in enumerate(sorted(names), start=1)], tuple(remarks))


def _addresses_in_parquet(parts: Sequence[str], uri: Address) -> list[str]:
    """The addresses in some Parquet files, which together are the list `uri`."""
    names = [name for part in parts for name in _addresses_in_part(part)]
    _refuse_twice(names, str(uri))
    return names


def _refuse_twice(names: Sequence[str], where: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        _fail(f"{where} must name each image once, got twice {_first(twice)}: remove them")


def _addresses_in_part(uri: str) -> list[str]:
    try:
        # On this thread alone, as run folders' shards are read: one of Arrow's can abort a process that ends.
        file = pq.ParquetFile(pa.BufferReader(read_bytes(uri, max_bytes=_MAX_BYTES)), pre_buffer=False)
        column = next((name for name in ("uri", "path") if name in file.schema_arrow.names), None)
        if column is None:
            _fail(f"{uri} must have a column uri or path, got {', '.join(file.schema_arrow.names)}: rename it")
        names = file.read([column], use_threads=False).column(column).to_pylist()
    except pa.ArrowException as error:
        msg = f"{uri} must be a Parquet file, got something else ({error}): write it again"
        raise UserError(msg) from error
    wrong = [i for i, name in enumerate(names) if not isinstance(name, str) or not name.strip()]
    if wrong:
        _fail(f"column {column} of {uri} must hold an address in each row, got none in rows {_first(wrong)}: fill it")
    _refuse_twice(names, f"column {column} of {uri}")
    folder = uri.rpartition("/")[0]
    return [name if name.startswith("/") or "://" in name else join(folder, name) for name in names]


# --- categories -------------------------------------------------------------------------------------


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def map_categories(
    detector: Mapping[int, str], dataset: Mapping[int, str], unused: Collection[int] = ()
) -> dict[int, int]:
    """The detector's class ids -> the data set's category ids, by name.

    Case does not count, and underscores are spaces.

    Args:
        detector: class id -> name.
        dataset: category id -> name.
        unused: ids of the data set's categories that no annotation is of. The detector need not know them, and one
            that bears the name of another stands behind it.

    Returns:
        Only the classes that the data set has; detections of the others are to be dropped.

    Raises:
        UserError: if the detector lacks a category of the data set that is used, or two of these have one name.
    """
    used = {category_id: name for category_id, name in dataset.items() if category_id not in unused}
    twice = [name for name, count in Counter(map(_plain, used.values())).items() if count > 1]
    if twice:
        _fail(f"categories must differ by name, got twice {_first(twice)}: rename them in the annotations")
    known = {_plain(name) for name in detector.values()}
    # Those that are used come last, so that a name is theirs.
    ids = {_plain(name): category_id for category_id, name in [*dataset.items(), *used.items()]}
    missing = [name for name in used.values() if _plain(name) not in known]
    if missing:
        kind = f"no {_first(missing)}" if known & ids.keys() else "none"
        _fail(
            f"the detector must know every category of the data set, got {kind} among its {_first(detector.values())}: "
            "use a detector trained on them, or leave these categories out of the annotations"
        )
    return {class_id: ids[_plain(name)] for class_id, name in detector.items() if _plain(name) in ids}


def unknown_categories(detector: Mapping[int, str], dataset: Mapping[int, str], unused: Collection[int]) -> list[str]:
    """Names of the unused categories that the detector does not know, so that nothing is found of them."""
    known = {_plain(name) for name in detector.values()}
    return [name for category_id, name in dataset.items() if category_id in unused and _plain(name) not in known]


# --- results out ------------------------------------------------------------------------------------


def to_results(image_id: int, detections: Detections, image_hw: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """Detections of an image -> COCO results.

    Args:
        image_id: the image.
        detections: boxes in image pixels, labels are category ids; masks are of their windows.
        image_hw: (height, width) of the image; needed for masks, which COCO wants on the whole image.

    Returns:
        One dict a detection: image_id, category_id, bbox [x, y, width, height] to 1/1000 px, score to
        1/1,000,000, and `segmentation` (compressed run lengths) if there are masks.

    Raises:
        UserError: if there are masks and no `image_hw`.
    """
    corners = detections.boxes.astype(np.float64)
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).round(3).tolist()
    scores = detections.scores.astype(np.float64).round(6).tolist()
    rows: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
        for label, box, score in zip(detections.labels.tolist(), xywh, scores, strict=True)
    ]
    if detections.masks is None:
        return rows
    if image_hw is None:
        _fail(f"masks of image {image_id} need the image's size, got none: give image_hw")
    for row, counts, window in zip(rows, detections.masks, detections.windows.tolist(), strict=True):
        whole = mask_of_image(counts, Window(*window), image_hw)
        row["segmentation"] = {"size": list(image_hw), "counts": whole.decode("ascii")}
    return rows


def write_results(uri: Address, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write COCO results as one JSON list, a row at a time: memory does not grow with their number.

    The file appears whole when the last row is written, or not at all.

    Returns:
        How many rows were written.
    """
    count = 0
    with atomic_writer(uri) as handle:
        handle.write(b"[")
        for row in rows:
            handle.write(b",\n" if count else b"\n")
            handle.write(json.dumps(row, allow_nan=False, separators=(",", ":")).encode())
            count += 1
        handle.write(b"\n]\n")
    return count


class GroundTruth:
    """The objects of each image, from an instances file.

    Args:
        annotations: address of the file; it is read once.
    """

    def __init__(self, annotations: str) -> None:
        self._dataset = read_annotations(annotations)

    def __call__(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [N, 4] xyxy and mask areas [N] of an image's objects, in image pixels; crowds left out."""
        objects = objects_of(self._dataset, image_id)
        return objects.boxes[~objects.crowd], objects.areas[~objects.crowd]


def oracle_from(annotations: str) -> OracleScalePredictor:
    """The oracle of an instances file."""
    return OracleScalePredictor(GroundTruth(annotations))


OpenImage = Callable[[ImageRecord], np.ndarray]
"""An image's record -> its pixels [h, w, 3] uint8 RGB; raises `TileError` for an image that cannot be read."""
