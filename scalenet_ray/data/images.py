"""Decoding of images to RGB.

Decodes the first frame of JPEG, PNG, TIFF, BMP, WebP and GIF:
- EXIF orientation is applied, unless only the stored pixels have the annotated size.
- Grey, palette, CMYK and YCbCr become RGB; colour profiles are ignored.
- Transparent pixels are composited over white.
- 16-bit grey becomes 8-bit by rounding value / 257, so that 65535 is 255; 16-bit colour keeps its upper byte.
- 32-bit integers and floats are refused: the file does not define their range.
- A JPEG that lacks only its end marker is read, as browsers do; one with a truncated last scan is refused.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, cast

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
from scalenet_ray.data.storage import Address, RangeFile, local_path, read_bytes

MAX_PIXELS = 200_000_000
"""Size limit of an image, in pixels: 200 megapixels, as of phone cameras, take about 2 GB while they are decoded."""

# Size limit of a file, per pixel (four channels of 16 bits) and at least (a small image may hold a large profile).
_BYTES_PER_PIXEL = 8
_MIN_BYTES_LIMIT = 16 * 2**20

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Suffixes of the formats that are decoded."""

OTHER_SUFFIXES = (
    *(".avif", ".exr", ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpx", ".jxl", ".mpo"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"),
    *(".pbm", ".pgm", ".pnm", ".ppm", ".psd", ".svg", ".tga"),
)
"""Suffixes of images that are not decoded; listings report how many such files they skip."""

# The readers are called directly, not through Image.open: no other reader sees untrusted bytes, and the limit on pixels
# does not depend on Pillow's process-wide setting.
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
    """An opened image whose pixels are not decoded yet, with their size as stored, and the EXIF orientation, 1 to 8."""

    image: ImageFile
    stored_hw: tuple[int, int]
    orientation: int

    @property
    def upright_hw(self) -> tuple[int, int]:
        """(height, width) after EXIF orientation is applied."""
        height, width = self.stored_hw
        return (width, height) if self.orientation >= 5 else (height, width)


@contextmanager
def _guarded() -> Iterator[None]:
    """Convert any exception to `TileError`: on invalid bytes, Pillow's readers raise exceptions of any type."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except TileError:
        raise
    except Exception as error:
        msg = f"the image cannot be decoded ({type(error).__name__}: {error}): it is damaged; fetch or export it again"
        raise TileError(msg) from error


def _read_header(file: IO[bytes], max_pixels: int) -> _Header:
    start = file.read(8)
    reader = next((reader for magic, reader in _READERS if start.startswith(magic)), None)
    if reader is None:
        found = f"{file.seek(0, os.SEEK_END)} bytes that start with {start!r}" if start else "an empty file"
        msg = f"an image must be a JPEG, PNG, TIFF, BMP, WebP or GIF, got {found}: convert it or leave it out"
        raise TileError(msg)
    with _guarded():
        file.seek(0)
        image = reader(file, "")
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
        # Pillow's TIFF reader applies the orientation itself, to the size and the pixels.
        is_turned = isinstance(image, TiffImagePlugin.TiffImageFile) and orientation >= 5
        return _Header(image, (width, height) if is_turned else (height, width), orientation)


def _orientation(image: ImageFile) -> int:
    """Return the EXIF orientation; 1 if missing or unreadable."""
    try:
        # Not image.getexif(): for a PNG it decodes the pixels to find EXIF behind them.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except (ArithmeticError, AssertionError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def file_hw(uri: Address) -> tuple[int, int]:
    """Read (height, width) of an upright image file from its header; raises `TileError` if there is no such image."""
    try:
        with RangeFile(uri) as file:
            return _read_header(cast(IO[bytes], file), sys.maxsize).upright_hw
    # ValueError: an unsupported address, or a character that file names cannot contain.
    except (OSError, ValueError) as error:
        raise TileError(str(error)) from error


def read_image(uri: Address, *, expect_hw: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read and decode an image, see `decode_image`; a file too large for `max_pixels` is refused before it is read.

    Returns:
        [h, w, 3] uint8 RGB, read-only.

    Raises:
        TileError: if the file is missing or unreadable, or as in `decode_image`.
    """
    try:
        path = local_path(uri)
        if path is not None and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            msg = f"cannot read {os.fspath(uri)}: it is a pipe, a socket or a device, not a file; leave it out"
            raise TileError(msg)
        data = read_bytes(uri, max_bytes=max(_BYTES_PER_PIXEL * max_pixels, _MIN_BYTES_LIMIT))
    # ValueError: an unsupported address, or a character that file names cannot contain.
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
    """Decode an image by the rules in the module's docstring.

    Args:
        data: the file's bytes.
        expect_hw: annotated (height, width). If only the stored pixels have this size, EXIF orientation is not applied:
            such annotations were made without it.
        max_pixels: size limit, checked before pixels are decoded. Pillow itself refuses a TIFF or WebP of more than 179
            million pixels.
        apply_exif: whether to apply EXIF orientation.

    Returns:
        [h, w, 3] uint8 RGB, read-only.

    Raises:
        TileError: if the bytes are not an image, damaged, too large, of floats, or not of the annotated size.
    """
    header = _read_header(io.BytesIO(data), max_pixels)
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
        pixels = pixels if turn else _upright(pixels, {6: 8, 8: 6}.get(header.orientation, header.orientation))
    elif turn:
        pixels = _upright(pixels, header.orientation)
    pixels = np.ascontiguousarray(pixels)
    pixels.flags.writeable = False
    return pixels


