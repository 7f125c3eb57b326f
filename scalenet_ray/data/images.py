"""Image bytes -> pixels, and windows of them -> tiles.

What is decoded, and how (nothing else is): the first frame of a JPEG, PNG, TIFF, BMP, WebP or GIF.
- Orientation: EXIF is obeyed, unless only the stored pixels have the annotated size.
- Grey, palette, CMYK and YCbCr become RGB; colour profiles are ignored.
- Transparent parts show white, as on a page.
- 16 bits become 8 by rounding value / 257, so that 65535 is 255; 16-bit colour keeps its upper byte.
- 32-bit integers and floats are refused: nothing in the file says which value is white.
- A JPEG that lacks nothing but its end marker is read, as browsers do; one whose last scan is cut is refused.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

from scalenet_ray.core.errors import TileError
from scalenet_ray.data.storage import Address, local_path, read_bytes

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "OTHER_SUFFIXES",
    "decode_image",
    "image_hw",
    "read_image",
    "to_rgb",
]

MAX_PIXELS = 200_000_000
"""The largest image that is decoded, in pixels: a phone's 200 megapixels, and about 2 GB while it is read."""


# No picture needs more than four channels of 16 bits a pixel; a small one may have a large profile beside it.
_BYTES_PER_PIXEL = 8


_FEWEST_BYTES = 16 * 2**20


IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""The endings of the formats that are decoded."""


OTHER_SUFFIXES = (
    *(".avif", ".exr", ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpx", ".jxl", ".mpo"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"),
    *(".pbm", ".pgm", ".pnm", ".ppm", ".psd", ".svg", ".tga"),
    *(".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"),
)
"""The endings of pictures and videos that are not read: who has them in a folder is told that they are left out."""


# Readers are called by name and not through Image.open: only these ever see a stranger's bytes, and the
# limit on pixels is the one asked for, with no setting of Pillow's changed for the whole process.
_READERS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"II*\x00", TiffImagePlugin.TiffImageFile),
    (b"MM\x00*", TiffImagePlugin.TiffImageFile),
    (b"II+\x00", TiffImagePlugin.TiffImageFile),
    (b"MM\x00+", TiffImagePlugin.TiffImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
)


@dataclass(frozen=True)
class _Header:
    """An opened image whose pixels are not decoded yet.

    Attributes:
        image: Pillow's image.
        stored_hw: (height, width) of the pixels as they lie in the file.
        orientation: 1 to 8, EXIF's number.
    """

    image: ImageFile
    stored_hw: tuple[int, int]
    orientation: int

    @property
    def upright_hw(self) -> tuple[int, int]:
        """(height, width) once turned as EXIF says."""
        height, width = self.stored_hw
        return (width, height) if self.orientation >= 5 else (height, width)


@contextmanager
def _guarded() -> Iterator[None]:
    """Turn whatever Pillow raises into a TileError: on broken bytes its readers raise anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except TileError:
        raise
    except Exception as error:
        msg = f"the image cannot be decoded ({type(error).__name__}: {error}): it is damaged; fetch or export it again"
        raise TileError(msg) from error


def _read_header(data: bytes, max_pixels: int) -> _Header:
    reader = next((reader for magic, reader in _READERS if data.startswith(magic)), None)
    if reader is None:
        found = f"{len(data)} bytes that start with {data[:8]!r}" if data else "an empty file"
        msg = f"an image must be a JPEG, PNG, TIFF, BMP, WebP or GIF, got {found}: convert it or leave it out"
        raise TileError(msg)
    with _guarded():
        image = reader(io.BytesIO(data), "")
        width, height = image.size
        if width * height > max_pixels:
            msg = (
                f"an image may have {max_pixels} pixels, got {height} x {width} = {height * width}: split or shrink it"
            )
            raise TileError(msg)
        if width * height == 0:
            msg = f"an image must have pixels, got {height} x {width}: leave it out"
            raise TileError(msg)
        orientation = _orientation(image)
        # Pillow's TIFF reader tells the turned size, and turns the pixels itself.
        is_turned = isinstance(image, TiffImagePlugin.TiffImageFile) and orientation >= 5
        return _Header(image, (width, height) if is_turned else (height, width), orientation)


