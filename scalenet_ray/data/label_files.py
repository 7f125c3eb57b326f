"""Label files of one image each, in the forms of YOLO, VOC and VisDrone, as objects in image pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from scalenet_ray.core.errors import UserError

VISDRONE_CATEGORIES = (
    *("pedestrian", "people", "bicycle", "car", "van"),
    *("truck", "tricycle", "awning-tricycle", "bus", "motor"),
)
"""Names of VisDrone's categories 1 to 10; 0 is an ignored region and 11 an object of no category."""

# Label files are written with few digits: a coordinate at the image's end may exceed 1 by its rounding.
_MOST = 1.001

_YOLO_BOX = 5
_YOLO_POLYGON = 7
_VISDRONE_COLUMNS = 8
_VISDRONE_MOST = 11


class LabelledObject(NamedTuple):
    """An object of a label file: its category or the file's own number for it, its box in image pixels.

    `is_crowd` objects are ignored in evaluation, as COCO's crowds are.
    """

    category: str | int
    box_xywh: tuple[float, float, float, float]
    is_crowd: bool = False


class VocImage(NamedTuple):
    """The content of a VOC file: (height, width) in pixels, None if it does not say or says 0, and the objects."""

    hw: tuple[int, int] | None
    objects: list[LabelledObject]


def _numbers(words: list[str], where: str) -> list[float]:
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        msg = f"{where} must have numbers only, got {' '.join(words)[:80]!r}: correct it"
        raise UserError(msg)
    return values


def _lines(text: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield the lines that are not blank, each with "NAME line N"."""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield f"{name} line {number}", line.strip()


def parse_yolo(text: str, image_hw: tuple[int, int], classes: int, name: str) -> list[LabelledObject]:
    """Read a YOLO label file: class x y width height, or class and the points of a polygon, relative to the image.

    Returns:
        The objects, a class number as category; of a polygon its box.

    Raises:
        UserError: if a line is not of this form, or of a class beyond so many `classes`; it names file and line.
    """
    height, width = image_hw
    objects = []
    for where, line in _lines(text, name):
        columns = line.split()
        if len(columns) != _YOLO_BOX and (len(columns) < _YOLO_POLYGON or len(columns) % 2 == 0):
            remedy = "remove the score" if len(columns) == _YOLO_BOX + 1 else "correct it"
            wanted = "5 columns (class x y width height) or 1 + 2n (class and the points of a polygon)"
            msg = f"{where} must have {wanted}, got {len(columns)}: {remedy}"
            raise UserError(msg)
        number, *values = _numbers(columns, where)
        if number not in range(classes):
            msg = f"{where} must have a class from 0 to {classes - 1}, got {columns[0]}: correct it, or add its name"
            raise UserError(msg)
        if not all(0.0 <= value <= _MOST for value in values):
            msg = f"{where} must have coordinates from 0 to 1, relative to the image, got {line[:80]!r}: divide pixels"
            raise UserError(msg)
        if len(values) == 4:
            x, y, w, h = values[0] - values[2] / 2, values[1] - values[3] / 2, values[2], values[3]
        else:
            x, y = min(values[::2]), min(values[1::2])
            w, h = max(values[::2]) - x, max(values[1::2]) - y
        objects.append(LabelledObject(int(number), (x * width, y * height, w * width, h * height)))
    return objects


def parse_visdrone(text: str, name: str) -> list[LabelledObject]:
    """Read a VisDrone label file: left, top, width, height, score, category, truncation, occlusion.

    Returns:
        The objects, in VisDrone's numbers of categories; of score 0 as crowds. An ignored region is a crowd of every
        category; objects of category 11 are left out.

    Raises:
        UserError: if a line is not of this form; it names file and line.
    """
    objects = []
    for where, line in _lines(text, name):
        columns = line.rstrip(",").split(",")
        if len(columns) != _VISDRONE_COLUMNS:
            wanted = "8 columns with commas between (left, top, width, height, score, category, truncation, occlusion)"
            msg = f"{where} must have VisDrone's {wanted}, got {line[:80]!r}: for YOLO's labels give their data.yaml"
            raise UserError(msg)
        x, y, w, h, score, number, *_ = _numbers(columns, where)
        if w < 0 or h < 0 or number not in range(_VISDRONE_MOST + 1):
            msg = f"{where} must have a width and height of 0 or more and a category up to 11, got {line!r}: correct it"
            raise UserError(msg)
        if number == 0:
            objects += [LabelledObject(i, (x, y, w, h), True) for i in range(1, _VISDRONE_MOST)]
        elif number < _VISDRONE_MOST:
            objects.append(LabelledObject(int(number), (x, y, w, h), score == 0))
    return objects


def parse_voc(data: bytes, name: str) -> VocImage:
    """Read a VOC file: the image's size and its objects.

    VOC counts pixels from 1, and a box holds its last pixel: xmin 1 and xmax 1 are the first column. An object that is
    marked as difficult is a crowd, since VOC's evaluation ignores it.

    Raises:
        UserError: if it is not XML, declares entities, lacks a name or a box, or has a bad size; it names the file.
    """
    # A few of them, each made of the last, are a text without end.
    if b"<!ENTITY" in data:
        msg = f"{name} must declare no entity, got one: remove it"
        raise UserError(msg)
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        msg = f"{name} must be XML, got something else ({error}): correct or export it again"
        raise UserError(msg) from error
    size = root.find("size")
    hw = (0.0, 0.0) if size is None else (_number_in(size, "height", name), _number_in(size, "width", name))
    if min(hw) < 0 or any(side % 1 for side in hw):
        msg = f"{name}: size must have whole numbers, got {hw}: correct it, or leave it out"
        raise UserError(msg)
    return VocImage(
        (int(hw[0]), int(hw[1])) if all(hw) else None, [_voc_object(e, name) for e in root.findall("object")]
    )


def _voc_object(element: Element, name: str) -> LabelledObject:
    category = _text_of(_wanted(element, "name", name))
    if not category:
        msg = f"{name}: name of an object must not be empty: correct it"
        raise UserError(msg)
    box = _wanted(element, "bndbox", name)
    x0, y0, x1, y1 = (_number_in(box, side, name) for side in ("xmin", "ymin", "xmax", "ymax"))
    if x1 < x0 or y1 < y0:
        msg = f"{name}: bndbox must have xmin <= xmax and ymin <= ymax, got {x0, y0, x1, y1}: correct it"
        raise UserError(msg)
    # Some tools count from 0: their first pixel is taken as VOC's first.
    x0, y0 = max(x0, 1.0) - 1, max(y0, 1.0) - 1
    is_difficult = element.findtext("difficult", "").strip() == "1"
    return LabelledObject(category, (x0, y0, x1 - x0, y1 - y0), is_difficult)


def _wanted(element: Element, tag: str, name: str) -> Element:
    found = element.find(tag)
    if found is None:
        msg = f"{name}: {element.tag} must have {tag}, got none: add it"
        raise UserError(msg)
    return found


def _text_of(element: Element) -> str:
    return (element.text or "").strip()


def _number_in(element: Element, tag: str, name: str) -> float:
    return _numbers([_text_of(_wanted(element, tag, name))], f"{name}: {tag}")[0]
