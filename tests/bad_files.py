"""Damaged and unusual images, annotations and masks with the expected result of each, and mutations.

python -m tests.bad_files SECONDS    the table of docs/results.md
"""

from __future__ import annotations

import copy
import io
import json
import logging
import random
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.masks import mask_of_segmentation
from scalenet_ray.data.coco import objects_of, parse_annotations, read_annotations
from scalenet_ray.data.images import decode_image

DECODED = READ = None
"""In place of the error's text: it is no error."""

MAX_PIXELS = 10**6

HW = (24, 36)
PIXELS = np.random.default_rng(0).integers(0, 256, (*HW, 3), dtype=np.uint8)
NO_IMAGE = "must be a JPEG, PNG, TIFF, BMP, WebP or GIF, got "
DAMAGED = "cannot be decoded .* it is damaged; fetch or export it again"
TOO_LARGE = "an image may have 1000000 pixels, got .*: split or shrink it"


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a picture."""
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _png(width: int, height: int, *, before: bytes = b"", data: bytes | None = b"") -> bytes:
    """An RGB PNG that says how large it is; `data` None leaves its pixels out."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = b"" if data is None else _chunk(b"IDAT", data)
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + _chunk(b"IEND", b"")


def _sized(height: int, width: int) -> bytes:
    """The JPEG with another size in its frame header."""
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", height, width) + JPEG[at + 4 :]


def _tiff(*entries: tuple[int, int], following: int = 0) -> bytes:
    """A TIFF of one directory of (tag, number), and where the next one is."""
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries))
    return b"II*\x00" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", following)


