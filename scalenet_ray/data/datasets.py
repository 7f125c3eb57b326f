"""Annotated data sets in the layouts of COCO, YOLO, VOC and VisDrone; all are read into COCO's form.

COCO        DIR/annotations/instances_SPLIT.json and DIR/SPLIT/; or any instances file and a folder of images
YOLO        data.yaml, which names folders or lists of images; labels/ beside images/
VOC         DIR/ImageSets/Main/SPLIT.txt, DIR/Annotations/NAME.xml, DIR/JPEGImages/; or folders of .xml and images
VisDrone    annotations/NAME.txt and images/, in DIR/SPLIT/ or in DIR/; or folders of .txt and images
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from scalenet_ray.core.errors import TileError, UserError, abbreviated, repeated
from scalenet_ray.data import storage
from scalenet_ray.data.coco import CocoDataset, Listing, annotations_uri, parse_annotations, read_annotations
from scalenet_ray.data.images import IMAGE_SUFFIXES, file_hw
from scalenet_ray.data.label_files import VISDRONE_CATEGORIES, LabelledObject, parse_visdrone, parse_voc, parse_yolo
from scalenet_ray.data.policy_files import read_yaml
from scalenet_ray.data.rasters import size_by_window
from scalenet_ray.data.storage import join

Form = Literal["coco", "yolo", "voc", "visdrone"]

_SPLIT = "{split}"
_THREADS = 16
_MAX_BYTES = 2**26


class _Labelled(NamedTuple):
    """An image of a data set that is not COCO's: (height, width) or None if unreadable; None without label file."""

    file_name: str
    hw: tuple[int, int] | None
    objects: list[LabelledObject] | None


@dataclass(frozen=True)
class Layout:
    """Places of a data set's splits; {split} in an address stands for the split's name.

    Attributes:
        form: of the annotations.
        annotations: address of the instances file, of data.yaml, or of the folder of label files.
        images: folder that the images' file names are relative to.
        listed: address of the list of a split's images (VOC); None if all images of the folder are the split's.
    """

    form: Form
    annotations: str
    images: str
    listed: str | None = None

    def annotations_of(self, split: str) -> str:
        """Address of the annotations of a split."""
        return self.annotations.replace(_SPLIT, split)

    def images_of(self, split: str) -> str:
        """Address of the folder that file names of a split are relative to."""
        return self.images.replace(_SPLIT, split)

    @property
    def tells_splits_apart(self) -> bool:
        """False if every split is the same one."""
        return self.form == "yolo" or self.listed is not None or _SPLIT in self.annotations

    def read(self, split: str) -> CocoDataset:
        """Read and validate the annotations of a split; raises `UserError` that names the file, and mostly the line."""
        if self.form == "coco":
            return read_annotations(self.annotations_of(split))
        return parse_annotations(_READERS[self.form](self, split)[0], self.annotations_of(split))

    def open(self, split: str) -> Listing:
        """Read a split for a run: its listing, and what is to be written where it is not COCO's; raises as `read`."""
        if self.form == "coco":
            dataset, instances, remarks = self.read(split), None, ()
        else:
            document, remarks = _READERS[self.form](self, split)
            dataset = parse_annotations(document, self.annotations_of(split))
            instances = json.dumps(document).encode()
        remarks = (*remarks, *dataset.remarks)
        return Listing(dataset.images, dataset.categories, dataset.unused_categories, remarks, instances)

    def in_coco_form(self, splits: Sequence[str], folder: str) -> Layout:
        """The same data set with instances files, which are written into `folder` unless it has them already."""
        if self.form == "coco":
            return self
        for split in splits:
            instances = self.open(split).instances
            storage.write_bytes_atomic(annotations_uri(folder, split), instances or b"")
        return Layout("coco", annotations_uri(folder, _SPLIT), self.images)


