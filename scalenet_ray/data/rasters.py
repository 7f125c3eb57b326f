"""Large TIFF images that are read by window, without decoding the rest.

A TIFF of more than `WINDOWED_PIXELS` pixels is read so, where rasterio is installed (`pip install
'scalenet-ray[geo]'`), and a smaller one if it has bands that Pillow does not know, as multispectral images do. It must
have tiles or narrow strips, 8 or 16 bits a sample, and grey or RGB colours, upright; GeoTIFF and COG are such files. On
S3 only the bytes of these tiles are fetched.

- Coarse looks read the file's overviews. Without overviews every pixel under the look is decoded, but not kept.
- Of several bands the first three are red, green and blue. Parts that a band of opacity leaves transparent show white.
- 16 bits become 8 as in `data.images`: 65535 is 255.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import IO, Any, NamedTuple, cast

import numpy as np
from PIL import Image, TiffTags
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.geometry import AnyImage, Window
from scalenet_ray.data.images import MAX_PIXELS, read_image, to_rgb
from scalenet_ray.data.storage import Address, RangeFile
from scalenet_ray.data.video import frame_of, read_frame

WINDOWED_PIXELS = 50_000_000
"""Pixels above which a TIFF is read by window: decoded, they take 150 MB."""

_SUFFIXES = (".tif", ".tiff")

_MAX_BLOCK_BYTES = 64 * 2**20
"""Size limit of a tile or strip, which is decoded as a whole."""

_MAX_SIDE = 2**20
"""Limit of a side: above, float32 cannot hold a box to an eighth of a pixel."""

_HELD_BYTES = 16 * 2**20
"""Memory of an open file: its list of tiles, and what is read ahead."""

_SETTINGS: dict[str, Any] = {
    # Decoded tiles that are kept, in the whole process.
    "GDAL_CACHEMAX": 128 * 2**20,
    # Files beside the image would change its pixels, and cost requests.
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
}

_NAME = "file"
"""Name of every file in GDAL's messages, to which no part of an address must mean anything."""

_INSTALL = "pip install 'scalenet-ray[geo]'"


def open_image(uri: Address, *, expect_hw: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS) -> AnyImage:
    """Open an image: a large TIFF to be read by window, any other decoded, also a video's frame (`data.video`).

    Args:
        uri: a local path or a store's address.
        expect_hw: annotated (height, width), see `data.images.decode_image`.
        max_pixels: limit of an image that is decoded as a whole.

    Raises:
        TileError: if it is missing, unreadable, damaged, too large, or not of the annotated size.
    """
    if (frame := frame_of(uri)) is not None:
        return read_frame(frame, max_pixels)
    raster = open_raster(uri, expect_hw=expect_hw, max_pixels=max_pixels)
    return read_image(uri, expect_hw=expect_hw, max_pixels=max_pixels) if raster is None else raster


