"""Names of a network's classes: from a file, from the metadata of an ONNX file, or COCO's."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from scalenet_ray.core.errors import UserError
from scalenet_ray.data.storage import read_bytes

Categories = dict[int, str]

COCO_NUM_CLASSES = 91
"""Number of outputs of a network whose class index is the category id: 0 is background, ids in gaps are unused."""

_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_COCO_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, "
    "laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, "
    "scissors, teddy bear, hair drier, toothbrush"
)

COCO_CATEGORIES: Categories = dict(
    zip((id_ for id_ in range(1, COCO_NUM_CLASSES) if id_ not in _UNUSED_IDS), _COCO_NAMES.split(", "), strict=True)
)
"""The 80 categories of COCO's detection task."""

_REMEDY = "name them in a file, one a line, as onnx:PATH@FILE"


def read_names(path: str) -> list[str]:
    """Names of a text file, local or in a store, one a line, without empty lines at its end.

    Raises:
        FileNotFoundError: if the file does not exist.
        UserError: if it is not UTF-8, holds no name, or has an empty line between names.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{path} must hold class names in UTF-8, one a line, got {error}"
        raise UserError(msg) from error
    names = [line.strip() for line in text.rstrip().splitlines()]
    if not all(names) or not names:
        line = [*names, ""].index("") + 1
        msg = f"{path} must hold class names, one a line, got an empty line {line}: name every class"
        raise UserError(msg)
    return names


def classes_of(
    count: int | None, metadata: Mapping[str, str], names_file: str | None, *, first_id: int = 0
) -> tuple[Categories, str]:
    """Categories of a network, class id -> name, and where they come from. Index i is the i-th id in ascending order.

    Args:
        count: number of its classes; None if its outputs do not show it.
        metadata: metadata of its ONNX file: `categories`, JSON of id -> name, or `names` as Ultralytics writes it.
        names_file: text file of names, one a line, which comes before the metadata; None for none.
        first_id: id of the first name of the file.

    Raises:
        FileNotFoundError: if the file of names does not exist.
        UserError: if there are no names, their number is another than that of the classes, or they can't be read.
    """
    if names_file is not None:
        categories, source = dict(enumerate(read_names(names_file), first_id)), names_file
    elif key := next((key for key in ("categories", "names") if key in metadata), None):
        categories, source = _parsed(metadata[key], key), f"metadata {key!r}"
    elif count in (None, len(COCO_CATEGORIES)):
        return dict(COCO_CATEGORIES), "COCO's 80, since the file names none"
    else:
        msg = f"the network has {count} classes, and its file names none: {_REMEDY}"
        raise UserError(msg)
    if count not in (None, len(categories)):
        msg = f"the network has {count} classes by its outputs, got {len(categories)} names from {source}: {_REMEDY}"
        raise UserError(msg)
    return categories, source


def _parsed(text: str, key: str) -> Categories:
    """Class id -> name from JSON or a Python literal, as a mapping or a list."""
    found: Any = None
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            found = parse(text)
            break
    try:
        rows = enumerate(found) if isinstance(found, list | tuple) else found.items()
        categories = {int(class_id): str(name) for class_id, name in rows}
    except (AttributeError, TypeError, ValueError):
        categories = {}
    if not categories:
        msg = f"metadata {key!r} must map class ids to names, or list the names, got {text[:80]!r}: {_REMEDY}"
        raise UserError(msg)
    return categories