def find_layout(
    split: str, *, data: str | None = None, annotations: str | None = None, images: str | None = None
) -> Layout:
    """Find out how a data set is laid out.

    Args:
        split: a split that it has.
        data: a folder in the layout of COCO, VOC or VisDrone, or a YOLO data.yaml.
        annotations: in place of `data`: an instances file, or a folder of VOC's or VisDrone's label files.
        images: with `annotations`: the folder of the images. {split} stands for the split's name in both.

    Raises:
        FileNotFoundError: if there is no folder of annotations.
        UserError: if not exactly one of `data` and `annotations` with `images` is given, or data.yaml is not one.
    """
    if data is not None and annotations is None and images is None:
        return _layout_of_folder(data, split)
    if data is not None or annotations is None or images is None:
        got = ", ".join(
            f"--{name} {value}"
            for name, value in (("data", data), ("annotations", annotations), ("images", images))
            if value is not None
        )
        msg = f"a data set is --data DIR, or --annotations FILE with --images FOLDER, got {got or 'none'}: give one"
        raise UserError(msg)
    if annotations.lower().endswith(".json"):
        return Layout("coco", annotations, images)
    folder = annotations.replace(_SPLIT, split)
    if storage.list_files(folder, (".xml",)):
        return Layout("voc", annotations, images)
    if storage.list_files(folder, (".txt",)):
        return Layout("visdrone", annotations, images)
    msg = f"{folder} must be an instances file (.json), or a folder of .xml (VOC) or .txt (VisDrone) files, got neither"
    raise UserError(msg)


def _layout_of_folder(data: str, split: str) -> Layout:
    if data.lower().endswith((".yaml", ".yml")):
        root = str(_read_data_yaml(data).get("path") or ".")
        return Layout("yolo", data, _absolute(os.path.dirname(data) or ".", root))
    coco = Layout("coco", annotations_uri(data, _SPLIT), join(data, _SPLIT))
    if storage.exists(coco.annotations_of(split)):
        return coco
    if storage.exists(lists := join(data, "ImageSets", "Main")):
        return Layout("voc", join(data, "Annotations"), join(data, "JPEGImages"), join(lists, f"{_SPLIT}.txt"))
    for folder, found in ((join(data, _SPLIT), join(data, split)), (data, data)):
        if storage.exists(join(found, "images")) and storage.list_files(join(found, "annotations", "*.txt")):
            return Layout("visdrone", join(folder, "annotations"), join(folder, "images"))
    return _layout_of_folder(in_folder, split) if storage.exists(in_folder := join(data, "data.yaml")) else coco


# --- all forms ---------------------------------------------------------------------------------------


def _absolute(base: str, path: str) -> str:
    """A path relative to `base` as an address without `..`; local ones are absolute paths."""
    whole = path if "://" in path or path.startswith("/") else join(base, path)
    scheme, separator, rest = whole.rpartition("://")
    return storage.local_path(whole) or f"{scheme}{separator}{posixpath.normpath(rest)}"


def _images_by_stem(files: Sequence[str], folder: str) -> dict[str, str]:
    """Stem of the label file -> file name, relative to the folder of the images; `UserError` if two are the same."""
    start = f"{_absolute(folder, '.').rstrip('/')}/"
    names = [file.removeprefix(start) for file in files]
    if elsewhere := [file for file, name in zip(files, names, strict=True) if file == name]:
        msg = f"the images must lie in {start}, got {elsewhere[0]}: move them, or correct path in data.yaml"
        raise UserError(msg)
    if shared := repeated(posixpath.splitext(name)[0] for name in names):
        both = [name for name in names if posixpath.splitext(name)[0] == shared[0]]
        wanted = "have a label file of its own" if len(set(both)) > 1 else "be listed once"
        msg = f"each image of {folder} must {wanted}, got the same for {', '.join(both)}: rename or remove one"
        raise UserError(msg)
    return {posixpath.splitext(name)[0]: name for name in sorted(names)}


def _hw_of(uri: str) -> tuple[int, int] | None:
    """(height, width) from an image's header; None if it cannot be read: then it fails in the run, and is counted."""
    try:
        return size_by_window(uri) or file_hw(uri)
    except TileError:
        return None


def _text(uri: str) -> str:
    data = storage.read_bytes(uri, max_bytes=_MAX_BYTES)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{uri} must be text in UTF-8, got something else ({error}): convert it"
        raise UserError(msg) from error