def open_raster(
    uri: Address, *, expect_hw: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> Raster | None:
    """Open a TIFF to be read by window, see the module; None if the image is to be decoded as a whole.

    Takes the arguments of `open_image`, and raises as it does.
    """
    tags = _tags(uri)
    pixels = 0 if tags is None else tags.height * tags.width
    if tags is None or (pixels <= WINDOWED_PIXELS and not tags.has_bands):
        return None
    obstacle = tags.obstacle
    if obstacle is not None:
        if pixels <= max_pixels and not tags.has_bands:
            return None
        which = f"of more than {max_pixels} pixels" if pixels > max_pixels else f"of {len(tags.bits)} bands"
        msg = (
            f"an image {which} must be a TIFF that can be read by window, got {tags.height} x {tags.width} pixels "
            f"{obstacle}"
        )
        raise TileError(msg)
    if expect_hw is not None and (int(expect_hw[0]), int(expect_hw[1])) != (tags.height, tags.width):
        msg = (
            f"the image must be {expect_hw} (height, width) as annotated, got {(tags.height, tags.width)}: "
            "use the file that was annotated, or correct the annotation"
        )
        raise TileError(msg)
    return Raster(uri, tags)


def size_by_window(uri: Address) -> tuple[int, int] | None:
    """(height, width) of a TIFF with bands that Pillow does not know; None for anything else."""
    tags = _tags(uri)
    return (tags.height, tags.width) if tags is not None and tags.has_bands else None


# --- what a file's header says ----------------------------------------------------------------------


class _Tags(NamedTuple):
    """Tags of a TIFF's first image."""

    height: int
    width: int
    block_hw: tuple[int, int]
    bits: tuple[int, ...]
    is_unsigned: bool
    colours: int
    compression: int
    orientation: int
    is_planar: bool
    extras: tuple[int, ...]

    @property
    def has_bands(self) -> bool:
        """True for bands that Pillow does not know: several of grey, or more than it decodes beside RGB."""
        if self.colours == _GREY:
            return len(self.bits) > (1 if max(self.bits) > 8 else 2)
        return self.colours == _RGB and len(self.bits) > (4 if max(self.bits) > 8 else 6)

    @property
    def bands(self) -> list[int]:
        """Numbers of the bands to read, from 1: grey or red, green and blue, then the opacity if there is one."""
        count = len(self.bits)
        shown = 3 if count >= 3 else 1
        opacity = [count - len(self.extras) + i + 1 for i, extra in enumerate(self.extras) if extra == _OPACITY]
        return [*range(1, shown + 1), *(band for band in opacity[:1] if band > shown)]

    @property
    def obstacle(self) -> str | None:
        """Why it cannot be read by window, and what to do; None if it can."""
        block = self.block_hw[0] * self.block_hw[1] * (1 if self.is_planar else len(self.bits)) * max(self.bits) // 8
        as_rgb = "convert them, e.g. with gdal_translate -expand rgb or -colorinterp"
        if self.bits not in ((8,) * len(self.bits), (16,) * len(self.bits)) or not self.is_unsigned:
            return (
                "that are not 8- or 16-bit unsigned integers: export them so, e.g. with gdal_translate -scale -ot Byte"
            )
        if self.colours not in _COLOURS or (self.colours == _YCBCR and self.compression != _JPEG):
            return f"of {_name_of(self.colours)} colours, not grey or RGB: {as_rgb}"
        if _PREMULTIPLIED in self.extras:
            return f"with premultiplied opacity: {as_rgb}"
        if self.orientation != 1:
            return f"stored with orientation {self.orientation}: store them upright"
        if max(self.height, self.width) > _MAX_SIDE:
            return f"of which a side exceeds {_MAX_SIDE}: split it"
        if block > _MAX_BLOCK_BYTES:
            return f"in blocks of {block} bytes: store it in tiles, e.g. with gdal_translate -co TILED=YES"
        if find_spec("rasterio") is None:
            return f"without rasterio, which reads it: {_INSTALL}"
        return None


# Values of tags: grey, RGB and YCbCr; JPEG compression, of which GDAL makes RGB; kinds of further bands.
_COLOURS = _GREY, _RGB, _YCBCR = 1, 2, 6
_JPEG = 7
_PREMULTIPLIED, _OPACITY = 1, 2


def _name_of(colours: int) -> str:
    names = {value: name for name, value in TiffTags.lookup(262).enum.items()}
    return names.get(colours, f"unknown ({colours})")


def _is_tiff(uri: Address) -> bool:
    return os.fspath(uri).lower().endswith(_SUFFIXES)


def _tags(uri: Address) -> _Tags | None:
    """Read the tags of a TIFF; None for anything else: reading it as a whole says what is wrong."""
    if not _is_tiff(uri):
        return None
    try:
        with warnings.catch_warnings(), RangeFile(uri) as file:
            warnings.simplefilter("ignore")
            header = file.read(8)
            # BigTIFF's is twice as long.
            tags = ImageFileDirectory_v2(header + file.read(8) if 43 in header[2:4] else header)
            file.seek(tags.next)
            tags.load(cast(IO[bytes], file))
            height, width = int(tags[257]), int(tags[256])
            bits, samples = tuple(tags.get(258, (1,))), int(tags.get(277, 1))
            return _Tags(
                height=height,
                width=width,
                block_hw=(min(height, tags.get(323, tags.get(278, height))), tags.get(322, width)),
                bits=bits * samples if len(bits) == 1 else bits,
                is_unsigned=set(tags.get(339, (1,))) == {1},
                colours=int(tags.get(262, 1)),
                compression=int(tags.get(259, 1)),
                orientation=int(tags.get(274, 1)),
                is_planar=tags.get(284, 1) == 2,
                extras=tuple(tags.get(338, ())),
            )
    except Exception:  # Pillow raises exceptions of any type on invalid bytes.
        return None


# --- pixels -----------------------------------------------------------------------------------------


class Raster:
    """A TIFF image that is read by window: an `ImageSource`. Raises `TileError` if it cannot be opened."""

    nbytes = _HELD_BYTES

    def __init__(self, uri: Address, tags: _Tags) -> None:
        self._hw, self._bands = (tags.height, tags.width), tags.bands
        self._errors: list[Exception] = []
        with _explained("the TIFF", self._errors):
            self._dataset = _open(uri, self._errors)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, 3), in image pixels."""
        return (*self._hw, 3)

    def read(self, window: Window, reduction: int) -> np.ndarray:
        """Read a window, see `ImageSource`, reduced from the overviews; raises `TileError` if its tiles are damaged."""
        from rasterio.enums import Resampling  # pyright: ignore[reportMissingImports]

        reduced_hw = -(-window.height // reduction), -(-window.width // reduction)
        with _explained(f"the TIFF's window {window.xyxy}", self._errors):
            values = self._dataset.read(
                self._bands,
                window=((window.y0, window.y1), (window.x0, window.x1)),
                out_shape=(len(self._bands), *reduced_hw),
                resampling=Resampling.average,
            )
        return _as_rgb(np.moveaxis(values, 0, 2))


def _as_rgb(values: np.ndarray) -> np.ndarray:
    """Convert [h, w, bands] uint8 or uint16 to [h, w, 3] uint8 RGB."""
    if values.shape[2] == 1:
        return to_rgb(Image.fromarray(values[:, :, 0]))
    if values.dtype == np.uint16:
        values = (values >> 8).astype(np.uint8)
    values = np.ascontiguousarray(values)
    return values if values.shape[2] == 3 else to_rgb(Image.fromarray(values))


class _WatchedFile(RangeFile):
    """A file for GDAL, which takes no exceptions: they are noted, and the file seems to end."""

    def __init__(self, uri: Address, errors: list[Exception]) -> None:
        self._errors = errors
        try:
            super().__init__(uri)
        except Exception as error:
            errors.append(error)
            raise

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes; none if the store fails."""
        try:
            return super().read(size)
        except Exception as error:
            self._errors.append(error)
            return b""


