"""Label files of one image each, in the forms of YOLO, VOC and VisDrone, as objects in image pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from xml.parsers import expat

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
    """An object of a label file.

    Attributes:
        category: name, or the file's own number.
        box_xywh: x, y, width, height in image pixels.
        is_crowd: whether it is ignored in evaluation, as COCO's crowds are.
    """

    category: str | int
    box_xywh: tuple[float, float, float, float]
    is_crowd: bool = False


class VocImage(NamedTuple):
    """The content of a VOC file: (height, width) in pixels, and the objects."""

    hw: tuple[int, int]
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

    Args:
        text: the file's content.
        image_hw: (height, width) of the image in pixels.
        classes: number of classes.
        name: the file's name in error messages.

    Returns:
        The objects, a class number as category; of a polygon its box.

    Raises:
        UserError: if a line is not of this form; it names file and line.
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

    Args:
        text: the file's content.
        name: the file's name in error messages.

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


@dataclass
class _Element:
    """An XML element with the line where it begins."""

    tag: str
    line: int
    texts: list[str] = field(default_factory=list)
    children: list[_Element] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Its text, without spaces around it."""
        return "".join(self.texts).strip()

    def child(self, tag: str) -> _Element | None:
        """The first child of this tag, or None."""
        return next((child for child in self.children if child.tag == tag), None)


def _parse_xml(data: bytes, name: str) -> _Element:
    """Parse XML into elements with lines, which the standard library's trees lack."""
    document = _Element("", 1)
    parser, open_elements = expat.ParserCreate(), [document]

    def start(tag: str, attributes: dict[str, str]) -> None:
        """Add an element to the innermost open one."""
        del attributes
        element = _Element(tag, parser.CurrentLineNumber)
        open_elements[-1].children.append(element)
        open_elements.append(element)

    def refuse_entity(*declaration: object) -> None:
        """Raise `UserError`: entities can expand without end."""
        msg = f"{name} line {parser.CurrentLineNumber} must declare no entity, got {declaration[0]!r}: remove it"
        raise UserError(msg)

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda tag: open_elements.pop()
    parser.CharacterDataHandler = lambda text: open_elements[-1].texts.append(text)
    # A few of them, each made of the last, are a text without end.
    parser.EntityDeclHandler = refuse_entity
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        msg = f"{name} line {error.lineno} must be XML, got something else ({error}): correct or export it again"
        raise UserError(msg) from error
    return document.children[0]


def parse_voc(data: bytes, name: str) -> VocImage:
    """Read a VOC file: the image's size and its objects.

    VOC counts pixels from 1, and a box holds its last pixel: xmin 1 and xmax 1 are the first column. An object that is
    marked as difficult is a crowd, since VOC's evaluation ignores it.

    Args:
        data: the file's content.
        name: the file's name in error messages.

    Raises:
        UserError: if it is not XML, or lacks a size, a name or a box; it names file and line.
    """
    root = _parse_xml(data, name)
    size = _wanted(root, "size", name)
    hw = (_number_in(size, "height", name), _number_in(size, "width", name))
    if min(hw) < 1 or any(side % 1 for side in hw):
        msg = f"{name} line {size.line}: size must have whole numbers of 1 or more, got {hw}: correct it"
        raise UserError(msg)
    return VocImage((int(hw[0]), int(hw[1])), [_voc_object(e, name) for e in root.children if e.tag == "object"])


def _voc_object(element: _Element, name: str) -> LabelledObject:
    category = _wanted(element, "name", name).text
    if not category:
        msg = f"{name} line {element.line}: name of an object must not be empty: correct it"
        raise UserError(msg)
    box = _wanted(element, "bndbox", name)
    x0, y0, x1, y1 = (_number_in(box, side, name) for side in ("xmin", "ymin", "xmax", "ymax"))
    if x1 < x0 or y1 < y0:
        msg = f"{name} line {box.line}: bndbox must have xmin <= xmax and ymin <= ymax, got others: correct it"
        raise UserError(msg)
    # Some tools count from 0: their first pixel is taken as VOC's first.
    x0, y0 = max(x0, 1.0) - 1, max(y0, 1.0) - 1
    difficult = element.child("difficult")
    is_difficult = difficult is not None and difficult.text == "1"
    return LabelledObject(category, (x0, y0, x1 - x0, y1 - y0), is_difficult)


def _wanted(element: _Element, tag: str, name: str) -> _Element:
    found = element.child(tag)
    if found is None:
        msg = f"{name} line {element.line}: {element.tag} must have {tag}, got none: add it"
        raise UserError(msg)
    return found


def _number_in(element: _Element, tag: str, name: str) -> float:
    found = _wanted(element, tag, name)
    return _numbers([found.text], f"{name} line {found.line}: {tag}")[0]