def _orientation(image: ImageFile) -> int:
    """EXIF's orientation, 1 if there is none that can be read."""
    try:
        # Not image.getexif(): a PNG's would decode the pixels to find EXIF behind them.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except (ArithmeticError, AssertionError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error):
        return 1  # Broken EXIF is no reason to lose the picture.
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def image_hw(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """The (height, width) that `decode_image` gives without `expect_hw`, from the header alone.

    Raises:
        TileError: if it is no image, or too large.
    """
    return _read_header(data, max_pixels).upright_hw


def read_image(uri: Address, *, expect_hw: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read and decode a picture; a file too large to hold `max_pixels` is refused before it is read.

    Args:
        uri: a local path, file:// or s3:// address.
        expect_hw: see `decode_image`.
        max_pixels: see `decode_image`.

    Returns:
        [h, w, 3] uint8 RGB, read-only.

    Raises:
        TileError: whatever is wrong with this one picture: not there, not to be read, or as in `decode_image`.
    """
    try:
        path = local_path(uri)
        if path is not None and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            msg = f"cannot read {os.fspath(uri)}: it is a pipe, a socket or a device, not a file; leave it out"
            raise TileError(msg)
        data = read_bytes(uri, max_bytes=max(_BYTES_PER_PIXEL * max_pixels, _FEWEST_BYTES))
    # A ValueError: the address is none of ours, or has a character that no file's name has.
    except (OSError, ValueError) as error:
        raise TileError(str(error)) from error
    return decode_image(data, expect_hw=expect_hw, max_pixels=max_pixels)


def decode_image(
    data: bytes,
    *,
    expect_hw: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    apply_exif: bool = True,
) -> np.ndarray:
    """Decode a picture by the rules above.

    Args:
        data: the file's bytes.
        expect_hw: (height, width) that the annotations say. Boxes drawn on pixels that were not turned
            by EXIF are common: then the stored pixels are given, if they alone have this size.
        max_pixels: the limit, checked before any pixel is decoded. Pillow itself refuses a TIFF or WebP of
            more than 179 million pixels.
        apply_exif: whether to turn the picture upright.

    Returns:
        [h, w, 3] uint8 RGB, read-only: many tiles are cut from it.

    Raises:
        TileError: if it is no image, damaged, too large, of floats, or not of the annotated size.
    """
    header = _read_header(data, max_pixels)
    turn = apply_exif
    if expect_hw is not None:
        expect_hw = (int(expect_hw[0]), int(expect_hw[1]))
        if expect_hw not in (header.upright_hw, header.stored_hw):
            msg = (
                f"the image must be {expect_hw} (height, width) as annotated, got {header.stored_hw}: "
                "use the file that was annotated, or correct the annotation"
            )
            raise TileError(msg)
        turn = (header.upright_hw if turn else header.stored_hw) == expect_hw and turn
    with _guarded():
        header = _loaded(header, data, max_pixels)
        pixels = to_rgb(header.image)
    if isinstance(header.image, TiffImagePlugin.TiffImageFile):
        pixels = pixels if turn else _turned(pixels, {6: 8, 8: 6}.get(header.orientation, header.orientation))
    elif turn:
        pixels = _turned(pixels, header.orientation)
    pixels = np.ascontiguousarray(pixels)
    pixels.flags.writeable = False
    return pixels


def _loaded(header: _Header, data: bytes, max_pixels: int) -> _Header:
    """The header of an image whose pixels are decoded; of a JPEG without its end marker, with that put back."""
    # No scan holds an end marker: behind the last one it stands, or nowhere. Pillow takes zeros for pixels until then.
    is_jpeg = isinstance(header.image, JpegImagePlugin.JpegImageFile)
    if is_jpeg and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        ended = _with_end_marker(data)
        if ended is None:
            msg = "image file is truncated"
            raise OSError(msg)
        header = _read_header(ended, max_pixels)
    header.image.load()
    return header


# Bits of many kinds, and each restart marker: whatever a scan still waits for, it takes some of these for pixels.
_MORE_SCAN = tuple(
    b"".join(bytes([start] * 1024) + bytes([0xFF, 0xD0 + i % 8]) for i in range(24))
    for start in (0xFE, 0xAA, 0x55, 0xCC, 0x33, 0x0F, 0x6D)
)


_LONGEST_END = 4


def _with_end_marker(data: bytes) -> bytes | None:
    """A JPEG that breaks off, with an end marker; None if more than that is missing.

    Decoders fill what is missing of a scan with grey and say nothing. But a scan that is whole does not depend on what
    comes behind it, and one that is cut does: so its pixels are compared with a few ways in which it might go on.
    """
    kept = data.rstrip(b"\x00\xff")
    if len(data) - len(kept) < _LONGEST_END:
        # The first half of the end marker; a longer run was written where there was nothing to write.
        kept = data[:-1] if data.endswith(b"\xff") else data
    if not _has_all_scans(kept):
        return None
    ended = kept + b"\xff\xd9"
    pixels = _decoded_jpeg(ended)
    same = all(np.array_equal(pixels, _decoded_jpeg(kept + more + b"\xff\xd9")) for more in _MORE_SCAN)
    return ended if same else None


def _decoded_jpeg(data: bytes) -> np.ndarray:
    return np.asarray(JpegImagePlugin.JpegImageFile(io.BytesIO(data), ""))


def _has_all_scans(data: bytes) -> bool:
    """Whether a scan of a JPEG has begun for each bit of each coefficient of each component."""
    # Component -> the lowest bit seen of each of its 64 coefficients; 255: none.
    lowest: dict[int, bytearray] = {}
    at = 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker in (0x00, 0x01, 0xFF, *range(0xD0, 0xD8)):
            at = max(data.find(b"\xff", at + 1), 0) or len(data)
            continue
        body = data[at + 4 : at + 2 + int.from_bytes(data[at + 2 : at + 4])]
        if marker in (0xC0, 0xC1, 0xC2):
            lowest = {component: bytearray(b"\xff" * 64) for component in body[6::3]}
        if marker == 0xDA and len(body) >= 4 + 2 * body[0]:
            first, last, bits = body[1 + 2 * body[0] :][:3]
            for component in body[1 : 1 + 2 * body[0] : 2]:
                lowest.setdefault(component, bytearray(64))[first : last + 1] = bytes([bits & 15]) * (last + 1 - first)
        at += 4 + len(body)
    return bool(lowest) and not any(any(each) for each in lowest.values())


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels [h, w, 3] upright: a view."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def to_rgb(image: Image.Image) -> np.ndarray:
    """A loaded image of any mode -> [h, w, 3] uint8 RGB, by the rules above; its EXIF is not looked at.

    Raises:
        TileError: if it is of 32-bit integers or floats.
    """
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        msg = f"an image must have 8 or 16 bits a channel, got {kind}: export it as 16-bit or 8-bit"
        raise TileError(msg)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # Converting RGB to RGB is a copy, of 4 bytes a pixel.
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