def _open(uri: Address, errors: list[Exception]) -> Any:
    """Open a TIFF with rasterio; errors of the store are added to `errors`."""
    import rasterio  # pyright: ignore[reportMissingImports]

    # No other driver sees untrusted bytes.
    return rasterio.open(_NAME, driver="GTiff", opener=lambda path, mode="rb": _WatchedFile(uri, errors))


@contextmanager
def _explained(what: str, errors: list[Exception]) -> Iterator[None]:
    """Set GDAL up for a block, and convert its errors, or those noted of the store, to `TileError`."""
    from rasterio import Env  # pyright: ignore[reportMissingImports]

    def note(record: logging.LogRecord) -> bool:
        """Add a warning that hides missing pixels to the errors; True, so that it is logged too."""
        # GDAL fills the missing part of a JPEG tile with grey, and says so in a warning only.
        text = record.getMessage()
        if "premature end" in text.lower():
            errors.append(OSError(text))
        return True

    errors.clear()
    log = logging.getLogger("rasterio._err")
    log.setLevel(logging.WARNING)
    log.addFilter(note)
    try:
        with warnings.catch_warnings(), Env(**_SETTINGS):
            warnings.simplefilter("ignore")
            yield
        failed: BaseException | None = errors[0] if errors else None
    except Exception as error:
        failed = errors[0] if errors else error.__cause__ or error
    finally:
        log.removeFilter(note)
    if failed is not None:
        # GDAL's name of the file is another one each time.
        reason = re.sub(r"/vsiriopener_\w+/", "", str(failed))
        msg = f"{what} cannot be read ({reason}): the file is damaged or out of reach; fetch or export it again"
        raise TileError(msg) from failed


# --- georeference -----------------------------------------------------------------------------------


def _to_wgs84(points: np.ndarray, affine: tuple[float, ...], crs: str) -> np.ndarray:
    from rasterio.warp import transform  # pyright: ignore[reportMissingImports]

    a, b, c, d, e, f = affine
    x, y = points.astype(np.float64).T
    failed: Exception | None = None
    try:
        placed = np.array(transform(crs, "EPSG:4326", a * x + b * y + c, d * x + e * y + f)).T.reshape(-1, 2)
    except Exception as error:  # GDAL's errors have no public base class.
        placed, failed = np.full((1, 2), np.nan), error
    if not np.isfinite(placed).all():
        msg = f"boxes must lie where the image's reference system holds, got transform {affine}: correct it"
        raise UserError(msg) from failed
    return placed


def georeference_of(uri: Address) -> Callable[[np.ndarray], np.ndarray] | None:
    """Read the georeference of a GeoTIFF; None if the image is no TIFF by its name, or has none.

    Returns:
        [N, 2] x, y in image pixels -> [N, 2] float64 longitude, latitude in degrees; raises `UserError` if a point lies
        where the reference system does not reach.

    Raises:
        TileError: if it is missing or cannot be read.
        UserError: if rasterio is not installed.
    """
    if not _is_tiff(uri):
        return None
    if find_spec("rasterio") is None:
        msg = f"the georeference of {os.fspath(uri)} must be read with rasterio, got none installed: {_INSTALL}"
        raise UserError(msg)
    errors: list[Exception] = []
    with _explained(f"the georeference of {os.fspath(uri)}", errors), _open(uri, errors) as dataset:
        if dataset.crs is None or dataset.transform.is_identity:
            return None
        return partial(_to_wgs84, affine=tuple(dataset.transform)[:6], crs=dataset.crs.to_wkt())