def _read_all(read: Callable[[str], _Labelled], names: Sequence[str], where: str) -> list[_Labelled]:
    """Read the label files and sizes of images, several at a time; raises `UserError` if there is none of either."""
    if not names:
        raise UserError(f"{where} must have at least one image ({', '.join(IMAGE_SUFFIXES)}), got none: check the path")
    with ThreadPoolExecutor(_THREADS) as threads:
        images = list(threads.map(read, names))
    if all(image.objects is None for image in images):
        msg = f"{where} must have label files, got none for its {len(images)} images: check where they lie"
        raise UserError(msg)
    return images


def _document(images: Sequence[_Labelled], categories: dict[int, str], ids: dict[str | int, int]) -> tuple[dict, tuple]:
    """COCO's instances document, with the images numbered from 1, and remarks; `ids` maps the files' own categories."""
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, start=1):
        annotations += [
            {
                "id": len(annotations) + i,
                "image_id": image_id,
                "category_id": ids[found.category],
                "bbox": list(found.box_xywh),
                "iscrowd": int(found.is_crowd),
            }
            for i, found in enumerate(image.objects or (), start=1)
        ]
    rows = [
        {"id": image_id, "file_name": image.file_name}
        | ({} if image.hw is None else {"height": image.hw[0], "width": image.hw[1]})
        for image_id, image in enumerate(images, start=1)
    ]
    counts = {
        "images without a label file, which have no objects": sum(image.objects is None for image in images),
        "images that cannot be read": sum(image.hw is None for image in images),
    }
    named = [{"id": category_id, "name": name} for category_id, name in categories.items()]
    document = {"images": rows, "categories": named, "annotations": annotations}
    return document, tuple(f"{what}: {count}" for what, count in counts.items() if count)


# --- YOLO --------------------------------------------------------------------------------------------


def _read_data_yaml(uri: str) -> dict[str, Any]:
    content = read_yaml(uri)
    if not isinstance(content, dict):
        msg = f"{uri} must have names and splits, as YOLO's data.yaml, got {type(content).__name__}: check the path"
        raise UserError(msg)
    return content


def _yolo_names(content: dict[str, Any], uri: str) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        names = [names[key] for key in sorted(names, key=int)]
    if not isinstance(names, list) or not names or not all(type(name) in (str, int, float) for name in names):
        msg = f"{uri} must have names, a list or a number from 0 on for each, got {names!r}: name each, 'no' in quotes"
        raise UserError(msg)
    if content.get("nc", len(names)) != len(names):
        msg = f"{uri} must have as many names as nc says, got {len(names)} names and nc: {content['nc']}: correct it"
        raise UserError(msg)
    return [str(name) for name in names]


def _yolo_images(content: dict[str, Any], layout: Layout, split: str) -> list[str]:
    """Addresses of the images of a split: those of its folders, and those that its lists name."""
    entries = content.get(split)
    if not entries:
        splits = [key for key, value in content.items() if key in ("train", "val", "test") and value]
        msg = f"{layout.annotations} must name split {split}, got {', '.join(splits)}: give --split NAME"
        raise UserError(msg)
    files: list[str] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        place = _absolute(layout.images, str(entry))
        if str(entry).startswith("../") and not storage.exists(place):
            # A common export counts from a folder that it does not have.
            place = _absolute(layout.images, str(entry).removeprefix("../"))
        if place.endswith(".txt"):
            folder = posixpath.dirname(place)
            files += [_absolute(folder, line.strip()) for line in _text(place).splitlines() if line.strip()]
        else:
            files += storage.list_files(place, IMAGE_SUFFIXES)
    return files