def _loaded(header: _Header, data: bytes, max_pixels: int) -> _Header:
    """Decode the pixels of an opened image; a JPEG that lacks its end marker is opened again with the marker added."""
    # Pillow decodes zeros up to a missing end marker. Scans contain none, so it can only follow the last scan.
    is_jpeg = isinstance(header.image, JpegImagePlugin.JpegImageFile)
    if is_jpeg and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        ended = _with_end_marker(data)
        if ended is None:
            msg = "image file is truncated"
            raise OSError(msg)
        header = _read_header(io.BytesIO(ended), max_pixels)
    header.image.load()
    return header


# Continuations of a scan: various bit patterns with each restart marker, so that an incomplete scan decodes some.
_SCAN_CONTINUATIONS = tuple(
    b"".join(bytes([pattern] * 1024) + bytes([0xFF, 0xD0 + i % 8]) for i in range(24))
    for pattern in (0xFE, 0xAA, 0x55, 0xCC, 0x33, 0x0F, 0x6D)
)

_MIN_PADDING = 4


def _with_end_marker(data: bytes) -> bytes | None:
    """Add an end marker to a JPEG that lacks it; return None if more than the marker is missing.

    Decoders silently fill missing parts of a scan with grey. The pixels of a complete scan do not depend on the bytes
    that follow it, those of a truncated scan do: the image is decoded with several continuations and compared.
    """
    kept = data.rstrip(b"\x00\xff")
    if len(data) - len(kept) < _MIN_PADDING:
        # At most the first byte of the end marker; a longer run of such bytes is padding.
        kept = data[:-1] if data.endswith(b"\xff") else data
    if not _has_all_scans(kept):
        return None
    ended = kept + b"\xff\xd9"
    pixels = _decoded_jpeg(ended)
    same = all(np.array_equal(pixels, _decoded_jpeg(kept + more + b"\xff\xd9")) for more in _SCAN_CONTINUATIONS)
    return ended if same else None


def _decoded_jpeg(data: bytes) -> np.ndarray:
    return np.asarray(JpegImagePlugin.JpegImageFile(io.BytesIO(data), ""))


def _has_all_scans(data: bytes) -> bool:
    """Return True if the JPEG has a scan for each bit of each coefficient of each component."""
    # Component -> the lowest bit seen of each of its 64 coefficients, 255 for none.
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
    return bool(lowest) and not any(any(bits) for bits in lowest.values())


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation to stored pixels [h, w, 3]; returns a view."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def to_rgb(image: Image.Image) -> np.ndarray:
    """Convert an image of any mode to [h, w, 3] uint8 RGB; EXIF orientation is not applied.

    Raises:
        TileError: if it has 32-bit integers or floats, or its pixels cannot be loaded.
    """
    # One that was opened is decoded now.
    with _guarded():
        image.load()
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
    # Converting RGB to RGB would copy the image.
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