def _frames(kind: str, **options: Any) -> bytes:
    frames = [Image.fromarray(np.roll(PIXELS, shift, 1)) for shift in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def _palette() -> bytes:
    image = Image.fromarray(PIXELS).quantize(16)
    return encoded(image, "PNG", transparency=bytes(range(0, 256, 16)))


COMPRESSED: str = coco_mask.encode(np.asfortranarray(PIXELS[:, :, 0] > 127, np.uint8))["counts"].decode()
JPEG, PNG = encoded(PIXELS, "JPEG"), encoded(PIXELS, "PNG")
_PROGRESSIVE = encoded(PIXELS, "JPEG", progressive=True)
_GIF, _WEBP, _BMP, _TIFF = (encoded(PIXELS, kind) for kind in ("GIF", "WEBP", "BMP", "TIFF"))
_INTERLACED_GIF = encoded(Image.fromarray(PIXELS).quantize(16), "GIF", interlace=1)
_CMYK = Image.fromarray(PIXELS).convert("CMYK")
_GREY = ((258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (279, 8))
_DEEP_TEXT = b"Comment\x00\x00" + zlib.compress(bytes(80 * 2**20), 9)

PICTURES: dict[str, tuple[bytes, str | None]] = {
    "empty": (b"", NO_IMAGE),
    "one byte": (b"\xff", NO_IMAGE),
    "zeros": (bytes(1000), NO_IMAGE),
    "a web page": (b"<!DOCTYPE html><html>404 Not Found</html>", NO_IMAGE),
    "a PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", NO_IMAGE),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', NO_IMAGE),
    "a HEIC": (b"\x00\x00\x00\x18ftypheic" + bytes(60), NO_IMAGE),
    "a JPEG 2000": (b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(60), NO_IMAGE),
    "an icon": (b"\x00\x00\x01\x00\x01\x00" + bytes(60), NO_IMAGE),
    "an array of pickles": (
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'shape': (1,), }",
        NO_IMAGE,
    ),
    "a sound": (b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(24), DAMAGED),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", NO_IMAGE),
    "JPEG: its first bytes alone": (JPEG[:4], DAMAGED),
    "JPEG: truncated": (JPEG[: len(JPEG) // 2], DAMAGED),
    "JPEG: its header alone": (JPEG[: JPEG.index(b"\xff\xda")], DAMAGED),
    "JPEG: progressive, truncated": (_PROGRESSIVE[: len(_PROGRESSIVE) // 2], DAMAGED),
    "JPEG: rubbish behind its end": (JPEG + b"rubbish" * 100, DECODED),
    "JPEG: without Huffman tables, as in films": (JPEG.replace(b"\xff\xc4", b"\xff\xfe"), DECODED),
    "JPEG: without quantisation tables": (JPEG.replace(b"\xff\xdb", b"\xff\xfe"), DAMAGED),
    "JPEG: height 0": (_sized(0, 36), "cannot be decoded|must have pixels"),
    "JPEG: 65,000 x 65,000": (_sized(65_000, 65_000), TOO_LARGE),
    "JPEG: grey": (encoded(Image.fromarray(PIXELS).convert("L"), "JPEG"), DECODED),
    "JPEG: CMYK": (encoded(_CMYK, "JPEG"), DECODED),
    "JPEG: CMYK, truncated": (encoded(_CMYK, "JPEG")[:-200], DAMAGED),
    "JPEG: turned by EXIF": (encoded(PIXELS, "JPEG", exif=_exif(6)), DECODED),
    "JPEG: an orientation that does not exist": (encoded(PIXELS, "JPEG", exif=_exif(99)), DECODED),
    "JPEG: EXIF of rubbish": (encoded(PIXELS, "JPEG", exif=b"Exif\x00\x00rubbish"), DECODED),
    "JPEG: EXIF that points outside": (encoded(PIXELS, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"), DECODED),
    "JPEG: a colour profile of rubbish": (encoded(PIXELS, "JPEG", icc_profile=b"rubbish" * 50), DECODED),
    "PNG: truncated": (PNG[: len(PNG) // 2], DAMAGED),
    "PNG: a wrong checksum": (PNG[:40] + bytes([PNG[40] ^ 255]) + PNG[41:], DAMAGED),
    "PNG: without pixels": (_png(36, 24, data=None), DAMAGED),
    "PNG: width 0": (_png(0, 24), "cannot be decoded|must have pixels"),
    "PNG: 2 ** 31 - 1 squared": (_png(2**31 - 1, 2**31 - 1), TOO_LARGE),
    "PNG: zeros that unpack to 30 times the limit": (
        _png(10_000, 3_000, data=zlib.compress(bytes(3 * 10_000 * 3_000), 9)),
        TOO_LARGE,
    ),
    "PNG: a comment that unpacks to 80 MB": (_png(36, 24, before=_chunk(b"zTXt", _DEEP_TEXT)), DAMAGED),
    "PNG: pixels that are none": (_png(36, 24, data=zlib.compress(b"short")), DAMAGED),
    "PNG: 16-bit grey": (encoded(np.arange(864, dtype=np.uint16).reshape(HW), "PNG"), DECODED),
    "PNG: palette with transparency": (_palette(), DECODED),
    "PNG: grey with transparency": (encoded(Image.fromarray(PIXELS).convert("LA"), "PNG"), DECODED),
    "PNG: one bit": (encoded(Image.fromarray(PIXELS).convert("1"), "PNG"), DECODED),
    "PNG: animated": (_frames("PNG"), DECODED),
    "GIF: animated": (_frames("GIF"), DECODED),
    "GIF: truncated": (_GIF[: len(_GIF) // 2], DAMAGED),
    "GIF: interlaced, truncated": (_INTERLACED_GIF[:-100], DAMAGED),
    "GIF: 65,535 x 65,535": (_GIF[:6] + b"\xff\xff\xff\xff" + _GIF[10:], TOO_LARGE),
    "GIF: without a picture": (_GIF[:13] + b"\x3b", DAMAGED),
    "WebP: animated": (_frames("WEBP"), DECODED),
    "WebP: truncated": (_WEBP[: len(_WEBP) // 2], DAMAGED),
    "WebP: its header alone": (_WEBP[:12], DAMAGED),
    "BMP: truncated": (_BMP[: len(_BMP) // 2], DAMAGED),
    "BMP: upside down": (_BMP[:22] + struct.pack("<i", -24) + _BMP[26:], DECODED),
    "BMP: 2 ** 30 wide": (_BMP[:18] + struct.pack("<i", 2**30) + _BMP[22:], TOO_LARGE),
    "BMP: 7 bits a pixel": (_BMP[:28] + b"\x07\x00" + _BMP[30:], DAMAGED),
    "TIFF: floats": (encoded(Image.new("F", (3, 2)), "TIFF"), "must have 8 or 16 bits a channel, got floats"),
    "TIFF: 32-bit integers": (encoded(Image.new("I", (3, 2)), "TIFF"), "8 or 16 bits a channel, got 32-bit integers"),
    "TIFF: truncated": (_TIFF[: len(_TIFF) // 2], DAMAGED),
    "TIFF: pages": (_frames("TIFF"), DECODED),
    "TIFF: a directory that follows itself": (_tiff((256, 36), (257, 24), (259, 1), (262, 2), following=8), DAMAGED),
    "TIFF: 2 ** 32 - 1 squared": (_tiff((256, 2**32 - 1), (257, 2**32 - 1), *_GREY), TOO_LARGE),
    "TIFF: an unknown compression": (_tiff((256, 36), (257, 24), (259, 4711), (262, 1), (273, 8), (279, 8)), DAMAGED),
}
"""Kind -> the file, and what the error says; all of at most 36 x 24 pixels, or refused by a limit of `MAX_PIXELS`."""


def document() -> dict[str, Any]:
    """A good instances file: two images, three objects, one of them a crowd."""
    return {
        "images": [
            {"id": 1, "file_name": "a.jpg", "height": 24, "width": 36},
            {"id": 2, "file_name": "b.jpg", "height": 24, "width": 36},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
        "annotations": [
            _object(1, 1, segmentation=[[2, 3, 12, 3, 12, 10, 2, 10]]),
            _object(2, 1, iscrowd=1, segmentation={"size": [24, 36], "counts": [100, 20, 744]}),
            _object(3, 2, segmentation={"size": [24, 36], "counts": COMPRESSED}),
        ],
    }


def _object(annotation_id: int, image_id: int, **fields: Any) -> dict[str, Any]:
    box = {"bbox": [2, 3, 10, 7], "area": 70, "iscrowd": 0}
    return {"id": annotation_id, "image_id": image_id, "category_id": 3, **box, **fields}


_NOTHING = object()


def _with(path: str, value: Any) -> bytes:
    """The good document with another value, or none, at a path such as images.0.id."""
    changed: Any = document()
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    holder = changed
    for part in parents:
        holder = holder[part]
    if value is _NOTHING:
        del holder[last]
    else:
        holder[last] = value
    return json.dumps(changed).encode()


def _without(path: str) -> bytes:
    return _with(path, _NOTHING)


_GOOD = json.dumps(document()).encode()
_BOX = "bbox of annotation 1 of .* must be 4 finite numbers .*: correct or remove it"
_NO_JSON = "must be JSON, got something else .*: fetch or export it again"

DOCUMENTS: dict[str, tuple[bytes, str | None]] = {
    "empty": (b"", _NO_JSON),
    "a web page": (b"<html>404</html>", _NO_JSON),
    "truncated": (_GOOD[: len(_GOOD) // 2], _NO_JSON),
    "in Latin-1": (_GOOD.replace(b"person", b"pi\xe9ton"), _NO_JSON),
    "with a byte order mark": (b"\xef\xbb\xbf" + _GOOD, READ),
    "in UTF-16": (_GOOD.decode().encode("utf-16"), READ),
    "a million brackets": (b"[" * 10**6, _NO_JSON),
    "a number of 5,000 digits": (_GOOD.replace(b"70", b"7" * 5000), _NO_JSON),
    "a list": (b"[]", "must be a JSON object with images, annotations and categories, got list"),
    "null": (b"null", "must be a JSON object .* got NoneType"),
    "NaN": (b"NaN", "must be a JSON object .* got float"),
    "no images": (_without("images"), "must have a list of images, got NoneType: is it an instances file"),
    "images as an object": (_with("images", {}), "must have a list of images, got dict"),
    "not one image": (_with("images", []), "must list at least one image, got none"),
    "an image that is a number": (_with("images.0", 7), r"images\[0\] of .* must have id, file_name"),
    "an image without a name": (_without("images.0.file_name"), "must have id, file_name, got no file_name"),
    "a file name that is a number": (_with("images.0.file_name", 7), "file_name of image 1 .* must be text, got 7"),
    "a file name with half a character": (_with("images.0.file_name", "a\udc80.jpg"), "must be text, got 'a"),
    "an id as text": (_with("images.0.id", "1"), "id of images.0. of .* must be a whole number, got '1': number them"),
    "an id with a fraction": (_with("images.0.id", 1.5), "must be a whole number, got 1.5"),
    "an id that is true": (_with("images.0.id", True), "must be a whole number, got True"),
    "an id over 64 bits": (_with("images.0.id", 2**70), "must be a whole number, got 1180591620717411303424"),
    "two images of one id": (_with("images.1.id", 1), "must have an id of its own, got twice 1: renumber them"),
    "height 0": (_with("images.0.height", 0), "height of image 1 of .* must be 1 or more pixels, got 0"),
    "a negative width": (_with("images.0.width", -3), "width of image 1 of .* must be 1 or more pixels, got -3"),
    "a height with a fraction": (_with("images.0.height", 24.0), "must be 1 or more pixels, got 24.0"),
    "a height as text": (_with("images.0.height", "24"), "must be 1 or more pixels, got '24'"),
    "no height": (_without("images.0.height"), READ),
    "no categories": (_without("categories"), "must have a list of categories, got NoneType"),
    "a category without a name": (_without("categories.0.name"), "must have id, name, got no name"),
    "two categories of one id": (_with("categories.1.id", 1), "must have an id of its own, got twice 1"),
    "half a character in a category": (_with("categories.0.name", "\ud800"), "name of a category of .* must be text"),
    "no annotations": (_without("annotations"), "must have a list of annotations, got NoneType: is it an instances"),
    "an empty list of annotations": (_with("annotations", []), READ),
    "an annotation of no image": (_with("annotations.0.image_id", 9), "image_id of an annotation .* must be listed"),
    "an annotation of no category": (_with("annotations.0.category_id", 9), "category_id of an annotation .* listed"),
    "an image_id as text": (_with("annotations.0.image_id", "1"), "must be a whole number, got '1'"),
    "two annotations of one id": (_with("annotations.1.id", 1), "must have an id of its own, got twice 1"),
    "an annotation without a box": (_without("annotations.0.bbox"), "got no bbox: add it"),
    "a box of NaN": (_with("annotations.0.bbox", [float("nan")] * 4), _BOX),
    "a box without end": (_with("annotations.0.bbox", [0, 0, float("inf"), 1]), _BOX),
    "a box of 1e308": (_with("annotations.0.bbox", [1e308, 0, 1e308, 1]), _BOX),
    "a box of three": (_with("annotations.0.bbox", [1, 2, 3]), _BOX),
    "a box of text": (_with("annotations.0.bbox", ["1", "2", "3", "4"]), _BOX),
    "a box of negative width": (_with("annotations.0.bbox", [1, 2, -3, 4]), _BOX),
    "a box that is null": (_with("annotations.0.bbox", None), _BOX),
    "a box of no size": (_with("annotations.0.bbox", [1, 2, 0, 0]), READ),
    "a box outside its image": (_with("annotations.0.bbox", [-500, 900, 30, 40]), READ),
    "an area of NaN": (_with("annotations.0.area", float("nan")), "area of annotation 1 .* must be 0 or more, got nan"),
    "a negative area": (_with("annotations.0.area", -1), "area of annotation 1 .* must be 0 or more, got -1"),
    "no area": (_without("annotations.0.area"), READ),
    "a damaged segmentation that nothing asks for": (_with("annotations.0.segmentation", "rubbish"), READ),
}
"""Kind -> an instances file, and what the error says."""

_POLYGON = "a polygon must be an even number, 6 or more, of finite numbers"
_RUNS = "run lengths of a segmentation must be 0 or more and sum to 24 x 36"

SEGMENTATIONS: dict[str, tuple[Any, str | None]] = {
    "polygon: good": ([[2, 3, 12, 3, 12, 10, 2, 10]], READ),
    "polygon: an odd count": ([[2, 3, 12, 3, 12, 10, 2]], _POLYGON),
    "polygon: two points": ([[2, 3, 12, 3]], _POLYGON),
    "polygon: no points": ([[]], _POLYGON),
    "no polygon": ([], "a segmentation must be polygons or"),
    "polygon: NaN": ([[2, 3, float("nan"), 3, 12, 10]], _POLYGON),
    "polygon: infinity": ([[2, 3, float("inf"), 3, 12, 10]], _POLYGON),
    "polygon: a number without end": ([[2, 3, 10**400, 3, 12, 10]], _POLYGON),
    "polygon: null": ([[2, 3, None, 3, 12, 10]], _POLYGON),
    "polygon: pairs": ([[[2, 3], [12, 3], [12, 10]]], _POLYGON),
    "polygon: pairs of different lengths": ([[[2, 3], [12], 10]], _POLYGON),
    "polygon: one good and one bad": ([[2, 3, 12, 3, 12, 10], [1, 2]], _POLYGON),
    "polygon: text": ([["2", "3", "12", "3", "12", "10"]], _POLYGON),
    "polygon: not in a list": ([2, 3, 12, 3, 12, 10], _POLYGON),
    "polygon: a point at 1e200": ([[2, 3, 1e200, 3, 12, 10]], READ),
    "polygon: outside": ([[-20, -20, -10, -20, -10, -10]], READ),
    "runs: good": ({"size": [24, 36], "counts": [100, 20, 744]}, READ),
    "runs: past the end": ({"size": [24, 36], "counts": [100, 2**31, 744]}, _RUNS),
    "runs: too few": ({"size": [24, 36], "counts": [100, 20]}, _RUNS),
    "runs: none": ({"size": [24, 36], "counts": []}, _RUNS),
    "runs: huge": ({"size": [24, 36], "counts": [2**62, 2**62]}, _RUNS),
    "runs: of a size as text": ({"size": ["24", "36"], "counts": [864]}, "a segmentation must be polygons or"),
    "runs: negative": ({"size": [24, 36], "counts": [900, -36]}, _RUNS),
    "runs: fractions": ({"size": [24, 36], "counts": [100.5, 763.5]}, _RUNS),
    "runs: of another size": ({"size": [36, 24], "counts": [100, 20, 744]}, "a segmentation must be polygons or"),
    "runs: of no size": ({"counts": [100, 20, 744]}, "a segmentation must be polygons or"),
    "compressed: good": ({"size": [24, 36], "counts": COMPRESSED}, READ),
    "compressed: cut": ({"size": [24, 36], "counts": COMPRESSED[:-1]}, _RUNS),
    "compressed: too few": ({"size": [24, 36], "counts": "11"}, _RUNS),
    "compressed: empty": ({"size": [24, 36], "counts": ""}, _RUNS),
    "compressed: rubbish": ({"size": [24, 36], "counts": "rubbish \u00e9\ud800"}, _RUNS),
    "compressed: without end": ({"size": [24, 36], "counts": "o" * 1000}, _RUNS),
    "a number": (7, "a segmentation must be polygons or"),
    "an object without counts": ({"size": [24, 36]}, "a segmentation must be polygons or"),
}
"""Kind -> a segmentation of an image of 24 x 36, and what the error says."""

NAMES = (
    "",
    "a\0.jpg",
    "/etc/passwd",
    "../a.jpg",
    "a/../../b.jpg",
    "..",
    "\\\\host\\a.jpg",
    "C:a.jpg",
    "s3://other/a.jpg",
)
"""File names that leave the images' folder, or are none."""


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Bytes with a few places changed, cut out, repeated or cut off."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 5)):
        at = chance.randrange(max(1, len(changed)))
        span = chance.randint(1, 40)
        kind = chance.randrange(4)
        if kind == 0:
            changed[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            del changed[at : at + span]
        elif kind == 2:
            changed[at:at] = changed[at : at + span]
        elif chance.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def mutated_document(chance: random.Random) -> Any:
    """The good document with some values replaced by others of any type."""
    changed: Any = document()
    others: list[Any] = [
        None,
        True,
        -1,
        0,
        2**70,
        1e308,
        float("nan"),
        "",
        "a\0",
        "\ud800",
        [],
        {},
        [[]],
        [1],
        {"id": 1},
    ]
    for _ in range(chance.randint(1, 3)):
        holder = changed
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = chance.choice(keys)
            if isinstance(holder[key], dict | list) and chance.random() < 0.8:
                holder = holder[key]
                continue
            holder[key] = copy.deepcopy(chance.choice(others))
            break
    return changed


def read_all(found: Any) -> None:
    """Whatever a job asks of annotations: every object, and every mask."""
    dataset = parse_annotations(found)
    for record in dataset.images:
        for segmentation in objects_of(dataset, record.image_id).segmentations:
            if segmentation is not None:
                mask_of_segmentation(segmentation, HW)


def main(seconds: float) -> None:
    """Mutate for so long, and print what became of it. A crash of the interpreter ends it without a table."""
    # What Pillow has to say of damage comes with its error too.
    logging.disable()
    chance = random.Random(0)
    counts: Counter[str] = Counter()

    def attempt(what: str, act: Callable[[], object], kind: str = "") -> None:
        counts[f"{what}: tried"] += 1
        try:
            act()
        except (TileError, ValueError):
            counts[f"{what}: refused"] += 1
        except Exception as error:
            counts[f"{what}: crashes"] += 1
            sys.stderr.write(f"{what} {kind}: {error!r}\n")

    sources = [data for data, _ in PICTURES.values() if len(data) < 10_000]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(50):
            data = mutated(chance.choice(sources), chance)
            attempt("mutated pictures", lambda data=data: decode_image(data, max_pixels=MAX_PIXELS))
            text = mutated(_GOOD, chance)
            attempt("mutated JSON", lambda text=text: read_all(json.loads(text)))
            values = mutated_document(chance)
            attempt("documents of other types", lambda values=values: read_all(values))
    for kind, (data, _) in PICTURES.items():
        attempt("kinds of pictures", lambda data=data: decode_image(data, max_pixels=MAX_PIXELS), kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "instances.json")
        for kind, (data, _) in DOCUMENTS.items():
            path.write_bytes(data)
            attempt("kinds of instances files", lambda: read_annotations(path), kind)
    for kind, (segmentation, _) in SEGMENTATIONS.items():
        attempt("kinds of segmentations", lambda it=segmentation: mask_of_segmentation(it, HW), kind)
    sys.stdout.write("| bad files | tried | refused with a reason | crashes |\n|---|---|---|---|\n")
    for name in sorted({key.partition(":")[0] for key in counts}):
        tried, refused, crashes = (counts[f"{name}: {part}"] for part in ("tried", "refused", "crashes"))
        sys.stdout.write(f"| {name} | {tried} | {refused} | {crashes} |\n")


if __name__ == "__main__":
    main(float(sys.argv[1]))