def _read_yolo(layout: Layout, split: str) -> tuple[dict, tuple]:
    content = _read_data_yaml(layout.annotations)
    names = _yolo_names(content, layout.annotations)
    images = _images_by_stem(_yolo_images(content, layout, split), layout.images)

    def read(stem: str) -> _Labelled:
        """The size and objects of an image."""
        hw = _hw_of(join(layout.images, images[stem]))
        before, separator, after = f"/{stem}".rpartition("/images/")
        uri = join(layout.images, f"{before}/labels/{after}.txt" if separator else f"{stem}.txt")
        try:
            text = _text(uri)
        except FileNotFoundError:
            return _Labelled(images[stem], hw, None)
        # Without a size, the lines are checked and the boxes unknown.
        objects = parse_yolo(text, hw or (1, 1), len(names), uri)
        return _Labelled(images[stem], hw, objects if hw else [])

    found = _read_all(read, list(images), f"split {split} of {layout.annotations}")
    return _document(found, dict(enumerate(names)), {i: i for i in range(len(names))})


# --- VOC and VisDrone --------------------------------------------------------------------------------


def _images_in(folder: str) -> dict[str, str]:
    return _images_by_stem(storage.list_files(folder, IMAGE_SUFFIXES), folder)


def _read_voc(layout: Layout, split: str) -> tuple[dict, tuple]:
    annotations, folder = layout.annotations_of(split), layout.images_of(split)
    images = _images_in(folder)
    stems = list(images)
    if layout.listed is not None:
        lines = [line.strip() for line in _listed(layout.listed, split) if line.strip()]
        # Lists of a class have a number behind each name; names may have spaces.
        stems = [line if line in images else line.split()[0] for line in lines]
        if twice := repeated(stems):
            raise UserError(f"split {split} must list each image once, got {twice[0]} twice: remove it from the list")
        if lost := [stem for stem in stems if stem not in images]:
            msg = f"{folder} must have the images of split {split}, got no {lost[0]}: correct the list, or add it"
            raise UserError(msg)
    root = _absolute(annotations, ".").rstrip("/")
    files = {posixpath.splitext(uri)[0].removeprefix(f"{root}/"): uri for uri in storage.list_files(root, (".xml",))}
    with ThreadPoolExecutor(_THREADS) as threads:
        contents = threads.map(partial(storage.read_bytes, max_bytes=_MAX_BYTES), files.values())
        parsed = {stem: parse_voc(content, files[stem]) for stem, content in zip(files, contents, strict=True)}
    # The names of all splits, so that a category has the same id in each.
    names = sorted({found.category for image in parsed.values() for found in image.objects}, key=str)

    def read(stem: str) -> _Labelled:
        """The size and objects of an image."""
        hw, objects = parsed.get(stem, (None, None))
        return _Labelled(images[stem], hw or _hw_of(join(folder, images[stem])), objects)

    ids = {name: i for i, name in enumerate(names, start=1)}
    return _document(_read_all(read, stems, annotations), {i: str(name) for name, i in ids.items()}, ids)


def _listed(uri: str, split: str) -> list[str]:
    try:
        return _text(uri.replace(_SPLIT, split)).splitlines()
    except FileNotFoundError:
        folder = posixpath.dirname(uri)
        splits = [posixpath.basename(name).removesuffix(".txt") for name in storage.list_files(folder, (".txt",))]
        msg = f"{folder} must list split {split}, got {abbreviated(splits, 10)}: give --split NAME"
        raise UserError(msg) from None


def _read_visdrone(layout: Layout, split: str) -> tuple[dict, tuple]:
    annotations, folder = layout.annotations_of(split), layout.images_of(split)
    images = _images_in(folder)

    def read(stem: str) -> _Labelled:
        """The size and objects of an image."""
        uri = join(annotations, f"{stem}.txt")
        hw = _hw_of(join(folder, images[stem]))
        try:
            return _Labelled(images[stem], hw, parse_visdrone(_text(uri), uri))
        except FileNotFoundError:
            return _Labelled(images[stem], hw, None)

    found = _read_all(read, list(images), annotations)
    categories = dict(enumerate(VISDRONE_CATEGORIES, start=1))
    return _document(found, categories, {i: i for i in categories})


_READERS: dict[Form, Callable[[Layout, str], tuple[dict, tuple]]] = {
    "yolo": _read_yolo,
    "voc": _read_voc,
    "visdrone": _read_visdrone,
}
